"""Numbers and sounds as pages: the comparison of runs, the listening test and its scores, a run's table and index.html.

Nothing here runs a model. evaluate.py is the command line: --compare, --listening_test and --mos.
"""

import base64
import hashlib
import html
import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

import audio
from common import DOMAINS, SPEECH, read_csv, table, write_json

ASSETS = Path(__file__).resolve().parent / "assets"  # the pages' templates
SHOWN = 6  # clips per domain on a run's page
PAIRED = {"WER %": ("wer", 100), "MCD, dB": ("mcd", 1), "cosine": ("cosine", 1)}  # heading: key in eval.json, scale
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
    "gain": ("gain %", 1),
}


def interval(draws: np.ndarray) -> list[float]:
    """The 95 % interval [low, high] of bootstrap draws (n,)."""
    return np.nanpercentile(draws, [2.5, 97.5]).tolist()


def paired_interval(difference: np.ndarray, weight: np.ndarray | float = 1.0) -> list[float]:
    """[mean, low, high] of paired differences (S seeds, C clips), weighted by clip (C,), with the 95 % interval over
    both: how the means of seeds and of clips vary, less the noise in both; Student's t with Satterthwaite's freedom. (A
    bootstrap over three seeds calls a fifth of pairs without effect different.) One seed says nothing of trainings."""
    weight = weight / np.mean(weight) * np.ones(difference.shape[1])
    mean, (s, c) = float((difference * weight).mean()), difference.shape
    rest = weight * (difference - mean)  # a ratio's, linearised
    free = np.array([max(1, s - 1), c - 1])
    parts = np.array([(rest.mean(1) ** 2).sum() / s, (rest.mean(0) ** 2).sum() / c]) / free
    noise = ((rest - rest.mean(1, keepdims=True) - rest.mean(0)) ** 2).sum() / free.prod() / (s * c)
    variance = max(*parts, parts.sum() - noise)
    freedom = variance**2 / (parts**2 / free).sum() if variance else 1
    half = float(scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return [mean, mean - half, mean + half]


def differences(paths: Sequence[Path]) -> dict[str, dict]:
    """{name: {"speech MCD, dB": paired_interval}} of the runs NAME_sSEED less none_sSEED, over the clips they share."""
    split = {p: re.fullmatch(r"(.*?)(_s\d+)?", p.name).groups() for p in paths}
    runs = {split[p]: {c["id"]: c for c in read_eval(p).get("clips", {}).get("generated", [])} for p in paths}
    result: dict[str, dict] = {}
    for name in dict.fromkeys(name for name, seed in runs if name != "none" and ("none", seed) in runs):
        pairs = [(runs[n, seed], runs["none", seed]) for n, seed in runs if n == name and ("none", seed) in runs]
        for domain, (heading, (key, scale)) in itertools.product(DOMAINS, PAIRED.items()):
            has = ({i for i, c in run.items() if c["domain"] == domain and key in c} for pair in pairs for run in pair)
            ids = sorted(set.intersection(*has))
            words = np.array([pairs[0][0][i]["words"] if key == "wer" else 1 for i in ids])
            if len(ids) > 1:
                d = np.array([[scale * (run[i][key] - base[i][key]) for i in ids] for run, base in pairs])
                result.setdefault(name, {})[f"{domain} {heading}"] = paired_interval(d, words)
    return result


def differences_table(found: dict[str, dict]) -> str:
    """The differences as an aligned Markdown table, in bold what does not include zero; empty without any."""
    lines = [["less none, paired", *dict.fromkeys(c for row in found.values() for c in row)]]
    for name, row in found.items():
        lines.append([name, *[""] * (len(lines[0]) - 1)])
        for column, (mean, low, high) in row.items():
            bold = "**" if low > 0 or high < 0 else ""
            lines[-1][lines[0].index(column)] = f"{bold}{mean:+.3f} [{low:.3f} {high:.3f}]{bold}"
    return table(lines, markdown=True) if found else ""


def read_eval(run: Path) -> dict:
    """eval.json of a run. Raises ValueError when it is damaged."""
    try:
        return json.loads((run / "eval.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{run / 'eval.json'} is not JSON ({error}): run evaluate.py --ckpt {run}/ckpt.pt") from None


def read_run(path: Path, fad_target: float | None, mos: dict[str, tuple]) -> dict[str, float]:
    """The columns of one evaluated run; what was not measured is not there."""
    result = read_eval(path)
    row = {"wer": 100 * result["wer"]["generated"]}
    row |= {f"held_out_{name}": value for name, value in result["held_out_fm"].items()}
    fads = result.get("fad", {})
    row |= {f"{name}_fad": fads[name]["generated"] for name in DOMAINS if fads}
    row |= {f"{name}_kad": fads[name]["kad"]["generated"] for name in DOMAINS if "kad" in fads.get(name, {})}
    row |= {f"{name}_mos": score[0] for name, score in mos.items()}
    curve = [r for r in read_csv(path / "evals.csv") if r.get("speech_fad")]
    reached = [r for r in curve if fad_target is not None and float(r["speech_fad"]) <= fad_target]
    if reached and len(curve) > 1:  # a single evaluation at the end says nothing about when
        row |= {"steps_to_target": float(reached[0]["step"]), "seconds_to_target": float(reached[0]["seconds"])}
    return {k: v for k, v in row.items() if np.isfinite(v)}


def refuse_unlike(paths: Sequence[Path]) -> None:
    """Raises ValueError when two runs were not measured alike; seed, a draw, and sigma, the run's own, may differ."""
    seen: dict[str, tuple] = {}
    for path in paths:
        result = read_eval(path)
        used = {k: result.get(k) for k in ("data", "vocoder", "asr", "clip_seed")} | {
            "WER clips": result["wer"]["clips"]
        }
        used |= {k: v for k, v in result["sampler"].items() if k not in ("seed", "sigma")}
        used |= {"fad_model": result["fad"]["model"]} if "fad" in result else {}
        for key, value in used.items():
            other, theirs = seen.setdefault(key, (path, value))
            if value != theirs:
                raise ValueError(f"{path} was evaluated with {key}={value}, {other} with {theirs}: evaluate one again")


def compare(paths: Sequence[Path], fad_target: float | None = None, mos: dict | None = None) -> dict[str, dict]:
    """{name: {column: (mean, standard error or None, n)}} over the seeds of each run NAME_sSEED. "gain" is how much
    lower the speech FAD is than that of the run named none, in percent; the default of fad_target is the FAD of none.
    `mos` is mean_scores by run directory. A column that one seed of a run lacks stays empty: a mean over some of the
    seeds would compare unlike with like. Raises ValueError for runs that were not measured alike."""
    refuse_unlike(paths)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"_s\d+$", "", path.name), []).append(path)
    if fad_target is None and "none" in groups:
        fad_target = np.mean([read_run(p, None, {}).get("speech_fad", np.nan) for p in groups["none"]])
    rows: dict[str, dict] = {}
    for name, members in groups.items():
        runs = [read_run(p, fad_target, (mos or {}).get(p.name, {})) for p in members]
        shared = [column for column in COLUMNS if all(column in run for run in runs)]
        rows[name] = {column: mean_and_error([run[column] for run in runs]) for column in shared}
    base = rows.get("none", {}).get("speech_fad")
    for row in rows.values():
        if base and "speech_fad" in row:
            row["gain"] = (100 * (1 - row["speech_fad"][0] / base[0]), None, row["speech_fad"][2])
    return rows


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None, int]:
    """Mean, its standard error (None of a single value) and n."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error, len(values)


def with_error(mean: float, error: float | None, digits: int) -> str:
    """ "12.0 ± 2.0", or the mean alone."""
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def comparison_table(rows: dict[str, dict]) -> str:
    """The comparison as an aligned Markdown table; an empty cell was not measured."""
    lines = [["run", "seeds", *(heading for heading, _ in COLUMNS.values())]]
    for name, row in rows.items():
        cells = [with_error(*row[c][:2], digits) if c in row else "" for c, (_, digits) in COLUMNS.items()]
        lines.append([name, str(max((n for _, _, n in row.values()), default=0)), *cells])
    return table(lines, markdown=True)


def plot(out: Path, panels: dict[str, list[tuple[str, Path, str]]], phase2: int | None = None) -> None:
    """Writes a picture of panels {title: [(label, CSV file, column)]} against steps, marked where phase II began."""
    fig = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for ax, (title, lines) in zip(fig.subplots(1, len(panels)), panels.items(), strict=True):
        ax.set_prop_cycle(color=[matplotlib.colormaps["tab20"](2 * k % 19) for k in range(19)])  # the dark ones first
        for label, file, column in lines:
            rows = [r for r in read_csv(file) if r.get(column)]
            x, y = [int(r["step"]) for r in rows], [float(r[column]) for r in rows]
            ax.plot(x, y, ".-", label=label, linewidth=1, markersize=4)
        if phase2:
            ax.axvline(phase2, color="grey", linestyle=":", label="phase II")
        ax.set(title=title, xlabel="step")
        ax.legend(fontsize=7)
    fig.savefig(out, dpi=100)


def listening_test(systems: dict[str, dict[str, np.ndarray]], out: Path, seed: int = 0) -> dict[str, dict]:
    """Writes out/listening.html, which plays every clip of every system under a blind name, and out/key.json, which
    tells them apart and stays with whoever runs the test. `systems`: {system: {"speech_0012": waveform (L,)}}. Returns
    the key, {item: {"system", "domain", "clip"}}. Raises ValueError unless all systems have the same clips."""
    if len({frozenset(waves) for waves in systems.values()}) != 1 or not all(systems.values()):
        raise ValueError("the systems of a listening test need the same clips: evaluate all runs on the same data")
    key, items = {}, []
    for system, waves in systems.items():
        for clip, wav in waves.items():
            item = hashlib.sha256(f"{seed}/{system}/{clip}".encode() + wav.tobytes()).hexdigest()[:12]
            key[item] = {"system": system, "domain": clip.split("_")[0], "clip": clip}
            flac = io.BytesIO()  # a third smaller than wav and the same sound
            audio.write(flac, wav, kind="FLAC")
            source = "data:audio/flac;base64," + base64.b64encode(flac.getvalue()).decode()
            items.append({"id": item, "kind": key[item]["domain"], "src": source})
    items.sort(key=lambda item: item["id"])  # the file's order says nothing about systems either
    test = hashlib.sha256("".join(key).encode()).hexdigest()[:12]
    page = (ASSETS / "listening.html").read_text(encoding="utf-8").replace("@TEST@", test)
    out.mkdir(parents=True, exist_ok=True)
    (out / "listening.html").write_text(page.replace("@ITEMS@", json.dumps(items)), encoding="utf-8")
    write_json(out / "key.json", key)
    return key


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


def mean_scores(ratings: list[dict]) -> dict[str, dict[str, tuple]]:
    """MOS over all ratings: {system: {domain: (mean, standard error or None, n)}}."""
    groups: dict = {}
    for r in ratings:
        groups.setdefault(r["system"], {}).setdefault(r["domain"], []).append(r["rating"])
    return {system: {d: mean_and_error(v) for d, v in domains.items()} for system, domains in groups.items()}


def paired_tests(ratings: list[dict]) -> list[tuple[str, str, str, float, float, int]]:
    """Paired two-sided t-tests between systems, (domain, a, b, mean a - b, p, clips), on the scores of clips averaged
    over raters first, because one listener's ratings are not independent samples (appendix C). Pairs with fewer than
    two clips in common are left out."""
    groups: dict = {}
    for r in ratings:
        groups.setdefault((DOMAINS.index(r["domain"]), r["system"]), {}).setdefault(r["clip"], []).append(r["rating"])
    tests = []
    for (d, a), (e, b) in itertools.combinations(sorted(groups), 2):
        shared = sorted(set(groups[d, a]) & set(groups[e, b])) if d == e else []
        if len(shared) > 1:
            x, y = ([float(np.mean(groups[d, system][clip])) for clip in shared] for system in (a, b))
            difference = np.subtract(x, y)
            p = float(scipy.stats.ttest_rel(x, y).pvalue) if difference.std() else float(difference.mean() == 0)
            tests.append((DOMAINS[d], a, b, float(difference.mean()), p, len(shared)))
    return tests


def mos_table(ratings: list[dict]) -> str:
    """Mean ± standard error per system, and the paired tests."""
    rows = [["MOS", *DOMAINS]]
    for system, scores in sorted(mean_scores(ratings).items()):
        cells = [f"{with_error(*scores[d][:2], 2)} (n {scores[d][2]})" if d in scores else "" for d in DOMAINS]
        rows.append([system, *cells])
    lines = [table(rows)]
    for domain, a, b, difference, p, n in paired_tests(ratings):
        lines.append(f"{domain}: {a} - {b} = {difference:+.2f}, paired t-test over {n} clips p = {p:.3g}")
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
    add(label, wer, 1, 100, wer["interval"].get("generated", ()))
    for name in DOMAINS if fad else ():
        scores = fad[name]
        add(f"{name} {fad['model']}-FAD, n {scores['clips']}", scores, 2)
        for k, term in enumerate(("means", "covariances")):
            add(f"  of it the {term}", {s: pair[k] for s, pair in scores["terms"].items()}, 2)
        add(f"{name} {fad['model']}-KAD", scores["kad"], 2, 1, scores["kad_interval"]["generated"])
    for name in DOMAINS:
        for key, heading, digits in (("mcd", "mel-cepstral distance, dB", 2), ("cosine", "cosine to the original", 3)):
            found = {s: [r[key] for r in c if r["domain"] == name and key in r] for s, c in result["clips"].items()}
            means = {s: float(np.mean(values)) for s, values in found.items() if values}
            if means:
                add(f"{name} {heading}", means, digits)
    for name, loss in result["held_out_fm"].items():
        add(f"held-out FM loss, {name}", {"generated": loss}, 4)
    text = f"{table(rows)}\nreal-time factor {result['real_time_factor']:.2f} at nfe {result['sampler']['nfe']}"
    text += f", vocoder {result['vocoder']}, recogniser {result['asr']}"
    if fad.get("is_teacher"):
        text += f"\nwarning: {fad['model']} taught this run, so its FAD flatters; --fad_model=yamnet was no teacher"
    return text


def index_page(run: Path, result: dict, clips: dict[str, tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Writes run/index.html: score_table, the probe figure, loss curves and, with players and mel pictures, SHOWN
    `clips` a domain, {"speech_0012": (text, original, generated)}, waveforms (L,). The generated ones lie in
    run/samples already, the originals and pictures are put beside them. `result` is what eval.json holds."""
    log = run / "log.csv"
    phase2 = next((int(r["step"]) for r in read_csv(log) if r["phase"] == "2"), None)
    panels = {"flow matching": ("fm", "held_out_speech", "held_out_audio"), "BiT-C": ("bitc",), "alignment": ("align",)}
    plot(run / "curves.png", {title: [(c, log, c) for c in columns] for title, columns in panels.items()}, phase2)
    page = (ASSETS / "run.html").read_text(encoding="utf-8")
    head, picture, middle, row, tail = map(Template, re.split(r"<!-- (?:for each \w+|end) -->\n", page))
    parts = [head.substitute(name=html.escape(run.name), step=result["step"], table=html.escape(score_table(result)))]
    parts += [picture.substitute(file=name) for name in ("probe.png", "curves.png") if (run / name).exists()]
    parts.append(middle.template)
    heard = {f"{DOMAINS[SPEECH]}_{u['id']:04d}": u["heard"] for u in result["wer"]["utterances"]["generated"]}
    for clip in (c for name in DOMAINS for c in [c for c in clips if c.startswith(name)][:SHOWN]):
        text, *waves = clips[clip]
        audio.write(run / "samples" / f"{clip}.original.wav", waves[0])
        fig = Figure(figsize=(7, 1.6), layout="constrained")
        for ax, wav in zip(fig.subplots(1, 2, sharey=True), waves, strict=True):
            mel = audio.log_mel(torch.from_numpy(wav)).T.numpy()
            ax.imshow(mel, aspect="auto", origin="lower", cmap="magma", vmin=-8, vmax=2)
            ax.axis("off")
        fig.savefig(run / "samples" / f"{clip}.png", dpi=80)
        text += f" (heard as: {heard[clip]})" if clip in heard else ""
        parts.append(row.substitute(clip=clip, text=html.escape(text)))
    (run / "index.html").write_text("".join([*parts, tail.template]), encoding="utf-8")
