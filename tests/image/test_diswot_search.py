import json
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from lit_distill.cli import main
from lit_distill.core.errors import UsageError
from lit_distill.core.networks import count_parameters, pretrained
from lit_distill.experiment.launch import DistillCLI
from lit_distill.image.losses.diswot import RelationSimilarity, SemanticSimilarity
from lit_distill.image.losses.logits import LogitKL
from lit_distill.image.losses.maps import Hint
from lit_distill.image.methods import diswot_search
from lit_distill.image.methods.diswot_search import DisWOTSearch
from lit_distill.image.models import LeNet, ResNetCIFAR
from lit_distill.image.search import (
    AgingEvolution,
    ArgumentSpace,
    Budget,
    Candidate,
    ClassMapSimilarity,
    RandomSearch,
    ResNetSpace,
    StagedResNet,
    TrainingFreeScores,
    fitness,
    seeded,
    size,
)
from lit_distill.image.search.evolution import propose_within

ROOT = Path(__file__).parents[2]


@pytest.fixture
def space():
    """27 small networks for the images of `blobs`."""
    return ResNetSpace(3, depths=(1, 2, 3), widths=((4,), (4,), (8,)), in_channels=2)


@pytest.fixture
def batch(blobs):
    return blobs.batches()[0]


def candidates(*scores):
    return [Candidate((number,), {"a": a, "b": b}) for number, (a, b) in enumerate(scores)]


# ---- spaces --------------------------------------------------------------------------------------------------------


def test_s0_has_64_networks_and_the_first_and_last_are_of_known_size():
    space = ResNetSpace(100)
    assert len(space) == len(set(space.architectures())) == 64
    assert space.depth((3, 3, 3, 16, 32, 64)) == 20
    assert count_parameters(space.build((3, 3, 3, 16, 32, 64))) == count_parameters(ResNetCIFAR(20, 100))


def test_equal_depths_are_the_network_of_the_literature():
    staged, known = seeded(lambda: StagedResNet((3, 3, 3), 10), 4), seeded(lambda: ResNetCIFAR(20, 10), 4)
    assert list(staged.state_dict()) == list(known.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(staged.state_dict().values(), known.state_dict().values(), strict=True)
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(staged(images), known(images))


def test_a_mutation_changes_exactly_one_open_gene(space):
    random, start = Random(0), (1, 2, 3, 4, 4, 8)
    seen = {space.mutate(start, random) for _ in range(300)}
    assert len(seen) == 6  # three open genes with two other choices each
    for mutant in seen:
        assert sum(a != b for a, b in zip(start, mutant, strict=True)) == 1
        assert mutant in space.architectures()


def test_samples_cover_the_space_evenly(space):
    random = Random(0)
    drawn = [space.sample(random) for _ in range(2700)]
    assert set(drawn) == set(space.architectures())
    assert max(map(drawn.count, set(drawn))) < 150  # 100 expected, standard deviation 10


def test_any_network_can_be_searched_by_its_arguments():
    space = ArgumentSpace(
        "lit_distill.image.models.LeNet", {"num_classes": [10], "widths": [[2, 4], [4, 8]], "hidden": [0, 16]}
    )
    assert len(space) == 4
    assert space.spec((0, 1, 0))["init_args"] == {"num_classes": 10, "widths": [4, 8], "hidden": 0}
    assert count_parameters(space.build((0, 1, 0))) == 4266
    assert [space.depth(architecture) for architecture in space.architectures()] == [3, 4, 3, 4]


def test_size_is_that_of_the_network_and_draws_nothing():
    before = torch.get_rng_state()
    found = size(lambda: LeNet(10, [4, 8], 0), (1, 28, 28))
    assert torch.equal(before, torch.get_rng_state())
    assert found["params"] == 4266
    assert found["flops"] == 2 * (28 * 28 * 9 * 4 + 14 * 14 * 9 * 4 * 8 + 392 * 10)


# ---- scores --------------------------------------------------------------------------------------------------------


def test_a_score_is_minus_the_loss_between_random_networks_in_train_mode(space, batch):
    student, teacher = (lambda: space.build((1, 2, 1, 4, 4, 8))), lambda: space.build((3, 3, 3, 4, 4, 8))
    before = torch.get_rng_state()
    scores = TrainingFreeScores(teacher, [LogitKL(2.0)], batch, seeds=(3, 8))
    expected = []
    for seed in (3, 8):
        with torch.no_grad():
            logits = [seeded(build, seed).train()(batch.images) / 2 for build in (student, teacher)]
            kl = F.kl_div(logits[0].log_softmax(1), logits[1].softmax(1), reduction="batchmean")
        expected.append(-4 * float(kl))
    assert [run["kd"] for run in scores.by_seed(student)] == pytest.approx(expected, rel=1e-4)
    assert scores(student)["kd"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        resting = [seeded(build, 3).eval()(batch.images) / 2 for build in (student, teacher)]
    other = -4 * float(F.kl_div(resting[0].log_softmax(1), resting[1].softmax(1), reduction="batchmean"))
    assert expected[0] != pytest.approx(other, rel=0.01)


def test_the_teacher_of_a_seed_is_the_same_for_all_candidates(space, batch):
    built = []

    def teacher():
        built.append(1)
        return space.build((2, 2, 2, 4, 4, 8))

    scores = TrainingFreeScores(teacher, [SemanticSimilarity(), RelationSimilarity()], batch, seeds=(0, 1, 2))
    first = scores(lambda: space.build((1, 1, 1, 4, 4, 8)))
    scores(lambda: space.build((3, 1, 1, 4, 4, 8)))
    assert scores(lambda: space.build((1, 1, 1, 4, 4, 8))) == first
    assert len(built) == 3


def test_a_network_scores_zero_against_itself_and_less_against_others(space, batch):
    losses = [SemanticSimilarity(), RelationSimilarity(), ClassMapSimilarity()]
    scores = TrainingFreeScores(lambda: space.build((2, 1, 2, 4, 4, 8)), losses, batch)
    assert set(scores(lambda: space.build((2, 1, 2, 4, 4, 8))).values()) == {0.0}
    assert max(scores(lambda: space.build((2, 2, 2, 4, 4, 8))).values()) < 0.0


def test_the_semantic_score_is_that_of_autograds_gradient(space, batch):
    gradients = []
    for architecture in ((1, 1, 1, 4, 4, 8), (3, 3, 3, 4, 4, 8)):
        network = seeded(lambda a=architecture: space.build(a), 0).train()
        F.cross_entropy(network(batch.images), batch.labels).backward()
        gradient = network.linear.weight.grad.double()
        gradients.append(F.normalize(gradient[:, :, None] * gradient[:, None, :], dim=2, eps=1e-30))
    expected = -float((gradients[0] - gradients[1]).square().sum()) / (3 * 8)
    scores = TrainingFreeScores(lambda: space.build((3, 3, 3, 4, 4, 8)), [SemanticSimilarity()], batch, seeds=[0])
    assert scores(lambda: space.build((1, 1, 1, 4, 4, 8)))["semantic"] == pytest.approx(expected, rel=1e-3)


def test_losses_with_projectors_are_scored_the_same_each_time_and_named(space, batch):
    scores = TrainingFreeScores(lambda: space.build((2, 2, 2, 4, 4, 8)), [LogitKL(), Hint()], batch, seeds=[0])
    first = scores(lambda: space.build((1, 1, 1, 4, 4, 8)))
    torch.randn(7)
    assert scores(lambda: space.build((1, 1, 1, 4, 4, 8))) == first
    assert scores.with_projectors == {"hint"}


def test_the_public_codes_initialization_is_standard_normal():
    network = seeded(lambda: StagedResNet((1, 1, 1), 10), 0, "normal")
    weights = network.get_submodule("layer3.0.conv1").weight
    assert float(weights.detach().std()) == pytest.approx(1.0, abs=0.02)
    assert float(network.linear.weight.detach().std()) == pytest.approx(1.0, abs=0.1)
    assert float(seeded(lambda: StagedResNet((1, 1, 1), 10), 0).linear.weight.detach().std()) < 0.2


def test_scores_want_losses_of_different_names(space, batch):
    with pytest.raises(UsageError, match="the same loss twice"):
        TrainingFreeScores(lambda: space.build((1, 1, 1, 4, 4, 8)), [LogitKL(), LogitKL()], batch)


# ---- evolution -----------------------------------------------------------------------------------------------------


def test_ranks_count_both_scores_alike_where_the_sum_follows_the_larger():
    history = candidates((-100.0, -0.3), (-101.0, -0.1), (-150.0, -0.2))
    assert fitness(history, "sum").argmax() == 0
    # Ranks, higher is better: a 3 2 1, b 1 3 2.
    assert fitness(history, "rank").tolist() == [2.0, 2.5, 1.5]


def test_the_parent_is_the_best_of_the_tournament_among_the_living():
    space = ArgumentSpace("none", {"x": list(range(5)), "y": list(range(5))})
    # The oldest is the best of all, and dead.
    history = [Candidate((4, 4), {"a": 9.0}), *(Candidate((x, 0), {"a": float(x)}) for x in (1, 3, 0, 2))]
    evolution = AgingEvolution(population=4, tournament=4)
    children = {evolution.propose(space, history, Random(seed), "sum") for seed in range(200)}
    assert all((child[0] == 3) != (child[1] == 0) for child in children)  # one mutation away from (3, 0)
    assert len(children) == 8
    # A tournament of one is a random parent.
    parents = {
        child[0] for child in (AgingEvolution(4, 1).propose(space, history, Random(s), "sum") for s in range(99))
    }
    assert parents == {0, 1, 2, 3, 4}


def test_the_first_population_is_random():
    space = ArgumentSpace("none", {"x": list(range(50))})
    history = [Candidate((0,), {"a": 1.0})] * 3
    proposals = [AgingEvolution(4, 2).propose(space, history, Random(seed), "sum") for seed in range(30)]
    assert proposals == [RandomSearch().propose(space, history, Random(seed), "sum") for seed in range(30)]


def test_evolution_climbs_where_random_search_does_not():
    space = ArgumentSpace("none", {name: list(range(10)) for name in "abcdef"})  # a million
    planted = (3, 1, 4, 1, 5, 9)

    def best(algorithm):
        history = []
        for step in range(1000):
            proposed = algorithm.propose(space, history, Random(step), "sum")
            distance = sum(abs(a - b) for a, b in zip(proposed, planted, strict=True))
            history.append(Candidate(proposed, {"a": -float(distance)}))
        return max(candidate.scores["a"] for candidate in history)

    assert best(AgingEvolution()) == 0.0
    assert best(RandomSearch()) < -1.0


def test_proposals_stay_within_the_budget(space):
    shape, history = (2, 8, 8), []
    sizes = {a: size(lambda a=a: space.build(a), shape) for a in space.architectures()}
    budgets = [Budget(depth=10), Budget(params=2000), Budget(flops=120_000), Budget(params=2500, depth=8)]
    for budget in budgets:
        allowed = {
            a
            for a, found in sizes.items()
            if space.depth(a) <= (budget.depth or 99)
            and found["params"] <= (budget.params or 1e9)
            and found["flops"] <= (budget.flops or 1e9)
        }
        assert 0 < len(allowed) < 27
        seen = {propose_within(RandomSearch(), budget, space, history, Random(s), "sum", shape) for s in range(60)}
        assert seen <= allowed
        assert len(seen) >= 0.8 * len(allowed)


def test_a_budget_for_nothing_is_refused(space):
    with pytest.raises(UsageError, match="leaves no architecture"):
        propose_within(RandomSearch(), Budget(params=10), space, [], Random(0), "sum", (2, 8, 8))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AgingEvolution(4, 5), "tournament: 5 of a population of 4"),
        (lambda: ResNetSpace(10, depths=()), "empty or repeated"),
        (lambda: ResNetSpace(10, widths=((8,),)), "1 stages; give the choices of three"),
        (lambda: StagedResNet((0, 1, 1), 10), "1 or more each"),
        (lambda: DisWOTSearch(nn.Identity, ResNetSpace(10), evaluations=0), r"model\.evaluations is 0"),
    ],
)
def test_wrong_numbers_are_refused(build, words):
    with pytest.raises(UsageError, match=words):
        build()


# ---- the search as a module ----------------------------------------------------------------------------------------


def search(space, evaluations=14, **kwargs):
    teacher = lambda: space.build((2, 3, 1, 4, 4, 8))  # noqa: E731
    options = {"algorithm": AgingEvolution(5, 3), "seeds": 2, "evaluations": evaluations}
    return DisWOTSearch(teacher, space, **(options | kwargs))


def test_search_finds_the_planted_teacher_and_leaves_a_student(trainer, blobs, space, tmp_path):
    module = search(space, evaluations=60)
    trainer(max_epochs=-1).fit(module, datamodule=blobs)
    assert len(module.history) == 60
    assert module.winner == Candidate((2, 3, 1, 4, 4, 8), {"semantic": 0.0, "relation": 0.0})
    assert len({candidate.architecture for candidate in module.history}) < 60  # some came again, with the same score
    written = yaml.safe_load((tmp_path / "winner.yaml").read_text())["model"]["init_args"]["student"]
    assert written == space.spec((2, 3, 1, 4, 4, 8))
    student = pretrained(str(tmp_path))
    assert isinstance(student, StagedResNet)
    torch.testing.assert_close(
        student.state_dict(), seeded(lambda: space.build(module.winner.architecture), 0).state_dict()
    )
    listed = json.loads((tmp_path / "candidates.json").read_text())
    assert [tuple(entry["architecture"]) for entry in listed] == [c.architecture for c in module.history]


def test_a_killed_search_goes_on_to_the_same_candidates(trainer, blobs, space, tmp_path):
    whole = search(space)
    trainer(max_epochs=-1).fit(whole, datamodule=blobs)
    killed = search(space)
    first = trainer(max_epochs=3)  # 9 of 14 candidates, in the fourth generation
    first.fit(killed, datamodule=blobs)
    assert len(killed.history) == 9
    first.save_checkpoint(tmp_path / "killed.ckpt")
    blobs.images = blobs.images.flip(0)  # what the loader gives now must not count
    resumed = search(space)
    trainer(max_epochs=-1).fit(resumed, datamodule=blobs, ckpt_path=tmp_path / "killed.ckpt", weights_only=True)
    assert resumed.history == whole.history


@pytest.mark.parametrize("algorithm", [AgingEvolution(5, 3), RandomSearch()])
def test_seeds_decide(trainer, blobs, space, monkeypatch, algorithm):
    def run(seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        module = search(space, evaluations=7, algorithm=algorithm)
        trainer(max_epochs=-1).fit(module, datamodule=blobs)
        return module.history

    assert run(1) == run(1) != run(2)
    assert len({candidate.architecture for candidate in run(1)}) > 3  # each step draws anew


def test_every_candidate_is_scored_on_the_first_batch(trainer, blobs, space):
    module = search(space, evaluations=7, seeds=1)
    trainer(max_epochs=-1).fit(module, datamodule=blobs)
    scores = TrainingFreeScores(module._teacher[0], module.proxies, blobs.batches()[0], module._scores.seeds)
    for architecture, found in module.history:
        assert scores(lambda a=architecture: space.build(a)) == pytest.approx(found)


def test_no_search_reads_published_accuracy():
    files = [Path(diswot_search.__file__), *(ROOT / "lit_distill/image/search").glob("*.py")]
    assert len(files) > 3
    assert not any("published" in file.read_text() for file in files)


def test_command_leaves_a_summary_and_a_configuration_that_trains(tmp_path, monkeypatch):
    cpu = [
        "-c",
        str(ROOT / "configs/trainer/cpu.yaml"),
        f"--run.root={tmp_path}",
        "--trainer.enable_progress_bar=false",
    ]
    small = ["-c", str(ROOT / "configs/image/diswot_search_small.yaml"), "--model.init_args.evaluations=10"]
    assert main(["fit", *cpu, *small, "--run.name=search"]) == 0
    folder = tmp_path / "default/search"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"val/semantic", "val/relation", "val/params", "val/flops"} == set(summary["metrics"])
    assert summary["metrics"]["val/params"] <= 86_000
    built = []
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, _: built.append(cli))
    teacher = ["--model.init_args.teacher=lit_distill.image.models.LeNet", "--model.init_args.teacher.num_classes=10"]
    train = ["-c", str(ROOT / "configs/image/diswot_small.yaml"), "-c", str(folder / "winner.yaml"), *teacher]
    assert main(["fit", *cpu, *train, "--run.name=train"]) == 0
    assert count_parameters(built[0].model.student) == summary["metrics"]["val/params"]
