"""Errors of the libraries underneath, as one line that names the key, the value and the remedy."""

import difflib
import errno
import inspect
import pkgutil
import pydoc
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lit_distill.core.errors import RunError, UsageError

_LONGEST_VALUE = 60
_MOST_NAMES = 12

# What Lightning and OmegaConf say of wrong values -> what we say. Their texts name no key as the user wrote it.
_TRANSLATIONS = (
    (
        r"invalid strategy name: `strategy='([^']*)'`",
        "trainer.strategy: '{0}' is not known; give auto, ddp, fsdp2 or another name of Lightning's strategies",
    ),
    (
        r"invalid accelerator name: `accelerator='([^']*)'`\. Available names are: ([^.]*)",
        "trainer.accelerator: '{0}' is not known; give one of {1}",
    ),
    (
        r"No supported (gpu) backend found|`(\w+)Accelerator` can not run on your system",
        "trainer.accelerator: this machine has no {0}; give cpu or auto (-c configs/trainer/cpu.yaml)",
    ),
    (
        r"`Trainer\(devices='?([^')]*)'?\)` value is not a valid input using (\w+)",
        "trainer.devices: {0} is no number of devices for accelerator {1}; give 1 or more, or auto",
    ),
    (
        r"`devices` selected with `(\w+)Accelerator` should be an int > 0",
        "trainer.devices: it is no number of devices for accelerator {0}; give 1 or more, or auto",
    ),
    (
        r"`num_nodes` must be a positive integer, but got (-?\d+)",
        "trainer.num_nodes: {0} is no number of machines; give 1 or more",
    ),
    (
        r"(-?\d+) is not in bounds, numpy accepts from 0 to (\d+)",
        "seed_everything: {0} is no seed; give a whole number from 0 to {1}",
    ),
    (
        r"^'pytorch-lightning_version'$",
        "--ckpt_path: the file is not a checkpoint of a run; name a .ckpt (lit_distill.core.pretrained reads weights)",
    ),
    (
        r"no viable alternative at input '(.*)'[\s\S]*full_key: (?:\w+\.)?(\S+)",
        "{1}: '{0}' is no interpolation; write it like ${{data.init_args.batch_size}}",
    ),
    (
        r"Interpolation key '\.*([^']*)' not found[\s\S]*full_key: (?:\w+\.)?(\S+)",
        "{1}: ${{{0}}} names no key of the configuration; write it in full, such as ${{data.init_args.batch_size}}",
    ),
)


def explain(error: BaseException) -> tuple[str, int]:
    """Turns an exception into a line for the user and an exit status (1: the run failed, 2: the request was wrong)."""
    cause = _ours(error)
    if isinstance(cause, UsageError):
        return _one_line(str(cause)), 2
    if isinstance(cause, RunError):
        return _one_line(str(cause)), 1
    name, text = type(error).__name__, str(error)
    for pattern, line in _TRANSLATIONS:
        if match := re.search(pattern, text):
            return line.format(*(group for group in match.groups() if group is not None)), 2
    if name in ("ArgumentError", "NSKeyError", "ParserError") or "against any of the Union subtypes" in text:
        return _one_line(_parsing(text)), 2
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return f"no space left on the disk ({error.filename or 'while writing'}); free some and run again", 1
        if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
            return f"{error.filename}: {error.strerror}; check the path and its permissions", 2
    if name == "OutOfMemoryError":
        return "the device is out of memory; lower data.batch_size, or shard with --trainer.strategy fsdp2", 1
    if type(error).__module__.startswith("wandb."):
        return f"W&B: {_one_line(text)}; WANDB_MODE=offline keeps the run on this machine, to be uploaded later", 1
    if name == "MisconfigurationException" or type(error).__module__.startswith("omegaconf"):
        return _one_line(text), 2
    return f"{name}: {_one_line(text)} (run again with --debug for the traceback)", 1


def _ours(error: BaseException) -> BaseException:
    """Finds our own error inside one that a library wrapped around it."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, UsageError | RunError):
            return current
        current = current.__cause__ or current.__context__
    return error


# ---- jsonargparse --------------------------------------------------------------------------------------------------


def _parsing(text: str) -> str:
    """Finds, in a text that lists every alternative of every union, the one fact that helps."""
    key = ".".join(_keys(text))
    if match := re.search(r"unrecognized arguments: (.*)", text):
        word = match[1].split()[0]
        if not word.startswith("-"):
            return f"'{word}' is not understood; options begin with two dashes, such as --trainer.max_epochs 3"
        return _unknown_option(word.lstrip("-").partition("=")[0].rstrip("+"))
    if match := re.search(r"does not accept option '([^']+)'", text):
        return _unknown_option(match[1])
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        return _unknown_key(key, match[1], _owner(text, match))
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'|No module named '([\w.]+)'", text):
        missing = match[3] or f"{match[1]}.{match[2]}"
        return _unknown_class(key, (re.search(rf"{re.escape(missing)}[\w.]*", text) or match)[0])
    if match := re.search(r"arguments are required: ([\w.]+(?:, [\w.]+)*)", text):
        return _missing(key, match[1].removesuffix("."), _owner(text, match))
    if match := re.search(r"(?:does not correspond to|Not a valid) (?:a )?subclass of (\w+)", text):
        return f"{key}: {_value(text)} is no {match[1]}; give `class_path:` with the dotted path of one"
    if match := re.search(r"(?:File does not exist|Path is not a file): '([^']+)'", text):
        return f"--{key}: {match[1]} is no file; paths start at the working directory"
    informative = [line.strip().removeprefix("- ") for line in text.splitlines() if _informs(line)]
    if key and "Expected " in text:
        return _wrong_type(key, text)
    return informative[0] if informative else text


def _keys(text: str) -> Iterator[str]:
    """The keys from the outermost to the innermost: each stands deeper in the text than the one before."""
    depth = -1
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if match := re.search(r'Parser key "([^"]+)"', line):
            if indent <= depth:
                return  # the next alternative of a union, which says the same again
            depth = indent
            yield match[1]


def _owner(text: str, fault: re.Match[str]) -> str:
    """The class in whose arguments the fault is: callable ones are named after it, others before."""
    line = text[: fault.start()].rpartition("\n")[2]
    if "expects a function" in line:
        after = re.search(r"(?:Got value|Given value): Namespace\(class_path='([^']+)'", text[fault.end() :])
        return after[1] if after else ""
    before = re.findall(r"given class_path '([^']+)'", text[: fault.start()])
    return before[-1] if before else ""


def _unknown_option(key: str) -> str:
    known = ["config", "seed_everything", "ckpt_path", "trainer", "model", "data", "run"]
    for section, path in (
        ("trainer", "lightning.pytorch.Trainer"),
        ("run", "lit_distill.experiment.launch.RunOptions"),
    ):
        known += [f"{section}.{name}" for name in _parameters(path)]
    near = difflib.get_close_matches(key, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "`lit-distill fit --help` lists the keys"
    return f"the key {key} is not known; {remedy}"


def _unknown_key(where: str, name: str, owner: str) -> str:
    known = _parameters(owner)
    near = difflib.get_close_matches(name.partition(".")[0], known, n=1)
    short = owner.rpartition(".")[2]
    remedy = f"did you mean {where}.{near[0]}?" if near else f"{short} takes {_listed(known) or 'none'}"
    return f"{where}.{name} is not a key of {short}; {remedy}"


def _unknown_class(key: str, path: str) -> str:
    """Goes along the dotted path as far as it exists, and proposes what is nearest to the first wrong part."""
    parts = path.split(".")
    good = max((n for n in range(len(parts)) if n and pydoc.locate(".".join(parts[:n])) is not None), default=0)
    module = ".".join(parts[:good])
    names = _public(pydoc.locate(module)) if good else []
    if near := difflib.get_close_matches(parts[good], names, n=1):
        remedy = f"did you mean {'.'.join([module, near[0], *parts[good + 1 :]])}?"
    elif good:
        remedy = f"{module} holds {_listed(names)}"
    else:
        remedy = f"there is no package '{parts[0]}'; install it or check the spelling"
    return f"{key}: {path} cannot be imported; {remedy}"


def _missing(key: str, names: str, owner: str) -> str:
    if not key:
        keys = [name.rpartition(".")[2] for name in names.split(", ")]
        return f"{' and '.join(keys)} missing; give a configuration with -c FILE (`lit-distill methods` lists some)"
    missing = ", ".join(f"{key}.init_args.{name}" for name in names.split(", "))
    return f"{missing} missing; {owner.rpartition('.')[2]} cannot be built without"


def _wrong_type(key: str, text: str) -> str:
    value = _value(text)
    # What the innermost key expects; the unions around it add their own alternatives after it.
    inner = re.split(r"Got value|Given value", text, maxsplit=1)[0]
    inner = inner[inner.rfind("Parser key") :]
    choices = re.findall(r"'([^']*)'", " ".join(re.findall(r"Expected (?:a )?typing\.Literal\[(.*)\]", inner)))
    if choices:
        near = difflib.get_close_matches(value.strip("'"), choices, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}? There are" if near else "give one of"
        return f"{key}: {value} is not accepted; {meant} {_listed(choices)}"
    kinds = [_kind(kind) for kind in re.findall(r"Expected (?:a )?(?:<class ')?([^<>'\n:]+)", inner)]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind]
    return f"{key}: {value} does not fit; give {' or '.join(kinds) or 'another value'}"


def _kind(name: str) -> str:
    known = {
        "int": "a whole number",
        "float": "a number (float)",
        "bool": "true or false",
        "str": "a text",
        "list": "a list",
        "dict": "a mapping",
        "NoneType": "null",
        "collections.abc.Sequence": "a list",
        "collections.abc.Iterable": "a list",
        "dot import path string": "a class path",
    }
    return "" if name.startswith("path but") else known.get(name.strip(), name.strip())


def _value(text: str) -> str:
    """The value that was refused: the innermost, which comes first; quoted, so that its end is seen."""
    match = re.search(r"(?:Got value|Given value): (.*?)(?:\. Got value|$)", text, re.M)
    value = match[1] if match else "the value"
    if nested := re.search(r"NestedArg\(key='[^']*', val='?(.*?)'?\)$|^Namespace\(class_path='([^']*)'", value):
        value = nested[1] or nested[2]
    return f"'{value}'" if len(value) <= _LONGEST_VALUE else f"'{value[:_LONGEST_VALUE]}...'"


def _informs(line: str) -> bool:
    empty = ("Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with", "Expected ")
    return bool(line.strip()) and not line.strip().removeprefix("- ").startswith(empty)


# ---- helpers -------------------------------------------------------------------------------------------------------


def _parameters(path: str) -> list[str]:
    """The names that a class or function takes, those it passes on to its bases included."""
    target: Any = pydoc.locate(path) if path else None
    makers = [vars(base).get("__init__") for base in target.__mro__] if isinstance(target, type) else [target]
    names: dict[str, None] = {}
    for maker in filter(None, makers):
        try:
            parameters = inspect.signature(maker).parameters.values()
        except (TypeError, ValueError):  # written in C
            continue
        names.update({p.name: None for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)})
    return [name for name in names if name != "self" and not name.startswith("_")]


def _public(module: Any) -> list[str]:
    own = list(getattr(module, "__all__", ()))
    found = [name for name in dir(module) if not name.startswith("_")]
    inside = [entry.name for entry in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return list(dict.fromkeys([*own, *found, *inside]))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
