#!/usr/bin/env bash
# The paper's table 7: FoG-A's ranking after phase I, in the middle of training and at its end.
#
#   bash runs/stability.sh [config] [--key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh
config=${1:-config/demo.py}
shift $(($# < 1 ? $# : 1))
steps=$(setting max_steps "$config" "$@")
run out/stability --keep_every=$((steps / 2)) "$@"
wait_all
python probe.py --ckpt out/stability/phase1.pt out/stability/ckpt_"$(printf %06d $((steps / 2)))".pt out/stability/ckpt.pt
