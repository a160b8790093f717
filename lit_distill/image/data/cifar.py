"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images")."""

import io
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from lit_distill.core.errors import RunError, UsageError
from lit_distill.image.augment import CIFAR10_STATISTICS, CIFAR100_STATISTICS, Augment
from lit_distill.image.data.in_memory import ImageSource, InMemoryImageDataModule, LabelledImages


class CIFAR10DataModule(InMemoryImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    `root` holds the official files in the folder `cifar-10-batches-py`, as torchvision unpacks them, or an archive
    `cifar10.npz` (also in a subfolder `cifar10`). The archive has `classes` and, for the splits train and test,
    `<split>_webp` (uint8: lossless WebP strips of images above one another), `<split>_offsets` (where each strip begins
    and ends in it) and `<split>_labels`.

    `augment` crops from 4 pixels of zero padding and mirrors.

    Args:
        root: Folder of the files, or the archive itself.
        val_size: Training images to set apart for validation; 0 for none.
        augment: See `ImageDataModule`.
        download: Download the official files into `root` if they are not there.
        mean: Mean per channel of pixels / 255. None takes the data set's own; a pretrained network wants those that it
            was trained with.
        std: Standard deviation per channel, likewise.
        kwargs: See `ImageDataModule`.
    """

    num_classes = 10
    sample_shape = (3, 32, 32)
    statistics = CIFAR10_STATISTICS
    augmentation = Augment(4, flip=True)
    archive: ClassVar[str] = "cifar10"
    official: ClassVar[type[torchvision.datasets.CIFAR10]] = torchvision.datasets.CIFAR10

    def __init__(
        self,
        root: str | Path,
        val_size: int = 5000,
        augment: bool = True,
        download: bool = False,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(val_size, mean, std, root=root, augment=augment, **kwargs)
        self.folder = Path(root).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Downloads what is missing, in one process, if `download` says so.

        Raises:
            RunError: The download failed.
        """
        if self.download and self._archive() is None and not (self.folder / self.official.base_folder).is_dir():
            try:
                self.official(str(self.folder), download=True)
            except (URLError, OSError, RuntimeError) as error:
                raise RunError(
                    f"data.download: {self.official.url} failed ({error}); try again or fetch it by hand"
                ) from error

    def read(self) -> ImageSource:
        """Reads the archive or the official files.

        Raises:
            UsageError: There are neither, or the archive is not of the expected kind.
            RunError: A file is corrupt.
        """
        if (archive := self._archive()) is not None:
            return _read_archive(archive)
        if not (self.folder / self.official.base_folder).is_dir():
            raise UsageError(
                f"data.root: {self.folder} holds neither {self.official.base_folder}/ nor {self.archive}.npz; "
                "correct it, or set data.download to true"
            )
        try:
            # torchvision checks the files' MD5 sums before it unpickles them.
            train, test = (self.official(str(self.folder), train=train) for train in (True, False))
        except (RuntimeError, OSError) as error:
            raise RunError(
                f"data.root: {self.folder / self.official.base_folder} is incomplete or corrupt; "
                "delete it and set data.download to true"
            ) from error
        pool, rest = (LabelledImages(_images(part.data), torch.tensor(part.targets)) for part in (train, test))
        return ImageSource(tuple(train.classes), pool, rest)

    def _archive(self) -> Path | None:
        name = f"{self.archive}.npz"
        places = (self.folder, self.folder / name, self.folder / self.archive / name)
        return next((place for place in places if place.suffix == ".npz" and place.is_file()), None)


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes (the fine labels).

    Files as for `CIFAR10DataModule`: the folder `cifar-100-python`, or the archive `cifar100.npz`, which may hold only
    a part of the training images.
    """

    num_classes = 100
    statistics = CIFAR100_STATISTICS
    archive = "cifar100"
    official = torchvision.datasets.CIFAR100


def _images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)  # channels_last, without a copy


def _read_archive(path: Path) -> ImageSource:
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {key: archive[key] for key in archive.files if not key.endswith("_filenames")}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise RunError(f"data.root: {path} is truncated or not an .npz file; get it again") from error
    wanted = [f"{split}_{kind}" for split in ("train", "test") for kind in ("webp", "offsets", "labels")]
    for key in (*wanted, "classes"):
        if key not in content:
            raise UsageError(f"data.root: {path} has no '{key}'; it is not a packed CIFAR archive")
    parts = (
        _unpack(path, split, *(content[f"{split}_{kind}"] for kind in ("webp", "offsets", "labels")))
        for split in ("train", "test")
    )
    return ImageSource(tuple(map(str, content["classes"])), *parts)


def _unpack(path: Path, split: str, webp: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> LabelledImages:
    for name, array, kinds in (("webp", webp, "u"), ("offsets", offsets, "iu"), ("labels", labels, "iu")):
        if array.dtype.kind not in kinds or array.ndim != 1:
            raise UsageError(
                f"data.root: '{split}_{name}' of {path} is {array.dtype} with {array.ndim} dimensions; whole numbers "
                "in one dimension are expected"
            )
    try:
        strips = [
            np.asarray(Image.open(io.BytesIO(webp[start:stop].tobytes())).convert("RGB")).reshape(-1, 32, 32, 3)
            for start, stop in pairwise(offsets)
        ]
    except (OSError, ValueError) as error:
        raise RunError(f"data.root: '{split}_webp' of {path} cannot be decoded; get the file again") from error
    images = np.concatenate(strips) if strips else np.empty((0, 32, 32, 3), np.uint8)
    if len(images) != len(labels):
        raise UsageError(f"data.root: {path} has {len(images)} {split} images and {len(labels)} labels; get it again")
    return LabelledImages(_images(images), torch.from_numpy(labels.astype(np.int64)))
