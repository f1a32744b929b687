"""train.py: exact resume and branching, the switch of phases, two ranks, stopping, and a step against plain PyTorch."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import same
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel

import backbones
import common
import data
import report
import train
from common import Machine
from configurator import to_words

MACHINE, MUON = Machine(0, 1, "cpu", "float32"), {"optimizer": "muon"}
ROOT = Path(__file__).parent.parent


def stopped(monkeypatch, steps: int, config, loop=train.train):
    """A run that was asked to stop, as by a signal, once `steps` steps are done."""
    calls = itertools.count()
    with monkeypatch.context() as m:
        m.setattr(common.StopRequest, "agreed", lambda self: next(calls) >= steps)
        return loop(config, MACHINE)


@pytest.mark.parametrize(
    "stop, threads, changes",
    [(2, 0, {}), (6, 1, {}), (11, 0, {}), (5, 2, MUON), (7, 2, MUON), (7, 0, {"accumulate": 2})],
)
def test_stopped_and_continued_equals_one_go(tiny_config, monkeypatch, tmp_path, stop, threads, changes):
    config = replace(tiny_config, **changes)
    whole = train.train(replace(config, out_dir=str(tmp_path / "whole")), MACHINE).state()
    config = replace(config, loader_threads=threads)
    assert stopped(monkeypatch, stop, config).step == stop
    resumed = train.train(config, MACHINE).state()
    for key in ("model", "ema", "heads", "optimizer", "selection", "step"):
        assert same(whole[key], resumed[key]), key
    rows = {}
    for name in ("whole", "run"):
        logged = common.read_csv(tmp_path / name / "log.csv")
        rows[name] = [{k: r[k] for k in ("step", "loss", "fm", "align", "grad_norm")} for r in logged]
    assert [int(r["step"]) for r in rows["run"]] == list(range(1, 13))
    assert rows["whole"] == rows["run"]


def first_gradients(run: train.Run, batches: list) -> dict[str, torch.Tensor]:
    """Each parameter's gradient at step 0, the mean over batches at consecutive places."""
    total = {k: torch.zeros_like(p) for k, p in run.objective.named_parameters()}
    for k, batch in enumerate(batches):
        torch.manual_seed(hash((run.config.seed, 0, k)) % 2**63)
        run.objective(batch)["loss"].backward()
        for name, p in run.objective.named_parameters():
            total[name] += p.grad / len(batches)
            p.grad = None
    return total


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients.values()]).norm())


def started(config, **changes) -> tuple[train.Run, data.TrainingBatches]:
    """A run at step 0 and its batches."""
    run = train.new_run(config, data.read_meta(config.data_dir), MACHINE)
    batches = data.TrainingBatches(data.Dataset(config.data_dir, "train"), config, **changes)
    run.objective.expected = batches.expected_clips(batches.dataset.index["domain"])
    return run, batches


def test_branches_of_one_phase1(tiny_config, tmp_path):
    whole = train.train(tiny_config, MACHINE).state()
    phase1 = str(Path(tiny_config.out_dir) / "phase1.pt")
    for name in ("a", "b"):
        branch = replace(tiny_config, branch_from=phase1, out_dir=str(tmp_path / name))
        other = train.train(branch, MACHINE).state()
        assert same(whole["model"], other["model"]) and same(whole["optimizer"], other["optimizer"])
    none = train.train(replace(tiny_config, align="none", branch_from=phase1, out_dir=str(tmp_path / "n")), MACHINE)
    assert none.step == 12 and none.objective.heads is None
    assert not same(whole["model"], none.state()["model"])


def test_phases(tiny_config):
    out = Path(tiny_config.out_dir)
    out.mkdir()
    (out / f".ckpt.pt.{common.PART}").write_bytes(b"half")  # of a killed save
    run = train.train(tiny_config, MACHINE)
    assert not list(out.glob(".*"))
    assert [p["step"] for p in run.probes] == [3, 6]  # none in phase II
    assert all(len(p["result"][d]["foga"]) == tiny_config.n_layer for p in run.probes for d in ("speech", "audio"))
    assert all(len(s) == tiny_config.top_k for s in run.objective.selection)
    written = {f.name for f in out.iterdir()}
    assert {"ckpt.pt", "phase1.pt", "config.json", "log.csv", "probe.json", "probe.png"} <= written
    assert json.loads((out / "config.json").read_text())["n_layer"] == 4
    rows = common.read_csv(out / "log.csv")
    assert [r["phase"] for r in rows] == ["1"] * 5 + ["2"] * 7
    assert all(bool(r["align"]) == (int(r["step"]) > 6) for r in rows)


def test_phase_one_probes_fresh_clips_and_selects_by_the_mean_of_its_last_probes(tiny_config, monkeypatch):
    drawn, weights, honest = [], {}, train.probe.probe

    def noted(model, batch, *how):
        drawn.append(batch.ids)
        return honest(model, batch, *how)

    monkeypatch.setattr(train.probe, "probe", noted)
    config = replace(tiny_config, probe_every=2, select_from=2, top_k=2)
    run = train.train(config, MACHINE)
    assert [p["step"] for p in run.probes] == [2, 4, 6] and not torch.equal(drawn[0], drawn[1])
    again = train.train(replace(config, out_dir=config.out_dir + "2"), MACHINE)
    assert [p["result"]["audio"]["foga"] for p in run.probes] == [p["result"]["audio"]["foga"] for p in again.probes]
    for name, selected in zip(("speech", "audio"), run.objective.selection, strict=True):
        scores = torch.tensor([p["result"][name]["foga"] for p in run.probes[-2:]]).mean(0)
        assert list(selected) == (scores.argsort(descending=True)[:2] + 1).tolist()
        weights[name] = {str(l): pytest.approx(float(2 * scores[l - 1]), rel=1e-5) for l in selected}
    assert json.loads((Path(config.out_dir) / "selection.json").read_text()) == weights


VARIANTS = {
    "conv1d": {"align_head": "conv1d"},
    "conv2d": {"align_head": "conv2d"},
    "self": {"align_teacher": "self"},
    "adaptive": {"timestep_adaptive": True},
    "refresh": {"refresh_epochs": 1 / 3, "top_k": 1},
    "stop": {"align_stop": 9},
    "lasp": {"align": "lasp", "weighting": "equal"},
    "targets": {"align_target": "shuffled", "align_norm": "zscore"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_branch_and_continue(tiny_config, tmp_path, monkeypatch, name):
    train.train(replace(tiny_config, align="none", max_steps=12), MACHINE)
    config = replace(tiny_config, branch_from=f"{tiny_config.out_dir}/phase1.pt", **VARIANTS[name])
    whole = train.train(replace(config, out_dir=str(tmp_path / "whole")), MACHINE)
    config = replace(config, out_dir=str(tmp_path / "v"))
    assert stopped(monkeypatch, 3, config).step == 9
    continued = train.train(config, MACHINE)
    for key in ("model", "heads", "optimizer", "selection"):
        assert same(whole.state()[key], continued.state()[key]), key
    if name == "refresh":
        assert [p["step"] for p in whole.probes] == [3, 6, 8, 10, 12] and len(whole.objective.heads.heads) == 8
        assert all(sum(any(w) for w in s.values()) == 1 for s in whole.objective.selection)
    if name == "adaptive":
        assert all(len(w) == 2 for s in whole.objective.selection for w in s.values())


def test_alignment_stops(tiny_config, tmp_path):
    """From align_stop on, the model moves as if nothing were aligned."""
    stopped = train.train(replace(tiny_config, align_stop=6), MACHINE)  # off from the first step of phase II
    none = train.train(replace(tiny_config, align="none", out_dir=str(tmp_path / "none")), MACHINE)
    for a, b in zip(stopped.objective.model.parameters(), none.objective.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_probes_and_held_out_losses_change_nothing(tiny_config, tmp_path):
    tiny_config = replace(tiny_config, select_from=1)
    quiet = replace(tiny_config, probe_every=1000, eval_every=1000, log_every=1000, out_dir=str(tmp_path / "quiet"))
    a, b = train.train(tiny_config, MACHINE).state(), train.train(quiet, MACHINE).state()
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"])


def test_resume_with_other_settings_or_data_is_refused(tiny_config):
    config = replace(tiny_config, max_steps=2, phase1_steps=1)
    train.train(config, MACHINE)
    with pytest.raises(common.CheckpointError, match=r"learning_rate: 0\.003 -> 0\.1"):
        train.train(replace(config, learning_rate=0.1), MACHINE)
    path = Path(config.data_dir) / "meta.json"
    meta = json.loads(path.read_text())
    meta["sha256"]["train.npy"] = "0" * 64
    path.write_text(json.dumps(meta))
    with pytest.raises(common.CheckpointError, match="trained on another preparation than"):
        train.train(config, MACHINE)


def test_step_equals_plain_pytorch(tiny_config):
    """One step of the loop against the same gradients, AdamW and EMA written out in float64 arithmetic of our own."""
    config = replace(tiny_config, dropout=0.0, grad_clip=1e9, max_steps=1, align="none")
    before, batches = started(config)
    gradients = first_gradients(before, [batches(0)])
    run, rate = train.train(config, MACHINE), common.learning_rate(0, config)
    for name, p in run.objective.named_parameters():
        g, old = gradients[name].double(), before.objective.get_parameter(name).double()
        decay = config.weight_decay if p.dim() > 1 else 0.0
        expected = old * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)  # AdamW's first step
        torch.testing.assert_close(p.double(), expected, atol=2e-6, rtol=1e-4)
        ema = run.ema.get_parameter(name.removeprefix("model.")).double()
        torch.testing.assert_close(ema, old + 0.9 * (p.double() - old), atol=1e-6, rtol=1e-5)  # decay 1/10 at step 0


def test_a_muon_step_is_orthogonal(tiny_config):
    """The first step of a block's matrix against the polar factor of its gradient by SVD, at AdamW's size of update;
    everything else, heads included, is AdamW's."""
    config = replace(tiny_config, optimizer="muon", dropout=0.0, grad_clip=1e9)
    run, batches = started(config)
    train.intervene(run, [{1: [0.5]}, {2: [0.5]}])
    for p in run.objective.model.blocks.parameters():  # the zero layers would leave others without a gradient
        torch.nn.init.normal_(p, std=0.1)
    before = {k: v.detach().clone() for k, v in run.objective.named_parameters()}
    gradients = first_gradients(run, [batches(0)])
    for name, p in run.objective.named_parameters():
        p.grad = gradients[name].clone()
    common.clip_and_step(run.objective, run.optimizer, 0, config)
    rate = common.learning_rate(0, config)
    for name, p in run.objective.named_parameters():
        g, old = gradients[name].double(), before[name].double()
        moved = old * (1 - rate * (config.weight_decay if p.dim() > 1 else 0.0)) - p.detach().double()
        if ".blocks." in name and p.dim() == 2:
            u, s, v = torch.linalg.svd(g, full_matrices=False)
            strong = s > 0.1 * s[0]  # five Newton-Schulz iterations bring these close to 1
            values = (u.T @ moved @ v.T).diagonal() / (rate * 0.2 * max(p.shape) ** 0.5)
            assert (values[strong] > 0.5).all() and (values[strong] < 1.4).all(), (name, values)
        else:
            torch.testing.assert_close(moved, rate * g / (g.abs() + 1e-8), atol=2e-6, rtol=1e-3)


def test_learning_rate_is_one_cycle(tiny_config):
    config = replace(tiny_config, max_steps=100, lr_warmup=0.1, learning_rate=1.0)
    rates = [common.learning_rate(s, config) for s in range(100)]
    assert rates.index(max(rates)) in (9, 10) and max(rates) == pytest.approx(1.0) and rates[-1] < 0.02
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_max_steps_may_change_on_the_plateau_alone(tiny_config):
    def of(steps: int, name: str, decay: float = 0.5):
        how = {"align": "none", "lr_warmup": 0.05, "lr_decay": decay, "keep_every": 5}
        return replace(tiny_config, max_steps=steps, out_dir=str(Path(tiny_config.out_dir) / name), **how)

    rates = [common.learning_rate(s, of(20, "")) for s in range(20)]
    assert rates[1:11] == pytest.approx([0.003] * 10) and rates[19] < 0.003 / 20
    assert rates[11:] == sorted(rates[11:], reverse=True)
    once = train.train(of(16, "once"), MACHINE)
    train.train(of(12, "more"), MACHINE)
    folder = Path(of(16, "more").out_dir)
    with pytest.raises(common.CheckpointError, match="max_steps: 12 -> 16"):
        train.train(of(16, "more"), MACHINE)  # it has come to its end
    (folder / "ckpt_000005.pt").replace(folder / "ckpt.pt")
    assert same(train.train(of(16, "more"), MACHINE).objective.model.state_dict(), once.objective.model.state_dict())


def test_non_finite_step_updates_nothing(tiny_config, monkeypatch):
    config = replace(tiny_config, max_steps=1, align="none")
    before, honest = started(config)[0], data.TrainingBatches.__call__

    def damaged(self, k):
        batch = honest(self, k)
        batch.mel[0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(data.TrainingBatches, "__call__", damaged)
    run = train.train(config, MACHINE)
    assert run.step == 1
    assert same(before.objective.model.state_dict(), run.objective.model.state_dict())
    assert same(before.ema.state_dict(), run.ema.state_dict())


def test_sigterm_saves_and_the_same_command_continues(tiny_config):
    config = replace(tiny_config, max_steps=100_000, phase1_steps=50_000, probe_every=50_000, eval_every=50_000)
    command, log = [sys.executable, "train.py", *to_words(config)], Path(config.out_dir) / "log.csv"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=25)
    assert process.returncode == common.INTERRUPTED, out
    state, _ = common.load(Path(config.out_dir) / "ckpt.pt")
    assert state["step"] >= 3 and "the same command continues" in out


@pytest.mark.ddp
def test_two_ranks_train_as_one(tiny_config, tmp_path):
    config, how = replace(tiny_config, out_dir=str(tmp_path / "two")), {"capture_output": True, "text": True}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *to_words(config)], cwd=ROOT, env=env, timeout=300, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    state, _ = common.load(tmp_path / "two" / "ckpt.pt")
    assert state["step"] == 12 and state["heads"]
    # the first step's gradient on two ranks is what one process gets by averaging the two ranks' gradients
    run, _ = started(config)
    expected = norm(first_gradients(run, [started(config, rank=rank, world=2)[1](0) for rank in range(2)]))
    norm_two = float(common.read_csv(tmp_path / "two" / "log.csv")[0]["grad_norm"])
    assert norm_two == pytest.approx(expected, rel=1e-4)


@pytest.mark.ddp
@pytest.mark.slow
def test_wide_compiled_blocks_train_under_ddp(tiny_config, tmp_path, monkeypatch):
    """dynamo would split a block that is larger than one of DDP's buckets, and fail at it with dynamic shapes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    config = replace(tiny_config, n_embd=1024, n_head=16, n_layer=1, ff_mult=4, dropout=0.1, compile=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run, batches = started(config)
        train.trade(run.objective.model, config)
        objective = DistributedDataParallel(run.objective)
        for step, (clips, frames) in enumerate(((1, 60), (2, 70))):
            objective(data.fixed_batch(batches.dataset, clips, 0, frames))["loss"].backward()
            assert math.isfinite(common.clip_and_step(run.objective, run.optimizer, step, config)["grad_norm"])
        assert run.objective.model.blocks[0]._compiled_call_impl
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": "fixed"}, "align_layers=\\(\\): name layers from 1 to 4"),
        ({"align": "fixed", "align_layers": (5,)}, "name layers from 1 to 4"),
        ({"align": "lasp", "timestep_adaptive": True}, "timestep_adaptive needs align=foga"),
        ({"align": "fixed", "align_layers": (4,), "align_teacher": "self"}, "name layers from 1 to 3"),
        ({"align": "deepst"}, "align='deepst' is no rule"),
        ({"align_head": "none"}, "align_head=none needs"),
        ({"align_head": "conv2d", "align_target": "frames"}, "align_head=conv2d pools"),
        ({"align_teacher": "self", "align_norm": "zscore"}, "not align_teacher=self"),
        ({"align_teacher": "self", "align_target": "crop"}, "not align_teacher=self"),
        ({"align_teacher": "ema", "align_target": "shuffled"}, "not align_teacher=self or ema"),
        ({"dispersive": 1.0, "refresh_epochs": 10.0}, "refresh_epochs=0"),
        ({"n_head": 3}, "n_head=3: a head needs a whole, even width"),
        ({"phase1_steps": 12}, "max_steps=12 ends within phase I"),
        ({"vocoder": "out/my/vocos", "evaluate": True}, "vocoder=out/my/vocos: no such folder"),
        ({"backbone": "f5tts", "checkpoint_activations": True}, "not backbone=f5tts"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        train.main(replace(tiny_config, **changes))
    assert "\n" not in str(error.value) and not Path(tiny_config.out_dir).exists()
    train.check(train.Config(align_head="none", align_teacher="ema", align_target="frames", dispersive=0.1))


def test_evaluating_and_saving_are_not_training_time(tiny_config, monkeypatch):
    """They count neither in frames/s nor in the run's seconds: those are the steps' own time, with the probes."""
    spent = {"all": time.time(), "other": 0.0}

    def slow(work):
        def wrapped(*args):
            start = time.time()
            time.sleep(0.3)
            out = work(*args)
            spent["other"] += time.time() - start
            return out

        return wrapped

    for module, name in ((report, "held_out_loss"), (train, "save")):
        monkeypatch.setattr(module, name, slow(getattr(module, name)))
    run = train.train(replace(tiny_config, eval_every=3), MACHINE)
    rows = common.read_csv(Path(run.config.out_dir) / "log.csv")
    assert spent["other"] > 2 and run.seconds < time.time() - spent["all"] - spent["other"] + 0.05
    assert all(float(r["frames_per_s"]) > 300 / 0.3 for r in rows[6:])  # no step of phase II has waited for a save


def test_a_branchs_clock_starts_with_the_whole_of_phase_one(tiny_config, monkeypatch, tmp_path):
    """Every step takes 0.1 s more and no row is written before phase1.pt; what is done after it is no step's time."""
    honest = train.clip_and_step
    monkeypatch.setattr(train, "clip_and_step", lambda *args: (time.sleep(0.1), honest(*args))[1])
    monkeypatch.setattr(train.probe, "report", lambda *args: time.sleep(3))
    start = time.time()
    run = train.train(replace(tiny_config, log_every=100, eval_every=100, save_every=100), MACHINE)
    phase1, _ = common.load(Path(tiny_config.out_dir) / "phase1.pt")
    assert 0.6 < phase1["seconds"] < run.seconds - 0.6 and run.seconds < time.time() - start - 3
    (row,) = common.read_csv(Path(tiny_config.out_dir) / "log.csv")  # of all 12 steps
    frames = float(row["frames_per_s"]) * run.seconds
    batches = started(tiny_config)[1]
    assert frames == pytest.approx(sum(int(batches(k).frames.sum()) for k in range(12)), rel=0.01)


def test_a_branch_begins_with_the_curve_of_phase_one_and_keeps_numbered_checkpoints(tiny_config, tmp_path):
    train.train(replace(tiny_config, max_steps=12), MACHINE)
    source = Path(tiny_config.out_dir)
    (source / "evals.csv").write_text("step,seconds,speech_fad\n3,1.0,9.5\n6,2.0,9.25\n9,3.0,7.0\n")
    branch = replace(tiny_config, branch_from=str(source / "phase1.pt"), out_dir=str(tmp_path / "b"), keep_every=4)
    train.train(branch, MACHINE)
    assert (tmp_path / "b" / "evals.csv").read_text().split() == ["step,seconds,speech_fad", "3,1.0,9.5", "6,2.0,9.25"]
    (tmp_path / "b" / "evals.csv").write_text("step\n12\n")
    train.train(branch, MACHINE)  # finished: its own curve stays
    assert (tmp_path / "b" / "evals.csv").read_text() == "step\n12\n"
    kept = {p.name: common.load(p)[0] for p in (tmp_path / "b").glob("ckpt_*.pt")}
    assert {name: state["step"] for name, state in kept.items()} == {"ckpt_000008.pt": 8, "ckpt_000012.pt": 12}
    last, _ = common.load(tmp_path / "b" / "ckpt.pt")
    assert same(kept["ckpt_000012.pt"]["model"], last["model"]) and not list(source.glob("ckpt_*.pt"))


def test_a_stopped_run_logs_its_last_step(tiny_config, monkeypatch):
    """evaluate.py tells by the log which evaluations a run is past."""
    stopped(monkeypatch, 5, replace(tiny_config, log_every=4))
    rows = common.read_csv(Path(tiny_config.out_dir) / "log.csv")
    assert [int(r["step"]) for r in rows] == [4, 5]


def test_two_accumulated_batches_are_two_ranks(tiny_config, tmp_path):
    """The same global batch, on one process in turn or on two at once (here: both by hand), is the same step."""
    config = replace(tiny_config, accumulate=2, dropout=0.1, max_steps=1, align="none")
    run, one = started(config)
    two = [started(replace(config, accumulate=1), rank=rank, world=2)[1] for rank in range(2)]
    assert one.steps_per_epoch == two[0].steps_per_epoch
    for step in range(5):
        for micro in range(2):
            a, b = one(2 * step + micro), two[micro](step)
            assert torch.equal(a.ids, b.ids) and torch.equal(a.mel, b.mel) and torch.equal(a.prompt, b.prompt)
    expected = norm(first_gradients(run, [batches(0) for batches in two]))
    train.train(config, MACHINE)
    logged = common.read_csv(Path(config.out_dir) / "log.csv")
    assert float(logged[0]["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_non_finite_steps_in_a_row_save_and_stop(tiny_config, monkeypatch, capsys):
    config = replace(tiny_config, max_steps=40, phase1_steps=39, save_every=100, learning_rate=0.003)
    honest, calls = common.clip_and_step, []

    def broken(module, optimizer, step, config):
        calls.append(step)
        if step >= 5:
            next(iter(module.parameters())).grad[0] = float("nan")
        return honest(module, optimizer, step, config)

    monkeypatch.setattr(train, "clip_and_step", broken)
    with pytest.raises(FloatingPointError, match="10 non-finite steps in a row; the last good state is saved"):
        train.train(config, MACHINE)
    assert calls == list(range(16))  # a norm is read one step late
    assert "step 6: non-finite gradient, nothing updated; clips [" in capsys.readouterr().err
    state, _ = common.load(Path(config.out_dir) / "ckpt.pt")
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_an_evaluated_run_returns_at_once(tiny_config, monkeypatch, capsys):
    config, calls = replace(tiny_config, max_steps=4, align="none", evaluate=True), []
    monkeypatch.setattr(common, "run_script", lambda name, *words: calls.append(name) or 0)
    assert train.main(config) == 0 and calls == ["probe.py", "evaluate.py"]
    evaluation = {"wer": {}, "clips": {}, "seeds": 1, "language": "en", "step": 4}
    (Path(config.out_dir) / "eval.json").write_text(json.dumps(evaluation))
    assert train.main(config) == 0 and len(calls) == 2
    assert "eval.json is of this step: nothing is left to do" in capsys.readouterr().out


def test_tensorboard_has_the_rows_the_figure_and_clips(tiny_config):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(tiny_config, max_steps=3, align="none", tensorboard=True)
    train.train(config, MACHINE)
    folder, wav = Path(config.out_dir), np.sin(np.arange(2400) / 9).astype(np.float32)
    Figure().savefig(folder / "probe.png")
    report.show_on_board(folder, 3, {"generated": {k: [SimpleNamespace(domain=k % 2, wav=wav)] for k in range(6)}})
    found = events.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "audio": 0, "images": 0}).Reload()
    rows = common.read_csv(folder / "log.csv")
    assert [e.step for e in found.Scalars("fm")] == [int(row["step"]) for row in rows]
    assert [e.value for e in found.Scalars("fm")] == pytest.approx([float(row["fm"]) for row in rows], rel=1e-4)
    assert found.Tags()["audio"] == ["speech_0000", "speech_0002", "audio_0001", "audio_0003"]
    assert found.Tags()["images"] == ["probe"] and found.Audio("audio_0001")[0].sample_rate == 24000


@pytest.mark.mps
@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")
def test_apple_gpus_train_and_probe(tiny_config):
    run = train.train(replace(tiny_config, device="mps"), Machine(0, 1, "mps", "auto"))
    assert run.selected and all(p.isfinite().all() for p in run.objective.parameters())


def test_export_holds_what_others_need(tiny_config):
    run = train.train(replace(tiny_config, max_steps=8), MACHINE)
    train.export(run)
    path = Path(tiny_config.out_dir) / "model.safetensors"
    state, used = common.load(path)
    full, _ = common.load(path.with_name("ckpt.pt"))
    assert used == path and same(state["ema"], full["ema"]) and state["selection"] == full["selection"]
    assert all(state[k] == full[k] for k in ("step", "seconds"))
    a, b = backbones.load_model(state), backbones.load_model(full)
    assert same(a.state_dict(), b.state_dict()) and a.config == b.config == run.objective.model.config
    assert same(backbones.load_model(full, ema=False).state_dict(), run.objective.model.state_dict())
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(common.CheckpointError, match="checksum does not match"):
        common.load(path)
