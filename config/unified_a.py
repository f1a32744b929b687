# Config A of the paper: one token stream, S3 for speech and AST for audio; 24 layers, LibriSpeech + AudioSet.
# Needs corpora (librispeech_dir, audioset_dir) and weights, which the command lists; all else is the default.
out_dir = "out/unified_a"
data_dir = "data/unified_a"
beats_tokens = False
