"""Probe, then intervene: trains the flow-matching DiT and aligns only the layers that drive it (AG-REPA).

    python train.py config/demo.py                                   # prepares the data, trains, evaluates
    python train.py config/demo.py --batch_size=8 --out_dir=out/small
    python train.py config/demo.py --align=none --branch_from=out/demo/phase1.pt --out_dir=out/none
    torchrun --nproc_per_node=8 train.py config/unified_b.py

Phase I (phase1_steps): L_FM + L_BiTC, with probes. At its end layers and weights are selected and frozen, and
phase1.pt is saved, from which every run of a comparison branches. Phase II adds the alignment term. A run stopped by
Ctrl-C, SIGTERM or a crash continues when the same command is given again. Everything goes to out_dir: ckpt.pt,
phase1.pt, config.json, log.csv, probe.json, probe.png, samples/, eval.json.
"""

from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from configurator import Amount, Count, Name, Natural, Positive, Share, configure, to_words


@dataclass
class Config:
    """Every setting of preparation, training and probing; a config file lists only what differs."""

    # run
    out_dir: Name = "out/unified_b"  # run directory; an unfinished run found there is continued
    branch_from: str = ""  # phase1.pt of another run: start at the end of its phase I
    seed: Natural = 0  # seeds weights, data order and noise
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto takes bfloat16 where the machine has it
    compile: bool | None = None  # torch.compile each block; None: on CUDA, of our own model
    checkpoint_activations: bool = False  # compute activations again in backward: less memory, up to a third more time
    loader_threads: Natural = 1  # threads that prepare the next batches; 0: none
    # corpus
    data_dir: Name = "data/unified_b"  # prepared shards, shared by all runs on the same data
    speech_dir: str = ""  # any folder of recordings, each with a same-named .txt; "demo": fetch a small corpus
    audio_dir: str = ""  # any folder of sounds, captioned by a same-named .txt or their name; "demo": fetch some
    librispeech_dir: str = ""  # LibriSpeech, any of its splits
    audioset_dir: str = ""  # AudioSet: *_segments.csv, ontology.json and clips named after their YouTube id
    manifest: str = ""  # .jsonl of path, text, domain and where wanted start, end, group
    min_seconds: Positive = 0.5  # shorter clips are skipped
    max_seconds: Positive = 30.0  # longer clips are skipped; Whisper hears 30 s
    held_out: Share = 0.02  # share of clips kept for validation and evaluation, in whole groups (speakers, texts)
    data_seed: Natural = 0  # seeds the held-out split and the tokenizers
    reference_clips: Natural = 300  # training clips per domain whose waveform is kept, the reference of FAD
    # teachers (an encoder of transformers by folder or hub name, @LAYER where wanted; BEATs' .pt) and tokenizers
    speech_teacher: str = "openai/whisper-large-v3"  # "demo": Whisper tiny.en
    audio_teacher: str = "BEATs_iter3_plus_AS2M.pt"  # "demo": the aisfx sound-effects network
    speech_tokenizer: Literal["s3", "whisper_vq"] = "s3"  # whisper_vq: VQ on the states of a network, fitted here
    speech_tokenizer_from: str = ""  # that network, named as a teacher; empty: the speech teacher
    audio_tokenizer_from: str = ""  # the network whose features AST reads, named as a teacher; empty: the audio teacher
    s3: str = "speech_tokenizer_v1"  # S3's name in the s3tokenizer package
    audio_tokenizer: str = ""  # an AST fitted before, the audio_tokenizer.pt of a prepared folder; empty: fitted here
    beats_tokenizer: str = "Tokenizer_iter3_plus_AS2M.pt"  # path of the BEATs tokenizer behind beats_tokens
    speech_codes: Count = 4096  # codebook size of the speech tokens
    audio_codes: Count = 4096  # codebook size of the audio tokens
    beats_tokens: bool = True  # config B: a second stream of BEATs tokens beside the primary one
    interleave: Literal["pair", "sequence"] = "pair"  # two streams: concat -> linear, or 2N tokens as written
    tokenizer_clips: Count = 20_000  # most training clips that one is fitted on here, in 1.5 MB of memory each at 10 s
    tokenizer_steps: Count = 100_000  # its training steps
    tokenizer_batch: Count = 32  # windows of 96 features per step
    tokenizer_lr: Positive = 1e-4  # peak of its one-cycle schedule
    tokenizer_width: Count = 1024  # of its network and of its codebook's vectors
    code_init: bool = False  # start the token table at the tokenizer's codebook, so that near codes start near
    # model
    backbone: str = ""  # f5tts, f5tts_text, voicebox, cosyvoice, matcha, or yours, FILE.py:Class; empty: our DiT
    backbone_layers: str = ""  # path of your model's list of residual blocks, as net.blocks, instead of its layers()
    init_from: str = ""  # weights to start from, ours or published, a .safetensors or .pt
    init_partial: bool = False  # leave what has another name or shape there as it is, instead of refusing
    n_layer: Count = 24  # DiT blocks
    n_head: Count = 16  # attention heads
    n_embd: Count = 1024  # model width D
    ff_mult: Count = 4  # feed-forward width as a multiple of D
    dropout: Share = 0.2  # in attention output and feed-forward
    # flow matching
    sigma: Positive = 0.5  # standard deviation of the noise x0
    token_drop: Share = 0.1  # probability that a clip's whole condition is dropped, for guidance
    prompt_drop: Share = 0.1  # probability that a clip's reference mel is dropped
    prompt_max: Share = 0.3  # longest reference prefix, as a share of the clip
    mel_floor: float = -11.5129  # log-mel below this (1e-5) counts as this
    mel_stats: tuple[float, ...] = (-5.8843, 2.2615)  # log-mel mean and std; (): per bin, from the training split
    # optimisation
    max_steps: Count = 500_000  # optimizer steps, both phases
    batch_frames: Count = 38_400  # mel frames of a batch, padding included
    batch_size: Count = 64  # most clips of a batch
    accumulate: Count = 1  # batches per step and rank, their gradients averaged
    crop_frames: Natural = 0  # longer clips are cropped to this at random, each time anew; 0: never
    trim: Share = 0.05  # clips of a batch are cut, mostly at their end, to its shortest where none loses a larger share
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for everything else
    learning_rate: Positive = 1e-4  # peak of the one-cycle schedule
    lr_warmup: Share = 0.1  # share of max_steps on the way up
    lr_decay: Share = 1.0  # share of max_steps on the way down; before it, of less than 1, max_steps may be changed
    weight_decay: Amount = 0.1  # on matrices
    beta2: Share = 0.999  # AdamW; beta1 is 0.9
    grad_clip: Positive = 1.0  # largest gradient norm
    ema_decay: Share = 0.9999  # of the averaged weights, which probe, sample and evaluate use
    # probe, then intervene
    phase1_steps: Count = 5000  # phase I: L_FM + L_BiTC; at its end layers are selected and phase1.pt is saved
    probe_every: Count = 200  # steps between probes in phase I
    probe_clips: Count = 8  # clips per domain in a probe's batch, drawn anew each time
    select_from: Count = 3  # the last probes of phase I, whose mean selects
    probe_times: Count = 8  # points of the t grid
    probe_frames: Count = 1000  # probe clips are cut to this
    bitc_weight: Amount = 1.0  # weight of L_BiTC
    align: str = "foga"  # the rule: none, fixed, random, or of probe.RULES: foga, foga_excess, gradnorm, lasp, stores
    ablation: Literal["zero", "mean", "resample"] = "zero"  # what FoG-A puts in a layer's place; zero: the paper's
    align_head: Literal["mlp", "conv1d", "conv2d", "none"] = "mlp"  # on the pooled state; with frames on each frame's
    align_teacher: Literal["external", "self", "ema"] = "external"  # self: a deeper layer; ema: of the average
    align_target: Literal["clip", "crop", "frames", "shuffled"] = "clip"  # shuffled: another clip's, as a control
    target_rate: Positive = 12.5  # teacher features per second that are stored for crop and frames
    align_norm: Literal["raw", "centred", "zscore"] = "raw"  # of the target; zscore of frames: by clip
    t_weight: Literal["none", "taro"] = "none"  # of a clip's alignment by its t; taro: TARO's
    dispersive: Amount = 0.0  # weight of the dispersive loss on the aligned layers, a control without a teacher
    ctc_weight: Amount = 0.0  # weight of CTC to the text at half the depth, as A-DMA's
    align_layers: tuple[int, ...] = ()  # the layers, 1..n_layer, for align=fixed
    top_k: Count = 3  # layers selected per domain
    weighting: Literal["normalized", "equal", "paper"] = "paper"  # shares of align_weight by FoG-A, equal ones; eq. 11
    align_weight: Amount = 2.0  # sum of a domain's weights, whatever the rule; weighting=paper: what multiplies FoG-A
    timestep_adaptive: bool = False  # layers and heads for each part of the t grid of the probe, for align=foga
    refresh_epochs: Amount = 0.0  # epochs between new probes and selections in phase II; 0: selected once
    align_stop: Natural = 0  # step after which the alignment term is off (HASTE); 0: never
    head_dim: Natural = 0  # hidden width of the alignment heads; 0: n_embd
    # reporting
    log_every: Count = 10  # steps between rows of log.csv
    eval_every: Count = 2000  # steps between held-out losses
    eval_clips: Count = 64  # held-out clips per domain for the held-out loss
    save_every: Count = 2000  # steps between checkpoints
    keep_every: Natural = 0  # steps between checkpoints that stay, as ckpt_000400.pt; 0: none
    evaluate_every: Natural = 0  # steps between runs of evaluate.py, for curves of FAD and WER; 0: only at the end
    # sampling and evaluation at the end of a run
    nfe: Count = 32  # velocity evaluations per clip
    cfg_scale: float = 3.0  # guidance: v_u + cfg_scale (v_c - v_u); 1 is none
    sway: float = -1.0  # sway sampling coefficient; negative dwells near the noise
    vocoder: str = "charactr/vocos-mel-24khz"  # hub name or folder of a Vocos, or griffin_lim, which needs no weights
    asr: str = "openai/whisper-large-v3"  # recogniser for WER: hub name or folder; "demo": Whisper tiny.en
    fad_model: Literal["yamnet", "vggish", "aisfx", "whisper", "none"] = "yamnet"  # network under FAD; not a teacher
    max_clips: Count = 200  # most held-out clips per domain that are generated and scored
    eval_seeds: Count = 1  # noise seeds per clip
    language: str = "en"  # of the speech: Whisper's prompt, and the normaliser under WER
    tensorboard: bool = False  # also scalars, the probe figure and four clips to out_dir/tensorboard
    evaluate: bool = True  # run probe.py and evaluate.py on the finished checkpoint

    renamed: ClassVar[dict[str, str]] = {
        "warmup_steps": "phase1_steps", "optimiser": "optimizer", "cfg": "cfg_scale", "whisper": "speech_teacher"
    }  # fmt: skip


if __name__ == "__main__":
    ARGS = configure(Config, __doc__)  # a typo is answered before torch is imported

import contextlib
import copy
import gc
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import backbones
import common
import data
import probe
from common import DOMAINS, Machine, Optimizer, clip_and_step, command, step_seed
from data import Dataset, Prefetcher, TrainingBatches, fixed_batch
from model import DiTConfig, FlowModel, Objective, Selection
from report import Report, is_evaluated, tell_selection

# settings that a continued run may change, and those that a branch from the end of phase I may change as well
MAY_DIFFER = (
    "out_dir branch_from accumulate device dtype compile checkpoint_activations loader_threads data_dir log_every "
    "eval_every eval_clips save_every keep_every nfe cfg_scale sway vocoder asr fad_model evaluate evaluate_every "
    "eval_seeds max_clips language tensorboard"
).split() + data.CORPUS  # what data_dir was prepared from; Run.data says which preparation it is
BRANCH_MAY_DIFFER = (
    "align align_target align_norm target_rate align_layers align_head align_teacher timestep_adaptive refresh_epochs "
    "align_stop top_k select_from weighting align_weight t_weight dispersive ctc_weight head_dim"
).split()


def train(config: Config, machine: Machine) -> "Run":
    """Trains to max_steps or to a signal; returns the run. Rank 0 alone prints and writes. All randomness of a step
    (noise, t, dropout, condition drop) follows from (seed, step, place), so a resumed run repeats it exactly, probes or
    samples between steps change nothing, and two ranks do what one does that accumulates twice. A non-finite gradient,
    which every rank sees alike after the all-reduce, moves no weight. A GPU is waited for in rows of the log alone."""
    run, dataset, held_out = open_run(config, machine)
    sampler = TrainingBatches(dataset, config, machine.rank, machine.world)
    run.objective.expected = sampler.expected_clips(dataset.index["domain"])
    batches = Prefetcher(sampler, config.loader_threads, pin=machine.device.startswith("cuda"))
    report = Report(run, machine, sampler, held_out) if machine.lead else None
    finite = common.Finite(lambda: save(run).result() if machine.lead else None)
    stop, objective = common.StopRequest(machine.device), None
    while run.step < config.max_steps and not stop.agreed():
        if objective is None:  # at first, and when heads have joined
            how = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
            objective = DistributedDataParallel(run.objective, **how) if machine.world > 1 else run.objective

        # the mean gradient of this rank's batches; with the last of them DDP takes the mean over ranks
        parts = [batches(run.step * config.accumulate + micro) for micro in range(config.accumulate)]
        run.objective.aligned = not config.align_stop or run.step < config.align_stop
        means = {}
        for micro, batch in enumerate(parts):
            torch.manual_seed(step_seed(config.seed, run.step, micro * machine.world + machine.rank))
            waits = machine.world > 1 and micro < config.accumulate - 1
            with objective.no_sync() if waits else contextlib.nullcontext():
                with machine.precision():
                    losses = objective(batch.to(machine.device))
                (losses["loss"] / config.accumulate).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / config.accumulate

        # one step of the optimizer and of the average
        moved = clip_and_step(run.objective, run.optimizer, run.step, config)
        update_ema(run.ema, run.objective.model, min(config.ema_decay, (1 + run.step) / (10 + run.step)))
        run.step += 1
        finite.check(run.step, moved["grad_norm"], [i for part in parts for i in part.ids.tolist()])

        # phase I probes; at its end layers are selected and their heads join, at a refresh they are selected anew
        switch = run.step == config.phase1_steps and not run.selected
        refresh = bool(run.objective.heads) and due(run.step, round(config.refresh_epochs * sampler.steps_per_epoch))
        control = switch or (refresh and config.align == "foga_excess")  # shown at the switch, else only selected by
        if switch or refresh or (not run.selected and due(run.step, config.probe_every)):
            probe_now(run, dataset, machine, control, decides=switch)
        if refresh:
            run.objective.select(select(run))
        if switch:
            if report:
                report.clock()  # phase1.pt tells a branch how long phase I took
                save(run, "phase1.pt")
            intervene(run)
            objective = None
            if report:
                common.optional(lambda: probe.report(config.out_dir, run.probes[-1]["result"], run.objective.selection))
                report.clock(counts=False)
        if report and (switch or refresh):
            tell_selection(run)

        # log, evaluate, save
        if report:
            report.count(means | moved, sum(int(part.frames.sum()) for part in parts) * machine.world)
            end = run.step == config.max_steps
            curve = due(run.step, config.evaluate_every) and not end
            keep_due, held_out_due = due(run.step, config.keep_every), end or due(run.step, config.eval_every)
            save_due = end or curve or keep_due or due(run.step, config.save_every)
            if held_out_due or save_due or due(run.step, config.log_every):
                report.row(held_out_due)
            if save_due:
                save(run)
            if keep_due:
                save(run, f"ckpt_{run.step:06d}.pt")
            if curve:
                run.writer.pending.result()
                stop.asked |= evaluate_checkpoint(config, machine, ["evaluate.py"]) == common.INTERRUPTED
            if held_out_due or save_due:
                report.clock(counts=False)  # none of that is training time
    finite.check()
    if report and run.step < config.max_steps:
        report.row(False)  # evaluate.py tells by the log how far a run has come
        save(run)
    run.writer.pending.result()
    stop.close()
    return run


def due(step: int, every: int) -> bool:
    """Whether something that is done every n steps, 0 for never, is done after this one."""
    return every > 0 and step % every == 0


def update_ema(ema: FlowModel, model: FlowModel, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, in place."""
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)


@dataclass
class Run:
    """The state of a training run; everything but the modules' wiring goes into ckpt.pt."""

    config: Config
    objective: Objective
    optimizer: Optimizer
    ema: FlowModel
    data: str = ""  # fingerprint of the preparation that it trains on
    world: int = 1  # ranks that share a step
    step: int = 0  # optimizer steps done
    selected: bool = False  # phase II
    probes: list[dict] = field(default_factory=list)  # one entry per probe
    seconds: float = 0.0  # spent training
    writer: common.Writer = field(default_factory=common.Writer)

    def state(self) -> dict:
        """What ckpt.pt holds: tensors and plain values only."""
        return {
            "config": asdict(self.config),
            "model_config": asdict(self.objective.model.config),
            "model": self.objective.model.state_dict(),
            "ema": self.ema.state_dict(),
            "heads": self.objective.heads.state_dict() if self.objective.heads else None,
            "optimizer": self.optimizer.state_dict(),
            "selection": self.objective.selection,
            "batches": self.world * self.config.accumulate,
        } | {name: getattr(self, name) for name in ("selected", "data", "step", "probes", "seconds")}


def build_model(config: Config, teachers: list) -> FlowModel:
    """The model of `config`; `teachers` is [(name, width), ...] per domain."""
    sizes = DiTConfig(
        **{name: getattr(config, name) for name in "n_layer n_head n_embd ff_mult dropout interleave".split()},
        codes=(config.speech_codes, config.audio_codes),
        second_codes=1024 if config.beats_tokens else 0,
        teachers=teachers,
    )
    return backbones.find(config.backbone, config.backbone_layers)(sizes)


def new_run(config: Config, meta: dict, machine: Machine) -> Run:
    """A run at step 0, drawn from config.seed; `meta` is what data.read_meta says of the prepared folder."""
    torch.manual_seed(config.seed)
    model = build_model(config, meta["teachers"])
    mean, std = config.mel_stats or (meta["mel_mean"], meta["mel_std"])
    model.mel_mean.copy_(torch.as_tensor(mean))
    model.mel_std.copy_(torch.as_tensor(std))
    model.mel_floor.fill_(config.mel_floor)
    if config.code_init:
        init_tokens_from_codebooks(model, config)
    model.to(machine.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    # of the matrices a fused one, as of q, k and v, counts as one
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and config.optimizer == "muon"]
    optimizer = common.make_optimizer(model, config, matrices)
    return Run(config, Objective(model, config, ema), optimizer, ema, data.fingerprint(meta), machine.world)


def init_tokens_from_codebooks(model: FlowModel, config: Config) -> None:
    """Starts each domain's rows of the token table at its codebook, rotated to width D, at the table's own scale."""
    for d, name in enumerate(DOMAINS):
        if (book := data.read_codebook(config.data_dir, name)) is not None:
            size = max(book.shape[1], model.config.n_embd)
            rotation = torch.linalg.qr(torch.randn(size, size))[0][: book.shape[1], : model.config.n_embd]
            rows = (book - book.mean(0)) @ rotation
            table = model.tokens.weight.data[model.code_offset[d] :][: len(rows)]
            table.copy_(rows * table.std() / rows.std())


def trade(model: FlowModel, config: Config) -> None:
    """Applies what trades memory or start-up for time."""
    model.checkpoint_activations = config.checkpoint_activations
    own_on_cuda = model.tokens.weight.is_cuda and not config.backbone and not config.checkpoint_activations
    if config.compile or (config.compile is None and own_on_cuda):
        torch._dynamo.config.optimize_ddp = False  # it splits wide blocks, which some dynamic shapes do not survive
        torch._dynamo.config.recompile_limit = 32  # one clip or many, padded or not, learning or probed: each its own
        for block in model.blocks:  # alike, so one compilation serves them all, and any shape
            block.compile(dynamic=True)


def probe_now(run: Run, dataset: Dataset, machine: Machine, control: bool, decides: bool) -> None:
    """Probes the raw weights, with `control` random ones too, on rank 0, on clips and noise drawn by (seed, step). What
    fails is left out on all ranks, with a warning, unless it `decides` the selection: ValueError."""
    c, seed = run.config, step_seed(run.config.seed, run.step)

    def probed() -> dict:
        batch = fixed_batch(dataset, c.probe_clips, seed, c.probe_frames).to(machine.device)
        with machine.precision():
            return probe.probe(run.objective.model, batch, c.probe_times, c.sigma, seed, c.top_k, c.ablation, control)

    shared = [common.optional(probed, {}) if machine.lead else {}]
    for name in probe.domains_in(shared[0]):
        scores = shared[0][name]
        top = " ".join(f"L{l} {scores['foga'][l - 1]:.3f}" for l in probe.top_layers(scores["foga"], c.top_k))
        print(f"probe at step {run.step}: {name:6s} FoG-A top {top}; BiT-C {scores['bitc']:.3f}", flush=True)
    if machine.world > 1:
        dist.broadcast_object_list(shared)
    if shared[0]:
        run.probes.append({"step": run.step, "result": shared[0]})
    elif decides:
        todo = "once that is mended the same command goes on from the last checkpoint to try again"
        raise ValueError(f"the probe at step {run.step}, which selects the layers, failed; {todo}")


def select(run: Run) -> Selection:
    """S and lambda (eq. 10-11) by this run's own rule, from the mean of its last probes."""
    last = [p["result"] for p in run.probes[-run.config.select_from :]]
    return probe.select(run.config, probe.averaged(last), run.config.n_layer)


def intervene(run: Run, selection: Selection | None = None) -> None:
    """Ends phase I: freezes the selection and adds the heads to the optimizer."""
    run.objective.select(selection or select(run))
    run.selected = True
    if run.objective.heads:
        for group in common.decay_groups(run.objective.heads.parameters(), run.config):
            run.optimizer.add_param_group(group)


def save(run: Run, name: str = "ckpt.pt") -> Future:
    """Begins to save the run; what it returns can be waited for."""
    run.writer.save(Path(run.config.out_dir) / name, run.state())
    return run.writer.pending


def export(run: Run) -> None:
    """model.safetensors: the averaged weights and what probe.py, sample.py and evaluate.py need to know of them."""
    state = run.state()
    about = {k: state[k] for k in ("config", "model_config", "selection", "data", "step", "seconds")}
    about["probes"] = [{"result": {"seconds": p["result"]["seconds"]}} for p in run.probes]
    common.export(Path(run.config.out_dir) / "model.safetensors", state["ema"], about)


def restore(run: Run, path: Path) -> None:
    """Loads ckpt.pt or phase1.pt into `run`. Raises CheckpointError when it was made with incompatible settings."""
    own = path.parent == Path(run.config.out_dir)
    state, used = common.load(path, own, "model_config model ema heads optimizer selection selected probes".split())
    may_differ = MAY_DIFFER + ([] if state["selected"] else BRANCH_MAY_DIFFER)
    schedules = map(common.plateau, (run.config, SimpleNamespace(**state["config"])))
    if all(up <= state["step"] <= down for up, down in schedules):
        may_differ.append("max_steps")  # at the peak of both schedules they are one
    todo = "" if own else "a branch continues a phase I, whose settings must match"
    common.same_run(run.config, run.data, state, may_differ, used, run.world, todo)
    backbones.check_weights(lambda: run.objective.model, 0, state["model"], used)
    run.objective.model.load_state_dict(state["model"])
    run.ema.load_state_dict(state["ema"])
    run.step, run.probes, run.seconds = state["step"], state["probes"], state["seconds"]
    if state["selected"]:
        intervene(run, state["selection"])
        if run.objective.heads:
            run.objective.heads.load_state_dict(state["heads"])
    run.optimizer.load_state_dict(state["optimizer"])


def open_run(config: Config, machine: Machine) -> tuple[Run, Dataset, Dataset]:
    """The run as it stands in out_dir, or branched, or new; and the training and held-out data."""
    run = new_run(config, data.check_prepared(config), machine)
    path = Path(config.out_dir) / "ckpt.pt"
    if common.exists(path):
        restore(run, path)
    elif config.branch_from:
        restore(run, Path(config.branch_from))
        rows = common.read_csv(Path(config.branch_from).with_name("evals.csv"))
        rows = [r for r in rows if int(r["step"]) <= run.step]  # its curve begins with that of phase I
        if machine.lead and rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            common.write_csv(path.with_name("evals.csv"), list(rows[0]), rows)
    elif config.init_from:
        told = backbones.init_from(run.objective.model, config.init_from, config.init_partial)
        run.ema.load_state_dict(run.objective.model.state_dict())
        if machine.lead:
            print(told)
    if run.step == config.phase1_steps and not run.selected and run.probes:
        intervene(run)
    trade(run.objective.model, config)
    return run, Dataset(config.data_dir, "train"), Dataset(config.data_dir, "held_out")


def evaluate_checkpoint(config: Config, machine: Machine, scripts: Sequence[str]) -> int:
    """Runs probe.py or evaluate.py on ckpt.pt, each as a process; returns INTERRUPTED, at once, where a signal came."""
    path = Path(config.out_dir) / "ckpt.pt"
    gc.collect()  # a run that is over; what the cache holds is free for the process, too
    if machine.device.startswith("cuda"):
        torch.cuda.empty_cache()
    for name in scripts:
        code = common.run_script(name, f"--ckpt={path}", f"--device={machine.device}")
        if code == common.INTERRUPTED:
            return code
        if code:
            print(f"warning: {name} failed; {path} is saved", file=sys.stderr)
    return 0


def check(config: Config) -> None:
    """Refuses, before anything is read, what would fail many steps later. Raises ValueError."""
    c, own, frames = config, config.align_teacher != "external", config.align_target == "frames"
    backbones.find(c.backbone, c.backbone_layers)
    rules = ["none", "fixed", "random", *probe.RULES]
    last = c.n_layer - own  # the last layer has no deeper one to learn from
    listed = all(1 <= l <= last for l in c.align_layers) and (c.align_layers or c.align != "fixed")
    raw = c.align_norm == "raw" and (frames or c.align_target == "clip")
    as_published = (c.crop_frames, c.trim, c.sigma, c.mel_stats) == (0, 0, 1, (0, 1))
    published = "f5tts_text reads whole clips, mels without statistics: pass --crop_frames=0 --trim=0 --sigma=1"
    short = f"max_steps={c.max_steps} ends within phase I, so nothing would be aligned: pass --phase1_steps below it"
    absent = [f"{k}={getattr(c, k)}" for k in ("vocoder", "asr") if c.evaluate and common.is_absent(getattr(c, k))]
    wrong = {
        f"align={c.align!r} is no rule: use one of {', '.join(rules)}": c.align not in rules,
        f"align_layers={c.align_layers}: name layers from 1 to {last}": not listed,
        f"timestep_adaptive needs align=foga, not {c.align!r}": c.timestep_adaptive and c.align not in ("foga", "none"),
        "align_head=none needs align_teacher=self or ema": c.align_head == "none" and not own,
        "align_head=conv2d pools, so align_target=frames cannot use it": c.align_head == "conv2d" and frames,
        "crop, shuffled and align_norm are of the external teacher, not align_teacher=self or ema": own and not raw,
        "dispersive wants layers that stay: refresh_epochs=0": c.dispersive and c.refresh_epochs,
        f"n_embd={c.n_embd}, n_head={c.n_head}: a head needs a whole, even width": c.n_embd % (2 * c.n_head),
        f"{short}, or --align=none": c.phase1_steps >= c.max_steps and c.align != "none",
        "pip install tensorboard, or leave --tensorboard out": c.tensorboard and not find_spec("tensorboard"),
        f"{published} --mel_stats=0,1": c.backbone == "f5tts_text" and not as_published,
        f"compile and checkpoint_activations are for our own model, not backbone={c.backbone}": c.backbone
        and (c.compile or c.checkpoint_activations),
        f"{', '.join(absent)}: no such folder; pass a hub name or a folder that is there": absent,
    }
    if any(wrong.values()):
        raise ValueError("; ".join(why for why, holds in wrong.items() if holds))


def main(config: Config) -> int:
    """Prepares what is missing, trains, probes, evaluates; the exit code is INTERRUPTED where the command continues."""
    check(config)
    with common.alone_in(config.out_dir):
        if not data.is_prepared(config.data_dir) and (code := common.run_script("prepare", *to_words(config))):
            return code  # it has said why; all ranks prepare together
        features = [f"--features={config.data_dir}", f"--target_rate={config.target_rate}"]
        asked = config.align != "none" and config.align_teacher == "external" and config.align_target in data.STORED
        stored = not asked or data.is_prepared(config.data_dir, f"features_{config.target_rate:g}")
        if not stored and (code := common.run_script("prepare", *features)):
            return code
        machine = common.join_group(config)
        run = train(config, machine)
        common.leave_group(machine)
        if not machine.lead:
            return 0
        path = Path(config.out_dir) / "ckpt.pt"
        if run.step < config.max_steps:
            print(f"stopped at step {run.step}, saved in {path}; the same command continues")
            return common.INTERRUPTED
        export(run)
        print(f"trained {run.step} steps in {run.seconds / 60:.1f} min; {path} and model.safetensors", flush=True)
        del run  # its memory
        if config.evaluate and is_evaluated(path.parent, config.max_steps):
            print(f"{path.parent / 'eval.json'} is of this step: nothing is left to do; delete it to evaluate again")
            return 0
        return evaluate_checkpoint(config, machine, ["probe.py", "evaluate.py"]) if config.evaluate else 0


if __name__ == "__main__":
    command(main, ARGS)
