# The demo's own vocoder: a small Vocos on the demo's recordings, under 15 minutes on two CPU cores.
# Needs the prepared data of config/demo.py.
out_dir = "out/vocoder_demo"
data_dir = "data/demo"
dim = 256
n_layer = 6
max_steps = 2500
batch_size = 8
crop_frames = 64
learning_rate = 1e-3
