"""bench.py: its rows run, its ratios have the right way up, and its table is written."""

import math
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import bench


@pytest.fixture
def small(tiny_config, tmp_path) -> bench.BenchArgs:
    sizes = {"frames": 256, "clip_frames": 64, "runs": 2, "out": str(tmp_path / "deep" / "bench.md")}
    return bench.BenchArgs(**asdict(tiny_config), **sizes)


def test_a_ratio_above_one_means_that_ours_is_faster(small):
    assert 2 < bench.Bench(small).ratio(lambda: time.sleep(0.01), lambda: time.sleep(0.05)) < 6


@pytest.mark.parametrize("name", [name for name in bench.ROWS if name not in ("peer_row", "compile")])
def test_rows_run(small, name, monkeypatch):
    monkeypatch.setattr(bench, "TEN_SECONDS", 40)
    numbers = [measure() for _, measure, _ in bench.ROWS[name](bench.Bench(small))]
    assert numbers and all(math.isfinite(value) and value > 0 for value in numbers)
    if name == "memory_row":
        assert numbers[1] < numbers[0] / 2


def test_the_table_is_written_and_says_what_cannot_be_measured(small, capsys, monkeypatch):
    """One measurement's or row's failure leaves the others' numbers, on the screen and in the file."""

    def none() -> float:
        raise RuntimeError("No viable backend")

    def short(b):
        yield "none", none, "s"
        yield "first", lambda: 1.0, "s"
        raise bench.torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(bench, "ROWS", {"short": short, "last": lambda b: [("last", lambda: 2.0, "s")], "other": None})
    bench.main(replace(small, only="s"))
    screen, (head, _, *table) = capsys.readouterr().out, Path(small.out).read_text().splitlines()
    assert "median of 2 runs" in head and head in screen
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["what", "number", "unit"] and cells[2:] == [
        ["none", "not measured: No viable backend", ""],
        ["first", "1 [1, 1]", "s"],
        ["short", "not measured: CUDA out of memory.", ""],
        ["last", "2 [2, 2]", "s"],
    ]
    shown = "none: not measured: No viable backend\nfirst: 1 [1, 1] s\n"
    shown += "short: not measured: CUDA out of memory.\nlast: 2 [2, 2] s\n"
    assert screen.partition("\n")[2] == shown


@pytest.mark.slow
def test_the_parts_for_a_gpu_start_on_any_machine_and_say_what_is_missing():
    """bash runs/gpu.sh --dry: those that need no data; one table with the device's name."""
    root, names = Path(bench.__file__).parent, ("machine", "attention", "step", "memory", "shapes")
    command = ["bash", "runs/gpu.sh", "--dry", *names]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    head, *rows = (root / "out/gpu_dry.md").read_text().splitlines()
    parts = {part: [r for r in rows if r.startswith(f"| {part} ")] for part in names}
    assert "torch" in head and [len(parts[p]) for p in ("machine", "step", "memory", "shapes")] == [5, 3, 2, 1]
    assert "not measured: No viable backend" in str(parts["attention"]) and "TFLOP/s" in str(parts["attention"])
