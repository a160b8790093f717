"""Random, herding, k-center and k-means subsets, and what serves them."""

import itertools

import pytest
import torch
from torchvision.transforms import v2

from lit_distill.core.coresets import k_means
from lit_distill.core.errors import UsageError
from lit_distill.dataset import DistilledImages, Herding, KCenter, KMeans, RandomSubset
from lit_distill.dataset.methods.coresets import embed
from lit_distill.image import DigitsDataModule


def test_random_subset_has_each_class_and_follows_the_seed(digits):
    sets = {}
    for seed in (0, 0, 1):
        data = RandomSubset(digits(), per_class=3, seed=seed)
        data.setup()
        assert data.train_labels().tolist() == [label for label in range(10) for _ in range(3)]
        known = sets.setdefault(seed, data.distilled.images)
        assert torch.equal(known, data.distilled.images)
    assert not torch.equal(sets[0], sets[1])


def test_smaller_random_sets_lie_in_larger_ones(digits):
    large, small = (RandomSubset(digits(), per_class=count, seed=0) for count in (5, 2))
    large.setup()
    small.setup()
    assert torch.equal(large.distilled.images.view(10, 5, 1, 8, 8)[:, :2].flatten(0, 1), small.distilled.images)


def test_images_are_training_images(digits):
    source = digits()
    data = RandomSubset(source, per_class=3, seed=0)
    data.setup()
    images, labels = source.part("train")
    for image, label in zip(data.distilled.images, data.train_labels(), strict=True):
        same = (images == image).flatten(1).all(1)
        assert (labels[same] == label).any()


def test_embedding_is_the_penultimate_layer(digits, small_net):
    source, network = digits(), small_net()
    source.setup()
    expected = network.embed(source.normalize(source.part("train").images)).detach()
    assert torch.allclose(embed(network, source), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [Herding, KCenter, KMeans])
def test_chosen_by_class(kind, digits, small_net):
    source = digits()
    data = kind(source, small_net(), per_class=4)
    data.setup()
    assert data.train_labels().tolist() == [label for label in range(10) for _ in range(4)]
    assert len(data.distilled.images.flatten(1).unique(dim=0)) == 40


def test_herding_against_greedy_by_hand(digits, small_net):
    source, network = digits(), small_net()
    data = Herding(source, network, per_class=3)
    data.setup()
    images, labels = source.part("train")
    embeddings = embed(network, source).double()
    for label in range(10):
        own = (labels == label).nonzero()[:, 0].tolist()
        mean = embeddings[own].mean(0)
        chosen = []
        for _ in range(3):
            rest = [place for place in own if place not in chosen]
            gaps = [(embeddings[[*chosen, place]].sum(0) - (len(chosen) + 1) * mean).norm() for place in rest]
            chosen.append(rest[int(torch.stack(gaps).argmin())])
        assert torch.equal(data.distilled.images[3 * label : 3 * label + 3], images[chosen])


def test_k_means_finds_the_best_clusters_of_few_points():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(9, 2, generator=generator) + torch.arange(3).repeat_interleave(3)[:, None] * 4.0

    def cost(assignment):
        groups = [points[torch.tensor(assignment) == number] for number in range(3)]
        return sum((group - group.mean(0)).square().sum() for group in groups if len(group))

    best = min(itertools.product(range(3), repeat=9), key=cost)
    centers = [points[torch.tensor(best) == number].mean(0) for number in range(3)]
    nearest = {int((points - center).square().sum(1).argmin()) for center in centers}
    assert set(k_means(points, 3).tolist()) == nearest


def test_k_means_takes_no_row_twice():
    points = torch.cat([torch.zeros(3, 2), torch.ones(1, 2)])
    assert len(set(k_means(points, 3).tolist())) == 3


def test_batches(digits):
    data = RandomSubset(digits(), per_class=3, batch_size=8, seed=0)
    data.setup()
    loader = data.train_dataloader()
    batches = list(loader)
    assert [len(batch.labels) for batch in batches] == [8, 8, 8, 6]
    seen = torch.cat([batch.index for batch in batches])
    assert sorted(seen.tolist()) == list(range(30))
    whole = RandomSubset(digits(), per_class=3, batch_size=256, seed=0)
    whole.setup()
    assert len(next(iter(whole.train_dataloader())).labels) == 30
    test = next(iter(data.test_dataloader()))
    assert torch.equal(test.labels, data.source.part("test").labels)


def test_augmented_batches_differ_by_epoch_and_repeat(digits):
    data = RandomSubset(digits(), per_class=3, operations="scale_rotate", seed=0)
    data.setup()
    plain = data.distilled.network_images()

    def batch(epoch):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return next(iter(loader))

    first, again, later = batch(0), batch(0), batch(1)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, plain[first.index])
    assert not torch.equal(first.images[first.index.argsort()], later.images[later.index.argsort()])


def test_soft_labels_are_served_where_wanted(digits, tmp_path):
    data = RandomSubset(digits(), per_class=2, seed=0)
    data.setup()
    soft = torch.randn(20, 10)
    type(data.distilled)(**{**vars(data.distilled), "soft_labels": soft}).save(tmp_path)
    for wanted in (True, False):
        distilled = DistilledImages(str(tmp_path), digits(), soft_labels=wanted)
        distilled.setup()
        batch = next(iter(distilled.train_dataloader()))
        assert (batch.targets is not None) == wanted
        if wanted:
            assert torch.equal(batch.targets, soft[batch.index])


def test_mistakes(digits, small_net, tmp_path):
    with pytest.raises(UsageError, match=r"data\.per_class is 0"):
        RandomSubset(digits(), per_class=0)
    with pytest.raises(UsageError, match=r"data.per_class is 900; the smallest class \(number \d\) has \d+ images"):
        RandomSubset(DigitsDataModule(), per_class=900).setup()
    data = RandomSubset(digits(), per_class=1)
    data.setup()
    data.distilled.save(tmp_path)
    other = DistilledImages(str(tmp_path), digits())
    other.source.sample_shape = (1, 9, 9)
    with pytest.raises(UsageError, match="images are"):
        other.setup()
    grouped = digits(label_groups=[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]])
    with pytest.raises(UsageError, match=r"10 classes, data\.source 2"):
        DistilledImages(str(tmp_path), grouped).setup()


def test_a_library_transform_has_each_image_alone_and_follows_the_seed(digits):
    crop = v2.RandomCrop(8, padding=3)
    data = RandomSubset(digits(), per_class=3, transform=crop, seed=0)
    data.setup()

    def batch(epoch):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return next(iter(loader))

    before = torch.random.get_rng_state()
    first, again, later = batch(0), batch(0), batch(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images[first.index.argsort()], later.images[later.index.argsort()])
    # Each is one of the 7 x 7 crops of its own image, and there are several among them.
    mean, std = data.source.normalize.mean[0], data.source.normalize.std[0]
    padded = torch.nn.functional.pad(data.distilled.pixels(), (3, 3, 3, 3)).float()
    corners = set()
    for image, index in zip((first.images * std + mean) * 255, first.index, strict=True):
        crops = {(i, j): padded[index, :, i : i + 8, j : j + 8] for i in range(7) for j in range(7)}
        found = [place for place, crop in crops.items() if torch.allclose(crop, image, atol=1e-3)]
        assert found
        corners.add(found[0])
    assert len(corners) > 5


def test_without_chance_a_library_transform_is_what_it_says(digits):
    data = RandomSubset(digits(), per_class=3, transform=v2.RandomInvert(p=1.0), seed=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.images, data.source.normalize(255 - data.distilled.pixels()[batch.index]))
    test = next(iter(data.test_dataloader()))
    assert torch.equal(test.images, data.source.normalize(data.source.part("test").images[test.index]))


@pytest.mark.parametrize(
    ("transform", "made"),
    [(v2.Resize(4), r"torch.uint8 of \(1, 4, 4\)"), (v2.ToDtype(torch.float32), "torch.float32 of")],
)
def test_a_transform_that_changes_shape_or_type_is_refused(digits, transform, made):
    data = RandomSubset(digits(), per_class=3, transform=transform, seed=0)
    data.setup()
    with pytest.raises(UsageError, match=rf"data\.transform: {type(transform).__name__} makes {made}"):
        next(iter(data.train_dataloader()))


def test_two_augmentations_are_refused(digits):
    with pytest.raises(UsageError, match=r"data\.operations is 'scale', and there is data\.transform"):
        RandomSubset(digits(), operations="scale", transform=v2.AutoAugment())
