"""What each layer stores (BiT-C, LASP) and what it contributes (FoG-A, gradient norm), and the layers to align.

    python probe.py --ckpt out/demo/ckpt.pt                # table, probe.json and probe.png beside the checkpoint
    python probe.py --ckpt out/demo/ckpt.pt --clips=32 --control=false
    python probe.py --ckpt out/demo/phase1.pt out/demo/ckpt.pt      # does the ranking last? (the paper's table 7)
    python probe.py --backbone f5tts --random_init         # another's published model, see backbones.py
    python probe.py --backbone f5tts --weights model_1250000.safetensors    # with its published weights

Store: s_T(l) = cos(P_T z_l, e_T), one frozen projection for all depths (eq. 4, 6). Contribute: the relative change of
the velocity when a layer's gate is set to 0 (eq. 8-9). Every attribution is shown beside a random-init control of the
same architecture, because the first layers score high before any training; what exceeds it, training put there.
Intervals are 95 % bootstrap intervals over clips.

B clips, T frames, M mel bins, D width, L layers, G points of the t grid.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import configure


@dataclass
class ProbeArgs:
    """Settings of `python probe.py`."""

    ckpt: tuple[str, ...] = ("out/demo/ckpt.pt",)  # a checkpoint of train.py; several: how far their rankings agree
    random_init: bool = False  # probe a model with random weights, of the sizes below, instead of a checkpoint
    backbone: Literal["", "f5tts", "voicebox", "cosyvoice", "matcha"] = ""  # another's published model; empty: ours
    weights: str = ""  # the backbone's published weights, a .safetensors or .pt, instead of a checkpoint
    n_layer: int = 8  # layers with random_init
    n_head: int = 4  # attention heads with it
    n_embd: int = 256  # width with it
    data_dir: str = ""  # prepared data; empty: the one the checkpoint was trained on, or data/demo
    split: Literal["train", "held_out"] = "train"  # which clips
    clips: int = 8  # clips per domain
    times: int = 8  # points of the t grid
    frames: int = 300  # clips are cut to this; not with published weights, which read whole sentences
    top_k: int = 3  # layers in a Top-K
    seed: int = 0  # draws the clips and the noise
    control: bool = True  # also probe a random-init copy
    out_dir: str = ""  # where probe.json and probe.png go; empty: beside the checkpoint
    device: str = "auto"  # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto takes bfloat16 where the machine has it

    ranges: ClassVar[dict] = dict.fromkeys("clips times frames top_k n_layer n_head n_embd".split(), (1, None))


if __name__ == "__main__":
    ARGS = configure(ProbeArgs, __doc__)  # a typo is answered before torch is imported

import contextlib
import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import common
from backbones import build, load_model, published
from common import DOMAINS, command, pick_device, precision, write_json
from data import Batch, Dataset, fixed_batch, read_meta
from model import DiTConfig, FlowModel, Selection, cosine, descriptors, make_xt, masked_mse

EPS = 1e-8  # of eq. 9
SWEEP_FRAMES = 40_000  # clips x frames x (L + 1) of one growing batch, which bounds its memory
GRADIENT_BYTES = 4 * 2**30  # of clips' gradients held at once; more are computed in parts
WHOLE = 10**9  # frames: no clip is cut


def time_points(n: int) -> torch.Tensor:
    """Midpoints of n equal parts of (0, 1): an average over them is an average over t ~ U(0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@contextlib.contextmanager
def probing(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Eval mode and a fixed random state inside; the model's mode and the global random state unchanged outside."""
    training = model.training
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def foga_scores(velocities: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 9 per clip: ||v - v^(-l)||_2 / (||v||_2 + eps) over valid frames -> (B, L), and ||v||_2 (B,)."""
    v = velocities.to(torch.promote_types(velocities.dtype, torch.float32)) * mask[..., None]
    norm = v[0].flatten(1).norm(dim=1)  # (B,)
    change = (v[1:] - v[0]).flatten(2).norm(dim=2)  # (L, B)
    return (change / (norm + EPS)).T, norm


@torch.no_grad()
def foga_map(model: FlowModel, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0):
    """FoG-A of every layer at every t: scores (G, B, L) and velocity norms (G, B). Eval mode, one fixed noise."""
    scores, norms = [], []
    with probing(model, seed):
        cond = model.embed_condition(batch)
        B, T = cond.mask.shape
        parts = torch.arange(B, device=cond.mask.device).split(max(1, SWEEP_FRAMES // (T * (len(model.blocks) + 1))))
        for t in t_grid:
            torch.manual_seed(seed)  # the same noise at every t, so that a row differs from the next by t alone
            ts = batch.mel.new_full((B,), float(t))
            x_t, _ = make_xt(model, batch.mel, ts, sigma)
            conds = [cond.clips(rows) for rows in parts]
            each = [
                foga_scores(model.ablated(x_t[rows], ts[rows], c), c.mask) for rows, c in zip(parts, conds, strict=True)
            ]
            scores.append(torch.cat([s for s, _ in each])), norms.append(torch.cat([n for _, n in each]))
    return torch.stack(scores), torch.stack(norms)


def foga(model: FlowModel, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0) -> dict:
    """A_l of eq. 9 as an expectation over the clips of each domain and over t_grid: {domain: (L,)}."""
    scores, _ = foga_map(model, batch, t_grid, sigma, seed)
    return {
        name: scores[:, batch.domain == d].mean((0, 1)) for d, name in enumerate(DOMAINS) if (batch.domain == d).any()
    }


@torch.no_grad()
def lasp_map(
    model: FlowModel, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """LASP (eq. 6): s_T(l) with the teacher of each clip's own domain, (G, B, L + 1); index 0 is BiT-C's interface."""
    rows = []
    with probing(model, seed):
        cond = model.embed_condition(batch)
        for t in t_grid:
            torch.manual_seed(seed)
            ts = batch.mel.new_full((len(batch.frames),), float(t))
            x_t, _ = make_xt(model, batch.mel, ts, sigma)
            _, states = model.velocity(x_t, ts, cond, hidden=True)
            row = cond.tokens.new_zeros(
                len(ts), len(states), dtype=torch.promote_types(cond.tokens.dtype, torch.float32)
            )
            for l, z in enumerate(descriptors(cond, states)):
                for d, (name, _) in enumerate(model.config.teachers):
                    own = batch.domain == d
                    row[own, l] = cosine(model.projections[name](z[own]), batch.teacher[name][own]).to(row.dtype)
            rows.append(row)
    return torch.stack(rows)


def gradient_products(model: FlowModel, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0):
    """Inner products of the clips' gradients in each block, (G, L, B, B) float64, for squared errors summed over a
    clip's frames. Any batch drawn from these clips has a gradient norm that follows from them. Leaves .grad alone.
    """
    B, L = len(batch.frames), len(model.blocks)
    products = torch.zeros(len(t_grid), L, B, B, dtype=torch.float64)
    held = 4 * B * sum(p.numel() for p in model.blocks.parameters())  # bytes of all clips' gradients
    parts = np.array_split(range(L), min(L, 1 + held // GRADIENT_BYTES))
    with probing(model, seed):
        with torch.no_grad():
            cond = model.embed_condition(batch)
        torch.clear_autocast_cache()  # weights cast without gradients are not to be used again with them
        for (g, t), layers in itertools.product(enumerate(t_grid), parts):
            torch.manual_seed(seed)
            ts = batch.mel.new_full((B,), float(t))
            x_t, target = make_xt(model, batch.mel, ts, sigma)
            params = [list(model.blocks[l].parameters()) for l in layers]
            gradients = [[] for _ in layers]
            for b in range(B):
                with torch.enable_grad():
                    own = cond.clips(torch.tensor([b], device=ts.device))
                    v = model.velocity(x_t[b : b + 1], ts[b : b + 1], own)
                    error = masked_mse(v, target[b : b + 1], own.mask) * batch.frames[b]
                    grads = iter(torch.autograd.grad(error, [p for block in params for p in block]))
                for block, rows in zip(params, gradients, strict=True):
                    rows.append(torch.cat([next(grads).flatten() for _ in block]))
            for l, rows in zip(layers, gradients, strict=True):
                stacked = torch.stack(rows).double()  # (B, parameters of the block)
                products[g, l] = (stacked @ stacked.T).cpu()
    return products


def norms_of_batches(products: np.ndarray, frames: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """||dL_FM / dtheta_l||_2 averaged over t, (R, L), of R batches that hold clip b counts[r, b] times."""
    counts = np.asarray(counts, np.float64)
    squares = np.einsum("rb,glbc,rc->rgl", counts, products, counts, optimize=True)
    return np.sqrt(squares.clip(0)).mean(1) / (counts @ frames)[:, None]


def gradient_norms(model: FlowModel, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0) -> dict:
    """||dL_FM / dtheta_l||_2 of each block, per domain, averaged over t_grid: {domain: (L,)}."""
    products = gradient_products(model, batch, t_grid, sigma, seed).numpy()
    frames, domain = batch.frames.cpu().numpy(), batch.domain.cpu().numpy()
    present = {name: (domain == d)[None] for d, name in enumerate(DOMAINS) if (domain == d).any()}
    return {name: norms_of_batches(products, frames, own)[0] for name, own in present.items()}


def random_control(model: FlowModel, seed: int = 0) -> FlowModel:
    """A copy with freshly drawn weights, also where adaLN-Zero starts at zero: what architecture alone would score."""
    control = copy.deepcopy(model)
    with probing(control, seed):
        control.reset_parameters()
    return control


def control_scores(model: FlowModel, batch: Batch, times: int, sigma: float, seed: int = 0) -> dict:
    """FoG-A of the random-init control, as plain lists: {domain: {"foga": (L), "foga_clips": (B, L)}}."""
    scores = foga_map(random_control(model, seed), batch, time_points(times), sigma, seed)[0].mean(0)
    own = {name: scores[batch.domain == d] for d, name in enumerate(DOMAINS)}
    return {name: {"foga": s.mean(0).tolist(), "foga_clips": s.tolist()} for name, s in own.items() if len(s)}


# ---- what a score is worth: intervals, and agreement of rankings


def resampled(clips: int, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each clip is drawn in each bootstrap sample, (draws, clips)."""
    return np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), draws)


def interval(values: np.ndarray) -> list:
    """The 95 % percentile interval over the first axis: [low, high]."""
    return np.quantile(values, (0.025, 0.975), axis=0).tolist()


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of scores (..., L) over layers; NaN where one side is constant."""
    a, b = (scipy.stats.rankdata(x, axis=-1) - (np.shape(x)[-1] + 1) / 2 for x in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def top_overlap(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """How many layers the Top-K of scores (..., L) share, 0..k."""
    tops = [np.argsort(-np.asarray(x), axis=-1, kind="stable")[..., :k] for x in (a, b)]
    return (tops[0][..., :, None] == tops[1][..., None, :]).sum((-1, -2))


def probe(model: FlowModel, batch: Batch, times: int, sigma: float, seed: int = 0, k: int = 3) -> dict:
    """All probes of one model on one batch, as plain lists for probe.json.

    Per domain: foga (L), foga_map (G, L), foga_clips (B, L), lasp (L + 1), lasp_map (G, L + 1), bitc, gradnorm (L),
    velocity_norm; NAME_interval is [low, high] over clips. rank_correlation and top_overlap, each [value, low, high],
    are the Store-Contribute Dissociation: LASP of layers 1..L against FoG-A.
    """
    start, grid = time.time(), time_points(times)
    scores, norms = (x.cpu().numpy() for x in foga_map(model, batch, grid, sigma, seed))
    foga_seconds = time.time() - start
    lasp = lasp_map(model, batch, grid, sigma, seed).cpu().numpy()
    products = gradient_products(model, batch, grid, sigma, seed).numpy()
    domain, frames = batch.domain.cpu().numpy(), batch.frames.cpu().numpy()
    result = {"t": grid.tolist(), "k": k, "clips": [int((domain == d).sum()) for d in range(len(DOMAINS))]}
    for d, name in enumerate(DOMAINS):
        own = domain == d
        if not own.any():
            continue
        foga_clips, lasp_clips = scores[:, own].mean(0), lasp[:, own].mean(0)
        # row 0 is the clips as they are, so values and their intervals come from one formula
        counts = np.concatenate([np.ones((1, own.sum()), int), resampled(own.sum(), seed=seed)])
        drawn = {"foga": counts @ foga_clips / own.sum(), "lasp": counts @ lasp_clips / own.sum()}
        drawn["gradnorm"] = norms_of_batches(products[:, :, own][..., own], frames[own], counts)
        drawn["rank_correlation"] = rank_correlation(drawn["lasp"][:, 1:], drawn["foga"])
        drawn["top_overlap"] = top_overlap(drawn["lasp"][:, 1:], drawn["foga"], k)
        result[name] = {
            "foga_map": scores[:, own].mean(1).tolist(),
            "foga_clips": foga_clips.tolist(),
            "lasp_map": lasp[:, own].mean(1).tolist(),
            "bitc": lasp[:, own, 0].mean().item(),
            "velocity_norm": norms[:, own].mean().item(),
        }
        # a batch that repeats clips has a larger gradient throughout: only the spread of these draws is of use
        drawn["gradnorm"][1:] += drawn["gradnorm"][0] - drawn["gradnorm"][1:].mean(0)
        for key in ("foga", "lasp", "gradnorm"):
            result[name] |= {key: drawn[key][0].tolist(), f"{key}_interval": interval(drawn[key][1:])}
        for key in ("rank_correlation", "top_overlap"):
            result[name][key] = [float(drawn[key][0]), *interval(drawn[key][1:])]
    return result | {"foga_seconds": foga_seconds, "seconds": time.time() - start}


def top_layers(scores: Sequence[float], k: int) -> list[int]:
    """The k layers (1..L) of the highest scores, best first; a tie goes to the shallower one."""
    return [int(i) + 1 for i in np.argsort(-np.asarray(scores), kind="stable")[:k]]


def check_strategy(config, n_layer: int) -> int:
    """How many of the L layers can be aligned. Raises ValueError when config asks for others, or for what its strategy
    cannot do."""
    candidates = n_layer - (config.align_teacher == "self")  # the last layer has no deeper one to learn from
    bad = [l for l in config.align_layers if not 1 <= l <= candidates]
    if bad or (config.align == "fixed" and not config.align_layers):
        raise ValueError(f"align_layers={config.align_layers}: name layers from 1 to {candidates}")
    if config.timestep_adaptive and config.align != "foga":
        raise ValueError(f"timestep_adaptive needs align=foga, not {config.align!r}")
    return candidates


def select(config, result: dict, n_layer: int) -> list[dict[int, list[float]]]:
    """S_d and lambda_l of eq. 10-11 by config.align and .weighting: for each domain {layer: weights over parts of t}.

    Weights come from FoG-A whatever selected the layers. With config.timestep_adaptive every point of the t grid
    selects its own layers. Raises ValueError when the velocity is numerically zero, so that there is nothing to
    attribute, and as check_strategy does.
    """
    if config.align == "none":
        return [{} for _ in DOMAINS]
    candidates = check_strategy(config, n_layer)
    rng = np.random.default_rng(config.seed)
    selection = []
    for name in DOMAINS:
        scores = result[name]
        if not 1e-6 < scores["velocity_norm"] < float("inf"):
            raise ValueError("the velocity is zero or not finite: FoG-A has no ranking; raise phase1_steps")
        rows = scores["foga_map"] if config.timestep_adaptive else [scores["foga"]]
        parts = []
        for foga_row in rows:
            layers = {
                "fixed": list(dict.fromkeys(config.align_layers)),
                "random": sorted((rng.permutation(candidates)[: config.top_k] + 1).tolist()),
                "lasp": top_layers(scores["lasp"][1 : candidates + 1], config.top_k),
                "gradnorm": top_layers(scores["gradnorm"][:candidates], config.top_k),
                "foga": top_layers(foga_row[:candidates], config.top_k),
            }[config.align]
            parts.append(dict(zip(layers, _weights(config, [foga_row[l - 1] for l in layers]), strict=True)))
        union = list(dict.fromkeys(l for part in parts for l in part))
        selection.append({l: [part.get(l, 0.0) for part in parts] for l in union})
    return selection


def _weights(config, scores: list[float]) -> list[float]:
    """lambda_l of eq. 11 and its two alternatives."""
    a = np.array(scores)
    if config.weighting == "equal":
        a = np.full(len(a), 1 / len(a))
    elif config.weighting == "normalized":
        a = a / a.sum()
    return (config.align_weight * a).tolist()


def table(result: dict, control: dict | None, selection: Selection = ()) -> str:
    """The probes side by side, a row a layer, [95 % interval]; * marks the layers selected for alignment."""
    lines, k = [], result["k"]
    for d, name in enumerate(DOMAINS):
        s, c = result[name], control[name] if control else None
        excess = np.subtract(s["foga_clips"], c["foga_clips"]) if c else None  # paired: the same clips and noise
        bounds = interval(resampled(len(excess)) @ excess / len(excess)) if c else None
        lines.append(f"{name} ({result['clips'][d]} clips; BiT-C at the interface {s['bitc']:.3f})")
        lines.append(
            f"  layer   {'LASP':22s}{'FoG-A':24s}" + (f"control  {'excess over it':26s}" if c else "") + "gradient norm"
        )
        for l in range(len(s["foga"])):
            mark = "*" if selection and any(selection[d].get(l + 1, ())) else " "
            row = f"  {l + 1:4d}{mark}  {_with_interval(s['lasp'], s['lasp_interval'], l + 1, '6.3f')}   "
            row += f"{_with_interval(s['foga'], s['foga_interval'], l, '6.4f')}   "
            if c:
                row += f"{c['foga'][l]:6.4f}  {_with_interval(excess.mean(0), bounds, l, '+7.4f')}   "
            lines.append(row + _with_interval(s["gradnorm"], s["gradnorm_interval"], l, "6.4f"))
        rank, shared = s["rank_correlation"], s["top_overlap"]
        lines.append(
            f"  top {k}: FoG-A {top_layers(s['foga'], k)}, LASP {top_layers(s['lasp'][1:], k)}, "
            f"gradient norm {top_layers(s['gradnorm'], k)}"
        )
        lines.append(
            f"  LASP and FoG-A: rank correlation {rank[0]:+.2f} [{rank[1]:+.2f} {rank[2]:+.2f}], "
            f"top {k} share {shared[0]:.0f} [{shared[1]:.0f} {shared[2]:.0f}] of {k} layers"
        )
        if c:
            lines.append(f"  {against_control(s['foga'], c['foga'], k)}")
    return "\n".join(lines)


def _with_interval(values: Sequence[float], bounds: Sequence, l: int, form: str) -> str:
    return f"{values[l]:{form}} [{bounds[0][l]:{form}} {bounds[1][l]:{form}}]"


def against_control(scores: Sequence[float], control: Sequence[float], k: int) -> str:
    """What a FoG-A ranking owes to the architecture alone, in a sentence."""
    same, r = int(top_overlap(scores, control, k)), float(rank_correlation(scores, control))
    if top_layers(scores, len(scores)) == top_layers(control, len(scores)):
        return "the FoG-A ranking is the same as before any training: it says nothing about what was learned"
    if same == min(k, len(scores)):
        return f"FoG-A's top {k} are those of random weights, before any training (rank correlation {r:+.2f})"
    return f"FoG-A's top {k} shares {same} of {k} layers with random weights (rank correlation {r:+.2f})"


def stability(results: dict[str, dict], k: int) -> str:
    """The paper's table 7 for {checkpoint: probe result}: each FoG-A Top-K, and what it shares with the first's."""
    first = next(iter(results.values()))
    lines = [f"{'':40s}" + "".join(f"{f'{name} top {k}':18s}{'shared':8s}{'rank corr.':12s}" for name in DOMAINS)]
    for path, result in results.items():
        line = f"{path:40s}"
        for name in DOMAINS:
            a, b = result[name]["foga"], first[name]["foga"]
            top = " ".join(map(str, top_layers(a, k)))
            line += f"{top:18s}{f'{top_overlap(a, b, k)}/{k}':8s}{rank_correlation(a, b):<+12.2f}"
        lines.append(line)
    return "\n".join(lines)


def figure(result: dict, control: dict | None, path: Path) -> None:
    """Layer x t maps of LASP and FoG-A per domain, and FoG-A beside its control; written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    L = len(result[DOMAINS[0]]["foga"])
    fig, axes = plt.subplots(len(DOMAINS), 3, figsize=(13, 3.2 * len(DOMAINS)), layout="constrained")
    for row, name in zip(axes, DOMAINS, strict=True):
        s = result[name]
        for ax, key, skip, title in (
            (row[0], "lasp_map", 1, "LASP: stores"),
            (row[1], "foga_map", 0, "FoG-A: contributes"),
        ):
            values = np.asarray(s[key])[:, skip:]
            extent = (0.5, L + 0.5, 0, 1)
            image = ax.imshow(
                values, aspect="auto", origin="lower", extent=extent, cmap="viridis", interpolation="nearest"
            )
            ax.set(title=f"{title} ({name})", xlabel="layer", ylabel="t (0 noise, 1 data)")
            ax.set_xticks(range(1, L + 1, max(1, L // 12)))
            fig.colorbar(image, ax=ax)
        x = np.arange(1, L + 1)
        reach = np.abs(np.subtract(s["foga_interval"], s["foga"]))
        row[2].bar(x - 0.2, s["foga"], 0.4, yerr=reach, label="FoG-A, trained", color="tab:orange", ecolor="grey")
        if control:
            row[2].bar(x + 0.2, control[name]["foga"], 0.4, label="FoG-A, random init", color="lightgrey")
        row[2].plot(x, s["lasp"][1:], "o-", color="tab:blue", label="LASP", markersize=3)
        row[2].set(title=f"mean over t ({name})", xlabel="layer", ylabel="score", xticks=row[0].get_xticks())
        row[2].margins(y=0.3)  # room for the legend
        row[2].legend(fontsize=7, ncols=3, loc="upper center", handlelength=1, columnspacing=1)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(out_dir: Path, result: dict, control: dict | None, selection: Selection = ()) -> None:
    """Writes probe.json and probe.png into out_dir."""
    chosen = [{str(l): w for l, w in s.items()} for s in selection]
    write_json(out_dir / "probe.json", result | {"control": control, "selection": chosen})
    figure(result, control, out_dir / "probe.png")


def cost(result: dict, model: FlowModel, state: dict) -> str:
    """What the probes cost, here and in training."""
    L, naive = model.config.n_layer, (model.config.n_layer + 1) * len(result["t"])
    here = f"FoG-A of {L} layers: {result['foga_seconds']:.1f} s, "
    here += f"the work of {naive / 2:.0f} forward passes instead of {naive}" if model.one_sweep else f"{naive} passes"
    spent = sum(p["result"]["seconds"] for p in state["probes"])
    share = f" ({100 * spent / state['seconds']:.1f} % of it)" if state["seconds"] else ""
    return (
        f"{here}; all probes {result['seconds']:.1f} s\n"
        f"in training: {len(state['probes'])} probes, {spent:.1f} s of {state['seconds']:.0f} s{share}"
    )


def without_checkpoint(args: ProbeArgs) -> tuple[FlowModel, dict, Path]:
    """A model with random or published weights for the prepared data, what a checkpoint would say of it, and where its
    ckpt.pt would be. Raises DataError when the data are not prepared."""
    data_dir = args.data_dir or "data/demo"
    meta, name, sigma = read_meta(data_dir), args.backbone or "dit", 0.5
    teachers = tuple((teacher, width) for teacher, width in meta["teachers"])
    if args.weights:
        model, out, sigma = published(args.backbone, args.weights, teachers), f"{name}_published", 1.0
    else:
        codes = tuple(meta["prepared_with"][f"{domain}_codes"] for domain in DOMAINS)
        size = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "dropout": 0.0}
        second = 1024 if meta["streams"] > 1 else 0
        model = build(args.backbone, DiTConfig(**size, codes=codes, second_codes=second, teachers=teachers))
        with probing(model, args.seed):
            model.reset_parameters()
        model.mel_mean.copy_(torch.tensor(meta["mel_mean"])), model.mel_std.copy_(torch.tensor(meta["mel_std"]))
        out = f"{name}_random"
    about = {"config": {"data_dir": data_dir, "sigma": sigma}, "selection": [{}, {}], "probes": [], "seconds": 0.0}
    return model, about, Path("out") / out / "ckpt.pt"


def opened(args: ProbeArgs, device: str) -> list[tuple[FlowModel, dict, Path]]:
    """The models to probe, each with its checkpoint's state and file."""
    if args.random_init or args.weights:
        model, state, path = without_checkpoint(args)
        return [(model.to(device).eval(), state, path)]
    states = [common.load(path) for path in args.ckpt]
    if len({state["config"]["n_layer"] for state, _ in states}) > 1:
        raise ValueError("the checkpoints of --ckpt have different depths: their layers cannot be compared")
    own = states[0][0]["config"]["backbone"]
    if args.backbone not in ("", own):
        raise ValueError(
            f"{args.ckpt[0]} holds backbone {own!r}, not {args.backbone!r}; --random_init needs no checkpoint"
        )
    return [(load_model(state, device=device), state, used) for state, used in states]


def main(args: ProbeArgs) -> None:
    device, results = pick_device(args.device), {}
    models = opened(args, device)
    dataset = Dataset(args.data_dir or models[0][1]["config"]["data_dir"], args.split)
    batch = fixed_batch(dataset, args.clips, args.seed, WHOLE if args.weights else args.frames).to(device)
    if args.weights:
        batch = models[0][0].spell(batch, [dataset.name_and_text(i)[1] for i in batch.ids.tolist()])
    for model, state, used in models:
        run = state["config"]
        with precision(device, args.dtype):
            results[str(used)] = probe(model, batch, args.times, run["sigma"], args.seed, args.top_k)
    out_dir = Path(args.out_dir or used.parent)
    out_dir.mkdir(parents=True, exist_ok=True)
    if len(results) > 1:
        write_json(out_dir / "stability.json", results)
        print(stability(results, args.top_k))
        print(f"wrote {out_dir / 'stability.json'}")
        return
    result, control = results[str(used)], None
    if args.control and not args.random_init:  # which is one
        with precision(device, args.dtype):
            control = control_scores(model, batch, args.times, run["sigma"], args.seed)
    report(out_dir, result, control, state["selection"])
    if args.weights:
        what = f"{args.weights}; LASP through a projection that was never trained"
    elif args.random_init:
        what = f"{args.backbone or 'our model'}, random weights"
    else:
        what = f"{used}, step {state['step']}"
    print(f"{what}; t on {args.times} points; * aligned in training; [95 % interval over clips]")
    print(table(result, control, state["selection"]))
    print(cost(result, model, state))
    print(f"wrote {out_dir / 'probe.json'} and {out_dir / 'probe.png'}")


if __name__ == "__main__":
    command(main, ARGS)
