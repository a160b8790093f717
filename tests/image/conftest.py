"""What every image method must satisfy, written once."""

import copy

import pytest
import torch


@pytest.fixture
def step(trainer, blobs):
    """Takes one training step on the first batch; returns what moved, and the terms of the loss."""

    def take(module, data=blobs):
        module_terms = []
        fit = trainer(max_steps=1)
        state = {}
        configure = module.configure_model

        def configured():
            configure()
            state.update({key: value.clone() for key, value in module.state_dict().items()})

        module.configure_model = configured
        combine = module.combine
        module.combine = lambda terms: module_terms.append({k: v.detach() for k, v in terms.items()}) or combine(terms)
        fit.fit(module, datamodule=data)
        moved = {key for key, value in module.state_dict().items() if not torch.equal(value, state[key])}
        return moved, {key: value.item() for key, value in module_terms[0].items()}

    return take


@pytest.fixture
def check_method(step, trainer, blobs, tiny, tmp_path):
    """Checks one step, modes and the checkpoint of a method that `build` makes from (student, teacher)."""

    def check(build, extra=()):
        teacher = tiny(6, seed=5)
        module = build(tiny(4), teacher)
        moved, _ = step(module)
        # Every trained parameter moves; of the rest, only batch statistics of what trains.
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert {name.partition(".")[0] for name in trained} == {"student", *extra}
        assert trained <= moved
        assert all("running_" in name or "num_batches" in name for name in moved - trained)
        assert not any(name.startswith("teacher.") for name in moved)
        assert not any(part.training for part in teacher.modules())
        module.train()
        assert not any(part.training for part in teacher.modules())
        assert module.student.training

        fit = module.trainer
        fit.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert {key.partition(".")[0] for key in saved["state_dict"]} == {"student", *extra}
        again = build(tiny(4, seed=9), copy.deepcopy(teacher))
        trainer(limit_val_batches=1).validate(again, datamodule=blobs, ckpt_path=tmp_path / "a.ckpt", verbose=False)
        images = blobs.images[:4]
        with torch.no_grad():
            assert torch.equal(again.student.eval()(images), module.student.eval()(images))
            assert torch.equal(again.teacher(images), teacher(images))
        for name in extra:
            for old, new in zip(getattr(module, name).parameters(), getattr(again, name).parameters(), strict=True):
                assert torch.equal(old, new)
        return module

    return check
