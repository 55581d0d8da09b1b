"""Nothing lost, nothing wrong without a word: a table of situations, one a line.

A situation is a name, steps and an outcome. Steps are commands, or functions that prepare
something in a folder which holds (see `material`):

    song.wav  model/  other/  trained/  data/{train,valid,test}/<track>/*.wav  stem.mp4

The outcome is that of the last command: what it prints with exit code 0 (`OK`: whatever), or with
another one what its complaint says. A fourth
entry is a pattern of files that may change. Whatever happens, every complaint is one line, no
traceback is seen, no temporary file stays, all stems are finite, and no file changes that was not
written by these commands. A new situation is one more line in one of the lists below.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import filelock
import numpy as np
import pytest
import soundfile
import test
import torch
import torch.nn.functional as F
from conftest import FOLDER, InThisProcess, make_model, sdr, write_song
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import eval as evaluation
import model
import train
import utils

MAINS = {"test.py": test.main, "eval.py": evaluation.main, "train.py": train.main}
RATE = 8000
TONE = np.sin(np.arange(RATE)[:, None] * [0.1, 0.13]) * 0.3  # one second, (N, 2)
RNG = np.random.default_rng(0)
NOISE = RNG.uniform(-0.3, 0.3, (RATE, 2))

TEST = "test.py song.wav --model model --quiet"
EVAL = "eval.py --root data --model model --method mixture"
SIZE = "--nfft 256 --nhop 64 --hidden-size 8"
STEPS = "--seq-dur 0.2 --samples-per-track 1 --batch-size 2 --dry-run --quiet --device cpu"
TRAIN = f"train.py --root data {SIZE} {STEPS}"
GO_ON = "train.py --quiet --checkpoint"

OK = (0, "")


def fine(text):
    return 0, text


def refused(text):
    return 2, text


def partly(text):
    """Some of several files failed."""
    return 1, text


# -------------------------------------------------------------------------------- what prepares


def step(function):
    """Make `function(arguments)` a step, which runs in the situation's folder."""
    return lambda *args, **kwargs: functools.partial(function, *args, **kwargs)


@step
def put(path, audio=NOISE, rate=RATE, **form):
    """Write a sound file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    form.setdefault("format", "WAV")
    form.setdefault("subtype", "FLOAT")
    soundfile.write(path, audio, rate, **form)


@step
def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


@step
def edit(path, **changes):
    """Change a JSON file; None removes a key, a.b is a key within."""
    content = json.loads(Path(path).read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = functools.reduce(dict.__getitem__, outer, content)
        place.pop(last, None) if value is None else place.update({last: value})
    Path(path).write_text(json.dumps(content))


@step
def edit_weights(path, change):
    weights = torch.load(path)
    torch.save(change(weights), path)


@step
def cut(path, end):
    """Keep so many bytes, or such a part, of a file."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: end if isinstance(end, int) else int(end * len(content))])


@step
def damage(path, start=0.4, size=600):
    content = bytearray(Path(path).read_bytes())
    first = int(start * len(content))
    content[first : first + size] = bytes(
        random.Random(0).randbytes(len(content[first : first + size]))
    )
    Path(path).write_bytes(content)


@step
def patch_bytes(path, position, content):
    old = bytearray(Path(path).read_bytes())
    old[position : position + len(content)] = content
    Path(path).write_bytes(old)


@step
def copy(old, new):
    Path(new).parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if Path(old).is_dir() else shutil.copyfile)(old, new)


@step
def move(old, new):
    Path(new).parent.mkdir(parents=True, exist_ok=True)
    Path(old).rename(new)


@step
def remove(path):
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


@step
def folder(path):
    Path(path).mkdir(parents=True, exist_ok=True)


@step
def link(old, new, hard=False):
    Path(new).parent.mkdir(parents=True, exist_ok=True)
    os.link(old, new) if hard else Path(new).symlink_to(Path(old).absolute())


@step
def fifo(path):
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
    os.mkfifo(path)


@step
def encode(path, codec, audio=NOISE, rate=RATE, bit_rate=32000, **options):
    """Write a sound file with PyAV, which knows more formats than soundfile."""
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        stream.bit_rate = bit_rate
        kind = stream.codec_context.codec.audio_formats[0].name
        frame = av.AudioFrame.from_ndarray(audio.astype(np.float32).reshape(1, -1), "flt", "stereo")
        frame.rate, frame.pts = rate, 0
        for part in av.AudioResampler(kind, "stereo", rate).resample(frame):
            for packet in stream.encode(part):
                container.mux(packet)
        container.mux(stream.encode(None))


@step
def join(old, other, new):
    Path(new).write_bytes(Path(old).read_bytes() + Path(other).read_bytes())


@step
def environment(**values):
    os.environ.update(values)


@step
def replace(owner, name, value):
    """Replace something in the scripts, for this situation."""
    PATCHES.enter_context(utils.patched(owner, name, value))


@step
def fail(owner, name, error, when=lambda *arguments: True):
    """Let something in the scripts meet an error of the environment."""
    real = getattr(owner, name)

    def failing(*args, **kwargs):
        if when(*args):
            raise error
        return real(*args, **kwargs)

    PATCHES.enter_context(utils.patched(owner, name, failing))


@step
def change_while_read(path, change, turn=1):
    """Change a file when it is opened for reading for the n-th time."""
    real, seen = utils.AudioFile.blocks, itertools.count()

    def blocks(audio, *args, **kwargs):
        if audio.path.endswith(path) and next(seen) == turn:
            change()
        return real(audio, *args, **kwargs)

    PATCHES.enter_context(utils.patched(utils.AudioFile, "blocks", blocks))


@step
def print_into(kind):
    """Let the last command print into something that takes no more, or not every letter."""
    if kind == "nobody":
        read, end = os.pipe()
        os.close(read)
        STREAMS["stdout"] = open(end, "w")  # noqa: SIM115
    elif kind == "full":
        STREAMS["stdout"] = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    else:
        STREAMS["stdout"] = io.TextIOWrapper(io.BytesIO(), encoding=kind)


@step
def hold(lock_file, gives_way=False):
    """Be somebody else who writes there, to the situation's end or until the script waits for it."""
    Path(lock_file).parent.mkdir(parents=True, exist_ok=True)
    Path(lock_file).write_text("12345")
    file = os.open(lock_file, os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    PATCHES.callback(os.close, file)
    real = filelock.FileLock.acquire

    def acquire(lock, **kwargs):
        if gives_way and kwargs.get("blocking", True):
            fcntl.flock(file, fcntl.LOCK_UN)
        return real(lock, **kwargs)

    PATCHES.enter_context(utils.patched(filelock.FileLock, "acquire", acquire))


@step
def send(number, owner, name, turn=0):
    """Send a signal to the script when it calls something for the n-th time."""
    real, seen = getattr(owner, name), itertools.count()

    def sending(*args, **kwargs):
        if next(seen) == turn:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return real(*args, **kwargs)

    PATCHES.enter_context(utils.patched(owner, name, sending))


class May(str):
    """A command that may fail."""


PATCHES = contextlib.ExitStack()
STREAMS = {}


@step
def check(question):
    """Something that must be true of the folder now."""
    answer = question()
    assert answer, answer


def length(path):
    return soundfile.info(path).frames


def same(path, other):
    return Path(path).read_bytes() == Path(other).read_bytes()


# ----------------------------------------------------------------------------------- the tables

# fmt: off
OUT = "stems/song"
VOCALS = f"{OUT}/vocals.wav"
TRUE = "data/test/Test 0"
AGAIN = f"{TEST} --overwrite"
PAGE = f"{TEST} --html --plot"
MINE = b"what somebody else wrote"

OUTPUTS = [  # items 1 and 2: nothing that is read, or of others, is written
    ("true stems, eval --outdir", [f"{EVAL} --method model --outdir data"], refused("lies in the data")),
    ("true stems by a link", [link("data", "alias"), f"{EVAL} --method model --outdir alias"], refused("lies in the data")),
    ("true stems, relative", [f"{EVAL} --method model --outdir model/../data"], refused("lies in the data")),
    ("data, eval --evaldir", [f"{EVAL} --method model --evaldir data"], refused("lies in the data")),
    ("data, eval --evaldir below", [f"{EVAL} --evaldir data/test"], refused("lies in the data")),
    ("data, eval --csv", [f"{EVAL} --csv '{TRUE}/vocals.wav'"], refused("")),
    ("a new file among data, eval --csv", [f"{EVAL} --csv data/test/scores.csv"], refused("lies in the data")),
    ("any file, eval --csv", [f"{EVAL} --csv song.wav"], refused("was not written by this script")),
    ("a folder, eval --csv", [f"{EVAL} --csv model"], refused("model: ")),
    ("our own table again", [f"{EVAL} --csv a.csv", f"{EVAL} --csv a.csv"], OK),
    ("somebody's folder, eval --outdir", [write("kept/test/Test 0/vocals.wav", MINE), f"{EVAL} --method model --outdir kept"], refused("was not written by this script")),
    ("our own stems again, eval --outdir", [f"{EVAL} --method model --outdir kept", f"{EVAL} --method model --outdir kept --niter 2"], OK),
    ("somebody's JSON, eval --evaldir", [write("mine/mixture/test/Test 0.json", '{"a": 1}'), f"{EVAL} --evaldir mine"], refused("was not written by this script")),
    ("input, test.py in its folder", [move("song.wav", "vocals/vocals.wav"), "test.py vocals/vocals.wav --model model --outdir . --overwrite"], refused("is an input")),
    ("input, no --overwrite", [move("song.wav", "vocals/vocals.wav"), "test.py vocals/vocals.wav --model model --outdir ."], refused("is an input")),
    ("input by a link", [link("song.wav", VOCALS), AGAIN], refused("is an input")),
    ("input by a hard link", [link("song.wav", VOCALS, hard=True), AGAIN], refused("is an input")),
    ("input by a hard link, later in a notebook", [TEST, move("song.wav", "old.wav"), put("song.wav"), remove(VOCALS), link("song.wav", VOCALS, hard=True), AGAIN], refused("is an input")),
    ("another song of the batch", [copy("song.wav", "stems/a/vocals.wav"), copy("song.wav", "a.wav"), "test.py a.wav stems/a/vocals.wav --model model --overwrite"], partly("is an input")),
    ("somebody's stem", [write(VOCALS, MINE), TEST], refused("was not written by this script")),
    ("somebody's page", [write(f"{OUT}/index.html", MINE), PAGE], refused("was not written by this script")),
    ("somebody's picture", [write(f"{OUT}/spectrograms.png", MINE), PAGE], refused("was not written by this script")),
    ("somebody's record", [write(f"{OUT}/stems.json", '{"mine": 1}'), TEST], refused("was not written by this script")),
    ("a stem that was edited since", [TEST, put(VOCALS, TONE), PAGE], refused("was not written by this script")),
    ("a page that was edited since", [PAGE, write(f"{OUT}/index.html", MINE), PAGE], refused("was not written by this script")),
    ("a folder in a stem's place", [folder(VOCALS), AGAIN], refused("vocals.wav: ")),
    ("a file in the folder's place", [write(OUT, MINE), TEST], refused("song")),
    ("a file as --outdir", [f"{TEST} --outdir song.wav"], refused("song.wav")),
    ("what is beside the stems stays", [write(f"{OUT}/notes.txt", MINE), TEST, AGAIN, PAGE], OK),
    ("train --output is a file", [f"{TRAIN} --output song.wav"], refused("song.wav")),
    ("train --output is the data", [f"{TRAIN} --output data"], refused("data")),
    ("train --output is a track", [f"{TRAIN} --output 'data/train/Song 0'"], refused("Song 0")),
    ("somebody's vocals.png, train", [write("mine/vocals.png", MINE), f"{TRAIN} --output mine --overwrite"], refused("vocals.png")),
    ("somebody's vocals.json, train", [write("mine/vocals.json", MINE), f"{TRAIN} --output mine"], refused("vocals.json")),
    ("our own training again", [TRAIN, f"{TRAIN} --overwrite", TRAIN, check(lambda: Path("open-unmix/previous/1").is_dir()), TRAIN], OK),
    ("cache in the way", [copy("data", "cache"), copy("stem.mp4", "stems18/train/A.stem.mp4"), "train.py --root stems18 --cache cache"], refused("was not decoded from")),
]

KEPT = f"{OUT}: kept vocals, drums"
ANEW = f"{OUT}: made anew, because the record has another"
SECOND = "test.py b/song.wav --model model --quiet"
RECORDS = [  # item 5: outputs carry where they came from
    ("the same again", [TEST, TEST], fine(KEPT)),
    ("a page of what is kept", [TEST, PAGE, check(lambda: Path(OUT, "index.html").exists()), TEST], fine(KEPT)),
    ("another song of that name", [TEST, put("b/song.wav", TONE), SECOND], fine(f"{ANEW} input, stamp")),
    ("another song of that name, page", [PAGE, put("b/song.wav", TONE), f"{SECOND} --html"], fine(f"{ANEW} input, stamp")),
    ("the song was replaced", [TEST, put("song.wav", TONE), TEST], fine(f"{ANEW} stamp")),
    ("another model", [TEST, "test.py song.wav --model other --quiet"], fine(f"{ANEW} model")),
    ("other weights in the folder", [TEST, copy("other/vocals.pth", "model/vocals.pth"), TEST], fine(f"{ANEW} model")),
    ("another --niter", [TEST, f"{TEST} --niter 3"], fine(f"{ANEW} model")),
    ("--softmask", [TEST, f"{TEST} --softmask"], fine(f"{ANEW} model")),
    ("another --wiener-win-len", [TEST, f"{TEST} --wiener-win-len 7"], fine(f"{ANEW} model")),
    ("another --duration", [TEST, f"{TEST} --duration 0.2", check(lambda: length(VOCALS) == 1600), TEST], fine(f"{ANEW} settings")),
    ("another --start, with a picture", [TEST, f"{TEST} --start 0.3 --plot"], fine(f"{ANEW} settings")),
    ("other code", [TEST, replace(utils, "code_fingerprint", lambda: "changed"), TEST], fine(f"{ANEW} code")),
    ("another --aggregate", [TEST, f"""{TEST} --aggregate '{{"vocals": ["drums"]}}'"""], fine(f"{ANEW} settings")),
    ("a stem was removed", [TEST, remove(VOCALS), TEST], fine("of vocals.wav, missing or changed")),
    ("a stem was cut", [TEST, cut(VOCALS, 0.5), AGAIN], fine("made anew, because of --overwrite")),
    ("the record was damaged", [TEST, cut(f"{OUT}/stems.json", 0.5), AGAIN], OK),
    ("another format beside", [TEST, f"{TEST} --ext flac", check(lambda: Path(VOCALS).exists()), TEST], OK),
    ("scores: the same again", [EVAL, fail(evaluation, "tqdm", AssertionError()), EVAL], OK),
    ("scores: a true stem was replaced", [EVAL, put(f"{TRUE}/vocals.wav", NOISE), fail(evaluation, "score", OSError(errno.EIO, "tried")), EVAL], refused("tried")),
    ("scores: other code", [EVAL, replace(utils, "code_fingerprint", lambda: "changed"), fail(evaluation, "score", OSError(errno.EIO, "tried")), EVAL], refused("tried")),
    ("scores: other weights", [f"{EVAL} --method model", copy("other/vocals.pth", "model/vocals.pth"), fail(evaluation, "score", OSError(errno.EIO, "tried")), f"{EVAL} --method model"], refused("tried")),
    ("scores: another --niter", [f"{EVAL} --method model", fail(evaluation, "score", OSError(errno.EIO, "tried")), f"{EVAL} --method model --niter 2"], refused("tried")),
    ("scores: damaged", [EVAL, lambda: cut(next(Path("scores").rglob("Test 0.json")), 0.3)(), EVAL], OK),
    ("scores: two models of one name", [copy("model", "runs/a/m"), copy("other", "runs/b/m"), "eval.py --root data --model runs/a/m --method model", "eval.py --root data --model runs/b/m --method model", check(lambda: {path.name for path in Path("scores").iterdir()} == {"runs-a-m", "runs-b-m"}), EVAL], OK),
    ("somebody writes the song", [hold("stems/.song.lock", gives_way=True), TEST], fine("is writing this song: waiting for it"), "*.lock"),
    ("somebody trains the target", [hold("open-unmix/.vocals.lock"), TRAIN], refused("is writing the training of vocals; wait for it"), "*.lock"),
    ("somebody trains another target", [hold("open-unmix/.drums.lock"), TRAIN], OK, "*.lock"),
    ("somebody has died while writing", [write("stems/.song.lock", "12345"), TEST], OK, "*.lock"),
]

STEM_A, STEM_B = "stems18/train/A.stem.mp4", "stems18/train/B.stem.mp4"
SETS = [copy("stem.mp4", f"stems18/train/{name}.stem.mp4") for name in "ABCDEFGH"]
DECODE = f"train.py --root stems18 {SIZE} {STEPS}"
WAVS = "stems18-wav"
CACHE = [  # item 8: decoded stems belong to their source files
    ("decoded once", [*SETS, DECODE, fail(data, "decode_stem", AssertionError()), f"{DECODE} --overwrite"], OK),
    ("moved from train/ to test/", [*SETS, DECODE, move(STEM_B, "stems18/test/B.stem.mp4"), f"{DECODE} --overwrite", check(lambda: not Path(WAVS, "train", "B").exists()), f"{DECODE} --overwrite"], OK),
    ("removed", [*SETS, DECODE, remove(STEM_B), f"{DECODE} --overwrite", check(lambda: not Path(WAVS, "train", "B").exists()), f"{DECODE} --overwrite"], OK),
    ("replaced", [*SETS, DECODE, lambda: os.utime(STEM_B, (1, 1)), fail(data, "decode_stem", OSError(errno.EIO, "tried")), f"{DECODE} --overwrite"], refused("tried")),
    ("cut", [*SETS, cut(STEM_B, 0.6), DECODE], refused("B.stem.mp4")),
    ("no stem file", [*SETS, copy("song.wav", STEM_B), DECODE], refused("is not a stem file with five audio streams")),
    ("empty", [*SETS, write(STEM_B, b""), DECODE], refused("B.stem.mp4: is not a stem file")),
    ("the record of a cache is damaged", [*SETS, DECODE, write(f"{WAVS}/train/B/source.json", b"{"), f"{DECODE} --overwrite"], refused("source.json: is damaged")),
    ("the record of a cache is strange", [*SETS, DECODE, write(f"{WAVS}/train/B/source.json", b"[]"), f"{DECODE} --overwrite"], refused("source.json")),
]

FIX = f"{TRAIN} --dataset trackfolder_fix --interferer-files drums.wav"
TARGET_NAMES = [
    "keys",
    "train",
    "half",
    "bass.v2",
    "[lead] vocals",
    "forward",
    "weight",
    "a b",
    "'q\"",
    "ü😀",
    "-x",
    "%s{0}",
    "type",
    "x" * 190,
]
BAD_NAMES = [
    "separator",
    "mixture",
    "Separator",
    ".hidden",
    "..",
    "new\nline",
    "tab\there",
    "x" * 210,
    "a\\b",
]


def rename(name):
    """The data's vocals.wav under another name."""

    def prepare():
        for path in list(Path("data").rglob("vocals.wav")):
            path.rename(path.with_name(f"{name}.wav"))

    return prepare


NAMES = [  # items 4, 7 and 14: names are checked where they enter
    *((f"target {name[:20]!r}", [rename(name), f"{FIX} --target-file={shlex.quote(name)}.wav", f"test.py song.wav --model open-unmix --targets={shlex.quote(name)} --quiet", check(lambda name=name: Path(OUT, f"{name}.wav").exists()), "test.py song.wav --model open-unmix --quiet"], fine("kept")) for name in TARGET_NAMES if name[0] != "-"),
    *((f"target {name[:20]!r}", [f"{FIX} --target-file={shlex.quote(name)}.wav"], refused("can't be a name")) for name in BAD_NAMES if name not in ("..",)),
    *((f"--target {name[:20]!r}", [f"{TRAIN} --target={shlex.quote(name)}"], refused("can't be a name")) for name in [*BAD_NAMES, "a/b", "../x", "/x"]),
    *((f"--residual {name[:20]!r}", [f"{TEST} --residual={shlex.quote(name)}"], refused("can't be a name")) for name in [*BAD_NAMES, "a/b", "../x", "/x", ""]),
    *((f"--aggregate {name[:20]!r}", [f"{TEST} --aggregate {shlex.quote(json.dumps({name: ['vocals']}))}"], refused("can't be a name")) for name in [*BAD_NAMES, "a/b", "../x", "/x", ""]),
    *((f"--targets {name[:20]!r}", [f"{TEST} --targets={shlex.quote(name)}"], refused("can't be a name")) for name in ["../x", "separator", ""]),
    *((f"stem {name[:20]!r}", [f"{TEST} --aggregate {shlex.quote(json.dumps({name: ['vocals']}))}", check(lambda name=name: Path(OUT, f"{name}.wav").exists()), TEST], OK) for name in TARGET_NAMES),
    ("--residual is a target", [f"{TEST} --residual vocals"], refused("--residual vocals: a target has this name")),
    ("stems that differ in case only", [f"""{TEST} --aggregate '{{"A": ["vocals"], "a": ["drums"]}}'"""], refused("two stems would have one name")),
    ("an aggregate of the residual", [f"""{TEST} --residual rest --aggregate '{{"all": ["rest", "vocals"]}}'"""], OK),
    ("an aggregate of nobody", [f"""{TEST} --aggregate '{{"all": ["piano"]}}'"""], refused("--aggregate: unknown target 'piano'")),
    ("an aggregate twice", [f"""{TEST} --aggregate '{{"all": ["vocals", "vocals"]}}'"""], refused("all is to have a target twice")),
    *((f"--aggregate {text}", [f"{TEST} --aggregate {shlex.quote(text)}"], refused("--aggregate: ")) for text in ["", "x", "[]", "{}", "1", "null", '{"a": 1}', '{"a": []}', '{"a": "vocals"}', '{"a": [1]}', '{"a": [["vocals"]]}', '{"a": {}}']),
    ("two interferers of one name", [folder("x"), f"{FIX} --interferer-files drums.wav drums.wav"], refused("two sources would be called drums")),
    ("interferer is the target", [f"{TRAIN} --dataset trackfolder_fix --interferer-files vocals.wav"], refused("two sources would be called vocals")),
    ("a track's folder with a line break", [move("data/train/Song 0", "data/train/a\nb"), TRAIN], refused("can't be a name")),
]


def scores_of(**changes):
    """museval's JSON as somebody else hands it out."""
    frame = {"time": 0.0, "duration": 1.0, "metrics": dict.fromkeys(evaluation.METRICS, 1.0)}
    content = {"targets": [{"name": "vocals", "frames": [frame]}]}
    text = json.dumps(content)
    for old, new in changes.items():
        text = text.replace(
            *{
                "name": ('"vocals"', new),
                "sdr": ('"SDR": 1.0', f'"SDR": {new}'),
                "time": ('"time": 0.0', f'"time": {new}'),
                "all": (text, new),
            }[old]
        )
    return write("theirs/test/Test 0.json", text)


COMPARE = f"{EVAL} --compare theirs"
COMPARED = [  # item 14: JSON of others
    ("good", [scores_of(), COMPARE], OK),
    *((f"a target named {name}", [scores_of(name=json.dumps(name)), COMPARE], refused("can't be a name")) for name in ["../../../evil", "/tmp/evil", "a/b", "", ".x", "mixture", "new\nline"]),
    *((f"a target that is {name}", [scores_of(name=name), COMPARE], refused("theirs/test/Test 0.json")) for name in ["1", "null", "[]", "{}", "true"]),
    *((f"SDR {value}", [scores_of(sdr=value), COMPARE], OK) for value in ["NaN", "Infinity", "-Infinity", "null", "-1e30", "1"]),
    *((f"SDR {value}", [scores_of(sdr=value), COMPARE], refused("theirs/test/Test 0.json: is not museval's JSON")) for value in ['"x"', "[]", "{}"]),
    *((f"time {value}", [scores_of(time=value), COMPARE], refused("theirs/test/Test 0.json: is not museval's JSON")) for value in ['"x"', "[]", "{}"]),
    *((f"a file of {text}", [scores_of(all=text), COMPARE], refused("theirs/test/Test 0.json: is ")) for text in ["", "{", "[]", "{}", "1", "null", '{"targets": 1}', '{"targets": [1]}', '{"targets": [{}]}', '{"targets": [{"name": "a", "frames": [1]}]}', '{"targets": [{"name": "a", "frames": [{"time": 0, "metrics": {}}]}]}', "\x00"]),
    ("bytes that are no text", [write("theirs/test/Test 0.json", b"\xff\xfe\x00"), COMPARE], refused("theirs/test/Test 0.json: is damaged")),
    ("no such folder", [f"{EVAL} --compare nowhere"], refused("--compare nowhere: no museval JSON there")),
    ("the same folder twice", [scores_of(), f"{EVAL} --compare theirs theirs"], OK),
    ("our own scores of another model", ["eval.py --root data --model other --method model", f"{EVAL} --method model --compare scores/other"], OK),
    ("the scores that are to be written", [EVAL, f"{EVAL} --compare scores/model/mixture"], refused("lies in the data that is read")),
    ("alone, without data", [scores_of(), copy("theirs", "more"), "eval.py --method none --compare theirs more"], OK),
]

# -------------------------------------------------------------------------- sound, items 3, 6, 15

SOUNDFILES = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "ALAW"),
    ("WAV", "MS_ADPCM"),
    ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("CAF", "PCM_16"),
    ("AU", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
]
ENCODED = [
    ("m4a", "aac"),
    ("mp4", "aac"),
    ("mkv", "aac"),
    ("mp3", "libmp3lame"),
    ("wma", "wmav2"),
    ("avi", "mp2"),
    ("mka", "flac"),
    ("wav", "adpcm_ms"),
]


def make(kind, subtype):
    """A step that writes song.<kind> in a format, and the file's name."""
    name = f"song.{kind.lower()}"
    return name, put(name, NOISE, format=kind, subtype=subtype) if kind.isupper() else encode(
        name, subtype, rate=16000 if subtype == "mp2" else RATE
    )


def separated(name, seconds=1.0, slack=0.15):
    """Commands that separate a file, and check that stems have its length."""

    def right_length():
        info = soundfile.info(VOCALS)
        return abs(info.frames / info.samplerate - seconds) < slack

    return [
        f"test.py {name} --model model --quiet",
        check(right_length),
        f"test.py {name} --model model --quiet",
    ]


def formats():
    for kind, subtype in SOUNDFILES:
        name, prepare = make(kind, subtype)
        yield f"{kind} {subtype}", [prepare, *separated(name)], fine("kept")
        for part in (0.05, 0.5, 0.9):
            yield (
                f"{kind} {subtype} cut to {part}",
                [prepare, cut(name, part), f"test.py {name} --model model"],
                refused(f"{name}: "),
            )
    for kind, codec in ENCODED:
        name, prepare = make(kind, codec)
        seconds = 0.5 if codec == "mp2" else 1  # which has no 8 kHz
        yield f"{kind} {codec}", [prepare, *separated(name, seconds)], fine("kept")
        for part in (0.3, 0.6) if kind != "mp3" else ():  # an MP3 has no end
            yield (
                f"{kind} {codec} cut to {part}",
                [prepare, cut(name, part), f"test.py {name} --model model"],
                refused(f"{name}: "),
            )


def wav_header(size):
    """The size of a WAV's data as programs write it that do not know it yet."""
    return patch_bytes("song.wav", 40, size.to_bytes(4, "little"))


LONG = np.concatenate([NOISE * level for level in (1, 0.01, 1, 0.01, 1, 0.01)])  # variable rate


@step
def without_xing(path):
    """An MP3 of variable rate whose header does not say how long it is."""
    put(path, LONG, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="VARIABLE")()
    content = Path(path).read_bytes()
    start = content.index(b"Xing")
    Path(path).write_bytes(content[content.index(b"\xff\xe3", start) :])


SOUND = [
    *formats(),
    ("MP3 without Xing header", [encode("song.mp3", "libmp3lame", LONG, write_xing="0"), *separated("song.mp3", 6, 0.25)], fine("kept")),
    ("MP3 of variable rate, no Xing header", [without_xing("song.mp3"), *separated("song.mp3", 6, 0.25)], fine("kept")),
    ("MP3 of two files in one", [encode("a.mp3", "libmp3lame", rate=44100), join("a.mp3", "a.mp3", "song.mp3"), *separated("song.mp3", 2 * RATE / 44100)], fine("kept")),
    ("MP3 of two files in one, 8 kHz", [encode("a.mp3", "libmp3lame"), join("a.mp3", "a.mp3", "song.mp3"), *separated("song.mp3", 2, 0.3)], fine("kept")),
    ("Ogg of two files in one", [put("a.ogg", format="OGG", subtype="VORBIS"), put("b.ogg", TONE, format="OGG", subtype="VORBIS"), join("a.ogg", "b.ogg", "song.ogg"), *separated("song.ogg", 2, 0.3)], fine("kept")),
    ("Ogg with a damaged middle", [put("song.ogg", LONG, format="OGG", subtype="VORBIS"), damage("song.ogg"), "test.py song.ogg --model model"], refused("song.ogg: ")),
    ("FLAC with a damaged middle", [put("song.flac", format="FLAC", subtype="PCM_16"), damage("song.flac"), "test.py song.flac --model model"], refused("song.flac: ")),
    *((f"WAV from a pipe: data size {size:#x}", [put("song.wav", subtype="PCM_16"), wav_header(size), *separated("song.wav")], fine("kept")) for size in (0, 0x7FFFF000, 0xFFFFFFFF, 0x7FFFFFFF)),
    ("FLAC from a pipe", [put("song.flac", format="FLAC", subtype="PCM_16"), patch_bytes("song.flac", 21, b"\xf0\x00\x00\x00\x00"), *separated("song.flac")], fine("kept")),
    ("GSM", [put("song.wav", subtype="GSM610", rate=RATE, audio=NOISE[:, 0]), *separated("song.wav")], fine("kept")),
    ("a RIFF with nothing in it", [write("song.wav", b"RIFF\x04\x00\x00\x00WAVE"), TEST], refused("song.wav: ")),
    ("no samples", [put("song.wav", NOISE[:0]), TEST], refused("song.wav: contains no samples")),
    ("one sample", [put("song.wav", NOISE[:1]), TEST, check(lambda: length(VOCALS) == 1), TEST], fine("kept")),
    ("mono", [put("song.wav", NOISE[:, :1]), TEST, check(lambda: soundfile.info(VOCALS).channels == 1), TEST], fine("kept")),
    ("three channels", [put("song.wav", np.ones((900, 3))), TEST], refused("has 3 channels; mix it down")),
    ("six channels in FLAC", [put("song.flac", np.ones((900, 6)), format="FLAC", subtype="PCM_16"), "test.py song.flac --model model"], refused("has 6 channels; mix it down")),
    ("100 Hz", [put("song.wav", rate=100), TEST], refused("a sample rate of 100 Hz")),
    ("2 MHz", [put("song.wav", rate=2_000_000), TEST], refused("a sample rate of 2000000 Hz")),
    ("a rate without common divisor", [put("song.wav", rate=44_101), TEST], refused("44101 Hz can't be resampled to 8000 Hz")),
    ("text", [write("song.wav", "no audio " * 100), TEST], refused("is not audio that can be read")),
    ("nothing", [write("song.wav", b""), TEST], refused("song.wav: ")),
    ("zeros", [write("song.wav", bytes(5000)), TEST], refused("song.wav: ")),
    ("a picture", [write("song.png", b"\x89PNG\r\n\x1a\n" + bytes(100)), "test.py song.png --model model"], refused("song.png: ")),
    ("a playlist", [write("song.m3u8", "#EXTM3U\n#EXTINF:1,\nsong.wav\n#EXT-X-ENDLIST\n"), "test.py song.m3u8 --model model"], refused("song.m3u8: ")),
    ("a list to concatenate", [write("song.wav.txt", "ffconcat version 1.0\nfile song.wav\n"), "test.py song.wav.txt --model model"], refused("song.wav.txt: ")),
    ("a FIFO", [fifo("song.wav"), TEST], refused("song.wav: is not a regular file")),
    ("a device", ["test.py /dev/zero --model model"], refused("/dev/zero: is not a regular file")),
    ("a link to nothing", [remove("song.wav"), link("gone", "song.wav"), TEST], refused("song.wav: no such file")),
    ("an unfinished download", [copy("song.wav", "song.wav.part"), cut("song.wav", 1000), TEST], refused("song.wav: is truncated")),
]

HUGE_WEIGHTS = edit_weights(
    "model/vocals.pth", lambda weights: {**weights, "output_mean": weights["output_mean"] + 3e38}
)


def with_sample(value, subtype="FLOAT", path="song.wav"):
    audio = NOISE.copy()
    audio[4000, 1] = value
    return put(path, audio, subtype=subtype)


STEM_OF_DATA = "data/train/Song 1/vocals.wav"
FINITE = [  # item 9: finite in, finite out
    *((f"a sample of {value}", [with_sample(value), TEST], refused("song.wav: has NaN, infinite or absurdly loud samples (+60 dBFS) at 0.5 s")) for value in (1e30, -1e30, 1001, np.nan, np.inf, -np.inf)),
    *((f"a double of {value}", [with_sample(value, "DOUBLE"), TEST], refused("song.wav: has NaN, infinite or absurdly loud")) for value in (1e300, np.nan)),
    *((f"--ext {ext}", [with_sample(1e30), f"{TEST} --ext {ext}"], refused("absurdly loud")) for ext in ("mp3", "flac", "ogg")),
    *((f"--ext {ext}, peaks", [with_sample(20), f"{TEST} --ext {ext}"], OK) for ext in ("wav", "mp3", "flac", "ogg")),
    ("a subnormal sample", [with_sample(1e-42), TEST], OK),
    ("silence", [put("song.wav", 0 * NOISE), PAGE], OK),
    ("a constant", [put("song.wav", 0 * NOISE + 0.5), PAGE], OK),
    *((f"a stem of training with {value}", [with_sample(value, path=STEM_OF_DATA), f"{TRAIN} --samples-per-track 30 --seq-dur 0.8"], refused(STEM_OF_DATA)) for value in (np.nan, np.inf, 1e30)),
    *((f"a mixture of training with {value}", [with_sample(value, path="data/train/Song 1/mixture.wav"), TRAIN.replace("--dry-run", "--epochs 1")], refused("Song 1/mixture.wav")) for value in (np.nan, 1e30)),
    *((f"a true stem of scoring with {value}", [with_sample(value, path=f"{TRUE}/vocals.wav"), EVAL], refused(f"{TRUE}/vocals.wav")) for value in (np.nan, 1e30)),
    *((f"a weight that is {value}", [edit_weights("model/vocals.pth", lambda weights, value=value: {**weights, "fc1.weight": weights["fc1.weight"] * value}), TEST], refused("model/vocals.pth: fc1.weight has NaN or infinite values")) for value in (float("nan"), float("inf"))),
    ("weights that are huge", [HUGE_WEIGHTS, TEST], refused("the model makes NaN or infinite samples")),
    ("weights that are huge, scored", [HUGE_WEIGHTS, f"{EVAL} --method model"], refused("estimates are not finite")),
    ("nhop of 4096", [edit("model/separator.json", nhop=4096), TEST], refused("model/separator.json: nhop is more than half of nfft")),
    ("a rate that lets the loss explode", [TRAIN.replace("--dry-run", "--epochs 9").replace("--samples-per-track 1", "--samples-per-track 8") + " --lr 1e30"], refused("the best model is kept")),
    ("a target with NaN", [with_sample(np.nan, path="data/train/Song 0/vocals.wav"), f"{FIX} --samples-per-track 30 --seq-dur 0.8"], refused("Song 0/vocals.wav")),
]

CHANGES = {  # item 10: a file that changes between the passes
    "grows": lambda: put("song.wav", np.concatenate([NOISE, NOISE]))(),
    "shrinks": lambda: put("song.wav", NOISE[:3000])(),
    "is cut": lambda: cut("song.wav", 0.5)(),
    "becomes another": lambda: put("song.wav", TONE)(),
    "becomes text": lambda: write("song.wav", "text")(),
    "is removed": lambda: remove("song.wav")(),
    "becomes a folder": lambda: (remove("song.wav")(), folder("song.wav")()),
    "becomes a FIFO": lambda: fifo("song.wav")(),
}
CHANGED = [(f"{name}, pass {turn + 1}", [change_while_read("song.wav", change, turn), TEST], refused("song.wav: "), "song.wav") for name, change in CHANGES.items() for turn in (0, 1)]

# ---------------------------------------------------------------------------- model folders, item 13

NUMBERS = ["8000", None, True, [], {}, 0, -1, 1.5, 1e30, "NaN", 10**12]
TEXTS = [1, [], {}, True, 0.5, "x", "../blstm"]
JSON_FILES = ["", "{", "[]", "1", "null", '"x"', "{}", "[" * 9000, '{"sample_rate": NaN}']
SEPARATOR, RECORD = "model/separator.json", "model/vocals.json"
FOLDERS = [
    *((f"separator.json: {key} {value!r}", [edit(SEPARATOR, **{key: value}), TEST], refused(f"{SEPARATOR}: {key} ")) for key in ("sample_rate", "nfft", "nhop", "nb_channels") for value in NUMBERS),
    *((f"separator.json is {text[:9]!r}", [write(SEPARATOR, text), TEST], refused(SEPARATOR)) for text in JSON_FILES),
    *((f"vocals.json: {key} {value!r}", [edit(RECORD, **{f"network__{key}": value}), TEST], refused("model/vocals.")) for key in ("nb_bins", "max_bin", "hidden_size", "nb_channels") for value in NUMBERS if value is not None),
    *((f"vocals.json: nb_layers {value!r}", [edit(RECORD, network__nb_layers=value), TEST], refused("model/vocals.")) for value in NUMBERS if value is not None),
    *((f"vocals.json: {key} {value!r}", [edit(RECORD, **{f"network__{key}": value}), TEST], refused("")) for key in ("arch", "mask", "mask_start", "dropout", "unidirectional") for value in TEXTS if (key, value) not in (("unidirectional", True), ("mask_start", 0.5), ("dropout", 0.5))),
    *((f"vocals.json: {key} {value!r}", [edit(RECORD, **{f"network__{key}": value}), TEST], refused("")) for key, value in (("mask_start", 0.0), ("mask_start", 0), ("dropout", 1.0))),
    *((f"vocals.json: network is {value!r}", [edit(RECORD, network=value), TEST], refused("model/")) for value in ("x", 1, [], {}, ["arch"], True)),
    *((f"vocals.json: args is {value!r}", [edit(RECORD, network=None, args=value), TEST], refused("model/vocals.")) for value in ("x", 1, ["arch"], True)),
    *((f"vocals.json is {text[:9]!r}", [write(RECORD, text), TEST], refused(RECORD)) for text in JSON_FILES if text not in ("{}", "null", '{"sample_rate": NaN}')),
    ("hidden_size of another network", [edit(RECORD, network__hidden_size=16), TEST], refused("model/vocals.pth: does not fit its settings")),
    ("an option that the class does not take", [edit(RECORD, network__nb_heads=8), TEST], OK),
    ("weights: a list", [edit_weights("model/vocals.pth", lambda weights: list(weights.values())), TEST], refused("model/vocals.pth: holds no weights")),
    ("weights: a text in it", [edit_weights("model/vocals.pth", lambda weights: {**weights, "x": "y"}), TEST], refused("model/vocals.pth: holds no weights")),
    ("weights: one lacks", [edit_weights("model/vocals.pth", lambda weights: dict(list(weights.items())[1:])), TEST], refused("model/vocals.pth: does not fit")),
    ("weights: one too many", [edit_weights("model/vocals.pth", lambda weights: {**weights, "x": torch.zeros(1)}), TEST], refused("model/vocals.pth: does not fit")),
    ("weights: another shape", [edit_weights("model/vocals.pth", lambda weights: {**weights, "fc1.weight": torch.zeros(2, 2)}), TEST], refused("model/vocals.pth: does not fit")),
    ("weights: empty", [write("model/vocals.pth", b""), TEST], refused("model/vocals.pth: is damaged")),
    ("weights: text", [write("model/vocals.pth", "hello"), TEST], refused("model/vocals.pth: is damaged")),
    ("weights: cut", [cut("model/vocals.pth", 0.7), TEST], refused("model/vocals.pth: is damaged")),
    ("weights: they would run code", [lambda: torch.save({"x": Path("y")}, "model/vocals.pth"), TEST], refused("model/vocals.pth: is damaged")),
    ("no separator.json", [remove(SEPARATOR), TEST], refused("model: has no separator.json")),
    ("separator.json is a folder", [remove(SEPARATOR), folder(SEPARATOR), TEST], refused("model: has no separator.json")),
    ("vocals.pth is a folder", [remove("model/vocals.pth"), folder("model/vocals.pth"), TEST], refused("model")),
    ("no model", ["test.py song.wav --model nowhere"], refused("nowhere: no such model or folder")),
    ("no targets", [*(remove(f"model/{name}.pth") for name in ("vocals", "drums")), TEST], refused("model: has no target 'vocals'; it has none yet")),
    ("a file as model", ["test.py song.wav --model song.wav"], refused("song.wav: no such model or folder")),
    ("vocals_backing.pth is not vocals", [move("model/vocals.pth", "model/vocals_backing.pth"), f"{TEST} --targets vocals"], refused("model: has no target 'vocals'; it has drums")),
    ("vocals-old.pth is not vocals", [move("model/vocals.pth", "model/vocals-old.pth"), f"{TEST} --targets vocals"], refused("has no target 'vocals'")),
    ("a published name", [move("model/vocals.pth", "model/vocals-01234567.pth"), TEST], OK),
    ("a stray notes.json", [write("model/notes.json", '{"a": 1}'), TEST], OK),
    ("a stray text", [write("model/README", "x"), write("model/x.pth", "x"), TEST], OK),
    ("macOS's ._vocals.json", [write("model/._vocals.json", b"\0\5"), write("model/._vocals.pth", b"\0\5"), TEST], OK),
    ("a leftover .part", [write("model/.vocals.pth.1-a.x", "x"), TEST], OK),
    ("--targets piano", [f"{TEST} --targets piano"], refused("model: has no target 'piano'; it has vocals, drums")),
    ("published weights that cannot be fetched", ["test.py song.wav --model umxhq --quiet"], refused("try again, or fetch it by hand")),
    ("weights in torch's folder are checked", [write("home/hub/checkpoints/vocals-b62c91ce.pth", "x"), "test.py song.wav --model umxhq --quiet"], refused("try again, or fetch it by hand")),
    ("torch's folder is a file", [environment(TORCH_HOME="song.wav"), "test.py song.wav --model umxhq"], refused("song.wav")),
    ("torch's folder cannot be made", [environment(TORCH_HOME="/proc/nowhere"), "test.py song.wav --model umxhq"], refused("/proc/nowhere")),
    *((f"fine-tuning: {name}", [prepare, f"train.py --root data --model model {STEPS}"], refused("model")) for name, prepare in (("no weights", remove("model/vocals.pth")), ("other settings", edit(SEPARATOR, nfft=512)), ("cut weights", cut("model/vocals.pth", 0.5)), ("NaN", edit_weights("model/vocals.pth", lambda weights: {**weights, "fc1.weight": weights["fc1.weight"] * float("nan")})))),
]

CHECKPOINT = "trained/vocals.chkpnt"
TRAINING = [  # checkpoints, and data that training is given
    ("checkpoint: good", [f"{GO_ON} trained --epochs 3 --device cpu"], OK, "trained/*"),
    ("checkpoint: cut", [cut(CHECKPOINT, 0.8), f"{GO_ON} trained"], refused(f"{CHECKPOINT}: is damaged")),
    ("checkpoint: empty", [write(CHECKPOINT, b""), f"{GO_ON} trained"], refused(f"{CHECKPOINT}: is damaged")),
    ("checkpoint: weights only", [copy("trained/vocals.pth", CHECKPOINT), f"{GO_ON} trained"], refused(f"{CHECKPOINT}: is no checkpoint")),
    *((f"checkpoint: {value!r}", [edit_weights(CHECKPOINT, lambda _, value=value: value), f"{GO_ON} trained"], refused(f"{CHECKPOINT}: is no checkpoint")) for value in (None, [], 1, "x", {}, {"record": None}, {"record": {}})),
    *((f"checkpoint: {name}", [edit_weights(CHECKPOINT, change), f"{GO_ON} trained --epochs 3"], refused("")) for name, change in {"no states": lambda c: {**c, "state": {}}, "a state of another kind": lambda c: {**c, "state": {**c["state"], "network": {}}}, "a network that is text": lambda c: {**c, "record": {**c["record"], "network": "x"}}, "a network of another arch": lambda c: {**c, "record": {**c["record"], "network": {"arch": "gone"}}}, "epochs that are text": lambda c: {**c, "record": {**c["record"], "epochs_trained": "x"}}, "args that are text": lambda c: {**c, "record": {**c["record"], "args": "x"}}, "weights that are NaN": lambda c: {**c, "state": {**c["state"], "network": {k: v * float("nan") if v.is_floating_point() else v for k, v in c["state"]["network"].items()}}}}.items()),
    ("checkpoint: of a version that lacked a flag", [edit_weights(CHECKPOINT, lambda c: {**c, "record": {**c["record"], "args": {k: v for k, v in c["record"]["args"].items() if k != "tensorboard"}}}), f"{GO_ON} trained --epochs 3"], OK, "trained/*"),
    ("checkpoint: its data are gone", [move("data", "elsewhere"), f"{GO_ON} trained --epochs 3"], refused("data: no such folder")),
    ("checkpoint: its data are here now", [move("data", "elsewhere"), f"{GO_ON} trained --epochs 3 --root elsewhere --device cpu"], OK, "trained/*"),
    ("a stem is one sample short", [put("data/train/Song 1/vocals.wav", NOISE[:-1], subtype="PCM_16"), TRAIN], refused("Song 1/vocals.wav: has 7999 samples, its mixture 8000")),
    ("a stem is one sample long", [put("data/train/Song 1/vocals.wav", np.concatenate([NOISE, NOISE[:1]]), subtype="PCM_16"), TRAIN], refused("Song 1/vocals.wav: has 8001 samples, its mixture 8000")),
    ("a stem is a FIFO", [fifo(STEM_OF_DATA), TRAIN], refused("Song 1")),
    ("a stem is text", [write(STEM_OF_DATA, "text"), TRAIN], refused(f"{STEM_OF_DATA}: ")),
    ("a stem is cut", [cut(STEM_OF_DATA, 0.7), TRAIN], refused(f"{STEM_OF_DATA}: is truncated")),
    ("a stem lacks", [remove(STEM_OF_DATA), TRAIN], refused("data/train/Song 1: lacks vocals.wav")),
    ("a hidden copy", [copy(STEM_OF_DATA, "data/train/Song 1/._vocals.wav"), write("data/train/.DS_Store", "x"), TRAIN], OK),
    ("a hidden folder", [folder("data/train/.git"), TRAIN], OK),
    ("a file beside the tracks", [write("data/train/notes.txt", "x"), TRAIN], OK),
    ("24-bit WAV in 4-byte containers", [put("data/train/Song 1/vocals.wav", NOISE, subtype="PCM_24", format="WAVEX"), TRAIN], OK),
    ("one rate differs", [put("data/train/Song 1/vocals.wav", np.repeat(NOISE, 2, axis=0), rate=16000), TRAIN], OK),
    ("mono among stereo", [put("data/train/Song 1/vocals.wav", NOISE[:, :1]), TRAIN], OK),
    ("MP3 as WAV", [encode("song.mp3", "libmp3lame"), copy("song.mp3", "data/train/Song 1/vocals.wav"), TRAIN], fine("slow to read")),
    ("no training track", [remove("data/train"), TRAIN], refused("data/train: no track folder")),
    ("one track only", [remove("data/train/Song 1"), remove("data/train/Song 2"), TRAIN], refused("data/train: has 1 tracks, all for validation")),
    ("no such data", [TRAIN.replace("data", "nowhere")], refused("nowhere: no such folder")),
    ("a file as data", [TRAIN.replace("data", "song.wav")], refused("song.wav: no such folder")),
    ("input is the target", [copy("data/train/Song 1/vocals.wav", "x.wav"), f"{TRAIN} --dataset aligned --input-file vocals.wav"], refused("is the input, too")),
    ("--ext finds no interferer", [f"{TRAIN} --dataset trackfolder_var --ext .flac"], refused("no file *.flac to mix with vocals.wav; see --ext")),
    ("--target-file of another kind", [f"{TRAIN} --dataset trackfolder_var --target-file vocals.flac"], refused("no track folder with vocals.flac")),
    ("an empty source folder", [folder("data/train/vocals"), f"{TRAIN} --dataset sourcefolder"], refused("data/train/vocals: no files *.wav there")),
]

ESTIMATES = "eval.py --root data --method model --estimates"
SCORING = [  # item 11, and the data and estimates that scoring is given
    ("good", [EVAL], OK),
    ("a model", [f"{EVAL} --method model mixture share ibm irm irm2 phase mwf"], OK),
    ("antiphase but for rounding", [put(f"{TRUE}/vocals.wav", np.stack([NOISE[:, 0], -NOISE[:, 0]], 1), subtype="PCM_16"), EVAL], OK),
    ("one source is silent", [put(f"{TRUE}/vocals.wav", 0 * NOISE), EVAL], fine("vocals is silent throughout")),
    ("all sources are silent", [*(put(f"{TRUE}/{name}.wav", 0 * NOISE) for name in (*utils.SOURCES, "mixture")), EVAL], refused("no scores")),
    ("identical sources", [copy(f"{TRUE}/drums.wav", f"{TRUE}/bass.wav"), EVAL], OK),
    ("some tracks fail", [copy(TRUE, "data/test/Test 1"), with_sample(np.nan, path="data/test/Test 1/vocals.wav"), EVAL], partly("Test 1/vocals.wav: has NaN")),
    ("all tracks fail", [with_sample(np.nan, path=f"{TRUE}/vocals.wav"), EVAL], refused("Test 0/vocals.wav: has NaN")),
    ("a stem is short", [put(f"{TRUE}/vocals.wav", NOISE[:-1]), EVAL], refused("Test 0/vocals.wav: has 7999 samples")),
    ("a stem lacks", [remove(f"{TRUE}/vocals.wav"), EVAL], refused("data/test: no track folder with")),
    ("no test part", [remove("data/test"), EVAL], refused("data/test: no track folder")),
    ("estimates: good", [copy("data/test", "est/test"), f"{ESTIMATES} est"], OK),
    ("estimates: short", [copy("data/test", "est/test"), put("est/test/Test 0/vocals.wav", NOISE[:-1]), f"{ESTIMATES} est"], refused("est/test/Test 0/vocals.wav: has 8000 Hz")),
    ("estimates: another rate", [copy("data/test", "est/test"), put("est/test/Test 0/vocals.wav", rate=16000), f"{ESTIMATES} est"], refused("est/test/Test 0/vocals.wav: has 16000 Hz")),
    ("estimates: NaN", [copy("data/test", "est/test"), with_sample(np.nan, path="est/test/Test 0/vocals.wav"), f"{ESTIMATES} est"], refused("est/test/Test 0/vocals.wav: has NaN")),
    ("estimates: silent", [copy("data/test", "est/test"), put("est/test/Test 0/vocals.wav", 0 * NOISE), f"{ESTIMATES} est"], refused("is silent throughout")),
    ("estimates: text", [copy("data/test", "est/test"), write("est/test/Test 0/vocals.wav", "x"), f"{ESTIMATES} est"], refused("est/test/Test 0/vocals.wav: ")),
    ("estimates: one lacks in a track", [copy("data/test", "est/test"), copy(TRUE, "data/test/Test 1"), folder("est/test/Test 1"), f"{ESTIMATES} est"], partly("Test 1")),
    ("estimates: none", [folder("est"), f"{ESTIMATES} est"], refused("no stems there")),
    ("estimates: a stray file", [copy("data/test", "est/test"), write("est/test/Test 0/notes.wav", "x"), f"{ESTIMATES} est"], OK),
    ("a source that the data has not", [f"""{EVAL} --aggregate '{{"x": ["piano"]}}'"""], refused("piano")),
    ("nothing to do", [f"{EVAL} --method none"], refused("--method none: leaves nothing to do")),
]

# ------------------------------------------------------------------------- the environment, item 12

ERRORS = {
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "input/output": OSError(errno.EIO, "Input/output error"),
    "too many files": OSError(errno.EMFILE, "Too many open files"),
    "out of memory": MemoryError(),
    "allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
}
BATCH = "test.py a.wav b.wav c.wav --model model --quiet"
THREE = [put(f"{name}.wav", TONE) for name in "abc"]
SECOND_FAILS = {"when": lambda audio, *rest: audio.path.endswith("b.wav")}
DEFECTS = {name: kind("a mistake of ours") for name, kind in (("TypeError", TypeError), ("ValueError", ValueError), ("KeyError", KeyError), ("RuntimeError", RuntimeError), ("AssertionError", AssertionError))}
ENVIRONMENT = [
    *((f"reading: {name}", [fail(utils.AudioFile, "blocks", error), TEST], refused("error: ")) for name, error in ERRORS.items()),
    *((f"renaming: {name}", [fail(os, "replace", error), TEST], refused("error: ")) for name, error in ERRORS.items()),
    *((f"training: {name}", [fail(F, "mse_loss", error), TRAIN], refused("error: ")) for name, error in ERRORS.items()),
    *((f"scoring: {name}", [fail(evaluation, "score", error), EVAL], refused("error: ")) for name, error in ERRORS.items()),
    *((f"one of a batch: {name}", [*THREE, fail(utils.AudioFile, "blocks", error, **SECOND_FAILS), BATCH], partly("1 of 3 files failed: b.wav")) for name, error in ERRORS.items()),
    *((f"separation, our own {name}", [fail(test, "separate", error), TEST], error) for name, error in DEFECTS.items()),
    *((f"training, our own {name}", [fail(F, "mse_loss", error), TRAIN], error) for name, error in DEFECTS.items()),
    *((f"scoring, our own {name}", [fail(evaluation, "score", error), EVAL], error) for name, error in DEFECTS.items()),
    ("nobody reads on, test", [*THREE, print_into("nobody"), BATCH], (141, "")),
    ("nobody reads on, eval", [print_into("nobody"), EVAL], (141, "")),
    ("nobody reads on, train", [print_into("nobody"), TRAIN.replace("--quiet", "")], (141, "")),
    ("output is full, test", [print_into("full"), TEST], refused("No space left on device")),
    ("output is full, eval", [print_into("full"), EVAL], refused("No space left on device")),
    ("output is full, train", [print_into("full"), TRAIN], refused("No space left on device")),
    *((f"output in {code}", [put("ü😀.wav"), print_into(code), "test.py ü😀.wav --model model --html --plot"], OK) for code in ("ascii", "latin-1", "utf-16")),
    ("output in ascii, train", [print_into("ascii"), f"{TRAIN} --output ü😀"], OK),
    ("output in ascii, a complaint", [print_into("ascii"), "test.py ü😀.wav --model model"], refused("no such file")),
    ("a name of 200 characters", [put("x" * 200 + ".wav"), f"test.py {'x' * 200}.wav --model model --html --plot"], OK),
    ("a name of 251 characters", [put("x" * 251 + ".wav"), f"test.py {'x' * 251}.wav --model model"], OK),
    ("a name of 300 characters", [f"test.py {'x' * 300}.wav --model model"], refused("name too long")),
    ("--outdir of 300 characters", [f"{TEST} --outdir {'x' * 300}"], refused("name too long")),
    ("--output of 300 characters", [f"{TRAIN} --output {'x' * 300}"], refused("name too long")),
    ("--evaldir of 300 characters", [f"{EVAL} --evaldir {'x' * 300}"], refused("name too long")),
    ("a name that is no text", [lambda: os.rename(b"song.wav", b"s\xff.wav"), folder("x"), "test.py . --model model --quiet --outdir x"], OK),
    ("a name that is no text, complained of", [lambda: os.rename(b"song.wav", b"s\xff.wav"), lambda: Path(os.fsdecode(b"s\xff.wav")).write_text("x"), "test.py s*.wav --model model"], refused("is not audio")),
    ("a folder that is no text", [lambda: os.mkdir(b"d\xff"), lambda: os.rename(b"song.wav", b"d\xff/song.wav"), "test.py */song.wav --model model --quiet"], OK),
    *((f"--outdir {path}", [f"{TEST} --outdir {path}"], refused(path)) for path in ("/proc/x", "/dev/null", "/dev/null/x", "song.wav/x")),
    *((f"--output {path}", [f"{TRAIN} --output {path}"], refused(path)) for path in ("/proc/x", "/dev/null", "/dev/null/x", "song.wav/x")),
    *((f"--evaldir {path}", [f"{EVAL} --evaldir {path}"], refused(path)) for path in ("/proc/x", "/dev/null/x", "song.wav/x")),
    *((f"--csv {path}", [f"{EVAL} --csv {path}"], refused(path)) for path in ("/proc/x", "song.wav/x")),
    ("no HOME", [environment(HOME="/proc/nowhere"), TEST], OK),
    ("nothing found", ["test.py 'nothing*.wav' --model model"], refused("no audio files there")),
    ("an empty folder", [folder("empty"), "test.py empty --model model"], refused("no audio files there")),
    ("all of a batch fail", [write("a.wav", "x"), write("b.wav", "x"), "test.py a.wav b.wav --model model"], refused("2 of 2 files failed")),
    ("two songs of one name", [put("a/song.wav"), put("b/song.wav"), "test.py a/song.wav b/song.wav --model model --quiet", check(lambda: Path("stems/a/song").is_dir()), "test.py a/song.wav b/song.wav --model model --quiet"], OK),
]

PLACES = {
    TEST: (test, "resample_blocks"),
    EVAL: (evaluation, "oracle"),
    TRAIN: (F, "mse_loss"),
}
SIGNALS = [  # item 3: ended in order, without leftovers, and the same command goes on
    *((f"{signal.Signals(number).name}, {command.split()[0]}", [send(number, *place), command], (128 + number, "")) for command, place in PLACES.items() for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
    *((f"{command.split()[0]} goes on", [send(signal.SIGTERM, *place), May(command), command.replace(STEPS, f"{STEPS} --overwrite")], OK) for command, place in PLACES.items()),
    *((f"while a file is written, {command.split()[0]}", [send(signal.SIGTERM, os, "replace"), command], (143, "")) for command in PLACES),
]

HOSTILE = [
    "a b.wav",
    "quote'\".wav",
    "ünï😀.wav",
    "new\nline.wav",
    "-dash.wav",
    "...wav",
    "%s{0}.wav",
    "$(touch x).wav",
    "a.b.c.wav",
    "UP.WAV",
    " .wav",
    "</script>.wav",
    "~.wav",
    "a*[b]?.wav",
    "\x1b[31mred.wav",
]
SONG_NAMES = [
    *((f"{name!r}", [put(f"songs/{name}"), f"test.py --model model --html --plot -- {shlex.quote(f'songs/{name}')}", "test.py songs --model model --outdir again --quiet", lambda: os.chdir("songs"), f"test.py --model ../model --outdir ../third -- {shlex.quote(name)}", lambda: os.chdir("..")], OK) for name in HOSTILE),
]

# --------------------------------------------------------------------------------- odd values of flags

ODD = ["", "x", "-1", "0", "nan", "1e400", "99999999999999999999", "é", "[]", "../x", "/", "1.5"]
ANY = None  # success, or one line and code 2
HUGE = {"--niter", "--seq-dur", "--nb-workers", "--hidden-size", "--nfft", "--samples-per-track", "--workers", "--nhop"}  # the machine's limits are not ours
FLAGS = {
    TEST: "--niter --wiener-win-len --start --duration --targets --residual --model --device --ext --wiener --outdir",
    TRAIN: "--seq-dur --samples-per-track --nb-workers --hidden-size --nfft --nhop --bandwidth --nb-channels --lr --weight-decay --patience --lr-decay-patience --lr-decay-gamma --seed --batch-size --epochs --target --source-augmentations --model --checkpoint --arch --arch-options --mask --mask-start --dropout --schedule --preset --sample-rate --device --dataset",
    f"{TRAIN} --dataset trackfolder_var": "--target-file --ext",
    f"{TRAIN} --dataset trackfolder_fix": "--target-file --interferer-files",
    f"{TRAIN} --dataset sourcefolder": "--target-dir --interferer-dirs --ext",
    f"{TRAIN} --dataset aligned": "--input-file --output-file",
    EVAL: "--subset --method --estimates --compare --workers --engine --root --targets --dataset --niter",
}
ODD_FLAGS = [(f"{command.split()[0]} {flag}={value}", [f"{command} {flag}={shlex.quote(value)}"], ANY) for command, flags in FLAGS.items() for flag in flags.split() for value in ODD if not (flag in HUGE and value == "99999999999999999999")]

# fmt: on

TABLES = {
    "outputs": OUTPUTS,
    "records": RECORDS,
    "cache": CACHE,
    "names": NAMES,
    "compared": COMPARED,
    "sound": SOUND,
    "finite": FINITE,
    "changed": CHANGED,
    "folders": FOLDERS,
    "training": TRAINING,
    "scoring": SCORING,
    "environment": ENVIRONMENT,
    "signals": SIGNALS,
    "song names": SONG_NAMES,
    "odd flags": ODD_FLAGS,
}


def situations():
    """All rows, as pytest's parameters: (steps, outcome, pattern of files that may change)."""
    for table, rows in TABLES.items():
        for name, steps, outcome, *changed in rows:
            name = f"{table}: {name}".encode("unicode_escape").decode()
            yield pytest.param(steps, outcome, *(changed or ["-"]), id=name)


# ------------------------------------------------------------------------------------- the machinery


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What each situation's folder begins with."""
    folder = tmp_path_factory.mktemp("material")
    for n in range(3):
        write_song(folder / "data" / "train" / f"Song {n}", 1, rate=RATE, seed=n)
    write_song(folder / "data" / "valid" / "Song 3", 1, rate=RATE, seed=3)
    write_song(folder / "data" / "test" / "Test 0", 1, rate=RATE, seed=4)
    shape = dict(targets=("vocals", "drums"), hidden_size=8, sample_rate=RATE, nfft=256)
    make_model(folder / "model", **shape)
    make_model(folder / "other", seed=9, **shape)
    soundfile.write(folder / "song.wav", NOISE, RATE, "PCM_16")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "plot_curves", lambda *_: None)
        train.main(["--output", "trained", *shlex.split(TRAIN)[1:], "--epochs", "2"])
        begun = torch.load(CHECKPOINT)  # one batch is enough here, though it is not to go on from
        begun["record"]["args"]["dry_run"] = False
        torch.save(begun, CHECKPOINT)
    for path in (folder / "trained").glob(".*"):
        path.unlink()
    with av.open(str(folder / "stem.mp4"), "w") as container:
        streams = [container.add_stream("aac", rate=44100, layout="stereo") for _ in range(5)]
        for number, stream in enumerate(streams):
            tone = np.sin(np.arange(22050) * 0.05 * (number + 1)).astype(np.float32) * 0.2
            frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), "fltp", "stereo")
            frame.rate, frame.pts = 44100, 0
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
    return folder


def tree(folder):
    """Every file below a folder and its content, or where a link leads."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in [*names, *(f for f in folders if os.path.islink(os.path.join(place, f)))]:
            path = os.path.join(place, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                found[path] = hashlib.md5(Path(path).read_bytes()).digest()
    return found


def run_command(command, stdout):
    """Run a command in this process: (exit code, what it complains of)."""
    script, *arguments = shlex.split(command)
    complaint = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(complaint):
        try:
            utils.run(lambda: MAINS[script](arguments))
        except SystemExit as end:
            return end.code or 0, complaint.getvalue().replace("\r", "\n")


def play(steps, folder):
    """Run the steps of a situation; returns (exit code, stdout, complaint) of the last command."""
    ours, result, may = set(), None, False
    STREAMS.clear()
    for step in steps:
        if not isinstance(step, str):
            step()
            continue
        assert result is None or result[0] == 0 or may, (step, result)
        may = type(step) is May
        before, stdout = tree(folder), STREAMS.pop("stdout", None) or io.StringIO()
        code, complaint = run_command(step, stdout)
        after = tree(folder)
        lost = [path for path in before if path not in ours and after.get(path) != before[path]]
        ours |= after.keys() - before.keys()
        result = code, stdout.getvalue() if type(stdout) is io.StringIO else "", complaint, lost
        assert not [path for path in after if path.endswith(".part") and path not in before]
    for path in ours:
        if path.endswith(".wav") and "/stems/" in path and os.path.isfile(path):
            assert np.isfinite(soundfile.read(path)[0]).all()
    return result


def save_nothing(picture, path):
    with utils.atomic_write(path) as temporary:
        temporary.write_text("a picture, which would take most of the time to draw")


@pytest.fixture()
def place(material, tmp_path, monkeypatch):
    """A folder with the material, in which a situation is played."""
    folder = tmp_path / "here"
    shutil.copytree(material, folder)
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.getsignal(number))
        stack.callback(PATCHES.close)
        monkeypatch.chdir(folder)
        for name, value in {"HOME": tmp_path, "TORCH_HOME": folder / "home"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("MUSDB_PATH", raising=False)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        monkeypatch.setattr(model, "ZENODO", "http://127.0.0.1:9/{record}/{name}.pth")
        monkeypatch.setattr(evaluation, "ProcessPoolExecutor", InThisProcess)
        monkeypatch.setattr(evaluation, "DELAYS", 16)  # 512 would take a second for each track
        monkeypatch.setattr(utils, "save_figure", save_nothing)
        monkeypatch.setattr(train, "save_figure", save_nothing)
        sample = data.musdb_settings() | {"sample-url": "http://127.0.0.1:9/x.zip"}
        monkeypatch.setattr(data, "musdb_settings", lambda: sample)
        yield folder


@pytest.mark.parametrize("steps,outcome,changed", list(situations()))
def test_situation(steps, outcome, changed, place):
    if isinstance(outcome, Exception):  # a mistake of ours ends in a full traceback
        with pytest.raises(type(outcome), match="a mistake of ours"):
            play(steps, place)
        return
    code, printed, complaint, lost = play(steps, place)
    lines = complaint.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert not [path for path in lost if not Path(path).relative_to(place).match(changed)]
    assert "Traceback" not in complaint and (code in (0, 1, 2) or code > 128), complaint
    assert bool(errors) == (code in (1, 2)), complaint
    assert all(error.isprintable() for error in errors)
    if outcome is not None:
        assert (code, outcome[1] in printed + complaint) == (outcome[0], True), printed + complaint


# ------------------------------------------------------------------- properties, and two processes

MANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def well_behaved(command, folder, kept=()):
    """Run a command that may fail, but only in one line, and without touching what was there."""
    before = tree(folder)
    code, complaint = run_command(command, io.StringIO())
    errors = [line for line in complaint.splitlines() if line.startswith("error: ")]
    after = tree(folder)
    assert code in (0, 1, 2) and bool(errors) == (code > 0), complaint
    assert all(error.isprintable() for error in errors), errors
    assert not [path for path in after if path.endswith(".part")]
    ours = ("stems", "scores", "open-unmix")
    changed = [path for path in before if after.get(path) != before[path]]
    new = after.keys() - before.keys()
    outside = [
        path for path in {*changed, *new} if Path(path).relative_to(folder).parts[0] not in ours
    ]
    assert not outside, outside
    return code


LIKELY = st.sampled_from(
    ["vocals", "x", "", "a/b", "..", "nan", 0, 1, -1, 2, 0.5, 1e300, None, True]
)
JSON = st.recursive(
    LIKELY | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["args", "network", "arch", "nhop", "files", "targets", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw, content):
    """A JSON value with something in it replaced, or removed, by chance."""
    if isinstance(content, dict) and content and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(content)))
        if not draw(st.integers(0, 9)):
            return {key: value for key, value in content.items() if key != name}
        return {**content, name: draw(mutated(content[name]))}
    if isinstance(content, list) and content and draw(st.integers(0, 9)):
        index = draw(st.integers(0, len(content) - 1))
        return [*content[:index], draw(mutated(content[index])), *content[index + 1 :]]
    return draw(JSON)


JSON_OF = {  # what reads a JSON file, and how the file comes to be
    "model/separator.json": (TEST, []),
    "model/vocals.json": (TEST, []),
    "stems/song/stems.json": (TEST, [TEST]),
    "scores/model/mixture/test/Test 0.json": (EVAL, [EVAL]),
    "theirs/test/Test 0.json": (COMPARE, [EVAL, scores_of()]),
}


@pytest.mark.parametrize("path", JSON_OF)
def test_any_json(path, place):
    command, before = JSON_OF[path]
    if before:
        play(before, place) if isinstance(before[-1], str) else (
            play(before[:1], place),
            before[1](),
        )
    good = json.loads(Path(path).read_text())
    codes = []

    @settings(MANY, max_examples=60 if "model" in path else 30)
    @given(mutated(good))
    def with_content(content):
        Path(path).write_text(json.dumps(content))
        codes.append(well_behaved(command, place))

    with_content()
    assert len(codes) >= 25


@pytest.mark.parametrize("name", ["separator.json", "vocals.json", "vocals.pth"])
def test_any_bytes_in_a_model(name, place):
    good = Path("model", name).read_bytes()
    codes = []

    @MANY
    @given(st.integers(0, len(good) - 1), st.integers(0, 7), st.booleans())
    def with_bytes(position, bit, cut):
        flipped = bytearray(good)
        flipped[position] ^= 1 << bit
        Path("model", name).write_bytes(good[:position] if cut else flipped)
        codes.append(well_behaved(f"{AGAIN}", place))

    with_bytes()
    assert codes.count(2) > 15


NOISY = pytest.mark.xfail(strict=True, reason="soundfile, given a file object, prints a traceback")
HEADERS = [pytest.param(*form, marks=[NOISY] if "W64" in form else []) for form in SOUNDFILES]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind,subtype", HEADERS)
def test_any_bytes_in_a_header(kind, subtype, place):
    """One bit of the first bytes is another, or the file ends there."""
    name, prepare = make(kind, subtype)
    prepare()
    good = Path(name).read_bytes()

    @settings(MANY, max_examples=20)
    @given(st.integers(0, 120), st.integers(0, 7), st.integers(0, 3))
    def with_bytes(position, bit, cut):
        flipped = bytearray(good)
        flipped[position] ^= 1 << bit
        Path(name).write_bytes(flipped if cut else good[:position])
        well_behaved(f"test.py {name} --model model --quiet --overwrite --duration 0.3", place)

    with_bytes()


FREE_TEXT = [
    "--aggregate",
    "--residual",
    "--targets",
    "--model",
    "--start",
    "--duration",
    "--device",
]


@pytest.mark.parametrize("flag", FREE_TEXT)
def test_any_text_of_a_flag(flag, place):
    sums = st.dictionaries(st.text(max_size=4), st.just(["vocals"]), max_size=2).map(json.dumps)

    @settings(MANY, max_examples=25)
    @given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8) | sums)
    def with_text(text):
        well_behaved(f"{AGAIN} {shlex.quote(f'{flag}={text}')}", place)

    with_text()


# each is forked from one that has imported torch already
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "soundfile", "av"])
SEPARATE = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import test, utils
os.chdir({folder!r})
os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), os.dup2(1, 2)
test.torch.set_num_threads(1)
real = test.separate
test.separate = lambda *args: (real(*args), time.sleep({patience}))
utils.run(lambda: test.main({arguments!r}))
"""


def start(folder, arguments, patience=0):
    """`python test.py ...` in a process of its own, which takes its time."""
    given = dict(scripts=str(FOLDER), folder=str(folder), arguments=arguments, patience=patience)
    code = SEPARATE.format(**given)
    process = PROCESSES.Process(target=exec, args=(code, {"__name__": "started"}))
    process.start()
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_on_one_song(number, place):
    """Item 2: two models separate one song into one folder; one process is ended half-way.

    The other's stems are whole, and all its own.
    """
    for name in ("model", "other"):
        alone = ["song.wav", "--model", name, "--outdir", f"alone-{name}", "--quiet"]
        test.main(alone)
    arguments = ["song.wav", "--quiet", "--model"]
    first = start(place, [*arguments, "model"], patience=60)
    while not list(Path("stems").glob("song/.*.part")):
        assert first.exitcode is None
        time.sleep(0.01)
    second = start(place, [*arguments, "other"])
    while "waiting" not in Path("log").read_text():
        assert second.exitcode is None, Path("log").read_text()
        time.sleep(0.01)
    os.kill(first.pid, number)
    second.join(60)
    first.join(60)
    assert (first.exitcode, second.exitcode) == (-9 if number == signal.SIGKILL else 143, 0)
    for stem in ("vocals", "drums"):
        found, expected = (
            soundfile.read(f"{folder}/song/{stem}.wav")[0] for folder in ("stems", "alone-other")
        )
        assert sdr(expected, found) > 100
        assert sdr(soundfile.read(f"alone-model/song/{stem}.wav")[0], found) < 60


AT_EXIT = """
import atexit, os, time, utils
atexit.register(lambda: (os.kill(os.getpid(), {number}), time.sleep(0.1)))
utils.run(lambda: 0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_a_process_that_is_ending(number):
    """torchrun sends SIGTERM to what is left of a job: no traceback, whenever it comes."""
    command = [sys.executable, "-c", AT_EXIT.format(number=int(number))]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, -number)
