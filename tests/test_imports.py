"""What an import costs, in a fresh interpreter, and that nothing fails to import."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import lit_distill

HEAVY = (
    *("torch", "lightning", "numpy", "transformers", "diffusers", "torch_geometric", "timm", "wandb", "plotly"),
    *("datamol", "rdkit"),
)


def loaded_after(code):
    """Returns which heavy packages a fresh interpreter holds after running the code."""
    report = f"import sys; print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("HEAVY")[2].split()


@pytest.mark.parametrize(
    "code",
    [
        "import lit_distill, lit_distill.cli",
        "import lit_distill.core, lit_distill.core.errors, lit_distill.core.reference, lit_distill.core.files",
        "import lit_distill.image",
        "import lit_distill.graph",
        "import lit_distill.diffusion",
        "from lit_distill.cli import main; main(['methods'])",
        "from lit_distill.cli import main; main(['--help'])",
        "from lit_distill.cli import main; main(['fitt'])",
    ],
)
def test_no_torch_is_imported_for_what_needs_none(code):
    assert loaded_after(code) == []


def test_the_image_domain_pulls_no_other_domains_libraries():
    loaded = loaded_after("from lit_distill.image import KD, MNIST5kDataModule")
    assert "torch" in loaded
    # Not in the list: transformers, which torchmetrics imports by itself where it is installed.
    assert not {"diffusers", "torch_geometric", "timm", "wandb", "plotly"} & set(loaded)


def test_the_graph_domain_pulls_no_other_domains_libraries():
    loaded = loaded_after("from lit_distill.graph import GraphClassifier, Mirage, TUDataModule")
    assert "torch" in loaded
    assert not {"diffusers", "timm", "wandb", "plotly", "datamol", "rdkit"} & set(loaded)


def test_every_module_imports():
    names = [module.name for module in pkgutil.walk_packages(lit_distill.__path__, "lit_distill.")]
    names = [name for name in names if not name.endswith("__main__")]
    assert len(names) > 40
    for name in names:
        importlib.import_module(name)


@pytest.mark.parametrize(
    "package",
    ["lit_distill.core", "lit_distill.diffusion", "lit_distill.graph", "lit_distill.image", "lit_distill.losses"],
)
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if getattr(module, name, None) is None] == []
    with pytest.raises(AttributeError, match="Nothing"):
        module.Nothing  # noqa: B018 (the access is the test)
