"""What the tests share: real audio, tiny datasets and models, running the scripts as a user would."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import utils

utils.import_torchaudio()  # so that openunmix, which imports it, can

from torch import nn  # noqa: E402

import model  # noqa: E402
from data import decode_stem  # noqa: E402
from model import OpenUnmix, make_network  # noqa: E402

FOLDER = Path(__file__).parents[1]
STEMPEG = Path(importlib.util.find_spec("stempeg").origin).parent
EXCERPT = STEMPEG / "data" / "The Easton Ellises - Falcon 69.stem.mp4"


def pytest_configure():
    torch.set_num_threads(1)  # tests run in two processes
    # a shell's background jobs, and all they start, ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)


class ConvUnmix(OpenUnmix):
    """Somebody's network: dilated convolutions in place of the LSTM, 40 frames to either side."""

    def __init__(self, *args, nb_layers=4, **kwargs):
        super().__init__(*args, nb_layers=1, **kwargs)
        self.past_only = not self.lstm.bidirectional
        del self.lstm
        size = self.hidden_size
        self.layers = nn.ModuleList(
            nn.Conv1d(size, size, 3, dilation=3**layer, groups=4) for layer in range(nb_layers)
        )

    def recur(self, h):
        context = h.permute(1, 2, 0)  # (B, H, T)
        for layer in self.layers:
            reach = layer.dilation[0]
            padding = (2 * reach, 0) if self.past_only else (reach, reach)
            context = context + nn.functional.relu(layer(nn.functional.pad(context, padding)))
        return self.join(h, context.permute(2, 0, 1))  # (T, B, H)


model.ARCHITECTURES["conv"] = ConvUnmix


def sdr(reference, estimate):
    """Signal-to-distortion ratio in dB of arrays or tensors of any shape."""
    reference, estimate = np.asarray(reference), np.asarray(estimate)
    error = np.sum(np.abs(reference - estimate) ** 2)
    return 10 * np.log10(np.sum(np.abs(reference) ** 2) / error) if error else np.inf


@pytest.fixture(scope="session")
def excerpt_folder(tmp_path_factory):
    """The excerpt of a real song that stempeg ships, as a track folder of musdb's WAV layout."""
    folder = tmp_path_factory.mktemp("excerpt") / "test" / EXCERPT.name.removesuffix(".stem.mp4")
    folder.parent.mkdir()
    decode_stem(EXCERPT, folder)
    return folder


@pytest.fixture(scope="session")
def excerpt(excerpt_folder):
    """Its mixture and sources: {name: (2, N) float32 tensor}, six seconds at 44.1 kHz."""
    return read_tracks(excerpt_folder)


def read_tracks(folder):
    """The WAV files of a track folder: {name: (C, N) float32 tensor}."""
    files = {path.stem: soundfile.read(path, dtype="float32")[0].T for path in folder.glob("*.wav")}
    return {name: torch.from_numpy(audio.copy()) for name, audio in files.items()}


def write_song(
    folder, seconds=2.0, rate=44100, seed=0, channels=2, names=("drums", "bass", "other", "vocals")
):
    """A tiny song of noise and tones in musdb's WAV layout, 16 bit."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate))[:, None] / rate
    total = 0
    for j, name in enumerate(names):
        tone = np.sin(2 * np.pi * 110 * 2**j * rng.uniform(0.9, 1.1) * time)
        tone = tone * rng.uniform(0.2, 1, channels)
        noise = rng.standard_normal((len(time), channels))
        audio = np.round(3000 * tone + 1000 * noise).astype(np.int16)
        soundfile.write(folder / f"{name}.wav", audio, rate)
        total = total + audio
    soundfile.write(folder / "mixture.wav", total, rate)


@pytest.fixture(scope="session")
def musdb_root(tmp_path_factory):
    """A dataset of tiny songs in musdb's WAV layout: eight for training, two for test."""
    root = tmp_path_factory.mktemp("musdb")
    for n in range(8):
        write_song(root / "train" / f"Song {n}", seed=n)
    for n in range(2):
        write_song(root / "test" / f"Test {n}", seconds=3, seed=100 + n)
    return root


def random_network(seed, **settings):
    """A network in evaluation mode whose parameters and statistics are all random."""
    torch.manual_seed(seed)
    nb_bins = settings.get("nb_bins", 2049)
    mean, scale = torch.rand(nb_bins) * 2, torch.rand(nb_bins) * 2 + 0.5
    network = make_network(**{"max_bin": nb_bins * 1487 // 2049, **settings})
    network.input_mean.data = -mean[: network.max_bin]
    network.input_scale.data = 1 / scale[: network.max_bin]
    for value in network.buffers():
        if value.dtype.is_floating_point:
            value.uniform_(0.5, 1.5)
    for name in ("output_scale", "output_mean"):
        getattr(network, name).data.uniform_(0.5, 1.5)
    return network.eval()


def remembering(network):
    """`random_network`'s, but what its LSTM says decides the mask: else ReLU silences nearly all."""
    with torch.no_grad():
        for weight in network.lstm.parameters():
            weight *= 2
        network.bn2.running_mean.zero_()
        network.bn2.running_var /= 10
    return network


def make_model(
    folder,
    targets=("vocals", "drums", "bass", "other"),
    hidden_size=16,
    mask="relu",
    seed=0,
    sample_rate=44100,
    nfft=4096,
    nb_channels=2,
    arch="blstm",
    published=False,
):
    """A model folder with random but seeded weights: ours, or laid out as openunmix writes it."""
    folder = Path(folder)
    settings = dict(sample_rate=sample_rate, nfft=nfft, nhop=nfft // 4, nb_channels=nb_channels)
    utils.save(settings, folder / "separator.json")
    shape = dict(hidden_size=hidden_size, nb_channels=nb_channels)
    for j, target in enumerate(targets):
        made = dict(arch=arch, mask=mask, nb_bins=nfft // 2 + 1, unidirectional=False)
        network = random_network(seed + j, **made, **shape)
        args = {**shape, "nfft": nfft, "nhop": nfft // 4, "unidirectional": False}
        record = {"args": args if published else {**args, "mask": mask, "arch": arch}}
        if not published:
            record["network"] = network.made_with
        utils.save(record, folder / f"{target}.json")
        weights = f"{target}-{j:08x}.pth" if published else f"{target}.pth"
        utils.save(network.state_dict(), folder / weights)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def run_script(*command, cwd, timeout=300, env=None, code=0, threads=1):
    """Run `python <script> ...` as a user would; check the exit code; returns (stdout, stderr)."""
    script, *arguments = map(str, command)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HOME": str(cwd), **(env or {})}
    command = [sys.executable, str(FOLDER / script), *arguments]
    settings = dict(cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    done = subprocess.run(command, **settings)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert code == 0 or "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


# Imports the libraries, which takes seconds, once, and forks for each piece of code that it is sent.
SERVER = """
import json, os, sys, traceback
import matplotlib.figure, torch, torch._dynamo, utils
utils.import_torchaudio(), utils.import_museval()
sys.path.remove(""), sys.modules.pop("utils")  # the code may bring its own
torch.set_num_threads(1)
for line in sys.stdin:
    folder, code = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.dup2(os.open("printed.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
        os.dup2(1, 2)
        status = 0
        try:
            exec(code)  # in __main__: there other processes look for its classes
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def python():
    """A function that runs code in a folder, in a process of its own: exit code and what it prints."""

    def alone(code, folder):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    if not hasattr(os, "fork"):
        yield alone
        return
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", SERVER], cwd=FOLDER, **pipes) as server:

        def run(code, folder):
            server.stdin.write(json.dumps([str(folder), code]) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return status, (folder / "printed.txt").read_text(encoding="utf-8")

        yield run
        server.stdin.close()


class InThisProcess:
    """Stands for ProcessPoolExecutor, so that a test need not wait for another process to start."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except utils.FAILURES as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass
