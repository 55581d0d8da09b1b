"""Training speed and memory against openunmix 1.3.0's dataset, model and loop: python benchmarks/training.py

Both train the published network for vocals with their defaults, batches of 16 random mixes of six seconds, on the same songs:
the real excerpt that stempeg ships, repeated to four minutes, as long as those of MUSDB18, as WAV. Each in one process of
its own, without loader processes on a CPU.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from common import FOLDER, import_openunmix, main, peak_memory, timings

import numpy as np
import soundfile
import torch

BATCH = 16
MEMORY = (
    "import sys; sys.path.insert(0, {folder!r}); import training; step = training.{whose}({root!r}); [step() for _ in range(3)]"
)


def write_songs(root, repeats, tracks=4):
    """The excerpt's sources, over and over, in musdb's WAV layout."""
    sys.path.insert(0, str(FOLDER / "tests"))
    from conftest import EXCERPT

    from data import decode_stem

    decode_stem(EXCERPT, root / "excerpt")
    for path in (root / "excerpt").glob("*.wav"):
        audio, rate = soundfile.read(path, dtype="int16")
        for n in range(tracks):
            folder = root / "train" / f"Track {n}"
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / path.name, np.tile(audio, (repeats, 1)), rate)


class Batches(list):
    """Batches in memory, in place of a DataLoader."""

    batch_sampler = argparse.Namespace(batch_size=BATCH, world=1)


def ours(root, device="cpu", batch=None):
    """A function that trains on `batch` once, or on the next batch of the songs: train.py's own code."""
    import train  # here only: data.py, which it imports, sets malloc to keep memory, in favour of the peer too
    from data import index_dataset, load_datasets

    args, _ = train.parse_args(["--root", str(root), "--is-wav", "--quiet", "--device", device])
    tracks = index_dataset(args)
    args.sample_rate, device = tracks[2], torch.device(device)
    network = train.make_network(args, None).to(device)
    optimizer = train.Training(args, "vocals", network, device).optimizer
    loader = train.make_loader(load_datasets(args, "vocals", tracks)[0], args, device)
    batches = itertools.repeat(batch) if batch else itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda steps=1: train.train(network, optimizer, Batches(itertools.islice(batches, steps)), args, device, "")


def theirs(root, device="cpu", batch=None):
    """The same for openunmix, after its scripts/train.py."""
    openunmix = import_openunmix()
    from openunmix import transforms

    augment = openunmix.data.aug_from_str(["gain", "channelswap"])
    dataset = openunmix.data.MUSDBDataset("vocals", str(root), is_wav=True, random_track_mix=True, source_augmentations=augment)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True)
    batches = itertools.repeat(batch) if batch else itertools.chain.from_iterable(itertools.repeat(loader))
    encoder = torch.nn.Sequential(transforms.make_filterbanks()[0], openunmix.model.ComplexNorm(mono=False)).to(device)
    network = openunmix.model.OpenUnmix(nb_bins=2049, max_bin=1487).to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001, weight_decay=1e-5)

    def run(steps=1):
        for x, y in itertools.islice(batches, steps):
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            X = encoder(x)
            Y_hat = network(X)
            Y = encoder(y)
            loss = torch.nn.functional.mse_loss(Y_hat, Y)
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def in_own_process(whose, *arguments):
    """What `ours` or `theirs` returns, to be called in a process where nothing else has run."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare, (whose, *arguments))
    return lambda: pool.submit(go).result()


def prepare(whose, root, in_memory):
    global go_on
    batch = tuple(0.1 * torch.randn(2, BATCH, 2, 264600)) if in_memory else None
    go_on = {"ours": ours, "theirs": theirs}[whose](root, batch=batch)


def go():
    go_on()


def row(name, examples, functions, repeats, target=None):
    (our_time, spread), (their_time, _) = timings(*functions, repeats=repeats)
    rates = examples / our_time, examples / their_time
    ratio = rates[0] / rates[1]
    return dict(name=name, ours=rates[0], theirs=rates[1], ratio=ratio, unit="examples/s", spread=spread, target=target)


def measure(quick=False):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_songs(root, repeats=2 if quick else 40)
        os.sync()  # what is written meanwhile takes time from what is measured
        steps = [in_own_process(whose, root, True) for whose in ("ours", "theirs")]
        rows.append(row("training: network step alone, CPU", BATCH, steps, 2 if quick else 7, "ratio >= 1.3"))
        steps = [in_own_process(whose, root, False) for whose in ("ours", "theirs")]
        rows.append(row("training: with data loading, CPU", BATCH, steps, 1 if quick else 5, "ratio >= 5"))
        here = str(Path(__file__).parent)
        peaks = [peak_memory(MEMORY.format(folder=here, root=folder, whose=whose))[0] for whose in ("ours", "theirs")]
        memory = dict(ours=peaks[0], theirs=peaks[1], ratio=peaks[0] / peaks[1], unit="MB", target="ratio <= 1")
        rows.append(dict(name="training: peak memory, CPU", **memory))
        if torch.cuda.is_available():
            rows += measure_cuda(root, 10 if quick else 50)
    return rows


def measure_cuda(root, steps):
    """On a GPU: against openunmix, and how much of the rate on data already on the card is left with loading."""

    def timed(run):
        run(steps)
        torch.cuda.synchronize()

    batch = tuple(0.1 * torch.randn(2, BATCH, 2, 264600, device="cuda"))
    with_loading, on_card = (partial(timed, ours(root, "cuda", data)) for data in (None, batch))
    examples, card = steps * BATCH, torch.cuda.get_device_name()
    peer = [on_card, partial(timed, theirs(root, "cuda", batch))]
    return [
        row(f"training: network step alone, {card}", examples, peer, 5),
        row(f"training: with loading against data on the card, {card}", examples, [with_loading, on_card], 5, "ratio >= 0.9"),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
