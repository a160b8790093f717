"""The files that change networks, data and optimizer of any method: `-c METHOD -c PAIR`."""

from pathlib import Path

import pytest

from lit_distill.cli import main
from lit_distill.experiment.export import save_student
from lit_distill.experiment.launch import DistillCLI
from lit_distill.image.models import ResNetCIFAR

ROOT = Path(__file__).parents[1]
PAIRS = sorted((ROOT / "configs/image/pairs").glob("*.yaml"))
CPU = ["-c", str(ROOT / "configs/trainer/cpu.yaml")]


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_pair_instantiates_after_a_method(path, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, _: built.append(cli))
    alone = "_" not in path.stem or path.stem.startswith("teacher_") or path.stem == "cifar10_resnet8"
    method = "supervised" if alone else "kd"
    words = ["fit", *CPU, "-c", str(ROOT / f"configs/image/{method}.yaml"), "-c", str(path), f"--run.root={tmp_path}"]
    if not alone and path.stem.startswith("imagenet"):
        # Nothing is downloaded in a test.
        (tmp_path / "offline.yaml").write_text("model: {init_args: {teacher: {init_args: {weights: null}}}}")
        words += ["-c", str(tmp_path / "offline.yaml")]
    elif not alone:
        classes = 10 if path.stem.startswith("cifar10_") else 100
        shape = {"num_classes": classes, "depth": 56 if classes == 10 else 8, "shortcut": "A" if classes == 10 else "B"}
        spec = {"class_path": "lit_distill.image.models.ResNetCIFAR", "init_args": shape}
        save_student(ResNetCIFAR(**shape).state_dict(), spec, tmp_path / "teacher/student")
        words.append(f"--model.init_args.teacher.init_args.weights={tmp_path}/teacher/student/model.safetensors")
        words += [] if classes == 10 else [f"--model.init_args.teacher.init_args.weights={tmp_path}/teacher"]
    assert main(words) == 0
    text = path.read_text()
    if "student:" in text:
        assert f".{type(built[0].model.student).__name__}" in text or "torchvision" in text
    optimizer = built[0].model.optimizer([next(built[0].model.student.parameters())])
    if "lr:" in text:
        assert f"lr: {optimizer.param_groups[0]['lr']}" in text
