import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.dataset.methods.sre2l import SRe2L
from lit_distill.dataset.synthetic import SyntheticSet

PLAIN = {"crop_scale": None, "flip": False, "roll": 0}
BOUNDS = tuple((edge - 0.3053) / 0.3760 for edge in (0.0, 1.0))  # the digits' black and white


@pytest.fixture
def teacher(small_net, digits):
    """A network with the statistics of real images."""

    def build(seed=1, **kwargs):
        network = small_net(seed, norm="batch", **kwargs)
        data = digits()
        data.setup()
        with torch.no_grad():
            network.train()(data.normalize(data.part("train").images))
        return network.eval()

    return build


class Watch(Callback):
    """Keeps what there was at the beginning, and after every step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_start(self, trainer, module):
        self.beginning = module.images.detach().clone()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(self.look(trainer, module))


@pytest.fixture
def fitted(trainer, digits, small_net, teacher):
    """Builds a module after all its iterations."""

    def build(iterations=3, per_class=1, network=None, callbacks=(), ckpt_path=None, trained=None, **kwargs):
        options = {"student_epochs": 1, "recover_iterations": iterations, "per_class": per_class} | kwargs
        module = SRe2L(small_net(), network or teacher(), **options)
        blocks = per_class * -(-10 // module.block_classes)
        steps = {"max_steps": blocks * iterations, "max_epochs": -1} | (trained or {})
        trainer(callbacks=list(callbacks), **steps).fit(module, datamodule=digits(), ckpt_path=ckpt_path)
        return module

    return build


def distance_by_hand(network, images, first_weight=10.0):
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    given = []
    handles = [layer.register_forward_hook(lambda _, args, __: given.append(args[0])) for layer in layers]
    logits = network(images)
    for handle in handles:
        handle.remove()
    total = 0.0
    for number, (layer, maps) in enumerate(zip(layers, given, strict=True)):
        variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
        off = (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
        total = total + (first_weight if number == 0 else 1.0) * off
    return logits, total


def images_of(_, module):
    return module.images.detach().clone()


# ---- the recovery --------------------------------------------------------------------------------------------------


def test_each_image_is_adam_on_the_loss_with_a_cosine_of_its_own(fitted, teacher):
    watch = Watch(images_of)
    fitted(iterations=4, per_class=2, bn_weight=0.3, callbacks=[watch], **PLAIN)
    network = teacher().requires_grad_(False)
    for number in range(2):
        pixels = watch.beginning[number::2].clone().requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=0.25, betas=(0.5, 0.9))
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.125 * (1 + math.cos(math.pi * step / 4))
            logits, distance = distance_by_hand(network, pixels)
            optimizer.zero_grad()
            (F.cross_entropy(logits, torch.arange(10)) + 0.3 * distance).backward()
            optimizer.step()
            with torch.no_grad():
                pixels.clamp_(*BOUNDS)
            torch.testing.assert_close(watch.seen[4 * number + step][number::2], pixels, atol=1e-3, rtol=1e-3)
        # The other images stay as they were begun, or as they were left.
        others = watch.beginning[1::2] if number == 0 else watch.seen[3][0::2]
        assert torch.equal(watch.seen[4 * number + 3][1 - number :: 2], others)


def test_the_learning_rate_is_set_before_each_step_and_begins_again(fitted, monkeypatch):
    taken = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self, closure: taken.append((self.param_groups[0]["lr"], len(self.state))) or step(self, closure),
    )
    fitted(iterations=4, per_class=2)
    cosine = [0.25, 0.25 * (2 + 2**0.5) / 4, 0.125, 0.25 * (2 - 2**0.5) / 4]
    assert [lr for lr, _ in taken] == pytest.approx(cosine * 2)
    assert [states for _, states in taken] == [0, 1, 1, 1] * 2  # Adam's moments are forgotten between blocks


def test_classes_come_in_blocks_which_need_not_be_equal(fitted, monkeypatch):
    seen = []
    member_terms = SRe2L.member_terms
    monkeypatch.setattr(
        SRe2L,
        "member_terms",
        lambda self, place, images: (
            seen.append((len(images), self._labels_of_block.tolist())) or member_terms(self, place, images)
        ),
    )
    watch = Watch(images_of)
    fitted(iterations=2, per_class=2, block_classes=4, callbacks=[watch])
    blocks = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    assert seen == [(len(block), block) for block in blocks for _ in range(2)]
    before = watch.beginning
    for number, block in enumerate(blocks):
        after = watch.seen[2 * number + 1]
        changed = (after != before).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert changed == [2 * label + number // 3 for label in block]  # class after class
        before = after


def test_pixels_stay_colors(fitted):
    watch = Watch(images_of)
    fitted(iterations=3, callbacks=[watch])
    assert watch.beginning.min() < BOUNDS[0] - 1  # noise
    for images in watch.seen:
        assert images.min() >= BOUNDS[0] - 1e-6
        assert images.max() <= BOUNDS[1] + 1e-6
    assert (watch.seen[-1] <= BOUNDS[0] + 1e-6).float().mean() > 0.05


def test_the_loss_comes_down(fitted):
    watch = Watch(lambda _, module: {name: value.item() for name, value in module.terms.items()})
    fitted(iterations=40, callbacks=[watch], bn_weight=0.1, **PLAIN)
    assert set(watch.seen[0]) == {"ce_0", "bn_0"}
    assert watch.seen[-1]["ce_0"] < watch.seen[0]["ce_0"]
    assert watch.seen[-1]["bn_0"] < 0.8 * watch.seen[0]["bn_0"]


def test_the_beginning_is_noise_or_real(fitted, digits):
    watch = Watch(images_of)
    fitted(iterations=1, callbacks=[watch])
    assert watch.beginning.mean().abs() < 0.15
    assert watch.beginning.std() == pytest.approx(1, abs=0.15)
    fitted(iterations=1, callbacks=[watch], init="real")
    data = digits()
    data.setup()
    images, labels = data.part("train")
    for number, image in enumerate(watch.beginning):
        same = (data.normalize(images) == image).flatten(1).all(1)
        assert labels[same].unique().tolist() == [number]


@pytest.mark.parametrize("init", ["real", "noise"])
def test_the_first_images_of_more_are_those_of_fewer(fitted, init):
    one, two = (fitted(iterations=3, per_class=number, init=init) for number in (1, 2))
    assert torch.equal(two.images[::2], one.images)


def test_nothing_of_the_network_moves(fitted, teacher):
    network = teacher()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = fitted(network=network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(part._forward_pre_hooks for part in network.modules())
    assert not any(part.training for part in module.committee.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


# ---- augmentation --------------------------------------------------------------------------------------------------


def test_all_images_have_the_same_crop_flip_and_roll(fitted):
    module = fitted()
    image = torch.randn(1, 1, 8, 8)
    drawn = [module.augmented(image.repeat(5, 1, 1, 1)) for _ in range(10)]
    assert all(torch.equal(images, images[:1].expand_as(images)) for images in drawn)
    assert all(images.shape == (5, 1, 8, 8) for images in drawn)
    assert len({float(images[0, 0, 0, 0]) for images in drawn}) > 5


def test_the_roll_is_by_up_to_so_many_pixels_and_the_flip_a_coin(fitted):
    image = torch.arange(64.0).view(1, 1, 8, 8)
    module = fitted(**(PLAIN | {"roll": 2}))
    shifts = {(down, right): torch.roll(image, (down, right), (2, 3)) for down in range(3) for right in range(3)}
    rolled = [module.augmented(image) for _ in range(100)]
    found = {next(key for key, value in shifts.items() if torch.equal(value, images)) for images in rolled}
    assert found == set(shifts)
    module = fitted(**(PLAIN | {"flip": True}))
    mirrored = [torch.equal(module.augmented(image), image.flip(3)) for _ in range(100)]
    assert 25 < sum(mirrored) < 75
    assert torch.equal(fitted(**PLAIN).augmented(image), image)


def test_a_crop_is_of_the_scale_asked_for(fitted):
    # In an image whose values are coordinates, the slope of a crop is its side.
    rows = torch.arange(64.0).view(1, 1, 64, 1).expand(1, 1, 64, 64)
    for scale in ((0.2, 0.3), (0.9, 1.0)):
        module = fitted(**(PLAIN | {"crop_scale": scale}))
        module._transforms[0].size = [64, 64]
        areas = []
        for _ in range(30):
            draw = torch.random.get_rng_state()
            down = module.augmented(rows)[0, 0]
            torch.random.set_rng_state(draw)
            right = module.augmented(rows.mT)[0, 0].T
            slopes = [float(side[40, 0] - side[24, 0]) / 16 for side in (down, right)]
            areas.append(slopes[0] * slopes[1])
        assert scale[0] - 0.03 < min(areas)
        assert max(areas) < scale[1] + 0.03


def test_gradients_reach_every_pixel_through_a_whole_crop(fitted):
    module = fitted(crop_scale=(1.0, 1.0))
    images = torch.randn(3, 1, 8, 8, requires_grad=True)
    torch.manual_seed(3)  # a crop of another shape leaves some out
    sum(module.augmented(images).sum() for _ in range(5)).backward()
    assert (images.grad > 0).all()


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [4, 6, 8])  # in the second of three blocks, at its end, and in the last, smaller one
def test_a_killed_run_goes_on_bit_for_bit(fitted, tmp_path, at):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == at:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")

    whole = fitted(iterations=3, block_classes=4, callbacks=[Save()])
    saved = torch.load(tmp_path / "killed.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"images", "labels"}
    watch = Watch(lambda trainer, module: module.iteration)
    resumed = fitted(iterations=3, block_classes=4, callbacks=[watch], ckpt_path=tmp_path / "killed.ckpt")
    assert watch.seen == list(range(at, 9))
    assert torch.equal(resumed.images, whole.images)


def test_what_is_left_is_rounded_and_says_where_it_is_from(fitted, tmp_path):
    module = fitted(per_class=2)
    module.distilled().save(tmp_path)
    found = SyntheticSet.load(tmp_path)
    assert found.images.dtype == torch.uint8
    by_hand = (module.images.detach() * 0.3760 + 0.3053) * 255
    assert (found.images - by_hand).abs().max() <= 0.5 + 1e-3
    assert found.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert module.footprint()["bytes"] == 20 * 65
    (member,) = found.description["members"]
    assert member["network"] == "DistillationConvNet"
    assert len(member["weights"]) == 16
    assert member["prior"] is None
    assert found.description["method"] == "SRe2L"
    assert found.description["iterations"] == 6


def test_networks_without_batch_normalization_go_without_its_term(fitted, small_net):
    watch = Watch(lambda _, module: set(module.terms))
    fitted(network=small_net(norm="instance"), bn_weight=0.0, callbacks=[watch])
    assert watch.seen[0] == {"ce_0"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"trained": {"max_steps": 5}},
            r"^trainer\.max_steps is 5; 1 block of 3 iterations take 3, set it to 3 \(and tr",
        ),
        (
            {"trained": {"max_steps": -1, "max_epochs": 1}, "block_classes": 4},
            r"3 blocks of 3 iterations take 9, set it",
        ),
        ({"recover_iterations": 0}, r"^model\.recover_iterations is 0; give 1 or more$"),
        ({"block_classes": 0}, r"^model\.block_classes is 0; give 1 or more$"),
        ({"bn_weight": -1.0}, r"^model\.bn_weight is -1\.0; give 0 or more$"),
        (
            {"crop_scale": (0.5, 0.1)},
            r"^model\.crop_scale is \[0\.5, 0\.1\]; give two shares in ascending order, or null$",
        ),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.ConstantLR},
            r"^model\.lr_scheduler: each block has its own cosine schedule; leave it out$",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(fitted, options, says):
    if "block_classes" in options and options["block_classes"] < 1:
        options = {**options, "trained": {"max_steps": 1}}
    with pytest.raises(UsageError, match=says):
        fitted(**options)


def test_the_network_must_fit(fitted, small_net):
    with pytest.raises(UsageError, match=r"^model: DistillationConvNet has no BatchNorm2d"):
        fitted(network=small_net(norm="instance"))
    with pytest.raises(UsageError, match=r"^model\.members have 4 classes, the data has 10; train them on this data$"):
        fitted(network=small_net(norm="batch", num_classes=4))
