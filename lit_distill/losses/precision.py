"""Losses in float32, whatever the networks run in."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def in_float32(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Makes a pure loss compute in float32 (or float64, if it is given that).

    Casting alone is not enough: under autocast, a matrix product of float32 tensors is still computed in bfloat16.

    Args:
        loss: A function of tensors; those in half precision are cast before it sees them.
    """

    @wraps(loss)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return loss(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()})

    return wrapped


def _wide(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
