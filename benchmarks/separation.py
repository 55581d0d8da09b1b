"""Separation against openunmix and norbert: time and memory with the same weights, and where our time goes.

A 3-minute stereo song, four targets (hidden 512), one Wiener iteration, two threads: from the model folder and a WAV file to
four WAV files, each run in a process of its own. The weights are random, which costs as much as trained ones.
"""

import ast
import statistics
import tempfile
from pathlib import Path

from common import FOLDER, import_openunmix, main, peak_memory, timings

import_openunmix()

import sys  # noqa: E402

import norbert  # noqa: E402
import numpy as np  # noqa: E402
import openunmix  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(FOLDER / "tests"))

from conftest import EXCERPT, make_model, read_tracks, sdr  # noqa: E402

from data import decode_stem  # noqa: E402
from model import stft, wiener  # noqa: E402

TARGETS = ("vocals", "drums", "bass", "other")
OURS = """
import sys, time, torch
torch.set_num_threads(2)
import test
sys.argv = ["test.py", {song!r}, "--model", {folder!r}, "--outdir", {outdir!r}, "--overwrite", "--quiet", "--device", "cpu", *{flags!r}]
start = time.perf_counter()
test.main()
print(time.perf_counter() - start)
"""
THEIRS = """
import sys, time, torch
torch.set_num_threads(2)
sys.path.insert(0, "benchmarks")
import common
common.import_openunmix()
import openunmix, soundfile
start = time.perf_counter()
separator = openunmix.utils.load_separator({folder!r}, targets={targets!r}, niter=1, wiener_win_len=300, device="cpu").eval()
audio, rate = soundfile.read({song!r}, dtype="float32", always_2d=True)
with torch.no_grad():
    estimates = separator(torch.from_numpy(audio.T.copy())[None])[0]
for target, estimate in zip({targets!r}, estimates):
    soundfile.write({outdir!r} + "/" + target + ".wav", estimate.T.numpy(), rate, subtype="FLOAT")
print(time.perf_counter() - start)
"""
PARTS = """
import collections, time, model, test
seconds = collections.Counter()
def watch(owner, name, part, threads=1):
    function = getattr(owner, name)
    def watched(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[part] += (time.perf_counter() - start) / threads
        return result
    setattr(owner, name, watched)
for name, part in (("encode", "fc1"), ("recur", "LSTM"), ("join", "fc2"), ("decode", "fc3 and mask")):
    watch(model.OpenUnmix, name, part, threads=2)  # two targets at a time
watch(model.Separator, "filter", "Wiener filter")
watch(model.torch, "stft", "STFT, twice")
watch(model.torch.fft, "irfft", "inverse STFT")
watch(model, "overlap_add", "inverse STFT")
watch(test.Stem, "write", "writing")
"""


def run(code, timeout, **values):
    """(seconds, peak memory in MB) of a script that ends by printing its seconds."""
    peak, output = peak_memory(code.format(**values), timeout)
    return float(output.splitlines()[-1]), peak


def row(name, ours, theirs=None, unit="s", spread=None, target=None):
    return dict(name=name, ours=ours, theirs=theirs, ratio=theirs and theirs / ours, unit=unit, spread=spread, target=target)


def song_rows(folder, mixture, quick):
    """Whole songs through files: time, memory, bfloat16."""
    repeats, timeout, minutes = (1, 300, 0.2) if quick else (3, 1800, 3)
    song, model = str(folder / "song.wav"), str(make_model(folder / "model", hidden_size=64 if quick else 512))
    length = round(minutes * 60 * 44100)
    soundfile.write(song, np.resize(mixture, (length, 2)), 44100, subtype="PCM_16")
    values = dict(song=song, folder=model, targets=TARGETS)
    (folder / "theirs").mkdir()
    runs = {"float32": (OURS, "ours", []), "openunmix": (THEIRS, "theirs", []), "bfloat16": (OURS, "amp", ["--amp"])}
    measured = {}
    for _ in range(repeats):  # in turn, so that a busy moment hits all alike
        for name, (code, outdir, flags) in runs.items():
            measured.setdefault(name, []).append(run(code, timeout, outdir=str(folder / outdir), flags=flags, **values))
    medians = {name: statistics.median(seconds for seconds, _ in pairs) for name, pairs in measured.items()}
    spread = {name: (max(pairs)[0] - min(pairs)[0]) / medians[name] for name, pairs in measured.items()}
    peak = {name: max(peak for _, peak in pairs) for name, pairs in measured.items()}
    what = f"{minutes:g}-minute song to four WAV files"
    yield row(what, medians["float32"], medians["openunmix"], spread=spread["float32"], target="2.5 times")
    yield row("peak memory of it", peak["float32"], peak["openunmix"], "MB", target="1200 MB")
    yield row("the same with --amp", medians["bfloat16"], medians["openunmix"], spread=spread["bfloat16"])
    stems = {name: [soundfile.read(folder / name / f"{target}.wav")[0] for target in TARGETS] for name in ("ours/song", "amp/song", "theirs")}
    agreement = {name: min(map(sdr, stems[name], stems["ours/song"])) for name in ("amp/song", "theirs")}
    yield row("its stems against openunmix's", agreement["theirs"], unit="dB")
    yield row("its stems with --amp against float32", agreement["amp/song"], unit="dB", target="40 dB")
    code = PARTS + OURS.format(outdir=str(folder / "ours"), flags=[], **values) + "print(dict(seconds))"
    _, output = peak_memory(code, timeout)
    for part, seconds in ast.literal_eval(output.splitlines()[-1]).items():
        yield row(f"of ours: {part}", seconds)


def long_song_row(folder, mixture):
    """An hour of music."""
    with soundfile.SoundFile(folder / "hour.wav", "w", 44100, 2, "PCM_16") as file:
        minute = np.resize(mixture, (60 * 44100, 2))
        for _ in range(60):
            file.write(minute)
    values = dict(song=str(folder / "hour.wav"), folder=str(folder / "model"), outdir=str(folder / "hour"), flags=[])
    seconds, peak = run(OURS, 3600, **values)
    yield row("60-minute song to four WAV files", seconds)
    yield row("peak memory of it", peak, unit="MB", target="4000 MB")


def wiener_rows(tracks, quick):
    """One pass of the filter over one window of 300 frames, four sources, real spectra."""
    spectra = {name: stft(audio.repeat(1, 2))[..., :300] for name, audio in tracks.items()}  # (C, F, T)
    X, noise = spectra["mixture"], torch.rand(4, 2, 2049, 300, generator=torch.Generator().manual_seed(0))
    V = torch.stack([spectra[target].abs() for target in TARGETS]) * (0.3 + noise)  # (J, C, F, T)
    v64, x64 = V.permute(3, 2, 1, 0).double().contiguous().numpy(), X.permute(2, 1, 0).to(torch.complex128).contiguous().numpy()
    v32, x32 = V.permute(3, 2, 1, 0).contiguous(), torch.view_as_real(X.permute(2, 1, 0).contiguous())
    torch.set_num_threads(2)

    def ours():
        wiener(V[None], X[None])

    def of_norbert():
        norbert.wiener(v64, x64.copy(), 1, use_softmask=False)

    def of_openunmix(threads=2):
        torch.set_num_threads(threads)
        openunmix.filtering.wiener(v32, x32, 1)
        torch.set_num_threads(2)

    with torch.no_grad():
        times = timings(ours, of_norbert, of_openunmix, lambda: of_openunmix(1), repeats=1 if quick else 9)
    (seconds, spread), norbert_seconds, best = times[0], times[1][0], min(times[2][0], times[3][0])  # on two threads or one
    yield row("Wiener filter, 300 frames, norbert's", seconds, norbert_seconds, spread=spread, target="4 times")
    yield row("Wiener filter, 300 frames, openunmix's", seconds, best, spread=spread, target="2.5 times")


def measure(quick=False):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        decode_stem(EXCERPT, folder / "tracks")
        tracks = read_tracks(folder / "tracks")
        rows += wiener_rows(tracks, quick)
        mixture = (tracks["mixture"].T.numpy() * 32767).astype(np.int16)
        rows += song_rows(folder, mixture, quick)
        if not quick:
            rows += long_song_row(folder, mixture)
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
