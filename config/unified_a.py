# Config A of the paper: one token stream, S3 for speech and AST for audio; 24 layers, LibriSpeech + AudioSet.
# Needs --speech_dir (LibriSpeech), --audio_dir (AudioSet clips) and BEATs' weights; all else is the default.
out_dir = "out/unified_a"
data_dir = "data/unified_a"
beats_tokens = False
