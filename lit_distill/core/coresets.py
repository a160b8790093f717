"""Which samples stand for all, by their embeddings."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def herding(embeddings: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
    r"""Chooses rows one by one, each such that the sum of the chosen is nearest to that many times the mean.

    .. math:: i_k = \arg\min_i \Big\lVert k \mu - \sum_{j < k} z_{i_j} - z_i \Big\rVert

    Args:
        embeddings: z, (N, D).
        count: How many, at most N.

    Returns:
        Their positions, in the order in which they were chosen.

    Reference: Welling, Herding Dynamical Weights to Learn, 2009; in this form Rebuffi, Kolesnikov, Sperl, Lampert,
    iCaRL, 2016, arXiv 1611.07725.
    """
    embeddings = embeddings.double()
    mean = embeddings.mean(0)
    wanted = torch.zeros_like(mean)
    taken = torch.zeros(len(embeddings), dtype=torch.bool)
    chosen = []
    for _ in range(count):
        wanted = wanted + mean
        distances = (wanted - embeddings).square().sum(1).masked_fill(taken, torch.inf)
        place = int(distances.argmin())
        chosen.append(place)
        taken[place] = True
        wanted = wanted - embeddings[place]
    return torch.tensor(chosen, dtype=torch.long)


def k_center(embeddings: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
    """Chooses rows one by one, each the farthest from those already chosen; the first is the nearest to the mean.

    The largest distance to a chosen row is at most twice that of the best choice of as many.

    Args:
        embeddings: (N, D).
        count: How many, at most N.

    Returns:
        Their positions, in the order in which they were chosen.

    Reference: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
    """
    embeddings = embeddings.double()
    chosen = [int((embeddings - embeddings.mean(0)).square().sum(1).argmin())][:count]
    distances = torch.full((len(embeddings),), torch.inf, dtype=torch.double)
    while len(chosen) < count:
        last = embeddings[chosen[-1]]
        distances = torch.minimum(distances, (embeddings - last).square().sum(1))
        distances[chosen] = -1.0  # rows that are alike have a distance of 0 and may still be chosen
        chosen.append(int(distances.argmax()))
    return torch.tensor(chosen, dtype=torch.long)


def k_means(embeddings: Float[Tensor, "n d"], count: int, *, seed: int = 0) -> Int[Tensor, " m"]:
    """Chooses the rows nearest to the centers of `count` clusters, each row once; clusters are scikit-learn's.

    Args:
        embeddings: (N, D).
        count: How many, at most N.
        seed: Seed of the clusters' beginning.

    Returns:
        Their positions, cluster after cluster.
    """
    from sklearn.cluster import KMeans  # takes a second to import

    points = embeddings.double().cpu().numpy()
    clusters = KMeans(count, n_init=10, random_state=seed % 2**32).fit(points)
    distances = torch.from_numpy(clusters.transform(points))
    chosen: list[int] = []
    for number in range(count):
        distances[chosen] = torch.inf  # a row may be the nearest to two centers
        chosen.append(int(distances[:, number].argmin()))
    return torch.tensor(chosen, dtype=torch.long)
