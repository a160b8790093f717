"""Diffusion distillation: few-step generators out of diffusion and flow models.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.diffusion.autoencoder import Autoencoder
    from lit_distill.diffusion.backtracking import BacktrackingTarget
    from lit_distill.diffusion.base import DiffusionDistiller
    from lit_distill.diffusion.data import GeneratorImages
    from lit_distill.diffusion.denoiser import Denoiser, guided, pretrained
    from lit_distill.diffusion.distillation import ScoreDistiller
    from lit_distill.diffusion.evaluation import GenerationEvaluation
    from lit_distill.diffusion.experts import PhaseExperts
    from lit_distill.diffusion.fake import FullCopy, LoRA, OwnNetwork
    from lit_distill.diffusion.latents import GeneratorLatents
    from lit_distill.diffusion.methods.decoupled_dmd import DecoupledDMD
    from lit_distill.diffusion.methods.denoising import Denoising
    from lit_distill.diffusion.methods.diff_instruct import DiffInstruct
    from lit_distill.diffusion.methods.disback import DegradationRecorder, DisBack
    from lit_distill.diffusion.methods.dmd import DMD
    from lit_distill.diffusion.methods.dmd2 import DMD2
    from lit_distill.diffusion.methods.f_distill import FDistill
    from lit_distill.diffusion.methods.msd import MSD
    from lit_distill.diffusion.methods.phased_dmd import PhasedDMD
    from lit_distill.diffusion.methods.sid import SiD
    from lit_distill.diffusion.methods.snoopi import SNOOPI
    from lit_distill.diffusion.methods.swiftbrush import SwiftBrush
    from lit_distill.diffusion.methods.teacher_score_matching import TeacherScoreMatching
    from lit_distill.diffusion.mixtures import MixtureDataModule, MixtureEvaluation, exact_denoiser, ring
    from lit_distill.diffusion.models import GaussianMixture, ResidualMLP, small_unet
    from lit_distill.diffusion.nasa import ClassTokens
    from lit_distill.diffusion.networks import diffusers_network
    from lit_distill.diffusion.paths import (
        CosinePath,
        EDMPath,
        FlowPath,
        TrigPath,
        VPPath,
        from_scheduler,
        scheduler_path,
    )
    from lit_distill.diffusion.students import ClassPartition, PartitionedImages, StudentRouter
    from lit_distill.diffusion.text import PromptEvaluation, Prompts, TextEncoder

_MODULES = {
    "DMD": "methods.dmd",
    "DMD2": "methods.dmd2",
    "DecoupledDMD": "methods.decoupled_dmd",
    "Denoising": "methods.denoising",
    "DegradationRecorder": "methods.disback",
    "DiffInstruct": "methods.diff_instruct",
    "FDistill": "methods.f_distill",
    "SNOOPI": "methods.snoopi",
    "SiD": "methods.sid",
    "SwiftBrush": "methods.swiftbrush",
    "Autoencoder": "autoencoder",
    "ClassTokens": "nasa",
    "DisBack": "methods.disback",
    "BacktrackingTarget": "backtracking",
    "ClassPartition": "students",
    "CosinePath": "paths",
    "Denoiser": "denoiser",
    "DiffusionDistiller": "base",
    "EDMPath": "paths",
    "FlowPath": "paths",
    "FullCopy": "fake",
    "GaussianMixture": "models",
    "GenerationEvaluation": "evaluation",
    "GeneratorImages": "data",
    "GeneratorLatents": "latents",
    "LoRA": "fake",
    "PromptEvaluation": "text",
    "Prompts": "text",
    "ResidualMLP": "models",
    "ScoreDistiller": "distillation",
    "TextEncoder": "text",
    "MSD": "methods.msd",
    "MixtureDataModule": "mixtures",
    "MixtureEvaluation": "mixtures",
    "OwnNetwork": "fake",
    "PartitionedImages": "students",
    "PhaseExperts": "experts",
    "PhasedDMD": "methods.phased_dmd",
    "StudentRouter": "students",
    "TeacherScoreMatching": "methods.teacher_score_matching",
    "TrigPath": "paths",
    "VPPath": "paths",
    "diffusers_network": "networks",
    "exact_denoiser": "mixtures",
    "from_scheduler": "paths",
    "guided": "denoiser",
    "pretrained": "denoiser",
    "ring": "mixtures",
    "scheduler_path": "paths",
    "small_unet": "models",
}

__all__ = [  # noqa: RUF022 (methods first, then networks, paths, base, data)
    "DMD",
    "DMD2",
    "DecoupledDMD",
    "Denoising",
    "DegradationRecorder",
    "DiffInstruct",
    "FDistill",
    "SNOOPI",
    "SiD",
    "SwiftBrush",
    "ClassTokens",
    "DisBack",
    "MSD",
    "PhasedDMD",
    "TeacherScoreMatching",
    "Denoiser",
    "GaussianMixture",
    "ResidualMLP",
    "diffusers_network",
    "exact_denoiser",
    "guided",
    "pretrained",
    "ring",
    "small_unet",
    "CosinePath",
    "EDMPath",
    "FlowPath",
    "TrigPath",
    "VPPath",
    "from_scheduler",
    "scheduler_path",
    "Autoencoder",
    "BacktrackingTarget",
    "ClassPartition",
    "DiffusionDistiller",
    "FullCopy",
    "GenerationEvaluation",
    "GeneratorImages",
    "GeneratorLatents",
    "LoRA",
    "PromptEvaluation",
    "Prompts",
    "ScoreDistiller",
    "TextEncoder",
    "MixtureDataModule",
    "MixtureEvaluation",
    "OwnNetwork",
    "PartitionedImages",
    "PhaseExperts",
    "StudentRouter",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.diffusion' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.diffusion.{_MODULES[name]}"), name)
