"""Typed configuration: a dataclass's defaults, then config files, then the command line, into one checked object.

    python train.py config/demo.py --batch_size=8 --learning_rate 3e-4

A config file is Python, run in a namespace of its own, that assigns only what differs from the defaults. A key that
does not exist, a value of the wrong type or out of range, a file that is not there: one line on stderr that names the
key, the value, where it came from and what was expected, and exit code 2, before anything heavy is imported.

A dataclass may have `ranges`, {key: (lowest, highest)}, and `renamed`, {an older key: its name now}.
"""

import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class ConfigError(ValueError):
    """A setting that cannot be used, in one line."""


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
        return from_dict(cls, _parse(cls, argv, files), "the command line")
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
            values |= {key: _check(cls, key, value, word) for key, value in _read_file(word).items()}
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
        values[key] = _check(cls, key, _from_text(hint, ",".join(words)), where)
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


def _known(cls: type, key: str, where: str) -> None:
    names = [f.name for f in fields(cls)]
    if key not in names:
        now = getattr(cls, "renamed", {}).get(key)
        near = difflib.get_close_matches(key, names, 1, 0.5)
        hint = f"it is {now!r} now" if now else f"did you mean {near[0]!r}?" if near else "--help lists the keys"
        raise ConfigError(f"unknown key {key!r} (from {where}): {hint}")


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _from_text(hint: Any, text: str) -> Any:
    """A command line's text as the declared type; what does not convert is left for _check to refuse."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if text.lower() == "none" else _from_text(args[0], text)
    if origin in (tuple, list):
        return origin(_from_text(args[0], word.strip()) for word in text.split(",") if word.strip())
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
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), value


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
    known = {f.name: _default(f) for f in fields(cls)}
    sources = [inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c)]  # a base class's fields first
    for line in "".join(sources).splitlines():
        field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if re.match(r"    # ", line):
            lines.append(f"\n{line.strip()[2:]}:")
        elif field and field[1] in known:
            shown = "required" if known[field[1]] is MISSING else repr(known[field[1]])
            lines.append(f"  --{field[1]}={shown}  ({_name(hints[field[1]])})\n        {field[2] or ''}")
    return "\n".join(lines)


def differences(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != _default(f)}


def show(config: Any) -> str:
    """One line per field that differs from its default, values aligned."""
    changed = differences(config)
    width = max(map(len, changed), default=0)
    return "\n".join(f"  {k:{width}} {v!r}" for k, v in changed.items())


def to_words(config: Any) -> list[str]:
    """The command line that gives this config, for a script that is started as a process."""
    changed = differences(config).items()
    return [f"--{k}={','.join(map(str, v)) if isinstance(v, (tuple, list)) else v}" for k, v in changed]


def changed_settings(now: dict, before: dict) -> str:
    """The settings of `now` that differ in `before`, in words; empty when none does."""
    return "; ".join(f"{k}: {before.get(k)!r} -> {v!r}" for k, v in now.items() if before.get(k) != v)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """The dataclass from a dict (a checkpoint's or config.json's), lists turned back into tuples.

    Raises ConfigError for a field that is unknown, missing, of the wrong type or out of range (`where` is the source).
    """
    checked = {k: _check(cls, k, v, where) for k, v in values.items()}
    missing = [f.name for f in fields(cls) if _default(f) is MISSING and f.name not in checked]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)} (from {where}): no value was given")
    return cls(**checked)
