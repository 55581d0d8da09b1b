"""How far our numbers are from those of independent implementations, on the real excerpt.

    python benchmarks/same_numbers.py

The tests hold each of these to a tolerance; this prints what is measured.
"""

import shutil
import tempfile
from pathlib import Path

from common import hardware_and_versions, import_openunmix

import numpy as np
import torch
from tests.conftest import EXCERPT, random_network, read_tracks, sdr

from data import decode_stem
from model import Separator, stft, stream, wiener
from utils import import_museval

TARGETS = ("vocals", "drums", "bass", "other")


def published(network, hidden_size):
    import openunmix.model

    theirs = openunmix.model.OpenUnmix(nb_bins=2049, hidden_size=hidden_size, max_bin=1487)
    theirs.load_state_dict(network.state_dict())
    return theirs.eval()


def relative(ours, theirs):
    """The largest difference, relative to the largest value."""
    return f"{((ours - theirs).abs().max() / theirs.abs().max()).item():.1e}"


def worst(theirs, ours):
    """The least agreement of four stems (J, C, N), in dB."""
    return f"{min(map(sdr, theirs, ours)):.0f} dB"


def network_rows():
    ours = random_network(0, hidden_size=512, mask="relu")
    theirs = published(ours, 512)
    x = torch.rand(2, 2, 2049, 100) * 10
    outputs, gradients = [], []
    for network in (ours, theirs):
        outputs.append(network(x))
        outputs[-1].square().mean().backward()
        gradients.append(network.fc1.weight.grad)
    yield "network, output", "openunmix", "relative 1e-5", relative(*outputs)
    yield "network, gradient of fc1", "openunmix", "relative 1e-4", relative(*gradients)


@torch.no_grad()
def separator_rows(excerpt):
    import openunmix.model

    networks = {
        name: random_network(j, hidden_size=64, mask="relu") for j, name in enumerate(TARGETS)
    }
    theirs = {name: published(network, 64) for name, network in networks.items()}
    audio = excerpt["mixture"][None]
    rows = []
    for niter in (0, 1, 2):
        ours = Separator(networks, niter=niter)(audio)[0]
        expected = openunmix.model.Separator(theirs, niter=niter)(audio)[0]
        rows.append((f"four stems, niter {niter}", "openunmix", "60 dB", worst(expected, ours)))
    separator = Separator(networks)
    parts = torch.cat(list(stream(separator, audio[0].split(50000, 1), 100)), -1)
    agreement = worst(separator(audio)[0], parts)
    rows.append(("four stems, streamed", "the same in one piece", "90 dB", agreement))
    return rows


def wiener_rows(excerpt):
    import norbert

    X = stft(excerpt["mixture"].double())
    V = torch.stack([stft(excerpt[name].double()).abs() for name in TARGETS]) + 0.1 * X.abs()
    v, x = V.permute(3, 2, 1, 0).numpy(), X.permute(2, 1, 0).numpy()
    for niter in (1, 2):
        theirs = norbert.wiener(v, x.copy(), niter, use_softmask=False, eps=1e-10)
        theirs = torch.from_numpy(theirs).permute(3, 2, 1, 0)
        ours = wiener(V[None], X[None], niter)[0]
        name = f"Wiener filter in float64, niter {niter}"
        yield name, "norbert", "relative 1e-10", relative(ours, theirs)
    single = wiener(V[None].float(), X[None].to(torch.complex64))[0]
    agreement = f"{sdr(wiener(V[None], X[None])[0], single):.0f} dB"
    yield "Wiener filter in float32", "the same in float64", "60 dB", agreement


def decoding_rows(excerpt):
    what = "stems decoded to WAV", "musdb", "one unit of 16 bits"
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        yield *what, "not measured: musdb needs ffmpeg and ffprobe on PATH"
        return
    import musdb

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test").mkdir()
        (Path(folder) / "test" / EXCERPT.name).symlink_to(EXCERPT)
        [track] = musdb.DB(folder, subsets="test").tracks
        stems = {name: track.targets[name].audio.T for name in TARGETS}
    differences = [np.abs(stems[name] - excerpt[name].numpy()).max() for name in TARGETS]
    yield *what, f"{max(differences) * 32768:.2f} units"


def evaluation_rows(excerpt):
    from eval import bss_eval

    museval, rng = import_museval(), np.random.default_rng(0)
    references = np.stack([excerpt[name].numpy() for name in TARGETS])
    estimates = references + 0.1 * references[[1, 2, 3, 0]]
    estimates = estimates + 0.003 * rng.standard_normal(references.shape)
    for noise, amount in (("", 0.0), (" with noise at -80 dB", 1e-4)):
        truth = references + amount * rng.standard_normal(references.shape)
        theirs = museval.evaluate(truth.transpose(0, 2, 1), estimates.transpose(0, 2, 1))
        ours = bss_eval(truth, estimates)
        metrics = zip(("SDR", "ISR", "SIR", "SAR"), theirs)
        gap = max(np.nanmax(np.abs(ours[metric] - scores)) for metric, scores in metrics)
        tolerance = "1e-3 dB" if amount else "museval's own rounding"
        yield f"BSS Eval v4, excerpt{noise}", "museval", tolerance, f"{gap:.1e} dB"


def main():
    import_openunmix()
    print(hardware_and_versions(), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        decode_stem(EXCERPT, Path(folder, "song"))
        excerpt = read_tracks(Path(folder, "song"))
    print("| what | compared with | tolerance | measured |\n|---|---|---|---|")
    for rows in (network_rows(), *(part(excerpt) for part in PARTS)):
        for row in rows:
            print("| " + " | ".join(row) + " |", flush=True)


PARTS = (separator_rows, wiener_rows, decoding_rows, evaluation_rows)

if __name__ == "__main__":
    main()
