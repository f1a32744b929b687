"""What several test files need: small corpora, a small BEATs, and a prepared folder of random clips, in seconds."""

import itertools
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import audio
import data
from common import sha256, write_json
from prepare import __main__ as preparation
from prepare import demo
from prepare.corpora import Clip
from train import Config


@pytest.fixture
def rng() -> np.random.Generator:
    """Random input, new each run; the seed is printed so that a failure can be repeated."""
    seed = time.time_ns() % 2**32
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def package() -> Callable[[str], Path]:
    """package(role) -> path of the cached .whl or .deb."""
    return cache(demo.fetch)


@pytest.fixture(scope="session")
def speech(package) -> dict[str, np.ndarray]:
    """Three real prompts at 16 kHz by name."""
    names = ("vm-deleted", "queue-callswaiting", "vm-tomakecall")
    found = demo.open_deb(package("asterisk"), rf"/({'|'.join(names)})\.g722$")
    wavs = {Path(path).stem: audio.decode(content, path)[0] for path, content in found.items()}
    return {name: wavs[name] for name in names}


def sound(rng: np.random.Generator, seconds: float, rate: int = 16000) -> np.ndarray:
    n = int(seconds * rate)
    return (0.3 * np.sin(2 * np.pi * rng.uniform(200, 900) * np.arange(n) / rate) + rng.normal(0, 0.02, n)).astype("f4")


def record(path: Path, rng: np.random.Generator, text: str = "", rate: int = 16000, seconds: float = 0.6) -> None:
    """Writes a recording and, where given, its text beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(rng, seconds, rate), rate)
    if text:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


@pytest.fixture
def speech_dir(tmp_path, rng) -> Path:
    """A folder of recordings with a text each, one of them odd."""
    root = tmp_path / "speech"
    for i in range(12):
        record(root / "deep" / f"{i}.flac", rng, f"speaker says {i}")
    record(root / "own.wav", rng, "  Héllo, there!\n")
    (root / "notes.md").write_text("not a recording")
    return root


@pytest.fixture
def audio_dir(tmp_path, rng) -> Path:
    record(tmp_path / "sounds" / "deep" / "dog_bark.WAV", rng, rate=44100)
    record(tmp_path / "sounds" / "rain.ogg", rng, "Rain on a roof", 44100)
    return tmp_path / "sounds"


@pytest.fixture
def librispeech(tmp_path, rng) -> Path:
    """3 speakers of 2 chapters of 2 utterances; one has a text and no recording."""
    root = tmp_path / "LibriSpeech" / "dev-clean"
    for speaker, chapter in itertools.product((19, 26, 103), (1, 2)):
        folder, lines = root / f"{speaker}" / f"{chapter}", []
        for i in range(2):
            record(folder / f"{speaker}-{chapter}-{i:04d}.flac", rng)
            lines.append(f"{speaker}-{chapter}-{i:04d} SPEAKER {speaker} SAYS {chapter} {i}\n")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    (root / "19" / "1" / "19-1-0000.flac").unlink()
    return root.parent


VIDEOS = {"--PJHxphWEs": "/m/09x0r,/t/dd00088", "-0_abcdefgh": "/m/04rlf", "zZ9_-_-_-_x": "/m/0unknown"}


@pytest.fixture
def audioset(tmp_path, rng) -> Path:
    """Two segments CSVs as published, the ontology, and clips named in the ways that downloaders name them."""
    root = tmp_path / "AudioSet"
    for name in ("--PJHxphWEs_30.000", "Y-0_abcdefgh", "notes"):
        record(root / "clips" / f"{name}.wav", rng)
    lines = [f'{v}, 30.000, 40.000, "{labels}"\n' for v, labels in VIDEOS.items()]
    (root / "eval_segments.csv").write_text("# Segments csv created ...\n# num_ytids=2\n" + "".join(lines[:2]))
    (root / "unbalanced_train_segments.csv").write_text(f"# YTID, start_seconds, ...\n{lines[2]}")
    names = {"/m/09x0r": "Speech", "/t/dd00088": "Gush", "/m/04rlf": "Music"}
    (root / "ontology.json").write_text(json.dumps([{"id": i, "name": n, "child_ids": []} for i, n in names.items()]))
    return root


BEATS_CFG = dict(input_patch_size=16, embed_dim=24, conv_pos=8, conv_pos_groups=4, layer_norm_first=False)
BEATS_CFG |= dict(encoder_layers=2, encoder_embed_dim=32, encoder_ffn_embed_dim=48, encoder_attention_heads=4)
BEATS_CFG |= dict(deep_norm=True, relative_position_embedding=True, num_buckets=16, max_distance=40, gru_rel_pos=True)


@pytest.fixture(scope="session")
def beats_file(tmp_path_factory) -> Path:
    """A small BEATs tokenizer of random weights under the official names."""
    torch.manual_seed(1)
    D, E, F_, K = 32, 24, 48, BEATS_CFG["conv_pos"]
    linear = {"post_extract_proj": (D, E), "quantize_layer.0": (D, D), "quantize_layer.2": (12, D)}
    norms, shapes = ["layer_norm", "encoder.layer_norm"], {}
    for l in range(2):
        n = f"encoder.layers.{l}."
        linear |= {f"{n}self_attn.{p}_proj": (D, D) for p in ("q", "k", "v", "out")}
        linear |= {f"{n}self_attn.grep_linear": (8, 8), f"{n}fc1": (F_, D), f"{n}fc2": (D, F_)}
        norms += [f"{n}self_attn_layer_norm", f"{n}final_layer_norm"]
        shapes |= {f"{n}self_attn.grep_a": (1, 4, 1, 1), f"{n}self_attn.relative_attention_bias.weight": (16, 4)}
    shapes |= {"patch_embedding.weight": (E, 1, 16, 16), "quantize.embedding.weight": (20, 12)}
    conv = "encoder.pos_conv.0."
    shapes |= {f"{conv}weight_v": (D, D // 4, K), f"{conv}weight_g": (1, 1, K), f"{conv}bias": (D,)}
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in norms:
        width = E if name == "layer_norm" else D
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    weights = {k: 0.3 * torch.randn(s) + ("norm.weight" in k) for k, s in shapes.items()}
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    path = tmp_path_factory.mktemp("beats") / "beats.pt"
    torch.save({"cfg": BEATS_CFG, "model": weights}, path)
    return path


@pytest.fixture(scope="session")
def hubert(tmp_path_factory) -> str:
    """A folder with a tiny random HuBERT whose first norm is over time, as in the published base models."""
    audio.torchaudio()
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(2)
    sizes = dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, conv_dim=(16,) * 7)
    sizes |= dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    folder = str(tmp_path_factory.mktemp("hubert"))
    for part in (HubertModel(HubertConfig(**sizes)), Wav2Vec2FeatureExtractor(do_normalize=True)):
        part.save_pretrained(folder)
    return folder


TINY = dict(speech_dir="demo", audio_dir="demo", speech_teacher="demo", audio_teacher="demo")
TINY |= dict(speech_tokenizer="whisper_vq", beats_tokens=False, speech_codes=16, audio_codes=16, mel_stats=())
TINY |= dict(device="cpu", dtype="float32")
TINY |= dict(n_layer=4, n_head=2, n_embd=32, ff_mult=2, dropout=0.1, head_dim=16, batch_frames=800, batch_size=4)
TINY |= dict(max_steps=12, phase1_steps=6, probe_every=3, probe_clips=2, probe_times=2, log_every=1, save_every=4)
TINY |= dict(eval_every=6, eval_clips=2, learning_rate=3e-3, evaluate=False)


def same(a, b) -> bool:
    """Bit-equality of nested states."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def write_folder(path: Path, splits: dict[str, list[preparation.Prepared]], meta: dict, size: int = 1000) -> None:
    """A prepared folder with style vectors, by preparation's own writers; `size` clips a shard."""
    path.mkdir()
    names, checksums = [], {}
    for split, clips in splits.items():
        for k in range(0, len(clips), size):
            names.append(f"{split}_{k // size:05d}")
            part, shard = clips[k : k + size], path / names[-1]
            preparation.write_shard(shard, part, [width for _, width in meta["teachers"]], -11.5129)
            np.save(shard / "style.npy", np.array([p.style for p in part], np.float16))
            checksums[f"{shard.name}/style.npy"] = sha256(shard / "style.npy")
    preparation.join(path, names, meta)
    write_json(path / "styles.json", {"sha256": checksums})


@pytest.fixture
def tiny_config(tmp_path) -> Config:
    """A config of a 4-layer model whose data_dir is prepared with random mels, tokens and teacher embeddings."""
    config = Config(**TINY, data_dir=str(tmp_path / "data"), out_dir=str(tmp_path / "run"))
    rng, splits = np.random.default_rng(0), {}
    for split, clips in (("train", 24), ("held_out", 6)):
        splits[split] = []
        for i in range(clips):
            domain, frames = i % 2, int(rng.integers(40, 180))
            clip = Clip(f"clip{i}", b"", f"text {i}", domain, f"group{i}")
            mel = rng.normal(-3, 2, (frames, 100)).astype(np.float16)
            tokens = rng.integers(0, 16, (data.token_count(frames, (50, 25)[domain]), 1))
            wav, embedding = rng.normal(0, 0.1, frames * 256), rng.normal(size=(12, 10)[domain])
            style = rng.normal(size=(16, 10))
            splits[split].append(preparation.Prepared(clip, mel, wav, 24000, True, tokens, embedding, style))
    meta = {"teachers": [["whisper", 12], ["aisfx", 10]], "token_rates": [50, 25], "streams": 1}
    write_folder(tmp_path / "data", splits, meta | {"prepared_with": data.settings_of(config)["prepared_with"]})
    return config
