"""A small Vocos of one's own: mel -> waveform, trained on a prepared corpus without any download.

    python vocoder.py config/vocoder_demo.py             # trains, then compares with Griffin-Lim on held-out recordings
    python sample.py --vocoder out/vocoder_demo ...      # the folder is a Vocos like any other

Backbone and head are the vocos package's (ConvNeXt blocks, inverse STFT). There is no discriminator: the loss is the L1
distance of log-mels and, at several STFT sizes, spectral convergence and the L1 distance of log magnitudes (Yamamoto et
al., Parallel WaveGAN, eq. 4-6). It trains on the waveforms that preparation kept (reference_clips of each domain). A
stopped run continues when the same command is given again. out_dir holds config.yaml and pytorch_model.bin, ckpt.pt,
log.csv and comparison.json.

B crops, L samples, T frames, M mel bins, F frequencies.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import DOMAINS, configure, show


@dataclass
class VocoderArgs:
    """Settings of `python vocoder.py`."""

    out_dir: str = "out/vocoder"  # run directory; an unfinished run found there is continued
    data_dir: str = "data/demo"  # folder prepared by data.py
    seed: int = 0  # seeds weights and crops
    device: str = "auto"  # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto takes bfloat16 where the machine has it
    # model
    dim: int = 512  # width of the ConvNeXt blocks
    ff_mult: int = 3  # their inner width, as a multiple of dim
    n_layer: int = 8  # blocks
    # optimisation
    max_steps: int = 200_000  # optimiser steps
    batch_size: int = 16  # crops per step
    crop_frames: int = 64  # T of a crop
    learning_rate: float = 5e-4  # peak of the one-cycle schedule
    lr_warmup: float = 0.05  # share of max_steps on the way up
    weight_decay: float = 0.01  # on matrices
    beta2: float = 0.99  # AdamW; beta1 is 0.9
    grad_clip: float = 10.0  # largest gradient norm
    mel_weight: float = 2.0  # of the log-mel distance
    # reporting
    log_every: int = 50  # steps between rows of log.csv
    save_every: int = 500  # steps between checkpoints
    asr: str = "demo"  # recogniser of the comparison, as for evaluate.py
    fad_model: Literal["yamnet", "vggish", "aisfx", "whisper"] = "yamnet"  # judge of the comparison

    ranges: ClassVar[dict] = {
        **dict.fromkeys(("lr_warmup", "beta2"), (0, 1)),
        **dict.fromkeys("dim ff_mult n_layer max_steps batch_size crop_frames log_every save_every".split(), (1, None)),
    }


if __name__ == "__main__":
    ARGS = configure(VocoderArgs, __doc__)  # a typo is answered before torch is imported

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import audio
import checkpoint
import fetch
import judges
from corpora import DataError
from evaluate import load_recogniser, read_waves, score, vocoded
from loop import Finite, Log, make_optimiser, same_data, time_left, update
from model import count_parameters, pick_device, precision
from shards import Dataset, first_of_each_domain, identity, write_json

STFT_SIZES = (512, 1024, 2048)  # each with a hop of a quarter
MAY_DIFFER = "out_dir data_dir device dtype log_every save_every asr fad_model".split()
COLUMNS = ("step", "loss", "mel", "convergence", "magnitude", "grad_norm", "lr", "seconds")
YAML = """feature_extractor:
  class_path: vocos.feature_extractors.MelSpectrogramFeatures
  init_args: {{sample_rate: {rate}, n_fft: {n_fft}, hop_length: {hop}, n_mels: {mels}, padding: center}}
backbone:
  class_path: vocos.models.VocosBackbone
  init_args: {{input_channels: {mels}, dim: {dim}, intermediate_dim: {inner}, num_layers: {layers}}}
head:
  class_path: vocos.heads.ISTFTHead
  init_args: {{dim: {dim}, n_fft: {n_fft}, hop_length: {hop}, padding: center}}
"""


def hparams(args: VocoderArgs) -> str:
    """config.yaml of a Vocos of this size."""
    return YAML.format(
        rate=audio.SAMPLE_RATE, n_fft=audio.N_FFT, hop=audio.HOP, mels=audio.N_MELS,
        dim=args.dim, inner=args.ff_mult * args.dim, layers=args.n_layer,
    )  # fmt: skip


def magnitudes(wav: torch.Tensor, n_fft: int) -> torch.Tensor:
    """(B, L) -> STFT magnitudes (B, F, frames), differentiable at silence."""
    window = torch.hann_window(n_fft, device=wav.device)
    spec = torch.stft(wav, n_fft, n_fft // 4, n_fft, window, return_complex=True)
    return (spec.real.square() + spec.imag.square() + 1e-8).sqrt()


def spectral_losses(wav: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Distances of waveforms (B, L), each the mean over STFT_SIZES: spectral convergence || |S| - |S'| || / || |S| ||
    of each crop, and the mean of | log |S| - log |S'| |; and the same of log-mels, floored at log 1e-5."""
    convergence = magnitude = wav.new_zeros(())
    for n_fft in STFT_SIZES:
        a, b = magnitudes(wav, n_fft), magnitudes(target, n_fft)
        convergence = convergence + ((a - b).norm(dim=(1, 2)) / b.norm(dim=(1, 2))).mean() / len(STFT_SIZES)
        magnitude = magnitude + (a.log() - b.log()).abs().mean() / len(STFT_SIZES)
    floor = math.log(1e-5)
    mel = (audio.log_mel(wav).clamp_min(floor) - audio.log_mel(target).clamp_min(floor)).abs().mean()
    return {"mel": mel, "convergence": convergence, "magnitude": magnitude}


def draw_crops(waves: list[np.ndarray], args: VocoderArgs, step: int) -> tuple[torch.Tensor, list[int]]:
    """The crops (B, L) of a step, each clip as likely as it is long, at a gain of -12 to 0 dB of full scale; and which
    of `waves` they are from."""
    rng = np.random.default_rng([args.seed, step])
    length, lengths = (args.crop_frames - 1) * audio.HOP, np.array([len(w) for w in waves])
    out = np.zeros((args.batch_size, length), np.float32)
    chosen = rng.choice(len(waves), args.batch_size, p=lengths / lengths.sum()).tolist()
    for b, i in enumerate(chosen):
        start = rng.integers(0, max(1, lengths[i] - length + 1))
        crop = waves[i][start : start + length]
        peak = max(1e-3, np.abs(crop).max())
        out[b, : len(crop)] = crop * 10 ** rng.uniform(-12 / 20, 0) / peak
    return torch.from_numpy(out), chosen


def build(args: VocoderArgs, folder: Path) -> nn.Module:
    """A Vocos with fresh weights; its config.yaml is written to `folder`."""
    audio.torchaudio()
    from vocos import Vocos

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(hparams(args))
    torch.manual_seed(args.seed)
    return Vocos.from_hparams(str(folder / "config.yaml"))


def train_step(vocos: nn.Module, optimiser, target: torch.Tensor, args: VocoderArgs, step: int) -> dict[str, float]:
    """One optimiser step on crops (B, L); returns losses, gradient norm and learning rate."""
    with precision(str(target.device), args.dtype):
        features = vocos.backbone(audio.log_mel(target).transpose(1, 2))  # (B, T, dim)
    losses = spectral_losses(vocos.head(features.float()), target)
    loss = args.mel_weight * losses["mel"] + losses["convergence"] + losses["magnitude"]
    loss.backward()
    moved = update(vocos, optimiser, step, args)
    return {name: value.item() for name, value in losses.items()} | moved | {"loss": loss.item()}


def stopped_run(args: VocoderArgs, data: str) -> dict | None:
    """What out_dir's checkpoint holds, if there is one. Raises CheckpointError for other settings or other data."""
    path = Path(args.out_dir) / "ckpt.pt"
    if not checkpoint.exists(path):
        return None
    state, used = checkpoint.load(path, set_aside=True)
    checkpoint.same_settings(args, state["config"], MAY_DIFFER, used)
    same_data(args, data, state, used)
    return state


def train(args: VocoderArgs) -> tuple[nn.Module, bool]:
    """The trained Vocos, and whether training came to its end."""
    device, out_dir = pick_device(args.device), Path(args.out_dir)
    dataset = Dataset(args.data_dir, "train")
    data, rows = identity(dataset.meta), np.array([i for i in range(len(dataset)) if dataset.wav_path(i).exists()])
    state, waves = stopped_run(args, data), read_waves(dataset, rows)
    checkpoint.sweep(out_dir)
    vocos = build(args, out_dir).to(device)  # after what refuses, because it writes config.yaml
    optimiser, step, seconds = make_optimiser(vocos, args), 0, 0.0
    if state:
        vocos.load_state_dict(state["model"]), optimiser.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]

    def save() -> None:
        weights = {"model": vocos.state_dict(), "optimiser": optimiser.state_dict()}
        about = {"config": asdict(args), "data": data, "step": step, "seconds": seconds}
        checkpoint.save(out_dir / "ckpt.pt", about | weights)

    print(show(args))
    minutes = sum(map(len, waves)) / audio.SAMPLE_RATE / 60
    print(f"{count_parameters(vocos) / 1e6:.1f} M parameters; {len(waves)} recordings, {minutes:.1f} min", flush=True)
    log, stop, since = Log(out_dir / "log.csv", COLUMNS, step), checkpoint.StopRequest(device), time.time()
    finite = Finite(save)
    while step < args.max_steps and not stop.agreed():
        target, chosen = draw_crops(waves, args, step)
        numbers = train_step(vocos, optimiser, target.to(device), args, step)
        step += 1
        finite.check(step, numbers["grad_norm"], rows[chosen].tolist())
        if step % args.log_every == 0 or step == args.max_steps:
            seconds, since = seconds + time.time() - since, time.time()
            log.row(step=step, seconds=seconds, **numbers)
            losses = "  ".join(f"{k} {numbers[k]:.3f}" for k in ("loss", "mel", "convergence", "magnitude"))
            left = time_left(seconds, step, args.max_steps)
            print(f"step {step:6d}/{args.max_steps}  {losses}  left {left}", flush=True)
        if step % args.save_every == 0:
            save()
    save()
    return vocos, step == args.max_steps


def compare(args: VocoderArgs, n: int = 200) -> dict:
    """WER and FAD of held-out recordings, as they are and through each vocoder from their own mel."""
    device = pick_device(args.device)
    held, reference = Dataset(args.data_dir, "held_out"), Dataset(args.data_dir, "train")
    ids, floor = first_of_each_domain(held, n), held.meta["prepared_with"]["mel_floor"]
    waves = {"original": read_waves(held, ids)}
    for name in ("griffin_lim", args.out_dir):
        start = time.time()
        waves[name] = vocoded(held, ids, audio.load_vocoder(name, device), floor)
        print(f"{name}: {(time.time() - start) / (sum(map(len, waves[name])) / audio.SAMPLE_RATE):.3f} of real time")
    judge, recogniser = judges.load_judge(args.fad_model, "", device), load_recogniser(args.asr, device)
    wer, fad = score(waves, held, ids, reference, recogniser, judge)
    return {"wer": wer, "fad": {"model": args.fad_model} | fad}


def table(result: dict, systems: list[str]) -> str:
    """compare()'s numbers as text, a column a system."""
    lines = [f"{'held-out recordings through':34s}" + "".join(f"{s[-18:]:>20s}" for s in systems)]
    wer = result["wer"]
    lines.append(f"{'speech WER %, n ' + str(wer['clips']):34s}" + "".join(f"{100 * wer[s]:20.1f}" for s in systems))
    for name in DOMAINS:
        label, scores = f"{name} {result['fad']['model']}-FAD", result["fad"][name]
        lines.append(f"{label:34s}" + "".join(f"{scores[s]:20.2f}" for s in systems))
    return "\n".join(lines)


def main(args: VocoderArgs) -> int:
    out_dir = Path(args.out_dir)
    vocos, finished = train(args)
    if not finished:
        print(f"stopped, saved in {out_dir / 'ckpt.pt'}; the same command continues")
        return checkpoint.INTERRUPTED
    part = out_dir / ".pytorch_model.bin.part"
    torch.save(vocos.cpu().state_dict(), part)
    part.replace(out_dir / "pytorch_model.bin")
    result = compare(args)
    write_json(out_dir / "comparison.json", result)
    print(table(result, ["original", "griffin_lim", args.out_dir]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(ARGS))
    except (checkpoint.CheckpointError, DataError, fetch.FetchError, FloatingPointError, OSError, ValueError) as error:
        sys.exit(f"vocoder.py: {error}")
