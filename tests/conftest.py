"""What several test files need: a prepared folder of random clips, in seconds, through data.py's own writer."""

import io
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

import data
from prepare import __main__ as preparation
from prepare import corpora
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
    from prepare.demo import fetch

    return cache(fetch)


@pytest.fixture(scope="session")
def speech(package) -> dict[str, np.ndarray]:
    """Three real prompts at 16 kHz by name."""
    import av

    from prepare.demo import open_deb

    files, out = open_deb(package("asterisk")), {}
    for name in ("vm-deleted", "queue-callswaiting", "vm-tomakecall"):
        data = next(data for path, data in files.items() if path.endswith(f"/{name}.g722"))
        with av.open(io.BytesIO(data), format="g722") as file:
            out[name] = np.concatenate([f.to_ndarray().reshape(-1) for f in file.decode(audio=0)]) / np.float32(32768)
    return out


def sound(rng: np.random.Generator, seconds: float, rate: int = 16000) -> np.ndarray:
    n = int(seconds * rate)
    return (0.3 * np.sin(2 * np.pi * rng.uniform(200, 900) * np.arange(n) / rate) + rng.normal(0, 0.02, n)).astype("f4")


@pytest.fixture
def speech_dir(tmp_path, rng) -> Path:
    """A folder of recordings with a text each, one of them odd."""
    root = tmp_path / "speech"
    (root / "deep").mkdir(parents=True)
    for i in range(12):
        soundfile.write(root / "deep" / f"{i}.flac", sound(rng, 0.6), 16000)
        (root / "deep" / f"{i}.txt").write_text(f"speaker says {i}")
    soundfile.write(root / "own.wav", sound(rng, 0.6), 16000)
    (root / "own.txt").write_text("  Héllo, there!\n", encoding="utf-8")
    (root / "notes.md").write_text("not a recording")
    return root


@pytest.fixture
def audio_dir(tmp_path, rng) -> Path:
    root = tmp_path / "sounds"
    (root / "deep").mkdir(parents=True)
    soundfile.write(root / "deep" / "dog_bark.WAV", sound(rng, 0.6, 44100), 44100)
    soundfile.write(root / "rain.ogg", sound(rng, 0.6, 44100), 44100)
    (root / "rain.txt").write_text("Rain on a roof")
    return root


@pytest.fixture
def librispeech(tmp_path, rng) -> Path:
    """3 speakers of 2 chapters of 2 utterances; one has a text and no recording."""
    root = tmp_path / "LibriSpeech" / "dev-clean"
    for speaker in (19, 26, 103):
        for chapter in (1, 2):
            folder = root / f"{speaker}" / f"{chapter}"
            folder.mkdir(parents=True)
            lines = []
            for i in range(2):
                soundfile.write(folder / f"{speaker}-{chapter}-{i:04d}.flac", sound(rng, 0.6), 16000)
                lines.append(f"{speaker}-{chapter}-{i:04d} SPEAKER {speaker} SAYS {chapter} {i}")
            (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
    (root / "19" / "1" / "19-1-0000.flac").unlink()
    return root.parent


VIDEOS = {"--PJHxphWEs": "/m/09x0r,/t/dd00088", "-0_abcdefgh": "/m/04rlf", "zZ9_-_-_-_x": "/m/0unknown"}


@pytest.fixture
def audioset(tmp_path, rng) -> Path:
    """Two segments CSVs as published, the ontology, and clips named in the ways that downloaders name them."""
    root = tmp_path / "AudioSet"
    (root / "clips").mkdir(parents=True)
    lines = [f'{v}, 30.000, 40.000, "{labels}"' for v, labels in VIDEOS.items()]
    (root / "eval_segments.csv").write_text(
        "\n".join(["# Segments csv created ...", "# num_ytids=2", *lines[:2]]) + "\n"
    )
    (root / "unbalanced_train_segments.csv").write_text(f"# YTID, start_seconds, ...\n{lines[2]}\n")
    names = {"/m/09x0r": "Speech", "/t/dd00088": "Gush", "/m/04rlf": "Music"}
    (root / "ontology.json").write_text(json.dumps([{"id": i, "name": n, "child_ids": []} for i, n in names.items()]))
    for name in ("--PJHxphWEs_30.000", "Y-0_abcdefgh", "notes"):
        soundfile.write(root / "clips" / f"{name}.wav", sound(rng, 0.6), 16000)
    return root


BEATS_CFG = {
    "input_patch_size": 16,
    "embed_dim": 24,
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "deep_norm": True,
    "layer_norm_first": False,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "relative_position_embedding": True,
    "num_buckets": 16,
    "max_distance": 40,
    "gru_rel_pos": True,
}


@pytest.fixture(scope="session")
def beats_file(tmp_path_factory) -> Path:
    """A small BEATs tokenizer of random weights under the official names."""
    torch.manual_seed(1)
    D, E, F_, K = 32, 24, 48, BEATS_CFG["conv_pos"]
    shapes = {
        "patch_embedding.weight": (E, 1, 16, 16),
        "layer_norm.weight": (E,),
        "layer_norm.bias": (E,),
        "post_extract_proj.weight": (D, E),
        "post_extract_proj.bias": (D,),
        "encoder.pos_conv.0.weight_v": (D, D // 4, K),
        "encoder.pos_conv.0.weight_g": (1, 1, K),
        "encoder.pos_conv.0.bias": (D,),
        "encoder.layer_norm.weight": (D,),
        "encoder.layer_norm.bias": (D,),
        "quantize_layer.0.weight": (D, D),
        "quantize_layer.0.bias": (D,),
        "quantize_layer.2.weight": (12, D),
        "quantize_layer.2.bias": (12,),
        "quantize.embedding.weight": (20, 12),
    }
    for l in range(2):
        n = f"encoder.layers.{l}."
        for p in "qkv":
            shapes |= {f"{n}self_attn.{p}_proj.weight": (D, D), f"{n}self_attn.{p}_proj.bias": (D,)}
        shapes |= {f"{n}self_attn.out_proj.weight": (D, D), f"{n}self_attn.out_proj.bias": (D,)}
        shapes |= {f"{n}self_attn.grep_linear.weight": (8, 8), f"{n}self_attn.grep_linear.bias": (8,)}
        shapes |= {f"{n}self_attn.grep_a": (1, 4, 1, 1), f"{n}self_attn.relative_attention_bias.weight": (16, 4)}
        shapes |= {f"{n}fc1.weight": (F_, D), f"{n}fc1.bias": (F_,), f"{n}fc2.weight": (D, F_), f"{n}fc2.bias": (D,)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{n}{norm}.weight": (D,), f"{n}{norm}.bias": (D,)}
    weights = {k: 0.3 * torch.randn(s) + ("norm.weight" in k) for k, s in shapes.items()}
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    path = tmp_path_factory.mktemp("beats") / "beats.pt"
    torch.save({"cfg": BEATS_CFG, "model": weights}, path)
    return path


TINY = {
    "speech_dir": "demo",
    "audio_dir": "demo",
    "whisper": "demo",
    "audio_teacher": "demo",
    "speech_tokenizer": "whisper_vq",
    "beats_tokens": False,
    "speech_codes": 16,
    "audio_codes": 16,
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 32,
    "ff_mult": 2,
    "dropout": 0.1,
    "mel_stats": (),
    "batch_frames": 800,
    "batch_size": 4,
    "max_steps": 12,
    "phase1_steps": 6,
    "probe_every": 3,
    "probe_clips": 2,
    "probe_times": 2,
    "log_every": 1,
    "eval_every": 6,
    "eval_clips": 2,
    "save_every": 4,
    "learning_rate": 3e-3,
    "head_dim": 16,
    "device": "cpu",
    "dtype": "float32",
    "evaluate": False,
}


@pytest.fixture
def tiny_config(tmp_path) -> Config:
    """A config of a 4-layer model whose data_dir is prepared with random mels, tokens and teacher embeddings."""
    config = Config(**TINY, data_dir=str(tmp_path / "data"), out_dir=str(tmp_path / "run"))
    rng, path = np.random.default_rng(0), tmp_path / "data"
    path.mkdir()
    meta = {
        "prepared_with": {k: getattr(config, k) for k in data.PREPARED_WITH},
        "teachers": [["whisper", 12], ["aisfx", 10]],
        "token_rates": [50, 25],
        "streams": 1,
    }
    for split, clips in (("train", 24), ("held_out", 6)):
        prepared = []
        for i in range(clips):
            domain, frames = i % 2, int(rng.integers(40, 180))
            clip = corpora.Clip(f"clip{i}", b"", f"text {i}", domain, f"group{i}")
            mel = rng.normal(-3, 2, (frames, 100)).astype(np.float16)
            tokens = rng.integers(0, 16, (data.token_count(frames, (50, 25)[domain]), 1))
            wav, embedding = rng.normal(0, 0.1, frames * 256), rng.normal(size=(12, 10)[domain])
            style = rng.normal(size=(16, 10))
            prepared.append(preparation.Prepared(clip, mel, wav, wav, True, tokens, embedding, style))
        preparation.write_shard(path / f"{split}_00000", prepared, [12, 10], config.mel_floor)
    preparation.join(path, ["train_00000", "held_out_00000"], meta)
    return config
