"""The first hour of somebody with a network: from nothing to a scored model, second by second.

    python benchmarks/first_run.py [--quick]

A data set of the shape of MUSDB18's sample (94 and 50 tracks of a few seconds as .stem.mp4, all of
them the excerpt that stempeg ships) is served from this machine; train.py fetches and decodes it,
trains, and test.py and eval.py follow, each command as the README has it. Scores mean nothing here:
test and training tracks are the same. What counts is that the time does not depend on how many
tracks there are, against synthesized songs without a network.
"""

import functools
import http.server
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

from common import FOLDER, main

TRACKS = {"train": 94, "test": 50}
# How lines of what train.py prints begin, and what has been done by then.
MARKS = (
    ("made once", "fetch"),
    ("training tracks", "decode or synthesize"),
    ("to beat", "statistics"),
)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def pack_sample(folder, quick):
    """A zip of train/*.stem.mp4 and test/*.stem.mp4 under the name of MUSDB18's sample."""
    shipped = Path(importlib.util.find_spec("stempeg").origin).parent / "data"
    excerpt = next(shipped.glob("*.stem.mp4"))
    with zipfile.ZipFile(folder / "MUSDB18-7-STEMS.zip", "w") as archive:
        for part, number in TRACKS.items():
            for n in range(number // 10 if quick else number):
                archive.write(excerpt, f"{part}/Artist {n:03d} - Title.stem.mp4")


def run(folder, environment, *command):
    """Run a script in `folder`; returns its lines, each with the second at which it came."""
    start, lines = time.perf_counter(), []
    script, *arguments = map(str, command)
    command = [sys.executable, "-u", str(FOLDER / script), *arguments]
    settings = dict(cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **settings, stderr=subprocess.DEVNULL) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
    if process.returncode:
        raise RuntimeError(f"{script}: exit code {process.returncode}: {lines[-3:]}")
    return lines, time.perf_counter() - start


def first_run(mirror, quick):
    """Rows of one first run, with everything in a new home folder."""
    what = "sample" if mirror else "offline"
    with tempfile.TemporaryDirectory() as folder:
        address = mirror or "http://127.0.0.1:9"  # nobody is there
        environment = {**os.environ, "HOME": folder, "OPENUNMIX_MIRROR": address}
        environment.pop("MUSDB_PATH", None)
        lines, seconds = run(folder, environment, "train.py", *["--epochs", 1] * quick)
        marks, before = [], 0.0
        for text, name in MARKS:
            now = max((when for when, line in lines if text in line), default=before)
            marks.append((name, now - before))
            before = now
        epochs = sum(" epoch " in line for _, line in lines)
        marks.append((f"{epochs} epochs", seconds - before))
        song = next(Path(folder).glob("MUSDB18/*/test/*/mixture.wav"))
        marks.append(("test.py", run(folder, environment, "test.py", song)[1]))
        marks.append(("eval.py", run(folder, environment, "eval.py")[1]))
    return [{"name": f"{what}: {name}", "ours": took, "unit": "s"} for name, took in marks]


def measure(quick=False):
    with tempfile.TemporaryDirectory() as folder:
        pack_sample(Path(folder), quick)
        handler = functools.partial(Handler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rows = first_run(f"http://127.0.0.1:{server.server_port}", quick)
        server.shutdown()
    return rows + first_run(None, quick)


if __name__ == "__main__":
    main(measure, __doc__, ("name", "ours", "unit"))
