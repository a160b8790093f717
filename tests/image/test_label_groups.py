import pytest
import torch

from lit_distill.core.errors import UsageError
from lit_distill.image import MNIST5kDataModule

PARITY = [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


@pytest.fixture(scope="module")
def pair():
    return MNIST5kDataModule(train_size=100), MNIST5kDataModule(train_size=100, label_groups=PARITY)


def test_labels_are_group_numbers_and_images_those_of_a_run_without(pair):
    plain, grouped = pair
    for part in ("train", "val", "test"):
        assert torch.equal(plain.part(part).images, grouped.part(part).images)
        assert torch.equal(plain.part(part).labels % 2, grouped.part(part).labels)


def test_classes_their_number_and_the_fingerprint_change(pair):
    plain, grouped = pair
    grouped.setup()
    assert (plain.num_classes, grouped.num_classes) == (10, 2)
    assert grouped.classes == ("0+2+4+6+8", "1+3+5+7+9")
    assert plain.fingerprint()["data"] != grouped.fingerprint()["data"]
    assert MNIST5kDataModule.num_classes == 10


def test_the_order_of_groups_is_the_order_of_labels(pair):
    turned = MNIST5kDataModule(train_size=100, label_groups=PARITY[::-1])
    assert torch.equal(turned.train_labels(), 1 - pair[1].train_labels())


def test_the_own_labels_stay_to_be_had(pair):
    plain, grouped = pair
    assert torch.equal(grouped.train_fine_labels(), plain.train_labels())
    assert torch.equal(plain.train_fine_labels(), plain.train_labels())


def test_noise_acts_on_groups_and_leaves_the_own_labels(pair):
    noisy = MNIST5kDataModule(train_size=100, label_groups=PARITY, label_noise=1.0)
    assert set(noisy.train_labels().tolist()) == {0, 1}
    assert not torch.equal(noisy.train_labels(), pair[1].train_labels())
    assert torch.equal(noisy.train_fine_labels(), pair[0].train_labels())


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([[0, 1, 2, 3], [5, 6, 7, 8, 9]], "class 4 stands in 0 groups"),
        ([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8, 9]], "class 4 stands in 2 groups"),
        ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]], "class 10 stands in 1 groups; each class from 0 to 9"),
        ([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], []], "group 1 is empty"),
    ],
)
def test_groups_that_are_no_partition_are_refused(groups, words):
    with pytest.raises(UsageError, match=words):
        MNIST5kDataModule(label_groups=groups)
