"""What several test files need: a prepared folder of random clips, in seconds, through data.py's own writer."""

import io
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from configurator import Config


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
    from fetch import fetch

    return cache(fetch)


@pytest.fixture(scope="session")
def speech(package) -> dict[str, np.ndarray]:
    """Three real prompts at 16 kHz by name."""
    import av

    from fetch import open_deb

    files, out = open_deb(package("asterisk")), {}
    for name in ("vm-deleted", "queue-callswaiting", "vm-tomakecall"):
        data = next(data for path, data in files.items() if path.endswith(f"/{name}.g722"))
        with av.open(io.BytesIO(data), format="g722") as file:
            out[name] = np.concatenate([f.to_ndarray().reshape(-1) for f in file.decode(audio=0)]) / np.float32(32768)
    return out


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
    "warmup_steps": 6,
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
        "mel_mean": [-3.0] * 100,
        "mel_std": [2.0] * 100,
    }
    for split, clips in (("train", 24), ("held_out", 6)):
        prepared = []
        for i in range(clips):
            domain, frames = i % 2, int(rng.integers(40, 180))
            clip = data.Clip(f"clip{i}", b"", f"text {i}", domain, f"group{i}")
            mel = rng.normal(-3, 2, (frames, 100)).astype(np.float16)
            tokens = rng.integers(0, 16, data.token_count(frames, domain))
            wav, embedding = rng.normal(0, 0.1, frames * 256), rng.normal(size=(12, 10)[domain])
            prepared.append(data.Prepared(clip, split == "held_out", mel, wav, wav, tokens, embedding))
        meta[split] = data.write_split(path / split, config, prepared, meta["teachers"])
    (path / "meta.json").write_text(json.dumps(meta))
    return config
