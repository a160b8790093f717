"""Training of teachers: of any kind, by the loss of their own output."""

import copy

import pytest
import torch

from lit_distill.core.callbacks import EMA
from lit_distill.core.loading import derived_seed
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.methods.denoising import Denoising
from lit_distill.diffusion.paths import EDMPath, FlowPath, VPPath
from lit_distill.diffusion.times import LogitNormal, Uniform


@pytest.mark.parametrize(
    ("path", "prediction", "times"),
    [(EDMPath(), "edm", None), (FlowPath(), "u", LogitNormal()), (VPPath(), "eps", Uniform(0.0, 1.0))],
    ids=["edm", "flow", "vp"],
)
def test_a_teacher_of_any_kind_trains(trainer, digits, make_denoiser, little, path, prediction, times):
    module = Denoising(
        make_denoiser(0, path, prediction),
        times=times,
        evaluation=little,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
    )
    before = copy.deepcopy(module.student)
    losses = []
    combine = module.combine
    module.combine = lambda terms: losses.append(terms["denoise"].item()) or combine(terms)
    trainer(max_epochs=20, limit_val_batches=1).fit(module, datamodule=digits)
    assert sum(losses[-30:]) < 0.95 * sum(losses[:30])
    assert all(
        not torch.equal(new, old) for new, old in zip(module.student.parameters(), before.parameters(), strict=True)
    )


def test_the_loss_of_a_teacher_is_the_error_of_its_own_output(trainer, digits, make_denoiser, little):
    """A flow: mean square of the velocity, with some classes hidden; from its formulas."""
    student = make_denoiser(0, FlowPath(), "u")
    network = copy.deepcopy(student.network)
    module = Denoising(student, times=Uniform(0.1, 0.9), label_dropout=0.5, evaluation=little)
    trainer(limit_train_batches=1).fit(module, datamodule=digits)
    batch, draws = next(iter(digits.train_dataloader())), Draws(derived_seed("step", 0, 0))
    t = Uniform(0.1, 0.9)(8, FlowPath(), draws).float()
    noise = draws.normal(batch.images.shape)
    labels = torch.where(draws.uniform(8) < 0.5, 10, batch.labels)
    assert 0 < (labels == 10).sum() < 8
    s = t.view(-1, 1, 1, 1)
    with torch.no_grad():
        out = network((1 - s) * batch.images + s * noise, (t / (1 - t)).log() / 4, labels)
    expected = (out - (noise - batch.images)).square().mean()
    assert module.terms["denoise"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_averaged_weights_are_what_is_measured(trainer, digits, make_denoiser, little):
    module = Denoising(make_denoiser(), evaluation=little, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    seen = []
    module._evaluate = lambda part: seen.append(copy.deepcopy(module.student.network.last.weight))
    trainer(callbacks=[EMA(decay=0.9)], limit_val_batches=1).fit(module, datamodule=digits)
    assert torch.equal(seen[0], module.student.network.last.weight)  # what the fit leaves is the average
