from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.taps import FeatureTaps
from lit_distill.image.augment import IMAGENET_STATISTICS
from lit_distill.image.data import CIFAR10DataModule
from lit_distill.image.models import (
    MLP,
    VGG,
    ConvNet,
    MobileNetV2CIFAR,
    ResNetCIFAR,
    ShuffleNetV1CIFAR,
    ShuffleNetV2CIFAR,
    WideResNet,
)
from lit_distill.image.models.resnet import PadChannels
from lit_distill.image.models.shufflenet import ChannelShuffle

SHARED = Path(__file__).resolve().parents[3] / "shared"
WIDE = (32, 64, 128, 256)

# Built lazily: name -> (constructor, sample shape).
NETWORKS = {
    "resnet20": (lambda: ResNetCIFAR(20, 100), (3, 32, 32)),
    "resnet8x4": (lambda: ResNetCIFAR(8, 100, WIDE), (3, 32, 32)),
    "resnet8-A": (lambda: ResNetCIFAR(8, 10, shortcut="A"), (3, 32, 32)),
    "wrn-16-2": (lambda: WideResNet(16, 2, 100), (3, 32, 32)),
    "wrn-10-1": (lambda: WideResNet(10, 1, 10), (3, 32, 32)),
    "vgg8": (lambda: VGG(8, 100), (3, 32, 32)),
    "mobilenetv2": (lambda: MobileNetV2CIFAR(100), (3, 32, 32)),
    "shufflenetv1": (lambda: ShuffleNetV1CIFAR(100), (3, 32, 32)),
    "shufflenetv2": (lambda: ShuffleNetV2CIFAR(100), (3, 32, 32)),
    "convnet28": (lambda: ConvNet(10), (1, 28, 28)),
    "convnet8": (lambda: ConvNet(10, (16, 32)), (1, 8, 8)),
    "mlp": (lambda: MLP(784, 10, (64, 32)), (1, 28, 28)),
}


def taps(network, images, names):
    """Outputs of modules: at the time, and what has become of them when the network is through."""
    now, later, hooks = {}, {}, []
    for name in names:

        def keep(_module, _args, output, name=name):
            now[name], later[name] = output.clone(), output

        hooks.append(network.get_submodule(name).register_forward_hook(keep))
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, now, later


@pytest.mark.parametrize(
    ("network", "millions"),
    [
        # As printed in the common code of the field for 100 classes (RepDistiller, mdistiller), to two digits.
        (lambda: ResNetCIFAR(20, 100), 0.28),
        (lambda: ResNetCIFAR(56, 100), 0.86),
        (lambda: ResNetCIFAR(110, 100), 1.74),
        (lambda: ResNetCIFAR(8, 100, WIDE), 1.23),
        (lambda: ResNetCIFAR(32, 100, WIDE), 7.43),
        (lambda: WideResNet(16, 2, 100), 0.70),
        (lambda: WideResNet(40, 1, 100), 0.57),
        (lambda: WideResNet(40, 2, 100), 2.26),
        (lambda: VGG(8, 100), 3.97),
        (lambda: VGG(13, 100), 9.46),
        (lambda: MobileNetV2CIFAR(100), 0.81),
        (lambda: ShuffleNetV1CIFAR(100), 0.95),
        (lambda: ShuffleNetV2CIFAR(100), 1.36),
    ],
)
def test_parameters_are_those_of_the_literature(network, millions):
    assert round(sum(p.numel() for p in network().parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_resnets_with_padded_shortcuts_have_the_published_parameters(depth, count):
    assert sum(p.numel() for p in ResNetCIFAR(depth, 10, shortcut="A").parameters()) == count


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet20", [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ("resnet8x4", [(64, 32, 32), (128, 16, 16), (256, 8, 8)]),
        ("wrn-16-2", [(32, 32, 32), (64, 16, 16), (128, 8, 8)]),
        ("vgg8", [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)]),
        ("mobilenetv2", [(12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)]),
        ("shufflenetv1", [(240, 16, 16), (480, 8, 8), (960, 4, 4)]),
        ("shufflenetv2", [(116, 16, 16), (232, 8, 8), (464, 4, 4)]),
        ("convnet28", [(32, 28, 28), (64, 14, 14), (128, 7, 7)]),
        ("convnet8", [(16, 8, 8), (32, 4, 4)]),
        ("mlp", [(64,), (32,)]),
    ],
)
def test_stages_have_the_shapes_of_the_literature(name, shapes):
    build, sample = NETWORKS[name]
    network = build()
    _, features, _ = taps(network, torch.randn(2, *sample), network.stages)
    assert [tuple(features[stage].shape[1:]) for stage in network.stages] == shapes


@pytest.mark.parametrize("name", NETWORKS)
def test_stage_features_are_rectified_and_stay_as_they_were(name):
    torch.manual_seed(0)
    build, sample = NETWORKS[name]
    network = build()
    _, now, later = taps(network, torch.randn(4, *sample), network.stages)
    for stage in network.stages:
        assert torch.equal(now[stage], later[stage]), f"{stage} is overwritten by what follows"
        if name != "mobilenetv2":  # its bottlenecks are linear
            assert now[stage].min() == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_penultimate_is_what_the_last_layer_reads(name):
    torch.manual_seed(0)
    build, sample = NETWORKS[name]
    network = build().eval()
    logits, features, _ = taps(network, torch.randn(3, *sample), [network.penultimate])
    vector = features[network.penultimate]
    assert vector.ndim == 2
    torch.testing.assert_close(logits, vector @ network.linear.weight.T + network.linear.bias)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_stay_channels_last(name):
    build, sample = NETWORKS[name]
    network = build()
    channels, *size = sample
    images = torch.randn(2, *size, channels).permute(0, 3, 1, 2)  # as loaders give them, for one channel too
    _, _, features = taps(network, images, network.stages)
    for stage, feature in features.items():
        assert feature.ndim == 2 or feature.is_contiguous(memory_format=torch.channels_last), stage


@pytest.mark.parametrize("name", NETWORKS)
def test_all_parameters_get_gradients_and_activations_keep_their_scale(name):
    torch.manual_seed(0)
    build, sample = NETWORKS[name]
    network = build()
    logits = network(torch.randn(8, *sample))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert 0.01 < logits.std() < 10


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNetCIFAR(21, 10), r"depth: 21 is not 6 n \+ 2"),
        (lambda: ResNetCIFAR(2, 10), r"depth: 2 is not 6 n \+ 2"),
        (lambda: WideResNet(20, 2, 10), r"depth: 20 is not 6 n \+ 4"),
        (lambda: WideResNet(16, 0, 10), "width: 0"),
        (lambda: VGG(10, 10), "depth: there is no VGG-10; give 8, 11, 13, 16, 19"),
        (lambda: MobileNetV2CIFAR(10, 0.01), "width: 0.01"),
        (lambda: ConvNet(10, ()), "widths: it is empty"),
        (lambda: MLP(4, 10, ()), "hidden: it is empty"),
    ],
)
def test_impossible_shapes_are_refused(build, message):
    with pytest.raises(UsageError, match=message):
        build()


@pytest.mark.parametrize(("depth", "convolutions"), [(8, 5), (11, 8), (13, 10), (16, 13), (19, 16)])
def test_vggs_have_the_convolutions_of_the_paper_and_one_linear_layer(depth, convolutions):
    # VGG counts its three linear layers; the literature's VGG-8 is named likewise.
    kinds = [type(module) for module in VGG(depth, 10).modules()]
    assert kinds.count(nn.Conv2d) == convolutions
    assert kinds.count(nn.Linear) == 1


def test_padded_shortcut_takes_every_second_pixel_and_adds_zero_channels_on_both_sides():
    x = torch.arange(2 * 16.0).reshape(1, 2, 4, 4)
    found = PadChannels(3, 2)(x)
    assert found[0, 1:3].tolist() == [[[0, 2], [8, 10]], [[16, 18], [24, 26]]]
    assert found.shape == (1, 5, 2, 2)
    assert found[0, [0, 3, 4]].abs().sum() == 0


def test_channel_shuffle_equals_torchs():
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(ChannelShuffle(3)(x), nn.ChannelShuffle(3)(x))


def test_convolutions_start_with_variance_two_over_fan_out():
    torch.manual_seed(0)
    weight = WideResNet(10, 4, 10).layer3[0].conv1.weight  # 128 to 256 channels, 3x3
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.fixture(scope="module")
def test_images():
    if not (SHARED / "models/cifar10").is_dir():
        pytest.skip("../shared/models is not there")
    mean, std = IMAGENET_STATISTICS
    data = CIFAR10DataModule(root=SHARED / "data", mean=mean, std=std, eval_batch_size=1000)
    return next(iter(data.test_dataloader()))


# Right of the first 1,000: counted once with functional operations only, after the description of the weights.
@pytest.mark.parametrize(("name", "depth", "right"), [("resnet20", 20, 915), ("resnet32", 32, 928)])
def test_published_weights_give_the_accuracy_of_a_plain_implementation(name, depth, right, test_images):
    network = ResNetCIFAR(depth, 10, shortcut="A").eval()
    network.load_state_dict(load_file(SHARED / f"models/cifar10/{name}.safetensors"))
    with torch.no_grad():
        assert (network(test_images.images).argmax(1) == test_images.labels).sum() == right


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet8-A", "wrn-16-2", "vgg8", "shufflenetv1", "shufflenetv2", "convnet28", "mlp"]
)
def test_rectified_pre_activations_are_the_stages(name):
    build, sample = NETWORKS[name]
    network = build()
    names = [*network.stages, *network.pre_activations]
    _, features = FeatureTaps(network, names)(torch.randn(4, *sample))
    for stage, before in zip(network.stages, network.pre_activations, strict=True):
        assert (features[before] < 0).any()
        torch.testing.assert_close(features[before].relu(), features[stage])
