"""audio.py: decoding whatever comes, the mel against Vocos' own features, and the way back to samples."""

import io
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio
from audio import AudioError
from prepare import demo

ROOT = Path(__file__).parent.parent


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def wav_bytes(samples: np.ndarray, rate: int, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=options.pop("format", "WAV"), **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def prompt() -> bytes:
    """One real prompt, G.722."""
    files = demo.open_deb(demo.fetch("asterisk"))
    return next(v for k, v in files.items() if k.endswith("/vm-tomakecall.g722"))


# ---- reading


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("kind", ["wav", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
def test_read_resamples_and_mixes(tmp_path, rate, kind, channels):
    left = tone(rate)
    samples = left if channels == 1 else np.stack([left, 0.5 * left], 1)
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, samples, rate)
    wav = audio.read(path, 24000)
    assert wav.dtype == np.float32 and wav.ndim == 1 and abs(len(wav) - 24000) <= 1 and wav.flags.c_contiguous
    expected = tone(24000, level=0.5 if channels == 1 else 0.375)  # the tone as it would be sampled at 24 kHz
    inside = slice(500, 23500)  # away from the resampler's edges
    np.testing.assert_allclose(wav[inside], expected[inside], atol=1e-3)
    np.testing.assert_array_equal(wav, audio.read(path.read_bytes(), 24000))
    np.testing.assert_array_equal(wav, audio.read(str(path), 24000))


def test_decode_changes_nothing_at_the_own_rate(tmp_path, rng):
    samples = rng.uniform(-1, 1, 5000).astype(np.float32)
    wav, rate = audio.decode(wav_bytes(samples, 11025, subtype="FLOAT"))
    assert rate == 11025
    np.testing.assert_array_equal(wav, samples)
    np.testing.assert_array_equal(audio.resample(wav, 11025, 11025), samples)


def test_g722(tmp_path, prompt):
    wav, rate = audio.decode(prompt, "x.g722")
    assert rate == 16000 and len(wav) == 2 * len(prompt)  # 64 kbit/s: one byte makes two samples
    path = tmp_path / "CLIP.G722"
    path.write_bytes(prompt)
    np.testing.assert_array_equal(audio.decode(path)[0], wav)
    spectrum = np.abs(np.fft.rfft(wav)) ** 2
    assert spectrum[: len(spectrum) // 2].sum() > 0.9 * spectrum.sum()  # a voice lies below 4 kHz


def header(rate: int, channels: int) -> bytes:
    """A 16-bit wav with any numbers in its header, and some samples."""
    content = struct.pack("<64h", *range(1000, 1064)) * 4 * channels
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2 & 0xFFFFFFFF, channels * 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "source, name, reason",
    [
        (wav_bytes(np.zeros(0, np.float32), 16000), "", "empty"),
        (b"", "a.g722", "empty|cannot be decoded"),
        (b"", "a.wav", "cannot be decoded"),
        (wav_bytes(np.zeros(16000, np.float32), 16000), "", "silent"),
        (wav_bytes(np.full(16000, 5e-5, np.float32), 16000, subtype="FLOAT"), "", "silent"),
        (wav_bytes(np.stack([tone(16000), -tone(16000)], 1), 16000, subtype="FLOAT"), "", "silent"),  # cancels
        (wav_bytes(np.array([0.1, np.nan] * 500, np.float32), 16000, subtype="FLOAT"), "", "samples not finite"),
        (wav_bytes(np.array([0.1, np.inf] * 500, np.float32), 16000, subtype="FLOAT"), "", "samples not finite"),
        (wav_bytes(np.array([0.1, 3e38] * 500, np.float32), 16000, subtype="FLOAT"), "", "samples not finite"),
        (wav_bytes(np.full((500, 2), 3e38, np.float32), 16000, subtype="FLOAT"), "", "samples not finite"),  # sum: inf
        (b"this is text, renamed .wav\n" * 50, "note.wav", "cannot be decoded"),
        (b"this is text, renamed .m4a\n" * 50, "note.m4a", "cannot be decoded"),
        (wav_bytes(tone(16000), 16000, format="FLAC")[:60], "cut.flac", "cannot be decoded|empty"),
        (header(0, 1), "", "absurd header|cannot be decoded"),
        (header(24000, 64), "", "absurd header"),
        (header(4_000_000_000, 1), "", "absurd header|cannot be decoded"),
        (header(100, 1), "", "absurd header"),
        (header(24000, 0), "", "absurd header|cannot be decoded"),
    ],
)
def test_a_clip_that_cannot_be_used_says_why(tmp_path, source, name, reason):
    with pytest.raises(AudioError) as error:
        audio.read(source, 24000, name)
    assert error.value.reason in reason.split("|") and str(error.value).startswith(error.value.reason)
    path = tmp_path / (name or "a.wav")
    path.write_bytes(source)
    with pytest.raises(AudioError) as error:
        audio.read(path, 24000)
    assert error.value.reason in reason.split("|")


@pytest.mark.parametrize("suffix", ["wav", "g722"])
def test_what_is_no_regular_file_is_never_opened(tmp_path, suffix):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, to in (("fifo", "fifo"), ("device", "/dev/zero"), ("folder", "folder"), ("gone", "nothing")):
        (tmp_path / f"{name}.{suffix}").symlink_to(tmp_path / to)
        with pytest.raises(AudioError, match="^no such file" if name == "gone" else "^not a regular file"):
            audio.read(tmp_path / f"{name}.{suffix}", 24000)


# ---- parts and bounds


def encoded(suffix: str, samples: np.ndarray, rate: int) -> bytes:
    """A recording in one of the formats that PyAV reads, written by it."""
    import av

    kinds = {"m4a": ("ipod", "aac"), "aac": ("adts", "aac"), "webm": ("webm", "libopus"), "g722": ("g722", "g722")}
    file = io.BytesIO()
    with av.open(file, "w", format=kinds[suffix][0]) as container:
        stream = container.add_stream(kinds[suffix][1], rate=rate, layout="mono")
        stream.options, kind = {"aac_pns": "0"}, stream.codec_context.format.name  # whose noise is never the same
        values = samples if kind == "fltp" else (32767 * samples).astype(np.int16)
        for i in range(0, len(samples), 960):
            frame = av.AudioFrame.from_ndarray(values[None, i : i + 960], format=kind, layout="mono")
            frame.sample_rate, frame.pts = rate, i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "m4a", "aac", "webm", "g722"])
def test_a_part_is_what_the_whole_has_there_and_too_long_is_refused(kind, rng):
    rate = 16000 if kind == "g722" else 48000
    samples = (tone(rate, 12.0) + rng.normal(0, 0.05, 12 * rate)).astype(np.float32)
    source = wav_bytes(samples, rate, format=kind) if kind.isupper() else encoded(kind, samples, rate)
    whole, part = (audio.decode(source, f"a.{kind}", *times)[0] for times in ((), (5.5, 7.25, 1.75)))
    shift = 48 if kind == "webm" else 0  # its clock has milliseconds
    wanted = [whole[int(5.5 * rate) + k : int(7.25 * rate) + k] for k in range(-shift, shift + 1)]
    assert len(part) == 1.75 * rate and min(np.abs(part - w).max() for w in wanted) < 1e-6
    end, _ = audio.decode(source, f"a.{kind}", 11.0, 99.0, 2.0)
    assert abs(len(end) - rate) < 0.05 * rate
    for times, match in (((0, None, 9.9), "^too long: "), ((2.0, None, 8.0), "^too long: "), ((13.0,), "^empty: ")):
        with pytest.raises(AudioError, match=match):
            audio.decode(source, f"a.{kind}", *times)


def test_what_a_header_says_is_believed_before_anything_is_decoded(tmp_path):
    """Four hours of 48 kHz stereo of which the disk holds a second, and a FLAC that claims 20 days."""
    content = bytearray(wav_bytes(np.stack([tone(48000)] * 2, 1), 48000))
    seconds, path = 14400, tmp_path / "long.wav"
    size = seconds * 192000
    content[4:8], content[40:44] = (struct.pack("<I", n) for n in (36 + size, size))
    path.write_bytes(content)
    os.truncate(path, 44 + size)
    flac = bytearray(wav_bytes(tone(48000), 48000, format="FLAC"))
    flac[18:26] = (int.from_bytes(flac[18:26], "big") | (2**36 - 1)).to_bytes(8, "big")
    tracemalloc.start()
    for source in (path, bytes(flac)):
        for longest, reason in ((30.0, "too long"), (math.inf, "too large")):
            with pytest.raises(AudioError, match=f"^{reason}: "):
                audio.decode(source, longest=longest)
        np.testing.assert_allclose(audio.decode(source, "", 0.25, 0.5, 30.0)[0], tone(48000)[12000:24000], atol=1e-4)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_write_keeps_samples_and_scales_rather_than_clips(tmp_path, rng):
    samples = rng.uniform(-0.9, 0.9, 4000)
    audio.write(tmp_path / "a.wav", samples)
    back, rate = audio.decode(tmp_path / "a.wav")
    assert rate == 24000
    np.testing.assert_allclose(back, samples, atol=1 / 32000)
    audio.write(tmp_path / "b.wav", 4 * samples, 16000)
    back, rate = audio.decode(tmp_path / "b.wav")
    assert rate == 16000
    np.testing.assert_allclose(back, samples / np.abs(samples).max(), atol=1 / 16000)
    audio.write(tmp_path / "c.wav", np.zeros(0))


# ---- mel


def test_log_mel_equals_vocos_features(rng):
    audio.torchaudio()
    from vocos.feature_extractors import MelSpectrogramFeatures

    reference = MelSpectrogramFeatures(sample_rate=24000, n_fft=1024, hop_length=256, n_mels=100, padding="center")
    for length in (513, 1000, 1024, 4096, 10_239, 10_240):
        wav = torch.from_numpy(rng.uniform(-1, 1, (2, length)).astype(np.float32))
        wav[1, length // 2 :] = 0  # digital silence: the floor
        mel = audio.log_mel(wav)
        assert mel.shape == (2, length // 256 + 1, 100)
        torch.testing.assert_close(mel, reference(wav).transpose(1, 2), atol=1e-5, rtol=0)
        torch.testing.assert_close(audio.log_mel(wav[0]), mel[0], atol=1e-5, rtol=0)  # (L,) as a row of (B, L)
    assert mel.min().item() == pytest.approx(np.log(1e-7))


@pytest.mark.parametrize("length", [0, 1, 512])
def test_log_mel_of_too_little(length):
    with pytest.raises(AudioError, match=f"too short: {length} samples"):
        audio.log_mel(torch.ones(length))


def test_mel_to_magnitude(prompt):
    mel = audio.log_mel(torch.from_numpy(audio.read(prompt, 24000, "x.g722"))[:48000])
    magnitude = audio.mel_to_magnitude(mel)
    assert magnitude.shape == (513, len(mel)) and magnitude.min() >= 0 and magnitude.isfinite().all()
    filters = audio.torchaudio().functional.melscale_fbanks(513, 0.0, 12000.0, 100, 24000)  # (513, 100)
    error = ((magnitude.T @ filters - mel.exp()).norm() / mel.exp().norm()).item()
    assert error < 0.02
    first = audio.mel_to_magnitude(mel, iterations=0)  # the iterations are what brings it near
    assert error < 0.5 * ((first.T @ filters - mel.exp()).norm() / mel.exp().norm()).item()


# ---- vocoders


def test_griffin_lim_gives_the_mel_back(prompt):
    mel = audio.log_mel(torch.from_numpy(audio.read(prompt, 24000, "x.g722"))[:60000]).clamp_min(-8)
    vocoder = audio.load_vocoder("griffin_lim")
    wav = vocoder(mel)
    assert wav.dtype == np.float32 and wav.shape == ((len(mel) - 1) * 256,) and np.isfinite(wav).all()
    np.testing.assert_array_equal(wav, vocoder(mel))
    error = (audio.log_mel(torch.from_numpy(wav)).clamp_min(-8) - mel).abs().mean().item()
    assert error < 0.25, error
    other = audio.log_mel(torch.from_numpy(vocoder(mel.flip(0)))).clamp_min(-8)  # the bound can be missed
    assert (other - mel).abs().mean().item() > 1


@pytest.mark.parametrize(
    "content", [{}, {"config.yaml": b"nonsense: ["}, {"config.yaml": b"{}", "pytorch_model.bin": b"x"}]
)
def test_nonsense_is_no_vocoder(tmp_path, content):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="--vocoder=griffin_lim needs no weights") as error:
        audio.load_vocoder(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_griffin_lim_takes_the_shortest_mels(frames, rng):
    wav = audio.load_vocoder("griffin_lim")(torch.from_numpy(rng.normal(-3, 1, (frames, 100)).astype(np.float32)))
    assert wav.shape == ((frames - 1) * 256,) and np.isfinite(wav).all()


VOCOS = """
feature_extractor:
  class_path: vocos.feature_extractors.MelSpectrogramFeatures
  init_args: {sample_rate: 24000, n_fft: 1024, hop_length: 256, n_mels: 100, padding: center}
backbone:
  class_path: vocos.models.VocosBackbone
  init_args: {input_channels: 100, dim: 16, intermediate_dim: 32, num_layers: 1}
head:
  class_path: vocos.heads.ISTFTHead
  init_args: {dim: 16, n_fft: 1024, hop_length: 256, padding: center}
"""


def test_vocos_from_a_folder(tmp_path, rng):
    audio.torchaudio()
    from vocos import Vocos

    (tmp_path / "config.yaml").write_text(VOCOS)
    net = Vocos.from_hparams(str(tmp_path / "config.yaml")).eval()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    vocoder = audio.load_vocoder(str(tmp_path))
    mel = torch.from_numpy(rng.normal(-5, 2, (60, 100)).astype(np.float32))
    wav = vocoder(mel)
    assert wav.shape == (59 * 256,) and np.isfinite(wav).all()
    np.testing.assert_allclose(wav, net.decode(mel.T[None])[0].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "part", ["feature_extractors.MelSpectrogramFeatures", "models.VocosBackbone", "heads.ISTFTHead"]
)
def test_a_vocoder_runs_no_code_of_its_own(tmp_path, part, monkeypatch):
    """A config.yaml may name any importable class: here one beside it, whose import leaves a trace."""
    (tmp_path / "config.yaml").write_text(VOCOS.replace(f"vocos.{part}", "strangers_code.Net"))
    (tmp_path / "strangers_code.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="names strangers_code.Net; only Vocos' own") as error:
        audio.load_vocoder(str(tmp_path))
    assert not (tmp_path / "trace").exists() and "\n" not in str(error.value)


# ---- torchaudio


def test_torchaudio_where_the_plain_import_fails():
    """In a fresh process, first as everyone does it, then through audio.py."""
    code = """
try:
    import torchaudio
    print("works")
except OSError:
    import audio
    module = audio.torchaudio()
    import torchaudio
    import vocos
    assert module is torchaudio is audio.torchaudio()
    print("mended", module.transforms.MelSpectrogram(24000).mel_scale.fb.shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if done.stdout == "works\n":
        pytest.skip("torchaudio fits this torch: there is nothing to mend")
    assert done.stdout == "mended 201\n"
