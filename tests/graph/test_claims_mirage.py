"""Mirage on PROTEINS against random graphs of the same bytes, eight paired seeds. Slow: `make test-claims`."""

import statistics
from pathlib import Path

import pytest
from claims import difference, results_of

TU = Path(__file__).parents[3] / "shared/data/tu"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not TU.is_dir():
        pytest.skip(f"{TU} is not there")

    def place(recipe):
        wanted = {"full", *(f"{kind}{network}" for kind in ("random", "mirage") for network in ("", "-gat", "-gcn"))}
        recipe["stages"] = {name: stage for name, stage in recipe["stages"].items() if name in wanted}
        for name, stage in recipe["stages"].items():
            key = "data.init_args.root" if name == "full" else "data.init_args.source.init_args.root"
            stage["set"] = {**stage.get("set", {}), key: str(TU)}

    return results_of("graph_proteins", tmp_path_factory.mktemp("claims"), place)


# GIN +0.16 +- 0.03, GAT +0.20 +- 0.06, GCN +0.25 +- 0.08: areas under the curve, mean and standard error.
@pytest.mark.parametrize("network", ["", "-gat", "-gcn"])
def test_trees_are_far_above_random_graphs_of_the_same_bytes_for_every_network(results, network):
    mean, error = difference(results, f"mirage{network}", "test/auroc", f"random{network}")
    assert mean > 0.05
    assert mean > 2 * error


def test_they_hardly_depend_on_the_seed_and_weigh_a_thousandth(results):
    scores = [metrics["test/auroc"] for metrics in results["mirage"].values()]
    assert statistics.mean(scores) > 0.7
    assert statistics.stdev(scores) < 0.02
    assert results["mirage"][0]["test/bytes_expanded"] == 3668  # the budget of the random graphs
    assert results["random"][0]["test/bytes"] <= 3668
    assert results["mirage"][0]["test/bytes"] < results["full"][0]["test/bytes"] / 500


def test_all_graphs_are_better_still(results):
    full = statistics.mean(metrics["test/auroc"] for metrics in results["full"].values())
    assert full > statistics.mean(metrics["test/auroc"] for metrics in results["mirage"].values()) + 0.03
