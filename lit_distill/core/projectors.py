"""Projectors: small trained networks that carry a student's feature into the teacher's shape.

Shapes come from `core.taps.probe`, never from a table.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill.core.errors import UsageError


def hint_regressor(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """Builds the regressor of FitNets for two feature shapes.

    Maps (C, H, W): a convolution that also brings the grid to the teacher's size, then BatchNorm and ReLU, as is common
    in later comparisons: kernel `1 + H_s - H_t` where the student's grid is equal or larger, 3x3 with stride 2 where it
    is twice as large, transposed 4x4 with stride 2 where it is half as large. Vectors and tokens (..., D): a linear
    map.

    Between tokens (L, D) and maps the patches are laid out as the grid they come from, see `token_grid`. Class tokens
    of the student are left out. Towards tokens there is neither BatchNorm nor ReLU, since tokens are not rectified.

    Args:
        student_shape: Shape of the student's feature without the batch dimension.
        teacher_shape: The teacher's.

    Raises:
        UsageError: No regressor leads from one shape to the other.

    Reference: Romero et al., FitNets: Hints for Thin Deep Nets, 2015, arXiv 1412.6550.
    """
    student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
    if len(student_shape) == len(teacher_shape) == 3:
        if (conv := _to_grid(student_shape, teacher_shape, bias=True)) is not None:
            return nn.Sequential(conv, nn.BatchNorm2d(teacher_shape[0]), nn.ReLU())
    elif (len(student_shape), len(teacher_shape)) == (2, 3):
        grid, _ = token_grid(student_shape[0])
        return nn.Sequential(TokensToMap(), hint_regressor((student_shape[1], grid, grid), teacher_shape))
    elif (len(student_shape), len(teacher_shape)) == (3, 2):
        grid, class_tokens = token_grid(teacher_shape[0])
        conv = _to_grid(student_shape, (teacher_shape[1], grid, grid), bias=True)
        if conv is not None and not class_tokens:
            return nn.Sequential(conv, MapToTokens())
    elif len(student_shape) == len(teacher_shape) and student_shape[:-1] == teacher_shape[:-1]:
        return nn.Linear(student_shape[-1], teacher_shape[-1])
    raise _no_way(student_shape, teacher_shape)


def token_grid(tokens: int) -> tuple[int, int]:
    """Tells patches from class tokens: the largest square is the patches, what is left over comes before them.

    Args:
        tokens: Number of tokens, L.

    Returns:
        Rows (and columns) of the grid of patches, and the number of class tokens: 0, 1 or 2.

    Raises:
        UsageError: More than two tokens are left over, so that the patches are no square grid.
    """
    grid = math.isqrt(tokens)
    if grid == 0 or tokens - grid**2 > 2:
        raise UsageError(
            f"{tokens} tokens are not a square grid of patches with up to two class tokens; tap a module that returns "
            "such tokens, or maps"
        )
    return grid, tokens - grid**2


class TokensToMap(nn.Module):
    """Lays tokens (B, L, D) out as a map (B, D, H, W); class tokens are left out."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Lays out."""
        grid, class_tokens = token_grid(tokens.shape[1])
        return tokens[:, class_tokens:].transpose(1, 2).unflatten(2, (grid, grid))


class MapToTokens(nn.Module):
    """Lines the pixels of a map (B, D, H, W) up as tokens (B, HW, D), row by row."""

    def forward(self, feature: Tensor) -> Tensor:
        """Lines up."""
        return feature.flatten(2).transpose(1, 2)


def connector(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """Builds a 1x1 convolution and BatchNorm, without activation: what is matched are values before a ReLU.

    Where the grids differ, the convolution also brings the student's to the teacher's size, see `hint_regressor`.

    Args:
        student_shape: (C_s, H_s, W_s) of the student's feature.
        teacher_shape: (C_t, H_t, W_t) of the teacher's.

    Raises:
        UsageError: No connector leads from one shape to the other.

    Reference: Heo et al., 2018, arXiv 1811.03233, and 2019, arXiv 1904.01866; weights normal with variance 2 / fan-out,
    as in their public code.
    """
    student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
    conv = _to_grid(student_shape, teacher_shape, bias=False) if len(student_shape) == len(teacher_shape) == 3 else None
    if conv is None:
        raise _no_way(student_shape, teacher_shape)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(teacher_shape[0]))


def variational_regressor(in_channels: int, out_channels: int) -> nn.Module:
    """Builds the mean of the variational distribution of VID: three 1x1 convolutions, ReLU between them.

    Args:
        in_channels: Channels of the student's map.
        out_channels: Channels of the teacher's map, and of the layers between.

    Reference: Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019, arXiv 1904.05835.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 1, bias=False),
    )


class AttentionFusion(nn.Module):
    """Attention based fusion of knowledge review (ABF): a student map joined with what was fused from deeper levels.

    The student map goes through a 1x1 convolution to `mid_channels`; the deeper result is resized to its grid; two
    attention maps, a sigmoid of a 1x1 convolution over both, weigh their sum. That, resized to the teacher's grid, is
    handed on to the next level, and through a 3x3 convolution becomes the map that is compared with the teacher's.

    Args:
        in_channels: Channels of the student's map.
        mid_channels: Channels of what is handed on; the same on all levels.
        teacher_shape: (C_t, H_t, W_t).
        fuse: Whether there is a deeper level.

    Reference: Chen, Liu, Zhao, Jia, Distilling Knowledge via Knowledge Review, 2021, arXiv 2104.09044.
    """

    def __init__(self, in_channels: int, mid_channels: int, teacher_shape: tuple[int, int, int], fuse: bool) -> None:
        super().__init__()
        channels, *self.grid = teacher_shape
        first = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        last = nn.Conv2d(mid_channels, channels, 3, padding=1, bias=False)
        self.inner = nn.Sequential(first, nn.BatchNorm2d(mid_channels))
        self.outer = nn.Sequential(last, nn.BatchNorm2d(channels))
        self.attention = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in (first, last):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fuses.

        Args:
            feature: The student's map (B, C_s, H, W).
            deeper: What the next deeper level handed on, (B, mid, h, w), if there is one.

        Returns:
            The map to compare (B, C_t, H_t, W_t), and what is handed on, (B, mid, H_t, W_t).
        """
        fused = self.inner(feature)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[-2:], mode="nearest")
            own, others = self.attention(torch.cat([fused, deeper], dim=1)).split(1, dim=1)
            fused = fused * own + deeper * others
        fused = F.interpolate(fused, self.grid, mode="nearest")
        return self.outer(fused), fused


def _to_grid(student: tuple[int, ...], teacher: tuple[int, ...], bias: bool) -> nn.Conv2d | nn.ConvTranspose2d | None:
    (c_s, h_s, w_s), (c_t, h_t, w_t) = student, teacher
    if (h_s, w_s) == (2 * h_t, 2 * w_t):
        return nn.Conv2d(c_s, c_t, 3, stride=2, padding=1, bias=bias)
    if (2 * h_s, 2 * w_s) == (h_t, w_t):
        return nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1, bias=bias)
    if h_s >= h_t and w_s >= w_t:
        return nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t), bias=bias)
    return None


def _no_way(student: tuple[int, ...], teacher: tuple[int, ...]) -> UsageError:
    return UsageError(
        f"no projector leads from a student feature of shape {student} to a teacher feature of shape {teacher}; "
        "tap modules with equal rank and a student grid at least half the teacher's"
    )
