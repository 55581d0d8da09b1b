"""train.py: exact resume, several processes, nothing lost, precision, records; on tiny songs."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FOLDER, run_script

import train as train_script
from data import RandomMixes, index_musdb
from model import load_separator, stft
from train import EpochBatches, parse_args
from utils import UserError, load

SMALL = ["--hidden-size", "16", "--nfft", "512", "--nhop", "256", "--seq-dur", "0.5", "--samples-per-track", "2", "--batch-size", "4"]


def train(cwd, root, *flags, code=0, **kwargs):
    return run_script("train.py", "--root", root, *SMALL, *flags, cwd=cwd, code=code, **kwargs)


def result(folder, target="vocals"):
    """What must be the same after an interruption: all weights, histories and learning rates."""
    checkpoint = load(folder / f"{target}.chkpnt")
    best = load(folder / f"{target}.pth")
    histories = [checkpoint[f"{name}_history"] for name in ("train_loss", "valid_loss", "lr")]
    return {**checkpoint["state_dict"], **{f"best {name}": value for name, value in best.items()}}, histories


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


@pytest.fixture(scope="module")
def uninterrupted(musdb_root, tmp_path_factory):
    """Six epochs in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, musdb_root, "--epochs", 6)
    return folder / "open-unmix"


# ------------------------------------------------------------------------------------------------------------ resume


def test_same_command_same_numbers(uninterrupted, musdb_root, tmp_path):
    train(tmp_path, musdb_root, "--epochs", 6)
    assert same(result(uninterrupted), result(tmp_path / "open-unmix"))


def test_resume_after_some_epochs(uninterrupted, musdb_root, tmp_path):
    train(tmp_path, musdb_root, "--epochs", 2)
    printed, _ = run_script("train.py", "--checkpoint", "open-unmix", "--epochs", 4, cwd=tmp_path)
    assert "vocals epoch 3/4" in printed and "vocals epoch 2/4" not in printed
    run_script("train.py", "--checkpoint", "open-unmix", "--epochs", 6, cwd=tmp_path)
    assert same(result(uninterrupted), result(tmp_path / "open-unmix"))
    record = json.loads((tmp_path / "open-unmix" / "vocals.json").read_text())
    assert record["epochs_trained"] == 6 and all(len(record[f"{n}_history"]) == 6 for n in ("train_loss", "valid_loss", "train_time", "lr"))
    assert len(record["input_statistics"]["mean"]) == 257  # taken over, not computed again


def start(cwd, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(cwd)}
    command = [sys.executable, str(FOLDER / "train.py"), *map(str, command)]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_resume_after_kills_at_random_moments(uninterrupted, musdb_root, tmp_path):
    """kill -9, again and again, until the training gets through: the same bits as without."""
    rng, kills = random.Random(1), 0
    command = ["--root", musdb_root, *SMALL, "--epochs", 6]
    while True:
        process = start(tmp_path, *command)
        checkpoint, deadline = tmp_path / "open-unmix" / "vocals.chkpnt", time.time() + 60
        while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and checkpoint.stat().st_mtime_ns == before and time.time() < deadline:
            time.sleep(0.002)  # until it has got on by an epoch, and a little further
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        command = ["--checkpoint", "open-unmix"]
    assert process.returncode == 0, process.communicate()[1]
    assert kills >= 2
    assert same(result(uninterrupted), result(tmp_path / "open-unmix"))


def test_ctrl_c_says_how_to_continue(uninterrupted, musdb_root, tmp_path):
    process = start(tmp_path, "--root", musdb_root, *SMALL, "--epochs", 6)
    while not (tmp_path / "open-unmix" / "vocals.pth").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate()
    assert process.returncode == 130
    assert "--checkpoint open-unmix" in complaint and "Traceback" not in complaint
    run_script("train.py", "--checkpoint", "open-unmix", cwd=tmp_path)
    assert same(result(uninterrupted), result(tmp_path / "open-unmix"))


# --------------------------------------------------------------------------------------------------- several processes


def test_batches_do_not_depend_on_the_number_of_processes(monkeypatch):
    def batches(rank, world, epoch):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        sampler = EpochBatches(22, 5, seed=3)
        sampler.epoch = epoch
        return list(sampler)

    for epoch in (0, 7):
        whole = batches(0, 1, epoch)
        assert len(whole) == 4 and all(len(batch) == 5 for batch in whole)
        assert len({index for batch in whole for index in batch}) == 20 and all(epoch * 22 <= i < (epoch + 1) * 22 for b in whole for i in b)
        shares = [batches(rank, 3, epoch) for rank in range(3)]
        assert [sorted(sum((share[step] for share in shares), [])) for step in range(4)] == [sorted(batch) for batch in whole]
    assert batches(0, 1, 0) != [[i - 22 for i in batch] for batch in batches(0, 1, 1)]
    with pytest.raises(UserError, match="--batch-size 5: is less than the number of processes, 6"):
        batches(0, 6, 0)


def torchrun(cwd, *flags, processes=2, code=0):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(FOLDER / "train.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(cwd)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code or code, done.stdout + done.stderr
    return done


def test_two_processes_equal_one(musdb_root, tmp_path):
    """Without dropout (--arch conv): the same losses to 1e-5, batch norm included; then on with one process."""
    flags = ["--root", musdb_root, *SMALL, "--arch", "conv", "--epochs", 3]
    run_script("train.py", *flags, "--output", "one", cwd=tmp_path)
    done = torchrun(tmp_path, *flags, "--output", "two")
    assert done.stdout.count("conv") == 0 and done.stdout.count("vocals epoch 3/3") == 1  # only the first process prints
    run_script("train.py", "--checkpoint", "one", "--epochs", 4, cwd=tmp_path)
    run_script("train.py", "--checkpoint", "two", "--epochs", 4, cwd=tmp_path)
    one, two = (result(tmp_path / name)[1] for name in ("one", "two"))
    for a, b in zip(one[:2], two[:2]):
        np.testing.assert_allclose(a[:3], b[:3], rtol=1e-5)
        np.testing.assert_allclose(a[3], b[3], rtol=1e-4)  # rounding grows from epoch to epoch


def test_one_lost_process_ends_the_job(musdb_root, tmp_path):
    """With a clear line, and a checkpoint to go on from."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, signal, sys, train, utils\n"
        "validate = train.validate\n"
        "def dies(network, *rest):\n"
        "    if os.environ['RANK'] == '1' and os.path.exists('open-unmix/vocals.pth'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return validate(network, *rest)\n"
        "train.validate = dies\n"
        "utils.run(train.main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    command += [str(driver), "--root", str(musdb_root), *SMALL, "--arch", "conv", "--epochs", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "--checkpoint open-unmix" in done.stderr
    assert load(tmp_path / "open-unmix" / "vocals.chkpnt")["epochs_trained"] >= 1


# --------------------------------------------------------------------------------------------------- nothing is lost


def test_an_earlier_training_is_moved_aside(uninterrupted, musdb_root, tmp_path):
    for turn in range(3):
        printed, _ = train(tmp_path, musdb_root, "--epochs", 1, "--seed", turn)
        assert ("previous" in printed) == (turn > 0)
    previous = sorted(path.name for path in (tmp_path / "open-unmix" / "previous").iterdir())
    assert previous == [f"vocals-{n}.{suffix}" for n in (1, 2) for suffix in ("chkpnt", "json", "png", "pth")]
    assert load(tmp_path / "open-unmix" / "previous" / "vocals-2.json")["args"]["seed"] == 1
    train(tmp_path, musdb_root, "--epochs", 1, "--overwrite")
    assert len(list((tmp_path / "open-unmix" / "previous").iterdir())) == 8


def test_unwritable_folder(musdb_root, tmp_path):
    (tmp_path / "file").write_text("")
    _, complaint = train(tmp_path, musdb_root, "--output", "file/model", code=2)
    assert complaint.strip().splitlines()[-1].startswith("error: file/model")


def test_disk_full_keeps_the_last_checkpoint(musdb_root, tmp_path):
    train(tmp_path, musdb_root, "--epochs", 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "open-unmix").iterdir()}
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
    code += "import sys, train, utils; sys.argv = ['train.py', '--checkpoint', 'open-unmix', '--epochs', '3']; utils.run(train.main)"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "open-unmix").iterdir()}["vocals.chkpnt"] == before["vocals.chkpnt"]
    assert not [path for path in (tmp_path / "open-unmix").iterdir() if path.name.endswith(".part")]


def test_a_loss_that_is_not_finite_stops(musdb_root, tmp_path):
    _, complaint = train(tmp_path, musdb_root, "--mask", "relu", "--lr", "1e30", "--epochs", 5, code=2)
    line = complaint.strip().splitlines()[-1]
    assert "the loss is" in line and "step" in line and "learning rate 1e+30" in line and "try a lower" in line


# ---------------------------------------------------------------------------------------------------------- the rest


def test_early_stopping(musdb_root, tmp_path):
    printed, _ = train(tmp_path, musdb_root, "--lr", "1e-12", "--patience", 2, "--epochs", 30, "--weight-decay", 0)
    record = load(tmp_path / "open-unmix" / "vocals.json")
    assert record["epochs_trained"] < 30 and record["num_bad_epochs"] == 2 and "stopped early" in printed
    assert record["best_loss"] == min(record["valid_loss_history"])
    assert record["valid_loss_history"][record["best_epoch"] - 1] == record["best_loss"]


def test_several_targets_share_the_statistics(musdb_root, tmp_path, monkeypatch, capsys):
    calls = []
    statistics = train_script.input_statistics
    monkeypatch.setattr(train_script, "input_statistics", lambda *arguments: calls.append(1) or statistics(*arguments))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--root", str(musdb_root), *SMALL, "--epochs", "1", "--target", "vocals", "bass", "--quiet"])
    train_script.main()
    assert len(calls) == 1
    assert len(capsys.readouterr().out.strip().splitlines()) == 1  # --quiet: the last line only
    assert load_separator(tmp_path / "open-unmix").targets == ["vocals", "bass"]


def test_input_statistics(musdb_root):
    """Equal to a straight float64 computation over all frames to 1e-6."""
    args, _ = parse_args(["--root", str(musdb_root), "--nfft", "512", "--nhop", "256"])
    from data import WholeTracks

    tracks = index_musdb(musdb_root, "train")
    dataset = WholeTracks(tracks, "vocals", 44100)
    found = train_script.input_statistics(dataset, args, torch.device("cpu"))
    frames = torch.cat([stft(x, 512, 256).abs().double().mean(0) for x, _ in dataset], dim=1).numpy()
    np.testing.assert_allclose(found["mean"], frames.mean(1), rtol=1e-6)
    scale = np.maximum(frames.std(1), 1e-4 * frames.std(1).max())
    np.testing.assert_allclose(found["scale"], scale, rtol=1e-6)


def test_bfloat16_is_close(musdb_root, tmp_path):
    losses = []
    for flag in ([], ["--amp"]):
        train(tmp_path, musdb_root, "--epochs", 4, "--output", f"m{len(flag)}", *flag)
        losses.append(load(tmp_path / f"m{len(flag)}" / "vocals.json")["valid_loss_history"][-1])
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


def test_other_architecture_and_causal_model(musdb_root, tmp_path):
    train(tmp_path, musdb_root, "--epochs", 1, "--arch", "conv", "--unidirectional")
    network = load_separator(tmp_path / "open-unmix").target_models["vocals"]
    assert type(network).__name__ == "ConvUnmix" and network.unidirectional and network.mask == "sigmoid"


def test_fine_tuning(uninterrupted, musdb_root, tmp_path):
    flags = ["--root", musdb_root, "--seq-dur", 0.5, "--samples-per-track", 2, "--batch-size", 4, "--epochs", 1, "--lr", 1e-6]
    run_script("train.py", *flags, "--model", uninterrupted, cwd=tmp_path)
    tuned = load(tmp_path / "open-unmix" / "vocals.json")
    assert tuned["args"]["nfft"] == 512 and tuned["args"]["hidden_size"] == 16  # the weights' settings
    assert tuned["valid_loss_history"][0] == pytest.approx(load(uninterrupted / "vocals.json")["best_loss"], rel=0.05)
    _, complaint = run_script("train.py", *flags, "--model", uninterrupted, "--nfft", 1024, cwd=tmp_path, code=2)
    assert "--nfft" in complaint


def test_presets():
    tutorial, _ = parse_args([])
    assert tutorial.preset == "tutorial" and tutorial.hidden_size == 256 and tutorial.weight_decay == 1e-5
    published, _ = parse_args(["--root", "x"])
    names = ("epochs", "patience", "batch_size", "seq_dur", "samples_per_track", "lr", "weight_decay", "lr_decay_patience", "lr_decay_gamma")
    assert [getattr(published, name) for name in names] == [1000, 140, 16, 6.0, 64, 0.001, 1e-5, 80, 0.3]
    assert (published.hidden_size, published.bandwidth, published.source_augmentations) == (512, 16000, ["gain", "channelswap"])
    assert parse_args(["--epochs", "7"])[0].epochs == 7  # given by hand: wins over the preset
    assert parse_args(["--preset", "umx"])[0].epochs == 1000


def test_training_learns(uninterrupted):
    history = load(uninterrupted / "vocals.json")["train_loss_history"]
    assert history[-1] < history[0] and all(math.isfinite(loss) for loss in history)


def test_examples_of_two_epochs_differ(musdb_root):
    dataset = RandomMixes(index_musdb(musdb_root, "train"), "vocals", 44100, seq_dur=0.5, samples_per_track=2)
    assert not torch.equal(dataset[0][0], dataset[len(dataset)][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_cuda(musdb_root, tmp_path):
    printed, _ = train(tmp_path, musdb_root, "--epochs", 2, "--device", "cuda")
    assert "TF32" in printed
    run_script("train.py", "--checkpoint", "open-unmix", "--epochs", 3, "--device", "cpu", cwd=tmp_path)
