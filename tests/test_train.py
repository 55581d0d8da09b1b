"""train.py: exact resume, several processes, what is kept and said; on tiny songs and small networks."""

import functools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import FOLDER, make_model

import train
from model import ConvUnmix, OpenUnmix, load_networks, load_separator
from utils import UserError, load, run, save

SMALL = ["--hidden-size", 16, "--nfft", 512, "--nhop", 128, "--seq-dur", 0.5, "--samples-per-track", 2, "--batch-size", 4]
HISTORIES = ("train_loss_history", "valid_loss_history", "lr_history")


@pytest.fixture()
def call(tmp_path, monkeypatch, capsys, musdb_root):
    """Run train.py's main in this process and in tmp_path; returns (exit code, stdout, stderr). --root is the tiny songs."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, small=SMALL):
        data = [] if "--checkpoint" in arguments else ["--root", musdb_root, *small]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*data, *arguments])])
        try:
            run(train.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def checkpoint(folder, target="vocals"):
    return torch.load(Path(folder, f"{target}.chkpnt"), weights_only=True)


def equal(a, b, ignore=("args", "train_time_history")):
    """Whether two checkpoints hold the same to the bit, but for the seconds that epochs took."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key not in ignore)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---------------------------------------------------------------------------------------------- real processes

PROCESSES = multiprocessing.get_context("forkserver")  # each is forked from one that has imported train.py already
PROCESSES.set_forkserver_preload(["train"])
START = """
import multiprocessing, os, sys, train
os.dup2(os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), os.dup2(1, 2)
multiprocessing.set_start_method("fork", force=True)
os.chdir({folder!r})
os.environ.update({environment!r})
train.torch.set_num_threads(1)
sys.argv = {command!r}
{first}
train.run(train.main)
"""


def start(folder, *arguments, first="", **environment):
    """Begin `python train.py ...` in a process of its own, after the code `first`; what it says goes to folder/log."""
    command, log = ["train.py", *map(str, arguments)], str(folder / "log")
    code = START.format(log=log, folder=str(folder), environment=environment, command=command, first=first)
    process = PROCESSES.Process(target=exec, args=(code, {"__name__": "started"}))
    process.start()
    return process


def finish(*processes, timeout=60):
    for process in processes:
        process.join(timeout)
        assert process.exitcode is not None, "still running"
    return [process.exitcode for process in processes]


BUSY = [*SMALL, "--epochs", 6, "--lr", 5, "--lr-decay-patience", 0]  # the rate falls, the best epoch is not the last


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, musdb_root):
    """(checkpoint, weights) of a training in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(folder, "--root", musdb_root, *BUSY)) == [0]
    found = checkpoint(folder / "open-unmix")
    assert found["epochs_trained"] == 6 and len(set(found["lr_history"])) > 1, found["valid_loss_history"]
    return found, load(folder / "open-unmix" / "vocals.pth")


def go_on(folder, musdb_root, *arguments, first=""):
    """Start or continue the training of `uninterrupted`, whichever it is time for."""
    if (folder / "open-unmix" / "vocals.chkpnt").exists():
        return start(folder, "--checkpoint", "open-unmix", first=first)
    return start(folder, "--root", musdb_root, *BUSY, *arguments, first=first)


def assert_same(folder, uninterrupted):
    assert equal(checkpoint(folder), uninterrupted[0])
    assert equal(load(folder / "vocals.pth"), uninterrupted[1])
    record = json.loads((folder / "vocals.json").read_text())
    assert all(record[name] == uninterrupted[0][name] for name in (*HISTORIES, "best_loss", "best_epoch", "epochs_trained"))
    assert len(record["train_time_history"]) == 6


@pytest.mark.parametrize("workers,interruption", [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_interrupted_at_random_moments(workers, interruption, uninterrupted, musdb_root, tmp_path):
    """Killed and interrupted several times, the training ends with the same bits."""
    rng, file, codes = random.Random(workers), tmp_path / "open-unmix" / "vocals.chkpnt", []
    for number in (signal.SIGKILL, interruption, signal.SIGKILL):
        before = file.exists() and file.stat().st_mtime_ns
        process = go_on(tmp_path, musdb_root, "--nb-workers", workers)
        while process.exitcode is None and (not file.exists() or file.stat().st_mtime_ns == before):
            time.sleep(0.002)  # until it has got on, and a little further
        time.sleep(rng.uniform(0, 2) * min(uninterrupted[0]["train_time_history"]))
        os.kill(process.pid, number)
        codes += finish(process)
    assert codes == [-signal.SIGKILL, 130, -signal.SIGKILL]
    assert finish(go_on(tmp_path, musdb_root)) == [0]
    assert_same(tmp_path / "open-unmix", uninterrupted)


KILLED = """
import signal, pathlib
calls, write, replace = [0], pathlib.Path.write_bytes, os.replace
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(path, content):
    calls[0] += 1
    write(path, content[:len(content) // 2] if calls[0] == {number} else content)
    calls[0] == {number} and kill()
def replace_and_kill(*paths):
    calls[0] += 1
    replace(*paths)
    calls[0] == {number} and kill()
{patch}
"""


def test_killed_while_writing(uninterrupted, musdb_root, tmp_path):
    """Whichever file is half written, or was just renamed, when the process is killed: the next one goes on."""
    half, after = "pathlib.Path.write_bytes = half", "os.replace = replace_and_kill"
    for patch, number in ((half, 2), (after, 2), (half, 1), (after, 3)):
        process = go_on(tmp_path, musdb_root, first=KILLED.format(number=number, patch=patch))
        assert finish(process) == [-signal.SIGKILL]
    assert finish(go_on(tmp_path, musdb_root)) == [0]
    assert_same(tmp_path / "open-unmix", uninterrupted)
    assert not list((tmp_path / "open-unmix").glob(".*")) and not (tmp_path / "open-unmix" / "previous").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_says_how_to_go_on(number, musdb_root, tmp_path):
    process = start(tmp_path, "--root", musdb_root, *SMALL, "--output", "my model", "--epochs", 1000)
    while not (tmp_path / "my model" / "vocals.json").exists():
        assert process.exitcode is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert finish(process) == [130]
    log = (tmp_path / "log").read_text()
    assert "interrupted; my model/vocals.chkpnt holds all but this epoch" in log
    assert "continue with: python train.py --checkpoint 'my model'" in log and "Traceback" not in log


# ---------------------------------------------------------------------------------------------- several processes

NO_DROPOUT = """
import model
made = model.OpenUnmix.__init__
def make(self, *args, **kwargs):
    made(self, *args, **kwargs)
    self.lstm.dropout = 0.0
model.OpenUnmix.__init__ = make
"""


def train_in(processes, folder, *arguments, first=""):
    """Train in several processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if processes > 1 else {}
    ranks = [dict(world, RANK=str(rank), LOCAL_RANK=str(rank)) if world else {} for rank in range(processes)]
    return [start(folder, *arguments, first=first, **rank) for rank in ranks]


@pytest.mark.parametrize("arch,parts", [("blstm", [(2, 4)]), ("conv", [(3, 1), (1, 2), (2, 4)])])
def test_processes_share_a_training(arch, parts, musdb_root, tmp_path):
    """Two processes have the losses of one to 1e-5 over several epochs, as has a training that changes their number."""
    flags = ["--root", musdb_root, *SMALL, "--batch-size", 5, "--arch", arch]
    for name, steps in (("one", [(1, 4)]), ("several", parts)):
        for processes, epochs in steps:
            command = ["--checkpoint", name] if (tmp_path / name).exists() else [*flags, "--output", name]
            started = train_in(processes, tmp_path, *command, "--epochs", epochs, first=NO_DROPOUT if arch == "blstm" else "")
            assert finish(*started) == [0] * processes, (tmp_path / "log").read_text()
    one, several = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "several")
    for history in HISTORIES:
        np.testing.assert_allclose(several[history], one[history], rtol=1e-5, err_msg=history)
    np.testing.assert_allclose(several["input_statistics"]["scale"], one["input_statistics"]["scale"], rtol=1e-9)
    log = (tmp_path / "log").read_text()
    assert log.count("vocals epoch 4/4  train") == 2  # only the first process prints
    assert "2 processes" in log and "Warning" not in log


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux to find the processes")
def test_torchrun_and_a_lost_process(musdb_root, tmp_path):
    """A process that is killed ends the job: one line of ours says how to go on, and the checkpoint is whole."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(FOLDER / "train.py")]
    command += map(str, ["--root", musdb_root, *SMALL, "--epochs", 1000])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = iter(job.stdout.readline, "")
    assert any("vocals epoch 1/1000  train" in line for line in lines), job.communicate()
    processes = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(processes) == 2
    os.kill(int(processes[1]), signal.SIGKILL)
    _, complaint = job.communicate(timeout=60)
    assert job.returncode != 0
    # which one depends on who tells the other process first: its lost connection, or torchrun, which ends it
    said = r"(error: another process of this training ended|interrupted; \S+ holds all but this epoch)"
    assert re.search(said + "; continue with: torchrun ... ", complaint), complaint
    assert not any(f'File "{path}"' in complaint for path in FOLDER.glob("*.py"))  # no traceback of ours
    found = checkpoint(tmp_path / "open-unmix")
    assert found["epochs_trained"] == len(found["valid_loss_history"]) >= 1


def test_batches_are_shared_out(monkeypatch):
    """Each step's examples are the same for any number of processes, each once in an epoch; epochs differ."""

    def epochs(world):
        shares = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", str(world))
            batches, share = train.EpochBatches(23, 5, seed=3), []
            for batches.epoch in range(3):
                share.append(list(batches))
            shares.append(share)
        return [[sorted(sum(step, [])) for step in zip(*epoch)] for epoch in zip(*shares)]

    assert epochs(1) == epochs(2) == epochs(5)
    for number, epoch in enumerate(epochs(1)):
        examples = sum(epoch, [])
        assert len(examples) == len(set(examples)) == 20 and set(examples) < set(range(23 * number, 23 * number + 23))
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match="--batch-size 5: is less than the number of processes, 6"):
        train.EpochBatches(23, 5, seed=3)


# ---------------------------------------------------------------------------------------------- continuing


def test_checkpoint_keeps_the_flags(call):
    flags = [
        "--seed",
        7,
        "--unidirectional",
        "--weight-decay",
        0.01,
        "--source-augmentations",
        "gain",
        "--target",
        "bass",
        "drums",
        "--mask",
        "relu",
    ]
    assert call(*flags, "--epochs", 1)[0] == 0
    code, printed, _ = call("--checkpoint", "open-unmix", "--epochs", 2, "--lr", 1e-4, "--weight-decay", 0)
    assert code == 0 and "bass epoch 2/2" in printed and "drums epoch 2/2" in printed and "epoch 1/2" not in printed
    for target in ("bass", "drums"):
        found = checkpoint("open-unmix", target)
        args = found["args"]
        assert (args["seed"], args["unidirectional"], args["mask"], args["target"]) == (7, True, "relu", ["bass", "drums"])
        assert args["source_augmentations"] == ["gain"] and args["sample_rate"] == 44100 and args["checkpoint"] == "open-unmix"
        assert found["lr_history"] == [0.001, 1e-4] and found["epochs_trained"] == 2
        assert found["optimizer"]["param_groups"][0]["weight_decay"] == 0  # given by hand
    assert call("--checkpoint", "open-unmix", "--epochs", 2)[1].count("epoch") == 0  # nothing left to do
    assert call("--checkpoint", "open-unmix", "--epochs", 3, "--amp")[1].startswith("cpu (1 threads), bfloat16")
    assert call("--checkpoint", "open-unmix", "--epochs", 4, "--no-amp")[1].startswith("cpu (1 threads), float32")


def test_determinism(call):
    """The same final validation loss, and the same weights, twice."""
    for output in ("a", "b"):
        assert call("--output", output, "--epochs", 2)[0] == 0
    assert equal(checkpoint("a"), checkpoint("b"))
    assert call("--output", "c", "--epochs", 2, "--seed", 1)[0] == 0
    assert checkpoint("a")["valid_loss_history"] != checkpoint("c")["valid_loss_history"]


def test_earlier_trainings_are_kept(call):
    call("--epochs", 1, "--target", "vocals", "bass")
    before = {path.name: path.read_bytes() for path in Path("open-unmix").iterdir()}
    for number in (1, 2):
        code, printed, _ = call("--epochs", 1, "--seed", number)
        line = next(line for line in printed.splitlines() if "previous" in line)
        assert code == 0 and "python train.py --checkpoint open-unmix would have continued it" in line
        assert f"the earlier training of vocals is now open-unmix/previous/vocals-{number}.*" in line
    previous = {path.name: path.read_bytes() for path in Path("open-unmix/previous").iterdir()}
    assert sorted(previous) == [f"vocals-{n}.{suffix}" for n in (1, 2) for suffix in ("chkpnt", "json", "png", "pth")]
    assert all(previous[f"vocals-1.{suffix}"] == before[f"vocals.{suffix}"] for suffix in ("chkpnt", "json", "png", "pth"))
    assert Path("open-unmix/bass.chkpnt").read_bytes() == before["bass.chkpnt"]
    assert call("--epochs", 1, "--overwrite")[0] == 0
    assert len(list(Path("open-unmix/previous").iterdir())) == 8
    code, _, complaint = call("--target", "drums", "--nfft", 1024)
    assert code == 2 and "open-unmix: holds bass, vocals with another STFT" in complaint


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--checkpoint", "nowhere"], "--checkpoint nowhere: holds no training (expected nowhere/vocals.chkpnt)"),
        (["--checkpoint", "model"], "--checkpoint model: holds no training"),
        (["--checkpoint", "trained", "--overwrite"], "--overwrite: is not for --checkpoint"),
        (["--checkpoint", "trained", "--model", "umx"], "--model: is not for --checkpoint"),
        (["--checkpoint", "trained", "--hidden-size", "24"], "--hidden-size 24: trained has 16; leave the flag out"),
        (["--checkpoint", "trained", "--nhop", "64"], "--nhop 64: trained has 128; leave the flag out"),
        (["--checkpoint", "trained", "--sample-rate", "22050"], "--sample-rate 22050: trained has 44100; leave"),
        (["--checkpoint", "trained", "--mask", "relu"], "--mask relu: trained has sigmoid; leave the flag out"),
        (["--checkpoint", "partial"], "partial/vocals.chkpnt: does not fit this training"),
        (["--checkpoint", "trained", "--target", "bass"], "trained/bass.chkpnt: no such file"),
        (["--checkpoint", "strange"], "strange/vocals.chkpnt: is not a checkpoint of train.py"),
        (["--checkpoint", "broken"], "broken/vocals.chkpnt: is damaged"),
        (["--checkpoint", "pickle"], "pickle/vocals.chkpnt: is damaged"),
        (["--input-file", "x.wav"], "--input-file: is not used with --dataset musdb"),
        (["--dataset", "synthetic", "--is-wav"], "--is-wav: is not used with --dataset synthetic"),
        (["--dataset", "aligned", "--target", "vocals"], "--target: is not used with --dataset aligned"),
        (["--dataset", "aligned", "--source-augmentations"], "--source-augmentations: is not used with"),
        (["--hidden-size", "20"], "--hidden-size 20: must be a multiple of 8"),
        (["--target", "../x"], "--target ../x: no such source in the data"),
        (["--model", "model", "--hidden-size", "24"], "--hidden-size 24: model has 16; leave the flag out"),
        (["--model", "model", "--target", "piano"], "model: has no target 'piano'; it has vocals"),
        (
            ["--output", "file"],
            "file/separator.json: could not be written (File exists); free some space or choose another folder",
        ),
        (["--lr", "0"], "--lr: 0 is out of range"),
        (["--no-cuda"], "unrecognized arguments: --no-cuda"),
    ],
)
def test_mistakes_are_one_line(flags, message, call, musdb_root, tmp_path):
    assert call("--dry-run", "--output", "trained")[0] == 0
    make_model(tmp_path / "model", targets=("vocals",), nfft=512)
    Path("file").write_text("")
    partial = {"args": {"root": str(musdb_root), "hidden_size": 8}}
    contents = dict(strange={"x": torch.zeros(2)}, partial=partial, broken=None, pickle={"args": Path("x")})
    for name, content in contents.items():
        Path(name).mkdir()
        torch.save(content, f"{name}/vocals.chkpnt")
    Path("broken/vocals.chkpnt").write_bytes(Path("trained/vocals.chkpnt").read_bytes()[:5000])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    code, _, complaint = call(*flags)
    lines = complaint.replace("\r", "\n").splitlines()
    assert code == 2 and [line for line in lines if "error" in line] == [lines[-1]] and f"error: {message}" in lines[-1]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_folder_that_cannot_be_written_to(call):
    """Where the earlier training cannot be put aside, nothing of it is changed."""
    assert call("--dry-run")[0] == 0
    Path("open-unmix/previous").write_text("a file, where a folder should be")
    before = {path.name: path.read_bytes() for path in Path("open-unmix").iterdir()}
    code, _, complaint = call("--dry-run")
    assert code == 2 and "error: open-unmix: cannot be written to (File exists); choose another --output" in complaint
    assert before == {path.name: path.read_bytes() for path in Path("open-unmix").iterdir()}


def test_errors_of_ours_are_not_hidden(call, monkeypatch):
    """A RuntimeError of one process is no lost connection to another one."""
    monkeypatch.setattr(train, "train", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        call()


def test_full_disk(call, musdb_root, tmp_path):
    """No room for the next checkpoint: one line, exit code 2, and the last good one stays whole."""
    assert call("--epochs", 1)[0] == 0
    before = {path: path.read_bytes() for path in Path("open-unmix").iterdir()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    assert finish(start(tmp_path, "--checkpoint", "open-unmix", "--epochs", 3, first=limit)) == [2]
    log = (tmp_path / "log").read_text()
    assert "could not be written (File too large); free some space or choose another folder" in log and "Traceback" not in log
    assert before == {path: path.read_bytes() for path in Path("open-unmix").iterdir()}
    assert call("--checkpoint", "open-unmix", "--epochs", 2)[0] == 0


def test_loss_that_is_not_finite(call):
    assert call("--epochs", 1)[0] == 0
    before = checkpoint("open-unmix"), Path("open-unmix/vocals.pth").read_bytes()
    code, _, complaint = call("--checkpoint", "open-unmix", "--epochs", 3, "--lr", 1e20)
    assert (
        code == 2
        and "error: vocals epoch 2, step 2: the loss is nan at learning rate 1e+20; the best model so far is kept" in complaint
    )
    assert "lower the rate: python train.py --checkpoint open-unmix --lr 1e+19" in complaint
    assert equal(checkpoint("open-unmix"), before[0]) and Path("open-unmix/vocals.pth").read_bytes() == before[1]


@pytest.mark.parametrize("patience", [0, 2, 4])
def test_early_stopping_and_plateau(patience, call, monkeypatch):
    """As openunmix's early stopping and PyTorch's scheduler decide; the state survives a resume."""
    their = pytest.importorskip("openunmix").utils.EarlyStopping(patience=patience or 10**9)
    losses = [5, 4, 4.5, 4.5, 3, 3.5, 3, 2.5, 3, 3, 3, 3, 3, 3]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.001)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, cooldown=10)
    rates = []
    for epochs, loss in enumerate(losses, 1):  # what should come out
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
        if their.step(loss):
            break
    monkeypatch.setattr(train, "train", lambda *_: 1.0)
    monkeypatch.setattr(train, "validate", lambda *_: float(next(remaining)))
    remaining = iter(losses)
    flags = ["--patience", patience, "--lr-decay-patience", 1, "--lr-decay-gamma", 0.5]
    assert call(*flags, "--epochs", 3)[0] == 0
    code, printed, _ = call("--checkpoint", "open-unmix", "--epochs", len(losses))
    record = json.loads(Path("open-unmix/vocals.json").read_text())
    assert code == 0 and record["valid_loss_history"] == losses[:epochs] and record["lr_history"] == rates
    assert record["best_loss"] == min(losses[:epochs]) and record["best_epoch"] == losses.index(record["best_loss"]) + 1
    assert record["num_bad_epochs"] == epochs - record["best_epoch"]
    assert ("stopped early" in printed) == (epochs < len(losses)) and (epochs == len(losses) or patience)


# ---------------------------------------------------------------------------------------------- what is trained


def test_input_statistics(musdb_root):
    """Mean and deviation of all frames, as scikit-learn's StandardScaler has them, by numpy in float64: to 1e-6."""
    args = train.parse_args(["--root", str(musdb_root), "--nfft", "1024", "--nhop", "256", "--quiet"])[0]
    files = sorted(musdb_root.glob("train/*/mixture.wav"))
    songs = [soundfile.read(path, dtype="float32")[0].T for path in files]
    found = train.input_statistics([(torch.from_numpy(song.copy()), None) for song in songs], args, torch.device("cpu"))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = []
    for song in songs:
        padded = np.pad(song.astype(np.float64), ((0, 0), (512, 512)), mode="reflect")
        pieces = np.lib.stride_tricks.sliding_window_view(padded, 1024, axis=1)[:, ::256]
        frames.append(np.abs(np.fft.rfft(pieces * window)).mean(0))
    frames = np.concatenate(frames)  # (T, F)
    np.testing.assert_allclose(found["mean"], frames.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["scale"], np.sqrt(frames.var(0)), rtol=1e-6)


def test_several_targets(call, monkeypatch):
    """The data are indexed and the statistics computed once; each target has its model."""
    calls = []
    for name in ("input_statistics", "index_dataset"):
        real = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    code, printed, _ = call("--target", "vocals", "drums", "bass", "other", "vocals", "--epochs", 1)
    assert (
        code == 0 and sorted(calls) == ["index_dataset", "input_statistics"] and "trained vocals, drums, bass, other" in printed
    )
    assert load_separator("open-unmix").targets == ["vocals", "drums", "bass", "other"]
    records = [json.loads(Path(f"open-unmix/{target}.json").read_text()) for target in ("vocals", "other")]
    assert records[0]["input_statistics"] == records[1]["input_statistics"]
    assert records[0]["valid_loss_history"] != records[1]["valid_loss_history"]


@pytest.mark.parametrize("arch,kind", [("blstm", OpenUnmix), ("conv", ConvUnmix)])
@pytest.mark.parametrize("unidirectional", [False, True])
def test_architectures(arch, kind, unidirectional, call):
    """The model folder records network and direction; a unidirectional one knows nothing of the future."""
    assert call("--arch", arch, *["--unidirectional"] * unidirectional, "--epochs", 1, "--bandwidth", 12000)[0] == 0
    record = json.loads(Path("open-unmix/vocals.json").read_text())
    assert record["args"]["arch"] == arch and record["args"]["unidirectional"] is unidirectional
    network = load_networks("open-unmix")[0]["vocals"]
    assert type(network) is kind and network.unidirectional is unidirectional and network.mask == "sigmoid"
    assert network.max_bin == sum(bin * 44100 / 512 <= 12000 for bin in range(257))
    assert arch == "conv" or network.lstm.bidirectional is not unidirectional
    x = torch.rand(1, 2, 257, 50)
    changed = x.clone()
    changed[..., 30:] = 0
    with torch.no_grad():
        same = torch.equal(network(x)[..., :30], network(changed)[..., :30])
    assert same == unidirectional


def test_fine_tuning(call, tmp_path):
    """From a folder's weights, with its settings; into the same folder; goes on when the weights are elsewhere."""
    make_model(tmp_path / "open-unmix", targets=("vocals", "bass"), hidden_size=24, nfft=1024, sample_rate=22050)
    before = load(tmp_path / "open-unmix" / "vocals.pth")
    flags = ["--target", "vocals", "bass", "--model", "open-unmix", "--epochs", 1, "--lr", 1e-12, "--weight-decay", 0]
    code, printed, complaint = call(*flags, small=SMALL[6:])
    assert code == 0, complaint
    assert "22050 Hz" in printed and "the earlier training of vocals is now open-unmix/previous/vocals-1.*" in printed
    record = json.loads(Path("open-unmix/vocals.json").read_text())
    settings = {name: record["args"][name] for name in ("hidden_size", "nfft", "nhop", "mask", "sample_rate", "bandwidth")}
    assert settings == dict(
        hidden_size=24, nfft=1024, nhop=256, mask="relu", sample_rate=22050, bandwidth=math.ceil(371 * 22050 / 1024)
    )
    after = load("open-unmix/vocals.pth")
    for name in before:
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    assert call("--checkpoint", "open-unmix", "--epochs", 2)[0] == 0
    assert load_networks("open-unmix")[0]["bass"].hidden_size == 24


def test_bfloat16(call):
    """--amp: the validation loss of a short training stays within 2 % of float32's."""
    for output, flags in (("float32", []), ("bfloat16", ["--amp"])):
        code, printed, _ = call("--output", output, "--epochs", 4, *flags)
        assert code == 0 and output in printed.splitlines()[0]
    losses = [checkpoint(output)["valid_loss_history"][-1] for output in ("float32", "bfloat16")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert all(value.dtype != torch.bfloat16 for value in load("bfloat16/vocals.pth").values())


def test_presets():
    """The defaults are the published recipe; without --root a small one; flags given by hand win."""
    recipe = dict(epochs=1000, patience=140, batch_size=16, seq_dur=6.0, samples_per_track=64, lr=1e-3, weight_decay=1e-5)
    recipe.update(
        lr_decay_patience=80, lr_decay_gamma=0.3, hidden_size=512, bandwidth=16000, nfft=4096, nhop=1024, nb_channels=2
    )
    recipe.update(source_augmentations=["gain", "channelswap"], mask="sigmoid", arch="blstm", target=["vocals"], seed=42)
    for arguments in (["--root", "x"], ["--preset", "umx"]):
        args = train.parse_args(arguments)[0]
        assert {name: getattr(args, name) for name in recipe} == recipe and args.preset == "umx"
    small = train.parse_args([])[0]
    assert small.preset == "tutorial" and small.epochs < 50 and small.hidden_size < 512
    assert train.parse_args(["--root", "x", "--preset", "tutorial"])[0].epochs == small.epochs
    by_hand = train.parse_args(["--epochs", "7", "--hidden-size=64"])[0]
    assert (by_hand.epochs, by_hand.hidden_size, by_hand.batch_size) == (7, 64, small.batch_size)


def test_dry_run(call, monkeypatch):
    """One batch, one validation track, one save."""
    seen = []
    real = train.magnitudes
    monkeypatch.setattr(train, "magnitudes", lambda x, *args: seen.append(len(x)) or real(x, *args))
    assert call("--dry-run")[0] == 0
    assert seen == [1, 4, 4, 1, 1]  # statistics, batch, validation
    assert checkpoint("open-unmix")["epochs_trained"] == 1 and Path("open-unmix/vocals.pth").exists()


# ---------------------------------------------------------------------------------------------- what one sees


def test_record_and_lines(call, monkeypatch):
    monkeypatch.setattr(train, "tqdm", functools.partial(train.tqdm, mininterval=0))
    code, printed, shown = call("--epochs", 3)
    record = json.loads(Path("open-unmix/vocals.json").read_text())
    lines = [line for line in printed.splitlines() if line.startswith("vocals epoch")]
    for number, line in enumerate(lines):
        train_loss, valid_loss, lr = (record[name][number] for name in HISTORIES)
        assert (
            line.startswith(f"vocals epoch {number + 1}/3  train {train_loss:.4f}  valid {valid_loss:.4f}  best ")
            and f"lr {lr:.2g}" in line
        )
    assert len(lines) == 3 and "input statistics" in shown and "examples/s" in shown and "loss=" in shown
    assert record["epochs_trained"] == 3 and record["best_loss"] == min(record["valid_loss_history"])
    assert all(len(record[name]) == 3 for name in (*HISTORIES, "train_time_history")) and min(record["train_time_history"]) > 0
    assert set(record["args"]) == set(vars(train.parse_args([])[0])) and record["versions"]["torch"] == torch.__version__
    git = subprocess.run(["git", "-C", FOLDER, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert record["commit"] == (git.stdout.strip() or None)
    assert json.loads(Path("open-unmix/separator.json").read_text()) == {
        "sample_rate": 44100,
        "nfft": 512,
        "nhop": 128,
        "nb_channels": 2,
    }


def test_commit_of_a_copy_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert train.commit() is None  # no repository
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train.commit() is None  # no git


def test_quiet(call, monkeypatch):
    def index(args, index_dataset=train.index_dataset):
        print("a bar of what is decoded", file=sys.stderr)
        return index_dataset(args)

    monkeypatch.setattr(train, "index_dataset", index)
    code, printed, shown = call("--epochs", 2, "--quiet")
    assert (code, shown) == (0, "") and printed.startswith("trained vocals: open-unmix/. Next: ") and printed.count("\n") == 1


def test_curves(call, monkeypatch, tmp_path):
    """Both losses, the best epoch and the steps of the learning rate."""
    pictures = []
    monkeypatch.setattr(train, "save_figure", lambda picture, path: pictures.append(picture))
    history = {
        "train_loss_history": [5.0, 3, 2, 1.5],
        "valid_loss_history": [6.0, 2.5, 4, 3],
        "lr_history": [1e-3, 1e-3, 3e-4, 3e-4],
    }
    train.plot_curves(history, 2, "vocals", tmp_path / "x.png")
    axis = pictures[0].axes[0]
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    assert curves[:2] == [([1, 2, 3, 4], history["train_loss_history"]), ([1, 2, 3, 4], history["valid_loss_history"])]
    assert curves[2] == ([2], [2.5]) and curves[3][0] == [3, 3] and [text.get_text() for text in axis.texts] == [" lr 0.0003"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["train loss", "valid loss", "best: 2.5 in epoch 2"]
    monkeypatch.undo()
    os.chdir(tmp_path)
    assert call("--epochs", 1)[0] == 0
    assert (
        Path("open-unmix/vocals.png").read_bytes().startswith(b"\x89PNG")
        and Path("open-unmix/vocals.png").stat().st_size > 10_000
    )


def test_tensorboard(call, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert call("--epochs", 2, "--tensorboard")[0] == 0 and call("--checkpoint", "open-unmix", "--epochs", 3)[0] == 0
    events = EventAccumulator("open-unmix/vocals.tensorboard").Reload()
    for name, history in (("loss/train", "train_loss_history"), ("loss/valid", "valid_loss_history"), ("lr", "lr_history")):
        found = {event.step: event.value for event in events.Scalars(name)}
        np.testing.assert_allclose([found[1], found[2], found[3]], checkpoint("open-unmix")[history], rtol=1e-6)


def test_tensorboard_missing(call, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    code, _, complaint = call("--tensorboard")
    assert code == 2 and "error: --tensorboard: needs the package tensorboard (pip install tensorboard)" in complaint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(call):
    """Two trainings on a GPU are equal to the bit, the second one continued; their losses are the CPU's to 1 %."""
    for output, device in (("cpu", "cpu"), ("one", "cuda"), ("two", "cuda")):
        epochs = [3] if output != "two" else [1, 3]
        assert call("--output", output, "--device", device, "--epochs", epochs[0])[0] == 0
        assert len(epochs) == 1 or call("--checkpoint", output, "--epochs", epochs[1])[0] == 0
    assert equal(checkpoint("one"), checkpoint("two"))
    np.testing.assert_allclose(checkpoint("one")["valid_loss_history"], checkpoint("cpu")["valid_loss_history"], rtol=0.01)
