"""Typed configuration: a dataclass's defaults, then config files, then the command line, into one checked object.

    python train.py config/demo.py --batch_size=8 --learning_rate 3e-4

A config file is Python, run in a namespace of its own, that assigns only what differs from the defaults. What does not
fit is one line on stderr that names the key, the value, where it came from and what was expected, and exit code 2. A
field's type says its range (Count, Share, ...); `renamed` in a dataclass is {an older key: its name now}.
"""

import contextlib
import difflib
import inspect
import re
import signal
import sys
import traceback
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")
Count = Annotated[int, (1, None)]  # a type, then the lowest and the highest value
Natural = Annotated[int, (0, 2**32 - 1)]  # what every generator takes as a seed
Name = Annotated[str, (1, None)]  # the range of a text is that of its length
Positive = Annotated[float, (1e-12, None)]
Amount = Annotated[float, (0, None)]
Share = Annotated[float, (0, 1)]
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class ConfigError(ValueError):
    """A setting that cannot be used, in one line."""


def configure(cls: type[T], doc: str, argv: Sequence[str] | None = None) -> T:
    """The settings of a script: `cls` is its dataclass, `doc` its docstring, shown by --help. Words without dashes are
    config files, `--key=value` and `--key value` override them, the last one wins; a tuple or list takes several words
    or commas. Exits with code 2 and one line on stderr when anything does not fit."""
    if argv is None:
        quiet_interrupt()
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(argv):
        print(help_text(cls, doc))
        sys.exit(0)
    try:
        return cls(**_parse(cls, argv))
    except ConfigError as error:
        print(f"{script_name()}:", *str(error).splitlines(), file=sys.stderr)  # a value may hold line breaks
        sys.exit(2)


def quiet_interrupt() -> None:
    """Has Ctrl-C end a script without a word while it imports; common.command sets it again."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def script_name() -> str:
    """What the user called: train.py, or prepare for `python -m prepare`."""
    script = Path(sys.argv[0])
    return script.parent.name if script.stem == "__main__" else script.name


def _parse(cls: type, argv: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            values |= {key: _check(cls, key, value, word) for key, value in _read_file(word).items()}
            continue
        key, equals, text = word[2:].partition("=")
        hint, words = _hint(cls, key, word), [text] if equals else []
        kind, args, _ = _parts(hint)
        if bool in (kind, *args) and not equals and not (argv and argv[0].lower() in {"none", *BOOLS}):
            words = ["true"]  # a bare --flag
        most = sys.maxsize if kind in (tuple, list) and not equals else 1
        while len(words) < most and argv and not argv[0].startswith("--"):
            words.append(argv.pop(0))
        if not words:
            raise ConfigError(f"{word} needs a value ({_name(hint)})")
        values[key] = _check(cls, key, ",".join(words), f"--{key}={' '.join(words)}", typed=True)
    return values


def _read_file(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        there = ", ".join(sorted(str(f) for f in Path("config").glob("*.py"))) or "none"
        raise ConfigError(f"config file {path}: no such file (there are: {there})")
    namespace: dict[str, Any] = {"__file__": path}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:  # not one in a module that the file imports
            lines = [error.lineno]
        at = f", line {lines[0]}" if lines else ""
        raise ConfigError(f"config file {path}{at}: {type(error).__name__}: {error}") from error
    return {k: v for k, v in namespace.items() if not (k[0] == "_" or callable(v) or isinstance(v, types.ModuleType))}


def _hint(cls: type, key: str, where: str) -> Any:
    """The declared type of a key. Raises ConfigError for one that does not exist."""
    if key in (names := [f.name for f in fields(cls)]):
        return typing.get_type_hints(cls, include_extras=True)[key]
    now, near = getattr(cls, "renamed", {}).get(key), difflib.get_close_matches(key, names, 1, 0.5)
    hint = f"it is {now!r} now" if now else f"did you mean {near[0]!r}?" if near else "--help lists the keys"
    raise ConfigError(f"unknown key {key!r} (from {where}): {hint}")


def _parts(hint: Any) -> tuple[Any, tuple, tuple]:
    """The kind of a declared type, its arguments, and its range."""
    hint, bounds = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint, (None, None))
    kind = typing.get_origin(hint) or hint
    return typing.Union if kind is types.UnionType else kind, typing.get_args(hint), bounds


def _check(cls: type, key: str, value: Any, where: str, typed: bool = False) -> Any:
    """The value as the field's type. Raises ConfigError for an unknown key, a wrong type or a value out of range."""
    hint = _hint(cls, key, where)
    try:
        return _fit(hint, value, typed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} = {value!r} (from {where}): expected {str(error) or _name(hint)}") from None


def _fit(hint: Any, value: Any, typed: bool) -> Any:
    """The value, a text where it was `typed` as a word of the command line, as the declared type. Raises TypeError for
    another type, ValueError, with the range, outside of it."""
    kind, args, (low, high) = _parts(hint)
    if kind is typing.Union:
        return None if value is None or (typed and value.lower() == "none") else _fit(args[0], value, typed)
    if typed and kind in (tuple, list):
        value = [word.strip() for word in value.split(",") if word.strip()]
    elif typed and kind is bool:
        value = BOOLS.get(value.lower(), value)
    elif typed and kind in (int, float):
        with contextlib.suppress(ValueError):  # what is no number is refused below
            number = int(value) if re.fullmatch(r"[+-]?\d[\d_]*", value) else float(value)
            value = int(number) if kind is int and number % 1 == 0 else number
    if kind in (tuple, list) and isinstance(value, (tuple, list)):
        return kind([_fit(args[0], v, typed) for v in value])
    if kind is float:  # the comparison also refuses nan, infinities and integers too large for a float
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    else:
        fits = value in args if kind is Literal else isinstance(value, kind) and (kind, type(value)) != (int, bool)
    if not fits:
        raise TypeError
    size = len(value) if kind is str else value
    if (low is not None and size < low) or (high is not None and size > high):
        text = f"at least {low:g}" if high is None else f"from {low:g} to {high:.10g}"
        raise ValueError("a name" if kind is str else text)
    return float(value) if kind is float else value


def _name(hint: Any) -> str:
    kind, args, _ = _parts(hint)
    if kind in (tuple, list, typing.Union):
        return f"{_name(args[0])} or None" if kind is typing.Union else f"a list of {_name(args[0])}"
    names = {bool: "true or false", Literal: "one of " + ", ".join(map(str, args))}
    return names.get(kind) or kind.__name__


def help_text(cls: type, doc: str) -> str:
    """The script's docstring, then every field with its type, default and comment, as they stand in the source."""
    defaults, lines = {f.name: f.default for f in fields(cls)}, [doc.strip(), ""]
    sources = (inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))  # a base class's fields first
    for line in "".join(sources).splitlines():
        field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if line.startswith("    # "):
            lines.append(f"\n{line.strip()[2:]}:")
        elif field and (name := field[1]) in defaults:
            lines.append(f"  --{name}={defaults[name]!r}  ({_name(_hint(cls, name, ''))})\n        {field[2] or ''}")
    return "\n".join(lines)


def differences(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}


def show(config: Any) -> str:
    """One line per field that differs from its default, values aligned."""
    changed = differences(config)
    return "\n".join(f"  {k:{max(map(len, changed))}} {v!r}" for k, v in changed.items())


def to_words(config: Any) -> list[str]:
    """The command line that gives this config, for a script that is started as a process."""
    text = {k: ",".join(map(str, v)) if isinstance(v, (tuple, list)) else v for k, v in differences(config).items()}
    return [f"--{k}={v}" for k, v in text.items()]


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """The dataclass from a dict (a checkpoint's or config.json's; `where`: its source), lists turned back into tuples;
    what it lacks has its default, an older key its name now. Raises ConfigError for what _check refuses."""
    values = {getattr(cls, "renamed", {}).get(k, k): v for k, v in values.items()}
    return cls(**{k: _check(cls, k, v, where) for k, v in values.items()})
