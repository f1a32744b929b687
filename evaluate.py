"""WER, FAD and the held-out loss of a checkpoint, each beside its two references.

    python evaluate.py --ckpt out/demo/ckpt.pt            # table, eval.json, samples/, index.html beside the checkpoint
    python evaluate.py --ckpt out/demo/ckpt.pt --lm out/lm_demo/ckpt.pt   # and a column for text -> tokens -> speech
    python evaluate.py --compare out/table2/*/            # the table over runs and seeds; table.md, .json, .png
    python evaluate.py --listening_test out/none out/lasp # a blind listening test, one page; and key.json
    python evaluate.py --mos ratings/*.csv                # its scores and paired t-tests; with --compare, two columns

Every number stands beside the same number for the original recordings, and for the originals through the same mel and
vocoder: the floor that no model behind this vocoder can pass. Generated clips come from held-out tokens alone. WER:
Whisper transcribes, Whisper's English normaliser and jiwer score, over clips of at least MIN_WORDS words. FAD: against
the original training recordings, under a network that taught nobody; FAD-inf is its extrapolation to infinitely many
of the judge's patches, because the FAD of few is biased upwards. Every evaluation adds a row to evals.csv; eval.json,
samples/ and index.html are those of the run's latest step.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import configure


@dataclass
class EvalArgs:
    """Settings of `python evaluate.py`; an empty or None value is the one the model was trained with."""

    ckpt: str = "out/demo/ckpt.pt"  # a checkpoint of train.py
    data_dir: str = ""  # prepared data; empty: the one the checkpoint was trained on
    lm: str = ""  # a checkpoint of lm.py: also evaluate text -> tokens -> waveform
    nfe: int | None = None  # velocity evaluations per clip
    cfg_scale: float | None = None  # guidance scale; 1 is none
    sway: float | None = None  # sway sampling coefficient
    epss: bool = False  # F5-TTS's schedule for few steps, for nfe 5, 6, 7, 10, 12 or 16
    method: Literal["euler", "midpoint"] = "euler"  # integrator; midpoint spends two evaluations a step
    vocoder: str = ""  # hub name or folder of a Vocos, or griffin_lim
    asr: str = ""  # recogniser: hub name or folder of a Whisper; "demo": tiny.en; pocketsphinx, where installed
    fad_model: Literal["", "yamnet", "vggish", "aisfx", "whisper", "none"] = ""  # network under FAD
    fad_weights: str = ""  # its weights, a path; empty: the demo's packages, for vggish a download
    seed: int = 0  # seeds the noise
    max_clips: int = 200  # most held-out clips per domain
    worst: int = 0  # list this many of the worst transcriptions
    compare: tuple[str, ...] = ()  # run directories NAME_sSEED to compare; nothing is evaluated anew
    fad_target: float | None = None  # speech FAD whose first reaching is compared; None: that of the run named none
    listening_test: tuple[str, ...] = ()  # evaluated run directories to hear side by side
    listening_clips: int = 10  # clips per domain of a listening test
    mos: tuple[str, ...] = ()  # the listeners' CSV files
    mos_key: str = "out/listening/key.json"  # the key.json written with their listening test
    out: str = ""  # where a comparison or a listening test goes; empty: beside the runs, and out/listening
    device: str = "auto"  # auto | cpu | cuda

    ranges: ClassVar[dict] = dict.fromkeys(("nfe", "max_clips", "listening_clips"), (1, None))


if __name__ == "__main__":
    ARGS = configure(EvalArgs, __doc__)  # a typo is answered before torch is imported

import csv
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import soxr
import torch

import audio
import common
import report
from backbones import load_model
from common import DOMAINS, SPEECH, command, pick_device, write_json
from data import Dataset, fingerprint, first_of_each_domain
from lm import Sampling
from prepare import demo
from report import read_csv
from sample import Stage1, from_dataset, settings, synthesise
from teachers import Teacher, checked

MIN_WORDS = 4  # a WER over single words says little
SHOWN = 6  # clips per domain on a run's page
SYSTEMS = ("original", "vocoded", "generated", "from text")  # the last with --lm only
MAX_SECONDS = 12.0  # longest clip made from text
CURVE = ("step", "seconds", "speech_wer", *(f"{name}_fad" for name in DOMAINS))  # columns of evals.csv


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
    X_a X_b^T for centred, scaled X with A = X_a^T X_a: no matrix square root, nothing complex, any rank. NaN where one
    side has fewer than two embeddings or one that is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    mean_a, mean_b = a.mean(0), b.mean(0)
    xa, xb = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    distance = ((mean_a - mean_b) ** 2).sum() + (xa**2).sum() + (xb**2).sum()
    if min(len(a), len(b)) > a.shape[1]:
        xa, xb = np.linalg.qr(xa, mode="r"), np.linalg.qr(xb, mode="r")  # the same A and B from fewer rows
    return max(0.0, float(distance - 2 * np.linalg.svd(xa @ xb.T, compute_uv=False).sum()))


def embeddings(judge: Teacher, waves: list[np.ndarray]) -> np.ndarray:
    """The judge's features of all waves (24 kHz), one row a patch."""
    rows = judge.encode([soxr.resample(w, audio.SAMPLE_RATE, judge.sample_rate) for w in waves])
    return np.concatenate(rows) if rows else np.zeros((0, judge.dim))


def read_waves(dataset: Dataset, ids: np.ndarray) -> list[np.ndarray]:
    """The kept waveforms (L,) of prepared clips, at 24 kHz."""
    return [audio.read(dataset.wav_path(i), audio.SAMPLE_RATE) for i in ids.tolist()]


def vocoded(dataset: Dataset, ids: np.ndarray, vocoder, mel_floor: float) -> list[np.ndarray]:
    """The clips' own mels through the vocoder: what a perfect model would sound like."""
    mels = [torch.from_numpy(dataset.mel(i).astype(np.float32)) for i in ids.tolist()]
    return [vocoder(mel.clamp_min(mel_floor)) for mel in mels]


def fad_infinity(own: np.ndarray, reference: np.ndarray, seed: int = 0, sizes: int = 10) -> float:
    """FAD extrapolated to n = infinity: the intercept of a line through FAD against 1 / n over random subsets of `own`
    (Chong & Forsyth 2020; Gui et al. 2024). NaN below 20 rows."""
    if len(own) < 20:
        return float("nan")
    rng = np.random.default_rng(seed)
    counts = np.linspace(len(own) // 2, len(own), sizes).astype(int)
    scores = [frechet_distance(own[rng.permutation(len(own))[:n]], reference) for n in counts]
    return float(np.polyfit(1 / counts, scores, 1)[1])


def score_wer(waves: dict[str, list], texts: list[str], ids: list[int], recogniser) -> dict:
    """WER of each system's clips of at least MIN_WORDS words, and what was heard in each."""
    rows = [k for k, text in enumerate(texts) if len(text.split()) >= MIN_WORDS]
    result = {"clips": len(rows), "words": sum(len(texts[k].split()) for k in rows), "utterances": {}}
    for name in waves:
        speech = [soxr.resample(waves[name][k], audio.SAMPLE_RATE, recogniser.sample_rate) for k in rows]
        heard = recogniser.transcribe(speech)
        result[name], each = word_errors([texts[k] for k in rows], heard)
        spoken = zip(rows, heard, each, strict=True)
        result["utterances"][name] = [{"id": ids[k], "text": texts[k], "heard": h, "wer": w} for k, h, w in spoken]
    return result


def score_fad(waves: dict[str, list], reference_waves: list, judge: Teacher) -> dict:
    """FAD of each system's clips against the reference recordings, FAD-inf of the generated ones, and the counts."""
    reference = embeddings(judge, reference_waves)
    own = {name: embeddings(judge, own_waves) for name, own_waves in waves.items()}
    result = {name: frechet_distance(e, reference) for name, e in own.items()}
    if "generated" in own:
        result["generated_infinity"] = fad_infinity(own["generated"], reference)
    name = next(iter(waves))
    return result | {"clips": len(waves[name]), "patches": len(own[name]), "reference_patches": len(reference)}


def score(
    waves: dict[str, list], held: Dataset, ids: np.ndarray, train: Dataset, recogniser, judge: Teacher | None
) -> tuple[dict, dict]:
    """score_wer of the speech clips and, with a judge, score_fad of each domain, for every system's waves of held-out
    clips `ids`; FAD is against the training recordings that were kept."""
    domain = held.index["domain"][ids]

    def of_domain(d: int) -> dict[str, list]:
        return {name: [w for w, e in zip(own, domain, strict=True) if e == d] for name, own in waves.items()}

    speech = ids[domain == SPEECH].tolist()
    wer = score_wer(of_domain(SPEECH), [held.name_and_text(i)[1] for i in speech], speech, recogniser)
    fad = {}
    for d, name in enumerate(DOMAINS) if judge else ():
        kept = np.array([i for i in np.flatnonzero(train.index["domain"] == d) if train.wav_path(i).exists()])
        fad[name] = score_fad(of_domain(d), read_waves(train, kept), judge)
    return wer, fad


def evaluate(state: dict, args: EvalArgs, out_dir: Path) -> tuple[dict, dict]:
    """All numbers of one checkpoint of the run in `out_dir`, as a dict for eval.json, and of every clip
    {"speech_0012": (text, original, generated)}."""
    run, device = state["config"], pick_device(args.device)
    model = load_model(state, device=device)
    data_dir = args.data_dir or run["data_dir"]
    held, train = Dataset(data_dir, "held_out"), Dataset(data_dir, "train")
    vocoder = audio.load_vocoder(args.vocoder or run["vocoder"], device)
    ids, options = first_of_each_domain(held, args.max_clips), settings(args, run)
    domain, start = held.index["domain"][ids], time.time()
    generated = synthesise(model, from_dataset(held, ids), vocoder, options, run["dtype"])
    spent = time.time() - start
    waves = {"original": read_waves(held, ids), "vocoded": vocoded(held, ids, vocoder, run["mel_floor"])}
    waves["generated"] = generated
    stage = Stage1(args.lm, model, device, state.get("data", "")) if args.lm else None
    if stage:
        waves["from text"] = from_text(stage, model, held, ids, vocoder, options, run["dtype"])
    result = {"step": state["step"], "seconds": state["seconds"], "sampler": options, "data_dir": data_dir}
    result["data"], result["asr"] = fingerprint(held.meta), args.asr or run["asr"]
    result["vocoder"] = args.vocoder or run["vocoder"]
    result["real_time_factor"] = spent / (sum(map(len, generated)) / audio.SAMPLE_RATE)
    result["held_out_fm"] = held_out_at(out_dir, state["step"])
    recogniser, judge_name = load_recogniser(result["asr"], device), args.fad_model or run["fad_model"]
    judge = None if judge_name == "none" else demo.load_judge(judge_name, args.fad_weights, device)
    result["wer"], fad = score(waves, held, ids, train, recogniser, judge)
    if judge:
        is_teacher = judge_name in dict(state["model_config"]["teachers"])
        result["fad"] = {"model": judge_name, "is_teacher": is_teacher} | fad
    if stage:
        result["lm"] = {"ckpt": args.lm, "step": stage.state["step"]}
        known = with_words(train, result["wer"]["clips"])
        spoken = from_text(stage, model, train, known, vocoder, options, run["dtype"])
        own = [train.name_and_text(i)[1] for i in known.tolist()]
        result["wer_training_texts"] = score_wer({"from text": spoken}, own, known.tolist(), recogniser)
    names = [f"{DOMAINS[d]}_{i:04d}" for i, d in zip(ids.tolist(), domain, strict=True)]
    texts = [held.name_and_text(i)[1] for i in ids.tolist()]
    return result, dict(zip(names, zip(texts, waves["original"], generated, strict=True), strict=True))


def from_text(stage: Stage1, model, dataset: Dataset, ids: np.ndarray, vocoder, options: dict, dtype: str) -> list:
    """Waveforms made from the clips' texts alone, without reference, by both stages."""
    texts = [(int(dataset.index["domain"][i]), dataset.name_and_text(i)[1]) for i in ids.tolist()]
    requests = stage.requests(texts, Sampling(seed=options["seed"]), MAX_SECONDS)
    return synthesise(model, requests, vocoder, options, dtype)


def with_words(dataset: Dataset, n: int) -> np.ndarray:
    """The first n speech clips of at least MIN_WORDS words."""
    speech = np.flatnonzero(dataset.index["domain"] == SPEECH).tolist()
    found = (i for i in speech if len(dataset.name_and_text(i)[1].split()) >= MIN_WORDS)
    return np.array(list(itertools.islice(found, n)), np.int64)


def held_out_at(out_dir: Path, step: int) -> dict[str, float]:
    """The held-out losses in log.csv at `step`, or the last before it, of the domains that have any."""
    found = {}
    for row in read_csv(out_dir / "log.csv"):
        if int(row["step"]) <= step:
            found |= {name: float(row[f"held_out_{name}"]) for name in DOMAINS if row.get(f"held_out_{name}")}
    return found


def other_rows(out_dir: Path, step: int) -> list[dict]:
    """The rows of evals.csv but that of `step`. Rows past the end of log.csv are left out: training went back behind
    them or began anew."""
    log = read_csv(out_dir / "log.csv")
    last = max(step, int(log[-1]["step"])) if log else math.inf
    return [r for r in read_csv(out_dir / "evals.csv") if int(r["step"]) != step and int(r["step"]) <= last]


def is_latest(out_dir: Path, step: int) -> bool:
    """Whether no later step of the run was evaluated: only then may eval.json, samples/ and index.html be replaced."""
    return all(int(r["step"]) < step for r in other_rows(out_dir, step))


def record(out_dir: Path, result: dict) -> None:
    """Writes this step's row of evals.csv, the convergence curve of a run, and for the latest step eval.json."""
    row = {"step": result["step"], "seconds": result["seconds"], "speech_wer": result["wer"]["generated"]}
    row |= {f"{name}_fad": result["fad"][name]["generated"] for name in DOMAINS if "fad" in result}
    rows = sorted([*other_rows(out_dir, row["step"]), row], key=lambda r: int(r["step"]))
    if is_latest(out_dir, row["step"]):
        write_json(out_dir / "eval.json", result)
    part = out_dir / ".evals.csv.part"
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, CURVE, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(out_dir / "evals.csv")


def table(result: dict) -> str:
    """The numbers as text, a column a system."""
    wer, systems = result["wer"], [s for s in SYSTEMS if s in result["wer"]]
    lines = [f"{'':34s}" + "".join(f"{s:>11s}" for s in systems)]
    lines.append(f"{'speech WER %, n ' + str(wer['clips']) + ' (' + str(wer['words']) + ' words)':34s}")
    lines[-1] += "".join(f"{100 * wer[s]:11.1f}" for s in systems)
    if "wer_training_texts" in result:
        known = result["wer_training_texts"]
        lines.append(
            f"{'same of training texts, n ' + str(known['clips']):34s}{'':33s}{100 * known['from text']:11.1f}"
        )
    for name in DOMAINS if "fad" in result else ():
        f = result["fad"][name]
        lines.append(
            f"{name + ' ' + result['fad']['model'] + '-FAD, n ' + str(f['clips']):34s}"
            + "".join(f"{f[s]:11.2f}" for s in systems)
            + f"   FAD-inf {f['generated_infinity']:.2f}"
        )
    for name, value in result["held_out_fm"].items():
        lines.append(f"{'held-out FM loss, ' + name:34s}{'':22s}{value:11.4f}")
    lines.append(
        f"real-time factor {result['real_time_factor']:.2f} at nfe {result['sampler']['nfe']}, "
        f"vocoder {result['vocoder']}, recogniser {result['asr']}"
    )
    if result.get("fad", {}).get("is_teacher"):
        judge = result["fad"]["model"]
        lines.append(f"warning: {judge} taught this run, so FAD under it flatters; --fad_model=yamnet was no teacher")
    return "\n".join(lines)


class Sphinx:
    """CMU pocketsphinx with the American English model of its package: weak, but it shares nothing with Whisper."""

    sample_rate = 16000

    def __init__(self):
        try:
            import pocketsphinx
        except ImportError:
            raise ValueError("--asr=pocketsphinx needs that package: pip install pocketsphinx") from None
        self.decoder = pocketsphinx.Decoder(samprate=self.sample_rate, loglevel="FATAL")

    def transcribe(self, wavs: list[np.ndarray]) -> list[str]:
        """Text of every clip."""
        texts = []
        for wav in checked(wavs):
            self.decoder.start_utt()
            self.decoder.process_raw((wav.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
            self.decoder.end_utt()
            heard = self.decoder.hyp()
            texts.append(heard.hypstr if heard else "")
        return texts


def load_recogniser(asr: str, device: str) -> Teacher | Sphinx:
    """What turns speech into words: "demo", a Whisper by hub name or folder, or pocketsphinx."""
    if asr == "pocketsphinx":
        return Sphinx()
    return demo.load_teacher("whisper", demo.fetch("whisper_tiny") if asr == "demo" else asr, device)


# ---- several runs


def main_compare(args: EvalArgs) -> None:
    """Prints the table over the runs of --compare and writes table.md, table.json and table.png."""
    paths = [Path(p) for p in args.compare]
    unfinished = [str(p) for p in paths if not (p / "eval.json").exists()]
    if unfinished:
        print(f"not evaluated yet, left out: {', '.join(unfinished)}", file=sys.stderr)
    paths = [p for p in paths if str(p) not in unfinished]
    if not paths:
        raise ValueError("no evaluated run among --compare; run evaluate.py --ckpt RUN/ckpt.pt first")
    out = Path(args.out or paths[0].parent)
    rows = report.compare(paths, args.fad_target, report.mean_scores(read_ratings(args)))
    text = report.comparison_table(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    (out / "table.json").write_text(json.dumps(rows, indent=1))
    report.convergence_figure(paths, out / "table.png")
    print(text)
    print(f"wrote {out / 'table.md'}, table.json and table.png")


def main_listening_test(args: EvalArgs) -> None:
    """A page with the same held-out clips of every run, and the recordings themselves as one more system."""
    systems: dict[str, dict] = {}
    for run in map(Path, args.listening_test):
        found = sorted(p for p in (run / "samples").glob("*.wav") if re.fullmatch(r"[a-z]+_\d+", p.stem))
        chosen = [p for d in DOMAINS for p in [p for p in found if p.stem.startswith(d)][: args.listening_clips]]
        systems[run.name] = {p.stem: audio.read(p, audio.SAMPLE_RATE) for p in chosen}
    if not any(systems.values()):
        raise ValueError(f"no samples in {args.listening_test[0]}/samples: run evaluate.py --ckpt RUN/ckpt.pt first")
    held = Dataset(args.data_dir or report.read_eval(Path(args.listening_test[0]))["data_dir"], "held_out")
    first = next(iter(systems.values()))
    rows = {clip: int(clip.split("_")[1]) for clip in first}
    systems["original"] = {clip: audio.read(held.wav_path(i), audio.SAMPLE_RATE) for clip, i in rows.items()}
    out = Path(args.out or "out/listening")
    key = report.listening_test(systems, out, args.seed)
    print(
        f"{len(key)} clips of {', '.join(systems)}; send {out / 'listening.html'} to listeners, keep {out / 'key.json'}"
    )


def read_ratings(args: EvalArgs) -> list[dict]:
    """The ratings in --mos under --mos_key; none without --mos."""
    return (
        report.read_ratings([Path(p) for p in args.mos], json.loads(Path(args.mos_key).read_text())) if args.mos else []
    )


def main_evaluate(args: EvalArgs) -> None:
    state, used = common.load(args.ckpt)
    out_dir = used.parent
    result, clips = evaluate(state, args, out_dir)
    latest, samples = is_latest(out_dir, result["step"]), out_dir / "samples"
    for name, (_, _, generated) in clips.items() if latest else ():
        samples.mkdir(exist_ok=True)
        audio.write(samples / f"{name}.wav", generated)
    record(out_dir, result)
    if latest:
        shown = [name for d in DOMAINS for name in [n for n in clips if n.startswith(d)][:SHOWN]]
        report.index_page(out_dir, table(result), {name: clips[name] for name in shown})
    for name in ("generated", "from text"):
        utterances = result["wer"]["utterances"].get(name, [])
        for u in sorted(utterances, key=lambda u: -u["wer"])[: args.worst]:
            print(f"{100 * u['wer']:5.0f} %  {name}; said: {u['text']}\n         heard: {u['heard']}")
    print(table(result))
    kept = "eval.json, samples and index.html stay those of a later step"
    print(f"wrote {out_dir / 'eval.json'}, {samples} and {out_dir / 'index.html'}" if latest else kept)


def main(args: EvalArgs) -> None:
    if args.compare:
        main_compare(args)
    elif args.listening_test:
        main_listening_test(args)
    elif args.mos:
        print(report.mos_table(read_ratings(args)))
    else:
        main_evaluate(args)


if __name__ == "__main__":
    command(main, ARGS)
