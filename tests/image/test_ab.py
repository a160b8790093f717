import numpy as np
import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.image import ImageBatch, Outputs
from lit_distill.image.losses.ab import ActivationBoundary
from lit_distill.image.methods.ab import AB


def everything(student, teacher):
    """Both phases in one step, so that all parameters move."""
    module = AB(student, teacher, init_iterations=5)
    module.label_weight = 1.0
    return module


def test_method(check_method):
    module = check_method(everything, extra=("losses",))
    assert [c[0].weight.shape for c in module.losses["ab"].connectors] == [(6, 4, 1, 1)] * 2


def test_the_first_phase_leaves_the_classifier_alone_and_the_second_the_connectors(trainer, blobs, tiny):
    module = AB(tiny(), tiny(6, seed=5), init_iterations=3)
    seen, connectors = [], []
    combine = module.combine

    def recorded(terms):
        seen.append(set(terms))
        connectors.append([p.detach().clone() for p in module.losses["ab"].parameters()])
        return combine(terms)

    module.combine = recorded
    trainer(max_epochs=2).fit(module, datamodule=blobs)
    assert seen == [{"ab"}] * 3 + [{"ce"}] * 3
    assert not any(torch.equal(a, b) for a, b in zip(connectors[0], connectors[3], strict=True))
    assert all(map(torch.equal, connectors[3], module.losses["ab"].parameters()))
    assert not torch.equal(module.student.head.weight, tiny().head.weight)

    first = AB(tiny(), tiny(6, seed=5), init_iterations=3)
    trainer(max_epochs=1).fit(first, datamodule=blobs)
    assert torch.equal(first.student.head.weight, tiny().head.weight)
    assert not torch.equal(first.student.stage2[1].weight, tiny().stage2[1].weight)


def test_the_published_phase_and_weights_are_the_defaults(tiny):
    module = AB(tiny(), tiny())
    assert [module.weights["ab"](i) for i in (0, 23429, 23430)] == [0.003, 0.003, 0.0]
    assert [module.label_weight(i) for i in (0, 23429, 23430)] == [0.0, 0.0, 1.0]
    assert set(module.losses) == {"ab"}


def test_soft_labels_may_join_the_second_phase(trainer, blobs, tiny):
    module, seen = AB(tiny(), tiny(6, seed=5), init_iterations=1, kd_weight=0.9, label_weight=0.1), []
    combine = module.combine
    module.combine = lambda terms: seen.append(set(terms)) or combine(terms)
    trainer(max_epochs=1).fit(module, datamodule=blobs)
    assert seen == [{"ab"}] + [{"ce", "kd"}] * 2


def test_deeper_taps_count_twice_as_much_each():
    loss = ActivationBoundary(["a", "b", "c"], ["a", "b", "c"], margin=0.5)
    loss.connectors.extend(torch.nn.Identity() for _ in range(3))
    own, target = ({name: torch.randn(2, 3, 4, 4) for name in "abc"} for _ in range(2))
    batch = ImageBatch(torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.long), torch.arange(2))
    expected = 0.0
    for name, weight in (("a", 0.25), ("b", 0.5), ("c", 1.0)):
        s, t = own[name].double().numpy(), target[name].numpy()
        expected += weight * np.where(t > 0, np.maximum(0.5 - s, 0) ** 2, np.maximum(0.5 + s, 0) ** 2).sum() / 2
    value = loss(Outputs(torch.zeros(2, 3), own), Outputs(torch.zeros(2, 3), target), batch, 0)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_taps_are_read_before_activations(step, tiny):
    module = AB(tiny(), tiny(6, seed=5))
    step(module)
    assert module.losses["ab"].student_taps == ("stage1.2@input", "stage2.2@input")
    assert module.losses["ab"].teacher_taps == ("stage1.2@input", "stage2.2@input")


def test_shapes_that_cannot_meet_are_refused(trainer, blobs, tiny):
    deep = torch.nn.Sequential(torch.nn.MaxPool2d(4), torch.nn.Conv2d(2, 3, 1), tiny(3).pool, torch.nn.Linear(3, 3))
    with pytest.raises(UsageError, match=r"shape \(3, 2, 2\) to a teacher feature of shape \(6, 8, 8\); tap modules"):
        trainer().fit(AB(deep, tiny(6), ["1"], ["stage1"]), datamodule=blobs)
    with pytest.raises(
        UsageError, match=r"ab: student tap 'pool' has shape \(4,\); tap modules that return \(C, H, W\)"
    ):
        trainer().fit(AB(tiny(), tiny(6), ["pool"], ["stage1"]), datamodule=blobs)
