"""WER, FAD and the held-out loss of a checkpoint, each beside its two references.

    python evaluate.py --ckpt out/demo/ckpt.pt            # table, eval.json, samples/, index.html beside the checkpoint
    python evaluate.py --ckpt out/demo/ckpt.pt --lm out/lm_demo/ckpt.pt   # and a column for text -> tokens -> speech
    python evaluate.py --compare out/table2/*/            # the table over runs and seeds; table.md, .json, .png
    python evaluate.py --listening_test out/none out/lasp # a blind listening test, one page; and key.json
    python evaluate.py --mos ratings/*.csv                # its scores and paired t-tests; with --compare, two columns

Every number stands beside the same number for the original recordings, and for the originals through the same mel and
vocoder: the floor that no model behind this vocoder can pass. Generated clips come from held-out tokens alone. WER:
Whisper transcribes, its English normaliser and jiwer score clips of at least MIN_WORDS words. FAD: against the original
training recordings, under a network that taught nobody; that of few clips is biased upwards. Every evaluation adds a
row to evals.csv; eval.json, samples/ and index.html are the latest's.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import Count, configure


@dataclass
class EvalArgs:
    """Settings of `python evaluate.py`; an empty or None value is the one the model was trained with."""

    ckpt: str = "out/demo/ckpt.pt"  # a checkpoint of train.py
    data_dir: str = ""  # prepared data; empty: the one the checkpoint was trained on
    lm: str = ""  # a checkpoint of lm.py: also evaluate text -> tokens -> waveform
    nfe: Count | None = None  # velocity evaluations per clip
    cfg_scale: float | None = None  # guidance scale; 1 is none
    sway: float | None = None  # sway sampling coefficient
    epss: bool = False  # F5-TTS's schedule for few steps, for nfe 5, 6, 7, 10, 12 or 16
    method: Literal["euler", "midpoint"] = "euler"  # integrator; midpoint spends two evaluations a step
    vocoder: str = ""  # hub name or folder of a Vocos, or griffin_lim
    asr: str = ""  # recogniser: hub name or folder of a Whisper; "demo": tiny.en; pocketsphinx, where installed
    fad_model: Literal["", "yamnet", "vggish", "aisfx", "whisper", "none"] = ""  # network under FAD
    fad_weights: str = ""  # its weights, a path; empty: the demo's packages, for vggish a download
    seed: int = 0  # seeds tokens and noise
    max_clips: Count = 200  # most held-out clips per domain
    worst: int = 0  # list this many of the worst transcriptions
    compare: tuple[str, ...] = ()  # run directories NAME_sSEED to compare; nothing is evaluated anew
    fad_target: float | None = None  # speech FAD whose first reaching is compared; None: that of the run named none
    listening_test: tuple[str, ...] = ()  # evaluated run directories to hear side by side
    listening_clips: Count = 10  # clips per domain of a listening test
    mos: tuple[str, ...] = ()  # the listeners' CSV files
    mos_key: str = "out/listening/key.json"  # the key.json written with their listening test
    out: str = ""  # where a comparison or a listening test goes; empty: beside the runs, and out/listening
    device: str = "auto"  # auto | cpu | cuda | mps

    renamed: ClassVar[dict] = {"cfg": "cfg_scale"}


if __name__ == "__main__":
    ARGS = configure(EvalArgs, __doc__)  # a typo is answered before torch is imported

import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import audio
import common
import report
from backbones import load_model
from common import DOMAINS, SPEECH, command, pick_device, read_csv, write_csv, write_json
from data import Dataset, fingerprint, first_of_each_domain
from prepare import demo
from sample import Stage1, from_dataset, settings, synthesise
from teachers import Teacher, checked

MIN_WORDS = 4  # a WER over single words says little


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
    |mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)), where the last trace is the sum of the singular values of X_a X_b^T
    for centred, scaled X with A = X_a^T X_a: no matrix square root, nothing complex, any rank. NaN where one side has
    fewer than two embeddings or one that is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    mean_a, mean_b = a.mean(0), b.mean(0)
    xa, xb = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    distance = ((mean_a - mean_b) ** 2).sum() + (xa**2).sum() + (xb**2).sum()
    if min(len(a), len(b)) > a.shape[1]:
        xa, xb = np.linalg.qr(xa, mode="r"), np.linalg.qr(xb, mode="r")  # the same A and B from fewer rows
    return max(0.0, float(distance - 2 * np.linalg.svd(xa @ xb.T, compute_uv=False).sum()))


def score_wer(waves: dict[str, dict], texts: dict[int, str], recogniser) -> dict:
    """WER of each system's clips of at least MIN_WORDS words, and what was heard in each. `waves`: {system: {a clip's
    row in its split: waveform (L,) at 24 kHz}}; `texts`: {row: what the clip says}."""
    texts = {i: text for i, text in texts.items() if len(text.split()) >= MIN_WORDS}
    result = {"clips": len(texts), "words": sum(len(text.split()) for text in texts.values()), "utterances": {}}
    for system, clips in waves.items():
        speech = [audio.resample(clips[i], audio.SAMPLE_RATE, recogniser.sample_rate) for i in texts]
        heard = recogniser.transcribe(speech)
        result[system], errors = word_errors(list(texts.values()), heard)
        utterances = zip(texts.items(), heard, errors, strict=True)
        result["utterances"][system] = [{"id": i, "text": t, "heard": h, "wer": e} for (i, t), h, e in utterances]
    return result


def score_fad(waves: dict[str, list], judge: Teacher) -> dict:
    """FAD of each system's clips against those of the system "reference", and the counts."""
    patches = {}  # (n, E) of each system, a row a patch
    for system, clips in waves.items():
        found = judge.encode([audio.resample(w, audio.SAMPLE_RATE, judge.sample_rate) for w in clips])
        patches[system] = np.concatenate(found) if found else np.zeros((0, judge.dim))
    reference = patches.pop("reference")
    result = {system: frechet_distance(rows, reference) for system, rows in patches.items()}
    result |= {"clips": len(waves["original"]), "patches": len(patches["original"])}
    return result | {"reference_patches": len(reference)}


class Sphinx:
    """CMU pocketsphinx with the American English model of its package: weak, but it shares nothing with Whisper."""

    sample_rate = 16000

    def __init__(self):
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise ValueError("--asr=pocketsphinx needs that package: pip install pocketsphinx") from None
        self.decoder = Decoder(samprate=self.sample_rate, loglevel="FATAL")

    def transcribe(self, wavs: list[np.ndarray]) -> list[str]:
        """Text of every clip."""
        texts = []
        for wav in checked(wavs):
            self.decoder.start_utt()
            self.decoder.process_raw((wav.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
            self.decoder.end_utt()
            texts.append(getattr(self.decoder.hyp(), "hypstr", ""))
        return texts


def load_recogniser(asr: str, device: str) -> Teacher | Sphinx:
    """What turns speech into words: "demo", a Whisper by hub name or folder, or pocketsphinx."""
    weights = demo.fetch("whisper_tiny") if asr == "demo" else asr
    return Sphinx() if asr == "pocketsphinx" else demo.load_teacher("whisper", weights, device)


def evaluate(state: dict, args: EvalArgs, out_dir: Path) -> tuple[dict, dict]:
    """All numbers of one checkpoint of the run in `out_dir`, as a dict for eval.json, and of every clip
    {"speech_0012": (text, original, generated)}."""
    run, device = state["config"], pick_device(args.device)
    used = {k: getattr(args, k) or run[k] for k in ("data_dir", "vocoder", "asr")}
    held, train = Dataset(used["data_dir"], "held_out"), Dataset(used["data_dir"], "train")
    model, vocoder = load_model(state, device=device), audio.load_vocoder(used["vocoder"], device)
    options = settings(args, run)
    make = partial(synthesise, model, vocoder=vocoder, options=options, dtype=run["dtype"])
    ids = first_of_each_domain(held, args.max_clips)
    domain = {i: int(held.index["domain"][i]) for i in ids.tolist()}  # by the clip's row, as the texts and waves below
    texts = {i: held.name_and_text(i)[1] for i in domain}
    start = time.time()
    generated = make(from_dataset(held, ids))
    spent = time.time() - start
    original = [audio.read(held.wav_path(i), audio.SAMPLE_RATE) for i in domain]
    mels = [torch.from_numpy(held.mel(i).astype(np.float32)).clamp_min(run["mel_floor"]) for i in domain]
    made = {"original": original, "vocoded": [vocoder(mel) for mel in mels], "generated": generated}
    if args.lm:
        stage = Stage1(args.lm, model, device, state["data"])
        made["from text"] = make(stage.requests([(d, texts[i]) for i, d in domain.items()], seed=args.seed))
    waves = {system: dict(zip(domain, clips, strict=True)) for system, clips in made.items()}

    result = used | {"step": state["step"], "seconds": state["seconds"], "sampler": options}
    result["data"], result["held_out_fm"] = fingerprint(held.meta), held_out_at(out_dir, state["step"])
    result["real_time_factor"] = spent / (sum(map(len, generated)) / audio.SAMPLE_RATE)
    recogniser, judge_name = load_recogniser(used["asr"], device), args.fad_model or run["fad_model"]
    result["wer"] = score_wer(waves, {i: texts[i] for i, d in domain.items() if d == SPEECH}, recogniser)
    if judge_name != "none":
        judge = demo.load_judge(judge_name, args.fad_weights, device)
        result["fad"] = {"model": judge_name, "is_teacher": judge_name in dict(state["model_config"]["teachers"])}
        for d, name in enumerate(DOMAINS):
            paths = map(train.wav_path, np.flatnonzero(train.index["domain"] == d).tolist())
            scored = {system: [clips[i] for i in clips if domain[i] == d] for system, clips in waves.items()}
            scored["reference"] = [audio.read(p, audio.SAMPLE_RATE) for p in paths if p.exists()]
            result["fad"][name] = score_fad(scored, judge)
    if args.lm:
        result["lm"] = {"ckpt": args.lm, "step": stage.state["step"]}
    names = [f"{DOMAINS[d]}_{i:04d}" for i, d in domain.items()]
    return result, dict(zip(names, zip(texts.values(), original, generated, strict=True), strict=True))


def held_out_at(out_dir: Path, step: int) -> dict[str, float]:
    """The held-out losses in log.csv at `step`, or the last before it, of the domains that have any."""
    rows = [r for r in read_csv(out_dir / "log.csv") if int(r["step"]) <= step]
    return {name: float(r[f"held_out_{name}"]) for r in rows for name in DOMAINS if r.get(f"held_out_{name}")}


def record(out_dir: Path, result: dict, clips: dict[str, tuple]) -> bool:
    """Writes this step's row of evals.csv, the convergence curve of a run, and for its latest step samples/ and
    eval.json; returns whether it is the latest. Rows past the end of log.csv go: training went back behind them."""
    step, log = result["step"], read_csv(out_dir / "log.csv")
    last = max(step, int(log[-1]["step"])) if log else math.inf
    others = [r for r in read_csv(out_dir / "evals.csv") if int(r["step"]) != step and int(r["step"]) <= last]
    latest = all(int(r["step"]) < step for r in others)
    if latest:
        (out_dir / "samples").mkdir(exist_ok=True)
        for name, (_, _, generated) in clips.items():
            audio.write(out_dir / "samples" / f"{name}.wav", generated)
        write_json(out_dir / "eval.json", result)  # after the samples: runs/*.sh take a run that has it for evaluated
    row = {"step": step, "seconds": result["seconds"], "speech_wer": result["wer"]["generated"]}
    row |= {f"{name}_fad": result["fad"][name]["generated"] if "fad" in result else "" for name in DOMAINS}
    write_csv(out_dir / "evals.csv", list(row), sorted([*others, row], key=lambda r: int(r["step"])))
    return latest


def main_evaluate(args: EvalArgs) -> None:
    """Scores --ckpt, writes what `record` writes and, for the latest step, the run's page; prints the table."""
    state, used = common.load(args.ckpt)
    run = used.parent
    result, clips = evaluate(state, args, run)
    wrote = "eval.json, samples and index.html stay those of a later step"
    if record(run, result, clips):
        report.index_page(run, result, clips)
        wrote = f"wrote {run / 'eval.json'}, {run / 'samples'} and {run / 'index.html'}"
    for system in ("generated", "from text"):
        utterances = result["wer"]["utterances"].get(system, [])
        for u in sorted(utterances, key=lambda u: -u["wer"])[: args.worst]:
            print(f"{100 * u['wer']:5.0f} %  {system}; said: {u['text']}\n         heard: {u['heard']}")
    print(f"{report.score_table(result)}\n{wrote}")


def main_compare(args: EvalArgs, ratings: list[dict]) -> None:
    """Prints the table over the runs of --compare and writes table.md, table.json and table.png."""
    runs = [Path(p) for p in args.compare]
    paths = [p for p in runs if (p / "eval.json").exists()]
    if paths != runs:
        print("not evaluated yet, left out:", *(p for p in runs if p not in paths), file=sys.stderr)
    if not paths:
        raise ValueError("no evaluated run among --compare; run evaluate.py --ckpt RUN/ckpt.pt first")
    rows = report.compare(paths, args.fad_target, report.mean_scores(ratings))
    out, text = Path(args.out or paths[0].parent), report.comparison_table(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    write_json(out / "table.json", rows)
    losses = [(p.name, p / "log.csv", "held_out_speech") for p in paths]
    scores = [(p.name, p / "evals.csv", "speech_fad") for p in paths]
    report.plot(out / "table.png", {"held-out FM loss, speech": losses, "speech FAD": scores})
    print(f"{text}\nwrote {out / 'table.md'}, table.json and table.png")


def main_listening_test(args: EvalArgs) -> None:
    """A page with the same held-out clips of every run, and the recordings themselves as one more system."""
    systems: dict[str, dict] = {}
    for run in map(Path, args.listening_test):
        paths = [p for name in DOMAINS for p in sorted(run.glob(f"samples/{name}_*[0-9].wav"))[: args.listening_clips]]
        systems[run.name] = {path.stem: audio.read(path, audio.SAMPLE_RATE) for path in paths}
    if not any(systems.values()):
        raise ValueError(f"no samples in {args.listening_test[0]}/samples: run evaluate.py --ckpt RUN/ckpt.pt first")
    held = Dataset(args.data_dir or report.read_eval(Path(args.listening_test[0]))["data_dir"], "held_out")
    rows = {clip: int(clip.split("_")[1]) for clip in next(iter(systems.values()))}
    systems["original"] = {clip: audio.read(held.wav_path(i), audio.SAMPLE_RATE) for clip, i in rows.items()}
    out = Path(args.out or "out/listening")
    key = report.listening_test(systems, out, args.seed)
    print(f"{len(key)} clips of {', '.join(systems)}; send {out}/listening.html to listeners, keep {out}/key.json")


def main(args: EvalArgs) -> None:
    ratings = report.read_ratings(args.mos, json.loads(Path(args.mos_key).read_text())) if args.mos else []
    if args.compare:
        main_compare(args, ratings)
    elif args.listening_test:
        main_listening_test(args)
    elif args.mos:
        print(report.mos_table(ratings))
    else:
        main_evaluate(args)


if __name__ == "__main__":
    command(main, ARGS)
