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


@pytest.mark.parametrize(
    "name", ["step", "optimizer", "attention", "align", "memory", "fit", "foga", "growth", "loader", "padding"]
)
def test_rows_run(tmp_path, name):
    row = getattr(bench, f"{name}_row")
    numbers = {what: measure() for what, measure, _ in row(bench.Bench(SMALL, tmp_path))}
    assert numbers and all(value == value for value in numbers.values())
    if name == "memory":
        kept, _, again = list(numbers.values())[:3]
        assert again < kept / 2


def test_scaling_on_paper(tmp_path):
    """The table of the README by hand: rings of 8 GPUs, then nodes, behind two thirds of a step's compute."""
    args = bench.replace(SMALL, n_layer=24, n_head=16, n_embd=1024, ff_mult=4, batch_frames=38400)
    numbers = {what: measure() for what, measure, _ in bench.scaling_row(bench.Bench(args, tmp_path))}
    weights = bench.count_parameters(bench.train.build_model(args, [["whisper", 384], ["aisfx", 512]], "meta"))
    compute = next(v for k, v in numbers.items() if k.endswith("compute of a step"))
    ring = 1.75 * 4 * weights / 450e9
    assert numbers["8 GPUs: all-reduce"] == pytest.approx(ring)
    slow = ring + 1.75 * 4 * weights / 12.5e9  # 8 nodes: 2 * 7 / 8 of the gradients over each node's network
    assert numbers["64 GPUs, 100 Gb/s per node: all-reduce"] == pytest.approx(slow)
    left = 100 * compute / (compute + slow - 2 / 3 * compute)
    assert numbers["64 GPUs, 100 Gb/s per node: share of the compute rate that is left"] == pytest.approx(left)


def test_what_cannot_be_measured_is_said(tmp_path, capsys, monkeypatch):
    """One row's failure leaves the others' numbers, on the screen and in the file."""

    def short(b):
        yield "first", lambda: 1.0, "s"
        raise bench.torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def last(b):
        yield "last", lambda: 2.0, "s"

    monkeypatch.setattr(bench, "ROWS", (short, last))
    bench.main(bench.replace(SMALL, out=str(tmp_path / "bench.md")))
    text = (tmp_path / "bench.md").read_text()
    assert text == capsys.readouterr().out
    assert "| first | 1 [1, 1] | s |\n| short | not measured: CUDA out of memory. | |\n| last | 2 [2, 2] | s |" in text


def test_the_table_is_written(tmp_path, capsys):
    bench.main(bench.replace(SMALL, only="help_row", out=str(tmp_path / "deep" / "bench.md")))
    text = Path(tmp_path / "deep" / "bench.md").read_text()
    assert "| python train.py --help | 0." in text and "median of 2 runs" in text
    assert text.strip() == capsys.readouterr().out.strip()
