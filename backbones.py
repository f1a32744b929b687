"""Other people's velocity models behind the methods of our own: F5-TTS, Voicebox, CosyVoice, Matcha (tables 4 and 5).

    pip install --no-deps -r requirements-backbones.txt
    python probe.py --backbone f5tts --random_init
    python probe.py --backbone f5tts --weights F5TTS_v1_Base/model_1250000.safetensors
    python train.py config/f5tts_demo.py

The packages are used as they were published. What is ours: a token table where they have none, the mel's statistics,
BiT-C's projections, and hooks that close a layer, read a hidden state, or let a batch grow, all taken off again.

A layer is a list of gates: (module, what its output becomes when the layer is closed). "input": its own first input,
for a residual block; "zero": zeros, for a branch whose output is added to a skip that stays.

B clips, T frames, M mel bins, D width, L layers.
"""

import contextlib
import copy
import importlib.resources
import pickle
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import audio
import data
import model
from model import Condition, DiTConfig, FlowModel

INSTALL = "pip install --no-deps -r requirements-backbones.txt"


class NotInstalled(ValueError):
    """A backbone's package is missing."""


class Gate(NamedTuple):
    module: nn.Module
    closed: str  # input | zero


def close(layer: Sequence[Gate]) -> list[torch.utils.hooks.RemovableHandle]:
    """Closes a layer until the handles that are returned are removed: its contribution is exactly nothing."""

    def hook(kind: str):
        def closed(module, args, kwargs, output):
            return torch.zeros_like(output) if kind == "zero" else (args or list(kwargs.values()))[0]

        return closed

    return [g.module.register_forward_hook(hook(g.closed), with_kwargs=True) for g in layer]


@contextlib.contextmanager
def held(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Removes the handles at the end, whatever happens inside."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Backbone(FlowModel):
    """A published network as a FlowModel. A subclass builds `net` and lists `layers`, calls it in `run`, and says in
    `readers` where its hidden states are."""

    name, pip = "", ""
    tokens: nn.Embedding  # the net's own table where it has one

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        if config.second_codes:
            raise ValueError(f"backbone={self.name} reads one token stream: pass --beats_tokens=false")
        self.net = self.build()
        if len(self.layers) != config.n_layer:
            raise ValueError(f"n_layer={config.n_layer}: a {self.name} of this kind has {len(self.layers)} layers")

    def build(self) -> nn.Module:
        raise NotImplementedError

    @property
    def layers(self) -> list[list[Gate]]:
        """The gates of each of the L layers."""
        raise NotImplementedError

    def run(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """One call of the published network: v (B, T, M)."""
        raise NotImplementedError

    def readers(self, states: list, T: int) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks that append h_0 .. h_L, (B, T, D) each, to `states` in a call of run()."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The modules of each layer, for their gradients."""
        return nn.ModuleList(nn.ModuleList(g.module for g in layer) for layer in self.layers)

    def velocity(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
        gates: Sequence[float] | None = None,
        hidden: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """As DiT.velocity; a gate is 0 or 1."""
        if any(g not in (0, 1) for g in gates or ()):
            raise ValueError("the gates of a published model are open (1) or closed (0)")
        states: list[torch.Tensor] = []
        handles: list[torch.utils.hooks.RemovableHandle] = []
        for layer, gate in zip(self.layers, gates or [1] * len(self.layers), strict=True):
            handles += [] if gate else close(layer)
        handles += self.readers(states, x_t.shape[1]) if hidden else []  # after: they read what a closed layer gives
        with held(handles):
            v = self.run(x_t, t, cond) * cond.mask[..., None]
        return (v.float(), states) if hidden else v.float()

    def reset_parameters(self) -> None:
        self.init_projections()
        for module in (m for m in self.children() if hasattr(m, "reset_parameters")):  # ours beside the network
            module.reset_parameters()
        self.net = self.build().to(self.mel_mean.device)
        for p in self.net.parameters():
            if p.dim() > 1 and not p.any():
                nn.init.xavier_uniform_(p)


# ---- the four


class F5TTS(Backbone):
    """f5_tts.model.backbones.dit.DiT. Its text table holds our codes (row 0 is its filler); their embedding, stretched
    to the mel's rate, takes the place of its text embedding. A dropped condition is zeros."""

    name, pip = "f5tts", "f5-tts"
    one_sweep = True

    def build(self) -> nn.Module:
        s = self.config
        dit = package(self.name, "f5_tts.model.backbones.dit").DiT
        size = {"dim": s.n_embd, "depth": s.n_layer, "heads": s.n_head, "dim_head": s.n_embd // s.n_head}
        size |= {"ff_mult": s.ff_mult, "mel_dim": s.n_mels, "dropout": s.dropout, "attn_mask_enabled": True}
        return dit(**size, **self.text())

    def text(self) -> dict:
        return {"text_num_embeds": sum(self.config.codes), "text_dim": self.config.n_embd}

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.code_offset += 1  # past the filler

    @property
    def tokens(self) -> nn.Embedding:
        return self.net.text_embed.text_embed

    @property
    def layers(self) -> list[list[Gate]]:
        return [[Gate(block, "input")] for block in self.net.transformer_blocks]

    def run(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        text = torch.zeros(len(x_t), 1, dtype=torch.long, device=x_t.device)
        given = cond.tokens[..., : self.text()["text_dim"]]
        with held([self.net.text_embed.register_forward_hook(lambda module, args, out: given)]):
            return self.net(x_t, cond.prompt, text, t, mask=cond.mask)

    def readers(self, states: list, T: int) -> list[torch.utils.hooks.RemovableHandle]:
        blocks = self.net.transformer_blocks
        first = blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
        return [first, *(b.register_forward_hook(lambda module, args, out: states.append(out)) for b in blocks)]

    def ablated(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """The growing batch of DiT.ablated, by hooks: after each block the state that skipped it joins."""
        B, blocks = len(x_t), self.net.transformer_blocks

        def widen(module, args, kwargs):
            n = len(args[0]) // B  # time and mask follow the batch

            def wide(x):
                return x.repeat(n, *(1,) * (x.dim() - 1)) if isinstance(x, torch.Tensor) else x

            return (args[0], *map(wide, args[1:])), {k: wide(v) if k == "mask" else v for k, v in kwargs.items()}

        def grow(module, args, out):
            return torch.cat([out, args[0][:B]])

        handles = [m.register_forward_pre_hook(widen, with_kwargs=True) for m in (*blocks, self.net.norm_out)]
        handles += [b.register_forward_hook(grow) for b in blocks]
        with held(handles):
            v = self.run(x_t, t, cond).unflatten(0, (len(blocks) + 1, B))
        return (v * cond.mask[..., None]).float()


class PublishedF5TTS(F5TTS):
    """F5-TTS v1 with its published weights. It reads the characters of a clip's text through its own text layers, so a
    batch goes through `spell` first; it was trained with noise of spread 1 on mels without statistics."""

    def __init__(self, weights: dict[str, torch.Tensor], teachers: Sequence[tuple[str, int]]):
        def count(name: str) -> int:
            return len({key.split(".")[name.count(".") + 1] for key in weights if key.startswith(f"{name}.")})

        rows, self.text_dim = weights["text_embed.text_embed.weight"].shape
        self.text_layers = count("text_embed.text_blocks")
        hidden, D = weights["transformer_blocks.0.ff.ff.0.0.weight"].shape
        size = {"n_layer": count("transformer_blocks"), "n_head": D // 64, "n_embd": D, "ff_mult": hidden // D}
        super().__init__(DiTConfig(**size, dropout=0.0, codes=(rows - 1,), teachers=tuple(teachers)))
        self.net.load_state_dict(weights)

    def text(self) -> dict:
        return {"text_num_embeds": sum(self.config.codes), "text_dim": self.text_dim, "conv_layers": self.text_layers}

    def spell(self, batch: data.Batch, texts: Sequence[str]) -> data.Batch:
        """The batch with each clip's characters, pinyin for Chinese, by the package's vocabulary as its tokens."""
        utils = package(self.name, "f5_tts.model.utils")
        vocabulary = importlib.resources.files("f5_tts") / "infer/examples/vocab.txt"
        table, size = utils.get_tokenizer(str(vocabulary), "custom")
        if size != sum(self.config.codes):
            raise ValueError(f"the weights have {sum(self.config.codes)} characters, f5-tts's vocabulary has {size}")
        tokens = utils.list_str_to_idx(utils.convert_char_to_pinyin(list(texts)), table)  # (B, N), -1 on padding
        return replace(batch, tokens=tokens.to(batch.mel.device), token_len=(tokens >= 0).sum(1).to(batch.mel.device))

    def tokens_at_frames(self, batch: data.Batch) -> torch.Tensor:
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

    def build(self) -> nn.Module:
        s = self.config
        box = package(self.name, "voicebox_pytorch.voicebox_pytorch").VoiceBox
        size = {"dim": s.n_embd, "depth": s.n_layer, "heads": s.n_head, "dim_head": s.n_embd // s.n_head}
        tokens = {"num_cond_tokens": sum(s.codes), "dim_cond_emb": s.n_embd, "dim_in": s.n_mels}
        return box(**size, **tokens, ff_mult=s.ff_mult, ff_dropout=s.dropout)

    @property
    def tokens(self) -> nn.Embedding:
        return self.net.to_cond_emb

    @property
    def layers(self) -> list[list[Gate]]:
        return [[Gate(layer[3], "zero"), Gate(layer[5], "zero")] for layer in self.net.transformer.layers]

    def run(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        ids = torch.zeros(x_t.shape[:2], dtype=torch.long, device=x_t.device)
        given = torch.zeros_like(cond.mask)  # nothing more of the prompt is hidden: it ends in zeros already
        options = {"cond": cond.prompt, "cond_mask": given, "self_attn_mask": cond.mask, "cond_drop_prob": 0.0}
        with held([self.net.to_cond_emb.register_forward_hook(lambda module, args, out: cond.tokens)]):
            return self.net(x_t, times=t, cond_token_ids=ids, **options)

    def readers(self, states: list, T: int) -> list[torch.utils.hooks.RemovableHandle]:
        norms = [layer[2] for layer in self.net.transformer.layers] + [self.net.transformer.final_norm]
        return [n.register_forward_pre_hook(lambda module, args: states.append(args[0][:, -T:])) for n in norms]


class Matcha(Backbone):
    """matcha.models.components.decoder.Decoder: a U-net whose layers are its resnets and its transformer blocks, twelve
    with two stages. Ours: a token table, and a linear map of its embedding to the M channels of `mu`. A hidden state at
    half the frame rate is repeated."""

    name, pip = "matcha", "cosyvoice2-eu"  # which brings matcha along

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.tokens = nn.Embedding(sum(config.codes), config.n_embd)
        self.to_mu = nn.Linear(config.n_embd, config.n_mels)

    def build(self) -> nn.Module:
        return package(self.name, "matcha.models.components.decoder").Decoder(**self.size(2))

    def size(self, inputs: int) -> dict:
        s = self.config
        channels = {"in_channels": inputs * s.n_mels, "out_channels": s.n_mels, "channels": (s.n_embd, s.n_embd)}
        heads = {"num_heads": s.n_head, "attention_head_dim": s.n_embd // s.n_head}
        middle = {"num_mid_blocks": max(0, s.n_layer - 8) // 2}
        return {**channels, **heads, **middle, "dropout": s.dropout, "act_fn": "snakebeta"}

    def stages(self) -> list[nn.Module]:
        """The resnets and transformer blocks in the order in which they run."""
        parts = (*self.net.down_blocks, *self.net.mid_blocks, *self.net.up_blocks)
        return [unit for part in parts for unit in (part[0], *part[1])]

    @property
    def layers(self) -> list[list[Gate]]:
        return [
            [Gate(unit.block2, "zero") if hasattr(unit, "res_conv") else Gate(unit, "input")] for unit in self.stages()
        ]

    @property
    def blocks(self) -> nn.ModuleList:
        return nn.ModuleList(self.stages())  # whole resnets, of which a gate closes the branch alone

    def inputs(self, x: torch.Tensor, mask: torch.Tensor, mu: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor):
        return x, mask, mu, t

    def run(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        T, room = x_t.shape[1], -x_t.shape[1] % 4  # the U-net halves the frames

        def channels_first(x: torch.Tensor) -> torch.Tensor:
            return F.pad(x.transpose(1, 2), (0, room))

        mask = F.pad(cond.mask[:, None].to(x_t.dtype), (0, room))
        mu = self.to_mu(cond.tokens) * cond.mask[..., None]
        x, mu, prompt = (channels_first(x) for x in (x_t, mu, cond.prompt))
        return self.net(*self.inputs(x, mask, mu, t, prompt)).transpose(1, 2)[:, :T]

    def readers(self, states: list, T: int) -> list[torch.utils.hooks.RemovableHandle]:
        wanted, D = T + -T % 4, self.config.n_embd

        def keep(module, args, kwargs, out):
            h = out.transpose(1, 2) if hasattr(module, "res_conv") else out
            states.append(h.repeat_interleave(wanted // h.shape[1], 1)[:, :T])

        def first(module, args):
            states.append(args[0].new_zeros(len(args[0]), T, D))  # h_0 has other channels; z_0 comes from the tokens

        stages = self.stages()
        return [
            stages[0].register_forward_pre_hook(first),
            *(unit.register_forward_hook(keep, with_kwargs=True) for unit in stages),
        ]


class CosyVoice(Matcha):
    """cosyvoice.flow.decoder.ConditionalDecoder: Matcha's U-net with the prompt as a condition; no speaker vector."""

    name, pip = "cosyvoice", "cosyvoice2-eu"

    def build(self) -> nn.Module:
        return package(self.name, "cosyvoice.flow.decoder").ConditionalDecoder(**self.size(4))

    def inputs(self, x: torch.Tensor, mask: torch.Tensor, mu: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor):
        return x, mask, mu, t, x.new_zeros(len(x), self.config.n_mels), prompt


BACKBONES = {b.name: b for b in (F5TTS, Voicebox, CosyVoice, Matcha)}


# what the packages import beside their networks (trainers, recognisers, codecs) and a velocity model never calls
UNUSED = {
    "f5tts": {
        "f5_tts.model.trainer": ["Trainer"],
        "librosa": [],
        "librosa.filters": ["mel"],
    },
    "voicebox": {
        "voicebox_pytorch.trainer": ["VoiceBoxTrainer"],
        "audiolm_pytorch": ["EncodecWrapper", "HubertWithKmeans"],
        "spear_tts_pytorch": ["TextToSemantic"],
        "naturalspeech2_pytorch": [],
        "naturalspeech2_pytorch.aligner": ["Aligner", "ForwardSumLoss", "BinLoss", "maximum_path"],
        "naturalspeech2_pytorch.utils": [],
        "naturalspeech2_pytorch.utils.tokenizer": ["Tokenizer"],
        "naturalspeech2_pytorch.naturalspeech2_pytorch": ["generate_mask_from_repeats"],
    },
    "cosyvoice": {},
    "matcha": {},
}


def package(name: str, module: str) -> types.ModuleType:
    """A module of a backbone's package, imported with empty classes in the place of what UNUSED lists. Raises
    NotInstalled with the pip line when the package is not there."""
    audio.torchaudio()
    empty = {other: types.ModuleType(other) for other in UNUSED[name] if other not in sys.modules}
    for other, stand_in in empty.items():
        stand_in.__dict__.update({n: type(n, (), {}) for n in UNUSED[name][other]})
    sys.modules.update(empty)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalled(f"backbone={name} needs {BACKBONES[name].pip} ({error}): {INSTALL}") from error
    finally:
        for other in empty:
            del sys.modules[other]


def build(name: str, config: DiTConfig) -> FlowModel:
    """The model called `name`, our own for "". Raises ValueError for one whose package is not installed."""
    return BACKBONES[name](config) if name else model.DiT(config)


def published(name: str, path: str, teachers: Sequence[tuple[str, int]]) -> PublishedF5TTS:
    """The backbone with the weights that its project publishes. Raises ValueError for a file that is not that, and for
    projects whose weights do not fit our mel."""
    if not name:
        raise ValueError("weights are read into a published model: say which, --backbone=f5tts")
    if name != "f5tts":
        reason = "its project publishes none" if name == "voicebox" else "they are for 80-bin mels at 22.05 kHz"
        raise ValueError(f"weights of backbone {name!r} cannot be used: {reason}; backbone f5tts has weights that can")
    try:
        if Path(path).suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)["ema_model_state_dict"]
        own = {k.split("transformer.", 1)[1]: v.float() for k, v in tensors.items() if "transformer." in k}
        return PublishedF5TTS(own, teachers)
    except FileNotFoundError:
        raise ValueError(f"weights={path}: no such file") from None
    except (KeyError, RuntimeError, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"weights={path} are not F5-TTS v1's: {' '.join(str(error).split())[:200]}") from error


def load_model(state: dict, ema: bool = True, device: str = "cpu") -> FlowModel:
    """The model of a checkpoint's state, in eval mode; the averaged weights unless ema=False."""
    sizes = copy.deepcopy(state["model_config"])
    sizes["codes"], sizes["teachers"] = tuple(sizes["codes"]), tuple((n, e) for n, e in sizes["teachers"])
    loaded = build(state["config"]["backbone"], DiTConfig(**sizes))
    loaded.load_state_dict(state["ema" if ema else "model"])
    return loaded.to(device).eval()
