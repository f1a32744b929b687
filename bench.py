"""Measured speed and memory: every number a median of several runs with its spread, beside the device's name.

    python bench.py                    # prints the table, writes out/bench.md
    python bench.py --only=decode      # only the rows whose name contains this

No other file makes claims of speed.
"""

from dataclasses import dataclass
from typing import ClassVar

from configurator import Config, configure


@dataclass
class BenchArgs:
    """Settings of `python bench.py`."""

    only: str = ""  # run only the rows whose name contains this
    runs: int = 5  # repetitions of each row
    out: str = "out/bench.md"  # where the table goes

    ranges: ClassVar[dict] = {"runs": (1, None)}


if __name__ == "__main__":
    ARGS = configure(BenchArgs, __doc__)  # a typo is answered before torch is imported

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

import audio
import corpora
import data
import shards

Row = Callable[[Path], tuple[str, Callable[[], float], str]]  # empty folder -> what, one measurement of it, its unit


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{torch.get_num_threads()} cores of {model}, torch {torch.__version__}"


def decode_row(folder: Path) -> tuple[str, Callable[[], float], str]:
    """What preparation does to a LibriSpeech clip before any network: read flac, resample twice, log-mel, one core."""
    path, seconds = folder / "a.flac", 15.0
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds)), 16000)
    clip = corpora.Clip("a.flac", path, "text", corpora.SPEECH, "g")

    def measure() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start, clips = time.perf_counter(), 20
        for _ in range(clips):
            wav, _ = data.decode(clip, (audio.SAMPLE_RATE, 16000), Config())
            audio.log_mel(torch.from_numpy(wav)).half().numpy()
        spent = time.perf_counter() - start
        torch.set_num_threads(threads)
        return clips * seconds / spent

    return "decode + resample + mel of 16 kHz flac, one core", measure, "times real time"


def large_dataset(folder: Path, clips: int) -> None:
    """A prepared folder's indices for `clips` clips of LibriSpeech-like lengths, without their shards."""
    rng = np.random.default_rng(0)
    seconds = np.concatenate([rng.normal(14, 1.5, clips * 2 // 3), rng.uniform(2, 16, clips - clips * 2 // 3)])
    index = np.zeros(clips, shards.INDEX)
    index["frames"] = (seconds.clip(1.5, 17) * audio.FRAME_RATE).astype(int)
    index["shard"] = np.arange(clips) // data.SHARD_CLIPS
    np.save(folder / "train.npy", index)
    (folder / "meta.json").write_text(json.dumps({"token_rates": [50, 50], "streams": 2, "teachers": []}))


def open_row(folder: Path) -> tuple[str, Callable[[], float], str]:
    large_dataset(folder, 1_000_000)

    def measure() -> float:
        start = time.perf_counter()
        len(shards.Dataset(folder, "train"))
        return time.perf_counter() - start

    return "open a dataset of 1 M clips", measure, "s"


def choose_row(folder: Path) -> tuple[str, Callable[[], float], str]:
    large_dataset(folder, 1_000_000)

    def measure() -> float:
        dataset, start = shards.Dataset(folder, "train"), time.perf_counter()
        shards.Batches(dataset, Config()).ids(0)
        return time.perf_counter() - start

    return "bucket 1 M clips and choose the first batch", measure, "s"


def memory_row(folder: Path) -> tuple[str, Callable[[], float], str]:
    """What both add to the resident memory of a fresh process (Linux)."""
    large_dataset(folder, 1_000_000)
    code = (
        "import sys, shards; from configurator import Config\n"
        "used = lambda: int(open('/proc/self/statm').read().split()[1]) * 4\n"
        "before = used(); b = shards.Batches(shards.Dataset(sys.argv[1], 'train'), Config()); b.ids(0)\n"
        "print(used() - before)"
    )

    def measure() -> float:
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return int(done.stdout) / 1024

    return "both, added memory of the process", measure, "MB"


def padding_row(folder: Path) -> tuple[str, Callable[[], float], str]:
    """Share of padding in an epoch of LibriSpeech-like lengths under the paper's frame budget."""
    large_dataset(folder, 100_000)
    dataset = shards.Dataset(folder, "train")
    return "padding, LibriSpeech-like lengths", lambda: 100 * shards.Batches(dataset, Config()).padding(), "%"


ROWS: tuple[Row, ...] = (decode_row, open_row, choose_row, memory_row, padding_row)


def main(args: BenchArgs) -> None:
    lines = [f"{device_name()}; median of {args.runs} runs [lowest, highest]", ""]
    lines += ["| what | number | unit |", "|---|---|---|"]
    print("\n".join(lines))
    for row in ROWS:
        if args.only in row.__name__:
            with tempfile.TemporaryDirectory() as folder:
                what, measure, unit = row(Path(folder))
                values = [measure() for _ in range(args.runs)]
            number = f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"
            lines.append(f"| {what} | {number} | {unit} |")
            print(lines[-1], flush=True)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(ARGS)
