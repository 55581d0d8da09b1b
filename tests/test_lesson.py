"""docs/lesson.ipynb runs from top to bottom, its solutions too, and every number that its text states is asserted."""

import ast
import base64
import copy
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import FOLDER
from make_lesson import LESSON, execute, read, solutions, strip

pytestmark = pytest.mark.maintainer
NOTEBOOK = read()
TEXT = "\n\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run that made its songs itself, followed by all folded solutions."""
    home = tmp_path_factory.mktemp("home")
    notebook = copy.deepcopy(NOTEBOOK)
    notebook.cells += [nbformat.v4.new_code_cell(block) for block in solutions(notebook)]
    return execute(notebook, home), home


def code_in(cell):
    return cell.source if cell.cell_type == "code" else ""


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    return [base64.b64decode(picture) for picture in found]


def test_runs_and_plays(executed):
    """No cell fails: what `expect` asserts in them holds. Sound is there when it runs."""
    notebook, home = executed
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    printed = [o.text for c in notebook.cells for o in c.get("outputs", []) if "text" in o]
    checked = re.findall(r"the text says (\S+)", "".join(printed))
    assert len(checked) >= 40
    pages = [o for c in notebook.cells for o in c.get("outputs", []) if "<iframe" in str(o)]
    assert len(pages) >= 6 and all("data:audio/mpeg" in str(page) for page in pages)
    strip(notebook, home)
    assert "data:audio" not in nbformat.writes(notebook) and str(home) not in nbformat.writes(
        notebook
    )
    assert len(pictures(notebook)) == len(pictures(NOTEBOOK)), "python tests/make_lesson.py"


def test_committed_file():
    """It holds pictures and text that a reader on GitHub sees, no sound, and is small."""
    assert LESSON.stat().st_size <= 600_000
    assert len(pictures(NOTEBOOK)) >= 6
    for picture in pictures(NOTEBOOK):
        assert picture.startswith(b"\x89PNG")
    content = LESSON.read_text(encoding="utf-8")
    assert not re.search(r"data:audio|<iframe|<audio|text/html", content.partition('"metadata"')[0])
    kinds = {
        kind for c in NOTEBOOK.cells for o in c.get("outputs", []) for kind in o.get("data", {})
    }
    assert kinds == {"image/png"}
    assert not any(o.output_type == "error" for c in NOTEBOOK.cells for o in c.get("outputs", []))
    assert all(
        cell.outputs for cell in NOTEBOOK.cells if "expect(" in cell.source and "outputs" in cell
    )


def numbers(text):
    """Decibels and percentages that a text states, as `expect` has them: "−6.2 dB" is -6.2."""
    found = re.findall(r"([−-]?\d+(?:\.\d+)?) (?:dB|%)", re.sub(r"```.*?```", "", text, flags=re.S))
    return [number.replace("−", "-") for number in found]


def stated(code):
    """What the calls of `expect` in a cell take the text to say."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "id", "") == "expect"]
    return {ast.literal_eval(call.args[2]) for call in calls}


def test_numbers_of_the_text_are_asserted():
    expected = set().union(*map(stated, CODE + solutions(NOTEBOOK)))
    lacking = [number for number in numbers(TEXT) if float(number) not in expected]
    assert not lacking, "no cell expects these"


def test_exercises():
    """Eight, each with its time, what to expect, a cell to start from and a folded solution."""
    parts = re.split(r"^### Exercise (\d)", TEXT, flags=re.M)[1:]
    assert parts[::2] == [str(number) for number in range(1, 9)]
    for text in parts[1::2]:
        assert re.search(r"\d+ s\b|\d+ min", text) and numbers(text) and SUMMARY in text
    assert len(solutions(NOTEBOOK)) == 8
    starts = [i for i, cell in enumerate(NOTEBOOK.cells) if cell.source.startswith("### Exercise")]
    assert all(NOTEBOOK.cells[i + 1].cell_type == "code" for i in starts)
    for block in solutions(NOTEBOOK):
        assert "expect(" in block


SUMMARY = "<summary>Solution</summary>"


def test_first_cell(tmp_path):
    """Where the scripts are it changes nothing; elsewhere it fetches them, and the badge shows the same place."""
    [place] = re.findall(r'^REPOSITORY = "https://github.com/(.*?)"', CODE[0], re.M)
    assert f"https://colab.research.google.com/github/{place}/blob/main/docs/lesson.ipynb" in TEXT
    look = "\nimport test\nprint(scripts, Path(test.__file__).parent)"
    fetched = re.sub(
        r'^REPOSITORY = ".*?"', f"REPOSITORY = {str(tmp_path / 'copy')!r}", CODE[0], flags=re.M
    )
    subprocess.run(["git", "clone", "--quiet", FOLDER, tmp_path / "copy"], check=True)
    (tmp_path / "class").mkdir()
    for code, cwd, expected in (
        (CODE[0], FOLDER / "docs", FOLDER),
        (CODE[0], FOLDER, FOLDER),
        (fetched, tmp_path / "class", tmp_path / "class" / "scripts"),
        (fetched, tmp_path / "class", tmp_path / "class" / "scripts"),  # a second time: a no-op
    ):
        # pip is left out: it would ask the index
        code = code.replace('"-m", "pip", "install"', '"-c", "pass"')
        done = subprocess.run(
            [sys.executable, "-c", code + look], cwd=cwd, capture_output=True, text=True
        )
        assert done.stdout.split() == [str(expected)] * 2, done.stderr
