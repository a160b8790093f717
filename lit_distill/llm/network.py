"""A causal language model of the transformers library as a network that is trained, taught from and sharded."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import pretrained as core_pretrained

R = TypeVar("R")

# What some families do to the product of hidden state and head, and the value at which they leave it alone.
_AFTER_THE_HEAD: dict[str, float | None] = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}


class CausalLM(nn.Module):
    """A causal language model, loaded by name or drawn from scratch.

    Building one is cheap: weights exist from `materialize` on. `forward` runs the network without its head and hands
    the hidden states that count to a function, together with the head. So logits are made where they are scored, a
    few at a time, and under FSDP2 while the head is whole.

    With `lora`, only the adapters are trained and saved; the rest comes back from `name`.

    Args:
        name: A folder, or a name on the Hugging Face hub; files that are on this machine are taken first.
        config: Instead of `name`, `model_type` and the sizes of a network to draw at random, such as
            `{model_type: llama, hidden_size: 192, num_hidden_layers: 4, vocab_size: 49152}`.
        layers: Decoder layers to keep: their numbers, or how many, evenly spaced, the first and the last among them
            (as DistilBERT's student is made of its teacher; Sanh et al. 2019, arXiv 1910.01108). All if None.
        vocabulary: Tokens to keep, see `restrict`. All if None.
        dtype: Of the weights; "auto" takes them as they are stored, often bfloat16. On a CPU that is faster than
            float32 only with instructions for it (`avx512_bf16` or `amx_bf16` in lscpu), and several times slower
            without.
        lora: Arguments of `peft.LoraConfig`, such as `{r: 8, target_modules: all-linear}`.
        gradient_checkpointing: Whether to compute activations a second time in the backward pass instead of storing
            them.
        attention: "sdpa" or "eager", the latter where attention weights are to be seen.

    Raises:
        UsageError: Not exactly one of `name` and `config` is given, or `lora` without a `name`.
    """

    vocabulary: Tensor | None

    def __init__(
        self,
        name: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        layers: Sequence[int] | int | None = None,
        vocabulary: Sequence[int] | None = None,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        super().__init__()
        if (name is None) == (config is None):
            raise UsageError(
                "CausalLM takes one of name (a folder or hub name) and config (a network from scratch); "
                f"{'both are' if name is not None else 'neither is'} given"
            )
        if lora is not None and name is None:
            raise UsageError("lora: adapters are saved without their base, which only a name brings back; give name")
        self.name = name
        self.config = config
        self.layers = layers
        self.dtype = dtype
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.attention = attention
        self.network: Any = None
        self._kept_tokens = vocabulary
        self._whole_size = 0
        self._peft: tuple[Any, ...] = ()
        self._adapters: frozenset[str] = frozenset()
        self.register_buffer("vocabulary", None)
        self.register_state_dict_post_hook(_leave_out_base)
        self.register_load_state_dict_pre_hook(_fill_in_base)

    # ---- the network ------------------------------------------------------------------------------------------------

    def materialize(self, state: Mapping[str, Tensor] | None = None) -> "CausalLM":
        """Loads or draws the weights; the second call does nothing.

        Args:
            state: Weights that will be filled in afterwards. If they are of a network restricted to some tokens, this
                one is restricted to the same.

        Returns:
            This network.

        Raises:
            UsageError: The network cannot be had, or its logits are more than a product of hidden state and head.
        """
        if self.network is None:
            network = self._load() if self.name is not None else self._draw()
            if self.layers is not None:
                _keep_layers(network, self.layers)
            if network.device.type != "meta":  # where nothing can be computed
                _check_head(network)
            # Nothing looks at padding, so it gets no gradient; where it is the token of ending too, that one shall.
            network.get_input_embeddings().padding_idx = None
            self.network = network.train(self.training)
            if self._kept_tokens is not None:
                self.restrict(torch.tensor(self._kept_tokens))
            if self.lora is not None:
                self._add_adapters(self.lora)
            if self.gradient_checkpointing:
                # Renamed in the course of transformers 5.
                enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
        if state is not None and "vocabulary" in state:
            self.restrict(state["vocabulary"])
        return self

    @torch.no_grad()
    def restrict(self, ids: Int[Tensor, " v"]) -> None:
        """Cuts embeddings and head down to some tokens, which are numbered in the order given from here on.

        The network then is its own distribution given that one of these tokens comes. Inputs and targets are to be
        given in the new numbers.

        Args:
            ids: (v,) tokens to keep, each once.

        Raises:
            UsageError: A token is not in the vocabulary or is named twice, or the network is restricted already.
        """
        model = self.materialize()._model
        ids = ids.to(model.get_output_embeddings().weight.device)
        if self.vocabulary is not None:
            if torch.equal(self.vocabulary, ids):
                return
            raise UsageError(f"vocabulary: the network is restricted to {len(self.vocabulary)} tokens already")
        size = self.vocab_size
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= size or len(ids.unique()) < len(ids):
            raise UsageError(f"vocabulary: give different tokens from 0 to {size - 1}, at least one")
        if getattr(self.text_config, "vocab_size_per_layer_input", None):
            raise UsageError(
                f"vocabulary: {type(model).__name__} has embeddings in every layer, which are not cut; leave it out"
            )
        self._whole_size = size
        renumber = {old: new for new, old in enumerate(ids.tolist())}
        _change_vocabulary(model, lambda weight: weight[ids].clone(), renumber)
        self.vocabulary = ids.clone()

    @property
    def vocab_size(self) -> int:
        """V, the rows of the head: the tokenizer's tokens, and perhaps some more that only pad."""
        return self._model.get_output_embeddings().out_features

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states that the head takes."""
        return self._model.get_output_embeddings().in_features

    @property
    def text_config(self) -> Any:
        """The configuration of the transformers library, of the text part where there are others."""
        return self._model.config.get_text_config()

    @property
    def _no_split_modules(self) -> Any:
        """Class names of the decoder layers, by which `lit_distill.core.strategies.shard` finds its blocks."""
        return getattr(self.network, "_no_split_modules", None)

    @property
    def _model(self) -> Any:
        if self.network is None:
            raise RuntimeError("CausalLM has no weights yet; call materialize() first")
        return self.network

    # ---- running it -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        position_ids: Int[Tensor, "b w"] | None = None,
        scored: Int[Tensor, " n"] | None = None,
        score: Callable[[Float[Tensor, "n h"], Float[Tensor, "v h"]], R] | None = None,
        before: Float[Tensor, "b p h"] | None = None,
        after: Float[Tensor, "b s h"] | None = None,
    ) -> R | Float[Tensor, "n h"]:
        """Runs the network up to its head, and scores what counts.

        There is no attention mask: rows are padded on the right, where nothing before looks.

        Args:
            input_ids: (B, T) tokens.
            position_ids: (B, W) places in the document, W = T without vectors before and behind; each return to 0
                starts a document that does not see the ones before it. One document in each row if None.
            scored: (N,) flat positions `b * T + i` to take; all, row by row, if None.
            score: Takes the hidden states (N, H) and the weight of the head (V, H), and returns a tensor, or a tuple
                or dict of tensors.
            before: (B, P, H) vectors that stand before the tokens of each row, as if they were embeddings of tokens;
                `position_ids` and `scored` count them.
            after: (B, S, H) likewise vectors that stand behind each row.

        Returns:
            What `score` returns, or the hidden states (N, H) without it.
        """
        model = self._model
        decoder = model.get_decoder()
        given = {"input_ids": input_ids}
        if before is not None or after is not None:
            embedded = model.get_input_embeddings()(input_ids)
            parts = [part.to(embedded.dtype) for part in (before, embedded, after) if part is not None]
            given = {"inputs_embeds": torch.cat(parts, 1)}
        # On a GPU the library waits here once, to see whether a row holds several documents; a mask of ours would
        # spare that, but also rule out the kernels that know causal attention without one.
        run = decoder(**given, position_ids=position_ids, attention_mask=None, use_cache=False)
        hidden = run.last_hidden_state.flatten(0, 1)
        if scored is not None:
            hidden = hidden.index_select(0, scored)
        return hidden if score is None else score(hidden, model.get_output_embeddings().weight)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]] | tuple[Int[Tensor, "b p"], Bool[Tensor, "b p"]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        greedy: bool = False,
        seed: int | None = None,
        eos: int | Sequence[int] | None = None,
        adjust: Callable[[Int[Tensor, "b l"], Float[Tensor, "b v"]], Float[Tensor, "b v"]] | None = None,
    ) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Continues prompts, in eval mode and with the cache of keys and values, whatever training does.

        Sampling is from the network's own distribution: nothing is cut off or penalized.

        Args:
            prompts: Lists of tokens, or tokens (B, P) padded on the left and their mask (B, P).
            max_new_tokens: Most tokens to add.
            temperature: Divides the logits before sampling.
            greedy: Whether to take the most probable token instead of sampling.
            seed: Of the sampling; the state of torch's generators is left as it was. They are drawn from if None.
            eos: Tokens that end an answer; those of the network if None.
            adjust: Takes prompts with what was added so far (B, L) and the logits of what is next (B, V), and returns
                the logits to sample from.

        Returns:
            The tokens added (B, n), n <= `max_new_tokens`, and a mask that is True up to the first token that ends
            the answer, this one among them.

        Raises:
            UsageError: A prompt is empty, or does not fit the context together with its answer; a temperature that
                is not positive.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        model = self._model
        device = model.get_output_embeddings().weight.device
        tokens, mask = prompts if isinstance(prompts, tuple) else pad_left(prompts)
        context = getattr(self.text_config, "max_position_embeddings", None)
        if context is not None and tokens.shape[1] + max_new_tokens > context:
            raise UsageError(
                f"max_new_tokens: a prompt of {tokens.shape[1]} tokens and {max_new_tokens} new ones are more than the "
                f"context of {context}; shorten one of them"
            )
        if not greedy and temperature <= 0:
            raise UsageError(f"temperature is {temperature}; give more than 0, or greedy: true")
        own = model.generation_config
        ends = own.eos_token_id if eos is None else eos
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        how = (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        )
        plan = GenerationConfig(
            **how,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            bos_token_id=own.bos_token_id,
        )
        modes = [(module, module.training) for module in self.modules()]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            try:
                self.eval()  # no dropout; and layers that checkpoint activations refuse the cache in training
                model.generation_config = plan  # of its own the library would fill gaps: penalties, top-k
                whole = model.generate(
                    tokens.to(device),
                    attention_mask=mask.to(device).long(),
                    generation_config=plan,
                    logits_processor=None if adjust is None else LogitsProcessorList([adjust]),
                    # Every process runs the sharded layers as often as the others, however early its answers end.
                    synced_gpus=isinstance(self, FSDPModule),
                )
            finally:
                model.generation_config = own
                for module, mode in modes:
                    module.training = mode
        added = whole[:, tokens.shape[1] :]
        ended = torch.isin(added, torch.tensor(ends, device=device, dtype=added.dtype)).int()
        return added, ended.cumsum(1) - ended == 0

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None, *, merge: bool = True) -> None:
        """Writes the folder that `AutoModelForCausalLM.from_pretrained` loads.

        A restricted network is written with the tokenizer's numbers. The rows of other tokens are 0 in embeddings and
        head, and `suppress_tokens` of the generation settings names them: `generate` and pipelines never write them,
        so what they write is what the restricted network would. In a prompt they are read as embeddings of 0. Logits
        of the tokens kept are the same; a softmax is over all tokens, each other one with a logit of 0, so likelihoods
        want one over `logits[..., ids]`, where `ids` are those that are not suppressed.

        Args:
            folder: Where to.
            tokenizer: Written beside it, if given.
            merge: Whether adapters are added to the weights (of a copy). Otherwise they are written alone, as peft
                loads them.
        """
        model = self._model
        if self._peft:
            model = copy.deepcopy(self._peft[0]).merge_and_unload() if merge else self._peft[0]
        if self.vocabulary is not None and (merge or not self._peft):
            model = _with_all_tokens(model, self.vocabulary, self._whole_size)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    # ---- building ---------------------------------------------------------------------------------------------------

    def _load(self) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = _from_disk_or_hub(AutoConfig, self.name)
        _refuse(config)
        if torch.get_default_device().type == "meta":  # sizes are asked for, and no weights
            dtype = (config.dtype or torch.float32) if self.dtype == "auto" else getattr(torch, self.dtype)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.attention)
        network, report = _from_disk_or_hub(
            AutoModelForCausalLM,
            self.name,
            config=config,
            dtype=self.dtype if self.dtype == "auto" else getattr(torch, self.dtype),
            attn_implementation=self.attention,
            output_loading_info=True,
        )
        # The library would draw them at random, and say so in a table.
        if missing := sorted(report["missing_keys"]):
            raise UsageError(f"name: the weights of {self.name} lack {missing[0]}; they are not of a causal LM")
        return network

    def _draw(self) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = dict(self.config or {})
        kind = sizes.pop("model_type", None)
        if kind is None:
            raise UsageError("config: model_type is missing; give one of the transformers library, such as llama")
        try:
            known = AutoConfig.for_model(kind)
        except ValueError as error:
            raise UsageError(
                f"config: model_type '{kind}' is none of the transformers library, such as llama"
            ) from error
        for key in sizes:
            if not hasattr(known, key):
                close = get_close_matches(key, [*known.to_dict(), *known.attribute_map], n=1)
                meant = f"; did you mean {close[0]}?" if close else f"; see {type(known).__name__}"
                raise UsageError(f"config: {kind} has no {key}{meant}")
        dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        try:
            config = AutoConfig.for_model(kind, **sizes)
            _refuse(config)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.attention)
        except UsageError:
            raise
        except Exception as error:  # sizes that do not fit each other fail in ways of each family's own
            raise UsageError(f"config: {kind} cannot be built of these sizes ({_first_line(error)})") from error

    def _add_adapters(self, arguments: dict[str, Any]) -> None:
        from peft import LoraConfig, get_peft_model

        try:
            adapted = get_peft_model(self.network, LoraConfig(task_type="CAUSAL_LM", **arguments))
        except (TypeError, ValueError) as error:
            raise UsageError(f"lora: {_first_line(error)}") from error
        model = self.network
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            if type(part).__module__.startswith("peft."):
                raise UsageError("lora: embeddings and head stay as they are; name other target_modules")
        # In a tuple, since its modules are those of `network`, and shall not be registered under a second name.
        self._peft = (adapted,)
        self._adapters = frozenset(name for name, weight in self.named_parameters() if weight.requires_grad)


def pretrained(weights: str) -> CausalLM:
    """Loads a language model that a run has trained.

    In YAML, `class_path: lit_distill.llm.pretrained` stands wherever a `CausalLM` may stand.

    Args:
        weights: A run folder, or its `student/` folder.

    Raises:
        UsageError: There is none, or it holds another network.
    """
    network = core_pretrained(weights)
    if not isinstance(network, CausalLM):
        raise UsageError(f"weights: {weights} holds a {type(network).__name__}; name a run of a language model")
    return network


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silences the transformers library where it counts tensors, which takes moments."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keeps of a network with adapters the adapters alone."""
    assert isinstance(module, CausalLM)
    if module._adapters:
        for key in [key for key in state if key.startswith(f"{prefix}network.")]:
            if key.removeprefix(prefix) not in module._adapters:
                del state[key]


def _fill_in_base(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Lets the base stand for what was left out."""
    assert isinstance(module, CausalLM)
    if module._adapters:
        for key, value in module.network.state_dict().items():
            if f"network.{key}" not in module._adapters:
                state.setdefault(f"{prefix}network.{key}", value)


def _from_disk_or_hub(loader: Any, name: str | None, **options: Any) -> Any:
    """Calls `from_pretrained`, on local files first, and never with code that comes along with the weights."""
    options["trust_remote_code"] = False
    try:
        try:
            with without_progress_bars():
                return loader.from_pretrained(name, local_files_only=True, **options)
        except OSError:
            if Path(str(name)).exists():
                raise
            return loader.from_pretrained(name, **options)
    except OSError as error:
        raise UsageError(
            f"name: '{name}' is neither a folder with a model nor one that the Hugging Face hub gives here "
            f"({_first_line(error)})"
        ) from error
    except (ValueError, ImportError) as error:
        raise UsageError(f"name: '{name}' cannot be loaded as a causal LM ({_first_line(error)})") from error


def _refuse(config: Any) -> None:
    """Refuses what is not decoder, hidden state, matrix product.

    Raises:
        UsageError: Names the field.
    """
    if config.is_encoder_decoder:
        raise UsageError(f"model_type {config.model_type} has an encoder (is_encoder_decoder); take a causal LM")
    text = config.get_text_config()
    for field, neutral in _AFTER_THE_HEAD.items():
        value = getattr(text, field, None)
        if value is not None and value != neutral:
            raise UsageError(
                f"{field} of model_type {config.model_type} is {value}: its logits are more than hidden state times "
                "head, which losses here rest on; take another model"
            )


@torch.no_grad()
def _check_head(network: Any) -> None:
    """Checks that hidden state times head is what the network says.

    Raises:
        UsageError: It is not.
    """
    name, head = type(network).__name__, network.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        what = "no head" if head is None else "a head bias"
        raise UsageError(f"{name} has {what}: its logits are not hidden state times head; take another model")
    hidden: list[Tensor] = []
    hook = network.get_decoder().register_forward_hook(lambda *run: hidden.append(run[2].last_hidden_state))
    tokens = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
    logits = network.eval()(input_ids=tokens, use_cache=False).logits.float()
    hook.remove()
    product = F.linear(hidden[0], head.weight).float()
    if not torch.allclose(logits, product, rtol=1e-2, atol=1e-2 * float(product.abs().max())):
        raise UsageError(f"{name} does more to its logits than hidden state times head; take another model")


def _keep_layers(network: Any, layers: Sequence[int] | int) -> None:
    """Drops decoder layers, and what the configuration says of them.

    Raises:
        UsageError: There are no such layers.
    """
    decoder = network.get_decoder()
    config = network.config.get_text_config()
    depth = config.num_hidden_layers
    stacks = [
        key for key, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(stacks) != 1:
        raise UsageError(f"layers: the layers of {type(network).__name__} are not one list; leave it out")
    kept = _evenly(layers, depth) if isinstance(layers, int) else list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= depth:
        raise UsageError(f"layers is {kept}; give rising numbers from 0 to {depth - 1}")
    stack = decoder.get_submodule(stacks[0])
    decoder.register_module(stacks[0], nn.ModuleList(stack[index] for index in kept))
    for place, layer in enumerate(decoder.get_submodule(stacks[0])):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = place  # where the cache keeps its keys and values
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == depth:
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _evenly(count: int, depth: int) -> list[int]:
    """Spreads `count` layers evenly over `depth`, both ends included."""
    if not 2 <= count <= depth:
        raise UsageError(f"layers is {count}; give 2 to {depth}, or a list of layers")
    return [round(index * (depth - 1) / (count - 1)) for index in range(count)]


@torch.no_grad()
def _with_all_tokens(model: Any, ids: Int[Tensor, " v"], size: int) -> Any:
    """Returns a copy of a restricted network that has rows of 0 for what was cut off, and never writes it."""

    def widened(weight: Tensor) -> Tensor:
        return weight.new_zeros(size, weight.shape[1]).index_copy(0, ids, weight)

    model = copy.deepcopy(model)
    _change_vocabulary(model, widened, dict(enumerate(ids.tolist())))
    model.generation_config.suppress_tokens = sorted(set(range(size)) - set(ids.tolist())) or None
    return model


def _change_vocabulary(model: Any, change: Callable[[Tensor], Tensor], renumber: dict[int, int]) -> None:
    """Changes the rows of embeddings and head, which stay tied, and what the configuration says of tokens."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    for part in (embeddings,) if tied else (embeddings, head):
        part.weight = nn.Parameter(change(part.weight), requires_grad=part.weight.requires_grad)
    if tied:
        head.weight = embeddings.weight
    head.out_features = embeddings.num_embeddings = len(head.weight)
    text = model.config.get_text_config()
    text.vocab_size = len(head.weight)
    for holder in (text, model.config, model.generation_config):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(holder, key, _renumbered(getattr(holder, key, None), renumber))


def _renumbered(tokens: int | list[int] | None, numbers: dict[int, int]) -> int | list[int] | None:
    if isinstance(tokens, list):
        return [numbers[token] for token in tokens if token in numbers] or None
    return None if tokens is None else numbers.get(tokens)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b p"], Bool[Tensor, "b p"]]:
    """Pads prompts on the left, and returns them with their mask.

    Raises:
        UsageError: One is empty.
    """
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise UsageError(f"prompts: number {place} is empty; give at least one token, such as the one of beginning")
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
