"""Training speed and memory against openunmix 1.3.0's dataset, model and loop.

    python benchmarks/training.py [--quick]

Both train the published network for vocals with their defaults, batches of 16 random mixes of six
seconds, on the same songs: the real excerpt that stempeg ships, repeated to four minutes, as long
as those of MUSDB18, as WAV. Each in one process of its own, without loader processes on a CPU. The
published loader needs ffmpeg and ffprobe on PATH; without them only ours loads data.
"""

import itertools
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from common import import_openunmix, main, peak_memory, timings

import numpy as np
import soundfile
import torch

BATCH = 16
MEMORY = """
import sys
sys.path.insert(0, {folder!r})
import training
step = training.{whose}({root!r})
for _ in range(3):
    step()
"""


def write_songs(root, repeats, tracks=4):
    """The excerpt's sources, over and over, in musdb's WAV layout."""
    from tests.conftest import EXCERPT

    from data import decode_stem

    decode_stem(EXCERPT, root / "excerpt")
    for path in (root / "excerpt").glob("*.wav"):
        audio, rate = soundfile.read(path, dtype="int16")
        for n in range(tracks):
            folder = root / "train" / f"Track {n}"
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / path.name, np.tile(audio, (repeats, 1)), rate)


def random_batch(device="cpu", batch_size=BATCH):
    """A batch of mixtures and one of targets: (B, C, N) each, six seconds of noise."""
    noise = torch.randn(2, batch_size, 2, 264600, generator=torch.Generator().manual_seed(0))
    return tuple(0.1 * noise.to(device))


def ours(root, device="cpu", batch=None, flags=()):
    """A function that trains on `batch`, or on the next batches of the songs: train.py's code."""
    # here only: data.py, which it imports, sets malloc to keep memory, in favour of the peer too
    import train

    command = ["--root", root, "--is-wav", "--quiet", "--device", device, *flags]
    args, _ = train.parse_args(command)
    args.sample_rate, device = 44100, torch.device(device)
    network = train.new_network(args).to(device)
    state = train.make_state(network, args)
    if batch:
        batches = itertools.repeat(batch)
    else:
        tracks = train.index_tracks(args)
        train_set, _, _ = train.make_datasets(tracks, ["vocals"], args)
        loader = train.make_loader(train_set, args, device)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run(steps=1):
        train.train(network, state, list(itertools.islice(batches, steps)), args, device, "")

    return run


def theirs(root, device="cpu", batch=None):
    """The same for openunmix, after its scripts/train.py."""
    openunmix = import_openunmix()
    from openunmix import transforms

    augment = openunmix.data.aug_from_str(["gain", "channelswap"])
    settings = dict(is_wav=True, random_track_mix=True, source_augmentations=augment)
    if batch:
        batches = itertools.repeat(batch)
    else:
        dataset = openunmix.data.MUSDBDataset("vocals", str(root), **settings)
        loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
    magnitude = openunmix.model.ComplexNorm(mono=False)
    encoder = torch.nn.Sequential(transforms.make_filterbanks()[0], magnitude).to(device)
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
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, prepare, (whose, *arguments))
    return lambda: pool.submit(go).result()


def prepare(whose, root, in_memory):
    global go_on
    batch = random_batch() if in_memory else None
    go_on = {"ours": ours, "theirs": theirs}[whose](root, batch=batch)


def go():
    go_on()


def row(name, examples, functions, repeats, target=None):
    """Examples a second of ours and, where there is a second function, of the other."""
    (our_time, spread), *other = timings(*functions, repeats=repeats)
    values = dict(ours=examples / our_time, unit="examples/s", spread=spread, target=target)
    if other:
        values["theirs"] = examples / other[0][0]
        values["ratio"] = values["ours"] / values["theirs"]
    return dict(name=f"training: {name}", **values)


def measure(quick=False):
    rows, both = [], ("ours", "theirs")
    peer = shutil.which("ffmpeg") and shutil.which("ffprobe")
    loaders = both if peer else both[:1]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_songs(root, repeats=2 if quick else 40)
        os.sync()  # what is written meanwhile takes time from what is measured
        steps = [in_own_process(whose, root, True) for whose in both]
        step = "network step alone, CPU"
        rows.append(row(step, BATCH, steps, 2 if quick else 7, "ratio >= 1.3"))
        steps = [in_own_process(whose, root, False) for whose in loaders]
        loading = "with data loading, CPU"
        rows.append(row(loading, BATCH, steps, 1 if quick else 5, "ratio >= 5"))
        peaks = {}
        for whose in loaders:
            code = MEMORY.format(folder=str(Path(__file__).parent), root=folder, whose=whose)
            peaks[whose] = peak_memory(code)[0]
        ratio = peaks["ours"] / peaks["theirs"] if peer else None
        memory = dict(**peaks, ratio=ratio, unit="MB", target="ratio <= 1")
        rows.append(dict(name="training: peak memory, CPU", **memory))
        if torch.cuda.is_available():
            rows += measure_cuda(root, 10 if quick else 50)
    return rows


def measure_cuda(root, steps):
    """On a GPU: against openunmix, and how much of the rate is left with loading."""

    def timed(run):
        run(steps)
        torch.cuda.synchronize()

    batch = random_batch("cuda")
    with_loading, on_card = (partial(timed, ours(root, "cuda", data)) for data in (None, batch))
    examples, card = steps * BATCH, torch.cuda.get_device_name()
    peer = [on_card, partial(timed, theirs(root, "cuda", batch))]
    rows = [row(f"network step alone, {card}", examples, peer, 5)]
    name = f"with loading against data on the card, {card}"
    return rows + [row(name, examples, [with_loading, on_card], 5, "ratio >= 0.9")]


if __name__ == "__main__":
    main(measure, __doc__)
