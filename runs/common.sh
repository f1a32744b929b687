# What the scripts beside this share: one training run, once.

budget=(--weighting=normalized --align_weight=0.5) # one budget for all rules: what a domain's weights sum to
paper=(--weighting=paper --align_weight=2)         # the paper's own lambda, 2 A_l, a row of its own

run() { # folder options of train.py ...
  if [ -f "$1/finished" ]; then
    echo "== $1 is finished"
    return
  fi
  echo "== $1"
  python train.py "$config" --out_dir="$1" "${budget[@]}" "${@:2}"
  if [ "$1/eval.json" -nt "$1/model.safetensors" ]; then
    touch "$1/finished"
  else
    echo "== $1 was trained but not evaluated; the same command makes up for it"
  fi
}
