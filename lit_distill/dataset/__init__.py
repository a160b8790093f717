"""Data set distillation: a few images with labels that train a network almost as well as all of them.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.dataset.data import DistilledImages, RelabelledImages, ReplacedImages
    from lit_distill.dataset.evaluation import DistilledSetEvaluation
    from lit_distill.dataset.methods.coresets import Herding, KCenter, KMeans
    from lit_distill.dataset.methods.cvdd import CommitteeRecovery
    from lit_distill.dataset.methods.datm import DifficultyAlignedTrajectoryMatching
    from lit_distill.dataset.methods.dc import GradientMatching
    from lit_distill.dataset.methods.dm import DistributionMatching
    from lit_distill.dataset.methods.experts import ExpertTrajectories
    from lit_distill.dataset.methods.gvbsm import GeneralizedStatisticalMatching
    from lit_distill.dataset.methods.mtt import TrajectoryMatching
    from lit_distill.dataset.methods.random_subset import RandomSubset
    from lit_distill.dataset.methods.rded import PatchSelection
    from lit_distill.dataset.methods.sre2l import SRe2L
    from lit_distill.dataset.models import DistillationConvNet
    from lit_distill.dataset.siamese import SiameseAugment
    from lit_distill.dataset.synthesizer import DatasetSynthesizer
    from lit_distill.dataset.synthetic import SyntheticSet

_MODULES = {
    "CommitteeRecovery": "methods.cvdd",
    "DifficultyAlignedTrajectoryMatching": "methods.datm",
    "DistributionMatching": "methods.dm",
    "ExpertTrajectories": "methods.experts",
    "GeneralizedStatisticalMatching": "methods.gvbsm",
    "GradientMatching": "methods.dc",
    "Herding": "methods.coresets",
    "KCenter": "methods.coresets",
    "KMeans": "methods.coresets",
    "PatchSelection": "methods.rded",
    "RandomSubset": "methods.random_subset",
    "SRe2L": "methods.sre2l",
    "TrajectoryMatching": "methods.mtt",
    "DatasetSynthesizer": "synthesizer",
    "DistillationConvNet": "models",
    "DistilledImages": "data",
    "DistilledSetEvaluation": "evaluation",
    "RelabelledImages": "data",
    "ReplacedImages": "data",
    "SiameseAugment": "siamese",
    "SyntheticSet": "synthetic",
}

__all__ = [  # noqa: RUF022 (methods first, then base, data)
    "CommitteeRecovery",
    "DifficultyAlignedTrajectoryMatching",
    "DistributionMatching",
    "ExpertTrajectories",
    "GeneralizedStatisticalMatching",
    "GradientMatching",
    "Herding",
    "KCenter",
    "KMeans",
    "PatchSelection",
    "RandomSubset",
    "SRe2L",
    "TrajectoryMatching",
    "DatasetSynthesizer",
    "DistillationConvNet",
    "DistilledImages",
    "DistilledSetEvaluation",
    "RelabelledImages",
    "ReplacedImages",
    "SiameseAugment",
    "SyntheticSet",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.dataset' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.dataset.{_MODULES[name]}"), name)
