"""Songs in, training examples out: dataset layouts, MUSDB18's sample, stems to WAV, synthesized songs, random mixes.

    files -> index_...() -> list of Track -> RandomMixes (training) or WholeTracks (validation) -> (mixture, target)

Axis letters: C channels, N samples (see model.py).
"""

import collections
import functools
import importlib.util
import json
import math
import os
import shutil
import subprocess
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from tqdm import tqdm

from utils import SOURCES, UserError, atomic_write, download, resample, use_ffmpeg, wav_layout

# ---------------------------------------------------------------------------------------------- files and tracks


@dataclass(frozen=True)
class Audio:
    """One indexed audio file; `length` in samples. WAV samples are memory-mapped, anything else is read by soundfile."""

    path: str
    rate: int
    channels: int
    length: int
    layout: tuple  # (dtype, offset) of a WAV's samples, () for other formats
    stamp: tuple  # (size, modification time) when it was indexed

    @classmethod
    def index(cls, path):
        """Read a file's header. Raises UserError for a file that is unreadable, empty or has more than two channels."""
        try:
            found = wav_layout(path)
            if found:
                rate, channels, dtype, offset, length = found
                layout = (dtype, offset)
            else:
                info = soundfile.info(str(path))
                rate, channels, length, layout = info.samplerate, info.channels, info.frames, ()
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); replace it") from error
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path}: is not audio that can be read ({error.error_string}); replace it") from error
        if length == 0 or channels > 2:
            problem = "contains no samples" if length == 0 else f"has {channels} channels, not one or two"
            raise UserError(f"{path}: {problem}; replace it")
        return cls(str(path), rate, channels, length, layout, (status.st_size, status.st_mtime_ns))

    def read(self, start, length):
        """Samples `start` to `start + length` as (C, N) float32 between -1 and 1, with silence beyond the file's ends."""
        status = os.stat(self.path)  # a map that reaches past the end of a shortened file would kill the process
        if (status.st_size, status.st_mtime_ns) != self.stamp:
            raise UserError(f"{self.path}: was changed since it was indexed; start again")
        first, last = max(start, 0), min(start + length, self.length)
        if first >= last:
            return np.zeros((self.channels, length), np.float32)
        if self.layout:
            audio = to_float(mapped(self)[first:last])
        else:
            with soundfile.SoundFile(self.path) as file:
                file.seek(first)
                audio = file.read(last - first, dtype="float32", always_2d=True)
            if len(audio) < last - first:
                raise UserError(f"{self.path}: breaks off after {first + len(audio)} of {self.length} samples; replace it")
        if last - first < length:
            audio = np.pad(audio, ((first - start, start + length - last), (0, 0)))
        return audio.T  # (C, N)


@functools.lru_cache(maxsize=4096)
def mapped(audio):
    """The samples of a WAV file as a memory map (N, C), or (N, C, 3) bytes for 24 bit; opened once in each process."""
    dtype, offset = audio.layout
    shape = (audio.length, audio.channels) + (3,) * (dtype == "<i3")
    dtype = "u1" if dtype == "<i3" else dtype
    return np.asarray(np.memmap(audio.path, dtype, mode="r", offset=offset, shape=shape))


def to_float(samples):
    """Integer PCM to float32 between -1 and 1: (N, C), or (N, C, 3) bytes for 24 bit, -> (N, C)."""
    if samples.dtype == np.uint8:
        low, middle, high = np.moveaxis(samples.astype(np.int32), -1, 0)
        samples = high << 24 | middle << 16 | low << 8
    if samples.dtype == np.float32:
        return samples
    return np.multiply(samples, np.float32(1 / -float(np.iinfo(samples.dtype).min)), dtype=np.float32)


def read_as(audio, start, length, rate, channels):
    """`audio.read` in another sample rate and channel count; `start` and `length` count samples at `rate`."""
    if audio.rate == rate:
        samples = audio.read(start, length)  # (C, N)
    else:  # whole periods of the rates' ratio and some context give the same samples as resampling the whole file
        divisor = math.gcd(audio.rate, rate)
        old, new = audio.rate // divisor, rate // divisor
        context = math.ceil(16 * max(1, old / new) / old)  # periods
        first = start // new
        periods = -(-(start + length) // new) - first
        samples = audio.read((first - context) * old, (periods + 2 * context) * old)
        samples = resample(torch.from_numpy(np.ascontiguousarray(samples)), audio.rate, rate).numpy()
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
    def audios(self):
        return [*self.sources.values()] + [self.mixture] * (self.mixture is not None)

    def length(self, rate):
        """Samples of the longest file, or of the mixture where there is one, at `rate`."""
        files = [self.mixture] if self.mixture else self.sources.values()
        return max(-(-audio.length * rate // audio.rate) for audio in files)


def target_sources(target, tracks):
    """The names of the sources that make up a target: its own, or all but vocals for "accompaniment"."""
    names = sorted({name for track in tracks for name in track.sources})
    if target in names:
        return [target]
    if target == "accompaniment" and "vocals" in names:
        return [name for name in names if name != "vocals"]
    raise UserError(f"--target {target}: no such source in the data; it has {', '.join(names)}")


# ---------------------------------------------------------------------------------------------- layouts of datasets


def index_musdb(root, split):
    """MUSDB18 in musdb's WAV layout: MUSDB18-HQ, decoded stems (`decode_stems`) or synthesized songs.

        root/train/<track>/mixture.wav  drums.wav  bass.wav  other.wav  vocals.wav
        root/test/<track>/...

    Args:
        root: folder. split: "train" and "valid" part root/train by musdb's own list of validation tracks (a dataset
            with none of those gives every seventh track); "test" is root/test.
    """
    subset = "test" if split == "test" else "train"
    folders = track_folders(root, subset, "mixture.wav, drums.wav, bass.wav, other.wav and vocals.wav", "mixture.wav")
    if subset == "train":
        listed = set(musdb_settings()["validation_tracks"])
        names = [folder.name for folder in folders]
        validation = listed.intersection(names) or set(names[::7] if len(names) > 1 else names)
        folders = [folder for folder in folders if (folder.name in validation) == (split == "valid")]
        if not folders:
            raise UserError(f"{root}/train: has {len(names)} tracks, none of them for {split}ing; add more")
    return [
        Track(folder.name, index_files(folder, {name: f"{name}.wav" for name in SOURCES}), Audio.index(folder / "mixture.wav"))
        for folder in folders
    ]


def index_aligned(root, split, input_file="mixture.wav", output_file="vocals.wav"):
    """Pairs of files that match sample by sample, for denoising or any input -> output.

    root/train/<track>/mixture.wav --> input
    root/train/<track>/vocals.wav ---> output
    root/valid/<track>/...
    """
    folders = track_folders(root, split, f"{input_file} and {output_file}", input_file, output_file)
    target = Path(output_file).stem
    return [Track(f.name, index_files(f, {target: output_file}), Audio.index(one_file(f, input_file))) for f in folders]


def index_sourcefolder(root, split, target_dir, interferer_dirs, ext=".wav"):
    """A folder of recordings for each source, not aligned with each other; mixed at random.

    root/train/vocals/track11.wav -----------------.
    root/train/drums/track202.wav  (interferer 1) --+--> input
    root/train/bass/track007a.wav  (interferer 2) -'
    root/train/vocals/track11.wav ---------------------> output
    root/valid/...
    """
    tracks = []
    for name in [target_dir, *interferer_dirs]:
        folder = Path(root, split, name)
        files = sorted(folder.glob(f"*{ext}")) if folder.is_dir() else []
        if not files:
            raise UserError(f"{folder}: no files *{ext} there{found_in(folder)}")
        tracks += [Track(f"{name}/{path.stem}", {name: Audio.index(path)}) for path in files]
    return tracks


def index_trackfolder_fix(root, split, target_file="vocals.wav", interferer_files=("drums.wav", "bass.wav", "other.wav")):
    """Track folders that all hold the same files; their sum is the input.

    root/train/<track>/vocals.wav ---------------.
    root/train/<track>/drums.wav (interferer 1) --+--> input
    root/train/<track>/bass.wav  (interferer 2) -'
    root/train/<track>/vocals.wav -------------------> output
    root/valid/<track>/...
    """
    files = [target_file, *interferer_files]
    folders = track_folders(root, split, " and ".join(files), *files)
    return [Track(folder.name, index_files(folder, {Path(file).stem: file for file in files})) for folder in folders]


def index_trackfolder_var(root, split, target_file="vocals.wav", ext=".wav", silence_missing=False):
    """Track folders with any number of files besides the target (no mixture among them!); their sum is the input.

    root/train/<track>/vocals.wav --------> output
    root/train/<track>/*.wav, summed -----> input
    root/valid/<track>/...
    With `silence_missing` a track without the target file counts as one whose target is silent.
    """
    required = [] if silence_missing else [target_file]
    tracks = []
    for folder in track_folders(root, split, target_file, *required):
        files = sorted(path.name for path in folder.glob(f"*{ext}"))
        if files:
            tracks.append(Track(folder.name, index_files(folder, {Path(file).stem: file for file in files})))
    if not tracks:
        raise UserError(f"{root}/{split}: no track folder has a file *{ext}; see --ext")
    return tracks


def track_folders(root, split, expected, *required):
    """The sorted track folders of root/split; each must hold the `required` files (patterns such as *.wav may be used)."""
    folder = Path(root, split)
    tracks = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    tracks = [track for track in tracks if not track.name.startswith(".")]
    if not any(all(any(track.glob(name)) for name in required) for track in tracks):
        raise UserError(f"{folder}: no track folder with {expected} in it (expected {folder}/<track>/...){found_in(root)}")
    for track in tracks:
        for name in required:
            if not any(track.glob(name)):
                raise UserError(f"{track}: lacks {name}; add it or remove the track")
    return tracks


def found_in(folder):
    """What a folder holds, for error messages."""
    if not Path(folder).is_dir():
        return f"; {folder} is not a folder"
    names = sorted(path.name for path in Path(folder).iterdir())
    return f"; {folder} holds {', '.join(names[:4]) + (' ...' if len(names) > 4 else '') or 'nothing'}"


def one_file(folder, pattern):
    return sorted(folder.glob(pattern))[0]


def index_files(folder, files):
    """{source name: file name or pattern} -> {source name: Audio}"""
    for file in files.values():
        if not any(folder.glob(file)):
            raise UserError(f"{folder}: lacks {file}; add it or remove the track")
    return {name: Audio.index(one_file(folder, file)) for name, file in files.items()}


# ---------------------------------------------------------------------------------------------- MUSDB18


@functools.cache
def musdb_settings():
    """musdb's own configuration: the address of its sample, the validation tracks."""
    path = Path(importlib.util.find_spec("musdb").origin).parent / "configs" / "mus.yaml"
    return yaml.safe_load(path.read_text())


def find_data(root=None, dataset="musdb", is_wav=False, cache=None):
    """The folder of a dataset in musdb's WAV layout, made where that is needed.

    Without `root`: the folder in MUSDB_PATH, or musdb's 7-second sample, downloaded where missing, or, where that
    can't be had, synthesized songs. MUSDB18's stems are decoded to WAV once.
    """
    home = Path.home() / "MUSDB18"
    if dataset == "synthetic":
        return make_synthetic(Path(root or home / SYNTHETIC))
    if root is None:
        root = os.environ.get("MUSDB_PATH")
    if root is None:
        root = home / "MUSDB18-7"
        if not (root / "train").is_dir():
            try:
                download_sample(musdb_settings()["sample-url"], root)
            except UserError as error:
                print(f"MUSDB18's 7-second sample can't be had ({error}). Synthesized songs are used instead.")
                return make_synthetic(home / SYNTHETIC)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --root names one that holds train/ and test/")
    if is_wav or not any(root.glob("*/*.stem.mp4")):
        return root
    return decode_stems(root, Path(cache).expanduser() if cache else root.with_name(root.name + "-wav"))


def download_sample(url, folder):
    """Fetch MUSDB18's sample (a zip of train/*.stem.mp4 and test/*.stem.mp4) into `folder`, whole or not at all."""
    folder = Path(folder)
    archive, unpacked = folder.with_name(f".{folder.name}.zip"), folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        download(url, archive)
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if not Path(unpacked, name).resolve().is_relative_to(unpacked.resolve()):
                    raise UserError(f"{url}: the archive holds {name!r}, a path that leads out of it; fetch the data by hand")
            content.extractall(unpacked)
        if not any(unpacked.glob("train/*.stem.mp4")):
            raise UserError(f"{url}: the archive holds no train/*.stem.mp4; fetch the data by hand")
        os.replace(unpacked, folder)
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise UserError(f"{url}: could not be unpacked to {folder} ({error})") from error
    finally:
        archive.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)


def decode_stems(root, destination):
    """Decode MUSDB18's .stem.mp4 files to 16-bit WAV in musdb's WAV layout, sample for sample what musdb decodes.

    Tracks are decoded in parallel, each beside its place and then renamed; those that are there already are kept.
    Raises UserError for too little space, a folder that can't be written, a file that can't be decoded.
    """
    use_ffmpeg()
    root, destination = Path(root), Path(destination)
    jobs = []  # (stem file, folder to make)
    for stem in sorted(root.glob("*/*.stem.mp4")):
        folder = destination / stem.parent.name / stem.name.removesuffix(".stem.mp4")
        if not folder.is_dir():
            jobs.append((stem, folder))
    if not jobs:
        return destination
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{destination}: cannot be made ({error.strerror}); name another folder with --cache") from error
    if not os.access(destination, os.W_OK):
        raise UserError(f"{destination}: cannot be written to; name another folder with --cache")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        needed = sum(pool.map(lambda job: decoded_bytes(job[0]), jobs)) / 1e9
        free = shutil.disk_usage(destination).free / 1e9
        print(f"{len(jobs)} tracks of {root} are decoded to {destination} once: {needed:.2f} GB")
        if free < needed:
            raise UserError(f"{destination}: {needed:.2f} GB needed, {free:.2f} GB free; name another folder with --cache")
        for _ in tqdm(pool.map(lambda job: decode_stem(*job), jobs), total=len(jobs), desc="decoding", unit="track"):
            pass
    return destination


def decoded_bytes(stem):
    """The size of a stem file's five streams as 16-bit WAV."""
    command = ["ffprobe", "-v", "error", "-of", "json", "-show_entries", "stream=codec_type,duration_ts,channels", f"file:{stem}"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    streams = json.loads(done.stdout or "{}").get("streams", [])
    audio = [stream for stream in streams if stream["codec_type"] == "audio"]
    if done.returncode or len(audio) != 5:
        raise UserError(f"{stem}: is not a stem file with five audio streams; replace it")
    return sum(2 * stream["channels"] * stream["duration_ts"] for stream in audio)


def decode_stem(stem, folder):
    """Decode one stem file: streams mixture, drums, bass, other, vocals."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", f"file:{stem}"]
    for stream, name in enumerate(("mixture", "drums", "bass", "other", "vocals")):
        command += ["-map", f"0:{stream}", "-c:a", "pcm_s16le", "-bitexact", "-f", "wav", f"file:{unfinished / name}.wav"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        shutil.rmtree(unfinished)
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["ffmpeg failed"]
        raise UserError(f"{stem}: cannot be decoded ({reason[-1]})")
    os.replace(unfinished, folder)


# ---------------------------------------------------------------------------------------------- synthesized songs

SYNTHETIC = "synthetic-30s"
SONGS = {"train": 28, "test": 6}


def make_synthetic(root, seconds=30.0, songs=SONGS):
    """Synthesized songs in musdb's WAV layout, made once and kept; the test part also holds one real song.

    That one is the excerpt of MUSDB18 that the package stempeg ships: a score on real music always stands beside those
    on synthesized songs. A folder with other songs in it is left as it is.
    """
    root = Path(root).expanduser()
    jobs = []
    for seed, (subset, number) in enumerate((subset, n) for subset in songs for n in range(songs[subset])):
        folder = root / subset / f"Synthesized - Song {number + 1:02d}"
        if not folder.is_dir():
            jobs.append((folder, seed, seconds))
    if jobs:
        print(f"{len(jobs)} songs of {seconds:.0f} s are synthesized into {root} once")
        with ProcessPoolExecutor() as pool:
            for _ in tqdm(pool.map(make_song, *zip(*jobs)), total=len(jobs), desc="synthesizing", unit="song"):
                pass
    package = Path(importlib.util.find_spec("stempeg").origin).parent
    for stem in (package / "data").glob("*.stem.mp4"):
        folder = root / "test" / stem.name.removesuffix(".stem.mp4")
        if not folder.is_dir():
            use_ffmpeg()
            decode_stem(stem, folder)
    return root


def make_song(folder, seed, seconds):
    """Synthesize one song into a track folder of 16-bit WAV files; the mixture is the sum of the others to the bit."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    sources = {name: np.round(audio * 32767).astype(np.int16) for name, audio in synthesize_song(seed, seconds).items()}
    for name, audio in {"mixture": sum(sources.values()), **sources}.items():
        soundfile.write(unfinished / f"{name}.wav", audio, 44100, subtype="PCM_16")
    os.replace(unfinished, folder)


SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major and minor, in semitones above the key note
PROGRESSIONS = ((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (0, 3, 0, 4), (0, 2, 3, 4), (1, 4, 0, 5), (0, 0, 3, 4))
# A bar in sixteenths, an x for an onset.
KICKS = ("x...x...x...x...", "x.......x.......", "x.....x.x.......", "x..x..x...x.....", "x.x.......xx....")
SNARES = ("....x.......x...", "........x.......", "....x..x.x..x...", "....x.......x..x")
HATS = ("x.x.x.x.x.x.x.x.", "xxxxxxxxxxxxxxxx", "..x...x...x...x.", "x...x...x...x...", "x.xxx.xxx.xxx.xx")
SPARSE = ("x...............", "x.......x.......", "x..x..x.........", "x.....x...x.....", "x...x...x...x...")
DENSE = ("x.x.x.x.x.x.x.x.", "x..x..x.x..x..x.", "x..x..x..x..x.x.", "x.xx..x.x.xx..x.", "xxxxxxxxxxxxxxxx")
# Formants in Hz of the vowels a e i o u; the first three after Peterson & Barney (1952), men.
VOWELS = np.array([(730, 1090, 2440, 3400, 4500), (530, 1840, 2480, 3500, 4500), (270, 2290, 3010, 3600, 4600),
                   (570, 840, 2410, 3300, 4400), (300, 870, 2240, 3200, 4300)])
HOP = 512  # samples between two shapes of the vocal tract


class _Score:
    """What the players agree on: tempo, swing, key, a chord for each bar, and who rests in which two bars."""

    def __init__(self, rng, seconds, rate):
        self.rate, self.N = rate, round(seconds * rate)
        self.sixteenth, self.swing = 15 / rng.uniform(72, 148), rng.choice([0, 0, 0.15, 0.3])
        bars = int(np.ceil(seconds / (16 * self.sixteenth)))
        self.key, self.scale = rng.integers(12), SCALES[rng.integers(2)]
        parts = rng.permutation(PROGRESSIONS)[:2]  # verse and chorus, four bars each
        self.chords = [int(parts[bar // 4 % 2][bar % 4]) for bar in range(bars)]
        rests = np.zeros((-(-bars // 2), len(SOURCES)), bool)
        for source in rests.T:  # at most three tenths, so that everybody sounds in most of the song
            source[rng.permutation(len(source))[: rng.integers(int(0.3 * len(source)) + 1)]] = True
        rests[rests.all(axis=1)] = False
        self.bars = {source: np.flatnonzero(~rest.repeat(2)[:bars]) for source, rest in zip(SOURCES, rests.T)}

    def onset(self, bar, step):
        """Sample at which a sixteenth of a bar begins; every second one is late where the song swings."""
        return int((16 * bar + step + self.swing * (step % 2)) * self.sixteenth * self.rate)

    def hertz(self, degree, octave):
        return 440 * 2 ** ((self.key + self.scale[degree % 7] + 12 * (degree // 7 + octave) - 69) / 12)


def _steps(rng, patterns):
    return [step for step, mark in enumerate(rng.choice(patterns)) if mark == "x"]


def _mix(events, N):
    """Sums (onset in samples, gain, pan from 0 left to 1 right, sound (n,)) at constant power → (2, N)."""
    bus = np.zeros((2, N), np.float32)
    for onset, gain, pan, sound in events:
        onset = max(onset, 0)
        for channel, side in zip(bus, (np.cos, np.sin)):
            part = channel[onset : onset + len(sound)]
            part += np.float32(gain * side(pan * np.pi / 2)) * sound[: len(part)]
    return bus


def _noise(rng, n, rate, low, high):
    """n samples of noise at RMS 1, mostly between low and high Hz; its soft edges leave a little up to the top."""
    spectrum, frequencies = np.fft.rfft(rng.standard_normal(n)), np.maximum(np.fft.rfftfreq(n, 1 / rate), 1)
    noise = np.fft.irfft(spectrum / (1 + (low / frequencies) ** 4 + (frequencies / high) ** 4) ** 0.5, n)
    return (noise / noise.std()).astype(np.float32)


def _sawtooth(cycles, frequency, rolloff):
    """Harmonics k at amplitude r^k / k with r = exp(-frequency / rolloff): nearly nothing left above half the rate.

    The infinite sum has a closed form, arctan2(r sin p, 1 - r cos p), so 100 harmonics cost what one does.
    """
    ratio, phase = np.exp(-frequency / rolloff), (2 * np.pi * (cycles % 1)).astype(np.float32)
    return np.arctan2(ratio * np.sin(phase), 1 - ratio * np.cos(phase))


def _drums(rng, score):
    """Kick, snare, hats and a tom for the fills, each rendered once and struck at varied levels → (2, N)."""
    time = np.arange(int(0.7 * score.rate), dtype=np.float32) / np.float32(score.rate)

    def skin(low, sweep, decay):  # a sine that falls to its pitch, a little overdriven
        cycles = low * time + sweep * 0.03 * (1 - np.exp(-time / 0.03))
        return np.tanh(2 * np.sin(2 * np.pi * cycles) * np.exp(-time / decay))

    def rattle(low, high, decay):
        return _noise(rng, len(time), score.rate, low, high) * np.exp(-time / decay)

    kick = skin(rng.uniform(42, 60), rng.uniform(80, 220), rng.uniform(0.08, 0.2)) + 0.2 * rattle(2000, 6000, 0.004)
    snare = rng.uniform(0.2, 0.6) * skin(rng.uniform(150, 230), 60, 0.06)
    snare += 0.5 * rattle(rng.uniform(600, 2500), 9000, rng.uniform(0.04, 0.12))
    closed, opened = (rattle(rng.uniform(5000, 9000), 15000, decay) for decay in (rng.uniform(0.02, 0.05), 0.15))
    tom, hat_gain, hat_pan = skin(rng.uniform(80, 130), 60, 0.15), rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.7)
    kicks, snares, hats = (_steps(rng, patterns) for patterns in (KICKS, SNARES, HATS))
    events = []
    for bar in score.bars["drums"]:
        fill = 12 if bar % 4 == 3 and rng.random() < 0.7 else 16  # the fourth bar often ends in a fill
        hits = [(step, 0.9, 0.5, kick) for step in kicks if step < fill]
        hits += [(step, 0.8, 0.5, snare) for step in snares if step < fill]
        hits += [(step, 0.2, 0.5, snare) for step in range(fill) if rng.random() < 0.04]  # ghost notes
        hits += [(step, hat_gain * (1 - step % 4 / 6), hat_pan, opened if step % 8 == 6 else closed) for step in hats]
        hits += [(step, 0.6, rng.uniform(0.2, 0.8), tom if rng.random() < 0.6 else snare) for step in range(fill, 16)]
        for step, gain, pan, hit in hits:
            onset = score.onset(bar, step) + int(rng.normal(0, 0.003) * score.rate)  # no machine: some 3 ms off
            events.append((onset, gain * rng.uniform(0.7, 1), pan, hit))
    return _mix(events, score.N)


def _play(rng, score, notes, brightness, decay):
    """Steady notes (bar, step, sixteenths, degree, octave, gain, pan) of one timbre → (2, N).

    Each distinct note is rendered once. Its harmonics fall off at brightness Hz, and sooner as the level fades over
    decay seconds; a comb takes some out, as the place where a string is plucked does.
    """
    darkening, attack = rng.uniform(0.3, 1.5) * decay, rng.uniform(0.002, 0.02)
    comb, place, legato = rng.choice([0, 0.4, 0.9]), rng.uniform(0.1, 0.5), rng.uniform(0.75, 1)
    sounds, events = {}, []
    for bar, step, length, degree, octave, gain, pan in notes:
        if (length, degree, octave) not in sounds:
            hertz, seconds = np.float32(score.hertz(degree, octave)), np.float32(legato * length * score.sixteenth)
            time = np.arange(int(seconds * score.rate), dtype=np.float32) / np.float32(score.rate)
            rolloff = np.minimum(hertz + np.float32(brightness) * np.exp(-time / np.float32(darkening)), score.rate / 6)
            cycles = np.arange(len(time)) * (float(hertz) / score.rate)
            tone = _sawtooth(cycles, hertz, rolloff) - np.float32(comb) * _sawtooth(cycles + place, hertz, rolloff)
            fade = np.minimum(1, (seconds - time) / np.float32(0.03)) * (1 - np.exp(-time / np.float32(attack)))
            sounds[length, degree, octave] = tone * fade * np.exp(-time / np.float32(decay))
        events.append((score.onset(bar, step), gain * rng.uniform(0.7, 1), pan, sounds[length, degree, octave]))
    return _mix(events, score.N)


def _bass(rng, score):
    """Roots, with fifths and octaves, under the chords → (2, N)."""
    steps, busy, leaps = _steps(rng, SPARSE + DENSE[:4]), rng.uniform(0, 0.7), (0, 4, 7)
    octave = 3 if score.key < 4 else 2  # from E1, the lowest string of a bass guitar
    notes = [(bar, step, end - step, score.chords[bar] + leaps[rng.integers(3) * (rng.random() < busy)], octave, 1, 0.5)
             for bar in score.bars["bass"] for step, end in zip(steps, steps[1:] + [16])]
    return _play(rng, score, notes, rng.uniform(200, 1500), rng.uniform(0.3, 2))


def _other(rng, score):
    """Chords, held or struck, and broken chords of plucks, each note at its own place from left to right → (2, N)."""
    stabs, plucks = _steps(rng, SPARSE), _steps(rng, DENSE)
    octave, width, order = (4 if score.key > 5 else 5), rng.uniform(0.3, 0.9), rng.permutation(5)
    degrees = [0, 2, 4, 6] if rng.random() < 0.4 else [0, 2, 4]  # above the root: a seventh chord or a triad
    chord_gain, pluck_gain = ((1, 0.4), (0.7, 0.8), (0.4, 1))[rng.integers(3)]
    chords = [(bar, step, end - step, score.chords[bar] + degree, octave, chord_gain, 0.5 + width * (degree / 6 - 0.5))
              for bar in score.bars["other"] for step, end in zip(stabs, stabs[1:] + [16]) for degree in degrees]
    broken = [(bar, step, 4, score.chords[bar] + 2 * rank, octave + 1, pluck_gain, 0.5 + width * (rank / 4 - 0.5))
              for bar in score.bars["other"] for step, rank in zip(plucks, np.resize(order, len(plucks)))]
    return (_play(rng, score, chords, rng.uniform(500, 3500), rng.choice([0.4, 1, 4]))
            + _play(rng, score, broken, rng.uniform(1500, 7000), rng.uniform(0.1, 0.6)))


def _melody(rng, score):
    """Notes (onset and length in samples, log2 of pitch in Hz): two rhythms, and a walk that likes chord notes."""
    octave = rng.choice([4, 5]) if score.key < 4 else rng.choice([3, 4])  # the lowest note is between E2 and D#4
    rhythms, degree, notes = [rng.choice([2, 2, 3, 4, 4, 6], 8) for _ in range(2)], 4, []
    for bar in score.bars["vocals"]:
        step = 2 * rng.integers(2)
        for length in rhythms[bar // 2 % 2]:
            degree = int(np.clip(degree + rng.choice([-3, -2, -1, -1, 0, 1, 1, 2, 3]), 0, 8))
            degree += (degree - score.chords[bar]) % 7 not in (0, 2, 4) and rng.random() < 0.5
            end = min(step + length, 15)
            if end - step > 1:
                onset = score.onset(bar, step)
                notes.append((onset, score.onset(bar, end) - onset, np.log2(score.hertz(degree, octave))))
            step = end
    return notes


def _gestures(rng, score, notes):
    """How notes are sung, each HOP / 4 samples → (9, points): pitch (Hz), level, breath, vibrato, 5 formants (Hz)."""
    second, curves = 4 * score.rate / HOP, np.zeros((9, 4 * score.N // HOP + 5))  # a second in points
    pitch, level, breath, vibrato, formants = *curves[:4], curves[4:].T  # views
    depth, breathiness, scoop = rng.uniform(0.15, 0.5) / 12, rng.uniform(0.02, 0.1), rng.uniform(0, 2) / 12
    pitch[:], formants[:], rest = notes[0][2], VOWELS[0], 0
    for onset, length, height in notes:
        start, end = int(4 * onset / HOP), int(4 * (onset + length) / HOP)
        if start - rest > 0.2 * second:  # breathe in before a phrase
            breath[max(start - int(0.35 * second), 0) : max(start - int(0.1 * second), 0)] = 0.1
        pitch[start:], formants[start:], rest = height, VOWELS[rng.integers(5)], end
        pitch[start : start + int(0.08 * second)] -= scoop * rng.random()  # reached from below
        formants[(start + end) // 2 :] += rng.uniform(0, 0.5) * (VOWELS[rng.integers(5)] - formants[start:][:1])
        level[start : end - int(0.04 * second)], breath[start:end] = rng.uniform(0.6, 1), breathiness
        vibrato[start + int(0.15 * second) : end] = depth
    window = np.hanning(2 * int(rng.uniform(0.03, 0.07) * second) + 3)  # so long it glides from one value to the next
    padded = np.pad(curves, [(0, 0), (len(window) // 2, len(window) // 2)], "edge")
    curves = np.stack([np.convolve(curve, window / window.sum(), "valid") for curve in padded])
    time = np.arange(len(pitch)) / second
    whole = np.arange(int(time[-1]) + 2)
    speed = np.interp(time, whole, rng.uniform(5, 6, len(whole)))  # of the vibrato, in Hz
    curves[0] = 2 ** (curves[0] + curves[3] * np.sin(2 * np.pi * np.cumsum(speed) / second))
    curves[4:] *= rng.uniform(0.95, 1.05) + 0.15 * (curves[0].mean() > 250)  # a high voice has a short vocal tract
    return curves


def _vocal_tract(excitation, formants, rate):
    """Filters excitation (N,) with resonances at formants (5, frames) in Hz, a new shape every HOP samples → (N,)."""
    padded = np.pad(excitation, (HOP, formants.shape[1] * HOP - len(excitation)))
    window = np.sin(np.pi * (np.arange(2 * HOP) + 0.5) / (2 * HOP)).astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[::HOP] * window  # (frames, 2 HOP)
    frequencies = np.fft.rfftfreq(2 * HOP, 1 / rate).astype(np.float32)
    gain = np.full((len(frames), len(frequencies)), 0.03, np.float32)  # what passes far from the formants
    for formant, height, width in zip(np.float32(formants), (1, 0.7, 0.45, 0.4, 0.25), (70, 90, 130, 200, 300)):
        gain += np.float32(height) / (1 + ((frequencies - formant[: len(frames), None]) / np.float32(width)) ** 2)
    frames = np.fft.irfft(np.fft.rfft(frames) * gain) * window
    return (frames[:-1, HOP:] + frames[1:, :HOP]).reshape(-1)[: len(excitation)]


def _vocals(rng, score):
    """A voice: a buzz and breath through moving formants, and consonants between the notes → (2, N)."""
    rate, notes = score.rate, _melody(rng, score)
    curves = _gestures(rng, score, notes)
    samples, points = np.arange(score.N), np.arange(curves.shape[1]) * (HOP // 4)
    pitch, level, breath = (np.interp(samples, points, curve).astype(np.float32) for curve in curves[:3])
    tension = np.float32(rng.uniform(0.09, 0.18) * rate) * (np.float32(0.4) + np.float32(0.6) * level)  # loud is bright
    buzz = _sawtooth(np.cumsum(pitch, dtype=np.float64) / rate, pitch, tension)
    hiss = rng.standard_normal(score.N, np.float32)
    pan, loudness, consonants = rng.uniform(0.45, 0.55), rng.uniform(0.1, 0.25), []
    for seconds in (0.02, 0.03, 0.05, 0.08, 0.11, 0.14):  # from t and k to sh and s
        noise = _noise(rng, int(seconds * rate), rate, rng.uniform(1500, 6000), 12000)
        shape = np.hanning(len(noise)) if seconds > 0.04 else np.exp(-5 * np.linspace(0, 1, len(noise)))
        consonants.append(noise * shape.astype(np.float32))
    events = [(0, 1, pan, _vocal_tract(level * buzz + breath * hiss, curves[4:, ::4], rate))]
    for onset in [onset for onset, _, _ in notes if rng.random() < 0.6]:
        consonant = consonants[rng.integers(len(consonants))]
        events.append((onset - int(0.8 * len(consonant)), loudness * rng.uniform(0.4, 1), pan, consonant))
    return _mix(events, score.N)


def _room(rng, rate):
    """Spectra (2, bins) of a room's echoes at the left and at the right: two noises that decay alike."""
    n = 2 ** int(np.log2(1.5 * rate))
    decay = np.exp(-6.9 * np.arange(n) / (rng.uniform(0.3, 1.4) * rate)).astype(np.float32)  # to -60 dB
    spectra = np.fft.rfft(rng.standard_normal((2, n), np.float32) * decay / np.linalg.norm(decay), 2 * n)
    frequencies = np.fft.rfftfreq(2 * n, 1 / rate).astype(np.float32)
    return spectra / (1 + frequencies / np.float32(rng.uniform(2000, 8000))) * (frequencies / (frequencies + 200))


def _reverberate(stereo, room, amount):
    """Adds the room to stereo (2, N), by overlap-add: short FFTs stay in the cache."""
    N, block = stereo.shape[1], room.shape[1] - 1
    send = np.pad(np.float32(amount) * stereo.mean(axis=0), (0, -N % block)).reshape(-1, block)
    echoes = np.fft.irfft(np.fft.rfft(send, 2 * block) * room[:, None])  # (2, blocks, 2 block)
    echoes[:, 1:, :block] += echoes[:, :-1, block:]
    return stereo + echoes[..., :block].reshape(2, -1)[:, :N]


def _sounding_rms(stereo, rate):
    """RMS over those tenths of a second that are within 30 dB of the loudest."""
    n = rate // 10
    power = np.square(stereo[:, : stereo.shape[1] // n * n]).reshape(2, -1, n).mean(axis=(0, 2))
    return np.sqrt(power[power >= power.max() / 1000].mean())


def synthesize_song(seed: int, seconds: float = 30.0, rate: int = 44100) -> dict[str, np.ndarray]:
    """One song, the same for the same arguments: drums, bass, chords and plucks, and a voice without words.

    With the seed vary tempo (72 to 148 beats a minute), swing, key, mode, chords, rhythms, melody, timbres, singer,
    levels, panning and reverberation. Each source rests in up to three tenths of the two-bar sections. Where a source
    sounds, its RMS is about -29 to -19 dBFS; the voice's is 3 to 7 dB below that of the other three together.

    Args:
        seed: a non-negative integer.
        seconds: length, at least 1.
        rate: sample rate in Hz, at least 8000.
    Returns:
        "drums", "bass", "other" and "vocals", each (N, 2) float32 with N = round(seconds * rate). Their sum, the
        mixture, peaks below 0.9.
    """
    rng = np.random.default_rng(seed)
    score, room = _Score(rng, seconds, rate), _room(rng, rate)
    stems = {}
    for source, player, wetness in zip(SOURCES, (_drums, _bass, _other, _vocals), (0.3, 0.05, 0.6, 0.5)):
        stem = _reverberate(player(rng, score), room, wetness * rng.uniform(0.3, 1))
        stems[source] = stem / _sounding_rms(stem, rate)
    gains = 10 ** (rng.uniform(-25, -20, 3) / 20)
    gains = [*gains, np.linalg.norm(gains) * 10 ** (rng.uniform(-7, -3) / 20)]
    stems = {source: np.float32(gain) * stems[source] for source, gain in zip(SOURCES, gains)}
    scale = np.float32(min(1, 0.89 / np.abs(sum(stems.values())).max()))
    return {source: np.ascontiguousarray(scale * stem.T) for source, stem in stems.items()}


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

    Item: (mixture, target), (C, N) float32 tensors each.
    """

    def __init__(
        self, tracks, target, sample_rate, nb_channels=2, seq_dur=6.0, samples_per_track=64, seed=42, augmentations=(), mix="tracks"
    ):
        self.sample_rate, self.nb_channels, self.length = sample_rate, nb_channels, round(seq_dur * sample_rate)
        self.samples_per_track, self.seed, self.augmentations, self.mix = samples_per_track, seed, augmentations, mix
        self.wanted = target_sources(target, tracks)
        names = sorted({name for track in tracks for name in track.sources})
        self.pools = {name: [track for track in tracks if name in track.sources] for name in names}
        self.tracks = self.pools[self.wanted[0]] if mix == "tracks" else tracks

    def __len__(self):
        return len(self.tracks) * self.samples_per_track

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        mixture, target = [], []
        for name, audio, start in self.draw(self.tracks[index % len(self) // self.samples_per_track], rng):
            audio = read_as(audio, start, self.length, self.sample_rate, self.nb_channels)
            for augment in self.augmentations:
                audio = augment(audio, rng)
            mixture += [audio] * (self.mix != "aligned" or name == "mixture")
            target += [audio] * (name in self.wanted)
        shape = (self.nb_channels, self.length)
        return add_up(mixture, shape), add_up(target, shape)

    def draw(self, track, rng):
        """Choose the excerpts of an example: yields (source name, Audio, first sample)."""
        start = self.position(track, rng)
        if self.mix == "aligned":
            yield "mixture", track.mixture, start
        other, other_start = track, start
        if self.mix == "track":
            other = self.tracks[rng.integers(len(self.tracks))]
            other_start = self.position(other, rng)
        for name, pool in self.pools.items():
            if name == self.wanted[0]:
                chosen, chosen_start = track, start
            elif self.mix == "tracks":
                chosen = pool[rng.integers(len(pool))]
                chosen_start = self.position(chosen, rng)
            else:
                chosen, chosen_start = other, other_start
            if name in chosen.sources:
                yield name, chosen.sources[name], chosen_start

    def position(self, track, rng):
        return int(rng.integers(max(1, track.length(self.sample_rate) - self.length + 1)))


class WholeTracks(torch.utils.data.Dataset):
    """Whole songs, for validation and statistics: (mixture, target), (C, N) float32 tensors.

    The mixture is its own file where there is one, else the sum of the sources; see RandomMixes for the arguments.
    """

    def __init__(self, tracks, target, sample_rate, nb_channels=2):
        self.tracks, self.sample_rate, self.nb_channels = tracks, sample_rate, nb_channels
        self.wanted = target_sources(target, tracks)

    def __len__(self):
        return len(self.tracks)

    def __getitem__(self, index):
        track = self.tracks[index]
        length = track.length(self.sample_rate)
        read = functools.partial(read_as, start=0, length=length, rate=self.sample_rate, channels=self.nb_channels)
        mixture = [track.mixture] if track.mixture else track.sources.values()
        target = [audio for name, audio in track.sources.items() if name in self.wanted]
        return tuple(add_up(map(read, sources), (self.nb_channels, length)) for sources in (mixture, target))


def add_up(sources, shape):
    """The sum of arrays (C, N), or silence of that shape where there are none, as a float32 tensor."""
    total = functools.reduce(np.add, sources, np.float32(0))
    return torch.from_numpy(np.ascontiguousarray(np.broadcast_to(total, shape), dtype=np.float32))


def index_dataset(args):
    """Index what train.py's flags name: (training tracks, validation tracks, sample rate in Hz, RandomMixes' `mix`)."""
    if args.dataset in ("musdb", "synthetic"):
        root = find_data(args.root, args.dataset, args.is_wav, args.cache)
        index, mix = functools.partial(index_musdb, root), "tracks"
    else:
        if args.root is None:
            raise UserError(f"--dataset {args.dataset} needs --root, the folder that holds train/ and valid/")
        if args.dataset == "aligned":
            layout, mix = dict(input_file=args.input_file, output_file=args.output_file), "aligned"
        elif args.dataset == "sourcefolder":
            layout, mix = dict(target_dir=args.target_dir, interferer_dirs=args.interferer_dirs, ext=args.ext), "tracks"
        elif args.dataset == "trackfolder_fix":
            layout = dict(target_file=args.target_file, interferer_files=args.interferer_files)
            mix = "tracks" if args.random_track_mix else "own"
        else:
            layout = dict(target_file=args.target_file, ext=args.ext, silence_missing=args.silence_missing)
            mix = "track" if args.random_interferer_mix else "own"
        index = functools.partial(LAYOUTS[args.dataset], Path(args.root).expanduser(), **layout)
    train_tracks, valid_tracks = index("train"), index("valid")
    rates = collections.Counter(audio.rate for track in train_tracks + valid_tracks for audio in track.audios)
    sample_rate = rates.most_common(1)[0][0]
    if len(rates) > 1:
        others = ", ".join(f"{rate} Hz" for rate in sorted(rates) if rate != sample_rate)
        print(f"some files are not in {sample_rate} Hz ({others}) and are resampled whenever they are read: convert them for speed")
    return train_tracks, valid_tracks, sample_rate, mix


LAYOUTS = {
    "aligned": index_aligned,
    "sourcefolder": index_sourcefolder,
    "trackfolder_fix": index_trackfolder_fix,
    "trackfolder_var": index_trackfolder_var,
}


def load_datasets(args, target, tracks):
    """The datasets of one target: (training examples, validation, what the input statistics are taken from).

    `tracks` is what index_dataset returned. Where sources are no songs (sourcefolder), validation and statistics use
    fixed mixes without augmentation.
    """
    train_tracks, valid_tracks, sample_rate, mix = tracks
    settings = dict(target=target, sample_rate=sample_rate, nb_channels=args.nb_channels)
    drawn = dict(seq_dur=args.seq_dur, seed=args.seed, mix=mix)
    augmentations = [] if mix == "aligned" else [AUGMENTATIONS[name] for name in args.source_augmentations]
    train = RandomMixes(train_tracks, **settings, **drawn, samples_per_track=args.samples_per_track, augmentations=augmentations)
    if args.dataset == "sourcefolder":
        few = math.ceil(100 / len(train.tracks))
        return train, *(RandomMixes(t, **settings, **drawn, samples_per_track=few) for t in (valid_tracks, train_tracks))
    return train, WholeTracks(valid_tracks, **settings), WholeTracks(train_tracks, **settings)
