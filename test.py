"""Separate songs into stems.

    python test.py SONG.mp3                          stems/SONG/vocals.wav, stems/SONG/accompaniment.wav, ...
    python test.py SONG.mp3 --model umxl --html      with published weights, and a page to listen to the stems
    python test.py FOLDER --outdir stems --ext flac  all audio in a folder; what is done already is skipped
    torchrun --nproc_per_node=4 test.py FOLDER       the files shared out over processes (or machines)
"""

import base64
import contextlib
import glob
import html
import io
import json
import math
import sys
import time
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import separator_from_flags, stft_blocks, sum_targets
from utils import AudioStream, Parser, UserError, add_separation_flags, atomic_write, number, plot_spectrograms, process_rank
from utils import report, resample_blocks, run

FORMATS = {"wav": ("WAV", "FLOAT"), "flac": ("FLAC", "PCM_24"), "ogg": ("OGG", "VORBIS"), "mp3": ("MP3", "MPEG_LAYER_III")}
AUDIO = set(".wav .aiff .aif .flac .ogg .opus .mp3 .m4a .aac .wma .mp4 .mkv .mov .webm .avi .au .caf .w64".split())


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


def find_songs(inputs):
    """Files, folders and patterns -> sorted list of (file, name of its output folder), the same in every process."""
    files = {}
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            found = {p: str(p.relative_to(path).parent / song_name(p)) for p in path.rglob("*") if p.suffix.lower() in AUDIO and p.is_file()}
            if not found:
                raise UserError(f"{item}: a folder without audio files in it ({' '.join(sorted(AUDIO))})")
        elif path.exists() or not glob.has_magic(item):
            found = {path: song_name(path)}
        else:
            found = {Path(p): song_name(Path(p)) for p in glob.glob(item, recursive=True) if Path(p).suffix.lower() in AUDIO}
            if not found:
                raise UserError(f"{item}: matches no audio file")
        files.update(found)
    songs, taken = [], {}
    for path, name in sorted(files.items()):
        if name in taken:  # song.mp3 beside song.wav
            name += path.suffix
        if name in taken:
            raise UserError(f"{path}: has the same name as {taken[name]}; separate them into different --outdir")
        taken[name] = path
        songs.append((path, name))
    return songs


def song_name(path):
    """A file's name without its extension, unless that leaves nothing that can name a folder."""
    return path.stem if path.stem.strip(". ") else path.name


@contextlib.contextmanager
def stem_file(path, rate, channels):
    """Yield a soundfile to write a stem's blocks to; it becomes `path` when all of them are there."""
    kind, subtype = FORMATS[path.suffix[1:]]
    with atomic_write(path) as temporary:
        float_wav = temporary if kind == "WAV" else temporary.with_suffix(".wav.part")
        try:
            with soundfile.SoundFile(float_wav, "w", rate, channels, "FLOAT", format="RF64") as file:
                file.peak = 0.0
                yield file
            if kind != "WAV":
                encode(float_wav, temporary, file.peak, kind, subtype, path)
        finally:
            if float_wav != temporary:
                float_wav.unlink(missing_ok=True)


def encode(source, destination, peak, kind, subtype, name):
    """Turn a float WAV into another format, scaled down if it would clip."""
    if peak > 1:
        print(f"{name}: peaks at {20 * math.log10(peak):+.1f} dBFS and was scaled down by as much to fit the format")
    with soundfile.SoundFile(source) as reader:
        with soundfile.SoundFile(destination, "w", reader.samplerate, reader.channels, subtype, format=kind) as writer:
            for block in reader.blocks(1 << 18, dtype="float32", always_2d=True):
                writer.write(block / max(1.0, peak))


class Input:
    """A file's blocks (C, n) at the model's rate, for Separator.stream: two passes, shown as one progress bar."""

    def __init__(self, stream, rate, bar):
        self.stream, self.rate, self.bar = stream, rate, bar

    def __iter__(self):
        def shown():
            for block in self.stream:
                yield block
                self.bar.update(block.shape[1] / self.stream.rate / 2)

        return resample_blocks(shown(), self.stream.rate, self.rate)


def separate(separator, path, paths, args):
    """Separate one file into `paths`, {stem name: file}; all of them appear at the end, or none."""
    stream = AudioStream(path, args.start, args.duration)
    start = time.time()
    bar = tqdm(total=stream.length / stream.rate, unit="s", desc=path.name, disable=args.quiet, bar_format=BAR)
    with bar, contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(stem_file(stem, stream.rate, stream.channels)) for name, stem in paths.items()}
        estimates = separator.stream(Input(stream, separator.sample_rate, bar))
        written = 0
        for block in resample_blocks(estimates, separator.sample_rate, stream.rate):
            block = block[..., : stream.length - written].float().cpu()  # (J, C, n)
            written += block.shape[-1]
            write_stems(files, sum_targets(block, separator, args))
        if written < stream.length:  # resampling there and back may end a sample early
            write_stems(files, {name: torch.zeros(stream.channels, stream.length - written) for name in files})
    seconds = stream.length / stream.rate
    return f"{seconds:.1f} s of audio, {seconds / (time.time() - start):.1f} times faster than it plays"


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"


def write_stems(files, stems):
    for name, file in files.items():
        file.peak = max(file.peak, stems[name].abs().max().item()) if stems[name].numel() else file.peak
        file.write(stems[name].T.numpy())


def process(separator, path, name, args):
    """Separate one song, and write what else was asked for."""
    folder = Path(args.outdir, name)
    names = list(sum_targets(torch.zeros(len(separator.targets), 1, 1), separator, args))
    paths = {stem: folder / f"{stem}.{args.ext}" for stem in names}
    missing = {stem: file for stem, file in paths.items() if args.overwrite or not file.exists()}
    if len(missing) < len(paths):
        print(f"{folder}: kept {', '.join(stem for stem in paths if stem not in missing)} (--overwrite makes them anew)")
    if missing:
        print(f"{folder}: {', '.join(missing)}; {separate(separator, path, missing, args)}")
    if args.plot:
        plot(path, paths, folder / "spectrograms.png", args)
    if args.html:
        write_page(path, paths, folder / "index.html", args)


# ---------------------------------------------------------------------------------------------- pictures and pages


def plot(path, paths, picture, args):
    """Draw the spectrograms of the mixture and its stems; a long recording's frames are pooled."""
    levels = {}
    for name, stream in {"mixture": AudioStream(path, args.start, args.duration), **{n: AudioStream(p) for n, p in paths.items()}}.items():
        pool = math.ceil(stream.length / 1024 / 1500)  # frames per column
        blocks = stft_blocks(stream, 64 * pool)
        columns = [F.max_pool1d(X.abs().mean(0), pool, ceil_mode=True) for X in blocks]  # (F, T)
        levels[name] = torch.cat(columns, dim=1).numpy()
    plot_spectrograms(levels, stream.rate, 1024 * pool, picture)
    print(f"wrote {picture}")


def write_page(path, paths, page, args):
    """Fill assets/player.html with the mixture and its stems as MP3."""
    stems = []
    for name, stream in {"mixture": AudioStream(path, args.start, args.duration), **{n: AudioStream(p) for n, p in paths.items()}}.items():
        audio = torch.cat(list(stream), dim=1)  # (C, N)
        width = math.ceil(audio.shape[1] / 1000)
        peaks = F.max_pool1d(audio.abs().amax(0, keepdim=True), width, ceil_mode=True)[0]
        buffer = io.BytesIO()
        rate = min(stream.rate, 48000)  # the most that MP3 has
        audio = torch.cat(list(resample_blocks([audio], stream.rate, rate)), dim=1) / max(1.0, audio.abs().max().item())
        soundfile.write(buffer, audio.T.numpy(), rate, format="MP3")
        data = base64.b64encode(buffer.getvalue()).decode()
        stems.append({"name": name, "audio": f"data:audio/mpeg;base64,{data}", "peaks": [round(p, 3) for p in peaks.tolist()]})
    content = json.dumps({"title": path.stem, "stems": stems}).replace("<", "\\u003c")  # no </script> from a song's name
    template = (Path(__file__).parent / "assets" / "player.html").read_text(encoding="utf-8")
    with atomic_write(page) as temporary:
        temporary.write_text(template.replace("/*STEMS*/null", content), encoding="utf-8")
    print(f"wrote {page}: open it in a browser")


def main():
    args = parse_args(sys.argv[1:])
    songs = find_songs(args.input)
    rank, _, world = process_rank()
    songs = songs[rank::world]
    separator = separator_from_flags(args)
    failed = []
    for path, name in songs:
        try:
            process(separator, path, name, args)
        except UserError as error:
            report(error)
            failed.append(path)
    if failed and len(songs) == 1:
        sys.exit(2)
    if failed:
        print(f"{len(failed)} of {len(songs)} files failed: {', '.join(map(str, failed))}", file=sys.stderr)
        sys.exit(1)
    if songs:
        print(f"the stems are in {args.outdir}/. Next: listen (--html makes a page for it), or score a model: python eval.py")


if __name__ == "__main__":
    run(main)
