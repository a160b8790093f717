import copy

import pytest
import torch
import torch.nn.functional as F

from lit_distill.core.errors import UsageError
from lit_distill.dataset.methods.dc import GradientMatching
from lit_distill.dataset.models import DistillationConvNet
from lit_distill.image.data import DigitsDataModule


def convnet(norm="instance", seed=0):
    torch.manual_seed(seed)
    return DistillationConvNet(10, width=8, depth=2, norm=norm, image_size=8, in_channels=1)


def matching(norm="instance", **kwargs):
    options = {"per_class": 2, "real_batch": 4, "outer_steps": 3, "inner_epochs": 2, "student_epochs": 2}
    return GradientMatching(convnet(norm), **{**options, **kwargs})


@pytest.fixture
def fitted(trainer):
    """Builds a module after so many iterations."""

    def build(steps=1, **kwargs):
        module = matching(**kwargs)
        trainer(max_steps=steps, max_epochs=-1).fit(module, datamodule=DigitsDataModule())
        return module

    return build


def reference_gradient(network, images, number, create_graph=False):
    """Plain autograd over the network's own parameters, without functional calls."""
    loss = F.cross_entropy(network(images), torch.full((len(images),), number))
    return torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph)


def reference_distance(synthetic, real):
    """The definition, filter by filter; what has one dimension is left out."""
    total = 0.0
    for own, other in zip(synthetic, real, strict=True):
        if own.ndim > 1:
            for a, b in zip(own.flatten(1), other.flatten(1), strict=True):
                total = total + 1 - (a * b).sum() / (a.norm() * b.norm())
    return total


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_loss_and_gradient_are_those_of_one_graph_over_all_classes(fitted, norm):
    module = fitted(norm=norm)
    drawn = []
    real_images = module.real_images
    module.real_images = lambda number, count: drawn.append((number, real_images(number, count))) or drawn[-1][1]
    module.iteration = 3  # a new network
    module.images.grad = None
    loss = module.training_step(None, 0)
    loss.backward()
    twin = copy.deepcopy(module.network).requires_grad_(True)
    images = module.images.detach().clone().requires_grad_()
    real = [pixels for _, pixels in drawn[-10:]]
    expected = 0.0
    for number in range(10):
        own = reference_gradient(twin, images[2 * number : 2 * number + 2], number, create_graph=True)
        expected = expected + reference_distance(own, reference_gradient(twin, real[number], number))
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.images.grad, images.grad, rtol=1e-3, atol=1e-5)
    assert images.grad.abs().max() > 1e-3
    assert [number for number, _ in drawn[-10:]] == list(range(10))


def test_the_images_have_the_derivative_of_finite_differences(fitted):
    module = fitted().double()
    module._normalize = lambda pixels: pixels.double() / 255
    module.combine = lambda terms: terms["match"]
    module.iteration = 0

    def loss():
        torch.manual_seed(2)
        return module.training_step(None, 0)

    module.images.grad = None
    loss().backward()
    for place in ((0, 0, 3, 4), (13, 0, 5, 2)):
        found = float(module.images.grad[place])
        with torch.no_grad():
            module.images[place] += 1e-5
        upper = float(loss().detach())
        with torch.no_grad():
            module.images[place] -= 2e-5
        slope = (upper - float(loss().detach())) / 2e-5
        assert found == pytest.approx(slope, rel=1e-4)
        assert abs(slope) > 1e-6
        with torch.no_grad():
            module.images[place] += 1e-5


@pytest.mark.parametrize("operations", ["none", "color_crop_cutout_scale_rotate"])
def test_equal_images_have_loss_0_under_common_draws(fitted, operations):
    module = fitted(operations=operations)
    module.real_images = lambda number, count: module.of_class(number).detach()
    module.combine = lambda terms: terms["match"]
    module.iteration = 0
    for _ in range(5):  # several operations
        assert float(module.training_step(None, 0)) == pytest.approx(0, abs=1e-3)
    module.real_images = lambda number, count: module.of_class((number + 1) % 10).detach()
    assert float(module.training_step(None, 0)) > 1


def test_one_draw_for_each_class_is_common_to_real_and_synthetic_images(fitted, monkeypatch):
    module = fitted(operations="crop_rotate", inner_epochs=0)
    seen = []
    augment = type(module.augmentation).__call__
    monkeypatch.setattr(
        type(module.augmentation),
        "__call__",
        lambda self, images, draws: seen.append((images.requires_grad, draws)) or augment(self, images, draws),
    )
    module.training_step(None, 0)
    assert [requires for requires, _ in seen] == [False, True] * 10
    draws = [draw for _, draw in seen]
    assert all(torch.equal(draws[2 * c], draws[2 * c + 1]) and len(draws[2 * c]) == 1 for c in range(10))
    assert len({tuple(draw[0].tolist()) for draw in draws}) == 10


def test_only_the_synthetic_side_has_a_graph_of_second_order(fitted, monkeypatch):
    module = fitted()
    seen = []
    gradient = GradientMatching.gradient

    def watched(self, images, labels, **kwargs):
        found = gradient(self, images, labels, **kwargs)
        seen.append((images.requires_grad, labels, [value.requires_grad for value in found]))
        return found

    monkeypatch.setattr(GradientMatching, "gradient", watched)
    module.iteration = 0
    before = module.images.detach().clone()
    module.training_step(None, 0).backward()
    assert [synthetic for synthetic, _, _ in seen] == [False, True] * 10
    assert all(any(graph) is synthetic for synthetic, _, graph in seen)
    assert [labels.tolist() for _, labels, _ in seen][:4] == [[0] * 4, [0] * 2, [1] * 4, [1] * 2]
    assert all(parameter.grad is None for parameter in [*module.network.parameters(), *module.student.parameters()])
    assert torch.equal(before, module.images)


# ---- the loop ------------------------------------------------------------------------------------------------------


def test_a_network_is_drawn_every_outer_step_and_trained_in_between(trainer, monkeypatch):
    seen = []
    match_class = GradientMatching.match_class

    def watched(self, number):
        if number == 0:
            seen.append((copy.deepcopy(self.network), self.images.detach().clone()))
        return match_class(self, number)

    monkeypatch.setattr(GradientMatching, "match_class", watched)
    module = matching(network_lr=0.05)
    trainer(max_steps=5, max_epochs=-1).fit(module, datamodule=DigitsDataModule())
    networks, images = zip(*seen, strict=True)
    for step in (1, 2, 4):
        # By hand: two steps of plain SGD on the images as they are before this iteration.
        twin = copy.deepcopy(networks[step - 1]).requires_grad_(True)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(twin(images[step]), module.labels).backward()
            optimizer.step()
        for own, other in zip(networks[step].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own, other.detach(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(images[step], images[step - 1])
        assert not torch.equal(networks[step].linear.weight, networks[step - 1].linear.weight)
    gap = (networks[3].linear.weight - networks[2].linear.weight).abs().mean()
    assert gap > 10 * (networks[2].linear.weight - networks[1].linear.weight).abs().mean()


def test_training_the_network_goes_in_batches_of_256_with_draws_of_each_image(fitted, monkeypatch):
    module = fitted(per_class=30, operations="crop_rotate")
    seen = []
    gradient = GradientMatching.gradient
    monkeypatch.setattr(
        GradientMatching,
        "gradient",
        lambda self, images, labels, **kw: seen.append(labels) or gradient(self, images, labels, **kw),
    )
    drawn = []
    draw = type(module.augmentation).draw
    monkeypatch.setattr(type(module.augmentation), "draw", lambda self, n: drawn.append(n) or draw(self, n))
    module.train_network()
    assert [len(labels) for labels in seen] == drawn == [256, 44, 256, 44]
    assert torch.equal(torch.cat(seen[:2]).sort().values, module.labels)


def test_batch_normalization_keeps_the_statistics_of_real_images_of_all_classes(fitted):
    module = fitted(norm="batch")
    drawn = []
    real_images = module.real_images
    module.real_images = lambda number, count: drawn.append((number, real_images(number, count))) or drawn[-1][1]
    module.training_step(None, 0)  # the second iteration of a network, which has just been trained
    assert [number for number, _ in drawn[:10]] == list(range(10))
    assert all(len(pixels) == 16 for _, pixels in drawn[:10])
    block = module.network.layer1
    maps = block[0](torch.cat([pixels for _, pixels in drawn[:10]]))
    torch.testing.assert_close(block[1].running_mean, maps.mean((0, 2, 3)))
    torch.testing.assert_close(block[1].running_var, maps.var((0, 2, 3)))
    assert not block[1].training
    assert module.network.training
    before = module.network.state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    module.match_class(0)
    assert all(torch.equal(value, kept[name]) for name, value in module.network.state_dict().items())


def test_matching_comes_down(fitted):
    module = fitted(init="noise", per_class=1)

    def match():
        torch.manual_seed(9)
        module.iteration = 0
        return float(module.training_step(None, 0).detach())

    before = match()
    optimizer = torch.optim.SGD([module.images], lr=0.5, momentum=0.5)
    for _ in range(10):
        optimizer.zero_grad()
        module.iteration = 0
        module.training_step(None, 0).backward()
        optimizer.step()
    assert match() < 0.9 * before


# ---- the run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_run_resumed_within_an_outer_loop_ends_with_the_same_images(trainer, fitted, tmp_path, norm):
    options = {"norm": norm, "operations": "color_crop"}
    whole = fitted(steps=5, **options)
    half = trainer(max_steps=2, max_epochs=-1)
    half.fit(matching(**options), datamodule=DigitsDataModule())
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"images", "labels", "network"}
    resumed = matching(**options)
    trainer(max_steps=5, max_epochs=-1).fit(resumed, datamodule=DigitsDataModule(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.iteration == 5
    assert torch.equal(resumed.images, whole.images)
    for own, other in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(own, other)


def test_validation_in_between_changes_nothing(trainer, fitted):
    whole = fitted(steps=5)
    module = matching()
    validating = trainer(
        max_steps=5, max_epochs=-1, limit_val_batches=1, val_check_interval=1, check_val_every_n_epoch=None
    )
    validating.fit(module, datamodule=DigitsDataModule())
    assert torch.equal(module.images, whole.images)
    assert not torch.equal(module.student.linear.weight, module.network.linear.weight)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outer_steps": 0}, r"model\.outer_steps is 0; give 1 or more"),
        ({"real_batch": 0}, r"model\.real_batch is 0; give 1 or more"),
        ({"inner_epochs": -1}, r"model\.inner_epochs is -1; give 0 or more"),
        ({"network_lr": 0.0}, r"model\.network_lr is 0\.0; it must be above 0 \(usual: 0\.01\)"),
    ],
)
def test_mistakes_are_told_in_one_line(options, says):
    with pytest.raises(UsageError, match=says):
        matching(**options)
