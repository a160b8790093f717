"""The base of score distillation: a generator, its teacher, and a score of what it generates, trained in turn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.strategies import reshard
from lit_distill.diffusion.backtracking import BacktrackingTarget
from lit_distill.diffusion.base import DiffusionDistiller
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.evaluation import GenerationEvaluation
from lit_distill.diffusion.fake import FakeScore, FullCopy, LoRA
from lit_distill.diffusion.losses import (
    Weighting,
    denoising_loss,
    denoising_weight,
    score_gradient,
    surrogate_loss,
)
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import FewStepRollout, Inputs, Sample
from lit_distill.diffusion.samplers import Renoise
from lit_distill.diffusion.times import TimeSampler, Uniform


@contextmanager
def at_rest(*networks: nn.Module | None) -> Iterator[None]:
    """Takes gradients from parameters for a while: they flow through the networks, and none are left in them."""
    present = [network for network in networks if network is not None]
    parameters = [p for network in present for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for network in present:
            reshard(network)  # or a root would go on at rest
        for parameter in parameters:
            parameter.requires_grad_(True)


class ScoreDistiller(DiffusionDistiller):
    r"""Moves a generator's samples to where the teacher finds them likelier than the fake score does.

    A batch is an iteration. The generator makes a sample, once. Every `fake_updates`-th iteration it takes a step along
    `student_gradient`, with what `extra_student_loss` adds; then, in every iteration, the fake score takes one on the
    same samples, detached: `fake_loss`, with what `extra_fake_loss` adds. So the fake score has `fake_updates` steps
    for one of the student. While the student's loss goes backward, the fake score and the head are at rest: gradients
    flow through them, none stay.

    `train/surrogate` is the value of a loss that is made for its gradient; it does not fall, and is no criterion.

    A method overrides what differs: `student_forward`, `student_gradient`, `extra_student_loss`, `fake_loss`,
    `extra_fake_loss`; and `build`, if it has networks of its own. A network of name `head` is trained with the fake
    score, by its optimizer.

    Args:
        student: The generator; it begins as the teacher: `lit_distill.diffusion.pretrained` with the same weights.
        teacher: The frozen denoiser, on the same path.
        steps: Times of the generator's steps, from noisy to clean; one for a one-step generator.
        inputs: What the generator sees in training at steps after the first: "simulate", its own samples; "data",
            noised real ones.
        guidance: Guidance scale of the teacher; 1 for none. The fake score is never guided.
        fake: What the fake score is: `FullCopy` of the teacher, or `LoRA` on it.
        fake_updates: Steps of the fake score for one of the student.
        student_times: Times at which the two scores are compared.
        fake_times: Times at which the fake score is trained.
        fake_weighting: Space in which the fake score's error is squared; the teacher's own if None.
        fake_optimizer: Builds the optimizer of fake score and head; as `optimizer` if None.
        clip_norm: Largest gradient norm of each role; none if None.
        kwargs: See `Distiller` and `DiffusionDistiller`.
    """

    teacher: Denoiser
    fake: Denoiser
    head: nn.Module | None

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        inputs: Inputs = "simulate",
        guidance: float = 1.0,
        fake: FakeScore | None = None,
        fake_updates: int = 1,
        student_times: TimeSampler | None = None,
        fake_times: TimeSampler | None = None,
        fake_weighting: Weighting | None = None,
        fake_optimizer: OptimizerCallable | None = None,
        clip_norm: float | None = 10.0,
        evaluation: GenerationEvaluation | None = None,
        **kwargs: Any,
    ) -> None:
        self._check_networks(student, teacher)
        rollout = FewStepRollout(steps, student.path, inputs)
        super().__init__(student, teacher, sampler=Renoise(rollout.steps), evaluation=evaluation, **kwargs)
        check_least("model", 1, fake_updates=fake_updates)
        if teacher.num_classes is None and guidance != 1.0 and teacher.no_condition is None:
            teacher.null_condition(None)  # says what is missing
        if isinstance(teacher, BacktrackingTarget) and isinstance(fake, LoRA):
            raise UsageError("model.fake: LoRA shares the weights of a teacher that moves; take FullCopy")
        self.automatic_optimization = False
        self.rollout = rollout
        self.guidance = guidance
        self.fake_updates = fake_updates
        self.student_times = student_times if student_times is not None else Uniform(0.02, 0.98)
        self.fake_times = fake_times if fake_times is not None else Uniform(0.0, 1.0)
        self.fake_weighting = fake_weighting or natural_weighting(teacher)
        self.fake_optimizer = fake_optimizer if fake_optimizer is not None else self.optimizer
        self.clip_norm = clip_norm
        self.head = None
        self._of_teacher: set[str] = set()
        self._fake_score = fake if fake is not None else FullCopy()

    @staticmethod
    def _check_networks(student: Denoiser, teacher: Denoiser) -> None:
        if type(student.path) is not type(teacher.path):
            raise UsageError(
                f"model.student: it is on {type(student.path).__name__}, the teacher on "
                f"{type(teacher.path).__name__}; give both the same path"
            )
        if student.num_classes != teacher.num_classes:
            raise UsageError(
                f"model.student: it knows {student.num_classes} classes, the teacher {teacher.num_classes}; they must "
                "know the same"
            )

    # ---- construction ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Makes the fake score of the teacher."""
        super().build()
        self.fake = self._fake_score.build(self.teacher, sharded=self.device_mesh is not None)
        # What a LoRA has of the teacher comes from the teacher's source, and is no part of checkpoints.
        self._of_teacher = {f"fake.{name}" for name, weight in self.fake.named_parameters() if not weight.requires_grad}

    def configure_optimizers(self) -> Any:
        """One optimizer for the student, one for fake score and head."""
        student = [p for p in self.student.parameters() if p.requires_grad]
        critics = [
            p for part in (self.fake, self.head) if part is not None for p in part.parameters() if p.requires_grad
        ]
        return (
            self.optimizer_with_schedule(student, self.optimizer),
            self.optimizer_with_schedule(critics, self.fake_optimizer),
        )

    def _is_frozen(self, key: str) -> bool:
        return super()._is_frozen(key) or key in self._of_teacher

    # ---- a step ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Takes a teacher that moves to where it is at this batch."""
        super().on_train_batch_start(batch, batch_idx)
        if isinstance(self.teacher, BacktrackingTarget):
            self.teacher.move_to(self.iteration)

    def is_student_turn(self) -> bool:
        """Says whether the student takes a step in this iteration."""
        return self.iteration % self.fake_updates == 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Takes a step of the student, if it is its turn, and one of the fake score."""
        draws = self.draws("step")
        turn = self.is_student_turn()
        condition = self.conditions(batch, draws)
        with torch.set_grad_enabled(turn):
            sample = self.student_forward(batch, condition, draws)
        terms: dict[str, Tensor] = {}
        if turn:
            with at_rest(self.fake, self.head):
                gradient = self.student_gradient(sample, condition, draws)
                terms["surrogate"] = surrogate_loss(sample.x0, gradient)
                terms |= self.extra_student_loss(sample, condition, batch, draws)
                self.optimize(_total(terms), 0, clip_norm=self.clip_norm)
        sample = Sample(sample.x0.detach(), sample.x_t.detach(), sample.t, sample.step)
        fake_terms = {"fake": self.fake_loss(sample, condition, draws)}
        fake_terms |= self.extra_fake_loss(sample, condition, batch, draws)
        self.optimize(_total(fake_terms), 1, clip_norm=self.clip_norm)
        self.record(terms | fake_terms, watched={"student_std": sample.x0.std()})

    def conditions(self, batch: Any, draws: Draws) -> Condition:
        """Returns the conditions to generate for: the batch's prompts, or classes at random, each as likely."""
        if hasattr(batch, "condition"):
            return batch.condition
        if not self.student.num_classes:
            return None
        return draws.integers(self.student.num_classes, len(batch.images))

    def student_forward(self, batch: Any, condition: Condition, draws: Draws) -> Sample:
        """Makes the samples of this iteration."""
        # Prompts alone have no images; then the rollout cannot take data.
        noise = draws.normal((len(batch.index), *self._data().sample_shape))
        return self.rollout(self.student, noise, condition, draws, batch.images)

    def student_gradient(self, sample: Sample, condition: Condition, draws: Draws) -> Float[Tensor, "b *sample"]:
        """Returns g; the samples are moved along -g."""
        x_t, t = self.noised(sample.x0, self.student_times, draws)
        fake, teacher = self.scores(x_t, t, condition)
        return score_gradient(sample.x0, fake, teacher)

    def extra_student_loss(
        self, sample: Sample, condition: Condition, batch: Any, draws: Draws
    ) -> Mapping[str, Tensor]:
        """Returns weighted terms that the student descends besides."""
        return {}

    def fake_loss(self, sample: Sample, condition: Condition, draws: Draws) -> Tensor:
        """Denoises the generated samples."""
        x_t, t = self.noised(sample.x0, self.fake_times, draws)
        weight = denoising_weight(self.path, t, self.fake_weighting, data_std=self.teacher.data_std)
        return denoising_loss(self.fake(x_t, t, condition), sample.x0, weight)

    def extra_fake_loss(self, sample: Sample, condition: Condition, batch: Any, draws: Draws) -> Mapping[str, Tensor]:
        """Returns weighted terms that fake score and head descend besides."""
        return {}

    # ---- what methods are made of ----------------------------------------------------------------------------------

    def noised(self, x0: Tensor, times: TimeSampler, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns samples at random times with noise of their own, detached, and the times (B,)."""
        t = times(len(x0), self.path, draws)
        return self.path.add_noise(x0.detach(), draws.normal(x0.shape).to(x0), t), t

    @torch.no_grad()
    def scores(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Returns what fake score and (guided) teacher take the data to be."""
        return self.fake(x_t, t, condition), guided(self.teacher, x_t, t, condition, self.guidance)


def natural_weighting(denoiser: Denoiser) -> Weighting:
    """Returns the space in which a denoiser's error is squared if it was trained on its own output."""
    return "eps" if denoiser.prediction == "score" else denoiser.prediction


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    first, *rest = terms.values()
    return sum(rest, start=first)
