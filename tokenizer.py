"""Discrete tokens: the AST, a RepCodec-style VQ-VAE on teacher features (eq. 13-14), and S3.

    python tokenizer.py config/ast.py --features_from=AudioSet --audio_teacher=BEATs_iter3_plus_AS2M.pt
    python tokenizer.py config/ast.py --features_from=demo --audio_teacher=demo --max_steps=500
    torchrun --nproc_per_node=8 tokenizer.py config/ast.py ...          # the same command continues a stopped run

    codes = load(path).encode(features)           # list of (N,) integer arrays

The audio tokenizer is the AST on the audio teacher's features. The speech tokenizer of the demo is the same class,
smaller, on Whisper's encoder states: supervised semantic tokens at 50 Hz, the recipe of S3. Whisper adds absolute
positions to its input, and a codebook fitted to raw states spends itself on saying *when* instead of *what*; so the
part of the states that a linear map of the position table explains is removed first, and what is left is measured.

B clips, N features or tokens, E teacher width, W network width, K codes.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from configurator import configure


@dataclass
class TokenizerArgs:
    """Settings of `python tokenizer.py`, the training of an AST."""

    out_dir: str = "out/ast"  # ckpt.pt, and the features it is trained on
    features_from: str = ""  # folder of sounds, AudioSet's or any; "demo": fetch some
    audio_teacher: str = "BEATs_iter3_plus_AS2M.pt"  # path of BEATs' weights; "demo": the aisfx sound-effects network
    max_clips: int = 20_000  # clips whose features are kept on disk, 0.8 MB each for 10 s of BEATs
    codes: int = 4096  # codebook size K
    width: int = 1024  # W, of the network and of the codebook
    units: int = 2  # residual units in the encoder, and in the decoder
    max_steps: int = 100_000  # optimiser steps
    batch_size: int = 32  # windows of 96 features per step and rank
    learning_rate: float = 1e-4  # peak of the one-cycle schedule
    seed: int = 0  # seeds weights, windows and the choice of clips
    log_every: int = 500  # steps between lines of losses, held-out error and codebook usage
    save_every: int = 2000  # steps between checkpoints
    device: str = "auto"  # auto | cpu | cuda

    ranges: ClassVar[dict] = dict.fromkeys(
        "max_clips codes width units max_steps batch_size log_every save_every".split(), (1, None)
    )


if __name__ == "__main__":
    ARGS = configure(TokenizerArgs, __doc__)  # a typo is answered before torch is imported

import importlib
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import audio
import checkpoint
import corpora
import fetch
import teachers

CLIP_WINDOW = 96  # features per training window
POSITIONS = 1500  # length of Whisper's position table
STATISTICS_CLIPS = 2000  # clips behind the mean, the deviation and the position map of the features
PIECE = 30  # seconds that a teacher encodes at once: attention's memory grows with the square of the length
MADE_FROM = ("features_from", "audio_teacher", "max_clips", "seed")  # what the features on disk depend on
MAY_DIFFER = ("out_dir", "log_every", "save_every", "device")  # of a continued training


@dataclass
class TokenizerShape:
    """What the arrays of a Tokenizer are sized by, and what is fixed in training; stored beside its weights."""

    dim: int  # E
    codes: int  # K
    rate: float  # tokens per second
    width: int = 256  # W, of the network and of the codebook
    units: int = 2  # residual units in the encoder, and in the decoder
    decay: float = 0.8  # of the codebook's moving average (RepCodec)
    positions: int = 0  # columns of the position table to regress out; 0: none


class ResidualUnit(nn.Module):
    """(B, W, N) -> (B, W, N), masked."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.out = nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + self.out(F.elu(self.conv(F.elu(x) * mask)))


class ConvStack(nn.Module):
    """Stride-1 convolutions (B, C, N) -> (B, C', N); masked, so that a padded clip gives the same as the clip alone."""

    def __init__(self, dim_in: int, dim_out: int, width: int, units: int):
        super().__init__()
        self.conv_in = nn.Conv1d(dim_in, width, 3, padding=1)
        self.units = nn.ModuleList(ResidualUnit(width) for _ in range(units))
        self.conv_out = nn.Conv1d(width, dim_out, 3, padding=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x * mask)
        for unit in self.units:
            x = unit(x, mask)
        return self.conv_out(F.elu(x) * mask)


class Tokenizer(nn.Module):
    """Features (N, E) -> codes (N,): standardise, remove position, encode, nearest code (eq. 13)."""

    def __init__(self, shape: TokenizerShape):
        super().__init__()
        self.shape = shape
        self.encoder = ConvStack(shape.dim, shape.width, shape.width, shape.units)
        self.decoder = ConvStack(shape.width, shape.dim, shape.width, shape.units)
        self.register_buffer("codebook", torch.zeros(shape.codes, shape.width))
        self.register_buffer("code_count", torch.zeros(shape.codes))
        self.register_buffer("code_sum", torch.zeros(shape.codes, shape.width))
        self.register_buffer("mean", torch.zeros(shape.dim))
        self.register_buffer("std", torch.ones(shape.dim))
        self.register_buffer("position", torch.zeros(shape.positions, shape.dim))  # linear map of the position table

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """(N, E) -> (N, E), zero mean and unit variance per dimension, without what position explains."""
        if self.shape.positions:
            table = position_table(self.shape.positions)[: len(features)].to(features.device)
            features = features - table @ self.position
        return (features - self.mean) / self.std

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """(..., W) -> index of the nearest code (...)."""
        flat = z.reshape(-1, z.shape[-1])
        distance = self.codebook.square().sum(1) - 2 * flat @ self.codebook.T  # |z|^2 is the same for every code
        return distance.argmin(1).view(z.shape[:-1])

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Standardised (B, N, E), mask (B, N) -> the losses of eq. 14 and what the codebook update needs."""
        channel_mask = mask[:, None].to(x.dtype)
        z = self.encoder(x.transpose(1, 2), channel_mask).transpose(1, 2)  # (B, N, W)
        codes = self.nearest(z.detach())
        q = self.codebook[codes]
        decoded = self.decoder((z + (q - z).detach()).transpose(1, 2), channel_mask).transpose(1, 2)
        return {
            "mse": (decoded - x).square().mean(-1)[mask].mean(),
            "commitment": (z - q).square().mean(-1)[mask].mean(),
            "z": z.detach()[mask],
            "codes": codes[mask],
        }

    @torch.no_grad()
    def update_codebook(self, z: torch.Tensor, codes: torch.Tensor) -> None:
        """Moving average of the vectors assigned to each code; a code nearly unused restarts at a random vector."""
        K, decay = self.shape.codes, self.shape.decay
        one_hot_sum = torch.zeros_like(self.code_sum).index_add_(0, codes, z)
        count = torch.bincount(codes, minlength=K).to(z.dtype)
        if dist.is_initialized():
            dist.all_reduce(one_hot_sum), dist.all_reduce(count)
        self.code_count.lerp_(count, 1 - decay)
        self.code_sum.lerp_(one_hot_sum, 1 - decay)
        dead = self.code_count < 0.02
        fresh = z[torch.randint(len(z), (int(dead.sum()),), device=z.device)]
        if dist.is_initialized():
            dist.broadcast(fresh, 0)  # each rank has drawn from vectors of its own
        self.code_count[dead], self.code_sum[dead] = 1.0, fresh
        self.codebook.copy_(self.code_sum / self.code_count[:, None])

    @torch.inference_mode()
    def encode(self, features: list[np.ndarray]) -> list[np.ndarray]:
        """Clips of features (N, E) -> codes (N,) int32 each."""
        out = []
        for clip in features:
            x = self.standardise(torch.from_numpy(np.asarray(clip, np.float32)).to(self.codebook.device))
            z = self.encoder(x.T[None], torch.ones(1, 1, len(x), device=x.device))[0].T
            out.append(self.nearest(z).int().cpu().numpy())
        return out


def to_rate(features: np.ndarray, n: int) -> np.ndarray:
    """Linear interpolation of features (N, E) to n rows spread over the same time."""
    x = torch.from_numpy(features).T[None]
    return torch.nn.functional.interpolate(x, n, mode="linear", align_corners=False)[0].T.numpy()


def at_token_times(rows: np.ndarray, n: int, rate: float, own_rate: float) -> np.ndarray:
    """The row of a sequence at `own_rate` per second that covers the middle of each of n tokens at `rate` per second:
    how a stream of codes follows another in time, whatever their lengths. Past its end the last row is repeated."""
    at = ((np.arange(n) + 0.5) * own_rate / rate + 1e-9).astype(np.int64)  # exact halves do not round down
    return rows[np.minimum(at, len(rows) - 1)]


def token_features(teacher: teachers.Teacher, features: np.ndarray, n: int, rate: float) -> np.ndarray:
    """A clip's features (N', E) at n tokens, `rate` per second. BEATs' are patches, 8 bands per 160 ms, and a mean of
    neighbours would mix bands: each token takes one. Others change smoothly in time and are interpolated."""
    return at_token_times(features, n, rate, teacher.rate) if teacher.name == "beats" else to_rate(features, n)


def position_table(columns: int) -> torch.Tensor:
    """Whisper's position table at `columns` channels: sines, then cosines, (POSITIONS, columns)."""
    half = torch.arange(columns // 2, dtype=torch.float64)
    scale = torch.exp(-np.log(10000) * half / max(1, columns // 2 - 1))
    angle = torch.arange(POSITIONS, dtype=torch.float64)[:, None] * scale
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def fit_position(features: list[np.ndarray], columns: int, ridge: float = 10.0) -> torch.Tensor:
    """Ridge regression of centred features on the position table, in float64: (columns, E)."""
    table = position_table(columns).double()
    x = torch.cat([torch.from_numpy(f) for f in features]).double()
    p = torch.cat([table[: len(f)] for f in features])
    p_centred, x = p - p.mean(0), x - x.mean(0)
    gram = p_centred.T @ p_centred + ridge * torch.eye(columns, dtype=torch.float64)
    return torch.linalg.solve(gram, p_centred.T @ x).float()


def position_share(values: list[np.ndarray], bins: int = 10) -> float:
    """Share of the variance of per-frame vectors (N, W) that the frame's absolute position explains, 0 to 1.

    R^2 of the mean vector of each run of `bins` neighbouring positions, corrected for the number of groups.
    """
    x = np.concatenate(values).astype(np.float64)
    where = np.concatenate([np.arange(len(v)) // bins for v in values])
    groups = np.unique(where, return_inverse=True)[1]
    k, n = groups.max() + 1, len(x)
    count = np.bincount(groups, minlength=k)[:, None]
    sums = np.zeros((k, x.shape[1]))
    np.add.at(sums, groups, x)
    within = ((x - (sums / count)[groups]) ** 2).sum()
    total = ((x - x.mean(0)) ** 2).sum()
    return float(1 - within / (n - k) * (n - 1) / total)


class Fitting:
    """Training of a Tokenizer on clips of features (N, E), a step at a time: MSE + 10 * commitment (eq. 14), on random
    windows. A step follows from (seed, step, rank) alone, so one that goes on from `state()` repeats it. With several
    ranks each draws its own windows; gradients and codebook sums are added up over them."""

    def __init__(
        self,
        features: Sequence[np.ndarray],
        shape: TokenizerShape,
        steps: int,
        batch: int = 16,
        lr: float = 1e-3,
        seed: int = 0,
        rank: int = 0,
        device: str = "cpu",
    ):
        torch.manual_seed(seed)
        self.features, self.batch, self.seed, self.rank, self.device = features, batch, seed, rank, device
        self.model, self.done = Tokenizer(shape), 0
        lengths = np.array([len(f) for f in features])
        self.chances = lengths / lengths.sum()
        self._standardise(
            [features[i] for i in np.random.default_rng(seed).permutation(len(features))[:STATISTICS_CLIPS]]
        )
        self.model.to(device)
        self._start_codebook()
        weights = [*self.model.encoder.parameters(), *self.model.decoder.parameters()]
        self.optimiser = torch.optim.AdamW(weights, lr, betas=(0.5, 0.9))
        cycle = {"pct_start": 0.1, "cycle_momentum": False}  # OneCycleLR divides by zero at 1 / pct_start steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, lr, max(11, steps), **cycle)

    def _standardise(self, features: list[np.ndarray]) -> None:
        model = self.model
        if model.shape.positions:
            model.position.copy_(fit_position(features, model.shape.positions))
        everything = torch.cat([model.standardise(torch.from_numpy(np.asarray(f, np.float32))) for f in features])
        model.mean.copy_(everything.mean(0)), model.std.copy_(everything.std(0).clamp_min(1e-4))

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Encoder outputs drawn from the corpus, the same on every rank."""
        model, codes = self.model, self.model.shape.codes
        z = model(*self.draw(np.random.default_rng(self.seed), max(self.batch, 2 * codes // CLIP_WINDOW)))["z"]
        model.code_sum.copy_(z[torch.randint(len(z), (codes,))])
        model.code_count.fill_(1.0)
        model.codebook.copy_(model.code_sum)

    def draw(self, rng: np.random.Generator, clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised windows (clips, CLIP_WINDOW, E) of clips drawn by their length, and their mask."""
        out = torch.zeros(clips, CLIP_WINDOW, self.model.shape.dim)
        mask = torch.zeros(clips, CLIP_WINDOW, dtype=torch.bool)
        for i, c in enumerate(rng.choice(len(self.features), clips, p=self.chances)):
            x = torch.from_numpy(np.asarray(self.features[c], np.float32)).to(self.device)
            start = rng.integers(0, max(1, len(x) - CLIP_WINDOW + 1))
            piece = self.model.standardise(x)[start : start + CLIP_WINDOW]
            out[i, : len(piece)], mask[i, : len(piece)] = piece, True
        return out.to(self.device), mask.to(self.device)

    def step(self) -> dict[str, float]:
        """One optimiser step and one codebook update; returns the losses."""
        rng = np.random.default_rng([self.seed, self.done, self.rank])
        torch.manual_seed(hash((self.seed, self.done)) % 2**63)  # for the vectors that unused codes restart at
        out = self.model(*self.draw(rng, self.batch))
        loss = out["mse"] + 10 * out["commitment"]
        self.optimiser.zero_grad()
        loss.backward()
        if dist.is_initialized():
            for group in self.optimiser.param_groups:
                for p in group["params"]:
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        self.optimiser.step(), self.schedule.step()
        self.model.update_codebook(out["z"], out["codes"])
        self.done += 1
        return {"loss": loss.item(), "mse": out["mse"].item(), "commitment": out["commitment"].item()}

    def state(self) -> dict:
        """Everything to go on from; load() reads the tokenizer out of the same file."""
        return {
            "shape": asdict(self.model.shape),
            "state": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.done,
        }

    def restore(self, state: dict) -> None:
        """Goes on from what state() gave."""
        self.model.load_state_dict(state["state"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.done = state["step"]


def fit(
    features: Sequence[np.ndarray],
    codes: int,
    steps: int,
    rate: float,
    remove_position: bool = False,
    width: int = 256,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> Tokenizer:
    """Trains a Tokenizer on clips of features (N, E). `progress(step, loss)` is called after each step."""
    shape = TokenizerShape(features[0].shape[1], codes, rate, width, positions=64 if remove_position else 0)
    fitting = Fitting(features, shape, steps, batch, lr, seed, device=device)
    for step in range(steps):
        losses = fitting.step()
        if progress:
            progress(step, losses["loss"])
    return fitting.model.cpu().eval()


class S3:
    """CosyVoice's supervised semantic tokens (arXiv:2407.05407), version 1: 4096 codes, 50 per second, from 16 kHz. By
    the s3tokenizer package, batched; or by onnxruntime, a clip at a time, from CosyVoice's speech_tokenizer_v1.onnx."""

    rate, sample_rate = 50, 16000
    advice = "pip install s3tokenizer, or onnxruntime with --s3=PATH/speech_tokenizer_v1.onnx of CosyVoice-300M"

    def __init__(self, source: str, device: str = "cpu"):
        self.device, self.model, self.session = device, None, None
        try:
            if importlib.util.find_spec("s3tokenizer"):
                audio.torchaudio()
                self.package = importlib.import_module("s3tokenizer")
                self.model = self.package.load_model(source).to(device).eval()
            elif importlib.util.find_spec("onnxruntime") and source.endswith(".onnx"):
                onnxruntime = importlib.import_module("onnxruntime")
                kinds = ["CUDAExecutionProvider"] if device != "cpu" else []
                self.session = onnxruntime.InferenceSession(source, providers=[*kinds, "CPUExecutionProvider"])
        except Exception as error:  # both raise many types, for no network and for no such file
            raise ValueError(
                f"s3={source!r} is not there or out of reach ({type(error).__name__}); {self.advice}"
            ) from error
        if self.model is None and self.session is None:
            raise ValueError(f"S3 tokens need a package; {self.advice}")

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray], batch: int = 16) -> list[np.ndarray]:
        """Clips at 16 kHz -> codes (N,) each, N about 50 per second."""
        if self.session:
            filters, hann = teachers.mel_filters(400, 128, 0.0, 8000.0, 16000, "slaney"), torch.hann_window(400)
            feats, length = (i.name for i in self.session.get_inputs())
            out = []
            for wav in wavs:
                mel = teachers.whisper_mel([wav], len(wav), filters, hann).numpy()
                codes = self.session.run(None, {feats: mel, length: np.array([mel.shape[2]], np.int32)})[0]
                out.append(codes.reshape(-1).astype(np.int64))
            return out
        out, order = [np.empty(0)] * len(wavs), sorted(range(len(wavs)), key=lambda i: len(wavs[i]))
        for group in (order[k : k + batch] for k in range(0, len(order), batch)):
            mels = [self.package.log_mel_spectrogram(torch.from_numpy(wavs[i])) for i in group]
            codes, counts = self.model.quantize(*(x.to(self.device) for x in self.package.padding(mels)))
            for i, row, n in zip(group, codes.cpu().numpy(), counts.tolist(), strict=True):
                out[i] = row[:n].astype(np.int64)
        return out


def usage(codes: list[np.ndarray], size: int) -> tuple[float, float]:
    """Share of the codebook that is used, and its perplexity, over a corpus of codes."""
    p = np.bincount(np.concatenate(codes), minlength=size) / sum(map(len, codes))
    return float((p > 0).mean()), float(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()))


def load_text_tokenizer(source: str = "bytes"):
    """What turns text into ids, with encode(text) and decode(ids). "bytes" is one token a byte and needs no download;
    else a tokenizer of transformers by name or folder, such as Qwen/Qwen3-0.6B-Base. Raises ValueError for none."""
    if source == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={})
    audio.torchaudio()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no text tokenizer {source!r} ({type(error).__name__}): pass a folder, or bytes") from error


@torch.no_grad()
def explained(model: Tokenizer, features: Sequence[np.ndarray]) -> float:
    """Share of the variance of standardised features that the decoder gives back from the codes, at most 1."""
    error = total = 0.0
    for f in features:
        x = model.standardise(torch.from_numpy(np.asarray(f, np.float32)).to(model.codebook.device))
        mask = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
        error += float(model(x[None], mask)["mse"]) * x.numel()
        total += float(x.square().sum())
    return 1 - error / total


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes shape and weights; the file appears whole or not at all."""
    checkpoint.save(path, {"shape": asdict(tokenizer.shape), "state": tokenizer.state_dict()}, keep_previous=False)


def load(path: Path) -> Tokenizer:
    """Reads a Tokenizer written by save() or by the training below. Raises ValueError for another checkpoint."""
    stored, used = checkpoint.load(path)
    if "codes" not in stored.get("shape", {}) or "state" not in stored:
        raise ValueError(f"{used} is not a checkpoint of tokenizer.py; pass one, such as out/ast/ckpt.pt")
    tokenizer = Tokenizer(TokenizerShape(**stored["shape"]))
    tokenizer.load_state_dict(stored["state"])
    return tokenizer.eval()


# ---- training of the AST


def sounds(source: str) -> list[corpora.Clip]:
    """The clips of --features_from. Raises ValueError or DataError where there are none."""
    if source == "demo":
        return corpora.demo_audio()
    if not source or not Path(source).is_dir():
        raise ValueError(f"features_from={source!r} is no folder: pass AudioSet's or any folder of sounds, or demo")
    try:
        listed = next(Path(source).rglob("*segments*.csv"), None)
        return corpora.audioset(source)[0] if listed else corpora.folder(source, corpora.AUDIO)
    except corpora.DataError as error:  # named after data.py's keys
        raise corpora.DataError(re.sub(r"^\w+_dir=", "features_from=", str(error))) from None


def features_of(teacher: teachers.Teacher, wavs: list[np.ndarray], rate: float) -> list[np.ndarray]:
    """Features of each clip at `rate` per second, (N, E); a clip over PIECE seconds is encoded in equal pieces."""
    pieces = [np.array_split(wav, -(-len(wav) // (PIECE * teacher.sample_rate))) for wav in wavs]
    encoded, out = iter(teacher.encode([piece for own in pieces for piece in own])), []
    for own in pieces:
        counts = [max(1, round(len(piece) / teacher.sample_rate * rate)) for piece in own]
        out.append(np.concatenate([token_features(teacher, next(encoded), n, rate) for n in counts]))
    return out


def write_features(args: "TokenizerArgs", clips: list, teacher: teachers.Teacher, rate: float, out_dir: Path) -> None:
    """Encodes the clips into out_dir: features.bin, (rows, E) float16, and features.json, E, where each clip ends, and
    the arguments behind them."""
    ends, lost = [0], 0
    with open(out_dir / "features.bin", "wb") as file:
        for k in tqdm(range(0, len(clips), 64), desc="features, 64 clips each", mininterval=1):
            wavs = []
            for clip in clips[k : k + 64]:
                try:
                    wavs.append(audio.read(clip.source, teacher.sample_rate, clip.name))
                except audio.AudioError:
                    lost += 1
            for rows in features_of(teacher, wavs, rate):
                file.write(rows.astype("<f2").tobytes())
                ends.append(ends[-1] + len(rows))
    print(f"features of {len(ends) - 1} clips; {lost} could not be read")
    about = {"dim": teacher.dim, "ends": ends, "made_from": {k: getattr(args, k) for k in MADE_FROM}}
    part = out_dir / ".features.json.part"
    part.write_text(json.dumps(about))
    part.replace(out_dir / "features.json")


def read_features(out_dir: Path) -> list[np.ndarray]:
    """What write_features wrote, by memory map; waits for another process that is still writing."""
    while not (out_dir / "features.json").exists():
        time.sleep(1)
    about = json.loads((out_dir / "features.json").read_text())
    rows = np.memmap(out_dir / "features.bin", "<f2", "r").reshape(-1, about["dim"])
    return [rows[a:b] for a, b in itertools.pairwise(about["ends"])]


def prepare(args: "TokenizerArgs", rate: float, device: str) -> None:
    """Writes the features unless they are there. Raises CheckpointError when they were made from something else."""
    out_dir = Path(args.out_dir)
    if (used := out_dir / "features.json").exists():
        others = [k for k in asdict(args) if k not in MADE_FROM]
        return checkpoint.same_settings(args, json.loads(used.read_text())["made_from"], others, used)
    clips = sounds(args.features_from)
    source = ("aisfx", fetch.fetch("aisfx")) if args.audio_teacher == "demo" else ("beats", args.audio_teacher)
    teacher = teachers.load_teacher(*source, device)
    out_dir.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(args.seed).permutation(len(clips))[: args.max_clips]
    write_features(args, [clips[i] for i in order], teacher, rate, out_dir)


def report(fitting: Fitting, losses: dict, held: list[np.ndarray], last: int) -> None:
    """Prints the losses of a step, and what the codes are worth on held-out clips."""
    used, perplexity = usage(fitting.model.encode(held), fitting.model.shape.codes)
    print(
        f"step {fitting.done}/{last}  mse {losses['mse']:.4f}  commitment {losses['commitment']:.4f}  held out: "
        f"{100 * explained(fitting.model, held):.1f} % explained, {100 * used:.1f} % of the codes used, "
        f"perplexity {perplexity:.1f}",
        flush=True,
    )


def open_fitting(args: "TokenizerArgs", features: list, rate: float, rank: int, device: str) -> Fitting:
    """A new Fitting, or the one that out_dir/ckpt.pt stopped at."""
    shape = TokenizerShape(features[0].shape[1], args.codes, rate, args.width, args.units)
    fitting = Fitting(features, shape, args.max_steps, args.batch_size, args.learning_rate, args.seed, rank, device)
    path = Path(args.out_dir) / "ckpt.pt"
    if checkpoint.exists(path):
        state, used = checkpoint.load(path, set_aside=rank == 0)
        checkpoint.same_settings(args, state.get("config", {}), MAY_DIFFER, used)
        fitting.restore(state)
    return fitting


def main(args: "TokenizerArgs") -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    lead, out_dir, rate = rank == 0, Path(args.out_dir), 25.0 if args.audio_teacher == "demo" else 50.0
    if lead:
        prepare(args, rate, device)
    features = read_features(out_dir)
    held = features[: max(1, len(features) // 20)]
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    fitting = open_fitting(args, features[len(held) :], rate, rank, device)
    if lead:
        size = sum(p.numel() for p in fitting.model.parameters()) / 1e6
        print(f"{size:.1f} M parameters; {len(features)} clips, {len(held)} of them held out; {world} x {device}")
    stop, path, config = checkpoint.StopRequest(device), out_dir / "ckpt.pt", asdict(args)
    while fitting.done < args.max_steps and not stop.agreed():
        losses = fitting.step()
        last = fitting.done == args.max_steps
        if lead and (last or fitting.done % args.log_every == 0):
            report(fitting, losses, held, args.max_steps)
        if lead and (last or fitting.done % args.save_every == 0):
            checkpoint.save(path, fitting.state() | {"config": config})
    if world > 1:
        dist.destroy_process_group()
    if fitting.done == args.max_steps:
        if lead:
            print(f"{path}; prepare with --audio_tokenizer={path}")
        return 0
    if lead:
        checkpoint.save(path, fitting.state() | {"config": config})
        print(f"stopped at step {fitting.done}, saved in {path}; the same command continues")
    return checkpoint.INTERRUPTED


if __name__ == "__main__":
    try:
        sys.exit(main(ARGS))
    except (checkpoint.CheckpointError, corpora.DataError, fetch.FetchError, ValueError) as error:
        sys.exit(f"tokenizer.py: {error}")
