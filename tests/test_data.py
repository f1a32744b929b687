"""data.py: decoding, what a config needs, streams that follow each other in time, and preparation: alone, interrupted,
by several processes, and once with the real networks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import sound

import audio
import data
import teachers
from audio import AudioError
from common import AUDIO, SPEECH, DataError
from prepare import __main__ as preparation
from prepare import corpora, demo, tokenizer
from prepare.corpora import Clip
from train import Config


def test_missing_names_every_option():
    assert preparation.missing(Config(speech_dir="demo", audio_dir="demo", audio_teacher="demo", beats_tokens=False,
                               speech_tokenizer="whisper_vq")) == []  # fmt: skip
    lines = preparation.missing(Config(librispeech_dir="/nowhere/at/all", audio_tokenizer="no.pt"))
    options = ["--librispeech_dir=", "--audioset_dir=", "--audio_teacher=", "--beats_tokenizer=", "--audio_tokenizer="]
    assert [next(o for o in options if line.startswith(o)) for line in lines[:5]] == options
    assert "/nowhere/at/all" in lines[0] and "none is given" in lines[1]
    local = {"whisper": "/no/whisper", "s3": "no.onnx"}
    lines = preparation.missing(Config(**local))
    assert all(any(line.startswith(f"--{k}=") and repr(v) in line for line in lines) for k, v in local.items())
    assert [preparation.is_absent(v) for v in ("./vocos", "a/b/c", "owner/name", ".")] == [True, True, False, False]
    with pytest.raises(DataError, match="this config needs what is not here"):
        preparation.prepare(Config())


def test_decode_gives_every_rate_and_says_what_is_wrong(speech_dir, rng):
    config = Config(min_seconds=0.5, max_seconds=2.0)
    clip = Clip("a.wav", speech_dir / "own.wav", "some words", SPEECH, "g")
    at24, at16 = preparation.decode(clip, (24000, 16000), config)
    assert len(at16) == 9600 and abs(len(at24) - 14400) <= 1
    with pytest.raises(AudioError) as error:
        preparation.decode(replace(clip, source=b"not sound"), (24000,), config)
    assert error.value.reason == "cannot be decoded"
    for limits, reason in (({"min_seconds": 0.7}, "too short"), ({"max_seconds": 0.59}, "too long")):
        with pytest.raises(AudioError, match="0.60 s") as error:
            preparation.decode(clip, (24000,), replace(config, **limits))
        assert error.value.reason == reason


def test_speech_without_words_is_counted_and_sounds_need_none(speech_dir):
    networks = preparation.Networks(Config(whisper="demo", audio_teacher="demo", device="cpu"))
    clip = Clip("a.wav", speech_dir / "own.wav", "some words", SPEECH, "g")
    clips = [clip, replace(clip, name="b.wav", text=" ... "), replace(clip, text="", domain=AUDIO)]
    prepared, lost = preparation.decode_all(clips, networks)
    assert len(prepared) == 2 and lost == {"no text": ["b.wav"]}


def test_decode_takes_a_part(speech_dir):
    clip = Clip("a.wav", speech_dir / "own.wav", "words", SPEECH, "g", 0.1, 0.4)
    [part] = preparation.decode(clip, (16000,), Config(min_seconds=0.1))
    [whole] = preparation.decode(replace(clip, start=0.0, end=None), (16000,), Config(min_seconds=0.1))
    np.testing.assert_array_equal(part, whole[1600:6400])


def test_a_silent_part_is_refused_and_a_part_keeps_its_format(tmp_path, rng):
    wav = np.concatenate([np.zeros(16000), sound(rng, 1.0)])
    soundfile.write(tmp_path / "a.wav", wav, 16000)
    clip = Clip("a.wav", tmp_path / "a.wav", "words", SPEECH, "g", 0.0, 0.9)
    with pytest.raises(AudioError) as error:
        preparation.decode(clip, (16000,), Config())
    assert error.value.reason == "silent"
    (tmp_path / "b.g722").write_bytes(rng.integers(0, 256, 16000, np.uint8).tobytes())
    part = Clip("b.g722@1.5", tmp_path / "b.g722", "words", SPEECH, "g", 0.5, 1.5)  # its name has no suffix of its own
    assert len(preparation.decode(part, (16000,), Config())[0]) == 16000


def fake_teachers(monkeypatch) -> teachers.Teacher:
    """Puts in place of the networks a teacher whose feature is the level of each 20 ms."""

    class Level(teachers.Teacher):
        name, sample_rate, dim, rate, depth = "level", 16000, 3, 50.0, 2

        def encode(self, wavs, layer=-1):
            cut = [w[: len(w) // 320 * 320].reshape(-1, 320) for w in wavs]
            return [np.stack([c.std(1), c.max(1), c.min(1)], 1).astype(np.float32) for c in cut]

    monkeypatch.setattr(teachers, "load_teacher", lambda *_: Level())
    return Level()


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
    preparation.prepare(config)  # 2 of 44: within 5 %
    printed = capsys.readouterr().out
    assert "skipped 1 clips: silent (hush.wav)" in printed
    assert "skipped 1 clips: cannot be decoded (text.wav)" in printed
    meta = data.read_meta(config.data_dir)
    assert meta["skipped"] == {"silent": ["hush.wav"], "cannot be decoded": ["text.wav"]}
    assert [a + b for a, b in zip(meta["train"]["clips"], meta["held_out"]["clips"], strict=True)] == [13, 29]
    soundfile.write(audio_dir / "short.wav", sound(rng, 0.1), 16000)
    other = replace(config, data_dir=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"3 of 45 clips cannot be used"):
        preparation.prepare(other)
    assert "skipped 1 clips: too short (short.wav)" in capsys.readouterr().out
    assert not (tmp_path / "other" / "meta.json").exists()  # never trained on


def test_what_to_change_is_said_before_a_tokenizer_is_fitted(tmp_path, speech_dir, audio_dir, monkeypatch):
    fake_teachers(monkeypatch)
    monkeypatch.delattr(tokenizer, "fit")
    config = folder_config(tmp_path, speech_dir, audio_dir, min_seconds=0.61)
    with pytest.raises(DataError, match=r"clips cannot be used \(too short \d+\); lower --min_seconds, delete .*prep"):
        preparation.prepare(config)
    for text in speech_dir.rglob("*.txt"):
        text.unlink()
    with pytest.raises(DataError, match=r"(\d+) of \1 speech clips .*\(no text \1\); give each .*named \.txt"):
        preparation.prepare(folder_config(tmp_path, speech_dir, audio_dir, data_dir=str(tmp_path / "other")))


def test_too_many_losses_stop_at_the_shard_that_has_them(tmp_path, speech_dir, audio_dir, monkeypatch):
    """With a tokenizer that is fitted elsewhere nothing is decoded before the shards."""
    fake_teachers(monkeypatch)
    monkeypatch.setattr(data, "SHARD_CLIPS", 1)
    monkeypatch.setattr(data, "fit_tokenizers", lambda *_: None)
    monkeypatch.setattr(data, "load_tokenizers", lambda *_: [None, None])
    with pytest.raises(DataError, match=r"1 of 15 clips cannot be used"):
        preparation.prepare(folder_config(tmp_path, speech_dir, audio_dir, min_seconds=0.61))
    assert len(list((tmp_path / "prepared").glob("*_0*"))) == 1


@pytest.mark.parametrize("share, what", [(0.0, "is held out; pass a larger"), (1.0, "to train on; pass a smaller")])
def test_a_split_without_a_domain_is_refused(tmp_path, speech_dir, audio_dir, share, what):
    with pytest.raises(DataError, match=f"no speech clip.* {what} --held_out"):
        preparation.prepare(folder_config(tmp_path, speech_dir, audio_dir, held_out=share))
    assert not (tmp_path / "prepared").exists()  # so that another share can be tried at once


def test_a_domain_whose_held_out_clips_are_all_lost_is_refused(tmp_path, speech_dir, audio_dir, monkeypatch):
    fake_teachers(monkeypatch)
    monkeypatch.setattr(data, "LOST_LIMIT", 1.0)
    config = folder_config(tmp_path, speech_dir, audio_dir, held_out=0.01)
    clips, _ = corpora.read(config)
    for clip in preparation.plan_shards(clips, config)["held_out_00000"]:
        if clip.domain == SPEECH:
            clip.source.write_bytes(b"not sound")
    with pytest.raises(DataError, match=r"no speech clip is held out; pass a larger --held_out \(now 0.01\)"):
        preparation.prepare(config)
    assert not (tmp_path / "prepared" / "meta.json").exists()


def test_segments_that_begin_together_keep_their_own_tokens(tmp_path, speech_dir, audio_dir, rng, monkeypatch):
    fake_teachers(monkeypatch)
    soundfile.write(tmp_path / "long.wav", sound(rng, 4.0), 16000)
    rows = [{"path": "long.wav", "text": "x", "domain": "audio", "end": end} for end in (1, 2, 3)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = folder_config(tmp_path, speech_dir, audio_dir, manifest=str(tmp_path / "m.jsonl"))
    preparation.prepare(config)
    found = {}
    for split in ("train", "held_out"):
        dataset = data.Dataset(config.data_dir, split)
        found |= {dataset.name_and_text(i)[0]: len(dataset.tokens(i)) for i in range(len(dataset))}
    assert [found[name] for name in ("long.wav", "long.wav#2", "long.wav#3")] == [25, 50, 75]


# ---- preparation


def test_ensure_prepared(tiny_config, monkeypatch):
    calls = []
    monkeypatch.setattr(data, "prepare", calls.append)
    assert preparation.ensure_prepared(tiny_config)["teachers"][0][0] == "whisper"
    preparation.ensure_prepared(replace(tiny_config, learning_rate=1e-5, nfe=4, n_layer=2))  # of no concern to the data
    assert not calls
    with pytest.raises(DataError, match="--data_dir=ANOTHER_FOLDER") as error:
        preparation.ensure_prepared(replace(tiny_config, speech_codes=17, mel_floor=-9.0))
    assert "speech_codes: 16 -> 17; mel_floor: -11.5129 -> -9.0" in str(error.value) and "\n" not in str(error.value)
    (Path(tiny_config.data_dir) / "meta.json").unlink()  # unfinished
    with pytest.raises(DataError):  # prepare does nothing here
        preparation.ensure_prepared(tiny_config)
    assert calls == [tiny_config]


def test_a_finished_folder_needs_no_corpus(tiny_config):
    config = replace(tiny_config, speech_dir="", audio_dir="", librispeech_dir="/gone", manifest="gone.jsonl")
    assert preparation.ensure_prepared(config)["prepared_with"] == data.prepared_with(tiny_config)


def test_a_finished_folder_of_another_corpus_is_refused(tiny_config):
    """Where the config names one, however its path is written."""
    path = Path(tiny_config.data_dir) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"corpus": data.corpus_of(tiny_config)}))
    preparation.ensure_prepared(replace(tiny_config, speech_dir="./demo/", audio_dir=""))
    with pytest.raises(DataError, match="speech_dir: 'demo' -> 'mine'.* leave them out to use it"):
        preparation.ensure_prepared(replace(tiny_config, speech_dir="mine"))


def test_an_interrupt_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "prepare", interrupted)
    with pytest.raises(SystemExit) as stop:
        preparation.ensure_prepared(Config(data_dir=str(tmp_path / "d")))
    assert stop.value.code == 75 and "the same command continues" in capsys.readouterr().err


def test_a_folder_that_is_no_prepared_data_is_not_deleted(tmp_path, speech_dir, audio_dir, monkeypatch):
    """--data_dir=my/speech by mistake, or --data_dir=data: an error, not the end of the recordings."""
    fake_teachers(monkeypatch)
    config = folder_config(tmp_path, speech_dir, audio_dir, data_dir=str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="mine holds other files; pass --data_dir=NEW_FOLDER"):
        preparation.ensure_prepared(config)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def tree(folder: str) -> dict[str, bytes]:
    """Every file of a prepared folder except those that hold its own path."""
    root = Path(folder)
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def test_an_interrupted_preparation_goes_on(tmp_path, speech_dir, audio_dir, monkeypatch):
    """Stopped in its second shard, with a half-written one lying about, it ends byte for byte like an unbroken one."""
    fake_teachers(monkeypatch)
    monkeypatch.setattr(data, "SHARD_CLIPS", 3)
    config = folder_config(tmp_path, speech_dir, audio_dir)
    preparation.prepare(config)
    whole, write, calls = tree(config.data_dir), preparation.write_shard, []

    def fails(path, *rest):
        calls.append(path.name)
        if len(calls) == 2:
            (path.with_name(f".{path.name}.part")).mkdir()
            (path.with_name(f".{path.name}.part") / "mel.bin").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(data, "write_shard", fails)
    other = replace(config, data_dir=str(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(other)
    with pytest.raises(DataError):  # half-prepared: not for training
        data.Dataset(other.data_dir, "train")
    preparation.ensure_prepared(other)
    assert len(calls) == len(set(calls)) + 1  # the shard that failed was done again, the first was not
    assert tree(other.data_dir) == whole


def test_several_prepare_one_folder_together(tmp_path, speech_dir, audio_dir, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor  # locks are per open file, so threads stand for processes

    fake_teachers(monkeypatch)
    monkeypatch.setattr(data, "SHARD_CLIPS", 2)
    config = folder_config(tmp_path, speech_dir, audio_dir)
    preparation.prepare(config)
    other, written, write = replace(config, data_dir=str(tmp_path / "other")), [], preparation.write_shard
    monkeypatch.setattr(data, "write_shard", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(preparation.prepare, other) for _ in range(3)]:
            done.result()
    assert len(written) == len(set(written))
    assert tree(other.data_dir) == tree(config.data_dir) and preparation.verify(other.data_dir) == []


def test_another_setting_or_corpus_half_way_is_refused(tmp_path, speech_dir, audio_dir, rng, monkeypatch):
    fake_teachers(monkeypatch)
    config = folder_config(tmp_path, speech_dir, audio_dir)
    preparation.prepare(config)
    (Path(config.data_dir) / "meta.json").unlink()
    with pytest.raises(DataError, match=r"begun with other settings \(mel_floor: -11.5129 -> -9.0\)"):
        preparation.prepare(replace(config, mel_floor=-9.0))
    preparation.prepare(replace(config, speech_dir=f"{speech_dir}/"))  # the same folder
    (Path(config.data_dir) / "meta.json").unlink()
    soundfile.write(audio_dir / "new.wav", sound(rng, 0.6), 16000)
    with pytest.raises(DataError, match="the corpus: 15 -> 16 clips"):
        preparation.prepare(config)


def test_a_tokenizer_of_another_size_is_refused(tmp_path, speech_dir, audio_dir, monkeypatch):
    fake_teachers(monkeypatch)
    tokenizer.save(tokenizer.Tokenizer(tokenizer.TokenizerConfig(3, 9, 25, 16)), tmp_path / "ast.pt")
    config = folder_config(tmp_path, speech_dir, audio_dir, audio_tokenizer=str(tmp_path / "ast.pt"))
    with pytest.raises(DataError, match=r"are \(9, 25, 3\), this config wants \(8, 25, 3\)"):
        preparation.prepare(config)
    fits = replace(config, audio_codes=9, data_dir=str(tmp_path / "fits"))
    preparation.ensure_prepared(fits)
    (tmp_path / "fits" / "meta.json").unlink()  # another file under the same name, between two sessions
    tokenizer.save(tokenizer.Tokenizer(tokenizer.TokenizerConfig(3, 9, 25, 16)), tmp_path / "ast.pt")
    with pytest.raises(DataError, match=r"other settings \(sha256 of audio_tokenizer: '\w+' -> '\w+'\)"):
        preparation.prepare(fits)


def test_config_b_from_real_layouts(tmp_path, librispeech, audioset, beats_file, rng, monkeypatch):
    """LibriSpeech and AudioSet trees, a small BEATs as teacher and as second stream: each code where its patch is."""
    level = fake_teachers(monkeypatch)
    monkeypatch.setattr(
        teachers, "load_teacher", lambda n, s, d: level if n == "whisper" else teachers.BEATs.load(s, d)
    )
    for i in range(2):
        soundfile.write(audioset / "clips" / f"zZ9_-_-_-_x_{i}.wav", sound(rng, 0.9), 16000)
    config = folder_config(
        tmp_path, "", "", librispeech_dir=str(librispeech), audioset_dir=str(audioset), audio_teacher=str(beats_file),
        beats_tokens=True, beats_tokenizer=str(beats_file), held_out=0.2,
    )  # fmt: skip
    meta = preparation.ensure_prepared(config)
    assert meta["token_rates"] == [50, 50] and meta["streams"] == 2
    assert meta["teachers"] == [["level", 3], ["beats", 32]]
    beats, train = teachers.BEATs.load(beats_file), data.Dataset(config.data_dir, "train")
    for i in range(len(train)):
        name, text = train.name_and_text(i)
        root = (librispeech, audioset)[train.index[i]["domain"]]
        assert text in ("Speech, Gush", "Music", "/m/0unknown") or text.startswith("speaker ")
        wav = audio.resample(audio.read(root / name, 24000), 24000, 16000)
        [codes] = beats.codes([wav])
        second = train.tokens(i)[:, 1]
        at = np.minimum(np.arange(len(second)), len(codes) - 1)
        assert (second == codes[at]).mean() > 0.9  # resampled twice here: near ties may differ
    batch = train.batch(np.arange(2))
    assert batch.tokens.dim() == 3 and batch.tokens.shape[2] == 2


def test_an_impulse_has_its_second_token_under_its_mel_frame(beats_file, rng):
    """Silence with one click: the patch that hears it, the tokens that follow that patch, and the mel frames they last
    all lie at the click, at either token rate."""
    beats, seconds = teachers.BEATs.load(beats_file), 3.0
    for rate in (50, 25):
        click = float(rng.uniform(0.3, 2.5))
        at24 = np.zeros(int(24000 * seconds), np.float32)
        at16 = np.zeros(int(16000 * seconds), np.float32)
        at24[int(24000 * click)] = at16[int(16000 * click)] = 1.0
        loud = int(audio.log_mel(torch.from_numpy(at24)).sum(1).argmax())  # the mel frame of the click
        bank = beats.fbank(at16)
        patch = int((bank.sum(1) - bank.sum(1).min()).argmax()) // 16
        T = 1 + int(24000 * seconds) // 256
        n = data.token_count(T, rate)
        rows = np.repeat(np.arange(len(bank) // 16), 8)  # the time patch of each code, time-major
        own = np.flatnonzero(tokenizer.at_token_times(rows, n, rate, beats.rate) == patch)
        assert own[0] / n * T - 3 <= loud <= (own[-1] + 1) / n * T + 3  # a 25 ms window reaches over a patch's edge


def test_prepare_end_to_end(tmp_path, capsys):
    """Twelve real clips as wav files in folders, the real networks, small codebooks."""
    config = folder_config(
        tmp_path, tmp_path / "speech", tmp_path / "sounds", speech_codes=32, audio_codes=32, tokenizer_steps=5
    )
    wanted = {"speech": (demo.demo_speech(), 7), "sounds": (demo.demo_audio(), 5)}
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
    meta = preparation.ensure_prepared(config)
    folder = Path(config.data_dir)
    assert {f.name for f in folder.iterdir()} == {
        "plan.json", "meta.json", "train.npy", "held_out.npy", "train_00000", "held_out_00000",
        "speech_tokenizer.pt", "audio_tokenizer.pt", "speech_tokens.json", "audio_tokens.json",
    }  # fmt: skip
    assert preparation.verify(config.data_dir) == []
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
            np.testing.assert_array_equal(dataset.mel(i), mel.astype(np.float16))
            codes = dataset.tokens(i)
            assert codes.shape == (data.token_count(len(mel), (50, 25)[r["domain"]]), 1)
            assert codes.min() >= 0 and codes.max() < 32
            if dataset is held:  # as sample.py does to one recording
                own = preparation.encode_file(str(source), int(r["domain"]), config)
                np.testing.assert_array_equal(own.tokens, codes)
                np.testing.assert_allclose(own.style, dataset.style(i).astype(np.float32), rtol=2e-2, atol=2e-2)
    with pytest.raises(AudioError, match=r"gone\.wav: cannot be decoded"):
        preparation.encode_file(str(tmp_path / "gone.wav"), SPEECH, config)
    stored = np.concatenate([train.mel(i) for i in range(len(train))]).astype(np.float64).clip(min=config.mel_floor)
    np.testing.assert_allclose(meta["mel_mean"], stored.mean(0), rtol=1e-6)  # of the training split alone
    np.testing.assert_allclose(meta["mel_std"], stored.std(0).clip(1e-3), rtol=1e-6)
    for d, (name, role) in enumerate((("whisper", "whisper_tiny"), ("aisfx", "aisfx"))):
        teacher = demo.load_teacher(name, demo.fetch(role))
        i = int(np.flatnonzero(train.index["domain"] == d)[-1])
        source = tmp_path / ("speech", "sounds")[d] / train.name_and_text(i)[0]
        [alone] = teacher.embed([audio.read(source, teacher.sample_rate)])
        np.testing.assert_allclose(train.embedding(i), alone, atol=1e-3 * np.abs(alone).max())
        j = int(np.flatnonzero(train.index["domain"] == d)[0])
        assert not np.allclose(train.embedding(j), alone, atol=0.05)
    assert "prepared" in capsys.readouterr().out
    # a finished folder is used as it is; one without meta.json is not
    before = (folder / "meta.json").stat().st_mtime_ns
    assert preparation.ensure_prepared(config) == meta and (folder / "meta.json").stat().st_mtime_ns == before
    shutil.rmtree(tmp_path / "sounds")
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="--audio_dir=FOLDER"):
        preparation.ensure_prepared(config)
