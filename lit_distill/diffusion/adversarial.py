"""The base of adversarial distillation: a generator against heads on features of a frozen network. No fake score."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_distill.core.errors import check_least
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.base import DiffusionDistiller
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.distillation import ScoreDistiller, at_rest
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import FewStepRollout, Inputs, Sample
from lit_distill.diffusion.samplers import Heun, Renoise, Sampler

_BATCH = 500


class AdversarialDistiller(DiffusionDistiller):
    """A batch is an iteration: the generator makes samples, once, for the conditions of the real ones.

    Every `head_updates`-th iteration it descends `student_terms`, while the head is at rest; then, in every iteration,
    the head descends `head_terms` on the same samples, detached.

    Args:
        student: The generator; it begins as the teacher.
        teacher: The frozen denoiser, on the same path.
        steps: Times of the generator's steps, from noisy to clean.
        inputs: What the generator sees at steps after the first: noised real samples ("data"), or its own
            ("simulate").
        teacher_samples: Samples of the teacher to take for real, made at the start; 0 for those of the data.
        teacher_sampler: How the teacher makes them; 18 steps of Heun if None.
        guidance: Guidance scale of the teacher.
        head_updates: Steps of the head for one of the student.
        head_optimizer: Builds the optimizer of the head; as `optimizer` if None.
        clip_norm: Largest gradient norm of each role; none if None.
        kwargs: See `Distiller` and `DiffusionDistiller`.
    """

    teacher: Denoiser
    head: nn.Module

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        inputs: Inputs = "data",
        teacher_samples: int = 0,
        teacher_sampler: Sampler | None = None,
        guidance: float = 1.0,
        head_updates: int = 1,
        head_optimizer: OptimizerCallable | None = None,
        clip_norm: float | None = 10.0,
        **kwargs: Any,
    ) -> None:
        ScoreDistiller._check_networks(student, teacher)
        rollout = FewStepRollout(steps, student.path, inputs)
        super().__init__(student, teacher, sampler=Renoise(rollout.steps), **kwargs)
        check_least("model", 1, head_updates=head_updates)
        check_least("model", 0, teacher_samples=teacher_samples)
        self.automatic_optimization = False
        self.rollout = rollout
        self.teacher_samples = teacher_samples
        self.teacher_sampler = teacher_sampler if teacher_sampler is not None else Heun(18)
        self.guidance = guidance
        self.head_updates = head_updates
        self.head_optimizer = head_optimizer if head_optimizer is not None else self.optimizer
        self.clip_norm = clip_norm
        self._made: tuple[Tensor, Tensor] | None = None

    def configure_optimizers(self) -> Any:
        """One optimizer for the student, one for the head."""
        roles = ((self.student, self.optimizer), (self.head, self.head_optimizer))
        return tuple(
            self.optimizer_with_schedule([p for p in network.parameters() if p.requires_grad], optimizer)
            for network, optimizer in roles
        )

    def on_fit_start(self) -> None:
        """Makes the samples of the teacher, the same in all processes and in a resumed run."""
        if self.teacher_samples:
            self._made = self._make()

    @torch.no_grad()
    def _make(self) -> tuple[Tensor, Tensor]:
        draws = Draws(derived_seed("teacher samples"), self.device)
        conditions = self.student.num_classes or getattr(self._data(), "caption_count", 0) or 1
        labels = draws.integers(conditions, self.teacher_samples)
        parts = []
        for own in labels.split(_BATCH):
            condition = self.classes_of(own)

            def denoise(x_t: Tensor, t: Tensor, condition: Condition = condition) -> Tensor:
                return guided(self.teacher, x_t, t, condition, self.guidance)

            noise = draws.normal((len(own), *self._data().sample_shape))
            parts.append(self.teacher_sampler(denoise, self.path, noise, draws))
        return torch.cat(parts), labels

    # ---- a step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Takes a step of the student, if it is its turn, and one of the head."""
        draws = self.draws("step")
        turn = self.iteration % self.head_updates == 0
        real, condition = self.real_samples(batch, draws)
        with torch.set_grad_enabled(turn):
            sample = self.student_forward(real, condition, draws)
        terms: dict[str, Tensor] = {}
        if turn:
            with at_rest(self.head):
                terms |= self.student_terms(sample, real, condition, draws)
                self.optimize(sum(terms.values(), start=torch.zeros(())), 0, clip_norm=self.clip_norm)
        made = sample.x0.detach()
        head_terms = self.head_terms(made, real, condition, draws)
        self.optimize(sum(head_terms.values(), start=torch.zeros(())), 1, clip_norm=self.clip_norm)
        self.record(terms | dict(head_terms), watched={"student_std": made.std()})

    def real_samples(self, batch: Any, draws: Draws) -> tuple[Tensor, Condition]:
        """Returns samples of the teacher or of the data, and their conditions."""
        if self._made is None:
            return self.real(batch)
        x0, labels = self._made
        index = draws.integers(len(x0), len(batch.index))
        return x0[index], self.classes_of(labels[index])

    def student_forward(self, real: Tensor, condition: Condition, draws: Draws) -> Sample:
        """Makes the samples of this iteration."""
        return self.rollout(self.student, draws.normal(real.shape).to(real), condition, draws, real)

    @abstractmethod
    def student_terms(self, sample: Sample, real: Tensor, condition: Condition, draws: Draws) -> Mapping[str, Tensor]:
        """Returns the weighted terms that the student descends."""

    @abstractmethod
    def head_terms(self, made: Tensor, real: Tensor, condition: Condition, draws: Draws) -> Mapping[str, Tensor]:
        """Returns the weighted terms that the head descends, on generated and real samples."""
