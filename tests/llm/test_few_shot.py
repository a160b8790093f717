import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_language import language_model, trainer
from tiny_text import tokenizer_folder, write_lines

from lit_distill.core.errors import UsageError
from lit_distill.llm.data import TextTask
from lit_distill.llm.few_shot import FewShotTasks
from lit_distill.llm.methods.mend import MEND
from lit_distill.llm.options import OptionAccuracy, row_means

WORDS = {
    "songs": ("sang a song", "ate", "slept"),
    "places": ("mat", "roof of the house", "red sofa", "house", "sofa"),
    "animals": ("cat", "very small mouse"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("tasks"), {}
    for name, words in WORDS.items():
        rows = [
            {"text": f"{name} {k}{' and' * (k % 3)}", "label": words[k % len(words)].replace(" ", "_")}
            for k in range(30)
        ]
        found[name] = TextTask(write_lines(folder / f"{name}.jsonl", rows))
    return found


@pytest.fixture
def few(tokenizer, tasks):
    def build(**options):
        given = {"val_tasks": ["animals"], "test_tasks": ["places"], "shots": 5, "ways": 3, "questions": 8}
        given |= {"eval_questions": 6, "max_length": 120, "batch_size": 2, "eval_batch_size": 4}
        return FewShotTasks(tokenizer, tasks, **(given | options))

    return build


def rows_of(data, part):
    """Demonstrations, query, question and whether it is right, of each row, as text."""
    loader = {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[part]()
    for batch in loader:
        width = batch.queries.shape[1]
        for row in range(len(batch)):
            count = int((batch.scored // width == row).sum())
            shown = data.decode(batch.demonstrations[row, -int(batch.lengths[row]) :].tolist())
            query = data.decode(batch.queries[row, :count].tolist())
            labels = batch.labels[batch.scored // width == row]
            answer = data.decode(labels[labels >= 0].tolist())
            yield shown, query, answer, int(batch.question[row]), bool(batch.right[row])


@pytest.mark.parametrize(("part", "name"), [("train", "songs"), ("val", "animals"), ("test", "places")])
def test_questions_are_drawn_as_they_should_be(few, part, name):
    data, by_question = few(), {}
    truth = {f"{name} {k}{' and' * (k % 3)}": WORDS[name][k % len(WORDS[name])] for k in range(30)}
    for shown, query, answer, question, right in rows_of(data, part):
        demonstrations = [tuple(text.split("\n")) for text in shown.removesuffix("\n\n\n").split("\n\n\n")]
        assert len(demonstrations) == len(set(demonstrations)) == 5
        assert all(truth[text] == word for text, word in demonstrations)
        text, given = query.split("\n")
        assert given == answer  # and no end of text behind it
        assert text not in dict(demonstrations)
        assert right == (truth[text] == answer)
        drawn = [word for _, word in demonstrations]
        assert max(map(drawn.count, set(drawn))) - min(map(drawn.count, set(drawn))) <= 1
        by_question.setdefault(question, []).append((shown, text, answer, right, set(drawn)))
    if part == "train":
        assert len(by_question) == 8
        assert all(len(rows) == 1 and rows[0][3] for rows in by_question.values())
        return
    assert len(by_question) == 6
    for rows in by_question.values():
        options = {answer for _, _, answer, _, _ in rows}
        assert len({(shown, text) for shown, text, *_ in rows}) == 1
        assert options == rows[0][4]
        assert len(options) == len(rows) == min(3, len(WORDS[name]))
        assert sum(right for *_, right, _ in rows) == 1
    assert len({frozenset(rows[0][4]) for rows in by_question.values()}) == 1 or name == "places"


def test_all_seeds_see_the_same_questions(few):
    same, other = (sorted(rows_of(few(seed=seed, split_seed=0), "test")) for seed in (0, 1))
    assert same == other
    assert same != sorted(rows_of(few(split_seed=1), "test"))


def test_a_question_is_left_out_whole(few, tokenizer):
    data = few(max_length=16)  # too short for "roof of the house" behind some texts, not for the other options
    data.setup()
    counts = {}
    for *_, question, _ in rows_of(data, "test"):
        counts[question] = counts.get(question, 0) + 1
    assert set(counts.values()) == {3}
    assert 0 < len(counts) < 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"val_tasks": ["cars"]}, r"data.val_tasks: cars is none of the tasks; give some of songs, places, animals"),
        ({"val_tasks": ["places"]}, r"data.test_tasks: places is among the val_tasks too"),
        ({"test_tasks": ["songs", "places"]}, r"data.tasks: all of them are for validation or testing"),
        ({"ways": 1}, r"data.ways is 1; give 2 or more"),
        ({"train_size": 4}, r"data.train_size: 4 questions are asked for by data.questions"),
    ],
)
def test_settings_that_cannot_be(few, options, text):
    with pytest.raises(UsageError, match=text):
        few(**options)


def test_a_task_with_too_few_texts_is_named(few):
    with pytest.raises(
        UsageError, match=r"data.tasks.songs: there are only 10 texts of 'sang a song', and 30 demonstrations"
    ):
        few(shots=30).setup()


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_row_means_are_of_what_counts():
    values = torch.tensor([1.0, 5.0, 2.0, 4.0, 9.0])
    found = row_means(values, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, False, True, True, False]), 3)
    assert found.tolist() == [1.0, 3.0, 0.0]


def test_the_option_of_least_loss_is_chosen_across_batches():
    metric = OptionAccuracy()
    metric.update(torch.tensor([3.0, 1.0, 0.5]), torch.tensor([7, 7, 2]), torch.tensor([False, True, False]))
    metric.update(torch.tensor([0.7, 1.0, 1.0]), torch.tensor([2, 9, 9]), torch.tensor([True, True, False]))
    assert float(metric.compute()) == pytest.approx((1 + 0 + 0.5) / 3)
    assert metric.has_options()
    metric.reset()
    metric.update(torch.ones(2), torch.tensor([0, 1]), torch.tensor([True, True]))
    assert not metric.has_options()


def network(seed, **sizes):
    return language_model(seed, **({"vocab_size": 128, "max_position_embeddings": 192} | sizes))


@torch.no_grad()
def test_accuracy_is_by_mean_option_loss(few, tmp_path):
    data = few(eval_questions=12)
    module = MEND(network(0), network(1), vectors=3, phase="finetune", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    runner = trainer(tmp_path, max_steps=1)
    with torch.enable_grad():
        runner.fit(module, data)
    (logged,) = runner.test(module, data, verbose=False)
    model, losses, kls, ces, read = module.teacher.network, {}, [], [], []
    for batch in data.test_dataloader():
        width, vectors = batch.queries.shape[1], module.distill(batch)
        for row in range(len(batch)):
            mine = batch.scored // width == row
            query, labels = batch.queries[row, : int(mine.sum())], batch.labels[mine]
            shown = batch.demonstrations[row, -int(batch.lengths[row]) :]
            given = torch.cat([vectors[row], model.get_input_embeddings()(query)])[None]
            asked = (
                model(inputs_embeds=given).logits[0, 3:],
                model(torch.cat([shown, query])[None]).logits[0, len(shown) :],
                model(query[None]).logits[0],
            )
            asked = [x[:, : module.vocab_size] for x in asked]
            loss = [float(F.cross_entropy(x, labels, ignore_index=-100)) for x in asked]
            losses.setdefault(int(batch.question[row]), []).append((loss, bool(batch.right[row])))
            if batch.right[row]:
                kl = F.kl_div(asked[0].log_softmax(-1), asked[1].log_softmax(-1), log_target=True, reduction="none")
                kls.append(kl.sum(-1))
                ces.append(F.cross_entropy(asked[1], labels, ignore_index=-100, reduction="none")[labels >= 0])
                read.append(len(shown) + 3)
    assert len(losses) == 12
    assert all(len(options) == 3 for options in losses.values())
    for place, name in enumerate(("acc", "acc_context", "acc_without")):
        chosen = [min(options, key=lambda option: option[0][place])[1] for options in losses.values()]
        assert logged[f"test/{name}"] == pytest.approx(sum(chosen) / 12), name
    assert 0 < sum(logged[f"test/{name}"] for name in ("acc", "acc_context", "acc_without")) < 3
    assert logged["test/kl"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3)
    assert logged["test/ce_context"] == pytest.approx(float(torch.cat(ces).mean()), rel=1e-3)
    assert logged["test/tokens_distiller"] == pytest.approx(sum(read) / len(read))


def test_fine_tuning_goes_on_from_pretraining(few, tmp_path):
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    first = MEND(network(0), network(1), vectors=3, **still)
    trainer(tmp_path, max_steps=1).fit(first, few())
    (tmp_path / "run/student").mkdir(parents=True)
    state = {name: value.clone() for name, value in first.student.state_dict().items()}
    save_file(state, tmp_path / "run/student/model.safetensors")
    second = MEND(network(2), network(1), vectors=3, phase="finetune", weights=str(tmp_path / "run"), **still)
    trainer(tmp_path, max_steps=1).fit(second, few())
    for name, value in second.student.state_dict().items():
        assert torch.equal(value, state[name]), name
    third = MEND(network(2), network(1), vectors=4, weights=str(tmp_path / "run"), **still)
    with pytest.raises(UsageError, match=r"placeholders has shape \(3, 16\), the network wants \(4, 16\)"):
        trainer(tmp_path, max_steps=1).fit(third, few())
