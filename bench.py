"""Measured speed and memory: every number a median of several runs with its spread, beside the device's name.

    python bench.py config/demo.py                    # prints the rows, writes them as a table to out/bench.md
    python bench.py config/demo.py --only=step        # only the rows whose name contains this
    bash runs/gpu.sh                                  # on a GPU, at the paper's size, with what bounds a step

Sizes are the config's, clips random. What cannot be measured (F5-TTS is not installed, memory is short) gets a line
that says so. B clips, T mel frames, L layers.
"""

from configurator import Count, configure, quiet_interrupt

if __name__ == "__main__":
    quiet_interrupt()

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import common
import train
from audio import FRAME_RATE, N_MELS
from backbones import package
from data import Batch, token_count
from model import flops_per_frame, make_xt, sample
from train import Config


@dataclass
class BenchArgs(Config):
    """Config's keys, and:"""

    only: str = ""  # run only the rows whose name contains this
    runs: Count = 5  # repetitions of each row
    frames: Count = 4096  # mel frames per training step here
    clip_frames: Count = 256  # T of each clip in it
    out: str = "out/bench.md"  # where the table goes


COMPARED = {  # a setting of the training step: what, without, with it
    "compile": ("compiled / not", False, True),
    "optimizer": ("Muon for the blocks' matrices / AdamW", "adamw", "muon"),
    "checkpoint_activations": ("checkpoint_activations / not", False, True),
    "align_layers": ("AG-REPA (3 layers, cached teachers) / plain", (), (1, 2, 3)),
}
TEN_SECONDS = int(10 * FRAME_RATE)
Measure = tuple[str, Callable[[], float], str]  # what, one measurement of it, its unit


class Bench:
    """What the rows share: the device, and batches, runs and steps of the config's size."""

    def __init__(self, args: BenchArgs):
        self.args = replace(args, compile=bool(args.compile), align_layers=(), code_init=False)  # what rows change
        self.machine = common.join_group(args)
        self.device = self.machine.device
        cpu = f"{torch.get_num_threads()} cores of {torch.cpu.get_capabilities().get('cpu_name', 'a CPU')}"
        self.device_name = torch.cuda.get_device_name() if self.device.startswith("cuda") else cpu
        self.B, self.T = max(1, args.frames // args.clip_frames), args.clip_frames  # of a training step
        demo = args.audio_teacher == "demo"
        self.teachers = [("whisper", 384), ("aisfx", 512)] if demo else [("whisper", 1280), ("beats", 768)]

    def batch(self, B: int, T: int) -> Batch:
        """B random clips of T frames, the domains in turn."""
        N, codes = token_count(T, 50), min(self.args.speech_codes, self.args.audio_codes, 1024)
        tokens = torch.randint(codes, (B, N, 1 + self.args.beats_tokens))
        teacher = {name: torch.randn(B, width) for name, width in self.teachers}
        mel, frames, ids = torch.randn(B, T, N_MELS) - 5, torch.full((B,), T), torch.arange(B)
        return Batch(mel, frames, tokens, torch.full((B,), N), ids % 2, teacher, frames // 10, ids).to(self.device)

    def run(self, **changes) -> train.Run:
        """A run at step 0; with align_layers it is at the start of phase II."""
        config = replace(self.args, **changes)
        run = train.new_run(config, {"teachers": self.teachers, "mel_mean": -5.9, "mel_std": 2.3}, self.machine)
        train.trade(run.objective.model, config)
        run.objective.expected = (self.B / 2, self.B / 2)
        if config.align_layers:
            train.intervene(run, [{l: [0.5] for l in config.align_layers} for _ in common.DOMAINS])
        return run

    def step(self, run: train.Run, batch: Batch) -> None:
        """One step of train.train on one batch."""
        with common.precision(self.device, run.config.dtype):
            loss = run.objective(batch)["loss"]
        loss.backward()
        common.clip_and_step(run.objective, run.optimizer, run.step, run.config)
        train.update_ema(run.ema, run.objective.model, run.config.ema_decay)

    def infer(self, function: Callable, *args, **options) -> None:
        """function(*args, **options) as it runs outside training."""
        with torch.no_grad(), self.machine.precision():
            function(*args, **options)

    def seconds(self, work: Callable[[], object], of: float = 1.0) -> float:
        """Wall time of one call, the GPU's work included, as a share `of` so many seconds."""
        wait = torch.get_device_module(self.device).synchronize
        wait()
        start = time.perf_counter()
        work()
        wait()
        return (time.perf_counter() - start) / of

    def ratio(self, one: Callable[[], object], other: Callable[[], object]) -> float:
        """Time of `other` over time of `one`."""
        return self.seconds(other) / self.seconds(one)


def step_row(b: Bench) -> Iterator[Measure]:
    """A step of this config."""
    run, frames = b.run(), b.B * b.T
    work, flops = partial(b.step, run, b.batch(b.B, b.T)), frames * flops_per_frame(run.objective.model, b.T)
    size = f"{common.count_parameters(run.objective) / 1e6:.0f} M parameters, {b.B} x {b.T} frames"
    yield f"training step, {size}", lambda: frames / b.seconds(work), "frames/s"
    yield "model FLOPs of that", lambda: flops / b.seconds(work) / 1e12, "TFLOP/s"


def against(b: Bench, key: str) -> Iterator[Measure]:
    """A step with a setting changed, against one without."""
    what, *values = COMPARED[key]
    plain, changed = (partial(b.step, b.run(**{key: value}), b.batch(b.B, b.T)) for value in values)
    yield f"time of a training step, {what}", lambda: b.ratio(plain, changed), "times"


def memory_row(b: Bench) -> Iterator[Measure]:
    """Activations kept for backward, per frame: by 4 clips more, which weights do not grow with."""

    def kept(run: train.Run) -> float:
        totals = []
        for B in (4, 8):
            saved: list[torch.Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x), b.machine.precision():
                run.objective(b.batch(B, b.T))  # without a backward, so that nothing is unpacked
            totals.append(sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in saved)}.values()))
        return (totals[1] - totals[0]) / (4 * b.T) / 1024

    for again, note in ((False, ""), (True, ", checkpoint_activations")):
        yield f"kept for backward, per frame{note}", partial(kept, b.run(checkpoint_activations=again)), "KiB"


def foga_row(b: Bench) -> Iterator[Measure]:
    """The sweep of FoG-A against one forward pass."""
    L, model, batch = b.args.n_layer, b.run().objective.model.eval(), b.batch(2, b.T)
    given = batch.mel, batch.mel.new_full((2,), 0.5), model.embed_condition(batch)
    one, sweep = partial(b.infer, model.velocity, *given), partial(b.infer, model.ablated, *given)
    yield f"FoG-A of {L} layers in one sweep, in forward passes per layer", lambda: b.ratio(one, sweep) / L, "forwards"


def sampling_row(b: Bench) -> Iterator[Measure]:
    """Guided mels, with EPSS below 32 evaluations."""
    model = b.run().objective.model.eval()
    for B, nfe in itertools.product((1, 16), (32, 16, 7)):
        cond = model.embed_condition(b.batch(B, TEN_SECONDS))
        work = partial(b.infer, sample, model, cond, nfe, epss=nfe < 32)
        yield f"real-time factor of mels, nfe {nfe}, guided, {B} x 10 s", partial(b.seconds, work, 10 * B), ""


def peer_row(b: Bench) -> Iterator[Measure]:
    """F5-TTS's DiT in its eager form at equal size, batch and precision: velocity loss, backward, clipping, fused
    AdamW; no EMA, no hidden states, no second loss, which our step has. Then its own sampler beside ours."""
    a, model, batch, clip = b.args, b.run().objective.model.eval(), b.batch(b.B, b.T), b.batch(1, TEN_SECONDS)
    size = {"dim": a.n_embd, "depth": a.n_layer, "heads": a.n_head, "dim_head": a.n_embd // a.n_head}
    size |= {"ff_mult": a.ff_mult, "dropout": a.dropout, "text_dim": a.n_embd}
    size |= {"text_num_embeds": max(a.speech_codes, a.audio_codes)}
    f5 = package("f5tts", "f5_tts.model.backbones.dit").DiT(**size).to(b.device).train()
    optimizer = common.make_optimizer(f5, a)
    mask = torch.ones(batch.mel.shape[:2], dtype=torch.bool, device=b.device)

    def theirs(dtype: str) -> None:
        t = torch.rand(b.B, device=b.device)
        x_t, target = make_xt(model, batch.mel, t, 1.0)
        with common.precision(b.device, dtype):
            v = f5(x_t, torch.zeros_like(x_t), batch.tokens[..., 0], t, mask=mask)
        (v.float() - target).square().mean().backward()
        common.clip_and_step(f5, optimizer, 0, a)

    for dtype, fused in itertools.product(("bfloat16", "float32"), (False, True)):
        ours = partial(b.step, b.run(optimizer="adamw", compile=fused, dtype=dtype), batch)
        what = f"{'ours compiled' if fused else 'ours'} / F5-TTS's DiT ({common.count_parameters(f5) / 1e6:.0f} M)"
        yield f"speed of a training step, {what}, {dtype}", partial(b.ratio, ours, partial(theirs, dtype)), "times"
    cfm = package("f5tts", "f5_tts.model.cfm").CFM(transformer=f5, mel_spec_kwargs={"n_mel_channels": N_MELS}).eval()
    prompt, text = clip.mel[:, : TEN_SECONDS // 10], clip.tokens[..., 0]
    sampled = partial(b.infer, cfm.to(b.device).sample, prompt, text, TEN_SECONDS, steps=16, cfg_strength=2.0)
    ours = partial(b.infer, lambda: sample(model, model.embed_condition(clip), 16, epss=True))
    yield "speed of sampling a 10 s mel at nfe 16, ours / F5-TTS's", partial(b.ratio, ours, sampled), "times"


ROWS = {row.__name__: row for row in (step_row, peer_row, memory_row, foga_row, sampling_row)}
ROWS |= {key: partial(against, key=key) for key in COMPARED}


def main(args: BenchArgs) -> None:
    """Prints each measurement as it is made and writes the table to args.out, whole after each row."""
    b, lines = Bench(args), [("what", "number", "unit")]

    def note(what: str, number: str | Exception, unit: str = "") -> None:
        if isinstance(number, Exception):
            number = f"not measured: {(str(number) or type(number).__name__).splitlines()[0]}"
        lines.append((what, number, unit))
        print(f"{what}: {number} {unit}".rstrip(), flush=True)

    size = f"{args.n_layer} layers x {args.n_embd}, {args.dtype} precision{', compiled' if args.compile else ''}"
    head = f"{b.device_name}, torch {torch.__version__}; {size}; median of {args.runs} runs [lowest, highest]"
    print(head)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for name in (name for name in ROWS if args.only in name):
        try:
            for what, measure, unit in ROWS[name](b):
                try:
                    measure()  # once unmeasured: allocations, caches, compilation
                    values = [measure() for _ in range(args.runs)]
                    note(what, f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]", unit)
                except (RuntimeError, MemoryError) as error:  # short of memory, or this machine has no such kernel
                    note(what, error)
        except (RuntimeError, ValueError, MemoryError) as error:
            note(name, error)
        gc.collect()  # a row's models, which cycles hold
        with common.whole_file(args.out) as file:
            file.write(f"{head}\n\n{common.table(lines, markdown=True)}\n")


if __name__ == "__main__":
    common.command(main, configure(BenchArgs, __doc__))
