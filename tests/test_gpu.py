"""What only an accelerator can show: velocities, flash attention and runs there. python -m pytest -m gpu"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import data
import train
from model import FlowModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture
def scene(tiny_config):
    """A model with awake weights, two clips of equal length and noise, on the CPU."""
    config = replace(tiny_config, n_embd=64, n_head=2)
    run = train.new_run(config, data.read_meta(config.data_dir), common.Machine(0, 1, "cpu", "float32"))
    model = run.objective.model.eval()
    model.reset_parameters()
    batch = data.fixed_batch(data.Dataset(config.data_dir, "train"), 1, 0, 30)
    assert not batch.padded
    return model, batch, torch.randn(batch.mel.shape), torch.tensor([0.2, 0.7])


def velocity(model, batch, x_t, t, device: str, dtype: str = "float32", **options):
    model, x_t, t = model.to(device), x_t.to(device), t.to(device)
    with common.precision(device, dtype):
        return model.velocity(x_t, t, model.embed_condition(batch.to(device)), **options)


@torch.no_grad()
def test_velocities_are_those_of_the_cpu_and_one_sweep_is_the_naive_loop(scene):
    torch.backends.cuda.matmul.allow_tf32 = False
    v = velocity(*scene, "cpu")
    torch.testing.assert_close(velocity(*scene, "cuda").cpu(), v, atol=1e-4, rtol=1e-3)
    assert (velocity(*scene, "cuda", "bfloat16").cpu() - v).norm() < 0.03 * v.norm()
    model, batch, x_t, t = scene
    inputs = x_t.cuda(), t.cuda(), model.embed_condition(batch.to("cuda"))
    torch.testing.assert_close(model.ablated(*inputs), FlowModel.ablated(model, *inputs), atol=1e-4, rtol=1e-3)


def test_batches_without_padding_take_flash_attention(scene):
    """Forward and backward; any other kernel is refused here. Activations stay in bfloat16."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        v, states = velocity(*scene, "cuda", "bfloat16", hidden=True)
        v.square().mean().backward()
    assert all(h.dtype == torch.bfloat16 for h in states)
    assert all(p.grad is not None for p in scene[0].blocks.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_stops_and_continues(tiny_config, tmp_path, monkeypatch, compiled):
    """Both phases in bfloat16, with probes; a continued run ends where one in one go does."""
    config = replace(tiny_config, device="cuda", dtype="bfloat16", compile=compiled, n_embd=64, n_head=2)
    machine = common.join_group(config)
    whole = train.train(replace(config, out_dir=str(tmp_path / "whole")), machine)
    with monkeypatch.context() as patch:
        asked = iter([False] * 8 + [True] * 9)
        patch.setattr(common.StopRequest, "agreed", lambda self: next(asked))
        assert train.train(config, machine).step == 8
    again = train.train(config, machine)
    assert again.step == config.max_steps and again.objective.selection == whole.objective.selection
    for a, b in zip(again.ema.parameters(), whole.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)
    assert [p["step"] for p in again.probes] == [3, 6]
