"""Training examples per second, against openunmix 1.3.0's MUSDBDataset on the same songs.

    python benchmarks/data_loading.py [--quick]

Six-second mixes of four sources from random tracks, with gain and channel swap, in one process. The
songs are the real excerpt that stempeg ships: its packets repeated to four minutes, as long as the
songs of MUSDB18 (openunmix's ffmpeg decodes a file from its start to the wanted place), and its six
seconds as they are. Ours decodes stems to WAV once: that is a row of its own. All files are in the
system's cache. The published loader needs ffmpeg and ffprobe on PATH; without them only ours is
measured.
"""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from common import import_openunmix, main, peak_memory, timings

import av
import numpy as np
import torch
from tests.conftest import EXCERPT

from data import AUGMENTATIONS, RandomMixes, find_musdb, index_musdb, synthesize_song

SECONDS = 6.083628  # of the excerpt
MEMORY = {
    "ours": """
from data import *
augmentations = list(AUGMENTATIONS.values())
tracks = index_musdb({root!r}, "train")
dataset = RandomMixes(tracks, ["vocals"], 44100, augmentations=augmentations)
for i in range({examples}):
    dataset[i]
""",
    "theirs": """
import sys
sys.path.insert(0, "benchmarks")
from common import import_openunmix
data = import_openunmix().data
settings = dict(source_augmentations=data.aug_from_str(["gain", "channelswap"]))
dataset = data.MUSDBDataset("vocals", {root!r}, is_wav=True, random_track_mix=True, **settings)
for i in range({examples}):
    dataset[i]
""",
}


def write_stems(root, repeats, tracks=4):
    """Stem files of the excerpt's own AAC packets, over and over."""
    (root / "train").mkdir(parents=True)
    for n in range(tracks):
        with av.open(str(root / "train" / f"Track {n}.stem.mp4"), "w", format="mp4") as target:
            with av.open(str(EXCERPT)) as source:
                streams = source.streams.audio
                copies = {s.index: target.add_stream_from_template(s) for s in streams}
            for repeat in range(repeats):
                with av.open(str(EXCERPT)) as source:
                    for packet in source.demux(source.streams.audio):
                        if packet.dts is not None:
                            length = packet.stream.duration
                            packet.pts += repeat * length
                            packet.dts += repeat * length
                            packet.stream = copies[packet.stream.index]
                            target.mux(packet)


def ours(root):
    augmentations = list(AUGMENTATIONS.values())
    tracks = index_musdb(root, "train")
    return RandomMixes(tracks, ["vocals"], 44100, augmentations=augmentations)


def theirs(root, is_wav):
    module = import_openunmix().data
    augment = module.aug_from_str(["gain", "channelswap"])
    settings = dict(is_wav=is_wav, random_track_mix=True, source_augmentations=augment)
    return module.MUSDBDataset("vocals", str(root), **settings)


def compare(name, our_dataset, their_dataset, quick):
    """Rates of two data sets in one process, measured in turn."""
    many, few, repeats = (100, 2, 2) if quick else (300, 4, 5)
    order = np.random.default_rng(0).integers(len(our_dataset), size=many).tolist()
    functions = [partial(read, our_dataset, order)]
    if their_dataset:
        functions.append(partial(read, their_dataset, order[:few]))
    (our_time, spread), *other = timings(*functions, repeats=repeats)
    target = "ratio >= 100" if "4-minute" in name else None
    row = dict(name=name, ours=many / our_time, unit="examples/s", spread=spread, target=target)
    if other:
        row["theirs"] = few / other[0][0]
        row["ratio"] = row["ours"] / row["theirs"]
    return row


def read(dataset, indices):
    for index in indices:
        dataset[index % len(dataset)]


def with_workers(dataset, workers, quick):
    """The rate of batches of 16 that reach the training process."""
    settings = dict(batch_size=16, num_workers=workers, persistent_workers=True)
    loader = torch.utils.data.DataLoader(dataset, **settings)
    ((seconds, spread),) = timings(lambda: list(map(len, loader)), repeats=2 if quick else 5)
    cores = f" (all {os.cpu_count()} cores)" * (workers == os.cpu_count())
    rate = len(dataset) // 16 * 16 / seconds
    name = f"batches of 16, {workers} workers{cores}"
    return dict(name=name, ours=rate, unit="examples/s", spread=spread)


def index_hundred(folder, root, peer):
    """Time to index a hundred tracks."""
    (folder / "train").mkdir(parents=True)
    for n in range(100):
        (folder / "train" / f"Track {n:03d}").symlink_to(root / "train" / "Track 0")
    functions = [partial(index_musdb, folder, "train")] + [partial(theirs, folder, True)] * peer
    (seconds, spread), *other = timings(*functions, repeats=2)
    row = dict(name="index 100 tracks", ours=seconds, unit="s", spread=spread, target="< 1")
    return {**row, "theirs": other[0][0], "ratio": other[0][0] / seconds} if other else row


def freed_memory(dataset, quick):
    """What `keep_freed_memory` buys: this process has called it, so another one does without."""
    code = """
import time, data
from data import *
{change}
dataset = RandomMixes(index_musdb({root!r}, "train"), ["vocals"], 44100)
for i in range({end}):
    if i == 20:
        start = time.perf_counter()
    dataset[i]
print((time.perf_counter() - start) / ({end} - 20))
"""
    root = str(Path(dataset.tracks[0].mixture.path).parents[2])
    changes = {"ours": "", "theirs": "data.keep_freed_memory = lambda: None"}
    seconds = {}
    for side, change in changes.items():
        text = code.format(change=change, root=root, end=60 if quick else 220)
        seconds[side] = float(peak_memory(text)[1])
    ratio = seconds["theirs"] / seconds["ours"]
    rates = {side: 1 / value for side, value in seconds.items()}
    return dict(name="keep_freed_memory, against without", **rates, ratio=ratio, unit="examples/s")


def measure(quick=False):
    with tempfile.TemporaryDirectory() as folder:
        return measure_in(Path(folder), quick)


def measure_in(folder, quick):
    peer = bool(shutil.which("ffmpeg") and shutil.which("ffprobe"))
    if peer:
        import_openunmix()
    rows = []
    lengths = {"6-second excerpts": 1, "4-minute songs": 40}
    if quick:
        lengths = {"6-second excerpts": 1, "30-second songs": 5}
    for name, repeats in lengths.items():
        stems = folder / name
        write_stems(stems, repeats)
        ((seconds, _),) = timings(partial(find_musdb, stems), repeats=1, warmup=0)
        root = find_musdb(stems)
        os.sync()  # what is written meanwhile takes time from what is measured
        for kind, place in (("stems", stems), ("WAV", root)):
            other = theirs(place, kind == "WAV") if peer else None
            rows.append(compare(f"{name}, {kind}", ours(root), other, quick))
    rows += [with_workers(ours(root), workers, quick) for workers in sorted({2, os.cpu_count()})]
    speed = 4 * repeats * SECONDS / seconds
    rows.append(dict(name="stems to WAV, once", ours=speed, unit="x real time"))
    ((seconds, spread),) = timings(lambda: synthesize_song(0, 30.0), repeats=3)
    row = dict(name="synthesizing songs", ours=30 / seconds, spread=spread, target=">= 30")
    rows.append(dict(row, unit="x real time"))
    rows.append(index_hundred(folder / "hundred", root, peer and not quick))
    rows.append(freed_memory(ours(root), quick))
    examples = 5 if quick else 20
    peaks = {}
    for side, code in MEMORY.items():
        if side == "ours" or peer:
            peaks[side] = peak_memory(code.format(root=str(root), examples=examples))[0]
    row = dict(name="peak memory, imports included", **peaks, unit="MB")
    rows.append({**row, "ratio": peaks["theirs"] / peaks["ours"]} if peer else row)
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
