"""A committee of networks of one kind: one after another, as we run it, against all at once (`torch.vmap`).

    python benchmarks/dataset_committee.py [rounds]

Four ConvNet-3 with batch normalization in evaluation mode, ten to a hundred images. "labels" is the forward pass of
relabelling; "recovery" has the gradient to the images, too. Networks of several kinds cannot be run at once anyway.
"""

from timing import compare  # isort: skip  (before torch)

import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state

from lit_distill.dataset.models import DistillationConvNet

MEMBERS, ROUNDS, WARMUP = 4, 5, 1
SIZES = ((16, 28, 16), (16, 28, 100), (32, 32, 100), (128, 32, 10))  # channels, pixels, images


def committee(width: int, size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Both ways to the logits of all members."""
    torch.manual_seed(0)
    options = {"num_classes": 10, "width": width, "depth": 3, "norm": "batch", "image_size": size, "in_channels": 3}
    members = [DistillationConvNet(**options).eval().requires_grad_(False) for _ in range(MEMBERS)]
    shape = copy.deepcopy(members[0]).to("meta")
    state = stack_module_state(members)
    at_once = torch.vmap(
        lambda weights, buffers, images: functional_call(shape, (weights, buffers), (images,)), (0, 0, None)
    )
    return {
        "one by one": lambda images: torch.stack([member(images) for member in members]),
        "at once": lambda images: at_once(*state, images),
    }


def labels(logits: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Four forward passes."""
    with torch.no_grad():
        for _ in range(4):
            logits(images)


def recovery(logits: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Four forward and backward passes."""
    for _ in range(4):
        torch.autograd.grad(logits(images.requires_grad_()).square().sum(), images)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    for width, size, batch in SIZES:
        ways = committee(width, size)
        images = torch.randn(batch, 3, size, size)
        torch.testing.assert_close(ways["at once"](images), ways["one by one"](images), rtol=1e-4, atol=1e-4)
        for work in (labels, recovery):
            print(f"\n{work.__name__}: {width} channels, {batch} images of {size} pixels")
            compare({name: partial(work, way, images) for name, way in ways.items()}, "one by one", rounds, WARMUP, "4")


if __name__ == "__main__":
    main()
