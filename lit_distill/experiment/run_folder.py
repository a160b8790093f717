"""The folder of a run: taken up again, cleared, or refused where something of another run would be lost."""

import shutil
from pathlib import Path

from lit_distill.core.errors import UsageError
from lit_distill.core.files import write_text
from lit_distill.experiment.confighash import config_hash, first_difference
from lit_distill.experiment.logger import METRICS_FILE
from lit_distill.experiment.summary import SUMMARY_FILE
from lit_distill.experiment.wandb_run import ID_FILE

CONFIG_FILE = "config.yaml"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"


class AlreadyFinishedError(Exception):
    """The run asked for is there, complete; not a mistake."""


def open_folder(folder: Path, text: str, sha: str, *, overwrite: bool) -> None:
    """Makes the folder that of a run: goes on with what is there of it, or begins with its configuration alone.

    Args:
        folder: The run's folder.
        text: Its configuration.
        sha: The hash of that.
        overwrite: Whether another run, or a finished one, may be replaced.

    Raises:
        UsageError: The folder holds another run, or something else.
        AlreadyFinishedError: It holds this run, finished.
    """
    if (folder / CONFIG_FILE).is_file():
        keep = _goes_on(folder, text, sha, overwrite=overwrite)
    elif folder.exists() and any(not _is_partial(path) for path in folder.iterdir()):
        raise UsageError(f"--run.name: {folder} holds files of something else; choose another --run.name")
    else:
        keep = False
    if not keep:
        clear(folder)
        write_text(folder / CONFIG_FILE, text)
    for path in filter(_is_partial, folder.rglob("*")):  # what a killed run was writing
        path.unlink(missing_ok=True)


def _goes_on(folder: Path, text: str, sha: str, *, overwrite: bool) -> bool:
    """Says whether to go on with the run in the folder; raises if it may be neither resumed nor replaced."""
    earlier = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    if config_hash(earlier) != sha:
        has_results = any((folder / name).exists() for name in (SUMMARY_FILE, METRICS_FILE, LAST_CHECKPOINT))
        if has_results and not overwrite:
            raise UsageError(
                f"--run.name: {folder} holds a run with another configuration ({first_difference(earlier, text)}); "
                "choose another --run.name, or --run.overwrite true"
            )
    elif (folder / SUMMARY_FILE).is_file():
        if not overwrite:
            raise AlreadyFinishedError(f"{folder} is finished; --run.overwrite true runs it again")
    else:
        return True
    return False


def clear(folder: Path) -> None:
    """Removes the results of an earlier run, caches of its student's outputs included.

    The summary goes first and config.yaml stays until a new one replaces it: at no moment are there checkpoints
    beside a configuration that they are not of.
    """
    for path in (folder / SUMMARY_FILE, folder / METRICS_FILE, folder / ID_FILE, *folder.glob("*.safetensors")):
        path.unlink(missing_ok=True)
    for name in ("student", LAST_CHECKPOINT.parent, "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".partial"
