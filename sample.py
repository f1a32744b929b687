"""Text or tokens -> mel -> waveform.

    python sample.py --lm out/lm_demo/ckpt.pt --ckpt out/demo/ckpt.pt --text "please enter your password"
    python sample.py --lm ... --event "dog barking" --describe "a small dog, twice" --reference dog.wav --out dog.wav
    python sample.py --lm ... --batch lines.txt --out_dir my/samples     # a line a clip; [event] description for sounds
    python sample.py --tokens_from clip.wav                              # resynthesise a recording from its tokens
    python sample.py --split held_out --n 4 --nfe 7 --epss               # resynthesise prepared clips

--ckpt is a model of train.py. Writes 24 kHz wav files and, beside each, a .json that says how it was made; prints the
real-time factor. A reference gives its style to stage 1 and the beginning of its mel to stage 2.
B clips, T frames, N tokens, M mel bins.
"""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

from configurator import Amount, Count, configure, from_dict
from options import SynthesisArgs


@dataclass
class SampleArgs(SynthesisArgs):
    """Settings of `python sample.py`: those of options.py, and:"""

    # what to make
    text: str = ""  # say this, or make the sound of "[event] description"
    event: str = ""  # make the sound of this
    describe: str = ""  # more about the event
    batch: str = ""  # a text file, a clip a line; a sound's line is "[event] description"
    tokens_from: str = ""  # a recording to make again from its tokens
    domain: Literal["speech", "audio"] = "speech"  # of tokens_from
    split: Literal["train", "held_out"] = "held_out"  # prepared clips to make again, when nothing else is asked for
    n: Count = 4  # of those, per domain
    out: str = ""  # the file, for one clip
    out_dir: str = ""  # the folder, for several; empty: samples/ beside the checkpoint
    # stage 1: text to tokens
    reference: str = ""  # a recording whose style is taken on
    temperature: Amount = 0.6  # of the tokens; 0 takes the likeliest
    top_p: Annotated[float, (1e-6, 1)] = 0.95  # draw from the likeliest tokens that together have this probability
    guidance: Amount = 1.0  # towards the reference's style; 1 is none
    repetition: Annotated[float, (1, None)] = 1.1  # divides the probability of the last 20 tokens
    max_seconds: Annotated[float, (0.1, None)] = 12.0  # longest clip


if __name__ == "__main__":
    ARGS = configure(SampleArgs, __doc__)  # a typo is answered before torch is imported

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import audio
import common
from backbones import load_model
from common import AUDIO, DOMAINS, SPEECH, command, pick_device, precision
from data import Batch, Dataset, crop_unit, first_of_each_domain
from lm import generate, load_lm
from model import FlowModel, sample, time_grid
from prepare import __main__ as preparation
from prepare import corpora
from train import Config

TEXTS = 16  # that stage 1 writes for as one batch


class Request(NamedTuple):
    """One clip to make in stage 2."""

    codes: np.ndarray  # (N, streams), the reference's first
    domain: int
    frames: int  # T, the reference's included
    prompt: np.ndarray = np.zeros((0, audio.N_MELS))  # (P, M) log-mel of the reference
    text: str = ""  # what it says, for models that read it


def open_run(args) -> tuple[dict, Path, Any, dict]:
    """The state of --ckpt, the run's folder, the command with that run's own settings where it leaves any open, and
    model.sample's options. Raises ValueError for options that cannot be, before anything else is loaded."""
    state, file = common.load(args.ckpt, needs=common.TRAINED)
    run = state["config"] = asdict(Config()) | state["config"]  # an older one may lack a setting
    own = {k: v for k, v in run.items() if k != "out_dir" and getattr(args, k, "no option") in ("", None)}
    args = replace(args, device=pick_device(args.device), **own)
    time_grid(args.nfe, args.sway, args.epss, args.method)
    options = {k: getattr(args, k) for k in "nfe cfg_scale sway method epss seed".split()} | {"sigma": run["sigma"]}
    return state, file.parent, args, options


def from_dataset(dataset: Dataset, ids: np.ndarray) -> list[Request]:
    """Prepared clips, to be made from their tokens alone, without reference."""
    rows = ((dataset.tokens(i), dataset.index[i], dataset.name_and_text(i)[1]) for i in ids.tolist())
    return [Request(codes, int(r["domain"]), int(r["frames"]), text=text) for codes, r, text in rows]


def to_batch(requests: Sequence[Request]) -> Batch:
    """Requests as a padded Batch whose mel holds the prompts and nothing else."""
    sizes = torch.tensor([[r.frames, len(r.codes), r.domain, len(r.prompt)] for r in requests])
    frames, token_len, domain, prompt = sizes.unbind(1)
    tokens = pad_sequence([torch.from_numpy(r.codes.astype(np.int64)) for r in requests], batch_first=True)
    tokens = tokens if tokens.shape[2] > 1 else tokens[..., 0]
    mel = pad_sequence([torch.from_numpy(r.prompt.astype(np.float32)) for r in requests], batch_first=True)
    mel = torch.nn.functional.pad(mel, (0, 0, 0, int(frames.max()) - mel.shape[1]))
    texts = tuple(r.text for r in requests)
    return Batch(mel, frames, tokens, token_len, domain, {}, prompt, torch.arange(len(requests)), texts=texts)


def synthesise(model: FlowModel, requests: Sequence[Request], vocoder, options: dict, dtype="auto", most=4000) -> list:
    """Waveforms (L,) of the requests, references cut off, in batches of like length of at most `most` frames where a
    clip alone has no more; `options` are model.sample's."""
    waves: list = [None] * len(requests)
    pending = sorted(range(len(requests)), key=lambda i: requests[i].frames)
    device = next(model.parameters()).device
    while pending:
        padded = (k * requests[i].frames for k, i in enumerate(pending, 1))  # of the first k, the last of them longest
        size = max(1, sum(frames <= most for frames in padded))
        group, pending = pending[:size], pending[size:]
        batch = to_batch([requests[i] for i in group]).to(device)
        with torch.inference_mode(), precision(str(device), dtype):
            mel = model.denormalise(sample(model, model.embed_condition(batch), **options))
        for i, m in zip(group, mel, strict=True):
            waves[i] = vocoder(m[len(requests[i].prompt) : requests[i].frames].float())
    return waves


class Stage1:
    """An LM of lm.py and the model that will read its codes, `data` the latter's preparation. Raises ValueError when
    the two do not fit, and warns when they learned from unlike preparations, whose codes may mean other sounds."""

    def __init__(self, path: str, model: FlowModel, device: str, data: str):
        self.lm, self.state = load_lm(path, device)
        if model.config.second_codes:
            raise ValueError("the model reads a second token stream, which no LM writes; use one of beats_tokens=False")
        if self.lm.vocabulary.codes != model.config.codes:
            raise ValueError(f"{path} writes codes of {self.lm.vocabulary.codes}, the model reads {model.config.codes}")
        if self.state["data"] != data:
            print(f"warning: {path} was trained on another preparation than the model it writes for", file=sys.stderr)

    def requests(self, texts: list, max_seconds=12.0, references=None, prompt_max=0.3, **sampling) -> list[Request]:
        """(domain, text) each -> a Request each, TEXTS a batch, of at most max_seconds, speech no longer than a slow
        reader takes, so that babble ends. `references` {domain: Prepared} give their style to the LM and their start to
        stage 2: at most `prompt_max` of the whole, as in training. `sampling` is lm.generate's."""
        rates, out = self.state["rates"], []
        for group in (texts[k : k + TEXTS] for k in range(0, len(texts), TEXTS)):
            most = [min(max_seconds, 1.5 + 0.15 * len(t)) if d == SPEECH else max_seconds for d, t in group]
            limits = [max(1, round(rates[d] * seconds)) for (d, _), seconds in zip(group, most, strict=True)]
            styles = torch.from_numpy(np.stack([references[d].style for d, _ in group])) if references else None
            codes = generate(self.lm, group, limits, styles, **sampling)
            for (d, _), c in zip(group, codes, strict=True):
                request = Request(c[:, None], d, round(len(c) / rates[d] * audio.FRAME_RATE))
                out.append(with_prompt(request, references[d], rates, prompt_max) if references else request)
        return out


def with_prompt(request: Request, reference: preparation.Prepared, rates: list[int], prompt_max: float) -> Request:
    """The request after the beginning of a reference, cut where a token starts."""
    unit, room = crop_unit(rates), int(prompt_max / (1 - prompt_max) * request.frames)
    first = min(len(reference.mel), room) // unit * unit
    tokens = round(first * rates[request.domain] / audio.FRAME_RATE)
    codes = np.concatenate([reference.tokens[:tokens], request.codes])
    return Request(codes, request.domain, first + request.frames, reference.mel[:first])


def texts_of(args: SampleArgs) -> list[tuple[int, str]]:
    """(domain, text) of each clip that is asked for in words. Raises ValueError where there are none."""
    lines = [args.text, f"[{args.event}] {args.describe}" if args.event else ""]
    lines += corpora.read_text(Path(args.batch)).splitlines() if args.batch else []
    found = [(line, re.fullmatch(r"\[(.+?)\]\s*(.*)", line)) for line in map(str.strip, lines) if line]
    if (args.lm or args.batch) and not found:
        raise ValueError("stage 1 needs words: pass --text, --event, or a --batch of texts or [event] descriptions")
    return [(AUDIO, ": ".join(filter(None, sound.groups()))) if sound else (SPEECH, line) for line, sound in found]


def make_requests(args: SampleArgs, model: FlowModel, state: dict) -> tuple[list[Request], dict]:
    """What the command asks for, and what to say of each clip in its .json, by the file's name."""
    run, texts = state["config"], texts_of(args)
    config = from_dict(Config, run | {"data_dir": args.data_dir, "device": args.device}, args.ckpt)
    if texts:
        if not args.lm:
            raise ValueError("text needs stage 1: pass --lm=CKPT, a checkpoint of lm.py")
        stage = Stage1(args.lm, model, args.device, state["data"])
        domains = {d for d, _ in texts} if args.reference else ()
        references = {d: preparation.encode_file(args.reference, d, config) for d in domains}
        sampling = {k: getattr(args, k) for k in "temperature top_p guidance repetition seed".split()}
        made = {"lm": args.lm, "lm_step": stage.state["step"], "reference": args.reference} | sampling
        about = {f"{k:04d}_{DOMAINS[d]}": {"text": t, "domain": DOMAINS[d]} | made for k, (d, t) in enumerate(texts)}
        return stage.requests(texts, args.max_seconds, references, run["prompt_max"], **sampling), about
    if args.tokens_from:
        heard = preparation.encode_file(args.tokens_from, DOMAINS.index(args.domain), config)
        about = {f"{Path(args.tokens_from).stem}_again": {"tokens_from": args.tokens_from, "domain": args.domain}}
        return [Request(heard.tokens, heard.clip.domain, len(heard.mel))], about
    dataset, about = Dataset(config.data_dir, args.split), {}
    ids = first_of_each_domain(dataset, args.n)
    for i in ids.tolist():
        (name, text), domain = dataset.name_and_text(i), DOMAINS[dataset.index["domain"][i]]
        made = {"clip": name, "text": text, "domain": domain, "split": args.split}
        about[f"{args.split}_{domain}_{i:04d}"] = made  # evaluate.py's speech_0003.wav is another and stays
    return from_dataset(dataset, ids), about


def main(args: SampleArgs) -> None:
    """Writes what is asked for as wav files, each with a .json of how it was made; prints the real-time factor."""
    state, run_dir, args, options = open_run(args)
    folder = Path(args.out_dir or run_dir / "samples")
    (Path(args.out).parent if args.out else folder).mkdir(parents=True, exist_ok=True)
    model, vocoder = load_model(state, device=args.device), audio.load_vocoder(args.vocoder, args.device)
    start = time.monotonic()
    requests, about = make_requests(args, model, state)
    if args.out and len(requests) > 1:
        raise ValueError(f"out={args.out} is one file and {len(requests)} clips are asked for; pass --out_dir")
    between = time.monotonic()
    waves = synthesise(model, requests, vocoder, options, state["config"]["dtype"])
    end, seconds = time.monotonic(), sum(map(len, waves)) / audio.SAMPLE_RATE
    for wav, (file, made) in zip(waves, about.items(), strict=True):
        path = Path(args.out or folder / f"{file}.wav")
        audio.write(path, wav)
        made |= {"ckpt": args.ckpt, "step": state["step"], **options, "vocoder": args.vocoder}
        common.write_json(path.with_suffix(".json"), made)
        print(f"{path}  {len(wav) / audio.SAMPLE_RATE:5.2f} s  {made.get('text', '')}")
    print(f"{seconds:.1f} s of audio: tokens in {between - start:.1f} s, waveform in {end - between:.1f} s, ", end="")
    print(f"real-time factor {(end - start) / seconds:.2f} at nfe {options['nfe']}")


if __name__ == "__main__":
    command(main, ARGS)
