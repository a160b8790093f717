"""Distillation of language models: token by token, from teachers that run, were kept, or are served.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.llm.batch import TokenBatch
    from lit_distill.llm.cached import CachedTeacher
    from lit_distill.llm.data import ChatDataModule, ClassificationDataModule, TextDataModule
    from lit_distill.llm.demonstrations import TaskDemonstrations, TextDemonstrations
    from lit_distill.llm.distillation import TokenDistiller
    from lit_distill.llm.few_shot import FewShotTasks
    from lit_distill.llm.methods.adaptive_kl import AdaptiveKL, TotalVariation
    from lit_distill.llm.methods.distillm import SkewKL, SkewReverseKL
    from lit_distill.llm.methods.first import FIRST
    from lit_distill.llm.methods.gkd import GKD, JSD
    from lit_distill.llm.methods.hidden import DistilBERT, MiniLM, TinyBERT
    from lit_distill.llm.methods.kl import ForwardKL, ReverseKL
    from lit_distill.llm.methods.mend import MEND
    from lit_distill.llm.methods.minillm import MiniLLM
    from lit_distill.llm.methods.on_policy import OnPolicyDistillation
    from lit_distill.llm.methods.speculative import SpeculativeKD
    from lit_distill.llm.methods.supervised import SequenceKD, SupervisedFineTuning
    from lit_distill.llm.methods.taid import TAID
    from lit_distill.llm.methods.uld import GOLD, ULD
    from lit_distill.llm.mixed import TeacherMixed
    from lit_distill.llm.network import CausalLM, pretrained
    from lit_distill.llm.rollouts import AdaptiveReplay, OnPolicy, TeacherWritten
    from lit_distill.llm.served import ServedTeacher
    from lit_distill.llm.speculative import SpeculativeRollout

_MODULES = {
    "AdaptiveKL": "methods.adaptive_kl",
    "DistilBERT": "methods.hidden",
    "FIRST": "methods.first",
    "ForwardKL": "methods.kl",
    "GKD": "methods.gkd",
    "GOLD": "methods.uld",
    "JSD": "methods.gkd",
    "MEND": "methods.mend",
    "MiniLLM": "methods.minillm",
    "MiniLM": "methods.hidden",
    "OnPolicyDistillation": "methods.on_policy",
    "ReverseKL": "methods.kl",
    "SequenceKD": "methods.supervised",
    "SkewKL": "methods.distillm",
    "SkewReverseKL": "methods.distillm",
    "SpeculativeKD": "methods.speculative",
    "ServedTeacher": "served",
    "SpeculativeRollout": "speculative",
    "TaskDemonstrations": "demonstrations",
    "TextDemonstrations": "demonstrations",
    "SupervisedFineTuning": "methods.supervised",
    "TAID": "methods.taid",
    "TinyBERT": "methods.hidden",
    "TotalVariation": "methods.adaptive_kl",
    "ULD": "methods.uld",
    "AdaptiveReplay": "rollouts",
    "CachedTeacher": "cached",
    "CausalLM": "network",
    "ChatDataModule": "data",
    "ClassificationDataModule": "data",
    "FewShotTasks": "few_shot",
    "OnPolicy": "rollouts",
    "TeacherMixed": "mixed",
    "TeacherWritten": "rollouts",
    "TextDataModule": "data",
    "TokenBatch": "batch",
    "TokenDistiller": "distillation",
    "pretrained": "network",
}

__all__ = [  # noqa: RUF022 (methods first, then base, data)
    "AdaptiveKL",
    "DistilBERT",
    "FIRST",
    "ForwardKL",
    "GKD",
    "GOLD",
    "JSD",
    "MEND",
    "MiniLLM",
    "MiniLM",
    "OnPolicyDistillation",
    "ReverseKL",
    "SequenceKD",
    "SkewKL",
    "SkewReverseKL",
    "SpeculativeKD",
    "SupervisedFineTuning",
    "TAID",
    "TinyBERT",
    "TotalVariation",
    "ULD",
    "AdaptiveReplay",
    "CachedTeacher",
    "CausalLM",
    "ChatDataModule",
    "ClassificationDataModule",
    "FewShotTasks",
    "OnPolicy",
    "ServedTeacher",
    "SpeculativeRollout",
    "TaskDemonstrations",
    "TeacherMixed",
    "TeacherWritten",
    "TextDataModule",
    "TextDemonstrations",
    "TokenBatch",
    "TokenDistiller",
    "pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
