#!/usr/bin/env bash
# Tables 4 and 5 of the paper on a small scale: each published backbone without alignment, with layers 1-3 aligned, with
# AG-REPA, with AG-REPA towards other clips' vectors, and with the paper's own lambda; one phase I a seed, one table each.
#
#     bash runs/table5.sh [config] [backbones] [seeds] [options of train.py ...]
#     bash runs/table5.sh config/f5tts_demo.py "f5tts voicebox" 3 --max_steps=600 --phase1_steps=200
#
# Finished runs are skipped; an interrupted one is continued when the same command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh
config=${1:-config/f5tts_demo.py} names=${2:-f5tts voicebox cosyvoice matcha} seeds=${3:-1}
shift $(($# < 3 ? $# : 3))

for b in $names; do
  out=out/table5/$b
  for seed in $(seq 0 $((seeds - 1))); do
    run "$out/none_s$seed" "$@" --backbone="$b" --seed="$seed" --align=none
  done
  wait_all
  for seed in $(seq 0 $((seeds - 1))); do
    from=(--backbone="$b" --seed="$seed" --branch_from="$out/none_s$seed/phase1.pt")
    run "$out/shallow_s$seed" "$@" "${from[@]}" --align=fixed --align_layers=1,2,3
    run "$out/shuffled_s$seed" "$@" "${from[@]}" --align=foga --align_target=shuffled
    run "$out/agrepa_s$seed" "$@" "${from[@]}" --align=foga
    run "$out/paper_s$seed" "$@" "${from[@]}" --align=foga "${paper[@]}"
  done
  wait_all
  python evaluate.py --compare "$out"/*_s*/
done
