"""The files that change networks, data and optimizer of any method: `-c METHOD -c PAIR`."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

import lit_distill.image
from lit_distill.cli import main
from lit_distill.experiment.export import save_student
from lit_distill.experiment.launch import DistillCLI
from lit_distill.image.data import ImageBatch
from lit_distill.image.models import (
    VGG,
    MobileNetV2CIFAR,
    ResNetCIFAR,
    ShuffleNetV1CIFAR,
    ShuffleNetV2CIFAR,
    WideResNet,
)

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


class FourImages(LightningDataModule):
    num_classes = 100
    sample_shape = (3, 32, 32)

    def train_labels(self):
        return torch.arange(50) % 10

    def train_dataloader(self):
        batch = ImageBatch(torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4))
        return DataLoader([batch, batch], batch_size=None)


def resnet32x4():
    return ResNetCIFAR(32, 100, widths=(32, 64, 128, 256))


# FSP is not there: it needs equal widths.
@pytest.mark.parametrize(
    "method", ["FitNets", "AT", "NST", "SP", "ICKD", "VID", "CRD", "FT", "AB", "OFD", "ReviewKD", "OFA", "RKD", "CC"]
)
@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (resnet32x4, lambda: ShuffleNetV2CIFAR(100)),
        (resnet32x4, lambda: ShuffleNetV1CIFAR(100)),
        (lambda: VGG(13, 100), lambda: MobileNetV2CIFAR(100, width=0.5)),
        (lambda: WideResNet(40, 2, 100), lambda: ShuffleNetV1CIFAR(100)),
    ],
    ids=["resnet32x4-shufflenetv2", "resnet32x4-shufflenetv1", "vgg13-mobilenetv2", "wrn-40-2-shufflenetv1"],
)
def test_networks_of_different_kinds_meet_without_taps_given(teacher, student, method, trainer):
    # The second batch is one in which features are compared.
    options = {"FT": {"init_iterations": 1}, "AB": {"init_iterations": 2}, "CRD": {"negatives": 8}}
    module = getattr(lit_distill.image, method)(student(), teacher(), **options.get(method, {}))
    trainer().fit(module, datamodule=FourImages())
    assert set(module.terms) > {"ce"} or (method == "AB" and set(module.terms) == {"ab"})
    assert all(torch.isfinite(value) for value in module.terms.values())
