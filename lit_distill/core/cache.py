"""Teacher cache: a frozen teacher runs over the training set once, and its outputs are looked up by sample."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import atomic_path


class TeacherCache:
    """Outputs of a teacher for every training sample, by the sample's position.

    One safetensors file, with the fingerprint of what it was made from in its header. So it is whole or absent, and is
    refused when teacher, data or transform are no longer the ones it was made from.

    Args:
        outputs: Name of the output ("logits", tap names) -> (N, ...).
    """

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        self.outputs = dict(outputs)

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        """Looks up samples.

        Args:
            index: (B,) positions in the training set.

        Returns:
            (B, ...) by output name, on the index's device, in float32.
        """
        self.outputs = {name: tensor.to(index.device) for name, tensor in self.outputs.items()}
        return {name: tensor.index_select(0, index).float() for name, tensor in self.outputs.items()}

    @classmethod
    def open(cls, path: Path, fingerprint: Mapping[str, Any]) -> "TeacherCache":
        """Opens a cache that was made from exactly this.

        Raises:
            UsageError: The cache was made from something else; the message names the first differing field.
            RunError: The file is corrupt.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {}).get("fingerprint", "{}"))
                wanted = json.loads(json.dumps(fingerprint))
                for field in sorted(set(found) | set(wanted)):
                    if found.get(field) != wanted.get(field):
                        raise UsageError(
                            f"teacher_cache: {path} is stale: {field} was {_short(found.get(field))}, now "
                            f"{_short(wanted.get(field))}; delete it or name another file, and it is made anew"
                        )
                return cls({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise RunError(f"teacher_cache: {path} is corrupt ({error}); delete it, and it is made anew") from error

    @classmethod
    def write(
        cls,
        path: Path,
        fingerprint: Mapping[str, Any],
        batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
        *,
        size: int,
        dtype: torch.dtype = torch.float32,
    ) -> "TeacherCache":
        """Makes a cache from batches of (index, outputs), in any order.

        Args:
            path: File to write.
            fingerprint: What the outputs depend on; must survive JSON.
            batches: Index (B,) and outputs (B, ...) by name.
            size: Number of training samples, N.
            dtype: Storage type. float16 halves the file; its rounding is at most 2^-11 of a value.

        Raises:
            RunError: The file cannot be written.
        """
        outputs: dict[str, Tensor] = {}
        seen = torch.zeros(size, dtype=torch.bool)
        for index, values in batches:
            index = index.cpu()
            seen[index] = True
            for name, value in values.items():
                if name not in outputs:
                    outputs[name] = torch.empty((size, *value.shape[1:]), dtype=dtype)
                outputs[name][index] = value.detach().to("cpu", dtype)
        if not bool(seen.all()):
            raise RunError(
                f"teacher_cache: {int((~seen).sum())} of {size} samples were not seen; check the data module"
            )
        with atomic_path(path) as temporary:
            save_file(outputs, temporary, metadata={"fingerprint": json.dumps(fingerprint)})
        return cls(outputs)


def weights_fingerprint(network: nn.Module) -> str:
    """Hashes names and values of all parameters and buffers, to 16 hex digits."""
    digest = hashlib.sha256(type(network).__qualname__.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
