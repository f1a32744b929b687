"""configurator.py: what every spelling of a setting becomes, and the one line that refuses it."""

import importlib
import json
import re
import subprocess
import sys
import types
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pytest

import configurator
from configurator import ConfigError, Count, configure, from_dict
from train import Config

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": "Config", "prepare.__main__": "PrepareArgs", "probe": "ProbeArgs"}  # module: its settings
SCRIPTS |= {"lm": "LMConfig", "sample": "SampleArgs", "evaluate": "EvalArgs", "bench": "BenchArgs"}


def settings_of(script: str) -> type:
    return getattr(importlib.import_module(script), SCRIPTS[script])


@dataclass
class Optional:
    steps: int | None = None  # how many
    scale: float | None = 2.0  # how much
    needed: bool = True  # whether
    maybe: bool | None = None  # whether, or as is best


@dataclass
class Several:
    """Tuples, bounds on each entry, tuples in a tuple."""

    name: str = "x"  # what it is called
    ckpt: tuple[str, ...] = ()  # files
    layers: tuple[typing.Annotated[int, (1, 8)], ...] = (4,)  # which
    few: Count | None = None  # a range or none
    pairs: tuple[tuple[int, ...], ...] = ()  # nested


ACCEPTED = {
    Config: [
        ("--batch_size=8 --seed 3", {"batch_size": 8, "seed": 3}),
        ("--batch_size=8 --batch_size 9", {"batch_size": 9}),  # the last one wins
        ("--max_steps=1e3 --batch_size 1_000 --seed=7.0", {"max_steps": 1000, "batch_size": 1000, "seed": 7}),
        ("--learning_rate=1 --sigma 3e-4", {"learning_rate": 1.0, "sigma": 3e-4}),
        ("--sway -1.5 --cfg_scale=-2", {"sway": -1.5, "cfg_scale": -2.0}),
        ("--compile", {"compile": True}),
        ("--compile --evaluate=False", {"compile": True, "evaluate": False}),
        ("--compile=true --tensorboard=1", {"compile": True, "tensorboard": True}),
        ("--compile yes --evaluate no --seed 3", {"compile": True, "evaluate": False, "seed": 3}),
        ("--align_layers=4,8,12", {"align_layers": (4, 8, 12)}),
        ("--align_layers 4 8 12 --seed=1", {"align_layers": (4, 8, 12), "seed": 1}),
        ("--align_layers 4, 8 --mel_stats=", {"align_layers": (4, 8), "mel_stats": ()}),
        ("--align_layers=4 --mel_stats -5 2", {"align_layers": (4,), "mel_stats": (-5.0, 2.0)}),
        ("--out_dir=a=b=c --data_dir a=b", {"out_dir": "a=b=c", "data_dir": "a=b"}),
        ("--speech_dir= --audio_dir=5 --manifest=none", {"speech_dir": "", "audio_dir": "5", "manifest": "none"}),
        ("", {}),
    ],
    Optional: [
        ("--steps=none --scale None", {"steps": None, "scale": None}),
        ("--steps=7 --scale=3", {"steps": 7, "scale": 3.0}),
        ("--maybe --steps=7", {"maybe": True, "steps": 7}),
        ("--maybe none --needed no", {"maybe": None, "needed": False}),
    ],
    Several: [
        ("--ckpt a.pt b.pt --name=y", {"ckpt": ("a.pt", "b.pt"), "name": "y"}),
        ("--ckpt=a.pt,b.pt", {"ckpt": ("a.pt", "b.pt")}),
        ("--ckpt= --layers=", {"layers": ()}),
        ("--layers=1,8 --few 3", {"layers": (1, 8), "few": 3}),
    ],
}


@pytest.mark.parametrize("cls, argv, expected", [(cls, *row) for cls, rows in ACCEPTED.items() for row in rows])
def test_what_fits(cls, argv, expected):
    config = configure(cls, "", argv.split())
    assert repr(config) == repr(cls(**expected))  # which tells 1 from 1.0 and True
    changed = {key: value for key, value in expected.items() if value != getattr(cls(), key)}
    assert configurator.differences(config) == changed


def test_helpers_in_a_file_are_not_keys(tmp_path):
    lines = ["import functools", "from math import sqrt", "half = functools.partial(int)", "\u00e9 = abs"]
    lines += ["from pathlib import Path", "_nine = 9", "seed = int(sqrt(_nine)) + len(Path(__file__).stem)  # \u00e9"]
    (tmp_path / "c.py").write_text("\n".join(lines), encoding="utf-8")
    assert configure(Config, "", [str(tmp_path / "c.py")]) == Config(seed=4)


def test_files_in_order_then_the_command_line(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("batch_size = 8\nsigma = 1\nalign_layers = [1, 2]\n")
    b.write_text("def helper():\n    return 3\nbatch_size = helper()\n")
    config = configure(Config, "", [str(a), str(b), "--seed=1"])
    assert config == Config(batch_size=3, sigma=1.0, align_layers=(1, 2), seed=1)
    assert isinstance(config.sigma, float) and isinstance(config.align_layers, tuple)
    assert configure(Config, "", [str(b), str(a)]).batch_size == 8
    assert configure(Config, "", [str(a), "--batch_size=5"]).batch_size == 5
    config = configure(Config, "", ["--compile", str(b)])  # a bare flag before a file
    assert config.compile is True and config.batch_size == 3


def refused(argv: list[str], capsys, cls: type = Config) -> str:
    """The one line on stderr of a command line that is refused."""
    with pytest.raises(SystemExit) as stop:
        configure(cls, "", argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err


REFUSED = {
    Config: [
        ("--renamed=1", ["unknown key 'renamed'"]),  # of the dataclass, and no field
        ("--lerning_rate=1", ["unknown key 'lerning_rate'", "from --lerning_rate=1", "did you mean 'learning_rate'?"]),
        ("--xyzzy=1", ["unknown key 'xyzzy'", "--help lists the keys"]),
        ("--warmup_steps=300", ["unknown key 'warmup_steps'", "it is 'phase1_steps' now"]),
        ("--=1", ["unknown key ''"]),
        ("--batch_size=two", ["batch_size = 'two'", "from --batch_size=two", "expected int"]),
        ("--batch_size=2.5", ["batch_size = '2.5'", "expected int"]),
        ("--batch_size=", ["batch_size = ''", "expected int"]),
        ("--batch_size", ["--batch_size needs a value (int)"]),
        ("--batch_size --seed=1", ["--batch_size needs a value (int)"]),
        ("--batch_size=0", ["batch_size = '0'", "expected at least 1"]),
        ("--seed=inf", ["seed = 'inf'", "expected int"]),
        ("--dropout=1.5", ["dropout = '1.5'", "from --dropout=1.5", "expected from 0 to 1"]),
        ("--dropout=-0.1", ["dropout = '-0.1'", "expected from 0 to 1"]),
        ("--learning_rate=nan", ["learning_rate = 'nan'", "expected float"]),
        ("--learning_rate=-inf", ["learning_rate = '-inf'", "expected float"]),
        (f"--learning_rate=1{'0' * 400}", ["learning_rate = '1000", "expected float"]),  # too large for a float
        ("--learning_rate=0", ["learning_rate = '0' ", "expected at least"]),
        ("--compile=maybe", ["compile = 'maybe'", "expected true or false"]),
        ("--compile=", ["compile = ''", "expected true or false"]),
        ("--weighting=best", ["weighting = 'best'", "expected one of normalized, equal, paper"]),
        ("--align_layers=4,x", ["align_layers = '4,x'", "expected a list of int"]),
        ("--align_layers=4,1.5", ["align_layers = '4,1.5'", "expected a list of int"]),
        ("--seed=1e30", ["seed = '1e30'", "expected from 0 to 4294967295"]),
        ("--seed=10^30", ["seed = '10^30'", "expected int"]),
        ("--seed=-1", ["seed = '-1'", "expected from 0 to 4294967295"]),
        ("--out_dir=", ["out_dir = ''", "expected a name"]),
        ("-seed=1", ["config file -seed=1: no such file"]),
        ("--seed=a\nb", ["from --seed=a b): expected int"]),  # still one line
    ],
    Several: [
        ("--ckpt", ["--ckpt needs a value (a list of str)"]),
        ("--layers=0,3", ["layers = '0,3'", "expected from 1 to 8"]),
        ("--few=0", ["few = '0'", "expected at least 1"]),
        ("--few=x", ["few = 'x'", "expected int or None"]),
        ("--pairs=1,x", ["pairs = '1,x'", "expected a list of a list of int"]),
    ],
}


@pytest.mark.parametrize("cls, argv, parts", [(cls, *row) for cls, rows in REFUSED.items() for row in rows])
def test_refused_on_the_command_line(cls, argv, parts, capsys):
    line = refused(argv.split(" "), capsys, cls)
    assert all(p in line for p in parts), line


@pytest.mark.parametrize(
    "source, parts",
    [
        ("batch_sise = 4", ["unknown key 'batch_sise'", "did you mean 'batch_size'?"]),
        ("batch_size = True", ["batch_size = True", "expected int"]),
        ("batch_size = '4'", ["batch_size = '4'", "expected int"]),
        ("batch_size = 4.0", ["batch_size = 4.0", "expected int"]),
        ("batch_size = None", ["batch_size = None", "expected int"]),
        ("learning_rate = True", ["learning_rate = True", "expected float"]),
        ("learning_rate = 1e999", ["learning_rate = inf", "expected float"]),
        ("compile = 1", ["compile = 1", "expected true or false"]),
        ("out_dir = 3", ["out_dir = 3", "expected str"]),
        ("align_layers = 4", ["align_layers = 4", "expected a list of int"]),
        ("align_layers = (True,)", ["align_layers = (True,)", "expected a list of int"]),
        ("seed = 1\n\nbatch_size = = 2", ["line 3", "SyntaxError"]),
        ("seed = 1\nbatch_size = seeed", ["line 2", "NameError", "seeed"]),
        ("def f():\n    return 1 / 0\n\nseed = f()", ["line 4", "ZeroDivisionError"]),
        ("import no_such_module", ["line 1", "ModuleNotFoundError"]),
        ("seed = 1\n  seed = 2", ["line 2", "IndentationError"]),
        ("raise ValueError('one\\ntwo')", ["line 1: ValueError: one two"]),
        ("seed = 1\nraise SystemExit(3)", ["line 2: SystemExit: 3"]),  # not a silent end with the file's own exit code
        ("import json\n\njson.loads('{')", ["line 3: JSONDecodeError"]),  # the config's line, not the JSON's
        ("learning_rate = 10**400", ["learning_rate = 1000", "expected float"]),
    ],
)
def test_refused_in_a_file(tmp_path, source, parts, capsys):
    path = tmp_path / "c.py"
    path.write_text(source + "\n")
    line = refused([str(path), "--seed=1"], capsys)
    assert str(path) in line and all(p in line for p in parts), line


def test_a_fault_outside_the_file_is_not_given_its_line_number(tmp_path, capsys, monkeypatch):
    path = tmp_path / "c.py"
    (tmp_path / "broken_module.py").write_text("\n\n\n\nx = = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    path.write_text("seed = 1\nimport broken_module\n")
    assert f"{path}, line 2: SyntaxError" in refused([str(path)], capsys)
    path.write_bytes(b"seed = 1\nout_dir = '\xff'\n")
    assert f"config file {path}, line 2: SyntaxError" in refused([str(path)], capsys)


def test_a_missing_file_lists_those_there_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = refused(["config/dmeo.py"], capsys)
    assert "config file config/dmeo.py: no such file" in line
    for path in (ROOT / "config").glob("*.py"):
        assert f"config/{path.name}" in line
    monkeypatch.chdir(tmp_path)
    assert "(there are: none)" in refused(["config/dmeo.py"], capsys)


def test_from_dict():
    config = Config(align_layers=(1, 2), seed=3)
    assert from_dict(Config, asdict(config) | {"align_layers": [1, 2]}, "x.json") == config
    assert from_dict(Config, json.loads(json.dumps(asdict(config))), "x.json") == config
    assert configure(Config, "", configurator.to_words(config)) == config
    assert from_dict(Config, {"seed": 3}, "x.json") == Config(seed=3)  # what it lacks has its default
    with pytest.raises(ConfigError, match=r"seed = 'a' \(from x.json\): expected int"):
        from_dict(Config, {"seed": "a"}, "x.json")
    with pytest.raises(ConfigError, match="unknown key 'sede'.*did you mean 'seed'"):
        from_dict(Config, {"sede": 1}, "x.json")


def test_show():
    shown = configurator.show(Config(seed=3, align_layers=(1,)))
    assert shown.splitlines() == ["  seed         3", "  align_layers (1,)"] and configurator.show(Config()) == ""


def random_value(rng: np.random.Generator, hint):
    hint, (low, high) = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint, (None, None))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return random_value(rng, args[0]) if rng.random() < 0.7 else None
    if origin is typing.Literal:
        return args[rng.integers(len(args))]
    if origin is tuple:
        return tuple(random_value(rng, args[0]) for _ in range(rng.integers(4)))
    if hint == bool | None:
        return [None, True, False][rng.integers(3)]
    if hint is bool:
        return bool(rng.integers(2))
    if hint is int:
        return int(rng.integers(-1000 if low is None else low, high if high is not None else 10**9))
    if hint is float:
        value = float(rng.normal() * 10.0 ** rng.integers(-8, 8))
        value = value if low is None else low + abs(value)
        return value if high is None else min(value, high)
    least, letters = low or 0, list("ab /=,.-_'\"#é\\ 1eE")
    return "x" * least + "".join(rng.choice(letters, rng.integers(12))).lstrip("-")


def test_any_config_survives_its_command_line_and_file(rng, tmp_path):
    hints = typing.get_type_hints(Config, include_extras=True)
    for _ in range(50):
        config = Config(**{f.name: random_value(rng, hints[f.name]) for f in fields(Config)})
        argv = []
        for key, value in asdict(config).items():
            words = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
            argv += [f"--{key}", *words] if words and rng.random() < 0.5 else [f"--{key}={','.join(words)}"]
        assert configure(Config, "", argv) == config
        path = tmp_path / "c.py"
        path.write_text("".join(f"{k} = {v!r}\n" for k, v in asdict(config).items()))
        assert configure(Config, "", [str(path)]) == config


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_config_file_loads(path):
    cls = settings_of("lm" if path.stem.startswith("lm_") else "train")
    config, namespace = configure(cls, "", [str(path)]), {"__file__": str(path)}
    exec(path.read_text(), namespace)
    assigned = {k: v for k, v in namespace.items() if not k.startswith("_") and not callable(v)}
    assert assigned and all(getattr(config, k) == v for k, v in assigned.items())
    assert set(configurator.differences(config)) <= set(assigned)


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


def words(script: str) -> list[str]:
    return ["-m", "prepare"] if script.startswith("prepare") else [f"{script}.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_typo_is_answered_in_one_line(script):
    done = run(*words(script), "--sed=1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{words(script)[-1]}: unknown key 'sed' (from --sed=1): did you mean 'seed'?\n"


@pytest.mark.parametrize("script", ["train", "probe", "lm", "sample", "evaluate"])
def test_no_script_loads_torch_to_refuse(script):
    code = f"""
import runpy, sys
sys.path.insert(0, "."); sys.argv = ["{script}.py", "--no_such_key=1"]
try:
    runpy.run_path("{script}.py", run_name="__main__")
except SystemExit as stop:
    print(stop.code, sorted({{"torch", "numpy", "transformers"}} & set(sys.modules)))
"""
    done = run("-c", code)
    assert done.stdout == "2 []\n" and done.stderr.startswith(f"{script}.py: unknown key 'no_such_key'"), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_field_with_its_default_and_comment(script):
    done, cls = run(*words(script), "--help"), settings_of(script)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(importlib.import_module(script).__doc__.strip())
    for field in fields(cls):
        shown = re.search(rf"^  --{field.name}=(.*)  \(.*\)\n {{8}}(.*)$", done.stdout, re.MULTILINE)
        assert shown and shown[1] == repr(field.default), field.name
        assert len(shown[2]) > 5, f"{field.name} has no comment"
    assert done.stdout.count("\n  --") == len(fields(cls))
    assert from_dict(cls, asdict(cls()), "defaults") == cls()  # which are themselves allowed
