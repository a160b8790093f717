import time

import pytest
import torch
from torch import nn

from lit_distill.core.callbacks import Efficiency
from lit_distill.core.callbacks.efficiency import _flops, _samples
from lit_distill.image import KD, Supervised
from lit_distill.image.data import ImageBatch


def test_flops_of_a_linear_map_are_two_per_weight():
    assert _flops(nn.Linear(7, 5), (torch.zeros(1, 7),)) == 2 * 7 * 5


def test_flops_of_a_convolution_are_two_per_weight_and_position():
    network = nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False)
    assert _flops(network, (torch.zeros(1, 3, 16, 16),)) == 2 * (3 * 5 * 5) * 8 * (8 * 8)


def test_samples_are_counted_in_all_kinds_of_batches():
    x = torch.zeros(6, 2)
    assert _samples(x) == 6
    assert _samples([x, x]) == 6
    assert _samples({"name": ["a", "b"], "x": {"y": x}}) == 6
    assert _samples(ImageBatch(torch.zeros(4, 1, 2, 2), torch.zeros(4).long(), torch.arange(4))) == 4
    assert _samples("text") == 0


def test_figures_of_a_run(trainer, blobs, tiny):
    efficiency = Efficiency()
    module = KD(tiny(2), tiny(8, seed=5))
    fit = trainer(callbacks=[efficiency], max_epochs=3)
    fit.fit(module, datamodule=blobs)
    before = {key: value.clone() for key, value in module.student.state_dict().items()}
    fit.test(module, datamodule=blobs, verbose=False)

    def count(width):  # two 3x3 convolutions with bias, BatchNorm, head of three
        return (2 * 9 + 1) * width + 2 * width + (9 * width + 1) * width + 3 * (width + 1)

    values = efficiency.values
    assert values["student_params"] == count(2)
    assert values["teacher_params"] == count(8)
    assert values["compression"] == pytest.approx(count(8) / count(2))
    assert values["student_flops"] == 2 * (18 * 2 * 64 + 18 * 2 * 16 + 2 * 3)
    assert values["samples_per_second"] == pytest.approx(8 / values["step_seconds"])
    assert values["inference_samples_per_second"] > 0
    assert 1e7 < values["peak_memory_bytes"] < 1e11
    # Measuring runs the student on zeros; its batch statistics must not notice.
    assert all(torch.equal(value, before[key]) for key, value in module.student.state_dict().items())


def test_steps_are_timed_without_validation(trainer, blobs_class, tiny):
    class Slow(Supervised):
        def training_step(self, batch, batch_idx):
            time.sleep(0.01)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            time.sleep(0.2)
            super().validation_step(batch, batch_idx)

    efficiency = Efficiency()
    options = {"callbacks": [efficiency], "limit_val_batches": 1, "val_check_interval": 2}
    trainer(**options).fit(Slow(tiny()), datamodule=blobs_class(size=80))
    assert 0.01 < efficiency.values["step_seconds"] < 0.08
