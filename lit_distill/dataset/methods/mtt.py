"""MTT: some steps of training on synthetic images lead where experts come to by epochs on real ones."""

from dataclasses import replace
from itertools import chain, islice, repeat
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.reference import Reference
from lit_distill.dataset.data.subset import in_memory
from lit_distill.dataset.experts import ExpertBuffer, data_fingerprint
from lit_distill.dataset.losses import trajectory_distance
from lit_distill.dataset.synthesizer import DatasetSynthesizer
from lit_distill.dataset.synthetic import SyntheticSet
from lit_distill.dataset.unrolled import call_flat, check_parameters_only, unrolled_sgd

LEAST_STEP = 1e-6  # at 0 the images would have no gradient any more


class TrajectoryMatching(DatasetSynthesizer):
    r"""From an expert's parameters, training on synthetic images leads to where the expert comes to later.

    .. math:: L = \frac{\lVert \theta_N - \theta^*_{t+M} \rVert^2}{\lVert \theta^*_t - \theta^*_{t+M} \rVert^2}, \qquad
        \theta_0 = \theta^*_t, \quad
        \theta_{k+1} = \theta_k - \alpha \nabla_\theta \mathrm{CE}\big(f_{\theta_k}(A(\mathcal{S}_k))\big)

    Expert and start epoch t are drawn in each iteration. The batches S_k go through the synthetic images in a random
    order, and then again in another. Each image has random numbers of its own in the augmentation A, as in the public
    code. The step size alpha is learned with the images; students are trained on the set at that rate, and it is
    stored as the set's `lr`.

    The whitening (ZCA) with which the paper has most of its CIFAR results is left out.

    Args:
        student: The network of the experts, which is trained on the result, too.
        experts: Folder of a run of `ExpertTrajectories` on the same data.
        steps: N, steps on synthetic images.
        expert_epochs: M, epochs of the expert that they stand for.
        max_start: Start epochs are below this.
        synthetic_batch: Images in a step; None for all. "batch_syn" in the public code.
        step_size: alpha to begin with.
        step_size_lr: Learning rate of alpha; 0 leaves it as it is. The optimizer's own is that of the images.
        constant_memory: Keep the graph of one step at a time, see `unrolled_sgd`: the same gradient for more time.
        kwargs: See `DatasetSynthesizer`. `student_lr` has no effect.

    Attributes:
        step_size: The parameter alpha, kept positive.
    """

    reference = Reference(
        title="Dataset Distillation by Matching Training Trajectories",
        authors="Cazenavette, Wang, Torralba, Efros, Zhu",
        year=2022,
        arxiv="2203.11932",
    )

    def __init__(
        self,
        student: nn.Module,
        experts: str,
        steps: int = 30,
        expert_epochs: int = 2,
        max_start: int = 20,
        synthetic_batch: int | None = None,
        step_size: float = 0.01,
        step_size_lr: float = 1e-5,
        constant_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        check_least("model", 1, steps=steps, expert_epochs=expert_epochs, max_start=max_start)
        check_least("model", 1, synthetic_batch=synthetic_batch)
        if step_size <= 0:
            raise UsageError(f"model.step_size is {step_size}; it must be above 0 (usual: 0.01)")
        check_least("model", 0, step_size_lr=step_size_lr)
        self.experts = experts
        self.steps = steps
        self.expert_epochs = expert_epochs
        self.max_start = max_start
        self.synthetic_batch = synthetic_batch
        self.step_size = nn.Parameter(torch.tensor(step_size))
        self.step_size_lr = step_size_lr
        self.constant_memory = constant_memory

    def build(self) -> None:
        """Opens the experts, and checks that they are of this network, on these data, and long enough."""
        check_parameters_only(self.student)
        self._experts = ExpertBuffer.open(self.experts)
        self._experts.check(self.student, data_fingerprint(in_memory(self._data())))
        if self._experts.epochs < self.max_start - 1 + self.expert_epochs:
            raise UsageError(
                f"model.max_start, model.expert_epochs: the last start is epoch {self.max_start - 1}, and "
                f"{self.expert_epochs} more are wanted; the experts have {self._experts.epochs}, lower one of the two"
            )
        super().build()

    def configure_optimizers(self) -> Any:
        """One optimizer, in which images and step size have learning rates of their own."""
        return self.optimizer_with_schedule(self.parameter_groups(), self.optimizer)  # type: ignore[arg-type]  # groups are as good

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns what is learned, with the settings that differ from the optimizer's own."""
        return [{"params": [self.images]}, {"params": [self.step_size], "lr": self.step_size_lr}]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, and keeps alpha positive."""
        super().optimizer_step(*args, **kwargs)
        self.step_size.data.clamp_(min=LEAST_STEP)

    def on_fit_end(self) -> None:
        """As the base does; tells of a step size at which no student learns."""
        if float(self.step_size) <= 2 * LEAST_STEP:
            rank_zero_warn(
                f"model.step_size fell to its least, {LEAST_STEP:g}, at which students do not learn; lower "
                f"model.step_size_lr ({self.step_size_lr:g})"
            )
        super().on_fit_end()

    # ---- the loss --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Draws a segment of a trajectory, trains on synthetic images from its start, and compares the ends."""
        self.student.train()
        start, target = self.draw_segment()
        batches = [
            (self.images, self.targets(), index.to(self.device), self.augmentation.draw(len(index)))
            for index in self.draw_indices()
        ]
        reached = unrolled_sgd(self.step_loss, start, batches, self.step_size, constant_memory=self.constant_memory)
        return self.combine({"match": trajectory_distance(reached, start=start, target=target)})

    def start_epochs(self) -> range:
        """Returns the epochs to start at."""
        return range(self.max_start)

    def draw_segment(self) -> list[Float[Tensor, " p"]]:
        """Draws an expert and a start epoch; returns its parameters there, and M epochs later."""
        epochs = self.start_epochs()
        expert = int(torch.randint(len(self._experts), ()))
        first = epochs[int(torch.randint(len(epochs), ()))]
        return [row.to(self.device) for row in self._experts.read(expert, first, first + self.expert_epochs)]

    def draw_indices(self) -> list[Int[Tensor, " b"]]:
        """Draws which images each of the steps has: all of them once, in batches, before any is there again."""
        count = len(self.images)
        passes = (torch.randperm(count).split(self.synthetic_batch or count) for _ in repeat(None))
        return list(islice(chain.from_iterable(passes), self.steps))

    def targets(self) -> Tensor:
        """Returns the labels (n,), or the logits of soft ones (n, k)."""
        return self.labels

    def step_loss(
        self, parameters: Float[Tensor, " p"], images: Tensor, targets: Tensor, index: Tensor, draws: Tensor
    ) -> Float[Tensor, ""]:
        """Computes the cross-entropy of one step, from all images and the positions of those that the step has."""
        logits = call_flat(self.student, parameters, self.augmentation(images[index], draws))
        chosen = targets[index]
        return F.cross_entropy(logits.float(), chosen.softmax(1) if chosen.is_floating_point() else chosen)

    # ---- what comes out --------------------------------------------------------------------------------------------

    def distilled(self) -> SyntheticSet:
        """Returns the set as it is now, with the step size."""
        return replace(super().distilled(), lr=float(self.step_size.detach()))

    def on_test_epoch_end(self) -> None:
        """Logs `test/*`, with the step size."""
        super().on_test_epoch_end()
        self.log("test/step_size", self.step_size.detach())
