import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lit_distill.core.errors import RunError
from lit_distill.core.files import alone, atomic_folder, atomic_path, write_json, write_text


def test_a_block_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail():
        with atomic_path(target) as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_the_target_is_old_until_the_block_ends(tmp_path):
    target = tmp_path / "new" / "deep" / "a.txt"
    with atomic_path(target) as path:
        path.write_text("whole")
        assert not target.exists()
        assert path.parent == target.parent  # so that the move is not a copy
    assert target.read_text() == "whole"


def test_files_get_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_so_do_files_and_folders_of_writers_that_put_a_file_of_their_own_there(tmp_path):
    def write(path):  # as safetensors does
        other = path.with_suffix(".other")
        other.write_bytes(b"")
        other.chmod(0o600)
        other.replace(path)

    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a") as path:
            write(path)
        with atomic_path(tmp_path / "b.safetensors") as path:
            save_file({"x": torch.zeros(2)}, path)
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "deep").mkdir(parents=True)
            write(folder / "deep" / "c")
    finally:
        os.umask(before)
    for name in ("a", "b.safetensors", "folder/deep/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name
    for name in ("folder", "folder/deep"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o750, name


def test_a_folder_is_whole_or_absent(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "new" / "folder") as part:
            part.mkdir()
            (part / "a").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/folder"), atomic_folder(tmp_path / "file" / "folder"):
        pass


def test_json_is_what_json_reads(tmp_path):
    value = {"b": [1, 2.5, None, "ü"], "a": {"c": True}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert list(json.loads(text)) == ["b", "a"]
    assert text.endswith("}\n")


def test_a_folder_that_cannot_be_written_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/x\.txt"):
        write_text(tmp_path / "file" / "x.txt", "x")
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        write_text(tmp_path / "x.txt", "x")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "x.txt"]


HOLDS = """
import sys, time
from lit_distill.core.files import alone
with alone(sys.argv[1], "waits"):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
    print("out", flush=True)
"""


def holder(target, seconds):
    command = [sys.executable, "-c", HOLDS, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_waits_and_says_so(tmp_path, capsys):
    first = holder(tmp_path / "new" / "cache", 1.0)
    assert first.stdout.readline() == "in\n"
    with alone(tmp_path / "new" / "cache", "waits for the other"):
        assert first.stdout.readline() == "out\n"  # only then
    assert first.wait() == 0
    assert capsys.readouterr().out == "waits for the other\n"


def test_a_process_that_is_killed_lets_go(tmp_path, capsys):
    first = holder(tmp_path / "cache", 60)
    assert first.stdout.readline() == "in\n"
    first.kill()
    first.wait()
    with alone(tmp_path / "cache", "waits"):
        pass
    assert capsys.readouterr().out == ""


def test_a_block_that_fails_lets_go(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "cache", "waits"):
        raise ZeroDivisionError
    with alone(tmp_path / "cache", "waits"):
        pass
    assert capsys.readouterr().out == ""
