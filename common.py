"""What every script shares: where it runs, files that appear whole, checkpoints, one update of the weights, reporting.

    machine = join_group(config)                   # under torchrun or alone
    save(path, {"step": 3, "model": model.state_dict()})
    state, used = load(path)                       # used is the previous file when the newest is damaged
    numbers = clip_and_step(module, optimizer, step, config)    # after backward
    command(main, ARGS)                            # a script's last line: what a user can mend is one line on stderr

A checkpoint holds tensors and plain values only, so reading one runs no code (weights_only); torch.save writes a CRC-32
for every tensor, which torch.load does not check and load() does.
"""

import contextlib
import csv
import errno
import fcntl
import gc
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn

from configurator import script_name

DOMAINS = ("speech", "audio")  # a clip's domain is an index into this
SPEECH, AUDIO = 0, 1
INTERRUPTED = 75  # exit code of a run stopped by a signal after saving (EX_TEMPFAIL: run it again)
MAX_BAD_STEPS = 10  # non-finite steps in a row before giving up


class DataError(RuntimeError):
    """A corpus, a package or a prepared folder that cannot be used; one line that says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or damaged; one line that names it."""


def command(main: Callable[[Any], int | None], args: Any) -> None:
    """Runs a script's main and exits with its code; an error that the user can mend becomes one line on stderr."""
    try:
        sys.exit(main(args))
    except (DataError, CheckpointError, FloatingPointError, OSError, ValueError) as error:
        sys.exit(f"{script_name()}: {error}")


def run_script(name: str, *words: str) -> int:
    """Runs a script of this project (or `prepare`) in a process of its own, so that its memory and its failures are not
    ours; returns its exit code."""
    root = Path(__file__).resolve().parent
    what = [str(root / name)] if name.endswith(".py") else ["-m", name]
    return subprocess.run([sys.executable, *what, *words], env=os.environ | {"PYTHONPATH": str(root)}).returncode


def is_absent(name: str) -> bool:
    """Whether a hub name or folder is clearly a folder, and not there. What a hub has, only a download could tell."""
    return (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).exists()


def pick_device(device: str) -> str:
    """ "auto" is cuda where there is one, else the CPU; anything else is itself."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def takes_bfloat16(device: str, dtype: str) -> bool:
    """Whether autocast goes to bfloat16: where `dtype` says so; "auto": where the machine multiplies it fast."""
    if dtype != "auto":
        return dtype == "bfloat16"
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.startswith("cpu") and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def precision(device: str, dtype: str) -> torch.autocast:
    """The autocast of a device and a `dtype` of auto | float32 | bfloat16."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=takes_bfloat16(device, dtype))


@dataclass
class Machine:
    """Where this process runs among the others."""

    rank: int
    world: int
    device: str
    dtype: str  # auto | float32 | bfloat16

    @property
    def lead(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def precision(self) -> torch.autocast:
        return precision(self.device, self.dtype)


def join_group(config) -> Machine:
    """Joins the process group when torchrun started us, and picks the device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        kind = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(kind, timeout=timedelta(hours=1))  # the others wait while rank 0 probes and evaluates
    return Machine(rank, world, device, config.dtype)


def leave_group(machine: Machine) -> None:
    """Leaves the process group. What still holds it (DDP wrappers, in cycles) is collected first, because a thread of
    the group that outlives the interpreter aborts the process."""
    if machine.world > 1:
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def step_seed(*place: int) -> int:
    """The seed of a step's randomness, a function of (seed, step, place) alone."""
    return hash(place) % 2**63


def resampled(clips: int, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each clip is drawn in each bootstrap sample, (draws, clips)."""
    return np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), draws)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "w", keep: Path | None = None) -> Iterator[Any]:
    """A file that appears whole or not at all: written beside `path`, flushed to disk, then renamed into place. What
    was there before goes to `keep`, where given."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the renames themselves
    os.close(folder)


def remove_leftovers(folder: str | Path) -> None:
    """Removes the temporary files that a killed whole_file has left behind."""
    for part in Path(folder).glob(".*.part"):
        part.unlink()


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    with whole_file(path) as file:
        json.dump(content, file, indent=1)


def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV file, none when it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Writes a CSV file that appears whole or not at all; keys that are no column are left out."""
    with whole_file(path) as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def sha256(path: Path) -> str:
    """The checksum of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock among processes, given back by the system even when its holder is killed; yields whether it is ours,
    which it always is with `wait`. Who is done with what it guards may delete the file, and its folder."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115  (closed below)
            break
        except FileNotFoundError:  # the folder was deleted in between
            continue
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def changed_settings(now: dict, before: dict) -> str:
    """The settings of `now` that differ in `before`, in words."""
    return "; ".join(f"{k}: {before.get(k)!r} -> {v!r}" for k, v in now.items() if before.get(k) != v)


def previous(path: str | Path) -> Path:
    """Where the checkpoint goes that `path` held before."""
    return Path(path).with_stem(f"{Path(path).stem}.prev")


def save(path: str | Path, state: dict[str, Any], keep_previous: bool = True) -> None:
    """Writes `state`; the file that was there becomes NAME.prev.pt. Whatever fails, one good file remains."""
    with whole_file(path, "wb", previous(path) if keep_previous else None) as file:
        torch.save(state, file)


def exists(path: str | Path) -> bool:
    """Whether load(path) would find a file."""
    return Path(path).exists() or previous(path).exists()


def read_checked(path: Path) -> dict[str, Any]:
    """What save() wrote; of another content it raises one of many errors."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"checksum of {damaged} does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path: str | Path, set_aside: bool = False) -> tuple[dict[str, Any], Path]:
    """The state and the file it came from: `path`, or the previous one with a warning when `path` is damaged, which
    `set_aside`, for those who will save there again, renames to NAME.damaged.pt, so that it cannot take the previous
    good one's place. Raises CheckpointError when neither holds a checkpoint, and when a file is there but the machine
    cannot read it, which is no reason to go back to an older one."""
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
                        os.replace(path, path.with_stem(f"{path.stem}.damaged"))
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


def same_run(config, fingerprint: str, state: dict, may_differ: Sequence[str], used: Path) -> None:
    """Raises CheckpointError when `used`, which holds `state`, was made with other settings than those of `config`, or
    on another preparation than `fingerprint` names."""
    if changed := changed_settings({k: v for k, v in asdict(config).items() if k not in may_differ}, state["config"]):
        raise CheckpointError(f"{used} was made with other settings ({changed}); undo them or pass another --out_dir")
    if state.get("data") != fingerprint:
        what = f"{used} was trained on another preparation than {config.data_dir} holds now"
        raise CheckpointError(f"{what}; pass its --data_dir, or another --out_dir to start anew")


def export(path: str | Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Writes NAME.safetensors: the tensors, and in its header `about` as JSON and a checksum. What people share: a
    fraction of a checkpoint's size, read by load() like one, and by anything that reads safetensors."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = {"about": json.dumps(about), "sha256": digest(tensors)}
    with whole_file(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, header))


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


class MuonAdamW:
    """Two optimizers behind the methods of one: Muon, whose update of a matrix has equal singular values, and AdamW."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = {"muon": muon, "adamw": adamw}
        self.add_param_group = adamw.add_param_group  # alignment heads join here

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


Optimizer = torch.optim.Optimizer | MuonAdamW


def make_optimizer(module: nn.Module, config, matrices: Sequence[nn.Parameter] = ()) -> Optimizer:
    """AdamW for the parameters of `module`, but Muon for `matrices`, at AdamW's learning rate and size of update."""
    taken = {id(p) for p in matrices}
    groups = decay_groups([p for p in module.parameters() if id(p) not in taken], config)
    adamw = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, config.beta2), fused=True)
    if not matrices:
        return adamw
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    return MuonAdamW(torch.optim.Muon(matrices, **rates, adjust_lr_fn="match_rms_adamw"), adamw)


def decay_groups(params: Iterable[nn.Parameter], config) -> list[dict]:
    """Weight decay on matrices, none on biases."""
    params = list(params)
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate(step: int, config) -> float:
    """One cycle: linear up over lr_warmup * max_steps, then cosine down to a hundredth of the peak."""
    up = max(1, int(config.lr_warmup * config.max_steps))
    if step < up:
        return config.learning_rate * (step + 1) / up
    share = (step - up) / max(1, config.max_steps - up)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def clip_and_step(module: nn.Module, optimizer: Optimizer, step: int, config) -> dict[str, float]:
    """Clips the gradients, sets the learning rate of `step` and moves the weights, unless a gradient is not finite."""
    norm = float(nn.utils.clip_grad_norm_(module.parameters(), config.grad_clip))
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, "lr": rate}


class Finite:
    """Watches for non-finite gradients, which updated nothing: names the clips, and after MAX_BAD_STEPS in a row saves
    what there is, the last good state, and raises FloatingPointError. Every rank sees the same norm and acts alike."""

    def __init__(self, save: Callable[[], None]):
        self.save, self.bad = save, 0

    def check(self, step: int, norm: float, ids: list[int]) -> None:
        self.bad = 0 if math.isfinite(norm) else self.bad + 1
        if self.bad:
            print(f"step {step}: non-finite gradient, nothing updated; clips {ids}", file=sys.stderr)
        if self.bad == MAX_BAD_STEPS:
            self.save()
            raise FloatingPointError(f"{self.bad} non-finite steps in a row; the last good state is saved")


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


class Log:
    """log.csv. On a continued run, rows after the checkpoint's step are dropped."""

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        write_csv(path, columns, [r for r in read_csv(path) if int(r["step"]) <= step] if step else [])
        self.file = open(path, "a", newline="")  # noqa: SIM115  (kept open for the whole run)
        self.writer = csv.DictWriter(self.file, columns, extrasaction="ignore")

    def row(self, **values) -> None:
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self.file.flush()


def time_left(seconds: float, step: int, last: int) -> str:
    """Minutes and seconds to the last step at the mean pace so far."""
    left = int(seconds / max(1, step) * (last - step))
    return f"{left // 60}:{left % 60:02d}"


def table(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows of cells as aligned lines, the first row the heading; the first column to the left, the others to the right,
    in Markdown all to the left. A short row ends early."""
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(max(map(len, rows)))]
    if markdown:
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
        return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]])
    sides = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = ([side(c, w) for side, c, w in zip(sides, row, widths, strict=False)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
