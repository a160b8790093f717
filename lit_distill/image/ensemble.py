"""Several classifiers as one, to teach or to be measured."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError


class Ensemble(nn.Module):
    r"""The logarithm of the mean of several networks' probabilities, which stands wherever logits may stand.

    .. math:: z = \log \tfrac{1}{M} \sum_m \mathrm{softmax}(z_m)

    Softmax of it is the mean probability. In YAML it can be the teacher of any method, such as the ensemble of several
    born-again generations (Furlanello et al., 2018, arXiv 1805.04770).

    Args:
        networks: The classifiers, M of them; images (B, C, H, W) to logits (B, K), the same K.

    Raises:
        UsageError: There are none.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise UsageError("networks: an ensemble of none; give one network or more")
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes log mean probabilities, in float32.

        Raises:
            UsageError: The networks differ in the number of classes.
        """
        logits = [network(images) for network in self.networks]
        if len({each.shape[1] for each in logits}) > 1:
            counts = ", ".join(str(each.shape[1]) for each in logits)
            raise UsageError(f"the networks of an ensemble have {counts} classes; give networks of the same classes")
        log_probabilities = torch.stack([each.float().log_softmax(1) for each in logits])
        return log_probabilities.logsumexp(0) - math.log(len(logits))
