import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_language import VOCABULARY, Pairs, language_model, sgd, token_batch, trainer

from lit_distill.core.errors import UsageError
from lit_distill.core.taps import FeatureTaps
from lit_distill.llm.methods.hidden import (
    DistilBERT,
    MiniLM,
    TinyBERT,
    as_heads,
    hidden_taps,
    projection_taps,
)
from lit_distill.llm.methods.kl import ForwardKL
from lit_distill.llm.network import CausalLM
from lit_distill.llm.relations import relation_kl, visible_tokens

DEEP = {"num_hidden_layers": 4, "hidden_size": 24, "num_attention_heads": 2}
TOKENS = torch.tensor([[5, 9, 4, 17, 3, 8], [11, 2, 6, 20, 13, 7]])


def row_states(network, batch):
    """Hidden states of the transformers library at the scored places, by layer, each (N, H)."""
    found = network.network(batch.input_ids, output_hidden_states=True).hidden_states
    return [states.flatten(0, 1)[batch.scored] for states in found]


def first_batch():
    return Pairs().train_dataloader()[0]


# ---- what is tapped ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_states_are_those_of_the_library(kind):
    if kind == "llama":
        network = language_model(0, **DEEP)
    else:
        sizes = {
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        network = CausalLM(config={"model_type": "gpt2"} | sizes).materialize().eval()
    names = hidden_taps(network)
    _, features = FeatureTaps(network, names)(TOKENS)
    expected = network.network(TOKENS, output_hidden_states=True).hidden_states
    assert len(names) == len(expected)
    for name, states in zip(names, expected, strict=True):
        torch.testing.assert_close(features[name], states)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_attention_logits_are_those_of_the_library_before_its_softmax(kind):
    sizes = {"model_type": kind, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    network = language_model(0, **sizes)
    names = projection_taps(network, 1, "qk")
    positions = torch.arange(6).expand(2, -1)
    _, features = FeatureTaps(network, names)(TOKENS, positions)
    query, key = as_heads(network, features, names, positions)
    logits = (query @ key.mT / 8**0.5).masked_fill(~visible_tokens(positions)[:, None], float("-inf"))
    network.network.set_attn_implementation("eager")
    expected = network.network(TOKENS, output_attentions=True).attentions[1]
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_networks_without_projections_or_a_known_norm_are_refused():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    network = CausalLM(config={"model_type": "gpt2"} | sizes).materialize()
    with pytest.raises(UsageError, match=r"network.transformer.h.1 of GPT2LMHeadModel has no q_proj"):
        projection_taps(network, 1, "qkv")


# ---- steps ---------------------------------------------------------------------------------------------------------


def fit(module, folder, **options):
    trainer(folder, **({"max_steps": 1} | options)).fit(module, Pairs())
    return module


def test_distilbert_adds_three_losses(tmp_path):
    student, teacher = language_model(0), language_model(1, num_hidden_layers=4)
    by_hand = copy.deepcopy(student)
    batch = first_batch()
    ours, theirs = row_states(by_hand, batch)[-1], row_states(teacher, batch)[-1].detach()
    head, head_teacher = (network.network.get_output_embeddings().weight for network in (by_hand, teacher))
    logits, logits_teacher = ours @ head.T, (theirs @ head_teacher.T).detach()
    kl = F.kl_div((logits / 2).log_softmax(-1), (logits_teacher / 2).softmax(-1), reduction="batchmean")
    ce = F.cross_entropy(logits, batch.targets)
    # Both sums are over all scored tokens, as the data say; a target of 1 asks for the same direction.
    cosine = F.cosine_embedding_loss(ours, theirs, torch.ones(len(ours)))
    (5 * 4 * kl + 2 * ce + cosine).backward()
    module = fit(DistilBERT(student, teacher, optimizer=sgd), tmp_path)
    for name, value in (("match", 20 * kl), ("ce", 2 * ce), ("cosine", cosine)):
        torch.testing.assert_close(module.terms[name].detach(), value.detach(), rtol=1e-4, atol=1e-5)
    moved = dict(student.named_parameters())
    for key, parameter in by_hand.named_parameters():
        torch.testing.assert_close(moved[key], parameter - 0.1 * parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "layer_map"), [(16, (0, 2, 4)), (24, (0, 2, 4))])
def test_tinybert_maps_layers_and_projects(tmp_path, width, layer_map):
    sizes = {"hidden_size": width, "num_hidden_layers": 4}
    student, teacher = language_model(0), language_model(1, **sizes)
    batch = first_batch()
    module = TinyBERT(student, teacher, feature_weight=0.5, optimizer=sgd)
    before = copy.deepcopy(student)
    projections = []

    class Kept(TinyBERT):
        def on_train_start(self):
            super().on_train_start()
            projections.append(copy.deepcopy(self.projections))

    module = fit(Kept(student, teacher, feature_weight=0.5, optimizer=sgd), tmp_path)
    (kept,) = projections
    ours, theirs = row_states(before, batch), row_states(teacher, batch)
    embedding = F.mse_loss(ours[0] @ kept["embedding"].weight.T, theirs[0])
    hidden = sum(F.mse_loss(ours[m] @ kept["hidden"].weight.T, theirs[layer_map[m]]) for m in (1, 2))
    torch.testing.assert_close(module.terms["embedding"].detach(), 0.5 * embedding.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.terms["hidden"].detach(), 0.5 * hidden.detach(), rtol=1e-4, atol=1e-5)
    assert module.terms["attention"] > 0
    for name, projection in module.projections.items():
        assert not torch.equal(projection.weight, kept[name].weight)


@torch.no_grad()
def test_tinybert_compares_attention_of_mapped_layers(tmp_path):
    student, teacher = language_model(0), language_model(1, num_hidden_layers=4)
    before = copy.deepcopy(student)
    with torch.enable_grad():
        module = fit(TinyBERT(student, teacher), tmp_path)
    batch = first_batch()
    total = 0.0
    for ours, theirs in ((0, 1), (1, 3)):
        names = projection_taps(before, ours, "qk"), projection_taps(teacher, theirs, "qk")
        logits = []
        for network, taps in zip((before, teacher), names, strict=True):
            _, features = FeatureTaps(network, taps)(batch.input_ids, batch.position_ids)
            query, key = as_heads(network, features, taps, batch.position_ids)
            logits.append(query @ key.mT / 8**0.5)
        for place in batch.scored.tolist():
            row, token = divmod(place, batch.input_ids.shape[1])
            seen = slice(0, token + 1)
            total += float(F.mse_loss(logits[0][row, :, token, seen], logits[1][row, :, token, seen])) / batch.total
    assert float(module.terms["attention"]) == pytest.approx(total, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("teacher_layer", [None, 1, -2])
def test_minilm_adds_relations_of_queries_keys_and_values(tmp_path, teacher_layer):
    student, teacher = language_model(0), language_model(1, **DEEP)
    before, batch = copy.deepcopy(student), first_batch()
    with torch.enable_grad():
        module = fit(
            MiniLM(student, teacher, relation_heads=4, teacher_layer=teacher_layer, feature_weight=3.0), tmp_path
        )
    layer = {None: 3, 1: 1, -2: 2}[teacher_layer]
    visible = visible_tokens(batch.position_ids)
    total = 0.0
    for letter in "qkv":
        vectors = []
        for network, number in ((before, 1), (teacher, layer)):
            part = network.network.model.layers[number]
            states = network.network.model(batch.input_ids, output_hidden_states=True).hidden_states[number]
            vectors.append(part.self_attn.get_submodule(f"{letter}_proj")(part.input_layernorm(states)))
        total += float(relation_kl(*vectors, visible, heads=4).flatten()[batch.scored].sum()) / batch.total
    assert float(module.terms["relations"]) == pytest.approx(3 * total, rel=1e-4)


def methods():
    return {
        "distilbert": (DistilBERT, {"label_weight": 0.0}, "cosine"),
        "tinybert": (TinyBERT, {}, "attention"),
        "minilm": (MiniLM, {"relation_heads": 4}, "relations"),
    }


@pytest.mark.parametrize("name", methods())
def test_an_identical_copy_has_nothing_to_learn(name, tmp_path):
    method, options, term = methods()[name]
    teacher = language_model(1)

    class Identity(method):
        def build(self):
            super().build()
            for projection in getattr(self, "projections", {}).values():
                torch.nn.init.eye_(projection.weight)

    module = fit(Identity(copy.deepcopy(teacher), teacher, **options), tmp_path)
    for key, value in module.terms.items():
        assert float(value) == pytest.approx(0, abs=1e-5), key
    assert term in module.terms


@pytest.mark.parametrize("name", methods())
def test_a_step_is_the_same_however_it_is_cut(name, tmp_path):
    method, options, _ = methods()[name]
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        module = method(language_model(0), language_model(1), optimizer=sgd, **options)
        runner = trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulated)
        runner.fit(module, Pairs(batch_size=size, accumulated=accumulated))
        found.append(module)
    for one, other in zip(*(module.trainable() for module in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_features_alone_may_teach_and_the_word_is_only_reported(tmp_path):
    student = language_model(0)
    head = student.network.get_output_embeddings().weight.clone()
    module = fit(MiniLM(student, language_model(1), relation_heads=4, teacher_weight=0.0, optimizer=sgd), tmp_path)
    assert float(module.terms["match"]) == 0
    assert module.terms["relations"] > 0
    assert torch.equal(student.network.get_output_embeddings().weight, head)
    layer = student.network.model.layers[1]
    assert torch.equal(layer.mlp.up_proj.weight, language_model(0).network.model.layers[1].mlp.up_proj.weight)
    for part, moves in ((layer.self_attn.v_proj, True), (layer.self_attn.o_proj, False)):
        name = next(key for key, module in language_model(0).network.named_modules() if key.endswith("1.self_attn"))
        letter = "v_proj" if moves else "o_proj"
        old = language_model(0).network.get_submodule(f"{name}.{letter}").weight
        assert torch.equal(part.weight, old) != moves


def test_projections_are_saved_beside_the_student(tmp_path):
    module = TinyBERT(language_model(0), language_model(1))
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, Pairs())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {"projections.embedding.weight", "projections.hidden.weight"} <= set(keys)
    assert not [key for key in keys if key.startswith("teacher")]


def test_evaluation_needs_no_taps(tmp_path):
    module = MiniLM(language_model(0), language_model(1), relation_heads=4)
    runner = trainer(tmp_path, limit_val_batches=1.0)
    runner.fit(module, Pairs())
    assert runner.callback_metrics["val/kl"] > 0


def test_documents_of_one_row_are_not_related(tmp_path):
    batch = token_batch([([3, 4], [5, 6, 7, 8])])
    batch.position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    apart = visible_tokens(batch.position_ids)[0]
    assert not apart[3:, :3].any()


def test_what_cannot_be_compared_is_refused(tmp_path):
    networks = language_model(0), language_model(1, hidden_size=24, num_attention_heads=3)
    for method, options, text in (
        (DistilBERT, {}, r"model.student is 16 wide, model.teacher 24"),
        (TinyBERT, {}, r"model.student has 2 attention heads, model.teacher 3.*model.attention false"),
        (MiniLM, {"relation_heads": 3}, r"model.relation_heads is 3, which does not divide the 16 of .*q_proj"),
        (MiniLM, {"relation_heads": 4, "teacher_layer": 2}, r"model.teacher_layer is 2; give -2 to 1"),
    ):
        with pytest.raises(UsageError, match=text):
            fit(method(*networks, **options), tmp_path)
    fit(TinyBERT(*networks, attention=False), tmp_path)
    with pytest.raises(UsageError, match=r"model.feature_weight is 0"):
        MiniLM(*networks, feature_weight=0.0)
    with pytest.raises(UsageError, match=r"model.teacher_weight is -1"):
        MiniLM(*networks, teacher_weight=-1.0)
    with pytest.raises(UsageError, match=r"model.relation_heads is 0; give 1 or more"):
        MiniLM(*networks, relation_heads=0)
    with pytest.raises(UsageError, match=r"model.source: this method compares"):
        MiniLM(*networks, source=ForwardKL(*networks).source)
