"""What makes two runs the same run: everything in the configuration but where and how comfortably it runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

# Keys that change where a run is kept or how it is watched, but not what it computes.
_IGNORED = frozenset(
    {
        "run",
        "config",
        "ckpt_path",
        "weights_only",
        "trainer.logger",
        "trainer.default_root_dir",
        "trainer.enable_progress_bar",
        "trainer.enable_model_summary",
        "trainer.log_every_n_steps",
    }
)
_SAMPLE_BYTES = 1 << 20


def config_hash(text: str) -> str:
    """Hashes a resolved configuration, to 16 hex digits.

    A value that names weights on disk (a run folder, a weights file) stands for their content: a retrained teacher
    under the same path makes another run.

    Args:
        text: YAML of the configuration.
    """
    flat = {key: _content(value) for key, value in flatten(yaml.safe_load(text)).items()}
    return hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:16]


def first_difference(earlier: str, later: str) -> str:
    """Names the first key that differs between two configurations, with both values."""
    old, new = flatten(yaml.safe_load(earlier)), flatten(yaml.safe_load(later))
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
    return "the weights it starts from have changed"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested keys to dotted ones, without those that do not change the result."""
    if prefix in _IGNORED:
        return {}
    if isinstance(value, dict) and value:
        parts = (flatten(entry, f"{prefix}.{key}" if prefix else str(key)) for key, entry in value.items())
    elif isinstance(value, list) and value:
        parts = (flatten(entry, f"{prefix}.{position}") for position, entry in enumerate(value))
    else:
        return {prefix: value}
    return {key: entry for part in parts for key, entry in part.items()}


def _content(value: Any) -> Any:
    if not isinstance(value, str) or len(value) > 1000 or "\n" in value:
        return value
    path = Path(value)
    for weights in (path / "student" / "model.safetensors", path / "model.safetensors", path):
        if weights.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin") and weights.is_file():
            return [value, _fingerprint(weights)]
    return value


def _fingerprint(path: Path) -> str:
    """Hashes size, beginning and end: enough to tell weights apart without reading gigabytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size}".encode() + file.read(_SAMPLE_BYTES))
        file.seek(max(size - _SAMPLE_BYTES, 0))
        digest.update(file.read())
    return digest.hexdigest()[:16]
