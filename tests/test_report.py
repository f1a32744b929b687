"""report.py: the comparison by hand, scores against scipy on loops of their own, pages read back, one in a browser."""

import base64
import io
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import soundfile

import audio
import evaluate
import report


def result_of(speech_fad=10.0, wer=0.1, loss=0.2) -> dict:
    """What eval.json holds of a run."""
    heard = {"original": [], "vocoded": [], "generated": [{"id": 3, "text": "a <b>", "heard": "a & b", "wer": 0.5}]}
    wers = {"clips": 3, "words": 17, "original": 0.01, "vocoded": 0.0625, "generated": wer, "utterances": heard}
    wers |= {"cer": {}, "interval": {"generated": [0.4, 0.6]}}
    clips = [
        {"id": 3, "domain": "speech", "wer": 0.5, "words": 4, "mcd": 6.5, "cosine": 0.5, "fm": loss, "mine": 0.125},
        {"id": 4, "domain": "audio", "fm": 2 * loss - 0.01},
        {"id": 5, "domain": "audio", "fm": 2 * loss + 0.01},
    ]
    fad = {"clips": 7, "original": 10.0, "vocoded": 11.0, "from text": 13.0}
    systems = ("original", "vocoded", "generated", "from text")
    fad |= {"terms": {s: [2.5, 7.5] for s in systems}, "kad": dict.fromkeys(systems, 1.25)}
    fad |= {k: {s: [0.75, 2.0] for s in systems} for k in ("interval", "kad_interval")}
    fads = {"model": "yamnet", "speech": fad | {"generated": speech_fad}, "audio": fad | {"generated": 5.0}}
    used = {"vocoder": "griffin_lim", "asr": "demo", "data": "abcd", "clip_seed": 0, "seeds": 1, "language": "en"}
    used |= {"sampler": {"nfe": 16, "cfg_scale": 2.0, "seed": 1}, "step": 100, "real_time_factor": 0.5}
    return used | {"wer": wers, "fad": fads, "clips": {"vocoded": clips, "generated": clips}}


def make_run(path: Path, speech_fad=10.0, wer=0.1, curve=(), loss=0.2, **changed) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "eval.json").write_text(json.dumps(result_of(speech_fad, wer, loss) | changed))
    lines = [f"{step},{step / 2},{fad}" for step, fad in curve]
    (path / "evals.csv").write_text("\n".join(["step,seconds,speech_fad", *lines]) + "\n")
    (path / "log.csv").write_text(f"step,phase,fm,bitc,align,held_out_speech\n1,1,0.5,1,,\n2,2,0.4,1,0.3,{loss}\n")
    return path


DOMAIN = {c: "speech" if c < 4 else "audio" for c in range(6)}
KEY = {f"{s}{c}": {"system": s, "domain": d, "clip": f"clip{c}"} for s in "ab" for c, d in DOMAIN.items()}
WER = "speech WER %, n 3 (17 words)"


def test_compare_by_hand(tmp_path):
    measured = {"none_s0": (10, 0.10, 12), "none_s1": (14, 0.20, 15)}
    measured |= {"agrepa_s0": (8, 0.05, 11), "agrepa_s1": (10, 0.05, 13)}
    runs = [make_run(tmp_path / name, fad, wer, [(50, at), (100, fad)]) for name, (fad, wer, at) in measured.items()]
    ratings = [KEY["a0"] | {"system": "none_s0", "rater": "x", "rating": 3}]
    rows = report.compare(report.read_runs(runs), None, ratings)
    assert list(rows) == ["none", "agrepa"] and rows["none"]["seeds"] == [2]
    expected = scipy.stats.ttest_1samp([10, 14], 0).confidence_interval()
    assert rows["none"]["speech yamnet-FAD, n 7"] == pytest.approx([12, expected.low, expected.high])
    assert rows["none"][WER][0] == pytest.approx(15) and rows["none"]["audio held-out FM x1000"][0] == pytest.approx(
        400
    )
    # the target is none's mean, 12: agrepa reaches it at 50 and 100; one seed of none never does, so none is empty
    assert rows["agrepa"]["steps to FAD"][0] == 75 and rows["agrepa"]["seconds to FAD"][0] == 37.5
    assert not {"steps to FAD", "speech MOS"} & set(rows["none"])  # one seed of two was heard
    table = report.comparison_table("run", rows).splitlines()
    assert len({len(line) for line in table}) == 1 and len(table) == 4
    cells = [c.strip() for c in table[2].split("|")][1:-1]  # "speech MOS" is nowhere
    fads = "12.00 [-13.41 37.41]", "1.25 [1.25 1.25]", "5.00 [5.00 5.00]", "1.25 [1.25 1.25]"
    losses = "200.00 [200.00 200.00]", "0.12 [0.12 0.12]", "400.00 [400.00 400.00]"
    assert cells == ["none", "2", "15.0 [-48.5 78.5]", *fads, *losses, "", ""]


def test_a_single_seed_has_the_interval_over_its_clips(tmp_path):
    row = report.compare(report.read_runs([make_run(tmp_path / "a_s0")]))["a"]
    half = 10 * scipy.stats.t.ppf(0.975, 1)  # of 390 and 410
    assert row["audio held-out FM x1000"] == pytest.approx([400, 400 - half, 400 + half])
    assert row["speech held-out FM x1000"] == [200] and row[WER] == pytest.approx([10, 40, 60])
    assert row["speech yamnet-FAD, n 7"] == [10, 0.75, 2]


def test_differences_of_systems_alike_but_for_noise(rng):
    """Runs that share clips and differ by noise seed, or in how each training went: of 200 pairs a twentieth is called
    different, and a real effect nearly always. A bootstrap over three seeds calls a fifth of the second kind so."""
    called = {}
    for kind in ("one seed", "clips", "trainings", "effect"):
        called[kind] = 0
        for _ in range(200):
            seeds, words = 1 if kind == "one seed" else 3, rng.integers(4, 20, 24)
            difficulty = rng.beta(1, 4, 24)  # of the clips, for both runs
            wrong = rng.binomial(words, difficulty, (2, seeds, 24)) / words
            d = wrong[0] - wrong[1] + (kind == "trainings") * rng.normal(0, 0.1, (seeds, 1)) + 0.3 * (kind == "effect")
            mean, low, high = report.paired_interval(d, words)
            assert mean == pytest.approx((d * words).sum() / words.sum() / seeds) and low <= mean <= high
            called[kind] += low > 0 or high < 0
    assert called.pop("effect") > 190 and max(called.values()) <= 20, called


def test_missing_cells_and_single_values(rng):
    """Of raters who each heard some clips: the naive sums over the cells that are there."""
    d = rng.normal(3, 1, (6, 9))
    d[rng.random((6, 9)) < 0.3] = np.nan
    mean, low, high = report.paired_interval(d)
    cells = [(i, j, d[i, j] - np.nanmean(d)) for i, j in itertools.product(range(6), range(9)) if np.isfinite(d[i, j])]
    by = [[sum(x for *at, x in cells if at[axis] == k) for k in range(n)] for axis, n in ((0, 6), (1, 9))]
    parts = [sum(x * x for x in sums) / len(cells) ** 2 * n / (n - 1) for sums, n in zip(by, (6, 9), strict=True)]
    assert mean == pytest.approx(np.nanmean(d)) and mean - low == pytest.approx(high - mean)
    least, most = (scipy.stats.t.ppf(0.975, n) * x**0.5 for n, x in ((13, max(parts)), (4, sum(parts))))
    assert least <= high - mean <= most
    assert report.paired_interval(np.array([[7.0]])) == [7]


def test_interval_of_one_seed_is_the_paired_t_test(rng):
    d = rng.normal(0.3, 1, 24)
    expected = scipy.stats.ttest_1samp(d, 0).confidence_interval()
    assert report.paired_interval(d[None]) == pytest.approx([d.mean(), expected.low, expected.high])
    trainings = rng.normal(size=(4, 1))
    expected = scipy.stats.ttest_1samp(trainings[:, 0], 0).confidence_interval()
    for clips in (1, 24):  # nothing but how trainings went
        found = report.paired_interval(np.repeat(trainings, clips, 1))[1:]
        assert found == pytest.approx([expected.low, expected.high])
    assert report.paired_interval(np.zeros((1, 5))) == [0, 0, 0]


def test_differences_are_paired_by_clip_and_seed(rng, tmp_path):
    level = rng.normal(8, 3, 12)
    runs = []
    for name, seed in itertools.product(("none", "foga"), (0, 1)):
        mcd = level + 0.5 * seed + (name == "foga") * (rng.normal(0, 0.001, 12) - 0.25)  # level and seed cancel
        rows = [{"id": i, "domain": "audio", "mcd": m, "cosine": 0.5} for i, m in enumerate(mcd)]
        runs.append(make_run(tmp_path / f"{name}_s{seed}", clips={"generated": rows[:: (-1) ** seed]}))
    runs.append(make_run(tmp_path / "lasp_s7", clips={"generated": rows}))  # none has no seed 7
    found = report.differences(report.read_runs(runs))
    expected = pytest.approx([-0.25] * 3, abs=0.05)
    assert list(found) == ["foga"] and found["foga"]["audio mel-cepstral distance, dB"] == expected
    lines = report.comparison_table("less none, paired", found, True).splitlines()
    cells = [c.strip() for c in lines[2].split("|")][1:-1]
    assert lines[0].count("|") == 4 and cells[0] == "foga" and cells[2] == "+0 [+0 +0]"
    assert re.fullmatch(r"\*\*-0\.2\d* \[-0\.2\d* -0\.2\d*\]\*\*", cells[1])
    assert report.differences(report.read_runs(runs[:2])) == {}


def test_one_evaluation_says_nothing_about_when(tmp_path):
    runs = report.read_runs([make_run(tmp_path / "a_s0", curve=[(100, 10)])])
    ratings = [KEY["a4"] | {"system": "a_s0", "rater": r, "rating": n} for r, n in (("x", 3), ("y", 4))]
    row = report.compare(runs, 50, ratings)["a"]
    assert "steps to FAD" not in row and row["audio MOS"][0] == 3.5


def test_what_was_not_measured_stays_empty(tmp_path):
    run = make_run(tmp_path / "lasp_s0", wer=float("nan"))
    result = json.loads((run / "eval.json").read_text())
    del result["fad"]  # nothing that two runs could differ in
    (run / "eval.json").write_text(json.dumps(result))
    rows = report.compare(report.read_runs([run, make_run(tmp_path / "foga_s0")]))
    shown = ["audio held-out FM x1000", "seeds", "speech held-out FM x1000", "speech mine"]
    assert sorted(rows["lasp"]) == shown and "speech yamnet-FAD, n 7" in rows["foga"]


CHANGES = {"fad_model": {"fad": {"model": "vggish"}}, "vocoder": {"vocoder": "v"}, "asr": {"asr": "pocketsphinx"}}
CHANGES |= {"data": {"data": "0123"}, "clip_seed": {"clip_seed": 1}, "nfe": {"sampler": {"nfe": 8, "cfg_scale": 2.0}}}


@pytest.mark.parametrize("key", CHANGES)
def test_runs_measured_unlike_are_not_compared(tmp_path, key):
    runs = [make_run(tmp_path / "a_s0"), make_run(tmp_path / "b_s0", sampler={"nfe": 16, "cfg_scale": 2.0, "seed": 2})]
    report.read_runs(runs)
    make_run(runs[1], **CHANGES[key])
    with pytest.raises(ValueError, match=f"b_s0 was evaluated with {key}=.*a_s0 with "):
        report.read_runs(runs)


def test_a_damaged_result_is_named(tmp_path):
    for text, problem in (("{", "Expecting"), ('{"wer": 1, "clips": 2}', "of an older evaluate.py")):
        (make_run(tmp_path / "a_s0") / "eval.json").write_text(text)
        with pytest.raises(ValueError, match=f"eval.json is unusable .{problem}.*: run evaluate.py"):
            report.read_runs([tmp_path / "a_s0"])


def test_scores_of_others_stand_beside_ours(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("none_s0", "foga_s0")]
    file = tmp_path / "scores.csv"
    rows = [f"{run.name},audio_000{i},{i + (k and 0.5)}" for k, run in enumerate(runs) for i in (4, 5)]
    file.write_text("\n".join(["run,clip,utmos", *rows, "other_s0,audio_0004,9", "foga_s0,speech_0003,"]))
    found = report.read_runs(runs, scores=str(file))
    row, less = report.compare(found)["foga"], report.differences(found)["foga"]
    assert row["audio utmos"][0] == 5 and less["audio utmos"] == [0.5, 0.5, 0.5] and "speech utmos" not in row
    file.write_text("clip,utmos\naudio_0004,1\n")
    with pytest.raises(ValueError, match="scores.csv: no row of these runs and clips; the columns are run, clip"):
        report.read_runs(runs, scores=str(file))


def test_runs_of_one_name_keep_apart(tmp_path):
    runs = [make_run(tmp_path / table / "none_s0") for table in ("a", "b")]
    labels = [label for group in report.read_runs(runs).values() for label in group]
    assert labels == [str(run) for run in runs]


@pytest.fixture
def systems(rng, tmp_path) -> dict[str, dict[str, np.ndarray]]:
    """Samples of two runs in tmp_path, and their originals."""
    clips, found = ("speech_0001", "speech_0002", "audio_0007"), {}
    for system in ("none_s0", "secret_s0", "original"):
        found[system] = {clip: rng.uniform(-0.5, 0.5, 3000).astype(np.float32) for clip in clips}
    for run, (kind, system) in itertools.product(
        ("none_s0", "secret_s0"), (("generated", ""), ("original", "original"))
    ):
        folder = tmp_path / run / "samples" / kind
        folder.mkdir(parents=True)
        for clip, wav in found[system or run].items():
            audio.write(folder / f"{clip}.wav", wav)
    return found


def make_page(tmp_path: Path) -> dict[str, dict]:
    report.listening_test([str(tmp_path / name) for name in ("none_s0", "secret_s0")], 5, str(tmp_path))
    return json.loads((tmp_path / "key.json").read_text())


def test_the_page_is_blind_and_holds_every_sound(systems, tmp_path):
    key = make_page(tmp_path)
    page = (tmp_path / "listening.html").read_text()
    assert "secret" not in page and "none_s0" not in page and "speech_0001" not in page
    items = json.loads(re.search(r'<script type="application/json" id="items">(.*?)</script>', page, re.S)[1])
    assert {i["id"] for i in items} == set(key) and len(items) == 9
    for item in items:
        where = key[item["id"]]
        kind, content = item["src"].split(",")
        wav, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
        assert kind == "data:audio/wav;base64" and rate == audio.SAMPLE_RATE and item["kind"] == where["domain"]
        np.testing.assert_allclose(wav, systems[where["system"]][where["clip"]], atol=2 / 2**15)
    assert not re.search(r"(src|href)=\"?https?:", page)  # self-contained
    assert "natural" in re.search(r"speech: '(.*)'", page)[1] and "natural" not in re.search(r"audio: '(.*)'", page)[1]


def test_systems_need_the_same_clips(systems, tmp_path):
    (tmp_path / "none_s0/samples/generated/audio_0007.wav").unlink()
    with pytest.raises(ValueError, match="same clips"):
        make_page(tmp_path)
    assert not (tmp_path / "listening.html").exists()


def read(path: Path, *rows: str, columns: str = "rater,item,rating") -> list[dict]:
    path.write_text("\n".join([columns, *rows, ""]))
    return report.read_ratings([path], KEY)


def test_scores_over_raters_and_clips(rng, tmp_path):
    """Raters who differ by a level: its noise is in the scores' interval, not in the differences between systems."""
    given = {(r, i): int(rng.integers(1, 4) + (r == "x") + (i[0] == "b")) for r in "xyz" for i in KEY}
    rows = {r: [f"{r},{i},{n}" for (q, i), n in given.items() if q == r] for r in "xyz"}
    ratings = [rating for r in rows for rating in read(tmp_path / f"{r}.csv", *rows[r])]
    found, text = report.by_rater_and_clip(ratings), report.mos_table(ratings)
    matrix = {s: np.array([[given[r, f"{s}{c}"] for c in range(4)] for r in "xyz"], float) for s in "ab"}
    for system in "ab":
        score = report.paired_interval(found["speech", system])
        assert score == pytest.approx(report.paired_interval(matrix[system]))
        assert score[0] == pytest.approx(matrix[system].mean()) and report.with_interval(score, "MOS") in text
    difference = report.with_interval(report.paired_interval(matrix["a"] - matrix["b"]), "", "+.2f")
    assert f"speech: a - b = {difference}, 3 raters, 4 clips" in text and "audio: a - b" in text
    assert scipy.stats.sem(matrix["a"].ravel()) > 0 and "speech: b - a" not in text


def test_ratings_of_one_rater_repeated_say_no_more():
    """Twelve ratings by one listener who gives each clip a number of its own: the interval is that of four clips."""
    ratings = [KEY[f"a{c}"] | {"rater": r, "rating": 2 + c % 2} for c in range(4) for r in "xyz"]
    expected = scipy.stats.ttest_1samp([2, 3, 2, 3], 0).confidence_interval()
    (matrix,) = report.by_rater_and_clip(ratings).values()
    assert report.paired_interval(matrix) == pytest.approx([2.5, expected.low, expected.high])
    assert "2.00" in report.mos_table(ratings[:1]) and "a - b" not in report.mos_table(ratings)


def test_a_later_rating_replaces_an_earlier_one(tmp_path):
    ratings = read(tmp_path / "r.csv", "x,a0,1", "x,a0,5", "y,a0,3")
    assert [r["rating"] for r in ratings] == [5, 3]


BAD = {"x,a0,1\nx,zz,3": "line 3: item 'zz'", "x,a0,1\nx,a1,6": "line 3: rating '6' is not", "": "expected the columns"}


@pytest.mark.parametrize("rows", BAD)
def test_what_is_no_rating_is_named(tmp_path, rows):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'r.csv'))}.*{BAD[rows]}"):
        read(tmp_path / "r.csv", rows, columns="rater,item,rating" if rows else "a,b")


def test_rate_reload_export_score_in_a_browser(systems, tmp_path):
    """The page as a listener uses it, in headless Chromium: keys and buttons, a reload half-way, export, scoring."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not Path("/usr/bin/chromedriver").exists():
        pytest.skip("no /usr/bin/chromedriver (Debian packages chromium and chromium-driver)")
    key = make_page(tmp_path)
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    browser = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        browser.get((tmp_path / "listening.html").as_uri())
        find = lambda name: browser.find_element("id", name)  # noqa: E731
        keys = lambda text: browser.find_element("tag name", "body").send_keys(text)  # noqa: E731
        seen = {}
        for n in range(9):
            rating = seen[find("player").get_attribute("data-id")] = 1 + n % 5
            find(f"rate{rating}").click() if n % 2 else keys(str(rating))
            assert find(f"rate{rating}").get_attribute("aria-pressed") == "true"
            if n < 8:
                keys("\ue014")  # right arrow
            if n == 2:
                browser.refresh()
                assert "3 rated" in find("where").text and "Clip 4 of 9" in find("where").text
        assert set(seen) == set(key) and "Thank you" in find("where").text
        find("rater").send_keys('J. O\'Neil, "Jo"')
        assert find("player").get_property("error") is None
        find("export").click()
        deadline = time.time() + 10
        while not (files := list(tmp_path.glob("ratings_*.csv"))) and time.time() < deadline:
            time.sleep(0.1)
        ratings = report.read_ratings(files, key)
    finally:
        browser.quit()
    given = {(key[i]["system"], key[i]["clip"]): n for i, n in seen.items()}
    assert {(r["system"], r["clip"]): r["rating"] for r in ratings} == given
    assert {r["rater"] for r in ratings} == {'J. O\'Neil, "Jo"'}
    assert {system for _, system in report.by_rater_and_clip(ratings)} == {"none_s0", "secret_s0", "original"}


def test_table_holds_every_number():
    result = result_of(speech_fad=12.0, wer=0.5, loss=0.1234)
    text = report.score_table(result)
    lines = (
        *("speech WER %, n 3 (17 words) 1.0 6.2 50.0 [40.0 60.0]", "speech: covariances 7.50 7.50 7.50"),
        *("FAD, n 7 10.00 11.00 12.00 [0.75 2.00]", "KAD 1.25 1.25 1.25 [0.75 2.00]", "dB 6.50 6.50"),
        *("audio held-out FM x1000 246.80 246.80 [119.74 373.86]", "speech mine 0.12 0.12", "noise seeds a clip 1,"),
    )
    assert all(line in " ".join(text.split()) for line in lines), text
    assert "warning" not in text
    result["fad"]["is_teacher"] = True
    assert "warning: yamnet taught this run" in report.score_table(result)
    result["wer"] |= {"from text": 0.75, "utterances": result["wer"]["utterances"] | {"from text": []}}
    lines = report.score_table(result).splitlines()
    assert "from text" in lines[0] and "75.0" in lines[1] and "12.00      13.00" in lines[2]
    assert max(map(len, lines[:-1])) <= 120
    del result["fad"]
    assert "FAD" not in report.score_table(result)


def test_every_link_of_the_page_is_there(rng, tmp_path):
    run = make_run(tmp_path / "demo", asr="WER < 5 & more")
    take = lambda domain: evaluate.Take(rng.normal(0, 0.1, 6000).astype(np.float32), domain, "a <b> $clip")  # noqa: E731
    takes = {system: {3: [take(0)], 1: [take(1)]} for system in ("original", "generated")}
    report.write_samples(run / "samples", takes)
    report.index_page(run, report.read_eval(run / "eval.json"), takes)
    page = (run / "index.html").read_text()
    links = re.findall(r'src="([^"]+)"', page)
    assert len(links) == 3 * 2 + 1 and all((run / link).stat().st_size > 0 for link in links)
    assert "WER &lt; 5 &amp; more" in page and "a &lt;b&gt; $clip" in page and "a &amp; b" in page
    original = soundfile.read(run / "samples" / "original" / "speech_0003.wav")[0]
    np.testing.assert_allclose(original, takes["original"][3][0].wav, atol=1 / 2**15)
