"""Memory on paper against torch's own tracker, which runs FSDP2 with fake tensors and a fake process group."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from lit_distill.core.memory import footprint, gib, memory_rows, optimizer_states, transformer_activations
from lit_distill.core.strategies import shard, sharded_units

tracker = pytest.importorskip("torch.distributed._tools.fsdp2_mem_tracker", reason="this torch has no tracker")
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason="this torch has no fake processes")
DEVICES = 3


def llama(vocabulary, **options):
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 4, "vocab_size": vocabulary, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))


@pytest.fixture
def mesh():
    distributed.init_process_group("fake", rank=0, world_size=DEVICES, store=fake.FakeStore())
    yield init_device_mesh("cpu", (DEVICES,), mesh_dim_names=("data_parallel",))
    distributed.destroy_process_group()


@pytest.fixture
def track(mesh):
    """Runs a network on two tokens, sharded; returns bytes by kind: at the peak, in the end, after the forward."""

    def run(build, *, trained, autocast=False):
        with torch._subclasses.fake_tensor.FakeTensorMode():
            network = build()
            shard(network, mesh)
            network.requires_grad_(trained)
            memory = tracker.FSDPMemTracker(network)
            ids = torch.zeros(1, 2, dtype=torch.long)
            with memory, torch.set_grad_enabled(trained):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = network(ids).logits.float().mean()
                    between = memory.get_tracker_snapshot("current")
                if trained:
                    loss.backward()
                    network.zero_grad()
            found = [memory.get_tracker_snapshot("peak"), memory.get_tracker_snapshot("current"), between]
            return [{getattr(kind, "name", kind): v for kind, v in each[torch.device("cpu")].items()} for each in found]

    return run


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("vocabulary", [50, 997])
def test_trained_network_is_what_torch_tracks(track, vocabulary):
    peak, after, _ = track(lambda: llama(vocabulary), trained=True)
    found = footprint(on_meta(lambda: llama(vocabulary)), DEVICES)
    assert after["SHARDED_PARAM"] == found.parameters
    network = on_meta(lambda: llama(vocabulary))
    block, root = (4 * sum(weight.numel() for weight in sharded_units(network)[at]) for at in (0, -1))
    collectives = peak["UNSHARDED_PARAM"] + peak["ALL_GATHER"] + peak["REDUCE_SCATTER"]
    if root < 4 * block / 2:
        assert found.gathered == root + 4 * block
        assert collectives + block == pytest.approx(found.gathered, rel=0.02)  # and the gradients of the block
    else:
        assert found.gathered == 3 * root
        assert collectives + root == pytest.approx(found.gathered, rel=0.15)


@pytest.mark.parametrize("vocabulary", [50, 997])
def test_frozen_network_keeps_its_root_whole(track, vocabulary):
    peak, after, _ = track(lambda: llama(vocabulary), trained=False)
    network = on_meta(lambda: llama(vocabulary))
    found = footprint(network, DEVICES, trained=False)
    root = 4 * sum(weight.numel() for weight in sharded_units(network)[-1])
    assert after["SHARDED_PARAM"] == found.parameters
    assert after["UNSHARDED_PARAM"] == pytest.approx(root, rel=0.03)
    assert peak["UNSHARDED_PARAM"] + peak["ALL_GATHER"] == pytest.approx(found.gathered, rel=0.02)
    assert (found.gradients, found.optimizer, found.copies) == (0, 0, 0)


def test_autocast_keeps_copies_of_what_is_multiplied(track):
    found = footprint(on_meta(lambda: llama(52)), DEVICES, autocast=True)
    kept = [track(lambda: llama(52), trained=True, autocast=half)[2]["ACT"] for half in (False, True)]
    assert kept[1] - kept[0] == pytest.approx(found.copies, rel=0.1)  # two tokens have next to no activations
    assert footprint(on_meta(lambda: llama(52)), DEVICES).copies == 0
    looked_up = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 7))
    assert footprint(looked_up, 1, autocast=True).copies == 2 * 28  # neither the table nor the bias


def test_shards_are_of_equal_rows():
    linear = nn.Linear(10, 7)  # on 4 devices 2 of 7 rows each
    found = footprint(linear, 4, optimizer_states=1.0)
    assert (found.parameters, found.gradients, found.optimizer) == (88, 88, 88)
    alone = footprint(linear, 1)
    assert (alone.parameters, alone.gradients, alone.optimizer, alone.gathered) == (308, 308, 616, 0)
    assert alone.total == 1232


def test_shared_and_frozen_weights():
    tied = on_meta(lambda: llama(50, tie_word_embeddings=True))
    embedding = 50 * 64 * 4
    assert footprint(on_meta(lambda: llama(50)), 1).parameters - footprint(tied, 1).parameters == embedding
    adapted = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 1, bias=False))
    adapted[0].weight.requires_grad = False
    found = footprint(adapted, 1)
    assert (found.parameters, found.gradients, found.optimizer) == (440, 40, 80)


@pytest.mark.parametrize(
    ("build", "states"),
    [
        (torch.optim.AdamW, 2.0),
        (lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9), 1.0),
        (lambda weights: torch.optim.SGD(weights, lr=0.1), 0.0),
        (lambda weights: torch.optim.AdamW(weights, amsgrad=True), 3.0),
    ],
)
def test_states_of_optimizers(build, states):
    assert optimizer_states(build) == states


def test_activations_are_those_of_the_paper():
    b, s, h, layers = 4, 2048, 6144, 48
    assert transformer_activations(b, s, h, layers) == 34 * s * b * h * layers
    one = 34 * s * b * h
    assert transformer_activations(b, s, h, layers, checkpointing=True) == 2 * s * b * h * layers + one
    assert transformer_activations(b, s, h, layers, itemsize=4) == 2 * 34 * s * b * h * layers


def test_table_adds_up():
    linear = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    head, student, teacher, total = memory_rows({"student": (linear, {}), "teacher": (linear, {"trained": False})}, [1])
    assert head[0] == "network"
    assert student == ["student", "1", "0.0039", "0.0039", "0.01", "0.00", "0.00", "0.02"]
    assert teacher[2:] == ["0.0039", "0.00", "0.00", "0.00", "0.00", "0.0039"]
    assert total[:2] == ["all", "1"]
    assert total[-1] == "0.02"
    assert gib(5 * 2**30) == "5.00"
