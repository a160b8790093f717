"""What can be said of the images without building them: hadolint, and the facts that a build would stumble over."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker/Dockerfile"
COMPOSE = ROOT / "docker/compose.yaml"
TARGETS = ("cpu", "cuda")
SECRET = re.compile(r"key|token|secret|passw", re.IGNORECASE)


def read_stages():
    """Stage name -> its (instruction, words), those of the stages that it stands on first."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages = {}
    for line in filter(str.strip, text.splitlines()):
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = [*stages.get(base, [("FROM", base)])]
        else:
            stages[name].append((instruction, " ".join(rest.split())))
    return stages


@pytest.fixture(scope="module")
def stages():
    return read_stages()


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def given(stage, instruction):
    return [rest for name, rest in stage if name == instruction]


def copied(stage):
    """What a stage takes from the context."""
    words = [shlex.split(rest) for rest in given(stage, "COPY")]
    return [source for each in words if not each[0].startswith("--from") for source in each[:-1]]


def ignored(path):
    """Whether .dockerignore keeps a path out of the context: the last pattern that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not pattern or pattern.startswith("#"):
            continue
        parts = Path(path).parts
        names = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        names = [Path(name).name for name in names] if "**/" in line else names
        if any(fnmatch(name, pattern) for name in names):
            out = not line.startswith("!")
    return out


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed (extra 'dev')")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_base_is_pinned_by_version(stages):
    bases = {rest for stage in stages.values() for rest in given(stage, "FROM")}
    assert bases
    for base in bases:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", base), base


@pytest.mark.parametrize("target", TARGETS)
def test_targets_start_the_command_as_a_user(stages, project, target):
    assert int(given(stages[target], "USER")[-1]) > 0
    (entry,) = given(stages[target], "ENTRYPOINT")
    assert yaml.safe_load(entry) == ["lit-distill"]  # a list: signals reach the command, not a shell
    assert "lit-distill" in project["project"]["scripts"]


def test_what_is_copied_is_there_and_in_the_context(stages):
    sources = {source for stage in stages.values() for source in copied(stage)}
    assert {"pyproject.toml", "lit_distill", "configs"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source


@pytest.mark.parametrize("path", [".env", "docker/.env", ".git/config", "runs/x/config.yaml", "data/x", "models/x"])
def test_the_context_holds_nothing_private(path):
    assert ignored(path)


def test_the_context_leaves_caches_out():
    assert ignored("lit_distill/core/__pycache__/x.pyc")
    assert not ignored("lit_distill/core/distiller.py")


def test_the_wheel_has_all_its_parts(stages, project):
    metadata = project["project"]
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    parts = [metadata["readme"], *metadata["license-files"], *wheel["packages"], *wheel["force-include"]]
    assert set(parts) <= set(copied(stages["wheel"]))


@pytest.mark.parametrize("target", TARGETS)
def test_dependencies_do_not_change_with_the_source(stages, project, target):
    stage = stages[f"dependencies-{target}"]
    assert copied(stage) == ["pyproject.toml"]
    assert any(f"--from=dependencies-{target} " in rest for rest in given(stages[target], "COPY"))
    arguments = dict(rest.replace('"', "").split("=", 1) for rest in given(stage, "ARG"))
    extras = arguments["EXTRAS"].replace("--extra ", "").split()
    assert extras
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    wanted = {Requirement(each).name: Requirement(each).specifier for each in project["project"]["dependencies"]}
    for name in ("torch", "torchvision"):
        assert Version(arguments[f"{name}_VERSION".upper()]) in wanted[name]
    small = [rest for rest in given(stage, "RUN") if "torch==" in rest and "--torch-backend=cpu" in rest]
    assert len(small) == (1 if target == "cpu" else 0)


def test_no_secret_is_written_down(stages, services):
    settings = [rest for stage in stages.values() for kind in ("ARG", "ENV") for rest in given(stage, kind)]
    names = [word.partition("=")[0] for rest in settings for word in shlex.split(rest)]
    assert [name for name in names if SECRET.search(name)] == []
    found = {key: value for service in services.values() for key, value in service["environment"].items()}
    assert {key: value for key, value in found.items() if SECRET.search(key)} == {"WANDB_API_KEY": None}


def test_services_build_targets_that_exist(services, stages):
    for service in services.values():
        build = service["build"]
        context = (COMPOSE.parent / build["context"]).resolve()
        assert context == ROOT
        assert context / build["dockerfile"] == DOCKERFILE
        assert build["target"] in TARGETS
        assert service["image"] == f"lit-distill:{build['target']}"


def test_services_keep_runs_and_data_on_the_host_as_their_user(services):
    for service in services.values():
        mounts = dict(mount.split(":")[:2] for mount in service["volumes"])
        assert {"../runs": "/workspace/runs", "../data": "/workspace/data"}.items() <= mounts.items()
        assert all(re.fullmatch(r"\.\./\w+", source) for source in mounts)  # of the repository, whatever stands there
        assert re.fullmatch(r"\$\{HOST_UID:-[1-9]\d*\}:\$\{HOST_GID:-[1-9]\d*\}", service["user"])


def test_the_agent_has_a_gpu_and_the_cpu_service_none(services):
    (device,) = services["agent"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert device["driver"] == "nvidia"
    assert services["agent"]["entrypoint"] == ["wandb", "agent"]
    assert "deploy" not in services["cpu"]
    assert "entrypoint" not in services["cpu"]
