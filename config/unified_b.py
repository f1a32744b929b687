# Config B of the paper: S3 or AST tokens interleaved 1:1 with BEATs tokens; 24 layers, LibriSpeech + AudioSet.
# Needs corpora (librispeech_dir, audioset_dir) and weights, which the command lists; all else is the default.
out_dir = "out/unified_b"
data_dir = "data/unified_b"
beats_tokens = True
