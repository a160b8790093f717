import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger

from lit_distill.core.errors import UsageError
from lit_distill.dataset import synthesizer
from lit_distill.dataset.experts import ExpertBuffer, data_fingerprint
from lit_distill.dataset.losses import trajectory_distance
from lit_distill.dataset.methods.mtt import TrajectoryMatching
from lit_distill.dataset.models import DistillationConvNet
from lit_distill.dataset.synthetic import SyntheticSet
from lit_distill.dataset.unrolled import call_flat, flat_parameters, unrolled_sgd
from lit_distill.image import DigitsDataModule


def convnet(width=2, **kwargs):
    torch.manual_seed(0)
    return DistillationConvNet(10, width, 1, image_size=8, in_channels=1, **kwargs)


def digits(**kwargs):
    return DigitsDataModule(train_size=200, **kwargs)


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_the_distance_is_a_ratio_of_squared_norms():
    reached, start, target = torch.randn(3, 7).double()
    found = trajectory_distance(reached, start=start, target=target)
    a, b, c = (tensor.numpy() for tensor in (reached, start, target))
    assert found.item() == pytest.approx(np.square(a - c).sum() / np.square(b - c).sum())
    assert trajectory_distance(start, start=start, target=target).item() == 1
    assert trajectory_distance(target, start=start, target=target).item() == 0


def test_only_the_reached_parameters_get_a_gradient():
    reached, start, target = (torch.randn(7, requires_grad=True) for _ in range(3))
    trajectory_distance(reached, start=start, target=target).backward()
    expected = 2 * (reached - target) / (start - target).square().sum()
    torch.testing.assert_close(reached.grad, expected.detach())
    assert start.grad is None
    assert target.grad is None


# ---- unrolled steps ------------------------------------------------------------------------------------------------


def least_squares(parameters, inputs, wanted):
    return 0.5 * (inputs @ parameters - wanted).square().sum()


@pytest.fixture
def problem():
    """Inputs, wanted outputs, start, target, and a step size, in double precision."""
    generator = torch.Generator().manual_seed(4)
    inputs, wanted, start, target = (
        torch.randn(size, generator=generator).double() for size in ((6, 3), (6,), (3,), (3,))
    )
    return inputs.requires_grad_(), wanted, start, target, torch.tensor(0.05).double().requires_grad_()


@pytest.mark.parametrize("constant_memory", [False, True])
def test_the_slope_of_the_step_size_is_the_closed_form_of_least_squares(problem, constant_memory):
    inputs, wanted, start, target, lr = problem
    reached = unrolled_sgd(least_squares, start, [(inputs, wanted)], lr, constant_memory=constant_memory)
    trajectory_distance(reached, start=start, target=target).backward()
    x, y, a, c = (tensor.detach().numpy() for tensor in (inputs, wanted, start, target))
    gradient = x.T @ (x @ a - y)
    after = a - 0.05 * gradient
    torch.testing.assert_close(reached.detach(), torch.from_numpy(after), rtol=1e-6, atol=1e-6)
    assert lr.grad.item() == pytest.approx(-2 * (after - c) @ gradient / np.square(a - c).sum(), rel=1e-6)


@pytest.mark.parametrize("constant_memory", [False, True])
def test_steps_and_their_derivatives_are_those_of_a_loop_by_hand(constant_memory):
    network = convnet()
    start, target = flat_parameters(network), torch.randn(len(flat_parameters(network)))
    images = torch.randn(6, 1, 8, 8, requires_grad=True)
    lr = torch.tensor(0.3, requires_grad=True)
    logits = torch.randn(6, 10, requires_grad=True)
    parts = [torch.tensor(index) for index in ([0, 1, 2], [3, 4, 5], [2, 0, 1])]

    def loss(parameters, images, logits, index):
        return F.cross_entropy(call_flat(network, parameters, images[index]), logits[index].softmax(1))

    batches = [(images, logits, index) for index in parts]
    reached = unrolled_sgd(loss, start, batches, lr, constant_memory=constant_memory)
    trajectory_distance(reached, start=start, target=target).backward()

    twins = [tensor.detach().clone().requires_grad_() for tensor in (images, logits, lr)]
    names = [name for name, _ in network.named_parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    for index in parts:
        output = torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (twins[0][index],))
        value = -(twins[1][index].softmax(1) * output.log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(value, weights, create_graph=True)
        weights = [weight - twins[2] * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    by_hand = torch.cat([weight.flatten() for weight in weights])
    ((by_hand - target).square().sum() / (start - target).square().sum()).backward()
    torch.testing.assert_close(reached.detach(), by_hand.detach())
    assert (reached - start).norm() > 0.1
    for own, twin in zip((images, logits, lr), twins, strict=True):
        torch.testing.assert_close(own.grad, twin.grad, rtol=1e-4, atol=1e-7)
        assert own.grad.abs().sum() > 0


def test_constant_memory_differentiates_later_steps_by_earlier_batches(problem):
    inputs, wanted, start, target, lr = problem

    def gradient(value):
        x = torch.tensor(inputs.detach().numpy()).requires_grad_()
        with torch.no_grad():
            x[0, 0] += value
        batches = [(x, wanted), (2 * x, wanted), (x, 2 * wanted)]
        reached = unrolled_sgd(least_squares, start, batches, lr, constant_memory=True)
        loss = trajectory_distance(reached, start=start, target=target)
        loss.backward()
        return loss.item(), x.grad[0, 0].item()

    slope = (gradient(1e-5)[0] - gradient(-1e-5)[0]) / 2e-5
    assert gradient(0)[1] == pytest.approx(slope, rel=1e-6)
    # With the parameters of each step taken as constants (TESLA) it would be another one.
    x = torch.tensor(inputs.detach().numpy()).requires_grad_()
    parameters, total = start, torch.zeros(3).double()
    for batch in ((x, wanted), (2 * x, wanted), (x, 2 * wanted)):
        step = batch[0].T @ (batch[0] @ parameters.detach() - batch[1])
        total, parameters = total + step, parameters - 0.05 * step.detach()
    trajectory_distance(start - 0.05 * total, start=start, target=target).backward()
    assert abs(x.grad[0, 0].item() - slope) > 0.1 * abs(slope)


def nodes(result):
    found, open_ends = set(), [result.grad_fn]
    while open_ends:
        node = open_ends.pop()
        if node is not None and node not in found:
            found.add(node)
            open_ends += [following for following, _ in node.next_functions]
    return len(found)


def test_the_graph_of_steps_is_not_kept_in_constant_memory(problem):
    inputs, wanted, start, _, lr = problem
    sizes = {
        (kept, count): nodes(unrolled_sgd(least_squares, start, [(inputs, wanted)] * count, lr, constant_memory=kept))
        for kept in (False, True)
        for count in (1, 11)
    }
    assert sizes[True, 11] - sizes[True, 1] == 10  # one node for each step more
    assert sizes[False, 11] - sizes[False, 1] >= 50


# ---- the module ----------------------------------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path):
    """A folder with two experts, which move by a tenth of a standard normal in each of four epochs."""
    data = digits()
    data.setup()
    buffer = ExpertBuffer.create(tmp_path / "experts", convnet(), data_fingerprint(data), epochs=4, lr=0.1)
    for expert in range(2):
        steps = torch.randn(5, len(flat_parameters(convnet())), generator=torch.Generator().manual_seed(expert))
        buffer.write(expert, flat_parameters(convnet()) + 0.1 * steps.cumsum(0))
    return buffer


@pytest.fixture
def fitted(trainer, experts):
    """Builds a module after so many iterations."""

    def build(iterations=1, fit=None, ckpt_path=None, **kwargs):
        options = {"per_class": 1, "steps": 3, "max_start": 3, "step_size": 0.1, "student_epochs": 2, **kwargs}
        module = TrajectoryMatching(convnet(), str(experts.folder), **options)
        fit = fit or trainer(max_steps=iterations, max_epochs=-1)
        fit.fit(module, datamodule=digits(), ckpt_path=ckpt_path)
        return module

    return build


def step(module):
    return module.training_step(None, 0)


def test_the_loss_is_that_of_training_by_torch(fitted, experts):
    module = fitted(synthetic_batch=6, steps=5, step_size=0.2, operations="crop_cutout_rotate")
    torch.manual_seed(8)
    loss = step(module)
    # The same draws in the same order: expert, start, order of images, then augmentation.
    torch.manual_seed(8)
    expert, first = int(torch.randint(2, ())), int(torch.randint(3, ()))
    start, target = experts.read(expert, first, first + 2)
    order = [torch.randperm(10) for _ in range(3)]
    parts = [order[0][:6], order[0][6:], order[1][:6], order[1][6:], order[2][:6]]
    draws = [module.augmentation.draw(len(part)) for part in parts]
    network = convnet()
    torch.nn.utils.vector_to_parameters(start.clone(), network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), lr=float(module.step_size))
    for part, numbers in zip(parts, draws, strict=True):
        optimizer.zero_grad()
        images = module.augmentation(module.images.detach()[part], numbers)
        F.cross_entropy(network(images), module.labels[part]).backward()
        optimizer.step()
    reached = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    expected = (reached - target).square().sum() / (start - target).square().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not torch.equal(draws[0][0], draws[0][1])


def test_without_a_step_the_loss_is_1_and_at_the_target_it_is_0(fitted, monkeypatch):
    module = fitted()
    module.step_size.data.zero_()
    for _ in range(3):
        assert step(module).item() == 1
    module.step_size.data.fill_(0.2)
    network = copy.deepcopy(module.student).requires_grad_(True)
    start = flat_parameters(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(module.images.detach()), module.labels).backward()
        optimizer.step()
    monkeypatch.setattr(module, "draw_segment", lambda: [start, flat_parameters(network)])
    assert step(module).item() == pytest.approx(0, abs=1e-8)


def test_the_gradient_reaches_images_and_step_size_and_not_the_network(fitted):
    module = fitted()
    module.zero_grad()
    step(module).backward()
    assert module.images.grad.flatten(1).abs().sum(1).min() > 0
    assert module.step_size.grad.abs() > 0
    assert all(parameter.grad is None for parameter in module.student.parameters())


def test_segments_are_of_all_experts_and_starts(fitted, experts):
    module = fitted(max_start=2, expert_epochs=2)
    rows = {tuple(experts.read(e, s)[0].tolist()): (e, s) for e in range(2) for s in range(5)}
    drawn = [tuple(rows[tuple(row.tolist())] for row in module.draw_segment()) for _ in range(60)]
    assert {start for start, _ in drawn} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(target == (expert, epoch + 2) for (expert, epoch), target in drawn)


def test_all_images_have_had_their_turn_before_any_has_it_again(fitted):
    module = fitted(synthetic_batch=4, steps=7)
    parts = module.draw_indices()
    assert [len(part) for part in parts] == [4, 4, 2, 4, 4, 2, 4]
    for first in (0, 3):
        assert sorted(torch.cat(parts[first : first + 3]).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(parts[:3]), torch.cat(parts[3:6]))
    module.synthetic_batch = None
    assert all(len(part) == 10 for part in module.draw_indices())


def test_images_and_step_size_have_learning_rates_of_their_own(fitted):
    module = fitted(step_size_lr=0.003)
    groups = module.trainer.optimizers[0].param_groups
    assert [(group["params"][0] is module.images, group["lr"]) for group in groups] == [(True, 0.1), (False, 0.003)]
    assert groups[1]["params"][0] is module.step_size
    assert float(fitted(iterations=2, step_size_lr=0.0).step_size) == pytest.approx(0.1)


def test_the_step_size_stays_positive(fitted):
    for iterations in (1, 2, 3):
        module = fitted(iterations=iterations, step_size_lr=1e4)
        assert float(module.step_size) >= 1e-6 * (1 - 1e-6)
    assert any(float(fitted(iterations=n, step_size_lr=1e4).step_size) < 0.1 for n in (1, 2, 3))


def test_a_step_size_at_its_least_is_told(fitted):
    with pytest.warns(UserWarning, match=r"model.step_size fell to its least, 1e-06.*lower model.step_size_lr"):
        assert any(float(fitted(iterations=n, step_size_lr=1e4).step_size) < 0.1 for n in (1, 2, 3))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model.step_size")
        fitted(step_size_lr=1e-5)


def test_the_set_has_the_step_size_and_students_are_trained_at_it(fitted, trainer, tmp_path, monkeypatch):
    seen = []
    real = synthesizer.train_anew
    monkeypatch.setattr(
        synthesizer, "train_anew", lambda *args, **kwargs: seen.append(kwargs["lr"]) or real(*args, **kwargs)
    )
    fit = trainer(max_steps=2, max_epochs=-1, logger=CSVLogger(tmp_path, "r", "v"))
    module = fitted(fit=fit, step_size_lr=0.01)
    assert float(module.step_size) != pytest.approx(0.1, rel=1e-4)
    assert seen == [float(module.step_size)]
    found = SyntheticSet.load(tmp_path / "r" / "v" / "distilled")
    assert found.lr == float(module.step_size)
    assert torch.equal(found.images, module.images.detach())
    assert fit.test(module, datamodule=digits(), verbose=False)[0]["test/step_size"] == pytest.approx(found.lr)


def test_matching_comes_down(fitted, monkeypatch):
    module = fitted(per_class=2)
    network = copy.deepcopy(module.student).requires_grad_(True)
    start = flat_parameters(network)
    data = digits(batch_size=50)
    data.setup()
    for batch in data.train_dataloader():
        gradients = torch.autograd.grad(
            F.cross_entropy(network(batch.images), batch.labels), list(network.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    monkeypatch.setattr(module, "draw_segment", lambda: [start, flat_parameters(network)])
    before = step(module).item()
    optimizer = torch.optim.SGD(module.parameter_groups(), lr=5.0, momentum=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        step(module).backward()
        optimizer.step()
    assert step(module).item() < 0.5 * before


@pytest.mark.parametrize("constant_memory", [False, True])
def test_a_resumed_run_ends_with_the_same_set(trainer, fitted, tmp_path, constant_memory):
    options = {"operations": "crop_scale", "step_size_lr": 0.01, "constant_memory": constant_memory}
    whole = fitted(iterations=5, **options)
    half = trainer(max_steps=3, max_epochs=-1)
    fitted(fit=half, **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fitted(iterations=5, ckpt_path=tmp_path / "half.ckpt", **options)
    assert resumed.iteration == 5
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.step_size, whole.step_size)
    if constant_memory:
        torch.testing.assert_close(fitted(iterations=5, **{**options, "constant_memory": False}).images, whole.images)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, r"model\.steps is 0; give 1 or more"),
        ({"expert_epochs": 0}, r"model\.expert_epochs is 0; give 1 or more"),
        ({"synthetic_batch": 0}, r"model\.synthetic_batch is 0; give 1 or more"),
        ({"step_size": 0.0}, r"model\.step_size is 0\.0; it must be above 0"),
        ({"step_size_lr": -1.0}, r"model\.step_size_lr is -1\.0; give 0 or more"),
        ({"max_start": 4}, r"the last start is epoch 3, and 2 more are wanted; the experts have 4, lower one"),
        ({"experts": "/nowhere"}, r"model\.experts: /nowhere holds no experts"),
        ({"student": convnet(3)}, r"layer1\.0\.weight of shape \(2, 1, 3, 3\) where the student has"),
        ({"student": convnet(norm="batch")}, r"running_mean of DistillationConvNet is no parameter"),
        ({"per_class": 300}, r"model\.per_class is 300; the smallest class"),
    ],
)
def test_mistakes_are_told_in_one_line(trainer, experts, options, says):
    options = {"student": convnet(), "experts": str(experts.folder), "max_start": 3, **options}
    with pytest.raises(UsageError, match=says):
        trainer(max_steps=1).fit(TrajectoryMatching(**options), datamodule=digits())


def test_experts_of_other_data_are_refused(trainer, experts):
    module = TrajectoryMatching(convnet(), str(experts.folder), max_start=3)
    with pytest.raises(UsageError, match=r"was trained on other data \(samples was 200, now 100\)"):
        trainer(max_steps=1).fit(module, datamodule=DigitsDataModule(train_size=100))


def test_as_many_epochs_as_are_wanted_are_enough(fitted):
    assert fitted(max_start=3, expert_epochs=2).iteration == 1
