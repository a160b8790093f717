import numpy as np
import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.pkt import PKT


def test_method(check_method):
    check_method(PKT)


def test_the_term_is_the_weighted_mean_over_pairs(step, tiny, blobs):
    def probabilities(network):
        with torch.no_grad():
            f = network.pool(network.stage2(network.stage1(blobs.images[:8]))).double().numpy()
        unit = f / np.linalg.norm(f, axis=1, keepdims=True)
        similarity = (1 + unit @ unit.T) / 2
        return similarity / similarity.sum(1, keepdims=True)

    teacher = tiny(6, seed=5).eval()
    p, q = probabilities(tiny()), probabilities(teacher)
    expected = (q * np.log((q + 1e-7) / (p + 1e-7))).mean()
    _, terms = step(PKT(tiny(), teacher))
    assert terms["pkt"] == pytest.approx(30000 * expected, rel=1e-2)


def test_networks_without_a_penultimate_layer_ask_for_a_tap(trainer, blobs, tiny):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(128, 3))
    with pytest.raises(UsageError, match="Sequential names no penultimate layer; give student_taps"):
        trainer().fit(PKT(plain, tiny()), datamodule=blobs)
