import pytest
import torch
from tiny_language import language_model, trainer
from tiny_text import tokenizer_folder, write_lines

from lit_distill.core.errors import UsageError
from lit_distill.llm.data import ChatDataModule, ClassificationDataModule, TextTask
from lit_distill.llm.evaluation import TokenMetrics
from lit_distill.llm.methods.supervised import SupervisedFineTuning

CLASSES = {"0": "sang a song", "1": "ate"}
ROWS = [{"text": f" the {animal} {k} ", "label": k % 2} for k, animal in enumerate(("cat", "dog", "old owl") * 4)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def classified(tokenizer, tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", ROWS)
    return lambda **options: ClassificationDataModule(
        tokenizer, source, **({"classes": CLASSES, "batch_size": 4} | options)
    )


def test_the_first_token_of_the_answer_alone_is_scored(classified):
    data = classified(question="what of {text}?", val_share=0.0, test_share=0.0, batch_size=12)
    (batch,) = data.train_dataloader()
    assert len(batch.targets) == len(batch) == batch.total == 12
    for row, number in enumerate(batch.index.tolist()):
        position, text = divmod(int(batch.scored[row]), batch.input_ids.shape[1])[1], ROWS[number]["text"].strip()
        before = data.decode(batch.input_ids[row, : position + 1].tolist())
        assert before == f"<|im_start|>user\nwhat of {text}?<|im_end|>\n<|im_start|>assistant\n"
        answer = data.tokenizer(CLASSES[str(number % 2)], add_special_tokens=False)["input_ids"]
        assert len(answer) > 1 or number % 2
        assert int(batch.targets[row]) == answer[0]


def test_labels_are_words_where_they_have_no_other_name(tokenizer, tmp_path):
    source = write_lines(tmp_path / "intents.jsonl", [{"words": "hello there", "intent": "card_lost"}])
    task = TextTask(source, text_field="words", label_field="intent")
    assert task.read(None, "data.tasks.x") == [("hello there", "card lost")]


def test_turns_of_a_conversation_count_with_their_first_token(tokenizer, tmp_path):
    said = [("user", "the cat"), ("assistant", "sat on the mat"), ("user", "and"), ("assistant", "ran far away")]
    source = write_lines(
        tmp_path / "talk.jsonl", [{"messages": [{"role": role, "content": content} for role, content in said]}]
    )
    data = ChatDataModule(tokenizer, source, score="answer", val_share=0.0, test_share=0.0, batch_size=1)
    (batch,) = data.train_dataloader()
    firsts = [data.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("sat on", "ran far")]
    assert batch.targets.tolist() == firsts


@torch.no_grad()
def test_accuracy_and_calibration_are_those_of_answers(classified, tmp_path):
    network = language_model(0, vocab_size=128, max_position_embeddings=128)
    module = SupervisedFineTuning(network, bins=4, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    data, runner = classified(val_share=0.0, test_share=0.5, max_length=128), trainer(tmp_path, max_steps=1)
    with torch.enable_grad():
        runner.fit(module, data)
    (logged,) = runner.test(module, data, verbose=False)
    confidence, right = [], []
    for batch in data.test_dataloader():
        for row, position in enumerate((batch.scored % batch.input_ids.shape[1]).tolist()):
            logits = network.network(batch.input_ids[None, row, : position + 1]).logits[0, -1, : module.vocab_size]
            p, choice = logits.softmax(-1).max(-1)
            confidence.append(float(p))
            right.append(int(choice) == int(batch.targets[row]))
    gaps = [0.0] * 4
    for p, hit in zip(confidence, right, strict=True):
        gaps[min(int(4 * p), 3)] += hit - p
    assert logged["test/acc"] == pytest.approx(sum(right) / len(right))
    assert logged["test/ece"] == pytest.approx(sum(map(abs, gaps)) / len(right), abs=1e-4)
    assert [len(values) for values in module.panels["reliability"].values()] == [4, 4, 4]
    assert sum(module.panels["reliability"]["count"]) == len(right)


def test_the_number_of_bins_counts():
    metrics = TokenMetrics("test/", bins=2)
    metrics.update({"acc": torch.tensor([1.0, 0.0]), "confidence": torch.tensor([0.6, 0.9])})
    assert float(metrics.compute()["test/ece"]) == pytest.approx(0.25)  # 0.65, if the two were in bins of their own
    assert metrics.reliability()["accuracy"] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([{"text": "the cat", "label": 2}], {}, r"line 1 has the label 2; classes has 0, 1"),
        ([{"text": "the cat"}], {}, r"line 1 needs a text in 'text' and a label in 'label'; its fields are text"),
        (ROWS, {"classes": {"0": "ate", "1": "ate a song"}}, r"'ate' and 'ate a song' begin with the same token"),
        (ROWS, {"question": "what is it?"}, r"data.question: it asks without the text"),
    ],
)
def test_what_is_no_classification_is_refused(tokenizer, tmp_path, rows, options, text):
    source = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match=text):
        ClassificationDataModule(tokenizer, source, **({"classes": CLASSES} | options)).read()


def test_a_task_without_files_is_refused(tokenizer):
    with pytest.raises(UsageError, match=r"data.tasks.x: nowhere is neither a file nor a folder"):
        TextTask("nowhere").read(None, "data.tasks.x")
