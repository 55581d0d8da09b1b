"""Live separation (docs/live.py) by one core: how late stems come, and how busy the core is.

    python benchmarks/live_separation.py [--quick]

A causal model (unidirectional, hidden size 512, 44.1 kHz, random weights, which cost as much as
trained ones) gets blocks of 1024 samples, 23.2 ms each, from the real excerpt. Load is the CPU time
for a block over its length: below 100 % it keeps up.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import FOLDER, import_openunmix, main

import_openunmix()

import torch  # noqa: E402
from separation import excerpt, row  # noqa: E402
from tests.conftest import random_network, sdr  # noqa: E402

from model import Separator  # noqa: E402

sys.path.append(str(FOLDER / "docs"))
from live import live  # noqa: E402

TARGETS = ("vocals", "drums", "bass", "other")
BLOCK, RATE = 1024, 44100


def measure(quick=False):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tracks, _ = excerpt(Path(folder))
    audio = tracks["mixture"][:, : BLOCK * (40 if quick else 240)]  # (2, N)
    size = 64 if quick else 512
    rows = []
    for targets in (TARGETS[:1], TARGETS):
        networks = {
            name: random_network(j, hidden_size=size, unidirectional=True)
            for j, name in enumerate(targets)
        }
        separator, blocks = Separator(networks, niter=0), audio.split(BLOCK, -1)
        given, done, waiting, seconds, stems = 0, 0, [], [], []

        def arriving():
            nonlocal given
            for block in blocks:
                given += block.shape[-1]
                yield block

        used = time.process_time()
        start = time.perf_counter()
        for part in live(separator, arriving()):
            now = time.perf_counter()
            seconds.append(now - start)
            stems.append(part)
            if given < audio.shape[-1]:
                waiting.append(given - done)  # the oldest sample that comes out now
            done += part.shape[-1]
            start = time.perf_counter()
        load = 100 * (time.process_time() - used) * RATE / audio.shape[-1]
        seconds = sorted(
            seconds[5:-5]
        )  # without the first blocks, and the end, which waits for none
        median, slowest = statistics.median(seconds), seconds[int(0.99 * len(seconds))]
        what = f"live, {len(targets)} target{'s' * (len(targets) > 1)}"
        late = max(waiting) / RATE
        rows.append(
            row(f"{what}: from a sample in to its stems", 1000 * (late + slowest), unit="ms")
        )
        rows.append(
            row(f"{what}: a block of {1000 * BLOCK / RATE:.1f} ms", 1000 * median, unit="ms")
        )
        rows.append(row(f"{what}: 99 of 100 blocks within", 1000 * slowest, unit="ms"))
        rows.append(row(f"{what}: load of one core", load, unit="%"))
        with torch.inference_mode():
            offline = separator(audio[None])[0]
        agreement = sdr(offline, torch.cat(stems, dim=-1))
        rows.append(row(f"{what}: against offline", agreement, unit="dB", target="90 dB"))
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
