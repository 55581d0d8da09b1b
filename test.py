"""Separate songs into stems.

    python test.py SONG.mp3                        stems/SONG/vocals.wav, stems/SONG/drums.wav, ...
    python test.py SONG.mp3 --model umxl --html    with published weights, and a page to listen
    python test.py FOLDER --outdir out --ext flac  all audio there; what is done is kept
    python test.py --export model.onnx             the networks for other runtimes, or --model
    python test.py --page stems/A/SONG stems/B/SONG    folders of stems side by side, also blind
    torchrun --nproc_per_node=4 test.py FOLDER     the files shared out over processes

A song goes through in blocks: samples (C, n) from its file, at the model's rate, into
`Separator.stream`; estimates (J, C, n) out of it, which are written to J files at the song's rate.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends at once: nothing is to be cleaned up
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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

import utils
from model import aggregation, export_onnx, load_onnx, load_separator, separator_from_flags
from model import stft_blocks, sum_targets
from utils import AudioFile, UserError, number, printable, resample_blocks


def separate(separator, mixture, stems, sums, quiet=False):
    """Separate one recording.

    Args:
        separator: a model.Separator.
        mixture: a Recording.
        stems: {name: Stem}, what to write to; sums: {name: the targets that add up to it}.
        quiet: no progress bar.
    """
    left, seconds = mixture.length, round(mixture.length / mixture.rate, 1)
    name = printable(Path(mixture.audio.path).name)
    with tqdm(total=seconds, desc=name, disable=quiet, bar_format=BAR) as bar:
        blocks = separator.stream(Input(mixture, separator.sample_rate, bar))
        estimates = (block.float().cpu() for block in blocks)  # a GPU would resample in TF32
        for block in resample_blocks(estimates, separator.sample_rate, mixture.rate):
            block = block[..., :left]  # (J, C, n)
            if not block.numel():
                continue
            left -= block.shape[-1]
            if not block.isfinite().all():
                broken = "the model makes NaN or infinite samples of it: use another"
                raise UserError(f"{mixture.audio.path}: {broken}")
            samples = sum_targets(block, separator.targets, sums)
            for name, stem in stems.items():
                stem.write(samples[name])
        bar.update(seconds - bar.n)


def main(arguments=None):
    """Separate all songs; returns 0, 1 where some failed, 2 where nothing could be separated."""
    args = parse_args(arguments)
    if args.export:
        return export(args)
    if args.page:
        return compare(args)
    rank, _, world = utils.process_rank()
    args.quiet |= world > 1  # the bars of several processes would overwrite each other
    songs = find_songs(args.input, args.outdir)
    separator = separator_from_flags(args)
    args.sums = aggregation(separator.targets, args.aggregate)
    if len({name.lower() for name in args.sums}) < len(args.sums):
        raise UserError(f"two stems would have one name: {', '.join(args.sums)}; rename one")
    args.inputs = utils.identities([path for path, _ in songs])
    args.fingerprint = separator.fingerprint()
    failed = []
    for step in (check_outputs, process):  # everything is checked before work starts
        for path, name in songs[rank::world]:
            if str(path) not in failed:
                try:
                    step(separator, path, Path(args.outdir, name), args)
                except utils.FAILURES as error:
                    utils.report(error)
                    failed.append(str(path))
    failed = utils.gather(failed)
    if rank > 0:
        return 0
    if not failed:
        listen = "listen (--html makes a page for it), or score a model: python eval.py"
        print(printable(f"the stems are in {args.outdir}/. Next: {listen}"))
        return 0
    if len(songs) > 1:
        said = f"{len(failed)} of {len(songs)} files failed: {', '.join(failed)}"
        print(printable(said), file=sys.stderr)
    return 1 if len(failed) < len(songs) else 2


def process(separator, path, folder, args):
    """Make a song's stems, unless they are there and current, and what else was asked for."""
    with utils.only_writer(folder, "this song"):
        record, wanted = read_record(folder), describe(path, args)
        reason = "of --overwrite" if args.overwrite else out_of_date(record, wanted, folder)
        mixture, stems = Recording(path, args.start, args.duration), ", ".join(args.sums)
        if reason:
            if record["files"]:
                print(printable(f"{folder}: made anew, because {reason}"))
            start, seconds = time.time(), mixture.length / mixture.rate
            record = make_stems(separator, mixture, folder, {**record, **wanted}, args)
            speed = f"{seconds / (time.time() - start):.1f} times as fast as it plays"
            print(printable(f"{folder}: {stems}; {seconds:.1f} s of audio, {speed}"))
            there = (file for file in record["files"] if (folder / file).exists())
            if old := [file for file in there if file not in files_to_make(args)]:
                kept = f"{', '.join(old)}: of an earlier command, kept as they are"
                print(printable(f"{folder}: {kept}"))
        else:
            print(printable(f"{folder}: kept {stems} (--overwrite makes them anew)"))
        if args.plot or args.html:
            files = {stem: folder / f"{stem}.{args.ext}" for stem in args.sums}
            recordings = {stem: Recording(file) for stem, file in files.items()}
            recordings = {"mixture": mixture, **recordings}
        if args.plot:
            plot(recordings, folder / PICTURE)
            write_record(record, folder, [PICTURE])
        if args.html:
            write_page(song_name(path), recordings, folder / PAGE)
            write_record(record, folder, [PAGE])


def make_stems(separator, mixture, folder, record, args):
    """Separate a recording into its folder, all stems or none; returns the new record."""
    files = {stem: f"{stem}.{args.ext}" for stem in args.sums}
    record["length"] = mixture.length
    with contextlib.ExitStack() as stack:
        stems = {stem: Stem(folder / file, mixture, stack) for stem, file in files.items()}
        separate(separator, mixture, stems, args.sums, args.quiet)
        with ThreadPoolExecutor() as pool:
            notes = list(pool.map(Stem.finish, stems.values()))
        # Before they get their names: should the process end while they do, they are known as ours.
        record["files"] |= dict.fromkeys(files.values())
        utils.save(record, folder / RECORD)
    write_record(record, folder, files.values())
    for note in filter(None, notes):
        print(printable(note))
    return record


# ------------------------------------------------------------------------ flags and files

RECORD, PAGE, PICTURE = "stems.json", "index.html", "spectrograms.png"
FORMATS = {"wav": ("WAV", "FLOAT"), "flac": ("FLAC", "PCM_24"), "ogg": ("OGG", "VORBIS")}
FORMATS["mp3"] = ("MP3", "MPEG_LAYER_III")
AUDIO = ".wav .aiff .aif .flac .ogg .oga .opus .mp3 .m4a .aac .wma .mka .au .caf .w64"
AUDIO += " .mp4 .mkv .mov .webm .avi"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} s of audio "
BAR += "[{elapsed}<{remaining}{postfix}]"


def parse_args(arguments):
    parser = utils.Parser(__doc__)
    what = "audio or video files, folders, patterns such as 'songs/*.mp3'"
    parser.add_argument("input", nargs="*", help=what)
    add = parser.add_argument_group("files").add_argument
    add("--outdir", default="stems", help="folder to write to: <outdir>/<song>/<target>.<ext>")
    form = "wav is 32-bit float: nothing clips; others are scaled down where they would"
    add("--ext", choices=list(FORMATS), default="wav", help=form)
    add("--overwrite", action="store_true", help="make stems anew that exist, whoever wrote them")
    seconds = number(float, 0, 1e9)
    add("--start", type=seconds, default=0.0, help="where to begin, in seconds")
    long = "how much to separate, in seconds (default: everything)"
    add("--duration", type=number(float, 1e-6, 1e9), help=long)
    page = f"also write <outdir>/<song>/{PAGE}, a page that plays the stems together"
    add("--html", action="store_true", help=page)
    add("--plot", action="store_true", help=f"also write <outdir>/<song>/{PICTURE}")
    page = f"only write <outdir>/{PAGE}, which plays the stems of the input folders side by side"
    add("--page", action="store_true", help=page)
    add("--quiet", action="store_true", help="no progress bars")
    what = "separate nothing: write the model's networks as ONNX (see model.export_onnx)"
    add("--export", metavar="FILE.onnx", help=what)
    utils.add_separation_flags(parser)
    arguments = sys.argv[1:] if arguments is None else list(map(str, arguments))
    args, given = parser.parse_args(arguments), parser.given(arguments)
    alone = {  # what is not for songs: (flags that it uses, why it does not use the others)
        "export": ({"overwrite", "quiet", "model", "targets"}, "which separates nothing"),
        "page": ({"outdir", "overwrite"}, "which is given folders of stems"),
    }
    for flag, (used, why) in alone.items():
        for name in sorted(given - used - {flag}) if getattr(args, flag) else ():
            said = f"is not used with --{flag}, {why}; leave it out"
            raise UserError(f"--{name.replace('_', '-')}: {said}")
    if args.export and args.input:
        raise UserError(f"{args.input[0]}: is not used with --export; leave it out")
    if not (args.input or args.export):
        parser.error("the following arguments are required: input")
    return args


def export(args):
    """Write the model's networks as one ONNX file; returns 0."""
    path, ours = Path(args.export), args.overwrite
    if path.suffix != ".onnx":
        raise UserError(f"--export {path}: its name must end in .onnx, as --model knows it by")
    if path.exists() and not ours:
        with contextlib.suppress(UserError):
            ours = bool(load_onnx(path))
    utils.check_output(path, utils.identities([args.model]), ours=ours)
    separator = load_separator(args.model, args.targets)
    export_onnx(separator, path)
    stems = ", ".join(separator.targets)
    print(printable(f"wrote {path}: {stems}. Next: python test.py SONG.wav --model {path}"))
    return 0


def find_songs(inputs, outdir):
    """Files, folders, patterns -> sorted [(file, name of its output folder)], in every process."""
    names, outdir = {}, Path(outdir).resolve()
    for item in inputs:
        if not item:
            raise UserError("an input has no name: name a file or a folder")
        if Path(item).is_dir():  # a folder's songs keep their place below it
            paths = Path(item).rglob("*")
            found = {path: path.relative_to(item).parent / song_name(path) for path in paths}
        elif glob.has_magic(item) and not Path(item).exists():
            found = {Path(path): song_name(Path(path)) for path in glob.glob(item, recursive=True)}
        else:
            names[Path(item)] = song_name(Path(item))
            continue
        audio = (p for p in found if is_audio(p) and outdir not in p.resolve().parents)
        found = {path: str(found[path]) for path in audio}
        if not found:
            raise UserError(f"{item}: no audio files there but what may be in --outdir ({AUDIO})")
        names.update(found)
    groups = collections.defaultdict(list)
    for path, name in names.items():
        groups[name].append(path)
    songs = sorted(pair for name, paths in groups.items() for pair in tell_apart(name, paths))
    taken = collections.Counter(name for _, name in songs)
    for path, name in songs:
        if taken[name] > 1:
            remedy = "separate them into different --outdir"
            raise UserError(f"{path}: another input is also named {name}; {remedy}")
    return songs


def is_audio(path):
    known = path.suffix.lower() in AUDIO.split(" ")
    return known and not path.name.startswith("._") and path.is_file()


def tell_apart(name, paths):
    """Pairs of path and name for files that are all called `name`: a.mp3 and a.wav, A/a and B/a."""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    for form in "{name}", "{name}{suffix}", "{folder}/{name}", "{folder}/{name}{suffix}":
        parts = zip(paths, folders, strict=True)
        names = [form.format(name=name, suffix=p.suffix, folder=f).lstrip("/") for p, f in parts]
        if len(set(names)) == len(paths):
            break
    return zip(paths, names, strict=True)


def song_name(path):
    """A file's name without its extension, unless nothing is left to name a folder ("...wav")."""
    return path.stem if path.stem.strip(". ") else path.name


# ------------------------------------------------------------------------ the record of a song


def describe(path, args):
    """What decides a song's stems, as it stands in their record."""
    made = {"input": str(path.resolve()), "stamp": utils.stamp(path)}
    made |= {"model": args.fingerprint, "code": utils.code_fingerprint()}
    flags = {flag: getattr(args, flag) for flag in ("start", "duration", "ext", "sums")}
    return {**made, "settings": flags, "stems": list(args.sums)}


def read_record(folder):
    """The record of what we wrote to a folder: {"files": {file: its stamp}, ...}."""
    with contextlib.suppress(UserError):  # there is none, or somebody else's
        record = utils.load(folder / RECORD)
        if isinstance(record, dict) and isinstance(record.get("files"), dict):
            return record
    return {"files": {}}


def write_record(record, folder, files):
    """Note that these files were written just now."""
    record["files"] |= {file: utils.stamp(folder / file) for file in files}
    utils.save(record, folder / RECORD)


def out_of_date(record, wanted, folder):
    """Why the stems of a record are not what is wanted; "" where they are."""
    others = [key for key, value in wanted.items() if record.get(key) != value]
    if others:
        return f"the record has another {', '.join(others)}"
    files = [f"{stem}.{wanted['settings']['ext']}" for stem in wanted["stems"]]
    gone = [file for file in files if record["files"].get(file) != utils.stamp(folder / file)]
    return f"of {', '.join(gone)}, missing or changed" if gone else ""


def files_to_make(args):
    """The names of all files that the flags ask for, of each song."""
    stems = [f"{stem}.{args.ext}" for stem in args.sums]
    return stems + [PAGE] * args.html + [PICTURE] * args.plot


def check_outputs(_, path, folder, args):
    """Decide whether a song's files may be written. Raises UserError."""
    files = read_record(folder)["files"]
    utils.check_output(folder / RECORD, args.inputs, ours=bool(files) or args.overwrite)
    for file in files_to_make(args):
        # None: the process ended while it gave the file its name
        ours = file in files and files[file] in (None, utils.stamp(folder / file))
        utils.check_output(folder / file, args.inputs, ours=ours or args.overwrite)


# ------------------------------------------------------------------------ sound in and out


class Recording:
    """A part of an audio file: iterable, as often as wanted, over blocks (C, n).

    `start` and `duration` are in seconds, `.rate` in Hz, `.length` in samples.
    """

    def __init__(self, path, start=0.0, duration=None):
        self.audio = AudioFile.open(path)
        self.rate, self.channels = self.audio.rate, self.audio.channels
        self.first, end = round(start * self.rate), self.audio.length
        if self.first >= end:
            raise UserError(f"{path}: ends at {end / self.rate:.2f} s: --start must be before that")
        length = end if duration is None else max(1, round(duration * self.rate))
        self.length = min(length, end - self.first)

    def __iter__(self):
        return self.audio.blocks(self.first, self.first + self.length)


class Input:
    """A recording at the model's rate, for Separator.stream, which asks for it once or twice."""

    def __init__(self, recording, rate, bar):
        self.recording, self.rate, self.bar = recording, rate, bar
        self.start, self.shares = time.time(), [0.6, 0.4]  # of the work: to the LSTM, and the rest

    def __iter__(self):
        share = self.shares.pop() if self.shares else 0
        yield from resample_blocks(self.watch(share), self.recording.rate, self.rate)

    def watch(self, share):
        for block in self.recording:
            yield block
            speed = self.bar.n / (time.time() - self.start)
            self.bar.set_postfix_str(f"{speed:.1f} times as fast as it plays", refresh=False)
            seconds = share * block.shape[1] / self.recording.rate
            self.bar.update(min(seconds, self.bar.total - self.bar.n))  # their sum is rounded


class Stem:
    """A stem on its way to the disk; `stack` gives it its name, or removes it after a failure.

    WAV holds any float. The other formats are made by `finish` from an unnamed copy in float, when
    the peak is known.
    """

    def __init__(self, path, recording, stack):
        self.path, self.peak = path, 0.0
        self.part = os.fsencode(stack.enter_context(utils.atomic_write(path)))
        kind, subtype = FORMATS[path.suffix[1:]]
        form = {"samplerate": recording.rate, "channels": recording.channels}
        large = 4 * recording.channels * recording.length > 4e9  # WAV's own header counts 4 GB
        raw = {**form, "subtype": "FLOAT", "format": "RF64" if large else "WAV"}
        if kind == "WAV":
            self.audio = stack.enter_context(soundfile.SoundFile(self.part, "w", **raw))
            return
        try:
            encoded = soundfile.SoundFile(self.part, "w", **form, subtype=subtype, format=kind)
        except soundfile.LibsndfileError as error:
            reason = f"{kind} can't hold {recording.rate} Hz ({error.error_string})"
            raise UserError(f"{path}: {reason}; try --ext flac or wav") from error
        self.encoded = stack.enter_context(encoded)
        copy = stack.enter_context(tempfile.TemporaryFile(dir=path.parent)).fileno()  # noqa: SIM115
        self.audio = stack.enter_context(soundfile.SoundFile(copy, "w+", **raw, closefd=False))

    def write(self, samples):
        """Append samples (C, n)."""
        self.peak = max(self.peak, samples.abs().max().item())
        self.audio.write(samples.T.numpy())

    def finish(self):
        """Encode the whole stem; returns a note where that changes its level."""
        if self.path.suffix == ".wav":
            return ""
        length = self.audio.tell()
        self.audio.seek(0)
        for block in self.audio.blocks(1 << 16, dtype="float32", always_2d=True):
            self.encoded.write(block / max(1.0, self.peak))
        self.encoded.close()
        # on a full disk an encoder's last bytes just vanish
        if sum(map(len, soundfile.blocks(self.part, 1 << 16))) < length:
            remedy = "free some space or choose another folder"
            raise UserError(f"{self.path}: could not be written whole; {remedy}")
        if self.peak > 1:
            peak = f"{20 * math.log10(self.peak):+.1f} dBFS"
            return f"{self.path}: peaks at {peak} and was scaled down by as much to fit the format"
        return ""


# ------------------------------------------------------------------------ pictures and pages


def plot(recordings, picture):
    """Draw the spectrograms of the mixture and its stems; a long recording's frames are pooled."""
    levels, mixture = {}, recordings["mixture"]
    pool = math.ceil(mixture.length / 1024 / 1500)  # frames per column
    for name, recording in recordings.items():
        blocks = stft_blocks(recording, pool * math.ceil(300 / pool))
        columns = [F.max_pool1d(X.abs().mean(0), pool, ceil_mode=True) for X in blocks]  # (F, T)
        levels[name] = torch.cat(columns, dim=1).numpy()
    utils.plot_spectrograms(levels, mixture.rate, 1024 * pool, picture)
    print(printable(f"wrote {picture}"))


def compare(args):
    """Write a page of one song's stems in several folders, one of which sounds at a time."""
    folders = [os.path.abspath(folder) for folder in args.input]
    if len(set(folders)) < max(2, len(folders)):
        raise UserError("--page: compares two different folders of stems, or more; name them")
    names = [os.path.relpath(folder, os.path.commonpath(folders)) for folder in folders]
    title, *others = {os.path.basename(name) for name in names}
    if not others:  # the song's name
        names = [os.path.dirname(name) or name for name in names]
    stems = collections.defaultdict(dict)  # {stem: {(version, stem): Recording}}
    for folder, name in zip(folders, names):
        files = sorted(filter(is_audio, Path(folder).glob("*")))
        if not files:
            raise UserError(f"{folder}: holds no stems, files such as vocals.wav ({AUDIO})")
        for path in files:
            if (name, path.stem) in stems[path.stem]:
                raise UserError(f"{path}: there is another {path.stem}; move one of them away")
            stems[path.stem][name, path.stem] = Recording(path)
    versions = {key: v for pairs in stems.values() if len(pairs) > 1 for key, v in pairs.items()}
    if not versions:
        raise UserError(f"{folders[0]}: has no stem that is in another folder, too; rename one")
    first, *rest = ((v.audio.path, v.length / v.rate) for v in versions.values())
    for path, seconds in rest:
        if abs(seconds - first[1]) > 0.1:
            lasts = f"lasts {seconds:.1f} s, and {first[0]} {first[1]:.1f} s"
            raise UserError(f"{path}: {lasts}; compare stems of one song")
    page = Path(args.outdir, PAGE)
    record = read_record(page.parent)
    ours = page.exists() and record["files"].get(PAGE) == utils.stamp(page)
    utils.check_output(page, ours=ours or args.overwrite)
    utils.check_output(page.parent / RECORD, ours=bool(record["files"]) or args.overwrite)
    write_page("Side by side" if others else title, versions, page)
    write_record(record, page.parent, [PAGE])
    return 0


def write_page(title, recordings, page):
    """Fill assets/player.html with sound as MP3: {name: Recording}, the mixture and its stems.

    Where names are pairs (version, stem), the page compares the versions of each stem.
    """
    peaks = {}
    for name, recording in recordings.items():
        blocks = (block.abs().amax(0, keepdim=True) for block in recording)
        peaks[name] = torch.cat([F.max_pool1d(x, 1024, ceil_mode=True) for x in blocks], dim=1)
    scale = max(1.0, *(peak.max().item() for peak in peaks.values()))  # all keep their balance
    stems = []
    for name, recording in recordings.items():
        picture = F.adaptive_max_pool1d(peaks[name] / scale, 1000)[0].tolist()
        stem = dict(zip(("name", "group"), name)) if isinstance(name, tuple) else {"name": name}
        stem["audio"] = mp3(recording, scale)
        stems.append({**stem, "peaks": [round(peak, 3) for peak in picture]})
    content = json.dumps({"title": title, "stems": stems})
    content = content.replace("<", "\\u003c")  # no </script> from a song's name
    template = (Path(__file__).parent / "assets" / "player.html").read_text(encoding="utf-8")
    with utils.atomic_write(page) as temporary:
        temporary.write_text(template.replace("/*STEMS*/null", content, 1), encoding="utf-8")
    print(printable(f"wrote {page}: open it in a browser"))
    if recording.length > 1800 * recording.rate:
        remedy = "--start and --duration make a shorter page"
        print(f"half an hour and more needs gigabytes in a browser: {remedy}")


def mp3(recording, scale):
    """A recording, divided by `scale`, as the address (data: URI) of an MP3 at 44.1 kHz."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 44100, recording.channels, format="MP3") as file:
        for block in resample_blocks(recording, recording.rate, 44100):
            file.write((block / scale).T.numpy())
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    utils.run(main)
