# Stage 1 of the paper: Qwen3-0.6B-Base on the tokens of config A. Needs the prepared data of config/unified_a.py and
# the LM from the hub or a folder (--lm=FOLDER); all else is the default.
out_dir = "out/lm_unified"
data_dir = "data/unified_a"
