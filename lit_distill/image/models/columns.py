"""A network that reads a part of each sample."""

from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError


class Columns(nn.Module):
    """Gives a network some of the channels: a student and a teacher can read different features of one sample.

    Args:
        network: Reads images (B, stop - start, H, W).
        start: First channel.
        stop: Channel after the last.
    """

    def __init__(self, network: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        if not 0 <= start < stop:
            raise UsageError(f"start, stop: {start}, {stop} are no channels; give 0 <= start < stop")
        self.network = network
        self.start = start
        self.stop = stop
        # Taps are named from the outside.
        for attribute in ("penultimate", "stages", "pre_activations"):
            names = getattr(network, attribute, None)
            if isinstance(names, str):
                setattr(self, attribute, f"network.{names}")
            elif names is not None:
                setattr(self, attribute, tuple(f"network.{name}" for name in names))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits from the network's channels."""
        if images.shape[1] < self.stop:
            raise UsageError(f"stop: {self.stop} is more than the {images.shape[1]} channels of a sample; lower it")
        return self.network(images[:, self.start : self.stop])
