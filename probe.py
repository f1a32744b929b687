"""What each layer stores (BiT-C, LASP) and what it contributes (FoG-A, gradient norm), and the layers to align.

    python probe.py --ckpt out/demo/ckpt.pt                # table, probe.json and probe.png beside the checkpoint
    python probe.py --ckpt out/demo/ckpt.pt --clips=16 --times=16

Store: s_T(l) = cos(P_T z_l, e_T), one frozen projection for all depths (eq. 4, 6). Contribute: the relative change of
the velocity when a layer's gate is set to 0 (eq. 8-9). Every attribution is shown beside a random-init control of the
same architecture, because the first layers score high before any training; what exceeds it, training put there.

B clips, T frames, M mel bins, D width, L layers, G points of the t grid.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import DOMAINS, configure


@dataclass
class ProbeArgs:
    """Settings of `python probe.py`."""

    ckpt: str = "out/demo/ckpt.pt"  # a checkpoint of train.py
    data_dir: str = ""  # prepared data; empty: the one the checkpoint was trained on
    split: Literal["train", "held_out"] = "train"  # which clips
    clips: int = 4  # clips per domain
    times: int = 8  # points of the t grid
    frames: int = 300  # clips are cut to this; time and memory grow with clips x frames x layers
    seed: int = 0  # draws the clips and the noise
    control: bool = True  # also probe a random-init copy
    out_dir: str = ""  # where probe.json and probe.png go; empty: beside the checkpoint

    ranges: ClassVar[dict] = dict.fromkeys(("clips", "times", "frames"), (1, None))


if __name__ == "__main__":
    ARGS = configure(ProbeArgs, __doc__)  # a typo is answered before torch is imported

import contextlib
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import checkpoint
from data import Batch, Dataset, fixed_batch
from model import Condition, DiT, Selection, cosine, descriptors, load_model, masked_mse, noised

EPS = 1e-8  # of eq. 9


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


def ablated_velocities(model: DiT, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
    """v and every v^(-l) (eq. 8) in one sweep: (L + 1, B, T, M), index 0 the intact model.

    The ablation of layer l shares everything before l. So one batch grows while the layers run in order: after layer l
    the state that skipped it joins. Exactly the naive loop's result for (L + 1) / 2 forward passes instead of L + 1.
    """
    B = len(x_t)
    h, context = model.stem(x_t, t, cond)
    for block in model.blocks:
        after = block(h, context.repeat(len(h) // B))
        h = torch.cat([after, h[:B]])  # h[:B] is the intact state before this layer
    L = len(model.blocks)
    return model.head(h, context.repeat(L + 1)).unflatten(0, (L + 1, B))


def foga_scores(velocities: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 9 per clip: ||v - v^(-l)||_2 / (||v||_2 + eps) over valid frames -> (B, L), and ||v||_2 (B,)."""
    v = velocities.to(torch.promote_types(velocities.dtype, torch.float32)) * mask[..., None]
    norm = v[0].flatten(1).norm(dim=1)  # (B,)
    change = (v[1:] - v[0]).flatten(2).norm(dim=2)  # (L, B)
    return (change / (norm + EPS)).T, norm


@torch.no_grad()
def foga_map(model: DiT, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0):
    """FoG-A of every layer at every t: scores (G, B, L) and velocity norms (G, B). Eval mode, one fixed noise."""
    scores, norms = [], []
    with probing(model, seed):
        cond = model.embed_condition(batch)
        for t in t_grid:
            torch.manual_seed(seed)  # the same noise at every t, so that a row differs from the next by t alone
            ts = batch.mel.new_full((len(batch.frames),), float(t))
            x_t, _ = noised(model, batch.mel, ts, sigma)
            s, n = foga_scores(ablated_velocities(model, x_t, ts, cond), cond.mask)
            scores.append(s), norms.append(n)
    return torch.stack(scores), torch.stack(norms)


def foga(model: DiT, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0) -> dict:
    """A_l of eq. 9 as an expectation over the clips of each domain and over t_grid: {domain: (L,)}."""
    scores, _ = foga_map(model, batch, t_grid, sigma, seed)
    return {
        name: scores[:, batch.domain == d].mean((0, 1)) for d, name in enumerate(DOMAINS) if (batch.domain == d).any()
    }


@torch.no_grad()
def lasp_map(model: DiT, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0) -> torch.Tensor:
    """LASP (eq. 6): s_T(l) with the teacher of each clip's own domain, (G, B, L + 1); index 0 is BiT-C's interface."""
    rows = []
    with probing(model, seed):
        cond = model.embed_condition(batch)
        for t in t_grid:
            torch.manual_seed(seed)
            ts = batch.mel.new_full((len(batch.frames),), float(t))
            x_t, _ = noised(model, batch.mel, ts, sigma)
            _, states = model.velocity(x_t, ts, cond, hidden=True)
            row = cond.tokens.new_zeros(
                len(ts), len(states), dtype=torch.promote_types(cond.tokens.dtype, torch.float32)
            )
            for l, z in enumerate(descriptors(cond, states)):
                for d, (name, _) in enumerate(model.shape.teachers):
                    own = batch.domain == d
                    row[own, l] = cosine(model.projections[name](z[own]), batch.teacher[name][own]).to(row.dtype)
            rows.append(row)
    return torch.stack(rows)


def gradient_norms(model: DiT, batch: Batch, t_grid: Sequence[float], sigma: float = 0.5, seed: int = 0) -> dict:
    """||dL_FM / dtheta_l||_2 of each block, per domain, averaged over t_grid: {domain: (L,)}. Leaves .grad alone."""
    present = [d for d in range(len(DOMAINS)) if (batch.domain == d).any()]
    totals = {DOMAINS[d]: torch.zeros(len(model.blocks), dtype=torch.float64) for d in present}
    with probing(model, seed), torch.enable_grad():
        for t in t_grid:
            cond = model.embed_condition(batch)
            torch.manual_seed(seed)
            ts = batch.mel.new_full((len(batch.frames),), float(t))
            x_t, target = noised(model, batch.mel, ts, sigma)
            v = model.velocity(x_t, ts, cond)
            for d in present:  # one forward pass serves both domains
                loss = masked_mse(v, target, cond.mask & (batch.domain == d)[:, None])
                grads = iter(torch.autograd.grad(loss, list(model.blocks.parameters()), retain_graph=d != present[-1]))
                for l, block in enumerate(model.blocks):
                    own = [next(grads) for _ in block.parameters()]
                    totals[DOMAINS[d]][l] += sum(g.double().square().sum() for g in own).sqrt().cpu() / len(t_grid)
    return totals


def random_control(model: DiT, seed: int = 0) -> DiT:
    """A copy with freshly drawn weights, also where adaLN-Zero starts at zero: what architecture alone would score."""
    control = copy.deepcopy(model)
    with probing(control, seed):
        control.init_weights()
        control.local.conv.reset_parameters()  # keeps torch's own initialisation, so init_weights leaves it alone
        for linear in [*(b.modulation for b in control.blocks), control.head_modulation, control.head_out]:
            torch.nn.init.xavier_uniform_(linear.weight)
    return control


def control_scores(model: DiT, batch: Batch, times: int, sigma: float, seed: int = 0) -> dict:
    """FoG-A of the random-init control, as plain lists: {domain: {"foga": (L)}}."""
    scores = foga(random_control(model, seed), batch, time_points(times), sigma, seed)
    return {name: {"foga": s.tolist()} for name, s in scores.items()}


def probe(model: DiT, batch: Batch, times: int, sigma: float, seed: int = 0) -> dict:
    """All probes of one model on one batch, as plain lists for probe.json.

    Per domain: foga (L), foga_map (G, L), lasp (L + 1), lasp_map (G, L + 1), bitc, gradnorm (L), velocity_norm.
    """
    start, grid = time.time(), time_points(times)
    scores, norms = foga_map(model, batch, grid, sigma, seed)
    foga_seconds = time.time() - start
    lasp = lasp_map(model, batch, grid, sigma, seed)
    gradnorm = gradient_norms(model, batch, grid, sigma, seed)
    result = {"t": grid.tolist(), "clips": [int((batch.domain == d).sum()) for d in range(len(DOMAINS))]}
    for d, name in enumerate(DOMAINS):
        own = (batch.domain == d).cpu()
        if not own.any():
            continue
        result[name] = {
            "foga": scores[:, own].mean((0, 1)).tolist(),
            "foga_map": scores[:, own].mean(1).tolist(),
            "lasp": lasp[:, own].mean((0, 1)).tolist(),
            "lasp_map": lasp[:, own].mean(1).tolist(),
            "bitc": lasp[:, own, 0].mean().item(),
            "gradnorm": gradnorm[name].tolist(),
            "velocity_norm": norms[:, own].mean().item(),
        }
    return result | {"foga_seconds": foga_seconds, "seconds": time.time() - start}


def top_layers(scores: Sequence[float], k: int) -> list[int]:
    """The k layers (1..L) of the highest scores, best first; a tie goes to the shallower one."""
    return [int(i) + 1 for i in np.argsort(-np.asarray(scores), kind="stable")[:k]]


def select(config, result: dict, n_layer: int) -> list[dict[int, list[float]]]:
    """S_d and lambda_l of eq. 10-11 by config.align and .weighting: for each domain {layer: weights over parts of t}.

    Weights come from FoG-A whatever selected the layers. With config.timestep_adaptive every point of the t grid
    selects its own layers. Raises ValueError when the velocity is numerically zero, so that there is nothing to
    attribute, or when a layer does not exist.
    """
    if config.align == "none":
        return [{} for _ in DOMAINS]
    candidates = n_layer - (config.align_teacher == "self")  # the last layer has no deeper one to learn from
    bad = [l for l in config.align_layers if not 1 <= l <= candidates]
    if bad or (config.align == "fixed" and not config.align_layers):
        raise ValueError(f"align_layers={config.align_layers}: name layers from 1 to {candidates}")
    if config.timestep_adaptive and config.align != "foga":
        raise ValueError(f"timestep_adaptive needs align=foga, not {config.align!r}")
    rng = np.random.default_rng(config.seed)
    selection = []
    for name in DOMAINS:
        scores = result[name]
        if not 1e-6 < scores["velocity_norm"] < float("inf"):
            raise ValueError("the velocity is zero or not finite: FoG-A has no ranking; raise warmup_steps")
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
    """The probes side by side, a row a layer; * marks the layers that were selected for alignment."""
    lines = []
    for d, name in enumerate(DOMAINS):
        s, c = result[name], control[name] if control else None
        lines.append(f"{name} ({result['clips'][d]} clips; BiT-C at the interface {s['bitc']:.3f})")
        lines.append("  layer   LASP   FoG-A" + ("  control   excess" if c else "") + "   grad norm")
        for l in range(1, len(s["foga"]) + 1):
            a = s["foga"][l - 1]
            extra = f"  {c['foga'][l - 1]:7.4f}  {a - c['foga'][l - 1]:+7.4f}" if c else ""
            mark = "*" if selection and any(selection[d].get(l, ())) else " "
            lines.append(f"  {l:4d}{mark}  {s['lasp'][l]:6.3f}  {a:6.4f}{extra}   {s['gradnorm'][l - 1]:9.4f}")
        lines.append(f"  top: FoG-A {top_layers(s['foga'], 3)}, LASP {top_layers(s['lasp'][1:], 3)}")
        if c and top_layers(s["foga"], len(s["foga"])) == top_layers(c["foga"], len(s["foga"])):
            lines.append("  the FoG-A ranking is the same as before any training")
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
        row[2].bar(x - 0.2, s["foga"], 0.4, label="trained", color="tab:orange")
        if control:
            row[2].bar(x + 0.2, control[name]["foga"], 0.4, label="random init", color="lightgrey")
        row[2].plot(x, s["lasp"][1:], "o-", color="tab:blue", label="LASP", markersize=3)
        row[2].set(title=f"mean over t ({name})", xlabel="layer", ylabel="score")
        row[2].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(out_dir: Path, result: dict, control: dict | None, selection: Selection = ()) -> None:
    """Writes probe.json and probe.png into out_dir."""
    stored = result | {"control": control, "selection": [{str(l): w for l, w in s.items()} for s in selection]}
    part = out_dir / ".probe.json.part"
    part.write_text(json.dumps(stored, indent=1))
    part.replace(out_dir / "probe.json")
    figure(result, control, out_dir / "probe.png")


def main(args: ProbeArgs) -> None:
    state, used = checkpoint.load(args.ckpt)
    model, run = load_model(state), state["config"]
    dataset = Dataset(args.data_dir or run["data_dir"], args.split)
    batch = fixed_batch(dataset, args.clips, args.seed, args.frames)
    result = probe(model, batch, args.times, run["sigma"], args.seed)
    control = control_scores(model, batch, args.times, run["sigma"], args.seed) if args.control else None
    selection = state["selection"]
    out_dir = Path(args.out_dir or used.parent)
    out_dir.mkdir(parents=True, exist_ok=True)
    report(out_dir, result, control, selection)
    print(f"{used}, step {state['step']}; t on {args.times} points; * aligned in training")
    print(table(result, control, selection))
    forwards = (len(model.blocks) + 1) / 2 * args.times
    print(
        f"FoG-A of {len(model.blocks)} layers: {result['foga_seconds']:.1f} s, "
        f"the work of {forwards:.0f} forward passes"
    )
    print(f"wrote {out_dir / 'probe.json'} and {out_dir / 'probe.png'}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except (checkpoint.CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"probe.py: {error}")
