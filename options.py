"""Settings that sample.py and evaluate.py share, in a file that loads no torch, so that both refuse a typo at once."""

from dataclasses import dataclass
from typing import Literal

from configurator import Count, Natural


@dataclass
class SynthesisArgs:
    """How a checkpoint makes waveforms; an empty or None value is the one the model was trained with."""

    ckpt: str = "out/demo/ckpt.pt"  # a checkpoint of train.py
    data_dir: str = ""  # prepared data; empty: what the checkpoint was trained on
    lm: str = ""  # a checkpoint of lm.py, which writes tokens from text
    nfe: Count | None = None  # velocity evaluations per clip
    cfg_scale: float | None = None  # guidance scale; 1 is none
    sway: float | None = None  # sway sampling coefficient
    epss: bool = False  # F5-TTS's schedule for few steps, for nfe 5, 6, 7, 10, 12 or 16
    method: Literal["euler", "midpoint"] = "euler"  # integrator; midpoint spends two evaluations a step
    vocoder: str = ""  # hub name or folder of a Vocos, or griffin_lim
    seed: Natural = 0  # seeds tokens and noise
    device: str = "auto"  # auto | cpu | cuda | mps
