"""sample.py: requests against the dataset's own batches, prompts cut at tokens, and the command from words to a wav."""

import json
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_lm import MACHINE, SMALL

import common
import data
import lm
import model
import sample
import train
from common import AUDIO, SPEECH
from prepare import __main__ as preparation
from prepare.corpora import Clip
from sample import Request, SampleArgs


def test_what_evaluation_does_not_ask_for_is_what_samples_user_gets():
    ours = {f.name: f.default for f in fields(SampleArgs)}
    given = {k: p.default for f in (lm.generate, sample.Stage1.requests) for k, p in signature(f).parameters.items()}
    for name in ("temperature", "top_p", "guidance", "repetition", "seed", "max_seconds"):
        assert ours[name] == given[name], name


def test_requests_of_prepared_clips_are_its_batch(tiny_config):
    dataset = data.Dataset(tiny_config.data_dir, "held_out")
    ids = np.array([3, 0, 4])
    ours, theirs = sample.to_batch(sample.from_dataset(dataset, ids)), dataset.batch(ids)
    for name in ("frames", "tokens", "token_len", "domain", "prompt"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.mel.shape == theirs.mel.shape and not ours.mel.any()


def test_synthesis_does_not_depend_on_the_order_of_requests(tiny_config, monkeypatch):
    """Each wave belongs to its own request, whatever batches were made inside (of 30 and 31, of 45 and 50, of 70 frames
    under a budget of 100); the reference is cut off again."""
    seen = []

    def fake_sample(net, cond, **options):  # the sampler alone is replaced: a clip's mel is its number of frames
        frames = cond.mask.sum(1)
        seen.append(len(frames))
        return frames[:, None, None] * cond.mask[..., None] * torch.ones(100)

    monkeypatch.setattr(sample, "sample", fake_sample)
    net = train.build_model(tiny_config, [("whisper", 12), ("aisfx", 10)]).eval()
    codes = np.zeros((9, 1), np.int64)
    requests = [Request(codes, SPEECH, n) for n in (70, 30, 50, 31)]
    requests.append(Request(codes, SPEECH, 45, np.ones((15, 100), np.float16)))
    waves = sample.synthesise(net, requests, lambda m: m[:, 0].numpy(), {}, most=100)
    assert [len(w) for w in waves] == [70, 30, 50, 31, 30] and seen == [2, 2, 1]
    assert [w[0] for w in waves] == [70, 30, 50, 31, 45]


def test_a_reference_is_cut_where_tokens_start():
    clip, mel = Clip("r", b"", "", SPEECH, ""), np.arange(200.0)[:, None]
    reference = preparation.Prepared(clip, mel, np.zeros(0), 24000, tokens=np.arange(107)[:, None])
    request = sample.with_prompt(Request(np.full((53, 1), 7), SPEECH, 100), reference, [50, 25], 0.3)
    assert len(request.prompt) == 30 and request.frames == 130  # of 42 that 30 % allows, a multiple of 15
    assert request.codes[:16, 0].tolist() == list(range(16)) and (request.codes[16:] == 7).all()


def test_lines_of_a_batch_file(tmp_path):
    file = tmp_path / "b.txt"
    file.write_text("say this\n\n[dog] barks twice\n  [rain]\n", encoding="utf-8")
    found = sample.texts_of(SampleArgs(text="first", event="owl", describe="at night", batch=str(file)))
    in_file = [(SPEECH, "say this"), (AUDIO, "dog: barks twice"), (AUDIO, "rain")]
    assert found == [(SPEECH, "first"), (AUDIO, "owl: at night"), *in_file]
    file.write_text(" \n")
    with pytest.raises(ValueError, match="stage 1 needs words"):
        sample.texts_of(SampleArgs(batch=str(file)))


def test_epss_is_the_even_grid_with_steps_left_out():
    for steps in model.EPSS:
        grid = model.time_grid(steps, 0.0, epss=True)
        assert len(grid) == steps + 1 and grid[0] == 0 and grid[-1] == 1
        assert all(t in model.time_grid(32, 0.0) for t in grid) and (grid.diff() > 0).all()
        swayed = model.time_grid(steps, -1.0, epss=True)
        torch.testing.assert_close(swayed, 1 - torch.cos(torch.pi * grid / 2))  # u - (cos - 1 + u)
    with pytest.raises(ValueError, match="epss has no schedule of 8 steps; it has 5, 6, 7, 10, 12, 16"):
        model.time_grid(8, epss=True)


@pytest.fixture
def trained(tiny_config, tmp_path) -> dict:
    config = replace(tiny_config, max_steps=2, phase1_steps=1, vocoder="griffin_lim", nfe=2)
    train.train(config, MACHINE)
    lm.train(replace(SMALL, data_dir=config.data_dir, out_dir=str(tmp_path / "lm"), max_steps=2), MACHINE)
    return {"ckpt": f"{config.out_dir}/ckpt.pt", "lm": str(tmp_path / "lm" / "ckpt.pt"), "device": "cpu"}


def test_words_become_a_waveform(trained, tmp_path, capsys):
    out = tmp_path / "deep" / "hello.wav"
    words = SampleArgs(**trained, text="hello there", out=str(out), max_seconds=1.5, nfe=5, epss=True)
    sample.main(words)
    wav, rate = soundfile.read(out)
    made = json.loads(out.with_suffix(".json").read_text())
    assert rate == 24000 and 0 < len(wav) <= 1.5 * 24000 and np.isfinite(wav).all()
    assert made["text"] == "hello there" and made["nfe"] == 5 and made["epss"] and made["lm"] == trained["lm"]
    assert "real-time factor" in capsys.readouterr().out
    first = out.read_bytes()
    sample.main(words)
    assert out.read_bytes() == first  # the seed decides everything
    (tmp_path / "b.txt").write_text("one two\n[dog] barks\n")
    sample.main(SampleArgs(**trained, batch=str(tmp_path / "b.txt"), out_dir=str(tmp_path / "b"), max_seconds=1.0))
    assert {p.name for p in (tmp_path / "b").glob("*.wav")} == {"0000_speech.wav", "0001_audio.wav"}


def test_prepared_clips_are_made_again_and_replace_no_others(trained, tiny_config):
    """What evaluate.py wrote to the same folder stays, and so do the clips of the other split."""
    samples = Path(trained["ckpt"]).parent / "samples"
    samples.mkdir()
    evaluated = [samples / f"{name}.wav" for name in ("speech_0000", "audio_0001")]
    for path in evaluated:
        path.write_bytes(b"evaluated")
    for split in ("held_out", "train"):
        sample.main(SampleArgs(ckpt=trained["ckpt"], device="cpu", n=2, split=split))
        frames = data.Dataset(tiny_config.data_dir, split).index["frames"]
        for path in samples.glob(f"{split}*.wav"):
            assert soundfile.info(path).frames == (frames[int(path.stem.split("_")[-1])] - 1) * 256
            assert json.loads(path.with_suffix(".json").read_text())["split"] == split
    assert all(path.read_bytes() == b"evaluated" for path in evaluated)
    assert len(list(samples.glob("*.wav"))) == 2 + 2 * 4


def test_each_line_takes_the_reference_and_the_limit_of_its_own_domain(trained, monkeypatch, tmp_path):
    """A file of a sound and two sentences: they get what they would get alone, though the sound comes first. A sentence
    of 10 letters takes at most 3 s, of 50 codes each; a sound max_seconds, of 25 codes each."""

    def encode_file(path: str, domain: int, config) -> preparation.Prepared:
        mel = np.full((60, 100), -3.0 - domain)
        rest = {"tokens": np.full((32, 1), domain), "style": np.full((16, 10), 5.0 + domain)}
        return preparation.Prepared(Clip(path, b"", "", domain, ""), mel, mel, 24000, **rest)

    def generate(net, texts, limits, styles, **sampling) -> list[np.ndarray]:
        assert styles[:, 0, 0].tolist() == [5.0 + d for d, _ in texts] and limits == [25 * 12, 50 * 3, 50 * 12]
        return [np.full(100, 7)] * len(texts)

    monkeypatch.setattr(preparation, "encode_file", encode_file)
    monkeypatch.setattr(sample, "generate", generate)
    (tmp_path / "b.txt").write_text(f"[dog] barks\nhello you?\n{'x' * 1000}\n")
    args = SampleArgs(**trained, batch=str(tmp_path / "b.txt"), reference="r.wav")
    state, _, args, _ = sample.open_run(args)
    requests, _ = sample.make_requests(args, sample.load_model(state), state)
    assert [r.domain for r in requests] == [AUDIO, SPEECH, SPEECH]
    for r in requests:
        assert len(r.prompt) == 60 and (r.prompt == -3.0 - r.domain).all() and r.codes[0] == r.domain


def test_what_does_not_fit_is_named(trained, tmp_path, capsys):
    ckpt, other = trained["ckpt"], str(tmp_path / "other.pt")
    state, _ = common.load(ckpt)
    for preparation_of_model, warned in ((state["data"], False), ("another", True)):
        sample.Stage1(trained["lm"], sample.load_model(state), "cpu", preparation_of_model)
        assert ("was trained on another preparation" in capsys.readouterr().err) == warned
    state, _ = common.load(trained["lm"])
    state["vocabulary"]["codes"] = (16, 17)
    common.save(other, state)
    for wrong, error, message in (
        ({"text": "hi"}, ValueError, "pass --lm=CKPT"),
        ({"n": 2, "out": "a.wav"}, ValueError, "is one file and 4 clips are asked for"),
        ({"text": "hi", "lm": ckpt}, common.CheckpointError, "another kind of checkpoint .it has no net"),
        ({"ckpt": trained["lm"]}, common.CheckpointError, "another kind of checkpoint .it has no"),
        ({"text": "hi", "lm": other}, ValueError, r"writes codes of \(16, 17\), the model reads \(16, 16\)"),
    ):
        with pytest.raises(error, match=message):
            sample.main(SampleArgs(**{"ckpt": ckpt, "device": "cpu"} | wrong))
