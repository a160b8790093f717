"""Runs of the command side by side, each in a process of its own that starts in no time."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from lit_distill.experiment.methods import PACKAGE

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


class Starter:
    """Starts commands in forks of one process that has imported torch and the like once.

    Args:
        preload: Further modules that this process imports.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._context = multiprocessing.get_context("forkserver")
        own = ["lit_distill.experiment.launch", "lit_distill.image.distillation"]
        self._context.set_forkserver_preload([*own, *preload])

    def start(
        self, words: Sequence[str], log: Path, environ: Mapping[str, str] | None = None, call: str = "run_lightning"
    ) -> ForkServerProcess:
        """Starts one command.

        Args:
            words: The command after `lit-distill`.
            log: Where its output goes.
            environ: Environment variables that it has beside those of this process.
            call: The function of `launch` that carries it out.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = (list(words), str(log), dict(environ or {}), call)
        process = self._context.Process(target=_child, args=arguments, name=log.stem)
        process.start()
        return process


def device(gpu: str | None) -> dict[str, str]:
    """Returns the environment of a command that sees one device alone, if it has one."""
    return {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}


def _child(words: list[str], log: str, environ: dict[str, str], call: str) -> None:
    """Runs one command in this process, as if typed, with its output in a file."""
    with Path(log).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environ)
    # Lightning starts the other processes of a run (DDP, FSDP2) by the command line it finds here.
    sys.argv = [str(PACKAGE / "__main__.py"), *words]
    sys.modules["__main__"].__spec__ = None

    from lit_distill.experiment import launch
    from lit_distill.experiment.messages import explain

    try:
        sys.exit(getattr(launch, call)(words))
    except Exception as error:  # the outermost frame of this process: the log keeps the traceback
        traceback.print_exc()  # into the log; the last line is what the caller shows
        message, status = explain(error)
        print(f"lit-distill: error: {message}", file=sys.stderr, flush=True)
        sys.exit(status)


def _end_with_parent() -> None:
    """Ends this run when its starter is killed, so that starting that again never meets a run still at work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def find_gpus() -> list[str]:
    """Lists the devices that may be used, by the names that CUDA_VISIBLE_DEVICES takes."""
    if not Path("/dev/nvidiactl").exists():
        return []  # no driver, no need to import torch to know
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return [name for name in names if name.strip()]


def last_error(log: Path) -> str:
    """Reads from its log what a command failed of."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line for line in lines if line.startswith("lit-distill: error: ")]
    return errors[-1].removeprefix("lit-distill: error: ") if errors else (lines[-1] if lines else "no output")
