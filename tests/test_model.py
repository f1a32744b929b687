"""model.py against independent references: equations written out plainly, single clips, numpy loops, known ODEs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as m
from common import count_parameters
from data import Batch
from model import AlignHeads, Condition, DiT, DiTConfig
from train import Config

SIZE = {"n_layer": 4, "n_head": 2, "n_embd": 32, "ff_mult": 2, "n_mels": 12}
CONFIG = DiTConfig(**SIZE, dropout=0.1, codes=(11, 7), teachers=(("whisper", 12), ("aisfx", 10)))
L, FRAMES = CONFIG.n_layer, (23, 9, 31, 17, 12)
CLIPS = range(len(FRAMES))
ONE = (1.0, 1.0)  # expected clips of each domain, with which a loss is a sum over clips


def awake(config: DiTConfig = CONFIG) -> DiT:
    """A model in eval mode and float64, with non-zero values wherever it starts at zero, and real mel statistics."""
    model = DiT(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.2)
        model.mel_mean.normal_(-3, 1)
        model.mel_std.uniform_(1, 3)
        model.mel_floor.fill_(-5.0)
    return model


def random_batch(rng, config: DiTConfig = CONFIG, frames=FRAMES, domain=None, dtype=torch.float64) -> Batch:
    """Clips of the given lengths, domains alternating from a random first; junk, not zeros, on padding."""
    B, frames = len(frames), torch.tensor(frames)
    if domain is None:
        domain = (torch.arange(B) + int(rng.integers(2))) % 2
    length = torch.tensor([int(rng.integers(3, n + 1)) for n in frames])
    tokens = torch.rand(B, int(length.max())).mul(torch.tensor(config.codes)[domain][:, None]).long()
    if config.second_codes:
        tokens = torch.stack([tokens, torch.randint(config.second_codes, tokens.shape)], -1)
    mel = 2 * torch.randn(B, int(frames.max()), config.n_mels, dtype=dtype) - 3
    mel[torch.arange(mel.shape[1]) >= frames[:, None]] = 1e3
    teacher = {n: torch.randn(B, E, dtype=dtype) * (domain == d)[:, None] for d, (n, E) in enumerate(config.teachers)}
    prompt = torch.tensor([int(rng.integers(0, n // 3 + 1)) for n in frames])
    return Batch(mel, frames, tokens, length, domain, teacher, prompt, torch.arange(B))


@pytest.fixture
def model(rng) -> DiT:
    return awake()


@pytest.fixture
def batch(rng) -> Batch:
    return random_batch(rng)


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Clips start..stop - 1 as a batch of their own, no wider than they need."""
    part = batch.map(lambda x: x[start:stop])
    mel, tokens = part.mel[:, : part.frames.max()], part.tokens[:, : part.token_len.max()]
    return replace(part, mel=mel, tokens=tokens, padded=None)


def make_heads(layers, config: DiTConfig = CONFIG, **how) -> AlignHeads:
    parts = [x if isinstance(x, dict) else {l: [0.0] for l in x} for x in layers]
    return AlignHeads(config, parts, Config(**how)).double()


def with_frames(rng, batch: Batch) -> Batch:
    """The batch with a target of its own for stretches of frames, junk on its padding."""
    lengths = torch.tensor([int(rng.integers(1, n + 3)) for n in batch.frames])
    padding = torch.arange(int(lengths.max())) >= lengths[:, None]
    target = {name: torch.randn(*padding.shape, e.shape[1]).double() for name, e in batch.teacher.items()}
    for x in target.values():
        x[padding] = 1e3
    return replace(batch, target=target, target_len=lengths)


def forward(model: DiT, batch: Batch, **kwargs):
    """velocity at a random x_t, and what went in."""
    cond = model.embed_condition(batch)
    t = torch.rand(len(batch.frames), dtype=torch.float64)
    x_t, target = m.make_xt(model, batch.mel, t, 0.5)
    return model.velocity(x_t, t, cond, **kwargs), x_t, t, cond, target


def objective_of(model: DiT, heads, selection, expected=ONE, **how) -> m.Objective:
    objective = m.Objective(model, Config(**{"token_drop": 0.0} | how))
    objective.heads, objective.selection, objective.expected = heads, selection, expected
    return objective


def losses_of(model: DiT, batch: Batch, heads=None, selection=(), expected=ONE, **how) -> dict[str, torch.Tensor]:
    return objective_of(model, heads, selection, expected, **how)(batch)


def aligned(model: DiT, heads, batch: Batch, cond: Condition, states, t, selection, expected=ONE) -> torch.Tensor:
    return objective_of(model, heads, selection).alignment(batch, cond, states, states, t, expected)


def descriptors(cond: Condition, states) -> list[torch.Tensor]:
    return [m.descriptor(h, cond) for h in (cond.tokens, *states[1:])]


def close(a, b, tolerance: float = 1e-10) -> None:
    a, b = (x if isinstance(x, torch.Tensor) else torch.as_tensor(np.asarray(x, np.float64)) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("l", range(1, L + 1))
@pytest.mark.parametrize("training", [False, True])
def test_gate_zero_removes_a_layer_bit_for_bit(model, batch, l, training):
    model.train(training)
    gates = [float(k != l) for k in range(1, L + 1)]
    (_, h), *_ = forward(model, batch, gates=gates, hidden=True)
    assert len(h) == L + 1
    for k in range(1, L + 1):
        assert torch.equal(h[k], h[k - 1]) == (k == l)
    with torch.no_grad():
        model.blocks[l - 1].ff_out.weight.fill_(torch.nan)  # 0 * nan would be nan: the layer is not there at all
    assert forward(model, batch, gates=gates)[0].isfinite().all()


def test_gates_of_one_are_no_gates_and_a_half_is_between(model, batch):
    (v, whole), x_t, t, cond, _ = forward(model, batch, hidden=True)
    assert torch.equal(v, model.velocity(x_t, t, cond, gates=[1.0] * L))
    for l in range(L):
        gates = [0.5 if k == l else 1.0 for k in range(L)]
        half, h = model.velocity(x_t, t, cond, gates=gates, hidden=True)
        assert not torch.allclose(half, v, rtol=1e-6)
        assert torch.equal(h[l], whole[l])
        assert not torch.allclose(h[l + 1], whole[l + 1]) and not torch.allclose(h[l + 1], h[l])
    with pytest.raises(ValueError):
        model.velocity(x_t, t, cond, gates=[1.0] * (L - 1))


HEADS = "mlp external clip, conv1d self clip, conv2d external clip, none self clip"
HEADS += ", mlp external frames, conv1d external frames, conv1d self frames, none self frames"


@pytest.mark.parametrize("how", HEADS.split(", "))
@pytest.mark.parametrize("second, interleave", [(0, "pair"), (5, "pair"), (5, "sequence")])
def test_a_clip_is_the_same_alone_and_padded(rng, second, interleave, how):
    config, (head, teacher, target) = replace(CONFIG, second_codes=second, interleave=interleave), how.split()
    model, batch = awake(config), random_batch(rng, config)
    batch = with_frames(rng, batch) if target == "frames" else batch
    selection = [{1: [0.7], 3: [0.2, 0.9]}, {2: [1.1], 3: [0.4]}]
    heads = make_heads(selection, config, align_head=head, align_teacher=teacher, align_target=target)
    (v, states), x_t, t, cond, velocity = forward(model, batch, hidden=True)
    z, fm, bitc, align = descriptors(cond, states), 0.0, 0.0, 0.0
    for b, n in enumerate(FRAMES):
        clip, at = rows(batch, b, b + 1), slice(b, b + 1)
        c = model.embed_condition(clip)
        v_alone, h_alone = model.velocity(x_t[at, :n], t[at], c, hidden=True)
        close(v[b, :n], v_alone[0])
        for padded, alone in zip(z, descriptors(c, h_alone), strict=True):
            close(padded[b], alone[0])
        fm += n * m.masked_mse(v_alone, velocity[at, :n], c.mask)
        bitc += m.bitc_loss(model, clip, c, ONE)
        align += aligned(model, heads, clip, c, h_alone, t[at], selection)
    close(m.masked_mse(v, velocity, cond.mask), fm / sum(FRAMES))
    close(m.bitc_loss(model, batch, cond, ONE), bitc)
    close(aligned(model, heads, batch, cond, states, t, selection), align)


def test_stretch_is_linear_interpolation_of_each_clip(rng):
    frames, T = torch.tensor([37, 5, 400, 1, 20]), 400
    lengths = torch.tensor([20, 9, 213, 3, 1])
    x = torch.randn(5, 213, 6)
    y = m.stretch(x, lengths, frames, T)
    assert y.shape == (5, T, 6)
    for b, (n, f) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        alone = F.interpolate(x[b : b + 1, :n].mT, size=f, mode="linear", align_corners=False).mT
        close(y[b, :f], alone[0], 2e-4)  # float32 positions near 200 carry 2e-5
        if n == f:
            assert torch.equal(y[b, :f], x[b, :n])


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def linear(layer, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.weight.T + layer.bias


def naive_block(block, h: torch.Tensor, time: torch.Tensor, g: float, n_head: int) -> torch.Tensor:
    """Eq. 22 with the gate of eq. 7 for one clip without padding: h (T, D), time (D,)."""
    T, D = h.shape
    d = D // n_head
    shift1, scale1, alpha1, shift2, scale2, alpha2 = linear(block.modulation, time / (1 + (-time).exp())).view(6, D)
    theta = torch.arange(T)[:, None] * 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    turn = torch.complex(theta.cos(), theta.sin())
    qkv = linear(block.qkv, layer_norm(h) * (1 + scale1) + shift1)
    heads = []
    for i in range(n_head):
        q, k, v = (qkv[:, part * D + i * d : part * D + (i + 1) * d] for part in range(3))
        q, k = (torch.complex(x[:, : d // 2].contiguous(), x[:, d // 2 :].contiguous()) * turn for x in (q, k))
        score = (q @ k.conj().T).real / math.sqrt(d)
        weight = (score - score.max(1, keepdim=True).values).exp()
        heads.append(weight / weight.sum(1, keepdim=True) @ v)
    h = h + g * alpha1 * linear(block.attn_out, torch.cat(heads, 1))
    x = linear(block.ff_in, layer_norm(h) * (1 + scale2) + shift2)
    return h + g * alpha2 * linear(block.ff_out, gelu(x))


@pytest.mark.parametrize("gate", [1.0, 0.5, 0.0])
@torch.no_grad()
def test_block_is_equation_22(model, batch, gate):
    _, x_t, t, cond, _ = forward(model, batch)
    h, context = model.stem(x_t, t, cond)
    for block in model.blocks:
        after = block(h, context, gate)
        for b, n in enumerate(FRAMES):
            close(after[b, :n], naive_block(block, h[b, :n], context.time[b], gate, CONFIG.n_head), 1e-11)
        h = after


@torch.no_grad()
def test_the_stem_convolves_as_conv1d_does(rng, model, batch):
    """The same weights in torch's own one-dimensional module, of each clip alone."""
    _, x_t, t, cond, _ = forward(model, batch)
    h, _ = model.stem(x_t, t, cond)
    for b, n in enumerate(FRAMES):
        x = model.stem_in(torch.cat([x_t, cond.tokens, cond.prompt], -1)[b : b + 1, :n])
        close(h[b, :n], (x + gelu(model.local(x.mT).mT))[0], 1e-12)


def test_the_mean_of_whole_clips_is_that_under_a_full_mask(model, batch):
    """Without a float32 copy of the states, in float32 sums all the same."""
    x, ones = torch.randn(3, 2000, 8).bfloat16(), torch.ones(3, 2000, dtype=torch.bool)
    masked, whole = (Condition(x, x, ones, ones[:, 0], padded) for padded in (True, False))
    close(m.masked_mean(x, whole), m.masked_mean(x, masked), 1e-6)
    close(m.masked_mean(x, whole).double(), x.double().mean(1), 1e-5)
    assert m.masked_mean(x, whole).dtype == torch.float32


@pytest.mark.parametrize("shape, padded", [((3, 2, 40, 16), True), ((5, 3, 400, 16), True), ((1, 2, 1500, 8), False)])
def test_bfloat16_attention_is_attention(rng, shape, padded):
    """Values and gradients against float64, heads in one part and in several, within four times the fused kernel's
    error: both multiply bfloat16, the plain formula also rounds its scores."""
    B, _, T, d = shape
    mask = torch.arange(T) < torch.from_numpy(rng.integers(T // 2, T, B))[:, None] if padded else None
    mask = mask if mask is None else mask[:, None, None]
    inputs = [torch.from_numpy(rng.normal(size=shape)).bfloat16().requires_grad_() for _ in range(3)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    along = torch.from_numpy(rng.normal(size=shape))

    def both(attention, qkv):
        y = attention(*qkv, mask)
        return y, *torch.autograd.grad(y, qkv, along.to(y.dtype))

    def plain(q, k, v, mask):
        score = q @ k.mT / math.sqrt(d)
        return (score if mask is None else score.masked_fill(~mask, -math.inf)).softmax(-1) @ v

    true = both(plain, wide)
    for a, b, c in zip(both(m.attend, inputs), both(F.scaled_dot_product_attention, inputs), true, strict=True):
        assert a.dtype == torch.bfloat16 and (a - c).norm() < 4 * (b - c).norm() < 0.1 * c.norm()


def test_a_mel_comes_back_but_for_what_is_below_the_floor(model, batch):
    close(model.denormalise(model.normalise(batch.mel)), batch.mel.clamp_min(-5.0), 1e-12)


def test_a_new_model_has_velocity_zero_blocks_of_identity_and_orthogonal_projections(batch):
    model, statistics = DiT(CONFIG).double(), 2 * CONFIG.n_mels + 1
    assert count_parameters(model) == sum(math.prod(v.shape) for v in model.state_dict().values()) - statistics
    (v, h), *_ = forward(model, batch, hidden=True)
    assert not v.any() and all(torch.equal(a, h[0]) for a in h)
    for name, E in CONFIG.teachers:
        p = model.projections[name]
        assert p.bias is None
        close(p.weight @ p.weight.T, torch.eye(E).double(), 1e-5)


def test_the_loss_is_its_parts(rng, model, batch):
    heads, selection = make_heads([(2,), (1, 4)]), [{2: [0.3]}, {1: [0.5], 4: [0.25]}]
    seed, how = int(rng.integers(1 << 31)), {"sigma": 0.6, "token_drop": 0.4, "bitc_weight": 0.7}
    torch.manual_seed(seed)
    losses = losses_of(model, batch, heads, selection, (2.0, 0.0), **how)  # 40 % lose their condition
    close(losses["loss"], losses["fm"] + 0.7 * losses["bitc"] + losses["align"])
    torch.manual_seed(seed)
    cond = model.embed_condition(batch, 0.4)
    t = torch.rand(len(FRAMES))
    x0 = 0.6 * torch.randn_like(batch.mel)
    x1 = (batch.mel.clamp_min(-5.0) - model.mel_mean) / model.mel_std
    at = t[:, None, None].double()
    v, states = model.velocity((1 - at) * x0 + at * x1, t, cond, hidden=True)
    error = [((v - x1 + x0)[b, :n] ** 2).mean(1) for b, n in enumerate(FRAMES)]
    close(losses["fm"], torch.cat(error).mean(), 1e-9)
    close(losses["bitc"], m.bitc_loss(model, batch, cond, (1.2, 0.0)))
    close(losses["align"], aligned(model, heads, batch, cond, states, t, selection, (1.2, 0.0)))
    assert set(losses_of(model, batch)) == {"fm", "bitc", "loss"}


@torch.no_grad()
def test_descriptor_is_equation_3(model, batch):
    (_, states), _, _, cond, _ = forward(model, batch, hidden=True)
    for (b, n), h in itertools.product(enumerate(FRAMES), (cond.tokens, *states)):
        close(m.descriptor(h, cond)[b], layer_norm(h[b, :n].mean(0)), 1e-11)


def test_self_alignment_learns_from_a_deeper_layer_and_does_not_move_it(model, batch):
    heads, expected = make_heads([(1,), (1,)], align_teacher="self"), 0.0
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)
    deep = m.descriptor(states[1 + max(1, L // 3)], cond)
    for b in CLIPS:
        x = heads(int(batch.domain[b]), 1, states[1], cond)[b]
        expected += 1 - (x * deep[b]).sum() / (x.norm() * deep[b].norm())
    loss = aligned(model, heads, batch, cond, states, t, [{1: [1.0]}, {1: [1.0]}])
    close(loss, expected)
    loss.backward()
    assert any(p.grad is not None for p in model.blocks[0].parameters())
    assert all(p.grad is None for block in model.blocks[1:] for p in block.parameters())


@torch.no_grad()
def test_a_clip_weighs_the_same_whoever_shares_its_batch(model, batch):
    """Batches of 1 to 5 clips against a loop over clips: each is worth 1 / expected, nothing without its condition."""
    heads, selection, expected = make_heads([(1,), (3,)]), [{1: [0.7]}, {3: [1.1]}], (2.5, 0.4)
    cond = model.embed_condition(batch)._replace(kept=torch.tensor([True, True, False, True, True]))
    t, alone, kept = torch.rand(len(FRAMES)), [], cond.kept.tolist()
    _, states = model.velocity(batch.mel, torch.rand(len(FRAMES)).double(), cond, hidden=True)
    for b in CLIPS:
        d = int(batch.domain[b])
        name = CONFIG.teachers[d][0]
        e, l = batch.teacher[name][b], (1, 3)[d]
        p = model.projections[name].weight @ m.descriptor(cond.tokens, cond)[b]
        x = heads(d, l, states[l], cond)[b]
        wrong = [1 - (y @ e) / (y.norm() * e.norm()) for y in (p, x)]
        weights = (0.5, 1.0)[d], (0.7, 1.1)[d]
        alone.append([kept[b] * w * y / expected[d] for w, y in zip(weights, wrong, strict=True)])
    for ids in ([0], [2], [1, 4], [0, 1, 3, 4], [*CLIPS]):
        some, c, of = batch.map(lambda x, ids=ids: x[ids]), cond.clips(ids), [h[ids] for h in states]
        close(m.bitc_loss(model, some, c, expected), sum(alone[b][0] for b in ids), 1e-6)
        align = aligned(model, heads, some, c, of, t[ids], selection, expected)
        close(align, sum(alone[b][1] for b in ids), 1e-6)


def test_bitc_reaches_only_the_rows_of_used_tokens(model, batch):
    cond = model.embed_condition(batch, drop=0.4)
    m.bitc_loss(model, batch, cond, ONE).backward()
    used = set()
    for b in cond.kept.nonzero().flatten().tolist():
        used |= {int(i) + (0, 11)[batch.domain[b]] for i in batch.tokens[b, : batch.token_len[b]]}
    assert not any(e.requires_grad for e in batch.teacher.values())
    grad = model.tokens.weight.grad
    assert grad.isfinite().all() and set(grad.abs().sum(1).nonzero().flatten().tolist()) == used
    assert all(p.grad.isfinite().all() for p in model.projections.parameters())
    assert all(p.grad is None for p in model.blocks.parameters())
    model.zero_grad()
    losses = losses_of(model, batch, token_drop=1.0)  # and without any condition, none
    assert losses["bitc"].item() == 0
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not model.tokens.weight.grad.any()


def test_alignment_is_a_loop_over_clips(model, batch):
    selection = [{1: [0.7], 3: [0.1, 0.2, 0.3]}, {3: [1.1, 0.0], 4: [0.4]}]
    heads = make_heads(selection, head_dim=9)
    assert sorted(heads.heads) == "audio_3 audio_3_1 audio_4 speech_1 speech_3 speech_3_1 speech_3_2".split()
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)
    z, expected = descriptors(cond, states), 0.0
    for b, d in enumerate(batch.domain.tolist()):
        for l, weights in selection[d].items():
            g = min(int(t[b] * len(weights)), len(weights) - 1)  # of the clip's own part of t
            first, _, last = heads.heads[f"{('speech', 'audio')[d]}_{l}" + (f"_{g}" if g else "")]
            x, e = linear(last, gelu(linear(first, z[l][b]))), batch.teacher[CONFIG.teachers[d][0]][b]
            expected += weights[g] * (1 - (x @ e) / (x.norm() * e.norm()))
    close(aligned(model, heads, batch, cond, states, t, selection), expected)


def test_alignment_learns_the_batchs_target_and_bitc_its_teacher(model, batch):
    heads, selection = make_heads([(1,), (3,)]), [{1: [0.7]}, {3: [1.1]}]
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)
    other = {name: torch.randn_like(x) for name, x in batch.teacher.items()}
    targeted, taught = replace(batch, target=other), replace(batch, teacher=other)
    close(*(aligned(model, heads, b, cond, states, t, selection) for b in (targeted, taught)))
    close(m.bitc_loss(model, targeted, cond, ONE), m.bitc_loss(model, batch, cond, ONE))


@pytest.mark.parametrize("head, t_weight", [("mlp", "none"), ("conv1d", "taro")])
def test_alignment_of_frames_is_a_loop_over_clips_and_frames(rng, model, batch, head, t_weight):
    batch, selection = with_frames(rng, batch), [{1: [0.7]}, {3: [1.1]}]
    how = {"align_target": "frames", "head_dim": 9, "align_head": head, "t_weight": t_weight}
    heads, expected = make_heads([(1,), (3,)], **how), 0.0
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)
    for b, T in enumerate(FRAMES):
        d = int(batch.domain[b])
        l, N, h = (1, 3)[d], int(batch.target_len[b]), states[(1, 3)[d]][b]
        layers, rows, total = heads.heads[f"{('speech', 'audio')[d]}_{l}"], batch.target[CONFIG.teachers[d][0]][b], 0.0
        for j in range(T):
            at = min(max((j + 0.5) * N / T - 0.5, 0), N - 1)  # of the frame's centre, in rows
            e = rows[int(at)] * (1 - at % 1) + rows[min(int(at) + 1, N - 1)] * (at % 1)
            if head == "mlp":
                x = linear(layers[3], gelu(linear(layers[1], layer_norm(h[j]))))
            else:
                x = layers.bias + sum(layers.weight[:, :, k] @ h[j + k - 1] for k in range(3) if 0 <= j + k - 1 < T)
            total += 1 - (x @ e) / (x.norm() * e.norm())
        expected += selection[d][l][0] * (2 * t[b] if t_weight == "taro" else 1) * total / T
    close(aligned(model, heads, batch, cond, states, t, selection), expected, 1e-6)


def test_layersync_compares_tokens_with_a_deeper_layer_that_stays(model, batch):
    heads = make_heads([(1,), (2,)], align_head="none", align_teacher="self", align_target="frames")
    assert not list(heads.parameters())
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)
    loss, expected = aligned(model, heads, batch, cond, states, t, [{1: [1.0]}, {2: [1.0]}]), 0.0
    for b, T in enumerate(FRAMES):
        l = (1, 2)[batch.domain[b]]
        x, y = states[l][b, :T], states[l + 1][b, :T]
        expected += (1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean()
    close(loss, expected)
    loss.backward()
    assert any(p.grad is not None for p in model.blocks[1].parameters())
    assert all(p.grad is None for block in model.blocks[2:] for p in block.parameters())
    for l, teaches in ((1, 5), (6, 10), (10, 12), (11, 12)):  # a third of twelve layers on, at most the last
        heads, h = make_heads([(l,), (l,)], align_head="none", align_teacher="self"), list(torch.randn(13, 5, 31, 32))
        h[teaches] = h[l]
        close(aligned(model, heads, batch, cond, h, t, [{l: [1.0]}, {l: [1.0]}]), 0.0, 1e-6)


@pytest.mark.parametrize("target", ["clip", "frames"])
def test_the_average_teaches_at_less_noise_and_gets_no_gradient(rng, model, batch, target):
    """SRA by hand: the same noise and mel at t2, a deeper layer; every other loss as without it."""
    ema, seed = awake(), int(rng.integers(1 << 31))
    how = {"align_teacher": "ema", "align_head": "none", "align_target": target}
    objective = m.Objective(model, Config(**how, sigma=0.6, token_drop=0.4), ema)
    objective.select([{1: [0.3]}, {2: [0.8]}])
    torch.manual_seed(seed)
    losses = objective(batch)
    torch.manual_seed(seed)
    plain = losses_of(model, batch, sigma=0.6, token_drop=0.4)
    assert losses["fm"] == plain["fm"] and losses["bitc"] == plain["bitc"]
    torch.manual_seed(seed)
    cond = model.embed_condition(batch, 0.4)
    t = torch.rand(len(FRAMES))
    x0, x1 = 0.6 * torch.randn_like(batch.mel), model.normalise(batch.mel)
    later = (t + 0.2 * torch.rand(len(FRAMES))).clamp_max(1)
    mix = [(1 - u[:, None, None].double()) * x0 + u[:, None, None] * x1 for u in (t, later)]
    states = model.velocity(mix[0], t, cond, hidden=True)[1]
    deep = ema.velocity(mix[1], later, ema.embed_condition(batch), hidden=True)[1]
    pooled = [[m.descriptor(h, cond)[:, None] if target == "clip" else h for h in s] for s in (states, deep)]
    expected = 0.0
    for b in cond.kept.nonzero().flatten().tolist():
        d, n = int(batch.domain[b]), 1 if target == "clip" else FRAMES[b]
        x, y = pooled[0][(1, 2)[d]][b, :n], pooled[1][(2, 3)[d]][b, :n]
        expected += (0.3, 0.8)[d] * (1 - F.cosine_similarity(x, y)).mean()
    close(losses["align"], expected / 0.6, 1e-6)
    losses["loss"].backward()
    assert all(p.grad is None for p in ema.parameters())


def test_dispersion_is_a_loop_over_pairs_and_needs_no_teacher(model, batch):
    heads, selection = make_heads([(1, 3), (2,)], dispersive=0.25), [{1: [0.0], 3: [0.0]}, {2: [0.0]}]
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)
    expected = 0.0
    for d, layers in enumerate(selection):
        clips = [b for b in CLIPS if batch.domain[b] == d]
        for l in layers:
            z = [states[l][b, : FRAMES[b]].mean(0) for b in clips]
            near = [math.exp(-2 * (x - y).square().mean().item()) for x in z for y in z]
            expected += 0.25 * math.log(np.mean(near)) / len(layers)
    loss = aligned(model, heads, batch, cond, states, t, selection)
    close(loss, expected)
    loss.backward()
    assert model.blocks[0].qkv.weight.grad.any() and all(p.grad.isfinite().all() for p in model.blocks[2].parameters())
    none = m.dispersive_loss(torch.randn(3, 5).requires_grad_(), torch.zeros(3, dtype=torch.bool))
    none.backward()
    assert none == 0


def test_ctc_is_a_sum_over_paths_and_its_head_learns(model, batch):
    logits, frames = torch.randn(3, 5, 257, dtype=torch.float64), torch.tensor([4, 5, 5])
    clips = replace(batch, mel=batch.mel[:3], frames=frames, texts=("ab", "a", ""))
    cond = m.Condition(logits, logits, torch.ones(3, 5).bool(), torch.tensor([True, False, True]))
    paths = itertools.product((0, 98, 99), repeat=4)  # blank, a, b: whatever spells ab
    said = [p for p in paths if [k for k, _ in itertools.groupby(p) if k] == [98, 99]]
    p = logits[0].softmax(-1)
    total = sum(math.prod(p[t, k] for t, k in enumerate(path)) for path in said)
    close(m.ctc_loss(logits, clips, cond).double(), -total.log() / 2, 1e-6)  # one clip has a text and its condition
    heads, whole = make_heads([(1,), ()], ctc_weight=0.5), replace(batch, texts=("ab",) * len(FRAMES))
    (_, states), _, t, cond, _ = forward(model, whole, hidden=True)
    loss = aligned(model, heads, whole, cond, states, t, [{1: [0.0]}, {}])
    close(loss.float(), 0.5 * m.ctc_loss(heads.heads["text"](states[L // 2]), whole, cond))
    loss.backward()
    assert model.blocks[L // 2 - 1].qkv.weight.grad.any() and model.blocks[L // 2].qkv.weight.grad is None


@pytest.mark.parametrize("kind, bands", [("conv1d", 1), ("conv2d", 16)])
def test_convolutional_heads_see_neighbours_and_bands(rng, kind, bands):
    """Against a loop over (frame, band) of the valid frames, zeros around them."""
    head = make_heads([(1,), ()], head_dim=16, align_head=kind).heads["speech_1"]
    n, T, D, reach = 5, 8, CONFIG.n_embd, int(bands > 1)
    assert head.bands == bands
    h = torch.randn(1, T, D, dtype=torch.float64)
    cond = Condition(h, h, (torch.arange(T) < n)[None], torch.ones(1))
    x = layer_norm(h[0, :n]).view(n, bands, D // bands)
    pooled = torch.zeros(bands, 16 // bands, dtype=torch.float64)
    for i, b in itertools.product(range(n), range(bands)):
        y = head.conv.bias.clone()
        for di, db in itertools.product((-1, 0, 1), range(-reach, reach + 1)):
            if 0 <= i + di < n and 0 <= b + db < bands:
                y = y + head.conv.weight[:, :, di + 1, db + reach] @ x[i + di, b + db]
        pooled[b] += gelu(y) / n
    close(head(h, cond)[0], linear(head.out, pooled.flatten()))


@pytest.mark.parametrize("present", [0, 1])
def test_a_missing_domain_adds_zero_but_its_heads_get_gradients(rng, model, present):
    batch = random_batch(rng, domain=torch.full((len(FRAMES),), present))
    heads, selection = make_heads([(2,), (2,)]), [{2: [0.5]}, {2: [0.5]}]
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)

    there, away = ([s if (d == present) == kept else {} for d, s in enumerate(selection)] for kept in (True, False))
    sets = selection, there, away
    loss, same, zero = (aligned(model, heads, batch, cond, states, t, s) for s in sets)
    assert loss == same and zero == 0
    loss.backward()
    for name, p in heads.named_parameters():  # DDP waits for every parameter
        assert p.grad is not None and p.grad.isfinite().all()
        assert bool(p.grad.any()) == name.startswith(f"heads.{('speech', 'audio')[present]}")


def test_condition_is_tokens_on_valid_frames_and_a_prompt_prefix(model, batch):
    cond = model.embed_condition(batch)
    assert cond.kept.all()
    for b, n in enumerate(FRAMES):
        p, k = int(batch.prompt[b]), int(batch.token_len[b])
        assert cond.mask[b].tolist() == [j < n for j in range(max(FRAMES))]
        close(cond.prompt[b, :p], model.normalise(batch.mel[b, :p]), 1e-12)
        assert not cond.prompt[b, p:].any() and not cond.tokens[b, n:].any()
        e = model.tokens.weight[batch.tokens[b, :k] + (0, 11)[batch.domain[b]]]
        e = F.interpolate(e.T[None], size=n, mode="linear", align_corners=False)[0].T
        close(cond.tokens[b, :n], e, 1e-4)


def test_the_condition_is_dropped_from_all_some_or_the_second_half(rng, model, batch):
    batch.prompt = batch.frames // 3
    cond, dropped = model.embed_condition(batch), model.embed_condition(batch, drop=1.0)
    assert not dropped.kept.any() and not dropped.tokens.any() and not dropped.prompt.any() and dropped.mask.any()
    assert cond.kept.all() and cond.tokens.any() and cond.padded and cond.clips(torch.tensor([0])).padded
    both = cond.with_null()
    assert both.padded
    for a, b, c in zip(cond[:4], dropped[:4], both[:4], strict=True):
        assert torch.equal(c, torch.cat([a, b]))
    many = random_batch(rng, frames=[3] * 3000)
    many.prompt = torch.ones_like(many.prompt)
    cond = model.embed_condition(many, drop=0.3)
    assert abs(cond.kept.double().mean() - 0.7) < 0.05  # six standard deviations
    assert torch.equal(cond.tokens.flatten(1).any(1), cond.kept)
    assert torch.equal(cond.prompt.flatten(1).any(1), cond.kept)


@pytest.mark.parametrize("mode, each", [("pair", 1), ("sequence", 2)])
def test_pairs_are_joined_and_sequences_interleaved(rng, mode, each):
    config = replace(CONFIG, second_codes=5, interleave=mode)
    model, batch = awake(config), random_batch(rng, config)
    assert model.embed_condition(batch).tokens.shape == (len(FRAMES), max(FRAMES), CONFIG.n_embd)
    frames = each * batch.token_len  # as many as there are embeddings, so that nothing is interpolated
    e = model.tokens_at_frames(replace(batch, frames=frames, mel=torch.zeros(len(FRAMES), frames.max(), 12)))
    for b, i in (torch.arange(batch.tokens.shape[1]) < batch.token_len[:, None]).nonzero().tolist():
        p = model.tokens.weight[batch.tokens[b, i, 0] + (0, 11)[batch.domain[b]]]
        s = model.second.weight[batch.tokens[b, i, 1]]
        if mode == "pair":
            close(e[b, i], linear(model.pair, torch.cat([p, s])), 1e-12)
        else:
            assert torch.equal(e[b, 2 * i], p) and torch.equal(e[b, 2 * i + 1], s)


def test_without_padding_there_is_no_mask(rng, model):
    """The host knows it, also of a batch that moved; blocks are then given no mask, and the velocity is the same."""
    batch, seen = random_batch(rng, frames=[20, 20]), []
    assert not batch.padded and not batch.to("cpu").padded and random_batch(rng, frames=[20, 19]).padded
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1].mask))
    cond, x_t, t = model.embed_condition(batch), torch.randn_like(batch.mel), torch.rand(2).double()
    close(model.velocity(x_t, t, cond), model.velocity(x_t, t, cond._replace(padded=True)), 1e-12)
    handle.remove()
    assert seen[0] is None and seen[1].all()


@pytest.fixture
def cond(model, batch) -> Condition:
    with torch.no_grad():
        return model.embed_condition(batch)


def field(monkeypatch, model: DiT, f) -> list[tuple[int, float]]:
    """Replaces model.velocity by f(x, t); returns the growing list of (batch size, t) of its calls."""
    calls = []

    def velocity(x, t, cond):
        assert len(x) == len(t) == len(cond.tokens) and (t == t[0]).all()
        calls.append((len(x), t[0].item()))
        return f(x, t[0])

    monkeypatch.setattr(model, "velocity", velocity)
    return calls


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("scale", [1, 1.0, 2.5])
def test_nfe_counts_calls_and_guidance_doubles_the_batch(model, cond, monkeypatch, method, scale):
    calls = field(monkeypatch, model, lambda x, t: x)
    m.sample(model, cond, nfe=6, cfg_scale=scale, method=method)
    assert [n for n, _ in calls] == [len(FRAMES) * (1 if scale == 1 else 2)] * 6
    times = m.time_grid(6, method=method).tolist()
    expected = times[:-1]
    if method == "midpoint":
        expected = [u for a, b in itertools.pairwise(times) for u in (a, (a + b) / 2)]
    close([t for _, t in calls], expected, 1e-12)


@pytest.mark.parametrize("sway", [-1.0, 0.0])
def test_known_fields_are_integrated(model, cond, monkeypatch, sway):
    """A constant exactly; dx/dt = x cos 2t, of which x(1) = x(0) exp(sin(2) / 2), to the order of the method."""
    field(monkeypatch, model, lambda x, t: 0 * x)
    x0 = m.sample(model, cond, nfe=1, seed=3)
    assert x0.dtype == torch.float64 and not x0[~cond.mask].any()
    options = {"cfg_scale": 1, "sway": sway, "seed": 3}
    c = torch.randn(CONFIG.n_mels, dtype=torch.float64)
    field(monkeypatch, model, lambda x, t: c.expand_as(x))
    for nfe, method in ((1, "euler"), (7, "euler"), (2, "midpoint")):
        close(m.sample(model, cond, nfe=nfe, method=method, **options), (x0 + c) * cond.mask[..., None], 1e-12)
    field(monkeypatch, model, lambda x, t: x * torch.cos(2 * t))
    end = x0 * math.exp(math.sin(2) / 2)
    for method, order in (("euler", 1), ("midpoint", 2)):
        coarse, fine = ((m.sample(model, cond, nfe=n, method=method, **options) - end).norm() for n in (128, 256))
        assert abs(math.log2(coarse / fine) - order) < 0.15


def test_guidance(model, cond):
    null = cond.with_null().clips(torch.arange(len(FRAMES), 2 * len(FRAMES)))

    given = [(cond, 1), (null, 1), (cond, 1 + 1e-13), (cond, 0), (cond, 3)]  # the third: as one batch of 2B
    v_c, v_u, one, zero, three = (m.sample(model, c, nfe=1, cfg_scale=scale, seed=5) for c, scale in given)
    assert not torch.allclose(v_c, v_u)
    close(torch.cat([one, zero, three]), torch.cat([v_c, v_u, v_u + 3 * (v_c - v_u)]))


@pytest.mark.parametrize("scale", [1, 2.0])
def test_a_sample_is_the_same_alone_and_padded(model, batch, cond, scale):
    """And it leaves the global generator alone."""
    before = torch.get_rng_state()
    whole = m.sample(model, cond, nfe=4, cfg_scale=scale, seed=9)
    assert torch.equal(before, torch.get_rng_state()) and not whole[~cond.mask].any()
    for count in (1, 2):  # the longest clip is the third
        part = m.sample(model, model.embed_condition(rows(batch, 0, count)), nfe=4, cfg_scale=scale, seed=9)
        for b in range(count):
            close(whole[b, : FRAMES[b]], part[b, : FRAMES[b]])
    assert torch.equal(whole, m.sample(model, cond, nfe=4, cfg_scale=scale, seed=9))
    assert not torch.allclose(whole, m.sample(model, cond, nfe=4, cfg_scale=scale, seed=10))


@pytest.mark.parametrize("sway", [-1.0, -0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 32])
def test_time_grid(steps, sway):
    t = m.time_grid(steps, sway).numpy()
    assert len(t) == steps + 1 and t[0] == 0 and abs(t[-1] - 1) < 1e-15 and (np.diff(t) > 0).all()
    if sway == 0:
        close(t, np.linspace(0, 1, steps + 1), 1e-15)
    elif steps > 1:
        assert (t[1] < 1 / steps) == (sway < 0)  # negative sway spends more steps near the noise


@pytest.mark.parametrize("nfe, method", [(0, "euler"), (-1, "euler"), (3, "midpoint"), (0, "midpoint"), (4, "heun")])
def test_bad_sampler_settings(model, cond, nfe, method):
    with pytest.raises(ValueError, match="nfe"):
        m.sample(model, cond, nfe=nfe, method=method)


def gradients(model: DiT, batch: Batch, seed: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    losses_of(model.train(), batch, token_drop=0.2)["loss"].backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_activation_checkpointing_changes_nothing(model, batch):
    """Dropout included: the second computation of a block repeats its random numbers."""
    plain = gradients(model, batch)
    model.checkpoint_activations = True
    for a, b in zip(plain, gradients(model, batch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiled_blocks_have_no_breaks_and_serve_all_shapes(rng):
    """fullgraph raises at a graph break; shapes of five buckets, padded and not, cost at most two compilations more
    than the first, and gradients are those of the plain model."""
    import torch._dynamo as dynamo

    dynamo.reset()
    config = replace(CONFIG, dropout=0.0)
    plain, compiled, counts = awake(config).float(), DiT(config), []
    compiled.load_state_dict(plain.state_dict())
    for block in compiled.blocks:
        block.compile(dynamic=True, fullgraph=True)
    for frames in ([40, 40], [64, 50, 33], [128] * 4, [23, 21, 20], [96, 95]):
        batch = random_batch(rng, config, frames, dtype=torch.float32)
        for a, b in zip(gradients(plain, batch), gradients(compiled, batch), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        counts.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] <= counts[0] + 2, counts
