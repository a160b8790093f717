"""What the tests of claims share: a recipe's results, and paired differences between its stages."""

import json
import math
import statistics
from pathlib import Path

import yaml

from lit_distill.experiment.recipe import run_recipe

RECIPES = Path(__file__).parents[1] / "configs/recipes"


def results_of(name, root, change=None):
    """Runs a recipe under a folder, changed by a function if one is given; returns metrics by stage and seed."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    if change is not None:
        change(recipe)
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert run_recipe(str(path), root=str(root / "runs")) == 0
    found = {}
    for file in root.glob("runs/**/summary.json"):
        summary = json.loads(file.read_text())
        stage = "/".join([*summary["experiment"].split("/")[1:], summary["stage"]])  # as the recipe has it
        found.setdefault(stage, {})[summary["seed"]] = summary["metrics"]
    return found


def difference(results, stage, metric, other="baseline"):
    """Returns mean and standard error of a metric's difference between two stages, paired by seed."""
    pairs = [results[stage][seed][metric] - results[other][seed][metric] for seed in results[other]]
    return statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
