"""Texts and conversations as data modules that give rows of tokens."""

from lit_distill.llm.data.base import TokenDataModule, TokenLoader, TokenPart
from lit_distill.llm.data.chat import ChatDataModule
from lit_distill.llm.data.labelled import ClassificationDataModule, TextTask
from lit_distill.llm.data.packing import Documents, TokenRows, first_fit_decreasing, pack
from lit_distill.llm.data.text import TextDataModule

__all__ = [
    "ChatDataModule",
    "ClassificationDataModule",
    "Documents",
    "TextDataModule",
    "TextTask",
    "TokenDataModule",
    "TokenLoader",
    "TokenPart",
    "TokenRows",
    "first_fit_decreasing",
    "pack",
]
