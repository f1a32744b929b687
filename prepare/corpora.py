"""Corpora as lists of clips: LibriSpeech, AudioSet, any folder, JSONL manifests, and the demo's packages.

    clips, notes = corpora.read(config)      # every clip of the config's corpora; what was left out, a line each
    out = corpora.held_out(clips, 0.1, 0)    # True for the held-out ones, in whole speakers, videos or texts

Nothing is decoded here. Licences and paths stay the user's.
"""

import collections
import csv
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import audio
from common import AUDIO, DOMAINS, SPEECH, DataError
from prepare import demo

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus", *audio.PYAV_SUFFIXES}


@dataclass
class Clip:
    """One recording before preparation. `group` keeps clips together on one side of the held-out split; `start` and
    `end`, in seconds, take a part of the recording."""

    name: str
    source: Path | bytes
    text: str
    domain: int
    group: str
    start: float = 0.0
    end: float | None = None


def read(config) -> tuple[list[Clip], list[str]]:
    """All clips of the config's corpora in a fixed order, and a line for each thing that was left out. Raises DataError
    for a corpus that is not there or a domain without clips."""
    clips: list[Clip] = []
    notes: list[str] = []
    for d, name in enumerate(DOMAINS):
        value = getattr(config, f"{name}_dir")
        if value == "demo":
            clips += of_demo(d)
        elif value:
            clips += folder(value, d)
    for reader, value in ((librispeech, config.librispeech_dir), (audioset, config.audioset_dir)):
        if value:
            found, note = reader(value)
            clips += found
            notes += note
    if config.manifest:
        clips += manifest(config.manifest)
    for d, name in enumerate(DOMAINS):
        if not any(c.domain == d for c in clips):
            raise DataError(f"no {name} clips: pass --{name}_dir=FOLDER or --{('librispeech', 'audioset')[d]}_dir")
    _make_names_unique(clips)
    return clips, notes


def _make_names_unique(clips: list[Clip]) -> None:
    """Numbers the clips of a domain whose name another one has: what is kept of a clip later is kept by its name."""
    taken = set()
    for clip in clips:
        name, count = clip.name, 1
        while (clip.domain, clip.name) in taken:
            count += 1
            clip.name = f"{name}#{count}"
        taken.add((clip.domain, clip.name))


def _text(file: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises DataError that names a file of another
    encoding."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _existing(path: str, key: str) -> Path:
    if not Path(path).is_dir():
        raise DataError(f"{key}={path}: no such folder; pass --{key}=FOLDER")
    return Path(path)


def folder(path: str, domain: int) -> list[Clip]:
    """Any folder: the text is a same-named .txt, else (audio only) the file's name. Grouped by text, else by name."""
    key = f"{DOMAINS[domain]}_dir"
    root, clips = _existing(path, key), []
    for file in sorted(f for f in root.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES):
        own_text = file.with_suffix(".txt")
        if own_text.exists():
            text = _text(own_text).strip()
            group = normal(text)
        else:
            text, group = file.stem.replace("_", " ") if domain == AUDIO else "", file.stem
        clips.append(Clip(str(file.relative_to(root)), file, text, domain, group))
    if not clips:
        raise DataError(f"{key}={path}: no audio files ({' '.join(sorted(AUDIO_SUFFIXES))}) in it")
    return clips


def librispeech(path: str) -> tuple[list[Clip], list[str]]:
    """LibriSpeech, any of its splits below `path`: SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, texts in .trans.txt, in
    capitals there and in small letters here. Grouped by speaker."""
    root, clips, missing = _existing(path, "librispeech_dir"), [], 0
    for listing in sorted(root.rglob("*.trans.txt")):
        for line in _text(listing).split("\n"):
            utterance, _, text = line.partition(" ")
            file = listing.parent / f"{utterance}.flac"
            if file.exists():
                name = str(file.relative_to(root))
                clips.append(Clip(name, file, text.lower(), SPEECH, utterance.split("-")[0]))
            elif utterance:
                missing += 1
    if not clips:
        raise DataError(f"librispeech_dir={path}: no SPEAKER-CHAPTER.trans.txt with its .flac files below it")
    return clips, [f"LibriSpeech: {missing} transcribed utterances have no .flac"] if missing else []


def audioset(path: str) -> tuple[list[Clip], list[str]]:
    """AudioSet below `path`: its segments CSVs, ontology.json, and clips whose names begin with the YouTube id (also
    after a Y, as some downloaders do). The text is the names of the labels. Grouped by video."""
    root = _existing(path, "audioset_dir")
    ontology = next(iter(sorted(root.rglob("ontology.json"))), None)
    listings = sorted(root.rglob("*segments*.csv"))
    if ontology is None or not listings:
        raise DataError(f"audioset_dir={path}: expected ontology.json and AudioSet's *_segments.csv below it")
    try:
        names = {entry["id"]: entry["name"] for entry in json.loads(_text(ontology))}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{ontology}: not AudioSet's ontology ({type(error).__name__} {error}); get it again") from None
    labels: dict[str, str] = {}
    for listing in listings:
        for number, line in enumerate(_text(listing).split("\n"), 1):
            if line.startswith("#") or not line.strip():
                continue
            [row] = csv.reader([line], skipinitialspace=True)
            if len(row) != 4:
                raise DataError(f'{listing}, line {number}: expected YTID, start, end, "labels"')
            labels[row[0]] = ", ".join(names.get(label, label) for label in row[3].split(","))
    clips, found = [], set()
    for file in sorted(f for f in root.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES):
        video = next((i for i in (file.stem[:11], file.stem[1:12]) if i in labels), None)  # ids have 11 characters
        if video:
            clips.append(Clip(str(file.relative_to(root)), file, labels[video], AUDIO, video))
            found.add(video)
    if not clips:
        raise DataError(f"audioset_dir={path}: no clip below it is named after a YouTube id of its segments CSVs")
    return clips, [f"AudioSet: {len(labels) - len(found)} of {len(labels)} segments have no clip"]


def manifest(path: str) -> list[Clip]:
    """A .jsonl file: a line a clip with path (from the file's folder), text and domain, and where wanted start, end (in
    seconds) and group. Raises DataError that names the line."""
    file, clips = Path(path), []
    if not file.is_file():
        raise DataError(f"manifest={path}: no such file")
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            start, end = float(row.get("start") or 0), row.get("end")
            if not 0 <= start < (math.inf if end is None else float(end)):
                raise ValueError(f"start {start:g} and end {end} are no part of a recording")
            if not isinstance(row["text"], str):
                raise TypeError(f"text is {json.dumps(row['text'])}")
            name = f"{row['path']}" + (f"@{start:g}" if start else "")
            group = str(row.get("group", row["path"]))
            source, domain = file.parent / row["path"], DOMAINS.index(row["domain"])
            clips.append(Clip(name, source, row["text"], domain, group, start, None if end is None else float(end)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{path}, line {number}: {type(error).__name__} {error}; expected {{"path": ..., "text": ..., '
                f'"domain": "speech" or "audio"}}, and "start", "end", "group" where wanted'
            ) from None
    return clips


def of_demo(domain: int) -> list[Clip]:
    """The clips of the embedded default, grouped by text or by name."""
    if domain == SPEECH:
        return [Clip(name, content, text, SPEECH, normal(text)) for name, content, text in demo.speech()]
    return [Clip(name, content, text, AUDIO, group) for name, content, text, group in demo.sounds()]


def normal(text: str) -> str:
    """Letters, digits and spaces of a text, in small letters."""
    return "".join(c for c in text.lower() if c.isalnum() or c == " ")


def held_out(clips: list[Clip], share: float, seed: int) -> list[bool]:
    """True for the held-out clips: whole groups in hash order until `share` of each domain's clips is reached."""
    chosen = set()
    for d in range(len(DOMAINS)):
        sizes = collections.Counter(c.group for c in clips if c.domain == d)
        order = sorted(sizes, key=lambda g: hashlib.sha256(f"{seed}/{d}/{g}".encode()).digest())
        target, total = share * sum(sizes.values()), 0
        for group in order:
            if total >= target:
                break
            chosen.add((d, group))
            total += sizes[group]
    return [(c.domain, c.group) in chosen for c in clips]
