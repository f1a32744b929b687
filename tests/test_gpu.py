"""What only an accelerator can show: velocities, flash attention and runs there. python -m pytest -m gpu
And what can be shown of one without: a step of unified_b on fake CUDA tensors, which have shapes and no values."""

import contextlib
import ctypes
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import model as m
import train
from model import DiT, DiTConfig, FlowModel, flops_per_frame

real = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
UNIFIED_B = DiTConfig(second_codes=1024)
T = 937


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


@pytest.mark.gpu
@real
@torch.no_grad()
def test_velocities_are_those_of_the_cpu_and_one_sweep_is_the_naive_loop(scene):
    torch.backends.cuda.matmul.allow_tf32 = False
    v = velocity(*scene, "cpu")
    torch.testing.assert_close(velocity(*scene, "cuda").cpu(), v, atol=1e-4, rtol=1e-3)
    assert (velocity(*scene, "cuda", "bfloat16").cpu() - v).norm() < 0.03 * v.norm()
    model, batch, x_t, t = scene
    inputs = x_t.cuda(), t.cuda(), model.embed_condition(batch.to("cuda"))
    torch.testing.assert_close(model.ablated(*inputs), FlowModel.ablated(model, *inputs), atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@real
def test_batches_without_padding_take_flash_attention(scene):
    """Forward and backward; any other kernel is refused here. Activations stay in bfloat16."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        v, states = velocity(*scene, "cuda", "bfloat16", hidden=True)
        v.square().mean().backward()
    assert all(h.dtype == torch.bfloat16 for h in states)
    assert all(p.grad is not None for p in scene[0].blocks.parameters())


@pytest.mark.gpu
@real
@pytest.mark.parametrize("method, cfg_scale", [("euler", 2.0), ("midpoint", 1.0)])
def test_a_graph_samples_what_the_loop_does(scene, monkeypatch, method, cfg_scale):
    model, batch = scene[0].cuda(), scene[1].to("cuda")
    mels = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(m, "as_graph", lambda function, *like: function)
        with common.precision("cuda", "bfloat16"):
            mels.append(m.sample(model, model.embed_condition(batch), 4, cfg_scale, method=method))
    torch.testing.assert_close(*mels, atol=1e-4, rtol=1e-3)
    assert mels[0].std() > 0.1


@pytest.mark.gpu
@real
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


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA without CUDA: the device guard of meta tensors, which does nothing, in place of its own; CUDA's autocast,
    which torch.autocast refuses where there is none; the kernels that a GPU would take. Yields the mode of tensors."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 32).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[1] = guards[1], guards[1] or guards[14]  # CUDA, meta

    @contextlib.contextmanager
    def autocast(device, dtype=torch.bfloat16, enabled=True):
        was = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
        yield
        torch.set_autocast_enabled("cuda", was)
        torch.clear_autocast_cache()

    monkeypatch.setattr(m.torch, "autocast", autocast)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    monkeypatch.setattr(m, "attend", lambda q, k, v, mask: flash(q, k, v)[0])
    monkeypatch.setattr(m.F, "dropout", lambda x, p, on: torch.native_dropout(x, p, True)[0] if p and on else x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device("cuda"):
        yield mode
    guards[1] = before


def fake_batch(B: int, teachers=UNIFIED_B.teachers) -> data.Batch:
    """B clips of T frames without padding, of a precision that mel files have."""
    N, whole, teacher = data.token_count(T, 50), torch.full((B,), T), {name: torch.randn(B, E) for name, E in teachers}
    tokens, zero = torch.zeros(B, N, 2, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    return data.Batch(
        torch.randn(B, T, 100), whole, tokens, torch.full((B,), N), zero, teacher, whole, zero, padded=False
    )


def test_a_training_step_asks_the_device_for_nothing_and_keeps_bfloat16(fake_cuda):
    """Reading a value of a fake tensor raises, a tensor elsewhere too. FLOPs are counted by torch, from the shapes."""
    B, saved = 41, {}
    model = DiT(UNIFIED_B).train()
    objective = m.Objective(model, train.Config())
    objective.selection = [{l: [0.5] for l in layers} for layers in ((1, 3, 9), (1, 3, 7))]
    objective.heads = m.AlignHeads(UNIFIED_B, objective.selection, train.Config())

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if not isinstance(x, torch.nn.Parameter):
            saved[storage._cdata] = (storage.nbytes(), x.dtype, storage)
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    states, honest = [], model.velocity
    model.velocity = lambda *args, **options: (found := honest(*args, **options), states.extend(found[1]))[0]
    batch = fake_batch(B)
    with m.torch.autocast("cuda"), torch.device("cpu"), FlopCounterMode(display=False) as counter, hooks:
        losses = objective(batch)
    assert {x.device.type for x in losses.values()} == {"cuda"} and set(losses) == {"fm", "bitc", "align", "loss"}
    assert len(states) == 25 and {h.dtype for h in states} == {torch.bfloat16}
    assert sum(n for n, dtype, _ in saved.values() if dtype == torch.float32) < 0.2 * 2**30
    counts = dict(counter.get_flop_counts()["Global"])
    assert sum(counts.values()) == pytest.approx(flops_per_frame(model, T) / 3 * B * T, rel=0.01)
    with pytest.raises(DataDependentOutputException):
        losses["fm"].item()


class Times(np.ndarray):
    """The sampler's times, which are the host's, where tensors have no values."""

    diff = np.diff


@torch.no_grad()
def test_the_sampler_and_the_sweep_ask_the_device_for_nothing(fake_cuda, monkeypatch):
    """What a CUDA graph needs, too, which itself has no fake."""
    monkeypatch.setattr(m, "as_graph", lambda function, *like: function)
    monkeypatch.setattr(m, "time_grid", lambda nfe, *_: np.linspace(0, 1, nfe + 1).view(Times))
    model = DiT(replace(UNIFIED_B, n_layer=3)).eval()
    cond = model.embed_condition(fake_batch(2))
    for options in ({}, {"method": "midpoint"}, {"cfg_scale": 1.0}):
        with m.torch.autocast("cuda"), torch.device("cpu"):
            mel = m.sample(model, cond, nfe=2, **options)
        assert mel.device.type == "cuda" and mel.shape == (2, T, 100)
    x_t, t = torch.randn(2, T, 100), torch.rand(2)
    with m.torch.autocast("cuda"), torch.device("cpu"):
        v = model.ablated(x_t, t, cond)
    assert v.shape == (4, 2, T, 100) and v.device.type == "cuda"


VIEWS = (
    "view _unsafe_view transpose t unsqueeze squeeze expand permute detach slice split unbind alias select as_strided "
)
FREE = VIEWS.split() + "mm addmm bmm baddbmm convolution empty empty_like".split()  # views, and what the GEMMs read


class Traffic(TorchDispatchMode):
    """Counts the elementwise calls, and the bytes that each must read and write."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in FREE and "attention" not in name:
            flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
            sizes = [x.numel() * x.element_size() for x in flat if isinstance(x, torch.Tensor) and not x.is_cpu]
            if max(sizes, default=0) > 2**20:
                self.bytes, self.calls = self.bytes + sum(sizes), self.calls + 1
        return out


def test_elementwise_traffic_of_a_block(monkeypatch):
    """Forward and backward of one block of unified_b in bfloat16, in units of one hidden state."""
    monkeypatch.setattr(m, "attend", lambda q, k, v, mask: q + k + v)  # 2 calls and 6 units, which do not count
    monkeypatch.setattr(m.torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(m.F, "dropout", lambda x, p, on: torch.native_dropout(x, p, True)[0])  # as GPUs have it
    B, D = 8, UNIFIED_B.n_embd
    with torch.device("meta"):
        block = m.Block(UNIFIED_B).to(torch.bfloat16).train()
        h = torch.randn(B, T, D, dtype=torch.bfloat16, requires_grad=True)
        context = m.Context(torch.randn(B, D, dtype=torch.bfloat16), None, m.rotary_table(h, D // UNIFIED_B.n_head))
        with Traffic() as traffic:
            block(h, context).backward(torch.randn(B, T, D, dtype=torch.bfloat16))
    units = traffic.bytes / (h.numel() * h.element_size()) - 6
    assert units <= 160 and traffic.calls - 2 <= 90


@pytest.mark.slow
def test_few_graphs_of_a_block():
    """Every way in which training, probes and sampling call a block, at several shapes."""
    import torch._dynamo as dynamo

    dynamo.reset()
    config, graphs = DiTConfig(n_layer=1, n_head=2, n_embd=32), []
    block = m.Block(config)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    block.compile(dynamic=True, backend=backend, fullgraph=True)
    for B, frames, padded, gate, learns in itertools.product((1, 3, 5), (48, 64), (0, 1), (1.0, 0.0), (0, 1)):
        block.train(bool(learns))
        mask = torch.ones(B, 1, 1, frames, dtype=torch.bool) if padded else None
        h = torch.randn(B, frames, 32)
        with torch.set_grad_enabled(bool(learns)), dynamo.config.patch(recompile_limit=32):
            block(h, m.Context(torch.randn(B, 32), mask, m.rotary_table(h, 16)), gate)
    dynamo.reset()
    assert len(graphs) <= 12
