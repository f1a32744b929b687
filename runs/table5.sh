#!/usr/bin/env bash
# Tables 4 and 5 of the paper on a small scale: each published backbone without alignment, with layers 1-3 aligned, and
# with AG-REPA, at one budget and with the paper's own lambda, all from the same phase I; then one table a backbone.
#
#     bash runs/table5.sh [config] [backbones] [options of train.py ...]
#     bash runs/table5.sh config/f5tts_demo.py "f5tts voicebox" --max_steps=600 --phase1_steps=200
#
# Finished runs are skipped; an interrupted one is continued when the same command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh
config=${1:-config/f5tts_demo.py}
names=${2:-f5tts voicebox cosyvoice matcha}
shift $(($# < 2 ? $# : 2))

for b in $names; do
  run "out/table5/$b/none_s0" "$@" --backbone="$b" --align=none
  from=--branch_from=out/table5/$b/none_s0/phase1.pt
  run "out/table5/$b/shallow_s0" "$@" "$from" --backbone="$b" --align=fixed --align_layers=1,2,3
  run "out/table5/$b/agrepa_s0" "$@" "$from" --backbone="$b" --align=foga
  run "out/table5/$b/paper_s0" "$@" "$from" --backbone="$b" --align=foga "${paper[@]}"
  python evaluate.py --compare out/table5/"$b"/*_s0/
done
