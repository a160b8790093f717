"""Born-again networks."""

from typing import Any, Literal

from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.reference import Reference
from lit_distill.core.schedules import Schedule
from lit_distill.image.distillation import ImageDistiller, Term
from lit_distill.image.losses.logits import ConfidenceWeighted, LogitKL, LogitLoss, PermutedKL


class BAN(ImageDistiller):
    r"""One generation: a student learns from a trained network of its own architecture, and then teaches the next.

    .. math:: L = \gamma \, \mathrm{CE}(y, z^s) + \alpha \, L_g, \qquad
        L_g = \mathrm{KL}(p^t \,\|\, p^s) \; (T = 1)

    Generations are stages of a recipe (configs/recipes/born_again.yaml); that student and teacher are alike is left to
    the configuration, and so is that their seeds differ. With the same seed the student starts where its teacher did,
    and becomes a copy of it.

    Two variants take the teacher's message apart. "cwtm" keeps how sure it is: the cross-entropy on labels, weighted
    by its largest probability. "dkpp" keeps all but which of the other classes it means: they are shuffled, anew at
    each step.

    Args:
        student: The classifier to train.
        teacher: The generation before, frozen.
        variant: "kl", "cwtm" or "dkpp".
        ban_weight: The alpha above.
        label_weight: The gamma above; 0 for the teacher alone, 1 for what the paper calls BAN+L.
        kwargs: See `ImageDistiller` and `Distiller`.
    """

    reference = Reference(
        title="Born-Again Neural Networks",
        authors="Furlanello, Lipton, Tschannen, Itti, Anandkumar",
        year=2018,
        arxiv="1805.04770",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        variant: Literal["kl", "cwtm", "dkpp"] = "kl",
        ban_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 0.0,
        **kwargs: Any,
    ) -> None:
        losses: dict[str, LogitLoss] = {"kl": LogitKL(1.0), "cwtm": ConfidenceWeighted(), "dkpp": PermutedKL()}
        if variant not in losses:
            raise UsageError(f"model.variant is '{variant}'; use {', '.join(losses)}")
        super().__init__(student, teacher, [Term(losses[variant], ban_weight)], label_weight, **kwargs)
