"""Search for a student without training one: spaces, scores of random networks, evolution."""

from lit_distill.image.search.evolution import AgingEvolution, Algorithm, Budget, Candidate, RandomSearch, fitness
from lit_distill.image.search.proxies import ClassMapSimilarity, TrainingFreeScores, seeded, size
from lit_distill.image.search.space import Architecture, ArgumentSpace, ResNetSpace, SearchSpace, StagedResNet

__all__ = [
    "AgingEvolution",
    "Algorithm",
    "Architecture",
    "ArgumentSpace",
    "Budget",
    "Candidate",
    "ClassMapSimilarity",
    "RandomSearch",
    "ResNetSpace",
    "SearchSpace",
    "StagedResNet",
    "TrainingFreeScores",
    "fitness",
    "seeded",
    "size",
]
