"""Measured speed and memory: every number a median of several runs with its spread, beside the device's name.

    python bench.py config/demo.py                    # prints the table, writes out/bench.md
    python bench.py config/unified_b.py --frames=38400 --compile        # on a GPU
    python bench.py config/demo.py --only=step        # only the rows whose name contains this

Model, batch and sampler are of the config's size, on random clips; no prepared data is needed. What cannot be measured
(F5-TTS is not installed, memory is short) gets a line that says so. Counts and arithmetic repeat exactly.
No other file makes claims of speed.
B clips, T mel frames, L layers.
"""

from dataclasses import dataclass
from typing import ClassVar

from configurator import configure
from train import Config


@dataclass
class BenchArgs(Config):
    """Config's keys, and:"""

    only: str = ""  # run only the rows whose name contains this
    runs: int = 5  # repetitions of each row
    frames: int = 4096  # mel frames per training step here
    clip_frames: int = 256  # T of each clip in it
    out: str = "out/bench.md"  # where the table goes

    ranges: ClassVar[dict] = Config.ranges | dict.fromkeys(("runs", "frames", "clip_frames"), (1, None))


if __name__ == "__main__":
    ARGS = configure(BenchArgs, __doc__)  # a typo is answered before torch is imported

import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch

import audio
import backbones
import common
import data
import evaluate
import train
from common import count_parameters, pick_device, precision
from model import attend, flops_per_frame, make_xt, sample
from prepare import __main__ as preparation
from prepare import corpora, demo

# dense bfloat16 peak in FLOP/s, by a part of the GPU's name (the makers' data sheets)
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}
PEAK |= {"L40S": 362e12, "L40": 181e12, "4090": 165e12}
PAPER_MFU = 0.4  # assumed by scaling_row, as the next two: bytes/s of a GPU's NVLink one way, and of a node's network
NVLINK = 450e9
NETWORKS = {"8 x 400 Gb/s": 8 * 50e9, "100 Gb/s": 12.5e9}
PROBES = 25  # of the paper's phase I
STEPS = 500_000  # of the paper's runs
Measure = tuple[str, Callable[[], float], str]  # what, one measurement of it, its unit


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{torch.get_num_threads()} cores of {model}, torch {torch.__version__}"


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of one call, the GPU's work included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Bench:
    """What the rows share: the arguments, the device, and models, batches and runs of the config's size."""

    def __init__(self, args: BenchArgs, folder: Path):
        self.args, self.folder, self.device = args, folder, pick_device(args.device)
        self.machine = common.Machine(0, 1, self.device, args.dtype)
        self.codes = min(args.speech_codes, args.audio_codes, 1024)  # in every codebook
        demo = args.audio_teacher == "demo"
        self.teachers = [["whisper", 384], ["aisfx", 512]] if demo else [["whisper", 1280], ["beats", 768]]

    def batch(self, clips: int = 0, T: int = 0, varied: bool = False) -> data.Batch:
        """`clips` clips of T frames (`varied`: the shorter ones three quarters of it), the domains in turn."""
        a, T = self.args, T or self.args.clip_frames
        B, rng = clips or max(1, a.frames // T), np.random.default_rng(0)
        frames = torch.full((B,), T)
        if varied:
            frames[1::2] = 3 * T // 4
        N, streams = data.token_count(T, 50), 2 if a.beats_tokens else 1
        tokens = torch.from_numpy(rng.integers(0, self.codes, (B, N, streams)))
        token_len = (frames * N) // T
        teacher = {name: torch.randn(B, width) for name, width in self.teachers}
        mel, domain = torch.randn(B, T, audio.N_MELS) - 5, torch.arange(B) % 2
        tokens, prompt = tokens if streams > 1 else tokens[..., 0], frames // 10
        return data.Batch(mel, frames, tokens, token_len, domain, teacher, prompt, torch.arange(B)).to(self.device)

    def run(self, **changes) -> train.Run:
        """A run at step 0, with nothing read from disk; with align=fixed it is at the start of phase II."""
        changed = {"code_init": False, "mel_stats": (-5.8843, 2.2615)} | changes
        config = replace(Config(**{f.name: getattr(self.args, f.name) for f in fields(Config)}), **changed)
        run = train.new_run(config, {"teachers": self.teachers}, self.machine)
        train.trade(run.objective.model, config)
        for p in run.objective.model.parameters():  # a zero output layer would make some work trivial
            if not p.any():
                torch.nn.init.normal_(p, std=0.02)
        return run

    def step(self, run: train.Run, batch: data.Batch) -> Callable[[], object]:
        """One whole training step, as train.py does it: forward, backward, clipping, optimizer, EMA."""
        return lambda: train.train_step(run, run.objective, [batch], self.machine)

    def frames_per_s(self, step: Callable[[], object], batch: data.Batch) -> Callable[[], float]:
        return lambda: int(batch.frames.sum()) / seconds(step, self.device)

    def ratio(self, one: Callable[[], object], other: Callable[[], object]) -> Callable[[], float]:
        """Time of `other` over time of `one`, measured in turn."""
        return lambda: 1 / (seconds(one, self.device) / seconds(other, self.device))


# ---- training


def step_row(b: Bench) -> Iterator[Measure]:
    """A step of this config on clips of one length, its MFU on a GPU that PEAK knows, and one with padded clips."""
    run, batch = b.run(align="none"), b.batch()
    size = f"{count_parameters(run.objective.model) / 1e6:.0f} M parameters, {len(batch.frames)} x {b.args.clip_frames}"
    step = b.step(run, batch)
    rate = b.frames_per_s(step, batch)
    yield f"training step, {size} frames", rate, "frames/s"
    flops = flops_per_frame(run.objective.model, b.args.clip_frames)
    yield "model FLOPs of that", lambda: rate() * flops / 1e12, "TFLOP/s"
    peak = next((p for name, p in PEAK.items() if name in device_name(b.device)), None)
    if peak and b.machine.precision()._enabled:
        yield "MFU (bfloat16 peak of the data sheet)", lambda: 100 * rate() * flops / peak, "%"
    padded = b.batch(varied=True)
    yield "the same, half of the clips a quarter shorter", b.frames_per_s(b.step(run, padded), padded), "frames/s"


def growth_row(b: Bench) -> Iterator[Measure]:
    """How a step's time grows with each dimension, as the exponent of a power law between the size and twice it."""

    def exponent(small: Callable, large: Callable) -> Callable[[], float]:
        return lambda: np.log2(seconds(large, b.device) / seconds(small, b.device))

    run, T, B = b.run(align="none"), b.args.clip_frames, max(1, b.args.frames // b.args.clip_frames // 2)
    base, more, longer = (b.step(run, b.batch(*size)) for size in ((B, T), (2 * B, T), (B, 2 * T)))
    yield "growth of step time with clips, 1 in proportion", exponent(base, more), "exponent"
    yield "growth with frames of a clip", exponent(base, longer), "exponent"
    deep = b.run(align="none", n_layer=2 * b.args.n_layer)
    yield "growth with layers", exponent(base, b.step(deep, b.batch(B, T))), "exponent"


def peer_row(b: Bench) -> Iterator[Measure]:
    """F5-TTS's DiT in its eager form at equal width, depth, heads, feed-forward, batch and precision: velocity loss,
    backward, clipping, fused AdamW; no EMA, no hidden states, no second loss, which our step has."""
    a, batch = b.args, b.batch()
    f5 = f5_dit(a, b.device).train()
    optimizer = torch.optim.AdamW(f5.parameters(), 1e-4, fused=True)
    text = batch.tokens if batch.tokens.dim() == 2 else batch.tokens[..., 0]
    mask = torch.ones(batch.mel.shape[:2], dtype=torch.bool, device=b.device)

    def theirs(dtype: str) -> None:
        x1, t = batch.mel, torch.rand(len(text), device=b.device)
        x0 = torch.randn_like(x1)
        with precision(b.device, dtype):
            v = f5(torch.lerp(x0, x1, t[:, None, None]), torch.zeros_like(x1), text, t, mask=mask)
        (v.float() - (x1 - x0)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(f5.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    name = f"F5-TTS's DiT ({count_parameters(f5) / 1e6:.0f} M) as it is"
    for dtype, fused in itertools.product(("bfloat16", "float32"), (False, True)):
        machine, run = replace(b.machine, dtype=dtype), b.run(align="none", optimizer="adamw", compile=fused)

        def ours(run=run, machine=machine) -> None:
            train.train_step(run, run.objective, [batch], machine)

        label = f"speed of a training step, {'ours compiled' if fused else 'ours'} / {name}, {dtype}"
        yield label, b.ratio(ours, lambda dtype=dtype: theirs(dtype)), "times"


def f5_dit(a: Config, device: str) -> torch.nn.Module:
    dit = backbones.package("f5tts", "f5_tts.model.backbones.dit").DiT
    size = {"dim": a.n_embd, "depth": a.n_layer, "heads": a.n_head, "dim_head": a.n_embd // a.n_head}
    codes = max(a.speech_codes, a.audio_codes)
    f5 = dit(**size, ff_mult=a.ff_mult, dropout=a.dropout, text_num_embeds=codes, text_dim=a.n_embd)
    for p in f5.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return f5.to(device)


def compile_row(b: Bench) -> Iterator[Measure]:
    torch._dynamo.reset()  # nothing compiled before
    batch, run = b.batch(), b.run(align="none", compile=True)
    step, plain = b.step(run, batch), b.step(b.run(align="none", compile=False), batch)
    first = seconds(step, b.device)
    yield "torch.compile of the blocks: the first step, once", lambda: first, "s"
    yield "speed of a training step, compiled / not", b.ratio(step, plain), "times"


def optimizer_row(b: Bench) -> Iterator[Measure]:
    batch = b.batch()
    adamw, muon = (b.step(b.run(align="none", optimizer=name), batch) for name in ("adamw", "muon"))
    yield "time of a training step, Muon for the blocks' matrices / AdamW", b.ratio(adamw, muon), "times"


def attention_row(b: Bench) -> Iterator[Measure]:
    """model.attend in bfloat16, with backward at a training step's shape, without at a guided 10 s clip's."""
    heads, width = b.args.n_head, b.args.n_embd // b.args.n_head
    for B, T, learn in ((len(b.batch().frames), b.args.clip_frames, True), (2, int(10 * audio.FRAME_RATE), False)):
        qkv = torch.randn(3, B, heads, T, width, device=b.device, dtype=torch.bfloat16, requires_grad=learn)

        def work(attention: Callable, qkv=qkv, learn=learn) -> None:
            y = attention(*qkv, None)
            if learn:
                y.backward(qkv[0].detach())

        ours, torchs = partial(work, attend), partial(work, torch.nn.functional.scaled_dot_product_attention)
        name = f"speed of attention, {B} x {T} frames in bfloat16{', with backward' if learn else ''}, ours / torch's"
        yield name, b.ratio(ours, torchs), "times"


def align_row(b: Bench) -> Iterator[Measure]:
    batch, layers = b.batch(), tuple(range(1, 1 + min(3, b.args.n_layer)))
    aligned = b.run(align="fixed", align_layers=layers, weighting="equal")
    train.intervene(aligned, [{l: [0.5] for l in layers} for _ in range(2)])
    plain = b.run(align="none")
    cost = b.ratio(b.step(plain, batch), b.step(aligned, batch))
    name = "time of an AG-REPA step (3 layers, cached teachers) / a plain one, median of 8 pairs"
    yield name, lambda: statistics.median(cost() for _ in range(8)), "times"


def teacher_row(b: Bench) -> Iterator[Measure]:
    """REPA's habit of running the frozen teachers in every step. The teachers are the demo's small ones."""
    encoders = preparation.Networks(replace(Config(), whisper="demo", audio_teacher="demo", device=b.device)).encoders
    batch, run = b.batch(), b.run(align="none")
    step, rng = b.step(run, batch), np.random.default_rng(0)
    length = b.args.clip_frames / audio.FRAME_RATE
    own = [int((batch.domain == d).sum()) for d in range(2)]
    waves = [
        [rng.normal(0, 0.1, int(t.sample_rate * length)).astype("f4") for _ in range(n)]
        for t, n in zip(encoders, own, strict=True)
    ]

    def online() -> None:
        for teacher, clips in zip(encoders, waves, strict=True):
            teacher.embed(clips)
        step()

    yield "time of a step with the demo's teachers run online / cached", b.ratio(step, online), "times"


def kept_per_frame(b: Bench, T: int, clips: int = 4, **changes) -> float:
    """Bytes that autograd keeps for the backward pass, per further frame: what `clips` clips of T frames more cost, so
    that what a step keeps once (weights in bfloat16) does not count."""
    run = b.run(align="none", **changes)
    weights = {p.untyped_storage().data_ptr() for p in run.objective.parameters()}

    def kept(batch: data.Batch) -> int:
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), b.machine.precision():
            losses = run.objective(batch)
        del losses  # held until here, so that no storage is counted in the place of another
        return sum(sizes.values())

    return (kept(b.batch(2 * clips, T)) - kept(b.batch(clips, T))) / (clips * T)


def memory_row(b: Bench) -> Iterator[Measure]:
    T = b.args.clip_frames
    yield "activations kept for backward, per frame", lambda: kept_per_frame(b, T) / 1024, "KiB"
    growth = np.log2(2 * kept_per_frame(b, 2 * T) / kept_per_frame(b, T))
    yield "growth of memory with frames of a clip", lambda: growth, "exponent"
    small = partial(kept_per_frame, b, T, checkpoint_activations=True)
    yield "kept per frame with checkpoint_activations", lambda: small() / 1024, "KiB"
    if b.device.startswith("cuda"):
        for again in (False, True):
            step = b.step(b.run(align="none", checkpoint_activations=again), b.batch())

            def peak(step=step) -> float:
                torch.cuda.reset_peak_memory_stats()
                step()
                return torch.cuda.max_memory_allocated() / 2**30

            name = f"peak GPU memory of a step of {b.args.frames} frames"
            yield name + (", checkpoint_activations" if again else ""), peak, "GiB"
    batch, plain = b.batch(), b.run(align="none", checkpoint_activations=False)
    step, again = b.step(plain, batch), b.step(b.run(align="none", checkpoint_activations=True), batch)
    yield "time of a step with checkpoint_activations / without", b.ratio(step, again), "times"


def fit_row(b: Bench) -> Iterator[Measure]:
    """On paper, not measured on a GPU: what a step of this config's batch_frames needs there, from the activations that
    are kept here with torch's fused attention, which GPUs use, in place of the CPU's."""
    weights = count_parameters(train.build_model(b.args, b.teachers, "meta"))
    constant = 20 * weights / 2**30  # weights, gradients, two moments of AdamW and the average, 4 bytes each
    yield f"{weights / 1e6:.0f} M weights, gradients, AdamW and EMA in float32", lambda: constant, "GiB"
    for again in (False, True):
        with mock.patch("model.attend", torch.nn.functional.scaled_dot_product_attention):
            kept = kept_per_frame(b, b.args.clip_frames, 2, checkpoint_activations=again)
        name = f"with {b.args.batch_frames} frames' activations" + (", checkpoint_activations" if again else "")
        yield name, lambda kept=kept: constant + kept * b.args.batch_frames / 2**30, "GiB"


def foga_row(b: Bench) -> Iterator[Measure]:
    """The sweep of FoG-A against one forward pass, and what the paper's probes cost of a whole run."""
    run, batch, L = b.run(align="none"), b.batch(2), b.args.n_layer
    model, t = run.objective.model.eval(), torch.full((2,), 0.5, device=b.device)
    with torch.no_grad():
        cond, x_t = model.embed_condition(batch), make_xt(model, batch.mel, t, 0.5)[0]

    @torch.no_grad()
    def sweep() -> None:
        with b.machine.precision():
            model.ablated(x_t, t, cond)

    @torch.no_grad()
    def forward() -> None:
        with b.machine.precision():
            model.velocity(x_t, t, cond)

    one = b.ratio(forward, sweep)
    yield f"FoG-A of all {L} layers in one sweep, in forward passes per layer", lambda: one() / L, "forwards"
    training = b.run(align="none")
    step, grid = b.step(training, b.batch()), b.args.probe_times

    def share() -> float:
        return 100 * PROBES * grid * seconds(sweep, b.device) / (STEPS * seconds(step, b.device))

    yield f"{PROBES} probes of 2 clips and {grid} t, share of {STEPS // 1000}k steps like the above", share, "%"


def scaling_row(b: Bench) -> Iterator[Measure]:
    """On paper, not measured: DDP on nodes of 8 H100, this config's batch_frames on each, clips of 10 s. Compute at
    PAPER_MFU of the peak; the all-reduce of float32 gradients goes over NVLink within a node and, once for the node,
    over its network; it hides behind backward, two thirds of compute; loading is hidden."""
    model = train.build_model(b.args, b.teachers, "meta")
    weights = count_parameters(model)
    compute = flops_per_frame(model, int(10 * audio.FRAME_RATE)) * b.args.batch_frames / (PAPER_MFU * PEAK["H100"])
    yield f"on paper, {weights / 1e6:.0f} M parameters on an H100: compute of a step", lambda: compute, "s"
    for nodes, (link, speed) in itertools.product((1, 2, 8), NETWORKS.items()):
        within = 2 * 7 / 8 * 4 * weights / NVLINK
        across = 2 * (nodes - 1) / nodes * 4 * weights / speed
        efficiency = compute / (compute + max(0.0, within + across - 2 / 3 * compute))
        if nodes > 1 or link == next(iter(NETWORKS)):
            where = f"{8 * nodes} GPUs" + (f", {link} per node" if nodes > 1 else "")
            yield f"{where}: all-reduce", lambda t=within + across: t, "s"
            yield f"{where}: share of the compute rate that is left", lambda e=100 * efficiency: e, "%"


# ---- sampling and evaluation


def sampling_row(b: Bench) -> Iterator[Measure]:
    """Guided mels of 10 s, one and 16 at once; EPSS below 32 evaluations."""
    model, T = b.run(align="none").objective.model.eval(), int(10 * audio.FRAME_RATE)
    for clips, nfe in itertools.product((1, 16), (32, 16, 7)):
        with torch.no_grad():
            cond = model.embed_condition(b.batch(clips, T))

        def work(cond=cond, nfe=nfe) -> None:
            with b.machine.precision():
                sample(model, cond, nfe, 2.0, -1.0, epss=nfe < 32)

        def factor(work=work, length=clips * T / audio.FRAME_RATE) -> float:
            return seconds(work, b.device) / length

        yield f"real-time factor of mels, nfe {nfe}, guided, {clips} x 10 s", factor, ""


def sampler_row(b: Bench) -> Iterator[Measure]:
    """F5-TTS's own CFM.sample beside ours: equal size, nfe, guidance and clip."""
    f5, T, nfe = f5_dit(b.args, b.device), int(10 * audio.FRAME_RATE), 16
    peer = backbones.package("f5tts", "f5_tts.model.cfm").CFM
    peer = peer(transformer=f5, mel_spec_kwargs={"n_mel_channels": audio.N_MELS}).eval().to(b.device)
    batch = b.batch(1, T)
    text = batch.tokens if batch.tokens.dim() == 2 else batch.tokens[..., 0]
    model = b.run(align="none").objective.model.eval()
    options = {"steps": nfe, "cfg_strength": 2.0, "sway_sampling_coef": -1.0}

    def theirs() -> None:
        with b.machine.precision():
            peer.sample(batch.mel[:, : T // 10], text, T, **options)

    @torch.no_grad()
    def ours() -> None:
        with b.machine.precision():
            sample(model, model.embed_condition(batch), nfe, 2.0, -1.0, epss=True)

    yield f"speed of sampling a 10 s mel at nfe {nfe}, ours / F5-TTS's", b.ratio(ours, theirs), "times"


def judge_row(b: Bench) -> Iterator[Measure]:
    rng, clips, length = np.random.default_rng(0), 8, 5
    waves = [rng.normal(0, 0.1, length * audio.SAMPLE_RATE).astype("f4") for _ in range(clips)]
    judge, listener = demo.load_judge("yamnet", "", b.device), evaluate.load_recogniser("demo", b.device)
    low = [audio.resample(w, audio.SAMPLE_RATE, 16000) for w in waves]

    def rate(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: clips / seconds(work, b.device)

    yield f"YAMNet embeddings of {length} s clips", rate(lambda: evaluate.embeddings(judge, waves)), "clips/s"
    yield f"Whisper tiny transcribes {length} s clips", rate(lambda: listener.transcribe(low)), "clips/s"
    a, c = rng.normal(size=(1500, 1024)), rng.normal(size=(1500, 1024))
    ours, scipys = partial(evaluate.frechet_distance, a, c), partial(sqrtm_distance, a, c)
    yield "Frechet distance of 1500 and 1500 embeddings of 1024", lambda: seconds(ours), "s"
    yield "speed of the same, ours / by scipy's sqrtm", b.ratio(ours, scipys), "times"


def sqrtm_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The formula of pytorch-fid and frechet-audio-distance, which itself asks for another numpy."""
    import scipy.linalg

    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(A @ B)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * root.real))


# ---- data and start-up


def decode_row(b: Bench) -> Iterator[Measure]:
    """Preparation of LibriSpeech-like clips: read flac, resample twice, log-mel on one core; then with the networks."""
    path, length = b.folder / "a.flac", 15.0
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, int(16000 * length)), 16000)
    clip = corpora.Clip("a.flac", path, "text", common.SPEECH, "g")

    def measure() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start, clips = time.perf_counter(), 20
        for _ in range(clips):
            wav, _ = preparation.decode(clip, (audio.SAMPLE_RATE, 16000), Config())
            audio.log_mel(torch.from_numpy(wav)).half().numpy()
        spent = time.perf_counter() - start
        torch.set_num_threads(threads)
        return clips * length / spent

    yield "decode + resample + mel of 16 kHz flac, one core", measure, "times real time"
    networks = preparation.Networks(replace(Config(), whisper="demo", audio_teacher="demo", device=b.device))

    def prepare(clips: int) -> None:
        own, _ = preparation.decode_all([clip] * clips, networks)
        networks.encode(common.SPEECH, own), networks.styles(common.SPEECH, own)

    def growth() -> float:
        return np.log2(seconds(lambda: prepare(8)) / seconds(lambda: prepare(4)))

    yield "growth of preparation with clips (demo's networks)", growth, "exponent"


def large_dataset(folder: Path, clips: int) -> data.Dataset:
    """A prepared folder's indices for `clips` clips of LibriSpeech-like lengths, without their shards."""
    rng = np.random.default_rng(0)
    length = np.concatenate([rng.normal(14, 1.5, clips * 2 // 3), rng.uniform(2, 16, clips - clips * 2 // 3)])
    index = np.zeros(clips, data.INDEX)
    index["frames"] = (length.clip(1.5, 17) * audio.FRAME_RATE).astype(int)
    index["shard"] = np.arange(clips) // preparation.SHARD_CLIPS
    np.save(folder / "train.npy", index)
    (folder / "meta.json").write_text(json.dumps({"token_rates": [50, 50], "streams": 2, "teachers": []}))
    return data.Dataset(folder, "train")


def dataset_row(b: Bench) -> Iterator[Measure]:
    """What a large corpus costs before the first step."""
    large_dataset(b.folder, 1_000_000)
    yield "open a dataset of 1 M clips", lambda: seconds(lambda: len(data.Dataset(b.folder, "train"))), "s"

    def choose() -> None:
        data.TrainingBatches(data.Dataset(b.folder, "train"), Config()).ids(0)

    yield "bucket 1 M clips and choose the first batch", lambda: seconds(choose), "s"
    code = (
        "import sys, shards; from configurator import Config\n"
        "used = lambda: int(open('/proc/self/statm').read().split()[1]) * 4\n"
        "before = used(); b = data.TrainingBatches(data.Dataset(sys.argv[1], 'train'), Config()); b.ids(0)\n"
        "print(used() - before)"
    )

    def memory() -> float:
        command = [sys.executable, "-c", code, str(b.folder)]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return int(done.stdout) / 1024

    yield "both, added memory of the process", memory, "MB"


def padding_row(b: Bench) -> Iterator[Measure]:
    """Of the default's batches, which are trimmed where clips are alike, and without that."""
    dataset = large_dataset(b.folder, 100_000)
    trimmed, whole = (data.TrainingBatches(dataset, replace(Config(), trim=trim)) for trim in (Config.trim, 0.0))
    yield "padding on LibriSpeech-like lengths", lambda: 100 * trimmed.padding(), "%"
    yield "frames trimmed for that", lambda: 100 * trimmed.left_out(), "%"
    yield "padding without trimming", lambda: 100 * whole.padding(), "%"


def loader_row(b: Bench) -> Iterator[Measure]:
    """The loader on real files against a step of this config: what a step would wait without threads, and with."""
    rng, prepared, T = np.random.default_rng(0), [], b.args.clip_frames
    widths = [width for _, width in b.teachers]
    for i in range(256):
        clip, mel = corpora.Clip(f"{i}", b"", "text", i % 2, ""), rng.normal(-5, 2, (T, audio.N_MELS)).astype("f2")
        tokens = rng.integers(0, b.codes, (data.token_count(T, 50), 1))
        wav, embedding = np.zeros(0, np.float32), np.zeros(widths[i % 2])
        style = np.zeros((16, widths[1]))
        prepared.append(preparation.Prepared(clip, mel, wav, wav, False, tokens, embedding, style))
    preparation.write_shard(b.folder / "train_00000", prepared, widths, -11.5)
    preparation.join(b.folder, ["train_00000"], {"teachers": b.teachers, "token_rates": [50, 50], "streams": 1})
    config = replace(Config(), batch_frames=b.args.frames, batch_size=b.args.frames // T + 1, beats_tokens=False)
    batches = data.TrainingBatches(data.Dataset(b.folder, "train"), config)
    run, ahead = b.run(align="none", beats_tokens=False), data.Prefetcher(batches, max(1, b.args.loader_threads))
    step, counter = b.step(run, batches(0).to(b.device)), itertools.count()
    load, thousands = partial(seconds, partial(batches, 0)), int(batches(0).frames.sum()) / 1000
    yield "loader, one thread, 1000 frames", lambda: 1000 * load() / thousands, "ms"
    yield "loader without threads, share of a step", lambda: 100 * load() / seconds(step, b.device), "%"

    def stall() -> float:
        ahead(next(counter))
        spent = seconds(step, b.device)
        return 100 * seconds(lambda: ahead(next(counter))) / spent

    yield "data stall with loader_threads, share of a step", stall, "%"


def help_row(b: Bench) -> Iterator[Measure]:
    for script in ("train.py", "probe.py"):
        command = [sys.executable, str(Path(__file__).parent / script), "--help"]
        run = partial(subprocess.run, command, capture_output=True, check=True)
        yield f"python {script} --help", lambda run=run: seconds(run), "s"


ROWS = (
    step_row, peer_row, compile_row, optimizer_row, attention_row, align_row, teacher_row, memory_row, growth_row,
    fit_row, foga_row, scaling_row, sampling_row, sampler_row, judge_row, decode_row, dataset_row, padding_row,
    loader_row, help_row,
)  # fmt: skip


def lines_of(row: Callable[[Bench], Iterator[Measure]], args: BenchArgs) -> Iterator[str]:
    """The table's lines of one row function, each once measured."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            for what, measure, unit in row(Bench(args, Path(folder))):
                measure()  # once unmeasured: allocations, caches, compilation
                values = [measure() for _ in range(args.runs)]
                yield f"| {what} | {statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}] | {unit} |"
        except (backbones.NotInstalled, demo.FetchError, torch.OutOfMemoryError, MemoryError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            yield f"| {row.__name__} | not measured: {reason} | |"
    gc.collect()  # a row's models, which cycles hold


def main(args: BenchArgs) -> None:
    size = f"{args.n_layer} layers x {args.n_embd}, {args.dtype} precision{', compiled' if args.compile else ''}"
    head = f"{device_name(pick_device(args.device))}; {size}; median of {args.runs} runs [lowest, highest]"
    heading = [head, "", "| what | number | unit |", "|---|---|---|"]
    rows = (lines_of(row, args) for row in ROWS if args.only in row.__name__)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w") as file:
        for line in itertools.chain(heading, itertools.chain.from_iterable(rows)):
            print(line, flush=True)
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main(ARGS)
