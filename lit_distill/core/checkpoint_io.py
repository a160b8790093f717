"""Checkpoints that are whole or absent."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_distill.core.errors import RunError
from lit_distill.core.files import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's file checkpoints, written beside the target and moved into place.

    Lightning's own write is a move from the system's temporary folder, which between file systems is a copy that a kill
    cuts in half.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes the checkpoint atomically.

        Raises:
            RunError: The folder cannot be written or the disk is full; the previous checkpoint is untouched.
        """
        with atomic_path(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # torch's zip writer reports a full disk so
                raise OSError(str(error).partition("\n")[0]) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint without unpickling code.

        Raises:
            RunError: The file is missing, truncated or not a checkpoint.
        """
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise RunError(
                f"ckpt_path: {path} cannot be read ({str(error).partition(chr(10))[0][:120] or type(error).__name__}); "
                "it is missing, truncated or not a checkpoint: delete it to start again, or name another"
            ) from error
