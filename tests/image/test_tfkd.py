import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.core.errors import UsageError
from lit_distill.image.losses.logits import VirtualTeacher
from lit_distill.image.methods.tfkd import TfKD


def test_the_terms_are_labels_and_a_divergence_from_a_teacher_made_by_hand(step, tiny, blobs):
    labels = blobs.labels[:8].numpy()
    z = tiny()(blobs.images[:8]).detach().double().numpy()
    u = np.where(np.eye(3)[labels] > 0, 0.9, 0.05)
    moved, terms = step(TfKD(tiny(), 0.9, 2.0, tfkd_weight=0.7, label_weight=0.2))
    assert terms["tfkd"] == pytest.approx(0.7 * rel_entr(softmax(u / 2, 1), softmax(z, 1)).sum(1).mean(), rel=1e-3)
    assert terms["ce"] == pytest.approx(-0.2 * log_softmax(z, 1)[np.arange(8), labels].mean(), rel=1e-4)
    assert {"student.head.weight", "student.stage1.0.weight"} <= moved


def test_it_learns_without_a_teacher(trainer, blobs, tiny):
    module = TfKD(tiny(8), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    fit = trainer(max_epochs=20)
    fit.fit(module, datamodule=blobs)
    assert module.teacher is None
    assert fit.test(module, datamodule=blobs, verbose=False)[0]["test/acc"] == 1.0


def test_defaults_are_those_of_the_public_code(tiny):
    module = TfKD(tiny())
    loss = module.losses["tfkd"]
    assert (loss.correct_probability, loss.temperature) == (0.99, 20.0)
    assert (module.weights["tfkd"], module.label_weight) == (0.1, 0.9)


def test_values_without_a_meaning_are_refused():
    with pytest.raises(UsageError, match=r"correct_probability is 1\.5; it must be above 0 and at most 1"):
        VirtualTeacher(correct_probability=1.5)
    with pytest.raises(UsageError, match=r"temperature is 0\.0; it must be above 0"):
        VirtualTeacher(temperature=0.0)
