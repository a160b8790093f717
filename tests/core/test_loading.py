import collections
from itertools import chain, pairwise

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.loading import EpochPermutation, SampleLoader, TensorLoader, derived_seed, take_samples


class AddDraws:
    """Adds two random numbers to each value, so that batches show their draws."""

    def draw(self, count, generator):
        return torch.randint(0, 1000, (count, 2), generator=generator)

    def __call__(self, values, draws):
        return values + 1000 * draws.sum(1)


def make_loader(size=50, batch_size=12, *, seed=3, shuffle=True, **kwargs):
    sampler = EpochPermutation(size, seed, shuffle=shuffle)
    return TensorLoader({"x": torch.arange(size)}, sampler, batch_size, transforms={"x": AddDraws()}, **kwargs)


def draw_epoch(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [(batch["index"].tolist(), batch["x"].tolist()) for batch in loader]


# ---- order ---------------------------------------------------------------------------------------------------------


def test_order_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            sampler = EpochPermutation(100, seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = tuple(sampler)
            assert sorted(sampler) == list(range(100))
            assert tuple(sampler.order().tolist()) == orders[seed, epoch]
    assert len(set(orders.values())) == 9


def test_order_without_shuffling_is_sequential_in_every_epoch():
    sampler = EpochPermutation(5, 7, shuffle=False)
    sampler.set_epoch(4)
    assert list(sampler) == [0, 1, 2, 3, 4]


def test_each_sample_comes_first_equally_often_over_epochs():
    sampler = EpochPermutation(4, 0)
    counts = collections.Counter()
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        counts[next(iter(sampler))] += 1
    # 500 expected of each; five standard deviations of a binomial are 97
    assert all(abs(counts[index] - 500) < 97 for index in range(4))


def test_derived_seeds_keep_words_apart():
    seeds = {
        derived_seed(*words) for words in [(0, 1), (1, 0), (0, 1, 0), ("a", 1), (1, "a"), (1, 11), (11, 1), (111,)]
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)


# ---- batches -------------------------------------------------------------------------------------------------------


def test_batches_follow_the_order_and_carry_the_position():
    loader = make_loader()
    batches = draw_epoch(loader, epoch=2)
    assert [i for index, _ in batches for i in index] == list(loader.sampler)
    assert all(x % 1000 == i for index, values in batches for i, x in zip(index, values, strict=True))
    assert [len(index) for index, _ in batches] == [12, 12, 12, 12, 2]
    assert len(loader) == 5


def test_drop_last_gives_full_batches_only():
    loader = make_loader(drop_last=True)
    assert [len(index) for index, _ in draw_epoch(loader)] == [12] * 4
    assert len(loader) == 4


def test_draws_differ_between_batches_epochs_and_seeds():
    loader = make_loader(48)
    draws = [[x // 1000 for x in values] for epoch in (0, 1) for _, values in draw_epoch(loader, epoch)]
    draws += [[x // 1000 for x in values] for _, values in draw_epoch(make_loader(48, seed=4))]
    assert len({tuple(values) for values in draws}) == 12


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
@pytest.mark.parametrize(("size", "drop_last"), [(50, True), (50, False), (49, False), (11, False), (60, False)])
def test_shares_of_all_ranks_are_the_batches_of_one_process(size, drop_last, world_size):
    ranks = [
        draw_epoch(make_loader(size, 12, rank=rank, world_size=world_size, drop_last=drop_last and size >= 12))
        for rank in range(world_size)
    ]
    alone = draw_epoch(make_loader(size, 12, drop_last=drop_last and size >= 12))
    assert len({len(batches) for batches in ranks}) == 1
    joined = [tuple(list(chain(*parts)) for parts in zip(*shares, strict=True)) for shares in zip(*ranks, strict=True)]
    if len(joined) == len(alone):
        assert joined == alone
    else:  # the last batch has fewer samples than there are ranks, and joins the one before it
        assert joined[:-1] == alone[:-2]
        assert joined[-1][0] == alone[-2][0] + alone[-1][0]
        assert len(alone[-1][0]) < world_size
    lengths = [[len(index) for index, _ in batches] for batches in ranks]
    for of_one_batch in zip(*lengths, strict=True):
        assert max(of_one_batch) - min(of_one_batch) <= 1
        assert min(of_one_batch) > 0


def test_samples_keep_values_and_memory_layout():
    images = torch.randint(0, 256, (10, 3, 4, 5), dtype=torch.uint8)
    index = torch.tensor([7, 0, 7])
    for layout in (torch.contiguous_format, torch.channels_last):
        taken = take_samples(images.contiguous(memory_format=layout), index)
        assert torch.equal(taken, images[index])
        assert taken.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: 0 is not a number of samples"),
        ({"batch_size": -4}, "data.batch_size: -4"),
        (
            {"world_size": 5},
            "data.batch_size: 12 samples cannot be shared equally by 5 processes; give a multiple of 5",
        ),
        ({"size": 10, "drop_last": True}, "12 is more than the 10 training samples; lower it to 10"),
        ({"size": 0}, "0 samples are too few"),
        ({"size": 2, "world_size": 3}, "2 samples are too few for 3 processes"),
    ],
)
def test_impossible_batches_are_refused(kwargs, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_loader(**kwargs)
    assert "\n" not in str(caught.value)


def test_tensors_of_different_length_are_refused():
    with pytest.raises(UsageError, match="'y' has 4 samples, the sampler 5"):
        TensorLoader({"x": torch.arange(5), "y": torch.arange(4)}, EpochPermutation(5), 2)


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_restored_loader_goes_on_with_the_next_batch(world_size):
    loader = make_loader()
    whole = draw_epoch(loader, epoch=1)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state = loader.state_dict()
    parts = []
    for rank in range(world_size):
        restored = make_loader(rank=rank, world_size=world_size)
        restored.load_state_dict(state)
        assert restored.state_dict() == state
        parts.append(draw_epoch(restored, epoch=1))
        assert len(draw_epoch(restored, epoch=1)) == 5  # only the first epoch is a rest
    rest = [tuple(list(chain(*pieces)) for pieces in zip(*shares, strict=True)) for shares in zip(*parts, strict=True)]
    assert rest == whole[2:]


def test_state_of_a_finished_epoch_leaves_the_next_one_whole():
    loader = make_loader()
    draw_epoch(loader, epoch=0)
    restored = make_loader()
    restored.load_state_dict(loader.state_dict())
    assert draw_epoch(restored, epoch=1) == draw_epoch(make_loader(), epoch=1)


@pytest.mark.parametrize("change", [{"batch_size": 10}, {"size": 48}, {"seed": 4}, {"shuffle": False}])
def test_position_in_other_batches_is_refused_inside_an_epoch_only(change):
    loader = make_loader()
    next(iter(loader))
    with pytest.raises(UsageError, match=f"data.{next(iter(change))}: was"):
        make_loader(**change).load_state_dict(loader.state_dict())
    draw_epoch(loader)
    changed = make_loader(**change)
    finished = loader.state_dict()
    changed.load_state_dict({**finished, "position": len(changed)})


class Recorder(LightningModule):
    """Trains one number and keeps every batch it meets."""

    def __init__(self, loader):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.loader = loader
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["index"].tolist(), batch["x"].tolist()))
        return self.weight * batch["x"].float().mean() / 1e6

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return self.loader

    def val_dataloader(self):
        return make_loader(20, 10, shuffle=False)


def fit(loader, folder, *, resume=None, save_every=1, **limits):
    module = Recorder(loader)
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save_every, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints],
        num_sanity_val_steps=0,
        **limits,
    )
    trainer.fit(module, ckpt_path=resume, weights_only=False)
    return module


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 12, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("make", ["tensors", "samples"])
def test_run_resumed_at_any_step_meets_the_batches_of_an_uninterrupted_one(tmp_path, limits, make):
    def loader():
        return make_loader(48, 12) if make == "tensors" else make_sample_loader(48, 12)

    whole = fit(loader(), tmp_path, **limits)
    assert len(whole.seen) == 12  # 3 epochs of 4 batches
    assert len({tuple(index) for index, _ in whole.seen}) == 12
    for step in (1, 3, 4, 5, 8, 10):  # inside epochs, and at their ends
        resumed = fit(loader(), tmp_path / "again", resume=tmp_path / f"step={step}.ckpt", **limits)
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(resumed.weight, whole.weight)


def test_lightning_starts_each_epoch_with_its_own_order(tmp_path):
    seen = fit(make_loader(48, 12), tmp_path, max_epochs=2).seen
    expected = [batch for epoch in (0, 1) for batch in draw_epoch(make_loader(48, 12), epoch)]
    assert seen == expected


# ---- samples made one by one -----------------------------------------------------------------------------------------


class Squares(torch.utils.data.Dataset):
    def __init__(self, size, broken=()):
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        epoch, index = key
        if index in self.broken:
            raise RunError(f"data: image {index} cannot be read; replace it")
        return index, index * index + 10_000 * epoch


def collate(samples):
    index, x = zip(*samples, strict=True)
    return {"index": torch.tensor(index), "x": torch.tensor(x)}


def make_sample_loader(size=50, batch_size=12, *, broken=(), num_workers=0, **kwargs):
    sampler = EpochPermutation(size, 3)
    return SampleLoader(Squares(size, broken), sampler, batch_size, collate=collate, num_workers=num_workers, **kwargs)


def test_samples_are_asked_for_by_epoch_and_index_in_the_order_of_the_epoch():
    loader = make_sample_loader()
    batches = draw_epoch(loader, epoch=2)
    assert [i for index, _ in batches for i in index] == list(loader.sampler)
    assert all(x == i * i + 20_000 for index, values in batches for i, x in zip(index, values, strict=True))


def test_worker_processes_change_nothing_and_serve_later_epochs_and_rests():
    alone, helped = make_sample_loader(), make_sample_loader(num_workers=2)
    assert [draw_epoch(helped, epoch) for epoch in (0, 1)] == [draw_epoch(alone, epoch) for epoch in (0, 1)]
    iterator = iter(helped)
    next(iterator)
    state = helped.state_dict()
    assert state["position"] == 1  # what workers have read ahead does not count
    helped.load_state_dict(state)
    assert draw_epoch(helped, epoch=1) == draw_epoch(alone, epoch=1)[1:]


def test_sample_shares_of_all_ranks_are_the_batches_of_one_process():
    ranks = [draw_epoch(make_sample_loader(rank=rank, world_size=2)) for rank in range(2)]
    assert [a + b for (a, _), (b, _) in zip(*ranks, strict=True)] == [
        index for index, _ in draw_epoch(make_sample_loader())
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_sample_is_told_in_one_line(num_workers):
    loader = make_sample_loader(broken=[30], num_workers=num_workers)
    with pytest.raises(RunError) as caught:
        draw_epoch(loader)
    assert str(caught.value) == "data: image 30 cannot be read; replace it"


def test_negative_number_of_workers_is_refused():
    with pytest.raises(UsageError, match="num_workers: -1 is not"):
        make_sample_loader(num_workers=-1)


def test_steps_are_counted_alike_by_length_and_by_iteration():
    for size, batch_size, world_size in [(50, 12, 4), (48, 12, 4), (49, 12, 2), (3, 12, 2)]:
        loader = make_loader(size, batch_size, world_size=world_size)
        assert len(loader) == len(draw_epoch(loader))
        assert all(a < b for a, b in pairwise(loader._bounds(number)[0] for number in range(len(loader))))
