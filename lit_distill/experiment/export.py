"""The student alone, out of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lit_distill.core.errors import UsageError
from lit_distill.core.files import atomic_folder, atomic_path, write_json

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_student(
    state: Mapping[str, Any], spec: Mapping[str, Any], folder: Path, kept: Mapping[str, Any] | None = None
) -> None:
    """Writes a network as `model.safetensors` and `config.json`, so that it loads without this run and without pickles.

    Args:
        state: State dict of the trained network. Weights tied to each other are written once for each name.
        spec: Its `{class_path, init_args}`, from the run's configuration.
        folder: `student/` of the run.
        kept: What the method says of its use; written beside the specification.
    """
    from safetensors.torch import save_file

    with atomic_path(folder / WEIGHTS_FILE) as path:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, path)
    write_json(folder / CONFIG_FILE, {**network_spec(spec), **(kept or {})})


def network_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Strips `pretrained` around and inside a network's specification: exported weights replace the original ones."""
    while str(spec.get("class_path", "")).rpartition(".")[2] == "pretrained":
        spec = spec["init_args"].get("network") or json.loads(
            (_student_folder(Path(spec["init_args"]["weights"])) / CONFIG_FILE).read_text(encoding="utf-8")
        )
    inner = {key: network_spec(v) if "class_path" in v else v for key, v in _mappings(spec.get("init_args")).items()}
    return {**spec, "init_args": {**spec["init_args"], **inner}} if inner else dict(spec)


def _mappings(arguments: Any) -> dict[str, Mapping[str, Any]]:
    return {key: value for key, value in (arguments or {}).items() if isinstance(value, Mapping)}


def export(run: str, to: str, format: Literal["safetensors", "onnx", "hf"] = "safetensors") -> int:
    """Writes the student of a finished run into a folder of its own.

    Args:
        run: The run folder, such as runs/quickstart/kd-s0.
        to: Folder to write.
        format: "safetensors" (weights and config.json, loaded by lit_distill.core.pretrained), "onnx", or "hf" (a
            language model with its tokenizer, loaded by the transformers library; or a network of diffusers with the
            scheduler that it was trained for).
    """
    source = _student_folder(Path(run))
    target = Path(to)
    if not (source / WEIGHTS_FILE).is_file():
        raise UsageError(f"export: {run} holds no student; finish the run first (the same command again resumes it)")
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise UsageError(f"--to: {target} is not empty; name a new folder")
    if format == "onnx":
        _export_onnx(source, Path(run), target)
    elif format == "hf":
        _export_hf(source, Path(run), target)
    else:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            with atomic_path(target / name) as path:
                path.write_bytes((source / name).read_bytes())
    print(f"student of {run} written to {target}")
    return 0


def _student_folder(run: Path) -> Path:
    return run / "student" if (run / "student").is_dir() else run


def _export_onnx(source: Path, run: Path, target: Path) -> None:
    summary_path = run / "summary.json"
    if not summary_path.is_file():
        raise UsageError(f"export: {run} holds no {summary_path.name}; finish the run first")
    shape = json.loads(summary_path.read_text(encoding="utf-8")).get("sample_shape")
    if shape is None:
        raise UsageError(
            f"--format onnx: the samples of {run} have no one shape, as those of graph data; export it as safetensors"
        )
    try:
        import onnx  # noqa: F401 (torch's exporter needs it)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("--format onnx needs two more packages; pip install 'lit-distill[onnx]'") from error
    import torch

    from lit_distill.core.networks import pretrained

    network = pretrained(str(source)).eval()
    batch = torch.export.Dim("batch")
    with atomic_path(target / "model.onnx") as path:
        program = torch.onnx.export(
            network, (torch.zeros(2, *shape),), dynamo=True, dynamic_shapes=[{0: batch}], verbose=False
        )
        assert program is not None
        program.save(str(path), external_data=False)


def _export_hf(source: Path, run: Path, target: Path) -> None:
    from lit_distill.core.networks import pretrained

    network: Any = pretrained(str(source))
    if hasattr(network, "save_for_pipelines"):
        with atomic_folder(target) as part:
            said = network.save_for_pipelines(part, json.loads((source / CONFIG_FILE).read_text(encoding="utf-8")))
        print(said)
        return
    if not hasattr(network, "save_pretrained"):
        raise UsageError(
            f"--format hf: the student of {run} is a {type(network).__name__}, which the transformers library does not "
            "know; export it as safetensors"
        )
    with atomic_folder(target) as part:
        network.save_pretrained(part)
        if getattr(network, "vocabulary", None) is not None:
            print(f"the student knows {network.vocab_size} tokens; others are never written, and read as nothing")
        if (name := _tokenizer_name(source, run)) is None:
            print(f"{run} names no tokenizer; copy the one that the student was trained with")
        else:
            _tokenizer(name).save_pretrained(part)


def _tokenizer_name(source: Path, run: Path) -> str | None:
    """Finds in the configuration of a run the tokenizer: that of the data, else that of one of the networks."""
    import yaml

    spec = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    data, model = (_arguments(config.get(part)) for part in ("data", "model"))
    named = [data.get("tokenizer"), model.get("tokenizer"), _arguments(spec).get("name")]
    named.append(_arguments(network_spec(model["teacher"])).get("name") if model.get("teacher") else None)
    return next((name for name in named if isinstance(name, str)), None)


def _arguments(spec: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (spec or {}).get("init_args") or {}


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--format hf: the tokenizer {name}, which the run names, is not on this machine; put it there again"
        ) from error
