"""`lit-distill memory`: what the networks of a configuration take of each device under FSDP2, before anything runs."""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.memory import memory_rows, optimizer_states
from lit_distill.core.networks import freeze, import_class, instantiate
from lit_distill.experiment.launch import ParsingCLI, plain


def memory(words: Sequence[str], devices: Sequence[int]) -> int:
    """Prints the table.

    Networks are built without memory for their weights, and no data are read. What a method adds when it starts
    (projectors, critics that are copies) is not in the table, and neither are activations.

    Args:
        words: What `fit` would be given: files with `-c`, and settings.
        devices: Numbers of devices.

    Returns:
        Exit status 0.

    Raises:
        UsageError: A number of devices is less than 1, or there is no network in the configuration.
    """
    for count in devices:
        if count < 1:
            raise UsageError(f"--devices: {count} devices; give at least 1")
    config = plain(ParsingCLI(["fit", *words]).config["fit"])
    method, arguments = import_class(config["model"]["class_path"]), config["model"].get("init_args") or {}
    precision = str(config["trainer"].get("precision"))
    states = optimizer_states(_optimizer(arguments.get("optimizer"), method))
    networks: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for name, spec in _networks(arguments):
        frozen = name.partition(".")[0] in getattr(method, "frozen", ())
        network = _on_meta(spec, name)
        if precision.endswith("-true"):
            network = network.to(torch.bfloat16 if precision.startswith("bf16") else torch.float16)
        if frozen:
            freeze(network)
        networks[name] = (
            network,
            {"trained": not frozen, "optimizer_states": states, "autocast": precision.endswith("-mixed")},
        )
    if not networks:
        raise UsageError(f"memory: {config['model']['class_path']} is given no network; name a file with `-c`")
    _print(memory_rows(networks, devices))
    return 0


def _optimizer(spec: Any, method: Any) -> Any:
    """What builds the (first) optimizer: the configuration's, or the method's own."""
    if isinstance(spec, dict):
        return partial(import_class(spec["class_path"]), **(spec.get("init_args") or {}))
    given = (inspect.signature(kind).parameters.get("optimizer") for kind in inspect.getmro(method))
    return next(parameter.default for parameter in given if parameter is not None)


def _networks(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments of a method that are networks, or lists of networks, with their names."""
    for name, value in arguments.items():
        for number, spec in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(spec, dict) and "class_path" in spec and _is_network(import_class(spec["class_path"])):
                yield (f"{name}.{number}" if isinstance(value, list) else name), spec


def _is_network(kind: Any) -> bool:
    if inspect.isclass(kind):
        return issubclass(kind, nn.Module) and bool(inspect.signature(kind.forward).parameters)
    returned = inspect.signature(kind).return_annotation
    return inspect.isclass(returned) and issubclass(returned, nn.Module)


def _on_meta(spec: dict[str, Any], name: str) -> nn.Module:
    given = spec.get("init_args") or {}
    if spec["class_path"].endswith(".pretrained") and given.get("network"):
        spec = given["network"]  # its weights do not matter
    with torch.device("meta"):
        network = instantiate(spec)
        if hasattr(network, "materialize"):
            network.materialize()
    return network


def _print(rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, title="GiB on each device under FSDP2, without activations")
    for title in rows[0]:
        table.add_column(title, justify="left" if title == "network" else "right")
    for before, row in pairwise(rows):
        if before[1] not in (row[1], rows[0][1]):
            table.add_section()
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
