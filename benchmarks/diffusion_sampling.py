"""Sampling of a student in one and in four steps against its teacher's: images per second beside network evaluations.

    python benchmarks/diffusion_sampling.py [digits | pixels ...]

The teacher is sampled with 18 steps of Heun, 35 evaluations, as EDM does and `denoising_small.yaml` says; guided, each
evaluation is of two samples in one batch. Students are of the teacher's shape and are not guided: their guidance is
trained in. "digits" is the perceptron of `denoising_small.yaml`, batches of 500; "pixels" a UNet2DModel of 0.64 million
parameters on images of 3x32x32, batches of 16. Weights are random, which takes as long. "by evaluations" is what the
speed-up would be if nothing but the network took time.
"""

import timing  # isort: skip  # noqa: F401  (imported to set the threads before torch)

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_distill.diffusion.denoiser import Denoiser, guided
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.models import ResidualMLP, small_unet
from lit_distill.diffusion.paths import EDMPath
from lit_distill.diffusion.samplers import Heun, Renoise, Sampler

CLASSES = 10
TEACHER, ONE, FOUR = Heun(18), Renoise([2.5]), Renoise([80.0, 10.0, 2.5, 0.5])


class Case(NamedTuple):
    """A size."""

    network: Callable[[], nn.Module]
    time_input: str
    shape: tuple[int, ...]
    batch: int
    rounds: int


CASES = {
    "digits": Case(lambda: ResidualMLP(64, CLASSES), "log_noise", (1, 8, 8), 500, 15),
    "pixels": Case(lambda: small_unet(32, 3, CLASSES), "saturating", (3, 32, 32), 16, 3),
}


@torch.no_grad()
def report(name: str, case: Case) -> None:
    """Measures one size and prints its lines."""
    torch.manual_seed(0)
    denoiser = Denoiser(case.network(), EDMPath(), "edm", CLASSES, 0.5, case.time_input).eval()
    noise, labels = torch.randn(case.batch, *case.shape), torch.randint(CLASSES, (case.batch,))
    ran = [0]
    denoiser.register_forward_pre_hook(lambda _network, args: ran.__setitem__(0, ran[0] + len(args[0])))

    def sampled(sampler: Sampler, scale: float) -> Callable[[], Tensor]:
        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return guided(denoiser, x_t, t, labels, scale)

        return lambda: sampler(denoise, denoiser.path, noise, Draws(0))

    sides = {
        "teacher, guided": sampled(TEACHER, 2.0),
        "teacher": sampled(TEACHER, 1.0),
        "student, 4 steps": sampled(FOUR, 1.0),
        "student, 1 step": sampled(ONE, 1.0),
    }
    evaluations = {}
    for side, run in sides.items():
        ran[0] = 0
        run()
        evaluations[side] = ran[0] / case.batch
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(case.rounds):
        for side in list(sides) if number % 2 else reversed(sides):
            start, start_cpu = time.perf_counter(), time.process_time()
            sides[side]()
            seconds[side].append((time.perf_counter() - start, time.process_time() - start_cpu))
    for side in sides:
        wall, cpu = (
            [a[kind] / b[kind] for a, b in zip(seconds["teacher"], seconds[side], strict=True)] for kind in (0, 1)
        )
        per_second = case.batch / statistics.median(own for _, own in seconds[side])
        print(
            f"{name:<8} {side:<18} {evaluations[side]:>12.0f} {evaluations['teacher'] / evaluations[side]:>15.2f} "
            f"{per_second:>13.1f} {statistics.median(cpu):>9.2f} {min(cpu):>7.2f} {max(cpu):>7.2f} "
            f"{statistics.median(wall):>8.2f} {min(wall):>7.2f} {max(wall):>7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    print("times as fast as the teacher, within a round")
    print(f"{'':<27} {'evaluations':>12} {'by evaluations':>15} {'images / CPU s':>13}", end="")
    print(f" {'CPU time':>8} {'min':>7} {'max':>7} {'wall':>8} {'min':>7} {'max':>7}", flush=True)
    for chosen in sys.argv[1:] or CASES:
        report(chosen, CASES[chosen])
