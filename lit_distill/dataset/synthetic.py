"""The result of data set distillation: a few images with labels, in memory and on disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.utils import make_grid, save_image

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import atomic_path, write_json
from lit_distill.image.augment import Normalize

KIND, VERSION = "images", 1
TENSORS, DESCRIPTION, PICTURE = "images.safetensors", "distilled.json", "images.png"


@dataclass(frozen=True)
class SyntheticSet:
    """Images that stand in for a training set.

    Attributes:
        images: (n, c, h, w): float32 as a network sees them, that is normalized, or uint8.
        labels: Class of each image, (n,).
        classes: Names of the classes.
        mean: Mean per channel of pixels / 255, of the normalization.
        std: Standard deviation per channel, likewise.
        soft_labels: Learned logits of each image, (n, k); None where labels are hard.
        lr: Learning rate that was learned with the images, for training on them; None if it was not.
        description: What made the set, from what, and how.
    """

    images: Tensor
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    soft_labels: Float[Tensor, "n k"] | None = None
    lr: float | None = None
    description: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.dtype not in (torch.float32, torch.uint8):
            raise UsageError(f"images are {self.images.dtype}; give float32 (normalized) or uint8")

    def __len__(self) -> int:
        return len(self.labels)

    def network_images(self) -> Float[Tensor, "n c h w"]:
        """Returns the images as a network sees them, in channels_last layout."""
        if self.images.dtype == torch.uint8:
            return Normalize(self.mean, self.std)(self.images)
        return self.images.contiguous(memory_format=torch.channels_last)

    def pixels(self) -> UInt8[Tensor, "n c h w"]:
        """Returns the images as pixels, rounded, and cut off where they are no colors."""
        if self.images.dtype == torch.uint8:
            return self.images
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((self.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def quantized(self) -> "SyntheticSet":
        """Returns the set with uint8 images: a quarter of the bytes, at the price of rounding."""
        return SyntheticSet(**{**vars(self), "images": self.pixels()})

    def footprint(self) -> dict[str, int]:
        """Counts bytes.

        Returns:
            "bytes": of images and labels. "label_bytes": of the labels alone; a hard label counts as one byte up to 256
            classes, two above.
        """
        if self.soft_labels is None:
            label_bytes = len(self) * (1 if len(self.classes) <= 256 else 2)
        else:
            label_bytes = self.soft_labels.nbytes
        return {"bytes": self.images.nbytes + label_bytes, "label_bytes": label_bytes}

    # ---- on disk ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes the set to a folder: tensors as safetensors, everything else as JSON, and a picture to look at."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        with atomic_path(Path(folder) / TENSORS) as path:
            save_file(tensors, path)
        rest = {name: value for name, value in vars(self).items() if name not in ("images", "labels", "soft_labels")}
        write_json(Path(folder) / DESCRIPTION, {"kind": KIND, "version": VERSION, **rest})
        self.draw(Path(folder) / PICTURE)

    @classmethod
    def load(cls, folder: str | Path) -> "SyntheticSet":
        """Reads a set that `save` wrote.

        Raises:
            UsageError: There is none, or it is of another kind or version.
            RunError: A file is corrupt.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
            raise UsageError(f"data.folder: {folder} holds no distilled images; give the folder distilled/ of a run")
        try:
            rest = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            kind, version = rest.pop("kind"), rest.pop("version")
            if kind != KIND:
                raise UsageError(f"data.folder: {folder} holds distilled {kind}, not images; give another run's")
            if version != VERSION:
                raise UsageError(
                    f"data.folder: {folder} is of version {version}, this program reads {VERSION}; distil again"
                )
            for name in ("classes", "mean", "std"):
                rest[name] = tuple(rest[name])
            tensors: dict[str, Any] = dict(load_file(folder / TENSORS))
            return cls(**tensors, **rest)
        except (json.JSONDecodeError, KeyError, TypeError, SafetensorError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise RunError(f"data.folder: {folder} is corrupt ({reason}); distil again") from error

    def export(self, folder: str | Path) -> None:
        """Writes the images as PNG files, one folder a class, as `torchvision.datasets.ImageFolder` reads them.

        Soft labels and the learned learning rate do not fit into such a folder and are left out.
        """
        digits = len(str(len(self.classes) - 1))
        for number, (pixels, label) in enumerate(zip(self.pixels(), self.labels.tolist(), strict=True)):
            name = f"{label:0{digits}}_{self.classes[label]}".replace("/", "_")
            with atomic_path(Path(folder) / name / f"{number:05}.png") as path:
                save_image(pixels.float() / 255, path, format="png")

    def draw(self, path: str | Path, per_class: int = 10, most_classes: int = 20) -> None:
        """Draws a grid, a row for each class, as a PNG file. Small images are enlarged to 32 pixels or more."""
        shown = [(self.labels == number).nonzero()[:per_class, 0] for number in range(len(self.classes))]
        shown = [rows for rows in shown[:most_classes] if len(rows)]
        columns = max(map(len, shown))
        size = -(-32 // self.images.shape[-1])
        pixels = self.pixels().float().repeat_interleave(size, 2).repeat_interleave(size, 3) / 255
        blank = pixels.new_ones((1, *pixels.shape[1:]))
        cells = [torch.cat([pixels[rows], blank.expand(columns - len(rows), -1, -1, -1)]) for rows in shown]
        with atomic_path(path) as temporary:
            save_image(make_grid(torch.cat(cells), nrow=columns, padding=2, pad_value=1.0), temporary, format="png")


def class_labels(num_classes: int, per_class: int) -> Int[Tensor, " n"]:
    """Returns the labels of a set with as many images of each class, class after class."""
    return torch.arange(num_classes).repeat_interleave(per_class)


def check_classes(distilled: Sequence[str], source: Sequence[str], key: str = "data.folder") -> None:
    """Checks that a distilled set is of the classes that its test data have.

    Raises:
        UsageError: It is not; the message names the first difference.
    """
    if tuple(distilled) == tuple(source):
        return
    if len(distilled) != len(source):
        raise UsageError(f"{key}: the set has {len(distilled)} classes, data.source {len(source)}; give its own data")
    own, other = next((a, b) for a, b in zip(distilled, source, strict=True) if a != b)
    raise UsageError(f"{key}: the set has class '{own}' where data.source has '{other}'; give its own data")
