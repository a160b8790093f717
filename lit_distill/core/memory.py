"""What a network takes of each device under FSDP2, on paper: shapes are enough, networks may be on the meta device.

`lit-distill memory` prints it for the networks of a configuration. docs/scaling.md says how it was checked.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.core.strategies import sharded_units


@dataclass(frozen=True)
class Footprint:
    """Bytes of one network on one device.

    Attributes:
        parameters: Its shards of the parameters, or all of them on one device.
        gradients: Likewise their gradients.
        optimizer: Likewise the states of the optimizer.
        gathered: What is whole at the worst moment, beside its shards: weights, gradients, buffers of collectives.
        copies: Weights that autocast has turned to 16 bits, whole, and keeps until the backward pass.
    """

    parameters: int
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    copies: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


def footprint(
    network: nn.Module,
    devices: int,
    *,
    trained: bool = True,
    optimizer_states: float = 2.0,
    autocast: bool = False,
) -> Footprint:
    """Adds up what FSDP2 keeps of a network on each device, activations aside.

    Shards are of the first dimension and of equal size: each device has ceil(rows / devices) rows of each parameter.
    A unit is what is gathered at once: each block that `shard` finds, and the rest, the root. With r and b bytes of the
    root and of the largest block, whole are

    - of a trained network r + 4 b (the root's weights; the block's weights, gradients, and a buffer for gathering the
      next block and for reducing gradients), or 3 r at the end of the backward pass if that is more;
    - of a frozen one r + 2 b, or 2 r + b while the first block is gathered. Its root stays whole after its first run.

    On one device nothing is sharded, and nothing is gathered.

    Args:
        network: The network; what is to be trained of it has `requires_grad`.
        devices: Number of devices.
        trained: Whether it is trained.
        optimizer_states: States of the optimizer in sizes of a parameter: 2 for Adam, 1 for SGD with momentum.
        autocast: Whether it runs under autocast to 16 bits (`bf16-mixed`), with weights in 32.

    Returns:
        Bytes for each device.
    """
    parameters = _unique(network.parameters())
    learned = [weight for weight in parameters if weight.requires_grad] if trained else []
    gradients = _sharded(learned, devices)
    copied = [weight for weight in learned if weight.dim() > 1 and weight.dtype == torch.float32] if autocast else []
    gathered = 0
    if devices > 1:
        *blocks, root = [sum(map(_bytes, unit)) for unit in sharded_units(network)] or [0]
        block = max(blocks, default=0)
        gathered = max(root + 4 * block, 3 * root) if learned else max(root + 2 * block, 2 * root + block)
    return Footprint(
        parameters=_sharded(parameters, devices),
        gradients=gradients,
        optimizer=round(optimizer_states * gradients),
        gathered=gathered,
        copies=sum(2 * weight.numel() for weight in copied) - 2 * _embedded(network, copied),
    )


def optimizer_states(build: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Finds out how much an optimizer keeps of each parameter, in sizes of a parameter: one step on a small one."""
    weight = nn.Parameter(torch.zeros(16, 16))
    weight.grad = torch.zeros(16, 16)
    optimizer = build([weight])
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.dim()]
    return sum(map(_bytes, kept)) / _bytes(weight)


def transformer_activations(
    batch: int,
    sequence: int,
    hidden: int,
    layers: int,
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
) -> int:
    """Estimates what the layers of a transformer keep for the backward pass of one device's rows.

    17 s b h numbers a layer, where attention never holds its s x s matrix (fused kernels), and where each layer is
    computed again in the backward pass its input alone, s b h, and 17 s b h for the one at work. Made for GPT (an MLP
    of four times the width, GELU, dropout); a Llama is near it.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198,
    section 4 (34 s b h bytes in 16 bits without the term of the attention matrix; 2 s b h with full recomputation).

    Args:
        batch: b, rows of one device.
        sequence: s, tokens of a row.
        hidden: h, width.
        layers: Number of layers.
        itemsize: Bytes of a number: 2, or 4 in float32.
        checkpointing: Whether layers are computed again.

    Returns:
        Bytes.
    """
    unit = batch * sequence * hidden * itemsize
    return unit * (layers + 17) if checkpointing else 17 * unit * layers


def memory_rows(networks: dict[str, tuple[nn.Module, dict[str, Any]]], devices: Sequence[int]) -> list[list[str]]:
    """Lays out footprints as a table: networks by name, with the options of `footprint`; numbers in GiB.

    Returns:
        A head, a row for each network and number of devices, and the sum for each number of devices.
    """
    rows = [["network", "devices", "parameters", "gradients", "optimizer", "gathered", "copies", "GiB a device"]]
    for count in devices:
        found = {name: footprint(network, count, **options) for name, (network, options) in networks.items()}
        rows += [[name, str(count), *map(gib, astuple(each)), gib(each.total)] for name, each in found.items()]
        if len(found) > 1:
            sums = [sum(column) for column in zip(*map(astuple, found.values()), strict=True)]
            rows.append(["all", str(count), *map(gib, sums), gib(sum(sums))])
    return rows


def gib(size: int) -> str:
    """Writes bytes as GiB."""
    return f"{size / 2**30:,.2f}" if size >= 2**30 / 200 or not size else f"{size / 2**30:.4f}"


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(weight): weight for weight in parameters}.values())


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _sharded(parameters: Iterable[Tensor], devices: int) -> int:
    """Bytes of one device's shards, with the rows that make them equal."""
    return sum(-(-len(w) // devices) * (_bytes(w) // max(len(w), 1)) if w.dim() else _bytes(w) for w in parameters)


def _embedded(network: nn.Module, weights: Sequence[nn.Parameter]) -> int:
    """Numbers of tables that are looked up and not multiplied with: autocast leaves them as they are."""
    known = {id(weight) for weight in weights}
    uses: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for weight in module.parameters(recurse=False):
            uses.setdefault(id(weight), []).append(module)
    tables = {key for key, modules in uses.items() if all(isinstance(each, nn.Embedding) for each in modules)}
    return sum(weight.numel() for weight in weights if id(weight) in tables & known)
