"""Random guidance, and negative prompts by subtraction inside of cross-attention."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from score_methods import attach, check_score_method
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.fake import LoRA
from lit_distill.diffusion.methods.snoopi import SNOOPI
from lit_distill.diffusion.methods.swiftbrush import SwiftBrush
from lit_distill.diffusion.models import ResidualMLP
from lit_distill.diffusion.nasa import ClassTokens, install_nasa, subtracting, with_negative
from lit_distill.diffusion.networks import call_network
from lit_distill.diffusion.paths import EDMPath
from lit_distill.diffusion.rollout import Sample

WIDTH = 8


class AttentiveMLP(nn.Module):
    """One layer of diffusers' cross-attention on the tokens of a class, for flat samples."""

    def __init__(self, classes=10, features=64):
        super().__init__()
        self.first = nn.Linear(features + 1, WIDTH)
        self.attention = Attention(WIDTH, cross_attention_dim=WIDTH, heads=2, dim_head=4)
        self.last = nn.Linear(WIDTH, features)

    def forward(self, x, time, encoder_hidden_states):
        hidden = self.first(torch.cat([x.flatten(1), time[:, None]], 1))
        hidden = hidden + self.attention(hidden[:, None], encoder_hidden_states)[:, 0]
        return self.last(F.silu(hidden)).view_as(x)


class OfClasses(ClassTokens):
    """With a network that takes text as an argument of its own."""

    def forward(self, x, time, condition):
        text = self.classes(condition).reshape(len(condition), self.tokens * condition[:1].numel(), -1)
        return self.network(x, time, text)


def make_attentive(seed, classes=10, features=64):
    torch.manual_seed(seed)
    network = OfClasses(AttentiveMLP(classes, features), classes, WIDTH)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Denoiser(network, EDMPath(), "edm", classes, data_std=0.75)


def small_text_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4,
    ).eval()  # fmt: skip


# ---- random guidance ------------------------------------------------------------------------------------------------


def test_method(trainer, digits, make_denoiser, little, tmp_path):
    def build(cls):
        return cls(make_denoiser(1), make_denoiser(0), [2.5], fake=LoRA(4, 8.0), evaluation=little)

    check_score_method(build, SNOOPI, trainer, digits, tmp_path)


def test_method_with_negative_prompts(trainer, digits, little, tmp_path):
    def build(cls):
        return cls(make_attentive(1), make_attentive(0), [2.5], nasa=True, fake=LoRA(4, 8.0), evaluation=little)

    module = check_score_method(build, SNOOPI, trainer, digits, tmp_path)
    assert module._processor.scale is None  # as it was, when nothing is trained


def disturbed(module, trainer, digits):
    attach(module, trainer, digits)
    torch.manual_seed(5)
    for name, parameter in module.fake.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return module


def batch_of(n=6):
    torch.manual_seed(0)
    x = torch.randn(n, 1, 8, 8)
    return Sample(x, x, torch.full((n,), 2.5).double(), 0), torch.arange(n)


def test_a_fixed_scale_is_swiftbrush_and_one_is_none(trainer, digits, make_denoiser, little):
    def gradient(cls, **words):
        module = cls(make_denoiser(1), make_denoiser(0), [2.5], fake=LoRA(4, 8.0), evaluation=little, **words)
        return disturbed(module, trainer, digits).student_gradient(*batch_of(), Draws(1))

    fixed = gradient(SNOOPI, guidance_range=(3.0, 3.0))
    torch.testing.assert_close(fixed, gradient(SwiftBrush, guidance=3.0), rtol=1e-5, atol=1e-6)
    none = gradient(SNOOPI, guidance_range=(1.0, 1.0))
    torch.testing.assert_close(none, gradient(SwiftBrush, guidance=1.0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fixed, none, atol=1e-3)


def test_teacher_and_fake_score_have_the_same_scale_for_each_sample(
    trainer, digits, make_denoiser, little, monkeypatch
):
    from lit_distill.diffusion.methods import swiftbrush

    module = SNOOPI(
        make_denoiser(1), make_denoiser(0), [2.5], guidance_range=(0.5, 4.0), fake=LoRA(4), evaluation=little
    )
    attach(module, trainer, digits)
    asked = []

    def record(denoiser, x_t, t, condition, scale, prediction, null=None):
        asked.append((denoiser, scale, null))
        return x_t

    monkeypatch.setattr(swiftbrush, "guided", record)
    sample, labels = batch_of(500)
    module.student_gradient(sample, labels % 10, Draws(0))
    (fake, kappa, _), (teacher, same, _) = asked
    assert fake is module.fake
    assert teacher is module.teacher
    assert kappa is same
    assert kappa.shape == (500,)
    assert 0.5 <= kappa.min() < 0.55
    assert 3.95 < kappa.max() <= 4.0
    assert kappa.mean().item() == pytest.approx(2.25, abs=0.15)


def test_the_teacher_alone_is_guided_away_from_the_negative(trainer, digits, little, monkeypatch):
    from lit_distill.diffusion.methods import swiftbrush

    module = SNOOPI(make_attentive(1), make_attentive(0), [2.5], nasa=True, fake=LoRA(4, 8.0), evaluation=little)
    attach(module, trainer, digits)
    batch = next(iter(digits.train_dataloader()))
    condition = module.conditions(batch, Draws(0))
    negative = module._negative
    assert ((negative != condition) & (negative >= 0) & (negative < 10)).all()
    asked = []
    monkeypatch.setattr(
        swiftbrush, "guided", lambda denoiser, x_t, *args, null=None: asked.append((denoiser, null)) or x_t
    )
    sample, _ = batch_of(8)
    module.student_gradient(sample, condition, Draws(1))
    assert asked[0] == (module.fake, None)
    assert asked[1][0] is module.teacher
    assert torch.equal(asked[1][1], negative)
    # The generator is given both.
    given = []
    module.student.forward = lambda x_t, t, both: given.append(both) or x_t
    module.student_forward(batch, condition, Draws(1))
    assert torch.equal(given[0], torch.stack([condition, negative], 1))


def test_guidance_is_the_sum_of_the_paper(make_denoiser):
    from lit_distill.diffusion.denoiser import guided

    denoiser, x, labels = make_denoiser(0), torch.randn(3, 1, 8, 8), torch.arange(3)
    kappa, other = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([7, 8, 9])
    for null in (None, other):
        away = torch.full((3,), 10) if null is None else other
        k = kappa.view(3, 1, 1, 1)
        expected = (1 - k) * denoiser(x, 1.0, away) + k * denoiser(x, 1.0, labels)
        torch.testing.assert_close(guided(denoiser, x, 1.0, labels, kappa, null=null), expected, rtol=1e-4, atol=1e-5)


# ---- NASA -----------------------------------------------------------------------------------------------------------


def by_hand(layer, hidden, text, mask=None):
    def heads(values):
        return values.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        heads(layer.to_q(hidden)), heads(layer.to_k(text)), heads(layer.to_v(text)), attn_mask=mask
    )
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_is_attention_twice_subtracted(masked):
    torch.manual_seed(0)
    layer = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
    hidden, positive, negative = torch.randn(3, 5, 8), torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    scale = torch.tensor([0.0, 0.3, 1.0])
    bias = (torch.rand(3, 1, 8) > 0.7).float() * -10000.0 if masked else None
    masks = [None, None] if bias is None else [m[:, None] for m in bias.chunk(2, dim=-1)]
    z = by_hand(layer, hidden, positive, masks[0]) - scale.view(3, 1, 1) * by_hand(layer, hidden, negative, masks[1])
    processor = install_nasa(nn.ModuleList([layer]))
    with subtracting(processor, scale):
        found = layer(hidden, torch.cat([positive, negative], 1), attention_mask=bias)
        torch.testing.assert_close(found, layer.to_out[0](z))
        with pytest.raises(UsageError, match="3 tokens are no positive and negative prompt"):
            layer(hidden, positive[:, :3])
    plain = layer(hidden, positive)
    torch.testing.assert_close(plain, layer.to_out[0](by_hand(layer, hidden, positive)))
    with subtracting(processor, 0.25):  # the same prompt twice: (1 - a) Z
        same = layer(hidden, torch.cat([positive, positive], 1))
    torch.testing.assert_close(same, layer.to_out[0](0.75 * by_hand(layer, hidden, positive)))


def pixart():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=8,
        sample_size=8, caption_channels=6, use_additional_conditions=False,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("build", [small_text_unet, pixart])
@torch.no_grad()
def test_without_strength_the_model_is_the_plain_one(build):
    network = build()
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.2)
    unet = build is small_text_unet
    x, time = torch.randn(2, 1 if unet else 4, 8, 8), torch.tensor([10.0, 500.0])
    texts = [{"encoder_hidden_states": torch.randn(2, 3, 8 if unet else 6)} for _ in range(2)]
    if not unet:
        for text, kept in zip(texts, ([1, 1, 0], [1, 0, 0]), strict=True):
            text["encoder_attention_mask"] = torch.tensor([kept, [1, 1, 1]]).float()
    plain = call_network(network, x, time, texts[0])
    assert plain.shape == x.shape
    both = with_negative(*texts)
    assert {name: value.shape[1] for name, value in both.items()} == dict.fromkeys(texts[0], 6)
    processor = install_nasa(network)

    def same(found):
        # Halves of a mask lie otherwise in memory, and attention rounds otherwise.
        torch.testing.assert_close(found, plain, rtol=0, atol=0 if unet else 1e-5)

    same(call_network(network, x, time, texts[0]))
    with subtracting(processor, 0.0):
        same(call_network(network, x, time, both))
    with subtracting(processor, 0.5):
        assert not torch.allclose(call_network(network, x, time, both), plain, atol=1e-4)
    same(call_network(network, x, time, texts[0]))
    copied = copy.deepcopy(network)  # an average of weights has a processor of its own
    with subtracting(processor, 0.5):
        same(call_network(copied, x, time, texts[0]))


def test_classes_become_tokens():
    network = ClassTokens(small_text_unet(), 3, WIDTH)
    processor = install_nasa(network)
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0])
    labels, others = torch.tensor([0, 2]), torch.tensor([1, 3])
    plain = network(x, time, labels)
    with subtracting(processor, 0.0):
        assert torch.equal(network(x, time, with_negative(labels, others)), plain)
    with subtracting(processor, 1.0):
        network(x, time, with_negative(labels, others)).sum().backward()
    assert (network.classes.weight.grad != 0).any(1).all()  # all four rows were seen


def test_a_negative_class_is_kept_away_from():
    """Classes at -1 and 1, and no class in between. The more is subtracted, the less of the negative class is made."""
    classes, n = 2, 512
    denoiser = make_attentive(3, classes, 2)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.01)
    for step in range(300):
        draws = Draws(step)
        labels = draws.integers(3, n)  # the third is no class: either
        of = torch.where(labels == 2, draws.integers(2, n), labels)
        x = (2.0 * of[:, None] - 1) + 0.2 * draws.normal((n, 2))
        loss = (denoiser(x + 2.5 * draws.normal((n, 2)), 2.5, labels) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    processor = install_nasa(denoiser.network)
    none, negative = torch.full((n,), 2), torch.zeros(n, dtype=torch.long)
    share = []
    with torch.no_grad():
        for scale in (0.0, 0.3, 0.6):
            with subtracting(processor, scale):
                made = denoiser(2.5 * Draws(0).normal((n, 2)), 2.5, with_negative(none, negative))
            share.append(float((made.mean(1) < 0).float().mean()))
    assert share[0] > share[1] > share[2]
    assert share[0] - share[2] > 0.2


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: install_nasa(ResidualMLP(4, 0, 8, 1)), "ResidualMLP has no cross-attention of diffusers"),
        (lambda: with_negative(torch.zeros(1), {"text": torch.zeros(1)}), "must both be text, or both class numbers"),
        (lambda: SNOOPI(make_attentive(1), make_attentive(0), [2.5], guidance_range=(4.0, 0.5)), "the smaller one"),
    ],
)
def test_mistakes_are_told(act, message):
    with pytest.raises(UsageError, match=message):
        act()
