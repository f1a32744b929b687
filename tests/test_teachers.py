"""Tests of teachers.py against independent references: transformers' own encoder and generate, numpy float64 spectra,
the networks written out plainly, and a loop over single clips for every batch."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import BEATS_CFG

import audio
import teachers
from prepare import demo


@pytest.fixture(scope="module")
def whisper(package) -> teachers.Whisper:
    return demo.load_teacher("whisper", package("whisper_tiny"))


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


def expected_log_mel(wav: np.ndarray, offset: float) -> np.ndarray:
    """The front end of VGGish and YAMNet: log(64 mel magnitudes + offset), (T, 64)."""
    return np.log(spectra(wav, 400, 512, 160) @ htk_filters(512, 64, 125, 7500, 16000, in_mel=True).T + offset)


def hf_mel(whisper: teachers.Whisper, wav: np.ndarray) -> torch.Tensor:
    """transformers' own features of one clip padded to 30 s, (1, bins, 3000)."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=whisper.model.config.num_mel_bins)
    return extractor(wav, sampling_rate=16000, return_tensors="pt").input_features


def test_whisper_equals_transformers_on_30_s(whisper):
    wav = noise(30, 16000)
    mel = hf_mel(whisper, wav)
    np.testing.assert_allclose(teachers.whisper_mel([wav], 480000, whisper.filters), mel, atol=2e-4)
    with torch.inference_mode():
        expected = whisper.model.model.encoder(mel, output_hidden_states=True)
    [final], [second] = whisper.encode([wav]), whisper.encode([wav], layer=1)
    assert final.shape == (1500, whisper.dim) and final.dtype == np.float32
    np.testing.assert_allclose(final, expected.last_hidden_state[0], atol=5e-3)
    np.testing.assert_allclose(second, expected.hidden_states[2][0], atol=5e-3)


def test_whisper_encode_equals_a_plain_pass_over_each_clip(whisper, speech):
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
    pooled = np.stack([x.astype(np.float64).mean(0) for x in whisper.encode(wavs)])
    np.testing.assert_allclose(whisper.embed(wavs), pooled, atol=1e-4)
    assert whisper.embed([]).shape == (0, whisper.dim)


def test_whisper_transcribes_as_transformers_does(whisper, speech):
    from transformers import GenerationConfig

    wavs = list(speech.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        texts = whisper.transcribe(wavs)
    words = ["message deleted", "waiting to speak with a representative", "press 4 to place an outgoing call"]
    assert [t.lower().strip(".") for t in texts] == words
    ids = {"decoder_start_token_id": 50257, "no_timestamps_token_id": 50362}
    ids |= {"eos_token_id": 50256, "pad_token_id": 50256}
    suppressed = {"suppress_tokens": whisper.suppress, "begin_suppress_tokens": whisper.suppress_first}
    settings = GenerationConfig(is_multilingual=False, **ids, **suppressed)
    mel = torch.cat([hf_mel(whisper, w) for w in wavs])
    with torch.inference_mode():
        ids = whisper.model.generate(mel, generation_config=settings, max_new_tokens=60)
    assert texts == [t.strip() for t in whisper.tokenizer.decode_batch(ids.tolist())]


def tiny_multilingual_whisper() -> teachers.Whisper:
    """Random weights, and a tokenizer with the published ids of the words that prompts are made of."""
    audio.torchaudio()
    from tokenizers import Tokenizer, models
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    prompt = {50257: "endoftext", 50258: "startoftranscript", 50259: "en", 50262: "es", 50359: "transcribe"}
    words = {i: f"<|{prompt.get(i, i)}|>" for i in range(51865)} | {50363: "<|notimestamps|>"}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, "<|endoftext|>"))
    torch.manual_seed(3)
    sizes = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 2))}
    config = WhisperConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, init_std=0.3, **sizes)
    return teachers.Whisper(WhisperForConditionalGeneration(config), tokenizer, [], [])


@pytest.mark.parametrize("language, token", [("en", 50259), ("es", 50262)])
def test_whisper_transcribes_in_a_language_as_transformers_does(whisper, language, token):
    multilingual = tiny_multilingual_whisper()
    from transformers import GenerationConfig

    ids = dict(decoder_start_token_id=50258, no_timestamps_token_id=50363, eos_token_id=50257, pad_token_id=50257)
    ids |= dict(lang_to_id={f"<|{language}|>": token}, task_to_id={"transcribe": 50359}, is_multilingual=True)
    wav, settings = noise(1, 16000), GenerationConfig(**ids, task="transcribe", language=language, max_new_tokens=24)
    with torch.inference_mode():
        found = multilingual.model.generate(hf_mel(multilingual, wav), generation_config=settings)
    words = multilingual.transcribe([wav], language)[0].split()
    assert words[:4] == ["<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]
    assert words[4:] == [multilingual.tokenizer.id_to_token(i) for i in found[0].tolist()] and len(set(words)) > 5
    for model, unknown in ((whisper, "es"), (multilingual, "tlh")):
        with pytest.raises(ValueError, match=f"has no language '{unknown}': pass a multilingual one"):
            model.transcribe([], unknown)


@pytest.mark.parametrize(
    "files, match",
    [
        ({}, "a folder with nothing in it"),
        ({"a.wav": "", "b.txt": ""}, "a folder with a.wav, b.txt in it"),
        ({"config.json": "{"}, "with config.json in it .*not a valid JSON"),
        ({"config.json": '{"model_type": "hubert"}', "model.safetensors": ""}, r"\(it is a hubert\)"),
        ({"config.json": '{"model_type": "whisper"}'}, "with config.json in it .*no file named"),
        (None, "neither on disk nor on a reachable hub"),
    ],
)
def test_what_is_no_whisper_says_what_is_there_and_what_to_pass(tmp_path, files, match):
    for name, text in (files or {}).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{match}.*: pass the folder or hub name of an openai/whisper") as error:
        demo.load_teacher("whisper", tmp_path if files is not None else tmp_path / "none")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_whisper_is_frozen_and_refuses_what_it_cannot_take(whisper):
    fine = noise(0.1, 16000)
    for bad in (np.zeros(480001, np.float32), np.zeros(0, np.float32), np.zeros((2, 9), np.float32)):
        with pytest.raises(ValueError, match="clip 1"):
            whisper.encode([fine, bad])
    with pytest.raises(ValueError, match="clip 0"):
        whisper.embed([np.full(999, np.nan, np.float32)])
    with pytest.raises(ValueError, match="float"):
        whisper.transcribe([np.zeros(999, np.int16)])
    assert not any(p.requires_grad or p.is_meta for p in whisper.model.parameters()) and not whisper.model.training


@pytest.mark.parametrize("layer", ["", "@1", "@3"])
def test_any_encoder_equals_transformers_on_each_clip(hubert, layer):
    from transformers import AutoModel

    teacher, model = demo.load_encoder(hubert + layer, 1), AutoModel.from_pretrained(hubert).eval()
    assert (teacher.rate, teacher.sample_rate, teacher.dim, teacher.depth) == (50.0, 16000, 32, 3)
    wavs = [noise(2.0, 16000), noise(0.31, 16000, 1), noise(1.2, 16000, 2)]
    for wav, got in zip(wavs, teacher.encode(wavs), strict=True):
        x = (wav.astype(np.float64) - wav.mean(dtype=np.float64)) / np.sqrt(wav.var(dtype=np.float64) + 1e-7)
        with torch.no_grad():
            states = model(torch.from_numpy(x).float()[None], output_hidden_states=True).hidden_states
        assert len(got) == (len(wav) - 80) // 320
        np.testing.assert_allclose(got, states[int(layer[1:] or -1)][0], atol=1e-4)
    np.testing.assert_allclose(teacher.embed(wavs), [x.mean(0) for x in teacher.encode(wavs)], atol=1e-6)
    assert not np.allclose(teacher.embed(wavs), demo.load_encoder(hubert + "@2", 0).embed(wavs), atol=1e-2)
    assert teacher.encode([noise(0.001, 16000)])[0].shape[1] == 32


@pytest.mark.parametrize(
    "source, match", [("@4", "has 3 layers"), ("@0", "nor on a .* hub"), ("/config.json", "HuBERT")]
)
def test_what_is_no_encoder_or_layer_is_one_line(hubert, source, match):
    with pytest.raises(ValueError, match=match) as error:
        demo.load_encoder(hubert + source, 0)
    assert "\n" not in str(error.value)


def test_a_model_that_brings_its_own_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    with pytest.raises(ValueError, match="HuBERT"):
        demo.load_encoder(str(tmp_path), 0)
    assert not (tmp_path / "ran").exists()


def test_ast_gives_the_mean_of_its_bands_at_each_time_of_its_windows(tmp_path):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=16, max_length=128, time_stride=8)
    model, extractor = ASTModel(ASTConfig(num_hidden_layers=2, **sizes)).eval(), ASTFeatureExtractor(max_length=128)
    for part in (model, extractor):
        part.save_pretrained(tmp_path)
    teacher = demo.load_encoder(f"{tmp_path}@1", 1)
    assert (teacher.window, teacher.depth, teacher.dim, teacher.rate) == (20480, 2, 16, 15 / 1.28)
    wavs = [noise(3.0, 16000), noise(0.4, 16000, 1), noise(0.001, 16000, 2)]
    found = teacher.encode(wavs)
    assert [len(x) for x in found] == [15 + 15 + 6, 5, 1]
    with torch.no_grad():
        x = extractor(wavs[0][20480:40960], sampling_rate=16000, return_tensors="pt")
        states = model(**x, output_hidden_states=True).hidden_states[1][0, 2:]  # 12 bands of 15 times each
    np.testing.assert_allclose(found[0][15:30], [states[k::15].mean(0) for k in range(15)], atol=1e-5)
    np.testing.assert_allclose(found[1], teacher.encode(wavs[1:2])[0], atol=1e-6)

    # a network without layers hears each moment alone: two clips that differ from 0.64 s on do so there only
    for part in (ASTModel(ASTConfig(num_hidden_layers=0, **sizes)), extractor):
        part.save_pretrained(tmp_path / "local")
    a, b = wavs[0][:20480], np.where(np.arange(20480) < 10240, wavs[0][:20480], 0).astype(np.float32)
    same = np.isclose(*demo.load_encoder(str(tmp_path / "local"), 1).encode([a, b]), atol=1e-5).all(1)
    assert same.tolist() == [8 * k + 16 <= 62 for k in range(15)]  # whole frames of 16 before it


def test_clap_gives_the_mean_of_its_bands_and_only_its_output(tmp_path):
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=9)
    sound = dict(hidden_size=64, patch_embeds_hidden_size=8, depths=[1] * 4, num_attention_heads=[1, 1, 2, 2])
    model = ClapModel(ClapConfig(text_config=text, audio_config=sound)).eval()
    for part in (model, extractor := ClapFeatureExtractor(truncation="rand_trunc")):
        part.save_pretrained(tmp_path)
    teacher = demo.load_encoder(str(tmp_path), 1)
    assert (teacher.sample_rate, teacher.window, teacher.depth, teacher.dim, teacher.rate) == (
        48000,
        480000,
        0,
        64,
        3.2,
    )
    wavs = [noise(13.0, 48000), noise(0.5, 48000, 1)]
    found = teacher.encode(wavs)
    assert [x.shape for x in found] == [(32 + 10, 64), (2, 64)]
    with torch.no_grad():
        x = extractor(wavs[0][:480000], sampling_rate=48000, return_tensors="pt")
        pooled = model.audio_model(**x).pooler_output[0]
    np.testing.assert_allclose(found[0][:32].mean(0), pooled, atol=1e-5)
    with pytest.raises(ValueError, match="has 0 layers"):
        demo.load_encoder(f"{tmp_path}@1", 1)


def test_mert_is_a_hubert_and_its_own_code_is_not_run(hubert, tmp_path):
    shutil.copytree(hubert, tmp_path / "mert")
    (tmp_path / "mert" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file, own = (
        tmp_path / "mert" / "config.json",
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}},
    )
    settings = json.loads(file.read_text()) | {"model_type": "mert_model", "feature_extractor_cqt": False} | own
    file.write_text(json.dumps(settings))
    wav = [noise(1.0, 16000)]
    teacher, twin = (demo.load_encoder(str(folder), 1) for folder in (tmp_path / "mert", hubert))
    np.testing.assert_array_equal(teacher.encode(wav)[0], twin.encode(wav)[0])
    file.write_text(json.dumps(settings | {"deepnorm": True}))  # layers that HuBERT has not
    with pytest.raises(ValueError, match="HuBERT"):
        demo.load_encoder(str(tmp_path / "mert"), 1)
    assert not (tmp_path / "ran").exists()


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
    """In a batch of several lengths, so whatever padding leaks shows as a difference from the clip alone."""
    beats = demo.load_teacher("beats", beats_file)
    wavs = [noise(0.6, 16000), noise(1.01, 16000, 1), noise(0.4, 16000, 2)]
    for wav, got, codes in zip(wavs, beats.encode(wavs), beats.encode(wavs, codes=True), strict=True):
        expected, expected_codes = beats_by_hand(beats_file, wav)
        assert got.shape == expected.shape == (8 * ((1 + (len(wav) - 400) // 160) // 16), 32)
        np.testing.assert_allclose(got, expected, atol=2e-3)  # float32 logs of float32 powers
        assert (codes == expected_codes).mean() > 0.95 and len(set(codes)) > 1  # near ties may differ
    wavs[1:] = [noise(2.01, 16000, 1), noise(0.4, 16000, 2), noise(0.05, 16000)]
    for wav, got in zip(wavs, beats.encode(wavs), strict=True):
        np.testing.assert_allclose(got, beats.encode([wav])[0], atol=1e-5)
    assert got.shape == (8, 32)  # of a clip below one patch
    np.testing.assert_allclose(beats.fbank(wavs[0]) * 2 * 6.55582 + 15.41663, kaldi_fbank(wavs[0]), atol=2e-3)


def test_beats_encoders_and_fine_tuned_ones_have_no_codes(beats_file, tmp_path):
    """The official files hold more than is used here: a classifier, or the codebook's running sums."""
    stored, wavs = torch.load(beats_file), [noise(1, 16000)]
    whole = demo.load_teacher("beats", beats_file)
    sums = {"quantize.cluster_size": torch.ones(20), "quantize.embedding.initted": torch.ones(1)}
    torch.save(stored | {"model": stored["model"] | sums}, tmp_path / "tokenizer.pt")
    again = demo.load_teacher("beats", tmp_path / "tokenizer.pt")
    np.testing.assert_array_equal(again.encode(wavs, codes=True), whole.encode(wavs, codes=True))
    encoder = {k: v for k, v in stored["model"].items() if "quantize" not in k}
    torch.save(stored | {"model": encoder | {"predictor.bias": torch.ones(9)}}, tmp_path / "encoder.pt")
    beats = demo.load_teacher("beats", tmp_path / "encoder.pt")
    np.testing.assert_array_equal(beats.encode(wavs), whole.encode(wavs))
    with pytest.raises(ValueError, match="no codebook"):
        beats.encode(wavs, codes=True)
    assert not any(p.requires_grad or p.is_meta for p in beats.model.parameters()) and not beats.model.training


def test_other_files_are_not_beats(beats_file, tmp_path):
    stored = torch.load(beats_file)
    del stored["model"]["encoder.layers.1.fc1.bias"]
    torch.save(stored, tmp_path / "incomplete.pt")
    (tmp_path / "text.pt").write_text("no zip")
    (tmp_path / "empty.pt").touch()
    torch.save({"model": {}}, tmp_path / "no_cfg.pt")
    torch.save({"cfg": BEATS_CFG | {"layer_norm_first": True}, "model": {}}, tmp_path / "pre_norm.pt")
    matches = dict.fromkeys(("none", "text", "empty", "incomplete"), "pass the path")
    for name, match in (matches | {"no_cfg": "KeyError", "pre_norm": "post-norm"}).items():
        with pytest.raises(ValueError, match=match) as error:
            demo.load_teacher("beats", tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)


class TorchVGGish(nn.Module):
    """The network as torchvggish builds it, so that its state_dict has the published file's names."""

    def __init__(self):
        super().__init__()
        layers, inputs = [], 1
        for v in [64, "M", 128, "M", 256, 256, "M", 512, 512, "M"]:
            layers += [nn.MaxPool2d(2, 2)] if v == "M" else [nn.Conv2d(inputs, v, 3, padding=1), nn.ReLU()]
            inputs = inputs if v == "M" else v
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 4 * 6, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x).transpose(1, 3).transpose(1, 2).reshape(len(x), -1)
        return self.embeddings[:-1](x)  # frechet-audio-distance drops the last ReLU


def test_vggish_equals_the_plain_network(tmp_path):
    torch.manual_seed(0)
    network, path = TorchVGGish().eval(), str(tmp_path / "vggish.pth")
    torch.save(network.state_dict(), path)
    judge, wavs = demo.load_teacher("vggish", path), [noise(3.1, 16000), noise(0.97, 16000, 1), noise(2.2, 16000, 2)]
    with torch.no_grad():
        for wav, got in zip(wavs, judge.encode(wavs), strict=True):
            mel = expected_log_mel(wav, 0.01)
            if len(mel) < 96:
                mel = np.concatenate([mel, mel])[:96]  # 0.97 s is half a frame short: repeated
            patches = [mel[96 * i : 96 * i + 96] for i in range(len(mel) // 96)]
            expected = network(torch.tensor(np.array(patches), dtype=torch.float32)[:, None])
            assert got.shape == (len(patches), 128) and got.dtype == np.float32
            np.testing.assert_allclose(got, expected, atol=2e-4 * float(expected.abs().max()))
            assert (got < 0).any()  # no last ReLU


def test_missing_vggish_is_one_clear_line(tmp_path, monkeypatch):
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    torch.save({"features.0.weight": print}, tmp_path / "evil.pth")  # pickled code is not run
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("not found")
    for name in ("none", "other", "evil", "empty", "text"):
        with pytest.raises(ValueError, match=f"no VGGish weights .*{name}.pth.*pass --fad_weights") as error:
            demo.load_teacher("vggish", str(tmp_path / f"{name}.pth"))
        assert "\n" not in str(error.value)
    monkeypatch.setattr(teachers, "VGGISH_WEIGHTS", (tmp_path / "none.pth").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="pass --fad_weights"):
        demo.load_teacher("vggish")


def test_batches_cover_every_clip_once_within_the_budget():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 3000, 200)]
    batches = list(teachers.batches(lengths, 6000))
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert all(len(b) * max(lengths[i] for i in b) <= 6000 for b in batches)
    assert [len(b) for b in teachers.batches([50, 50], 10)] == [1, 1]


def test_style_vectors_are_means_of_equal_stretches(rng):
    features = rng.normal(size=(64, 5)).astype(np.float32)
    wanted = features.reshape(16, 4, 5).mean(1)  # a whole number of features in each
    np.testing.assert_allclose(teachers.style_vectors(features), wanted, rtol=1e-5, atol=1e-6)
    ramp = np.arange(40, dtype=np.float32)[:, None]  # 2.5 features a stretch
    np.testing.assert_array_equal(teachers.style_vectors(ramp)[:3, 0], [1.0, 3.0, 6.0])  # 0-2, 2-4, 5-7
    short = teachers.style_vectors(features[:3])
    assert short.shape == (16, 5) and (short[0] == features[0]).all() and (short[-1] == features[2]).all()
