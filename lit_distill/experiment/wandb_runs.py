"""Runs from Weights & Biases: the copies that `WandbRun` left there, as run folders on this machine.

From there on they are runs like all others. The folders lie in W&B's cache and are fetched again only when the run has
changed.
"""

import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import atomic_folder, write_json
from lit_distill.experiment.wandb_run import COPIES, has_key

LARGEST_COPY = 50_000_000  # bytes; what is larger was put there by something else
NO_LIBRARY = "--wandb: the report needs one more package; pip install 'lit-distill[wandb]'"
_STATE_FILE = ".wandb.json"  # which run the folder is, as of when


def split_project(project: str) -> tuple[str, str]:
    """Splits ENTITY/PROJECT.

    Raises:
        UsageError: It is not of this form.
    """
    match = re.fullmatch(r"([\w.-]+)/([\w.-]+)", project)
    if match is None:
        raise UsageError(f"--wandb is '{project}'; give ENTITY/PROJECT, as in the address of the project's page")
    return match[1], match[2]


def mirror_folder(project: str) -> Path:
    """Where the runs of a project are kept on this machine."""
    from wandb.env import get_cache_dir

    return Path(get_cache_dir()).joinpath("lit_distill", *split_project(project))


def mirror(project: str) -> tuple[Path, list[str]]:
    """Fetches the runs of a project.

    Args:
        project: ENTITY/PROJECT.

    Returns:
        The folder that holds their run folders, as `group/name`, and notes on what is not there.

    Raises:
        UsageError: The name is no project's, or no account is set on this machine.
        RunError: W&B cannot be reached, or refuses.
    """
    split_project(project)
    need_account(project)
    if importlib.util.find_spec("wandb_workspaces") is None:  # told before minutes of fetching
        raise UsageError(NO_LIBRARY)
    import wandb
    from tqdm import tqdm

    folder = mirror_folder(project)
    with reaching(project):
        notes = fetch(tqdm(wandb.Api(timeout=60).runs(project), desc=f"runs of {project}"), folder)
    if not any(folder.glob(f"*/*/{_STATE_FILE}")):
        raise UsageError(f"--wandb: {project} has no runs of lit-distill; log some with -c configs/logger/wandb.yaml")
    return folder, notes


def need_account(project: str) -> None:
    """Refuses to ask W&B without an account, before W&B's own library asks for one at the terminal."""
    if not has_key():
        raise UsageError(
            f"--wandb {project} needs an account at W&B, and no API key is set here; run `wandb login` or set "
            "WANDB_API_KEY (without an account, `lit-distill compare DIR --html FILE` makes a page of run folders)"
        )


@contextmanager
def reaching(project: str) -> Iterator[None]:
    """Turns what W&B's library raises into one line."""
    try:
        yield
    except Exception as error:  # its classes have no base in common, and lie in places of its own
        own = type(error).__module__.startswith("wandb") or type(error) in (Exception, ValueError, TimeoutError)
        if not own:
            raise
        raise RunError(
            f"W&B and {project}: {type(error).__name__}: {error}; check the name, the network and that your account "
            "may use the project (`wandb login`)"
        ) from error


def fetch(runs: Iterable[Any], folder: Path) -> list[str]:
    """Brings the run folders in `folder` to what W&B has.

    Args:
        runs: Runs of `wandb.Api`, the oldest first.
        folder: Where they are kept; what is there and not among the runs is removed.

    Returns:
        Notes on the runs that are left out.
    """
    kept: dict[Path, Any] = {}
    foreign = []
    for run in runs:
        place = folder / _component(run.group or "no group") / _component(run.name or run.id)
        if place in kept:  # the first keeps its name
            place = place.with_name(f"{place.name}~{_component(run.id)}")
        state = {"id": run.id, "state": run.state, "heartbeat": str(getattr(run, "heartbeatAt", None))}
        if _read_state(place) != state or run.state == "running":
            shutil.rmtree(place, ignore_errors=True)
            if not _download(run, place, state):
                foreign.append(run.name or run.id)
                continue
        kept[place] = run
    for path in folder.glob(f"*/*/{_STATE_FILE}"):
        if path.parent not in kept:
            shutil.rmtree(path.parent, ignore_errors=True)
    if not foreign:
        return []
    names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
    return [f"{len(foreign)} runs at W&B were not logged by lit-distill and are left out ({names})"]


def _download(run: Any, place: Path, state: dict[str, str]) -> bool:
    """Fetches the copies of a run into a folder that is whole or absent; False if there are none."""
    with tempfile.TemporaryDirectory() as temporary:
        for file in run.files(pattern=f"{COPIES}/%"):
            if Path(file.name).parts[0] == COPIES and file.size <= LARGEST_COPY:
                file.download(root=temporary, replace=True).close()
        source = Path(temporary) / COPIES
        if not source.is_dir():
            return False
        write_json(source / _STATE_FILE, state)
        with atomic_folder(place) as part:
            shutil.copytree(source, part)
    return True


def _read_state(place: Path) -> Any:
    try:
        return json.loads((place / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _component(name: str) -> str:
    """A name from W&B as the name of one folder."""
    return re.sub(r"[^\w.+=~ -]+", "_", name).lstrip(".")[:100] or "_"
