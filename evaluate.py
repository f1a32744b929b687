"""WER, FAD and the held-out loss of a checkpoint, each beside its two references.

    python evaluate.py --ckpt out/demo/ckpt.pt        # table, eval.json, samples/ beside the checkpoint

Every number stands beside the same number for the original recordings, and for the originals through the same mel and
vocoder: the floor that no model behind this vocoder can pass. Generated clips come from held-out tokens alone. WER:
Whisper transcribes, Whisper's English normaliser and jiwer score, over clips of at least MIN_WORDS words. FAD: against
the original training recordings, under a network that no run is trained with.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import DOMAINS, configure


@dataclass
class EvalArgs:
    """Settings of `python evaluate.py`; an empty or None value is the one the model was trained with."""

    ckpt: str = "out/demo/ckpt.pt"  # a checkpoint of train.py
    data_dir: str = ""  # prepared data; empty: the one the checkpoint was trained on
    nfe: int | None = None  # velocity evaluations per clip
    cfg: float | None = None  # guidance scale; 1 is none
    sway: float | None = None  # sway sampling coefficient
    method: Literal["euler", "midpoint"] = "euler"  # integrator; midpoint spends two evaluations a step
    vocoder: str = ""  # hub name or folder of a Vocos, or griffin_lim
    asr: str = ""  # recogniser: hub name or folder of a Whisper; "demo": tiny.en
    seed: int = 0  # seeds the noise
    max_clips: int = 200  # most held-out clips per domain
    worst: int = 0  # list this many of the worst transcriptions
    device: str = "cpu"  # cpu | cuda

    ranges: ClassVar[dict] = dict.fromkeys(("nfe", "max_clips"), (1, None))


if __name__ == "__main__":
    ARGS = configure(EvalArgs, __doc__)  # a typo is answered before torch is imported

import json
import sys
import time
from pathlib import Path

import numpy as np
import soxr
import torch

import audio
import checkpoint
import fetch
from data import SPEECH, Dataset
from model import load_model
from sample import first_of_each_domain, resynthesise, settings
from teachers import Teacher, load_teacher

MIN_WORDS = 4  # a WER over single words says little
SYSTEMS = ("original", "vocoded", "generated")


def word_errors(references: list[str], hypotheses: list[str]) -> tuple[float, list[float]]:
    """Corpus WER and the WER of each utterance, after Whisper's English normaliser (jiwer). NaN of none."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normal = EnglishTextNormalizer({})
    pairs = [(normal(r), normal(h)) for r, h in zip(references, hypotheses, strict=True)]
    corpus = jiwer.wer([r for r, _ in pairs], [h for _, h in pairs]) if pairs else float("nan")
    return corpus, [jiwer.wer(r, h) for r, h in pairs]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to embeddings (n, E) and (m, E), in float64; never negative.

    |mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)), where the last trace is the sum of the singular values of
    X_a^T X_b for centred, scaled X with A = X_a^T X_a: no matrix square root, nothing complex, any rank. NaN where one
    side has fewer than two embeddings or one that is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    mean_a, mean_b = a.mean(0), b.mean(0)
    xa, xb = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(xa @ xb.T, compute_uv=False).sum()  # singular values of A^(1/2) B^(1/2)
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + (xa**2).sum() + (xb**2).sum() - 2 * cross))


def embeddings(judge: Teacher, waves: list[np.ndarray]) -> np.ndarray:
    """The judge's features of all waves (24 kHz), one row a patch."""
    return np.concatenate(judge.encode([soxr.resample(w, audio.SAMPLE_RATE, judge.sample_rate) for w in waves]))


def read_waves(dataset: Dataset, ids: np.ndarray) -> list[np.ndarray]:
    return [audio.read(dataset.wav_path(i), audio.SAMPLE_RATE) for i in ids.tolist()]


def vocoded(dataset: Dataset, ids: np.ndarray, vocoder, mel_floor: float) -> list[np.ndarray]:
    """The clips' own mels through the vocoder: what a perfect model would sound like."""
    waves = []
    for r in dataset.index[ids]:
        mel = torch.from_numpy(np.asarray(dataset.mel[r["mel"] : r["mel"] + r["frames"]], np.float32))
        waves.append(vocoder(mel.clamp_min(mel_floor)))
    return waves


def evaluate(state: dict, args: EvalArgs, out_dir: Path) -> dict:
    """All numbers of one checkpoint, as a dict for eval.json; writes the generated clips to out_dir/samples."""
    run = state["config"]
    model = load_model(state, device=args.device)
    data_dir = args.data_dir or run["data_dir"]
    held, train = Dataset(data_dir, "held_out"), Dataset(data_dir, "train")
    vocoder = audio.load_vocoder(args.vocoder or run["vocoder"], args.device)
    ids = first_of_each_domain(held, args.max_clips)
    domain = held.index["domain"][ids]
    options = settings(args, run)
    start = time.time()
    waves = {"generated": resynthesise(model, held, ids, vocoder, options, run["dtype"])}
    spent = time.time() - start
    waves["original"] = read_waves(held, ids)
    waves["vocoded"] = vocoded(held, ids, vocoder, run["mel_floor"])
    result = {"step": state["step"], "sampler": options, "vocoder": args.vocoder or run["vocoder"]}
    result["real_time_factor"] = spent / (sum(map(len, waves["generated"])) / audio.SAMPLE_RATE)
    (out_dir / "samples").mkdir(parents=True, exist_ok=True)
    for i, d, wav in zip(ids.tolist(), domain, waves["generated"], strict=True):
        audio.write(out_dir / "samples" / f"{('speech', 'audio')[d]}_{i:04d}.wav", wav)

    source = args.asr or run["asr"]
    recogniser = load_teacher("whisper", fetch.fetch("whisper_tiny") if source == "demo" else source, args.device)
    texts = [held.name_and_text(i)[1] for i in ids.tolist()]
    rows = [k for k, d in enumerate(domain) if d == SPEECH and len(texts[k].split()) >= MIN_WORDS]
    result["wer"] = {"clips": len(rows), "words": sum(len(texts[k].split()) for k in rows), "asr": source}
    for name in SYSTEMS:
        speech = [soxr.resample(waves[name][k], audio.SAMPLE_RATE, recogniser.sample_rate) for k in rows]
        heard = recogniser.transcribe(speech)
        result["wer"][name], each = word_errors([texts[k] for k in rows], heard)
        if name == "generated":
            result["utterances"] = [
                {"id": int(ids[k]), "text": texts[k], "heard": h, "wer": w}
                for k, h, w in zip(rows, heard, each, strict=True)
            ]

    if run["fad_model"] != "none":
        judge = load_teacher(run["fad_model"], fetch.fetch(run["fad_model"]), args.device)
        result["fad"] = {"model": run["fad_model"]}
        for d, name in enumerate(DOMAINS):
            kept = np.array([i for i in np.flatnonzero(train.index["domain"] == d) if train.wav_path(i).exists()])
            reference = embeddings(judge, read_waves(train, kept))
            chosen = [k for k in range(len(ids)) if domain[k] == d]
            own = {s: embeddings(judge, [waves[s][k] for k in chosen]) for s in SYSTEMS}
            result["fad"][name] = {s: frechet_distance(e, reference) for s, e in own.items()}
            result["fad"][name] |= {"clips": len(chosen), "patches": len(own["generated"]), "reference": len(reference)}
    return result


def last_held_out(out_dir: Path) -> dict[str, float]:
    """The last held-out losses in log.csv, or nothing."""
    import csv

    path = out_dir / "log.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["held_out_speech"]]
    return {name: float(rows[-1][f"held_out_{name}"]) for name in DOMAINS} if rows else {}


def table(result: dict) -> str:
    """The numbers as text, a column a system."""
    wer = result["wer"]
    lines = [f"{'':34s}" + "".join(f"{s:>11s}" for s in SYSTEMS)]
    lines.append(f"{'speech WER %, n ' + str(wer['clips']) + ' (' + str(wer['words']) + ' words)':34s}")
    lines[-1] += "".join(f"{100 * wer[s]:11.1f}" for s in SYSTEMS)
    for name in DOMAINS if "fad" in result else ():
        f = result["fad"][name]
        lines.append(
            f"{name + ' ' + result['fad']['model'] + '-FAD, n ' + str(f['clips']):34s}"
            + "".join(f"{f[s]:11.2f}" for s in SYSTEMS)
        )
    for name, value in result["held_out_fm"].items():
        lines.append(f"{'held-out FM loss, ' + name:34s}{'':22s}{value:11.4f}")
    lines.append(
        f"real-time factor {result['real_time_factor']:.2f} at nfe {result['sampler']['nfe']}, "
        f"vocoder {result['vocoder']}"
    )
    return "\n".join(lines)


def main(args: EvalArgs) -> None:
    state, used = checkpoint.load(args.ckpt)
    out_dir = used.parent
    result = evaluate(state, args, out_dir)
    result["held_out_fm"] = last_held_out(out_dir)
    part = out_dir / ".eval.json.part"
    part.write_text(json.dumps(result, indent=1))
    part.replace(out_dir / "eval.json")
    for u in sorted(result["utterances"], key=lambda u: -u["wer"])[: args.worst]:
        print(f"{100 * u['wer']:5.0f} %  said: {u['text']}\n         heard: {u['heard']}")
    print(table(result))
    print(f"wrote {out_dir / 'eval.json'} and {out_dir / 'samples'}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except (checkpoint.CheckpointError, FileNotFoundError, fetch.FetchError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")
