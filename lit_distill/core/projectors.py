"""Projectors: small trained networks that carry a student's feature into the teacher's shape.

Shapes come from `core.taps.probe`, never from a table.
"""

from collections.abc import Sequence

from torch import nn

from lit_distill.core.errors import UsageError


def hint_regressor(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """Builds the regressor of FitNets for two feature shapes.

    Maps (C, H, W): a convolution that also brings the grid to the teacher's size, then BatchNorm and ReLU, as is common
    in later comparisons: kernel `1 + H_s - H_t` where the student's grid is equal or larger, 3x3 with stride 2 where it
    is twice as large, transposed 4x4 with stride 2 where it is half as large. Vectors and tokens (..., D): a linear
    map.

    Args:
        student_shape: Shape of the student's feature without the batch dimension.
        teacher_shape: The teacher's.

    Raises:
        UsageError: No regressor leads from one shape to the other.

    Reference: Romero et al., FitNets: Hints for Thin Deep Nets, 2015, arXiv 1412.6550.
    """
    student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
    if len(student_shape) == len(teacher_shape) == 3:
        (c_s, h_s, w_s), (c_t, h_t, w_t) = student_shape, teacher_shape
        conv: nn.Module | None = None
        if (h_s, w_s) == (2 * h_t, 2 * w_t):
            conv = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
        elif (2 * h_s, 2 * w_s) == (h_t, w_t):
            conv = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
        elif h_s >= h_t and w_s >= w_t:
            conv = nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t))
        if conv is not None:
            return nn.Sequential(conv, nn.BatchNorm2d(c_t), nn.ReLU())
    elif len(student_shape) == len(teacher_shape) and student_shape[:-1] == teacher_shape[:-1]:
        return nn.Linear(student_shape[-1], teacher_shape[-1])
    raise UsageError(
        f"no projector leads from a student feature of shape {student_shape} to a teacher feature of shape "
        f"{teacher_shape}; tap modules with equal rank and a student grid at least half the teacher's"
    )
