"""Songs in, training examples out.

    files -> a layout's index function -> [Track] -> RandomMixes, WholeTracks -> (mixture, target)

Axis letters: C channels, N samples, K targets (see model.py).
"""

import collections
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import yaml
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

import utils
from utils import SOURCES, AudioFile, UserError, check_name


@dataclass(frozen=True)
class Track:
    """One song, or one recording of a source."""

    name: str
    sources: dict  # {source: AudioFile}
    mixture: AudioFile | None = None  # where it has a file of its own

    @property
    def input(self):
        """The files that add up to the mixture: its own where there is one, else the sources."""
        return [self.mixture] if self.mixture else [*self.sources.values()]


def read_as(audio, start, length, rate, channels):
    """`audio.read` in so many channels and at `rate` Hz: `start` and `length` count its samples."""
    if audio.rate == rate:
        samples = audio.read(start, length)  # (C, N)
    else:  # whole periods of the rates' ratio, and context: as if the whole were resampled at once
        divisor = math.gcd(audio.rate, rate)
        old, new = audio.rate // divisor, rate // divisor
        context = math.ceil(utils.REACH * max(1, old / new) / old)  # periods
        first = start // new
        periods = -(-(start + length) // new) - first
        samples = audio.read((first - context) * old, (periods + 2 * context) * old)
        samples = utils.resample(torch.from_numpy(samples), audio.rate, rate).numpy()
        skip = context * new + start - first * new
        samples = samples[:, skip : skip + length]
    if channels == 1:
        return samples.mean(0, keepdims=True)
    return samples if len(samples) == channels else np.repeat(samples, channels, axis=0)


def length_at(rate, files):
    """Samples of the longest of some files, at `rate`."""
    return max(-(-audio.length * rate // audio.rate) for audio in files)


# ------------------------------------------------------------------------------------ the datasets


@dataclass(eq=False)
class RandomMixes(torch.utils.data.Dataset):
    """Training examples: random excerpts of each source, each augmented, and their sum.

    Example `index`, mixture (C, N) and target (K * C, N) in float32, is a pure function of (seed,
    index). Indices go on beyond `len`: epoch e has the examples e * len to (e + 1) * len - 1.
    """

    tracks: list
    targets: list  # K names: sources of the tracks, or "accompaniment"
    sample_rate: int  # of the examples, in Hz
    nb_channels: int = 2
    seq_dur: float = 6.0  # seconds
    samples_per_track: int = 64  # in each epoch
    samples_per_epoch: int | None = None  # instead, however many tracks there are
    seed: int = 42
    augmentations: tuple = ()  # functions (audio (C, N) float32, numpy Generator) -> audio
    # Interferers come each from a track of its own ("tracks"), all from one other ("track"), from
    # the target's, in time with it ("own"); "aligned": likewise, the input is the mixture's file.
    mix: str = "tracks"
    endless = True

    def __post_init__(self):
        self.length = round(self.seq_dur * self.sample_rate)
        self.parts = sources_of(self.targets, self.tracks)
        self.wanted = [*dict.fromkeys(itertools.chain(*self.parts))]
        names = sorted({name for track in self.tracks for name in track.sources})
        self.pools = {name: [t for t in self.tracks if name in t.sources] for name in names}
        if self.mix == "tracks":
            self.tracks = self.pools[self.wanted[0]]

    def __len__(self):
        return self.samples_per_epoch or len(self.tracks) * self.samples_per_track

    def __getitem__(self, index):
        keep_freed_memory()
        rng = np.random.default_rng((self.seed, index))
        track = self.tracks[index % len(self.tracks)]
        mixture = np.zeros((self.nb_channels, self.length), np.float32)
        targets = np.zeros((len(self.parts), *mixture.shape), np.float32)
        for name, audio, start in self.draw(track, rng):
            excerpt = read_as(audio, start, self.length, self.sample_rate, self.nb_channels)
            for augment in self.augmentations:
                excerpt = augment(excerpt, rng)
            if self.mix != "aligned" or name == "mixture":
                mixture += excerpt
            for part, target in zip(self.parts, targets):
                if name in part:
                    target += excerpt
        return torch.from_numpy(mixture), torch.from_numpy(targets).flatten(0, 1)  # (K * C, N)

    def draw(self, track, rng):
        """Choose the excerpts of an example: yields (source, AudioFile, first sample)."""
        if self.mix == "tracks":
            for name, pool in self.pools.items():
                chosen = track if name == self.wanted[0] else pool[rng.integers(len(pool))]
                yield name, chosen.sources[name], self.position([chosen.sources[name]], rng)
            return
        other = track
        start = other_start = self.position(track.input, rng)
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

    def position(self, files, rng):
        return int(rng.integers(max(1, length_at(self.sample_rate, files) - self.length + 1)))


@dataclass(eq=False)
class WholeTracks(torch.utils.data.Dataset):
    """Whole songs, for validation and statistics: mixture (C, N) and target (K * C, N), float32.

    The mixture is its own file where there is one, else the sum of the sources. Without targets
    (K = 0) no other file is read.
    """

    tracks: list
    targets: list
    sample_rate: int
    nb_channels: int = 2

    def __post_init__(self):
        self.parts = sources_of(self.targets, self.tracks)

    def __len__(self):
        return len(self.tracks)

    def __getitem__(self, index):
        track = self.tracks[index]
        length = length_at(self.sample_rate, track.input)
        mixture = np.zeros((self.nb_channels, length), np.float32)
        targets = np.zeros((len(self.parts), *mixture.shape), np.float32)
        parts = [[track.sources[n] for n in part if n in track.sources] for part in self.parts]
        for waveform, files in zip((mixture, *targets), (track.input, *parts)):
            for audio in files:
                waveform += read_as(audio, 0, length, self.sample_rate, self.nb_channels)
        return torch.from_numpy(mixture), torch.from_numpy(targets).flatten(0, 1)


def sources_of(targets, tracks):
    """The sources that make up each target: itself, or all but vocals for "accompaniment"."""
    names = sorted({name for track in tracks for name in track.sources})
    parts = {name: [name] for name in names}
    if "vocals" in names and len(names) > 1:
        parts.setdefault("accompaniment", [name for name in names if name != "vocals"])
    for target in set(targets) - set(parts):
        known = ", ".join(names[:9])
        raise UserError(f"--target {target}: no such source in the data; it has {known}")
    return [parts[target] for target in targets]


@functools.cache
def keep_freed_memory():
    """Make malloc keep what it has freed, once in each process: examples come 3.5 times as fast.

    glibc gives arrays of megabytes back to the system, and asks for them anew, page by page, until
    it has freed a larger one.
    """
    np.empty(30 << 20, np.uint8)


def augment_gain(audio, rng):
    """Scale by a random factor between 0.25 and 1.25: (C, N) -> (C, N)."""
    return audio * np.float32(rng.uniform(0.25, 1.25))


def augment_channelswap(audio, rng):
    """Swap left and right with probability one half: (C, N) -> (C, N)."""
    return audio[::-1] if rng.random() < 0.5 else audio


AUGMENTATIONS = {"gain": augment_gain, "channelswap": augment_channelswap}


# ----------------------------------------------------------------------------------------- layouts


def index_musdb(root, split):
    """MUSDB18 in musdb's WAV layout: MUSDB18-HQ, decoded stems or synthesized songs.

        root/train/<track>/mixture.wav  drums.wav  bass.wav  other.wav  vocals.wav
        root/test/<track>/...

    "train" and "valid" part root/train by musdb's own list of validation tracks (a data set with
    none of those gives every seventh track).
    """
    files = ["mixture.wav", *(f"{source}.wav" for source in SOURCES)]
    folders = track_folders(root, "test" if split == "test" else "train", files)
    found = {path for folder in folders for path in visible(folder, ".wav")}
    more = sorted({path.name for path in found.difference(*folders.values())})
    if more and split != "valid":  # which is in the same folder as "train"
        rule = f"not among the sources ({', '.join(SOURCES)}), and in no mix of training"
        print(utils.printable(f"{root}: {', '.join(more)}: {rule}"))
    if split != "test":
        names = [folder.name for folder in folders]
        listed = set(musdb_settings()["validation_tracks"]).intersection(names) or names[::7]
        folders = {f: p for f, p in folders.items() if (f.name in listed) == (split == "valid")}
        if not folders:
            raise UserError(f"{root}/train: has {len(names)} tracks, all for validation; add more")
    tracks = []
    for folder, paths in folders.items():
        mixture, *sources = map(AudioFile.open, paths)
        for audio in sources:
            if length_at(mixture.rate, [audio]) != mixture.length:
                lengths = f"has {audio.length} samples, its mixture {mixture.length}"
                raise UserError(f"{audio.path}: {lengths}; make them equal or remove the track")
        tracks.append(Track(folder.name, dict(zip(SOURCES, sources)), mixture))
    return tracks


def index_aligned(root, split, input_file="mixture.wav", output_file="vocals.wav"):
    """Pairs of files that match sample by sample, for any input -> output; the longer one is cut.

    root/train/<track>/mixture.wav --> input, vocals.wav --> output; root/valid/<track>/...
    """
    check_sources([Path(output_file).stem], "--output-file")
    if input_file == output_file:
        raise UserError(f"--output-file {output_file}: is the input, too; name another file")
    tracks = []
    for folder, paths in track_folders(root, split, [input_file, output_file]).items():
        pair = [*map(AudioFile.open, paths)]
        seconds = min(audio.length / audio.rate for audio in pair)
        mixture, target = (replace(a, length=round(seconds * a.rate)) for a in pair)
        tracks.append(Track(folder.name, {Path(output_file).stem: target}, mixture))
    return tracks


def index_sourcefolder(
    root, split, target_dir="vocals", interferer_dirs=("drums", "bass", "other"), ext=".wav"
):
    """A folder of recordings for each source, not aligned with each other; mixed at random.

    root/train/vocals/track11.wav + drums/track202.wav + bass/track007a.wav --> input
    root/train/vocals/track11.wav --> output; root/valid/...
    """
    names = [Path(target_dir).stem, *("-".join(Path(name).parts) for name in interferer_dirs)]
    check_sources(names, "--interferer-dirs")
    tracks = []
    for name, place in zip(names, (target_dir, *interferer_dirs)):
        folder = Path(root, split, place)
        files = visible(folder, ext)
        if not files:
            raise UserError(f"{folder}: no files *{ext} there; {found_in(folder)}")
        tracks += [Track(f"{name}-{path.stem}", {name: AudioFile.open(path)}) for path in files]
    return tracks


def index_trackfolder_fix(
    root, split, target_file="vocals.wav", interferer_files=("drums.wav", "bass.wav", "other.wav")
):
    """Track folders that all hold the same files; their sum is the input.

    root/train/<track>/vocals.wav + drums.wav + bass.wav + other.wav --> input
    root/train/<track>/vocals.wav --> output; root/valid/<track>/...
    """
    files = [target_file, *interferer_files]
    names = [Path(file).stem for file in files]
    check_sources(names, "--interferer-files")
    tracks = track_folders(root, split, files).items()
    return [Track(path.name, dict(zip(names, map(AudioFile.open, fs)))) for path, fs in tracks]


def index_trackfolder_var(root, split, target_file="vocals.wav", ext=".wav", silence_missing=False):
    """Track folders with any number of files; all but mixture.* add up to the input.

    root/train/<track>/*.wav, summed --> input
    root/train/<track>/vocals.wav --> output; root/valid/<track>/...
    With `silence_missing` a track without the target file counts as one whose target is silent.
    """
    tracks = []
    wanted = Path(target_file).stem
    for folder in track_folders(root, split, [] if silence_missing else [target_file]):
        target = find_file(folder, target_file)
        others = [p for p in visible(folder, ext) if p != target and p.stem.lower() != "mixture"]
        if target and not others:
            raise UserError(f"{folder}: no file *{ext} to mix with {target.name}; see --ext")
        check_sources([wanted, *(path.stem for path in others)], folder)
        files = {path: path.stem for path in others} | ({target: wanted} if target else {})
        if files:
            sources = {files[path]: AudioFile.open(path) for path in sorted(files)}
            tracks.append(Track(folder.name, sources))
    if not tracks:
        raise UserError(f"{root}/{split}: no track folder has a file *{ext}; see --ext")
    return tracks


def check_sources(names, where):
    """Raise UserError where a source's name can't be one, or two have the same."""
    for name in names:
        check_name(name, f"{where}: the source")
        if names.count(name) > 1:
            raise UserError(f"{where}: two sources would be called {name}; use each file once")


def track_folders(root, split, files):
    """{track folder of root/split: paths of its `files`, names or patterns such as *vocals.wav}."""
    root = Path(root, split)
    folders = {path: [find_file(path, f) for f in files] for path in visible(root) if path.is_dir()}
    if not any(all(paths) for paths in folders.values()):
        wanted = f" with {' and '.join(files)}" if files else ""
        expected = f"(expected {root}/<track>/...); {found_in(root)}"
        raise UserError(f"{root}: no track folder{wanted} in it {expected}")
    for folder, paths in folders.items():
        check_name(folder.name, f"{root}: the track", reserved=())
        if not all(paths):
            lacking = files[paths.index(None)]
            raise UserError(f"{folder}: lacks {lacking}; add it or remove the track")
    return folders


def visible(folder, ending=""):
    """What a folder holds, sorted, but nothing hidden (macOS leaves ._vocals.wav about)."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    ending = ending.lower()
    return [path for path in found if path.name.lower().endswith(ending) and path.name[0] != "."]


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


@dataclass(frozen=True)
class Layout:
    """A kind of data set. Its flags are the further arguments of its functions, by name."""

    index: Callable  # (root, split, ...) -> [Track]
    target_flag: str | None = None  # which flag names the target's file; None: --target does
    mix: str = "tracks"  # see RandomMixes
    mix_flags: dict = field(default_factory=dict)  # {flag: how to mix where it is set}
    find: Callable | None = None  # (root or None, ...) -> root; None: it must be given
    songs: bool = True  # False: recordings, which validation mixes at random, too

    @property
    def all_flags(self):
        """The names of all data flags that matter here, but root and target."""
        functions = [function for function in (self.index, self.find) if function]
        flags = itertools.chain(*(inspect.signature(f).parameters for f in functions))
        augmented = [] if self.mix == "aligned" else ["source_augmentations"]
        return {*flags, *self.mix_flags, *augmented} - {"root", "split"}


LAYOUTS = {  # a new one is one more row
    "musdb": Layout(
        index_musdb, find=lambda root, is_wav=False, cache=None: find_musdb(root, is_wav, cache)
    ),
    "synthetic": Layout(index_musdb, find=lambda root: find_synthetic(root)),
    "aligned": Layout(index_aligned, "output_file", "aligned"),
    "sourcefolder": Layout(index_sourcefolder, "target_dir", songs=False),
    "trackfolder_fix": Layout(
        index_trackfolder_fix, "target_file", "own", {"random_track_mix": "tracks"}
    ),
    "trackfolder_var": Layout(
        index_trackfolder_var, "target_file", "own", {"random_interferer_mix": "track"}
    ),
}


def index_dataset(layout_name, root, splits, /, **flags):
    """{split: [Track]} of the splits ("train", "valid", "test"); the layout picks its own flags."""

    def call(function, **known):
        known = {**flags, **known}
        names = inspect.signature(function).parameters
        return function(**{name: known[name] for name in names if name in known})

    layout = LAYOUTS[layout_name]
    if layout.find:
        root = call(layout.find, root=root)
    elif root is None:
        raise UserError(f"--dataset {layout_name} needs --root, which holds train/ and valid/")
    root = Path(root).expanduser()
    return {split: call(layout.index, root=root, split=split) for split in splits}


def files_of(tracks):
    return {audio for track in tracks for audio in (*track.input, *track.sources.values())}


def most_common_rate(tracks, sample_rate=None):
    """`sample_rate`, or that of most files, in Hz; prints which files are slow to read."""
    files = files_of(tracks)
    rates = collections.Counter(sorted(audio.rate for audio in files))
    sample_rate = sample_rate or rates.most_common(1)[0][0]
    if others := [f"{rate} Hz" for rate in sorted(rates) if rate != sample_rate]:
        slow = "are resampled as they are read: convert them for speed"
        print(f"some files are not in {sample_rate} Hz ({', '.join(others)}) and {slow}")
    if slow := sorted(audio.path for audio in files if not audio.dtype):
        each = "each is decoded from its start for every example: convert them to WAV or FLAC"
        print(utils.printable(f"{len(slow)} files are slow to read ({slow[0]}, ...); {each}"))
    return sample_rate


def load_datasets(tracks, layout_name, targets, sample_rate, nb_channels=2, **examples):
    """The data sets of a training: (examples, validation, what input statistics are taken from).

    Args:
        tracks: what index_dataset gives for "train" and "valid".
        nb_channels: of the model. One for mono sees the mean of all channels' magnitudes, and gets
            as many channels as the files have.
        examples: source_augmentations (names in AUGMENTATIONS), further arguments of RandomMixes.
    """
    layout = LAYOUTS[layout_name]
    if nb_channels == 1:
        files = files_of(itertools.chain(*tracks.values()))
        nb_channels = max(audio.channels for audio in files)
    settings = {"sample_rate": sample_rate, "nb_channels": nb_channels}
    examples = {"mix": layout.mix, **settings, **examples}
    augmentations = [AUGMENTATIONS[name] for name in examples.pop("source_augmentations", ())]
    if examples["mix"] == "aligned":  # the input is a file, not a sum
        augmentations = []
    train = RandomMixes(tracks["train"], targets, augmentations=augmentations, **examples)
    if layout.songs:
        valid = WholeTracks(tracks["valid"], targets, **settings)
        return train, valid, WholeTracks(tracks["train"], (), **settings)
    examples["seed"] = 0  # always the same mixes
    fixed = [RandomMixes(tracks[split], targets, **examples) for split in ("valid", "train")]
    for mixes in fixed:
        mixes.samples_per_epoch = max(100, len(mixes.tracks))
    return train, *fixed


# ----------------------------------------------------------------------------------------- MUSDB18


@functools.cache
def musdb_settings():
    """musdb's own configuration: the address of its sample, the validation tracks."""
    path = Path(importlib.util.find_spec("musdb").origin).parent / "configs" / "mus.yaml"
    return yaml.safe_load(path.read_text())


def find_musdb(root=None, is_wav=False, cache=None):
    """The folder of MUSDB18 in musdb's WAV layout, made where that is needed.

    Without `root`: the folder in MUSDB_PATH, or musdb's 7-second sample, downloaded where missing,
    or, where that can't be had, synthesized songs. Stems are decoded into `cache` or <root>-wav.
    """
    flag = "MUSDB_PATH" if root is None else "--root"
    root = os.environ.get("MUSDB_PATH") or None if root is None else root
    if root is None:
        root = Path.home() / "MUSDB18" / "MUSDB18-7"
        try:
            if not (root / "train").is_dir():
                fetch_archive(musdb_settings()["sample-url"], root)
        except (UserError, OSError) as error:
            why = f"MUSDB18's 7-second sample can't be had ({error})."
            print(utils.printable(f"{why} Synthesized songs are used instead."))
            return find_synthetic()
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {flag} names one that holds train/ and test/")
    if is_wav or not stem_files(root):
        return root
    return decode_stems(root, Path(cache or f"{root.resolve()}-wav").expanduser())


def stem_files(root):
    return [path for part in ("train", "test") for path in visible(root / part, ".stem.mp4")]


# The data sets, as archives of train/ and test/: address, GB, GB unpacked, SHA-256 where published.
SETS = {
    "musdb18": ("https://zenodo.org/records/1117372/files/musdb18.zip", 4.7, 4.7, ""),
    "musdb18hq": (
        "https://zenodo.org/records/3338373/files/musdb18hq.zip",
        22.7,
        31.0,
        "baac80d0483c61d74b2e5f3be75fa557eec52898339e6aa45c1fa48833c5d21d",
    ),
}


def fetch_set(name, root):
    """Fetch MUSDB18 or MUSDB18-HQ to the folder `root`, or go on fetching; returns it as a Path.

    Raises UserError where `root` holds anything else, or the disk is too small.
    """
    root = Path(root).expanduser()
    url, packed, unpacked, sha256 = SETS[name]
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root
    if visible(root) or root.is_file():
        raise UserError(f"{root}: holds something else; name an empty or a new folder with --root")
    root.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root.parent).free / 1e9
    archive = utils.hidden(root, "zip")
    here = sum(p.stat().st_size for p in (archive, utils.hidden(archive, "part")) if p.exists())
    print(f"{name}: {packed} GB to fetch, {packed + unpacked:.0f} GB of disk while it is unpacked")
    print("its songs are for research and education, most not for commerce: see its page,", url)
    if free < packed + unpacked - here / 1e9:
        raise UserError(f"{root}: {free:.0f} GB are free there; choose another --root")
    fetch_archive(url, root, sha256)
    return root


def fetch_archive(url, folder, sha256=""):
    """Fetch a zip of train/... and test/... and unpack it to a folder, whole or not at all."""
    archive, by_hand = utils.hidden(folder, "zip"), f"fetch it by hand and unpack it to {folder}"
    with utils.only_writer(folder, "a data set"):
        if (folder / "train").is_dir():  # made while this process waited
            return
        if not archive.exists():
            utils.download(url, archive, sha256, by_hand)
        try:
            with new_folder(folder) as unpacked:
                with zipfile.ZipFile(archive) as file:
                    for name in tqdm(file.namelist(), f"unpacking to {folder.name}", unit="file"):
                        file.extract(name, unpacked)  # checked; its name can't lead out of there
                if not (stem_files(unpacked) or visible(unpacked / "train")):
                    raise zipfile.BadZipFile("it holds no train/")
        except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            if not isinstance(error, OSError):  # else the disk is full: the archive is good
                archive.unlink()
            raise UserError(f"{url}: could not be unpacked ({error}); {by_hand}") from error
        archive.unlink()


def decode_stems(root, cache):
    """Decode MUSDB18's .stem.mp4 files to WAV, once, in musdb's WAV layout.

    Each track holds a record of its stem file: one that was replaced is decoded anew, and where it
    is gone (moved from train/ to test/, say) the track goes, too.
    """
    remedy = "name another folder with --cache"
    stems = {}
    for path in stem_files(root):
        stems[cache / path.parent.name / path.name.removesuffix(".stem.mp4")] = path
    for folder in (*visible(cache / "train"), *visible(cache / "test")):
        source = made_from(folder).get("path", "")
        stem = stems.get(folder)
        if stem and is_made(folder, stem):
            continue
        if not Path(str(source)).is_relative_to(root.resolve()):
            raise UserError(f"{folder}: was not decoded from {root}; remove it, or {remedy}")
        if not stem:
            print(utils.printable(f"{folder}: removed, as {source} is no longer there"))
            shutil.rmtree(folder)
    make_tracks(stems, decode_stem, lambda stem: 6 * stem.stat().st_size, cache, remedy)
    return cache


def decode_stem(stem, folder):
    """Decode a stem file to five 16-bit WAV files, within a unit of what musdb decodes."""
    record = {"path": str(Path(stem).resolve()), "stamp": utils.stamp(stem)}
    with new_folder(folder) as unfinished:
        for number, name in enumerate(("mixture", "drums", "bass", "other", "vocals")):
            try:
                container = av.open(str(stem))
                stream = container.streams.audio[number]
                seconds = stream.duration * stream.time_base
            except (av.FFmpegError, IndexError, TypeError) as error:
                what = "is not a stem file with five audio streams"
                raise UserError(f"{stem}: {what} ({error}); replace it") from error
            path = unfinished / f"{name}.wav"
            form = stream.rate, stream.channels, "PCM_16"
            with container, soundfile.SoundFile(path, "w", *form) as file:
                blocks = utils.decode(stem, container, stream)
                while some := [*itertools.islice(blocks, 256)]:  # frames are short
                    samples = np.rint(np.concatenate(some, axis=1).T * 32768)
                    file.write(samples.clip(-32768, 32767).astype(np.int16))
                if file.frames < seconds * stream.rate - 4096:  # an encoder's delay and padding
                    raise UserError(f"{stem}: is cut short; replace it")
        utils.save(record, unfinished / "source.json")


def make_tracks(tracks, make, size, root, remedy):
    """Make, in parallel, what lacks of {track folder: its origin, a stem file or a seed}.

    `make(origin, folder)` makes one, `size(origin)` is about its bytes. Raises UserError with the
    remedy where `root` can't be written or has too little space.
    """

    if all(is_made(folder, origin) for folder, origin in tracks.items()):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with utils.only_writer(root / "tracks", "a data set"):
            todo = {path: item for path, item in tracks.items() if not is_made(path, item)}
            needed = sum(map(size, todo.values())) / 1e9
            free = shutil.disk_usage(root).free / 1e9
            what = f"{needed:.2f} GB for {len(todo)} of {len(tracks)} tracks"
            print(f"made once, in {utils.printable(str(root))}: {what}")
            if free < needed:
                raise UserError(f"{root}: {needed:.2f} GB needed, {free:.2f} GB free; {remedy}")
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(make, todo.values(), todo)
                list(tqdm(made, total=len(todo), desc=root.name, unit="track"))
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{root}: cannot be written to ({error}); {remedy}") from error


def is_made(folder, origin):
    """Whether a track is there and, if decoded, from its stem file as that is now."""
    if isinstance(origin, int):
        return folder.is_dir()
    return made_from(folder).get("stamp") == utils.stamp(origin)


def made_from(folder):
    """The record of a decoded track: {"path": its stem file, "stamp": of that}; {} without one."""
    record = folder / "source.json"
    found = utils.load(record) if record.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{record}: is no record of a decoded track; remove its folder")
    return found


@contextlib.contextmanager
def new_folder(folder):
    """Yield a folder to fill, which gets its name once it is whole."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ------------------------------------------------------------------------------- songs from a seed

SONGS = {"train": 56, "test": 8}
# The code that makes them, as it is imported: other code makes other songs.
SONGS_CODE = Path(__file__).read_text(encoding="utf-8").partition("\ndef make_song")[2]
SONGS_CODE = hashlib.sha256(SONGS_CODE.encode()).hexdigest()[:6]


def find_synthetic(root=None, seconds=15.0, songs=SONGS):
    """Synthesized songs in musdb's WAV layout, made once; the test part also holds one real song.

    That is the excerpt of MUSDB18 that stempeg ships: a score on real music stands beside the
    others. Raises UserError for a folder with other songs in it, or those of other code.
    """
    root = Path(root or Path.home() / "MUSDB18" / f"synthetic-{SONGS_CODE}").expanduser()
    remedy = "name another folder with --root"
    for path in visible(root / "train"):
        if not path.name.startswith("Synthesized"):
            raise UserError(f"{path}: is no synthesized song; {remedy}")
    record, made_by = root / "songs.json", {"code": SONGS_CODE, "seconds": seconds}
    if not record.exists() and not visible(root / "train"):
        utils.save(made_by, record)
    elif not record.is_file() or utils.load(record) != made_by:
        raise UserError(f"{root}: its songs are by another data.py; remove it, or {remedy}")
    names = [f"{part}/Synthesized - Song {n + 1:02d}" for part in songs for n in range(songs[part])]
    seeds = {root / name: seed for seed, name in enumerate(names)}
    make_tracks(seeds, functools.partial(make_song, seconds), lambda _: 9e5 * seconds, root, remedy)
    shipped = Path(importlib.util.find_spec("stempeg").origin).parent / "data"
    stems = visible(shipped, ".stem.mp4")
    stems = {root / "test" / stem.name.removesuffix(".stem.mp4"): stem for stem in stems}
    make_tracks(stems, decode_stem, lambda stem: 6 * stem.stat().st_size, root, remedy)
    return root


def make_song(seconds, seed, folder):
    """Synthesize a song as 16-bit WAV; the mixture is the sum of the sources to the bit."""
    song = synthesize_song(seed, seconds)
    song = {name: np.round(audio * 32767).astype(np.int16) for name, audio in song.items()}
    with new_folder(folder) as unfinished:
        for name, audio in {"mixture": sum(song.values()), **song}.items():
            soundfile.write(unfinished / f"{name}.wav", audio, 44100, subtype="PCM_16")


SCALES = np.array([(0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)])  # major, minor: semitones
VERSES = ((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (0, 3, 0, 4), (0, 2, 3, 4), (1, 4, 0, 5))
# Rhythms: the sixteenths of a bar in which notes begin, as hexadecimal digits.
KICKS = ["048c", "08", "068", "036a", "02ab"]
SNARES = ["4c", "8", "479c", "4cf"]
HATS = ["02468ace", "0123456789abcdef", "26ae", "0234678abcef"]
CYMBALS = ["0", "08", "048c", "02468ace"]
CALM = ["0", "08", "036", "06a", "048c"]
BUSY = ["02468ace", "0368be", "0369ce", "02368abe", "0268ae"]
VOWELS = (  # a e i o u: formants in Hz, the first three after Peterson & Barney (1952), men
    (730, 1090, 2440, 3400, 4500),
    (530, 1840, 2480, 3500, 4500),
    (270, 2290, 3010, 3600, 4600),
    (570, 840, 2410, 3300, 4400),
    (300, 870, 2240, 3200, 4300),
)


class SongPlan:
    """What the players agree on: tempo, key, and a chord for each bar."""

    def __init__(self, rng, seconds, rate):
        self.rate = rate
        self.N = round(seconds * rate)
        self.sixteenth = int(rate * 15 / rng.uniform(72, 148))  # in samples
        self.key = rng.integers(12)
        self.scale = rng.choice(SCALES)
        self.chords = np.resize(rng.permutation(VERSES)[:2], self.N // (16 * self.sixteenth) + 1)

    def draw_notes(self, rng, rhythms, voicings=((0,),), octave=0):
        """Notes in one of the rhythms: [(first sample, end sample, Hz (voices,)), ...].

        Each is the next of voicings, which are degrees of the scale above the chord's root.
        """
        steps = np.array([int(digit, 16) for digit in rng.choice(rhythms)] + [16])
        steps = steps + 16 * np.arange(len(self.chords))[:, None]  # (bars, notes + 1)
        starts = steps[:, :-1].ravel() * self.sixteenth
        ends = np.minimum(steps[:, 1:].ravel() * self.sixteenth, self.N)
        chords = self.chords.repeat(steps.shape[1] - 1)[:, None]
        degrees = chords + np.resize(voicings, (len(chords), len(voicings[0])))
        octaves = octave + degrees // 7
        semitones = self.scale[degrees % 7] + 12 * octaves + self.key - 69  # from A4
        hertz = 440 * 2 ** (semitones / 12)
        return [note for note in zip(starts, ends, hertz) if note[0] < note[1]]


def synthesize_sawtooth(cycles, ratio):
    """Harmonics k at amplitude ratio^k / k, by their closed sum; phase in cycles."""
    phase = (2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32)
    return np.arctan2(ratio * np.sin(phase), 1 - ratio * np.cos(phase))


def synthesize_part(rng, plan, rhythms, voicings, octave, brightness, decay, width):
    """One instrument -> (2, N); brightness (Hz), decay (s) are ranges, width is from 0 to 1.

    Some have vibrato, some are as many as they have notes, a little out of tune.
    """
    stereo = np.zeros((2, plan.N), np.float32)
    angles = np.pi / 4 * (1 + width * rng.uniform(-1, 1, 5))
    ranges = zip(brightness, decay, (0.002, 0.02))
    brightness, decay, attack = rng.uniform(*ranges).astype("f4")
    hollow = np.float32(rng.choice([0, 0.3, 0.5]))
    vibrato = np.float32(rng.choice([0, 0, 0.0003]))  # seconds by which a wave comes early or late
    detuned = 1 + rng.choice([0, 0.004]) * rng.uniform(-1, 1, 5)
    for turn, (start, end, chord) in enumerate(plan.draw_notes(rng, rhythms, voicings, octave)):
        time = np.arange(end - start) / plan.rate
        since = time.astype(np.float32)
        waves = time + vibrato * np.sin(34 * since) * np.minimum(1, since)
        body = np.exp(-since / decay)
        level = np.float32(rng.uniform(0.6, 1)) * body * (1 - np.exp(-since / attack))
        level = level * np.minimum(1, (since[-1] - since) / np.float32(0.03))
        for voice, hertz in enumerate(chord):
            cutoff = np.minimum(np.float32(hertz) + brightness * body, plan.rate / 6)
            ratio = np.exp(np.float32(-hertz) / cutoff)
            player = (turn + voice) % 5
            cycles = hertz * detuned[player] * waves
            tone = synthesize_sawtooth(cycles, ratio)
            tone -= hollow * synthesize_sawtooth(2 * cycles, ratio**2)  # even harmonics
            sides = [[np.cos(angles[player])], [np.sin(angles[player])]]
            stereo[:, start:end] += np.float32(sides) * (level * tone)
    return stereo


def synthesize_drums(rng, plan):
    """Kick, snare, hi-hat and a cymbal -> (2, N)."""
    time = np.arange(plan.rate // 2 * 2) / plan.rate
    draw = rng.uniform

    def draw_hit(hertz, decay, hiss, tilt, hiss_decay):
        """A sine that falls to hertz, overdriven, and noise."""
        skin = np.sin(2 * np.pi * (hertz * time - 4 * np.exp(-time / 0.03)))
        skin = np.tanh(2 * skin * np.exp(-time / decay))
        noise = np.fft.rfft(rng.standard_normal(len(time)))
        noise = np.fft.irfft(noise * np.linspace(0.002, 1, len(noise)) ** tilt)
        return (1 - hiss) * skin + hiss * noise / noise.std() * np.exp(-time / hiss_decay)

    kick = draw_hit(draw(42, 60), draw(0.1, 0.2), 0.1, 0.5, 0.004)
    snare = draw_hit(draw(150, 230), 0.06, draw(0.3, 0.7), draw(-0.6, 0.6), draw(0.04, 0.15))
    hat = draw(0.1, 0.4) * draw_hit(1, 1, 1, draw(0.3, 2), draw(0.02, 0.1))
    cymbal = draw(0.05, 0.3) * draw_hit(1, 1, 1, draw(-0.3, 1), draw(0.1, 0.6))
    kit = (KICKS, kick, 0.5), (SNARES, snare, 0.5), (HATS, hat, draw(0.3, 0.7))
    stereo = np.zeros((2, plan.N), np.float32)
    for rhythms, hit, pan in (*kit, (CYMBALS, cymbal, draw(0.2, 0.8))):
        for start, end, _ in plan.draw_notes(rng, rhythms):
            sound = draw(0.6, 1) * np.outer([1 - pan, pan], hit[: end - start])
            stereo[:, start : start + sound.shape[1]] += sound
    return stereo


def synthesize_vocals(rng, plan):
    """A voice: buzz and breath through five moving formants, consonants before vowels -> (2, N)."""
    hop = 512  # samples between two shapes of the vocal tract
    octaves = [4, 5] if plan.key < 4 else [3, 4]
    degrees = rng.integers(-1, 6, (13, 1))
    notes = plan.draw_notes(rng, CALM[2:] + BUSY, degrees, rng.choice(octaves))
    curves = np.zeros((9, -(-plan.N // hop) + 1))
    pitch, vibrato, level, breath = curves[:4]  # views: octaves, octaves, amplitudes
    formants = curves[4:]  # a view: Hz
    pitch[:] = np.log2(notes[0][2])
    formants.T[:] = VOWELS[0]
    breathiness, depth, scoop = rng.uniform((0.02, 0.01, 0), (0.2, 0.04, 0.2))
    for start, end, hertz in notes:
        start = start // hop
        voiced = start + rng.integers(2, 8)
        end = end // hop - rng.integers(3, 8)
        pitch[start:] = np.log2(hertz)
        pitch[start : voiced + 3] -= scoop * rng.random()
        vibrato[voiced + 10 : end] = depth
        level[voiced:end] = rng.uniform(0.6, 1)
        breath[start:voiced] = rng.uniform(0, 1.2)
        breath[voiced:end] = breathiness
        formants.T[start:voiced] = rng.uniform(1000, 9000, 5)
        formants.T[voiced:] = rng.choice(VOWELS)
    reach = rng.integers(3, 6)  # hops in which the voice glides from one shape to the next
    window = np.hanning(2 * reach + 3)[1:-1] / (reach + 1)
    curves = np.pad(curves, ((0, 0), (reach, reach)), "edge")
    curves = sliding_window_view(curves, len(window), axis=1) @ window
    hops = np.arange(curves.shape[1])
    wobble = np.sin(2 * np.pi * rng.uniform(5, 6) * hop / plan.rate * hops)
    curves[0] = 2 ** (curves[0] + wobble * curves[1])
    samples = np.arange(plan.N) / hop
    hertz, level, breath = (np.interp(samples, hops, c).astype("f4") for c in curves[[0, 2, 3]])
    cycles = np.cumsum(hertz, dtype=np.float64) / plan.rate
    buzz = synthesize_sawtooth(cycles, np.exp(-hertz / rng.uniform(3000, 8000)))
    frequencies = np.fft.rfftfreq(2 * hop, 1 / plan.rate).astype(np.float32)
    gain = np.float32(0.03)  # (hops, bins)
    formants = np.float32(curves[4:, :, None] * rng.uniform(0.95, 1.15))
    for formant, height in zip(formants, (1, 0.7, 0.45, 0.4, 0.25)):
        gain = gain + height / (1 + ((frequencies - formant) / (50 + 0.05 * formant)) ** 2)
    window = 1.5 - np.abs(np.arange(0.5 - hop, hop, dtype=np.float32)) * 2 / hop
    voice = level * buzz + breath * rng.standard_normal(plan.N, np.float32)
    blocks = sliding_window_view(np.pad(voice, (hop, hop + -plan.N % hop)), 2 * hop)[::hop]
    blocks = np.fft.irfft(np.fft.rfft(blocks * np.clip(window, 0, 1)) * gain)
    voice = (blocks[:-1, hop:] + blocks[1:, :hop]).ravel()[: plan.N]  # the windows add up to 1
    return rng.uniform(0.8, 1, (2, 1)).astype(np.float32) * voice


def synthesize_song(seed, seconds=30.0, rate=44100):
    """One song, the same for the same arguments: {source: (N, 2) float32}.

    Args:
        seed: a non-negative integer. seconds: length, at least 1. rate: in Hz, at least 8000.

    Each source rests in up to a third of the two-bar sections, the voice in up to half, and has its
    own overdrive, equalizer, room and level; their sum peaks below 0.9.
    """
    from scipy.signal import firwin2, oaconvolve  # takes a second to import

    rng = np.random.default_rng(seed)
    plan = SongPlan(rng, seconds, rate)
    low = 3 if plan.key < 4 else 2
    leaps = rng.choice([0, 0, 4, 7], (4, 1))
    broken = 2 * rng.permutation(5)[:, None]
    bass = synthesize_part(rng, plan, CALM + BUSY, leaps, low, (200, 3000), (0.3, 2), 0)
    chords = synthesize_part(rng, plan, CALM, [[0, 2, 4]], low + 2, (500, 7000), (0.3, 6), 1)
    plucks = synthesize_part(rng, plan, BUSY, broken, low + 3, (1500, 9000), (0.1, 1), 1)
    drums = synthesize_drums(rng, plan)
    other = chords + rng.uniform(0.5, 2) * plucks
    stems = {"drums": drums, "bass": bass, "other": other, "vocals": synthesize_vocals(rng, plan)}
    section = 32 * plan.sixteenth  # two bars, in samples
    time = np.arange(rate // 4 * 2) / rate  # of an echo
    grid = np.linspace(0, 1, 257)  # frequencies, 1 is the highest
    for (source, stem), wetness in zip(stems.items(), (0.3, 0.1, 0.5, 0.4)):
        rests, drive = (0.5, 0.5) if source == "vocals" else (0.34, 6)
        sections = rng.permutation(plan.N // section + 1)
        plays = sections >= rng.integers(int(rests * len(sections)) + 1)
        stem = stem * plays.repeat(section)[: plan.N]
        drive = drive * rng.random() ** 2 / stem.std()
        stem = np.tanh(drive * stem) / drive
        decibels = np.interp(grid, 0.5 ** np.r_[9:-1:-1], rng.normal(0, 4, 10))
        equalizer = firwin2(511, grid, 10 ** (decibels / 20)).astype("f4")
        stem = oaconvolve(stem, equalizer[None], "same", axes=1)
        room = rng.standard_normal((2, len(time)), np.float32)
        room *= np.exp(-time / rng.uniform(0.04, 0.15)).astype("f4")
        room = np.fft.irfft(np.fft.rfft(room) / np.linspace(1, 8, len(time) // 2 + 1))
        echoes = oaconvolve(stem.mean(0, keepdims=True), room.astype("f4"), axes=1)[:, : plan.N]
        stem = stem / stem.std() + wetness * rng.uniform(0.2, 1) / echoes.std() * echoes
        stems[source] = 10 ** (rng.uniform(-3, 3) / 20) * stem / stem.std()
    scale = rng.uniform(0.4, 0.89) / np.abs(sum(stems.values())).max()
    return {name: np.ascontiguousarray(scale * stem.T, np.float32) for name, stem in stems.items()}
