"""Training speed and memory against openunmix 1.3.0's dataset, model and loop.

    python benchmarks/training.py [--quick] [--device cuda]

Both train the published network for vocals with their defaults, batches of 16 random mixes of six
seconds, on the same songs: the real excerpt that stempeg ships, repeated to four minutes, as long
as those of MUSDB18, as WAV. Each in one process of its own, without loader processes on a CPU. The
published loader needs ffmpeg and ffprobe on PATH; without them only ours loads data.

On a GPU also: the step in three precisions, the rate with loading against that on data which is
already on the card, and seconds per epoch of the published recipe on as many songs as MUSDB18 has.
The rows for a GPU have not been run on one by their authors.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from common import import_openunmix, main, peak_memory, timings

import numpy as np
import soundfile
import torch

BATCH = 16
LARGEST = 256  # examples in a batch: what the loader's processes hold ready then takes 18 GB
SONGS = 100  # of MUSDB18's train/, of which 14 are for validation
PRECISIONS = {  # name: flags of ours, TF32
    "float32": ([], False),
    "TF32": ([], True),
    "bfloat16": (["--amp"], True),
}
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
    args.sample_rate, device = 44100, train.set_up(args)
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


def theirs(root, device="cpu", batch=None, amp=False):
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
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                Y_hat = network(X)
            Y = encoder(y)
            loss = torch.nn.functional.mse_loss(Y_hat.float(), Y)
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


def measure(quick=False, device=None):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_songs(root, repeats=2 if quick else 40)
        os.sync()  # what is written meanwhile takes time from what is measured
        rows = [] if device == "cuda" else measure_cpu(root, quick)
        if device == "cuda" or (device is None and torch.cuda.is_available()):
            rows += measure_cuda(root, quick)
    return rows


def measure_cpu(root, quick):
    rows, both = [], ("ours", "theirs")
    peer = shutil.which("ffmpeg") and shutil.which("ffprobe")
    loaders = both if peer else both[:1]
    steps = [in_own_process(whose, root, True) for whose in both]
    rows.append(row("network step alone, CPU", BATCH, steps, 2 if quick else 7, "ratio >= 1.3"))
    steps = [in_own_process(whose, root, False) for whose in loaders]
    rows.append(row("with data loading, CPU", BATCH, steps, 1 if quick else 5, "ratio >= 5"))
    peaks = {}
    for whose in loaders:
        code = MEMORY.format(folder=str(Path(__file__).parent), root=str(root), whose=whose)
        peaks[whose] = peak_memory(code)[0]
    ratio = peaks["ours"] / peaks["theirs"] if peer else None
    memory = dict(**peaks, ratio=ratio, unit="MB", target="ratio <= 1")
    return rows + [dict(name="training: peak memory, CPU", **memory)]


def measure_cuda(root, quick, device="cuda"):
    """On a GPU: against openunmix, how much of the rate is left with loading, a whole epoch."""
    steps, repeats, rows = (3, 1, []) if quick else (50, 5, [])
    card = torch.cuda.get_device_name() if device == "cuda" else device

    def timed(run, steps):
        run(steps)
        if device == "cuda":
            torch.cuda.synchronize()

    def rates(name, size, runs, target=None):
        count = max(2, steps * BATCH // size)
        runs = [partial(timed, run, count) for run in runs]
        rows.append(row(f"{name}, {card}", count * size, runs, repeats, target))

    for name, (flags, tf32) in PRECISIONS.items():
        batch, amp = random_batch(device), bool(flags)
        with products_in_tf32(tf32):
            runs = [ours(root, device, batch, flags), theirs(root, device, batch, amp)]
            rates(f"network step alone, {name}", BATCH, runs)
    with products_in_tf32(True):
        for size in dict.fromkeys((BATCH, largest_batch(root, device, 2 if quick else LARGEST))):
            # as many examples an epoch as of MUSDB18: loading starts anew with each
            flags = ["--batch-size", size, "--samples-per-track", 64 * SONGS // 3]
            runs = [
                ours(root, device, batch, flags) for batch in (None, random_batch(device, size))
            ]
            name = f"with loading against data on the card, batches of {size}"
            rates(name, size, runs, "ratio >= 0.9")
    return rows + list(epoch_rows(root, quick, device, card))


@contextlib.contextmanager
def products_in_tf32(wanted):
    """Let a GPU compute everything in TF32 that it can, as train.py does, or nothing."""
    cudnn, kept = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = wanted
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    yield
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.set_float32_matmul_precision(kept)


def largest_batch(root, device, limit):
    """The largest power of two of examples, up to `limit`, of which one step fits on the card."""
    size = 1
    while size < limit:
        try:
            ours(root, device, random_batch(device, 2 * size))(1)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        size *= 2
    return size


def epoch_rows(root, quick, device, card):
    """The published recipe on as many songs as MUSDB18 has: the same one under many names."""
    import train
    from utils import load

    songs, source = 8 if quick else SONGS, root / "train" / "Track 0"
    for n in range(songs):
        folder = root / "many" / "train" / f"Song {n:03}"
        folder.mkdir(parents=True)
        for path in source.glob("*.wav"):
            os.link(path, folder / path.name)
    flags = ["--root", root / "many", "--is-wav", "--device", device, "--output", root / "model"]
    flags += ["--samples-per-track", 2] if quick else []
    train.main([*flags, "--epochs", 2 if quick else 4, "--quiet"])
    seconds = statistics.median(load(root / "model" / "vocals.json")["train_time_history"][1:])
    name = f"training: an epoch of the published recipe, {card}"
    yield dict(name=name, ours=seconds, unit="s", target="80 s (published, RTX 2080 Ti)")
    name = "training: 1000 epochs of it for four targets"
    yield dict(name=name, ours=4 * 1000 * seconds / 3600, unit="h")


if __name__ == "__main__":
    main(measure, __doc__, devices=("cpu", "cuda"))
