"""ADD: the penalty against finite differences, and an iteration against the one written by hand."""

import copy

import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.add import ADD
from lit_distill.diffusion.paths import CosinePath, EDMPath, FlowPath
from lit_distill.diffusion.projection import ProjectionDiscriminator, ProjectionHead, exact_r1
from lit_distill.diffusion.times import TimeSampler


def test_the_penalty_is_that_of_finite_differences():
    torch.manual_seed(0)
    heads = [ProjectionHead(3, 4).double() for _ in range(2)]
    features, labels = [torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(2)], torch.tensor([1, 3])

    def norm(head, feature, step=1e-5):
        total = 0.0
        for place in torch.cartesian_prod(torch.arange(5), torch.arange(3)):
            there = feature.clone(), feature.clone()
            there[0][:, place[0], place[1]] += step
            there[1][:, place[0], place[1]] -= step
            total = total + ((head(there[0], labels) - head(there[1], labels)) / (2 * step)) ** 2
        return total.mean()

    expected = 0.5 * (norm(heads[0], features[0]) + norm(heads[1], features[1])) / 2
    given = [feature.clone().requires_grad_() for feature in features]
    found = exact_r1(torch.stack([head(f, labels) for head, f in zip(heads, given, strict=True)], 1), given)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()  # trains the heads
    assert heads[0].layers[0].weight.grad.abs().sum() > 0


def test_the_penalty_of_a_line_is_half_its_squared_slope():
    x = torch.randn(7, 2, requires_grad=True)
    logits = (x @ torch.tensor([3.0, -4.0]))[:, None]
    assert exact_r1(logits, [x]).item() == pytest.approx(12.5)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (6, 2, 2)])
def test_the_condition_comes_in_by_projection(shape):
    torch.manual_seed(0)
    head, feature, labels = ProjectionHead(6, 3), torch.randn(2, *shape), torch.tensor([2, 0])
    rows = feature.flatten(2).mT if len(shape) == 3 else feature.view(2, -1, 6)
    expected = []
    for row, label in zip(rows, labels, strict=True):
        hidden = nn.functional.leaky_relu(row @ head.layers[0].weight.T + head.layers[0].bias, 0.2)
        logits = hidden @ head.last.weight[0] + head.last.bias + hidden @ head.classes.weight[label] / 6**0.5
        expected.append(logits.mean())
    torch.testing.assert_close(head(feature, labels), torch.stack(expected))
    assert not torch.equal(head(feature, labels), head(feature, labels.flip(0)))
    torch.testing.assert_close(head(feature), ProjectionDiscriminatorWithout(head)(feature))


class ProjectionDiscriminatorWithout(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.discriminator = ProjectionDiscriminator({"a": (6,)})
        self.discriminator.heads[0].load_state_dict(
            {name: value for name, value in head.state_dict().items() if not name.startswith("classes")}
        )

    def forward(self, feature):
        return self.discriminator([feature])[:, 0]


def images():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 6, 3, stride=2), nn.SiLU(), nn.Flatten()
    )


@pytest.fixture
def build(make_denoiser, little):
    def make(**options):
        options = {"steps": [2.5], "image_taps": ["1", "3"], "evaluation": little, "r1_weight": 0.5, **options}
        return ADD(make_denoiser(1), make_denoiser(0), image_network=images(), **options)

    return make


def test_an_iteration_is_the_one_written_by_hand(trainer, digits, build):
    module = build(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), clip_norm=None, guidance=1.5)
    g, f, network = (copy.deepcopy(own) for own in (module.student, module.teacher, module.image_network))
    fit = trainer(limit_train_batches=1)
    module.trainer, fit.datamodule = fit, digits
    digits.setup()
    module.configure_model()
    head = copy.deepcopy(module.head)
    fit.fit(module, datamodule=digits)

    batch = next(iter(digits.train_dataloader()))
    real, labels = batch.images, batch.labels
    draws = Draws(derived_seed("step", 0, 0))

    def logits(features):
        return torch.stack([own(x, labels) for own, x in zip(head.heads, features, strict=True)], 1)

    def features(x):
        return [network[:2](x), network[:4](x)]

    x = g(2.5 * draws.normal(real.shape), 2.5, labels)
    t = 0.002 + (0.02 + 0.96 * draws.uniform(8)) * (80 - 0.002)
    with torch.no_grad():
        x_t = x + t.float().view(-1, 1, 1, 1) * draws.normal(x.shape)
        cond, uncond = f(x_t, t, labels), f(x_t, t, torch.full_like(labels, 10))
        target = uncond + 1.5 * (cond - uncond)
    c = (1 / (1 + t**2).sqrt()).float().view(-1, 1, 1, 1)
    loss = -logits(features(x)).mean() + 2.5 * (c * (x - target).square()).mean()
    gradients = torch.autograd.grad(loss, list(g.parameters()))
    for old, gradient, new in zip(g.parameters(), gradients, module.student.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=1e-3, atol=1e-6)
    relu = nn.functional.relu
    true = [feature.detach().requires_grad_() for feature in features(real)]
    loss = relu(1 + logits(features(x.detach()))).mean() + relu(1 - logits(true)).mean()
    slopes = torch.autograd.grad(logits(true).sum(), true, create_graph=True)
    loss = loss + 0.5 * 0.5 * sum(slope.flatten(1).square().sum(1).mean() for slope in slopes) / 2
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    for old, gradient, new in zip(head.parameters(), gradients, module.head.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=2e-3, atol=1e-5)
    for own, was in ((module.teacher, f), (module.image_network, network)):
        for new, old in zip(own.parameters(), was.parameters(), strict=True):
            assert torch.equal(new, old)


@pytest.mark.parametrize(("path", "prediction"), [(EDMPath(), "edm"), (FlowPath(), "u"), (CosinePath(), "v")])
def test_the_weight_is_alpha_of_the_variance_preserving_path(make_denoiser, little, path, prediction):
    """The same noise ratio of 2 on three paths: alpha = 1 / sqrt(5)."""

    class Two(TimeSampler):
        def __call__(self, count, path, draws):
            return path.t_from_r(torch.full((count,), 2.0))

    module = ADD(
        make_denoiser(1, path, prediction), make_denoiser(0, path, prediction), [float(path.t_max)], images(), ["1"],
        evaluation=little, distillation_times=Two(),
    )  # fmt: skip
    for network in (module.student, module.teacher):
        network.time_input = "saturating"
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    found = module.distil(x, labels, Draws(2))
    t = path.t_from_r(torch.full((4,), 2.0))
    with torch.no_grad():
        target = module.teacher(path.add_noise(x, Draws(2).normal(x.shape), t), t, labels)
    assert found.item() == pytest.approx((x - target).square().mean().item() / 5**0.5, rel=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(check_resumed, build):
    module = check_resumed(lambda: build(steps=[2.5, 0.8], head_updates=2))
    assert {"gan", "distillation", "discriminator", "r1"} >= set(module.terms) > {"discriminator"}


def test_the_image_network_is_no_part_of_checkpoints(trainer, digits, build, tmp_path):
    module = build()
    fit = trainer(limit_train_batches=1)
    fit.fit(module, datamodule=digits)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"student", "head"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_taps": []}, "model.image_taps: none are given"),
        ({"distillation_weight": -1.0}, "model.distillation_weight is -1.0"),
    ],
)
def test_mistakes_are_told(build, options, message):
    with pytest.raises(UsageError, match=message):
        build(**options)
