"""backbones.py on the published packages: gates that close exactly and leave no trace, sweep against naive loop,
hidden states, padding, and a whole probe-then-intervene run. Skipped where a package is not installed."""

import copy
import importlib.util
import math
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
from model import DiTConfig, flow_matching_loss, sample

NEEDS = {"f5tts": "f5_tts", "voicebox": "voicebox_pytorch", "cosyvoice": "cosyvoice", "matcha": "matcha"}
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(module), reason=f"pip install {module}"))
    for name, module in NEEDS.items()
]
SHAPE = DiTConfig(
    n_layer=8, n_head=2, n_embd=32, ff_mult=2, dropout=0.1, codes=(16, 16), teachers=(("whisper", 12), ("aisfx", 10))
)

UNET = ("block2.block.1", "attn1.to_out", "ff.net.2")
ENDS = {"f5tts": ("attn.to_out", "ff.ff.2"), "voicebox": ("to_out", "1.3"), "cosyvoice": UNET, "matcha": UNET}


@pytest.fixture
def batch(tiny_config) -> data.Batch:
    return data.fixed_batch(data.Dataset(tiny_config.data_dir, "train"), 2, 0, 60)


def scene(name: str, batch: data.Batch):
    net = backbones.build(name, SHAPE)
    net.reset_parameters()
    net = net.eval()
    x_t, t = torch.randn(batch.mel.shape), torch.linspace(0.2, 0.8, len(batch.frames))
    return net, x_t, t, net.embed_condition(batch)


# ---- the generic gate, on a toy whose answer is known


class Residual(nn.Module):
    def __init__(self, keyword: bool):
        super().__init__()
        self.branch, self.keyword = nn.Linear(4, 4), keyword

    def forward(self, hidden_states):
        return hidden_states + self.branch(hidden_states)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closed_block_returns_its_input_and_is_the_same_after(keyword):
    block, x = Residual(keyword), torch.randn(3, 4)

    def call():
        return block(hidden_states=x) if keyword else block(x)

    before = call()
    with backbones.held(backbones.close([backbones.Gate(block, "input")])):
        assert torch.equal(call(), x)
    with backbones.held(backbones.close([backbones.Gate(block.branch, "zero")])):
        assert torch.equal(call(), x)
    assert torch.equal(call(), before) and not block._forward_hooks and not block.branch._forward_hooks


def test_handles_are_removed_when_something_fails():
    block = nn.Linear(4, 4)
    with pytest.raises(KeyError), backbones.held(backbones.close([backbones.Gate(block, "zero")])):
        raise KeyError
    assert not block._forward_hooks


# ---- the packages


@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_closing_a_layer_is_leaving_it_out(name, batch):
    """Against the same network with zeros in the weights that each of the layer's updates ends in; and nothing stays
    behind."""
    net, x_t, t, cond = scene(name, batch)
    whole = net.velocity(x_t, t, cond)
    for l in range(SHAPE.n_layer):
        gates = [float(k != l) for k in range(SHAPE.n_layer)]
        closed, other = net.velocity(x_t, t, cond, gates), copy.deepcopy(net)
        assert not torch.equal(closed, whole), l
        ends = [p for key, p in other.blocks[l].named_parameters() if any(e in key for e in ENDS[name])]
        assert ends and all(p.any() for p in ends if p.dim() > 1)
        for p in ends:
            p.zero_()
        torch.testing.assert_close(other.velocity(x_t, t, cond), closed, atol=0, rtol=0)
    assert torch.equal(net.velocity(x_t, t, cond), whole)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_blocks_hold_whole_layers_and_the_control_is_fresh(name, batch):
    """Each layer's block holds all that runs in it, its skip included; a control keeps no weight of the model."""
    net, *_ = scene(name, batch)
    blocks = {id(p) for p in net.blocks.parameters()}
    for unit in net.modules():
        if hasattr(unit, "res_conv"):
            assert all(id(p) in blocks for p in unit.parameters())
    control = dict(probe.random_control(net).named_parameters())
    for key, p in net.named_parameters():
        if p.unique().numel() > 1:  # gains and biases start at ones and zeros
            assert not torch.equal(p, control[key]), key


@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_all_ablations_equal_single_ones(name, batch):
    """The growing batch where there is one, the naive loop elsewhere, against one call per layer."""
    net, x_t, t, cond = scene(name, batch)
    together = net.ablated(x_t, t, cond)
    torch.testing.assert_close(together, backbones.FlowModel.ablated(net, x_t, t, cond), atol=1e-5, rtol=1e-4)
    assert len(together) == SHAPE.n_layer + 1 and net.one_sweep == (name == "f5tts")


@pytest.mark.parametrize("name", INSTALLED)
def test_hidden_states_are_the_networks_own(name, batch):
    """L + 1 of them, of width D; closing layer l changes no state before it, and moves the state after it."""
    net, x_t, t, cond = scene(name, batch)
    with torch.no_grad():
        _, states = net.velocity(x_t, t, cond, hidden=True)
        assert len(states) == SHAPE.n_layer + 1
        assert all(h.shape == (len(t), x_t.shape[1], SHAPE.n_embd) for h in states)
        for l in (1, 4):
            gates = [float(k != l) for k in range(SHAPE.n_layer)]
            _, closed = net.velocity(x_t, t, cond, gates, hidden=True)
            assert all(torch.equal(a, b) for a, b in zip(states[: l + 1], closed[: l + 1], strict=True))
            assert not torch.equal(states[l + 1], closed[l + 1])
            if name in ("f5tts", "voicebox"):
                torch.testing.assert_close(closed[l + 1], closed[l], atol=0, rtol=0)
    losses = flow_matching_loss(net.train(), batch, 0.5, 0.1)
    (losses["fm"] + losses["bitc"]).backward()
    assert net.tokens.weight.grad.abs().sum() > 0
    assert all(sum(float(p.grad.abs().sum()) for p in b.parameters() if p.grad is not None) > 0 for b in net.blocks)


@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_tokens_and_prompt_matter_and_zero_frames_stay_zero(name, batch):
    net, x_t, t, cond = scene(name, batch)
    whole = net.velocity(x_t, t, cond)
    assert not (whole * ~cond.mask[..., None]).any()
    assert not torch.equal(net.velocity(x_t, t, cond._replace(tokens=cond.tokens.flip(0))), whole)
    prompt = torch.zeros_like(cond.prompt)
    prompt[:, :10] = 1.0
    changed = not torch.equal(net.velocity(x_t, t, cond._replace(prompt=prompt)), whole)
    assert changed == (name != "matcha")  # which takes no prompt
    mel = sample(net, cond, nfe=2, cfg_scale=2.0)
    assert torch.isfinite(mel).all() and not (mel * ~cond.mask[..., None]).any()


@pytest.mark.parametrize("name", INSTALLED)
def test_probe_then_intervene(name, tiny_config, tmp_path):
    """Both phases, selection, a branch with fixed layers, resume, and the checkpoint read back and probed."""
    config = replace(tiny_config, backbone=name, n_layer=8, batch_size=3)
    run = train.train(config, common.Machine(0, 1, "cpu", "float32"))
    assert run.step == config.max_steps and all(len(s) == 3 for s in run.objective.selection)
    warmup = str(Path(config.out_dir) / "phase1.pt")
    other = replace(config, branch_from=warmup, align="fixed", align_layers=(1, 2), out_dir=str(tmp_path / "shallow"))
    assert list(train.train(other, common.Machine(0, 1, "cpu", "float32")).objective.selection[0]) == [1, 2]
    train.export(run)
    for file in ("ckpt.pt", "model.safetensors"):
        state, _ = common.load(Path(config.out_dir) / file)
        loaded = backbones.load_model(state)
        for (k, a), (_, b) in zip(loaded.state_dict().items(), run.ema.state_dict().items(), strict=True):
            assert torch.equal(a, b), k
    batch = data.fixed_batch(data.Dataset(config.data_dir, "train"), 2, 0, 60)
    result = probe.probe(loaded, batch, 2, 0.5)
    assert len(result["speech"]["foga"]) == 8


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
    other = {
        "initted": torch.tensor(True),
        "step": torch.tensor(7),
        "ema_model.mel_spec.mel_stft.window": torch.ones(3),
    }
    own = {f"ema_model.transformer.{k}": v.contiguous() for k, v in net.state_dict().items()}
    safetensors.torch.save_file(own | other, tmp_path / "f5.safetensors")
    torch.save({"ema_model_state_dict": own | other}, tmp_path / "f5.pt")
    return net, tmp_path


@torch.no_grad()
def test_published_weights_are_the_published_network(published_f5, batch):
    """Both file formats, against the network itself called on each clip alone, with its text as characters."""
    net, folder = published_f5
    texts = ["please hold", "a very long text that has many more characters than the clip has frames, " * 2, "", "Ok!"]
    utils = backbones.package("f5tts", "f5_tts.model.utils")
    vocabulary = Path(utils.__file__).parents[1] / "infer" / "examples" / "vocab.txt"
    place = {line.removesuffix("\n"): i for i, line in enumerate(vocabulary.open(encoding="utf-8"))}
    for file in ("f5.safetensors", "f5.pt"):
        model = backbones.published("f5tts", str(folder / file), (("whisper", 12), ("aisfx", 10))).eval()
        spelt = model.spell(batch, texts)
        cond = model.embed_condition(spelt)
        x_t, t = torch.randn(batch.mel.shape), torch.linspace(0.1, 0.9, len(texts))
        v = model.velocity(x_t, t, cond)
        for i, n in enumerate(batch.frames.tolist()):
            text = torch.tensor([[place.get(c, 0) for c in texts[i]]], dtype=torch.long)
            prompt = batch.mel[i : i + 1, :n] * (torch.arange(n) < batch.prompt[i])[None, :, None]
            alone = net(x_t[i : i + 1, :n], prompt, text, t[i : i + 1])
            torch.testing.assert_close(v[i : i + 1, :n], alone, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(model.normalise(batch.mel), batch.mel.clamp_min(math.log(1e-5)), atol=1e-4, rtol=0)
        naive = backbones.FlowModel.ablated(model, x_t, t, cond)
        torch.testing.assert_close(model.ablated(x_t, t, cond), naive, atol=1e-4, rtol=1e-3)


def test_published_weights_are_probed(published_f5, tiny_config, tmp_path, capsys):
    _, folder = published_f5
    args = probe.ProbeArgs(
        backbone="f5tts", weights=str(folder / "f5.safetensors"), data_dir=tiny_config.data_dir, clips=2, times=2,
        out_dir=str(tmp_path / "probe"), device="cpu",
    )  # fmt: skip
    probe.main(args)
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
        ("", "any", "say which, --backbone=f5tts"),
    ):
        with pytest.raises(ValueError, match=what):
            backbones.published(name, str(tmp_path / file), ())


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="backbone=f5tts needs f5-tts .*--no-deps -r requirements-backbones.txt"):
        backbones.package("f5tts", "f5_tts_that_is_not_there.dit")
    with pytest.raises(ValueError, match="reads one token stream: pass --beats_tokens=false"):
        backbones.build("f5tts", replace(SHAPE, second_codes=4))
