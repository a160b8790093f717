"""FSDP2 as a Lightning strategy, `--trainer.strategy fsdp2`, and the plan by which a network is sharded."""

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallel, second generation: every device works on its own part of the batch.

    Lightning's `ModelParallelStrategy` puts the devices of a node into the tensor-parallel group unless told otherwise;
    distillation wants all of them in the data-parallel group. Runs on CPU processes (gloo) too.

    Args:
        save_distributed_checkpoint: One file per process instead of one file. For networks that do not fit one host.
        process_group_backend: "nccl", "gloo"; chosen by the device if None.
        timeout_seconds: How long a collective may wait.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout_seconds: int = 1800,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def setup_environment(self) -> None:
        """Makes one data-parallel group of all devices of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel (FSDP2), all devices")


def shard(network: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    """Shards a network in place over the data-parallel group: its blocks first, then the rest as the root.

    Blocks are the classes a transformers model names in `_no_split_modules`, otherwise the entries of the outermost
    `ModuleList`s and `Sequential`s. Names of modules and parameters stay as they are.

    A `ModuleDict` or `ModuleList` runs no forward of its own in which weights could be gathered: its entries are
    sharded one by one. What has no parameters stays as it is.

    Args:
        network: The network; trained or frozen.
        mesh: The mesh that Lightning's strategy provides.
        options: Passed to `fully_shard` (mixed precision, resharding).
    """
    if isinstance(network, nn.ModuleDict | nn.ModuleList):
        for entry in network.children():
            shard(entry, mesh, **options)
        return
    if not _has_parameters(network):
        return
    group = mesh["data_parallel"]
    for block in _blocks(network):
        fully_shard(block, mesh=group, **options)
    fully_shard(network, mesh=group, **options)
    if hasattr(network, "generate"):
        register_fsdp_forward_method(network, "generate")  # it too runs on whole weights


def sharded_units(network: nn.Module) -> list[list[nn.Parameter]]:
    """Lists the parameters that `shard` gathers at once: those of each block, and last those of the root.

    The roots of a container's entries count as one.
    """
    taken: set[int] = set()
    units = []
    for module in [*_blocks(network), network]:
        unit = {id(weight): weight for weight in module.parameters() if id(weight) not in taken}
        taken |= unit.keys()
        units.append(list(unit.values()))
    return units


def reshard(network: nn.Module) -> None:
    """Puts the whole weights away that a root keeps after a forward without a backward; others have none.

    While they are there, neither what is said of weights (`requires_grad`) nor what is written to them is heeded.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_state(network: nn.Module) -> dict[str, Any]:
    """Returns the whole state dict of a network, on the CPU where it had to be gathered from shards.

    A collective when the network is sharded: every process calls it; only the first one gets the weights.
    """
    if not isinstance(network, FSDPModule):
        return network.state_dict()
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def distributed_rank() -> tuple[int, int]:
    """Returns the number of this process and of how many; 0 of 1 where there is one."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def gathered(value: Any) -> list[Any]:
    """Returns, in every process, what each gives. For what is small and rare: it is pickled and waited for."""
    _, world_size = distributed_rank()
    if world_size == 1:
        return [value]
    found: list[Any] = [None] * world_size
    distributed.all_gather_object(found, value)
    return found


def _blocks(network: nn.Module) -> list[nn.Module]:
    named = set(getattr(network, "_no_split_modules", None) or ())
    if named:
        return [module for module in network.modules() if type(module).__name__ in named]
    blocks: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            # A block is worth a collective of its own only if it has weights, and more than one layer.
            blocks += [entry for entry in child if any(True for _ in entry.children()) and _has_parameters(entry)]
        else:
            blocks += _blocks(child)
    return blocks


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
