"""The README's own words: its commands exist and parse, its file tree is the tree, its links lead somewhere; RESULTS.md
says of every table where it comes from."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import probe
from configurator import to_words

ROOT = Path(__file__).parent.parent
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "RESULTS.md"))
BLOCKS = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
PARTS = [part.strip() for line in COMMANDS for part in line.split("&&")]
SCRIPTS = sorted({p for p in PARTS if re.match(r"(python|torchrun --nproc_per_node=8) (\w+\.py|-m prepare)\b", p)})
TABLES = re.findall(r"((?:^.+\n)+)\n((?:^\|.*\n)+)", RESULTS, re.M)  # the paragraph before, and the table


def test_size_and_the_two_commands():
    assert len(README.encode()) <= 11_264
    assert "pip install -r requirements.txt && python train.py config/demo.py" in COMMANDS
    assert "pip install -r requirements.txt && python -m pytest" in COMMANDS


@pytest.mark.parametrize("line", SCRIPTS)
def test_command_is_accepted(line):
    """Every script in the README starts and takes the options that are shown; the added one is all it refuses."""
    words = shlex.split(line)
    script = next(i for i, w in enumerate(words) if w == "-m" or w.endswith(".py"))
    command = [sys.executable, *words[script:], "--no_such_key=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unknown key 'no_such_key'" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_script_command_is_tried():
    """None of the README's commands escapes the test above by its form."""
    others = [p for p in PARTS if p not in SCRIPTS and p != "python -m pytest"]
    assert all(p.startswith(("pip install ", "bash runs/")) for p in others), others
    assert any("-m prepare" in line for line in SCRIPTS)
    for line in others:
        for name in re.findall(r"(?:runs|config)/\w+\.\w+|requirements\S*", line):
            assert (ROOT / name).is_file(), line


def test_file_tree_is_complete():
    tree = re.search(r"```\n(train\.py.*?)```", README, re.S)[1]
    assert set(re.findall(r"^(\w+\.py)", tree, re.M)) == {f.name for f in ROOT.glob("*.py")}
    inside = {f.name for f in (ROOT / "prepare").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^  (\w+\.py)", tree, re.M)) == inside
    for name in re.findall(r"^\s*(\S+/|\w+\.(?:md|sh))\s", tree, re.M) + re.findall(r"\w+\.sh", tree):
        assert (ROOT / name).exists() or (ROOT / "runs" / name).exists(), name


def test_links_and_named_files_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README + RESULTS):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"\btest_\w+\.py", README):
        assert (ROOT / "tests" / name).exists(), name
    keys = set(re.findall(r"^    (\w+): ", "".join(f.read_text() for f in ROOT.glob("*.py")), re.M))
    for name in re.findall(r"`(?:--)?([a-z]+_[a-z_]+)`", README):
        assert name in keys, f"no setting is called {name}"


def test_the_rule_of_the_readme_selects(tiny_config, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    monkeypatch.setattr(sys, "argv", ["rule.py", *to_words(replace(tiny_config, align="middle", top_k=1))])
    monkeypatch.setattr(probe, "RULES", dict(probe.RULES))
    exec(code, {})
    chosen = json.loads((Path(tiny_config.out_dir) / "selection.json").read_text())
    assert {name: list(layers) for name, layers in chosen.items()} == {"speech": ["4"], "audio": ["4"]}


@pytest.mark.parametrize("head, table", TABLES)
def test_results_say_where_they_come_from(head, table):
    words = " ".join(head.split())
    form = r"Command: .*`.+`.*\. Commit: .*\b[0-9a-f]{7}\b.*\. Machine: \S.*\. Date: 2\d{3}-\d\d-\d\d"
    assert re.match(form, words), f"{words}\n{table.splitlines()[0]}"


def test_no_table_of_the_results_is_overlooked():
    assert len(TABLES) == len(re.findall(r"^\|(?:---\|)+$", RESULTS, re.M)) > 5
