"""Configurations of all runs for the page, which lays them side by side: every different line is kept once."""

from collections.abc import Sequence
from typing import Any

from lit_distill.experiment.runs import Run

LARGEST_CONFIG = 200_000  # characters; more is no configuration that can be read


def packed_configs(runs: Sequence[Run]) -> dict[str, Any]:
    """The configurations, packed.

    Returns:
        `lines`, every different line; `blocks`, every different section (`model:` and what belongs to it) as indices of
        its lines; `runs`, the sections of each run as indices of blocks.
    """
    lines: dict[str, int] = {}
    blocks: dict[str, int] = {}
    packed: list[list[int]] = []
    of_runs = []
    for run in runs:
        text = run.config_text()[:LARGEST_CONFIG]
        of_run = []
        for block in _blocks(text):
            if block not in blocks:
                blocks[block] = len(blocks)
                packed.append([lines.setdefault(line, len(lines)) for line in block.splitlines() if line.strip()])
            of_run.append(blocks[block])
        of_runs.append(of_run)
    return {"lines": list(lines), "blocks": packed, "runs": of_runs}


def _blocks(text: str) -> list[str]:
    """The text cut before every line that begins a section."""
    blocks: list[str] = []
    for line in text.splitlines(keepends=True):
        if blocks and (line[:1] in (" ", "-", "#", "\n") or not line.strip()):
            blocks[-1] += line
        else:
            blocks.append(line)
    return blocks
