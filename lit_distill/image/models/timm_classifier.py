"""Networks of timm: transformers, perceptrons on patches, and convolutional ones."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError

# Where the four stages of a transformer of 12 equal blocks end, as in pyramids with 2, 2, 6 and 2 blocks.
ENDS_OF_TWELVE = (2, 4, 10, 12)


class TimmClassifier(nn.Module):
    """A network of timm with random weights, with names for its stages.

    `stages` are timm's own, the last four of them; in networks of equal blocks (ViT, DeiT, MLP-Mixer, ResMLP), the four
    blocks that end a stage in the proportions 2:2:6:2, which is blocks 1, 3, 9 and 11 of 12 and all of four. Networks
    that keep maps as (H, W, C), such as Swin, have no stages named and serve as teachers. `penultimate` is what the
    last linear layer reads.

    Args:
        name: A model of timm such as "deit_tiny_patch16_224", or a class of timm that is given its sizes by keyword:
            "VisionTransformer", "MlpMixer".
        num_classes: Number of classes.
        resize: Height and width that images are brought to first, in pixels, bilinear. None leaves them as they are.
        kwargs: For timm. With "VisionTransformer", for example, `img_size`, `patch_size`, `in_chans`, `embed_dim`,
            `depth` and `num_heads`.

    Raises:
        UsageError: There is no such model, or it does not take these arguments.
    """

    def __init__(self, name: str, num_classes: int, resize: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        from timm import models  # here: the import takes seconds

        build: Any = getattr(models, name, None)
        if not (models.is_model(name) or (isinstance(build, type) and issubclass(build, nn.Module))):
            near = ", ".join(difflib.get_close_matches(name, models.list_models(), n=4, cutoff=0.3)) or "none"
            raise UsageError(f"name: timm has no model '{name}'; nearest: {near}")
        try:
            self.network = build(num_classes=num_classes, **kwargs)
        except (TypeError, AssertionError, ValueError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UsageError(f"name: timm's {name} does not take these arguments: {reason}") from error
        self.resize = resize
        classifier = self.network.get_classifier()
        names = [path for path, module in self.network.named_modules() if module is classifier]
        self.penultimate = f"network.{names[0]}@input"
        if getattr(self.network, "output_fmt", "NCHW") != "NHWC":
            self.stages = tuple(f"network.{path}" for path in _stages([i["module"] for i in self.network.feature_info]))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        if self.resize is not None and self.resize != images.shape[-1]:
            images = F.interpolate(images, (self.resize, self.resize), mode="bilinear", antialias=True)
        return self.network(images)


def _stages(modules: Sequence[str]) -> list[str]:
    """Picks four stages of those that timm lists, shallow to deep."""
    if not all(module.startswith("blocks.") for module in modules):
        return list(modules)[-4:]
    depth = len(modules)
    ends = {min(depth, max(place, round(depth * end / 12))) for place, end in enumerate(ENDS_OF_TWELVE, start=1)}
    return [modules[end - 1] for end in sorted(ends)]
