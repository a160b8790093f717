import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.image.losses.exits import OneForAll, PatchMerging, conv_exit, exit_branch, token_exit
from lit_distill.image.methods.ofa import OFA
from lit_distill.image.models import TimmClassifier


def vit(seed=0, depth=2):
    torch.manual_seed(seed)
    size = {"img_size": 8, "patch_size": 2, "in_chans": 2, "embed_dim": 8}
    return TimmClassifier("VisionTransformer", 3, **size, depth=depth, num_heads=4)


def one_for_all_by_numpy(student, teacher, labels, exponent):
    mask = np.eye(3)[labels]
    target = (softmax(teacher.double().numpy(), 1) + mask) ** exponent - mask
    return -(target * log_softmax(student.detach().double().numpy(), 1)).sum(1).mean()


def test_method(check_method):
    module = check_method(OFA, extra=("losses",))
    assert set(module.losses) == {"ofa", "ofa_logits"}


def test_terms_are_weighted_and_summed_over_exits(step, tiny, blobs):
    images, labels, teacher = blobs.images[:8], blobs.labels[:8].numpy(), tiny(6, seed=5)
    module = OFA(tiny(), teacher, exponent=1.3, kd_weight=0.5, ofa_weight=0.2, label_weight=0.7)
    exits = []
    combine = module.combine

    def before(terms):
        # The exits as they are before the first update, on the student's features of the first batch.
        with torch.no_grad():
            student, branches = tiny(), module.losses["ofa"].exits
            first = student.stage1(images)
            exits.extend([branches[0](first), branches[1](student.stage2(first))])
        return combine(terms)

    module.combine = before
    _, terms = step(module)
    said = teacher.eval()(images).detach()
    expected = sum(one_for_all_by_numpy(logits, said, labels, 1.3) for logits in exits)
    assert len(exits) == 2
    assert terms["ofa"] == pytest.approx(0.2 * expected, rel=1e-4)
    own = tiny()(images)
    assert terms["ofa_logits"] == pytest.approx(0.5 * one_for_all_by_numpy(own, said, labels, 1.3), rel=1e-4)
    cross_entropy = -log_softmax(own.detach().double().numpy(), 1)[np.arange(8), labels].mean()
    assert terms["ce"] == pytest.approx(0.7 * cross_entropy, rel=1e-4)


def test_defaults_are_the_codes(tiny):
    module = OFA(tiny(), tiny())
    assert (module.weights, module.label_weight) == ({"ofa": 1.0, "ofa_logits": 1.0}, 1.0)
    assert {(loss.exponent, loss.temperature) for loss in module.losses.values()} == {(1.0, 1.0)}


@pytest.mark.parametrize(("student", "teacher"), [("vit", "cnn"), ("cnn", "vit"), ("vit", "vit")])
def test_networks_of_different_kinds_can_be_paired(step, tiny, student, teacher):
    build = {"vit": vit, "cnn": lambda seed=0: tiny(seed=seed)}
    module = OFA(build[student](), build[teacher](seed=5), label_weight=0.0, kd_weight=0.0)
    moved, terms = step(module)
    assert set(terms) == {"ofa"}
    assert all(name in moved for name, p in module.losses.named_parameters(prefix="losses") if p.requires_grad)
    # The student's own head learns nothing from exits, everything before the last stage does.
    head = {"vit": "network.head.weight", "cnn": "head.weight"}[student]
    early = {"vit": "network.patch_embed.proj.weight", "cnn": "stage1.0.weight"}[student]
    assert f"student.{early}" in moved
    assert f"student.{head}" not in moved


def test_exits_are_left_behind_and_the_student_says_the_same_without(step, blobs, tiny):
    module = OFA(vit(), tiny(6, seed=5))
    step(module)
    module.eval()
    assert not any("exit" in name for name in module.student.state_dict())
    with torch.no_grad():
        beside = module._student_taps(blobs.images)[0]
        again = vit(seed=9).eval()
        again.load_state_dict(module.student.state_dict())
        assert torch.equal(again(blobs.images), beside)


# ---- branches ------------------------------------------------------------------------------------------------------


def test_a_chain_of_blocks_halves_the_grid_and_doubles_the_channels_up_to_the_wider_network():
    branch = conv_exit((4, 8, 8), depth=3, width=40, num_classes=3)
    blocks = list(branch.trunk)[:-1]
    sizes, x = [], torch.randn(2, 4, 8, 8)
    for block in blocks:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(8, 4, 4), (16, 2, 2), (40, 1, 1)]
    kinds = [type(layer) for layer in blocks[0]]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
    assert [layer.groups for layer in blocks[0] if isinstance(layer, nn.Conv2d)] == [4, 1, 4, 1]
    assert branch(torch.randn(2, 4, 8, 8)).shape == (2, 3)


def test_the_last_stage_has_one_convolution():
    branch = conv_exit((4, 2, 2), depth=0, width=40, num_classes=3)
    assert [type(layer).__name__ for layer in branch.trunk] == ["Conv2d", "GlobalPool"]
    x = torch.randn(2, 4, 2, 2)
    conv = branch.trunk[0]
    expected = torch.einsum("oc,bc->bo", conv.weight[:, :, 0, 0], x.mean((2, 3))) + conv.bias
    torch.testing.assert_close(branch(x), expected @ branch.head.weight.T + branch.head.bias)


@pytest.mark.parametrize(("depth", "blocks"), [(3, 3), (1, 1), (0, 1)])
@pytest.mark.parametrize(
    ("tokens", "merges"), [(17, 0), (16, 0), (49, 0), (13**2, 0), (197, 1), (28**2, 2), (30**2, 1), (15**2, 0)]
)
def test_patches_are_merged_down_to_seven_by_seven_or_not_at_all(depth, blocks, tokens, merges):
    branch = token_exit((tokens, 8), depth, 8, 3)
    kinds = [type(layer).__name__ for layer in branch.trunk]
    assert kinds == ["PatchMerging"] * merges + ["Block"] * blocks + ["TokenPool"]
    assert branch(torch.randn(2, tokens, 8)).shape == (2, 3)


def test_the_last_of_several_merges_is_linear_and_a_single_one_is_not():
    def activations(tokens):
        return [type(m.activation) for m in token_exit((tokens, 8), 1, 8, 3).trunk if isinstance(m, PatchMerging)]

    assert activations(14**2) == [nn.GELU]
    assert activations(28**2) == [nn.GELU, nn.Identity]


def test_merging_equals_a_loop_over_patches_and_leaves_class_tokens_alone():
    torch.manual_seed(0)
    merging, tokens = PatchMerging(3, 3, 1, nn.Identity()), torch.randn(2, 1 + 16, 3)
    expected = [tokens[:, 0]]
    for row in (0, 2):
        for column in (0, 2):
            four = [tokens[:, 1 + 4 * (row + i) + column + j] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
            expected.append(merging.reduction(merging.norm(torch.cat(four, dim=1))))
    torch.testing.assert_close(merging(tokens), torch.stack(expected, dim=1))


def test_merging_brings_tokens_to_the_students_width():
    branch = token_exit((14**2, 8), 1, 16, 3)
    assert branch.head.in_features == 16
    assert branch(torch.randn(2, 14**2, 8)).shape == (2, 3)


def test_the_class_token_is_classified_or_else_the_mean():
    torch.manual_seed(0)
    tokens = torch.randn(2, 17, 8)
    branch = token_exit((17, 8), 0, 8, 3)
    carried = branch.trunk[0](tokens)
    torch.testing.assert_close(branch(tokens), branch.head(carried[:, 0]))
    branch = token_exit((16, 8), 0, 8, 3)
    torch.testing.assert_close(branch(tokens[:, 1:]), branch.head(branch.trunk[0](tokens[:, 1:]).mean(1)))


def test_weights_start_as_in_the_code():
    torch.manual_seed(0)
    branch = conv_exit((64, 8, 8), 1, 256, 1000)
    pointwise = branch.trunk[0][5].weight
    assert pointwise.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert branch.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not branch.head.bias.any()


def test_maps_are_as_wide_as_the_wider_network(step, tiny):
    narrow, wide = OFA(tiny(4), tiny(6, seed=5)), OFA(tiny(8), tiny(6, seed=5))
    step(narrow)
    step(wide)
    assert [branch.head.in_features for branch in narrow.losses["ofa"].exits] == [6, 6]
    assert [branch.head.in_features for branch in wide.losses["ofa"].exits] == [8, 8]


def test_features_without_an_exit_are_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match=r"tap 'head' has shape \(3,\)"):
        trainer().fit(OFA(tiny(), tiny(), student_taps=["head"]), datamodule=blobs)
    with pytest.raises(UsageError, match="width 6 cannot be split over 4 heads"):
        exit_branch("blocks", (16, 6), 1, 6, 3)
    with pytest.raises(UsageError, match=r"exponent is 0\.5"):
        OneForAll(exponent=0.5)
    with pytest.raises(UsageError, match="temperature is 0"):
        OFA(tiny(), tiny(), temperature=0.0)
