"""probe.py against the naive loop, numpy, and .backward(); selection, table and files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from test_model import CONFIG, FRAMES, awake, close, forward, layer_norm, random_batch, rows

import common
import probe
from common import DOMAINS
from model import DiT, FlowModel, bitc_loss, make_xt
from train import Config

L = CONFIG.n_layer
GRID = probe.time_points(2)


def naive_velocities(model: DiT, x_t, t, cond) -> torch.Tensor:
    """Eq. 8 as written: one forward pass for v and one for each v^(-l)."""
    sets = [[0.0 if k == l else 1.0 for k in range(1, L + 1)] for l in range(L + 1)]
    return torch.stack([model.velocity(x_t, t, cond, gates=gates) for gates in sets])


def numpy_scores(velocities: torch.Tensor, frames) -> np.ndarray:
    """||v|| and eq. 9 as written, (B, 1 + L)."""
    v = velocities.double().numpy()
    out = np.zeros((len(frames), L + 1))
    for b, n in enumerate(frames):
        out[b, 0] = np.sqrt((v[0, b, :n] ** 2).sum())
        for l in range(1, L + 1):
            out[b, l] = np.sqrt(((v[0, b, :n] - v[l, b, :n]) ** 2).sum()) / (out[b, 0] + probe.EPS)
    return out


def lasp_at_times(model: DiT, batch, times: int, *settings) -> torch.Tensor:
    z = probe.at_times(probe.z_of_clips, model, batch, times, *settings)
    return torch.stack([probe.lasp_of_clips(model, batch, z_at_t) for z_at_t in z])


def noised(model: DiT, batch, t: float, sigma: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t for every clip, x_t and the target, of the noise that a seed gives."""
    torch.manual_seed(seed)
    ts = torch.full((len(batch.frames),), t, dtype=torch.float64)
    return ts, *make_xt(model, batch.mel, ts, sigma)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("frames", [FRAMES, (20, 20)])  # (20, 20): nothing is padded, so there is no mask
def test_one_sweep_equals_the_naive_loop(rng, dtype, tolerance, frames):
    model, batch = awake().to(dtype), random_batch(rng, frames=frames)
    batch.mel = batch.mel.to(dtype)
    _, x_t, t, cond, _ = forward(model, batch)
    x_t, t, calls = x_t.to(dtype), t.to(dtype), []
    expected = naive_velocities(model, x_t, t, cond)
    for l, block in enumerate(model.blocks, 1):
        block.register_forward_pre_hook(lambda _, args, l=l: calls.append((l, len(args[0]))))
    got = model.ablated(x_t, t, cond)
    assert calls == [(l, l * len(frames)) for l in range(1, L + 1)]
    assert got.shape == (L + 1, len(frames), max(frames), CONFIG.n_mels) and got.dtype == dtype
    got, expected = got[:, cond.mask], expected[:, cond.mask]
    for l in range(L + 1):
        assert (got[l] - expected[l]).norm() <= tolerance * expected[l].norm()
        assert l == 0 or not torch.allclose(got[l], got[0], rtol=1e-3)  # each layer does something


@torch.no_grad()
def test_scores_are_a_loop_over_valid_frames(rng):
    velocities = torch.randn(L + 1, len(FRAMES), max(FRAMES), CONFIG.n_mels, dtype=torch.float64)
    velocities[:, 1] *= 1e-8  # where eps matters
    mask = torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None]
    close(probe.foga_scores(velocities, mask), numpy_scores(velocities, FRAMES), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("room", [1, 40_000])
def test_foga_is_the_naive_loop_at_every_t(rng, monkeypatch, room):
    """One clip of the growing batch at a time, and all at once."""
    monkeypatch.setattr(probe, "SWEEP_FRAMES", room)
    model, batch, seed = awake(), random_batch(rng), int(rng.integers(1000))
    got, cond = probe.at_times(probe.foga_of_clips, model, batch, 2, 0.7, seed), model.embed_condition(batch)
    assert got.shape == (2, len(FRAMES), 1 + L) and (got > 0).all()
    for i, t in enumerate(GRID):
        ts, x_t, _ = noised(model, batch, t, 0.7, seed)
        close(got[i], numpy_scores(naive_velocities(model, x_t, ts, cond), FRAMES))


@pytest.mark.parametrize("training", [True, False])
def test_probes_are_repeatable_and_leave_no_trace(rng, training):
    model, batch = awake().train(training), random_batch(rng)
    assert model.blocks[0].dropout > 0
    before, results = {k: v.clone() for k, v in model.state_dict().items()}, []
    for seed in (1, 1, 2):
        state = torch.get_rng_state()
        results.append(probe.probe(model, batch, 2, 0.5, seed))
        assert torch.equal(state, torch.get_rng_state())
        torch.randn(3)  # the next run starts at another global state
    for name in DOMAINS:
        assert results[0][name] == results[1][name] and results[0][name]["foga"] != results[2][name]["foga"]
    assert all(m.training == training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_training_flag_comes_back_after_an_error():
    model, state = DiT(CONFIG).train(), torch.get_rng_state()
    with pytest.raises(RuntimeError), probe.probing(model, 0):
        assert not model.training
        torch.randn(1)
        raise RuntimeError
    assert model.training and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("present", [0, 1])
def test_a_missing_domain_is_left_out(rng, present):
    model, batch = awake(), random_batch(rng, domain=torch.full((len(FRAMES),), present))
    scores = probe.probe(model, batch, 1, 0.5, control=True)
    assert [name for name in DOMAINS if name in scores] == [DOMAINS[present]]
    assert np.shape(scores[DOMAINS[present]]["control_clips"]) == (len(FRAMES), L)


@torch.no_grad()
def test_lasp_is_the_cosine_with_the_clips_own_teacher(rng):
    model, batch, seed = awake(), random_batch(rng), int(rng.integers(1000))
    got = lasp_at_times(model, batch, 2, 0.6, seed)
    assert got.shape == (2, len(FRAMES), L + 1)
    for i, t in enumerate(GRID):
        ts, x_t, _ = noised(model, batch, t, 0.6, seed)
        cond = model.embed_condition(batch)
        _, states = model.velocity(x_t, ts, cond, hidden=True)
        for b, n in enumerate(FRAMES):
            name = CONFIG.teachers[int(batch.domain[b])][0]
            e, P = batch.teacher[name][b].numpy(), model.projections[name].weight.numpy()
            for l, h in enumerate([cond.tokens, *states[1:]]):
                p = P @ layer_norm(h[b, :n].mean(0)).numpy()
                close(got[i, b, l], p @ e / np.linalg.norm(p) / np.linalg.norm(e))


def left_out(z: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The loop over clips and layers: a ridge regression on all other clips by least squares on rows that are added for
    the penalty, its intercept in a column of its own without one; and the mean of the other clips."""
    B, layers, D = z.shape
    errors, of_mean = np.zeros((B, layers)), np.zeros(B)
    for b in range(B):
        rest = np.arange(B) != b
        of_mean[b] = ((e[b] - e[rest].mean(0)) ** 2).sum()
        for l in range(layers):
            penalty = 0.1 * ((z[:, l] - z[:, l].mean(0)) ** 2).sum() / B
            A = np.block([[z[rest, l], np.ones((B - 1, 1))], [np.sqrt(penalty) * np.eye(D), np.zeros((D, 1))]])
            W = np.linalg.lstsq(A, np.concatenate([e[rest], np.zeros((D, e.shape[1]))]), rcond=None)[0]
            errors[b, l] = ((e[b] - z[b, l] @ W[:-1] - W[-1]) ** 2).sum()
    return errors, of_mean


@pytest.mark.parametrize("clips, width", [(2, 5), (12, 40), (40, 3)])
def test_held_out_ridge_is_the_loop_over_left_out_clips(rng, clips, width):
    z, e = rng.normal(size=(clips, 3, width)) + 2, rng.normal(size=(clips, 7)) - 1
    e[:, :2] += 30 * z[:, 1, :2]  # the middle layer stores some of it
    for got, expected in zip(probe.held_out_errors(z, e), left_out(z, e), strict=True):
        close(got, expected, 1e-8)
    z[:, 2] = 1.5  # nothing in it but a constant: the mean of the others is the best guess
    errors, of_mean = probe.held_out_errors(z, e)
    close(errors[:, 2], of_mean, 1e-12)
    assert clips <= width or errors[:, 1].sum() < of_mean.sum() / 2 < errors[:, 0].sum()


def test_a_lone_clip_has_nothing_held_out(rng):
    errors, of_mean = probe.held_out_errors(rng.normal(size=(1, 3, 5)), rng.normal(size=(1, 7)))
    assert (1 - errors / of_mean[:, None] == 0).all()


def naive_replaced(model: DiT, x_t, t, cond, domain, how: str) -> torch.Tensor:
    """One pass for every layer: from the intact h_{l-1} with another update, then the layers after it."""
    v, states = model.velocity(x_t, t, cond, hidden=True)
    context, frames, out = model.stem(x_t, t, cond)[1], cond.mask.sum(1).tolist(), [v]
    for l in range(1, L + 1):
        h = states[l - 1].clone()
        for d in range(2):
            clips = [b for b in range(len(x_t)) if domain[b] == d]
            updates = [(states[l] - states[l - 1])[b, : frames[b]] for b in clips]
            for b, other in zip(clips, updates[1:] + updates[:1], strict=True):
                if how == "mean":
                    h[b] += torch.cat(updates).mean(0)
                else:
                    n = min(frames[b], len(other))
                    h[b, :n] += other[:n]
        for block in model.blocks[l:]:
            h = block(h, context)
        out.append(model.head(h, context))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("room", [1, 40_000])
@pytest.mark.parametrize("how", ["mean", "resample"])
def test_replaced_updates_are_the_naive_loop(rng, monkeypatch, how, room):
    """Also a clip at a time, where the clip that gives its update is not in the growing batch."""
    monkeypatch.setattr(probe, "SWEEP_FRAMES", room)
    model, batch, seed = awake(), random_batch(rng), int(rng.integers(1000))
    got = probe.at_times(probe.foga_of_clips, model, batch, 2, 0.7, seed, ablation=how)
    zero, cond = probe.at_times(probe.foga_of_clips, model, batch, 2, 0.7, seed), model.embed_condition(batch)
    assert torch.equal(got[..., 0], zero[..., 0]) and not torch.isclose(got, zero)[..., 1:].any()
    for i, t in enumerate(GRID):
        ts, x_t, _ = noised(model, batch, t, 0.7, seed)
        close(got[i], numpy_scores(naive_replaced(model, x_t, ts, cond, batch.domain, how), FRAMES))


def test_ablation_is_named_and_goes_into_the_control(rng):
    model, batch = awake(), random_batch(rng)
    zero = probe.probe(model, batch, 2, 0.5, control=True, beside=True)
    other = probe.probe(model, batch, 2, 0.5, ablation="resample", control=True, beside=True)
    assert (zero["ablation"], other["ablation"]) == ("zero", "resample")
    for how, result in (("zero", zero), ("resample", other)):
        random = probe.random_control(model)
        scores = probe.at_times(probe.foga_of_clips, random, batch, 2, ablation=how)[..., 1:].contiguous().mean(0)
        for d, name in enumerate(DOMAINS):
            assert result[name]["control_clips"] == scores[batch.domain == d].tolist()
            close(result[name]["control"], np.mean(result[name]["control_clips"], 0), 1e-6)
    for name in DOMAINS:
        assert zero[name]["foga_resample"] == other[name]["foga"] != zero[name]["foga"]
        assert zero[name]["foga_resample_interval"] == other[name]["foga_interval"]
        assert "foga_resample" not in other[name] and zero[name]["control"] != other[name]["control"]
    plain = probe.probe(model, batch, 2, 0.5)
    assert not {"control", "foga_resample"} & set(plain[DOMAINS[0]])
    assert "FoG-A resample" not in probe.table(plain, [{}, {}]) and "FoG-A resample" in probe.table(zero, [{}, {}])
    header = probe.table(other, [{}, {}]).splitlines()[1]
    assert header.count("FoG-A") == header.count("FoG-A resample") == 1


def test_another_clips_update_needs_another_clip(rng):
    model, batch = awake(), random_batch(rng, domain=torch.tensor([0, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match="at least two"):
        probe.probe(model, batch, 1, 0.5, ablation="resample")
    assert "foga_resample" not in probe.probe(model, batch, 1, 0.5, beside=True)["audio"]


def test_a_model_whose_layers_can_only_be_closed_says_so(rng):
    model, batch = awake(), random_batch(rng)
    model.ablated = lambda *inputs: FlowModel.ablated(model, *inputs)
    with pytest.raises(ValueError, match="ablation=zero"):
        probe.probe(model, batch, 1, 0.5, ablation="mean")
    probe.probe(model, batch, 1, 0.5)


@torch.no_grad()
def test_lasp_at_the_interface_is_bitc(rng):
    model, batch = awake(), random_batch(rng)
    lasp, cond = lasp_at_times(model, batch, 2), model.embed_condition(batch)
    assert torch.equal(lasp[0, :, 0], lasp[1, :, 0])  # the interface does not depend on t
    result = probe.probe(model, batch, 2, 0.5)
    means = [lasp[0, batch.domain == d, 0].mean().item() for d in range(2)]
    close([result[name]["bitc"] for name in DOMAINS], means)
    clips = np.bincount(batch.domain).tolist()
    close(bitc_loss(model, batch, cond, clips).item(), 0.5 * (1 - means[0]) + 1 - means[1])


@pytest.mark.parametrize("held", [1, 2**32])
def test_gradient_norms_against_backward(rng, monkeypatch, held):
    """Of each domain's clips, and of batches that hold clips twice, once and never, against one backward pass over
    exactly that batch; all blocks at once, and one at a time. What was in .grad stays there."""
    monkeypatch.setattr(probe, "GRADIENT_BYTES", held)
    model, batch, seed = awake(), random_batch(rng), int(rng.integers(1000))
    kept = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        if i % 2:
            p.grad = torch.randn_like(p)
            kept[name] = p.grad.clone()
    products = probe.at_times(probe.gradients, model.train(), batch, 2, 0.5, seed).numpy()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, kept[name]) if name in kept else p.grad is None
    model.eval()
    domains = [(batch.domain == d).int().tolist() for d in range(2)]
    counts = np.array([*domains, [2, 1, 0, 0, 3], [0, 0, 3, 0, 0], [1, 1, 1, 1, 1]])
    got = probe.norms_of_batches(products, np.array(FRAMES), counts)
    for row, drawn in zip(got, counts, strict=True):
        expected = np.zeros(L)
        for t in GRID:
            model.zero_grad()
            ts, x_t, target = noised(model, batch, t, 0.5, seed)
            error = (model.velocity(x_t, ts, model.embed_condition(batch)) - target) ** 2
            drawn_clips = [error[b, : FRAMES[b]] for b in range(len(FRAMES)) for _ in range(drawn[b])]
            torch.cat(drawn_clips).mean().backward()
            expected += [np.sqrt(sum(float(p.grad.norm()) ** 2 for p in b.parameters())) / 2 for b in model.blocks]
        close(row, expected)


def test_random_control_is_fresh_everywhere_and_leaves_no_trace(rng):
    model = awake(replace(CONFIG, second_codes=5))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    control = probe.random_control(model, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for linear in [*(b.modulation for b in control.blocks), control.head_modulation, control.head_out]:
        assert linear.weight.any(1).all()
    for name, p in control.named_parameters():  # nothing learned is left
        assert not torch.equal(p, before[name]), name
    for name in ("mel_mean", "mel_std", "mel_floor"):
        assert torch.equal(getattr(control, name), before[name])
    again, other = probe.random_control(model, seed=4).state_dict(), probe.random_control(model, seed=5)
    assert all(torch.equal(v, again[k]) for k, v in control.state_dict().items())
    assert not torch.equal(other.head_out.weight, control.head_out.weight)


def test_the_control_of_an_untrained_model_has_scores(rng):
    model, batch = DiT(CONFIG).double(), random_batch(rng)
    untrained, control = (probe.probe(m, batch, 2, 0.5) for m in (model, probe.random_control(model)))
    for name in DOMAINS:
        assert untrained[name]["velocity_norm"] == 0 and not any(untrained[name]["foga"])
        assert control[name]["velocity_norm"] > 0.1 and min(control[name]["foga"]) > 0
    with pytest.raises(ValueError, match="phase1_steps"):
        probe.select(Config(align="foga"), untrained, L)
    assert probe.select(Config(align="none"), untrained, L) == [{}, {}]


def test_top_layers():
    assert probe.top_layers([0.1, 0.5, 0.3], 2) == [2, 3]
    assert probe.top_layers([0.5, 0.1, 0.5, 0.5], 3) == [1, 3, 4]  # a tie: the shallower first
    assert probe.top_layers([1, 1, 1, 1], 2) == [1, 2]
    assert probe.top_layers([0.1, 0.2], 5) == [2, 1]


@pytest.fixture
def result(rng) -> dict:
    """Scores of 6 layers whose three rankings differ."""

    def domain() -> dict:
        keys = ("foga", "lasp", "stores", "gradnorm", "control")
        scores = {key: (rng.permutation(6) + rng.uniform(0.1, 0.9, 6)).tolist() for key in keys}
        for key in ("lasp", "stores"):
            scores[key] = [99.0, *scores[key]]  # the interface is not a layer, however well it scores
        return scores | {"velocity_norm": 1.0}

    return {name: domain() for name in DOMAINS}


@pytest.mark.parametrize("weighting", ["paper", "normalized", "equal"])
@pytest.mark.parametrize("align", ["fixed", "random", "lasp", "stores", "gradnorm", "foga", "foga_excess"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_select(result, align, weighting, k):
    layers = tuple(range(6, 6 - k, -1)) if align == "fixed" else ()
    config = Config(align=align, align_layers=layers, top_k=k, weighting=weighting, align_weight=1.7, seed=11)
    selection = probe.select(config, result, 6)
    assert len(selection) == len(DOMAINS) and selection == probe.select(config, result, 6)
    for name, chosen in zip(DOMAINS, selection, strict=True):
        scores = result[name]
        assert len(chosen) == k and all(type(l) is int and 1 <= l <= 6 for l in chosen)
        if align == "fixed":
            assert tuple(chosen) == layers
        elif align != "random":
            scores["foga_excess"] = [a - c for a, c in zip(scores["foga"], scores["control"], strict=True)]
            by_score = scores[align][1:] if align in ("lasp", "stores") else scores[align]
            threshold = sorted(by_score)[-k]
            assert set(chosen) == {l for l in range(1, 7) if by_score[l - 1] >= threshold}
        a = np.array([scores["foga"][l - 1] for l in chosen])
        expected = {"paper": 1.7 * a, "normalized": 1.7 * a / a.sum(), "equal": [1.7 / k] * k}[weighting]
        close(list(chosen.values()), np.array(expected)[:, None], 1e-12)


def test_a_rule_needs_what_it_ranks(result):
    for name in DOMAINS:
        del result[name]["control"]
        result[name]["stores"] = [1e-17] * 7  # of one or two clips
    with pytest.raises(ValueError, match="align=foga_excess ranks by 'control'"):
        probe.select(Config(align="foga_excess"), result, 6)
    with pytest.raises(ValueError, match="three"):
        probe.select(Config(align="stores"), result, 6)
    assert len(probe.select(Config(align="foga"), result, 6)[0]) == Config.top_k


def test_random_layers_depend_on_the_seed_and_reach_every_layer(result):
    drawn = [probe.select(Config(align="random", top_k=3, seed=s), result, 6) for s in range(40)]
    for d in range(2):
        assert {l for s in drawn for l in s[d]} == set(range(1, 7))
    assert any(set(s[0]) != set(s[1]) for s in drawn)


def test_sets_that_depend_on_t(result):
    for name in DOMAINS:
        result[name]["foga_map"] = [[6, 1, 1, 5, 0, 0], [0, 0, 7, 0, 8, 1]]
    config = Config(timestep_adaptive=True, top_k=2, align_weight=2.0)
    assert probe.select(config, result, 6)[0] == {1: [12, 0], 4: [10, 0], 5: [0, 16], 3: [0, 14]}


def test_the_last_layer_has_nobody_to_learn_from(result):
    for name in DOMAINS:
        result[name]["foga"] = [1, 2, 3, 4, 5, 6]
    config = Config(align_teacher="self", top_k=2)
    assert [set(s) for s in probe.select(config, result, 6)] == [{5, 4}, {5, 4}]


@pytest.fixture
def probed(rng) -> tuple[dict, dict]:
    model, batch = awake(), random_batch(rng)
    return probe.probe(model, batch, 3, 0.5), probe.probe(model, batch, 3, 0.5, control=True)


def test_probe_is_its_parts(rng):
    model, batch = awake(), random_batch(rng)
    result = probe.probe(model, batch, 3, 0.5, 2)
    close(result["t"], [1 / 6, 1 / 2, 5 / 6], 1e-15)
    assert result["clips"] == [int((batch.domain == d).sum()) for d in range(2)]
    foga, products = (probe.at_times(kind, model, batch, 3, 0.5, 2) for kind in (probe.foga_of_clips, probe.gradients))
    lasp, z = lasp_at_times(model, batch, 3, 0.5, 2), probe.at_times(probe.z_of_clips, model, batch, 3, 0.5, 2)
    for d, name in enumerate(DOMAINS):
        s, of_d = result[name], batch.domain == d
        close(s["foga"], foga[:, of_d, 1:].mean((0, 1)).tolist(), 1e-6)
        close(s["velocity_norm"], foga[:, of_d, 0].mean().item(), 1e-6)
        close(s["lasp"], lasp[:, of_d].mean((0, 1)).tolist(), 1e-6)
        errors, of_mean = left_out(z.mean(0)[of_d].numpy(), batch.teacher[CONFIG.teachers[d][0]][of_d].numpy())
        close(s["stores"], 1 - errors.sum(0) / of_mean.sum(), 1e-6)
        close(s["gradnorm"], probe.norms_of_batches(products.numpy(), np.array(FRAMES), of_d[None])[0], 1e-12)
        assert np.shape(s["foga_clips"]) == (int(of_d.sum()), L)
        close(np.mean(s["foga_clips"], 0), s["foga"], 1e-6)
        for key in ("foga", "lasp", "stores", "gradnorm"):
            low, high = map(np.array, s[f"{key}_interval"])
            assert (low <= np.array(s[key]) + 1e-12).all() and (s[key] <= high + 1e-12).all() and (low < high).any()
        close(s["rank_correlation"][0], scipy.stats.spearmanr(s["lasp"][1:], s["foga"]).statistic, 1e-6)
        shared = set(probe.top_layers(s["foga"], 3)) & set(probe.top_layers(s["lasp"][1:], 3))
        assert s["top_overlap"][0] == len(shared)
        assert np.shape(s["foga_map"]) == (3, L) and np.shape(s["lasp_map"]) == (3, L + 1)
        close(np.mean(s["foga_map"], 0), s["foga"], 1e-6)
        close(np.mean(s["lasp_map"], 0), s["lasp"], 1e-6)


def test_table_has_a_row_for_every_layer(probed):
    plain, result = probed
    for text in (probe.table(result, [{2: [0.1]}, {4: [0.0, 0.2]}]), probe.table(plain, [{}, {}])):
        for d, (name, block) in enumerate(zip(DOMAINS, text.split(f"{DOMAINS[1]} (")[:2], strict=True)):
            lines = block.splitlines()
            starts = [line.split()[0].rstrip("*") for line in lines if line.startswith("  ")]
            assert [s for s in starts if s.isdigit()] == [str(l) for l in range(1, L + 1)]
            starred = [line.split()[0] for line in lines if line.strip() and line.split()[0].endswith("*")]
            assert starred == ([f"{(2, 4)[d]}*"] if "control" in text else [])
            for l in range(L):
                assert f"{result[name]['stores'][l + 1]:5.2f}" in block
                assert f"{result[name]['foga'][l]:.4f}" in block and f"{result[name]['lasp'][l + 1]:.3f}" in block
                assert "control" not in text or f"{result[name]['control'][l]:.4f}" in block
    assert "LASP and FoG-A: rank correlation" in text


def test_agreement_against_scipy_and_sets(rng):
    a, b = rng.normal(size=(20, 9)), rng.normal(size=(20, 9))
    a[0, 3] = a[0, 5]  # a tie
    pairs = list(zip(a, b, strict=True))
    close(probe.rank_correlation(a, b), [scipy.stats.spearmanr(*pair).statistic for pair in pairs], 1e-9)
    shared = [len(set(probe.top_layers(x, 4)) & set(probe.top_layers(y, 4))) for x, y in pairs]
    assert probe.top_overlap(a, b, 4).tolist() == shared
    assert probe.rank_correlation(a[0], a[0]) == pytest.approx(1) and probe.top_overlap(a[0], a[0], 4) == 4
    assert np.isnan(probe.rank_correlation(np.ones(9), b[0]))


def test_bootstrap_interval_of_a_mean(rng):
    """The percentile interval of a mean is about two standard errors either side."""
    values = rng.normal(size=200)
    counts = common.resampled(200, 4000)
    assert (counts.sum(1) == 200).all() and counts.shape == (4000, 200)
    low, high = probe.interval(counts @ values / 200)
    close([low, high], values.mean() + 1.96 * values.std() / 200**0.5 * np.array([-1, 1]), 0.15)


def test_a_rule_of_ones_own_is_a_line(result, monkeypatch):
    monkeypatch.setitem(probe.RULES, "deepest", lambda scores: range(len(scores["foga"])))
    assert [list(s) for s in probe.select(Config(align="deepest", top_k=2), result, 6)] == [[6, 5]] * 2


def test_stability_table():
    def of(speech, audio):
        return {"speech": {"foga": speech}, "audio": {"foga": audio}}

    text = probe.stability({"a.pt": of([4, 3, 2, 1], [4, 3, 2, 1]), "b.pt": of([4, 3, 1, 2], [1, 2, 3, 4])}, 2)
    first, second = (line.split() for line in text.splitlines()[1:])
    assert first == ["a.pt", "1", "2", "2/2", "+1.00", "1", "2", "2/2", "+1.00"]
    assert second == ["b.pt", "1", "2", "2/2", "+0.80", "4", "3", "0/2", "-1.00"]


@pytest.mark.parametrize("with_control", [True, False])
def test_report_writes_a_figure_and_json(probed, tmp_path, with_control):
    result = probed[with_control]
    probe.report(tmp_path, result, [{2: [0.125]}, {1: [0.5], 4: [0.25]}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["probe.json", "probe.png"]
    assert (tmp_path / "probe.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    stored = json.loads((tmp_path / "probe.json").read_text())
    assert stored["selection"] == [{"2": [0.125]}, {"1": [0.5], "4": [0.25]}]
    assert {k: stored[k] for k in result} == result


@torch.no_grad()
def test_scores_are_the_same_alone_and_padded(rng):
    model, batch = awake(), random_batch(rng)
    _, x_t, t, cond, _ = forward(model, batch)
    scores = probe.foga_scores(model.ablated(x_t, t, cond), cond.mask)
    for b, n in enumerate(FRAMES):
        c = model.embed_condition(rows(batch, b, b + 1))
        close(scores[b], probe.foga_scores(model.ablated(x_t[b : b + 1, :n], t[b : b + 1], c), c.mask)[0])
