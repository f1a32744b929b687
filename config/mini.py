# 24 layers as in the paper's tables, so narrow that a run takes minutes on two cores: what runs/table2.sh compares.
# Not a system to listen to.
from pathlib import Path

exec(Path(__file__).with_name("demo.py").read_text())
out_dir = "out/mini"
n_layer = 24
n_head = 2
n_embd = 64
batch_frames = 3072
crop_frames = 195
max_steps = 260
phase1_steps = 105
probe_every = 35
probe_clips = 8
probe_frames = 200
eval_every = 100
save_every = 1000
nfe = 8
eval_seeds = 2
max_clips = 24
