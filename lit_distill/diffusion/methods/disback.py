"""DisBack: a teacher that comes to meet the student, along the way on which it would fall to it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.files import atomic_path
from lit_distill.core.reference import Reference
from lit_distill.diffusion.backtracking import BacktrackingTarget
from lit_distill.diffusion.base import DiffusionDistiller
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import natural_weighting
from lit_distill.diffusion.losses import Weighting, denoising_loss, denoising_weight
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.samplers import Heun, Renoise, Sampler
from lit_distill.diffusion.times import TimeSampler, Uniform, check_steps


class DisBack(DMD2):
    """`DMD2` whose teacher is a `BacktrackingTarget`: real and fake score are never far apart.

    The first node is the teacher trained on samples of the generator as it is at first; the fake score begins as it.
    Node by node the target goes back to the teacher and stays there. Any other `ScoreDistiller` takes such a teacher
    just as well; without nodes this is `DMD2`.

    The public code differs from the paper: its nodes may not load, silently, and its target may not move. Here nodes
    load strictly, and the last is the teacher itself.

    Args:
        student: The generator, which the nodes were recorded for.
        teacher: The target.
        kwargs: See `DMD2` and `ScoreDistiller`.
    """

    reference = Reference(
        title="Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
        authors="Zhang et al.",
        year=2024,
        arxiv="2408.15991",
    )

    teacher: BacktrackingTarget

    def __init__(self, student: Denoiser, teacher: BacktrackingTarget, *args: Any, **kwargs: Any) -> None:
        super().__init__(student, teacher, *args, **kwargs)


class DegradationRecorder(DiffusionDistiller):
    r"""The first stage of DisBack: trains the teacher on a generator's samples, and writes down its states on the way.

    .. math:: L = E_{z, \epsilon, t} \; w(t) \, \lVert D(\alpha x_0 + \sigma \epsilon, t) - x_0 \rVert^2, \qquad
        x_0 = G_0(z)

    Every `interval` batches a node is written, `nodes/<number>.safetensors` in the folder of the run.

    Args:
        student: What is degraded; it begins as the teacher.
        generator: G_0, the student of the second stage as it begins. At rest.
        steps: Times of the generator's steps, from noisy to clean.
        interval: Batches between nodes.
        times: Times that are trained at.
        weighting: Space in which the error is squared; that of the teacher's output if None.
        sampler: How validation and test generate with the degraded teacher; 18 steps of Heun if None.
        kwargs: See `Distiller` and `DiffusionDistiller`.
    """

    reference = Reference(
        title="Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
        authors="Zhang et al.",
        year=2024,
        arxiv="2408.15991",
    )
    frozen = ("generator",)

    def __init__(
        self,
        student: Denoiser,
        generator: Denoiser,
        steps: list[float],
        interval: int = 100,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, None, sampler=sampler if sampler is not None else Heun(18), **kwargs)
        check_least("model", 1, interval=interval)
        self.generator = generator
        self.rollout = Renoise(check_steps(steps, generator.path))
        self.interval = interval
        self.times = times if times is not None else Uniform(0.0, 1.0)
        self.weighting = weighting or natural_weighting(student)

    def build(self) -> None:
        """Refuses what nodes cannot be written of."""
        super().build()
        if self.device_mesh is not None:
            raise UsageError("trainer.strategy: nodes are written of whole networks; take another strategy than fsdp2")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Denoises the generator's samples."""
        draws = self.draws("step")
        count, shape = len(batch.index), self._data().sample_shape
        condition = draws.integers(self.student.num_classes, count) if self.student.num_classes else None
        with torch.no_grad():
            x0 = self.rollout(
                lambda x_t, t: self.generator(x_t, t, condition), self.path, draws.normal((count, *shape)), draws
            )
        t = self.times(count, self.path, draws)
        x_t = self.path.add_noise(x0, draws.normal(x0.shape).to(x0), t)
        weight = denoising_weight(self.path, t, self.weighting, data_std=self.student.data_std)
        return self.combine({"denoise": denoising_loss(self.student(x_t, t, condition), x0, weight)})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the batch, and writes a node when it is time."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.iteration % self.interval or not self.trainer.is_global_zero:
            return
        folder = self.trainer.log_dir or self.trainer.default_root_dir
        state = {name: value.detach().cpu().contiguous() for name, value in self.student.state_dict().items()}
        with atomic_path(Path(folder) / "nodes" / f"{self.iteration // self.interval:04d}.safetensors") as file:
            save_file(state, file)
