import copy
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_language import VOCABULARY, Pairs, kl, language_model, logits_of, pairs, sgd, token_batch, trainer
from tiny_text import TEXTS, tokenizer_folder, write_lines
from torchmetrics.functional.classification import multiclass_calibration_error

from lit_distill.core.errors import UsageError
from lit_distill.llm.data import TextDataModule
from lit_distill.llm.evaluation import TokenMetrics, token_facts
from lit_distill.llm.methods.adaptive_kl import TotalVariation
from lit_distill.llm.methods.distillm import SkewKL, SkewReverseKL
from lit_distill.llm.methods.gkd import JSD
from lit_distill.llm.methods.kl import ForwardKL, ReverseKL
from lit_distill.llm.methods.supervised import SequenceKD, SupervisedFineTuning
from lit_distill.llm.methods.taid import TAID
from lit_distill.llm.network import CausalLM
from lit_distill.llm.rollouts import AdaptiveReplay, TeacherWritten, prompts_of
from lit_distill.llm.signals import HiddenSignal, LogitSignal


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


# ---- rollouts ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_what_stands_before_the_first_scored_token():
    rows = pairs(5)
    assert prompts_of(token_batch(rows)) == [prompt for prompt, _ in rows]


def test_rows_of_several_documents_have_no_prompt():
    batch = token_batch([([3, 4], [5, 6, 7])])
    batch.position_ids = torch.tensor([[0, 1, 0, 1, 2]])
    with pytest.raises(UsageError, match=r"data.packing: .*give data.packing none"):
        prompts_of(batch)


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
