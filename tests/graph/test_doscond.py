import pytest
import torch
import torch.nn.functional as F
from given import Given
from safetensors.torch import load_file
from torch import nn
from torch_geometric.nn.models import GAT, GCN, GIN

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import redraw
from lit_distill.graph.condensed import CondensedGraphs, SyntheticGraphs, dense
from lit_distill.graph.methods.doscond import DosCond
from lit_distill.graph.models import GraphNetwork
from lit_distill.losses.gradients import gradient_distance


@pytest.fixture
def graphs(random_set):
    return random_set(count=50, nodes=8)


def gcn(**kwargs):
    torch.manual_seed(0)
    return GraphNetwork(GCN(8, 8, 2), [3], 2, readout="mean", **kwargs)


def doscond(student=None, **kwargs):
    return DosCond(student or gcn(), **{"student_epochs": 5, **kwargs})


@pytest.fixture
def fitted(trainer, graphs):
    """Builds a module after so many iterations."""

    def build(steps=1, data=None, fit=None, **kwargs):
        module = doscond(**kwargs)
        fit = fit or trainer(max_steps=steps, max_epochs=-1)
        fit.fit(module, datamodule=data or Given(graphs))
        return module

    return build


def step(module):
    train = module._data().part("train")
    return module.training_step(train.batch(torch.arange(2)), 0)  # which batch does not matter


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_cross_entropy(fitted, graphs):
    module = fitted()
    batch = graphs.batch(torch.arange(7))
    twin = gcn()
    twin.load_state_dict(module.student.state_dict())
    F.cross_entropy(twin(batch), batch.labels).backward()
    for own, parameter in zip(module.gradient(batch), twin.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad)
        assert not own.requires_grad
    assert all(parameter.grad is None for parameter in module.student.parameters())


def test_equal_graphs_have_distance_0(fitted, graphs):
    module = fitted()
    index = torch.arange(6)
    features, adjacency, labels = dense(graphs.take(index), [3], nodes=8)
    same = SyntheticGraphs(features, adjacency, labels)
    real = module.gradient(graphs.batch(index))
    matched = module.gradient(same.batch(index, adjacency.float()), create_graph=True)
    for metric in ("mse", "rows", "cos"):
        assert float(gradient_distance(matched, real, metric=metric)) == pytest.approx(0, abs=1e-5)
    other = module.gradient(same.batch(index, 1 - adjacency.float()))
    assert float(gradient_distance(other, real)) > 1e-3


@pytest.mark.parametrize("match_classes", [True, False])
def test_the_loss_is_a_distance_for_each_class_and_the_excess_of_edges(fitted, graphs, match_classes):
    data = Given(graphs)
    module = fitted(data=data, per_class=2, sparsity_weight=3.0, match_classes=match_classes)
    with torch.no_grad():
        module.synthetic.logits += 2.0
        module.synthetic.logits[:, 0, 1] += 1.0
    torch.manual_seed(5)
    step(module)
    train, synthetic = data.part("train"), module.synthetic
    # The same draws in the same order: weights, edges, then the real graphs, all of them since there are few.
    torch.manual_seed(5)
    redraw(module.student)
    adjacency = synthetic.adjacency(0.01 ** (1 / 200))
    expected = 0.0
    for number in (0, 1) if match_classes else ((0, 1),):
        wanted = torch.tensor(number)
        real = module.gradient(train.batch(torch.isin(train.labels, wanted).nonzero()[:, 0]))
        own = torch.isin(synthetic.labels, wanted).nonzero()[:, 0]
        matched = module.gradient(synthetic.batch(own, adjacency[own]))
        squares = [((a - b) ** 2).sum() for a, b in zip(matched, real, strict=True)]
        expected += float(sum(squares) / sum((b**2).sum() for b in real))
    assert module.terms["match"].item() == pytest.approx(expected, rel=1e-3)
    probability = 1 / (1 + torch.exp(-synthetic.logits.detach()))
    excess = float(probability.mean() - synthetic.density)
    assert excess > 0.02
    assert module.terms["sparsity"].item() == pytest.approx(3.0 * excess, rel=1e-4)
    with torch.no_grad():
        synthetic.logits.fill_(-9.0)
    step(module)
    assert module.terms["sparsity"].item() == 0


def test_the_loss_reaches_features_and_edges_and_not_the_network(fitted):
    module = fitted()
    module.synthetic.zero_grad()
    step(module).backward()
    assert module.synthetic.features.grad.abs().sum() > 0
    off = ~torch.eye(module.synthetic.logits.shape[1], dtype=torch.bool)
    assert module.synthetic.logits.grad[:, off].abs().min() > 0
    torch.testing.assert_close(module.synthetic.logits.grad, module.synthetic.logits.grad.mT)
    assert all(parameter.grad is None for parameter in module.student.parameters())


def test_a_matched_gradient_has_the_derivative_of_finite_differences(fitted):
    module = fitted().double()
    synthetic = module.synthetic
    module.combine = lambda terms: terms["match"]

    def loss():
        torch.manual_seed(2)
        return step(module)

    synthetic.zero_grad()
    loss().backward()
    for parameter in (synthetic.features, synthetic.logits):
        with torch.no_grad():
            parameter[0, 1, 2] += 1e-5
        upper = float(loss().detach())
        with torch.no_grad():
            parameter[0, 1, 2] -= 2e-5
        slope = (upper - float(loss().detach())) / 2e-5
        with torch.no_grad():
            parameter[0, 1, 2] += 1e-5
        assert float(parameter.grad[0, 1, 2]) == pytest.approx(slope, rel=1e-4)
        assert abs(slope) > 1e-6


def test_weights_are_drawn_anew_each_iteration_and_never_trained(fitted, monkeypatch):
    seen = []
    gradient = DosCond.gradient
    monkeypatch.setattr(
        DosCond,
        "gradient",
        lambda self, batch, **kwargs: seen.append(self.student.head.weight.clone()) or gradient(self, batch, **kwargs),
    )
    fitted(steps=2)
    assert len(seen) == 8  # real and synthetic, two classes, two iterations
    assert all(torch.equal(weight, seen[0]) for weight in seen[:4])
    assert all(torch.equal(weight, seen[4]) for weight in seen[4:])
    assert not torch.equal(seen[0], seen[4])


def test_real_graphs_are_of_the_class_and_as_many_as_asked_for(fitted, monkeypatch):
    seen = []
    gradient = DosCond.gradient
    monkeypatch.setattr(
        DosCond, "gradient", lambda self, batch, **kw: seen.append(batch) or gradient(self, batch, **kw)
    )
    fitted(steps=2, real_batch=4, per_class=2)
    real = [batch for batch in seen if batch.edge_weight is None]
    assert [batch.labels.tolist() for batch in real] == [[0] * 4, [1] * 4] * 2
    assert [b.labels.tolist() for b in seen if b.edge_weight is not None] == [[0, 0], [1, 1]] * 2
    assert all(len(set(batch.index.tolist())) == 4 for batch in real)
    assert real[0].index.tolist() != real[2].index.tolist()
    seen.clear()
    fitted(steps=1, real_batch=4, per_class=2, match_classes=False)
    assert [sorted(batch.labels.tolist()) for batch in seen] == [[0] * 4 + [1] * 4, [0, 0, 1, 1]]
    assert len(set(seen[0].index.tolist())) == 8


# ---- the module ----------------------------------------------------------------------------------------------------


def test_matching_comes_down(fitted, random_set):
    # Two classes that differ in their labels, and a set that knows nothing of them at the beginning.
    graphs = random_set(count=40, nodes=8)
    shifted = graphs.nodes.clone()
    shifted[graphs.labels[graphs.graph()] == 1] = 2
    data = Given(type(graphs)(**{**vars(graphs), "nodes": shifted}))
    module = fitted(data=data, feature_lr=0.05, adjacency_lr=0.05)
    with torch.no_grad():
        module.synthetic.features.fill_(1 / 3)

    def match():
        torch.manual_seed(9)
        return sum(float(step(module).detach()) for _ in range(10))

    before = match()
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(30):
        optimizer.zero_grad()
        step(module).backward()
        optimizer.step()
    assert match() < 0.5 * before


def test_features_and_edges_have_learning_rates_of_their_own_and_a_schedule(trainer, graphs):
    def halved(optimizer):
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1)

    module = doscond(feature_lr=0.02, adjacency_lr=0.5, lr_scheduler=halved)
    fit = trainer(max_steps=3, max_epochs=-1)
    fit.fit(module, datamodule=Given(graphs))
    groups = {tuple(group["params"][0].shape): group["lr"] for group in fit.optimizers[0].param_groups}
    shapes = {"features": module.synthetic.features.shape, "logits": module.synthetic.logits.shape}
    assert groups[tuple(shapes["features"])] == pytest.approx(0.002)
    assert groups[tuple(shapes["logits"])] == pytest.approx(0.05)
    assert type(fit.optimizers[0]) is torch.optim.Adam


def test_a_rate_of_0_leaves_the_edges(fitted):
    module = fitted(steps=3, adjacency_lr=0.0)
    assert sorted(module.synthetic.logits.unique().tolist()) == [-5.0, 5.0]
    assert not torch.isin(module.synthetic.features.detach(), torch.tensor([0.0, 1.0])).all()


def test_a_run_leaves_the_set_and_a_student_that_was_trained_on_it(tmp_path, trainer, graphs):
    from lightning.pytorch.loggers import CSVLogger

    module = doscond(per_class=2, student_epochs=400)
    fit = trainer(max_steps=3, max_epochs=-1, logger=CSVLogger(tmp_path, "r", "v"), limit_val_batches=1.0)
    data = Given(graphs)
    fit.fit(module, datamodule=data)
    found = CondensedGraphs.load(tmp_path / "r" / "v" / "distilled")
    assert torch.equal(found.features, module.synthetic.features.detach())
    assert torch.equal(found.adjacency, module.synthetic.hard())
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.description["iterations"] == 3
    student = {name: value.clone() for name, value in module.student.state_dict().items()}
    result = fit.test(module, datamodule=data, verbose=False)[0]
    assert result["test/bytes"] == found.footprint()["bytes"]
    assert {"test/acc", "test/auroc", "test/bytes_expanded"} <= set(result)
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, student[name])  # what was tested is what is kept
    # By hand: a new network learns the set in full batches.
    batch = found.graphs().batch(torch.arange(4))
    trained = F.cross_entropy(module.student(batch), batch.labels)
    redraw(module.student)
    assert trained < 0.9 * F.cross_entropy(module.student(batch), batch.labels)
    assert load_file(tmp_path / "r" / "v" / "distilled" / "graphs.safetensors").keys() == {
        "features",
        "adjacency",
        "labels",
    }


def test_a_resumed_run_ends_with_the_same_set(trainer, fitted, graphs, tmp_path):
    whole = fitted(steps=7)
    half = trainer(max_steps=4, max_epochs=-1)
    half.fit(doscond(), datamodule=Given(graphs))
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not any(name.startswith("student") for name in saved["state_dict"])
    resumed = doscond(gcn())
    trainer(max_steps=7, max_epochs=-1).fit(resumed, datamodule=Given(graphs), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.iteration == 7
    for name in ("features", "logits", "labels", "density"):
        assert torch.equal(getattr(resumed.synthetic, name), getattr(whole.synthetic, name))
    tested = trainer().test(doscond(), datamodule=Given(graphs), ckpt_path=tmp_path / "half.ckpt", verbose=False)[0]
    again = half.test(half.lightning_module, datamodule=Given(graphs), verbose=False)[0]
    assert tested == pytest.approx(again)  # another process trains the same student on the same set


def test_nodes_are_the_mean_if_not_given(fitted, make_set):
    one, two = ([0] * 3, [(0, 1)], None), ([2] * 6, [(0, 1), (1, 2)], None)
    data = Given(make_set([one] * 10 + [two] * 10, [0, 1] * 10))
    data.setup()
    sizes = data.part("train").node_start.diff().float()
    assert fitted(data=data).synthetic.features.shape[1] == round(float(sizes.mean()))
    assert fitted(data=data, nodes=6).synthetic.features.shape == (2, 6, 3)


# ---- mistakes ------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    in_channels = out_channels = 8

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x, edge_index, edge_weight=None):
        return x @ self.weight


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"per_class": 0}, r"model\.per_class is 0; give 1 or more"),
        ({"feature_lr": -1.0}, r"model\.feature_lr is -1\.0; give 0 or more"),
        ({"feature_lr": 0.0, "adjacency_lr": 0.0}, "both are 0, so nothing is learned"),
        ({"real_batch": 0}, r"model\.real_batch is 0; give 1 or more"),
        ({"nodes": 90}, r"model\.nodes is 90; the largest training graph has 8 nodes"),
        ({"per_class": 40}, r"model\.per_class is 40; class 'a' has 15 training graphs of at most 8 nodes"),
        (
            {"student": GraphNetwork(GIN(8, 8, 1), [3], 2)},
            "GIN takes no edge_weight; take another network, such as GCN",
        ),
        (
            {"student": GraphNetwork(GAT(8, 8, 1, edge_dim=8), [3], 2, edge_values=[2])},
            r"model\.student\.edge_values is \[2\]; condensed graphs have no edge labels, leave it out",
        ),
        ({"student": GraphNetwork(Fixed(), [3], 2)}, r"gnn\.weight cannot be drawn anew; give its module"),
    ],
)
def test_mistakes_are_told_in_one_line(trainer, random_set, options, says):
    data = Given(random_set(count=50, nodes=8, kinds=2))
    with pytest.raises(UsageError, match=says):
        trainer(max_steps=1).fit(doscond(**options), datamodule=data)
