"""Attacks on image classifiers, and the callback that runs them in `test`."""

from lit_distill.image.robustness.attacks import (
    PixelModel,
    carlini_wagner_l2,
    fgsm,
    input_gradient,
    rescaled,
    signed_step,
)
from lit_distill.image.robustness.callback import AdversarialEvaluation

__all__ = [
    "AdversarialEvaluation",
    "PixelModel",
    "carlini_wagner_l2",
    "fgsm",
    "input_gradient",
    "rescaled",
    "signed_step",
]
