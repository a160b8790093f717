import pytest
import torch
from given_nodes import Given, adam, sage, source, with_other_hidden_nodes
from torch.distributions import Categorical, kl_divergence
from torch_geometric.nn.models import MLP

from lit_distill.core.errors import UsageError
from lit_distill.graph.methods.glnn import GLNN
from lit_distill.graph.nodes import NodeClassifier, node_logits


def mlp(seed=0, **kwargs):
    torch.manual_seed(seed)
    return MLP([5, 8, 2], **{"norm": None, **kwargs})


def weights(module):
    return [value.clone() for value in module.student.state_dict().values()]


def test_terms_are_means_over_labelled_and_visible_nodes_and_the_teacher_stays_as_it_was(trainer):
    data, teacher = Given(source()), sage(norm="batch_norm")
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    module = GLNN(mlp(), teacher, label_weight=0.3)
    data.setup()
    with torch.no_grad():
        target = Categorical(logits=teacher.eval()(*data.observed).double())
        divergence = kl_divergence(target, Categorical(logits=mlp()(data.observed.features).double())).mean()
        train = data.part("train")
        likelihood = Categorical(logits=mlp()(train.features).double()).log_prob(train.labels).mean()
    trainer().fit(module, datamodule=data)
    assert len(data.observed.features) == 52  # hidden: a fifth of 40
    assert module.iteration == 1
    assert float(module.terms["kd"]) == pytest.approx(0.7 * float(divergence), rel=1e-4)
    assert float(module.terms["ce"]) == pytest.approx(-0.3 * float(likelihood), rel=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(module.student.parameters(), mlp().parameters(), strict=True))


def test_targets_go_with_their_nodes_in_shuffled_batches(trainer):
    data, module = Given(source(), batch_size=16), GLNN(mlp(), sage(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    seen = []
    combine = module.combine
    module.combine = lambda terms: seen.append(float(terms["kd"])) or combine(terms)
    trainer().fit(module, datamodule=data)
    with torch.no_grad():
        target, logits = Categorical(logits=sage()(*data.observed)), mlp()(data.observed.features)
    whole = kl_divergence(target, Categorical(logits=logits)).mean()
    assert len(seen) == 4
    assert sum(a * b for a, b in zip(seen, (16, 16, 16, 4), strict=True)) / 52 == pytest.approx(float(whole), rel=1e-4)


def test_the_gradient_at_the_student_s_logits_is_the_difference_of_probabilities(trainer):
    data, student = Given(source()), mlp()
    captured = []
    bias = student.lins[-1].bias  # its gradient is the sum of those at the logits
    bias.register_hook(lambda gradient: captured.append(gradient.clone()))
    trainer().fit(GLNN(student, sage()), datamodule=data)
    with torch.no_grad():
        p_s, p_t = mlp()(data.observed.features).softmax(1), sage()(*data.observed).softmax(1)
    assert torch.allclose(captured[0], (p_s - p_t).mean(0), atol=1e-6)


def test_without_a_weight_for_labels_they_are_not_looked_at(trainer):
    ends = []
    for flip in (False, True):
        given = source()
        data = Given(given)
        data.setup()
        if flip:
            data._parts = {
                name: part._replace(labels=torch.where(part.labels < 0, part.labels, 1 - part.labels))
                for name, part in data._parts.items()
            }
        module = GLNN(mlp(), sage(), optimizer=adam)
        trainer(max_epochs=3).fit(module, datamodule=data)
        assert set(module.terms) == {"kd"}
        ends.append(weights(module))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("norm", [None, "batch_norm"])
def test_labels_alone_are_plain_training(trainer, norm):
    def sgd(parameters):  # Adam would blow rounding errors up where normalization takes a gradient away
        return torch.optim.SGD(parameters, lr=0.1)

    plain = NodeClassifier(mlp(norm=norm), optimizer=sgd)
    trainer(max_epochs=5).fit(plain, datamodule=Given(source()))
    module = GLNN(mlp(norm=norm), sage(), label_weight=1.0, optimizer=sgd)
    trainer(max_epochs=5).fit(module, datamodule=Given(source()))
    assert plain.iteration == module.iteration == 5
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(plain), weights(module), strict=True))
    assert not torch.allclose(plain.student.lins[0].weight, mlp(norm=norm).lins[0].weight, atol=1e-2)


def test_each_step_draws_no_more_labels_than_its_batch_has_nodes(trainer):
    module = GLNN(mlp(), sage(), label_weight=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    drawn = []
    module.student.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0].clone()))
    data = Given(source(), batch_size=4)
    trainer(max_epochs=1).fit(module, datamodule=data)
    assert [len(features) for features in drawn] == [4] * 13
    labelled = {tuple(row) for row in data.part("train").features.tolist()}
    found = {tuple(row) for features in drawn for row in features.tolist()}
    assert found == labelled  # all get their turn, and nothing but them
    assert all(len({tuple(row) for row in features.tolist()}) == 4 for features in drawn)


def test_hidden_nodes_reach_neither_targets_nor_student(trainer):
    ends, targets = [], []
    for given in (source(), with_other_hidden_nodes()):
        module = GLNN(mlp(norm="batch_norm"), sage(norm="instance_norm"), label_weight=0.5, optimizer=adam)
        trainer(max_epochs=3).fit(module, datamodule=Given(given, batch_size=16))
        ends.append(weights(module))
        targets.append(module.targets)
    assert torch.equal(*targets)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_student_does_not_see_edges_and_the_teacher_does():
    data = Given(source())
    batch = next(iter(data.test_dataloader()))
    cut = batch._replace(graph=batch.graph._replace(edge_index=batch.graph.edge_index[:, :3]))
    assert torch.equal(node_logits(mlp(), batch), node_logits(mlp(), cut))
    assert not torch.equal(node_logits(sage(), batch), node_logits(sage(), cut))


def test_a_student_of_the_teacher_agrees_with_it(trainer):
    data, teacher = Given(source(count=200)), sage()
    trainer(max_epochs=50).fit(NodeClassifier(teacher, optimizer=adam), datamodule=data)
    module = GLNN(mlp(), teacher, optimizer=adam)
    fit = trainer(max_epochs=200)
    fit.fit(module, datamodule=data)
    found = fit.test(module, datamodule=data, verbose=False)[0]
    assert found["test/agreement"] >= 0.85
    batch = next(iter(data.test_dataloader()))
    hits, chance = module.teacher_hits(batch)
    assert found["test/teacher_acc"] == pytest.approx(float(hits.float().mean()))
    assert chance == 0.5


def test_a_resumed_run_ends_as_the_uninterrupted_one(trainer, tmp_path):
    def module():
        return GLNN(mlp(dropout=0.5), sage(), label_weight=0.3, optimizer=adam)

    whole, half, resumed = module(), module(), module()
    trainer(max_epochs=3).fit(whole, datamodule=Given(source(), batch_size=8))
    first = trainer(max_epochs=1)
    first.fit(half, datamodule=Given(source(), batch_size=8))
    first.save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("student.") for key in stored)
    trainer(max_epochs=3).fit(resumed, datamodule=Given(source(), batch_size=8), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_networks_and_weights_that_do_not_fit_are_refused(trainer):
    for weight in (-0.1, 1.5):
        with pytest.raises(UsageError, match=rf"model\.label_weight is {weight}; give a share of the loss"):
            GLNN(mlp(), sage(), label_weight=weight)
    with pytest.raises(UsageError, match=r"model\.student: GraphSAGE reads edges; .*torch_geometric\.nn\.models\.MLP"):
        GLNN(sage(), sage())
    with pytest.raises(UsageError, match=r"model\.teacher has 5 classes, the data 2; set out_channels to 2"):
        trainer().fit(GLNN(mlp(), sage(classes=5)), datamodule=Given(source()))
