"""Values of torchdistill, a framework of others, for the same inputs. Skipped where it is not installed."""

import pytest
import torch

from lit_distill.losses import attention_transfer, forward_kl, hint_mse

mid_level = pytest.importorskip("torchdistill.losses.mid_level", reason="torchdistill is not installed (extra 'bench')")

PAIR = {"pair": {"student": {"path": "s", "io": "output"}, "teacher": {"path": "t", "io": "output"}}}


def io(student, teacher):
    return {"s": {"output": student}}, {"t": {"output": teacher}}


@pytest.fixture
def logits():
    return 2 * torch.randn(6, 10), 2 * torch.randn(6, 10)


@pytest.fixture
def maps():
    return torch.randn(3, 8, 4, 4), torch.randn(3, 5, 4, 4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_without_alpha_is_forward_kl_without_t2(logits, temperature):
    # Known deviations: where alpha is unset, beta must be given (and is not used), and the factor tau^2 is dropped.
    theirs = mid_level.KDLoss("s", "output", "t", "output", temperature=temperature, beta=1.0)(*io(*logits))
    torch.testing.assert_close(forward_kl(*logits, temperature=temperature, scale_by_t2=False), theirs)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.1), (4.0, 0.1), (4.0, 0.5)])
def test_kd_with_alpha_is_cross_entropy_plus_forward_kl(logits, temperature, alpha):
    labels = torch.randint(10, (6,))
    theirs = mid_level.KDLoss("s", "output", "t", "output", temperature=temperature, alpha=alpha)(*io(*logits), labels)
    ours = (1 - alpha) * forward_kl(*logits, temperature=temperature)
    torch.testing.assert_close(ours + alpha * torch.nn.functional.cross_entropy(logits[0], labels), theirs)


def test_attention_transfer_is_its_mode_code(maps):
    theirs = mid_level.ATLoss(PAIR, mode="code")(*io(*maps))
    torch.testing.assert_close(attention_transfer(*maps), theirs)


def test_attention_transfer_squared_is_its_mode_paper(maps):
    # A known deviation between paper and code: the norm (paper) and the mean square over positions (code).
    single = [x[:1] for x in maps]
    theirs = mid_level.ATLoss(PAIR, mode="paper")(*io(*single))
    torch.testing.assert_close(attention_transfer(*single), theirs.square() / 16)


def test_hint_is_its_wrapped_mse(maps):
    student, teacher = maps[0], maps[0].flip(0)
    wrapper = mid_level.SimpleLossWrapper(
        torch.nn.MSELoss(),
        input={"is_from_teacher": False, "module_path": "s", "io": "output"},
        target={"is_from_teacher": True, "module_path": "t", "io": "output"},
    )
    theirs = wrapper(*io(student, teacher), None)
    torch.testing.assert_close(hint_mse(student, teacher), theirs)
