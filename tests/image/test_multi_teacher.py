import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.core.errors import UsageError
from lit_distill.image import KD
from lit_distill.image.data import ImageBatch
from lit_distill.image.distillation import Outputs
from lit_distill.image.ensemble import Ensemble
from lit_distill.image.methods.multi_teacher import MultiTeacherKD, confidence_weights

T = 4.0


def loss_of(combination, student, teachers, labels, temperature=T):
    """Value of the method's term and its gradients, for logits (B, K) and (M, B, K)."""
    nets = [torch.nn.Identity() for _ in teachers]
    loss = MultiTeacherKD(torch.nn.Identity(), nets, combination, temperature).losses["kd"]
    loss.resolve(torch.nn.Identity(), Ensemble(nets))
    student, teachers = student.clone().requires_grad_(), teachers.clone().requires_grad_()
    batch = ImageBatch(torch.zeros(len(student), 1, 1, 1), labels, torch.arange(len(student)))
    features = dict(zip(loss.teacher_taps, teachers, strict=True))
    value = loss(Outputs(student, {}), Outputs(teachers[0], features), batch, 0)
    value.backward()
    return value.item(), student.grad, teachers.grad


@pytest.fixture
def logits():
    return 3 * torch.randn(6, 5), 3 * torch.randn(3, 6, 5), torch.arange(6) % 5


def by_hand(combination, student, teachers, labels, temperature=T):
    """The loss in plain loops."""
    student, teachers = student.double().numpy(), teachers.double().numpy()
    total = 0.0
    for sample, label in enumerate(labels.tolist()):
        own = softmax(student[sample] / temperature)
        tempered = [softmax(logits[sample] / temperature) for logits in teachers]
        if combination == "logits":
            total += rel_entr(softmax(teachers[:, sample].mean(0) / temperature), own).sum()
        elif combination == "probabilities":
            total += rel_entr(np.mean(tempered, 0), own).sum()
        else:
            losses = [-log_softmax(logits[sample])[label] for logits in teachers]
            share = np.exp(losses) / np.exp(losses).sum()
            weights = (1 - share) / (len(teachers) - 1)
            total += sum(w * rel_entr(p, own).sum() for w, p in zip(weights, tempered, strict=True))
    return temperature**2 * total / len(labels)


@pytest.mark.parametrize("combination", ["logits", "probabilities", "confidence"])
def test_the_student_alone_moves_and_is_saved_and_all_teachers_rest(step, trainer, tiny, blobs, tmp_path, combination):
    module = MultiTeacherKD(tiny(), [tiny(6, seed=5), tiny(5, seed=6)], combination)
    moved, _ = step(module)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"student"}
    assert trained <= moved
    assert not any(name.startswith("teacher.") for name in moved)
    module.train()
    assert not any(part.training for part in module.teacher.modules())
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in saved["state_dict"]} == {"student"}
    again = MultiTeacherKD(tiny(seed=9), [tiny(6, seed=5), tiny(5, seed=6)], combination)
    trainer(limit_val_batches=1).validate(again, datamodule=blobs, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    for key, value in module.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[key], value)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("combination", ["logits", "probabilities", "confidence"])
def test_the_loss_is_that_of_plain_loops(logits, combination, temperature):
    value, _, _ = loss_of(combination, *logits, temperature)
    assert value == pytest.approx(by_hand(combination, *logits, temperature), rel=1e-5)


@pytest.mark.parametrize("combination", ["logits", "probabilities", "confidence"])
def test_equal_teachers_are_one_teacher_and_a_student_like_them_has_no_loss(logits, combination):
    student, teachers, labels = logits
    same = teachers[:1].expand(3, -1, -1)
    value, _, _ = loss_of(combination, student, same, labels)
    alone = KD(torch.nn.Identity(), torch.nn.Identity(), T).losses["kd"]
    batch = ImageBatch(torch.zeros(6, 1, 1, 1), labels, torch.arange(6))
    assert value == pytest.approx(alone(Outputs(student, {}), Outputs(teachers[0], {}), batch, 0).item(), rel=1e-5)
    assert loss_of(combination, teachers[0], same, labels)[0] == pytest.approx(0, abs=1e-5)


def test_gradients_pull_to_the_combined_probabilities_and_teachers_get_none(logits):
    student, teachers, labels = logits
    p_student = (student / T).softmax(1)
    tempered = (teachers / T).softmax(2)
    targets = {
        "logits": (teachers.mean(0) / T).softmax(1),
        "probabilities": tempered.mean(0),
        "confidence": (confidence_weights(teachers, labels)[..., None] * tempered).sum(0),
    }
    for combination, target in targets.items():
        _, gradient, of_teachers = loss_of(combination, student, teachers, labels)
        torch.testing.assert_close(gradient, T * (p_student - target) / 6, rtol=1e-4, atol=1e-6)
        assert of_teachers is None


def test_weights_are_per_sample_sum_to_1_and_favour_the_sure_teacher():
    # Sample 0: teacher 0 is right and sure, teacher 1 is wrong and sure. Sample 1: the other way round.
    logits = torch.tensor([[[9.0, 0.0], [9.0, 0.0]], [[0.0, 9.0], [0.0, 9.0]]])
    weights = confidence_weights(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(weights.sum(0), torch.ones(2))
    torch.testing.assert_close(weights, torch.eye(2), atol=2e-4, rtol=0)
    # Three teachers: the worst gets nothing, the others share equally, whatever the difference between them.
    three = torch.tensor([[[50.0, 0.0]], [[50.0, 0.0]], [[0.0, 50.0]]])
    torch.testing.assert_close(confidence_weights(three, torch.tensor([0])), torch.tensor([[0.5], [0.5], [0.0]]))


def test_a_step_sees_every_teacher_and_the_labels(step, tiny, blobs):
    teachers = [tiny(6, seed=5).eval(), tiny(5, seed=6).eval()]
    with torch.no_grad():
        logits = torch.stack([teacher(blobs.images[:8]) for teacher in teachers])
        student = tiny()(blobs.images[:8])
    _, terms = step(MultiTeacherKD(tiny(), copy.deepcopy(teachers), kd_weight=0.5))
    assert list(terms) == ["ce", "kd"]
    assert terms["kd"] == pytest.approx(0.5 * by_hand("confidence", student, logits, blobs.labels[:8]), rel=1e-3)


def test_cached_teachers_teach_the_same(step, tiny, tmp_path):
    def build(**kwargs):
        return MultiTeacherKD(tiny(), [tiny(6, seed=5), tiny(5, seed=6)], **kwargs)

    _, terms = step(build())
    _, cached = step(build(teacher_cache=tmp_path / "cache.safetensors"))
    assert cached["kd"] == pytest.approx(terms["kd"], rel=1e-2)  # the cache is in half precision
    assert (tmp_path / "cache.safetensors").exists()


def test_test_measures_the_ensemble(trainer, tiny, mean_teacher, blobs):
    module = MultiTeacherKD(tiny(), [mean_teacher(), mean_teacher()])
    assert trainer().test(module, datamodule=blobs, verbose=False)[0]["test/teacher_acc"] == 1.0


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_teachers_are_refused(tiny, count):
    with pytest.raises(UsageError, match=rf"model\.teachers holds {count} network.*; give two or more"):
        MultiTeacherKD(tiny(), [tiny()] * count)


def test_what_does_not_fit_is_refused(trainer, tiny, blobs):
    with pytest.raises(UsageError, match="an ensemble have 3, 5 classes"):
        trainer().fit(MultiTeacherKD(tiny(), [tiny(), tiny(num_classes=5)]), datamodule=blobs)
    with pytest.raises(UsageError, match=r"model\.teacher has 5 classes, the data has 3"):
        trainer().fit(MultiTeacherKD(tiny(), [tiny(num_classes=5), tiny(num_classes=5)]), datamodule=blobs)
    with pytest.raises(UsageError, match=r"temperature is 0\.0"):
        MultiTeacherKD(tiny(), [tiny(), tiny()], temperature=0.0)


# ---- the ensemble ----------------------------------------------------------------------------------------------------


def test_an_ensembles_softmax_is_the_mean_of_probabilities(tiny, blobs):
    networks = [tiny(seed=seed).eval() for seed in (1, 2, 3)]
    images = blobs.images[:8]
    with torch.no_grad():
        found = Ensemble(networks)(images)
        expected = np.mean([softmax(network(images).double().numpy(), 1) for network in networks], 0)
    np.testing.assert_allclose(found.exp(), expected, rtol=1e-5)


def test_an_ensemble_is_a_teacher_like_any_other(step, tiny, blobs):
    ensemble = Ensemble([tiny(6, seed=5), tiny(5, seed=7)])
    with torch.no_grad():
        targets = softmax(ensemble.eval()(blobs.images[:8]).double().numpy() / T, 1)
        own = softmax(tiny()(blobs.images[:8]).double().numpy() / T, 1)
    moved, terms = step(KD(tiny(), ensemble, temperature=T, kd_weight=1.0))
    assert terms["kd"] == pytest.approx(T**2 * rel_entr(targets, own).sum(1).mean(), rel=1e-3)
    assert not any(name.startswith("teacher.") for name in moved)


def test_an_ensemble_of_none_is_refused():
    with pytest.raises(UsageError, match="an ensemble of none"):
        Ensemble([])
