"""docs/porting.md against the code: its constants, and a port in NumPy that knows only the page.

python tests/test_porting.py writes the reference that ports are held to, porting_reference.npz.
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(FOLDER))

from check_port import NEEDED, REFERENCE, check  # noqa: E402
from conftest import random_network, remembering  # noqa: E402

import model  # noqa: E402

PAGE = (FOLDER / "docs" / "porting.md").read_text(encoding="utf-8")
CONSTANTS = {key: float(value) for key, value in re.findall(r"^\| `(\w+)` \| (\S+) \|", PAGE, re.M)}
TINY = {"n_fft": 64, "n_hop": 16, "wiener_win_len": 10}
MASKS = {"vocals": "sigmoid", "drums": "relu"}


@torch.no_grad()
def make_reference():
    """What model.py makes of a tiny input, step by step: {name: array}."""
    networks, arrays = {}, {}
    for j, (target, mask) in enumerate(MASKS.items()):
        shape = dict(nb_bins=33, max_bin=24, hidden_size=8, mask=mask)
        networks[target] = remembering(random_network(j, **shape)).eval()
        for name, value in networks[target].state_dict().items():
            if not name.endswith("num_batches_tracked"):
                arrays[f"{target}.{name}"] = value
    generator = torch.Generator().manual_seed(0)
    audio = 1e-3 * torch.randn(2, 300, generator=generator).cumsum(-1)  # quiet; lower bins louder
    audio[1] = 0.7 * audio[0] + 0.3 * audio[1]
    separator = model.Separator(networks, niter=1, **TINY)
    X = model.stft(audio[None], 64, 16)
    V = separator.stack([network(X.abs()) for network in networks.values()])
    windows = zip(V.split(10, -1), X.split(10, -1))
    Y = torch.cat([separator.filter(v, x) for v, x in windows], dim=-1)
    stages = {"waveform": audio, "spectrum": X[0], "network": V[0], "wiener": Y[0]}
    arrays |= {**stages, "stems": separator(audio[None])[0]}
    return {name: value.numpy() for name, value in arrays.items()}


# ----------------------------------------------------------------- a port, by docs/porting.md alone


def hann(n_fft):
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def stft(waveform, n_fft, n_hop):
    """(C, N) -> (C, F, T)."""
    x = np.pad(waveform, ((0, 0), (0, max(0, n_fft // 2 + 1 - waveform.shape[1]))))
    x = np.pad(x, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    starts = range(0, x.shape[1] - n_fft + 1, n_hop)
    return np.stack([np.fft.rfft(hann(n_fft) * x[:, s : s + n_fft]) for s in starts], axis=-1)


def istft(spectrum, length, n_fft, n_hop):
    """(..., F, T) -> (..., N)."""
    frames = np.fft.irfft(spectrum, n_fft, axis=-2) * hann(n_fft)[:, None]
    total = n_fft + n_hop * (frames.shape[-1] - 1)
    samples, weights = np.zeros((*frames.shape[:-2], total)), np.zeros(total)
    for t in range(frames.shape[-1]):
        part = slice(t * n_hop, t * n_hop + n_fft)
        samples[..., part] += frames[..., t]
        weights[part] += hann(n_fft) ** 2
    part = slice(n_fft // 2, n_fft // 2 + length)
    return samples[..., part] / weights[part]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(h, weights):
    """(T, H) -> (T, H), layer by layer, in one or both directions."""
    for layer in range(3):
        outputs = []
        for ending in ("", "_reverse"):
            names = [
                f"lstm.{kind}_l{layer}{ending}"
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            if names[0] not in weights:
                continue
            W, U, b, d = (weights[name] for name in names)
            state, cell, output = np.zeros(U.shape[1]), np.zeros(U.shape[1]), []
            for x in h[::-1] if ending else h:
                i, f, g, o = np.split(W @ x + b + U @ state + d, 4)
                cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
                state = sigmoid(o) * np.tanh(cell)
                output.append(state)
            outputs.append(np.stack(output[::-1] if ending else output))
        h = np.concatenate(outputs, axis=1)
    return h


def network(magnitudes, weights, mask):
    """(C, F, T) -> (C, F, T)."""

    def batch_norm(name, h):
        h = (h - weights[f"{name}.running_mean"]) / np.sqrt(
            weights[f"{name}.running_var"] + CONSTANTS["batch_norm_eps"]
        )
        return h * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = magnitudes.transpose(2, 0, 1)  # (T, C, F)
    h = (x[:, :, : len(weights["input_mean"])] + weights["input_mean"]) * weights["input_scale"]
    h = np.tanh(batch_norm("bn1", h.reshape(len(h), -1) @ weights["fc1.weight"].T))
    g = np.concatenate([h, lstm(h, weights)], axis=1)
    g = np.maximum(0, batch_norm("bn2", g @ weights["fc2.weight"].T))
    u = batch_norm("bn3", g @ weights["fc3.weight"].T).reshape(x.shape)
    u = u * weights["output_scale"] + weights["output_mean"]
    return ((sigmoid(u) if mask == "sigmoid" else np.maximum(0, u)) * x).transpose(1, 2, 0)


def wiener(V, X, window, niter):
    """(J, C, F, T), (C, F, T) -> (J, C, F, T)."""
    eps, size = CONSTANTS["wiener_eps"], np.abs(X)
    y = V * np.where(size > 0, X / np.where(size > 0, size, 1), 0)
    for start in range(0, X.shape[-1], window):
        part = slice(start, start + window)
        scale = size[..., part].max() / CONSTANTS["wiener_level"]
        x = X[..., part]
        for _ in range(niter):
            z = y[..., part]
            v = (np.abs(z) ** 2).mean(1) / scale**2  # (J, F, T)
            R = (
                np.einsum("jaft,jbft->jfab", z, z.conj())
                / scale**2
                / (eps + v.sum(-1))[..., None, None]
            )
            Cxx = np.einsum("jft,jfab->ftab", v, R) + np.sqrt(eps) * np.eye(len(X))
            inverse = np.einsum("ftab,bft->fta", np.linalg.inv(Cxx), x)
            y[..., part] = np.einsum("jft,jfab,ftb->jaft", v, R, inverse)
    return y


def port(arrays, n_fft=64, n_hop=16, window=10):
    """All stages of a port: {name: array}."""
    X = stft(arrays["waveform"].astype(float), n_fft, n_hop)
    V = []
    for target, mask in MASKS.items():
        weights = {name.removeprefix(f"{target}."): value for name, value in arrays.items()}
        V.append(network(np.abs(X), weights, mask))
    Y = wiener(np.stack(V), X, window, int(CONSTANTS["niter"]))
    stems = istft(Y, arrays["waveform"].shape[1], n_fft, n_hop)
    return {"spectrum": X, "network": np.stack(V), "wiener": Y, "stems": stems}


# ----------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def reference():
    return dict(np.load(REFERENCE))


def test_constants():
    """Every number of the page's table is the code's."""

    def default(function, name):
        return inspect.signature(function).parameters[name].default

    code = {
        name: default(model.Separator, name)
        for name in ("sample_rate", "n_fft", "n_hop", "wiener_win_len", "niter")
    }
    code["wiener_eps"] = model.EPS
    code["batch_norm_eps"] = model.OpenUnmix(nb_bins=9, hidden_size=8).bn1.eps
    code["wiener_level"] = 10
    assert code == CONSTANTS
    assert "`unit = (level / 10)" not in PAGE and "unit = (level / 10)" in inspect.getsource(
        model.expectation_maximization
    )
    speech = model.SPEECH
    for key, value in (("sample_rate", 16000), ("nfft", 1024), ("nhop", 512)):
        assert speech[key] == value and f"umxse: {value}" in PAGE
    assert int(16000 / 44100 * 4096) + 1 == 1487  # train.py's bandwidth


def test_size():
    assert len(PAGE.splitlines()) <= 80 and REFERENCE.stat().st_size < 100_000


def test_reference_is_the_codes(reference):
    made = make_reference()
    assert made.keys() == reference.keys()
    for name, value in made.items():
        np.testing.assert_allclose(
            reference[name], value, rtol=1e-3, atol=1e-5 * np.abs(value).max(), err_msg=name
        )
    for stage in NEEDED:
        assert check(stage, made[stage])[0]


def test_a_port_by_the_page_is_right(reference):
    for stage, found in port(reference).items():
        right, said = check(stage, found)
        assert right, (stage, said)


WRONG = {  # what ports got wrong: (the first stage that shows it, what to change in the port)
    "symmetric window": ("spectrum", "hann", lambda n: np.hanning(n)),
    "edges of zeros": ("spectrum", "np.pad", None),
    "another epsilon of batch norm": ("network", "batch_norm_eps", 1e-3),
    "an absolute level": ("wiener", "wiener_level", None),
    "one window for all": ("wiener", "window", 1000),
    "no iteration": ("wiener", "niter", 0),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_ports_are_found(mistake, reference, monkeypatch):
    stage, what, value = WRONG[mistake]
    settings = {}
    if what == "hann":
        monkeypatch.setitem(globals(), "hann", value)
    elif what == "np.pad":
        pad = np.pad
        monkeypatch.setattr(np, "pad", lambda x, width, mode="constant": pad(x, width))
    elif what == "wiener_level":  # as if the spectrum's unit were what the filter is made for
        monkeypatch.setitem(CONSTANTS, what, np.abs(reference["spectrum"]).max())
    elif what in CONSTANTS:
        monkeypatch.setitem(CONSTANTS, what, value)
    else:
        settings[what] = value
    stages = port(reference, **settings)
    for name in list(NEEDED)[: list(NEEDED).index(stage)]:
        assert check(name, stages[name])[0], name
    right, said = check(stage, stages[stage])
    assert not right and "wrong" in said


def test_the_three_commands(reference, tmp_path):
    commands = re.findall(r"^    python (tests/check_port\.py \w+ mine\.npy)$", PAGE, re.M)
    assert len(commands) == 3
    for command in commands:
        script, stage, _ = command.split()
        for factor, code in ((1, 0), (2, 1)):
            np.save(tmp_path / "mine.npy", factor * reference[stage])
            done = subprocess.run(
                [sys.executable, FOLDER / script, stage, tmp_path / "mine.npy"],
                capture_output=True,
                text=True,
            )
            assert done.returncode == code and done.stdout.startswith(f"{stage}: "), done.stderr
        assert "2 times the reference" in done.stdout
    assert check("stems", reference["network"])[1].startswith(
        "the shape is (2, 2, 33, 19), not (2, 2, 300)"
    )
    assert not check("stems", np.full_like(reference["stems"], np.nan))[0]


if __name__ == "__main__":
    np.savez_compressed(REFERENCE, **make_reference())
    print(f"{REFERENCE}: {REFERENCE.stat().st_size} bytes")
