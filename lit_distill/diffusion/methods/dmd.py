"""DMD: distribution matching distillation, with pairs of noise and what the teacher makes of it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_distill.core.cache import TeacherCache, weights_fingerprint
from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import derived_seed
from lit_distill.core.reference import Reference
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.samplers import Heun

_BATCH = 500


class DMD(ScoreDistiller):
    r"""The gradient of KL(generated || real) over noise levels, and regression on pairs that keeps all modes.

    .. math:: L = L_{DM} + \lambda \, E \, \lVert G(z) - y \rVert^2 / D

    L_DM is `ScoreDistiller`'s; y is what the teacher makes of the noise z along its probability flow, from the noise
    level at which the generator starts. The paper's distance is LPIPS; here it is the mean square, which needs no other
    network.

    Args:
        student: The generator.
        teacher: The frozen denoiser.
        steps: Time of the generator's step; pairs are for one step.
        pairs: Number of pairs; 0 for none.
        regression_weight: lambda.
        pair_steps: Steps of the teacher for a pair (Heun).
        pair_file: Safetensors file to keep pairs in, and to take them from where it was made from the same teacher;
            if None they are made at each start.
        kwargs: See `ScoreDistiller`.
    """

    reference = Reference(
        title="One-step Diffusion with Distribution Matching Distillation",
        authors="Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park",
        year=2023,
        arxiv="2311.18828",
        reconstruction=True,
    )

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        steps: Sequence[float],
        pairs: int = 2000,
        regression_weight: float = 0.25,
        pair_steps: int = 18,
        pair_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, steps, **kwargs)
        check_least("model", 0, pairs=pairs, regression_weight=regression_weight)
        check_least("model", 1, pair_steps=pair_steps)
        if pairs and len(self.rollout.steps) > 1:
            raise UsageError(f"model.steps: pairs are for one step, {len(steps)} are given; give one, or pairs 0")
        self.pairs = pairs
        self.regression_weight = regression_weight
        self.pair_steps = pair_steps
        self.pair_file = None if pair_file is None else Path(pair_file)
        self._pairs: TeacherCache | None = None

    def on_fit_start(self) -> None:
        """Makes the pairs, or reads them."""
        if not self.pairs or not self.regression_weight:
            return
        described = {
            "teacher": weights_fingerprint(self.teacher) if self.device_mesh is None else "sharded",
            "pairs": self.pairs,
            "start": self.rollout.steps[0],
            "steps": self.pair_steps,
            "guidance": self.guidance,
        }
        if self.pair_file is None:
            made = list(self._make_pairs())
            outputs = {name: torch.cat([values[name] for _, values in made]) for name in made[0][1]}
            self._pairs = TeacherCache(outputs)
            return
        if not self.pair_file.is_file() and self.trainer.is_global_zero and self.device_mesh is None:
            TeacherCache.write(self.pair_file, described, self._make_pairs(), size=self.pairs)
        elif self.device_mesh is not None:
            raise UsageError("model.pair_file: sharded teachers make their pairs at each start; leave it out")
        self.trainer.strategy.barrier()
        self._pairs = TeacherCache.open(self.pair_file, described)

    @torch.no_grad()
    def _make_pairs(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        draws = Draws(derived_seed("pairs"), self.device)  # whole in every process
        start = self.rollout.steps[0]
        sampler = Heun(self.pair_steps, r_max=min(float(self.path.r(start)), 1000.0))
        for index in torch.arange(self.pairs).split(_BATCH):
            noise = draws.normal((len(index), *self._data().sample_shape))
            labels = draws.integers(self.student.num_classes or 1, len(index))
            condition = self.classes_of(labels)

            def denoise(x_t: Tensor, t: Tensor, condition: Condition = condition) -> Tensor:
                return guided(self.teacher, x_t, t, condition, self.guidance)

            made = sampler(denoise, self.path, noise, draws)
            yield index, {"noise": noise, "x0": made, "labels": labels.float()}

    def extra_student_loss(
        self, sample: Sample, condition: Condition, batch: Any, draws: Draws
    ) -> Mapping[str, Tensor]:
        """The regression on pairs."""
        if self._pairs is None:
            return {}
        pair = self._pairs(draws.integers(self.pairs, len(sample.x0)))
        start = self.rollout.steps[0]
        made = self.student(self.path.start(pair["noise"], start), start, self.classes_of(pair["labels"].long()))
        return {"regression": self.regression_weight * (made - pair["x0"]).square().mean()}
