"""bench.py: its rows run, its ratios have the right way up, and its table is written."""

import time
from pathlib import Path

import pytest

import bench

SMALL = bench.BenchArgs(
    n_layer=2, n_head=2, n_embd=32, ff_mult=2, frames=256, clip_frames=64, runs=2, device="cpu", dtype="float32",
    beats_tokens=False, speech_codes=16, audio_codes=16, audio_teacher="demo",
)  # fmt: skip


def test_a_ratio_above_one_means_that_ours_is_faster(tmp_path):
    measure = bench.Bench(SMALL, tmp_path).ratio(lambda: time.sleep(0.01), lambda: time.sleep(0.05))
    assert 2 < measure() < 6


@pytest.mark.parametrize("name", ["step", "attention", "align", "memory", "fit", "foga", "growth", "loader", "padding"])
def test_rows_run(tmp_path, name):
    row = getattr(bench, f"{name}_row")
    numbers = {what: measure() for what, measure, _ in row(bench.Bench(SMALL, tmp_path))}
    assert numbers and all(value == value for value in numbers.values())
    if name == "memory":
        kept, _, again = list(numbers.values())[:3]
        assert again < kept / 2


def test_the_table_is_written(tmp_path, capsys):
    bench.main(bench.replace(SMALL, only="help_row", out=str(tmp_path / "deep" / "bench.md")))
    text = Path(tmp_path / "deep" / "bench.md").read_text()
    assert "| python train.py --help | 0." in text and "median of 2 runs" in text
    assert text.strip() == capsys.readouterr().out.strip()
