#!/usr/bin/env bash
# The paper's tables 8 to 12, and targets that it does not have: what AG-REPA depends on, from the phase I that
# runs/table2.sh ran for each seed.
#
#   bash runs/ablations.sh [config] [seeds] [--key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh
config=${1:-config/demo.py} seeds=${2:-1}
shift $(($# < 2 ? $# : 2))
depth=$(setting n_layer "$config" "$@")
out=out/ablations static=$(scaled "$depth" 4 8 12)

for seed in $(seq 0 $((seeds - 1))); do
  row() { # name options: one row of this seed
    run "$out/$1_s$seed" "${options[@]}" --seed="$seed" --branch_from="out/table2/none_s$seed/phase1.pt" "${@:2}"
  }
  options=("$@")
  row refresh --refresh_epochs=1                                                        # table 8
  row adaptive --timestep_adaptive=true                                                 # table 9
  for k in 1 2 3 4 5; do row K$k --top_k=$k; done                                       # table 10
  row equal --weighting=equal
  row paper "${paper[@]}"
  row conv1d --align_head=conv1d                                                        # table 11
  row conv2d --align_head=conv2d
  row self_static --align_teacher=self --align=fixed --align_layers="$static"           # table 12
  row self_foga --align_teacher=self
  row static --align=fixed --align_layers="$static"
  row crop --align_target=crop                                                          # targets and other methods
  row frames --align_target=frames
  row irepa --align_target=frames --align_norm=zscore --align_head=conv1d
  row layersync --align_teacher=self --align_target=frames --align_head=none
  row sra --align_teacher=ema --align_target=frames
  row taro --t_weight=taro
  row dispersive --dispersive=0.5 --align_weight=0
  row adma --align=fixed --align_layers="$(scaled "$depth" 16)" --align_target=frames --ctc_weight=0.1
  for w in 0.02 0.1 2; do                                                               # the effect of the budget
    row budget$w --align_weight=$w
    row shuffled$w --align_weight=$w --align_target=shuffled
  done
done
wait_all
python evaluate.py --compare $out/*_s*/ out/table2/none_s*/
