"""What every script shares: where it runs, files that appear whole, checkpoints, one update of the weights, reporting.

    save(path, {"step": 3, "model": model.state_dict()})
    state, used = load(path)                       # used is the previous file when the newest is damaged
    command(main, ARGS)                            # a script's last line: what a user can mend is one line on stderr

A checkpoint holds tensors and plain values only, so reading one runs no code (weights_only); torch.save writes a CRC-32
for every tensor, which torch.load does not check and load() does.
"""

import contextlib
import csv
import ctypes
import errno
import faulthandler
import fcntl
import gc
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn

from configurator import script_name

DOMAINS = ("speech", "audio")  # a clip's domain is an index into this
SPEECH, AUDIO = 0, 1
INTERRUPTED = 75  # exit code of a run stopped by a signal after saving (EX_TEMPFAIL: run it again)
TRAINED = ("config", "model_config", "ema")  # what a checkpoint or an export of train.py holds
MAX_BAD_STEPS = 10  # non-finite steps in a row before giving up
STARTED_BY = "AG_REPA_STARTED_BY"  # environment: the process whose run_script started this one
PART = "agrepa-part"  # suffix of a file that is being written


class DataError(RuntimeError):
    """A corpus, a package or a prepared folder that cannot be used; one line that says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or damaged; one line that names it."""


def command(main: Callable[[Any], int | None], args: Any) -> None:
    """Runs a script's main and exits with its code; an error that the user can mend becomes one line on stderr."""
    end_with_parent()
    faulthandler.enable()  # a word on SIGBUS, of a file that shrinks while it is mapped
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as configure left it, for the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main(args))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (DataError, CheckpointError, FloatingPointError, OSError, ValueError) as error:
        sys.exit(f"{script_name()}: {error}")


def run_script(name: str, *words: str) -> int:
    """Runs a script of this project (or `prepare`) as a process of its own; returns its exit code. SIGTERM and Ctrl-C
    are passed on to it, and the code is INTERRUPTED then: the caller is to stop. A second Ctrl-C kills it."""
    root = Path(__file__).resolve().parent
    what = [str(root / name)] if name.endswith(".py") else ["-m", name]
    env = os.environ | {"PYTHONPATH": str(root), STARTED_BY: str(os.getpid())}
    stop = StopRequest()
    # in a group of its own, so that the terminal's Ctrl-C reaches it once, through us
    process = subprocess.Popen([sys.executable, *what, *words], env=env, process_group=0)
    try:
        while process.poll() is None and not stop.asked:
            time.sleep(0.05)
        process.send_signal(stop.asked)  # nothing is sent to one that has ended
        code = process.wait()
        return INTERRUPTED if stop.asked else code
    finally:
        process.kill()
        stop.close()


def end_with_parent() -> None:
    """Has the system, where it can (Linux), send SIGTERM to this process when the one that started it dies, be it by
    SIGKILL: for what run_script or torchrun started. Of a torchrun that is dead already join_group finds no store."""
    parent = os.environ.get(STARTED_BY) or ("TORCHELASTIC_RUN_ID" in os.environ and os.getppid())
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            sys.exit(INTERRUPTED)


def optional(work: Callable[[], Any], otherwise: Any = None) -> Any:
    """What `work` returns, whose failure must not stop training: a warning and `otherwise` then."""
    try:
        return work()
    except Exception as error:
        print(f"warning: {type(error).__name__}: {error}", file=sys.stderr)
        return otherwise


def is_absent(name: str) -> bool:
    """Whether a hub name or folder is clearly a folder, and not there. What a hub has, only a download could tell."""
    return (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).exists()


def pick_device(device: str) -> str:
    """ "auto" is cuda or mps where there is one, else the CPU; anything else is itself."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return next(name for name, here in there.items() if here) if device == "auto" else device


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


class Machine(NamedTuple):
    """Where this process runs among the others."""

    rank: int
    world: int
    device: str
    dtype: str  # auto | float32 | bfloat16

    @property
    def lead(self) -> bool:  # who prints and writes
        return self.rank == 0

    def precision(self) -> torch.autocast:
        return precision(self.device, self.dtype)


def join_group(config) -> Machine:
    """Joins the process group when torchrun started us, and picks the device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # lengths differ: less is lost
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        kind = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(kind, timeout=timedelta(hours=1))  # the others wait while rank 0 probes and evaluates
    return Machine(rank, world, device, config.dtype)


def leave_group(machine: Machine) -> None:
    """Leaves the process group, when all that holds it is collected: its thread must not outlive the interpreter."""
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
    part = path.with_name(f".{path.name}.{PART}")
    try:
        with open(part, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except Exception as error:  # torch.save raises another in place of what stopped it
        if isinstance(reason := error.__context__ or error, OSError):
            raise OSError(f"{path} cannot be written: {reason}") from error
        raise
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the renames themselves
    os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    with whole_file(path) as file:
        json.dump(content, file, indent=1)


def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV file, none when it is not there; of a log, by step, without what a crash has torn."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    head, *lines = text.splitlines(keepends=True) or [""]
    if head.startswith("step,"):
        whole = re.compile(rf"(\d+)(,[^\x00-\x1f,\ufffd]*){{{head.count(',')}}}\n")
        rows = {int(row[1]): row[0] for row in map(whole.fullmatch, reversed(lines)) if row}  # of a step the first
        if len(rows) < len(lines):
            print(f"warning: {path}: {len(lines) - len(rows)} torn or garbled rows left out", file=sys.stderr)
        lines = [rows[step] for step in sorted(rows)]
    return list(csv.DictReader([head, *lines]))


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
    which it always is with `wait`. The file names its holder, who may delete it, and its folder, when all is done."""
    file = None
    while file is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the folder was deleted in between
            file = open(path, "a")  # noqa: SIM115  (closed below)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            file.truncate(0)
            print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=file, flush=True)
            yield True


@contextlib.contextmanager
def alone_in(out_dir: str | Path) -> Iterator[None]:
    """Keeps others from training in `out_dir` until this process, or this rank, is done or dead, and sweeps what a
    killed whole_file has left. Raises DataError that names who is at it, OSError where nothing can be written."""
    lock = Path(out_dir) / f".rank{os.environ.get('RANK', 0)}.lock"
    with locked(lock, wait=False) as ours:
        if not ours:
            raise DataError(f"{out_dir} is in use by {lock.read_text()}; end it first, or pass another --out_dir")
        for part in lock.parent.glob(f".*.{PART}") if lock.name == ".rank0.lock" else ():
            part.unlink()
        yield


def changed_settings(now: dict, before: dict, config: Any = None) -> str:
    """The settings of `now` that differ in `before`, in words; by `config` an older one's names and defaults."""
    before = {getattr(config, "renamed", {}).get(k, k): v for k, v in before.items()}
    before = (asdict(type(config)()) if config else {}) | before
    return "; ".join(f"{k}: {before.get(k)!r} -> {v!r}" for k, v in now.items() if before.get(k) != v)


def previous(path: str | Path) -> Path:
    """Where the checkpoint goes that `path` held before."""
    return Path(path).with_stem(f"{Path(path).stem}.prev")


def save(path: str | Path, state: dict[str, Any], keep_previous: bool = True) -> None:
    """Writes `state`; the file that was there becomes NAME.prev.pt. Whatever fails, one good file remains."""
    with whole_file(path, "wb", previous(path) if keep_previous else None) as file:
        torch.save(state, file)


class Writer:
    """Saves by a thread, from copies on the CPU, one file at a time, while training goes on: `pending` is the last."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.pending = self.pool.submit(dict)

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """As save(); an error is raised by the next call, or by pending.result(), which waits."""
        self.pending.result()
        self.pending = self.pool.submit(save, path, on_cpu(state))


def on_cpu(x: Any) -> Any:
    """A copy, on the CPU, of a tensor or of all in dicts, lists and tuples."""
    if isinstance(x, dict):
        return {k: on_cpu(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(map(on_cpu, x))
    return x.detach().to("cpu", copy=True) if isinstance(x, torch.Tensor) else x


def exists(path: str | Path) -> bool:
    """Whether load(path) would find a file."""
    return Path(path).exists() or previous(path).exists()


def read_checked(path: Path) -> dict[str, Any]:
    """What save() wrote; of another content it raises one of many errors."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("it holds less than it promises")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"checksum of {damaged} does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path: str | Path, set_aside: bool = False, needs: Sequence[str] = ()) -> tuple[dict[str, Any], Path]:
    """The state and the file it came from: `path`, or the previous one with a warning when `path` is damaged, which
    `set_aside`, for those who will save there again, renames to NAME.damaged.pt. Raises CheckpointError when neither
    is sound, and, instead of going back, when one lacks what `needs` names or the machine cannot read it."""
    path, problems = Path(path), []
    if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
        raise CheckpointError(f"{path} is no file; of a run's folder pass the file in it: {path / 'ckpt.pt'}")
    for file in (path, previous(path)):
        try:
            state = read_export(file) if path.suffix == ".safetensors" else read_checked(file)
            break
        except FileNotFoundError:
            problems.append(f"{file}: no such file")
        except Exception as error:  # a damaged zip or pickle raises many types
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            machine = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)  # as of damaged zips
            if machine or isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's RuntimeError
                raise CheckpointError(f"{file} cannot be read here ({reason}); mend that and try again") from error
            problems.append(f"{file}: damaged or not one of ours ({reason})")
    else:
        raise CheckpointError(f"{'; '.join(problems)}; pass another file, or delete what is damaged to start anew")
    if missing := [k for k in needs if k not in state] if isinstance(state, dict) else ["settings"]:
        raise CheckpointError(f"{file} is another kind of checkpoint (it has no {missing[0]}); pass another")
    if problems:
        print(f"warning: {problems[0]}; using {file}", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):  # it is missing, or another rank was first
            if set_aside:
                os.replace(path, path.with_stem(f"{path.stem}.damaged"))
    return state, file


def same_run(config, fingerprint: str, state: dict, may_differ: Sequence[str], used: Path, world: int, todo="") -> None:
    """Raises CheckpointError when `used`, which holds `state`, was made with other settings than those of `config`, on
    another preparation than `fingerprint` names, or with another number of batches a step, world * accumulate."""
    settings = {k: v for k, v in asdict(config).items() if k not in may_differ}
    if changed := changed_settings(settings, state["config"], config):
        raise CheckpointError(f"{used} has other settings ({changed}); {todo or 'undo them or pass another --out_dir'}")
    accumulate = getattr(config, "accumulate", 1)
    batches = state.get("batches", world * state["config"].get("accumulate", 1))  # an older one does not say
    if batches != world * accumulate:
        fits = hasattr(config, "accumulate") and batches % world == 0
        todo = f"--accumulate={batches // world}" if fits else f"torchrun --nproc_per_node={batches}"
        raise CheckpointError(f"{used} takes {batches} batches a step, {world} x {accumulate} here; pass {todo}")
    if state.get("data") != fingerprint:
        what = f"{used} was trained on another preparation than {config.data_dir} holds now"
        raise CheckpointError(f"{what}; pass its --data_dir, or another --out_dir to start anew")


def export(path: str | Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Writes NAME.safetensors, what people share: tensors, and in the header `about` as JSON and a checksum."""
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
        self.parts["adamw"].found_inf = self.found_inf
        self.parts["adamw"].step()
        if not self.found_inf:  # torch's Muon reads none
            self.parts["muon"].step()

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
    # torch's default is 5 steps of Newton-Schulz; 4 learn as well in a fifth less of Muon's time, 3 do not
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "ns_steps": 4}
    return MuonAdamW(torch.optim.Muon(matrices, **rates, adjust_lr_fn="match_rms_adamw"), adamw)


def decay_groups(params: Iterable[nn.Parameter], config) -> list[dict]:
    """Weight decay on matrices, none on biases."""
    params = list(params)
    matrices, others = [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]


def plateau(config) -> tuple[int, int]:
    """The first step at the peak of the learning rate, and the one at which the way down begins."""
    up = max(1, int(config.lr_warmup * config.max_steps))
    return up, max(up, round((1 - getattr(config, "lr_decay", 1)) * config.max_steps))


def learning_rate(step: int, config) -> float:
    """Linear up over lr_warmup's share of max_steps, the peak, and by cosine to a hundredth of it over lr_decay's."""
    up, down = plateau(config)
    if step < up:
        return config.learning_rate * (step + 1) / up
    share = max(0, step - down) / max(1, config.max_steps - down)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def clip_and_step(module: nn.Module, optimizer: Optimizer, step: int, config) -> dict[str, Any]:
    """Clips the gradients, sets the learning rate of `step` and moves the weights, unless a gradient is not finite;
    nothing waits for a GPU: the norm is a tensor, and fused AdamW reads `found_inf` there."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), config.grad_clip)
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    module.zero_grad(set_to_none=True)
    return {"grad_norm": norm.detach(), "lr": rate}


class Finite:
    """Watches for non-finite gradients, which updated nothing: names the clips, and after MAX_BAD_STEPS in a row saves
    what there is, the last good state, and raises FloatingPointError. Every rank sees the same norm and acts alike."""

    def __init__(self, save: Callable[[], None]):
        self.save, self.bad, self.last = save, 0, None

    def check(self, *now) -> None:
        """Looks at the step before (step, norm, ids), whose norm is there by now; without arguments at the last one."""
        last, self.last = self.last, now
        if not last:
            return
        step, norm, ids = last
        self.bad = 0 if norm.isfinite() else self.bad + 1
        if self.bad:
            print(f"step {step}: non-finite gradient, nothing updated; clips {ids}", file=sys.stderr)
        if self.bad == MAX_BAD_STEPS:
            self.save()
            raise FloatingPointError(f"{self.bad} non-finite steps in a row; the last good state is saved")


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a stop after the step in progress; a second Ctrl-C stops at once."""

    def __init__(self, device: str = "cpu"):
        self.device, self.asked, self.flag = device, False, None
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number: int, frame) -> None:
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """True on every rank, among several a step after one was asked: what was sent then is there without a wait."""
        if not dist.is_initialized():
            return bool(self.asked)
        last, self.flag = self.flag, torch.full((), float(self.asked), device=self.device)
        dist.all_reduce(self.flag, dist.ReduceOp.MAX)
        return last is not None and bool(last)

    def close(self) -> None:  # signals do again what they did before
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """log.csv. On a continued run, rows after the checkpoint's step are dropped."""

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        write_csv(path, columns, [r for r in read_csv(path) if int(r["step"]) <= step] if step else [])
        file = open(path, "a", buffering=1, newline="")  # noqa: SIM115  (kept open for the whole run)
        self.writer = csv.DictWriter(file, columns, extrasaction="ignore")

    def row(self, **values) -> None:
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def table(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows of cells as aligned lines, numbers to the right, or as Markdown; the first row is the heading."""
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(max(map(len, rows)))]
    sides = [str.ljust, *[str.ljust if markdown else str.rjust] * (len(widths) - 1)]
    lines = [[side(c, w) for side, c, w in zip(sides, row, widths, strict=False)] for row in rows]
    if markdown:
        lines.insert(1, ["-" * w for w in widths])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)
