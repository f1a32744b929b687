"""Checkpoints: saved whole or not at all, checked when read, the previous one kept; and requests to stop.

    save(path, {"step": 3, "model": model.state_dict()})
    state, used = load(path)          # used is the previous file when the newest is damaged

A file holds tensors, numbers, strings and plain containers only, so reading one runs no code (weights_only). torch.save
writes a zip with a CRC-32 for every tensor, which torch.load does not check and load() does.
"""

import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from configurator import changed_settings

INTERRUPTED = 75  # exit code of a run stopped by a signal after saving (EX_TEMPFAIL: run it again)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or damaged; one line that names it."""


def previous(path: Path) -> Path:
    """Where the checkpoint goes that `path` held before."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def save(path: str | Path, state: dict[str, Any], keep_previous: bool = True) -> None:
    """Writes `state` to a temporary file beside `path`, flushes it to disk, then renames it into place.

    The file that was there becomes NAME.prev.pt. Whatever fails or is killed, one good file remains.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renames themselves
    finally:
        os.close(folder)


def sweep(folder: str | Path) -> None:
    """Removes the temporary files that a killed save has left behind."""
    for part in Path(folder).glob(".*.part"):
        part.unlink()


def exists(path: str | Path) -> bool:
    """Whether load(path) would find a file."""
    return Path(path).exists() or previous(Path(path)).exists()


def read_checked(path: Path) -> dict[str, Any]:
    """What save() wrote; of another content it raises one of many errors."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"checksum of {damaged} does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path: str | Path, set_aside: bool = False) -> tuple[dict[str, Any], Path]:
    """Returns the state and the file it came from: `path`, or the previous one with a warning when `path` is damaged.

    `set_aside`, for those who will save to `path` again, renames a damaged file to NAME.damaged.pt, so that it cannot
    take the previous good one's place. Raises CheckpointError when neither holds a checkpoint, and when a file is
    there but the machine cannot read it, which is no reason to go back to an older one.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; pass the file in it: {path / 'ckpt.pt'}")
    problems = []
    for file in (path, previous(path)):
        try:
            state = read_export(file) if path.suffix == ".safetensors" else read_checked(file)
        except FileNotFoundError:
            problems.append(f"{file}: no such file")
        except Exception as error:  # a damaged zip or pickle raises many types
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            if machine_failed(error):
                raise CheckpointError(f"{file} cannot be read here ({reason}); mend that and try again") from error
            problems.append(f"{file}: damaged ({reason})")
        else:
            if problems:
                print(f"warning: {problems[0]}; using {file}", file=sys.stderr)
                if set_aside:
                    with contextlib.suppress(FileNotFoundError):  # it is missing, or another rank was first
                        os.replace(path, path.with_name(f"{path.stem}.damaged{path.suffix}"))
            return state, file
    damaged = any(": damaged (" in p for p in problems)
    todo = "delete what is damaged to start anew, or pass another file" if damaged else "pass the path of a checkpoint"
    raise CheckpointError(f"{'; '.join(problems)}; {todo}")


def machine_failed(error: Exception) -> bool:
    """Whether reading failed for want of permission, memory or a sound disk, whatever the file holds. A damaged zip can
    ask for an invalid position in the file, which is the one OSError that says something of its content."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError) or "allocate memory" in str(error)  # torch raises RuntimeError for it


def same_settings(config, theirs: dict, may_differ: Sequence[str], used: Path) -> None:
    """Raises CheckpointError when `used` was made with settings other than those of `config`, a dataclass."""
    changed = changed_settings({k: v for k, v in asdict(config).items() if k not in may_differ}, theirs)
    if changed:
        raise CheckpointError(
            f"{used} was made with other settings ({changed}); pass --out_dir=ANOTHER_FOLDER or undo them"
        )


def export(path: str | Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Writes NAME.safetensors: the tensors, and in its header `about` as JSON and a checksum. What people share: a
    fraction of a checkpoint's size, read by load() like one, and by anything that reads safetensors."""
    path, tensors = Path(path), {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    part = path.with_name(f".{path.name}.part")
    safetensors.torch.save_file(tensors, part, {"about": json.dumps(about), "sha256": digest(tensors)})
    part.replace(path)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """One checksum over the names and values of all tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()


def read_export(path: Path) -> dict[str, Any]:
    """What export() wrote: `about`, with layer numbers as integers again, and the tensors under "ema"."""
    with safetensors.safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (no mapping)
    if digest(tensors) != header["sha256"]:
        raise ValueError("checksum does not match")
    about = json.loads(header["about"], object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()})
    return about | {"ema": tensors}


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a stop after the step in progress; a second Ctrl-C stops at once."""

    def __init__(self, device: str = "cpu"):
        self.device, self.asked = device, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number: int, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """True on every rank as soon as one was asked."""
        if not dist.is_initialized():
            return self.asked
        flag = torch.tensor(float(self.asked), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
