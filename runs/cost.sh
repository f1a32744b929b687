#!/usr/bin/env bash
# The paper's table 6: what probing and heads cost, and how soon each run reaches the FAD that no alignment ends at.
#
#   bash runs/cost.sh [config] [--key=value ...]      needs phase I of runs/table2.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh
config=${1:-config/demo.py}
shift $(($# < 1 ? $# : 1))
for rule in none lasp foga; do
  run "out/cost/${rule}_s0" --evaluate_every=100 "$@" --branch_from=out/table2/none_s0/phase1.pt --align=$rule
done
wait_all
python probe.py --ckpt=out/cost/foga_s0/ckpt.pt --control=false --out_dir=out/cost | tail -2 # of it: what probes took
python evaluate.py --compare out/cost/*_s*/
