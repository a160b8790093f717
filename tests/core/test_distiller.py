import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.optim.lr_scheduler import StepLR

from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import RunError


class Single(Distiller):
    """Cross-entropy plus the squared norm of what dropout leaves; keeps what dropout drew."""

    def __init__(self, *args, blow_up_at=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.blow_up_at, self.draws, self.losses_seen = blow_up_at, [], []

    def training_step(self, batch, batch_idx):
        self.draws.append(nn.functional.dropout(torch.ones(16), 0.5).tolist())
        loss = nn.functional.cross_entropy(self.student(batch.images), batch.labels)
        terms = {"ce": loss}
        if self.iteration < 2:
            terms["early"] = 0.5 * loss.detach()
        if self.iteration == self.blow_up_at:
            terms["bad"] = loss * math.nan
        self.losses_seen.append(loss.item())
        return self.combine(terms)

    def validation_step(self, batch, batch_idx):
        self.student(batch.images)


class Pair(Distiller):
    """Two networks, two optimizers; the critic steps in every batch, the student in every batch too."""

    def __init__(self, student, critic, clip_norm=None, **kwargs):
        super().__init__(student, **kwargs)
        self.critic = critic
        self.automatic_optimization = False
        self.clip_norm = clip_norm
        self.iterations, self.rates = [], []

    def configure_optimizers(self):
        parts = [
            self.optimizer_with_schedule(list(self.student.parameters()), self.optimizer),
            self.optimizer_with_schedule(list(self.critic.parameters()), self.optimizer),
        ]
        return tuple(parts)

    def training_step(self, batch, batch_idx):
        self.iterations.append(self.iteration)
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in self.optimizers()])
        for position, network in enumerate((self.student, self.critic)):
            loss = nn.functional.cross_entropy(network(batch.images), batch.labels)
            self.optimize(loss, position, clip_norm=self.clip_norm)


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


class Recorder:
    """A logger's part that the Distiller uses."""

    def __init__(self):
        recorder = self
        self.rows = {}

        class Logger(DummyLogger):
            def log_metrics(self, metrics, step=None):
                recorder.rows.setdefault(step, {}).update(metrics)

        self.logger = Logger()


# ---- counting and optimizing -----------------------------------------------------------------------------------------


def test_iteration_counts_batches_where_global_step_counts_optimizer_steps(trainer, blobs, tiny):
    module = Pair(tiny(), tiny(seed=1), optimizer=sgd(0.1))
    fit = trainer(max_epochs=2)
    fit.fit(module, datamodule=blobs)
    assert module.iterations == [0, 1, 2, 3, 4, 5]
    assert module.iteration == 6
    assert fit.global_step == 12


@pytest.mark.parametrize(
    ("interval", "expected"), [("step", [1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32]), ("epoch", [1.0] * 3 + [0.5] * 3)]
)
def test_schedules_of_all_optimizers_step_once_per_interval(trainer, blobs, tiny, interval, expected):
    schedule = {"lr_scheduler": lambda optimizer: StepLR(optimizer, 1, gamma=0.5), "scheduler_interval": interval}
    module = Pair(tiny(), tiny(seed=1), optimizer=sgd(1.0), **schedule)
    trainer(max_epochs=2).fit(module, datamodule=blobs)
    assert module.rates == [[rate, rate] for rate in expected]


def test_optimize_steps_one_optimizer_down_its_own_gradient(trainer, blobs, tiny):
    module = Pair(tiny(), tiny(seed=1), optimizer=sgd(0.1))
    before = copy.deepcopy(module)
    trainer(max_steps=2).fit(module, datamodule=blobs)
    batch = blobs.batches()[0]
    for name in ("student", "critic"):
        reference = getattr(before, name)
        nn.functional.cross_entropy(reference(batch.images), batch.labels).backward()
        for old, new in zip(reference.parameters(), getattr(module, name).parameters(), strict=True):
            torch.testing.assert_close(new, old - 0.1 * old.grad)


def test_optimize_clips_the_gradient_of_its_own_parameters(trainer, blobs, tiny):
    module = Pair(tiny(), tiny(seed=1), clip_norm=1e-3, optimizer=sgd(1.0))
    before = copy.deepcopy(module)
    trainer(max_steps=2).fit(module, datamodule=blobs)
    for name in ("student", "critic"):
        pairs = zip(getattr(before, name).parameters(), getattr(module, name).parameters(), strict=True)
        moved = math.sqrt(sum(float((new - old).detach().square().sum()) for old, new in pairs))
        assert moved == pytest.approx(1e-3, rel=1e-2)


# ---- logging and failing ---------------------------------------------------------------------------------------------


def test_terms_are_logged_as_means_of_the_interval_and_may_come_and_go(trainer, blobs, tiny):
    recorder = Recorder()
    module = Single(tiny())
    trainer(logger=recorder.logger, log_every_n_steps=3, max_epochs=2).fit(module, datamodule=blobs)
    seen = module.losses_seen
    assert recorder.rows[2]["train/ce"] == pytest.approx(sum(seen[:3]) / 3, rel=1e-5)
    assert recorder.rows[2]["train/early"] == pytest.approx(0.5 * sum(seen[:2]) / 2, rel=1e-5)
    total = recorder.rows[2]["train/ce"] + recorder.rows[2]["train/early"]
    assert recorder.rows[2]["train/loss"] == pytest.approx(total)
    assert recorder.rows[5]["train/ce"] == pytest.approx(sum(seen[3:]) / 3, rel=1e-5)
    assert "train/early" not in recorder.rows[5]


def test_the_rest_of_an_interval_is_logged_at_the_end_of_the_epoch(trainer, blobs, tiny):
    recorder = Recorder()
    module = Single(tiny())
    trainer(logger=recorder.logger, log_every_n_steps=50).fit(module, datamodule=blobs)
    assert recorder.rows[3]["train/ce"] == pytest.approx(sum(module.losses_seen) / 3, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_iteration(trainer, blobs, tiny):
    module = Single(tiny(), blow_up_at=4)
    with pytest.raises(RunError, match="train/bad is nan at iteration 4; lower the learning rate"):
        trainer(log_every_n_steps=1, max_epochs=2).fit(module, datamodule=blobs)


# ---- frozen networks and checkpoints ---------------------------------------------------------------------------------


def test_the_teacher_rests_whatever_the_mode(trainer, blobs, tiny):
    teacher = tiny(seed=5)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    module = Single(tiny(), teacher)
    trainer(limit_val_batches=1).fit(module, datamodule=blobs)
    module.train()
    assert module.student.training
    assert not any(part.training for part in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert {id(p) for p in module.trainable()} == {id(p) for p in module.student.parameters()}


@pytest.fixture
def digits():
    """Real data in three batches an epoch, shuffled, by a loader that resumes."""
    from lit_distill.image import DigitsDataModule

    return DigitsDataModule(batch_size=399)


def dense(seed):
    torch.manual_seed(seed)
    hidden = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(nn.Flatten(), hidden, nn.Linear(16, 10))


@pytest.mark.parametrize(("done", "every"), [(4, {"every_n_train_steps": 4}), (3, {"save_on_train_epoch_end": True})])
def test_a_resumed_run_is_the_uninterrupted_one(trainer, digits, tmp_path, done, every):
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)
    whole = Single(dense(0), dense(5))
    trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(whole, datamodule=digits)
    path = tmp_path / f"step={done}.ckpt"
    assert torch.load(path, weights_only=True)["iteration"] == done

    torch.manual_seed(77)  # another history of the global generator
    again = Single(dense(9), dense(5))
    trainer(max_epochs=2).fit(again, datamodule=digits, ckpt_path=path, weights_only=True)
    assert again.iteration == 6
    assert again.draws == whole.draws[done:]
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key], rtol=0, atol=0)


def test_dropout_depends_on_seed_and_iteration_alone(trainer, blobs, tiny, monkeypatch):
    def draws(seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.manual_seed(int(torch.randint(1000, ())))
        module = Single(tiny())
        trainer().fit(module, datamodule=blobs)
        return module.draws

    first = draws(1)
    assert draws(1) == first
    assert draws(2) != first
    assert len({tuple(row) for row in first}) == 3


def test_checkpoints_hold_no_teacher_and_the_teacher_comes_from_its_own_source(trainer, blobs, tiny, tmp_path):
    module = Single(tiny(), tiny(seed=5))
    fit = trainer()
    fit.fit(module, datamodule=blobs)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in saved["state_dict"]} == {"student"}

    teacher = tiny(seed=6)
    expected = copy.deepcopy(teacher.state_dict())
    again = Single(tiny(seed=9), teacher)
    trainer(limit_val_batches=1).validate(again, datamodule=blobs, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    for key, value in again.student.state_dict().items():
        assert torch.equal(value, module.student.state_dict()[key])
    for key, value in again.teacher.state_dict().items():
        assert torch.equal(value, expected[key])


def test_a_checkpoint_of_another_student_is_refused(trainer, blobs, tiny, tmp_path):
    fit = trainer()
    fit.fit(Single(tiny()), datamodule=blobs)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer().validate(Single(tiny(8)), datamodule=blobs, ckpt_path=tmp_path / "a.ckpt", verbose=False)
