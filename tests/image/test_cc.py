import math

import pytest
import torch

from lit_distill.image import Combined, Term
from lit_distill.image.losses.relations import KernelCongruence
from lit_distill.image.methods.cc import CC


def test_method(check_method):
    module = check_method(CC, extra=("losses",))
    loss = module.losses["cc"]
    assert loss.student_embedding.weight.shape == (128, 4)
    assert loss.teacher_embedding.weight.shape == (128, 6)


def test_the_term_is_the_mean_product_of_neighboring_differences(step, tiny, blobs):
    teacher = tiny(6, seed=5).eval()
    module = CC(tiny(), teacher, dimensions=5, cc_weight=3.0)
    build, seen = module.build, {}

    def keep():
        build()
        # As of the start: a step changes it.
        seen.update({key: value.clone() for key, value in module.losses["cc"].state_dict().items()})

    module.build = keep
    _, terms = step(module)
    embedded = []
    for role, network in (("student", tiny()), ("teacher", teacher)):
        pooled = network.stage2(network.stage1(blobs.images[:8])).mean((2, 3))
        embedded.append(pooled @ seen[f"{role}_embedding.weight"].T + seen[f"{role}_embedding.bias"])
    d = (embedded[0] - embedded[1]).abs().detach()
    expected = sum(float(d[i] @ d[i + 1]) for i in range(7)) / 7
    assert terms["cc"] == pytest.approx(3 * expected, rel=1e-4)


def test_defaults_are_the_published_ones(tiny):
    module = CC(tiny(), tiny())
    assert (module.weights["cc"], module.label_weight, module.losses["cc"].dimensions) == (0.02, 1.0, 128)


def test_the_papers_form_is_a_term_without_embeddings(step, tiny, blobs):
    def correlations(network):
        with torch.no_grad():
            f = network.pool(network.stage2(network.stage1(blobs.images[:8]))).double()
        cosines = torch.cosine_similarity(f[:, None], f[None], dim=2)
        return math.exp(-0.8) * (1 + 0.8 * cosines + 0.32 * cosines.square())

    teacher = tiny(6, seed=5).eval()
    expected = (correlations(tiny()) - correlations(teacher)).square().mean().item()
    moved, values = step(Combined(tiny(), teacher, [Term(KernelCongruence(), 2.0)], label_weight=0.0))
    assert values["cc_kernel"] == pytest.approx(2 * expected, rel=1e-3)
    assert {key.partition(".")[0] for key in moved} == {"student"}
