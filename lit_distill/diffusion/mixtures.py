"""Gaussian mixtures: teachers that make no error, samples with known modes, and what generated ones miss of them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_distill.core.data import EpochDataModule
from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.loading import EpochLoader, TensorLoader, derived_seed
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.evaluation import GenerationEvaluation
from lit_distill.diffusion.metrics import squared_mmd
from lit_distill.diffusion.models import GaussianMixture
from lit_distill.diffusion.paths import FlowPath, GaussianPath

_INSIDE = 3.0  # standard deviations


def ring(
    modes: int = 8,
    radius: float = 1.0,
    std: float = 0.1,
    weights: Sequence[float] | None = None,
    path: GaussianPath | None = None,
) -> GaussianMixture:
    """Makes a mixture of Gaussians on a circle, for YAML.

    Args:
        modes: Number of Gaussians.
        radius: Radius of the circle.
        std: Standard deviation of each Gaussian.
        weights: Shares of the Gaussians; equal if None.
        path: Path of the denoiser that it is; a flow if None.
    """
    check_least("ring", 1, modes=modes)
    if weights is not None and len(weights) != modes:
        raise UsageError(f"ring.weights: {len(weights)} are given for {modes} modes; give one for each")
    angles = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(means, std, path if path is not None else FlowPath(), weights)


def exact_denoiser(mixture: GaussianMixture, conditional: bool = True) -> Denoiser:
    """Makes the denoiser of a mixture, for YAML: the posterior mean on the mixture's own path.

    It has no weights. A fake score that begins as it needs a network of its own, see `OwnNetwork`.

    Args:
        mixture: The mixture.
        conditional: Classes are the modes, and "no class" is the whole mixture; otherwise there are no classes.
    """
    classes = len(mixture.means) if conditional else None
    return Denoiser(mixture, mixture.path, "x0", num_classes=classes, time_input="time")


def sample_mixture(
    mixture: GaussianMixture, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Draws samples, float32, and the modes that they are from."""
    modes = torch.multinomial(mixture.log_shares.exp(), count, replacement=True, generator=generator)
    noise = torch.randn(count, mixture.means.shape[1], generator=generator, dtype=torch.float64)
    return (mixture.means[modes] + mixture.std * noise).float(), modes


# ---- what samples are worth ------------------------------------------------------------------------------------------


def nearest_mode(
    samples: Float[Tensor, "n d"], means: Float[Tensor, "k d"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Returns distance and number of the nearest center."""
    distance, mode = torch.cdist(samples.double(), means.double()).min(1)
    return distance, mode


def mass_inside(samples: Float[Tensor, "n d"], means: Float[Tensor, "k d"], *, std: float) -> Float[Tensor, ""]:
    """Share of samples within 3 standard deviations of a center; 1 - exp(-9 / 2) = 0.989 for the mixture in 2-D."""
    return (nearest_mode(samples, means)[0] <= _INSIDE * std).double().mean()


def modes_covered(
    samples: Float[Tensor, "n d"],
    means: Float[Tensor, "k d"],
    shares: Float[Tensor, " k"],
    *,
    std: float,
    least: float = 0.1,
) -> Float[Tensor, ""]:
    """Number of modes that have, within 3 standard deviations, at least a part of the samples due to them.

    Args:
        samples: (N, D).
        means: (K, D).
        shares: (K,) share of samples due to each mode.
        std: Standard deviation of a mode.
        least: That part; 0.1 is a tenth.
    """
    distance, mode = nearest_mode(samples, means)
    found = mode[distance <= _INSIDE * std].bincount(minlength=len(means))
    return (found >= least * shares * len(samples)).double().sum()


def mode_total_variation(
    samples: Float[Tensor, "n d"], means: Float[Tensor, "k d"], shares: Float[Tensor, " k"]
) -> Float[Tensor, ""]:
    """Half the summed difference between how often a mode is nearest and how often it should be: 0 at best, below 1."""
    found = nearest_mode(samples, means)[1].bincount(minlength=len(means)) / len(samples)
    return (found - shares).abs().sum() / 2


class MixtureEvaluation(GenerationEvaluation):
    """Measures generated points against the mixture of a `MixtureDataModule`. There is no picture and no classifier.

    - `modes`, `inside`, `tv`: see `modes_covered`, `mass_inside`, `mode_total_variation`.
    - `acc`: how often a sample is nearest to the mode that was asked for, where modes are classes.
    - `mmd`, `std_ratio`, `nfe`: as of `GenerationEvaluation`.

    Classes are asked for in turn, so all modes equally often: with classes, `tv` compares with equal shares.

    Args:
        samples: Points to generate in test.
        val_samples: Points to generate in validation.
    """

    def __init__(self, samples: int = 2000, val_samples: int = 1000) -> None:
        super().__init__(samples=samples, val_samples=val_samples)

    def __call__(self, module: Any, data: Any, part: str) -> dict[str, float]:
        """See `GenerationEvaluation`.

        Raises:
            UsageError: The data are not of a mixture.
        """
        if not isinstance(data, MixtureDataModule):
            raise UsageError(f"model.evaluation: {type(data).__name__} has no mixture; take GenerationEvaluation")
        made, labels, _ = self._generate(module, data, self.samples if part == "test" else self.val_samples)
        mixture = data.mixture
        means, shares = mixture.means.to(made.device), mixture.log_shares.exp().to(made.device)
        conditional = module.student.num_classes is not None
        asked = torch.full_like(shares, 1 / len(shares)) if conditional else shares
        points = made.flatten(1)
        real = data.real(part, len(points))[0].to(made.device)
        values = {
            "modes": modes_covered(points, means, asked, std=mixture.std),
            "inside": mass_inside(points, means, std=mixture.std),
            "tv": mode_total_variation(points, means, asked),
            "mmd": squared_mmd(points, real),
            "std_ratio": points.std() / real.std(),
            "nfe": module.sampler.evaluations(),
        }
        if conditional:
            values["acc"] = (nearest_mode(points, means)[1] == labels).double().mean()
        return {name: float(value) for name, value in values.items()}


# ---- data ------------------------------------------------------------------------------------------------------------


class PointBatch(NamedTuple):
    """A batch of points.

    Attributes:
        images: (b, d) float32, under the name that samples have in all data for generators.
        labels: (b,) int64 modes.
        index: (b,) int64 positions in the data set part.
    """

    images: Float[Tensor, "b d"]
    labels: Int[Tensor, " b"]
    index: Int[Tensor, " b"]  # type: ignore[assignment]  # tuple has a method of this name; nobody searches a batch


class MixtureDataModule(EpochDataModule[PointBatch]):
    """Points of a Gaussian mixture, with their modes as classes.

    Args:
        mixture: The mixture, such as `ring`.
        train_samples: Points to train on; an epoch.
        eval_samples: Points in validation and test, each.
        batch_size: Training samples per step over all processes.
        eval_batch_size: Samples per evaluation step over all processes.
        seed: Seed of the data order. None takes the run's.
        split_seed: Seed of the points, apart from `seed`: runs with other seeds see the same points.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        train_samples: int = 20000,
        eval_samples: int = 2000,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        seed: int | None = None,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, split_seed=split_seed)
        check_least("data", 2, train_samples=train_samples, eval_samples=eval_samples)
        self.mixture = mixture
        self.sizes = {"train": train_samples, "val": eval_samples, "test": eval_samples}
        self.num_classes = len(mixture.means)
        self.classes = tuple(f"mode {number}" for number in range(self.num_classes))
        self.sample_shape = (mixture.means.shape[1],)

    def read_parts(self) -> dict[str, PointBatch]:
        """Draws the points."""
        parts = {}
        for name, size in self.sizes.items():
            generator = torch.Generator().manual_seed(derived_seed("mixture", name, self.split_seed))
            parts[name] = PointBatch(*sample_mixture(self.mixture, size, generator), torch.arange(size))
        return parts

    def no_part(self, name: str) -> str:
        """See `EpochDataModule`."""
        return f"data: a mixture has no part '{name}'; there are train, val and test"

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part."""
        points = self.part(part)
        tensors = {"images": points.images, "labels": points.labels}
        return TensorLoader(tensors, make_batch=PointBatch, device=device, **sampling)

    def real(self, part: str, most: int) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """Returns points of a part with their modes, at most so many."""
        points = self.part(part)
        return points.images[:most], points.labels[:most]
