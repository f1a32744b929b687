"""model.py against independent references: equations written out plainly, single clips, numpy loops, known ODEs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import backbones
from data import Batch
from model import (
    AlignHeads,
    Condition,
    DiT,
    DiTConfig,
    alignment_loss,
    attend,
    bitc_loss,
    count_parameters,
    deeper_layer,
    descriptor,
    descriptors,
    flops_per_frame,
    flow_matching_loss,
    make_xt,
    masked_mse,
    sample,
    stretch,
    time_grid,
)

SHAPE = DiTConfig(
    n_layer=4,
    n_head=2,
    n_embd=32,
    ff_mult=2,
    dropout=0.1,
    codes=(11, 7),
    n_mels=12,
    teachers=(("whisper", 12), ("aisfx", 10)),
)
FRAMES = (23, 9, 31, 17, 12)


def awake(shape: DiTConfig = SHAPE) -> DiT:
    """A model in eval mode and float64, with non-zero values wherever it starts at zero, and real mel statistics."""
    model = DiT(shape).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.2)
        model.mel_mean.normal_(-3, 1)
        model.mel_std.uniform_(1, 3)
        model.mel_floor.fill_(-5.0)
    return model


def random_batch(
    rng: np.random.Generator, shape: DiTConfig = SHAPE, frames: Sequence[int] = FRAMES, domain=None
) -> Batch:
    """Clips of the given lengths in float64, domains alternating from a random first; junk, not zeros, on padding."""
    B, frames = len(frames), torch.tensor(frames)
    if domain is None:
        domain = (torch.arange(B) + int(rng.integers(2))) % 2
    length = torch.tensor([int(rng.integers(3, n + 1)) for n in frames])
    low = torch.tensor(shape.codes)[domain]
    tokens = torch.rand(B, int(length.max())).mul(low[:, None]).long()
    if shape.second_codes:
        tokens = torch.stack([tokens, torch.randint(shape.second_codes, tokens.shape)], -1)
    mel = 2 * torch.randn(B, int(frames.max()), shape.n_mels, dtype=torch.float64) - 3
    mel[torch.arange(mel.shape[1]) >= frames[:, None]] = 1e3
    teacher = {
        name: torch.randn(B, E, dtype=torch.float64) * (domain == d)[:, None]
        for d, (name, E) in enumerate(shape.teachers)
    }
    prompt = torch.tensor([int(rng.integers(0, n // 3 + 1)) for n in frames])
    return Batch(mel, frames, tokens, length, domain, teacher, prompt, torch.arange(B))


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Clips start..stop - 1 as a batch of their own, no wider than they need."""
    cut = slice(start, stop)
    T, N = int(batch.frames[cut].max()), int(batch.token_len[cut].max())
    return Batch(
        batch.mel[cut, :T],
        batch.frames[cut],
        batch.tokens[cut, :N],
        batch.token_len[cut],
        batch.domain[cut],
        {k: v[cut] for k, v in batch.teacher.items()},
        batch.prompt[cut],
        batch.ids[cut],
    )


def forward(model: DiT, batch: Batch, **kwargs):
    """velocity at a random x_t, and what went in."""
    cond = model.embed_condition(batch)
    t = torch.rand(len(batch.frames), dtype=torch.float64)
    x_t, target = make_xt(model, batch.mel, t, 0.5)
    return model.velocity(x_t, t, cond, **kwargs), x_t, t, cond, target


def close(a, b, tolerance: float = 1e-10) -> None:
    a, b = (x if isinstance(x, torch.Tensor) else torch.as_tensor(np.asarray(x, np.float64)) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- gates


@pytest.mark.parametrize("l", range(1, SHAPE.n_layer + 1))
@pytest.mark.parametrize("training", [False, True])
def test_gate_zero_removes_a_layer_bit_for_bit(rng, l, training):
    model = awake().train(training)
    gates = [0.0 if k == l else 1.0 for k in range(1, SHAPE.n_layer + 1)]
    (_, h), *_ = forward(model, random_batch(rng), gates=gates, hidden=True)
    assert len(h) == SHAPE.n_layer + 1
    for k in range(1, SHAPE.n_layer + 1):
        assert torch.equal(h[k], h[k - 1]) == (k == l)
    with torch.no_grad():
        model.blocks[l - 1].ff_out.weight.fill_(torch.nan)  # 0 * nan would be nan: the layer is not there at all
    v, *_ = forward(model, random_batch(rng), gates=gates)
    assert v.isfinite().all()


def test_gates_of_one_are_no_gates_and_a_half_is_between(rng):
    model, batch = awake(), random_batch(rng)
    v, x_t, t, cond, _ = forward(model, batch)
    assert torch.equal(v, model.velocity(x_t, t, cond, gates=[1.0] * 4))
    _, whole = model.velocity(x_t, t, cond, hidden=True)
    for l in range(4):
        gates = [1.0] * 4
        gates[l] = 0.5
        half, h = model.velocity(x_t, t, cond, gates=gates, hidden=True)
        assert not torch.allclose(half, v, rtol=1e-6)
        assert torch.equal(h[l], whole[l])
        assert not torch.allclose(h[l + 1], whole[l + 1]) and not torch.allclose(h[l + 1], h[l])
    with pytest.raises(ValueError):
        model.velocity(x_t, t, cond, gates=[1.0] * 3)


# ---- padding


@pytest.mark.parametrize("head, teacher", [("mlp", "external"), ("conv1d", "self"), ("conv2d", "external")])
@pytest.mark.parametrize("second, interleave", [(0, "pair"), (5, "pair"), (5, "sequence")])
def test_a_clip_is_the_same_alone_and_padded(rng, second, interleave, head, teacher):
    shape = replace(SHAPE, second_codes=second, interleave=interleave)
    model, batch = awake(shape), random_batch(rng, shape)
    heads = AlignHeads(shape, [(1, 3), (2, 3)], 0, head, teacher).double()
    selection = [{1: [0.7], 3: [0.2, 0.9]}, {2: [1.1], 3: [0.4]}]
    (v, states), x_t, t, cond, target = forward(model, batch, hidden=True)
    z = descriptors(cond, states)
    fm, bitc, align = 0.0, [[], []], [[], []]
    for b, n in enumerate(batch.frames.tolist()):
        clip = rows(batch, b, b + 1)
        c = model.embed_condition(clip)
        v_alone, h_alone = model.velocity(x_t[b : b + 1, :n], t[b : b + 1], c, hidden=True)
        close(v[b, :n], v_alone[0])
        z_alone = descriptors(c, h_alone)
        for padded, single in zip(z, z_alone, strict=True):
            close(padded[b], single[0])
        fm += n * masked_mse(v_alone, target[b : b + 1, :n], c.mask)
        d = int(batch.domain[b])
        bitc[d].append(bitc_loss(model, clip, c, (1.0, 1.0)))
        align[d].append(alignment_loss(model, heads, clip, c.mask, h_alone, t[b : b + 1], selection))
    close(masked_mse(v, target, cond.mask), fm / batch.frames.sum())
    mean = [torch.stack(s).mean() for s in bitc]
    close(bitc_loss(model, batch, cond), 0.5 * mean[0] + 1.0 * mean[1])
    close(
        alignment_loss(model, heads, batch, cond.mask, states, t, selection), sum(torch.stack(s).mean() for s in align)
    )


def test_stretch_is_linear_interpolation_of_each_clip(rng):
    frames, T = torch.tensor([37, 5, 400, 1, 20]), 400
    lengths = torch.tensor([20, 9, 213, 3, 1])
    x = torch.randn(5, 213, 6)
    y = stretch(x, lengths, frames, T)
    assert y.shape == (5, T, 6)
    for b, (n, f) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        alone = F.interpolate(x[b : b + 1, :n].mT, size=f, mode="linear", align_corners=False).mT
        close(y[b, :f], alone[0], 2e-4)  # float32 positions near 200 carry 2e-5
        if n == f:
            assert torch.equal(y[b, :f], x[b, :n])


# ---- the block, written out


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def naive_block(block, h: torch.Tensor, time: torch.Tensor, g: float, n_head: int) -> torch.Tensor:
    """Eq. 22 with the gate of eq. 7 for one clip without padding: h (T, D), time (D,)."""

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

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
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return h + g * alpha2 * linear(block.ff_out, x)


@pytest.mark.parametrize("gate", [1.0, 0.5, 0.0])
def test_block_is_equation_22(rng, gate):
    model, batch = awake(), random_batch(rng)
    _, x_t, t, cond, _ = forward(model, batch)
    with torch.no_grad():
        h, context = model.stem(x_t, t, cond)
        for block in model.blocks:
            after = block(h, context, gate)
            for b, n in enumerate(batch.frames.tolist()):
                close(after[b, :n], naive_block(block, h[b, :n], context.time[b], gate, SHAPE.n_head), 1e-11)
            h = after


@pytest.mark.parametrize(
    ("shape", "padded"), [((3, 2, 40, 16), True), ((5, 3, 400, 16), True), ((1, 2, 1500, 8), False)]
)
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

    def fused(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    true = both(plain, wide)
    for a, b, c in zip(both(attend, inputs), both(fused, inputs), true, strict=True):
        assert a.dtype == torch.bfloat16 and (a - c).norm() < 4 * (b - c).norm() < 0.1 * c.norm()


# ---- flow matching


def test_noised_is_equation_23(rng):
    model, batch = awake(), random_batch(rng)
    t, seed, sigma = torch.rand(len(FRAMES), dtype=torch.float64), int(rng.integers(1 << 31)), 0.7
    torch.manual_seed(seed)
    x_t, target = make_xt(model, batch.mel, t, sigma)
    torch.manual_seed(seed)
    x0 = sigma * torch.randn_like(batch.mel)
    x1 = (batch.mel.clamp_min(-5.0) - model.mel_mean) / model.mel_std
    for b in range(len(FRAMES)):
        close(x_t[b], (1 - t[b]) * x0[b] + t[b] * x1[b], 1e-12)
        close(target[b], x1[b] - x0[b], 1e-12)
    close(model.denormalise(model.normalise(batch.mel)), batch.mel.clamp_min(-5.0), 1e-12)


def test_noise_has_the_asked_spread(rng):
    model = awake()
    model.mel_floor.fill_(-100.0)
    _, target = make_xt(model, model.mel_mean.expand(1, 4000, -1), torch.zeros(1), 0.5)  # x1 = 0, so that it is -x0
    assert abs(target.std().item() - 0.5) < 0.02 and abs(target.mean().item()) < 0.02


def test_masked_mse_is_a_loop_over_valid_frames(rng):
    v, target = rng.normal(size=(2, 3, 8, 5))
    frames, total = [8, 2, 5], 0.0
    for b, n in enumerate(frames):
        for j in range(n):
            total += ((v[b, j] - target[b, j]) ** 2).sum()
    mask = torch.arange(8) < torch.tensor(frames)[:, None]
    close(masked_mse(torch.tensor(v), torch.tensor(target), mask), total / (sum(frames) * 5), 1e-12)


def test_velocity_starts_at_zero_and_blocks_at_identity(rng):
    model, batch = DiT(SHAPE).double(), random_batch(rng)
    (v, h), *_ = forward(model, batch, hidden=True)
    assert not v.any()
    assert all(torch.equal(a, h[0]) for a in h)


def test_flow_matching_loss_is_its_parts(rng):
    model, batch = awake(), random_batch(rng)
    heads, selection = AlignHeads(SHAPE, [(2,), (1, 4)]).double(), [{2: [0.3]}, {1: [0.5], 4: [0.25]}]
    seed, B = int(rng.integers(1 << 31)), len(FRAMES)
    torch.manual_seed(seed)
    losses = flow_matching_loss(model, batch, 0.6, 0.4, heads, selection)
    assert set(losses) == {"fm", "bitc", "align"}
    torch.manual_seed(seed)
    cond = model.embed_condition(batch, 0.4)
    t = torch.rand(B)
    x0 = 0.6 * torch.randn_like(batch.mel)
    x1 = (batch.mel.clamp_min(-5.0) - model.mel_mean) / model.mel_std
    at = t[:, None, None].double()
    v, states = model.velocity((1 - at) * x0 + at * x1, t, cond, hidden=True)
    error = [((v - x1 + x0)[b, :n] ** 2).mean(1) for b, n in enumerate(FRAMES)]
    close(losses["fm"], torch.cat(error).mean(), 1e-9)
    close(losses["bitc"], bitc_loss(model, batch, cond))
    close(losses["align"], alignment_loss(model, heads, batch, cond.mask, states, t, selection))
    assert set(flow_matching_loss(model, batch)) == {"fm", "bitc"}


# ---- descriptors, BiT-C and alignment


def test_descriptor_is_equation_3(rng):
    model, batch = awake(), random_batch(rng)
    (_, states), _, _, cond, _ = forward(model, batch, hidden=True)
    z = descriptors(cond, states)
    assert len(z) == SHAPE.n_layer + 1
    for b, n in enumerate(FRAMES):
        for l, h in enumerate([cond.tokens, *states[1:]]):
            close(z[l][b], layer_norm(h[b, :n].mean(0)), 1e-11)


def score(model: DiT, batch: Batch, cond: Condition, b: int) -> float:
    """BiT-C of one clip in numpy."""
    d = int(batch.domain[b])
    name = SHAPE.teachers[d][0]
    z = layer_norm(cond.tokens[b, : batch.frames[b]].mean(0)).detach().numpy()
    p, e = model.projections[name].weight.detach().numpy() @ z, batch.teacher[name][b].numpy()
    return float(p @ e / np.linalg.norm(p) / np.linalg.norm(e))


def test_bitc_counts_kept_clips_with_the_weights_of_equation_5(rng):
    model, batch = awake(), random_batch(rng)
    cond = model.embed_condition(batch)
    for kept in itertools.product([True, False], repeat=len(FRAMES)):
        loss, expected = bitc_loss(model, batch, cond._replace(kept=torch.tensor(kept))), 0.0
        for d, weight in enumerate((0.5, 1.0)):
            terms = [1 - score(model, batch, cond, b) for b, k in enumerate(kept) if k and batch.domain[b] == d]
            expected += weight * float(np.mean(terms)) if terms else 0.0
        close(loss.item(), expected)


def test_bitc_reaches_only_the_rows_of_used_tokens(rng):
    model, batch = awake(), random_batch(rng)
    cond = model.embed_condition(batch, drop=0.4)
    bitc_loss(model, batch, cond).backward()
    used = set()
    for b in range(len(FRAMES)):
        if cond.kept[b]:
            used |= {int(i) + (0, 11)[batch.domain[b]] for i in batch.tokens[b, : batch.token_len[b]]}
    assert not any(e.requires_grad for e in batch.teacher.values())
    grad = model.tokens.weight.grad
    assert grad.isfinite().all()
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == used
    assert all(model.projections[n].weight.grad.isfinite().all() for n, _ in SHAPE.teachers)
    assert all(p.grad is None for p in model.blocks.parameters())


def test_a_batch_without_any_condition_has_no_bitc_and_finite_gradients(rng):
    model, batch = awake(), random_batch(rng)
    losses = flow_matching_loss(model, batch, token_drop=1.0)
    assert losses["bitc"].item() == 0
    (losses["fm"] + losses["bitc"]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not model.tokens.weight.grad.any()


def test_projections_start_orthogonal():
    model = DiT(SHAPE)
    for name, E in SHAPE.teachers:
        p = model.projections[name]
        assert p.bias is None
        close(p.weight @ p.weight.T, torch.eye(E), 1e-5)


def test_alignment_is_a_loop_over_clips(rng):
    model, batch = awake(), random_batch(rng)
    heads = AlignHeads(SHAPE, [(1, 3), (3, 4)], width=9).double()
    assert sorted(heads.heads) == ["audio_3", "audio_4", "speech_1", "speech_3"]
    selection = [{1: [0.7], 3: [0.1, 0.2, 0.3]}, {3: [1.1, 0.0], 4: [0.4]}]
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)
    z = descriptors(cond, states)
    expected = 0.0
    for d, name in enumerate(("speech", "audio")):
        clips = [b for b in range(len(FRAMES)) if batch.domain[b] == d]
        for l, weights in selection[d].items():
            first, _, last = heads.heads[f"{name}_{l}"]
            for b in clips:
                x = first.weight @ z[l][b] + first.bias
                x = last.weight @ (x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))) + last.bias
                e = batch.teacher[SHAPE.teachers[d][0]][b]
                weight = weights[min(int(t[b] * len(weights)), len(weights) - 1)]  # of the clip's own part of t
                expected += weight * (1 - (x @ e) / (x.norm() * e.norm())) / len(clips)
    close(alignment_loss(model, heads, batch, cond.mask, states, t, selection), expected)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
def test_convolutional_heads_see_neighbours_and_bands(rng, kind):
    """Against a loop over (frame, band) of the valid frames, zeros around them."""
    shape = replace(SHAPE, n_embd=32)
    head = AlignHeads(shape, [(1,), ()], 16, kind).double().heads["speech_1"]
    n, T, D, bands = 5, 8, 32, head.bands
    assert bands == {"conv1d": 1, "conv2d": 16}[kind]
    h, mask = torch.randn(1, T, D, dtype=torch.float64), (torch.arange(T) < n)[None]
    x = torch.stack([(f - f.mean()) / (f.var(correction=0) + 1e-5).sqrt() for f in h[0, :n]]).view(n, bands, D // bands)
    reach = 1 if bands > 1 else 0
    pooled = torch.zeros(bands, 16 // bands, dtype=torch.float64)
    for i in range(n):
        for b in range(bands):
            y = head.conv.bias.clone()
            for di in (-1, 0, 1):
                for db in range(-reach, reach + 1):
                    if 0 <= i + di < n and 0 <= b + db < bands:
                        y = y + head.conv.weight[:, :, di + 1, db + reach] @ x[i + di, b + db]
            pooled[b] += 0.5 * y * (1 + torch.erf(y / math.sqrt(2))) / n
    close(head(h, mask)[0], head.out.weight @ pooled.flatten() + head.out.bias)


def test_self_alignment_learns_from_a_deeper_layer_and_does_not_move_it(rng):
    model, batch = awake(), random_batch(rng)
    heads = AlignHeads(SHAPE, [(1,), (1,)], teacher="self").double()
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)
    assert [deeper_layer(l, 12) for l in (1, 6, 10, 11)] == [5, 10, 12, 12] and deeper_layer(1, 2) == 2
    deep = descriptor(states[deeper_layer(1, SHAPE.n_layer)], cond.mask)
    expected = 0.0
    for d in range(2):
        own = batch.domain == d
        x = heads(d, 1, states[1], cond.mask)[own]
        expected += (1 - (x * deep[own]).sum(1) / (x.norm(dim=1) * deep[own].norm(dim=1))).mean()
    loss = alignment_loss(model, heads, batch, cond.mask, states, t, [{1: [1.0]}, {1: [1.0]}])
    close(loss, expected)
    loss.backward()
    assert any(p.grad is not None for p in model.blocks[0].parameters())
    assert all(p.grad is None for block in model.blocks[1:] for p in block.parameters())


@pytest.mark.parametrize("present", [0, 1])
def test_a_missing_domain_adds_zero_but_its_heads_get_gradients(rng, present):
    model = awake()
    batch = random_batch(rng, domain=torch.full((len(FRAMES),), present))
    heads, selection = AlignHeads(SHAPE, [(2,), (2,)]).double(), [{2: [0.5]}, {2: [0.5]}]
    (_, states), _, t, cond, _ = forward(model, batch, hidden=True)

    def loss_of(selection):
        return alignment_loss(model, heads, batch, cond.mask, states, t, selection)

    loss = loss_of(selection)
    assert loss == loss_of([s if d == present else {} for d, s in enumerate(selection)])
    loss.backward()
    for name, p in heads.named_parameters():  # DDP waits for every parameter
        assert p.grad is not None and p.grad.isfinite().all()
        assert bool(p.grad.any()) == name.startswith(f"heads.{('speech', 'audio')[present]}")
    assert loss_of([{} if d == present else s for d, s in enumerate(selection)]) == 0


# ---- the condition


def test_condition_is_tokens_on_valid_frames_and_a_prompt_prefix(rng):
    model, batch = awake(), random_batch(rng)
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


def test_condition_drop(rng):
    model, batch = awake(), random_batch(rng)
    batch.prompt = batch.frames // 3
    cond = model.embed_condition(batch, drop=1.0)
    assert not cond.kept.any() and not cond.tokens.any() and not cond.prompt.any() and cond.mask.any()
    many = random_batch(rng, frames=[3] * 3000)
    many.prompt = torch.ones_like(many.prompt)
    cond = model.embed_condition(many, drop=0.3)
    assert abs(cond.kept.double().mean() - 0.7) < 0.05  # six standard deviations
    assert torch.equal(cond.tokens.flatten(1).any(1), cond.kept)
    assert torch.equal(cond.prompt.flatten(1).any(1), cond.kept)


def test_pairs_are_joined_and_sequences_interleaved(rng):
    pair, sequence = (replace(SHAPE, second_codes=5, interleave=mode) for mode in ("pair", "sequence"))
    batch = random_batch(rng, pair)
    for shape in (pair, sequence):
        model = awake(shape)
        e, lengths = model.embed_tokens(batch)
        assert model.embed_condition(batch).tokens.shape == (len(FRAMES), max(FRAMES), SHAPE.n_embd)
        N = batch.tokens.shape[1]
        assert e.shape == (len(FRAMES), N if shape is pair else 2 * N, SHAPE.n_embd)
        assert torch.equal(lengths, batch.token_len if shape is pair else 2 * batch.token_len)
        for b, i in itertools.product(range(len(FRAMES)), range(N)):
            p = model.tokens.weight[batch.tokens[b, i, 0] + (0, 11)[batch.domain[b]]]
            s = model.second.weight[batch.tokens[b, i, 1]]
            if shape is pair:
                close(e[b, i], model.pair.weight @ torch.cat([p, s]) + model.pair.bias, 1e-12)
            else:
                assert torch.equal(e[b, 2 * i], p) and torch.equal(e[b, 2 * i + 1], s)


def test_repeat_and_null(rng):
    model, batch = awake(), random_batch(rng)
    cond = model.embed_condition(batch)
    B, three, null = len(FRAMES), cond.repeat(3), cond.null()
    for whole, part in zip(three[:4], cond[:4], strict=True):
        assert len(whole) == 3 * B and all(torch.equal(whole[i * B : (i + 1) * B], part) for i in range(3))
    assert not null.tokens.any() and not null.prompt.any() and not null.kept.any()
    assert torch.equal(null.mask, cond.mask) and cond.kept.all() and cond.tokens.any()
    dropped, both = model.embed_condition(batch, drop=1.0), cond.with_null()
    for a, b, c, d in zip(null[:4], dropped[:4], cond[:4], both[:4], strict=True):
        assert torch.equal(a, b) and torch.equal(d, torch.cat([c, b]))
    assert cond.padded and cond.clips(torch.tensor([0])).padded and both.padded


def test_without_padding_there_is_no_mask(rng):
    """The host knows it, also of a batch that moved; blocks are then given no mask, and the velocity is the same."""
    model, seen = awake().eval(), []
    batch = random_batch(rng, frames=[20, 20])
    assert not batch.padded and not batch.to("cpu").padded and random_batch(rng, frames=[20, 19]).padded
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1].mask))
    cond, x_t, t = model.embed_condition(batch), torch.randn_like(batch.mel), torch.rand(2).double()
    close(model.velocity(x_t, t, cond), model.velocity(x_t, t, cond._replace(padded=True)), 1e-12)
    handle.remove()
    assert seen[0] is None and seen[1].all()


# ---- the sampler


@pytest.fixture
def scene(rng) -> tuple[DiT, Condition]:
    model = awake()
    with torch.no_grad():
        return model, model.embed_condition(random_batch(rng))


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
@pytest.mark.parametrize("cfg", [1, 1.0, 2.5])
def test_nfe_counts_calls_and_guidance_doubles_the_batch(scene, monkeypatch, method, cfg):
    model, cond = scene
    calls = field(monkeypatch, model, lambda x, t: x)
    sample(model, cond, nfe=6, cfg_scale=cfg, method=method)
    assert [n for n, _ in calls] == [len(FRAMES) * (1 if cfg == 1 else 2)] * 6
    times = time_grid(6 if method == "euler" else 3).tolist()
    expected = times[:-1]
    if method == "midpoint":
        expected = [u for a, b in itertools.pairwise(times) for u in (a, (a + b) / 2)]
    close([t for _, t in calls], expected, 1e-12)


@pytest.mark.parametrize("sway", [-1.0, 0.0])
def test_a_constant_velocity_is_integrated_exactly(scene, monkeypatch, sway):
    model, cond = scene
    with monkeypatch.context() as m:
        field(m, model, lambda x, t: 0 * x)
        x0 = sample(model, cond, nfe=1, seed=3)
    assert x0.dtype == torch.float64 and not x0[~cond.mask].any()
    c = torch.randn(SHAPE.n_mels, dtype=torch.float64)
    field(monkeypatch, model, lambda x, t: c.expand_as(x))
    for nfe, method in ((1, "euler"), (7, "euler"), (2, "midpoint")):
        x = sample(model, cond, nfe=nfe, cfg_scale=1, sway=sway, seed=3, method=method)
        close(x, (x0 + c) * cond.mask[..., None], 1e-12)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2)])
@pytest.mark.parametrize("sway", [-1.0, 0.0])
def test_order_of_the_integrator(scene, monkeypatch, method, order, sway):
    """dx/dt = x cos 2t, so that x(1) = x(0) exp(sin(2) / 2)."""
    model, cond = scene
    with monkeypatch.context() as m:
        field(m, model, lambda x, t: 0 * x)
        x0 = sample(model, cond, nfe=1)
    field(monkeypatch, model, lambda x, t: x * torch.cos(2 * t))
    errors = [
        (sample(model, cond, nfe=n, cfg_scale=1, sway=sway, method=method) - x0 * math.exp(math.sin(2) / 2)).norm()
        for n in (128, 256)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15


def test_guidance(scene, monkeypatch):
    model, cond = scene
    conditional = sample(model, cond, nfe=1, cfg_scale=1, seed=5)
    unconditional = sample(model, cond.null(), nfe=1, cfg_scale=1, seed=5)
    close(sample(model, cond, nfe=1, cfg_scale=1 + 1e-13, seed=5), conditional)  # as one batch of 2B
    close(sample(model, cond, nfe=1, cfg_scale=0, seed=5), unconditional)
    assert not torch.allclose(conditional, unconditional)
    close(sample(model, cond, nfe=1, cfg_scale=3, seed=5), unconditional + 3 * (conditional - unconditional))


@pytest.mark.parametrize("cfg", [1, 2.0])
def test_a_sample_is_the_same_alone_and_padded(rng, cfg):
    model, batch = awake(), random_batch(rng)
    whole = sample(model, model.embed_condition(batch), nfe=4, cfg_scale=cfg, seed=9)
    assert not whole[~model.embed_condition(batch).mask].any()
    for count in (1, 2):  # the longest clip is the third
        part = sample(model, model.embed_condition(rows(batch, 0, count)), nfe=4, cfg_scale=cfg, seed=9)
        for b in range(count):
            close(whole[b, : FRAMES[b]], part[b, : FRAMES[b]])
    assert torch.equal(whole, sample(model, model.embed_condition(batch), nfe=4, cfg_scale=cfg, seed=9))
    assert not torch.allclose(whole, sample(model, model.embed_condition(batch), nfe=4, cfg_scale=cfg, seed=10))


def test_sampling_leaves_the_global_generator_alone(scene):
    before = torch.get_rng_state()
    sample(*scene, nfe=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sway", [-1.0, -0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 32])
def test_time_grid(steps, sway):
    t = time_grid(steps, sway).numpy()
    assert len(t) == steps + 1 and t[0] == 0 and abs(t[-1] - 1) < 1e-15 and (np.diff(t) > 0).all()
    if sway == 0:
        close(t, np.linspace(0, 1, steps + 1), 1e-15)
    elif steps > 1:
        assert (t[1] < 1 / steps) == (sway < 0)  # negative sway spends more steps near the noise


@pytest.mark.parametrize("nfe, method", [(0, "euler"), (-1, "euler"), (3, "midpoint"), (0, "midpoint"), (4, "heun")])
def test_bad_sampler_settings(scene, nfe, method):
    with pytest.raises(ValueError, match="nfe"):
        sample(*scene, nfe=nfe, method=method)


# ---- checkpoints


@pytest.mark.parametrize("second", [0, 5])
def test_load_model_round_trip(rng, tmp_path, second):
    shape = replace(SHAPE, second_codes=second)
    model, ema, batch = awake(shape).float(), awake(shape).float(), random_batch(rng, shape)
    torch.save(
        {"config": {"backbone": ""}, "shape": asdict(shape), "model": model.state_dict(), "ema": ema.state_dict()},
        tmp_path / "ckpt.pt",
    )
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state["shape"]["teachers"] = [list(pair) for pair in shape.teachers]  # as JSON would give it back
    state["shape"]["codes"] = list(shape.codes)
    for original, loaded in ((ema, backbones.load_model(state)), (model, backbones.load_model(state, ema=False))):
        assert loaded.shape == shape and not loaded.training
        close(loaded.mel_mean, original.mel_mean, 0)
        expected, x_t, t, cond, _ = forward(original.double(), batch)
        close(loaded.double().velocity(x_t, t, cond), expected, 0)
        assert torch.equal(loaded.embed_condition(batch).tokens, cond.tokens)


def test_count_parameters():
    model = DiT(SHAPE)
    buffers = 2 * SHAPE.n_mels + 1  # the mel statistics
    assert count_parameters(model) == sum(math.prod(v.shape) for v in model.state_dict().values()) - buffers


# ---- cost


def gradients(model: DiT, batch: Batch, seed: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    losses = flow_matching_loss(model.train(), batch, 0.5, 0.2)
    (losses["fm"] + losses["bitc"]).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_activation_checkpointing_changes_nothing(rng):
    """Dropout included: the second computation of a block repeats its random numbers."""
    model, batch = awake(), random_batch(rng)
    plain = gradients(model, batch)
    model.checkpoint_activations = True
    for a, b in zip(plain, gradients(model, batch), strict=True):
        assert torch.equal(a, b)


def test_flops_are_what_pytorch_counts(rng):
    shape = replace(SHAPE, n_embd=64, n_mels=100, n_layer=6, ff_mult=4)
    model, T, B = awake(shape).float(), 80, 3
    batch = random_batch(rng, shape, [T] * B)
    batch.mel, batch.teacher = batch.mel.float(), {k: v.float() for k, v in batch.teacher.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gradients(model, batch)
    counts = {str(k).removeprefix("aten."): v for k, v in counter.get_flop_counts()["Global"].items()}
    counts["convolution_backward"] = 2 * counts["convolution"]  # it counts a depthwise one as if it were full
    assert sum(counts.values()) == pytest.approx(flops_per_frame(model, T) * B * T, rel=0.05)


@pytest.mark.slow
def test_compiled_blocks_have_no_breaks_and_serve_all_shapes(rng):
    """fullgraph raises at a graph break; shapes of five buckets, padded and not, cost at most two compilations more
    than the first, and gradients are those of the plain model."""
    import torch._dynamo as dynamo

    dynamo.reset()
    shape = replace(SHAPE, dropout=0.0)
    plain = awake(shape).float()
    compiled = DiT(shape)
    compiled.load_state_dict(plain.state_dict())
    for block in compiled.blocks:
        block.compile(dynamic=True, fullgraph=True)
    counts = []
    for frames in ([40, 40], [64, 50, 33], [128] * 4, [23, 21, 20], [96, 95]):
        batch = random_batch(rng, shape, frames)
        batch.mel, batch.teacher = batch.mel.float(), {k: v.float() for k, v in batch.teacher.items()}
        for a, b in zip(gradients(plain, batch), gradients(compiled, batch), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        counts.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] <= counts[0] + 2, counts
