"""Networks from disk and networks at rest: loading, freezing, counting."""

import importlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_distill.core.errors import RunError, UsageError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def freeze(network: nn.Module) -> nn.Module:
    """Puts a network to rest: eval mode, no gradients. Returns the same network."""
    return network.requires_grad_(False).eval()


def redraw(network: nn.Module) -> None:
    """Draws all weights of a network anew, the way its modules do it themselves."""
    reset = getattr(network, "reset_parameters", None)
    if reset is not None:
        reset()
        return
    for child in network.children():
        redraw(child)


@torch.no_grad()
def check_redrawable(network: nn.Module, role: str = "student") -> None:
    """Draws all weights of a network anew, and checks that none was missed.

    Raises:
        UsageError: A parameter belongs to a module that cannot draw it.
    """
    for parameter in network.parameters():
        parameter.fill_(torch.nan)
    redraw(network)
    for name, parameter in network.named_parameters():
        if parameter.isnan().any():
            raise UsageError(
                f"model.{role}: {name} cannot be drawn anew; give its module a reset_parameters that does it"
            )


def count_parameters(network: nn.Module | None) -> int:
    """Counts all parameters of a network, frozen ones too; 0 for None."""
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def pretrained(weights: str, network: nn.Module | None = None) -> nn.Module:
    """Loads weights into a network.

    In YAML, `class_path: lit_distill.core.pretrained` stands wherever a network may stand.

    Args:
        weights: A run folder, its `student/` folder, a `.safetensors` file, or a `.pt`/`.pth`/`.ckpt` file (read with
            `weights_only=True`; a Lightning checkpoint's `student.` part is taken).
        network: The network to fill. May be left out for folders, which say themselves what network they hold.

    Raises:
        UsageError: The path does not exist, or the weights are another network's.
        RunError: The file is corrupt.
    """
    path = weights_file(weights)
    if network is None and Path(weights).is_dir():
        network = _build(path.parent / CONFIG_FILE)
    if network is None:
        raise UsageError(f"weights: {path} does not say which network it holds; add `network:` with its class path")
    state = read_weights(path)
    if hasattr(network, "materialize"):  # a network that has no weights before it is asked for them
        network.materialize(state)  # type: ignore[operator]  # torch takes attributes for tensors
    load_weights(network, state, origin=str(path))
    return network


def weights_file(weights: str) -> Path:
    """Returns the file of a run folder, of its `student/` folder, or the file itself.

    Raises:
        UsageError: It does not exist.
    """
    path = Path(weights)
    if (path / "student").is_dir():
        path = path / "student"
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise UsageError(f"weights: {path} does not exist; give a run folder, a .safetensors or a .pt file")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file or a torch file, on the CPU, without unpickling code.

    Raises:
        RunError: The file is truncated, corrupt, or holds something other than weights.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise RunError(
            f"weights: {path} cannot be read ({_reason(error)}); it is truncated or not a weights file"
        ) from error
    if not isinstance(content, Mapping):
        raise RunError(f"weights: {path} holds a {type(content).__name__}, not weights by name; save a state dict")
    if "pytorch-lightning_version" in content:
        prefix = "student."
        return {key.removeprefix(prefix): v for key, v in content["state_dict"].items() if key.startswith(prefix)}
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return {key.removeprefix("module."): value for key, value in content.items()}


def load_weights(network: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Fills a network strictly.

    Raises:
        UsageError: Keys or shapes differ; the message names the first difference.
    """
    own = network.state_dict()
    # Old files have no BatchNorm counters; load_state_dict fills them in, and nothing reads them.
    differences = [f"{key} is missing" for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    differences += [f"{key} is not in the network" for key in state if key not in own]
    differences += [
        f"{key} has shape {tuple(state[key].shape)}, the network wants {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UsageError(
            f"weights: {origin} does not fit {type(network).__name__}: {differences[0]}{more}; "
            "check depth, width and number of classes"
        )
    network.load_state_dict(state)


def import_class(class_path: str) -> Any:
    """Imports a class or function by its dotted path.

    Raises:
        UsageError: Module or name does not exist.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"class_path: '{class_path}' cannot be imported ({error}); check the spelling") from error


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _build(config: Path) -> nn.Module:
    if not config.is_file():
        raise UsageError(f"weights: {config.parent} has no {CONFIG_FILE}; add `network:` with its class path")
    try:
        return instantiate(json.loads(config.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError) as error:
        raise RunError(f"weights: {config} is corrupt ({error}); export the student again") from error


def instantiate(spec: Any) -> Any:
    """Builds what a `{class_path, init_args, dict_kwargs}` tree describes, the innermost parts first."""
    if isinstance(spec, list):
        return [instantiate(item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    if "class_path" not in spec:
        return {key: instantiate(value) for key, value in spec.items()}
    arguments = {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}
    return import_class(spec["class_path"])(**{key: instantiate(value) for key, value in arguments.items()})
