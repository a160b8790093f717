"""Exits: classifiers that branch off at the stages of a student while it is trained, and the losses that teach them."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.projectors import token_grid
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes, penultimate, stages
from lit_distill.image.models.layers import GlobalPool
from lit_distill.losses import forward_kl
from lit_distill.losses.exits import one_for_all, squared_distance

LARGEST_GRID = 7
HEADS = 4


class ExitBranch(nn.Module):
    """A classifier at one stage of a student.

    Args:
        trunk: Carries the stage's feature to a vector (B, D).
        width: D.
        num_classes: K.
    """

    def __init__(self, trunk: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, feature: Float[Tensor, "b *shape"]) -> Float[Tensor, "b k"]:
        """Computes logits."""
        return self.head(self.trunk(feature))


def conv_exit(shape: tuple[int, int, int], depth: int, width: int, num_classes: int) -> ExitBranch:
    """Builds the exit of a stage that returns maps.

    A chain of `depth` separable convolution blocks, each of which halves the grid and doubles the channels, but for the
    last, which has `width`; at the last stage (`depth` 0) a 1x1 convolution to `width`. Then the mean over pixels.

    Args:
        shape: (C, H, W) of the stage's feature.
        depth: Number of stages that follow.
        width: Width of the vector that is classified.
        num_classes: K.
    """
    channels = shape[0]
    widths = [channels * 2**block for block in range(depth)] + [width]
    blocks: list[nn.Module] = [_separable(*pair) for pair in pairwise(widths)]
    return ExitBranch(nn.Sequential(*(blocks or [nn.Conv2d(channels, width, 1)]), GlobalPool()), width, num_classes)


def token_exit(shape: tuple[int, int], depth: int, width: int, num_classes: int) -> ExitBranch:
    """Builds the exit of a stage that returns tokens.

    Patches are merged, 2x2 into one, as long as the grid stays 7x7 or larger; grids below 14x14, such as those of small
    images, are left as they are, and so are those with an odd number of rows. Class tokens are not merged. Then come
    `max(depth, 1)` transformer blocks with four heads. The class token is classified, or the mean of all tokens where
    there is none.

    Args:
        shape: (L, D) of the stage's feature, see `token_grid` for how class tokens are told from patches.
        depth: Number of stages that follow.
        width: Width of the tokens after merging. Where nothing is merged, and beside class tokens, it stays D.
        num_classes: K.

    Raises:
        UsageError: The tokens are not a square grid, or their width is not a multiple of four.
    """
    from timm.models.vision_transformer import Block  # here: the import takes seconds

    grid, class_tokens = token_grid(shape[0])
    channels, merges = shape[1], 0
    while grid % 2 == 0 and grid // 2 >= LARGEST_GRID:
        grid, merges = grid // 2, merges + 1
    width = width if merges and not class_tokens else channels
    if width % HEADS:
        raise UsageError(f"exit: tokens of width {width} cannot be split over {HEADS} heads; use a multiple of {HEADS}")
    layers: list[nn.Module] = []
    for merge in range(merges):
        # The last of several merges is linear.
        activation = nn.GELU() if merge == 0 or merge < merges - 1 else nn.Identity()
        layers += [PatchMerging(channels if merge == 0 else width, width, class_tokens, activation)]
    layers += [Block(width, num_heads=HEADS) for _ in range(max(depth, 1))]
    return ExitBranch(nn.Sequential(*layers, TokenPool(class_tokens)), width, num_classes)


def exit_branch(tap: str, shape: tuple[int, ...], depth: int, width: int, num_classes: int) -> ExitBranch:
    """Builds the exit that suits a stage's feature: `conv_exit` for maps, `token_exit` for tokens.

    Raises:
        UsageError: The feature is neither.
    """
    if len(shape) == 3:
        return conv_exit((shape[0], shape[1], shape[2]), depth, width, num_classes)
    if len(shape) == 2:
        return token_exit((shape[0], shape[1]), depth, width, num_classes)
    raise UsageError(f"exit: tap '{tap}' has shape {shape}; tap modules that return maps (C, H, W) or tokens (L, D)")


class PatchMerging(nn.Module):
    """Joins each 2x2 patches to one: LayerNorm over the four, then a linear map.

    Args:
        in_width: Width of a token before.
        out_width: Width after.
        class_tokens: Number of first tokens that are left alone.
        activation: What comes last.

    Reference: Liu et al., Swin Transformer, 2021, arXiv 2103.14030.
    """

    def __init__(self, in_width: int, out_width: int, class_tokens: int, activation: nn.Module) -> None:
        super().__init__()
        self.class_tokens = class_tokens
        self.norm = nn.LayerNorm(4 * in_width)
        self.reduction = nn.Linear(4 * in_width, out_width, bias=False)
        self.activation = activation

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b m e"]:
        """Merges."""
        first, patches = tokens[:, : self.class_tokens], tokens[:, self.class_tokens :]
        half = math.isqrt(patches.shape[1]) // 2
        # (b, i, row, j, column, d): the order of the four is (row, column) = 00, 10, 01, 11, as in Swin.
        grid = patches.unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 4, 2, 5)
        merged = self.activation(self.reduction(self.norm(grid.flatten(3).flatten(1, 2))))
        return torch.cat([first, merged], dim=1) if self.class_tokens else merged


class TokenPool(nn.Module):
    """The first class token, or the mean of all tokens where there is none."""

    def __init__(self, class_tokens: int) -> None:
        super().__init__()
        self.class_tokens = class_tokens

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        """Pools."""
        return tokens[:, 0] if self.class_tokens else tokens.mean(1)


class OneForAllLogits(DistillationLoss):
    """The student's own logits against the teacher's, see `lit_distill.losses.exits.one_for_all`.

    Args:
        exponent: Exponent of the targets, 1 or more.
        temperature: T.
    """

    name = "ofa_logits"

    def __init__(self, exponent: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        _check_exponent(exponent)
        _check_temperature(temperature)
        self.exponent = exponent
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return one_for_all(
            student.logits, teacher.logits, batch.labels, exponent=self.exponent, temperature=self.temperature
        )


class OneForAll(DistillationLoss):
    """Sum over exits of the student against the teacher's logits, see `lit_distill.losses.exits.one_for_all`.

    The exits are part of the loss, not of the student: trained with it, and left behind when it is exported. They are
    as wide as the wider of the two networks.

    Args:
        student_taps: Module names in the student, shallow to deep; its stages if None.
        teacher_tap: The teacher's embedding, of which only the width is asked; what it calls `penultimate` if None.
        exponent: Exponent of the targets, 1 or more.
        temperature: T.
    """

    name = "ofa"

    def __init__(
        self,
        student_taps: Sequence[str] | None = None,
        teacher_tap: str | None = None,
        exponent: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_taps or (), [teacher_tap] if teacher_tap else [])
        _check_exponent(exponent)
        _check_temperature(temperature)
        self.exponent = exponent
        self.temperature = temperature
        self.exits = nn.ModuleList()

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes stages and embedding where no taps were given."""
        self.student_taps = self.student_taps or stages(student)
        self.teacher_taps = self.teacher_taps or (penultimate(teacher),)

    def build(self, shapes: Shapes) -> None:
        """Makes the exits."""
        deepest = shapes.student[self.student_taps[-1]]
        own = deepest[0] if len(deepest) == 3 else deepest[-1]
        # Maps are as wide as the wider network, tokens as the student.
        width = max(own, shapes.teacher[self.teacher_taps[0]][-1]) if len(deepest) == 3 else own
        for place, tap in enumerate(self.student_taps, start=1):
            depth = len(self.student_taps) - place
            self.exits.append(exit_branch(tap, shapes.student[tap], depth, width, shapes.num_classes))

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        values = [
            one_for_all(
                branch(student.features[tap]),
                teacher.logits,
                batch.labels,
                exponent=self.exponent,
                temperature=self.temperature,
            )
            for tap, branch in zip(self.student_taps, self.exits, strict=True)
        ]
        return torch.stack(values).sum()


class SelfDistillation(DistillationLoss):
    r"""Exits of the student learn from labels and from its own deepest classifier.

    .. math:: \sum_i (1 - \alpha) \, \mathrm{CE}(y, z_i) + \alpha \, \mathrm{KL}(p_C(T) \,\|\, p_i(T))
        + \lambda \lVert F_i - F_C \rVert_2^2

    The deepest classifier C is the student's own head, F_C what that reads; to the exits both are constants. The exits
    are part of the loss: left behind when the student is exported. There is no factor T^2, as in the authors' later
    code. The paper does not say how its bottlenecks are built; these are the `conv_exit` of that later code (Zhang,
    Bao, Ma, 2021), which end as wide as F_C, or `token_exit`.

    Args:
        student_taps: Module names in the student, shallow to deep; all its stages but the last if None.
        embedding_tap: What the student's head reads, (B, D); what it calls `penultimate` if None.
        distillation_weight: alpha, 0 to 1.
        feature_weight: lambda.
        temperature: T.
    """

    name = "byot"
    teacher_free = True

    def __init__(
        self,
        student_taps: Sequence[str] | None = None,
        embedding_tap: str | None = None,
        distillation_weight: float = 0.3,
        feature_weight: float = 1e-4,
        temperature: float = 3.0,
    ) -> None:
        super().__init__()
        if not 0 <= distillation_weight <= 1:
            raise UsageError(f"distillation_weight is {distillation_weight}; it must be 0 to 1 (labels get the rest)")
        _check_temperature(temperature)
        self.exit_taps = tuple(student_taps or ())
        self.embedding_tap = embedding_tap
        self.distillation_weight = distillation_weight
        self.feature_weight = feature_weight
        self.temperature = temperature
        self.exits = nn.ModuleList()

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes stages and embedding where no taps were given."""
        self.exit_taps = self.exit_taps or stages(student)[:-1]
        if not self.exit_taps:
            raise UsageError(f"byot: {type(student).__name__} has one stage and no shallower one; give student_taps")
        self.embedding_tap = self.embedding_tap or penultimate(student)
        self.student_taps = (*self.exit_taps, self.embedding_tap)

    def build(self, shapes: Shapes) -> None:
        """Makes the exits."""
        width = shapes.student[self.student_taps[-1]][-1]
        for place, tap in enumerate(self.exit_taps):
            depth = len(self.exit_taps) - place
            branch = exit_branch(tap, shapes.student[tap], depth, width, shapes.num_classes)
            if branch.head.in_features != width:
                raise UsageError(
                    f"byot: an exit at tap '{tap}' is {branch.head.in_features} wide, the student's embedding {width}; "
                    "tap tokens as wide as the embedding"
                )
            self.exits.append(branch)

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        alpha, deepest = self.distillation_weight, teacher.features[self.student_taps[-1]]
        values = []
        branches = [branch for branch in self.exits if isinstance(branch, ExitBranch)]
        for tap, branch in zip(self.exit_taps, branches, strict=True):
            feature = branch.trunk(student.features[tap])
            logits = branch.head(feature)
            labels = F.cross_entropy(logits.float(), batch.labels)
            own = forward_kl(logits, teacher.logits, temperature=self.temperature, scale_by_t2=False)
            hint = squared_distance(feature, deepest)
            values.append((1 - alpha) * labels + alpha * own + self.feature_weight * hint)
        return torch.stack(values).sum()


def _separable(in_channels: int, out_channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels, stride in ((in_channels, 2), (out_channels, 1)):
        layers += [
            nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def _check_exponent(exponent: float) -> None:
    if exponent < 1:
        raise UsageError(f"exponent is {exponent}; it must be 1 or more (usual: 1 to 1.5)")


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise UsageError(f"temperature is {temperature}; it must be above 0 (usual: 1 to 8)")
