"""What each layer stores (BiT-C, LASP) and what it contributes (FoG-A, gradient norm), and the layers to align.

    python probe.py --ckpt out/demo/ckpt.pt                # table, probe.json and probe.png beside the checkpoint
    python probe.py --ckpt out/demo/phase1.pt out/demo/ckpt.pt      # does the ranking last? (the paper's table 7)
    python probe.py --backbone f5tts --random_init         # another's published model, see backbones.py
    python probe.py --backbone=my_model.py:MyModel --random_init --check    # do its layers close?

Store: s_T(l) = cos(P_T z_l, e_T), one frozen projection for all depths (eq. 4, 6); and the R^2 with which a ridge
regression, fitted anew at each depth, predicts e_T from z_l of clips left out. Contribute: the relative change of the
velocity when a layer's gate is set to 0 (eq. 8-9), or when --ablation=mean or resample puts the mean update or another
clip's in the place of its update. Every attribution is shown beside a random-init control of the same architecture,
because the first layers score high before any training; what exceeds it, training put there. Intervals are 95 %
bootstrap intervals over clips. Letters are those of model.py, and G points of the t grid.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import Count, Natural, configure


@dataclass
class ProbeArgs:
    """Settings of `python probe.py`."""

    ckpt: tuple[str, ...] = ("out/demo/ckpt.pt",)  # a checkpoint of train.py; several: how far their rankings agree
    random_init: bool = False  # probe a model with random weights, of the sizes below, instead of a checkpoint
    backbone: str = ""  # as in train.py: another's published model, or yours by FILE.py:Class; empty: ours
    backbone_layers: str = ""  # as in train.py
    init_from: str = ""  # with random_init: weights, ours or published, a .safetensors or .pt
    check: bool = False  # only close each layer of it once, on random weights and input, and say which does not close
    n_layer: Count = 8  # layers with random_init
    n_head: Count = 4  # attention heads with it
    n_embd: Count = 256  # width with it
    ff_mult: Count = 4  # feed-forward width with it, as a multiple of n_embd
    data_dir: str = ""  # prepared data; empty: the one the checkpoint was trained on, or data/demo
    split: Literal["train", "held_out"] = "train"  # which clips
    clips: Count = 8  # clips per domain
    times: Count = 4  # points of the t grid
    frames: Count = 300  # clips are cut to this; not for backbone=f5tts_text, which reads whole sentences
    top_k: Count = 3  # layers in a Top-K
    seed: Natural = 0  # draws the clips and the noise
    control: bool = True  # also probe a random-init copy
    ablation: Literal["zero", "mean", "resample"] = "zero"  # what takes a layer's place for FoG-A; zero: nothing
    out_dir: str = ""  # where probe.json and probe.png go; empty: beside the checkpoint
    device: str = "auto"  # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto takes bfloat16 where the machine has it

    renamed: ClassVar[dict[str, str]] = {"weights": "init_from"}


if __name__ == "__main__":
    ARGS = configure(ProbeArgs, __doc__)  # a typo is answered before torch is imported

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor

import backbones
import common
from common import DOMAINS, command, pick_device, precision
from data import Batch, Dataset, fixed_batch, read_meta
from model import Condition, DiTConfig, FlowModel, Selection, cosine, descriptor, make_xt, masked_mse

EPS = 1e-8  # of eq. 9
SWEEP_FRAMES = 40_000  # clips x frames x (L + 1) of one growing batch, which bounds its memory
GRADIENT_BYTES = 4 * 2**30  # of clips' gradients held at once; more are computed in parts


@contextlib.contextmanager
def probing(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Eval mode and a fixed random state inside; the model's mode and the global random state unchanged outside."""
    training, device = model.training, next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def time_points(n: int) -> list[float]:
    """Midpoints of n equal parts of (0, 1): an average over them is an average over t ~ U(0, 1)."""
    return [(i + 0.5) / n for i in range(n)]


def at_times(score: Callable, model: FlowModel, batch: Batch, times: int, sigma=0.5, seed=0, **options) -> Tensor:
    """score(model, batch, cond, t, x_t, target) at each of `times` points of t, (G, ...): eval mode, the same noise."""
    with torch.no_grad(), probing(model, seed):
        cond = model.embed_condition(batch)
        torch.clear_autocast_cache()  # weights cast without gradients are not to be used again with them
        scores = []
        for point in time_points(times):
            torch.manual_seed(seed)  # so that a row differs from the next by t alone
            t = batch.mel.new_full((len(batch.frames),), point)
            scores.append(score(model, batch, cond, t, *make_xt(model, batch.mel, t, sigma), **options))
    return torch.stack(scores)


def foga_of_clips(model, batch: Batch, cond: Condition, t: Tensor, x_t: Tensor, target, ablation="zero") -> Tensor:
    """foga_scores of every layer, (B, 1 + L), some clips at a time; what replaces an update comes from all clips."""
    (B, T), L, given = cond.mask.shape, len(model.blocks), ()
    if ablation != "zero":
        states = model.velocity(x_t, t, cond, hidden=True)[1]
        given = (other_updates(states, cond.mask, batch.domain, ablation),)
    parts = torch.arange(B, device=t.device).split(max(1, SWEEP_FRAMES // (T * (L + 1))))
    sweeps = (model.ablated(x_t[p], t[p], cond.clips(p), *(updates[:, p] for updates in given)) for p in parts)
    return torch.cat([foga_scores(v, cond.mask[p]) for v, p in zip(sweeps, parts, strict=True)])


def other_updates(states: Sequence[Tensor], mask: Tensor, domain: Tensor, ablation: str) -> Tensor:
    """What takes the place of each update h_l - h_{l-1}, (L, B, T, D). mean: its mean over the valid frames of the
    domain's clips; resample: that of the domain's next clip (after the last the first) at the same frames, or zero."""
    updates = torch.stack([after - before for before, after in pairwise(states)]) * mask[..., None]
    for d in domain.unique():
        of_d = updates[:, domain == d]
        mean = (of_d.sum((1, 2)) / mask[domain == d].sum())[:, None, None]
        updates[:, domain == d] = of_d.roll(-1, dims=1) if ablation == "resample" else mean
    return updates


def foga_scores(velocities: Tensor, mask: Tensor) -> Tensor:
    """||v|| over valid frames, then eq. 9, ||v - v^(-l)|| / (||v|| + eps): (L + 1, B, T, M) to (B, L + 1)."""
    v = velocities.to(torch.promote_types(velocities.dtype, torch.float32)) * mask[..., None]
    norm = v[0].flatten(1).norm(dim=1)  # (B,)
    change = (v[1:] - v[0]).flatten(2).norm(dim=2)  # (L, B)
    return torch.cat([norm[None], change / (norm + EPS)]).T


def loss_of_clips(model: FlowModel, batch: Batch, cond: Condition, t: Tensor, x_t: Tensor, target: Tensor) -> Tensor:
    """The flow-matching loss (eq. 23) of every clip, the mean over its valid frames and bins, (B,)."""
    error = (model.velocity(x_t, t, cond) - target).square().mean(-1)  # (B, T)
    return (error * cond.mask).sum(1) / cond.mask.sum(1)


@torch.no_grad()
def foga(velocity: Callable[..., Tensor], layers: Iterable, batches: Iterable[tuple]) -> Tensor:
    """FoG-A (L,) of anyone's model in eval mode: velocity(*batch) -> (B, ...), zero on padding, for each of `batches`,
    (x_t, t, cond) or whatever it takes; `layers` as backbones.gates_of. Raises ValueError where there is no ranking."""
    layers, scores = backbones.gates_of(layers), []
    if any(gate.module.training for layer in layers for gate in layer):
        raise ValueError("the model is training: call its eval() first, or dropout counts as a contribution")
    for batch in batches:
        v = [velocity(*batch)]
        for layer in layers:
            with backbones.held(backbones.close(layer)):
                v.append(velocity(*batch))
        v = torch.stack(v).flatten(2)[..., None]  # (L + 1, B, everything, 1)
        scores.append(foga_scores(v, torch.ones_like(v[0, ..., 0])))
    norms, *changes = torch.cat(scores).T
    if not norms.min() > 1e-6:
        raise ValueError("the velocity is zero or not finite: FoG-A has no ranking")
    return torch.stack(changes).mean(1)


def z_of_clips(model: FlowModel, batch: Batch, cond: Condition, t: Tensor, x_t: Tensor, target: Tensor) -> Tensor:
    """The descriptors z_0 .. z_L of every clip, (B, L + 1, D); z_0 is of the input interface, the token embedding."""
    _, states = model.velocity(x_t, t, cond, hidden=True)
    return torch.stack([descriptor(h, cond) for h in (cond.tokens, *states[1:])], 1)


@torch.no_grad()
def lasp_of_clips(model: FlowModel, batch: Batch, z: Tensor) -> Tensor:
    """LASP (eq. 6): s_T(l) with the teacher of each clip's own domain, (B, L + 1); index 0 is BiT-C's interface."""
    scores = z.new_zeros(z.shape[:2])
    for d, (name, _) in enumerate(model.config.teachers):
        of_d = batch.domain == d
        for l in range(z.shape[1]):
            scores[of_d, l] = cosine(model.projections[name](z[:, l][of_d]), batch.teacher[name][of_d])
    return scores


def held_out_errors(z: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of each clip's teacher vector when it is left out: (B, L + 1) of ridge regressions from z_l, and
    (B,) of the mean of the other clips. z (B, L + 1, D), e (B, E). The penalty is a tenth of the mean eigenvalue of the
    centred Z Z'; leaving a clip out divides its residual by 1 - H_bb. A lone clip cannot be left out: equal errors."""
    z, e, B = np.asarray(z, np.float64), np.asarray(e, np.float64), len(z)
    if B == 1:
        return np.ones((1, z.shape[1])), np.ones(1)
    e = e - e.mean(0)
    z = (z - z.mean(0)).swapaxes(0, 1)  # (L + 1, B, D)
    gram = z @ z.mT  # B x B, since clips are far fewer than D
    penalty = 0.1 * np.trace(gram, axis1=1, axis2=2)[:, None, None] / B * np.eye(B)
    hat = np.linalg.solve(gram + penalty + np.finfo(float).tiny * np.eye(B), gram) + 1 / B  # 1 / B: the intercept's
    residual = (e - hat @ e) / (1 - np.diagonal(hat, axis1=1, axis2=2)[..., None])  # (L + 1, B, E)
    return (residual**2).sum(2).T, ((e * B / (B - 1)) ** 2).sum(1)


@torch.enable_grad()
def gradients(model: FlowModel, batch: Batch, cond: Condition, t: Tensor, x_t: Tensor, target: Tensor) -> Tensor:
    """Inner products of the clips' gradients in each block, (L, B, B) float64, for squared errors summed over a clip's
    frames. Any batch drawn from these clips has a gradient norm that follows from them. Leaves .grad alone."""
    blocks = [list(block.parameters()) for block in model.blocks]
    sizes = [sum(p.numel() for p in block) for block in blocks]
    B, L = len(t), len(blocks)
    products = torch.zeros(L, B, B, dtype=torch.float64)
    for layers in np.array_split(range(L), min(L, 1 + 4 * B * sum(sizes) // GRADIENT_BYTES)):
        of_clips = []  # for each clip a gradient of each of these blocks, (its parameters,)
        for clip in torch.arange(B, device=t.device).split(1):
            v = model.velocity(x_t[clip], t[clip], cond.clips(clip))
            error = masked_mse(v, target[clip], cond.mask[clip]) * batch.frames[clip]
            grads = torch.autograd.grad(error, [p for l in layers for p in blocks[l]])
            of_clips.append(torch.cat([g.flatten() for g in grads]).split([sizes[l] for l in layers]))
        for l, of_block in zip(layers, zip(*of_clips, strict=True), strict=True):
            stacked = torch.stack(of_block)  # (B, parameters of the block)
            stacked = (stacked.cpu() if stacked.is_mps else stacked).double()  # Apple's GPUs have no float64
            products[l] = (stacked @ stacked.T).cpu()
    return products


def norms_of_batches(products: np.ndarray, frames: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """||dL_FM / dtheta_l||_2 averaged over t, (R, L), of R batches that hold clip b counts[r, b] times."""
    counts = np.asarray(counts, np.float64)
    squares = np.einsum("rb,glbc,rc->rgl", counts, products, counts, optimize=True)
    return np.sqrt(squares.clip(0)).mean(1) / (counts @ frames)[:, None]


def random_control(model: FlowModel, seed: int = 0) -> FlowModel:
    """A copy with freshly drawn weights, also where adaLN-Zero starts at zero: what architecture alone would score."""
    control = copy.deepcopy(model)
    with probing(control, seed):
        control.reset_parameters()
    return control


def interval(values: np.ndarray) -> list:
    """The 95 % percentile interval over the first axis: [low, high]."""
    return np.quantile(values, (0.025, 0.975), axis=0).tolist()


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of scores (..., L) over layers; NaN where one side is constant."""
    a, b = (scipy.stats.rankdata(x, axis=-1) - (np.shape(x)[-1] + 1) / 2 for x in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def top_layers(scores: Sequence[float] | np.ndarray, k: int) -> list:
    """The k layers (1..L) of the highest scores (..., L), best first; a tie goes to the shallower one."""
    return (np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., :k] + 1).tolist()


def top_overlap(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """How many layers the Top-K of scores (..., L) share, 0..k."""
    a, b = (np.array(top_layers(x, k)) for x in (a, b))
    return (a[..., :, None] == b[..., None, :]).sum((-1, -2))


def probe(
    model: FlowModel, batch: Batch, times: int, sigma: float, seed=0, k=3, ablation="zero", control=False, beside=False
) -> dict:
    """All probes of one model on one batch, as plain lists for probe.json. Per domain: foga (L), foga_map (G, L),
    foga_clips (B, L), lasp (L + 1), lasp_map (G, L + 1), stores (L + 1) held-out R^2, bitc, gradnorm (L),
    velocity_norm; NAME_interval, [low, high] over clips. rank_correlation and top_overlap, each [value, low, high], are
    the Store-Contribute Dissociation: LASP of layers 1..L against FoG-A. With `control` also control (L) and
    control_clips (B, L), FoG-A of random weights; with `beside` foga_resample (L) beside another ablation, where layers
    and clips allow it. Raises ValueError where `ablation` itself is not possible."""
    domain, frames = batch.domain.cpu().numpy(), batch.frames.cpu().numpy()
    result = {"t": time_points(times), "k": k, "clips": np.bincount(domain, minlength=len(DOMAINS)).tolist()}
    if ablation == "resample" and 1 in result["clips"]:
        raise ValueError("ablation=resample takes another clip of the domain: probe at least two")
    start = time.monotonic()
    points = model, batch, times, sigma, seed
    foga = at_times(foga_of_clips, *points, ablation=ablation).cpu().numpy()
    foga_seconds = time.monotonic() - start
    norms, foga = foga[..., 0].copy(), foga[..., 1:].copy()
    z = at_times(z_of_clips, *points)
    lasp = torch.stack([lasp_of_clips(model, batch, z_at_t) for z_at_t in z]).cpu().numpy()
    products = at_times(gradients, *points).numpy()
    beside = beside and ablation != "resample" and model.one_sweep and 1 not in result["clips"]
    other = at_times(foga_of_clips, *points, ablation="resample").cpu().numpy() if beside else None
    if control:
        by_chance = at_times(foga_of_clips, random_control(model, seed), *points[1:], ablation=ablation)
        controls = by_chance[..., 1:].contiguous().mean(0)  # (B, L)
    for d, name in enumerate(DOMAINS):
        of_d, n = domain == d, result["clips"][d]
        if not n:
            continue
        # row 0 is the clips as they are, so values and their intervals come from one formula
        counts = np.concatenate([np.ones((1, n), int), common.resampled(n, seed=seed)])
        drawn = {"foga": counts @ foga[:, of_d].mean(0) / n, "lasp": counts @ lasp[:, of_d].mean(0) / n}
        drawn["gradnorm"] = norms_of_batches(products[:, :, of_d][..., of_d], frames[of_d], counts)
        # a batch that repeats clips has a larger gradient throughout: only the spread of these draws is of use
        drawn["gradnorm"][1:] += drawn["gradnorm"][0] - drawn["gradnorm"][1:].mean(0)
        e = batch.teacher[model.config.teachers[d][0]].cpu().numpy()[of_d]
        errors, of_mean = held_out_errors(z.mean(0).cpu().numpy()[of_d], e)
        drawn["stores"] = 1 - counts @ errors / np.maximum(counts @ of_mean, EPS)[:, None]
        if beside:
            drawn["foga_resample"] = counts @ other[:, of_d, 1:].mean(0) / n
        ranks = drawn["lasp"][:, 1:], drawn["foga"]
        both = {"rank_correlation": rank_correlation(*ranks), "top_overlap": top_overlap(*ranks, k)}
        result[name] = {
            "foga_map": foga[:, of_d].mean(1).tolist(),
            "foga_clips": foga[:, of_d].mean(0).tolist(),
            "lasp_map": lasp[:, of_d].mean(1).tolist(),
            "bitc": lasp[:, of_d, 0].mean().item(),
            "velocity_norm": norms[:, of_d].mean().item(),
            **{key: values[0].tolist() for key, values in drawn.items()},
            **{f"{key}_interval": interval(values[1:]) for key, values in drawn.items()},
            **{key: [float(values[0]), *interval(values[1:])] for key, values in both.items()},
        }
        if control:
            own = controls[batch.domain == d]
            result[name] |= {"control": own.mean(0).tolist(), "control_clips": own.tolist()}
    return result | {"ablation": ablation, "foga_seconds": foga_seconds, "seconds": time.monotonic() - start}


def domains_in(result: dict) -> list[str]:
    """The domains that a probe had clips of."""
    return [name for name in DOMAINS if name in result]


def averaged(results: Sequence[dict]) -> dict:
    """What select() reads, as the mean over several probes of one run; the control's over those that have it."""
    keys = "foga foga_map lasp stores gradnorm velocity_norm control".split()
    mean = {}
    for name in domains_in(results[-1]):
        scores = [r[name] for r in results if name in r]
        mean[name] = {k: np.mean([s[k] for s in scores if k in s], axis=0).tolist() for k in keys if k in scores[-1]}
    return mean


# --align=NAME: a domain's averaged scores -> what ranks its L layers, highest first; a rule of yours is one more
RULES: dict[str, Callable[[dict], Sequence[float]]] = {
    "foga": lambda scores: scores["foga"],
    "foga_excess": lambda scores: np.subtract(scores["foga"], scores["control"]),
    "gradnorm": lambda scores: scores["gradnorm"],
    "lasp": lambda scores: scores["lasp"][1:],  # which begins with z_0, no layer
    "stores": lambda scores: scores["stores"][1:],
}


def select(config, result: dict, n_layer: int) -> list[dict[int, list[float]]]:
    """S_d and lambda_l of eq. 10-11 by config.align and .weighting: for each domain {layer: weights over parts of t}.
    Weights come from FoG-A whatever selected the layers. With config.timestep_adaptive every point of the t grid
    selects its own layers. train.check has passed `config`; raises ValueError when the probe cannot rank layers."""
    candidates, k = n_layer - (config.align_teacher != "external"), config.top_k
    rng, selection = np.random.default_rng(config.seed), [{} for _ in DOMAINS]
    for name in domains_in(result) if config.align != "none" else ():
        s, parts = result[name], []
        if not 1e-6 < s["velocity_norm"] < float("inf"):
            raise ValueError("the velocity is zero or not finite: FoG-A has no ranking; raise phase1_steps")
        if config.align == "stores" and np.allclose(s["stores"], 0, atol=1e-9):
            raise ValueError("align=stores leaves clips out: probe at least three of each domain")
        for foga in s["foga_map"] if config.timestep_adaptive else [s["foga"]]:
            if config.align == "fixed":
                layers = list(dict.fromkeys(config.align_layers))
            elif config.align == "random":
                layers = sorted((rng.permutation(candidates)[:k] + 1).tolist())
            else:
                try:
                    layers = top_layers(RULES[config.align](s | {"foga": foga})[:candidates], k)
                except KeyError as missing:
                    raise ValueError(f"align={config.align} ranks by {missing}, which this probe lacks") from None
            shares = np.array([1.0 if config.weighting == "equal" else foga[l - 1] for l in layers])
            if config.weighting != "paper":  # whose lambda_l is align_weight * A_l
                shares /= max(shares.sum(), EPS)
            parts.append(dict(zip(layers, (config.align_weight * shares).tolist(), strict=True)))
        union = dict.fromkeys(l for part in parts for l in part)
        selection[DOMAINS.index(name)] = {l: [part.get(l, 0.0) for part in parts] for l in union}
    return selection


def table(result: dict, selection: Selection) -> str:
    """The probes side by side, a row a layer, [95 % interval]; * marks the layers selected for alignment."""
    text, k = [], result["k"]
    for name in domains_in(result):
        d, s = DOMAINS.index(name), result[name]
        aligned = {l for l, weights in selection[d].items() if any(weights)}
        columns = {"layer": [f"  {l:3d}{'*' if l in aligned else ' '}" for l in range(1, 1 + len(s["foga"]))]}
        columns |= {"LASP": with_intervals(s, "lasp", "6.3f"), "stores R2": with_intervals(s, "stores", "5.2f")}
        columns[f"FoG-A {result['ablation']}".removesuffix(" zero")] = with_intervals(s, "foga", "6.4f")
        if "foga_resample" in s:
            columns["FoG-A resample"] = with_intervals(s, "foga_resample", "6.4f")
        if "control" in s:
            excess = np.subtract(s["foga_clips"], s["control_clips"])  # paired: the same clips and noise
            bounds = interval(common.resampled(len(excess)) @ excess / len(excess))
            s = s | {"excess": excess.mean(0), "excess_interval": bounds}
            columns["control"] = [f"{score:.4f}" for score in s["control"]]
            columns["excess over it"] = with_intervals(s, "excess", "+7.4f")
        columns["gradient norm"] = with_intervals(s, "gradnorm", "6.4f")
        rank, shared = s["rank_correlation"], s["top_overlap"]
        text += [
            f"{name} ({result['clips'][d]} clips; at the interface BiT-C {s['bitc']:.3f}, R2 {s['stores'][0]:.2f})",
            common.table([list(columns), *zip(*columns.values(), strict=True)]),
            f"  top {k}: FoG-A {top_layers(s['foga'], k)}, LASP {top_layers(s['lasp'][1:], k)}, "
            f"gradient norm {top_layers(s['gradnorm'], k)}",
            f"  LASP and FoG-A: rank correlation {rank[0]:+.2f} [{rank[1]:+.2f} {rank[2]:+.2f}], "
            f"top {k} share {shared[0]:.0f} [{shared[1]:.0f} {shared[2]:.0f}] of {k} layers",
        ]
    text.append("stores R2: ridge regressions, held out; LASP: by a projection trained at z_0, void at other depths")
    return "\n".join(text)


def with_intervals(s: dict, key: str, form: str) -> list[str]:
    """The scores `key` of layers 1..L, without what some have of the interface, and their intervals."""
    scores = zip(s[key], *s[f"{key}_interval"], strict=True)
    return [f"{v:{form}} [{low:{form}} {high:{form}}]" for v, low, high in scores][-len(s["foga"]) :]


def stability(results: dict[str, dict], k: int) -> str:
    """The paper's table 7 for {checkpoint: probe result}: each FoG-A Top-K, and what it shares with the first's."""
    first = next(iter(results.values()))
    rows = [["", *(word for name in domains_in(first) for word in (f"{name} top {k}", "shared", "rank corr."))]]
    for path, result in results.items():
        rows.append([path])
        for name in domains_in(first):
            a, b = result[name]["foga"], first[name]["foga"]
            shared, r = f"{top_overlap(a, b, k)}/{k}", f"{rank_correlation(a, b):+.2f}"
            rows[-1] += [" ".join(map(str, top_layers(a, k))), shared, r]
    return common.table(rows)


def report(out_dir: str | Path, result: dict, selection: Selection) -> None:
    """Prints the table; writes probe.json and probe.png, maps of LASP and FoG-A over t and layers and their means."""
    from matplotlib.figure import Figure  # slow to import, and opens no window, unlike pyplot

    print(table(result, selection))
    common.write_json(Path(out_dir) / "probe.json", result | {"selection": selection})
    names = domains_in(result)
    x = np.arange(1, 1 + len(result[names[0]]["foga"]))
    ticks = x[:: max(1, len(x) // 12)]
    fig = Figure(figsize=(13, 3.2 * len(names)), layout="constrained")
    for (*maps, bars), name in zip(fig.subplots(len(names), 3, squeeze=False), names, strict=True):
        s = result[name]
        panels = {"LASP: stores": np.asarray(s["lasp_map"])[:, 1:], "FoG-A: contributes": s["foga_map"]}
        for ax, (title, values) in zip(maps, panels.items(), strict=True):
            extent = (0.5, len(x) + 0.5, 0, 1)
            image = ax.imshow(values, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
            ax.set(title=f"{title} ({name})", xlabel="layer", ylabel="t (0 noise, 1 data)", xticks=ticks)
            fig.colorbar(image, ax=ax)
        reach = np.abs(np.subtract(s["foga_interval"], s["foga"]))
        bars.bar(x - 0.2, s["foga"], 0.4, yerr=reach, label="FoG-A, trained", color="tab:orange", ecolor="grey")
        if "control" in s:
            bars.bar(x + 0.2, s["control"], 0.4, label="FoG-A, random init", color="lightgrey")
        bars.plot(x, s["lasp"][1:], "o-", color="tab:blue", label="LASP", markersize=3)
        bars.set(title=f"mean over t ({name})", xlabel="layer", ylabel="score", xticks=ticks)
        bars.margins(y=0.3)  # room for the legend
        bars.legend(fontsize=7, ncols=3, loc="upper center", handlelength=1, columnspacing=1)
    fig.savefig(Path(out_dir) / "probe.png", dpi=110)


def open_checkpoints(args: ProbeArgs) -> list[tuple[FlowModel, dict, Path]]:
    """The model of each of --ckpt, its state and its file. Raises CheckpointError, and ValueError for checkpoints that
    cannot be compared or hold another backbone than --backbone."""
    states = [common.load(path, needs=common.TRAINED) for path in args.ckpt]
    if len({state["config"]["n_layer"] for state, _ in states}) > 1:
        raise ValueError("the checkpoints of --ckpt have different depths: their layers cannot be compared")
    held, path = states[0][0]["config"]["backbone"], args.ckpt[0]
    if args.backbone not in ("", held):
        raise ValueError(f"{path} holds backbone {held!r}, not {args.backbone!r}; --random_init needs no checkpoint")
    return [(backbones.load_model(state, ema="model" not in state), state, path) for state, path in states]


def untrained(args: ProbeArgs, **size) -> FlowModel:
    """The model that the arguments name, with random weights."""
    size = DiTConfig(args.n_layer, args.n_head, args.n_embd, args.ff_mult, dropout=0.0, **size)
    return random_control(backbones.find(args.backbone, args.backbone_layers)(size), args.seed)


def without_checkpoint(args: ProbeArgs) -> tuple[FlowModel, dict, Path]:
    """A model with random or published weights for the prepared data, what a checkpoint would say of it, and where its
    ckpt.pt would be. Raises DataError when the data are not prepared."""
    as_published = args.backbone == "f5tts_text"  # noise of spread 1, mels without statistics
    config = {"data_dir": args.data_dir or "data/demo", "sigma": 1.0 if as_published else 0.5}
    meta, name = read_meta(config["data_dir"]), args.backbone.split(":")[-1] or "dit"
    codes = [meta["prepared_with"][f"{domain}_codes"] for domain in DOMAINS]
    model = untrained(args, codes=codes, teachers=meta["teachers"], second_codes=1024 if meta["streams"] > 1 else 0)
    if not as_published:
        model.mel_mean.copy_(torch.tensor(meta["mel_mean"]))
        model.mel_std.copy_(torch.tensor(meta["mel_std"]))
    what, folder = f"{args.backbone or 'our model'}, random weights", f"{name}_random"
    if args.init_from:
        what = backbones.init_from(model, args.init_from) + "; LASP through a projection that may be untrained"
        folder = f"{name}_weights"
    state = {"what": what, "config": config, "selection": [{}, {}], "probes": [], "seconds": 0.0}
    return model, state, Path("out") / folder / "ckpt.pt"


def main(args: ProbeArgs) -> int | None:
    """Prints and writes the probes of one model, or how far the rankings of several checkpoints agree."""
    if args.check:
        wrong = backbones.check(untrained(args).eval())
        print("\n".join(wrong) or f"{args.n_layer} layers close exactly, and are as without hooks when they are open")
        return int(bool(wrong))
    device = pick_device(args.device)
    models = [without_checkpoint(args)] if args.random_init else open_checkpoints(args)
    model, state, _ = models[0]
    dataset = Dataset(args.data_dir or state["config"]["data_dir"], args.split)
    longest = 10**9 if args.backbone == "f5tts_text" else args.frames
    batch = fixed_batch(dataset, args.clips, args.seed, longest).to(device)
    results, single = {}, len(models) == 1
    control = args.control and single and not args.random_init
    with precision(device, args.dtype):
        for model, state, path in models:
            model.to(device).eval()
            settings = args.times, state["config"]["sigma"], args.seed, args.top_k, args.ablation
            results[str(path)] = probe(model, batch, *settings, control=control, beside=single)
    model, state, path = models[-1]
    out_dir = Path(args.out_dir or path.parent)
    out_dir.mkdir(parents=True, exist_ok=True)
    if not single:
        common.write_json(out_dir / "stability.json", results)
        print(f"{stability(results, args.top_k)}\nwrote {out_dir / 'stability.json'}")
        return
    result, selection, L = results[str(path)], state["selection"], model.config.n_layer
    weights = "raw" if "model" in state else "averaged"  # an export has no others
    what = state.get("what") or f"{path}, step {state['step']}, {weights} weights"
    print(f"{what}; t on {args.times} points; ablation {args.ablation}; * aligned in training; [95 % over clips]")
    report(out_dir, result, selection)
    passes, spent = (L + 1) * args.times, sum(p["result"]["seconds"] for p in state["probes"])
    work = f"{passes / 2:.0f} forward passes instead of {passes}" if model.one_sweep else f"{passes} forward passes"
    print(f"FoG-A of {L} layers: {result['foga_seconds']:.1f} s, the work of {work}; probes {result['seconds']:.1f} s")
    print(f"in training: {len(state['probes'])} probes, {spent:.1f} s of {state['seconds']:.0f} s")
    print(f"wrote {out_dir / 'probe.json'} and {out_dir / 'probe.png'}")


if __name__ == "__main__":
    command(main, ARGS)
