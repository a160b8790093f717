"""The base of methods that learn images: what it begins with, what it draws, what it keeps, and how it resumes."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_distill.core.errors import UsageError
from lit_distill.dataset import DatasetSynthesizer, SyntheticSet
from lit_distill.dataset.training import train_anew


class TowardsMean(DatasetSynthesizer):
    """Pulls each class to the mean of some real images: a method simple enough to know its result."""

    def training_step(self, batch, batch_idx):
        gaps = [
            (self.of_class(number) - self.real_images(number, 8).mean(0)).square().sum()
            for number in range(self.num_classes)
        ]
        return self.combine({"match": torch.stack(gaps).sum()})


@pytest.fixture
def method(small_net):
    def build(**kwargs):
        return TowardsMean(small_net(), **({"per_class": 2, "student_epochs": 3} | kwargs))

    return build


def started(module, trainer, data, **kwargs):
    trainer(max_epochs=0, **kwargs).fit(module, datamodule=data)
    return module


def test_begins_with_real_images_of_each_class(method, trainer, digits):
    data = digits()
    module = started(method(), trainer, data)
    images, labels = data.part("train")
    real = data.normalize(images)
    assert module.labels.tolist() == [label for label in range(10) for _ in range(2)]
    for image, label in zip(module.images, module.labels, strict=True):
        same = (real == image).flatten(1).all(1)
        assert (labels[same] == label).any()
    assert len(module.images.flatten(1).unique(dim=0)) == 20


def test_begins_with_noise(method, trainer, digits):
    module = started(method(init="noise", per_class=50), trainer, digits())
    assert abs(module.images.mean().item()) < 0.05
    assert module.images.std().item() == pytest.approx(1.0, abs=0.05)


def test_the_set_of_one_image_is_the_first_of_that_of_two(method, trainer, digits):
    one, two = (started(method(per_class=count), trainer, digits()) for count in (1, 2))
    assert torch.equal(one.images, two.images[::2])


def test_real_images_are_of_the_class_and_not_repeated(method, trainer, digits):
    data, module = digits(), method()
    trainer(max_steps=1).fit(module, datamodule=data)
    images, labels = data.part("train")
    own = data.normalize(images[labels == 3])
    drawn = module.real_images(3, 12)
    assert all((own == image).flatten(1).all(1).any() for image in drawn)
    assert len(drawn.flatten(1).unique(dim=0)) == 12
    assert len(module.real_images(3, 10_000)) == len(own)
    assert not torch.equal(module.real_images(3, 12), drawn)


def test_only_the_images_are_trained(method, trainer, digits):
    module = method()
    trainer(max_steps=2).fit(module, datamodule=digits())
    optimizer = module.optimizers().optimizer
    assert [parameter is module.images for group in optimizer.param_groups for parameter in group["params"]] == [True]
    assert not any(parameter.requires_grad for parameter in module.student.parameters())


def test_step_is_the_optimizers(small_net, trainer, digits):
    seen = {}

    class Watched(TowardsMean):
        def training_step(self, batch, batch_idx):
            seen["before"] = self.images.detach().clone()
            state = torch.random.get_rng_state()
            seen["means"] = torch.stack([self.real_images(number, 8).mean(0) for number in range(10)])
            torch.random.set_rng_state(state)
            return super().training_step(batch, batch_idx)

    module = Watched(small_net(), per_class=2, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.25))
    trainer(max_steps=1).fit(module, datamodule=digits())
    # d/dx ||x - m||^2 = 2 (x - m): a rate of 1/4 goes half the way. of_class gives both images of a class.
    expected = (seen["before"] + seen["means"].repeat_interleave(2, 0)) / 2
    assert torch.allclose(module.images.detach(), expected, atol=1e-6)


def test_the_run_keeps_set_and_picture(method, trainer, digits, tmp_path):
    module, data = method(), digits()
    fit = trainer(max_steps=2, logger=CSVLogger(tmp_path, name="", version="run"))
    fit.fit(module, datamodule=data)
    kept = SyntheticSet.load(tmp_path / "run" / "distilled")
    assert torch.equal(kept.images, module.images.detach())
    assert kept.description["method"] == "TowardsMean"
    assert kept.description["iterations"] == 2
    assert module.panels["picture"]["file"] == "distilled/images.png"
    assert (tmp_path / "run" / module.panels["picture"]["file"]).is_file()


def test_validation_and_test_train_a_student_on_the_set(method, trainer, digits):
    module, data = method(student_epochs=5), digits()
    fit = trainer(max_steps=2, limit_val_batches=1.0)
    fit.fit(module, datamodule=data)
    logged = fit.test(module, datamodule=data, verbose=False)[0]
    images, labels = data.part("test")
    with torch.no_grad():
        right = (module.student(data.normalize(images)).argmax(1) == labels).float().mean()
    assert logged["test/acc"] == pytest.approx(right.item(), abs=1e-6)
    assert logged["test/bytes"] == 20 * 64 * 4 + 20
    weights = [parameter.clone() for parameter in module.student.parameters()]
    module.train_student()  # nothing has changed since
    assert all(torch.equal(a, b) for a, b in zip(weights, module.student.parameters(), strict=True))
    module.iteration += 1
    module.train_student()
    assert not all(torch.equal(a, b) for a, b in zip(weights, module.student.parameters(), strict=True))


def test_checkpoint_holds_the_set_and_not_the_student(method, trainer, digits, tmp_path):
    whole, half, resumed = (method() for _ in range(3))
    trainer(max_epochs=3, max_steps=6).fit(whole, datamodule=digits())
    fit = trainer(max_epochs=3, max_steps=4)
    fit.fit(half, datamodule=digits())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"images", "labels"}
    trainer(max_epochs=3, max_steps=6).fit(resumed, datamodule=digits(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(resumed.images, whole.images)
    assert not torch.equal(half.images, whole.images)


def test_training_follows_the_protocol(small_net):
    images, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    network, by_hand = small_net(), small_net(seed=1)
    torch.manual_seed(5)
    train_anew(network, images, labels, epochs=4, lr=0.1, batch_size=8)
    torch.manual_seed(5)
    for module in by_hand.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    velocity = [torch.zeros_like(parameter) for parameter in by_hand.parameters()]
    for epoch in range(4):
        order = torch.randperm(12)
        for rows in (order[:8], order[8:]):
            loss = torch.nn.functional.cross_entropy(by_hand(images[rows]), labels[rows])
            gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
            with torch.no_grad():
                for place, (parameter, gradient) in enumerate(zip(by_hand.parameters(), gradients, strict=True)):
                    velocity[place] = 0.9 * velocity[place] + gradient + 5e-4 * parameter
                    parameter -= (0.1 if epoch < 2 else 0.01) * velocity[place]
    for found, expected in zip(network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, r"model\.per_class is 0"),
        ({"student_epochs": 0}, r"model\.student_epochs is 0"),
        ({"operations": "color_blur"}, "there is no 'blur'"),
    ],
)
def test_mistakes(options, message, method):
    with pytest.raises(UsageError, match=message):
        method(**options)


def test_more_images_than_there_are(method, trainer, digits):
    with pytest.raises(UsageError, match=r"model\.per_class is 60; the smallest class \(number \d\) has \d+ images"):
        started(method(per_class=60), trainer, digits())


def test_a_network_that_cannot_be_drawn_anew(trainer, digits):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    network.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UsageError, match=r"model\.student: scale cannot be drawn anew"):
        started(TowardsMean(network), trainer, digits())
