"""Corpora -> prepared shards (mel, tokens, pooled teacher embeddings, text) -> batches.

    python -m prepare config/demo.py                                        # prepare; train.py does it when missing
    python -m prepare config/demo.py --speech_dir=my/speech --audio_dir=my/sounds --data_dir=data/mine
    torchrun --nproc_per_node=8 -m prepare config/unified_b.py --librispeech_dir=X --audioset_dir=Y    # one GPU each
    python -m prepare --verify data/demo                                    # every file against its checksum

Any number of processes, on any machines that share the disk, prepare one folder together: each takes the next shard
that nobody holds. A preparation that was stopped goes on when the same command is given again. Beside what shards.py
writes, the folder holds
    plan.json               settings, corpus and checksums of weights, written first: others are refused
    speech_tokenizer.pt, audio_tokenizer.pt     fitted here, where the config says so
T frames, N tokens, M = 100 mel bins, E teacher width.
"""

from dataclasses import dataclass

from configurator import changed_settings, configure
from train import Config


@dataclass
class PrepareArgs(Config):
    """Config's keys, and:"""

    verify: str = ""  # check the prepared folder of this name and do nothing else


if __name__ == "__main__":
    ARGS = configure(PrepareArgs, __doc__)  # a typo is answered before torch is imported

import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import common
import teachers
from audio import AudioError
from common import AUDIO, DOMAINS, INTERRUPTED, SPEECH, DataError, command, locked, sha256, write_json
from data import INDEX, check_prepared, corpus_of, is_prepared, prepared_with, read_meta, token_count
from prepare import corpora, demo, tokenizer
from prepare.corpora import Clip

SHARD_CLIPS = 512
FIT_CLIPS = 4000  # most training clips per domain that a tokenizer is fitted on here
LOST_LIMIT = 0.05  # preparation fails when a larger share of the clips cannot be used
ADVICE = {
    "no text": "give each recording its words (in a folder: a same-named .txt)",
    "too short": "lower --min_seconds",
    "too long": "raise --max_seconds",
}


@dataclass
class Prepared:
    """One recording on its way to disk."""

    clip: Clip
    mel: np.ndarray  # (T, M) float16
    wav: np.ndarray  # (L,) at 24 kHz
    teacher_wav: np.ndarray  # (L,) at the teacher's rate
    keep_wav: bool = False  # evaluation will need the waveform
    tokens: np.ndarray | None = None  # (N, streams)
    embedding: np.ndarray | None = None  # (E,)
    style: np.ndarray | None = None  # (16, E of the audio teacher)


# ---- what a config needs


def missing(config: Config) -> list[str]:
    """What the config needs and this machine lacks, one line each: corpora, weights and packages."""
    lines = []
    for d, name in enumerate(DOMAINS):
        key = ("librispeech", "audioset")[d] + "_dir"
        values = {k: getattr(config, k) for k in (f"{name}_dir", key)}
        absent = [f"{k}={v!r}" for k, v in values.items() if v and v != "demo" and not Path(v).is_dir()]
        if absent or not (any(values.values()) or config.manifest):
            now = ", ".join(absent) or "none is given"
            lines.append(f"--{key}=FOLDER, or --{name}_dir=FOLDER for any folder of recordings; now {now}")
    if config.audio_teacher != "demo" and not Path(config.audio_teacher).is_file():
        lines.append(f"--audio_teacher=FILE  BEATs_iter3_plus_AS2M.pt; now {config.audio_teacher!r}")
    if config.beats_tokens and not Path(config.beats_tokenizer).is_file():
        lines.append(f"--beats_tokenizer=FILE  Tokenizer_iter3_plus_AS2M.pt; now {config.beats_tokenizer!r}")
    if config.audio_tokenizer and not Path(config.audio_tokenizer).is_file():
        lines.append(f"--audio_tokenizer=FILE  a checkpoint of tokenizer.py; now {config.audio_tokenizer!r}")
    if common.is_absent(config.whisper):
        lines.append(f"--whisper=HUB_NAME_OR_FOLDER  Whisper; now {config.whisper!r}")
    if config.speech_tokenizer == "s3" and config.s3.endswith(".onnx") and not Path(config.s3).is_file():
        lines.append(f"--s3=FILE  CosyVoice's speech_tokenizer_v1.onnx; now {config.s3!r}")
    if config.speech_tokenizer == "s3" and not any(map(importlib.util.find_spec, ("s3tokenizer", "onnxruntime"))):
        lines.append("pip install s3tokenizer  for S3 tokens (or onnxruntime, with --s3=PATH/speech_tokenizer_v1.onnx)")
    return lines


def token_rates(config: Config) -> list[int]:
    """Primary tokens per second of each domain: S3's (and Whisper's states') 50; AST's own, or the demo's 25."""
    return [50, 25 if config.audio_teacher == "demo" else 50]


class Networks:
    """The frozen networks of a config, loaded when first needed, and what was encoded once already."""

    def __init__(self, config: Config):
        self.config, self.rates = config, token_rates(config)
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = gpu if torch.cuda.is_available() and config.device in ("auto", "cuda") else "cpu"
        self.features: dict[tuple, np.ndarray] = {}  # of the clips that a tokenizer was fitted on
        self.seconds: collections.Counter = collections.Counter()  # spent in each stage

    @cached_property
    def audio_encoder(self) -> teachers.Teacher:
        """The teacher of the audio domain, which also hears styles."""
        source = self.config.audio_teacher
        sounds = ("aisfx", demo.fetch("aisfx")) if source == "demo" else ("beats", source)
        return demo.load_teacher(*sounds, self.device)

    @cached_property
    def encoders(self) -> list[teachers.Teacher]:
        """The teacher of each domain."""
        source = self.config.whisper
        whisper = demo.fetch("whisper_tiny") if source == "demo" else source
        return [demo.load_teacher("whisper", whisper, self.device), self.audio_encoder]

    @cached_property
    def s3(self) -> tokenizer.S3:
        return tokenizer.S3(self.config.s3, self.device)

    @cached_property
    def beats_tokenizer(self) -> teachers.BEATs:
        return teachers.BEATs.load(self.config.beats_tokenizer, self.device)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to the stage's seconds."""
        start = time.time()
        yield
        self.seconds[stage] += time.time() - start

    def encode(self, d: int, own: list[Prepared]) -> list[np.ndarray]:
        """Features of domain d's clips at its token rate, (N, E) each: what its tokenizer reads."""
        teacher, rate = self.encoders[d], self.rates[d]
        new = [p for p in own if (d, p.clip.name) not in self.features]
        # S3's recipe quantises in the middle of the recogniser's encoder, where sound is not yet all turned into text
        layer = {"layer": teacher.depth // 2 - 1} if d == SPEECH else {}
        fresh = iter(teacher.encode([p.teacher_wav for p in new], **layer) if new else [])
        out = []
        for p in own:
            key, n = (d, p.clip.name), token_count(len(p.mel), rate)
            if key in self.features:
                out.append(self.features[key])
            else:
                out.append(tokenizer.token_features(teacher, next(fresh), n, rate))
        return out

    def styles(self, d: int, own: list[Prepared]) -> list[np.ndarray]:
        """Style vectors (16, E) of clips of domain d: what the audio encoder hears in voice or sound (eq. 17)."""
        if d == AUDIO:
            features = self.encode(d, own)
        else:
            rate = self.audio_encoder.sample_rate
            features = self.audio_encoder.encode([audio.resample(p.wav, audio.SAMPLE_RATE, rate) for p in own])
        return [teachers.style_vectors(f) for f in features]

    def tokens(self, d: int, own: list[Prepared], fitted: tokenizer.Tokenizer | None) -> list[np.ndarray]:
        """Codes of domain d's clips, (N, streams) each; the second stream is BEATs' at the same times (eq. 15)."""
        counts = [token_count(len(p.mel), self.rates[d]) for p in own]
        if fitted is None:
            pairs = zip(self.s3.encode([p.teacher_wav for p in own]), counts, strict=True)
            codes = [tokenizer.at_token_times(c, n, self.rates[d], self.s3.rate) for c, n in pairs]
        else:
            codes = fitted.encode(self.encode(d, own))
        if not self.config.beats_tokens:
            return [c[:, None] for c in codes]
        beats = self.beats_tokenizer
        waves = [audio.resample(p.wav, audio.SAMPLE_RATE, beats.sample_rate) for p in own]
        second = zip(beats.codes(waves), counts, strict=True)
        second = [tokenizer.at_token_times(c, n, self.rates[d], beats.rate) for c, n in second]
        return [np.stack(pair, 1) for pair in zip(codes, second, strict=True)]


# ---- preparation


def decode(clip: Clip, rates: tuple[int, ...], config: Config) -> list[np.ndarray]:
    """The clip's waveform at each of the sample rates. Raises AudioError for a clip that cannot be used."""
    wav, rate = audio.decode(clip.source, clip.name if isinstance(clip.source, bytes) else "")
    wav = wav[int(clip.start * rate) : None if clip.end is None else int(clip.end * rate)]
    seconds = len(wav) / rate
    if not config.min_seconds <= seconds <= config.max_seconds:
        raise AudioError("too short" if seconds < config.min_seconds else "too long", f"{seconds:.2f} s")
    if np.abs(wav).max() < 1e-4:  # a silent part of a recording that as a whole is not
        raise AudioError("silent")
    return [audio.resample(wav, rate, to) for to in rates]


def decode_all(clips: list[Clip], networks: Networks, bar: tqdm | None = None) -> tuple[list[Prepared], dict]:
    """The usable clips, decoded, and the names of the others by reason."""
    prepared, lost = [], collections.defaultdict(list)
    rates = [t.sample_rate for t in networks.encoders]
    with networks.timed("decode and mel"):
        for clip in clips:
            try:
                if clip.domain == SPEECH and not corpora.normal(clip.text).strip():
                    raise AudioError("no text")
                wav, teacher_wav = decode(clip, (audio.SAMPLE_RATE, rates[clip.domain]), networks.config)
                mel = audio.log_mel(torch.from_numpy(wav)).half().numpy()
                prepared.append(Prepared(clip, mel, wav, teacher_wav))
            except AudioError as error:
                lost[error.reason].append(clip.name)
            if bar:
                bar.update()
    return prepared, dict(lost)


def encode_file(path: str, domain: int, config: Config) -> Prepared:
    """A recording's mel, tokens and style, by the networks and tokenizers behind config.data_dir. Raises AudioError."""
    networks, clip = Networks(config), Clip(path, Path(path), "", domain, "")
    fitted = load_tokenizers(Path(config.data_dir), networks)
    try:
        wav, teacher_wav = decode(clip, (audio.SAMPLE_RATE, networks.encoders[domain].sample_rate), config)
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from error
    own = Prepared(clip, audio.log_mel(torch.from_numpy(wav)).half().numpy(), wav, teacher_wav)
    own.tokens, own.style = networks.tokens(domain, [own], fitted[domain])[0], networks.styles(domain, [own])[0]
    return own


def prepare(config: Config) -> None:
    """Brings config.data_dir to completion, alone or together with other processes. Raises DataError when inputs are
    missing, when the folder belongs to other settings or another corpus, or when too many clips are unusable."""
    lines = missing(config)
    if lines:
        raise DataError("this config needs what is not here:\n  " + "\n  ".join(lines))
    start, lead = time.time(), os.environ.get("RANK", "0") == "0"
    clips, notes = corpora.read(config)
    shards, plan = plan_shards(clips, config), make_plan(clips, config)
    out_dir, lost = Path(config.data_dir), {}
    locks = out_dir.with_name(f".{out_dir.name}.locks")
    with locked(locks / "plan"):
        begin(out_dir, plan)
    networks = Networks(config)
    with locked(locks / "tokenizers"):
        fit_tokenizers(out_dir, networks, shards)
    fitted = load_tokenizers(out_dir, networks)
    keep = waves_to_keep(shards, config)
    with tqdm(total=len(clips), desc="clips", mininterval=1, disable=not lead) as bar:
        pending = dict(shards)
        while pending:
            for name in list(pending):
                with locked(locks / name, wait=False) as ours:
                    if ours and not (out_dir / name).exists():
                        prepare_shard(out_dir / name, pending[name], networks, fitted, keep, bar)
                if (out_dir / name).exists():
                    del pending[name]
                    add_lost(lost, out_dir / name)
                    refuse_losses(lost, len(clips), out_dir)
            time.sleep(0.2 if pending else 0)  # others hold what is left
    with locked(locks / "finish"):
        if not (out_dir / "meta.json").exists():
            finish(out_dir, list(shards), config, networks, lost)
    shutil.rmtree(locks, ignore_errors=True)
    if lead:
        report_preparation(out_dir, networks, notes, len(clips), time.time() - start)


def make_plan(clips: list[Clip], config: Config) -> dict:
    """All that the sessions and processes that prepare one folder must agree on."""
    lines = [f"{c.domain} {c.name}\n{c.group}\n{c.text}\n{c.start} {c.end}\n" for c in clips]
    weights = ["audio_teacher", "audio_tokenizer"]
    weights += ["s3"] * (config.speech_tokenizer == "s3") + ["beats_tokenizer"] * config.beats_tokens
    files = {f"sha256 of {k}": Path(getattr(config, k)) for k in weights}
    digests = {k: common.sha256(f) for k, f in files.items() if f.is_file()}
    return {
        "prepared_with": prepared_with(config) | corpus_of(config) | digests,
        "clips": len(clips),
        "listing": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def begin(out_dir: Path, plan: dict) -> None:
    """Writes plan.json, or raises DataError when the folder there was planned otherwise or is not ours at all."""
    if not (out_dir / "plan.json").exists():
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise DataError(f"data_dir={out_dir} holds other files; pass --data_dir=NEW_FOLDER")
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "plan.json", plan)
        return
    before = json.loads((out_dir / "plan.json").read_text())
    changed = changed_settings(plan["prepared_with"], before["prepared_with"])
    if not changed and before["listing"] != plan["listing"]:
        changed = f"the corpus: {before['clips']} -> {plan['clips']} clips, or other names and texts"
    if changed:
        raise DataError(
            f"{out_dir} was begun with other settings ({changed}); pass --data_dir=ANOTHER_FOLDER or delete it"
        )


def plan_shards(clips: list[Clip], config: Config) -> dict[str, list[Clip]]:
    """{shard's name: its clips}, the same for everybody who prepares this folder."""
    out = corpora.held_out(clips, config.held_out, config.data_seed)
    shards = {}
    for split, wanted in (("train", False), ("held_out", True)):
        own = [c for c, o in zip(clips, out, strict=True) if o == wanted]
        refuse_empty(split, [c.domain for c in own], config)
        for k in range(0, len(own), SHARD_CLIPS):
            shards[f"{split}_{k // SHARD_CLIPS:05d}"] = own[k : k + SHARD_CLIPS]
    return shards


def refuse_empty(split: str, domains: Sequence[int], config: Config) -> None:
    """Raises DataError when the clips of a split, of these domains, lack one of them."""
    for d, name in enumerate(DOMAINS):
        if d not in domains:
            what, change = {"train": ("is left to train on", "smaller"), "held_out": ("is held out", "larger")}[split]
            raise DataError(
                f"no {name} clip {what}; pass a {change} --held_out (now {config.held_out:g}), or {name} clips of more "
                f"speakers, videos or texts, which are held out as a whole"
            )


def in_hash_order(clips: list[Clip], seed: int) -> list[Clip]:
    """The clips in an order that depends on nothing but their names and the seed."""
    return sorted(clips, key=lambda c: hashlib.sha256(f"{seed}/{c.domain}/{c.name}".encode()).digest())


def waves_to_keep(shards: dict[str, list[Clip]], config: Config) -> set[tuple[int, str]]:
    """(domain, name) of the clips whose waveform evaluation needs: all held-out ones, some training ones per domain."""
    keep = {(c.domain, c.name) for s, own in shards.items() if s.startswith("held_out") for c in own}
    train = in_hash_order([c for s, own in shards.items() if s.startswith("train") for c in own], config.data_seed)
    for d in range(len(DOMAINS)):
        keep |= {(d, c.name) for c in [c for c in train if c.domain == d][: config.reference_clips]}
    return keep


def fit_tokenizers(out_dir: Path, networks: Networks, shards: dict[str, list[Clip]]) -> None:
    """Fits the tokenizers that the config wants fitted here, on training clips alone, unless they are there already."""
    config = networks.config
    for d, name in enumerate(DOMAINS):
        ready = config.speech_tokenizer == "s3" if d == SPEECH else bool(config.audio_tokenizer)
        if ready or (out_dir / f"{name}_tokenizer.pt").exists():
            continue
        clips = [c for shard, own in shards.items() if shard.startswith("train") for c in own if c.domain == d]
        chosen = in_hash_order(clips, config.data_seed)[:FIT_CLIPS]
        own, lost = decode_all(chosen, networks)
        if not own:
            refuse_losses(lost, len(chosen), out_dir, f"{name} ")
        refuse_losses(lost, sum(map(len, shards.values())), out_dir)
        with networks.timed("features"):
            features = networks.encode(d, own)
        networks.features |= {(d, p.clip.name): f for p, f in zip(own, features, strict=True)}
        size, steps = (config.speech_codes, config.audio_codes)[d], config.tokenizer_steps
        with networks.timed("fitting"), tqdm(total=steps, desc=f"{name} tokenizer", mininterval=1) as bar:
            options = {"remove_position": d == SPEECH, "device": networks.device}
            model = tokenizer.fit(features, size, steps, networks.rates[d], **options, progress=lambda *_: bar.update())
        codes = model.encode(features)
        used, perplexity = tokenizer.usage(codes, size)
        found = {"codes_used": used, "perplexity": perplexity}
        if d == SPEECH:
            book = model.codebook.numpy()
            found["position_share_of_features"] = tokenizer.position_share(features)
            found["position_share_of_tokens"] = tokenizer.position_share([book[c] for c in codes])
        print(f"{name} tokens: " + ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in found.items()))
        write_json(out_dir / f"{name}_tokens.json", found)
        np.save(out_dir / f"{name}_codebook.npy", model.codebook.numpy())
        tokenizer.save(model, out_dir / f"{name}_tokenizer.pt")


def load_tokenizers(out_dir: Path, networks: Networks) -> list[tokenizer.Tokenizer | None]:
    """Each domain's tokenizer; None for S3, which is not one of ours. Raises DataError for one of another size."""
    config, found = networks.config, []
    for d, name in enumerate(DOMAINS):
        if d == SPEECH and config.speech_tokenizer == "s3":
            found.append(None)
            continue
        path = config.audio_tokenizer if d == AUDIO and config.audio_tokenizer else out_dir / f"{name}_tokenizer.pt"
        model = tokenizer.load(Path(path)).to(networks.device)
        wanted = ((config.speech_codes, config.audio_codes)[d], networks.rates[d], networks.encoders[d].dim)
        if (model.config.codes, model.config.rate, model.config.dim) != wanted:
            have = (model.config.codes, model.config.rate, model.config.dim)
            raise DataError(
                f"{path}: codes, tokens per second and feature width are {have}, this config wants {wanted}; "
                f"pass --{name}_codes or another file"
            )
        found.append(model)
    return found


def prepare_shard(
    path: Path, clips: list[Clip], networks: Networks, fitted: list, keep: set, bar: tqdm | None = None
) -> None:
    """Decodes, encodes and writes the clips of one shard; `path` appears whole or not at all. Hold its lock."""
    prepared, lost = decode_all(clips, networks, bar)
    for d in range(len(DOMAINS)):
        own = [p for p in prepared if p.clip.domain == d]
        if own:
            with networks.timed("embeddings"):
                embeddings = networks.encoders[d].embed([p.teacher_wav for p in own])
            with networks.timed("tokens"):
                codes = networks.tokens(d, own, fitted[d])
            with networks.timed("styles"):
                styles = networks.styles(d, own)
            for p, p_codes, embedding, style in zip(own, codes, embeddings, styles, strict=True):
                p.tokens, p.embedding, p.style = p_codes, embedding, style
                p.keep_wav = (d, p.clip.name) in keep
    with networks.timed("writing"):
        write_shard(path, prepared, [t.dim for t in networks.encoders], networks.config.mel_floor, lost)


def add_lost(lost: dict[str, list], shard: Path) -> None:
    """Adds to `lost` the names of the clips that a finished shard lacks, by reason."""
    for reason, names in json.loads((shard / "shard.json").read_text())["lost"].items():
        lost.setdefault(reason, []).extend(names)


def report_lost(lost: dict[str, list]) -> None:
    """Prints a line for each reason."""
    for reason, names in lost.items():
        print(f"skipped {len(names)} clips: {reason} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})")


def refuse_losses(lost: dict[str, list], clips: int, out_dir: Path, kind: str = "") -> None:
    """Raises DataError when more than LOST_LIMIT of the clips (of this kind) are lost."""
    count = sum(map(len, lost.values()))
    if count > LOST_LIMIT * clips:
        report_lost(lost)
        reasons = ", ".join(f"{reason} {len(names)}" for reason, names in lost.items())
        todo = ", ".join(ADVICE[r] for r in lost if r in ADVICE) or "mend the corpus"
        raise DataError(
            f"{count} of {clips} {kind}clips cannot be used ({reasons}); {todo}, delete {out_dir} and start again"
        )


def finish(out_dir: Path, shards: list[str], config: Config, networks: Networks, lost: dict[str, list]) -> None:
    """Joins the shards' indices and statistics; meta.json, which makes the folder usable, comes last."""
    report_lost(lost)
    for split in ("train", "held_out"):  # what was lost may have been all that a side had
        own = [np.load(out_dir / name / "index.npy")["domain"] for name in shards if name.startswith(split)]
        refuse_empty(split, np.concatenate(own), config)
    meta = {
        "prepared_with": prepared_with(config),
        "corpus": corpus_of(config),
        "skipped": lost,
        "teachers": [[t.name, t.dim] for t in networks.encoders],
        "token_rates": networks.rates,
        "streams": 1 + config.beats_tokens,
    }
    for name in DOMAINS:
        if (out_dir / f"{name}_tokens.json").exists():
            meta[f"{name}_tokens"] = json.loads((out_dir / f"{name}_tokens.json").read_text())
    join(out_dir, shards, meta)


def report_preparation(out_dir: Path, networks: Networks, notes: list[str], clips: int, seconds: float) -> None:
    """What was left out, the speed, and the share of each stage in this process."""
    for note in notes:
        print(note)
    total = sum(networks.seconds.values()) or 1.0
    shares = ", ".join(f"{stage} {100 * s / total:.0f} %" for stage, s in networks.seconds.most_common())
    print(f"prepared {out_dir} in {seconds:.0f} s ({clips / seconds:.1f} clips/s; {shares})")


# ---- writing


def write_shard(
    path: Path, prepared: list[Prepared], widths: list[int], mel_floor: float, lost: dict | None = None
) -> None:
    """Writes one shard's files and shard.json: checksums, what was lost, and the sums behind the mel's statistics."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "wav").mkdir(parents=True)
    index, rows = np.zeros(len(prepared), INDEX), [0] * len(DOMAINS)
    mel_row = token_row = text_byte = 0
    with (
        open(part / "mel.bin", "wb") as mel_bin,
        open(part / "tokens.bin", "wb") as token_bin,
        open(part / "text.bin", "wb") as text_bin,
    ):
        for i, p in enumerate(prepared):
            d, text = p.clip.domain, f"{p.clip.name}\n{p.clip.text}".encode()
            index[i] = (0, i, mel_row, len(p.mel), token_row, len(p.tokens), text_byte, len(text), rows[d], d)
            mel_bin.write(p.mel.tobytes())
            token_bin.write(p.tokens.astype("<i4").tobytes())
            text_bin.write(text)
            mel_row, token_row, text_byte = mel_row + len(p.mel), token_row + len(p.tokens), text_byte + len(text)
            rows[d] += 1
            if p.keep_wav:
                audio.write(part / "wav" / f"{i:05d}.wav", p.wav)
    np.save(part / "index.npy", index)
    for d, width in enumerate(widths):
        embeddings = [p.embedding for p in prepared if p.clip.domain == d]
        np.save(part / f"teacher_{d}.npy", np.array(embeddings, np.float32).reshape(-1, width))
    np.save(part / "style.npy", np.array([p.style for p in prepared], np.float16))
    mels = [p.mel.astype(np.float64).clip(min=mel_floor) for p in prepared]
    about = {
        "lost": lost or {},
        "frames": mel_row,
        "mel_sum": sum((m.sum(0) for m in mels), np.zeros(audio.N_MELS)).tolist(),
        "mel_squares": sum(((m**2).sum(0) for m in mels), np.zeros(audio.N_MELS)).tolist(),
        "sha256": {str(f.relative_to(part)): sha256(f) for f in sorted(part.rglob("*")) if f.is_file()},
    }
    (part / "shard.json").write_text(json.dumps(about, indent=1))
    part.rename(path)


def join(out_dir: Path, shards: list[str], meta: dict) -> None:
    """Writes the splits' indices and meta.json, completed by their counts, checksums and the mel's statistics."""
    for split in ("train", "held_out"):
        own = [name for name in shards if name.startswith(split)]
        parts = [np.load(out_dir / name / "index.npy") for name in own] or [np.zeros(0, INDEX)]
        for name, part in zip(own, parts, strict=False):
            part["shard"] = int(name.rpartition("_")[2])
        index = np.concatenate(parts)
        np.save(out_dir / f"{split}.npy", index)
        by_domain = [index["frames"][index["domain"] == d] for d in range(len(DOMAINS))]
        meta[split] = {"clips": [len(f) for f in by_domain], "shards": own}
        meta[split]["seconds"] = [float(f.sum() / audio.FRAME_RATE) for f in by_domain]
    train = [json.loads((out_dir / name / "shard.json").read_text()) for name in meta["train"]["shards"]]
    frames = sum(a["frames"] for a in train)
    mean = np.sum([a["mel_sum"] for a in train], 0) / frames
    variance = np.sum([a["mel_squares"] for a in train], 0) / frames - mean**2
    meta["mel_mean"], meta["mel_std"] = mean.tolist(), np.sqrt(variance.clip(0)).clip(1e-3).tolist()
    files = [f for f in sorted(out_dir.glob("*")) if f.suffix in (".npy", ".pt")]
    files += [out_dir / name / "shard.json" for name in shards]  # which hold the checksums of all other files
    meta["sha256"] = {str(f.relative_to(out_dir)): sha256(f) for f in files}
    write_json(out_dir / "meta.json", meta)


def verify(data_dir: str) -> list[str]:
    """The files of a prepared folder that are missing or not as they were written, one line each."""
    root, problems = Path(data_dir), []
    meta = read_meta(data_dir)
    wanted = {root / name: digest for name, digest in meta["sha256"].items()}
    for shard in meta["train"]["shards"] + meta["held_out"]["shards"]:
        try:
            about = json.loads((root / shard / "shard.json").read_text())
            wanted |= {root / shard / name: digest for name, digest in about["sha256"].items()}
        except (OSError, ValueError, KeyError):
            wanted.setdefault(root / shard / "shard.json", "")
    for path, digest in tqdm(wanted.items(), desc="verify", mininterval=1):
        if not path.exists():
            problems.append(f"{path}: missing")
        elif sha256(path) != digest:
            problems.append(f"{path}: not as it was written")
    return problems


def main(args: PrepareArgs) -> int:
    if args.verify:
        problems = verify(args.verify)
        if problems:
            raise DataError(f"{len(problems)} files of {args.verify} are not sound:\n  " + "\n  ".join(problems[:20]))
        print(f"{args.verify}: every file is as it was written")
        return 0
    if not is_prepared(args.data_dir):
        try:
            prepare(args)
        except KeyboardInterrupt:
            print(f"stopped; {args.data_dir} is not complete yet, the same command continues", file=sys.stderr)
            return INTERRUPTED
    meta = check_prepared(args)
    if os.environ.get("RANK", "0") == "0":
        rows = [["", "", "clips", "min"]]
        for split in ("train", "held_out"):
            for d, name in enumerate(DOMAINS):
                rows.append([split, name, str(meta[split]["clips"][d]), f"{meta[split]['seconds'][d] / 60:.1f}"])
        print(common.table(rows))
    return 0


if __name__ == "__main__":
    command(main, ARGS)
