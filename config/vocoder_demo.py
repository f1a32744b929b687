# The demo's own vocoder: a small Vocos on the demo's recordings, under 15 minutes on two CPU cores.
# Needs the prepared data of config/demo.py.
out_dir = "out/vocoder_demo"
data_dir = "data/demo"
dim = 384
max_steps = 4200
learning_rate = 1e-3
