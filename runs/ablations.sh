#!/usr/bin/env bash
# The paper's tables 8 to 12: what AG-REPA depends on, from the warm-ups that runs/table2.sh made.
#
#   bash runs/ablations.sh [config] [seeds] [--key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-config/demo.py} seeds=${2:-1}
shift $(($# < 2 ? $# : 2))
out=out/ablations

run() { # name seed options...
  local dir=$out/$1_s$2 seed=$2
  shift 2
  if [ -f "$dir/finished" ]; then
    echo "== $dir is finished"
    return
  fi
  echo "== $dir"
  python train.py "$config" --seed="$seed" --out_dir="$dir" --branch_from="out/table2/none_s$seed/warmup.pt" "$@"
  touch "$dir/finished"
}

for seed in $(seq 0 $((seeds - 1))); do
  for k in 1 2 3 4 5; do
    run "K$k" "$seed" "$@" --top_k=$k
  done
  run equal "$seed" "$@" --weighting=equal
  run normalized "$seed" "$@" --weighting=normalized
  run conv1d "$seed" "$@" --align_head=conv1d
  run conv2d "$seed" "$@" --align_head=conv2d
  run self_foga "$seed" "$@" --align_teacher=self
  run self_shallow "$seed" "$@" --align_teacher=self --align=fixed --align_layers=1,2,3
  run refresh "$seed" "$@" --refresh_every=100
  run adaptive "$seed" "$@" --timestep_adaptive=true
done
python evaluate.py --compare $out/*_s*/ out/table2/none_s*/
