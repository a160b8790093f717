"""Soft labels of a committee of networks for exactly the images that a student will see, and how they are kept."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import atomic_path
from lit_distill.dataset.committee import Committee

Stored = dict[str, Tensor]


@contextmanager
def normalized_by_batch(network: nn.Module) -> Iterator[None]:
    """Within it, batch normalization takes mean and biased variance of the batch at hand, as in training.

    Running statistics are neither read nor written, and nothing else of the network is put into training mode: dropout
    stays off.
    """
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, (training, tracked) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracked


@torch.no_grad()
def committee_logits(
    committee: Committee,
    images: Float[Tensor, "b c h w"],
    *,
    temperature: float,
    batch_statistics: bool,
    parts: int = 1,
) -> Float[Tensor, "b k"]:
    r"""Computes the weighted sum of the members' logits.

    .. math:: t = \sum_m \omega_m z_m(x)

    Args:
        committee: Networks in eval mode, on the device of the images.
        images: Images.
        temperature: Of the weights omega, see `Committee.weights`.
        batch_statistics: Normalize each part of the batch by its own statistics, see `normalized_by_batch`. Otherwise
            by the running ones.
        parts: Equal parts of the batch, which the networks see one after the other.
    """
    weights = committee.weights(temperature=temperature).tolist()

    def vote(part: Tensor) -> Tensor:
        votes = zip(weights, committee.members, strict=True)
        return torch.stack([weight * member(part).float() for weight, member in votes]).sum(0)

    if not batch_statistics:
        return vote(images)
    with normalized_by_batch(committee):
        return torch.cat([vote(part) for part in images.tensor_split(parts)])


# ---- storage -----------------------------------------------------------------------------------------------------


def encode(logits: Float[Tensor, "n k"], top_k: int | None = None) -> Stored:
    """Makes logits smaller: float16; and with `top_k` only so many of the largest, and the mean of the others.

    The mean is what the others have in common at high temperature, where soft labels of this kind are used.

    Args:
        logits: Logits.
        top_k: How many; below the number of classes.

    Returns:
        "logits" (n, k); or "logits" (n, top_k + 1), the mean last, and "classes" (n, top_k).
    """
    logits = logits.cpu()
    if top_k is None:
        return {"logits": logits.half()}
    values, classes = logits.topk(top_k, dim=1)
    others = (logits.double().sum(1) - values.double().sum(1)) / (logits.shape[1] - top_k)
    kept = torch.cat([values, others[:, None].float()], dim=1)
    return {"logits": kept.half(), "classes": classes.to(_class_type(logits.shape[1]))}


def decode(stored: Stored, num_classes: int) -> Float[Tensor, "n k"]:
    """Returns the logits, as far as they were kept, in float32."""
    logits = stored["logits"].float()
    if "classes" not in stored:
        return logits
    return logits[:, -1:].repeat(1, num_classes).scatter(1, stored["classes"].long(), logits[:, :-1])


def lost_share(logits: Float[Tensor, "n k"], kept: Float[Tensor, "n k"]) -> float:
    """Returns which share of the variance of logits over classes is lost in what was kept of them."""
    logits = logits.double().cpu()
    spread = (logits - logits.mean(1, keepdim=True)).square().sum()
    return float((logits - kept).square().sum() / spread.clamp_min(torch.finfo(torch.double).tiny))


class LabelStore:
    """Soft labels of each epoch, in the order in which its images are served: a safetensors file an epoch.

    Each file is whole or absent and says what it was made from. So the making goes on where it was interrupted, and
    reading needs the memory of one epoch.

    Args:
        folder: Where the files lie.
        made_from: What the labels depend on; must survive JSON.
        num_classes: Logits of each image, k.
        top_k: See `encode`.
    """

    def __init__(
        self, folder: str | Path, made_from: Mapping[str, Any], num_classes: int, top_k: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.made_from = json.loads(json.dumps(made_from))
        self.num_classes = num_classes
        self.top_k = top_k

    def path(self, epoch: int) -> Path:
        """Returns where the labels of an epoch lie."""
        return self.folder / f"epoch{epoch:05}.safetensors"

    def holds(self, epoch: int) -> bool:
        """Says whether the labels of an epoch are there; raises what `read` does if they are of something else."""
        if not self.path(epoch).is_file():
            return False
        with self._opened(epoch):
            return True

    def nbytes(self, images: int) -> int:
        """Counts the bytes of the labels of so many images, in one epoch."""
        if self.top_k is None:
            return 2 * images * self.num_classes
        return images * (2 * (self.top_k + 1) + _class_type(self.num_classes).itemsize * self.top_k)

    def write(self, epoch: int, logits: Float[Tensor, "n k"]) -> float:
        """Keeps the labels of an epoch; returns which share of them is lost, see `lost_share`."""
        stored = encode(logits, self.top_k)
        with atomic_path(self.path(epoch)) as temporary:
            save_file(stored, temporary, metadata={"made_from": json.dumps(self.made_from)})
        return lost_share(logits, decode(stored, self.num_classes))

    def read(self, epoch: int) -> Float[Tensor, "n k"]:
        """Returns the labels of an epoch.

        Raises:
            UsageError: There are none, or they were made from something else; the message names the first difference.
            RunError: The file is corrupt.
        """
        if not self.path(epoch).is_file():
            count = len(list(self.folder.glob("epoch*.safetensors")))
            raise UsageError(
                f"data.label_folder: {self.folder} has labels of {count} epochs, and none of epoch {epoch}, counted "
                "from 0; set data.label_epochs to the epochs of the run (trainer.max_epochs)"
            )
        with self._opened(epoch) as file:
            return decode({name: file.get_tensor(name) for name in file.keys()}, self.num_classes)  # noqa: SIM118 (not a dict)

    @contextmanager
    def _opened(self, epoch: int) -> Iterator[Any]:
        path = self.path(epoch)
        try:
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {}).get("made_from", "{}"))
                for field, wanted in self.made_from.items():
                    if found.get(field) != wanted:
                        raise UsageError(
                            f"data.label_folder: {path} was made with other {field} ({_short(found.get(field))}, now "
                            f"{_short(wanted)}); go back to it, or give an empty folder"
                        )
                yield file
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"data.label_folder: {path} is corrupt ({reason}); delete it, and it is made anew"
            ) from error


def _class_type(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.int16


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
