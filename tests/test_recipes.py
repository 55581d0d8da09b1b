"""benchmarks/recipes.py: its rows are recipes of the README, and a row is trained, scored and kept."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import FOLDER, write_song

pytestmark = pytest.mark.maintainer
sys.path.insert(0, str(FOLDER / "benchmarks"))

import recipes  # noqa: E402


@pytest.mark.parametrize("name", recipes.ROWS)
def test_rows_are_recipes(name, tmp_path):
    recipe, number, flags = recipes.ROWS[name]
    recipes.make_copy(tmp_path / "copy", FOLDER, recipe, number)
    for script in recipes.SCRIPTS:
        ast.parse((tmp_path / "copy" / script).read_text(encoding="utf-8"))
    added, removed = map(int, re.findall(r"\d+", recipes.lines_changed(tmp_path / "copy")))
    assert added + removed <= 22 and (added + removed > 0) == bool(recipe)
    assert recipe or flags
    arch = re.search(r"--arch (\w+)", flags)
    assert not arch or f'"{arch[1]}"' in (tmp_path / "copy" / "model.py").read_text("utf-8")


def test_a_copy_against_the_original(tmp_path):
    """The table, and that what is done is kept until the code changes."""
    for part, count in (("train", 3), ("test", 2)):
        for n in range(count):
            write_song(tmp_path / "data" / part / f"{part} {n}", rate=8000, seed=n)
    for script in recipes.SCRIPTS:
        (tmp_path / "mine").mkdir(exist_ok=True)
        shutil.copy(FOLDER / script, tmp_path / "mine")
    loss = tmp_path / "mine" / "train.py"
    loss.write_text(loss.read_text("utf-8").replace("F.mse_loss(Y_hat", "F.l1_loss(Y_hat"), "utf-8")
    small = "--nfft 256 --nhop 64 --seq-dur 0.3 --samples-per-epoch 4 --batch-size 2 --device cpu"
    command = [sys.executable, FOLDER / "benchmarks" / "recipes.py", "--folder", "mine"]
    command += ["--data", "--root data", "--training", small, "--targets", "vocals"]
    command += ["--epochs", "1", "--hidden-size", "8", "--seeds", "3", "4"]

    def table(*more):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.split("|")[1:-1] for line in done.stdout.splitlines() if line[:1] == "|"]

    names, _, base, mine = rows = table()
    assert [name.strip() for name in names[:3]] == ["row", "vocals", "difference"]
    assert base[0].strip() == "base" and base[2].strip() == "" and mine[0].strip() == "mine"
    assert mine[5].strip() == "+1 -1" and base[5].strip() == "+0 -0" and mine[6].strip() == "2"
    difference, spread = map(float, mine[2].split("±"))
    results = {
        path.stem: json.loads(path.read_text()) for path in tmp_path.glob("recipes/results/*")
    }
    assert sorted(results) == ["base-3", "base-4", "mine-3", "mine-4"]
    songs = {name: list(result["sdr"]["vocals"].values()) for name, result in results.items()}
    expected = [sum(songs[f"mine-{n}"]) / 2 - sum(songs[f"base-{n}"]) / 2 for n in (3, 4)]
    assert abs(difference - sum(expected) / 2) < 0.006 and 0 < float(mine[3]) <= 1
    assert abs(spread - abs(expected[0] - expected[1]) / 2**0.5) < 0.006
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("recipes/results/*")}
    assert table() == rows
    loss.write_text(loss.read_text("utf-8") + "# changed\n", "utf-8")
    assert table("--seeds", "3")[3][5].strip() == "+2 -1"
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.stem for path in before if before[path] != after[path]} == {"mine-3"}
