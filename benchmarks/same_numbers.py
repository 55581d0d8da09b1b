"""How far our numbers are from those of independent implementations, on the real excerpt: python benchmarks/same_numbers.py

The tests hold each of these to a tolerance; this prints what is measured.
"""

import sys
import tempfile
from pathlib import Path

from common import FOLDER, hardware_and_versions, import_openunmix

sys.path.insert(0, str(FOLDER / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import EXCERPT, random_network, read_tracks, sdr  # noqa: E402

from data import decode_stem  # noqa: E402
from model import Separator, stft, wiener  # noqa: E402

TARGETS = ("vocals", "drums", "bass", "other")


def published(network, hidden_size):
    import openunmix.model

    theirs = openunmix.model.OpenUnmix(nb_bins=2049, hidden_size=hidden_size, max_bin=1487)
    theirs.load_state_dict(network.state_dict())
    return theirs.eval()


def network_rows():
    ours = random_network(0, hidden_size=512, mask="relu")
    theirs = published(ours, 512)
    x = torch.rand(2, 2, 2049, 100) * 10
    outputs, gradients = [], []
    for network in (ours, theirs):
        outputs.append(network(x))
        outputs[-1].square().mean().backward()
        gradients.append(network.fc1.weight.grad)
    for what, (a, b) in (("network, output", outputs), ("network, gradient of fc1", gradients)):
        yield what, "openunmix", "relative 1e-5" if "output" in what else "relative 1e-4", f"{((a - b).abs().max() / b.abs().max()).item():.1e}"


def separator_rows(excerpt):
    networks = {target: random_network(j, hidden_size=64, mask="relu") for j, target in enumerate(TARGETS)}
    theirs = {target: published(network, 64) for target, network in networks.items()}
    import openunmix.model

    audio = excerpt["mixture"][None]
    for niter in (0, 1, 2):
        with torch.no_grad():
            a, b = Separator(networks, niter=niter)(audio), openunmix.model.Separator(theirs, niter=niter)(audio)
        yield f"four stems, niter {niter}", "openunmix", "60 dB", f"{min(sdr(b[:, j], a[:, j]) for j in range(4)):.0f} dB"
    with torch.no_grad():
        separator = Separator(networks)
        a = torch.cat(list(separator.stream(audio[0].split(50000, 1), 100)), -1)
        yield "four stems, streamed", "the same in one piece", "90 dB", f"{min(sdr(separator(audio)[0, j], a[j]) for j in range(4)):.0f} dB"


def wiener_rows(excerpt):
    import norbert

    X = stft(excerpt["mixture"].double())
    V = torch.stack([stft(excerpt[name].double()).abs() for name in TARGETS]) + 0.1 * X.abs()
    v, x = V.permute(3, 2, 1, 0).numpy(), X.permute(2, 1, 0).numpy()
    for niter in (1, 2):
        theirs = torch.from_numpy(norbert.wiener(v, x.copy(), niter, use_softmask=False, eps=1e-10)).permute(3, 2, 1, 0)
        ours = wiener(V[None], X[None], niter)[0]
        yield f"Wiener filter in float64, niter {niter}", "norbert", "relative 1e-10", f"{((ours - theirs).abs().max() / theirs.abs().max()).item():.1e}"
    single = wiener(V[None].float(), X[None].to(torch.complex64))[0]
    double = wiener(V[None], X[None])[0]
    yield "Wiener filter in float32", "the same in float64", "60 dB", f"{sdr(double, single):.0f} dB"


def decoding_rows(excerpt):
    import musdb

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test").mkdir()
        (Path(folder) / "test" / EXCERPT.name).symlink_to(EXCERPT)
        track = musdb.DB(folder, subsets="test").tracks[0]
        equal = all(np.array_equal(track.targets[name].audio.T.astype(np.float32), excerpt[name].numpy()) for name in TARGETS)
    yield "stems decoded to WAV", "musdb", "every bit", "every bit" if equal else "different"


def evaluation_rows(excerpt):
    import museval

    from eval import bss_eval

    rng = np.random.default_rng(0)
    references = np.stack([excerpt[name].numpy() for name in TARGETS])
    estimates = references + 0.1 * references[[1, 2, 3, 0]] + 0.003 * rng.standard_normal(references.shape)
    for what, dither in (("BSS Eval v4, excerpt", 0.0), ("BSS Eval v4, excerpt with noise at -80 dB", 1e-4)):
        truth = references + dither * rng.standard_normal(references.shape)
        theirs = museval.evaluate(truth.transpose(0, 2, 1), estimates.transpose(0, 2, 1))
        ours = bss_eval(truth, estimates)
        gaps = [np.nanmax(np.abs(ours[m] - t)) for m, t in zip(("SDR", "ISR", "SIR", "SAR"), theirs)]
        yield what, "museval", "1e-3 dB" if dither else "museval's own rounding", f"{max(gaps):.1e} dB"


def main():
    import_openunmix()
    print(hardware_and_versions(), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        decode_stem(EXCERPT, Path(folder, "song"))
        excerpt = read_tracks(Path(folder, "song"))
    print("| what | compared with | tolerance | measured |\n|---|---|---|---|")
    for rows in (network_rows(), separator_rows(excerpt), wiener_rows(excerpt), decoding_rows(excerpt), evaluation_rows(excerpt)):
        for row in rows:
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
