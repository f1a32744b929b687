"""What is said of runs: progress and log.csv of training, samples, comparisons, the listening test, a run's page.

train.py's Report is at the end; evaluate.py is the command line of the rest: --compare, --listening_test and --mos.
"""

import base64
import hashlib
import html
import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template

import numpy as np
import scipy.stats
import torch

import audio
import common
import data
import probe
from common import DOMAINS, read_csv, table, write_csv, write_json
from configurator import show

ASSETS = Path(__file__).resolve().parent / "assets"  # the pages' templates
SHOWN = 6  # clips per domain on a run's page
EVAL_TIMES = 5  # points of t of the held-out loss
LOGGED = "step phase loss fm bitc align grad_norm lr frames_per_s seconds held_out_speech held_out_audio".split()
CLIP_SCORES = {  # of a clip in eval.json: heading, scale and decimals; others stand under their own name
    "fm": ("held-out FM x1000", 1000, 2),
    "wer": ("WER %", 100, 1),
    "mcd": ("mel-cepstral distance, dB", 1, 2),
    "f0": ("log-F0 error, cents", 1, 0),
    "cosine": ("cosine to the original", 1, 3),
}
COLUMNS = {  # of a comparison, name in table.json: heading, and how many decimals
    "held_out_speech": ("held-out FM, speech", 4),
    "held_out_audio": ("held-out FM, audio", 4),
    "wer": ("speech WER %", 1),
    "speech_fad": ("speech FAD", 2),
    "audio_fad": ("audio FAD", 2),
    "speech_kad": ("speech KAD", 2),
    "audio_kad": ("audio KAD", 2),
    "speech_mos": ("speech MOS", 2),
    "audio_mos": ("audio MOS", 2),
    "steps_to_target": ("steps to FAD", 0),
    "seconds_to_target": ("seconds to FAD", 0),
}


def clip_name(domain: int, row: int) -> str:
    """What a held-out clip's files are called."""
    return f"{DOMAINS[domain]}_{row:04d}"


def paired_interval(values: np.ndarray, weight: np.ndarray | float = 1.0) -> list[float]:
    """[mean, low, high] of values (S seeds, C clips), NaN where one is missing, weighted by clip (C,), with the 95 %
    interval over both: how the means of seeds and of clips vary, less the noise in both; Student's t with
    Satterthwaite's freedom. (A bootstrap over three seeds calls a fifth of pairs without effect different.) One seed
    says nothing of trainings, and a single value nothing of either: [mean] alone."""
    here = np.isfinite(values)
    s, c, n = here.any(1).sum(), here.any(0).sum(), here.sum()
    weight = here * weight / np.mean(weight * here, where=here)
    mean = float((np.nan_to_num(values) * weight).sum() / n)
    if n == 1:
        return [mean]
    free = np.array([max(1, s - 1), max(1, c - 1)])
    rest = np.nan_to_num(weight * (values - mean))  # a ratio's, linearised
    of_seed, of_clip = rest.sum(1), rest.sum(0)
    parts = np.array([(of_seed**2).sum() * s, (of_clip**2).sum() * c]) / n**2 / free
    left = here * (rest - (of_seed / here.sum(1).clip(1))[:, None] - of_clip / here.sum(0).clip(1))
    variance = max(*parts, parts.sum() - (left**2).sum() / free.prod() / n)
    freedom = variance**2 / (parts**2 / free).sum() if variance else 1
    half = float(scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return [mean, mean - half, mean + half]


def eval_file(run: Path, name: str = "") -> Path:
    """Where an evaluation of a run is: the run's own, or one of another name."""
    return run / (f"eval_{name}.json" if name else "eval.json")


def read_eval(file: Path) -> dict:
    """What eval_file holds. Raises ValueError when it is damaged, or of an older evaluate.py."""
    try:
        result = json.loads(file.read_text())
        whole = isinstance(result, dict) and {"wer", "clips", "seeds", "language"} <= set(result)
        problem = "" if whole else "is of an older evaluate.py, or no evaluation"
    except ValueError as error:
        problem = f"is not JSON ({error})"
    if problem:
        raise ValueError(f"{file} {problem}: run evaluate.py --ckpt {file.parent}/ckpt.pt")
    return result


def is_evaluated(run: Path, step: int) -> bool:
    """Whether a run's own evaluation is of this step."""
    return eval_file(run).exists() and common.optional(lambda: read_eval(eval_file(run)).get("step")) == step


def labelled(folders: Iterable[Path]) -> dict[str, Path]:
    """Runs by the names of their folders, or by the whole path where two share a name."""
    folders = list(folders)
    names = [p.name for p in folders]
    return {str(p) if names.count(p.name) > 1 else p.name: p for p in folders}


def read_runs(folders: Iterable[Path], name: str = "", scores: str = "") -> dict[str, dict]:
    """{label: what eval_file holds, and "folder"}; clips get what the CSV file `scores` says of them under columns run,
    clip and any others. Raises ValueError for a file without such rows, or when two runs were not measured alike."""
    runs = {label: read_eval(eval_file(p, name)) | {"folder": str(p)} for label, p in labelled(folders).items()}
    rows, clips = read_csv(Path(scores)) if scores else [], {}
    for label, run in runs.items():
        clips |= {(label, clip_name(DOMAINS.index(c["domain"]), c["id"])): c for c in run["clips"]["generated"]}
    found = [(clip, row) for row in rows if (clip := clips.get((row.get("run"), row.get("clip"))))]
    if scores and not found:
        raise ValueError(f"scores={scores}: no row of these runs and clips; the columns are run, clip and any scores")
    for clip, row in found:
        clip.update({k: float(v) for k, v in row.items() if k not in ("run", "clip") and v})
    refuse_unlike(runs)
    return runs


def refuse_unlike(runs: dict[str, dict]) -> None:
    """Raises ValueError when two runs were not measured alike; seed, a draw, and sigma, the run's own, may differ."""
    seen: dict[str, tuple] = {}
    for label, result in runs.items():
        used = {k: result[k] for k in ("data", "vocoder", "asr", "language", "seeds", "clip_seed")}
        used |= {"clips": len(result["clips"]["generated"]), "WER clips": result["wer"]["clips"]}
        used |= {k: v for k, v in result["sampler"].items() if k not in ("seed", "sigma")}
        used |= {"fad_model": result["fad"]["model"]} if "fad" in result else {}
        for key, value in used.items():
            other, theirs = seen.setdefault(key, (label, value))
            if value != theirs:
                raise ValueError(f"{label} was evaluated with {key}={value}, {other} with {theirs}: evaluate one again")


def scores_in(rows: Sequence[dict]) -> list[str]:
    """What was measured of clips, those of CLIP_SCORES first."""
    found = {key for row in rows for key in row} - {"id", "domain", "words"}
    return [key for key in CLIP_SCORES if key in found] + sorted(found - set(CLIP_SCORES))


def by_name(runs: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """{name: {seed: run}} of runs labelled NAME_sSEED."""
    groups: dict[str, dict] = {}
    for label, run in runs.items():
        name, seed = re.fullmatch(r"(.*?)((?:_s\d+)?)", label).groups()
        groups.setdefault(name, {})[seed] = run
    return groups


def differences(runs: dict[str, dict]) -> dict[str, dict]:
    """{name: {"speech WER %": paired_interval}} of the runs NAME_sSEED less none_sSEED, over the clips they share."""
    groups, result = by_name(runs), {}
    base = groups.pop("none", {})
    for name, members in groups.items():
        shared = [seed for seed in members if seed in base]
        pairs = [[{c["id"]: c for c in run["clips"]["generated"]} for run in (members[s], base[s])] for s in shared]
        for domain, key in itertools.product(DOMAINS, scores_in(list(pairs[0][0].values())) if pairs else ()):
            heading, scale, _ = CLIP_SCORES.get(key, (key, 1, 3))
            has = ({i for i, c in run.items() if c["domain"] == domain and key in c} for pair in pairs for run in pair)
            ids = sorted(set.intersection(*has))
            words = np.array([pairs[0][0][i]["words"] if key == "wer" else 1 for i in ids])
            if len(ids) > 1:
                d = np.array([[scale * (run[i][key] - none[i][key]) for i in ids] for run, none in pairs])
                result.setdefault(name, {})[f"{domain} {heading}"] = paired_interval(d, words)
    return result


def read_run(result: dict, fad_target: float | None, mos: dict[str, list]) -> dict[str, list[float]]:
    """The columns of one evaluated run, [value] or, with its interval over clips, [value, low, high]; what was not
    measured is not there."""
    wer, clips = result["wer"], result["clips"]["generated"]
    row = {"wer": [100 * value for value in (wer["generated"], *wer["interval"]["generated"])]}
    for name in DOMAINS:
        for key in (key for key in scores_in(clips) if key == "fm" or key not in CLIP_SCORES):
            if found := [c[key] for c in clips if c["domain"] == name and key in c]:
                row[f"held_out_{name}" if key == "fm" else f"{name} {key}"] = paired_interval(np.array([found]))
        if scores := result.get("fad", {}).get(name):
            row[f"{name}_fad"] = [scores["generated"], *scores["interval"]["generated"]]
            row[f"{name}_kad"] = [scores["kad"]["generated"], *scores["kad_interval"]["generated"]]
    row |= {f"{name}_mos": score for name, score in mos.items()}
    curve = [r for r in read_csv(Path(result["folder"]) / "evals.csv") if r.get("speech_fad")]
    reached = [r for r in curve if fad_target is not None and float(r["speech_fad"]) <= fad_target]
    if reached and len(curve) > 1:  # a single evaluation at the end says nothing about when
        row["steps_to_target"] = [float(reached[0]["step"])]
        row["seconds_to_target"] = [float(reached[0]["seconds"])]
    return {k: v for k, v in row.items() if np.isfinite(v[0])}


def compare(runs: dict[str, dict], fad_target: float | None = None, mos: dict | None = None) -> dict[str, dict]:
    """{name: {"seeds": n, column: [mean] or [mean, low, high]}} of the runs NAME_sSEED, with the 95 % interval over the
    seeds, or of a single one over its clips. The default of fad_target is the speech FAD of the run named none; `mos`
    is mean_scores by label. A column that one seed of a run lacks stays empty: a mean over some would be unlike."""
    groups, rows = by_name(runs), {}
    if fad_target is None and "none" in groups:
        fads = [read_run(run, None, {}).get("speech_fad", [np.nan])[0] for run in groups["none"].values()]
        fad_target = np.mean(fads)
    for name, members in groups.items():
        found = [read_run(run, fad_target, (mos or {}).get(name + seed, {})) for seed, run in members.items()]
        shared = [c for c in found[0] if all(c in run for run in found)]
        over_seeds = {c: paired_interval(np.array([[run[c][0]] for run in found])) for c in shared}
        rows[name] = {"seeds": len(found)} | (over_seeds if len(found) > 1 else found[0])
    return rows


def with_interval(values: Sequence[float], form: str) -> str:
    """ "12.0 [10.0 14.0]", or the mean alone."""
    mean, *edges = (f"{value:{form}}" for value in values)
    return f"{mean} [{' '.join(edges)}]" if edges else mean


def comparison_table(rows: dict[str, dict], paired: dict[str, dict]) -> str:
    """compare's rows and the differences as aligned Markdown tables, of the columns that a run has, and a legend."""
    found = dict.fromkeys(c for row in rows.values() for c in row if c != "seeds")
    columns = {c: COLUMNS[c] for c in COLUMNS if c in found} | {c: (c, 3) for c in found if c not in COLUMNS}
    lines = [["run", "seeds", *(heading for heading, _ in columns.values())]]
    for name, row in rows.items():
        cells = (with_interval(row[c], f".{digits}f") if c in row else "" for c, (_, digits) in columns.items())
        lines.append([name, str(row["seeds"]), *cells])
    less = [["less none, paired", *dict.fromkeys(c for row in paired.values() for c in row)]]
    for name, row in paired.items():
        less.append([name])
        for values in (row.get(column) for column in less[0][1:]):
            bold = "**" if values and (values[1] > 0 or values[2] < 0) else ""
            less[-1].append(f"{bold}{with_interval(values, '+.3g')}{bold}" if values else "")
    tables = [table(cells, markdown=True) for cells in (lines, less) if len(cells) > 1]
    legend = "[95 % interval]: over seeds, of a single one over clips; less none: over both; bold excludes zero"
    return "\n\n".join([*tables, legend])


def figure(**options):
    """A figure that opens no window; matplotlib is slow to import."""
    from matplotlib.figure import Figure

    return Figure(**options)


def plot(out: Path, panels: dict[str, list[tuple[str, Path, str]]], phase2: int | None = None) -> None:
    """Writes a picture of panels {title: [(label, CSV file, column)]} against steps, marked where phase II began."""
    from matplotlib import colormaps

    fig = figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for ax, (title, lines) in zip(fig.subplots(1, len(panels)), panels.items(), strict=True):
        ax.set_prop_cycle(color=[colormaps["tab20"](2 * k % 19) for k in range(19)])  # the dark ones first
        for label, file, column in lines:
            rows = [r for r in read_csv(file) if r.get(column)]
            x, y = [int(r["step"]) for r in rows], [float(r[column]) for r in rows]
            ax.plot(x, y, ".-", label=label, linewidth=1, markersize=4)
        if phase2:
            ax.axvline(phase2, color="grey", linestyle=":", label="phase II")
        ax.set(title=title, xlabel="step")
        ax.legend(fontsize=7)
    fig.savefig(out, dpi=100)


def plot_differences(out: Path, paired: dict[str, dict]) -> None:
    """Writes a picture of what each run's held-out FM loss is above that of none, with its interval, by domain."""
    fig = figure(figsize=(9, 1.2 + 0.3 * len(paired)), layout="constrained")
    for ax, domain in zip(fig.subplots(1, len(DOMAINS), sharey=True), DOMAINS, strict=True):
        key = f"{domain} {CLIP_SCORES['fm'][0]}"
        found = {name: row[key] for name, row in paired.items() if len(row.get(key, ())) == 3}
        mean, low, high = np.array(list(found.values())).reshape(-1, 3).T
        ax.errorbar(mean, list(found), xerr=(mean - low, high - mean), fmt="o", capsize=3, markersize=4)
        ax.axvline(0, color="grey", linewidth=1)
        ax.set(title=f"{key} less none", xlabel="worse to the right; 95 % over seeds and clips")
    fig.savefig(out, dpi=100)


def listening_test(folders: Sequence[str], clips: int, out: str = "", seed: int = 0) -> str:
    """Writes out/listening.html, which plays the first `clips` clips a domain of every run's samples, and of the
    originals, under blind names, and out/key.json, {item: {"system", "domain", "clip"}}, which tells them apart and
    stays with whoever runs the test; returns what to do with them. Raises ValueError for a run without samples, and
    unless all have the same clips."""
    systems, out = {}, Path(out or "out/listening")
    for label, run in labelled(map(Path, folders)).items():
        for system, kind in ((label, "generated"), ("original", "original")):
            found = (sorted((run / "samples" / kind).glob(f"{name}_*.wav"))[:clips] for name in DOMAINS)
            systems[system] = {path.stem: audio.read(path, audio.SAMPLE_RATE) for paths in found for path in paths}
        if not systems[label]:
            raise ValueError(f"no clips in {run}/samples/generated: run evaluate.py --ckpt {run}/ckpt.pt first")
    if len({frozenset(waves) for waves in systems.values()}) != 1:
        raise ValueError("the systems of a listening test need the same clips: evaluate all runs on the same data")
    key, items = {}, []
    for system, waves in systems.items():
        for clip, wav in waves.items():
            item = hashlib.sha256(f"{seed}/{system}/{clip}".encode() + wav.tobytes()).hexdigest()[:12]
            key[item] = {"system": system, "domain": clip.split("_")[0], "clip": clip}
            flac = base64.b64encode(audio.encoded(wav, kind="FLAC")).decode()  # smaller than wav and the same sound
            source = f"data:audio/flac;base64,{flac}"
            items.append({"id": item, "kind": key[item]["domain"], "src": source})
    items.sort(key=lambda item: item["id"])  # the file's order says nothing about systems either
    test = hashlib.sha256("".join(key).encode()).hexdigest()[:12]
    page = (ASSETS / "listening.html").read_text(encoding="utf-8").replace("@TEST@", test)
    out.mkdir(parents=True, exist_ok=True)
    (out / "listening.html").write_text(page.replace("@ITEMS@", json.dumps(items)), encoding="utf-8")
    write_json(out / "key.json", key)
    return f"{len(key)} clips of {', '.join(systems)}; send {out}/listening.html to listeners, keep {out}/key.json"


def read_ratings(paths: Sequence[str | Path], key: dict[str, dict]) -> list[dict]:
    """Ratings of the page's CSV files: [{"rater", "system", "domain", "clip", "rating"}]. A rater's later rating of the
    same item replaces an earlier one. Raises ValueError, naming file and line, for anything that is not a rating."""
    ratings = {}
    for path in map(Path, paths):
        rows = read_csv(path)
        if not rows or not {"rater", "item", "rating"} <= set(rows[0]):
            raise ValueError(f"{path}: no ratings; expected the columns rater, item, rating, as listening.html exports")
        for line, row in enumerate(rows, 2):
            rater, item, rating = row["rater"], row["item"], row["rating"]
            if item not in key:
                raise ValueError(f"{path}, line {line}: item {item!r} is not in the key: pass this test's --mos_key")
            if rating not in list("12345"):
                raise ValueError(f"{path}, line {line}: rating {rating!r} is not 1, 2, 3, 4 or 5")
            ratings[rater, item] = key[item] | {"rater": rater, "rating": int(rating)}
    return list(ratings.values())


def by_rater_and_clip(ratings: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    """{(domain, system): (raters, clips) ratings}, NaN where there is none."""
    raters, clips = (list(dict.fromkeys(r[key] for r in ratings)) for key in ("rater", "clip"))
    found: dict = {}
    for r in sorted(ratings, key=lambda r: (DOMAINS.index(r["domain"]), r["system"])):
        matrix = found.setdefault((r["domain"], r["system"]), np.full((len(raters), len(clips)), np.nan))
        matrix[raters.index(r["rater"]), clips.index(r["clip"])] = r["rating"]
    return found


def mean_scores(ratings: list[dict]) -> dict[str, dict[str, list[float]]]:
    """MOS, {system: {domain: [mean, low, high]}}, with its interval over raters and clips: one listener's ratings are
    not independent samples, nor are a clip's."""
    scores: dict = {}
    for (domain, system), matrix in by_rater_and_clip(ratings).items():
        scores.setdefault(system, {})[domain] = paired_interval(matrix)
    return scores


def mos_table(ratings: list[dict]) -> str:
    """MOS per system, and between systems the differences of what the same listener said of the same clip."""
    rows = [["MOS [95 % over raters and clips]", *DOMAINS]]
    for system, scores in sorted(mean_scores(ratings).items()):
        rows.append([system, *(with_interval(scores[d], ".2f") if d in scores else "" for d in DOMAINS)])
    lines = [table(rows)]
    for ((domain, a), x), ((other, b), y) in itertools.combinations(by_rater_and_clip(ratings).items(), 2):
        if domain == other and (shared := np.isfinite(x - y)).sum() > 1:
            counts = f"{shared.any(1).sum()} raters, {shared.any(0).sum()} clips"
            lines.append(f"{domain}: {a} - {b} = {with_interval(paired_interval(x - y), '+.2f')}, {counts}")
    return "\n".join(lines)


def score_table(result: dict) -> str:
    """What eval.json holds of a checkpoint as text, a column a system and the interval of `generated` over clips."""
    wer, fad = result["wer"], result.get("fad", {})
    systems = list(wer["utterances"])
    rows = [["", *systems, "generated, 95 %"]]

    def add(label: str, values: dict, digits: int, scale: float = 1, interval: Sequence[float] = ()) -> None:
        cells = [f"{scale * values[s]:.{digits}f}" if s in values else "" for s in systems]
        between = " ".join(f"{scale * edge:.{digits}f}" for edge in interval)
        rows.append([label, *cells, f"[{between}]" if between else ""])

    label = f"speech WER %, n {wer['clips']} ({wer['words']} words)"
    if wer["clips"]:
        add(label, wer, 1, 100, wer["interval"].get("generated", ()))
    if wer["cer"]:
        add("speech CER %", wer["cer"], 1, 100)
    for name in (name for name in DOMAINS if name in fad):
        scores = fad[name]
        add(f"{name} {fad['model']}-FAD, n {scores['clips']}", scores, 2, 1, scores["interval"]["generated"])
        for k, term in enumerate(("means", "covariances")):
            add(f"  of it the {term}", {s: pair[k] for s, pair in scores["terms"].items()}, 2)
        add(f"{name} {fad['model']}-KAD", scores["kad"], 2, 1, scores["kad_interval"]["generated"])
    for name, key in itertools.product(DOMAINS, scores_in(result["clips"]["generated"])):
        heading, scale, digits = CLIP_SCORES.get(key, (key, 1, 3))
        found = {s: [c[key] for c in rows if c["domain"] == name and key in c] for s, rows in result["clips"].items()}
        spread = {s: paired_interval(np.array([values])) for s, values in found.items() if values}
        if spread and key != "wer":  # whose mean is over words
            means = {s: values[0] for s, values in spread.items()}
            add(f"{name} {heading}", means, digits, scale, spread.get("generated", [])[1:])
    text = f"{table(rows)}\nnoise seeds a clip {result['seeds']}, real-time factor {result['real_time_factor']:.2f} at "
    text += f"nfe {result['sampler']['nfe']}, vocoder {result['vocoder']}, recogniser {result['asr']}, "
    text += f"language {result['language']}"
    if fad.get("is_teacher"):
        text += f"\nwarning: {fad['model']} taught this run, so its FAD flatters; --fad_model=yamnet was no teacher"
    return text


def write_samples(folder: Path, takes: dict[str, dict]) -> None:
    """The first of evaluate.Takes of each clip, generated/NAME.wav and original/NAME.wav, and list.txt of names and
    texts: VERSA takes them with --io=dir as --pred, --gt and --text."""
    for kind in ("generated", "original"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i, (take, *_) in takes[kind].items():
            audio.write(folder / kind / f"{clip_name(take.domain, i)}.wav", take.wav)
    lines = (f"{clip_name(take.domain, i)} {' '.join(take.text.split())}\n" for i, (take,) in takes["original"].items())
    (folder / "list.txt").write_text("".join(lines), encoding="utf-8")


def record(run: Path, result: dict, takes: dict[str, dict]) -> bool:
    """Writes this step's row of evals.csv, the convergence curve of a run, and for its latest step samples/; returns
    whether it is the latest. Rows past the end of log.csv go: training went back behind them."""
    step, log = result["step"], read_csv(run / "log.csv")
    last = max(step, int(log[-1]["step"])) if log else float("inf")
    others = [r for r in read_csv(run / "evals.csv") if int(r["step"]) != step and int(r["step"]) <= last]
    latest = all(int(r["step"]) < step for r in others)
    row = {"step": step, "seconds": result["seconds"], "speech_wer": result["wer"]["generated"]}
    row |= {f"{name}_fad": result.get("fad", {}).get(name, {}).get("generated", "") for name in DOMAINS}
    write_csv(run / "evals.csv", list(row), sorted([*others, row], key=lambda r: int(r["step"])))
    if latest:
        write_samples(run / "samples", takes)
    return latest


def first_clips(clips: dict[int, list], n: int) -> list[int]:
    """The first n clips of each domain of a system of evaluate.Takes."""
    return [i for d in range(len(DOMAINS)) for i in [k for k, (take, *_) in clips.items() if take.domain == d][:n]]


def index_page(run: Path, result: dict, takes: dict[str, dict]) -> None:
    """Writes run/index.html: score_table, the probe figure, loss curves and, with players and mel pictures, SHOWN clips
    a domain of evaluate.Takes, whose sounds are in run/samples already. `result` is what eval.json holds."""
    log = run / "log.csv"
    phase2 = next((int(r["step"]) for r in read_csv(log) if r["phase"] == "2"), None)
    panels = {"flow matching": ("fm", "held_out_speech", "held_out_audio"), "BiT-C": ("bitc",), "alignment": ("align",)}
    plot(run / "curves.png", {title: [(c, log, c) for c in columns] for title, columns in panels.items()}, phase2)
    page = (ASSETS / "run.html").read_text(encoding="utf-8")
    head, picture, middle, row, tail = map(Template, re.split(r"<!-- (?:for each \w+|end) -->\n", page))
    parts = [head.substitute(name=html.escape(run.name), step=result["step"], table=html.escape(score_table(result)))]
    parts += [picture.substitute(file=name) for name in ("probe.png", "curves.png") if (run / name).exists()]
    parts.append(middle.template)
    utterances = reversed(result["wer"]["utterances"]["generated"])  # of a clip's takes the first is the one played
    heard = {u["id"]: f" (heard as: {u['heard']})" for u in utterances}
    for i in first_clips(takes["original"], SHOWN):
        pair = takes["original"][i][0], takes["generated"][i][0]
        clip = clip_name(pair[0].domain, i)
        fig = figure(figsize=(7, 1.6), layout="constrained")
        for ax, take in zip(fig.subplots(1, 2, sharey=True), pair, strict=True):
            ax.imshow(take.mel.T.numpy(), aspect="auto", origin="lower", cmap="magma", vmin=-8, vmax=2)
            ax.axis("off")
        fig.savefig(run / "samples" / f"{clip}.png", dpi=80)
        parts.append(row.substitute(clip=clip, text=html.escape(pair[0].text + heard.get(i, ""))))
    (run / "index.html").write_text("".join([*parts, tail.template]), encoding="utf-8")


def board(run: Path, drop_from: int | None = None):
    """TensorBoard's writer of a run; what was written of steps from `drop_from` on is not shown any more."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run / "tensorboard", purge_step=drop_from)


def show_on_board(run: Path, step: int, takes: dict[str, dict]) -> None:
    """The probe figure and two clips a domain of evaluate.Takes on the run's TensorBoard."""
    from matplotlib.image import imread

    with board(run) as writer:
        if (run / "probe.png").exists():
            writer.add_image("probe", imread(run / "probe.png"), step, dataformats="HWC")
        for i in first_clips(takes["generated"], 2):
            take = takes["generated"][i][0]
            writer.add_audio(clip_name(take.domain, i), take.wav[None], step, audio.SAMPLE_RATE)


def held_out_loss(model, batch: data.Batch, sigma: float, machine: common.Machine) -> dict[str, float]:
    """L_FM of each domain, the mean over fixed clips, EVAL_TIMES points of t and fixed noise."""
    with machine.precision():
        loss = probe.at_times(probe.loss_of_clips, model, batch, EVAL_TIMES, sigma).mean(0)  # (B,)
    found = {name: batch.domain == d for d, name in enumerate(DOMAINS)}
    return {f"held_out_{name}": loss[of_d].mean().item() for name, of_d in found.items() if of_d.any()}


def tell_selection(run) -> None:
    """Prints which layers are aligned with which weights, and writes selection.json."""
    rows = {}
    there = [teacher != "none" for teacher, _ in run.objective.model.config.teachers]
    for name, layers in itertools.compress(zip(DOMAINS, run.objective.selection, strict=True), there):
        rows[name] = {l: sum(w) / len(w) for l, w in layers.items() if any(w)}
        chosen = ", ".join(f"L{l} (weight {w:.3f})" for l, w in rows[name].items()) or "nothing"
        print(f"phase II aligns for {name}: {chosen}", flush=True)
    write_json(Path(run.config.out_dir) / "selection.json", rows)


class Report:
    """Rows of log.csv and lines on the screen: what rank 0 tells of a run."""

    def __init__(self, run, machine: common.Machine, sampler: data.TrainingBatches, held_out: data.Dataset):
        c, out_dir = run.config, Path(run.config.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "config.json", asdict(c))
        self.announce(run, sampler, machine)
        self.run, self.machine, self.smooth, self.losses = run, machine, math.nan, []
        self.log = common.Log(out_dir / "log.csv", LOGGED, run.step)
        self.board = board(out_dir, run.step + 1) if c.tensorboard else None
        self.eval_batch = data.fixed_batch(held_out, c.eval_clips, 0, c.probe_frames).to(machine.device)
        if run.selected:
            tell_selection(run)
        self.restart_clock()

    def announce(self, run, sampler: data.TrainingBatches, machine: common.Machine) -> None:
        """The derived numbers, before step 0."""
        c, million, per_epoch = run.config, common.count_parameters(run.objective.model) / 1e6, sampler.steps_per_epoch
        kind = "bfloat16 autocast" if common.takes_bfloat16(machine.device, machine.dtype) else "float32"
        padding, left_out = sampler.waste()
        print(
            f"{show(c)}\n{million:.1f} M parameters, {c.n_layer} layers; {machine.world} x {machine.device}, {kind}\n"
            f"{len(sampler.dataset)} training clips, {sampler.lengths.sum()} frames an epoch in {per_epoch} steps, "
            f"{100 * left_out:.1f} % trimmed, padding {100 * padding:.1f} %; "
            f"{c.max_steps / per_epoch:.0f} epochs; phase I ends at step {c.phase1_steps}",
            flush=True,
        )

    def restart_clock(self) -> None:
        self.since, self.spent, self.frames = time.monotonic(), 0.0, 0

    def clock(self, counts: bool = True) -> None:
        """Adds the time since the last call to the run's and to that of the next row, where it counts as training."""
        now = time.monotonic()
        if counts:
            self.spent += now - self.since
            self.run.seconds += now - self.since
        self.since = now

    def count(self, numbers: dict, frames: int) -> None:
        """Takes in a step's losses, tensors that are read when a row is written, and its frames over all ranks."""
        self.numbers, self.frames = numbers, self.frames + frames
        self.losses.append(numbers["fm"])

    def row(self, with_held_out: bool) -> None:
        """Writes the last step's row, of the steps since the row before; none when there was no step."""
        run, last = self.run, self.run.config.max_steps
        if not self.frames:
            return
        self.numbers = {name: float(value) for name, value in self.numbers.items()}
        for fm in filter(math.isfinite, torch.stack(self.losses).tolist()):
            self.smooth = fm if math.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * fm
        self.losses = []
        self.clock()
        rate = self.frames / self.spent
        self.restart_clock()
        loss = lambda: held_out_loss(run.ema, self.eval_batch, run.config.sigma, self.machine)  # noqa: E731
        held = common.optional(loss, {}) if with_held_out else {}
        phase = 1 + run.selected
        self.log.row(step=run.step, phase=phase, frames_per_s=rate, seconds=run.seconds, **self.numbers, **held)
        for name, value in (self.numbers | held).items() if self.board else ():
            self.board.add_scalar(name, value, run.step)
        extra = "".join(f"  {k.replace('held_out_', 'held-out ')} {v:.4f}" for k, v in held.items())
        align = f"  align {self.numbers['align']:.3f}" if "align" in self.numbers else ""
        print(
            f"step {run.step:6d}/{last}  fm {self.smooth:.4f}  bitc {self.numbers['bitc']:.3f}{align}  "
            f"{rate:6.0f} frames/s  left {run.seconds / run.step * (last - run.step) / 60:.1f} min{extra}",
            flush=True,
        )
