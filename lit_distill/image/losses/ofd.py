"""Overhaul of feature distillation."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_distill.core.errors import UsageError
from lit_distill.core.projectors import connector
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs, Shapes, pre_activations
from lit_distill.image.losses.pairs import PairedMaps
from lit_distill.losses.maps import expected_negative, margin_relu, partial_l2


class FeatureOverhaul(PairedMaps):
    """Partial distance to the teacher after a margin ReLU, see `lit_distill.losses.maps.partial_l2`.

    The deepest tap counts 1, the one before 1/2, then 1/4. Connectors of a convolution and BatchNorm carry the
    student's maps into the teacher's shape; they are trained with it.

    The margin of a channel is the expected negative value of a Gaussian with bias and |weight| of the teacher's
    BatchNorm before the tap. Before the sum of a residual block it is the block's last one, as in the public code,
    although the shortcut adds to that sum. The teacher runs in eval mode, on its running statistics; other public code
    lets it run on those of the batch.

    Args:
        student_taps: Module names in the student, shallow to deep, before activations; what it names if None.
        teacher_taps: As many in the teacher; what it names if None.
        teacher_norms: Module names of the BatchNorm for each teacher tap; found by the order of modules if None.
        margins: A margin for all channels of each teacher tap, for teachers without BatchNorm; from the norms if None.
    """

    name = "ofd"

    def __init__(
        self,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        teacher_norms: Sequence[str] | None = None,
        margins: Sequence[float] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.teacher_norms = tuple(teacher_norms or ())
        self.margins = tuple(margins or ())
        self.connectors = nn.ModuleList()
        self._gaussians: list[tuple[Tensor, Tensor]] = []

    def default_taps(self, network: nn.Module) -> tuple[str, ...]:
        """Returns a network's stages before their activations."""
        return pre_activations(network)

    def resolve(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes the default taps where none were given, and finds the teacher's BatchNorms."""
        super().resolve(student, teacher)
        for key, given in (("teacher_norms", self.teacher_norms), ("margins", self.margins)):
            if given and len(given) != len(self.teacher_taps):
                raise UsageError(
                    f"ofd: {len(given)} {key} and {len(self.teacher_taps)} teacher taps; give one for each"
                )
        if not self.margins:
            norms = self.teacher_norms or [_norm_before(teacher, tap) for tap in self.teacher_taps]
            self._gaussians = [_gaussian(teacher, norm) for norm in norms]

    def build(self, shapes: Shapes) -> None:
        """Makes the connectors, and the margins from the teacher's norms."""
        pairs = self.pairs_of_shapes(shapes)
        self.connectors.extend(connector(student, teacher) for student, teacher in pairs)
        for stage, (_, (channels, *_)) in enumerate(pairs):
            if self.margins:
                margin = torch.full((channels,), float(self.margins[stage]))
            else:
                bias, weight = self._gaussians[stage]
                if len(bias) != channels:
                    raise UsageError(
                        f"ofd: the BatchNorm for teacher tap '{self.teacher_taps[stage]}' has {len(bias)} channels, "
                        f"the tap {channels}; name the right modules in teacher_norms"
                    )
                margin = expected_negative(bias, weight)
            # Not in checkpoints: it comes from the teacher, as the teacher does from its own source.
            self.register_buffer(f"margin{stage}", margin, persistent=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: ImageBatch, iteration: int) -> Float[Tensor, ""]:
        """Returns the loss of a batch."""
        values = []
        for stage, (own, target) in enumerate(self.pairs(student, teacher)):
            target = margin_relu(target, self.get_buffer(f"margin{stage}"))
            values.append(partial_l2(self.connectors[stage](own), target))
        return torch.stack([value / 2**depth for depth, value in enumerate(reversed(values))]).sum()


def _norm_before(network: nn.Module, tap: str) -> str:
    """Finds the BatchNorm that made a tap, by the order in which modules are registered.

    Before an activation: the last BatchNorm beside it in the same block, else the last inside what stands beside it;
    not one of a shortcut, which a block registers after its own. An activation that runs several times (`relu:1`)
    follows as many BatchNorms. Of a module's output: its last BatchNorm.
    """
    location, at, _ = tap.partition("@")
    path, _, run = location.partition(":")
    parent, _, child = path.rpartition(".") if at else (path, "", "")
    block = network.get_submodule(parent)
    beside = list(block.named_children())
    names = [name for name, _ in beside]
    # A shared activation stands where it was made, not where it runs.
    before = beside if run or not at else beside[: names.index(child)]
    norms = [name for name, module in before if isinstance(module, _BatchNorm)]
    if isinstance(block, _BatchNorm):
        return parent
    if not norms:
        run = ""
        norms = [
            f"{name}.{inner}"
            for name, module in before
            for inner, part in module.named_modules()
            if inner and isinstance(part, _BatchNorm)
        ]
    index = int(run or -1)
    if not -len(norms) <= index < len(norms):
        raise UsageError(
            f"ofd: no BatchNorm was found before teacher tap '{tap}', so its margin is unknown; name the modules in "
            "teacher_norms, or for a teacher without BatchNorm give margins, its mean negative value at each tap"
        )
    return f"{parent}.{norms[index]}" if parent else norms[index]


def _gaussian(network: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    module = dict(network.named_modules()).get(name)
    bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
    if not isinstance(module, _BatchNorm) or bias is None or weight is None:
        kind = "not there" if module is None else f"{type(module).__name__} without weights of its own"
        raise UsageError(f"ofd: teacher_norms: '{name}' is {kind}; name BatchNorm modules with weight and bias")
    return bias.detach().clone(), weight.detach().clone()
