#!/usr/bin/env bash
# The paper's tables 2 and 3: every selection strategy from one warm-up per seed, then the comparison.
#
#   bash runs/table2.sh [config] [seeds] [--key=value ...]      e.g. bash runs/table2.sh config/demo.py 3
#
# Finished runs are skipped and interrupted ones continue, so the same command resumes after Ctrl-C. Layer numbers are
# the paper's, scaled by depth.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-config/demo.py} seeds=${2:-1}
shift $(($# < 2 ? $# : 2))
out=out/table2

scaled() { # the paper's layers of 24 at this config's depth, each once
  python - "$config" "$@" <<'PY'
import sys
from configurator import Config, configure
words = [w for w in sys.argv[2:] if not w.startswith("--")]
depth = configure(Config, "", [sys.argv[1], *(w for w in sys.argv[2:] if w.startswith("--"))]).n_layer
print(",".join(dict.fromkeys(str(max(1, round(int(w) * depth / 24))) for w in words)))
PY
}

run() { # name seed options...
  local dir=$out/$1_s$2 seed=$2
  shift 2
  if [ -f "$dir/finished" ]; then
    echo "== $dir is finished"
    return
  fi
  echo "== $dir"
  python train.py "$config" --seed="$seed" --out_dir="$dir" "$@"
  touch "$dir/finished"
}

for seed in $(seq 0 $((seeds - 1))); do
  run none "$seed" "$@" --align=none
  from=--branch_from=$out/none_s$seed/warmup.pt
  run L4 "$seed" "$@" "$from" --align=fixed --align_layers="$(scaled 4 "$@")"
  run L8 "$seed" "$@" "$from" --align=fixed --align_layers="$(scaled 8 "$@")"
  run L12 "$seed" "$@" "$from" --align=fixed --align_layers="$(scaled 12 "$@")"
  run L4_8_12 "$seed" "$@" "$from" --align=fixed --align_layers="$(scaled 4 8 12 "$@")"
  run deep "$seed" "$@" "$from" --align=fixed --align_layers="$(scaled 20 21 22 "$@")"
  run shallow "$seed" "$@" "$from" --align=fixed --align_layers="$(scaled 1 2 3 "$@")"
  run random "$seed" "$@" "$from" --align=random
  run lasp "$seed" "$@" "$from" --align=lasp
  run gradnorm "$seed" "$@" "$from" --align=gradnorm
  run agrepa "$seed" "$@" "$from" --align=foga
done
python evaluate.py --compare $out/*_s*/
