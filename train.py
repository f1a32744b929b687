"""Probe, then intervene: trains the flow-matching DiT and aligns only the layers that drive it (AG-REPA).

    python train.py config/demo.py                                   # prepares the data, trains, evaluates
    python train.py config/demo.py --batch_size=8 --out_dir=out/small
    python train.py config/demo.py --align=none --branch_from=out/demo/warmup.pt --out_dir=out/none
    torchrun --nproc_per_node=8 train.py config/unified_b.py

Phase I (warmup_steps): L_FM + L_BiTC, with probes. At its end layers and weights are selected and frozen, and
warmup.pt is saved, from which every run of a comparison branches. Phase II adds the alignment term. A run stopped by
Ctrl-C, SIGTERM or a crash continues when the same command is given again. Everything goes to out_dir: ckpt.pt,
warmup.pt, config.json, log.csv, probe.json, probe.png, samples/, eval.json.
"""

from configurator import DOMAINS, Config, configure, show

if __name__ == "__main__":
    ARGS = configure(Config, __doc__)  # a typo is answered before torch is imported

import collections
import contextlib
import copy
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import backbones
import checkpoint
import data
import fetch
import probe
import shards
import tokenizer
from loop import (
    Finite,
    Log,
    Machine,
    Optimiser,
    decay_groups,
    leave,
    make_optimiser,
    same_data,
    set_up,
    time_left,
    update,
)
from model import (
    AlignHeads,
    FlowModel,
    Selection,
    Shape,
    count_parameters,
    flow_matching_loss,
    masked_mse,
    noised,
)

EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # t of the held-out loss
COLUMNS = ("step", "phase", "loss", "fm", "bitc", "align", "grad_norm", "lr", "frames_per_s", "seconds")
COLUMNS += tuple(f"held_out_{name}" for name in DOMAINS)
# settings that a continued run may change, and those that a branch from the end of phase I may change as well
MAY_DIFFER = (
    "out_dir branch_from device dtype compile checkpoint_activations loader_threads data_dir log_every eval_every "
    "eval_clips save_every nfe cfg sway vocoder asr fad_model evaluate evaluate_every"
).split() + data.CORPUS  # what data_dir was prepared from; Run.data says which preparation it is
BRANCH_MAY_DIFFER = (
    "align align_layers align_head align_teacher timestep_adaptive refresh_every align_stop top_k weighting "
    "align_weight head_dim"
).split()


class Objective(nn.Module):
    """All that is trained: the DiT and, in phase II, the alignment heads. forward(batch) gives the losses (eq. 12)."""

    def __init__(self, model: FlowModel, config: Config):
        super().__init__()
        self.model, self.config = model, config
        self.heads: AlignHeads | None = None
        self.selection: Selection = [{} for _ in DOMAINS]

    def select(self, selection: Selection) -> None:
        """Aligns these layers from now on, each with a head of its own, drawn from config.seed so that branches start
        alike. A selection that will be refreshed gets a head for every layer at once, weight 0 where not selected."""
        c = self.config
        if c.refresh_every and any(selection):
            last = self.model.shape.n_layer - (c.align_teacher == "self")
            selection = [{l: s.get(l, [0.0]) for l in range(1, last + 1)} for s in selection]
        self.selection = selection
        if any(selection) and self.heads is None:
            with torch.random.fork_rng([]):
                torch.manual_seed(c.seed)
                self.heads = AlignHeads(self.model.shape, selection, c.head_dim, c.align_head, c.align_teacher)
            self.heads.to(next(self.model.parameters()).device)

    def forward(self, batch: shards.Batch) -> dict[str, torch.Tensor]:
        c = self.config
        return flow_matching_loss(self.model, batch, c.sigma, c.token_drop, self.heads, self.selection)


@dataclass
class Run:
    """The state of a training run; everything but the modules' wiring goes into ckpt.pt."""

    config: Config
    objective: Objective
    optimiser: Optimiser
    ema: FlowModel
    data: str = ""  # which preparation it trains on
    step: int = 0  # optimiser steps done
    selected: bool = False  # phase II
    probes: list[dict] = field(default_factory=list)  # one entry per probe of phase I
    seconds: float = 0.0  # spent training

    def state(self) -> dict:
        """What ckpt.pt holds: tensors and plain values only."""
        return {
            "config": asdict(self.config),
            "shape": asdict(self.objective.model.shape),
            "model": self.objective.model.state_dict(),
            "ema": self.ema.state_dict(),
            "heads": self.objective.heads.state_dict() if self.objective.heads else None,
            "optimiser": self.optimiser.state_dict(),
            "selection": self.objective.selection,
            "selected": self.selected,
            "data": self.data,
            "step": self.step,
            "probes": self.probes,
            "seconds": self.seconds,
        }


def build_model(config: Config, teachers: list, device: str = "cpu") -> FlowModel:
    """The DiT of `config`; `teachers` is [(name, width), ...] per domain. device="meta" costs no memory."""
    shape = Shape(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        ff_mult=config.ff_mult,
        dropout=config.dropout,
        codes=(config.speech_codes, config.audio_codes),
        second_codes=1024 if config.beats_tokens else 0,
        interleave=config.interleave,
        teachers=tuple((name, width) for name, width in teachers),
    )
    with torch.device(device):
        return backbones.build(config.backbone, shape)


def new_run(config: Config, meta: dict, machine: Machine) -> Run:
    """A run at step 0, drawn from config.seed; `meta` is what shards.read_meta says of the prepared folder."""
    torch.manual_seed(config.seed)
    model = build_model(config, meta["teachers"])
    mean, std = (meta["mel_mean"], meta["mel_std"]) if not config.mel_stats else config.mel_stats
    model.mel_mean.copy_(torch.as_tensor(mean)), model.mel_std.copy_(torch.as_tensor(std))
    model.mel_floor.fill_(config.mel_floor)
    if config.code_init:
        init_tokens_from_codebooks(model, config)
    model.to(machine.device)
    objective = Objective(model, config)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    candidates = model.blocks.parameters() if config.optimiser == "muon" else ()
    matrices = [p for p in candidates if p.dim() == 2]  # a fused one, as of q, k and v, counts as one
    return Run(config, objective, make_optimiser(model, config, matrices), ema, shards.identity(meta))


def init_tokens_from_codebooks(model: FlowModel, config: Config) -> None:
    """Starts each domain's rows of the token table at its codebook, rotated to width D, at the table's own scale."""
    for d, name in enumerate(DOMAINS):
        path = Path(config.data_dir) / f"{name}_tokenizer.pt"
        if path.exists():
            book = tokenizer.load(path).codebook
            size = max(book.shape[1], model.shape.n_embd)
            rotation = torch.linalg.qr(torch.randn(size, size))[0][: book.shape[1], : model.shape.n_embd]
            rows = (book - book.mean(0)) @ rotation
            table = model.tokens.weight.data[model.code_offset[d] :][: len(rows)]
            table.copy_(rows * table.std() / rows.std())


# ---- one step


def train_step(run: Run, objective: nn.Module, batches: Sequence[shards.Batch], machine: Machine) -> dict[str, float]:
    """One optimiser step on the mean gradient of this rank's batches; returns their mean losses, the gradient norm and
    the learning rate.

    All randomness (noise, t, dropout, condition drop) follows from (seed, step, place), so a resumed run repeats it
    exactly, probes or samples between steps change nothing, and two ranks do what one does that accumulates twice.
    A non-finite gradient, which every rank sees alike after the all-reduce, updates nothing.
    """
    config, means = run.config, collections.defaultdict(float)
    on = not config.align_stop or run.step < config.align_stop  # 0 * keeps the heads in the graph, for DDP
    for micro, batch in enumerate(batches):
        torch.manual_seed(hash((config.seed, run.step, micro * machine.world + machine.rank)) % 2**63)
        last = micro == len(batches) - 1
        with contextlib.nullcontext() if last or machine.world == 1 else objective.no_sync():
            with machine.precision():
                losses = objective(batch)
            loss = losses["fm"] + config.bitc_weight * losses["bitc"] + on * losses.get("align", 0.0)
            (loss / len(batches)).backward()
        for k, v in (losses | {"loss": loss}).items():
            means[k] = means[k] + v.detach() / len(batches)
    moved = update(run.objective, run.optimiser, run.step, config)
    if math.isfinite(moved["grad_norm"]):
        update_ema(run.ema, run.objective.model, min(config.ema_decay, (1 + run.step) / (10 + run.step)))
    run.step += 1
    return dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True)) | moved


@torch.no_grad()
def update_ema(ema: FlowModel, model: FlowModel, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def held_out_loss(model: FlowModel, batch: shards.Batch, sigma: float, machine: Machine) -> dict[str, float]:
    """L_FM of each domain on fixed clips and noise, the mean over EVAL_TIMES; global random state unchanged."""
    totals = [0.0] * len(DOMAINS)
    with probe.probing(model, 0), machine.precision():
        cond = model.embed_condition(batch)
        for t in EVAL_TIMES:
            ts = batch.mel.new_full((len(batch.frames),), t)
            x_t, target = noised(model, batch.mel, ts, sigma)
            v = model.velocity(x_t, ts, cond)
            for d in range(len(DOMAINS)):
                own = cond.mask & (batch.domain == d)[:, None]
                totals[d] += masked_mse(v, target, own).item() / len(EVAL_TIMES)
    return {f"held_out_{name}": totals[d] for d, name in enumerate(DOMAINS) if (batch.domain == d).any()}


# ---- the switch from probing to intervening


def probe_now(run: Run, batch: shards.Batch, machine: Machine) -> dict:
    """Probes the model on rank 0, as it is (not its average, which lags early on), and shares the result."""
    shared = [None]
    if machine.rank == 0:
        with machine.precision():
            shared = [
                probe.probe(
                    run.objective.model,
                    batch,
                    run.config.probe_times,
                    run.config.sigma,
                    run.config.seed,
                    run.config.top_k,
                )
            ]
        for name in DOMAINS:
            scores = shared[0][name]
            top = " ".join(
                f"L{l} {scores['foga'][l - 1]:.3f}" for l in probe.top_layers(scores["foga"], run.config.top_k)
            )
            print(f"probe at step {run.step}: {name:6s} FoG-A top {top}; BiT-C {scores['bitc']:.3f}", flush=True)
    if machine.world > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def intervene(run: Run, selection: Selection | None = None) -> None:
    """Ends phase I: freezes S and lambda (eq. 10-11) by this run's own strategy and adds the heads to the optimiser."""
    run.objective.select(selection or probe.select(run.config, run.probes[-1]["result"], run.config.n_layer))
    run.selected = True
    if run.objective.heads:
        for group in decay_groups(run.objective.heads.parameters(), run.config):
            run.optimiser.add_param_group(group)


# ---- files of a run


def save(run: Run, name: str = "ckpt.pt") -> None:
    checkpoint.save(Path(run.config.out_dir) / name, run.state())


def export(run: Run) -> None:
    """model.safetensors: the averaged weights and what probe.py, sample.py and evaluate.py need to know of them."""
    state = run.state()
    about = {k: state[k] for k in ("config", "shape", "selection", "data", "step", "seconds")}
    about["probes"] = [{"result": {"seconds": p["result"]["seconds"]}} for p in run.probes]
    checkpoint.export(Path(run.config.out_dir) / "model.safetensors", state["ema"], about)


def restore(run: Run, path: Path) -> None:
    """Loads ckpt.pt or warmup.pt into `run`. Raises CheckpointError when it was made with incompatible settings."""
    state, used = checkpoint.load(path, set_aside=path.parent == Path(run.config.out_dir))
    may_differ = MAY_DIFFER + ([] if state["selected"] else BRANCH_MAY_DIFFER)
    checkpoint.same_settings(run.config, state["config"], may_differ, used)
    same_data(run.config, run.data, state, used)
    run.objective.model.load_state_dict(state["model"])
    run.ema.load_state_dict(state["ema"])
    run.step, run.probes, run.seconds = state["step"], state["probes"], state["seconds"]
    if state["selected"]:
        intervene(run, state["selection"])
        if run.objective.heads:
            run.objective.heads.load_state_dict(state["heads"])
    run.optimiser.load_state_dict(state["optimiser"])


# ---- the loop


def announce(config: Config, run: Run, batches: shards.Batches, machine: Machine) -> None:
    """The derived numbers, before step 0."""
    model = run.objective.model
    per_epoch = batches.steps_per_epoch
    print(show(config))
    print(
        f"{count_parameters(model) / 1e6:.1f} M parameters, {model.shape.n_layer} layers; {machine.world} x "
        f"{machine.device}, {'bfloat16 autocast' if machine.precision()._enabled else 'float32'}"
    )
    frames = batches.lengths.sum()
    print(
        f"{len(batches.dataset)} training clips, {frames} frames an epoch in {per_epoch} steps, "
        f"{100 * batches.left_out():.1f} % trimmed, padding {100 * batches.padding():.1f} %; "
        f"{config.max_steps / per_epoch:.0f} epochs; phase I ends at step {config.warmup_steps}",
        flush=True,
    )


def open_run(config: Config, machine: Machine) -> tuple[Run, shards.Dataset, shards.Dataset]:
    """The run as it stands in out_dir, or branched, or new; and the training and held-out data, prepared if missing."""
    run = new_run(config, data.ensure_prepared(config), machine)  # all ranks prepare together
    path = Path(config.out_dir) / "ckpt.pt"
    if machine.rank == 0:
        checkpoint.sweep(path.parent)
    if checkpoint.exists(path):
        restore(run, path)
    elif config.branch_from:
        restore(run, Path(config.branch_from))
    if run.step == config.warmup_steps and not run.selected and run.probes:
        intervene(run)
    trade(run.objective.model, config)
    return run, shards.Dataset(config.data_dir, "train"), shards.Dataset(config.data_dir, "held_out")


def trade(model: FlowModel, config: Config) -> None:
    """Applies what trades memory or start-up for time."""
    model.checkpoint_activations = config.checkpoint_activations
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # it splits wide blocks, which some dynamic shapes do not survive
        torch._dynamo.config.recompile_limit = 32  # one clip or many, padded or not, learning or probed: each its own
        for block in model.blocks:  # alike, so one compilation serves them all, and any shape
            block.compile(dynamic=True)


def train(config: Config, machine: Machine) -> Run:
    """Trains to max_steps or to a signal; returns the run. Rank 0 alone prints and writes."""
    out_dir = Path(config.out_dir)
    run, dataset, held_out = open_run(config, machine)
    batches = shards.Batches(dataset, config, machine.rank, machine.world)
    probe_batch = shards.fixed_batch(dataset, config.probe_clips, config.seed, config.probe_frames).to(machine.device)
    reporter = None
    if machine.rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "config.json").write_text(json.dumps(asdict(config), indent=1))
        announce(config, run, batches, machine)
        reporter = Reporter(run, machine, held_out)

    def wrapped() -> nn.Module:
        if machine.world == 1:
            return run.objective
        return DistributedDataParallel(run.objective, broadcast_buffers=False, gradient_as_bucket_view=True)

    objective, stop = wrapped(), checkpoint.StopRequest(machine.device)
    finite = Finite(lambda: save(run) if machine.rank == 0 else None)
    ahead = shards.Ahead(batches, config.loader_threads, pin=machine.device.startswith("cuda"))
    while run.step < config.max_steps and not stop.agreed():
        numbers_of = range(run.step * config.accumulate, (run.step + 1) * config.accumulate)
        parts = [ahead(k) for k in numbers_of]
        numbers = train_step(run, objective, [part.to(machine.device) for part in parts], machine)
        finite.check(run.step, numbers["grad_norm"], [i for part in parts for i in part.ids.tolist()])
        if probe_when_due(run, probe_batch, machine):
            objective = wrapped()
        if reporter:
            reporter.step(numbers, sum(int(part.frames.sum()) for part in parts) * machine.world)
    if reporter and run.step < config.max_steps:
        reporter.stop()
    return run


def probe_when_due(run: Run, batch: shards.Batch, machine: Machine) -> bool:
    """Probes in phase I, selects at its end, and selects again at a refresh. True when alignment heads have joined."""
    config, lead = run.config, machine.rank == 0
    switch = run.step == config.warmup_steps and not run.selected
    refresh = run.objective.heads and config.refresh_every and run.step % config.refresh_every == 0
    if not (switch or refresh or (not run.selected and run.step % config.probe_every == 0)):
        return False
    run.probes.append({"step": run.step, "result": probe_now(run, batch, machine)})
    if refresh:
        run.objective.select(probe.select(config, run.probes[-1]["result"], config.n_layer))
    if switch:
        if lead:
            save(run, "warmup.pt")
        intervene(run)
        if lead:
            optional(lambda: finish_phase_one(run, batch, machine))
    return switch


class Reporter:
    """What rank 0 prints and writes along a run: rows of log.csv, held-out losses, checkpoints, evaluations."""

    def __init__(self, run: Run, machine: Machine, held_out: shards.Dataset):
        config = run.config
        self.run, self.machine, self.smooth, self.numbers = run, machine, None, {}
        self.log = Log(Path(config.out_dir) / "log.csv", COLUMNS, run.step)
        self.eval_batch = shards.fixed_batch(held_out, config.eval_clips, 0, config.probe_frames).to(machine.device)
        self.since, self.frames = time.time(), 0

    def step(self, numbers: dict[str, float], frames: int) -> None:
        """Takes in a step's numbers and its frames over all ranks, and does what is due after it."""
        run, config, self.numbers = self.run, self.run.config, numbers
        self.frames += frames
        self.smooth = numbers["fm"] if self.smooth is None else 0.95 * self.smooth + 0.05 * numbers["fm"]
        last = run.step == config.max_steps
        due = {k: run.step % getattr(config, f"{k}_every") == 0 or last for k in ("log", "eval", "save")}
        evaluation = bool(config.evaluate_every) and run.step % config.evaluate_every == 0 and not last
        if any(due.values()) or evaluation:
            self.row(numbers, due["eval"])
        if due["save"] or evaluation:
            save(run)
        if evaluation:
            run_script("evaluate.py", Path(config.out_dir) / "ckpt.pt", self.machine.device)
        if due["eval"] or due["save"] or evaluation:
            self.since = time.time()  # none of that is training time

    def stop(self) -> None:
        """Saves an unfinished run, and logs its last step: evaluate.py tells by the log how far a run has come."""
        if self.frames:
            self.row(self.numbers, False)
        save(self.run)

    def row(self, numbers: dict[str, float], evaluate: bool) -> None:
        run, now = self.run, time.time()
        rate = self.frames / (now - self.since)
        run.seconds += now - self.since
        self.since, self.frames = now, 0
        held = held_out_loss(run.ema, self.eval_batch, run.config.sigma, self.machine) if evaluate else {}
        self.log.row(step=run.step, phase=1 + run.selected, frames_per_s=rate, seconds=run.seconds, **numbers, **held)
        progress(run, numbers, self.smooth, rate, held)


def finish_phase_one(run: Run, batch: shards.Batch, machine: Machine) -> None:
    """Shows what the probes found, beside a random-init control, and what was selected; writes probe.json and .png."""
    result, model = run.probes[-1]["result"], run.objective.model
    with machine.precision():
        control = probe.control_scores(model, batch, run.config.probe_times, run.config.sigma, run.config.seed)
    print(probe.table(result, control, run.objective.selection))
    for name, layers in zip(DOMAINS, run.objective.selection, strict=True):
        means = {l: sum(w) / len(w) for l, w in layers.items() if any(w)}
        chosen = ", ".join(f"L{l} (weight {w:.3f})" for l, w in means.items()) or "nothing"
        print(f"phase II aligns for {name}: {chosen}", flush=True)
    probe.report(Path(run.config.out_dir), result, control, run.objective.selection)


def optional(work) -> None:
    """Runs work whose failure must not stop training; reports what failed."""
    try:
        work()
    except Exception as error:
        print(f"warning: {type(error).__name__}: {error}", file=sys.stderr)


def run_script(name: str, ckpt: Path, device: str) -> None:
    """Runs probe.py or evaluate.py in a process of its own, so that its memory and its failures are not training's."""
    script = Path(__file__).resolve().parent / name
    if subprocess.run([sys.executable, str(script), f"--ckpt={ckpt}", f"--device={device}"]).returncode:
        print(f"warning: {name} failed; training goes on and {ckpt} is saved", file=sys.stderr)


def progress(run: Run, numbers: dict, smooth: float, rate: float, held: dict) -> None:
    extra = "".join(f"  {k.replace('held_out_', 'held-out ')} {v:.4f}" for k, v in held.items())
    align = f"  align {numbers['align']:.3f}" if "align" in numbers else ""
    print(
        f"step {run.step:6d}/{run.config.max_steps}  fm {smooth:.4f}  bitc {numbers['bitc']:.3f}{align}  "
        f"{rate:6.0f} frames/s  left {time_left(run.seconds, run.step, run.config.max_steps)}{extra}",
        flush=True,
    )


def check(config: Config) -> None:
    """Refuses, before anything is read, what would fail many steps later. Raises ValueError."""
    if config.align != "none":
        probe.check_strategy(config, config.n_layer)
    if config.n_embd % (2 * config.n_head):
        raise ValueError(f"n_embd={config.n_embd}, n_head={config.n_head}: a head needs a whole, even width")
    if config.warmup_steps >= config.max_steps and config.align != "none":
        raise ValueError(
            f"max_steps={config.max_steps} ends within phase I, so nothing would be aligned; pass --warmup_steps below "
            f"{config.max_steps}, or --align=none"
        )
    if config.backbone and (config.compile or config.checkpoint_activations):
        raise ValueError(f"compile and checkpoint_activations are for our own model, not backbone={config.backbone}")
    for key in ("vocoder", "asr") if config.evaluate else ():
        if data.is_absent(getattr(config, key)):
            raise ValueError(f"{key}={getattr(config, key)}: no such folder; pass a hub name or a folder that is there")


def main(config: Config) -> int:
    check(config)
    machine = set_up(config)
    lines = data.missing(config) if not (Path(config.data_dir) / "meta.json").exists() else []
    if lines and machine.rank == 0:
        model = build_model(config, [("whisper", 1280), ("beats", 768)], "meta")
        print(f"{count_parameters(model) / 1e6:.1f} M parameters, {model.shape.n_layer} layers", flush=True)
    run = train(config, machine)
    leave(machine)
    if machine.rank:
        return 0
    path = Path(config.out_dir) / "ckpt.pt"
    if run.step < config.max_steps:
        print(f"stopped at step {run.step}, saved in {path}; the same command continues")
        return checkpoint.INTERRUPTED
    export(run)
    print(f"trained {run.step} steps in {run.seconds / 60:.1f} min; {path} and model.safetensors", flush=True)
    for script in ("probe.py", "evaluate.py") if config.evaluate else ():
        run_script(script, path, machine.device)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(ARGS))
    except (data.DataError, fetch.FetchError, checkpoint.CheckpointError, FloatingPointError, ValueError) as error:
        sys.exit(f"train.py: {error}")
