import copy
import math

import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import freeze
from lit_distill.image import KD, Supervised
from lit_distill.image.augment import Normalize
from lit_distill.image.robustness import (
    AdversarialEvaluation,
    PixelModel,
    carlini_wagner_l2,
    fgsm,
    input_gradient,
    rescaled,
)
from lit_distill.image.robustness import callback as callback_module


class Linear(nn.Module):
    """z = W x + b on flat pixels."""

    def __init__(self, classes=2, scale=1.0, pixels=12, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(scale * torch.randn(classes, pixels, generator=generator))
        self.bias = nn.Parameter(scale * 0.1 * torch.randn(classes, generator=generator))

    def forward(self, pixels):
        return pixels.flatten(1) @ self.weight.T + self.bias


def grey(count=16, seed=1):
    """Images (3, 2, 2) in the middle of the range, where no clipping happens."""
    return 0.4 + 0.2 * torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def margin(model, pixels, labels):
    logits = model(pixels)
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    return own - others


@pytest.fixture
def convolutional():
    torch.manual_seed(3)
    return freeze(nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5)))


# ---- FGSM ------------------------------------------------------------------------------------------------------------


def test_fgsm_lowers_a_linear_models_margin_by_epsilon_times_the_l1_norm():
    model, pixels, epsilon = freeze(Linear()), grey(), 0.05
    labels = model(pixels).argmax(1)
    attacked = fgsm(model, pixels, labels, epsilon=epsilon)
    fall = margin(model, pixels, labels) - margin(model, attacked, labels)
    norm = (model.weight[0] - model.weight[1]).abs().sum()
    torch.testing.assert_close(fall, (epsilon * norm).expand(16), rtol=1e-4, atol=1e-5)
    # No other attack of this size does more: all corners of the cube around one image.
    corners = torch.cartesian_prod(*[torch.tensor([-epsilon, epsilon])] * 12).view(-1, 3, 2, 2)
    worst = margin(model, pixels[:1] + corners, labels[:1].expand(len(corners))).min()
    assert margin(model, attacked[:1], labels[:1]).item() == pytest.approx(worst.item(), abs=1e-5)


def test_fgsm_stays_in_the_ball_and_in_the_range(convolutional):
    pixels = torch.rand(32, 3, 2, 2)
    labels = torch.arange(32) % 5
    attacked = fgsm(convolutional, pixels, labels, epsilon=0.3)
    assert (attacked - pixels).abs().max() <= 0.3 + 1e-6
    assert attacked.min() == 0
    assert attacked.max() == 1
    assert torch.equal(fgsm(convolutional, pixels, labels, epsilon=0.0), pixels)


def test_an_images_attack_depends_on_no_other_image(convolutional):
    pixels, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 5
    for model in (convolutional, rescaled(convolutional)):
        together = input_gradient(model, pixels, labels)
        alone = torch.cat([input_gradient(model, pixels[i : i + 1], labels[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-7)


def test_fgsm_is_that_of_foolbox(convolutional):
    foolbox = pytest.importorskip("foolbox", reason="needs foolbox (pip install 'lit-distill[robustness]')")
    pixels, labels = torch.rand(32, 3, 2, 2), torch.arange(32) % 5
    target = foolbox.PyTorchModel(convolutional, bounds=(0, 1))
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    for epsilon in (0.1, 0.3):
        expected = attack.run(target, pixels, foolbox.criteria.Misclassification(labels), epsilon=epsilon)
        assert torch.equal(fgsm(convolutional, pixels, labels, epsilon=epsilon), expected)


def test_fgsm_is_that_of_torchattacks(convolutional):
    torchattacks = pytest.importorskip("torchattacks", reason="needs torchattacks (pip install torchattacks)")
    pixels, labels = torch.rand(32, 3, 2, 2), torch.arange(32) % 5
    expected = torchattacks.FGSM(convolutional, eps=0.1)(pixels, labels)
    assert torch.equal(fgsm(convolutional, pixels, labels, epsilon=0.1), expected)


# ---- masked gradients ------------------------------------------------------------------------------------------------


def test_large_logits_hide_the_gradient_from_fgsm_and_rescaling_brings_it_back():
    pixels = grey(64)
    shares = []
    for scale in (1.0, 100.0, 1000.0):
        model = freeze(Linear(classes=3, scale=scale))
        labels = model(pixels).argmax(1)  # the same for all scales
        shares.append((input_gradient(model, pixels, labels).flatten(1) == 0).all(1).float().mean().item())
        attacked = fgsm(rescaled(model), pixels, labels, epsilon=0.2)
        assert not (input_gradient(rescaled(model), pixels, labels).flatten(1) == 0).all(1).any()
        if scale == 1.0:
            unscaled = attacked
        torch.testing.assert_close(attacked, unscaled)
    assert shares[0] == 0
    assert shares[0] < shares[1] < shares[2]


def test_rescaled_logits_keep_decisions_and_reach_the_spread(convolutional):
    pixels = torch.rand(8, 3, 2, 2)
    logits = convolutional(pixels)
    divided = rescaled(convolutional, spread=5.0)(pixels)
    assert torch.equal(divided.argmax(1), logits.argmax(1))
    torch.testing.assert_close(divided.amax(1) - divided.mean(1), torch.full((8,), 5.0))


def test_the_gradient_sees_the_divisor_as_a_constant():
    model, pixels = freeze(Linear(classes=3)), grey(8)
    labels = model(pixels).argmax(1)
    logits = model(pixels)
    divisors = (logits.amax(1) - logits.mean(1)) / 5
    alone = [
        input_gradient(lambda x, d=divisor: model(x) / d, pixels[i : i + 1], labels[i : i + 1])
        for i, divisor in enumerate(divisors)
    ]
    torch.testing.assert_close(input_gradient(rescaled(model), pixels, labels), torch.cat(alone), rtol=1e-4, atol=1e-7)


# ---- Carlini-Wagner --------------------------------------------------------------------------------------------------


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox", reason="needs foolbox (pip install 'lit-distill[robustness]')")


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_carlini_wagner_finds_the_closed_form_distance_of_a_linear_model(foolbox, scale):
    model = freeze(Linear(classes=3, scale=scale))
    pixels = grey(8)
    labels = model(pixels).argmax(1)
    attacked, success = carlini_wagner_l2(model, pixels, labels, steps=200, search_steps=7, initial_const=0.1)
    logits = model(pixels)
    gaps = logits.gather(1, labels[:, None]) - logits
    norms = (model.weight[labels][:, None] - model.weight[None]).norm(dim=2)
    expected = torch.where(norms > 0, gaps / norms.clamp(min=1e-9), math.inf).amin(1)
    found = (attacked - pixels).flatten(1).norm(dim=1)
    assert success.all()
    assert (model(attacked).argmax(1) != labels).all()
    assert (found >= expected - 1e-4).all()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-3)


def test_carlini_wagner_stays_in_the_range_and_moves_black_and_white_pixels(foolbox):
    model = freeze(Linear(classes=3))
    pixels = grey(8).round()
    labels = model(pixels).argmax(1)
    # In tanh space a pixel at 0 or 1 starts 7 away from where it shows, which takes large or many steps.
    attacked, success = carlini_wagner_l2(
        model, pixels, labels, steps=200, search_steps=1, step_size=0.1, initial_const=10.0
    )
    assert success.all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_carlini_wagner_leaves_an_image_that_it_cannot_turn(foolbox):
    class Constant(nn.Module):
        def forward(self, pixels):
            return pixels.flatten(1)[:, :2] * 0 + torch.tensor([1.0, 0.0])

    pixels = grey(4)
    attacked, success = carlini_wagner_l2(Constant().eval(), pixels, torch.zeros(4).long(), steps=5, search_steps=2)
    assert not success.any()
    assert torch.equal(attacked, pixels)


def test_carlini_wagner_asks_for_the_margin(foolbox):
    model, pixels = freeze(Linear(classes=3)), grey(4)
    labels = model(pixels).argmax(1)
    attacked, success = carlini_wagner_l2(
        model, pixels, labels, steps=100, search_steps=3, initial_const=1.0, confidence=0.5
    )
    assert success.all()
    assert (margin(model, attacked, labels) <= -0.5 + 1e-3).all()


def test_carlini_wagner_agrees_with_torchattacks_where_that_is_right(foolbox):
    # torchattacks masks the own class by a factor of 0, which is right for positive logits, and has no search over c:
    # both are given logits above 0 and one c.
    torchattacks = pytest.importorskip("torchattacks", reason="needs torchattacks (pip install torchattacks)")
    model, pixels = freeze(Linear(classes=3)), grey(8)
    model.bias.add_(20.0)
    labels = model(pixels).argmax(1)
    ours, success = carlini_wagner_l2(model, pixels, labels, steps=400, search_steps=1, initial_const=10.0)
    theirs = torchattacks.CW(model, c=10.0, kappa=0, steps=400, lr=0.01)(pixels, labels)
    moved = (model(theirs).argmax(1) != labels) & success
    assert moved.any()
    distances = [(attacked - pixels).flatten(1).norm(dim=1)[moved] for attacked in (ours, theirs)]
    torch.testing.assert_close(*distances, rtol=0.05, atol=5e-3)


def test_carlini_wagner_without_foolbox_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lit_distill.image.robustness.attacks.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs foolbox; pip install 'lit-distill\[robustness\]'"):
        carlini_wagner_l2(Linear(), grey(1), torch.zeros(1).long())


# ---- the model in pixels ---------------------------------------------------------------------------------------------


def test_the_pixel_model_normalizes_as_the_data_do(tiny):
    raw = torch.randint(0, 256, (4, 2, 8, 8), dtype=torch.uint8)
    normalize = Normalize((0.3, 0.5), (0.2, 0.4))
    network = freeze(tiny())
    model = PixelModel(network, normalize.mean, normalize.std)
    images = normalize(raw)
    torch.testing.assert_close(model.pixels(images), raw / 255)
    torch.testing.assert_close(model(raw / 255), network(images), rtol=1e-4, atol=1e-5)


def test_a_network_in_half_precision_gets_its_own_type(tiny):
    model = PixelModel(freeze(tiny()).bfloat16(), (0.5,), (0.5,))
    assert model(torch.rand(2, 2, 8, 8)).dtype == torch.float32


# ---- the callback ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pixel_blobs(blobs_class):
    """Blobs whose images are normalized pixels."""

    def build(**kwargs):
        data = blobs_class(**kwargs)
        data.normalize = Normalize((0.5,), (0.4,))
        data.images = data.images.clamp(-1.25, 1.25)
        return data

    return build


def evaluate(trainer, module, data, **options):
    attack = AdversarialEvaluation(**({"epsilons": [0.05, 0.2], "cw_samples": 0} | options))
    return trainer(callbacks=[attack]).test(module, datamodule=data, verbose=False)[0]


def test_the_callback_reports_what_the_attacks_do_by_hand(trainer, tiny, pixel_blobs):
    data, student = pixel_blobs(), tiny()
    student.dropout.p = 0.5  # off in evaluation
    result = evaluate(trainer, KD(student, tiny(6, seed=5)), data, batch_size=5)
    network = freeze(copy.deepcopy(student))
    pixels = data.images * 0.4 + 0.5

    def logits(x):
        return network((x - 0.5) / 0.4)

    for epsilon in (0.05, 0.2):
        for name, model in (("fgsm", logits), ("fgsm_rescaled", rescaled(logits))):
            attacked = fgsm(model, pixels, data.labels, epsilon=epsilon)
            accuracy = (logits(attacked).argmax(1) == data.labels).float().mean().item()
            assert result[f"test/{name}_acc_eps{epsilon:g}"] == pytest.approx(accuracy)
    assert result["test/zero_gradient"] == 0
    assert "test/cw_success" not in result
    assert {"test/acc", "test/teacher_acc"} <= set(result)


def test_the_panel_agrees_with_the_metrics_and_starts_at_the_clean_accuracy(trainer, tiny, pixel_blobs):
    module = Supervised(tiny())
    result = evaluate(trainer, module, pixel_blobs())
    panel = module.panels["robustness"]
    assert panel["epsilon"] == [0.0, 0.05, 0.2]
    for kind, name in (("fgsm", "fgsm"), ("rescaled", "fgsm_rescaled")):
        expected = [result["test/acc"], *(result[f"test/{name}_acc_eps{e:g}"] for e in (0.05, 0.2))]
        assert panel[kind] == pytest.approx(expected)
    assert "reliability" in module.panels


def test_large_logits_show_as_zero_gradients(trainer, mean_teacher, pixel_blobs):
    module = Supervised(mean_teacher())
    module.student.scale.data.mul_(1000)  # always right, and sure of it
    result = evaluate(trainer, module, pixel_blobs(), epsilons=[0.5])
    assert result["test/zero_gradient"] == 1.0
    assert result["test/fgsm_acc_eps0.5"] == 1.0
    assert result["test/fgsm_rescaled_acc_eps0.5"] < 0.5


def test_carlini_wagner_attacks_so_many_correct_images_and_averages_the_successes(
    trainer, mean_teacher, pixel_blobs, monkeypatch
):
    seen = []

    def attack(model, pixels, labels, *, steps, search_steps):
        seen.append((len(pixels), steps, search_steps))
        assert torch.equal(model(pixels).argmax(1), labels)
        success = torch.arange(len(pixels)) % 2 == 0
        moved = pixels.clone()
        moved[:, 0, 0, 0] += torch.where(success, 0.3, 9.0)  # a failure's distance must not count
        return moved, success

    monkeypatch.setattr(callback_module, "carlini_wagner_l2", attack)
    monkeypatch.setattr(callback_module, "require_foolbox", lambda: None)
    data = pixel_blobs()
    data.labels[0] = 2 - data.labels[0]  # one wrong from the start
    result = evaluate(trainer, Supervised(mean_teacher()), data, cw_samples=10, cw_steps=7, cw_search_steps=3)
    assert seen == [(7, 7, 3), (3, 7, 3)]
    assert result["test/cw_success"] == pytest.approx(6 / 10)
    assert result["test/cw_l2"] == pytest.approx(0.3, rel=1e-4)


def test_the_callback_runs_the_real_attack_and_leaves_the_network_as_it_was(foolbox, trainer, tiny, pixel_blobs):
    module = Supervised(tiny(8), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    attack = AdversarialEvaluation(epsilons=[0.1], cw_samples=4, cw_steps=100, cw_search_steps=6)
    fit = trainer(max_epochs=10, callbacks=[attack])
    data = pixel_blobs()
    fit.fit(module, datamodule=data)
    before = copy.deepcopy(module.state_dict())
    flags = [parameter.requires_grad for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = None
    result = fit.test(module, datamodule=data, verbose=False)[0]
    assert result["test/cw_success"] == 1.0
    assert 0 < result["test/cw_l2"] < 5
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert all(parameter.grad is None for parameter in module.parameters())
    fit.fit_loop.max_epochs = 11
    fit.fit(module, datamodule=data)  # goes on after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilons": []}, "epsilons is"),
        ({"epsilons": [0.1, -0.1]}, "epsilons is"),
        ({"cw_samples": -1}, "cw_samples is -1; give 0 or more"),
        ({"cw_steps": 0}, "cw_steps is 0; give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        AdversarialEvaluation(**options)


def test_what_cannot_be_attacked_is_refused_before_training(trainer, tiny, blobs, pixel_blobs, monkeypatch):
    with pytest.raises(UsageError, match="no `normalize` with mean and std"):
        trainer(callbacks=[AdversarialEvaluation(cw_samples=0)]).fit(Supervised(tiny()), datamodule=blobs)
    monkeypatch.setattr("lit_distill.image.robustness.attacks.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs foolbox"):
        trainer(callbacks=[AdversarialEvaluation()]).fit(Supervised(tiny()), datamodule=pixel_blobs())
