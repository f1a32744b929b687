"""Discrete tokens from teacher features: a RepCodec-style VQ-VAE, trained on the corpus it will encode.

    tokenizer = fit(features, codes=1024, steps=1500, rate=50, remove_position=True)
    codes = tokenizer.encode(features)            # list of (N,) integer arrays
    save(tokenizer, path); tokenizer = load(path)

The audio tokenizer is the AST of eq. 13-14 on the audio teacher's features. The speech tokenizer of the demo is the
same class on Whisper's encoder states: supervised semantic tokens at 50 Hz, the recipe of S3. Whisper adds absolute
positions to its input, and a codebook fitted to raw states spends itself on saying *when* instead of *what*; so the
part of the states that a linear map of the position table explains is removed first, and what is left is measured.

B clips, N features or tokens, E teacher width, W network width, K codes.
"""

import importlib
import importlib.util
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import teachers
from audio import torchaudio

CLIP_WINDOW = 96  # features per training window
POSITIONS = 1500  # length of Whisper's position table


@dataclass
class TokenizerShape:
    dim: int  # E
    codes: int  # K
    rate: float  # tokens per second
    width: int = 256  # W, of the network and of the codebook
    units: int = 2  # residual units in the encoder, and in the decoder
    decay: float = 0.8  # of the codebook's moving average (RepCodec)
    positions: int = 0  # columns of the position table to regress out; 0: none


class ResidualUnit(nn.Module):
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
        self.code_count.lerp_(count, 1 - decay)
        self.code_sum.lerp_(one_hot_sum, 1 - decay)
        dead = self.code_count < 0.02
        fresh = z[torch.randint(len(z), (int(dead.sum()),))]
        self.code_count[dead], self.code_sum[dead] = 1.0, fresh
        self.codebook.copy_(self.code_sum / self.code_count[:, None])

    @torch.inference_mode()
    def encode(self, features: list[np.ndarray]) -> list[np.ndarray]:
        """Clips of features (N, E) -> codes (N,) int32 each."""
        out = []
        for clip in features:
            x = self.standardise(torch.from_numpy(clip).to(self.codebook.device, torch.float32))
            z = self.encoder(x.T[None], torch.ones(1, 1, len(x), device=x.device))[0].T
            out.append(self.nearest(z).int().cpu().numpy())
        return out


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


def fit(
    features: list[np.ndarray],
    codes: int,
    steps: int,
    rate: float,
    remove_position: bool = False,
    width: int = 256,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    progress=None,
) -> Tokenizer:
    """Trains a Tokenizer on clips of features (N, E): MSE + 10 * commitment (eq. 14), on random windows.

    The codebook starts at encoder outputs drawn from the corpus. `progress(step, loss)` is called after each step.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Tokenizer(TokenizerShape(features[0].shape[1], codes, rate, width, positions=64 if remove_position else 0))
    if remove_position:
        model.position.copy_(fit_position(features, model.shape.positions))
    model.mean.zero_(), model.std.fill_(1)
    x = [model.standardise(torch.from_numpy(f)) for f in features]
    everything = torch.cat(x)
    model.mean.copy_(everything.mean(0)), model.std.copy_(everything.std(0).clamp_min(1e-4))
    x = [(f - model.mean) / model.std for f in x]
    chances = np.array([len(f) for f in x]) / len(everything)

    def draw(clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, mask = torch.zeros(clips, CLIP_WINDOW, model.shape.dim), torch.zeros(clips, CLIP_WINDOW, dtype=torch.bool)
        for i, c in enumerate(rng.choice(len(x), clips, p=chances)):
            start = rng.integers(0, max(1, len(x[c]) - CLIP_WINDOW + 1))
            piece = x[c][start : start + CLIP_WINDOW]
            out[i, : len(piece)], mask[i, : len(piece)] = piece, True
        return out, mask

    with torch.no_grad():  # start the codebook on real encoder outputs
        sample, mask = draw(max(batch, 2 * codes // CLIP_WINDOW))
        z = model(sample, mask)["z"]
        model.code_sum.copy_(z[torch.randint(len(z), (codes,))])
        model.code_count.fill_(1.0)
        model.codebook.copy_(model.code_sum)
    optimiser = torch.optim.AdamW([*model.encoder.parameters(), *model.decoder.parameters()], lr, betas=(0.5, 0.9))
    # OneCycleLR divides by zero at total_steps = 1 / pct_start
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=max(11, steps), pct_start=0.1)
    for step in range(steps):
        out = model(*draw(batch))
        loss = out["mse"] + 10 * out["commitment"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step(), schedule.step()
        model.update_codebook(out["z"], out["codes"])
        if progress:
            progress(step, loss.item())
    return model.eval()


class S3:
    """CosyVoice's supervised semantic tokens (arXiv:2407.05407), version 1: 4096 codes, 50 per second, from 16 kHz. By
    the s3tokenizer package, batched; or by onnxruntime, a clip at a time, from CosyVoice's speech_tokenizer_v1.onnx."""

    rate, sample_rate = 50, 16000

    def __init__(self, source: str, device: str = "cpu"):
        self.device, self.model, self.session = device, None, None
        if importlib.util.find_spec("s3tokenizer"):
            torchaudio()
            self.package = importlib.import_module("s3tokenizer")
            self.model = self.package.load_model(source).to(device).eval()
        elif importlib.util.find_spec("onnxruntime") and source.endswith(".onnx"):
            onnxruntime = importlib.import_module("onnxruntime")
            kinds = ["CUDAExecutionProvider"] if device != "cpu" else []
            self.session = onnxruntime.InferenceSession(source, providers=[*kinds, "CPUExecutionProvider"])
        else:
            raise ValueError(
                "S3 tokens need a package: pip install s3tokenizer (any --s3), or onnxruntime with "
                "--s3=PATH/speech_tokenizer_v1.onnx of CosyVoice-300M"
            )

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


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes shape and weights; the file appears whole or not at all."""
    part = path.with_suffix(".part")
    torch.save({"shape": asdict(tokenizer.shape), "state": tokenizer.state_dict()}, part)
    os.replace(part, path)


def load(path: Path) -> Tokenizer:
    """Reads a Tokenizer written by save()."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    tokenizer = Tokenizer(TokenizerShape(**stored["shape"]))
    tokenizer.load_state_dict(stored["state"])
    return tokenizer.eval()
