import pytest
import torch
import torch.nn.functional as F

from lit_distill.core.errors import UsageError
from lit_distill.core.taps import FeatureTaps, probe
from lit_distill.image.models import TimmClassifier

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32}
BLOCKS_OF_FOUR = tuple(f"network.blocks.{block}" for block in range(4))
BLOCKS_OF_TWELVE = tuple(f"network.blocks.{block}" for block in (1, 3, 9, 11))


def vit():
    return TimmClassifier("VisionTransformer", 10, **SMALL, depth=4, num_heads=4)


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (vit, [(17, 32)] * 4),
        (lambda: TimmClassifier("MlpMixer", 10, **SMALL, num_blocks=4), [(16, 32)] * 4),
        (
            lambda: TimmClassifier("ResNet", 10, layers=[1] * 4, block=_block(), in_chans=1),
            [(64, 2, 2), (128, 1, 1), (256, 1, 1), (512, 1, 1)],
        ),
    ],
    ids=["vit", "mixer", "resnet"],
)
def test_stages_and_embedding_of_small_networks(build, shapes):
    torch.manual_seed(0)
    network = build().eval()
    logits, found = probe(network, (1, 8, 8), network.stages)
    assert logits.shape == (2, 10)
    assert list(found.values()) == shapes
    images = torch.randn(3, 1, 8, 8)
    logits, features = FeatureTaps(network, [network.penultimate])(images)
    vector = features[network.penultimate]
    assert vector.shape == (3, shapes[-1][-1] if len(shapes[-1]) == 2 else shapes[-1][0])
    classifier = network.network.get_classifier()
    torch.testing.assert_close(logits, vector @ classifier.weight.T + classifier.bias)


def _block():
    from timm.models.resnet import BasicBlock

    return BasicBlock


@pytest.mark.parametrize(
    ("name", "stages", "penultimate", "millions"),
    [
        # Parameters as the papers and timm's tables print them, for 1,000 classes.
        ("deit_tiny_patch16_224", BLOCKS_OF_TWELVE, "network.head@input", 5.7),
        ("mixer_b16_224", BLOCKS_OF_TWELVE, "network.head@input", 59.9),
        ("resmlp_12_224", BLOCKS_OF_TWELVE, "network.head@input", 15.4),
        ("resnet18", tuple(f"network.layer{stage}" for stage in (1, 2, 3, 4)), "network.fc@input", 11.7),
        ("convnext_tiny", tuple(f"network.stages.{stage}" for stage in range(4)), "network.head.fc@input", 28.6),
        ("swin_tiny_patch4_window7_224", None, "network.head.fc@input", 28.3),
    ],
)
def test_published_networks_name_their_stages(name, stages, penultimate, millions):
    with torch.device("meta"):
        network = TimmClassifier(name, 1000)
    assert getattr(network, "stages", None) == stages
    assert network.penultimate == penultimate
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("depth", "blocks"), [(1, (0,)), (2, (0, 1)), (4, (0, 1, 2, 3)), (6, (0, 1, 4, 5)), (8, (0, 2, 6, 7))]
)
def test_stages_of_equal_blocks_keep_the_proportions(depth, blocks):
    network = TimmClassifier("VisionTransformer", 10, **SMALL, depth=depth, num_heads=4)
    assert network.stages == tuple(f"network.blocks.{block}" for block in blocks)


def test_resizing_is_bilinear_and_comes_first():
    torch.manual_seed(0)
    network, images = vit().eval(), torch.randn(2, 1, 4, 4)
    large = F.interpolate(images, (8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        plain = network(large)
        network.resize = 8
        assert torch.equal(network(images), plain)
        assert torch.equal(network(large), plain)


def test_all_parameters_get_gradients():
    network = vit()
    network(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad.abs().amax() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: TimmClassifier("deit_tinny_patch16_224", 10),
            "timm has no model 'deit_tinny_patch16_224'; nearest: deit_",
        ),
        (lambda: TimmClassifier("create_model", 10), "timm has no model 'create_model'"),
        (lambda: TimmClassifier("VisionTransformer", 10, heads=3), "timm's VisionTransformer does not take these"),
        (lambda: TimmClassifier("VisionTransformer", 10, embed_dim=30, num_heads=4), "does not take these arguments"),
    ],
)
def test_what_timm_does_not_know_is_refused_in_one_line(build, message):
    with pytest.raises(UsageError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
