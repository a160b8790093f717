"""Data set distillation: a few images with labels that train a network almost as well as all of them.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.dataset.data import DistilledBatch, DistilledImages, ReplacedImages
    from lit_distill.dataset.evaluation import DistilledSetEvaluation
    from lit_distill.dataset.methods.coresets import Herding, KCenter, KMeans
    from lit_distill.dataset.methods.dm import DistributionMatching
    from lit_distill.dataset.methods.random_subset import RandomSubset
    from lit_distill.dataset.models import DistillationConvNet
    from lit_distill.dataset.siamese import SiameseAugment
    from lit_distill.dataset.synthesizer import DatasetSynthesizer
    from lit_distill.dataset.synthetic import SyntheticSet

_MODULES = {
    "DistributionMatching": "methods.dm",
    "Herding": "methods.coresets",
    "KCenter": "methods.coresets",
    "KMeans": "methods.coresets",
    "RandomSubset": "methods.random_subset",
    "DatasetSynthesizer": "synthesizer",
    "DistillationConvNet": "models",
    "DistilledBatch": "data",
    "DistilledImages": "data",
    "DistilledSetEvaluation": "evaluation",
    "ReplacedImages": "data",
    "SiameseAugment": "siamese",
    "SyntheticSet": "synthetic",
}

__all__ = [  # noqa: RUF022 (methods first, then base, data)
    "DistributionMatching",
    "Herding",
    "KCenter",
    "KMeans",
    "RandomSubset",
    "DatasetSynthesizer",
    "DistillationConvNet",
    "DistilledBatch",
    "DistilledImages",
    "DistilledSetEvaluation",
    "ReplacedImages",
    "SiameseAugment",
    "SyntheticSet",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.dataset' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.dataset.{_MODULES[name]}"), name)
