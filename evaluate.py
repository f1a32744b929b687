"""WER, FAD, KAD and the held-out loss of a checkpoint, each beside its two references.

    python evaluate.py --ckpt out/demo/ckpt.pt            # table, eval.json, samples/, index.html beside the checkpoint
    python evaluate.py --ckpt out/demo/ckpt.pt --lm out/lm_demo/ckpt.pt   # also text -> tokens -> speech
    python evaluate.py --ckpt out/demo/ckpt.pt --worst=5  # what was heard least well, from eval.json
    python evaluate.py --compare out/table2/*/            # the table over runs and seeds; table.md, .json, .png
    python evaluate.py --listening_test out/none out/lasp # a blind listening test, one page; and key.json
    python evaluate.py --mos ratings/*.csv                # its scores and differences; with --compare, two columns

Every number stands beside that of the original recordings, and of the originals through the same mel and vocoder: the
floor that no model behind this vocoder can pass. Generated clips come from held-out tokens alone. WER: Whisper, its
normaliser and jiwer, of clips of at least MIN_WORDS words. FAD and KAD: against the original training recordings, under
a network that taught nobody; FAD of few clips is biased upwards, KAD is not. [low high] is a 95 % interval over clips.
--compare takes differences of each clip's loss, word errors and SCORES, by clip and seed, from the run named none. Only
an evaluation as the run's own settings say adds to evals.csv and writes eval.json, samples/ and index.html, any other
eval_NAME.json and samples_NAME/. C clips, P patches, E dimensions, T frames.
"""

from dataclasses import dataclass
from typing import Literal

from configurator import Count, Natural, configure, differences
from options import SynthesisArgs


@dataclass
class EvalArgs(SynthesisArgs):
    """Settings of `python evaluate.py`: those of options.py, with --lm also text -> tokens -> waveform, and:"""

    name: str = ""  # of an evaluation unlike the run's own, or of those to compare; empty: by what differs
    eval_seeds: Count | None = None  # noise seeds per clip, from `seed` on
    language: str = ""  # of the speech, as Whisper's code
    asr: str = ""  # recogniser: hub name or folder of a Whisper; "demo": tiny.en
    fad_model: Literal["", "yamnet", "vggish", "aisfx", "whisper", "none"] = ""  # network under FAD
    fad_weights: str = ""  # its weights, a path; empty: the demo's packages, for vggish a download
    max_clips: Count | None = None  # most held-out clips per domain
    clip_seed: Natural = 0  # draws them
    worst: int = 0  # list this many of the worst transcriptions; alone: of what eval.json holds
    compare: tuple[str, ...] = ()  # run directories NAME_sSEED to compare; nothing is evaluated anew
    scores: str = ""  # a CSV file of others' scores to compare as well: columns run, clip (as in samples/), any others
    fad_target: float | None = None  # speech FAD whose first reaching is compared; None: that of the run named none
    listening_test: tuple[str, ...] = ()  # evaluated run directories to hear side by side
    listening_clips: Count = 10  # clips per domain of a listening test
    mos: tuple[str, ...] = ()  # the listeners' CSV files
    mos_key: str = "out/listening/key.json"  # the key.json written with their listening test
    out: str = ""  # where a comparison or a listening test goes; empty: beside the runs, and out/listening


if __name__ == "__main__":
    ARGS = configure(EvalArgs, __doc__)  # a typo is answered before torch is imported

import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from importlib import resources
from pathlib import Path

import numpy as np
import scipy.fft
import torch
from scipy.spatial.distance import pdist

import audio
import common
import probe
import report
from backbones import load_model
from common import DOMAINS, SPEECH, command, precision, step_seed, write_json
from data import Dataset, beginnings, fingerprint
from model import FlowModel
from prepare import demo
from sample import Stage1, from_dataset, open_run, synthesise
from teachers import Teacher

DRAWS, FAD_DRAWS = 400, 100  # bootstrap samples behind an interval; FAD's cost more
MIN_WORDS = 4  # a WER over single words says little
LARGEST, PATCHES = 2000, 32  # most reference clips of KAD, which costs their square, and most patches of a clip
NO_SPACES = {"zh", "ja", "th", "lo", "my", "yue", "km"}  # languages that write none between words
LOSS_CLIPS = 8  # that share a batch for their flow-matching loss


def held_out_sample(dataset: Dataset, per_domain: int, seed: int) -> np.ndarray:
    """Rows of `per_domain` clips of each domain, in an order by (seed, row) alone: few are of many speakers."""
    order = np.argsort([np.random.default_rng(step_seed(seed, row)).random() for row in range(len(dataset.index))])
    return np.concatenate([order[dataset.index["domain"][order] == d][:per_domain] for d in range(len(DOMAINS))])


@cache
def normaliser(language: str = "en"):
    """Whisper's, which drops what stands in brackets: of English with its table of spellings; of languages that write
    no spaces each character becomes a word, so that a word error rate is the character error rate."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language != "en":
        return BasicTextNormalizer(split_letters=language in NO_SPACES)
    spellings = resources.files("whisper_normalizer") / "normalizers/english.json"
    return EnglishTextNormalizer(json.loads(spellings.read_text(encoding="utf-8")))


def word_errors(references: list[str], hypotheses: list[str], language="en", rate="wer") -> tuple[float, list[float]]:
    """Corpus error rate, "wer" or "cer", and that of each utterance, after the normaliser (jiwer). NaN of none."""
    import jiwer

    measure, clean = getattr(jiwer, rate), normaliser(language)
    pairs = [(clean(r), clean(h)) for r, h in zip(references, hypotheses, strict=True)]
    corpus = measure([r for r, _ in pairs], [h for _, h in pairs]) if pairs else float("nan")
    return corpus, [measure(r, h) for r, h in pairs]


def frechet_terms(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Squared Frechet distance between Gaussians fitted to embeddings (n, E) and (m, E), as its two terms, that of the
    means and that of the covariances: |mu_a - mu_b|^2 and Tr(A + B - 2 (A B)^(1/2)), where the last trace is the sum of
    the singular values of X_a X_b^T for centred, scaled X with A = X_a^T X_a: no matrix square root, nothing complex or
    negative, any rank. NaN where one side has fewer than two embeddings or one that is not finite."""
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


def frechet_interval(clips: list[np.ndarray], reference: np.ndarray) -> list[float]:
    """95 % bootstrap interval over clips (P, E) of their Frechet distance from `reference` (m, E). The singular values
    of X_a X_b^T come from its smaller Gram matrix. A sample that repeats clips has less rank and a larger distance
    throughout, so only the spread of the draws is of use."""
    rows, mean_b = np.concatenate(clips).astype(np.float64), reference.mean(0, dtype=np.float64)
    if not np.isfinite(value := sum(frechet_terms(rows, reference))) or len(clips) < 2:
        return [float("nan")] * 2
    xb = (reference - mean_b) / np.sqrt(len(reference) - 1)
    across = rows @ (np.linalg.qr(xb, mode="r") if len(xb) > xb.shape[1] else xb).T  # (patches, rank of b)
    owner, squares, distances = np.repeat(np.arange(len(clips)), [len(c) for c in clips]), (rows**2).sum(1), []
    for counts in common.resampled(len(clips), FAD_DRAWS)[:, owner]:
        w, here = counts[counts > 0], counts > 0
        n, mean = w.sum(), w @ rows[here] / w.sum()
        x = np.sqrt(w / (n - 1))[:, None] * (across[here] - w @ across[here] / n)
        norm = np.sqrt(np.linalg.eigvalsh(x @ x.T if len(x) < x.shape[1] else x.T @ x).clip(0)).sum()
        trace = (w @ squares[here] - n * mean @ mean) / (n - 1)
        distances.append(((mean - mean_b) ** 2).sum() + trace + (xb**2).sum() - 2 * norm)
    return probe.interval((value + np.array(distances) - np.mean(distances)).clip(0))


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
        several = values[np.isfinite(values)]  # without draws of one clip alone
        result[system] = [float(values[0]), *probe.interval(several[1:])]
    return result


@dataclass
class Take:
    """One rendition of a clip as the scores see it; what costs time is computed once, when first asked for."""

    wav: np.ndarray  # (L,) at 24 kHz
    domain: int
    text: str = ""  # what the clip says
    floor: float = -math.inf  # of its log-mel
    judge: Teacher | None = None  # the network under FAD

    @cached_property
    def mel(self) -> torch.Tensor:
        """(T, 100), as the run's own data."""
        return audio.log_mel(torch.from_numpy(self.wav)).clamp_min(self.floor)

    @cached_property
    def patches(self) -> np.ndarray:
        """(P, E) of the judge."""
        return self.judge.encode([audio.resample(self.wav, audio.SAMPLE_RATE, self.judge.sample_rate)])[0]

    @cached_property
    def f0(self) -> np.ndarray:
        """Hz every 10 ms, 0 where unvoiced, by Praat's autocorrelation."""
        import parselmouth

        wav = self.wav[: len(self.wav) // audio.HOP * audio.HOP].astype(np.float64)  # what a vocoder makes of its mel
        sound = parselmouth.Sound(np.pad(wav, (0, max(0, 2400 - len(wav)))), audio.SAMPLE_RATE)
        return sound.to_pitch(0.01, 60, 600).selected_array["frequency"]


Takes = dict[str, dict[int, list[Take]]]  # {system: {a clip's row in its split: a Take for each noise seed}}


def score_wer(takes: Takes, recogniser, language: str = "en") -> dict:
    """WER of each system's speech of at least MIN_WORDS words, its interval and what was heard in each take; and CER of
    other languages than English, but where WER is that already."""
    said = {i: clip[0].text for i, clip in takes["original"].items() if clip[0].domain == SPEECH}
    counts = {i: len(normaliser(language)(text).split()) for i, text in said.items()}
    ids = [i for i in said if counts[i] >= MIN_WORDS]
    words, drawn = np.array([counts[i] for i in ids], int), common.resampled(max(1, len(ids)), DRAWS)
    result = {"clips": len(ids), "words": int(words.sum()), "interval": {}, "utterances": {}, "cer": {}}
    for system, clips in takes.items():
        columns = [k for k, i in enumerate(ids) for _ in clips[i]]  # the clip of each take
        waves = [audio.resample(t.wav, audio.SAMPLE_RATE, recogniser.sample_rate) for i in ids for t in clips[i]]
        heard, texts = recogniser.transcribe(waves, language) if ids else [], [said[ids[k]] for k in columns]
        result[system], errors = word_errors(texts, heard, language)
        if language not in {"en", *NO_SPACES}:
            result["cer"][system] = word_errors(texts, heard, language, "cer")[0]
        weights = drawn[:, columns] * words[columns]  # (draws, takes): those of a clip are drawn together
        result["interval"][system] = probe.interval(weights @ errors / weights.sum(1)) if ids else ()
        about = zip((ids[k] for k in columns), heard, errors, strict=True)
        found = [{"id": i, "text": said[i], "words": counts[i], "heard": h, "wer": e} for i, h, e in about]
        result["utterances"][system] = found
    return result


def score_fad(takes: Takes, train: Dataset, judge: Teacher) -> dict:
    """By domain FAD with its terms and KAD of each system's clips against the training recordings, with intervals."""
    result = {}
    for d in sorted({clip[0].domain for clip in takes["original"].values()}):
        of_d = {s: [clip for clip in clips.values() if clip[0].domain == d] for s, clips in takes.items()}
        heard = {s: [np.concatenate([take.patches for take in clip]) for clip in clips] for s, clips in of_d.items()}
        paths = map(train.wav_path, np.flatnonzero(train.index["domain"] == d).tolist())
        reference = [Take(audio.read(p, audio.SAMPLE_RATE), d, judge=judge).patches for p in paths if p.exists()]
        rows, kad = np.concatenate(reference or [np.zeros((0, 1))]), kernel_distances(heard, reference)
        terms = {s: frechet_terms(np.concatenate(clips), rows) for s, clips in heard.items()}
        found = {s: sum(pair) for s, pair in terms.items()} | {"terms": terms, "clips": len(heard["original"])}
        found |= {"interval": {s: frechet_interval(clips, rows) for s, clips in heard.items()}}
        found |= {"kad": {s: k[0] for s, k in kad.items()}, "kad_interval": {s: k[1:] for s, k in kad.items()}}
        result[DOMAINS[d]] = found
    return result


def mel_cepstral_distance(original: Take, made: Take) -> float:
    """Mean over frames of the distance in dB between log-mels, coefficients 1 to 13 of the DCT, no warping."""
    frames = min(len(original.mel), len(made.mel))  # the last may be a part
    difference = scipy.fft.dct((original.mel[:frames] - made.mel[:frames]).double().numpy(), norm="ortho")[:, 1:14]
    return float(20 / math.log(10) * np.sqrt((difference**2).sum(1) / audio.N_MELS).mean())


def embedding_cosine(original: Take, made: Take) -> float | None:
    """Cosine of the means over the judge's patches; None without a judge."""
    if original.judge is None:
        return None
    a, b = original.patches.mean(0), made.patches.mean(0)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def f0_error(original: Take, made: Take) -> float | None:
    """Root mean square difference of log F0, in cents, over frames voiced in both; None without any, and for sounds."""
    if original.domain != SPEECH:
        return None
    frames = min(len(original.f0), len(made.f0))
    a, b = original.f0[:frames], made.f0[:frames]
    both = (a > 0) & (b > 0)
    return float(1200 * np.sqrt(np.mean(np.log2(b[both] / a[both]) ** 2))) if both.any() else None


# (original Take, generated Take) -> the clip's score, or None; what stands here is printed and compared
SCORES: dict[str, Callable] = {"mcd": mel_cepstral_distance, "f0": f0_error, "cosine": embedding_cosine}


def score_clips(takes: Takes, wer: dict, losses: dict[int, float]) -> dict[str, list[dict]]:
    """What --compare pairs, {system: [{"id", "domain", "fm", "wer", "words", key of SCORES ...}]}, means over a clip's
    takes: SCORES against the original, word errors where WER counts the clip, `losses` of the generating model."""
    scores: dict[str, list[dict]] = {system: [] for system in ("vocoded", "generated")}
    for system, rows in scores.items():
        for i, (original,) in takes["original"].items():
            found = {name: [score(original, take) for take in takes[system][i]] for name, score in SCORES.items()}
            heard = [u for u in wer["utterances"][system] if u["id"] == i]
            found |= {k: [u[k] for u in heard] for k in ("wer", "words")}
            found["fm"] = [losses[i]] if system == "generated" else []
            known = {name: [x for x in values if x is not None] for name, values in found.items()}
            means = {name: float(np.mean(values)) for name, values in known.items() if values}
            rows.append({"id": i, "domain": DOMAINS[original.domain]} | means)
    return scores


def held_out_losses(model: FlowModel, held: Dataset, ids: np.ndarray, frames: int, sigma: float, seeds: Sequence[int]):
    """The flow-matching loss (eq. 23) of the first `frames` frames of clips `ids`, {clip: loss}, a mean over
    EVAL_TIMES points of t and the noise of each of `seeds`, which is the same for every model."""
    losses, device = {}, str(next(model.parameters()).device)
    order = ids[np.argsort(held.index["frames"][ids], kind="stable")]  # clips of like length share a batch
    for k in range(0, len(ids), LOSS_CLIPS):
        part = order[k : k + LOSS_CLIPS]
        batch = beginnings(held, part, frames).to(device)
        draws = (step_seed(seed, k) for seed in seeds)
        found = [probe.at_times(probe.loss_of_clips, model, batch, report.EVAL_TIMES, sigma, seed) for seed in draws]
        losses |= dict(zip(part.tolist(), torch.stack(found).mean((0, 1)).tolist(), strict=True))
    return losses


def evaluate(state: dict, args: EvalArgs, options: dict) -> tuple[dict, Takes]:
    """All numbers of one checkpoint, as a dict for eval.json, and what they are of: of each clip the original and a
    vocoded one, and one for each noise seed that is generated, and where an LM is given from text."""
    run, recogniser, judge, floor = state["config"], None, None, state["config"]["mel_floor"]
    seeds = range(args.seed, args.seed + args.eval_seeds)
    held, train = Dataset(args.data_dir, "held_out"), Dataset(args.data_dir, "train")
    if SPEECH in held.index["domain"]:
        recogniser = demo.load_teacher("whisper", args.asr, args.device)
        recogniser.transcribe([], args.language)  # refuses one that it lacks now, not after minutes of sampling
    if args.fad_model != "none":
        judge = demo.load_teacher(args.fad_model, args.fad_weights, args.device)
    ids = held_out_sample(held, args.max_clips, args.clip_seed)
    texts = [(int(held.index["domain"][i]), held.name_and_text(i)[1]) for i in ids.tolist()]
    model, vocoder = load_model(state, device=args.device), audio.load_vocoder(args.vocoder, args.device)
    say = partial(synthesise, model, vocoder=vocoder, dtype=run["dtype"])
    mels = [torch.from_numpy(held.mel(i).astype(np.float32)).clamp_min(floor) for i in ids.tolist()]
    waves = {"original": [[audio.read(held.wav_path(i), audio.SAMPLE_RATE) for i in ids.tolist()]]}
    waves["vocoded"], start = [[vocoder(mel) for mel in mels]], time.monotonic()
    waves["generated"] = [say(from_dataset(held, ids), options=options | {"seed": seed}) for seed in seeds]
    spent, samples = time.monotonic() - start, sum(len(wav) for made in waves["generated"] for wav in made)
    result = {k: getattr(args, k) for k in ("data_dir", "vocoder", "asr", "language", "clip_seed")}
    result |= {"seeds": args.eval_seeds, "sampler": options, "data": fingerprint(held.meta), "step": state["step"]}
    result |= {"seconds": state["seconds"], "real_time_factor": spent * audio.SAMPLE_RATE / samples}
    if args.lm:
        stage = Stage1(args.lm, model, args.device, state["data"])
        waves["from text"] = [say(stage.requests(texts, seed=seed), options=options | {"seed": seed}) for seed in seeds]
        result["lm"] = {"ckpt": args.lm, "step": stage.state["step"]}
    takes: Takes = {system: {} for system in waves}
    for system, rounds in waves.items():
        for i, (d, text), *made in zip(ids.tolist(), texts, *rounds, strict=True):
            takes[system][i] = [Take(wav, d, text, floor, judge) for wav in made]

    result["wer"] = score_wer(takes, recogniser, args.language)
    if judge:
        taught = args.fad_model in dict(state["model_config"]["teachers"])
        result["fad"] = {"model": args.fad_model, "is_teacher": taught} | score_fad(takes, train, judge)
    with precision(args.device, run["dtype"]):
        losses = held_out_losses(model, held, ids, run["probe_frames"], run["sigma"], seeds)
    return result | {"clips": score_clips(takes, result["wer"], losses)}, takes


def variant(args: EvalArgs, state: dict, result: dict) -> str:
    """The name of an evaluation that is not as the run's own settings ask; empty: it is."""
    own = state["config"] | {"seed": 0}  # a run's seed is that of its training
    aside = {"ckpt", "data_dir", "device", "name", "worst"}
    changed = [f"{k}={v}" for k, v in differences(args).items() if k not in aside and own.get(k) != v]
    changed += [f"data={result['data']}"] if result["data"] != state["data"] else []
    return (args.name or re.sub(r"[^\w.=,-]+", "_", ",".join(changed))[:100]) if changed else ""


def main_evaluate(args: EvalArgs) -> None:
    """Scores --ckpt, or reads its eval.json for --worst alone; writes what belongs to it; prints the table."""
    file = report.eval_file(Path(args.ckpt).parent, args.name)
    if set(differences(args)) - {"ckpt", "name"} == {"worst"} and file.exists():
        result, wrote = report.read_eval(file), f"read {file}"
    else:
        state, run, args, options = open_run(args)
        result, takes = evaluate(state, args, options)
        if name := variant(args, state, result):
            report.write_samples(run / f"samples_{name}", takes)
            write_json(report.eval_file(run, name), result)
            wrote = f"not as the run's settings say: wrote {report.eval_file(run, name)} and samples_{name}/ alone"
        elif report.record(run, result, takes):
            report.index_page(run, result, takes)
            if (run / "tensorboard").is_dir():
                report.show_on_board(run, result["step"], takes)
            write_json(report.eval_file(run), result)  # last: a run that has it is taken for evaluated
            wrote = f"wrote {run / 'eval.json'}, {run / 'samples'} and {run / 'index.html'}"
        else:
            wrote = "eval.json, samples and index.html stay those of a later step"
    for system in ("generated", "from text"):
        utterances = result["wer"]["utterances"].get(system, [])
        for u in sorted(utterances, key=lambda u: -u["wer"])[: args.worst]:
            print(f"{100 * u['wer']:5.0f} %  {system}; said: {u['text']}\n         heard: {u['heard']}")
    print(f"{report.score_table(result)}\n{wrote}")


def main_compare(args: EvalArgs, ratings: list[dict]) -> None:
    """Prints the table over the runs of --compare and writes table.md, table.json and table.png."""
    folders = [p for p in map(Path, args.compare) if report.eval_file(p, args.name).exists()]
    if missing := [p for p in map(Path, args.compare) if p not in folders]:
        print("not evaluated yet, left out:", *missing, file=sys.stderr)
    if not folders:
        raise ValueError("no evaluated run among --compare; run evaluate.py --ckpt RUN/ckpt.pt first")
    groups = report.read_runs(folders, args.name, args.scores)
    rows, paired = report.compare(groups, args.fad_target, ratings), report.differences(groups)
    text = report.comparison_table("run", rows)
    text += "\n\n" + report.comparison_table("less none, paired", paired, True) if paired else ""
    text += "\n\n[95 % interval]: over seeds, of a single one over clips; less none: over both; bold excludes zero"
    text += f"\nread from eval_{args.name}.json of each run" if args.name else ""
    out = Path(args.out or folders[0].parent)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    write_json(out / "table.json", {name: row | {"less_none": paired.get(name, {})} for name, row in rows.items()})
    name = next(d for d in DOMAINS if any(d in column for row in rows.values() for column in row))
    at = {label: Path(run["folder"]) for runs in groups.values() for label, run in runs.items()}
    losses = [(label, folder / "log.csv", f"held_out_{name}") for label, folder in at.items()]
    fads = [(label, folder / "evals.csv", f"{name}_fad") for label, folder in at.items()]
    report.plot(out / "table.png", {f"held-out FM loss, {name}": losses, f"{name} FAD": fads})
    if paired:
        report.plot_differences(out / "less_none.png", paired)
    print(f"{text}\nwrote {out / 'table.md'}, table.json, table.png{' and less_none.png' * bool(paired)}")


def main(args: EvalArgs) -> None:
    """Compares runs, makes a listening test, prints its scores, or evaluates. Raises ValueError as they do."""
    try:
        ratings = report.read_ratings(args.mos, json.loads(Path(args.mos_key).read_text())) if args.mos else []
    except json.JSONDecodeError as error:
        raise ValueError(f"mos_key={args.mos_key} is not the key.json of a listening test: {error}") from error
    if args.compare:
        main_compare(args, ratings)
    elif args.listening_test:
        print(report.listening_test(args.listening_test, args.listening_clips, args.out, args.seed))
    elif args.mos:
        print(report.mos_table(ratings))
    else:
        main_evaluate(args)


if __name__ == "__main__":
    command(main, ARGS)
