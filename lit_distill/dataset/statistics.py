"""Statistics of more layers than batch normalization, averaged over iterations, and how far they are from real ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.dataset.batchnorm import channel_moments
from lit_distill.dataset.losses import statistics_distance

PATCH = 4

# Mean and variance of channels; of what convolutions are given, those of patches, too.
Moments = list[Tensor]


def patch_moments(maps: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Computes mean and biased variance of each 4x4 patch of the grid, over batch, channels, and its own places.

    A grid whose sides are no multiples of 4 is first interpolated to the next larger one.

    Returns:
        One value for each patch, row after row.
    """
    height, width = (-(-side // PATCH) * PATCH for side in maps.shape[2:])
    if (height, width) != tuple(maps.shape[2:]):
        maps = F.interpolate(maps, (height, width), mode="bilinear")
    rows = maps.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).transpose(3, 4)
    return channel_moments(rows.flatten(2, 3).flatten(0, 1))


def blend(current: Tensor, average: Tensor | None, momentum: float) -> tuple[Tensor, Tensor]:
    r"""Moves an exponential average on, and lends it the gradient of what it was moved by.

    .. math:: a \leftarrow m a + (1 - m) c, \qquad \partial a / \partial c := 1

    Args:
        current: c.
        average: a; None at the beginning, which becomes c.
        momentum: m.

    Returns:
        The new average, detached, and the same with the gradient.
    """
    now = current.detach()
    moved = now if average is None else momentum * average + (1 - momentum) * now
    return moved, current + (moved - now)


class GeneralizedMatcher:
    r"""Runs a network, and says how far its statistics, averaged over iterations, are from those of the real images.

    .. math:: R = \sum_l w_l \sum_{s \in S_l} \lVert s(X) - \bar s_l \rVert_2

    S are mean and variance: of each channel, at batch normalizations and convolutions, and of each 4x4 patch, at
    convolutions. s(X) is that of the real images: what batch normalization remembers, and what `collect` has found.
    The other is the exponential average of the batches, see `blend`. A convolution is skipped with probability
    `drop_rate`, anew each time; its average stays as it is then.

    Args:
        network: The network, in eval mode.
        first_weight: w of the first of these layers in the order of `network.modules()`; all others have 1.
        momentum: m of the averages.
        drop_rate: How often a convolution is skipped.

    Attributes:
        targets: Statistics of convolutions on the real images, by the name of the module.
        averages: The exponential averages, by the name of the module, as far as there are any.

    Raises:
        UsageError: The network has no Conv2d, and no BatchNorm2d with running statistics.
    """

    def __init__(
        self, network: nn.Module, first_weight: float = 10.0, momentum: float = 0.8, drop_rate: float = 0.4
    ) -> None:
        self.network = network
        self.first_weight = first_weight
        self.momentum = momentum
        self.drop_rate = drop_rate
        self.layers = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d) or (isinstance(module, nn.BatchNorm2d) and module.running_mean is not None)
        }
        self.convolutions = [name for name, module in self.layers.items() if isinstance(module, nn.Conv2d)]
        if not self.layers:
            raise UsageError(
                f"model: {type(network).__name__} has neither Conv2d nor BatchNorm2d, whose statistics are matched; "
                "give another network, or set model.bn_weight to 0"
            )
        self.targets: dict[str, Moments] = {}
        self.averages: dict[str, Moments] = {}

    def __call__(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, ""]]:
        """Returns logits and R, and moves the averages on."""
        first = next(iter(self.layers))
        coins = torch.rand(len(self.convolutions)).tolist()
        skipped = {name for name, coin in zip(self.convolutions, coins, strict=True) if coin < self.drop_rate}
        distances = [images.new_zeros(())]

        def see(name: str, maps: Tensor) -> None:
            current = self._moments(name, maps)
            before: Sequence[Tensor | None] = self.averages.get(name) or [None] * len(current)
            pairs = [blend(new, old, self.momentum) for new, old in zip(current, before, strict=True)]
            self.averages[name], blended = ([pair[i] for pair in pairs] for i in (0, 1))
            weight = self.first_weight if name == first else 1.0
            wanted = self._wanted(name)
            for i in range(0, len(wanted), 2):
                distances.append(weight * statistics_distance(*blended[i : i + 2], *wanted[i : i + 2]))

        with self._watching([name for name in self.layers if name not in skipped], see):
            logits = self.network(images)
        return logits, torch.stack(distances).sum()

    @torch.no_grad()
    def collect(self, batches: Iterable[Tensor]) -> None:
        """Runs the network on all real images, and keeps the statistics of what its convolutions are given.

        They are those of all images together, however they come in batches.

        Args:
            batches: Images (b, c, h, w); batches may differ in size.
        """
        counts: dict[str, int] = {}
        sums: dict[str, Moments] = {}

        def see(name: str, maps: Tensor) -> None:
            moments = [value.double() for value in self._moments(name, maps)]
            for mean, variance in zip(moments[::2], moments[1::2], strict=True):
                variance += mean.square()  # which adds up, as variances do not
            counts[name] = counts.get(name, 0) + len(maps)
            old = sums.get(name, [torch.zeros_like(value) for value in moments])
            sums[name] = [total + len(maps) * value for total, value in zip(old, moments, strict=True)]

        with self._watching(self.convolutions, see):
            for images in batches:
                self.network(images)
        for name, totals in sums.items():
            moments = [total / counts[name] for total in totals]
            for mean, square in zip(moments[::2], moments[1::2], strict=True):
                square -= mean.square()
            self.targets[name] = [value.float() for value in moments]

    def to(self, device: torch.device) -> None:
        """Moves what is kept to a device."""
        for kept in (self.targets, self.averages):
            kept.update({name: [value.to(device) for value in values] for name, values in kept.items()})

    def _moments(self, name: str, maps: Tensor) -> Moments:
        patches = patch_moments(maps) if isinstance(self.layers[name], nn.Conv2d) else ()
        return [*channel_moments(maps), *patches]

    def _wanted(self, name: str) -> Moments:
        layer: Any = self.layers[name]
        return self.targets[name] if isinstance(layer, nn.Conv2d) else [layer.running_mean, layer.running_var]

    @contextmanager
    def _watching(self, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Within it, `see` is shown what these layers are given."""
        handles = [
            self.layers[name].register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
