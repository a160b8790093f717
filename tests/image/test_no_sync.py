"""A training step of any method leaves the device alone: nothing in it waits for a value, but at logging intervals."""

import inspect

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

import lit_distill.image
from lit_distill.core.distiller import Distiller

aten = torch.ops.aten
# What copies a value to the host, or has a size that depends on values.
WAITS = {aten._local_scalar_dense, aten.equal, aten.masked_select, aten.nonzero, aten._unique2, aten.bincount}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class Waits(TorchDispatchMode):
    """Notes operations that wait for the device. On one, an index of bools is first turned into places."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if packet in WAITS or by_mask:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """Counts in whole steps: training step, backward pass and optimizer."""

    def __init__(self):
        self.waits = Waits()

    def on_train_batch_start(self, *_):
        self.waits.__enter__()

    def on_train_batch_end(self, *_):
        self.waits.__exit__(None, None, None)


def parameters(method):
    return inspect.signature(method).parameters


def methods():
    """All exported methods that need no more than a student and a teacher."""
    exported = [getattr(lit_distill.image, name) for name in lit_distill.image.__all__]
    return [pytest.param(method, id=method.__name__) for method in exported if _is_method(method)]


def _is_method(exported):
    if not inspect.isclass(exported) or not issubclass(exported, Distiller) or ".methods." not in exported.__module__:
        return False
    needed = {name for name, p in parameters(exported).items() if p.default is p.empty and p.kind != p.VAR_KEYWORD}
    return "student" in needed and needed <= {"student", "teacher"}


def made(method, tiny, **kwargs):
    """A method on tiny networks of equal widths, which FSP needs, with a first phase of one batch where it has two."""
    options = {"student": tiny(4), "teacher": tiny(4, seed=5), "init_iterations": 1, "negatives": 32}
    options |= {"margins": [-0.1, -0.1]}  # of the two stages only one has BatchNorm, from which OFD takes them
    if method is lit_distill.image.LELP:
        options["student"] = lit_distill.image.SubclassClassifier(tiny(4, num_classes=6), 2)
    return method(**{key: value for key, value in options.items() if key in parameters(method)}, **kwargs)


@pytest.mark.parametrize("method", methods())
def test_a_step_does_not_wait_for_the_device(method, trainer, blobs, tiny):
    watch = Watch()
    trainer(max_steps=3, callbacks=[watch]).fit(made(method, tiny), datamodule=blobs)
    assert watch.waits.found == []


def test_what_waits_is_found():
    values = torch.arange(3.0)
    with Waits() as waits:
        values.max().item()
        values[values > 1]
        if values.sum() > 1:
            values[values > 1] = 0.0
    names = ["_local_scalar_dense", "index", "_local_scalar_dense", "index_put_"]
    assert [name.split(".")[1] for name in waits.found] == names
