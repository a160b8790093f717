"""The base of methods whose product generates: random numbers, conditions, and evaluation by what is generated."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.evaluation import GenerationEvaluation
from lit_distill.diffusion.networks import Condition, channels_of
from lit_distill.diffusion.paths import GaussianPath
from lit_distill.diffusion.samplers import Sampler


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Builds the default optimizer: Adam, 2e-4, without the mean of gradients, as generators are trained."""
    return torch.optim.Adam(parameters, lr=2e-4, betas=(0.0, 0.999))


class DiffusionDistiller(Distiller):
    """What training of teachers and of few-step generators have in common.

    Validation and test generate samples and compare them with real ones of that part. No loss is a criterion: that of a
    generator says nothing of its samples.

    Args:
        student: The denoiser to train.
        teacher: The denoiser to learn from.
        sampler: How the student generates.
        sample_guidance: Guidance scale of the student when it generates; 1 for none.
        evaluation: What is measured of samples; None for the measures that need no classifier.
        kwargs: See `Distiller`.
    """

    headline: ClassVar[str] = "test/fd"
    asks_data: ClassVar[str] = "diffusion methods ask the data module for real samples"
    terms_have_gradients: ClassVar[bool] = False
    label_terms: ClassVar[frozenset[str]] = frozenset()

    student: Denoiser
    teacher: Denoiser | None

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None = None,
        *,
        sampler: Sampler,
        sample_guidance: float = 1.0,
        evaluation: GenerationEvaluation | None = None,
        optimizer: OptimizerCallable = adam,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, optimizer=optimizer, **kwargs)
        self.sampler = sampler
        self.sample_guidance = sample_guidance
        self.evaluation = evaluation if evaluation is not None else GenerationEvaluation()

    def build(self) -> None:
        """Tells the networks what "no condition" is, where the data know: text data know the empty prompt.

        Raises:
            UsageError: A network was made for samples of other channels than the data have.
        """
        super().build()
        null = self._empty_prompt()
        for role, denoiser in (("student", self.student), ("teacher", self.teacher)):
            if not isinstance(denoiser, Denoiser):  # none, or an adapter in the student's place
                continue
            wanted = channels_of(denoiser.network)
            if wanted is not None and wanted != self._data().sample_shape[0]:
                raise UsageError(
                    f"model.{role}: its network takes {wanted} channels, the data have "
                    f"{self._data().sample_shape[0]}; give data, or an autoencoder, that it was made for"
                )
            if null is not None and denoiser.no_condition == "empty_prompt":
                denoiser.set_null(null)

    @property
    def path(self) -> GaussianPath:
        """The path of the student."""
        return self.student.path

    def draws(self, name: str) -> Draws:
        """Returns the random numbers of this step for a purpose, the same on any number of processes."""
        seed = derived_seed(name, int(os.environ.get("PL_GLOBAL_SEED", "0")), self.iteration)
        return Draws(seed, self.device, rank=self.global_rank, world_size=self.trainer.world_size)

    def real(self, batch: Any) -> tuple[Float[Tensor, "b *sample"], Condition]:
        """Returns the samples of a batch and their conditions; none where the student knows no classes."""
        if batch.images is None:
            raise UsageError("data: it has prompts alone, and real samples are asked for; give images with captions")
        return batch.images, batch.condition if hasattr(batch, "condition") else self.classes_of(batch.labels)

    def classes_of(self, labels: Tensor) -> Condition:
        """Returns class numbers as a condition, or their captions, or none where the student knows no classes."""
        captions = getattr(self._data(), "captions", None)
        if captions is not None and (found := captions(labels)) is not None:
            return found
        return labels if self.student.num_classes else None

    def example_condition(self, count: int) -> Condition:
        """Returns conditions to try networks with: of text data the empty prompt, otherwise the first class."""
        null = self._empty_prompt()
        if null is not None:
            return {name: value.to(self.device).expand(count, *value.shape[1:]) for name, value in null.items()}
        return self.classes_of(torch.zeros(count, dtype=torch.long, device=self.device))

    def example_inputs(self) -> tuple[Any, ...]:
        """One sample at the largest time."""
        sample = torch.zeros(1, *self._data().sample_shape, device=self.device)
        time = torch.full((1,), self.path.t_max, dtype=torch.float64, device=self.device)
        condition = self.example_condition(1)
        return (sample, time) if condition is None else (sample, time, condition)

    @torch.no_grad()
    def generate(self, condition: Condition, noise: Float[Tensor, "b *sample"], draws: Draws) -> Tensor:
        """Makes samples (B, ...) of standard normal noise, with the student and its sampler."""

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return guided(self.student, x_t, t, condition, self.sample_guidance)

        return self.sampler(denoise, self.path, noise, draws)

    def kept_with_product(self) -> dict[str, Any]:
        """Returns how the student generates: of a few-step generator this is half of what it is."""
        return {"sampler": self.sampler.described(), "guidance": self.sample_guidance}

    def _empty_prompt(self) -> Mapping[str, Tensor] | None:
        ask = getattr(self._data(), "null_condition", None)
        return None if ask is None else ask()

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: samples are compared as a whole, see `on_validation_epoch_start`."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing, likewise."""

    def on_validation_epoch_start(self) -> None:
        """Logs `val/*`; at the start, where a callback has put averaged weights in place."""
        if not self.trainer.sanity_checking:
            self.check_finite()  # before samples of such a network reach a measure that fails on them
            self._evaluate("val")

    def on_test_epoch_start(self) -> None:
        """Logs `test/*`, and keeps a picture of samples."""
        self._evaluate("test")

    def _evaluate(self, part: str) -> None:
        values = self.evaluation(self, self._data(), part)
        self.log_dict({f"{part}/{name}": value for name, value in values.items()}, batch_size=1)
