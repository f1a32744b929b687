"""Tokens -> mel -> waveform.

    python sample.py --ckpt out/demo/ckpt.pt --split held_out --n 4          # resynthesise clips from their tokens
    python sample.py --ckpt out/demo/ckpt.pt --nfe 16 --cfg 1.5 --out_dir my/samples

Writes 24 kHz wav files and, beside each, a .json that says how it was made; prints the real-time factor.
B clips, T frames, M mel bins.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import DOMAINS, configure


@dataclass
class SampleArgs:
    """Settings of `python sample.py`; an empty or None value is the one the model was trained with."""

    ckpt: str = "out/demo/ckpt.pt"  # a checkpoint of train.py
    data_dir: str = ""  # prepared data with the tokens; empty: the one the checkpoint was trained on
    split: Literal["train", "held_out"] = "held_out"  # which clips
    n: int = 4  # clips per domain
    nfe: int | None = None  # velocity evaluations per clip
    cfg: float | None = None  # guidance scale; 1 is none
    sway: float | None = None  # sway sampling coefficient
    method: Literal["euler", "midpoint"] = "euler"  # integrator; midpoint spends two evaluations a step
    vocoder: str = ""  # hub name or folder of a Vocos, or griffin_lim
    seed: int = 0  # seeds the noise
    out_dir: str = ""  # empty: samples/ beside the checkpoint
    device: str = "auto"  # auto | cpu | cuda | mps

    ranges: ClassVar[dict] = dict.fromkeys(("n", "nfe"), (1, None))


if __name__ == "__main__":
    ARGS = configure(SampleArgs, __doc__)  # a typo is answered before torch is imported

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import audio
import checkpoint
from model import DiT, load_model, pick_device, precision, sample
from shards import Dataset


def settings(args, run: dict) -> dict:
    """The sampler's settings: the command's where given, else those of the run that trained the model."""
    chosen = {k: run[k] if getattr(args, k) is None else getattr(args, k) for k in ("nfe", "cfg", "sway")}
    return chosen | {"sigma": run["sigma"], "method": args.method, "seed": args.seed}


def resynthesise(
    model: DiT,
    dataset: Dataset,
    ids: np.ndarray,
    vocoder: Callable,
    options: dict,
    dtype: str = "auto",
    batch_frames: int = 4000,
) -> list[np.ndarray]:
    """Waveforms (L,) of clips `ids` from their tokens alone, no reference mel; sorted by length into batches inside."""
    frames = dataset.index["frames"][ids]
    waves: list = [None] * len(ids)
    pending = sorted(range(len(ids)), key=lambda i: int(frames[i]))
    device = next(model.parameters()).device
    while pending:
        size = 1  # the longest clip is last, so padding is bounded by it
        while size < len(pending) and (size + 1) * int(frames[pending[size]]) <= batch_frames:
            size += 1
        group, pending = pending[:size], pending[size:]
        batch = dataset.batch(ids[group]).to(device)
        with torch.inference_mode(), precision(str(device), dtype):
            mel = model.denormalise(sample(model, model.embed_condition(batch), **options))
        for i, m, n in zip(group, mel, batch.frames.tolist(), strict=True):
            waves[i] = vocoder(m[:n].float())
    return waves


def first_of_each_domain(dataset: Dataset, n: int, min_frames: int = 0) -> np.ndarray:
    """Rows of the first n clips of each domain that have at least min_frames."""
    rows = [
        np.flatnonzero((dataset.index["domain"] == d) & (dataset.index["frames"] >= min_frames))
        for d in range(len(DOMAINS))
    ]
    return np.concatenate([r[:n] for r in rows])


def main(args: SampleArgs) -> None:
    state, used = checkpoint.load(args.ckpt)
    run, device = state["config"], pick_device(args.device)
    model = load_model(state, device=device)
    dataset = Dataset(args.data_dir or run["data_dir"], args.split)
    vocoder = audio.load_vocoder(args.vocoder or run["vocoder"], device)
    ids = first_of_each_domain(dataset, args.n)
    options = settings(args, run)
    start = time.time()
    waves = resynthesise(model, dataset, ids, vocoder, options, run["dtype"])
    spent, seconds = time.time() - start, sum(map(len, waves)) / audio.SAMPLE_RATE
    out_dir = Path(args.out_dir or used.parent / "samples")
    out_dir.mkdir(parents=True, exist_ok=True)
    for i, wav in zip(ids.tolist(), waves, strict=True):
        name, text = dataset.name_and_text(i)
        domain = DOMAINS[dataset.index["domain"][i]]
        path = out_dir / f"{domain}_{i:04d}.wav"
        audio.write(path, wav)
        made = {"clip": name, "text": text, "domain": domain, "split": args.split, "step": state["step"], **options}
        path.with_suffix(".json").write_text(json.dumps(made | {"args": asdict(args)}, indent=1))
        print(f"{path}  {len(wav) / audio.SAMPLE_RATE:5.2f} s  {text}")
    print(f"{seconds:.1f} s of audio in {spent:.1f} s: real-time factor {spent / seconds:.2f} at nfe {options['nfe']}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except (checkpoint.CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"sample.py: {error}")
