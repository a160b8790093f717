"""Image classifiers: knowledge distillation from a larger network to a smaller one.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.image.data import (
        CIFAR100DataModule,
        CIFAR10DataModule,
        DigitsDataModule,
        ImageBatch,
        ImageFolderDataModule,
        MNIST5kDataModule,
    )
    from lit_distill.image.distillation import DistillationLoss, ImageDistiller, Outputs, Shapes, Term
    from lit_distill.image.ensemble import Ensemble
    from lit_distill.image.losses.logits import LogitKL
    from lit_distill.image.losses.maps import AttentionTransfer, Hint
    from lit_distill.image.methods.at import AT
    from lit_distill.image.methods.combined import Combined
    from lit_distill.image.methods.defensive import DefensiveDistillation
    from lit_distill.image.methods.fitnets import FitNets
    from lit_distill.image.methods.kd import KD
    from lit_distill.image.methods.multi_teacher import MultiTeacherKD
    from lit_distill.image.methods.supervised import Supervised
    from lit_distill.image.methods.takd import TAKD
    from lit_distill.image.robustness import AdversarialEvaluation

_MODULES = {
    "AT": "methods.at",
    "Combined": "methods.combined",
    "DefensiveDistillation": "methods.defensive",
    "FitNets": "methods.fitnets",
    "KD": "methods.kd",
    "MultiTeacherKD": "methods.multi_teacher",
    "Supervised": "methods.supervised",
    "TAKD": "methods.takd",
    "AttentionTransfer": "losses.maps",
    "Hint": "losses.maps",
    "LogitKL": "losses.logits",
    "AdversarialEvaluation": "robustness",
    "DistillationLoss": "distillation",
    "Ensemble": "ensemble",
    "ImageDistiller": "distillation",
    "Outputs": "distillation",
    "Shapes": "distillation",
    "Term": "distillation",
    "CIFAR100DataModule": "data",
    "CIFAR10DataModule": "data",
    "DigitsDataModule": "data",
    "ImageBatch": "data",
    "ImageFolderDataModule": "data",
    "MNIST5kDataModule": "data",
}

__all__ = [  # noqa: RUF022 (methods first, then losses, base, data)
    "AT",
    "Combined",
    "DefensiveDistillation",
    "FitNets",
    "KD",
    "MultiTeacherKD",
    "Supervised",
    "TAKD",
    "AttentionTransfer",
    "Hint",
    "LogitKL",
    "AdversarialEvaluation",
    "DistillationLoss",
    "Ensemble",
    "ImageDistiller",
    "Outputs",
    "Shapes",
    "Term",
    "CIFAR100DataModule",
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ImageBatch",
    "ImageFolderDataModule",
    "MNIST5kDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.image' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.image.{_MODULES[name]}"), name)
