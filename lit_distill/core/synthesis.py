"""The base of methods that learn a small data set: what it is worth is shown by networks that are trained on it."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch

from lit_distill.core.distiller import Distiller
from lit_distill.core.loading import derived_seed

DISTILLED = "distilled"


class Synthesizer(Distiller):
    """Learns a small data set that stands in for the training data. There is no teacher.

    Validation and test say what the set is worth: the student is drawn anew, trained on the set as it is then, and
    tested on real samples. Nothing is chosen by validation. The run keeps the set in its folder, as `distilled/`, and
    beside it, as `student/`, the network that was trained on it at last. The student is not part of checkpoints: it
    follows from the set.

    A domain's base joins this one with its classifier, and says how a student is trained and how the set is kept.
    """

    frozen: ClassVar[tuple[str, ...]] = ("student",)
    _student_of: int | None = None  # the iteration whose set the student was trained on

    @abstractmethod
    def fit_student(self) -> None:
        """Draws the student anew and trains it on the set as it is now; gradients are on, the seed is set."""

    @abstractmethod
    def footprint(self) -> dict[str, int]:
        """Counts the bytes of the set as it is now."""

    @abstractmethod
    def save_distilled(self, folder: Path) -> None:
        """Writes the set as it is now to a folder."""

    def run_seed(self) -> int:
        """The seed of the data module, from which those of the students are derived."""
        return int(self.trainer.datamodule.run_seed)  # type: ignore[attr-defined]  # Lightning sets it late

    def train_student(self) -> None:
        """Trains a new student on the set as it is now, unless that has been done."""
        if self._student_of == self.iteration:
            return
        # All processes train the same one; the steps of training have a randomness of their own.
        torch.manual_seed(derived_seed("student", self.run_seed(), self.iteration))
        with torch.inference_mode(False), torch.enable_grad():
            self.fit_student()
        self._student_of = self.iteration

    def on_validation_epoch_start(self) -> None:
        """Trains a student on the set, but not for the check before training."""
        if not self.trainer.sanity_checking:
            self.train_student()

    def on_test_epoch_start(self) -> None:
        """Trains a student on the set."""
        self.train_student()

    def on_predict_epoch_start(self) -> None:
        """Trains a student on the set."""
        self.train_student()

    def on_fit_end(self) -> None:
        """Keeps the set in the run's folder, and trains the student that goes beside it."""
        self.train_student()
        folder = self.trainer.log_dir  # asked by all processes: one tells the others
        if folder and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it late
            self.save_distilled(Path(folder) / DISTILLED)
