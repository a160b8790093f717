import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.image import Combined, LogitKL, Supervised, Term
from lit_distill.image.losses.lelp import SubclassCrossEntropy
from lit_distill.image.methods.lelp import LELP
from lit_distill.image.subclasses import (
    KMeansClusters,
    KnownSubclasses,
    PrincipalDirections,
    RandomProjections,
    SubclassClassifier,
    random_rotation,
    remove_head,
)

C, S, D = 2, 3, 8


@pytest.fixture
def embedded():
    """Embeddings (N, D) of two classes with other means and variances, labels, and a head (C, D)."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(90) % 2
    spread = torch.linspace(3, 0.5, D)
    embeddings = torch.randn(90, D, generator=generator) * spread * (1 + labels[:, None]) + labels[:, None] * 5
    return embeddings, labels, torch.randn(C, D, generator=generator)


def never():
    raise AssertionError("asked for without need")


def fitted(splitter, embedded, fine=never, subclasses=S):
    embeddings, labels, head = embedded
    splitter.build(C, subclasses, D, lambda: len(labels))
    assert not splitter.fitted
    splitter.fit(embeddings, labels, head if splitter.needs_head else None, fine)
    assert splitter.fitted
    return splitter, splitter(embeddings, torch.arange(len(labels))).double().numpy()


def wide(tiny, classes=3, subclasses=2, width=4, seed=0):
    return SubclassClassifier(tiny(width, seed, num_classes=classes * subclasses), subclasses)


# ---- splitters -----------------------------------------------------------------------------------------------------


def test_without_rotation_and_projection_directions_are_sklearns_components(embedded):
    splitter, _ = fitted(PrincipalDirections(null_space=False, rotate=False), embedded)
    for number in range(C):
        own = embedded[0][embedded[1] == number].double().numpy()
        pca = PCA(S).fit(own)
        found = splitter.directions[number].double().numpy()
        cosines = (found * pca.components_).sum(1) / np.linalg.norm(found, axis=1)
        np.testing.assert_allclose(np.abs(cosines), 1.0, rtol=1e-5)
        np.testing.assert_allclose(splitter.mean[number], pca.mean_, rtol=1e-4, atol=1e-5)


def test_subclass_logits_are_scaled_projections_of_the_centered_embedding(embedded):
    _, found = fitted(PrincipalDirections(null_space=False, rotate=False), embedded)
    embeddings, labels = embedded[0].double().numpy(), embedded[1].numpy()
    for number in range(C):
        pca = PCA(S).fit(embeddings[labels == number])
        projected = pca.transform(embeddings)
        projected /= np.sqrt((projected[labels == number] ** 2).mean())
        np.testing.assert_allclose(np.abs(found[:, number]), np.abs(projected), atol=1e-4)


@pytest.mark.parametrize("splitter", [PrincipalDirections(), RandomProjections(), KMeansClusters(False)], ids=type)
def test_subclass_logits_of_a_classs_own_samples_have_unit_variance(embedded, splitter):
    _, found = fitted(splitter, embedded)
    for number in range(C):
        assert (found[embedded[1].numpy() == number, number] ** 2).mean() == pytest.approx(1.0, rel=1e-4)


def test_what_is_left_after_the_projection_leaves_the_teachers_probabilities_alone(embedded):
    embeddings, _, head = (tensor.double() for tensor in embedded)
    left = remove_head(embeddings, head)
    logits = (left - left.mean(0)) @ head.T
    assert float((logits[:, 0] - logits[:, 1]).abs().max()) < 1e-9
    # One direction is gone, no more.
    assert int(torch.linalg.matrix_rank(left - left.mean(0))) == D - 1
    difference = (head[0] - head[1]) / (head[0] - head[1]).norm()
    torch.testing.assert_close(left, embeddings - (embeddings @ difference)[:, None] * difference)


@pytest.mark.parametrize("splitter", [PrincipalDirections(), RandomProjections(), KMeansClusters()], ids=type)
def test_the_logit_itself_does_not_split_a_class(embedded, splitter):
    splitter, before = fitted(splitter, embedded)
    embeddings, labels, head = embedded
    moved = embeddings + 7 * (head[0] - head[1])
    np.testing.assert_allclose(splitter(moved, torch.arange(len(labels))), before, atol=1e-3)


def test_without_the_projection_the_logit_does_split(embedded):
    splitter, before = fitted(PrincipalDirections(null_space=False), embedded)
    moved = embedded[0] + 7 * (embedded[2][0] - embedded[2][1])
    assert np.abs(splitter(moved, torch.arange(90)).numpy() - before).max() > 0.5


def test_rotation_turns_directions_but_leaves_their_summed_squares(embedded):
    turned, after = fitted(PrincipalDirections(), embedded)
    _, before = fitted(PrincipalDirections(rotate=False), embedded)
    np.testing.assert_allclose((after**2).sum(2), (before**2).sum(2), rtol=1e-3)
    assert np.abs(after - before).max() > 0.5
    expected = np.einsum("st,bct->bcs", turned.rotation.double().numpy(), before)
    np.testing.assert_allclose(after, expected, atol=1e-4)


def test_rotations_are_orthonormal_and_uniform():
    drawn = torch.stack([random_rotation(3) for _ in range(3000)]).double()
    np.testing.assert_allclose(drawn @ drawn.mT, np.broadcast_to(np.eye(3), (3000, 3, 3)), atol=1e-5)
    # Uniform: every entry has mean 0 and mean square 1/3 (bounds: six standard errors).
    assert float(drawn.mean(0).abs().max()) < 6 * (1 / 3 / 3000) ** 0.5
    assert float((drawn.square().mean(0) - 1 / 3).abs().max()) < 6 * (4 / 45 / 3000) ** 0.5


def test_kmeans_splits_as_sklearn_does(embedded):
    splitter, found = fitted(KMeansClusters(null_space=False), embedded)
    for number in range(C):
        own = embedded[1].numpy() == number
        points = embedded[0][own].double().numpy()
        centered = points - points.mean(0)
        means = KMeans(S, n_init=4, random_state=splitter._seed).fit(centered)
        assert (found[own, number].argmax(1) == means.labels_).all()
        # Differences between subclasses are differences of half squared distances, in one scale.
        distances = -0.5 * ((centered[:, None] - means.cluster_centers_) ** 2).sum(2)
        expected = distances[:, 1:] - distances[:, :1]
        ratio = (found[own, number, 1:] - found[own, number, :1]) / expected
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-2)


def test_known_subclasses_take_all_of_a_sample_and_are_even_elsewhere():
    labels, fine = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([7, 1, 2, 1, 4])
    splitter = KnownSubclasses()
    splitter.build(2, 3, D, lambda: 5)
    splitter.fit(torch.zeros(5, D), labels, None, lambda: fine)
    found = splitter(torch.zeros(2, D), torch.tensor([4, 1]))
    assert found.softmax(2)[0].tolist() == [[0.0, 1.0, 0.0], pytest.approx([1 / 3] * 3)]
    assert found.softmax(2)[1].tolist() == [pytest.approx([1 / 3] * 3), [1.0, 0.0, 0.0]]
    splitter.build(2, 2, D, lambda: 5)
    with pytest.raises(UsageError, match="2 is less than the 3 known subclasses of class 0"):
        splitter.fit(torch.zeros(5, D), labels, None, lambda: fine)


def test_more_subclasses_than_directions_are_refused(embedded):
    embeddings, labels, _ = embedded
    embeddings[:, 4:] = 1.0  # four directions are left; the head below reads none of them
    splitter = PrincipalDirections()
    splitter.build(C, 5, D, lambda: 90)
    with pytest.raises(UsageError, match=r"5 is more than the 4 directions .* 45 samples of class 0 .* lower it to 4"):
        splitter.fit(embeddings, labels, torch.eye(D)[6:], never)
    splitter.build(C, 4, D, lambda: 90)
    splitter.fit(embeddings, labels, torch.eye(D)[6:], never)


def test_draws_follow_the_seed(embedded):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(fitted(RandomProjections(), embedded)[1])
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.1


# ---- the method ----------------------------------------------------------------------------------------------------


def lelp(student, teacher, **kwargs):
    student = SubclassClassifier(nn.Sequential(student, nn.Linear(3, 6)), 2)
    return LELP(student, teacher, **kwargs)


def test_method(step, trainer, blobs, tiny, tmp_path):
    teacher = tiny(6, seed=5)
    module = lelp(tiny(4), teacher)
    moved, terms = step(module)
    assert set(terms) == {"lelp"}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"student"}
    assert trained <= moved
    # Beside it the directions, learnt once.
    assert {name for name in moved - trained if "running_" not in name and "num_batches" not in name} == {
        f"losses.lelp.splitter.{name}" for name in ("mean", "directions")
    }
    assert not any(part.training for part in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = lelp(tiny(4, seed=9), copy.deepcopy(teacher))
    fit = trainer(max_steps=2)
    asked = []
    again._teacher_on_training_set = lambda: asked.append(1)
    fit.fit(again, datamodule=blobs, ckpt_path=tmp_path / "a.ckpt")
    assert asked == []  # a resumed run takes the directions from the checkpoint
    for name, value in module.losses.state_dict().items():
        assert torch.equal(value, again.losses.state_dict()[name])


def test_term_is_the_cross_entropy_against_split_probabilities_by_hand(step, tiny, blobs):
    teacher = tiny(6, seed=5).eval()
    student = wide(tiny)
    with torch.no_grad():
        student.network.head.weight.mul_(20)  # an untrained student's even outputs would hide what the targets are
        pooled = teacher.pool(teacher.stage2(teacher.stage1(blobs.images))).double().numpy()
        logits = teacher(blobs.images).double().numpy()
        outputs = copy.deepcopy(student).network(blobs.images[:8]).double().numpy()
    head = teacher.head.weight.detach().double().numpy()
    # The null space of the head's differences, by QR of two of them.
    basis, _ = np.linalg.qr((head[1:] - head[:1]).T)
    left = pooled - pooled @ basis @ basis.T
    targets = np.empty((8, 6))
    for number in range(3):
        own = left[blobs.labels.numpy() == number]
        components = np.linalg.svd(own - own.mean(0))[2][:2]
        projected = (left - own.mean(0)) @ components.T
        projected /= np.sqrt((((own - own.mean(0)) @ components.T) ** 2).mean())
        signs = np.sign(components[[0, 1], np.abs(components).argmax(1)])
        share = softmax(projected[:8] * signs / 0.7, 1)
        targets[:, 2 * number : 2 * number + 2] = softmax(logits[:8] / 2.0, 1)[:, number, None] * share
    expected = -(targets * log_softmax(outputs, 1)).sum(1).mean()
    splitter = PrincipalDirections(rotate=False)
    _, terms = step(LELP(student, teacher, splitter, temperature=2.0, subclass_temperature=0.7, lelp_weight=0.5))
    assert terms["lelp"] == pytest.approx(0.5 * expected, rel=1e-4)


def test_labels_see_the_summed_probabilities(step, tiny, blobs):
    student = wide(tiny)
    with torch.no_grad():
        outputs = copy.deepcopy(student).network(blobs.images[:8]).double().numpy()
    summed = softmax(outputs, 1).reshape(8, 3, 2).sum(2)
    expected = -np.log(summed[np.arange(8), blobs.labels[:8]]).mean()
    _, terms = step(LELP(student, tiny(6, seed=5), label_weight=0.3))
    assert terms["ce"] == pytest.approx(0.3 * expected, rel=1e-4)


def test_a_cache_of_the_teacher_changes_nothing(step, tiny, tmp_path):
    values = []
    for cache in (None, tmp_path / "teacher.safetensors"):
        module = LELP(wide(tiny), tiny(6, seed=5), teacher_cache=cache)
        values.append(step(module)[1]["lelp"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_membership_by_the_teacher_needs_no_right_labels(step, trainer, tiny, blobs, blobs_class):
    class Wrong(blobs_class):
        def __init__(self):
            super().__init__()
            self.labels = 2 - self.labels

    teacher = tiny(16, seed=5)  # learns the wrong labels, all of them
    trainer(max_epochs=20).fit(
        Supervised(teacher, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02)), datamodule=Wrong()
    )
    means = []
    for data, membership in ((blobs, "teacher"), (Wrong(), "labels"), (blobs, "labels")):
        module = LELP(wide(tiny), copy.deepcopy(teacher), PrincipalDirections(False), membership=membership)
        step(module, data)
        means.append(module.losses["lelp"].splitter.mean)
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


def test_known_subclasses_are_asked_of_the_data(step, tiny, blobs, trainer):
    with pytest.raises(UsageError, match="train_fine_labels"):
        trainer().fit(LELP(wide(tiny), tiny(6, seed=5), KnownSubclasses()), datamodule=blobs)
    blobs.train_fine_labels = lambda: torch.arange(24) % 6
    module = LELP(wide(tiny), tiny(6, seed=5), KnownSubclasses())
    step(module, blobs)
    assert module.losses["lelp"].splitter.member.tolist() == [0, 0, 0, 1, 1, 1] * 4


def test_a_student_learns_from_split_targets_alone(trainer, blobs, tiny):
    teacher = tiny(16, seed=5)

    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=0.02)

    trainer(max_epochs=20).fit(Supervised(teacher, optimizer=adam), datamodule=blobs)
    fit = trainer(max_epochs=20)
    module = LELP(wide(tiny, width=8), teacher, optimizer=adam)
    fit.fit(module, datamodule=blobs)
    result = fit.test(module, datamodule=blobs, verbose=False)[0]
    assert result["test/teacher_acc"] == result["test/acc"] == 1.0


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_defaults_leave_labels_out(tiny):
    module = LELP(wide(tiny), tiny())
    loss = module.losses["lelp"]
    assert (loss.temperature, loss.subclass_temperature, module.weights["lelp"], module.label_weight) == (1, 1, 1, 0)
    assert (loss.splitter.null_space, loss.splitter.rotate) == (True, True)


def test_temperatures_that_are_not_positive_and_one_subclass_are_refused(tiny):
    with pytest.raises(UsageError, match=r"model\.temperature: 0\.0; it must be above 0"):
        LELP(wide(tiny), tiny(), temperature=0.0)
    with pytest.raises(UsageError, match=r"model\.subclass_temperature: -1\.0; it must be above 0"):
        LELP(wide(tiny), tiny(), subclass_temperature=-1.0)
    with pytest.raises(
        UsageError, match=r"subclasses: 1 splits nothing, which is vanilla KD; .*lit_distill\.image\.KD"
    ):
        SubclassClassifier(tiny(), 1)


def test_students_of_another_form_or_size_are_refused(trainer, blobs, tiny):
    with pytest.raises(UsageError, match=r"model\.student is TinyNet; put it .*SubclassClassifier"):
        trainer().fit(LELP(tiny(), tiny()), datamodule=blobs)
    student = SubclassClassifier(tiny(), 2)
    with pytest.raises(UsageError, match="has 3 outputs, 3 classes of 2 subclasses need 6; set its num_classes"):
        trainer().fit(LELP(student, tiny()), datamodule=blobs)


def test_teachers_without_a_named_embedding_or_a_head_are_refused(trainer, blobs, tiny, mean_teacher):
    with pytest.raises(UsageError, match=r"MeanTeacher names no penultimate layer; give teacher_tap .*features"):
        trainer().fit(LELP(wide(tiny), mean_teacher()), datamodule=blobs)
    with pytest.raises(UsageError, match=r"'features' has shape \(2, 8, 8\)"):
        trainer().fit(LELP(wide(tiny), mean_teacher(), teacher_tap="features"), datamodule=blobs)
    with pytest.raises(UsageError, match=r"a last linear layer of \(3, 6\), where a head of \(3, 3\) over 'head'"):
        trainer().fit(LELP(wide(tiny), tiny(6), teacher_tap="head"), datamodule=blobs)


def test_it_goes_into_a_sum_with_other_losses(step, tiny):
    student, teacher = wide(tiny), tiny(6, seed=5)
    _, alone = step(LELP(copy.deepcopy(student), copy.deepcopy(teacher)))
    terms = [Term(SubclassCrossEntropy(), 0.5), Term(LogitKL(temperature=2.0), 3.0)]
    _, both = step(Combined(student, teacher, terms, label_weight=0.0))
    assert both["lelp"] == pytest.approx(0.5 * alone["lelp"], rel=1e-5)
    assert sorted(both) == ["kd", "lelp"]
