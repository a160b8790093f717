"""Image classifiers: knowledge distillation from a larger network to a smaller one.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.image.cka import linear_cka
    from lit_distill.image.data import (
        CIFAR10DataModule,
        CIFAR100DataModule,
        DigitsDataModule,
        ImageBatch,
        ImageFolderDataModule,
        MNIST5kDataModule,
    )
    from lit_distill.image.data.text import TextFeaturesDataModule
    from lit_distill.image.distillation import DistillationLoss, ImageDistiller, Outputs, Shapes, Term
    from lit_distill.image.ensemble import Ensemble
    from lit_distill.image.losses.ab import ActivationBoundary
    from lit_distill.image.losses.contrastive import ContrastiveRepresentation
    from lit_distill.image.losses.diswot import RelationSimilarity, SemanticSimilarity
    from lit_distill.image.losses.exits import OneForAll, OneForAllLogits, SelfDistillation
    from lit_distill.image.losses.fsp import FlowOfSolution
    from lit_distill.image.losses.ft import FactorTransfer
    from lit_distill.image.losses.lelp import SubclassCrossEntropy
    from lit_distill.image.losses.logits import (
        ConfidenceWeighted,
        CurriculumTemperature,
        DecoupledKL,
        LogitKL,
        MultiLevel,
        PearsonRelation,
        PermutedKL,
        VirtualTeacher,
    )
    from lit_distill.image.losses.maps import AttentionTransfer, Hint
    from lit_distill.image.losses.ofd import FeatureOverhaul
    from lit_distill.image.losses.relations import (
        ChannelCorrelation,
        CorrelationCongruence,
        KernelCongruence,
        NeuronSelectivity,
        ProbabilisticTransfer,
        RelationalKD,
        SimilarityPreserving,
    )
    from lit_distill.image.losses.review import KnowledgeReview
    from lit_distill.image.losses.vid import VariationalInformation
    from lit_distill.image.methods.ab import AB
    from lit_distill.image.methods.at import AT
    from lit_distill.image.methods.ban import BAN
    from lit_distill.image.methods.bdkd import BDKD
    from lit_distill.image.methods.byot import BYOT
    from lit_distill.image.methods.cc import CC
    from lit_distill.image.methods.combined import Combined
    from lit_distill.image.methods.crd import CRD
    from lit_distill.image.methods.ctkd import CTKD
    from lit_distill.image.methods.defensive import DefensiveDistillation
    from lit_distill.image.methods.dist import DIST
    from lit_distill.image.methods.diswot import DisWOT
    from lit_distill.image.methods.diswot_search import DisWOTSearch
    from lit_distill.image.methods.dkd import DKD
    from lit_distill.image.methods.dml import DML
    from lit_distill.image.methods.fitnets import FitNets
    from lit_distill.image.methods.fsp import FSP
    from lit_distill.image.methods.ft import FT
    from lit_distill.image.methods.ickd import ICKD
    from lit_distill.image.methods.kd import KD
    from lit_distill.image.methods.lelp import LELP
    from lit_distill.image.methods.ls import LS
    from lit_distill.image.methods.mlkd import MLKD
    from lit_distill.image.methods.multi_teacher import MultiTeacherKD
    from lit_distill.image.methods.nst import NST
    from lit_distill.image.methods.ofa import OFA
    from lit_distill.image.methods.ofd import OFD
    from lit_distill.image.methods.pkt import PKT
    from lit_distill.image.methods.reviewkd import ReviewKD
    from lit_distill.image.methods.rkd import RKD
    from lit_distill.image.methods.sp import SP
    from lit_distill.image.methods.supervised import Supervised
    from lit_distill.image.methods.takd import TAKD
    from lit_distill.image.methods.tfkd import TfKD
    from lit_distill.image.methods.vid import VID
    from lit_distill.image.online import OnlineDistiller
    from lit_distill.image.robustness import AdversarialEvaluation
    from lit_distill.image.subclasses import (
        KMeansClusters,
        KnownSubclasses,
        PrincipalDirections,
        RandomProjections,
        SubclassClassifier,
    )

_MODULES = {
    "AB": "methods.ab",
    "AT": "methods.at",
    "BAN": "methods.ban",
    "BDKD": "methods.bdkd",
    "BYOT": "methods.byot",
    "CC": "methods.cc",
    "Combined": "methods.combined",
    "CRD": "methods.crd",
    "CTKD": "methods.ctkd",
    "DefensiveDistillation": "methods.defensive",
    "DIST": "methods.dist",
    "DisWOT": "methods.diswot",
    "DisWOTSearch": "methods.diswot_search",
    "DKD": "methods.dkd",
    "DML": "methods.dml",
    "FitNets": "methods.fitnets",
    "FSP": "methods.fsp",
    "FT": "methods.ft",
    "ICKD": "methods.ickd",
    "KD": "methods.kd",
    "LELP": "methods.lelp",
    "LS": "methods.ls",
    "MLKD": "methods.mlkd",
    "MultiTeacherKD": "methods.multi_teacher",
    "NST": "methods.nst",
    "OFA": "methods.ofa",
    "OFD": "methods.ofd",
    "PKT": "methods.pkt",
    "ReviewKD": "methods.reviewkd",
    "RKD": "methods.rkd",
    "SP": "methods.sp",
    "Supervised": "methods.supervised",
    "TAKD": "methods.takd",
    "TfKD": "methods.tfkd",
    "VID": "methods.vid",
    "ActivationBoundary": "losses.ab",
    "AttentionTransfer": "losses.maps",
    "ChannelCorrelation": "losses.relations",
    "ConfidenceWeighted": "losses.logits",
    "ContrastiveRepresentation": "losses.contrastive",
    "CorrelationCongruence": "losses.relations",
    "CurriculumTemperature": "losses.logits",
    "DecoupledKL": "losses.logits",
    "FactorTransfer": "losses.ft",
    "FeatureOverhaul": "losses.ofd",
    "FlowOfSolution": "losses.fsp",
    "Hint": "losses.maps",
    "KernelCongruence": "losses.relations",
    "KnowledgeReview": "losses.review",
    "LogitKL": "losses.logits",
    "MultiLevel": "losses.logits",
    "NeuronSelectivity": "losses.relations",
    "OneForAll": "losses.exits",
    "OneForAllLogits": "losses.exits",
    "PearsonRelation": "losses.logits",
    "PermutedKL": "losses.logits",
    "ProbabilisticTransfer": "losses.relations",
    "RelationalKD": "losses.relations",
    "RelationSimilarity": "losses.diswot",
    "SelfDistillation": "losses.exits",
    "SemanticSimilarity": "losses.diswot",
    "SimilarityPreserving": "losses.relations",
    "SubclassCrossEntropy": "losses.lelp",
    "VariationalInformation": "losses.vid",
    "VirtualTeacher": "losses.logits",
    "AdversarialEvaluation": "robustness",
    "DistillationLoss": "distillation",
    "Ensemble": "ensemble",
    "ImageDistiller": "distillation",
    "KMeansClusters": "subclasses",
    "KnownSubclasses": "subclasses",
    "linear_cka": "cka",
    "OnlineDistiller": "online",
    "Outputs": "distillation",
    "PrincipalDirections": "subclasses",
    "RandomProjections": "subclasses",
    "Shapes": "distillation",
    "SubclassClassifier": "subclasses",
    "Term": "distillation",
    "CIFAR100DataModule": "data",
    "CIFAR10DataModule": "data",
    "DigitsDataModule": "data",
    "ImageBatch": "data",
    "ImageFolderDataModule": "data",
    "MNIST5kDataModule": "data",
    "TextFeaturesDataModule": "data.text",
}

__all__ = [  # noqa: RUF022 (methods first, then losses, base, data)
    "AB",
    "AT",
    "BAN",
    "BDKD",
    "BYOT",
    "CC",
    "Combined",
    "CRD",
    "CTKD",
    "DefensiveDistillation",
    "DIST",
    "DisWOT",
    "DisWOTSearch",
    "DKD",
    "DML",
    "FitNets",
    "FSP",
    "FT",
    "ICKD",
    "KD",
    "LELP",
    "LS",
    "MLKD",
    "MultiTeacherKD",
    "NST",
    "OFA",
    "OFD",
    "PKT",
    "ReviewKD",
    "RKD",
    "SP",
    "Supervised",
    "TAKD",
    "TfKD",
    "VID",
    "ActivationBoundary",
    "AttentionTransfer",
    "ChannelCorrelation",
    "ConfidenceWeighted",
    "ContrastiveRepresentation",
    "CorrelationCongruence",
    "CurriculumTemperature",
    "DecoupledKL",
    "FactorTransfer",
    "FeatureOverhaul",
    "FlowOfSolution",
    "Hint",
    "KernelCongruence",
    "KnowledgeReview",
    "LogitKL",
    "MultiLevel",
    "NeuronSelectivity",
    "OneForAll",
    "OneForAllLogits",
    "PearsonRelation",
    "PermutedKL",
    "ProbabilisticTransfer",
    "RelationalKD",
    "RelationSimilarity",
    "SelfDistillation",
    "SemanticSimilarity",
    "SimilarityPreserving",
    "SubclassCrossEntropy",
    "VariationalInformation",
    "VirtualTeacher",
    "AdversarialEvaluation",
    "DistillationLoss",
    "Ensemble",
    "ImageDistiller",
    "KMeansClusters",
    "KnownSubclasses",
    "linear_cka",
    "OnlineDistiller",
    "Outputs",
    "PrincipalDirections",
    "RandomProjections",
    "Shapes",
    "SubclassClassifier",
    "Term",
    "CIFAR100DataModule",
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ImageBatch",
    "ImageFolderDataModule",
    "MNIST5kDataModule",
    "TextFeaturesDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.image' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.image.{_MODULES[name]}"), name)
