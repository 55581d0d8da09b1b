"""train.py: exact resume, several processes, what is kept and said; tiny songs, small networks."""

import argparse
import contextlib
import itertools
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
from conftest import FOLDER, ConvUnmix, make_model, run_script, sdr, write_song

import train
import utils
from model import OpenUnmix, load_separator, stft
from utils import UserError, load

SIZES = "--nfft 256 --nhop 64 --hidden-size 16"
STEPS = "--seq-dur 0.3 --samples-per-track 2 --batch-size 4 --device cpu"
SMALL = f"{SIZES} {STEPS}".split()
HISTORIES = ("train_loss_history", "valid_loss_history", "lr_history")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight songs at 8 kHz: six for training, two for validation."""
    root = tmp_path_factory.mktemp("songs")
    for n in range(8):
        write_song(root / "train" / f"Song {n}", seconds=1, rate=8000, seed=n)
    return root


@pytest.fixture()
def call(tmp_path, monkeypatch, capsys, root):
    """Run train.py's main in this process and in tmp_path: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # what its advice names
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments, small=SMALL):
        data = [] if "--checkpoint" in arguments else ["--root", root, *small]
        try:
            utils.run(lambda: train.main([*data, *arguments]))
        except SystemExit as end:
            return end.code, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def checkpoint(folder, target="vocals"):
    return torch.load(Path(folder, f"{target}.chkpnt"), weights_only=True)


def record(folder="open-unmix", target="vocals"):
    return json.loads(Path(folder, f"{target}.json").read_text())


def equal(a, b, ignore=("args", "train_time_history", "code")):
    """Whether two checkpoints hold the same to the bit, but for what epochs cannot share: seconds."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        names = a.keys() - set(ignore)
        return names == b.keys() - set(ignore) and all(equal(a[name], b[name]) for name in names)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------ real processes

# each is forked from one that has imported train.py already
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["torch", "train", "matplotlib.figure", "matplotlib.backends.backend_agg"]
)
START = """
import multiprocessing, os, sys
os.environ.update({environment!r})
import train, utils
os.dup2(os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), os.dup2(1, 2)
multiprocessing.set_start_method("fork", force=True)
os.chdir({folder!r})
train.torch.set_num_threads(1)
sys.argv = {command!r}
{first}
utils.run(train.main)
"""


def start(folder, *arguments, first="", **environment):
    """Begin `python train.py ...` in a process of its own, after `first`; it prints to folder/log."""
    command, log = ["train.py", *map(str, arguments)], str(folder / "log")
    given = dict(log=log, folder=str(folder), environment=environment, command=command)
    code = START.format(**given, first=first)
    process = PROCESSES.Process(target=exec, args=(code, {"__name__": "started"}))
    process.start()
    return process


def finish(*processes, timeout=60):
    for process in processes:
        process.join(timeout)
        assert process.exitcode is not None, "still running"
    return [process.exitcode for process in processes]


def stamp(path):
    return path.stat().st_mtime_ns if path.exists() else None


def wait_for(path, process, before=None):
    """Wait until a process has written a file, or written it again."""
    while process.exitcode is None and stamp(path) == before:
        time.sleep(0.002)


# the rate falls, and the best epoch is not the last
BUSY = [*SMALL, "--epochs", 6, "--lr", 0.5, "--lr-decay-patience", 0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, root):
    """(checkpoint, weights) of a training in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(folder, "--root", root, *BUSY)
    assert finish(process) == [0], (folder / "log").read_text()
    found = checkpoint(folder / "open-unmix")
    assert found["record"]["epochs_trained"] == 6 and len(set(found["record"]["lr_history"])) > 1
    return found, load(folder / "open-unmix" / "vocals.pth")


def go_on(folder, root, *arguments, first=""):
    """Start or continue the training of `uninterrupted`, whichever it is time for."""
    if (folder / "open-unmix" / "vocals.chkpnt").exists():
        return start(folder, "--checkpoint", "open-unmix", first=first)
    return start(folder, "--root", root, *BUSY, *arguments, first=first)


def assert_same(folder, uninterrupted):
    assert equal(checkpoint(folder), uninterrupted[0])
    assert equal(load(folder / "vocals.pth"), uninterrupted[1])
    found, expected = record(folder), uninterrupted[0]["record"]
    names = (*HISTORIES, "best_loss", "best_epoch", "epochs_trained")
    assert all(found[name] == expected[name] for name in names)
    assert len(found["train_time_history"]) == 6


@pytest.mark.parametrize("workers,interruption", [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_interrupted_at_random_moments(workers, interruption, uninterrupted, root, tmp_path):
    """Killed and interrupted in the middle of epochs, the training ends with the same bits."""
    rng, file, codes = random.Random(workers), tmp_path / "open-unmix" / "vocals.chkpnt", []
    for number in (signal.SIGKILL, interruption, signal.SIGKILL):
        before = stamp(file)
        process = go_on(tmp_path, root, "--nb-workers", workers)
        wait_for(file, process, before)  # until it has got on, and a little further
        time.sleep(rng.uniform(0, 1.5) * min(uninterrupted[0]["record"]["train_time_history"]))
        os.kill(process.pid, number)
        codes += finish(process)
    ordinary = 130 if interruption == signal.SIGINT else 128 + interruption
    assert codes == [-signal.SIGKILL, ordinary, -signal.SIGKILL]
    assert finish(go_on(tmp_path, root)) == [0]
    assert_same(tmp_path / "open-unmix", uninterrupted)


KILLED = """
import pathlib, signal
seen, write, replace = [0], pathlib.Path.write_bytes, os.replace
def is_time(path):
    seen[0] += "open-unmix" in str(path) and {name!r} in str(path)
    return seen[0] == {number}
def half(path, content):
    end = is_time(path)
    write(path, content[:len(content) // 2] if end else content)
    end and os.kill(os.getpid(), signal.SIGKILL)
def replace_and_kill(old, new):
    replace(old, new)
    is_time(new) and os.kill(os.getpid(), signal.SIGKILL)
{patch}
"""


def test_killed_while_writing(uninterrupted, root, tmp_path):
    """Whichever file is half written, or was just renamed, at the end: the next one goes on."""
    half, after = "pathlib.Path.write_bytes = half", "os.replace = replace_and_kill"
    moments = [("chkpnt", 2, half), ("pth", 1, after), ("pth", 1, half), ("json", 2, half)]
    for name, number, patch in [*moments, ("png", 1, after), ("chkpnt", 2, after)]:
        first = KILLED.format(name=f"vocals.{name}", number=number, patch=patch)
        process = go_on(tmp_path, root, first=first)
        assert finish(process) == [-signal.SIGKILL], (tmp_path / "log").read_text()
    assert finish(go_on(tmp_path, root)) == [0]
    assert_same(tmp_path / "open-unmix", uninterrupted)
    assert not (tmp_path / "open-unmix" / "previous").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruption_says_how_to_go_on(number, root, tmp_path):
    process = start(tmp_path, "--root", root, *SMALL, "--output", "my model", "--epochs", 1000)
    wait_for(tmp_path / "my model" / "vocals.json", process)
    os.kill(process.pid, number)
    assert finish(process) == [128 + number]
    log = (tmp_path / "log").read_text()
    assert "interrupted; continue with: python train.py --checkpoint 'my model'" in log
    assert "Traceback" not in log and not list(tmp_path.rglob("*.part"))


def test_second_training_of_the_same_target(root, tmp_path):
    """Whoever comes second is told who is there, and disturbs nothing."""
    flags = ["--root", root, *SMALL, "--output", "m"]
    first = start(tmp_path, *flags, "--epochs", 1000)
    wait_for(tmp_path / "m" / "vocals.png", first)
    wait_for(tmp_path / "m" / "vocals.chkpnt", first, stamp(tmp_path / "m" / "vocals.chkpnt"))
    for command in (flags, [*flags, "--overwrite"], ["--checkpoint", "m", "--lr", 1]):
        assert finish(start(tmp_path, *command, "--epochs", 1000)) == [2]
    os.kill(first.pid, signal.SIGTERM)
    assert finish(first) == [128 + signal.SIGTERM]
    said = (tmp_path / "log").read_text()
    assert said.count(f"m/vocals: process {first.pid} is writing the training of vocals") == 3
    assert not (tmp_path / "m" / "previous").exists()
    found = checkpoint(tmp_path / "m")["record"]
    assert found["args"]["lr"] == 0.001 and found["epochs_trained"] == len(found["lr_history"]) >= 1


def test_targets_side_by_side(root, tmp_path):
    """Four trainings, of one target each, share a folder: none loses what another writes."""
    targets = utils.SOURCES
    flags = ["--root", root, *SMALL, "--epochs", 3, "--output", "m"]
    processes = [start(tmp_path, *flags, "--target", target) for target in targets]
    assert finish(*processes) == [0] * 4, (tmp_path / "log").read_text()
    assert load_separator(tmp_path / "m").targets == [*targets]
    assert not (tmp_path / "m" / "previous").exists() and not list(tmp_path.rglob("*.part"))
    assert all(record(tmp_path / "m", target)["epochs_trained"] == 3 for target in targets)


# ------------------------------------------------------------------------------- several processes

PLAIN = """
import model
from torch import nn
class Plain(nn.Module):
    '''Without batch norms, which are each process's own on CPUs.'''
    def __init__(self, nb_bins):
        super().__init__()
        self.layer = nn.Linear(nb_bins, nb_bins)
    def forward(self, x):
        return x * train.torch.sigmoid(self.layer(x.mT).mT)
model.ARCHITECTURES["plain"] = Plain
"""


def train_in(processes, folder, *arguments, first=""):
    """Train in several processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [dict(world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    return [start(folder, *arguments, first=first, **rank) for rank in ranks]


def test_processes_share_a_training(root, tmp_path):
    """Two processes have one's losses to 1e-5, also where their number changes midway."""
    flags = ["--root", root, *STEPS.split(), "--nfft", 256, "--nhop", 64, "--arch", "plain"]
    for name, steps in (("one", [(1, 4)]), ("several", [(2, 1), (1, 2), (2, 4)])):
        for processes, epochs in steps:
            begin = [*flags, "--output", name]
            command = ["--checkpoint", name] if (tmp_path / name).exists() else begin
            started = train_in(processes, tmp_path, *command, "--epochs", epochs, first=PLAIN)
            assert finish(*started) == [0] * processes, (tmp_path / "log").read_text()
    one, several = (checkpoint(tmp_path / name)["record"] for name in ("one", "several"))
    for history in HISTORIES:
        np.testing.assert_allclose(several[history], one[history], rtol=1e-5, err_msg=history)
    log = (tmp_path / "log").read_text()
    assert log.count("vocals epoch 4/4  train") == 2  # only the first process prints
    assert "2 processes; batch norms are each process's own on CPUs" in log and "Warning" not in log


def test_processes_share_statistics_and_validation(root, tmp_path):
    """The input statistics are one process's; the loss is what the saved network has."""
    flags = ["--root", root, *SMALL, "--epochs", 1, "--lr", 1e-12, "--weight-decay", 0]
    for processes, name in ((1, "one"), (2, "two")):
        started = train_in(processes, tmp_path, *flags, "--output", name)
        assert finish(*started) == [0] * processes, (tmp_path / "log").read_text()
    one, two = (load(tmp_path / name / "vocals.pth") for name in ("one", "two"))
    for name in ("input_mean", "input_scale", "fc3.weight"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7)
    args = train.parse_args(["--root", str(root), *SMALL, "--quiet"])[0]
    args.amp, tracks = False, train.index_tracks(args)
    valid_set = train.make_datasets(tracks, ["vocals"], args)[1]
    network = load_separator(tmp_path / "two").networks[0]
    loss = train.validate(network, valid_set, args, torch.device("cpu"))["valid_loss"]
    assert loss == pytest.approx(record(tmp_path / "two")["best_loss"], rel=1e-5)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux to find the processes")
def test_torchrun_and_a_lost_process(root, tmp_path):
    """A killed process ends the job: a line says how to go on, and the checkpoint is whole."""
    script = str(FOLDER / "train.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script]
    command += map(str, ["--root", root, *SMALL, "--epochs", 1000])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    lines = iter(job.stdout.readline, "")
    assert any("vocals epoch 2/1000  train" in line for line in lines), job.communicate()
    processes = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(processes) == 2
    os.kill(int(processes[1]), signal.SIGKILL)
    _, complaint = job.communicate(timeout=60)
    assert job.returncode != 0
    # which one depends on who tells the other process first: its lost connection, or torchrun
    said = r"(error: another process ended|interrupted); continue with: torchrun ... "
    assert re.search(said, complaint), complaint
    assert f'File "{script}"' not in complaint  # no traceback of ours
    found = checkpoint(tmp_path / "open-unmix")["record"]
    assert found["epochs_trained"] == len(found["valid_loss_history"]) >= 1


class Examples:
    """A dataset of which only the length matters."""

    def __init__(self, size, endless):
        self.size, self.endless = size, endless

    def __len__(self):
        return self.size


@pytest.mark.parametrize("endless", [True, False])
def test_batches_are_shared_out(endless, monkeypatch):
    """Each step's examples are the same for any number of processes, each once in an epoch."""

    def epochs(world):
        shares = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            batches, share = train.EpochBatches(Examples(23, endless), 6, seed=3), []
            for batches.epoch in range(3):
                share.append(list(batches))
            shares.append(share)
        return [[sorted(itertools.chain(*step)) for step in zip(*epoch)] for epoch in zip(*shares)]

    assert epochs(1) == epochs(2) == epochs(6)
    orders = epochs(1)
    for number, epoch in enumerate(orders):
        examples, first = list(itertools.chain(*epoch)), 23 * number if endless else 0
        assert len(set(examples)) == len(examples) == 18  # three whole batches
        assert set(examples) < set(range(first, first + 23))
    assert orders[0] != orders[1]  # in another order
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UserError, match=r"--batch-size 6: is no multiple of the number of proc.* 4"
    ):
        train.EpochBatches(Examples(23, endless), 6, seed=3)


def test_batches_of_a_small_dataset(monkeypatch):
    """With fewer examples than a batch has, all of them are the batch."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    [batch] = train.EpochBatches(Examples(3, False), 16, seed=0)
    assert sorted(batch) == [0, 1, 2]


# ---------------------------------------------------------------------------------------- continuing


def test_checkpoint_keeps_the_flags(call):
    flags = "--seed 7 --unidirectional --weight-decay 0.01 --source-augmentations gain --mask relu"
    flags = [*flags.split(), "--target", "bass", "drums", "--quiet"]
    assert call(*flags, "--epochs", 1)[0] == 0
    changed = ["--epochs", 2, "--lr", 1e-4, "--weight-decay", 0, "--patience", 9]
    code, printed, _ = call("--checkpoint", "open-unmix", *changed)
    assert code == 0 and "bass epoch 2/2" in printed and "drums epoch 2/2" in printed  # not quiet
    assert "epoch 1/2" not in printed
    for target in ("bass", "drums"):
        found = checkpoint("open-unmix", target)
        args = found["record"]["args"]
        kept = {"seed": 7, "unidirectional": True, "mask": "relu", "target": ["bass", "drums"]}
        kept |= {"source_augmentations": ["gain"], "sample_rate": 8000, "hidden_size": 16}
        kept |= {"lr": 1e-4, "patience": 9}
        assert {name: args[name] for name in kept} == kept
        assert found["record"]["lr_history"] == [0.001, 1e-4]
        assert found["record"]["epochs_trained"] == 2
        assert found["state"]["optimizer"]["param_groups"][0]["weight_decay"] == 0  # given by hand
    printed = call("--checkpoint", "open-unmix", "--epochs", 2)[1]
    assert "all its trainings are finished; --epochs or --patience extends them" in printed
    assert "epoch 2" not in printed


def test_each_target_keeps_its_own_flags(call):
    """One --checkpoint goes on with two trainings, begun by different commands."""
    call("--epochs", 1, "--target", "vocals", "--seed", 1, "--batch-size", 2)
    call("--epochs", 3, "--target", "bass", "--seed", 2, "--source-augmentations", "--patience", 7)
    for target, epochs, patience in (("vocals", 1, 140), ("bass", 3, 7)):
        args = record(target=target)["args"]
        assert (args["epochs"], args["patience"]) == (epochs, patience)
    before = record(target="bass")
    code, printed, _ = call("--checkpoint", "open-unmix", "--epochs", 3)
    assert code == 0 and "vocals epoch 3/3" in printed and "bass" not in printed.split("Next")[0]
    assert record(target="bass") == before  # it was finished
    args = record(target="vocals")["args"]
    assert (args["seed"], args["batch_size"], args["patience"]) == (1, 2, 140)
    assert args["source_augmentations"] == ["gain", "channelswap"] and args["epochs"] == 3


def test_checkpoint_begins_what_was_not_begun(call):
    """Of several targets one command trains in turn; those after the interruption are begun."""
    assert call("--epochs", 2, "--target", "vocals", "bass", "drums", "--seed", 5)[0] == 0
    expected = checkpoint("open-unmix", "drums")
    for path in Path("open-unmix").glob("drums.*"):
        path.unlink()
    code, printed, _ = call("--checkpoint", "open-unmix")
    assert code == 0 and "drums epoch 1/2" in printed and "vocals epoch" not in printed
    assert equal(checkpoint("open-unmix", "drums"), expected)


def test_checkpoint_begins_with_its_own_data(call, tmp_path):
    """Two commands with other data each: what they had not begun gets its own input statistics."""
    for n in range(3):
        write_song(tmp_path / "more" / "train" / f"Song {n}", seconds=1, rate=8000, seed=20 + n)
    flags = ["--epochs", 1, "--lr", 1e-12]
    assert call(*flags, "--target", "bass", "other")[0] == 0
    assert call(*flags, "--target", "vocals", "drums", "--root", tmp_path / "more")[0] == 0
    expected = {name: load(f"open-unmix/{name}.pth")["input_mean"] for name in ("other", "drums")}
    for path in [*Path("open-unmix").glob("other.*"), *Path("open-unmix").glob("drums.*")]:
        path.unlink()
    assert call("--checkpoint", "open-unmix")[0] == 0
    for name, mean in expected.items():
        torch.testing.assert_close(load(f"open-unmix/{name}.pth")["input_mean"], mean)


def test_determinism(call):
    """The same losses and the same weights, twice; others from another seed."""
    for output in ("a", "b"):
        assert call("--output", output, "--epochs", 2)[0] == 0
    assert equal(checkpoint("a"), checkpoint("b"))
    assert call("--output", "c", "--epochs", 2, "--seed", 1)[0] == 0
    assert record("a")["valid_loss_history"] != record("c")["valid_loss_history"]


def test_earlier_trainings_are_kept(call):
    call("--epochs", 1, "--target", "vocals", "bass")
    before = {path.name: path.read_bytes() for path in Path("open-unmix").glob("[a-z]*")}
    for number in (1, 2):
        code, printed, _ = call("--epochs", 1, "--seed", number)
        said = f"the earlier training is now in open-unmix/previous/{number}; "
        assert code == 0 and said in printed
    endings = ["chkpnt", "json", "png", "pth"]
    for number in (1, 2):
        kept = {
            path.name: path.read_bytes() for path in Path(f"open-unmix/previous/{number}").iterdir()
        }
        assert sorted(kept) == [f"vocals.{ending}" for ending in endings]
        assert (kept["vocals.pth"] == before["vocals.pth"]) == (number == 1)
    assert Path("open-unmix/bass.chkpnt").read_bytes() == before["bass.chkpnt"]
    assert call("--epochs", 1, "--overwrite")[0] == 0
    assert len(list(Path("open-unmix/previous").iterdir())) == 2
    code, _, complaint = call("--target", "drums", "--nfft", 512)
    assert code == 2 and "open-unmix: holds bass, vocals with nfft 256; choose another" in complaint


def test_previous_can_be_continued(call):
    """The advice that is printed beside previous/ is good: it holds all that continuing takes."""
    call("--epochs", 1, "--seed", 3)
    call("--epochs", 1, "--seed", 4)
    code, printed, complaint = call("--checkpoint", "open-unmix/previous/1", "--epochs", 2)
    assert code == 0 and "vocals epoch 2/2" in printed, complaint
    assert record("open-unmix/previous/1")["args"]["seed"] == 3


BEGAN = "--checkpoint goes on as the training began; leave it out"
MISTAKES = [
    (
        "--checkpoint nowhere",
        "--checkpoint nowhere: holds no training (expected vocals.chkpnt there)",
    ),
    ("--checkpoint model", "--checkpoint model: holds no training"),
    ("--checkpoint trained --overwrite", f"--overwrite: {BEGAN}"),
    ("--checkpoint trained --output x", f"--output: {BEGAN}"),
    ("--checkpoint trained --model umx", f"--model: {BEGAN}"),
    ("--checkpoint trained --target bass", f"--target: {BEGAN}"),
    ("--checkpoint trained --preset umx", f"--preset: {BEGAN}"),
    ("--checkpoint trained --hidden-size 24", f"--hidden-size: {BEGAN}"),
    ("--checkpoint trained --nhop=64", f"--nhop: {BEGAN}"),
    ("--checkpoint trained --sample-rate 22050", f"--sample-rate: {BEGAN}"),
    ("--checkpoint trained --mask relu", f"--mask: {BEGAN}"),
    ("--checkpoint trained --arch-options a=1", f"--arch-options: {BEGAN}"),
    ("--checkpoint partial --epochs 2", "partial/vocals.chkpnt: does not fit this training"),
    ("--checkpoint strange", "strange/vocals.chkpnt: is no checkpoint of train.py"),
    ("--checkpoint broken", "broken/vocals.chkpnt: is damaged"),
    ("--checkpoint pickle", "pickle/vocals.chkpnt: is damaged"),
    ("--input-file x.wav", "--input-file: is not used with --dataset musdb"),
    ("--dataset synthetic --is-wav", "--is-wav: is not used with --dataset synthetic"),
    ("--dataset aligned --target vocals", "--target: is not used with --dataset aligned"),
    ("--dataset aligned --source-augmentations", "--source-augmentations: is not used with"),
    ("--hidden-size 20", "--hidden-size 20: must be a multiple of 8"),
    ("--nhop 200", "--nhop 200: must be at most half of --nfft 256"),
    ("--target ../x", "--target '../x' can't be a name"),
    ("--target separator", "--target 'separator' can't be a name"),
    (
        "--target piano",
        "--target piano: no such source in the data; it has bass, drums, other, vocals",
    ),
    ("--model model --hidden-size 16", "--hidden-size: the model model has its own; leave it out"),
    ("--model model --target piano", "model: has no target 'piano'; it has vocals"),
    ("--output file", ""),
    ("--lr 0", "--lr: 0 is out of range"),
    ("--no-cuda", "unrecognized arguments: --no-cuda"),
    ("--device nosuch", "--device nosuch: no such device"),
    ("--arch-options x", "--arch-options: 'x' is not NAME=VALUE"),
]


@pytest.mark.parametrize("flags,message", MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_mistakes_are_one_line(flags, message, call, tmp_path, mistaken):
    for path in mistaken.iterdir():
        target = tmp_path / path.name
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
        for file in path.iterdir() if path.is_dir() else ():
            (target / file.name).write_bytes(file.read_bytes())
    before = files(tmp_path)
    small = STEPS.split() if "--model" in flags else SMALL
    code, _, complaint = call(*flags.split(), small=small)
    lines = complaint.replace("\r", "\n").splitlines()
    assert code == 2 and [line for line in lines if "error" in line] == [lines[-1]], complaint
    assert lines[-1].startswith(f"error: {message}")
    assert before == {
        path: text for path, text in files(tmp_path).items() if path.suffix != ".lock"
    }


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory, root):
    """Folders with a training, with damaged ones, and a model."""
    folder = tmp_path_factory.mktemp("mistaken")
    flags = ["--root", root, *SMALL, "--epochs", 1, "--quiet", "--output", folder / "trained"]
    train.main(flags)
    for path in (folder / "trained").glob(".*"):
        path.unlink()
    make_model(folder / "model", targets=("vocals",), nfft=256, sample_rate=8000)
    (folder / "file").write_text("")
    good = checkpoint(folder / "trained")
    partial = {**good, "state": {**good["state"], "network": {}}}
    contents = dict(strange={"x": torch.zeros(2)}, partial=partial, pickle={"args": Path("x")})
    for name, content in contents.items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "vocals.chkpnt")
    (folder / "broken").mkdir()
    half = (folder / "trained" / "vocals.chkpnt").read_bytes()[:5000]
    (folder / "broken" / "vocals.chkpnt").write_bytes(half)
    return folder


def test_identical_input_and_target(call, root, tmp_path):
    """Files that are the same would train the identity, and happily."""
    for split in ("train", "valid"):
        write_song(tmp_path / "data" / split / "Song", seconds=1, rate=8000)
        audio, rate = soundfile.read(tmp_path / "data" / split / "Song" / "mixture.wav")
        soundfile.write(tmp_path / "data" / split / "Song" / "clean.wav", audio, rate)
    layout = "--dataset aligned --root data --input-file mixture.wav --output-file clean.wav"
    code, _, complaint = call(*layout.split())
    assert code == 2 and "error: clean: its input and target are identical" in complaint
    code, _, complaint = call(*layout.replace("mixture", "clean").split())
    assert code == 2 and "error: --output-file clean.wav: is the input, too" in complaint
    assert not list(tmp_path.rglob("*.pth"))


def test_folder_that_cannot_be_written_to(call):
    """Where the earlier training cannot be put aside, nothing of it is changed."""
    assert call("--dry-run")[0] == 0
    Path("open-unmix/previous").write_text("a file, where a folder should be")
    before = files("open-unmix")
    code, _, complaint = call("--dry-run")
    assert code == 2 and "error: " in complaint and "open-unmix/previous" in complaint
    assert before == {path: text for path, text in files("open-unmix").items() if path in before}


def test_errors_of_ours_are_not_hidden(call, monkeypatch):
    """A RuntimeError of one process is no lost connection to another one."""
    monkeypatch.setattr(train, "train", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        call()


def test_full_disk(call, tmp_path):
    """No room for the next checkpoint: one line, exit code 2, and the last good one stays whole."""
    assert call("--epochs", 1)[0] == 0
    before = files("open-unmix")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    command = ["--checkpoint", "open-unmix", "--epochs", 3]
    assert finish(start(tmp_path, *command, first=limit)) == [2]
    log = (tmp_path / "log").read_text()
    reason = "could not be written (File too large); free some space or choose another folder"
    assert reason in log and "Traceback" not in log
    changed = [path for path, content in files("open-unmix").items() if before.get(path) != content]
    assert [path.suffix for path in changed if path.suffix != ".lock"] == []
    assert call("--checkpoint", "open-unmix", "--epochs", 2)[0] == 0


def test_loss_that_is_not_finite(call):
    assert call("--epochs", 1)[0] == 0
    before = checkpoint("open-unmix"), Path("open-unmix/vocals.pth").read_bytes()
    command = ["--checkpoint", "open-unmix", "--epochs", 3, "--lr", 1e20]
    code, _, complaint = call(*command)
    assert (
        code == 2
        and "error: vocals epoch 2, step 2: the loss is nan; the best model is kept;" in complaint
    )
    assert "lower the rate: python train.py --checkpoint open-unmix --lr 1e+19" in complaint
    network, expected = checkpoint("open-unmix")["state"]["network"], before[0]["state"]["network"]
    assert equal(network, expected)
    assert Path("open-unmix/vocals.pth").read_bytes() == before[1]


def test_what_fails_in_its_first_epoch_changes_nothing(call):
    """A rate that was too high is not the checkpoint's from then on."""
    assert call("--epochs", 1)[0] == 0
    before = files("open-unmix")
    assert call("--checkpoint", "open-unmix", "--epochs", 3, "--lr", 1e20)[0] == 2
    assert before == {path: text for path, text in files("open-unmix").items() if path in before}


CANNOT_BEGIN = [
    "--root nowhere",
    "--target piano",
    "--model nowhere",
    "--batch-size 4 --arch wrong",
]


@pytest.mark.parametrize("more", ["", "--overwrite"])
@pytest.mark.parametrize("flags", CANNOT_BEGIN)
def test_what_cannot_begin_leaves_the_earlier_training(flags, more, call, monkeypatch):
    """A slip of the pen costs nobody a trained model."""
    monkeypatch.setitem(train.ARCHITECTURES, "wrong", torch.nn.Identity)
    assert call("--epochs", 1)[0] == 0
    before = files("open-unmix")
    small = STEPS.split() if "--model" in flags or "--arch" in flags else SMALL
    code, _, complaint = call(*flags.split(), *more.split(), small=small)
    assert code == 2 and complaint.startswith("error: "), complaint
    assert before == {path: text for path, text in files("open-unmix").items() if path in before}


@pytest.mark.parametrize("patience", [0, 2, 4])
def test_early_stopping_and_plateau(patience, call, monkeypatch):
    """As openunmix's early stopping and PyTorch's scheduler decide; the state survives a resume."""
    openunmix = pytest.importorskip("openunmix")
    their = openunmix.utils.EarlyStopping(patience=patience or 10**9)
    losses = [5, 4, 4.5, 4.5, 3, 3.5, 3, 2.5, 3, 3, 3, 3, 3, 3]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.001)
    plateau = dict(factor=0.5, patience=1, cooldown=10)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **plateau)
    rates = []
    for epochs, loss in enumerate(losses, 1):  # what should come out
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
        if their.step(loss):
            break
    monkeypatch.setattr(train, "train", lambda *_: 1.0)
    monkeypatch.setattr(train, "validate", lambda *_: {"valid_loss": float(next(remaining))})
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)
    monkeypatch.setattr(train, "try_nothing", lambda *_: None)
    remaining = iter(losses)
    flags = ["--patience", patience, "--lr-decay-patience", 1, "--lr-decay-gamma", 0.5]
    assert call(*flags, "--epochs", 3)[0] == 0
    code, printed, _ = call("--checkpoint", "open-unmix", "--epochs", len(losses))
    found = record()
    assert code == 0 and found["valid_loss_history"] == losses[:epochs]
    assert found["lr_history"] == rates and found["best_loss"] == min(losses[:epochs])
    assert found["best_epoch"] == losses.index(found["best_loss"]) + 1
    assert found["num_bad_epochs"] == epochs - found["best_epoch"]
    assert ("stopped early" in printed) == found["stopped"] == (epochs < len(losses))
    assert epochs == len(losses) or patience


def test_negative_losses_lower_the_rate(call, monkeypatch):
    """A relative threshold would never be passed by them."""
    losses = iter([-1.0, -2.0, -2.0, -2.0, -3.0])
    monkeypatch.setattr(train, "try_nothing", lambda *_: None)
    monkeypatch.setattr(train, "train", lambda *_: -1.0)
    monkeypatch.setattr(train, "validate", lambda *_: {"valid_loss": next(losses)})
    assert call("--epochs", 5, "--lr-decay-patience", 1, "--lr-decay-gamma", 0.5)[0] == 0
    found = record()
    assert found["lr_history"] == [0.001] * 4 + [0.0005]
    assert (found["best_loss"], found["best_epoch"]) == (-3.0, 5)
    assert Path("open-unmix/vocals.png").stat().st_size > 1000


def test_longer_patience_revives_a_stopped_training(call, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: 1.0)
    monkeypatch.setattr(train, "validate", lambda *_: {"valid_loss": 1.0})
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)
    call("--epochs", 9, "--patience", 2)
    assert record()["epochs_trained"] == 3
    assert "finished" in call("--checkpoint", "open-unmix")[1]
    call("--checkpoint", "open-unmix", "--patience", 4)
    assert record()["epochs_trained"] == 5


# ----------------------------------------------------------------------------------- what is trained


def test_input_statistics(root):
    """Mean and deviation of all frames, as scikit-learn's StandardScaler has them: to 1e-6."""
    flags = ["--root", str(root), "--nfft", "1024", "--nhop", "256", "--quiet"]
    args = train.parse_args(flags)[0]
    paths = sorted(root.glob("train/*/mixture.wav"))
    songs = [soundfile.read(path, dtype="float32")[0].T for path in paths]
    pairs = [(torch.from_numpy(song.copy()), None) for song in songs]
    found = train.input_statistics(pairs, args, torch.device("cpu"))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = []
    for song in songs:
        padded = np.pad(song.astype(np.float64), ((0, 0), (512, 512)), mode="reflect")
        pieces = np.lib.stride_tricks.sliding_window_view(padded, 1024, axis=1)[:, ::256]
        frames.append(np.abs(np.fft.rfft(pieces * window)).mean(0))
    frames = np.concatenate(frames)  # (T, F)
    np.testing.assert_allclose(found["mean"], frames.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["scale"], np.sqrt(frames.var(0)), rtol=1e-6)


def test_statistics_read_no_target(call, monkeypatch):
    """They need the mixtures of training and nothing else; the network starts from them."""
    read, real = [], utils.AudioFile.blocks
    watch = lambda audio, *rest: read.append(Path(audio.path).stem) or real(audio, *rest)  # noqa: E731
    seen = {}

    def statistics(*arguments, real=train.input_statistics):
        with monkeypatch.context() as patch:
            patch.setattr(utils.AudioFile, "blocks", watch)
            seen.update(real(*arguments))
            return seen

    monkeypatch.setattr(train, "input_statistics", statistics)
    assert call("--epochs", 1, "--lr", 1e-12)[0] == 0
    assert read == ["mixture"] * 6
    weights = load("open-unmix/vocals.pth")
    torch.testing.assert_close(-weights["input_mean"], torch.tensor(seen["mean"][:129]))
    torch.testing.assert_close(1 / weights["input_scale"], torch.tensor(seen["scale"][:129]))


def test_several_targets(call, monkeypatch):
    """Each target has its model, and its statistics: a data set may give each its own mixtures."""
    calls = []
    real = train.input_statistics
    count = lambda *args: calls.append(1) or real(*args)  # noqa: E731
    monkeypatch.setattr(train, "input_statistics", count)
    targets = ["vocals", "drums", "bass", "other"]
    code, printed, _ = call("--target", *targets, "vocals", "--epochs", 1)
    assert code == 0 and len(calls) == 4 and printed.count("vocals epoch") == 1
    assert load_separator("open-unmix").targets == ["vocals", "drums", "bass", "other"]
    assert record()["valid_loss_history"] != record(target="other")["valid_loss_history"]
    assert call("--target", "accompaniment", "--epochs", 1)[0] == 0
    assert load_separator("open-unmix", "accompaniment").targets == ["accompaniment"]


@pytest.mark.parametrize("arch,kind", [("blstm", OpenUnmix), ("conv", ConvUnmix)])
@pytest.mark.parametrize("unidirectional", [False, True])
def test_architectures(arch, kind, unidirectional, call):
    """The folder records the network; a unidirectional one knows nothing of the future."""
    flags = ["--arch", arch, *["--unidirectional"] * unidirectional, "--bandwidth", 3000]
    assert call(*flags, "--epochs", 1)[0] == 0
    made = record()["network"]
    assert made["arch"] == arch and made["unidirectional"] is unidirectional
    network = load_separator("open-unmix").networks[0]
    assert type(network) is kind and network.mask == "sigmoid"
    assert network.max_bin == sum(bin * 8000 / 256 <= 3000 for bin in range(129))
    assert arch == "conv" or network.lstm.bidirectional is not unidirectional
    x = torch.rand(1, 2, 129, 50)
    changed = x.clone()
    changed[..., 30:] = 0
    with torch.no_grad():
        same = torch.equal(network(x)[..., :30], network(changed)[..., :30])
    assert same == unidirectional


def test_options_of_a_network(call):
    assert call("--arch", "conv", "--arch-options", "nb_layers=2", "--epochs", 1)[0] == 0
    assert len(load_separator("open-unmix").networks[0].layers) == 2
    assert call("--checkpoint", "open-unmix", "--epochs", 2)[0] == 0
    assert record()["network"]["nb_layers"] == 2 and record()["epochs_trained"] == 2


def test_mono(call):
    """A mono model is trained on the mean of both channels' magnitudes, as it is used."""
    assert call("--nb-channels", 1, "--epochs", 1)[0] == 0
    separator = load_separator("open-unmix")
    assert separator.nb_channels == 1 and separator.networks[0].nb_channels == 1
    args = train.parse_args(["--root", "x", *SMALL, "--nb-channels", "1"])[0]
    x = torch.randn(3, 2, 2000)
    expected = torch.stft(
        x.flatten(0, 1), 256, 64, window=torch.hann_window(256), return_complex=True
    )
    expected = expected.abs().unflatten(0, (3, 2)).mean(1, keepdim=True)
    torch.testing.assert_close(train.magnitudes(x, args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_fine_tuning(more, call, tmp_path):
    """From a folder's weights, with its settings, into the same folder; and continued."""
    model = dict(targets=("vocals", "bass"), hidden_size=24, nfft=512, sample_rate=8000)
    make_model(tmp_path / "open-unmix", **model)
    before = load(tmp_path / "open-unmix" / "vocals.pth")
    flags = "--target vocals bass --model open-unmix --epochs 1 --lr 1e-12 --weight-decay 0"
    code, printed, complaint = call(*flags.split(), *more, small=STEPS.split())
    assert code == 0, complaint
    assert ("the earlier training is now in open-unmix/previous/1" in printed) == (not more)
    expected = dict(hidden_size=24, nfft=512, nhop=128, mask="relu", sample_rate=8000, arch="blstm")
    args = record()["args"]
    assert {name: args[name] for name in expected} == expected
    after = load("open-unmix/vocals.pth")
    for name in before:
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    # the weights that it began with are elsewhere by now
    assert call("--checkpoint", "open-unmix", "--epochs", 2)[0] == 0
    assert load_separator("open-unmix").target_models["bass"].hidden_size == 24


def test_fine_tuning_of_a_published_folder(call, tmp_path):
    """One laid out as openunmix writes it, for 44.1 kHz: the songs are resampled."""
    make_model(tmp_path / "theirs", targets=("vocals",), nfft=512, published=True)
    flags = ["--model", "theirs", "--epochs", 1, "--preset", "best"]
    code, printed, complaint = call(*flags, small=STEPS.split())
    assert code == 0 and "44100 Hz" in printed, complaint
    assert record()["args"]["mask_start"] is None  # it did not begin where the preset says
    assert "some files are not in 44100 Hz (8000 Hz) and are resampled" in printed
    assert load_separator("open-unmix").sample_rate == 44100


HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no bfloat16 instructions")
def test_amp(call):
    """--amp: the validation loss of a short training stays within 2 % of float32's."""
    for output, flags in (("float32", []), ("bfloat16", ["--amp"])):
        code, printed, _ = call("--output", output, "--epochs", 3, *flags)
        assert code == 0 and output in printed.splitlines()[0]
    losses = [record(output)["valid_loss_history"][-1] for output in ("float32", "bfloat16")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    weights = load("bfloat16/vocals.pth").values()
    assert all(value.dtype != torch.bfloat16 for value in weights)
    printed = call("--checkpoint", "float32", "--epochs", 4, "--amp")[1]
    assert record("float32")["args"]["amp"] is True and "bfloat16" in printed
    assert call("--checkpoint", "float32", "--epochs", 5, "--no-amp")[0] == 0
    assert record("float32")["args"]["amp"] is False


def test_amp_without_bfloat16(root, tmp_path):
    """On a CPU without bfloat16 instructions: a line says so, and the training is float32's."""
    older = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    flags = ["--root", root, *SMALL, "--epochs", 1]
    for output, amp in (("wanted", ["--amp"]), ("plain", [])):
        command = ["train.py", *flags, *amp, "--output", output]
        printed, _ = run_script(*command, cwd=tmp_path, env=older)
        said = "this CPU has no bfloat16 instructions: --amp is left out, float32 is used"
        assert printed.count(said) == len(amp) and "(1 threads), float32" in printed
    assert equal(checkpoint(tmp_path / "wanted")["state"], checkpoint(tmp_path / "plain")["state"])


def test_sdr_is_that_of_the_stems(call, root):
    """An epoch's SDR is that of what separates with the model, with the mixture's phase."""
    call("--epochs", 2)
    separator = load_separator("open-unmix", niter=0)
    sdrs = []
    for n in (0, 7):  # those for validation
        mixture, vocals = (
            soundfile.read(root / f"train/Song {n}/{name}.wav")[0].T
            for name in ("mixture", "vocals")
        )
        estimate = separator(torch.from_numpy(mixture).float()[None])[0, 0].detach()
        sdrs.append(sdr(vocals, estimate))
    best = record()["best_epoch"] - 1
    assert record()["valid_SDR_history"][best] == pytest.approx(np.mean(sdrs), abs=1e-3)


def test_what_is_to_beat(call, root):
    """Before the first epoch a line says what the mixture as estimate gives, and silence."""
    printed = call("--epochs", 1)[1]
    nothing = record()["nothing"]
    songs = [
        [soundfile.read(root / f"train/Song {n}/{name}.wav")[0].T for name in ("mixture", "vocals")]
        for n in (0, 7)
    ]
    assert nothing["valid_SDR"] == pytest.approx(np.mean([sdr(y, x) for x, y in songs]), abs=1e-3)
    X, Y = (
        torch.cat([stft(torch.from_numpy(song[k]).float(), 256, 64).abs() for song in songs], -1)
        for k in (0, 1)
    )
    assert nothing["valid_loss"] == pytest.approx(torch.mean((X - Y) ** 2).item(), rel=1e-3)
    silence = torch.mean(Y**2).item()
    line = next(line for line in printed.splitlines() if "to beat" in line)
    assert f"loss {nothing['valid_loss']:.4g}, SDR {nothing['valid_SDR']:.2f} dB" in line
    assert f"loss {silence:.4g}, SDR 0 dB (silence)" in line
    assert "  SDR " in printed and not any("no better" in line for line in printed.splitlines())


def test_no_better_than_nothing(call, monkeypatch):
    """A training that learns nothing in a tenth of its epochs says so, also with --quiet."""
    result = {"valid_loss": 5.0, "valid_SDR": -9.0}
    monkeypatch.setattr(train, "validate", lambda *_: dict(result))
    monkeypatch.setattr(
        train, "try_nothing", lambda _, __, record, *___: record.update(nothing=result)
    )
    code, printed, _ = call("--epochs", 20, "--quiet")
    assert code == 0 and printed.count("no better than the mixture itself after") == 10
    assert "after 2 epochs: is the target in the mixture" in printed


def test_log_mse_hears_quiet_examples():
    """--loss log_mse: in dB, for each source of each example, whatever its level; silence is no matter."""
    y = torch.randn(3, 2, 2, 5000, generator=torch.Generator().manual_seed(0))  # (B, K, C, N)
    y[1] *= 1e-3
    y[:, 1] = 0
    x = y.sum(1) + 1e-4  # (B, C, N)
    factor = torch.tensor(0.5, requires_grad=True)
    args = argparse.Namespace(nfft=256, nhop=64, nb_channels=2, amp=False)

    def network(X):
        return factor * X.repeat(1, 2, 1, 1)

    expected = []
    for b, k in itertools.product(range(3), range(2)):
        X, Y = (stft(audio, 256, 64).abs() for audio in (x[b], y[b, k]))
        mse = (factor.item() * X - Y).square().mean()
        expected.append(10 * math.log10(mse / X.square().mean() + 0.1))
    loss = train.LOSSES["log_mse"](network, x, y.flatten(1, 2), args)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-4)
    silence = train.LOSSES["log_mse"](network, 0 * x, 0 * y.flatten(1, 2), args)
    (loss + silence).backward()
    assert silence == -10 and factor.grad.isfinite()


def test_metrics_share_one_pass(call, monkeypatch):
    """The network runs once for each validation track, however many metrics there are."""
    runs = []
    forward = OpenUnmix.forward
    monkeypatch.setattr(
        OpenUnmix, "forward", lambda self, x: runs.append(self.training) or forward(self, x)
    )
    monkeypatch.setitem(train.METRICS, "mse", train.mse_loss)
    call("--epochs", 1)
    found = record()
    assert found["valid_mse_history"] == found["valid_loss_history"]
    rehearsal = 9  # what was loaded, stages and fast forms, each beside the network; its samples
    assert runs.count(False) <= 2 + rehearsal


def test_metric_that_is_not_defined(call, root, tmp_path):
    """A silent target has no SDR: it counts for the loss only."""
    data = tmp_path / "data"
    for n in range(8):
        write_song(data / "train" / f"Song {n}", seconds=1, rate=8000, seed=n)
    silent = data / "train" / "Song 7" / "vocals.wav"
    soundfile.write(silent, np.zeros_like(soundfile.read(silent)[0]), 8000)
    train.main(["--root", str(data), *SMALL, "--epochs", "1"])
    found = record()
    assert all(map(math.isfinite, (*found["valid_SDR_history"], *found["valid_loss_history"])))


def test_select(call, monkeypatch):
    """--select sdr: the best epoch, and what lowers the rate, is that of the highest SDR."""
    results = [(1.0, 1.0), (2.0, 3.0), (0.5, 2.0)]
    for select, best in (("loss", 3), ("sdr", 2)):
        numbers = iter([(9.0, -9.0), *results])
        monkeypatch.setattr(
            train, "validate", lambda *_: dict(zip(("valid_loss", "valid_SDR"), next(numbers)))
        )
        call("--epochs", 3, "--select", select, "--output", select)
        found = record(select)
        assert (found["best_epoch"], found["best_loss"]) == (best, results[best - 1][0])
    code, _, complaint = call("--checkpoint", "sdr", "--select", "loss")
    assert code == 2 and "--select: --checkpoint goes on as the training began" in complaint


def test_select_what_is_not_defined(tmp_path, monkeypatch):
    """No SDR of silence: --select sdr would never find a best epoch, and save nothing."""
    for n in range(8):
        write_song(tmp_path / "data/train" / f"Song {n}", seconds=1, rate=8000, seed=n)
    for n in (0, 7):  # those for validation
        soundfile.write(tmp_path / f"data/train/Song {n}/vocals.wav", np.zeros((8000, 2)), 8000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="--select sdr: there is no SDR: the validation targets are silent"
    ):
        train.main(["--root", "data", *SMALL, "--epochs", "1", "--select", "sdr"])


def test_several_seeds(call):
    """Each in a folder of its own, as it would be alone; the best is copied to the model folder."""
    code, printed, _ = call("--epochs", 2, "--seed", 3, 1, "--target", "vocals", "drums")
    assert code == 0
    for seed in (1, 3):
        call("--epochs", 2, "--seed", seed, "--output", f"alone-{seed}")
        assert equal(
            checkpoint(f"open-unmix/seed-{seed}")["state"], checkpoint(f"alone-{seed}")["state"]
        )
    for target in ("vocals", "drums"):
        losses = {seed: record(f"open-unmix/seed-{seed}", target)["best_loss"] for seed in (1, 3)}
        best = min(losses, key=losses.get)
        assert (
            f"{target}: of 2 trainings seed-{best} is the best: loss {losses[best]:.4g}" in printed
        )
        assert record("open-unmix", target) == record(f"open-unmix/seed-{best}", target)
    separator = load_separator("open-unmix")
    assert separator.targets == ["vocals", "drums"]


def test_several_seeds_go_on(call):
    """--checkpoint continues what was interrupted, begins what was not begun, and picks the best."""
    flags = ("--epochs", 2, "--seed", 3, 1)
    call(*flags, "--output", "whole")
    call(*flags, "--output", "cut")
    for path in Path("cut").glob("vocals.*"):
        path.unlink()
    for path in Path("cut/seed-1").iterdir():
        path.unlink()
    state = torch.load("cut/seed-3/vocals.chkpnt", weights_only=True)
    code, printed, complaint = call("--checkpoint", "cut")
    assert code == 0, complaint
    assert equal(checkpoint("cut/seed-1"), checkpoint("whole/seed-1"))
    assert equal(state, checkpoint("cut/seed-3"))
    assert record("cut")["args"]["seed"] == record("whole")["args"]["seed"]
    best = record("cut")
    for path in Path("cut").glob("vocals.*"):  # killed before the best was copied
        path.unlink()
    code, printed, _ = call("--checkpoint", "cut")
    assert code == 0 and "all its trainings are finished" in printed
    assert record("cut") == best


def test_a_later_training_with_one_seed_stays(call):
    """Nor does an earlier one of several seeds, cut off before its first epoch, end the next."""
    call("--epochs", 1, "--seed", 3, 1)
    call("--epochs", 1, "--seed", 5)
    assert record("open-unmix")["args"]["seed"] == 5
    assert call("--checkpoint", "open-unmix")[0] == 0
    assert record("open-unmix")["args"]["seed"] == 5
    for path in Path("open-unmix").glob("seed-*/vocals.*"):  # begun, and without a record yet
        path.with_name(f"bass{path.suffix}").write_bytes(path.read_bytes())
        path.unlink()
    for path in Path("open-unmix").glob("seed-*/bass.json"):
        path.unlink()
    code, _, complaint = call("--epochs", 1, "--seed", 3, 1, "--target", "drums")
    assert code == 0, complaint
    assert not Path("open-unmix/bass.pth").exists()


def test_samples_per_epoch(call):
    """The tutorial's budget is work, not tracks: as many steps whatever the number of tracks."""
    steps = [word for word in SMALL if word not in ("--samples-per-track", "2")]
    call("--epochs", 1, "--samples-per-epoch", 12, small=steps)
    optimizer = checkpoint("open-unmix")["state"]["optimizer"]
    assert {state["step"].item() for state in optimizer["state"].values()} == {3}
    by_hand = train.parse_args(["--samples-per-track", "5"])[0]
    assert by_hand.preset == "tutorial" and by_hand.samples_per_epoch is None
    code, _, complaint = call("--samples-per-epoch", 12)  # beside --samples-per-track
    assert code == 2 and "--samples-per-epoch: counts an epoch's examples" in complaint


def test_presets():
    """The defaults are the published recipe; without --root a small one; flags by hand win."""
    recipe = dict(epochs=1000, patience=140, batch_size=16, seq_dur=6.0, samples_per_track=64)
    recipe |= dict(lr=1e-3, weight_decay=1e-5, lr_decay_patience=80, lr_decay_gamma=0.3)
    recipe |= dict(
        hidden_size=512, bandwidth=16000, nfft=4096, nhop=1024, nb_channels=2, seeds=[42]
    )
    recipe |= dict(
        source_augmentations=["gain", "channelswap"], mask="sigmoid", arch="blstm", mask_start=None
    )
    recipe |= dict(loss="mse", schedule="plateau", dropout=None)  # the network's own, 0.4
    for arguments in (["--root", "x"], ["--preset", "umx"]):
        args = train.parse_args(arguments)[0]
        assert {name: getattr(args, name) for name in recipe} == recipe
        assert args.preset == "umx" and args.target == ["vocals"]
    best = train.parse_args(["--root", "x", "--preset", "best"])[0]
    changed = {"loss": "log_mse", "mask_start": 0.25, "dropout": 0.1, "schedule": "cosine"}
    changed["preset"] = "best"
    assert vars(best) == {**vars(args), "root": "x", **changed}
    small = train.parse_args([])[0]
    assert small.preset == "tutorial" and small.epochs < 50 and small.hidden_size < 512
    assert train.parse_args(["--root", "x", "--preset", "tutorial"])[0].epochs == small.epochs
    by_hand = train.parse_args(["--epochs", "7", "--hidden-size=64"])[0]
    assert (by_hand.epochs, by_hand.hidden_size) == (7, 64)
    assert by_hand.batch_size == small.batch_size


def test_dry_run(call, monkeypatch):
    """One batch, one validation track, one save."""
    seen = []
    real = train.magnitudes
    watch = lambda x, *args: seen.append(len(x)) or real(x, *args)  # noqa: E731
    monkeypatch.setattr(train, "magnitudes", watch)
    assert call("--dry-run", "--epochs", 7)[0] == 0
    # statistics, rehearsal, the mixture as estimate, silence, what the network saw, batch, validation
    assert seen == [1, 1, *[1, 1] * 2, 1, 4, 4, 1, 1]
    assert record()["epochs_trained"] == 1 and Path("open-unmix/vocals.pth").exists()
    code, _, complaint = call("--checkpoint", "open-unmix")
    assert code == 2 and "vocals.chkpnt: is of a dry run; train anew" in complaint


def test_several_times_in_one_process(root, tmp_path, monkeypatch, capsys):
    """As in a notebook: it returns the folder, raises UserError, and sets no signal handlers."""
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(2):
        flags = ["--root", root, *SMALL, "--dry-run", "--output", "m", "--quiet"]
        assert train.main(flags) == Path("m") and (tmp_path / "m" / "vocals.pth").exists()
    with pytest.raises(UserError, match="nowhere: no such folder"):
        train.main(["--root", "nowhere"])
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


# -------------------------------------------------------------------------------------- what one sees


def test_record_and_lines(call):
    code, printed, _ = call("--epochs", 3)
    found = record()
    lines = [line for line in printed.splitlines() if line.startswith("vocals epoch")]
    for number, line in enumerate(lines):
        train_loss, valid_loss, lr = (found[name][number] for name in HISTORIES)
        expected = f"vocals epoch {number + 1}/3  train {train_loss:.4g}  valid {valid_loss:.4g}  "
        expected += f"SDR {found['valid_SDR_history'][number]:.4g}  lr {lr:.4g}  best "
        assert line.startswith(expected), line
    assert len(lines) == 3 and code == 0
    assert "6 training tracks, 2 validation tracks, 8000 Hz" in printed
    assert found["epochs_trained"] == 3 and found["best_loss"] == min(found["valid_loss_history"])
    assert all(len(found[name]) == 3 for name in (*HISTORIES, "train_time_history"))
    assert min(found["train_time_history"]) > 0
    flags = set(vars(train.parse_args([])[0])) - train.NOT_SAVED
    assert set(found["args"]) == flags and found["versions"]["torch"] == torch.__version__
    assert found["code"] == utils.code_fingerprint() and found["target"] == "vocals"
    git = ["git", "-C", FOLDER, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert found["commit"] == (commit or None)
    settings = {"sample_rate": 8000, "nfft": 256, "nhop": 64, "nb_channels": 2}
    assert json.loads(Path("open-unmix/separator.json").read_text()) == settings
    assert printed.splitlines()[-1].startswith(
        "trained: open-unmix/. Next: python test.py SONG.wav"
    )


def test_commit_is_found_once_and_kept(call, monkeypatch):
    """A record names the code that began the training, not what is checked out by now."""
    monkeypatch.setattr(train, "commit", lambda: "abc1234")
    call("--epochs", 1)
    monkeypatch.setattr(train, "commit", lambda: "def5678")
    call("--checkpoint", "open-unmix", "--epochs", 2)
    assert record()["commit"] == "abc1234"


def test_commit_of_a_copy_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert train.commit() is None  # no repository
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train.commit() is None  # no git


def test_next_names_what_can_be_scored(call, root, tmp_path):
    """Only data with a test part are offered to eval.py."""
    assert "eval.py" not in call("--dry-run")[1]
    for split in ("train", "valid", "test"):
        write_song(tmp_path / "data" / split / "Song", seconds=1, rate=8000)
    printed = call("--dry-run", "--dataset", "trackfolder_fix", "--root", "data", "--overwrite")[1]
    command = "python eval.py --dataset trackfolder_fix --root data --model open-unmix"
    assert printed.splitlines()[-1].endswith(command)


def test_quiet(call):
    """Bars and lines are silenced; warnings and the last line are not."""
    code, printed, shown = call("--epochs", 2, "--quiet")
    assert (code, shown) == (0, "") and printed.startswith("trained: open-unmix/. Next: ")
    assert printed.count("\n") == 1


def test_quiet_warnings(call):
    printed = call("--dry-run", "--quiet", "--sample-rate", 4000, "--overwrite")[1]
    assert "some files are not in 4000 Hz" in printed and printed.count("\n") == 2


def test_curves(monkeypatch, tmp_path):
    """Each metric of both kinds, the best epoch, and the steps of the learning rate."""
    pictures = []
    monkeypatch.setattr(train, "save_figure", lambda picture, path: pictures.append(picture))
    history = {
        "train_loss_history": [5.0, 3, 2, 1.5],
        "valid_loss_history": [6.0, 2.5, 4, 3],
        "valid_level_history": [-1.0, 0, 1, 2],
        "lr_history": [1e-3, 1e-3, 3e-4, 3e-4],
        "train_time_history": [1.0] * 4,
    }
    train.plot_curves({**history, "target": "vocals", "best_epoch": 2}, tmp_path / "x.png")
    axis, other = pictures[0].axes
    curves = [([*line.get_xdata()], [*line.get_ydata()]) for line in axis.lines]
    assert curves[0] == ([1, 2, 3, 4], history["train_loss_history"])
    assert curves[1] == ([1, 2, 3, 4], history["valid_loss_history"])
    assert curves[2] == ([2], [2.5]) and curves[3][0] == [3, 3]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["train loss", "valid loss", "best: 2.5 in epoch 2"]
    assert axis.get_yscale() == "log" and other.get_yscale() == "linear"
    assert [*other.lines[0].get_ydata()] == history["valid_level_history"]


def test_curves_are_drawn(call):
    assert call("--epochs", 1)[0] == 0
    content = Path("open-unmix/vocals.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_tensorboard(call):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert call("--epochs", 2, "--tensorboard")[0] == 0
    assert call("--checkpoint", "open-unmix", "--epochs", 3)[0] == 0
    events = EventAccumulator("open-unmix/vocals.tensorboard").Reload()
    for name in ("train_loss", "valid_loss", "lr"):
        found = {event.step: event.value for event in events.Scalars(name)}
        expected = record()[f"{name}_history"]
        np.testing.assert_allclose([found[1], found[2], found[3]], expected, rtol=1e-6)


def test_tensorboard_missing(call, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    code, _, complaint = call("--tensorboard")
    remedy = "--tensorboard: needs the package tensorboard (pip install tensorboard)"
    assert code == 2 and f"error: {remedy}" in complaint


@pytest.fixture()
def machine(monkeypatch):
    """Plays a machine with GPUs; returns what was set: the process's device, a backend."""
    done = []

    def play(cards, kind="cuda", **environment):
        done.clear()
        monkeypatch.setattr(os, "environ", {**os.environ, **environment})
        for owner in (torch.cuda, torch.accelerator):
            monkeypatch.setattr(owner, "device_count", lambda: cards)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
        monkeypatch.setattr(torch.cuda, "set_device", done.append)
        monkeypatch.setattr(train.dist, "init_process_group", lambda name, **_: done.append(name))
        return done

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    return play


@pytest.mark.parametrize(
    ("cards", "rank", "world", "expected"),
    [
        (1, 0, 1, ["cuda:0"]),
        (2, 1, 2, ["cuda:1", "nccl"]),
        (1, 1, 2, ["cuda:0", "gloo"]),  # nccl refuses two processes on one card
    ],
)
@pytest.mark.parametrize("flags", [[], ["--device", "cuda"]])
def test_set_up_of_a_gpu(machine, capsys, flags, cards, rank, world, expected):
    """Each process takes a card by its index, and computes deterministically there."""
    world = dict(LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    done = machine(cards, **world)
    device = train.set_up(train.parse_args(["--root", "x", *flags])[0])
    assert device == done[0] and device.index is not None and [*map(str, done)] == expected
    assert f"{device} (Card), float32 with TF32 products\n" in capsys.readouterr().out
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_set_up_of_another_gpu(machine):
    args = train.parse_args(["--root", "x", "--device", "mps"])[0]
    assert machine(1, "mps") == [] and train.set_up(args) == torch.device("mps")
    machine(1, "mps", WORLD_SIZE="2")
    with pytest.raises(UserError, match=r"^--device mps: several processes can't share it; start"):
        train.set_up(args)


def test_tf32_ends_with_the_training():
    """What is separated later in the same process is not computed in it."""
    for kind, precision in (("cuda:0", "high"), ("cpu", "highest")):
        with contextlib.suppress(KeyboardInterrupt), train.tf32(torch.device(kind)):
            assert torch.get_float32_matmul_precision() == precision
            raise KeyboardInterrupt
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(call):
    """Two trainings on a GPU are equal to the bit, the second continued; the CPU's to 1 %."""
    for output, device in (("cpu", "cpu"), ("one", "cuda"), ("two", "cuda")):
        epochs = [3] if output != "two" else [1, 3]
        assert call("--output", output, "--device", device, "--epochs", epochs[0])[0] == 0
        assert len(epochs) == 1 or call("--checkpoint", output, "--epochs", epochs[1])[0] == 0
    assert equal(checkpoint("one"), checkpoint("two"))
    ours, expected = (record(name)["valid_loss_history"] for name in ("one", "cpu"))
    assert ours == pytest.approx(expected, rel=0.01)
    assert math.isfinite(ours[-1])
