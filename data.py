"""Songs in, training examples out: dataset layouts, MUSDB18's sample, stems to WAV, synthesized songs, random mixes.

    files -> index_...() -> list of Track -> RandomMixes (training) or WholeTracks (validation) -> (mixture, target)

Axis letters: C channels, N samples (see model.py).
"""

import collections
import contextlib
import functools
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from filelock import FileLock
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from utils import REACH, SOURCES, UserError, download, ffprobe, resample, use_ffmpeg, wav_layout

# glibc's malloc gives arrays of megabytes back to the system and asks for them anew, page by page, unless it has once
# freed a larger one. Without this line page faults take two thirds of the time of an example.
np.empty(30 << 20, np.uint8)

# ---------------------------------------------------------------------------------------------- files and tracks


@dataclass(frozen=True)
class Audio:
    """One indexed audio file, mono or stereo, of `length` samples."""

    path: str
    rate: int
    channels: int
    length: int
    layout: tuple  # (dtype, offset in bytes) of a PCM WAV's samples, read from where they lie; () for what soundfile reads
    stamp: tuple  # (size, modification time) when it was indexed

    @classmethod
    def index(cls, path):
        """Read a file's header. Raises UserError for a file that is unreadable, empty, cut short, or not mono or stereo."""
        try:
            status, wav = os.stat(path), wav_layout(path)
            info = None if wav else soundfile.info(str(path))
        except (OSError, soundfile.LibsndfileError) as error:
            raise UserError(f"{path}: is not audio that can be read ({error}); replace it") from error
        rate, channels, *layout, length = wav or (info.samplerate, info.channels, info.frames)
        if not length or channels > 2:
            raise UserError(f"{path}: has {channels} channels and {length} samples; replace it with sound in mono or stereo")
        audio = cls(str(path), rate, channels, length, tuple(layout), (status.st_size, status.st_mtime_ns))
        audio.read(length - 1, 1)  # a header may promise more than there is
        return audio

    def read(self, start, length):
        """Samples `start` to `start + length` as (C, N) float32 between -1 and 1, with silence beyond the file's ends.

        Raises UserError for a file that is gone, was changed since it was indexed, or is damaged.
        """
        first = max(start, 0)
        last = max(first, min(start + length, self.length))
        audio = np.empty((self.channels, length), np.float32)
        audio[:, : first - start] = audio[:, last - start :] = 0
        try:
            status = os.stat(self.path)
            if (status.st_size, status.st_mtime_ns) != self.stamp:
                raise UserError(f"{self.path}: was changed since it was indexed; start again")
            if first < last:
                samples = self.samples(first, last - first)
                scale = 1 if samples.dtype.kind == "f" else 0.5 ** (8 * samples.itemsize - 1)
                np.multiply(samples.T, np.float32(scale), out=audio[:, first - start : last - start], dtype=np.float32)
        except (OSError, ValueError, soundfile.LibsndfileError) as error:  # ValueError: too few to reshape
            raise UserError(f"{self.path}: is gone, damaged or cut short ({error}); replace it") from error
        return audio

    def samples(self, first, count):
        """`count` samples from `first` on, as stored: (n, C) integers or floats; 24-bit ones as 32-bit integers."""
        if not self.layout:
            with soundfile.SoundFile(self.path) as file:
                file.seek(first)
                return file.read(count, dtype="float32", always_2d=True).reshape(count, self.channels)
        dtype, offset = self.layout
        stored = np.dtype("(3,)u1" if dtype == "<i3" else dtype)
        offset += first * self.channels * stored.itemsize
        samples = np.fromfile(self.path, stored, count * self.channels, offset=offset)
        if dtype == "<i3":
            samples = np.pad(samples, [(0, 0), (1, 0)]).view("<i4")  # a low byte of zero
        return samples.reshape(count, self.channels)


def read_as(audio, start, length, rate, channels):
    """`audio.read` in another sample rate and channel count; `start` and `length` count samples at `rate`."""
    if audio.rate == rate:
        samples = audio.read(start, length)  # (C, N)
    else:  # whole periods of the rates' ratio and some context give the same samples as resampling the whole file
        divisor = math.gcd(audio.rate, rate)
        old, new = audio.rate // divisor, rate // divisor
        context = math.ceil(REACH * max(1, old / new) / old)  # periods
        first = start // new
        periods = -(-(start + length) // new) - first
        samples = audio.read((first - context) * old, (periods + 2 * context) * old)
        samples = resample(torch.from_numpy(samples), audio.rate, rate).numpy()
        skip = context * new + start - first * new
        samples = samples[:, skip : skip + length]
    if len(samples) == channels:
        return samples
    return samples.mean(0, keepdims=True) if channels == 1 else np.repeat(samples, channels, axis=0)


@dataclass(frozen=True)
class Track:
    """One song (or one recording of a source): its sources by name and, where there is one, the mixture's own file."""

    name: str
    sources: dict
    mixture: Audio | None = None

    @property
    def input(self):
        """What adds up to the mixture: its own file where there is one, else the sources."""
        return [self.mixture] if self.mixture else [*self.sources.values()]


def length_at(rate, audios):
    """Samples of the longest of some files, at `rate`."""
    return max(-(-audio.length * rate // audio.rate) for audio in audios)


def target_sources(target, tracks):
    """The sources that make up a target: [[its own name]], or all but vocals for "accompaniment": [[name, ...]].

    "all" is every source by itself, [[name], ...]: a target of as many times C channels, for a network that estimates
    them together.
    """
    names = sorted({name for track in tracks for name in track.sources})
    if target in names:
        return [[target]]
    if target == "accompaniment" and "vocals" in names:
        return [[name for name in names if name != "vocals"]]
    if target == "all":
        return [[name] for name in names]
    raise UserError(f"--target {target}: no such source in the data; it has {', '.join(names[:9])}")


# ---------------------------------------------------------------------------------------------- layouts of datasets


def index_musdb(root, split):
    """MUSDB18 in musdb's WAV layout: MUSDB18-HQ, decoded stems (`decode_stems`) or synthesized songs.

        root/train/<track>/mixture.wav  drums.wav  bass.wav  other.wav  vocals.wav
        root/test/<track>/...

    The splits "train" and "valid" part root/train by musdb's own list of validation tracks (a dataset with none of those
    gives every seventh track).
    """
    subset = "test" if split == "test" else "train"
    folders = track_folders(root, subset, ["mixture.wav", *(f"{name}.wav" for name in SOURCES)])
    tracks = [Track(folder.name, dict(zip(SOURCES, sources)), mixture) for folder, (mixture, *sources) in folders]
    if split == "test":
        return tracks
    names = [track.name for track in tracks]
    validation = set(musdb_settings()["validation_tracks"]).intersection(names) or set(names[::7])
    part = [track for track in tracks if (track.name in validation) == (split == "valid")]
    if not part:
        raise UserError(f"{root}/train: has {len(names)} tracks, all of them for validation; add more")
    return part


def index_aligned(root, split, input_file="mixture.wav", output_file="vocals.wav"):
    """Pairs of files that match sample by sample, for denoising or any input -> output; the longer one is cut.

    root/train/<track>/mixture.wav --> input
    root/train/<track>/vocals.wav ---> output
    root/valid/<track>/...
    """
    tracks = []
    for folder, pair in track_folders(root, split, [input_file, output_file]):
        seconds = min(audio.length / audio.rate for audio in pair)
        mixture, target = (replace(audio, length=round(seconds * audio.rate)) for audio in pair)
        tracks.append(Track(folder.name, {Path(output_file).stem: target}, mixture))
    return tracks


def index_sourcefolder(root, split, target_dir, interferer_dirs, ext=".wav"):
    """A folder of recordings for each source, not aligned with each other; mixed at random.

    root/train/vocals/track11.wav -----------------.
    root/train/drums/track202.wav  (interferer 1) --+--> input
    root/train/bass/track007a.wav  (interferer 2) -'
    root/train/vocals/track11.wav ---------------------> output
    root/valid/...
    """
    tracks = []
    for source, name in {Path(target_dir).stem: target_dir, **{name: name for name in interferer_dirs}}.items():
        folder = Path(root, split, name)
        files = [path for path in visible(folder) if path.name.endswith(ext)]
        if not files:
            raise UserError(f"{folder}: no files *{ext} there; {found_in(folder)}")
        tracks += [Track(f"{name}/{path.stem}", {source: Audio.index(path)}) for path in files]
    return tracks


def index_trackfolder_fix(root, split, target_file="vocals.wav", interferer_files=("drums.wav", "bass.wav", "other.wav")):
    """Track folders that all hold the same files; their sum is the input.

    root/train/<track>/vocals.wav ---------------.
    root/train/<track>/drums.wav (interferer 1) --+--> input
    root/train/<track>/bass.wav  (interferer 2) -'
    root/train/<track>/vocals.wav -------------------> output
    root/valid/<track>/...
    """
    names = [Path(target_file).stem, *interferer_files]
    folders = track_folders(root, split, [target_file, *interferer_files])
    return [Track(folder.name, dict(zip(names, files))) for folder, files in folders]


def index_trackfolder_var(root, split, target_file="vocals.wav", ext=".wav", silence_missing=False):
    """Track folders with any number of files besides the target (no mixture among them!); their sum is the input.

    root/train/<track>/vocals.wav --------> output
    root/train/<track>/*.wav, summed -----> input
    root/valid/<track>/...
    With `silence_missing` a track without the target file counts as one whose target is silent.
    """
    tracks = []
    for folder, _ in track_folders(root, split, [] if silence_missing else [target_file]):
        files = [path for path in visible(folder) if path.name == target_file or path.name.endswith(ext)]
        names = [Path(target_file).stem if path.name == target_file else path.name for path in files]
        if files:
            tracks.append(Track(folder.name, dict(zip(names, map(Audio.index, files)))))
    if not tracks:
        raise UserError(f"{root}/{split}: no track folder has a file *{ext}; see --ext")
    return tracks


def track_folders(root, split, names):
    """The track folders of root/split and their files `names`, or patterns such as *vocals.wav: [(path, [Audio])]."""
    root = Path(root, split)
    folders = {folder: [find_file(folder, name) for name in names] for folder in visible(root) if folder.is_dir()}
    if not any(all(paths) for paths in folders.values()):
        wanted = f" with {' and '.join(names)}" if names else ""
        raise UserError(f"{root}: no track folder{wanted} in it (expected {root}/<track>/...); {found_in(root)}")
    for folder, paths in folders.items():
        if not all(paths):
            raise UserError(f"{folder}: lacks {names[paths.index(None)]}; add it or remove the track")
    return [(folder, [Audio.index(path) for path in paths]) for folder, paths in folders.items()]


def visible(folder):
    """What a folder holds, sorted, without hidden files (macOS leaves ._vocals.wav beside vocals.wav)."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def find_file(folder, name):
    if (folder / name).is_file():
        return folder / name
    return next((path for path in visible(folder) if fnmatch(path.name, name)), None)


def found_in(folder):
    """What a folder, or the nearest one above that exists, holds: for error messages."""
    while not folder.is_dir():
        folder = folder.parent
    names = [path.name for path in visible(folder)]
    return f"{folder} holds {', '.join(names[:4]) + ' ...' * (len(names) > 4) or 'nothing'}"


# ---------------------------------------------------------------------------------------------- MUSDB18


@functools.cache
def musdb_settings():
    """musdb's own configuration: the address of its sample, the validation tracks."""
    path = Path(importlib.util.find_spec("musdb").origin).parent / "configs" / "mus.yaml"
    return yaml.safe_load(path.read_text())


def find_data(root=None, dataset="musdb", is_wav=False, cache=None):
    """The folder of a dataset in musdb's WAV layout, made where that is needed.

    Without `root`: the folder in MUSDB_PATH, or musdb's 7-second sample, downloaded where missing, or, where that
    can't be had, synthesized songs. MUSDB18's stems are decoded to WAV once, into `cache` or <root>-wav.
    """
    home, flag = Path.home() / "MUSDB18", "--root"
    if dataset == "synthetic":
        return make_synthetic(Path(root or home / SYNTHETIC).expanduser())
    if root is None and os.environ.get("MUSDB_PATH"):
        root, flag = os.environ["MUSDB_PATH"], "MUSDB_PATH"
    if root is None:
        root = home / "MUSDB18-7"
        try:
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / ".lock"):
                if not (root / "train").is_dir():
                    download_sample(musdb_settings()["sample-url"], root)
        except (UserError, OSError) as error:
            print(f"MUSDB18's 7-second sample can't be had ({error}). Synthesized songs are used instead.")
            return make_synthetic(home / SYNTHETIC)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {flag} names one that holds train/ and test/")
    if is_wav or not stem_files(root):
        return root
    return decode_stems(root, Path(cache or f"{root.resolve()}-wav").expanduser())


def stem_files(root):
    return [path for subset in ("train", "test") for path in visible(root / subset) if path.name.endswith(".stem.mp4")]


def download_sample(url, folder):
    """Fetch MUSDB18's sample (a zip of train/*.stem.mp4 and test/*.stem.mp4) into `folder`, whole or not at all."""
    by_hand = f"fetch it by hand and unpack it to {folder}"
    with new_folder(folder) as unpacked:
        archive = unpacked / f"{folder.name}.zip"
        download(url, archive, by_hand=by_hand)
        try:
            with zipfile.ZipFile(archive) as content:
                for name in content.namelist():
                    if not Path(unpacked, name).resolve().is_relative_to(unpacked.resolve()):
                        raise UserError(f"{url}: the archive holds {name!r}, a path that leads out of it; {by_hand}")
                content.extractall(unpacked)
        except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{url}: could not be unpacked ({error}); {by_hand}") from error
        archive.unlink()
        if not stem_files(unpacked):
            raise UserError(f"{url}: the archive holds no train/*.stem.mp4; {by_hand}")


def decode_stems(root, destination):
    """Decode MUSDB18's .stem.mp4 files to 16-bit WAV in musdb's WAV layout, sample for sample what musdb decodes."""
    use_ffmpeg()
    tracks = {destination / path.parent.name / path.name.removesuffix(".stem.mp4"): path for path in stem_files(root)}
    make_tracks(tracks, decode_stem, decoded_bytes, destination, "name another folder with --cache")
    return destination


def decoded_bytes(stem):
    """The size of a stem file's five streams as 16-bit WAV."""
    streams = ffprobe(stem, "stream=duration_ts,channels").get("streams", [])
    if len(streams) != 5:
        raise UserError(f"{stem}: is not a stem file with five audio streams; replace it")
    return sum(2 * stream["channels"] * stream["duration_ts"] for stream in streams)


def decode_stem(stem, folder):
    """Decode one stem file: streams mixture, drums, bass, other, vocals."""
    with new_folder(folder) as unfinished:
        command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", f"file:{stem}"]
        for stream, name in enumerate(("mixture", "drums", "bass", "other", "vocals")):
            command += ["-map", f"0:{stream}", "-c:a", "pcm_s16le", "-bitexact", "-f", "wav"]
            command += [f"file:{unfinished / name}.wav"]
        done = subprocess.run(command, capture_output=True)
        if done.returncode or done.stderr:
            reason = done.stderr.decode(errors="replace").strip().splitlines() or ["ffmpeg failed"]
            raise UserError(f"{stem}: cannot be decoded ({reason[-1]}); replace it")


def make_tracks(tracks, make, size, root, remedy):
    """Make those track folders of a dataset that are missing, in parallel: `tracks` is {folder: its origin}.

    `make(origin, folder)` makes one, `size(origin)` tells its bytes. Raises UserError with the remedy where `root` can't
    be written or has too little space.
    """
    missing = {folder: item for folder, item in tracks.items() if not folder.is_dir()}
    if not missing:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            needed, free = sum(pool.map(size, missing.values())) / 1e9, shutil.disk_usage(root).free / 1e9
            print(f"made once, in {root}: {needed:.2f} GB for {len(missing)} of {len(tracks)} tracks")
            if free < needed:
                raise UserError(f"{root}: {needed:.2f} GB needed, {free:.2f} GB free; {remedy}")
            with FileLock(root / ".lock"):  # one of several processes makes what is missing, the others wait
                missing = {folder: item for folder, item in missing.items() if not folder.is_dir()}
                for _ in tqdm(pool.map(make, missing.values(), missing), total=len(missing), desc=root.name, unit="track"):
                    pass
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{root}: cannot be written to ({error}); {remedy}") from error


@contextlib.contextmanager
def new_folder(folder):
    """Yield a folder to fill beside `folder`, renamed at the end: what was killed half-way is never taken for whole."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- synthesized songs

SYNTHETIC = "synthetic-30s"
SONGS = {"train": 28, "test": 6}


def make_synthetic(root, seconds=30.0, songs=SONGS):
    """Synthesized songs in musdb's WAV layout, made once and kept; the test part also holds one real song.

    That one is the excerpt of MUSDB18 that the package stempeg ships: a score on real music always stands beside those
    on synthesized songs. Raises UserError for a folder with other songs in it.
    """
    foreign = [path for path in visible(root / "train") if not path.name.startswith("Synthesized")]
    if foreign:
        raise UserError(f"{foreign[0]}: is no synthesized song; name another folder with --root")
    use_ffmpeg()
    folders = [root / subset / f"Synthesized - Song {n + 1:02d}" for subset in songs for n in range(songs[subset])]
    seeds = {folder: seed for seed, folder in enumerate(folders)}
    stems = (Path(importlib.util.find_spec("stempeg").origin).parent / "data").glob("*.stem.mp4")
    excerpt = {root / "test" / stem.name.removesuffix(".stem.mp4"): stem for stem in stems}
    remedy = "name another folder with --root"
    make_tracks(seeds, functools.partial(make_song, seconds), lambda seed: 20 * 44100 * seconds, root, remedy)
    make_tracks(excerpt, decode_stem, decoded_bytes, root, remedy)
    return root


def make_song(seconds, seed, folder):
    """Synthesize one song into a track folder of 16-bit WAV files; the mixture is the sum of the others to the bit."""
    with new_folder(folder) as unfinished:
        sources = {name: np.round(audio * 32767).astype(np.int16) for name, audio in synthesize_song(seed, seconds).items()}
        for name, audio in {"mixture": sum(sources.values()), **sources}.items():
            soundfile.write(unfinished / f"{name}.wav", audio, 44100, subtype="PCM_16")


SCALES = np.array([(0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)])  # major and minor, in semitones above the key note
PROGRESSIONS = ((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (0, 3, 0, 4), (0, 2, 3, 4), (1, 4, 0, 5))  # a degree a bar
# A bar in sixteenths, an x for an onset.
KICKS = ("x...x...x...x...", "x.......x.......", "x.....x.x.......", "x..x..x...x.....", "x.x.......xx....")
SNARES = ("....x.......x...", "........x.......", "....x..x.x..x...", "....x.......x..x")
HATS = ("x.x.x.x.x.x.x.x.", "xxxxxxxxxxxxxxxx", "..x...x...x...x.", "x.xxx.xxx.xxx.xx")
CALM = ("x...............", "x.......x.......", "x..x..x.........", "x.....x...x.....", "x...x...x...x...")
BUSY = ("x.x.x.x.x.x.x.x.", "x..x..x.x..x..x.", "x..x..x..x..x.x.", "x.xx..x.x.xx..x.", "x.x...x.x.x...x.")
# Formants in Hz of the vowels a e i o u; the first three after Peterson & Barney (1952), men.
VOWELS = np.array([
    (730, 1090, 2440, 3400, 4500),
    (530, 1840, 2480, 3500, 4500),
    (270, 2290, 3010, 3600, 4600),
    (570, 840, 2410, 3300, 4400),
    (300, 870, 2240, 3200, 4300),
])


class SongPlan:
    """What the players agree on: tempo, key, and a chord for each bar."""

    def __init__(self, rng, seconds, rate):
        self.rate, self.N = rate, round(seconds * rate)
        self.sixteenth = int(rate * 15 / rng.uniform(72, 148))  # in samples
        self.key, self.scale = rng.integers(12), rng.choice(SCALES)
        verse_chorus = rng.permutation(PROGRESSIONS)[:2]  # of four bars each
        self.chords = np.resize(verse_chorus, self.N // (16 * self.sixteenth) + 1)

    def draw_notes(self, rng, patterns, voicings=((0,),), octave=0):
        """One of patterns in every bar; at each onset the next of voicings, degrees above the root of the bar's chord.

        Returns a list of (first sample, end sample, frequencies in Hz (voices,)).
        """
        steps = [step for step, mark in enumerate(rng.choice(patterns) + "x") if mark == "x"]  # the last one ends the bar
        spans = []
        for bar, chord in enumerate(self.chords):
            for start, end in itertools.pairwise(16 * bar + step for step in steps):
                spans.append((chord, start * self.sixteenth, min(end * self.sixteenth, self.N)))
        degrees = [np.add(chord, voicings[turn % len(voicings)]) for turn, (chord, _, _) in enumerate(spans)]
        semitones = self.key + self.scale[np.mod(degrees, 7)] + 12 * (octave + np.floor_divide(degrees, 7)) - 69  # from A4
        return [(start, end, hertz) for (_, start, end), hertz in zip(spans, 440 * 2 ** (semitones / 12)) if start < end]


def synthesize_sawtooth(cycles, ratio):
    """Harmonics k at amplitude ratio^k / k, by their closed sum; phase in cycles."""
    phase = (2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32)
    return np.arctan2(ratio * np.sin(phase), 1 - ratio * np.cos(phase))


def synthesize_part(rng, plan, patterns, voicings, octave, brightness, decay, width):
    """Notes of one instrument -> (2, N), drawn from ranges of brightness in Hz and decay in seconds; width is 0 to 1."""
    stereo, angles = np.zeros((2, plan.N), np.float32), np.pi / 4 * (1 + width * rng.uniform(-1, 1, 5))
    brightness, decay = np.float32(rng.uniform(*brightness)), np.float32(rng.uniform(*decay))
    attack, hollow = np.float32(rng.uniform(0.002, 0.02)), np.float32(rng.choice([0, 0.3, 0.5]))
    for turn, (start, end, chord) in enumerate(plan.draw_notes(rng, patterns, voicings, octave)):
        time = np.arange(end - start) / plan.rate
        body = np.exp(-time.astype(np.float32) / decay)
        level = rng.uniform(0.6, 1) * body * (1 - np.exp(-time / attack)) * np.minimum(1, (time[-1] - time) / 0.03)
        for voice, hertz in enumerate(chord):
            ratio = np.exp(np.float32(-hertz) / np.minimum(np.float32(hertz) + brightness * body, plan.rate / 6))
            tone = synthesize_sawtooth(hertz * time, ratio)
            tone -= hollow * synthesize_sawtooth(2 * hertz * time, ratio**2)  # takes out even harmonics
            angle = angles[(turn + voice) % 5]
            stereo[:, start:end] += np.float32([[np.cos(angle)], [np.sin(angle)]]) * (level * tone)
    return stereo


def synthesize_drums(rng, plan):
    """Kick, snare and hi-hat -> (2, N)."""
    time, stereo = np.arange(plan.rate // 2 * 2) / plan.rate, np.zeros((2, plan.N), np.float32)

    def draw_hit(hertz, decay, hiss, tilt, hiss_decay):  # a sine that falls to hertz, overdriven, and noise
        skin = np.tanh(2 * np.sin(2 * np.pi * (hertz * time - 4 * np.exp(-time / 0.03))) * np.exp(-time / decay))
        noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(len(time))) * np.linspace(0, 1, len(time) // 2 + 1) ** tilt)
        return (1 - hiss) * skin + hiss * noise / noise.std() * np.exp(-time / hiss_decay)

    kick = draw_hit(rng.uniform(42, 60), rng.uniform(0.1, 0.2), 0.1, 0.5, 0.004)
    snare = draw_hit(rng.uniform(150, 230), 0.06, rng.uniform(0.3, 0.7), rng.uniform(0.1, 1), rng.uniform(0.04, 0.12))
    hat = rng.uniform(0.1, 0.4) * draw_hit(1, 1, 1, rng.uniform(1, 3), rng.uniform(0.02, 0.1))
    for patterns, hit, pan in (KICKS, kick, 0.5), (SNARES, snare, 0.5), (HATS, hat, rng.uniform(0.3, 0.7)):
        for start, end, _ in plan.draw_notes(rng, patterns):
            stereo[:, start:end][:, : len(hit)] += rng.uniform(0.6, 1) * np.outer([1 - pan, pan], hit[: end - start])
    return stereo


def filter_blocks(x, window, gain):
    """Filter x (N,) in half overlapping windows with gain (..., 1 or blocks, bins) by overlap-add -> (..., N)."""
    half = len(window) // 2
    padded = np.pad(x, (half, half + -len(x) % half))
    blocks = sliding_window_view(padded, 2 * half)[::half] * window
    blocks = np.fft.irfft(np.fft.rfft(blocks) * gain)
    return (blocks[..., :-1, half:] + blocks[..., 1:, :half]).reshape(*blocks.shape[:-2], -1)[..., : len(x)]


def synthesize_vocals(rng, plan):
    """A voice: buzz and breath through five moving formants, each note begun by a consonant of noise -> (2, N)."""
    hop = 512  # samples between two shapes of the vocal tract
    octaves = [4, 5] if plan.key < 4 else [3, 4]
    notes = plan.draw_notes(rng, CALM[2:] + BUSY, rng.integers(-1, 6, (13, 1)), rng.choice(octaves))
    curves = np.zeros((9, -(-plan.N // hop) + 1))
    pitch, vibrato, level, breath, formants = *curves[:4], curves[4:]  # views: octaves, octaves, amplitudes, Hz
    pitch[:], formants[:] = np.log2(notes[0][2]), VOWELS[0][:, None]
    breathiness, depth, scoop = rng.uniform(0.02, 0.2), rng.uniform(0.01, 0.04), rng.uniform(0, 0.2)
    for start, end, hertz in notes:
        start, voiced, end = start // hop, start // hop + rng.integers(2, 8), end // hop - rng.integers(3, 8)
        pitch[start:] = np.log2(hertz)
        pitch[start : voiced + 3] -= scoop * rng.random()
        vibrato[voiced + 10 : end] = depth
        level[voiced:end] = rng.uniform(0.6, 1)
        breath[start:voiced], breath[voiced:end] = rng.uniform(0, 1.2), breathiness
        formants[:, start:voiced], formants[:, voiced:] = rng.uniform(1000, 9000, (5, 1)), rng.choice(VOWELS)[:, None]
    reach = rng.integers(3, 6)  # hops in which the voice glides from one shape to the next
    padded = np.pad(curves, ((0, 0), (reach, reach)), "edge")
    window = np.hanning(2 * reach + 3)[1:-1] / (reach + 1)
    curves = sliding_window_view(padded, len(window), axis=1) @ window
    curves[0] += curves[1] * np.sin(2 * np.pi * rng.uniform(5, 6) * hop / plan.rate * np.arange(curves.shape[1]))
    curves[0], samples = 2 ** curves[0], np.arange(plan.N) / hop
    hertz, level, breath = (np.interp(samples, np.arange(len(c)), c).astype(np.float32) for c in curves[[0, 2, 3]])
    buzz = synthesize_sawtooth(np.cumsum(hertz, dtype=np.float64) / plan.rate, np.exp(-hertz / rng.uniform(3000, 8000)))
    gain, frequencies = np.float32(0.03), np.fft.rfftfreq(2 * hop, 1 / plan.rate).astype(np.float32)
    for formant, height in zip(np.float32(curves[4:, :, None] * rng.uniform(0.95, 1.15)), (1, 0.7, 0.45, 0.4, 0.25)):
        gain = gain + height / (1 + ((frequencies - formant) / (50 + 0.05 * formant)) ** 2)  # (frames, bins)
    window = np.clip(1.5 - np.abs(np.arange(0.5 - hop, hop, dtype=np.float32)) * 2 / hop, 0, 1)  # its hops add up to 1
    voice = filter_blocks(level * buzz + breath * rng.standard_normal(plan.N, np.float32), window, gain)
    return rng.uniform(0.8, 1, (2, 1)).astype(np.float32) * voice


def synthesize_song(seed: int, seconds: float = 30.0, rate: int = 44100) -> dict[str, np.ndarray]:
    """One song, the same for the same arguments: drums, bass, chords and plucks, and a voice without words.

    Args:
        seed: a non-negative integer.
        seconds: length, at least 1.
        rate: sample rate in Hz, at least 8000.
    Returns:
        "drums", "bass", "other" and "vocals", each (N, 2) float32 with N = round(seconds * rate), resting in up to three
        tenths of the two-bar sections. Their sum, the mixture, peaks below 0.9.
    """
    rng = np.random.default_rng(seed)
    plan = SongPlan(rng, seconds, rate)
    low, leaps, broken = 3 if plan.key < 4 else 2, rng.choice([0, 0, 4, 7], (4, 1)), 2 * rng.permutation(5)[:, None]
    bass = synthesize_part(rng, plan, CALM + BUSY, leaps, low, (200, 1500), (0.3, 2), 0)
    chords = synthesize_part(rng, plan, CALM, [[0, 2, 4]], low + 2, (500, 3500), (0.3, 3), 0.7)
    plucks = synthesize_part(rng, plan, BUSY, broken, low + 3, (1500, 7000), (0.1, 0.6), 0.7)
    players = synthesize_drums(rng, plan), bass, chords + rng.uniform(0.5, 2) * plucks, synthesize_vocals(rng, plan)
    stems, section, half = {}, 32 * plan.sixteenth, 2 ** int(np.log2(rate))  # two bars and the echoes, in samples
    for source, stem, wetness in zip(("drums", "bass", "other", "vocals"), players, (0.3, 0.1, 0.5, 0.4)):
        sections = rng.permutation(plan.N // section + 1)
        stem = stem * (sections >= rng.integers(int(0.3 * len(sections)) + 1)).repeat(section)[: plan.N]
        room = rng.standard_normal((2, half), np.float32) * np.exp(-np.arange(half) / rng.uniform(0.04, 0.15) / rate)
        room = np.fft.rfft(room.astype(np.float32), 2 * half)[:, None] / np.linspace(1, 8, half + 1, dtype=np.float32)
        echoes = filter_blocks(stem.mean(axis=0), np.repeat(np.float32([1, 0]), half), room)
        stem = stem / stem.std() + wetness * rng.uniform(0.2, 1) / echoes.std() * echoes
        stems[source] = 10 ** (rng.uniform(-1.5, 1.5) / 20) * stem / stem.std()
    scale = rng.uniform(0.4, 0.89) / np.abs(sum(stems.values())).max()
    return {source: np.ascontiguousarray(scale * stem.T, np.float32) for source, stem in stems.items()}


# ---------------------------------------------------------------------------------------------- augmentations


def augment_gain(audio, rng):
    """Scale by a random factor between 0.25 and 1.25: (C, N) -> (C, N)."""
    return audio * np.float32(rng.uniform(0.25, 1.25))


def augment_channelswap(audio, rng):
    """Swap left and right with probability one half: (C, N) -> (C, N)."""
    return audio[::-1] if rng.random() < 0.5 else audio


AUGMENTATIONS = {"gain": augment_gain, "channelswap": augment_channelswap}


# ---------------------------------------------------------------------------------------------- datasets


class RandomMixes(torch.utils.data.Dataset):
    """Training examples: random excerpts of a track's target and of interferers, each augmented, and their sum.

    Example `index` is a pure function of (seed, index): no global random state, the same in any process. Indices go on
    beyond `len`: epoch e has the examples e * len to (e + 1) * len - 1.

    Args:
        tracks: list of Track. target: the source to learn (see target_sources).
        sample_rate: of the examples, in Hz. nb_channels: C of the examples. seq_dur: their length in seconds.
        samples_per_track: examples per track and epoch. seed: of everything that is drawn.
        augmentations: functions (audio (C, N) float32, numpy Generator) -> audio, applied to each source in turn.
        mix: where the interferers come from: "tracks" (each from a track of its own), "track" (all from one other
            track), "own" (the target's track, at the same time), "aligned" (as "own", but the input is the track's
            mixture file, not a sum).

    Item: (mixture, target), (C, N) float32 tensors each; the target "all" has C channels for each source.
    """

    def __init__(
        self,
        tracks,
        target,
        sample_rate,
        nb_channels=2,
        seq_dur=6.0,
        samples_per_track=64,
        seed=42,
        augmentations=(),
        mix="tracks",
    ):
        self.sample_rate, self.nb_channels, self.length = sample_rate, nb_channels, round(seq_dur * sample_rate)
        self.samples_per_track, self.seed, self.augmentations, self.mix = samples_per_track, seed, augmentations, mix
        self.parts = target_sources(target, tracks)
        self.wanted = [name for part in self.parts for name in part]
        names = sorted({name for track in tracks for name in track.sources})
        self.pools = {name: [track for track in tracks if name in track.sources] for name in names}
        self.tracks = self.pools[self.wanted[0]] if mix == "tracks" else tracks

    def __len__(self):
        return len(self.tracks) * self.samples_per_track

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        mixture, *targets = waveforms = np.zeros((1 + len(self.parts), self.nb_channels, self.length), np.float32)
        for name, audio, start in self.draw(self.tracks[index % len(self) // self.samples_per_track], rng):
            excerpt = read_as(audio, start, self.length, self.sample_rate, self.nb_channels)
            for augment in self.augmentations:
                excerpt = augment(excerpt, rng)
            if self.mix != "aligned" or name == "mixture":
                mixture += excerpt
            for part, target in zip(self.parts, targets):
                if name in part:
                    target += excerpt
        return mixture_and_target(waveforms)

    def draw(self, track, rng):
        """Choose the excerpts of an example: yields (source name, Audio, first sample)."""
        if self.mix == "tracks":
            for name, pool in self.pools.items():
                chosen = track if name == self.wanted[0] else pool[rng.integers(len(pool))]
                yield name, chosen.sources[name], self.position([chosen.sources[name]], rng)
            return
        start = self.position(track.input, rng)
        other, other_start = track, start
        if self.mix == "track":
            other = self.tracks[rng.integers(len(self.tracks))]
            other_start = self.position(other.input, rng)
        if self.mix == "aligned":
            yield "mixture", track.mixture, start
        for name, audio in track.sources.items():
            if name in self.wanted:
                yield name, audio, start
        for name, audio in other.sources.items():
            if name not in self.wanted:
                yield name, audio, other_start

    def position(self, audios, rng):
        return int(rng.integers(max(1, length_at(self.sample_rate, audios) - self.length + 1)))


class WholeTracks(torch.utils.data.Dataset):
    """Whole songs, for validation and statistics: (mixture, target), (C, N) float32 tensors.

    The mixture is its own file where there is one, else the sum of the sources; see RandomMixes for the arguments.
    """

    def __init__(self, tracks, target, sample_rate, nb_channels=2):
        self.tracks, self.sample_rate, self.nb_channels = tracks, sample_rate, nb_channels
        self.parts = target_sources(target, tracks)

    def __len__(self):
        return len(self.tracks)

    def __getitem__(self, index):
        track = self.tracks[index]
        length = length_at(self.sample_rate, track.input)
        targets = [[track.sources[name] for name in part if name in track.sources] for part in self.parts]
        waveforms = np.zeros((1 + len(targets), self.nb_channels, length), np.float32)
        for waveform, audios in zip(waveforms, [track.input, *targets]):
            for audio in audios:
                waveform += read_as(audio, 0, length, self.sample_rate, self.nb_channels)
        return mixture_and_target(waveforms)


def mixture_and_target(waveforms):
    """(1 + parts, C, N), the mixture and the parts of the target -> tensors (C, N) and (parts * C, N)."""
    return torch.from_numpy(waveforms[0]), torch.from_numpy(waveforms[1:].reshape(-1, waveforms.shape[-1]))


LAYOUTS = {  # name: indexer, the flags that it takes
    "aligned": (index_aligned, ("input_file", "output_file")),
    "sourcefolder": (index_sourcefolder, ("target_dir", "interferer_dirs", "ext")),
    "trackfolder_fix": (index_trackfolder_fix, ("target_file", "interferer_files")),
    "trackfolder_var": (index_trackfolder_var, ("target_file", "ext", "silence_missing")),
}


def index_dataset(args):
    """Index what train.py's flags name: (training tracks, validation tracks, sample rate in Hz, RandomMixes' `mix`)."""
    if args.dataset in LAYOUTS:
        if args.root is None:
            raise UserError(f"--dataset {args.dataset} needs --root, the folder that holds train/ and valid/")
        indexer, flags = LAYOUTS[args.dataset]
        index = functools.partial(indexer, Path(args.root).expanduser(), **{flag: getattr(args, flag) for flag in flags})
    else:
        index = functools.partial(index_musdb, find_data(args.root, args.dataset, args.is_wav, args.cache))
    mix = {
        "aligned": "aligned",
        "trackfolder_fix": "tracks" if args.random_track_mix else "own",
        "trackfolder_var": "track" if args.random_interferer_mix else "own",
    }.get(args.dataset, "tracks")
    train_tracks, valid_tracks = index("train"), index("valid")
    files = {audio for track in train_tracks + valid_tracks for audio in (*track.input, *track.sources.values())}
    rates = collections.Counter(audio.rate for audio in files)
    sample_rate = args.sample_rate or rates.most_common(1)[0][0]
    if set(rates) != {sample_rate}:
        others = ", ".join(f"{rate} Hz" for rate in sorted(rates) if rate != sample_rate)
        slow = "are resampled as they are read: convert them for speed"
        print(f"some files are not in {sample_rate} Hz ({others}) and {slow}")
    return train_tracks, valid_tracks, sample_rate, mix


def load_datasets(args, target, tracks):
    """The datasets of one target: (training examples, validation, what the input statistics are taken from).

    `tracks` is what index_dataset returned. Where sources are no songs (sourcefolder), validation and statistics use
    some hundred fixed mixes without augmentation.
    """
    train_tracks, valid_tracks, sample_rate, mix = tracks
    settings = dict(target=target, sample_rate=sample_rate, nb_channels=args.nb_channels)
    drawn = dict(seq_dur=args.seq_dur, seed=args.seed, mix=mix, samples_per_track=args.samples_per_track)
    augmentations = [] if mix == "aligned" else [AUGMENTATIONS[name] for name in args.source_augmentations]
    train = RandomMixes(train_tracks, **settings, **drawn, augmentations=augmentations)
    if args.dataset != "sourcefolder":
        return train, WholeTracks(valid_tracks, **settings), WholeTracks(train_tracks, **settings)
    fixed = [RandomMixes(part, **settings, **drawn) for part in (valid_tracks, train_tracks)]
    for mixes in fixed:
        mixes.samples_per_track = math.ceil(100 / len(mixes.tracks))
    return train, *fixed
