"""The `lit-distill` command. Imports nothing heavy before it knows what is asked."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from lit_distill import __version__
from lit_distill.core.errors import RunError, UsageError

USAGE = """\
usage: lit-distill COMMAND ...

  fit       train a method           lit-distill fit -c configs/image/kd_small.yaml
  validate  evaluate on validation data
  test      evaluate on test data    lit-distill test -c runs/default/NAME/config.yaml
  predict   predict on test data
  methods   list the methods with their papers and configurations
  run       run a recipe: a chain of runs that ends in a comparison
  sweep     search hyperparameters, with W&B or on this machine alone
  compare   compare finished runs: table and HTML page
  export    write the student of a run into a folder of its own
  memory    what the networks of a configuration take of each device under FSDP2

`lit-distill COMMAND --help` explains each. `--debug` anywhere shows tracebacks. `--version` prints the version.
"""
LIGHTNING = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        args: Words after the program's name; from the command line if None.

    Returns:
        Exit status: 0, 1 (the run failed) or 2 (the request was wrong).
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        print(f"lit-distill {__version__}")
        return 0
    try:
        return _dispatch(words[0], words[1:])
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:  # argparse after --help (0) or a wrong word (2); Lightning after Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:  # the outermost frame: nothing may reach the user as a traceback unless asked for
        if debug:
            raise
        return _report(error)


def _dispatch(command: str, words: list[str]) -> int:
    if command in LIGHTNING:
        from lit_distill.experiment.launch import run_lightning

        return run_lightning([command, *words])
    parser = _Parser(prog=f"lit-distill {command}")
    if command == "methods":
        from lit_distill.experiment.methods import show_methods

        parser.description = "List the methods with their papers and configurations."
        parser.add_argument("--domain", help="one domain only, such as image")
        parser.add_argument("--json", action="store_true", help="as JSON, for programs")
        options = parser.parse_args(words)
        return show_methods(options.domain, as_json=options.json)
    if command == "compare":
        from lit_distill.experiment.compare import compare

        parser.description = "Compare finished runs: mean and spread over seeds, paired difference to a baseline."
        parser.add_argument("dirs", nargs="*", metavar="DIR", help="run folders, or folders that hold run folders")
        parser.add_argument("--metric", help="the metric compared (default: that of a sweep or recipe, or of the data)")
        parser.add_argument(
            "--baseline",
            action="append",
            metavar="STAGE",
            help="stage the others are compared with, or experiment/stage; once for each data set (default: the "
            "recipe's, or the stage 'baseline')",
        )
        parser.add_argument("--html", metavar="FILE", help="write the dashboard, one self-contained page")
        parser.add_argument("--json", metavar="FILE", help="write the comparison as JSON")
        parser.add_argument("--csv", metavar="FILE", help="write the numbers as CSV")
        parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
        parser.add_argument("--latex", metavar="FILE", help="write the table as LaTeX, for the package booktabs")
        parser.add_argument(
            "--wandb",
            metavar="ENTITY/PROJECT",
            help="compare the runs of this W&B project too, and write a report there",
        )
        return compare(**vars(parser.parse_args(words)))
    if command == "export":
        from lit_distill.experiment.export import export

        parser.description = "Write the student of a finished run into a folder of its own."
        parser.add_argument("run", metavar="RUN", help="run folder, such as runs/quickstart/kd-s0")
        parser.add_argument("--to", required=True, metavar="DIR", help="new folder to write")
        parser.add_argument("--format", choices=("safetensors", "onnx", "hf"), default="safetensors")
        return export(**vars(parser.parse_args(words)))
    if command == "memory":
        from lit_distill.experiment.memory import memory

        parser.description = "Say what the networks of a configuration take of each device under FSDP2."
        parser.epilog = "All else is read as by `fit`: files with -c, and settings."
        parser.add_argument(
            "--devices", type=int, nargs="+", metavar="N", default=[1, 2, 4, 8, 16, 64], help="(default: %(default)s)"
        )
        options, others = parser.parse_known_args(words)
        return memory(others, options.devices)
    if command == "run":
        from lit_distill.experiment.recipe import run_recipe

        parser.description = "Run a recipe: stages in order, finished ones skipped, interrupted ones resumed."
        parser.add_argument("recipe", metavar="RECIPE", help="recipe file, such as configs/recipes/quickstart.yaml")
        parser.add_argument("--only", metavar="STAGE", action="append", help="this stage and what it needs")
        parser.add_argument("--seeds", type=int, metavar="N", help="the first N seeds of each stage")
        parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: one per GPU or core)")
        parser.add_argument("--root", default="runs", metavar="DIR", help="folder of all runs (default: %(default)s)")
        parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
        return run_recipe(**vars(parser.parse_args(words)))
    if command == "sweep":
        from lit_distill.experiment.sweep import run_sweep

        parser.description = (
            "Run a W&B sweep file: on W&B, whose agents then work on this machine, or with --local without an account. "
            "A local sweep keeps its trials in ROOT/NAME, goes on there when started again, and ends in a dashboard."
        )
        parser.add_argument("file", metavar="FILE", help="sweep file, such as sweeps/image/kd.yaml")
        parser.add_argument("--local", action="store_true", help="without W&B; needs the extra 'sweep'")
        parser.add_argument(
            "--count", type=int, metavar="N", help="trials in all (default: the file's run_cap; locally, a whole grid)"
        )
        parser.add_argument("--agents", type=int, metavar="N", help="W&B's agents (default: one per GPU, or one)")
        parser.add_argument("--jobs", type=int, metavar="N", help="local trials at once (default: one per GPU or core)")
        parser.add_argument("--root", metavar="DIR", help="folder of all runs of local trials (default: runs)")
        return run_sweep(**vars(parser.parse_args(words)))
    near = _nearest(command)
    raise UsageError(f"command '{command}' is not known{near}; `lit-distill --help` lists the commands")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` explains")


def _interrupted() -> int:
    print("lit-distill: interrupted; the same command again goes on from the last checkpoint", file=sys.stderr)
    return 130


def _report(error: Exception) -> int:
    from lit_distill.experiment.messages import explain

    message, status = explain(error)
    print(f"lit-distill: error: {message}", file=sys.stderr)
    return status


def _nearest(command: str) -> str:
    import difflib

    known = (*LIGHTNING, "methods", "run", "sweep", "compare", "export", "memory")
    near = difflib.get_close_matches(command, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


__all__ = ["RunError", "UsageError", "main"]
