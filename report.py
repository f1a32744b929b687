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
from collections.abc import Sequence
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
CLIP_SCORES = {  # of a clip in eval.json: heading and scale; others stand under their own name
    "fm": ("held-out FM x1000", 1000),
    "wer": ("WER %", 100),
    "mcd": ("mel-cepstral distance, dB", 1),
    "f0": ("log-F0 error, cents", 1),
    "cosine": ("cosine to the original", 1),
}
IN_PAIRS_ALONE = tuple("means covariances dB cents original".split())  # such headings' ends: no columns of --compare
DECIMALS = {"seeds": 0, "steps": 0, "seconds": 0, "cents": 0, "%": 1, "cosine": 3}  # by a word of the heading, else 2


def clip_name(domain: int, row: int) -> str:
    """What a held-out clip's files are called."""
    return f"{DOMAINS[domain]}_{row:04d}"


def paired_interval(values: np.ndarray, weight: np.ndarray | float = 1.0) -> list[float]:
    """[mean, low, high] of values (S seeds, C clips), NaN where one is missing, weighted by clip (C,), with the 95 %
    interval over both: how the means of seeds and of clips vary, less the noise in both; Student's t with
    Satterthwaite's freedom, as a bootstrap over three seeds is too narrow. One seed says nothing of trainings, and a
    single value nothing of either: [mean] alone."""
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
        if not isinstance(result, dict) or not {"wer", "clips", "seeds", "language"} <= set(result):
            raise ValueError("of an older evaluate.py, or no evaluation")
        return result
    except ValueError as error:
        raise ValueError(f"{file} is unusable ({error}): run evaluate.py --ckpt {file.parent}/ckpt.pt") from error


def is_evaluated(run: Path, step: int) -> bool:
    """Whether a run's own evaluation is of this step."""
    return eval_file(run).exists() and common.optional(lambda: read_eval(eval_file(run)).get("step")) == step


def labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """Runs by the names of their folders, or by the whole path where two share a name."""
    names = [p.name for p in folders]
    return {str(p) if names.count(p.name) > 1 else p.name: p for p in folders}


def read_runs(folders: Sequence[Path], name: str = "", scores: str = "") -> dict[str, dict[str, dict]]:
    """{NAME: {label: what eval_file holds, and "folder"}} of runs labelled NAME_sSEED; clips get what the CSV file
    `scores` says of them under columns run, clip and any others. Raises ValueError for a file without such rows, or
    when two runs were not measured alike; seed, a draw, and sigma, the run's own, may differ."""
    runs = {label: read_eval(eval_file(p, name)) | {"folder": str(p)} for label, p in labelled(folders).items()}
    seen: dict[str, tuple] = {}
    for label, result in runs.items():
        used = {k: result[k] for k in ("data", "vocoder", "asr", "language", "seeds", "clip_seed")} | result["sampler"]
        used |= {"clips": len(result["clips"]["generated"]), "WER clips": result["wer"]["clips"]}
        used |= {"fad_model": result["fad"]["model"]} if "fad" in result else {}
        for key, value in used.items():
            other, theirs = seen.setdefault(key, (label, value))
            if value != theirs and key not in ("seed", "sigma"):
                raise ValueError(f"{label} was evaluated with {key}={value}, {other} with {theirs}: evaluate one again")
    if scores:
        every = ((label, c) for label, run in runs.items() for c in run["clips"]["generated"])
        clips = {(label, clip_name(DOMAINS.index(c["domain"]), c["id"])): c for label, c in every}
        found = [(clip, r) for r in read_csv(Path(scores)) if (clip := clips.get((r.get("run"), r.get("clip"))))]
        if not found:
            raise ValueError(f"scores={scores}: no row of these runs and clips; the columns are run, clip, any scores")
        for clip, row in found:
            clip |= {k: float(v) for k, v in row.items() if k not in ("run", "clip") and v}
    groups: dict[str, dict] = {}
    for label, run in runs.items():
        groups.setdefault(re.sub(r"_s\d+$", "", label), {})[label] = run
    return groups


def clip_scores(clips: Sequence[dict]) -> dict[str, dict[int, float]]:
    """{heading: {clip: score}} of what was measured of clips, by domain, what CLIP_SCORES names first."""
    others = sorted({key for clip in clips for key in clip} - {"id", "domain", "words", *CLIP_SCORES})
    headings, found = CLIP_SCORES | {key: (key, 1) for key in others}, {}
    for domain, (key, (heading, scale)) in itertools.product(DOMAINS, headings.items()):
        values = {c["id"]: scale * c[key] for c in clips if c["domain"] == domain and key in c}
        found |= {f"{domain} {heading}": values} if values else {}
    return found


def measured(result: dict) -> dict[str, dict[str, list[float]]]:
    """What eval.json holds, {heading: {system: [value] or, with its interval over clips, [value, low, high]}}."""
    wer, fad, found = result["wer"], result.get("fad", {}), {}
    if wer["clips"]:
        heading = f"speech WER %, n {wer['clips']} ({wer['words']} words)"
        found[heading] = {s: [100 * x for x in (wer[s], *wer["interval"].get(s, ()))] for s in wer["utterances"]}
    if wer["cer"]:
        found["speech CER %"] = {s: [100 * x] for s, x in wer["cer"].items()}
    for name in (name for name in DOMAINS if name in fad):
        scores, label = fad[name], f"{name} {fad['model']}"
        found[f"{label}-FAD, n {scores['clips']}"] = {s: [scores[s], *scores["interval"][s]] for s in scores["terms"]}
        for k, term in enumerate(("means", "covariances")):
            found[f"  {name}: {term}"] = {s: [pair[k]] for s, pair in scores["terms"].items()}
        found[f"{label}-KAD"] = {s: [x, *scores["kad_interval"][s]] for s, x in scores["kad"].items()}
    clips = {system: clip_scores(rows) for system, rows in result["clips"].items()}
    for heading in (h for h in clips["generated"] if h != "speech WER %"):  # whose mean is over words
        values = {s: list(scores[heading].values()) for s, scores in clips.items() if heading in scores}
        found[heading] = {s: paired_interval(np.array([x])) for s, x in values.items()}
    return found


def differences(groups: dict[str, dict]) -> dict[str, dict]:
    """{name: {"speech WER %": paired_interval}} of the runs NAME_sSEED less none_sSEED, over the clips they share."""
    result, base = {}, groups.get("none", {})
    for name in (name for name in groups if name != "none"):
        twins = [(run, base.get(f"none{label.removeprefix(name)}")) for label, run in groups[name].items()]
        shared = [[run["clips"]["generated"] for run in pair] for pair in twins if all(pair)]
        pairs = [[clip_scores(clips) for clips in pair] for pair in shared]
        for heading in pairs[0][0] if pairs else ():
            ids = sorted(set.intersection(*(set(run.get(heading, ())) for pair in pairs for run in pair)))
            words = {c["id"]: c.get("words") if heading == "speech WER %" else 1 for c in shared[0][0]}
            if len(ids) > 1:
                d = np.array([[run[heading][i] - none[heading][i] for i in ids] for run, none in pairs])
                found = paired_interval(d, np.array([words[i] for i in ids]))
                result.setdefault(name, {})[heading] = np.round(found, 9).tolist()  # nothing is 0, not 1e-15
    return result


def compare(groups: dict[str, dict], fad_target: float | None = None, ratings: Sequence[dict] = ()) -> dict[str, dict]:
    """{name: {"seeds": [n], column: [mean] or [mean, low, high]}} of read_runs' runs, with the 95 % interval over
    seeds, or of a single one over its clips. The default of fad_target is the speech FAD of the run named none;
    `ratings` are read_ratings'. A column that one seed of a run lacks stays empty: a mean over some would be unlike."""
    heard, rows = by_rater_and_clip(ratings), {}
    if fad_target is None:
        none = [run["fad"]["speech"] for run in groups.get("none", {}).values() if "speech" in run.get("fad", ())]
        fad_target = np.mean([fad["generated"] for fad in none]) if none else -np.inf
    for name, runs in groups.items():
        found = []
        for label, run in runs.items():
            row = {c: x["generated"] for c, x in measured(run).items() if not c.endswith(IN_PAIRS_ALONE)}
            row |= {f"{d} MOS": paired_interval(heard[d, label]) for d in DOMAINS if (d, label) in heard}
            curve = [r for r in read_csv(Path(run["folder"]) / "evals.csv") if r.get("speech_fad")]
            reached = [r for r in curve if float(r["speech_fad"]) <= fad_target]
            if reached and len(curve) > 1:  # a single evaluation at the end says nothing about when
                row |= {"steps to FAD": [float(reached[0]["step"])], "seconds to FAD": [float(reached[0]["seconds"])]}
            found.append({c: values for c, values in row.items() if np.isfinite(values[0])})
        shared = [c for c in found[0] if all(c in row for row in found)]
        over_seeds = {c: paired_interval(np.array([[row[c][0]] for row in found])) for c in shared}
        rows[name] = {"seeds": [len(found)]} | (over_seeds if len(found) > 1 else found[0])
    return rows


def with_interval(values: Sequence[float], heading: str, form: str = "") -> str:
    """ "12.0 [10.0 14.0]", or the mean alone; with the decimals of the heading where no form is given."""
    form = form or f".{next((n for word, n in DECIMALS.items() if word in heading), 2)}f"
    mean, *edges = (f"{value:{form}}" for value in values)
    return f"{mean} [{' '.join(edges)}]" if edges else mean


def comparison_table(corner: str, rows: dict[str, dict], paired: bool = False) -> str:
    """compare's rows, or the `paired` differences, as an aligned Markdown table of the columns that a run has."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [[corner, *columns]]
    for name, row in rows.items():
        texts = {c: with_interval(values, c, "+.3g" if paired else "") for c, values in row.items()}
        bold = {c: f"**{texts[c]}**" for c, x in row.items() if paired and (x[1] > 0 or x[2] < 0)}
        lines.append([name, *((texts | bold).get(c, "") for c in columns)])
    return table(lines, markdown=True)


def plot(out: Path, panels: dict[str, list[tuple[str, Path, str]]]) -> None:
    """Writes a picture of panels {title: [(label, CSV file, column)]} against steps."""
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure  # opens no window, unlike pyplot

    fig = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for ax, (title, lines) in zip(fig.subplots(1, len(panels)), panels.items(), strict=True):
        ax.set_prop_cycle(color=[colormaps["tab20"](2 * k % 19) for k in range(19)])  # the dark ones first
        for label, file, column in lines:
            rows = [r for r in read_csv(file) if r.get(column)]
            x, y = [int(r["step"]) for r in rows], [float(r[column]) for r in rows]
            ax.plot(x, y, ".-", label=label, linewidth=1, markersize=4)
        ax.set(title=title, xlabel="step")
        ax.legend(fontsize=7)
    fig.savefig(out, dpi=100)


def plot_differences(out: Path, paired: dict[str, dict]) -> None:
    """Writes a picture of what each run's held-out FM loss is above that of none, with its interval, by domain."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 1.2 + 0.3 * len(paired)), layout="constrained")
    for ax, domain in zip(fig.subplots(1, len(DOMAINS), sharey=True), DOMAINS, strict=True):
        key = f"{domain} {CLIP_SCORES['fm'][0]}"
        found = {name: row[key] for name, row in paired.items() if len(row.get(key, ())) == 3}
        mean, low, high = np.array(list(found.values())).reshape(-1, 3).T
        ax.errorbar(mean, list(found), xerr=(mean - low, high - mean), fmt="o", capsize=3, markersize=4)
        ax.axvline(0, color="grey", linewidth=1)
        ax.set(title=f"{key} less none", xlabel="worse to the right; 95 % over seeds and clips")
    fig.savefig(out, dpi=100)


def listening_test(folders: Sequence[str], clips: int, out: str = "", seed: int = 0) -> str:
    """Writes out/listening.html, which plays the first `clips` clips a domain of all runs' samples and their originals
    under blind names, and out/key.json, {item: {"system", "domain", "clip"}}, which stays with whoever runs the test;
    returns what to do with them. Raises ValueError for a run without samples, and unless all have the same clips."""
    systems, out = {}, Path(out or "out/listening")
    for label, run in labelled([Path(folder) for folder in folders]).items():
        for system, kind in ((label, "generated"), ("original", "original")):
            found = (sorted((run / "samples" / kind).glob(f"{name}_*.wav"))[:clips] for name in DOMAINS)
            systems[system] = {path.stem: path.read_bytes() for path in itertools.chain(*found)}
        if not systems[label]:
            raise ValueError(f"no clips in {run}/samples/generated: run evaluate.py --ckpt {run}/ckpt.pt first")
    if len({frozenset(waves) for waves in systems.values()}) != 1:
        raise ValueError("the systems of a listening test need the same clips: evaluate all runs on the same data")
    key, items = {}, []
    for system, waves in systems.items():
        for clip, wav in waves.items():
            item = hashlib.sha256(f"{seed}/{system}/{clip}".encode() + wav).hexdigest()[:12]
            key[item] = {"system": system, "domain": clip.split("_")[0], "clip": clip}
            source = "data:audio/wav;base64," + base64.b64encode(wav).decode()
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
            if row["item"] not in key:
                raise ValueError(f"{path}, line {line}: item {row['item']!r} is not in the key: pass its --mos_key")
            if row["rating"] not in list("12345"):
                raise ValueError(f"{path}, line {line}: rating {row['rating']!r} is not 1, 2, 3, 4 or 5")
            given = {"rater": row["rater"], "rating": int(row["rating"])}
            ratings[row["rater"], row["item"]] = key[row["item"]] | given
    return list(ratings.values())


def by_rater_and_clip(ratings: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    """{(domain, system): (raters, clips) ratings}, NaN where there is none."""
    raters, clips = (list(dict.fromkeys(r[key] for r in ratings)) for key in ("rater", "clip"))
    found: dict = {}
    for r in sorted(ratings, key=lambda r: (DOMAINS.index(r["domain"]), r["system"])):
        matrix = found.setdefault((r["domain"], r["system"]), np.full((len(raters), len(clips)), np.nan))
        matrix[raters.index(r["rater"]), clips.index(r["clip"])] = r["rating"]
    return found


def mos_table(ratings: list[dict]) -> str:
    """MOS of each system over raters and clips, and differences of what the same listener said of the same clip."""
    found, rows = by_rater_and_clip(ratings), [["MOS [95 % over raters and clips]", *DOMAINS]]
    scores = {at: with_interval(paired_interval(matrix), "MOS") for at, matrix in found.items()}
    rows += [[system, *(scores.get((d, system), "") for d in DOMAINS)] for system in sorted({s for _, s in found})]
    lines = [table(rows)]
    for ((domain, a), x), ((other, b), y) in itertools.combinations(found.items(), 2):
        if domain == other and (shared := np.isfinite(x - y)).sum() > 1:
            counts = f"{shared.any(1).sum()} raters, {shared.any(0).sum()} clips"
            lines.append(f"{domain}: {a} - {b} = {with_interval(paired_interval(x - y), 'MOS', '+.2f')}, {counts}")
    return "\n".join(lines)


def score_table(result: dict) -> str:
    """What eval.json holds of a checkpoint as text, a column a system and the interval of `generated` over clips."""
    systems, fad = list(result["wer"]["utterances"]), result.get("fad", {})
    rows = [["", *systems, "generated, 95 %"]]
    for heading, found in measured(result).items():
        cells = {s: with_interval(values, heading).partition(" ") for s, values in found.items()}
        rows.append([heading, *(cells[s][0] if s in cells else "" for s in systems), cells["generated"][2]])
    taught = f"\nwarning: {fad.get('model')} taught this run, so its FAD flatters; --fad_model=yamnet was no teacher"
    return (
        f"{table(rows)}\nnoise seeds a clip {result['seeds']}, real-time factor {result['real_time_factor']:.2f} at "
        f"nfe {result['sampler']['nfe']}, vocoder {result['vocoder']}, recogniser {result['asr']}, "
        f"language {result['language']}{taught if fad.get('is_teacher') else ''}"
    )


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
    last = max(step, int(log[-1]["step"])) if log else math.inf
    rows = {int(r["step"]): r for r in read_csv(run / "evals.csv") if int(r["step"]) <= last}
    row = {"step": step, "seconds": result["seconds"], "speech_wer": result["wer"]["generated"]}
    rows[step] = row | {f"{name}_fad": result.get("fad", {}).get(name, {}).get("generated", "") for name in DOMAINS}
    write_csv(run / "evals.csv", list(rows[step]), [rows[k] for k in sorted(rows)])
    if step == max(rows):
        write_samples(run / "samples", takes)
    return step == max(rows)


def first_clips(clips: dict[int, list], n: int) -> list[int]:
    """The first n clips of each domain of a system of evaluate.Takes."""
    return [i for d in range(len(DOMAINS)) for i in [k for k, (take, *_) in clips.items() if take.domain == d][:n]]


def index_page(run: Path, result: dict, takes: dict[str, dict]) -> None:
    """Writes run/index.html: score_table, pictures, and of SHOWN clips a domain of evaluate.Takes players and mels."""
    from matplotlib.image import imsave

    panels = {"flow matching": ("fm", "held_out_speech", "held_out_audio"), "BiT-C": ("bitc",), "alignment": ("align",)}
    plot(run / "curves.png", {title: [(c, run / "log.csv", c) for c in columns] for title, columns in panels.items()})
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
        mels = [np.pad(take.mel, ((0, 8), (0, 0)), constant_values=2) for take in pair]  # a light edge between them
        imsave(run / "samples" / f"{clip}.png", np.concatenate(mels).T, origin="lower", cmap="magma", vmin=-8, vmax=2)
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


def held_out_loss(run, batch: data.Batch, machine: common.Machine) -> dict[str, float]:
    """L_FM of each domain, the mean over fixed clips, EVAL_TIMES points of t and fixed noise."""
    with machine.precision():
        loss = probe.at_times(probe.loss_of_clips, run.ema, batch, EVAL_TIMES, run.config.sigma).mean(0)  # (B,)
    found = {f"held_out_{name}": loss[batch.domain == d] for d, name in enumerate(DOMAINS)}
    return {name: of_d.mean().item() for name, of_d in found.items() if len(of_d)}


def tell_selection(run) -> None:
    """Prints which layers are aligned with which weights, and writes selection.json."""
    rows = {}
    there = [teacher != "none" for teacher, _ in run.objective.model.config.teachers]
    for name, layers in itertools.compress(zip(DOMAINS, run.objective.selection, strict=True), there):
        rows[name] = {l: sum(w) / len(w) for l, w in layers.items() if any(w)}
        chosen = ", ".join(f"L{l} (weight {w:.3f})" for l, w in rows[name].items()) or "nothing"
        print(f"phase II aligns for {name}: {chosen}", flush=True)
    if run.objective.heads:
        print(f"its heads have {common.count_parameters(run.objective.heads) / 1e6:.3f} M parameters", flush=True)
    write_json(Path(run.config.out_dir) / "selection.json", rows)


class Report:
    """Rows of log.csv and lines on the screen: what rank 0 tells of a run."""

    def __init__(self, run, machine: common.Machine, sampler: data.TrainingBatches, held_out: data.Dataset):
        """Shows the derived numbers, before step 0."""
        c, out_dir, per_epoch = run.config, Path(run.config.out_dir), sampler.steps_per_epoch
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "config.json", asdict(c))
        kind = "bfloat16 autocast" if common.takes_bfloat16(machine.device, machine.dtype) else "float32"
        million, (padding, left_out) = common.count_parameters(run.objective.model) / 1e6, sampler.waste()
        print(
            f"{show(c)}\n{million:.1f} M parameters, {c.n_layer} layers; {machine.world} x {machine.device}, {kind}\n"
            f"{len(sampler.dataset)} training clips, {sampler.lengths.sum()} frames an epoch in {per_epoch} steps, "
            f"{100 * left_out:.1f} % trimmed, padding {100 * padding:.1f} %; "
            f"{c.max_steps / per_epoch:.0f} epochs; phase I ends at step {c.phase1_steps}",
            flush=True,
        )
        self.run, self.machine, self.smooth, self.losses, self.frames = run, machine, math.nan, [], 0
        self.log = common.Log(out_dir / "log.csv", LOGGED, run.step)
        self.board = board(out_dir, run.step + 1) if c.tensorboard else None
        self.eval_batch = data.fixed_batch(held_out, c.eval_clips, 0, c.probe_frames).to(machine.device)
        if run.selected:
            tell_selection(run)
        self.since, self.told = time.monotonic(), run.seconds

    def clock(self, counts: bool = True) -> None:
        """Adds the time since the last call to the run's, where it counts as training."""
        now = time.monotonic()
        self.run.seconds += counts * (now - self.since)
        self.since = now

    def count(self, numbers: dict, frames: int) -> None:
        """Takes in a step's losses, tensors that are read when a row is written, and its frames over all ranks."""
        self.numbers, self.frames = numbers, self.frames + frames
        self.losses.append(numbers["fm"])

    def row(self, with_held_out: bool) -> None:
        """Writes the last step's row, of the steps since the row before; none when there was no step."""
        run, last = self.run, self.run.config.max_steps
        if not self.losses:
            return
        numbers = {name: float(value) for name, value in self.numbers.items()}
        for fm in filter(math.isfinite, torch.stack(self.losses).tolist()):
            self.smooth = fm if math.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * fm
        self.clock()
        rate = self.frames / (run.seconds - self.told)
        self.told, self.losses, self.frames = run.seconds, [], 0
        held = common.optional(lambda: held_out_loss(run, self.eval_batch, self.machine), {}) if with_held_out else {}
        about = {"step": run.step, "phase": 1 + run.selected, "frames_per_s": rate, "seconds": run.seconds}
        self.log.row(**about, **numbers, **held)
        for name, value in (numbers | held).items() if self.board else ():
            self.board.add_scalar(name, value, run.step)
        shown = {"fm": self.smooth} | {k: numbers[k] for k in ("bitc", "align") if k in numbers} | held
        text = "".join(f"  {k.replace('held_out_', 'held-out ')} {v:.4f}" for k, v in shown.items())
        minutes = run.seconds / run.step * (last - run.step) / 60
        print(f"step {run.step:6d}/{last}{text}  {rate:6.0f} frames/s  left {minutes:.1f} min", flush=True)
