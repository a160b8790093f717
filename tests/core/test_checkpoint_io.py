import os

import pytest
import torch

from lit_distill.core.checkpoint_io import AtomicCheckpointIO
from lit_distill.core.errors import RunError


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(3), "n": 5}, path)
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert found["a"].tolist() == [0, 1, 2]
    assert found["n"] == 5


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"n": 1}, path)

    def full_disk(checkpoint, target):
        with open(target, "wb") as file:  # noqa: PTH123
            file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file\nframes")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(RunError, match=r"cannot write .*last\.ckpt: .*PytorchStreamWriter"):
        io.save_checkpoint({"n": 2}, path)
    assert io.load_checkpoint(path) == {"n": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_truncated_checkpoint_is_a_run_error_of_one_line(tmp_path, keep):
    path = tmp_path / "last.ckpt"
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match=r"ckpt_path: .*last\.ckpt cannot be read") as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"a": os.system}, tmp_path / "evil.ckpt")
    with pytest.raises(RunError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")
