import copy
import json
import logging
import threading
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from test_token_distiller import logits_of, sgd
from tiny_language import language_model, trainer
from tiny_text import TEXTS, tokenizer_folder, write_lines

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import alone
from lit_distill.llm import cached
from lit_distill.llm.cached import CachedTeacher
from lit_distill.llm.data import TextDataModule
from lit_distill.llm.losses import topk_kl
from lit_distill.llm.methods.first import FIRST
from lit_distill.llm.methods.kl import ForwardKL
from lit_distill.llm.methods.supervised import SupervisedFineTuning
from lit_distill.llm.methods.taid import TAID
from lit_distill.llm.rollouts import OnPolicy
from lit_distill.llm.signals import HiddenSignal, TopK

TOKENS = 120  # of the tokenizer, at most
H = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return tokenizer_folder(folder), write_lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def text(files):
    def build(**options):
        tokenizer, source = files
        return TextDataModule(
            tokenizer, **({"source": source, "max_length": 40, "packing": "none", "batch_size": 4} | options)
        )

    return build


drawn = cache(language_model)


def student(vocab_size=TOKENS):
    return copy.deepcopy(drawn(0, vocab_size=vocab_size))


def teacher(seed=1, vocab_size=TOKENS):
    return copy.deepcopy(drawn(seed, hidden_size=H, num_attention_heads=3, vocab_size=vocab_size))


class Counted(torch.nn.Module):
    """Counts the rows that a teacher runs on, and stops it after some."""

    def __init__(self, network, most=10**6):
        super().__init__()
        self.rows, self.most = [], most
        self.hook = network.register_forward_pre_hook(self.count)

    def count(self, network, args):
        if len(self.rows) + len(args[0]) > self.most:
            raise KeyboardInterrupt
        self.rows += args[0].tolist()


class Sparse(ForwardKL):
    def divergence(self, student_logits, target):
        return topk_kl(student_logits, target)


def fit(folder, data, network, source, method=ForwardKL, **options):
    """The losses of three steps, and the module."""
    losses = []

    class Watched(method):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            losses.append(float(sum(self.terms.values())))

    module = Watched(student(), network, source=source, optimizer=sgd)
    torch.manual_seed(0)
    runner = trainer(folder, **({"max_steps": 3} | options))
    runner.fit(module, data)
    return losses, module


def attached(folder, data, network, source):
    """A module that can be asked without training."""
    return fit(folder, data, network, source, max_steps=1)[1]


def batches(module, part="train"):
    data = module._data()
    return list(data.ordered_loader() if part == "train" else data.val_dataloader())


@pytest.mark.parametrize("packing", ["none", "ffd"])
def test_hidden_states_give_the_losses_of_a_running_teacher(text, tmp_path, packing):
    options = {"packing": packing, "max_length": 40}
    online, _ = fit(tmp_path, text(**options), teacher(), None)
    exact, module = fit(tmp_path, text(**options), teacher(), CachedTeacher(str(tmp_path / "a"), dtype="float32"))
    assert exact == pytest.approx(online, rel=1e-6, abs=1e-6)
    signal = module.source.signal(batches(module)[0], "train")
    assert isinstance(signal, HiddenSignal)
    half, _ = fit(tmp_path, text(**options), teacher(), CachedTeacher(str(tmp_path / "b")))
    assert half != exact
    assert half == pytest.approx(online, rel=1e-3)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_rounding_is_within_what_is_said(text, tmp_path, dtype, error):
    network = teacher()
    module = attached(tmp_path, text(), network, CachedTeacher(str(tmp_path / "kept"), dtype=dtype))
    batch = batches(module)[1]
    with torch.no_grad():
        hidden = network(batch.input_ids, batch.position_ids, batch.scored)
    kept = module.source.signal(batch, "train").hidden
    assert ((kept - hidden).abs() <= error * hidden.abs() + 1e-7).all()
    assert ((kept - hidden).abs() > 0.25 * error * hidden.abs()).any()


def test_rows_are_found_in_any_order(text, tmp_path):
    network = teacher()
    module = attached(tmp_path, text(packing="ffd"), network, CachedTeacher(str(tmp_path / "kept"), dtype="float32"))
    for batch in module._data().train_dataloader():  # shuffled
        with torch.no_grad():
            hidden = network(batch.input_ids, batch.position_ids, batch.scored)
        torch.testing.assert_close(module.source.signal(batch, "train").hidden, hidden, rtol=1e-5, atol=1e-5)


def test_all_tokens_are_the_dense_divergence_and_few_are_the_largest(text, tmp_path):
    network = teacher()
    online, _ = fit(tmp_path, text(), network, None)
    dense = CachedTeacher(str(tmp_path / "all"), keep="top_k", k=TOKENS, dtype="float32")
    assert fit(tmp_path, text(), network, dense, Sparse)[0] == pytest.approx(online, rel=1e-5)

    source = CachedTeacher(str(tmp_path / "few"), keep="top_k", k=5)
    module = fit(tmp_path, text(), network, source, Sparse, max_steps=1)[1]
    batch = batches(module)[0]
    signal = source.signal(batch, "train")
    assert isinstance(signal, TopK)
    values, ids = logits_of(network, batch).double().log_softmax(-1).topk(5)
    assert torch.equal(signal.ids, ids)
    assert ((signal.logprobs - values).abs() <= 2**-11 * values.abs() + 1e-6).all()


def test_captured_mass_and_bytes_are_reported_once(text, tmp_path, caplog):
    network = teacher()
    logged = []  # beside what Lightning logs

    class Logger:
        def log_metrics(self, metrics, step=None):
            logged.append(metrics)

    class Told(SupervisedFineTuning):
        @property
        def loggers(self):
            return [Logger()]

    caplog.set_level(logging.INFO)
    source = CachedTeacher(str(tmp_path / "kept"), keep="top_k", k=3)
    module = fit(tmp_path, text(), network, source, Told, limit_val_batches=1.0, max_epochs=3, max_steps=-1)[1]
    values = torch.cat([logits_of(network, batch) for batch in batches(module, "val")]).softmax(-1).topk(3).values
    mass = float(values.sum(-1).mean())
    logged = [entry for entry in logged if any("captured" in name for name in entry)]
    assert [list(entry) for entry in logged] == [["val/captured_mass"]]  # fine-tuning asks for no other part
    assert logged[0]["val/captured_mass"] == pytest.approx(mass, rel=1e-5)
    told = [record.getMessage() for record in caplog.records if "bytes" in record.getMessage()]
    assert len(told) == 1
    assert f"{len(values):,} tokens of 12 bytes; the 3 most probable hold {mass:.2%}" in told[0]
    assert not (tmp_path / "kept" / "train").exists()


@pytest.mark.parametrize(
    ("options", "vocabulary", "size"),
    [
        ({}, TOKENS, 2 * H),
        ({"dtype": "bfloat16"}, TOKENS, 2 * H),
        ({"dtype": "float32"}, TOKENS, 4 * H),
        ({"keep": "top_k", "k": 7}, TOKENS, 4 * 7),
        ({"keep": "top_k", "k": 7}, 2**16, 4 * 7),
        ({"keep": "top_k", "k": 7}, 2**16 + 1, 6 * 7),
    ],
)
def test_bytes_are_those_of_the_formula(text, tmp_path, options, vocabulary, size):
    data = text()
    method = Sparse if "keep" in options else ForwardKL
    module = method(
        student(vocabulary),
        teacher(vocab_size=vocabulary),
        source=CachedTeacher(str(tmp_path / "kept"), **options),
    )
    trainer(tmp_path, max_steps=1).fit(module, data)
    tokens = int(data.part("train").rows.scored.sum())
    files = [path for path in (tmp_path / "kept" / "train").glob("*.bin") if path.name != "kept.bin"]
    assert sum(path.stat().st_size for path in files) == tokens * size
    if options.get("keep") == "top_k":  # numbers beyond 2^15 are not negative
        batch = batches(module)[0]
        ids = module.source.signal(batch, "train").ids
        assert torch.equal(ids[:, 0], logits_of(module.teacher, batch).argmax(-1))


def test_without_its_teacher_a_run_goes_the_same_way(text, tmp_path):
    source = CachedTeacher(str(tmp_path / "kept"))
    options = {"limit_val_batches": 1.0, "val_check_interval": 3}
    first, _ = fit(tmp_path, text(), teacher(), source, **options)
    again, module = fit(tmp_path, text(), None, CachedTeacher(str(tmp_path / "kept")), **options)
    assert again == first
    assert module.trainer.callback_metrics["val/kl"] > 0


def test_a_teacher_that_is_padded_is_cut_with_and_without_being_there(text, tmp_path):
    padded = teacher(vocab_size=TOKENS + 9)
    online, _ = fit(tmp_path, text(), padded, None)
    source = CachedTeacher(str(tmp_path / "kept"), dtype="float32")
    assert fit(tmp_path, text(), padded, source)[0] == pytest.approx(online, rel=1e-6)
    assert fit(tmp_path, text(), None, source)[0] == pytest.approx(online, rel=1e-6)
    wide = ForwardKL(student(TOKENS + 4), None, source=source, optimizer=sgd)
    trainer(tmp_path, max_steps=1).fit(wide, text())
    assert wide.vocab_size == TOKENS
    wide = ForwardKL(student(TOKENS + 4), padded, source=source)
    with pytest.raises(UsageError, match=r"kept/train is stale: vocab_size was 120, now 124"):
        trainer(tmp_path, max_steps=1).fit(wide, text())
    narrow = ForwardKL(student(TOKENS - 1), None, source=source)
    with pytest.raises(UsageError, match=r"model.student has 119 tokens"):
        trainer(tmp_path, max_steps=1).fit(narrow, text())


def test_interrupted_writing_goes_on_and_computes_no_row_twice(text, tmp_path):
    data, network = text(), teacher()
    rows = len(text().part("train").rows)
    source = CachedTeacher(str(tmp_path / "kept"), dtype="float32", batch_size=3)
    counted = Counted(network, most=8)
    with pytest.raises(SystemExit):
        fit(tmp_path, data, network, source)
    assert len(counted.rows) == 6
    with pytest.raises(UsageError, match=rf"lacks {rows - 6} of {rows} rows, and there is no model.teacher"):
        fit(tmp_path, text(), None, source)
    counted.most = 10**6
    resumed, _ = fit(tmp_path, text(), network, source)
    assert len(counted.rows) == rows
    again, _ = fit(tmp_path, text(), network, source)
    assert len(counted.rows) == rows
    counted.hook.remove()
    assert again == resumed == pytest.approx(fit(tmp_path, text(), network, None)[0], rel=1e-6)


def test_of_two_runs_that_want_the_same_the_second_waits_and_runs_no_teacher(text, tmp_path):
    counted = []

    def run(seed):
        network = teacher()
        counted.append(Counted(network))
        fit(tmp_path / str(seed), text(), network, CachedTeacher(tmp_path / "kept"))

    with alone(tmp_path / "kept" / "train", "waits"):  # a first run that is at it
        second = threading.Thread(target=run, args=(0,))
        second.start()
        second.join(3)
        assert second.is_alive()
        assert not counted[0].rows
    second.join(60)
    run(1)
    assert len(counted[0].rows) == len(text().part("train").rows.scored)
    assert not counted[1].rows


def test_a_row_counts_only_after_its_values_are_there(text, tmp_path, monkeypatch):
    network = teacher()
    source = CachedTeacher(str(tmp_path / "kept"), batch_size=2)
    flushed = []

    def flush(file):
        if len(flushed) == 4:  # two batches of values and marks are through; this one's values are not
            raise OSError(28, "No space left on device")
        flushed.append(file.name)

    monkeypatch.setattr(cached, "_flush", flush)
    with pytest.raises(RunError, match=r"kept/train cannot be written \(No space left on device\)"):
        fit(tmp_path, text(), network, source)
    rows = len(text().part("train").rows)
    kept = torch.from_file(str(tmp_path / "kept" / "train" / "kept.bin"), size=rows)
    assert int((kept > 0).sum()) == 4
    assert [name.rpartition("/")[2] for name in flushed] == ["hidden.bin", "kept.bin"] * 2


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("teacher", lambda text: (teacher(seed=5), text(), {})),
        ("k", lambda text: (teacher(), text(), {"k": 5})),
        ("keep", lambda text: (teacher(), text(), {"keep": "hidden"})),
        ("dtype", lambda text: (teacher(), text(), {"dtype": "bfloat16"})),
        ("rows", lambda text: (teacher(), text(packing="ffd"), {})),
        ("samples", lambda text: (teacher(), text(train_size=8), {})),
    ],
)
def test_what_was_made_from_something_else_is_refused(text, tmp_path, field, change):
    source = {"folder": str(tmp_path / "kept"), "keep": "top_k", "k": 4}
    fit(tmp_path, text(), teacher(), CachedTeacher(**source), Sparse)
    before = {path: path.read_bytes() for path in (tmp_path / "kept" / "train").iterdir()}
    network, data, options = change(text)
    with pytest.raises(UsageError, match=rf"kept/train is stale: {field} was .*, now .*; go back") as error:
        fit(tmp_path, data, network, CachedTeacher(**(source | options)), Sparse)
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "kept" / "train").iterdir()}


def test_another_tokenizer_and_another_order_of_rows_are_refused(text, files, tmp_path):
    source = CachedTeacher(str(tmp_path / "kept"))
    fit(tmp_path, text(), teacher(), source)
    other = tokenizer_folder(tmp_path / "other", corpus=[one[::-1] for one in TEXTS])
    with pytest.raises(UsageError, match=r"kept/train is stale: tokenizer was"):
        fit(
            tmp_path,
            TextDataModule(other, source=files[1], packing="none", max_length=40, batch_size=4),
            teacher(),
            source,
        )
    moved = write_lines(tmp_path / "moved.jsonl", [{"text": one} for one in reversed(TEXTS)])
    with pytest.raises(UsageError, match=r"kept/train is stale: (samples|data) was"):
        fit(tmp_path, text(source=moved), teacher(), source)
    # The same rows in another order.
    data = text()
    part = data.part("train")
    rows = part.rows
    order = torch.arange(len(rows)).flip(0)
    part.rows = type(rows)(rows.documents.take(order), torch.ones(len(rows), dtype=torch.long))
    with pytest.raises(UsageError, match=r"kept/train is stale: data was"):
        fit(tmp_path, data, teacher(), source)


def test_damaged_files_are_told_from_stale_ones(text, tmp_path):
    folder = tmp_path / "kept"
    fit(tmp_path, text(), teacher(), CachedTeacher(str(folder)))
    values = folder / "train" / "hidden.bin"
    whole = values.read_bytes()
    values.write_bytes(whole[:-2])
    with pytest.raises(RunError, match=r"hidden.bin is damaged .*delete .*kept/train"):
        fit(tmp_path, text(), teacher(), CachedTeacher(str(folder)))
    values.write_bytes(whole)
    head = folder / "head.safetensors"
    head.write_bytes(head.read_bytes()[:40])
    with pytest.raises(RunError, match=r"head.safetensors is damaged .*delete .*kept, and"):
        fit(tmp_path, text(), teacher(), CachedTeacher(str(folder)))
    manifest = folder / "train" / "manifest.json"
    assert json.loads(manifest.read_text())["keep"] == "hidden"
    manifest.write_text("[")
    with pytest.raises(RunError, match=r"manifest.json is damaged"):
        fit(tmp_path, text(), teacher(), CachedTeacher(str(folder)))


def test_parts_of_different_teachers_do_not_share_a_folder(text, tmp_path):
    folder = str(tmp_path / "kept")
    fit(tmp_path, text(), teacher(), CachedTeacher(folder))
    module = SupervisedFineTuning(student(), teacher(seed=5), source=CachedTeacher(folder))
    with pytest.raises(UsageError, match=r"kept is stale: teacher was"):
        trainer(tmp_path, limit_val_batches=1.0).fit(module, text())


def test_values_that_overflow_are_refused(text, tmp_path):
    network = teacher()
    with torch.no_grad():
        network.network.get_decoder().norm.weight.mul_(1e6)
    with pytest.raises(RunError, match=r"model.source.dtype: the teacher's hidden do not fit into float16; give bf"):
        fit(tmp_path, text(), network, CachedTeacher(str(tmp_path / "kept")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "model.source.k is 0; give 1 or more"),
        ({"batch_size": 0}, "model.source.batch_size is 0; give 1 or more"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        CachedTeacher("kept", **options)


def test_what_cannot_be_kept_is_refused(text, tmp_path):
    many = CachedTeacher(str(tmp_path / "kept"), keep="top_k", k=TOKENS + 1)
    with pytest.raises(UsageError, match=r"model.source.k is 121, but the vocabulary has 120 tokens; lower it"):
        fit(tmp_path, text(), teacher(), many)
    with pytest.raises(UsageError, match=r"kept holds no outputs of a teacher, and there is no model.teacher"):
        fit(tmp_path, text(), None, CachedTeacher(str(tmp_path / "kept")))
    module = ForwardKL(student(), teacher(), source=CachedTeacher(str(tmp_path / "kept")), rollout=OnPolicy())
    with pytest.raises(UsageError, match=r"model.source: CachedTeacher keeps .*model.rollout"):
        trainer(tmp_path).fit(module, text())
    assert not (tmp_path / "kept").exists()


def test_the_test_part_is_made_when_it_is_asked_for(text, tmp_path):
    online, kept = (
        trainer(tmp_path).test(ForwardKL(student(), teacher(), source=source), text(), verbose=False)[0]
        for source in (None, CachedTeacher(str(tmp_path / "kept"), dtype="float32"))
    )
    assert [path.name for path in (tmp_path / "kept").iterdir() if path.is_dir()] == ["test"]
    assert kept == pytest.approx(online, rel=1e-5)


def test_shares_of_processes_are_all_rows(text, tmp_path, monkeypatch):
    """Each process writes its share: two ranks one after the other, without the waiting."""
    network = teacher()
    data = text()
    module = ForwardKL(student(), network, source=CachedTeacher(str(tmp_path / "kept"), batch_size=2))
    runner = trainer(tmp_path, max_steps=1)
    counted = Counted(network)
    total = len(text().part("train").rows)
    fill = module.source.fill

    def both(part, store, missing):
        monkeypatch.setattr(type(runner), "world_size", 2)
        shares = []
        for rank in (1, 0):
            monkeypatch.setattr(type(module), "global_rank", rank)
            before = len(counted.rows)
            fill(part, store, missing)
            shares.append(len(counted.rows) - before)
        monkeypatch.undo()
        assert shares == [-(-total // 2)] * 2

    module.source.fill = both
    runner.fit(module, data)
    assert not len(module.source.opened("train").missing())
    batch = batches(module)[0]
    with torch.no_grad():
        logits = F.linear(network(batch.input_ids, batch.position_ids, batch.scored), network.network.lm_head.weight)
    torch.testing.assert_close(module.source.signal(batch, "train")[0:999], logits, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ForwardKL, {"label_weight": 0.5}),
        (TAID, {}),
        (FIRST, {"c": 0.5}),
        (ForwardKL, {"source": {"keep": "hidden"}}),
        (Sparse, {"source": {"keep": "top_k", "k": 5}}),
    ],
    ids=["kl", "taid", "first", "hidden", "top_k"],
)
def test_a_step_reads_nothing_from_the_device(text, tmp_path, monkeypatch, method, options):
    """On the device "meta" there is nothing to read: whoever asks for a value gets an error instead."""
    source = {"source": CachedTeacher(str(tmp_path / "kept"), **options["source"])} if "source" in options else {}
    module = method(student(), teacher(), optimizer=sgd, **{**options, **source})
    runner = trainer(tmp_path, max_steps=1, log_every_n_steps=100)
    runner.fit(module, text())
    # The library does read one (see `CausalLM.forward`).
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # autocast does not know the device
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    module.to("meta")
    batch = next(iter(text().train_dataloader())).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        batch.scored.tolist()
    loss = module.training_step(batch, 1)
    loss.backward()
    if method is TAID:
        module.move(loss.detach(), 0.5)
    assert loss.is_meta
