"""Tests of teachers.py against independent references: transformers' own encoder and generate, numpy float64 spectra,
the networks written out plainly, onnx's evaluator, and a loop over single clips for every batch."""

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import teachers

ROLES = {"whisper": "whisper_tiny", "aisfx": "aisfx"}


@pytest.fixture(scope="module")
def load(package) -> Callable[[str], teachers.Teacher]:
    return cache(lambda name: teachers.load_teacher(name, package(ROLES[name])))


def noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Noise whose level and colour change over time, so that no two stretches look alike."""
    n, rng = int(seconds * rate), np.random.default_rng(seed)
    white, t = rng.standard_normal(n), np.arange(n) / rate
    level = 0.1 * (1.1 + np.sin(5 * t + seed)) * np.sin(2 * np.pi * (300 + 200 * seed) * t**1.3)
    return (level + 0.02 * white).astype(np.float32)


def htk_filters(n_fft: int, n_mels: int, fmin: float, fmax: float, rate: int, in_mel: bool) -> np.ndarray:
    """Triangular HTK filters (n_mels, bins), one value at a time, linear in mel or in Hz."""

    def mel(hertz: float | np.ndarray) -> float | np.ndarray:
        return 2595 * np.log10(1 + hertz / 700)

    edges = np.linspace(mel(fmin), mel(fmax), n_mels + 2)
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    points, edges = (mel(bins), edges) if in_mel else (bins, 700 * (10 ** (edges / 2595) - 1))
    out = np.zeros((n_mels, len(bins)))
    for m in range(n_mels):
        low, mid, high = edges[m : m + 3]
        for k, f in enumerate(points):
            out[m, k] = max(0.0, min((f - low) / (mid - low), (high - f) / (high - mid)))
    return out


def spectra(wav: np.ndarray, window: int, n_fft: int, hop: int) -> np.ndarray:
    """Magnitudes (T, bins) in float64 with a periodic Hann window, frames wholly inside `wav`."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(wav) - window + 1, hop)
    return np.abs([np.fft.rfft(wav[s : s + window].astype(np.float64) * hann, n_fft) for s in starts])


# Whisper


def hf_mel(whisper: teachers.Whisper, wav: np.ndarray) -> torch.Tensor:
    """transformers' own features of one clip padded to 30 s, (1, bins, 3000)."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=whisper.model.config.num_mel_bins)
    return extractor(wav, sampling_rate=16000, return_tensors="pt").input_features


def test_whisper_equals_transformers_on_30_s(load):
    whisper, wav = load("whisper"), noise(30, 16000)
    mel = hf_mel(whisper, wav)
    np.testing.assert_allclose(whisper.log_mel([wav], 480000), mel, atol=2e-4)
    with torch.inference_mode():
        expected = whisper.model.model.encoder(mel, output_hidden_states=True)
    [final], [second] = whisper.encode([wav]), whisper.encode([wav], layer=1)
    assert final.shape == (1500, whisper.dim) and final.dtype == np.float32
    np.testing.assert_allclose(final, expected.last_hidden_state[0], atol=5e-3)
    np.testing.assert_allclose(second, expected.hidden_states[2][0], atol=5e-3)


def test_whisper_encode_equals_a_plain_pass_over_each_clip(load, speech):
    whisper = load("whisper")
    wavs = [*speech.values(), noise(0.005, 16000), noise(0.33, 16000), noise(2.315, 16000)]
    encoder = whisper.model.model.encoder
    for wav, got in zip(wavs, whisper.encode(wavs), strict=True):
        frames = max(1, len(wav) // 160)
        with torch.inference_mode():
            mel = hf_mel(whisper, wav)[..., :frames]
            x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
            x = x + encoder.embed_positions.weight[: x.shape[1]]
            for block in encoder.layers:
                x = block(x, None)
            expected = encoder.layer_norm(x)[0]
        assert abs(len(got) - len(wav) / 16000 * whisper.rate) <= 1
        np.testing.assert_allclose(got, expected, atol=5e-3)


def test_whisper_pooling(load, speech):
    whisper, wavs = load("whisper"), list(speech.values())
    expected = np.stack([x.astype(np.float64).mean(0) for x in whisper.encode(wavs)])
    np.testing.assert_allclose(whisper.embed(wavs), expected, atol=1e-4)
    with torch.inference_mode():
        full = [whisper.model.model.encoder(hf_mel(whisper, w)).last_hidden_state.mean(1)[0] for w in wavs[:2]]
    np.testing.assert_allclose(whisper.embed(wavs[:2], pool="all"), torch.stack(full), atol=1e-3)
    assert whisper.embed([]).shape == (0, whisper.dim)


def test_whisper_transcribes_as_transformers_does(load, speech):
    from transformers import GenerationConfig

    whisper, wavs = load("whisper"), list(speech.values())
    texts = whisper.transcribe(wavs)
    assert [t.lower().strip(".") for t in texts] == [
        "message deleted",
        "waiting to speak with a representative",
        "press 4 to place an outgoing call",
    ]
    settings = GenerationConfig(
        decoder_start_token_id=50257,
        eos_token_id=50256,
        pad_token_id=50256,
        is_multilingual=False,
        no_timestamps_token_id=50362,
        suppress_tokens=whisper.suppress,
        begin_suppress_tokens=whisper.suppress_first,
    )
    mel = torch.cat([hf_mel(whisper, w) for w in wavs])
    with torch.inference_mode():
        ids = whisper.model.generate(mel, generation_config=settings, max_new_tokens=60)
    assert texts == [t.strip() for t in whisper.tokenizer.decode_batch(ids.tolist())]


def test_whisper_refuses_what_it_cannot_take(load):
    whisper, fine = load("whisper"), noise(0.1, 16000)
    for bad in (np.zeros(480001, np.float32), np.zeros(0, np.float32), np.zeros((2, 9), np.float32)):
        with pytest.raises(ValueError, match="clip 1"):
            whisper.encode([fine, bad])
    with pytest.raises(ValueError, match="clip 0"):
        whisper.embed([np.full(999, np.nan, np.float32)], pool="all")
    with pytest.raises(ValueError, match="float"):
        whisper.transcribe([np.zeros(999, np.int16)])
    with pytest.raises(ValueError, match="0..3"):
        whisper.encode([fine], layer=4)
    with pytest.raises(ValueError, match="'valid' or 'all'"):
        whisper.embed([fine], pool="max")


def ctranslate2(spec: str, arrays: dict[str, tuple[int, np.ndarray]]) -> bytes:
    """A model.bin as CTranslate2's converter writes it."""

    def text(s: str) -> bytes:
        return struct.pack("<H", len(s) + 1) + s.encode() + b"\0"

    out = struct.pack("<I", 6) + text(spec) + struct.pack("<II", 3, len(arrays))
    for name, (kind, array) in arrays.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += text(name) + shape + struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    return out


def test_ctranslate2_reader():
    half, count = np.arange(6, dtype=np.float16).reshape(2, 3), np.array(6, np.int16)
    read = teachers._ctranslate2_arrays(ctranslate2("WhisperSpec", {"a/weight": (4, half), "num_heads": (2, count)}))
    assert read["a/weight"].tolist() == half.tolist() and int(read["num_heads"]) == 6
    with pytest.raises(ValueError, match="Whisper"):
        teachers._ctranslate2_arrays(ctranslate2("TransformerSpec", {}))
    with pytest.raises(ValueError, match="quantised"):
        teachers._ctranslate2_arrays(ctranslate2("WhisperSpec", {"a/weight_scale": (0, half.astype(np.float32))}))


# aisfx


def plain_sound_net(package) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network of the ISMIR paper, batch norms and all: spectrograms (B, T, 96) -> maps (B, T // 8, 512)."""
    with zipfile.ZipFile(package("aisfx")) as wheel:
        data = io.BytesIO(wheel.read("aisfx/models/checkpoint.pth"))
    scalar = (np.int64(0).__reduce__()[0], "numpy.core.multiarray.scalar")
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype(np.int64))]):
        weights, _ = torch.load(data, weights_only=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        for block in range(1, 5):
            for i in (1, 2):
                prefix = f"embedding_net.conv_block{block}."
                norm = [weights[f"{prefix}bn{i}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
                x = F.batch_norm(F.conv2d(x, weights[f"{prefix}conv{i}.weight"], padding=1), *norm).relu()
            x = F.max_pool2d(x, 2 if block < 4 else 1)
        return x.mean(3).transpose(1, 2)

    return torch.inference_mode()(forward)


def test_sound_spectrogram(load):
    wav = noise(0.5, 44100)
    filters = htk_filters(2048, 96, 0, 22050, 44100, in_mel=False)
    power = spectra(np.pad(wav / np.abs(wav).max(), 1024), 2048, 2048, 1024) ** 2
    expected = np.log10(1 + 1e4 * power @ (filters / filters.sum(1, keepdims=True)).T) / 9.457798957824707
    np.testing.assert_allclose(load("aisfx").spectrogram(wav), expected, atol=1e-4)


def test_sound_embed_equals_the_package_on_full_blocks(load, package):
    sound, wav = load("aisfx"), noise(199.5 * 1024 / 44100, 44100)  # 200 frames: blocks at 0, 50 and 100
    spec = sound.spectrogram(wav)
    blocks = torch.stack([spec[s : s + 100] for s in (0, 50, 100)])
    expected = plain_sound_net(package)(blocks).amax(1).mean(0)
    np.testing.assert_allclose(sound.embed([wav])[0], expected, atol=1e-4)


def test_sound_encode_interleaves_four_shifts(load, package):
    sound, net, wav = load("aisfx"), plain_sound_net(package), noise(5, 44100)
    spec, [got] = sound.spectrogram(wav), sound.encode([wav])
    assert len(got) == (len(spec) + 1) // 2 == round(5 * sound.rate)
    for first in (2, 3, 4, 5):  # feature i pools frames 2 i - 3 to 2 i + 4
        expected = net(spec[None, 2 * first - 3 :])[0]
        middle = range(6, len(expected) - 6)  # where the network does not see the edges
        np.testing.assert_allclose(got[[first + 4 * j for j in middle]], expected[list(middle)], atol=1e-4)


def test_sound_batch_equals_each_clip_alone_and_takes_short_ones(load):
    sound = load("aisfx")
    wavs = [noise(s, 44100, k) for k, s in enumerate((0.03, 0.4, 0.71, 1.0, 2.6))] + [np.ones(1, np.float32)]
    for wav, features, pooled in zip(wavs, sound.encode(wavs), sound.embed(wavs), strict=True):
        assert len(features) == (2 + len(wav) // 1024) // 2  # ceil(frames / 2)
        assert np.isfinite(features).all() and np.isfinite(pooled).all()
        np.testing.assert_allclose(features, sound.encode([wav])[0], atol=1e-5)
        np.testing.assert_allclose(pooled, sound.embed([wav])[0], atol=1e-5)
    assert np.isfinite(sound.embed([np.zeros(44100, np.float32)])).all()


def test_sound_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    buffer = io.BytesIO()
    torch.save((Payload(), {}), buffer)
    with zipfile.ZipFile(tmp_path / "aisfx.whl", "w") as wheel:
        wheel.writestr("aisfx/models/checkpoint.pth", buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        teachers.SoundCNN.load(tmp_path / "aisfx.whl")
    assert not (tmp_path / "ran").exists()


# loading


@pytest.mark.parametrize("name", ["whisper", "aisfx"])
def test_missing_weights_are_one_clear_line(name, tmp_path):
    for source in (tmp_path / "none.whl", tmp_path):
        with pytest.raises(ValueError, match="pass ") as error:
            teachers.load_teacher(name, source)
        assert "\n" not in str(error.value) and str(source) in str(error.value)


def test_unknown_teacher():
    with pytest.raises(ValueError, match="whisper, aisfx"):
        teachers.load_teacher("beast", "x.whl")


def test_weights_are_frozen(load):
    assert not any(p.requires_grad or p.is_meta for p in load("whisper").model.parameters())
    assert not load("whisper").model.training


def test_batches_cover_every_clip_once_within_the_budget():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 3000, 200)]
    batches = list(teachers._batches(lengths, 6000))
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert all(len(b) * max(lengths[i] for i in b) <= 6000 for b in batches)
    assert [len(b) for b in teachers._batches([50, 50], 10)] == [1, 1]
