"""Weights of two students averaged into a third: `python -m lit_distill.diffusion.merge A B --to DIR`."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_distill.core.errors import UsageError
from lit_distill.core.files import atomic_path, write_json
from lit_distill.core.networks import CONFIG_FILE, WEIGHTS_FILE, read_weights


def weight_merge(student_a: str, student_b: str, to: str, share: float = 0.5) -> None:
    r"""Writes the student whose weights are between those of two others of the same architecture.

    .. math:: \theta = \lambda \theta_a + (1 - \lambda) \theta_b

    SwiftBrush v2 merges a student that was trained whole with one of which adapters were trained (their weights added
    to the network's own), both begun as the same network.

    Args:
        student_a: A run's folder, or its `student/` folder.
        student_b: Another.
        to: Folder to write, with weights and the configuration of a.
        share: lambda.

    Raises:
        UsageError: A folder holds no student, the two are of different shapes, or the target is not empty.

    A reconstruction: no code of the paper was found.

    Reference: Dao et al., SwiftBrush v2, 2024, arXiv 2408.14176.
    """
    target = Path(to)
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise UsageError(f"--to: {target} is not empty; name a new folder")
    folders = [_student_folder(student) for student in (student_a, student_b)]
    merged = merged_weights(*(read_weights(folder / WEIGHTS_FILE) for folder in folders), share=share)
    with atomic_path(target / WEIGHTS_FILE) as path:
        save_file(merged, path)
    write_json(target / CONFIG_FILE, json.loads((folders[0] / CONFIG_FILE).read_text(encoding="utf-8")))


def merged_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, share: float) -> dict[str, Tensor]:
    """Returns share times the first plus the rest of the second, by name; whole numbers are those of the first.

    Raises:
        UsageError: Names or shapes differ, or `share` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"--share is {share}; give a number from 0 (all of b) to 1 (all of a)")
    for name in sorted({*first, *second}):
        shapes = [tuple(part[name].shape) if name in part else None for part in (first, second)]
        if shapes[0] != shapes[1]:
            raise UsageError(f"student_b: {name} has shape {shapes[1]}, in student_a {shapes[0]}; merge equal networks")
    return {
        name: torch.lerp(second[name].float(), value.float(), share).to(value.dtype).contiguous()
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def _student_folder(student: str) -> Path:
    folder = Path(student) / "student" if (Path(student) / "student").is_dir() else Path(student)
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"student: {student} holds no {WEIGHTS_FILE} with {CONFIG_FILE}; give a finished run")
    return folder


if __name__ == "__main__":
    import sys

    from jsonargparse import auto_cli

    try:
        auto_cli(weight_merge)
    except UsageError as error:
        print(f"merge: {error}", file=sys.stderr)
        sys.exit(2)
