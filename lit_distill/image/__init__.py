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
    from lit_distill.image.losses.ab import ActivationBoundary
    from lit_distill.image.losses.diswot import RelationSimilarity, SemanticSimilarity
    from lit_distill.image.losses.fsp import FlowOfSolution
    from lit_distill.image.losses.ft import FactorTransfer
    from lit_distill.image.losses.logits import LogitKL
    from lit_distill.image.losses.maps import AttentionTransfer, Hint
    from lit_distill.image.losses.ofd import FeatureOverhaul
    from lit_distill.image.losses.review import KnowledgeReview
    from lit_distill.image.losses.vid import VariationalInformation
    from lit_distill.image.methods.ab import AB
    from lit_distill.image.methods.at import AT
    from lit_distill.image.methods.combined import Combined
    from lit_distill.image.methods.defensive import DefensiveDistillation
    from lit_distill.image.methods.diswot import DisWOT
    from lit_distill.image.methods.diswot_search import DisWOTSearch
    from lit_distill.image.methods.fitnets import FitNets
    from lit_distill.image.methods.fsp import FSP
    from lit_distill.image.methods.ft import FT
    from lit_distill.image.methods.kd import KD
    from lit_distill.image.methods.multi_teacher import MultiTeacherKD
    from lit_distill.image.methods.ofd import OFD
    from lit_distill.image.methods.reviewkd import ReviewKD
    from lit_distill.image.methods.supervised import Supervised
    from lit_distill.image.methods.takd import TAKD
    from lit_distill.image.methods.vid import VID
    from lit_distill.image.robustness import AdversarialEvaluation

_MODULES = {
    "AB": "methods.ab",
    "AT": "methods.at",
    "Combined": "methods.combined",
    "DefensiveDistillation": "methods.defensive",
    "DisWOT": "methods.diswot",
    "DisWOTSearch": "methods.diswot_search",
    "FitNets": "methods.fitnets",
    "FSP": "methods.fsp",
    "FT": "methods.ft",
    "KD": "methods.kd",
    "MultiTeacherKD": "methods.multi_teacher",
    "OFD": "methods.ofd",
    "ReviewKD": "methods.reviewkd",
    "Supervised": "methods.supervised",
    "TAKD": "methods.takd",
    "VID": "methods.vid",
    "ActivationBoundary": "losses.ab",
    "AttentionTransfer": "losses.maps",
    "FactorTransfer": "losses.ft",
    "FeatureOverhaul": "losses.ofd",
    "FlowOfSolution": "losses.fsp",
    "Hint": "losses.maps",
    "KnowledgeReview": "losses.review",
    "LogitKL": "losses.logits",
    "RelationSimilarity": "losses.diswot",
    "SemanticSimilarity": "losses.diswot",
    "VariationalInformation": "losses.vid",
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
    "AB",
    "AT",
    "Combined",
    "DefensiveDistillation",
    "DisWOT",
    "DisWOTSearch",
    "FitNets",
    "FSP",
    "FT",
    "KD",
    "MultiTeacherKD",
    "OFD",
    "ReviewKD",
    "Supervised",
    "TAKD",
    "VID",
    "ActivationBoundary",
    "AttentionTransfer",
    "FactorTransfer",
    "FeatureOverhaul",
    "FlowOfSolution",
    "Hint",
    "KnowledgeReview",
    "LogitKL",
    "RelationSimilarity",
    "SemanticSimilarity",
    "VariationalInformation",
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
