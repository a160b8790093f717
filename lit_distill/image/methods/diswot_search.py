"""DisWOT: the search for a student, without training one."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.core.files import atomic_path, write_json, write_text
from lit_distill.core.loading import derived_seed
from lit_distill.core.networks import CONFIG_FILE, WEIGHTS_FILE
from lit_distill.core.reference import Reference
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import DistillationLoss
from lit_distill.image.losses.diswot import RelationSimilarity, SemanticSimilarity
from lit_distill.image.search.evolution import (
    AgingEvolution,
    Algorithm,
    Budget,
    Candidate,
    Combine,
    fitness,
    propose_within,
)
from lit_distill.image.search.proxies import Init, TrainingFreeScores, seeded, size
from lit_distill.image.search.space import SearchSpace


class DisWOTSearch(LightningModule):
    r"""Finds the student that is most like the teacher while both are random: `fit` is the search.

    .. math:: \alpha^* = \arg\min_\alpha \; M_s(T, S_\alpha) + M_r(T, S_\alpha)

    A step scores one candidate. All candidates are scored on the first batch, against the same random teachers. No
    network is trained, so there is no optimizer; the search ends after `evaluations` candidates, whatever
    `trainer.max_epochs` says. What a step does depends on the seed and on the candidates before it, and these are in
    the checkpoint: a search that was killed goes on to the same winner.

    The run folder gets `winner.yaml`, a configuration with the winner as the student; `candidates.json`, all scores;
    and `student/`, the winner at random initialization.

    Args:
        teacher: Builds the teacher's architecture; in YAML a class path as for any network. Its weights do not count.
        space: What there is to choose from.
        algorithm: How the next candidate is proposed; `AgingEvolution` with the constants of the public code if None.
        proxies: Losses whose negative is the score; the semantic and the relation metric if None.
        combine: How several scores become one: "sum", as in the paper, where the semantic term decides since its spread
            is larger; or "rank", the average of ranks among the candidates.
        budget: Limits of the student; none if None.
        evaluations: Candidates to score. One that comes again counts, and costs nothing.
        seeds: Random initializations that a score is averaged over.
        init: Initialization of all networks: their "own", or "normal", N(0, 1) as in the public code.
    """

    reference = Reference(
        title="DisWOT: Student Architecture Search for Distillation WithOut Training",
        authors="Dong, Li, Wei",
        year=2023,
        arxiv="2303.15678",
    )

    def __init__(
        self,
        teacher: Callable[[], nn.Module],
        space: SearchSpace,
        algorithm: Algorithm | None = None,
        proxies: Sequence[DistillationLoss] | None = None,
        combine: Combine = "sum",
        budget: Budget | None = None,
        evaluations: int = 1000,
        seeds: int = 3,
        init: Init = "own",
    ) -> None:
        super().__init__()
        for key, value in {"evaluations": evaluations, "seeds": seeds}.items():
            if value < 1:
                raise UsageError(f"model.{key} is {value}; give at least 1")
        self.automatic_optimization = False
        # In a tuple, since Lightning would take a network for a part of this module, and a class path may be one.
        self._teacher = (teacher,)
        self.space = space
        self.algorithm = algorithm or AgingEvolution()
        self.proxies = tuple(proxies or (SemanticSimilarity(), RelationSimilarity()))
        self.combine: Combine = combine
        self.budget = budget or Budget()
        self.evaluations = evaluations
        self.seeds = seeds
        self.init: Init = init
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        self.history: list[Candidate] = []
        self._batch: ImageBatch | None = None
        self._scores: TrainingFreeScores | None = None

    @property
    def winner(self) -> Candidate:
        """The best candidate so far."""
        return self.history[int(fitness(self.history, self.combine).argmax())]

    def setup(self, stage: str) -> None:
        """Refuses several processes: each would do the same search."""
        if self.trainer.world_size > 1:
            raise UsageError(f"trainer.devices: {self.trainer.world_size} processes; a search runs in one, give 1")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None: nothing is trained."""
        return []

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Proposes and scores one candidate."""
        self._batch = self._batch or ImageBatch(batch.images, batch.labels, batch.index)
        batch = ImageBatch(*(part.to(self.device) for part in self._batch if part is not None))
        if self._scores is None:
            seeds = [derived_seed("init", self._seed, number) for number in range(self.seeds)]
            self._scores = TrainingFreeScores(self._teacher[0], self.proxies, batch, seeds, self.init)
        random = Random(derived_seed("search", self._seed, len(self.history)))
        architecture = propose_within(
            self.algorithm, self.budget, self.space, self.history, random, self.combine, batch.images.shape[1:]
        )
        known = {candidate.architecture: candidate for candidate in self.history}
        if architecture not in known:
            scores = self._scores(lambda: self.space.build(architecture))
            known[architecture] = Candidate(architecture, scores)
        self.history.append(known[architecture])
        best = self.winner.scores.items()
        logged = {f"train/{name}": value for name, value in known[architecture].scores.items()}
        for logger in self.loggers:
            logger.log_metrics({**logged, **{f"val/{name}": value for name, value in best}}, step=len(self.history))
        if len(self.history) >= self.evaluations:
            self.trainer.should_stop = True

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Nothing: the accuracy of a random network is chance."""

    def on_fit_end(self) -> None:
        """Writes the winner."""
        if not self.history or self.trainer.fast_dev_run or not self.trainer.is_global_zero:  # type: ignore[attr-defined]  # Lightning sets it late
            return
        folder, winner = Path(str(self.trainer.log_dir)), self.winner
        spec = self.space.spec(winner.architecture)
        student = seeded(lambda: self.space.build(winner.architecture), self._seed, self.init)
        with atomic_path(folder / "student" / WEIGHTS_FILE) as path:
            save_file(student.state_dict(), path)
        write_json(folder / "student" / CONFIG_FILE, spec)
        write_json(folder / "candidates.json", [candidate._asdict() for candidate in self.history])
        text = yaml.safe_dump({"model": {"init_args": {"student": spec}}}, sort_keys=False)
        write_text(folder / "winner.yaml", text)
        assert self._batch is not None
        found = size(lambda: self.space.build(winner.architecture), self._batch.images.shape[1:])
        for logger in self.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in found.items()}, step=len(self.history))
        rank_zero_info(
            f"winner of {len(self.history)} candidates: {winner.architecture}, {found['params']:,.0f} parameters, "
            f"{found['flops']:,.0f} FLOPs. Train it: lit-distill fit -c METHOD.yaml -c {folder}/winner.yaml, "
            "where METHOD.yaml is a configuration on the same data, such as configs/image/diswot.yaml"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds seed, batch and candidates: population, best and the next step's randomness follow from them."""
        checkpoint["seed"] = self._seed
        checkpoint["batch"] = (
            None if self._batch is None else tuple(part.cpu() for part in self._batch if part is not None)
        )
        checkpoint["history"] = [tuple(candidate) for candidate in self.history]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        self._seed = checkpoint["seed"]
        self._batch = None if checkpoint["batch"] is None else ImageBatch(*checkpoint["batch"])
        self.history = [Candidate(tuple(architecture), scores) for architecture, scores in checkpoint["history"]]
