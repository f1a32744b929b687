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
import report


def result_of(speech_fad=10.0, wer=0.1, loss=0.2) -> dict:
    """What eval.json holds of a run."""
    heard = {"original": [], "vocoded": [], "generated": [{"id": 3, "text": "a <b>", "heard": "a & b", "wer": 0.5}]}
    wers = {"clips": 3, "words": 17, "original": 0.01, "vocoded": 0.0625, "generated": wer, "utterances": heard}
    wers["interval"] = {"generated": [0.4, 0.6]}
    clips = [{"id": 3, "domain": "speech", "wer": 0.5, "words": 4, "mcd": 6.5, "cosine": 0.5}]
    fad = {"clips": 7, "original": 10.0, "vocoded": 11.0, "from text": 13.0}
    systems = ("original", "vocoded", "generated", "from text")
    fad |= {"terms": {s: [2.5, 7.5] for s in systems}, "kad": dict.fromkeys(systems, 1.25)}
    fad["kad_interval"] = {s: [0.75, 2.0] for s in systems}
    fads = {"model": "yamnet", "speech": fad | {"generated": speech_fad}, "audio": fad | {"generated": 5.0}}
    used = {
        "vocoder": "griffin_lim",
        "asr": "demo",
        "data": "abcd",
        "clip_seed": 0,
        "sampler": {"nfe": 16, "cfg_scale": 2.0, "seed": 1},
    }
    numbers = {"step": 100, "real_time_factor": 0.5, "held_out_fm": {"speech": loss, "audio": 2 * loss}}
    return numbers | used | {"wer": wers, "fad": fads, "clips": {"vocoded": clips, "generated": clips}}


def make_run(path: Path, speech_fad=10.0, wer=0.1, curve=(), loss=0.2, **changed) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "eval.json").write_text(json.dumps(result_of(speech_fad, wer, loss) | changed))
    lines = [f"{step},{step / 2},{fad}" for step, fad in curve]
    (path / "evals.csv").write_text("\n".join(["step,seconds,speech_fad", *lines]) + "\n")
    (path / "log.csv").write_text(f"step,phase,fm,bitc,align,held_out_speech\n1,1,0.5,1,,\n2,2,0.4,1,0.3,{loss}\n")
    return path


def test_compare_by_hand(tmp_path):
    runs = [
        make_run(tmp_path / "none_s0", 10, 0.10, [(50, 12), (100, 10)]),
        make_run(tmp_path / "none_s1", 14, 0.20, [(50, 15), (100, 14)]),
        make_run(tmp_path / "agrepa_s0", 8, 0.05, [(50, 11), (100, 8)]),
        make_run(tmp_path / "agrepa_s1", 10, 0.05, [(50, 13), (100, 10)]),
    ]
    rows = report.compare(runs, None, {"none_s0": {"speech": (3.0, 0.1, 9)}})
    assert list(rows) == ["none", "agrepa"]
    mean, error, n = rows["none"]["speech_fad"]
    assert (mean, n) == (12, 2) and error == pytest.approx(np.sqrt(8) / np.sqrt(2))
    assert rows["none"]["wer"][0] == pytest.approx(15) and rows["none"]["held_out_audio"][0] == pytest.approx(0.4)
    # the target is none's mean, 12: agrepa reaches it at 50 and 100; one seed of none never does, so none is empty
    assert rows["agrepa"]["steps_to_target"][0] == 75 and rows["agrepa"]["seconds_to_target"][0] == 37.5
    assert rows["agrepa"]["gain"][0] == pytest.approx(25) and rows["none"]["gain"][0] == 0
    assert not {"steps_to_target", "speech_mos"} & set(rows["none"])  # one seed of two was heard
    table = report.comparison_table(rows).splitlines()
    assert len({len(line) for line in table}) == 1 and len(table) == 4
    cells = [c.strip() for c in table[2].split("|")][1:-1]
    assert cells == ["none", "2", "0.2000 ± 0.0000", "0.4000 ± 0.0000", "15.0 ± 5.0", "12.00 ± 2.00", "5.00 ± 0.00",
                     "1.25 ± 0.00", "1.25 ± 0.00", "", "", "", "", "0.0"]  # fmt: skip


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


def test_interval_of_one_seed_is_the_paired_t_test(rng):
    d = rng.normal(0.3, 1, 24)
    expected = scipy.stats.ttest_1samp(d, 0).confidence_interval()
    assert report.paired_interval(d[None]) == pytest.approx([d.mean(), expected.low, expected.high])
    trainings = np.repeat(rng.normal(size=(4, 1)), 24, 1)  # nothing but how trainings went
    expected = scipy.stats.ttest_1samp(trainings[:, 0], 0).confidence_interval()
    assert report.paired_interval(trainings)[1:] == pytest.approx([expected.low, expected.high])
    assert report.paired_interval(np.zeros((1, 5))) == [0, 0, 0]


def test_differences_are_paired_by_clip_and_seed(rng, tmp_path):
    level = rng.normal(8, 3, 12)
    runs = []
    for name, seed in itertools.product(("none", "foga"), (0, 1)):
        mcd = level + 0.5 * seed + (name == "foga") * (rng.normal(0, 0.01, 12) - 0.25)  # level and seed cancel
        rows = [{"id": i, "domain": "audio", "mcd": m, "cosine": 0.5} for i, m in enumerate(mcd)]
        runs.append(make_run(tmp_path / f"{name}_s{seed}", clips={"generated": rows[:: (-1) ** seed]}))
    runs.append(make_run(tmp_path / "lasp_s7"))  # none has no seed 7
    found = report.differences(runs)
    assert list(found) == ["foga"] and found["foga"]["audio MCD, dB"] == pytest.approx([-0.25] * 3, abs=0.05)
    lines = report.differences_table(found).splitlines()
    cells = [c.strip() for c in lines[2].split("|")][1:-1]
    assert lines[0].count("|") == 4 and cells[0] == "foga" and cells[2] == "+0.000 [0.000 0.000]"
    assert re.fullmatch(r"\*\*-0\.2\d\d \[-0\.2\d\d -0\.2\d\d\]\*\*", cells[1])
    assert report.differences_table(report.differences(runs[:2])) == ""


def test_one_evaluation_says_nothing_about_when(tmp_path):
    row = report.compare([make_run(tmp_path / "a_s0", curve=[(100, 10)])], 50, {"a_s0": {"audio": (3.5, None, 4)}})["a"]
    assert "steps_to_target" not in row and row["audio_mos"] == (3.5, None, 1)


def test_what_was_not_measured_stays_empty(tmp_path):
    run = make_run(tmp_path / "lasp_s0", wer=float("nan"))
    (run / "eval.json").write_text(json.dumps({k: v for k, v in report.read_eval(run).items() if k != "fad"}))
    rows = report.compare([run, make_run(tmp_path / "foga_s0")])  # and is nothing that runs could differ in
    assert sorted(rows["lasp"]) == ["held_out_audio", "held_out_speech"] and "speech_fad" in rows["foga"]


CHANGES = {"fad_model": {"fad": {"model": "vggish"}}, "vocoder": {"vocoder": "v"}, "asr": {"asr": "pocketsphinx"}}
CHANGES |= {"data": {"data": "0123"}, "clip_seed": {"clip_seed": 1}, "nfe": {"sampler": {"nfe": 8, "cfg_scale": 2.0}}}


@pytest.mark.parametrize("key", CHANGES)
def test_runs_measured_unlike_are_not_compared(tmp_path, key):
    runs = [make_run(tmp_path / "a_s0"), make_run(tmp_path / "b_s0", sampler={"nfe": 16, "cfg_scale": 2.0, "seed": 2})]
    report.compare(runs)
    make_run(runs[1], **CHANGES[key])
    with pytest.raises(ValueError, match=f"b_s0 was evaluated with {key}=.*a_s0 with "):
        report.compare(runs)


def test_a_damaged_result_is_named(tmp_path):
    (make_run(tmp_path / "a_s0") / "eval.json").write_text("{")
    with pytest.raises(ValueError, match="eval.json is not JSON"):
        report.compare([tmp_path / "a_s0"])


@pytest.fixture
def systems(rng) -> dict[str, dict[str, np.ndarray]]:
    clips = ["speech_0001", "speech_0002", "audio_0007"]
    return {s: {c: rng.uniform(-0.5, 0.5, 3000).astype(np.float32) for c in clips} for s in ("none_s0", "secret_s0")}


def test_the_page_is_blind_and_holds_every_sound(systems, tmp_path):
    key = report.listening_test(systems, tmp_path)
    page = (tmp_path / "listening.html").read_text()
    assert "secret" not in page and "none_s0" not in page and "speech_0001" not in page
    items = json.loads(re.search(r'<script type="application/json" id="items">(.*?)</script>', page, re.S)[1])
    assert {i["id"] for i in items} == set(key) and len(items) == 6
    assert json.loads((tmp_path / "key.json").read_text()) == key
    for item in items:
        where = key[item["id"]]
        kind, data = item["src"].split(",")
        wav, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:audio/flac;base64" and rate == audio.SAMPLE_RATE and item["kind"] == where["domain"]
        np.testing.assert_allclose(wav, systems[where["system"]][where["clip"]], atol=1 / 2**15)
    assert not re.search(r"(src|href)=\"?https?:", page)  # self-contained


def test_systems_need_the_same_clips(systems, tmp_path):
    del systems["none_s0"]["audio_0007"]
    with pytest.raises(ValueError, match="same clips"):
        report.listening_test(systems, tmp_path)
    assert not list(tmp_path.iterdir())


DOMAIN = {c: "speech" if c < 4 else "audio" for c in range(6)}
KEY = {f"{s}{c}": {"system": s, "domain": d, "clip": f"clip{c}"} for s in "ab" for c, d in DOMAIN.items()}


def write_ratings(path: Path, rows: list[str], columns: str = "rater,item,rating") -> Path:
    path.write_text("\n".join([columns, *rows, ""]))
    return path


def test_scores_against_scipy(rng, tmp_path):
    given = {(r, i): int(rng.integers(1, 6)) for r in "xyz" for i in KEY}
    rows = {r: [f"{r},{i},{n}" for (q, i), n in given.items() if q == r] for r in "xyz"}
    paths = [write_ratings(tmp_path / f"{r}.csv", rows[r]) for r in rows]
    ratings = report.read_ratings(paths, KEY)
    scores = report.mean_scores(ratings)
    for system in "ab":
        values = [given[r, f"{system}{c}"] for c in range(4) for r in "xyz"]
        mean, error, n = scores[system]["speech"]
        assert (mean, n) == (pytest.approx(np.mean(values)), 12) and error == pytest.approx(scipy.stats.sem(values))
    tests = {(d, a, b): rest for d, a, b, *rest in report.paired_tests(ratings)}
    assert set(tests) == {("speech", "a", "b"), ("audio", "a", "b")}
    means = [[np.mean([given[r, f"{s}{c}"] for r in "xyz"]) for c in range(4)] for s in "ab"]
    difference, p, n = tests["speech", "a", "b"]
    expected = scipy.stats.ttest_rel(*means).pvalue
    assert n == 4 and difference == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    assert p == pytest.approx(expected if np.ptp(np.subtract(*means)) else float(difference == 0))
    assert f"n {3 * 4}" in report.mos_table(ratings) and "over 4 clips" in report.mos_table(ratings)


def test_equal_and_single_scores():
    ratings = [KEY[i] | {"rater": "x", "rating": n} for i, n in (("a0", 3), ("b0", 3), ("a1", 4), ("b1", 4))]
    assert report.paired_tests(ratings) == [("speech", "a", "b", 0, 1, 2)]
    assert report.paired_tests(ratings[:2]) == []
    assert report.mean_scores(ratings[:1]) == {"a": {"speech": (3, None, 1)}}


def test_a_later_rating_replaces_an_earlier_one(tmp_path):
    path = write_ratings(tmp_path / "r.csv", ["x,a0,1", "x,a0,5", "y,a0,3"])
    assert [r["rating"] for r in report.read_ratings([path], KEY)] == [5, 3]


BAD = {"x,a0,1\nx,zz,3": "line 3: item 'zz'", "x,a0,1\nx,a1,6": "line 3: rating '6' is not", "": "expected the columns"}


@pytest.mark.parametrize("rows", BAD)
def test_what_is_no_rating_is_named(tmp_path, rows):
    path = write_ratings(tmp_path / "r.csv", [rows], "rater,item,rating" if rows else "a,b")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{BAD[rows]}"):
        report.read_ratings([path], KEY)


def test_rate_reload_export_score_in_a_browser(systems, tmp_path):
    """The page as a listener uses it, in headless Chromium: keys and buttons, a reload half-way, export, scoring."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not Path("/usr/bin/chromedriver").exists():
        pytest.skip("no /usr/bin/chromedriver (Debian packages chromium and chromium-driver)")
    key = report.listening_test(systems, tmp_path)
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
        for n in range(6):
            rating = seen[find("player").get_attribute("data-id")] = 1 + n % 5
            find(f"rate{rating}").click() if n % 2 else keys(str(rating))
            assert find(f"rate{rating}").get_attribute("aria-pressed") == "true"
            if n < 5:
                keys("\ue014")  # right arrow
            if n == 2:
                browser.refresh()
                assert "3 rated" in find("where").text and "Clip 4 of 6" in find("where").text
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
    assert set(report.mean_scores(ratings)) == {"none_s0", "secret_s0"}


def test_table_holds_every_number():
    result = result_of(speech_fad=12.0, wer=0.5, loss=0.1234)
    text = report.score_table(result)
    for part in ("1.0      6.2       50.0      [40.0 60.0]", "n 3 (17 words)", "10.00    11.00      12.00", "0.1234",
                 "7.50     7.50       7.50\n", "1.25     1.25       1.25      [0.75 2.00]", "6.50"):  # fmt: skip
        assert part in text, text
    assert "warning" not in text
    result["fad"]["is_teacher"] = True
    assert "warning: yamnet taught this run" in report.score_table(result)
    result["wer"] |= {"from text": 0.75, "utterances": result["wer"]["utterances"] | {"from text": []}}
    lines = report.score_table(result).splitlines()
    assert "from text" in lines[0] and "75.0" in lines[1] and lines[2].endswith("13.00")
    assert max(map(len, lines[:-1])) <= 120
    del result["fad"]
    assert "FAD" not in report.score_table(result)


def test_every_link_of_the_page_is_there(rng, tmp_path):
    run = make_run(tmp_path / "demo", asr="WER < 5 & more")
    clips = {
        c: ("a <b> $clip", *rng.normal(0, 0.1, (2, 6000)).astype(np.float32)) for c in ("speech_0003", "audio_0001")
    }
    (run / "samples").mkdir()
    for clip, (_, _, generated) in clips.items():
        audio.write(run / "samples" / f"{clip}.wav", generated)
    report.index_page(run, report.read_eval(run), clips)
    page = (run / "index.html").read_text()
    links = re.findall(r'src="([^"]+)"', page)
    assert len(links) == 3 * 2 + 1 and all((run / link).stat().st_size > 0 for link in links)
    assert "WER &lt; 5 &amp; more" in page and "a &lt;b&gt; $clip" in page and "a &amp; b" in page
    original = soundfile.read(run / "samples" / "speech_0003.original.wav")[0]
    np.testing.assert_allclose(original, clips["speech_0003"][1], atol=1 / 2**15)
