"""Waveforms: read, resample, log-mel, vocoder. The only file that touches samples.

    wav = audio.read("clip.flac", 24000)          # mono float32 at 24 kHz, whatever the file holds
    mel = audio.log_mel(torch.from_numpy(wav))    # (T, 100), the input of Vocos
    wav = audio.load_vocoder("griffin_lim")(mel)

L samples, T mel frames (one each HOP samples), M = 100 mel bins.
"""

import importlib
import io
import math
import re
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch

SAMPLE_RATE, N_FFT, HOP, N_MELS = 24000, 1024, 256, 100
LOG_CLIP = 1e-7  # Vocos' own floor under the logarithm
FRAME_RATE = SAMPLE_RATE / HOP  # mel frames per second
MAX_SAMPLES = 2**26  # of all channels: the most that one clip may cost to decode, 256 MiB
LOUDEST = 1e6  # a float file may hold anything: beyond this a power spectrum comes near what float32 holds
PYAV_SUFFIXES = {".g722", ".m4a", ".mp4", ".webm", ".aac"}  # what libsndfile cannot read
# what a config.yaml may name: Vocos imports any class that it is told to, and the file may be a stranger's
VOCOS_CLASS = r"vocos\.(feature_extractors\.MelSpectrogramFeatures|models\.Vocos(ResNet)?Backbone|"
VOCOS_CLASS += r"heads\.(ISTFT|IMDCTSymExp|IMDCTCos)Head)"


class AudioError(ValueError):
    """A clip that cannot be used; `reason` is a short phrase that clips are counted by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def read(source: str | Path | bytes, sample_rate: int, name: str = "") -> np.ndarray:
    """Decodes a file (or its bytes, `name` giving the suffix) to mono float32 (L,) at `sample_rate` Hz."""
    return resample(*decode(source, name), sample_rate)


def resample(wav: np.ndarray, rate: int, to: int) -> np.ndarray:
    """(L,) at `rate` Hz -> float32 at `to` Hz, by soxr at high quality."""
    return np.ascontiguousarray(soxr.resample(wav, rate, to) if rate != to else wav, np.float32)


def decode(source: str | Path | bytes, name="", start=0.0, end=None, longest=math.inf) -> tuple[np.ndarray, int]:
    """Decodes the seconds `start` to `end` of a file (or its bytes, `name` giving the suffix) to mono float32 (L,) and
    its own sample rate. Raises AudioError for anything undecodable, empty, silent or absurd, and for what lasts over
    `longest` seconds or costs over MAX_SAMPLES, before it is decoded where the header tells."""
    suffix = Path(name if isinstance(source, bytes) else source).suffix.lower()
    reader = _read_av if suffix in PYAV_SUFFIXES else _read_soundfile
    try:
        if not isinstance(source, bytes) and not Path(source).is_file():  # opening a FIFO would wait for ever
            raise AudioError("not a regular file" if Path(source).exists() else "no such file", "pass a recording")
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            wav, rate = reader(file, suffix, start, math.inf if end is None else end, longest)  # (L, channels)
    except AudioError:
        raise
    except Exception as error:  # decoders raise a dozen types of their own
        reason = getattr(error, "error_string", error)  # libsndfile's, without the name of our buffer
        raise AudioError("cannot be decoded", f"{type(error).__name__} {reason}") from error
    if wav.shape[0] == 0:
        raise AudioError("empty", f"it ends before {start:g} s" if start else "")
    with np.errstate(over="ignore", invalid="ignore"):
        wav = wav.mean(axis=1)  # before the checks: two channels may cancel
        peak = float(np.abs(wav).max())
    if not peak < LOUDEST:
        raise AudioError("samples not finite", f"or absurd, up to {peak:.3g}")
    if peak < 1e-4:  # under -80 dB of full scale
        raise AudioError("silent")
    return wav, rate


def _refuse_costly(frames: int, rate: int, channels: int, longest: float) -> None:
    if frames / rate > longest:
        raise AudioError("too long", f"{frames / rate:.2f} s")
    if frames * channels > MAX_SAMPLES:
        raise AudioError("too large", f"{frames / rate:.0f} s of {channels} channels at {rate} Hz")


def _read_soundfile(file: BinaryIO, _: str, start: float, end: float, longest: float) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(file) as sound:
        rate, channels = sound.samplerate, sound.channels
        if not 1000 <= rate <= 768_000 or channels > 32:
            raise AudioError("absurd header", f"{rate} Hz, {channels} channels")
        first, last = int(start * rate), int(min(end * rate, sound.frames))
        if last > 2**62:  # a FLAC that was streamed
            raise AudioError("cannot be decoded", "its header gives no length: encode it again")
        _refuse_costly(last - first, rate, channels, longest)
        sound.seek(min(first, sound.frames))
        return sound.read(max(0, last - first), dtype="float32", always_2d=True), rate


def _read_av(file: BinaryIO, suffix: str, start: float, end: float, longest: float) -> tuple[np.ndarray, int]:
    import av

    chunks, rate = [], 1
    sought = start > 1 and suffix not in (".g722", ".aac")  # bare frames have no clock
    with av.open(file, format="g722" if suffix == ".g722" else None) as container:
        stream, resampler = container.streams.audio[0], av.AudioResampler(format="fltp", layout="mono")
        if sought:  # a second before, for what a codec remembers
            container.seek(int((start - 1) * av.time_base))
        for raw in container.decode(stream):
            if not chunks:
                rate, clock = raw.sample_rate, (raw.pts - (stream.start_time or 0)) * raw.time_base if sought else 0
                at, first, last = round(clock * rate), int(start * rate), int(min(end * rate, 2**62))
            for x in (f.to_ndarray() for f in resampler.resample(raw)):  # (1, samples)
                chunks.append(x[:, max(0, first - at) : max(0, last - at)])
                at += x.shape[1]
            _refuse_costly(min(at, last) - first, rate, raw.layout.nb_channels, longest)
            if at >= last:
                break
    return np.concatenate(chunks, axis=1).T if chunks else np.zeros((0, 1), np.float32), rate


def write(path: str | Path, wav: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Writes (L,) float samples as 16-bit WAV; a peak above 1 is scaled down rather than clipped."""
    file, wav = io.BytesIO(), np.asarray(wav, np.float32)  # a disk that is full tells libsndfile in ten lines
    soundfile.write(file, wav / max(1.0, float(np.abs(wav).max(initial=0))), sample_rate, "PCM_16", format="WAV")
    Path(path).write_bytes(file.getvalue())


@cache
def torchaudio() -> types.ModuleType:
    """Imports torchaudio, also where its compiled extension does not fit this torch: the pure-Python transforms, which
    alone are used here and by vocos, do without. Call this before importing vocos or transformers' Whisper."""
    try:
        return importlib.import_module("torchaudio")
    except (OSError, ImportError, RuntimeError):
        for name in [n for n in sys.modules if n.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stub = types.SimpleNamespace(_IS_TORCHAUDIO_EXT_AVAILABLE=False, fail_if_no_align=lambda function: function)
        sys.modules["torchaudio._extension"] = stub
        return importlib.import_module("torchaudio")


@cache
def _mel_transform() -> torch.nn.Module:
    return torchaudio().transforms.MelSpectrogram(SAMPLE_RATE, N_FFT, hop_length=HOP, n_mels=N_MELS, power=1)


def log_mel(wav: torch.Tensor) -> torch.Tensor:
    """Waveform (L,) or (B, L) at 24 kHz -> natural-log magnitude mel (T, 100) or (B, T, 100), T = L // HOP + 1, the
    features of Vocos. Raises AudioError below one STFT half."""
    if wav.shape[-1] <= N_FFT // 2:  # reflection at the edges needs more samples than it mirrors
        raise AudioError("too short", f"{wav.shape[-1]} samples")
    mel = _mel_transform().to(wav.device)(wav.float())
    return mel.clamp_min(LOG_CLIP).log().transpose(-1, -2)


@cache
def _mel_inverse() -> torch.Tensor:
    return torch.linalg.pinv(_mel_transform().mel_scale.fb.double()).float()  # (100, 513)


def mel_to_magnitude(mel: torch.Tensor, iterations: int = 50) -> torch.Tensor:
    """Log-mel (T, 100) -> non-negative STFT magnitudes (513, T) whose mel is as near as possible: least squares by
    multiplicative updates, started at the clamped pseudo-inverse."""
    filters, target = _mel_transform().mel_scale.fb.to(mel.device), mel.float().exp()  # (513, 100), (T, 100)
    magnitude = (target @ _mel_inverse().to(mel.device)).clamp_min(1e-6)  # (T, 513)
    numerator = target @ filters.T
    for _ in range(iterations):
        magnitude = magnitude * numerator / (magnitude @ filters @ filters.T).clamp_min(1e-8)
    return magnitude.T


def griffin_lim(mel: torch.Tensor) -> np.ndarray:
    """Log-mel (T, 100) -> waveform ((T - 1) * HOP,): the vocoder without weights (fast Griffin-Lim)."""
    frames = mel.shape[0]
    mel = torch.cat([mel, mel[-1:].expand(max(0, 4 - frames), -1)])  # 4 frames are the least that its STFT can mirror
    sizes = (torch.hann_window(N_FFT, device=mel.device), N_FFT, HOP, N_FFT)
    wav = torchaudio().functional.griffinlim(mel_to_magnitude(mel), *sizes, 1.0, 60, 0.99, None, rand_init=False)
    return wav[: (frames - 1) * HOP].cpu().numpy()


def load_vocoder(name: str, device: str = "cpu") -> Callable[[torch.Tensor], np.ndarray]:
    """Returns mel (T, 100) -> waveform (L,). `name`: griffin_lim, a Vocos hub name or a folder with its two files.
    Raises ValueError when they cannot be read, or config.yaml asks for other code."""
    if name == "griffin_lim":
        return griffin_lim
    torchaudio()
    import yaml
    from huggingface_hub import hf_hub_download
    from vocos import Vocos

    try:
        files = ("config.yaml", "pytorch_model.bin")
        config, weights = (Path(name) / f if Path(name).is_dir() else hf_hub_download(name, f) for f in files)
        parts = yaml.safe_load(Path(config).read_text())
        for path in (parts[p]["class_path"] for p in ("feature_extractor", "backbone", "head")):
            if not re.fullmatch(VOCOS_CLASS, path):
                raise ValueError(f"its config.yaml names {path}; only Vocos' own classes are run")
        vocos = Vocos.from_hparams(str(config)).to(device).eval()
        vocos.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    except Exception as error:
        what = f"vocoder {name!r} cannot be read ({type(error).__name__} {' '.join(str(error).split())[:160]})"
        fix = "pass a folder with config.yaml and pytorch_model.bin or a hub name"
        raise ValueError(f"{what}: {fix}; --vocoder=griffin_lim needs no weights") from error

    @torch.inference_mode()
    def vocode(mel: torch.Tensor) -> np.ndarray:
        return vocos.decode(mel.float().to(device).T[None])[0].cpu().numpy()  # Vocos wants (1, 100, T)

    return vocode
