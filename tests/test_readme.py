"""What README.md says of the code is true: line numbers, recipes that run, flags that exist."""

import re
import shlex
import shutil

import pytest
from conftest import FOLDER, run_script, write_song

pytestmark = pytest.mark.maintainer
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("train.py", "model.py", "data.py", "test.py", "eval.py", "utils.py")


def code_of(script):
    return (FOLDER / script).read_text(encoding="utf-8")


def test_line_counts():
    """Where a table says how many lines a file has."""
    for script, number in re.findall(r"`(\w+\.py)` \| (\d+) \|", README):
        assert int(number) == len(code_of(script).splitlines()), f"README.md: lines of {script}"


def test_line_numbers():
    """Every [`model.py:123`](model.py#L123) of a table stands beside code found on that line."""
    rows = re.findall(r"`([^`]+)` \| \[`(\w+\.py):(\d+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(rows) >= 8
    for code, script, number, *target in rows:
        right = [n for n, line in enumerate(code_of(script).splitlines(), 1) if code in line]
        said = f"README.md: `{code}` is on line {right} of {script}, not {number}"
        assert int(number) in right and target == [script, number], said


def test_links():
    """Files that README.md links to or shows are there."""
    for path in re.findall(r"\]\((?!http)([\w./-]+)", README):
        assert (FOLDER / path).exists(), path


def apply(diff, folder):
    """Apply a recipe: runs of context and removed lines become context and added lines."""
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
        else:  # lines that are only added: before the next line that stays
            assert not hunk.strip(), hunk
    (folder / script).write_text(text, encoding="utf-8")


RECIPES = re.findall(r"^#### (.+?)\n(.*?)(?=^##)", README, re.M | re.S)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny songs at 8 kHz in every layout that recipes ask for."""
    root = tmp_path_factory.mktemp("songs")
    for part, count in (("train", 6), ("valid", 2), ("test", 1)):
        for n in range(count):
            write_song(root / part / f"{part} {n}", 1, rate=8000, seed=n)
    for track in root.glob("*/*"):  # the names of another set of targets
        shutil.copy(track / "vocals.wav", track / "speech.wav")
        shutil.copy(track / "drums.wav", track / "noise.wav")
    return root


def test_eight_recipes():
    assert len(RECIPES) >= 8


@pytest.mark.parametrize("name,text", RECIPES, ids=[name for name, _ in RECIPES])
def test_recipe(name, text, tmp_path, root, python):
    """Each diff of a recipe applies to one file, and the command below it then trains."""
    small = ["--dry-run", "--seq-dur", "0.5", "--batch-size", "2", "--device", "cpu"]
    parts = re.split(r"^ +python (train\.py .*)", text, flags=re.M)
    assert len(parts) > 1, f"{name}: no command"
    for before, command in zip(parts[::2], parts[1::2]):
        for script in SCRIPTS:  # each variant by itself
            shutil.copy(FOLDER / script, tmp_path / script)
        shutil.rmtree(tmp_path / "open-unmix", ignore_errors=True)  # else one target is there twice
        for diff in re.findall(r"```diff\n(.*?)```", before, re.S):
            apply(diff, tmp_path)
        words = command.replace("DATA", str(root)).split()
        code = f"import sys; sys.path.insert(0, ''); sys.argv = {[*words, *small]}\n"
        code += "import runpy; runpy.run_path('train.py', run_name='__main__')"
        status, printed = python(code, tmp_path)
        assert status == 0 and "epoch 1" in printed, printed


@pytest.fixture(scope="module")
def flags():
    """{script: the flags that its --help lists}."""
    helps = {s: run_script(s, "--help", cwd=FOLDER)[0] for s in ("train.py", "test.py", "eval.py")}
    return {
        script: set(re.findall(r"^  (--[a-z-]+)", text, re.M)) for script, text in helps.items()
    }


def test_commands_of_the_readme_have_flags_that_exist(flags):
    commands = re.findall(r"python (train|test|eval)\.py([^`)\n]*)", README)  # up to the end
    assert len(commands) > 20
    for script, arguments in commands:
        words = shlex.split(arguments.partition("#")[0].replace("'", "").replace('"', ""))
        used = {word for word in words if word.startswith("--")}
        assert used <= flags[f"{script}.py"] | {"--help", "--no-amp"}, arguments


@pytest.mark.parametrize("script", ["train.py", "test.py", "eval.py"])
def test_every_flag_is_read(script, flags):
    """Each flag's value is used somewhere besides its declaration."""
    code = "".join(map(code_of, SCRIPTS))
    assert len(flags[script]) > 10
    for flag in flags[script]:
        name = flag[2:].replace("-", "_")
        uses = re.search(rf"args\.{name}\b|[\"']{name}[\"']|\b{name}=", code)
        uses = uses or re.search(rf"def index_\w+\([^)]*\b{name}\b", code)
        assert uses, f"{script}: {flag} is never read"


def test_number_of_situations():
    """README's promise about faults counts what is tested."""
    import test_faults

    rows = len(list(test_faults.situations()))
    for number in re.findall(r"([\d,]+) situations", README):
        assert 0.9 * rows <= int(number.replace(",", "")) <= rows, f"there are {rows} situations"
