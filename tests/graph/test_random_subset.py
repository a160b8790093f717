import pytest
import torch
from given import Given

from lit_distill.core.errors import UsageError
from lit_distill.graph.data.subset import within_budget
from lit_distill.graph.methods.random_subset import RandomSubset


def test_as_many_graphs_of_each_class_and_others_for_another_seed(random_set):
    found = []
    for seed in (0, 0, 1):
        data = RandomSubset(Given(random_set(count=60)), per_class=4, seed=seed)
        assert data.part("train").labels.tolist() == [0] * 4 + [1] * 4
        assert torch.equal(data.part("test").nodes, data.source.part("test").nodes)
        found.append(data.part("train").nodes)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_budget_is_kept_and_used(random_set):
    data = RandomSubset(Given(random_set(count=60)), bytes=3000)
    train = data.part("train")
    whole = data.source.part("train")
    lightest = min(whole.take(torch.tensor([number])).stored_bytes() for number in range(whole.size))
    assert 3000 - 4 * lightest < train.stored_bytes() <= 3000
    assert abs(int(train.labels.bincount()[0]) - int(train.labels.bincount()[1])) <= 2
    assert data.footprint()["bytes"] == train.stored_bytes()


def test_the_first_of_each_class_is_taken_whatever_it_weighs(random_set):
    graphs = random_set(count=10)
    queues = [torch.tensor([0, 2, 4]), torch.tensor([1, 3])]
    assert within_budget(graphs, queues, 1).tolist() == [0, 1]
    assert sorted(within_budget(graphs, queues, 10**9).tolist()) == [0, 1, 2, 3, 4]


def test_sizes_that_make_no_sense_are_refused(random_set):
    source = Given(random_set(count=60))
    for options in ({}, {"per_class": 1, "bytes": 1}):
        with pytest.raises(UsageError, match=r"data\.per_class, data\.bytes: give one of the two"):
            RandomSubset(source, **options)
    with pytest.raises(UsageError, match=r"data\.bytes is 0; give 1 or more"):
        RandomSubset(source, bytes=0)
    with pytest.raises(UsageError, match=r"data\.per_class is 99; the smallest class has 18 graphs"):
        RandomSubset(source, per_class=99).setup()
