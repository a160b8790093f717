import pytest
import torch
from scipy.special import log_softmax

from lit_distill.core.errors import UsageError
from lit_distill.image import Supervised


def test_one_step_moves_the_whole_student(step, tiny):
    module = Supervised(tiny())
    moved, terms = step(module)
    assert {name for name, _ in module.named_parameters()} <= moved
    assert list(terms) == ["ce"]
    assert module.teacher is None


def test_the_loss_is_cross_entropy_on_labels(step, tiny, blobs):
    logits = tiny()(blobs.images[:8]).detach().double().numpy()
    _, terms = step(Supervised(tiny()))
    assert terms["ce"] == pytest.approx(-log_softmax(logits, axis=1)[range(8), blobs.labels[:8]].mean(), rel=1e-4)


def test_training_learns_what_can_be_learned_and_all_metrics_are_reported(trainer, blobs, tiny):
    module = Supervised(tiny(8), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    fit = trainer(max_epochs=20)
    fit.fit(module, datamodule=blobs)
    result = fit.test(module, datamodule=blobs, verbose=False)[0]
    more = {"test/acc_balanced", "test/mce", "test/ece_adaptive", "test/ece_classwise", "test/brier"}
    assert set(result) == {"test/acc", "test/ece", "test/nll", *more}
    assert result["test/acc"] == 1.0
    assert sum(module.panels["reliability"]["count"]) == 24


def test_predictions_carry_index_label_and_probabilities(trainer, blobs, tiny):
    blobs.predict_dataloader = blobs.test_dataloader
    rows = trainer().predict(Supervised(tiny()), datamodule=blobs)
    assert torch.cat([row["index"] for row in rows]).tolist() == list(range(24))
    assert torch.equal(torch.cat([row["label"] for row in rows]), blobs.labels)
    torch.testing.assert_close(rows[0]["probabilities"].sum(1), torch.ones(8))


def test_a_student_with_other_classes_than_the_data_is_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match=r"model\.student has 4 classes, the data has 3"):
        trainer().fit(Supervised(tiny(num_classes=4)), datamodule=blobs)


def test_a_network_that_returns_no_logits_is_refused(trainer, blobs):
    with pytest.raises(UsageError, match=r"model\.student: Conv2d returns \(2, 3, 8, 8\); a classifier returns logits"):
        trainer().fit(Supervised(torch.nn.Conv2d(2, 3, 1)), datamodule=blobs)


def test_no_loss_at_all_is_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match="nothing is left to train on"):
        trainer().fit(Supervised(tiny(), label_weight=0.0), datamodule=blobs)


def test_missing_data_is_said(trainer, blobs, tiny):
    with pytest.raises(UsageError, match="data is missing"):
        trainer().fit(Supervised(tiny()), blobs.train_dataloader())


def test_a_temperature_divides_the_logits_in_training_alone(trainer, step, tiny, blobs):
    logits = tiny()(blobs.images[:8]).detach().double().numpy()
    _, terms = step(Supervised(tiny(), temperature=20.0, label_weight=2.0))
    expected = -log_softmax(logits / 20, axis=1)[range(8), blobs.labels[:8]].mean()
    assert terms == {"ce": pytest.approx(2 * expected, rel=1e-5)}
    plain, tempered = (
        trainer().test(Supervised(tiny(), temperature=temperature), datamodule=blobs, verbose=False)[0]
        for temperature in (1.0, 20.0)
    )
    assert plain == tempered


def test_training_at_a_temperature_makes_logits_larger(trainer, tiny, blobs):
    sizes = []
    for temperature in (1.0, 20.0):
        module = Supervised(tiny(8), temperature, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
        trainer(max_epochs=20).fit(module, datamodule=blobs)
        logits = module.student.eval()(blobs.images)
        sizes.append((logits.amax(1) - logits.mean(1)).mean().item())
    assert sizes[1] > 2 * sizes[0]


def test_a_temperature_that_is_not_positive_is_refused(tiny):
    with pytest.raises(UsageError, match=r"model\.temperature is -1\.0; it must be above 0"):
        Supervised(tiny(), temperature=-1.0)
