#!/usr/bin/env bash
# The paper's tables 2 and 3: every selection strategy from one phase I per seed, then the comparison.
#
#   bash runs/table2.sh [config] [seeds] [--key=value ...]      e.g. bash runs/table2.sh config/demo.py 3
#
# All rules share one budget (runs/common.sh); `paper` is AG-REPA with the paper's own lambda, 2 A_l.
# Finished runs are skipped and interrupted ones continue, so the same command resumes after Ctrl-C. Layer numbers are
# the paper's, scaled by depth.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh
config=${1:-config/demo.py} seeds=${2:-1}
shift $(($# < 2 ? $# : 2))
out=out/table2

depth=$(python - "$config" "$@" <<'PY'
import sys
from configurator import configure
from train import Config
print(configure(Config, "", sys.argv[1:]).n_layer)
PY
)
scaled() { # the paper's layers of 24 at this config's depth, each once
  python - "$depth" "$@" <<'PY'
import sys
depth, *layers = map(int, sys.argv[1:])
print(",".join(dict.fromkeys(str(max(1, round(l * depth / 24))) for l in layers)))
PY
}

for seed in $(seq 0 $((seeds - 1))); do
  run "$out/none_s$seed" "$@" --seed="$seed" --align=none
  from=--branch_from=$out/none_s$seed/phase1.pt
  run "$out/L4_s$seed" "$@" --seed="$seed" "$from" --align=fixed --align_layers="$(scaled 4)"
  run "$out/L8_s$seed" "$@" --seed="$seed" "$from" --align=fixed --align_layers="$(scaled 8)"
  run "$out/L12_s$seed" "$@" --seed="$seed" "$from" --align=fixed --align_layers="$(scaled 12)"
  run "$out/L4_8_12_s$seed" "$@" --seed="$seed" "$from" --align=fixed --align_layers="$(scaled 4 8 12)"
  run "$out/deep_s$seed" "$@" --seed="$seed" "$from" --align=fixed --align_layers="$(scaled 20 21 22)"
  run "$out/shallow_s$seed" "$@" --seed="$seed" "$from" --align=fixed --align_layers="$(scaled 1 2 3)"
  run "$out/random_s$seed" "$@" --seed="$seed" "$from" --align=random
  run "$out/lasp_s$seed" "$@" --seed="$seed" "$from" --align=lasp
  run "$out/gradnorm_s$seed" "$@" --seed="$seed" "$from" --align=gradnorm
  run "$out/agrepa_s$seed" "$@" --seed="$seed" "$from" --align=foga
  run "$out/paper_s$seed" "$@" --seed="$seed" "$from" --align=foga "${paper[@]}"
done
python evaluate.py --compare $out/*_s*/
