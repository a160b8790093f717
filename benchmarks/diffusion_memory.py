"""Memory of score distillation with a LoRA as the fake score, against student and teacher alone.

    python benchmarks/diffusion_memory.py [published | trained]

"published" counts bytes of networks of Stable Diffusion's shapes, with the LoRA of `swiftbrush.yaml`, on tensors that
have shapes and no memory: what Adam and float32 hold of each role. "trained" takes steps of a UNet2DConditionModel of
moderate size and adds up what is there after them, tensor by tensor (each storage once, however many roles share it),
and the most that a step adds to that (torch's profiler of allocations). "student + teacher" is what those two hold; the
total is theirs and the fake score's. The target is for a LoRA's total.
"""

import os

os.environ["KINETO_LOG_LEVEL"] = "9"  # before torch, or the profiler reports each start

from timing import Turns  # isort: skip  (before torch)

import logging
import sys
import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jobs import Halt
from lightning.pytorch import LightningDataModule, Trainer
from memory import Recorded
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.fake import FakeScore, FullCopy, LoRA
from lit_distill.diffusion.paths import VPPath

TARGET = 1.10
PUBLISHED: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "Stable Diffusion 2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
}
WIDTH, TOKENS, SIZE, BATCH = 256, 16, 16, 4
MODERATE: dict[str, Any] = {
    "sample_size": SIZE,
    "block_out_channels": (128, 256, 512),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
}


def fakes() -> dict[str, FakeScore]:
    """The fake scores; rank and layers are those of the published configurations."""
    return {"full copy": FullCopy(), "LoRA, rank 64": LoRA(64, 108.0, ["to_q", "to_v"])}


def denoiser(config: dict[str, Any], device: str = "cpu") -> Denoiser:
    """A denoiser on the path of Stable Diffusion."""
    path = VPPath(beta_start=0.00085, beta_end=0.012, schedule="scaled_linear")
    with torch.device(device):
        network = UNet2DConditionModel(**config)
    return Denoiser(network, path, "eps", time_input="time")


def line(name: str, fake: str, own: float, both: float, extra: str = "") -> None:
    """Prints a line of the table, from bytes of the fake score alone and of student and teacher."""
    target = TARGET if "LoRA" in fake else ""
    print(f"{name:<22} {fake:<14} {both / 2**20:>10.0f} {own / 2**20:>9.0f} {1 + own / both:>7.3f} {target:>7}{extra}")


# ---- counted -------------------------------------------------------------------------------------------------------


def count() -> None:
    """Prints the table of the published shapes: 16 bytes for a trained weight, 4 for one at rest."""
    for name, config in PUBLISHED.items():
        teacher = denoiser(config, "meta").requires_grad_(False)
        weights = sum(p.numel() for p in teacher.parameters())
        for label, fake in fakes().items():
            trained = sum(p.numel() for p in fake.build(teacher).parameters() if p.requires_grad)
            line(name, label, 16 * trained, 20 * weights, f"   {trained / 1e6:.1f} of {weights / 1e6:.1f} million")


# ---- trained -------------------------------------------------------------------------------------------------------


class Texts(LightningDataModule):
    """Random conditions in place of embeddings of prompts."""

    sample_shape = (4, SIZE, SIZE)

    def train_dataloader(self) -> DataLoader[Any]:
        """The same batch all the time."""
        text = {"encoder_hidden_states": torch.randn(BATCH, TOKENS, WIDTH)}
        batch = SimpleNamespace(index=torch.arange(BATCH), images=None, condition=text)
        return DataLoader([batch] * 10, batch_size=None)  # type: ignore[arg-type]  # a list is a data set to it


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages of tensors, by their places in memory."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def held(network: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[int, int]:
    """What a role holds: weights, gradients, and the state of its optimizer."""
    weights = list(network.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    states = (
        [] if optimizer is None else [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    )
    return storages([*weights, *network.buffers(), *gradients, *states])


def train() -> None:
    """Prints the table of what is there after steps, and of the peak in one."""
    for label, fake in fakes().items():
        torch.manual_seed(0)
        module = ScoreDistiller(
            denoiser(MODERATE),
            denoiser(MODERATE),
            [999.0],
            fake=fake,
            optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-6),
        )

        def fit(pause: Any, module: ScoreDistiller = module) -> None:
            Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=2,
                limit_val_batches=0,
                logger=False,
                callbacks=[Halt(pause, "step")],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, datamodule=Texts())

        recorded = Recorded()
        steps = Turns(recorded.around(fit))
        for _ in range(3):
            steps.take()
        recorded.wanted = True
        steps.take()
        steps.take()
        students, critics = module.trainer.optimizers
        both = held(module.student, students) | held(module.teacher, None)
        own = {place: size for place, size in held(module.fake, critics).items() if place not in both}
        both_bytes, own_bytes = sum(both.values()), sum(own.values())
        in_step = (both_bytes + own_bytes + recorded.peak) / 2**20
        line("trained", label, own_bytes, both_bytes, f"   {recorded.peak / 2**20:>7.0f} {in_step:>9.0f}")
        steps.finish()


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of Lightning, about short runs: they would stand between the lines of the table
    print(f"{'MiB':<37} {'student +':>10} {'fake':>9} {'total':>7}")
    print(f"{'':<37} {'teacher':>10} {'score':>9} {'ratio':>7} {'target':>7}", end="")
    print("   weights, or MiB that a step adds and with them the peak")
    for chosen in sys.argv[1:] or ("published", "trained"):
        {"published": count, "trained": train}[chosen]()
