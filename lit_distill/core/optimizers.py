"""An optimizer and a learning rate schedule that torch has not."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_distill.core.errors import UsageError


class MatrixDecayAdamW(torch.optim.AdamW):
    """AdamW whose weight decay holds for parameters of more than one dimension; biases and scales have none.

    Args:
        params: Parameters.
        lr: Learning rate.
        betas: Decay of the means of gradients and of their squares.
        weight_decay: Weight decay of matrices and kernels.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        given = list(params)
        decayed = [parameter for parameter in given if parameter.ndim > 1]
        others = [parameter for parameter in given if parameter.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        super().__init__([group for group in groups if group["params"]], lr=lr, betas=betas, weight_decay=weight_decay)


class SmoothedCosine(LambdaLR):
    r"""The first part of half a cosine.

    .. math:: \eta_e = \tfrac12 \, \eta_0 \Big(1 + \cos \frac{\pi e}{E \zeta}\Big)

    Args:
        optimizer: Optimizer.
        epochs: Steps of the schedule in the run, E.
        stretch: zeta: 1 ends at 0, 2 at half the learning rate.

    Reference: Sun, Shi, Yu, Lin, On the Diversity and Realism of Distilled Dataset, 2023, arXiv 2312.03526 (code, with
    2); Cui, Li, Ma, Bi, Luo, Shen, 2025, arXiv 2501.07575 (code, where it is eta).
    """

    def __init__(self, optimizer: Optimizer, epochs: int, stretch: float = 1.0) -> None:
        if epochs < 1:
            raise UsageError(f"lr_scheduler: epochs is {epochs}; give the epochs of the run (trainer.max_epochs)")
        if stretch < 1:
            raise UsageError(f"lr_scheduler: stretch is {stretch}; give 1 or more (1 ends at 0, 2 at half the rate)")
        super().__init__(
            optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch, epochs) / (epochs * stretch)))
        )
