"""prepare/: decoding, what a config needs, streams that follow each other in time, and preparation: alone, interrupted,
by several processes, with styles added later, and once with the real networks."""

import itertools
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor  # locks are per open file, so threads stand for processes
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY, record, sound

import audio
import common
import data
import probe
import teachers
from audio import AudioError
from common import AUDIO, DOMAINS, SPEECH, DataError, Machine
from configurator import from_dict
from prepare import __main__ as preparation
from prepare import corpora, demo, tokenizer
from prepare.corpora import Clip
from train import Config
from train import train as train_run


class Level(teachers.Teacher):
    """A teacher whose feature is the level of each 20 ms."""

    name, sample_rate, dim, rate, depth = "level", 16000, 3, 50.0, 2

    def encode(self, wavs, layer=-1):
        cut = [w[: len(w) // 320 * 320].reshape(-1, 320) for w in wavs]
        return [np.stack([c.std(1), c.max(1), c.min(1)], 1).astype(np.float32) for c in cut]


@pytest.fixture
def level(monkeypatch) -> Level:
    """Level in place of all networks."""
    monkeypatch.setattr(demo, "fetch", lambda role: role)
    monkeypatch.setattr(demo, "load_teacher", lambda *_: Level())
    return Level()


def folder_config(tmp_path, **changes) -> Config:
    settings = dict(data_dir=str(tmp_path / "prepared"), speech_teacher="demo", audio_teacher="demo", held_out=0.3)
    settings |= dict(speech_tokenizer="whisper_vq", speech_codes=8, audio_codes=8, beats_tokens=False)
    return Config(**settings | dict(tokenizer_steps=4, tokenizer_width=16) | changes)


@pytest.fixture
def config(tmp_path, speech_dir, audio_dir) -> Config:
    """Of the two small folders."""
    return folder_config(tmp_path, speech_dir=str(speech_dir), audio_dir=str(audio_dir))


def elsewhere(config: Config, name: str = "other") -> Config:
    return replace(config, data_dir=str(Path(config.data_dir).with_name(name)))


def run(config: Config, **words) -> int:
    """What the command does."""
    return preparation.main(preparation.PrepareArgs(**asdict(config) | words))


def tree(folder: str) -> dict[str, bytes]:
    """Every file of a prepared folder."""
    root = Path(folder)
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def test_missing_names_every_option():
    assert preparation.missing(Config(**TINY)) == []
    nowhere = {"librispeech_dir": "/nowhere/at/all", "audioset_dir": "/nowhere/else"}
    lines = preparation.missing(Config(**nowhere, audio_tokenizer="no.pt"))
    options = ["--librispeech_dir=", "--audioset_dir=", "--audio_teacher=", "--beats_tokenizer=", "--audio_tokenizer="]
    assert [next(o for o in options if line.startswith(o)) for line in lines[:5]] == options
    assert "/nowhere/at/all" in lines[0] and "/nowhere/else" in lines[1]
    one = preparation.missing(Config(speech_dir="/nowhere"))  # what sounds need is not asked for
    assert not any("audio" in line.split("=")[0] for line in one) and "; now /nowhere" in one[0]
    assert [line.split("=")[0] for line in preparation.missing(Config())[:2]] == ["--librispeech_dir", "--audioset_dir"]
    local = {"speech_teacher": "/no/whisper", "speech_tokenizer_from": "./no/hubert@9"}
    lines = preparation.missing(Config(**local, speech_tokenizer="whisper_vq"))
    assert all(any(line.startswith(f"--{k}=") and repr(v) in line for line in lines) for k, v in local.items())
    assert [common.is_absent(v) for v in ("./vocos", "a/b/c", "owner/name", ".")] == [True, True, False, False]
    with pytest.raises(DataError, match="this config needs what is not here"):
        preparation.prepare(Config())


def test_decode_gives_both_rates_and_says_what_is_wrong(speech_dir):
    config = Config(min_seconds=0.5, max_seconds=2.0)
    clip = Clip("a.wav", speech_dir / "own.wav", "some words", SPEECH, "g")
    p = preparation.decode(clip, config)
    wav = audio.resample(p.wav, p.rate, 24000)
    assert len(p.wav) == 9600 and abs(len(wav) - 14400) <= 1 and p.mel.shape == (len(wav) // 256 + 1, 100)
    preparation.decode(replace(clip, text="", domain=AUDIO), config)  # sounds need no words
    wrong = [({"text": " ... "}, {}, "no text$"), ({"source": b"not sound"}, {}, "cannot be decoded: ")]
    wrong += [({}, {"min_seconds": 0.7}, "too short: 0.60 s"), ({}, {"max_seconds": 0.59}, "too long: 0.60 s")]
    for change, limits, reason in wrong:
        with pytest.raises(AudioError, match=f"^{reason}"):
            preparation.decode(replace(clip, **change), replace(config, **limits))


def test_a_part_is_cut_out_keeps_its_format_and_may_not_be_silent(tmp_path, speech_dir, rng):
    clip = Clip("a.wav", speech_dir / "own.wav", "words", SPEECH, "g", 0.1, 0.4)
    part = preparation.decode(clip, Config(min_seconds=0.1)).wav
    whole = preparation.decode(replace(clip, start=0.0, end=None), Config(min_seconds=0.1)).wav
    np.testing.assert_array_equal(part, whole[1600:6400])
    soundfile.write(tmp_path / "a.wav", np.concatenate([np.zeros(16000), sound(rng, 1.0)]), 16000)
    with pytest.raises(AudioError, match="^silent$"):
        preparation.decode(Clip("a.wav", tmp_path / "a.wav", "words", SPEECH, "g", 0.0, 0.9), Config())
    (tmp_path / "b.g722").write_bytes(rng.integers(0, 256, 16000, np.uint8).tobytes())
    part = Clip("b.g722@1.5", tmp_path / "b.g722", "words", SPEECH, "g", 0.5, 1.5)  # its name has no suffix of its own
    assert len(preparation.decode(part, Config()).wav) == 16000


def test_unusable_clips_are_counted_and_too_many_stop(tmp_path, config, level, rng, capsys):
    audio_dir = Path(config.audio_dir)
    for i in range(27):
        record(audio_dir / f"more_{i}.wav", rng)
    (audio_dir / "text.wav").write_text("this is no recording\n" * 20)
    soundfile.write(audio_dir / "hush.wav", np.zeros(16000), 16000)
    preparation.prepare(config)  # 2 of 44: within 5 %
    printed = capsys.readouterr().out
    assert "skipped 1 clips: silent (hush.wav)" in printed
    assert "skipped 1 clips: cannot be decoded (text.wav)" in printed
    meta = data.read_meta(config.data_dir)
    assert meta["skipped"] == {"silent": ["hush.wav"], "cannot be decoded": ["text.wav"]}
    assert [a + b for a, b in zip(meta["train"]["clips"], meta["held_out"]["clips"], strict=True)] == [13, 29]
    record(audio_dir / "short.wav", rng, seconds=0.1)
    with pytest.raises(DataError, match=r"3 of 45 clips cannot be used \(.*1 too short, as short\.wav"):
        preparation.prepare(elsewhere(config))
    assert not data.is_prepared(tmp_path / "other")  # never trained on


def test_what_to_change_is_said_before_a_tokenizer_is_fitted(config, level, monkeypatch):
    monkeypatch.delattr(tokenizer, "fit")
    with pytest.raises(DataError, match=r"cannot be used \(\d+ too short.*; lower --min_seconds, delete .*prepared"):
        preparation.prepare(replace(config, min_seconds=0.61))
    for text in Path(config.speech_dir).rglob("*.txt"):
        text.unlink()
    with pytest.raises(DataError, match=r"(\d+) of \1 speech clips .*\(\1 no text.*; give each .*named \.txt"):
        preparation.prepare(elsewhere(config))


def test_too_many_losses_stop_at_the_shard_that_has_them(config, level, monkeypatch):
    """With tokenizers that are there nothing is decoded before the shards."""
    monkeypatch.setattr(preparation, "SHARD_CLIPS", 1)
    monkeypatch.setattr(preparation, "fit_tokenizer", lambda *_: None)
    with pytest.raises(DataError, match=r"1 of 15 clips cannot be used"):
        preparation.prepare(replace(config, min_seconds=0.61))
    assert len(list(Path(config.data_dir).glob("*_0*"))) == 1


@pytest.mark.parametrize("share, what", [(0.0, "is held out; pass a larger"), (1.0, "to train on; pass a smaller")])
def test_a_split_without_a_domain_is_refused(tmp_path, config, share, what):
    with pytest.raises(DataError, match=f"no speech clip.* {what} --held_out"):
        preparation.prepare(replace(config, held_out=share))
    assert not (tmp_path / "prepared").exists()  # so that another share can be tried at once


def test_a_domain_whose_held_out_clips_are_all_lost_is_refused(config, level, monkeypatch):
    monkeypatch.setattr(preparation, "LOST_LIMIT", 1.0)
    config = replace(config, held_out=0.01)
    for clip in preparation.plan_shards(corpora.read(config)[0], config)["held_out_00000"]:
        if clip.domain == SPEECH:
            clip.source.write_bytes(b"not sound")
    with pytest.raises(DataError, match=r"no speech clip is held out; pass a larger --held_out \(now 0.01\)"):
        preparation.prepare(config)
    assert not data.is_prepared(config.data_dir)


def test_a_folder_that_is_no_prepared_data_is_not_deleted(tmp_path, config, level):
    """--data_dir=my/speech by mistake, or --data_dir=data: an error, not the end of the recordings."""
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="prepared holds other files; pass --data_dir=NEW_FOLDER"):
        run(config)
    assert (tmp_path / "prepared" / "thesis.txt").exists()
    (tmp_path / "prepared" / "thesis.txt").rename(tmp_path / "prepared" / f".plan.json.{common.PART}")  # a kill's
    assert run(config) == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file holds other files; pass --data_dir=NEW_FOLDER"):
        run(elsewhere(config, "file"))


def test_another_setting_or_corpus_half_way_is_refused(config, level, rng):
    preparation.prepare(config)
    (Path(config.data_dir) / "meta.json").unlink()
    with pytest.raises(DataError, match=r"begun with other settings .*\(mel_floor: -11.5129 -> -9.0\)"):
        preparation.prepare(replace(config, mel_floor=-9.0))
    preparation.prepare(replace(config, speech_dir=f"{config.speech_dir}/"))  # the same folder
    (Path(config.data_dir) / "meta.json").unlink()
    record(Path(config.audio_dir) / "new.wav", rng)
    with pytest.raises(DataError, match="another corpus .*clips: 15 -> 16; names and texts: "):
        preparation.prepare(config)


def test_a_tokenizer_of_another_size_is_refused(tmp_path, config, level):
    tokenizer.save(tokenizer.Tokenizer(tokenizer.TokenizerConfig(3, 9, 25, 16)), tmp_path / "ast.pt")
    config = replace(config, audio_tokenizer=str(tmp_path / "ast.pt"))
    with pytest.raises(DataError, match=r"are \(9, 25, 3\), this config wants \(8, 25, 3\)"):
        preparation.prepare(config)
    fits = replace(elsewhere(config), audio_codes=9)
    preparation.prepare(fits)
    book = np.load(tmp_path / "other" / "audio_codebook.npy")  # of a tokenizer that was given, too
    np.testing.assert_array_equal(book, tokenizer.load(tmp_path / "ast.pt").codebook.numpy())
    (tmp_path / "other" / "meta.json").unlink()  # another file under the same name, between two sessions
    tokenizer.save(tokenizer.Tokenizer(tokenizer.TokenizerConfig(3, 9, 25, 16)), tmp_path / "ast.pt")
    with pytest.raises(DataError, match=r"other settings .*\(sha256 of audio_tokenizer, ast.pt: '\w+' -> '\w+'\)"):
        preparation.prepare(fits)


def test_the_command_prepares_what_is_not_there_and_checks_what_is(tiny_config, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(preparation, "prepare", calls.append)
    assert run(tiny_config) == 0 and not calls
    assert capsys.readouterr().out.startswith("train: 12 speech clips, ")
    with pytest.raises(DataError, match="--data_dir=ANOTHER_FOLDER"):
        run(replace(tiny_config, speech_codes=17))
    (Path(tiny_config.data_dir) / "meta.json").unlink()  # unfinished
    with pytest.raises(DataError):  # prepare does nothing here
        run(tiny_config)
    assert [c.data_dir for c in calls] == [tiny_config.data_dir]
    monkeypatch.setattr(preparation, "prepare", Mock(side_effect=KeyboardInterrupt))
    assert run(tiny_config) == 75 and capsys.readouterr().err.count("the same command continues\n") == 1


def test_the_folder_is_the_same_however_it_is_made(tmp_path, config, level, monkeypatch):
    """Its clips to fit on decoded in chunks; by several processes; stopped in a fit, and in the second shard with a
    half-written one lying about."""
    monkeypatch.setattr(preparation, "SHARD_CLIPS", 3)
    monkeypatch.setattr(tokenizer, "SAVE_EVERY", 1)
    preparation.prepare(config)
    save, write, written = common.save, preparation.write_shard, []

    def save_and_stop(path, state, *rest, **more):
        save(path, state, *rest, **more)
        if state.get("step") == 3:
            raise KeyboardInterrupt

    def count(path, *rest):
        written.append(path.name)
        write(path, *rest)

    def write_half(path, *rest):
        count(path, *rest)
        if len(written) == 2:
            part = path.rename(path.with_name(f".{path.name}.part"))
            (part / "mel.bin").write_bytes(b"half")
            raise KeyboardInterrupt

    stopped = elsewhere(config, "stopped")
    for module, name, fails in ((common, "save", save_and_stop), (preparation, "write_shard", write_half)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, fails)
            preparation.prepare(stopped)
        assert not data.is_prepared(stopped.data_dir)
        assert name != "save" or list(Path(stopped.data_dir).glob(".speech_tokenizer.pt.*"))
    monkeypatch.setattr(preparation, "write_shard", count)
    preparation.prepare(stopped)
    assert len(written) == len(set(written)) + 1  # the shard that failed was done again, the first was not
    written.clear()
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(preparation.prepare, elsewhere(config, "together")) for _ in range(3)]:
            done.result()
    assert len(written) == len(set(written))
    monkeypatch.setattr(preparation, "FIT_CHUNK", 2)
    preparation.prepare(elsewhere(config, "chunks"))
    for name in ("stopped", "together", "chunks"):
        assert tree(str(tmp_path / name)) == tree(config.data_dir), name  # nothing hidden is left either


def test_segments_that_begin_together_keep_their_own_tokens(tmp_path, config, level, rng):
    record(tmp_path / "long.wav", rng, seconds=4.0)
    rows = [{"path": "long.wav", "text": "x", "domain": "audio", "end": end} for end in (1, 2, 3)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preparation.prepare(replace(config, manifest=str(tmp_path / "m.jsonl")))
    found = {}
    for dataset in (data.Dataset(config.data_dir, split) for split in preparation.SPLITS):
        found |= {dataset.name_and_text(i)[0]: len(dataset.tokens(i)) for i in range(len(dataset))}
    assert [found[name] for name in ("long.wav", "long.wav#2", "long.wav#3")] == [25, 50, 75]


def test_styles_are_added_later_and_change_nothing_else(tmp_path, config, level, monkeypatch):
    """From the finished folder alone, after a stop, by two at once, and with a corpus that has moved."""
    monkeypatch.setattr(preparation, "SHARD_CLIPS", 4)
    preparation.prepare(config)
    before, words, calls = tree(config.data_dir), {"styles": config.data_dir}, []
    moved, whole_file = Config(audio_dir=str(tmp_path / "moved")), common.whole_file
    shutil.move(config.audio_dir, moved.audio_dir)
    with pytest.raises(DataError, match="no audio files"):
        run(Config(), **words)

    def fails(path, *rest):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole_file(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "whole_file", fails)
        assert run(moved, **words) == 75 and not data.is_prepared(config.data_dir, "styles")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: run(moved, **words), range(2))) == [0, 0]
    after = tree(config.data_dir)
    assert {k: v for k, v in after.items() if not k.endswith(("style.npy", "styles.json"))} == before
    assert data.is_prepared(config.data_dir, "styles") and data.verify(config.data_dir) == []
    for dataset in (data.Dataset(config.data_dir, split) for split in preparation.SPLITS):
        for i, d in enumerate(dataset.index["domain"].tolist()):
            source = Path((config.speech_dir, moved.audio_dir)[d], dataset.name_and_text(i)[0])
            style = preparation.encode_file(str(source), d, config).style
            np.testing.assert_array_equal(dataset.style(i), style.astype(np.float16))
    calls[0].write_bytes(b"half")
    assert data.verify(config.data_dir) == [f"{calls[0]}: not as it was written"]
    calls[0].unlink()
    for recording in Path(config.speech_dir).rglob("*.*a*"):
        recording.write_bytes(b"")
    with pytest.raises(DataError, match="recordings have changed or moved"):
        run(moved, **words)
    assert not data.is_prepared(config.data_dir, "styles")


def test_teacher_features_are_added_to_the_training_shards(config, level, monkeypatch, capsys):
    """Against a loop over stretches of the teacher's own; after a stop, at two rates side by side."""
    monkeypatch.setattr(preparation, "SHARD_CLIPS", 4)
    preparation.prepare(config)
    before, words = tree(config.data_dir), {"features": config.data_dir}

    def fails(path, *rest):
        assert "per second: 0.0 MB" in capsys.readouterr().out  # said before anything is written
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "whole_file", fails)
        assert run(Config(), **words, target_rate=12.5) == 75 and not data.is_prepared(config.data_dir, "features_12.5")
    for rate in (12.5, 80.0):
        assert run(Config(), **words, target_rate=rate) == 0 and data.is_prepared(config.data_dir, f"features_{rate:g}")
    after, dataset = tree(config.data_dir), data.Dataset(config.data_dir, "train")
    assert {k: v for k, v in after.items() if "features" not in k} == before
    assert {k.split("/")[0] for k in after if k.endswith("80.npy")} == set(dataset.meta["train"]["shards"])
    assert data.verify(config.data_dir) == []
    for i, r in enumerate(dataset.index):
        source = Path((config.speech_dir, config.audio_dir)[r["domain"]], dataset.name_and_text(i)[0])
        p = preparation.decode(Clip("", source, "a", r["domain"], ""), config)
        [x] = level.encode(preparation.heard([p], level))
        few, many = (dataset.features(i, rate, 0, int(r["frames"])).numpy() for rate in (12.5, 80.0))
        assert [len(few), len(many)] == [data.token_count(r["frames"], rate) for rate in (12.5, 80.0)]
        edges = np.arange(len(few) + 1) * len(x) / len(few)
        means = [x[int(a) : int(np.ceil(b))].mean(0) for a, b in itertools.pairwise(edges)]
        np.testing.assert_allclose(few, means, atol=1e-3)
        at = ((np.arange(len(many)) + 0.5) * len(x) / len(many) - 0.5).clip(0, len(x) - 1)
        linear = np.stack([np.interp(at, np.arange(len(x)), column) for column in x.T], 1)
        np.testing.assert_allclose(many, linear, atol=1e-3)
    next(Path(config.data_dir).glob("*/features_0_80.npy")).write_bytes(b"half")
    assert ["not as it was written" in line for line in data.verify(config.data_dir)] == [True]


def test_verify_names_what_is_missing_or_changed(config, level, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "SHARD_CLIPS", 6)
    preparation.prepare(config)
    root = Path(config.data_dir)
    assert run(Config(), verify=config.data_dir) == 0 and "every file is as it was written" in capsys.readouterr().out
    mel = bytearray((root / "train_00001" / "mel.bin").read_bytes())
    mel[100] ^= 1
    (root / "train_00001" / "mel.bin").write_bytes(mel)
    (root / "train_00000" / "wav" / "00000.wav").unlink()
    found = data.verify(config.data_dir)
    assert len(found) == 2 and "wav/00000.wav: missing" in found[0] and "train_00001/mel.bin: not as" in found[1]
    with pytest.raises(DataError, match="2 files of .* are not sound"):
        run(Config(), verify=config.data_dir)
    (root / "train_00001" / "shard.json").unlink()
    (root / "train.npy").write_bytes(b"")
    assert sum("shard.json: missing" in line for line in data.verify(config.data_dir)) == 1
    (root / "train_00000" / "shard.json").write_text("{}")
    assert any("train_00000/shard.json: not as" in line for line in data.verify(config.data_dir))


def test_config_b_from_real_layouts(tmp_path, librispeech, audioset, beats_file, level, rng, monkeypatch):
    """LibriSpeech and AudioSet trees, a small BEATs as teacher and as second stream: each code where its patch is."""
    load = teachers.BEATs.load
    monkeypatch.setattr(demo, "load_teacher", lambda name, source, device: level if name == "whisper" else load(source))
    for i in range(2):
        record(audioset / "clips" / f"zZ9_-_-_-_x_{i}.wav", rng, seconds=0.9)
    config = folder_config(tmp_path, librispeech_dir=str(librispeech), audioset_dir=str(audioset), held_out=0.2)
    config = replace(config, audio_teacher=str(beats_file), beats_tokens=True, beats_tokenizer=str(beats_file))
    assert run(config) == 0
    meta, beats, train = data.check_prepared(config), load(beats_file), data.Dataset(config.data_dir, "train")
    assert (meta["token_rates"], meta["streams"], meta["teachers"]) == ([50, 50], 2, [["level", 3], ["beats", 32]])
    for i in range(len(train)):
        name, text = train.name_and_text(i)
        root = (librispeech, audioset)[train.index[i]["domain"]]
        assert text in ("Speech, Gush", "Music", "/m/0unknown") or text.startswith("speaker ")
        [codes] = beats.encode([audio.read(root / name, 16000)], codes=True)
        second = train.tokens(i)[:, 1]
        at = np.minimum(np.arange(len(second)), len(codes) - 1)
        assert (second == codes[at]).mean() > 0.9  # in a batch there: near ties may differ
    batch = train.batch(np.arange(2))
    assert batch.tokens.dim() == 3 and batch.tokens.shape[2] == 2


def test_an_impulse_has_its_second_token_under_its_mel_frame(beats_file, rng):
    """Silence with one click: the patch that hears it, the tokens that follow that patch, and the mel frames they last
    all lie at the click, at either token rate."""
    beats = teachers.BEATs.load(beats_file)
    for rate in (50, 25):
        click = float(rng.uniform(0.3, 2.5))
        at24, at16 = (np.zeros(3 * r, np.float32) for r in (24000, 16000))
        at24[int(24000 * click)] = at16[int(16000 * click)] = 1.0
        levels, bank = audio.log_mel(torch.from_numpy(at24)).sum(1), beats.fbank(at16).sum(1)
        loud, T, patch = int(levels.argmax()), len(levels), int(bank.argmax()) // 16  # the click's mel frame, and patch
        n = data.token_count(T, rate)
        rows = np.repeat(np.arange(len(bank) // 16), 8)  # the time patch of each code, time-major
        at = np.flatnonzero(tokenizer.at_token_times(rows, n, rate, beats.rate) == patch)
        assert at[0] / n * T - 3 <= loud <= (at[-1] + 1) / n * T + 3  # a 25 ms window reaches over a patch's edge


@pytest.fixture
def only_demo(monkeypatch) -> None:
    """Level in place of the demo's networks alone."""
    load = demo.load_teacher
    monkeypatch.setattr(
        demo, "load_teacher", lambda name, source, device: Level() if source == "demo" else load(name, source, device)
    )


def embeddings_and_tokens(folder: str) -> tuple[list, list]:
    train = data.Dataset(folder, "train")
    speech = np.flatnonzero(train.index["domain"] == SPEECH).tolist()
    return [train.vector(i).tolist() for i in speech], [train.tokens(i).tolist() for i in speech]


def test_another_teacher_or_layer_is_another_preparation_and_leaves_the_tokens(config, hubert, only_demo, tmp_path):
    found = {"demo": config}
    for layer in (1, 2):
        found[layer] = replace(elsewhere(config, f"at_{layer}"), speech_teacher=f"{hubert}@{layer}")
        found[layer] = replace(found[layer], speech_tokenizer_from="demo")
    found["own"] = replace(elsewhere(config, "own"), speech_teacher=f"{hubert}@2")
    for one in found.values():
        preparation.prepare(one)
    names = {key: data.fingerprint(data.check_prepared(one)) for key, one in found.items()}
    assert len(set(names.values())) == 4
    vectors, tokens = zip(*(embeddings_and_tokens(one.data_dir) for one in found.values()), strict=True)
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3] and vectors[1] != vectors[2] == vectors[3]
    assert data.read_meta(found[2].data_dir)["teachers"] == [["hubert", 32], ["level", 3]]
    plan = json.loads(Path(found[2].data_dir, "plan.json").read_text())
    assert plan["sha256 of speech_teacher, model.safetensors"] == common.sha256(Path(hubert, "model.safetensors"))
    with pytest.raises(DataError, match="speech_teacher: .*@1' -> .*@2'"):
        data.check_prepared(replace(found[2], data_dir=found[1].data_dir))


def test_a_teacher_is_added_by_links_to_a_finished_folder(config, hubert, only_demo, monkeypatch, capsys):
    """What is made is what a whole preparation makes, after a stop as well, and the folder it comes from stays."""
    preparation.prepare(config)
    before, other = tree(config.data_dir), elsewhere(replace(config, speech_teacher=f"{hubert}@2"))
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "seal", Mock(side_effect=KeyboardInterrupt))
        assert run(other, add_teacher=config.data_dir) == common.INTERRUPTED
    assert run(other, add_teacher=config.data_dir) == 0 and tree(config.data_dir) == before
    assert "--speech_tokenizer_from=demo --audio_teacher=demo --audio_tokenizer_from=\n" in capsys.readouterr().out
    whole = replace(elsewhere(other, "whole"), speech_tokenizer_from="demo")
    preparation.prepare(whole)
    assert tree(other.data_dir) == tree(whole.data_dir)
    mels = [Path(folder, "train_00000", "mel.bin") for folder in (config.data_dir, other.data_dir)]
    assert mels[0].samefile(mels[1]) and data.verify(other.data_dir) == []
    with pytest.raises(DataError, match="speech_tokenizer_from: '' -> 'demo'|speech_tokenizer_from: 'demo' -> ''"):
        data.check_prepared(other)


def test_two_teachers_of_one_kind_keep_names_of_their_own(config, hubert, only_demo):
    config = replace(config, speech_teacher=hubert, audio_teacher=f"{hubert}@1", speech_tokenizer_from="demo")
    preparation.prepare(config)
    dataset = data.Dataset(config.data_dir, "train")
    assert dataset.meta["teachers"] == [["hubert", 32], ["hubert_audio", 32]]
    assert set(dataset.batch(np.arange(2)).teacher) == {"hubert", "hubert_audio"}


@pytest.mark.parametrize("kind, positions", [("level", 0), ("whisper", 64)])
def test_positions_are_taken_out_of_whispers_states_alone(config, level, monkeypatch, kind, positions):
    monkeypatch.setattr(Level, "name", kind)
    preparation.prepare(config)
    assert tokenizer.load(Path(config.data_dir, "speech_tokenizer.pt")).config.positions == positions


@pytest.mark.parametrize("domain", [SPEECH, AUDIO])
def test_one_domain_needs_nothing_of_the_other(config, level, monkeypatch, capsys, domain):
    """Prepared with styles and features, trained, aligned and probed, with a teacher of the other out of reach."""
    here, other = DOMAINS[domain], DOMAINS[1 - domain]
    config = replace(config, **{f"{other}_dir": "", f"{other}_teacher": "/no/such"})
    assert run(config) == 0 and other not in capsys.readouterr().out
    names = {f.name for f in Path(config.data_dir).iterdir()}
    assert f"{here}_codebook.npy" in names and f"{other}_codebook.npy" not in names
    meta = data.read_meta(config.data_dir)
    assert meta["train"]["clips"][1 - domain] == 0 and meta["teachers"][1 - domain] == ["none", 1]
    assert run(Config(), styles=config.data_dir) == run(Config(), features=config.data_dir) == 0
    dataset = data.Dataset(config.data_dir, "held_out")
    source = Path((config.speech_dir, config.audio_dir)[domain], dataset.name_and_text(0)[0])
    p = preparation.encode_file(str(source), domain, config)
    np.testing.assert_array_equal(p.tokens, dataset.tokens(0))
    np.testing.assert_array_equal(p.style.astype(np.float16), dataset.style(0))
    small = {k: v for k, v in TINY.items() if not k.endswith(("_dir", "_teacher", "_codes", "_tokenizer"))}
    small |= {"align_target": "frames", "refresh_epochs": 2.0, "max_steps": 4, "phase1_steps": 2, "probe_every": 2}
    out_dir = Path(f"{config.data_dir}_run")
    trained = train_run(replace(config, **small, out_dir=str(out_dir), code_init=True), Machine(0, 1, "cpu", "float32"))
    assert trained.objective.selection[1 - domain] == {} and (out_dir / "probe.png").exists()
    assert list(json.loads((out_dir / "selection.json").read_text())) == [here]
    assert all(key.startswith(here) for key in trained.objective.heads.heads)
    printed = capsys.readouterr().out
    assert f"phase II aligns for {here}" in printed and not re.search(rf"(for|held-out|:) {other}|{other} \(", printed)
    assert here in probe.stability({"a": trained.probes[-1]["result"]}, 3)


def test_a_folder_of_the_older_name_of_a_setting_is_usable(tiny_config):
    path = Path(tiny_config.data_dir, "meta.json")
    meta = json.loads(path.read_text())
    meta["prepared_with"]["whisper"] = meta["prepared_with"].pop("speech_teacher")
    del meta["prepared_with"]["speech_tokenizer_from"]
    path.write_text(json.dumps(meta))
    assert data.check_prepared(tiny_config)
    with pytest.raises(DataError, match="speech_teacher: 'demo' -> 'other'"):
        data.check_prepared(replace(tiny_config, speech_teacher="other"))
    assert from_dict(Config, {"whisper": "demo"}, "ckpt.pt").speech_teacher == "demo"


def test_prepare_end_to_end(tmp_path, capsys):
    """Twelve real clips as wav files in folders, the real networks, small codebooks."""
    folders = [tmp_path / "speech", tmp_path / "sounds"]
    for d, (folder, count) in enumerate(zip(folders, (7, 5), strict=True)):
        folder.mkdir()
        clips = (c for c in corpora.folder("demo", d)[0] if c.text)
        decoded = ((c.text, *audio.decode(c.source, c.name)) for c in clips)
        short = (x for x in decoded if 0.6 < len(x[1]) / x[2] < 1.5)
        for i, (text, wav, rate) in enumerate(itertools.islice(short, count)):
            audio.write(folder / f"{i}.wav", wav, rate)
            (folder / f"{i}.txt").write_text(text)
    config = folder_config(tmp_path, speech_dir=str(folders[0]), audio_dir=str(folders[1]))
    config = replace(config, speech_codes=32, audio_codes=32, tokenizer_steps=5)
    assert run(config) == 0 and "prepared" in capsys.readouterr().out
    meta, folder = data.read_meta(config.data_dir), Path(config.data_dir)
    of_domains = {f"{name}_{file}" for name in DOMAINS for file in ("tokenizer.pt", "codebook.npy")}
    whole = {"plan.json", "meta.json", "train.npy", "held_out.npy", "train_00000", "held_out_00000"}
    assert {f.name for f in folder.iterdir()} == of_domains | whole
    assert {f.name for f in tmp_path.iterdir()} == {"speech", "sounds", "prepared"}
    assert meta["teachers"] == [["whisper", 384], ["aisfx", 512]] and data.verify(config.data_dir) == []
    assert np.add(meta["train"]["clips"], meta["held_out"]["clips"]).tolist() == [7, 5]
    assert min(meta["held_out"]["clips"]) > 0
    assert meta["prepared_with"]["speech_codes"] == 32 and set(meta["prepared_with"]) == set(data.PREPARED_WITH)
    for name in DOMAINS:
        book = tokenizer.load(folder / f"{name}_tokenizer.pt").codebook.numpy()
        np.testing.assert_array_equal(np.load(folder / f"{name}_codebook.npy"), book)
    train, held = data.Dataset(folder, "train"), data.Dataset(folder, "held_out")
    for dataset, i in ((split, i) for split in (train, held) for i in range(len(split))):
        d, (name, text), codes = dataset.index[i]["domain"], dataset.name_and_text(i), dataset.tokens(i)
        source = folders[d] / name
        assert source.with_suffix(".txt").read_text().strip() == text and dataset.wav_path(i).exists()
        mel = audio.log_mel(torch.from_numpy(audio.read(source, 24000))).numpy()
        np.testing.assert_array_equal(dataset.mel(i), mel.astype(np.float16))
        assert codes.shape == (data.token_count(len(mel), (50, 25)[d]), 1) and 0 <= codes.min() <= codes.max() < 32
        if dataset is held:  # as sample.py does to one recording
            np.testing.assert_array_equal(preparation.encode_file(str(source), d, config).tokens, codes)
    with pytest.raises(AudioError, match=r"gone\.wav: no such file"):
        preparation.encode_file(str(tmp_path / "gone.wav"), SPEECH, config)
    stored = np.concatenate([train.mel(i) for i in range(len(train))]).astype(np.float64).clip(min=config.mel_floor)
    np.testing.assert_allclose(meta["mel_mean"], stored.mean(0), rtol=1e-6)  # of the training split alone
    np.testing.assert_allclose(meta["mel_std"], stored.std(0).clip(1e-3), rtol=1e-6)
    for d, name in enumerate(("whisper", "aisfx")):
        teacher, of_domain = demo.load_teacher(name), np.flatnonzero(train.index["domain"] == d)
        stored = train.batch(of_domain).teacher[name].numpy()
        [alone] = teacher.embed([audio.read(folders[d] / train.name_and_text(of_domain[-1])[0], teacher.sample_rate)])
        np.testing.assert_allclose(stored[-1], alone, atol=1e-3 * np.abs(alone).max())
        assert not np.allclose(stored[0], alone, atol=0.05)
