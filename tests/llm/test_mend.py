import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_language import language_model, sgd, trainer
from tiny_text import TEXTS, tokenizer_folder, write_lines

from lit_distill.core.errors import UsageError
from lit_distill.llm.demonstrations import TaskDemonstrations, TextDemonstrations
from lit_distill.llm.methods.mend import MEND
from lit_distill.llm.network import CausalLM


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def network(seed, **sizes):
    return language_model(seed, **({"vocab_size": 128, "max_position_embeddings": 128} | sizes))


@pytest.fixture
def texts(tokenizer, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join(text * 2 for text in TEXTS), encoding="utf-8")
    return lambda **options: TextDemonstrations(
        tokenizer, source=str(tmp_path / "texts.txt"), max_length=20, **({"batch_size": 4} | options)
    )


RECORDS = [
    {
        "demonstrations": [{"input": f"the cat {k}", "output": "sat"}, f"the dog {'ran far away ' * (k % 3)}"],
        "input": f"the {animal} {k}",
        "output": "slept and sang"[: 5 + k],
    }
    for k, animal in enumerate(
        ("cat", "old owl", "dog", "very small mouse", "cat", "dog", "owl", "mouse", "cat", "dog")
    )
]


@pytest.fixture
def tasks(tokenizer, tmp_path):
    source = write_lines(tmp_path / "tasks.jsonl", RECORDS)
    return lambda **options: TaskDemonstrations(tokenizer, source, max_length=60, **({"batch_size": 4} | options))


def built(module, data, folder, **options):
    trainer(folder, **({"max_steps": 1} | options)).fit(module, data)
    return module


def parts_of(batch):
    """Demonstrations and query of each row, without padding."""
    width = batch.queries.shape[1]
    for row in range(len(batch)):
        count = int((batch.scored // width == row).sum())
        shown = batch.demonstrations[row, batch.demonstrations.shape[1] - int(batch.lengths[row]) :]
        yield shown, batch.queries[row, :count]


def logits_by_hand(model, shown, query):
    """(Q, V) behind each token of a query, alone and without padding."""
    return model.network(torch.cat([shown, query])[None]).logits[0, len(shown) :]


# ---- data ----------------------------------------------------------------------------------------------------------


def test_texts_are_cut_in_two_and_nothing_is_lost(texts):
    data = texts()
    data.setup()
    rows, seen = data.part("train").rows, 0
    whole = [rows.documents.ids[a:b].tolist() for a, b in zip(rows.starts[:-1], rows.starts[1:], strict=True)]
    for batch in data.train_dataloader():
        assert batch.total == len(batch.scored)
        assert batch.answered == int((batch.labels >= 0).sum()) == batch.total - len(batch)
        for number, (shown, query) in zip(batch.index.tolist(), parts_of(batch), strict=True):
            assert [*shown.tolist(), *query.tolist()] == whole[number]
            assert len(shown) == min(max(round(0.8 * len(whole[number])), 1), len(whole[number]) - 1)
            seen += 1
    assert seen == len(rows) // 4 * 4


def test_tasks_score_the_answer_alone(tasks):
    data = tasks(val_share=0.0, test_share=0.0, batch_size=10)
    (batch,) = data.train_dataloader()
    end, width = data.end_of_text, batch.queries.shape[1]
    assert batch.answered == int((batch.labels >= 0).sum())
    for row, (number, (shown, query)) in enumerate(zip(batch.index.tolist(), parts_of(batch), strict=True)):
        record = RECORDS[number]
        wanted = f"the cat {number}\nsat\n\n\n{record['demonstrations'][1]}\n\n\n"
        assert data.decode(shown.tolist()) == wanted
        assert data.decode(query.tolist()) == f"{record['input']}\n{record['output']}<|im_end|>"
        labels = batch.labels[batch.scored // width == row]
        answer = data.tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [end]
        assert labels[labels >= 0].tolist() == answer
        assert torch.equal(labels[:-1][labels[:-1] >= 0], query[1:][labels[:-1] >= 0])
        assert labels[-1] == -100


def test_long_demonstrations_lose_their_beginning_and_long_queries_are_left_out(tokenizer, tmp_path):
    records = [
        {"demonstrations": "the cat sat on the mat " * 9, "input": "the dog", "output": "ate"},
        {"demonstrations": "the cat", "input": "the dog ran far away " * 9, "output": "ate"},
    ]
    source = write_lines(tmp_path / "tasks.jsonl", records)
    data = TaskDemonstrations(tokenizer, source, max_length=24, val_share=0.0, test_share=0.0, batch_size=1)
    (batch,) = data.train_dataloader()
    ((shown, query),) = parts_of(batch)
    assert len(shown) + len(query) == 24
    assert data.decode(query.tolist()) == "the dog\nate<|im_end|>"
    assert ("the cat sat on the mat " * 9 + "\n\n\n").endswith(data.decode(shown.tolist()))


def test_totals_are_of_the_whole_step(texts, tasks, tmp_path):
    for make in (texts, tasks):
        data = make(batch_size=2)
        built(MEND(network(0), network(1), vectors=3), data, tmp_path, accumulate_grad_batches=2)
        first, second = list(data.train_dataloader())[:2]
        assert first.total == second.total == len(first.scored) + len(second.scored)
        assert first.answered == second.answered == int(sum((b.labels >= 0).sum() for b in (first, second)))


def test_bad_records_and_settings_are_refused(tokenizer, tmp_path):
    source = write_lines(tmp_path / "tasks.jsonl", [{"demonstrations": [], "input": "a", "output": "b"}])
    with pytest.raises(UsageError, match=r"tasks.jsonl line 1 needs text in demonstrations, input and output"):
        TaskDemonstrations(tokenizer, source).read()
    source = write_lines(tmp_path / "long.jsonl", [{"demonstrations": "a", "input": "the cat " * 9, "output": "b"}])
    with pytest.raises(UsageError, match=r"data.max_length: none of the 1 queries fits 8 tokens"):
        TaskDemonstrations(tokenizer, source, max_length=8, val_share=0.0, test_share=0.0).setup()
    with pytest.raises(UsageError, match=r"data.share: 1.0 is not a share"):
        TextDemonstrations(tokenizer, share=1.0)
    with pytest.raises(UsageError, match=r"data.packing: ffd is not known; give none"):
        TextDemonstrations(tokenizer, packing="ffd")


# ---- the loss ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_of_the_demonstrations_themselves_are_as_good_as_they(texts, tmp_path):
    with torch.enable_grad():
        data = texts()
        module = built(MEND(network(0), network(1), vectors=3), data, tmp_path)
    batch = next(batch for batch in data.train_dataloader() if len(batch.lengths.unique()) == 1)
    same = module.teacher.network.get_input_embeddings()(batch.demonstrations)
    terms = {"kl": (lambda logits, target, _: (logits - target).abs().amax(1), 1.0)}
    total, _ = module.with_vectors(batch, same, module.with_context(batch), terms, 1.0)
    assert float(total) < 1e-4
    none, _ = module.with_vectors(batch, None, module.with_context(batch), terms, 1.0)
    assert float(none) > 1


@torch.no_grad()
def test_what_is_asked_does_not_depend_on_the_padding(tasks, tmp_path):
    with torch.enable_grad():
        data = tasks()
        module = built(MEND(network(0), network(1), vectors=3), data, tmp_path)
    batch = next(iter(data.train_dataloader()))
    assert len(batch.lengths.unique()) > 1
    by_hand = torch.cat([logits_by_hand(module.teacher, *parts) for parts in parts_of(batch)])
    torch.testing.assert_close(module.with_context(batch)[0:999], by_hand[:, : module.vocab_size], rtol=1e-4, atol=1e-4)
    vectors = module.distill(batch)
    for row, (shown, _) in enumerate(parts_of(batch)):
        inner = module.student.network.network
        given = torch.cat([inner.get_input_embeddings()(shown), module.student.placeholders])[None]
        expected = inner.model(inputs_embeds=given).last_hidden_state[0, -3:]
        torch.testing.assert_close(vectors[row], expected, rtol=1e-4, atol=1e-4)


def loss_by_hand(module, batch, pred, distill):
    model, vectors = module.teacher.network, module.distill(batch)
    kl = ce = 0.0
    for row, (shown, query) in enumerate(parts_of(batch)):
        given = torch.cat([vectors[row], model.get_input_embeddings()(query)])[None]
        ours = model(inputs_embeds=given).logits[0, 3:, : module.vocab_size]
        theirs = logits_by_hand(module.teacher, shown, query)[:, : module.vocab_size].detach()
        kl = kl + F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="sum")
        labels = batch.labels[batch.scored // batch.queries.shape[1] == row]
        ce = ce + F.cross_entropy(ours, labels, reduction="sum", ignore_index=-100)
    return pred * ce / batch.answered + distill * kl / batch.total


@pytest.mark.parametrize(
    ("phase", "distill_weight", "weights"),
    [("pretrain", 0.3, (0, 1)), ("finetune", 0.3, (1, 0.3)), ("finetune", 0.0, (1, 0))],
)
@pytest.mark.parametrize("width", [16, 24])
def test_a_step_descends_the_loss_of_its_phase(tasks, tmp_path, phase, distill_weight, weights, width):
    data = tasks()
    student, teacher = network(0), network(1, hidden_size=width, num_attention_heads=2)
    before = []

    class Kept(MEND):
        def training_step(self, batch, batch_idx):
            before.append((copy.deepcopy(self.student), batch))
            return super().training_step(batch, batch_idx)

    module = Kept(student, teacher, vectors=3, phase=phase, distill_weight=distill_weight, optimizer=sgd)
    built(module, data, tmp_path)
    ((by_hand, batch),) = before
    moved, module.student = module.student, by_hand
    loss = loss_by_hand(module, batch, *weights)
    loss.backward()
    total = sum(module.terms.values())
    torch.testing.assert_close(total.detach(), loss.detach(), rtol=1e-4, atol=1e-5)
    assert set(module.terms) == {name for name, weight in zip(("ce", "distill"), weights, strict=True) if weight}
    old = dict(by_hand.named_parameters())
    for name, parameter in moved.named_parameters():
        grad = old[name].grad
        if grad is None:
            assert not parameter.requires_grad  # the head of g
            continue
        torch.testing.assert_close(parameter, old[name] - 0.1 * grad, rtol=1e-3, atol=1e-4)
    assert old["placeholders"].grad.abs().max() > 0
    assert any("adapter" in name for name in old) == (width != 16)


def test_the_language_model_gets_no_gradient_and_is_not_saved(texts, tmp_path):
    teacher = network(1)
    before = copy.deepcopy(teacher.state_dict())
    module = MEND(network(0), teacher, vectors=3)
    data, runner = texts(), trainer(tmp_path)
    runner.fit(module, data)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    vectors = module.distill(next(iter(data.train_dataloader()))).detach().requires_grad_()
    batch = next(iter(data.train_dataloader()))
    terms = {
        "kl": (
            lambda logits, target, _: F.kl_div(logits.log_softmax(1), target.softmax(1), reduction="none").sum(1),
            1.0,
        )
    }
    module.with_vectors(batch, vectors, module.with_context(batch), terms, 1.0)[0].backward()
    assert vectors.grad.abs().max() > 0
    runner.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert "student.placeholders" in keys
    assert not [key for key in keys if key.startswith("teacher")]


@torch.no_grad()
def test_the_adapter_is_a_bounded_linear_map(texts, tmp_path):
    with torch.enable_grad():
        data = texts()
        module = built(MEND(network(0), network(1, hidden_size=24), vectors=3), data, tmp_path)
    batch = next(iter(data.train_dataloader()))
    vectors = module.distill(batch)
    assert vectors.shape == (len(batch), 3, 24)
    assert vectors.abs().max() <= 1


def test_placeholders_begin_as_embeddings_of_ordinary_tokens(texts, tmp_path):
    module = MEND(network(0), network(1), vectors=5, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    built(module, texts(), tmp_path)
    embeddings = module.student.network.network.get_input_embeddings().weight
    for placeholder in module.student.placeholders:
        near = (embeddings - placeholder).abs().amax(1)
        assert near.min() == 0
        assert int(near.argmin()) >= 100


def test_a_step_is_the_same_however_it_is_cut(tasks, tmp_path):
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        module = MEND(network(0), network(1), vectors=3, phase="finetune", optimizer=sgd)
        data = tasks(batch_size=size, val_share=0.0, test_share=0.0, seed=0)
        built(module, data, tmp_path, accumulate_grad_batches=accumulated)
        found.append(module)
    for one, other in zip(*(module.trainable() for module in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_validation_compares_with_demonstrations_and_without(tasks, tmp_path):
    data = tasks(val_share=0.3, eval_batch_size=2, batch_size=2)
    module = MEND(network(0), network(1), vectors=3, phase="finetune", optimizer=sgd)
    runner = trainer(tmp_path, limit_val_batches=1.0, val_check_interval=1, max_steps=1)
    with torch.enable_grad():
        runner.fit(module, data)
    logged = {key: float(value) for key, value in runner.callback_metrics.items()}
    model, sums = module.teacher.network, torch.zeros(7)
    queries = tokens = answers = 0
    for batch in data.val_dataloader():
        vectors = module.distill(batch)
        for row, (shown, query) in enumerate(parts_of(batch)):
            given = torch.cat([vectors[row], model.get_input_embeddings()(query)])[None]
            labels = batch.labels[batch.scored // batch.queries.shape[1] == row]
            asked = [
                logits_by_hand(module.teacher, shown, query),
                model(inputs_embeds=given).logits[0, 3:],
                model(query[None]).logits[0],
            ]
            p, *others = (x[:, : module.vocab_size].log_softmax(-1) for x in asked)
            sums[:2] += torch.stack([F.kl_div(q, p, log_target=True, reduction="sum") for q in others])
            sums[2:5] += torch.stack([F.nll_loss(x, labels, reduction="sum") for x in (others[0], p, others[1])])
            sums[5:] += torch.tensor([3 + len(query), len(shown) + len(query)])
            queries, tokens, answers = queries + 1, tokens + len(query), answers + int((labels >= 0).sum())
    sums /= torch.tensor([tokens, tokens, answers, answers, answers, queries, queries])
    names = ("kl", "kl_without", "ce", "ce_context", "ce_without", "tokens", "tokens_context")
    for name, value in zip(names, sums.tolist(), strict=True):
        assert logged[f"val/{name}"] == pytest.approx(value, rel=1e-3), name
    (results,) = runner.test(module, data, verbose=False)
    assert results["test/kl"] > 0


def test_an_interrupted_run_ends_as_an_uninterrupted_one(texts, tmp_path):
    def module():
        return MEND(network(0), network(1), vectors=3)

    class Halfway(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole = module()
    trainer(tmp_path, max_steps=4, callbacks=[Halfway()]).fit(whole, texts(seed=0))
    second = module()
    trainer(tmp_path, max_steps=4).fit(second, texts(seed=0), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_cannot_be_done_is_said(texts, tmp_path):
    networks = network(0), network(1)
    for options, text in (
        ({"vectors": 0}, "model.vectors is 0; give 1 or more"),
        ({"distill_weight": -1.0}, "model.distill_weight is -1.0; give 0 or more"),
    ):
        with pytest.raises(UsageError, match=text):
            MEND(*networks, **options)
    with pytest.raises(UsageError, match=r"are 20 and 120, more than the context of 128"):
        built(MEND(*networks, vectors=120), texts(), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_vectors_before_and_behind_are_read_as_embeddings_are(kind):
    if kind == "llama":
        model = network(0)
    else:
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 23, "bos_token_id": 1, "eos_token_id": 2}
        model = CausalLM(config={"model_type": "gpt2"} | sizes).materialize().eval()
    tokens = torch.tensor([[5, 9, 4, 17, 3, 8], [11, 2, 6, 20, 13, 7]])
    embedded = model.network.get_input_embeddings()(tokens)
    whole = model(tokens)
    split = model(tokens[:, 2:4], before=embedded[:, :2], after=embedded[:, 4:])
    torch.testing.assert_close(split, whole)
    assert torch.equal(model(tokens[:, :4], after=embedded[:, 4:], scored=torch.tensor([5, 11])), whole[[5, 11]])
