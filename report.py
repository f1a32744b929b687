"""Numbers and sounds as pages: the comparison table of runs, the listening test and its scores, a run's index.html.

Nothing here runs a model. evaluate.py is the command line: --compare, --listening_test and --mos.
"""

import base64
import csv
import hashlib
import html
import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import audio
from common import DOMAINS


def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV file, none when it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_eval(run: Path) -> dict:
    """eval.json of a run. Raises ValueError when it is damaged."""
    try:
        return json.loads((run / "eval.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{run / 'eval.json'} is not JSON ({error}): run evaluate.py --ckpt {run}/ckpt.pt") from None


# ---- comparison of runs

COLUMNS = {  # name in table.json: heading, and how many decimals
    "held_out_speech": ("held-out FM, speech", 4),
    "held_out_audio": ("held-out FM, audio", 4),
    "wer": ("speech WER %", 1),
    "speech_fad": ("speech FAD", 2),
    "audio_fad": ("audio FAD", 2),
    "speech_mos": ("speech MOS", 2),
    "audio_mos": ("audio MOS", 2),
    "steps_to_target": ("steps to FAD", 0),
    "seconds_to_target": ("seconds to FAD", 0),
    "gain": ("gain %", 1),
}


def read_run(path: Path, fad_target: float | None) -> dict[str, float]:
    """The columns of one evaluated run; what was not measured is not there."""
    result = read_eval(path)
    row = {f"held_out_{name}": value for name, value in result["held_out_fm"].items()}
    row["wer"] = 100 * result["wer"]["generated"]
    row |= {f"{name}_fad": result["fad"][name]["generated"] for name in DOMAINS if "fad" in result}
    curve = [r for r in read_csv(path / "evals.csv") if r.get("speech_fad")]
    reached = [r for r in curve if fad_target is not None and float(r["speech_fad"]) <= fad_target]
    if reached and len(curve) > 1:  # a single evaluation at the end says nothing about when
        row |= {"steps_to_target": float(reached[0]["step"]), "seconds_to_target": float(reached[0]["seconds"])}
    return {k: v for k, v in row.items() if np.isfinite(v)}


def measured_with(result: dict) -> dict:
    """What the numbers of eval.json depend on besides the run, as far as it was recorded; seed and sigma aside, which
    are a draw and the run's own."""
    found = {k: result.get(k) for k in ("data", "vocoder", "asr")}
    found |= {"fad_model": result.get("fad", {}).get("model"), "WER clips": result["wer"].get("clips")}
    found |= {k: v for k, v in result.get("sampler", {}).items() if k not in ("seed", "sigma")}
    return {k: v for k, v in found.items() if v is not None}


def refuse_unlike(paths: Sequence[Path]) -> None:
    """Raises ValueError when two runs were not measured alike."""
    seen: dict[str, tuple] = {}
    for path in paths:
        for key, value in measured_with(read_eval(path)).items():
            theirs, other = seen.setdefault(key, (value, path))
            if value != theirs:
                raise ValueError(
                    f"{path} was evaluated with {key}={value}, {other} with {theirs}: run evaluate.py --ckpt on one of "
                    f"them again, with the settings of the other"
                )


def compare(paths: Sequence[Path], fad_target: float | None = None, mos: dict | None = None) -> dict[str, dict]:
    """{name: {column: (mean, standard error or None, n)}} over the seeds of each run NAME_sSEED.

    "gain" is how much lower the speech FAD is than that of the run named none, in percent; the default of fad_target is
    the FAD of none. `mos` is what mean_scores gives for the run directories' names. A column that one seed of a run
    lacks stays empty: a mean over some of the seeds would compare unlike with like. Raises ValueError for runs that
    were not measured alike.
    """
    refuse_unlike(paths)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"_s\d+$", "", path.name), []).append(path)
    if fad_target is None and "none" in groups:
        fads = [read_run(p, None).get("speech_fad") for p in groups["none"]]
        fad_target = float(np.mean(fads)) if None not in fads else None
    rows = {}
    for name, members in groups.items():
        runs = [read_run(p, fad_target) for p in members]
        for run, path in zip(runs, members, strict=True):
            run |= {f"{domain}_mos": score[0] for domain, score in (mos or {}).get(path.name, {}).items()}
        rows[name] = {}
        for column in COLUMNS:
            values = [r[column] for r in runs if column in r]
            if len(values) == len(runs):
                rows[name][column] = (float(np.mean(values)), standard_error(values), len(values))
    base = rows.get("none", {}).get("speech_fad")
    for row in rows.values():
        if base and "speech_fad" in row:
            row["gain"] = (100 * (1 - row["speech_fad"][0] / base[0]), None, row["speech_fad"][2])
    return rows


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None of a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def with_error(mean: float, error: float | None, digits: int) -> str:
    """ "12.0 ± 2.0", or the mean alone."""
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def comparison_table(rows: dict[str, dict]) -> str:
    """The comparison as an aligned Markdown table; an empty cell was not measured."""
    table = [["run", "seeds", *(heading for heading, _ in COLUMNS.values())]]
    for name, row in rows.items():
        seeds = max((n for _, _, n in row.values()), default=0)
        cells = [with_error(*row[c][:2], digits) if c in row else "" for c, (_, digits) in COLUMNS.items()]
        table.append([name, str(seeds), *cells])
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    table.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in table)


def convergence_figure(paths: Sequence[Path], out: Path) -> None:
    """Held-out loss and speech FAD against steps, a line a run; written to `out`."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    panels = (("log.csv", "held_out_speech", "held-out FM loss, speech"), ("evals.csv", "speech_fad", "speech FAD"))
    colours = plt.get_cmap("tab20").colors
    for ax, (file, column, title) in zip(axes, panels, strict=True):
        for k, path in enumerate(paths):
            rows = [r for r in read_csv(path / file) if r.get(column)]
            x, y = [int(r["step"]) for r in rows], [float(r[column]) for r in rows]
            ax.plot(x, y, ".-", label=path.name, linewidth=1, color=colours[k % len(colours)])
        ax.set(title=title, xlabel="step")
    axes[0].legend(fontsize=7)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def pyplot():
    """matplotlib.pyplot that writes files and opens no window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# ---- listening test


def listening_test(systems: dict[str, dict[str, np.ndarray]], out: Path, seed: int = 0) -> dict[str, dict]:
    """Writes out/listening.html, which plays every clip of every system under a blind name, and out/key.json, which
    tells them apart and stays with whoever runs the test. `systems`: {system: {"speech_0012": waveform (L,)}}. Returns
    the key, {item: {"system", "domain", "clip"}}. Raises ValueError unless all systems have the same clips."""
    clips = [set(waves) for waves in systems.values()]
    if not clips or not clips[0] or any(c != clips[0] for c in clips):
        raise ValueError("the systems of a listening test need the same clips: evaluate all runs on the same data")
    key, items = {}, []
    for system, waves in systems.items():
        for clip, wav in waves.items():
            item = hashlib.sha256(f"{seed}/{system}/{clip}".encode() + wav.tobytes()).hexdigest()[:12]
            key[item] = {"system": system, "domain": clip.split("_")[0], "clip": clip}
            items.append({"id": item, "kind": key[item]["domain"], "src": data_uri(wav)})
    items.sort(key=lambda item: item["id"])  # the file's order says nothing about systems either
    test = hashlib.sha256("".join(key).encode()).hexdigest()[:12]
    page = LISTENING_PAGE.replace("@TEST@", test).replace("@ITEMS@", json.dumps(items))
    out.mkdir(parents=True, exist_ok=True)
    (out / "listening.html").write_text(page)
    (out / "key.json").write_text(json.dumps(key, indent=1))
    return key


def data_uri(wav: np.ndarray) -> str:
    """A waveform (L,) as a FLAC data URI, a third smaller than wav and the same sound."""
    file = io.BytesIO()
    audio.write(file, wav, kind="FLAC")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()


def read_ratings(paths: Sequence[Path], key: dict[str, dict]) -> list[dict]:
    """Ratings of the page's CSV files: [{"rater", "system", "domain", "clip", "rating"}]. A rater's later rating of the
    same item replaces an earlier one. Raises ValueError, naming file and line, for anything that is not a rating."""
    ratings = {}
    for path in paths:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if not {"rater", "item", "rating"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{path}: expected the columns rater, item, rating, as listening.html exports them")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if row["item"] not in key:
                    raise ValueError(f"{where}: item {row['item']!r} is not in the key: pass this test's --mos_key")
                if row["rating"] not in ("1", "2", "3", "4", "5"):
                    raise ValueError(f"{where}: rating {row['rating']!r} is not 1, 2, 3, 4 or 5")
                found = {"rater": row["rater"], "rating": int(row["rating"])}
                ratings[row["rater"], row["item"]] = key[row["item"]] | found
    return list(ratings.values())


def mean_scores(ratings: list[dict]) -> dict[str, dict[str, tuple]]:
    """MOS over all ratings: {system: {domain: (mean, standard error or None, n)}}."""
    groups: dict = {}
    for r in ratings:
        groups.setdefault(r["system"], {}).setdefault(r["domain"], []).append(r["rating"])
    return {
        system: {d: (float(np.mean(v)), standard_error(v), len(v)) for d, v in sorted(domains.items(), reverse=True)}
        for system, domains in groups.items()
    }


def paired_tests(ratings: list[dict]) -> list[tuple[str, str, str, float, float, int]]:
    """Paired two-sided t-tests between systems, (domain, a, b, mean a - b, p, clips), on the scores of clips averaged
    over raters first, because one listener's ratings are not independent samples (appendix C). Pairs with fewer than
    two clips in common are left out."""
    groups: dict = {}
    for r in ratings:
        groups.setdefault((r["domain"], r["system"]), {}).setdefault(r["clip"], []).append(r["rating"])
    tests = []
    for domain in DOMAINS:
        for a, b in itertools.combinations(sorted({s for d, s in groups if d == domain}), 2):
            x, y = groups[domain, a], groups[domain, b]
            common = sorted(set(x) & set(y))
            if len(common) > 1:
                means = [[float(np.mean(side[clip])) for clip in common] for side in (x, y)]
                difference = np.subtract(*means)
                p = float(scipy.stats.ttest_rel(*means).pvalue) if difference.std() else float(difference.mean() == 0)
                tests.append((domain, a, b, float(difference.mean()), p, len(common)))
    return tests


def mos_table(ratings: list[dict]) -> str:
    """Mean ± standard error per system, and the paired tests."""
    lines = [f"{'MOS':24s}" + "".join(f"{d:>22s}" for d in DOMAINS)]
    for system, scores in sorted(mean_scores(ratings).items()):
        cells = [f"{with_error(*scores[d][:2], 2)} (n {scores[d][2]})" if d in scores else "" for d in DOMAINS]
        lines.append(f"{system:24s}" + "".join(f"{cell:>22s}" for cell in cells))
    for domain, a, b, difference, p, n in paired_tests(ratings):
        lines.append(f"{domain}: {a} - {b} = {difference:+.2f}, paired t-test over {n} clips p = {p:.3g}")
    return "\n".join(lines)


# ---- a run's page


def index_page(run: Path, table: str, clips: dict[str, tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Writes run/index.html: samples with players and mel pictures, the probe figure, loss curves and `table`.

    `clips`: {"speech_0012": (text, original, generated)}, waveforms (L,), one row each; the generated ones lie in
    run/samples already, the originals and the pictures are put beside them.
    """
    plt, result, rows = pyplot(), read_eval(run), []
    heard = {f"{DOMAINS[0]}_{u['id']:04d}": u for u in result["wer"]["utterances"]["generated"]}
    for clip, (text, *waves) in clips.items():
        audio.write(run / "samples" / f"{clip}.original.wav", waves[0])
        fig, axes = plt.subplots(1, 2, figsize=(7, 1.6), layout="constrained", sharey=True)
        for ax, wav in zip(axes, waves, strict=True):
            mel = audio.log_mel(torch.from_numpy(wav)).T.numpy()
            ax.imshow(mel, aspect="auto", origin="lower", cmap="magma", vmin=-8, vmax=2)
            ax.axis("off")
        fig.savefig(run / "samples" / f"{clip}.png", dpi=80)
        plt.close(fig)
        text += f" (heard as: {heard[clip]['heard']})" if clip in heard else ""
        rows.append(SAMPLE_ROW.format(clip=clip, text=html.escape(text)))
    curves(run)
    pictures = [name for name in ("probe.png", "curves.png") if (run / name).exists()]
    page = INDEX_PAGE.format(
        name=html.escape(run.name),
        step=result["step"],
        table=html.escape(table),
        pictures="".join(f'<img src="{name}" alt="{name}">' for name in pictures),
        samples="\n".join(rows),
    )
    (run / "index.html").write_text(page)


def curves(run: Path) -> None:
    """Losses against steps from log.csv, written to run/curves.png."""
    plt, rows = pyplot(), read_csv(run / "log.csv")
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
    panels = (("fm", "held_out_speech", "held_out_audio"), ("bitc",), ("align",))
    for ax, columns in zip(axes, panels, strict=True):
        for column in columns:
            points = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
            ax.plot([x for x, _ in points], [y for _, y in points], label=column, linewidth=1)
        switch = next((int(r["step"]) for r in rows if r["phase"] == "2"), None)
        if switch:
            ax.axvline(switch, color="grey", linestyle=":", label="phase II")
        ax.set(xlabel="step")
        ax.legend(fontsize=8)
    fig.savefig(run / "curves.png", dpi=90)
    plt.close(fig)


STYLE = """<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
pre { overflow-x: auto } img { max-width: 100%; background: white } td { padding: .3rem .6rem .3rem 0 }
button { font: inherit; padding: .5rem 1rem; margin: .2rem } button[aria-pressed=true] { outline: 3px solid #27c }
audio { width: 15rem } .scale { display: flex; flex-wrap: wrap }
</style>"""

SAMPLE_ROW = """<tr><td>{clip}<br><small>{text}</small></td>
<td><audio controls preload="none" src="samples/{clip}.original.wav"></audio></td>
<td><audio controls preload="none" src="samples/{clip}.wav"></audio></td>
<td><img src="samples/{clip}.png" alt="mel of the original and of the generated clip" loading="lazy"></td></tr>"""

INDEX_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
    + STYLE.replace("{", "{{").replace("}", "}}")
    + """
<h1>{name}, step {step}</h1>
<pre>{table}</pre>
{pictures}
<h2>Held-out clips</h2>
<table><tr><th></th><th>original</th><th>generated</th><th>mel: original, generated</th></tr>
{samples}
</table></html>
"""
)

LISTENING_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>Listening test</title>'
    + STYLE
    + """
<h1>Listening test</h1>
<p><label>Your name or initials <input id="rater" autocomplete="off"></label></p>
<p>Listen to each clip, with headphones if you have them, and rate how natural it sounds. Keys: 1 to 5 rate, space
plays, arrows move. Your answers stay in this browser until you export them.</p>
<p id="where" role="status"></p>
<p><audio id="player" controls></audio></p>
<div class="scale" id="scale" role="group" aria-label="rating"></div>
<p><button id="back">← Back</button><button id="next">Next →</button><button id="export">Export CSV</button></p>
<script type="application/json" id="items">@ITEMS@</script>
<script>
const items = JSON.parse(document.getElementById('items').textContent);
const store = 'listening-@TEST@', $ = id => document.getElementById(id);
const words = ['', 'Bad', 'Poor', 'Fair', 'Good', 'Excellent'];
let state = JSON.parse(localStorage.getItem(store) || 'null');
if (!state) {
  const order = items.map((_, i) => i);
  for (let i = order.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  state = { order, at: 0, rater: '', ratings: {} };
}
const item = () => items[state.order[state.at]];
function save() { localStorage.setItem(store, JSON.stringify(state)); show(); }
function show() {
  const done = Object.keys(state.ratings).length;
  $('where').textContent = `Clip ${state.at + 1} of ${items.length} (${item().kind}); ${done} rated` +
    (done === items.length ? '. Thank you: export your ratings and send the file back.' : '');
  if ($('player').dataset.id !== item().id) { $('player').src = item().src; $('player').dataset.id = item().id; }
  [...$('scale').children].forEach((b, i) => b.setAttribute('aria-pressed', state.ratings[item().id] === i + 1));
}
function rate(n) { state.ratings[item().id] = n; save(); }
function move(n) { state.at = Math.min(items.length - 1, Math.max(0, state.at + n)); save(); }
for (let n = 1; n <= 5; n++) {
  const b = document.createElement('button');
  b.textContent = `${n} ${words[n]}`; b.id = 'rate' + n; b.onclick = () => rate(n);
  $('scale').append(b);
}
$('back').onclick = () => move(-1);
$('next').onclick = () => move(1);
$('rater').value = state.rater;
$('rater').oninput = () => { state.rater = $('rater').value; save(); };
$('export').onclick = () => {
  if (!state.rater.trim()) { alert('Please enter your name or initials first.'); $('rater').focus(); return; }
  const quoted = '"' + state.rater.trim().replaceAll('"', '""') + '"';
  const lines = ['rater,item,rating', ...Object.entries(state.ratings).map(([id, n]) => `${quoted},${id},${n}`)];
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([lines.join('\\n') + '\\n'], { type: 'text/csv' }));
  link.download = 'ratings_' + state.rater.trim().replace(/[^a-z0-9]+/gi, '_') + '.csv';
  link.click();
};
document.onkeydown = e => {
  if (e.target.tagName === 'INPUT' || e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key >= '1' && e.key <= '5') rate(+e.key);
  else if (e.key === 'ArrowLeft') move(-1);
  else if (e.key === 'ArrowRight') move(1);
  else if (e.key === ' ' && e.target.tagName !== 'BUTTON') {
    if ($('player').paused) $('player').play(); else $('player').pause();
  }
  else return;
  e.preventDefault();
};
show();
</script></html>
"""
)
