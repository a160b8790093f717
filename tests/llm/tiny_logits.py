"""Logits of a few tokens, and what numpy says of them."""

import numpy as np
import torch

from lit_distill.llm.signals import TopK

N, V = 6, 17


def probabilities(*logits, temperature=1.0):
    """By numpy."""
    shifted = (np.exp(x.detach().numpy() / temperature - x.detach().numpy().max(-1, keepdims=True)) for x in logits)
    return [x / x.sum(-1, keepdims=True) for x in shifted]


def centered(q, r):
    return q * (r - (q * r).sum(-1, keepdims=True))


def gradient(loss, student):
    """Of each token's value; a tensor of the same shape, since a value depends on its own token alone."""
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return grad.numpy()


def close(found, expected, tolerance=1e-12):
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def topk(logits, k):
    return TopK(logits.topk(k, -1).indices, logits.log_softmax(-1).topk(k, -1).values)
