"""Typed configuration: defaults, then config files, then the command line, into one checked object.

    python train.py config/demo.py --batch_size=8 --learning_rate 3e-4

A config file is Python, run in a namespace of its own, that assigns only what differs from the defaults. A key that
does not exist, a value of the wrong type or out of range, a file that is not there: one line on stderr that names the
key, the value, where it came from and what was expected, and exit code 2, before anything heavy is imported.
"""

import difflib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

DOMAINS = ("speech", "audio")  # a clip's domain is an index into this


@dataclass
class Config:
    """Every setting of preparation, training and probing; a config file lists only what differs."""

    # run
    out_dir: str = "out/unified_b"  # run directory; an unfinished run found there is continued
    branch_from: str = ""  # warmup.pt of another run: start at the end of its phase I
    seed: int = 0  # seeds weights, data order and noise
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto takes bfloat16 where the machine has it
    compile: bool = False  # torch.compile each block
    checkpoint_activations: bool = False  # compute activations again in backward: less memory, up to a third more time
    loader_threads: int = 1  # threads that prepare the next batches; 0: none
    # corpus
    data_dir: str = "data/unified_b"  # prepared shards, shared by all runs on the same data
    speech_dir: str = ""  # any folder of recordings, each with a same-named .txt; "demo": fetch a small corpus
    audio_dir: str = ""  # any folder of sounds, captioned by a same-named .txt or their name; "demo": fetch some
    librispeech_dir: str = ""  # LibriSpeech, any of its splits
    audioset_dir: str = ""  # AudioSet: *_segments.csv, ontology.json and clips named after their YouTube id
    manifest: str = ""  # .jsonl of path, text, domain and where wanted start, end, group
    min_seconds: float = 0.5  # shorter clips are skipped
    max_seconds: float = 30.0  # longer clips are skipped; Whisper hears 30 s
    held_out: float = 0.02  # share of clips kept for validation and evaluation, in whole groups (speakers, texts)
    data_seed: int = 0  # seeds the held-out split and the tokenizers
    reference_clips: int = 300  # training clips per domain whose waveform is kept, the reference of FAD
    # teachers and tokenizers
    whisper: str = "openai/whisper-large-v3"  # speech teacher: hub name or folder; "demo": Whisper tiny.en
    audio_teacher: str = "BEATs_iter3_plus_AS2M.pt"  # path of BEATs' weights; "demo": the aisfx sound-effects network
    speech_tokenizer: Literal["s3", "whisper_vq"] = "s3"  # whisper_vq: VQ on the speech teacher's states, fitted here
    s3: str = "speech_tokenizer_v1"  # S3's name in the s3tokenizer package, or the path of CosyVoice's .onnx file
    audio_tokenizer: str = ""  # AST trained by tokenizer.py, a path; empty: fitted here on the training clips
    beats_tokenizer: str = "Tokenizer_iter3_plus_AS2M.pt"  # path of the BEATs tokenizer behind beats_tokens
    speech_codes: int = 4096  # codebook size of the speech tokens
    audio_codes: int = 4096  # codebook size of the audio tokens
    beats_tokens: bool = True  # config B: a second stream of BEATs tokens beside the primary one
    interleave: Literal["pair", "sequence"] = "pair"  # two streams: concat -> linear, or 2N tokens as written
    tokenizer_steps: int = 20_000  # training steps of a tokenizer that is fitted here
    code_init: bool = False  # start the token table at the tokenizer's codebook, so that near codes start near
    # model
    backbone: Literal["", "f5tts", "voicebox", "cosyvoice", "matcha"] = ""  # another's published model; empty: ours
    n_layer: int = 24  # DiT blocks
    n_head: int = 16  # attention heads
    n_embd: int = 1024  # model width D
    ff_mult: int = 4  # feed-forward width as a multiple of D
    dropout: float = 0.2  # in attention output and feed-forward
    # flow matching
    sigma: float = 0.5  # standard deviation of the noise x0
    token_drop: float = 0.1  # probability that a clip's whole condition is dropped, for guidance
    prompt_drop: float = 0.1  # probability that a clip's reference mel is dropped
    prompt_max: float = 0.3  # longest reference prefix, as a share of the clip
    mel_floor: float = -11.5129  # log-mel below this (1e-5) counts as this
    mel_stats: tuple[float, ...] = (-5.8843, 2.2615)  # log-mel mean and std; (): per bin, from the training split
    # optimisation
    max_steps: int = 500_000  # optimiser steps, both phases
    batch_frames: int = 38_400  # mel frames of a batch, padding included
    batch_size: int = 64  # most clips of a batch
    accumulate: int = 1  # batches per step and rank, their gradients averaged
    crop_frames: int = 0  # longer clips are cropped to this at random, each time anew; 0: never
    trim: float = 0.05  # clips of a batch are cut, mostly at their end, to its shortest where none loses a larger share
    optimiser: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for everything else
    learning_rate: float = 1e-4  # peak of the one-cycle schedule
    lr_warmup: float = 0.1  # share of max_steps on the way up
    weight_decay: float = 0.1  # on matrices
    beta2: float = 0.999  # AdamW; beta1 is 0.9
    grad_clip: float = 1.0  # largest gradient norm
    ema_decay: float = 0.9999  # of the averaged weights, which probe, sample and evaluate use
    # probe, then intervene
    warmup_steps: int = 5000  # phase I: L_FM + L_BiTC; at its end layers are selected and warmup.pt is saved
    probe_every: int = 200  # steps between probes in phase I
    probe_clips: int = 1  # clips per domain in the probe batch
    probe_times: int = 8  # points of the t grid
    probe_frames: int = 1000  # probe clips are cut to this
    bitc_weight: float = 1.0  # weight of L_BiTC
    align: Literal["none", "fixed", "random", "lasp", "gradnorm", "foga"] = "foga"  # how layers are selected
    align_head: Literal["mlp", "conv1d", "conv2d"] = "mlp"  # mlp on the pooled descriptor, conv on the sequence
    align_teacher: Literal["external", "self"] = "external"  # self: a deeper layer of the model, detached (LayerSync)
    align_layers: tuple[int, ...] = ()  # the layers, 1..n_layer, for align=fixed
    top_k: int = 3  # layers selected per domain
    weighting: Literal["foga", "normalized", "equal"] = "foga"  # align_weight * score; with sum align_weight; or equal
    align_weight: float = 2.0  # scale of the alignment weights
    timestep_adaptive: bool = False  # select layers for each part of the t grid of the probe, for align=foga
    refresh_every: int = 0  # steps between new probes and selections in phase II; 0: selected once
    align_stop: int = 0  # step after which the alignment term is off (HASTE); 0: never
    head_dim: int = 0  # hidden width of the alignment heads; 0: n_embd
    # reporting
    log_every: int = 10  # steps between rows of log.csv
    eval_every: int = 2000  # steps between held-out losses
    eval_clips: int = 64  # held-out clips per domain for the held-out loss
    save_every: int = 2000  # steps between checkpoints
    evaluate_every: int = 0  # steps between runs of evaluate.py, for curves of FAD and WER; 0: only at the end
    # sampling and evaluation at the end of a run
    nfe: int = 32  # velocity evaluations per clip
    cfg: float = 3.0  # guidance: v_u + cfg (v_c - v_u); 1 is none
    sway: float = -1.0  # sway sampling coefficient; negative dwells near the noise
    vocoder: str = "charactr/vocos-mel-24khz"  # hub name or folder of a Vocos, or griffin_lim, which needs no weights
    asr: str = "openai/whisper-large-v3"  # recogniser for WER: hub name or folder; "demo": Whisper tiny.en
    fad_model: Literal["yamnet", "vggish", "aisfx", "whisper", "none"] = "yamnet"  # network under FAD; not a teacher
    evaluate: bool = True  # run probe.py and evaluate.py on the finished checkpoint

    ranges: ClassVar[dict[str, tuple]] = {
        **dict.fromkeys("min_seconds max_seconds sigma learning_rate grad_clip".split(), (1e-12, None)),
        **dict.fromkeys("held_out token_drop prompt_drop prompt_max trim".split(), (0, 1)),
        **dict.fromkeys("dropout lr_warmup beta2 ema_decay".split(), (0, 1)),
        **dict.fromkeys(
            "speech_codes audio_codes tokenizer_steps n_layer n_head n_embd ff_mult max_steps batch_frames batch_size "
            "accumulate warmup_steps probe_every probe_clips probe_times probe_frames top_k log_every eval_every "
            "eval_clips save_every nfe".split(),
            (1, None),
        ),
        **dict.fromkeys(
            "seed data_seed loader_threads reference_clips crop_frames weight_decay head_dim refresh_every align_stop "
            "evaluate_every bitc_weight align_weight".split(),
            (0, None),
        ),
    }


class ConfigError(ValueError):
    """A setting that cannot be used, in one line."""


T = TypeVar("T")


def configure(cls: type[T], doc: str, argv: Sequence[str] | None = None, files: bool = True) -> T:
    """The settings of a script: `cls` is its dataclass, `doc` its docstring, shown by --help.

    Words without dashes are config files (none are taken when `files` is False), `--key=value` and `--key value`
    override them, the last one wins; a tuple or list takes several words or commas. Exits with code 2 and one line on
    stderr when anything does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(sys.argv[0]).name
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, doc))
        sys.exit(0)
    try:
        values = _parse(cls, argv, files)
        _complete([f.name for f in fields(cls) if _default(f) is MISSING], values, "the command line")
        return cls(**values)
    except ConfigError as error:
        print(f"{script}:", *str(error).splitlines(), file=sys.stderr)  # a value or a message may hold line breaks
        sys.exit(2)


def _parse(cls: type, argv: list[str], files: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if not word.startswith("--"):
            if not files:
                raise ConfigError(f"unexpected word {word!r}: this script takes --key=value only")
            for key, value in _read_file(word).items():
                values[key] = _check(cls, key, value, word)
            continue
        key, equals, text = word[2:].partition("=")
        _known(cls, key, word)
        hint, words = hints[key], [text]
        if not equals:
            stop = next((j for j in range(i, len(argv)) if argv[j].startswith("--")), len(argv))
            several = typing.get_origin(hint) in (tuple, list)
            words = argv[i : stop if several else min(i + 1, stop)]
            if hint is bool and (not words or words[0].lower() not in BOOLS):
                words = ["true"]  # a bare --flag
            elif not words:
                raise ConfigError(f"{word} needs a value ({_name(hint)})")
            else:
                i += len(words)
        where = f"--{key}={' '.join(words)}"
        values[key] = _check(cls, key, _from_text(hint, ",".join(words), key, where), where)
    return values


def _read_file(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        there = ", ".join(sorted(str(f) for f in Path("config").glob("*.py"))) or "none"
        raise ConfigError(f"config file {path}: no such file (there are: {there})")
    namespace: dict[str, Any] = {"__file__": path}
    try:
        exec(compile(file.read_bytes(), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        inside, line = error.__traceback__.tb_next, None
        if isinstance(error, SyntaxError) and error.filename == path:  # not one in a module that the file imports
            line = error.lineno
        elif inside and inside.tb_frame.f_code.co_filename == path:
            line = inside.tb_lineno
        at = f", line {line}" if line else ""
        raise ConfigError(f"config file {path}{at}: {type(error).__name__}: {error}") from error
    helper = {k for k, v in namespace.items() if callable(v) or isinstance(v, types.ModuleType)}
    return {k: v for k, v in namespace.items() if not k.startswith("_") and k not in helper}


BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _known(cls: type, key: str, where: str) -> None:
    names = [f.name for f in fields(cls)]
    if key not in names:
        near = difflib.get_close_matches(key, names, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
        raise ConfigError(f"unknown key {key!r} (from {where}): {hint}")


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _complete(needed: list[str], values: dict[str, Any], where: str) -> None:
    missing = [key for key in needed if key not in values]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)} (from {where}): no value was given")


def _from_text(hint: Any, text: str, key: str, where: str) -> Any:
    """A command line's text as the declared type; what does not convert is left for _check to refuse."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if text.lower() == "none" else _from_text(args[0], text, key, where)
    if origin in (tuple, list):
        return origin(_from_text(args[0], word.strip(), key, where) for word in text.split(",") if word.strip())
    if hint is bool:
        return BOOLS.get(text.lower(), text)
    if hint in (int, float):
        try:
            number = int(text) if re.fullmatch(r"[+-]?\d[\d_]*", text) else float(text)
        except ValueError:
            return text
        return int(number) if hint is int and isinstance(number, float) and number.is_integer() else number
    return text


def _check(cls: type, key: str, value: Any, where: str) -> Any:
    """The value as the field's type. Raises ConfigError for an unknown key, a wrong type or a value out of range."""
    _known(cls, key, where)
    hint = typing.get_type_hints(cls)[key]
    fits, value = _fit(hint, value)
    if not fits:
        raise ConfigError(f"{key} = {value!r} (from {where}): expected {_name(hint)}")
    low, high = getattr(cls, "ranges", {}).get(key, (None, None))
    each = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
    if any((low is not None and v < low) or (high is not None and v > high) for v in each):
        bounds = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise ConfigError(f"{key} = {value!r} (from {where}): expected {bounds}")
    return value


def _fit(hint: Any, value: Any) -> tuple[bool, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args, value
    if origin in (types.UnionType, typing.Union):
        return (True, None) if value is None else _fit(args[0], value)
    if origin in (tuple, list):
        if not isinstance(value, (tuple, list)):
            return False, value
        fitted = [_fit(args[0], v) for v in value]
        return all(ok for ok, _ in fitted), origin(v for _, v in fitted)
    if hint is float:  # the comparison also refuses nan, infinities and integers too large for a float
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        ok = number and abs(value) <= sys.float_info.max
        return ok, float(value) if ok else value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, hint), value


def _name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return f"{_name(args[0])} or None"
    if origin in (tuple, list):
        return f"a list of {_name(args[0])}"
    return "true or false" if hint is bool else hint.__name__


def help_text(cls: type, doc: str) -> str:
    """The script's docstring, then every field with its type, default and comment, as they stand in the source."""
    hints, lines = typing.get_type_hints(cls), [doc.strip(), ""]
    sources = [inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c)]  # a base class's fields first
    for line in "".join(sources).splitlines():
        field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if re.match(r"    # ", line):
            lines.append(f"\n{line.strip()[2:]}:")
        elif field and field[1] in {f.name for f in fields(cls)}:
            default = next(_default(f) for f in fields(cls) if f.name == field[1])
            shown = "required" if default is MISSING else repr(default)
            lines.append(f"  --{field[1]}={shown}  ({_name(hints[field[1]])})\n        {field[2] or ''}")
    return "\n".join(lines)


def differences(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != _default(f)}


def changed_settings(now: dict, before: dict) -> str:
    """The settings of `now` that differ in `before`, in words; empty when none does."""
    return "; ".join(f"{k}: {before.get(k)!r} -> {v!r}" for k, v in now.items() if before.get(k) != v)


def show(config: Any) -> str:
    """One line per field that differs from its default, values aligned."""
    changed = differences(config)
    width = max(map(len, changed), default=0)
    return "\n".join(f"  {k:{width}} {v!r}" for k, v in changed.items())


def to_json(config: Any) -> str:
    """Every field as JSON, which `from_dict(cls, json.loads(text), where)` reads back."""
    return json.dumps(asdict(config), indent=1)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """The dataclass from a stored dict (a checkpoint's or config.json's), lists turned back into tuples.

    Raises ConfigError for a field that is unknown, missing, of the wrong type or out of range (`where` is the source).
    """
    checked = {k: _check(cls, k, v, where) for k, v in values.items()}
    _complete([f.name for f in fields(cls)], checked, where)
    return cls(**checked)
