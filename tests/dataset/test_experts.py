import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn

from lit_distill.core.errors import RunError, UsageError
from lit_distill.dataset.experts import ExpertBuffer, data_fingerprint, network_fingerprint
from lit_distill.dataset.methods.experts import ExpertTrajectories
from lit_distill.dataset.models import DistillationConvNet
from lit_distill.experiment.resume_point import ResumePoint
from lit_distill.image import DigitsDataModule


def convnet(width=2, **kwargs):
    torch.manual_seed(0)
    return DistillationConvNet(10, width, 1, image_size=8, in_channels=1, **kwargs)


def digits(**kwargs):
    return DigitsDataModule(train_size=90, batch_size=30, **kwargs)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def halved(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


@pytest.fixture
def run(trainer, tmp_path):
    """Trains experts, and returns the module and their buffer."""

    def train(max_epochs=4, name="run", ckpt_path=None, student=None, data=None, callbacks=(), **kwargs):
        module = ExpertTrajectories(student or convnet(), **{"epochs": 2, "optimizer": momentum, **kwargs})
        logger = CSVLogger(tmp_path, name, "v")
        fit = trainer(max_epochs=max_epochs, logger=logger, callbacks=list(callbacks), enable_checkpointing=True)
        fit.fit(module, datamodule=data or digits(), ckpt_path=ckpt_path)
        return module, ExpertBuffer.open(tmp_path / name / "v")

    return train


# ---- training ------------------------------------------------------------------------------------------------------


def test_a_row_is_what_the_parameters_were_after_that_epoch(run):
    rows = []

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0 and trainer.current_epoch % 2 == 0:
                self.keep(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.is_last_batch:
                self.keep(pl_module)

        def keep(self, module):
            rows.append(torch.cat([p.detach().clone().reshape(-1) for p in module.student.parameters()]))

    _, buffer = run(callbacks=[Record()])
    assert len(buffer) == 2
    found = [row for expert in range(2) for row in buffer.read(expert, 0, 1, 2)]
    assert len(rows) == 6
    for own, recorded in zip(found, rows, strict=True):
        assert torch.equal(own, recorded)
    for number, row in enumerate(found):  # no two alias one another, nor the live weights
        assert all(not torch.equal(row, other) for other in found[:number])


def test_every_expert_begins_anew_with_optimizer_and_schedule(run):
    data = digits(seed=3)
    _, buffer = run(data=data, lr_scheduler=halved)
    start, first, last = buffer.read(1, 0, 1, 2)
    # By hand: plain torch from the second expert's first parameters, on the batches of the run's third epoch.
    network = convnet()
    torch.nn.utils.vector_to_parameters(start, network.parameters())
    optimizer = momentum(network.parameters())
    loader = digits(seed=3).train_dataloader()
    for epoch, wanted in ((2, first), (3, last)):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(batch.images), batch.labels).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05
        torch.testing.assert_close(torch.nn.utils.parameters_to_vector(network.parameters()).detach(), wanted)


def test_images_are_augmented_each_with_numbers_of_its_own(run):
    seen = []
    student = convnet()
    student.layer1[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    data = digits(seed=1)
    run(student=student, max_epochs=2, operations="cutout", data=data)
    loader = digits(seed=1).train_dataloader()
    raw = next(iter(loader)).images
    (augmented,) = [images for images in seen if images.shape == raw.shape][:1]
    holes = (augmented != raw) | (augmented == 0)
    assert torch.equal(augmented[~holes], raw[~holes])
    assert (augmented[holes] == 0).all()
    assert len({tuple(hole.flatten().tolist()) for hole in holes}) > 5


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_goes_on_inside_the_expert(run, tmp_path, stop):
    _, whole = run(name="whole", data=digits(seed=0))
    path = tmp_path / "last.ckpt"
    callbacks = [ResumePoint(path)]
    # After one epoch there is no finished expert yet, and nothing to open.
    with nullcontext() if stop > 1 else pytest.raises(UsageError, match="holds no experts"):
        run(max_epochs=stop, name="half", callbacks=callbacks, data=digits(seed=0))
    _, resumed = run(name="half", ckpt_path=path, data=digits(seed=0))
    for expert in range(2):
        assert torch.equal(load_file(whole.path(expert))["parameters"], load_file(resumed.path(expert))["parameters"])
    assert whole.description == resumed.description


def test_the_description_says_what_the_experts_are(run):
    data = digits()
    module, buffer = run(data=data)
    assert buffer.epochs == 2
    assert buffer.description["lr"] == 0.1
    assert buffer.description["data"]["samples"] == 90
    assert buffer.description["network"]["parameters"][0] == ["layer1.0.weight", [2, 1, 3, 3]]
    buffer.check(convnet(), data_fingerprint(data))
    assert load_file(buffer.path(0))["parameters"].shape == (3, sum(p.numel() for p in module.student.parameters()))


def test_an_unfinished_expert_is_not_written(run):
    _, buffer = run(max_epochs=3)
    assert len(buffer) == 1
    warns = pytest.warns(UserWarning, match=r"model\.epochs is 9, and the run ended after 1; no expert is finished")
    with warns, pytest.raises(UsageError, match="holds no experts"):
        run(max_epochs=1, epochs=9, name="short")


# ---- the folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def buffer(tmp_path):
    made = ExpertBuffer.create(tmp_path / "experts", convnet(), {"samples": 3, "data": "abc"}, epochs=2, lr=0.1)
    count = sum(parameter.numel() for parameter in convnet().parameters())
    for expert in range(3):
        made.write(expert, torch.full((3, count), 10.0 * expert) + torch.arange(3.0)[:, None])
    return made


def test_segments_are_read_by_expert_and_epoch(buffer, tmp_path):
    for folder in (tmp_path, tmp_path / "experts"):
        found = ExpertBuffer.open(folder)
        assert len(found) == 3
        first, last = found.read(2, 0, 2)
        assert set(first.tolist()) == {20.0}
        assert set(last.tolist()) == {22.0}
        assert first.untyped_storage().nbytes() == first.nbytes  # the rest of the file is let go


def test_a_gap_ends_the_experts(buffer):
    buffer.path(1).unlink()
    assert len(buffer) == 1


def test_an_interrupted_writing_leaves_no_file(buffer, monkeypatch):
    def broken(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_distill.dataset.experts.save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        buffer.write(3, torch.zeros(3, 2))
    assert len(buffer) == 3
    assert sorted(path.name for path in buffer.folder.iterdir()) == [
        *(f"expert_000{n}.safetensors" for n in range(3)),
        "experts.json",
    ]


def test_mistakes_in_the_folder_are_told_in_one_line(buffer, tmp_path):
    with pytest.raises(UsageError, match=r"model\.experts: .*nowhere holds no experts; give the folder of a run"):
        ExpertBuffer.open(tmp_path / "nowhere")
    buffer.path(0).write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"expert_0000\.safetensors is corrupt"):
        buffer.read(0, 1)
    buffer.path(0).unlink()
    with pytest.raises(UsageError, match=r"no expert in .* is complete; let its run reach model\.epochs \(2\)"):
        ExpertBuffer.open(tmp_path)
    path = buffer.folder / "experts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
    with pytest.raises(UsageError, match="holds experts of version 9, this program reads experts of 1"):
        ExpertBuffer.open(tmp_path)
    for text in ("{", "[]", '{"kind": "experts", "version": 1}'):
        path.write_text(text)
        with pytest.raises(RunError, match=r"experts\.json is corrupt"):
            ExpertBuffer.open(tmp_path)


def test_experts_of_another_network_or_other_data_are_refused(buffer):
    with pytest.raises(
        UsageError, match=r"experts of class DistillationConvNet, the student is a Linear; give model\.stud"
    ):
        buffer.check(nn.Linear(2, 2), {})
    says = (
        r"experts with layer1\.0\.weight of shape \(2, 1, 3, 3\) where the student has layer1\.0\.weight of shape \(3,"
    )
    with pytest.raises(UsageError, match=says):
        buffer.check(convnet(3), {})
    with pytest.raises(UsageError, match=r"other data \(data was abc, now xyz\); give the same data, or train others"):
        buffer.check(convnet(), {"samples": 3, "data": "xyz"})
    buffer.check(convnet(), {"samples": 3, "data": "abc"})


def test_the_order_of_parameters_is_part_of_the_network():
    class Pair(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            for name in (first, second):
                self.register_parameter(name, nn.Parameter(torch.zeros(2)))

    assert network_fingerprint(Pair("a", "b")) != network_fingerprint(Pair("b", "a"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, r"model\.epochs is 0; give 1 or more"),
        ({"operations": "blur"}, "there is no 'blur'"),
        ({"student": convnet(norm="batch")}, r"running_mean of DistillationConvNet is no parameter"),
    ],
)
def test_mistakes_are_told_in_one_line(trainer, options, says):
    with pytest.raises(UsageError, match=says):
        trainer(max_epochs=1).fit(ExpertTrajectories(**{"student": convnet(), **options}), datamodule=digits())
