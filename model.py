"""The gated DiT: tokens and a reference mel in, the velocity of the flow out.

    model = DiT(DiTConfig(n_layer=24, n_head=16, n_embd=1024, codes=(4096, 4096)))
    loss = flow_matching_loss(model, batch)["fm"]
    mel = sample(model, model.embed_condition(batch), nfe=32, cfg_scale=2.0)  # normalised; see model.denormalise

Top to bottom: shape, condition, block, DiT, pooled descriptors and alignment heads, losses, sampler.

B clips, T mel frames, N tokens, M = 100 mel bins, D model width, L layers, H heads, E teacher width. `frames` (B,)
counts a clip's valid frames: padding never reaches attention, convolution, pooling, the loss or a score.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import DOMAINS


@dataclass
class DiTConfig:
    """What the weights' shapes depend on, and nothing else; stored in every checkpoint."""

    n_layer: int = 24  # L
    n_head: int = 16  # H
    n_embd: int = 1024  # D, also the width of the token embedding
    ff_mult: int = 4
    dropout: float = 0.2
    codes: tuple[int, ...] = (4096, 4096)  # codebook size of the primary stream, per domain
    second_codes: int = 0  # codebook size of the second stream; 0: one stream (config A)
    interleave: str = "pair"  # two streams: pair (concat -> linear) | sequence (2N tokens as written)
    n_mels: int = 100
    teachers: tuple[tuple[str, int], ...] = (("whisper", 1280), ("beats", 768))  # name and width E, per domain


class Condition(NamedTuple):
    """c of eq. 21, kept in parts: the token embedding at mel rate, the reference mel, and what is valid."""

    tokens: torch.Tensor  # (B, T, D), zeros where the condition is dropped
    prompt: torch.Tensor  # (B, T, M) normalised mel, zeros after the reference
    mask: torch.Tensor  # (B, T) bool, True on valid frames
    kept: torch.Tensor  # (B,) bool, False where the condition was dropped for guidance
    padded: bool = True  # False: the mask is True throughout, so attention does without

    def repeat(self, n: int) -> "Condition":
        return Condition(*(x.repeat(n, *(1,) * (x.dim() - 1)) for x in self[:4]), self.padded)

    def clips(self, rows: torch.Tensor) -> "Condition":
        return Condition(*(x[rows] for x in self[:4]), self.padded)

    def null(self) -> "Condition":
        """The unconditional c of classifier-free guidance."""
        return self._replace(tokens=self.tokens * 0, prompt=self.prompt * 0, kept=self.kept & False)

    def with_null(self) -> "Condition":
        """The clips, then the same without their condition: guidance in one batch of 2B."""
        return Condition(*map(torch.cat, zip(self[:4], self.null()[:4], strict=True)), self.padded)


class Context(NamedTuple):
    """What every block reads beside the hidden state."""

    time: torch.Tensor  # (B, D)
    mask: torch.Tensor | None  # (B, 1, 1, T) bool, None when nothing is padded
    rotary: torch.Tensor  # (2, T, D / H) cos and sin

    def repeat(self, n: int) -> "Context":
        mask = None if self.mask is None else self.mask.repeat(n, 1, 1, 1)
        return Context(self.time.repeat(n, 1), mask, self.rotary)


def stretch(x: torch.Tensor, lengths: torch.Tensor, frames: torch.Tensor, T: int) -> torch.Tensor:
    """Linear interpolation of (B, N, D) to (B, T, D), each clip from its own `lengths` to its own `frames` (B,).

    Per clip the same as F.interpolate(mode="linear", align_corners=False), whatever the padding.
    """
    j = torch.arange(T, device=x.device)  # (T,)
    position = (j + 0.5) * (lengths / frames)[:, None] - 0.5  # (B, T)
    position = torch.minimum(position.clamp_min(0), (lengths - 1)[:, None].to(position.dtype))
    low = position.floor().long()
    high = torch.minimum(low + 1, (lengths - 1)[:, None])
    weight = (position - low).to(x.dtype)[..., None]  # (B, T, 1)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return torch.lerp(x[rows, low], x[rows, high], weight)


def rotary_table(T: int, dim: int, device, dtype) -> torch.Tensor:
    """cos and sin of rotary positions, (2, T, dim), halves convention; the first half's sin is negated for rotate()."""
    wide = torch.promote_types(dtype, torch.float32)
    inverse = 10000 ** (-torch.arange(0, dim, 2, device=device, dtype=wide) / dim)
    angle = torch.arange(T, device=device, dtype=wide)[:, None] * inverse  # (T, dim / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)]).to(dtype)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Halves (a, b) of the last axis -> (a cos - b sin, b cos + a sin)."""
    cos, sin = rotary.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v over (B, H, T, d), without the keys outside `mask`. torch's fused kernel multiplies in
    float32 on CPUs, so there bfloat16 goes through the plain formula, for as many heads at a time as fit the cache."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    B, H, T, d = q.shape
    bias = q.new_zeros(B, H, 1, T)
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf)
    heads = B * H if torch.compiler.is_compiling() else max(1, 2**21 // T**2)
    parts = zip(*(x.flatten(0, 1).split(heads) for x in (q, k, v, bias)), strict=True)
    outputs = [torch.baddbmm(b, q, k.mT, alpha=d**-0.5).softmax(-1) @ v for q, k, v, b in parts]
    return torch.cat(outputs).view(B, H, T, d)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LN(x) (1 + scale) + shift. Outside autocast, which on GPUs would keep x and LN(x) in float32 for backward; the
    normalisation computes in float32 either way."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:]), 1 + scale[:, None])


class Block(nn.Module):
    """Eq. 22: two residual updates, adaLN-Zero by the time embedding, both under one scalar gate g (eq. 7)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        D = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.modulation = nn.Linear(D, 6 * D)
        self.qkv = nn.Linear(D, 3 * D)
        self.attn_out = nn.Linear(D, D)
        self.ff_in = nn.Linear(D, config.ff_mult * D)
        self.ff_out = nn.Linear(config.ff_mult * D, D)

    def attention(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D / H)
        q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        y = attend(q, k, v, context.mask)
        y = self.attn_out(y.transpose(1, 2).reshape(B, T, D))
        return F.dropout(y, self.dropout, self.training)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.gelu(self.ff_in(x)), self.dropout, self.training)
        return self.ff_out(x)

    def forward(self, h: torch.Tensor, context: Context, gate: float = 1.0) -> torch.Tensor:
        """h_{l-1} -> h_l. gate 0 returns h itself, bit for bit; gate 1 multiplies by nothing."""
        if gate == 0:
            return h
        shift1, scale1, alpha1, shift2, scale2, alpha2 = self.modulation(F.silu(context.time)).chunk(6, dim=-1)
        if gate != 1:
            alpha1, alpha2 = gate * alpha1, gate * alpha2
        h = torch.addcmul(h, alpha1[:, None], self.attention(modulate(h, shift1, scale1), context))
        return torch.addcmul(h, alpha2[:, None], self.feed_forward(modulate(h, shift2, scale2)))


class LocalPosition(nn.Module):
    """A masked depthwise convolution added to the stem's output: neighbourhood, before the first block."""

    def __init__(self, D: int, kernel: int = 31):
        super().__init__()
        self.conv = nn.Conv1d(D, D, kernel, padding=kernel // 2, groups=D)

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = h * mask[..., None]  # so that a padded neighbour is the same as the edge of the clip
        return h + F.gelu(self.conv(h.transpose(1, 2)).transpose(1, 2))


class FlowModel(nn.Module):
    """What training, probes and sampling ask of a velocity model; DiT is ours, backbones.py has others'.

    A subclass has `tokens`, the table of codes, `blocks`, the modules of each layer, `velocity` and `reset_parameters`.
    """

    one_sweep = False  # whether ablated() grows one batch

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        # BiT-C's projections P_T (eq. 4), shared by all layers so that LASP compares depths in one space
        self.projections = nn.ModuleDict({name: nn.Linear(config.n_embd, E, bias=False) for name, E in config.teachers})
        self.init_projections()
        self.register_buffer("code_offset", torch.tensor([0, *config.codes[:-1]]).cumsum(0), persistent=False)
        self.register_buffer("mel_mean", torch.zeros(config.n_mels))
        self.register_buffer("mel_std", torch.ones(config.n_mels))
        self.register_buffer("mel_floor", torch.tensor(-11.5129))  # log 1e-5

    def init_projections(self) -> None:
        for projection in self.projections.values():
            nn.init.orthogonal_(projection.weight)

    def velocity(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
        gates: Sequence[float] | None = None,
        hidden: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """v (B, T, M) at x_t (B, T, M), t (B,). `gates` holds g_1..g_L; `hidden` also returns [h_0, ..., h_L]."""
        raise NotImplementedError

    def ablated(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """v and every v^(-l) (eq. 8), (L + 1, B, T, M), index 0 the intact model; here a whole pass for each."""
        layers = range(self.config.n_layer)
        return torch.stack([self.velocity(x_t, t, cond, [float(l != k) for l in layers]) for k in (-1, *layers)])

    def reset_parameters(self) -> None:
        """Draws all weights anew, also those that start at zero."""
        raise NotImplementedError

    def normalise(self, mel: torch.Tensor) -> torch.Tensor:
        """Log-mel (..., M) -> x1: floored, then per-bin zero mean and unit variance over the training corpus."""
        return (torch.maximum(mel, self.mel_floor) - self.mel_mean) / self.mel_std

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mel_std + self.mel_mean

    def embed_tokens(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N) or (B, N, 2) -> embedding (B, N', D) and lengths (B,); N' = 2N for interleave="sequence"."""
        tokens = batch.tokens if batch.tokens.dim() == 3 else batch.tokens[..., None]
        e = self.tokens(tokens[..., 0] + self.code_offset[batch.domain][:, None])
        if not self.config.second_codes:
            return e, batch.token_len
        second = self.second(tokens[..., 1])
        if self.config.interleave == "pair":
            return self.pair(torch.cat([e, second], dim=-1)), batch.token_len
        return torch.stack([e, second], dim=2).flatten(1, 2), 2 * batch.token_len  # p1, b1, p2, b2, ... (eq. 15)

    def tokens_at_frames(self, batch) -> torch.Tensor:
        """The tokens' embedding at the mel's rate, (B, T, D)."""
        e, lengths = self.embed_tokens(batch)
        return stretch(e, lengths, batch.frames, batch.mel.shape[1])

    def embed_condition(self, batch, drop: float = 0.0) -> Condition:
        """c of eq. 21 from a data.Batch; with probability `drop` a clip loses its whole condition, for guidance.

        The embedding keeps its gradient, so L_BiTC and L_FM both train the token tables.
        """
        j = torch.arange(batch.mel.shape[1], device=batch.mel.device)
        mask = j < batch.frames[:, None]  # (B, T)
        kept = torch.rand(len(batch.frames), device=mask.device) >= drop
        keep = kept[:, None, None]
        tokens = self.tokens_at_frames(batch) * (mask[..., None] & keep)
        prompt = self.normalise(batch.mel) * ((j < batch.prompt[:, None])[..., None] & keep)
        return Condition(tokens, prompt, mask, kept, batch.padded)


class DiT(FlowModel):
    """The velocity field v(x_t, t, c), with a gate on each of its L blocks."""

    one_sweep = True

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.checkpoint_activations = False  # True: keep a block's input alone and compute the rest again in backward
        D, M = config.n_embd, config.n_mels
        self.tokens = nn.Embedding(sum(config.codes), D)  # domain d's code i is row sum(codes[:d]) + i
        if config.second_codes:
            self.second = nn.Embedding(config.second_codes, D)
            if config.interleave == "pair":
                self.pair = nn.Linear(2 * D, D)
        self.stem_in = nn.Linear(M + D + M, D)
        self.local = LocalPosition(D)
        self.time_mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head_out = nn.Linear(D, M)
        self.init_weights()

    def init_weights(self) -> None:
        """DiT's initialisation: xavier, small tables, and zeros at every adaLN layer and the output (eq. 22)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        for module in [*(b.modulation for b in self.blocks), self.head_modulation, self.head_out]:
            nn.init.zeros_(module.weight)
        self.init_projections()

    def reset_parameters(self) -> None:
        self.init_weights()
        self.local.conv.reset_parameters()  # keeps torch's own initialisation, so init_weights leaves it alone
        for linear in [*(b.modulation for b in self.blocks), self.head_modulation, self.head_out]:
            nn.init.xavier_uniform_(linear.weight)

    def stem(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> tuple[torch.Tensor, Context]:
        """x_t (B, T, M), t (B,) -> h_0 (B, T, D) and what the blocks need."""
        T, head_dim = x_t.shape[1], self.config.n_embd // self.config.n_head
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=t.dtype) / 128)
        angle = 1000 * t[:, None] * frequency
        time = self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(x_t.dtype))
        h = self.local(self.stem_in(torch.cat([x_t, cond.tokens, cond.prompt], dim=-1)), cond.mask)
        mask = cond.mask[:, None, None] if cond.padded else None  # without one GPUs use their fastest kernel
        return h, Context(time, mask, rotary_table(T, head_dim, x_t.device, x_t.dtype))

    def head(self, h: torch.Tensor, context: Context) -> torch.Tensor:
        shift, scale = self.head_modulation(F.silu(context.time)).chunk(2, dim=-1)
        return self.head_out(modulate(h, shift, scale)).to(torch.promote_types(h.dtype, torch.float32))

    def velocity(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
        gates: Sequence[float] | None = None,
        hidden: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        h, context = self.stem(x_t, t, cond)
        states = [h]
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block, gate in zip(self.blocks, gates or [1.0] * len(self.blocks), strict=True):
            h = checkpoint(block, h, context, gate, use_reentrant=False) if again else block(h, context, gate)
            if hidden:
                states.append(h)
        v = self.head(h, context)
        return (v, states) if hidden else v

    def ablated(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """All ablations in one sweep. The ablation of layer l shares everything before l. So one batch grows while the
        layers run in order: after layer l the state that skipped it joins. Exactly the naive loop's result for
        (L + 1) / 2 forward passes instead of L + 1."""
        B, L = len(x_t), len(self.blocks)
        h, context = self.stem(x_t, t, cond)
        for block in self.blocks:
            after = block(h, context.repeat(len(h) // B))
            h = torch.cat([after, h[:B]])  # h[:B] is the intact state before this layer
        return self.head(h, context.repeat(L + 1)).unflatten(0, (L + 1, B))


def flops_per_frame(model: DiT, T: int) -> float:
    """Floating-point operations of a training step per mel frame of clips of T frames: forward, and twice that for
    backward. Two for each weight that every frame meets, and 4 T D per layer for attention's two products."""
    D, per_clip = model.config.n_embd, {id(p) for m in (model.time_mlp, model.head_modulation) for p in m.parameters()}
    per_clip |= {id(p) for b in model.blocks for p in b.modulation.parameters()}
    parts = (model.stem_in, model.local, model.blocks, model.head_out)
    weights = sum(p.numel() for m in parts for p in m.parameters() if p.dim() > 1 and id(p) not in per_clip)
    return 3 * (2 * weights + 4 * T * D * model.config.n_layer)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T, D) over the valid frames of each clip -> (B, D), in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def descriptor(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """z_l = LayerNorm(mean_t h_l), eq. 3: (B, T, D) -> (B, D)."""
    z = masked_mean(h, mask)
    return F.layer_norm(z, z.shape[-1:])


def descriptors(cond: Condition, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[z_0, ..., z_L], each (B, D); z_0 is the input interface, the token embedding itself."""
    return [descriptor(cond.tokens, cond.mask)] + [descriptor(h, cond.mask) for h in states[1:]]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine over the last axis, outside autocast: a half-precision norm overflows late in training."""
    with torch.autocast(a.device.type, enabled=False):
        wide = torch.promote_types(a.dtype, torch.float32)
        return F.cosine_similarity(a.to(wide), b.to(wide), dim=-1)


class MLPHead(nn.Sequential):
    """The paper's head: two layers on the pooled descriptor, (B, T, D) -> (B, E)."""

    def __init__(self, D: int, width: int, E: int):
        super().__init__(nn.Linear(D, width), nn.GELU(), nn.Linear(width, E))

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(descriptor(h, mask))


class ConvHead(nn.Module):
    """A convolution on the unpooled sequence, pooled after: (B, T, D) -> (B, E). bands=1 convolves over time; more
    bands fold D into a (time, band) plane and convolve over both, as iREPA does over an image's patches."""

    def __init__(self, D: int, width: int, E: int, bands: int):
        super().__init__()
        self.bands = bands
        reach = 1 if bands > 1 else 0
        self.conv = nn.Conv2d(D // bands, width // bands, (3, 1 + 2 * reach), padding=(1, reach))
        self.out = nn.Linear(width // bands * bands, E)

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        B, T, D = h.shape
        x = F.layer_norm(h, (D,)) * mask[..., None]
        x = x.view(B, T, self.bands, D // self.bands).permute(0, 3, 1, 2)  # (B, D / bands, T, bands)
        x = F.gelu(self.conv(x)).permute(0, 2, 3, 1).flatten(2)  # (B, T, width)
        return self.out(masked_mean(x, mask))


# for each domain {layer: its weight lambda_l in each of G equal parts of t}; G is 1 unless sets depend on t
Selection = Sequence[dict[int, Sequence[float]]]


class AlignHeads(nn.Module):
    """H_l of eq. 12: a head of its own for each (domain, layer) of a selection. `kind`: mlp | conv1d | conv2d.

    `teacher`: external, the domain's frozen encoder; self, a deeper layer of the model (LayerSync).
    """

    def __init__(
        self,
        config: DiTConfig,
        layers: Iterable[Iterable[int]],
        width: int = 0,
        kind: str = "mlp",
        teacher: str = "external",
    ):
        super().__init__()
        self.teacher, D = teacher, config.n_embd
        width = width or D
        make = {
            "mlp": lambda E: MLPHead(D, width, E),
            "conv1d": lambda E: ConvHead(D, width, E, bands=1),
            "conv2d": lambda E: ConvHead(D, width, E, bands=math.gcd(16, math.gcd(D, width))),
        }[kind]
        self.heads = nn.ModuleDict()
        for d, selected in enumerate(layers):
            for l in selected:
                self.heads[f"{DOMAINS[d]}_{l}"] = make(config.teachers[d][1] if teacher == "external" else D)

    def forward(self, domain: int, layer: int, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.heads[f"{DOMAINS[domain]}_{layer}"](h, mask)


def deeper_layer(layer: int, n_layer: int) -> int:
    """The layer that teaches `layer` in self-alignment: a third of the depth further on, at most the last."""
    return min(n_layer, layer + max(1, n_layer // 3))


def make_xt(model: DiT, mel: torch.Tensor, t: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and the target x1 - x0 (eq. 23) for log-mel (B, T, M) at t (B,), noise from the global generator."""
    x1 = model.normalise(mel)
    x0 = sigma * torch.randn_like(x1)
    return torch.lerp(x0, x1, t[:, None, None].to(x1.dtype)), x1 - x0


def masked_mse(v: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error over the valid frames of the batch, mean over frames and bins."""
    return ((v - target).square().mean(-1) * mask).sum() / mask.sum()


def bitc_loss(model: DiT, batch, cond: Condition, weights: Sequence[float] = (0.5, 1.0)) -> torch.Tensor:
    """L_BiTC, eq. 5: over the clips of each domain whose condition was kept, w_d * mean(1 - s_T(0))."""
    z0, loss = descriptor(cond.tokens, cond.mask), cond.tokens.new_zeros((), dtype=torch.float32)
    for d, (name, _) in enumerate(model.config.teachers):
        chosen = (batch.domain == d) & cond.kept
        score = cosine(model.projections[name](z0), batch.teacher[name])
        loss = loss + weights[d] * ((1 - score) * chosen).sum() / chosen.sum().clamp_min(1)
    return loss


def alignment_loss(
    model: DiT,
    heads: AlignHeads,
    batch,
    mask: torch.Tensor,
    states: Sequence[torch.Tensor],
    t: torch.Tensor,
    selection: Selection,
) -> torch.Tensor:
    """Last term of eq. 12: over each domain d and its selected layers, lambda_l (1 - cos(H_l(h_l), e_d)).

    `states` is [h_0..h_L], `mask` (B, T); the mean is over the domain's clips. e_d is the clip's teacher embedding, or
    with self-alignment the detached descriptor of a deeper layer. A domain without clips contributes zero.
    """
    loss = states[0].new_zeros((), dtype=torch.float32)
    for d, layers in enumerate(selection):
        chosen = batch.domain == d
        for l, weights in layers.items():
            part = (t * len(weights)).long().clamp_max(len(weights) - 1)
            weight = chosen * sum(w * (part == g).to(t.dtype) for g, w in enumerate(weights))  # (B,)
            if heads.teacher == "self":
                target = descriptor(states[deeper_layer(l, len(states) - 1)], mask).detach()
            else:
                target = batch.teacher[model.config.teachers[d][0]]
            score = cosine(heads(d, l, states[l], mask), target)  # of all clips, so that DDP meets every head in a step
            loss = loss + (weight * (1 - score)).sum() / chosen.sum().clamp_min(1)
    return loss


def flow_matching_loss(
    model: DiT,
    batch,
    sigma: float = 0.5,
    token_drop: float = 0.0,
    heads: AlignHeads | None = None,
    selection: Selection = (),
) -> dict[str, torch.Tensor]:
    """The training losses of one batch, each a scalar: fm (eq. 23), bitc (eq. 5) and, with heads, align (eq. 12)."""
    cond = model.embed_condition(batch, token_drop)
    t = torch.rand(len(batch.frames), device=batch.mel.device)
    x_t, target = make_xt(model, batch.mel, t, sigma)
    v, states = model.velocity(x_t, t, cond, hidden=True)
    losses = {"fm": masked_mse(v, target, cond.mask), "bitc": bitc_loss(model, batch, cond)}
    if heads is not None:
        losses["align"] = alignment_loss(model, heads, batch, cond.mask, states, t, selection)
    return losses


class Objective(nn.Module):
    """All that is trained: the model and, in phase II, the alignment heads; `config` is train.Config. forward(batch) gives
    the losses (eq. 12)."""

    def __init__(self, model: FlowModel, config):
        super().__init__()
        self.model, self.config = model, config
        self.heads: AlignHeads | None = None
        self.selection: Selection = [{} for _ in DOMAINS]

    def select(self, selection: Selection) -> None:
        """Aligns these layers from now on, each with a head of its own, drawn from config.seed so that branches start
        alike. A selection that will be refreshed gets a head for every layer at once, weight 0 where not selected."""
        c = self.config
        if c.refresh_every and any(selection):
            last = self.model.config.n_layer - (c.align_teacher == "self")
            selection = [{l: s.get(l, [0.0]) for l in range(1, last + 1)} for s in selection]
        self.selection = selection
        if any(selection) and self.heads is None:
            with torch.random.fork_rng([]):
                torch.manual_seed(c.seed)
                self.heads = AlignHeads(self.model.config, selection, c.head_dim, c.align_head, c.align_teacher)
            self.heads.to(next(self.model.parameters()).device)

    def forward(self, batch) -> dict[str, torch.Tensor]:
        c = self.config
        return flow_matching_loss(self.model, batch, c.sigma, c.token_drop, self.heads, self.selection)


EPSS = {  # F5-TTS's empirically pruned steps, in 32nds (arXiv:2505.19931)
    5: (0, 2, 4, 8, 16, 32),
    6: (0, 2, 4, 6, 8, 16, 32),
    7: (0, 2, 4, 6, 8, 16, 24, 32),
    10: (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    12: (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    16: (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32),
}


def time_grid(steps: int, sway: float = -1.0, epss: bool = False) -> torch.Tensor:
    """steps + 1 times from 0 to 1, even or EPSS's, then sway-warped as in F5-TTS: u + s (cos(pi u / 2) - 1 + u).

    Raises ValueError when EPSS has no schedule of that many steps.
    """
    if epss and steps not in EPSS:
        raise ValueError(f"epss has no schedule of {steps} steps; it has {', '.join(map(str, EPSS))}")
    u = torch.tensor(EPSS[steps]).double() / 32 if epss else torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return u + sway * (torch.cos(math.pi * u / 2) - 1 + u)


@torch.no_grad()
def sample(
    model: DiT,
    cond: Condition,
    nfe: int = 32,
    cfg_scale: float = 2.0,
    sway: float = -1.0,
    sigma: float = 0.5,
    method: str = "euler",
    epss: bool = False,
    seed: int = 0,
) -> torch.Tensor:
    """Integrates dx = v dt from noise to a normalised mel (B, T, M), zeros on padding.

    `nfe` counts velocity evaluations per clip (midpoint spends two a step); guidance v_u + cfg_scale (v_c - v_u), run as one
    batch of 2B, is off at cfg_scale = 1. A clip's noise depends on `seed` and its place in the batch, not on padding. Raises
    ValueError when nfe does not fit the method or EPSS.
    """
    if method not in ("euler", "midpoint") or nfe < 1 or (method == "midpoint" and nfe % 2):
        raise ValueError(f"sampler {method!r} with nfe={nfe}: use euler with nfe >= 1, or midpoint with an even nfe")
    B, T = cond.mask.shape
    device = cond.tokens.device
    x = torch.zeros(B, T, model.config.n_mels)
    for b, n in enumerate(cond.mask.sum(1).tolist()):
        own = torch.Generator().manual_seed(seed * 100_003 + b)
        x[b, :n] = sigma * torch.randn(n, model.config.n_mels, generator=own)
    x = x.to(device, torch.promote_types(cond.tokens.dtype, torch.float32))
    both = cond.with_null() if cfg_scale != 1 else cond

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        if cfg_scale == 1:
            return model.velocity(x, x.new_full((B,), t), cond)
        v_c, v_u = model.velocity(x.repeat(2, 1, 1), x.new_full((2 * B,), t), both).chunk(2)
        return v_u + cfg_scale * (v_c - v_u)

    times = time_grid(nfe if method == "euler" else nfe // 2, sway, epss).tolist()
    for t, t_next in itertools.pairwise(times):
        dt = t_next - t
        v = velocity(x, t)
        if method == "midpoint":
            v = velocity(x + dt / 2 * v, t + dt / 2)
        x = x + dt * v
    return x * cond.mask[..., None]
