"""Corpora -> prepared shards (mel, tokens, pooled teacher embeddings, text) -> batches.

    python data.py config/demo.py                                        # prepare; train.py does it when missing
    python data.py config/demo.py --speech_dir=my/speech --audio_dir=my/sounds --data_dir=data/mine

A prepared folder holds meta.json (written last: without it the folder is unfinished), the tokenizers, and per split
    index.npy     one record a clip: where its mel, tokens, text and teacher embedding lie
    mel.bin       (frames, 100) float16 log-mel, all clips one after the other
    tokens.bin    (tokens, streams) int32
    text.bin      names and texts, utf-8
    teacher_0.npy, teacher_1.npy    (clips of the domain, E) pooled embeddings of the domain's teacher
    wav/          original waveforms, of every held-out clip and some of the others: what evaluation compares with
Everything but wav/ is read by memory map. B clips, T frames, N tokens, M = 100 mel bins, E teacher width.
"""

from configurator import DOMAINS, Config, configure

if __name__ == "__main__":
    ARGS = configure(Config, __doc__)  # a typo is answered before torch is imported

import collections
import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import fetch
import teachers
import tokenizer
from audio import AudioError

SPEECH, AUDIO = 0, 1
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus", *audio.PYAV_SUFFIXES}
TOKEN_RATE = (50, 25)  # primary tokens per second, by domain
LOST_LIMIT = 0.05  # preparation stops when a larger share of the clips cannot be used
INDEX = np.dtype(
    [
        ("mel", "<i8"),  # first row in mel.bin
        ("frames", "<i4"),
        ("token", "<i8"),  # first row in tokens.bin
        ("tokens", "<i4"),
        ("text", "<i8"),  # first byte in text.bin: name, newline, text
        ("text_len", "<i4"),
        ("teacher", "<i8"),  # row in teacher_{domain}.npy
        ("domain", "<i1"),
    ]
)
# what a prepared folder depends on: a run with other values of these must not use it
PREPARED_WITH = (
    "speech_dir audio_dir min_seconds max_seconds held_out data_seed reference_clips whisper audio_teacher "
    "speech_tokenizer speech_codes audio_codes beats_tokens tokenizer_steps mel_floor"
).split()


class DataError(RuntimeError):
    """A corpus or a prepared folder that cannot be used; one line that says what to do."""


@dataclass
class Clip:
    """One recording before preparation. `group` keeps clips together on one side of the held-out split."""

    name: str
    source: Path | bytes
    text: str
    domain: int
    group: str


@dataclass
class Prepared:
    """One recording on its way to disk."""

    clip: Clip
    held_out: bool
    mel: np.ndarray  # (T, M) float16
    wav: np.ndarray  # (L,) at 24 kHz
    teacher_wav: np.ndarray  # (L,) at the teacher's rate
    tokens: np.ndarray | None = None  # (N,)
    embedding: np.ndarray | None = None  # (E,)


@dataclass
class Batch:
    """What the model sees of B clips; tensors on one device."""

    mel: torch.Tensor  # (B, T, M) log-mel, 0 on padding
    frames: torch.Tensor  # (B,) valid frames
    tokens: torch.Tensor  # (B, N) or (B, N, 2)
    token_len: torch.Tensor  # (B,)
    domain: torch.Tensor  # (B,) 0 speech, 1 audio
    teacher: dict[str, torch.Tensor]  # {name: (B, E)}, zero rows for clips of the other domain
    prompt: torch.Tensor  # (B,) frames of reference mel given to the model
    ids: torch.Tensor  # (B,) rows of the split's index

    def to(self, device: str) -> "Batch":
        move = {f.name: getattr(self, f.name) for f in fields(self)}
        move = {k: v.to(device) for k, v in move.items() if k != "teacher"}
        return Batch(**move, teacher={k: v.to(device) for k, v in self.teacher.items()})

    def double(self) -> "Batch":
        """The same in float64, for checks."""
        teacher = {k: v.double() for k, v in self.teacher.items()}
        return replace(self, mel=self.mel.double(), teacher=teacher)


# ---- corpora


def demo_speech() -> list[Clip]:
    """The Asterisk prompts, one voice; prompts whose transcript is only a [stage direction] carry no words."""
    import gzip

    text_file = fetch.open_deb(fetch.fetch("asterisk_text"))
    listing = gzip.decompress(next(v for k, v in text_file.items() if k.endswith("core-sounds-en.txt.gz"))).decode()
    texts = dict(line.split(": ", 1) for line in listing.splitlines() if ": " in line and not line.startswith(";"))
    clips = []
    for path, content in sorted(fetch.open_deb(fetch.fetch("asterisk")).items()):
        if path.endswith(".g722"):
            name = path.split("en_US_f_Allison/")[1]
            words = " ".join(re.sub(r"\[[^]]*\]", "", texts.get(name.removesuffix(".g722"), "")).split())
            clips.append(Clip(name, content, words, SPEECH, _normal(words)))
    return clips


def demo_audio() -> list[Clip]:
    """Sonic Pi's samples (the file name is the caption) and OpenSFX's effects (captioned in their container)."""
    clips = []
    for path, content in sorted(fetch.open_deb(fetch.fetch("sonic_pi")).items()):
        if path.endswith(".flac"):
            stem = Path(path).stem
            clips.append(Clip(f"sonic_pi/{stem}.flac", content, stem.replace("_", " "), AUDIO, stem))
    files = fetch.open_deb(fetch.fetch("opensfx"))
    cat = next(v for k, v in files.items() if k.endswith("opensfx.cat"))
    first = int.from_bytes(cat[:4], "little") & 0x7FFFFFFF
    for i in range(first // 8):  # a table of (offset, length), then at each offset a name and a wav
        offset = int.from_bytes(cat[8 * i : 8 * i + 4], "little") & 0x7FFFFFFF
        length = int.from_bytes(cat[8 * i + 4 : 8 * i + 8], "little")
        caption = cat[offset + 1 : offset + 1 + cat[offset]].split(b'".')[0].split(b"\0")[0].decode("latin-1").strip()
        start = offset + 1 + cat[offset]
        clips.append(Clip(f"opensfx/{i:02d}.wav", cat[start : start + length], caption, AUDIO, caption))
    return clips


def folder(path: str, domain: int) -> list[Clip]:
    """Any folder: text from LibriSpeech's .trans.txt, a same-named .txt, or (audio only) the file's own name.

    A speech clip is grouped by its folder where the layout is LibriSpeech's (speaker/chapter), else by its text.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{DOMAINS[domain]}_dir={path}: no such folder; pass --{DOMAINS[domain]}_dir=FOLDER")
    transcripts = {}
    for listing in root.rglob("*.trans.txt"):
        for line in listing.read_text(encoding="utf-8").splitlines():
            key, _, text = line.partition(" ")
            transcripts[listing.parent / key] = text
    clips = []
    for file in sorted(f for f in root.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES):
        stem, own_text = file.with_suffix(""), file.with_suffix(".txt")
        if stem in transcripts:
            text, group = transcripts[stem], file.name.split("-")[0]  # LibriSpeech: SPEAKER-CHAPTER-NUMBER.flac
        elif own_text.exists():
            text = own_text.read_text(encoding="utf-8").strip()
            group = _normal(text)
        else:
            text = file.stem.replace("_", " ") if domain == AUDIO else ""
            group = file.stem
        clips.append(Clip(str(file.relative_to(root)), file, text, domain, group))
    if not clips:
        raise DataError(f"{DOMAINS[domain]}_dir={path}: no audio files ({' '.join(sorted(AUDIO_SUFFIXES))}) in it")
    return clips


def missing(config: Config) -> list[str]:
    """What the config needs and this machine lacks, one line each: corpora and weights."""
    lines = []
    for d, name in enumerate(DOMAINS):
        value = getattr(config, f"{name}_dir")
        if value != "demo" and not Path(value or "-").is_dir():
            corpus = (
                "LibriSpeech (or any folder of recordings with texts)",
                "AudioSet clips (or any folder of sounds)",
            )[d]
            lines.append(f"--{name}_dir=FOLDER  {corpus}; now {value!r}")
    if config.audio_teacher != "demo" and not Path(config.audio_teacher).exists():
        lines.append(f"--audio_teacher=FILE  BEATs_iter3_plus_AS2M.pt; now {config.audio_teacher!r}")
    if config.speech_tokenizer == "s3":
        lines.append("--speech_tokenizer=whisper_vq  the S3 tokenizer's reader is not part of this version")
    if config.beats_tokens:
        lines.append("--beats_tokens=false  the BEATs token stream's reader is not part of this version")
    return lines


def _normal(text: str) -> str:
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


# ---- preparation


def decode(clip: Clip, rates: tuple[int, ...], config: Config) -> list[np.ndarray]:
    """The clip's waveform at each of the sample rates. Raises AudioError for a clip that cannot be used."""
    if clip.domain == SPEECH and not _normal(clip.text).strip():
        raise AudioError("no text")
    wav, rate = audio.decode(clip.source, clip.name)
    seconds = len(wav) / rate
    if not config.min_seconds <= seconds <= config.max_seconds:
        raise AudioError("too short" if seconds < config.min_seconds else "too long", f"{seconds:.2f} s")
    return [audio.resample(wav, rate, to) for to in rates]


def to_rate(features: np.ndarray, n: int) -> np.ndarray:
    """Linear interpolation of features (N, E) to n rows spread over the same time."""
    x = torch.from_numpy(features).T[None]
    return torch.nn.functional.interpolate(x, n, mode="linear", align_corners=False)[0].T.numpy()


def token_count(frames: int, domain: int) -> int:
    return max(1, round(frames * TOKEN_RATE[domain] / audio.FRAME_RATE))


def prepare(config: Config) -> None:
    """Writes config.data_dir. Raises DataError when inputs are missing or too many clips are unusable.

    Clips are decoded once; each domain's teacher gives time-resolved features (for the tokens, whose codebook is fitted
    on the training split alone) and pooled embeddings. The folder is built beside its final name and renamed.
    """
    lines = missing(config)
    if lines:
        raise DataError("this config needs what is not here:\n  " + "\n  ".join(lines))
    start = time.time()
    clips = demo_speech() if config.speech_dir == "demo" else folder(config.speech_dir, SPEECH)
    clips += demo_audio() if config.audio_dir == "demo" else folder(config.audio_dir, AUDIO)
    out_dir = Path(config.data_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"data_dir={out_dir} holds other files; pass --data_dir=NEW_FOLDER")  # never write over them
    build = out_dir.with_name(f"{out_dir.name}.part{os.getpid()}")
    build.mkdir(parents=True)
    try:
        _prepare_into(build, config, clips)
        if not (out_dir / "meta.json").exists():  # another process may have been faster
            build.rename(out_dir)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    print(f"prepared {out_dir} in {time.time() - start:.0f} s")


def _prepare_into(build: Path, config: Config, clips: list[Clip]) -> None:
    teacher = [teachers.load_teacher("whisper", _source(config.whisper, "whisper_tiny"))]
    teacher.append(teachers.load_teacher("aisfx", _source(config.audio_teacher, "aisfx")))
    prepared, lost = decode_all(clips, [t.sample_rate for t in teacher], config)
    meta = {
        "prepared_with": {k: getattr(config, k) for k in PREPARED_WITH},
        "skipped": lost,
        "teachers": [[t.name, t.dim] for t in teacher],
    }
    for d, name in enumerate(DOMAINS):
        own = [p for p in prepared if p.clip.domain == d]
        if not any(not p.held_out for p in own):
            raise DataError(f"no usable {name} clip to train on; pass another --{name}_dir or a smaller --held_out")
        waves = [p.teacher_wav for p in own]
        pooled = teacher[d].embed(waves)
        # S3's recipe quantises in the middle of the recogniser's encoder, where sound is not yet all turned into text
        middle = {"layer": teacher[d].depth // 2 - 1} if d == SPEECH else {}
        features = teacher[d].encode(waves, **middle)
        features = [to_rate(f, token_count(len(p.mel), d)) for f, p in zip(features, own, strict=True)]
        codes, meta[f"{name}_tokens"] = _tokenise(build, config, d, own, features)
        for p, p_codes, embedding in zip(own, codes, pooled, strict=True):
            p.tokens, p.embedding = p_codes, embedding
    for split, wanted in (("train", False), ("held_out", True)):
        meta[split] = write_split(
            build / split, config, [p for p in prepared if p.held_out == wanted], meta["teachers"]
        )
    frames = np.concatenate([p.mel for p in prepared if not p.held_out]).astype(np.float64).clip(min=config.mel_floor)
    meta["mel_mean"], meta["mel_std"] = frames.mean(0).tolist(), frames.std(0).clip(1e-3).tolist()
    (build / "meta.json").write_text(json.dumps(meta, indent=1))


def decode_all(clips: list[Clip], teacher_rates: list[int], config: Config) -> tuple[list[Prepared], dict]:
    """The usable clips, decoded, and the names of the others by reason. Raises DataError when too many are lost."""
    split = held_out(clips, config.held_out, config.data_seed)
    prepared, lost = [], collections.defaultdict(list)
    for clip, out in tqdm(list(zip(clips, split, strict=True)), desc="decode and mel", mininterval=1):
        try:
            wav, teacher_wav = decode(clip, (audio.SAMPLE_RATE, teacher_rates[clip.domain]), config)
            mel = audio.log_mel(torch.from_numpy(wav)).half().numpy()
            prepared.append(Prepared(clip, out, mel, wav, teacher_wav))
        except AudioError as error:
            lost[error.reason].append(clip.name)
    for reason, names in lost.items():
        print(f"skipped {len(names)} clips: {reason} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})")
    count = len(clips) - len(prepared)
    if count > LOST_LIMIT * len(clips):
        raise DataError(f"{count} of {len(clips)} clips cannot be used (reasons above); mend the corpus")
    return prepared, dict(lost)


def _source(value: str, role: str) -> str | Path:
    return fetch.fetch(role) if value == "demo" else value


def _tokenise(build: Path, config: Config, d: int, own: list[Prepared], features: list) -> tuple[list, dict]:
    """Fits domain d's tokenizer on the training clips and encodes all of them; returns the codes and what to report."""
    size, name = (config.speech_codes, config.audio_codes)[d], DOMAINS[d]
    train = [f for f, p in zip(features, own, strict=True) if not p.held_out]
    with tqdm(total=config.tokenizer_steps, desc=f"{name} tokenizer", mininterval=1) as bar:
        steps, rate = config.tokenizer_steps, TOKEN_RATE[d]
        model = tokenizer.fit(train, size, steps, rate, remove_position=d == SPEECH, progress=lambda *_: bar.update())
    tokenizer.save(model, build / f"{name}_tokenizer.pt")
    codes = model.encode(features)
    used, perplexity = tokenizer.usage(codes, size)
    report = {"codes_used": used, "perplexity": perplexity}
    if d == SPEECH:
        book = model.codebook.numpy()
        report["position_share_of_features"] = tokenizer.position_share(features)
        report["position_share_of_tokens"] = tokenizer.position_share([book[c] for c in codes])
    print(f"{name} tokens: " + ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in report.items()))
    return codes, report


def write_split(path: Path, config: Config, prepared: list[Prepared], teacher: list) -> dict:
    """Writes one split's files and returns its clips and seconds per domain; `teacher` is [(name, E), ...]."""
    (path / "wav").mkdir(parents=True)
    index = np.zeros(len(prepared), INDEX)
    mel_row = token_row = text_byte = 0
    rows, wavs = [0] * len(DOMAINS), [0] * len(DOMAINS)
    with (
        open(path / "mel.bin", "wb") as mel_bin,
        open(path / "tokens.bin", "wb") as token_bin,
        open(path / "text.bin", "wb") as text_bin,
    ):
        for i, p in enumerate(prepared):
            d, text = p.clip.domain, f"{p.clip.name}\n{p.clip.text}".encode()
            index[i] = (mel_row, len(p.mel), token_row, len(p.tokens), text_byte, len(text), rows[d], d)
            mel_bin.write(p.mel.tobytes())
            token_bin.write(p.tokens.astype("<i4").tobytes())
            text_bin.write(text)
            mel_row, token_row, text_byte = mel_row + len(p.mel), token_row + len(p.tokens), text_byte + len(text)
            rows[d] += 1
            if p.held_out or wavs[d] < config.reference_clips:
                audio.write(path / "wav" / f"{i:07d}.wav", p.wav)
                wavs[d] += 1
    np.save(path / "index.npy", index)
    for d, (_, width) in enumerate(teacher):
        embeddings = [p.embedding for p in prepared if p.clip.domain == d]
        np.save(path / f"teacher_{d}.npy", np.array(embeddings, np.float32).reshape(-1, width))
    seconds = [float(index["frames"][index["domain"] == d].sum() / audio.FRAME_RATE) for d in range(len(DOMAINS))]
    return {"clips": rows, "seconds": seconds}


# ---- reading


class Dataset:
    """One split of a prepared folder, by memory map."""

    def __init__(self, data_dir: str | Path, split: str):
        path = Path(data_dir) / split
        self.path, self.meta = path, read_meta(data_dir)
        self.index = np.load(path / "index.npy", mmap_mode="r")
        self.mel = np.memmap(path / "mel.bin", np.float16, "r").reshape(-1, audio.N_MELS)
        self.tokens = np.memmap(path / "tokens.bin", "<i4", "r")
        self.text_bytes = np.memmap(path / "text.bin", np.uint8, "r")
        self.teachers = [np.load(path / f"teacher_{d}.npy", mmap_mode="r") for d in range(len(DOMAINS))]

    def __len__(self) -> int:
        return len(self.index)

    def name_and_text(self, i: int) -> tuple[str, str]:
        r = self.index[i]
        name, _, text = bytes(self.text_bytes[r["text"] : r["text"] + r["text_len"]]).decode().partition("\n")
        return name, text

    def wav_path(self, i: int) -> Path:
        return self.path / "wav" / f"{i:07d}.wav"

    def batch(self, ids: np.ndarray, crops: np.ndarray | None = None, prompts: np.ndarray | None = None) -> Batch:
        """Clips `ids` (B,) as one padded Batch; `crops` (B, 2): first frame and frames; `prompts` (B,): reference."""
        records = self.index[ids]
        crops = np.stack([np.zeros_like(records["frames"]), records["frames"]], 1) if crops is None else crops
        frames = torch.from_numpy(np.asarray(crops[:, 1], np.int64))
        domain = torch.from_numpy(records["domain"].astype(np.int64))
        spans = [token_span(*c, d, r["tokens"]) for c, d, r in zip(crops, domain.tolist(), records, strict=True)]
        token_len = torch.tensor([n for _, n in spans])
        mel = torch.zeros(len(ids), int(frames.max()), audio.N_MELS)
        tokens = torch.zeros(len(ids), int(token_len.max()), dtype=torch.int64)
        for b, (r, (first, length), (token, count)) in enumerate(zip(records, crops, spans, strict=True)):
            mel[b, :length] = torch.from_numpy(
                self.mel[r["mel"] + first : r["mel"] + first + length].astype(np.float32)
            )
            row = r["token"] + token
            tokens[b, :count] = torch.from_numpy(self.tokens[row : row + count].astype(np.int64))
        teacher = {}
        for d, (name, width) in enumerate(self.meta["teachers"]):
            teacher[name] = torch.zeros(len(ids), width)
            of_domain = records["domain"] == d
            teacher[name][of_domain] = torch.from_numpy(self.teachers[d][records["teacher"][of_domain]])
        prompt = torch.zeros(len(ids), dtype=torch.int64) if prompts is None else torch.from_numpy(prompts)
        return Batch(mel, frames, tokens, token_len, domain, teacher, prompt, torch.from_numpy(np.asarray(ids)))


def crop_unit() -> int:
    """Frames between the times at which a token of every domain starts: a crop begins only there."""
    return int(np.lcm.reduce([(Fraction(r) / Fraction(audio.FRAME_RATE)).denominator for r in TOKEN_RATE]))


def token_span(first: int, frames: int, domain: int, tokens: int) -> tuple[int, int]:
    """First token and number of tokens under `frames` mel frames that start at a multiple of crop_unit()."""
    token = min(round(int(first) * TOKEN_RATE[domain] / audio.FRAME_RATE), int(tokens) - 1)
    return token, min(token_count(int(frames), domain), int(tokens) - token)


def read_meta(data_dir: str | Path) -> dict:
    return json.loads((Path(data_dir) / "meta.json").read_text())


def ensure_prepared(config: Config) -> dict:
    """Prepares config.data_dir when it is missing; returns its meta. Raises DataError when it was made otherwise."""
    if not (Path(config.data_dir) / "meta.json").exists():
        prepare(config)
    meta = read_meta(config.data_dir)
    now = json.loads(json.dumps({k: getattr(config, k) for k in PREPARED_WITH}))
    changed = [
        f"{k}: {meta['prepared_with'].get(k)!r} -> {v!r}" for k, v in now.items() if meta["prepared_with"].get(k) != v
    ]
    if changed:
        raise DataError(
            f"{config.data_dir} was prepared with other settings ({'; '.join(changed)}); "
            f"pass --data_dir=ANOTHER_FOLDER to prepare beside it, or delete it"
        )
    return meta


class Batches:
    """Training batches, bucketed by length under a frame budget; a pure function of (seed, step, rank).

    Every epoch has the same number of batches, so a step's epoch is a division: slots are cut once from the sorted
    lengths, and each epoch deals clips to slots in the order of their jittered length, then shuffles the slots.
    """

    JITTER = 0.05  # of the length: enough for new neighbours each epoch, little enough to keep padding low

    def __init__(self, dataset: Dataset, config: Config, rank: int = 0, world: int = 1):
        self.dataset, self.config, self.rank, self.world = dataset, config, rank, world
        self.lengths = np.asarray(dataset.index["frames"], np.int64)
        if config.crop_frames:
            self.lengths = np.minimum(self.lengths, config.crop_frames)
        ordered = np.sort(self.lengths)
        if ordered[-1] > config.batch_frames:
            raise DataError(f"batch_frames={config.batch_frames} is below the longest clip ({ordered[-1]} frames)")
        slack = (1 + self.JITTER) / (1 - self.JITTER)  # how much longer a clip can be than the one it swaps with
        slots, first = [], 0
        while first < len(ordered):
            count = 1
            while (
                count < config.batch_size
                and first + count < len(ordered)
                and (count + 1) * min(ordered[first + count] * slack, ordered[-1]) <= config.batch_frames
            ):
                count += 1
            slots.append(count)
            first += count
        self.edges = np.cumsum([0, *slots])
        self.steps_per_epoch = max(1, len(slots) // world)

    def padding(self) -> float:
        """Share of padding in the batches of the first epoch."""
        groups = [self.lengths[self.ids(step)] for step in range(self.steps_per_epoch)]
        return 1 - sum(g.sum() for g in groups) / sum(len(g) * g.max() for g in groups)

    def ids(self, step: int) -> np.ndarray:
        """Rows of the split's index that make this rank's batch at `step`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng([self.config.seed, epoch])
        order = np.argsort(
            self.lengths * rng.uniform(1 - self.JITTER, 1 + self.JITTER, len(self.lengths)), kind="stable"
        )
        slot = rng.permutation(len(self.edges) - 1)[(place * self.world + self.rank) % (len(self.edges) - 1)]
        return order[self.edges[slot] : self.edges[slot + 1]]

    def __call__(self, step: int) -> Batch:
        ids = self.ids(step)
        rng = np.random.default_rng([self.config.seed, step, self.rank])
        lengths, records = self.lengths[ids], self.dataset.index[ids]
        unit = crop_unit()
        room = np.maximum(records["frames"] - lengths, 0) // unit
        first = (rng.integers(0, room + 1)) * unit
        share = rng.uniform(0, self.config.prompt_max, len(ids)) * (rng.random(len(ids)) >= self.config.prompt_drop)
        return self.dataset.batch(ids, np.stack([first, lengths], 1), (share * lengths).astype(np.int64))


def fixed_batch(dataset: Dataset, per_domain: int, seed: int, max_frames: int) -> Batch:
    """`per_domain` clips of each domain, the same for the same seed, cropped to their first max_frames."""
    rng = np.random.default_rng(seed)
    ids = [rng.permutation(np.flatnonzero(dataset.index["domain"] == d))[:per_domain] for d in range(len(DOMAINS))]
    ids = np.concatenate(ids)
    lengths = np.minimum(dataset.index["frames"][ids], max_frames)
    return dataset.batch(ids, np.stack([np.zeros_like(lengths), lengths], 1))


def main(config: Config) -> None:
    meta = ensure_prepared(config)
    for split in ("train", "held_out"):
        for d, name in enumerate(DOMAINS):
            print(f"{split:9s} {name:7s} {meta[split]['clips'][d]:6d} clips {meta[split]['seconds'][d] / 60:8.1f} min")


if __name__ == "__main__":
    try:
        main(ARGS)
    except (DataError, fetch.FetchError, ValueError) as error:
        sys.exit(f"data.py: {error}")
