"""A teacher that begins near the student and becomes itself: back along the way on which it was recorded to fall."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.networks import load_weights, read_weights
from lit_distill.diffusion.denoiser import Denoiser


class BacktrackingTarget(Denoiser):
    """A teacher for any `ScoreDistiller`: at first the last node that `DegradationRecorder` wrote, at the end itself.

    The nodes are taken in reverse, each for `interval` batches. What begins as the teacher, such as a full copy as the
    fake score, begins as the last node. A copy of it is a plain denoiser at the present node.

    Args:
        teacher: The teacher itself.
        nodes: Folder with nodes, `nodes/` of the recorder's run; without one it is the teacher throughout.
        interval: Batches at each node.

    Raises:
        UsageError: The folder has no nodes, or they are of another network.
    """

    def __init__(self, teacher: Denoiser, nodes: str | None = None, interval: int = 1000) -> None:
        super().__init__(
            teacher.network,
            teacher.path,
            teacher.prediction,
            teacher.num_classes,
            teacher.data_std,
            teacher.time_input,
            teacher.no_condition,
        )
        check_least("teacher", 1, interval=interval)
        self.interval = interval
        self.files = [] if nodes is None else sorted(Path(nodes).glob("*.safetensors"), reverse=True)
        if nodes is not None and not self.files:
            raise UsageError(f"teacher.nodes: {nodes} has no nodes (*.safetensors); run DegradationRecorder first")
        self._own: dict[str, Tensor] | None = None  # while a node stands in for it
        self._node = len(self.files)
        self.move_to(0)

    def move_to(self, iteration: int) -> None:
        """Becomes the node that it is at a batch; loads only where that changes."""
        node = min(iteration // self.interval, len(self.files))
        if node == self._node:
            return
        if self._own is None:
            self._own = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        if node < len(self.files):
            load_weights(self, read_weights(self.files[node]), origin=str(self.files[node]))
        else:
            load_weights(self, self._own, origin="the teacher")
            self._own = None
        self._node = node

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        plain = Denoiser(
            copy.deepcopy(self.network, memo),
            self.path,
            self.prediction,
            self.num_classes,
            self.data_std,
            self.time_input,
            self.no_condition,
        )
        plain._null = self._null
        return plain.train(self.training)
