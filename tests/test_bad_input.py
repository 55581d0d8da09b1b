"""A few hundred malformed inputs: each ends in one clear line and exit code 2, or succeeds; nothing else is touched."""

import hashlib
import io
import os
import shutil
import sys

import numpy as np
import pytest
import soundfile
from conftest import make_model

import eval as eval_script
import test as test_script
import train as train_script
from utils import run

SCRIPTS = {"test.py": test_script, "eval.py": eval_script, "train.py": train_script}


@pytest.fixture()
def call(tmp_path, monkeypatch, capsys):
    """Run a script's main in this process, in tmp_path; check that it succeeds, or complains in one line with code 1 or 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            run(SCRIPTS[script].main)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        err = capsys.readouterr().err
        complaints = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert code in (0, 1, 2), (arguments, code)
        assert (code == 0) == (not complaints), (arguments, code, err)
        assert "Traceback" not in err
        return code, complaints

    return call


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"), targets=("vocals",), hidden_size=8, sample_rate=8000, nfft=256)


def tree(folder):
    """Every file below a folder and its content."""
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def audio_file(kind, subtype=None):
    buffer = io.BytesIO()
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2))
    soundfile.write(buffer, audio, 8000, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("kind,subtype", [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAVEX", "FLOAT"), ("FLAC", None), ("OGG", None), ("AIFF", None)])
def test_audio_cut_and_flipped(kind, subtype, call, tiny_model, tmp_path):
    content = audio_file(kind, subtype)
    rng = np.random.default_rng(1)
    cuts = [content[:end] for end in (0, 3, 4, 8, 11, 12, 16, 20, 22, 24, 28, 32, 36, 40, 43, 44, 46, 60, 200, len(content) // 2, len(content) - 1)]
    flips = []
    for _ in range(20):
        flipped = bytearray(content)
        flipped[rng.integers(80)] ^= 1 << rng.integers(8)
        flips.append(bytes(flipped))
    song, codes = tmp_path / f"song.{kind.lower()[:4]}", []
    for data in cuts + flips:
        song.write_bytes(data)
        codes.append(call("test.py", song, "--model", tiny_model, "--overwrite", "--quiet")[0])
        assert song.read_bytes() == data
        assert not [path for path in tmp_path.rglob("*.part")]
    assert codes.count(2) > 10


@pytest.mark.parametrize("name", ["separator.json", "vocals.json", "vocals.pth"])
def test_model_files_flipped(name, call, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    soundfile.write(tmp_path / "song.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2)), 8000)
    content, rng = (folder / name).read_bytes(), np.random.default_rng(2)
    refused = 0
    for turn in range(60):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (folder / name).write_bytes(flipped if turn % 3 else flipped[: rng.integers(len(content))])
        refused += call("test.py", "song.wav", "--model", folder, "--overwrite", "--quiet")[0] == 2
    assert refused > 15


ODD = ["", "x", "-1", "0", "nan", "inf", "1e400", "99999999999999999999", "é", "[]", "{}", "../x", "/"]


@pytest.mark.parametrize("flag", ["--niter", "--wiener-win-len", "--start", "--duration", "--targets", "--aggregate", "--residual", "--model", "--device", "--ext"])
def test_odd_flags_of_separation(flag, call, tiny_model, tmp_path):
    soundfile.write(tmp_path / "song.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2)), 8000)
    for value in [*ODD, '{"a": 1}', '{"a": ["vocals"], "../b": ["vocals"]}', '{"": ["vocals"]}']:
        model = [] if flag == "--model" else ["--model", tiny_model]
        arguments = ["song.wav", *model, f"{flag}={value}", "--overwrite", "--quiet"]
        if flag == "--niter" and value.startswith("9999"):
            continue  # would iterate as asked
        call("test.py", *arguments)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "stems") and path.name != "song.wav"]


FLAGS = ["--seq-dur", "--samples-per-track", "--nb-workers", "--hidden-size", "--nfft", "--nhop", "--bandwidth", "--nb-channels", "--lr"]
FLAGS += ["--weight-decay", "--patience", "--lr-decay-gamma", "--seed", "--batch-size", "--epochs", "--target", "--source-augmentations"]
FLAGS += ["--model", "--checkpoint", "--arch", "--preset", "--target-file", "--ext"]


@pytest.mark.parametrize("flag", FLAGS)
def test_odd_flags_of_training(flag, call, musdb_root):
    before = tree(musdb_root)
    small = ["--dry-run", "--quiet", "--overwrite", "--hidden-size", 8, "--seq-dur", 0.2, "--nfft", 256, "--nhop", 64, "--batch-size", 2]
    layout = ["--dataset", "trackfolder_var"] if flag in ("--target-file", "--ext") else []
    huge = ("99999999999999999999", "1e400")  # the machine's limits are not ours to test
    values = [v for v in ODD if not (v in huge and flag in ("--seq-dur", "--nb-workers", "--hidden-size", "--nfft", "--samples-per-track", "--seed"))]
    for value in values:
        call("train.py", "--root", musdb_root, *small, *layout, f"{flag}={value}")
    assert tree(musdb_root) == before


@pytest.mark.parametrize("flag", ["--subset", "--method", "--estimates", "--compare", "--workers", "--engine", "--root", "--targets"])
def test_odd_flags_of_evaluation(flag, call, musdb_root, monkeypatch):
    monkeypatch.setenv("MUSDB_PATH", str(musdb_root))
    for value in ODD:
        call("eval.py", "--method", "mixture", f"{flag}={value}")


NAMES = ["a b.wav", "quote'\".wav", "ünï😀.wav", "new\nline.wav", "-dash.wav", "...wav", "%s{0}.wav", "$(touch x).wav", "a.b.c.wav", "UP.WAV", " .wav"]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names(name, call, tiny_model, tmp_path):
    folder = tmp_path / "songs"
    folder.mkdir()
    soundfile.write(folder / name, np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2)), 8000, format="WAV")
    before = tree(folder)
    assert call("test.py", "--model", tiny_model, "--html", "--plot", folder / name)[0] == 0
    assert call("test.py", "--model", tiny_model, "--outdir", "again", folder)[0] == 0
    os.chdir(folder)
    assert call("test.py", "--model", tiny_model, "--outdir", tmp_path / "third", "--", name)[0] == 0
    assert tree(folder) == before
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {"again", "songs", "stems", "third"}
    for outdir in ("stems", "again", "third"):
        stems = [path for path in (tmp_path / outdir).rglob("*.wav") if path.is_file()]
        assert sorted(path.name for path in stems) == ["accompaniment.wav", "vocals.wav"] and len({p.parent for p in stems}) == 1
