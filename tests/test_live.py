"""docs/live.py: the stems that come live are the offline ones, on time, through a pipe."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import FOLDER, random_network, remembering, run_script, sdr

import model
import utils
from model import Separator
from utils import save

LIVE = FOLDER / "docs" / "live.py"
spec = importlib.util.spec_from_file_location("live", LIVE)
live = importlib.util.module_from_spec(spec)
spec.loader.exec_module(live)
TARGETS = ("vocals", "drums")


def separator(nb_bins=129, n_hop=64, nb_channels=2, **settings):
    shape = dict(nb_bins=nb_bins, hidden_size=16, nb_channels=nb_channels, unidirectional=True)
    networks = {name: remembering(random_network(j, **shape)) for j, name in enumerate(TARGETS)}
    stft = dict(n_fft=2 * nb_bins - 2, n_hop=n_hop, nb_channels=nb_channels)
    return Separator(networks, niter=0, **stft, **settings)


@pytest.mark.parametrize("n_hop", [64, 128, 50])
@pytest.mark.parametrize("length", [1, 129, 300, 20000])
def test_live_is_offline(length, n_hop):
    """To 90 dB, whatever the sizes of blocks, hop and recording; also shares of the mixture."""
    for settings in ({}, {"residual": True}, {"softmask": True}, {"nb_channels": 1}):
        whole = separator(n_hop=n_hop, **settings)
        audio = torch.randn(settings.get("nb_channels", 2), length)
        with torch.no_grad():
            expected = whole(audio[None])[0]
        for size in (1, 64, 333) if length < 400 else (64, 333, 30000):
            found = torch.cat(list(live.live(whole, audio.split(size, -1))), dim=-1)
            assert found.shape == expected.shape and sdr(expected, found) > 90
        found = torch.cat(list(whole.stream([audio])), dim=-1)
        assert sdr(expected, found) > 90


def test_without_its_state_it_is_not():
    """The networks of these tests do look back: an LSTM that always begins anew is far away."""
    whole, audio = separator(), torch.randn(2, 5000)
    with torch.no_grad():
        expected = whole(audio[None])[0]
        for network in whole.networks:
            network.lstm.register_forward_pre_hook(lambda _, inputs: (inputs[0], None))
    found = torch.cat(list(live.live(whole, audio.split(64, -1))), dim=-1)
    assert sdr(expected, found) < 40


def test_real_music(excerpt):
    whole, audio = separator(2049, 1024), excerpt["mixture"][:, :150000]
    with torch.no_grad():
        expected = whole(audio[None])[0]
    found = torch.cat(list(live.live(whole, audio.split(1024, -1))), dim=-1)
    assert sdr(expected, found) > 90


def test_latency():
    """When n samples have come, the first n - n_fft + n_hop of the stems are there."""
    whole, came, done, late = separator(2049, 1024), 0, 0, set()

    def blocks():
        nonlocal came
        for _ in range(20):
            came += 1024
            yield torch.randn(2, 1024)

    for stems in live.live(whole, blocks()):
        done += stems.shape[-1]
        if 4096 <= came < 20 * 1024:
            late.add(came - done)
    assert late == {4096 - 1024} and done == came == 20 * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model folders at 8 kHz: causal, one that sees the future, one of convolutions."""
    folder = tmp_path_factory.mktemp("live")
    kinds = {"causal": {"unidirectional": True}, "bidirectional": {}, "conv": {"arch": "conv"}}
    for name, settings in kinds.items():
        stft = dict(sample_rate=8000, nfft=256, nhop=64, nb_channels=2)
        save(stft, folder / name / "separator.json")
        for j, target in enumerate(TARGETS):
            network = random_network(j, nb_bins=129, hidden_size=16, **settings)
            network = network if name == "conv" else remembering(network)
            save({"args": {}, "network": network.made_with}, folder / name / f"{target}.json")
            save(network.state_dict(), folder / name / f"{target}.pth")
    return folder


@pytest.mark.parametrize("targets", [["vocals"], ["vocals", "drums"]])
def test_through_a_pipe(folder, targets):
    audio = torch.randn(2, 7777) / 4
    command = [sys.executable, LIVE, "--model", "causal", "--targets", *targets]
    done = subprocess.run(command, cwd=folder, input=audio.T.numpy().tobytes(), capture_output=True)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    found = found.view(-1, len(targets), 2).permute(1, 2, 0)  # (J, C, N)
    whole = model.load_separator(folder / "causal", targets, niter=0)
    with torch.no_grad():
        assert sdr(whole(audio[None])[0], found) > 90


def test_what_is_not_causal_is_refused(folder):
    _, complaint = run_script("docs/live.py", "--model", "bidirectional", cwd=folder, code=2)
    assert complaint.startswith("error: bidirectional: not causal by its LSTM alone; train it")
    with pytest.raises(utils.UserError, match="conv: not causal by its LSTM alone; train it"):
        live.main(["--model", str(folder / "conv")])


def test_no_samples(folder):
    done = subprocess.run(
        [sys.executable, LIVE, "--model", "causal"], cwd=folder, input=b"", capture_output=True
    )
    assert done.returncode == 2 and done.stderr == b"error: the recording has no samples\n"


def test_length():
    assert len(LIVE.read_text(encoding="utf-8").splitlines()) <= 60
