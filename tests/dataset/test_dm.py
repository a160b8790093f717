import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.dataset.losses import mean_distance
from lit_distill.dataset.methods.dm import DistributionMatching
from lit_distill.dataset.models import DistillationConvNet
from lit_distill.image.data import DigitsDataModule


class Linear(nn.Module):
    """An embedding that is linear in the pixels, for closed forms."""

    penultimate = "embedding"

    def __init__(self):
        super().__init__()
        self.flat = nn.Flatten()
        self.embedding = nn.Linear(64, 5, bias=False)
        self.head = nn.Linear(5, 10)

    def forward(self, images):
        return self.head(self.embedding(self.flat(images)))


def convnet(norm="instance"):
    torch.manual_seed(0)
    return DistillationConvNet(10, width=8, depth=2, norm=norm, image_size=8, in_channels=1)


@pytest.fixture
def fitted(trainer):
    """Builds a module after so many iterations."""

    def build(student=None, steps=1, **kwargs):
        options = {"per_class": 3, "real_batch": 7, "student_epochs": 2, **kwargs}
        module = DistributionMatching(student or convnet(), **options)
        trainer(max_steps=steps, max_epochs=-1).fit(module, datamodule=DigitsDataModule())
        module.images.grad = None
        return module

    return build


@pytest.fixture
def drawn(monkeypatch):
    """Records the real images that are drawn."""
    found = []
    real_images = DistributionMatching.real_images
    monkeypatch.setattr(
        DistributionMatching,
        "real_images",
        lambda self, number, count: found.append(real_images(self, number, count)) or found[-1],
    )
    return found


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_the_distance_is_that_of_the_means():
    synthetic, real = torch.randn(3, 4), torch.randn(7, 4)
    gap = synthetic.double().numpy().mean(0) - real.double().numpy().mean(0)
    assert float(mean_distance(synthetic, real)) == pytest.approx((gap**2).sum(), rel=1e-5)
    # The discrepancy under a linear kernel, by its kernel sums.
    kernels = [(a.double() @ b.double().T).mean() for a, b in ((real, real), (synthetic, synthetic), (real, synthetic))]
    assert float(mean_distance(synthetic, real)) == pytest.approx(float(kernels[0] + kernels[1] - 2 * kernels[2]))
    assert float(mean_distance(real.flip(0), real)) == pytest.approx(0, abs=1e-10)


def test_the_real_side_gets_no_gradient():
    synthetic, real = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    mean_distance(synthetic, real).backward()
    gap = synthetic.detach().mean(0) - real.detach().mean(0)
    torch.testing.assert_close(synthetic.grad, (2 / 3 * gap).expand(3, -1))
    assert real.grad is None


def test_a_linear_embedding_has_the_gradient_of_the_closed_form(fitted, drawn):
    module = fitted(Linear())
    del drawn[:]
    module.training_step(None, 0).backward()
    weight = module.student.embedding.weight.detach()
    for number in range(10):
        rows = slice(3 * number, 3 * number + 3)
        gap = drawn[number].flatten(1).mean(0) - module.images.detach()[rows].flatten(1).mean(0)
        expected = -(2 / 3) * weight.T @ weight @ gap
        for own in module.images.grad[rows].flatten(1):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("operations", ["none", "color_crop_cutout_scale_rotate"])
def test_equal_sets_have_loss_0_under_common_draws(fitted, norm, operations):
    module = fitted(convnet(norm), operations=operations)
    module.real_images = lambda number, count: module.of_class(number).detach()
    for _ in range(5):  # several operations
        assert float(module.training_step(None, 0).detach()) == pytest.approx(0, abs=1e-8)
    module.real_images = lambda number, count: module.of_class((number + 1) % 10).detach()
    assert float(module.training_step(None, 0).detach()) > 1e-3


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_classes_are_embedded_together_where_the_network_normalizes_over_the_batch(fitted, drawn, norm):
    module = fitted(convnet(norm))
    sizes = []
    hook = module.student.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    del drawn[:]
    loss = module.training_step(None, 0).detach()
    hook.remove()
    assert sizes == ([70, 30] if norm == "batch" else [7, 3] * 10)
    embed = module.student.train().embed
    with torch.no_grad():
        own, real = embed(module.images), embed(torch.cat(drawn))
    gaps = own.view(10, 3, -1).mean(1) - real.view(10, 7, -1).mean(1)
    torch.testing.assert_close(loss, gaps.square().sum(), rtol=1e-4, atol=1e-6)


def test_one_draw_for_each_class_is_common_to_real_and_synthetic_images(fitted, monkeypatch):
    module = fitted(operations="crop_rotate")
    seen = []
    augment = type(module.augmentation).__call__
    monkeypatch.setattr(
        type(module.augmentation),
        "__call__",
        lambda self, images, draws: seen.append((len(images), draws)) or augment(self, images, draws),
    )
    module.training_step(None, 0)
    draws = {size: [tuple(d[0].tolist()) for own, d in seen if own == size] for size in (3, 7)}
    assert draws[3] == draws[7]
    assert len(set(draws[3])) == 10
    assert all(len(d) == 1 for _, d in seen)


# ---- the run -------------------------------------------------------------------------------------------------------


def test_the_network_is_drawn_anew_each_iteration_and_never_trained(trainer, fitted, monkeypatch):
    seen = []
    embed = DistributionMatching.embed_classes
    monkeypatch.setattr(
        DistributionMatching,
        "embed_classes",
        lambda self, classes: seen.append(self.student.layer1[0].weight.clone()) or embed(self, classes),
    )
    fitted(steps=3)
    assert len(seen) == 60  # real and synthetic images of ten classes
    assert all(torch.equal(seen[20 * step], weight) for step in range(3) for weight in seen[20 * step :][:20])
    assert not torch.equal(seen[0], seen[20])
    assert not torch.equal(seen[20], seen[40])
    bound = 1 / 3  # as torch draws a 3x3 filter of one channel
    assert all(weight.abs().max() <= bound for weight in seen)


def test_only_the_images_get_a_gradient_and_the_real_side_has_no_graph(fitted, monkeypatch):
    module = fitted()
    sides = []
    embed = DistributionMatching.embed_classes
    monkeypatch.setattr(
        DistributionMatching, "embed_classes", lambda self, own: sides.append(embed(self, own)) or sides[-1]
    )
    module.training_step(None, 0).backward()
    assert [values[0].requires_grad for values in sides] == [False, True] * 10
    # By hand, with the weights that the step has left: d/dx of the squared distance of two means.
    twin = module.images.detach().clone().requires_grad_()
    own = [module.student.embed(images).mean(0) for images in twin.split(module.per_class)]
    real = [values[0].detach().mean(0) for values in sides[::2]]
    torch.stack([((mean - other) ** 2).sum() for mean, other in zip(own, real, strict=True)]).sum().backward()
    torch.testing.assert_close(module.images.grad, twin.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in module.student.parameters())


def test_matching_comes_down(fitted):
    module = fitted(init="noise", real_batch=32)

    def match():
        torch.manual_seed(9)
        return float(module.training_step(None, 0).detach())

    before = match()
    optimizer = torch.optim.SGD([module.images], lr=1.0, momentum=0.5)
    for _ in range(12):
        optimizer.zero_grad()
        module.training_step(None, 0).backward()
        optimizer.step()
    assert match() < 0.5 * before


def test_a_resumed_run_ends_with_the_same_images(trainer, fitted, tmp_path):
    def build():
        return DistributionMatching(convnet(), per_class=3, real_batch=7, student_epochs=2, operations="color_crop")

    whole = fitted(steps=4, operations="color_crop")
    half = trainer(max_steps=2, max_epochs=-1)
    half.fit(build(), datamodule=DigitsDataModule())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = build()
    trainer(max_steps=4, max_epochs=-1).fit(resumed, datamodule=DigitsDataModule(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.images, whole.images)


def test_mistakes_are_told_in_one_line():
    with pytest.raises(UsageError, match=r"model\.real_batch is 0; give 1 or more"):
        DistributionMatching(convnet(), real_batch=0)
