"""What is served is what was labelled, whenever and however the labels were made."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_distill.core.errors import RunError, UsageError
from lit_distill.dataset import DistilledSetEvaluation, RandomSubset
from lit_distill.dataset.committee import Committee
from lit_distill.dataset.crops import RandomResizedCrop
from lit_distill.dataset.data.relabelled import RelabelledImages
from lit_distill.dataset.relabel import committee_logits, decode, encode, lost_share, normalized_by_batch


@pytest.fixture
def committee(small_net):
    """Two networks whose running statistics are not those of any batch."""
    networks = [small_net(seed, norm="batch", width=width) for seed, width in ((1, 8), (2, 4))]
    for network in networks:
        network.train()(torch.randn(32, 1, 8, 8) * 2 + 1)
    return networks


@pytest.fixture
def data(digits, committee):
    def build(**kwargs):
        images = RandomSubset(digits(), per_class=kwargs.pop("per_class", 3), seed=3)
        options = {"teachers": copy.deepcopy(committee), "seed": 5, "batch_size": 16}
        return RelabelledImages(images, **(options | kwargs))

    return build


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first, second):
    return len(first) == len(second) and all(map(equal, first, second))


def equal(first, second):
    return all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def buffers(networks):
    return [value.clone() for network in networks for value in network.state_dict().values()]


# ---- labels of the batch ---------------------------------------------------------------------------------------------


def with_statistics_of(network, images):
    """A copy in eval mode whose running statistics are mean and biased variance of what its layers are given."""
    network = copy.deepcopy(network).eval()

    def hook(layer, inputs):
        layer.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        layer.running_var.copy_(inputs[0].var((0, 2, 3), unbiased=False))

    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        return network(images)


def logits_of(networks, images, priors=None, **kwargs):
    voting = "equal" if priors is None else "prior"
    return committee_logits(Committee(networks, priors, voting), images, temperature=10.0, **kwargs)


def test_batch_statistics_are_running_statistics_set_to_those_of_the_part(committee):
    networks = [network.double().eval() for network in committee]
    images = torch.randn(9, 1, 8, 8, dtype=torch.double)
    found = logits_of(networks, images, [60.0, 40.0], batch_statistics=True, parts=2)
    first = 1 / (1 + math.exp(-2))
    wanted = [
        first * with_statistics_of(networks[0], part) + (1 - first) * with_statistics_of(networks[1], part)
        for part in (images[:5], images[5:])
    ]
    torch.testing.assert_close(found.double(), torch.cat(wanted), atol=1e-6, rtol=1e-6)
    whole = logits_of(networks, images, [60.0, 40.0], batch_statistics=True, parts=1)
    assert (whole - found).abs().max() > 0.01


def test_batch_statistics_are_those_of_training(committee):
    images = torch.randn(8, 1, 8, 8)
    trained = copy.deepcopy(committee[0]).train()(images)
    assert torch.equal(logits_of(committee[:1], images, batch_statistics=True), trained)


def test_running_statistics_serve_when_asked(committee):
    images = torch.randn(8, 1, 8, 8)
    found = logits_of(committee[:1], images, batch_statistics=False, parts=2)
    assert torch.equal(found, committee[0](images))
    assert (found - logits_of(committee[:1], images, batch_statistics=True)).abs().max() > 0.01


def test_networks_are_left_as_they_were_even_after_an_error(committee):
    network = nn.Sequential(committee[0], nn.Dropout(0.5)).eval()
    before = buffers([network])
    with normalized_by_batch(network):
        network(torch.randn(4, 1, 8, 8))
        assert not network[1].training
    with pytest.raises(RuntimeError), normalized_by_batch(network):
        network(torch.randn(4, 2, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, buffers([network]), strict=True))
    assert not any(module.training for module in network.modules())
    assert all(module.track_running_stats for module in network.modules() if isinstance(module, nn.BatchNorm2d))


# ---- what is served --------------------------------------------------------------------------------------------------


def test_the_mixed_images_are_what_is_labelled_part_by_part(data, committee):
    module = data(priors=[60.0, 40.0])
    batches = epoch_of(module)
    weights = np.exp([6.0, 4.0]) / np.exp([6.0, 4.0]).sum()
    for batch in batches:
        half = math.ceil(len(batch.images) / 2)
        for rows in (slice(half), slice(half, None)):
            votes = [with_statistics_of(network, batch.images[rows]) for network in committee]
            wanted = weights[0] * votes[0] + weights[1] * votes[1]
            torch.testing.assert_close(batch.targets[rows], wanted.float(), atol=1e-4, rtol=1e-4)
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(30))
    assert all(torch.equal(batch.labels, module.train_labels()[batch.index]) for batch in batches)


def test_images_are_cropped_mirrored_and_mixed(data):
    plain = {"crop_scale": (1.0, 1.0), "flip": False, "cutmix": False}
    whole = epoch_of(data(**plain))
    module = data(**plain)
    module.setup()
    images = module.distilled.network_images()
    assert all(torch.equal(batch.images, images[batch.index]) for batch in whole)
    for change in ({"flip": True}, {"crop_scale": (0.08, 1.0)}, {"cutmix": True}, {"grid": 2}):
        other = epoch_of(data(**(plain | change)))
        assert all(torch.equal(a.index, b.index) for a, b in zip(whole, other, strict=True))
        assert not torch.equal(whole[0].images, other[0].images), change
        assert not torch.equal(whole[0].targets, other[0].targets), change


def test_priors_weigh_the_teachers_at_their_temperature(data, committee):
    def targets(**kwargs):
        return epoch_of(data(**kwargs))[0].targets

    single = [targets(teachers=copy.deepcopy(committee[number : number + 1])) for number in (0, 1)]
    torch.testing.assert_close(targets(), (single[0] + single[1]) / 2, atol=1e-5, rtol=1e-5)
    level = targets(priors=[90.0, 10.0], temperature=1e9)
    torch.testing.assert_close(level, (single[0] + single[1]) / 2, atol=1e-5, rtol=1e-5)
    first = 1 / (1 + math.exp(-1.5))
    wanted = first * single[0] + (1 - first) * single[1]
    torch.testing.assert_close(targets(priors=[65.0, 50.0]), wanted, atol=1e-5, rtol=1e-5)


def test_any_epoch_is_replayed_bit_for_bit(data):
    assert same(epoch_of(data(), 7), epoch_of(data(), 7))
    assert not same(epoch_of(data(), 7)[:1], epoch_of(data(), 8)[:1])
    assert not same(epoch_of(data(), 7)[:1], epoch_of(data(seed=6), 7)[:1])


def test_views_differ_between_batches_epochs_and_seeds(data, monkeypatch):
    drawn, draw = [], RandomResizedCrop.draw

    def spy(self, count, generator=None):
        drawn.append(draw(self, count, generator))
        return drawn[-1]

    monkeypatch.setattr(RandomResizedCrop, "draw", spy)
    for seed, epoch in ((5, 0), (5, 1), (6, 0)):
        epoch_of(data(seed=seed), epoch)
    assert len({tuple(row.tolist()) for draws in drawn for row in draws}) == 3 * 30
    first, second = (torch.cat([batch.index for batch in epoch_of(data(), epoch)]) for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_a_loader_restored_within_an_epoch_goes_on(data):
    whole = epoch_of(data(batch_size=8), 4)
    first, second = data(batch_size=8).train_dataloader(), data(batch_size=8).train_dataloader()
    first.sampler.set_epoch(4)
    iterator = iter(first)
    next(iterator), next(iterator)
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(4)
    assert same(list(second), whole[2:])


def test_teachers_are_frozen_and_not_changed_by_labelling(data, committee):
    module = data()
    epoch_of(module)
    assert all(torch.equal(a, b) for a, b in zip(buffers(committee), buffers(module.teachers()), strict=True))
    assert not any(parameter.requires_grad for network in module.teachers() for parameter in network.parameters())
    assert not any(part.training for network in module.teachers() for part in network.modules())


@pytest.mark.parametrize(
    ("per_class", "batch_size", "parts", "sizes"),
    [(3, 16, 2, [16, 14]), (3, 13, 2, [13, 13, 4]), (3, 9, 2, [9, 9, 9]), (3, 28, 2, [28]), (1, 16, 2, [10])],
)
def test_what_is_left_is_served_if_its_parts_are_not_single_images(data, per_class, batch_size, parts, sizes):
    module = data(per_class=per_class, batch_size=batch_size, parts=parts)
    loader = module.train_dataloader()
    assert [len(batch.images) for batch in loader] == sizes
    assert len(loader) == len(sizes)


def test_processes_share_the_batch_that_one_would_see(data):
    module = data(batch_size=8)
    whole = epoch_of(module, 2)
    module.setup()
    for rank in (0, 1):
        module._placement = lambda rank=rank: (rank, 2, torch.device("cpu"))
        for own, batch in zip(epoch_of(module, 2), whole, strict=True):
            half = slice(rank * len(batch.images) // 2, (rank + 1) * len(batch.images) // 2)
            assert equal(own, [None if field is None else field[half] for field in batch])


def test_evaluation_data_and_the_ordered_training_set_are_the_sources_own(data):
    module = data()
    assert next(iter(module.ordered_loader())).targets is None
    assert same(list(module.val_dataloader()), list(module.source.val_dataloader()))
    assert same(list(module.test_dataloader()), list(module.source.test_dataloader()))


def test_a_student_learns_from_what_is_served(data, small_net, trainer):
    module = DistilledSetEvaluation(
        small_net(norm="batch"),
        repeats=1,
        temperature=20.0,
        parts=2,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
    )
    served = data()
    fit = trainer(max_epochs=2)
    fit.fit(module, datamodule=served)
    assert module.iteration == 4
    result = fit.test(module, datamodule=served, verbose=False)[0]
    weights = sum(value.nbytes for network in served.teachers() for value in network.state_dict().values())
    assert result["test/teacher_bytes"] == weights
    assert result["test/bytes"] == 30 * 64 + 30


# ---- stored labels ---------------------------------------------------------------------------------------------------


def test_stored_labels_are_those_made_online_up_to_rounding(data, tmp_path):
    stored, online = data(label_folder=str(tmp_path / "labels"), label_epochs=3), data()
    for epoch in (2, 0):
        for own, other in zip(epoch_of(stored, epoch), epoch_of(online, epoch), strict=True):
            assert torch.equal(own.images, other.images)
            assert torch.equal(own.index, other.index)
            assert torch.equal(own.targets, other.targets.half().float())
    files = sorted((tmp_path / "labels").iterdir())
    assert [file.name for file in files] == [f"epoch{number:05}.safetensors" for number in range(3)]
    assert stored.footprint() == {"bytes": 30 * 64 + 3 * 30 * 10 * 2, "label_bytes": 3 * 30 * 10 * 2}


def test_labels_that_are_there_are_not_made_again(data, tmp_path, monkeypatch):
    folder = tmp_path / "labels"
    epoch_of(data(label_folder=str(folder), label_epochs=2))
    (folder / "epoch00001.safetensors").unlink()  # as if the making had been cut off
    before = (folder / "epoch00000.safetensors").stat().st_mtime_ns
    wanted = epoch_of(data(label_folder=str(folder), label_epochs=2), 1)
    assert (folder / "epoch00000.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(RelabelledImages, "teach", lambda *_: pytest.fail("labels are made again"))
    assert same(epoch_of(data(label_folder=str(folder), label_epochs=2), 1), wanted)
    assert same(epoch_of(data(label_folder=str(folder), label_epochs=2, teachers=[]), 1), wanted)


def test_labels_of_other_things_are_refused_and_the_thing_is_named(data, committee, tmp_path):
    options = {"label_folder": str(tmp_path / "labels"), "label_epochs": 1}
    epoch_of(data(**options))
    changes = {
        "seed": {"seed": 6},
        "batch_size": {"batch_size": 8},
        "transforms": {"flip": False},
        "images": {"per_class": 4},
        "teachers": {"teachers": committee[::-1]},
        "temperature": {"temperature": 5.0},
        "priors": {"priors": [1.0, 2.0]},
        "batch_statistics": {"batch_statistics": False},
        "top_k": {"top_k": 3},
    }
    for field, change in changes.items():
        with pytest.raises(UsageError, match=f"made with other {field} "):
            data(**(options | change)).train_dataloader()
    epoch_of(data(**options))


def test_an_epoch_beyond_those_stored_is_one_line(data, tmp_path):
    module = data(label_folder=str(tmp_path / "labels"), label_epochs=2)
    with pytest.raises(
        UsageError, match=r"has labels of 2 epochs, and none of epoch 2, .*set data\.label_epochs"
    ) as error:
        epoch_of(module, 2)
    assert "\n" not in str(error.value)


def test_a_corrupt_file_is_said_to_be_one(data, tmp_path):
    options = {"label_folder": str(tmp_path / "labels"), "label_epochs": 1}
    epoch_of(data(**options))
    (tmp_path / "labels/epoch00000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RunError, match="is corrupt"):
        data(**options).train_dataloader()


def test_the_largest_logits_and_the_mean_of_the_others_are_kept():
    logits = torch.tensor([[4.0, -1.0, 0.5, 2.0, 0.0], [1.0, 1.5, -2.0, 8.0, 3.0]])
    kept = decode(encode(logits, 2), 5)
    third = (-1.0 + 0.5 + 0.0) / 3
    wanted = torch.tensor([[4.0, third, third, 2.0, third], [1 / 6, 1 / 6, 1 / 6, 8.0, 3.0]])
    torch.testing.assert_close(kept, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(kept.mean(1), logits.mean(1), atol=1e-3, rtol=1e-3)
    deviations = (logits - logits.mean(1, keepdim=True)).square().sum()
    expected = float((logits - wanted).square().sum() / deviations)
    assert lost_share(logits, kept) == pytest.approx(expected, rel=1e-3)


def test_truncation_loses_less_the_more_is_kept_and_nothing_but_rounding_in_the_end():
    logits = torch.randn(50, 300) * 5
    lost = [lost_share(logits, decode(encode(logits, top_k), 300)) for top_k in (1, 10, 100, 299)]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 0.5
    assert lost[-1] < 1e-6
    assert lost_share(logits, decode(encode(logits), 300)) < 1e-6


def test_the_bytes_of_truncated_labels_and_what_they_lose_are_said(data, tmp_path, caplog):
    module = data(label_folder=str(tmp_path / "labels"), label_epochs=2, top_k=3)
    with caplog.at_level("INFO"):
        batches = epoch_of(module, 1)
    online = epoch_of(data(), 1)
    for own, other in zip(batches, online, strict=True):
        torch.testing.assert_close(own.targets, decode(encode(other.targets, 3), 10))
        assert torch.equal(own.targets.argmax(1), other.targets.argmax(1))
    files = [load_file(file) for file in (tmp_path / "labels").iterdir()]
    tensors = sum(tensor.nbytes for file in files for tensor in file.values())
    assert module.footprint()["label_bytes"] == tensors == 2 * 30 * (4 * 2 + 3)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": []}, r"data\.teachers is empty"),
        ({"priors": [1.0]}, r"data\.priors: 1 numbers for 2 teachers"),
        ({"priors": [0.6, 0.4]}, "give percent"),
        ({"temperature": 0.0}, r"data\.temperature is 0\.0"),
        ({"parts": 0}, r"data\.parts is 0"),
        ({"parts": 9}, r"9 parts of 16 images have fewer than 2"),
        ({"top_k": 10, "label_folder": "x"}, r"data\.top_k is 10; give 1 to 9"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale"),
    ],
)
def test_nonsense_is_one_line(data, change, message):
    with pytest.raises(UsageError, match=message) as error:
        data(**change).setup()
    assert "\n" not in str(error.value)


def test_teachers_of_other_classes_are_named(data, committee, small_net):
    with pytest.raises(UsageError, match=r"number 1 has 7 classes, the data has 10"):
        data(teachers=[committee[0], small_net(num_classes=7)]).setup()


def test_stored_labels_that_are_not_there_need_teachers(data, tmp_path):
    with pytest.raises(UsageError, match=r"has no labels of epoch 0, .*no data\.teachers"):
        data(teachers=[], label_folder=str(tmp_path)).train_dataloader()
