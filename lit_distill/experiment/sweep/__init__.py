"""Sweeps: one W&B sweep file, run by W&B's agents or on this machine alone. See docs/sweeps.md."""

from lit_distill.core.errors import UsageError
from lit_distill.experiment.sweep.file import read_sweep


def run_sweep(
    file: str,
    local: bool = False,
    count: int | None = None,
    agents: int | None = None,
    jobs: int | None = None,
    root: str | None = None,
) -> int:
    """Runs a sweep file. See `lit-distill sweep --help`."""
    for option, number in (("--count", count), ("--agents", agents), ("--jobs", jobs)):
        if number is not None and number < 1:
            raise UsageError(f"{option} is {number}; give at least 1")
    if local and agents is not None:
        raise UsageError("--agents are W&B's; with --local give --jobs")
    if not local and (jobs is not None or root is not None):
        raise UsageError(f"{'--jobs' if jobs is not None else '--root'} goes with --local; on W&B give --agents")
    sweep = read_sweep(file)
    if local:
        from lit_distill.experiment.sweep.local import run_locally

        return run_locally(sweep, count, jobs, root or "runs")
    from lit_distill.experiment.sweep.online import run_online

    return run_online(sweep, count, agents)
