import pytest
import torch
from torch import nn

from lit_distill.core.callbacks import EMA, Compile
from lit_distill.core.distiller import Distiller
from lit_distill.core.errors import UsageError
from lit_distill.core.taps import FeatureTaps


class Imitating(Distiller):
    """A student that is to say what its teacher says."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            wanted = self.teacher(batch.images)
        return self.combine({"kd": nn.functional.mse_loss(self.student(batch.images), wanted)})


@pytest.fixture
def counted():
    """Registers a backend that counts how often what it made runs."""
    runs = []

    def counting(graph, _inputs):
        def run(*args):
            runs.append(graph)
            return graph(*args)

        return run

    torch._dynamo.reset()
    torch._dynamo.register_backend(counting, name="counting")
    yield runs
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counting")


def test_named_networks_run_compiled_and_nothing_else_changes(trainer, blobs, tiny, counted):
    plain, compiled = (Imitating(tiny(), tiny(seed=5)) for _ in range(2))
    trainer(callbacks=[EMA(0.5)]).fit(plain, datamodule=blobs)
    assert not counted
    callback = Compile(["teacher", "student"], backend="counting")
    trainer(callbacks=[callback, EMA(0.5)]).fit(compiled, datamodule=blobs)
    assert len(counted) == 2 * 3  # two networks, three batches
    assert len({id(graph) for graph in counted}) == 2
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_taps_see_inside_a_compiled_network(tiny, counted):
    network, images = tiny().eval(), torch.randn(4, 2, 8, 8)
    output, features = FeatureTaps(network, ["stage1", "head@input"])(images)
    network.compile(backend="counting")
    torch.testing.assert_close(network(images), output)
    assert len(counted) == 1
    taps = FeatureTaps(network, ["stage1", "head@input"])
    for found in (taps(images)[1], taps.features(images)):
        assert found.keys() == features.keys()
        for name, value in features.items():
            assert torch.equal(found[name], value)
    network.stage1.compile(backend="counting")  # the tapped module itself
    assert torch.equal(FeatureTaps(network, ["stage1"]).features(images)["stage1"], features["stage1"])
    assert len(counted) == 1


def test_what_cannot_be_compiled_is_told(trainer, blobs, tiny):
    with pytest.raises(UsageError, match=r"no backend 'inducer'; give one of .*inductor"):
        Compile(backend="inducer")
    module = Imitating(tiny(), tiny())
    with pytest.raises(UsageError, match=r"Imitating has no network 'student\.body'; it has student, teacher"):
        trainer(callbacks=[Compile(["student.body"], backend="eager")]).fit(module, datamodule=blobs)


def test_a_missing_compiler_is_told_in_a_line(trainer, blobs, tiny):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UsageError, match=r"^callback Compile: there is no C\+\+ compiler .* install g\+\+[^\n]*$"),
    ):
        trainer(callbacks=[Compile()]).fit(Imitating(tiny(), tiny()), datamodule=blobs)
