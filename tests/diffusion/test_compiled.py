"""DMD2 with its three networks compiled against DMD2 as it is."""

import copy
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.core.callbacks import EMA, Compile
from lit_distill.diffusion.methods.dmd2 import DMD2

NETWORKS = ["teacher.network", "student.network", "fake.network"]


def after(folder, iterations):
    """The checkpoint after so many iterations."""
    kept = {torch.load(file, weights_only=True)["iteration"]: file for file in folder.glob("*.ckpt")}
    return kept[iterations]


@pytest.fixture
def build(make_denoiser, little):
    def made():
        torch._dynamo.reset()
        return DMD2(
            make_denoiser(0),
            make_denoiser(1),
            [2.5],
            fake_updates=2,
            guidance=1.5,
            taps=["network.blocks.0"],
            evaluation=little,
        )

    return made


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,  # half a minute of g++
                pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler on this machine"),
            ],
        ),
    ],
)
def test_plain_and_compiled_runs_go_on_from_each_others_checkpoints(build, trainer, digits, tmp_path, backend):
    def fit(module, *callbacks, path=None):
        fit = trainer(callbacks=[EMA(0.5), *callbacks], enable_checkpointing=True, limit_train_batches=4)
        fit.fit(module, datamodule=copy.deepcopy(digits), ckpt_path=path, weights_only=True)
        return module

    def keep(name):
        return ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, every_n_train_steps=1)

    plain = fit(build(), keep("plain"))
    compile_them = Compile(NETWORKS, backend=backend)
    resumed = fit(build(), compile_them, keep("compiled"), path=after(tmp_path / "plain", 2))
    assert all(resumed.get_submodule(name)._compiled_call_impl is not None for name in NETWORKS)
    again = fit(build(), path=after(tmp_path / "compiled", 3))
    for module in (resumed, again):
        assert module.iteration == 4
        assert module.state_dict().keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
