"""What every method of score distillation must satisfy, written once."""

import copy

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

ROLES = ("student", "fake", "head", "teacher")


def roles_of(module):
    return {name: getattr(module, name) for name in ROLES if getattr(module, name, None) is not None}


def weights(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def watched(base):
    """A method that keeps which parameters each optimizer step moved, and which have gradients after it."""

    class Watched(base):
        def optimize(self, loss, optimizer=0, *, clip_norm=None):
            for parameter in self.parameters():
                parameter.grad = None
            before = {name: weights(network) for name, network in roles_of(self).items()}
            super().optimize(loss, optimizer, clip_norm=clip_norm)
            moved, graded = set(), set()
            for role, network in roles_of(self).items():
                after = network.state_dict()
                moved |= {f"{role}.{k}" for k, v in before[role].items() if not torch.equal(v, after[k])}
                graded |= {f"{role}.{k}" for k, p in network.named_parameters() if p.grad is not None}
            self.steps.append((optimizer, moved, graded))

    return Watched


def check_score_method(build, method, trainer, digits, tmp_path, critics=("fake",), batches=4):
    """Checks who moves in each step, and that a run resumed from a checkpoint is the uninterrupted one.

    Args:
        build: Makes a module from a class; the same each time.
        method: The class.
        critics: Roles that the second optimizer trains.
        batches: Batches to train.

    Returns:
        The trained module.
    """
    module = build(watched(method))
    module.steps = []
    keep = ModelCheckpoint(tmp_path / "all", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit = trainer(limit_train_batches=batches, callbacks=[keep], enable_checkpointing=True)
    fit.fit(module, datamodule=copy.deepcopy(digits))
    student = {f"student.{name}" for name, _ in module.student.named_parameters()}
    other = {
        f"{role}.{name}"
        for role in critics
        for name, parameter in getattr(module, role).named_parameters()
        if parameter.requires_grad
    }
    assert other
    assert [number for number, _, _ in module.steps].count(1) == batches
    for turn, trained in enumerate((student, other)):
        steps = [(moved, graded) for number, moved, graded in module.steps if number == turn]
        assert all(moved <= trained and graded <= trained for moved, graded in steps)
        assert set().union(*(moved for moved, _ in steps)) == trained  # adapters start at zero, and move in turn
    assert not any(part.training for part in module.teacher.modules())

    checkpoints = sorted((tmp_path / "all").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    middle = checkpoints[len(checkpoints) // 2 - 1]
    saved = torch.load(middle, weights_only=True)
    assert not any(key.startswith("teacher.") for key in saved["state_dict"])
    again = build(method)
    trainer(limit_train_batches=batches).fit(again, datamodule=copy.deepcopy(digits), ckpt_path=middle)
    assert 0 < saved["iteration"] < batches == again.iteration == module.iteration
    expected, found = module.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    return module


def attach(module, trainer, data):
    """Builds a module as a fit would, without training it."""
    module.trainer = trainer()
    module.trainer.datamodule = data
    data.setup()
    module.configure_model()
    return module
