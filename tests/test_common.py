"""common.py: checkpoints; damage of every kind is noticed, and one good file always remains."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import stat
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn as nn
from conftest import same

import backbones
import common

FORK = multiprocessing.get_context("fork")


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    model = {"a": torch.randn(40, 50, generator=generator), "b": torch.arange(step + 1)}
    model["h"] = torch.randn(9, generator=generator).bfloat16()
    return {"step": step, "model": model, "history": [{"loss": 0.5 * step, "name": "x"}, (1, None, True)]}


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


@pytest.mark.parametrize("what", ["pickle", "fsync", "replace"])
def test_a_failing_save_keeps_the_old_files_and_leaves_none_of_its_own(path, monkeypatch, what):
    """Half of it written, all but not on the disk, or not renamed."""
    before = {f.name: f.read_bytes() for f in path.parent.iterdir()}

    def fail(*_):
        raise OSError("no space left on device")

    if what != "pickle":
        monkeypatch.setattr(os, what, fail)
    with pytest.raises((OSError, RuntimeError)):
        common.save(path, state(3) | ({"bad": Unpicklable()} if what == "pickle" else {}))
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


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flipped":
        clean = torch.load(path, weights_only=True)["model"]["a"]
        flip(path, content.index(clean.numpy().tobytes()) + 4000)  # in the middle of it
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
    with pytest.raises(common.CheckpointError, match="delete what is damaged to start anew") as error:
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


def test_what_is_no_file_is_not_opened(path):
    os.mkfifo(path.with_name("fifo"))
    for no_file in (path.parent, path.with_name("fifo")):
        with pytest.raises(common.CheckpointError, match=r"is no file; of a run's folder pass .*/ckpt\.pt"):
            common.load(no_file)


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


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2 * 10**7))


@pytest.mark.parametrize(
    "write, name, message",
    [(lambda path: torch.save([1, 2], path), "x.pt", "no settings"), (bomb, "x.pt", "less than it promises"),
     (lambda path: torch.save({"model": {}}, path), "x.pt", "no config"),
     (lambda path: safetensors.torch.save_file({"w": torch.ones(2)}, path), "x.safetensors", "not one of ours")],
)  # fmt: skip
def test_what_is_not_ours_is_refused_in_one_line(tmp_path, write, name, message):
    write(tmp_path / name)
    start = time.monotonic()
    with pytest.raises(common.CheckpointError, match=rf"{name}[ :].*{message}.*; ") as error:
        common.load(tmp_path / name, needs=("config", "model"))
    assert "\n" not in str(error.value) and time.monotonic() - start < 0.5


@pytest.mark.parametrize(
    "name, shape, layers, message",
    [("weight", (3, 4), 1, r"weight is \(3, 4\), expected \(4, 3\)"),
     ("weight", (4, 3), 10**7, "2 tensors for 10000000 layers"),
     ("other", (1,), 1, r"other is \(1,\), expected not there")],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named_before_memory_is_taken(name, shape, layers, message):
    module, weights = nn.Linear(3, 4), nn.Linear(3, 4).state_dict()
    backbones.check_weights(lambda: module, 1, weights, "x.pt")
    with pytest.raises(common.CheckpointError, match=f"x.pt does not fit its settings: .*{message}"):
        backbones.check_weights(lambda: module, layers, weights | {name: torch.ones(shape)}, "x.pt")
    with pytest.raises(common.CheckpointError, match=r"weight is \(4, 3\), expected \(1000000000, 1000000000\)"):
        backbones.check_weights(lambda: nn.Linear(10**9, 10**9), 1, weights, "x.pt")  # 4 EB


def test_exports_are_as_readable_as_checkpoints(tmp_path):
    common.export(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {"step": 1})
    common.save(tmp_path / "a.pt", state(1))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "a.pt")}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_only_our_own_part_files_are_swept(tmp_path):
    for name in ("film.part", ".film.part", f".ckpt.pt.{common.PART}", "ckpt.pt"):
        (tmp_path / name).touch()
    with common.alone_in(tmp_path):
        assert names(tmp_path) == {"film.part", ".film.part", "ckpt.pt", ".rank0.lock"}


# ---- settings of an older or another run


@dataclass
class Settings:
    accumulate: int = 1
    added: str = "off"
    seed: int = 0
    data_dir: str = "data"


OLD = {"config": {"accumulate": 1, "seed": 0}, "data": "f"}  # of before `added`, and of before "batches"


@pytest.mark.parametrize(
    "config, state, world, message",
    [(Settings(), OLD, 1, None), (Settings(), OLD, 4, None), (Settings(accumulate=2), OLD | {"batches": 2}, 1, None),
     (Settings(), OLD | {"batches": 6}, 6, None), (Settings(added="on"), OLD, 1, "added: 'off' -> 'on'"),
     (Settings(seed=1), OLD, 1, "seed: 0 -> 1"), (Settings(), OLD | {"data": "g"}, 1, "another preparation"),
     (Settings(), OLD | {"batches": 2}, 1, "takes 2 batches a step, 1 x 1 here; pass --accumulate=2"),
     (Settings(), OLD | {"batches": 8}, 2, "pass --accumulate=4"),
     (Settings(), OLD | {"batches": 3}, 2, "pass torchrun --nproc_per_node=3"),
     (Settings(accumulate=2), OLD, 1, "pass --accumulate=1")],
)  # fmt: skip
def test_a_run_is_continued_with_what_made_it(config, state, world, message):
    """A setting that an old checkpoint lacks has its default; ranks and accumulation may be traded for one another."""
    try:
        common.same_run(config, "f", state, ["accumulate"], Path("ckpt.pt"), world)
        found = None
    except common.CheckpointError as error:
        found = str(error)
    assert found is message if message is None else message in found


# ---- processes


def hold(out_dir: Path, ready) -> None:
    with common.alone_in(out_dir):
        ready.set()
        time.sleep(60)


def test_one_process_at_a_time_and_its_name(tmp_path):
    ready = FORK.Event()
    holder = FORK.Process(target=hold, args=(tmp_path / "run", ready))
    holder.start()
    assert ready.wait(10)
    who = f"in use by process {holder.pid} on {socket.gethostname()}; end it"
    with pytest.raises(common.DataError, match=who), common.alone_in(tmp_path / "run"):
        pass
    holder.kill()
    holder.join()
    for _ in range(2):  # a lock is free after its holder's death, and after its end
        with common.alone_in(tmp_path / "run"):
            pass
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):  # a file, and under one
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=str(tmp_path / "file")), common.alone_in(folder):
            pass


CHILD = """import signal, sys, time
def stop(number, _):
    print(number, file=open({trace!r}, "a"), flush=True)
    if not {deaf}:
        sys.exit(0)
signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
print("ready", file=open({trace!r}, "a"), flush=True)
time.sleep(60), time.sleep(60)
"""


@pytest.mark.parametrize("number, deaf", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_reaches_the_script_that_was_started(tmp_path, number, deaf):
    """It is passed on; a second Ctrl-C ends a child that does not listen. What was set here before is set again."""
    child, trace, before = tmp_path / "child.py", tmp_path / "trace", signal.getsignal(number)
    child.write_text(CHILD.format(trace=str(trace), deaf=deaf))

    def send():
        for k in range(1 + deaf):
            while not trace.exists() or trace.read_text().count("\n") <= k:
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt) if deaf else contextlib.nullcontext():
        assert common.run_script(str(child)) == common.INTERRUPTED
    assert trace.read_text().split() == ["ready", str(int(number))] and time.monotonic() - start < 10
    assert signal.getsignal(number) == before
    child.write_text("import os, sys; sys.exit(3)")
    assert common.run_script(str(child)) == 3


def child_of(parent: int, ready) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ[common.STARTED_BY] = str(parent)
    common.end_with_parent()
    ready.put(os.getpid())
    time.sleep(60)


def parent_of(ready) -> None:
    FORK.Process(target=child_of, args=(os.getpid(), ready)).start()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a parent-death signal")
def test_a_child_ends_with_its_parent_also_by_kill_9():
    ready = FORK.SimpleQueue()
    parent = FORK.Process(target=parent_of, args=(ready,))
    parent.start()
    child = Path(f"/proc/{ready.get()}/stat")
    assert child.exists()
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
    late = FORK.Process(target=child_of, args=(parent.pid, ready))  # whose parent has died before it asked
    late.start()
    late.join(10)
    assert late.exitcode == common.INTERRUPTED


# ---- log.csv

ROWS = "step,loss,held\r\n1,0.5,\r\n2,0.25,9.5\r\n3,0.125,\r\n"


@pytest.mark.parametrize(
    "content, steps",
    [(ROWS, [1, 2, 3]), (ROWS + "4,0.1", [1, 2, 3]), (ROWS + "4,0.1,9.", [1, 2, 3]), (ROWS + "1", [1, 2, 3]),
     (ROWS + "\0" * 200_000, [1, 2, 3]), (ROWS + "\0\0\r\n4,0.1,\r\n", [1, 2, 3, 4]), (ROWS[:-4] + "\0\0\r\n", [1, 2]),
     (ROWS + "\udcff\udc80,\udcfe,3\r\n", [1, 2, 3]), (ROWS + "2,0.1,\r\n", [1, 2, 3]), (ROWS[:30], [1]),
     (ROWS + "x,1,\r\n4,1,\r\n", [1, 2, 3, 4]), ("step,lo", []), ("", [])],
)  # fmt: skip
def test_a_damaged_log_loses_its_damaged_rows_alone(tmp_path, content, steps, capsys):
    path = tmp_path / "log.csv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    rows = common.read_csv(path)
    assert [int(r["step"]) for r in rows] == steps and all(r["held"] in ("", "9.5") for r in rows)
    assert ("torn or garbled" in capsys.readouterr().err) == (content not in (ROWS, "step,lo", ""))
    common.Log(path, ["step", "held", "new"], 2).row(step=3, held=1.5)
    assert [(r["step"], r["held"]) for r in common.read_csv(path)] == [
        *((str(s), "9.5" if s == 2 else "") for s in steps if s <= 2), ("3", "1.5")
    ]  # fmt: skip
    assert common.read_csv(tmp_path / "none.csv") == []


def test_a_writer_saves_what_was_there_and_raises_what_went_wrong(tmp_path):
    writer, x = common.Writer(), torch.zeros(3)
    writer.save(tmp_path / "a.pt", {"x": x, "of": [{"y": (x, 1)}]})
    x += 1  # training goes on
    writer.pending.result()
    state, _ = common.load(tmp_path / "a.pt")
    assert not state["x"].any() and not state["of"][0]["y"][0].any() and state["of"][0]["y"][1] == 1
    writer.save(tmp_path / "nowhere" / "b.pt", {"x": x})
    with pytest.raises(OSError, match="b.pt cannot be written"):
        writer.save(tmp_path / "a.pt", {"x": x})
