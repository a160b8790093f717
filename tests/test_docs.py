"""What the documents say is there: links lead somewhere, commands parse, files that are named exist."""

import re
import shlex
from pathlib import Path

import pytest

from lit_distill.cli import main
from lit_distill.experiment.launch import DistillCLI

ROOT = Path(__file__).parents[1]
FOLDERS = (".", ".github", "benchmarks", "docs", "lit_distill", "configs", "sweeps", "docker", "tests")
DOCUMENTS = sorted(
    {path for folder in FOLDERS for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")}
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:\blit-distill|-m lit_distill) ((?:--)?[a-z].*)")
CONFIG = re.compile(r"\bconfigs/[\w/]+\.yaml")
ANY_METHOD = "configs/image/kd_small.yaml"


def name(path):
    return path.relative_to(ROOT).as_posix()


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def written_by(text):
    """Returns the files a document asks its reader to write: code blocks that begin with a comment that is a path."""
    blocks = {}
    for _, body in FENCE.findall(text):
        if found := re.match(r"# ([\w/.]+\.(?:yaml|py))\n", body):
            blocks[found[1]] = body
    return blocks


def commands():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for language, body in FENCE.findall(text):
            if language in ("", "sh", "bash", "console"):
                for line in body.replace("\\\n", " ").splitlines():
                    if found := COMMAND.search(line.partition("  #")[0]):
                        yield pytest.param(path, found[1], id=f"{name(path)}: {found[1][:70]}")


@pytest.fixture
def parse_only(monkeypatch):
    """Makes every command stop behind the reading of its words."""
    for step in ("before_instantiate_classes", "instantiate_classes"):
        monkeypatch.setattr(DistillCLI, step, lambda cli: None)
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, _: None)
    from lit_distill.experiment.recipe import read_recipe

    monkeypatch.setattr("lit_distill.experiment.compare.compare", lambda **_: 0)
    monkeypatch.setattr("lit_distill.experiment.export.export", lambda **_: 0)
    from lit_distill.experiment.sweep.file import read_sweep

    monkeypatch.setattr("lit_distill.experiment.sweep.run_sweep", lambda file, **_: 0 if read_sweep(file) else 1)
    # Its networks may be those of a hub; the rest of its words is read as by fit.
    monkeypatch.setattr("lit_distill.experiment.memory.memory", lambda words, devices: main(["fit", *words]))
    monkeypatch.setattr("lit_distill.experiment.recipe.run_recipe", lambda recipe, **_: 0 if read_recipe(recipe) else 1)


def test_there_are_documents_and_commands():
    assert {"README.md", "CONTRIBUTING.md", "docs/tutorial.md"} <= {name(path) for path in DOCUMENTS}
    assert len(list(commands())) > 15


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_lead_somewhere(path):
    links = LINK.findall(without_code(path.read_text(encoding="utf-8")))
    local = [link.partition("#")[0] for link in links if not link.startswith(("https:", "http:", "mailto:", "#"))]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_configurations_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    missing = [file for file in CONFIG.findall(text) if not (ROOT / file).is_file()]
    assert set(missing) <= set(written_by(text))


@pytest.mark.parametrize(("path", "command"), commands())
def test_commands_parse(path, command, parse_only, tmp_path, monkeypatch, capsys):
    written = written_by(path.read_text(encoding="utf-8"))
    if any(file in command for file in written if file.startswith("configs/")):
        pytest.skip("trains the method that this document adds")
    for file, body in written.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if not (ROOT / file).exists():
            (tmp_path / file).write_text(body)
    for folder in ("configs", "sweeps"):
        if not (tmp_path / folder).exists():
            (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = shlex.split(command)
    for position, word in enumerate(words):
        # A finished run's own file, and any method's.
        if word == "METHOD.yaml" or (word.startswith("runs/") and word.endswith("/config.yaml")):
            words[position] = ANY_METHOD
    assert main(words) == 0, capsys.readouterr().err


def test_the_recipe_that_is_shown_is_one(tmp_path, monkeypatch):
    from lit_distill.experiment.recipe import read_recipe

    monkeypatch.chdir(ROOT)
    shown = [body for _, body in FENCE.findall((ROOT / "docs/recipes.md").read_text()) if "\nstages:\n" in body]
    (tmp_path / "shown.yaml").write_text(shown[0])
    recipe = read_recipe(str(tmp_path / "shown.yaml"))
    assert [(stage.name, len(stage.seeds)) for stage in recipe.stages] == [("teacher", 1), ("baseline", 5), ("kd", 5)]


def test_the_sweep_that_is_shown_is_one(tmp_path):
    from lit_distill.experiment.sweep.file import read_sweep

    shown = [body for lang, body in FENCE.findall((ROOT / "docs/sweeps.md").read_text()) if lang == "yaml"]
    (tmp_path / "shown.yaml").write_text(shown[0])
    sweep, whole = read_sweep(tmp_path / "shown.yaml"), read_sweep(ROOT / "sweeps/image/kd.yaml")
    assert (sweep.name, sweep.halving, sweep.run_cap) == (whole.name, whole.halving, whole.run_cap)
    assert set(sweep.command) <= set(whole.command)
    assert all(parameter in whole.parameters for parameter in sweep.parameters)


def test_the_code_of_the_walk_through_is_the_code_of_the_package():
    sources = [path.read_text() for folder in ("lit_distill", "tests") for path in (ROOT / folder).rglob("*.py")]
    blocks = [body for lang, body in FENCE.findall((ROOT / "docs/add-a-method.md").read_text()) if lang == "python"]
    assert len(blocks) == 4
    for block in blocks:
        assert any(block.rstrip() in source for source in sources), block.splitlines()[0]
