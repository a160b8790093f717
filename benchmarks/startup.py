"""Start-up: `lit-distill fit -c FILE --print_config` against a bare LightningCLI program that prints the same.

    python benchmarks/startup.py

Each start is a process of its own. The bare program has the same two base classes, subclass mode and parser, and reads
the same file.
"""

import timing  # isort: skip

import subprocess
import sys
from pathlib import Path

ROUNDS = 7
CONFIG = Path(__file__).parents[1] / "configs" / "image" / "kd_small.yaml"
BARE = """
import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
mode = {"parser_mode": "omegaconf+"}
LightningCLI(
    LightningModule,
    LightningDataModule,
    subclass_mode_model=True,
    subclass_mode_data=True,
    auto_configure_optimizers=False,
    parser_kwargs={**mode, **{name: mode for name in ("fit", "validate", "test", "predict")}},
)
"""


def start(*program):
    """Returns a function that starts a program and reads what it prints."""

    def run():
        command = [sys.executable, *program, "fit", "-c", str(CONFIG), "--print_config"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "class_path: lit_distill.image.KD" in printed

    return run


if __name__ == "__main__":
    programs = {"bare LightningCLI": start("-c", BARE), "ours": start("-m", "lit_distill")}
    timing.compare(programs, "bare LightningCLI", ROUNDS, 1, "start", ours=1.2)
