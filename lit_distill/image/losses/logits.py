"""Losses that compare logits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import Schedule, value_at
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss, Outputs, Shapes
from lit_distill.losses import forward_kl
from lit_distill.losses.logits import (
    confidence_weights,
    decoupled_kl,
    forward_kl_at,
    multi_level,
    pearson_relation,
    permute_other_classes,
    scale_gradient,
    standardize_logits,
    virtual_teacher_kl,
)


class LogitLoss(DistillationLoss):
    """Base of the losses that read nothing but logits.

    Args:
        standardize: Whether both networks' logits are standardized first (Sun et al., 2024, arXiv 2403.01427).
    """

    def __init__(self, standardize: bool = False) -> None:
        super().__init__()
        self.standardize = standardize

    def build(self, shapes: Shapes) -> None:
        """Checks that there are classes to compare."""
        if shapes.num_classes < 2:
            raise UsageError(
                f"data has {shapes.num_classes} class; {self.name} compares classes, so give data with 2 or more"
            )

    def logits(self, student: Outputs, teacher: Outputs) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """Returns both networks' logits, standardized if asked for."""
        if self.standardize:
            return standardize_logits(student.logits), standardize_logits(teacher.logits)
        return student.logits, teacher.logits


class LogitKL(LogitLoss):
    """T^2 KL(teacher || student) of the logits, see `lit_distill.losses.forward_kl`.

    Args:
        temperature: T, a number or a schedule over iterations.
        standardize: See `LogitLoss`.
    """

    name = "kd"

    def __init__(self, temperature: float | Schedule = 4.0, standardize: bool = False) -> None:
        super().__init__(standardize)
        _check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return forward_kl(*self.logits(student, teacher), temperature=value_at(self.temperature, iteration))


class DecoupledKL(LogitLoss):
    """Labeled class and other classes with weights of their own, see `lit_distill.losses.logits.decoupled_kl`.

    Args:
        temperature: T, a number or a schedule over iterations.
        alpha: Weight of the labeled class.
        beta: Weight of the other classes.
        standardize: See `LogitLoss`.
    """

    name = "dkd"

    def __init__(
        self,
        temperature: float | Schedule = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(standardize)
        _check_temperature(temperature)
        _check_weights(alpha=alpha, beta=beta)
        self.temperature, self.alpha, self.beta = temperature, alpha, beta

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        temperature = value_at(self.temperature, iteration)
        logits = self.logits(student, teacher)
        return decoupled_kl(*logits, batch.labels, temperature=temperature, alpha=self.alpha, beta=self.beta)


class PearsonRelation(LogitLoss):
    """Correlation of probabilities along classes and along samples, see `lit_distill.losses.logits.pearson_relation`.

    The samples are those of each process's own batch: under DDP they are not gathered.

    Args:
        temperature: tau, a number or a schedule over iterations.
        inter_weight: beta, of the relation between classes.
        intra_weight: gamma, of the relation within classes.
    """

    name = "dist"

    def __init__(
        self, temperature: float | Schedule = 4.0, inter_weight: float = 1.0, intra_weight: float = 1.0
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        _check_weights(inter_weight=inter_weight, intra_weight=intra_weight)
        self.temperature, self.inter_weight, self.intra_weight = temperature, inter_weight, intra_weight

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        if self.intra_weight and len(batch.labels) < 2:
            raise UsageError(
                f"data.batch_size: {self.name} relates the samples of a batch, and each process has 1; give 2 or more "
                "per process, or set intra_weight to 0"
            )
        return pearson_relation(
            *self.logits(student, teacher),
            temperature=value_at(self.temperature, iteration),
            inter_weight=self.inter_weight,
            intra_weight=self.intra_weight,
        )


class MultiLevel(LogitLoss):
    """Samples, batch and classes at several temperatures, see `lit_distill.losses.logits.multi_level`.

    The batch is each process's own: under DDP it is not gathered.

    Args:
        temperatures: The T summed over.
        unsure_only: Whether only samples and classes count of which the teacher is less sure than the median.
        standardize: See `LogitLoss`.
    """

    name = "mlkd"

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        unsure_only: bool = False,
        standardize: bool = False,
    ) -> None:
        super().__init__(standardize)
        if not temperatures:
            raise UsageError("temperatures is empty; give at least one (published: [2, 3, 4, 5, 6])")
        for temperature in temperatures:
            _check_temperature(temperature)
        self.temperatures, self.unsure_only = tuple(temperatures), unsure_only

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        logits = self.logits(student, teacher)
        return multi_level(*logits, temperatures=self.temperatures, unsure_only=self.unsure_only)


class CurriculumTemperature(LogitLoss):
    r"""T^2 KL at a temperature that is learned against the student.

    .. math:: T = T_0 + R \, \mathrm{sigmoid}(\theta)

    The gradient that reaches theta is multiplied by `reversal`: at -1 the optimizer that lowers the loss for the
    student raises it for theta, at 0 theta stays. Theta is trained with all else, weight decay included.

    Args:
        minimum: T_0, below which T never falls.
        span: R; T stays below T_0 + R.
        reversal: Factor of theta's gradient, a number or a schedule over iterations; 0 to -1 in the paper.
        per_sample: Whether theta is not one number but a function of both networks' logits, a small perceptron. The
            logits are constants there, so that the student sees the loss and not the way to its temperature.
        standardize: See `LogitLoss`.
    """

    name = "ctkd"

    def __init__(
        self,
        minimum: float = 1.0,
        span: float = 20.0,
        reversal: float | Schedule = -1.0,
        per_sample: bool = False,
        standardize: bool = False,
    ) -> None:
        super().__init__(standardize)
        for name, value in {"minimum": minimum, "span": span}.items():
            if value <= 0:
                raise UsageError(f"{name} is {value}; it must be above 0, since temperatures are (usual: 1 and 20)")
        self.minimum, self.span, self.reversal, self.per_sample = minimum, span, reversal, per_sample
        if not per_sample:
            self.theta = nn.Parameter(torch.ones(1))  # (1,) and not a scalar, which FSDP2 cannot shard

    def build(self, shapes: Shapes) -> None:
        """Makes the perceptron of the per-sample form."""
        super().build(shapes)
        if self.per_sample:
            classes = shapes.num_classes
            last = nn.Linear(classes, 1)
            nn.init.ones_(last.bias)  # begins near the one temperature of the other form
            self.network = nn.Sequential(nn.Linear(2 * classes, classes), nn.ReLU(), last)

    def temperature(self, student_logits: Tensor, teacher_logits: Tensor, reversal: float) -> Float[Tensor, "#b"]:
        """Returns the current temperature, one for all or one per sample."""
        if self.per_sample:
            both = torch.cat([student_logits, teacher_logits], dim=1).detach().float()
            theta = self.network(both).squeeze(1).float()
        else:
            theta = self.theta.float()
        return self.minimum + self.span * scale_gradient(theta, reversal).sigmoid()

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        logits = self.logits(student, teacher)
        return forward_kl_at(*logits, self.temperature(*logits, value_at(self.reversal, iteration)))


class VirtualTeacher(LogitLoss):
    """Divergence from a teacher made by hand, see `lit_distill.losses.logits.virtual_teacher_kl`.

    Args:
        correct_probability: a, what the teacher gives the labeled class before softening.
        temperature: T, a number or a schedule over iterations.
    """

    name = "tfkd"
    teacher_free = True

    def __init__(self, correct_probability: float = 0.99, temperature: float | Schedule = 20.0) -> None:
        super().__init__()
        if not 0 < correct_probability <= 1:
            raise UsageError(
                f"correct_probability is {correct_probability}; it must be above 0 and at most 1 (usual: 0.9 to 0.99)"
            )
        _check_temperature(temperature)
        self.correct_probability, self.temperature = correct_probability, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return virtual_teacher_kl(
            student.logits,
            batch.labels,
            correct_probability=self.correct_probability,
            temperature=value_at(self.temperature, iteration),
        )


class ConfidenceWeighted(LogitLoss):
    """Cross-entropy on labels, each sample weighted by how sure the teacher is (CWTM), of whatever class."""

    name = "cwtm"

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        values = F.cross_entropy(student.logits.float(), batch.labels, reduction="none")
        return (confidence_weights(teacher.logits) * values).mean()


class PermutedKL(LogitLoss):
    """KL from the teacher's probabilities, those of all but its first choice shuffled anew at each step (DKPP)."""

    name = "dkpp"

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        return forward_kl(student.logits, permute_other_classes(teacher.logits))


def _check_temperature(temperature: float | Schedule) -> None:
    if not isinstance(temperature, Schedule) and temperature <= 0:
        raise UsageError(f"temperature is {temperature}; it must be above 0 (usual: 1 to 8)")


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        if value < 0:
            raise UsageError(f"{name} is {value}; a weight must be 0 or more (0 leaves its part out)")
