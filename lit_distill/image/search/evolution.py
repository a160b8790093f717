"""How a search proposes the next architecture, and how it judges those it has seen."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import rankdata

from lit_distill.core.errors import UsageError
from lit_distill.image.search.proxies import size
from lit_distill.image.search.space import Architecture, SearchSpace

Combine = Literal["sum", "rank"]
TRIES = 10_000


class Candidate(NamedTuple):
    """An architecture that was scored.

    Attributes:
        architecture: Its genes.
        scores: Its scores by name, higher is better.
    """

    architecture: Architecture
    scores: dict[str, float]


def fitness(candidates: Sequence[Candidate], combine: Combine = "sum") -> np.ndarray:
    """Judges candidates among one another; higher is better.

    Args:
        candidates: All that are compared.
        combine: "sum" adds up the scores, as the paper does; the one with the larger spread decides. "rank" averages
            the ranks that a candidate has under each score, so that all count the same.

    Returns:
        One number a candidate, (N,).
    """
    table = np.array([list(candidate.scores.values()) for candidate in candidates])
    return table.sum(1) if combine == "sum" else rankdata(table, axis=0).mean(1)


@dataclass
class Budget:
    """The largest student that may be proposed; what is None is not limited.

    Args:
        params: Parameters.
        flops: FLOPs of one image, multiply and add counted as two.
        depth: Layers with weights on the longest way.
    """

    params: int | None = None
    flops: int | None = None
    depth: int | None = None

    def allows(self, space: SearchSpace, architecture: Architecture, sample_shape: Sequence[int]) -> bool:
        """Says whether an architecture is small enough."""
        if self.depth is not None and space.depth(architecture) > self.depth:
            return False
        if self.params is None and self.flops is None:
            return True
        found = size(lambda: space.build(architecture), sample_shape)
        return all(
            limit is None or found[name] <= limit for name, limit in (("params", self.params), ("flops", self.flops))
        )


class Algorithm(ABC):
    """Proposes architectures. What it proposes depends on the candidates so far and on `random` alone."""

    @abstractmethod
    def propose(
        self, space: SearchSpace, history: Sequence[Candidate], random: Random, combine: Combine
    ) -> Architecture:
        """Returns the next architecture.

        Args:
            space: What there is to choose from.
            history: The candidates so far, oldest first.
            random: Source of all randomness of this proposal.
            combine: See `fitness`.
        """


@dataclass
class AgingEvolution(Algorithm):
    """Regularised evolution: the best of a random tournament has a child with one mutation; the oldest dies.

    The population is the last candidates of the history. The first ones are drawn at random.

    Args:
        population: Candidates alive. The paper's code has 36.
        tournament: Candidates drawn from them, of which the best is the parent. The paper's code draws 8, and on
            NAS-Bench-201 then picks from the worse of them; here it is the best, as in the source of the algorithm.

    Reference: Real, Aggarwal, Huang, Le, Regularized Evolution for Image Classifier Architecture Search, 2018, arXiv
    1802.01548.
    """

    population: int = 36
    tournament: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.tournament <= self.population:
            raise UsageError(
                f"algorithm.tournament: {self.tournament} of a population of {self.population}; give 1 to population"
            )

    def propose(
        self, space: SearchSpace, history: Sequence[Candidate], random: Random, combine: Combine
    ) -> Architecture:
        """Draws while the population is not full, then mutates the winner of a tournament."""
        if len(history) < self.population:
            return space.sample(random)
        alive = history[-self.population :]
        worth = fitness(alive, combine)
        parent = max(random.sample(range(self.population), self.tournament), key=worth.__getitem__)
        return space.mutate(alive[parent].architecture, random)


@dataclass
class RandomSearch(Algorithm):
    """Draws every architecture anew."""

    def propose(
        self, space: SearchSpace, history: Sequence[Candidate], random: Random, combine: Combine
    ) -> Architecture:
        """Draws an architecture."""
        return space.sample(random)


def propose_within(
    algorithm: Algorithm,
    budget: Budget,
    space: SearchSpace,
    history: Sequence[Candidate],
    random: Random,
    combine: Combine,
    sample_shape: Sequence[int],
) -> Architecture:
    """Asks the algorithm until it proposes an architecture within the budget.

    Raises:
        UsageError: None was found.
    """
    allowed, refused = {candidate.architecture for candidate in history}, set[Architecture]()
    for _ in range(TRIES):
        proposed = algorithm.propose(space, history, random, combine)
        if proposed in refused:
            continue
        if proposed in allowed or budget.allows(space, proposed, sample_shape):
            return proposed
        refused.add(proposed)
        if len(refused) == len(space):
            break
    raise UsageError(f"model.budget: {budget} leaves no architecture of the space; raise it")
