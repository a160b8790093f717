"""What holds for all score distillation: who moves when, along which gradient, and that a run resumes."""

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.core.errors import RunError, UsageError
from lit_distill.diffusion.distillation import ScoreDistiller, at_rest
from lit_distill.diffusion.fake import LoRA
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.paths import FlowPath
from lit_distill.experiment.resume_point import ResumePoint

TAPS = ["network.blocks.1"]


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def state(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def moved(network, before):
    return any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


def watched(base):
    """A method that keeps what each optimizer step moved, and whose gradients were there."""

    class Watched(base):
        def optimize(self, loss, optimizer=0, *, clip_norm=None):
            roles = {name: getattr(self, name) for name in ("student", "fake", "head", "teacher")}
            roles = {name: network for name, network in roles.items() if network is not None}
            for network in roles.values():
                for parameter in network.parameters():
                    parameter.grad = None
            before = {name: state(network) for name, network in roles.items()}
            super().optimize(loss, optimizer, clip_norm=clip_norm)
            self.steps.append(
                (
                    self.iteration,
                    {name for name, network in roles.items() if moved(network, before[name])},
                    {n for n, network in roles.items() if any(p.grad is not None for p in network.parameters())},
                )
            )

    return Watched


def test_each_step_moves_its_role_alone_and_the_student_every_kth_time(trainer, digits, make_denoiser, little):
    module = watched(DMD2)(
        make_denoiser(1), make_denoiser(0), [2.5], fake_updates=3, taps=TAPS, evaluation=little, optimizer=sgd(0.01)
    )
    module.steps = []
    trainer().fit(module, datamodule=digits)
    student, critics = {"student"}, {"fake", "head"}
    expected = []
    for iteration in range(6):
        expected += [(iteration, student, student)] * (iteration % 3 == 0) + [(iteration, critics, critics)]
    assert module.steps == expected


def test_gradients_flow_through_what_rests_and_none_are_left(make_denoiser):
    network, x = make_denoiser(), torch.randn(2, 1, 8, 8, requires_grad=True)
    with at_rest(network, None):
        network(x, 1.0, torch.tensor([0, 1])).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


class KilledError(Exception):
    """As by a power cut."""


def killed_between(base, iteration):
    class Dying(base):
        def fake_loss(self, *args):
            if self.iteration == iteration:
                raise KilledError
            return super().fake_loss(*args)

    return Dying


def test_killed_between_student_and_fake_update_and_resumed_is_uninterrupted(
    trainer, digits, make_denoiser, little, tmp_path
):
    def build(method=DMD2, seed=1):
        return method(
            make_denoiser(seed), make_denoiser(0), [2.5, 0.8], fake_updates=2, taps=TAPS, evaluation=little
        )  # fmt: skip

    whole = build()
    trainer().fit(whole, datamodule=copy.deepcopy(digits))
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(KilledError):
        trainer(callbacks=[keep], enable_checkpointing=True).fit(
            build(killed_between(DMD2, 4)), datamodule=copy.deepcopy(digits)
        )
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    saved = torch.load(last, weights_only=True)
    assert saved["iteration"] == 4
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"student", "fake", "head"}
    assert len(saved["optimizer_states"]) == 2
    torch.manual_seed(99)
    again = build(seed=7)
    trainer().fit(again, datamodule=copy.deepcopy(digits), ckpt_path=last, weights_only=True)
    assert again.iteration == 6
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_a_student_that_is_not_finite_stops_the_run(trainer, digits, make_denoiser, little):
    student = make_denoiser(1)
    student.network.last.bias.data[3] = math.nan
    module = ScoreDistiller(student, make_denoiser(0), [2.5], evaluation=little)
    with pytest.raises(RunError, match=r"train/surrogate is nan at iteration 0; .* the last good checkpoint is kept"):
        trainer(log_every_n_steps=1).fit(module, datamodule=digits)


# ---- the fake score -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "weight", "gradient"])
def test_what_is_not_finite_is_named_and_does_not_replace_the_last_good_checkpoint(
    where, trainer, digits, make_denoiser, little, tmp_path
):
    class Planted(DMD2):
        def extra_student_loss(self, sample, condition, batch, draws):
            terms = dict(super().extra_student_loss(sample, condition, batch, draws))
            if self.iteration == 8 and where == "loss":
                terms["gan"] = terms["gan"] * math.nan
            if self.iteration == 11 and where == "gradient":  # of the last batch; the loss itself is finite
                terms["gan"] = terms["gan"] + (0 * sample.x0.sum()).sqrt()
            return terms

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self.iteration == 9 and where == "weight":
                with torch.no_grad():
                    self.student.network.last.weight[0, 0] = math.nan

    module = Planted(
        make_denoiser(), make_denoiser(1), [2.5], fake_updates=1, taps=TAPS, gan_weight=1.0, evaluation=little
    )
    point = ResumePoint(tmp_path / "last.ckpt", every_n_batches=4)
    fit = trainer(callbacks=[point], enable_checkpointing=True, max_epochs=2, log_every_n_steps=50)
    with pytest.raises(RunError, match=r"student\.network\.\S+ is not finite after \d+ iterations; .* is kept"):
        fit.fit(module, datamodule=copy.deepcopy(digits))
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["iteration"] == {"loss": 6, "weight": 6, "gradient": 10}[where]
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_lora_begins_as_the_teacher_shares_its_weights_and_trains_adapters_alone(
    trainer, digits, make_denoiser, little, tmp_path
):
    teacher = make_denoiser(0)
    before = state(teacher)
    module = ScoreDistiller(make_denoiser(1), teacher, [2.5], fake=LoRA(rank=2, alpha=2.0), evaluation=little)
    fit = trainer(limit_train_batches=0)
    fit.fit(module, datamodule=digits)
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert torch.equal(module.fake(x, 1.0, labels), teacher(x, 1.0, labels))
    own = {id(p) for p in teacher.parameters()}
    trained = [p for p in module.fake.parameters() if p.requires_grad]
    assert all(id(p) in own for p in module.fake.parameters() if not p.requires_grad)
    assert 0 < sum(p.numel() for p in trained) < 0.5 * sum(p.numel() for p in teacher.parameters())

    fit = trainer()
    fit.fit(module, datamodule=digits)
    assert not moved(teacher, before)
    assert not torch.equal(module.fake(x, 1.0, labels), teacher(x, 1.0, labels))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {"lora" in name for name in saved if name.startswith("fake.")} == {True}
    again = ScoreDistiller(
        make_denoiser(5), copy.deepcopy(teacher), [2.5], fake=LoRA(rank=2, alpha=2.0), evaluation=little
    )
    trainer(limit_val_batches=1).validate(again, datamodule=digits, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(again.fake(x, 1.0, labels), module.fake(x, 1.0, labels))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda make: ScoreDistiller(make(), make(path=FlowPath(), prediction="u"), [2.5]), "it is on EDMPath, the"),
        (lambda make: ScoreDistiller(make(num_classes=3), make(), [2.5]), "it knows 3 classes, the teacher 10"),
        (lambda make: ScoreDistiller(make(), make(), [0.5, 2.5]), "model.steps: .* does not decrease"),
        (lambda make: ScoreDistiller(make(), make(), [2.5], fake_updates=0), "model.fake_updates is 0"),
        (
            lambda make: ScoreDistiller(make(num_classes=None), make(num_classes=None), [2.5], guidance=2.0),
            "model.guidance needs a network that knows 'no condition'",
        ),
    ],
)
def test_mistakes_are_told(build, message, make_denoiser):
    with pytest.raises(UsageError, match=message):
        build(make_denoiser)
