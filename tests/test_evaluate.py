"""evaluate.py: the Frechet distance against the textbook formula, the word errors against a count by hand."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch

import data
import evaluate
import report
import train
from common import Machine, read_csv
from evaluate import EvalArgs, frechet_terms
from model import make_xt


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    return sum(frechet_terms(a, b))


def textbook(a: np.ndarray, b: np.ndarray, root: Callable) -> float:
    """|mu_a - mu_b|^2 + Tr(A) + Tr(B) - 2 Tr(root(A, B)), as in the papers."""
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * np.trace(root(A, B)))


@pytest.mark.parametrize("dims, n, m", [(2, 50, 70), (16, 100, 60), (40, 300, 200)])
def test_frechet_distance_equals_the_textbook(rng, dims, n, m):
    mix = rng.normal(size=(dims, dims))
    a, b = rng.normal(size=(n, dims)) @ mix, rng.normal(0.3, 1.5, (m, dims)) @ rng.normal(size=(dims, dims))
    expected = textbook(a, b, lambda A, B: scipy.linalg.sqrtm(A @ B).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    wide = (np.pad(x, ((0, 0), (0, n + m))) for x in (a, b))  # not by the reduced factors of large sets
    assert frechet_distance(*wide) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_terms_in_closed_form(rng):
    """Sets with the same covariance differ by their means alone; a scaled set by (s - 1)^2 of the variance."""
    a, shift = rng.normal(size=(80, 12)), rng.normal(size=12)
    assert frechet_terms(a, a + shift) == pytest.approx(((shift**2).sum(), 0), rel=1e-8, abs=1e-8)
    expected = 4 * (a.mean(0) ** 2).sum(), 4 * a.var(0, ddof=1).sum()
    assert frechet_terms(a, 3 * a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_fewer_samples_than_dimensions(rng):
    a, b = rng.normal(size=(5, 64)), rng.normal(size=(9, 64))
    # exact on the subspace that the samples span: rotating into it changes no distance
    basis = np.linalg.qr(np.concatenate([a, b]).T)[0]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a @ basis, b @ basis), rel=1e-8)

    def root(A: np.ndarray, B: np.ndarray) -> np.ndarray:
        """The eigenvalues of sqrt(A) B sqrt(A), which stay real and non-negative where A is singular."""
        values, vectors = np.linalg.eigh(A)
        half = (vectors * values.clip(0) ** 0.5) @ vectors.T
        return np.diag(np.linalg.eigvalsh(half @ B @ half).clip(0) ** 0.5)

    assert frechet_distance(a, b) == pytest.approx(textbook(a, b, root), rel=1e-5)


@pytest.mark.parametrize("n, dims", [(4, 30), (50, 8)])
def test_frechet_distance_of_equal_sets_is_zero_and_never_negative(rng, n, dims):
    a = rng.normal(100, 1, (n, dims))
    assert 0 <= frechet_distance(a, a) < 1e-8
    assert 0 <= frechet_distance(a, a[::-1].astype(np.float32)) < 1e-4


def clips_of(rng, clips: int, alike: float = 0.0, shift: float = 0.0) -> list[np.ndarray]:
    """One to four patches a clip, in 6 dimensions; patches of a clip share `alike` of their variance."""
    noise = lambda n: rng.normal(size=(n, 6))  # noqa: E731
    return [shift + alike**0.5 * noise(1) + (1 - alike) ** 0.5 * noise(rng.integers(1, 5)) for _ in range(clips)]


def test_kad_equals_a_double_loop(rng, monkeypatch):
    x, y = clips_of(rng, 9, shift=0.7), clips_of(rng, 14)
    rows = np.concatenate(y)
    sigma = np.median([np.linalg.norm(u - v) for i, u in enumerate(rows) for v in rows[i + 1 :]])

    def mean_kernel(a: list, b: list, weights: np.ndarray) -> float:
        """Over pairs of two clips, in lists of their own."""
        total = pairs = 0.0
        for (i, p), (j, q) in itertools.product(enumerate(a), enumerate(b)):
            weight = (weights[i] if a is x else 1) * (weights[j] if b is x else 1)
            for u, v in itertools.product(p, q) if not (a is b and i == j) else ():
                total += weight * math.exp(-((u - v) ** 2).sum() / (2 * sigma**2))
                pairs += weight
        return total / pairs

    def naive(weights: np.ndarray) -> float:
        return 100 * (mean_kernel(x, x, weights) + mean_kernel(y, y, weights) - 2 * mean_kernel(x, y, weights))

    drawn = rng.multinomial(9, np.full(9, 1 / 9), 5)
    monkeypatch.setattr(evaluate.common, "resampled", lambda n, draws: drawn)
    value, *interval = evaluate.kernel_distances({"s": x}, y)["s"]
    assert value == pytest.approx(naive(np.ones(9)), rel=1e-9)
    assert interval == pytest.approx(np.percentile([naive(w) for w in drawn], [2.5, 97.5]), rel=1e-9)


@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_kad_of_two_draws_averages_to_zero(rng, alike):
    """Also where the patches of a clip are alike; the pairs within clips would add several units."""
    draws = ((clips_of(rng, 12, alike), clips_of(rng, 15, alike)) for _ in range(150))
    found = [evaluate.kernel_distances({"s": x}, y)["s"][0] for x, y in draws]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(150) and min(found) < 0 < max(found)
    assert np.std(found) / np.sqrt(150) < 0.3


def test_distances_of_nothing_to_compare_are_not_a_perfect_zero(rng):
    a = rng.normal(size=(10, 4))
    broken = np.where(np.arange(40).reshape(10, 4) == 14, np.nan, a)
    assert all(math.isnan(frechet_distance(*pair)) for pair in ((a, a[:1]), (a[:1], a), (a, broken)))
    assert math.isnan(evaluate.kernel_distances({"s": clips_of(rng, 1)}, clips_of(rng, 5))["s"][0])
    assert np.isnan(evaluate.frechet_interval([a], a)).all()


def test_interval_of_kad_covers_another_draw_and_large_differences_exclude_zero(rng):
    reference = clips_of(rng, 60)
    value, low, high = evaluate.kernel_distances({"s": clips_of(rng, 40, shift=1.0)}, reference)["s"]
    others = [evaluate.kernel_distances({"s": clips_of(rng, 40, shift=1.0)}, reference)["s"][0] for _ in range(60)]
    assert 0 < low < value < high and 0.5 < (high - low) / np.subtract(*np.percentile(others, [97.5, 2.5])) < 2


def test_the_sample_hears_all_speakers():
    """46 speakers one after the other, as LibriSpeech's paths sort them: the first 200 clips are of four."""
    speaker, index = np.repeat(np.arange(46), 60), np.zeros(46 * 60 + 500, [("domain", "i8")])
    index["domain"][46 * 60 :] = 1
    dataset = SimpleNamespace(index=index)
    drawn = evaluate.held_out_sample(dataset, 250, 0)
    assert len(set(drawn.tolist())) == 500 and (index["domain"][drawn] == np.repeat([0, 1], 250)).all()
    assert len(set(speaker[drawn[:250]])) == 46
    assert (evaluate.held_out_sample(dataset, 20, 0)[:20] == drawn[:20]).all()  # more are those few and others
    shorter = SimpleNamespace(index=index[: 46 * 60])  # the order of rows does not depend on what else there is
    assert (evaluate.held_out_sample(shorter, 250, 0) == drawn[:250]).all()
    assert set(evaluate.held_out_sample(dataset, 20, 1)) != set(drawn[:20])


def take(wav=(), domain=0, **found) -> evaluate.Take:
    """With what would be computed already there."""
    made = evaluate.Take(np.asarray(wav, np.float32), domain, found.pop("text", ""))
    made.__dict__ |= found
    return made


def test_mel_cepstral_distance_in_closed_form(rng):
    """A ripple of one cosine over the bins of `size` nepers is size / sqrt(2) in the root mean square; loudness and
    detail finer than 13 coefficients count as nothing."""
    a, bins = torch.from_numpy(rng.normal(size=(7, 100))), (torch.arange(100).double() + 0.5) / 100
    ripple = lambda k: torch.cos(math.pi * k * bins)  # noqa: E731
    distance = lambda b: evaluate.mel_cepstral_distance(take(mel=a), take(mel=b))  # noqa: E731
    for k in (1, 13):
        assert distance(a + 0.3 * ripple(k)) == pytest.approx(8.6858896 * 0.3 / 2**0.5)
    assert distance(a + 2 + ripple(14)) == pytest.approx(0, abs=1e-6)
    half = torch.where(torch.arange(7) < 3, 1.0, 0.0)[:, None] * ripple(2)
    assert distance(a + half) == pytest.approx(3 / 7 * 8.6858896 / 2**0.5)  # frames' mean


def test_f0_error_by_hand():
    a = take(f0=np.array([0, 100, 200, 150, 0.0]))
    b = take(f0=np.array([90, 200, 100, 0, 0, 50.0]))  # an octave up, an octave down, the rest unvoiced in one
    assert evaluate.f0_error(a, b) == pytest.approx(1200) and evaluate.f0_error(a, a) == 0
    assert evaluate.f0_error(a, take(f0=np.zeros(5))) is None
    assert evaluate.f0_error(take(f0=np.ones(5), domain=1), b) is None


def test_f0_of_a_glide():
    """A sawtooth-like voice from 100 to 200 Hz, the same a semitone higher, and too little to say."""
    t = np.arange(36000) / 24000
    voice = lambda up: sum(np.sin(2 * np.pi * k * up * (100 * t + 100 / 3 * t**2)) / k for k in range(1, 9)) / 5  # noqa: E731
    low, high = (take(voice(up)) for up in (1, 2 ** (1 / 12)))
    assert (low.f0 > 0).mean() > 0.9 and evaluate.f0_error(low, high) == pytest.approx(100, abs=3)
    assert evaluate.f0_error(take(np.zeros(300)), take(np.zeros(300))) is None


def test_one_clip_of_two_takes_by_hand(monkeypatch):
    """Their mean, a new score among them, and no cosine without a judge."""
    tone, judged = np.sin(np.arange(9000) / 9).astype(np.float32), {"judge": 1}
    made = take(tone[:8900], patches=np.float32([[2, 0]])), take(tone[::-1] * 0.5, patches=np.eye(2) * 3)
    takes = {"original": {4: [take(tone, patches=np.float32([[1, 0], [1, 0]]), **judged)]}}
    takes |= {"vocoded": {4: [made[0]]}, "generated": {4: list(made)}}
    wer = {"utterances": {"vocoded": [], "generated": [{"id": 4, "wer": e, "words": 4} for e in (0.25, 0.75)]}}
    monkeypatch.setitem(evaluate.SCORES, "mine", lambda original, made: len(original.wav) - len(made.wav))
    found = {s: rows[0] for s, rows in evaluate.score_clips(takes, wer, {4: 0.125}).items()}
    assert found["vocoded"]["cosine"] == pytest.approx(1) and found["vocoded"]["mcd"] < 2
    assert found["vocoded"]["mine"] == 100 and not {"fm", "wer"} & set(found["vocoded"])
    assert found["generated"]["cosine"] == pytest.approx((1 + 0.5**0.5) / 2)
    expected = {"id": 4, "domain": "speech", "wer": 0.5, "words": 4, "fm": 0.125, "mine": 50}
    assert found["generated"] == found["generated"] | expected
    takes["original"][4][0].judge = None
    assert "cosine" not in evaluate.score_clips(takes, wer, {4: 1.0})["vocoded"][0]


def test_interval_of_fad_against_naive_draws(rng, monkeypatch):
    """The draws' spread around the value, against frechet_terms of the drawn patches; few patches and many."""
    for patches, wide in ((3, 20), (9, 6)):
        clips, reference = [rng.normal(size=(patches, wide)) for _ in range(9)], rng.normal(0.2, 1.3, (50, wide))
        drawn = rng.multinomial(9, np.full(9, 1 / 9), 7)
        monkeypatch.setattr(evaluate.common, "resampled", lambda n, draws, drawn=drawn: drawn)
        picked = (np.concatenate([c for c, n in zip(clips, row, strict=True) for _ in range(n)]) for row in drawn)
        naive = np.array([frechet_distance(x, reference) for x in picked])
        expected = frechet_distance(np.concatenate(clips), reference) + np.percentile(naive, [2.5, 97.5]) - naive.mean()
        assert evaluate.frechet_interval(clips, reference) == pytest.approx(expected, rel=1e-6)


def test_interval_of_fad_is_as_wide_as_other_draws_differ(rng):
    reference = np.concatenate(clips_of(rng, 200))
    low, high = evaluate.frechet_interval(clips_of(rng, 40, 0.8, 1.0), reference)
    others = [frechet_distance(np.concatenate(clips_of(rng, 40, 0.8, 1.0)), reference) for _ in range(60)]
    assert 0.5 < (high - low) / np.subtract(*np.percentile(others, [97.5, 2.5])) < 2


def heard_of(texts: dict) -> dict:
    """The originals alone."""
    return {"original": {i: [take(np.zeros(100), text=text)] for i, text in texts.items()}}


def test_words_count_after_normalising():
    """Stage directions and fillers are no words: four words said, or none, of five on paper."""
    texts = {1: "(3 seconds of silence)", 2: "[door slams] hm yes uh", 3: "Please press the pound key"}
    texts[4] = "mm one two three"
    found = evaluate.score_wer(heard_of(texts), Listener())
    assert found["clips"] == 1 and found["words"] == 5 and found["original"] == 1
    assert found["utterances"]["original"][0]["id"] == 3 and found["interval"]["original"] == [1, 1]


SAID = {k: "please press the key " + "again and again " * k for k in range(4)}


def test_interval_of_wer_is_that_of_resampled_clips(monkeypatch):
    monkeypatch.setattr(Listener, "transcribe", lambda *_: [SAID[0], "", SAID[2], ""])
    found = evaluate.score_wer(heard_of(SAID), Listener())
    words, wrong = np.array([4, 7, 10, 13]), np.array([0, 1, 0, 1])
    draws = evaluate.common.resampled(4, evaluate.DRAWS)
    naive = [sum(n * w * e for n, w, e in zip(row, words, wrong, strict=True)) / sum(row * words) for row in draws]
    assert found["original"] == pytest.approx((words * wrong).sum() / words.sum()) and (draws.sum(1) == 4).all()
    assert found["interval"]["original"] == pytest.approx(np.percentile(naive, [2.5, 97.5]))


def test_interval_of_wer_draws_the_takes_of_a_clip_together(monkeypatch):
    """Two takes of each clip, one heard and one not: no draw of clips differs from another."""
    takes = heard_of(SAID) | {"generated": {k: clip * 2 for k, clip in heard_of(SAID)["original"].items()}}
    heard = [text * taken for text in SAID.values() for taken in (0, 1)]
    monkeypatch.setattr(Listener, "transcribe", lambda self, wavs, _: heard[: len(wavs)])
    found = evaluate.score_wer(takes, Listener())
    assert found["generated"] == 0.5 and found["interval"]["generated"] == [0.5, 0.5]
    assert [u["id"] for u in found["utterances"]["generated"]] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_of_sounds_alone_nothing_is_recognised():
    takes = {name: {0: [evaluate.Take(np.zeros(2400, np.float32), 1)]} for name in ("original", "generated")}
    found = evaluate.score_wer(takes, None)
    assert found["clips"] == 0 and found["utterances"] == {"original": [], "generated": []}


def test_word_errors_by_hand():
    references = ["Please, press 1", "You have two new messages.", "Goodbye"]
    hypotheses = ["please press one", "you have new massages", "good bye"]
    corpus, each = evaluate.word_errors(references, hypotheses)
    # nothing; "two" dropped and "messages" wrong: 2 of 5 words; one replaced, one too many: 2 of 1
    assert each == pytest.approx([0, 2 / 5, 2])
    assert corpus == pytest.approx(4 / 9)  # errors over words, not the mean of the utterances
    assert evaluate.word_errors(["press one now please"], [""]) == (1.0, [1.0])
    assert str(evaluate.word_errors([], [])) == "(nan, [])"  # not a perfect zero
    assert evaluate.word_errors(["My favourite colour is grey"], ["my favorite color is gray"])[0] == 0
    with pytest.raises(ValueError):
        evaluate.word_errors(["a b"], [])


SPANISH = ("Marque el número, por favor", "marque el numero por fabor")


@pytest.mark.parametrize("language, count, wer", [("es", 5, 2 / 5), ("zh", 22, 2 / 22)])
def test_other_languages_have_their_normaliser(monkeypatch, language, count, wer):
    """An accent is a letter, and English spellings stay; a language without spaces counts characters as words."""
    asked = []
    text, heard = (t if language == "es" else t.replace(" ", "") for t in SPANISH)
    monkeypatch.setattr(Listener, "transcribe", lambda self, wavs, code: asked.append(code) or [heard])
    found = evaluate.score_wer(heard_of({1: text}), Listener(), language)
    assert asked == [language] and found["words"] == count and found["original"] == pytest.approx(wer)
    assert found["cer"] == ({"original": pytest.approx(2 / 26)} if language == "es" else {})
    assert evaluate.word_errors(["colour"], ["color"], "es")[0] == 1


def test_held_out_losses_are_the_mean_of_a_plain_loop(tiny_config):
    """A clip at a time and in batches: equal but for the noise; and a mean over its valid frames of training's loss."""
    held = data.Dataset(tiny_config.data_dir, "held_out")
    net = train.build_model(tiny_config, held.meta["teachers"]).eval()
    ids = np.array([3, 0, 4])
    found = evaluate.held_out_losses(net, held, ids, 40, 0.5, [5, 6])
    assert set(found) == {0, 3, 4} and found == evaluate.held_out_losses(net, held, ids, 40, 0.5, [5, 6])
    assert found != evaluate.held_out_losses(net, held, ids, 40, 0.5, [5]) and np.isfinite(list(found.values())).all()
    one, losses = np.array([3]), []
    batch = held.batch(one, np.array([[0, min(40, held.index["frames"][3])]]))
    with torch.no_grad():
        for seed, t in itertools.product((5, 6), (0.1, 0.3, 0.5, 0.7, 0.9)):
            torch.manual_seed(evaluate.step_seed(seed, 0))
            x_t, target = make_xt(net, batch.mel, torch.tensor([t]), 0.5)
            v = net.velocity(x_t, torch.tensor([t]), net.embed_condition(batch))
            losses.append(((v - target) ** 2).mean().item())
    assert evaluate.held_out_losses(net, held, one, 40, 0.5, [5, 6])[3] == pytest.approx(np.mean(losses), rel=1e-5)


def note(run: Path, step: int, fad: float | None = 5.0) -> None:
    result = {"step": step, "seconds": step / 2, "wer": {"generated": 0.5}}
    fads = {"fad": {"model": "yamnet", "speech": {"generated": fad}, "audio": {"generated": fad}}}
    takes = {system: {0: [take(np.zeros(600))]} for system in ("original", "generated")}
    latest = report.record(run, result | (fads if fad else {}), takes)
    if latest:
        (run / "eval.json").write_text(json.dumps(result))
    assert latest == (json.loads((run / "eval.json").read_text())["step"] == step)


def steps(run: Path) -> list[int]:
    return [int(r["step"]) for r in read_csv(run / "evals.csv")]


def test_an_earlier_step_takes_no_later_ones_place(tmp_path):
    (tmp_path / "log.csv").write_text("step,held_out_speech\n10,\n20,\n30,\n")
    for step in (20, 30, 10):
        note(tmp_path, step)
    assert steps(tmp_path) == [10, 20, 30] and json.loads((tmp_path / "eval.json").read_text())["step"] == 30
    note(tmp_path, 30, fad=7.0)  # the same step again replaces its own numbers
    assert steps(tmp_path) == [10, 20, 30] and float(read_csv(tmp_path / "evals.csv")[-1]["speech_fad"]) == 7.0
    note(tmp_path, 20, fad=None)
    rows = read_csv(tmp_path / "evals.csv")
    assert rows[1]["speech_fad"] == "" and rows[2]["speech_fad"] == "7.0"  # not measured, and kept


def test_what_training_went_back_behind_counts_no_more(tmp_path):
    for step, log in ((20, "10,\n20,"), (10, "10,")):
        (tmp_path / "log.csv").write_text(f"step,held_out_speech\n{log}\n")
        note(tmp_path, step)
    assert steps(tmp_path) == [10] and json.loads((tmp_path / "eval.json").read_text())["step"] == 10


class Listener:
    """Hears nothing but "text", and judges by four numbers a clip."""

    sample_rate, dim = 16000, 4

    def transcribe(self, wavs: list, language: str = "en") -> list[str]:
        return ["text"] * len(wavs)

    def encode(self, wavs: list) -> list[np.ndarray]:
        return [np.stack([w[k::4][:4] for k in range(4)]) for w in wavs]


@pytest.fixture
def evaluated(tiny_config, monkeypatch) -> Path:
    """A run of two steps whose last checkpoint is evaluated."""
    monkeypatch.setattr(evaluate.demo, "load_teacher", lambda *_: Listener())
    monkeypatch.setattr(evaluate, "MIN_WORDS", 2)
    config = replace(tiny_config, max_steps=2, phase1_steps=1, vocoder="griffin_lim", nfe=2, eval_seeds=2)
    train.train(config, Machine(0, 1, "cpu", "float32"))
    evaluate.main(EvalArgs(ckpt=f"{config.out_dir}/ckpt.pt", device="cpu"))
    return Path(config.out_dir)


def test_a_run_is_evaluated_then_its_phase_1(evaluated, capsys):
    result = json.loads((evaluated / "eval.json").read_text())
    assert result["step"] == 2 and result["wer"]["generated"] == 0.5 and result["wer"]["clips"] == 3
    assert result["seeds"] == 2 and len(result["wer"]["utterances"]["generated"]) == 6
    for name in ("speech", "audio"):
        assert result["fad"][name]["clips"] == 3
        for system in ("original", "vocoded", "generated"):
            for key in ("interval", "kad_interval"):
                low, high = result["fad"][name][key][system]
                assert low <= high and np.isfinite([low, high, result["fad"][name]["kad"][system]]).all()
            assert sum(result["fad"][name]["terms"][system]) == result["fad"][name][system]
        for system in ("vocoded", "generated"):
            rows = [r for r in result["clips"][system] if r["domain"] == name]
            assert len(rows) == 3 and all(("wer" in r) == (name == "speech") for r in rows)
            assert all(r["mcd"] >= 0 and -1 <= r["cosine"] <= 1.001 for r in rows)
        assert all(r["fm"] > 0 for r in rows)
    names = {f"{d}_{i:04d}" for i, d in enumerate(("speech", "audio") * 3)}
    for kind in ("generated", "original"):
        assert {p.stem for p in (evaluated / "samples" / kind).glob("*.wav")} == names
    listed = (evaluated / "samples" / "list.txt").read_text().splitlines()
    assert {line.partition(" ")[0] for line in listed} == names and all(line.partition(" ")[2] for line in listed)
    files = [
        evaluated / "eval.json",
        evaluated / "index.html",
        *evaluated.glob("samples/*/*"),
        *evaluated.glob("samples/*.*"),
    ]
    kept = {p: p.read_bytes() for p in files}
    evaluate.main(EvalArgs(ckpt=str(evaluated / "phase1.pt"), device="cpu"))
    assert steps(evaluated) == [1, 2] and all(p.read_bytes() == content for p, content in kept.items())
    assert "speech held-out FM x1000" in capsys.readouterr().out


def test_evaluated_runs_are_compared_and_heard(evaluated, tmp_path, capsys):
    runs = [tmp_path / "table" / name for name in ("none_s0", "lasp_s0")]
    for run in runs:
        shutil.copytree(evaluated, run)
    evaluate.main(EvalArgs(compare=(*map(str, runs), str(tmp_path / "unfinished"))))
    assert "not evaluated yet, left out:" in capsys.readouterr().err
    rows = json.loads((tmp_path / "table" / "table.json").read_text())
    assert list(rows) == ["none", "lasp"] and rows["lasp"]["less_none"]["speech WER %"] == [0, 0, 0]
    assert "+0 [+0 +0]" in (tmp_path / "table" / "table.md").read_text()
    assert (tmp_path / "table" / "table.png").read_bytes()[:4] == b"\x89PNG"
    evaluate.main(EvalArgs(listening_test=tuple(map(str, runs)), listening_clips=2, out=str(tmp_path / "heard")))
    key = json.loads((tmp_path / "heard" / "key.json").read_text()).values()
    assert {k["system"] for k in key} == {"none_s0", "lasp_s0", "original"} and len(key) == 3 * 2 * 2
    os.rename(runs[1], tmp_path / "none_s0")
    both = (str(runs[0]), str(tmp_path / "none_s0"))  # of one name: neither takes the other's place
    evaluate.main(EvalArgs(listening_test=both, listening_clips=1, out=str(tmp_path / "heard")))
    key = json.loads((tmp_path / "heard" / "key.json").read_text()).values()
    assert {k["system"] for k in key} == {*both, "original"}
    with pytest.raises(ValueError, match="no clips in .*unheard/samples/generated: run evaluate.py"):
        evaluate.main(EvalArgs(listening_test=(both[0], str(tmp_path / "unheard"))))
    with pytest.raises(ValueError, match="no evaluated run"):
        evaluate.main(EvalArgs(compare=(str(tmp_path / "unfinished"),)))


def test_a_partial_evaluation_leaves_the_runs_own_alone(evaluated, capsys):
    kept = {p: p.read_bytes() for p in evaluated.rglob("*") if p.is_file()}
    ckpt = str(evaluated / "ckpt.pt")
    for changed, name in (({"fad_model": "none"}, "fad_model=none"), ({"max_clips": 2, "name": "few"}, "few")):
        evaluate.main(EvalArgs(ckpt=ckpt, device="cpu", **changed))
        assert f"eval_{name}.json and samples_{name}/ alone" in capsys.readouterr().out
        assert json.loads((evaluated / f"eval_{name}.json").read_text())["step"] == 2
        assert list((evaluated / f"samples_{name}").glob("generated/*.wav"))
    assert all(path.read_bytes() == content for path, content in kept.items())
    same = EvalArgs(ckpt=ckpt, device="cpu", eval_seeds=2, vocoder="griffin_lim", name="x")  # what the run says anyway
    evaluate.main(same)
    assert not (evaluated / "eval_x.json").exists()
    capsys.readouterr()
    evaluate.main(EvalArgs(compare=(str(evaluated),), name="few"))
    assert "read from eval_few.json" in capsys.readouterr().out
    evaluate.main(EvalArgs(ckpt=str(evaluated / "gone.pt"), worst=1, name="few"))
    printed = capsys.readouterr().out
    assert "heard: text" in printed and "read " in printed and "n 2" in printed
