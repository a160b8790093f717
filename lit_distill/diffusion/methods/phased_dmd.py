"""Phased DMD: distribution matching between noise levels, one expert after another."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.experts import EulerSteps, PhaseExperts
from lit_distill.diffusion.losses import denoising_loss, denoising_weight, score_gradient
from lit_distill.diffusion.networks import Condition
from lit_distill.diffusion.rollout import Sample
from lit_distill.diffusion.subintervals import euler_step, noised_further, subinterval_target, subinterval_weight
from lit_distill.diffusion.times import TimeSampler


class PhasedDMD(ScoreDistiller):
    r"""Trains one expert after another, each to go from its noise level to the next, where its samples are judged.

    In the phase that ends at level s, the experts before it (at rest) take noise to its first step. Of its steps one
    is drawn, the last that is taken: from there Euler's step goes to s, with a graph. Fake score and teacher are
    compared on noisier versions of this x_s, at times t in (s, t_max), and not on those of clean data:

    .. math:: x_t = a x_s + b \epsilon, \qquad
        g = \frac{F(x_t) - D(x_t)}{\operatorname{mean} |\hat x_0 - D(x_t)|}

    g moves the generator's estimate of the data, of which x_s is a multiple but for what it was given. The fake score F
    is trained there, too, with `subinterval_target` in place of clean data, of which there are none.

    When a phase begins, the fake score begins anew as the teacher, and its optimizer with it. All phases are one run;
    the last lasts to its end. Learning rate schedules do not start again.

    Args:
        student: The experts; they begin as the teacher.
        teacher: The frozen denoiser, on the same path.
        phase_iterations: Batches of each phase.
        fake_updates: Steps of the fake score for one of the student.
        student_times: Times at which the scores are compared, drawn for the whole path and then moved to (s, t_max).
        fake_times: Times at which the fake score is trained, likewise.
        kwargs: See `ScoreDistiller`; steps are those of the student.
    """

    reference = Reference(
        title="Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
        authors="Fan et al.",
        year=2025,
        arxiv="2510.27684",
        reconstruction=True,
    )

    student: PhaseExperts

    def __init__(
        self,
        student: PhaseExperts,
        teacher: Denoiser,
        phase_iterations: int,
        fake_updates: int = 5,
        student_times: TimeSampler | None = None,
        fake_times: TimeSampler | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("inputs", "simulate") != "simulate":
            raise UsageError("model.inputs: phases begin where the experts before them end; leave it at 'simulate'")
        super().__init__(
            student, teacher, student.times, fake_updates=fake_updates, student_times=student_times,
            fake_times=fake_times, **kwargs,
        )  # fmt: skip
        check_least("model", 1, phase_iterations=phase_iterations)
        self.phase_iterations = phase_iterations
        self.phase = 0
        self.sampler = EulerSteps(student.times)

    # ---- phases ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One optimizer for all experts: it passes over those that have no gradients."""
        self.student.requires_grad_(True)
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        """Puts the experts of other phases to rest."""
        super().on_train_start()
        self._rest_others()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begins the next phase when it is time."""
        super().on_train_batch_start(batch, batch_idx)
        due = min(self.iteration // self.phase_iterations, len(self.student.steps) - 1)
        if due == self.phase:
            return
        self.phase = due
        self._rest_others()
        self._fake_score.restart(self.fake, self.teacher)
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        optimizers[1].optimizer.state.clear()

    def _rest_others(self) -> None:
        for number, expert in enumerate(self.student.network):
            expert.requires_grad_(number == self.phase)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the phase, of which the fake score is."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["phase"] = self.phase

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the phase back."""
        super().on_load_checkpoint(checkpoint)
        self.phase = checkpoint["phase"]

    # ---- a step ----------------------------------------------------------------------------------------------------

    def student_forward(self, batch: Any, condition: Condition, draws: Draws) -> Sample:
        """Runs the experts to one of the steps of this phase; only the last call has a graph."""
        times = self.student.steps[self.phase]
        last = draws.shared_integer(len(times)) if len(times) > 1 else 0
        last += self.student.number_of_step.index(self.phase)
        x_t = self.path.start(draws.normal((len(batch.index), *self._data().sample_shape)), self.student.times[0])
        for step in range(last):
            with torch.no_grad():
                x0 = self._expert(step)(x_t, self.student.times[step], condition)
                x_t = euler_step(self.path, x_t, x0, self.student.times[step], self.student.times[step + 1])
        t = torch.full((len(x_t),), self.student.times[last], dtype=torch.float64, device=x_t.device)
        return Sample(self._expert(last)(x_t, t, condition), x_t, t, last)

    def student_gradient(self, sample: Sample, condition: Condition, draws: Draws) -> Float[Tensor, "b *sample"]:
        """Compares the scores at noisy versions of x_s."""
        x_t, t, _, _ = self._above(sample, self.student_times, draws)
        fake, teacher = self.scores(x_t, t, condition)
        return score_gradient(sample.x0, fake, teacher)

    def fake_loss(self, sample: Sample, condition: Condition, draws: Draws) -> Tensor:
        """Trains the fake score on x_s."""
        s = self.student.boundaries[self.phase]
        x_t, t, x_s, eps = self._above(sample, self.fake_times, draws)
        target = subinterval_target(self.path, x_s, eps, s, t)
        weight = denoising_weight(self.path, t, self.fake_weighting, data_std=self.teacher.data_std)
        return denoising_loss(self.fake(x_t, t, condition), target, weight * subinterval_weight(self.path, s, t))

    def _above(self, sample: Sample, times: TimeSampler, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x_t and t in (s, t_max), and what they are made of: x_s and noise. Detached."""
        s, path = self.student.boundaries[self.phase], self.path
        x_s = euler_step(path, sample.x_t, sample.x0.detach(), sample.t, s)
        t = s + (1 - s / path.t_max) * times(len(x_s), path, draws)
        if path.discrete and s:
            t = t.round().clamp(min=s + 1)
        eps = draws.normal(x_s.shape).to(x_s)
        return noised_further(path, x_s, eps, s, t), t, x_s, eps

    # ---- the product -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, condition: Condition, noise: Float[Tensor, "b *sample"], draws: Draws) -> Tensor:
        """Makes samples (B, ...) of standard normal noise: the sampler's calls are the experts' steps, by number."""
        steps = iter(range(len(self.student.times)))

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return guided(self._expert(next(steps)), x_t, t, condition, self.sample_guidance)

        return self.sampler(denoise, self.path, noise, draws)

    def _expert(self, step: int) -> Denoiser:
        expert = self.student.network[self.student.number_of_step[step]]
        assert isinstance(expert, Denoiser)
        return expert
