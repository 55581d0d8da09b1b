"""The real commands, run as a user would: train, separate, score; and what they say of bad input."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import FOLDER, run_script

SMALL = ("--hidden-size", 16, "--seq-dur", 1, "--samples-per-track", 4, "--batch-size", 4, "--epochs", 2)


@pytest.fixture(scope="module")
def trained(musdb_root, tmp_path_factory):
    """A folder in which `train.py` was run on tiny songs; (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("user")
    printed, _ = run_script("train.py", "--root", musdb_root, *SMALL, cwd=folder)
    return folder, printed


def test_train(trained):
    folder, printed = trained
    assert "7 training tracks, 1 validation tracks" not in printed  # every seventh of eight: two
    assert "6 training tracks, 2 validation tracks, 44100 Hz" in printed
    assert "vocals epoch 2/2  train " in printed
    assert "Next: python test.py SONG.wav --model open-unmix, or python eval.py --model open-unmix" in printed
    model = folder / "open-unmix"
    assert sorted(path.name for path in model.iterdir()) == ["separator.json", "vocals.chkpnt", "vocals.json", "vocals.png", "vocals.pth"]
    assert json.loads((model / "separator.json").read_text()) == {"sample_rate": 44100, "nfft": 4096, "nhop": 1024, "nb_channels": 2}
    record = json.loads((model / "vocals.json").read_text())
    assert record["epochs_trained"] == len(record["train_loss_history"]) == len(record["train_time_history"]) == 2
    assert record["best_loss"] == min(record["valid_loss_history"]) and record["args"]["mask"] == "sigmoid"
    assert len(record["input_statistics"]["mean"]) == 2049


@pytest.mark.parametrize("extension,subtype", [("wav", "PCM_16"), ("flac", "PCM_16"), ("ogg", "VORBIS"), ("mp3", "MPEG_LAYER_III")])
def test_separate(trained, extension, subtype, tmp_path):
    folder, _ = trained
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, (50_000, 2))
    song = tmp_path / f"a song.{extension}"
    soundfile.write(song, audio, 44100, subtype=subtype)
    printed, _ = run_script("test.py", song, "--outdir", tmp_path / "stems", cwd=folder)
    stems = {path.stem: soundfile.read(path) for path in (tmp_path / "stems" / "a song").iterdir()}
    assert sorted(stems) == ["accompaniment", "vocals"]  # one target: the rest is written too
    length = soundfile.info(song).frames
    assert all(stem.shape == (length, 2) and rate == 44100 for stem, rate in stems.values())
    mixture = soundfile.read(song)[0]
    error = mixture - stems["vocals"][0] - stems["accompaniment"][0]
    assert np.sqrt((error**2).mean()) < 1e-3 * np.sqrt((mixture**2).mean())
    assert "a song: vocals, accompaniment; " in printed and "Next: " in printed


def test_evaluate(trained, musdb_root):
    folder, _ = trained
    printed, _ = run_script("eval.py", "--root", musdb_root, cwd=folder)
    for name in ("Test 0", "Test 1"):
        for place in ("scores/open-unmix", "scores/open-unmix/mixture"):
            scores = json.loads((folder / place / "test" / f"{name}.json").read_text())
            assert [target["name"] for target in scores["targets"]] == ["vocals", "accompaniment"]
            assert [frame["time"] for frame in scores["targets"][0]["frames"]] == [0, 1, 2]
    lines = [line.split() for line in printed.splitlines()]
    medians = {tuple(line[:2]): float(line[2]) for line in lines if len(line) == 9 and line[0] in ("vocals", "accompaniment")}
    assert set(medians) == {(t, m) for t in ("vocals", "accompaniment") for m in ("open-unmix", "mixture")}
    frames = [
        np.median([f["metrics"]["SDR"] for f in json.loads(path.read_text())["targets"][0]["frames"]])
        for path in sorted((folder / "scores" / "open-unmix" / "test").glob("*.json"))
    ]
    assert medians["vocals", "open-unmix"] == pytest.approx(np.median(frames), abs=0.01)


def test_dry_run(musdb_root, tmp_path):
    printed, _ = run_script("train.py", "--root", musdb_root, "--dry-run", "--hidden-size", 16, "--preset", "tutorial", cwd=tmp_path)
    assert "preset tutorial: --epochs 20 " in printed and "epoch 1/20" in printed
    assert (tmp_path / "open-unmix" / "vocals.pth").exists()


@pytest.mark.parametrize("script", ["train.py", "test.py", "eval.py"])
def test_help(script, tmp_path):
    printed, _ = run_script(script, "--help", cwd=tmp_path)
    assert f"python {script}" in printed and "torchrun" in printed
    flags = [line for line in printed.splitlines() if line.startswith("  --")]
    assert len(flags) >= 15


def test_data_of_first_run_without_network(tmp_path):
    """The way to synthesized songs: one clear line, within seconds."""
    code = (
        "import time, data; data.musdb_settings()['sample-url'] = 'http://127.0.0.1:9/sample.zip'; data.SONGS.update(train=2, test=1);"
        "start = time.time(); root = data.find_data(); print(root.name, len(list(root.glob('*/*/mixture.wav'))), time.time() - start < 30)"
    )
    import os
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "127.0.0.1:9" in lines[0] and "Synthesized songs are used instead" in lines[0], done.stderr
    assert lines[-1] == "synthetic-30s 4 True"  # three songs, and the real excerpt


@pytest.mark.parametrize(
    "command,message",
    [
        (["test.py", "missing.wav"], "missing.wav: no such file"),
        (["test.py", "text.wav"], "text.wav: is not audio that can be read"),
        (["test.py", "song.wav", "--model", "nowhere"], "nowhere: no such model or folder"),
        (["test.py", "song.wav", "--model", "empty"], "empty: has no separator.json: it is not a model folder"),
        (["test.py", "song.wav", "--targets", "piano"], "has no target 'piano'; it has vocals"),
        (["test.py", "song.wav", "--duration", "-1"], "--duration: -1 is out of range"),
        (["test.py"], "the following arguments are required: input"),
        (["train.py", "--root", "empty"], "empty/train: no track folder with mixture.wav"),
        (["train.py", "--root", "nowhere"], "nowhere: no such folder"),
        (["train.py", "--root", "ROOT", "--target", "piano"], "--target piano: no such source in the data; it has bass, drums, other, vocals"),
        (["train.py", "--root", "ROOT", "--batch-size", "0"], "--batch-size: 0 is out of range"),
        (["train.py", "--root", "ROOT", "--nhop", "4096"], "--nhop 4096: must be at most half of --nfft"),
        (["train.py", "--checkpoint", "empty"], "--checkpoint empty: holds no training"),
        (["eval.py", "--root", "empty"], "empty/test: no track folder with mixture.wav"),
        (["eval.py", "--root", "ROOT", "--workers", "x"], "--workers: invalid int value: 'x'"),
        (["eval.py", "--root", "ROOT", "--estimates", "empty"], "no stems there"),
        (["eval.py", "--root", "ROOT", "--compare", "empty"], "--compare empty: no museval JSON there"),
    ],
)
def test_bad_input_is_one_line(command, message, trained, musdb_root):
    folder, _ = trained
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "text.wav").write_text("this is no audio\n" * 100)
    soundfile.write(folder / "song.wav", np.zeros((1000, 2)), 44100)
    command = [str(musdb_root) if word == "ROOT" else word for word in command]
    _, complaint = run_script(*command, cwd=folder, code=2)
    lines = [line for line in complaint.splitlines() if not line.startswith("tracks:") and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], complaint
    shutil.rmtree(folder / "stems", ignore_errors=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(trained, musdb_root, tmp_path):
    """On a GPU: the same stems as on the CPU to 60 dB, and a training that runs in bfloat16."""
    from conftest import sdr

    folder, _ = trained
    song = musdb_root / "test" / "Test 0" / "mixture.wav"
    for device in ("cpu", "cuda"):
        run_script("test.py", song, "--outdir", tmp_path / device, "--device", device, cwd=folder)
    stems = [soundfile.read(tmp_path / device / "mixture" / "vocals.wav")[0] for device in ("cpu", "cuda")]
    assert sdr(*stems) > 60
    printed, _ = run_script("train.py", "--root", musdb_root, *SMALL, "--device", "cuda", "--amp", "--output", tmp_path / "m", cwd=folder)
    assert "bfloat16" in printed
