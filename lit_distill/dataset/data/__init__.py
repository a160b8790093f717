"""Data modules of few training images: distilled ones, and parts of the real ones."""

from lit_distill.dataset.data.base import ReplacedImages
from lit_distill.dataset.data.distilled import DistilledImages
from lit_distill.dataset.data.relabelled import RelabelledImages
from lit_distill.dataset.data.subset import Subset

__all__ = ["DistilledImages", "RelabelledImages", "ReplacedImages", "Subset"]
