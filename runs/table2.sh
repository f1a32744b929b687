#!/usr/bin/env bash
# The paper's tables 2 and 3: every selection rule from one phase I per seed, then the comparison.
#
#   bash runs/table2.sh [config] [seeds] [--key=value ...]      e.g. bash runs/table2.sh config/mini.py 3
#   JOBS=2 ROWS="none shuffled agrepa" bash runs/table2.sh ...  two runs at a time; these rows alone, none among them
#
# All rules share one budget (runs/common.sh). `shuffled` is AG-REPA towards the teacher vectors of other clips, a control;
# `excess` ranks what FoG-A has more than with random weights; `paper` is AG-REPA with the paper's own lambda, 2 A_l.
# Finished runs are skipped and interrupted ones continue, so the same command resumes after Ctrl-C. Layer numbers are
# the paper's, scaled by depth.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh
config=${1:-config/demo.py} seeds=${2:-1}
shift $(($# < 2 ? $# : 2))
out=${OUT:-out/table2} rows=${ROWS:-none shuffled L4 L8 L12 L4_8_12 deep shallow random lasp stores gradnorm agrepa excess paper}
depth=$(setting n_layer "$config" "$@")

rule() { # row: its options
  case $1 in
    shuffled) echo --align=foga --align_target=shuffled ;;
    L*) echo --align=fixed --align_layers="$(IFS=_; scaled "$depth" ${1#L})" ;;
    deep) echo --align=fixed --align_layers="$(scaled "$depth" 20 21 22)" ;;
    shallow) echo --align=fixed --align_layers="$(scaled "$depth" 1 2 3)" ;;
    random | lasp | stores | gradnorm) echo --align="$1" ;;
    agrepa) echo --align=foga ;;
    excess) echo --align=foga_excess ;;
    paper) echo --align=foga "${paper[@]}" ;;
  esac
}

for seed in $(seq 0 $((seeds - 1))); do
  run "$out/none_s$seed" "$@" --seed="$seed" --align=none
done
wait_all
for seed in $(seq 0 $((seeds - 1))); do
  for row in ${rows/none/}; do
    run "$out/${row}_s$seed" "$@" --seed="$seed" --branch_from="$out/none_s$seed/phase1.pt" $(rule "$row")
  done
done
wait_all
python evaluate.py --compare $out/*_s*/
