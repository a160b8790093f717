"""Diffusion distillation: few-step generators out of diffusion and flow models.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.diffusion.adversarial import AdversarialDistiller
    from lit_distill.diffusion.autoencoder import Autoencoder
    from lit_distill.diffusion.backtracking import BacktrackingTarget
    from lit_distill.diffusion.base import DiffusionDistiller
    from lit_distill.diffusion.captions import CaptionedImages
    from lit_distill.diffusion.data import GeneratorImages
    from lit_distill.diffusion.denoiser import Denoiser, guided, pretrained
    from lit_distill.diffusion.distillation import ScoreDistiller
    from lit_distill.diffusion.evaluation import GenerationEvaluation
    from lit_distill.diffusion.experts import PhaseExperts
    from lit_distill.diffusion.fake import FullCopy, LoRA, OwnNetwork
    from lit_distill.diffusion.latents import GeneratorLatents
    from lit_distill.diffusion.methods.add import ADD
    from lit_distill.diffusion.methods.decoupled_dmd import DecoupledDMD
    from lit_distill.diffusion.methods.denoising import Denoising
    from lit_distill.diffusion.methods.diff_instruct import DiffInstruct
    from lit_distill.diffusion.methods.disback import DegradationRecorder, DisBack
    from lit_distill.diffusion.methods.dmd import DMD
    from lit_distill.diffusion.methods.dmd2 import DMD2
    from lit_distill.diffusion.methods.f_distill import FDistill
    from lit_distill.diffusion.methods.ladd import LADD
    from lit_distill.diffusion.methods.mdt_dist import MDTDist
    from lit_distill.diffusion.methods.msd import MSD
    from lit_distill.diffusion.methods.nct import NCT
    from lit_distill.diffusion.methods.nitrofusion import NitroFusion
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
    from lit_distill.diffusion.schedulers import FewStepScheduler
    from lit_distill.diffusion.students import ClassPartition, PartitionedImages, StudentRouter
    from lit_distill.diffusion.taesd import TAEF2
    from lit_distill.diffusion.text import PromptEvaluation, Prompts, TextEncoder

_MODULES = {
    "ADD": "methods.add",
    "DecoupledDMD": "methods.decoupled_dmd",
    "DegradationRecorder": "methods.disback",
    "Denoising": "methods.denoising",
    "DiffInstruct": "methods.diff_instruct",
    "DisBack": "methods.disback",
    "DMD": "methods.dmd",
    "DMD2": "methods.dmd2",
    "FDistill": "methods.f_distill",
    "LADD": "methods.ladd",
    "MDTDist": "methods.mdt_dist",
    "MSD": "methods.msd",
    "NCT": "methods.nct",
    "NitroFusion": "methods.nitrofusion",
    "PhasedDMD": "methods.phased_dmd",
    "SiD": "methods.sid",
    "SNOOPI": "methods.snoopi",
    "SwiftBrush": "methods.swiftbrush",
    "TeacherScoreMatching": "methods.teacher_score_matching",
    "AdversarialDistiller": "adversarial",
    "Autoencoder": "autoencoder",
    "TAEF2": "taesd",
    "BacktrackingTarget": "backtracking",
    "CaptionedImages": "captions",
    "ClassPartition": "students",
    "ClassTokens": "nasa",
    "CosinePath": "paths",
    "Denoiser": "denoiser",
    "diffusers_network": "networks",
    "DiffusionDistiller": "base",
    "EDMPath": "paths",
    "exact_denoiser": "mixtures",
    "FewStepScheduler": "schedulers",
    "FlowPath": "paths",
    "from_scheduler": "paths",
    "FullCopy": "fake",
    "GaussianMixture": "models",
    "GenerationEvaluation": "evaluation",
    "GeneratorImages": "data",
    "GeneratorLatents": "latents",
    "guided": "denoiser",
    "LoRA": "fake",
    "MixtureDataModule": "mixtures",
    "MixtureEvaluation": "mixtures",
    "OwnNetwork": "fake",
    "PartitionedImages": "students",
    "PhaseExperts": "experts",
    "pretrained": "denoiser",
    "PromptEvaluation": "text",
    "Prompts": "text",
    "ResidualMLP": "models",
    "ring": "mixtures",
    "scheduler_path": "paths",
    "ScoreDistiller": "distillation",
    "small_unet": "models",
    "StudentRouter": "students",
    "TextEncoder": "text",
    "TrigPath": "paths",
    "VPPath": "paths",
}

__all__ = [  # noqa: RUF022 (methods first)
    "ADD",
    "DecoupledDMD",
    "DegradationRecorder",
    "Denoising",
    "DiffInstruct",
    "DisBack",
    "DMD",
    "DMD2",
    "FDistill",
    "LADD",
    "MDTDist",
    "MSD",
    "NCT",
    "NitroFusion",
    "PhasedDMD",
    "SiD",
    "SNOOPI",
    "SwiftBrush",
    "TeacherScoreMatching",
    "AdversarialDistiller",
    "Autoencoder",
    "BacktrackingTarget",
    "CaptionedImages",
    "ClassPartition",
    "ClassTokens",
    "CosinePath",
    "Denoiser",
    "diffusers_network",
    "DiffusionDistiller",
    "EDMPath",
    "exact_denoiser",
    "FewStepScheduler",
    "FlowPath",
    "from_scheduler",
    "FullCopy",
    "GaussianMixture",
    "GenerationEvaluation",
    "GeneratorImages",
    "GeneratorLatents",
    "guided",
    "LoRA",
    "MixtureDataModule",
    "MixtureEvaluation",
    "OwnNetwork",
    "PartitionedImages",
    "PhaseExperts",
    "pretrained",
    "PromptEvaluation",
    "Prompts",
    "ResidualMLP",
    "ring",
    "scheduler_path",
    "ScoreDistiller",
    "small_unet",
    "StudentRouter",
    "TAEF2",
    "TextEncoder",
    "TrigPath",
    "VPPath",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.diffusion' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.diffusion.{_MODULES[name]}"), name)
