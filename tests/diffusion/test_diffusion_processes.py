"""Methods with an average of their student in two processes (gloo) against one: the same losses, the same weights."""

import functools

import pytest
import torch
from processes import CASES, fit, launch


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes find, launched once for all."""
    return launch(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def one():
    """What one process finds."""
    return functools.cache(fit)


def check(found, alone):
    assert [list(row) for row in found["rows"]] == [list(row) for row in alone["rows"]]
    for row, expected in zip(found["rows"], alone["rows"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found["validated"] == pytest.approx(alone["validated"], rel=1e-3)  # of the average
    assert found["state"].keys() == alone["state"].keys()
    for key, value in alone["state"].items():
        torch.testing.assert_close(found["state"][key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, one, two):
    alone = one(name.removesuffix(" under ddp"))
    assert len(alone["rows"]) == 8
    assert len({tuple(row.values()) for row in alone["rows"]}) == 8
    assert len(set(alone["validated"])) == 2
    check(two[name], alone)


def test_a_sharded_run_goes_on_from_its_checkpoint_with_the_average(one, two):
    alone = one("dmd2")
    check(two["resumed"], alone | {"rows": alone["rows"][4:], "validated": alone["validated"][1:]})
