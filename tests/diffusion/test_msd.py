"""MSD: parts of the classes, routing, data in turn, students that share nothing, and the stages."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.data import GeneratorImages
from lit_distill.diffusion.denoiser import guided
from lit_distill.diffusion.methods.dmd import DMD
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.methods.msd import MSD
from lit_distill.diffusion.students import ClassPartition, PartitionedImages, StudentRouter
from lit_distill.image import DigitsDataModule

TAPS = ["network.blocks.1"]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def in_turn(parts, turn=1, epoch_batches=6, batch_size=8):
    source = DigitsDataModule(mean=(0.5,), std=(0.5,))
    return PartitionedImages(source, parts, turn, epoch_batches, batch_size=batch_size, seed=0)


def router(make_denoiser, parts, seed=1):
    """Students that differ."""
    made = StudentRouter(make_denoiser(seed), parts)
    with torch.no_grad():
        for number, student in enumerate(made.network):
            for parameter in student.parameters():
                parameter.add_(0.05 * number)
    return made


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "parts"), [(10, 1), (10, 3), (10, 10), (1000, 4)])
def test_parts_cover_all_classes_once_and_evenly(classes, parts):
    made = ClassPartition(classes, parts)
    sizes = [len(group) for group in made.groups]
    assert sorted(torch.cat(made.groups).tolist()) == list(range(classes))
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    assert all((made.part_of[group] == number).all() for number, group in enumerate(made.groups))


def test_groups_may_be_given_and_must_cover_all():
    made = ClassPartition(4, [[3, 0], [1, 2]])
    assert made.part_of.tolist() == [0, 1, 1, 0]
    for groups in ([[0, 1], [2]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 3], []]):
        with pytest.raises(UsageError, match=r"do not have each of the 4 classes once"):
            ClassPartition(4, groups)
    with pytest.raises(UsageError, match=r"parts: 5 are no number of parts of 4 classes"):
        ClassPartition(4, 5)


def test_the_router_gives_what_the_student_of_the_class_gives(make_denoiser):
    made = router(make_denoiser, 3)
    labels = torch.tensor([9, 0, 4, 3, 9, 7, 5, 1])
    x, t = torch.randn(8, 1, 8, 8), torch.linspace(0.1, 3, 8).double()
    found = made(x, t, labels)
    owner = [2, 0, 1, 0, 2, 2, 1, 0]  # parts of 4, 3 and 3 classes
    for number in range(8):
        own = slice(number, number + 1)
        expected = made.network[owner[number]](x[own], t[own], labels[own])
        torch.testing.assert_close(found[own], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(made(x[1:2], 0.7, labels[1:2], "u"), made.network[0](x[1:2], 0.7, labels[1:2], "u"))
    with made.only(1):
        assert torch.equal(made(x, t, labels), made.network[1](x, t, labels))
    assert torch.equal(made(x, t, labels), found)
    with pytest.raises(UsageError, match=r"'no class' belongs to no student"):
        guided(made, x, t, labels, 2.0)
    with pytest.raises(UsageError, match=r"students are chosen by class"):
        made(x, t)
    with pytest.raises(UsageError, match=r"it knows no classes to share"):
        StudentRouter(make_denoiser(num_classes=None), 2)


def test_batches_are_of_one_part_each_in_turn():
    data = in_turn(3, turn=2, epoch_batches=7)
    loader = data.train_dataloader()
    seen = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader):
            parts = data.partition.part_of[batch.labels].unique().tolist()
            assert parts == [data.part_at(epoch, number)]
            seen += parts
    assert seen == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 0, 0]


def test_each_part_passes_over_its_own_samples():
    data = in_turn(2, epoch_batches=80, batch_size=8)
    loader = data.train_dataloader()
    index = torch.cat([batch.index for number, batch in enumerate(loader) if number % 2 == 0])  # 320 of part 0
    own = (data.partition.part_of[data.part("train").labels] == 0).nonzero()[:, 0]
    assert set(index.tolist()) <= set(own.tolist())
    assert index.unique().numel() == min(320, len(own))


def test_one_part_is_the_order_of_all_data():
    source = DigitsDataModule(mean=(0.5,), std=(0.5,))
    plain = GeneratorImages(source, epoch_batches=6, batch_size=8, seed=0)
    for one, other in zip(in_turn(1).train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(one.index, other.index)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [DMD, DMD2], ids=["dmd", "dmd2"])
def test_one_student_is_the_base_method(trainer, digits, make_denoiser, little, base):
    options = {"evaluation": little, "optimizer": sgd, "fake_updates": 2}
    options |= {"pairs": 20, "pair_steps": 2} if base is DMD else {"taps": TAPS}
    single = base(make_denoiser(1), make_denoiser(0), [2.5], **options)
    trainer().fit(single, datamodule=copy.deepcopy(digits))
    several = MSD(router(make_denoiser, 1), make_denoiser(0), [2.5], **options)
    trainer().fit(several, datamodule=in_turn(1, turn=2))
    for own, expected in (
        (several.student.network[0], single.student),
        (several.fake[0], single.fake),
        (several.head[0] if base is DMD2 else None, single.head),
    ):
        if expected is not None:
            for name, value in expected.state_dict().items():
                assert torch.equal(own.state_dict()[name], value), name


class Watched(MSD):
    """Keeps what each step moved."""

    def optimize(self, loss, optimizer=0, *, clip_norm=None):
        before = {key: value.clone() for key, value in self.state_dict().items()}
        super().optimize(loss, optimizer, clip_norm=clip_norm)
        moved = [key for key, value in self.state_dict().items() if not torch.equal(value, before[key])]
        moved = [key.replace("student.network.", "student.") for key in moved]
        self.steps.append((self.iteration, {".".join(key.split(".")[:2]) for key in moved}))


def test_each_turn_moves_its_networks_alone_and_the_heads_from_the_adversarial_stage(trainer, make_denoiser, little):
    module = Watched(
        router(make_denoiser, 2), make_denoiser(0), [2.5], fake_updates=2, taps=TAPS, adversarial_from=4,
        evaluation=little, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    )  # fmt: skip
    module.steps = []
    trainer().fit(module, datamodule=in_turn(2, turn=2))
    assert module.steps == [
        (0, {"student.0"}), (0, {"fake.0"}), (1, {"fake.0"}),
        (2, {"student.1"}), (2, {"fake.1"}), (3, {"fake.1"}),
        (4, {"student.0"}), (4, {"fake.0", "head.0"}), (5, {"fake.0", "head.0"}),
    ]  # fmt: skip


def test_students_are_trained_on_their_own_classes_and_on_all_pairs(trainer, make_denoiser, little):
    asked, paired = [], []

    class Looking(MSD):
        def conditions(self, batch, draws):
            found = super().conditions(batch, draws)
            asked.append((self.fake.turn, set(found.tolist())))
            return found

        def extra_student_loss(self, sample, condition, batch, draws):
            forward = self.student.network[self.fake.turn].forward

            def spy(x, t, condition=None, prediction="x0"):
                paired.append(set(condition.tolist()))
                return forward(x, t, condition, prediction)

            self.student.network[self.fake.turn].forward = spy
            terms = super().extra_student_loss(sample, condition, batch, draws)
            self.student.network[self.fake.turn].forward = forward
            return terms

    module = Looking(
        router(make_denoiser, 2), make_denoiser(0), [2.5], pairs=40, pair_steps=2, fake_updates=1, evaluation=little
    )
    trainer().fit(module, datamodule=in_turn(2, batch_size=32))
    own = ({0, 1, 2, 3, 4}, {5, 6, 7, 8, 9})
    assert [turn for turn, _ in asked] == [0, 1, 0, 1, 0, 1]
    assert all(found <= own[turn] and len(found) > 2 for turn, found in asked)
    assert all(len(found - own[turn]) > 1 for (turn, _), found in zip(asked, paired, strict=True))


def test_the_students_share_nothing_but_the_teacher(trainer, make_denoiser, little):
    """What one student becomes does not depend on how the other began."""

    def student(seed):
        made = router(make_denoiser, 2)
        made.network[1] = make_denoiser(seed)
        module = MSD(made, make_denoiser(0), [2.5], fake_updates=1, taps=TAPS, evaluation=little)
        trainer().fit(module, datamodule=in_turn(2))
        return module

    one, other = student(5), student(6)
    for name, value in one.student.network[0].state_dict().items():
        assert torch.equal(value, other.student.network[0].state_dict()[name]), name
    assert not torch.equal(one.student.network[1].network.last.weight, other.student.network[1].network.last.weight)


@pytest.mark.parametrize("stop", [2, 3, 5], ids=["before", "at", "in_a_turn"])
def test_a_run_resumed_near_the_adversarial_stage_is_uninterrupted(trainer, make_denoiser, little, tmp_path, stop):
    def build(seed=1):
        return MSD(
            router(make_denoiser, 2, seed), make_denoiser(0), [2.5], fake_updates=1, taps=TAPS, adversarial_from=3,
            evaluation=little,
        )  # fmt: skip

    whole = build()
    trainer().fit(whole, datamodule=in_turn(2))
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=1, save_top_k=1)
    trainer(max_steps=2 * stop, callbacks=[keep], enable_checkpointing=True).fit(build(), datamodule=in_turn(2))
    torch.manual_seed(9)
    again = build(seed=7)
    trainer().fit(again, datamodule=in_turn(2), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert again.iteration == 6
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key


def test_data_that_do_not_go_with_the_students_are_told(trainer, digits, make_denoiser, little):
    def build(**options):
        return MSD(router(make_denoiser, 2), make_denoiser(0), [2.5], fake_updates=2, evaluation=little, **options)

    with pytest.raises(UsageError, match=r"data: GeneratorImages mixes all classes in a batch"):
        trainer().fit(build(taps=TAPS), datamodule=digits)
    with pytest.raises(UsageError, match=r"data: its parts or its turn \(1\) is not that of"):
        trainer().fit(build(), datamodule=in_turn(2, turn=1))
    with pytest.raises(UsageError, match=r"data: its parts or its turn"):
        trainer().fit(build(), datamodule=in_turn(3, turn=2))
    trainer(limit_train_batches=2).fit(build(), datamodule=digits)  # no real data are asked for
