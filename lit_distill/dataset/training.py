"""How a network is trained on a small set within a method, without a run of its own."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_distill.core.networks import freeze, redraw
from lit_distill.dataset.siamese import SiameseAugment


def train_anew(
    network: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"] | Float[Tensor, "n k"],
    *,
    epochs: int,
    lr: float = 0.01,
    batch_size: int = 256,
    augmentation: SiameseAugment | None = None,
) -> None:
    """Draws a network anew and trains it in the way of the literature, then puts it to rest.

    SGD with momentum 0.9 and weight decay 5e-4, the learning rate a tenth in the second half.

    Args:
        network: The network, on the device of the images.
        images: Normalized images.
        labels: Class numbers, or probabilities.
        epochs: Passes over the images.
        lr: Learning rate.
        batch_size: Images per step.
        augmentation: Each image with numbers of its own.

    Reference: the protocol of Zhao, Mopuri, Bilen, 2020, arXiv 2006.05929.
    """
    redraw(network)
    network.requires_grad_(True).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    half = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2])
    for _ in range(epochs):
        for index in torch.randperm(len(images)).to(images.device).split(batch_size):
            batch = images[index]
            if augmentation is not None and augmentation.random:
                batch = augmentation(batch, augmentation.draw(len(batch)))
            optimizer.zero_grad()
            F.cross_entropy(network(batch), labels[index]).backward()
            optimizer.step()
        half.step()
    optimizer.zero_grad()
    freeze(network)
