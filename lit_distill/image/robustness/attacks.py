"""Attacks in pixel space: images (B, C, H, W) with values in [0, 1], models that return logits.

Probabilities in place of logits would blunt both attacks: softmax hides what differs between large logits.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lit_distill.core.errors import UsageError

Model = Callable[[Tensor], Tensor]


class PixelModel(nn.Module):
    """A classifier with the normalization of its data inside, so that pixels in [0, 1] go in.

    Args:
        network: Normalized images to logits.
        mean: Mean per channel, of pixels in [0, 1]. A single one holds for all channels.
        std: Standard deviation per channel, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Computes logits, in float32."""
        return self.network(((pixels - self.mean) / self.std).to(self.dtype)).float()

    def pixels(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Takes the normalization back: the pixels of normalized images."""
        return (images.float() * self.std + self.mean).clamp(0, 1)


def input_gradient(
    model: Model, pixels: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """Computes the gradient of each image's cross-entropy with respect to its pixels.

    Args:
        model: Pixels to logits.
        pixels: Values in [0, 1].
        labels: The labels.

    Returns:
        One gradient an image: the losses are summed, so the size of the batch does not scale it.
    """
    with torch.enable_grad():
        variable = pixels.detach().clone().requires_grad_()
        loss = F.cross_entropy(model(variable).float(), labels, reduction="sum")
        return torch.autograd.grad(loss, variable)[0]


def signed_step(
    pixels: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"], *, epsilon: float
) -> Float[Tensor, "b c h w"]:
    """Moves every pixel by epsilon up the gradient's sign, or not at all where it is zero, and clips to [0, 1]."""
    return (pixels + epsilon * gradient.sign()).clamp(0, 1)


def fgsm(
    model: Model, pixels: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"], *, epsilon: float
) -> Float[Tensor, "b c h w"]:
    r"""Attacks with the fast gradient sign method, untargeted.

    .. math:: x' = \mathrm{clip}_{[0, 1]}(x + \epsilon \, \mathrm{sign} \, \nabla_x \mathrm{CE}(z(x), y))

    For a linear model of two classes this is the strongest attack of its size: the margin falls by
    `epsilon * ||w_y - w_j||_1` where no pixel is clipped. An image whose gradient is exactly zero stays as it is.

    Args:
        model: Pixels to logits.
        pixels: Values in [0, 1].
        labels: The labels.
        epsilon: Largest change of a pixel, in units of [0, 1].

    Returns:
        The attacked images.

    Reference: Goodfellow, Shlens, Szegedy, Explaining and Harnessing Adversarial Examples, 2014, arXiv 1412.6572.
    """
    return signed_step(pixels, input_gradient(model, pixels, labels), epsilon=epsilon)


def rescaled(model: Model, *, spread: float = 5.0) -> Model:
    """Wraps a model so that its largest logit lies `spread` above the mean of the image's logits.

    Undoes the scale that training at a temperature leaves behind, under which the cross-entropy of float32 logits
    has no gradient. What stays hard to attack with rescaled logits owes it to something else. The divisor is a constant
    to the gradient. One for each image, so that an attack depends on no other image of the batch; decisions stay.
    """

    def divided(pixels: Tensor) -> Tensor:
        logits = model(pixels)
        centred = logits.detach() - logits.detach().mean(1, keepdim=True)
        return logits * (spread / centred.amax(1, keepdim=True).clamp(min=1e-12))

    return divided


def require_foolbox() -> None:
    """Checks that foolbox is installed, without importing it.

    Raises:
        UsageError: It is not.
    """
    if find_spec("foolbox") is None:
        raise UsageError("the Carlini-Wagner attack needs foolbox; pip install 'lit-distill[robustness]'")


def carlini_wagner_l2(
    model: nn.Module,
    pixels: Float[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    *,
    steps: int = 10_000,
    search_steps: int = 9,
    step_size: float = 0.01,
    initial_const: float = 1e-3,
    confidence: float = 0.0,
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, " b"]]:
    r"""Searches the smallest change in L2 that changes the decision: Carlini and Wagner's attack, through foolbox.

    .. math:: \min_w \lVert x'(w) - x \rVert_2^2 + c \max(z_y - \max_{j \ne y} z_j, -\kappa), \quad
        x'(w) = (\tanh w + 1) / 2

    Adam on w, and for each image a binary search over c. Works on logits, so their scale does not hide the way.

    Args:
        model: Pixels to logits, in eval mode; its parameters should be frozen, foolbox would give them gradients.
        pixels: Values in [0, 1].
        labels: The labels. Images that are misclassified from the start count as attacked, unchanged.
        steps: Steps of Adam for one c; fewer if the loss stops falling.
        search_steps: Values of c that are tried.
        step_size: Learning rate of Adam.
        initial_const: First c.
        confidence: The kappa above: margin in logits by which the wrong class must win.

    Returns:
        The attacked images, unchanged where the attack failed, and (B,) whether it succeeded.

    Raises:
        UsageError: foolbox is not installed.

    Reference: Carlini, Wagner, Towards Evaluating the Robustness of Neural Networks, 2016, arXiv 1608.04644; the
    defaults are theirs.
    """
    require_foolbox()
    import foolbox

    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=search_steps,
        steps=steps,
        stepsize=step_size,
        initial_const=initial_const,
        confidence=confidence,
    )
    with torch.enable_grad():
        target = foolbox.PyTorchModel(model, bounds=(0, 1), device=pixels.device)
        _, attacked, success = attack(target, pixels.detach().clone(), labels, epsilons=None)
    # foolbox leaves black images where it fails.
    return torch.where(success[:, None, None, None], attacked.detach(), pixels), success
