"""What several scripts need: errors, command lines, processes, files, sound in, pictures.

Axis letters: B batch, J sources, C channels, F frequency bins, T frames, N samples (see model.py).
"""

import argparse
import contextlib
import dis
import errno
import functools
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import pathlib
import pickle
import re
import secrets
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import av
import filelock
import numpy as np
import soundfile
import torch
import torch.distributed as dist
from tqdm import tqdm

SOURCES = ("vocals", "drums", "bass", "other")  # MUSDB18's sources, in museval's order

# ------------------------------------------------------------------------ errors and command lines


class UserError(Exception):
    """A mistake that the user can mend: one line that names file or flag, and the remedy."""


# What a file or its folder may meet without a mistake of ours: `report` says it in one line.
FAILURES = (UserError, OSError, MemoryError, RuntimeError)
SURROUNDINGS = "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS ENAMETOOLONG ENOMEM EIO EMFILE ENOTDIR"


def run(main):
    """Run a script's `main`; exit with the number that it returns, with 2 after a user's mistake.

    Ctrl-C, SIGTERM and SIGHUP end it in order, so that temporary files are removed; a mistake of
    our own ends in a full traceback.
    """

    def stop(number, _):
        sys.exit(128 + number)

    def again(ignored):  # Python drops what a handler raises while C calls it: a signal comes again
        if not isinstance(ignored.exc_value, SystemExit | KeyboardInterrupt):
            hook(ignored)
            return
        number = getattr(ignored.exc_value, "code", 128 + signal.SIGINT) - 128
        dropped[number] = threading.Timer(0.01, os.kill, (os.getpid(), number))
        dropped[number].start()

    dropped, hook = {}, sys.unraisablehook  # {signal: what sends it again}
    sys.unraisablehook = again
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    # what nohup ignores stays ignored
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a letter is shown its number
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `python eval.py | head -1`: nobody reads on
        code = 141
    except FAILURES as error:  # a signal that cut a file's reading short is no damage of it
        code = 128 + min(dropped) if dropped else report(error)
    try:
        sys.stdout.flush()
    except OSError:  # what can't be printed is not to be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.unraisablehook = hook
    for timer in dropped.values():
        timer.cancel()
    for number in numbers:  # nothing is left to be cleaned up
        signal.signal(number, signal.SIG_DFL)
    sys.exit(code if type(code) is int else 0)


def report(error):
    """Print what the user can mend as one line; return the exit code 2. Raises any other error."""
    text = str(error)
    if isinstance(error, UserError):
        text = text.rpartition("UserError: ")[2]  # a worker process sends its traceback along
    elif errno.errorcode.get(getattr(error, "errno", None)) in SURROUNDINGS.split():
        text = f"{error.filename or 'a file'}: {error.strerror}; mend that or choose another folder"
    elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
        text = f"the memory is full ({text[:100]}); close programs or take smaller settings"
    else:
        raise error
    print(f"error: {printable(text.strip())}", file=sys.stderr)
    return 2


def printable(text):
    """Text as one line, its control characters spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not those that say nothing (None, False); keeps line breaks."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and reports a bad command line in one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        message = message.removeprefix("argument ")
        raise UserError(f"{message} (python {self.prog} --help explains every flag)")

    def given(self, arguments):
        """The names of the flags that a command line gives, by hand, in full."""
        flags = {argument.partition("=")[0] for argument in arguments}
        return {action.dest for action in self._actions if flags & {*action.option_strings}}


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`, both included; never infinite."""
    high = min(high, 2**31 - 1) if kind is int else high  # what arrays and seeds can be

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range ({low} to {high})")
        return value

    parse.__name__ = kind.__name__  # for argparse: "invalid int value: ..."
    return parse


RESERVED = ("separator", "mixture")  # separator.json and the mixture on a page are files of ours
MIRROR = "OPENUNMIX_MIRROR"  # environment: address of a folder to fetch weights and data from
CONTROLS = {chr(code) for code in [*range(32), *range(127, 160)]}


def name(text, reserved=RESERVED):
    """The rule for names of targets, stems and tracks, which name files: an argparse type."""
    good = isinstance(text, str) and text.strip(". ") and not text.startswith(".")
    good = good and not set(text) & {"/", "\\", *CONTROLS} and len(os.fsencode(text)) <= 200
    if not good or text.lower() in reserved:
        rule = "no / or \\, no dot in front, no control characters, at most 200 bytes, not "
        raise argparse.ArgumentTypeError(f"{text!r} can't be a name ({rule}{', '.join(reserved)})")
    return text


def check_name(text, what, reserved=RESERVED):
    """`name` for what comes from files. Raises UserError that begins with `what`."""
    try:
        return name(text, reserved)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{what} {error}") from None


def add_separation_flags(parser):
    """The flags that test.py and eval.py share: which model, and how it separates."""
    add = parser.add_argument_group("separation").add_argument
    own = "open-unmix" if Path("open-unmix").is_dir() else "umxl"
    known = "model folder (open-unmix/ where there is one), or umxl, umxhq, umx, umxse: published, "
    known += "or an ONNX file"
    add("--model", default=own, help=known)
    add("--targets", nargs="+", type=name, help="targets to estimate (default: all, which is best)")
    add("--niter", type=number(int, 0), default=1, help="Wiener iterations; 0: the mixture's phase")
    window = "frames on which the Wiener filter works at a time; 0: all"
    add("--wiener-win-len", type=number(int, 0), default=300, help=window)
    add("--wiener", choices=["own", "norbert"], default="own", help="whose filter (norbert: slow)")
    add("--softmask", action="store_true", help="start the Wiener filter from ratio masks")
    rest = {"nargs": "?", "const": "residual", "metavar": "NAME"}
    add("--residual", type=name, help="also estimate what is left over", **rest)
    example = '{"vocals": ["vocals"], "rest": ["drums", "bass", "other"]}'
    add("--aggregate", metavar="JSON", help=f"sum targets: {example}")
    add("--amp", action="store_true", help="compute the networks in bfloat16")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one), mps (untested)")


# ------------------------------------------------------------------------ processes and devices


def process_rank():
    """(rank, local rank, number of processes) as torchrun sets them; (0, 0, 1) without torchrun."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(key, default)) for key, default in defaults.items())


def gather(items):
    """All processes' lists in one. Waits for the slowest: torchrun ends all when one fails."""
    world = process_rank()[2]
    if world == 1:
        return items
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    lists = [None] * world
    dist.all_gather_object(lists, items)
    dist.destroy_process_group()
    return [item for part in lists for item in part]


def select_device(name=None):
    """The torch device of this process: `name`, or its own GPU where there is one, else the CPU.

    A CUDA device always has its index. Raises UserError for a device that this machine has not.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    counts = {found.type: torch.accelerator.device_count()} if found else {}  # mps, xpu
    counts |= {"cpu": math.inf, "cuda": cards}
    try:
        device = torch.device(name or ("cuda" if cards else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in counts:
        known = ", ".join(kind for kind, count in counts.items() if count)
        raise UserError(f"--device {name}: no such device; this machine has {known}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", process_rank()[1] % max(cards, 1))
    if (device.index or 0) >= counts[device.type]:
        sees = f"PyTorch sees {counts[device.type]} GPUs here"
        raise UserError(f"--device {name}: {sees}; leave it out or use cpu")
    return device


NO_DOUBLES = {"mps"}  # types of device without double precision and products of complex matrices


def precise(device):
    """Where to compute what needs double precision or complex matrices: `device`, or the CPU."""
    return torch.device("cpu") if device.type in NO_DOUBLES else device


def has_bfloat16(device):
    """Whether `device` computes in bfloat16: older CPUs crawl, or oneDNN refuses there."""
    return torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def use_amp(wanted, device):
    """Whether to compute in bfloat16: where it is wanted and can be had."""
    if wanted and not has_bfloat16(device):
        print("this CPU has no bfloat16 instructions: --amp is left out, float32 is used")
    return bool(wanted) and has_bfloat16(device)


# ------------------------------------------------------------------------ files


def hidden(path, ending):
    """A hidden name beside `path`, short enough where that name is as long as names may be."""
    return path.with_name(f".{path.name[:50]}.{ending}")


def unwritable(path, error):
    reason = getattr(error, "strerror", None) or error
    remedy = "free some space or choose another folder"
    return UserError(f"{path}: could not be written ({reason}); {remedy}")


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`, renamed to it at the end, removed after any failure.

    Raises UserError where the file system refuses (no space, no permission).
    """
    path = Path(path)
    temporary = hidden(path, f"{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def only_writer(path, what, wait=True):
    """Hold a lock beside `path` while writing there: one process at a time makes `what`.

    Waits for another process, and says so; `wait=False` raises UserError instead.
    """
    path = Path(path).absolute()
    lock_file = hidden(path, "lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(lock_file)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            said = f"{path}: process {lock_file.read_text()} is writing {what}"
            if not wait:
                raise UserError(f"{said}; wait for it, or choose another folder") from None
            print(printable(f"{said}: waiting for it"), flush=True)
            lock.acquire()
        lock_file.write_text(str(os.getpid()))
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock_file.unlink()  # while it is held: who waits notices, and makes a new one
        lock.release()


def check_output(path, inputs=(), roots=(), ours=False):
    """Decide, before work starts, whether `path` may be written; returns it as a Path.

    Raises UserError where it is one of the inputs, `identities` of files (a link is one, too), lies
    in one of `roots`, folders of data, or exists without being `ours`: written by us, or given up
    by --overwrite.
    """
    path = Path(path)
    if not identities([path]).isdisjoint(inputs):
        raise UserError(f"{path}: is an input, which is never written to; choose another folder")
    for root in (Path(root).resolve() for root in roots):
        if root in (path.resolve(), *path.resolve().parents):
            raise UserError(f"{path}: lies in the data that is read, {root}; choose another folder")
    if path.is_dir() or (os.path.lexists(path) and not ours):
        raise UserError(f"{path}: exists and was not written by this script; move it away")
    return path


def identities(paths):
    """What files have in common with all links to them: where they lie on the disk, their paths."""
    found = {str(Path(path).resolve()) for path in paths}
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found.add((status.st_dev, status.st_ino))
    return found


def stamp(path):
    """[size in bytes, modification time in ns] of a file, for records; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


@functools.cache
def code_fingerprint():
    """A hash over the scripts' code: any edit makes stored scores and stems out of date."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


code_fingerprint()  # now: what is edited later is not what runs


def code_of(thing):
    """What decides what a function or class does: its code and its parents', and all they refer to.

    For what comes from a notebook or a package, which `code_fingerprint` does not see.
    """
    parents = inspect.getmro(thing) if inspect.isclass(thing) else [thing]
    name, seen = getattr(thing, "__qualname__", type(thing).__qualname__), {}
    return repr([name, *(compiled(p, seen) for p in parents if p is thing or not is_library(p))])


LIBRARIES = sys.stdlib_module_names - {"__main__"}
LIBRARIES |= {"torch", "numpy", "scipy", "tqdm", "av", "soundfile"}


def is_library(thing):
    """Whether a function, class or module is from where nobody experiments."""
    module = getattr(thing, "__name__" if inspect.ismodule(thing) else "__module__", None)
    return (module or "builtins").partition(".")[0] in LIBRARIES


def compiled(thing, seen=None):
    """What decides what a function, a class's methods or a value do, as numbers, text and lists.

    Of a function: instructions, constants, defaults, what it closes over, and what it reads from
    its module, likewise: numbers, text, tables (but for those of classes), functions, classes.

    Args:
        seen: {id: functions, classes and tables that were met before}.
    """
    seen = {} if seen is None else seen
    if thing is None or isinstance(thing, int | float | complex | str | bytes):
        return thing
    if isinstance(thing, np.ndarray | np.generic | torch.Tensor):
        return thing.tolist()
    if isinstance(thing, tuple):
        return [compiled(part, seen) for part in thing]
    if isinstance(thing, set | frozenset):
        return sorted(repr(compiled(part, seen)) for part in thing)
    if inspect.iscode(thing):
        return [thing.co_code, thing.co_names, *compiled(thing.co_consts, seen)]
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if id(thing) in seen:
        return "as above"
    seen[id(thing)] = thing
    if isinstance(thing, list):
        return compiled(tuple(thing), seen)
    if isinstance(thing, classmethod | staticmethod):
        return compiled(thing.__func__, seen)
    if isinstance(thing, property):
        return compiled((thing.fget, thing.fset), seen)
    if isinstance(thing, functools.partial):
        return compiled((thing.func, thing.args, thing.keywords), seen)
    if inspect.isclass(thing):
        plain = not is_library(thing)  # names with __ are Python's: some come with pickling
        members = {k: v for k, v in vars(thing).items() if plain and k[:2] != "__"}
        members |= {k: v for k, v in vars(thing).items() if inspect.isfunction(v)}
        return [(name, compiled(members[name], seen)) for name in sorted(members)]
    if isinstance(thing, dict):
        return [(repr(key), compiled(value, seen)) for key, value in thing.items()]
    if not is_library(type(thing)) and hasattr(thing, "__dict__"):  # an object
        return compiled((type(thing), vars(thing)), seen)
    if not inspect.isfunction(thing) or is_library(thing):
        return getattr(thing, "__qualname__", type(thing).__qualname__)
    cells = tuple(cell.cell_contents for cell in thing.__closure__ or ())
    values = [thing.__code__, thing.__defaults__, thing.__kwdefaults__, cells]
    return [compiled(value, seen) for value in [*values, *read_by(thing)]]


def read_by(function):
    """What a function, or one within it, reads from its module, or from another one by its name."""

    def names_in(code, kinds):
        names = {step.argval for step in dis.get_instructions(code) if step.opname in kinds}
        within = (names_in(part, kinds) for part in code.co_consts if inspect.iscode(part))
        return sorted(names.union(*within))

    known, code = function.__globals__, function.__code__
    names = [name for name in names_in(code, {"LOAD_GLOBAL"}) if name[:2] != "__"]
    values = [known[name] for name in names if name in known]
    for place in filter(inspect.ismodule, values.copy()):
        if not is_library(place):
            names = names_in(code, {"LOAD_ATTR", "LOAD_METHOD"})
            values += [vars(place)[name] for name in names if name in vars(place)]
    tables = [value for value in values if isinstance(value, dict)]
    of_classes = [id(table) for table in tables if any(map(inspect.isclass, table.values()))]
    return [value for value in values if id(value) not in of_classes]


def save(data, path):
    """Write a torch object (.pth, .chkpnt) or a JSON-able one (.json), whole or not at all."""
    if Path(path).suffix == ".json":
        text = json.dumps(data, indent=2, default=str)
        one_line = r"\[[^][{}\"]*\]"  # a list of numbers
        content = re.sub(one_line, lambda found: " ".join(found[0].split()), text).encode()
    else:
        buffer = io.BytesIO()  # torch.save straight to a full disk names no cause
        torch.save(data, buffer)
        content = buffer.getvalue()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


# What json and torch.load raise on a damaged file: torch.load has no exception of its own.
DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError)
DAMAGED += (ArithmeticError, AssertionError, MemoryError)
DAMAGED += (pickle.UnpicklingError, struct.error, zipfile.BadZipFile, RecursionError)


def load(path, device="cpu"):
    """Read what `save` wrote; loading executes nothing. Raises UserError for a damaged file."""
    try:
        if Path(path).suffix == ".json":
            return json.loads(Path(path).read_text(encoding="utf-8"))
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        problem = f"is damaged or not a {Path(path).suffix} file ({reason})"
        raise UserError(f"{path}: {problem}; replace it") from error


def download(url, path, sha256_start="", by_hand=None):
    """Fetch `url` to `path` with a progress bar; only a whole file with this SHA-256 gets its name.

    What breaks off goes on where it stopped, at once, and after an interruption or a kill when it
    is asked for again. Where the environment names a MIRROR, the file is looked for there.
    Raises UserError that says which address failed, and where a file fetched by hand belongs.
    """
    path, by_hand = Path(path), by_hand or f"fetch it by hand and put it at {path}"
    if os.environ.get(MIRROR):
        url = f"{os.environ[MIRROR].rstrip('/')}/{url.rpartition('/')[2]}"
    part = hidden(path, "part")
    progress = {"unit": "B", "unit_scale": True, "desc": path.name}
    with only_writer(path, "a download"), tqdm(**progress) as bar:
        began = reached = part.stat().st_size if part.exists() else 0
        in_vain = 0  # attempts that brought nothing, in turn
        while True:
            try:
                fetch_rest(url, part, bar)
                break
            except (OSError, http.client.HTTPException) as error:
                code = getattr(error, "code", None)
                if code == 416 and reached:  # there is nothing beyond what is here
                    break
                reason = getattr(error, "reason", None) or error
                here = part.stat().st_size if part.exists() else 0
                in_vain, reached = 0 if here > reached else in_vain + 1, max(here, reached)
                busy = code in (429, 503)
                if in_vain > 5 or (code and not busy) or (reached == began and not busy):
                    kept = f" ({reached >> 20} MB are kept)" if reached else ""
                    raise UserError(f"{url}: {reason}{kept}; try again, or {by_hand}") from error
                wait = error.headers.get("Retry-After", "") if busy else ""
                wait = min(int(wait), 3600) if wait.isdecimal() else 2**in_vain - 1
                bar.set_postfix_str(f"{reason}: going on in {wait} s" if wait else "")
                time.sleep(wait)
        digest = hashlib.sha256()
        with open(part, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        if not digest.hexdigest().startswith(sha256_start):
            part.unlink()
            raise UserError(f"{url}: failed the check of its SHA-256; try again, or {by_hand}")
        os.replace(part, path)


def fetch_rest(url, part, bar):
    """Fetch what lacks of a file in one request, or all where the server can't do that."""
    here = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={here}-"} if here else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
            here = 0
        length = answer.headers.get("Content-Length", "")
        bar.total = here + int(length) if length.isdecimal() else None
        bar.update(here - bar.n)
        try:
            with open(part, "ab" if here else "wb") as file:
                while block := read_some(answer):
                    file.write(block)
                    bar.update(len(block))
        except OSError as error:
            raise unwritable(part, error) from error
    if bar.total and bar.n < bar.total:
        raise http.client.HTTPException(f"broke off, {bar.total - bar.n} of {bar.total} bytes lack")


def read_some(answer):
    """A block of what a server sends; a connection that breaks is no mistake of the disk."""
    try:
        return answer.read(1 << 18)
    except OSError as error:
        raise http.client.HTTPException(f"the connection broke ({error})") from error


@contextlib.contextmanager
def patched(owner, name, value):
    """Give `owner.name` another value for a while."""
    kept = vars(owner).get(name, getattr(owner, name))  # of a class: as it is, not as it is called
    of_class = inspect.getattr_static(type(owner), name, None)
    own = name in vars(owner) or inspect.isdatadescriptor(of_class)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept) if own else delattr(owner, name)


@functools.cache
def import_torchaudio():
    """torchaudio without its compiled extension.

    The package index has only the CUDA build for Linux: beside a CPU-only torch its extension
    cannot load. The parts used here are plain Python, and torchaudio takes a *missing* extension
    for granted, so it is shown none.
    """
    with patched(pathlib.Path, "glob", lambda *args, **kwargs: iter(())):
        import torchaudio
        import torchaudio.functional
    return torchaudio


@functools.cache
def import_museval():
    """museval also where there is no ffmpeg.

    It imports stempeg, which refuses without ffmpeg and ffprobe on PATH; scoring runs neither, and
    the import only asks `shutil.which`. NumPy 2.4 no longer has the place where museval looks for
    LinAlgError.
    """
    with patched(shutil, "which", lambda name, *args, **kwargs: name):
        import museval
        import museval.metrics
    if not hasattr(np.linalg, "linalg"):
        np.linalg.linalg = np.linalg
    return museval


# ------------------------------------------------------------------------ sound in

# What soundfile reads exactly, by a file's first bytes: WAV, RF64, Wave64, AIFF, AU, FLAC. PyAV
# decodes everything else. 16 bits are read as such: soundfile makes floats of them five times as
# slowly as NumPy.
MAGIC = (b"RIFF", b"RF64", b"riff", b"FORM", b".snd", b"fLaC")
INT16 = ("PCM_16", "PCM_S8", "PCM_U8", "ULAW", "ALAW")
# libsndfile's log of a header that promises more than there is: "data : 80000 (should be 53318)"
PROMISE = re.compile(r"^ *(?:data|SSND|D.* Size|[rR]iff.*?) *: (\d+) \(should be (\d+)\)", re.M)
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICS")  # may stand behind an MP3, or between two of them
SLACK = 0.05  # seconds: an encoder's delay, the padding of its last frame, rounded times
LOUDEST = 1000  # +60 dBFS: no recording, but samples that are read as what they are not

av.logging.set_level(av.logging.ERROR)  # what FFmpeg complains of is read where it decodes
av.logging.set_skip_repeated(False)


@dataclass(frozen=True)
class AudioFile:
    """One audio file, mono or stereo: `length` samples at `rate` Hz, as often as wanted.

    `stamp` is its size and time of modification; `dtype` is how soundfile reads it, "" for what
    PyAV decodes, always from the beginning: as exact, but slow where parts are drawn at random.
    """

    path: str
    rate: int
    channels: int
    length: int
    stamp: tuple
    dtype: str

    @classmethod
    def open(cls, path):
        """Read a file's header; where that may only guess the length, decode the file once.

        Raises UserError for what is not a regular file, not audio, empty, truncated, has more than
        two channels or a sample rate that can't be right.
        """
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            found = soundfile_header(path, file) or decoded_header(path, file)
        rate, channels, length, dtype = found
        if not length:
            raise UserError(f"{path}: contains no samples")
        if channels > 2:
            raise UserError(f"{path}: has {channels} channels; mix it down to stereo or mono first")
        if not 1000 <= rate <= 1_000_000:
            raise UserError(f"{path}: has a sample rate of {rate} Hz; repair or export it again")
        return cls(str(path), rate, channels, length, (status.st_size, status.st_mtime_ns), dtype)

    def blocks(self, start=0, stop=None, size=1 << 19):
        """Yield samples `start` to `stop` (None: the end) in order, as float32 tensors (C, n).

        Raises UserError for a file that was changed since `open`, is damaged or shorter than it
        promised, has NaN, infinite or absurdly loud samples.
        """
        stop = self.length if stop is None else min(stop, self.length)
        position = start
        with open_regular(self.path, self.stamp) as file:
            for block in (self._read if self.dtype else self._decode)(file, start, stop, size):
                if self.dtype != "int16":  # integers are finite and at most of full scale
                    self._check(block, position)
                position += block.shape[1]
                yield torch.from_numpy(block)
        if position < stop:
            raise truncated(self.path, position, self.length, self.rate)

    def read(self, start, length):
        """Samples from `start` on as a float32 array (C, length), zeros beyond the file's ends.

        Raises UserError as `blocks` does.
        """
        first = min(max(start, 0), self.length)
        last = max(first, min(start + length, self.length))
        parts = [block.numpy() for block in self.blocks(first, last)] if first < last else []
        if len(parts) == 1 and last - first == length:
            return parts[0]
        audio = np.zeros((self.channels, length), np.float32)
        if parts:
            audio[:, first - start : last - start] = np.concatenate(parts, axis=1)
        return audio

    def _read(self, file, start, stop, size):
        """Samples by soundfile, (C, n) at a time."""
        try:
            with soundfile.SoundFile(file) as sound:
                sound.seek(start)
                while start < stop:
                    samples = sound.read(min(size, stop - start), dtype=self.dtype, always_2d=True)
                    if not len(samples):
                        return
                    start += len(samples)
                    yield as_floats(samples.T)
        except soundfile.LibsndfileError as error:
            raise damaged(self.path, error.error_string) from error

    def _decode(self, file, start, stop, size):
        """Samples by PyAV, about `size` at a time; what lies before `start` is dropped."""
        position, waiting = 0, [np.empty((self.channels, 0), np.float32)]
        with open_container(self.path, file) as (container, stream, _):
            for block in decode(self.path, container, stream):
                waiting.append(block[:, max(0, start - position) : stop - position])
                position += block.shape[1]
                if position >= stop:
                    break
                if sum(part.shape[1] for part in waiting) >= size:
                    yield np.concatenate(waiting, axis=1)
                    waiting = waiting[:1]
        yield np.concatenate(waiting, axis=1)

    def _check(self, block, position):
        if block.size and not max(block.max(), -block.min()) <= LOUDEST:  # NaN is not, either
            second = (position + (~(np.abs(block) <= LOUDEST).all(axis=0)).argmax()) / self.rate
            what = f"NaN, infinite or absurdly loud samples (+60 dBFS) at {second:.1f} s"
            raise UserError(f"{self.path}: has {what}; repair or export it again")


@contextlib.contextmanager
def open_regular(path, stamp=None):
    """Open a file for reading; never waits at a FIFO.

    Raises UserError, also where its stamp is another than `stamp` at the beginning or at the end.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UserError(f"{path}: is {kind}; name an audio file")
        with open(path, "rb", buffering=0) as file:
            for turn in range(2):
                status = os.fstat(file.fileno())
                if stamp and (status.st_size, status.st_mtime_ns) != stamp:
                    raise UserError(f"{path}: was changed since it was opened; start again")
                if not turn:
                    yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name an audio file") from None
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {reason}; check its permissions") from error


def damaged(path, reason):
    return UserError(f"{path}: breaks off or is damaged ({reason}); replace it")


def truncated(path, there, promised, rate):
    seconds = f"{there / rate:.2f} of {promised / rate:.2f} s"
    return UserError(f"{path}: is truncated: {seconds} of audio are there; replace it")


def as_floats(samples):
    """Samples as stored, (C, n), as float32 between -1 and 1; floats are what they are."""
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.int16) - 128) << 8
    if samples.dtype.kind == "f":
        return np.ascontiguousarray(samples, dtype=np.float32)
    floats = np.empty(samples.shape, np.float32)  # in this order of memory
    scale = np.float32(0.5 ** (8 * samples.itemsize - 1))
    return np.multiply(samples, scale, out=floats, dtype=np.float32)


def soundfile_header(path, file):
    """(rate, channels, length, dtype) of what soundfile reads exactly, else None."""
    if file.read(4) not in MAGIC:
        return None
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            log, rate, channels = sound.extra_info, sound.samplerate, sound.channels
            if not 0 < sound.frames < 1 << 48 or not sound.seekable():
                return None  # from a pipe: it does not know how long it is
            found = rate, channels, sound.frames, "int16" if sound.subtype in INT16 else "float32"
            piped = sound.format in ("WAV", "WAVEX")  # as long as can be, by sox, ffmpeg, arecord
    except (soundfile.LibsndfileError, TypeError):  # TypeError: it is named .raw
        return None
    for promised, there in PROMISE.findall(log):
        if int(promised) > int(there) and not (piped and int(promised) > 0x7FFFE000):
            counts = f"{there} of {promised} bytes are there"
            raise UserError(f"{path}: is truncated: {counts}; replace it")
    return found


def decoded_header(path, file):
    """(rate, channels, length, "") of what PyAV decodes: what is there, once it is decoded.

    Raises UserError where that is less than the file promises.
    """
    with open_container(path, file) as (container, stream, promised):
        length = sum(block.shape[1] for block in decode(path, container, stream))
        rate, slack = stream.rate, SLACK * stream.rate
        if length < promised - (0 if stream.codec.lossless else slack):
            raise truncated(path, length, promised, rate)
        if promised < length < promised + slack and "mp4" in container.format.name:
            length = promised  # the last frame is filled up
        return rate, stream.channels, length, ""


@contextlib.contextmanager
def open_container(path, file):
    """Yield PyAV's container, its first stream of sound and how many samples that promises or 0."""
    if not ends_with_last_page(file):
        raise damaged(path, "the last Ogg page is missing")
    file.seek(0)
    # A playlist among the songs must not open what it names.
    options = {"metadata_errors": "ignore", "container_options": {"protocol_whitelist": "none"}}
    with contextlib.ExitStack() as stack:
        try:
            av.logging.set_level(av.logging.WARNING)
            with av.logging.Capture() as complaints:
                container = stack.enter_context(av.open(file, **options))
            stream = container.streams.audio[0]
            if not stream.codec_context:
                raise IndexError
        except (av.FFmpegError, IndexError) as error:
            reason = getattr(error, "strerror", "there is no sound in it")
            raise UserError(f"{path}: is not audio that can be read ({reason})") from error
        finally:
            av.logging.set_level(av.logging.ERROR)
        guessed = any("Estimating duration" in text for _, _, text in complaints)
        seconds = 0 if guessed or not stream.duration else stream.duration * stream.time_base
        yield container, stream, round(seconds * stream.rate)


def decode(path, container, stream):
    """Yield all sound of a stream as float32 arrays (C, n), from the beginning of the film.

    Raises UserError where the decoder complains, and for a gap: later sound must keep its place.
    """
    rate, form = stream.rate, (stream.rate, stream.channels)
    origin = Fraction(container.start_time or 0, av.time_base)  # in seconds
    position, expected = 0, None  # samples so far; where the next frame belongs by its time
    for frame in decoded_frames(path, container, stream):
        if (frame.sample_rate, frame.layout.nb_channels) != form:
            raise UserError(f"{path}: changes its rate or channels midway; convert it first")
        if frame.pts is not None:
            begin = round((frame.pts * frame.time_base - origin) * rate)
            gap = begin - (expected or 0)
            if expected is None and 0 < gap < 3600 * rate:  # sound that starts after the film
                yield np.zeros((stream.channels, gap), np.float32)
            elif gap > max(SLACK * rate, frame.samples * stream.codec.name.startswith("mp3")):
                lost = f"{gap / rate:.2f} s are missing at {position / rate:.1f} s"
                raise damaged(path, lost)
            expected = begin + frame.samples
        position += frame.samples
        samples = frame.to_ndarray()
        if not frame.format.is_planar:
            samples = samples.reshape(-1, stream.channels).T
        yield as_floats(samples)


def decoded_frames(path, container, stream):
    """The frames of a stream. Raises UserError for what the decoder can't decode or complains of.

    MP3 has no end: what follows its last frame, or lies as a tag between two files in one, is no
    damage; nor are complaints of decoders that start in the middle of a broadcast.
    """
    mp3 = stream.codec.name.startswith("mp3")
    packets, ended, junk = container.demux(stream), False, b""
    while not ended:
        packet, frames = None, []
        with av.logging.Capture() as complaints:
            try:
                packet = next(packets, None)
                ended = packet is None
                frames = [] if ended else packet.decode()
            except av.FFmpegError as error:
                if not mp3 or packet is None:
                    raise damaged(path, error.strerror) from error
                junk = junk or bytes(packet)
        errors = [text.strip() for level, _, text in complaints if level <= av.logging.ERROR]
        if not ended and packet.is_corrupt and container.format.name != "wav":  # from a pipe
            errors.append("it ends within a packet")
        if (errors and not mp3) or (frames and junk and not junk.startswith(TAGS)):
            raise damaged(path, (errors or ["something in it is not MP3"])[0])
        junk = b"" if frames else junk
        yield from frames


def ends_with_last_page(file):
    """Whether a file's last Ogg page is whole and marked as its stream's last; True if not Ogg."""
    file.seek(0)
    if file.read(4) != b"OggS":
        return True
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 17)))  # two of the longest pages
    page = file.read()
    page = page[page.rfind(b"OggS") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return bool(segments) and len(page) >= 27 + len(segments) + sum(segments) and page[5] & 4 > 0


FILTER = 32  # zero crossings of the sinc to either side: torchaudio's 6 cost 3 dB at 18 kHz
REACH = FILTER / 0.99 + 2  # samples of the lower rate that the filter sees to either side


def resample(waveform, rate, new_rate):
    """A waveform (..., N) at another rate in Hz, by windowed sinc interpolation (torchaudio).

    Raises UserError for rates without a common divisor: the filter bank would take gigabytes.
    """
    if rate * new_rate > 1e8 * math.gcd(rate, new_rate) ** 2:
        by_hand = f"convert it first: ffmpeg -i FILE -ar {new_rate} NEW.wav"
        raise UserError(f"audio of {rate} Hz can't be resampled to {new_rate} Hz; {by_hand}")
    functional = import_torchaudio().functional
    return functional.resample(waveform, rate, new_rate, lowpass_filter_width=FILTER)


def resample_blocks(blocks, rate, new_rate):
    """Resample a stream of blocks (..., n) in bounded memory: the same samples as all at once."""
    if rate == new_rate:
        yield from blocks
        return
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    context = old * math.ceil(REACH * max(1, old / new) / old + 1)  # whole periods that it reaches
    buffer, skip = None, 0  # what later output still needs; how much of it is context on the left
    for block in blocks:
        buffer = block if buffer is None else torch.cat([buffer, block], dim=-1)
        ready = (buffer.shape[-1] - context) // old * old
        if ready > skip:
            output = resample(buffer[..., : ready + context], rate, new_rate)
            yield output[..., skip // old * new : ready // old * new]
            keep = max(0, ready - context)
            buffer, skip = buffer[..., keep:], ready - keep
    if buffer is not None and buffer.shape[-1] > skip:
        yield resample(buffer, rate, new_rate)[..., skip // old * new :]


# ------------------------------------------------------------------------ pictures


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
    """Draw the spectrograms of a mixture and its stems, and beside each stem's its mask.

    Args:
        levels: {name: (F, T) magnitudes}, the mixture first; the loudest of all is 0 dB. A mask is
            a stem's part of the mixture.
        sample_rate: in Hz; n_hop: samples from frame to frame; path: the PNG to write.
    """
    picture, axes = figure(len(levels), 2, (14, 0.7 + 1.7 * len(levels)), sharex=True, sharey=True)
    mixture, *_ = levels.values()
    seconds, low, high = mixture.shape[1] * n_hop / sample_rate, 40, sample_rate / 2  # low: in Hz
    # a row of the picture shows the loudest bin from its own to the next row's
    rows = (np.geomspace(low, high, 400) / high * (len(mixture) - 1)).round().astype(int)
    images = {name: np.maximum.reduceat(np.asarray(level), rows) for name, level in levels.items()}
    mixture, *_ = images.values()
    loudest = max(1e-9, *(image.max() for image in images.values()))
    box = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 3}
    label = {"x": 0.008, "y": 0.92, "color": "white", "weight": "bold", "va": "top", "bbox": box}
    extent = (0, seconds, math.log10(low), math.log10(high))
    drawing = {"origin": "lower", "aspect": "auto", "extent": extent}
    for (left, right), (name, image) in zip(axes, images.items(), strict=True):
        name = name.replace("$", r"\$")  # not a formula
        level = 20 * np.log10(np.maximum(image / loudest, 1e-9))
        levels_drawn = left.imshow(level, **drawing, vmin=-70, vmax=0, cmap="magma")
        left.set_ylabel("kHz")
        left.text(s=name, transform=left.transAxes, **label)
        if image is mixture:
            right.set_axis_off()
        else:
            mask = image / np.maximum(mixture, 1e-9)
            masks_drawn = right.imshow(mask, **drawing, vmin=0, vmax=1, cmap="gray")
            right.text(s=f"mask of {name}", transform=right.transAxes, **label)
    ticks = [hertz for hertz in (100, 1000, 10000) if hertz < high]
    left.set_yticks(
        [math.log10(hertz) for hertz in ticks], [f"{hertz / 1000:g}" for hertz in ticks]
    )
    left.xaxis.set_major_formatter(lambda s, _: f"{int(s // 60)}:{s % 60:02.0f}")
    left.locator_params(axis="x", nbins=8, steps=[1, 1.5, 2, 3, 5, 6, 10], integer=True)
    for axis in axes[-1]:
        axis.set_xlabel("time (min:s)")
    picture.colorbar(levels_drawn, ax=list(axes[:, 0]), label="dB re loudest", pad=0.01, aspect=40)
    label = "part of the mixture"
    picture.colorbar(masks_drawn, ax=list(axes[:, 1]), label=label, pad=0.01, aspect=40)
    save_figure(picture, path)
