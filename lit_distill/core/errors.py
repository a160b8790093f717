"""The two errors that a user sees as one line.

Everything a user can get wrong ends in one of these, with a message that names the key, the value and the remedy.
The command turns them into one line and an exit status; `--debug` shows the traceback.
"""


class UsageError(ValueError):
    """The request cannot be carried out as written: unknown key, wrong value, parts that do not fit. Exit status 2."""


class RunError(RuntimeError):
    """The request was fine, the run failed: non-finite loss, corrupt file, full disk. Exit status 1."""


def check_least(part: str, least: int, **values: float | None) -> None:
    """Checks arguments against the smallest value that they can have; None is left out.

    Args:
        part: What has the arguments, "model" or "data".
        least: The smallest value.
        values: The arguments by name.

    Raises:
        UsageError: One is smaller.
    """
    for key, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{part}.{key} is {value}; give {least} or more")
