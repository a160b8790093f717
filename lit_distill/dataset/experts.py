"""Trajectories of expert networks on disk: their parameters after every epoch of training on all real images."""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import atomic_path, write_json
from lit_distill.image.data.in_memory import InMemoryImageDataModule

KIND, VERSION = "experts", 1
FOLDER, DESCRIPTION, TENSOR = "experts", "experts.json", "parameters"


@dataclass(frozen=True)
class ExpertBuffer:
    """A folder with a file for each expert, and a description of what they all are.

    A file holds one tensor, (epochs + 1, parameters) float32, whose first row is the network before training. Files are
    whole or absent.

    Attributes:
        folder: Where they lie.
        description: "network": class, and names and shapes of the parameters in order. "epochs" of training. "lr":
            learning rate at the beginning. "data": see `data_fingerprint`.
    """

    folder: Path
    description: dict[str, Any]

    @classmethod
    def create(
        cls, folder: Path, network: nn.Module, data: dict[str, Any], *, epochs: int, lr: float
    ) -> "ExpertBuffer":
        """Writes the description; experts are added by `write`."""
        description = {"network": network_fingerprint(network), "epochs": epochs, "lr": lr, "data": data}
        write_json(folder / DESCRIPTION, {"kind": KIND, "version": VERSION, **description})
        return cls(folder, description)

    @classmethod
    def open(cls, folder: str | Path) -> "ExpertBuffer":
        """Opens what a run of `ExpertTrajectories` left.

        Args:
            folder: The run's folder, or `experts/` in it.

        Raises:
            UsageError: There are no experts, or they are of another version.
            RunError: The description is corrupt.
        """
        folder = Path(folder).expanduser()
        if (folder / FOLDER).is_dir():
            folder = folder / FOLDER
        if not (folder / DESCRIPTION).is_file():
            raise UsageError(
                f"model.experts: {folder} holds no experts; give the folder of a run of ExpertTrajectories"
            )
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            kind, version = description.pop("kind"), description.pop("version")
            found = cls(folder, {key: description[key] for key in ("network", "epochs", "lr", "data")})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, OSError) as error:
            raise RunError(
                f"model.experts: {folder / DESCRIPTION} is corrupt ({error}); train the experts again"
            ) from error
        if (kind, version) != (KIND, VERSION):
            raise UsageError(
                f"model.experts: {folder} holds {kind} of version {version}, this program reads {KIND} of {VERSION}; "
                "train the experts again"
            )
        if not len(found):
            raise UsageError(
                f"model.experts: no expert in {folder} is complete; let its run reach model.epochs ({found.epochs})"
            )
        return found

    def __len__(self) -> int:
        count = 0
        while self.path(count).is_file():
            count += 1
        return count

    @property
    def epochs(self) -> int:
        """Epochs for which each expert was trained."""
        return int(self.description["epochs"])

    def path(self, expert: int) -> Path:
        """Returns the file of an expert."""
        return self.folder / f"expert_{expert:04}.safetensors"

    def write(self, expert: int, trajectory: Float[Tensor, "e p"]) -> None:
        """Writes the trajectory of an expert."""
        with atomic_path(self.path(expert)) as path:
            save_file({TENSOR: trajectory.contiguous()}, path)

    def read(self, expert: int, *epochs: int) -> list[Float[Tensor, " p"]]:
        """Reads the parameters of an expert after some epochs, 0 being before training, and nothing else of the file.

        Raises:
            RunError: The file is corrupt.
        """
        try:
            with safe_open(self.path(expert), framework="pt") as file:
                rows = file.get_slice(TENSOR)
                return [rows[epoch].clone() for epoch in epochs]  # else the whole file stays mapped
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"model.experts: {self.path(expert)} is corrupt ({error}); delete it and train it again"
            ) from error

    def check(self, network: nn.Module, data: dict[str, Any]) -> None:
        """Checks that the experts are this network, trained on these data.

        Raises:
            UsageError: They are not; the message names the first difference.
        """
        found, wanted = self.description["network"], network_fingerprint(network)
        if found != wanted:
            raise UsageError(
                f"model.experts: {self.folder} holds {_difference(found, wanted)}; give model.student the network of "
                "the experts, or train others"
            )
        for key, value in data.items():
            before = self.description["data"].get(key)
            if before != value:
                raise UsageError(
                    f"model.experts: {self.folder} was trained on other data ({key} was {_short(before)}, now "
                    f"{_short(value)}); give the same data, or train others"
                )


def network_fingerprint(network: nn.Module) -> dict[str, Any]:
    """Describes a network by its class and the shapes of its parameters."""
    shapes = [[name, list(parameter.shape)] for name, parameter in network.named_parameters()]
    return {"class": type(network).__name__, "parameters": shapes}


def data_fingerprint(data: InMemoryImageDataModule) -> dict[str, Any]:
    """Describes the training images as an expert saw them, but for augmentation."""
    found = data.fingerprint()
    return {
        "samples": found["samples"],
        "data": found["data"],
        "mean": list(data.normalize.mean),
        "std": list(data.normalize.std),
    }


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    if found["class"] != wanted["class"]:
        return f"experts of class {found['class']}, the student is a {wanted['class']}"
    for own, other in zip_longest(wanted["parameters"], found["parameters"]):
        if own != other:
            return f"experts with {_parameter(other)} where the student has {_parameter(own)}"
    return "other experts"


def _parameter(described: list[Any] | None) -> str:
    return "nothing" if described is None else f"{described[0]} of shape {tuple(described[1])}"


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)
