"""Corpora as lists of clips: LibriSpeech, AudioSet, any folder, JSONL manifests, and the demo's packages.

clips, notes = corpora.read(config)      # every clip of the config's corpora; what was left out, a line each
out = corpora.held_out(clips, 0.1, 0)    # True for the held-out ones, in whole speakers, videos or texts
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


def domains(config) -> list[int]:
    """The domains that the config names a corpus of, or clips in its manifest; all of them where it names none."""
    found = {c.domain for c in manifest(config.manifest)[0]} if config.manifest else set()
    found |= {d for d, name in enumerate(DOMAINS) if getattr(config, f"{name}_dir") or getattr(config, PUBLIC[d])}
    return sorted(found) or list(range(len(DOMAINS)))


def read(config) -> tuple[list[Clip], list[str]]:
    """All clips of the config's corpora in a fixed order, and a line for each thing left out. Raises DataError."""
    found = [folder(path, d) for d, path in enumerate((config.speech_dir, config.audio_dir)) if path]
    public = ((librispeech, config.librispeech_dir), (audioset, config.audioset_dir), (manifest, config.manifest))
    found += [reader(path) for reader, path in public if path]
    clips, notes = [c for part, _ in found for c in part], [note for _, note in found if note]
    if not clips:
        raise DataError("no clips: pass --speech_dir=FOLDER or --audio_dir=FOLDER")
    taken: set[tuple[int, str]] = set()
    for clip in clips:  # what is kept of a clip later is kept by its key: a name that another one has is numbered
        clip.name, clip.group, count = escaped(clip.name), escaped(clip.group), 1
        name = clip.name
        while clip.key in taken:
            count += 1
            clip.name = f"{name}#{count}"
        taken.add(clip.key)
    return clips, notes


def escaped(name: str) -> str:
    """A file's name in one line of UTF-8: what cannot be printed, such as a newline, is written as in Python."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises DataError for another encoding, or kind."""
    name = escaped(str(file))
    if not file.is_file():  # opening a FIFO would wait for ever
        raise DataError(f"{name}: {'not a regular file' if file.exists() else 'no such file'}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def recordings(root: Path) -> tuple[list[Path], str]:
    """The recordings below `root` in order, and a note of what is called like one, or a text, and no regular file."""
    named = sorted(f for f in root.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES | {".txt"})
    odd = [escaped(str(f)) for f in named if not f.is_file()]
    files = [f for f in named if f.is_file() and f.suffix.lower() != ".txt"]
    return files, f"left out {len(odd)}: not a regular file, as {odd[0]}" if odd else ""


def folder(path: str, domain: int) -> tuple[list[Clip], str]:
    """Any folder: the text is a same-named .txt, else (audio only) the file's name. Grouped by text, else by name."""
    if path == "demo":
        clips = demo.sounds() if domain == AUDIO else demo.speech()
        return [Clip(name, content, text, domain, group or normal(text)) for name, content, text, group in clips], ""
    (files, note), clips = recordings(Path(path)), []
    for file in files:
        group = escaped(file.stem)
        text = group.replace("_", " ") if domain == AUDIO else ""
        if file.with_suffix(".txt").is_file():
            text = read_text(file.with_suffix(".txt")).strip()
            group = normal(text)
        clips.append(Clip(str(file.relative_to(path)), file, text, domain, group))
    if not clips:
        raise DataError(f"{DOMAINS[domain]}_dir={path}: no audio files ({' '.join(sorted(AUDIO_SUFFIXES))}) in it")
    return clips, note


def librispeech(path: str) -> tuple[list[Clip], str]:
    """LibriSpeech's splits below `path`: SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac and .trans.txt, by speaker."""
    root, clips, missing = Path(path), [], 0
    for listing in sorted(root.rglob("*.trans.txt")):
        for line in read_text(listing).split("\n"):
            utterance, _, text = line.partition(" ")
            file = listing.parent / f"{utterance}.flac"
            if file.is_file():
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
    ontology, listings = next(iter(sorted(root.rglob("ontology.json"))), None), sorted(root.rglob("*segments*.csv"))
    if ontology is None or not listings:
        raise DataError(f"audioset_dir={path}: expected ontology.json and AudioSet's *_segments.csv below it")
    try:
        names = {entry["id"]: entry["name"] for entry in json.loads(read_text(ontology))}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{ontology}: not AudioSet's ontology ({type(error).__name__} {error}); get it again") from None
    labels: dict[str, str] = {}
    for listing in listings:
        for number, line in enumerate(read_text(listing).split("\n"), 1):
            if line.startswith("#") or not line.strip():
                continue
            try:
                [[video, start, end, found]] = csv.reader([line], skipinitialspace=True)
                if not 0 <= float(start) < float(end):
                    raise ValueError
            except (ValueError, csv.Error):
                raise DataError(f'{listing}, line {number}: expected YTID, start, end, "labels"') from None
            labels[video] = ", ".join(names.get(label, label) for label in found.split(","))
    (files, note), clips = recordings(root), []
    for file in files:
        video = next((i for i in (file.stem[:11], file.stem[1:12]) if i in labels), None)  # ids have 11 characters
        if video:
            clips.append(Clip(str(file.relative_to(root)), file, labels[video], AUDIO, video))
    if not clips:
        raise DataError(f"audioset_dir={path}: no clip below it is named after a YouTube id of its segments CSVs")
    without = len(labels) - len({c.group for c in clips})
    return clips, f"AudioSet: {without} of {len(labels)} segments have no clip" + (note and f"; {note}")


def manifest(path: str) -> tuple[list[Clip], str]:
    """A .jsonl file: a MANIFEST_LINE a clip, its path from the file's folder. Raises DataError that names the line."""
    file, clips = Path(path), []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            start, end = float(row.get("start") or 0), row.get("end") and float(row["end"])
            if not 0 <= start < (math.inf if end is None else end):
                raise ValueError(f"start {start:g} and end {end} are no part of a recording")
            row["text"].encode()  # neither a number nor half a character, as JSON may hold it, is text
            name, group = f"{row['path']}" + (f"@{start:g}" if start else ""), str(row.get("group", row["path"]))
            source, domain = file.parent / row["path"], DOMAINS.index(row["domain"])
            clips.append(Clip(name, source, row["text"], domain, group, start, end))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: {error!r}; expected {MANIFEST_LINE}") from None
    return clips, ""


def normal(text: str) -> str:
    """Letters, digits and spaces of a text, in small letters."""
    return "".join(c for c in text.lower() if c.isalnum() or c == " ")


def held_out(clips: list[Clip], share: float, seed: int) -> list[bool]:
    """True for the held-out clips: whole groups in hash order until `share` of each domain's clips is reached."""
    chosen = set()
    for d in range(len(DOMAINS)):
        sizes = collections.Counter(c.group for c in clips if c.domain == d)
        order = sorted(sizes, key=lambda g: hashlib.sha256(f"{seed}/{d}/{g}".encode()).digest())
        target, total = share * sizes.total(), 0
        for group in order:
            if total < target:
                chosen.add((d, group))
                total += sizes[group]
    return [(c.domain, c.group) in chosen for c in clips]
