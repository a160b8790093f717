"""Several networks side by side are several networks: each learns what it would have learned alone."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.dataset import DistilledImages, DistilledSetEvaluation, RandomSubset
from lit_distill.dataset.evaluation import soft_label_loss
from lit_distill.image.data import ImageBatch
from lit_distill.image.models import MLP


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


@pytest.fixture
def data(digits):
    def build(**kwargs):
        return RandomSubset(digits(), **({"per_class": 4, "batch_size": 16, "seed": 3} | kwargs))

    return build


def test_each_network_learns_as_if_alone(data, small_net, trainer):
    module = DistilledSetEvaluation(small_net(), repeats=3, optimizer=sgd)
    trainer(max_epochs=2).fit(module, datamodule=data())
    for number in (0, 2):
        alone = DistilledSetEvaluation(small_net(), repeats=3, optimizer=sgd)
        fit = trainer(max_epochs=0)
        fit.fit(alone, datamodule=data())
        network = alone.networks()[number]
        optimizer = sgd(network.parameters())
        source = data()
        loader = source.train_dataloader()
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                optimizer.zero_grad()
                F.cross_entropy(network(batch.images), batch.labels).backward()
                optimizer.step()
        for found, expected in zip(module.networks()[number].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_networks_differ_and_repeat(data, small_net, trainer):
    weights = []
    for _ in range(2):
        module = DistilledSetEvaluation(small_net(), repeats=2, others={"mlp": MLP(64, 10, [8])}, optimizer=sgd)
        trainer(max_epochs=0).fit(module, datamodule=data())
        assert [type(network).__name__ for network in module.networks()] == ["DistillationConvNet"] * 2 + ["MLP"] * 2
        weights.append([next(network.parameters()).clone() for network in module.networks()])
    assert not torch.equal(weights[0][0], weights[0][1])
    assert not torch.equal(weights[0][2], weights[0][3])
    assert all(torch.equal(first, second) for first, second in zip(*weights, strict=True))


def test_what_is_logged(data, small_net, trainer, tmp_path):
    for name, accuracy in (("real", 0.9), ("random", 0.05)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"metrics": {"test/acc": accuracy}}))
    module = DistilledSetEvaluation(
        small_net(),
        repeats=3,
        others={"mlp": MLP(64, 10, [8])},
        runs={name: str(tmp_path / name) for name in ("real", "random")},
        optimizer=sgd,
    )
    source = data()
    fit = trainer(max_epochs=1)
    fit.fit(module, datamodule=source)
    logged = fit.test(module, datamodule=source, verbose=False)[0]
    images, labels = source.source.part("test")
    images = source.source.normalize(images)
    with torch.no_grad():
        hits = [(network.eval()(images).argmax(1) == labels).float().mean() for network in module.networks()]
    hits = torch.stack(hits).view(2, 3).double()
    assert logged["test/acc"] == pytest.approx(hits[0].mean().item(), abs=1e-6)
    assert logged["test/acc_std"] == pytest.approx(hits[0].std().item(), abs=1e-6)
    assert logged["test/mlp_acc"] == pytest.approx(hits[1].mean().item(), abs=1e-6)
    assert logged["test/hlr"] == pytest.approx(0.9 - logged["test/acc"], abs=1e-6)
    assert logged["test/ior"] == pytest.approx(logged["test/acc"] - 0.05, abs=1e-6)
    assert logged["test/bytes"] == 40 * 64 + 40
    assert "test/lrs" in logged


def test_parts_are_seen_apart_by_batch_normalization(data, small_net, trainer):
    module = DistilledSetEvaluation(small_net(norm="batch"), repeats=1, parts=2, optimizer=sgd)
    trainer(max_epochs=0).fit(module, datamodule=data())
    module.train()
    images, labels, targets = torch.randn(6, 1, 8, 8), torch.arange(6), torch.randn(6, 10)
    batch = ImageBatch(images, labels, torch.arange(6), targets=targets)
    found = module.batch_loss(module.student, batch)
    expected = sum(
        F.kl_div(module.student(images[rows]).log_softmax(1), targets[rows].softmax(1), reduction="sum") / 6
        for rows in (slice(0, 3), slice(3, 6))
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    whole = F.kl_div(module.student(images).log_softmax(1), targets.softmax(1), reduction="batchmean")
    assert abs(whole.item() - found.item()) > 1e-4


def test_hard_labels_beside_soft_ones(data, small_net, trainer):
    module = DistilledSetEvaluation(small_net(), repeats=1, objective="mse", label_weight=0.1, optimizer=sgd)
    trainer(max_epochs=0).fit(module, datamodule=data())
    images, labels, targets = torch.randn(6, 1, 8, 8), torch.arange(6), torch.randn(6, 10)
    logits = module.student(images)
    expected = (logits - targets).square().mean() + 0.1 * F.cross_entropy(logits, labels)
    found = module.batch_loss(module.student, ImageBatch(images, labels, torch.arange(6), targets=targets))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("learned", "expected"), [(None, 0.05), (0.3, 0.3)])
def test_a_learned_rate_is_taken_and_scheduled(learned, expected, data, digits, small_net, trainer, tmp_path):
    source = data()
    source.setup()
    replace(source.distilled, lr=learned).save(tmp_path)
    module = DistilledSetEvaluation(
        small_net(),
        repeats=1,
        optimizer=sgd,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1]),
    )
    fit = trainer(max_epochs=2)
    fit.fit(module, datamodule=DistilledImages(str(tmp_path), digits()))
    assert fit.optimizers[0].param_groups[0]["initial_lr"] == expected
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected / 10)


def at(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def test_validation_chooses_among_rates_whose_networks_learn_as_if_alone(data, small_net, trainer):
    fit, source = trainer(max_epochs=3, limit_val_batches=1.0), data()
    others = {"mlp": MLP(64, 10, [8])}
    module = DistilledSetEvaluation(small_net(), repeats=2, others=others, lrs=[1e-5, 0.05, 50.0], optimizer=at(9.0))
    fit.fit(module, datamodule=source)
    for place, lr in ((0, 1e-5), (1, 0.05)):
        alone = DistilledSetEvaluation(small_net(), repeats=2, others={"mlp": MLP(64, 10, [8])}, optimizer=at(lr))
        trainer(max_epochs=3).fit(alone, datamodule=data())
        for kind in range(2):
            found = module.networks()[6 * kind + 2 * place : 6 * kind + 2 * place + 2]
            for network, expected in zip(found, alone.networks()[2 * kind : 2 * kind + 2], strict=True):
                for own, other in zip(network.parameters(), expected.parameters(), strict=True):
                    torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)
    hits = {}
    with torch.no_grad():
        for part in ("val", "test"):
            images, labels = source.source.part(part)
            logits = [network.eval()(source.source.normalize(images)) for network in module.networks()]
            hits[part] = torch.stack([(row.argmax(1) == labels).double().mean() for row in logits]).view(2, 3, 2)
    best = hits["val"].mean(2).argmax(1)
    assert best[0] == 1  # neither the first, nor the last
    logged = fit.test(module, datamodule=source, verbose=False)[0]
    for kind, name in enumerate(("", "mlp_")):
        chosen = hits["test"][kind, best[kind]]
        assert logged[f"test/{name}acc"] == pytest.approx(chosen.mean().item(), abs=1e-6)
        assert logged[f"test/{name}acc_std"] == pytest.approx(chosen.std().item(), abs=1e-6)
        assert logged[f"test/{name}lr"] == pytest.approx([1e-5, 0.05, 50.0][best[kind]])
    nll = F.cross_entropy(logits[2], labels)
    assert logged["test/nll"] == pytest.approx(nll.item(), rel=1e-4)


def test_rates_are_scheduled_each_by_itself(data, small_net, trainer):
    fit = trainer(max_epochs=2)
    module = DistilledSetEvaluation(
        small_net(),
        repeats=1,
        lrs=[0.1, 0.01],
        optimizer=at(9.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1]),
    )
    fit.fit(module, datamodule=data())
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == pytest.approx([0.01, 0.001])


def test_without_validation_nothing_can_be_chosen(data, digits, small_net, trainer):
    module = DistilledSetEvaluation(small_net(), repeats=1, lrs=[0.1], optimizer=sgd)
    with pytest.raises(UsageError, match=r"model\.lrs: the data has no validation images"):
        trainer(max_epochs=1).fit(module, datamodule=RandomSubset(digits(val_size=0), per_class=4))
    module, fit = DistilledSetEvaluation(small_net(), repeats=1, lrs=[0.1], optimizer=sgd), trainer(max_epochs=0)
    fit.fit(module, datamodule=data())
    with pytest.raises(UsageError, match="no validation has chosen"):
        fit.test(module, datamodule=data(), verbose=False)


def test_soft_label_loss_by_hand():
    student = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.3, 0.1, -2.0], [1.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss = soft_label_loss(student, target, temperature=4.0)
    p, q = (target / 4).softmax(1), (student / 4).softmax(1)
    assert loss.item() == pytest.approx((p * (p / q).log()).sum().item() / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.allclose(gradient, (q - p) / (4 * 2), atol=1e-6)  # no T^2
    assert not torch.autograd.grad(soft_label_loss(student, target) + 0 * target.sum(), target, allow_unused=True)[
        0
    ].any()
    soft = soft_label_loss(student, target, objective="cross_entropy")
    assert soft.item() == pytest.approx(-(target.softmax(1) * student.log_softmax(1)).sum().item() / 2, rel=1e-5)
    squared = soft_label_loss(student, target, objective="mse")
    assert squared.item() == pytest.approx(((student - target) ** 2).sum().item() / 6, rel=1e-5)


def test_the_set_is_kept(data, small_net, trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from lit_distill.dataset import SyntheticSet

    source = data()
    logger = CSVLogger(tmp_path, name="", version="run")
    fit = trainer(max_epochs=1, logger=logger)
    fit.fit(DistilledSetEvaluation(small_net(), repeats=1, optimizer=sgd), datamodule=source)
    kept = SyntheticSet.load(tmp_path / "run" / "distilled")
    assert torch.equal(kept.images, source.distilled.images)
    again = DistilledImages(str(tmp_path / "run" / "distilled"), source.source)
    again.setup()
    assert torch.equal(again.distilled.images, kept.images)
    assert source.panels["picture"]["file"] == "distilled/images.png"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "model.repeats is 0"),
        ({"lrs": [0.1, 0.0]}, r"model\.lrs is \[0\.1, 0\.0\]; give learning rates above 0"),
        ({"lrs": []}, r"model\.lrs is \[\]"),
        ({"parts": 0}, "model.parts is 0"),
        ({"temperature": 0.0}, "model.temperature is 0"),
        ({"runs": {"best": "x"}}, "no 'best'; known are real, hard"),
        ({"others": {"res net": nn.Identity()}}, "'res net' is no name"),
    ],
)
def test_mistakes(options, message, small_net):
    with pytest.raises(UsageError, match=message):
        DistilledSetEvaluation(small_net(), **options)
