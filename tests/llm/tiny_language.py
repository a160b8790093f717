"""Tiny language models, and prompts with completions for them."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer

from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.network import CausalLM

VOCABULARY = 23
SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def language_model(seed, **sizes):
    """A network drawn from a seed, with logits that are far from even."""
    network = CausalLM(config=SIZES | sizes)
    torch.manual_seed(seed)
    network.materialize()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return network


def token_batch(rows, total=None):
    """A batch of (prompt, completion) lists; the completions are scored."""
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.arange(length).expand(len(rows), -1)
    scored, targets = [], []
    for number, (prompt, completion) in enumerate(rows):
        tokens = prompt + completion
        input_ids[number, : len(tokens)] = torch.tensor(tokens)
        for place, token in enumerate(completion, start=len(prompt)):
            scored.append(number * length + place - 1)
            targets.append(token)
    return TokenBatch(
        input_ids,
        positions,
        torch.tensor(scored),
        torch.tensor(targets),
        torch.arange(len(rows)),
        len(targets) if total is None else total,
    )


def pairs(count, seed=0):
    """Random prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [(draw(1, 6), draw(1, 8)) for _ in range(count)]


class Batches:
    """What Lightning takes for one loader; a list would be many."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.batches[number]


class Pairs(LightningDataModule):
    """The same batches in each epoch; a step is `accumulated` of them."""

    max_length = 16
    vocab_size = VOCABULARY
    vocabulary = None
    run_seed = 0

    def __init__(self, count=8, batch_size=4, accumulated=1):
        super().__init__()
        self.rows = pairs(count)
        self.batch_size, self.accumulated = batch_size, accumulated

    def train_dataloader(self):
        size, step = self.batch_size, self.batch_size * self.accumulated
        found = []
        for start in range(0, len(self.rows), size):
            group = self.rows[start // step * step :][:step]
            batch = token_batch(self.rows[start : start + size], sum(len(completion) for _, completion in group))
            batch.index += start
            found.append(batch)
        return Batches(found)

    def val_dataloader(self):
        return Batches([token_batch(pairs(4, seed=1)), token_batch(pairs(3, seed=2))])

    test_dataloader = val_dataloader

    def prompts(self, part, count):
        return [prompt for prompt, _ in pairs(4, seed=1)][:count]

    def decode(self, tokens):
        return " ".join(map(str, tokens))

    def part_size(self, part):
        return len(self.rows)

    def fingerprint(self):
        return {"data": str(len(self.rows))}


def trainer(folder, **options):
    given = {
        "max_steps": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    return Trainer(**(given | options))


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
