"""Scoring a track with BSS Eval: our time, memory and numbers against museval's.

    python benchmarks/evaluation.py [--quick]

One synthesized song of three minutes (--quick: 30 seconds), four stereo sources and imperfect
estimates of them. Each side runs in a process of its own with two threads, reads the references
from WAV files and returns museval's JSON.
"""

import json
import tempfile
from pathlib import Path

from common import main, peak_memory

import numpy as np
import soundfile

from data import synthesize_song
from eval import METRICS
from utils import SOURCES

SETUP = """
import os
os.environ.update(OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2")
import json, statistics, time
import numpy as np
import torch
torch.set_num_threads(2)
import utils
museval = utils.import_museval()
estimates = dict(np.load({folder!r} + "/estimates.npz"))
"""
OURS = """
from data import index_musdb, read_as
from eval import score
from pathlib import Path
[track] = index_musdb(Path({folder!r}), "test")
seconds = []
for _ in range({repeats}):
    start = time.perf_counter()
    sources, length = track.sources, track.mixture.length
    references = {{name: read_as(sources[name], 0, length, 44100, 2) for name in estimates}}
    targets = score(references, estimates, 44100)
    seconds.append(time.perf_counter() - start)
spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
print(json.dumps([statistics.median(seconds), spread, targets]))
"""
THEIRS = """
import types
import soundfile

class Target:  # as musdb's, which asks ffprobe for every file
    def __init__(self, name):
        self.path = {folder!r} + "/test/Song/" + name + ".wav"

    @property
    def audio(self):
        return soundfile.read(self.path)[0]

targets = {{name: Target(name) for name in utils.SOURCES}}
track = types.SimpleNamespace(name="Song", subset="test", rate=44100, targets=targets)
start = time.perf_counter()
scores = museval.eval_mus_track(track, {{name: stem.T for name, stem in estimates.items()}})
seconds = time.perf_counter() - start
print(json.dumps([seconds, 0, json.loads(scores.json)["targets"]]))
"""


def make_data(folder, seconds):
    """A track in musdb's layout, and estimates with leakage, filtering and noise."""
    stems = {name: stem.T for name, stem in synthesize_song(0, seconds).items()}  # (C, N)
    (folder / "test" / "Song").mkdir(parents=True)
    mixture, rng = sum(stems.values()), np.random.default_rng(0)
    for name, stem in {"mixture": mixture, **stems}.items():
        soundfile.write(folder / "test" / "Song" / f"{name}.wav", stem.T, 44100, subtype="PCM_16")
    estimates = {}
    for name in SOURCES:
        filtered = 0.8 * stems[name] + 0.2 * np.roll(stems[name], 3, axis=1)
        estimates[name] = (
            filtered
            + 0.1 * (mixture - stems[name])
            + 1e-3 * rng.standard_normal(mixture.shape, np.float32)
        )
    np.savez(folder / "estimates.npz", **estimates)


def frames(targets):
    """museval's JSON -> (targets, frames, metrics)"""
    rows = [[frame["metrics"] for frame in target["frames"]] for target in targets]
    return np.array([[[row[m] for m in METRICS] for row in target] for target in rows], float)


def measure(quick=False):
    seconds = 30 if quick else 180
    memory, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), seconds)
        for code in (OURS, THEIRS):
            peak, output = peak_memory((SETUP + code).format(folder=folder, repeats=3))
            memory.append(peak)
            results.append(json.loads(output.splitlines()[-1]))
    (ours, spread, our_targets), (theirs, _, their_targets) = results
    a, b = frames(our_targets), frames(their_targets)
    assert [t["name"] for t in our_targets] == [t["name"] for t in their_targets]
    assert (np.isnan(a) == np.isnan(b)).all()
    difference = float(np.nanmax(np.abs(a - b)))
    name = f"BSS Eval of {seconds} s, four sources"
    time = {"ours": ours, "theirs": theirs, "ratio": theirs / ours, "unit": "s", "spread": spread}
    size = {"ours": memory[0], "theirs": memory[1], "ratio": memory[1] / memory[0], "unit": "MB"}
    return [
        {"name": name, **time, "target": "at least 10 times"},
        {"name": f"{name}: peak memory", **size, "target": "no more"},
        {
            "name": f"{name}: largest difference",
            "ours": difference,
            "unit": "dB",
            "target": "at most 0.001",
        },
    ]


if __name__ == "__main__":
    main(measure, __doc__)
