"""Pure loss functions used by two or more domains: tensors in, tensor out."""

from lit_distill.losses.divergences import forward_kl, reverse_kl
from lit_distill.losses.features import attention_map, attention_transfer, hint_mse
from lit_distill.losses.reduction import Reduction, reduce

__all__ = ["Reduction", "attention_map", "attention_transfer", "forward_kl", "hint_mse", "reduce", "reverse_kl"]
