"""Separate songs into stems.

    python test.py SONG.mp3                          stems/SONG/vocals.wav, stems/SONG/accompaniment.wav, ...
    python test.py SONG.mp3 --model umxl --html      with published weights, and a page to listen to the stems
    python test.py FOLDER --outdir stems --ext flac  all audio in a folder; what is done already is skipped
    torchrun --nproc_per_node=4 test.py FOLDER       the files shared out over processes (or machines)
"""

import base64
import collections
import contextlib
import glob
import io
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import aggregation, separator_from_flags, stft_blocks, sum_targets
from utils import AudioStream, Parser, UserError, add_separation_flags, atomic_write, number, plot_spectrograms, printable
from utils import gather, process_rank, report, resample_blocks, run

FORMATS = {"wav": ("WAV", "FLOAT"), "flac": ("FLAC", "PCM_24"), "ogg": ("OGG", "VORBIS"), "mp3": ("MP3", "MPEG_LAYER_III")}
AUDIO = set(".wav .aiff .aif .flac .ogg .opus .mp3 .m4a .aac .wma .mka .mp4 .mkv .mov .webm .avi .au .caf .w64".split())
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} s of audio [{elapsed}<{remaining}{postfix}]"


def parse_args(arguments):
    parser = Parser(__doc__)
    parser.add_argument("input", nargs="+", help="audio or video files, folders, patterns such as 'songs/*.mp3'")
    add = parser.add_argument_group("files").add_argument
    add("--outdir", default="stems", help="folder to write to: <outdir>/<song>/<target>.<ext>")
    add("--ext", choices=list(FORMATS), default="wav", help="wav is 32-bit float: nothing clips; others are scaled down where they would")
    add("--overwrite", action="store_true", help="write stems anew that exist already")
    add("--start", type=number(float, 0), default=0.0, help="where to begin, in seconds")
    add("--duration", type=number(float, 1e-6), help="how much to separate, in seconds (default: everything)")
    add("--html", action="store_true", help="also write <outdir>/<song>/index.html, a page that plays the stems together")
    add("--plot", action="store_true", help="also write <outdir>/<song>/spectrograms.png")
    add("--quiet", action="store_true", help="no progress bars")
    add_separation_flags(parser)
    return parser.parse_args(arguments)


def find_songs(inputs, outdir):
    """Files, folders and patterns -> sorted list of (file, name of its output folder), the same in every process."""
    names, outdir = {}, Path(outdir).absolute()
    for item in inputs:
        if Path(item).is_dir():  # a folder's songs keep their place below it
            paths = [path for path in Path(item).rglob("*") if outdir not in path.absolute().parents]
            found = {path: path.relative_to(item).parent / song_name(path) for path in paths}
        elif glob.has_magic(item) and not Path(item).exists():
            found = {Path(path): song_name(Path(path)) for path in glob.glob(item, recursive=True)}
        else:
            names[Path(item)] = song_name(Path(item))
            continue
        found = {path: str(name) for path, name in found.items() if is_audio(path)}
        if not found:
            raise UserError(f"{item}: no audio files there but what may be in --outdir ({' '.join(sorted(AUDIO))})")
        names.update(found)
    groups = collections.defaultdict(list)
    for path, name in names.items():
        groups[name].append(path)
    songs = sorted(pair for name, paths in groups.items() for pair in tell_apart(name, paths))
    taken = collections.Counter(name for _, name in songs)
    for path, name in songs:
        if taken[name] > 1:
            raise UserError(f"{path}: another input is also named {name}; separate them into different --outdir")
    return songs


def is_audio(path):
    return path.suffix.lower() in AUDIO and not path.name.startswith("._") and path.is_file()


def tell_apart(name, paths):
    """Pairs of path and name for files that are all called `name`: song.mp3 and song.wav, or A/song and B/song."""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    for form in "{name}", "{name}{suffix}", "{folder}/{name}", "{folder}/{name}{suffix}":
        names = [form.format(name=name, suffix=path.suffix, folder=folder).lstrip("/") for path, folder in zip(paths, folders)]
        if len(set(names)) == len(paths):
            break
    return zip(paths, names)


def song_name(path):
    """A file's name without its extension, unless that leaves nothing that can name a folder, as of "...wav"."""
    return path.stem if path.stem.strip(". ") else path.name


# ---------------------------------------------------------------------------------------------- stems


class Stem:
    """A stem on its way to the disk; `stack` gives it its name, or removes what there is of it after a failure.

    WAV holds any float. The other formats are made by `finish` from an unnamed copy in float, when the peak is known.
    """

    def __init__(self, path, stream, stack):
        self.path, self.part, self.peak = path, stack.enter_context(atomic_write(path)), 0.0
        kind, subtype = FORMATS[path.suffix[1:]]
        form = {"samplerate": stream.rate, "channels": stream.channels}
        if kind == "WAV":
            size = 4 * stream.channels * stream.length  # bytes; WAV's own header counts no more than 4 GB
            self.audio = soundfile.SoundFile(self.part, "w", **form, subtype=subtype, format="WAV" if size < 4e9 else "RF64")
        else:
            copy = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            self.audio = soundfile.SoundFile(copy.fileno(), "w+", **form, subtype="FLOAT", format="RF64", closefd=False)
            try:
                self.encoded = stack.enter_context(soundfile.SoundFile(self.part, "w", **form, subtype=subtype, format=kind))
            except soundfile.LibsndfileError as error:
                reason = f"{kind} can't hold {stream.rate} Hz ({error.error_string})"
                raise UserError(f"{path}: {reason}; try --ext flac or wav") from error
        stack.enter_context(self.audio)

    def write(self, samples):
        """Append samples (C, n)."""
        if self.path.suffix != ".wav":
            self.peak = max(self.peak, samples.abs().max().item())
        self.audio.write(samples.T.numpy())

    def finish(self):
        """Encode the whole stem; returns a note where that changes its level."""
        if self.path.suffix == ".wav":
            return
        length = self.audio.tell()
        self.audio.seek(0)
        for block in self.audio.blocks(1 << 16, dtype="float32", always_2d=True):
            self.encoded.write(block / max(1.0, self.peak))
        self.encoded.close()
        # on a full disk an encoder's last bytes just vanish
        if sum(map(len, soundfile.blocks(self.part, 1 << 16))) < length:
            raise UserError(f"{self.path}: could not be written whole; free some space or choose another folder")
        if self.peak > 1:
            peak = 20 * math.log10(self.peak)
            return f"{self.path}: peaks at {peak:+.1f} dBFS and was scaled down by as much to fit the format"


class Input:
    """A file's blocks (C, n) at the model's rate, for Separator.stream, which asks for them twice; moves a progress bar."""

    def __init__(self, stream, rate, bar):
        self.stream, self.rate, self.bar = stream, rate, bar
        self.start, self.shares = time.time(), iter([0.4, 0.6])  # of the work: up to the networks' end, and the rest

    def __iter__(self):
        yield from resample_blocks(self.watch(next(self.shares)), self.stream.rate, self.rate)

    def watch(self, share):
        for block in self.stream:
            yield block
            speed = self.bar.n / (time.time() - self.start)
            self.bar.set_postfix_str(f"{speed:.1f} times as fast as it plays", refresh=False)
            self.bar.update(share * block.shape[1] / self.stream.rate)


def separate(separator, path, paths, args):
    """Separate one file into `paths`, {stem name: file}; returns how long it took, as text."""
    stream = AudioStream(path, args.start, args.duration)
    start, seconds, written = time.time(), stream.length / stream.rate, 0
    with contextlib.ExitStack() as stack:
        stems = {name: Stem(stem, stream, stack) for name, stem in paths.items()}
        total = round(seconds, 1) if seconds < math.inf else None
        bar = tqdm(total=total, desc=printable(path.name), disable=args.quiet, bar_format=BAR)
        stack.enter_context(bar)
        estimates = separator.stream(Input(stream, separator.sample_rate, bar))
        for block in resample_blocks(estimates, separator.sample_rate, stream.rate):
            block = block[..., : stream.length - written].float().cpu()  # (J, C, n)
            written += block.shape[-1]
            samples = sum_targets(block, separator.targets, args.sums)
            for name, stem in stems.items():
                stem.write(samples[name])
        with ThreadPoolExecutor() as pool:
            notes = list(pool.map(Stem.finish, stems.values()))
    for note in filter(None, notes):
        print(printable(note))
    seconds = written / stream.rate
    return f"{seconds:.1f} s of audio, {seconds / (time.time() - start):.1f} times as fast as it plays"


def process(separator, path, name, args):
    """Separate one song, and write what else was asked for."""
    folder = Path(args.outdir, name)
    paths = {stem: folder / f"{stem}.{args.ext}" for stem in args.sums}
    missing = {stem: file for stem, file in paths.items() if args.overwrite or not file.exists()}
    if len(missing) < len(paths):
        kept = ", ".join(stem for stem in paths if stem not in missing)
        print(printable(f"{folder}: kept {kept} (--overwrite makes them anew)"))
    if missing:
        print(printable(f"{folder}: {', '.join(missing)}; {separate(separator, path, missing, args)}"))
    if args.plot or args.html:
        recordings = {"mixture": AudioStream(path, args.start, args.duration)}
        recordings.update((stem, AudioStream(file)) for stem, file in paths.items())
    if args.plot:
        plot(recordings, folder / "spectrograms.png")
    if args.html:
        write_page(path.stem, recordings, folder / "index.html")


# ---------------------------------------------------------------------------------------------- pictures and pages


def plot(recordings, picture):
    """Draw the spectrograms of the mixture and its stems; a long recording's frames are pooled."""
    levels = {}
    length = [*recordings.values()][-1].length  # a stem's, which is exact
    pool = math.ceil(length / 1024 / 1500)  # frames per column
    for name, stream in recordings.items():
        blocks = stft_blocks(stream, pool * math.ceil(300 / pool))
        columns = [F.max_pool1d(X.abs().mean(0), pool, ceil_mode=True) for X in blocks]  # (F, T)
        levels[name] = torch.cat(columns, dim=1).numpy()
    plot_spectrograms(levels, stream.rate, 1024 * pool, picture)
    print(printable(f"wrote {picture}"))


def write_page(title, recordings, page):
    """Fill assets/player.html with the mixture and its stems as MP3."""
    peaks = {}
    for name, stream in recordings.items():
        columns = [F.max_pool1d(block.abs().amax(0, keepdim=True), 1024, ceil_mode=True) for block in stream]
        peaks[name] = torch.cat(columns, dim=1)  # (1, n)
    scale = max(1.0, *(peak.max().item() for peak in peaks.values()))  # the same for all: they keep their balance
    stems = []
    for name, stream in recordings.items():
        picture = F.adaptive_max_pool1d(peaks[name] / scale, 1000)[0]
        stems.append({"name": name, "audio": mp3(stream, scale), "peaks": [round(peak, 3) for peak in picture.tolist()]})
    content = json.dumps({"title": title, "stems": stems}).replace("<", "\\u003c")  # no </script> from a song's name
    template = (Path(__file__).parent / "assets" / "player.html").read_text(encoding="utf-8")
    with atomic_write(page) as temporary:
        temporary.write_text(template.replace("/*STEMS*/null", content, 1), encoding="utf-8")
    print(printable(f"wrote {page}: open it in a browser"))
    if stream.length > 1800 * stream.rate:
        print("half an hour and more needs gigabytes in a browser: --start and --duration make a shorter page")


def mp3(stream, scale):
    """A recording, divided by `scale`, as the address (data: URI) of an MP3 at 44.1 kHz."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 44100, stream.channels, format="MP3") as file:
        for block in resample_blocks(stream, stream.rate, 44100):
            file.write((block / scale).T.numpy())
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------------------------------- all files


def main():
    args = parse_args(sys.argv[1:])
    songs = find_songs(args.input, args.outdir)
    rank, _, world = process_rank()
    args.quiet |= world > 1  # the bars of several processes would overwrite each other
    separator = separator_from_flags(args)
    args.sums = aggregation(separator.targets, args)
    failed = []
    for path, name in songs[rank::world]:
        try:
            process(separator, path, name, args)
        except UserError as error:
            report(error)
            failed.append(str(path))
    failed = gather(failed)
    if rank > 0:
        return
    if failed and len(songs) == 1:
        sys.exit(2)
    if failed:
        print(printable(f"{len(failed)} of {len(songs)} files failed: {', '.join(failed)}"), file=sys.stderr)
        sys.exit(1)
    print(f"the stems are in {args.outdir}/. Next: listen (--html makes a page for it), or score a model: python eval.py")


if __name__ == "__main__":
    run(main)
