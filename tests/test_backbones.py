"""backbones.py on the published packages: gates that close exactly and leave no trace, sweep against naive loop,
hidden states, padding, and a whole probe-then-intervene run; and on a model of one's own. Skipped where a package is
not installed."""

import copy
import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import backbones
import common
import data
import probe
import sample as sample_py
import train
from model import DiTConfig, FlowModel, Objective, sample

EXAMPLE = f"{Path(backbones.__file__).parent}/examples/my_model.py:MyModel"
NEEDS = {"f5tts": "f5_tts", "f5tts_text": "f5_tts", "voicebox": "voicebox_pytorch", "cosyvoice": "cosyvoice"}
NEEDS |= {"matcha": "matcha", EXAMPLE: "torch"}
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(module), reason=f"pip install {module}"))
    for name, module in NEEDS.items()
]
L, TEACHERS, SIZE = 8, (("whisper", 12), ("aisfx", 10)), {"n_head": 2, "n_embd": 32, "ff_mult": 2, "codes": (16, 16)}
CONFIG, MACHINE = DiTConfig(L, **SIZE, dropout=0.1, teachers=TEACHERS), common.Machine(0, 1, "cpu", "float32")
UNET = ("block2.block.1", "attn1.to_out", "ff.net.2")
ENDS = {"f5tts": ("attn.to_out", "ff.ff.2"), "voicebox": ("to_out", "1.3"), "cosyvoice": UNET, "matcha": UNET}
ENDS |= {"f5tts_text": ENDS["f5tts"], EXAMPLE: ("mlp.2",)}


@pytest.fixture
def batch(tiny_config) -> data.Batch:
    return data.fixed_batch(data.Dataset(tiny_config.data_dir, "train"), 2, 0, 60)


@pytest.fixture(params=INSTALLED)
def scene(request, batch):
    """A backbone's name, the model with fresh weights, and the input of its velocity."""
    net = backbones.find(request.param)(CONFIG)
    net.reset_parameters()
    x_t, t = torch.randn(batch.mel.shape), torch.linspace(0.2, 0.8, len(batch.frames))
    return request.param, net.eval(), x_t, t, net.embed_condition(batch)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def forward(self, hidden_states):
        return hidden_states + self.branch(hidden_states)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closed_block_returns_its_input_and_is_the_same_after(keyword):
    """Also after something fails."""
    block, x = Residual(), torch.randn(3, 4)

    def call():
        return block(hidden_states=x) if keyword else block(x)

    before = call()
    for gate in (backbones.Gate(block, "input"), backbones.Gate(block.branch, "zero")):
        with pytest.raises(KeyError), backbones.held(backbones.close([gate])):
            assert torch.equal(call(), x)
            raise KeyError
    assert torch.equal(call(), before) and not block._forward_hooks and not block.branch._forward_hooks


@torch.no_grad()
def test_closing_a_layer_is_leaving_it_out(scene):
    """Against the same network with zeros in the weights that each of the layer's updates ends in; and nothing stays
    behind. All ablations together, in a growing batch where there is one, are these single ones."""
    name, net, x_t, t, cond = scene
    whole = net.velocity(x_t, t, cond)
    singles = [net.velocity(x_t, t, cond, [float(k != l) for k in range(L)]) for l in range(L)]
    assert net.one_sweep == name.startswith("f5tts")
    torch.testing.assert_close(net.ablated(x_t, t, cond), torch.stack([whole, *singles]), atol=1e-5, rtol=1e-4)
    for l, closed in enumerate(singles):
        other = copy.deepcopy(net)
        assert not torch.equal(closed, whole), l
        ends = [p for key, p in other.blocks[l].named_parameters() if any(e in key for e in ENDS[name])]
        assert ends and all(p.any() for p in ends if p.dim() > 1)
        for p in ends:
            p.zero_()
        torch.testing.assert_close(other.velocity(x_t, t, cond), closed, atol=0, rtol=0)
    assert torch.equal(net.velocity(x_t, t, cond), whole)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert backbones.check(net) == []


@torch.no_grad()
def test_blocks_hold_whole_layers_and_the_control_is_fresh(scene):
    """Each layer's block holds all that runs in it, its skip included; a control keeps no weight of the model."""
    net = scene[1]
    blocks = {id(p) for p in net.blocks.parameters()}
    resnets = [unit for unit in net.modules() if hasattr(unit, "res_conv")]
    assert all(id(p) in blocks for unit in resnets for p in unit.parameters())
    control = dict(probe.random_control(net).named_parameters())
    for key, p in net.named_parameters():
        if p.unique().numel() > 1:  # gains and biases start at ones and zeros
            assert not torch.equal(p, control[key]), key


def test_hidden_states_are_the_networks_own(scene, batch):
    """L + 1 of them, of width D; closing layer l changes no state before it, and moves the state after it."""
    _, net, x_t, t, cond = scene
    with torch.no_grad():
        _, states = net.velocity(x_t, t, cond, hidden=True)
        assert [h.shape for h in states] == [(len(t), x_t.shape[1], CONFIG.n_embd)] * (L + 1)
        for l in (1, 4):
            _, closed = net.velocity(x_t, t, cond, [float(k != l) for k in range(L)], hidden=True)
            assert all(torch.equal(a, b) for a, b in zip(states[: l + 1], closed[: l + 1], strict=True))
            assert not torch.equal(states[l + 1], closed[l + 1])
            if net.chained:
                torch.testing.assert_close(closed[l + 1], closed[l], atol=0, rtol=0)
    Objective(net.train(), train.Config())(batch)["loss"].backward()
    assert net.tokens.weight.grad.abs().sum() > 0
    assert all(sum(float(p.grad.abs().sum()) for p in b.parameters() if p.grad is not None) > 0 for b in net.blocks)


@torch.no_grad()
def test_tokens_and_prompt_matter_and_zero_frames_stay_zero(scene):
    name, net, x_t, t, cond = scene
    whole = net.velocity(x_t, t, cond)
    assert not (whole * ~cond.mask[..., None]).any()
    assert not torch.equal(net.velocity(x_t, t, cond._replace(tokens=cond.tokens.flip(0))), whole)
    changed = not torch.equal(net.velocity(x_t, t, cond._replace(prompt=cond.prompt + 1.0)), whole)
    assert changed == (name != "matcha")  # which takes no prompt
    mel = sample(net, cond, nfe=2, cfg_scale=2.0)
    assert torch.isfinite(mel).all() and not (mel * ~cond.mask[..., None]).any()


@pytest.mark.parametrize("name", INSTALLED)
def test_probe_then_intervene(name, tiny_config, batch, tmp_path):
    """Both phases, selection, a branch with fixed layers, resume, and the checkpoint read back and probed."""
    config = replace(tiny_config, backbone=name, n_layer=L, batch_size=3, trim=0.0, sigma=1.0, mel_stats=(0.0, 1.0))
    train.check(config)
    run = train.train(config, MACHINE)
    assert run.step == config.max_steps and all(len(s) == 3 for s in run.objective.selection)
    branch = replace(config, branch_from=f"{config.out_dir}/phase1.pt", out_dir=str(tmp_path / "shallow"))
    shallow = train.train(replace(branch, align="fixed", align_layers=(1, 2)), MACHINE)
    assert list(shallow.objective.selection[0]) == [1, 2]
    train.export(run)
    for file in ("ckpt.pt", "model.safetensors"):
        loaded = backbones.load_model(common.load(Path(config.out_dir) / file)[0])
        torch.testing.assert_close(dict(loaded.state_dict()), dict(run.ema.state_dict()), atol=0, rtol=0)
    assert len(probe.probe(loaded, batch, 2, 0.5)["speech"]["foga"]) == L


@pytest.mark.parametrize("name", INSTALLED)
def test_bfloat16_and_ddp(name, batch, tmp_path):
    """Gates, hidden states and gradients of each backbone under autocast and in DDP."""
    net = probe.random_control(backbones.find(name)(CONFIG))
    exact = probe.at_times(probe.foga_of_clips, net, batch, 2)[..., 1:].mean((0, 1))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        objective = DistributedDataParallel(Objective(net.train(), train.Config()))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = probe.at_times(probe.foga_of_clips, net, batch, 2)[..., 1:].mean((0, 1))
            for _ in range(2):  # the second raises where DDP misses a parameter in the first
                objective(batch)["loss"].backward()
    finally:
        del objective
        dist.destroy_process_group()
    torch.testing.assert_close(rounded, exact, atol=2e-3, rtol=0.2)
    assert all(p.grad.isfinite().all() for block in net.blocks for p in block.parameters() if p.grad is not None)


SOURCE = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, n_mels, dim, depth):
        super().__init__()
        self.stem, self.head = nn.Linear(n_mels + dim, dim), nn.Linear(dim, n_mels)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth + 1))
        self.mlps = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))

    def layers(self):
        return [[mlp] for mlp in self.mlps]

    def states(self):
        return self.norms

    def forward(self, x_t, t, cond):
        h = self.stem(torch.cat([x_t, cond], -1)) + t[:, None, None]
        for norm, mlp in zip(self.norms, self.mlps):
            h = h + mlp(norm(h))
        return self.head(self.norms[-1](h))
"""
LISTED = "[[mlp] for mlp in self.mlps]"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """mine(a, b, ...) builds SOURCE with a replaced by b, with fresh weights."""

    def build(a="", b="", where="my_own.py", layers="") -> FlowModel:
        assert a in SOURCE
        (tmp_path / "my_own.py").write_text(SOURCE.replace(a, b) if a else SOURCE)
        importlib.invalidate_caches()
        sys.modules.pop("my_own", None)
        return probe.random_control(backbones.find(f"{where}:Mine", layers)(CONFIG)).eval()

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return build


@torch.no_grad()
@pytest.mark.parametrize("where", ["my_own.py", "my_own"])
def test_branches_of_a_model_of_ones_own(mine, batch, where):
    """Against the same network with zero weights in the layer, in the trainer's methods and in the plain function."""
    net = mine(where=where)
    assert backbones.check(net) == []
    x_t, t, cond = torch.randn(batch.mel.shape), torch.rand(len(batch.frames)), net.embed_condition(batch)
    given, expected = (cond.tokens + net.prompt_in(cond.prompt)) * cond.mask[..., None], []
    v = net.ablated(x_t, t, cond)
    for l in range(L):
        other = copy.deepcopy(net)
        nn.init.zeros_(other.net.mlps[l].weight)
        nn.init.zeros_(other.net.mlps[l].bias)
        torch.testing.assert_close(other.velocity(x_t, t, cond), v[l + 1], atol=0, rtol=0)
        whole, alone = (n.net(x_t, t, given).double().flatten(1) for n in (net, other))
        expected.append(((whole - alone).norm(dim=1) / whole.norm(dim=1)).mean())
    found = probe.foga(net.net, net.net.layers(), [(x_t[:1], t[:1], given[:1]), (x_t[1:], t[1:], given[1:])])
    torch.testing.assert_close(found, torch.stack(expected).float(), atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="eval"):
        probe.foga(net.net.train(), net.net.layers(), [(x_t, t, given)])


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        ("def layers", "def others", r"has no layers\(\): it returns a residual block for each of L layers"),
        ("def states", "def others", r"has no states\(\): it returns the L \+ 1 modules"),
        ("def forward", "def others", r"has no forward\(x_t, t, cond\): it returns the velocity \(B, T, M\)"),
        ("def __init__(self, n_mels,", "def __init__(self, bins,", "built with {'n_mels': 100.*'n_mels'"),
        ("return self.head", "return 1, self.head", r"needs forward.*the velocity.*not <class 'tuple'>"),
        (LISTED, "[[self.stem]]", "n_layer=8: .*of this kind has 1 layers"),
        ("class Mine(nn.Module)", "class Mine(dict)", "has no torch.nn.Module called 'Mine'"),
        ("import torch\n", "import not_there\n", "No module named 'not_there'"),
    ],
)
def test_what_a_model_of_ones_own_lacks_is_named(mine, a, b, what):
    with pytest.raises(ValueError, match=what):
        backbones.check(mine(a, b))


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        (LISTED, "self.mlps", "layer 1 does not close: what comes after it is not what entered"),
        ("mlp(norm(h))", "(norm(h) if mlp is self.mlps[0] else mlp(norm(h)))", "layer 1 does not close: the velocity"),
        ("    def forward", '    @torch.compile(backend="eager")\n    def forward', "layer 1 does not close: the vel"),
        ("return self.norms\n", "return self.mlps\n", "its hidden states are"),
        (LISTED, "[self.stem, *self.mlps[1:]]", "layer 1 does not close: Linear is no residual block"),
        ("return self.head", "return torch.rand(()) * self.head", "random in eval mode"),
    ],
)
def test_check_says_which_layer_does_not_close(mine, a, b, what):
    assert what in str(backbones.check(mine(a, b)))


def test_layers_by_path_and_models_by_name(mine):
    by_method, by_path = (backbones.find(EXAMPLE, path)(CONFIG) for path in ("", "blocks"))
    kinds = [[(str(g.module), g.closed) for layer in net.layers for g in layer] for net in (by_method, by_path)]
    assert kinds[0] == kinds[1] == [(str(by_path.net.blocks[0]), "input")] * L
    with pytest.raises(ValueError, match="has no net.blocks"):
        mine(layers="net.blocks")
    known = "f5tts, f5tts_text, voicebox, cosyvoice, matcha, or FILE.py:Class"
    with pytest.raises(ValueError, match=f"backbone='f5'.*{known}"):
        backbones.find("f5")
    with pytest.raises(ValueError, match="No such file"):
        backbones.find("none.py:Mine")


@pytest.fixture
def published_f5(tmp_path) -> tuple[nn.Module, Path]:
    """A small network of F5-TTS v1's kind, and its file in the layout of the published ones."""
    pytest.importorskip("f5_tts")
    dit = backbones.package("f5tts", "f5_tts.model.backbones.dit").DiT
    size = {"dim": 32, "depth": L, "heads": 2, "dim_head": 16, "ff_mult": 2, "text_dim": 16, "conv_layers": 4}
    net = dit(**size, text_num_embeds=2545, text_mask_padding=True, dropout=0.1).eval()
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    other = {"initted": torch.tensor(True), "step": torch.tensor(7), "ema_model.mel_spec.window": torch.ones(3)}
    weights = other | {f"ema_model.transformer.{k}": v.contiguous() for k, v in net.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "f5.safetensors")
    torch.save({"ema_model_state_dict": weights}, tmp_path / "f5.pt")
    return net, tmp_path


@torch.no_grad()
def test_published_weights_are_the_published_network(published_f5, batch):
    """Both file formats, against the network itself called on each clip alone, with its text as characters."""
    net, folder = published_f5
    texts = ["please hold", "a very long text that has many more characters than the clip has frames, " * 2, "", "Ok!"]
    batch = replace(batch, texts=texts)
    vocabulary = importlib.resources.files("f5_tts") / "infer/examples/vocab.txt"
    place = {line.removesuffix("\n"): i for i, line in enumerate(vocabulary.open(encoding="utf-8"))}
    for file in ("f5.safetensors", "f5.pt"):
        model = backbones.find("f5tts_text")(CONFIG).eval()
        backbones.init_from(model, str(folder / file))
        cond = model.embed_condition(batch)
        x_t, t = torch.randn(batch.mel.shape), torch.linspace(0.1, 0.9, len(texts))
        v = model.velocity(x_t, t, cond)
        for i, n in enumerate(batch.frames.tolist()):
            text = torch.tensor([[place.get(c, 0) for c in texts[i]]], dtype=torch.long)
            prompt = batch.mel[i : i + 1, :n] * (torch.arange(n) < batch.prompt[i])[None, :, None]
            alone = net(x_t[i : i + 1, :n], prompt, text, t[i : i + 1])
            torch.testing.assert_close(v[i : i + 1, :n], alone, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(model.normalise(batch.mel), batch.mel.clamp_min(math.log(1e-5)), atol=1e-4, rtol=0)


def test_training_and_probing_start_from_published_weights(published_f5, tiny_config, tmp_path, capsys):
    """A step's weights are near the file's; other shapes are listed, and left alone with init_partial."""
    net, folder = published_f5
    file, size = str(folder / "f5.safetensors"), {"n_layer": L, "trim": 0.0, "sigma": 1.0, "mel_stats": (0.0, 1.0)}
    config = replace(tiny_config, **size, backbone="f5tts_text", init_from=file, max_steps=1, learning_rate=1e-6)
    run = train.train(config, MACHINE)
    for key, weight in net.state_dict().items():
        torch.testing.assert_close(run.objective.model.net.state_dict()[key], weight, atol=1e-4, rtol=0)
    held_out = data.Dataset(config.data_dir, "held_out")
    requests = sample_py.from_dataset(held_out, np.arange(3))
    both = sample_py.to_batch(requests), held_out.batch(np.arange(3))
    given, wanted = (run.ema.embed_condition(batch).tokens for batch in both)
    assert torch.equal(given, wanted) and not torch.equal(given[0, 0], given[1, 0])
    (folder / "f5.safetensors").rename(folder / "gone")
    train.train(config, MACHINE)  # a continued run does not read it again
    (folder / "gone").rename(file)
    sizes = {"n_layer": L, "n_head": 2, "n_embd": 32, "ff_mult": 2, "data_dir": tiny_config.data_dir, "device": "cpu"}
    given = probe.ProbeArgs(**sizes, backbone="f5tts_text", random_init=True, init_from=file, clips=2, times=2)
    probe.main(replace(given, out_dir=str(tmp_path / "probe")))
    assert "f5.safetensors: " in capsys.readouterr().out and (tmp_path / "probe" / "probe.png").exists()
    coded = backbones.find("f5tts")(CONFIG)
    before = copy.deepcopy(coded.state_dict())
    with pytest.raises(ValueError, match=r"text_embed.weight \[2546, 16\], here \[33, 32\].* and 2. more"):
        backbones.init_from(coded, file)
    told = backbones.init_from(coded, file, others_stay=True)
    assert "f5.safetensors: 126 of the model's 133 tensors; not net" in told
    after, key = coded.state_dict(), "net.transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(after["net.text_embed.text_embed.weight"], before["net.text_embed.text_embed.weight"])
    assert torch.equal(after[key], net.state_dict()[key.removeprefix("net.")])
    with pytest.raises(ValueError, match="reads whole clips.*pass --crop_frames=0 --trim=0 --sigma=1 --mel_stats=0,1"):
        train.check(replace(config, trim=0.05, align="none"))


def test_training_starts_from_our_own_weights(tiny_config, tmp_path):
    """From ckpt.pt and from model.safetensors, the averaged weights and their statistics; not from other files."""
    config = replace(tiny_config, max_steps=1, phase1_steps=1)
    run = train.train(config, MACHINE)
    train.export(run)
    for file in ("ckpt.pt", "model.safetensors"):
        model = train.build_model(config, [["whisper", 12], ["aisfx", 10]])
        backbones.init_from(model, f"{config.out_dir}/{file}")
        torch.testing.assert_close(dict(model.state_dict()), dict(run.ema.state_dict()), atol=0, rtol=0)
    deeper = replace(config, n_layer=5, init_from=f"{config.out_dir}/ckpt.pt", out_dir=str(tmp_path / "deeper"))
    with pytest.raises(ValueError, match="blocks.4.qkv.weight none, here .*; --init_partial leaves"):
        train.train(deeper, MACHINE)
    assert train.train(replace(deeper, init_partial=True), MACHINE).step == 1
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    for file, what in (("none", "No such file"), ("broken", "cannot be read"), ("other", "none of its 1 names")):
        with pytest.raises(ValueError, match=what):
            backbones.init_from(model, str(tmp_path / f"{file}.safetensors"))


def test_the_gates_are_checked_without_a_prepared_folder(monkeypatch, capsys, mine):
    given = probe.ProbeArgs(n_layer=3, n_head=2, n_embd=32, random_init=True, check=True, device="cpu")
    assert probe.main(given) == 0 and "3 layers close" in capsys.readouterr().out
    mine(LISTED, "self.mlps")
    assert probe.main(replace(given, backbone="my_own.py:Mine")) == 1
    assert "layer 3 does not close" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "f5_tts.model.backbones.dit", None)  # as if it were not installed
    with pytest.raises(common.DataError, match="backbone=f5tts needs f5-tts .*--no-deps -r requirements-backbones.txt"):
        backbones.package("f5tts", "f5_tts_that_is_not_there.dit")
    with pytest.raises(ValueError, match="reads one token stream: pass --beats_tokens=false"):
        backbones.find("f5tts")(replace(CONFIG, second_codes=4))
