# What the scripts beside this share: one training run, once.

run() { # folder options of train.py ...
  if [ -f "$1/finished" ]; then
    echo "== $1 is finished"
    return
  fi
  echo "== $1"
  python train.py "$config" --out_dir="$1" "${@:2}"
  test -f "$1/eval.json" # without its evaluation a run is not finished, and the same command makes up for it
  touch "$1/finished"
}
