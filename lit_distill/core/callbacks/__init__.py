"""Callbacks that every domain shares."""

from lit_distill.core.callbacks.best_weights import BestWeights
from lit_distill.core.callbacks.compile import Compile
from lit_distill.core.callbacks.efficiency import Efficiency
from lit_distill.core.callbacks.ema import EMA
from lit_distill.core.callbacks.teacher_check import TeacherCheck

__all__ = ["EMA", "BestWeights", "Compile", "Efficiency", "TeacherCheck"]
