"""WER, FAD and the held-out loss of a checkpoint, each beside its two references.

    python evaluate.py --ckpt out/demo/ckpt.pt        # table, eval.json, samples/ beside the checkpoint
    python evaluate.py --compare out/table2/*/        # the comparison table over runs and seeds; table.md, .json, .png

Every number stands beside the same number for the original recordings, and for the originals through the same mel and
vocoder: the floor that no model behind this vocoder can pass. Generated clips come from held-out tokens alone. WER:
Whisper transcribes, Whisper's English normaliser and jiwer score, over clips of at least MIN_WORDS words. FAD: against
the original training recordings, under a network that no run is trained with; FAD-inf is its extrapolation to
infinitely many clips, because the FAD of few clips is biased upwards. Every evaluation adds a row to evals.csv.
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
    compare: tuple[str, ...] = ()  # run directories NAME_sSEED to compare; nothing is evaluated anew
    fad_target: float | None = None  # speech FAD whose first reaching is compared; None: that of the run named none
    out: str = ""  # where the comparison's table.md, table.json and table.png go; empty: beside the runs
    worst: int = 0  # list this many of the worst transcriptions
    device: str = "cpu"  # cpu | cuda

    ranges: ClassVar[dict] = dict.fromkeys(("nfe", "max_clips"), (1, None))


if __name__ == "__main__":
    ARGS = configure(EvalArgs, __doc__)  # a typo is answered before torch is imported

import csv
import json
import re
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


def fad_infinity(own: np.ndarray, reference: np.ndarray, seed: int = 0, sizes: int = 10) -> float:
    """FAD extrapolated to n = infinity: the intercept of a line through FAD against 1 / n over random subsets of `own`
    (Chong & Forsyth 2020; Gui et al. 2024). NaN below 20 rows."""
    if len(own) < 20:
        return float("nan")
    rng = np.random.default_rng(seed)
    counts = np.linspace(len(own) // 2, len(own), sizes).astype(int)
    scores = [frechet_distance(own[rng.permutation(len(own))[:n]], reference) for n in counts]
    return float(np.polyfit(1 / counts, scores, 1)[1])


def score_wer(waves: dict[str, list], texts: list[str], ids: list[int], asr: str, device: str) -> dict:
    """WER of each system's clips of at least MIN_WORDS words, and what was heard in the generated ones."""
    recogniser = load_teacher("whisper", fetch.fetch("whisper_tiny") if asr == "demo" else asr, device)
    rows = [k for k, text in enumerate(texts) if len(text.split()) >= MIN_WORDS]
    result = {"asr": asr, "clips": len(rows), "words": sum(len(texts[k].split()) for k in rows)}
    for name in SYSTEMS:
        speech = [soxr.resample(waves[name][k], audio.SAMPLE_RATE, recogniser.sample_rate) for k in rows]
        heard = recogniser.transcribe(speech)
        result[name], each = word_errors([texts[k] for k in rows], heard)
    spoken = zip(rows, heard, each, strict=True)  # the generated ones: last of SYSTEMS
    result["utterances"] = [{"id": ids[k], "text": texts[k], "heard": h, "wer": w} for k, h, w in spoken]
    return result


def score_fad(waves: dict[str, list], reference_waves: list, judge: Teacher) -> dict:
    """FAD of each system's clips against the reference recordings, FAD-inf of the generated ones, and the counts."""
    reference = embeddings(judge, reference_waves)
    own = {name: embeddings(judge, waves[name]) for name in SYSTEMS}
    result = {name: frechet_distance(e, reference) for name, e in own.items()}
    result["generated_infinity"] = fad_infinity(own["generated"], reference)
    counts = {"clips": len(waves["generated"]), "patches": len(own["generated"]), "reference_patches": len(reference)}
    return result | counts


def evaluate(state: dict, args: EvalArgs, out_dir: Path) -> dict:
    """All numbers of one checkpoint, as a dict for eval.json; writes the generated clips to out_dir/samples."""
    run = state["config"]
    model = load_model(state, device=args.device)
    data_dir = args.data_dir or run["data_dir"]
    held, train = Dataset(data_dir, "held_out"), Dataset(data_dir, "train")
    vocoder = audio.load_vocoder(args.vocoder or run["vocoder"], args.device)
    ids, options = first_of_each_domain(held, args.max_clips), settings(args, run)
    domain, start = held.index["domain"][ids], time.time()
    waves = {"generated": resynthesise(model, held, ids, vocoder, options, run["dtype"])}
    spent = time.time() - start
    waves |= {"original": read_waves(held, ids), "vocoded": vocoded(held, ids, vocoder, run["mel_floor"])}
    result = {"step": state["step"], "seconds": state["seconds"], "sampler": options}
    result["vocoder"] = args.vocoder or run["vocoder"]
    result["real_time_factor"] = spent / (sum(map(len, waves["generated"])) / audio.SAMPLE_RATE)
    result["held_out_fm"] = last_held_out(out_dir)
    (out_dir / "samples").mkdir(parents=True, exist_ok=True)
    for i, d, wav in zip(ids.tolist(), domain, waves["generated"], strict=True):
        audio.write(out_dir / "samples" / f"{DOMAINS[d]}_{i:04d}.wav", wav)

    def of_domain(d: int) -> dict[str, list]:
        return {
            name: [w for w, e in zip(all_waves, domain, strict=True) if e == d] for name, all_waves in waves.items()
        }

    speech = ids[domain == SPEECH].tolist()
    texts = [held.name_and_text(i)[1] for i in speech]
    result["wer"] = score_wer(of_domain(SPEECH), texts, speech, args.asr or run["asr"], args.device)
    if run["fad_model"] != "none":
        judge = load_teacher(run["fad_model"], fetch.fetch(run["fad_model"]), args.device)
        result["fad"] = {"model": run["fad_model"]}
        for d, name in enumerate(DOMAINS):
            kept = np.array([i for i in np.flatnonzero(train.index["domain"] == d) if train.wav_path(i).exists()])
            result["fad"][name] = score_fad(of_domain(d), read_waves(train, kept), judge)
    return result


def read_csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def last_held_out(out_dir: Path) -> dict[str, float]:
    """The last held-out losses in log.csv, or nothing."""
    rows = [r for r in read_csv(out_dir / "log.csv") if r["held_out_speech"]]
    return {name: float(rows[-1][f"held_out_{name}"]) for name in DOMAINS} if rows else {}


def record(out_dir: Path, result: dict) -> None:
    """Writes eval.json, and this step's row of evals.csv, the convergence curve of a run."""
    row = {"step": result["step"], "seconds": result["seconds"], "speech_wer": result["wer"]["generated"]}
    row |= {f"{name}_fad": result["fad"][name]["generated"] for name in DOMAINS if "fad" in result}
    rows = [r for r in read_csv(out_dir / "evals.csv") if int(r["step"]) < row["step"]] + [row]
    for name, write in (
        ("eval.json", lambda file: file.write(json.dumps(result, indent=1))),
        ("evals.csv", lambda file: _write_rows(file, rows)),
    ):
        part = out_dir / f".{name}.part"
        with open(part, "w", newline="") as file:
            write(file)
        part.replace(out_dir / name)


def _write_rows(file, rows: list[dict]) -> None:
    writer = csv.DictWriter(file, list(rows[-1]), extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows)


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
            + f"   FAD-inf {f['generated_infinity']:.2f}"
        )
    for name, value in result["held_out_fm"].items():
        lines.append(f"{'held-out FM loss, ' + name:34s}{'':22s}{value:11.4f}")
    lines.append(
        f"real-time factor {result['real_time_factor']:.2f} at nfe {result['sampler']['nfe']}, "
        f"vocoder {result['vocoder']}"
    )
    return "\n".join(lines)


# ---- comparison of runs

COLUMNS = {  # name in table.json: heading, and how many decimals
    "held_out_speech": ("held-out FM, speech", 4),
    "held_out_audio": ("held-out FM, audio", 4),
    "wer": ("speech WER %", 1),
    "speech_fad": ("speech FAD", 2),
    "audio_fad": ("audio FAD", 2),
    "steps_to_target": ("steps to FAD", 0),
    "seconds_to_target": ("seconds to FAD", 0),
}


def read_run(path: Path, fad_target: float | None) -> dict[str, float]:
    """The columns of one evaluated run; what was not measured is not there."""
    result = json.loads((path / "eval.json").read_text())
    row = {f"held_out_{name}": value for name, value in result["held_out_fm"].items()}
    row["wer"] = 100 * result["wer"]["generated"]
    row |= {f"{name}_fad": result["fad"][name]["generated"] for name in DOMAINS if "fad" in result}
    curve = [r for r in read_csv(path / "evals.csv") if r.get("speech_fad")]
    reached = [r for r in curve if fad_target is not None and float(r["speech_fad"]) <= fad_target]
    if reached and len(curve) > 1:  # a single evaluation at the end says nothing about when
        row |= {"steps_to_target": float(reached[0]["step"]), "seconds_to_target": float(reached[0]["seconds"])}
    return row


def compare(paths: list[Path], fad_target: float | None) -> dict[str, dict]:
    """{name: {column: (mean, standard error or None, n)}} over the seeds of each run NAME_sSEED, plus "gain": how much
    lower the speech FAD is than that of the run named none, in percent."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"_s\d+$", "", path.name), []).append(path)
    if fad_target is None and "none" in groups:
        fads = [read_run(p, None).get("speech_fad") for p in groups["none"]]
        fad_target = float(np.mean(fads)) if None not in fads else None
    rows = {}
    for name, members in groups.items():
        runs = [read_run(p, fad_target) for p in members]
        rows[name] = {}
        for column in COLUMNS:
            values = [r[column] for r in runs if column in r]
            if len(values) == len(runs):  # a mean over some of the seeds would compare unlike with like
                error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
                rows[name][column] = (float(np.mean(values)), error, len(values))
    base = rows.get("none", {}).get("speech_fad")
    for row in rows.values():
        if base and "speech_fad" in row:
            row["gain"] = (100 * (1 - row["speech_fad"][0] / base[0]), None, row["speech_fad"][2])
    return rows


def comparison_table(rows: dict[str, dict]) -> str:
    """The comparison as a Markdown table; empty cells were not measured."""
    columns = COLUMNS | {"gain": ("gain %", 1)}
    lines = ["| run | seeds | " + " | ".join(heading for heading, _ in columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, row in rows.items():
        cells = []
        for column, (_, digits) in columns.items():
            mean, error, _ = row.get(column, (None, None, 0))
            shown = "" if mean is None else f"{mean:.{digits}f}"
            cells.append(shown + (f" ± {error:.{digits}f}" if error is not None else ""))
        seeds = max((n for _, _, n in row.values()), default=0)
        lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def convergence_figure(paths: list[Path], out: Path) -> None:
    """Held-out loss and speech FAD against steps, a line a run; written to `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    panels = (("log.csv", "held_out_speech", "held-out FM loss, speech"), ("evals.csv", "speech_fad", "speech FAD"))
    for ax, (file, column, title) in zip(axes, panels, strict=True):
        for path in paths:
            rows = [r for r in read_csv(path / file) if r.get(column)]
            ax.plot(
                [int(r["step"]) for r in rows], [float(r[column]) for r in rows], ".-", label=path.name, linewidth=1
            )
        ax.set(title=title, xlabel="step")
    axes[0].legend(fontsize=7)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def main_compare(args: EvalArgs) -> None:
    paths = [Path(p) for p in args.compare]
    unfinished = [str(p) for p in paths if not (p / "eval.json").exists()]
    if unfinished:
        print(f"not evaluated yet, left out: {', '.join(unfinished)}", file=sys.stderr)
    paths = [p for p in paths if str(p) not in unfinished]
    if not paths:
        raise ValueError("no evaluated run among --compare; run evaluate.py --ckpt RUN/ckpt.pt first")
    rows, out = compare(paths, args.fad_target), Path(args.out or paths[0].parent)
    out.mkdir(parents=True, exist_ok=True)
    text = comparison_table(rows)
    (out / "table.md").write_text(text + "\n")
    (out / "table.json").write_text(json.dumps(rows, indent=1))
    convergence_figure(paths, out / "table.png")
    print(text)
    print(f"wrote {out / 'table.md'}, table.json and table.png")


def main(args: EvalArgs) -> None:
    if args.compare:
        main_compare(args)
        return
    state, used = checkpoint.load(args.ckpt)
    out_dir = used.parent
    result = evaluate(state, args, out_dir)
    record(out_dir, result)
    for u in sorted(result["wer"]["utterances"], key=lambda u: -u["wer"])[: args.worst]:
        print(f"{100 * u['wer']:5.0f} %  said: {u['text']}\n         heard: {u['heard']}")
    print(table(result))
    print(f"wrote {out_dir / 'eval.json'} and {out_dir / 'samples'}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except (checkpoint.CheckpointError, FileNotFoundError, fetch.FetchError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")
