"""DisBack: the way down in closed form, nodes that really load, and the way back to the teacher itself."""

import copy
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.backtracking import BacktrackingTarget
from lit_distill.diffusion.denoiser import Denoiser
from lit_distill.diffusion.distillation import ScoreDistiller
from lit_distill.diffusion.fake import LoRA
from lit_distill.diffusion.methods.disback import DegradationRecorder, DisBack
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.mixtures import MixtureDataModule
from lit_distill.diffusion.models import GaussianMixture
from lit_distill.diffusion.paths import EDMPath
from lit_distill.diffusion.times import Listed

TAPS = ["network.blocks.1"]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.fixture
def nodes(make_denoiser, tmp_path):
    """A folder with two nodes, which are denoisers of other seeds."""
    (tmp_path / "nodes").mkdir()
    for number in (1, 2):
        save_file(make_denoiser(10 + number).state_dict(), tmp_path / f"nodes/{number:04d}.safetensors")
    return str(tmp_path / "nodes")


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# ---- the way down ----------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """slope x + offset, whatever the time."""

    def __init__(self, slope, offset):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, x, time, condition=None):
        return self.slope * x + self.offset


class Quiet(DegradationRecorder):
    def _evaluate(self, part):
        pass


def test_nodes_go_from_the_teacher_to_the_score_of_the_generator(trainer, tmp_path):
    """The teacher is that of N(0, 1), the generator makes N(3, 0.5^2); all is seen at noise 1."""
    m, q = 3.0, 0.5
    teacher = Denoiser(Affine(0.5, 0.0), EDMPath(), "x0")
    generator = Denoiser(Affine(q, m), EDMPath(), "x0")  # of the noise itself
    module = Quiet(
        teacher, generator, [1.0], interval=30, times=Listed([1.0]),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.9, 0.99)),
    )  # fmt: skip
    data = MixtureDataModule(GaussianMixture([[0.0]], 1.0, EDMPath()), 512 * 150, 10, batch_size=512)
    trainer().fit(module, datamodule=data)
    files = sorted((tmp_path / "nodes").glob("*.safetensors"))
    assert [file.name for file in files] == [f"000{number}.safetensors" for number in range(1, 6)]
    slope, offset = q**2 / (q**2 + 1), m / (q**2 + 1)
    errors = []
    for found in [{"network.slope": torch.tensor(0.5), "network.offset": torch.tensor(0.0)}, *map(load_file, files)]:
        a, b = float(found["network.slope"]) - slope, float(found["network.offset"]) - offset
        errors.append((a * m + b) ** 2 + a**2 * (q**2 + 1))  # squared distance to that score, where x_t is
    assert all(later < earlier for earlier, later in pairwise(errors[:5])), errors
    assert errors[-1] < 0.01 * errors[0]
    assert torch.equal(module.generator.network.slope, torch.tensor(q))


def test_recording_resumes_and_leaves_the_generator_alone(trainer, digits, make_denoiser, little, tmp_path):
    def build(seed=0):
        return DegradationRecorder(
            make_denoiser(seed), make_denoiser(4), [2.5], interval=2, evaluation=little, optimizer=sgd
        )

    whole = build()
    trainer(default_root_dir=tmp_path / "a").fit(whole, datamodule=copy.deepcopy(digits))
    assert same(whole.generator, make_denoiser(4))
    last = load_file(tmp_path / "a/nodes/0003.safetensors")
    assert all(torch.equal(last[name], value) for name, value in whole.student.state_dict().items())
    assert not torch.equal(last["network.last.weight"], make_denoiser(0).network.last.weight)
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=1, save_top_k=1)
    short = trainer(max_steps=3, callbacks=[keep], enable_checkpointing=True, default_root_dir=tmp_path / "b")
    short.fit(build(), datamodule=copy.deepcopy(digits))
    assert {key.partition(".")[0] for key in torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]} == {
        "student"
    }
    again = trainer(default_root_dir=tmp_path / "b")
    again.fit(build(7), datamodule=copy.deepcopy(digits), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for number in (1, 2, 3):
        one, other = (load_file(tmp_path / f"{run}/nodes/000{number}.safetensors") for run in "ab")
        assert all(torch.equal(value, other[name]) for name, value in one.items())


# ---- the way back ----------------------------------------------------------------------------------------------------


def test_nodes_come_in_reverse_and_the_last_is_the_teacher_bit_for_bit(make_denoiser, nodes):
    target = BacktrackingTarget(make_denoiser(0), nodes, interval=3)
    expected = [make_denoiser(12)] * 3 + [make_denoiser(11)] * 3 + [make_denoiser(0)] * 3
    x, labels = torch.randn(2, 1, 8, 8), torch.arange(2)
    for iteration, denoiser in enumerate(expected):
        target.move_to(iteration)
        assert same(target, denoiser)
        assert torch.equal(target(x, 1.0, labels), denoiser(x, 1.0, labels))
    target.move_to(4)  # as a run that is resumed
    assert same(target, make_denoiser(11))
    target.move_to(10**9)
    assert same(target, make_denoiser(0))


def test_nodes_load_strictly(make_denoiser, nodes):
    save_file({f"real_unet.{k}": v for k, v in make_denoiser(9).state_dict().items()}, f"{nodes}/0003.safetensors")
    with pytest.raises(UsageError, match=r"0003.safetensors does not fit BacktrackingTarget: .* is missing"):
        BacktrackingTarget(make_denoiser(0), nodes)


def test_a_copy_is_a_plain_denoiser_at_the_present_node(make_denoiser, nodes):
    target = BacktrackingTarget(make_denoiser(0), nodes, interval=1)
    plain = copy.deepcopy(target)
    target.move_to(5)
    assert type(plain) is Denoiser
    assert same(plain, make_denoiser(12))


@pytest.mark.parametrize("method", [DisBack, ScoreDistiller])
def test_the_fake_score_begins_as_the_last_node_and_the_target_moves(
    trainer, digits, make_denoiser, little, nodes, method
):
    seen = []

    class Looking(method):
        def training_step(self, batch, batch_idx):
            begins = self.iteration or same(self.fake, make_denoiser(12))
            seen.append((bool(begins), [s for s in (12, 11, 0) if same(self.teacher, make_denoiser(s))]))
            super().training_step(batch, batch_idx)

    module = Looking(
        make_denoiser(1), BacktrackingTarget(make_denoiser(0), nodes, 2), [2.5], fake_updates=1, evaluation=little
    )
    trainer().fit(module, datamodule=digits)
    assert seen == [(True, [seed]) for seed in (12, 12, 11, 11, 0, 0)]
    assert not same(module.fake, make_denoiser(12))
    assert same(module.teacher, make_denoiser(0))


def test_without_nodes_it_is_the_base_method(trainer, digits, make_denoiser, little):
    def run(method, teacher):
        module = method(make_denoiser(1), teacher, [2.5], fake_updates=2, taps=TAPS, evaluation=little, optimizer=sgd)
        trainer().fit(module, datamodule=copy.deepcopy(digits))
        return module

    base = run(DMD2, make_denoiser(0))
    found = run(DisBack, BacktrackingTarget(make_denoiser(0)))
    assert found.state_dict().keys() == base.state_dict().keys()
    assert same(found, base)


@pytest.mark.parametrize("stop", [1, 2, 3], ids=["before", "at", "after"])
def test_a_run_resumed_near_a_change_of_node_is_uninterrupted(
    trainer, digits, make_denoiser, little, nodes, tmp_path, stop
):
    def build(seed=1):
        return DisBack(
            make_denoiser(seed), BacktrackingTarget(make_denoiser(0), nodes, 2), [2.5], fake_updates=1, taps=TAPS,
            evaluation=little,
        )  # fmt: skip

    whole = build()
    trainer().fit(whole, datamodule=copy.deepcopy(digits))
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=1, save_top_k=1)
    trainer(max_steps=2 * stop, callbacks=[keep], enable_checkpointing=True).fit(
        build(), datamodule=copy.deepcopy(digits)
    )
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["iteration"] == stop
    assert {key.partition(".")[0] for key in saved["state_dict"]} == {"student", "fake", "head"}
    again = build(seed=7)
    trainer().fit(again, datamodule=copy.deepcopy(digits), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key


def test_each_step_moves_its_role_alone(trainer, digits, make_denoiser, little, nodes):
    moves = []

    class Watched(DisBack):
        def optimize(self, loss, optimizer=0, *, clip_norm=None):
            before = {key: value.clone() for key, value in self.state_dict().items()}
            super().optimize(loss, optimizer, clip_norm=clip_norm)
            changed = {key for key, value in self.state_dict().items() if not torch.equal(value, before[key])}
            moves.append({key.partition(".")[0] for key in changed})

    module = Watched(
        make_denoiser(1), BacktrackingTarget(make_denoiser(0), nodes, 1), [2.5], fake_updates=2, taps=TAPS,
        evaluation=little, optimizer=sgd,
    )  # fmt: skip
    trainer(limit_train_batches=3).fit(module, datamodule=digits)
    assert moves == [{"student"}, {"fake", "head"}, {"fake", "head"}, {"student"}, {"fake", "head"}]


def test_mistakes_are_told(make_denoiser, nodes, tmp_path):
    with pytest.raises(UsageError, match=r"teacher.nodes: .*none has no nodes"):
        BacktrackingTarget(make_denoiser(0), str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"teacher.interval is 0"):
        BacktrackingTarget(make_denoiser(0), nodes, 0)
    with pytest.raises(UsageError, match=r"model.fake: LoRA shares the weights of a teacher that moves"):
        DisBack(make_denoiser(1), BacktrackingTarget(make_denoiser(0), nodes), [2.5], fake=LoRA(2, 2.0))
    with pytest.raises(UsageError, match=r"model.interval is 0"):
        DegradationRecorder(make_denoiser(0), make_denoiser(1), [2.5], interval=0)
