"""Training by SGD as a function of the training images: its result can be differentiated."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lit_distill.core.errors import UsageError


def unrolled_sgd(
    loss: Callable[..., Float[Tensor, ""]],
    start: Float[Tensor, " p"],
    batches: Iterable[tuple[Any, ...]],
    lr: Float[Tensor, ""],
    *,
    constant_memory: bool = False,
) -> Float[Tensor, " p"]:
    r"""Takes a step of plain SGD on each batch, and returns where that leads.

    .. math:: \theta_{k+1} = \theta_k - \alpha \nabla_\theta \ell(\theta_k; B_k)

    The result carries the graph of all steps, second derivatives included, so its memory is linear in their number.

    With `constant_memory` the graph of a step is dropped, and made again on the way back, one at a time. The gradient
    is the same, and the price is one more forward and inner backward pass for each step. What stays of a step is its
    vector of parameters. TESLA (Cui et al., 2022, arXiv 2211.10586) keeps these in its public code, too, but takes them
    as constants when it differentiates by the images, and so leaves out what earlier batches do to later steps.

    Args:
        loss: Takes the parameters and a batch's values.
        start: Parameters to begin with.
        batches: Arguments of the loss, a tuple for each step. For `constant_memory` the tensors to differentiate by
            stand here, whole, and what is derived from them is derived inside the loss.
        lr: alpha.
        constant_memory: See above. Gradients are then available by `backward` only, not by `torch.autograd.grad`.
    """

    def step(parameters: Tensor, lr: Tensor, *batch: Any) -> Tensor:
        return parameters - lr * torch.func.grad(loss)(parameters, *batch)

    parameters = start
    for batch in batches:
        if constant_memory:
            # Only the older form of checkpointing goes with torch.func, which takes no hooks on saved tensors.
            parameters = checkpoint(step, parameters, lr, *batch, use_reentrant=True)
        else:
            parameters = step(parameters, lr, *batch)
    return parameters


def check_parameters_only(network: nn.Module) -> None:
    """Checks that a network is what its parameters make it.

    Raises:
        UsageError: It has buffers, such as running statistics.
    """
    for name, _ in network.named_buffers():
        raise UsageError(
            f"model.student: {name} of {type(network).__name__} is no parameter, and trajectories are of parameters; "
            "take a network without batch statistics (norm: instance)"
        )


def flat_parameters(network: nn.Module) -> Float[Tensor, " p"]:
    """Copies all parameters of a network into one vector on the CPU."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).float().cpu()


def call_flat(network: nn.Module, parameters: Float[Tensor, " p"], *inputs: Tensor) -> Any:
    """Calls a network with parameters from one vector, in the order of `flat_parameters`."""
    named = dict(network.named_parameters())
    parts = parameters.split([parameter.numel() for parameter in named.values()])
    shaped = {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}
    return functional_call(network, shaped, inputs)
