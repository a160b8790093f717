import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill.llm import fused
from lit_distill.llm.fused import SLICE_BYTES, score_tokens, slices
from lit_distill.llm.losses import (
    adaptive_kl,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    sampled_reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
    topk_kl,
    total_variation,
)
from lit_distill.llm.signals import HiddenSignal, LogitSignal, TopK
from lit_distill.llm.vocabularies import uld

N, H, V = 11, 6, 23


def ce(logits, target, labels):
    return cross_entropy(logits, labels)


TERMS = {
    "cross_entropy": ce,
    "forward_kl": lambda s, t, _: forward_kl(s, t),
    "forward_kl at 2": lambda s, t, _: forward_kl(s, t, temperature=2.0),
    "reverse_kl": lambda s, t, _: reverse_kl(s, t),
    "generalized_jsd": lambda s, t, _: generalized_jsd(s, t, teacher_weight=0.3),
    "skew_kl": lambda s, t, _: skew_kl(s, t),
    "skew_reverse_kl": lambda s, t, _: skew_reverse_kl(s, t),
    "adaptive_kl": lambda s, t, _: adaptive_kl(s, t),
    "total_variation": lambda s, t, _: total_variation(s, t),
    "taid": lambda s, t, _: taid(s, t, t=0.4),
    "uld": lambda s, t, _: uld(s, t),
    "sampled_reverse_kl": sampled_reverse_kl,
    "topk bucket": lambda s, t, _: topk_kl(s, t, support="bucket"),
    "topk renormalized": lambda s, t, _: topk_kl(s, t, support="renormalized"),
    "topk gathered": lambda s, t, _: topk_kl(s, t, support="gathered"),
    "topk both": lambda s, t, _: topk_kl(s, t, support="both"),
    "of a user": lambda s, t, labels: (s - t).pow(2).mean(-1) + s.gather(-1, labels[:, None])[:, 0].sin(),
}


def parts(dtype=torch.float64, tokens=N):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    hidden, weight = normal(tokens, H).requires_grad_(), normal(V, H).requires_grad_()
    labels = torch.randint(V, (tokens,), generator=generator)
    return hidden, weight, labels, HiddenSignal(normal(tokens, 4), normal(V, 4))


def signal_for(name, signal):
    logits = signal[0:N]
    kept = TopK(logits.topk(5, -1).indices, logits.log_softmax(-1).topk(5, -1).values)
    return kept if name.startswith("topk") else signal


def dense(hidden, weight, labels, signal, terms, scale):
    """All logits at once, and plain autograd."""
    logits = hidden @ weight.T
    target = None if signal is None else signal[0 : len(hidden)]
    values = {name: loss(logits, target, labels).sum() * scale for name, (loss, _) in terms.items()}
    return sum(terms[name][1] * value for name, value in values.items()), values


def gradients(loss, *leaves, upstream=1.0):
    return torch.autograd.grad(loss * upstream, leaves)


# ---- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, N, N + 5, None])
@pytest.mark.parametrize("name", TERMS)
def test_slices_give_what_all_logits_at_once_give(name, chunk):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        hidden, weight, labels, signal = parts(dtype)
        signal, terms = signal_for(name, signal), {name: (TERMS[name], 0.7)}
        expected, values = dense(hidden, weight, labels, signal, terms, 1 / 40)
        found, sums = score_tokens(hidden, weight, labels, signal, terms, scale=1 / 40, chunk=chunk)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sums[name], values[name].detach(), rtol=tolerance, atol=tolerance)
        grads = gradients(found, hidden, weight, upstream=3.0)
        for ours, theirs in zip(grads, gradients(expected, hidden, weight, upstream=3.0), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_several_terms_add_up_with_their_weights():
    hidden, weight, labels, signal = parts()
    terms = {name: (TERMS[name], factor) for name, factor in (("cross_entropy", 0.25), ("reverse_kl", 2.0))}
    expected, values = dense(hidden, weight, labels, signal, terms, 0.1)
    found, sums = score_tokens(hidden, weight, labels, signal, terms, scale=0.1, chunk=4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sums, {name: value.detach() for name, value in values.items()})
    assert not any(value.requires_grad for value in sums.values())
    torch.testing.assert_close(gradients(found, hidden, weight), gradients(expected, hidden, weight))


def test_gradients_are_those_of_finite_differences():
    hidden, weight, labels, signal = parts()
    terms = {"jsd": (TERMS["generalized_jsd"], 1.0)}

    def value(hidden, weight):
        with torch.no_grad():
            return score_tokens(hidden, weight, labels, signal, terms, scale=0.5, chunk=4)[0]

    found = gradients(score_tokens(hidden, weight, labels, signal, terms, scale=0.5, chunk=4)[0], hidden, weight)
    for number, grad in enumerate(found):
        for row in range(len(grad)):
            step = torch.zeros_like(grad)
            step[row, row % H] = 1e-5
            moved = [[x + sign * step * (i == number) if i == number else x for i, x in enumerate((hidden, weight))]
                     for sign in (1, -1)]  # fmt: skip
            slope = (value(*moved[0]) - value(*moved[1])) / 2e-5
            assert float(grad[row, row % H]) == pytest.approx(float(slope), abs=1e-8)


def test_gradcheck():
    hidden, weight, labels, signal = parts(tokens=4)
    terms = {"kl": (TERMS["reverse_kl"], 1.0)}

    class Fresh(torch.autograd.Function):
        """Gradients are used up by one backward pass, and gradcheck makes several: each gets its own."""

        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(hidden, weight)
            return score_tokens(hidden, weight, labels, signal, terms, scale=0.5, chunk=3)[0]

        @staticmethod
        def backward(ctx, upstream):
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                loss = score_tokens(*leaves, labels, signal, terms, scale=0.5, chunk=3)[0]
            return torch.autograd.grad(loss, leaves, upstream)

    assert torch.autograd.gradcheck(Fresh.apply, (hidden, weight))


# ---- what is computed ----------------------------------------------------------------------------------------------


def test_without_grad_there_are_values_alone():
    hidden, weight, labels, signal = parts()
    terms = {"kl": (TERMS["forward_kl"], 1.0)}
    with torch.no_grad():
        found, sums = score_tokens(hidden, weight, labels, signal, terms, scale=0.1, chunk=4)
    expected, _ = dense(hidden, weight, labels, signal, terms, 0.1)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(sums["kl"], expected.detach())
    frozen, _ = score_tokens(hidden.detach(), weight.detach(), labels, signal, terms, scale=0.1)
    assert not frozen.requires_grad


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(trained):
    hidden, weight, labels, signal = parts()
    terms = {"kl": (TERMS["forward_kl"], 1.0)}
    expected = dict(zip(("hidden", "weight"), gradients(dense(hidden, weight, labels, signal, terms, 0.1)[0],
                                                        hidden, weight), strict=True))  # fmt: skip
    other = weight if trained == "hidden" else hidden
    other.requires_grad_(False)
    with Shapes() as seen:
        score_tokens(hidden, weight, labels, signal, terms, scale=0.1, chunk=4)[0].backward()
    assert other.grad is None
    torch.testing.assert_close((hidden if trained == "hidden" else weight).grad, expected[trained])
    assert seen.names.count("addmm_") == (3 if trained == "weight" else 0)


@pytest.mark.parametrize("gradient", [True, False])
def test_no_tokens_are_a_loss_of_zero(gradient):
    hidden, weight, labels, signal = parts(tokens=0)
    terms = {"kl": (TERMS["forward_kl"], 1.0), "ce": (ce, 1.0)}
    with torch.set_grad_enabled(gradient):
        found, sums = score_tokens(hidden, weight, labels, signal, terms, scale=0.1)
    assert float(found.detach()) == 0
    assert {name: float(value) for name, value in sums.items()} == {"kl": 0.0, "ce": 0.0}
    if gradient:
        found.backward()
        assert hidden.grad.shape == (0, H)
        assert torch.equal(weight.grad, torch.zeros(V, H, dtype=torch.float64))


def test_a_term_of_weight_zero_is_reported_and_has_no_gradient():
    hidden, weight, labels, signal = parts()
    watched = {"ce": (ce, 0.0), "kl": (TERMS["forward_kl"], 1.0)}
    found, sums = score_tokens(hidden, weight, labels, signal, watched, scale=0.1, chunk=4)
    expected, values = dense(hidden, weight, labels, signal, watched, 0.1)
    torch.testing.assert_close(sums["ce"], values["ce"].detach())
    torch.testing.assert_close(gradients(found, hidden, weight), gradients(expected, hidden, weight))
    alone, _ = score_tokens(hidden, weight, labels, signal, {"ce": (ce, 0.0)}, scale=0.1)
    assert all((grad == 0).all() for grad in gradients(alone, hidden, weight))


def test_labels_are_enough_without_a_teacher():
    hidden, weight, labels, _ = parts()
    found, _ = score_tokens(hidden, weight, labels, None, {"ce": (ce, 1.0)}, scale=1 / N, chunk=4)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, labels))


def test_logits_that_exist_will_do_as_a_signal():
    hidden, weight, labels, signal = parts()
    terms = {"kl": (TERMS["forward_kl"], 1.0)}
    first, second = (
        score_tokens(hidden, weight, labels, x, terms, scale=0.1, chunk=4)[0]
        for x in (signal, LogitSignal(signal[0:N]))
    )
    torch.testing.assert_close(first, second)


def test_the_teacher_and_what_a_loss_closes_over_get_no_gradient():
    hidden, weight, labels, signal = parts()
    signal.weight.requires_grad_()
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    terms = {"kl": (lambda s, t, _: forward_kl(s / temperature, t), 1.0)}
    score_tokens(hidden, weight, labels, signal, terms, scale=0.1)[0].backward()
    assert signal.weight.grad is None
    assert temperature.grad is None
    assert hidden.grad is not None


def test_the_head_of_a_larger_vocabulary_may_be_cut():
    hidden, weight, labels, _ = parts()
    terms = {"ce": (ce, 1.0)}
    score_tokens(hidden, weight[:20], labels.clamp(max=19), None, terms, scale=0.1)[0].backward()
    assert weight.grad[:20].abs().sum() > 0
    assert (weight.grad[20:] == 0).all()


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    hidden, weight, labels, signal = parts()
    loss, _ = score_tokens(hidden, weight, labels, signal, {"kl": (TERMS["forward_kl"], 1.0)}, scale=0.1)
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by one backward pass; compute the loss again"):
        loss.backward()


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd", "taid", "cross_entropy"])
def test_bfloat16_comes_as_near_as_it_can(name):
    exact = [x.bfloat16().double() for x in (lambda p: (p[0], p[1], p[3].hidden, p[3].weight))(parts())]
    labels = parts()[2]
    hidden, weight = (x.detach().requires_grad_() for x in exact[:2])
    terms = {name: (TERMS[name], 1.0)}
    expected, _ = dense(hidden, weight, labels, HiddenSignal(*exact[2:]), terms, 1 / N)
    half = [x.detach().bfloat16() for x in exact]
    student = [x.requires_grad_() for x in half[:2]]
    found, _ = score_tokens(*student, labels, HiddenSignal(*half[2:]), terms, scale=1 / N, chunk=2)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=2e-2)
    for ours, theirs in zip(gradients(found, *student), gradients(expected, hidden, weight), strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 1.5e-2


def test_autocast_multiplies_in_half_and_sums_the_heads_gradient_in_float32():
    hidden, weight, labels, signal = parts(torch.float32)
    terms = {"kl": (TERMS["forward_kl"], 1.0)}
    expected = gradients(dense(hidden, weight, labels, signal, terms, 1 / N)[0], hidden, weight)
    seen = []

    def spy(logits, target, labels):
        seen.append(logits.dtype)
        return forward_kl(logits, target)

    with torch.autocast("cpu", torch.bfloat16), Shapes() as shapes:
        found, _ = score_tokens(hidden, weight, labels, signal, {"kl": (spy, 1.0)}, scale=1 / N, chunk=2)
    assert set(seen) == {torch.float32}
    assert found.dtype == torch.float32
    assert shapes.products == {torch.bfloat16}
    for ours, theirs in zip(gradients(found, hidden, weight), expected, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < float((ours - theirs).norm() / theirs.norm()) < 1.5e-2


def test_many_slices_do_not_blur_the_heads_gradient():
    """In bfloat16 a sum of 400 equal parts would stop growing at 256 of them."""
    hidden = torch.ones(400, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(400, dtype=torch.long)
    score_tokens(hidden, weight, labels, None, {"ce": (ce, 1.0)}, scale=1.0, chunk=1)[0].backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-200.0], [200.0]], dtype=torch.bfloat16), rtol=0, atol=0)


# ---- memory --------------------------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Notes the largest tensor that any operation made, and the names of operations."""

    def __init__(self):
        super().__init__()
        self.largest, self.names, self.products = 0, [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in made)])
        self.names.append(function.overloadpacket.__name__)
        if self.names[-1] in ("mm", "addmm", "addmm_", "linear"):
            self.products |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize("name", TERMS)
def test_logits_of_all_tokens_never_exist(name):
    hidden, weight, labels, signal = parts()
    signal, terms, chunk = signal_for(name, signal), {name: (TERMS[name], 1.0)}, 4
    with Shapes() as seen:
        dense(hidden, weight, labels, signal, terms, 1.0)[0].backward()
    assert seen.largest >= N * V
    with Shapes() as seen:
        score_tokens(hidden, weight, labels, signal, terms, scale=1.0, chunk=chunk)[0].backward()
    assert seen.largest <= max(chunk * V, V * H)


def test_gradients_are_handed_over_and_not_copied(monkeypatch):
    hidden, weight, labels, signal = parts(torch.float32)
    made, add = set(), fused._add_product
    monkeypatch.setattr(fused, "_add_product", lambda total, *rest: made.add(total.data_ptr()) or add(total, *rest))
    score_tokens(hidden, weight, labels, signal, {"kl": (TERMS["forward_kl"], 1.0)}, scale=0.1, chunk=4)[0].backward()
    assert made == {weight.grad.data_ptr()}


@pytest.mark.parametrize("vocabulary", [100, 49_152, 151_936, 2**26])
def test_default_slices_are_small_and_leave_nothing_out(vocabulary):
    cut = list(slices(5000, vocabulary))
    rows = [row for part in cut for row in range(5000)[part]]
    assert rows == list(range(5000))
    size = cut[0].stop - cut[0].start
    assert size == 1 or size * vocabulary * 4 <= SLICE_BYTES
    assert len(cut) == math.ceil(5000 / size)
    assert list(slices(0, vocabulary)) == []


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_jsd_is_that_of_liger(beta):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    (hidden, weight, labels, signal), (theirs_hidden, theirs_weight, *_) = parts(torch.float32), parts(torch.float32)
    chunked = liger.LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=False, chunk_size=4)
    theirs = chunked(theirs_hidden, theirs_weight, signal.hidden, signal.weight, labels)
    terms = {"jsd": (lambda s, t, _: generalized_jsd(s, t, teacher_weight=beta), 1.0)}
    ours, _ = score_tokens(hidden, weight, labels, signal, terms, scale=1 / N, chunk=3)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours, theirs.reshape(()))
    torch.testing.assert_close(hidden.grad, theirs_hidden.grad)
    torch.testing.assert_close(weight.grad, theirs_weight.grad)
