from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from lit_distill.core.errors import UsageError
from lit_distill.dataset.batchnorm import BatchNormMatcher
from lit_distill.dataset.methods.cvdd import CommitteeRecovery
from lit_distill.dataset.methods.sre2l import SRe2L

PRIORS = (64.0, 60.6, 51.6)


@pytest.fixture
def members(networks):
    """Networks of two kinds, with the statistics of real images."""
    return partial(networks, second_norm="batch")


@pytest.fixture
def recovery(small_net, members):
    """Builds a module."""

    def build(**kwargs):
        options = {"members": members(), "priors": PRIORS, "student_epochs": 1, "recover_iterations": 2} | kwargs
        return CommitteeRecovery(small_net(), **options)

    return build


@pytest.fixture
def fitted(trainer, digits, recovery):
    """Builds a module after all its iterations."""

    def build(callbacks=(), make=None, **kwargs):
        module = (make or recovery)(**kwargs)
        blocks = module.per_class * -(-10 // module.block_classes)
        steps = blocks * module.recover_iterations
        trainer(callbacks=list(callbacks), max_steps=steps, max_epochs=-1).fit(module, datamodule=digits())
        return module

    return build


class Votes(Callback):
    """Keeps the voters and the names of the terms of every step."""

    def __init__(self):
        self.votes, self.terms = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.votes.append(module._votes)
        self.terms.append(set(module.terms))


def step(module, seed=7):
    torch.manual_seed(seed)
    return module.training_step(None, 0)


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_voters_losses_by_their_weights(fitted):
    module = fitted(per_class=1, bn_weight=0.02, crop_scale=None, flip=False, roll=0)
    pixels = module._pixels_of_block
    # exp(64 / 5) and exp(60.6 / 5) over their sum
    expected = {}
    for place, weight in ((0, 0.66374), (1, 0.33626)):
        logits, distance = BatchNormMatcher(module.committee.members[place], 10.0)(pixels)
        expected[f"ce_{place}"] = weight * float(F.cross_entropy(logits, torch.arange(10)).detach())
        expected[f"bn_{place}"] = weight * 0.02 * float(distance.detach())
    loss = step(module)
    assert {name: float(value.detach()) for name, value in module.terms.items()} == pytest.approx(expected, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(sum(expected.values()), rel=1e-4)


def test_the_gradient_is_the_voters_by_their_weights_and_reaches_the_pixels_of_the_block_alone(fitted):
    module = fitted(per_class=1, bn_weight=0.02, crop_scale=None, flip=False, roll=0)
    pixels = module._pixels_of_block
    twin = pixels.detach().clone().requires_grad_()
    expected = 0.0
    for place, weight in ((0, 0.66374), (1, 0.33626)):
        logits, distance = BatchNormMatcher(module.committee.members[place], 10.0)(twin)
        log_odds = logits.log_softmax(1)[torch.arange(10), torch.arange(10)]
        expected = expected + weight * (-log_odds.mean() + 0.02 * distance)
    expected.backward()
    pixels.grad = None
    step(module).backward()
    torch.testing.assert_close(pixels.grad, twin.grad, rtol=1e-3, atol=1e-6)
    assert pixels.grad.abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in module.parameters())


def test_all_voters_see_the_same_images(fitted, monkeypatch):
    seen = []
    member_terms = CommitteeRecovery.member_terms
    monkeypatch.setattr(
        CommitteeRecovery,
        "member_terms",
        lambda self, place, images: seen.append(images.detach().clone()) or member_terms(self, place, images),
    )
    fitted(per_class=1)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


# ---- voters --------------------------------------------------------------------------------------------------------


def test_voters_change_with_the_number_of_the_image(fitted):
    watch = Votes()
    fitted(per_class=3, block_classes=6, callbacks=[watch])
    pairs = [tuple(votes) for votes in watch.votes]
    # Two blocks of classes, two iterations each, for each of the three pairs.
    assert pairs == [(0, 1)] * 4 + [(0, 2)] * 4 + [(1, 2)] * 4
    assert all(sum(votes.values()) == pytest.approx(1) for votes in watch.votes)
    assert watch.votes[0] == pytest.approx({0: 0.66374, 1: 0.33626}, abs=1e-4)
    assert watch.terms[-1] == {"ce_1", "bn_1", "ce_2", "bn_2"}


def test_more_images_have_random_pairs_the_same_for_the_same_seed(fitted):
    runs = []
    for _ in range(2):
        watch = Votes()
        fitted(per_class=5, recover_iterations=1, callbacks=[watch])
        runs.append([tuple(votes) for votes in watch.votes])
    assert runs[0] == runs[1]
    assert set(runs[0]) <= set(combinations(range(3), 2))


@pytest.mark.parametrize(
    ("options", "votes"),
    [
        ({}, {0: 0.66374, 1: 0.33626}),
        ({"temperature": 10.0}, {0: 0.58419, 1: 0.41581}),
        ({"voting": "equal"}, {0: 0.5, 1: 0.5}),
        ({"voting": "equal", "priors": None, "voters": 3}, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
        ({"voters": 1}, {0: 1.0}),
        ({"single": [1, 2], "voting": "equal"}, {1: 0.5, 2: 0.5}),
    ],
)
def test_every_part_of_the_vote_can_be_left_out(fitted, options, votes):
    watch = Votes()
    fitted(per_class=1, recover_iterations=1, callbacks=[watch], **options)
    assert watch.votes[0] == pytest.approx(votes, abs=1e-4)


def test_random_weights_are_drawn_for_each_number_of_image(fitted):
    watch = Votes()
    fitted(per_class=3, recover_iterations=2, voting="random", callbacks=[watch])
    assert watch.votes[0] == watch.votes[1]
    assert all(sum(votes.values()) == pytest.approx(1) for votes in watch.votes)
    assert len({tuple(votes.values()) for votes in watch.votes}) == 3


# ---- beside SRe2L++ ------------------------------------------------------------------------------------------------


def test_a_committee_of_one_is_sre2l_that_begins_with_real_images(fitted, members, small_net):
    options = {"per_class": 2, "recover_iterations": 5, "student_epochs": 1}
    alone = fitted(
        make=lambda **_: SRe2L(small_net(), members(1)[0], init="real", **options),
    )
    one = fitted(make=lambda **_: CommitteeRecovery(small_net(), members(1), [64.0], **options))
    assert torch.equal(one.images, alone.images)
    two = fitted(**options)
    assert not torch.equal(one.images, two.images)


def test_the_set_names_its_members_and_their_priors(fitted):
    description = fitted(per_class=1).distilled().description
    assert [member["prior"] for member in description["members"]] == list(PRIORS)
    names = [member["network"] for member in description["members"]]
    assert names == ["DistillationConvNet", "DistillationConvNet", "ConvNet"]
    assert len({member["weights"] for member in description["members"]}) == 3


def test_a_resumed_run_has_the_same_voters(fitted, trainer, digits, recovery, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")

    whole = fitted(per_class=5, voting="random", callbacks=[Save()])
    resumed = recovery(per_class=5, voting="random")
    fit = trainer(max_steps=10, max_epochs=-1)
    fit.fit(resumed, datamodule=digits(), ckpt_path=tmp_path / "killed.ckpt")
    assert torch.equal(resumed.images, whole.images)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"voters": 0}, r"^model\.voters is 0; give 1 or more \(published: 2\)$"),
        ({"temperature": 0.0}, r"^model\.temperature is 0\.0; it must be above 0 \(published: 5\)$"),
        ({"single": [0, 3]}, r"^model\.single: there is no member 3; give positions from 0 to 2$"),
        ({"priors": None}, r"^model\.priors is missing; give 3 numbers in percent"),
        ({"priors": (1.0,)}, r"^model\.priors has 1 numbers for 3 members; give one for each$"),
    ],
)
def test_mistakes_are_told_in_one_line(recovery, options, says):
    with pytest.raises(UsageError, match=says):
        recovery(**options)
