"""backbones.py on the published packages: gates that close exactly and leave no trace, sweep against naive loop,
hidden states, padding, and a whole probe-then-intervene run. Skipped where a package is not installed."""

import copy
import importlib.resources
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn as nn

import backbones
import common
import data
import probe
import train
from model import DiTConfig, FlowModel, flow_matching_loss, sample

NEEDS = {"f5tts": "f5_tts", "voicebox": "voicebox_pytorch", "cosyvoice": "cosyvoice", "matcha": "matcha"}
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(module), reason=f"pip install {module}"))
    for name, module in NEEDS.items()
]
L, TEACHERS, SIZE = 8, (("whisper", 12), ("aisfx", 10)), {"n_head": 2, "n_embd": 32, "ff_mult": 2, "codes": (16, 16)}
CONFIG, MACHINE = DiTConfig(L, **SIZE, dropout=0.1, teachers=TEACHERS), common.Machine(0, 1, "cpu", "float32")
UNET = ("block2.block.1", "attn1.to_out", "ff.net.2")
ENDS = {"f5tts": ("attn.to_out", "ff.ff.2"), "voicebox": ("to_out", "1.3"), "cosyvoice": UNET, "matcha": UNET}


@pytest.fixture
def batch(tiny_config) -> data.Batch:
    return data.fixed_batch(data.Dataset(tiny_config.data_dir, "train"), 2, 0, 60)


@pytest.fixture(params=INSTALLED)
def scene(request, batch):
    """A backbone's name, the model with fresh weights, and the input of its velocity."""
    net = backbones.build(request.param, CONFIG)
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
    assert net.one_sweep == (name == "f5tts")
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
    name, net, x_t, t, cond = scene
    with torch.no_grad():
        _, states = net.velocity(x_t, t, cond, hidden=True)
        assert [h.shape for h in states] == [(len(t), x_t.shape[1], CONFIG.n_embd)] * (L + 1)
        for l in (1, 4):
            _, closed = net.velocity(x_t, t, cond, [float(k != l) for k in range(L)], hidden=True)
            assert all(torch.equal(a, b) for a, b in zip(states[: l + 1], closed[: l + 1], strict=True))
            assert not torch.equal(states[l + 1], closed[l + 1])
            if name in ("f5tts", "voicebox"):
                torch.testing.assert_close(closed[l + 1], closed[l], atol=0, rtol=0)
    losses = flow_matching_loss(net.train(), batch, 0.5, 0.1)
    (losses["fm"] + losses["bitc"]).backward()
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
    config = replace(tiny_config, backbone=name, n_layer=L, batch_size=3)
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


@pytest.fixture
def published_f5(tmp_path) -> tuple[nn.Module, Path]:
    """A small network of F5-TTS v1's kind, and its file in the layout of the published ones."""
    pytest.importorskip("f5_tts")
    dit = backbones.package("f5tts", "f5_tts.model.backbones.dit").DiT
    size = {"dim": 128, "depth": 3, "heads": 2, "dim_head": 64, "ff_mult": 2, "text_dim": 48, "conv_layers": 2}
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
    vocabulary = importlib.resources.files("f5_tts") / "infer/examples/vocab.txt"
    place = {line.removesuffix("\n"): i for i, line in enumerate(vocabulary.open(encoding="utf-8"))}
    for file in ("f5.safetensors", "f5.pt"):
        model = backbones.published("f5tts", str(folder / file), TEACHERS).eval()
        cond = model.embed_condition(model.spell(batch, texts))
        x_t, t = torch.randn(batch.mel.shape), torch.linspace(0.1, 0.9, len(texts))
        v = model.velocity(x_t, t, cond)
        for i, n in enumerate(batch.frames.tolist()):
            text = torch.tensor([[place.get(c, 0) for c in texts[i]]], dtype=torch.long)
            prompt = batch.mel[i : i + 1, :n] * (torch.arange(n) < batch.prompt[i])[None, :, None]
            alone = net(x_t[i : i + 1, :n], prompt, text, t[i : i + 1])
            torch.testing.assert_close(v[i : i + 1, :n], alone, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(model.normalise(batch.mel), batch.mel.clamp_min(math.log(1e-5)), atol=1e-4, rtol=0)
        naive = FlowModel.ablated(model, x_t, t, cond)
        torch.testing.assert_close(model.ablated(x_t, t, cond), naive, atol=1e-4, rtol=1e-3)


def test_published_weights_are_probed(published_f5, tiny_config, tmp_path, capsys):
    what = {"backbone": "f5tts", "weights": str(published_f5[1] / "f5.safetensors"), "data_dir": tiny_config.data_dir}
    probe.main(probe.ProbeArgs(**what, clips=2, times=2, out_dir=str(tmp_path / "probe"), device="cpu"))
    assert "f5.safetensors; LASP through a projection that was never trained" in capsys.readouterr().out
    assert (tmp_path / "probe" / "probe.png").exists()


def test_weights_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    safetensors.torch.save_file({"ema_model.transformer.x": torch.ones(2)}, tmp_path / "other.safetensors")
    for name, file, what in (
        ("f5tts", "none.safetensors", "none.safetensors: no such file"),
        ("f5tts", "broken.safetensors", "broken.safetensors are not F5-TTS v1's"),
        ("f5tts", "other.safetensors", "other.safetensors are not F5-TTS v1's: 'text_embed"),
        ("matcha", "any", "80-bin mels at 22.05 kHz"),
        ("voicebox", "any", "its project publishes none"),
        ("", "any", "pass --backbone=f5tts"),
    ):
        with pytest.raises(ValueError, match=what):
            backbones.published(name, str(tmp_path / file), ())


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "f5_tts.model.backbones.dit", None)  # as if it were not installed
    sizes, path = {"text_embed.text_embed": (5, 4), "transformer_blocks.0.ff.ff.0.0": (128, 64)}, tmp_path / "f5.pt"
    weights = {f"ema_model.transformer.{name}.weight": torch.ones(size) for name, size in sizes.items()}
    torch.save({"ema_model_state_dict": weights}, path)
    with pytest.raises(common.DataError, match="backbone=f5tts needs f5-tts"):
        backbones.published("f5tts", str(path), ())
    with pytest.raises(common.DataError, match="backbone=f5tts needs f5-tts .*--no-deps -r requirements-backbones.txt"):
        backbones.package("f5tts", "f5_tts_that_is_not_there.dit")
    with pytest.raises(ValueError, match="reads one token stream: pass --beats_tokens=false"):
        backbones.build("f5tts", replace(CONFIG, second_codes=4))
