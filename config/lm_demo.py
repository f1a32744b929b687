# Stage 1 of the demo: a small Qwen3 from scratch on the demo's texts and tokens, minutes on two CPU cores.
# Needs the prepared data of config/demo.py.
out_dir = "out/lm_demo"
data_dir = "data/demo"
lm = "small"
dropout = 0.1
style_drop = 0.5  # it is mostly used without a reference
code_noise = 0.1
max_steps = 1200
batch_tokens = 4096
learning_rate = 1e-3
lr_warmup = 0.1
weight_decay = 0.1
eval_every = 200
eval_clips = 24
save_every = 400
