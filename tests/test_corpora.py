"""corpora.py: each layout on a small tree of its own kind, the manifests, and the held-out split."""

import json
import os
from pathlib import Path

import pytest

from common import AUDIO, SPEECH, DataError
from prepare import corpora
from prepare.corpora import Clip
from train import Config


def test_folders(speech_dir, audio_dir, tmp_path):
    clips = {c.name: c for c in corpora.folder(str(speech_dir), SPEECH)[0]}
    assert len(clips) == 13
    clip = clips["deep/7.flac"]
    assert clip.text == "speaker says 7" and clip.group == "speaker says 7" and clip.domain == SPEECH
    assert clips["own.wav"].text == "Héllo, there!" and clips["own.wav"].group == "héllo there"
    texts = {c.name: c.text for c in corpora.folder(str(audio_dir), AUDIO)[0]}
    assert texts == {"deep/dog_bark.WAV": "dog bark", "rain.ogg": "Rain on a roof"}
    (tmp_path / "empty").mkdir()
    for name, d, key in (("no", SPEECH, "speech_dir"), ("empty", AUDIO, "audio_dir")):
        with pytest.raises(DataError, match=rf"{key}=.*/{name}: no audio files \(.*\.flac"):
            corpora.folder(str(tmp_path / name), d)


def test_names_that_are_no_text_are_escaped(tmp_path):
    """A newline parts name and text where they are stored; a name that is not UTF-8 cannot be encoded."""
    names = (b"dog\nbark.wav", b"caf\xe9.wav", b"tab\tand\xc2\xa0space.wav", "größe_雨.wav".encode())
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    clips = corpora.read(Config(audio_dir=str(tmp_path), speech_dir=str(tmp_path)))[0][4:]
    wanted = {"dog\\nbark.wav", "caf\\udce9.wav", "tab\\tand\\xa0space.wav", "größe_雨.wav"}
    assert {c.name for c in clips} == wanted
    for clip in clips:
        stored = f"{clip.name}\n{clip.text}".encode().decode().partition("\n")
        assert stored[0] == clip.name and stored[2] == clip.name.removesuffix(".wav").replace("_", " ")
        assert clip.group.encode() and clip.source.is_file()
    assert len(corpora.held_out(clips, 0.5, 0)) == 4
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_bytes(b"\xe9")
    with pytest.raises(DataError, match=r"caf\\udce9.txt: not UTF-8 text"):
        corpora.folder(str(tmp_path), AUDIO)


def test_only_regular_files_are_recordings_or_texts(audio_dir):
    """What is left out is counted, never opened: that would wait for ever."""
    os.mkfifo(audio_dir / "fifo.wav")
    os.mkfifo(audio_dir / "deep" / "dog_bark.txt")
    (audio_dir / "folder.mp3").mkdir()
    for name, to in (("link", "fifo.wav"), ("device", "/dev/zero"), ("gone", "nothing"), ("fine", "rain.ogg")):
        (audio_dir / f"{name}.ogg").symlink_to(to)
    clips, notes = corpora.read(Config(audio_dir=str(audio_dir), speech_dir=str(audio_dir)))
    assert [c.name for c in clips[3:]] == ["deep/dog_bark.WAV", "fine.ogg", "rain.ogg"] and clips[3].text == "dog bark"
    assert notes == [f"left out 6: not a regular file, as {audio_dir}/deep/dog_bark.txt"] * 2
    for listing in ("m.jsonl", "ontology.json"):
        os.mkfifo(audio_dir / listing)
    (audio_dir / "x_segments.csv").touch()
    for reader, name in ((corpora.manifest, "m.jsonl"), (corpora.audioset, "")):
        with pytest.raises(DataError, match="not a regular file"):
            reader(str(audio_dir / name))


def test_librispeech(librispeech):
    clips, note = corpora.librispeech(str(librispeech))
    assert len(clips) == 11 and note == "LibriSpeech: 1 transcribed utterances have no .flac"
    clip = {c.name: c for c in clips}["dev-clean/26/2/26-2-0001.flac"]
    assert (clip.text, clip.group, clip.domain) == ("speaker 26 says 2 1", "26", SPEECH) and clip.source.exists()
    assert {c.group for c in clips} == {"19", "26", "103"}
    (librispeech / "empty").mkdir()
    with pytest.raises(DataError, match="librispeech_dir=.*no SPEAKER-CHAPTER.trans.txt"):
        corpora.librispeech(str(librispeech / "empty"))


def test_audioset(audioset):
    clips, note = corpora.audioset(str(audioset))
    assert note == "AudioSet: 1 of 3 segments have no clip"
    assert [(c.name, c.text, c.group, c.domain) for c in clips] == [
        ("clips/--PJHxphWEs_30.000.wav", "Speech, Gush", "--PJHxphWEs", AUDIO),
        ("clips/Y-0_abcdefgh.wav", "Music", "-0_abcdefgh", AUDIO),
    ]
    listing = (audioset / "eval_segments.csv").read_text()
    for line in ("abc, 1.0", "abc, one, 2, x", "abc, 3, 2, x", "abc, nan, 2, x", "abc, 1, 2, " + "x" * 200000):
        (audioset / "eval_segments.csv").write_text(listing + line)
        with pytest.raises(DataError, match=r"eval_segments.csv, line 5: expected YTID"):
            corpora.audioset(str(audioset))
    (audioset / "ontology.json").unlink()
    with pytest.raises(DataError, match="ontology.json"):
        corpora.audioset(str(audioset))


def test_manifest(tmp_path):
    rows = [
        {"path": "a.wav", "text": "one", "domain": "speech", "start": 1.5, "end": 3, "group": "anna"},
        {"path": "b/c.ogg", "text": "rain", "domain": "audio"},
        {"path": "d", "text": "one\u2028two", "domain": "speech"},
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "m.jsonl").write_text(lines + "\n", encoding="utf-8-sig")
    assert corpora.manifest(str(tmp_path / "m.jsonl"))[0] == [
        Clip("a.wav@1.5", tmp_path / "a.wav", "one", SPEECH, "anna", 1.5, 3.0),
        Clip("b/c.ogg", tmp_path / "b/c.ogg", "rain", AUDIO, "b/c.ogg", 0.0, None),
        Clip("d", tmp_path / "d", "one\u2028two", SPEECH, "d", 0.0, None),  # a line ends at its newline alone
    ]


ROW = {"path": "a", "text": "", "domain": "audio"}
WRONG = [{"domain": "music"}, {"text": None}, {"text": "\ud800"}, {"start": -1}, {"start": 2, "end": 2}]


@pytest.mark.parametrize("line", ["{", "[]", '{"path": "a.wav", "text": "x"}', *(json.dumps(ROW | w) for w in WRONG)])
def test_a_bad_manifest_line_is_named(tmp_path, line):
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(DataError, match="m.jsonl, line 2: ") as error:
        corpora.manifest(str(tmp_path / "m.jsonl"))
    assert "\n" not in str(error.value)


def test_what_is_not_utf8_or_json_is_named(speech_dir, librispeech, audioset, tmp_path):
    def refused(reader, file, content=b"caf\xe9", match="not UTF-8 text"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{file.name}: {match}") as error:
            reader()
        assert "\n" not in str(error.value)

    refused(lambda: corpora.folder(str(speech_dir), SPEECH), speech_dir / "own.txt")
    refused(lambda: corpora.librispeech(str(librispeech)), next(librispeech.rglob("*.trans.txt")))
    refused(lambda: corpora.audioset(str(audioset)), audioset / "ontology.json", b"[{]", "not AudioSet's ontology")
    (audioset / "ontology.json").write_text("[]")
    refused(lambda: corpora.audioset(str(audioset)), audioset / "eval_segments.csv")
    refused(lambda: corpora.manifest(str(tmp_path / "m.jsonl")), tmp_path / "m.jsonl")


def test_names_are_unique_in_a_domain(audio_dir, tmp_path):
    """Segments that begin together, and two corpora with a file of the same name."""
    part = {"path": "rain.ogg", "text": "rain", "domain": "audio"}
    rows = [{"path": "a", "text": "a", "domain": "speech"}, part, part | {"end": 1}, part | {"start": 1}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clips, _ = corpora.read(Config(audio_dir=str(audio_dir), manifest=str(tmp_path / "m.jsonl")))
    names = ["deep/dog_bark.WAV", "rain.ogg", "a", "rain.ogg#2", "rain.ogg#3", "rain.ogg@1"]
    assert [c.name for c in clips] == names


def test_all_corpora_of_a_config_together(librispeech, audioset, audio_dir, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav", "text": "hi", "domain": "speech"}\n')
    config = Config(librispeech_dir=str(librispeech), audioset_dir=str(audioset), audio_dir=str(audio_dir),
                    manifest=str(tmp_path / "m.jsonl"))  # fmt: skip
    clips, notes = corpora.read(config)
    assert [sum(c.domain == d for c in clips) for d in (SPEECH, AUDIO)] == [12, 4] and len(notes) == 2
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="no clips: pass --speech_dir=FOLDER or --audio_dir=FOLDER"):
        corpora.read(Config(manifest=str(tmp_path / "none.jsonl")))


def test_the_domains_of_a_config_are_those_it_names_a_corpus_of(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav", "text": "hi", "domain": "audio"}\n')
    named = ({}, {"speech_dir": "x"}, {"audioset_dir": "x"}, {"manifest": str(tmp_path / "m.jsonl")})
    assert [corpora.domains(Config(**names)) for names in named] == [[0, 1], [0], [1], [1]]
    assert corpora.domains(Config(librispeech_dir="x", manifest=str(tmp_path / "m.jsonl"))) == [0, 1]


def test_held_out_takes_whole_groups(rng):
    clips = [Clip(f"{d}/{i}", b"", "", d, f"g{rng.integers(60)}") for d in (SPEECH, AUDIO) for i in range(400)]
    out = corpora.held_out(clips, 0.1, 5)
    for d in (SPEECH, AUDIO):
        groups = {False: set(), True: set()}
        for clip, held in zip(clips, out, strict=True):
            if clip.domain == d:
                groups[held].add(clip.group)
        assert not groups[False] & groups[True]
        count = sum(h for c, h in zip(clips, out, strict=True) if c.domain == d)
        assert 40 <= count < 40 + max(sum(c.domain == d and c.group == g for c in clips) for g in groups[True])
    assert out == corpora.held_out(clips, 0.1, 5) != corpora.held_out(clips, 0.1, 6)
    order = rng.permutation(800)  # a clip's side does not depend on the order of the files
    assert [out[i] for i in order] == corpora.held_out([clips[i] for i in order], 0.1, 5)
    assert not any(corpora.held_out(clips, 0.0, 5)) and all(corpora.held_out(clips, 1.0, 5))


def test_the_same_group_name_in_the_other_domain_is_another_group():
    clips = [Clip(f"{d}{i}", b"", "", d, f"g{i}") for d in (SPEECH, AUDIO) for i in range(20)]
    out = corpora.held_out(clips, 0.3, 0)
    assert out[:20] != out[20:] and sum(out[:20]) == sum(out[20:]) == 6
