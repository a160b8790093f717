"""`export --format hf`: a folder that the transformers library loads by itself."""

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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}], ids=["weights", "adapters"])
def test_a_student_of_a_part_of_the_vocabulary_speaks_the_tokenizers_numbers(
    tmp_path, tokenizer, write, capsys, tied, lora
):
    from transformers import AutoModelForCausalLM, pipeline

    kept, prompt = torch.tensor([0, 2, 3, 5, 8, 9, 13]), torch.tensor([[2, 3, 4]])  # c e h
    config = CONFIG | {"tie_word_embeddings": tied, "eos_token_id": 0}
    arguments = {"config": config}
    if lora:
        CausalLM(config=config).materialize().save_pretrained(tokenizer)
        arguments = {"name": tokenizer, "lora": lora | {"init_lora_weights": False}}
    network = CausalLM(**arguments, vocabulary=kept.tolist()).materialize().eval()
    rows = network.network.get_input_embeddings().weight
    run = write(network, arguments, data={"tokenizer": tokenizer})
    export(run, str(tmp_path / "out"), "hf")
    assert "the student knows 7 tokens" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert (loaded.config.vocab_size, loaded.config.eos_token_id) == (24, 0)
    logits = loaded(kept[prompt]).logits
    torch.testing.assert_close(logits[..., kept], network.network(prompt).logits, atol=1e-6, rtol=1e-6)
    others = [token for token in range(24) if token not in kept]
    assert not logits[..., others].any()
    # Other tokens in a prompt are an embedding of 0.
    embedded = torch.stack([rows[2], torch.zeros_like(rows[2]), rows[4]])[None]
    expected = network.network(inputs_embeds=embedded).logits
    torch.testing.assert_close(loaded(torch.tensor([[3, 20, 8]])).logits[..., kept], expected, atol=1e-6, rtol=1e-6)

    speak = pipeline("text-generation", str(tmp_path / "out"))
    (answer,) = speak("c e h", max_new_tokens=9, do_sample=False, return_full_text=False)
    answered, _ = network.generate(prompt.tolist(), max_new_tokens=9, greedy=True)
    words = speak.tokenizer.convert_ids_to_tokens(kept[answered[0]].tolist())
    assert answer["generated_text"].split() == [word for word in words if word != "<end>"]
    answers = speak(["c w h"] * 20, max_new_tokens=9, do_sample=True, temperature=5.0, return_full_text=False)
    written = {word for (one,) in answers for word in one["generated_text"].split()}
    assert written <= set(speak.tokenizer.convert_ids_to_tokens(kept.tolist()))


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
