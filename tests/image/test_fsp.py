import numpy as np
import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.fsp import FSP


def everything(student, teacher):
    """Both phases in one step, so that all parameters move."""
    module = FSP(student, teacher, init_iterations=5)
    module.label_weight = 1.0
    return module


def test_method(check_method, tiny):
    # The student is as wide as the teacher.
    module = check_method(lambda _, teacher: everything(tiny(6), teacher))
    assert list(module.losses["fsp"].parameters()) == []


def test_the_first_phase_leaves_the_classifier_alone_and_the_second_the_teacher(trainer, blobs, tiny):
    module = FSP(tiny(), tiny(seed=5), init_iterations=3)
    ran, seen = [], []
    combine, run_teacher = module.combine, module.run_teacher
    module.combine = lambda terms: seen.append(set(terms)) or combine(terms)
    module.run_teacher = lambda batch: ran.append(module.iteration) or run_teacher(batch)
    trainer(max_epochs=1).fit(module, datamodule=blobs)
    assert torch.equal(module.student.head.weight, tiny().head.weight)
    assert not torch.equal(module.student.stage1[0].weight, tiny().stage1[0].weight)
    again = FSP(tiny(), tiny(seed=5), init_iterations=1)
    combine = again.combine
    again.combine = lambda terms: seen.append(set(terms)) or combine(terms)
    trainer(max_epochs=1).fit(again, datamodule=blobs)
    assert seen == [{"fsp"}] * 3 + [{"fsp"}] + [{"ce"}] * 2
    assert not torch.equal(again.student.head.weight, tiny().head.weight)


def test_soft_labels_may_join_the_second_phase(trainer, blobs, tiny):
    module, seen = FSP(tiny(), tiny(seed=5), init_iterations=1, kd_weight=0.9, label_weight=0.1), []
    combine = module.combine
    module.combine = lambda terms: seen.append(set(terms)) or combine(terms)
    trainer(max_epochs=1).fit(module, datamodule=blobs)
    assert seen == [{"fsp"}] + [{"ce", "kd"}] * 2


def test_the_term_is_the_mean_squared_difference_of_matrices(step, tiny, blobs):
    teacher, images = tiny(seed=5).eval(), blobs.images[:8]

    def matrices(network):
        with torch.no_grad():
            first = network.stage1(images)
            second = network.stage2(first).numpy()
        of_images = np.einsum("bihw,bjhw->bij", images.numpy(), first.numpy()) / 64
        first = first.numpy().reshape(8, 4, 4, 2, 4, 2).mean((3, 5))
        return of_images, np.einsum("bihw,bjhw->bij", first, second) / 16

    student = tiny()
    expected = sum(((own - its) ** 2).mean() for own, its in zip(matrices(student), matrices(teacher), strict=True))
    _, terms = step(FSP(tiny(), teacher, fsp_weight=2.0))
    assert terms["fsp"] == pytest.approx(2 * expected, rel=1e-3)


def test_the_flow_is_of_neighbours_summed(step, tiny):
    taps = ["stage1@input", "stage1", "stage2"]
    parts = [step(FSP(tiny(), tiny(seed=5), pair, pair))[1]["fsp"] for pair in (taps[:2], taps[1:])]
    assert step(FSP(tiny(), tiny(seed=5), taps, taps))[1]["fsp"] == pytest.approx(sum(parts), rel=1e-5)


def test_equal_networks_have_nothing_to_learn(step, tiny):
    # Before BatchNorm, which in the student is in training.
    _, terms = step(FSP(tiny(), tiny(), ["stage1@input", "stage1.0"], ["stage1@input", "stage1.0"]))
    assert terms["fsp"] == 0.0


def test_other_channels_and_a_single_tap_are_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match=r"student feature \(4, 8, 8\) and teacher feature \(6, 8, 8\) differ in chan"):
        trainer().fit(FSP(tiny(), tiny(6)), datamodule=blobs)
    with pytest.raises(UsageError, match="it compares neighbouring maps of a network and got one"):
        trainer().fit(FSP(tiny(), tiny(), ["stage1"], ["stage1"]), datamodule=blobs)
