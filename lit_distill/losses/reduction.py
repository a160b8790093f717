"""How per-sample losses become one number."""

from typing import Literal

from torch import Tensor

Reduction = Literal["batchmean", "sum", "none"]


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Reduces per-sample values (B,).

    Args:
        values: One value per sample.
        reduction: "batchmean" divides the sum by the number of samples; "sum"; "none" returns the values.

    Raises:
        ValueError: Another word. "mean" is refused on purpose: in torch's `kl_div` it also divides by the classes.
    """
    if reduction == "batchmean":
        return values.mean()
    if reduction == "sum":
        return values.sum()
    if reduction == "none":
        return values
    raise ValueError(f"reduction is '{reduction}'; use 'batchmean', 'sum' or 'none'")
