"""What the README promises of long runs, broken on purpose: kills, signals, dead ranks, damaged recordings."""

import io
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import audio
import common
import train
from configurator import to_words

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def command(config) -> list[str]:
    return ["train.py", *to_words(config)]


def logged(out_dir: Path) -> list[int]:
    """The steps in log.csv; a row that a kill cut off does not count."""
    return [int(r["step"]) for r in common.read_csv(out_dir / "log.csv") if r["seconds"]]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "it did not happen"
        time.sleep(0.05)


def run_training(config) -> None:
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    train.train(config, common.Machine(0, 1, "cpu", "float32"))


@pytest.mark.slow
def test_fifty_kills_lose_no_more_than_save_every(tiny_config):
    """kill -9 at any instant, often inside a save: what is there loads, nothing older than save_every steps, and no
    temporary file outlives the next start."""
    config = replace(tiny_config, max_steps=10**6, phase1_steps=10**6 - 1, probe_every=10**6, save_every=3)
    out_dir, context = Path(config.out_dir), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    rng, last, parts = random.Random(time.time_ns()), 0, 0
    for _ in range(50):
        started = out_dir.exists() and (out_dir / "log.csv").stat().st_mtime
        process = context.Process(target=run_training, args=(config,))
        process.start()
        wait_for(lambda s=started: (out_dir / "log.csv").exists() and (out_dir / "log.csv").stat().st_mtime != s)
        stray = [p for p in out_dir.glob(".*.part") if p.stat().st_mtime < (out_dir / "log.csv").stat().st_mtime - 5]
        assert not stray
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        parts += bool(list(out_dir.glob(".*.part")))
        if common.exists(out_dir / "ckpt.pt"):
            state, _ = common.load(out_dir / "ckpt.pt")
            reached = max(logged(out_dir), default=0)
            assert state["step"] >= last and reached - state["step"] <= config.save_every
            last = state["step"]
    print(f"{parts} of 50 kills fell inside a save; step {last}")
    assert last > 50
    common.remove_leftovers(out_dir)
    steps = logged(out_dir)
    assert steps == list(range(1, len(steps) + 1))  # no step twice, none missing


@pytest.mark.slow
def test_two_thousand_steps_keep_memory_and_files(tiny_config):
    config = replace(
        tiny_config, max_steps=2200, phase1_steps=2000, probe_every=400, eval_every=200, save_every=200, log_every=20
    )
    process = subprocess.Popen([sys.executable, *command(config)], cwd=ROOT, stdout=subprocess.DEVNULL)
    seen: dict[int, tuple[int, int]] = {}
    while process.poll() is None:
        steps = logged(Path(config.out_dir))
        if steps:
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                seen[steps[-1]] = (pages, len(os.listdir(f"/proc/{process.pid}/fd")))
            except OSError:
                break
        time.sleep(0.02)
    assert process.wait() == 0
    early, late = ([v for s, v in seen.items() if a <= s < b] for a, b in ((900, 1100), (1800, 2000)))
    memory = [np.median([pages for pages, _ in part]) for part in (early, late)]
    files = [np.median([count for _, count in part]) for part in (early, late)]
    print(f"resident pages {memory}, open files {files}")
    assert memory[1] < 1.01 * memory[0] and files[0] == files[1]
    assert logged(Path(config.out_dir)) == [s for s in range(1, 2201) if s % 20 == 0]


@pytest.mark.slow
@pytest.mark.ddp
def test_sigterm_under_torchrun_saves_within_25_seconds(tiny_config):
    config = replace(tiny_config, max_steps=10**6, phase1_steps=10**6 - 1, probe_every=10**6, save_every=10**5)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*TORCHRUN, *command(config)], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(logged(Path(config.out_dir))) > 5, 90)
    start = time.time()
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=25)
    state, _ = common.load(Path(config.out_dir) / "ckpt.pt")
    assert time.time() - start < 25 and state["step"] >= 5


@pytest.mark.slow
@pytest.mark.ddp
def test_one_dead_rank_ends_the_job_with_a_message(tiny_config):
    config = replace(tiny_config, max_steps=10**6, phase1_steps=10**6 - 1, probe_every=10**6)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*TORCHRUN, *command(config)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(logged(Path(config.out_dir))) > 5, 90)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode and re.search(r"exitcode\s*:\s*-9|SIGKILL", err)


@pytest.mark.slow
@pytest.mark.ddp
def test_one_rank_and_two_agree_over_fifty_steps(tiny_config, tmp_path):
    """The same global batch: two batches in turn on one rank, or one on each of two."""
    config = replace(tiny_config, max_steps=50, phase1_steps=25, probe_every=10, eval_every=100, save_every=50)
    one = train.train(
        replace(config, accumulate=2, out_dir=str(tmp_path / "one")), common.Machine(0, 1, "cpu", "float32")
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    two = replace(config, out_dir=str(tmp_path / "two"))
    subprocess.run([*TORCHRUN, *command(two)], cwd=ROOT, env=env, check=True, capture_output=True, timeout=200)
    state, _ = common.load(tmp_path / "two" / "ckpt.pt")
    assert [list(s) for s in state["selection"]] == [list(s) for s in one.objective.selection]
    worst = max(
        float((a - state["model"][k]).abs().max() / a.abs().max().clamp_min(1e-3))
        for k, a in one.state()["model"].items()
    )
    print(f"largest relative difference of a weight {worst:.1e}")
    assert worst < 2e-3


def test_second_interrupt_stops_at_once():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = common.StopRequest()
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_failing_optional_work_is_reported_and_changes_nothing(tiny_config, monkeypatch, capsys, tmp_path):
    whole = train.train(replace(tiny_config, out_dir=str(tmp_path / "whole")), common.Machine(0, 1, "cpu", "float32"))

    def broken(*args):
        raise OSError("no space left for a figure")

    monkeypatch.setattr(train.probe, "report", broken)
    run = train.train(tiny_config, common.Machine(0, 1, "cpu", "float32"))
    assert "warning: OSError: no space left for a figure" in capsys.readouterr().err
    for a, b in zip(whole.objective.parameters(), run.objective.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- recordings from strangers


def wav_bytes(kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(4000) / 20), 16000, format=kind, subtype=subtype)
    return out.getvalue()


WHOLE = {
    "a.wav": wav_bytes(),
    "b.flac": wav_bytes("FLAC"),
    "c.ogg": wav_bytes("OGG", "VORBIS"),
    "d.m4a": b"\0\0\0\x20ftypM4A ",
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_recordings_are_sound_or_refused(data):
    """Bytes flipped, cut, or doubled anywhere, the header above all: a finite waveform or AudioError, nothing else."""
    name = data.draw(st.sampled_from(sorted(WHOLE)))
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, min(len(content), 80) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    content = bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        wav, rate = audio.decode(content, name)
    except audio.AudioError as error:
        assert error.reason
    else:
        assert wav.ndim == 1 and np.isfinite(wav).all() and len(wav) and 1000 <= rate <= 768_000


@pytest.mark.parametrize(
    "content",
    [b"", b"RIFF", b"not audio at all" * 50, b"\x80\x04\x95 pickled", np.zeros(64).tobytes()],
    ids=["empty", "cut", "text", "pickle", "zeros"],
)
def test_what_is_no_recording_is_refused(content):
    for name in ("a.wav", "a.m4a"):
        with pytest.raises(audio.AudioError, match=r"cannot be decoded|empty"):
            audio.decode(content, name)
    try:  # G.722 has no header: any bytes are sound
        assert np.isfinite(audio.decode(content, "a.g722")[0]).all()
    except audio.AudioError as error:
        assert error.reason
