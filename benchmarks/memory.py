"""The most that tensors take at once: in a call, or in one step of a training. Import it behind `timing`."""

from collections.abc import Callable

from timing import Pause
from torch.profiler import ProfilerActivity, profile


def peak_bytes(recorded: profile) -> int:
    """Returns the most that was allocated and not yet freed, beyond what was there at the start."""
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()  # type: ignore[union-attr]  # there, since recording has ended
        if event.name() == "[memory]"
    )
    alive = peak = 0
    for _, size in events:
        alive += size
        peak = max(peak, alive)
    return peak


def recorder() -> profile:
    """A profiler of allocations."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


class Recorded:
    """A pause that records the step after it, once it is told to."""

    def __init__(self) -> None:
        self.wanted = False
        self.peak = 0

    def around(self, run: Callable[[Pause], None]) -> Callable[[Pause], None]:
        """The same side with such pauses."""

        def side(pause: Pause) -> None:
            recording = None

            def recorded() -> None:
                nonlocal recording
                if recording is not None:
                    recording.__exit__(None, None, None)
                    self.peak, recording = peak_bytes(recording), None
                pause()
                if self.wanted:
                    self.wanted, recording = False, recorder()
                    recording.__enter__()

            run(recorded)

        return side
