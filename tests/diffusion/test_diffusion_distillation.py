"""What holds for all score distillation: who moves when, along which gradient, and that a run resumes."""

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import ScoreDistiller, at_rest
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.fake import FakeScore, LoRA
from lit_distill.diffusion.methods.diff_instruct import DiffInstruct
from lit_distill.diffusion.methods.dmd import DMD
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.models import GaussianMixture
from lit_distill.diffusion.paths import EDMPath, FlowPath
from lit_distill.diffusion.rollout import Sample
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


def by_hand(network, x_t, t, labels):
    """EDM's denoiser from its formulas."""
    s2, r = 0.75**2, t.float().view(-1, 1, 1, 1)
    out = network(x_t / (r**2 + s2).sqrt(), t.float().log() / 4, labels)
    return s2 / (r**2 + s2) * x_t + r * 0.75 / (r**2 + s2).sqrt() * out


def test_an_iteration_is_the_one_written_by_hand(trainer, digits, make_denoiser, little):
    """One iteration of DMD2 with guidance, against formulas: same draws, plain gradient descent."""
    student, teacher = make_denoiser(1), make_denoiser(0)
    module = DMD2(
        copy.deepcopy(student), copy.deepcopy(teacher), [2.5], fake_updates=5, taps=TAPS, gan_weight=0.7,
        discriminator_weight=0.3, guidance=1.5, evaluation=little, optimizer=sgd(0.1), clip_norm=None,
    )  # fmt: skip
    fit = trainer(limit_train_batches=1)
    module.trainer = fit
    fit.datamodule = digits
    digits.setup()
    module.configure_model()
    head, fake = copy.deepcopy(module.head), copy.deepcopy(teacher)
    fit.fit(module, datamodule=digits)

    path, g, f, r = EDMPath(), student.network, fake.network, teacher.network
    draws = Draws(derived_seed("step", 0, 0))
    real = next(iter(digits.train_dataloader()))
    labels = draws.integers(10, 8)
    x = by_hand(g, 2.5 * draws.normal((8, 1, 8, 8)), torch.full((8,), 2.5), labels)
    # Student.
    t = module.student_times(8, path, draws)
    x_t = x.detach() + t.float().view(-1, 1, 1, 1) * draws.normal(x.shape)
    with torch.no_grad():
        none = torch.full_like(labels, 10)
        cond, uncond = by_hand(r, x_t, t, labels), by_hand(r, x_t, t, none)
        target = uncond + 1.5 * (cond - uncond)
        direction = by_hand(f, x_t, t, labels) - target
        direction = direction / (x - target).abs().mean((1, 2, 3), keepdim=True)

    def logits(x0, t, noise, labels):
        seen = []
        handle = f.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        by_hand(f, x0 + t.float().view(-1, 1, 1, 1) * noise, t, labels)
        handle.remove()
        return head.heads[0](seen[0])

    softplus = torch.nn.functional.softplus
    t = module.gan_times(8, path, draws)
    gan = softplus(-logits(x, t, draws.normal(x.shape), labels)).mean()
    loss = (x * direction).sum() / x.numel() + 0.7 * gan
    gradients = torch.autograd.grad(loss, list(g.parameters()))
    for parameter, gradient, new in zip(g.parameters(), gradients, module.student.network.parameters(), strict=True):
        torch.testing.assert_close(new, parameter - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    # Fake score and head, on the same samples.
    x = x.detach()
    t = module.fake_times(8, path, draws)
    s = t.float().view(-1, 1, 1, 1)
    denoised = by_hand(f, x + s * draws.normal(x.shape), t, labels)
    loss = ((s**-2 + 0.75**-2) * (denoised - x) ** 2).mean()
    t_fake = module.gan_times(8, path, draws)
    fake_logits = logits(x, t_fake, draws.normal(x.shape), labels)
    t_real = module.gan_times(8, path, draws)
    real_logits = logits(real.images, t_real, draws.normal(x.shape), real.labels)
    loss = loss + 0.3 * (softplus(fake_logits).mean() + softplus(-real_logits).mean())
    parameters = [*f.parameters(), *head.parameters()]
    new = [*module.fake.network.parameters(), *module.head.parameters()]
    for parameter, gradient, found in zip(parameters, torch.autograd.grad(loss, parameters), new, strict=True):
        torch.testing.assert_close(found, parameter - 0.1 * gradient, rtol=2e-3, atol=1e-5)


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


# ---- Diff-Instruct and DMD ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["one", "sigma2", "sigma2_over_alpha2"])
def test_diff_instruct_weighs_the_difference_of_scores(make_denoiser, little, weight):
    path = FlowPath()
    module = DiffInstruct(
        make_denoiser(1, path, "u"), make_denoiser(0, path, "u"), [1.0], weight=weight, evaluation=little
    )
    module.fake = make_denoiser(2, path, "u")
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    found = module.student_gradient(Sample(x, x, torch.ones(4), 0), labels, Draws(3))
    draws = Draws(3)
    t = module.student_times(4, path, draws)
    alpha, sigma = (c.float() for c in path.at(t, x)[:2])
    x_t = alpha * x + sigma * draws.normal(x.shape)
    with torch.no_grad():
        difference = module.fake(x_t, t, labels, "score") - module.teacher(x_t, t, labels, "score")
    factor = {"one": 1.0, "sigma2": sigma**2, "sigma2_over_alpha2": (sigma / alpha) ** 2}[weight]
    torch.testing.assert_close(found, factor * alpha * difference, rtol=1e-3, atol=1e-5)


class Point(GaussianMixture):
    """One Gaussian around 0.3 in all 64 pixels, whatever the class."""

    def forward(self, x, time, condition=None):
        return super().forward(x, time)


def exact(std=0.5, num_classes=10):
    path = EDMPath()
    return Denoiser(Point([[0.3] * 64], std, path), path, "x0", num_classes, time_input="time")


class Another(FakeScore):
    """A network of its own, since one in closed form has no weights to train."""

    def __init__(self, network):
        self.network = network

    def build(self, teacher, sharded=False):
        return self.network


def test_pairs_are_what_the_exact_flow_makes_of_the_noise(trainer, digits, make_denoiser, little, tmp_path):
    file = tmp_path / "pairs.safetensors"

    def build(**options):
        return DMD(
            make_denoiser(1), exact(), [2.5], pairs=40, pair_steps=40, pair_file=str(file), evaluation=little,
            fake=Another(make_denoiser(2)), **options,
        )  # fmt: skip

    module = build()
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    assert {"surrogate", "regression", "fake"} == set(module.terms)
    pairs = module._pairs(torch.arange(40))
    # The flow of N(0.3, 0.25) from noise level 2.5 to 0 is a scaling.
    expected = 0.3 + (2.5 * pairs["noise"] - 0.3) * 0.5 / math.sqrt(0.25 + 2.5**2)
    torch.testing.assert_close(pairs["x0"], expected, atol=5e-3, rtol=0)
    # The regression is the mean square over pairs that were drawn.
    value = module.extra_student_loss(
        Sample(torch.zeros(6, 1, 8, 8), torch.zeros(6, 1, 8, 8), torch.ones(6), 0), None, None, Draws(5)
    )["regression"]
    drawn = module._pairs(Draws(5).integers(40, 6))
    with torch.no_grad():
        made = module.student(2.5 * drawn["noise"], 2.5, drawn["labels"].long())
    assert value.item() == pytest.approx(0.25 * float((made - drawn["x0"]).square().mean()), rel=1e-5)
    trainer(limit_train_batches=1).fit(build(), datamodule=digits)  # reads the file
    with pytest.raises(UsageError, match=r"is stale: guidance was 1\.0, now 2\.0"):
        trainer(limit_train_batches=1).fit(build(guidance=2.0), datamodule=digits)


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
        (lambda make: DMD(make(), make(), [2.5, 1.0]), "pairs are for one step, 2 are given"),
        (lambda make: DMD2(make(), make(), [2.5], gan_weight=-1.0), "model.gan_weight is -1.0"),
    ],
)
def test_mistakes_are_told(build, message, make_denoiser):
    with pytest.raises(UsageError, match=message):
        build(make_denoiser)


def test_taps_of_a_discriminator_must_exist(trainer, digits, make_denoiser, little):
    module = DMD2(make_denoiser(1), make_denoiser(0), [2.5], taps=["network.mid"], evaluation=little)
    with pytest.raises(UsageError, match=r"tap 'network\.mid' is not a module of Denoiser"):
        trainer().fit(module, datamodule=digits)


def test_the_published_weight_of_the_gan_goes_with_the_size_of_samples(trainer, digits, make_denoiser, little):
    module = DMD2(make_denoiser(1), make_denoiser(0), [2.5], taps=TAPS, evaluation=little)
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    assert module.gan_weight == pytest.approx(3e-3 * 3 * 64 * 64 / 64)
