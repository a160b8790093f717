import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch_geometric.nn.models import GIN

from lit_distill.core import Linear
from lit_distill.core.errors import UsageError
from lit_distill.graph import KD, DeepSets, GraphClassifier, GraphNetwork


def gin(seed=0, **kwargs):
    torch.manual_seed(seed)
    return GraphNetwork(GIN(8, 8, 2, **kwargs), [3], 2)


def test_terms_are_those_of_the_formula_and_the_teacher_stays_as_it_was(trainer, data):
    student, teacher = gin(), gin(1, norm="batch_norm")
    module = KD(student, teacher, temperature=3.0, kd_weight=0.7, label_weight=0.2)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    batch = data.part("train").batch(torch.arange(data.part_size("train")))
    with torch.no_grad():
        z_s, z_t = gin()(batch).double().numpy(), teacher.eval()(batch).double().numpy()
    p, log_q = softmax(z_t / 3, 1), log_softmax(z_s / 3, 1)
    divergence = 9 * (p * (log_softmax(z_t / 3, 1) - log_q)).sum(1).mean()
    ce = -log_softmax(z_s, 1)[np.arange(len(z_s)), batch.labels].mean()
    trainer().fit(module, datamodule=data)
    assert float(module.terms["kd"]) == pytest.approx(0.7 * divergence, rel=1e-4)
    assert float(module.terms["ce"]) == pytest.approx(0.2 * ce, rel=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(student.head.parameters(), gin().head.parameters(), strict=True))


def test_a_student_of_the_teacher_alone_agrees_with_it(trainer, data):
    module = KD(gin(), gin(1), temperature=1.0, kd_weight=1.0, label_weight=0.0)
    module.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.01)
    fit = trainer(max_epochs=150)
    fit.fit(module, datamodule=data)
    result = fit.test(module, datamodule=data, verbose=False)[0]
    assert result["test/agreement"] >= 0.85
    assert {"test/teacher_acc", "test/auroc"} <= set(result)


def test_without_a_weight_for_the_teacher_it_is_plain_training(trainer, data):
    plain, module = GraphClassifier(gin()), KD(gin(), gin(1), kd_weight=0.0, label_weight=1.0)
    for own in (plain, module):
        own.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
        trainer(max_epochs=3).fit(own, datamodule=data)
    assert set(module.terms) == {"ce"}
    for a, b, first in zip(*(own.student.parameters() for own in (plain, module)), gin().parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, first)


def test_schedules_are_followed(trainer, data):
    module = KD(gin(), gin(1), temperature=Linear(4.0, 2.0, 2), kd_weight=Linear(0.0, 1.0, 1))
    seen = []
    combine = module.combine
    module.combine = lambda terms: seen.append(float(terms.get("kd", 0.0))) or combine(terms)
    trainer(max_epochs=2).fit(module, datamodule=data)
    assert seen[0] == 0.0
    assert seen[1] > 0.0


def test_a_student_without_messages_does_not_see_edges(random_set):
    graphs = random_set(count=4)
    network = GraphNetwork(DeepSets(8, 8, 2), [3], 2).eval()
    batch = graphs.batch(torch.arange(4))
    cut = batch._replace(edge_index=batch.edge_index[:, :2])
    assert torch.equal(network(batch), network(cut))
    assert not torch.equal(gin().eval()(batch), gin().eval()(cut))


def test_teachers_that_do_not_fit_are_refused(trainer, data):
    with pytest.raises(UsageError, match=r"model\.temperature is 0\.0; it must be above 0"):
        KD(gin(), gin(), temperature=0.0)
    with pytest.raises(UsageError, match=r"model\.teacher has 5 classes, the data 2"):
        trainer().fit(KD(gin(), GraphNetwork(GIN(8, 8, 1), [3], 5)), datamodule=data)
