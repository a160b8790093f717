"""Diffusion distillation: few-step generators out of diffusion and flow models.

Names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.diffusion.adversarial import AdversarialDistiller
    from lit_distill.diffusion.base import DiffusionDistiller
    from lit_distill.diffusion.data import GeneratorImages
    from lit_distill.diffusion.denoiser import Denoiser, guided, pretrained
    from lit_distill.diffusion.distillation import ScoreDistiller
    from lit_distill.diffusion.evaluation import GenerationEvaluation
    from lit_distill.diffusion.fake import FullCopy, LoRA
    from lit_distill.diffusion.methods.add import ADD
    from lit_distill.diffusion.methods.denoising import Denoising
    from lit_distill.diffusion.methods.diff_instruct import DiffInstruct
    from lit_distill.diffusion.methods.dmd import DMD
    from lit_distill.diffusion.methods.dmd2 import DMD2
    from lit_distill.diffusion.methods.ladd import LADD
    from lit_distill.diffusion.methods.mdt_dist import MDTDist
    from lit_distill.diffusion.methods.nct import NCT
    from lit_distill.diffusion.methods.nitrofusion import NitroFusion
    from lit_distill.diffusion.models import GaussianMixture, ResidualMLP, small_unet
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

_MODULES = {
    "DMD": "methods.dmd",
    "DMD2": "methods.dmd2",
    "ADD": "methods.add",
    "LADD": "methods.ladd",
    "MDTDist": "methods.mdt_dist",
    "NCT": "methods.nct",
    "NitroFusion": "methods.nitrofusion",
    "Denoising": "methods.denoising",
    "DiffInstruct": "methods.diff_instruct",
    "AdversarialDistiller": "adversarial",
    "CosinePath": "paths",
    "Denoiser": "denoiser",
    "DiffusionDistiller": "base",
    "EDMPath": "paths",
    "FlowPath": "paths",
    "FullCopy": "fake",
    "GaussianMixture": "models",
    "GenerationEvaluation": "evaluation",
    "GeneratorImages": "data",
    "LoRA": "fake",
    "ResidualMLP": "models",
    "ScoreDistiller": "distillation",
    "TrigPath": "paths",
    "VPPath": "paths",
    "diffusers_network": "networks",
    "from_scheduler": "paths",
    "guided": "denoiser",
    "pretrained": "denoiser",
    "scheduler_path": "paths",
    "small_unet": "models",
}

__all__ = [  # noqa: RUF022 (methods first, then networks, paths, base, data)
    "DMD",
    "DMD2",
    "Denoising",
    "DiffInstruct",
    "ADD",
    "LADD",
    "MDTDist",
    "NCT",
    "NitroFusion",
    "Denoiser",
    "GaussianMixture",
    "ResidualMLP",
    "diffusers_network",
    "guided",
    "pretrained",
    "small_unet",
    "CosinePath",
    "EDMPath",
    "FlowPath",
    "TrigPath",
    "VPPath",
    "from_scheduler",
    "scheduler_path",
    "AdversarialDistiller",
    "DiffusionDistiller",
    "FullCopy",
    "GenerationEvaluation",
    "GeneratorImages",
    "LoRA",
    "ScoreDistiller",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.diffusion' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.diffusion.{_MODULES[name]}"), name)
