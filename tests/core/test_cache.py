import pytest
import torch
from torch import nn

from lit_distill.core.cache import TeacherCache, weights_fingerprint
from lit_distill.core.errors import RunError, UsageError
from lit_distill.image import AT, Combined, Hint, LogitKL, Term

FINGERPRINT = {"teacher": "abc", "data": {"samples": 5}, "outputs": ["logits"]}


@pytest.fixture
def values():
    return torch.randn(5, 3)


def batches(values):
    order = torch.tensor([4, 0, 2, 1, 3])
    return [(index, {"logits": values[index]}) for index in order.split(2)]


def test_outputs_are_found_by_sample_whatever_the_order_they_came_in(tmp_path, values):
    path = tmp_path / "cache.safetensors"
    TeacherCache.write(path, FINGERPRINT, batches(values), size=5)
    cache = TeacherCache.open(path, FINGERPRINT)
    index = torch.tensor([3, 3, 0])
    assert torch.equal(cache(index)["logits"], values[index])
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]


def test_float16_is_off_by_its_rounding_at_most(tmp_path, values):
    TeacherCache.write(tmp_path / "c", FINGERPRINT, batches(values), size=5, dtype=torch.float16)
    found = TeacherCache.open(tmp_path / "c", FINGERPRINT)(torch.arange(5))["logits"]
    assert found.dtype == torch.float32
    assert bool(((found - values).abs() <= values.abs() * 2**-11).all())
    assert not torch.equal(found, values)
    assert (tmp_path / "c").stat().st_size < 5 * 3 * 2 + 300


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": "xyz"}, "teacher was abc, now xyz"),
        ({"data": {"samples": 6}}, r"data was \{'samples': 5\}, now \{'samples': 6\}"),
        ({"outputs": ["logits", "stage1"]}, r"outputs was \['logits'\], now \['logits', 'stage1'\]"),
        ({"extra": 1}, "extra was None, now 1"),
    ],
)
def test_a_stale_cache_is_refused_by_the_field_that_differs(tmp_path, values, change, said):
    TeacherCache.write(tmp_path / "c", FINGERPRINT, batches(values), size=5)
    with pytest.raises(UsageError, match=f"is stale: {said}; delete it"):
        TeacherCache.open(tmp_path / "c", FINGERPRINT | change)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_cache_is_a_run_error(tmp_path, values, keep):
    TeacherCache.write(tmp_path / "c", FINGERPRINT, batches(values), size=5)
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:keep])
    with pytest.raises(RunError, match="is corrupt"):
        TeacherCache.open(tmp_path / "c", FINGERPRINT)


def test_samples_that_never_came_are_counted_and_nothing_is_written(tmp_path, values):
    with pytest.raises(RunError, match="2 of 5 samples were not seen"):
        TeacherCache.write(tmp_path / "c", FINGERPRINT, batches(values)[:1] + batches(values)[2:], size=5)
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_of_weights_follow_values_names_and_buffers():
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)

    same = weights_fingerprint(network(0))
    assert weights_fingerprint(network(0)) == same
    assert len(same) == 16
    assert weights_fingerprint(network(1)) != same
    other = network(0)
    other[1].running_mean[1] = 0.5
    assert weights_fingerprint(other) != same
    renamed = network(0)
    assert weights_fingerprint(nn.Sequential(nn.Sequential(*renamed))) != same


# ---- in training -----------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its forwards."""

    stages = ("inner.stage1", "inner.stage2")

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def fit(trainer, blobs, tiny, path, **kwargs):
    teacher = Counting(tiny(6, seed=5))
    student = tiny(4)
    module = Combined(student, teacher, [Term(LogitKL(), 1.0), Term(Hint(), 5.0)], teacher_cache=path, **kwargs)
    seen = []
    combine = module.combine
    module.combine = lambda terms: seen.append({k: float(v.detach()) for k, v in terms.items()}) or combine(terms)
    trainer(max_epochs=2).fit(module, datamodule=blobs)
    return seen, teacher


def test_training_from_a_cache_is_training_with_the_teacher(trainer, blobs, tiny, tmp_path):
    plain, busy = fit(trainer, blobs, tiny, None)
    made, _ = fit(trainer, blobs, tiny, tmp_path / "c")
    opened, idle = fit(trainer, blobs, tiny, tmp_path / "c")
    assert len(plain) == 6
    for rows in (made, opened):
        assert [row["kd"] for row in rows] == pytest.approx([row["kd"] for row in plain], rel=1e-4)
        assert [row["hint"] for row in rows] == pytest.approx([row["hint"] for row in plain], rel=1e-4)
    assert busy.calls == 7  # one probe, six batches
    assert idle.calls == 1


def test_a_cache_is_refused_for_another_teacher_other_data_and_other_taps(trainer, blobs, blobs_class, tiny, tmp_path):
    path = tmp_path / "c"
    fit(trainer, blobs, tiny, path)

    def again(data, seed=5, method=Combined, **kwargs):
        if method is Combined:
            kwargs["terms"] = [Term(LogitKL(), 1.0), Term(Hint(), 5.0)]
        module = method(tiny(4), Counting(tiny(6, seed=seed)), teacher_cache=path, **kwargs)
        trainer().fit(module, datamodule=data)

    with pytest.raises(UsageError, match="stale: teacher was"):
        again(blobs, seed=6)
    with pytest.raises(UsageError, match="stale: data was"):
        again(blobs_class(size=32))
    with pytest.raises(UsageError, match="stale: outputs was"):
        again(blobs, method=AT)


def test_random_augmentation_is_refused(trainer, blobs_class, tiny, tmp_path):
    with pytest.raises(UsageError, match=r"model\.teacher_cache: the training images are augmented at random"):
        fit(trainer, blobs_class(random=True), tiny, tmp_path / "c")
    assert not (tmp_path / "c").exists()
