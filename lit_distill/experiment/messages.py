"""Errors of the libraries underneath, as one line."""

import errno
import re

from lit_distill.core.errors import RunError, UsageError


def explain(error: BaseException) -> tuple[str, int]:
    """Turns an exception into a line for the user and an exit status (1: the run failed, 2: the request was wrong)."""
    cause = _ours(error)
    if isinstance(cause, UsageError):
        return _one_line(str(cause)), 2
    if isinstance(cause, RunError):
        return _one_line(str(cause)), 1
    name = type(error).__name__
    if name in ("ArgumentError", "NSKeyError", "ParserError"):
        return _one_line(_parsing(str(error))), 2
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return f"no space left on the disk ({error.filename or 'while writing'}); free some and run again", 1
        if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
            return f"{error.filename}: {error.strerror}; check the path and its permissions", 2
    if name == "OutOfMemoryError":
        return "the device is out of memory; lower data.batch_size, or shard with --trainer.strategy fsdp2", 1
    if name == "MisconfigurationException":
        return _one_line(str(error)), 2
    return f"{name}: {_one_line(str(error))} (run again with --debug for the traceback)", 1


def _ours(error: BaseException) -> BaseException:
    """Finds our own error inside one that a library wrapped around it."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, UsageError | RunError):
            return current
        current = current.__cause__ or current.__context__
    return error


def _parsing(text: str) -> str:
    return text


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
