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
MANIFEST_LINE = '{"path": ..., "text": ..., "domain": "speech" or "audio"}, and "start", "end", "group" where wanted'
PUBLIC = ["librispeech_dir", "audioset_dir"]  # each domain's option for a published corpus


@dataclass
class Clip:
    """One recording before preparation."""

    name: str
    source: Path | bytes
    text: str
    domain: int
    group: str  # of clips that stay on one side of the held-out split
    start: float = 0.0  # seconds: what is taken of the recording
    end: float | None = None

    @property
    def key(self) -> tuple[int, str]:
        """What names the clip among all others."""
        return self.domain, self.name


def read(config) -> tuple[list[Clip], list[str]]:
    """All clips of the config's corpora in a fixed order, and a line for each thing left out. Raises DataError."""
    clips, notes = [], []
    for d, path in enumerate((config.speech_dir, config.audio_dir)):
        if path:
            clips += of_demo(d) if path == "demo" else folder(path, d)
    for reader, path in ((librispeech, config.librispeech_dir), (audioset, config.audioset_dir)):
        if path:
            found, note = reader(path)
            clips += found
            notes += [note] * bool(note)
    if config.manifest:
        clips += manifest(config.manifest)
    for d, name in enumerate(DOMAINS):
        if not any(c.domain == d for c in clips):
            raise DataError(f"no {name} clips: pass --{name}_dir=FOLDER or --{PUBLIC[d]}=FOLDER")
    taken: set[tuple[int, str]] = set()
    for clip in clips:  # what is kept of a clip later is kept by its key: a name that another one has is numbered
        name, count = clip.name, 1
        while clip.key in taken:
            count += 1
            clip.name = f"{name}#{count}"
        taken.add(clip.key)
    return clips, notes


def _text(file: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises DataError for another encoding."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def folder(path: str, domain: int) -> list[Clip]:
    """Any folder: the text is a same-named .txt, else (audio only) the file's name. Grouped by text, else by name."""
    root, clips = Path(path), []
    for file in sorted(f for f in root.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES):
        text, group = file.stem.replace("_", " ") if domain == AUDIO else "", file.stem
        if file.with_suffix(".txt").exists():
            text = _text(file.with_suffix(".txt")).strip()
            group = normal(text)
        clips.append(Clip(str(file.relative_to(root)), file, text, domain, group))
    if not clips:
        raise DataError(f"{DOMAINS[domain]}_dir={path}: no audio files ({' '.join(sorted(AUDIO_SUFFIXES))}) in it")
    return clips


def librispeech(path: str) -> tuple[list[Clip], str]:
    """LibriSpeech's splits below `path`: SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac and .trans.txt, by speaker."""
    root, clips, missing = Path(path), [], 0
    for listing in sorted(root.rglob("*.trans.txt")):
        for line in _text(listing).split("\n"):
            utterance, _, text = line.partition(" ")
            file = listing.parent / f"{utterance}.flac"
            if file.exists():
                clips.append(Clip(str(file.relative_to(root)), file, text.lower(), SPEECH, utterance.split("-")[0]))
            elif utterance:
                missing += 1
    if not clips:
        raise DataError(f"librispeech_dir={path}: no SPEAKER-CHAPTER.trans.txt with its .flac files below it")
    return clips, f"LibriSpeech: {missing} transcribed utterances have no .flac" if missing else ""


def audioset(path: str) -> tuple[list[Clip], str]:
    """AudioSet below `path`: its segments CSVs, ontology.json, and clips whose names begin with the YouTube id, or with
    Y and the id. The text is the names of the labels. Grouped by video."""
    root = Path(path)
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
    clips = []
    for file in sorted(f for f in root.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES):
        video = next((i for i in (file.stem[:11], file.stem[1:12]) if i in labels), None)  # ids have 11 characters
        if video:
            clips.append(Clip(str(file.relative_to(root)), file, labels[video], AUDIO, video))
    if not clips:
        raise DataError(f"audioset_dir={path}: no clip below it is named after a YouTube id of its segments CSVs")
    return clips, f"AudioSet: {len(labels) - len({c.group for c in clips})} of {len(labels)} segments have no clip"


def manifest(path: str) -> list[Clip]:
    """A .jsonl file: a MANIFEST_LINE a clip, its path from the file's folder. Raises DataError that names the line."""
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
            what = f"{type(error).__name__} {error}; expected {MANIFEST_LINE}"
            raise DataError(f"{path}, line {number}: {what}") from None
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
            if total < target:
                chosen.add((d, group))
                total += sizes[group]
    return [(c.domain, c.group) in chosen for c in clips]
