"""Diff-Instruct: its steps and its weights."""

import pytest
import torch
from score_methods import check_score_method

from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.diff_instruct import DiffInstruct
from lit_distill.diffusion.paths import FlowPath
from lit_distill.diffusion.rollout import Sample


def test_method(trainer, digits, make_denoiser, little, tmp_path):
    def build(cls):
        return cls(make_denoiser(1), make_denoiser(0), [2.5], evaluation=little)

    check_score_method(build, DiffInstruct, trainer, digits, tmp_path)


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
