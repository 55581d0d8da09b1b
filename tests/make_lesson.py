"""Runs docs/lesson.ipynb and keeps of its outputs what a reader on GitHub sees: text and pictures, no sound.

python tests/make_lesson.py writes them into the notebook. Edit it in Jupyter, then run this, then commit.
"""

import base64
import io
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

LESSON = Path(__file__).parents[1] / "docs" / "lesson.ipynb"
# A folded solution: <details><summary>...</summary>, a Python block, </details>.
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.S)


def read():
    return nbformat.read(LESSON, as_version=4)


def solutions(notebook):
    """The code that the text folds away, in order."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [block for source in cells for block in SOLUTION.findall(source)]


def execute(notebook, home):
    """Run all cells, in the notebook's own folder, as somebody whose home folder is `home`."""
    # beside other tests, threads that wait awake would slow the training tenfold
    environment = {**os.environ, "HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE"}
    resources = {"metadata": {"path": str(LESSON.parent)}}
    client = NotebookClient(notebook, timeout=1500, kernel_name="python3", resources=resources)
    client.execute(env=environment)  # raises CellExecutionError where a cell does
    return notebook


def in_32_colours(picture):
    """A PNG, in base64, in a third of its size: spectrograms hardly show it."""
    small = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(32).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def strip(notebook, home):
    """Keep printed text and PNG pictures: pages that play sound are made by who runs the lesson."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        kept = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                output.text = output.text.replace(str(home), "~")
                kept.append(output)
            elif "image/png" in output.get("data", {}):
                output.data = {"image/png": in_32_colours(output.data["image/png"])}
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    notebook.metadata.pop("language_info", None)
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(strip(execute(read(), folder), folder), LESSON)
    print(f"{LESSON}: {LESSON.stat().st_size / 1000:.0f} kB")
