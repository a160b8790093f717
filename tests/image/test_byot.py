import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.byot import BYOT


class Plain(nn.Module):
    """One stage."""

    stages = ("stage",)
    penultimate = "pool"

    def __init__(self):
        super().__init__()
        self.stage, self.pool, self.head = nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.pool(self.stage(images)).flatten(1))


def test_a_step_trains_student_and_exits_and_the_checkpoint_holds_both(step, tiny, tmp_path):
    module = BYOT(tiny())
    moved, terms = step(module)
    assert set(terms) == {"ce", "byot"}
    assert {name for name, p in module.named_parameters() if p.requires_grad} <= moved
    assert module.teacher is None
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {key.partition(".")[0] for key in saved} == {"student", "losses"}


def test_value_is_labels_divergence_and_distance_of_each_exit(step, tiny, blobs):
    images, labels = blobs.images[:8], blobs.labels[:8].numpy()
    module = BYOT(tiny(), distillation_weight=0.3, feature_weight=0.01, temperature=3.0, exit_weight=0.5)
    seen = {}
    combine = module.combine

    def before(terms):
        with torch.no_grad():
            student, (branch,) = tiny(), module.losses["byot"].exits
            first = student.stage1(images)
            embedding = student.pool(student.stage2(first))
            feature = branch.trunk(first)
            seen.update(f=feature, F=embedding, z=branch.head(feature), Z=student.head(embedding))
        return combine(terms)

    module.combine = before
    _, terms = step(module)
    f, deepest, z, own = (seen[key].double().numpy() for key in ("f", "F", "z", "Z"))
    cross_entropy = -log_softmax(z, 1)[np.arange(8), labels].mean()
    kl = rel_entr(softmax(own / 3, 1), softmax(z / 3, 1)).sum(1).mean()  # without T^2
    distance = ((f - deepest) ** 2).sum(1).mean()
    assert terms["byot"] == pytest.approx(0.5 * (0.7 * cross_entropy + 0.3 * kl + 0.01 * distance), rel=1e-4)


def test_the_deepest_classifier_is_a_constant_to_the_exits(step, tiny):
    # Without labels of its own, nothing behind the last tapped stage moves.
    moved, _ = step(BYOT(tiny(), label_weight=0.0, feature_weight=10.0))
    assert "student.stage1.0.weight" in moved
    assert not any(name.startswith(("student.stage2.", "student.head.")) for name in moved)


def test_exits_are_left_behind_and_the_student_says_the_same_without(step, tiny, blobs):
    module = BYOT(tiny())
    step(module)
    again = tiny(seed=9).eval()
    again.load_state_dict(module.student.state_dict())
    module.eval()
    with torch.no_grad():
        assert torch.equal(again(blobs.images), module._student_taps(blobs.images)[0])


def test_it_learns(trainer, blobs, tiny):
    module = BYOT(tiny(8), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    fit = trainer(max_epochs=10)
    fit.fit(module, datamodule=blobs)
    assert fit.test(module, datamodule=blobs, verbose=False)[0]["test/acc"] == 1.0


def test_defaults(tiny):
    loss = BYOT(tiny()).losses["byot"]
    assert (loss.distillation_weight, loss.feature_weight, loss.temperature) == (0.3, 1e-4, 3.0)
    assert loss.teacher_free


def test_what_cannot_be_is_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match=r"distillation_weight is 1\.5"):
        BYOT(tiny(), distillation_weight=1.5)
    with pytest.raises(UsageError, match="temperature is 0"):
        BYOT(tiny(), temperature=0.0)
    with pytest.raises(UsageError, match="Plain has one stage"):
        trainer().fit(BYOT(Plain()), datamodule=blobs)
