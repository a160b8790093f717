"""Image data sets as Lightning data modules: small ones in memory, large ones streamed from folders."""

from lit_distill.image.data.base import ImageBatch, ImageDataModule
from lit_distill.image.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from lit_distill.image.data.folder import ImageFolderDataModule
from lit_distill.image.data.in_memory import ImageSource, InMemoryImageDataModule, LabelledImages
from lit_distill.image.data.packaged import DigitsDataModule, MNIST5kDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "ImageBatch",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageSource",
    "InMemoryImageDataModule",
    "LabelledImages",
    "MNIST5kDataModule",
]
