"""The gated DiT: tokens and a reference mel in, the velocity of the flow out.

    model = DiT(DiTConfig(n_layer=24, n_head=16, n_embd=1024, codes=(4096, 4096)))
    loss = Objective(model, config)(batch)["loss"]  # config: a train.Config
    mel = sample(model, model.embed_condition(batch), nfe=32, cfg_scale=2.0)  # normalised; see model.denormalise

B clips, T mel frames, N tokens, M = 100 mel bins, D model width, L layers, H heads, E teacher width. `frames` (B,)
counts a clip's valid frames: padding never reaches attention, convolution, pooling, the loss or a score.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import DOMAINS


@dataclass
class DiTConfig:
    """What the weights' shapes depend on, and nothing else; stored in every checkpoint."""

    n_layer: int = 24  # L
    n_head: int = 16  # H
    n_embd: int = 1024  # D, also the width of the token embedding
    ff_mult: int = 4  # feed-forward width as a multiple of D
    dropout: float = 0.2  # of attention's output and inside the feed-forward
    codes: tuple[int, ...] = (4096, 4096)  # codebook size of the primary stream, per domain
    second_codes: int = 0  # codebook size of the second stream; 0: one stream (config A)
    interleave: str = "pair"  # two streams: pair (concat -> linear) | sequence (2N tokens as written)
    n_mels: int = 100  # M
    teachers: tuple[tuple[str, int], ...] = (("whisper", 1280), ("beats", 768))  # name and width E, per domain

    def __post_init__(self):  # from JSON they are lists
        self.codes, self.teachers = tuple(self.codes), tuple(map(tuple, self.teachers))


class Condition(NamedTuple):
    """c of eq. 21, kept in parts: the token embedding at mel rate, the reference mel, and what is valid."""

    tokens: Tensor  # (B, T, D), zeros where the condition is dropped
    prompt: Tensor  # (B, T, M) normalised mel, zeros after the reference
    mask: Tensor  # (B, T) bool, True on valid frames
    kept: Tensor  # (B,) bool, False where the condition was dropped for guidance
    padded: bool = True  # False: the mask is True throughout, so that what follows does without

    def masked(self, x: Tensor) -> Tensor:
        """x (B, T, ...) with zeros on padding."""
        return x * self.mask[..., None] if self.padded else x

    def clips(self, rows: Tensor) -> "Condition":
        return Condition(*(x[rows] for x in self[:4]), self.padded)

    def with_null(self) -> "Condition":
        """The clips, then the same without their condition: classifier-free guidance in one batch of 2B."""
        null = (self.tokens * 0, self.prompt * 0, self.mask, self.kept & False)
        return Condition(*map(torch.cat, zip(self[:4], null, strict=True)), self.padded)


def stretch(x: Tensor, lengths: Tensor, frames: Tensor, T: int) -> Tensor:
    """(B, N, D) -> (B, T, D), each clip by F.interpolate(mode="linear") from its own `lengths` to its `frames` (B,)."""
    last = (lengths - 1)[:, None]  # (B, 1)
    position = (torch.arange(T, device=x.device) + 0.5) * (lengths / frames)[:, None] - 0.5  # (B, T)
    position = torch.minimum(position.clamp_min(0), last.to(position.dtype))
    low = position.floor().long()
    weight = (position - low).to(x.dtype)[..., None]  # (B, T, 1)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return torch.lerp(x[rows, low], x[rows, torch.minimum(low + 1, last)], weight)


class Context(NamedTuple):
    """What every block reads beside the hidden state."""

    time: Tensor  # (B, D)
    mask: Tensor | None  # (B, 1, 1, T) bool, None when nothing is padded
    rotary: Tensor  # (2, T, D / H) cos and sin

    def repeat(self, n: int) -> "Context":
        mask = None if self.mask is None else self.mask.repeat(n, 1, 1, 1)
        return self._replace(time=self.time.repeat(n, 1), mask=mask)


def rotary_table(x: Tensor, dim: int) -> Tensor:
    """cos and sin of the rotary positions of x (B, T, ...), (2, T, dim), in halves; the first's sin is negated."""
    wide = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
    rate = 10000 ** (-torch.arange(0, dim, 2, **wide) / dim)
    angle = torch.arange(x.shape[1], **wide)[:, None] * rate  # (T, dim / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)]).to(x.dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Halves (a, b) of the last axis -> (a cos - b sin, b cos + a sin)."""
    cos, sin = rotary.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(d)) v over (B, H, T, d), without the keys outside `mask`. torch's fused kernel multiplies in
    float32 on CPUs, so there bfloat16 goes through the plain formula, for as many heads at a time as fit the cache."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    B, H, T, d = q.shape
    bias = q.new_zeros(B, H, 1, T)
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf)
    heads = B * H if torch.compiler.is_compiling() else max(1, 2**21 // T**2)
    parts = zip(*(x.flatten(0, 1).split(heads) for x in (q, k, v, bias)), strict=True)  # (heads, T, d) each
    outputs = [torch.baddbmm(bi, qi, ki.mT, alpha=d**-0.5).softmax(-1) @ vi for qi, ki, vi, bi in parts]
    return torch.cat(outputs).view(B, H, T, d)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift, outside autocast, which on GPUs would keep x and LN(x) in float32 for backward."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:]), 1 + scale[:, None])


class Block(nn.Module):
    """Eq. 22: two residual updates, adaLN-Zero by the time embedding, both under one scalar gate g (eq. 7)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        D, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.modulation = nn.Linear(D, 6 * D)
        self.qkv = nn.Linear(D, 3 * D)
        self.attn_out = nn.Linear(D, D)
        self.ff_in = nn.Linear(D, config.ff_mult * D)
        self.ff_out = nn.Linear(config.ff_mult * D, D)

    def attention(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x).unflatten(2, (3, self.n_head, -1)).unbind(2))  # (B, H, T, d)
        y = attend(rotate(q, context.rotary), rotate(k, context.rotary), v, context.mask)
        return F.dropout(self.attn_out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def forward(self, h: Tensor, context: Context, gate: float = 1.0) -> Tensor:
        """h_{l-1} -> h_l. gate 0 returns h itself, bit for bit; gate 1 multiplies by nothing."""
        if gate == 0:
            return h
        shift1, scale1, alpha1, shift2, scale2, alpha2 = self.modulation(F.silu(context.time)).chunk(6, dim=-1)
        if gate != 1:
            alpha1, alpha2 = gate * alpha1, gate * alpha2
        h = torch.addcmul(h, alpha1[:, None], self.attention(modulate(h, shift1, scale1), context))
        x = F.dropout(F.gelu(self.ff_in(modulate(h, shift2, scale2))), self.dropout, self.training)
        return torch.addcmul(h, alpha2[:, None], self.ff_out(x))


class FlowModel(nn.Module):
    """What training, probes and sampling ask of a model: ours or backbones.py's. A subclass has `tokens`, the table of
    codes, `blocks`, each layer's modules, `velocity` as DiT's, and `reset_parameters`, which draws all weights anew."""

    one_sweep = property(lambda self: type(self).ablated is not FlowModel.ablated)  # whether ablated() grows one batch

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

    def ablated(self, x_t: Tensor, t: Tensor, cond: Condition, updates: Sequence[Tensor] | None = None) -> Tensor:
        """v and every v^(-l) (eq. 8), (L + 1, B, T, M), index 0 the intact model; here a whole pass for each. Given
        `updates`, (B, T, D) for each layer, the closed layer turns h into h + its update instead of into h itself."""
        if updates is not None:
            raise ValueError("this backbone's layers can be closed alone: ablation=zero, not mean or resample")
        layers = range(self.config.n_layer)
        return torch.stack([self.velocity(x_t, t, cond, [float(l != k) for l in layers]) for k in (-1, *layers)])

    def normalise(self, mel: Tensor) -> Tensor:
        """Log-mel (..., M) -> x1: floored, then per-bin zero mean and unit variance over the training corpus."""
        return (torch.maximum(mel, self.mel_floor) - self.mel_mean) / self.mel_std

    def denormalise(self, x: Tensor) -> Tensor:
        return x * self.mel_std + self.mel_mean

    def tokens_at_frames(self, batch) -> Tensor:
        """The embedding of tokens (B, N) or (B, N, 2), stretched to the mel's rate: (B, T, D)."""
        tokens, lengths = batch.tokens if batch.tokens.dim() == 3 else batch.tokens[..., None], batch.token_len
        e = self.tokens(tokens[..., 0] + self.code_offset[batch.domain][:, None])
        if self.config.second_codes:
            second = self.second(tokens[..., 1])
            if self.config.interleave == "pair":
                e = self.pair(torch.cat([e, second], dim=-1))
            else:  # p1, b1, p2, b2, ... (eq. 15)
                e, lengths = torch.stack([e, second], dim=2).flatten(1, 2), 2 * lengths  # (B, 2N, D)
        return stretch(e, lengths, batch.frames, batch.mel.shape[1])

    def embed_condition(self, batch, drop: float = 0.0) -> Condition:
        """c of eq. 21 from a data.Batch; with probability `drop` a clip loses its whole condition, for guidance. The
        embedding keeps its gradient, so L_BiTC and L_FM both train the token tables."""
        j = torch.arange(batch.mel.shape[1], device=batch.mel.device)
        mask = j < batch.frames[:, None]  # (B, T)
        kept = torch.rand(len(batch.frames), device=mask.device) >= drop
        tokens = self.tokens_at_frames(batch) * (mask & kept[:, None])[..., None]
        prompt = self.normalise(batch.mel) * ((j < batch.prompt[:, None]) & kept[:, None])[..., None]
        return Condition(tokens, prompt, mask, kept, batch.padded)


class DiT(FlowModel):
    """The velocity field v(x_t, t, c), with a gate on each of its L blocks."""

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
        self.local = nn.Conv1d(D, D, 31, padding=15, groups=D)  # neighbourhood, before the first block
        self.time_mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head_out = nn.Linear(D, M)
        self.reset_parameters(at_zero=True)

    def reset_parameters(self, at_zero: bool = False) -> None:
        """Xavier and small tables; `at_zero`, as DiT begins, zeros at every adaLN layer and the output (eq. 22)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        self.init_projections()
        if not at_zero:
            self.local.reset_parameters()  # which keeps torch's own initialisation
        for linear in [*(b.modulation for b in self.blocks), self.head_modulation, self.head_out]:
            (nn.init.zeros_ if at_zero else nn.init.xavier_uniform_)(linear.weight)

    def stem(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Context]:
        """x_t (B, T, M), t (B,) -> h_0 (B, T, D) and what the blocks need."""
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=t.dtype) / 128)
        angle = 1000 * t[:, None] * frequency
        time = self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(x_t.dtype))
        h = cond.masked(self.stem_in(torch.cat([x_t, cond.tokens, cond.prompt], dim=-1)))  # zeros beyond a clip's edge
        image = h[:, None].permute(0, 3, 1, 2)  # (B, D, 1, T), channels last: a fast depthwise kernel, no transposes
        weight = self.local.weight.unflatten(1, (1, 1))  # (D, 1, 1, 31), a view whose gradient DDP need not copy
        near = F.conv2d(image, weight, self.local.bias, padding=(0, 15), groups=len(weight))
        h = h + F.gelu(near[:, :, 0].mT)
        mask = cond.mask[:, None, None] if cond.padded else None  # without one GPUs use their fastest kernel
        return h, Context(time, mask, rotary_table(x_t, self.config.n_embd // self.config.n_head))

    def head(self, h: Tensor, context: Context) -> Tensor:
        shift, scale = self.head_modulation(F.silu(context.time)).chunk(2, dim=-1)
        return self.head_out(modulate(h, shift, scale)).to(torch.promote_types(h.dtype, torch.float32))

    def velocity(self, x_t: Tensor, t: Tensor, cond: Condition, gates: Sequence[float] | None = None, hidden=False):
        """v (B, T, M) at x_t (B, T, M), t (B,). `gates` holds g_1..g_L; `hidden` also returns [h_0, ..., h_L]."""
        h, context = self.stem(x_t, t, cond)
        states = [h]
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block, gate in zip(self.blocks, gates or [1.0] * len(self.blocks), strict=True):
            h = checkpoint(block, h, context, gate, use_reentrant=False) if again else block(h, context, gate)
            if hidden:
                states.append(h)
        v = self.head(h, context)
        return (v, states) if hidden else v

    def ablated(self, x_t: Tensor, t: Tensor, cond: Condition, updates: Sequence[Tensor] | None = None) -> Tensor:
        """All ablations in one sweep: that of layer l shares all that runs before l, so one batch grows: after layer l
        the state that skipped it joins. Exactly the naive loop's result for (L + 1) / 2 forward passes, not L + 1."""
        B, L = len(x_t), len(self.blocks)
        h, context = self.stem(x_t, t, cond)
        for l, block in enumerate(self.blocks):
            skipped = h[:B] if updates is None else h[:B] + updates[l]  # h[:B]: the intact state before this layer
            h = torch.cat([block(h, context.repeat(len(h) // B)), skipped])
        return self.head(h, context.repeat(L + 1)).unflatten(0, (L + 1, B))


def flops_per_frame(model: DiT, T: int) -> float:
    """FLOPs of a training step per frame of clips of T: thrice 2 a weight, and 4 T D a layer for attention's two."""
    per_block = [layer for b in model.blocks for layer in (b.qkv, b.attn_out, b.ff_in, b.ff_out)]
    weights = sum(layer.weight.numel() for layer in (model.stem_in, model.local, *per_block, model.head_out))
    return 3 * (2 * weights + 4 * T * model.config.n_embd * model.config.n_layer)


def masked_mean(x: Tensor, cond: Condition) -> Tensor:
    """Mean of (B, T, D) over the valid frames of each clip -> (B, D), summed in at least float32."""
    frames = cond.mask.sum(1, keepdim=True) if cond.padded else x.shape[1]
    return cond.masked(x).sum(1, dtype=torch.promote_types(x.dtype, torch.float32)) / frames


def descriptor(h: Tensor, cond: Condition) -> Tensor:
    """z_l = LayerNorm(mean_t h_l), eq. 3: (B, T, D) -> (B, D)."""
    return F.layer_norm(masked_mean(h, cond), h.shape[-1:])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last axis, outside autocast: a half-precision norm overflows late in training."""
    with torch.autocast(a.device.type, enabled=False):
        wide = torch.promote_types(a.dtype, torch.float32)
        return F.cosine_similarity(a.to(wide), b.to(wide), dim=-1)


class ConvHead(nn.Module):
    """A convolution on the unpooled sequence, pooled after: (B, T, D) -> (B, E). bands=1 convolves over time; more
    bands fold D into a (time, band) plane and convolve over both, as iREPA does over an image's patches."""

    def __init__(self, D: int, width: int, E: int, bands: int):
        super().__init__()
        self.bands, reach = bands, int(bands > 1)
        self.conv = nn.Conv2d(D // bands, width // bands, (3, 1 + 2 * reach), padding=(1, reach))
        self.out = nn.Linear(width // bands * bands, E)

    def forward(self, h: Tensor, cond: Condition) -> Tensor:
        x = cond.masked(F.layer_norm(h, h.shape[-1:]))
        x = x.unflatten(2, (self.bands, -1)).permute(0, 3, 1, 2)  # (B, D / bands, T, bands)
        x = F.gelu(self.conv(x)).permute(0, 2, 3, 1).flatten(2)  # (B, T, width)
        return self.out(masked_mean(x, cond))


# for each domain {layer: its weight lambda_l in each of G equal parts of t}; G is 1 unless sets depend on t
Selection = Sequence[dict[int, Sequence[float]]]


class AlignHeads(nn.Module):
    """H_l of eq. 12 for each of a domain's `layers` and part of t, as `how`, a train.Config, says: align_head=mlp on
    the descriptor is the paper's; of align_target=frames a head maps each frame, conv1d as iREPA's. It learns from an
    encoder, or a deeper layer of the model (on frames, by none: LayerSync) or average; ctc_weight's spells the text."""

    def __init__(self, config: DiTConfig, layers: "Selection", how):
        super().__init__()
        self.how, self.frames = how, how.align_target == "frames"
        D, width = config.n_embd, how.head_dim or config.n_embd
        norm = [nn.LayerNorm(D, elementwise_affine=False)] if self.frames else []  # a descriptor has its own
        make = {
            "mlp": lambda E: nn.Sequential(*norm, nn.Linear(D, width), nn.GELU(), nn.Linear(width, E)),
            "conv1d": lambda E: nn.Conv1d(D, E, 3, padding=1) if self.frames else ConvHead(D, width, E, bands=1),
            "conv2d": lambda E: ConvHead(D, width, E, bands=math.gcd(16, D, width)),
            "none": lambda E: nn.Identity(),
        }[how.align_head]
        self.heads, self.of = nn.ModuleDict({"text": nn.Linear(D, 257)} if how.ctc_weight else {}), {}
        for d, selected in enumerate(layers):
            for l, weights in selected.items():
                for g in range(len(weights)):
                    self.of[d, l, g] = make(D if how.align_teacher != "external" else config.teachers[d][1])
                    self.heads[f"{DOMAINS[d]}_{l}_{g}".removesuffix("_0")] = self.of[d, l, g]

    def forward(self, domain: int, layer: int, h: Tensor, cond: Condition, g: int = 0) -> Tensor:
        """Hidden states (B, T, D) by the head of part g of t in the teacher's space, (B, E), or of frames (B, T, E)."""
        head = self.of[domain, layer, g]
        if self.frames:
            return head(cond.masked(h).mT).mT if isinstance(head, nn.Conv1d) else head(h)
        return head(h, cond) if isinstance(head, ConvHead) else head(descriptor(h, cond))

    def target(self, batch, name: str, deep: Tensor, cond: Condition) -> Tensor:
        """What forward() should be like: `deep` (B, T, D) itself, detached, or what the teacher says in the batch."""
        if self.how.align_teacher != "external":
            return (deep if self.frames else descriptor(deep, cond)).detach()
        target = (batch.target or batch.teacher)[name]
        return stretch(target, batch.target_len, batch.frames, deep.shape[1]) if self.frames else target


def make_xt(model: FlowModel, mel: Tensor, t: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """x_t and the target x1 - x0 (eq. 23) for log-mel (B, T, M) at t (B,), noise from the global generator."""
    x1 = model.normalise(mel)
    x0 = sigma * torch.randn_like(x1)
    return torch.lerp(x0, x1, t[:, None, None].to(x1.dtype)), x1 - x0


def masked_mse(v: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error over the valid frames of the batch, mean over frames and bins."""
    return ((v - target).square().mean(-1) * mask).sum() / mask.sum()


def bitc_loss(model: FlowModel, batch, cond: Condition, expected: Sequence[float]) -> Tensor:
    """L_BiTC, eq. 5: w_d (1 - s_T(0)) summed over the clips whose condition was kept, and divided by as many of their
    domain as are `expected` in a batch, so that a clip weighs the same beside any."""
    z0, loss = descriptor(cond.tokens, cond), cond.tokens.new_zeros((), dtype=torch.float32)
    for d, ((name, _), weight) in enumerate(zip(model.config.teachers, (0.5, 1.0), strict=True)):
        chosen = (batch.domain == d) & cond.kept
        score = cosine(model.projections[name](z0), batch.teacher[name])
        loss = loss + weight * ((1 - score) * chosen).sum() / (expected[d] or 1.0)
    return loss


def dispersive_loss(z: Tensor, chosen: Tensor, tau: float = 0.5) -> Tensor:
    """log mean exp(-|z_i - z_j|^2 / (D tau)) over all i, j of the chosen clips of z (B, D); arXiv:2506.09027."""
    pairs, none = chosen[:, None] & chosen, ~chosen.any()
    near = torch.exp(-(z[:, None] - z).square().mean(-1) / tau) * pairs
    return ((near.sum() + none) / (pairs.sum() + none)).log()


def ctc_loss(logits: Tensor, batch, cond: Condition) -> Tensor:
    """CTC in nats a byte of logits (B, T, 257), 0 the blank: the mean of clips with a text and their condition."""
    texts = [list(text.encode()) for text in batch.texts or [""] * len(cond.kept)]
    sizes = torch.tensor([len(text) for text in texts])
    letters = torch.tensor([letter + 1 for text in texts for letter in text], dtype=torch.long)
    of_time = logits.float().log_softmax(-1).transpose(0, 1)  # (T, B, 257)
    lost = F.ctc_loss(of_time, letters.to(logits.device), batch.frames, sizes, reduction="none", zero_infinity=True)
    chosen = cond.kept & (sizes > 0).to(lost.device)
    return (lost / sizes.clamp_min(1).to(lost.device) * chosen).sum() / chosen.sum().clamp_min(1)


class Objective(nn.Module):
    """What is trained, as one module for DDP: the model and, in phase II, its heads. `config` is a train.Config."""

    def __init__(self, model: FlowModel, config, ema: FlowModel | None = None):
        super().__init__()
        self.model, self.config = model, config
        self.heads: AlignHeads | None = None
        self.selection: Selection = [{} for _ in DOMAINS]
        self.aligned = True  # False: the heads stay in the graph, for DDP, but the term counts nothing
        self.expected: Sequence[float] = (1.0, 1.0)  # clips of each domain in a mean batch
        self.ema = ema if config.align_teacher == "ema" else None  # the averaged model

    def select(self, selection: Selection) -> None:
        """Aligns these layers from now on, each with a head of its own, drawn from config.seed so that branches start
        alike. A selection that will be refreshed gets a head for every layer at once, weight 0 where not selected."""
        c = self.config
        if c.refresh_epochs and any(selection):
            last = self.model.config.n_layer - (c.align_teacher == "self")  # which has no deeper one to learn from
            unused = [0.0] * (c.probe_times if c.timestep_adaptive else 1)
            selection = [{l: s.get(l, unused) for l in range(1, last + 1)} if s else {} for s in selection]
        self.selection = selection
        if any(selection) and self.heads is None:
            with torch.random.fork_rng([]):
                torch.manual_seed(c.seed)
                self.heads = AlignHeads(self.model.config, selection, c).to(self.model.mel_std.device)

    def alignment(self, batch, cond: Condition, states, deeper, t: Tensor, expected: Sequence[float]) -> Tensor:
        """Last term of eq. 12: over each domain d and its selected layers, lambda_l (1 - cos(H_l(h_l), e_d)), of frames
        the mean, over the domain's clips as in bitc_loss(). `states`, and `deeper` that a model learns from itself, are
        [h_0..h_L]; e_d is AlignHeads.target(). t_weight=taro is arXiv:2504.05684's, doubled: its mean is 1."""
        heads, how, L = self.heads, self.heads.how, len(states) - 1
        loss = states[0].new_zeros((), dtype=torch.float32)
        for d, layers in enumerate(self.selection):
            chosen, name = (batch.domain == d) & cond.kept, self.model.config.teachers[d][0]
            for l, weights in layers.items():
                further = min(L, l + max(1, L // 3))  # what teaches l in self-alignment: a third of the depth on
                target = heads.target(batch, name, deeper[further], cond)
                part = (t * len(weights)).long().clamp_max(len(weights) - 1)
                for g, w in enumerate(weights):  # each on all clips, so that DDP meets every head in a step
                    score = cosine(heads(d, l, states[l], cond, g), target)  # (B,), or of frames (B, T)
                    score = masked_mean(score[..., None], cond)[:, 0] if heads.frames else score
                    weight = w * (chosen & (part == g)).to(t.dtype)
                    weight = 2 * t * weight if how.t_weight == "taro" else weight  # t is sigmoid(log(t / (1 - t)))
                    loss = loss + (weight * (1 - score)).sum() / (expected[d] or 1.0)
                if how.dispersive:
                    loss = loss + how.dispersive / len(layers) * dispersive_loss(masked_mean(states[l], cond), chosen)
        if how.ctc_weight:  # as A-DMA (arXiv:2505.19595), at half the depth
            loss = loss + how.ctc_weight * ctc_loss(heads.heads["text"](states[len(states) // 2]), batch, cond)
        return loss

    def forward(self, batch) -> dict[str, Tensor]:
        """The losses of one batch: fm (eq. 23), bitc (eq. 5), with heads align (eq. 12), and their weighted sum."""
        c, model = self.config, self.model
        kept = [n * (1 - c.token_drop) for n in self.expected]
        cond = model.embed_condition(batch, c.token_drop)
        t = torch.rand(len(batch.frames), device=batch.mel.device)
        x_t, target = make_xt(model, batch.mel, t, c.sigma)
        v, states = model.velocity(x_t, t, cond, hidden=True)
        losses = {"fm": masked_mse(v, target, cond.mask), "bitc": bitc_loss(model, batch, cond, kept)}
        loss = losses["fm"] + c.bitc_weight * losses["bitc"]
        if self.heads is not None:
            deeper = states
            if self.ema is not None:  # SRA's (arXiv:2505.02831): the average at less noise on the same line
                later = (t + 0.2 * torch.rand_like(t)).clamp_max(1)
                x_later = x_t + (later - t)[:, None, None].to(x_t.dtype) * target
                deeper = self.ema.velocity(x_later, later, self.ema.embed_condition(batch), hidden=True)[1]
            losses["align"] = self.alignment(batch, cond, states, deeper, t, kept)
            loss = loss + self.aligned * losses["align"]
        return losses | {"loss": loss}


EPSS = {  # F5-TTS's empirically pruned steps, in 32nds (arXiv:2505.19931)
    5: (0, 2, 4, 8, 16, 32),
    6: (0, 2, 4, 6, 8, 16, 32),
    7: (0, 2, 4, 6, 8, 16, 24, 32),
    10: (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    12: (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    16: (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32),
}


def time_grid(nfe: int, sway: float = -1.0, epss: bool = False, method: str = "euler") -> Tensor:
    """Times from 0 to 1 of the steps that `nfe` evaluations make, even or EPSS's, then sway-warped as in F5-TTS: u +
    s (cos(pi u / 2) - 1 + u). Raises ValueError for what cannot be sampled."""
    if method not in ("euler", "midpoint") or nfe < 1 or (method == "midpoint" and nfe % 2):
        raise ValueError(f"sampler {method!r} with nfe={nfe}: use euler with nfe >= 1, or midpoint with an even nfe")
    steps = nfe if method == "euler" else nfe // 2
    if epss and steps not in EPSS:
        raise ValueError(f"epss has no schedule of {steps} steps; it has {', '.join(map(str, EPSS))}")
    u = torch.tensor(EPSS[steps]).double() / 32 if epss else torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return u + sway * (torch.cos(math.pi * u / 2) - 1 + u)


def as_graph(function: Callable[..., Tensor], *like: Tensor) -> Callable[..., Tensor]:
    """`function` of CUDA tensors of the shapes of `like` as a CUDA graph, one launch instead of hundreds; each call
    overwrites what the one before returned."""
    inputs, graph = [x.clone() for x in like], torch.cuda.CUDAGraph()
    function(*inputs)  # before: libraries set themselves up, and autocast keeps the weights it has cast
    with torch.cuda.graph(graph):
        output = function(*inputs)

    def replay(*given: Tensor) -> Tensor:
        for x, new in zip(inputs, given, strict=True):
            x.copy_(new)
        graph.replay()
        return output

    return replay


@torch.no_grad()
def sample(
    model: FlowModel, cond: Condition, nfe=32, cfg_scale=2.0, sway=-1.0, sigma=0.5, method="euler", epss=False, seed=0
) -> Tensor:
    """Integrates dx = v dt from noise to a normalised mel (B, T, M), zeros on padding. `nfe` counts evaluations of v
    (`method` euler spends one a step, midpoint two); guidance, v_u + cfg_scale (v_c - v_u) in one batch of 2B, is off
    at cfg_scale = 1. A clip's noise depends on `seed` and its place in the batch, not on padding. Raises ValueError."""
    times = time_grid(nfe, sway, epss, method)
    (B, T), M = cond.mask.shape, model.config.n_mels
    x = torch.zeros(B, T, M)
    for b, n in enumerate(cond.mask.sum(1).tolist() if cond.padded else [T] * B):
        x[b, :n] = sigma * torch.randn(n, M, generator=torch.Generator().manual_seed(seed * 100_003 + b))
    x = x.to(cond.tokens.device, torch.promote_types(cond.tokens.dtype, torch.float32))
    copies, given = (1, cond) if cfg_scale == 1 else (2, cond.with_null())

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        v = model.velocity(x_t.repeat(copies, 1, 1), t.expand(copies * B), given)
        return v if copies == 1 else v[B:] + cfg_scale * (v[:B] - v[B:])

    step = as_graph(velocity, x, x.new_zeros(())) if x.is_cuda and isinstance(model, DiT) else velocity
    for t, dt in zip(times[:-1].tolist(), times.diff().tolist(), strict=True):
        v = step(x, x.new_full((), t))
        if method == "midpoint":
            v = step(x + dt / 2 * v, x.new_full((), t + dt / 2))
        x = x + dt * v
    return cond.masked(x)
