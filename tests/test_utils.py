"""utils.py: command lines, files, downloads, the helpers that make the packages work everywhere."""

import hashlib
import math
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import FOLDER

import utils
from utils import EarlyStopping, Parser, UserError, atomic_write, download, load, number, save, select_device

# ------------------------------------------------------------------------------------------------------ command lines


def parser():
    result = Parser("what it does")
    result.add_argument("--size", type=number(int, 1, 9), default=3, help="how many")
    result.add_argument("--rate", type=number(float, 0.5), help="how fast")
    result.add_argument("--quick", action="store_true", help="hurry")
    return result


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--size", "0"], "--size: 0 is out of range (1 to 9)"),
        (["--size", "x"], "--size: invalid int value: 'x'"),
        (["--rate", "nan"], "--rate: nan is out of range (0.5 to inf)"),
        (["--siz", "4"], "unrecognized arguments: --siz 4"),
        (["--size"], "--size: expected one argument"),
    ],
)
def test_bad_command_lines(arguments, message):
    with pytest.raises(UserError) as caught:
        parser().parse_args(arguments)
    assert message in str(caught.value) and "--help explains every flag" in str(caught.value)


def test_flags_given_by_hand():
    assert parser().parse_args([]).size == 3
    assert parser().given(["--size=3", "--quick", "--rate", "-1"]) == {"size", "quick", "rate"}


def test_help_shows_defaults_that_say_something():
    text = parser().format_help()
    assert "how many (default: 3)" in text and "None" not in text and "False" not in text


@pytest.mark.parametrize("error,line", [("a\nb\x1b[31m", "error: a\\nb\\x1b[31m"), ("Caught UserError: x.wav: is bad\n", "error: x.wav: is bad")])
def test_errors_are_one_line(error, line, capsys):
    assert utils.report(UserError(error)) == 2
    assert capsys.readouterr().err == line + "\n"


def test_run_ends_with_the_right_code(capsys):
    def fails(error):
        def main():
            raise error

        return main

    for error, code in ((UserError("no"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as caught:
            utils.run(fails(error))
        assert caught.value.code == code
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        utils.run(fails(ZeroDivisionError()))


def test_select_device(monkeypatch):
    assert select_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device tpu: no such device"):
        select_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees 0 GPUs here"):
        select_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device() == torch.device("cuda:1")
    with pytest.raises(UserError, match="sees 2 GPUs"):
        select_device("cuda:2")


def test_early_stopping():
    stopping = EarlyStopping(patience=2)
    assert [stopping.step(loss) for loss in (3.0, 2.0, 2.5, 2.0)] == [True, True, False, False]
    assert stopping.stop and stopping.best == 2.0
    forever = EarlyStopping(patience=0)
    assert not any(forever.stop for loss in range(1000) if not forever.step(loss + 1) or True)


# -------------------------------------------------------------------------------------------------------------- files


def test_atomic_write_leaves_the_old_file_after_a_failure(tmp_path):
    path = tmp_path / "a" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"), atomic_write(tmp_path / "file" / "x") as temporary:
        temporary.write_text("")


def test_save_and_load(tmp_path):
    save({"loss": [1.0, 0.1 + 0.2], "name": "[a, b]", "nan": math.nan}, tmp_path / "a.json")
    found = load(tmp_path / "a.json")
    assert found["loss"] == [1.0, 0.1 + 0.2] and found["name"] == "[a, b]" and math.isnan(found["nan"])
    assert len((tmp_path / "a.json").read_text().splitlines()) == 5  # a list of numbers is one line
    save({"x": torch.arange(3)}, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth")["x"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="b.pth: no such file"):
        load(tmp_path / "b.pth")


def test_damaged_files_are_named(tmp_path):
    save({"x": torch.arange(100)}, tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (tmp_path / "bad.pth").write_bytes(flipped[: rng.integers(1, len(content))] if rng.random() < 0.5 else flipped)
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
    with pytest.raises(UserError, match="evil.pth: is damaged or not a .pth file"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------------- downloads

CONTENT = np.random.default_rng(0).bytes(200_000)


@pytest.fixture(scope="module")
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:70_000] if self.path == "/truncated" else CONTENT)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_download(server, tmp_path, capsys):
    path = tmp_path / "folder" / "file.bin"
    download(f"{server}/file", path, hashlib.sha256(CONTENT).hexdigest()[:8])
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file.bin"]
    assert "file.bin: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address,start,message",
    [
        ("/missing", "", "File not found|Not Found"),
        ("/truncated", "", "broke off after 70000 of 200000 bytes"),
        ("/file", "00000000", "failed the check of its SHA-256 and was removed"),
    ],
)
def test_failed_downloads_leave_nothing(server, tmp_path, address, start, message):
    with pytest.raises(UserError, match=message) as caught:
        download(server + address, tmp_path / "file.bin", start)
    assert server + address in str(caught.value) and str(tmp_path / "file.bin") in str(caught.value)
    assert not os.listdir(tmp_path)


def test_no_network_is_noticed_at_once(tmp_path):
    with pytest.raises(UserError, match="fetch it by hand and put it at"):
        download("http://127.0.0.1:9/file", tmp_path / "file.bin")  # nobody listens there


# ----------------------------------------------------------------------------------------------- torchaudio and ffmpeg


def test_the_packages_work_without_ffmpeg_on_path(tmp_path):
    """In a process of its own, with a PATH that has nothing."""
    code = (
        "import utils, shutil, subprocess; assert not shutil.which('ffmpeg'); utils.use_ffmpeg();"
        "import stempeg, musdb; print(subprocess.run(['ffmpeg', '-version'], capture_output=True, text=True).stdout[:14]);"
        "print(utils.resample(__import__('torch').ones(1, 480), 48000, 44100).shape)"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.stdout == "ffmpeg version\ntorch.Size([1, 441])\n", done.stderr
    assert not list(Path(tmp_path).iterdir())  # the links are gone with the process


def test_ffmpeg_where_links_cannot_be_made(tmp_path, monkeypatch):
    """As on Windows: the programs are copied."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(os, "symlink", mock.Mock(side_effect=OSError("A required privilege is not held by the client")))
    utils.use_ffmpeg.__wrapped__()  # without the cache: its work is done once in a process
    assert sorted(os.listdir(tmp_path)) == ["ffmpeg", "ffprobe"] and not (tmp_path / "ffmpeg").is_symlink()
    assert subprocess.run(["ffprobe", "-version"], capture_output=True).stdout.startswith(b"ffprobe version")


# ------------------------------------------------------------------------------------------------------------ audio in


def test_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "song.wav"
    path.touch()
    refusal = PermissionError(13, "Permission denied")
    monkeypatch.setattr(utils, "wav_layout", mock.Mock(side_effect=refusal))  # even where root runs this test
    with pytest.raises(UserError, match=r"song.wav: cannot be read \(Permission denied\); check its permissions"):
        utils.AudioStream(path)


def test_rates_without_a_common_divisor():
    with pytest.raises(UserError, match="audio of 44101 Hz can't be resampled to 44100 Hz; convert it first: ffmpeg"):
        utils.resample(torch.zeros(1, 100), 44101, 44100)
