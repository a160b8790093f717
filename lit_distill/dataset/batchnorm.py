"""What batch normalization remembers of the data a network was trained on, and how far a batch is from it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from lit_distill.core.errors import UsageError
from lit_distill.dataset.losses import statistics_distance


class _ChannelMoments(torch.autograd.Function):
    """Mean and biased variance; the gradient is one pass over the map, and keeps nothing but the map itself."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        mean = maps.mean((0, 2, 3))
        ctx.save_for_backward(maps, mean)
        # Not torch.var_mean: on the CPU it takes five times as long.
        return mean, (maps - mean[:, None, None]).square_().mean((0, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mean_grad: Tensor, variance_grad: Tensor) -> Tensor:
        maps, mean = ctx.saved_tensors
        count = maps.numel() / len(mean)
        slope = 2 / count * variance_grad
        offset = mean_grad / count - slope * mean
        return torch.addcmul(offset[:, None, None], maps, slope[:, None, None])


def channel_moments(maps: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Computes mean and biased variance of each channel, over batch and space, in float32 or wider.

    Can be differentiated once.
    """
    wide = maps.float() if maps.dtype in (torch.bfloat16, torch.float16) else maps
    return _ChannelMoments.apply(wide)


class BatchNormMatcher:
    r"""Runs a network, and says how far what its batch normalizations are given is from what they remember.

    .. math:: R = \sum_l w_l \big( \lVert \hat\mu_l - \mu_l \rVert_2 + \lVert \hat\sigma^2_l - \sigma^2_l \rVert_2 \big)

    The hats are the running statistics, the others those of the batch, over its images and places, with the biased
    variance; norms are not squared. The first layer counts more. Gradients flow through the batch's statistics only.

    Hooks live only while the network runs: one forward gives both.

    Args:
        network: The network. Its mode is the caller's; eval mode is what makes the logits independent of the batch.
        first_weight: w_1, of the first layer in the order of `network.modules()`; all others have 1.

    Raises:
        UsageError: The network has no BatchNorm2d with running statistics.

    Reference: Yin et al., Dreaming to Distill (DeepInversion), 2020, arXiv 1912.08795; the first weight is that of the
    public code of SRe2L.
    """

    def __init__(self, network: nn.Module, first_weight: float = 10.0) -> None:
        self.network = network
        modules = (module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
        self.layers = [module for module in modules if module.running_mean is not None]
        if not self.layers:
            raise UsageError(
                f"model: {type(network).__name__} has no BatchNorm2d, whose statistics are matched; give another "
                "network, or set model.bn_weight to 0"
            )
        self.weights = [first_weight, *[1.0] * (len(self.layers) - 1)]

    def __call__(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, ""]]:
        """Returns logits and R."""
        distances: list[Tensor] = []

        def watch(layer: nn.BatchNorm2d, weight: float) -> RemovableHandle:
            running_mean, running_variance = layer.running_mean, layer.running_var
            assert running_mean is not None  # `layers` has no others
            assert running_variance is not None

            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                mean, variance = channel_moments(args[0])
                distances.append(weight * statistics_distance(mean, variance, running_mean, running_variance))

            return layer.register_forward_pre_hook(hook)

        handles = [watch(layer, weight) for layer, weight in zip(self.layers, self.weights, strict=True)]
        try:
            logits = self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        return logits, torch.stack(distances).sum()
