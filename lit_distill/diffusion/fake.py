"""The fake score: a denoiser of what the student generates now."""

import copy
from abc import ABC, abstractmethod

import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser


class FakeScore(ABC):
    """Makes the fake score from the teacher, which it begins as."""

    @abstractmethod
    def build(self, teacher: Denoiser, sharded: bool = False) -> Denoiser:
        """Returns the fake score; parameters that it trains have gradients.

        Args:
            teacher: The teacher.
            sharded: Whether networks will be sharded (FSDP2); then none may share weights with another.
        """

    @torch.no_grad()
    def restart(self, fake: Denoiser, teacher: Denoiser) -> None:
        """Makes a fake score in use what it began as, in place: its optimizer keeps hold of its parameters."""
        for own, first in zip(fake.parameters(), self.build(teacher).parameters(), strict=True):
            own.copy_(first)


class FullCopy(FakeScore):
    """A copy of the teacher, all of which is trained."""

    def build(self, teacher: Denoiser, sharded: bool = False) -> Denoiser:
        """See `FakeScore`."""
        return copy.deepcopy(teacher).requires_grad_(True)

    @torch.no_grad()
    def restart(self, fake: Denoiser, teacher: Denoiser) -> None:
        """See `FakeScore`."""
        for own, original in zip(fake.parameters(), teacher.parameters(), strict=True):
            own.copy_(original)


class OwnNetwork(FakeScore):
    """A network of its own, all of which is trained, where the teacher has no weights to begin from (`exact_denoiser`).

    Args:
        network: The denoiser, on the teacher's path.
    """

    def __init__(self, network: Denoiser) -> None:
        self.network = network

    def build(self, teacher: Denoiser, sharded: bool = False) -> Denoiser:
        """See `FakeScore`."""
        if type(self.network.path) is not type(teacher.path):
            raise UsageError(
                f"model.fake: it is on {type(self.network.path).__name__}, the teacher on "
                f"{type(teacher.path).__name__}; give both the same path"
            )
        return copy.deepcopy(self.network).requires_grad_(True)


class LoRA(FakeScore):
    """The teacher's own weights, shared with it, plus trained adapters of low rank. At first it is the teacher.

    Args:
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
        targets: Ends of the names of the linear layers and convolutions that get one; all of those if None.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685.
    """

    def __init__(self, rank: int = 64, alpha: float = 64.0, targets: list[str] | None = None) -> None:
        if rank < 1:
            raise UsageError(f"fake.rank is {rank}; give 1 or more")
        self.rank, self.alpha, self.targets = rank, alpha, targets

    def build(self, teacher: Denoiser, sharded: bool = False) -> Denoiser:
        """See `FakeScore`."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UsageError("model.fake: LoRA needs package peft; pip install 'lit-distill[llm]'") from error
        # Modules are copied, weights are not: copies of the teacher's weights are said to be those weights.
        shared = {} if sharded else {id(weight): weight for weight in teacher.parameters()}
        fake = copy.deepcopy(teacher, shared).requires_grad_(False)
        targets = self.targets or [
            name for name, part in fake.network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
        ]
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # only divided by the rank
            target_modules=targets,
            init_lora_weights="gaussian",
        )
        inject_adapter_in_model(config, fake.network)  # gradients for the adapters alone
        return fake

    @torch.no_grad()
    def restart(self, fake: Denoiser, teacher: Denoiser) -> None:
        """See `FakeScore`. What the adapters add is 0 again; their other factor is drawn anew."""
        for name, own in fake.named_parameters():
            if ".lora_A." in name:
                own.normal_(std=1 / self.rank)
            elif ".lora_B." in name:
                own.zero_()
