"""What training reads: the prepared folder by memory map, its clips as batches of like length.

    dataset = Dataset("data/demo", "train")             # opens in milliseconds, whatever its size
    batch = dataset.batch(np.array([0, 5]))             # two clips, padded
    batch = TrainingBatches(dataset, config)(0)         # a training batch, a function of (seed, step, place)

python -m prepare CONFIG writes the folder:
    train_00000/, ...       mel.bin (frames, 100) float16; tokens.bin (tokens, streams) int32; text.bin;
                            teacher_0.npy, teacher_1.npy (clips of the domain, E); index.npy; wav/ with the waveforms
                            that evaluation compares with; shard.json with every file's checksum
    train.npy, held_out.npy one INDEX record a clip
    {domain}_codebook.npy   (codes, W), of each tokenizer that is ours
    meta.json               written last: without it the folder is unfinished
python -m prepare --styles=FOLDER adds style.npy (clips, 16, E) to each shard, and last of all styles.json;
--features=FOLDER --target_rate=R adds features_{domain}_{R}.npy (rows, E), R a second, to training's, features_{R}.json

B clips, T frames, N tokens or rows of features, M = 100 mel bins, E teacher width.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import audio
from common import DOMAINS, DataError, changed_settings, sha256

OPEN_SHARDS = 64  # shards that a dataset keeps mapped, of 6 open files each, 8 with features
JITTER = 0.02  # of a clip's length: enough for new neighbours each epoch, little enough to keep padding low
# of a clip: its shard and its row there; first row and length in mel.bin and in tokens.bin; first byte and length in
# text.bin of its name, a newline and its text; row in teacher_{domain}.npy; domain
FIELDS = "shard row mel frames token tokens text text_len teacher domain".split()
INDEX = np.dtype(list(zip(FIELDS, "<i4 <i4 <i8 <i4 <i8 <i4 <i8 <i4 <i4 <i1".split(), strict=True)))
CORPUS = "speech_dir audio_dir librispeech_dir audioset_dir manifest".split()  # of no concern to a finished folder
STORED = ("crop", "frames")  # values of align_target that need stored features
FEATURES = "features_{}_{:g}.npy"  # of a domain, at a rate
# what a prepared folder depends on: a run with other values of these must not use it
PREPARED_WITH = (
    "min_seconds max_seconds held_out data_seed reference_clips speech_teacher audio_teacher speech_tokenizer "
    "speech_tokenizer_from audio_tokenizer_from s3 audio_tokenizer beats_tokenizer speech_codes audio_codes "
    "beats_tokens tokenizer_clips tokenizer_steps tokenizer_batch tokenizer_lr tokenizer_width mel_floor"
).split()


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
    target: dict[str, torch.Tensor] = field(default_factory=dict)  # as teacher or (B, N, E), to align; empty: teacher
    target_len: torch.Tensor | None = None  # (B,) valid rows of a target (B, N, E)
    texts: tuple[str, ...] = ()  # (B,) what is said or heard, for models that read it; empty: unknown
    padded: bool | None = None  # whether a clip is shorter than T; found here, on the host, so that no step asks a GPU

    def __post_init__(self):
        if self.padded is None:
            self.padded = bool((self.frames < self.mel.shape[1]).any())

    def to(self, device: str) -> "Batch":
        """The same on another device."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The same with every tensor changed."""
        changed = {k: change(x) for k, x in vars(self).items() if isinstance(x, torch.Tensor)}
        named = {k: {n: change(x) for n, x in getattr(self, k).items()} for k in ("teacher", "target")}
        return replace(self, **changed, **named)


def settings_of(config) -> dict[str, dict]:
    """The settings that a prepared folder depends on, and its corpus, each path in one way of writing it."""
    corpus = {k: getattr(config, k) and os.path.normpath(getattr(config, k)) for k in CORPUS}
    return {"prepared_with": {k: getattr(config, k) for k in PREPARED_WITH}, "corpus": corpus}


def is_prepared(data_dir: str | Path, part: str = "meta") -> bool:
    """Whether the folder is finished or has a part, styles or features_{rate}, in every shard: its .json comes last."""
    return (Path(data_dir) / f"{part}.json").exists()


def check_prepared(config) -> dict:
    """The meta of config.data_dir. Raises DataError for a folder of other settings or another corpus than is named."""
    meta, wanted = read_meta(config.data_dir), settings_of(config)
    corpus, asked = meta.get("corpus", {}), wanted["corpus"]
    named = {k: path for k, path in asked.items() if k in corpus and any(asked.values())}  # not one domain for two
    if changed := changed_settings(wanted["prepared_with"] | named, meta["prepared_with"] | corpus, config):
        todo = "leave them out to use it as it is, or pass --data_dir=ANOTHER_FOLDER to prepare beside it"
        raise DataError(f"{config.data_dir} was prepared with other settings ({changed}); {todo}")
    return meta


def read_meta(data_dir: str | Path) -> dict:
    """What a finished preparation says of itself. Raises DataError for a folder that is none."""
    path = Path(data_dir) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if not isinstance(meta, dict) or "streams" not in meta:
            raise ValueError("it is another file")
        return meta
    except FileNotFoundError:
        raise DataError(f"data_dir={data_dir} is not prepared; python -m prepare CONFIG makes it") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and python -m prepare CONFIG mends it") from None


def read_codebook(data_dir: str | Path, name: str) -> torch.Tensor | None:
    """(K, W) vectors of a domain's tokens; None where its tokenizer is not ours."""
    path = Path(data_dir) / f"{name}_codebook.npy"
    return torch.from_numpy(np.load(path)) if path.exists() else None


def fingerprint(meta: dict) -> str:
    """A name for exactly this preparation: equal for copies, another for other clips, tokens or tokenizers."""
    return hashlib.sha256(json.dumps(meta.get("sha256", {}), sort_keys=True).encode()).hexdigest()[:16]


def verify(data_dir: str) -> list[str]:
    """The files of a prepared folder that are missing or not as they were written, one line each."""
    root = Path(data_dir)
    wanted = {root / name: digest for name, digest in read_meta(data_dir)["sha256"].items()}
    for file in (*sorted(root.glob("*/shard.json")), *root.glob("styles.json"), *root.glob("features_*.json")):
        try:
            wanted |= {file.parent / name: digest for name, digest in json.loads(file.read_text())["sha256"].items()}
        except (OSError, ValueError, KeyError):
            wanted.setdefault(file, "")
    files = tqdm(wanted.items(), desc="verify", mininterval=1)
    unsound = [path for path, digest in files if not path.exists() or sha256(path) != digest]
    return [f"{path}: {'not as it was written' if path.exists() else 'missing'}" for path in unsound]


def open_array(path: Path, kind: type | str | None = None, shape: tuple[int, ...] = ()) -> np.ndarray:
    """A .npy file, or a binary one of `kind` and `shape`, by memory map; DataError that names what is no such file."""
    try:
        return np.memmap(path, kind, "r", shape=shape) if kind else np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); python -m prepare --verify=DATA_DIR lists what is") from error


class Shard:
    """One shard's files by memory map, whose sizes are checked by its index."""

    def __init__(self, path: Path, streams: int):
        rows = open_array(path / "index.npy")
        self.mel = open_array(path / "mel.bin", np.float16, (int(rows["frames"].sum()), audio.N_MELS))
        self.tokens = open_array(path / "tokens.bin", "<i4", (int(rows["tokens"].sum()), streams))
        self.text = open_array(path / "text.bin", np.uint8, (int(rows["text_len"].sum()),))
        self.teachers = [open_array(path / f"teacher_{d}.npy") for d in range(len(DOMAINS))]  # (clips, E)
        self.style = open_array(style) if (style := path / "style.npy").exists() else None  # (clips, 16, E) float16


def open_features(path: Path, d: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Domain d's features (rows, E) at `rate` in the shard at `path`, by memory map, and its clips' edges there."""
    counts = [token_count(r["frames"], rate) for r in open_array(path / "index.npy") if r["domain"] == d]
    return open_array(path / FEATURES.format(d, rate)), np.cumsum([0, *counts])


class Dataset:
    """One split of a prepared folder. Opening reads meta.json alone; shards are mapped when first touched."""

    def __init__(self, data_dir: str | Path, split: str):
        self.root, self.split, self.meta = Path(data_dir), split, read_meta(data_dir)
        self.index = open_array(self.root / f"{split}.npy")
        self.rates, self.streams = self.meta["token_rates"], self.meta["streams"]
        self.codes = [self.meta["prepared_with"][f"{name}_codes"] for name in DOMAINS]
        # safe among threads; a map is closed when the last view of it is gone
        self.opened = functools.lru_cache(OPEN_SHARDS)(functools.partial(Shard, streams=self.streams))
        self.opened_features = functools.lru_cache(2 * OPEN_SHARDS)(open_features)

    def __len__(self) -> int:
        return len(self.index)

    def path(self, shard: int) -> Path:
        """The folder of a shard of this split."""
        return self.root / f"{self.split}_{shard:05d}"

    def at(self, i: int) -> tuple[np.void, Shard]:
        """The index's record of clip i, and its shard; the OPEN_SHARDS used last stay open."""
        record = self.index[i]
        return record, self.opened(self.path(int(record["shard"])))

    def mel(self, i: int) -> np.ndarray:
        """(T, M) float16 log-mel of clip i."""
        r, shard = self.at(i)
        return shard.mel[r["mel"] : r["mel"] + r["frames"]]

    def tokens(self, i: int) -> np.ndarray:
        """(N, streams) codes of clip i. Raises DataError where one is beyond its codebook."""
        r, shard = self.at(i)
        codes = shard.tokens[r["token"] : r["token"] + r["tokens"]]
        if (codes < 0).any() or (codes[:, 0] >= self.codes[r["domain"]]).any():
            raise DataError(f"{self.path(int(r['shard']))}/tokens.bin is damaged: it holds codes beyond the codebook")
        return codes

    def style(self, i: int) -> np.ndarray:
        """(16, E) float16 style vectors of clip i (eq. 17). Raises DataError where the folder has none."""
        r, shard = self.at(i)
        if shard.style is None:
            raise DataError(f"{self.root} has no style vectors; python -m prepare --styles={self.root} adds them")
        return shard.style[r["row"]]

    def name_and_text(self, i: int) -> tuple[str, str]:
        """The name of clip i and what is said or heard in it."""
        r, shard = self.at(i)
        return bytes(shard.text[r["text"] : r["text"] + r["text_len"]]).decode().partition("\n")[::2]

    def wav_path(self, i: int) -> Path:
        """Where clip i's waveform is, for those that have one."""
        r = self.index[i]
        return self.path(int(r["shard"])) / "wav" / f"{r['row']:05d}.wav"

    def vector(self, i: int) -> torch.Tensor:
        """(E,) what clip i's teacher says of the whole clip."""
        r, shard = self.at(i)
        return torch.from_numpy(np.array(shard.teachers[r["domain"]][r["teacher"]]))

    def features(self, i: int, rate: float, first: int, frames: int) -> torch.Tensor:
        """(N, E) features of clip i by its teacher under `frames` mel frames from `first` on, stored at `rate`."""
        r = self.index[i]
        rows, edges = self.opened_features(self.path(int(r["shard"])), int(r["domain"]), rate)
        start, end = edges[r["teacher"] : r["teacher"] + 2]
        row, count = token_span(first, frames, rate, end - start)
        return torch.from_numpy(rows[start + row : start + row + count].astype(np.float32))

    def by_teacher(self, ids: np.ndarray, targets: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """{teacher: (B, E) or (B, N, E)} of each clip's (E,) or (n, E), zeros on padding and for the other domain."""
        longest = [max(map(len, targets))] if targets[0].dim() == 2 else []
        padded = [torch.zeros(len(ids), *longest, width) for _, width in self.meta["teachers"]]
        for b, (d, x) in enumerate(zip(self.index["domain"][ids].tolist(), targets, strict=True)):
            padded[d][b][: len(x)] = x
        return {name: x for (name, _), x in zip(self.meta["teachers"], padded, strict=True)}

    def batch(self, ids: np.ndarray, crops: np.ndarray | None = None, prompts: np.ndarray | None = None) -> Batch:
        """Clips `ids` (B,) as one padded Batch; `crops` (B, 2): first frame and frames; `prompts` (B,): reference."""
        records = self.index[ids]
        crops = np.stack([np.zeros_like(records["frames"]), records["frames"]], 1) if crops is None else crops
        prompts = np.zeros(len(ids), np.int64) if prompts is None else prompts
        mels, codes = [], []
        for i, r, (first, length) in zip(ids.tolist(), records, crops.tolist(), strict=True):
            token, count = token_span(first, length, self.rates[r["domain"]], r["tokens"])
            mels.append(torch.from_numpy(self.mel(i)[first : first + length].astype(np.float32)))
            codes.append(torch.from_numpy(self.tokens(i)[token : token + count].astype(np.int64)))
        frames, token_len = (torch.tensor([len(x) for x in clips]) for clips in (mels, codes))
        mel, tokens = (pad_sequence(clips, batch_first=True) for clips in (mels, codes))
        tokens = tokens if self.streams > 1 else tokens[..., 0]
        domain, prompt, rows = map(torch.from_numpy, (records["domain"].astype(np.int64), prompts, np.asarray(ids)))
        teacher = self.by_teacher(ids, [self.vector(i) for i in ids.tolist()])
        texts = tuple(self.name_and_text(i)[1] for i in ids.tolist())
        return Batch(mel, frames, tokens, token_len, domain, teacher, prompt, rows, texts=texts)


def crop_unit(rates: list[int]) -> int:
    """Frames between the times at which a token of every domain starts: a crop begins only there."""
    return int(np.lcm.reduce(audio.SAMPLE_RATE // np.gcd(np.array(rates) * audio.HOP, audio.SAMPLE_RATE)))


def token_span(first: int, frames: int, rate: int, tokens: int) -> tuple[int, int]:
    """First token and number of tokens under `frames` mel frames that start at a multiple of crop_unit()."""
    token = min(round(int(first) * rate / audio.FRAME_RATE), int(tokens) - 1)
    return token, min(token_count(int(frames), rate), int(tokens) - token)


def token_count(frames: int, rate: int) -> int:
    """Tokens of a clip of `frames` mel frames at `rate` tokens a second."""
    return max(1, round(frames * rate / audio.FRAME_RATE))


class LengthBatchSampler:
    """Groups of clips of like length under a budget of padded length; a pure function of (seed, step, place).
    A step takes world * accumulate groups; place = micro * world + rank says which is whose, so that two ranks, or one
    that accumulates twice, take the same groups. Every epoch has as many steps: slots are cut once from the sorted
    lengths; an epoch deals clips to them by jittered length, neighbours to a step, and shuffles the steps."""

    def __init__(self, lengths: np.ndarray, config, budget: str, rank=0, world=1, accumulate=1, trim=0.0):
        """`config` has seed, batch_size and, named `budget`, a group's padded length. DataError: a clip is longer."""
        self.lengths, self.config, self.trim = np.asarray(lengths, np.int64), config, trim
        self.rank, self.world, self.accumulate = rank, world, accumulate
        ordered, room = np.sort(self.lengths), getattr(config, budget)
        if ordered[-1] > room:
            raise DataError(f"{budget}={room} is below the longest clip ({ordered[-1]})")
        slack = (1 + JITTER) / (1 - JITTER)  # how much longer a clip can be than the one it swaps with
        longest, edges = np.minimum(ordered * slack, ordered[-1]), [0]
        for k, length in enumerate(longest.tolist()):
            clips = k + 1 - edges[-1]  # of the group, with this one
            if clips > config.batch_size or clips * length > room:
                edges.append(k)
        self.edges = np.array([*edges, len(ordered)])
        self.steps_per_epoch = max(1, len(edges) // (world * accumulate))
        self.dealt = functools.lru_cache(2)(self.deal)  # two epochs, as threads may be at either side of an end

    def taken(self, ids: np.ndarray) -> np.ndarray:
        """How much of each clip of a group: as much as the shortest has, where none loses more than share `trim`; then,
        unless that is 0, a multiple of 16 of it, where an eighth at most is lost."""
        lengths = self.lengths[ids]
        most = lengths.min() if lengths.min() >= (1 - self.trim) * lengths.max() else lengths.max()
        rest = most % 16 if self.trim else 0  # few shapes of batches: a GPU plans its attention anew for each
        return np.minimum(lengths, most - rest if 8 * rest <= most else most)

    def waste(self) -> tuple[float, float]:
        """Shares of the first epoch: of padding in its batches, and of its frames what they do not take."""
        groups = [self.ids(k) for k in range(self.steps_per_epoch * self.accumulate)]
        taken, lengths = [self.taken(ids) for ids in groups], sum(self.lengths[ids].sum() for ids in groups)
        total = sum(x.sum() for x in taken)
        return 1 - total / sum(len(x) * x.max() for x in taken), 1 - total / lengths

    def deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips in the order of an epoch, and the slots of its steps (steps, world * accumulate)."""
        rng = np.random.default_rng([self.config.seed, epoch])
        order = np.argsort(self.lengths * rng.uniform(1 - JITTER, 1 + JITTER, len(self.lengths)), kind="stable")
        drawn = np.resize(rng.permutation(len(self.edges) - 1), (self.steps_per_epoch, self.world * self.accumulate))
        return order, np.sort(drawn, axis=None).reshape(drawn.shape)[drawn[:, 0].argsort().argsort()]

    def expected_clips(self, domain: np.ndarray) -> tuple[float, ...]:
        """How many clips of each domain a group holds in the mean over epochs; `domain` (clips,) as `lengths`."""
        return tuple((np.bincount(domain, minlength=len(DOMAINS)) / (len(self.edges) - 1)).tolist())

    def place(self, k: int) -> tuple[int, int]:
        """Step and place of this rank's k-th group since the beginning."""
        step, micro = divmod(k, self.accumulate)
        return step, micro * self.world + self.rank

    def ids(self, k: int) -> np.ndarray:
        """Clips, as rows of `lengths`, that make this rank's k-th group."""
        step, place = self.place(k)
        epoch, step = divmod(step, self.steps_per_epoch)
        order, slots = self.dealt(epoch)
        slot = slots[step, place]
        return order[self.edges[slot] : self.edges[slot + 1]]


def teacher_moments(dataset: Dataset, d: int, config) -> tuple:
    """What config.align_norm takes from domain d's targets and then divides them by, (E,) each or numbers: mean and
    standard deviation over the split's vectors, over clips' mean features for crop, over features for frames."""
    if config.align_norm == "raw":
        return 0.0, 1.0

    def targets(name: str) -> np.ndarray:
        if config.align_target not in STORED:
            return dataset.opened(dataset.root / name).teachers[d].astype(np.float64)
        rows, edges = dataset.opened_features(dataset.root / name, d, config.target_rate)
        x = rows.astype(np.float64)
        return x if config.align_target == "frames" else np.add.reduceat(x, edges[:-1]) / np.diff(edges)[:, None]

    sums = ((len(x), x.sum(0), np.square(x).sum(0)) for x in map(targets, dataset.meta[dataset.split]["shards"]))
    n, total, squares = (sum(column) for column in zip(*sums, strict=True))
    mean, square = (torch.from_numpy(x / max(n, 1)) for x in (total, squares))
    return mean.float(), (square - mean**2).clamp_min(1e-12).sqrt().float() if config.align_norm == "zscore" else 1.0


def other_clips(domain: np.ndarray, seed: int) -> np.ndarray:
    """For each clip another of its domain, a permutation drawn from `seed`. DataError: a domain has one clip alone."""
    others = np.arange(len(domain))
    for d, name in enumerate(DOMAINS):
        order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(d,))).permutation(others[domain == d])
        if len(order) == 1:
            raise DataError(f"there is one {name} clip to train on: align_target=shuffled needs another")
        others[order] = np.roll(order, 1)
    return others


class TrainingBatches(LengthBatchSampler):
    """Training batches of stage 2 under a frame budget; crops and prompts too follow from (seed, step, place)."""

    def __init__(self, dataset: Dataset, config, rank: int = 0, world: int = 1):
        self.dataset, self.unit = dataset, crop_unit(dataset.rates)
        lengths = np.minimum(dataset.index["frames"], config.crop_frames or 2**31 - 1)
        super().__init__(lengths, config, "batch_frames", rank, world, config.accumulate, config.trim)
        self.others = other_clips(dataset.index["domain"], config.seed) if config.align_target == "shuffled" else None
        self.targeted = config.align != "none" and config.align_teacher == "external"
        self.moments = [teacher_moments(dataset, d, config) for d in range(len(DOMAINS))] if self.targeted else []

    def target(self, i: int, first: int, frames: int) -> torch.Tensor:
        """What alignment learns of clip i cropped to `frames` from `first` on: (E,), or (n, E) of align_target=frames,
        whose zscore is over these rows, as iREPA's (arXiv:2512.10794)."""
        c, (mean, std) = self.config, self.moments[self.dataset.index["domain"][i]]
        if c.align_target not in STORED:
            return (self.dataset.vector(i if self.others is None else int(self.others[i])) - mean) / std
        x = self.dataset.features(i, c.target_rate, first, frames)
        if c.align_target == "crop":
            x = x.mean(0)
        elif c.align_norm == "zscore":
            mean, std = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
        return (x - mean) / std

    def __call__(self, k: int) -> Batch:
        ids = self.ids(k)
        rng, lengths = np.random.default_rng([self.config.seed, *self.place(k)]), self.taken(ids)
        room = np.maximum(self.dataset.index["frames"][ids] - lengths, 0) // self.unit
        first = rng.integers(0, room + 1) * self.unit
        share = rng.uniform(0, self.config.prompt_max, len(ids)) * (rng.random(len(ids)) >= self.config.prompt_drop)
        crops = np.stack([first, lengths], 1)
        batch = self.dataset.batch(ids, crops, (share * lengths).astype(np.int64))
        if self.config.ctc_weight:  # of a part what is said is not known
            whole = (lengths >= 0.9 * self.dataset.index["frames"][ids]).tolist()
            batch.texts = tuple(text if all_of_it else "" for text, all_of_it in zip(batch.texts, whole, strict=True))
        if self.targeted:
            targets = [self.target(i, *crop) for i, crop in zip(ids.tolist(), crops.tolist(), strict=True)]
            batch.target = self.dataset.by_teacher(ids, targets)
            batch.target_len = torch.tensor([len(x) for x in targets]) if targets[0].dim() == 2 else None
        return batch


class Prefetcher:
    """Batches in turn, the next ones prepared by threads; each follows from its number, so nothing else changes."""

    def __init__(self, batches: Callable[[int], Batch], threads: int, pin: bool = False):
        # copies to a GPU do not wait for what comes from page-locked memory
        self.batches = (lambda k: batches(k).map(torch.Tensor.pin_memory)) if pin else batches
        self.threads, self.pool = threads, ThreadPoolExecutor(max(1, threads))
        self.pending: dict[int, Future] = {}

    def __call__(self, k: int) -> Batch:
        for i in range(k, k + self.threads + 1):
            if i not in self.pending:
                self.pending[i] = self.pool.submit(self.batches, i)
        return self.pending.pop(k).result()


def first_of_each_domain(dataset: Dataset, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Rows of n clips of each domain, the first or those that `rng` draws."""
    found = (np.flatnonzero(dataset.index["domain"] == d) for d in range(len(DOMAINS)))
    return np.concatenate([(rng.permutation(rows) if rng else rows)[:n] for rows in found])


def fixed_batch(dataset: Dataset, per_domain: int, seed: int, max_frames: int) -> Batch:
    """`per_domain` clips of each domain, the same for the same seed, cropped to their first max_frames."""
    return beginnings(dataset, first_of_each_domain(dataset, per_domain, np.random.default_rng(seed)), max_frames)


def beginnings(dataset: Dataset, ids: np.ndarray, max_frames: int) -> Batch:
    """Clips `ids`, each cropped to its first max_frames."""
    lengths = np.minimum(dataset.index["frames"][ids], max_frames)
    return dataset.batch(ids, np.stack([np.zeros_like(lengths), lengths], 1))
