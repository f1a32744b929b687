"""Corpora -> the prepared folder that training reads; data.py has its layout.

    python -m prepare config/demo.py                                        # train.py does it when it is missing
    python -m prepare config/demo.py --speech_dir=my/speech --audio_dir=my/sounds --data_dir=data/mine
    torchrun --nproc_per_node=8 -m prepare config/unified_b.py --librispeech_dir=X --audioset_dir=Y    # one GPU each
    python -m prepare --styles=data/demo                                    # style vectors; lm.py does it
    python -m prepare --features=data/demo --target_rate=12.5               # teacher features; train.py does it
    python -m prepare config/demo.py --add_teacher=data/demo --data_dir=data/other --speech_teacher=HUBERT@9  # by links
    python -m prepare --verify=data/demo                                    # every file against its checksum

Any number of processes that share the disk prepare one folder together: each takes the next shard that nobody holds.
What was stopped goes on when the same command is given again. Beside what data.py reads, the folder holds plan.json,
written first (settings, corpus, checksums of weights: others are refused), and each {domain}_tokenizer.pt fitted here.

T frames, N tokens, M = 100 mel bins, E teacher width, K codes, W tokenizer width.
"""

from configurator import configure, from_dict, quiet_interrupt

if __name__ == "__main__":
    quiet_interrupt()

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from tqdm import tqdm

import audio
import common
import teachers
from audio import AudioError
from common import AUDIO, DOMAINS, SPEECH, DataError, locked, sha256, whole_file, write_json
from data import FEATURES, INDEX, check_prepared, is_prepared, read_meta, settings_of, token_count, verify
from prepare import corpora, demo, tokenizer
from prepare.corpora import Clip
from train import Config

SPLITS = ("train", "held_out")
SHARD_CLIPS = 512
FIT_CHUNK = 1024  # clips to fit a tokenizer on whose waveforms are held at once
LOST_LIMIT = 0.05  # preparation fails when a larger share of the clips cannot be used
ADVICE = {"no text": "give each recording its words (in a folder: a same-named .txt)"}
ADVICE |= {"too short": "lower --min_seconds", "too long": "raise --max_seconds"}
POSITIONS = 64  # columns of Whisper's position table that are taken out of its features
ENCODER = "demo, BEATs_iter3_plus_AS2M.pt, or a transformers folder or hub name, perhaps with @LAYER"


@dataclass
class PrepareArgs(Config):
    verify: str = ""  # check the prepared folder of this name and do nothing else
    styles: str = ""  # add style vectors to the prepared folder of this name and do nothing else
    features: str = ""  # add teacher features at target_rate to the prepared folder of this name and do nothing else
    add_teacher: str = ""  # make data_dir of this prepared folder's files, by links, but for the teachers' vectors


@dataclass
class Prepared:
    """One recording on its way to disk."""

    clip: Clip
    mel: np.ndarray  # (T, M) float16
    wav: np.ndarray  # (L,) as decoded
    rate: int  # its samples per second
    keep_wav: bool = False  # evaluation will need the waveform
    tokens: np.ndarray | None = None  # (N, streams)
    embedding: np.ndarray | None = None  # (E,)
    style: np.ndarray | None = None  # (16, E of the audio teacher)


def weights(config: Config, domains: Collection[int]) -> dict[str, tuple[str, str]]:
    """The options that name weights which the config reads for these domains; each's file or folder, and what it is."""
    wanted = {
        "speech_teacher": SPEECH in domains and ENCODER,
        "speech_tokenizer_from": SPEECH in domains and config.speech_tokenizer == "whisper_vq" and ENCODER,
        "audio_teacher": AUDIO in domains and ENCODER,
        "audio_tokenizer_from": AUDIO in domains and ENCODER,
        "beats_tokenizer": config.beats_tokens and "Tokenizer_iter3_plus_AS2M.pt",
        "audio_tokenizer": AUDIO in domains and "the audio_tokenizer.pt of a prepared folder",
    }
    given = {key: teachers.split_layer(getattr(config, key))[0] for key, what in wanted.items() if what}
    return {key: (name, wanted[key]) for key, name in given.items() if name not in ("", "demo")}


def missing(config: Config) -> list[str]:
    """What the config needs and this machine lacks, one line each: corpora, weights and packages."""
    lines, domains = [], corpora.domains(config)
    for name, public in ((DOMAINS[d], corpora.PUBLIC[d]) for d in domains):
        given = [path for path in (getattr(config, f"{name}_dir"), getattr(config, public)) if path]
        if not (given or config.manifest) or not all(path == "demo" or Path(path).is_dir() for path in given):
            lines.append(f"--{public}=FOLDER, or --{name}_dir=FOLDER of any; now {', '.join(given) or 'none'}")
    for key, (name, what) in weights(config, domains).items():
        if common.is_absent(name) or (name.endswith(".pt") and not Path(name).is_file()):
            lines.append(f"--{key}=NAME  {what}; now {getattr(config, key)!r}")
    if SPEECH in domains and config.speech_tokenizer == "s3" and not importlib.util.find_spec("s3tokenizer"):
        lines.append("pip install s3tokenizer  for S3 tokens")
    return lines


def source(config: Config, d: int, reads: bool = False) -> str:
    """What a config names as the teacher of domain d, or as the network whose states its fitted tokenizer reads."""
    return (reads and getattr(config, f"{DOMAINS[d]}_tokenizer_from")) or getattr(config, f"{DOMAINS[d]}_teacher")


class Networks:
    """The frozen networks of a config, for the domains that have clips, loaded when needed. Lists are by domain."""

    def __init__(self, config: Config, counts: Sequence[int]):
        self.config, self.domains = config, [d for d, count in enumerate(counts) if count]
        # tokens per second: S3's (and Whisper's states') 50; AST's 50, or the demo's 25
        self.rates = [50, 25 if source(config, AUDIO, reads=True) == "demo" else 50]
        speech, sounds = (Path(config.data_dir, f"{name}_tokenizer.pt") for name in DOMAINS)
        # where the tokenizers are, or will be once they are fitted; S3 is not one of ours
        self.files = [None if config.speech_tokenizer == "s3" else speech, Path(config.audio_tokenizer or sounds)]
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = gpu if torch.cuda.is_available() and config.device in ("auto", "cuda") else "cpu"
        self.features: dict[tuple, np.ndarray] = {}  # of the clips that a tokenizer was fitted on
        self.load, self.tokenizer = cache(partial(demo.load_encoder, device=self.device)), cache(self.load_tokenizer)

    def encoder(self, d: int, reads: bool = False) -> teachers.Teacher:
        """The network that source() names."""
        return self.load(source(self.config, d, reads), d)

    def load_all(self) -> None:
        """Loads what is read of weights, each named by its setting, so that what is no such file is refused."""
        for d in self.domains:
            self.encoder(d)
            self.encoder(d, reads=True)
            if not self.files[d] or self.files[d].exists():  # else it is fitted here
                self.tokenizer(d)
        if self.config.beats_tokens:
            self.load(self.config.beats_tokenizer, AUDIO)

    def named_widths(self) -> list[list]:
        """[name, E] of each domain's teacher, no two names alike; a domain that is not there has one of width 1."""
        found = [[self.encoder(d).name, self.encoder(d).dim] if d in self.domains else ["none", 1] for d in range(2)]
        found[AUDIO][0] += "_audio" * (found[SPEECH][0] == found[AUDIO][0])
        return found

    def load_tokenizer(self, d: int) -> tokenizer.Tokenizer | tokenizer.S3:
        """The tokenizer of domain d. Raises DataError for one of another size, as an AST may be that is given."""
        if not (path := self.files[d]):
            return tokenizer.S3(self.config.s3, self.device)
        model = tokenizer.load(path).to(self.device)
        sizes = (model.config.codes, model.config.rate, model.config.dim)
        wanted = (getattr(self.config, f"{DOMAINS[d]}_codes"), self.rates[d], self.encoder(d, reads=True).dim)
        if sizes != wanted:
            what = f"codes, tokens per second and feature width are {sizes}, this config wants {wanted}"
            raise DataError(f"{path}: {what}; pass --{DOMAINS[d]}_codes or another file")
        return model

    def encode(self, d: int, clips: list[Prepared]) -> list[np.ndarray]:
        """Features of domain d's clips at its token rate, (N, E) each: what its tokenizer reads."""
        teacher, rate = self.encoder(d, reads=True), self.rates[d]
        # S3's recipe quantises in the middle of the recogniser's encoder, where sound is not yet all turned into text
        layer = {"layer": teacher.depth // 2 - 1} if d == SPEECH and teacher.layer < 0 < teacher.depth else {}
        known, new = dict(self.features), [p for p in clips if p.clip.key not in self.features]
        for p, x in zip(new, teacher.encode(heard(new, teacher), **layer), strict=True):
            known[p.clip.key] = tokenizer.token_features(teacher, x, token_count(len(p.mel), rate), rate)
        return [known[p.clip.key] for p in clips]

    def styles(self, d: int, clips: list[Prepared]) -> list[np.ndarray]:
        """Style vectors (16, E) of domain d's clips: what the audio encoder, or the only one, hears there (eq. 17)."""
        encoder = self.encoder(max(self.domains), reads=True)
        features = self.encode(d, clips) if d == AUDIO else encoder.encode(heard(clips, encoder))
        return [teachers.style_vectors(x) for x in features]

    def targets(self, d: int, clips: list[Prepared], rate: float) -> list[np.ndarray]:
        """Teacher features (N, E) of domain d's clips, `rate` per second: means of its own, or interpolated."""
        states = self.encoder(d).encode(heard(clips, self.encoder(d)))
        if self.encoder(d).name == "beats":  # its patches are 8 bands of the same time
            states = [x.reshape(-1, 8, x.shape[1]).mean(1) for x in states]
        counts = [token_count(len(p.mel), rate) for p in clips]
        pairs = zip((torch.from_numpy(x).T[None] for x in states), counts, strict=True)  # (1, E, N) each, and N wanted
        return [F.interpolate(x, n, mode="linear" if n > x.shape[2] else "area")[0].T.numpy() for x, n in pairs]

    def tokens(self, d: int, clips: list[Prepared]) -> list[np.ndarray]:
        """Codes of domain d's clips, (N, streams) each; the second stream is BEATs' at the same times (eq. 15)."""
        rate, model = self.rates[d], self.tokenizer(d)
        streams = [(model.encode(self.encode(d, clips) if self.files[d] else heard(clips, model)), rate)]
        if self.config.beats_tokens:
            beats = self.load(self.config.beats_tokenizer, AUDIO)
            streams.append((beats.encode(heard(clips, beats), codes=True), beats.rate))
        counts, at = enumerate(token_count(len(p.mel), rate) for p in clips), tokenizer.at_token_times
        return [np.stack([at(codes[i], n, rate, own) for codes, own in streams], 1) for i, n in counts]


def heard(clips: list[Prepared], network) -> list[np.ndarray]:
    """The clips' waveforms at a network's sample rate."""
    return [audio.resample(p.wav, p.rate, network.sample_rate) for p in clips]


def decode(clip: Clip, config: Config) -> Prepared:
    """The clip's mel and waveform. Raises AudioError for a clip that cannot be used."""
    if clip.domain == SPEECH and not corpora.normal(clip.text).strip():
        raise AudioError("no text")
    wav, rate = audio.decode(clip.source, clip.name, clip.start, clip.end, config.max_seconds)
    if len(wav) / rate < config.min_seconds:
        raise AudioError("too short", f"{len(wav) / rate:.2f} s")
    mel = audio.log_mel(torch.from_numpy(audio.resample(wav, rate, audio.SAMPLE_RATE)))
    return Prepared(clip, mel.half().numpy(), wav, rate)


def decode_all(clips: list[Clip], config: Config, lost: dict[str, list]) -> list[Prepared]:
    """The usable clips, decoded; the names of the others are added to `lost` by reason."""
    prepared = []
    for clip in clips:
        try:
            prepared.append(decode(clip, config))
        except AudioError as error:
            lost.setdefault(error.reason, []).append(clip.name)
    return prepared


def encode_file(path: str, domain: int, config: Config) -> Prepared:
    """A recording's mel, tokens and style, by the networks and tokenizers behind config.data_dir. Raises AudioError."""
    networks = Networks(config, read_meta(config.data_dir)["train"]["clips"])
    try:
        p = decode(Clip(path, Path(path), path, domain, ""), config)
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from error
    [p.tokens], [p.style] = networks.tokens(domain, [p]), networks.styles(domain, [p])
    return p


def prepare(config: Config) -> None:
    """Completes config.data_dir, alone or with other processes. Raises DataError when it cannot."""
    if lines := missing(config):
        raise DataError("this config needs what is not here:\n  " + "\n  ".join(lines))
    (clips, notes), lost, out_dir = corpora.read(config), {}, Path(config.data_dir)
    shards, networks = plan_shards(clips, config), Networks(config, np.bincount([c.domain for c in clips]))
    locks, lead = out_dir.with_name(f".{out_dir.name}.locks"), os.environ.get("RANK", "0") == "0"
    networks.load_all()  # now: a plan is written when it can be carried out
    with locked(locks / "plan"):
        begin(out_dir, clips, config)
    with locked(locks / "tokenizers"):
        for d in networks.domains:
            if (path := networks.files[d]) and not path.exists():
                fit_tokenizer(d, path, networks, shards)
    keep = {c.key for name, part in shards.items() if name.startswith("held_out") for c in part}
    for d in networks.domains:
        keep |= {c.key for c in training_clips(shards, d, config.data_seed)[: config.reference_clips]}
    pending = dict(shards)
    with tqdm(total=len(clips), desc="clips", disable=not lead) as bar:
        for wait in (False, True):  # first what nobody holds, then what others hold
            for name in list(pending):
                path = out_dir / name
                with locked(locks / name, wait) as ours:
                    if ours and not path.exists():
                        prepare_shard(path, shards[name], networks, keep)
                if path.exists():
                    for reason, names in json.loads((path / "shard.json").read_text())["lost"].items():
                        lost.setdefault(reason, []).extend(names)
                    refuse_losses(lost, len(clips), out_dir)
                    bar.update(len(pending.pop(name)))
    with locked(locks / "finish"):
        if not is_prepared(out_dir):
            finish(out_dir, list(shards), networks, lost)
    shutil.rmtree(locks, ignore_errors=True)
    if lead:
        print(*notes, f"prepared {out_dir}", sep="\n")


def plan_shards(clips: list[Clip], config: Config) -> dict[str, list[Clip]]:
    """{shard's name: its clips}, the same for everybody who prepares this folder."""
    out, shards = corpora.held_out(clips, config.held_out, config.data_seed), {}
    for split, side in zip(SPLITS, (False, True), strict=True):
        chosen = [c for c, o in zip(clips, out, strict=True) if o == side]
        refuse_empty(split, {c.domain for c in clips} - {c.domain for c in chosen}, config)
        for k in range(0, len(chosen), SHARD_CLIPS):
            shards[f"{split}_{k // SHARD_CLIPS:05d}"] = chosen[k : k + SHARD_CLIPS]
    return shards


def refuse_empty(split: str, lacks: set[int], config: Config) -> None:
    """Raises DataError when a split lacks clips of these domains."""
    what = "is left to train on; pass a smaller" if split == "train" else "is held out; pass a larger"
    for name in (DOMAINS[d] for d in sorted(lacks)):
        more = f"or {name} clips of more speakers, videos or texts, which are held out as a whole"
        raise DataError(f"no {name} clip {what} --held_out (now {config.held_out:g}), {more}")


def begin(out_dir: Path, clips: list[Clip], config: Config) -> None:
    """Writes plan.json, which all who prepare one folder must agree on. Raises DataError for another plan or folder."""
    settings, file = settings_of(config), out_dir / "plan.json"
    plan = settings["prepared_with"] | settings["corpus"]
    for key, (name, _) in weights(config, {c.domain for c in clips}).items():
        files = (f for f in (Path(name), *Path(name).glob("*")) if f.is_file())
        plan |= {f"sha256 of {key}, {f.name}": sha256(f) for f in files}
    lines = "".join(f"{c.domain} {c.name}\n{c.group}\n{c.text}\n{c.start} {c.end}\n" for c in clips)
    plan |= {"clips": len(clips), "names and texts": hashlib.sha256(lines.encode()).hexdigest()}
    if not file.exists():
        there = out_dir.iterdir() if out_dir.is_dir() else [out_dir] * out_dir.exists()
        if any(not f.name.endswith(common.PART) for f in there):  # that of a plan half written is ours
            raise DataError(f"data_dir={out_dir} holds other files; pass --data_dir=NEW_FOLDER")
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, plan)
    try:
        changed = common.changed_settings(plan, json.loads(file.read_text()), config)
    except (ValueError, TypeError):
        changed = "its plan.json is damaged"
    if changed:
        what = f"{out_dir} was begun with other settings or another corpus ({changed})"
        raise DataError(f"{what}; pass --data_dir=ANOTHER_FOLDER or delete it")


def training_clips(shards: dict[str, list[Clip]], d: int, seed: int) -> list[Clip]:
    """The training clips of domain d in an order that depends on nothing but their names and the seed."""
    clips = [c for name, part in shards.items() if name.startswith("train") for c in part if c.domain == d]
    return sorted(clips, key=lambda c: hashlib.sha256(f"{seed}/{c.domain}/{c.name}".encode()).digest())


def fit_tokenizer(d: int, path: Path, networks: Networks, shards: dict[str, list[Clip]]) -> None:
    """Fits domain d's tokenizer on training clips, and says how it uses its codes; it appears at `path`."""
    config, name, lost = networks.config, DOMAINS[d], {}
    chosen = training_clips(shards, d, config.data_seed)[: config.tokenizer_clips]
    for k in range(0, len(chosen), FIT_CHUNK):
        prepared = decode_all(chosen[k : k + FIT_CHUNK], config, lost)
        if not prepared:
            refuse_losses(lost, sum(map(len, lost.values())), path.parent, f"{name} ")
        refuse_losses(lost, sum(map(len, shards.values())), path.parent)
        networks.features |= {p.clip.key: x for p, x in zip(prepared, networks.encode(d, prepared), strict=True)}
    features = [x for (domain, _), x in networks.features.items() if domain == d]
    teacher = networks.encoder(d, reads=True)
    sizes = (teacher.dim, getattr(config, f"{name}_codes"), networks.rates[d], config.tokenizer_width)
    shape = tokenizer.TokenizerConfig(*sizes, positions=POSITIONS if teacher.name == "whisper" else 0)
    how = (config.tokenizer_steps, config.tokenizer_batch, config.tokenizer_lr, config.data_seed, networks.device)
    model = tokenizer.fit(features, shape, *how, path.with_name(f".{path.name}.state"), f"{name} tokenizer")
    counts = np.bincount(np.concatenate(model.encode(features)), minlength=shape.codes)
    print(f"{name} tokens: codes used {(counts > 0).mean():.3g}, perplexity {np.exp(entropy(counts)):.3g}")
    tokenizer.save(model, path)
    for file in path.parent.glob(f".{path.name}.*"):  # what the fit would have gone on from
        file.unlink()


def prepare_shard(path: Path, clips: list[Clip], networks: Networks, keep: set) -> None:
    """Decodes, encodes and writes the clips of one shard; `path` appears whole or not at all. Hold its lock."""
    lost: dict[str, list] = {}
    prepared = decode_all(clips, networks.config, lost)
    for d in networks.domains:
        if part := [p for p in prepared if p.clip.domain == d]:
            embeddings = networks.encoder(d).embed(heard(part, networks.encoder(d)))
            for p, tokens, embedding in zip(part, networks.tokens(d, part), embeddings, strict=True):
                p.tokens, p.embedding, p.keep_wav = tokens, embedding, p.clip.key in keep
    write_shard(path, prepared, [width for _, width in networks.named_widths()], networks.config.mel_floor, lost)


def refuse_losses(lost: dict[str, list], clips: int, out_dir: Path, kind: str = "") -> None:
    """Raises DataError when more than LOST_LIMIT of the clips (of this kind) are lost."""
    count = sum(map(len, lost.values()))
    if count > LOST_LIMIT * clips:
        reasons = ", ".join(f"{len(names)} {reason}, as {names[0]}" for reason, names in lost.items())
        todo = ", ".join(ADVICE[reason] for reason in lost if reason in ADVICE) or "mend the corpus"
        what = f"{count} of {clips} {kind}clips cannot be used ({reasons})"
        raise DataError(f"{what}; {todo}, delete {out_dir} and start again")


def finish(out_dir: Path, shards: list[str], networks: Networks, lost: dict[str, list]) -> None:
    """Writes the codebooks (K, W) and joins the shards; meta.json, which makes the folder usable, comes last."""
    for reason, names in lost.items():
        print(f"skipped {len(names)} clips: {reason} ({', '.join(names[:5])}{', ...' * (len(names) > 5)})")
    for split in SPLITS:  # what was lost may have been all that a side had
        domains = [np.load(out_dir / name / "index.npy")["domain"] for name in shards if name.startswith(split)]
        refuse_empty(split, {*networks.domains} - set(np.concatenate(domains).tolist()), networks.config)
    for d in networks.domains:
        if networks.files[d]:
            np.save(out_dir / f"{DOMAINS[d]}_codebook.npy", networks.tokenizer(d).codebook.cpu().numpy())
    meta = settings_of(networks.config) | {"skipped": lost, "token_rates": networks.rates}
    meta |= {"streams": 1 + networks.config.beats_tokens, "teachers": networks.named_widths()}
    join(out_dir, shards, meta)


def write_shard(path: Path, prepared: list[Prepared], widths: list[int], mel_floor: float, lost=None) -> None:
    """Writes one shard's files and shard.json: checksums, what was lost, and the sums behind the mel's statistics."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "wav").mkdir(parents=True)
    index = np.zeros(len(prepared), INDEX)
    index["row"], index["domain"] = np.arange(len(prepared)), [p.clip.domain for p in prepared]
    texts = [np.frombuffer(f"{p.clip.name}\n{p.clip.text}".encode(), np.uint8) for p in prepared]
    for name, first, length, arrays in (
        ("mel.bin", "mel", "frames", [p.mel for p in prepared]),
        ("tokens.bin", "token", "tokens", [p.tokens.astype("<i4") for p in prepared]),
        ("text.bin", "text", "text_len", texts),
    ):
        index[length] = [len(x) for x in arrays]
        index[first] = np.cumsum(index[length]) - index[length]
        with open(part / name, "wb") as file:
            file.writelines(x.tobytes() for x in arrays)
    for d, width in enumerate(widths):
        vectors = [p.embedding for p in prepared if p.clip.domain == d]
        index["teacher"][index["domain"] == d] = np.arange(len(vectors))
        np.save(part / f"teacher_{d}.npy", np.array(vectors, np.float32).reshape(-1, width))
    np.save(part / "index.npy", index)
    for i, p in enumerate(prepared):
        if p.keep_wav:
            audio.write(part / "wav" / f"{i:05d}.wav", audio.resample(p.wav, p.rate, audio.SAMPLE_RATE))
    mels = [p.mel.astype(np.float64).clip(min=mel_floor) for p in prepared]
    about = {
        "lost": lost or {},
        "frames": int(index["frames"].sum()),
        "mel_sum": sum((m.sum(0) for m in mels), np.zeros(audio.N_MELS)).tolist(),
        "mel_squares": sum(((m**2).sum(0) for m in mels), np.zeros(audio.N_MELS)).tolist(),
    }
    seal(part, path, about)


def seal(part: Path, path: Path, about: dict) -> None:
    """Completes a shard's folder by shard.json, `about` and the files' checksums, and gives it its name."""
    files = [f for f in sorted(part.rglob("*")) if f.is_file()]
    write_json(part / "shard.json", about | {"sha256": {str(f.relative_to(part)): sha256(f) for f in files}})
    part.rename(path)


def join(out_dir: Path, shards: list[str], meta: dict) -> None:
    """Writes the splits' indices and meta.json, completed by their counts, checksums and the mel's statistics."""
    for split in SPLITS:
        names = [name for name in shards if name.startswith(split)]
        parts = [np.load(out_dir / name / "index.npy") for name in names]
        for k, part in enumerate(parts):
            part["shard"] = k
        index = np.concatenate([np.zeros(0, INDEX), *parts])
        np.save(out_dir / f"{split}.npy", index)
        frames = [index["frames"][index["domain"] == d] for d in range(len(DOMAINS))]
        seconds = [float(f.sum() / audio.FRAME_RATE) for f in frames]
        meta[split] = {"clips": [len(f) for f in frames], "shards": names, "seconds": seconds}
    train = [json.loads((out_dir / name / "shard.json").read_text()) for name in meta["train"]["shards"]]
    total = sum(a["frames"] for a in train)
    mean = np.sum([a["mel_sum"] for a in train], 0) / total
    variance = np.sum([a["mel_squares"] for a in train], 0) / total - mean**2
    meta["mel_mean"], meta["mel_std"] = mean.tolist(), np.sqrt(variance.clip(0)).clip(1e-3).tolist()
    files = [f for f in sorted(out_dir.glob("*")) if f.suffix in (".npy", ".pt")]
    files += [out_dir / name / "shard.json" for name in shards]  # which hold the checksums of all other files
    write_json(out_dir / "meta.json", meta | {"sha256": {str(f.relative_to(out_dir)): sha256(f) for f in files}})


def as_prepared(root: Path, args: PrepareArgs) -> tuple[dict, Config, dict[tuple, Clip]]:
    """A finished folder's meta and settings, and its clips by key, from where `args` says that the corpus is now."""
    meta, moved = read_meta(root), {k: path for k, path in settings_of(args)["corpus"].items() if path}
    settings = meta["prepared_with"] | meta.get("corpus", {}) | moved | {"device": args.device}
    config = from_dict(Config, settings, f"{root}/meta.json")
    return meta, config, {c.key: c for c in corpora.read(config)[0]}


def decode_again(path: Path, clips: dict[tuple, Clip], config: Config) -> list[list[Prepared]]:
    """A shard's clips of each domain. Raises DataError when they are not those that were prepared."""
    index, text = np.load(path / "index.npy"), (path / "text.bin").read_bytes()
    keys = [(int(r["domain"]), text[r["text"] :][: r["text_len"]].decode().partition("\n")[0]) for r in index]
    prepared = decode_all([clips[key] for key in keys if key in clips], config, {})
    if [len(p.mel) for p in prepared] != index["frames"].tolist():
        raise DataError(f"{path}: its recordings have changed or moved; pass the corpus it is made of")
    return [[p for p in prepared if p.clip.domain == d] for d in range(len(DOMAINS))]


def add(args: PrepareArgs) -> None:
    """Writes style.npy (clips, 16, E) to each shard of args.styles, or features_{domain}_{rate}.npy (rows, E) to those
    of training of args.features; last of all a .json with their checksums. Raises DataError as decode_again."""
    root, rate = Path(args.features or args.styles), args.target_rate
    meta, config, clips = as_prepared(root, args)
    splits, names, done = SPLITS, ["style.npy"], root / "styles.json"
    if args.features:
        splits, names = ["train"], [FEATURES.format(d, rate) for d in range(len(DOMAINS))]
        done, widths = root / f"features_{rate:g}.json", [width for _, width in meta["teachers"]]
        size = sum(2 * widths[r["domain"]] * token_count(r["frames"], rate) for r in np.load(root / "train.npy"))
        print(f"teacher features of {root} at {rate:g} per second: {size / 1e6:.1f} MB", flush=True)
    networks = Networks(config, meta["train"]["clips"])
    files = [root / shard / name for split in splits for shard in meta[split]["shards"] for name in names]
    lock = root.with_name(f".{root.name}.lock")
    with locked(lock):
        for path in tqdm(sorted({file.parent for file in files if not file.exists()}), desc="shards"):
            done.unlink(missing_ok=True)  # it says that all are there
            parts = decode_again(path, clips, config)
            if args.features:
                rows = [networks.targets(d, part, rate) if part else [] for d, part in enumerate(parts)]
                arrays = [np.concatenate([np.zeros((0, E)), *x]) for E, x in zip(widths, rows, strict=True)]
            else:
                styles = [iter(networks.styles(d, part) if part else ()) for d, part in enumerate(parts)]
                arrays = [np.stack([next(styles[d]) for d in np.load(path / "index.npy")["domain"]])]
            for name, array in zip(names, arrays, strict=True):
                with whole_file(path / name, "wb") as out:
                    np.save(out, array.astype(np.float16))
        if not done.exists():
            write_json(done, {"sha256": {str(f.relative_to(root)): sha256(f) for f in files}})
    lock.unlink(missing_ok=True)  # all is there: whoever still holds or waits for it has nothing to do


def add_teacher(args: PrepareArgs) -> None:
    """Makes args.data_dir of the finished folder args.add_teacher: the vectors of the teachers of `args`, all else the
    same files by hard link, so that tokens do not change; says what to train it with. DataError as decode_again."""
    root, out_dir, changes = Path(args.add_teacher), Path(args.data_dir), {"data_dir": args.data_dir}
    meta, config, clips = as_prepared(root, args)
    for d, name in enumerate(DOMAINS):
        reads, teacher = source(config, d, reads=True), getattr(args, f"{name}_teacher")
        changes |= {f"{name}_teacher": teacher, f"{name}_tokenizer_from": reads if reads != teacher else ""}
    config = replace(config, **changes)
    networks, shards = Networks(config, meta["train"]["clips"]), [s for split in SPLITS for s in meta[split]["shards"]]
    meta["teachers"] = networks.named_widths()
    begin(out_dir, list(clips.values()), config)
    for name in tqdm([name for name in shards if not (out_dir / name).exists()], desc="shards"):
        part, about = out_dir / f".{name}.part", json.loads((root / name / "shard.json").read_text())
        shutil.rmtree(part, ignore_errors=True)
        own = shutil.ignore_patterns("teacher_*", "features_*", "shard.json")
        shutil.copytree(root / name, part, copy_function=os.link, ignore=own)
        for d, found in enumerate(decode_again(root / name, clips, config)):
            vectors = networks.encoder(d).embed(heard(found, networks.encoder(d))) if found else []
            np.save(part / f"teacher_{d}.npy", np.array(vectors, np.float32).reshape(-1, meta["teachers"][d][1]))
        seal(part, out_dir / name, about)
    for file in root.iterdir():
        if file.name.endswith(("_codebook.npy", "_tokenizer.pt", "styles.json")) and not (out_dir / file.name).exists():
            os.link(file, out_dir / file.name)
    join(out_dir, shards, meta | settings_of(config))
    print(f"made {out_dir}; train it with", *(f"--{k}={v}" for k, v in changes.items()))


def main(args: PrepareArgs) -> int:
    """Prepares, verifies or adds styles, features or a teacher; returns the exit code. Raises DataError as they do."""
    if args.verify:
        if problems := verify(args.verify):
            raise DataError(f"{len(problems)} files of {args.verify} are not sound:\n  " + "\n  ".join(problems[:20]))
        print(f"{args.verify}: every file is as it was written")
        return 0
    try:
        if args.styles or args.features or args.add_teacher:
            (add_teacher if args.add_teacher else add)(args)
            return 0
        if not is_prepared(args.data_dir):
            prepare(args)
    except KeyboardInterrupt:
        print(f"stopped; {args.features or args.styles or args.data_dir}: the same command continues", file=sys.stderr)
        return common.INTERRUPTED
    meta = check_prepared(args)
    for split in SPLITS if os.environ.get("RANK", "0") == "0" else ():
        found = zip(meta[split]["clips"], DOMAINS, meta[split]["seconds"], strict=True)
        print(f"{split}:", ", ".join(f"{n} {name} clips, {s / 60:.1f} min" for n, name, s in found if n))
    return 0


if __name__ == "__main__":
    common.command(main, configure(PrepareArgs, __doc__))
