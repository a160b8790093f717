import copy
import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from tiny_language import language_model, sgd, trainer
from tiny_text import TEXTS, tokenizer_folder, write_lines
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_distill.core.errors import UsageError
from lit_distill.llm import pairing
from lit_distill.llm.batch import PairedTokens
from lit_distill.llm.cached import CachedTeacher
from lit_distill.llm.data import ChatDataModule, TextDataModule
from lit_distill.llm.data.alignment import clean_ends, token_texts
from lit_distill.llm.methods.kl import ForwardKL
from lit_distill.llm.methods.uld import GOLD, ULD
from lit_distill.llm.pairing import Groups, cut_groups
from lit_distill.llm.rollouts import OnPolicy
from lit_distill.llm.small_tokenizer import small_tokenizer
from lit_distill.llm.vocabularies import gold, match_tokens, merge_groups, sorted_l1

ODD = ["  a  b\n\n   c ", "naïve 漢字 né", "the 🦉 sat.\n   the dog", "x", "the cat,the dog"]


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Byte-level pairs; pieces with bytes as a last resort and a beginning of text; byte-level, with other numbers."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizer_folder(root / "bytes", corpus=[*TEXTS, *ODD])
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=310, special_tokens=special, show_progress=False))
    description = json.loads(pieces.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["id"] < 3
    description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    sequence = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    fast.chat_template = (
        "{% for message in messages %}[{{ message.role }}]: {{ message.content | trim }}"
        "{% if message.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]: {% endif %}"
    )
    fast.save_pretrained(root / "pieces")
    renumbered(root / "bytes", root / "other")
    return SimpleNamespace(**{name: str(root / name) for name in ("bytes", "pieces", "other")}, root=root)


def order(size):
    return torch.randperm(size, generator=torch.Generator().manual_seed(5))


def renumbered(source, folder):
    """The same tokenizer, but token i has the number order[i]."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    new = order(len(tokenizer)).tolist()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    description["model"]["vocab"] = {token: new[number] for token, number in vocabulary.items()}
    for token in description["added_tokens"]:
        token["id"] = new[token["id"]]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def source(folders):
    return write_lines(folders.root / "texts.jsonl", [{"text": text} for text in [*TEXTS[:20], *ODD * 2]])


@pytest.fixture(scope="module")
def text(folders, source):
    def build(student="bytes", teacher="pieces", **options):
        given = {"source": source, "max_length": 48, "batch_size": 4, "eval_batch_size": 4, "packing": "none"}
        return TextDataModule(getattr(folders, student), teacher_tokenizer=getattr(folders, teacher), **given | options)

    return build


def bytes_of(data, tokens):
    """The text of tokens."""
    names = data.tokenizer.convert_ids_to_tokens(
        tokens if data.vocabulary is None else data.vocabulary[torch.tensor(tokens)].tolist()
    )
    texts = {number: text for text, number in token_texts(data.tokenizer).items()}
    numbers = data.tokenizer.convert_tokens_to_ids(names)
    return b"".join(b"<end>" if texts[n] == "" else b"" if isinstance(texts[n], str) else texts[n] for n in numbers)


def groups_of(batch):
    """Student tokens and teacher tokens of each group."""
    paired, at, found = batch.paired, 0, []
    for begin, size, count in zip(
        *(x.tolist() for x in (paired.begins, paired.sizes, paired.teacher_sizes)), strict=True
    ):
        found.append((batch.targets[begin : begin + size].tolist(), paired.targets[at : at + count].tolist()))
        at += count
    assert at == len(paired.targets)
    return found


# ---- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [11, 17])
def test_the_sorted_distance_is_scipys_of_parts_of_distributions_too(width):
    q, p = (0.3 * x.softmax(-1) for x in (random(5, 17), random(5, width, seed=1)))
    padded = F.pad(p, (0, 17 - width))
    expected = [17 * wasserstein_distance(a, b) for a, b in zip(q.numpy(), padded.numpy(), strict=True)]
    np.testing.assert_allclose(sorted_l1(q, p), expected, rtol=1e-12)
    np.testing.assert_allclose(sorted_l1(p, q), expected, rtol=1e-12)


def merged_by_loop(logits, labels, groups):
    rows = []
    for group in groups:
        row = logits[group[-1]].softmax(-1)
        for token in group[:-1]:
            row = row * logits[token].softmax(-1)[labels[token]]
        rows.append(row)
    return torch.stack(rows)


def test_groups_are_merged_by_the_chain_rule_with_its_gradient():
    groups = [[0], [2, 3, 4], [5, 6]]
    logits, labels = random(8, 9).requires_grad_(), torch.randint(9, (8,))
    found = Groups.of(torch.tensor([0, 2, 5]), torch.tensor([1, 3, 2]), 8)
    merged = merge_groups(logits, labels, last=found.last, earlier=found.earlier).exp()
    expected = merged_by_loop(logits, labels, groups)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-15)
    weights = random(3, 9, seed=2)
    ours, theirs = (torch.autograd.grad((weights * x).sum(), logits, retain_graph=True)[0] for x in (merged, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_what_is_merged_is_the_probability_of_two_tokens_in_a_row():
    """Of a chain of two states, by hand: P(a) = 0.2, then P(b | a) = 0.7."""
    logits = torch.tensor([[0.2, 0.8], [0.3, 0.7]], dtype=torch.float64).log()
    merged = merge_groups(logits, torch.tensor([0, 1]), last=torch.tensor([1]), earlier=torch.tensor([0, 1])).exp()
    torch.testing.assert_close(merged, torch.tensor([[0.2 * 0.3, 0.2 * 0.7]], dtype=torch.float64))


def gold_by_loop(q, p, pairs, b):
    ours, theirs = {s for s, _ in pairs}, {t for _, t in pairs}
    matched = sum(
        b * p[t] * np.log(p[t] / (b * p[t] + (1 - b) * q[s]))
        + (1 - b) * q[s] * np.log(q[s] / (b * p[t] + (1 - b) * q[s]))
        for s, t in pairs
    )
    a = sorted((x for v, x in enumerate(q) if v not in ours), reverse=True)
    c = sorted((x for v, x in enumerate(p) if v not in theirs), reverse=True)
    width = max(len(a), len(c))
    others = sum(abs(x - y) for x, y in zip(a + [0] * (width - len(a)), c + [0] * (width - len(c)), strict=True))
    share = len(pairs) / len(p)
    return share * matched + (1 - share) * others


def matched(pairs, student_size, teacher_size):
    return match_tokens(
        {bytes([n]): s for n, (s, _) in enumerate(pairs)},
        {bytes([n]): t for n, (_, t) in enumerate(pairs)},
        student_size,
        teacher_size,
    )


PAIRS = [(0, 4), (3, 1), (7, 12), (8, 0)]


@pytest.mark.parametrize("b", [0.1, 0.5])
def test_gold_is_its_two_sums(b):
    student, teacher = (x.log_softmax(-1) - 0.4 for x in (random(5, 9), random(5, 13, seed=1)))
    found = gold(student, teacher, matched(PAIRS, 9, 13), teacher_weight=b)
    expected = [gold_by_loop(q, p, PAIRS, b) for q, p in zip(student.exp().numpy(), teacher.exp().numpy(), strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("b", [0.0, 0.3, 1.0])
def test_gold_of_one_vocabulary_is_zero_for_equals_whatever_the_numbers(b):
    student = random(6, 9).log_softmax(-1)
    new = torch.randperm(9)
    teacher = torch.empty_like(student)
    teacher[:, new] = student
    match = matched(list(enumerate(new.tolist())), 9, 9)
    assert gold(student, teacher, match, teacher_weight=b).abs().max() < 1e-14
    if 0 < b < 1:
        assert (gold(student, random(6, 9, seed=3).log_softmax(-1), match, teacher_weight=b) > 1e-3).all()


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("b", [0.0, 0.5, 1.0])
def test_groups_and_losses_are_those_of_trl(hybrid, b):
    trl = pytest.importorskip("trl.experimental.gold.gold_trainer")
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=hybrid,
        beta=b,
    )
    theirs = trl.ULDLoss(config)
    student, teacher = random(1, 8, 9).requires_grad_(), random(1, 6, 13, seed=1)
    ids, teacher_ids = torch.randint(9, (1, 8)), torch.randint(13, (1, 6))
    if hybrid:
        theirs._vocab_mapping = {t: s for s, t in PAIRS}
        theirs._teacher_matched_ids, theirs._student_matched_ids = {t for _, t in PAIRS}, {s for s, _ in PAIRS}
        theirs.mapping_tensor = torch.full((13,), -1)
        for s, t in PAIRS:
            theirs.mapping_tensor[t] = s
    # One given token on each side; then texts that end at these bytes.
    ends, teacher_ends = [0, 2, 3, 5, 6, 9, 10, 12], [0, 3, 5, 9, 11, 12]
    offsets, teacher_offsets = (torch.tensor([[(0, 0), *pairwise(x)]]) for x in (ends, teacher_ends))
    labels, teacher_labels = ids.clone(), teacher_ids.clone()
    labels[0, 0] = teacher_labels[0, 0] = -100
    value = theirs(student, teacher, labels, teacher_labels, ids, teacher_ids, offsets, teacher_offsets)

    ours = Groups.of(torch.tensor([0, 2, 3, 5]), torch.tensor([2, 1, 2, 2]), 7)  # up to 3, 5, 9 and 12
    other = Groups.of(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 1, 2]), 5)
    q = merge_groups(student[0, :-1], ids[0, 1:], last=ours.last, earlier=ours.earlier)
    p = merge_groups(teacher[0, :-1], teacher_ids[0, 1:], last=other.last, earlier=other.earlier)
    found = gold(q, p, matched(PAIRS, 9, 13), teacher_weight=b) if hybrid else sorted_l1(q.exp(), p.exp())
    torch.testing.assert_close(found.mean(), value.squeeze(), rtol=1e-5, atol=1e-7)
    grads = [torch.autograd.grad(x, student)[0] for x in (found.mean(), value.squeeze())]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


# ---- alignment -----------------------------------------------------------------------------------------------------


def test_pieces_of_a_character_end_where_the_last_of_them_does():
    spans = np.array([(0, 0), (0, 1), (0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (3, 3), (3, 5)])
    assert clean_ends(spans).tolist() == [0, -1, 1, 2, -1, -1, 3, -1, 5]


def test_white_space_belongs_to_the_token_that_covers_it(text):
    data = text()
    encoded = data.tokenizer(["the cat  sat"], return_offsets_mapping=True)
    spans = encoded["offset_mapping"][0]
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]


@pytest.mark.parametrize("pair", [("bytes", "pieces"), ("pieces", "bytes"), ("bytes", "other")])
@pytest.mark.parametrize("packing", ["none", "ffd", "blocks"])
def test_groups_cover_the_same_text_on_both_sides(text, pair, packing):
    data = text(*pair, packing=packing, max_length=24, restrict_vocabulary=packing == "ffd")
    sizes = set()
    for batch in [*data.train_dataloader(), *data.test_dataloader()]:
        for ours, theirs in groups_of(batch):
            assert bytes_of(data, ours) == bytes_of(data.teacher, theirs)
            sizes.add((len(ours) > 1, len(theirs) > 1))
    alike = {(False, False), (True, True)}
    assert sizes <= alike if pair[1] == "other" else sizes - alike


@pytest.mark.parametrize("pair", [("bytes", "pieces"), ("pieces", "bytes")])
def test_groups_are_the_smallest_ones(text, pair):
    """By walking over the characters of each text: a place counts where no token of either side goes across it."""
    data = text(*pair, packing="none", max_length=200)
    for part in ("train", "val"):
        rows, paired = data.part(part).rows, data.part(part).paired
        for row in range(len(rows)):
            ids = [
                documents.ids[documents.offsets[row] : documents.offsets[row + 1]].tolist()
                for documents in (rows.documents, paired.rows.documents)
            ]
            places = []
            for side, tokens in zip((data, data.teacher), ids, strict=True):
                ends, written = {}, b""
                for number, token in enumerate(tokens):
                    written += bytes_of(side, [token])
                    if len(written) == 0 or _is_text(written):
                        ends.setdefault(written.decode().removeprefix(" " if side.tokenizer.bos_token else ""), number)
                places.append(ends)
            common = [(places[0][x], places[1][x]) for x in places[0] if x in places[1]]
            expected = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(common)]
            of_row = slice(paired.firsts[row], paired.firsts[row + 1])
            assert (
                list(zip(paired.sizes[of_row].tolist(), paired.teacher_sizes[of_row].tolist(), strict=True)) == expected
            )


def _is_text(written):
    try:
        written.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_the_teacher_reads_the_whole_text_in_its_own_tokens(text):
    data = text("bytes", "pieces", packing="none", max_length=200)
    part = data.part("train")
    ours, theirs = part.rows.documents, part.paired.rows.documents
    assert (theirs.ids[theirs.offsets[:-1]] == 1).all()  # its beginning of text, which the student has not
    for (a, b), (c, d) in zip(pairwise(ours.offsets.tolist()), pairwise(theirs.offsets.tolist()), strict=True):
        written = bytes_of(data.teacher, theirs.ids[c:d].tolist())
        assert written.removeprefix(b" ") == bytes_of(data, ours.ids[a:b].tolist())


def test_a_piece_of_a_text_is_the_same_piece_to_the_teacher(text):
    data = text(packing="none", max_length=10)
    part = data.part("train")
    ours, theirs = part.rows.documents, part.paired.rows.documents
    whole = [record.encode() + b"<end>" for record in data.read()]
    seen = 0
    for (a, b), (c, d) in zip(pairwise(ours.offsets.tolist()), pairwise(theirs.offsets.tolist()), strict=True):
        student, teacher = bytes_of(data, ours.ids[a:b].tolist()), bytes_of(data.teacher, theirs.ids[c:d].tolist())
        last = teacher.removesuffix(b"<end>").lstrip()
        assert any(last in record for record in whole)
        assert len(teacher) <= len(student) + 12
        seen += int(theirs.targets[c:d].sum())
    assert seen > 0.5 * len(theirs.ids)


def test_by_index_tokens_are_paired_until_one_side_ends():
    paired = PairedTokens(
        *(torch.zeros(1, 1, dtype=torch.long),) * 2,
        scored=torch.arange(10, 16),
        targets=torch.arange(20, 26),
        begins=torch.tensor([0, 1, 6]),
        sizes=torch.tensor([1, 3, 1]),
        teacher_sizes=torch.tensor([2, 1, 3]),
        runs=torch.tensor([0, 0, 4]),
    )
    pairs = paired.by_index()
    assert pairs.begins.tolist() == [0, 1, 2, 6]
    assert pairs.targets.tolist() == [20, 21, 22, 23]
    assert pairs.scored.tolist() == [10, 11, 12, 13]
    assert pairs.sizes.tolist() == pairs.teacher_sizes.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("chunks", [(1, 1), (4, 100), (100, 3), (7, 5), (100, 100)])
def test_slices_leave_groups_whole_and_miss_nothing(text, chunks):
    batch = next(iter(text(packing="ffd").train_dataloader()))
    parts = cut_groups(batch.paired, len(batch.targets), *chunks)
    for found, total in (
        (parts.student, len(batch.targets)),
        (parts.teacher, len(batch.paired.targets)),
        (parts.groups, len(batch.paired.begins)),
    ):
        assert [found[0].start, found[-1].stop] == [0, total]
        assert all(a.stop == b.start for a, b in pairwise(found))
    for tokens, teacher, groups in zip(parts.student, parts.teacher, parts.groups, strict=True):
        assert (batch.paired.begins[groups] >= tokens.start).all()
        assert (batch.paired.begins + batch.paired.sizes)[groups].le(tokens.stop).all()
        assert batch.paired.teacher_sizes[groups].sum() == teacher.stop - teacher.start
        alone = groups.stop - groups.start <= 1
        assert alone or (tokens.stop - tokens.start <= chunks[0] and teacher.stop - teacher.start <= chunks[1])


# ---- conversations -------------------------------------------------------------------------------------------------


TALKS = [
    [
        ("user", "say it"),
        ("assistant", "the cat sat  on the mat."),
        ("user", "again"),
        ("assistant", "the old owl\nsang"),
    ],
    [("user", "the cat"), ("assistant", "the cat")],
    [("user", "what?"), ("assistant", " naïve 漢字 ")],
]


@pytest.fixture(scope="module")
def talks(folders):
    records = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in TALKS * 4]
    return write_lines(folders.root / "talks.jsonl", records)


@pytest.mark.parametrize("pair", [("bytes", "pieces"), ("pieces", "bytes")])
@pytest.mark.parametrize("packing", ["none", "ffd"])
@pytest.mark.parametrize("score", ["completion", "all"])
def test_in_conversations_what_the_assistant_says_is_compared_and_nothing_else(folders, talks, pair, packing, score):
    student, teacher = (getattr(folders, name) for name in pair)
    options = {"max_length": 200, "packing": packing, "batch_size": 2, "score": score}
    data = ChatDataModule(student, talks, teacher_tokenizer=teacher, **options)
    said = {content.strip().encode() for talk in TALKS for role, content in talk if role == "assistant"}
    for batch in data.train_dataloader():
        runs: dict[int, list] = {}
        for run, (ours, theirs) in zip(batch.paired.runs.tolist(), groups_of(batch), strict=True):
            student, teacher = bytes_of(data, ours), bytes_of(data.teacher, theirs)
            runs.setdefault(run, []).append(student)
            ending = b"<end>"
            assert student.removesuffix(ending).strip() == teacher.removesuffix(ending).strip()
        for parts in runs.values():
            whole = b"".join(parts)
            assert any(text.endswith(whole.removesuffix(b"<end>").strip()) for text in said)
            assert whole.endswith(b"<end>")


def test_each_side_has_its_own_template(folders, talks):
    data = ChatDataModule(folders.bytes, talks, teacher_tokenizer=folders.pieces, max_length=200)
    part = data.part("train")
    first = part.paired.rows.documents
    read = data.teacher.tokenizer.decode(first.ids[: first.offsets[1]].tolist())
    assert "[user]: " in read
    assert "<|im_start|>" not in read


# ---- methods -------------------------------------------------------------------------------------------------------


def networks(data, tied=False, **sizes):
    student = language_model(0, vocab_size=len(data.tokenizer), tie_word_embeddings=tied, **sizes)
    teacher = language_model(1, vocab_size=len(data.teacher.tokenizer), hidden_size=24, num_attention_heads=3)
    return student, teacher


def documents_of(rows):
    """Tokens of each row that holds one document, and which of them are targets."""
    documents = rows.documents
    return [(documents.ids[a:b].long(), documents.targets[a:b]) for a, b in pairwise(documents.offsets.tolist())]


def by_hand(name, data, student, teacher, match):
    """The sum over the training part, from all logits of each document, and how many tokens are scored."""
    part, total, tokens = data.part("train"), 0.0, 0
    sides = zip(documents_of(part.rows), documents_of(part.paired.rows), strict=True)
    for row, ((ids, targets), (teacher_ids, taught)) in enumerate(sides):
        tokens += int(targets.sum())
        logits = student.network(ids[None]).logits[0].double()
        teacher_logits = teacher.network(teacher_ids[None]).logits[0].double().detach()
        of_row = slice(part.paired.firsts[row], part.paired.firsts[row + 1])
        places = targets.nonzero()[:, 0] - 1  # what predicts them
        at = int(part.paired.begins[of_row][0]) if of_row.start != of_row.stop else 0
        there = taught.nonzero()[:, 0] - 1
        done = 0
        pairs = []
        for begin, a, b in zip(
            *(x[of_row].tolist() for x in (part.paired.begins, part.paired.sizes, part.paired.teacher_sizes)),
            strict=True,
        ):
            pairs.append((places[begin : begin + a], there[done : done + b]))
            done += b
        if name == "index":
            ours = torch.cat([a for a, _ in pairs]) if pairs else places[:0]
            theirs = torch.cat([b for _, b in pairs]) if pairs else there[:0]
            pairs = [(a[None], b[None]) for a, b in zip(ours, theirs, strict=False)]
            assert not pairs or int(ours[0]) == int(places[at])
        for ours, theirs in pairs:
            q = merged_by_loop(logits, F.pad(ids[1:], (0, 1)), [ours.tolist()])[0]
            p = merged_by_loop(teacher_logits, F.pad(teacher_ids[1:], (0, 1)), [theirs.tolist()])[0]
            if name == "gold":
                total = total + gold(q.log()[None], p.log()[None], match)[0]
            else:
                total = total + sorted_l1(q[None], p[None])[0]
    return total, tokens


METHODS = {
    "index": lambda *nets, **options: ULD(*nets, alignment="index", **options),
    "text": lambda *nets, **options: ULD(*nets, alignment="text", **options),
    "gold": GOLD,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("slices", [None, 3000])
def test_a_step_descends_the_loss_by_hand(name, slices, text, tmp_path, monkeypatch):
    if slices is not None:
        monkeypatch.setattr(pairing, "SLICE_BYTES", slices)  # two teacher tokens
    data = text(packing="none", max_length=40, batch_size=99)
    data.drop_last = False
    student, teacher = networks(data)
    copied = copy.deepcopy(student)
    module = METHODS[name](student, teacher, teacher_weight=0.7, label_weight=0.0, optimizer=sgd)
    trainer(tmp_path, max_steps=1).fit(module, data)
    match = match_tokens(token_texts(data.tokenizer), token_texts(data.teacher.tokenizer), 120, teacher.vocab_size)
    total, tokens = by_hand(name, data, copied, teacher, match)
    loss = 0.7 * total / tokens
    loss.backward()
    torch.testing.assert_close(module.terms["match"].double(), loss.detach(), rtol=1e-4, atol=1e-6)
    moved = dict(student.named_parameters())
    for key, parameter in copied.named_parameters():
        torch.testing.assert_close(moved[key], parameter - 0.1 * parameter.grad, rtol=1e-3, atol=1e-5)


def numbered_anew(network):
    """The same network, for the tokenizer in which token i has the number order[i]."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for part in (other.network.get_input_embeddings(), other.network.get_output_embeddings()):
            part.weight[order(len(part.weight))] = part.weight.clone()
    return other


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("packing", ["none", "ffd"])
def test_a_network_has_no_distance_to_itself_in_other_numbers(name, packing, text, tmp_path):
    data = text("bytes", "other", packing=packing)
    student = language_model(0, vocab_size=len(data.tokenizer))
    module = METHODS[name](student, numbered_anew(student), label_weight=0.0, optimizer=sgd)
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert 0 <= float(module.terms["match"]) < 1e-5
    stranger = METHODS[name](student, language_model(3, vocab_size=len(data.tokenizer)), label_weight=0.0)
    trainer(tmp_path, max_steps=1).fit(stranger, data)
    assert float(stranger.terms["match"]) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_same_however_it_is_cut(name, text, tmp_path):
    students = []
    for size, accumulated, packing in ((8, 1, "none"), (2, 4, "none")):
        data = text(packing=packing, batch_size=size, seed=0)
        student, teacher = networks(data)
        module = METHODS[name](student, teacher, label_weight=0.5, optimizer=sgd)
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulated).fit(module, data)
        students.append(student)
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_only_the_student_moves_and_neither_teacher_nor_matches_are_in_checkpoints(text, tmp_path):
    data = text()
    student, teacher = networks(data)
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    module = GOLD(student, teacher)
    runner = trainer(tmp_path)
    runner.fit(module, data)
    assert any(not torch.equal(value, before[0][key]) for key, value in student.state_dict().items())
    assert all(torch.equal(value, before[1][key]) for key, value in teacher.state_dict().items())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in keys if key.startswith(("teacher", "match"))]


def test_evaluation_has_the_distance_and_nothing_that_wants_one_vocabulary(text, tmp_path):
    data = text(packing="none", max_length=40, test_share=0.3)
    student, teacher = networks(data)
    module = ULD(student, teacher, alignment="text", sample_tokens=3)
    runner = trainer(tmp_path)
    runner.fit(module, data)
    (results,) = runner.test(module, data, verbose=False)
    assert set(results) == {f"test/{name}" for name in ("ce", "perplexity", "acc", "ece", "match")}
    data._parts["train"] = data.part("test")
    total, _ = by_hand("text", data, student, teacher, None)
    assert results["test/match"] == pytest.approx(float(total) / len(data.part("test").paired.sizes), rel=1e-4)
    assert all(set(entry) == {"prompt", "student"} for entry in module.panels["text"])


def test_a_restricted_vocabulary_cuts_each_network_by_its_own(text, tmp_path):
    data = text(restrict_vocabulary=True)
    student, teacher = networks(data)
    module = GOLD(student, teacher)
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert torch.equal(student.vocabulary, data.vocabulary)
    assert torch.equal(teacher.vocabulary, data.teacher.vocabulary)
    assert len(data.vocabulary) < 120
    assert not torch.equal(data.vocabulary, data.teacher.vocabulary)
    ours, theirs = (data.tokenizer, data.vocabulary), (data.teacher.tokenizer, data.teacher.vocabulary)
    ends = {"<|im_end|>", "</s>"}
    for s, t in zip(module.match_student.tolist(), module.match_teacher.tolist(), strict=True):
        a, b = (tokenizer.decode([int(vocabulary[n])]) for (tokenizer, vocabulary), n in ((ours, s), (theirs, t)))
        assert a == b or {a, b} == ends or "\ufffd" in a + b


def test_tokens_are_the_same_if_their_bytes_are(folders):
    of_bytes, of_pieces = (
        token_texts(PreTrainedTokenizerFast.from_pretrained(folder)) for folder in (folders.bytes, folders.pieces)
    )
    pieces = PreTrainedTokenizerFast.from_pretrained(folders.pieces)
    assert of_pieces[b"a"] == pieces.convert_tokens_to_ids("a")  # rather than the byte that it is
    assert of_pieces[b"\n"] == pieces.convert_tokens_to_ids("<0x0A>")
    spaced = next(token for token in pieces.get_vocab() if token.startswith("▁") and len(token) > 1)
    assert of_pieces[spaced.replace("▁", " ").encode()] == pieces.convert_tokens_to_ids(spaced)
    assert of_bytes[""] == PreTrainedTokenizerFast.from_pretrained(folders.bytes).eos_token_id
    assert of_pieces["<s>"] == 1
    assert {b"a", b" ", ""} <= set(of_bytes) & set(of_pieces)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_data_without_the_teachers_tokenizer_are_refused(folders, source, tmp_path):
    data = TextDataModule(folders.bytes, source, max_length=48)
    module = ULD(language_model(0, vocab_size=120), language_model(1, vocab_size=330))
    with pytest.raises(UsageError, match=r"data.teacher_tokenizer is missing"):
        trainer(tmp_path, max_steps=1).fit(module, data)


def test_text_written_in_training_and_kept_teachers_are_refused():
    with pytest.raises(UsageError, match=r"model.rollout: ULD needs the teacher's own tokens"):
        ULD(language_model(0), language_model(1), rollout=OnPolicy())
    with pytest.raises(UsageError, match=r"model.source: GOLD needs the teacher's own tokens"):
        GOLD(language_model(0), language_model(1), source=CachedTeacher("kept"))


def test_networks_smaller_than_their_tokenizer_are_refused(text, tmp_path):
    data = text()
    module = ULD(language_model(0, vocab_size=120), language_model(1, vocab_size=100))
    with pytest.raises(UsageError, match=r"model.teacher has 100 tokens, data.teacher_tokenizer \d+"):
        trainer(tmp_path, max_steps=1).fit(module, data)


def test_a_token_level_loss_refuses_a_teacher_of_another_tokenizer(folders, source, tmp_path):
    for name in ("bytes", "other"):
        teacher = language_model(1, vocab_size=120)
        teacher.network.save_pretrained(getattr(folders, name))
    data = TextDataModule(folders.bytes, source, max_length=48, batch_size=4)
    module = ForwardKL(language_model(0, vocab_size=120), type(teacher)(folders.other))
    with pytest.raises(UsageError, match=r"^model.teacher: its token .*, that of data.tokenizer .*lit_distill.llm.ULD"):
        trainer(tmp_path, max_steps=1).fit(module, data)
    trainer(tmp_path, max_steps=1).fit(ForwardKL(language_model(0, vocab_size=120), type(teacher)(folders.bytes)), data)
    paired = TextDataModule(folders.pieces, source, max_length=48, batch_size=4, teacher_tokenizer=folders.bytes)
    wrong = ULD(language_model(0, vocab_size=330), type(teacher)(folders.other))
    with pytest.raises(
        UsageError, match=r"^model.teacher: its token .*, that of data.teacher_tokenizer .*; give the teacher's own"
    ):
        trainer(tmp_path, max_steps=1).fit(wrong, paired)


def test_a_tokenizer_that_cannot_be_loaded_is_named_by_its_key(folders, source):
    data = TextDataModule(folders.bytes, source, teacher_tokenizer=str(folders.root / "nothing"))
    with pytest.raises(UsageError, match=r"data.teacher_tokenizer: .*nothing cannot be loaded"):
        data.setup()


# ---- a tokenizer without a download --------------------------------------------------------------------------------


def test_the_small_tokenizer_says_any_text(tmp_path):
    folder = small_tokenizer(tmp_path / "small", 300)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(tokenizer) == 300
    for words in [*ODD, "\U0001d518\x00"]:
        assert tokenizer.decode(tokenizer(words)["input_ids"]) == words
    assert small_tokenizer(folder) == folder
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UsageError, match="holds something else"):
        small_tokenizer(tmp_path / "full")
    with pytest.raises(UsageError, match="size is 256"):
        small_tokenizer(tmp_path / "tiny", 256)
