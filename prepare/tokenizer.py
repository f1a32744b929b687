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

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import audio
import common
import teachers

CLIP_WINDOW = 96  # features per training window
POSITIONS = 1500  # length of Whisper's position table
STATISTICS_CLIPS = 2000  # clips behind the mean, the deviation and the position map of the features


@dataclass
class TokenizerConfig:
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

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = ConvStack(config.dim, config.width, config.width, config.units)
        self.decoder = ConvStack(config.width, config.dim, config.width, config.units)
        self.register_buffer("codebook", torch.zeros(config.codes, config.width))
        self.register_buffer("code_count", torch.zeros(config.codes))
        self.register_buffer("code_sum", torch.zeros(config.codes, config.width))
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("std", torch.ones(config.dim))
        self.register_buffer("position", torch.zeros(config.positions, config.dim))  # linear map of the position table

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """(N, E) -> (N, E), zero mean and unit variance per dimension, without what position explains."""
        if self.config.positions:
            table = position_table(self.config.positions)[: len(features)].to(features.device)
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
        K, decay = self.config.codes, self.config.decay
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
        config: TokenizerConfig,
        steps: int,
        batch: int = 16,
        lr: float = 1e-3,
        seed: int = 0,
        rank: int = 0,
        device: str = "cpu",
    ):
        torch.manual_seed(seed)
        self.features, self.batch, self.seed, self.rank, self.device = features, batch, seed, rank, device
        self.model, self.done = Tokenizer(config), 0
        lengths = np.array([len(f) for f in features])
        self.chances = lengths / lengths.sum()
        self._standardise(
            [features[i] for i in np.random.default_rng(seed).permutation(len(features))[:STATISTICS_CLIPS]]
        )
        self.model.to(device)
        self._start_codebook()
        weights = [*self.model.encoder.parameters(), *self.model.decoder.parameters()]
        self.optimizer = torch.optim.AdamW(weights, lr, betas=(0.5, 0.9))
        cycle = {"pct_start": 0.1, "cycle_momentum": False}  # OneCycleLR divides by zero at 1 / pct_start steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, max(11, steps), **cycle)

    def _standardise(self, features: list[np.ndarray]) -> None:
        model = self.model
        if model.config.positions:
            model.position.copy_(fit_position(features, model.config.positions))
        everything = torch.cat([model.standardise(torch.from_numpy(np.asarray(f, np.float32))) for f in features])
        model.mean.copy_(everything.mean(0)), model.std.copy_(everything.std(0).clamp_min(1e-4))

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Encoder outputs drawn from the corpus, the same on every rank."""
        model, codes = self.model, self.model.config.codes
        z = model(*self.draw(np.random.default_rng(self.seed), max(self.batch, 2 * codes // CLIP_WINDOW)))["z"]
        model.code_sum.copy_(z[torch.randint(len(z), (codes,))])
        model.code_count.fill_(1.0)
        model.codebook.copy_(model.code_sum)

    def draw(self, rng: np.random.Generator, clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised windows (clips, CLIP_WINDOW, E) of clips drawn by their length, and their mask."""
        out = torch.zeros(clips, CLIP_WINDOW, self.model.config.dim)
        mask = torch.zeros(clips, CLIP_WINDOW, dtype=torch.bool)
        for i, c in enumerate(rng.choice(len(self.features), clips, p=self.chances)):
            x = torch.from_numpy(np.asarray(self.features[c], np.float32)).to(self.device)
            start = rng.integers(0, max(1, len(x) - CLIP_WINDOW + 1))
            piece = self.model.standardise(x)[start : start + CLIP_WINDOW]
            out[i, : len(piece)], mask[i, : len(piece)] = piece, True
        return out.to(self.device), mask.to(self.device)

    def step(self) -> dict[str, float]:
        """One optimizer step and one codebook update; returns the losses."""
        rng = np.random.default_rng([self.seed, self.done, self.rank])
        torch.manual_seed(common.step_seed(self.seed, self.done))  # for the vectors that unused codes restart at
        out = self.model(*self.draw(rng, self.batch))
        loss = out["mse"] + 10 * out["commitment"]
        self.optimizer.zero_grad()
        loss.backward()
        if dist.is_initialized():
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        self.optimizer.step(), self.schedule.step()
        self.model.update_codebook(out["z"], out["codes"])
        self.done += 1
        return {"loss": loss.item(), "mse": out["mse"].item(), "commitment": out["commitment"].item()}

    def state(self) -> dict:
        """Everything to go on from; load() reads the tokenizer out of the same file."""
        return {
            "config": asdict(self.model.config),
            "state": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.done,
        }

    def restore(self, state: dict) -> None:
        """Goes on from what state() gave."""
        self.model.load_state_dict(state["state"])
        self.optimizer.load_state_dict(state["optimizer"])
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
    config = TokenizerConfig(features[0].shape[1], codes, rate, width, positions=64 if remove_position else 0)
    fitting = Fitting(features, config, steps, batch, lr, seed, device=device)
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
    common.save(path, {"config": asdict(tokenizer.config), "state": tokenizer.state_dict()}, keep_previous=False)


def load(path: Path) -> Tokenizer:
    """Reads a Tokenizer written by save() or by the training below. Raises ValueError for another checkpoint."""
    stored, used = common.load(path)
    if "codes" not in stored.get("config", {}) or "state" not in stored:
        raise ValueError(f"{used} is not a checkpoint of tokenizer.py; pass one, such as out/ast/ckpt.pt")
    tokenizer = Tokenizer(TokenizerConfig(**stored["config"]))
    tokenizer.load_state_dict(stored["state"])
    return tokenizer.eval()
