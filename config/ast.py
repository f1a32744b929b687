# The AST of the paper: 4096 codes of 1024 dimensions on BEATs' 768-dimensional features.
# Needs --features_from (AudioSet's folder, or any folder of sounds) and --audio_teacher; all else is the default.
out_dir = "out/ast"
