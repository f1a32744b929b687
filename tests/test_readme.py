"""The README's own words: its commands exist and parse, its file tree is the tree, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
SCRIPTS = sorted({c for c in COMMANDS if re.match(r"(python \w+\.py|torchrun .*\.py)", c)})


def test_the_two_commands_are_there():
    assert "pip install -r requirements.txt && python train.py config/demo.py" in COMMANDS
    assert "pip install -r requirements.txt && python -m pytest" in COMMANDS


@pytest.mark.parametrize("line", SCRIPTS)
def test_command_is_accepted(line):
    """Every script in the README starts and takes the options that are shown; the added one is all it refuses."""
    words = shlex.split(line)
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    done = subprocess.run(
        [sys.executable, *words[script:], "--no_such_key=1"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "unknown key 'no_such_key'" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_file_tree_is_complete():
    tree = re.search(r"```\n(configurator\.py.*?)```", README, re.S)[1]
    named = set(re.findall(r"^(\w+\.py)", tree, re.M))
    assert named == {f.name for f in ROOT.glob("*.py")}


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
