import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.rkd import RKD


def test_method(check_method):
    check_method(RKD)


def huber(a, b):
    d = np.abs(a - b)
    return np.where(d < 1, d**2 / 2, d - 0.5).mean()


def relations(network, images):
    with torch.no_grad():
        f = network.pool(network.stage2(network.stage1(images))).double().numpy()
    distances = squareform(pdist(f))
    directions = f[None] - f[:, None]
    lengths = np.linalg.norm(directions, axis=2, keepdims=True)
    directions /= np.where(lengths > 0, lengths, 1)
    return distances / (distances.sum() / (len(f) * (len(f) - 1))), np.einsum("ijd,ikd->ijk", directions, directions)


@pytest.mark.parametrize("weights", [(25.0, 0.0), (0.0, 50.0), (2.0, 3.0)])
def test_the_term_is_the_weighted_sum_of_distances_and_angles(step, tiny, blobs, weights):
    teacher = tiny(6, seed=5).eval()
    (d_s, a_s), (d_t, a_t) = relations(tiny(), blobs.images[:8]), relations(teacher, blobs.images[:8])
    expected = weights[0] * huber(d_s, d_t) + weights[1] * huber(a_s, a_t)
    distance_weight, angle_weight = weights
    module = RKD(tiny(), teacher, distance_weight=distance_weight, angle_weight=angle_weight, rkd_weight=0.5)
    _, terms = step(module)
    assert terms["rkd"] == pytest.approx(0.5 * expected, rel=1e-3)


def test_defaults_are_the_published_ones(tiny):
    module = RKD(tiny(), tiny())
    loss = module.losses["rkd"]
    assert (loss.distance_weight, loss.angle_weight, module.weights["rkd"]) == (25.0, 50.0, 1.0)
    assert module.label_weight == 1.0


def test_maps_are_averaged_to_vectors(step, tiny):
    # The pooled layer is the mean of the last map.
    _, pooled = step(RKD(tiny(), tiny(6, seed=5)))
    _, maps = step(RKD(tiny(), tiny(6, seed=5), "stage2", "stage2"))
    assert maps["rkd"] == pytest.approx(pooled["rkd"], rel=1e-5)


def test_a_batch_of_one_has_nothing_to_relate(trainer, blobs_class, tiny):
    with pytest.raises(UsageError, match=r"data\.batch_size: rkd relates the samples of a batch"):
        trainer().fit(RKD(tiny(), tiny()), datamodule=blobs_class(batch_size=1))
