"""Discrete tokens: the AST, a RepCodec-style VQ-VAE on teacher features (eq. 13-14), and S3.

    model = fit(features, TokenizerConfig(dim=768, codes=4096, rate=50), steps, batch, lr, seed, device, resume)
    save(model, path)
    codes = load(path).encode(features)           # list of (N,) integer arrays

The demo's speech tokenizer is the AST's class on Whisper's encoder states, the recipe of S3. Whisper adds absolute
positions to its input, and a codebook fitted to raw states spends itself on saying *when* instead of *what*; so the
part of the states that a linear map of the position table explains is removed first, and what is left is measured.
Letters: B clips, N features or tokens, E teacher width, W network width, K codes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import audio
import common
import teachers

CLIP_WINDOW = 96  # features per training window
POSITIONS = 1500  # length of Whisper's position table
STATISTICS_CLIPS = 2000  # clips behind the mean, the deviation and the position map of the features
SAVE_EVERY = 1000  # steps between the states that a fit can go on from


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


class ConvStack(nn.Module):
    """Stride-1 convolutions and residual units (B, C, N) -> (B, C', N); masked: padding changes nothing in a clip."""

    def __init__(self, dim_in: int, dim_out: int, width: int, units: int):
        super().__init__()
        self.conv_in = nn.Conv1d(dim_in, width, 3, padding=1)
        pairs = ((nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 1)) for _ in range(units))
        self.units = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        self.conv_out = nn.Conv1d(width, dim_out, 3, padding=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x * mask)
        for wide, narrow in self.units:
            x = x + narrow(F.elu(wide(F.elu(x) * mask)))
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
        mse = (decoded - x).square().mean(-1)[mask].mean()
        commitment = (z - q).square().mean(-1)[mask].mean()
        return {"mse": mse, "commitment": commitment, "z": z.detach()[mask], "codes": codes[mask]}

    @torch.no_grad()
    def update_codebook(self, z: torch.Tensor, codes: torch.Tensor) -> None:
        """Moving average of the vectors assigned to each code; a code nearly unused restarts at a random vector."""
        K, decay = self.config.codes, self.config.decay
        self.code_count.lerp_(torch.bincount(codes, minlength=K).to(z.dtype), 1 - decay)
        self.code_sum.lerp_(torch.zeros_like(self.code_sum).index_add_(0, codes, z), 1 - decay)
        dead = self.code_count < 0.02
        self.code_count[dead] = 1.0
        self.code_sum[dead] = z[torch.randint(len(z), (int(dead.sum()),), device=z.device)]
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


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes sizes and weights; the file appears whole or not at all."""
    common.save(path, {"config": asdict(tokenizer.config), "state": tokenizer.state_dict()}, keep_previous=False)


def load(path: Path) -> Tokenizer:
    """Reads a Tokenizer written by save(). Raises CheckpointError for another checkpoint."""
    stored, _ = common.load(path, needs=("config", "state"))
    tokenizer = Tokenizer(TokenizerConfig(**stored["config"]))
    tokenizer.load_state_dict(stored["state"])
    return tokenizer.eval()


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


def fit(
    features: Sequence[np.ndarray], config: TokenizerConfig, steps, batch, lr, seed, device, resume: Path, label=""
) -> Tokenizer:
    """A Tokenizer trained on random windows of features (N, E): MSE + 10 * commitment (eq. 14). A step follows from
    (seed, step) alone. Every SAVE_EVERY steps the state is saved at `resume`, from which the same fit goes on; the
    caller deletes it. `label` names the progress bar."""
    model = start(features, config, batch, seed, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.5, 0.9))
    cycle = {"pct_start": 0.1, "cycle_momentum": False}  # OneCycleLR divides by zero at 1 / pct_start steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(11, steps), **cycle)
    done, parts = 0, {"model": model, "optimizer": optimizer, "schedule": schedule}
    if common.exists(resume):
        state, _ = common.load(resume, set_aside=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["step"]
    for step in tqdm(range(done, steps), label, steps, initial=done, mininterval=1):
        torch.manual_seed(common.step_seed(seed, step))  # for the vectors that unused codes restart at
        out = model(*windows(model, features, batch, np.random.default_rng([seed, step])))
        loss = out["mse"] + 10 * out["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.update_codebook(out["z"], out["codes"])
        if (step + 1) % SAVE_EVERY == 0:
            common.save(resume, {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1})
    return model.cpu().eval()


@torch.no_grad()
def start(features: Sequence[np.ndarray], config: TokenizerConfig, batch: int, seed: int, device: str) -> Tokenizer:
    """A Tokenizer with random weights, the statistics of the features, and a codebook of random encoder outputs."""
    torch.manual_seed(seed)
    model, chosen = Tokenizer(config), np.random.default_rng(seed).permutation(len(features))[:STATISTICS_CLIPS]
    clips = [np.asarray(features[i], np.float32) for i in chosen]
    if config.positions:
        model.position.copy_(fit_position(clips, config.positions))
    everything = torch.cat([model.standardise(torch.from_numpy(clip)) for clip in clips])
    model.mean.copy_(everything.mean(0))
    model.std.copy_(everything.std(0).clamp_min(1e-4))
    model.to(device)
    count = max(batch, 2 * config.codes // CLIP_WINDOW)
    z = model(*windows(model, features, count, np.random.default_rng(seed)))["z"]
    model.code_sum.copy_(z[torch.randint(len(z), (config.codes,))])
    model.code_count.fill_(1.0)
    model.codebook.copy_(model.code_sum)
    return model


def windows(model: Tokenizer, features: Sequence[np.ndarray], count: int, rng: np.random.Generator) -> tuple:
    """Standardised windows (count, CLIP_WINDOW, E) of clips drawn by their length, and their mask."""
    lengths, device = np.array([len(f) for f in features]), model.codebook.device
    out, mask = torch.zeros(count, CLIP_WINDOW, model.config.dim), torch.zeros(count, CLIP_WINDOW, dtype=torch.bool)
    for i, clip in enumerate(rng.choice(len(features), count, p=lengths / lengths.sum())):
        x = torch.from_numpy(np.asarray(features[clip], np.float32)).to(device)
        first = rng.integers(0, max(1, len(x) - CLIP_WINDOW + 1))
        piece = model.standardise(x)[first : first + CLIP_WINDOW]
        out[i, : len(piece)], mask[i, : len(piece)] = piece, True
    return out.to(device), mask.to(device)


def at_token_times(rows: np.ndarray, n: int, rate: float, own_rate: float) -> np.ndarray:
    """The row of a sequence at `own_rate` per second that covers the middle of each of n tokens at `rate` per second:
    how a stream of codes follows another in time, whatever their lengths. Past its end the last row is repeated."""
    at = ((np.arange(n) + 0.5) * own_rate / rate + 1e-9).astype(np.int64)  # exact halves do not round down
    return rows[np.minimum(at, len(rows) - 1)]


def token_features(teacher: teachers.Teacher, features: np.ndarray, n: int, rate: float) -> np.ndarray:
    """A clip's features (N', E) at n tokens, `rate` per second. BEATs' are patches, 8 bands per 160 ms, and a mean of
    neighbours would mix bands: each token takes one. Others change smoothly in time and are interpolated."""
    if teacher.name == "beats":
        return at_token_times(features, n, rate, teacher.rate)
    x = torch.from_numpy(features).T[None]
    return F.interpolate(x, n, mode="linear", align_corners=False)[0].T.numpy()


class S3:
    """CosyVoice's supervised semantic tokens (arXiv:2407.05407) by the s3tokenizer package: 4096 codes, 50 a second."""

    rate, sample_rate = 50, 16000

    def __init__(self, source: str, device: str = "cpu"):
        self.device = device
        try:
            audio.torchaudio()
            import s3tokenizer

            self.package, self.model = s3tokenizer, s3tokenizer.load_model(source).to(device).eval()
        except Exception as error:  # it raises many types, for no network and for no such file
            fix = "pip install s3tokenizer, and --s3=speech_tokenizer_v1"
            raise ValueError(f"s3={source!r} is not there or out of reach ({type(error).__name__}); {fix}") from error

    @torch.inference_mode()
    def encode(self, wavs: list[np.ndarray]) -> list[np.ndarray]:
        """Clips at 16 kHz -> codes (N,) each, N about 50 per second."""
        out = [np.empty(0)] * len(wavs)
        for batch in teachers.batches([len(wav) for wav in wavs], 256 * self.sample_rate):
            mels = [self.package.log_mel_spectrogram(torch.from_numpy(wavs[i])) for i in batch]
            codes, counts = self.model.quantize(*(x.to(self.device) for x in self.package.padding(mels)))
            for i, row, n in zip(batch, codes.cpu().numpy(), counts.tolist(), strict=True):
                out[i] = row[:n].astype(np.int64)
        return out
