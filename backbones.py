"""Other people's velocity models behind the methods of our own: F5-TTS, Voicebox, CosyVoice, Matcha (tables 4 and 5).

    pip install --no-deps -r requirements-backbones.txt
    python probe.py --backbone f5tts --random_init
    python probe.py --backbone f5tts --weights F5TTS_v1_Base/model_1250000.safetensors
    python train.py config/f5tts_demo.py

The packages are used as they were published. What is ours: a token table where they have none, the mel's statistics,
BiT-C's projections, and hooks that close a layer, read a hidden state, or let a batch grow, all taken off again.
B clips, T frames, M mel bins, D width, L layers.
"""

import contextlib
import importlib.resources
import pickle
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import audio
from common import DataError
from data import Batch
from model import Condition, DiT, DiTConfig, FlowModel


class Gate(NamedTuple):
    """A module, and what its output becomes when its layer is closed. input: its own first input, for a residual block;
    zero: zeros, for a branch whose output is added to a skip that stays."""

    module: nn.Module
    closed: str  # input | zero

    def hook(self, module, args, kwargs, output) -> Tensor:
        return torch.zeros_like(output) if self.closed == "zero" else (args or list(kwargs.values()))[0]


def close(layer: Sequence[Gate]) -> list[RemovableHandle]:
    """Closes a layer until the handles that are returned are removed: its contribution is exactly nothing."""
    return [gate.module.register_forward_hook(gate.hook, with_kwargs=True) for gate in layer]


@contextlib.contextmanager
def held(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Removes the handles at the end, whatever happens inside."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Backbone(FlowModel):
    """A published network as a FlowModel. A subclass has

    build() -> the network, which becomes `net`
    run(x_t, t, cond) -> v (B, T, M), one call of the network
    tokens, its table of codes; layers, the gates of each of L layers; inputs, the modules that h_0 .. h_L go into
    """

    name, pip = "", ""
    unused: Sequence[str] = ()  # modules that the package imports and a velocity model never calls

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        if config.second_codes:
            raise ValueError(f"backbone={self.name} reads one token stream: pass --beats_tokens=false")
        self.net = self.build()
        if len(self.layers) != config.n_layer:
            raise ValueError(f"n_layer={config.n_layer}: a {self.name} of this kind has {len(self.layers)} layers")

    @property
    def blocks(self) -> nn.ModuleList:
        """The modules of each layer, for their gradients."""
        return nn.ModuleList(nn.ModuleList(g.module for g in layer) for layer in self.layers)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Condition, gates: Sequence[float] | None = None, hidden=False):
        """As DiT.velocity; a gate is 0 or 1."""
        if any(g not in (0, 1) for g in gates or ()):
            raise ValueError("the gates of a published model are open (1) or closed (0)")
        states, handles = [], []
        for layer, gate in zip(self.layers, gates or [1] * len(self.layers), strict=True):
            handles += [] if gate else close(layer)
        handles += self.readers(states, x_t.shape[1]) if hidden else []  # after: they read what a closed layer gives
        with held(handles):
            v = self.run(x_t, t, cond) * cond.mask[..., None]
        return (v.float(), states) if hidden else v.float()

    def readers(self, states: list[Tensor], T: int) -> list[RemovableHandle]:
        """Hooks that append h_0 .. h_L, (B, T, D) each, to `states` in a call of run()."""
        return [m.register_forward_pre_hook(lambda _, args: states.append(args[0][:, -T:])) for m in self.inputs]

    def reset_parameters(self) -> None:
        self.init_projections()
        for module in (m for m in self.children() if hasattr(m, "reset_parameters")):  # ours beside the network
            module.reset_parameters()
        self.net = self.build().to(self.mel_mean.device)
        for p in self.net.parameters():
            if p.dim() > 1 and not p.any():
                nn.init.xavier_uniform_(p)


class F5TTS(Backbone):
    """f5_tts.model.backbones.dit.DiT. Its text table holds our codes (row 0 is its filler); their embedding, stretched
    to the mel's rate, takes the place of its text embedding. A dropped condition is zeros."""

    name, pip, one_sweep = "f5tts", "f5-tts", True
    unused = ("f5_tts.model.trainer", "librosa", "librosa.filters")
    text_dim, text_layers = 0, 0  # of its text embedding; 0: width D, and no layers
    tokens = property(lambda self: self.net.text_embed.text_embed)
    layers = property(lambda self: [[Gate(block, "input")] for block in self.net.transformer_blocks])
    inputs = property(lambda self: [*self.net.transformer_blocks, self.net.norm_out])

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.code_offset += 1  # past the filler

    def build(self) -> nn.Module:
        c, dit = self.config, package(self.name, "f5_tts.model.backbones.dit").DiT
        size = {"dim": c.n_embd, "depth": c.n_layer, "heads": c.n_head, "dim_head": c.n_embd // c.n_head}
        size |= {"ff_mult": c.ff_mult, "mel_dim": c.n_mels, "dropout": c.dropout, "attn_mask_enabled": True}
        size |= {"text_num_embeds": sum(c.codes), "text_dim": self.text_dim or c.n_embd}
        return dit(**size, conv_layers=self.text_layers)

    def run(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        text = torch.zeros(len(x_t), 1, dtype=torch.long, device=x_t.device)
        given = cond.tokens[..., : self.text_dim or None]
        with held([self.net.text_embed.register_forward_hook(lambda module, args, out: given)]):
            return self.net(x_t, cond.prompt, text, t, mask=cond.mask)

    def ablated(self, x_t: Tensor, t: Tensor, cond: Condition, updates: Sequence[Tensor] | None = None) -> Tensor:
        """The growing batch of DiT.ablated, by hooks: after each block the state that skipped it joins."""
        B, blocks = len(x_t), self.net.transformer_blocks

        def widen(module, args, kwargs):  # time and mask follow the batch
            (h, time), n = args, len(args[0]) // B
            if "mask" in kwargs:
                kwargs["mask"] = kwargs["mask"].repeat(n, 1)
            return (h, time.repeat(n, 1)), kwargs

        def join(module, args, out, update=0):
            return torch.cat([out, args[0][:B] + update])

        handles = [m.register_forward_pre_hook(widen, with_kwargs=True) for m in self.inputs]
        joins = [join] * len(blocks) if updates is None else [partial(join, update=u) for u in updates]
        handles += [b.register_forward_hook(hook) for b, hook in zip(blocks, joins, strict=True)]
        with held(handles):
            v = self.run(x_t, t, cond).unflatten(0, (len(blocks) + 1, B))
        return (v * cond.mask[..., None]).float()


class PublishedF5TTS(F5TTS):
    """F5-TTS v1 with its published weights. It reads the characters of a clip's text through its own text layers, so a
    batch goes through `spell` first; it was trained with noise of spread 1 on mels without statistics."""

    def __init__(self, weights: dict[str, Tensor], teachers: Sequence[tuple[str, int]]):
        rows, self.text_dim = weights["text_embed.text_embed.weight"].shape
        self.text_layers = sum(key.endswith(".dwconv.weight") for key in weights)
        depth = sum(key.endswith(".attn.to_q.weight") for key in weights)
        hidden, D = weights["transformer_blocks.0.ff.ff.0.0.weight"].shape
        size = {"n_layer": depth, "n_head": D // 64, "n_embd": D, "ff_mult": hidden // D}
        super().__init__(DiTConfig(**size, dropout=0.0, codes=(rows - 1,), teachers=teachers))
        self.net.load_state_dict(weights)

    def spell(self, batch: Batch, texts: Sequence[str]) -> Batch:
        """The batch with each clip's characters, pinyin for Chinese, by the package's vocabulary as its tokens."""
        utils = package(self.name, "f5_tts.model.utils")
        vocabulary = importlib.resources.files("f5_tts") / "infer/examples/vocab.txt"
        table, size = utils.get_tokenizer(str(vocabulary), "custom")
        if size != sum(self.config.codes):
            raise ValueError(f"the weights have {sum(self.config.codes)} characters, f5-tts's vocabulary has {size}")
        tokens = utils.list_str_to_idx(utils.convert_char_to_pinyin(list(texts)), table)  # (B, N), -1 on padding
        return replace(batch, tokens=tokens.to(batch.mel.device), token_len=(tokens >= 0).sum(1).to(batch.mel.device))

    def tokens_at_frames(self, batch: Batch) -> Tensor:
        """Its text embedding, with zeros up to width D: a character a frame, then fillers, as it was trained. A clip at
        a time, because its text layers' normalisation over time would count padding."""
        e = batch.mel.new_zeros(*batch.mel.shape[:2], self.config.n_embd)
        for b, n in enumerate(batch.frames.tolist()):
            e[b, :n, : self.text_dim] = self.net.text_embed(batch.tokens[b : b + 1], seq_len=n)[0]
        return e


class Voicebox(Backbone):
    """voicebox_pytorch.VoiceBox, conditioned on token ids: its own table holds our codes, and its place in the network
    is given their embedding, stretched to the mel's rate. Its layers run in order, but their residual sums are outside
    its modules, so hooks cannot let a batch grow between them."""

    name, pip = "voicebox", "voicebox-pytorch"
    unused = ["voicebox_pytorch.trainer", "audiolm_pytorch", "spear_tts_pytorch", "naturalspeech2_pytorch"]
    unused += [f"naturalspeech2_pytorch.{m}" for m in "aligner utils utils.tokenizer naturalspeech2_pytorch".split()]
    tokens = property(lambda self: self.net.to_cond_emb)
    layers = property(lambda self: [[Gate(x[3], "zero"), Gate(x[5], "zero")] for x in self.net.transformer.layers])
    inputs = property(lambda self: [*(x[2] for x in self.net.transformer.layers), self.net.transformer.final_norm])

    def build(self) -> nn.Module:
        c, box = self.config, package(self.name, "voicebox_pytorch.voicebox_pytorch").VoiceBox
        size = {"dim": c.n_embd, "depth": c.n_layer, "heads": c.n_head, "dim_head": c.n_embd // c.n_head}
        size |= {"num_cond_tokens": sum(c.codes), "dim_cond_emb": c.n_embd, "dim_in": c.n_mels}
        return box(**size, ff_mult=c.ff_mult, ff_dropout=c.dropout)

    def run(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        ids = torch.zeros(x_t.shape[:2], dtype=torch.long, device=x_t.device)
        given = torch.zeros_like(cond.mask)  # nothing more of the prompt is hidden: it ends in zeros already
        options = {"cond": cond.prompt, "cond_mask": given, "self_attn_mask": cond.mask, "cond_drop_prob": 0.0}
        with held([self.net.to_cond_emb.register_forward_hook(lambda module, args, out: cond.tokens)]):
            return self.net(x_t, times=t, cond_token_ids=ids, **options)


class Matcha(Backbone):
    """matcha.models.components.decoder.Decoder: a U-net whose layers are its resnets and its transformer blocks, twelve
    with two stages. Ours: a token table, and a linear map of its embedding to the M channels of `mu`. A hidden state at
    half the frame rate is repeated."""

    name, pip = "matcha", "cosyvoice2-eu"  # which brings matcha along
    decoder, stacked = "matcha.models.components.decoder:Decoder", 2  # how many mels are its input

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.tokens = nn.Embedding(sum(config.codes), config.n_embd)
        self.to_mu = nn.Linear(config.n_embd, config.n_mels)

    def build(self) -> nn.Module:
        c, (module, decoder) = self.config, self.decoder.split(":")
        size = {"in_channels": self.stacked * c.n_mels, "out_channels": c.n_mels, "channels": (c.n_embd, c.n_embd)}
        size |= {"num_heads": c.n_head, "attention_head_dim": c.n_embd // c.n_head, "dropout": c.dropout}
        size |= {"num_mid_blocks": max(0, c.n_layer - 8) // 2, "act_fn": "snakebeta"}
        return getattr(package(self.name, module), decoder)(**size)

    @property
    def blocks(self) -> nn.ModuleList:
        """Resnets and transformer blocks in the order in which they run; of a resnet a gate closes the branch alone."""
        parts = (*self.net.down_blocks, *self.net.mid_blocks, *self.net.up_blocks)
        return nn.ModuleList(unit for part in parts for unit in (part[0], *part[1]))

    @property
    def layers(self) -> list[list[Gate]]:
        return [[Gate(u.block2, "zero") if hasattr(u, "res_conv") else Gate(u, "input")] for u in self.blocks]

    def run(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        T, room = x_t.shape[1], -x_t.shape[1] % 4  # the U-net halves the frames
        mu = self.to_mu(cond.tokens) * cond.mask[..., None]
        mask = cond.mask[..., None].to(x_t.dtype)
        x, mask, mu, prompt = (F.pad(y.transpose(1, 2), (0, room)) for y in (x_t, mask, mu, cond.prompt))  # (B, M, T)
        more = (x.new_zeros(len(x), x.shape[1]), prompt) if self.stacked == 4 else ()  # no speaker's vector
        return self.net(x, mask, mu, t, *more).transpose(1, 2)[:, :T]

    def readers(self, states: list[Tensor], T: int) -> list[RemovableHandle]:
        def keep(module, args, out):
            h = out.transpose(1, 2) if hasattr(module, "res_conv") else out
            h = h.repeat_interleave((T + -T % 4) // h.shape[1], 1)[:, :T]
            states.extend([h] if states else [torch.zeros_like(h), h])  # h_0 is not needed: z_0 is the tokens

        return [block.register_forward_hook(keep) for block in self.blocks]


class CosyVoice(Matcha):
    """cosyvoice.flow.decoder.ConditionalDecoder: Matcha's U-net with the prompt as a condition."""

    name = "cosyvoice"
    decoder, stacked = "cosyvoice.flow.decoder:ConditionalDecoder", 4


BACKBONES = {b.name: b for b in (F5TTS, Voicebox, CosyVoice, Matcha)}


def package(name: str, module: str) -> types.ModuleType:
    """A module of a backbone's package, imported with stand-ins, in which every name is an empty class, for what it
    never calls (trainers, recognisers, codecs). Raises DataError with the pip line when the package is not there."""

    def anything(wanted: str) -> type:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return type(wanted, (), {})

    audio.torchaudio()
    stand_ins = {other: types.ModuleType(other) for other in BACKBONES[name].unused if other not in sys.modules}
    for stand_in in stand_ins.values():
        stand_in.__getattr__ = anything
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = "pip install --no-deps -r requirements-backbones.txt"
        raise DataError(f"backbone={name} needs {BACKBONES[name].pip} ({error}): {install}") from error
    finally:
        for other in stand_ins:
            del sys.modules[other]


def build(name: str, config: DiTConfig) -> FlowModel:
    """The model called `name`, our own for "". Raises DataError for one whose package is not installed."""
    return BACKBONES[name](config) if name else DiT(config)


def published(name: str, path: str, teachers: Sequence[tuple[str, int]]) -> PublishedF5TTS:
    """The backbone with the weights that its project publishes. Raises ValueError for a file that is not that, and for
    projects whose weights do not fit our mel."""
    if name != "f5tts":
        why = "its project publishes none" if name == "voicebox" else "they are for 80-bin mels at 22.05 kHz"
        raise ValueError(f"weights of backbone {name!r} cannot be used: {why}; pass --backbone=f5tts and its weights")
    try:
        if Path(path).suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)["ema_model_state_dict"]
        weights = {k.split("transformer.", 1)[1]: v.float() for k, v in tensors.items() if "transformer." in k}
        return PublishedF5TTS(weights, teachers)
    except DataError:  # the package is missing
        raise
    except FileNotFoundError:
        raise ValueError(f"weights={path}: no such file") from None
    except (KeyError, RuntimeError, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"weights={path} are not F5-TTS v1's: {' '.join(str(error).split())[:200]}") from error


def load_model(state: dict, ema: bool = True, device: str = "cpu") -> FlowModel:
    """The model of a checkpoint's state, in eval mode; the averaged weights unless ema=False."""
    loaded = build(state["config"]["backbone"], DiTConfig(**state["model_config"]))
    loaded.load_state_dict(state["ema" if ema else "model"])
    return loaded.to(device).eval()
