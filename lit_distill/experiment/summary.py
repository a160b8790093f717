"""`summary.json`: what a finished run says of itself."""

import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_distill import __version__
from lit_distill.core.files import write_json
from lit_distill.core.networks import count_parameters
from lit_distill.experiment.export import network_spec

SUMMARY_FILE = "summary.json"
SCHEMA = 1
_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "jsonargparse")


def write_summary(
    folder: Path,
    *,
    config: Mapping[str, Any],
    model: Any,
    datamodule: Any,
    metrics: Mapping[str, float],
    efficiency: Mapping[str, float],
    config_hash: str,
    started: float,
) -> None:
    """Writes the summary of a run, atomically and last: a run with a summary is finished.

    Args:
        folder: The run folder.
        config: Resolved configuration of the subcommand.
        model: The LightningModule.
        datamodule: The data module.
        metrics: Final `val/*` and `test/*`.
        efficiency: `efficiency/*` without the prefix.
        config_hash: See `confighash`.
        started: Time of start, seconds since the epoch.
    """
    method = config["model"]["class_path"]
    run = config["run"]
    write_json(
        folder / SUMMARY_FILE,
        {
            "schema": SCHEMA,
            "experiment": run["experiment"],
            "name": run["name"],
            "stage": run["stage"] or method.rpartition(".")[2].lower(),
            "key": run["key"],
            "method": method,
            "domain": method.split(".")[1] if method.startswith("lit_distill.") else "",
            "data": config["data"]["class_path"] if config.get("data") else "",
            "networks": {role: _network(config, model, role) for role in ("student", "teacher")},
            "sample_shape": list(getattr(datamodule, "sample_shape", ())) or None,
            "seed": config["seed_everything"],
            "metric": _telling_metric(config, model, metrics),
            "metrics": dict(metrics),
            "efficiency": dict(efficiency),
            "panels": {**getattr(datamodule, "panels", {}), **getattr(model, "panels", {})},
            "config_hash": config_hash,
            "versions": {"lit_distill": __version__, "python": platform.python_version(), **_versions()},
            "machine": _machine(),
            "started": _iso(started),
            "finished": _iso(time.time()),
            "seconds": round(time.time() - started, 3),
        },
    )


def _telling_metric(config: Mapping[str, Any], model: Any, metrics: Mapping[str, float]) -> str | None:
    """The figure that tells most about this run: what its checkpoints were chosen by, else what its method names."""
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    callbacks = [callbacks] if isinstance(callbacks, Mapping) else callbacks
    chosen = [(callback.get("init_args") or {}).get("monitor") or "" for callback in callbacks]
    tested = [f"test/{name.removeprefix('val/')}" for name in chosen if name.startswith("val/")]
    return next((name for name in (*tested, getattr(model, "headline", None)) if name in metrics), None)


def _network(config: Mapping[str, Any], model: Any, role: str) -> dict[str, Any] | None:
    network = getattr(model, role, None)
    spec = config["model"]["init_args"].get(role)
    if network is None or not spec:
        return None
    return {"class_path": network_spec(spec)["class_path"], "params": count_parameters(network)}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
