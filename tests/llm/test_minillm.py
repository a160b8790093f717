import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_language import VOCABULARY, Batches, Pairs, language_model, pairs, sgd, token_batch, trainer
from tiny_text import TEXTS, tokenizer_folder, write_lines

from lit_distill.core.errors import UsageError
from lit_distill.llm.data import TextDataModule
from lit_distill.llm.fused import label_logprobs
from lit_distill.llm.losses import reverse_kl
from lit_distill.llm.methods.minillm import MiniLLM
from lit_distill.llm.mixed import TeacherMixed
from lit_distill.llm.policy import (
    clipped_policy,
    discounted_returns,
    importance_weights,
    log_ratio_rewards,
    whiten,
)
from lit_distill.llm.rollouts import prompts_of

PLAIN = {
    "reward_scaling": 1.0,
    "reward_clip": None,
    "discount": 1.0,
    "length_normalized": False,
    "whitened": False,
    "ratio_clip": None,
    "single_step": "none",
    "ppo_epochs": 1,
}


# ---- rewards, returns, weights -------------------------------------------------------------------------------------


def test_rewards_are_scaled_and_clipped_log_ratios():
    own, said = torch.tensor([-1.0, -3.0, -200.0]), torch.tensor([-2.0, -0.5, -1.0])
    assert log_ratio_rewards(own, said).tolist() == [-2.0, 5.0, 100.0]
    assert log_ratio_rewards(said, own, clip=None).tolist() == [2.0, -5.0, -398.0]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_returns_are_sums_over_what_is_left(own, normalized, discount):
    torch.manual_seed(0)
    lengths = [5, 1, 3]
    rewards = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    found = discounted_returns(rewards, mask, discount=discount, own=own, length_normalized=normalized)
    for row, length in enumerate(lengths):
        for place in range(5):
            parts = [discount ** (k - place) * float(rewards[row, k]) for k in range(place + (0 if own else 1), length)]
            wanted = sum(parts) / (max(len(parts), 1) if normalized else 1) if place < length else 0.0
            assert float(found[row, place]) == pytest.approx(wanted, abs=1e-12)


def test_whitening_is_over_all_processes():
    values = torch.tensor([1.0, 2.0, 6.0, 7.0])
    whole = whiten(values)
    torch.testing.assert_close(whole, (values - 4) / values.std(correction=0))
    first, other = values[:3], values[3:]
    sums = iter([len(other), other.sum(), (other - 4).square().sum()])  # what the other process has
    torch.testing.assert_close(whiten(first, add=lambda tensor: tensor + next(sums)), whole[:3])
    assert whiten(torch.full((3,), 5.0)).tolist() == [0.0, 0.0, 0.0]


def test_weights_undo_the_mixture():
    own, said = torch.tensor([0.5, 0.001, 0.3]), torch.tensor([0.1, 0.9, 0.3])
    found = importance_weights(own.log(), said.log(), teacher_share=0.2)
    torch.testing.assert_close(found, own / (0.8 * own + 0.2 * said))
    assert importance_weights(own.log(), said.log(), teacher_share=0.0).tolist() == [1.0, 1.0, 1.0]


# ---- the clipped objective -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "moves"),
    [
        (2.0, 1.1, -2.2, True),
        (2.0, 1.5, -2.4, False),  # good, and followed far enough
        (2.0, 0.5, -1.0, True),
        (-2.0, 0.5, 1.6, False),  # bad, and left far enough
        (-2.0, 1.5, 3.0, True),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_the_objective_stops_where_the_ratio_has_gone_far_enough(advantage, ratio, value, moves, weight):
    logits = torch.tensor([[0.3, -0.2, 1.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1])
    logprob = logits.detach().log_softmax(1)[0, 1]
    old = logprob - torch.tensor([ratio / weight], dtype=torch.float64).log()  # the weight is inside of the clip
    extra = [torch.tensor([x], dtype=torch.float64) for x in (advantage, weight)]
    found = clipped_policy(logits, label, old, *extra, clip=0.2)
    assert found.item() == pytest.approx(value)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    free = clipped_policy(logits, label, old, *extra, clip=None)
    assert free.item() == pytest.approx(-advantage * ratio)
    onehot = F.one_hot(label, 3)
    expected = -advantage * ratio * (onehot - logits.detach().softmax(1)) if moves else torch.zeros(1, 3)
    torch.testing.assert_close(gradient, expected.double())


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_for_texts_of_one_token_the_gradient_is_that_of_reverse_kl(share):
    torch.manual_seed(0)
    logits = torch.randn(1, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 11, dtype=torch.float64)
    q, p = logits.detach().log_softmax(1)[0], teacher.log_softmax(1)[0]
    advantages = discounted_returns(log_ratio_rewards(q, p, scaling=1.0)[:, None], torch.ones(11, 1, dtype=torch.bool))[
        :, 0
    ]
    weights = importance_weights(q, p, teacher_share=share)
    chance = (1 - share) * q.exp() + share * p.exp()
    found = clipped_policy(logits.expand(11, -1), torch.arange(11), q, advantages, weights, clip=None)
    (gradient,) = torch.autograd.grad((chance * found).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(reverse_kl(logits, teacher).sum(), logits)
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("single_step", ["none", "instead", "added"])
def test_the_expected_gradient_is_that_of_the_kl_of_whole_texts(single_step):
    """Texts of three of four tokens, all of them enumerated; a table of logits for each beginning."""
    torch.manual_seed(0)
    size, length = 4, 3
    starts = [start for n in range(length) for start in itertools.product(range(size), repeat=n)]
    table = torch.randn(len(starts), size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(len(starts), size, dtype=torch.float64)
    texts = list(itertools.product(range(size), repeat=length))
    rows = torch.tensor([[starts.index(text[:place]) for place in range(length)] for text in texts])
    labels = torch.tensor(texts)

    def logprobs(logits):
        return logits.log_softmax(1)[rows].gather(2, labels[..., None])[..., 0]

    q, p = logprobs(table), logprobs(teacher)
    chance = q.sum(1).exp()
    sequence_kl = (chance * (q - p).sum(1)).sum()
    single = (chance.detach()[:, None] * reverse_kl(table, teacher)[rows]).sum()
    wanted = sequence_kl + single if single_step == "added" else sequence_kl
    (wanted,) = torch.autograd.grad(wanted, table, retain_graph=True)

    old = q.detach()
    advantages = discounted_returns(
        log_ratio_rewards(old.flatten(), p.flatten(), scaling=1.0, clip=None).detach().view_as(old),
        torch.ones(len(texts), length, dtype=torch.bool),
        discount=1.0,
        own=single_step != "instead",
        length_normalized=False,
    )
    flat = [x.flatten() for x in (labels, old, advantages, torch.ones_like(old))]
    policy = clipped_policy(table[rows].flatten(0, 1), *flat, clip=None).reshape(len(texts), length)
    loss = (chance.detach()[:, None] * policy).sum() + (single if single_step != "none" else 0.0)
    (found,) = torch.autograd.grad(loss, table)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_log_probabilities_of_tokens_are_made_in_slices(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(30, 6), torch.randn(11, 6), torch.randint(11, (30,))
    monkeypatch.setattr("lit_distill.llm.fused.SLICE_BYTES", 4 * 11 * 7)
    wanted = (hidden @ weight.T).log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(label_logprobs(hidden, weight, labels), wanted)
    assert label_logprobs(hidden[:0], weight, labels[:0]).shape == (0,)


# ---- writing together ----------------------------------------------------------------------------------------------


class Standing:
    """What a rollout wants of a module that does not train."""

    device = torch.device("cpu")

    def __init__(self, student, teacher, tmp_path, vocab_size=VOCABULARY):
        self.student, self.teacher, self.vocab_size = student, teacher, vocab_size
        self.trainer = trainer(tmp_path)


def log_q(network, tokens):
    return network.network(torch.tensor([tokens])).logits[0, -1, :VOCABULARY].log_softmax(0)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_each_token_is_drawn_from_the_mixture(share, tmp_path):
    student, teacher = language_model(0, vocab_size=VOCABULARY + 3), language_model(1, vocab_size=VOCABULARY + 5)
    prompts, drawn_from, generate = [prompt for prompt, _ in pairs(8)], [], student.generate
    assert len({len(prompt) for prompt in prompts}) > 2  # so most are padded on the left

    def recorded(given, *, adjust, **options):
        def watched(tokens, logits):
            drawn_from.append(adjust(tokens, logits).softmax(1))
            return drawn_from[-1].log()

        return generate(given, adjust=watched, **options)

    student.generate = recorded
    torch.manual_seed(0)
    batch = token_batch([(prompt, [3]) for prompt in prompts])
    written = TeacherMixed(share, max_new_tokens=6)(batch, Standing(student, teacher, tmp_path))
    lengths = torch.bincount(written.scored // written.input_ids.shape[1])
    for row, text in enumerate(written.targets.split(lengths.tolist())):
        for place in range(len(text)):
            before = prompts[row] + text[:place].tolist()
            q, p = (log_q(network, before).exp() for network in (student, teacher))
            found = drawn_from[place][row]
            torch.testing.assert_close(found[:VOCABULARY], (1 - share) * q + share * p, rtol=1e-4, atol=1e-6)
            assert found[VOCABULARY:].tolist() == [0.0] * 3
    assert len(written.targets) > 30


def test_padding_that_is_the_end_of_text_is_not_scored(tmp_path):
    """The token of ending pads prompts and rows, stands in prompts, and is scored once: where a text ends."""
    student, teacher = language_model(0, pad_token_id=2), language_model(1, pad_token_id=2)
    with torch.no_grad():
        for network in (student, teacher):
            network.network.get_output_embeddings().weight.mul_(0.1)
    batch = token_batch([([2, 2, 5], [3]), ([4], [3]), ([2], [3, 7])] * 8)
    module = MiniLLM(student, teacher, rollout=TeacherMixed(0.5, max_new_tokens=6))
    seen = []
    module.advantages = lambda own, said, batch: seen.append(batch) or own
    trainer(tmp_path, max_steps=1).fit(module, Given([batch]))
    (written,) = seen
    assert prompts_of(written) == prompts_of(batch)
    lengths = torch.bincount(written.scored // written.input_ids.shape[1])
    texts = [part.tolist() for part in written.targets.split(lengths.tolist())]
    assert all(2 not in text[:-1] for text in texts)
    short = [text for text in texts if len(text) < 6]
    assert short
    assert all(text[-1] == 2 for text in short)


# ---- the method ----------------------------------------------------------------------------------------------------


class Given(Pairs):
    """Batches as they are given."""

    def __init__(self, batches):
        super().__init__()
        self.given = batches

    def train_dataloader(self):
        return Batches(self.given)


class Fixed(TeacherMixed):
    """Has written some texts already."""

    def __init__(self, written, share=0.0):
        super().__init__(share)
        self.written = written

    def __call__(self, batch, module):
        return self.written


class Recorded(TeacherMixed):
    """Keeps what was written last."""

    def __call__(self, batch, module):
        self.last = super().__call__(batch, module)
        return self.last


def logprobs_of(network, rows):
    """Logits and log-probabilities of completions, one row at a time, without padding."""
    found = []
    for prompt, completion in rows:
        logits = network.network(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append((logits, logits.log_softmax(1).gather(1, torch.tensor(completion)[:, None])[:, 0]))
    return found


def by_hand(student, teacher, rows, share, epochs, steps_of, single_step="added"):
    """The published loop, text by text; `steps_of` names the rows of each step of an epoch."""
    optimizer = sgd(student.parameters())
    with torch.no_grad():
        old, said = ([own for _, own in logprobs_of(network, rows)] for network in (student, teacher))
        said_logits = [logits for logits, _ in logprobs_of(teacher, rows)]
    rewards = [((p - q) / 0.5).clamp(-100, 100) for p, q in zip(said, old, strict=True)]
    returns = []
    for reward in rewards:
        for place in range(len(reward)):
            left = reward[place:]
            total = sum(0.95**ahead * float(value) for ahead, value in enumerate(left))
            returns.append(total / len(left))
    returns = torch.tensor(returns)
    advantages = ((returns - returns.mean()) / returns.std(correction=0)).split([len(reward) for reward in rewards])
    losses = []
    for epoch in range(epochs):
        for chosen in steps_of(epoch):
            count = sum(len(rewards[row]) for row in chosen)
            policy, single = 0.0, 0.0
            for row, (logits, own) in zip(chosen, logprobs_of(student, [rows[row] for row in chosen]), strict=True):
                weight = old[row].exp() / ((1 - share) * old[row].exp() + share * said[row].exp())
                ratio = own.exp() / old[row].exp() * weight
                low = torch.where(ratio < 0.8, 0.8, torch.where(ratio > 1.2, 1.2, ratio))
                policy = policy + torch.maximum(-advantages[row] * ratio, -advantages[row] * low).sum() / count
                q, p = logits.log_softmax(1), said_logits[row].log_softmax(1)
                single = single + (q.exp() * (q - p)).sum() / count
            optimizer.zero_grad()
            (policy + (single if single_step == "added" else 0.0)).backward()
            optimizer.step()
            losses.append((float(policy), float(single)))
    return torch.tensor(losses).mean(0)


@pytest.mark.parametrize("single_step", ["added", "none"])
def test_a_batch_is_the_published_loop(single_step, tmp_path):
    student, teacher = language_model(0), language_model(1, hidden_size=24, num_attention_heads=3)
    rows = [*pairs(5, seed=3), ([4], [7, 2])]
    copied = copy.deepcopy(student)
    policy, single = by_hand(copied, teacher, rows, 0.2, 3, lambda _: [range(len(rows))], single_step)
    module = MiniLLM(
        student, teacher, Fixed(token_batch(rows), 0.2), ppo_epochs=3, single_step=single_step, optimizer=sgd
    )
    trainer(tmp_path, max_steps=3).fit(module, Given([token_batch(rows)]))
    assert float(module.terms["policy"]) == pytest.approx(float(policy), rel=1e-4, abs=1e-5)
    if single_step == "added":
        assert float(module.terms["single_step"]) == pytest.approx(float(single), rel=1e-4)
    moved = dict(student.named_parameters())
    for key, parameter in copied.named_parameters():
        torch.testing.assert_close(moved[key], parameter, rtol=1e-4, atol=1e-5)


def test_minibatches_are_shares_of_the_texts_with_the_same_advantages(tmp_path):
    student, teacher = language_model(0), language_model(1)
    rows = pairs(7, seed=4)
    copied, chosen = copy.deepcopy(student), []

    class Watched(MiniLLM):
        def parts(self, experience):
            for part in super().parts(experience):
                chosen.append(part.batch.index.tolist())
                yield part

    module = Watched(student, teacher, Fixed(token_batch(rows)), ppo_epochs=2, minibatches=3, optimizer=sgd)
    trainer(tmp_path, max_steps=6).fit(module, Given([token_batch(rows)]))
    assert [sorted(itertools.chain(*chosen[:3])), sorted(itertools.chain(*chosen[3:]))] == [list(range(7))] * 2
    assert chosen[:3] != chosen[3:]
    by_hand(copied, teacher, rows, 0.0, 2, lambda epoch: chosen[3 * epoch : 3 * epoch + 3])
    moved = dict(student.named_parameters())
    for key, parameter in copied.named_parameters():
        torch.testing.assert_close(moved[key], parameter, rtol=1e-4, atol=1e-5)


def test_without_its_devices_and_discount_0_it_is_the_sampled_reverse_kl(tmp_path):
    student, teacher = language_model(0), language_model(1)
    copied, rollout = copy.deepcopy(student), Recorded(0.0, max_new_tokens=5)
    module = MiniLLM(student, teacher, rollout, **(PLAIN | {"discount": 0.0}), optimizer=sgd)
    trainer(tmp_path, max_steps=1).fit(module, Pairs())
    length = rollout.last.input_ids.shape[1]
    lengths = torch.bincount(rollout.last.scored // length).tolist()
    rows = [
        (prompt, part.tolist())
        for prompt, part in zip(prompts_of(rollout.last), rollout.last.targets.split(lengths), strict=True)
    ]
    q = torch.cat([own for _, own in logprobs_of(copied, rows)])
    p = torch.cat([own for _, own in logprobs_of(teacher, rows)])
    ((q - p).detach() * q).mean().backward()
    moved = dict(student.named_parameters())
    for key, parameter in copied.named_parameters():
        torch.testing.assert_close(moved[key], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_teacher_stays_as_it_is_and_an_early_end_is_kept(tmp_path):
    student, teacher = language_model(0), language_model(1)
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    module = MiniLLM(student, teacher, TeacherMixed(0.2, max_new_tokens=4))
    runner = trainer(tmp_path, max_steps=6)
    runner.fit(module, Pairs())
    assert runner.global_step == 6  # in the middle of the second batch's four passes
    assert module.iteration == 2
    assert all(not torch.equal(value, before[0][key]) for key, value in student.state_dict().items())
    assert all(torch.equal(value, before[1][key]) for key, value in teacher.state_dict().items())


# ---- plain text ----------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    """Makes a data module of small texts."""
    folder = tokenizer_folder(tmp_path / "tokenizer")
    file = write_lines(tmp_path / "text.jsonl", [{"text": line} for line in TEXTS])

    def make(**options):
        given = {"max_length": 24, "packing": "none", "batch_size": 4, "seed": 0}
        return TextDataModule(folder, file, **(given | options))

    return make


def networks(size):
    return language_model(0, vocab_size=size), language_model(1, vocab_size=size)


def test_plain_text_is_learned_half_by_labels_and_half_from_the_teacher(text, tmp_path):
    data, corpus = text(given=4), text(seed=5)
    student, teacher = networks(data.vocab_size)
    copied = copy.deepcopy(student)
    other = text(seed=5)
    other.setup()
    batch = next(iter(other.train_dataloader()))
    logits = [network.network(batch.input_ids).logits.flatten(0, 1)[batch.scored] for network in (copied, teacher)]
    q, p = (x.log_softmax(1) for x in (logits[0], logits[1].detach()))
    (2.0 * (0.75 * F.nll_loss(q, batch.targets) + 0.25 * -(p.exp() * q).sum(1).mean())).backward()
    module = MiniLLM(
        student,
        teacher,
        TeacherMixed(0.2, max_new_tokens=3),
        ppo_epochs=1,
        corpus=corpus,
        corpus_weight=2.0,
        corpus_teacher_share=0.25,
        teacher_weight=1e-12,
        optimizer=sgd,
    )
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert float(module.terms["corpus_ce"]) == pytest.approx(1.5 * float(F.nll_loss(q, batch.targets)), rel=1e-4)
    kl = (p.exp() * (p - q)).sum(1).mean()
    assert float(module.terms["corpus_kl"]) == pytest.approx(0.5 * float(kl), rel=1e-4)
    moved = dict(student.named_parameters())
    for key, parameter in copied.named_parameters():
        torch.testing.assert_close(moved[key], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(text, tmp_path):
    def run(**options):
        data = text(given=4, train_size=12)
        module = MiniLLM(
            *networks(data.vocab_size),
            TeacherMixed(0.2, max_new_tokens=3),
            ppo_epochs=2,
            minibatches=2,
            corpus=text(train_size=20),
        )
        runner = trainer(tmp_path, max_steps=12, **options)
        return module, runner, data

    class Midway(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:  # inside of the first epoch, and of the corpus's second
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, runner, data = run(callbacks=[Midway()])
    runner.fit(whole, data)
    second, runner, data = run()
    runner.fit(second, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert runner.global_step == 12
    for one, other in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)


def test_a_corpus_of_other_tokens_is_refused(text, tmp_path):
    data = text(given=4)
    other = TextDataModule(tokenizer_folder(tmp_path / "other", corpus=TEXTS[:3]), data.source, max_length=24)
    module = MiniLLM(*networks(data.vocab_size), corpus=other)
    with pytest.raises(UsageError, match=r"model.corpus.tokenizer: its tokens are not those of data"):
        trainer(tmp_path).fit(module, data)
    module = MiniLLM(*networks(data.vocab_size), corpus=text(restrict_vocabulary=True))
    with pytest.raises(UsageError, match=r"model.corpus.restrict_vocabulary: its tokens are not those of data"):
        trainer(tmp_path).fit(module, data)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_said(tmp_path):
    for options, said in (
        ({"teacher_weight": 0.0}, r"model.teacher_weight is 0.0, so the teacher would be silent"),
        ({"label_weight": 1.0}, r"model.label_weight is 1.0.*give model.corpus"),
        ({"ppo_epochs": 0}, r"model.ppo_epochs is 0; give 1 or more"),
        ({"minibatches": 0}, r"model.minibatches is 0; give 1 or more"),
        ({"reward_clip": 0.0}, r"model.reward_clip is 0.0; it must be above 0, or null"),
        ({"ratio_clip": -1.0}, r"model.ratio_clip is -1.0; it must be above 0, or null"),
        ({"reward_scaling": 0.0}, r"model.reward_scaling is 0.0"),
        ({"discount": 1.5}, r"model.discount is 1.5; give 0 to 1"),
        ({"corpus_weight": 0.0}, r"model.corpus_weight is 0.0.*leave model.corpus out"),
        ({"corpus_teacher_share": 2.0}, r"model.corpus_teacher_share is 2.0; give 0 to 1"),
    ):
        with pytest.raises(UsageError, match=said):
            MiniLLM(language_model(0), language_model(1), **options)
    with pytest.raises(UsageError, match=r"rollout.share is 1.0; give the teacher's share"):
        TeacherMixed(1.0)
    module = MiniLLM(language_model(0), language_model(1), TeacherMixed(0.2, max_new_tokens=2), minibatches=5)
    with pytest.raises(UsageError, match=r"model.minibatches is 5, but a batch has 4 rows"):
        trainer(tmp_path).fit(module, Pairs())
    far = MiniLLM(language_model(0, max_position_embeddings=99), language_model(1), TeacherMixed(0.2, 62))
    with pytest.raises(UsageError, match=r"rollout.max_new_tokens: .* more than the context of 64"):
        trainer(tmp_path).fit(far, Pairs())
