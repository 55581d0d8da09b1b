"""Every flag of the three scripts does something: a tiny run with it differs from one without.

A row reads: what the script is given in both runs, the flag, what one looks at, and what one finds
there with the flag. Without it one must find something else. A flag that has no row fails
`test_every_flag_has_a_row`; hence this file is for maintainers (`python -m pytest -m maintainer`).
"""

import contextlib
import functools
import io
import itertools
import json
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile
import test
import torch
from conftest import InThisProcess, make_model, write_song

import eval as evaluation
import train
import utils
from utils import Parser, load, save

pytestmark = pytest.mark.maintainer
norbert = pytest.importorskip("norbert")
SCRIPTS = {"train.py": train, "test.py": test, "eval.py": evaluation}
DIFFERENT = object()  # what is found with the flag: anything but what is found without


# ------------------------------------------------------------------------------ what one looks at


def code(seen):
    return seen.code


def says(text):
    return lambda seen: text in seen.printed + seen.complaint


def exists(path):
    return lambda seen: (seen.folder / path).exists()


def weights(seen):
    return {name: value.tolist() for name, value in seen.network.state_dict().items()}


def example(seen):
    """The first training example: mixture and target."""
    return [waveform.tolist() for waveform in seen.example]


def optimizer(name):
    return lambda seen: seen.state["optimizer"].param_groups[0][name]


def record(seen):
    return load(seen.folder / "open-unmix" / "vocals.json")


def statistics(seen):
    return seen.statistics


def rates(seen):
    """The learning rate of each epoch."""
    return record(seen)["lr_history"]


def stems(seen):
    return sorted(path.name for path in (seen.folder / "stems" / "song").glob("*.wav"))


def vocals(seen, outdir="stems"):
    return soundfile.read(seen.folder / outdir / "song" / "vocals.wav")[0].tolist()


def scores(seen):
    """What museval's JSON of each track says of its targets; as text, in which NaN equals NaN."""
    paths = sorted(seen.folder.glob(f"scores/model/{seen.method}test/*.json"))
    return json.dumps([load(path)["targets"] for path in paths])


def scored(seen):
    return [target["name"] for target in json.loads(scores(seen))[0]]


# ------------------------------------------------------------------------------ the tables

# fmt: off
SMALL = "--root data --hidden-size 8 --nfft 256 --nhop 64 --seq-dur 0.2 --samples-per-track 4 --batch-size 2"
SMALL += " --epochs 5 --device cpu"
LARGE = "--root data --seq-dur 0.2 --samples-per-track 1 --batch-size 2 --epochs 1 --device cpu"
TUNE = "--root data --seq-dur 0.2 --samples-per-track 1 --batch-size 2 --dry-run --device cpu"
TRAIN = f"{SMALL} --dry-run"
FIX, VAR = f"{TRAIN} --dataset trackfolder_fix", f"{TRAIN} --dataset trackfolder_var"
ALIGNED, SOURCES = f"{TRAIN} --dataset aligned", f"{TRAIN} --dataset sourcefolder --root sources"
TEST = "--model model --device cpu song.wav"
EVAL = "--root data --model model --device cpu --method model --targets vocals drums"
FLOOR = "--root data --model model --device cpu --method mixture --dataset"
# on a CPU without bfloat16 instructions nothing but a line tells
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
LEFT_OUT = says("--amp is left out"), True

ROWS = {
    "train.py": [
        # data
        (TRAIN, "--dataset trackfolder_fix", says("3 training tracks, 2 validation tracks"), True),  # of train/, valid/
        (TRAIN, "--root more", says("5 training tracks, 1 validation tracks"), True),
        ("--root nowhere", "--download musdb18", says("4.7 GB to fetch"), True),  # from nobody
        (f"{TRAIN} --root both", "--is-wav", code, 0),  # its stem file cannot be decoded
        (f"{TRAIN} --root undecoded", "--cache decoded", code, 0),
        (TRAIN, "--target drums", exists("open-unmix/drums.pth"), True),
        (f"{FIX} --interferer-files bass.wav", "--target-file drums.wav", exists("open-unmix/drums.pth"), True),
        (FIX, "--interferer-files bass.wav", statistics, DIFFERENT),
        (FIX, "--random-track-mix", example, DIFFERENT),
        (VAR, "--random-interferer-mix", example, DIFFERENT),
        (f"{VAR} --root lacking", "--silence-missing", says("2 training tracks"), True),
        (f"{SOURCES} --interferer-dirs bass", "--target-dir drums", exists("open-unmix/drums.pth"), True),
        (SOURCES, "--interferer-dirs bass", statistics, DIFFERENT),
        (SOURCES, "--ext .flac", says("no files *.flac there"), True),
        (ALIGNED, "--input-file drums.wav", statistics, DIFFERENT),
        (ALIGNED, "--output-file bass.wav", exists("open-unmix/bass.pth"), True),
        (TRAIN, "--seq-dur 0.5", lambda seen: seen.batches[0], (2, 2, 4000)),
        (TRAIN, "--samples-per-track 10", lambda seen: seen.steps, 10),  # two tracks in batches of two
        (TRAIN.replace("--samples-per-track 4", ""), "--samples-per-epoch 6", lambda seen: seen.steps, 3),
        (TRAIN, "--source-augmentations", example, DIFFERENT),
        (TRAIN, "--nb-workers 1", lambda seen: seen.workers, 1),
        # model
        (TRAIN, "--arch conv", lambda seen: type(seen.network).__name__, "ConvUnmix"),
        (f"{TRAIN} --arch conv", "--arch-options nb_layers=2", lambda seen: seen.network.made_with.get("nb_layers"), 2),
        (TRAIN, "--mask relu", weights, DIFFERENT),
        (TRAIN, "--mask-start 0.25", weights, DIFFERENT),
        (TRAIN, "--dropout 0.1", lambda seen: seen.network.lstm.dropout, 0.1),
        (TRAIN, "--hidden-size 16", lambda seen: seen.network.fc1.out_features, 16),
        (TRAIN, "--unidirectional", lambda seen: seen.network.lstm.bidirectional, False),
        (TRAIN, "--nfft 512", lambda seen: seen.network.nb_bins, 257),
        (TRAIN, "--nhop 32", statistics, DIFFERENT),
        (TRAIN, "--sample-rate 4000", lambda seen: seen.batches[0], (2, 2, 800)),
        (TRAIN, "--bandwidth 1000", lambda seen: seen.network.max_bin, 33),  # one every 31.25 Hz
        (TRAIN, "--nb-channels 1", lambda seen: seen.network.nb_channels, 1),
        (TUNE, "--model model", lambda seen: seen.network.made_with["mask"], "relu"),
        # training
        (TRAIN, "--preset tutorial", optimizer("lr"), 0.002),
        (TRAIN, "--preset best", weights, DIFFERENT),
        (TRAIN, "--loss xumx", weights, DIFFERENT),
        (TRAIN, "--loss log_mse", weights, DIFFERENT),
        (SMALL, "--epochs 2", lambda seen: len(rates(seen)), 2),
        (TRAIN, "--batch-size 3", lambda seen: seen.batches[0], (3, 2, 1600)),
        (TRAIN, "--lr 0.5", weights, DIFFERENT),
        (TRAIN, "--weight-decay 0.5", weights, DIFFERENT),
        (SMALL, "--schedule cosine", rates, pytest.approx([0.001, 0.000905, 0.000655, 0.000345, 0.000095], abs=1e-6)),
        (SMALL, "--patience 2", lambda seen: len(rates(seen)), 3),  # the validation losses only rise
        (SMALL, "--lr-decay-patience 1", rates, pytest.approx([0.001] * 3 + [0.0003] * 2)),
        (f"{SMALL} --lr-decay-patience 1", "--lr-decay-gamma 0.5", rates, pytest.approx([0.001] * 3 + [0.0005] * 2)),
        (TRAIN, "--seed 1", weights, DIFFERENT),
        (SMALL, "--select sdr", lambda seen: record(seen)["best_epoch"], 5),
        (TRAIN, "--amp", *((weights, DIFFERENT) if BFLOAT16 else LEFT_OUT)),
        (TRAIN, "--device nosuch", says("no such device"), True),
        # output
        (TRAIN, "--output mine", exists("mine/vocals.pth"), True),
        (f"{TRAIN} --output earlier", "--overwrite", exists("earlier/previous"), False),
        (LARGE, "--checkpoint earlier", says("all its trainings are finished"), True),
        (TRAIN, "--quiet", lambda seen: (seen.printed.count("\n"), seen.complaint == ""), (1, True)),
        (TRAIN, "--tensorboard", exists("open-unmix/vocals.tensorboard"), True),
        (SMALL, "--dry-run", lambda seen: len(seen.batches), 2),  # one to train, one to validate
    ],
    "test.py": [
        (TEST, "other.wav", exists("stems/other/vocals.wav"), True),
        (TEST, "--outdir mine", exists("mine/song/vocals.wav"), True),
        (TEST, "--ext flac", exists("stems/song/vocals.flac"), True),
        (f"{TEST} --outdir done", "--overwrite", lambda seen: len(vocals(seen, "done")), 12000),
        (TEST, "--start 0.5", lambda seen: len(vocals(seen)), 8000),
        (TEST, "--duration 0.5", lambda seen: len(vocals(seen)), 4000),
        (TEST, "--html", exists("stems/song/index.html"), True),
        (TEST, "--plot", exists("stems/song/spectrograms.png"), True),
        (TEST, "--page", says("is not used with --page"), True),
        (TEST, "--quiet", lambda seen: seen.complaint == "", True),  # where the progress bar is
        ("--model model", "--export model.onnx", exists("model.onnx"), True),
        (TEST, "--model other", vocals, DIFFERENT),
        (TEST, "--targets vocals drums", stems, ["drums.wav", "vocals.wav"]),
        (TEST, "--niter 2", vocals, DIFFERENT),
        (TEST, "--wiener-win-len 20", vocals, DIFFERENT),
        (TEST, "--wiener norbert", lambda seen: seen.norbert, True),
        (TEST, "--softmask", vocals, DIFFERENT),
        (TEST, "--residual rest", exists("stems/song/rest.wav"), True),
        (TEST, """--aggregate '{"band": ["drums", "bass"]}'""", stems, ["band.wav"]),
        (TEST, "--amp", *((vocals, DIFFERENT) if BFLOAT16 else LEFT_OUT)),
        (TEST, "--device nosuch", says("no such device"), True),
    ],
    "eval.py": [
        (EVAL, "--root more", lambda seen: seen.printed.count("Test 1"), 0),  # it has one track only
        (EVAL, "--dataset synthetic", says("is no synthesized song"), True),
        (f"{EVAL} --root both", "--is-wav", code, 0),
        (f"{EVAL} --root undecoded", "--cache decoded", code, 0),
        (f"{FLOOR} aligned --output-file bass.wav", "--input-file drums.wav", scores, DIFFERENT),
        (f"{FLOOR} aligned --output-file bass.wav", "--output-file drums.wav", scored, ["drums"]),
        (f"{FLOOR} trackfolder_fix --interferer-files drums.wav", "--target-file bass.wav", scored, ["drums", "bass"]),
        (f"{FLOOR} trackfolder_fix", "--interferer-files bass.wav", scored, ["bass", "vocals", "accompaniment"]),
        (f"{FLOOR} trackfolder_var", "--ext .flac", says("see --ext"), True),
        (f"{FLOOR} trackfolder_var --root lacking", "--silence-missing", code, 0),
        (EVAL, "--subset train", exists("scores/model/train/Song 0.json"), True),
        (EVAL, "--method irm", exists("scores/model/irm/test/Test 0.json"), True),
        (EVAL, "--estimates estimates", exists("scores/estimates/test/Test 0.json"), True),
        (EVAL, "--engine museval", scores, DIFFERENT),  # whose filters are longer
        (EVAL, "--workers 2", lambda seen: seen.workers, 2),
        (EVAL, "--evaldir mine", exists("mine/test/Test 0.json"), True),
        (EVAL, "--outdir kept", exists("kept/test/Test 0/vocals.wav"), True),
        (EVAL, "--compare others", exists("scores/model/compare/vocals-SDR.png"), True),
        (EVAL, "--csv scores.csv", exists("scores.csv"), True),
        (EVAL, "--model other", exists("scores/other/test/Test 0.json"), True),
        (EVAL, "--targets drums", scored, ["drums", "residual"]),
        (EVAL, "--niter 2", scores, DIFFERENT),
        (EVAL, "--wiener-win-len 20", scores, DIFFERENT),
        (EVAL, "--wiener norbert", lambda seen: seen.norbert, True),
        (EVAL, "--softmask", scores, DIFFERENT),
        (EVAL, "--residual rest", scored, ["vocals", "drums", "rest"]),
        (EVAL, """--aggregate '{"both": ["vocals", "drums"]}'""", scored, ["both"]),
        (EVAL, "--amp", *((scores, DIFFERENT) if BFLOAT16 else LEFT_OUT)),
        (EVAL, "--device nosuch", says("no such device"), True),
    ],
}
# fmt: on

# ------------------------------------------------------------------------------ data and runs


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What the tables name: songs of 1.5 s at 8 kHz, models, and what earlier runs have left."""
    folder = tmp_path_factory.mktemp("material")

    def songs(*paths):
        for path in paths:
            write_song(folder / path, 1.5, rate=8000, seed=int(path[-1]))

    songs(*(f"data/train/Song {n}" for n in range(3)), "data/valid/Song 3", "data/valid/Song 4")
    songs("data/test/Test 0", "data/test/Test 1")
    songs(*(f"more/train/Song {n}" for n in range(6)), "more/test/Test 0")
    songs("lacking/train/Song 0", "lacking/train/Song 1", "lacking/valid/Song 3")
    songs("lacking/test/Test 0", "lacking/test/Test 1")
    for track in ("train/Song 1", "test/Test 1"):
        (folder / "lacking" / track / "vocals.wav").unlink()
    for root in ("both", "decoded"):
        shutil.copytree(folder / "data", folder / root)
    for path in ["both/train/Damaged", *(folder / "data").glob("t*/*")]:
        stem = Path(f"{folder / path}.stem.mp4".replace("/data/", "/undecoded/"))
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.touch()
        origin = {"path": str(stem), "stamp": utils.stamp(stem)}
        save(origin, Path(str(folder / path).replace("/data/", "/decoded/"), "source.json"))
    shutil.rmtree(folder / "both" / "train" / "Damaged")
    for name in ("vocals", "drums", "bass", "other"):
        for split in ("train", "valid"):
            place = folder / "sources" / split / name
            place.mkdir(parents=True)
            shutil.copy(folder / "data" / "train" / "Song 0" / f"{name}.wav", place)
    shutil.copytree(folder / "data" / "test", folder / "estimates" / "test")
    for name, seed in (("model", 0), ("other", 9)):
        make_model(folder / name, hidden_size=8, sample_rate=8000, nfft=256, seed=seed)
    for name in ("song", "other"):
        shutil.copy(folder / "data" / "test" / "Test 0" / "mixture.wav", folder / f"{name}.wav")
    (folder / "done" / "song").mkdir(parents=True)
    soundfile.write(folder / "done" / "song" / "vocals.wav", np.zeros((5, 2)), 8000)
    frame = {"time": 0.0, "duration": 1.0, "metrics": dict.fromkeys(evaluation.METRICS, 1.0)}
    theirs = {"targets": [{"name": "vocals", "frames": [frame]}]}
    save(theirs, folder / "others" / "test" / "Test 0.json")
    return folder


@pytest.fixture(scope="module")
def call(material, tmp_path_factory):
    """Run a script's main in this process, where the material lies; returns what can be seen."""

    def call(script, command):
        folder = tmp_path_factory.mktemp("run")
        for path in material.iterdir():
            if path.name in ("earlier", "done"):  # these are written to
                shutil.copytree(path, folder / path.name)
            else:
                (folder / path.name).symlink_to(path)
        epoch, loss = mock.Mock(wraps=train.train), mock.Mock(wraps=train.mse_loss)
        pool, wiener = mock.Mock(wraps=InThisProcess), mock.Mock(wraps=norbert.wiener)
        rising = ({"valid_loss": float(n), "valid_SDR": float(n)} for n in itertools.count())
        code, printed, complaint = 0, io.StringIO(), io.StringIO()
        seen = SimpleNamespace(folder=folder, method="mixture/" * ("--method mixture" in command))

        def input_statistics(*arguments, real=train.input_statistics):
            seen.statistics = real(*arguments)
            return seen.statistics

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("HOME", str(folder))
            patch.setenv(utils.MIRROR, "http://127.0.0.1:9")
            patch.setattr(sys, "argv", [script, *shlex.split(command)])
            patch.setattr(train, "train", epoch)
            patch.setitem(train.LOSSES, "mse", loss)
            patch.setattr(train, "input_statistics", input_statistics)
            if "--dry-run" not in command:  # losses that only rise, to see what patience does
                patch.setattr(train, "validate", lambda *_: next(rising))
            patch.setattr(train, "plot_curves", lambda *_: None)  # would take most of the time
            patch.setattr(train, "try_nothing", lambda *_: None)
            patch.setattr(norbert, "wiener", wiener)
            patch.setattr(evaluation, "ProcessPoolExecutor", pool)
            patch.setattr(evaluation, "DELAYS", 16)  # 512 would take a second for each track
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
                try:
                    utils.run(SCRIPTS[script].main)
                except SystemExit as end:
                    code = end.code
            seen.code, seen.printed, seen.complaint = code, printed.getvalue(), complaint.getvalue()
            if epoch.called:
                seen.network, seen.state, loader, *_ = epoch.call_args.args
                seen.steps, seen.workers = len(loader), loader.num_workers
                seen.example = loader.dataset[0]
                seen.batches = [tuple(called.args[1].shape) for called in loss.call_args_list]
            if pool.called:
                seen.workers = pool.call_args.args[0]
            seen.norbert = wiener.called
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which `run` has changed
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        return seen

    earlier = call("train.py", f"{SMALL} --epochs 1 --output earlier").folder / "earlier"
    shutil.copytree(earlier, material / "earlier")
    return functools.cache(call)


# ------------------------------------------------------------------------------ the tests


def flag_of(row):
    flag = row[1].split()[0]
    return flag if flag.startswith("--") else "input"


CASES = [
    pytest.param(script, *row, id=f"{script} {flag_of(row)}")
    for script, rows in ROWS.items()
    for row in rows
]


@pytest.mark.parametrize("script,command,flag,look,found", CASES)
def test_flag(script, command, flag, look, found, call):
    without, with_flag = call(script, command), call(script, f"{command} {flag}")
    assert look(with_flag) != look(without)
    if found is DIFFERENT:
        assert without.code == with_flag.code == 0
    else:
        assert look(with_flag) == found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_row(script, monkeypatch):
    parsers, parse_args = [], Parser.parse_args
    watch = lambda parser, *rest: parsers.append(parser) or parse_args(parser, *rest)  # noqa: E731
    monkeypatch.setattr(Parser, "parse_args", watch)
    SCRIPTS[script].parse_args(["song.wav"] if script == "test.py" else [])
    options = {(action.option_strings or [action.dest])[-1] for action in parsers[0]._actions}
    options = {option.replace("--no-", "--") for option in options}
    assert options - {"--help"} == {flag_of(row) for row in ROWS[script]}


@pytest.mark.parametrize(
    "script,plain", [("train.py", TRAIN), ("test.py", TEST), ("eval.py", EVAL)]
)
def test_no_difference_without_a_flag(script, plain, call):
    """The same command twice: nothing that a row looks at differs by chance."""
    once, again = call(script, plain), call(script, f"{plain} ")
    for row in ROWS[script]:
        assert once.code == 0 and row[2](once) == row[2](again), flag_of(row)
