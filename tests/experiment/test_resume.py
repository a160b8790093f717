"""A run killed at any moment and started again by the same command ends as if nothing had happened, bit for bit."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from killing import KILLED, DropoutNet, after, before, halfway, result, run

from lit_distill.core.checkpoint_io import AtomicCheckpointIO
from lit_distill.core.distiller import Distiller
from lit_distill.experiment import launch, run_folder
from lit_distill.image.distillation import ImageDistiller

BATCHES = 10  # of an epoch
KD, ADVERSARIAL = "lit_distill.image.KD", "killing.Adversarial"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs of this module lie, beside a teacher of random weights."""
    root = tmp_path_factory.mktemp("resume")
    (root / "teacher").mkdir()
    torch.manual_seed(3)
    safetensors.torch.save_model(DropoutNet(24), str(root / "teacher" / "model.safetensors"))
    return root


@pytest.fixture(scope="module")
def command(folder):
    """Words of a fit of three epochs with augmentation, dropout, a schedule and an average of the student."""

    def words(method, name, *more):
        teacher = {"weights": str(folder / "teacher"), "network": _class("killing.DropoutNet", width=24)}
        schedule = _class("torch.optim.lr_scheduler.CosineAnnealingLR", T_max=3)
        config = {
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 3,
                "log_every_n_steps": 3,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [_class("lit_distill.core.callbacks.EMA", decay=0.9)],
            },
            "model": _class(
                method,
                student=_class("killing.DropoutNet"),
                teacher=_class("lit_distill.core.pretrained", **teacher),
                optimizer=_class("torch.optim.AdamW", lr=0.01),
                lr_scheduler=schedule,
            ),
            "data": _class(
                "lit_distill.image.DigitsDataModule",
                batch_size=32,
                train_size=32 * BATCHES,
                val_size=100,
                test_size=100,
                augment=True,
            ),
        }
        file = folder / f"{method}.yaml"
        file.write_text(yaml.safe_dump(config))
        return ["fit", "-c", file, "--run.root", folder, "--run.experiment", "runs", "--run.name", name, *more]

    return words


@pytest.fixture(scope="module")
def uninterrupted(folder, command):
    """Returns the result of an uninterrupted run; each is run once."""
    results = {}

    def get(method, *more):
        key = (method, *more)
        if key not in results:
            name = "".join(("whole-", *key))
            assert run(command(method, name, *more), folder / "log.txt") == 0, (folder / "log.txt").read_text()
            results[key] = result(folder / "runs" / name)
        return results[key]

    return get


MOMENTS = {
    "while config.yaml is written": (KD, (), halfway(Path, "write_text", path=0)),
    "before the first checkpoint": (KD, (), before(Distiller, "on_train_batch_end", 4)),
    "inside the second epoch": (KD, (), before(Distiller, "on_train_batch_end", 15)),
    "while the first checkpoint is written": (KD, (), halfway(torch, "save", 1)),
    "while a later checkpoint is written": (ADVERSARIAL, (), halfway(torch, "save", 2)),
    "between two epochs": (ADVERSARIAL, (), after(AtomicCheckpointIO, "save_checkpoint", 1)),
    "after the last checkpoint": (KD, (), after(AtomicCheckpointIO, "save_checkpoint", 3)),
    "while the student is written": (KD, (), halfway(safetensors.torch, "save_file")),
    "in the test": (ADVERSARIAL, (), before(ImageDistiller, "test_step")),
    "before the summary is written": (KD, (), before(launch, "write_summary")),
    "in the middle of an epoch, resumed there": (
        ADVERSARIAL,
        ("--run.checkpoint_steps=4",),
        before(Distiller, "on_train_batch_end", 17),
    ),
    "in the middle of an epoch, in accumulation": (
        KD,
        ("--run.checkpoint_steps=3", "--trainer.accumulate_grad_batches=2"),
        before(Distiller, "on_train_batch_end", 18),
    ),
    # Ten batches an epoch: the batch of the checkpoint is the last one, before validation and the end of the epoch.
    "in validation, checkpoints at the last batch": (
        ADVERSARIAL,
        (f"--run.checkpoint_steps={BATCHES}",),
        before(ImageDistiller, "on_validation_epoch_end", 3),
    ),
    "in validation inside the epoch": (
        KD,
        ("--run.checkpoint_steps=5", "--trainer.val_check_interval=0.5"),
        before(ImageDistiller, "on_validation_epoch_end", 4),
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again_it_ends_the_same(moment, folder, command, uninterrupted):
    method, options, kill = MOMENTS[moment]
    # Where resume points lie must not matter, so the run that it is compared to has those of epochs only.
    expected = uninterrupted(method, *(word for word in options if not word.startswith("--run.")))
    words, log = command(method, moment.replace(" ", "-"), *options), folder / f"{moment}.txt"
    assert run(words, log, kill) == KILLED, log.read_text()
    assert run(words, log) == 0, log.read_text()
    found = result(folder / "runs" / moment.replace(" ", "-"))
    assert found == expected
    assert found["partial files"] == []


def test_killed_twice_it_ends_the_same(folder, command, uninterrupted):
    words, log = command(KD, "twice", "--run.checkpoint_steps=4"), folder / "twice.txt"
    assert run(words, log, before(Distiller, "on_train_batch_end", 7)) == KILLED  # batch 7; checkpoint of batch 4
    assert run(words, log, before(Distiller, "on_train_batch_end", 9)) == KILLED  # batch 13; checkpoint of batch 10
    assert run(words, log) == 0, log.read_text()
    assert result(folder / "runs" / "twice") == uninterrupted(KD)


def test_it_does_resume(folder, command):
    words, log = command(KD, "resumes"), folder / "resumes.txt"
    run(words, log, after(AtomicCheckpointIO, "save_checkpoint", 2))
    # Of 30 batches 20 are done: the resumed run has no 11th.
    assert run(words, log, before(Distiller, "on_train_batch_end", BATCHES + 1)) == 0, log.read_text()


def test_a_finished_run_is_not_run_again(folder, command, uninterrupted):
    uninterrupted(KD)
    files = {path: path.read_bytes() for path in (folder / "runs" / f"whole-{KD}").rglob("*") if path.is_file()}
    assert run(command(KD, f"whole-{KD}"), folder / "again.txt", before(Distiller, "on_train_batch_start")) == 0
    assert "is finished" in (folder / "again.txt").read_text()
    assert {path: path.read_bytes() for path in files} == files


def test_a_run_that_stopped_early_stays_stopped(folder, command):
    # The last epochs cannot be better by 9: the run stops after its second epoch.
    stop = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        "--trainer.callbacks.monitor=val/acc",
        "--trainer.callbacks.mode=max",
        "--trainer.callbacks.min_delta=9.0",
        "--trainer.callbacks.patience=1",
    )
    log = folder / "stop.txt"
    assert run(command(KD, "stop-whole", *stop), log) == 0, log.read_text()
    words = command(KD, "stop", *stop)
    assert run(words, log, before(launch, "write_summary")) == KILLED
    assert run(words, log) == 0, log.read_text()
    found = result(folder / "runs" / "stop")
    assert found == result(folder / "runs" / "stop-whole")
    assert max(int(row["step"]) for row in found["rows"]) == 2 * BATCHES


@pytest.mark.parametrize(
    "kill",
    [after(run_folder, "clear"), before(run_folder, "write_text"), after(run_folder.shutil, "rmtree", 1)],
    ids=["cleared", "before the new config", "half cleared"],
)
def test_a_run_that_replaces_another_never_takes_up_its_checkpoint(kill, folder, command, uninterrupted, request):
    name = f"replaced-{request.node.callspec.id}".replace(" ", "-")
    log = folder / f"{name}.txt"
    assert (
        run([*command(KD, name), "--seed_everything=7"], log, after(AtomicCheckpointIO, "save_checkpoint", 2)) == KILLED
    )
    words = command(KD, name, "--run.overwrite=true")
    assert run(words, log, kill) == KILLED
    assert run(words, log) == 0, log.read_text()
    assert result(folder / "runs" / name) == uninterrupted(KD)


def test_a_teacher_cache_half_written_is_made_anew(folder, command):
    options = ("--data.augment=false", f"--model.teacher_cache={folder / 'cache.safetensors'}")
    log = folder / "cache.txt"
    words = command(KD, "cache", *options)
    assert run(words, log, _halfway_cache) == KILLED
    assert not (folder / "cache.safetensors").exists()
    assert run(words, log) == 0, log.read_text()
    assert run(command(KD, "no-cache", options[0]), log) == 0, log.read_text()
    assert result(folder / "runs" / "cache") == result(folder / "runs" / "no-cache")


def test_a_truncated_checkpoint_is_refused_and_kept(folder, command):
    words, log = command(KD, "truncated"), folder / "truncated.txt"
    run(words, log, after(AtomicCheckpointIO, "save_checkpoint", 1))
    checkpoint = folder / "runs" / "truncated" / "checkpoints" / "last.ckpt"
    half = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    checkpoint.write_bytes(half)
    assert run(words, log) == 1
    message = log.read_text().splitlines()[-1]
    assert message.startswith("lit-distill: error: ckpt_path: ")
    assert "delete it to start again" in message
    assert checkpoint.read_bytes() == half
    assert not (folder / "runs" / "truncated" / "summary.json").exists()


def _halfway_cache():
    from lit_distill.core import cache

    halfway(cache, "save_file")()


def _class(path, **arguments):
    return {"class_path": path, "init_args": arguments}
