"""A sweep file of W&B: read, checked, and its command filled in by the rules of W&B's agent."""

import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_distill.core.errors import UsageError
from lit_distill.experiment.sweep.space import Constant, Distribution, read_distribution

METHODS = ("grid", "random", "bayes")
_KEYS = (
    "program", "command", "method", "metric", "parameters", "early_terminate", "run_cap", "name", "description",
    "project", "entity",
)  # fmt: skip
_LAUNCH_KEYS = ("job", "image_uri", "scheduler", "controller", "apiVersion", "kind", "metrics")
_DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        path: Its name, or those of the parameters around it and its own.
        distribution: What is drawn.
    """

    path: tuple[str, ...]
    distribution: Distribution

    @property
    def name(self) -> str:
        """The whole name with dots, as on the command line."""
        return ".".join(self.path)

    @property
    def varies(self) -> bool:
        """Whether it is searched."""
        return not isinstance(self.distribution, Constant)


@dataclass(frozen=True)
class Halving:
    """When a bad trial is stopped: at `first`, `first * factor`, ... values of the metric; never from `last` on."""

    first: int
    factor: int
    last: int | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked.

    Attributes:
        name: Of the sweep, and of its folder.
        method: grid, random or bayes.
        metric: What is optimised.
        goal: minimize or maximize.
        parameters: In the order of the file.
        program: Goes into the command.
        command: Words with macros.
        halving: When bad trials are stopped, if they are.
        run_cap: The file's limit of trials, if it has one.
        content: The file as it is, for W&B.
    """

    name: str
    method: str
    metric: str
    goal: Literal["minimize", "maximize"]
    parameters: tuple[Parameter, ...]
    program: str
    command: tuple[str, ...]
    halving: Halving | None
    run_cap: int | None
    content: Mapping[str, Any]

    def grid(self) -> list[dict[str, Any]]:
        """Lists all points of a grid, the last parameter changing fastest."""
        axes = [parameter.distribution.grid() or () for parameter in self.parameters]
        names = [parameter.name for parameter in self.parameters]
        return [dict(zip(names, point, strict=True)) for point in itertools.product(*axes)]

    def words(self, values: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> list[str]:
        """Returns the command for one trial, as W&B's agent fills it in.

        Args:
            values: Value of each parameter, by its whole name.
            environ: Where `${envvar:NAME}` looks.
        """
        filled = expansions(self._nested(values), self.program)
        words: list[str] = []
        for word in self.command:
            word = _ENVIRONMENT.sub(lambda match: environ.get(match[1], match[1]), word)
            words += filled.get(word, [word])
        return words

    def identity(self) -> str:
        """Hashes what its trials depend on, the configuration files of the command included."""
        keys = ("method", "metric", "parameters", "early_terminate", "command", "program")
        parts = {key: self.content.get(key) for key in keys}
        files = [path.read_text(encoding="utf-8") for path in self.configs()]
        return hashlib.sha256(json.dumps([parts, files], sort_keys=True, default=str).encode()).hexdigest()[:16]

    def configs(self) -> Iterator[Path]:
        """Lists the configuration files of the command that are there."""
        names = [after for before, after in itertools.pairwise(self.command) if before in ("-c", "--config")]
        names += [word.partition("=")[2] for word in self.command if word.startswith("--config=")]
        return (path for path in map(Path, names) if path.is_file())

    def _nested(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values as the agent passes them: nested parameters make one mapping."""
        nested: dict[str, Any] = {}
        for parameter in self.parameters:
            inner = nested
            for key in parameter.path[:-1]:
                inner = inner.setdefault(key, {})
            inner[parameter.path[-1]] = values[parameter.name]
        return nested


def expansions(arguments: Mapping[str, Any], program: str) -> dict[str, list[str]]:
    """Returns what stands for each macro; the one for a mapping is Python's own text of it, as in W&B's agent."""
    bare: list[str] = []
    for name, value in arguments.items():
        if value is not False:
            bare.append(f"--{name}" if value is True else f"--{name}={value}")
    return {
        "${env}": [] if os.name == "nt" else ["/usr/bin/env"],
        "${interpreter}": ["python"],
        "${program}": [program],
        "${args}": [f"--{name}={value}" for name, value in arguments.items()],
        "${args_no_equals}": [word for name, value in arguments.items() for word in (f"--{name}", str(value))],
        "${args_no_boolean_flags}": bare,
    }


def read_sweep(file: str | Path) -> Sweep:
    """Reads and checks a sweep file.

    Raises:
        UsageError: The file is missing or no YAML, or something in it is missing, unknown or makes no sense.
    """
    path = Path(file)
    content = _load(path)
    where = f"sweep {path}"
    for key in content:
        if key in _LAUNCH_KEYS:
            raise UsageError(f"{where}: the key '{key}' belongs to W&B Launch, which is not supported; remove it")
        _known(where, key, _KEYS)
    for key in ("program", "parameters"):
        if not content.get(key):
            raise UsageError(f"{where} has no `{key}:`; {_HINTS[key]}")
    method = content.get("method")
    if method not in METHODS:
        raise UsageError(f"{where}: method is {method!r}; give grid, random or bayes")
    metric, goal = _metric(where, content.get("metric"))
    parameters = tuple(_parameters(where, content["parameters"]))
    command = _command(where, content.get("command"))
    if method == "grid":
        for parameter in parameters:
            if parameter.distribution.grid() is None:
                raise UsageError(
                    f"{where}: {parameter.name} is continuous, and a grid has no end of it; give `values`, "
                    "or method random or bayes"
                )
    run_cap = content.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or run_cap < 1):
        raise UsageError(f"{where}: run_cap is {run_cap!r}; give a whole number from 1")
    name = str(content.get("name") or path.stem)
    if Path(name).name != name:
        raise UsageError(f"{where}: name is '{name}'; it names a folder, so leave slashes out")
    halving = _halving(where, content.get("early_terminate"))
    program = str(content["program"])
    return Sweep(name, method, metric, goal, parameters, program, command, halving, run_cap, content)


_HINTS = {
    "program": "write `program: lit-distill`, which the command calls",
    "parameters": "name at least one, such as `model.init_args.temperature: {min: 1.0, max: 8.0}`",
}


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"sweep: the file {path} does not exist; sweeps/ has some") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"sweep {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"sweep {path} holds no mapping; write `program:`, `method:`, `metric:` and `parameters:`")
    return content


def _metric(where: str, metric: Any) -> tuple[str, Literal["minimize", "maximize"]]:
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise UsageError(f"{where} has no metric; write `metric: {{name: val/acc, goal: maximize}}`")
    for key in metric:
        _known(f"{where}: metric", key, ("name", "goal"))
    goal = metric.get("goal")
    if goal not in ("minimize", "maximize"):
        raise UsageError(f"{where}: metric.goal is {goal!r}; give minimize or maximize")
    if metric["name"].startswith("test/"):
        raise UsageError(
            f"{where}: metric.name is {metric['name']}; test data judge the result, choose by a val/ metric"
        )
    return metric["name"], goal


def _parameters(where: str, specs: Any, around: tuple[str, ...] = ()) -> Iterator[Parameter]:
    if not isinstance(specs, dict):
        raise UsageError(f"{where}: parameters is {specs!r}; give names with what each may be")
    for key, spec in specs.items():
        path = (*around, str(key))
        name = ".".join(path)
        if not _NAME.fullmatch(str(key)):
            raise UsageError(f"{where}: '{name}' is no name of a parameter; give letters, digits, dots, _ and -")
        if not isinstance(spec, dict):
            raise UsageError(f"{where}: {name} is {spec!r}; write {{value: {spec}}}, {{values: [...]}} or the like")
        if "parameters" in spec:
            yield from _parameters(where, spec["parameters"], path)
        else:
            yield Parameter(path, read_distribution(f"{where}: {name}", spec))


def _command(where: str, command: Any) -> tuple[str, ...]:
    if command is None:
        return _DEFAULT_COMMAND
    if not isinstance(command, list) or not command:
        raise UsageError(f"{where}: command is {command!r}; give a list of words")
    words = tuple(map(str, command))
    known = expansions({}, "")
    for word in words:
        if re.fullmatch(r"\$\{[a-z_]+\}", word) and word not in known:
            raise UsageError(f"{where}: the macro {word} is not for this command line; there are {', '.join(known)}")
    if not any(word.startswith("${args") for word in words):
        raise UsageError(f"{where}: the command has no ${{args}}, so no trial would differ; put it last")
    return words


def _halving(where: str, spec: Any) -> Halving | None:
    if spec is None:
        return None
    if not isinstance(spec, dict) or spec.get("type") != "hyperband":
        kind = spec.get("type") if isinstance(spec, dict) else spec
        raise UsageError(f"{where}: early_terminate.type is {kind!r}; W&B knows hyperband")
    for key in spec:
        _known(f"{where}: early_terminate", key, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    factor = _whole(where, spec, "eta", 2, default=3)
    if "max_iter" in spec:
        last, steps = _whole(where, spec, "max_iter", 1), _whole(where, spec, "s", 1)
        first = last // factor**steps
        if first < 1:
            raise UsageError(
                f"{where}: early_terminate: {last} / {factor}^{steps} is below 1; lower s or raise max_iter"
            )
        return Halving(first, factor, last)
    return Halving(_whole(where, spec, "min_iter", 1), factor)


def _whole(where: str, spec: Mapping[str, Any], key: str, least: int, default: int | None = None) -> int:
    value = spec.get(key, default)
    if not isinstance(value, int) or value < least:
        what = "min_iter, or max_iter and s" if value is None and key == "min_iter" else f"a whole number from {least}"
        raise UsageError(f"{where}: early_terminate.{key} is {value!r}; give {what}")
    return value


def _known(where: str, key: Any, known: Sequence[str]) -> None:
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        raise UsageError(
            f"{where}: the key '{key}' is not known; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
        )
