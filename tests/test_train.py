"""train.py: exact resume and branching, the switch of phases, two ranks, stopping, and a step against plain PyTorch."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import backbones
import common
import data
import train
from common import Machine

MACHINE = Machine(0, 1, "cpu", "float32")
ROOT = Path(__file__).parent.parent


def same(a, b) -> bool:
    """Bit-equality of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def stop_after(monkeypatch, steps: int) -> None:
    """Asks the run to stop, as a signal would, once `steps` steps are done."""
    seen = {"calls": 0}

    def agreed(self) -> bool:
        seen["calls"] += 1
        return seen["calls"] > steps

    monkeypatch.setattr(common.StopRequest, "agreed", agreed)


@pytest.mark.parametrize(
    "stop, threads, optimizer", [(2, 0, "adamw"), (5, 2, "muon"), (6, 1, "adamw"), (7, 2, "muon"), (11, 0, "adamw")]
)
def test_stopped_and_continued_equals_one_go(tiny_config, monkeypatch, tmp_path, stop, threads, optimizer):
    tiny_config = replace(tiny_config, optimizer=optimizer)
    whole = train.train(replace(tiny_config, out_dir=str(tmp_path / "whole")), MACHINE).state()
    tiny_config = replace(tiny_config, loader_threads=threads)
    with monkeypatch.context() as m:
        stop_after(m, stop)
        part = train.train(tiny_config, MACHINE)
    assert part.step == stop
    resumed = train.train(tiny_config, MACHINE).state()
    for key in ("model", "ema", "heads", "optimizer", "selection", "step"):
        assert same(whole[key], resumed[key]), key
    rows = {}
    for name in ("whole", "run"):
        with open(tmp_path / name / "log.csv", newline="") as file:
            rows[name] = [{k: r[k] for k in ("step", "loss", "fm", "align", "grad_norm")} for r in csv.DictReader(file)]
    assert [int(r["step"]) for r in rows["run"]] == list(range(1, 13))
    assert rows["whole"] == rows["run"]


def test_branches_of_one_warmup(tiny_config, tmp_path):
    whole = train.train(tiny_config, MACHINE).state()
    warmup = str(Path(tiny_config.out_dir) / "phase1.pt")
    branch = [
        train.train(replace(tiny_config, branch_from=warmup, out_dir=str(tmp_path / f"b{i}")), MACHINE).state()
        for i in range(2)
    ]
    for other in branch:
        assert same(whole["model"], other["model"]) and same(whole["optimizer"], other["optimizer"])
    none = train.train(replace(tiny_config, align="none", branch_from=warmup, out_dir=str(tmp_path / "n")), MACHINE)
    assert none.step == 12 and none.objective.heads is None
    assert not same(whole["model"], none.state()["model"])


def test_phases(tiny_config):
    run = train.train(tiny_config, MACHINE)
    assert [p["step"] for p in run.probes] == [3, 6]  # none in phase II
    assert all(len(p["result"][d]["foga"]) == tiny_config.n_layer for p in run.probes for d in ("speech", "audio"))
    assert all(len(s) == tiny_config.top_k for s in run.objective.selection)
    scores = run.probes[-1]["result"]["speech"]["foga"]
    for layer, weight in run.objective.selection[0].items():
        assert weight == [pytest.approx(2 * scores[layer - 1])]  # lambda = 2 A_l
    out = Path(tiny_config.out_dir)
    written = {f.name for f in out.iterdir()}
    assert {"ckpt.pt", "phase1.pt", "config.json", "log.csv", "probe.json", "probe.png"} <= written
    assert json.loads((out / "config.json").read_text())["n_layer"] == 4
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["phase"] for r in rows] == ["1"] * 5 + ["2"] * 7
    assert all(bool(r["align"]) == (int(r["step"]) > 6) for r in rows)


VARIANTS = {
    "conv1d": {"align_head": "conv1d"},
    "conv2d": {"align_head": "conv2d"},
    "self": {"align_teacher": "self"},
    "adaptive": {"timestep_adaptive": True},
    "refresh": {"refresh_every": 2, "top_k": 1},
    "stop": {"align_stop": 9},
    "lasp": {"align": "lasp", "weighting": "equal"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_branch_and_continue(tiny_config, tmp_path, monkeypatch, name):
    train.train(replace(tiny_config, align="none", max_steps=12), MACHINE)
    config = replace(
        tiny_config, branch_from=f"{tiny_config.out_dir}/phase1.pt", out_dir=str(tmp_path / "v"), **VARIANTS[name]
    )
    whole = train.train(replace(config, out_dir=str(tmp_path / "whole")), MACHINE)
    with monkeypatch.context() as m:
        stop_after(m, 3)
        assert train.train(config, MACHINE).step == 9
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
    quiet = replace(tiny_config, probe_every=1000, eval_every=1000, log_every=1000, out_dir=str(tmp_path / "quiet"))
    a, b = train.train(tiny_config, MACHINE).state(), train.train(quiet, MACHINE).state()
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"])


def test_resume_with_another_model_is_refused(tiny_config):
    train.train(replace(tiny_config, max_steps=2, phase1_steps=1), MACHINE)
    with pytest.raises(common.CheckpointError, match=r"learning_rate: 0\.003 -> 0\.1"):
        train.train(replace(tiny_config, max_steps=2, phase1_steps=1, learning_rate=0.1), MACHINE)


def test_step_equals_plain_pytorch(tiny_config):
    """One step of train_step against the same losses, AdamW and EMA written out in float64 arithmetic of our own."""
    config = replace(tiny_config, dropout=0.0, grad_clip=1e9)
    meta = data.read_meta(config.data_dir)
    run = train.new_run(config, meta, MACHINE)
    batch = data.TrainingBatches(data.Dataset(config.data_dir, "train"), config)(0)
    before = {k: v.detach().clone() for k, v in run.objective.model.named_parameters()}
    torch.manual_seed(hash((config.seed, 0, 0)) % 2**63)
    losses = run.objective(batch)
    (losses["fm"] + losses["bitc"]).backward()
    grads = {k: p.grad.clone() for k, p in run.objective.model.named_parameters()}
    run.optimizer.zero_grad()
    train.train_step(run, run.objective, [batch], MACHINE)
    rate = common.learning_rate(0, config)
    for name, p in run.objective.model.named_parameters():
        g, old = grads[name].double(), before[name].double()
        decay = config.weight_decay if p.dim() > 1 else 0.0
        expected = old * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)  # AdamW's first step
        torch.testing.assert_close(p.double(), expected, atol=2e-6, rtol=1e-4)
        ema = dict(run.ema.named_parameters())[name].double()
        torch.testing.assert_close(ema, old + 0.9 * (p.double() - old), atol=1e-6, rtol=1e-5)  # decay 1/10 at step 0


def test_a_muon_step_is_orthogonal(tiny_config):
    """The first step of a block's matrix against the polar factor of its gradient by SVD, at AdamW's size of update;
    everything else, heads included, is AdamW's."""
    config = replace(tiny_config, optimizer="muon", dropout=0.0, grad_clip=1e9)
    run = train.new_run(config, data.read_meta(config.data_dir), MACHINE)
    train.intervene(run, [{1: [0.5]}, {2: [0.5]}])
    for p in run.objective.model.blocks.parameters():  # the zero layers would leave others without a gradient
        torch.nn.init.normal_(p, std=0.1)
    batch = data.TrainingBatches(data.Dataset(config.data_dir, "train"), config)(0)
    before = {k: v.detach().clone() for k, v in run.objective.named_parameters()}
    torch.manual_seed(hash((config.seed, 0, 0)) % 2**63)
    sum(run.objective(batch).values()).backward()
    grads = {k: p.grad.double() for k, p in run.objective.named_parameters()}
    run.optimizer.zero_grad()
    train.train_step(run, run.objective, [batch], MACHINE)
    rate = common.learning_rate(0, config)
    for name, p in run.objective.named_parameters():
        g, old = grads[name], before[name].double()
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
    assert rates.index(max(rates)) in (9, 10) and max(rates) == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.02


def test_non_finite_step_updates_nothing(tiny_config):
    run = train.new_run(tiny_config, data.read_meta(tiny_config.data_dir), MACHINE)
    batch = data.TrainingBatches(data.Dataset(tiny_config.data_dir, "train"), tiny_config)(0)
    batch.mel[0, 0, 0] = float("nan")
    before = {k: v.clone() for k, v in run.objective.model.state_dict().items()}
    numbers = train.train_step(run, run.objective, [batch], MACHINE)
    assert not numbers["grad_norm"] < float("inf")
    assert same(before, run.objective.model.state_dict()) and same(before, run.ema.state_dict())


def command(config, *extra: str) -> list[str]:
    keys = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in asdict(config).items()]
    return ["train.py", *keys, *extra]


def test_sigterm_saves_and_the_same_command_continues(tiny_config):
    config = replace(tiny_config, max_steps=100_000, phase1_steps=50_000, probe_every=50_000, eval_every=50_000)
    process = subprocess.Popen([sys.executable, *command(config)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = Path(config.out_dir) / "log.csv"
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
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    config = replace(tiny_config, out_dir=str(tmp_path / "two"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, *command(config)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    state, _ = common.load(tmp_path / "two" / "ckpt.pt")
    assert state["step"] == 12 and state["heads"]
    # the first step's loss on two ranks is what one process gets by averaging the two ranks' gradients
    runs = [train.new_run(config, data.read_meta(config.data_dir), MACHINE) for _ in range(2)]
    with open(tmp_path / "two" / "log.csv", newline="") as file:
        norm_two = float(next(csv.DictReader(file))["grad_norm"])
    grads = []
    for rank, run in enumerate(runs):
        batch = data.TrainingBatches(data.Dataset(config.data_dir, "train"), config, rank, 2)(0)
        torch.manual_seed(hash((config.seed, 0, rank)) % 2**63)
        losses = run.objective(batch)
        (losses["fm"] + losses["bitc"]).backward()
        grads.append(torch.cat([p.grad.flatten() for p in run.objective.parameters()]))
    assert norm_two == pytest.approx(float(((grads[0] + grads[1]) / 2).norm()), rel=1e-4)


@pytest.mark.ddp
def test_wide_compiled_blocks_train_under_ddp(tiny_config, tmp_path, monkeypatch):
    """dynamo would split a block that is larger than one of DDP's buckets, and fail at it with dynamic shapes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    config = replace(tiny_config, n_embd=1024, n_head=16, n_layer=1, ff_mult=4, dropout=0.1, compile=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run = train.new_run(config, data.read_meta(config.data_dir), MACHINE)
        train.trade(run.objective.model, config)
        dataset, objective = data.Dataset(config.data_dir, "train"), DistributedDataParallel(run.objective)
        for clips, frames in ((1, 60), (2, 70)):
            train.train_step(run, objective, [data.fixed_batch(dataset, clips, 0, frames)], MACHINE)
        assert run.step == 2 and run.objective.model.blocks[0]._compiled_call_impl
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": "fixed"}, "align_layers=\\(\\): name layers from 1 to 4"),
        ({"align": "fixed", "align_layers": (5,)}, "name layers from 1 to 4"),
        ({"align": "lasp", "timestep_adaptive": True}, "timestep_adaptive needs align=foga"),
        ({"n_head": 3}, "n_head=3: a head needs a whole, even width"),
        ({"phase1_steps": 12}, "max_steps=12 ends within phase I"),
        ({"vocoder": "out/my/vocos", "evaluate": True}, "vocoder=out/my/vocos: no such folder"),
        ({"backbone": "f5tts", "checkpoint_activations": True}, "not backbone=f5tts"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(replace(tiny_config, **changes))
    assert not Path(tiny_config.out_dir).exists()


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

    for name in ("held_out_loss", "save"):
        monkeypatch.setattr(train, name, slow(getattr(train, name)))
    run = train.train(replace(tiny_config, eval_every=3), MACHINE)
    with open(Path(run.config.out_dir) / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert spent["other"] > 2 and run.seconds < time.time() - spent["all"] - spent["other"] + 0.35  # phase1.pt's save
    assert all(float(r["frames_per_s"]) > 300 / 0.3 for r in rows[6:])  # no step of phase II has waited for a save


def test_a_stopped_run_logs_its_last_step(tiny_config, monkeypatch):
    """evaluate.py tells by the log which evaluations a run is past."""
    with monkeypatch.context() as m:
        stop_after(m, 5)
        train.train(replace(tiny_config, log_every=4), MACHINE)
    with open(Path(tiny_config.out_dir) / "log.csv", newline="") as file:
        assert [int(r["step"]) for r in csv.DictReader(file)] == [4, 5]


def test_two_accumulated_batches_are_two_ranks(tiny_config, tmp_path):
    """The same global batch, on one process in turn or on two at once (here: both by hand), is the same step."""
    config = replace(tiny_config, accumulate=2, dropout=0.1)
    run = train.new_run(config, data.read_meta(config.data_dir), MACHINE)
    dataset = data.Dataset(config.data_dir, "train")
    one = data.TrainingBatches(dataset, config)
    two = [data.TrainingBatches(dataset, replace(config, accumulate=1), rank, 2) for rank in range(2)]
    assert one.steps_per_epoch == two[0].steps_per_epoch
    for step in range(5):
        for micro in range(2):
            a, b = one(2 * step + micro), two[micro](step)
            assert torch.equal(a.ids, b.ids) and torch.equal(a.mel, b.mel) and torch.equal(a.prompt, b.prompt)
    grads = []
    for rank in range(2):
        torch.manual_seed(hash((config.seed, 0, rank)) % 2**63)
        losses = run.objective(two[rank](0))
        (losses["fm"] + losses["bitc"]).backward()
        grads.append(torch.cat([p.grad.flatten() for p in run.objective.parameters()]))
        run.optimizer.zero_grad()
    numbers = train.train_step(run, run.objective, [one(0), one(1)], MACHINE)
    assert numbers["grad_norm"] == pytest.approx(float(((grads[0] + grads[1]) / 2).norm()), rel=1e-5)


def test_accumulating_run_resumes_exactly(tiny_config, monkeypatch, tmp_path):
    config = replace(tiny_config, accumulate=2)
    whole = train.train(replace(config, out_dir=str(tmp_path / "whole")), MACHINE).state()
    with monkeypatch.context() as m:
        stop_after(m, 7)
        train.train(config, MACHINE)
    resumed = train.train(config, MACHINE).state()
    assert same(whole["model"], resumed["model"]) and same(whole["optimizer"], resumed["optimizer"])


def test_non_finite_steps_in_a_row_save_and_stop(tiny_config, monkeypatch, capsys):
    config = replace(tiny_config, max_steps=40, phase1_steps=39, save_every=100, learning_rate=0.003)
    honest, calls = train.update, []

    def broken(module, optimizer, step, config):
        calls.append(step)
        if step >= 5:
            next(iter(module.parameters())).grad[0] = float("nan")
        return honest(module, optimizer, step, config)

    monkeypatch.setattr(train, "update", broken)
    with pytest.raises(FloatingPointError, match="10 non-finite steps in a row; the last good state is saved"):
        train.train(config, MACHINE)
    assert calls == list(range(15))
    assert "step 6: non-finite gradient, nothing updated; clips [" in capsys.readouterr().err
    state, _ = common.load(Path(config.out_dir) / "ckpt.pt")
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_another_preparation_is_refused(tiny_config):
    train.train(replace(tiny_config, max_steps=2, phase1_steps=1), MACHINE)
    path = Path(tiny_config.data_dir) / "meta.json"
    meta = json.loads(path.read_text())
    meta["sha256"]["train.npy"] = "0" * 64
    path.write_text(json.dumps(meta))
    with pytest.raises(common.CheckpointError, match="trained on another preparation than"):
        train.train(replace(tiny_config, max_steps=2, phase1_steps=1), MACHINE)


def test_temporary_files_of_a_killed_save_are_removed(tiny_config):
    out = Path(tiny_config.out_dir)
    out.mkdir()
    (out / ".ckpt.pt.part").write_bytes(b"half")
    train.train(replace(tiny_config, max_steps=2, phase1_steps=1), MACHINE)
    assert not list(out.glob(".*"))


def test_export_holds_what_others_need(tiny_config):
    run = train.train(replace(tiny_config, max_steps=8), MACHINE)
    train.export(run)
    path = Path(tiny_config.out_dir) / "model.safetensors"
    state, used = common.load(path)
    full, _ = common.load(path.with_name("ckpt.pt"))
    assert used == path and same(state["ema"], full["ema"]) and state["selection"] == full["selection"]
    assert all(state[k] == full[k] for k in ("step", "seconds"))
    a, b = backbones.load_model(state), backbones.load_model(full)
    assert same(a.state_dict(), b.state_dict()) and a.shape == b.shape
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(common.CheckpointError, match="checksum does not match"):
        common.load(path)
