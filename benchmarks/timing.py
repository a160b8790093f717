"""Timing of things against one another on a machine that has other work too.

Sides run in turns (A B, B A, A B ...), each in a thread of its own that rests while another works, so a training under
`Trainer.fit` can be halted after every step or epoch. What counts is the ratio within a round: a slow spell of the
machine hits all its sides alike. Import this module before torch: it holds torch to one thread.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping

Pause = Callable[[], None]
Side = Callable[[Pause], None]


class _Finished(BaseException):
    """Ends a side's thread at its next pause. Nothing that catches exceptions shall catch it."""


class Turns:
    """A function that runs from one of its pauses to the next, in a thread of its own."""

    def __init__(self, run: Side) -> None:
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    def take(self) -> None:
        """Runs to the next pause."""
        self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Ends the function where it rests."""
        self._finished = True
        self._go.release()
        self._thread.join()

    def _pause(self) -> None:
        self._halted.release()
        self._go.acquire()
        if self._finished:
            raise _Finished

    def _work(self, run: Side) -> None:
        try:
            self._go.acquire()
            if not self._finished:
                run(self._pause)
                self._error = RuntimeError("a side ended before the last round; let it run longer")
        except _Finished:
            pass
        except BaseException as error:
            self._error = error
        self._halted.release()


def in_turns(sides: Mapping[str, Side], baseline: str, rounds: int, warmup: int, unit: str, **targets: float) -> None:
    """Runs sides in turns and prints the table.

    Args:
        sides: Functions by name; each takes `pause`, and calls it after every unit of its work.
        baseline: The side that the others are divided by.
        rounds: Rounds that count.
        warmup: Rounds before, that do not.
        unit: What lies between two pauses, such as "step".
        targets: Largest ratio wanted of a side, by its name.
    """
    turns = {name: Turns(side) for name, side in sides.items()}
    runs = {name: side.take for name, side in turns.items()}
    compare(runs, baseline, rounds, warmup, unit, **targets)
    for side in turns.values():
        side.finish()


def compare(
    runs: Mapping[str, Callable[[], None]], baseline: str, rounds: int, warmup: int, unit: str, **targets: float
) -> None:
    """As `in_turns`, for functions that do one unit of work a call."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name in list(runs) if number % 2 else reversed(list(runs)):
            start, start_cpu = time.perf_counter(), _cpu_seconds()
            runs[name]()
            if number >= warmup:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(_cpu_seconds() - start_cpu)
    width = max(map(len, runs)) + 2
    print(f"{rounds} rounds; ratios to '{baseline}' within a round")
    print(
        f"{'':<{width}} {'ms / ' + unit:>12} {'ratio':>7} {'min':>7} {'max':>7} {'ratio of CPU time':>19} {'target':>8}"
    )
    for name in runs:
        ratios, cpu_ratios = _ratios(wall, name, baseline), _ratios(cpu, name, baseline)
        print(
            f"{name:<{width}} {1000 * statistics.median(wall[name]):>12.2f} {statistics.median(ratios):>7.3f} "
            f"{min(ratios):>7.3f} {max(ratios):>7.3f} {statistics.median(cpu_ratios):>19.3f} "
            f"{targets.get(name, ''):>8}",
            flush=True,
        )


def _ratios(seconds: Mapping[str, list[float]], name: str, baseline: str) -> list[float]:
    return [own / other for own, other in zip(seconds[name], seconds[baseline], strict=True)]


def _cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for: what the work costs, without waiting for a core."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
