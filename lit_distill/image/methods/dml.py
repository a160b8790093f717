"""Deep mutual learning."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.online import OnlineDistiller
from lit_distill.losses import forward_kl


class DML(OnlineDistiller):
    r"""Networks of any size that start untrained and teach one another.

    .. math:: L_k = \mathrm{CE}(y, z_k) + \frac{w}{M - 1} \sum_{l \ne k} T^2 \, \mathrm{KL}(p_l(T) \,\|\, p_k(T))

    over M networks, the student and its peers. In the paper T and w are 1, and the networks are updated in turn.

    Args:
        student: The network to keep.
        peers: The networks that it learns with, one or more.
        temperature: T; the factor T^2 is that of `forward_kl`.
        divergence_weight: The w above, a number or a schedule over iterations.
        sequential: As in the paper's algorithm: each network learns from what the others say after their update.
        clip_norm: See `OnlineDistiller`.
        kwargs: See `Distiller`.
    """

    reference = Reference(
        title="Deep Mutual Learning",
        authors="Zhang, Xiang, Hospedales, Lu",
        year=2017,
        arxiv="1706.00384",
    )

    def __init__(
        self,
        student: nn.Module,
        peers: Sequence[nn.Module],
        temperature: float = 1.0,
        divergence_weight: float | Schedule = 1.0,
        sequential: bool = True,
        clip_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, temperature, divergence_weight, sequential, clip_norm, **kwargs)
        if not peers:
            raise UsageError("model.peers is empty; name one network or more for the student to learn with")
        self.peers = nn.ModuleList(peers)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """`student`, `peer1`, `peer2` and so on."""
        peers = {f"peer{number}": peer for number, peer in enumerate(self.peers, start=1)}
        return {"student": self.student, **peers}

    def divergence(self, name: str, logits: Mapping[str, Float[Tensor, "b k"]]) -> Float[Tensor, ""]:
        """Returns the mean over the other networks of the forward divergence."""
        others = [other for other in logits if other != name]
        values = [forward_kl(logits[name], logits[other], temperature=self.temperature) for other in others]
        return torch.stack(values).mean()
