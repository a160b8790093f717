"""Metrics and numbers in words: which are good when low, which read as percentages, how many digits they deserve."""

import difflib
import functools
import math
import re
from collections.abc import Sequence

from lit_distill.experiment.stats import Difference, Stat

MISSING = "\N{EN DASH}"

# Words in a metric's name. Domains add theirs here, so that tables and sentences read right.
_LOWER_IS_BETTER = frozenset({
    "loss", "nll", "ece", "mce", "brier", "error", "err", "mse", "mae", "rmse", "perplexity", "ppl", "fid", "kid", "kl",
    "fd", "mmd", "lpips", "distance", "latency", "seconds", "params", "flops", "bytes",
})  # fmt: skip
_PERCENT = frozenset({"acc", "acc1", "acc5", "top1", "top5", "accuracy", "ece", "agreement"})
_WORDS = {
    "acc": "accuracy", "ece": "ECE", "nll": "NLL", "fid": "FID", "fd": "Fréchet distance", "mmd": "MMD", "kl": "KL",
    "auroc": "AUROC", "nfe": "sampling steps",
}  # fmt: skip


@functools.cache
def lower_is_better(metric: str) -> bool:
    """Whether a small value of this metric is a good one, judged by the words of its name."""
    return bool(_LOWER_IS_BETTER & set(re.split(r"[^a-z0-9]+", metric.lower())))


@functools.cache
def is_percent(metric: str) -> bool:
    """Whether the metric is a fraction that reads better as a percentage."""
    return bool(_PERCENT & set(re.split(r"[^a-z0-9]+", metric.lower())))


def metric_name(metric: str) -> str:
    """The metric in words: `test/acc` -> `test accuracy`."""
    return " ".join(_WORDS.get(word, word.replace("_", " ")) for word in metric.split("/"))


def capital(text: str) -> str:
    """The text with a capital at its beginning, and no other letter changed."""
    return text[:1].upper() + text[1:]


def scaled(metric: str, value: float) -> float:
    """The value as it is shown: fractions in percent."""
    return 100 * value if is_percent(metric) else value


def decimals(metric: str, spread: float | None) -> int:
    """Decimals that the spread deserves: its first digit or two, 1 or 2 for percentages and at most 4 otherwise."""
    least, most = (1, 2) if is_percent(metric) else (2, 4)
    if not spread or not math.isfinite(spread):
        return least
    digits = -math.floor(math.log10(abs(scaled(metric, spread))))
    if digits <= 0 and not is_percent(metric):  # a spread of 13.6 is read to one decimal, one of 136 to none
        return 1 if digits > -2 else 0
    return max(least, min(most, digits))


def show(metric: str, value: Stat | None) -> str:
    """`95.1 ± 0.3` for several seeds, `98.5` for one."""
    if value is None:
        return MISSING
    places = decimals(metric, value.sd)
    size = abs(value.mean)
    if not value.sd and not is_percent(metric) and (0 < size < 0.1 or size >= 1e6):
        return f"{value.mean:.2g}" if value.sd is None else f"{value.mean:.2g} ± 0"
    mean = f"{scaled(metric, value.mean):.{places}f}"
    return mean if value.sd is None else f"{mean} ± {scaled(metric, value.sd):.{places}f}"


def show_difference(metric: str, difference: Difference | None) -> str:
    """`+1.9 ± 0.4 [0.8, 3.0]`: mean, standard error, 95 % interval."""
    if difference is None:
        return MISSING
    places = decimals(metric, difference.se)
    mean, se, low, high = (scaled(metric, x) for x in (difference.mean, difference.se, difference.low, difference.high))
    return minus(f"{mean:+.{places}f} ± {se:.{places}f} [{low:.{places}f}, {high:.{places}f}]")


def show_count(value: Stat | None) -> str:
    """A large number: `3,970`, `1.24 M`, `41.2 G`."""
    if value is None:
        return MISSING
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value.mean >= size:
            return f"{value.mean / size:.3g} {unit}"
    return f"{value.mean:,.0f}"


def show_plain(value: Stat | None) -> str:
    """A mean for reading at a glance: `0.0123`, `33.0`, `12,400`."""
    if value is None:
        return MISSING
    size = abs(value.mean)
    return f"{value.mean:,.0f}" if size >= 100 else f"{value.mean:.1f}" if size >= 1 else f"{value.mean:.3g}"


def minus(text: str) -> str:
    """The text with typographic minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def heading(metric: str) -> str:
    """Heading of a metric's column: name, unit, and an arrow where low is good."""
    unit = " %" if is_percent(metric) else ""
    return metric_name(metric) + unit + (" ↓" if lower_is_better(metric) else "")


def encodable(text: str) -> str:
    """The text without what UTF-8 cannot write: halves of pairs, as in the name of a folder in another encoding."""
    return text.encode("utf-8", "replace").decode()


def nearest(word: str, known: Sequence[str]) -> list[str]:
    """The known words that are most like a mistyped one; some known ones if none is."""
    return difflib.get_close_matches(word, known, n=5, cutoff=0.4) or list(known[:8])
