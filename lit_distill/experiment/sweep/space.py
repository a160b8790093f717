"""The space that a sweep searches: W&B's distributions, drawn by optuna.

Optuna draws uniformly, or uniformly in the logarithm. All other distributions are a function of such a draw: a value of
`normal` is the quantile of a uniform number, one of `q_uniform` is rounded. So the optimiser searches a space that is
flat under the prior.
"""

import json
import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from lit_distill.core.errors import UsageError

if TYPE_CHECKING:
    from optuna.trial import Trial

_TAIL = 1e-6  # of a distribution without ends, so much is left out on each side


@dataclass(frozen=True)
class Constant:
    """One value."""

    value: Any

    def suggest(self, trial: "Trial", name: str) -> Any:
        """Returns the value."""
        return self.value

    def grid(self) -> Sequence[Any]:
        """Returns the value."""
        return (self.value,)


@dataclass(frozen=True)
class Choice:
    """One of several values, equally likely or with given probabilities."""

    values: tuple[Any, ...]
    probabilities: tuple[float, ...] | None = None

    def suggest(self, trial: "Trial", name: str) -> Any:
        """Draws a value."""
        if self.probabilities is None:
            # As text, since optuna takes neither lists nor mappings, and holds 1, 1.0 and true for one value.
            texts = [json.dumps(value) for value in self.values]
            return self.values[texts.index(trial.suggest_categorical(name, texts))]
        place = bisect(list(accumulate(self.probabilities)), trial.suggest_float(name, 0.0, 1.0))
        return self.values[min(place, len(self.values) - 1)]

    def grid(self) -> Sequence[Any]:
        """Returns the values."""
        return self.values


@dataclass(frozen=True)
class Number:
    """A number: a function of one that optuna draws.

    Attributes:
        low: Least number drawn.
        high: Largest number drawn.
        log: Whether it is uniform in its logarithm.
        whole: Whether whole numbers are drawn.
        of: The function; none if the number itself is meant.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    of: Callable[[float], Any] | None = None

    def suggest(self, trial: "Trial", name: str) -> Any:
        """Draws a value."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high))
        drawn = trial.suggest_float(name, self.low, self.high, log=self.log)
        return drawn if self.of is None else self.of(drawn)

    def grid(self) -> Sequence[Any] | None:
        """Returns all values, none if they cannot be counted."""
        return range(int(self.low), int(self.high) + 1) if self.whole else None


Distribution = Constant | Choice | Number


def read_distribution(where: str, spec: Mapping[str, Any]) -> Distribution:
    """Reads one parameter of a sweep file.

    Args:
        where: Words that name the parameter in messages.
        spec: What the file says of it.

    Raises:
        UsageError: The distribution is unknown, or its numbers are missing or make no sense.
    """
    kind = spec.get("distribution") or _implied(where, spec)
    if kind not in _KEYS:
        raise UsageError(f"{where}: the distribution '{kind}' is not known; there are {', '.join(_KEYS)}")
    for key in spec:
        if key not in ("distribution", *_KEYS[kind]):
            raise UsageError(f"{where}: {kind} has no key '{key}'; it takes {', '.join(_KEYS[kind])}")
    if kind == "constant":
        return Constant(_given(where, spec, "value"))
    if kind.startswith("categorical"):
        return _choice(where, spec, kind)
    if kind == "int_uniform":
        low, high = _ends(where, spec)
        if not all(isinstance(end, int) for end in (low, high)):
            raise UsageError(f"{where}: int_uniform from {low} to {high}; give whole numbers, or distribution uniform")
        return Number(low, high, whole=True)
    return _number(where, spec, kind)


_INTERVAL = ("min", "max")
_BELL = ("mu", "sigma")
_KEYS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values", "probabilities"),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": _INTERVAL,
    "uniform": _INTERVAL,
    "q_uniform": (*_INTERVAL, "q"),
    "log_uniform": _INTERVAL,
    "log_uniform_values": _INTERVAL,
    "q_log_uniform": (*_INTERVAL, "q"),
    "q_log_uniform_values": (*_INTERVAL, "q"),
    "inv_log_uniform": _INTERVAL,
    "inv_log_uniform_values": _INTERVAL,
    "normal": _BELL,
    "q_normal": (*_BELL, "q"),
    "log_normal": _BELL,
    "q_log_normal": (*_BELL, "q"),
    "beta": ("a", "b"),
    "q_beta": ("a", "b", "q"),
}


def _implied(where: str, spec: Mapping[str, Any]) -> str:
    """The distribution of a parameter that names none, by W&B's rules."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical"
    if "min" in spec and "max" in spec:
        return "int_uniform" if all(isinstance(spec[key], int) for key in _INTERVAL) else "uniform"
    raise UsageError(f"{where} has no value; give `value`, `values`, `min` and `max`, or a `distribution`")


def _number(where: str, spec: Mapping[str, Any], kind: str) -> Number:
    base = kind.removeprefix("q_")
    if base in ("normal", "log_normal"):
        bell = NormalDist(_float(where, spec, "mu", 0.0), _float(where, spec, "sigma", 1.0, above=0.0))
        quantile: Callable[[float], float] = bell.inv_cdf
        if base == "log_normal":
            quantile = lambda drawn: math.exp(bell.inv_cdf(drawn))  # noqa: E731
        return Number(_TAIL, 1 - _TAIL, of=_rounded(where, spec, kind, quantile))
    if base == "beta":
        a, b = (_float(where, spec, key, 1.0, above=0.0) for key in ("a", "b"))

        def beta(drawn: float) -> float:
            from scipy.special import betaincinv

            return float(betaincinv(a, b, drawn))

        return Number(0.0, 1.0, of=_rounded(where, spec, kind, beta))
    low, high = _ends(where, spec)
    if base == "log_uniform":  # the ends are exponents, to base e
        low, high = math.exp(low), math.exp(high)
    elif base == "inv_log_uniform":  # those of 1 / x
        low, high = math.exp(-high), math.exp(-low)
    elif base != "uniform" and low <= 0:
        raise UsageError(f"{where}: {kind} from {low}; a logarithm needs `min` above 0")
    return Number(float(low), float(high), log=base != "uniform", of=_rounded(where, spec, kind, None))


def _rounded(
    where: str, spec: Mapping[str, Any], kind: str, of: Callable[[float], float] | None
) -> Callable[[float], Any] | None:
    """The function, with its values rounded to multiples of q where the distribution says so."""
    if not kind.startswith("q_"):
        return of
    q = spec.get("q", 1)
    _float(where, spec, "q", 1.0, above=0.0)

    def rounded(drawn: float) -> Any:
        multiple = round((drawn if of is None else of(drawn)) / q) * q
        return multiple if isinstance(q, int) else float(f"{multiple:.12g}")  # 0.3, not 0.30000000000000004

    return rounded


def _choice(where: str, spec: Mapping[str, Any], kind: str) -> Choice:
    values = _given(where, spec, "values")
    if not isinstance(values, list) or not values:
        raise UsageError(f"{where}: values is {values!r}; give a list with at least one")
    texts = [json.dumps(value, default=str) for value in values]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UsageError(f"{where}: {twice} stands twice in values; say how likely each is with `probabilities`")
    if "probabilities" not in spec and kind == "categorical":
        return Choice(tuple(values))
    odds = _given(where, spec, "probabilities")
    right = isinstance(odds, list) and len(odds) == len(values) and all(_is_number(p) and p >= 0 for p in odds)
    if not right or abs(sum(odds) - 1) > 1e-6:
        raise UsageError(f"{where}: probabilities is {odds!r}; give one for each of the {len(values)} values, 1 in all")
    likely = [(value, float(p)) for value, p in zip(values, odds, strict=True) if p > 0]
    return Choice(tuple(value for value, _ in likely), tuple(p for _, p in likely))


def _ends(where: str, spec: Mapping[str, Any]) -> tuple[float, float]:
    low, high = (_given(where, spec, key) for key in _INTERVAL)
    if not (_is_number(low) and _is_number(high)) or not low < high:
        hint = "; YAML reads 1e-4 as a text, write 1.0e-4" if isinstance(low, str) or isinstance(high, str) else ""
        raise UsageError(f"{where}: min is {low!r} and max {high!r}; give two numbers, the smaller as min{hint}")
    return low, high


def _float(where: str, spec: Mapping[str, Any], key: str, default: float, above: float = -math.inf) -> float:
    value = spec.get(key, default)
    if not _is_number(value) or not value > above:
        raise UsageError(f"{where}: {key} is {value!r}; give a number" + (" above 0" if above == 0 else ""))
    return float(value)


def _given(where: str, spec: Mapping[str, Any], key: str) -> Any:
    if key not in spec:
        raise UsageError(f"{where} has no `{key}`; its distribution needs it")
    return spec[key]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
