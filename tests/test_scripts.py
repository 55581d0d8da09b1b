"""The real commands, run as a user would: train, separate, score; and what they say of mistakes."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import EXCERPT, FOLDER, run_script, sdr

SMALL = ["--hidden-size", 16, "--seq-dur", 1, "--samples-per-track", 4]
SMALL = [*map(str, SMALL), "--batch-size", "4", "--epochs", "2"]


@pytest.fixture(scope="module")
def trained(musdb_root, tmp_path_factory):
    """A folder in which `train.py` was run on tiny songs; (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("user")
    printed, _ = run_script("train.py", "--root", musdb_root, *SMALL, cwd=folder)
    return folder, printed


def test_train(trained, musdb_root):
    folder, printed = trained
    assert "6 training tracks, 2 validation tracks, 44100 Hz" in printed
    assert "preset umx" in printed and "vocals epoch 2/2  train " in printed
    following = f"python eval.py --root {musdb_root} --model open-unmix"
    assert f"Next: python test.py SONG.wav --model open-unmix, or {following}" in printed
    model = folder / "open-unmix"
    written = sorted(path.name for path in model.iterdir() if path.suffix != ".lock")
    ours = ["vocals.chkpnt", "vocals.json", "vocals.png", "vocals.pth"]
    assert written == ["separator.json", *ours]
    settings = {"sample_rate": 44100, "nfft": 4096, "nhop": 1024, "nb_channels": 2}
    assert json.loads((model / "separator.json").read_text()) == settings
    record = json.loads((model / "vocals.json").read_text())
    histories = [record[f"{name}_history"] for name in ("train_loss", "valid_loss", "train_time")]
    assert record["epochs_trained"] == 2 and [len(history) for history in histories] == [2, 2, 2]
    assert record["best_loss"] == min(record["valid_loss_history"])
    assert record["args"]["mask"] == record["network"]["mask"] == "sigmoid"
    assert record["network"]["max_bin"] == 1487  # 16 kHz


FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}


def test_separate(trained, tmp_path):
    """One target's counterpart is written too, and both add up to the song; done is done."""
    folder, _ = trained
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, (50_000, 2))
    songs = {name: tmp_path / f"a song in {name}.{name}" for name in FORMATS}
    for name, song in songs.items():
        soundfile.write(song, audio, 44100, subtype=FORMATS[name])
    command = ["test.py", *songs.values(), "--outdir", tmp_path / "stems"]
    printed, _ = run_script(*command, cwd=folder)
    again, _ = run_script(*command, cwd=folder)
    assert "Next: " in printed
    for song in songs.values():
        paths = (tmp_path / "stems" / song.stem).glob("*.wav")
        stems = {path.stem: soundfile.read(path) for path in paths}
        assert sorted(stems) == ["accompaniment", "vocals"]
        mixture = soundfile.read(song)[0]
        for stem, rate in stems.values():
            assert rate == 44100 and stem.shape[1] == 2 and abs(len(stem) - len(mixture)) <= 1152
        length = min(len(mixture), len(stems["vocals"][0]))
        total = stems["vocals"][0][:length] + stems["accompaniment"][0][:length]
        assert sdr(mixture[:length], total) > 60
        assert f"{song.stem}: vocals, accompaniment; " in printed
        assert f"{song.stem}: kept vocals, accompaniment" in again


def test_evaluate(trained, musdb_root):
    folder, _ = trained
    printed, _ = run_script("eval.py", "--root", musdb_root, cwd=folder)
    for name in ("Test 0", "Test 1"):
        for place in ("scores/open-unmix", "scores/open-unmix/mixture"):
            scores = json.loads((folder / place / "test" / f"{name}.json").read_text())
            names = [target["name"] for target in scores["targets"]]
            assert names == ["vocals", "accompaniment"]
            assert [frame["time"] for frame in scores["targets"][0]["frames"]] == [0, 1, 2]
    lines = [line.split() for line in printed.splitlines()]
    targets = ("vocals", "accompaniment")
    rows = [line for line in lines if len(line) == 9 and line[0] in targets]
    medians = {tuple(line[:2]): float(line[2]) for line in rows}
    assert set(medians) == {(t, method) for t in targets for method in ("open-unmix", "mixture")}
    frames = []
    for path in sorted((folder / "scores" / "open-unmix" / "test").glob("*.json")):
        vocals = json.loads(path.read_text())["targets"][0]
        frames.append(np.median([frame["metrics"]["SDR"] for frame in vocals["frames"]]))
    assert medians["vocals", "open-unmix"] == pytest.approx(np.median(frames), abs=0.01)


def test_torchrun(trained, musdb_root, tmp_path):
    """Two processes share out the tracks; only the first one sums up."""
    folder, _ = trained
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [str(FOLDER / "eval.py"), "--root", str(musdb_root), "--method", "mixture"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = dict(cwd=folder, env=environment, capture_output=True, text=True)
    done = subprocess.run([*command, "--evaldir", str(tmp_path)], **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Next: ") == 1
    assert len([*tmp_path.glob("mixture/test/Test *.json")]) == 2


def test_dry_run(musdb_root, tmp_path):
    command = ["--root", musdb_root, "--dry-run", "--hidden-size", 16, "--preset", "tutorial"]
    printed, _ = run_script("train.py", *command, cwd=tmp_path)
    assert "preset tutorial: loss=l1 epochs=26 " in printed and "epoch 1/26" in printed
    assert (tmp_path / "open-unmix" / "vocals.pth").exists()


@pytest.mark.parametrize("script", ["train.py", "test.py", "eval.py"])
def test_help(script, tmp_path):
    printed, _ = run_script(script, "--help", cwd=tmp_path)
    assert f"python {script}" in printed and "torchrun" in printed
    flags = [line for line in printed.splitlines() if line.startswith("  --")]
    assert len(flags) >= 15 and not list(tmp_path.iterdir())


OFFLINE = """
import time, data
data.musdb_settings()["sample-url"] = "http://127.0.0.1:9/sample.zip"
data.SONGS.update(train=2, test=1)
start = time.time()
root = data.find_musdb()
print(root.name, len(list(root.glob("*/*/mixture.wav"))), time.time() - start < 60)
"""


def test_data_of_first_run_without_network(tmp_path):
    """The way to synthesized songs: one clear line, and soon."""
    environment = {**os.environ, "HOME": str(tmp_path), "MUSDB_PATH": ""}
    command = [sys.executable, "-c", OFFLINE]
    settings = dict(cwd=FOLDER, env=environment, capture_output=True, text=True)
    done = subprocess.run(command, **settings)
    lines = done.stdout.splitlines()
    assert "127.0.0.1:9" in lines[0], done.stderr
    assert "Synthesized songs are used instead" in lines[0]
    assert re.fullmatch("synthetic-[0-9a-f]{6} 4 True", lines[-1])  # three songs and the excerpt


MISTAKES = [  # the files that hold each script's other tests, and test_faults.py, have many more
    ("test.py missing.wav", "missing.wav: no such file"),
    ("test.py text.wav", "text.wav: is not audio that can be read"),
    ("test.py", "the following arguments are required: input"),
    ("train.py --root nowhere", "nowhere: no such folder"),
    ("train.py --root ROOT --batch-size 0", "--batch-size: 0 is out of range"),
    ("eval.py --root empty", "empty/test: no track folder with mixture.wav"),
    ("eval.py --root ROOT --workers x", "--workers: invalid int value: 'x'"),
]


@pytest.mark.parametrize("command,message", MISTAKES, ids=[command for command, _ in MISTAKES])
def test_mistakes_are_one_line(command, message, trained, musdb_root):
    folder, _ = trained
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "text.wav").write_text("this is no audio\n" * 100)
    soundfile.write(folder / "song.wav", np.zeros((1000, 2)), 44100)
    command = [str(musdb_root) if word == "ROOT" else word for word in command.split()]
    output = ["--output", "new"] if "--root" in command and command[0] == "train.py" else []
    _, complaint = run_script(*command, *output, cwd=folder, code=2)
    lines = complaint.replace("\r", "\n").splitlines()
    lines = [line for line in lines if not line.startswith("tracks:") and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], complaint


IMPORTS = [
    "test.py",
    "train.py",
    "eval.py",
]


@pytest.mark.parametrize("script", IMPORTS)
def test_interrupted_while_importing(script, tmp_path):
    """Ctrl-C in the first seconds, which are torch's, ends in no traceback."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    settings = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, str(FOLDER / script), "--help"], **settings)
    assert "Traceback" not in done.stderr and done.returncode in (-signal.SIGINT, 130), done.stderr


def test_amp_without_bfloat16(trained, tmp_path):
    """On a CPU without bfloat16 instructions: a line says so, and the stems are float32's."""
    folder, _ = trained
    soundfile.write(
        tmp_path / "song.wav", np.random.default_rng(0).uniform(-1, 1, (9000, 2)), 44100
    )
    older, stems = {"ONEDNN_MAX_CPU_ISA": "AVX2"}, []
    for outdir, amp in (("amp", ["--amp"]), ("plain", [])):
        command = ["test.py", tmp_path / "song.wav", *amp, "--outdir", tmp_path / outdir]
        printed, _ = run_script(*command, cwd=folder, env=older)
        assert printed.count("this CPU has no bfloat16 instructions: --amp is left out") == len(amp)
        stems.append(soundfile.read(tmp_path / outdir / "song" / "vocals.wav")[0])
    assert np.array_equal(*stems)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(trained, musdb_root, tmp_path):
    """On a GPU: the CPU's stems to 60 dB, and a training that runs in bfloat16."""
    folder, _ = trained
    song, stems = musdb_root / "test" / "Test 0" / "mixture.wav", []
    for device in ("cpu", "cuda"):
        flags = ["--outdir", tmp_path / device, "--device", device]
        run_script("test.py", song, *flags, cwd=folder)
        stems.append(soundfile.read(tmp_path / device / "mixture" / "vocals.wav")[0])
    assert sdr(*stems) > 60
    flags = ["--root", musdb_root, *SMALL, "--device", "cuda", "--amp", "--output", tmp_path / "m"]
    printed, _ = run_script("train.py", *flags, cwd=folder)
    assert "bfloat16" in printed and "cuda:0" in printed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(musdb_root, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [str(FOLDER / "train.py"), "--root", str(musdb_root), *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2 processes" in done.stdout, done.stdout + done.stderr


def test_no_ffmpeg_is_needed(trained, tmp_path):
    """With nothing on PATH: a film with AAC sound goes in, and museval can be asked."""
    folder, _ = trained
    empty = tmp_path / "bin"
    empty.mkdir()
    flags = ["--duration", 1, "--outdir", tmp_path / "stems"]
    run_script("test.py", EXCERPT, *flags, cwd=folder, env={"PATH": str(empty)})
    code = "import utils; print(utils.import_museval().__name__)"
    settings = dict(
        cwd=FOLDER, env={**os.environ, "PATH": str(empty)}, capture_output=True, text=True
    )
    done = subprocess.run([sys.executable, "-c", code], **settings)
    assert done.stdout == "museval\n", done.stderr
    assert [*(tmp_path / "stems").rglob("vocals.wav")]
