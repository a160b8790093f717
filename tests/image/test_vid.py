import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.vid import VID


def test_method(check_method):
    # Among what moves after one step are the variances: the optimizer has them.
    module = check_method(VID, extra=("losses",))
    assert {"losses.vid.scales.0", "losses.vid.scales.1"} <= {name for name, _ in module.named_parameters()}


def test_variances_start_at_five_and_move(trainer, blobs, tiny):
    module = VID(tiny(), tiny(6, seed=5), vid_weight=10.0)
    build, seen = module.build, []
    module.build = lambda: build() or seen.append([module.losses["vid"].variance(i).detach().clone() for i in (0, 1)])
    trainer(max_epochs=5).fit(module, datamodule=blobs)
    for stage in (0, 1):
        assert seen[0][stage].tolist() == pytest.approx([5.0] * 6, rel=1e-5)
        # The residuals of untrained maps are far smaller than 5.
        assert (module.losses["vid"].variance(stage) < 4.9).all()


def watched(module):
    """Returns the list that will hold the regressors' weights of each stage, as they begin."""
    build, weights = module.build, []

    def keep():
        build()
        weights.extend([[p.detach().clone() for p in part.parameters()] for part in module.losses["vid"].regressors])

    module.build = keep
    return weights


def likelihood(weights, own, target):
    first, second, third = weights
    mean = F.conv2d(F.relu(F.conv2d(F.relu(F.conv2d(own, first)), second)), third)
    return F.gaussian_nll_loss(mean, target, torch.full_like(target, 5.0)).item()


def test_the_term_is_the_sum_over_stages_of_gaussian_likelihoods(step, tiny, blobs):
    student, teacher, images = tiny(), tiny(6, seed=5).eval(), blobs.images[:8]
    module = VID(tiny(), teacher, vid_weight=3.0)
    weights = watched(module)
    _, terms = step(module)
    with torch.no_grad():
        s1, t1 = student.stage1(images), teacher.stage1(images)
        expected = likelihood(weights[0], s1, t1) + likelihood(weights[1], student.stage2(s1), teacher.stage2(t1))
    assert terms["vid"] == pytest.approx(3 * expected, rel=1e-4)


@pytest.mark.parametrize(("own", "others"), [("stage1", "stage2"), ("stage2", "stage1")])
def test_networks_of_other_grids_meet_on_the_smaller(step, tiny, blobs, own, others):
    student, teacher = tiny(), tiny(6, seed=5).eval()
    module = VID(tiny(), teacher, [own], [others], vid_weight=3.0, label_weight=0.0)
    weights = watched(module)
    moved, terms = step(module)
    with torch.no_grad():
        s1, t1 = student.stage1(blobs.images[:8]), teacher.stage1(blobs.images[:8])
        pair = (
            (F.avg_pool2d(s1, 2), teacher.stage2(t1)) if own == "stage1" else (student.stage2(s1), F.avg_pool2d(t1, 2))
        )
    assert terms["vid"] == pytest.approx(3 * likelihood(weights[0], *pair), rel=1e-4)
    assert "student.stage1.0.weight" in moved


def test_taps_without_a_partner_or_a_grid_are_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match="vid: 1 student taps and 2 teacher taps"):
        trainer().fit(VID(tiny(), tiny(), ["stage1"]), datamodule=blobs)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(128, 5), nn.Linear(5, 3))
    with pytest.raises(UsageError, match=r"vid: student tap '1' has shape \(5,\); tap modules that return \(C, H, W\)"):
        trainer().fit(VID(plain, tiny(), ["1"], ["stage1"]), datamodule=blobs)
