"""Distilled images of a run as training data."""

from typing import Any

from lit_distill.dataset.data.base import ReplacedImages
from lit_distill.dataset.synthetic import SyntheticSet
from lit_distill.image.data import ImageDataModule


class DistilledImages(ReplacedImages):
    """Trains on the images that a run has left in its folder, and tests on real ones.

    Args:
        folder: The folder `distilled/` of the run.
        source: The data that the images were distilled from; validation and test are its own.
        quantize: Round the images to 8 bits first, as if they had been stored as image files.
        kwargs: See `ReplacedImages`.
    """

    def __init__(self, folder: str, source: ImageDataModule, quantize: bool = False, **kwargs: Any) -> None:
        super().__init__(source, **kwargs)
        self.folder = folder
        self.quantize = quantize

    def replace(self) -> SyntheticSet:
        """Reads the set."""
        distilled = SyntheticSet.load(self.folder)
        return distilled.quantized() if self.quantize else distilled
