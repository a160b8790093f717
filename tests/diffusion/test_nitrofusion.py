"""NitroFusion: the pool, its refresh, and a step against the one written by hand."""

import copy

import pytest
import torch
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.nitrofusion import NitroFusion
from lit_distill.diffusion.pool import KINDS, DiscriminatorPool, due
from lit_distill.diffusion.samplers import Renoise

TAPS = ["network.blocks.0", "network.blocks.1"]
SHAPES = {"a": (5,), "b": (7,)}


def pool_of(size=24, times=(0.3, 3.0)):
    torch.manual_seed(0)
    return DiscriminatorPool(size, times, SHAPES)


def copies(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def test_groups_are_equal_and_do_not_overlap_and_taps_take_turns():
    pool, draws = pool_of(), Draws(0)
    groups = [sorted(pool.sample(4, t, kind, draws)) for t in (0.3, 3.0) for kind in KINDS]
    assert sorted(head for group in groups for head in group) == list(range(24))
    for group in groups:
        assert [pool.tap_of[head] for head in group] == ["a", "b", "a", "b"]


def test_heads_are_drawn_without_repetition_each_as_often():
    pool, draws = pool_of(), Draws(0)
    counts = torch.zeros(24)
    for _ in range(2000):
        chosen = pool.sample(2, 3.0, "local", draws)
        assert len(set(chosen)) == 2
        counts[chosen] += 1
    own = counts.nonzero().flatten().tolist()
    assert own == sorted(pool.sample(4, 3.0, "local", draws))
    assert (counts[own] / 2000 - 0.5).abs().max() < 0.05


def test_heads_that_did_not_judge_stay_as_they_are():
    pool = pool_of()
    optimizer = torch.optim.AdamW(pool.parameters(), lr=0.1, weight_decay=0.5)
    features = {"a": torch.randn(3, 5), "b": torch.randn(3, 7)}
    for heads in ([0, 1, 8], [1, 5]):
        before = copies(pool)
        optimizer.zero_grad()
        pool(features, heads).sum().backward()
        optimizer.step()
        moved = {
            name.split(".")[1] for name, value in pool.state_dict().items() if not torch.equal(value, before[name])
        }
        assert moved == {str(head) for head in heads}


def test_refreshed_heads_are_new_and_the_optimizer_forgets_them():
    pool = pool_of()
    optimizer = torch.optim.Adam(pool.parameters(), lr=0.1)
    features = {"a": torch.randn(3, 5), "b": torch.randn(3, 7)}
    pool(features, list(range(24))).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == len(list(pool.parameters()))
    before, identity = copies(pool), [id(p) for p in pool.parameters()]
    chosen = pool.refresh(3, optimizer, Draws(4))
    assert len(set(chosen)) == 3
    assert [id(p) for p in pool.parameters()] == identity
    for number, head in enumerate(pool.heads):
        for name, parameter in head.named_parameters():
            assert (parameter in optimizer.state) == (number not in chosen)
            if name.endswith("1.weight"):
                assert torch.equal(parameter, before[f"heads.{number}.{name}"]) == (number not in chosen)
    # Adam's first step on a new head has the length of the learning rate, whatever went before.
    new = pool.heads[chosen[0]].layers[3].weight
    old = new.detach().clone()
    optimizer.zero_grad()
    pool(features, chosen).sum().backward()
    optimizer.step()
    torch.testing.assert_close((new - old).abs(), torch.full_like(new, 0.1), rtol=1e-3, atol=1e-4)


def test_the_same_heads_become_the_same_in_all_processes():
    first, second = pool_of(), pool_of()
    torch.manual_seed(1)
    optimizers = [torch.optim.Adam(pool.parameters()) for pool in (first, second)]
    assert first.refresh(5, optimizers[0], Draws(7, rank=0, world_size=2)) == second.refresh(
        5, optimizers[1], Draws(7, rank=1, world_size=2)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@pytest.mark.parametrize(("share", "size"), [(0.01, 480), (0.01, 60), (0.05, 24), (0.0, 24), (1.0, 12)])
def test_over_many_steps_a_share_of_the_pool_is_refreshed_in_each(share, size):
    counts = [due(iteration, share, size) for iteration in range(1000)]
    assert sum(counts) == round(1000 * share * size)
    assert max(counts) - min(counts) <= 1


@pytest.fixture
def build(make_denoiser, little):
    def make(base=NitroFusion, **options):
        options = {
            "schedules": [[2.5]], "taps": TAPS, "noise_times": [0.3, 1.0], "pool_size": 24, "heads": 2,
            "teacher_samples": 40, "evaluation": little, **options,
        }  # fmt: skip
        return base(make_denoiser(1), make_denoiser(0), **options)

    return make


@pytest.mark.parametrize("kind", ["hinge", "linear"])
def test_an_iteration_is_the_one_written_by_hand(trainer, digits, build, kind):
    module = build(gan_kind=kind, refresh=0.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), clip_norm=None, crop=0.5)
    g, f = copy.deepcopy(module.student), copy.deepcopy(module.teacher)
    fit = trainer(limit_train_batches=1)
    module.trainer, fit.datamodule = fit, digits
    digits.setup()
    module.configure_model()
    pool = copy.deepcopy(module.head)
    fit.fit(module, datamodule=digits)

    draws, made_by_teacher = Draws(derived_seed("step", 0, 0)), module._made
    index = draws.integers(40, 8)
    real, labels = made_by_teacher[0][index], made_by_teacher[1][index]
    judges = Draws(derived_seed("judges", 0, 0))
    t = [0.3, 1.0][judges.shared_integer(2)]
    heads = {name: pool.sample(2, t, name, judges) for name in KINDS}

    def logits(parts, name):
        x = torch.cat(parts)
        own = labels.repeat(len(parts))
        if name != "global":
            top, left = draws.shared_integer(5), draws.shared_integer(5)
            x = nn.functional.interpolate(x[:, :, top : top + 4, left : left + 4], scale_factor=2, mode="bilinear")
        if name == "local_unconditional":
            own = torch.full_like(own, 10)
        x = x + t * torch.cat([draws.normal((8, 1, 8, 8)) for _ in parts])
        seen = []
        handles = [block.register_forward_hook(lambda _m, _a, out: seen.append(out)) for block in f.network.blocks]
        f(x, t, own)
        for handle in handles:
            handle.remove()
        return torch.stack([pool.heads[head](seen[head % 4 % 2]) for head in heads[name]], 1)

    x = g(2.5 * draws.normal((8, 1, 8, 8)), 2.5, labels)
    loss = torch.stack([-logits([x], name).mean() for name in KINDS]).mean()
    gradients = torch.autograd.grad(loss, list(g.parameters()))
    for old, gradient, new in zip(g.parameters(), gradients, module.student.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=1e-3, atol=1e-6)
    losses = []
    for name in KINDS:
        fake, true = logits([x.detach(), real], name).chunk(2)
        if kind == "hinge":
            losses.append(nn.functional.relu(1 + fake).mean() + nn.functional.relu(1 - true).mean())
        else:
            losses.append(fake.mean() - true.mean())
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(pool.parameters()), allow_unused=True)
    judged = {id(p) for own in heads.values() for head in own for p in pool.heads[head].parameters()}
    for old, gradient, new in zip(pool.parameters(), gradients, module.head.parameters(), strict=True):
        assert (gradient is not None) == (id(old) in judged)
        if gradient is None:
            assert torch.equal(old, new)
        else:
            torch.testing.assert_close(new, old - 0.1 * gradient, rtol=2e-3, atol=1e-5)
    for old, new in zip(f.parameters(), module.teacher.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_whole_pool_without_refresh_is_a_fixed_gan_of_many_heads(trainer, digits, build):
    """All heads of a level judge in each step: the order in which they were drawn changes nothing."""
    module = build(noise_times=[1.0], pool_size=6, heads=2, refresh=0.0)
    trainer(limit_train_batches=0).fit(module, datamodule=digits)
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    found = module.logits([x], labels, Draws(3))
    draws = Draws(3)
    for number, (kind, own) in enumerate(zip(KINDS, found, strict=True)):
        features = module.features([x], 1.0, kind, labels, draws)
        fixed = torch.stack([module.head.heads[2 * number + k](features[TAPS[k]]) for k in range(2)], 1)
        torch.testing.assert_close(own.mean(), fixed.mean())
        torch.testing.assert_close(own.sort(1).values, fixed.sort(1).values)


def test_the_pool_is_refreshed_in_a_run_and_the_heads_forgotten(trainer, digits, build):
    class Watched(NitroFusion):
        refreshed = 0

        def training_step(self, batch, batch_idx):
            before = self.optimizers()[1].optimizer
            known = len(before.state)
            super().training_step(batch, batch_idx)
            self.refreshed += due(self.iteration, self.refresh, self.pool_size)
            for head in self.head.heads:
                present = {p in before.state for p in head.parameters()}
                assert len(present) == 1
            assert known is not None

    module = build(Watched, refresh=0.25)
    trainer().fit(module, datamodule=digits)
    assert module.refreshed == 36
    state = module.trainer.optimizers[1].state
    fresh = [head for head in module.head.heads if next(head.parameters()) not in state]
    assert len(fresh) >= 6


def test_crops_are_squares_of_the_sample_brought_to_its_size(build):
    module = build()
    x = torch.arange(64.0).view(1, 1, 8, 8)
    draws = Draws(3)
    top, left = draws.shared_integer(5), draws.shared_integer(5)
    found = module.cropped(x, Draws(3))
    assert found.shape == x.shape
    part = x[..., top : top + 4, left : left + 4]
    assert found.mean().item() == pytest.approx(part.mean().item())
    assert (found.min(), found.max()) == (part.min(), part.max())
    module.crop = 1.0
    assert torch.equal(module.cropped(x, Draws(3)), x)


def test_steps_come_in_from_below(build):
    module = build(schedules=[[2.5], [2.5, 0.8], [2.5, 1.0, 0.5]], stage_iterations=10)
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    for iteration, stage, times in (
        (0, 0, {2.5}),
        (9, 0, {2.5}),
        (10, 1, {2.5, 0.8}),
        (29, 2, {2.5, 0.8, 1.0, 0.5}),
        (500, 2, {2.5, 0.8, 1.0, 0.5}),
    ):
        module.iteration = iteration
        assert module.stage == stage
        seen = {round(float(module.student_forward(x, labels, Draws(seed)).t[0]), 3) for seed in range(40)}
        assert seen == times
    assert isinstance(module.sampler, Renoise)
    assert module.sampler.times == [2.5, 1.0, 0.5]


@pytest.mark.parametrize("options", [{"refresh": 0.2}, {"schedules": [[2.5], [2.5, 0.8]], "stage_iterations": 2}])
def test_a_resumed_run_is_the_uninterrupted_one(check_resumed, build, options):
    check_resumed(lambda: build(head_updates=2, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedules": []}, "model.schedules: none are given"),
        ({"taps": []}, "model.taps and model.noise_times"),
        ({"refresh": 1.5}, r"model.refresh is 1\.5"),
        ({"gan_kind": "rpgan"}, "model.gan_kind: rpgan compares pairs"),
    ],
)
def test_mistakes_are_told(build, options, message):
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_mistakes_of_the_pool_are_told():
    with pytest.raises(UsageError, match=r"model.pool_size is 10; give a multiple of 6"):
        pool_of(10)
    with pytest.raises(UsageError, match=r"model.heads is 5, but a group of the pool has 4"):
        pool_of().sample(5, 0.3, "global", Draws(0))
