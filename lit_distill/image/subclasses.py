"""Pseudo-subclasses: a classifier that has them, and the ways in which a teacher's embedding splits a class."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.losses.subclass import class_logits


class SubclassClassifier(nn.Module):
    """A classifier of C classes made of a network with C * S outputs: a class has the summed probability of its S.

    Evaluation, calibration and export see C logits. Losses over subclasses tap `network`.

    Args:
        network: Returns (B, C * S); output c * S + s is subclass s of class c.
        subclasses: S.
    """

    def __init__(self, network: nn.Module, subclasses: int) -> None:
        super().__init__()
        if subclasses < 2:
            raise UsageError(
                f"subclasses: {subclasses} splits nothing, which is vanilla KD; give 2 or more, or use "
                "lit_distill.image.KD"
            )
        self.network = network
        self.subclasses = subclasses

    def forward(self, images: Float[Tensor, "b *shape"]) -> Float[Tensor, "b c"]:
        """Computes class logits."""
        return class_logits(self.network(images), subclasses=self.subclasses)


class SubclassSplitter(nn.Module):
    """Says how much of each of its S subclasses is in a sample, were the sample of class c.

    What it learns from the teacher's embeddings is kept in buffers: a resumed run splits as before.

    A subclass makes its buffers in `build`, where drawing random numbers is reproducible, and fills them in `fit`.
    """

    def build(self, num_classes: int, subclasses: int, features: int, samples: Callable[[], int]) -> None:
        """Makes buffers and draws what is random.

        Args:
            num_classes: C.
            subclasses: S.
            features: Length of an embedding, D.
            samples: Returns the number of training samples, N.
        """
        self.num_classes, self.subclasses = num_classes, subclasses

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether the buffers have been filled, by `fit` or from a checkpoint."""

    @abstractmethod
    def fit(
        self,
        embeddings: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        head: Float[Tensor, "c d"] | None,
        fine_labels: Callable[[], Int[Tensor, " n"]],
    ) -> None:
        """Learns the split.

        Args:
            embeddings: The teacher's, (N, D), of the training samples in order, on the CPU.
            labels: Class of each sample, (N,).
            head: Weights of the teacher's last layer, (C, D), where `needs_head` asks for it.
            fine_labels: Returns the labels (N,) of a finer labelling, where the data has one.
        """

    @abstractmethod
    def forward(self, embeddings: Float[Tensor, "b d"], index: Int[Tensor, " b"]) -> Float[Tensor, "b c s"]:
        """Returns subclass logits, before any temperature.

        Args:
            embeddings: The teacher's, (B, D).
            index: Positions of the samples in the training set, (B,).
        """

    @property
    def needs_head(self) -> bool:
        """Whether `fit` wants the teacher's last layer."""
        return False


class LinearSplitter(SubclassSplitter):
    r"""Subclass logits that are linear in the embedding, of unit variance over a class's own samples.

    .. math:: z_{c,s} = \langle v_{c,s}, h - \mu_c \rangle + b_{c,s}

    One scale a class (the mean over its samples and subclasses of the square of z is 1), so that the subclass
    temperature means the same for every teacher. This scaling is a choice made here.

    Args:
        null_space: First take out of the embedding what the teacher's head reads of it, the span of the differences of
            its rows. Otherwise the strongest direction within a class is the logit again.
    """

    mean: Tensor
    directions: Tensor
    bias: Tensor

    def __init__(self, null_space: bool = True) -> None:
        super().__init__()
        self.null_space = null_space

    @property
    def needs_head(self) -> bool:
        """Whether the head is to be projected out."""
        return self.null_space

    def build(self, num_classes: int, subclasses: int, features: int, samples: Callable[[], int]) -> None:
        """Makes buffers for means (C, D), directions (C, S, D) and biases (C, S)."""
        super().build(num_classes, subclasses, features, samples)
        self.register_buffer("mean", torch.zeros(num_classes, features))
        self.register_buffer("directions", torch.zeros(num_classes, subclasses, features))
        self.register_buffer("bias", torch.zeros(num_classes, subclasses))

    @property
    def fitted(self) -> bool:
        """Whether there are directions."""
        return bool(self.directions.any())

    def fit(
        self,
        embeddings: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        head: Float[Tensor, "c d"] | None,
        fine_labels: Callable[[], Int[Tensor, " n"]],
    ) -> None:
        """Learns the split of each class from its own samples, in float64."""
        embeddings = embeddings.double()
        if self.null_space:
            assert head is not None
            embeddings = remove_head(embeddings, head.double())
        for number in range(self.num_classes):
            own = embeddings[labels == number]
            mean = own.mean(0)
            centered = own - mean
            rank = _rank(centered)
            if rank < self.subclasses:
                remedy = (
                    f"lower it to {rank} or less"
                    if rank >= 2
                    else "such a class cannot be split; use lit_distill.image.KD"
                )
                raise UsageError(
                    f"model.student.subclasses: {self.subclasses} is more than the {rank} directions in which the "
                    f"teacher's embeddings of the {len(own)} samples of class {number} vary; {remedy}"
                )
            directions, bias = self.split(centered)
            scale = (centered @ directions.T + bias).square().mean().sqrt()
            # Directions lie in what was left of the embedding; so `forward` need not project again.
            self.mean[number] = mean
            self.directions[number] = directions / scale
            self.bias[number] = bias / scale

    @abstractmethod
    def split(self, centered: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, " s"]]:
        """Returns directions and biases for the centered embeddings of one class, in any scale."""

    def forward(self, embeddings: Float[Tensor, "b d"], index: Int[Tensor, " b"]) -> Float[Tensor, "b c s"]:
        """Returns subclass logits."""
        with torch.autocast(embeddings.device.type, enabled=False):
            centered = embeddings.float().unsqueeze(1) - self.mean
            return torch.einsum("bcd,csd->bcs", centered, self.directions) + self.bias


class PrincipalDirections(LinearSplitter):
    """LELP's split: the first S principal directions of a class, turned by one random rotation of R^S.

    The rotation evens out the variances of the directions, in expectation, and leaves the sum of their squares.

    Args:
        null_space: See `LinearSplitter`.
        rotate: Turn the directions. Without, the first of them dominates.
    """

    rotation: Tensor

    def __init__(self, null_space: bool = True, rotate: bool = True) -> None:
        super().__init__(null_space)
        self.rotate = rotate

    def build(self, num_classes: int, subclasses: int, features: int, samples: Callable[[], int]) -> None:
        """Draws the rotation (S, S)."""
        super().build(num_classes, subclasses, features, samples)
        rotation = random_rotation(subclasses) if self.rotate else torch.eye(subclasses)
        self.register_buffer("rotation", rotation)

    def split(self, centered: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, " s"]]:
        """Returns the rotated directions."""
        directions = self.rotation.to(centered) @ principal_directions(centered, self.subclasses)
        return directions, directions.new_zeros(self.subclasses)


class RandomProjections(LinearSplitter):
    """S random directions, the same for every class, in the space in which the class varies: the control of LELP."""

    def build(self, num_classes: int, subclasses: int, features: int, samples: Callable[[], int]) -> None:
        """Draws the directions."""
        super().build(num_classes, subclasses, features, samples)
        self._drawn = torch.randn(subclasses, features)

    def split(self, centered: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, " s"]]:
        """Returns the drawn directions, of length 1, without what no sample of the class has."""
        span = principal_directions(centered, _rank(centered))
        directions = nn.functional.normalize(self._drawn.to(centered), dim=1) @ span.T @ span
        return directions, directions.new_zeros(self.subclasses)


class KMeansClusters(LinearSplitter):
    r"""S clusters a class, by scikit-learn: `z` is minus the squared distance to a center, halved, up to a constant.

    .. math:: - \tfrac{1}{2} \lVert h - k_s \rVert^2 = \langle k_s, h \rangle - \tfrac{1}{2} \lVert k_s \rVert^2
        + \ldots

    What is left out is the same for all subclasses of a class, so the softmax over them does not see it.
    """

    def build(self, num_classes: int, subclasses: int, features: int, samples: Callable[[], int]) -> None:
        """Draws the seed of the clustering."""
        super().build(num_classes, subclasses, features, samples)
        self._seed = int(torch.randint(2**31, ()))

    def split(self, centered: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, " s"]]:
        """Returns the centers as directions, and minus half their squared lengths, both centered over subclasses."""
        from sklearn.cluster import KMeans  # here: the import takes a second that other splits need not wait for

        found = KMeans(self.subclasses, n_init=4, random_state=self._seed).fit(centered.numpy())
        centers = torch.from_numpy(found.cluster_centers_).to(centered)
        bias = -0.5 * centers.square().sum(1)
        return centers - centers.mean(0), bias - bias.mean()


class KnownSubclasses(SubclassSplitter):
    """The split of a finer labelling, as an upper reference: all of a class goes to the subclass that is the truth.

    Where the teacher sees a chance for another class than the sample's own, that chance is shared out evenly. The data
    module must have `train_fine_labels()`; with `label_groups`, image sets in memory do.
    """

    member: Tensor
    label: Tensor

    def build(self, num_classes: int, subclasses: int, features: int, samples: Callable[[], int]) -> None:
        """Makes buffers for class and subclass of every training sample."""
        super().build(num_classes, subclasses, features, samples)
        self.register_buffer("label", torch.full((samples(),), -1))
        self.register_buffer("member", torch.full((samples(),), -1))

    @property
    def fitted(self) -> bool:
        """Whether the samples have been assigned."""
        return bool((self.label >= 0).all())

    def fit(
        self,
        embeddings: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        head: Float[Tensor, "c d"] | None,
        fine_labels: Callable[[], Int[Tensor, " n"]],
    ) -> None:
        """Numbers the fine labels within each class."""
        fine = fine_labels().cpu()
        member = torch.empty_like(labels)
        for number in range(self.num_classes):
            own = labels == number
            kinds, member[own] = fine[own].unique(return_inverse=True)
            if len(kinds) > self.subclasses:
                raise UsageError(
                    f"model.student.subclasses: {self.subclasses} is less than the {len(kinds)} known subclasses of "
                    f"class {number}; raise it to {len(kinds)} or more"
                )
        self.label.copy_(labels)
        self.member.copy_(member)

    def forward(self, embeddings: Float[Tensor, "b d"], index: Int[Tensor, " b"]) -> Float[Tensor, "b c s"]:
        """Returns 0 where a subclass may be, -inf where it is not."""
        own = torch.arange(self.num_classes, device=index.device) == self.label[index, None]
        other = torch.arange(self.subclasses, device=index.device) != self.member[index, None]
        excluded = own.unsqueeze(2) & other.unsqueeze(1)
        return torch.zeros(excluded.shape, device=index.device).masked_fill(excluded, -torch.inf)


def principal_directions(centered: Float[Tensor, "m d"], count: int) -> Float[Tensor, "count d"]:
    """Computes the first principal directions of centered data, with the largest entry of each positive.

    Args:
        centered: (M, D), of mean 0.
        count: How many.

    Returns:
        (count, D), orthonormal, in the order of falling variance.
    """
    directions = torch.linalg.svd(centered, full_matrices=False).Vh[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign()


def remove_head(embeddings: Float[Tensor, "n d"], head: Float[Tensor, "c d"]) -> Float[Tensor, "n d"]:
    r"""Projects embeddings onto the null space of the differences of a linear head's rows.

    .. math:: h \leftarrow (I - U U^\top) h, \qquad U \text{ an orthonormal basis of } \mathrm{span}(w_i - w_j)

    A softmax sees only differences of logits, and these vanish for what is left.

    Args:
        embeddings: (N, D).
        head: W, (C, D).

    Returns:
        (N, D).
    """
    differences = head - head.mean(0)
    basis = torch.linalg.svd(differences, full_matrices=False).Vh[: _rank(differences)]
    return embeddings - embeddings @ basis.T @ basis


def random_rotation(size: int) -> Float[Tensor, "size size"]:
    """Draws an orthonormal matrix, uniformly, from torch's global generator."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()  # the signs make it uniform (Mezzadri 2006, arXiv math-ph/0609050)


def _rank(matrix: Tensor) -> int:
    # Embeddings come from float32, so that what is below its rounding is no direction.
    values = torch.linalg.svdvals(matrix)
    tolerance = max(matrix.shape) * torch.finfo(torch.float32).eps
    return int((values > tolerance * values.max()).sum()) if values.numel() else 0
