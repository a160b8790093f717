import numpy as np
import pytest
import torch
from torch_geometric.nn.models import GIN

from lit_distill.core import Linear
from lit_distill.core.errors import UsageError
from lit_distill.graph import DeepSets, GraphNetwork
from lit_distill.graph.distillation import GraphDistiller
from lit_distill.graph.methods.feature_kd import FeatureKD


def student(width=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    return GraphNetwork(DeepSets(width, width, 2), [3], 2, **kwargs)


def teacher(width=8, seed=1, **kwargs):
    torch.manual_seed(seed)
    return GraphNetwork(GIN(width, width, 2, norm="batch_norm"), [3], 2, **kwargs)


def readouts(network, data):
    """Sums of node embeddings, graph by graph."""
    graphs = data.part("train")
    batch = graphs.batch(torch.arange(graphs.size))
    with torch.no_grad():
        nodes = network.embed_nodes(batch).double().numpy()
    return np.stack([nodes[batch.graph.numpy() == number].sum(0) for number in range(graphs.size)]), batch


def test_hint_is_the_mean_squared_difference_of_projected_readouts(trainer, data):
    module = FeatureKD(student(), teacher(), hint_weight=0.3, label_weight=0.5)
    seen = []
    compare = module.compare

    def watch(*args):
        weight, bias = (p.detach().double().numpy().copy() for p in module.regressor.parameters())
        seen.append((weight, bias))
        return compare(*args)

    module.compare = watch
    trainer().fit(module, datamodule=data)
    (weight, bias), (own, batch) = seen[0], readouts(student(), data)
    target, _ = readouts(teacher().eval(), data)
    assert weight.shape == (8, 4)
    assert float(module.terms["hint"]) == pytest.approx(0.3 * ((own @ weight.T + bias - target) ** 2).mean(), rel=1e-4)
    logits = student()(batch).detach().double().numpy()
    chosen = np.exp(logits)[np.arange(len(logits)), batch.labels] / np.exp(logits).sum(1)
    assert float(module.terms["ce"]) == pytest.approx(-0.5 * np.log(chosen).mean(), rel=1e-4)
    assert set(module.terms) == {"ce", "hint"}


def test_student_and_regressor_learn_and_the_teacher_stays_as_it_was(trainer, data):
    module = FeatureKD(student(), teacher())
    before = {key: value.clone() for key, value in module.teacher.state_dict().items()}
    trainer(max_epochs=2).fit(module, datamodule=data)
    assert all(torch.equal(value, before[key]) for key, value in module.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in module.teacher.parameters())
    for moved, first in zip(module.student.parameters(), student().parameters(), strict=True):
        assert not torch.equal(moved, first)
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.regressor.parameters())


def test_the_hint_alone_does_not_reach_the_head_and_ends_where_the_teacher_is(trainer, data):
    # A student like its teacher, and the identity as regressor: nothing is left to match.
    module = FeatureKD(student(seed=3), student(seed=3), label_weight=0.0)
    module.trainer = trainer()
    module.trainer.strategy.connect(module)
    module.trainer._data_connector.attach_data(module, datamodule=data)
    module.build()
    with torch.no_grad():
        module.regressor.weight.copy_(torch.eye(4))
        module.regressor.bias.zero_()
    _, batch = readouts(module.student, data)
    loss = module.training_step(batch, 0)
    assert float(loss) == pytest.approx(0.0, abs=1e-10)
    module.regressor.bias.data.fill_(0.5)
    module.training_step(batch, 0).backward()
    assert module.student.head.weight.grad is None
    assert torch.allclose(module.regressor.bias.grad, torch.full((4,), 2 * 0.5 / 4))


def test_dropout_takes_no_part_in_the_hint(trainer, data):
    losses = []
    for share in (0.0, 0.9):
        module = FeatureKD(student(dropout=share), teacher(dropout=share), label_weight=0.0)
        trainer().fit(module, datamodule=data)
        losses.append(float(module.terms["hint"]))
    assert losses[0] == losses[1]


def test_terms_come_and_go_with_their_weights_and_the_teacher_runs_only_for_one(trainer, data):
    module = FeatureKD(student(), teacher(), hint_weight=Linear(0.0, 1.0, 2), kd_weight=Linear(0.0, 2.0, 2))
    seen, ran = [], []
    combine = module.combine
    module.combine = lambda terms: seen.append(set(terms)) or combine(terms)
    module.teacher.register_forward_hook(lambda *_: ran.append(len(seen)))
    trainer(max_epochs=2).fit(module, datamodule=data)
    assert seen == [{"ce"}, {"ce", "kd", "hint"}]
    assert ran == [1]


def test_nothing_to_train_on_and_temperatures_of_zero_are_refused(trainer, data):
    with pytest.raises(UsageError, match=r"model\.temperature is 0\.0; it must be above 0"):
        FeatureKD(student(), teacher(), temperature=0.0)
    with pytest.raises(UsageError, match=r"label_weight is 0 and so are the others"):
        trainer().fit(FeatureKD(student(), teacher(), hint_weight=0.0, label_weight=0.0), datamodule=data)
    module = FeatureKD(student(), teacher())
    module.teacher = None
    with pytest.raises(UsageError, match=r"model\.teacher is missing"):
        trainer().fit(module, datamodule=data)


def test_a_base_without_a_feature_is_logit_distillation(trainer, data):
    module = GraphDistiller(student(), teacher(), kd_weight=1.0)
    trainer().fit(module, datamodule=data)
    assert set(module.terms) == {"ce", "kd"}


def test_cost_of_a_graph_network_is_that_of_its_products(trainer, data):
    from lit_distill.core.callbacks import Efficiency

    efficiency = Efficiency()
    module = FeatureKD(student(), teacher())
    fit = trainer(callbacks=[efficiency])
    fit.fit(module, datamodule=data)
    fit.test(module, datamodule=data, verbose=False)
    test = data.part("test")
    nodes = len(test.nodes) / test.size  # on average: two layers of 4 x 4 for each, and a head of 4 x 2
    assert efficiency.values["student_flops"] == pytest.approx(nodes * 2 * 2 * 4 * 4 + 2 * 4 * 2)
    assert efficiency.values["student_params"] == 3 * 4 + 2 * (4 * 4 + 4) + 4 * 2 + 2
    assert efficiency.values["compression"] == pytest.approx(
        sum(p.numel() for p in module.teacher.parameters()) / efficiency.values["student_params"]
    )
    assert efficiency.values["inference_samples_per_second"] > test.size
