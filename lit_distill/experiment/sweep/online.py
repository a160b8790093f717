"""A sweep on W&B: created there, worked off by W&B's agents here."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_distill.core.errors import RunError, UsageError
from lit_distill.experiment.processes import device, find_gpus
from lit_distill.experiment.sweep.file import Sweep


def run_online(sweep: Sweep, count: int | None, agents: int | None) -> int:
    """Creates the sweep and starts agents, each on a device of its own where there are several.

    Args:
        sweep: The file.
        count: Trials of all agents together; until the sweep ends if None.
        agents: Number of agents; one for each GPU, or one, if None.

    Raises:
        UsageError: There is no account.
        RunError: W&B refuses the sweep, or an agent failed.
    """
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or not wandb.login(prompt=False):
        raise UsageError(
            f"sweep {sweep.name}: no W&B account is in use; run `wandb login`, or give --local to run it without one"
        )
    gpus = find_gpus()
    try:
        identifier = wandb.sweep(dict(sweep.content))
    except (wandb.Error, ValueError) as error:
        raise RunError(f"W&B did not take the sweep {sweep.name}: {error}") from error
    number = agents or len(gpus) or 1
    shares = [None] * number if count is None else [count // number + (i < count % number) for i in range(number)]
    environments = [device(gpus[i % len(gpus)] if gpus else None) for i in range(number)]
    pairs = [(share, environment) for share, environment in zip(shares, environments, strict=True) if share != 0]
    running = [
        subprocess.Popen(agent_command(sweep, identifier, share), env={**os.environ, **_path(), **environment})
        for share, environment in pairs
    ]
    codes = _wait(running)
    if any(codes):
        raise RunError(f"{sum(code != 0 for code in codes)} of {len(codes)} agents failed; what they said stands above")
    return 0


def agent_command(sweep: Sweep, identifier: str, count: int | None) -> list[str]:
    """Returns the command of one agent."""
    words = [sys.executable, "-m", "wandb", "agent", "--forward-signals"]
    for key in ("project", "entity"):
        if sweep.content.get(key):
            words.append(f"--{key}={sweep.content[key]}")
    return [*words, *([] if count is None else [f"--count={count}"]), identifier]


def _wait(agents: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Waits for all agents; with Ctrl-C, which they hear too, for as long as they need to end."""
    try:
        return [agent.wait() for agent in agents]
    except KeyboardInterrupt:
        for agent in agents:
            agent.wait()
        raise


def _path() -> dict[str, str]:
    """The search path with this environment's commands first, as agents call `lit-distill` and `python` by name."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
