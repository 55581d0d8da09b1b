"""Training examples per second, against openunmix 1.3.0's MUSDBDataset on the same songs: python benchmarks/data_loading.py

Six-second mixes of four sources from random tracks, with gain and channel swap, in one process. The songs are the real
excerpt that stempeg ships: its packets repeated to four minutes, as long as the songs of MUSDB18 (openunmix's ffmpeg decodes
a file from its start to the wanted place), and its six seconds as they are. Ours decodes stems to WAV once: that is a row of
its own. All files are in the system's cache.
"""

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from common import import_openunmix, main, peak_memory, timings

import numpy as np
import torch
from tests.conftest import EXCERPT

from data import AUGMENTATIONS, RandomMixes, find_data, index_musdb, synthesize_song

SECONDS = 6.083628  # of the excerpt
MEMORY = {
    "ours": """
from data import *
dataset = RandomMixes(index_musdb({root!r}, "train"), "vocals", 44100, augmentations=list(AUGMENTATIONS.values()))
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


def write_stems(root, repeats, tracks=4):
    """Stem files of the excerpt's own AAC packets, over and over."""
    (root / "train").mkdir(parents=True)
    command = ["ffmpeg", "-v", "error", "-stream_loop", str(repeats - 1), "-i", str(EXCERPT), "-map", "0:a", "-c", "copy"]
    for n in range(tracks):
        subprocess.run([*command, str(root / "train" / f"Track {n}.stem.mp4")], check=True)


def ours(root):
    return RandomMixes(index_musdb(root, "train"), "vocals", 44100, augmentations=list(AUGMENTATIONS.values()))


def theirs(root, is_wav):
    data = import_openunmix().data
    augment = data.aug_from_str(["gain", "channelswap"])
    return data.MUSDBDataset("vocals", str(root), is_wav=is_wav, random_track_mix=True, source_augmentations=augment)


def compare(name, our_dataset, their_dataset, quick):
    """Rates of two datasets in one process, measured in turn."""
    many, few, repeats = (100, 2, 2) if quick else (300, 4, 5)
    order = np.random.default_rng(0).integers(len(our_dataset), size=many).tolist()
    functions = [partial(read, our_dataset, order), partial(read, their_dataset, order[:few])]
    (our_time, spread), (their_time, _) = timings(*functions, repeats=repeats)
    rates = many / our_time, few / their_time
    target = "ratio >= 150" if "4-minute" in name else None
    return dict(
        name=name, ours=rates[0], theirs=rates[1], ratio=rates[0] / rates[1], unit="examples/s", spread=spread, target=target
    )


def read(dataset, indices):
    for index in indices:
        dataset[index % len(dataset)]


def with_workers(dataset, workers, quick):
    """The rate of batches of 16 that reach the training process."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=workers, persistent_workers=True)
    ((seconds, spread),) = timings(lambda: list(map(len, loader)), repeats=2 if quick else 5)
    name = f"batches of 16, {workers} workers" + f" (all {os.cpu_count()} cores)" * (workers == os.cpu_count())
    return dict(name=name, ours=len(dataset) // 16 * 16 / seconds, unit="examples/s", spread=spread)


def index_hundred(folder, root, quick):
    """Time to index a hundred tracks."""
    (folder / "train").mkdir(parents=True)
    for n in range(100):
        (folder / "train" / f"Track {n:03d}").symlink_to(root / "train" / "Track 0")
    functions = [partial(index_musdb, folder, "train")] + [partial(theirs, folder, True)] * (not quick)
    (seconds, spread), *other = timings(*functions, repeats=2)
    row = dict(name="index 100 tracks", ours=seconds, unit="s", spread=spread, target="< 1")
    return {**row, "theirs": other[0][0], "ratio": other[0][0] / seconds} if other else row


def measure(quick=False):
    with tempfile.TemporaryDirectory() as folder:
        return measure_in(Path(folder), quick)


def measure_in(folder, quick):
    import_openunmix()
    rows = []
    lengths = {"6-second excerpts": 1, "30-second songs" if quick else "4-minute songs": 5 if quick else 40}
    for name, repeats in lengths.items():
        stems = folder / name
        write_stems(stems, repeats)
        ((seconds, _),) = timings(partial(find_data, stems), repeats=1, warmup=0)
        root = find_data(stems)
        os.sync()  # what is written meanwhile takes time from what is measured
        rows.append(compare(f"{name}, stems", ours(root), theirs(stems, False), quick))
        rows.append(compare(f"{name}, WAV", ours(root), theirs(root, True), quick))
    rows += [with_workers(ours(root), workers, quick) for workers in sorted({2, os.cpu_count()})]
    rows.append(dict(name="stems to WAV, once", ours=4 * repeats * SECONDS / seconds, unit="x real time"))
    ((seconds, spread),) = timings(lambda: synthesize_song(0, 30.0), repeats=3)
    rows.append(dict(name="synthesizing songs", ours=30 / seconds, unit="x real time", spread=spread, target=">= 30"))
    rows.append(index_hundred(folder / "hundred", root, quick))
    peaks = {name: peak_memory(code.format(root=str(root), examples=5 if quick else 20))[0] for name, code in MEMORY.items()}
    rows.append(dict(name="peak memory, imports included", **peaks, ratio=peaks["theirs"] / peaks["ours"], unit="MB"))
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
