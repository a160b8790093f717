import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.image import FitNets, Hint, ImageBatch, Outputs, Shapes


def test_method(check_method):
    module = check_method(FitNets, extra=("losses",))
    # The middle stage of two is the second: 4 channels on a 4x4 grid to the teacher's 6.
    assert module.losses["hint"].regressor[0].weight.shape == (6, 4, 1, 1)


def test_the_term_is_the_weighted_mse_of_the_regressed_feature(step, tiny, blobs):
    teacher = tiny(6, seed=5)
    module = FitNets(tiny(), teacher, "stage1", "stage1", hint_weight=3.0)
    seen = {}
    build = module.build

    def keep():
        build()
        # As of the start: a step changes it.
        seen["regressor"] = [p.detach().clone() for p in module.losses["hint"].regressor.parameters()]

    module.build = keep
    _, terms = step(module)
    weight, bias, gain, shift = seen["regressor"]
    x = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], tiny().stage1(blobs.images[:8])) + bias.view(1, -1, 1, 1)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    regressed = (x * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).clamp(min=0)
    expected = (regressed - teacher.eval().stage1(blobs.images[:8])).square().mean()
    assert terms["hint"] == pytest.approx(3.0 * expected.item(), rel=1e-4)


def test_an_identity_regressor_between_equal_networks_gives_zero():
    hint = Hint("a", "b")
    hint.student_taps, hint.teacher_taps = ("a",), ("b",)
    feature, logits = torch.randn(4, 3, 2, 2), torch.zeros(4, 3)
    batch = ImageBatch(torch.zeros(4, 2, 8, 8), torch.zeros(4, dtype=torch.long), torch.arange(4))
    value = hint(Outputs(logits, {"a": feature}), Outputs(logits, {"b": feature.clone()}), batch, 0)
    assert value.item() == 0.0


def test_vectors_are_regressed_linearly():
    hint = Hint("a", "b")
    hint.build(Shapes({"a": (5,)}, {"b": (7,)}, 3))
    assert isinstance(hint.regressor, nn.Linear)
    assert hint.regressor.weight.shape == (7, 5)


def test_networks_without_stages_ask_for_taps(trainer, blobs, tiny):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(128, 3))
    with pytest.raises(UsageError, match="Sequential names no stages; give student_taps"):
        trainer().fit(FitNets(plain, tiny()), datamodule=blobs)


def test_a_wrong_tap_is_refused_before_training(trainer, blobs, tiny):
    with pytest.raises(UsageError, match="tap 'stage3' is not a module of TinyNet; nearest: stage"):
        trainer().fit(FitNets(tiny(), tiny(), student_tap="stage3"), datamodule=blobs)
