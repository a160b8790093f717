"""What holds for every method that trains all its networks together; shown on DML and BDKD."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim.lr_scheduler import StepLR

from lit_distill.core.callbacks import TeacherCheck
from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import Linear
from lit_distill.image import DigitsDataModule
from lit_distill.image.methods.bdkd import BDKD
from lit_distill.image.methods.dml import DML
from lit_distill.image.models import MLP


def sgd(lr=0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def mutual(student, peer, **kwargs):
    return DML(student, [peer], **kwargs)


METHODS = {"student": ("teacher", BDKD), "peers": ("peer1", mutual)}
both = pytest.mark.parametrize(("other", "build"), METHODS.values(), ids=["BDKD", "DML"])


@both
@pytest.mark.parametrize("sequential", [False, True])
def test_one_step_moves_every_network_and_logs_each_under_its_name(step, tiny, other, build, sequential):
    module = build(tiny(), tiny(6, seed=5), sequential=sequential)
    moved, terms = step(module)
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} <= moved
    assert {name.partition(".")[0] for name in moved} == {"student", "teacher" if build is BDKD else "peers"}
    assert set(terms) == {"ce", "divergence", f"{other}_ce", f"{other}_divergence"}
    assert module.iteration == 1
    assert all(network.training for network in module.networks.values())


@both
def test_the_loss_is_the_sum_of_all_terms_once(trainer, blobs, tiny, other, build):
    rows = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics, step=None):
            rows.append(metrics)

    module = build(tiny(), tiny(6, seed=5))
    seen, combine = [], module.combine
    module.combine = lambda terms: seen.append(sum(float(value) for value in terms.values())) or combine(terms)
    trainer(logger=Logger(), log_every_n_steps=3).fit(module, datamodule=blobs)
    (row,) = [row for row in rows if "train/loss" in row]
    assert len(seen) == 3
    assert row["train/loss"] == pytest.approx(sum(seen) / 3, rel=1e-5)
    assert row["train/loss"] == pytest.approx(
        sum(row[f"train/{name}"] for name in ("ce", "divergence", f"{other}_ce", f"{other}_divergence"))
    )


@both
@pytest.mark.parametrize("sequential", [False, True])
def test_no_loss_reaches_into_another_network(trainer, blobs, tiny, other, build, sequential):
    """One step of each network equals plain autograd on its own loss, the other's logits constant."""
    module = build(tiny(), tiny(6, seed=5), divergence_weight=0.5, sequential=sequential, optimizer=sgd())
    reference = copy.deepcopy(module)
    trainer(max_steps=1).fit(module, datamodule=blobs)
    batch = blobs.batches()[0]
    for network in reference.networks.values():
        logits = {name: net(batch.images) for name, net in reference.networks.items()}
        if sequential or network is reference.student:
            constants = {name: values.detach() for name, values in logits.items()}
        name = next(key for key, value in reference.networks.items() if value is network)
        own = logits[name]
        loss = torch.nn.functional.cross_entropy(own, batch.labels)
        loss = loss + 0.5 * reference.divergence(name, {**constants, name: own})
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for name, network in module.networks.items():
        for found, expected in zip(network.parameters(), reference.networks[name].parameters(), strict=True):
            torch.testing.assert_close(found, expected)


@both
def test_a_warm_up_starts_from_labels_alone(trainer, blobs, tiny, other, build):
    module = build(tiny(), tiny(6, seed=5), divergence_weight=Linear(0.0, 1.0, 2))
    seen, combine = [], module.combine
    module.combine = lambda terms: seen.append({k: float(v) for k, v in terms.items()}) or combine(terms)
    with warnings.catch_warnings():
        # There is no trained teacher that could be wrong, or of no effect.
        warnings.filterwarnings("error", message="the teacher")
        trainer(callbacks=[TeacherCheck()], limit_val_batches=1).fit(module, datamodule=blobs)
    assert set(seen[0]) == {"ce", f"{other}_ce"}
    assert set(seen[1]) == {"ce", "divergence", f"{other}_ce", f"{other}_divergence"}


@both
def test_clipping_bounds_the_step_of_each_network(trainer, blobs, tiny, other, build):
    module = build(tiny(), tiny(6, seed=5), clip_norm=1e-3, optimizer=sgd(1.0))
    before = copy.deepcopy(module)
    trainer(max_steps=1).fit(module, datamodule=blobs)
    for name, network in module.networks.items():
        pairs = zip(network.parameters(), before.networks[name].parameters(), strict=True)
        moved = sum(float((new - old).detach().square().sum()) for new, old in pairs) ** 0.5
        assert moved == pytest.approx(1e-3, rel=1e-2)


@both
def test_every_network_is_validated_and_tested(trainer, blobs, tiny, mean_teacher, other, build):
    module = build(tiny(), mean_teacher())
    fit = trainer(limit_val_batches=1)
    validated = fit.validate(module, datamodule=blobs, verbose=False)[0]
    tested = fit.test(module, datamodule=blobs, verbose=False)[0]
    assert {f"val/{prefix}{name}" for prefix in ("", f"{other}_") for name in ("acc", "ece", "nll")} == set(validated)
    names = ("acc", "acc_balanced", "ece", "nll", "mce", "ece_adaptive", "ece_classwise", "ece_recalibrated", "brier")
    assert {f"test/{p}{name}" for p in ("", f"{other}_") for name in names} | {"test/agreement"} == set(tested)
    with torch.no_grad():
        decided = module.student.eval()(blobs.images).argmax(1)
    assert tested[f"test/{other}_acc"] == validated[f"val/{other}_acc"] == 1.0
    right = float((decided == blobs.labels).float().mean())
    assert tested["test/acc"] == tested["test/agreement"] == pytest.approx(right)
    assert right < 1
    assert sum(module.panels["reliability"]["count"]) == 24
    # The other is always right and too modest; validation data, here those of the test, tell so.
    assert tested[f"test/{other}_ece_recalibrated"] < 0.01 < 0.02 < tested[f"test/{other}_ece"]


def test_without_validation_data_nothing_is_recalibrated(trainer, blobs, tiny):
    blobs.val_dataloader = list
    tested = trainer().test(BDKD(tiny(), tiny(6)), datamodule=blobs, verbose=False)[0]
    assert "test/ece" in tested
    assert not any("recalibrated" in name for name in tested)


@both
def test_a_resumed_run_ends_as_the_uninterrupted_one(trainer, tmp_path, other, build):
    def module():
        torch.manual_seed(3)
        networks = [MLP(64, 10, [8]), MLP(64, 10, [16])]
        options = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01)}
        return build(*networks, **options, lr_scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))

    def data():
        return DigitsDataModule(batch_size=300, seed=0)

    whole = module()
    trainer(max_epochs=3).fit(whole, datamodule=data())
    first = module()
    keep = ModelCheckpoint(tmp_path, filename="first", save_top_k=-1)
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(first, datamodule=data())
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    assert len(saved["optimizer_states"]) == len(saved["lr_schedulers"]) == 2
    assert set(first.state_dict()) == set(saved["state_dict"])
    torch.manual_seed(9)
    resumed = build(MLP(64, 10, [8]), MLP(64, 10, [16]), optimizer=whole.optimizer, lr_scheduler=whole.lr_scheduler)
    trainer(max_epochs=3).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "first.ckpt")
    assert resumed.iteration == whole.iteration == 9
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    for mine, theirs in zip(resumed.optimizers(), whole.optimizers(), strict=True):
        assert mine.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == pytest.approx(0.00125)
        assert str(mine.state_dict()) == str(theirs.state_dict())


@both
def test_what_does_not_fit_is_refused(trainer, blobs, tiny, other, build):
    with pytest.raises(UsageError, match=rf"model\.{other} has 5 classes, the data has 3"):
        trainer().fit(build(tiny(), tiny(num_classes=5)), datamodule=blobs)
    with pytest.raises(UsageError, match=r"model\.student has 5 classes"):
        trainer().fit(build(tiny(num_classes=5), tiny()), datamodule=blobs)
    with pytest.raises(UsageError, match=r"model\.temperature is 0\.0; it must be above 0"):
        build(tiny(), tiny(), temperature=0.0)
    with pytest.raises(UsageError, match=r"model\.clip_norm is -1\.0; it must be above 0"):
        build(tiny(), tiny(), clip_norm=-1.0)
