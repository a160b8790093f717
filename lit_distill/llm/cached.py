"""What a teacher said of each scored token, kept on disk: it runs once, and training does without it."""

import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lit_distill.core.cache import weights_fingerprint
from lit_distill.core.errors import RunError, UsageError, check_least
from lit_distill.core.files import alone, atomic_path, write_json
from lit_distill.llm.batch import TokenBatch, sent
from lit_distill.llm.fused import slices
from lit_distill.llm.signals import HiddenSignal, Signal, TopK
from lit_distill.llm.teachers import TeacherSource

if TYPE_CHECKING:
    from lit_distill.llm.distillation import TokenDistiller

Fields = dict[str, tuple[torch.dtype, int]]  # type and width of what is kept of a token, by name


class TokenStore:
    """Vectors of each scored token of a part, in files that are mapped into memory.

    One file a field, made in full length at once and filled unit by unit, in any order. `kept.bin` says of each unit
    how much of the teacher's probability is kept, and 0 where the unit is not there yet: it is written last, so that
    after a kill every unit is whole or missing. `manifest.json` says what all this was made from.

    Args:
        folder: Where the files lie.
        made_from: What the values depend on; must survive JSON.
        counts: (U,) scored tokens of each unit (row, or document).
        fields: What is kept of a token.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any], counts: Int[Tensor, " u"], fields: Fields) -> None:
        self.folder = folder
        self.made_from = json.loads(json.dumps(made_from))
        self.counts = counts
        self.offsets = F.pad(counts.cumsum(0), (1, 0))
        self.fields = fields

    @property
    def bytes_per_token(self) -> int:
        """Bytes on disk for each scored token."""
        return sum(dtype.itemsize * width for dtype, width in self.fields.values())

    def create(self) -> None:
        """Makes the files, unless they are there. For one process."""
        if (self.folder / "manifest.json").exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, size in self._sizes().items():
                with (self.folder / name).open("wb") as file:
                    file.truncate(size)
        except OSError as error:
            raise RunError(f"model.source.folder: {self.folder} cannot be written ({error.strerror})") from error
        write_json(self.folder / "manifest.json", self.made_from)

    def check(self) -> None:
        """Checks that the files are of what is wanted, and have their length.

        Raises:
            UsageError: They were made from something else; the message names the first differing field.
            RunError: They are damaged.
        """
        found = read_manifest(self.folder / "manifest.json")
        for field in [*self.made_from, *sorted(set(found) - set(self.made_from))]:
            if found.get(field) != self.made_from.get(field):
                raise stale(self.folder, field, found.get(field), self.made_from.get(field))
        for name, size in self._sizes().items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise damaged(path, f"it should have {size} bytes")

    def kept(self) -> Float[np.ndarray, " u"]:
        """Returns how much of the teacher's probability is kept of each unit; 0 of those that are missing."""
        return np.fromfile(self.folder / "kept.bin", dtype=np.float32)

    def whole(self) -> bool:
        """Whether all units are there; the folder may be one that cannot be written to."""
        return (self.folder / "kept.bin").is_file() and len(kept := self.kept()) > 0 and bool(kept.all())

    def missing(self) -> Int[Tensor, " m"]:
        """Returns the units that are not there yet."""
        return torch.from_numpy(np.flatnonzero(self.kept() == 0))

    def write(self, units: Int[Tensor, " b"], values: Mapping[str, Tensor], mass: Float[Tensor, " n"]) -> None:
        """Writes some units.

        Args:
            units: Their numbers.
            values: (n, width) by field: of the tokens of the first unit, then of the second.
            mass: (n,) how much of the probability of each token is kept.

        Raises:
            RunError: A value does not fit its type; or the files cannot be written.
        """
        counts = self.counts[units].tolist()
        starts = self.offsets[units].tolist()
        try:
            for name, (dtype, width) in self.fields.items():
                kept = values[name].to("cpu", dtype).contiguous()
                if dtype.is_floating_point and not bool(kept.isfinite().all()):
                    raise RunError(
                        f"model.source.dtype: the teacher's {name} do not fit into {str(dtype).removeprefix('torch.')}"
                        "; give bfloat16 or float32"
                    )
                with (self.folder / f"{name}.bin").open("r+b") as file:
                    for start, block in zip(starts, kept.split(counts), strict=True):
                        file.seek(start * width * dtype.itemsize)
                        file.write(block.flatten().view(torch.uint8).numpy().data)
                    _flush(file)
            shares = [float(block.mean()) for block in mass.cpu().float().split(counts)]
            with (self.folder / "kept.bin").open("r+b") as file:
                for unit, share in zip(units.tolist(), shares, strict=True):
                    file.seek(4 * unit)
                    file.write(np.float32(share).tobytes())
                _flush(file)
        except OSError as error:
            raise RunError(
                f"model.source.folder: {self.folder} cannot be written ({error.strerror}); what is there is kept"
            ) from error

    def read(self, tokens: Int[Tensor, " n"]) -> dict[str, Tensor]:
        """Looks up tokens by their number in the part; returns (n, width) by field."""
        return {name: mapped.index_select(0, tokens) for name, mapped in self._mapped.items()}

    @cached_property
    def _mapped(self) -> dict[str, Tensor]:
        return {
            name: torch.from_file(
                str(self.folder / f"{name}.bin"), shared=False, size=int(self.offsets[-1]) * width, dtype=dtype
            ).view(-1, width)
            for name, (dtype, width) in self.fields.items()
        }

    def _sizes(self) -> dict[str, int]:
        tokens = int(self.offsets[-1])
        sizes = {f"{name}.bin": tokens * width * dtype.itemsize for name, (dtype, width) in self.fields.items()}
        return {**sizes, "kept.bin": 4 * len(self.counts)}


class KeptTeacher(TeacherSource):
    """Base of sources that keep what the teacher said: a subclass says how it is asked (`describe`, `fill`).

    Args:
        folder: Where it is kept, a folder for each part of the data.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def attach(self, module: "TokenDistiller") -> None:
        """Finds out what is to be kept.

        Raises:
            UsageError: The method learns from text that is written during training, of which nothing can be kept.
        """
        if module.rollout is not None and module.needs_teacher:
            raise UsageError(
                f"model.source: {type(self).__name__} keeps what the teacher says of the data, and model.rollout "
                "replaces them by new text; leave one of them out"
            )
        self._module = [module]  # in a list, so that it does not become part of a module that holds this source
        self._stores: dict[str, TokenStore] = {}
        self._starts: dict[str, Tensor] = {}  # number of the scored token that each row starts with, by part
        self.described = self.describe(module)

    def prepare(self) -> None:
        """Opens the parts that a fit or a test asks for, and makes what is missing of them."""
        trainer, data = self.module.trainer, self.module._data()
        if trainer.testing:
            self.opened("test")
            return
        if self.module.needs_teacher:
            self.opened("train")
        if trainer.limit_val_batches and data.has_part("val"):
            self.opened("val")

    @property
    def module(self) -> "TokenDistiller":
        """The module that learns from this source."""
        return self._module[0]

    @abstractmethod
    def describe(self, module: "TokenDistiller") -> dict[str, Any]:
        """Returns what the values depend on beside the data."""

    @abstractmethod
    def fields(self) -> Fields:
        """Returns what is kept of a token."""

    @abstractmethod
    def units(self, part: str) -> Int[Tensor, " u"]:
        """Returns the scored tokens of each unit of a part; what is asked for is asked for a unit at a time."""

    @abstractmethod
    def fill(self, part: str, store: TokenStore, missing: Int[Tensor, " m"]) -> None:
        """Writes this process's share of the missing units."""

    def read(self, batch: TokenBatch, part: str) -> dict[str, Tensor]:
        """Looks up the scored tokens of a batch; returns (N, width) by field, on the batch's device."""
        store = self.opened(part)
        scored = self.module._data().part(part).rows.scored
        if part not in self._starts:
            self._starts[part] = F.pad(scored.cumsum(0), (1, 0))
        index = batch.index
        counts = scored[index]
        ends = counts.cumsum(0)
        tokens = torch.arange(int(ends[-1])) + (self._starts[part][index] - ends + counts).repeat_interleave(counts)
        if len(tokens) != len(batch.scored):
            raise RuntimeError(f"a batch scores {len(batch.scored)} tokens, its rows have {len(tokens)}")
        return {name: sent(value, batch.input_ids.device) for name, value in store.read(tokens).items()}

    def opened(self, part: str) -> TokenStore:
        """Opens a part, and makes what is missing of it. Called by all processes.

        Raises:
            UsageError: It was made from something else; the message names the first differing field.
        """
        if part in self._stores:
            return self._stores[part]
        module = self.module
        described = module._data().fingerprint(part)
        for field in ("samples", "data"):  # they differ with all others, which tell more: last
            described[field] = described.pop(field)
        store = TokenStore(self.folder / part, {**self.described, **described}, self.units(part), self.fields())
        waiting = f"teacher's outputs: waiting for another run that writes {store.folder}"
        with alone(store.folder, waiting) if module.trainer.is_global_zero and not store.whole() else nullcontext():
            self._complete(part, store)
        kept = torch.from_numpy(store.kept())
        mass = float((kept.double() * store.counts).sum() / store.counts.sum())
        k = self.described["k"]
        rank_zero_info(
            f"teacher's outputs in {store.folder}: {int(store.counts.sum()):,} tokens of {store.bytes_per_token:,} "
            f"bytes" + ("" if k is None else f"; the {k} most probable hold {mass:.2%} of the probability")
        )
        if k is not None:
            for logger in module.loggers:
                logger.log_metrics({f"{part}/captured_mass": mass}, step=module.trainer.global_step)
        self._stores[part] = store
        return store

    def _complete(self, part: str, store: TokenStore) -> None:
        strategy = self.module.trainer.strategy
        if self.module.trainer.is_global_zero:
            store.create()
        strategy.barrier()
        store.check()
        missing = store.missing()
        strategy.barrier()  # nobody writes before all have read what is missing
        if len(missing):
            self.fill(part, store, missing)
            strategy.barrier()


class CachedTeacher(KeptTeacher):
    """The teacher runs once over each part of the data that is asked for, and what it said is kept on disk.

    "hidden" keeps the last hidden state of each scored token and, once, the head: the teacher's whole distribution, at
    any temperature, in 2 H bytes a token (16 bits). Rounding is at most 2^-11 of an entry in float16 and 2^-8 in
    bfloat16, and none in the type that the teacher computes in.

    "top_k" keeps the k most probable tokens and their log-probabilities over the whole vocabulary, in 4 k bytes a token
    up to 65,536 tokens and 6 k beyond (16 bits). float16 is right for them: it puts a probability off by at most 0.05 %
    if its log is above -2, and by 0.8 % at -20, where bfloat16 is off by 6.5 %. How much of the probability the k
    tokens hold is logged as `<part>/captured_mass`.

    Writing takes the memory of one batch, goes on where it was interrupted, and runs the teacher in the type of its
    weights, whatever `trainer.precision`. When all is there, `model.teacher` may be left out. What was made from other
    weights, another tokenizer, other data or another order of rows is refused.

    Under several processes each makes its share, and all read all: the folder must be one that all of them see.

    Args:
        folder: Where it is kept, a folder for each part of the data.
        keep: "hidden" or "top_k".
        k: Tokens kept with "top_k".
        dtype: "float16", "bfloat16" or "float32", of hidden states or log-probabilities.
        batch_size: Rows that the teacher runs on at a time, in each process.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: Literal["hidden", "top_k"] = "hidden",
        k: int = 128,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        batch_size: int = 8,
    ) -> None:
        super().__init__(folder)
        check_least("model.source", 1, k=k, batch_size=batch_size)
        self.keep = keep
        self.k = k
        self.dtype = dtype
        self.batch_size = batch_size
        self._head: Tensor | None = None

    def describe(self, module: "TokenDistiller") -> dict[str, Any]:
        """Describes the teacher, or takes from what is kept how it was described."""
        teacher: dict[str, Any]
        if module.teacher is not None:
            # Here, since hashing takes whole weights, and they are sharded later.
            teacher = {"teacher": weights_fingerprint(module.teacher), "width": module.teacher.hidden_size}
        else:
            manifests = sorted(self.folder.glob("*/manifest.json"))
            if not manifests:
                raise UsageError(
                    f"model.source.folder: {self.folder} holds no outputs of a teacher, and there is no model.teacher "
                    "to make them; give it, or name the folder that holds them"
                )
            found = read_manifest(manifests[0])
            teacher = {key: found.get(key) for key in ("teacher", "width")}
            size = found.get("vocab_size", 0)
            if not module._data().vocab_size <= size <= module.vocab_size:
                raise stale(manifests[0].parent, "vocab_size", size, module.vocab_size)
            module.vocab_size = size  # what the student has beyond is padding
        if self.keep == "top_k":
            check_k(self.k, module.vocab_size)
        return {
            "keep": self.keep,
            "k": self.k if self.keep == "top_k" else None,
            "dtype": self.dtype,
            **teacher,
            "vocab_size": module.vocab_size,
        }

    def fields(self) -> Fields:
        """Returns hidden states, or tokens and log-probabilities."""
        dtype = getattr(torch, self.dtype)
        if self.keep == "hidden":
            return {"hidden": (dtype, self.described["width"])}
        return topk_fields(self.k, self.module.vocab_size, dtype)

    def units(self, part: str) -> Int[Tensor, " u"]:
        """Counts by row."""
        scored: Tensor = self.module._data().part(part).rows.scored
        return scored

    def signal(self, batch: TokenBatch, part: str) -> Signal:
        """Looks up what the teacher said."""
        kept = self.read(batch, part)
        if self.keep == "top_k":
            return TopK(kept["ids"].long(), kept["logprobs"].float())
        device = batch.input_ids.device
        if self._head is None or self._head.device != device:
            self._head = self._read_head().to(device)
        return HiddenSignal(kept["hidden"].to(self._head.dtype), self._head)

    @torch.no_grad()
    def fill(self, part: str, store: TokenStore, missing: Int[Tensor, " m"]) -> None:
        """Runs the teacher on this process's share of the missing rows."""
        module, data = self.module, self.module._data()
        if module.teacher is None:
            raise UsageError(
                f"model.source.folder: {store.folder} lacks {len(missing)} of {len(store.counts)} rows, and there is "
                "no model.teacher to make them; give it"
            )
        if self.keep == "hidden" and self._head_file.exists():
            self._read_head()  # refused before anything is computed
        rank, world_size = module.global_rank, module.trainer.world_size
        # A sharded teacher runs equally often everywhere: shares are of one size, and the last ones overlap.
        size = -(-len(missing) // world_size)
        start = min(rank * size, len(missing) - size)
        rows = data.part(part).rows
        with tqdm(total=size, desc=f"teacher on {part}", unit="row", leave=False, disable=rank > 0) as bar:
            for index in missing[start : start + size].split(self.batch_size):
                input_ids, position_ids, scored, targets = rows.gather(index, data.padding)
                batch = module.trainer.strategy.batch_to_device(
                    TokenBatch(input_ids, position_ids, scored, targets, index, len(targets))
                )
                with torch.autocast(batch.input_ids.device.type, enabled=False):
                    values, mass = module.teacher(batch.input_ids, batch.position_ids, batch.scored, score=self._said)
                store.write(index, values, mass)
                bar.update(len(index))

    def _said(self, hidden: Float[Tensor, "n h"], weight: Float[Tensor, "v h"]) -> tuple[dict[str, Tensor], Tensor]:
        """Returns what is kept of each token, and how much of its probability that is."""
        weight = weight[: self.module.vocab_size]
        if self.keep == "hidden":
            if self.module.trainer.is_global_zero and not self._head_file.exists():
                self._write_head(weight)
            return {"hidden": hidden}, torch.ones(len(hidden))
        found = [
            F.linear(hidden[part], weight).float().log_softmax(-1).topk(self.k)
            for part in slices(len(hidden), len(weight))
        ]
        logprobs = torch.cat([values for values, _ in found])
        return {"ids": torch.cat([ids for _, ids in found]), "logprobs": logprobs}, logprobs.exp().sum(-1)

    # ---- the head --------------------------------------------------------------------------------------------------

    @property
    def _head_file(self) -> Path:
        return self.folder / "head.safetensors"

    def _write_head(self, weight: Float[Tensor, "v h"]) -> None:
        made_from = {key: self.described[key] for key in ("teacher", "vocab_size")}
        with atomic_path(self._head_file) as path:
            save_file({"head": weight.contiguous().cpu()}, path, metadata={"made_from": json.dumps(made_from)})

    def _read_head(self) -> Float[Tensor, "v h"]:
        try:
            with safe_open(self._head_file, framework="pt") as file:
                for field, value in json.loads(file.metadata()["made_from"]).items():
                    if value != self.described[field]:
                        raise stale(self.folder, field, value, self.described[field])
                head: Tensor = file.get_tensor("head")
                return head
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise damaged(self._head_file, str(error).partition("\n")[0], self.folder) from error


def topk_fields(k: int, vocab_size: int, dtype: torch.dtype) -> Fields:
    """Returns how the most probable tokens are kept: numbers in the smallest type that holds the vocabulary."""
    return {"ids": (torch.uint16 if vocab_size <= 2**16 else torch.int32, k), "logprobs": (dtype, k)}


def check_k(k: int, vocab_size: int) -> None:
    """Checks that there are as many tokens.

    Raises:
        UsageError: There are not.
    """
    if k > vocab_size:
        raise UsageError(f"model.source.k is {k}, but the vocabulary has {vocab_size} tokens; lower it")


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads what outputs were made from.

    Raises:
        RunError: The file is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, str(error).partition("\n")[0]) from error


def stale(folder: Path, field: str, found: Any, wanted: Any) -> UsageError:
    """Returns the error of outputs that were made from something else."""
    return UsageError(
        f"model.source.folder: {folder} is stale: {field} was {found}, now {wanted}; go back to it, or name another "
        "folder, and it is made anew"
    )


def damaged(path: Path, reason: str, folder: Path | None = None) -> RunError:
    """Returns the error of files that cannot be read."""
    return RunError(
        f"model.source.folder: {path} is damaged ({reason}); delete {folder or path.parent}, and it is made anew"
    )


def _flush(file: Any) -> None:
    """Brings what was written to the disk, so that what follows it is never there without it."""
    file.flush()
    os.fsync(file.fileno())
