"""What every training loop here shares: where it runs, its optimiser and learning rate, its log, its refusals.

    machine = set_up(config)                       # under torchrun or alone
    optimiser = make_optimiser(module, config)
    numbers = update(module, optimiser, step, config)    # after backward

Used by train.py, lm.py and vocoder.py; `config` is any of theirs.
"""

import csv
import gc
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import checkpoint
from model import pick_device, precision

MAX_BAD_STEPS = 10  # non-finite steps in a row before giving up


@dataclass
class Machine:
    """Where this process runs among the others."""

    rank: int
    world: int
    device: str
    dtype: str  # auto | float32 | bfloat16

    def precision(self) -> torch.autocast:
        return precision(self.device, self.dtype)


def set_up(config) -> Machine:
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


def leave(machine: Machine) -> None:
    """Leaves the process group. What still holds it (DDP wrappers, in cycles) is collected first, because a thread of
    the group that outlives the interpreter aborts the process."""
    if machine.world > 1:
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


# ---- one update


class MuonAdamW:
    """Two optimisers behind the methods of one: Muon, whose update of a matrix has equal singular values, and AdamW."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        self.add_param_group = adamw.add_param_group  # alignment heads join here

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        self.muon.step(), self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none), self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"]), self.adamw.load_state_dict(state["adamw"])


Optimiser = torch.optim.Optimizer | MuonAdamW


def make_optimiser(module: nn.Module, config, matrices: Sequence[nn.Parameter] = ()) -> Optimiser:
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


def update(module: nn.Module, optimiser: Optimiser, step: int, config) -> dict[str, float]:
    """Clips the gradients, sets the learning rate of `step` and moves the weights, unless a gradient is not finite."""
    norm = float(nn.utils.clip_grad_norm_(module.parameters(), config.grad_clip))
    rate = learning_rate(step, config)
    for group in optimiser.param_groups:
        group["lr"] = rate
    if math.isfinite(norm):
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
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


# ---- continuing and reporting


def same_data(config, data: str, state: dict, used: Path) -> None:
    """Raises CheckpointError when the checkpoint `used` was trained on another preparation than `data` identifies."""
    if state.get("data") != data:
        raise checkpoint.CheckpointError(
            f"{used} was trained on another preparation than {config.data_dir} holds now; pass its --data_dir, or "
            f"--out_dir=ANOTHER_FOLDER to start anew"
        )


class Log:
    """log.csv. On a continued run, rows after the checkpoint's step are dropped."""

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        rows = []
        if path.exists() and step:
            with open(path, newline="") as file:
                rows = [r for r in csv.DictReader(file) if int(r["step"]) <= step]
        self.file = open(path, "w", newline="")  # noqa: SIM115  (kept open for the whole run)
        self.writer = csv.DictWriter(self.file, columns, extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def row(self, **values) -> None:
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self.file.flush()


def time_left(seconds: float, step: int, last: int) -> str:
    """Minutes and seconds to the last step at the mean pace so far."""
    left = int(seconds / max(1, step) * (last - step))
    return f"{left // 60}:{left % 60:02d}"
