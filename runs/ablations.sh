#!/usr/bin/env bash
# The paper's tables 8 to 12: what AG-REPA depends on, from the phase I that runs/table2.sh ran for each seed.
#
#   bash runs/ablations.sh [config] [seeds] [--key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh
config=${1:-config/demo.py} seeds=${2:-1}
shift $(($# < 2 ? $# : 2))
out=out/ablations

for seed in $(seq 0 $((seeds - 1))); do
  from=(--seed="$seed" --branch_from="out/table2/none_s$seed/phase1.pt")
  for k in 1 2 3 4 5; do
    run "$out/K${k}_s$seed" "$@" "${from[@]}" --top_k=$k
  done
  run "$out/equal_s$seed" "$@" "${from[@]}" --weighting=equal
  run "$out/paper_s$seed" "$@" "${from[@]}" "${paper[@]}"
  run "$out/conv1d_s$seed" "$@" "${from[@]}" --align_head=conv1d
  run "$out/conv2d_s$seed" "$@" "${from[@]}" --align_head=conv2d
  run "$out/self_foga_s$seed" "$@" "${from[@]}" --align_teacher=self
  run "$out/self_shallow_s$seed" "$@" "${from[@]}" --align_teacher=self --align=fixed --align_layers=1,2,3
  run "$out/refresh_s$seed" "$@" "${from[@]}" --refresh_every=100
  run "$out/adaptive_s$seed" "$@" "${from[@]}" --timestep_adaptive=true
done
python evaluate.py --compare $out/*_s*/ out/table2/none_s*/
