import gzip
from itertools import chain, pairwise
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from tiny_text import TEXTS, tokenizer_folder, write_lines
from transformers import LlamaConfig, LlamaForCausalLM

from lit_distill.core.errors import UsageError
from lit_distill.llm.data import TextDataModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("text") / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def text(folder, source):
    def build(**options):
        return TextDataModule(folder, **({"source": source, "max_length": 64, "batch_size": 4} | options))

    return build


def placed(data, rank=0, world_size=1, accumulated=1, batches=10**6):
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        accumulate_grad_batches=accumulated,
        num_training_batches=batches,
    )
    return data


def read_back(data, part):
    """The texts of a part, document by document."""
    documents = data.part(part).rows.documents
    return [
        data.decode(documents.ids[a:b].tolist()).removesuffix("<|im_end|>")
        for a, b in pairwise(documents.offsets.tolist())
    ]


def fields(batches):
    return [(b.input_ids.tolist(), b.scored.tolist(), b.targets.tolist(), b.index.tolist(), b.total) for b in batches]


# ---- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["none", "ffd"])
def test_parts_are_disjoint_and_together_the_whole(text, packing):
    data = text(packing=packing, val_share=0.25, test_share=0.125)
    parts = [read_back(data, part) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [30, 12, 6]
    assert sorted(chain(*parts)) == sorted(TEXTS)


def test_the_parts_follow_from_the_split_seed_alone(text):
    first = sorted(read_back(text(seed=1), "val"))
    assert first == sorted(read_back(text(seed=2, packing="none", max_length=60), "val"))
    assert first != sorted(read_back(text(split_seed=1), "val"))


def test_a_smaller_training_set_lies_inside_a_larger_one(text):
    small, large = (set(read_back(text(train_size=size), "train")) for size in (5, 15))
    assert len(small) == 5
    assert small < large
    assert not large & set(read_back(text(), "val"))


def test_every_token_is_scored_but_the_first_and_documents_end_with_the_end_of_text(text):
    data = text(packing="none")
    rows = data.part("train").rows
    assert torch.equal(rows.scored, rows.starts.diff() - 1)
    assert (rows.documents.ids[rows.starts[1:] - 1] == data.end_of_text).all()
    assert data.padding == data.end_of_text  # and still they are targets
    batch = next(iter(data.train_dataloader()))
    assert int((batch.targets == data.end_of_text).sum()) == len(batch)


def test_blocks_are_full(text):
    rows = text(packing="blocks", max_length=16).part("train").rows
    assert rows.starts.diff().float().mean() > 15


def test_the_default_are_pythons_own_texts(folder):
    from pydoc_data.topics import topics

    data = TextDataModule(folder, max_length=512)
    assert {part: len(set(data.part(part).numbers.tolist())) for part in ("train", "val", "test")} == {
        "train": len(topics) - 16,
        "val": 8,
        "test": 8,
    }


def test_text_files_are_split_at_empty_lines_and_may_be_packed(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").write_text("\n\n".join(TEXTS[:10]) + "\n\n\n\n")
    with gzip.open(tmp_path / "data" / "a.txt.gz", "wt") as file:
        file.write("\n\n".join(TEXTS[10:20]))
    (tmp_path / "data" / "readme.md").write_text("not this")
    data = TextDataModule(folder, "data", root=tmp_path, test_share=0.0)
    assert data.read() == TEXTS[10:20] + TEXTS[:10]
    assert not data.has_part("test")
    assert TextDataModule(folder, "data/b.txt", root=tmp_path, separator="sat").read()[0] == "the cat "


def test_parquet_and_hub_give_the_same_as_lines(text, tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "texts.parquet")
    lines = text().fingerprint()
    assert text(source=str(tmp_path / "texts.parquet"), field="body").fingerprint() == lines
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert text(source="owner/texts", subset="plain", split="validation").fingerprint() == lines
    assert asked == [("owner/texts", "plain", "validation")]


# ---- batches -------------------------------------------------------------------------------------------------------


def test_losses_do_not_depend_on_packing_padding_or_batch_size(text):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=130,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).double().eval()
    sums, widths = [], []
    for options in ({"packing": "none"}, {"packing": "ffd", "batch_size": 2}, {"packing": "none", "batch_size": 1}):
        total, count = 0.0, 0
        for batch in text(max_length=120, **options).ordered_loader():
            hidden = model.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[batch.scored])
            total += F.cross_entropy(logits, batch.targets, reduction="sum").item()
            count += len(batch.targets)
        sums.append((total, count))
        widths.append(batch.input_ids.shape[1])
    # Without any of this code: each document alone, loss by transformers.
    alone, count = 0.0, 0
    for document in read_back(text(max_length=120, packing="none"), "train"):
        ids = torch.tensor([[*text().tokenizer(document)["input_ids"], text().end_of_text]])
        with torch.no_grad():
            alone += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert widths[1] > widths[0]  # there is something packed
    for found in sums:
        assert found == (pytest.approx(alone, rel=1e-6), count)


def test_ranks_share_a_batch_and_agree_on_its_total(text):
    whole = list(placed(text(seed=3, packing="none")).train_dataloader())
    ranks = [list(placed(text(seed=3, packing="none"), rank, 2).train_dataloader()) for rank in (0, 1)]
    assert len(whole) == len(ranks[0]) == len(ranks[1]) > 2
    for both, one, two in zip(whole, *ranks, strict=True):
        assert both.index.tolist() == one.index.tolist() + two.index.tolist()
        assert both.targets.tolist() == one.targets.tolist() + two.targets.tolist()
        assert both.total == one.total == two.total == len(one.targets) + len(two.targets)


def test_the_total_is_that_of_all_accumulated_batches(text):
    options = {"packing": "none", "batch_size": 4, "val_share": 0.1, "test_share": 0.1}  # 38 rows, 9 batches
    counts = [len(batch.targets) for batch in placed(text(**options)).train_dataloader()]
    assert len(counts) == 9
    wanted = [sum(counts[start : start + 4]) for start in (0, 0, 0, 0, 4, 4, 4, 4, 8)]
    for rank in (0, 1):
        data = placed(text(**options), rank, 2, accumulated=4)
        assert [batch.total for batch in data.train_dataloader()] == wanted
        assert [batch.total for batch in data.val_dataloader()] == [  # nothing is accumulated there
            batch.total for batch in placed(text(**options), rank, 2).val_dataloader()
        ]


class Recorder(LightningModule):
    """Sums of one over scored tokens: its gradient tells how a step was normalized."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.gradients, self.position = [], [], None

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * len(batch.targets) / batch.total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(round(float(self.weight.grad), 5))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 5}])
def test_steps_of_the_trainer_weigh_one_with_incomplete_groups_and_changing_ones(text, tmp_path, limits):
    module = Recorder()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        callbacks=[GradientAccumulationScheduler({0: 4, 1: 2})],
        **limits,
    )
    trainer.fit(module, datamodule=text(packing="none"))
    assert len(module.gradients) == (3 + 5 if not limits else 2 + 3)
    assert set(module.gradients) == {1.0}
    assert len({tuple(batch.index.tolist()) for batch in module.seen}) == len(module.seen)  # shuffled anew


def test_resuming_within_an_epoch_gives_the_batches_that_were_missing(text):
    loader = placed(text(seed=5, packing="none"), accumulated=2).train_dataloader()
    loader.sampler.set_epoch(3)
    whole = fields(loader)
    assert len(whole) > 3
    other = placed(text(seed=5, packing="none"), accumulated=2).train_dataloader()
    other.sampler.set_epoch(3)
    batches = iter(other)
    begun = fields([next(batches), next(batches), next(batches)])
    resumed = placed(text(seed=5, packing="none"), accumulated=2).train_dataloader()
    resumed.sampler.set_epoch(3)
    resumed.load_state_dict(other.state_dict())
    assert begun + fields(resumed) == whole
    resumed.sampler.set_epoch(4)
    assert fields(resumed) != whole


def test_a_batch_moves_to_another_device_whole(text):
    batch = next(iter(text().train_dataloader()))
    moved = text().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.input_ids.is_meta
    assert moved.scored.is_meta
    assert moved.total == batch.total
    assert moved.index is batch.index  # where a teacher's outputs are looked up


# ---- vocabulary and fingerprint ------------------------------------------------------------------------------------


def test_a_restricted_vocabulary_says_the_same_in_fewer_tokens(text):
    data, whole = text(restrict_vocabulary=True), text()
    assert data.vocab_size == len(data.vocabulary) < whole.vocab_size == len(whole.tokenizer)
    assert whole.vocabulary is None
    assert data.vocabulary.dtype == torch.int64
    for part in ("train", "val", "test"):
        ids = data.part(part).rows.documents.ids
        assert ids.max() < data.vocab_size
        assert torch.equal(data.vocabulary[ids.long()].int(), whole.part(part).rows.documents.ids)
        assert read_back(data, part) == read_back(whole, part)
    assert data.vocabulary[data.padding] == data.tokenizer.pad_token_id
    assert data.vocabulary[data.end_of_text] == data.tokenizer.eos_token_id
    assert data.prompts("val", 2) != whole.prompts("val", 2)
    assert [data.decode(p) for p in data.prompts("val", 2)] == [whole.decode(p) for p in whole.prompts("val", 2)]


def test_prompts_are_the_first_halves_of_documents(text):
    data = text()
    documents = data.part("val").rows.documents
    for number, prompt in enumerate(data.prompts("val", 99)):
        start, end = documents.offsets[number : number + 2].tolist()
        assert prompt == documents.ids[start : start + (end - start) // 2].tolist()
    assert data.prompts("val", torch.tensor([0])) == data.prompts("val", int(data.part("val").rows.firsts[1]))


def test_the_fingerprint_tells_what_outputs_depend_on(text, tmp_path):
    known = text().fingerprint()
    assert text(seed=7, batch_size=2).fingerprint() == known
    assert text().fingerprint("val") != known
    other = tokenizer_folder(tmp_path / "other", corpus=[*TEXTS, "cats and dogs and cats and dogs"] * 3)
    changes = {
        "tokenizer": TextDataModule(other, text().source, max_length=64),
        "data": text(split_seed=1),
        "rows": text(packing="none"),
        "samples": text(packing="none"),
        "vocabulary": text(restrict_vocabulary=True),
    }
    for field, data in changes.items():
        assert data.fingerprint()[field] != known[field], field
    data = text()
    data.tokenizer(TEXTS, padding=True, truncation=True, max_length=5)  # leaves its settings behind
    assert data.fingerprint() == known


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "data.max_length is 1; give 2 or more"),
        ({"packing": "best"}, "data.packing: best is not known; give none, ffd, blocks"),
        ({"val_share": 1.0}, "data.val_share: 1.0 is not a share of the documents"),
        ({"val_share": 0.6, "test_share": 0.4}, "data.val_share, data.test_share: 0.6 and 0.4 leave nothing"),
        ({"separator": ""}, "data.separator: it is empty"),
        ({"batch_size": 0}, "data.batch_size: 0 is not a number of samples"),
        ({"tokenizer": "/no/such/folder"}, "data.tokenizer: /no/such/folder cannot be loaded"),
        ({"source": "/no/such.jsonl"}, "data.source: /no/such.jsonl is not there; correct the path, or data.root"),
        ({"field": "body"}, "data.field: {source} line 1 has no text in 'body'; its fields are text"),
        ({"train_size": 39}, "data.train_size: 39 is more than the 38 available"),
        ({"train_size": 3, "packing": "none"}, "data.batch_size: 4 is more than the 3 training samples"),
    ],
)
def test_options_that_cannot_be(folder, source, options, message):
    given = {"tokenizer": folder, "source": source, "batch_size": 4} | options
    with pytest.raises(UsageError) as error:
        TextDataModule(**given).train_dataloader()
    assert message.format(source=source) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl line 3 is not JSON (Expecting value); write one object"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": 3}', "data.field: {path} line 1 has no text in 'text'; its fields are text"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not text in UTF-8"),
        ("a.txt.gz", b"plain", "a.txt.gz is not text in UTF-8"),
        ("a.parquet", b"nothing", "a.parquet is not a Parquet file"),
        ("a.csv", b"text\nx", "a.csv does not end in .txt or .jsonl or .parquet; convert or rename it"),
        ("a.txt", b"one\n\ntwo", "data: 2 documents are too few for 3 parts; give more, or set data.val_share or"),
        ("a.txt", b"\n", "data: 0 documents are too few"),
        ("a.jsonl", b'{"text": ""}\n' * 9, "training documents has a token to predict; give more or longer ones"),
    ],
)
def test_files_that_are_not_what_they_should_be(folder, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        TextDataModule(folder, str(path)).setup()
    assert message.format(path=path) in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_and_names_without_data(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=f"there is no file .txt or .jsonl or .parquet in {tmp_path}"):
        TextDataModule(folder, str(tmp_path)).setup()

    def unreachable(*_, **__):
        raise ConnectionError("couldn't reach the hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UsageError) as error:
        TextDataModule(folder, "owner/name").setup()
    assert str(error.value) == (
        "data.source: owner/name is no file, and as a data set it cannot be loaded (ConnectionError: couldn't reach "
        "the hub); check the name, data.subset and data.split, or give a file"
    )
    with pytest.raises(UsageError, match=r"data\.test_share: it is 0, so there is no such part"):
        TextDataModule(folder, test_share=0.0).test_dataloader()
