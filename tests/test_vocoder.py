"""vocoder.py: its losses against plain FFTs, exact resume, and a folder that loads like any other Vocos."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.signal
import torch

import audio
import checkpoint
import shards
import vocoder

ARGS = vocoder.VocoderArgs(
    dim=32, n_layer=2, max_steps=12, batch_size=4, crop_frames=20, learning_rate=2e-3, log_every=1, save_every=3,
    device="cpu", dtype="float32",
)  # fmt: skip


def test_losses_against_plain_ffts(rng):
    a, b = rng.normal(0, 0.1, (2, 6000)), rng.normal(0, 0.2, (2, 6000))
    got = vocoder.spectral_losses(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    convergence, magnitude = [], []
    for n in (512, 1024, 2048):
        window = scipy.signal.get_window("hann", n)
        S, R = (
            np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(p, n, axis=1)[:, :: n // 4] * window))
            for p in (np.pad(x, ((0, 0), (n // 2, n // 2)), mode="reflect") for x in (a, b))
        )  # (2, frames, F)
        convergence += [np.linalg.norm(s - r) / np.linalg.norm(r) for s, r in zip(S, R, strict=True)]
        magnitude.append(np.abs(np.log(S) - np.log(R)).mean())
    assert float(got["convergence"]) == pytest.approx(np.mean(convergence), rel=1e-4)
    assert float(got["magnitude"]) == pytest.approx(np.mean(magnitude), rel=1e-3)
    same = vocoder.spectral_losses(torch.from_numpy(a).float(), torch.from_numpy(a).float())
    assert all(float(v) == 0 for v in same.values())


def test_gradients_are_finite_at_silence():
    wav = torch.zeros(1, 6000, requires_grad=True)
    sum(vocoder.spectral_losses(wav, torch.randn(1, 6000)).values()).backward()
    assert torch.isfinite(wav.grad).all()


def test_trains_resumes_and_loads_like_any_vocos(tiny_config, tmp_path, monkeypatch):
    args = replace(ARGS, data_dir=tiny_config.data_dir, out_dir=str(tmp_path / "v"))
    whole, finished = vocoder.train(replace(args, out_dir=str(tmp_path / "whole")))
    assert finished
    with monkeypatch.context() as m:
        seen = iter(range(100))
        m.setattr(checkpoint.StopRequest, "agreed", lambda self: next(seen) >= 5)
        assert not vocoder.train(args)[1]
    resumed, _ = vocoder.train(args)
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    with open(tmp_path / "v" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == list(range(1, 13))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    torch.save(resumed.state_dict(), tmp_path / "v" / "pytorch_model.bin")
    vocode = audio.load_vocoder(str(tmp_path / "v"))
    mel = torch.from_numpy(shards.Dataset(args.data_dir, "train").mel(0).astype(np.float32))
    wav = vocode(mel)
    assert wav.shape == ((len(mel) - 1) * audio.HOP,) and np.isfinite(wav).all()


def test_a_refused_run_leaves_a_finished_one_as_it_is(tiny_config, tmp_path):
    args = replace(ARGS, data_dir=tiny_config.data_dir, out_dir=str(tmp_path / "v"), max_steps=1)
    vocoder.train(args)
    before = {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()}
    with pytest.raises(checkpoint.CheckpointError, match="dim: 32 -> 16"):
        vocoder.train(replace(args, dim=16))
    meta = tmp_path / "data" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"sha256": {}}))
    with pytest.raises(checkpoint.CheckpointError, match="trained on another preparation"):
        vocoder.train(args)
    assert {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()} == before


def test_gives_up_when_no_gradient_is_finite(tiny_config, tmp_path, monkeypatch, capsys):
    args = replace(ARGS, data_dir=tiny_config.data_dir, out_dir=str(tmp_path / "v"))
    draw = vocoder.draw_crops
    monkeypatch.setattr(vocoder, "draw_crops", lambda *a: (draw(*a)[0] * torch.nan, draw(*a)[1]))
    with pytest.raises(FloatingPointError, match="10 non-finite steps in a row"):
        vocoder.train(args)
    assert "nothing updated; clips [" in capsys.readouterr().err
