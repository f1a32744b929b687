"""Other people's velocity models behind the methods of our own: F5-TTS, Voicebox, CosyVoice, Matcha (tables 4 and 5),
and yours (examples/my_model.py).

    python probe.py --backbone f5tts_text --random_init --init_from F5TTS_v1_Base/model_1250000.safetensors
    python train.py config/f5tts_demo.py
    python probe.py --backbone=my_model.py:MyModel --random_init --check       # or package.module:Class

The packages are used as they are. Ours: a token table where they have none, the mel's statistics, BiT-C's projections,
and hooks, taken off again, that close a layer, read a state, or let a batch grow. B clips, T frames, M bins, D width.
"""

import contextlib
import importlib.resources
import inspect
import runpy
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import audio
import common
from common import DataError
from data import Batch
from model import Condition, DiT, DiTConfig, FlowModel


class Gate(NamedTuple):
    """A module, and what its output becomes when its layer is closed."""

    module: nn.Module
    closed: str  # input: its own first input, for a residual block; zero, for a branch that is added to a skip

    def hook(self, module, args, kwargs, output) -> Tensor:
        if self.closed == "zero":
            return torch.zeros_like(output)
        given = [*args, *kwargs.values()][0]
        if getattr(output, "shape", None) != given.shape:
            kind = type(module).__name__
            raise ValueError(f"{kind} is no residual block: it does not return the like of its first input")
        return given


def gates_of(layers: Iterable[nn.Module | Iterable[nn.Module]]) -> list[list[Gate]]:
    """The gates of anyone's layers: of each a residual block, or the list of its branches."""
    many = (list, tuple, nn.ModuleList)
    return [[Gate(b, "zero") for b in x] if isinstance(x, many) else [Gate(x, "input")] for x in layers]


def close(layer: Sequence[Gate]) -> list[RemovableHandle]:
    """Closes a layer until the handles that are returned are removed: its contribution is exactly nothing."""
    return [gate.module.register_forward_hook(gate.hook, with_kwargs=True) for gate in layer]


def held(handles: Sequence[RemovableHandle]) -> contextlib.ExitStack:
    """A context at whose end the handles are removed, whatever happens inside."""
    stack = contextlib.ExitStack()
    for handle in handles:
        stack.enter_context(handle)
    return stack


class Backbone(FlowModel):
    """A published network as a FlowModel. A subclass has build() -> the network, which becomes `net`; run(x_t, t, cond)
    -> v (B, T, M), a call of it; tokens, its table of codes; layers, the gates of each; inputs, where h_0 .. h_L go."""

    name, pip, fillers = "", "", 0  # rows of its table before the codes
    chained = True  # whether h_l is all that layer l + 1 reads of layer l
    unused: Sequence[str] = ()  # modules that the package imports and a velocity model never calls

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        if config.second_codes:
            raise ValueError(f"backbone={self.name} reads one token stream: pass --beats_tokens=false")
        self.net = self.build()
        self.code_offset += self.fillers
        if len(self.layers) != config.n_layer:
            raise ValueError(f"n_layer={config.n_layer}: a {self.name} of this kind has {len(self.layers)} layers")

    # the modules of each layer, for their gradients
    blocks = property(lambda self: nn.ModuleList(nn.ModuleList(g.module for g in layer) for layer in self.layers))

    def velocity(self, x_t: Tensor, t: Tensor, cond: Condition, gates: Sequence[float] | None = None, hidden=False):
        """As DiT.velocity; a gate is 0 or 1."""
        if any(g not in (0, 1) for g in gates or ()):
            raise ValueError("the gates of a published model are open (1) or closed (0)")
        states, gates = [], gates or [1] * self.config.n_layer
        handles = [h for layer, gate in zip(self.layers, gates, strict=True) if not gate for h in close(layer)]
        handles += self.readers(states, x_t.shape[1]) if hidden else []  # after: they read what a closed layer gives
        with held(handles):
            v = self.run(x_t, t, cond) * cond.mask[..., None]
        return (v.float(), states) if hidden else v.float()

    def readers(self, states: list[Tensor], T: int) -> list[RemovableHandle]:
        """Hooks that append h_0 .. h_L, (B, T, D) each, to `states` in a call of run()."""

        def keep(module, args, kwargs):
            states.append([*args, *kwargs.values()][0][:, -T:])

        return [module.register_forward_pre_hook(keep, with_kwargs=True) for module in self.inputs]

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

    name, pip, fillers = "f5tts", "f5-tts", 1
    unused = ("f5_tts.model.trainer", "librosa", "librosa.filters")
    text_dim, text_layers, characters = 0, 0, 0  # of its text embedding; 0: D, none, a row for each code
    tokens = property(lambda self: self.net.text_embed.text_embed)
    layers = property(lambda self: gates_of(self.net.transformer_blocks))
    inputs = property(lambda self: [*self.net.transformer_blocks, self.net.norm_out])

    def build(self) -> nn.Module:
        c, dit = self.config, package(self.name, "f5_tts.model.backbones.dit").DiT
        size = {"dim": c.n_embd, "depth": c.n_layer, "heads": c.n_head, "dim_head": c.n_embd // c.n_head}
        size |= {"ff_mult": c.ff_mult, "mel_dim": c.n_mels, "dropout": c.dropout, "attn_mask_enabled": True}
        size |= {"text_num_embeds": self.characters or sum(c.codes), "text_dim": self.text_dim or c.n_embd}
        return dit(**size, conv_layers=self.text_layers)

    def run(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        text, given = torch.zeros_like(cond.mask[:, :1], dtype=torch.long), cond.tokens[..., : self.text_dim or None]
        with held([self.net.text_embed.register_forward_hook(lambda module, args, out: given)]):
            return self.net(x_t, cond.prompt, text, t, mask=cond.mask)

    def ablated(self, x_t: Tensor, t: Tensor, cond: Condition, updates: Sequence[Tensor] | None = None) -> Tensor:
        """The growing batch of DiT.ablated, by hooks: after each block the state that skipped it joins."""
        B, blocks = len(x_t), self.net.transformer_blocks

        def widen(module, args, kwargs):  # time and mask follow the batch
            (h, time), n = args, len(args[0]) // B
            return (h, time.repeat(n, 1)), kwargs | {k: mask.repeat(n, 1) for k, mask in kwargs.items() if k == "mask"}

        def join(update, module, args, out):
            return torch.cat([out, args[0][:B] + update])

        added = [0] * len(blocks) if updates is None else updates
        handles = [m.register_forward_pre_hook(widen, with_kwargs=True) for m in self.inputs]
        handles += [b.register_forward_hook(partial(join, u)) for b, u in zip(blocks, added, strict=True)]
        with held(handles):
            v = self.run(x_t, t, cond).unflatten(0, (len(blocks) + 1, B))
        return (v * cond.mask[..., None]).float()


class F5Text(F5TTS):
    """F5-TTS as published, for --init_from: it reads the letters of a clip's text (pinyin for Chinese), whole clips,
    noise of spread 1 and mels without statistics. v1 Base is n_layer=22, n_head=16, n_embd=1024, ff_mult=2."""

    name, text_layers = "f5tts_text", 4

    def __init__(self, config: DiTConfig):
        utils = package(self.name, "f5_tts.model.utils")
        vocabulary = importlib.resources.files("f5_tts") / "infer/examples/vocab.txt"
        self.rows, self.characters = utils.get_tokenizer(str(vocabulary), "custom")
        self.spell, self.to_rows = utils.convert_char_to_pinyin, utils.list_str_to_idx
        self.text_dim = config.n_embd // 2
        super().__init__(config)

    def tokens_at_frames(self, batch: Batch) -> Tensor:
        """Its text embedding, with zeros up to width D: a character a frame, then fillers; a clip at a time, because
        its text layers normalise over time."""
        rows = self.to_rows(self.spell(list(batch.texts)), self.rows).to(batch.mel.device)  # (B, N), -1 on padding
        e = batch.mel.new_zeros(*batch.mel.shape[:2], self.config.n_embd)
        for b, n in enumerate(batch.frames.tolist()):
            e[b, :n, : self.text_dim] = self.net.text_embed(rows[b : b + 1], seq_len=n)[0]
        return e


class Voicebox(Backbone):
    """voicebox_pytorch.VoiceBox, conditioned on token ids: its own table holds our codes, and in its place the network
    is given their stretched embedding. Its residual sums are outside its modules, so hooks cannot let a batch grow."""

    name, pip = "voicebox", "voicebox-pytorch"
    unused = ["voicebox_pytorch.trainer", "audiolm_pytorch", "spear_tts_pytorch", "naturalspeech2_pytorch"]
    unused += [f"naturalspeech2_pytorch.{m}" for m in "aligner utils utils.tokenizer naturalspeech2_pytorch".split()]
    tokens = property(lambda self: self.net.to_cond_emb)
    layers = property(lambda self: gates_of([x[3], x[5]] for x in self.net.transformer.layers))
    inputs = property(lambda self: [*(x[2] for x in self.net.transformer.layers), self.net.transformer.final_norm])

    def build(self) -> nn.Module:
        c, box = self.config, package(self.name, "voicebox_pytorch.voicebox_pytorch").VoiceBox
        size = {"dim": c.n_embd, "depth": c.n_layer, "heads": c.n_head, "dim_head": c.n_embd // c.n_head}
        size |= {"num_cond_tokens": sum(c.codes), "dim_cond_emb": c.n_embd, "dim_in": c.n_mels}
        return box(**size, ff_mult=c.ff_mult, ff_dropout=c.dropout)

    def run(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        none = torch.zeros_like(cond.mask)  # nothing more of the prompt is hidden: it ends in zeros already
        options = {"cond": cond.prompt, "cond_mask": none, "self_attn_mask": cond.mask, "cond_drop_prob": 0.0}
        with held([self.net.to_cond_emb.register_forward_hook(lambda module, args, out: cond.tokens)]):
            return self.net(x_t, times=t, cond_token_ids=none.long(), **options)


class Matcha(Backbone):
    """matcha.models.components.decoder.Decoder, a U-net: its layers are resnets and transformer blocks. Ours: a token
    table, and a linear map of its embedding to the M channels of `mu`. States at half the frame rate are repeated."""

    name, pip, chained = "matcha", "cosyvoice2-eu", False  # which brings matcha along
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
        """Resnets and transformer blocks in the order in which they run."""
        parts = (*self.net.down_blocks, *self.net.mid_blocks, *self.net.up_blocks)
        return nn.ModuleList(unit for part in parts for unit in (part[0], *part[1]))

    # of a resnet a gate closes the branch alone
    layers = property(lambda self: gates_of([u.block2] if hasattr(u, "res_conv") else u for u in self.blocks))

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


FORWARD = "forward(x_t, t, cond): it returns the velocity (B, T, M) of x_t (B, T, M) at t (B,), cond (B, T, D)"
LAYERS = "layers(): it returns a residual block for each of L layers, or the list of its branches; or --backbone_layers"
STATES = "states(): it returns the L + 1 modules whose first input is h_0 .. h_L, which branches do not show"


class Yours(Backbone):
    """A class of one's own; its `cond` is our tokens' embedding plus the prompt's, `path` stands for layers()."""

    def __init__(self, config: DiTConfig, name: str, kind: type[nn.Module], path: str = ""):
        self.name, self.kind, self.path = name, kind, path
        super().__init__(config)
        self.tokens = nn.Embedding(sum(config.codes), config.n_embd)
        self.prompt_in = nn.Linear(config.n_mels, config.n_embd, bias=False)

    def build(self) -> nn.Module:
        self.need(FORWARD, self.kind.forward is not nn.Module.forward)
        size = {"n_mels": self.config.n_mels, "dim": self.config.n_embd, "depth": self.config.n_layer}
        try:
            return self.kind(**size)
        except TypeError as error:
            raise ValueError(f"backbone={self.name} cannot be built with {size}: {error}") from error

    def need(self, what: str, there: bool) -> None:
        if not there:
            raise ValueError(f"backbone={self.name} has no {what}")

    @property
    def layers(self) -> list[list[Gate]]:
        listed = dict(self.net.named_modules()).get(self.path)
        self.need(self.path or LAYERS, listed is not None if self.path else hasattr(self.kind, "layers"))
        return gates_of(listed.children() if self.path else self.net.layers())

    @property
    def inputs(self) -> list[nn.Module]:
        first, stated = [layer[0] for layer in self.layers], hasattr(self.net, "states")
        self.need(STATES, stated or all(gate.closed == "input" for gate in first))
        return self.net.states() if stated else [gate.module for gate in first]

    def run(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        valid, takes = cond.mask[..., None], inspect.signature(self.net.forward).parameters
        more = {"mask": cond.mask} if "mask" in takes else {}
        v = self.net(x_t * valid, t, (cond.tokens + self.prompt_in(cond.prompt)) * valid, **more)
        if getattr(v, "shape", None) != x_t.shape:
            raise ValueError(f"backbone={self.name} needs {FORWARD}, not {getattr(v, 'shape', type(v))}")
        return v

    def readers(self, states: list[Tensor], T: int) -> list[RemovableHandle]:
        handles, last = super().readers(states, T), self.layers[-1][0].module
        if not hasattr(self.net, "states"):  # the blocks themselves: h_L is what the last one returns
            handles.append(last.register_forward_hook(lambda module, args, out: states.append(out)))
        return handles


BACKBONES = {"": DiT} | {b.name: b for b in (F5TTS, F5Text, Voicebox, CosyVoice, Matcha)}  # and any FILE.py:Class


class StandIn(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, wanted: str) -> type:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return type(wanted, (), {})


def package(name: str, module: str) -> types.ModuleType:
    """A module of a backbone's package, imported with stand-ins for what it never calls (trainers, recognisers,
    codecs). Raises DataError with the pip line when the package is not there."""
    audio.torchaudio()
    stand_ins = {other: StandIn(other) for other in BACKBONES[name].unused if other not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = "pip install --no-deps -r requirements-backbones.txt"
        raise DataError(f"backbone={name} needs {BACKBONES[name].pip} ({error}): {install}") from error
    finally:
        for other in stand_ins:
            del sys.modules[other]


def find(name: str, layers: str = "") -> Callable[[DiTConfig], FlowModel]:
    """What builds the model called `name`: of BACKBONES, or FILE.py:Class or package.module:Class, maybe with the path
    of its `layers`. Raises ValueError where there is none; building raises DataError where its package is missing."""
    where, _, wanted = name.rpartition(":")
    if name in BACKBONES and not layers:
        return BACKBONES[name]
    if not where:
        known = f"empty for ours{', '.join(BACKBONES)}, or FILE.py:Class, which alone has backbone_layers"
        raise ValueError(f"backbone={name!r}, backbone_layers={layers!r}: backbone is {known}")
    try:
        found = runpy.run_path(where) if where.endswith(".py") else vars(importlib.import_module(where))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise ValueError(f"backbone={name}: {error}") from error
    if not isinstance(kind := found.get(wanted), type) or not issubclass(kind, nn.Module):
        raise ValueError(f"backbone={name}: {where} has no torch.nn.Module called {wanted!r}")
    return partial(Yours, name=name, kind=kind, path=layers)


@torch.no_grad()
def check(model: FlowModel) -> list[str]:
    """What is wrong with the gates of a model in eval mode, a line each, on random input with padding: a closed layer
    passes on what enters it and changes the velocity, open ones are as without hooks, `ablated` is the loop."""
    c, layers, wrong = model.config, range(model.config.n_layer), []
    mask = torch.arange(40) < torch.tensor([[40], [29]])
    tokens, prompt = (torch.randn(2, 40, size) * mask[..., None] for size in (c.n_embd, c.n_mels))
    given = torch.randn(2, 40, c.n_mels), torch.tensor([0.3, 0.7]), Condition(tokens, prompt, mask, mask[:, 0])
    whole, states = model.velocity(*given, hidden=True)
    if (found := [tuple(h.shape) for h in states]) != [(2, 40, c.n_embd)] * (c.n_layer + 1):
        return [f"its hidden states are {found}, not n_layer + 1 of (B, T, D) = {(2, 40, c.n_embd)}"]
    for l in layers:
        try:
            v, closed = model.velocity(*given, [float(k != l) for k in layers], hidden=True)
            if torch.equal(v, whole):
                raise ValueError("the velocity stays as it is")
            if getattr(model, "chained", True) and not torch.equal(closed[l], closed[l + 1]):
                raise ValueError("what comes after it is not what entered it (is it a branch?)")
        except (TypeError, ValueError) as error:
            wrong.append(f"layer {l + 1} does not close: {error}")
    if not torch.equal(model.velocity(*given), whole):
        wrong.append("with all layers open hooks change the velocity, or it is random in eval mode")
    if not wrong and not torch.allclose(model.ablated(*given), FlowModel.ablated(model, *given), 1e-3, 1e-4):
        wrong.append("ablated() is not the loop over closed layers")
    return wrong


def check_weights(build: Callable[[], nn.Module], layers: int, weights: dict[str, Tensor], used) -> None:
    """Raises CheckpointError, which names the first, when the weights of `used` have not the names and shapes of what
    `build` makes, of at least `layers` tensors. It is called without memory, so that any size is refused at once."""
    if layers > len(weights):
        raise common.CheckpointError(f"{used} does not fit its settings: {len(weights)} tensors for {layers} layers")
    with torch.device("meta"):
        wanted = build().state_dict()
    for name in wanted | weights:
        there, needed = (tuple(side[name].shape) if name in side else "not there" for side in (weights, wanted))
        if there != needed:
            raise common.CheckpointError(f"{used} does not fit its settings: {name} is {there}, expected {needed}")


def init_from(model: FlowModel, path: str, others_stay: bool = False) -> str:
    """Starts `model` from a file of weights, ours (the averaged ones) or as a project publishes them, with any prefix;
    says with how much. Raises ValueError that lists other names and shapes, which `others_stay` leaves as they are;
    CheckpointError for a file that is damaged or not there."""
    try:
        state = safetensors.torch.load_file(path) if path.endswith(".safetensors") else common.load(path)[0]
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"init_from={path} cannot be read: {error}") from error
    inside = [state.get(k) for k in ("ema", "ema_model_state_dict", "model_state_dict", "state_dict", "model")]
    tensors = next((x for x in inside if isinstance(x, dict)), state)
    tensors, own = {k: x for k, x in tensors.items() if isinstance(x, Tensor)}, model.state_dict()
    names = [(to, name.removeprefix(to)) for to in ("", "net.") for name in own if name.startswith(to)]
    places = Counter((to, k.removesuffix(name)) for to, name in names for k in tensors if k.endswith(name))
    if not places:
        raise ValueError(f"init_from={path}: none of its {len(tensors)} names is the model's")
    (to, prefix), _ = places.most_common(1)[0]
    given = {to + k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    wanted = {k: x for k, x in own.items() if k.startswith(to)}  # the rest, ours beside the network, is nowhere else
    shapes = {k: [list(side[k].shape) if k in side else "none" for side in (given, wanted)] for k in wanted | given}
    other = {k: f"{k} {there}, here {here}" for k, (there, here) in shapes.items() if there != here}
    told = f"init_from={path}: {len(given.keys() - other.keys())} of the model's {len(own)} tensors"
    if other:
        told += f"; not {'; '.join(list(other.values())[:20])}" + f" and {len(other) - 20} more" * (len(other) > 20)
    if other and not others_stay:
        raise ValueError(f"{told}; --init_partial leaves these as they are")
    model.load_state_dict({k: x for k, x in given.items() if k not in other}, strict=False)
    return told


def load_model(state: dict, ema: bool = True, device: str = "cpu") -> FlowModel:
    """The model of a checkpoint's state, in eval mode; averaged weights unless ema=False. CheckpointError: no fit."""
    config, size, weights = state["config"], DiTConfig(**state["model_config"]), state["ema" if ema else "model"]
    make = partial(find(config["backbone"], config.get("backbone_layers", "")), size)
    check_weights(make, size.n_layer, weights, f"the checkpoint of step {state.get('step')}")
    loaded = make()
    loaded.load_state_dict(weights)
    return loaded.to(device).eval()
