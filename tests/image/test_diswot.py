import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.image import ImageDistiller, Term
from lit_distill.image.losses.diswot import RelationSimilarity, SemanticSimilarity
from lit_distill.image.methods.diswot import DisWOT


def apart(*features):
    """The mean squared difference of the samples' similarities."""
    rows = [feature.detach().double().flatten(1).numpy() for feature in features]
    own, others = (gram / np.linalg.norm(gram, axis=1, keepdims=True) for gram in (f @ f.T for f in rows))
    return float(np.square(own - others).mean())


def test_method(check_method, tiny):
    # The semantic term wants the teacher's last width.
    check_method(lambda student, teacher: DisWOT(tiny(6), teacher))


def test_defaults_are_kd_of_the_public_code_and_both_metrics(tiny):
    module = DisWOT(tiny(), tiny())
    assert module.weights == {"kd": 0.9, "semantic": 1.0, "relation": 1.0}
    assert (module.losses["kd"].temperature, module.label_weight) == (4.0, 0.1)


def test_terms_are_the_metrics_of_the_trained_teacher_and_the_student_in_training(step, tiny, blobs):
    images, labels = blobs.images[:8], blobs.labels[:8]
    teacher, student = tiny(4, seed=5).eval(), tiny(4)

    def outer_products(network):
        """Autograd's gradient of the head, and from it the normalised matrices."""
        F.cross_entropy(network(images), labels).backward()
        gradient = network.head.weight.grad.double()
        return F.normalize(gradient[:, :, None] * gradient[:, None, :], dim=2, eps=1e-30)

    semantic = float((outer_products(student) - outer_products(teacher)).square().sum()) / (3 * 4)
    relation = apart(*(network.stage2(network.stage1(images)) for network in (student, teacher)))
    teacher.zero_grad()
    _, terms = step(DisWOT(tiny(4), teacher, semantic_weight=0.5, relation_weight=3.0))
    assert terms["semantic"] == pytest.approx(0.5 * semantic, rel=1e-3)
    assert terms["relation"] == pytest.approx(3.0 * relation, rel=1e-3)
    assert {"ce", "kd"} < set(terms)


@pytest.mark.parametrize("loss", ["semantic", "relation"])
def test_a_student_that_is_the_teacher_has_no_loss(step, tiny, loss):
    weights = {"kd_weight": 0.0, "label_weight": 0.0, "semantic_weight": 0.0, "relation_weight": 0.0}

    class Plain(nn.Sequential):  # without BatchNorm, train and eval mode are the same
        stages, penultimate = ("0",), "2"

    def network():
        torch.manual_seed(1)
        return Plain(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))

    _, terms = step(DisWOT(network(), network(), **(weights | {f"{loss}_weight": 1.0})))
    assert terms[loss] == pytest.approx(0.0, abs=1e-9)


def test_the_semantic_term_trains_the_whole_network_and_the_relation_term_all_but_the_head(step, tiny):
    off = {"kd_weight": 0.0, "label_weight": 0.0}
    plain = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731 (no weight decay moves the rest)
    moved, _ = step(DisWOT(tiny(6), tiny(6, seed=5), relation_weight=0.0, optimizer=plain, **off))
    assert {"student.head.weight", "student.stage1.0.weight"} <= moved
    moved, _ = step(DisWOT(tiny(6), tiny(6, seed=5), semantic_weight=0.0, optimizer=plain, **off))
    assert "student.stage1.0.weight" in moved
    assert "student.head.weight" not in moved


def test_other_last_widths_are_refused_by_the_semantic_term_alone(trainer, blobs, tiny, step):
    with pytest.raises(UsageError, match="reads 4 features, the teacher's 6"):
        trainer().fit(DisWOT(tiny(4), tiny(6)), datamodule=blobs)
    teacher = tiny(6, seed=5).eval()
    expected = apart(*(network.stage2(network.stage1(blobs.images[:8])) for network in (tiny(4), teacher)))
    _, terms = step(ImageDistiller(tiny(4), teacher, [Term(RelationSimilarity(), 1.0)]))
    assert terms["relation"] == pytest.approx(expected, rel=1e-3)


def test_taps_can_be_named(step, tiny, blobs):
    images, labels = blobs.images[:8], blobs.labels[:8]
    student, teacher = tiny(4), tiny(4, seed=5).eval()
    own, others = student.stage1(images), teacher.stage2(teacher.stage1(images))

    def outer_products(network, feature):
        """The gradient of a head that reads this feature's mean, and from it the normalised matrices."""
        residual = network(images).softmax(1) - F.one_hot(labels, 3)
        gradient = torch.einsum("bk,bd->kd", residual, feature.mean((2, 3))).double()
        return F.normalize(gradient[:, :, None] * gradient[:, None, :], dim=2, eps=1e-30)

    semantic = (outer_products(student, own) - outer_products(teacher, others)).square().sum() / (3 * 4)
    terms = [Term(SemanticSimilarity("stage1", "stage2"), 1.0), Term(RelationSimilarity("stage1", "stage2"), 1.0)]
    _, values = step(ImageDistiller(tiny(4), teacher, terms))
    assert values["semantic"] == pytest.approx(float(semantic), rel=1e-3)
    assert values["relation"] == pytest.approx(apart(own, others), rel=1e-3)
