"""`export --format hf`: a folder that the transformers library loads by itself."""

import json

import pytest
import torch
import yaml

from lit_distill.core.errors import UsageError
from lit_distill.experiment.export import export, save_student
from lit_distill.llm.network import CausalLM

CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.4,
    "tie_word_embeddings": True,
}
TOKENS = torch.tensor([[3, 5, 8, 1, 2]])


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<end>", *"abcdefghijklmnopqrstuvw"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def write(tmp_path):
    """Writes a run folder with what export reads of it."""

    def run(network, arguments, *, data=None, teacher=None):
        spec = {"class_path": "lit_distill.llm.network.CausalLM", "init_args": arguments}
        save_student(network.state_dict(), spec, tmp_path / "run" / "student")
        model = {"class_path": "some.Method", "init_args": {"student": spec, "teacher": teacher}}
        config = {"model": model, "data": {"class_path": "some.Data", "init_args": data or {}}}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        return str(tmp_path / "run")

    return run


def test_the_library_loads_the_folder_and_says_the_same(tmp_path, tokenizer, write):
    from transformers import AutoModelForCausalLM, pipeline

    network = CausalLM(config=CONFIG).materialize().eval()
    run = write(network, {"config": CONFIG}, data={"tokenizer": tokenizer})
    export(run, str(tmp_path / "out"), "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(TOKENS).logits, network.network(TOKENS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    speak = pipeline("text-generation", str(tmp_path / "out"))
    (answer,) = speak("c e h", max_new_tokens=3, do_sample=False, return_full_text=False)
    expected, _ = network.generate([[3, 5, 8]], max_new_tokens=3, greedy=True, eos=[])
    assert answer["generated_text"].split() == speak.tokenizer.convert_ids_to_tokens(expected[0].tolist())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "tokenizer"]


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_the_tokenizer_is_that_of_the_network_a_run_names(tmp_path, tokenizer, write, where):
    network = CausalLM(config=CONFIG).materialize()
    network.save_pretrained(tokenizer)
    named = {"class_path": "lit_distill.llm.network.CausalLM", "init_args": {"name": tokenizer}}
    wrapped = {"class_path": "lit_distill.core.pretrained", "init_args": {"weights": "w.pt", "network": named}}
    own = {"name": tokenizer} if where == "student" else {"config": CONFIG}
    export(write(network, own, teacher=wrapped if where == "teacher" else None), str(tmp_path / "out"), "hf")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "options", [{"lora": {"r": 2, "target_modules": ["q_proj"]}}, {"layers": [0, 2]}], ids=["adapters", "fewer layers"]
)
def test_students_that_are_not_as_their_base_speak_too(tmp_path, tokenizer, write, options):
    from transformers import AutoModelForCausalLM, pipeline

    CausalLM(config=CONFIG | {"num_hidden_layers": 3}).materialize().save_pretrained(tokenizer)
    arguments = {"name": tokenizer} | options
    network = CausalLM(**arguments).materialize().eval()
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    base = AutoModelForCausalLM.from_pretrained(tokenizer)
    export(write(network, arguments), str(tmp_path / "out"), "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits = network.network(TOKENS).logits
    assert not torch.allclose(base(TOKENS).logits, logits, atol=1e-2)
    torch.testing.assert_close(loaded(TOKENS).logits, logits, atol=1e-5, rtol=1e-5)
    speak = pipeline("text-generation", str(tmp_path / "out"))
    (answer,) = speak("c e h", max_new_tokens=3, do_sample=False, return_full_text=False)
    expected, _ = network.generate([[3, 5, 8]], max_new_tokens=3, greedy=True, eos=[])
    assert answer["generated_text"].split() == speak.tokenizer.convert_ids_to_tokens(expected[0].tolist())


def test_a_part_of_the_vocabulary_goes_without_tokenizer(tmp_path, tokenizer, write, capsys):
    from transformers import AutoModelForCausalLM

    network = CausalLM(config=CONFIG, vocabulary=[4, 2, 9]).materialize().eval()
    export(write(network, {"config": CONFIG}, data={"tokenizer": tokenizer}), str(tmp_path / "out"), "hf")
    assert "vocabulary.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "vocabulary.json").read_text()) == [4, 2, 9]
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(TOKENS % 3).logits, network.network(TOKENS % 3).logits)


def test_what_is_missing_is_said(tmp_path, write, capsys):
    network = CausalLM(config=CONFIG).materialize()
    with pytest.raises(UsageError, match=r"--format hf: the tokenizer .*gone.* is not on this machine"):
        export(
            write(network, {"config": CONFIG}, data={"tokenizer": str(tmp_path / "gone")}), str(tmp_path / "out"), "hf"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    export(write(network, {"config": CONFIG}), str(tmp_path / "out"), "hf")
    assert "names no tokenizer" in capsys.readouterr().out
    spec = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 1}}
    save_student(torch.nn.Linear(2, 1).state_dict(), spec, tmp_path / "other" / "student")
    with pytest.raises(UsageError, match=r"the student of .*other is a Linear, which the transformers library"):
        export(str(tmp_path / "other"), str(tmp_path / "new"), "hf")
