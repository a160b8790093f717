import gzip
import json
from itertools import chain, pairwise

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_text import MARKED, TEMPLATE, TEXTS, talk, tokenizer_folder, write_lines

from lit_distill.core.errors import UsageError
from lit_distill.llm.data import ChatDataModule

PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}/{% endif %}"
    "{% endfor %}"
)
TALKS = [
    talk("the cat sat", "the dog ate.", "the roof?", "a song\nand sang!", system="the owl"),
    talk("the dog?", "the red sofa."),
    talk("a", "b", "c", "d", "the mat", "the mouse ran far away"),
    talk("the house", "system and user", "thanks"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def chat(folder, tmp_path):
    def build(talks=TALKS, **options):
        records = [record if isinstance(record, dict) else {"messages": record} for record in talks]
        source = write_lines(tmp_path / "talks.jsonl", records)
        given = {"tokenizer": folder, "source": source, "max_length": 200, "batch_size": 1, "eval_batch_size": 1}
        return ChatDataModule(**(given | {"val_share": 0.0, "test_share": 0.0} | options))

    return build


def scored_text(data, part="train"):
    """What is scored in each document, run by run, as the batches have it."""
    found = []
    for batch in placed_in_order(data, part):
        runs, before = [], None
        for place, target in zip(batch.scored.tolist(), batch.targets.tolist(), strict=True):
            assert batch.input_ids.flatten()[place + 1] == target
            if before is None or place != before + 1:
                runs.append([])
            runs[-1].append(target)
            before = place
        found.append([data.decode(run) for run in runs])
    return found


def placed_in_order(data, part):
    return data.ordered_loader() if part == "train" else data._loader(part, training=False)


WANTED = [
    ["the dog ate.<|im_end|>", "a song\nand sang!<|im_end|>"],
    ["the red sofa.<|im_end|>"],
    ["b<|im_end|>", "d<|im_end|>", "the mouse ran far away<|im_end|>"],
    ["system and user<|im_end|>"],
]


@pytest.mark.parametrize("template", [None, MARKED])
def test_what_the_assistant_says_is_scored_with_its_end_and_nothing_else(chat, template):
    data = chat(chat_template=template)
    assert data.tokenizer.pad_token_id == data.tokenizer.eos_token_id
    assert scored_text(data) == WANTED
    whole = [data.decode(ids) for ids in rows_of(data)]
    assert whole[0] == (
        "<|im_start|>system\nthe owl<|im_end|>\n<|im_start|>user\nthe cat sat<|im_end|>\n<|im_start|>assistant\n"
        "the dog ate.<|im_end|>\n<|im_start|>user\nthe roof?<|im_end|>\n<|im_start|>assistant\na song\nand sang!"
        "<|im_end|>\n"
    )
    assert "thanks" not in whole[3]  # nothing is learnt from what comes last


def rows_of(data, part="train"):
    rows = data.part(part).rows
    starts = rows.starts.tolist()
    return [rows.documents.ids[a:b].tolist() for a, b in pairwise(starts)]


def test_packing_changes_no_mask(chat):
    (batch,) = chat(packing="ffd", max_length=400, batch_size=1).ordered_loader()
    assert batch.index.tolist() == [0]
    assert batch.position_ids.eq(0).sum() == len(TALKS)
    data = chat(packing="ffd", max_length=400)
    assert sorted(scored_text(data)[0]) == sorted(chain(*WANTED))


def test_all_tokens_may_be_scored(chat):
    data = chat(score="all")
    assert torch.equal(data.part("train").rows.scored, data.part("train").rows.starts.diff() - 1)
    assert data.prompts("train", 4) == chat().prompts("train", 4)


def test_a_template_without_headers_scores_the_content_and_what_ends_it(chat):
    # The space before an answer is part of its first token; the slash is the only sign of an end that there is.
    found = scored_text(chat(chat_template=PLAIN, talks=[talk("a", "the mat", "the cat", "red")]))
    assert [[text.lstrip() for text in runs] for runs in found] == [["the mat/", "red/"]]


def test_a_tokenizer_without_a_template_gets_chatml(chat, tmp_path):
    bare = tokenizer_folder(tmp_path / "bare", template=None)
    assert scored_text(chat(tokenizer=bare)) == WANTED
    assert rows_of(chat(tokenizer=bare)) == rows_of(chat())
    other = tokenizer_folder(tmp_path / "other", template=None, special=["</s>"], end="</s>")
    data = chat(tokenizer=other)
    assert scored_text(data)[1] == ["the red sofa.</s>"]
    assert data.decode(rows_of(data)[1]).startswith("<|im_start|>user\nthe dog?</s>\n<|im_start|>assistant\nthe red")


def test_a_template_may_be_a_file(chat, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert chat(chat_template=str(tmp_path / "chat.jinja")).fingerprint() == chat().fingerprint()


def test_prompts_end_where_the_last_answer_begins(chat):
    for packing in ("none", "ffd"):
        data = chat(packing=packing, max_length=200)
        numbers = data.part("train").numbers.tolist()
        texts = [data.decode(prompt) for prompt in data.prompts("train", 4)]
        for number, text in zip(numbers, texts, strict=True):
            last = max(k for k, message in enumerate(TALKS[number]) if message["role"] == "assistant")
            rendered = data.tokenizer.apply_chat_template(
                TALKS[number][:last], tokenize=False, add_generation_prompt=True
            )
            assert text == rendered
    index = torch.tensor([1, 0])
    rows = chat().prompts("train", index)
    assert rows == [chat().prompts("train", 4)[1], chat().prompts("train", 4)[0]]


def test_validation_keeps_its_messages_in_the_order_of_the_prompts(chat):
    data = chat(talks=[talk(text, f"{text} ate.") for text in TEXTS], val_share=0.2, packing="ffd")
    prompts = [data.decode(prompt) for prompt in data.prompts("val", 99)]
    messages = data.messages(99)
    assert len(prompts) == len(messages) == 10
    for prompt, said in zip(prompts, messages, strict=True):
        assert f"user\n{said[0]['content']}<" in prompt
    rows = data.part("val").rows
    assert len(data.messages(torch.tensor([0]))) == int(rows.firsts[1]) > 1


def test_long_conversations_lose_their_end_and_long_prompts_are_left_out(chat, monkeypatch):
    notices = []
    monkeypatch.setattr("lit_distill.llm.data.chat.rank_zero_info", notices.append)
    whole = rows_of(chat())
    assert notices == []
    first = chat().prompts("train", 4)
    limit = len(first[2]) + 2
    assert len(chat().prompts("train", 1)[0]) > limit - 8  # the first conversation is cut in its second turn or before
    data = chat(max_length=limit)
    assert all(len(row) <= limit for row in rows_of(data))
    assert rows_of(data) == [row[:limit] for row in whole]
    long = chat(talks=[*TALKS, talk("the cat " * 99, "the dog")], max_length=limit)
    notices.clear()
    long.setup()
    (notice,) = notices
    cut = sum(len(row) > limit for row in whole)
    assert notice == (
        f"data.max_length: of 5 conversations, {cut + 1} are longer than {limit} tokens: {cut} lose their end, and 1 "
        "are left out, whose prompts alone are as long"
    )
    assert long.part_size("train") == 4
    everything = chat(talks=[*TALKS, talk("the cat " * 99, "the dog")], max_length=limit, score="all")
    assert everything.part_size("train") == 4


def test_prompts_lie_within_what_is_left_of_a_conversation(chat):
    data = chat(talks=[talk("a", "the dog ate", "the roof " * 30, "b")], max_length=40)
    (prompt,) = data.prompts("train", 1)
    assert data.decode(prompt).endswith("user\na<|im_end|>\n<|im_start|>assistant\n")


def test_pairs_of_prompt_and_completion_are_conversations(chat):
    pairs = [{"prompt": "the dog?", "completion": "the red sofa."}]
    assert rows_of(chat(talks=pairs)) == rows_of(chat(talks=TALKS[1:2]))
    pairs = [{"q": TALKS[0][:-1], "a": TALKS[0][-1:]}]
    data = chat(talks=pairs, prompt_field="q", completion_field="a")
    assert rows_of(data) == rows_of(chat(talks=TALKS[:1]))


def test_all_files_give_the_same(chat, folder, tmp_path, monkeypatch):
    lines = chat().fingerprint()
    table = pyarrow.table({"messages": TALKS, "prompt": [None] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "talks.parquet")
    with gzip.open(tmp_path / "talks.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"messages": talk}) + "\n\n" for talk in TALKS)
    for name in ("talks.parquet", "talks.jsonl.gz"):
        assert chat(source=str(tmp_path / name)).fingerprint() == lines
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"messages": talk} for talk in TALKS])
    assert chat(source="owner/talks").fingerprint() == lines


def test_a_restricted_vocabulary(chat):
    data = chat(restrict_vocabulary=True)
    assert data.vocab_size < len(data.tokenizer)
    assert scored_text(data) == WANTED


# ---- mistakes ------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "the cat"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([USER], "{line} has no assistant turn, nothing to learn from; remove the record"),
        ([USER, {"role": "assistant", "content": ""}], "an assistant turn of {line} is empty; fill it in"),
        ([USER, {"role": "bot", "content": "x"}], "{line} has the role 'bot'; the roles are system, developer, user"),
        ([USER, {"content": "x"}], "{line} has the role 'None'"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], "a user message of {line} has no text"),
        ([{"role": "assistant", "content": "x"}], "{line} begins with an assistant turn, which answers nothing"),
        (["x"], "the messages of {line} are no list of objects"),
        ({"messages": "x"}, "the messages of {line} are no list of objects"),
        ({"prompt": "x", "completion": ""}, "an assistant turn of {line} is empty"),
        ({"prompt": "x", "answer": "y"}, "{line} has neither 'messages' nor 'prompt' and 'completion'; its fields are"),
    ],
)
def test_records_that_are_no_conversations(chat, tmp_path, record, message):
    with pytest.raises(UsageError) as error:
        chat(talks=[TALKS[0], record]).setup()
    assert message.format(line=f"{tmp_path}/talks.jsonl line 2") in str(error.value)
    assert str(error.value).startswith("data.")
    assert "\n" not in str(error.value)


REFUSES = "{% if messages[0].content == 'a' %}{{ raise_exception('no\nsuch') }}{% endif %}" + TEMPLATE
FORGETS = (
    "{% for m in messages %}{{ m.role }}:{% if loop.last %}<|im_start|>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "blocks"}, "data.packing: blocks is not known; give none, ffd"),
        ({"score": "answers"}, "data.score: answers is not known; give completion, answer or all"),
        ({"val_share": 0.5, "test_share": 0.4, "talks": TALKS[:2]}, "data: 2 conversations are too few for 3 parts"),
        ({"max_length": 5}, "data.max_length: within 5 tokens none of the 4 conversations comes to what the assistant"),
        ({"chat_template": "/no/file"}, "data.chat_template: /no/file is neither a file nor a template"),
        (
            {"chat_template": REFUSES},
            "data.chat_template: it refuses {path} line 3 (no such); correct the conversation",
        ),
        ({"chat_template": FORGETS}, "it writes the beginning of {path} line 1 otherwise when more follows"),
        ({"source": "/tmp/none.jsonl"}, "data.source: /tmp/none.jsonl is not there"),
        ({"batch_size": 5}, "data.batch_size: 5 is more than the 4 training samples; lower it to 4 or less"),
    ],
)
def test_options_that_cannot_be(chat, tmp_path, options, message):
    with pytest.raises(UsageError) as error:
        chat(**options).train_dataloader()
    assert message.format(path=tmp_path / "talks.jsonl") in str(error.value)
    assert "\n" not in str(error.value)
