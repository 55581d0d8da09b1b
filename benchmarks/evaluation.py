"""Scoring a track with BSS Eval: our time, memory and numbers against museval's: python benchmarks/evaluation.py [--quick]

One synthesized song of three minutes (--quick: 30 seconds), four stereo sources and imperfect estimates of them. Each side
runs in processes of its own with two threads, reads the references from WAV files and returns museval's JSON.
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
utils.use_ffmpeg()
import musdb
import museval
estimates = dict(np.load({folder!r} + "/estimates.npz"))
"""
OURS = """
from data import index_musdb, read_as
from eval import score
[track] = index_musdb({folder!r}, "test")
seconds = []
for _ in range({repeats}):
    start = time.perf_counter()
    references = {{name: read_as(track.sources[name], 0, track.mixture.length, 44100, 2) for name in estimates}}
    targets = score(references, estimates, 44100)
    seconds.append(time.perf_counter() - start)
spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
print(json.dumps([statistics.median(seconds), spread, targets]))
"""
THEIRS = """
[track] = musdb.DB(root={folder!r}, is_wav=True, subsets=["test"]).tracks
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
        estimates[name] = filtered + 0.1 * (mixture - stems[name]) + 1e-3 * rng.standard_normal(mixture.shape, np.float32)
    np.savez(folder / "estimates.npz", **estimates)


def frames(targets):
    """museval's JSON -> (targets, frames, metrics)"""
    return np.array([[list(map(frame["metrics"].get, METRICS)) for frame in target["frames"]] for target in targets], float)


def measure(quick=False):
    seconds = 30 if quick else 180
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), seconds)
        memory, outputs = zip(*(peak_memory((SETUP + code).format(folder=folder, repeats=3)) for code in (OURS, THEIRS)))
    (ours, spread, our_targets), (theirs, _, their_targets) = (json.loads(output.splitlines()[-1]) for output in outputs)
    a, b = frames(our_targets), frames(their_targets)
    assert [t["name"] for t in our_targets] == [t["name"] for t in their_targets] and (np.isnan(a) == np.isnan(b)).all()
    name, difference = f"BSS Eval of {seconds} s, four sources", float(np.nanmax(np.abs(a - b)))
    less = memory[1] / memory[0]
    return [
        dict(name=name, ours=ours, theirs=theirs, ratio=theirs / ours, unit="s", spread=spread, target="at least 6 times"),
        dict(name=f"{name}: peak memory", ours=memory[0], theirs=memory[1], ratio=less, unit="MB", target="no more"),
        dict(name=f"{name}: largest difference", ours=difference, unit="dB", target="at most 0.001"),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
