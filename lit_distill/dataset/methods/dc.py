"""DC: synthetic images give a network the gradients that real ones give it, while it learns; with augmentation, DSA."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.networks import redraw
from lit_distill.core.reference import Reference
from lit_distill.dataset.synthesizer import DatasetSynthesizer
from lit_distill.losses.gradients import gradient_distance

TRAIN_BATCH = 256
STATISTICS_BATCH = 16  # real images of each class that batch normalization takes its statistics of


class GradientMatching(DatasetSynthesizer):
    r"""Synthetic images of a class have the gradient that real ones have, all along the training of a network.

    .. math:: L = \sum_c D\big(\nabla_\theta \mathrm{CE}(f_\theta(A_\omega(\mathcal{S}_c)), c), \nabla_\theta
        \mathrm{CE}(f_\theta(A_\omega(\mathcal{T}_c)), c)\big), \qquad \theta_0 \sim P_0, \quad
        \theta_{t+1} = \operatorname{train}(\theta_t, \mathcal{S})

    D adds up 1 - cosine over output units, see `gradient_distance`. An iteration is one step of the images; between two
    of them the network is trained on the images, and every `outer_steps` of them it is drawn anew. Without augmentation
    A this is DC. With `operations` it is DSA: the random numbers are common to the real and the synthetic images of a
    class, and in the network's training each image has its own.

    A network with batch normalization compares gradients at fixed statistics, those of some real images of all classes,
    taken anew for each iteration: a few images of one class have none worth the name. The public code takes a running
    mean instead, which is a tenth of theirs at first.

    The gradient with respect to the images is taken class after class, and the loss handed on stands for it; so the
    graph of second order is that of one class alone, whatever their number.

    Args:
        student: The network whose shape is matched, and which is trained on the result.
        outer_steps: Iterations with a network before the next one: in the paper 1, 10, 50 for 1, 10, 50 images of each
            class.
        inner_epochs: Passes over the images, in batches of 256, in which the network is trained between two iterations:
            1, 50, 10. The paper speaks of steps; the public code makes passes, which is the same up to 256 images.
        network_lr: Learning rate of the network, whose SGD has no momentum.
        real_batch: Real images of each class in an iteration.
        kwargs: See `DatasetSynthesizer`.

    Attributes:
        network: The network that is matched; part of the checkpoint.
    """

    reference = Reference(
        title="Dataset Condensation with Gradient Matching",
        authors="Zhao, Mopuri, Bilen",
        year=2020,
        arxiv="2006.05929",
    )

    def __init__(
        self,
        student: nn.Module,
        outer_steps: int = 10,
        inner_epochs: int = 50,
        network_lr: float = 0.01,
        real_batch: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        check_least("model", 1, outer_steps=outer_steps, real_batch=real_batch)
        check_least("model", 0, inner_epochs=inner_epochs)
        if network_lr <= 0:
            raise UsageError(f"model.network_lr is {network_lr}; it must be above 0 (usual: 0.01)")
        self.outer_steps = outer_steps
        self.inner_epochs = inner_epochs
        self.network_lr = network_lr
        self.real_batch = real_batch

    def build(self) -> None:
        """Makes the network that is matched: not the student, which validation trains in between."""
        super().build()
        self.network = copy.deepcopy(self.student).requires_grad_(False)
        self._normalizations = [
            module for module in self.network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        for module in self._normalizations:
            module.momentum = None  # after a reset, statistics are then those of one batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Draws the network anew or trains it on, and compares gradients."""
        if self.iteration % self.outer_steps:
            self.train_network()
        else:
            redraw(self.network)
        self.fix_statistics()
        found = [self.match_class(number) for number in range(self.num_classes)]
        distances, gradients = zip(*found, strict=True)
        # In value the sum of the distances, in derivative the gradients.
        slope = (self.images * torch.cat(gradients)).sum()
        return self.combine({"match": torch.stack(distances).sum() + (slope - slope.detach())})

    def match_class(self, number: int) -> tuple[Float[Tensor, ""], Float[Tensor, "m c h w"]]:
        """Compares the gradients of a class.

        Returns:
            The distance, and its gradient with respect to the synthetic images of the class.
        """
        draws = self.augmentation.draw(1)
        real = self.augmentation(self.real_images(number, self.real_batch), draws)
        target = self.gradient(real, torch.full((len(real),), number, device=real.device))
        images = self.of_class(number).detach().requires_grad_()
        labels = self.labels[number * self.per_class : (number + 1) * self.per_class]
        matched = self.gradient(self.augmentation(images, draws), labels, create_graph=True)
        distance = gradient_distance(matched, target, metric="rows")
        return distance.detach(), torch.autograd.grad(distance, images)[0]

    def gradient(
        self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"], *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Computes the gradient of the cross-entropy with respect to all weights of the network.

        Args:
            images: Real or synthetic images.
            labels: Their classes.
            create_graph: Whether the gradient can be differentiated in turn.
        """
        weights = {name: value.detach().requires_grad_() for name, value in self.network.named_parameters()}
        loss = F.cross_entropy(functional_call(self.network, weights, (images,)), labels)
        return torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, materialize_grads=True)

    def train_network(self) -> None:
        """Trains the network on the images as they are now."""
        self.network.train()
        pixels = self.images.detach()
        for _ in range(self.inner_epochs):
            for index in torch.randperm(len(pixels)).to(pixels.device).split(TRAIN_BATCH):
                images = self.augmentation(pixels[index], self.augmentation.draw(len(index)))
                gradients = self.gradient(images, self.labels[index])
                for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
                    parameter.sub_(gradient, alpha=self.network_lr)

    @torch.no_grad()
    def fix_statistics(self) -> None:
        """Lets batch normalization take the statistics of real images of all classes, and keep them."""
        self.network.train()
        if not self._normalizations:
            return
        for module in self._normalizations:
            module.reset_running_stats()
        drawn = [self.real_images(number, STATISTICS_BATCH) for number in range(self.num_classes)]
        self.network(torch.cat(drawn))
        for module in self._normalizations:
            module.eval()
