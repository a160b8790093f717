"""A student in the folders of diffusers, so that a pipeline samples with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser

_FOLDERS = {
    "UNet2DModel": "unet",
    "UNet2DConditionModel": "unet",
    "DiTTransformer2DModel": "transformer",
    "PixArtTransformer2DModel": "transformer",
    "SD3Transformer2DModel": "transformer",
    "FluxTransformer2DModel": "transformer",
    "Lumina2Transformer2DModel": "transformer",
    "QwenImageTransformer2DModel": "transformer",
    "WanTransformer3DModel": "transformer",
}
# Pipelines of these divide the scheduler's times by 1000 before their networks see them.
_DIVIDED = ("FluxTransformer2DModel", "Lumina2Transformer2DModel", "QwenImageTransformer2DModel")
_RENOISE = {"Renoise": True, "DDIM": False, "EulerSteps": False}


def save_for_pipelines(denoiser: Denoiser, folder: Path, kept: Mapping[str, Any]) -> str:
    """Writes the network as diffusers does, and a `FewStepScheduler` that samples as the method does.

    Args:
        denoiser: The student.
        folder: Gets `unet/` or `transformer/`, and `scheduler/`.
        kept: What the run kept beside the weights: `sampler`, its class and arguments, and `guidance`.

    Returns:
        What to do with the folder.

    Raises:
        UsageError: Diffusers knows no such network, or the run says nothing of its steps.
    """
    network: Any = denoiser.network
    name = type(network).__name__
    if type(denoiser) is not Denoiser or name not in _FOLDERS:
        several = "several networks" if type(denoiser) is not Denoiser else f"a {name}"
        raise UsageError(
            f"--format hf: the student is {several}, for which diffusers has no pipeline; export it as safetensors"
        )
    sampler = kept.get("sampler") or {}
    kind = str(sampler.get("class_path", "none")).rpartition(".")[2]
    if kind not in _RENOISE:
        raise UsageError(
            f"--format hf: the student's sampler is {kind}, which is no list of steps; few-step generators have one "
            "(Renoise, DDIM, EulerSteps). Export it as safetensors"
        )
    from lit_distill.diffusion.schedulers import FewStepScheduler

    network.save_pretrained(folder / _FOLDERS[name])
    scheduler: Any = FewStepScheduler(
        steps=sampler["init_args"]["times"],
        path=denoiser.path.described(),
        prediction=denoiser.prediction,
        data_std=denoiser.data_std,
        time_input=denoiser.time_input,
        time_factor=1000.0 if name in _DIVIDED else 1.0,
        renoise=_RENOISE[kind],
    )
    scheduler.save_pretrained(folder / "scheduler")
    return (
        f"give a pipeline of diffusers {_FOLDERS[name]}/ and scheduler/ "
        "(lit_distill.diffusion.FewStepScheduler.from_pretrained), and call it with guidance_scale="
        f"{kept.get('guidance', 1.0)}"
    )
