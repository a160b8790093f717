"""Images with captions, listed in a file."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from lit_distill.core.errors import UsageError
from lit_distill.image.data import ImageFolderDataModule
from lit_distill.image.data.folder import LabelledFiles


class CaptionedImages(ImageFolderDataModule):
    """Images with captions: a file of lines such as `{"image": "cats/1.jpg", "caption": "a cat"}` (JSON Lines).

    It is a source for `GeneratorLatents` with caption "{}": each caption that differs is a class, those of the test
    first. Images are resized (the shorter side to `image_size`) and cropped to the centre; with `augment` they are
    mirrored at random.

    Args:
        captions: The file of training images; images are sought from its folder.
        test_captions: The file of those to compare with in validation and test; the training images if None.
        image_size: Height and width of the images, in pixels.
        mean: Mean per channel of pixels / 255.
        std: Standard deviation per channel, likewise.
        kwargs: See `ImageFolderDataModule`.
    """

    def __init__(
        self,
        captions: str,
        test_captions: str | None = None,
        image_size: int = 512,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(Path(captions).expanduser().parent, image_size=image_size, mean=mean, std=std, **kwargs)
        self.files = {"train": captions} | ({} if test_captions is None else {"test": test_captions})

    @cached_property
    def _lines(self) -> dict[str, list[tuple[str, str]]]:
        return {part: _read("test_captions" if part == "test" else "captions", f) for part, f in self.files.items()}

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]  # an attribute, found when asked for
        """Captions that differ, those of the test first."""
        ordered = [*self._lines.get("test", []), *self._lines["train"]]
        return tuple(dict.fromkeys(caption for _, caption in ordered))

    def read_parts(self) -> dict[str, LabelledFiles]:
        """Reads the lists.

        Raises:
            UsageError: A file is missing or empty, or a line has no image or caption.
        """
        number = {caption: position for position, caption in enumerate(self.classes)}
        parts = {
            part: LabelledFiles([file for file, _ in lines], torch.tensor([number[caption] for _, caption in lines]))
            for part, lines in self._lines.items()
        }
        compared = parts.get("test", parts["train"])
        return {"train": self._subset(parts["train"]), "val": compared, "test": compared}

    def _transform(self, training: bool) -> v2.Transform:
        size = self.sample_shape[1]
        steps = [v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()]
        return v2.Compose([*steps, v2.RandomHorizontalFlip()] if training and self.augment else steps)


def _read(key: str, name: str) -> list[tuple[str, str]]:
    file = Path(name).expanduser()
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"data.{key}: {name} cannot be read as text; give a file with a JSON object per line"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found.append((str(file.parent / row["image"]), str(row["caption"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f'data.{key}: line {number} of {name} is not like {{"image": "1.jpg", "caption": "a cat"}}; correct it'
            ) from error
    if not found:
        raise UsageError(f"data.{key}: {name} lists no images; give a JSON object per line")
    return found
