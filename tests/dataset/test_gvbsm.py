from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.dataset.batchnorm import BatchNormMatcher
from lit_distill.dataset.losses import densification_loss
from lit_distill.dataset.methods.gvbsm import GeneralizedStatisticalMatching, adam
from lit_distill.dataset.methods.sre2l import SRe2L
from lit_distill.dataset.statistics import GeneralizedMatcher, blend, patch_moments


@pytest.fixture
def members(networks):
    """Networks of three kinds, one without batch normalization, with the statistics of real images."""
    return partial(networks, second_norm="instance")


@pytest.fixture
def matching(small_net, members):
    """Builds a module."""

    def build(**kwargs):
        options = {"student_epochs": 1, "recover_iterations": 4, "per_class": 2, "block_classes": 5}
        options |= {"padding": 1, "roll": 1} | kwargs
        return GeneralizedStatisticalMatching(small_net(), options.pop("members", None) or members(), **options)

    return build


@pytest.fixture
def fitted(trainer, digits, matching):
    """Builds a module after all its iterations."""

    def build(callbacks=(), **kwargs):
        module = matching(**kwargs)
        steps = -(-10 // module.block_classes) * module.recover_iterations
        trainer(callbacks=list(callbacks), max_steps=steps, max_epochs=-1).fit(module, datamodule=digits())
        return module

    return build


class Watch(Callback):
    """Keeps terms, classes, and averages of every step."""

    def __init__(self):
        self.terms, self.labels, self.averages = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.terms.append({name: float(value.detach()) for name, value in module.terms.items()})
        self.labels.append(module._labels_of_block.tolist())
        self.averages.append([dict(matcher.averages) for matcher in module._matchers])


def two_layers():
    """A network whose layers are a convolution, batch normalization, and another convolution on a 4x4 grid."""
    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2)
    return network.requires_grad_(False).eval()


def given(network, layer, images):
    """What a layer is given, in double precision."""
    found = []
    handle = network[layer].register_forward_hook(lambda _module, args, _output: found.append(args[0]))
    with torch.no_grad():
        network(images)
    handle.remove()
    return found[0].double().numpy()


def by_channel(maps):
    rows = maps.transpose(1, 0, 2, 3).reshape(maps.shape[1], -1)
    return [rows.mean(1), rows.var(1)]


def by_patch(maps):
    patches = [maps[:, :, y : y + 4, x : x + 4] for y in range(0, maps.shape[2], 4) for x in range(0, maps.shape[3], 4)]
    return [np.array([patch.mean() for patch in patches]), np.array([patch.var() for patch in patches])]


def statistics(network, images):
    """All statistics of `two_layers`, with numpy, by layer."""
    first, second, third = (given(network, layer, images) for layer in (0, 1, 3))
    return [
        [*by_channel(first), *by_patch(first)],
        by_channel(second),
        [*by_channel(third), *by_patch(third)],
    ]


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_patches_have_their_own_mean_and_variance_over_batch_and_channels():
    maps = torch.randn(3, 2, 8, 12) * 2 + torch.arange(12.0)
    mean, variance = patch_moments(maps)
    expected_mean, expected_variance = by_patch(maps.double().numpy())
    assert len(mean) == 6
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-5)


def test_a_grid_that_patches_do_not_fill_is_stretched():
    # A ramp of two columns becomes one of four: 0, 1/4, 3/4, 1.
    maps = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    mean, variance = patch_moments(maps)
    assert mean.tolist() == pytest.approx([0.5])
    assert variance.tolist() == pytest.approx([(0.5**2 + 0.25**2) / 2])
    assert len(patch_moments(torch.randn(2, 3, 5, 8))[0]) == 4


def test_statistics_of_the_real_images_are_of_all_of_them_however_batched():
    network = two_layers()
    images = torch.randn(7, 2, 8, 8) + torch.arange(7.0).view(-1, 1, 1, 1)
    matcher = GeneralizedMatcher(network)
    matcher.collect(images.split(3))
    expected = statistics(network, images)
    assert list(matcher.targets) == ["0", "3"]
    for name, values in zip(("0", "3"), (expected[0], expected[2]), strict=True):
        for found, value in zip(matcher.targets[name], values, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)


def test_the_distance_is_that_of_all_statistics_with_the_averages_of_the_batches():
    network = two_layers()
    real = torch.randn(20, 2, 8, 8) * 2 + 1
    batches = torch.randn(3, 6, 2, 8, 8)
    matcher = GeneralizedMatcher(network, first_weight=10.0, momentum=0.8, drop_rate=0.0)
    matcher.collect([real])
    wanted = statistics(network, real)
    layer = network[1]
    wanted[1] = [layer.running_mean.double().numpy(), layer.running_var.double().numpy()]
    averages = None
    for batch in batches:
        current = statistics(network, batch)
        if averages is None:
            averages = current  # not 0.8 * 0 + 0.2 * current
        else:
            averages = [
                [0.8 * old + 0.2 * new for old, new in zip(olds, news, strict=True)]
                for olds, news in zip(averages, current, strict=True)
            ]
        expected = sum(
            weight * sum(np.linalg.norm(a - b) for a, b in zip(values, targets, strict=True))
            for weight, values, targets in zip((10.0, 1.0, 1.0), averages, wanted, strict=True)
        )
        logits, distance = matcher(batch)
        assert float(distance) == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(logits, network(batch))
    np.testing.assert_allclose(matcher.averages["1"][0], averages[1][0], rtol=1e-4, atol=1e-6)


def test_batch_normalizations_alone_and_no_average_are_the_distance_of_sre2l():
    network = two_layers()
    matcher = GeneralizedMatcher(network, first_weight=1.0, momentum=0.0, drop_rate=1.0)
    for seed in range(2):
        torch.manual_seed(seed)
        images = torch.randn(6, 2, 8, 8, requires_grad=True)
        twin = images.detach().clone().requires_grad_()
        found, expected = matcher(images)[1], BatchNormMatcher(network, first_weight=1.0)(twin)[1]
        torch.testing.assert_close(found, expected)
        found.backward()
        expected.backward()
        torch.testing.assert_close(images.grad, twin.grad)
    assert list(matcher.averages) == ["1"]


def test_the_gradient_is_that_of_the_batch_as_if_it_were_the_average():
    current = torch.tensor([3.0, -1.0], requires_grad=True)
    average = torch.tensor([1.0, 2.0], requires_grad=True)
    moved, blended = blend(current, average.detach(), 0.8)
    assert blended.tolist() == pytest.approx([1.4, 1.4])
    assert moved.tolist() == pytest.approx([1.4, 1.4])
    assert not moved.requires_grad
    (blended * torch.tensor([2.0, 5.0])).sum().backward()
    assert current.grad.tolist() == [2.0, 5.0]  # not a fifth of it
    begun, first = blend(current, None, 0.8)
    assert begun.tolist() == first.tolist() == [3.0, -1.0]


def test_convolutions_are_skipped_as_often_as_asked_and_normalizations_never():
    network = two_layers()
    matcher = GeneralizedMatcher(network, drop_rate=0.4, momentum=0.0)
    images = torch.randn(2, 2, 8, 8)
    matcher.collect([images + 1])
    kept = {"0": 0, "1": 0, "3": 0}
    together = 0
    for _ in range(200):
        matcher.averages.clear()
        matcher(images)
        for name in matcher.averages:
            kept[name] += 1
        together += {"0", "3"} <= set(matcher.averages)
    assert kept["1"] == 200
    # Four standard deviations of 200 coins are 28.
    assert kept["0"] == pytest.approx(120, abs=28)
    assert kept["3"] == pytest.approx(120, abs=28)
    assert together == pytest.approx(72, abs=28)  # each has a coin of its own
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_the_average_of_a_skipped_convolution_stays():
    matcher = GeneralizedMatcher(two_layers(), drop_rate=0.0)
    matcher.collect([torch.randn(4, 2, 8, 8)])
    matcher(torch.randn(2, 2, 8, 8))
    before = {name: [value.clone() for value in values] for name, values in matcher.averages.items()}
    matcher.drop_rate = 1.0
    matcher(torch.randn(2, 2, 8, 8))
    assert all(torch.equal(*pair) for pair in zip(before["0"], matcher.averages["0"], strict=True))
    assert not torch.equal(before["1"][0], matcher.averages["1"][0])


# ---- densification -------------------------------------------------------------------------------------------------


def softmax(values):
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def test_densification_is_the_divergence_of_the_spectra():
    images = torch.randn(3, 4, 6) * torch.tensor([0.3, 0.6, 1.0]).view(-1, 1, 1)
    expected = 0.0
    for rows in images.double().numpy():
        spectrum = np.linalg.svd(rows, compute_uv=False) ** 2
        flat, sharp = softmax(spectrum / 4), softmax(spectrum)
        expected += (flat * np.log(flat / sharp)).sum()
    assert float(densification_loss(images)) == pytest.approx(expected, rel=1e-4)


def test_densification_has_no_gradient_through_the_flatter_spectrum():
    images = (torch.randn(1, 3, 5, dtype=torch.double) * 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(densification_loss(images), images)
    # The derivative by an eigenvalue is softmax(e) - softmax(e / 4), and that of u' X X' u by X is 2 u u' X.
    spectrum, vectors = np.linalg.eigh((images @ images.mT)[0].detach().numpy())
    slopes = softmax(spectrum) - softmax(spectrum / 4)
    expected = 2 * (vectors * slopes) @ vectors.T @ images[0].detach().numpy()
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-6, atol=1e-9)


def test_descending_it_makes_alike_images_differ():
    torch.manual_seed(0)
    images = (torch.randn(1, 1, 6) * 0.4 + 0.05 * torch.randn(1, 4, 6)).requires_grad_()

    def share():
        spectrum = torch.linalg.svdvals(images.detach()[0]) ** 2
        return float(spectrum.max() / spectrum.sum())

    before = share()
    optimizer = torch.optim.SGD([images], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        densification_loss(images).backward()
        optimizer.step()
    assert share() < before - 0.1


def test_densification_is_zero_for_single_and_for_orthogonal_images():
    assert float(densification_loss(torch.randn(5, 1, 7))) == 0.0
    assert float(densification_loss(torch.eye(4)[None])) == pytest.approx(0.0, abs=1e-6)
    # Large eigenvalues, whose softmax has zeros, give no nan.
    large = (torch.randn(2, 3, 50) * 10).requires_grad_()
    densification_loss(large).backward()
    assert large.grad.isfinite().all()


# ---- the method ----------------------------------------------------------------------------------------------------


def test_networks_take_turns_over_the_whole_run(fitted):
    watch = Watch()
    fitted(callbacks=[watch])
    turns = [{int(name[-1]) for name in terms if name != "density"} for terms in watch.terms]
    assert turns == [{step % 3} for step in range(8)]  # the second block begins with the second network
    assert all(set(terms) == {f"ce_{i % 3}", f"bn_{i % 3}", "density"} for i, terms in enumerate(watch.terms))


def test_a_block_has_all_images_of_its_classes(fitted):
    watch = Watch()
    module = fitted(callbacks=[watch], recover_iterations=1)
    assert watch.labels == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]]
    assert module._place.data_ptr() == module.images[10:].data_ptr()


def test_the_loss_is_that_of_one_network_and_of_the_spectra_of_each_class(fitted):
    module = fitted(
        recover_iterations=1, block_classes=10, bn_weight=0.02, density_weight=3.0, padding=0, roll=0, flip=False,
        drop_rate=0.0, momentum=0.0, members=None,
    )  # fmt: skip
    pixels = module._pixels_of_block
    module.iteration = 5  # 5 mod 3
    network = module.committee.members[2]
    twin = GeneralizedMatcher(network, 10.0, 0.0, 0.0)
    source = module.trainer.datamodule
    twin.collect([source.normalize(source.part("train").images)])
    logits, distance = twin(pixels)
    labels = torch.arange(10).repeat_interleave(2)
    rows = pixels.detach().reshape(10, 2, -1)
    expected = {
        "ce_2": float(F.cross_entropy(logits, labels)),
        "bn_2": 0.02 * float(distance),
        "density": 3.0 * sum(float(densification_loss(own[None])) for own in rows),
    }
    loss = module.training_step(None, 0)
    found = {name: float(value.detach()) for name, value in module.terms.items()}
    assert found == pytest.approx(expected, rel=1e-3)
    assert float(loss) == pytest.approx(sum(found.values()), rel=1e-5)
    pixels.grad = None
    loss.backward()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_one_network_with_nothing_new_is_sre2l(trainer, digits, matching, members, small_net):
    common = {"per_class": 1, "block_classes": 6, "recover_iterations": 4, "roll": 2, "student_epochs": 1}
    common |= {"first_bn_weight": 1.0, "optimizer": adam, "bn_weight": 1.0}
    alone = SRe2L(small_net(), members(1)[0], crop_scale=None, **common)
    new = {"momentum": 0.0, "drop_rate": 1.0, "density_weight": 0.0, "padding": 0}
    one, averaged, convolutions, dense, padded = (
        matching(members=members(1), **common | new | change)
        for change in ({}, {"momentum": 0.8}, {"drop_rate": 0.0}, {"density_weight": 1.0}, {"padding": 2})
    )
    for module in (alone, one, averaged, convolutions, dense, padded):
        trainer(max_steps=8, max_epochs=-1).fit(module, datamodule=digits())
    torch.testing.assert_close(one.images, alone.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(dense.images, alone.images, rtol=0, atol=1e-6)  # single images have no spectrum
    assert not torch.allclose(averaged.images, alone.images, atol=1e-3)
    assert not torch.allclose(convolutions.images, alone.images, atol=1e-3)
    assert not torch.allclose(padded.images, alone.images, atol=1e-3)


def test_parts_can_be_left_out(fitted):
    watch = Watch()
    fitted(callbacks=[watch], density_weight=0.0, recover_iterations=1)
    assert set(watch.terms[0]) == {"ce_0", "bn_0"}
    mlp_like = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    module = fitted(members=[mlp_like], bn_weight=0.0, recover_iterations=1)
    assert set(module.terms) == {"ce_0", "density"}


def test_averages_go_on_from_block_to_block_and_begin_with_the_first_batch(fitted):
    watch = Watch()
    module = fitted(callbacks=[watch], drop_rate=0.0, members=None)
    first = watch.averages[0]
    assert first[0]
    assert not first[1]
    assert not first[2]
    # The second block begins with step 4, the turn of network 1, which has had one before: step 1.
    assert not torch.equal(watch.averages[3][1]["layer1.0"][0], watch.averages[4][1]["layer1.0"][0])
    before, after = watch.averages[3][0], watch.averages[4][0]
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name], after[name], strict=True))
    assert set(module._matchers[1].targets) == {"layer1.0"}


@pytest.mark.parametrize("saved", [3, 5])
def test_a_resumed_run_is_the_same_bit_for_bit(fitted, trainer, digits, matching, tmp_path, monkeypatch, saved):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == saved:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")

    whole = fitted(callbacks=[Save()])
    monkeypatch.setattr(GeneralizedMatcher, "collect", lambda *_: pytest.fail("statistics come with the checkpoint"))
    resumed = matching()
    fit = trainer(max_steps=8, max_epochs=-1)
    fit.fit(resumed, datamodule=digits(), ckpt_path=tmp_path / "killed.ckpt")
    assert torch.equal(resumed.images, whole.images)
    for one, other in zip(resumed._matchers, whole._matchers, strict=True):
        assert set(one.averages) == set(other.averages)
        assert all(
            torch.equal(*pair)
            for name in one.averages
            for pair in zip(one.averages[name], other.averages[name], strict=True)
        )


def test_images_depend_on_the_averages_that_the_checkpoint_has(fitted, trainer, digits, matching, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")

    whole = fitted(callbacks=[Save()])
    checkpoint = torch.load(tmp_path / "killed.ckpt", weights_only=False)
    for kept in checkpoint["statistics"]:
        kept["averages"] = {}
    torch.save(checkpoint, tmp_path / "forgot.ckpt")
    resumed = matching()
    trainer(max_steps=8, max_epochs=-1).fit(resumed, datamodule=digits(), ckpt_path=tmp_path / "forgot.ckpt")
    assert not torch.equal(resumed.images, whole.images)


def test_a_run_has_as_many_steps_as_its_blocks(trainer, digits, matching):
    says = r"^trainer\.max_steps is 7; 2 blocks of 4 iterations take 8, set it to 8"
    with pytest.raises(UsageError, match=says):
        trainer(max_steps=7, max_epochs=-1).fit(matching(), datamodule=digits())


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"momentum": 1.0}, r"^model\.momentum is 1\.0; give 0 or more, and less than 1 \(published: 0\.8\)$"),
        ({"drop_rate": 40.0}, r"^model\.drop_rate is 40\.0; it is a probability, give 0 to 1 \(published: 0\.4\)$"),
        ({"density_weight": -1.0}, r"^model\.density_weight is -1\.0; give 0 or more$"),
        ({"padding": -1}, r"^model\.padding is -1; give 0 or more$"),
    ],
)
def test_mistakes_are_told_in_one_line(matching, options, says):
    with pytest.raises(UsageError, match=says):
        matching(**options)


def test_a_network_without_either_layer_is_refused(trainer, digits, matching):
    module = matching(members=[nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])
    with pytest.raises(UsageError, match=r"^model: Sequential has neither Conv2d nor BatchNorm2d, whose statistics"):
        trainer(max_steps=8, max_epochs=-1).fit(module, datamodule=digits())
