import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_distill.core.callbacks import EMA, BestWeights
from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError

VALUES = [0.2, 0.6, 0.4, 0.6, 0.1]  # what validation says after each epoch


class Scripted(Distiller):
    """Trains truly, but its validation says what it is told; keeps the weights that validation sees."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.tested = [], []

    def training_step(self, batch, batch_idx):
        return self.combine({"ce": nn.functional.cross_entropy(self.student(batch.images), batch.labels)})

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", VALUES[self.current_epoch])
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.seen.append(self.student.head.weight.detach().clone())

    def test_step(self, batch, batch_idx):
        self.tested.append(self.student.head.weight.detach().clone())


@pytest.mark.parametrize(("mode", "epoch"), [("max", 1), ("min", 4)])
def test_the_student_of_the_best_validation_is_left(trainer, blobs, tiny, mode, epoch):
    module, best = Scripted(tiny()), BestWeights("val/acc", mode)
    fit = trainer(callbacks=[best], max_epochs=5, limit_val_batches=1)
    fit.fit(module, datamodule=blobs)
    fit.test(module, datamodule=blobs, verbose=False)
    assert len(module.seen) == 5
    assert not torch.equal(module.seen[1], module.seen[4])
    assert torch.equal(module.tested[0], module.seen[epoch])  # of equals (1 and 3) the first
    assert best.metrics == {"val/acc": pytest.approx(VALUES[epoch]), "val/epoch": epoch}


def test_training_goes_on_as_if_it_were_not_there(trainer, blobs, tiny):
    seen = []
    for callbacks in ([], [BestWeights("val/acc")]):
        module = Scripted(tiny())
        trainer(callbacks=callbacks, max_epochs=5, limit_val_batches=1).fit(module, datamodule=blobs)
        seen.append(module.seen)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_it_outlives_an_interruption(trainer, blobs, tiny, tmp_path, stop):
    whole = Scripted(tiny())
    points = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [BestWeights("val/acc"), points]
    trainer(callbacks=callbacks, max_epochs=5, limit_val_batches=1, enable_checkpointing=True).fit(
        whole, datamodule=blobs
    )
    path = tmp_path / f"epoch={stop - 1}.ckpt"
    rest, best = Scripted(tiny(seed=3)), BestWeights("val/acc")
    trainer(callbacks=[best], max_epochs=5, limit_val_batches=1).fit(rest, datamodule=blobs, ckpt_path=path)
    assert torch.equal(rest.student.head.weight, whole.seen[1])
    assert best.metrics["val/epoch"] == 1
    tested = Scripted(tiny(seed=4))
    trainer(callbacks=[BestWeights("val/acc")]).test(tested, datamodule=blobs, ckpt_path=path, verbose=False)
    assert torch.equal(tested.tested[0], whole.seen[min(stop - 1, 1)])


def test_mistakes_are_told_in_one_line(trainer, blobs, tiny):
    with pytest.raises(UsageError, match="monitor is 'val/f1', which validation does not log; there are val/acc"):
        trainer(callbacks=[BestWeights("val/f1")], max_epochs=1, limit_val_batches=1).fit(
            Scripted(tiny()), datamodule=blobs
        )
    with pytest.raises(UsageError, match="EMA and BestWeights both decide"):
        trainer(callbacks=[BestWeights("val/acc"), EMA()], max_epochs=1, limit_val_batches=1).fit(
            Scripted(tiny()), datamodule=blobs
        )
