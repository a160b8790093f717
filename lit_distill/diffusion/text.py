"""Text: prompts, embedded once, as data for generators; and what they make of them."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lit_distill.core.cache import TeacherCache, weights_fingerprint
from lit_distill.core.data import EpochDataModule
from lit_distill.core.errors import UsageError
from lit_distill.core.files import atomic_path
from lit_distill.core.loading import EpochLoader, TensorLoader
from lit_distill.diffusion.autoencoder import Autoencoder
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.evaluation import PICTURE, GenerationEvaluation

# What `encode_prompt` of each pipeline returns, by the names under which networks take it; None is not wanted.
_OUTPUTS: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": ("encoder_hidden_states",),
    "StableDiffusionXLPipeline": ("encoder_hidden_states", None, "text_embeds"),
    "StableDiffusion3Pipeline": ("encoder_hidden_states", None, "pooled_projections"),
    "PixArtAlphaPipeline": ("encoder_hidden_states", "encoder_attention_mask"),
    "WanPipeline": ("encoder_hidden_states",),
    "FluxPipeline": ("encoder_hidden_states", "pooled_projections"),
    "Lumina2Pipeline": ("encoder_hidden_states", "encoder_attention_mask"),
}
# What else it asks for. All encoders of one are given the same prompt.
_UNGUIDED = {"do_classifier_free_guidance": False}
_WORDS: dict[str, dict[str, Any]] = {
    "StableDiffusion3Pipeline": {"num_images_per_prompt": 1, "prompt_2": None, "prompt_3": None, **_UNGUIDED},
    "WanPipeline": {"num_videos_per_prompt": 1, "max_sequence_length": 512, **_UNGUIDED},
    "FluxPipeline": {"max_sequence_length": 512},
}
_READ = ("text_encoder", "tokenizer")  # and what is numbered after these


class TextBatch(NamedTuple):
    """A batch of prompts.

    Attributes:
        condition: (b, ...) by name, what a text encoder makes of them.
        index: (b,) int64 positions in the data set part.
        images: (b, c, h, w) real samples that belong to them; none where there are prompts alone.
        negative: (b, ...) by name, of prompts that say what is not wanted, where there are such.
    """

    condition: dict[str, Tensor]
    index: Int[Tensor, " b"]  # type: ignore[assignment]  # tuple has a method of this name; nobody searches a batch
    images: Tensor | None = None
    negative: dict[str, Tensor] | None = None


class TextEncoder:
    """Makes of prompts what networks are conditioned on, the way the pipeline in a folder of diffusers does.

    Args:
        folder: Folder of the pipeline of Stable Diffusion (1 and 2, XL, 3), PixArt-alpha, Wan, Flux.1 or Lumina 2, or
            its name where it is in the local cache. Nothing is downloaded; of the pipeline, tokenizers and text
            encoders are read.
        batch_size: Prompts at once.
        resolution: Pixels of each side of the images, which Stable Diffusion XL is told besides.
        guidance: Scale that Flux.1-dev, which learned its own guidance, is told besides; its pipeline's is 3.5.
    """

    def __init__(
        self, folder: str, batch_size: int = 64, resolution: int | None = None, guidance: float | None = None
    ) -> None:
        self.folder, self.batch_size, self.resolution, self.guidance = folder, batch_size, resolution, guidance

    def __call__(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Embeds prompts: (N, ...) by name, float32, on the CPU.

        Raises:
            UsageError: The folder has no text encoder, or is of a pipeline whose text is not known.
        """
        return self.embed(self.load(), prompts, device)

    @torch.no_grad()
    def embed(self, pipeline: Any, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The same with what `load` gave."""
        for encoder in encoders(pipeline).values():
            encoder.to(device).eval()
        kind = type(pipeline).__name__
        words = {"device": torch.device(device), **_WORDS.get(kind, {"num_images_per_prompt": 1, **_UNGUIDED})}
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(prompts), self.batch_size):
            some = list(prompts[start : start + self.batch_size])
            for name, value in zip(_OUTPUTS[kind], pipeline.encode_prompt(some, **words), strict=False):
                if name is not None:
                    parts.setdefault(name, []).append(value.float().cpu())
        found = {name: torch.cat(values) for name, values in parts.items()}
        if kind == "StableDiffusionXLPipeline":
            # Height and width of the original, corner of the crop, height and width of the target.
            size = float(self.resolution or 0)
            found["time_ids"] = torch.tensor([[size, size, 0.0, 0.0, size, size]]).expand(len(prompts), -1)
        if self.guidance is not None:
            found["guidance"] = torch.full((len(prompts),), self.guidance)
        return found

    def load(self) -> Any:
        """Reads tokenizer and text encoder, in a pipeline that has nothing else.

        Raises:
            UsageError: See `__call__`.
        """
        from diffusers import DiffusionPipeline

        try:
            config = DiffusionPipeline.load_config(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"data.text: {self.folder} is no pipeline of diffusers on this machine (model_index.json is missing); "
                "nothing is downloaded, put it there"
            ) from error
        name = config["_class_name"]
        if name not in _OUTPUTS:
            raise UsageError(f"data.text: the text of a {name} is not known; known are {', '.join(_OUTPUTS)}")
        if name == "StableDiffusionXLPipeline" and self.resolution is None:
            raise UsageError("data.text.resolution: Stable Diffusion XL is told the size of images; give it in pixels")
        if name == "StableDiffusion3Pipeline" and config["text_encoder_3"][0] is None:
            raise UsageError(f"data.text: {self.folder} has no text_encoder_3 (T5); take a folder that has all three")
        local = Path(self.folder)
        parts = [key for key, value in config.items() if isinstance(value, list | tuple) and len(value) == 2]
        read = [key for key in parts if key.rstrip("_0123456789") in _READ and config[key][0] is not None]
        # transformers makes an empty tokenizer where there is none.
        if local.is_dir() and not all((local / part).is_dir() for part in {*read, *_READ}):
            raise self._missing()
        unused: dict[str, Any] = {part: None for part in parts if part not in read}
        try:
            return DiffusionPipeline.from_pretrained(self.folder, local_files_only=True, **unused)
        except (OSError, ValueError) as error:
            raise self._missing() from error

    def _missing(self) -> UsageError:
        return UsageError(f"data.text: {self.folder} has no text encoder, or no tokenizer for it; put both there")


def encoders(pipeline: Any) -> dict[str, Any]:
    """Returns the text encoders of a pipeline by name."""
    return {key: part for key, part in pipeline.components.items() if "text_encoder" in key and part is not None}


def embedded(
    text: TextEncoder, prompts: Sequence[str], device: torch.device | str = "cpu", cache_file: Path | None = None
) -> dict[str, Tensor]:
    """Embeds prompts, or takes them from a file, which is written if there is none: (N, ...) by name.

    Args:
        text: The text encoder.
        prompts: N prompts.
        device: Where to embed them.
        cache_file: Safetensors file with float16, refused when prompts or text encoders are others.
    """
    pipeline = text.load()
    if cache_file is None:
        return text.embed(pipeline, prompts, device)
    described = {
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        **{name: weights_fingerprint(encoder) for name, encoder in encoders(pipeline).items()},
    }
    if not cache_file.is_file():
        parts = torch.arange(len(prompts)).split(text.batch_size)
        batches = ((index, text.embed(pipeline, [prompts[i] for i in index.tolist()], device)) for index in parts)
        TeacherCache.write(cache_file, described, batches, size=len(prompts), dtype=torch.float16)
    return TeacherCache.open(cache_file, described).outputs


class TextTable:
    """Embedded prompts by number.

    Args:
        embedded: (N, ...) by name.
    """

    def __init__(self, embedded: Mapping[str, Tensor]) -> None:
        self.embedded = dict(embedded)

    def __call__(self, rows: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """Returns prompts (b, ...) by name, float32, where the numbers are."""
        index = rows.cpu()
        return {name: value.index_select(0, index).float().to(rows.device) for name, value in self.embedded.items()}


class _PromptPart(NamedTuple):
    labels: Int[Tensor, " n"]  # rows in the table


class Prompts(EpochDataModule[_PromptPart]):
    """Prompts without images: data for methods that need none.

    All prompts are embedded once, at the start, or taken from a file. An embedding of Stable Diffusion 2 has
    77 x 1024 numbers: 154 kB a prompt in the file (float16), twice that in memory where there is no file.

    Args:
        prompts: Text file, a prompt per line.
        text: Makes conditions of them.
        autoencoder: Decodes what is generated, and gives the latents' shape.
        resolution: Pixels of each side of an image.
        test_prompts: Text file of prompts to show at the end; the first of `prompts` if None.
        negative_prompts: Text file of prompts that say what is not wanted; each sample gets one at random.
        cache_file: Safetensors file to keep embeddings in, and to take them from.
        batch_size: Prompts per step over all processes.
        eval_batch_size: Prompts per evaluation step over all processes.
        seed: Seed of the order. None takes the run's.

    Raises:
        UsageError: The resolution does not fit the autoencoder; later, a file is missing or empty, or the text encoder
            is.
    """

    num_classes = 0
    classes = ()

    def __init__(
        self,
        prompts: str,
        text: TextEncoder,
        autoencoder: Autoencoder,
        resolution: int = 512,
        test_prompts: str | None = None,
        negative_prompts: str | None = None,
        cache_file: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        self.files = {"prompts": prompts, "test_prompts": test_prompts, "negative_prompts": negative_prompts}
        self.text = text
        self.autoencoder = autoencoder
        self.cache_file = None if cache_file is None else Path(cache_file)
        self.sample_shape = autoencoder.shape(resolution)

    def read_parts(self) -> dict[str, _PromptPart]:
        """Reads the prompts and embeds each that differs once."""
        found = {key: _lines(key, file) for key, file in self.files.items() if file is not None}
        self.prompts = list(dict.fromkeys(["", *(line for lines in found.values() for line in lines)]))
        row = {prompt: number for number, prompt in enumerate(self.prompts)}
        rows = {key: torch.tensor([row[line] for line in lines]) for key, lines in found.items()}
        self.table = TextTable(embedded(self.text, self.prompts, self._placement()[2], self.cache_file))
        self._negative = rows.get("negative_prompts")
        train = rows["prompts"]
        test = rows.get("test_prompts", train[: self.eval_batch_size])
        return {"train": _PromptPart(train), "test": _PromptPart(test)}

    def no_part(self, name: str) -> str:
        """See `EpochDataModule`."""
        return f"data: prompts have no part '{name}'; there are train and test"

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part. It stays on the CPU, where the embeddings are; batches go to the device."""
        rows = self.part(part).labels
        tensors, transforms = {"rows": rows}, {}
        if training and self._negative is not None:
            tensors["negative"] = rows
            transforms["negative"] = _AnyOf(self._negative)
        return TensorLoader(tensors, make_batch=self._batch, transforms=transforms, device="cpu", **sampling)

    def _batch(self, rows: Tensor, index: Tensor, negative: Tensor | None = None) -> TextBatch:
        return TextBatch(self.table(rows), index, negative=None if negative is None else self.table(negative))

    @property
    def caption_count(self) -> int:
        """Number of training prompts."""
        return self.part_size("train")

    def captions(self, labels: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """Returns training prompts by number, embedded."""
        return self.table(self.part("train").labels.to(labels.device)[labels])

    def null_condition(self) -> dict[str, Tensor]:
        """Returns the embedding of the empty prompt, (1, ...) by name."""
        self.setup()
        return self.table(torch.zeros(1, dtype=torch.long))

    def pixels(self, samples: Tensor) -> Tensor:
        """Returns generated latents as pixels in [0, 1]."""
        return (self.autoencoder.decode(samples) / 2 + 0.5).clamp(0, 1)


class _AnyOf:
    """Replaces rows by random ones of some."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.rows), (count, 1), generator=generator)

    def __call__(self, values: Tensor, draws: Tensor) -> Tensor:
        return self.rows[draws[:, 0]]


class PromptEvaluation(GenerationEvaluation):
    """Makes pictures of the test prompts. There are no real ones to compare with, so nothing judges them.

    - `nfe`, `images_per_second`: as of `GenerationEvaluation`; without the autoencoder.
    - `std`: standard deviation of the latents; shows collapse.

    Args:
        samples: Pictures.
        batch_size: Samples at once.
        columns: Pictures in a row.
    """

    def __init__(self, samples: int = 16, batch_size: int = 4, columns: int = 4) -> None:
        super().__init__(samples=samples, batch_size=batch_size, columns=columns)

    def __call__(self, module: Any, data: Any, part: str) -> dict[str, float]:
        """See `GenerationEvaluation`. Every process makes the same pictures.

        Raises:
            UsageError: The data are not prompts.
        """
        if not isinstance(data, Prompts):
            raise UsageError(f"model.evaluation: {type(data).__name__} has no prompts; take GenerationEvaluation")
        rows = data.part(part).labels[: self.samples]
        draws, parts = Draws(0, module.device), []
        was_training = module.student.training
        module.student.eval()
        begun = time.perf_counter()
        for own in rows.split(self.batch_size):
            condition = data.table(own.to(module.device))
            parts.append(module.generate(condition, draws.normal((len(own), *data.sample_shape)), draws).float())
        made = torch.cat(parts)
        if made.is_cuda:
            torch.cuda.synchronize(module.device)
        speed = len(made) / (time.perf_counter() - begun)
        module.student.train(was_training)
        self._show_prompts(module, data, made, [data.prompts[row] for row in rows.tolist()])
        return {"nfe": float(module.sampler.evaluations()), "images_per_second": speed, "std": float(made.std())}

    def _show_prompts(self, module: Any, data: Prompts, made: Tensor, prompts: list[str]) -> None:
        if not module.trainer.is_global_zero or not module.trainer.log_dir:
            return
        from torchvision.utils import make_grid, save_image

        with atomic_path(Path(module.trainer.log_dir) / PICTURE) as file:
            save_image(make_grid(data.pixels(made), nrow=self.columns, padding=1), file, format="png")
        module.panels["samples"] = {
            "file": PICTURE,
            "title": f"samples, {module.sampler.evaluations()} evaluations each",
            "summary": "In rows from the left, from noise that is the same in all runs.",
            "head": ["prompt"],
            "rows": [[prompt] for prompt in prompts],
        }


def _lines(key: str, file: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.{key}: {file} cannot be read as text; give a file with a prompt per line") from error
    if not any(lines):
        raise UsageError(f"data.{key}: {file} has no prompts; give a file with a prompt per line")
    return [line for line in lines if line]
