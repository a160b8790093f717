import pytest

from lit_distill.core.errors import UsageError
from lit_distill.image import AT, KD, AttentionTransfer, Combined, FitNets, Hint, LogitKL, Term


def terms():
    return [Term(LogitKL(4.0), 0.9), Term(AttentionTransfer(), 1000.0), Term(Hint(), 100.0)]


def test_method(check_method):
    check_method(lambda student, teacher: Combined(student, teacher, terms(), 0.1), extra=("losses",))


def test_terms_are_those_of_the_single_methods(step, tiny):
    _, together = step(Combined(tiny(), tiny(6, seed=5), terms(), 0.1))
    assert list(together) == ["ce", "kd", "at", "hint"]
    for method, name in ((KD, "kd"), (AT, "at"), (FitNets, "hint")):
        _, alone = step(method(tiny(), tiny(6, seed=5)))
        assert together[name] == pytest.approx(alone[name], rel=1e-5), name


def test_the_same_loss_twice_is_refused(tiny):
    with pytest.raises(UsageError, match="the same loss twice"):
        Combined(tiny(), tiny(), [Term(LogitKL(1.0), 1.0), Term(LogitKL(4.0), 1.0)])
