import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from lit_distill.core.errors import UsageError
from lit_distill.image.methods.dml import DML


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_each_term_is_the_mean_divergence_from_the_others(step, tiny, blobs, temperature):
    networks = [tiny(), tiny(6, seed=5), tiny(5, seed=7)]
    logits = [network(blobs.images[:8]).detach().double().numpy() for network in networks]
    module = DML(
        networks[0], networks[1:], temperature=temperature, divergence_weight=0.7, sequential=False, optimizer=sgd
    )
    _, terms = step(module)
    p = [softmax(values / temperature, 1) for values in logits]
    labels = blobs.labels[:8].numpy()
    for k, name in enumerate(("", "peer1_", "peer2_")):
        divergences = [rel_entr(p[other], p[k]).sum(1).mean() for other in range(3) if other != k]
        assert terms[f"{name}divergence"] == pytest.approx(0.7 * temperature**2 * sum(divergences) / 2, rel=1e-3)
        assert terms[f"{name}ce"] == pytest.approx(-log_softmax(logits[k], 1)[np.arange(8), labels].mean(), rel=1e-4)


def test_in_turn_a_network_learns_from_what_the_others_say_after_their_update(step, tiny, blobs):
    module = DML(tiny(), [tiny(6, seed=5)], optimizer=sgd)
    peer = tiny(6, seed=5)(blobs.images[:8]).detach().double().numpy()
    _, terms = step(module)
    with torch.no_grad():  # in training mode: BatchNorm's statistics are the batch's
        student = module.student.train()(blobs.images[:8]).double().numpy()
        before = tiny()(blobs.images[:8]).double().numpy()
    expected, stale = (rel_entr(softmax(values, 1), softmax(peer, 1)).sum(1).mean() for values in (student, before))
    assert terms["peer1_divergence"] == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx(stale, rel=1e-2)


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_identical_networks_stay_identical_unless_one_is_updated_first(trainer, blobs, tiny):
    for sequential in (False, True):
        module = DML(tiny(), [tiny()], sequential=sequential, optimizer=sgd)
        trainer().fit(module, datamodule=blobs)
        assert torch.equal(weights(module.student), weights(module.peers[0])) != sequential
        assert not torch.equal(weights(module.student), weights(tiny()))


def test_it_is_symmetric_under_swapping_the_networks(trainer, blobs, tiny):
    one = DML(tiny(), [tiny(6, seed=5)], sequential=False, optimizer=sgd)
    two = DML(tiny(6, seed=5), [tiny()], sequential=False, optimizer=sgd)
    for module in (one, two):
        trainer().fit(module, datamodule=blobs)
    assert torch.equal(weights(one.student), weights(two.peers[0]))
    assert torch.equal(weights(one.peers[0]), weights(two.student))


def test_defaults_are_the_papers(tiny):
    module = DML(tiny(), [tiny()])
    assert (module.temperature, module.divergence_weight, module.sequential, module.clip_norm) == (1.0, 1.0, True, None)


def test_no_peers_are_refused(tiny):
    with pytest.raises(UsageError, match=r"model\.peers is empty"):
        DML(tiny(), [])
