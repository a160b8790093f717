import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_language import VOCABULARY, Pairs, language_model, pairs, token_batch, trainer
from tiny_text import TEXTS, tokenizer_folder, write_lines
from torchmetrics.functional.classification import multiclass_calibration_error

from lit_distill.core.errors import UsageError
from lit_distill.llm import rollouts
from lit_distill.llm.data import TextDataModule
from lit_distill.llm.evaluation import TokenMetrics, token_facts
from lit_distill.llm.methods.adaptive_kl import AdaptiveKL, TotalVariation
from lit_distill.llm.methods.distillm import SkewKL, SkewReverseKL
from lit_distill.llm.methods.first import FIRST, most_probable, search_c
from lit_distill.llm.methods.gkd import GKD, JSD
from lit_distill.llm.methods.kl import ForwardKL, ReverseKL
from lit_distill.llm.methods.on_policy import OnPolicyDistillation
from lit_distill.llm.methods.supervised import SequenceKD, SupervisedFineTuning
from lit_distill.llm.methods.taid import TAID
from lit_distill.llm.network import CausalLM
from lit_distill.llm.rollouts import AdaptiveReplay, OnPolicy, TeacherWritten, prompts_of
from lit_distill.llm.signals import HiddenSignal, LogitSignal, TopK


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def logits_of(network, batch):
    """(N, V), by the network's own head, one document at a time."""
    found = []
    for number, row in enumerate(batch.input_ids):
        places = batch.scored[batch.scored // batch.input_ids.shape[1] == number] % batch.input_ids.shape[1]
        length = int(places.max()) + 1
        found.append(network.network(row[None, :length]).logits[0, places])
    return torch.cat(found)


def kl(log_a, log_b):
    return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)


def expected(name, student, teacher):
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    if name == "jsd":
        m = (0.3 * p.exp() + 0.7 * q.exp()).log()
        return 0.3 * kl(p, m) + 0.7 * kl(q, m)
    if name == "taid":
        target = (0.6 * student.detach() + 0.4 * teacher).softmax(-1)
        return -(target * q).sum(-1)
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "skew": lambda: kl(p, (0.1 * p.exp() + 0.9 * q.exp()).log()),
        "skew_reverse": lambda: kl(q, (0.9 * p.exp() + 0.1 * q.exp()).log()),
        "tv": lambda: 0.5 * (p.exp() - q.exp()).abs().sum(-1),
    }[name]()


METHODS = {
    "forward": ForwardKL,
    "reverse": ReverseKL,
    "jsd": lambda *nets, **options: JSD(*nets, beta=0.3, **options),
    "skew": SkewKL,
    "skew_reverse": SkewReverseKL,
    "tv": TotalVariation,
    "taid": TAID,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_descends_the_loss_that_the_paper_writes(name, tmp_path):
    student, teacher = language_model(0), language_model(1, hidden_size=24, num_attention_heads=3)
    by_hand = copy.deepcopy(student)
    data = Pairs()
    batch = data.train_dataloader()[0]
    logits = logits_of(by_hand, batch)
    match = expected(name, logits, logits_of(teacher, batch).detach()).sum() / batch.total
    ce = F.cross_entropy(logits, batch.targets)
    (0.7 * match + 0.2 * ce).backward()

    module = METHODS[name](student, teacher, teacher_weight=0.7, label_weight=0.2, optimizer=sgd)
    trainer(tmp_path, max_steps=1).fit(module, data)
    torch.testing.assert_close(module.terms["match"], 0.7 * match.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.terms["ce"], 0.2 * ce.detach(), rtol=1e-5, atol=1e-6)
    moved = dict(student.named_parameters())
    for key, parameter in by_hand.named_parameters():
        torch.testing.assert_close(moved[key], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-5)


def test_adaptive_kl_trains(tmp_path):
    module = AdaptiveKL(language_model(0), language_model(1), optimizer=sgd)
    trainer(tmp_path).fit(module, Pairs())
    assert module.terms["match"] > 0


def test_only_the_student_moves_and_the_teacher_stays_out_of_checkpoints(tmp_path):
    student, teacher = language_model(0), language_model(1)
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    module = ForwardKL(student, teacher)
    runner = trainer(tmp_path)
    runner.fit(module, Pairs())
    assert all(not torch.equal(value, before[0][key]) for key, value in student.state_dict().items())
    assert all(torch.equal(value, before[1][key]) for key, value in teacher.state_dict().items())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in keys if key.startswith("teacher")]


def test_a_step_is_the_same_however_it_is_cut(tmp_path):
    whole, cut = language_model(0), language_model(0)
    teacher = language_model(1)
    for student, size, accumulated in ((whole, 8, 1), (cut, 2, 4)):
        module = ForwardKL(student, teacher, label_weight=0.5, optimizer=sgd)
        runner = trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulated)
        runner.fit(module, Pairs(batch_size=size, accumulated=accumulated))
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.fixture
def text(tmp_path):
    """Short texts, with a tokenizer that pads with the token of ending."""
    source = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS[:12]])
    folder = tokenizer_folder(tmp_path / "tokenizer")
    options = {"source": source, "max_length": 40, "val_share": 0.0, "test_share": 0.0, "batch_size": 2}
    return lambda **given: TextDataModule(folder, **(options | given))


def weights_after_a_step(folder, data, rearrange=lambda batch: batch, **options):
    """The student's after one step on all training data, and the losses of its batches."""
    losses = []

    class Rearranged(JSD):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(rearrange(batch), batch_idx)
            losses.append(float(loss.detach()))
            return loss

    networks = language_model(0, vocab_size=120), language_model(1, vocab_size=120)
    module = Rearranged(*networks, label_weight=0.5, optimizer=sgd)
    trainer(folder, max_steps=1, **options).fit(module, data)
    return module.student.state_dict(), sum(losses) / len(losses)


def padded(batch, side, count=5, token=0):
    """Rows with more padding, on either side; on the left it is a document of its own, as rows that are packed."""
    rows, length = batch.input_ids.shape
    filler = torch.full((rows, count), token)
    places = torch.arange(count).expand(rows, -1)
    shift = 0 if side == "right" else count
    moved = batch.scored + batch.scored // length * count + shift
    ids, positions = [batch.input_ids, filler], [batch.position_ids, batch.position_ids[:, -1:] + 1 + places]
    if side == "left":
        ids, positions = [filler, batch.input_ids], [places, batch.position_ids]
    return replace(batch, input_ids=torch.cat(ids, 1), position_ids=torch.cat(positions, 1), scored=moved)


def test_loss_and_gradient_do_not_depend_on_packing_padding_or_batches(text, tmp_path):
    """All twelve documents make one step each time."""
    plain = text(packing="none", batch_size=12)
    end = plain.tokenizer.eos_token_id
    assert plain.tokenizer.pad_token_id == end
    assert (plain.part("train").rows.documents.ids == end).sum() == 12  # it is learned, too
    wanted, loss = weights_after_a_step(tmp_path, plain)
    rows = len(text(packing="ffd").part("train").rows)
    assert rows < 12
    cases = {
        "packed": (text(packing="ffd", batch_size=rows), {}),
        "left": (plain, {"rearrange": lambda batch: padded(batch, "left", token=end)}),
        "right": (plain, {"rearrange": lambda batch: padded(batch, "right", token=end)}),
        "accumulated": (text(packing="none", batch_size=3), {"accumulate_grad_batches": 4}),
    }
    for name, (data, options) in cases.items():
        found, again = weights_after_a_step(tmp_path, data, **options)
        assert again == pytest.approx(loss, rel=1e-5), name
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_networks_of_other_tokenizers_or_short_contexts_are_refused(text, tmp_path):
    language_model(1, vocab_size=128).save_pretrained(tmp_path / "teacher")  # padded: more tokens
    other = tokenizer_folder(tmp_path / "other", special=("<|im_end|>", "<|im_start|>"))

    def run(data):
        module = ForwardKL(language_model(0, vocab_size=120), CausalLM(str(tmp_path / "teacher")))
        trainer(tmp_path, max_steps=1).fit(module, data)

    run(text())  # nobody knows its tokenizer
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "teacher")
    run(text())
    shutil.copy(f"{other}/tokenizer.json", tmp_path / "teacher")
    said = r"^model.teacher: its token 0 is '<\|im_end\|>', that of data.tokenizer '<\|im_start\|>'; losses compare"
    with pytest.raises(UsageError, match=said):
        run(text())
    with pytest.raises(UsageError, match=r"^data.max_length is 65, more than the context of model.student, 64; lower"):
        run(text(max_length=65))


def test_a_silent_or_absent_teacher_is_refused():
    with pytest.raises(UsageError, match=r"model.teacher_weight is 0.*SupervisedFineTuning"):
        ForwardKL(language_model(0), language_model(1), teacher_weight=0.0)
    with pytest.raises(UsageError, match=r"model.teacher is missing"):
        ForwardKL(language_model(0))


def test_padding_of_a_vocabulary_is_cut_off_and_missing_tokens_are_refused(tmp_path):
    padded = language_model(1, vocab_size=VOCABULARY + 9)
    module = ForwardKL(language_model(0), padded)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    assert module.vocab_size == VOCABULARY
    batch = Pairs().train_dataloader()[0]
    cut = logits_of(padded, batch)[:, :VOCABULARY]
    assert module.source.signal(batch, "train")[0:99].shape == cut.shape
    torch.testing.assert_close(module.source.signal(batch, "train")[0:99], cut, rtol=1e-5, atol=1e-5)
    small = ForwardKL(language_model(0, vocab_size=VOCABULARY - 1), language_model(1))
    with pytest.raises(UsageError, match=r"model.student has 22 tokens, the tokenizer of the data 23"):
        trainer(tmp_path, max_steps=1).fit(small, Pairs())


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_facts_about_tokens_are_those_of_all_logits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 6), 3 * torch.randn(11, 6)
    teacher = torch.randn(40, 11)
    labels = torch.randint(11, (40,))
    facts = token_facts(hidden, weight, labels, LogitSignal(teacher))
    logits = hidden @ weight.T
    torch.testing.assert_close(facts["ce"], F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(facts["kl"], kl(teacher.log_softmax(-1), logits.log_softmax(-1)))
    assert torch.equal(facts["agreement"], (logits.argmax(1) == teacher.argmax(1)).float())
    metrics = TokenMetrics("val/")
    metrics.update({name: value[:13] for name, value in facts.items()})
    metrics.update({name: value[13:] for name, value in facts.items()})
    found = metrics.compute()
    ece = multiclass_calibration_error(logits.softmax(-1), labels, 11, n_bins=15, norm="l1")
    torch.testing.assert_close(found["val/ece"], ece)
    torch.testing.assert_close(found["val/perplexity"], F.cross_entropy(logits, labels).exp())
    assert sum(metrics.reliability()["count"]) == 40


def test_validation_and_test_are_logged(tmp_path):
    module = ForwardKL(language_model(0), language_model(1), sample_tokens=3)
    runner = trainer(tmp_path, limit_val_batches=1.0)
    data = Pairs()
    runner.fit(module, data)
    assert {"val/ce", "val/kl", "val/agreement", "val/ece", "val/acc", "val/perplexity"} <= set(runner.callback_metrics)
    (results,) = runner.test(module, data, verbose=False)
    batch = token_batch(pairs(4, seed=1) + pairs(3, seed=2))
    q, p = (logits_of(network, batch).log_softmax(-1) for network in (module.student, module.teacher))
    assert results["test/kl"] == pytest.approx(float(kl(p, q).mean()), rel=1e-4)
    assert results["test/ce"] == pytest.approx(float(F.nll_loss(q, batch.targets)), rel=1e-4)
    assert [set(entry) for entry in module.panels["text"]] == [{"prompt", "student", "teacher"}] * 3


def test_fine_tuning_compares_with_a_teacher_but_does_not_learn_from_it(tmp_path):
    alone, beside = language_model(0), language_model(0)
    trainer(tmp_path).fit(SupervisedFineTuning(alone), Pairs())
    module = SupervisedFineTuning(beside, language_model(1))
    runner = trainer(tmp_path, limit_val_batches=1.0)
    runner.fit(module, Pairs())
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), beside.parameters(), strict=True))
    assert runner.callback_metrics["val/kl"] > 0


# ---- TAID ----------------------------------------------------------------------------------------------------------


def test_taid_under_a_constant_loss_follows_the_closed_form():
    module = TAID(language_model(0), language_model(1), t_start=0.2, alpha=0.05)
    steps = 12
    for _ in range(steps + 1):  # the first loss is only kept
        module.move(torch.tensor(3.0), 0.0)
    assert float(module.t) == pytest.approx(1 - 0.8 * (1 - 0.05 / 2) ** steps, rel=1e-5)


def test_taid_counts_the_momentum_of_relative_change():
    module = TAID(language_model(0), language_model(1), t_start=0.2, alpha=0.3, beta=0.9)
    losses = [4.0, 3.0, 3.5, 1.0]
    t, momentum, last = 0.2, 0.0, None
    for loss in losses:
        module.move(torch.tensor(loss), 0.0)
        if last is not None:
            momentum = 0.9 * momentum + 0.1 * (last - loss) / last
            t += 0.3 / (1 + math.exp(-momentum)) * (1 - t)
        last = loss
        assert float(module.t) == pytest.approx(t, rel=1e-5)
    assert float(module.momentum) == pytest.approx(momentum, rel=1e-5)


def test_taid_moves_once_a_step_and_ends_at_the_teacher(tmp_path):
    seen = []

    class Watched(TAID):
        def move(self, loss, done):
            super().move(loss, done)
            seen.append((float(loss), float(self.t)))

    module = Watched(language_model(0), language_model(1), adaptive=False, t_start=0.2)
    runner = trainer(tmp_path, max_steps=4, accumulate_grad_batches=2, limit_val_batches=1.0)
    runner.fit(module, Pairs(count=16, batch_size=2, accumulated=2))
    assert [t for _, t in seen] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    runner.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state["t"] == 1.0
    assert {"momentum", "last_loss"} <= set(state)


def test_the_loss_that_moves_taid_is_that_of_the_whole_step(tmp_path):
    losses = {}
    for size, accumulated in ((4, 1), (2, 2)):
        module = TAID(language_model(0), language_model(1), teacher_weight=0.5, optimizer=sgd)
        runner = trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulated)
        runner.fit(module, Pairs(count=4, batch_size=size, accumulated=accumulated))
        losses[size] = float(module.last_loss)
    assert losses[2] == pytest.approx(losses[4], rel=1e-5)


# ---- FIRST ---------------------------------------------------------------------------------------------------------


def test_first_searches_the_c_of_least_calibration_error():
    torch.manual_seed(0)
    logits = 2 * torch.randn(4000, 5)
    logprobs = logits.log_softmax(1).sort(descending=True).values
    honest = (logprobs.exp() / 0.37).softmax(1)[:, 0]  # first choices are right as often as c = 0.37 says
    right = torch.rand(4000) < honest

    def error(c):
        confidence = (logprobs.exp() / c).softmax(1)[:, 0]
        bins = (10 * confidence).long().clamp(max=9)
        gaps = torch.zeros(10).index_add(0, bins, right.float() - confidence)
        return float(gaps.abs().sum() / 4000)

    coarse = min((tenth / 10 for tenth in range(1, 11)), key=error)
    near = [coarse + step / 50 for step in range(-5, 6) if 0 < coarse + step / 50 <= 1]
    found = search_c(logprobs, right)
    assert found == pytest.approx(min(near, key=error))
    assert found == pytest.approx(0.37, abs=0.05)
    assert error(found) < error(coarse)


def test_first_takes_c_from_the_validation_tokens(tmp_path):
    teacher = language_model(1)
    module = FIRST(language_model(0), teacher, k=3)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    batch = token_batch(pairs(4, seed=1) + pairs(3, seed=2))
    kept = most_probable(logits_of(teacher, batch).detach(), 3)
    assert module.c == search_c(kept.logprobs, kept.ids[:, 0] == batch.targets)


def test_first_learns_the_calibrated_tokens(tmp_path):
    student, teacher = language_model(0), language_model(1)
    batch = Pairs().train_dataloader()[0]
    p = logits_of(teacher, batch).softmax(-1).detach()
    top, ids = p.topk(3)
    target = (top / 0.4).softmax(-1)
    q = logits_of(student, batch).log_softmax(-1).gather(1, ids)
    wanted = (target * (target.log() - q)).sum() / batch.total
    module = FIRST(student, teacher, k=3, c=0.4)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    torch.testing.assert_close(module.terms["match"], wanted.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("calibration", ["trustworthy", "smoothing", "none"])
@torch.no_grad()
def test_first_tells_how_calibrated_the_teacher_is(tmp_path, calibration):
    teacher = language_model(1)
    c = 0.4 if calibration == "trustworthy" else None
    module = FIRST(language_model(0), teacher, k=3, c=c, calibration=calibration, bins=5)
    runner, data = trainer(tmp_path, max_steps=1), Pairs()
    with torch.enable_grad():
        runner.fit(module, data)
    (logged,) = runner.test(module, data, verbose=False)
    batch = token_batch(pairs(4, seed=1) + pairs(3, seed=2))
    p, ids = logits_of(teacher, batch).softmax(-1).topk(3)
    right = (ids[:, 0] == batch.targets).float()
    taken = p[:, 0].clamp(max=0.1)
    said = {"trustworthy": (p / 0.4).softmax(-1)[:, 0], "smoothing": p[:, 0] - taken, "none": p[:, 0]}[calibration]
    for name, confidence in (("teacher", p[:, 0]), ("calibrated", said)):
        gaps = torch.zeros(5).index_add(0, (5 * confidence).long().clamp(max=4), right - confidence)
        assert logged[f"test/{name}_ece"] == pytest.approx(float(gaps.abs().sum() / len(right)), abs=1e-4), name
    assert logged["test/teacher_acc"] == pytest.approx(float(right.mean()))
    assert ("test/c" in logged) == (calibration == "trustworthy")
    assert "test/calibrated_acc" not in logged


def test_kept_tokens_may_be_more_but_not_fewer():
    kept = TopK(torch.tensor([[4, 9, 2]]), torch.tensor([[-3.0, -0.5, -1.0]]))
    fewer = most_probable(kept, 2)
    assert fewer.ids.tolist() == [[9, 2]]
    assert fewer.logprobs.tolist() == [[-0.5, -1.0]]
    with pytest.raises(UsageError, match=r"model.k is 5, but only 3 tokens were kept"):
        most_probable(kept, 5)


# ---- rollouts ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_what_stands_before_the_first_scored_token():
    rows = pairs(5)
    assert prompts_of(token_batch(rows)) == [prompt for prompt, _ in rows]


def test_rows_of_several_documents_have_no_prompt():
    batch = token_batch([([3, 4], [5, 6, 7])])
    batch.position_ids = torch.tensor([[0, 1, 0, 1, 2]])
    with pytest.raises(UsageError, match=r"data.packing: .*give data.packing none"):
        prompts_of(batch)


class Recorded(OnPolicy):
    def __call__(self, batch, module):
        self.last = super().__call__(batch, module)
        return self.last


def test_on_policy_scores_what_the_student_wrote(tmp_path):
    student = language_model(0)
    rollout = Recorded(share=1.0, max_new_tokens=5)
    module = ReverseKL(student, language_model(1), rollout=rollout, optimizer=sgd)
    data = Pairs()
    before = copy.deepcopy(student)
    trainer(tmp_path, max_steps=1).fit(module, data)
    batch, written = data.train_dataloader()[0], rollout.last
    assert prompts_of(written) == prompts_of(batch)
    assert written.total == len(written.targets)
    assert torch.equal(written.input_ids.flatten()[written.scored + 1], written.targets)
    q, p = (logits_of(network, written).log_softmax(-1) for network in (before, module.teacher))
    torch.testing.assert_close(module.terms["match"], kl(q, p).mean().detach(), rtol=1e-4, atol=1e-5)


def test_sampled_tokens_are_rewarded_by_the_log_ratio(tmp_path):
    rollout = Recorded(share=1.0, max_new_tokens=5)
    student = language_model(0)
    by_hand = copy.deepcopy(student)
    module = OnPolicyDistillation(student, language_model(1), rollout=rollout, optimizer=sgd)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    batch = rollout.last
    q, p = (logits_of(network, batch).log_softmax(-1) for network in (by_hand, module.teacher))
    q, p = (x.gather(1, batch.targets[:, None])[:, 0] for x in (q, p))
    (-(p - q).detach() * q).mean().backward()
    moved = dict(student.named_parameters())
    for key, parameter in by_hand.named_parameters():
        torch.testing.assert_close(moved[key], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-5)


def test_gkd_writes_in_its_share_of_steps(tmp_path):
    written = []

    class Counted(OnPolicy):
        def __call__(self, batch, module):
            found = super().__call__(batch, module)
            written.append(found is not batch)
            return found

    module = GKD(language_model(0), language_model(1), rollout=Counted(share=0.3, max_new_tokens=2))
    trainer(tmp_path, max_steps=60).fit(module, Pairs(count=4))
    assert 8 <= sum(written) <= 28  # 18 expected, three standard deviations are 11


def test_the_teacher_writes_each_row_once_and_a_killed_run_pays_nothing_twice(tmp_path):
    file = tmp_path / "written.jsonl"
    teacher = language_model(1)
    calls = []

    def run():
        module = SequenceKD(language_model(0), teacher, rollout=TeacherWritten(4, file=str(file)))
        generate = teacher.generate
        teacher.generate = lambda prompts, **options: calls.append(len(prompts)) or generate(prompts, **options)
        trainer(tmp_path, max_steps=4).fit(module, Pairs())  # two epochs of two batches
        del teacher.generate
        return module

    run()
    assert sum(calls) == 8
    whole = file.read_text()
    file.write_text(whole + "\n[3, [1")  # cut off in the middle of a line
    run()
    assert sum(calls) == 8
    file.write_text(whole[:-2])  # now the cut row is needed; others follow it
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("[0,")))
    run()
    assert sum(calls) == 10
    run()
    assert sum(calls) == 10
    other = SequenceKD(language_model(0), language_model(5), rollout=TeacherWritten(4, file=str(file)))
    with pytest.raises(UsageError, match=r"rollout.file: .*was written with another teacher"):
        trainer(tmp_path, max_steps=1).fit(other, Pairs())


def test_sequence_kd_learns_the_teachers_greedy_text(tmp_path):
    teacher, student = language_model(1), language_model(0)
    data = Pairs()
    prompts = prompts_of(data.train_dataloader()[0])
    rows = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(4):
            tokens.append(int(teacher.network(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 2:
                break
        rows.append((prompt, tokens[len(prompt) :]))
    batch = token_batch(rows)
    wanted = F.cross_entropy(logits_of(student, batch), batch.targets).detach()
    module = SequenceKD(student, teacher, rollout=TeacherWritten(4))
    trainer(tmp_path, max_steps=1).fit(module, data)
    torch.testing.assert_close(module.terms["ce"], wanted, rtol=1e-4, atol=1e-5)


def test_replay_grows_where_validation_gets_worse():
    rollout = AdaptiveReplay(tolerance=0.1)
    for loss in (2.0, 1.5, 2.05, 2.2, 2.25, 2.5):
        rollout.on_validation(loss)
    assert rollout.phi == pytest.approx(0.2)  # 2.2 against 2.0, 2.5 against 2.2
    fresh = AdaptiveReplay()
    fresh.load_state_dict(rollout.state_dict())
    assert (fresh.phi, fresh.last_loss) == (rollout.phi, 2.5)


@pytest.mark.parametrize(("processes", "mine"), [(2, [3, 4]), (1, [1, 2, 3, 4]), (3, [2])])
def test_replay_keeps_the_rows_of_all_processes(monkeypatch, processes, mine):
    """Two saved; as many or another number go on, and all of these have equally many rows."""
    saved = {"phi": 0.3, "last_loss": 1.0, "kept": [[([1], [9], 1), ([1], [9], 2)], [([1], [9], 3), ([1], [9], 4)]]}
    monkeypatch.setattr(rollouts, "distributed_rank", lambda: (min(1, processes - 1), processes))
    rollout = AdaptiveReplay(buffer=4)
    rollout.load_state_dict(saved)
    assert [row for _, _, row in rollout.kept] == mine
    monkeypatch.setattr(rollouts, "gathered", lambda kept: [saved["kept"][0], kept])
    rollout.kept = saved["kept"][1]
    assert rollout.state_dict() == saved


def test_replay_fills_its_buffer_and_then_serves_from_it(tmp_path):
    rollout = AdaptiveReplay(buffer=4, max_new_tokens=3)
    rollout.phi = 1.0
    module = ForwardKL(language_model(0), language_model(1), rollout=rollout)
    calls = []
    writer = rollout.writer
    rollout.writer = lambda batch, module: calls.append(module.iteration) or writer(batch, module)
    trainer(tmp_path, max_steps=12).fit(module, Pairs())
    assert len(rollout.kept) == 4
    assert calls[0] == 0
    assert 1 <= len(calls) < 12


def test_an_interrupted_run_with_rollouts_ends_as_an_uninterrupted_one(tmp_path):
    def module():
        rollout = AdaptiveReplay(buffer=4, max_new_tokens=3)
        rollout.phi = 0.8
        return TAID(language_model(0), language_model(1), rollout=rollout, alpha=0.1)

    class Halfway(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole = module()
    trainer(tmp_path, max_steps=8, callbacks=[Halfway()]).fit(whole, Pairs())
    second = module()
    runner = trainer(tmp_path, max_steps=8)
    runner.fit(second, Pairs(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert runner.global_step == 8
    for one, other in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)
    assert whole.rollout.kept == second.rollout.kept


def test_hidden_states_and_head_make_the_logits():
    hidden, weight = torch.randn(5, 3), torch.randn(7, 3)
    torch.testing.assert_close(HiddenSignal(hidden, weight)[1:4], (hidden @ weight.T)[1:4])
