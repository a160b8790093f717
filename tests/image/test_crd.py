import copy

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed

from lit_distill.core.errors import UsageError
from lit_distill.image import ImageBatch, Outputs, Shapes
from lit_distill.image.losses.contrastive import ContrastiveRepresentation
from lit_distill.image.methods.crd import CRD

LABELS = torch.tensor([2, 0, 1, 1, 2, 0, 1, 2, 1, 1])


def built(**options):
    """A loss on features of 4 (student) and 6 (teacher) numbers, ten samples of three classes."""
    loss = ContrastiveRepresentation("s", "t", **({"dimensions": 5, "negatives": 7} | options))
    torch.manual_seed(3)
    loss.build(Shapes({"s": (4,)}, {"t": (6,)}, 3, lambda: LABELS))
    return loss


def inputs(index, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(10, 4, generator=generator)[index], torch.randn(10, 6, generator=generator)[index]
    images, logits = torch.zeros(len(index), 2, 8, 8), torch.zeros(len(index), 3)
    batch = ImageBatch(images, LABELS[index], index)
    return Outputs(logits, {"s": student.requires_grad_()}), Outputs(logits, {"t": teacher.requires_grad_()}), batch


def embedded(layer, feature):
    e = feature.detach().double().numpy() @ layer.weight.detach().double().numpy().T + layer.bias.detach().numpy()
    return e / np.linalg.norm(e, axis=1, keepdims=True)


@pytest.fixture
def step(step):
    """A step, without the memory banks in what moved: they move by their own rule."""

    def take(module):
        moved, terms = step(module)
        memories = {key for key in moved if key.startswith("losses.crd.") and "embedding" not in key}
        assert memories == {
            f"losses.crd.{role}_{part}" for role in ("student", "teacher") for part in ("memory", "normalizer")
        }
        return moved - memories, terms

    return take


def test_method(check_method):
    module = check_method(lambda student, teacher: CRD(student, teacher, negatives=32), extra=("losses",))
    assert module.losses["crd"].student_memory.shape == (24, 128)


def test_defaults_are_the_published_ones(tiny):
    module = CRD(tiny(), tiny())
    loss = module.losses["crd"]
    assert (module.weights["crd"], module.label_weight) == (0.8, 1.0)
    assert (loss.dimensions, loss.negatives, loss.temperature, loss.momentum) == (128, 16384, 0.07, 0.5)


def test_negatives_are_of_other_classes_and_evenly_drawn():
    loss = built(negatives=30_000)
    drawn = loss.draw_negatives(torch.tensor([0, 1, 2, 1]))
    assert drawn.shape == (4, 30_000)
    for own, row in zip((0, 1, 2, 1), drawn, strict=True):
        counts = torch.bincount(row, minlength=10)
        assert counts[own == LABELS].tolist() == [0] * int((own == LABELS).sum())
        others = counts[own != LABELS].double()
        # Within five standard deviations of even.
        expected = 30_000 / len(others)
        assert float((others - expected).abs().max()) < 5 * expected**0.5


def test_value_and_memories_after_a_step_are_those_of_the_formulas():
    loss, index = built(), torch.tensor([4, 1, 9])
    student, teacher, batch = inputs(index)
    memory = {role: getattr(loss, f"{role}_memory").double().numpy().copy() for role in ("student", "teacher")}
    torch.manual_seed(11)
    value = loss(student, teacher, batch, 0)
    torch.manual_seed(11)
    rows = torch.cat([index[:, None], loss.draw_negatives(batch.labels)], 1).numpy()
    e = {
        "student": embedded(loss.student_embedding, student.features["s"]),
        "teacher": embedded(loss.teacher_embedding, teacher.features["t"]),
    }
    expected = 0.0
    for anchor, other in (("student", "teacher"), ("teacher", "student")):
        scores = np.exp(np.einsum("bd,bkd->bk", e[anchor], memory[other][rows]) / 0.07)
        z = scores.mean() * 10
        assert float(getattr(loss, f"{anchor}_normalizer")) == pytest.approx(z, rel=1e-4)
        h = scores / z / (scores / z + 7 / 10)
        expected -= (np.log(h[:, 0]).sum() + np.log(1 - h[:, 1:]).sum()) / 3
        # The row moves half the way, after it has been read, and back to unit length.
        moved = memory[anchor].copy()
        moved[index] = 0.5 * moved[index] + 0.5 * e[anchor]
        moved[index] /= np.linalg.norm(moved[index], axis=1, keepdims=True)
        np.testing.assert_allclose(getattr(loss, f"{anchor}_memory"), moved, atol=1e-6)
    assert float(value) == pytest.approx(expected, rel=1e-4)


def test_rows_have_unit_length_and_constants_stay():
    loss = built()
    loss(*inputs(torch.tensor([0, 1, 2])), 0)
    constants = loss.student_normalizer.clone(), loss.teacher_normalizer.clone()
    for seed in range(1, 4):
        loss(*inputs(torch.tensor([3, 1, 8]), seed), seed)
    assert (loss.student_normalizer, loss.teacher_normalizer) == constants
    for memory in (loss.student_memory, loss.teacher_memory):
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(10))
        assert not memory.requires_grad


def test_gradients_reach_both_embeddings_and_the_student_and_not_the_teachers_feature():
    loss = built()
    student, teacher, batch = inputs(torch.tensor([0, 1, 2]))
    loss(student, teacher, batch, 0).backward()
    assert teacher.features["t"].grad is None
    assert float(student.features["s"].grad.norm()) > 0
    assert all(float(parameter.grad.norm()) > 0 for parameter in loss.parameters())


def test_gradient_is_that_of_the_memory_as_it_was_read():
    loss, index = built().double(), torch.tensor([0, 1, 2])
    student, teacher, batch = inputs(index)
    feature = student.features["s"].detach().double()
    start = copy.deepcopy(loss.state_dict())

    def value(x):
        loss.load_state_dict(start)
        torch.manual_seed(2)
        known = Outputs(teacher.logits, {"t": teacher.features["t"].detach().double()})
        return loss(Outputs(student.logits, {"s": x}), known, batch, 0)

    value(feature)
    # The constant set by this batch, so that it is no function of the feature.
    start["student_normalizer"], start["teacher_normalizer"] = loss.student_normalizer, loss.teacher_normalizer
    start = copy.deepcopy(start)
    x = feature.requires_grad_()
    value(x).backward()
    for place in ((0, 0), (2, 3)):
        moved = [feature.detach().clone() for _ in range(2)]
        moved[0][place] += 1e-6
        moved[1][place] -= 1e-6
        quotient = (value(moved[0]) - value(moved[1])).item() / 2e-6
        assert float(x.grad[place]) == pytest.approx(quotient, rel=1e-4)


def test_a_resumed_run_has_the_memories_of_the_uninterrupted(trainer, blobs, tiny, tmp_path):
    def module():
        return CRD(tiny(), tiny(6, seed=5), negatives=9)

    whole = module()
    trainer(max_epochs=2).fit(whole, datamodule=blobs)
    half = module()
    first = trainer(max_epochs=1)
    first.fit(half, datamodule=blobs)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    trainer(max_epochs=2).fit(resumed, datamodule=blobs, ckpt_path=tmp_path / "half.ckpt")
    state = resumed.state_dict()
    assert not torch.equal(half.losses["crd"].student_memory, whole.losses["crd"].student_memory)
    assert {"losses.crd.student_memory", "losses.crd.teacher_normalizer"} <= set(state)
    for key, value in whole.state_dict().items():
        assert torch.equal(state[key], value), key


def _process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loss = built()
    with torch.no_grad():
        for seed, index in enumerate(([0, 1, 2, 3], [9, 3, 5, 7])):
            torch.manual_seed(100 + rank)
            loss(*inputs(torch.tensor(index).chunk(2)[rank], seed), seed)
    torch.save(loss.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_have_the_same_memories_and_constants(tmp_path):
    mp.start_processes(_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key
    # As one process on the whole batch: what is remembered does not depend on the negatives.
    loss = built()
    for seed, index in enumerate(([0, 1, 2, 3], [9, 3, 5, 7])):
        loss(*inputs(torch.tensor(index), seed), seed)
    torch.testing.assert_close(first["student_memory"], loss.student_memory)
    torch.testing.assert_close(first["teacher_memory"], loss.teacher_memory)


@pytest.mark.parametrize(("key", "value"), [("negatives", 0), ("temperature", 0.0)])
def test_options_that_mean_nothing_are_refused(key, value):
    with pytest.raises(UsageError, match=f"{key} is {value}"):
        ContrastiveRepresentation(**{key: value})


def test_a_training_set_of_one_class_has_no_negatives(trainer, blobs, tiny):
    blobs.labels = torch.zeros_like(blobs.labels)
    with pytest.raises(UsageError, match="all training samples have one class"):
        trainer().fit(CRD(tiny(), tiny()), datamodule=blobs)
