"""common.py: checkpoints; damage of every kind is noticed, and one good file always remains."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import common


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "model": {
            "a": torch.randn(40, 50, generator=generator),
            "b": torch.arange(step + 1),
            "h": torch.randn(9, generator=generator).bfloat16(),
        },
        "history": [{"loss": 0.5 * step, "name": "x"}, (1, None, True)],
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def names(folder: Path) -> set[str]:
    return {f.name for f in folder.iterdir()}


@pytest.fixture
def path(tmp_path) -> Path:
    """A checkpoint of step 2 whose predecessor is of step 1."""
    path = tmp_path / "ckpt.pt"
    common.save(path, state(1))
    common.save(path, state(2))
    return path


def test_round_trip(path, capsys):
    assert names(path.parent) == {"ckpt.pt", "ckpt.prev.pt"}
    loaded, used = common.load(path)
    assert used == path and same(loaded, state(2))
    assert same(common.load(str(common.previous(path)))[0], state(1))
    assert capsys.readouterr().err == ""


def test_without_keeping_the_previous(tmp_path):
    for step in (1, 2):
        common.save(tmp_path / "phase1.pt", state(step), keep_previous=False)
    assert names(tmp_path) == {"phase1.pt"} and common.load(tmp_path / "phase1.pt")[0]["step"] == 2


def test_exists(path):
    assert common.exists(path) and not common.exists(path.with_name("other.pt"))
    path.unlink()
    assert common.exists(path)  # the previous one is enough
    common.previous(path).unlink()
    assert not common.exists(path)


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("cannot be written")


@pytest.mark.parametrize("what", ["pickle", "write", "flush to disk", "first rename"])
def test_a_failing_save_keeps_the_old_files_and_leaves_none_of_its_own(path, monkeypatch, what):
    before = {f.name: f.read_bytes() for f in path.parent.iterdir()}
    new = state(3)

    def fail(*_, **__):
        raise OSError("no space left on device")

    if what == "pickle":
        new["bad"] = Unpicklable()
    elif what == "write":

        def half(_, file):
            file.write(b"half of it")
            fail()

        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, "fsync" if what == "flush to disk" else "replace", fail)
    with pytest.raises((OSError, RuntimeError)):
        common.save(path, new)
    assert {f.name: f.read_bytes() for f in path.parent.iterdir()} == before


def test_killed_between_the_renames_loads_the_previous(path, monkeypatch, capsys):
    real, calls = os.replace, []

    def second_fails(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        common.save(path, state(3))
    assert names(path.parent) == {"ckpt.prev.pt"}
    loaded, used = common.load(path)
    assert loaded["step"] == 2 and used == common.previous(path)
    assert "no such file" in capsys.readouterr().err


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def inside_tensor(path: Path) -> int:
    """A byte offset in the middle of the largest tensor's data."""
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            skip = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        return info.header_offset + 30 + skip + info.file_size // 2


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flipped":
        at = inside_tensor(path)
        clean = torch.load(path, weights_only=True)["model"]["a"]
        flip(path, at)
        # the trap: torch itself reads it without a word, and the numbers are wrong
        assert not torch.equal(torch.load(path, weights_only=True)["model"]["a"], clean)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    else:
        path.write_bytes(content[: len(content) * {"half": 50, "nearly whole": 99}[how] // 100])


@pytest.mark.parametrize("how", ["flipped", "half", "nearly whole", "empty", "noise"])
def test_damage_is_noticed_and_the_previous_used(path, how, capsys):
    damage(path, how)
    loaded, used = common.load(path)
    assert used == common.previous(path) and same(loaded, state(1))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and warning.startswith("warning: ") and "damaged" in warning
    assert f"{path}:" in warning and f"using {common.previous(path)}" in warning


def test_every_byte_matters_or_changes_nothing(path, rng):
    """One flipped byte anywhere: noticed, or what is loaded is right nonetheless (padding, zip fields unused)."""
    content = path.read_bytes()
    common.previous(path).unlink()
    for at in rng.choice(len(content), 60, replace=False).tolist():
        flip(path, at)
        try:
            assert same(common.load(path)[0], state(2)), f"byte {at}"
        except common.CheckpointError:
            pass
        path.write_bytes(content)
    assert same(common.load(path)[0], state(2))


def test_both_damaged_or_missing(path, tmp_path):
    damage(path, "half"), damage(common.previous(path), "flipped")
    with pytest.raises(common.CheckpointError) as error:
        common.load(path)
    assert f"{path}: damaged" in str(error.value) and f"{common.previous(path)}: damaged" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(common.CheckpointError, match=r"no\.pt: no such file.*no\.prev\.pt: no such file"):
        common.load(tmp_path / "no.pt")


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")],
)  # fmt: skip
def test_a_good_file_that_the_machine_cannot_read_stays(path, error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(common.CheckpointError, match=r"ckpt\.pt cannot be read here \(.+\)"):
        common.load(path, set_aside=True)
    assert names(path.parent) == {"ckpt.pt", "ckpt.prev.pt"}


def test_several_ranks_set_one_damaged_file_aside(path, monkeypatch):
    damage(path, "half")
    replace = os.replace

    def twice(a, b):  # another rank just before
        replace(a, b)
        replace(a, b)

    monkeypatch.setattr(os, "replace", twice)
    assert common.load(path, set_aside=True)[1] == common.previous(path)
    assert names(path.parent) == {"ckpt.damaged.pt", "ckpt.prev.pt"}


def test_what_to_do_is_said(path):
    with pytest.raises(common.CheckpointError, match=r"is a folder; pass the file in it: .*/ckpt\.pt"):
        common.load(path.parent)
    damage(path, "half"), damage(common.previous(path), "half")
    with pytest.raises(common.CheckpointError, match="delete what is damaged to start anew"):
        common.load(path)


class Code:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"model": Code(trace)}))
    else:
        torch.save({"model": Code(trace)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(common.CheckpointError, match="damaged"):
        common.load(path)
    assert not trace.exists()
    if form == "zip":  # the file does carry it
        torch.load(path, weights_only=False)
        assert trace.exists()
