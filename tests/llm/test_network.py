"""Against the transformers library's own forward, on tiny networks at random."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, linear

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import freeze, pretrained
from lit_distill.core.strategies import _blocks
from lit_distill.experiment.export import save_student
from lit_distill.llm import network as network_module
from lit_distill.llm.network import CausalLM

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "eos_token_id": 2,
}
TIED = {**LLAMA, "tie_word_embeddings": True}
QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 4}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "head_dim": 4, "sliding_window": 8, "pad_token_id": 0}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
FAMILIES = {"llama": LLAMA, "tied": TIED, "qwen2": QWEN2, "qwen3": QWEN3, "gemma3": GEMMA3, "gpt2": GPT2}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}

families = pytest.mark.parametrize("family", FAMILIES)


def drawn(config=LLAMA, **options):
    return CausalLM(config=config, **options).materialize()


@pytest.fixture
def folder(tmp_path):
    """A network on disk, as the library writes it."""
    drawn(TIED).network.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def tokens():
    return torch.randint(3, 61, (2, 9))


def logits_of(network, *inputs):
    return network(*inputs, score=linear)


def loss_of(network, tokens):
    scored = torch.tensor([0, 3, 7, 10, 16])
    targets = torch.roll(tokens, -1, dims=1).flatten()[scored]
    return network(tokens, None, scored, lambda hidden, head: cross_entropy(linear(hidden, head), targets))


def gradients(network):
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


# ---- weights when they are asked for --------------------------------------------------------------------------------


def test_before_it_is_materialized_there_is_nothing():
    network = CausalLM(config=LLAMA)
    assert list(network.parameters()) == []
    assert network.state_dict() == {}
    with pytest.raises(RuntimeError, match="materialize"):
        network(torch.zeros(1, 1, dtype=torch.long))
    inner = network.materialize().network
    assert network.materialize().network is inner
    assert (network.vocab_size, network.hidden_size) == (61, 16)


def test_weights_are_drawn_as_they_are_asked_for():
    first = CausalLM(config=LLAMA)
    torch.manual_seed(5)
    one = first.materialize().state_dict()
    torch.manual_seed(5)
    two = drawn().state_dict()
    other = drawn().state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["network.lm_head.weight"], other["network.lm_head.weight"])


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)]
)
def test_weights_are_of_the_type_asked_for(tmp_path, dtype, expected):
    drawn(dtype="bfloat16").save_pretrained(tmp_path)
    assert CausalLM(str(tmp_path), dtype=dtype).materialize().network.lm_head.weight.dtype == expected


# ---- forward --------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scored_hidden_states_times_head_are_the_networks_logits(family, attention, tokens):
    network = drawn(FAMILIES[family], attention=attention).eval()
    expected = network.network(tokens).logits.flatten(0, 1)
    assert network.network.config._attn_implementation == attention
    assert torch.equal(logits_of(network, tokens), expected)
    assert torch.equal(linear(network(tokens), network.network.get_output_embeddings().weight), expected)
    scored = torch.tensor([1, 8, 9, 17])
    assert torch.allclose(logits_of(network, tokens, None, scored), expected[scored], atol=1e-6)
    assert network(tokens, scored=scored).shape == (4, 16)


@families
def test_documents_in_one_row_do_not_see_each_other(family, tokens):
    network = drawn(FAMILIES[family]).eval()
    lengths = (4, 1, 3, 10)
    documents = torch.randint(3, 61, (18,)).split(lengths)
    # Two rows of nine: the last document is cut in two, as data does it, and the second piece starts at 0 again.
    documents = [*documents[:3], documents[3][:1], documents[3][1:]]
    row = torch.cat(documents).view(2, 9)
    places = torch.cat([torch.arange(len(document)) for document in documents]).view(2, 9)
    expected = torch.cat([logits_of(network, document[None]) for document in documents])
    assert torch.allclose(logits_of(network, row, places), expected, atol=1e-5)
    assert not torch.allclose(logits_of(network, row), expected, atol=1e-2)


def test_what_comes_after_changes_nothing(tokens):
    network = drawn()
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    places = torch.cat([torch.arange(9), torch.arange(4)]).expand(2, -1)
    kept = logits_of(network, padded, places).view(2, 13, -1)[:, :9]
    assert torch.allclose(kept.flatten(0, 1), logits_of(network, tokens), atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tokens):
    network = drawn(gradient_checkpointing=True).train()
    plain = drawn().train()
    plain.load_state_dict(network.state_dict())
    runs = []
    network.network.model.layers[0].self_attn.register_forward_hook(lambda *run: runs.append(1))
    for each in (network, plain):
        loss_of(each, tokens).backward()
    assert len(runs) == 2  # once more in the backward pass
    expected = gradients(plain)
    assert len(expected) == len(list(plain.parameters()))
    assert all(torch.allclose(gradient, expected[name], atol=1e-7) for name, gradient in gradients(network).items())


def test_the_token_of_ending_learns_as_an_input_too_where_it_pads():
    network = drawn({**LLAMA, "pad_token_id": 2})
    network(torch.tensor([[2, 5]])).pow(2).sum().backward()
    assert network.network.model.embed_tokens.weight.grad[2].abs().sum() > 0


# ---- a part of the layers, a part of the vocabulary -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "kept"),
    [(2, [0, 5]), (3, [0, 2, 5]), (4, [0, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5]), ([1, 2, 5], [1, 2, 5])],
)
def test_layers_that_are_kept(tmp_path, tokens, layers, kept):
    whole = drawn({**QWEN2, "num_hidden_layers": 6, "max_window_layers": 3})
    types = list(whole.text_config.layer_types)
    assert len(set(types)) == 2
    whole.save_pretrained(tmp_path / "whole")
    network = CausalLM(str(tmp_path / "whole"), layers=layers).materialize()
    old, new = whole.network.model.layers, network.network.model.layers
    assert len(new) == len(kept) == network.text_config.num_hidden_layers
    assert [torch.equal(new[i].mlp.up_proj.weight, old[j].mlp.up_proj.weight) for i, j in enumerate(kept)] == [
        True
    ] * len(kept)
    assert network.text_config.layer_types == [types[index] for index in kept]
    # The cache has one place for each layer, without gaps; and the library builds the same network anew.
    assert [layer.self_attn.layer_idx for layer in new] == list(range(len(kept)))
    network.save_pretrained(tmp_path / "part")
    again = CausalLM(str(tmp_path / "part")).materialize()
    assert torch.equal(logits_of(again, tokens), logits_of(network, tokens))


@pytest.mark.parametrize("layers", [1, 3, [], [0, 2], [1, 0], [0, 0], [-1]])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(UsageError, match=r"layers is .*; give "):
        drawn(layers=layers)


@families
def test_a_restricted_network_has_the_logits_of_the_tokens_kept(family):
    network = drawn(FAMILIES[family]).eval()
    ids = torch.tensor([40, 2, 7, 33, 5])
    inputs = torch.tensor([[0, 3, 1, 1], [4, 2, 0, 3]])
    expected = logits_of(network, ids[inputs])[:, ids]
    whole = sum(weight.numel() for weight in network.parameters())
    tied = network.network.lm_head.weight is network.network.get_input_embeddings().weight
    network.restrict(ids)
    network.restrict(ids)  # no second time
    assert torch.allclose(logits_of(network, inputs), expected, atol=1e-6)
    assert torch.equal(network.network(inputs).logits.flatten(0, 1), logits_of(network, inputs))
    assert network.vocab_size == network.text_config.vocab_size == 5
    assert (network.network.lm_head.weight is network.network.get_input_embeddings().weight) == tied
    assert whole - sum(weight.numel() for weight in network.parameters()) == 56 * 16 * (1 if tied else 2)
    assert network.network.generation_config.eos_token_id == 1


def test_the_vocabulary_can_be_an_argument_and_is_kept_with_the_weights(tmp_path, tokens):
    network = drawn(TIED, vocabulary=[3, 8, 9])
    save_student(
        network.state_dict(),
        {"class_path": "lit_distill.llm.network.CausalLM", "init_args": {"config": TIED}},
        tmp_path,
    )
    again = pretrained(str(tmp_path))
    assert again.vocabulary.tolist() == [3, 8, 9]
    assert torch.equal(logits_of(again, tokens % 3), logits_of(network, tokens % 3))


def test_a_trained_language_model_stands_where_one_may_stand(tmp_path, tokens):
    network = drawn(TIED)
    spec = {"class_path": "lit_distill.llm.network.CausalLM", "init_args": {"config": TIED}}
    save_student(network.state_dict(), spec, tmp_path / "run/student")
    again = network_module.pretrained(str(tmp_path / "run"))
    assert torch.equal(logits_of(again, tokens), logits_of(network, tokens))
    other = torch.nn.Linear(2, 2)
    spec = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}
    save_student(other.state_dict(), spec, tmp_path / "other/student")
    with pytest.raises(UsageError, match=r"other holds a Linear; name a run of a language model"):
        network_module.pretrained(str(tmp_path / "other"))


@pytest.mark.parametrize("ids", [[], [1, 1], [-1, 3], [61]])
def test_tokens_that_are_not_there_are_refused(ids):
    with pytest.raises(UsageError, match="different tokens from 0 to 60"):
        drawn().restrict(torch.tensor(ids, dtype=torch.long))


def test_a_restricted_network_is_not_restricted_to_something_else():
    network = drawn(vocabulary=[3, 8, 9])
    with pytest.raises(UsageError, match="restricted to 3 tokens already"):
        network.restrict(torch.tensor([1, 2]))


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_adapters_start_as_the_base_and_alone_get_gradients(folder, tokens):
    base, network = CausalLM(folder).materialize(), CausalLM(folder, lora=LORA).materialize()
    assert torch.equal(logits_of(network, tokens), logits_of(base, tokens))
    loss_of(network, tokens).backward()
    names = set(gradients(network))
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name for name in names)
    assert any(gradient.abs().sum() > 0 for gradient in gradients(network).values())


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_alone_are_saved_and_come_back(folder, tokens, tmp_path, wrapped):
    network = CausalLM(folder, lora=LORA).materialize()
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    freeze(network)  # a teacher saves the same
    module, again = network, CausalLM(folder, lora=LORA).materialize()
    if wrapped:  # as a part of a Distiller
        module, again = torch.nn.ModuleDict({"student": network}), torch.nn.ModuleDict({"student": again})
    state = module.state_dict()
    assert len(state) == 8
    assert all("lora_" in key for key in state)
    again.load_state_dict(state)
    again = again["student"] if wrapped else again
    assert torch.equal(logits_of(again, tokens), logits_of(network, tokens))
    assert not torch.allclose(logits_of(again, tokens), logits_of(CausalLM(folder).materialize(), tokens), atol=1e-3)
    if not wrapped:
        spec = {"class_path": "lit_distill.llm.network.CausalLM", "init_args": {"name": folder, "lora": LORA}}
        save_student(state, spec, tmp_path / "student")
        assert torch.equal(logits_of(pretrained(str(tmp_path)), tokens), logits_of(network, tokens))
        with pytest.raises(RuntimeError, match="Missing key"):
            again.load_state_dict({})


def test_adapters_are_merged_into_a_copy(folder, tokens, tmp_path):
    network = CausalLM(folder, lora=LORA).materialize()
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    before = logits_of(network, tokens)
    network.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(network, tokens), before)
    merged = CausalLM(str(tmp_path / "merged")).materialize()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(logits_of(merged, tokens), before, atol=1e-5)
    network.save_pretrained(tmp_path / "apart", merge=False)
    assert {file.name for file in (tmp_path / "apart").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_adapters_with_gradient_checkpointing_learn(folder, tokens):
    plain, network = (
        CausalLM(folder, lora=LORA, gradient_checkpointing=on).materialize().train() for on in (False, True)
    )
    network.load_state_dict(plain.state_dict())
    for each in (plain, network):
        loss_of(each, tokens).backward()
    expected = gradients(plain)
    assert all(torch.allclose(gradient, expected[name], atol=1e-7) for name, gradient in gradients(network).items())


# ---- generation -----------------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 11, 4], [8], [7, 30]]


def greedy_without_cache(network, prompt, count):
    row = list(prompt)
    for _ in range(count):
        row.append(int(network.network(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_greedy_answers_are_those_of_a_loop_without_cache(family, checkpointing):
    network = drawn(FAMILIES[family], gradient_checkpointing=checkpointing)
    network.eval()
    expected = [greedy_without_cache(network, prompt, 12) for prompt in PROMPTS]
    network.train()
    cached = []
    network.network.get_decoder().register_forward_hook(
        lambda module, args, kwargs, out: cached.append(kwargs.get("input_ids", args[0] if args else None).shape[1]),
        with_kwargs=True,
    )
    added, mask = network.generate(PROMPTS, max_new_tokens=12, greedy=True, eos=[])
    assert added.tolist() == expected
    assert mask.all()
    assert cached == [4] + [1] * 11  # the prompt once, then one token at a time
    assert all(module.training for module in network.modules())
    # An answer ends with the first of the tokens that end it, which is a part of it.
    end = expected[0][2]
    added, mask = network.generate(PROMPTS, max_new_tokens=12, greedy=True, eos=end)
    for row, kept, whole in zip(added.tolist(), mask.tolist(), expected, strict=True):
        length = whole.index(end) + 1 if end in whole else len(kept)
        assert kept == [index < length for index in range(len(kept))]
        assert row[:length] == whole[:length]


def test_prompts_may_be_padded_already():
    network = drawn().eval()
    tokens = torch.tensor([[5, 9, 11, 4], [0, 0, 0, 8], [0, 0, 7, 30]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]).bool()
    lists = network.generate(PROMPTS, max_new_tokens=5, greedy=True)
    assert torch.equal(network.generate((tokens, mask), max_new_tokens=5, greedy=True)[0], lists[0])


def test_samples_are_of_the_networks_own_distribution_and_of_their_seed():
    network = drawn({**LLAMA, "hidden_size": 8, "num_key_value_heads": 4, "vocab_size": 12})
    network.network.generation_config.update(repetition_penalty=5.0, top_k=2)  # what a folder may bring along
    expected = (network.network.eval()(torch.tensor([[5]])).logits[0, -1] / 1.5).softmax(-1)
    state = torch.get_rng_state()
    added, _ = network.generate([[5]] * 4000, max_new_tokens=1, temperature=1.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(torch.bincount(added[:, 0], minlength=12) / 4000, expected, atol=0.03)
    assert torch.equal(
        network.generate([[5]] * 9, max_new_tokens=4, seed=1)[0],
        network.generate([[5]] * 9, max_new_tokens=4, seed=1)[0],
    )
    assert not torch.equal(
        network.generate([[5]] * 9, max_new_tokens=4, seed=1)[0],
        network.generate([[5]] * 9, max_new_tokens=4, seed=2)[0],
    )
    assert network.network.generation_config.repetition_penalty == 5.0


def test_prompts_that_cannot_be_continued_are_refused():
    network = drawn()
    with pytest.raises(UsageError, match="prompts: number 1 is empty"):
        network.generate([[3], []], max_new_tokens=2)
    with pytest.raises(UsageError, match=r"a prompt of 60 tokens and 5 new ones .* context of 64"):
        network.generate([[3] * 60], max_new_tokens=5)
    with pytest.raises(UsageError, match=r"temperature is 0\.0"):
        network.generate([[3]], max_new_tokens=5, temperature=0.0)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LLAMA, "model_type": "gemma2", "head_dim": 4}, "final_logit_softcapping"),
        ({**LLAMA, "model_type": "cohere"}, "logit_scale of model_type cohere is 0.0625"),
        ({**LLAMA, "model_type": "granite", "logits_scaling": 8.0}, "logits_scaling of model_type granite is 8.0"),
        ({**LLAMA, "model_type": "phi", "num_key_value_heads": 4}, "PhiForCausalLM has a head bias"),
        ({"model_type": "bart", "d_model": 16, "vocab_size": 61}, "bart has an encoder"),
    ],
)
def test_networks_whose_logits_are_no_product_are_refused(config, said):
    with pytest.raises(UsageError, match=said):
        drawn(config)


def test_what_a_field_does_not_say_is_seen_in_the_logits(monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(UsageError, match="does more to its logits"):
        drawn()


def test_neutral_values_of_such_fields_are_taken():
    drawn({**LLAMA, "model_type": "granite", "logits_scaling": 1.0})
    drawn({**LLAMA, "model_type": "cohere", "logit_scale": 1.0})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "neither is given"),
        ({"name": "a", "config": LLAMA}, "both are given"),
        ({"config": LLAMA, "lora": LORA}, "lora: .* give name"),
        ({"config": {"vocab_size": 8}}, "config: model_type is missing"),
        ({"config": {"model_type": "lama"}}, "model_type 'lama' is none"),
        ({"config": {"model_type": "llama", "hiden_size": 8}}, "llama has no hiden_size; did you mean hidden_size?"),
        ({"config": {**LLAMA, "num_attention_heads": 3}}, "config: llama cannot be built of these sizes"),
    ],
)
def test_arguments_that_make_no_network_are_one_line(arguments, said):
    with pytest.raises(UsageError, match=said) as error:
        CausalLM(**arguments).materialize()
    assert "\n" not in str(error.value)


def test_folders_that_hold_no_network_are_one_line(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"name: 'nobody/nothing' is neither a folder") as error:
        CausalLM("nobody/nothing").materialize()
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"name: '.*' ") as error:
        CausalLM(str(tmp_path)).materialize()
    assert "\n" not in str(error.value)
    state = {key: value.clone() for key, value in CausalLM(folder).materialize().network.state_dict().items()}
    state = {key: value for key, value in state.items() if key not in ("lm_head.weight", "model.norm.weight")}
    save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lack model\.norm\.weight"):
        CausalLM(folder).materialize()


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"], **LORA}, {"target_modules": ["embed_tokens"]}],
)
def test_adapters_of_head_and_embeddings_are_refused(folder, lora):
    with pytest.raises(UsageError, match="lora: embeddings and head"):
        CausalLM(folder, lora=lora).materialize()


@pytest.mark.parametrize("lora", [{"rank": 2}, {"target_modules": ["nothing"]}])
def test_adapters_that_cannot_be_made_are_one_line(folder, lora):
    with pytest.raises(UsageError, match="lora: ") as error:
        CausalLM(folder, lora=lora).materialize()
    assert "\n" not in str(error.value)


# ---- tied weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TIED, GPT2], ids=["llama", "gpt2"])
def test_tied_weights_stay_tied(tmp_path, tokens, config):
    def tied(network):
        return network.network.get_output_embeddings().weight is network.network.get_input_embeddings().weight

    network = drawn(config).eval()
    assert tied(network)
    assert tied(copy.deepcopy(network))
    save_student(
        network.state_dict(),
        {"class_path": "lit_distill.llm.network.CausalLM", "init_args": {"config": config}},
        tmp_path / "student",
    )
    again = pretrained(str(tmp_path)).eval()
    assert tied(again)
    assert torch.equal(logits_of(again, tokens), logits_of(network, tokens))
    again.save_pretrained(tmp_path / "hf")
    assert tied(CausalLM(str(tmp_path / "hf")).materialize())


# ---- sharding -------------------------------------------------------------------------------------------------------


def test_blocks_are_the_decoder_layers():
    network = drawn()
    assert _blocks(network) == list(network.network.model.layers)
