"""Separation against openunmix and norbert: time and memory with the same weights, and its parts.

    python benchmarks/separation.py [--quick] [--device cuda]

A 3-minute stereo song, four targets (hidden 512), one Wiener iteration, two threads: from the model
folder and a WAV file to four WAV files, each run in a process of its own. The weights are random,
which costs as much as trained ones. On a GPU the same, from files to files too, with the largest
memory that PyTorch had taken there. Those rows have not been run on one by their authors.
"""

import ast
import tempfile
from functools import partial
from pathlib import Path

from common import import_openunmix, main, median_and_spread, peak_memory, timings

import_openunmix()

import norbert  # noqa: E402
import numpy as np  # noqa: E402
import openunmix  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from tests.conftest import EXCERPT, make_model, read_tracks, sdr  # noqa: E402

from data import decode_stem  # noqa: E402
from model import stft, wiener  # noqa: E402

TARGETS = ("vocals", "drums", "bass", "other")
OURS = """
import time, torch
torch.set_num_threads(2)
import test
flags = ["--model", {folder!r}, "--outdir", {outdir!r}, "--overwrite", "--quiet"]
torch.zeros(1, device={device!r})  # starts CUDA
start = time.perf_counter()
code = test.main([{song!r}, *flags, "--device", {device!r}, *{flags!r}])
seconds = time.perf_counter() - start
assert not code, code
print(seconds, torch.cuda.max_memory_allocated() / 1e6)
"""
THEIRS = """
import sys, time, torch
torch.set_num_threads(2)
sys.path.insert(0, "benchmarks")
import common
common.import_openunmix()
import openunmix, soundfile
device, niter = {device!r}, {niter}
torch.zeros(1, device=device)
start = time.perf_counter()
settings = dict(targets={targets!r}, niter=niter, wiener_win_len=300, device=device)
separator = openunmix.utils.load_separator({folder!r}, **settings).to(device).eval()
audio, rate = soundfile.read({song!r}, dtype="float32", always_2d=True)
with torch.no_grad():
    estimates = separator(torch.from_numpy(audio.T.copy())[None].to(device))[0].cpu()
for target, estimate in zip({targets!r}, estimates):
    path = {outdir!r} + "/" + target + ".wav"
    soundfile.write(path, estimate.T.numpy(), rate, subtype="FLOAT")
print(time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e6)
"""
PARTS = """
import collections, time, model, test
spent = collections.Counter()
def watch(owner, name, part, threads=1):
    function = getattr(owner, name)
    def watched(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[part] += (time.perf_counter() - start) / threads
        return result
    setattr(owner, name, watched)
parts = {"encode": "encode: fc1", "join": "fc2", "decode": "decode: fc3 and mask"}
for name, part in parts.items():
    watch(model.OpenUnmix, name, part, threads=2)  # two targets at a time
watch(model, "run_lstm", "LSTM", threads=2)
watch(model.Separator, "filter", "Wiener filter")
watch(model, "stft", "STFT, twice")
watch(model, "magnitude", "magnitudes, twice")
watch(model, "istft", "inverse STFT")
watch(test.Stem, "write", "writing")
"""


def run(code, timeout, device="cpu", **values):
    """(seconds, peak memory in MB), on a GPU its own, of a script that ends by printing both."""
    peak, output = peak_memory(code.format(device=device, **values), timeout)
    seconds, card = map(float, output.splitlines()[-1].split())
    return seconds, peak if device == "cpu" else card


def row(name, ours, theirs=None, unit="s", spread=None, target=None):
    ratio = theirs and theirs / ours
    values = dict(ours=ours, theirs=theirs, ratio=ratio, unit=unit, spread=spread, target=target)
    return dict(name=name, **values)


def write_song(path, mixture, minutes):
    """The excerpt's mixture (N, 2), 16 bit, over and over."""
    with soundfile.SoundFile(path, "w", 44100, 2, "PCM_16") as file:
        left, piece = round(minutes * 60 * 44100), np.resize(mixture, (60 * 44100, 2))
        while left:
            file.write(piece[:left])
            left -= min(left, len(piece))


def excerpt(folder):
    """Its tracks {name: (2, N)}, and its mixture as 16-bit integers (N, 2)."""
    decode_stem(EXCERPT, folder / "tracks")
    tracks = read_tracks(folder / "tracks")
    return tracks, (tracks["mixture"].T.numpy() * 32767).astype(np.int16)


def song_rows(folder, mixture, quick):
    """Whole songs through files: time, memory, bfloat16."""
    repeats, timeout, minutes = (1, 300, 0.2) if quick else (3, 1800, 3)
    song = str(folder / "song.wav")
    model = str(make_model(folder / "model", hidden_size=64 if quick else 512))
    write_song(song, mixture, minutes)
    values = dict(song=song, folder=model, targets=TARGETS, niter=1)
    (folder / "theirs").mkdir()
    runs = {"float32": (OURS, "ours", []), "openunmix": (THEIRS, "theirs", [])}
    runs["bfloat16"] = (OURS, "amp", ["--amp"])
    measured = {}
    for _ in range(repeats):  # in turn, so that a busy moment hits all alike
        for name, (code, outdir, flags) in runs.items():
            pair = run(code, timeout, outdir=str(folder / outdir), flags=flags, **values)
            measured.setdefault(name, []).append(pair)
    times = {name: median_and_spread([pair[0] for pair in measured[name]]) for name in measured}
    peak = {name: max(pair[1] for pair in measured[name]) for name in measured}
    (ours, spread), (theirs, _), (amp, amp_spread) = times.values()
    what = f"{minutes:g}-minute song to four WAV files"
    yield row(what, ours, theirs, spread=spread, target="2.5 times")
    yield row("peak memory of it", peak["float32"], peak["openunmix"], "MB", target="1200 MB")
    yield row("the same with --amp", amp, theirs, spread=amp_spread)
    stems = {}
    for name in ("ours/song", "amp/song", "theirs"):
        paths = [folder / name / f"{target}.wav" for target in TARGETS]
        stems[name] = [soundfile.read(path)[0] for path in paths]
    reference = stems.pop("ours/song")
    agreement = {name: min(map(sdr, stems[name], reference)) for name in stems}
    yield row("its stems against openunmix's", agreement["theirs"], unit="dB")
    against = "its stems with --amp against float32"
    yield row(against, agreement["amp/song"], unit="dB", target="40 dB")
    code = PARTS.replace("{", "{{").replace("}", "}}") + OURS + "print(dict(spent))"
    code = code.format(outdir=str(folder / "ours"), flags=[], device="cpu", **values)
    _, output = peak_memory(code, timeout)
    for part, seconds in ast.literal_eval(output.splitlines()[-1]).items():
        yield row(f"of ours: {part}", seconds)


def long_song_row(folder, mixture, device="cpu"):
    """An hour of music."""
    write_song(folder / "hour.wav", mixture, 60)
    values = dict(song=str(folder / "hour.wav"), folder=str(folder / "model"))
    seconds, peak = run(OURS, 3600, device, outdir=str(folder / "hour"), flags=[], **values)
    target = "4000 MB" if device == "cpu" else "2000 MB beyond the networks"
    yield row("60-minute song to four WAV files", seconds)
    yield row("peak memory of it", peak, unit="MB", target=target)


def card_rows(folder, tracks, mixture, quick, device="cuda"):
    """On a GPU: a song without and with the Wiener filter, an hour of music, one window."""
    repeats, minutes = (1, 0.2) if quick else (5, 3)
    model = str(make_model(folder / "model", hidden_size=64 if quick else 512))
    values = dict(song=str(folder / "song.wav"), folder=model, targets=TARGETS)
    write_song(values["song"], mixture, minutes)
    (folder / "theirs").mkdir(exist_ok=True)
    for niter in (0, 1):
        measured = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for whose, code in (("ours", OURS), ("theirs", THEIRS)):
                flags, outdir = ["--niter", str(niter)], str(folder / whose)
                settings = dict(niter=niter, outdir=outdir, flags=flags, **values)
                measured[whose].append(run(code, 600, device, **settings))
        seconds, peaks = ({w: [p[i] for p in measured[w]] for w in measured} for i in (0, 1))
        (ours, spread), (theirs, _) = (median_and_spread(seconds[whose]) for whose in measured)
        what = f"{minutes:g}-minute song to four WAV files, niter {niter}, {device}"
        yield row(what, ours, theirs, spread=spread, target="3 times")
        yield row("memory of it on the card", *map(max, peaks.values()), unit="MB")
    run(OURS, 1800, outdir=str(folder / "cpu"), flags=[], niter=1, **values)
    reference, *others = (
        [soundfile.read(folder / place / f"{target}.wav")[0] for target in TARGETS]
        for place in ("ours/song", "cpu/song", "theirs")
    )
    for whose, stems in zip(("the CPU's", "openunmix's"), others):
        agreement = min(map(sdr, stems, reference))
        yield row(f"its stems against {whose}", agreement, unit="dB", target="60 dB")
    yield card_wiener_row(tracks, quick, device)
    if not quick:
        yield from long_song_row(folder, mixture, device)


def spectra_of(tracks, frames=300):
    """Magnitudes of four estimates (J, C, F, T) and the mixture's spectrum (C, F, T)."""
    spectra = {name: stft(audio.repeat(1, 2))[..., :frames] for name, audio in tracks.items()}
    V = torch.stack([spectra[target].abs() for target in TARGETS])  # (J, C, F, T)
    noise = torch.rand(V.shape, generator=torch.Generator().manual_seed(0))
    return V * (0.3 + noise), spectra["mixture"]


def card_wiener_row(tracks, quick, device):
    """The filter on a GPU, ours and openunmix's."""
    V, X = (x.to(device) for x in spectra_of(tracks))
    v32 = V.permute(3, 2, 1, 0).contiguous()  # (T, F, C, J)
    x32 = torch.view_as_real(X.permute(2, 1, 0).contiguous())

    def timed(function, *inputs):
        function(*inputs, 1)
        if device == "cuda":
            torch.cuda.synchronize()

    runs = (
        partial(timed, wiener, V[None], X[None]),
        partial(timed, openunmix.filtering.wiener, v32, x32),
    )
    with torch.no_grad():
        (ours, spread), (theirs, _) = timings(*runs, repeats=1 if quick else 20, warmup=3)
    name = f"Wiener filter, 300 frames, openunmix's, {device}"
    return row(name, ours, theirs, spread=spread, target="3 times")


def wiener_rows(tracks, quick):
    """One pass of the filter over one window of 300 frames, four sources, real spectra."""
    V, X = spectra_of(tracks)
    v32 = V.permute(3, 2, 1, 0).contiguous()  # (T, F, C, J)
    x32 = torch.view_as_real(X.permute(2, 1, 0).contiguous())
    v64, x64 = v32.double().numpy(), torch.view_as_complex(x32.double()).numpy()
    torch.set_num_threads(2)

    def ours():
        wiener(V[None], X[None])

    def of_norbert():
        norbert.wiener(v64, x64.copy(), 1, use_softmask=False)

    def of_openunmix(threads):
        torch.set_num_threads(threads)
        openunmix.filtering.wiener(v32, x32, 1)
        torch.set_num_threads(2)

    on_two, on_one = lambda: of_openunmix(2), lambda: of_openunmix(1)
    with torch.no_grad():
        times = timings(ours, of_norbert, on_two, on_one, repeats=1 if quick else 9)
    (seconds, spread), norbert_seconds = times[0], times[1][0]
    best = min(times[2][0], times[3][0])  # whichever suits it
    name = "Wiener filter, 300 frames"
    yield row(f"{name}, norbert's", seconds, norbert_seconds, spread=spread, target="4 times")
    yield row(f"{name}, openunmix's", seconds, best, spread=spread, target="2.5 times")


def measure(quick=False, device=None):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tracks, mixture = excerpt(folder)
        if device != "cuda":
            rows += wiener_rows(tracks, quick)
            rows += song_rows(folder, mixture, quick)
            if not quick:
                rows += long_song_row(folder, mixture)
        if device == "cuda" or (device is None and torch.cuda.is_available()):
            rows += card_rows(folder, tracks, mixture, quick)
    return rows


if __name__ == "__main__":
    main(measure, __doc__, devices=("cpu", "cuda"))
