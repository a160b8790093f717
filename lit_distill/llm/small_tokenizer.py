"""A small tokenizer without a download, for students that have another one than their teacher.

    python -m lit_distill.llm.small_tokenizer models/tokenizer1k

writes a folder that `AutoTokenizer` loads: byte-level pairs (BPE), learned from the topics of Python's `help`.
"""

import argparse
import sys
from pathlib import Path

from lit_distill.core.errors import RunError, UsageError, check_least


def small_tokenizer(folder: str | Path, size: int = 1024) -> Path:
    """Writes the tokenizer, unless there is one in the folder already.

    Args:
        folder: Where to, such as models/tokenizer1k.
        size: Tokens, the end of text and 256 bytes among them.

    Returns:
        The folder.

    Raises:
        UsageError: `size` leaves no room for the bytes, or the folder holds something else.
        RunError: The folder cannot be written.
    """
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return folder
    check_least("tokenizer", 257, size=size)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UsageError(f"small_tokenizer: {folder} holds something else; name a new folder")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    try:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}; choose another") from error
    return folder


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_distill.llm.small_tokenizer",
        description="Writes a small tokenizer, learned from the topics of Python's help.",
    )
    parser.add_argument("folder", help="where to write, such as models/tokenizer1k")
    parser.add_argument("--size", type=int, default=1024, help="tokens (1024)")
    options = parser.parse_args()
    try:
        print(small_tokenizer(options.folder, options.size))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
