#!/usr/bin/env bash
# Everything that a GPU is to show, in about 25 minutes, as one table: out/gpu.md. No data but the demo's, no internet.
#
#   bash runs/gpu.sh [part ...] [--dry] [--key=value ...]      --dry: each part at a tiny size, on any machine
#
# Parts, of at most 9 minutes each: machine (what bounds a step) attention (by kernel) step (and where it waits) compiled
# shapes (batches of real lengths) peer (F5-TTS) agrepa foga sampling memory tests demo (a stop and a resume).
# Options go to bench.py and, in demo, to train.py. A part's own table stays in out/gpu/, so parts can be run on other days.
set -uo pipefail
cd "$(dirname "$0")/.."
parts=() options=() dry=
for word in "$@"; do
  case $word in
    --dry) dry=yes ;;
    --*) options+=("$word") ;;
    *) parts+=("$word") ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(machine attention step compiled shapes peer agrepa foga sampling memory tests demo)
folder=out/gpu size=(--frames=38400 --clip_frames=937 --dtype=bfloat16) demo=(config/demo.py --out_dir=out/gpu/demo)
demo+=(--evaluate=false)
if [ "$dry" ]; then
  folder=out/gpu_dry
  size=(--frames=256 --clip_frames=64 --n_layer=3 --n_embd=64 --n_head=2 --runs=1 --device=cpu --dtype=float32)
  demo=(config/demo.py --out_dir=$folder/demo --evaluate=false --device=cpu --n_layer=3 --n_embd=64 --n_head=2)
  demo+=(--batch_frames=800 --crop_frames=96 --max_steps=200 --phase1_steps=4 --probe_every=2 --eval_clips=1 --log_every=1)
fi
mkdir -p $folder

cell() { # what number unit: a row that bench.py did not write
  printf 'measured by runs/gpu.sh\n\n| what | number | unit |\n| - | - | - |\n| %s | %s | %s |\n' "$@" >"$folder/$part.md"
  echo "$1: $2 $3"
}

bench() { # row [options]: one of bench.py's
  timeout 540 python bench.py config/unified_b.py "${size[@]}" --only="$1" --out="$folder/$part.md" "${@:2}" "${options[@]}"
}

rows() { # row [options]: one of those below, which only a GPU needs
  timeout 540 python - config/unified_b.py "${size[@]}" --only="$1" --out="$folder/$part.md" "${@:2}" "${options[@]}" <<'PY'
import itertools
import statistics
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
import common
from configurator import configure
from data import LengthBatchSampler
from model import flops_per_frame

# dense bfloat16 peak in FLOP/s, by a part of the GPU's name (the makers' data sheets)
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}
PEAK |= {"L40S": 362e12, "L40": 181e12, "4090": 165e12}


def rate(b, amount, work, calls=10):
    """1e12 of `amount` a second."""
    return calls * amount / b.seconds(lambda: [work() for _ in range(calls)]) / 1e12


def noise(b, *shape):
    dtype = torch.bfloat16 if common.takes_bfloat16(b.device, b.args.dtype) else torch.float32
    return torch.randn(*shape, device=b.device, dtype=dtype)


def machine(b):
    """Copies, and the products of a block's matrices: forward, and for the gradients of both factors."""
    D, W, M = b.args.n_embd, b.args.ff_mult * b.args.n_embd, b.B * b.T
    x = noise(b, 2**20, b.T)
    yield f"copy of {x.nbytes / 1e9:.2g} GB, read and written", partial(rate, b, 2 * x.nbytes, x.clone), "TB/s"
    for name, K, N in (("qkv", D, 3 * D), ("attn_out", D, D), ("ff_in", D, W), ("ff_out", W, D)):
        x, w, g = noise(b, M, K), noise(b, N, K), noise(b, M, N)
        work = partial(lambda x, w, g: (x @ w.T, g @ w, g.T @ x), x, w, g)
        yield f"{name}, {M} x {K} x {N}, with its gradients", partial(rate, b, 6 * M * K * N, work), "TFLOP/s"


def attention(b):
    """Forward and backward by each kernel, whole and padded; then what a length costs that it has not seen."""
    B, H, d, lengths = b.B, b.args.n_head, b.args.n_embd // b.args.n_head, itertools.count(b.T + 1)

    def both(backend, qkv, mask=None):
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
            torch.autograd.grad(y, qkv, y.detach())

    def given(T):
        return [noise(b, B, H, T, d).requires_grad_() for _ in range(3)]

    def fresh(backend):
        qkv = given(next(lengths))
        first = b.seconds(partial(both, backend, qkv))
        return 1000 * (first - b.seconds(partial(both, backend, qkv)))

    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for name, T in itertools.product(names, (b.T, b.T // 16 * 16)):
        mask = (torch.arange(T, device=b.device) < T - T // 8).expand(B, 1, 1, T)
        for kind, m in (("", None), (", padded", mask)):
            work = partial(both, getattr(SDPBackend, name), given(T), m)
            yield f"attention {B} x {T}{kind}, {name}", partial(rate, b, 14 * B * H * T * T * d, work), "TFLOP/s"
    for name in names[:2]:
        yield f"a length not seen before costs {name}", partial(fresh, getattr(SDPBackend, name)), "ms"


def waits(b, work):
    """How often a step has the host wait for the GPU; prints where."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]
    print("waits at", *(sorted(set(places)) or ["no line"]))
    return float(len(places))


def busy(b, work):
    """Percent of the time from a step's first kernel to its last in which the GPU computes or copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        b.seconds(work)
    spans = [e.time_range for e in profile.events() if e.device_type.name == "CUDA"]
    return 100 * sum(s.end - s.start for s in spans) / (max(s.end for s in spans) - min(s.start for s in spans))


def fullest(b, run):
    """GiB of a GPU at the fullest moment of a step."""
    torch.cuda.reset_peak_memory_stats()
    b.step(run, b.batch(b.B, b.T))
    return torch.cuda.max_memory_allocated() / 2**30


def step(b):
    """bench.py's rows of a step, its MFU on a GPU that PEAK knows, its time and memory, and where it waits."""
    yield from bench.step_row(b)
    run = b.run()
    work, flops = partial(b.step, run, b.batch(b.B, b.T)), b.B * b.T * flops_per_frame(run.objective.model, b.T)
    peak = next((p for name, p in PEAK.items() if name in b.device_name), None)
    if peak and common.takes_bfloat16(b.device, b.args.dtype):
        what = f"MFU at {b.T} frames a clip (bfloat16 peak of the data sheet)"
        yield what, lambda: 100 * flops / b.seconds(work) / peak, "%"
    yield "time of a step", lambda: 1000 * b.seconds(work), "ms"
    if b.device.startswith("cuda"):
        yield "peak memory of a step", partial(fullest, b, run), "GiB"
        yield "waits of the host in a step", partial(waits, b, work), ""
        yield "busy share of a step", partial(busy, b, work), "%"


def memory(b):
    """bench.py's rows of what is kept for backward, and the peaks of those steps."""
    yield from bench.memory_row(b)
    for again, note in ((False, ""), (True, ", checkpoint_activations")):
        if b.device.startswith("cuda"):
            run = b.run(checkpoint_activations=again)
            yield f"peak of a step of {b.B * b.T} frames{note}", partial(fullest, b, run), "GiB"


def shapes(b):
    """Batches of lengths as LibriSpeech has them, where 10 s are clip_frames; the first hundred steps do not count."""
    rng, run, turn = np.random.default_rng(0), b.run(), itertools.count()
    seconds = np.concatenate([rng.normal(14, 1.5, 20000), rng.uniform(2, 16, 10000)]).clip(1.5, 17)
    config = replace(b.args, batch_frames=b.args.frames)
    sampler = LengthBatchSampler(seconds / 10 * b.T, config, "batch_frames", trim=config.trim)
    steps = 5 if b.device == "cpu" else 100

    def slowest():
        times = []
        for k in itertools.islice(turn, steps):
            taken = sampler.taken(sampler.ids(k))
            batch = b.batch(len(taken), int(taken.max()))
            times.append(b.seconds(partial(b.step, run, batch), of=float(taken.sum())))
        return max(times) / statistics.median(times)

    yield f"slowest of {steps} steps on real lengths, by frame, over their median", slowest, "times"


bench.ROWS = {row.__name__: row for row in (machine, attention, step, memory, shapes)}
bench.main(configure(bench.BenchArgs, ""))
PY
}

tests() { # those marked gpu, and those of fake tensors
  local marks="gpu or not slow" said
  said=$(timeout 540 python -m pytest -q -m "$marks" tests/test_gpu.py 2>&1 | tee /dev/stderr | tail -1)
  cell "tests/test_gpu.py" "$said" ""
}

demo() { # trained until a signal stops it, then to its end
  local start=$SECONDS code pid
  rm -rf "$folder/demo"
  timeout 540 python train.py "${demo[@]}" "${options[@]}" &
  pid=$!
  until grep -q '^1[0-9],' "$folder/demo/log.csv" 2>/dev/null || ! kill -0 $pid 2>/dev/null; do sleep 0.2; done
  kill -TERM $pid 2>/dev/null
  wait $pid
  code=$?
  [ $code = 75 ] || { cell "the demo" "not measured: train.py ended with $code before it was stopped" ""; return; }
  timeout $((540 - SECONDS + start)) python train.py "${demo[@]}" "${options[@]}"
  code=$?
  [ $code = 0 ] || { cell "the demo, continued" "not measured: train.py ended with $code" ""; return; }
  cell "the demo with a stop and a resume, last row of log.csv: $(tail -1 "$folder/demo/log.csv" | tr ',' ' ')" \
    "$((SECONDS - start))" s
}

for part in "${parts[@]}"; do
  echo "== $part"
  began=$SECONDS
  rm -f "$folder/$part.md"
  case $part in
    machine | attention | step | memory | shapes) rows $part ;;
    compiled) rows step --compile=true ;;
    peer | foga | sampling) bench ${part}_row ;;
    agrepa) bench align_layers ;;
    tests | demo) $part ;;
    *) echo "no part $part" >&2; exit 2 ;;
  esac
  code=$?
  [ -e "$folder/$part.md" ] || cell "$part" "not measured: it ended with $code after $((SECONDS - began)) s" ""
done

# one table: the device once, then every part's rows
{
  head -qn 1 $folder/*.md | grep -v '^measured by' | head -1
  printf '\n| part | what | number | unit |\n| - | - | - | - |\n'
  for part in machine attention step compiled shapes peer agrepa foga sampling memory tests demo; do
    [ ! -e "$folder/$part.md" ] || sed -n '/^| what/d; /^| -/d; s/^|/| '$part' |/p' "$folder/$part.md"
  done
} >"$folder.md"
echo "$folder.md"
