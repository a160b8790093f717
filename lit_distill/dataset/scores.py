"""Scores of distilled sets that account for what labels and augmentation alone would give."""

import math


def label_robust_score(*, hard_label_recovery: float, improvement_over_random: float, weight: float = 0.5) -> float:
    r"""Computes the label-robust score (LRS): what is better than random images, less what is worse than real data.

    .. math:: \mathrm{LRS} = \frac{e^{a} - e^{-1}}{e - e^{-1}}, \qquad a = w \, \mathrm{IOR} - (1 - w) \, \mathrm{HLR}

    1 is the best, 0 the worst there can be; 0.269 means as good as real data under hard labels and no better than
    random images under the method's own. The public code feeds percent into the exponential; here shares are wanted.

    Args:
        hard_label_recovery: HLR, the accuracy with all real data less that with the set under hard labels; a share.
        improvement_over_random: IOR, the accuracy with the set under its own labels and recipe less that with as many
            random images under the same labels and recipe; a share.
        weight: w.

    Raises:
        ValueError: A difference of shares lies outside [-1, 1], as percent would.

    Reference: Li et al., DD-Ranking: Rethinking the Evaluation of Dataset Distillation, 2025, arXiv 2505.13300.
    """
    _check(hard_label_recovery, improvement_over_random)
    return _to_unit(weight * improvement_over_random - (1 - weight) * hard_label_recovery)


def augmentation_robust_score(*, with_augmentation: float, without_augmentation: float, weight: float = 0.5) -> float:
    r"""Computes the augmentation-robust score (ARS), from the gain over random images with and without augmentation.

    .. math:: \mathrm{ARS} = \frac{e^{b} - e^{-1}}{e - e^{-1}}, \qquad b = g \, \Delta_{aug} + (1 - g) \, \Delta_{none}

    Args:
        with_augmentation: Accuracy with the set less that with as many random images, both augmented; a share.
        without_augmentation: The same, neither augmented.
        weight: g.

    Raises:
        ValueError: A difference of shares lies outside [-1, 1].

    Reference: Li et al., DD-Ranking: Rethinking the Evaluation of Dataset Distillation, 2025, arXiv 2505.13300.
    """
    _check(with_augmentation, without_augmentation)
    return _to_unit(weight * with_augmentation + (1 - weight) * without_augmentation)


def _to_unit(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


def _check(*differences: float) -> None:
    for value in differences:
        if not -1 <= value <= 1:
            raise ValueError(f"{value} is no difference of shares; give accuracies from 0 to 1, not percent")
