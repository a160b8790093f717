"""Discriminators on features of images, with the condition by projection."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    r"""A logit for each place of a feature, and their mean.

    .. math:: \psi(h) + \langle e(c), h \rangle / \sqrt d, \qquad h = \phi(feature)

    Args:
        channels: d, channels of the feature.
        num_classes: Classes c; 0 for a logit without the second term.

    Reference: Miyato, Koyama, cGANs with Projection Discriminator, 2018, arXiv 1802.05637.
    """

    def __init__(self, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels), nn.LeakyReLU(0.2))
        self.last = nn.Linear(channels, 1)
        self.classes = nn.Embedding(num_classes, channels) if num_classes else None

    def forward(self, feature: Tensor, labels: Int[Tensor, " b"] | None = None) -> Float[Tensor, " b"]:
        """Computes logits of vectors (B, d), tokens (B, N, d) or maps (B, d, h, w); large means "real"."""
        hidden = self.layers(places(feature))
        logits = self.last(hidden).squeeze(-1)
        if self.classes is not None and labels is not None:
            logits = logits + (hidden * self.classes(labels)[:, None]).sum(-1) / math.sqrt(hidden.shape[-1])
        return logits.mean(1)


class ProjectionDiscriminator(nn.Module):
    """One head for each of some features.

    Args:
        shapes: Shapes of the features by tap, without the batch.
        num_classes: Classes; 0 for none.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], num_classes: int = 0) -> None:
        super().__init__()
        self.taps = list(shapes)
        channels = [shape[0] if len(shape) == 3 else shape[-1] for shape in shapes.values()]
        self.heads = nn.ModuleList(ProjectionHead(count, num_classes) for count in channels)

    def forward(self, features: Sequence[Tensor], labels: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b heads"]:
        """Computes logits of features in the order of the taps."""
        return torch.stack([head(feature, labels) for head, feature in zip(self.heads, features, strict=True)], dim=1)


def exact_r1(real_logits: Float[Tensor, "b heads"], inputs: Sequence[Tensor]) -> Float[Tensor, ""]:
    r"""Returns half the squared norm of each head's gradient at its own input; mean over samples and heads.

    .. math:: \tfrac12 E \lVert \nabla_f h(f) \rVert^2

    Args:
        real_logits: Logits of real samples, with a graph to the inputs.
        inputs: What each head saw (B, ...), in the order of the heads; requires gradients.

    Reference: Mescheder, Geiger, Nowozin, Which Training Methods for GANs do actually Converge?, 2018, arXiv
    1801.04406.
    """
    gradients = torch.autograd.grad(real_logits.sum(), list(inputs), create_graph=True)
    return 0.5 * torch.stack([gradient.flatten(1).square().sum(1).mean() for gradient in gradients]).mean()


def places(feature: Tensor) -> Float[Tensor, "b places channels"]:
    """Returns a feature as a row of vectors."""
    if feature.ndim == 2:
        return feature[:, None]
    return feature if feature.ndim == 3 else feature.flatten(2).transpose(1, 2)
