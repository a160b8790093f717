import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_distill.core.callbacks import EMA
from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError


class Recording(Distiller):
    """Keeps the student's weights after each batch, and those that validation and test see."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.after, self.validated, self.tested = [], [], []

    def training_step(self, batch, batch_idx):
        return self.combine({"ce": nn.functional.cross_entropy(self.student(batch.images), batch.labels)})

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.after.append(self.student.head.weight.detach().clone())

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.student.head.weight.detach().clone())

    def test_step(self, batch, batch_idx):
        self.tested.append(self.student.head.weight.detach().clone())


class Twice(Recording):
    """Two optimizers, both steps in every batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.other = nn.Linear(1, 1)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.student, self.other)]

    def training_step(self, batch, batch_idx):
        self.optimize(nn.functional.cross_entropy(self.student(batch.images), batch.labels), 0)
        self.optimize(self.other(torch.ones(1, 1)).sum(), 1)


def average(weights, decay):
    """The first is taken as it is, each later one with weight 1 - decay."""
    mean = weights[0]
    for weight in weights[1:]:
        mean = decay * mean + (1 - decay) * weight
    return mean


def test_the_average_is_what_one_gets_by_hand_and_is_validated_and_left_at_the_end(trainer, blobs, tiny):
    module, ema = Recording(tiny()), EMA(decay=0.7)
    trainer(callbacks=[ema], max_epochs=2, limit_val_batches=1).fit(module, datamodule=blobs)
    expected = average(module.after, 0.7)
    torch.testing.assert_close(module.validated[0], average(module.after[:3], 0.7))
    torch.testing.assert_close(module.validated[1], expected)
    torch.testing.assert_close(module.student.head.weight, expected)
    assert not torch.allclose(expected, module.after[-1])


def test_raw_weights_go_on_training_after_validation(trainer, blobs, tiny):
    plain, averaged = Recording(tiny()), Recording(tiny())
    trainer(max_epochs=2, limit_val_batches=1).fit(plain, datamodule=blobs)
    trainer(max_epochs=2, limit_val_batches=1, callbacks=[EMA(0.9)]).fit(averaged, datamodule=blobs)
    torch.testing.assert_close(torch.stack(averaged.after), torch.stack(plain.after))


def test_only_the_student_is_copied(trainer, blobs, tiny):
    module, ema = Recording(tiny(), tiny(seed=5)), EMA(0.7)
    trainer(callbacks=[ema]).fit(module, datamodule=blobs)
    counts = {"stage1.1.num_batches_tracked"}  # of batches: no number to average
    assert ema.average.keys() == module.student.state_dict().keys() - counts


def test_with_two_optimizers_the_average_counts_batches(trainer, blobs, tiny):
    module = Twice(tiny())
    trainer(callbacks=[EMA(0.7, update_every_n_steps=2)], max_epochs=2).fit(module, datamodule=blobs)
    torch.testing.assert_close(module.student.head.weight, average(module.after[::2], 0.7))


def test_accumulated_batches_are_one_step(trainer, blobs, tiny):
    module = Recording(tiny())
    trainer(callbacks=[EMA(0.7)], max_epochs=1, accumulate_grad_batches=2).fit(module, datamodule=blobs)
    torch.testing.assert_close(module.student.head.weight, average(module.after[1:], 0.7))


def test_resuming_restores_the_average(trainer, blobs, tiny, tmp_path):
    whole = Recording(tiny())
    trainer(callbacks=[EMA(0.7)], max_epochs=2).fit(whole, datamodule=blobs)

    keep = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    first = Recording(tiny())
    trainer(callbacks=[EMA(0.7), keep], enable_checkpointing=True).fit(first, datamodule=blobs)
    path = tmp_path / "last.ckpt"
    second = Recording(tiny(seed=8))
    trainer(callbacks=[EMA(0.7)], max_epochs=2).fit(second, datamodule=blobs, ckpt_path=path, weights_only=True)
    torch.testing.assert_close(second.student.head.weight, whole.student.head.weight)

    # What is tested from the checkpoint is the average too.
    tested = Recording(tiny(seed=8))
    trainer(callbacks=[EMA(0.7)]).test(tested, datamodule=blobs, ckpt_path=path, weights_only=True, verbose=False)
    torch.testing.assert_close(tested.tested[0], average(first.after, 0.7))


def test_a_decay_that_makes_no_average_is_refused():
    with pytest.raises(UsageError, match=r"decay is 1\.0"):
        EMA(decay=1.0)


def test_a_deep_copy_is_independent(trainer, blobs, tiny):
    module, ema = Recording(tiny()), EMA(0.7)
    trainer(callbacks=[ema]).fit(module, datamodule=blobs)
    kept = copy.deepcopy(module.student.state_dict())
    with torch.no_grad():
        ema.average["head.weight"].zero_()
    assert torch.equal(module.student.head.weight, kept["head.weight"])
