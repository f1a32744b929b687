# What the scripts beside this share: one training run, once.

budget=(--weighting=normalized --align_weight=0.5) # one budget for all rules: what a domain's weights sum to
paper=(--weighting=paper --align_weight=2)         # the paper's own lambda, 2 A_l, a row of its own
at_once=${JOBS:-1}                                 # runs at a time, each on its share of the cores
trap 'for job in $(jobs -p); do pkill -TERM -P "$job" || true; done; wait; exit 130' INT TERM

one() { # folder options of train.py ...
  if [ -f "$1/finished" ]; then
    echo "== $1 is finished"
    return
  fi
  echo "== $1"
  python train.py "$config" --out_dir="$1" "${budget[@]}" "${@:2}" --evaluate=false # without the last probes
  python evaluate.py --ckpt="$1/ckpt.pt"
  touch "$1/finished"
}

run() { # as one, beside others where JOBS allows it; `wait_all` after what later runs branch from
  if [ "$at_once" = 1 ]; then
    one "$@"
    return
  fi
  export OMP_NUM_THREADS=$((($(nproc) + at_once - 1) / at_once))
  while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n; done
  one "$@" &
}

wait_all() {
  while [ -n "$(jobs -rp)" ]; do wait -n; done
}

setting() { # key, then a config file and options of train.py: its value
  python - "$@" <<'PY'
import sys
from configurator import configure
from train import Config
print(getattr(configure(Config, "", sys.argv[2:]), sys.argv[1]))
PY
}

scaled() { # depth, then layers of the paper's 24: at this depth, each once
  python - "$@" <<'PY'
import sys
depth, *layers = map(int, sys.argv[1:])
print(",".join(dict.fromkeys(str(max(1, round(l * depth / 24))) for l in layers)))
PY
}
