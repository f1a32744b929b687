"""What training reads: the prepared folder by memory map, its clips as batches of like length.

    dataset = Dataset("data/demo", "train")      # opens in milliseconds, whatever its size
    batch = dataset.batch(np.array([0, 5]))      # two clips, padded
    batch = TrainingBatches(dataset, config)(0)  # a training batch, a function of (seed, step, place)

python -m prepare CONFIG writes the folder:
    train_00000/, ...       mel.bin (frames, 100) float16; tokens.bin (tokens, streams) int32; text.bin;
                            teacher_0.npy, teacher_1.npy (clips of the domain, E); index.npy; wav/ with the waveforms
                            that evaluation compares with; shard.json with every file's checksum
    train.npy, held_out.npy one INDEX record a clip
    meta.json               written last: without it the folder is unfinished

B clips, T frames, N tokens, M = 100 mel bins, E teacher width.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import audio
from common import DOMAINS, DataError
from configurator import changed_settings

OPEN_SHARDS = 64  # shards that a dataset keeps mapped, of 6 open files each
INDEX = np.dtype(
    [
        ("shard", "<i4"),
        ("row", "<i4"),  # of the clip in its shard
        ("mel", "<i8"),  # first row in the shard's mel.bin
        ("frames", "<i4"),
        ("token", "<i8"),  # first row in tokens.bin
        ("tokens", "<i4"),
        ("text", "<i8"),  # first byte in text.bin: name, newline, text
        ("text_len", "<i4"),
        ("teacher", "<i4"),  # row in teacher_{domain}.npy
        ("domain", "<i1"),
    ]
)
CORPUS = "speech_dir audio_dir librispeech_dir audioset_dir manifest".split()  # of no concern to a finished folder
# what a prepared folder depends on: a run with other values of these must not use it
PREPARED_WITH = (
    "min_seconds max_seconds held_out data_seed reference_clips whisper audio_teacher speech_tokenizer s3 "
    "audio_tokenizer beats_tokenizer speech_codes audio_codes beats_tokens tokenizer_steps mel_floor"
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
    padded: bool | None = None  # whether a clip is shorter than T; found here, on the host, so that no step asks a GPU

    def __post_init__(self):
        if self.padded is None:
            self.padded = bool((self.frames < self.mel.shape[1]).any())

    def to(self, device: str) -> "Batch":
        """The same on another device."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The same in page-locked memory, from which copies to a GPU do not wait."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("teacher", "padded")}
        moved = {name: change(x) for name, x in tensors.items()}
        return Batch(**moved, teacher={k: change(v) for k, v in self.teacher.items()}, padded=self.padded)

    def double(self) -> "Batch":
        """The same in float64, for checks."""
        teacher = {k: v.double() for k, v in self.teacher.items()}
        return replace(self, mel=self.mel.double(), teacher=teacher)


# ---- the prepared folder


def prepared_with(config) -> dict:
    """The settings that a prepared folder depends on."""
    return {k: getattr(config, k) for k in PREPARED_WITH}


def corpus_of(config) -> dict[str, str]:
    """The corpus keys, each path in one way of writing it."""
    return {k: getattr(config, k) and os.path.normpath(getattr(config, k)) for k in CORPUS}


def is_prepared(data_dir: str | Path) -> bool:
    """Whether the folder is finished: meta.json is written last."""
    return (Path(data_dir) / "meta.json").exists()


def check_prepared(config) -> dict:
    """The meta of config.data_dir. Raises DataError when the folder is not there, was made otherwise, or from another
    corpus than the one that the config names, if it names one."""
    meta = read_meta(config.data_dir)
    corpus = meta.get("corpus", {})
    named = {k: v for k, v in corpus_of(config).items() if v and k in corpus}
    changed = changed_settings(prepared_with(config) | named, meta["prepared_with"] | corpus)
    if changed:
        raise DataError(
            f"{config.data_dir} was prepared with other settings ({changed}); leave them out to use it as it is, or "
            f"pass --data_dir=ANOTHER_FOLDER to prepare beside it"
        )
    return meta


def read_meta(data_dir: str | Path) -> dict:
    """What a finished preparation says of itself. Raises DataError for a folder that is none."""
    try:
        return json.loads((Path(data_dir) / "meta.json").read_text())
    except FileNotFoundError:
        raise DataError(f"data_dir={data_dir} is not prepared; python -m prepare CONFIG makes it") from None
    except ValueError as error:
        raise DataError(
            f"{data_dir}/meta.json is damaged ({error}); delete it, then python -m prepare CONFIG makes it again"
        ) from None


def fingerprint(meta: dict) -> str:
    """A name for exactly this preparation: equal for copies, another for other clips, tokens or tokenizers."""
    return hashlib.sha256(json.dumps(meta.get("sha256", {}), sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Shard:
    """One shard's files by memory map."""

    mel: np.ndarray  # (frames, M) float16
    tokens: np.ndarray  # (tokens, streams)
    text: np.ndarray  # bytes
    teachers: list[np.ndarray]  # (clips of the domain, E)
    style: np.ndarray  # (clips, 16, E) float16


def open_shard(path: Path, streams: int) -> Shard:
    """Maps the files of the shard at `path`; nothing is read yet."""
    return Shard(
        np.memmap(path / "mel.bin", np.float16, "r").reshape(-1, audio.N_MELS),
        np.memmap(path / "tokens.bin", "<i4", "r").reshape(-1, streams),
        np.memmap(path / "text.bin", np.uint8, "r"),
        [np.load(path / f"teacher_{d}.npy", mmap_mode="r") for d in range(len(DOMAINS))],
        np.load(path / "style.npy", mmap_mode="r"),
    )


class Dataset:
    """One split of a prepared folder. Opening reads meta.json alone; shards are mapped when first touched."""

    def __init__(self, data_dir: str | Path, split: str):
        self.root, self.split, self.meta = Path(data_dir), split, read_meta(data_dir)
        self.index = np.load(self.root / f"{split}.npy", mmap_mode="r")
        self.rates, self.streams = self.meta["token_rates"], self.meta["streams"]
        # safe among threads; a map is closed when the last view of it is gone
        self.opened = functools.lru_cache(OPEN_SHARDS)(functools.partial(open_shard, streams=self.streams))

    def __len__(self) -> int:
        return len(self.index)

    def path(self, shard: int) -> Path:
        """The folder of a shard of this split."""
        return self.root / f"{self.split}_{shard:05d}"

    def shard(self, k: int) -> Shard:
        """The files of shard k; the OPEN_SHARDS used last stay open."""
        return self.opened(self.path(k))

    def mel(self, i: int) -> np.ndarray:
        """(T, M) float16 log-mel of clip i."""
        r = self.index[i]
        return self.shard(int(r["shard"])).mel[r["mel"] : r["mel"] + r["frames"]]

    def tokens(self, i: int) -> np.ndarray:
        """(N, streams) codes of clip i."""
        r = self.index[i]
        return self.shard(int(r["shard"])).tokens[r["token"] : r["token"] + r["tokens"]]

    def embedding(self, i: int) -> np.ndarray:
        """(E,) pooled embedding of clip i by its domain's teacher."""
        r = self.index[i]
        return self.shard(int(r["shard"])).teachers[r["domain"]][r["teacher"]]

    def style(self, i: int) -> np.ndarray:
        """(16, E) float16 style vectors of clip i (eq. 17)."""
        r = self.index[i]
        return self.shard(int(r["shard"])).style[r["row"]]

    def name_and_text(self, i: int) -> tuple[str, str]:
        """The name of clip i and what is said or heard in it."""
        r = self.index[i]
        stored = self.shard(int(r["shard"])).text[r["text"] : r["text"] + r["text_len"]]
        name, _, text = bytes(stored).decode().partition("\n")
        return name, text

    def wav_path(self, i: int) -> Path:
        """Where clip i's waveform is, for those that have one."""
        r = self.index[i]
        return self.path(int(r["shard"])) / "wav" / f"{r['row']:05d}.wav"

    def batch(self, ids: np.ndarray, crops: np.ndarray | None = None, prompts: np.ndarray | None = None) -> Batch:
        """Clips `ids` (B,) as one padded Batch; `crops` (B, 2): first frame and frames; `prompts` (B,): reference."""
        records = self.index[ids]
        crops = np.stack([np.zeros_like(records["frames"]), records["frames"]], 1) if crops is None else crops
        frames = torch.from_numpy(np.asarray(crops[:, 1], np.int64))
        domain = torch.from_numpy(records["domain"].astype(np.int64))
        spans = [token_span(*c, self.rates[r["domain"]], r["tokens"]) for c, r in zip(crops, records, strict=True)]
        token_len = torch.tensor([n for _, n in spans])
        mel = torch.zeros(len(ids), int(frames.max()), audio.N_MELS)
        tokens = torch.zeros(len(ids), int(token_len.max()), self.streams, dtype=torch.int64)
        teacher = {name: torch.zeros(len(ids), width) for name, width in self.meta["teachers"]}
        names = list(teacher)
        for b, (i, (first, length), (token, count)) in enumerate(zip(ids.tolist(), crops, spans, strict=True)):
            mel[b, :length] = torch.from_numpy(self.mel(i)[first : first + length].astype(np.float32))
            tokens[b, :count] = torch.from_numpy(self.tokens(i)[token : token + count].astype(np.int64))
            teacher[names[records["domain"][b]]][b] = torch.from_numpy(np.array(self.embedding(i)))
        tokens = tokens if self.streams > 1 else tokens[..., 0]
        prompt = torch.zeros(len(ids), dtype=torch.int64) if prompts is None else torch.from_numpy(prompts)
        return Batch(mel, frames, tokens, token_len, domain, teacher, prompt, torch.from_numpy(np.asarray(ids)))


def crop_unit(rates: list[int]) -> int:
    """Frames between the times at which a token of every domain starts: a crop begins only there."""
    return int(np.lcm.reduce([(Fraction(r) / Fraction(audio.FRAME_RATE)).denominator for r in rates]))


def token_span(first: int, frames: int, rate: int, tokens: int) -> tuple[int, int]:
    """First token and number of tokens under `frames` mel frames that start at a multiple of crop_unit()."""
    token = min(round(int(first) * rate / audio.FRAME_RATE), int(tokens) - 1)
    return token, min(token_count(int(frames), rate), int(tokens) - token)


def token_count(frames: int, rate: int) -> int:
    """Tokens of a clip of `frames` mel frames at `rate` tokens a second."""
    return max(1, round(frames * rate / audio.FRAME_RATE))


# ---- batches


class LengthBatchSampler:
    """Groups of clips of like length under a budget of padded length; a pure function of (seed, step, place).

    A step takes world * accumulate groups; place = micro * world + rank says which is whose, so that two ranks, or one
    that accumulates twice, take the same groups. Every epoch has the same number of steps, so a step's epoch is a
    division: slots are cut once from the sorted lengths, and each epoch deals clips to slots in the order of their
    jittered length, then shuffles the slots.
    """

    JITTER = 0.02  # of the length: enough for new neighbours each epoch, little enough to keep padding low

    def __init__(self, lengths: np.ndarray, config, budget: str, rank: int = 0, world: int = 1, accumulate: int = 1):
        """`config` has seed, batch_size (most clips of a group) and, under the name `budget`, the padded length of a
        group. Raises DataError when one clip is longer."""
        self.lengths, self.config = np.asarray(lengths, np.int64), config
        self.rank, self.world, self.accumulate = rank, world, accumulate
        ordered, room, most = np.sort(self.lengths), getattr(config, budget), config.batch_size
        if ordered[-1] > room:
            raise DataError(f"{budget}={room} is below the longest clip ({ordered[-1]})")
        slack = (1 + self.JITTER) / (1 - self.JITTER)  # how much longer a clip can be than the one it swaps with
        slots, first = [], 0
        while first < len(ordered):
            count = 1
            while (
                count < most
                and first + count < len(ordered)
                and (count + 1) * min(ordered[first + count] * slack, ordered[-1]) <= room
            ):
                count += 1
            slots.append(count)
            first += count
        self.edges = np.cumsum([0, *slots])
        self.steps_per_epoch = max(1, len(slots) // (world * accumulate))
        self.dealt: tuple = (None,)  # the epoch whose order is at hand, its clips in order, its slots in order

    def taken(self, ids: np.ndarray) -> np.ndarray:
        """How much of each clip of a group is taken."""
        return self.lengths[ids]

    def padding(self) -> float:
        """Share of padding in the batches of the first epoch."""
        groups = [self.taken(ids) for ids in self.first_epoch()]
        return 1 - sum(g.sum() for g in groups) / sum(len(g) * g.max() for g in groups)

    def left_out(self) -> float:
        """Share of the first epoch's frames that its batches do not take."""
        groups = self.first_epoch()
        return 1 - sum(self.taken(ids).sum() for ids in groups) / sum(self.lengths[ids].sum() for ids in groups)

    def first_epoch(self) -> list[np.ndarray]:
        """The clips of each of this rank's groups in the first epoch."""
        return [self.ids(k) for k in range(self.steps_per_epoch * self.accumulate)]

    def deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips and slots in the order of an epoch; kept until another epoch is asked for."""
        dealt = self.dealt  # read once: other threads may be at another epoch
        if dealt[0] != epoch:
            rng = np.random.default_rng([self.config.seed, epoch])
            jitter = rng.uniform(1 - self.JITTER, 1 + self.JITTER, len(self.lengths))
            order = np.argsort(self.lengths * jitter, kind="stable")
            dealt = self.dealt = (epoch, order, rng.permutation(len(self.edges) - 1))
        return dealt[1:]

    def place(self, k: int) -> tuple[int, int]:
        """Step and place of this rank's k-th group since the beginning."""
        step, micro = divmod(k, self.accumulate)
        return step, micro * self.world + self.rank

    def ids(self, k: int) -> np.ndarray:
        """Clips, as rows of `lengths`, that make this rank's k-th group."""
        step, place = self.place(k)
        epoch, step = divmod(step, self.steps_per_epoch)
        order, slots = self.deal(epoch)
        slot = slots[(step * self.world * self.accumulate + place) % len(slots)]
        return order[self.edges[slot] : self.edges[slot + 1]]


class TrainingBatches(LengthBatchSampler):
    """Training batches of stage 2 under a frame budget; crops and prompts too follow from (seed, step, place)."""

    def __init__(self, dataset: Dataset, config, rank: int = 0, world: int = 1):
        self.dataset, self.unit = dataset, crop_unit(dataset.rates)
        frames = dataset.index["frames"]
        lengths = np.minimum(frames, config.crop_frames) if config.crop_frames else frames
        super().__init__(lengths, config, "batch_frames", rank, world, config.accumulate)

    def taken(self, ids: np.ndarray) -> np.ndarray:
        """Frames of each clip: as many as the shortest has, where that leaves out no more than `trim` of any."""
        lengths = self.lengths[ids]
        alike = lengths.min() >= (1 - self.config.trim) * lengths.max()
        return np.full_like(lengths, lengths.min()) if alike else lengths

    def __call__(self, k: int) -> Batch:
        ids = self.ids(k)
        rng = np.random.default_rng([self.config.seed, *self.place(k)])
        lengths, records = self.taken(ids), self.dataset.index[ids]
        room = np.maximum(records["frames"] - lengths, 0) // self.unit
        first = rng.integers(0, room + 1) * self.unit
        share = rng.uniform(0, self.config.prompt_max, len(ids)) * (rng.random(len(ids)) >= self.config.prompt_drop)
        return self.dataset.batch(ids, np.stack([first, lengths], 1), (share * lengths).astype(np.int64))


class Prefetcher:
    """TrainingBatches in turn, the next ones prepared by threads meanwhile. As a batch is a function of its number alone, the
    threads change nothing but the time."""

    def __init__(self, batches: Callable[[int], Batch], threads: int, pin: bool = False):
        self.batches, self.threads = (lambda k: batches(k).pin()) if pin else batches, threads
        self.pool = ThreadPoolExecutor(threads) if threads else None
        self.pending: dict[int, Future] = {}

    def __call__(self, k: int) -> Batch:
        if not self.pool:
            return self.batches(k)
        for i in range(k, k + self.threads + 1):
            if i not in self.pending:
                self.pending[i] = self.pool.submit(self.batches, i)
        return self.pending.pop(k).result()


def first_of_each_domain(dataset: Dataset, n: int) -> np.ndarray:
    """Rows of the first n clips of each domain."""
    return np.concatenate([np.flatnonzero(dataset.index["domain"] == d)[:n] for d in range(len(DOMAINS))])


def fixed_batch(dataset: Dataset, per_domain: int, seed: int, max_frames: int) -> Batch:
    """`per_domain` clips of each domain, the same for the same seed, cropped to their first max_frames."""
    rng = np.random.default_rng(seed)
    ids = [rng.permutation(np.flatnonzero(dataset.index["domain"] == d))[:per_domain] for d in range(len(DOMAINS))]
    ids = np.concatenate(ids)
    lengths = np.minimum(dataset.index["frames"][ids], max_frames)
    return dataset.batch(ids, np.stack([np.zeros_like(lengths), lengths], 1))
