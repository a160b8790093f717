import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger

from lit_distill.core.errors import UsageError
from lit_distill.dataset import synthesizer
from lit_distill.dataset.experts import ExpertBuffer, data_fingerprint
from lit_distill.dataset.methods.datm import DifficultyAlignedTrajectoryMatching
from lit_distill.dataset.models import DistillationConvNet
from lit_distill.dataset.synthetic import SyntheticSet
from lit_distill.dataset.unrolled import flat_parameters
from lit_distill.image import DigitsDataModule


def convnet():
    torch.manual_seed(0)
    return DistillationConvNet(10, 8, 1, image_size=8, in_channels=1)


def digits():
    return DigitsDataModule(train_size=200, batch_size=50)


def trained(seed, epochs, data):
    """The trajectory of a network, by plain torch."""
    network = convnet()
    torch.manual_seed(seed)
    network.linear.reset_parameters()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    rows = [flat_parameters(network)]
    loader = data.train_dataloader()
    for epoch in range(epochs):
        loader.sampler.set_epoch(100 * seed + epoch)
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(batch.images), batch.labels).backward()
            optimizer.step()
        rows.append(flat_parameters(network))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A folder with three experts of twelve epochs: they classify most of the images, and not the same ones."""
    data = digits()
    data.setup()
    folder = tmp_path_factory.mktemp("run") / "experts"
    buffer = ExpertBuffer.create(folder, convnet(), data_fingerprint(data), epochs=12, lr=0.2)
    for expert in range(3):
        buffer.write(expert, trained(expert, 12, data))
    return buffer


def datm(experts, **kwargs):
    options = {"per_class": 2, "steps": 3, "max_start": 8, "step_size": 0.1, "student_epochs": 2, "threshold": 2.0}
    return DifficultyAlignedTrajectoryMatching(convnet(), str(experts.folder), **(options | kwargs))


@pytest.fixture
def fitted(trainer, experts):
    """Builds a module after so many iterations."""

    def build(iterations=1, fit=None, ckpt_path=None, buffer=experts, **kwargs):
        module = datm(buffer, **kwargs)
        fit = fit or trainer(max_steps=iterations, max_epochs=-1)
        fit.fit(module, datamodule=digits(), ckpt_path=ckpt_path)
        return module

    return build


def step(module):
    return module.training_step(None, 0)


def last_logits(buffer, expert, images):
    network = convnet()
    torch.nn.utils.vector_to_parameters(buffer.read(expert, buffer.epochs)[0], network.parameters())
    with torch.no_grad():
        return network(images)


# ---- where it begins -----------------------------------------------------------------------------------------------


def test_images_begin_as_real_ones_that_the_first_expert_classifies_correctly(fitted, experts):
    module = fitted(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    images = module.images.detach()
    assert torch.equal(last_logits(experts, 0, images).argmax(1), module.labels)
    data = digits()
    data.setup()
    pixels, labels = data.part("train")
    real = data.normalize(pixels)
    place = [(real == image).flatten(1).all(1).nonzero()[0, 0] for image in images]
    assert torch.equal(labels[torch.stack(place)], module.labels)
    assert len(set(map(int, place))) == 20


def test_labels_begin_as_the_mean_over_the_experts_that_are_right(fitted, experts):
    module = fitted(label_lr=1e-20, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), per_class=12)
    logits = [last_logits(experts, expert, module.images.detach()) for expert in range(3)]
    partly = 0
    for place, label in enumerate(module.labels.tolist()):
        right = [rows[place] for rows in logits if int(rows[place].argmax()) == label]
        partly += len(right) < 3
        torch.testing.assert_close(module.soft_labels.detach()[place], sum(right) / len(right), rtol=1e-4, atol=1e-5)
    assert partly > 0  # else the mean over all would do


def test_the_next_expert_is_asked_where_the_first_knows_too_few(fitted, experts, tmp_path):
    rows = experts.read(0, *range(13))
    worse = ExpertBuffer(tmp_path / "experts", experts.description)
    worse.create(worse.folder, convnet(), experts.description["data"], epochs=12, lr=0.2)
    blind = torch.zeros_like(torch.stack(rows))
    blind[:, -10] = 1.0  # the bias of class 0: there all is right
    worse.write(0, blind)
    with pytest.raises(
        UsageError, match=r"they classify 0 training images of class 1 correctly, model\.per_class is 2"
    ):
        fitted(buffer=worse)
    worse.write(1, torch.stack(rows))
    module = fitted(buffer=worse, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    found = last_logits(worse, 1, module.images.detach()).argmax(1)
    assert torch.equal(found[module.labels > 0], module.labels[module.labels > 0])


# ---- training ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_to_the_softmax_of_the_labels(fitted, experts):
    module = fitted()
    torch.manual_seed(6)
    loss = step(module)
    torch.manual_seed(6)
    start, target = module.draw_segment()
    network = convnet()
    torch.nn.utils.vector_to_parameters(start.clone(), network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), lr=float(module.step_size.detach()))
    for _ in range(3):
        optimizer.zero_grad()
        logits = network(module.images.detach())
        (-(module.soft_labels.detach().softmax(1) * logits.log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
    reached = flat_parameters(network)
    expected = (reached - target).square().sum() / (start - target).square().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("constant_memory", [False, True])
def test_the_gradient_reaches_the_labels(fitted, constant_memory):
    # In later steps ReLUs switch, where differences are no slopes; test_mtt has several steps, by hand.
    module = fitted(constant_memory=constant_memory, steps=1)
    module.zero_grad()

    def loss():
        torch.manual_seed(3)
        return step(module)

    loss().backward()
    gradient = module.soft_labels.grad.clone()
    direction = gradient / gradient.norm()
    with torch.no_grad():
        module.soft_labels += 0.1 * direction
        upper = loss().item()
        module.soft_labels -= 0.2 * direction
    slope = (upper - loss().item()) / 0.2
    assert slope == pytest.approx(float(gradient.norm()), rel=0.02)
    assert module.images.grad.abs().sum() > 0


def test_the_range_of_start_epochs_grows(fitted):
    module = fitted(min_start=1, first_max_start=3, max_start=8, growth=100)
    bounds = {}
    for module.iteration in (0, 19, 20, 50, 99, 100, 1000):
        epochs = module.start_epochs()
        assert epochs.start == 1
        bounds[module.iteration] = epochs.stop
    assert bounds == {0: 3, 19: 3, 20: 4, 50: 5, 99: 7, 100: 8, 1000: 8}
    module = fitted(min_start=2)
    assert module.start_epochs() == range(2, 8)


def test_segments_start_inside_the_range(fitted, experts):
    module = fitted(min_start=2, max_start=4)
    module.iteration = 10**6
    rows = {tuple(experts.read(e, s)[0].tolist()): s for e in range(3) for s in range(13)}
    drawn = [tuple(rows[tuple(row.tolist())] for row in module.draw_segment()) for _ in range(40)]
    assert set(drawn) == {(2, 4), (3, 5)}


def test_no_step_is_taken_above_the_threshold(fitted):
    before = fitted(iterations=1, threshold=1e-6)
    after = fitted(iterations=4, threshold=1e-6)
    assert after.iteration == 4
    for name in ("images", "soft_labels", "step_size"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert not after.trainer.optimizers[0].state  # no momentum was gathered
    assert not torch.equal(fitted(iterations=1, threshold=2.0).images, before.images)


def test_the_threshold_decides_each_step(fitted, monkeypatch):
    steps = []
    real = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a, **k: steps.append(1) or real(self, *a, **k))
    losses = []
    combine = DifficultyAlignedTrajectoryMatching.combine
    monkeypatch.setattr(
        DifficultyAlignedTrajectoryMatching,
        "combine",
        lambda self, terms: losses.append(float(terms["match"].detach())) or combine(self, terms),
    )
    fitted(iterations=10, threshold=100.0, student_epochs=1, label_lr=1e-20, step_size_lr=0.0, optimizer=still)
    assert len(losses) == 10
    median = sorted(losses)[4]
    assert len(steps) - 1 == 10  # the other is the student's
    del steps[:]
    fitted(iterations=10, threshold=median, student_epochs=1, label_lr=1e-20, step_size_lr=0.0, optimizer=still)
    assert losses[10:] == losses[:10]
    assert len(steps) - 1 == 5


def still(groups):
    return torch.optim.SGD(groups, lr=0.0)


def test_labels_have_learning_rate_and_momentum_of_their_own(fitted):
    module = fitted(label_lr=0.7, label_momentum=0.6)
    groups = {
        id(group["params"][0]): (group["lr"], group["momentum"]) for group in module.trainer.optimizers[0].param_groups
    }
    assert groups[id(module.soft_labels)] == (0.7, 0.6)
    assert groups[id(module.images)] == (0.1, 0.5)
    assert groups[id(module.step_size)] == (1e-5, 0.5)


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_the_set_has_soft_labels_and_students_learn_them(fitted, trainer, tmp_path, monkeypatch):
    seen = []
    real = synthesizer.train_anew
    monkeypatch.setattr(
        synthesizer, "train_anew", lambda *args, **kw: seen.append((args[2], kw["lr"])) or real(*args, **kw)
    )
    module = fitted(fit=trainer(max_steps=2, max_epochs=-1, logger=CSVLogger(tmp_path, "r", "v")))
    found = SyntheticSet.load(tmp_path / "r" / "v" / "distilled")
    assert torch.equal(found.soft_labels, module.soft_labels.detach())
    assert found.labels.tolist() == [number // 2 for number in range(20)]
    assert found.footprint()["label_bytes"] == 20 * 10 * 4
    ((labels, lr),) = seen
    torch.testing.assert_close(labels, found.soft_labels.exp() / found.soft_labels.exp().sum(1, keepdim=True))
    assert lr == found.lr == float(module.step_size.detach())


def test_a_resumed_run_ends_with_the_same_set(trainer, fitted, tmp_path):
    options = {"first_max_start": 1, "growth": 4, "label_lr": 1.0}
    whole = fitted(iterations=5, **options)
    half = trainer(max_steps=3, max_epochs=-1)
    fitted(fit=half, **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fitted(iterations=5, ckpt_path=tmp_path / "half.ckpt", **options)
    for name in ("images", "soft_labels", "step_size"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_start": 8}, r"model\.min_start, model\.first_max_start, model\.max_start are 8, 8, 8; each range"),
        ({"first_max_start": 9}, "are 0, 9, 8; each range of epochs"),
        ({"min_start": -1}, "are -1, 8, 8; each range"),
        ({"growth": 0}, r"model\.growth is 0; it must be above 0"),
        ({"label_lr": 0.0}, r"model\.label_lr is 0\.0; it must be above 0"),
        ({"threshold": -1.0}, r"model\.threshold is -1\.0; it must be above 0"),
        ({"max_start": 12}, r"the last start is epoch 11, and 2 more are wanted; the experts have 12"),
        ({"per_class": 30}, r"model\.per_class is 30; the smallest class"),
    ],
)
def test_mistakes_are_told_in_one_line(fitted, options, says):
    with pytest.raises(UsageError, match=says):
        fitted(**options)
