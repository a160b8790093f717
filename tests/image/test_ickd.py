import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.ickd import ICKD


def test_method(check_method):
    module = check_method(ICKD, extra=("losses",))
    connector = module.losses["ickd"].connector
    assert connector[0].weight.shape == (6, 4, 1, 1)
    assert connector[0].bias is None


def test_the_term_is_the_weighted_difference_of_channel_correlations(step, tiny, blobs):
    teacher = tiny(6, seed=5).eval()
    module = ICKD(tiny(), teacher, ickd_weight=3.0)
    build, seen = module.build, {}

    def keep():
        build()
        seen["weight"] = module.losses["ickd"].connector[0].weight.detach().clone()

    module.build = keep
    _, terms = step(module)
    with torch.no_grad():
        s = torch.einsum("oc,bchw->bohw", seen["weight"][:, :, 0, 0], tiny().stage2(tiny().stage1(blobs.images[:8])))
        s = (s - s.mean((0, 2, 3), keepdim=True)) / (s.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        t = teacher.stage2(teacher.stage1(blobs.images[:8]))
        expected = 0.0
        for a, b in zip(s.flatten(2), t.flatten(2), strict=True):
            a, b = a @ a.T, b @ b.T
            a, b = a / a.norm(dim=1, keepdim=True).clamp(min=1e-12), b / b.norm(dim=1, keepdim=True).clamp(min=1e-12)
            expected += float((a - b).square().sum()) / 6 / 8
    assert terms["ickd"] == pytest.approx(3 * expected, rel=1e-3)


def test_defaults_are_the_published_ones(tiny):
    module = ICKD(tiny(), tiny())
    assert (module.weights["ickd"], module.label_weight) == (2.5, 1.0)


def test_a_tap_without_a_grid_is_refused(trainer, blobs, tiny):
    with pytest.raises(
        UsageError, match=r"ickd: student tap 'pool' has shape \(4,\); tap modules that return \(C, H, W\)"
    ):
        trainer().fit(ICKD(tiny(), tiny(), "pool"), datamodule=blobs)
