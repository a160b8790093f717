"""Whole methods and networks in two processes on the CPU (gloo) against one: the same losses, the same weights."""

import pytest
import torch
import torch.nn.functional as F
from test_network import TIED, drawn, gradients, greedy_without_cache
from tiny_language import language_model
from tiny_text import TEXTS, tokenizer_folder, write_lines
from two_processes import CASES, NETWORKS, REFUSED, fit, launch

from lit_distill.llm.network import CausalLM


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def answers(tokens, folder):
    base = CausalLM(f"{folder}/network").materialize().eval()
    return [greedy_without_cache(base, row[:3].tolist(), 6) for row in tokens]


@pytest.fixture(scope="module")
def end(answers):
    """A token that ends one answer before the other."""
    return next(token for token in answers[0][:3] if token not in answers[1][:4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files that both sides start from."""
    folder = tmp_path_factory.mktemp("processes")
    tasks = [{"demonstrations": TEXTS[k : k + 2], "input": TEXTS[k], "output": "yes " * (k % 3 + 1)} for k in range(30)]
    for side in (folder / "one", folder / "two"):
        tokenizer_folder(side / "tokenizer")
        tokenizer_folder(side / "other", corpus=TEXTS[:5])
        write_lines(side / "texts.jsonl", [{"text": text} for text in TEXTS])
        write_lines(side / "tasks.jsonl", tasks)
        language_model(0, vocab_size=120).save_pretrained(side / "base")
    torch.manual_seed(0)
    drawn(TIED).save_pretrained(folder / "network")
    return folder


@pytest.fixture(scope="module")
def two(folder, tokens, end):
    """What two processes find, launched once for all."""
    torch.save(tokens, folder / "tokens.pt")
    torch.save(end, folder / "end.pt")
    return launch(folder)


@pytest.mark.parametrize("name", CASES)
def test_methods_do_the_same(name, folder, two):
    alone, found = fit(name, folder / "one"), two[name]
    assert found["moved"] == pytest.approx(alone["moved"], rel=1e-4)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    # What is kept on disk is the same, and so are fingerprints of teachers whose weights are sharded afterwards.
    assert found["text"] == alone["text"]
    assert found["tested"] == pytest.approx(alone["tested"], rel=1e-4)
    assert found["state"].keys() == alone["state"].keys()
    for key, value in alone["state"].items():
        torch.testing.assert_close(found["state"][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_writes_on_whole_weights_alone_is_refused_in_one_line(name, two):
    said = two["refused"][name]
    assert said.startswith("rollout")
    assert "on whole weights" in said
    assert "; train with --trainer.strategy ddp, or " in said
    assert "\n" not in said


@pytest.mark.parametrize("name", NETWORKS)
def test_sharded_networks_are_whole_where_they_run(name, folder, two, tokens, answers, end):
    targets, scored = tokens[:, 1:].flatten(), torch.arange(18).view(2, 9)[:, :8].flatten()
    found = two["networks"][name]
    torch.manual_seed(0)
    network = CausalLM(f"{folder}/network", **NETWORKS[name]).materialize()
    loss = network(tokens, None, scored, lambda h, w: F.cross_entropy(F.linear(h, w), targets, reduction="sum"))
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-4)
    expected = gradients(network)
    assert found["gradients"].keys() == expected.keys()
    for key, gradient in found["gradients"].items():
        assert torch.allclose(2 * gradient, expected[key], atol=1e-4), key  # the mean over processes
    assert found["state"].keys() == network.state_dict().keys()
    assert found["answers"] == [row[: row.index(end) + 1] if end in row else row for row in answers]
