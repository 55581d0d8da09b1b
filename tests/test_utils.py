"""utils.py: command lines, devices, files, downloads, and sound that is believed once decoded."""

import errno
import hashlib
import io
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import FOLDER, sdr

import utils
from utils import AudioFile, Parser, UserError, atomic_write, check_output, download, identities
from utils import load, number, only_writer, resample, resample_blocks, save, select_device

# --------------------------------------------------------------------------------- command lines


def parser():
    result = Parser("what it does")
    result.add_argument("--size", type=number(int, 1, 9), default=3, help="how many")
    result.add_argument("--rate", type=number(float, 0.5), help="how fast")
    result.add_argument("--quick", action="store_true", help="hurry")
    result.add_argument("--name", type=utils.name)
    return result


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--size", "0"], "--size: 0 is out of range (1 to 9)"),
        (["--size", "x"], "--size: invalid int value: 'x'"),
        (["--rate", "nan"], "--rate: nan is out of range (0.5 to inf)"),
        (["--siz", "4"], "unrecognized arguments: --siz 4"),
        (["--size"], "--size: expected one argument"),
        (["--name", "a/b"], "--name: 'a/b' can't be a name"),
    ],
)
def test_bad_command_lines(arguments, message):
    with pytest.raises(UserError) as caught:
        parser().parse_args(arguments)
    assert message in str(caught.value) and "--help explains every flag" in str(caught.value)


def test_flags_given_by_hand():
    assert parser().parse_args([]).size == 3
    given = parser().given(["--size=3", "--quick", "--rate", "-1"])
    assert given == {"size", "quick", "rate"}


def test_help_shows_defaults_that_say_something():
    text = parser().format_help()
    assert "how many (default: 3)" in text and "None" not in text and "False" not in text


def test_names():
    for good in ("vocals", "bass.v2", "[lead] vocals", "音楽", "train", "a" * 200, "ä b"):
        assert utils.check_name(good, "target") == good
    bad = ["", " ", ".", "..", ". .", "a/b", "\\", "../x", ".hidden", "a\nb", "\x7f", "a" * 201]
    for name in [*bad, "é" * 101, "mixture", "Separator", None, 3, ["a"]]:
        with pytest.raises(UserError, match=r"x\.json: target .* can't be a name"):
            utils.check_name(name, "x.json: target")
    assert utils.check_name("mixture", "track", reserved=()) == "mixture"


# --------------------------------------------------------------------------------- how scripts end


def ends(main):
    """The exit code that `run` gives a main."""
    with pytest.raises(SystemExit) as caught:
        utils.run(main)
    return caught.value.code


def raising(error):
    def main():
        raise error

    return main


FULL = OSError(errno.ENOSPC, "No space left on device", "x.wav")
ENDS = [
    (UserError("a\nb\x1b[31m"), 2, "error: a\\nb\\x1b[31m\n"),
    (UserError("Caught UserError: x.wav: is bad\n"), 2, "error: x.wav: is bad\n"),
    (FULL, 2, "error: x.wav: No space left on device; mend that or choose another folder\n"),
    (MemoryError("8 EB"), 2, "error: the memory is full (8 EB); close programs"),
    (RuntimeError("CUDA out of memory"), 2, "error: the memory is full (CUDA out of memory)"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    (KeyboardInterrupt(), 130, "\ninterrupted\n"),
]


@pytest.mark.parametrize("error,code,line", ENDS)
def test_failures_end_in_one_line(error, code, line, capsys):
    assert ends(raising(error)) == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.strip().count("\n") == 0


def test_codes_and_tracebacks():
    assert [ends(lambda code=code: code) for code in (0, 1, 2, None, "a network")] == [
        0,
        1,
        2,
        0,
        0,
    ]
    for error in (ZeroDivisionError(), FileNotFoundError(2, "ours"), RuntimeError("shapes differ")):
        with pytest.raises(type(error)):  # our own mistakes keep their traceback
            utils.run(raising(error))


def script(code, **kwargs):
    """A process that runs `code` as the main of a script."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import utils, time\n"
    code += f"def main():\n{lines}utils.run(main)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **{**pipes, **kwargs})


WRITE = "with utils.atomic_write(sys.argv[0] + 'x') as part:\n    part.touch()\n"
WRITE += "    print('ready', flush=True)\n    time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_clean_up(number, tmp_path):
    process = script(WRITE, cwd=tmp_path)
    assert process.stdout.readline() == "ready\n" and os.listdir(tmp_path)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number and os.listdir(tmp_path) == []
    assert "Traceback" not in said


@pytest.mark.parametrize("target,code", [("closed", 141), ("/dev/full", 2), ("ascii", 0)])
def test_where_output_goes(target, code, tmp_path):
    """`| head -1`, a full disk, a terminal without umlauts."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    output = open("/dev/full", "w") if target == "/dev/full" else subprocess.PIPE  # noqa: SIM115
    process = script("for n in range(20000): print('\\u00fc', n)", stdout=output, env=environment)
    if target == "closed":
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
    printed, said = process.communicate(timeout=60)
    assert process.returncode == code and said.count("\n") == (target == "/dev/full"), said
    assert target != "ascii" or printed.startswith("\\xfc 0\n")


# --------------------------------------------------------------------------------- devices


def test_select_device(monkeypatch):
    assert select_device("cpu") == torch.device("cpu")
    for name in ("tpu", "meta", "cpu:x"):
        with pytest.raises(UserError, match=f"--device {name}: no such device"):
            select_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees 0 GPUs here"):
        select_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("cuda") == torch.device("cuda:0")  # always with its index
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device() == select_device("cuda") == torch.device("cuda:1")
    assert select_device("cuda:0") == torch.device("cuda:0")
    for name in ("cuda:2", "cuda:3"):
        with pytest.raises(UserError, match=f"^--device {name}: PyTorch sees 2 GPUs here; leave"):
            select_device(name)
    monkeypatch.setenv("LOCAL_RANK", "5")  # more processes than cards: they share them
    assert select_device() == torch.device("cuda:1")


def test_select_device_offers_what_the_accelerator_is(monkeypatch):
    """Apple's GPU is named in the error, used where it is asked for, and never by itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--device mps: no such device; this machine has cpu$"):
        select_device("mps")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert select_device("mps") == torch.device("mps") and select_device().type == "cpu"
    with pytest.raises(
        UserError, match=r"^--device xpu: no such device; this machine has mps, cpu$"
    ):
        select_device("xpu")
    for name, cards in (("mps:1", 1), ("cuda", 0)):
        with pytest.raises(UserError, match=f"--device {name}: PyTorch sees {cards} GPUs here"):
            select_device(name)


def test_amp_needs_bfloat16_instructions():
    """oneDNN obeys this variable, as if the CPU were an older one."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    code = "print(utils.use_amp(False, 'cpu'), utils.use_amp(True, 'cuda'), utils.use_amp(True, 'cpu'))"
    printed = script(code, env=environment).communicate(timeout=60)[0]
    line = "this CPU has no bfloat16 instructions: --amp is left out, float32 is used\n"
    assert printed == line + "False True False\n"


# --------------------------------------------------------------------------------- files


def test_atomic_write_leaves_the_old_file_after_a_failure(tmp_path):
    path = tmp_path / "a" / ("ä" * 120 + ".json")  # 245 bytes
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == [path.name]
    with atomic_write(path) as one, atomic_write(path) as other:  # as two processes would
        assert one != other
        one.touch()
        other.touch()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with (
            pytest.raises(UserError, match="could not be written"),
            atomic_write(path) as temporary,
        ):
            temporary.write_text("")


def test_save_and_load(tmp_path):
    save({"loss": [1.0, 0.1 + 0.2], "name": "[a, b]", "nan": math.nan}, tmp_path / "a.json")
    found = load(tmp_path / "a.json")
    assert found["loss"] == [1.0, 0.1 + 0.2] and found["name"] == "[a, b]"
    assert math.isnan(found["nan"])
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert len(lines) == 5  # a list of numbers is one line
    save({"x": torch.arange(3)}, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth")["x"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"b\.pth: no such file"):
        load(tmp_path / "b.pth")


def test_damaged_files_are_named(tmp_path):
    save({"x": torch.arange(100)}, tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        end = rng.integers(1, len(content)) if rng.random() < 0.5 else None
        (tmp_path / "bad.pth").write_bytes(flipped[:end])
        try:
            load(tmp_path / "bad.pth")
        except UserError as error:
            assert "bad.pth: is damaged" in str(error)
            refused += 1
    assert refused > 50


def test_loading_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: is damaged or not a .pth file"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_one_writer_at_a_time(tmp_path):
    """A second process waits and says for whom, or is refused; nothing is left behind."""
    hold = f"with utils.only_writer({str(tmp_path / 'song')!r}, 'this song'):\n"
    first = script(hold + "    print('in', flush=True)\n    time.sleep(float(sys.stdin.readline()))\n"
                   "    print('out', time.time())", stdin=subprocess.PIPE)  # fmt: skip
    assert first.stdout.readline() == "in\n"
    refusal = pytest.raises(UserError, match=f"process {first.pid} is writing this song; wait")
    with refusal, only_writer(tmp_path / "song", "this song", wait=False):
        pass
    second = script(hold + "    print('in', time.time())")
    assert f"process {first.pid} is writing this song: waiting" in second.stdout.readline()
    first.stdin.write("0.2\n")
    first.stdin.flush()
    left, entered = first.communicate()[0].split(), second.communicate()[0].split()
    assert left[0] == "out" and entered[0] == "in" and float(left[1]) < float(entered[1])
    assert os.listdir(tmp_path) == []
    killed = script(hold + "    print('in', flush=True)\n    time.sleep(60)")
    killed.stdout.readline()
    killed.kill()
    killed.communicate()
    with only_writer(tmp_path / "song", "this song", wait=False):  # a dead process holds no lock
        assert os.listdir(tmp_path) == [".song.lock"]


def test_what_may_be_written(tmp_path):
    song, data = tmp_path / "song.wav", tmp_path / "data"
    data.mkdir()
    for path in (song, tmp_path / "theirs", data / "x"):
        path.touch()
    os.link(song, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(song)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "in").symlink_to(data)
    inputs = identities([song])
    for name, ours, message in [
        ("song.wav", True, "is an input"),
        ("data/../song.wav", True, "is an input"),
        ("hard", True, "is an input"),
        ("soft", True, "is an input"),
        ("data/new", True, "lies in the data that is read"),
        ("in/new/file", True, "lies in the data that is read"),
        ("data", True, "lies in the data that is read"),
        ("theirs", False, "exists and was not written by this script"),
        ("dangling", False, "exists and was not written by this script"),
        ("", True, "exists and was not written by this script"),
        ("theirs", True, None),
        ("new/file", False, None),
        ("database", False, None),
    ]:
        if message is None:
            assert check_output(tmp_path / name, inputs, [data], ours) == tmp_path / name
        else:
            with pytest.raises(UserError, match=message):
                check_output(tmp_path / name, inputs, [data], ours)


IN_A_CALLBACK = """
import os, signal, weakref
thing = type("Thing", (), {})()
reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.NAME))
del thing  # what the handler raises is dropped here
time.sleep(60)
"""


@pytest.mark.parametrize("name,code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_while_garbage_is_collected(name, code):
    """Python drops an exception there; the signal counts all the same."""
    process = script(IN_A_CALLBACK.strip().replace("NAME", name))
    said = process.communicate(timeout=50)[1]
    assert process.returncode == code and "Traceback" not in said


# --------------------------------------------------------------------------------- downloads

CONTENT = np.random.default_rng(0).bytes(200_000)


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT; the address says how: the words of its path are what is wrong with it."""
    waits, asked = [], []
    monkeypatch.setattr(utils.time, "sleep", waits.append)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            kind, begin = self.path.split("/")[1], 0
            asked.append(self.headers.get("Range"))
            if kind.isdecimal() and (int(kind) not in (429, 503) or len(asked) < 3):
                self.send_response(int(kind))
                self.send_header("Retry-After", "7")
                return self.end_headers()
            if asked[-1] and "no-range" not in kind:
                begin = int(asked[-1].removeprefix("bytes=").removesuffix("-"))
                if begin >= len(CONTENT):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}"
                )
            else:
                self.send_response(200)
            content = CONTENT[begin:]
            if "no-length" not in kind:
                claimed = len(content) + 1000 * ("longer" in kind) - 1000 * ("shorter" in kind)
                self.send_header("Content-Length", str(claimed))
            self.end_headers()
            if "breaks" in kind or ("once" in kind and len(asked) == 1):
                content = content[:70_000]
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.waits, server.asked = waits, asked
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize(
    "kind,asked,waits",
    [
        ("good", [None], []),
        ("no-length", [None], []),
        ("breaks", [None, "bytes=70000-", "bytes=140000-"], [0, 0]),
        ("once-no-range", [None, "bytes=70000-"], [0]),  # begins anew
        ("longer", [None, "bytes=200000-"], [0]),  # nothing is there beyond its end
        ("429", [None, None, None], [7, 7]),  # waits as told
        ("503", [None, None, None], [7, 7]),
    ],
)
def test_download(server, tmp_path, capsys, kind, asked, waits):
    path = tmp_path / "folder" / "file.bin"
    download(f"{server.url}/{kind}/file", path, SHA256[:8])
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file.bin"]
    assert server.asked == asked and server.waits == waits
    if kind == "good":
        assert "file.bin: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind,start,message,kept",
    [
        ("404", "", "Not Found", 0),
        ("403", "", "Forbidden", 0),
        ("breaks-no-range", "", "broke off, 130000 of 200000 bytes lack", 70_000),
        ("good", "00000000", "failed the check of its SHA-256", 0),
        ("shorter", SHA256[:8], "failed the check of its SHA-256", 0),
    ],
)
def test_failed_downloads(server, tmp_path, kind, start, message, kept):
    """Nothing gets the file's name; what may be gone on with is kept."""
    with pytest.raises(UserError, match=message) as caught:
        download(f"{server.url}/{kind}/file", tmp_path / "file.bin", start)
    assert f"{server.url}/{kind}/file" in str(caught.value)
    assert str(tmp_path / "file.bin") in str(caught.value)
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [
        (".file.bin.part", kept)
    ] * bool(kept)


def test_download_of_another_day(server, tmp_path):
    """After a kill, what is there is not fetched again; if it is of another file, that is noticed."""
    path = tmp_path / "file.bin"
    (tmp_path / ".file.bin.part").write_bytes(CONTENT[:150_000])
    download(f"{server.url}/good/file", path, SHA256)
    assert path.read_bytes() == CONTENT and server.asked == ["bytes=150000-"]
    path.unlink()
    (tmp_path / ".file.bin.part").write_bytes(b"other" * 1000)
    with pytest.raises(UserError, match="SHA-256; try again"):
        download(f"{server.url}/good/file", path, SHA256)
    download(f"{server.url}/good/file", path, SHA256)
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file.bin"]


def test_download_from_a_mirror(server, tmp_path, monkeypatch):
    monkeypatch.setenv(utils.MIRROR, f"{server.url}/good/")
    download("https://zenodo.org/records/1/files/file", tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_no_network_is_noticed_at_once(tmp_path):
    with pytest.raises(UserError, match="fetch it by hand and put it at"):
        download("http://127.0.0.1:9/file", tmp_path / "file.bin")  # nobody listens there
    (tmp_path / "home").touch()
    with pytest.raises(UserError, match=r"home/file\.bin: could not be written"):
        download("http://127.0.0.1:9/file", tmp_path / "home" / "file.bin")  # nor is there a home


def test_the_packages_work_without_ffmpeg_on_path(tmp_path):
    code = "import shutil, torch, numpy as np; assert not shutil.which('ffmpeg')\n"
    code += "print(utils.resample(torch.ones(1, 480), 48000, 44100).shape)\n"
    code += "x = np.random.default_rng(0).standard_normal((2, 3000, 2))\n"
    code += "print(utils.import_museval().evaluate(x, x, win=3000, hop=3000)[0].shape)\n"
    code += "print(shutil.which('ffmpeg'))"
    process = script(code, env={**os.environ, "PATH": str(tmp_path)})
    printed, said = process.communicate(timeout=120)
    assert printed == "torch.Size([1, 441])\n(2, 1)\nNone\n", said


# --------------------------------------------------------------------------------- sound in

RATE = 44100
RNG = np.random.default_rng(0)
MUSIC = np.cumsum(RNG.uniform(-1, 1, (2 * RATE, 2)), axis=0)  # (N, C): red noise
MUSIC = (MUSIC - MUSIC.mean(0)) / np.abs(MUSIC - MUSIC.mean(0)).max() * 0.8


def encoded(kind, subtype=None, audio=MUSIC, rate=RATE, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=kind, subtype=subtype, **kwargs)
    return buffer.getvalue()


def mux(path, codec, audio=MUSIC, rate=RATE, start=None, **options):
    """Write a file by PyAV; with `start` a film whose sound begins after so many seconds."""
    with av.open(str(path), "w", options=options) as container:
        sound = container.add_stream(codec, rate=rate, layout="stereo")
        if start is not None:
            video = container.add_stream("mpeg4", rate=10)
            video.width = video.height = 64
            for n in range(30):
                frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
                frame.pts = n
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        samples = np.ascontiguousarray(audio.T, dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, round((start or 0) * rate)
        frame.time_base = utils.Fraction(1, rate)
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def read(path, content=None, size=10_000):
    """All of a file as (C, N), after checking that every way of reading gives the same samples."""
    if content is not None:
        path.write_bytes(content)
    audio = AudioFile.open(path)
    blocks = list(audio.blocks(size=size))
    whole = torch.cat(blocks, dim=1).numpy()
    assert whole.shape == (audio.channels, audio.length) and whole.dtype == np.float32
    assert max(block.shape[1] for block in blocks) <= size + 22_050
    assert np.array_equal(audio.read(5000, 7000), whole[:, 5000:12_000])
    beyond = audio.read(-10, audio.length + 30)
    assert np.array_equal(beyond[:, 10:-20], whole) and not beyond[:, :10].any()
    assert not beyond[:, -20:].any() and not audio.read(audio.length + 5, 3).any()
    part = torch.cat(list(audio.blocks(3333, 44_444)), dim=1).numpy()
    assert np.array_equal(part, whole[:, 3333:44_444])
    return whole


PLAIN = [
    ("WAV", s) for s in ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"]
]
PLAIN += [("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16")]
PLAIN += [("W64", "PCM_24"), ("CAF", "PCM_16"), ("CAF", "FLOAT")]
PLAIN += [("AU", "PCM_16"), ("AIFF", "PCM_S8"), ("AIFF", "PCM_24"), ("AIFF", "FLOAT")]
PLAIN += [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("NIST", "PCM_16")]
DEFAULT = [("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize("kind,subtype", PLAIN + DEFAULT)
def test_formats_and_their_truncation(kind, subtype, tmp_path):
    """The samples that soundfile's own floats are; cut anywhere, the file is named."""
    rate = 48000 if subtype == "OPUS" else RATE
    content = encoded(kind, subtype, rate=rate)
    path = tmp_path / "file"
    whole = read(path, content)
    expected = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)[0].T
    assert whole.shape == expected.shape and sdr(expected, whole) > (60 if kind == "OGG" else 140)
    for cut in (1, 4, 100, 5000, len(content) // 3, len(content) * 2 // 3):
        with pytest.raises(UserError, match=r"is truncated|breaks off or is damaged"):
            read(path, content[:-cut])


@pytest.mark.parametrize("name", ["a.m4a", "a.mka", "b.mka", "a.mp4", "a.avi", "a.aac", "a.mp3"])
def test_compressed_formats(name, tmp_path):
    """The original's length where the format says it, its samples in place; cut, it is named."""
    codec = {"a.mp3": "libmp3lame", "b.mka": "flac", "a.avi": "pcm_s16le"}.get(name, "aac")
    options = {"movflags": "faststart"} if name in ("a.m4a", "a.mp4") else {}
    content = mux(tmp_path / name, codec, **options).read_bytes()
    whole = read(tmp_path / name)
    delay = 1024 if name == "a.aac" else 0  # ADTS can't say that the encoder's delay is none of it
    exact = name not in ("a.mka", "a.aac")
    assert whole.shape[1] == len(MUSIC) if exact else 0 <= whole.shape[1] - len(MUSIC) < 3000
    assert sdr(MUSIC.T, whole[:, delay : delay + len(MUSIC)]) > 15
    for cut in (len(content) // 3, len(content) * 2 // 3):
        with pytest.raises(UserError, match=r"is truncated|breaks off or is damaged"):
            read(tmp_path / name, content[:-cut])


def piped_wav(size):
    content = bytearray(encoded("WAV", "PCM_16"))
    content[4:8] = struct.pack("<I", min(size + 36, 0xFFFFFFFF))
    content[40:44] = struct.pack("<I", size)
    return bytes(content)


def test_files_from_a_pipe(tmp_path):
    """Who writes to a pipe doesn't know the length: what is there is believed."""
    expected = soundfile.read(io.BytesIO(encoded("WAV", "PCM_16")), dtype="float32")[0].T
    for size in (0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        assert np.array_equal(read(tmp_path / "a.wav", piped_wav(size)), expected), hex(size)
    flac = bytearray(encoded("FLAC", "PCM_16"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    whole = read(tmp_path / "a.flac", bytes(flac))
    assert np.array_equal(whole, read(tmp_path / "b.flac", encoded("FLAC", "PCM_16")))
    with pytest.raises(UserError, match="breaks off or is damaged"):
        read(tmp_path / "a.flac", bytes(flac[:-1000]))
    gsm = encoded("WAV", "GSM610", MUSIC[:40_000, :1], 8000)
    assert 40_000 <= read(tmp_path / "gsm.wav", gsm).shape[1] < 40_400
    left = MUSIC[:20_000] * 2**31  # 24 bits in 4 bytes
    form = struct.pack("<HHIIHH", 1, 2, RATE, 8 * RATE, 8, 24)
    samples = (left.astype(np.int64) & ~255).astype("<i4").tobytes()
    wide = b"RIFF" + struct.pack("<I", 36 + len(samples)) + b"WAVEfmt " + struct.pack("<I", 16)
    wide += form + b"data" + struct.pack("<I", len(samples)) + samples
    path = tmp_path / "wide.wav"
    path.write_bytes(wide)
    assert sdr(MUSIC[:20_000].T, AudioFile.open(path).read(0, 20_000)) > 120


def test_mp3_is_read_to_its_true_end(tmp_path):
    music = np.concatenate([0 * MUSIC, MUSIC, 0 * MUSIC])
    variable = encoded("MP3", audio=music, bitrate_mode="VARIABLE", compression_level=0.3)
    assert np.array_equal(read(tmp_path / "a.mp3", variable).shape, (2, len(music)))
    bare = variable[variable.index(b"\xff\xfb", variable.index(b"Xing")) :]
    whole = read(tmp_path / "b.mp3", bare)  # without the header any length is a guess
    assert 0 <= whole.shape[1] - len(music) < 2400
    assert sdr(music.T, whole[:, 1105 : 1105 + len(music)]) > 15
    mp3 = encoded("MP3")
    tag = b"ID3\x03\x00\x00\x00\x00\x00\x14TIT2\x00\x00\x00\x0a\x00\x00\x00abcdefghi"
    for content in (mp3 + mp3, mp3 + tag + mp3):
        whole = read(tmp_path / "c.mp3", content)
        assert 0 < whole.shape[1] - 2 * len(MUSIC) < 4000
        assert sdr(MUSIC.T, whole[:, : len(MUSIC)]) > 15
    for end in (b"TAG" + bytes(125), b"LYRICSBEGIN" + bytes(900), bytes(3000), tag):
        assert 0 <= read(tmp_path / "d.mp3", tag + mp3 + end).shape[1] - len(MUSIC) < 1152
    middle = len(mp3) // 2
    for content in (mp3[:middle], mp3[:middle] + mp3[middle + 6000 :]):
        with pytest.raises(UserError, match=r"is truncated: \d\.\d\d of 2\.00 s|is damaged"):
            read(tmp_path / "e.mp3", content)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_damaged_ogg_moves_nothing(subtype, tmp_path):
    rate = 48000 if subtype == "OPUS" else RATE
    content = encoded("OGG", subtype, np.concatenate([MUSIC] * 3), rate)
    whole = read(tmp_path / "a.ogg", content)
    twice = read(tmp_path / "a.ogg", content + content)
    assert np.array_equal(twice[:, : whole.shape[1]], whole)
    assert abs(twice.shape[1] - 2 * whole.shape[1]) < 0.02 * rate
    middle = len(content) // 2
    zeros = content[:middle] + bytes(3000) + content[middle + 3000 :]
    flip = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
    pages = [n for n in range(len(content)) if content[n : n + 4] == b"OggS"]
    for broken in (zeros, flip, content[: pages[-1]], content[: pages[3]] + content[pages[5] :]):
        with pytest.raises(UserError, match="breaks off or is damaged"):
            read(tmp_path / "a.ogg", broken)


@pytest.mark.parametrize("name", ["late.mkv", "late.mov"])
def test_sound_that_starts_late_in_a_film(name, tmp_path):
    """Stems line up with the picture: silence until the sound begins."""
    codec = "flac" if name.endswith("mkv") else "pcm_s16le"
    whole = read(mux(tmp_path / name, codec, start=0.5))
    begin = RATE // 2
    assert whole.shape[1] == begin + len(MUSIC) and not whole[:, :begin].any()
    assert sdr(MUSIC.T, whole[:, begin:]) > 60


def test_what_is_no_sound(tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio\n" * 100)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/six.wav\n")
    (tmp_path / "empty.wav").touch()
    os.mkfifo(tmp_path / "fifo.wav")
    for name, shape in (("six", (100, 6)), ("none", (0, 2))):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(shape), RATE)
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 10)
    for name, message in [
        ("text.wav", "is not audio that can be read"),
        ("list.m3u8", "is not audio that can be read"),
        ("empty.wav", "is not audio that can be read"),
        ("fifo.wav", "is not a regular file"),
        ("", "is a folder"),
        ("gone.wav", "no such file"),
        ("six.wav", "has 6 channels; mix it down"),
        ("none.wav", "contains no samples"),
        ("slow.wav", "has a sample rate of 10 Hz"),
    ]:
        with pytest.raises(UserError, match=message):
            AudioFile.open(tmp_path / name)
    os.chmod(tmp_path / "text.wav", 0)
    if os.getuid():  # root may read everything
        with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
            AudioFile.open(tmp_path / "text.wav")


def test_samples_that_can_not_be(tmp_path):
    for value in (np.nan, np.inf, -np.inf, 1e30, -1001):
        audio = MUSIC.copy()
        audio[70_000, 1] = value
        soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
        found = AudioFile.open(tmp_path / "a.wav")
        message = r"a.wav: has NaN, infinite or absurdly loud samples \(\+60 dBFS\) at 1.6 s"
        with pytest.raises(UserError, match=message):
            list(found.blocks())
        with pytest.raises(UserError, match=message):
            found.read(69_000, 2000)
        assert len(found.read(0, 100)) == 2  # the rest is as good as it is
    soundfile.write(tmp_path / "a.wav", 999 * MUSIC, RATE, subtype="FLOAT")
    assert np.abs(read(tmp_path / "a.wav")).max() > 700  # loud, but possible


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
def test_files_that_change(name, tmp_path):
    """Between two passes, or within one."""
    path = tmp_path / name
    soundfile.write(path, MUSIC, RATE)
    content, audio = path.read_bytes(), AudioFile.open(path)
    for other in (content + b"x", content[:-2000], b""):
        path.write_bytes(other)
        with pytest.raises(UserError, match="was changed since it was opened"):
            audio.read(0, 100)
        path.write_bytes(content)
        audio = AudioFile.open(path)
        blocks = audio.blocks(size=10_000)
        next(blocks)
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"was changed|is truncated|is damaged"):
            list(blocks)
        path.write_bytes(content)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        audio.read(0, 100)


def test_names_that_are_no_text(tmp_path):
    soundfile.write(tmp_path / "a.wav", MUSIC, RATE)
    path = os.path.join(os.fsencode(tmp_path), b"\xff.raw")
    os.rename(tmp_path / "a.wav", path)
    assert AudioFile.open(os.fsdecode(path)).length == len(MUSIC)


# --------------------------------------------------------------------------------- resampling


def test_resampling_in_blocks():
    """The same samples as resampling at once, however the recording is cut up, there and back."""
    rng = np.random.default_rng(0)
    rates = [8000, 11025, 16000, 22050, 32000, 44100, 47952, 48000, 96000, 192000]
    for _ in range(150):
        rate, new_rate = (int(r) for r in rng.choice(rates, 2))
        samples = int(rng.choice([1, 2, 100, 161, 5001, 20_003]))
        x = torch.from_numpy(rng.standard_normal((2, samples), dtype=np.float32))
        cuts = np.sort(rng.integers(0, samples + 1, rng.integers(0, 9)))
        blocks = torch.tensor_split(x, torch.from_numpy(cuts), dim=1)
        parts = torch.cat(list(resample_blocks(blocks, rate, new_rate)), dim=1)
        whole = resample(x, rate, new_rate)
        assert parts.shape == whole.shape and sdr(whole, parts) > 90
        assert resample(whole, new_rate, rate).shape[1] >= samples
    assert list(resample_blocks([], 48000, 44100)) == []
    assert list(resample_blocks([torch.zeros(2, 0)], 48000, 44100)) == []


def test_rates_without_a_common_divisor():
    with pytest.raises(
        UserError, match="audio of 44101 Hz can't be resampled to 44100 Hz; convert"
    ):
        resample(torch.zeros(1, 100), 44101, 44100)


# ------------------------------------------------------------------- what code is, in fingerprints


def function(source, value):
    """The function f of a module's source, in which VALUE is replaced."""
    names = {"__name__": "elsewhere", "np": np}
    exec(source.replace("VALUE", repr(value)), names)
    return names["f"]


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): return VALUE * x",
        "def f(x): return x in (0, VALUE)",
        "def f(x, power=VALUE): return x**power",
        "def f(x, *, power=VALUE): return x**power",
        "POWER = VALUE\ndef f(x): return x**POWER",
        "POWER = VALUE\ndef f(x): return [y**POWER for y in x]",
        "POWER = np.float32(VALUE)\ndef f(x): return x**POWER",
        "KNOWN = frozenset([VALUE])\ndef f(x): return x in KNOWN",
        "from functools import partial\ndef h(p, x): return x**p\ng = partial(h, VALUE)\ndef f(x): return g(x)",
        "class Power:\n    def __call__(self, x): return x**self.p\ng = Power()\ng.p = VALUE\ndef f(x): return g(x)",
        "TABLE = {'a': [VALUE]}\ndef f(x): return TABLE['a'][0] * x",
        "WINDOW = np.full(3, VALUE)\ndef f(x): return WINDOW * x",
        "def make(p):\n    def f(x): return x**p\n    return f\nf = make(VALUE)",
        "MASKS = {'a': lambda x: VALUE * x}\ndef f(x): return MASKS['a'](x)",
        "class f:\n    scale = (VALUE, 1)\n    def forward(self, x): return self.scale[0] * x",
        "from functools import partial\ndef g(p, x): return x**p\nf = partial(g, VALUE)",
        "class Power:\n    p = 1\n    def __call__(self, x): return x**self.p\nf = Power()\nf.p = VALUE",
        "def f(x): return x in {1, 5, VALUE}",
        "class f:\n    @classmethod\n    def make(cls): return VALUE",
        "class f:\n    @property\n    def scale(self): return VALUE",
        "class f:\n    def __call__(self, x): return VALUE",
        "def g(x): return VALUE * x\nclass f:\n    def forward(self, x): return g(x)",
        "import types\nm = types.ModuleType('m')\nm.g = lambda x: VALUE * x\ndef f(x): return m.g(x)",
    ],
)
def test_code_of_what_decides(source):
    one, again, other = (utils.code_of(function(source, value)) for value in (2, 2, 3))
    assert one == again != other


def test_code_of_what_was_pickled():
    """Which leaves a mark on its class."""
    before = utils.code_of(AudioFile)
    pickle.dumps(AudioFile("a.wav", 1, 1, 1, (0, 0), "int16"))
    assert "__slotnames__" in vars(AudioFile) and utils.code_of(AudioFile) == before


def test_code_of_what_refers_to_itself():
    source = "TABLE = {}\ndef f(x): return TABLE['f'](x - VALUE) if x else 0\nTABLE['f'] = f"
    assert utils.code_of(function(source, 1)) == utils.code_of(function(source, 1))
