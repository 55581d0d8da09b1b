"""Training examples per second, against openunmix 1.3.0's MUSDBDataset on the same songs: python benchmarks/data_loading.py

Six-second mixes of four sources from random tracks, with gain and channel swap. The songs are copies of the real excerpt
that stempeg ships: short ones favour the other side, whose ffmpeg decodes each file from its start. Ours decodes stems to
WAV once, which is a row of its own, and all files are in the system's cache.
"""

import os
import shutil
import tempfile
from pathlib import Path

from common import import_openunmix, main, peak_memory, timings

import numpy as np
import torch
from tests.conftest import EXCERPT

from data import AUGMENTATIONS, RandomMixes, find_data, index_musdb

SETTINGS = dict(target="vocals", samples_per_track=64)
MEMORY = {
    "ours": """
from data import *
tracks = index_musdb({root!r}, "train")
dataset = RandomMixes(tracks, "vocals", 44100, augmentations=list(AUGMENTATIONS.values()))
for i in range({examples}):
    dataset[i]
""",
    "theirs": """
import sys
sys.path.insert(0, "benchmarks")
from common import import_openunmix
data = import_openunmix().data
augment = data.aug_from_str(["gain", "channelswap"])
dataset = data.MUSDBDataset("vocals", {root!r}, is_wav=True, random_track_mix=True, source_augmentations=augment)
for i in range({examples}):
    dataset[i]
""",
}


def random_mixes(root):
    tracks = index_musdb(root, "train")
    return RandomMixes(tracks, **SETTINGS, sample_rate=44100, augmentations=list(AUGMENTATIONS.values()))


def published(root, is_wav):
    data = import_openunmix().data
    augment = data.aug_from_str(["gain", "channelswap"])
    return data.MUSDBDataset(root=str(root), is_wav=is_wav, random_track_mix=True, source_augmentations=augment, **SETTINGS)


def one_process(name, ours, theirs, quick):
    """Rates of two datasets, measured in turn: as many examples of ours as take about as long as one of theirs."""
    many, few, repeats = (100, 1, 2) if quick else (400, 4, 5)
    order = np.random.default_rng(0).integers(len(ours), size=many)
    (our_time, spread), (their_time, _) = timings(
        lambda: [ours[int(i)] for i in order], lambda: [theirs[int(i) % len(theirs)] for i in order[:few]], repeats=repeats
    )
    rates = many / our_time, few / their_time
    return dict(name=name, ours=rates[0], theirs=rates[1], ratio=rates[0] / rates[1], unit="examples/s", spread=spread, target="ratio >= 150")


def with_workers(dataset, workers, quick):
    """The rate of batches of 16 that reach the training process."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=workers, persistent_workers=True)
    seconds, spread = timings(lambda: [None for _ in loader], repeats=2 if quick else 5)[0]
    name = f"batches of 16, {workers} workers" + f" (all {os.cpu_count()} cores)" * (workers == os.cpu_count())
    return dict(name=name, ours=len(dataset) / seconds, unit="examples/s", spread=spread)


def measure(quick=False):
    with tempfile.TemporaryDirectory() as folder:
        return measure_in(Path(folder), quick)


def measure_in(folder, quick):
    stems = folder / "stems"
    for n in range(4):
        for subset in ("train", "test"):
            (stems / subset).mkdir(parents=True, exist_ok=True)
            shutil.copy(EXCERPT, stems / subset / f"Track {n}.stem.mp4")
    songs, minutes = 8, 8 * 6 / 60
    (decoding, spread), = timings(lambda: find_data(stems, cache=tempfile.mkdtemp(dir=folder)), repeats=1 if quick else 3, warmup=0)
    root = find_data(stems)
    ours = random_mixes(root)
    rows = [
        one_process("one process, from stems", ours, published(stems, False), quick),
        one_process("one process, from WAV", ours, published(root, True), quick),
        *(with_workers(ours, workers, quick) for workers in sorted({2, os.cpu_count()})),
        dict(name="decoding stems to WAV, once", ours=songs * 6 / decoding, unit="x real time", spread=spread),
    ]

    hundred = folder / "hundred"
    (hundred / "train").mkdir(parents=True)
    for n in range(100):
        (hundred / "train" / f"Track {n:03d}").symlink_to(root / "train" / "Track 0")
    functions = [lambda: index_musdb(hundred, "train")] + [lambda: published(hundred, True)] * (not quick)
    (seconds, spread), *others = timings(*functions, repeats=2)
    others = others[0][0] if others else None
    rows.append(dict(name="index 100 tracks", ours=seconds, theirs=others, unit="s", spread=spread, target="< 1"))
    if others:
        rows[-1]["ratio"] = others / seconds

    peaks = {name: peak_memory(code.format(root=str(root), examples=5 if quick else 20))[0] for name, code in MEMORY.items()}
    rows.append(dict(name="peak memory, imports included", **peaks, ratio=peaks["theirs"] / peaks["ours"], unit="MB"))
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
