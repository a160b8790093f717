"""What a sweep draws, laid beside the definitions of W&B's distributions in scipy's words."""

import json
import math
import warnings

import numpy as np
import optuna
import pytest
from scipy import stats

from lit_distill.core.errors import UsageError
from lit_distill.experiment.sweep.space import Choice, Constant, read_distribution

DRAWS = 2000
E = math.e


@pytest.fixture(scope="module")
def draw():
    """Draws many values of one parameter, as a random search would."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def many(spec, number=DRAWS):
        distribution = read_distribution("x", spec)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
        return [distribution.suggest(study.ask(), "x") for _ in range(number)]

    return many


LOG_UNIFORM = stats.loguniform(1e-4, 1e-1)
CONTINUOUS = {
    "uniform": ({"min": 1.0, "max": 8.0}, stats.uniform(1, 7)),
    # Ends are exponents to base e.
    "log_uniform": ({"min": -3, "max": 2}, stats.loguniform(E**-3, E**2)),
    "log_uniform_values": ({"min": 1e-4, "max": 0.1}, LOG_UNIFORM),
    # 1 / x is between e^-3 and e^2.
    "inv_log_uniform": ({"min": -3, "max": 2}, stats.loguniform(E**-2, E**3)),
    "inv_log_uniform_values": ({"min": 1e-4, "max": 0.1}, LOG_UNIFORM),
    "normal": ({"mu": 2.0, "sigma": 0.5}, stats.norm(2, 0.5)),
    "log_normal": ({"mu": 1.0, "sigma": 0.5}, stats.lognorm(0.5, scale=E)),
    "beta": ({"a": 2, "b": 5}, stats.beta(2, 5)),
}


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_continuous_distributions_are_what_their_names_say(draw, kind):
    numbers, law = CONTINUOUS[kind]
    values = draw({"distribution": kind, **numbers})
    # A right sampler falls below this in one seed of a thousand, and the seed is fixed.
    assert stats.kstest(values, law.cdf).pvalue > 0.001
    assert all(isinstance(value, float) for value in values)


@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta"])
def test_quantized_ones_are_rounded_to_multiples(draw, kind):
    numbers, law = CONTINUOUS[kind]
    q = 0.25 if kind not in ("log_uniform_values", "beta") else 0.02
    values = draw({"distribution": f"q_{kind}", "q": q, **numbers})
    multiples = np.array(values) / q
    assert np.allclose(multiples, multiples.round(), atol=1e-9)
    for multiple in set(multiples.round()):  # the share of each is the mass of what is rounded to it
        mass = law.cdf((multiple + 0.5) * q) - law.cdf((multiple - 0.5) * q)
        share = np.mean(multiples.round() == multiple)
        assert abs(share - mass) < 4 * math.sqrt(mass * (1 - mass) / DRAWS) + 1e-3


def test_quantized_by_a_whole_number_gives_whole_numbers(draw):
    values = draw({"distribution": "q_log_uniform_values", "min": 16, "max": 512, "q": 16}, 50)
    assert all(isinstance(value, int) and value % 16 == 0 for value in values)


def test_whole_numbers_include_both_ends_equally(draw):
    values = draw({"min": 2, "max": 5})  # W&B: two whole ends mean int_uniform
    counts = [values.count(value) for value in (2, 3, 4, 5)]
    assert sum(counts) == DRAWS
    assert stats.chisquare(counts).pvalue > 0.001


def test_two_ends_that_are_not_both_whole_mean_uniform(draw):
    assert any(value != round(value) for value in draw({"min": 2, "max": 5.0}, 20))


def test_choices_are_equally_likely_and_keep_their_types(draw):
    options = [1, True, 1.5, "a", None, [0.2, 0.4], {"class_path": "x"}]
    values = draw({"values": options})
    counts = [sum(json.dumps(value) == json.dumps(option) for value in values) for option in options]
    assert sum(counts) == DRAWS  # 1 and True are two options
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("kind", [{}, {"distribution": "categorical_w_probabilities"}])
def test_choices_have_their_probabilities(draw, kind):
    values = draw({"values": ["a", "never", "b"], "probabilities": [0.1, 0.0, 0.9], **kind})
    assert values.count("never") == 0
    assert stats.binomtest(values.count("a"), DRAWS, 0.1).pvalue > 0.001


def test_a_value_is_a_constant():
    assert read_distribution("x", {"value": [1, 2]}) == Constant([1, 2])
    assert read_distribution("x", {"value": None}).suggest(None, "x") is None


def test_the_last_choice_is_in_reach_whatever_rounding_does():
    class Edge:
        def suggest_float(self, name, low, high):
            return high

    assert Choice(("a", "b"), (0.1, 0.9 - 1e-16)).suggest(Edge(), "x") == "b"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"distribution": "unifrom", "min": 0, "max": 1}, "'unifrom' is not known"),
        ({"distribution": "uniform", "min": 0.0}, "no `max`"),
        ({"distribution": "uniform", "min": 1.0, "max": 1.0}, "the smaller as min"),
        ({"min": "1e-4", "max": 0.1}, "write 1.0e-4"),
        ({"distribution": "log_uniform_values", "min": 0.0, "max": 1.0}, "`min` above 0"),
        ({"distribution": "int_uniform", "min": 0, "max": 1.5}, "give whole numbers"),
        ({"distribution": "normal", "sigma": 0.0}, "sigma is 0.0"),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}, "q is 0"),
        ({"distribution": "uniform", "min": 0, "max": 1, "q": 1}, "no key 'q'"),
        ({"values": []}, "at least one"),
        ({"values": [1, 1]}, "1 stands twice"),
        ({"values": [1, 2], "probabilities": [0.5]}, "one for each"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "1 in all"),
        ({}, "has no value"),
    ],
)
def test_what_makes_no_sense_is_told(spec, words):
    with pytest.raises(UsageError, match=r"^sweep s: x") as error:
        read_distribution("sweep s: x", spec)
    assert words in str(error.value)


def test_the_optimiser_searches_logarithms_and_choices(draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        trial = study.ask()
        read_distribution("x", {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}).suggest(trial, "lr")
        read_distribution("x", {"values": ["a", [1, 2]]}).suggest(trial, "kind")
    assert trial.distributions["lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)
    assert trial.distributions["kind"] == optuna.distributions.CategoricalDistribution(['"a"', "[1, 2]"])
