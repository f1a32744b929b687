# The demo's data and schedule on F5-TTS's published DiT (see backbones.py); any other backbone by --backbone.
from pathlib import Path

exec(Path(__file__).with_name("demo.py").read_text())
out_dir = "out/f5tts_demo"
backbone = "f5tts"
optimizer = "adamw"
learning_rate = 1e-3
phase1_steps = 100
