"""Recipes: chains of runs (teacher, baseline, methods, several seeds each) that end in a comparison.

A stage is a LightningCLI `fit`; the recipe only decides order, seeds and folders. See docs/recipes.md for the file.
"""

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from lit_distill.core.errors import RunError, UsageError
from lit_distill.experiment.methods import config_root
from lit_distill.experiment.processes import QUIET, Starter, device, find_gpus, last_error
from lit_distill.experiment.runs import write_plan

_REFERENCE = re.compile(r"\$\{stage:([^}]+)\}")
_RECIPE_KEYS = {"experiment", "configs", "seeds", "threads", "stages", "compare"}
_STAGE_KEYS = {"configs", "seeds", "set"}
_COMPARE_KEYS = {"metric", "baseline", "html"}


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe: the same run for several seeds.

    Attributes:
        name: Its name, by which others refer to it. `image/kd` is stage `kd` of an experiment of its own, `image`,
            inside the recipe's.
        configs: Configuration files, merged in order.
        seeds: One run for each.
        overrides: Dotted keys and values that go over the files.
        needs: Names of the stages whose results it uses.
    """

    name: str
    configs: tuple[Path, ...]
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]
    needs: frozenset[str]


@dataclass
class Job:
    """One run: a stage with a seed.

    Attributes:
        stage: The stage.
        seed: The seed.
        folder: Its run folder.
        words: The command after `lit-distill`.
        key: Hash of all that determines the run, the runs it needs included.
        needs: The jobs that must be finished before.
    """

    stage: Stage
    seed: int
    folder: Path
    words: list[str]
    key: str
    needs: list["Job"] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Stage and seed: the run's folder inside the recipe's."""
        return f"{self.stage.name}-s{self.seed}"

    @property
    def log(self) -> Path:
        """Where what the run prints is kept."""
        return self.folder.parent / "logs" / f"{self.folder.name}.txt"

    @property
    def finished(self) -> bool:
        """Whether the folder holds this very run, complete."""
        return _read(self.folder / "summary.json").get("key") == self.key

    def command(self) -> list[str]:
        """Returns the words, with leave to replace the folder if it holds a run of an older recipe."""
        earlier = _read(self.folder / "config.yaml").get("run") or {}
        stale = (self.folder / "config.yaml").is_file() and earlier.get("key") != self.key
        return [*self.words, "--run.overwrite=true"] if stale else self.words


@dataclass(frozen=True)
class Recipe:
    """A recipe file, checked.

    Attributes:
        experiment: Folder of its runs, inside the root.
        threads: CPU threads of each run.
        stages: In the order in which they can run.
        compare: `metric`, `baseline` (one or a list) and `html` of the comparison at the end.
    """

    experiment: str
    threads: int
    stages: tuple[Stage, ...]
    compare: Mapping[str, Any]

    @property
    def baselines(self) -> list[str]:
        """Stages that others are compared with."""
        return _list(self.compare.get("baseline"), "compare.baseline", f"recipe {self.experiment}")

    def jobs(self, root: Path, seeds: int | None = None, only: Sequence[str] | None = None) -> list[Job]:
        """Lists the runs in an order in which they can run.

        Args:
            root: Folder of all runs.
            seeds: The first so many seeds of each stage; all if None.
            only: Stages wanted; those they need come along. All if None.
        """
        wanted = _with_needs(self.stages, only)
        made: dict[str, dict[int, Job]] = {}
        for stage in self.stages:
            if stage.name in wanted:
                chosen = stage.seeds[:seeds] if seeds else stage.seeds
                made[stage.name] = {seed: self._job(stage, seed, root, made) for seed in chosen}
        return [job for jobs in made.values() for job in jobs.values()]

    def _job(self, stage: Stage, seed: int, root: Path, made: Mapping[str, Mapping[int, Job]]) -> Job:
        needs: dict[str, Job] = {}
        above, _, short = stage.name.rpartition("/")
        experiment = f"{self.experiment}/{above}" if above else self.experiment
        folder = root / experiment / f"{short}-s{seed}"

        def refer(match: re.Match[str]) -> str:
            name = match.group(1)
            if name == stage.name:  # what it leaves for others
                return str(folder)
            # The same seed where there is one; otherwise its first run (one teacher for all students).
            needs[name] = made[name].get(seed) or next(iter(made[name].values()))
            return str(needs[name].folder)

        overrides = {
            key: _REFERENCE.sub(refer, json.dumps(value) if not isinstance(value, str) else value)
            for key, value in stage.overrides.items()
        }
        contents = [path.read_text(encoding="utf-8") for path in stage.configs]
        upstream = {name: job.key for name, job in needs.items()}
        identity = json.dumps([contents, dict(stage.overrides), seed, upstream], sort_keys=True)
        # A letter first: a hash such as 7437084632550e54 would be read as a number.
        key = "r" + hashlib.sha256(identity.encode()).hexdigest()[:15]
        words = ["fit", *(f"--config={_relative(path)}" for path in stage.configs)]
        words += [f"--{name}={value}" for name, value in overrides.items()]
        words += [
            f"--seed_everything={seed}",
            f"--run.root={root}",
            f"--run.experiment={experiment}",
            f"--run.stage={short}",
            f"--run.name={folder.name}",
            f"--run.threads={self.threads}",
            f"--run.key={key}",
        ]
        return Job(stage, seed, folder, words, key, list(needs.values()))


def read_recipe(file: str) -> Recipe:
    """Reads and checks a recipe file.

    Raises:
        UsageError: The file is missing or no YAML, a key is unknown or missing, a reference leads nowhere or in a
            circle.
    """
    path = _find(file, Path.cwd(), "recipe")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {file} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict) or not content["stages"]:
        raise UsageError(f"recipe {file} has no stages; add `stages:` with at least one named stage")
    _known(content, _RECIPE_KEYS, f"recipe {file}")
    compare = content.get("compare") or {}
    _known(compare, _COMPARE_KEYS, f"recipe {file}: compare")
    threads = content.get("threads", 1)
    if not isinstance(threads, int) or threads < 1:
        raise UsageError(f"recipe {file}: threads is {threads!r}; give a whole number from 1")
    common = [_find(name, path.parent, "configs") for name in _list(content.get("configs"), "configs", file)]
    stages = {
        name: _stage(name, body, common, content.get("seeds", [0]), path) for name, body in content["stages"].items()
    }
    for stage in stages.values():
        for need in stage.needs - set(stages):
            known = ", ".join(stages)
            raise UsageError(
                f"recipe {file}: stage '{stage.name}' refers to '{need}', which is no stage; there are {known}"
            )
    for baseline in _list(compare.get("baseline"), "compare.baseline", f"recipe {file}"):
        if baseline not in stages:
            raise UsageError(
                f"recipe {file}: compare.baseline is '{baseline}', which is no stage; there are {', '.join(stages)}"
            )
    return Recipe(content.get("experiment", path.stem), threads, tuple(_in_order(stages, file)), compare)


def run_recipe(
    recipe: str,
    only: Sequence[str] | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    root: str = "runs",
    dry_run: bool = False,
) -> int:
    """Runs a recipe; finished runs are skipped, interrupted ones resumed. See `lit-distill run --help`."""
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds is {seeds}; give at least 1")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}; give at least 1")
    plan = read_recipe(recipe)
    todo = plan.jobs(Path(root), seeds, only)
    if dry_run:
        for job in todo:
            print(shlex.join(["lit-distill", *job.command()]) + ("  # finished" if job.finished else ""))
        return 0
    if plan.compare:
        write_plan(Path(root) / plan.experiment, plan.compare.get("metric"), plan.baselines)
    gpus = find_gpus()
    failed = _run_all(todo, jobs or len(gpus) or max(1, (os.cpu_count() or 1) // plan.threads), gpus)
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""  # each was told when it happened
        raise RunError(f"{len(failed)} of {len(todo)} runs failed: {failed[0]}{more}; the same command goes on")
    if only is None:
        from lit_distill.experiment.compare import compare

        folder = Path(root) / plan.experiment
        html = plan.compare.get("html")
        compare([str(folder)], html=str(folder / html) if html else None)
    return 0


# ---- running -------------------------------------------------------------------------------------------------------


def _run_all(jobs: Sequence[Job], at_once: int, gpus: Sequence[str]) -> list[str]:
    """Runs all jobs, `at_once` side by side; returns what failed, in words."""
    finished = {job.name for job in jobs if job.finished}
    waiting = [job for job in jobs if job.name not in finished]
    if finished:
        print(f"{len(finished)} of {len(jobs)} runs are finished already", flush=True)
    starter = Starter()
    running: dict[ForkServerProcess, tuple[Job, str | None, float]] = {}
    free = list(gpus)
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            for job in [job for job in waiting if any(need.name in failed for need in job.needs)]:
                waiting.remove(job)
                failed[job.name] = f"{job.name} (what it needs failed)"
            for job in [job for job in waiting if all(need.name in finished for need in job.needs)]:
                if len(running) >= at_once:
                    break
                waiting.remove(job)
                gpu = free.pop(0) if free else None
                process = starter.start([*job.command(), *QUIET], job.log, device(gpu))
                running[process] = (job, gpu, time.monotonic())
            if not running:
                continue  # what was left waiting needs what has just failed
            for sentinel in wait([process.sentinel for process in running]):
                process = next(process for process in running if process.sentinel == sentinel)
                job, gpu, start = running.pop(process)
                process.join()
                if gpu is not None:
                    free.append(gpu)
                if process.exitcode == 0:
                    finished.add(job.name)
                    seconds = time.monotonic() - start
                    print(f"[{len(finished)}/{len(jobs)}] {job.name}: {_result(job)} ({seconds:.0f} s)", flush=True)
                else:
                    failed[job.name] = f"{job.name} ({last_error(job.log)}; log in {job.log})"
                    print(f"{job.name} failed: {last_error(job.log)}", file=sys.stderr, flush=True)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
    return list(failed.values())


def _result(job: Job) -> str:
    metrics = _read(job.folder / "summary.json").get("metrics") or {}
    shown = {name: value for name, value in metrics.items() if name in ("test/acc", "val/acc", "test/ece")}
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(shown.items())) or "done"


# ---- reading -------------------------------------------------------------------------------------------------------


def _stage(name: str, body: Any, common: Sequence[Path], seeds: Any, recipe: Path) -> Stage:
    where = f"recipe {recipe.name}: stage '{name}'"
    if any(part in ("", ".", "..") for part in str(name).split("/")):
        raise UsageError(f"{where}: its name is no name of a folder; give one such as kd, or image/kd")
    if not isinstance(body, dict):
        raise UsageError(f"{where} is {body!r}; give it `configs:`, and `seeds:` and `set:` where needed")
    _known(body, _STAGE_KEYS, where)
    seeds = body.get("seeds", seeds)
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UsageError(f"{where}: seeds is {seeds!r}; give a list of whole numbers such as [0, 1, 2]")
    overrides = body.get("set") or {}
    if not isinstance(overrides, dict):
        raise UsageError(f"{where}: set is {overrides!r}; give dotted keys with values")
    configs = [*common, *(_find(file, recipe.parent, where) for file in _list(body.get("configs"), "configs", where))]
    if not configs:
        raise UsageError(f"{where} has no configs; name at least one file")
    # What lies in its own folder it makes itself.
    needs = frozenset(_REFERENCE.findall(json.dumps(overrides).replace(f"${{stage:{name}}}/", "")))
    return Stage(str(name), tuple(configs), tuple(seeds), overrides, needs)


def _in_order(stages: Mapping[str, Stage], file: str) -> Iterator[Stage]:
    done: set[str] = set()
    while len(done) < len(stages):
        ready = [stage for name, stage in stages.items() if name not in done and stage.needs <= done]
        if not ready:
            circle = ", ".join(name for name in stages if name not in done)
            raise UsageError(f"recipe {file}: the stages {circle} need each other in a circle; remove one reference")
        yield ready[0]
        done.add(ready[0].name)


def _with_needs(stages: Sequence[Stage], only: Sequence[str] | None) -> set[str]:
    by_name = {stage.name: stage for stage in stages}
    if only is None:
        return set(by_name)
    wanted: set[str] = set()
    queue = list(only)
    while queue:
        name = queue.pop()
        if name not in by_name:
            raise UsageError(f"--only: '{name}' is no stage of the recipe; there are {', '.join(by_name)}")
        wanted.add(name)
        queue += by_name[name].needs - wanted
    return wanted


def _find(name: str, beside: Path, what: str) -> Path:
    tried = (Path(name), beside / name, config_root().parent / name, config_root() / name)
    for path in tried:
        if path.is_file():
            return path
    raise UsageError(f"{what}: the file {name} does not exist; paths start at the working directory or at `configs/`")


def _relative(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _list(value: Any, key: str, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return value
    raise UsageError(f"{where}: {key} is {value!r}; give a list of names")


def _known(content: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise UsageError(f"{where}: the key '{key}' is not known; there are {', '.join(sorted(known))}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = (
            yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else json.loads(path.read_text())
        )
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
