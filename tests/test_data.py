"""data.py: corpora from folders, the split, alignment of crops, batches, and one preparation with the real networks."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio
import data
import fetch
import teachers
from audio import AudioError
from configurator import Config
from data import AUDIO, SPEECH, Clip, DataError


def sound(rng: np.random.Generator, seconds: float, rate: int = 16000) -> np.ndarray:
    n = int(seconds * rate)
    return (0.3 * np.sin(2 * np.pi * rng.uniform(200, 900) * np.arange(n) / rate) + rng.normal(0, 0.02, n)).astype("f4")


@pytest.fixture
def speech_dir(tmp_path, rng) -> Path:
    """LibriSpeech layout: 3 speakers of 2 chapters of 2 utterances, and one recording with a text of its own."""
    root = tmp_path / "speech"
    for speaker in (19, 26, 103):
        for chapter in (1, 2):
            folder = root / f"{speaker}" / f"{chapter}"
            folder.mkdir(parents=True)
            lines = []
            for i in range(2):
                soundfile.write(folder / f"{speaker}-{chapter}-{i:04d}.flac", sound(rng, 0.6), 16000)
                lines.append(f"{speaker}-{chapter}-{i:04d} SPEAKER {speaker} SAYS {chapter} {i}")
            (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
    soundfile.write(root / "own.wav", sound(rng, 0.6), 16000)
    (root / "own.txt").write_text("  Héllo, there!\n", encoding="utf-8")
    (root / "notes.md").write_text("not a recording")
    return root


@pytest.fixture
def audio_dir(tmp_path, rng) -> Path:
    root = tmp_path / "sounds"
    (root / "deep").mkdir(parents=True)
    soundfile.write(root / "deep" / "dog_bark.WAV", sound(rng, 0.6, 44100), 44100)
    soundfile.write(root / "rain.ogg", sound(rng, 0.6, 44100), 44100)
    (root / "rain.txt").write_text("Rain on a roof")
    return root


# ---- corpora


def test_folder_of_speech(speech_dir):
    clips = {c.name: c for c in data.folder(str(speech_dir), SPEECH)}
    assert len(clips) == 13
    clip = clips["26/2/26-2-0001.flac"]
    assert clip.text == "SPEAKER 26 SAYS 2 1" and clip.group == "26" and clip.domain == SPEECH
    assert clips["own.wav"].text == "Héllo, there!"
    assert {c.group for c in clips.values()} == {"19", "26", "103", "héllo there"}


def test_folder_of_sounds(audio_dir):
    clips = {c.name: c for c in data.folder(str(audio_dir), AUDIO)}
    assert {name: c.text for name, c in clips.items()} == {
        "deep/dog_bark.WAV": "dog bark",
        "rain.ogg": "Rain on a roof",
    }


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match=r"speech_dir=.*no such folder; pass --speech_dir=FOLDER"):
        data.folder(str(tmp_path / "no"), SPEECH)
    with pytest.raises(DataError, match=r"audio_dir=.*no audio files \(.*\.flac"):
        data.folder(str(tmp_path), AUDIO)


def test_missing_names_every_option():
    assert data.missing(Config(speech_dir="demo", audio_dir="demo", audio_teacher="demo", beats_tokens=False,
                               speech_tokenizer="whisper_vq")) == []  # fmt: skip
    lines = data.missing(Config(speech_dir="/nowhere/at/all"))
    options = ["--speech_dir=", "--audio_dir=", "--audio_teacher=", "--speech_tokenizer=", "--beats_tokens="]
    assert [next(o for o in options if line.startswith(o)) for line in lines] == options
    assert "/nowhere/at/all" in lines[0]
    with pytest.raises(DataError, match="this config needs what is not here"):
        data.prepare(Config())


def test_held_out_takes_whole_groups(rng):
    clips = [Clip(f"{d}/{i}", b"", "", d, f"g{rng.integers(60)}") for d in (SPEECH, AUDIO) for i in range(400)]
    out = data.held_out(clips, 0.1, 5)
    for d in (SPEECH, AUDIO):
        groups = {False: set(), True: set()}
        for clip, held in zip(clips, out, strict=True):
            if clip.domain == d:
                groups[held].add(clip.group)
        assert not groups[False] & groups[True]
        count = sum(h for c, h in zip(clips, out, strict=True) if c.domain == d)
        assert 40 <= count < 40 + max(sum(c.domain == d and c.group == g for c in clips) for g in groups[True])
    assert out == data.held_out(clips, 0.1, 5) != data.held_out(clips, 0.1, 6)
    order = rng.permutation(800)  # a clip's side does not depend on the order of the files
    assert [out[i] for i in order] == data.held_out([clips[i] for i in order], 0.1, 5)
    assert not any(data.held_out(clips, 0.0, 5)) and all(data.held_out(clips, 1.0, 5))


def test_the_same_group_name_in_the_other_domain_is_another_group():
    clips = [Clip(f"{d}{i}", b"", "", d, f"g{i}") for d in (SPEECH, AUDIO) for i in range(20)]
    out = data.held_out(clips, 0.3, 0)
    assert out[:20] != out[20:] and sum(out[:20]) == sum(out[20:]) == 6


# ---- decoding


def test_decode_gives_every_rate_and_says_what_is_wrong(speech_dir, rng):
    config = Config(min_seconds=0.5, max_seconds=2.0)
    clip = Clip("a.wav", speech_dir / "own.wav", "some words", SPEECH, "g")
    at24, at16 = data.decode(clip, (24000, 16000), config)
    assert len(at16) == 9600 and abs(len(at24) - 14400) <= 1
    for change, reason in (
        ({"text": " ... "}, "no text"),
        ({"source": b"not sound"}, "cannot be decoded"),
    ):
        with pytest.raises(AudioError) as error:
            data.decode(replace(clip, **change), (24000,), config)
        assert error.value.reason == reason
    data.decode(replace(clip, text="", domain=AUDIO), (24000,), config)  # a sound needs no words
    for limits, reason in (({"min_seconds": 0.7}, "too short"), ({"max_seconds": 0.59}, "too long")):
        with pytest.raises(AudioError, match="0.60 s") as error:
            data.decode(clip, (24000,), replace(config, **limits))
        assert error.value.reason == reason


def fake_teachers(monkeypatch) -> None:
    """Puts in place of the networks a teacher whose feature is the level of each 20 ms."""

    class Level(teachers.Teacher):
        name, sample_rate, dim, rate, depth = "level", 16000, 3, 50.0, 2

        def encode(self, wavs, layer=-1):
            cut = [w[: len(w) // 320 * 320].reshape(-1, 320) for w in wavs]
            return [np.stack([c.std(1), c.max(1), c.min(1)], 1).astype(np.float32) for c in cut]

    monkeypatch.setattr(teachers, "load_teacher", lambda *_: Level())


def folder_config(tmp_path, speech_dir, audio_dir, **changes) -> Config:
    return Config(
        **{
            "speech_dir": str(speech_dir),
            "audio_dir": str(audio_dir),
            "data_dir": str(tmp_path / "prepared"),
            "whisper": "demo",
            "audio_teacher": "demo",
            "speech_tokenizer": "whisper_vq",
            "beats_tokens": False,
            "speech_codes": 8,
            "audio_codes": 8,
            "tokenizer_steps": 2,
            "held_out": 0.3,
            **changes,
        }
    )


def test_unusable_clips_are_counted_and_too_many_stop(tmp_path, speech_dir, audio_dir, rng, monkeypatch, capsys):
    fake_teachers(monkeypatch)
    for i in range(27):
        soundfile.write(audio_dir / f"more_{i}.wav", sound(rng, 0.6), 16000)
    (audio_dir / "text.wav").write_text("this is no recording\n" * 20)
    soundfile.write(audio_dir / "hush.wav", np.zeros(16000), 16000)
    config = folder_config(tmp_path, speech_dir, audio_dir)
    data.prepare(config)  # 2 of 44: within 5 %
    printed = capsys.readouterr().out
    assert "skipped 1 clips: silent (hush.wav)" in printed
    assert "skipped 1 clips: cannot be decoded (text.wav)" in printed
    meta = data.read_meta(config.data_dir)
    assert meta["skipped"] == {"silent": ["hush.wav"], "cannot be decoded": ["text.wav"]}
    assert [a + b for a, b in zip(meta["train"]["clips"], meta["held_out"]["clips"], strict=True)] == [13, 29]
    soundfile.write(audio_dir / "short.wav", sound(rng, 0.1), 16000)
    other = replace(config, data_dir=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"3 of 45 clips cannot be used"):
        data.prepare(other)
    assert "skipped 1 clips: too short (short.wav)" in capsys.readouterr().out
    assert not [f for f in tmp_path.iterdir() if f.name.startswith("other")]  # nothing half-made is left


# ---- alignment


def test_token_count_and_crop_unit():
    assert data.crop_unit() == 15  # 15 frames are 160 ms: 8 and 4 tokens
    for seconds in (1, 2, 10):
        frames = round(seconds * 24000 / 256)
        assert abs(data.token_count(frames, SPEECH) - 50 * seconds) <= 1
        assert abs(data.token_count(frames, AUDIO) - 25 * seconds) <= 1
    assert data.token_count(1, SPEECH) == data.token_count(1, AUDIO) == 1


def test_token_span():
    assert data.token_span(0, 100, SPEECH, 53) == (0, 53)
    assert data.token_span(30, 30, SPEECH, 53) == (16, 16)
    assert data.token_span(30, 30, AUDIO, 27) == (8, 8)
    assert data.token_span(90, 10, SPEECH, 53) == (48, 5)  # what is left
    assert data.token_span(90, 30, SPEECH, 53) == (48, 5)  # never beyond the clip's last token


def test_to_rate():
    x = np.linspace(0, 1, 50, dtype=np.float32)[:, None] * np.array([1.0, -2.0], np.float32)
    y = data.to_rate(x, 100)
    assert y.shape == (100, 2)
    np.testing.assert_allclose(y[1:-1, 0], (np.arange(1, 99) - 0.5) / 2 / 49, atol=1e-6)  # centres, not edges
    np.testing.assert_array_equal(data.to_rate(x, 50), x)


def prepared(path: Path, frames: list[int], domains: list[int], config: Config, tokens=None, mels=None) -> data.Dataset:
    """A training split of clips of the given lengths, through data.py's own writer."""
    rng, clips = np.random.default_rng(0), []
    for i, (T, d) in enumerate(zip(frames, domains, strict=True)):
        mel = (rng.normal(-3, 2, (T, 100)) if mels is None else mels[i]).astype(np.float16)
        wav = np.zeros(256) if i else np.linspace(-0.5, 0.5, 256)
        codes = rng.integers(0, 16, data.token_count(T, d)) if tokens is None else tokens[i]
        clip = Clip(f"n{i}", b"", f"text of\nclip {i}", d, "")
        clips.append(data.Prepared(clip, False, mel, wav, wav, codes, np.full((4, 6)[d], i + 0.5)))
    path.mkdir()
    meta = {"teachers": [["whisper", 4], ["aisfx", 6]]}
    meta["train"] = data.write_split(path / "train", config, clips, meta["teachers"])
    (path / "meta.json").write_text(json.dumps(meta))
    return data.Dataset(path, "train")


@pytest.mark.parametrize("domain", [SPEECH, AUDIO])
def test_an_impulse_stays_under_its_frames(tmp_path, rng, domain):
    """One token marked in a clip, and the mel frames it lasts: after any crop and the model's stretch they coincide."""
    from model import stretch

    T = 600
    N, rate = data.token_count(T, domain), data.TOKEN_RATE[domain]
    k = int(rng.integers(N // 3, N // 2))
    centre = (k + 0.5) / rate * audio.FRAME_RATE - 0.5  # in frames
    mel = -((np.arange(T) - centre) ** 2)[:, None].clip(None, 1000) * np.ones(100)
    codes = np.zeros(N, np.int64)
    codes[k] = 1
    dataset = prepared(tmp_path / "p", [T, 9], [domain, 1 - domain], Config(), [codes, codes[:1]], [mel, mel[:9]])
    unit = data.crop_unit()
    for _ in range(30):
        length = int(rng.integers(40, 300))
        low, high = max(0, int(centre) - length + 20), min(T - length, int(centre) - 20)
        first = int(rng.integers(low // unit + 1, high // unit + 1)) * unit if high // unit > low // unit else 0
        length = length if first else T
        batch = dataset.batch(np.array([0]), np.array([[first, length]]))
        assert batch.frames.tolist() == [length] and batch.mel.shape == (1, length, 100)
        heard = batch.mel[0, :, 0].argmax().item()
        x = stretch(batch.tokens[..., None].double(), batch.token_len, batch.frames, length)[0, :, 0]
        seen = (x * torch.arange(length)).sum().item() / x.sum().item()  # centre of mass of the stretched impulse
        # a token count is rounded, so the stretch is off by up to half a token at the clip's far end
        assert abs(seen - heard) <= 0.5 + 0.5 / rate * audio.FRAME_RATE + 0.1, (first, length)
        assert batch.token_len.tolist() == [data.token_span(first, length, domain, N)[1]]
    with_first = dataset.batch(np.array([0]), np.array([[unit, 300]])).tokens[0].tolist()
    assert with_first == codes[unit * rate * 256 // 24000 :][: len(with_first)].tolist()


def test_dataset_gives_back_what_was_written(tmp_path, rng):
    frames, domains = [50, 80, 33, 61], [0, 1, 0, 1]
    mels = [rng.normal(-3, 2, (T, 100)).astype(np.float16) for T in frames]
    tokens = [rng.integers(0, 99, data.token_count(T, d)) for T, d in zip(frames, domains, strict=True)]
    dataset = prepared(tmp_path / "p", frames, domains, Config(reference_clips=1), tokens, mels)
    assert len(dataset) == 4 and dataset.meta["train"]["clips"] == [2, 2]
    assert dataset.meta["train"]["seconds"] == pytest.approx([83 * 256 / 24000, 141 * 256 / 24000])
    assert dataset.name_and_text(2) == ("n2", "text of\nclip 2")
    assert [dataset.wav_path(i).exists() for i in range(4)] == [True, True, False, False]  # one clip of each domain
    np.testing.assert_allclose(audio.read(dataset.wav_path(0), 24000), np.linspace(-0.5, 0.5, 256), atol=1e-4)
    ids = np.array([3, 0, 2])
    prompts = np.array([7, 0, 3])
    batch = dataset.batch(ids, prompts=prompts)
    assert batch.ids.tolist() == [3, 0, 2] and batch.prompt.tolist() == [7, 0, 3] and batch.domain.tolist() == [1, 0, 0]
    assert batch.mel.shape == (3, 61, 100) and batch.mel.dtype == torch.float32
    for b, i in enumerate(ids):
        T, N = frames[i], len(tokens[i])
        np.testing.assert_array_equal(batch.mel[b, :T].numpy(), mels[i].astype(np.float32))
        np.testing.assert_array_equal(batch.tokens[b, :N].numpy(), tokens[i])
        assert not batch.mel[b, T:].any() and not batch.tokens[b, N:].any()
        assert batch.frames[b] == T and batch.token_len[b] == N
    # whose teacher it is not gets zeros
    assert batch.teacher["whisper"].tolist() == [[0] * 4, [0.5] * 4, [2.5] * 4]
    assert batch.teacher["aisfx"].tolist() == [[3.5] * 6, [0] * 6, [0] * 6]


def test_batch_moves_and_doubles(tmp_path):
    batch = prepared(tmp_path / "p", [50, 80], [0, 1], Config()).batch(np.array([0, 1]))
    moved, double = batch.to("meta"), batch.double()
    assert moved.mel.device.type == moved.ids.device.type == moved.teacher["aisfx"].device.type == "meta"
    assert double.mel.dtype == double.teacher["whisper"].dtype == torch.float64 and double.tokens.dtype == torch.int64
    assert torch.equal(double.mel.float(), batch.mel)


def test_a_split_may_lack_a_domain(tmp_path):
    """A small corpus can have no held-out clip of one domain; the other's still make batches."""
    batch = prepared(tmp_path / "p", [50, 80], [SPEECH, SPEECH], Config()).batch(np.array([0, 1]))
    assert batch.teacher["aisfx"].tolist() == [[0] * 6] * 2


# ---- batches


@pytest.fixture
def many(tmp_path, rng) -> data.Dataset:
    frames = (np.exp(rng.normal(4.6, 0.6, 300)).clip(20, 400)).astype(int).tolist()
    return prepared(tmp_path / "many", frames, rng.integers(0, 2, 300).tolist(), Config(reference_clips=0))


BATCHES = Config(batch_frames=1500, batch_size=16, seed=4)


def test_every_clip_once_an_epoch(many):
    batches = data.Batches(many, BATCHES)
    n, seen = batches.steps_per_epoch, []
    for epoch in range(3):
        ids = [batches.ids(s).tolist() for s in range(epoch * n, (epoch + 1) * n)]
        assert sorted(i for batch in ids for i in batch) == list(range(300))
        seen.append(ids)
    assert sorted(map(sorted, seen[0])) != sorted(map(sorted, seen[1]))  # new neighbours, not only a new order
    assert [len(x) for x in seen[0]] != sorted(len(x) for x in seen[0])  # not from short to long


def test_batches_are_a_function_of_seed_step_and_rank(many):
    a, b = data.Batches(many, BATCHES), data.Batches(many, copy.copy(BATCHES))
    steps = [7, 3, 40, 0, 7]
    for step in steps:  # in any order, from any object
        x, y = a(step), b(step)
        assert torch.equal(x.ids, y.ids) and torch.equal(x.mel, y.mel) and torch.equal(x.prompt, y.prompt)
    other = data.Batches(many, replace(BATCHES, seed=5))
    assert any(a.ids(s).tolist() != other.ids(s).tolist() for s in range(5))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_an_epoch_without_overlap(many, world):
    ranks = [data.Batches(many, BATCHES, r, world) for r in range(world)]
    n = ranks[0].steps_per_epoch
    ids = [i for step in range(n, 2 * n) for r in ranks for i in r.ids(step).tolist()]
    assert len(ids) == len(set(ids)) and len(ids) >= 300 - (world - 1) * BATCHES.batch_size
    assert len({r.steps_per_epoch for r in ranks}) == 1


def test_the_frame_budget_is_kept_and_padding_is_low(many):
    batches = data.Batches(many, BATCHES)
    padding, real = 0, 0
    for step in range(2 * batches.steps_per_epoch):
        lengths = batches.lengths[batches.ids(step)]
        assert len(lengths) <= 16 and len(lengths) * lengths.max() <= 1500
        if step < batches.steps_per_epoch:
            padding, real = padding + (lengths.max() - lengths).sum(), real + lengths.sum()
    assert batches.padding() == pytest.approx(padding / (padding + real))
    assert batches.padding() < 0.12
    rng = np.random.default_rng(0)  # batches of as many clips without bucketing waste far more
    order = rng.permutation(300)
    groups = [batches.lengths[order[a:b]] for a, b in zip(batches.edges, batches.edges[1:], strict=False)]
    assert 1 - sum(g.sum() for g in groups) / sum(len(g) * g.max() for g in groups) > 2 * batches.padding()


def test_a_budget_below_the_longest_clip(many):
    longest = int(many.index["frames"].max())
    with pytest.raises(DataError, match=f"batch_frames={longest - 1} is below the longest clip \\({longest} frames\\)"):
        data.Batches(many, replace(BATCHES, batch_frames=longest - 1))
    data.Batches(many, replace(BATCHES, batch_frames=longest))
    data.Batches(many, replace(BATCHES, batch_frames=200, crop_frames=200))  # cropped, they fit


def test_crops_and_prompts(many):
    config = replace(BATCHES, crop_frames=60, prompt_max=0.3, prompt_drop=0.4, batch_size=32)
    batches = data.Batches(many, config)
    frames, firsts, prompts = many.index["frames"], set(), []
    for step in range(3 * batches.steps_per_epoch):
        batch = batches(step)
        for b, i in enumerate(batch.ids.tolist()):
            assert batch.frames[b] == min(60, frames[i])
            assert 0 <= batch.prompt[b] <= 0.3 * batch.frames[b]
            prompts.append(batch.prompt[b].item() / batch.frames[b].item())
            if frames[i] >= 150:  # where in the clip is this crop?
                whole = many.mel[many.index[i]["mel"] : many.index[i]["mel"] + frames[i], 0].astype(np.float32)
                starts = [s for s in range(frames[i] - 59) if (whole[s : s + 60] == batch.mel[b, :60, 0].numpy()).all()]
                assert len(starts) == 1 and starts[0] % data.crop_unit() == 0
                firsts.add(starts[0])
    assert len(firsts) > 5
    dropped = np.mean(np.array(prompts) == 0)
    assert 0.35 < dropped < 0.5  # 40 %, and those whose share rounds down to nothing


def test_fixed_batch(many):
    a, b = data.fixed_batch(many, 5, 1, 90), data.fixed_batch(many, 5, 1, 90)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.mel, b.mel)
    assert a.domain.tolist() == [0] * 5 + [1] * 5 and len(set(a.ids.tolist())) == 10
    assert a.frames.tolist() == [min(90, many.index["frames"][i]) for i in a.ids.tolist()]
    r = many.index[a.ids[0].item()]
    np.testing.assert_array_equal(a.mel[0, 0].numpy(), many.mel[r["mel"]].astype(np.float32))  # their first frames
    assert not a.prompt.any()
    assert a.ids.tolist() != data.fixed_batch(many, 5, 2, 90).ids.tolist()


# ---- preparation


def test_ensure_prepared(tiny_config, monkeypatch):
    calls = []
    monkeypatch.setattr(data, "prepare", calls.append)
    assert data.ensure_prepared(tiny_config)["teachers"][0][0] == "whisper"
    data.ensure_prepared(replace(tiny_config, learning_rate=1e-5, nfe=4, n_layer=2))  # of no concern to the data
    assert not calls
    with pytest.raises(DataError, match="--data_dir=ANOTHER_FOLDER") as error:
        data.ensure_prepared(replace(tiny_config, speech_codes=17, mel_floor=-9.0))
    assert "speech_codes: 16 -> 17; mel_floor: -11.5129 -> -9.0" in str(error.value) and "\n" not in str(error.value)
    (Path(tiny_config.data_dir) / "meta.json").unlink()  # unfinished
    with pytest.raises(FileNotFoundError):  # prepare does nothing here
        data.ensure_prepared(tiny_config)
    assert calls == [tiny_config]


def test_a_folder_that_is_no_prepared_data_is_not_deleted(tmp_path, speech_dir, audio_dir, monkeypatch):
    """--data_dir=my/speech by mistake, or --data_dir=data: an error, not the end of the recordings."""
    fake_teachers(monkeypatch)
    config = folder_config(tmp_path, speech_dir, audio_dir, data_dir=str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    try:
        data.ensure_prepared(config)
    except DataError as error:
        assert "mine" in str(error)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_prepare_end_to_end(tmp_path, capsys):
    """Twelve real clips as wav files in folders, the real networks, small codebooks."""
    config = folder_config(
        tmp_path, tmp_path / "speech", tmp_path / "sounds", speech_codes=32, audio_codes=32, tokenizer_steps=5
    )
    wanted = {"speech": (data.demo_speech(), 7), "sounds": (data.demo_audio(), 5)}
    for name, (clips, count) in wanted.items():
        (tmp_path / name).mkdir()
        kept = 0
        for clip in clips:
            wav, rate = audio.decode(clip.source, clip.name)
            if 0.6 < len(wav) / rate < 1.5 and clip.text and kept < count:
                audio.write(tmp_path / name / f"{kept}.wav", wav, rate)
                (tmp_path / name / f"{kept}.txt").write_text(clip.text)
                kept += 1
            if kept == count:
                break
        assert kept == count
    meta = data.ensure_prepared(config)
    folder = Path(config.data_dir)
    assert {f.name for f in folder.iterdir()} == {
        "meta.json", "train", "held_out", "speech_tokenizer.pt", "audio_tokenizer.pt"
    }  # fmt: skip
    assert {f.name for f in tmp_path.iterdir()} == {"speech", "sounds", "prepared"}
    assert meta["teachers"] == [["whisper", 384], ["aisfx", 512]]
    assert (
        np.add(meta["train"]["clips"], meta["held_out"]["clips"]).tolist() == [7, 5]
        and min(meta["held_out"]["clips"]) > 0
    )
    assert meta["prepared_with"]["speech_codes"] == 32 and set(meta["prepared_with"]) == set(data.PREPARED_WITH)
    assert "codes_used" in meta["audio_tokens"] and 0 < meta["speech_tokens"]["perplexity"] <= 32
    train, held = data.Dataset(folder, "train"), data.Dataset(folder, "held_out")
    assert all(d.wav_path(i).exists() for d in (train, held) for i in range(len(d)))
    for dataset in (train, held):
        for i in range(len(dataset)):
            r, (name, text) = dataset.index[i], dataset.name_and_text(i)
            source = tmp_path / ("speech", "sounds")[r["domain"]] / name
            assert source.with_suffix(".txt").read_text().strip() == text
            mel = audio.log_mel(torch.from_numpy(audio.read(source, 24000))).numpy()
            np.testing.assert_array_equal(dataset.mel[r["mel"] : r["mel"] + r["frames"]], mel.astype(np.float16))
            assert r["tokens"] == data.token_count(len(mel), r["domain"])
            codes = dataset.tokens[r["token"] : r["token"] + r["tokens"]]
            assert codes.min() >= 0 and codes.max() < 32
    stored = np.concatenate([train.mel[:].astype(np.float64)]).clip(min=config.mel_floor)
    np.testing.assert_allclose(meta["mel_mean"], stored.mean(0), rtol=1e-6)  # of the training split alone
    np.testing.assert_allclose(meta["mel_std"], stored.std(0).clip(1e-3), rtol=1e-6)
    for d, (name, role) in enumerate((("whisper", "whisper_tiny"), ("aisfx", "aisfx"))):
        teacher = teachers.load_teacher(name, fetch.fetch(role))
        i = int(np.flatnonzero(train.index["domain"] == d)[-1])
        source = tmp_path / ("speech", "sounds")[d] / train.name_and_text(i)[0]
        [alone] = teacher.embed([audio.read(source, teacher.sample_rate)])
        mine = train.teachers[d][train.index[i]["teacher"]]
        np.testing.assert_allclose(mine, alone, atol=1e-3 * np.abs(alone).max())
        assert not np.allclose(
            mine, train.teachers[d][(train.index[i]["teacher"] + 1) % len(train.teachers[d])], atol=0.05
        )
    assert "prepared" in capsys.readouterr().out
    # a finished folder is used as it is; one without meta.json is not
    before = (folder / "meta.json").stat().st_mtime_ns
    assert data.ensure_prepared(config) == meta and (folder / "meta.json").stat().st_mtime_ns == before
    shutil.rmtree(tmp_path / "sounds")
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="--audio_dir=FOLDER"):
        data.ensure_prepared(config)
