"""runs/*.sh: a run is finished only with its evaluation, and what they pass to train.py is what train.py takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import configure
from train import Config

SLOW = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PYTHON = """#!/usr/bin/env bash
[ "$1" = - ] && exec {python} "$@"
echo "$*" >> calls
for word in "$@"; do case $word in --out_dir=*) dir=${{word#--out_dir=}} ;; esac; done
if [ -n "$dir" ]; then mkdir -p "$dir"; fi
case "$*" in "evaluate.py --ckpt"*) {evaluates} ;; esac
"""


def play(script: str, folder: Path, evaluates: bool, *args: str) -> tuple[int, list[str]]:
    """Runs the script in `folder` with a python that only notes how it was called; the real one tells layers."""
    for path in (ROOT / "runs", ROOT / "config", *ROOT.glob("*.py")):
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(PYTHON.format(python=sys.executable, evaluates="true" if evaluates else "exit 1"))
    python.chmod(0o755)
    (folder / "calls").write_text("")
    env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", f"runs/{script}", *args], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    "script, args, runs, layers",  # the paper's layers of 24, scaled to 8
    [
        pytest.param("table2.sh", ("config/demo.py", "2"), 30, {(), (1,), (3,), (4,), (1, 3, 4), (7,)}, marks=SLOW),
        ("table2.sh", ("config/mini.py", "1"), 15, {(), (4,), (8,), (12,), (4, 8, 12), (20, 21, 22), (1, 2, 3)}),
        ("ablations.sh", ("config/mini.py", "1"), 28, {(), (4, 8, 12), (16,)}),
        ("table5.sh", ("config/f5tts_demo.py", "f5tts matcha", "1"), 10, {(), (1, 2, 3)}),
        ("cost.sh", ("config/demo.py",), 3, {()}),
        ("stability.sh", ("config/demo.py",), 1, {()}),
    ],
)
def test_every_run_once_from_the_phase_one_of_its_seed(tmp_path, script, args, runs, layers):
    code, calls = play(script, tmp_path, True, *args, "--max_steps=400")
    trained = [c.split() for c in calls if c.startswith("train.py")]
    assert code == 0 and len(trained) == runs
    assert calls[-1].startswith("probe.py --ckpt" if script == "stability.sh" else "evaluate.py --compare")
    configs = [configure(Config, "", words[1:]) for words in trained]
    assert len({c.out_dir for c in configs}) == runs and all(c.max_steps == 400 for c in configs)
    assert {c.align_layers for c in configs} == layers
    for c in configs:  # every rule at one sum of lambda, but for the one row of the paper's own
        paper = "/paper_s" in c.out_dir
        assert c.weighting == ("paper" if paper else "equal" if "/equal_s" in c.out_dir else "normalized")
        swept = re.search(r"/(?:budget|shuffled)([\d.]+)_s", c.out_dir)
        assert c.align_weight == (float(swept[1]) if swept else 2.0 if paper else 0.0 if c.dispersive else 0.5)
    if script.startswith("table"):
        assert sum(c.weighting == "paper" for c in configs) == sum(c.align == "none" for c in configs)
    for c in (c for c in configs if c.branch_from):
        assert f"none_s{c.seed}/phase1.pt" in c.branch_from and c.backbone in c.branch_from
    code, calls = play(script, tmp_path, True, *args, "--max_steps=400")
    assert code == 0 and not [c for c in calls if c.startswith("train.py")]  # all are finished


def test_a_run_without_its_evaluation_is_not_finished(tmp_path):
    code, calls = play("table5.sh", tmp_path, False, "config/f5tts_demo.py", "f5tts", "1")
    assert code and len(calls) == 2 and not list(tmp_path.glob("out/**/finished"))
    code, calls = play("table5.sh", tmp_path, True, "config/f5tts_demo.py", "f5tts", "1")
    assert code == 0 and "--align=none" in calls[0] and len(list(tmp_path.glob("out/**/finished"))) == 5


def test_two_runs_at_a_time_and_the_rows_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("JOBS", "2")
    monkeypatch.setenv("ROWS", "none agrepa shuffled")
    code, calls = play("table2.sh", tmp_path, True, "config/mini.py", "2")
    trained = [configure(Config, "", c.split()[1:]).out_dir for c in calls if c.startswith("train.py")]
    assert code == 0 and {Path(p).name[:-3] for p in trained[:2]} == {"none"}  # what the others branch from
    assert sorted(trained) == sorted(f"out/table2/{row}_s{s}" for row in ("none", "agrepa", "shuffled") for s in (0, 1))
