import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_distill.core.callbacks import TeacherCheck
from lit_distill.core.errors import UsageError
from lit_distill.image import ImageBatch, Outputs, Shapes
from lit_distill.image.losses.ft import FactorTransfer
from lit_distill.image.methods.ft import FT


@pytest.fixture
def record(trainer, blobs):
    """Trains; returns the terms and a copy of the weights before each batch and at the end."""

    def run(module, epochs):
        terms, states = [], []
        combine = module.combine

        def recorded(values):
            states.append(copy.deepcopy(module.state_dict()))
            terms.append({name: value.item() for name, value in values.items()})
            return combine(values)

        module.combine = recorded
        trainer(max_epochs=epochs, log_every_n_steps=1).fit(module, datamodule=blobs)
        return terms, [*states, copy.deepcopy(module.state_dict())]

    return run


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_first_the_paraphraser_alone_then_everything_but_the_paraphraser(record, tiny):
    module = FT(tiny(), tiny(6, seed=5), init_iterations=3)
    terms, states = record(module, epochs=3)
    assert [set(values) for values in terms] == [{"ft"}] * 3 + [{"ce", "ft"}] * 6
    parameters = {name for name, _ in module.named_parameters()}

    first = changed(states[0], states[3]) & parameters
    assert first == {name for name in parameters if name.startswith("losses.ft.paraphraser.")}
    # Not even weight decay or momentum moves it later, nor do its batch statistics.
    later = changed(states[3], states[-1])
    assert not any("paraphraser" in name for name in later)
    assert {name for name in parameters if name.startswith(("student.", "losses.ft.translator."))} <= later
    assert not any(part.training for part in module.losses["ft"].paraphraser.modules())
    assert not any(name.startswith("teacher.") for name in changed(states[0], states[-1]))


def test_the_paraphraser_learns_to_reconstruct(record, tiny):
    terms, _ = record(FT(tiny(), tiny(6, seed=5), init_iterations=90), epochs=30)
    assert terms[-1]["ft"] < 0.5 * terms[0]["ft"]


def test_terms_are_weighted_reconstruction_and_difference_of_factors(record, tiny, blobs):
    teacher = tiny(6, seed=5)
    module = FT(tiny(), teacher, init_iterations=1, reconstruction_weight=0.2, ft_weight=200.0)
    terms, states = record(module, epochs=1)

    def stage2(network, batch):
        return network.stage2(network.stage1(blobs.images[8 * batch : 8 * batch + 8]))

    loss = FactorTransfer()
    loss.student_taps, loss.teacher_taps = ("s",), ("t",)
    loss.build(Shapes({"s": (4, 4, 4)}, {"t": (6, 4, 4)}, 3))

    def restore(state):
        loss.load_state_dict({k.removeprefix("losses.ft."): v for k, v in state.items() if "losses.ft." in k})
        student = tiny()
        student.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
        return student.train()

    with torch.no_grad():
        restore(states[0])
        target = stage2(teacher.eval(), 0)
        error = loss.paraphraser.train()(target) - target
        assert terms[0]["ft"] == pytest.approx(0.2 * error.square().mean().item(), rel=1e-4)

        student = restore(states[1])
        # The state was kept after the student had run: its statistics have moved, its outputs in training do not ask.
        own = loss.translator.train()(stage2(student, 1)).flatten(1).double().numpy()
        other = loss.paraphraser.eval()[0](stage2(teacher, 1)).flatten(1).double().numpy()
    own, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (own, other))
    assert terms[1]["ft"] == pytest.approx(200 * np.abs(own - other).mean(), rel=1e-3)


def test_factors_have_half_the_teachers_channels():
    loss = FactorTransfer()
    loss.student_taps, loss.teacher_taps = ("s",), ("t",)
    loss.build(Shapes({"s": (4, 8, 8)}, {"t": (10, 4, 4)}, 3))
    assert loss.paraphraser[0](torch.randn(2, 10, 4, 4)).shape == (2, 5, 4, 4)
    assert loss.paraphraser(torch.randn(2, 10, 4, 4)).shape == (2, 10, 4, 4)
    assert loss.translator(torch.randn(2, 4, 8, 8)).shape == (2, 5, 8, 8)
    kinds = [type(layer).__name__ for layer in loss.translator]
    assert kinds == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3
    # Grids may differ: factors are pooled.
    own, others = torch.randn(2, 4, 8, 8), torch.randn(2, 10, 4, 4)
    outputs = Outputs(torch.zeros(2, 3), {"s": own}), Outputs(torch.zeros(2, 3), {"t": others})
    batch = ImageBatch(torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.long), torch.arange(2))
    value = loss(*outputs, batch, 10**6)
    translated, factor = F.avg_pool2d(loss.translator(own), 2), loss.paraphraser[0](others)
    rows = (F.normalize(part.double().flatten(1)) for part in (translated, factor))
    assert float(value) == pytest.approx(float(torch.sub(*rows).abs().mean()), rel=1e-4)


def test_checkpoint_brings_paraphraser_and_phase_back(trainer, blobs, tiny, tmp_path):
    module = FT(tiny(), tiny(6, seed=5), init_iterations=4)
    fit = trainer(max_epochs=1)
    fit.fit(module, datamodule=blobs)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = FT(tiny(seed=9), tiny(6, seed=5), init_iterations=4)
    trainer(max_epochs=3).fit(again, datamodule=blobs, ckpt_path=tmp_path / "a.ckpt")
    trainer_whole = FT(tiny(), tiny(6, seed=5), init_iterations=4)
    trainer(max_epochs=3).fit(trainer_whole, datamodule=blobs)
    assert changed(again.state_dict(), trainer_whole.state_dict()) == set()


def test_a_phase_without_a_batch_and_a_tap_without_a_map_are_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match="init_iterations is 0; give the paraphraser at least 1 batch"):
        FactorTransfer(init_iterations=0)
    with pytest.raises(UsageError, match=r"ft: teacher tap 'pool' has shape \(6,\)"):
        trainer().fit(FT(tiny(), tiny(6), teacher_tap="pool"), datamodule=blobs)


def test_a_run_that_ends_in_the_first_phase_is_warned_of(trainer, blobs, tiny):
    with pytest.warns(UserWarning, match="init_iterations is 9, and the run has only 3 batches"):
        trainer().fit(FT(tiny(), tiny(6), init_iterations=9), datamodule=blobs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*init_iterations.*")
        warnings.filterwarnings("error", message=".*no effect.*")
        trainer(callbacks=[TeacherCheck()]).fit(FT(tiny(), tiny(6), init_iterations=2), datamodule=blobs)
