"""WER, FAD and the held-out loss of a checkpoint, each beside its two references.

    python evaluate.py --ckpt out/demo/ckpt.pt            # table, eval.json, samples/, index.html beside the checkpoint
    python evaluate.py --ckpt out/demo/ckpt.pt --lm out/lm_demo/ckpt.pt   # and a column for text -> tokens -> speech
    python evaluate.py --compare out/table2/*/            # the table over runs and seeds; table.md, .json, .png
    python evaluate.py --listening_test out/none out/lasp # a blind listening test, one page; and key.json
    python evaluate.py --mos ratings/*.csv                # its scores and paired t-tests; with --compare, two columns

Every number stands beside the same number for the original recordings, and for the originals through the same mel and
vocoder: the floor that no model behind this vocoder can pass. Generated clips come from held-out tokens alone. WER:
Whisper transcribes, its English normaliser and jiwer score clips of at least MIN_WORDS words. FAD and KAD: against the
original training recordings, under a network that taught nobody; FAD of few clips is biased upwards, KAD is not. Each
clip's word errors, mel-cepstral distance and cosine to its original are what --compare takes differences of, paired by
clip and seed, from the run named none. [low high] is a 95 % interval over clips. Every evaluation adds a row to
evals.csv; eval.json, samples/ and index.html are the latest's. C clips, P patches, E dimensions, T frames.
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
    clip_seed: int = 0  # draws them
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

import itertools
import json
import math
import sys
import time
from functools import cache, partial
from importlib import resources
from pathlib import Path

import numpy as np
import scipy.fft
import torch
from scipy.spatial.distance import pdist

import audio
import common
import report
from backbones import load_model
from common import DOMAINS, SPEECH, command, pick_device, read_csv, step_seed, write_csv, write_json
from data import Dataset, fingerprint
from prepare import demo
from sample import Stage1, from_dataset, settings, synthesise
from teachers import Teacher, checked

DRAWS = 400  # bootstrap samples behind an interval
MIN_WORDS = 4  # a WER over single words says little
LARGEST, PATCHES = 2000, 32  # most reference clips of KAD, which costs their square, and most patches of a clip


def held_out_sample(dataset: Dataset, per_domain: int, seed: int) -> np.ndarray:
    """Rows of `per_domain` clips of each domain, in an order by (seed, row) alone: few are of many speakers."""
    order = np.argsort([np.random.default_rng(step_seed(seed, row)).random() for row in range(len(dataset.index))])
    return np.concatenate([order[dataset.index["domain"][order] == d][:per_domain] for d in range(len(DOMAINS))])


@cache
def normaliser():
    """Whisper's English normaliser with its table of spellings; it drops what stands in brackets."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spellings = resources.files("whisper_normalizer") / "normalizers/english.json"
    return EnglishTextNormalizer(json.loads(spellings.read_text(encoding="utf-8")))


def word_errors(references: list[str], hypotheses: list[str]) -> tuple[float, list[float]]:
    """Corpus WER and the WER of each utterance, after Whisper's English normaliser (jiwer). NaN of none."""
    import jiwer

    pairs = [(normaliser()(r), normaliser()(h)) for r, h in zip(references, hypotheses, strict=True)]
    corpus = jiwer.wer([r for r, _ in pairs], [h for _, h in pairs]) if pairs else float("nan")
    return corpus, [jiwer.wer(r, h) for r, h in pairs]


def frechet_terms(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Squared Frechet distance between Gaussians fitted to embeddings (n, E) and (m, E), in float64, as its two terms,
    that of the means and that of the covariances; neither is negative. Their sum is
    |mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)), where the last trace is the sum of the singular values of X_a X_b^T
    for centred, scaled X with A = X_a^T X_a: no matrix square root, nothing complex, any rank. NaN where one side has
    fewer than two embeddings or one that is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan"), float("nan")
    mean_a, mean_b = a.mean(0), b.mean(0)
    xa, xb = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    traces = (xa**2).sum() + (xb**2).sum()
    if min(len(a), len(b)) > a.shape[1]:
        xa, xb = np.linalg.qr(xa, mode="r"), np.linalg.qr(xb, mode="r")  # the same A and B from fewer rows
    covariances = traces - 2 * np.linalg.svd(xa @ xb.T, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum()), max(0.0, float(covariances))


def mean_kernel(x: list, y: list, bandwidth: float, drawn: np.ndarray) -> np.ndarray:
    """Mean of exp(-|u - v|^2 / (2 bandwidth^2)) over patches u, v of two clips of x and y, lists of (P, E), where clips
    of x count as often as a row of `drawn` (n, clips of x) says; float64 (n,). Where y is x, so do its clips, and pairs
    within a clip are left out."""
    rows = np.concatenate(y).astype(np.float64)
    owner, kernel = np.repeat(np.arange(len(y)), [len(c) for c in y]), []
    for u in (c.astype(np.float64) for c in x):
        square = (u**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * u @ rows.T  # (P of this clip, P of all)
        kernel.append(np.bincount(owner, np.exp(square.clip(0) / (-2 * bandwidth**2)).sum(0), len(y)))
    sums, pairs = np.stack(kernel), np.outer([len(c) for c in x], [len(c) for c in y])
    others, two = (drawn, 1 - np.eye(len(x))) if y is x else (np.ones(len(y)), 1)
    total, n = ((drawn @ (values * two) * others).sum(1) for values in (sums, pairs))
    return total / np.where(n > 0, n, np.nan)


def kernel_distances(systems: dict[str, list], reference: list[np.ndarray]) -> dict[str, list[float]]:
    """KAD (arXiv 2502.15602) of each system, lists of (P, E), with its 95 % bootstrap interval over the system's clips:
    [value, low, high]. 100 times the unbiased MMD^2 with a Gaussian kernel of the reference's median patch distance.
    Patches of a clip are alike, so only pairs of two clips count: with a patch a clip this is the paper's, with more it
    is what still averages to 0 over two draws of one distribution. NaN where a side has fewer than two clips."""
    if min(map(len, [reference, *systems.values()])) < 2:
        return {system: [float("nan")] * 3 for system in systems}
    rng, result = np.random.default_rng(0), {}
    reference = [reference[i][:: 1 + len(reference[i]) // PATCHES] for i in rng.permutation(len(reference))[:LARGEST]]
    bandwidth = float(np.median(pdist(rng.permutation(np.concatenate(reference))[:LARGEST])))
    same = mean_kernel(reference, reference, bandwidth, np.ones((1, len(reference))))
    for system, patches in systems.items():
        clips = [c[:: 1 + len(c) // PATCHES] for c in patches]
        drawn = np.concatenate([np.ones((1, len(clips))), common.resampled(len(clips), DRAWS)])
        across = mean_kernel(clips, reference, bandwidth, drawn)
        values = 100 * (mean_kernel(clips, clips, bandwidth, drawn) + same - 2 * across)
        result[system] = [float(values[0]), *report.interval(values[1:])]
    return result


def mel_cepstral_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over frames of the distance in dB between log-mels (T, 100), coefficients 1 to 13 of the DCT, no warping."""
    frames = min(len(a), len(b))  # the last may be a part
    difference = scipy.fft.dct((a[:frames] - b[:frames]).double().numpy(), norm="ortho")[:, 1:14]
    return float(20 / math.log(10) * np.sqrt((difference**2).sum(1) / a.shape[1]).mean())


def score_wer(waves: dict[str, dict], texts: dict[int, str], recogniser) -> dict:
    """WER of each system's clips of at least MIN_WORDS words, its interval and what was heard in each. `waves`:
    {system: {a clip's row in its split: waveform (L,) at 24 kHz}}; `texts`: {row: what the clip says}."""
    counts = {i: len(normaliser()(text).split()) for i, text in texts.items()}
    texts = {i: text for i, text in texts.items() if counts[i] >= MIN_WORDS}
    words = np.array([counts[i] for i in texts], int)
    drawn = common.resampled(len(texts), DRAWS) if texts else np.ones((1, 0))
    result = {"clips": len(texts), "words": int(words.sum()), "interval": {}, "utterances": {}}
    for system, clips in waves.items():
        speech = [audio.resample(clips[i], audio.SAMPLE_RATE, recogniser.sample_rate) for i in texts]
        heard = recogniser.transcribe(speech)
        result[system], errors = word_errors(list(texts.values()), heard)
        result["interval"][system] = report.interval(drawn @ (words * errors) / (drawn @ words)) if texts else ()
        rows = zip(texts.items(), heard, errors, strict=True)
        found = [{"id": i, "text": t, "words": counts[i], "heard": h, "wer": e} for (i, t), h, e in rows]
        result["utterances"][system] = found
    return result


def score_fad(embedded: dict[str, list], reference: list[np.ndarray]) -> dict:
    """FAD, its terms and KAD with its interval of each system's clips, lists of (P, E), and the counts."""
    pooled = {s: np.concatenate(clips or [np.zeros((0, 1))]) for s, clips in (embedded | {"": reference}).items()}
    patches, kad = pooled.pop(""), kernel_distances(embedded, reference)
    terms = {system: frechet_terms(rows, patches) for system, rows in pooled.items()}
    result = {system: sum(pair) for system, pair in terms.items()} | {"terms": terms}
    result |= {"kad": {s: k[0] for s, k in kad.items()}, "kad_interval": {s: k[1:] for s, k in kad.items()}}
    result |= {"clips": len(embedded["original"]), "patches": len(pooled["original"])}
    return result | {"reference_patches": len(patches)}


def score_clips(waves: dict[str, dict], wer: dict, embedded: dict[str, dict], floor: float) -> dict[str, list[dict]]:
    """What --compare pairs, {system: [{"id", "mcd", "cosine", "wer", "words"}]}: the mel-cepstral distance and the
    cosine of the judge's mean embedding to the original's, and the word errors where WER counts the clip."""
    mel = lambda wav: audio.log_mel(torch.from_numpy(wav)).clamp_min(floor)  # noqa: E731
    scores: dict[str, list[dict]] = {system: [] for system in ("vocoded", "generated")}
    for system, (i, original) in itertools.product(scores, waves["original"].items()):
        row = {"id": i, "mcd": mel_cepstral_distance(mel(original), mel(waves[system][i]))}
        if embedded:
            a, b = (embedded[s][i].mean(0) for s in ("original", system))
            row["cosine"] = float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))
        heard = (u for u in wer["utterances"][system] if u["id"] == i)
        scores[system].append(row | {k: u[k] for u in heard for k in ("wer", "words")})
    return scores


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
    ids = held_out_sample(held, args.max_clips, args.clip_seed)
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
    result["clip_seed"] = args.clip_seed
    result["data"], result["held_out_fm"] = fingerprint(held.meta), held_out_at(out_dir, state["step"])
    result["real_time_factor"] = spent / (sum(map(len, generated)) / audio.SAMPLE_RATE)
    recogniser, judge_name = load_recogniser(used["asr"], device), args.fad_model or run["fad_model"]
    result["wer"] = score_wer(waves, {i: texts[i] for i, d in domain.items() if d == SPEECH}, recogniser)
    embedded: dict[str, dict] = {}
    if judge_name != "none":
        judge = demo.load_judge(judge_name, args.fad_weights, device)
        at_rate = partial(audio.resample, rate=audio.SAMPLE_RATE, to=judge.sample_rate)
        hear = lambda clips: judge.encode([at_rate(wav) for wav in clips])  # noqa: E731
        embedded = {s: dict(zip(clips, hear(list(clips.values())), strict=True)) for s, clips in waves.items()}
        result["fad"] = {"model": judge_name, "is_teacher": judge_name in dict(state["model_config"]["teachers"])}
        for d, name in enumerate(DOMAINS):
            scored = {system: [clips[i] for i in clips if domain[i] == d] for system, clips in embedded.items()}
            paths = map(train.wav_path, np.flatnonzero(train.index["domain"] == d).tolist())
            reference = [audio.read(p, audio.SAMPLE_RATE) for p in paths if p.exists()]
            result["fad"][name] = score_fad(scored, hear(reference))
    scores = score_clips(waves, result["wer"], embedded, run["mel_floor"])
    result["clips"] = {s: [{"domain": DOMAINS[domain[row["id"]]]} | row for row in rows] for s, rows in scores.items()}
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
    out, paired = Path(args.out or paths[0].parent), report.differences(paths)
    text = f"{report.comparison_table(rows)}\n\n{report.differences_table(paired)}".rstrip()
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    write_json(out / "table.json", {name: row | {"less_none": paired.get(name, {})} for name, row in rows.items()})
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
