import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import Linear
from lit_distill.image import KD, ImageDistiller, LogitKL, Term


def test_method(check_method):
    check_method(KD)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_terms_are_weighted_cross_entropy_and_t2_divergence(step, tiny, blobs, temperature):
    labels = blobs.labels[:8].numpy()
    teacher = tiny(6, seed=5)
    student_logits = tiny()(blobs.images[:8]).detach().double().numpy()
    teacher_logits = teacher.eval()(blobs.images[:8]).detach().double().numpy()
    kl = rel_entr(softmax(teacher_logits / temperature, 1), softmax(student_logits / temperature, 1)).sum(1).mean()
    _, terms = step(KD(tiny(), teacher, temperature=temperature, kd_weight=0.7, label_weight=0.2))
    assert terms["kd"] == pytest.approx(0.7 * temperature**2 * kl, rel=1e-3)
    assert terms["ce"] == pytest.approx(-0.2 * log_softmax(student_logits, 1)[np.arange(8), labels].mean(), rel=1e-4)


def test_defaults_are_the_papers_of_the_cifar_protocol(tiny):
    module = KD(tiny(), tiny())
    assert (module.losses["kd"].temperature, module.weights["kd"], module.label_weight) == (4.0, 0.9, 0.1)


def test_schedules_of_weights_and_temperature_follow_the_iteration(trainer, blobs, mean_teacher, tiny):
    seen = []
    module = KD(tiny(), mean_teacher(), label_weight=Linear(1.0, 0.0, 2), kd_weight=Linear(0.0, 0.9, 3))
    combine = module.combine
    module.combine = lambda terms: seen.append(set(terms)) or combine(terms)
    trainer(max_epochs=2, log_every_n_steps=4).fit(module, datamodule=blobs)
    # A term without weight costs nothing: the teacher's at iteration 0, the labels from iteration 2 on.
    assert seen == [{"ce"}, {"ce", "kd"}] + [{"kd"}] * 4


def test_a_student_learns_from_the_teacher_alone(trainer, blobs, mean_teacher, tiny):
    module = KD(
        tiny(8), mean_teacher(), label_weight=0.0, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02)
    )
    fit = trainer(max_epochs=20)
    fit.fit(module, datamodule=blobs)
    result = fit.test(module, datamodule=blobs, verbose=False)[0]
    assert result["test/teacher_acc"] == 1.0
    assert result["test/agreement"] == result["test/acc"] == 1.0


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(UsageError, match="it must be above 0"):
        LogitKL(temperature)


def test_a_missing_teacher_and_one_with_other_classes_are_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match=r"model\.teacher has 5 classes, the data has 3"):
        trainer().fit(KD(tiny(), tiny(num_classes=5)), datamodule=blobs)
    with pytest.raises(UsageError, match=r"model\.teacher is missing"):
        ImageDistiller(tiny(), None, [Term(LogitKL(), 1.0)])


def test_a_teacher_that_no_term_asks_for_does_not_run(trainer, blobs, tiny):
    ran = []
    module = KD(tiny(), tiny(6), kd_weight=Linear(0.0, 0.9, 1, begin=1))
    module.run_teacher = lambda batch: ran.append(module.iteration) or type(module).run_teacher(module, batch)
    trainer(max_epochs=1).fit(module, datamodule=blobs)
    assert ran == [2]
