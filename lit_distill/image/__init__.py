"""Image classifiers: knowledge distillation from a larger network to a smaller one.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.image.data import (
        CIFAR10DataModule,
        CIFAR100DataModule,
        DigitsDataModule,
        ImageBatch,
        ImageFolderDataModule,
        MNIST5kDataModule,
    )
    from lit_distill.image.distillation import DistillationLoss, ImageDistiller, Outputs, Shapes, Term
    from lit_distill.image.losses.logits import LogitKL
    from lit_distill.image.losses.maps import AttentionTransfer, Hint
    from lit_distill.image.methods.at import AT
    from lit_distill.image.methods.combined import Combined
    from lit_distill.image.methods.fitnets import FitNets
    from lit_distill.image.methods.kd import KD
    from lit_distill.image.methods.supervised import Supervised

_MODULES = {
    "AT": "methods.at",
    "Combined": "methods.combined",
    "FitNets": "methods.fitnets",
    "KD": "methods.kd",
    "Supervised": "methods.supervised",
    "AttentionTransfer": "losses.maps",
    "Hint": "losses.maps",
    "LogitKL": "losses.logits",
    "DistillationLoss": "distillation",
    "ImageDistiller": "distillation",
    "Outputs": "distillation",
    "Shapes": "distillation",
    "Term": "distillation",
    "CIFAR10DataModule": "data",
    "CIFAR100DataModule": "data",
    "DigitsDataModule": "data",
    "ImageBatch": "data",
    "ImageFolderDataModule": "data",
    "MNIST5kDataModule": "data",
}

__all__ = [  # noqa: RUF022 (methods first, then losses, base, data)
    "AT",
    "Combined",
    "FitNets",
    "KD",
    "Supervised",
    "AttentionTransfer",
    "Hint",
    "LogitKL",
    "DistillationLoss",
    "ImageDistiller",
    "Outputs",
    "Shapes",
    "Term",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "ImageBatch",
    "ImageFolderDataModule",
    "MNIST5kDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.image' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.image.{_MODULES[name]}"), name)
