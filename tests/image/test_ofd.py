import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from torch import nn
from torchvision.models import resnet18, resnet50

from lit_distill.core.errors import UsageError
from lit_distill.image import ImageBatch, Outputs
from lit_distill.image.losses.ofd import FeatureOverhaul
from lit_distill.image.methods.ofd import OFD
from lit_distill.image.models import VGG, ConvNet, MobileNetV2CIFAR, ResNetCIFAR, ShuffleNetV1CIFAR, WideResNet

PRE = "stage1.2@input"


def test_method(check_method):
    module = check_method(lambda student, teacher: OFD(student, teacher, margins=[-0.5, -0.5]), extra=("losses",))
    assert [c[0].weight.shape for c in module.losses["ofd"].connectors] == [(6, 4, 1, 1)] * 2


def test_margins_are_expected_negative_values_under_the_teachers_norm(step, tiny):
    teacher = tiny(6, seed=5)
    with torch.no_grad():
        teacher.stage1[1].bias.copy_(torch.tensor([-0.5, 0.0, 0.3, 0.1, -2.0, 1.0]))
        teacher.stage1[1].weight.copy_(torch.tensor([1.0, -0.5, 0.2, 1.0, 0.3, 2.0]))
        bias, deviation = teacher.stage1[1].bias.double().numpy(), teacher.stage1[1].weight.double().abs().numpy()
    module = OFD(tiny(), teacher, [PRE], [PRE])
    step(module)
    expected = truncnorm(-np.inf, -bias / deviation, bias, deviation).mean()
    np.testing.assert_allclose(module.losses["ofd"].margin0.numpy(), expected, rtol=1e-4)
    # They come from the teacher, not from a checkpoint.
    assert not any("margin" in name for name in module.state_dict())


def test_the_term_halves_toward_shallow_taps():
    loss = FeatureOverhaul(["a", "b"], ["a", "b"], margins=[-0.2, -0.6])
    loss.connectors.extend(nn.Identity() for _ in range(2))
    for stage, margin in enumerate(loss.margins):
        loss.register_buffer(f"margin{stage}", torch.full((3,), margin))
    own, target = ({name: torch.randn(2, 3, 4, 4) for name in "ab"} for _ in range(2))
    batch = ImageBatch(torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.long), torch.arange(2))
    expected = 0.0
    for name, weight, margin in (("a", 0.5, -0.2), ("b", 1.0, -0.6)):
        s, t = own[name].double().numpy(), np.maximum(target[name].double().numpy(), margin)
        expected += weight * np.where((s <= t) & (t <= 0), 0.0, (s - t) ** 2).sum() / 2
    value = loss(Outputs(torch.zeros(2, 3), own), Outputs(torch.zeros(2, 3), target), batch, 0)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_the_teacher_runs_on_its_running_statistics(step, tiny, blobs):
    teacher = tiny(6, seed=5)
    with torch.no_grad():
        teacher.stage1[1].running_mean.fill_(3.0)
    seen = []
    module = OFD(tiny(), teacher, [PRE], [PRE])
    run = module.run_teacher
    module.run_teacher = lambda batch: seen.append(run(batch)) or seen[-1]
    step(module)
    convolved = teacher.stage1[0](blobs.images[:8])
    torch.testing.assert_close(seen[0].features[PRE], (convolved - 3.0) / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize(
    ("network", "taps", "norms"),
    [
        (ResNetCIFAR(20, 10), None, ("layer1.2.bn2", "layer2.2.bn2", "layer3.2.bn2")),
        # One block a stage: the shortcut's norm is registered after the block's own.
        (ResNetCIFAR(8, 10), None, ("layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2")),
        (WideResNet(10, 1, 10), None, ("layer2.0.bn1", "layer3.0.bn1", "bn")),
        (VGG(8, 10), None, ("layer2.2", "layer3.2", "layer4.2", "layer5.1")),
        (ConvNet(10, (4, 8)), None, ("layer1.1", "layer2.2")),
        (ShuffleNetV1CIFAR(10), None, ("layer1.3.branch.8", "layer2.7.branch.8", "layer3.3.branch.8")),
        (MobileNetV2CIFAR(10), ("blocks.1",), ("blocks.1.1.conv.7",)),
        # torchvision registers one ReLU before the norms that it follows.
        (
            resnet18(),
            ("layer1.1.relu:1@input", "layer1.1.relu:0@input", "layer2.1.bn1"),
            ("layer1.1.bn2", "layer1.1.bn1", "layer2.1.bn1"),
        ),
        (resnet50(), ("layer2.0.relu:-1@input",), ("layer2.0.bn3",)),
    ],
    ids=["resnet20", "resnet8", "wrn", "vgg", "convnet", "shufflenet", "mobilenet", "resnet18", "resnet50"],
)
def test_norms_are_found_by_the_order_of_modules(network, taps, norms):
    loss = FeatureOverhaul(teacher_taps=taps)
    known = dict(network.named_modules())
    for module in known.values():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias)
    loss.resolve(ResNetCIFAR(8, 10), network)
    for (bias, weight), norm in zip(loss._gaussians, norms, strict=True):
        assert torch.equal(bias, known[norm].bias)
        assert torch.equal(weight, known[norm].weight)


def test_norms_may_be_named(step, tiny):
    teacher = tiny(6, seed=5)
    module = OFD(tiny(), teacher, ["stage2.2@input"], ["stage2.2@input"], teacher_norms=["stage1.1"])
    step(module)
    # Bias 0 and weight 1: the mean of the negative half of a normal distribution.
    assert module.losses["ofd"].margin0.tolist() == pytest.approx([-((2 / np.pi) ** 0.5)] * 6, rel=1e-5)


def test_norms_that_are_missing_or_wrong_are_refused(trainer, blobs, tiny):
    def fit(**options):
        trainer().fit(OFD(tiny(), tiny(6), **options), datamodule=blobs)

    with pytest.raises(UsageError, match=r"no BatchNorm was found before teacher tap 'stage2\.2@input'.*teacher_norms"):
        fit()
    with pytest.raises(UsageError, match="1 teacher_norms and 2 teacher taps; give one for each"):
        fit(teacher_norms=["stage1.1"])
    with pytest.raises(UsageError, match="3 margins and 2 teacher taps"):
        fit(margins=[-1.0, -1.0, -1.0])
    with pytest.raises(UsageError, match=r"'stage1\.9' is not there; name BatchNorm modules"):
        fit(student_taps=[PRE], teacher_taps=[PRE], teacher_norms=["stage1.9"])
    with pytest.raises(UsageError, match=r"'stage1\.0' is Conv2d without weights of its own"):
        fit(student_taps=[PRE], teacher_taps=[PRE], teacher_norms=["stage1.0"])
    with pytest.raises(UsageError, match=r"has 6 channels, the tap 2; name the right modules in teacher_norms"):
        fit(student_taps=["stage1@input"], teacher_taps=["stage1@input"], teacher_norms=["stage1.1"])
