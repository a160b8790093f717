"""Files and folders that are whole or absent: everything is written beside its target and moved into place."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_distill.core.errors import RunError


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `target`; moves it onto `target` when the block ends without error.

    The data is flushed to the disk before the move, so that after a power cut the target is the old file or the
    new one, never half of one.

    Args:
        target: Where the finished file shall lie. Missing folders are made.

    Raises:
        RunError: The folder cannot be written or the disk is full. The old target stays as it was.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # only now: safetensors puts a file of its own, for the owner alone, there
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        raise RunError(
            f"cannot write {target}: {error.strerror or error}; "
            "free space, or choose another folder (of runs: --run.root)"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yields a path at which the block makes a folder; moves it to `target` when the block ends without error.

    Args:
        target: Where the finished folder shall lie: nothing is there yet, or an empty folder.

    Raises:
        RunError: It cannot be written or the disk is full.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as partial:
            part = Path(partial) / "folder"
            yield part
            for path in part.rglob("*"):
                if path.is_file():
                    path.chmod(0o666 & ~_umask())
            part.replace(target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}; free space, or choose another") from error


@contextmanager
def alone(target: str | Path, waiting: str) -> Iterator[None]:
    """Holds other processes of this machine off until the block ends, so that what two runs want is made once.

    The lock is that of the operating system on a file beside `target`: a process that is killed lets go of it.

    Args:
        target: What is being made; both runs name it the same way.
        waiting: What is printed if another process holds the lock.

    Raises:
        RunError: The folder cannot be written.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(waiting, flush=True)
            lock.acquire()
    except OSError as error:
        raise RunError(f"cannot write {target.parent}: {error.strerror or error}; choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def write_json(target: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_path(target) as path:
        path.write_text(json.dumps(value, indent=2, sort_keys=False, allow_nan=True) + "\n", encoding="utf-8")


def write_text(target: str | Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
