"""What README.md says of the code is true: line counts, line numbers, recipes that run, flags that exist and do something."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import FOLDER, run_script

README = (FOLDER / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("train.py", "model.py", "data.py", "test.py", "eval.py", "utils.py")


def test_line_counts():
    for script in SCRIPTS:
        lines = len((FOLDER / script).read_text(encoding="utf-8").splitlines())
        assert re.search(rf"`{script}` \| {lines} \|", README), f"README.md: {script} has {lines} lines"


def test_line_numbers():
    """Every `model.py:123` of the README's table stands beside code that is found on that line."""
    rows = re.findall(r"`([^`]+)` \| \[`(\w+\.py):(\d+)`\]", README)
    assert len(rows) >= 8
    for code, script, number in rows:
        lines = (FOLDER / script).read_text(encoding="utf-8").splitlines()
        right = [n for n, line in enumerate(lines, 1) if code in line]
        assert int(number) in right, f"README.md: `{code}` is on line {right} of {script}, not {number}"


def apply(diff, folder):
    """Apply a recipe: each run of context and removed lines is replaced by context and added lines."""
    script = re.search(r"^\+\+\+ (\S+)", diff, re.M)[1]
    assert len(re.findall(r"^\+\+\+", diff, re.M)) == 1  # one file
    body = diff.split("\n", 2)[2]
    assert sum(line.startswith(("+", "-")) for line in body.splitlines()) <= 22
    text = (folder / script).read_text(encoding="utf-8")
    for hunk in re.split(r"^@@.*\n", body, flags=re.M):
        lines = hunk.splitlines()
        old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
        new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
        if old != new:
            assert text.count(old) == 1, f"{script}: found {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
    (folder / script).write_text(text, encoding="utf-8")


RECIPES = re.findall(r"^#### (.+?)\n(.*?)(?=^##)", README, re.M | re.S)


@pytest.mark.parametrize("name,text", RECIPES, ids=[name for name, _ in RECIPES])
def test_recipes(name, text, tmp_path, musdb_root):
    """Each recipe's diff applies to one file, and its command then trains."""
    for script in (*SCRIPTS, "assets"):
        (shutil.copytree if script == "assets" else shutil.copy)(FOLDER / script, tmp_path / script)
    for diff in re.findall(r"```diff\n(.*?)```", text, re.S):
        apply(diff, tmp_path)
    for command in re.findall(r"^ +python (train\.py .*)", text, re.M):
        root = tmp_path / "data"
        if not root.exists():
            shutil.copytree(musdb_root, root)
            for track in [*root.glob("*/*")]:  # the names of another set of targets
                shutil.copy(track / "vocals.wav", track / "speech.wav")
                shutil.copy(track / "drums.wav", track / "noise.wav")
            shutil.copytree(root / "train", root / "valid")
        words = command.replace("DATA", str(root)).split()
        small = ["--dry-run", "--hidden-size", "16", "--seq-dur", "1", "--batch-size", "4"]
        done = subprocess.run([sys.executable, *words, *small], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "epoch 1/" in done.stdout
    assert "```diff" in text or "python train.py" in text


def test_eight_recipes():
    assert len(RECIPES) >= 8


@pytest.mark.parametrize("script", ["train.py", "test.py", "eval.py"])
def test_every_flag_is_read(script):
    """Each flag's value is used somewhere besides its declaration."""
    tree = ast.parse((FOLDER / script).read_text(encoding="utf-8"))
    sources = "".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    printed, _ = run_script(script, "--help", cwd=FOLDER)
    flags = set(re.findall(r"^  (?:-h, )?--([a-z-]+)", printed, re.M)) - {"help"}
    assert len(flags) > 10 and tree
    for flag in flags:
        name = flag.replace("-", "_")
        assert re.search(rf"args\.{name}\b|[\"']{name}[\"']", sources), f"{script}: --{flag} is never read"
