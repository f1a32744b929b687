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
from conftest import BEATS_CFG

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import teachers
from prepare import demo

ROLES = {"whisper": "whisper_tiny", "aisfx": "aisfx"}


@pytest.fixture(scope="module")
def load(package) -> Callable[[str], teachers.Teacher]:
    return cache(lambda name: demo.load_teacher(name, package(ROLES[name])))


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
        demo.SoundCNN.load(tmp_path / "aisfx.whl")
    assert not (tmp_path / "ran").exists()


# BEATs


def kaldi_fbank(wav: np.ndarray) -> np.ndarray:
    """Kaldi's log-mel with its defaults, float64: no dither, DC removed per frame, pre-emphasis 0.97, Povey window."""
    x = wav.astype(np.float64) * 2**15
    frames = np.array([x[s : s + 400] for s in range(0, len(x) - 400 + 1, 160)])
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    power = np.abs(np.fft.rfft(frames, 512)) ** 2

    def mel(f):
        return 1127 * np.log(1 + f / 700)

    edges, at = np.linspace(mel(20), mel(8000), 130), mel(np.arange(256) * 16000 / 512)
    bank = np.array([
        np.maximum(0, np.minimum((at - a) / (b - a), (c - at) / (c - b)))
        for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)
    ])  # fmt: skip
    return np.log(np.maximum(power[:, :256] @ bank.T, np.finfo(np.float32).eps))


def beats_by_hand(path: Path, wav: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and codes of one clip in float64, the paper's equations one head and one pair at a time."""
    w = {k: v.double().numpy() for k, v in torch.load(path)["model"].items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return F.gelu(torch.from_numpy(x)).numpy()

    def bucket(offset):
        size = abs(offset)
        if size >= 4:
            size = min(7, 4 + int(np.log(size / 4) / np.log(40 / 4) * 4))
        return size + 8 * (offset > 0)

    bank = (kaldi_fbank(wav) - 15.41663) / (2 * 6.55582)
    patches = [bank[16 * t : 16 * t + 16, 16 * f : 16 * f + 16] for t in range(len(bank) // 16) for f in range(8)]
    x = np.array([(w["patch_embedding.weight"][:, 0] * p).sum((1, 2)) for p in patches])
    x = linear(norm(x, "layer_norm"), "post_extract_proj")
    N, D = x.shape
    v = w["encoder.pos_conv.0.weight_v"]
    kernel = v / np.sqrt((v**2).sum((0, 1))) * w["encoder.pos_conv.0.weight_g"][0, 0]
    padded, conv = np.concatenate([np.zeros((4, D)), x, np.zeros((4, D))]), np.zeros((N, D))
    for i in range(N):
        for out in range(D):
            group = out // 8
            window = padded[i : i + 8, 8 * group : 8 * group + 8]  # (K, D / groups)
            conv[i, out] = (window.T * kernel[out]).sum() + w["encoder.pos_conv.0.bias"][out]
    x = norm(x + gelu(conv), "encoder.layer_norm")
    table = w["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    for l in range(2):
        n = f"encoder.layers.{l}"
        q, k, value = (linear(x, f"{n}.self_attn.{p}_proj") for p in "qkv")
        y = np.zeros_like(x)
        for h in range(4):
            own = slice(8 * h, 8 * h + 8)
            gates = linear(q[:, own], f"{n}.self_attn.grep_linear")
            a, b = (1 / (1 + np.exp(-g.sum(1))) for g in (gates[:, :4], gates[:, 4:]))
            scale = a * (b * w[f"{n}.self_attn.grep_a"][0, h, 0, 0] - 1) + 2
            bias = np.array([[scale[i] * table[bucket(j - i), h] for j in range(N)] for i in range(N)])
            scores = q[:, own] @ k[:, own].T / np.sqrt(8) + bias
            weights = np.exp(scores - scores.max(1, keepdims=True))
            y[:, own] = weights / weights.sum(1, keepdims=True) @ value[:, own]
        alpha = 4**0.25
        x = norm(alpha * x + linear(y, f"{n}.self_attn.out_proj"), f"{n}.self_attn_layer_norm")
        x = norm(alpha * x + linear(gelu(linear(x, f"{n}.fc1")), f"{n}.fc2"), f"{n}.final_layer_norm")
    z = linear(np.tanh(linear(x, "quantize_layer.0")), "quantize_layer.2")
    z = z / np.sqrt((z**2).sum(1, keepdims=True))
    return x, ((z[:, None] - w["quantize.embedding.weight"]) ** 2).sum(2).argmin(1)


def test_beats_equals_the_equations_alone_and_padded(beats_file):
    """In one batch of three lengths, so whatever padding leaks shows as a difference from the clip alone."""
    beats = demo.load_teacher("beats", beats_file)
    wavs = [noise(0.6, 16000), noise(1.01, 16000, 1), noise(0.4, 16000, 2)]
    for wav, got, codes in zip(wavs, beats.encode(wavs), beats.codes(wavs), strict=True):
        expected, expected_codes = beats_by_hand(beats_file, wav)
        assert got.shape == expected.shape == (8 * ((1 + (len(wav) - 400) // 160) // 16), 32)
        np.testing.assert_allclose(got, expected, atol=2e-3)  # float32 logs of float32 powers
        assert (codes == expected_codes).mean() > 0.95 and len(set(codes)) > 1  # near ties may differ


def test_beats_features_are_the_same_alone_and_in_a_batch(beats_file):
    beats = demo.load_teacher("beats", beats_file)
    wavs = [noise(0.6, 16000), noise(2.01, 16000, 1), noise(0.4, 16000, 2)]
    for wav, got in zip(wavs, beats.encode(wavs), strict=True):
        np.testing.assert_allclose(got, beats.encode([wav])[0], atol=1e-5)


def test_beats_fbank_is_kaldis(beats_file):
    wav = noise(0.7, 16000)
    got = demo.load_teacher("beats", beats_file).fbank(wav) * 2 * 6.55582 + 15.41663
    np.testing.assert_allclose(got, kaldi_fbank(wav), atol=2e-3)


def test_beats_takes_a_clip_below_one_patch(beats_file):
    assert demo.load_teacher("beats", beats_file).encode([noise(0.05, 16000)])[0].shape == (8, 32)


def test_beats_without_a_codebook_has_no_codes(beats_file, tmp_path):
    stored = torch.load(beats_file)
    del stored["model"]["quantize.embedding.weight"]
    torch.save(stored, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="no codebook"):
        demo.load_teacher("beats", tmp_path / "encoder.pt").codes([noise(1, 16000)])


def test_other_files_are_not_beats(tmp_path):
    (tmp_path / "text.pt").write_text("no zip")
    (tmp_path / "empty.pt").touch()
    torch.save({"model": {}}, tmp_path / "no_cfg.pt")
    torch.save({"cfg": BEATS_CFG | {"layer_norm_first": True}, "model": {}}, tmp_path / "pre_norm.pt")
    for name, match in (("none", "pass the path"), ("text", "pass the path"), ("empty", "pass the path"),
                        ("no_cfg", "KeyError"), ("pre_norm", "post-norm")):  # fmt: skip
        with pytest.raises(ValueError, match=match) as error:
            demo.load_teacher("beats", tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)


# loading


@pytest.mark.parametrize("name", ["whisper", "aisfx"])
def test_missing_weights_are_one_clear_line(name, tmp_path):
    for source in (tmp_path / "none.whl", tmp_path):
        with pytest.raises(ValueError, match="pass ") as error:
            demo.load_teacher(name, source)
        assert "\n" not in str(error.value) and str(source) in str(error.value)


def test_unknown_teacher():
    with pytest.raises(ValueError, match="whisper, beats, aisfx"):
        demo.load_teacher("beast", "x.whl")


def test_weights_are_frozen(load):
    assert not any(p.requires_grad or p.is_meta for p in load("whisper").model.parameters())
    assert not load("whisper").model.training


def test_batches_cover_every_clip_once_within_the_budget():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 3000, 200)]
    batches = list(teachers._batches(lengths, 6000))
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert all(len(b) * max(lengths[i] for i in b) <= 6000 for b in batches)
    assert [len(b) for b in teachers._batches([50, 50], 10)] == [1, 1]


def test_style_vectors_are_means_of_equal_stretches(rng):
    features = rng.normal(size=(64, 5)).astype(np.float32)
    wanted = features.reshape(16, 4, 5).mean(1)  # a whole number of features in each
    np.testing.assert_allclose(teachers.style_vectors(features), wanted, rtol=1e-5, atol=1e-6)
    ramp = np.arange(40, dtype=np.float32)[:, None]  # 2.5 features a stretch
    np.testing.assert_array_equal(teachers.style_vectors(ramp)[:3, 0], [1.0, 3.0, 6.0])  # 0-2, 2-4, 5-7
    short = teachers.style_vectors(features[:3])
    assert short.shape == (16, 5) and (short[0] == features[0]).all() and (short[-1] == features[2]).all()
