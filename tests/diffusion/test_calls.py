"""How often DMD2 runs its networks, and on how many samples: nothing is run twice where one run serves."""

import copy

import pytest
import torch

from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.times import Listed

BATCH, TAPS = 8, ["network.blocks.0"]
WHOLE, TAPPED = "whole", "to the tap"


def counted(module, fit, data):
    """Trains, and returns the runs of each role: (iteration, role, samples, with a graph, as far as)."""
    runs, inputs = [], []
    module.trainer = fit
    fit.datamodule = data
    data.setup()
    module.configure_model()  # builds the discriminator, which runs the fake score to learn shapes

    def begins(role):
        def hook(network, args):
            samples = args[0]
            assert not any(
                samples.shape == other.shape and torch.equal(samples, other)
                for iteration, name, other in inputs
                if (iteration, name) == (module.iteration, role)
            ), f"{role} is run twice on the same samples"
            inputs.append((module.iteration, role, samples.detach().clone()))
            graph = torch.is_grad_enabled() and (
                samples.requires_grad or any(p.requires_grad for p in network.parameters())
            )
            runs.append([module.iteration, role, len(samples), graph, TAPPED])

        return hook

    def ends(_network, _args, _output):
        runs[-1][-1] = WHOLE

    for role in ("student", "teacher", "fake"):
        network = getattr(module, role).network
        network.register_forward_pre_hook(begins(role))
        network.register_forward_hook(ends)
    fit.fit(module, datamodule=data)
    return [tuple(run) for run in runs]


def build(make_denoiser, little, **options):
    given = {"taps": TAPS, "gan_weight": 1.0, "fake_updates": 2, "evaluation": little, **options}
    return DMD2(make_denoiser(1), make_denoiser(0), given.pop("steps", [2.5]), **given)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_sample_is_made_once_and_both_halves_of_guidance_are_one_batch(
    trainer, digits, make_denoiser, little, guidance
):
    fit = trainer(limit_train_batches=2, limit_val_batches=0)
    runs = counted(build(make_denoiser, little, guidance=guidance), fit, copy.deepcopy(digits))
    halves = 1 if guidance == 1.0 else 2
    assert runs == [
        # The student's turn: one sample for both updates.
        (0, "student", BATCH, True, WHOLE),
        (0, "fake", BATCH, False, WHOLE),  # the two scores
        (0, "teacher", halves * BATCH, False, WHOLE),
        (0, "fake", BATCH, True, TAPPED),  # the generator's side of the GAN
        (0, "fake", BATCH, True, WHOLE),  # the fake score's own loss
        (0, "fake", 2 * BATCH, True, TAPPED),  # the discriminator's, generated and real
        # The fake score alone: no graph of the student, no teacher.
        (1, "student", BATCH, False, WHOLE),
        (1, "fake", BATCH, True, WHOLE),
        (1, "fake", 2 * BATCH, True, TAPPED),
    ]


def test_without_a_discriminator_the_fake_score_runs_twice_and_then_once(trainer, digits, make_denoiser, little):
    fit = trainer(limit_train_batches=2, limit_val_batches=0)
    runs = counted(build(make_denoiser, little, taps=[], gan_weight=0.0), fit, copy.deepcopy(digits))
    assert [run[:4] for run in runs] == [
        (0, "student", BATCH, True),
        (0, "fake", BATCH, False),
        (0, "teacher", BATCH, False),
        (0, "fake", BATCH, True),
        (1, "student", BATCH, False),
        (1, "fake", BATCH, True),
    ]


def test_simulated_steps_are_run_once_each_and_the_last_alone_has_a_graph(trainer, digits, make_denoiser, little):
    fit = trainer(limit_train_batches=6, limit_val_batches=0)
    steps = [2.5, 1.0, 0.4]
    module = build(make_denoiser, little, steps=steps, fake_updates=1)
    drawn = []
    forward = module.student_forward

    def watched(*args):
        sample = forward(*args)
        drawn.append(sample.step)
        return sample

    module.student_forward = watched
    runs = counted(module, fit, copy.deepcopy(digits))
    assert len(set(drawn)) > 1
    for iteration, step in enumerate(drawn):
        own = [graph for number, role, _, graph, _ in runs if (number, role) == (iteration, "student")]
        assert own == [False] * step + [True]


def test_what_the_teacher_sees_inside_costs_no_whole_run_of_it(trainer, digits, make_denoiser, little):
    fit = trainer(limit_train_batches=2, limit_val_batches=0)
    module = build(make_denoiser, little, features="teacher", gan_times=Listed([0.5]))
    runs = counted(module, fit, copy.deepcopy(digits))
    assert [run[2:] for run in runs if run[1] == "teacher"] == [
        (BATCH, False, WHOLE),
        (BATCH, True, TAPPED),  # gradients to the generator's samples
        (2 * BATCH, False, TAPPED),
        (2 * BATCH, False, TAPPED),
    ]
