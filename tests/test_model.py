"""model.py against openunmix 1.3.0 and norbert, and the properties it promises."""

import hashlib
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import make_model, random_network, sdr

import model
from model import ConvUnmix, OpenUnmix, Separator, istft, istft_blocks, load_separator, stft, stft_blocks, wiener
from utils import UserError, save

norbert = pytest.importorskip("norbert")
openunmix = pytest.importorskip("openunmix")
from openunmix.model import OpenUnmix as TheirOpenUnmix  # noqa: E402
from openunmix.model import Separator as TheirSeparator  # noqa: E402

TARGETS = ("vocals", "drums", "bass", "other")


def theirs(network, **kwargs):
    """The published network with our weights, loaded strictly."""
    other = TheirOpenUnmix(**kwargs)
    other.load_state_dict(network.state_dict())
    return other.eval()


# ------------------------------------------------------------------------------------------------------------ STFT


@pytest.mark.parametrize("length", [100, 2048, 4096, 44100, 100000])
def test_stft_and_inverse(length):
    x = torch.randn(2, 2, length)
    X = stft(x)
    assert X.shape == (2, 2, 2049, max(length, 2049) // 1024 + 1)
    assert (istft(X, length) - x).abs().max() < 1e-5


@pytest.mark.parametrize("length,block,frames", [(100, 100, 7), (2049, 1000, 3), (50000, 999, 5), (123456, 50000, 64), (70000, 70000, 1)])
def test_blocks_equal_the_whole(length, block, frames):
    x = torch.randn(2, length)
    whole = stft(x)
    parts = list(stft_blocks(x.split(block, -1), frames))
    assert all(part.shape[-1] == frames for part in parts[:-1])
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=1e-4)
    y = torch.cat(list(istft_blocks(whole.split(frames, -1), length)), -1)
    assert y.shape == x.shape and (y - x).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("nb_channels", [1, 2])
@pytest.mark.parametrize("hidden_size,unidirectional", [(64, False), (64, True), (512, False)])
@pytest.mark.parametrize("max_bin", [None, 1487])
def test_network_equals_the_published_one(nb_channels, hidden_size, unidirectional, max_bin):
    shape = dict(nb_bins=2049, nb_channels=nb_channels, hidden_size=hidden_size, unidirectional=unidirectional, max_bin=max_bin)
    ours = random_network(1, mask="relu", **shape)
    x = torch.rand(2, nb_channels, 2049, 11) * 10
    with torch.no_grad():
        expected, found = theirs(ours, **shape)(x), ours(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    OpenUnmix(mask="relu", **shape).load_state_dict(TheirOpenUnmix(**shape).state_dict())  # strictly, the other way


def test_training_equals_the_published_one():
    """Without dropout: the same loss and gradients (1e-4), and after 20 Adam steps the same parameters (1e-3).

    In double precision: in single, rounding puts some ReLUs on the other side, and two trainings apart, whoever runs them.
    """
    shape = dict(nb_bins=257, nb_channels=2, hidden_size=32, max_bin=200)
    ours = random_network(2, mask="relu", **shape).double()
    other = theirs(ours, **shape).double()
    ours.lstm.dropout = other.lstm.dropout = 0.0
    ours.train(), other.train()
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-5) for network in (ours, other)]
    for step in range(20):
        torch.manual_seed(step)
        x, y = torch.rand(2, 4, 2, 257, 20, dtype=torch.double) * 5
        losses = []
        for network, optimizer in zip((ours, other), optimizers):
            loss = torch.nn.functional.mse_loss(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            if step > 0:
                optimizer.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        if step == 0:
            for (name, ours_p), theirs_p in zip(ours.named_parameters(), other.parameters()):
                if name == "input_mean":  # batch norm takes any constant away: zero but for rounding
                    assert ours_p.grad.abs().max() < 1e-6 and theirs_p.grad.abs().max() < 1e-6
                else:
                    assert (ours_p.grad - theirs_p.grad).abs().max() < 1e-4 * theirs_p.grad.abs().max(), name
            for optimizer in optimizers:
                optimizer.step()
    for (name, ours_p), theirs_p in zip(ours.state_dict().items(), other.state_dict().values()):
        assert (ours_p - theirs_p).float().norm() <= 1e-3 * theirs_p.float().norm(), name


def test_sigmoid_mask_is_between_0_and_1():
    x = torch.rand(1, 2, 2049, 9)
    y = random_network(3, hidden_size=16)(x * 100) / (x * 100)
    assert OpenUnmix(hidden_size=16).mask == "sigmoid"
    assert 0 <= y.min() and y.max() <= 1


@pytest.mark.parametrize("unidirectional", [False, True])
def test_other_architecture(unidirectional):
    network = ConvUnmix(nb_bins=513, hidden_size=32, unidirectional=unidirectional).eval()
    x = torch.rand(1, 2, 513, 200)
    y = network(x)
    assert y.shape == x.shape
    x[..., 150:] = 0
    changed = (network(x) - y).abs().amax((0, 1, 2))
    reach = 150 - 40 * (not unidirectional)  # 3^0 + 3^1 + 3^2 + 3^3 frames to either side, or none
    assert changed[:reach].max() == 0 and changed[150:].min() > 0


def test_causal_lstm_does_not_see_the_future():
    network = random_network(4, nb_bins=513, hidden_size=32, unidirectional=True)
    x = torch.rand(1, 2, 513, 50)
    y = network(x)
    x[..., 30:] = 0
    assert (network(x) - y)[..., :30].abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------------- Wiener filter


MACHINE_EPS = 2.0**-52


def norbert_wiener(V, X, niter, softmask=False, eps=1e-10):
    """norbert in double precision, with our axes."""
    v, x = V.permute(3, 2, 1, 0).double().numpy(), X.permute(2, 1, 0).to(torch.complex128).numpy()
    return torch.from_numpy(norbert.wiener(v, x.copy(), niter, use_softmask=softmask, eps=eps)).permute(3, 2, 1, 0)


def spectra(excerpt, frames=60):
    """Real spectra: magnitudes of the true sources (4, 2, F, T) with some leakage, mixture (2, F, T)."""
    X = stft(excerpt["mixture"].double())[..., 40 : 40 + frames]
    V = torch.stack([stft(excerpt[name].double())[..., 40 : 40 + frames].abs() for name in TARGETS])
    return 0.9 * V + 0.1 * X.abs(), X


@pytest.mark.parametrize("niter,softmask", [(0, False), (0, True), (1, False), (1, True), (2, False)])
@pytest.mark.parametrize("material", ["real", "random", "mono", "three channels"])
def test_wiener_equals_norbert(excerpt, niter, softmask, material):
    if material == "real":
        V, X = spectra(excerpt)
    else:
        channels = {"random": 2, "mono": 1, "three channels": 3}[material]
        generator = torch.Generator().manual_seed(5)
        X = 20 * torch.randn(channels, 65, 40, dtype=torch.complex128, generator=generator)
        V = 20 * torch.rand(4, channels, 65, 40, dtype=torch.float64, generator=generator)
    eps = MACHINE_EPS if material == "mono" else 1e-10  # norbert adds eps once more where there is one channel
    expected = norbert_wiener(V, X, niter, softmask, eps)
    found = wiener(V[None], X[None], niter, softmask, eps)[0]
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("width", [1, 1e-4, 0])
def test_wiener_in_single_precision(excerpt, width):
    """Real music as it is, nearly mono, and mono: where both channels are alike, much cancels."""
    V, X = spectra(excerpt)
    X = torch.stack([X[0], X[0] + width * (X[1] - X[0])])
    for niter in (1, 2):
        found = wiener(V[None].float(), X[None].to(torch.complex64), niter)
        expected = wiener(V[None].float().double(), X[None].to(torch.complex64).to(torch.complex128), niter)
        assert found.dtype == torch.complex64
        for j in range(4):
            assert sdr(expected[:, j], found[:, j]) > 60


def test_wiener_is_gain_equivariant(excerpt):
    V, X = spectra(excerpt)
    V, X = V[None].float(), X[None].to(torch.complex64)
    for softmask in (False, True):
        reference = wiener(V, X, 1, softmask)
        for gain in (1e-2, 1e-4, 1e-6):
            scaled = wiener(V * gain, X * gain, 1, softmask) / gain
            for j in range(4):
                assert (scaled[:, j] - reference[:, j]).norm() < 1e-3 * reference[:, j].norm()
    quiet = norbert_wiener(V[0] * 1e-3, X[0] * 1e-3, 1) / 1e-3  # what ours must not do
    assert sdr(quiet, reference[0]) < 80


def test_wiener_properties(excerpt):
    """Sums to the mixture but for what the regularisation takes; silence stays silent; no NaN on degenerate input."""
    V, X = spectra(excerpt)
    V, X = V[None].float(), X[None].to(torch.complex64)
    for niter, softmask in ((1, False), (2, False), (0, True), (1, True)):
        assert sdr(X, wiener(V, X, niter, softmask).sum(1)) > 40  # with the published regularisation
        assert sdr(X, wiener(V, X, niter, softmask, MACHINE_EPS).sum(1)) > 70
    assert wiener(torch.zeros_like(V), torch.zeros_like(X)).abs().max() == 0
    same, dead, near = X.clone(), X.clone(), X.clone()
    same[:, 1], dead[:, 1], near[:, 1] = X[:, 0], 0, X[:, 0] * (1 + 1e-5)
    V_same, V_dead, V_silent = V.clone(), V.clone(), V.clone()
    V_same[:, :, 1], V_dead[:, :, 1], V_silent[:, 2] = V[:, :, 0], 0, 0
    for magnitudes, mixture in ((V_same, same), (V_dead, dead), (V_same, near), (V_silent, X)):
        for eps in (1e-10, MACHINE_EPS):
            Y = wiener(magnitudes, mixture, eps=eps)
            assert torch.isfinite(torch.view_as_real(Y)).all()
            assert sdr(mixture, Y.sum(1)) > (40 if eps == 1e-10 else 70)
    assert wiener(V_silent, X)[:, 2].abs().max() == 0
    assert torch.isfinite(torch.view_as_real(wiener(torch.zeros_like(V), X))).all()


def test_wiener_does_not_change_its_arguments(excerpt):
    V, X = spectra(excerpt, frames=10)
    v, x = V.clone(), X.clone()
    wiener(V[None], X[None], 2)
    assert torch.equal(v, V) and torch.equal(x, X)


# --------------------------------------------------------------------------------------------------------- separator


@pytest.fixture(scope="module")
def networks():
    return {target: random_network(j, hidden_size=64, mask="relu") for j, target in enumerate(TARGETS)}


@pytest.mark.parametrize("niter", [0, 1, 2])
@pytest.mark.parametrize("softmask", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_separator_equals_the_published_one(excerpt, networks, niter, softmask, residual):
    """At least 60 dB between both outputs, on real music at its own level, where the published filter loses nothing."""
    audio = excerpt["mixture"][None, :, :176400]
    published = {target: theirs(network, nb_bins=2049, hidden_size=64, max_bin=1487) for target, network in networks.items()}
    for window in (300, None) if (softmask, residual) == (False, False) else (300,):
        arguments = dict(niter=niter, softmask=softmask, residual=residual, wiener_win_len=window)
        with torch.no_grad():
            expected = TheirSeparator(published, **arguments)(audio)
            ours = Separator(networks, **arguments)
            found = ours(audio)
        assert ours.targets == [*TARGETS] + ["residual"] * residual
        for j, target in enumerate(ours.targets):
            assert sdr(expected[:, j], found[:, j]) > 60, target


@pytest.mark.parametrize("length,block,window", [(1000, 4, 300), (100000, 13, 7), (264600, 64, 100), (264600, 1024, None)])
def test_stream_equals_the_whole(excerpt, networks, length, block, window):
    """Block by block as in one piece: at least 90 dB in float32."""
    separator = Separator(networks, wiener_win_len=window).eval()
    audio = excerpt["mixture"][:, :length]
    with torch.no_grad():
        whole = separator(audio[None])[0]
    parts = torch.cat(list(separator.stream(audio.split(30000, 1), block)), -1)
    assert parts.shape == whole.shape == (4, 2, length)
    for j in range(4):
        assert sdr(whole[j], parts[j]) > 90


@pytest.mark.parametrize("niter", [0, 1, 2])
def test_separator_by_norbert(excerpt, networks, niter):
    """--wiener norbert: the same estimates as by our filter, whole or as a stream; the mixture stays as it was."""
    separator, audio = Separator(networks, niter=niter, wiener_win_len=40), excerpt["mixture"][None, :, :88200]
    with torch.no_grad():
        ours, before = separator(audio), audio.clone()
        separator.wiener = model.norbert_wiener
        theirs = separator(audio)
    assert theirs.dtype == ours.dtype and torch.equal(audio, before)
    assert sdr(ours, theirs) > 90
    assert sdr(theirs[0], torch.cat(list(separator.stream([audio[0]])), dim=-1)) > 90


def test_separator_channels(excerpt, networks):
    """Mono through a stereo model comes out mono; stereo through a mono model is masked channel by channel."""
    audio = excerpt["mixture"][None, :, :50000]
    mono = Separator(networks)(audio[:, :1])
    stereo = Separator(networks)(audio[:, :1].expand(-1, 2, -1))
    assert mono.shape == (1, 4, 1, 50000)
    assert sdr(stereo[:, :, :1].detach(), mono.detach()) > 90
    narrow = {t: random_network(j, nb_bins=513, nb_channels=1, hidden_size=32, max_bin=513) for j, t in enumerate(("speech", "noise"))}
    separator = Separator(narrow, sample_rate=16000, n_fft=1024, n_hop=512)
    assert separator(audio).shape == (1, 2, 2, 50000)
    assert sdr(audio, separator(audio).sum(1).detach()) > 45


def test_separator_is_differentiable(excerpt, networks):
    separator = Separator(networks, niter=0)
    separator(excerpt["mixture"][None, :, :20000]).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in networks["vocals"].fc3.parameters())


# ----------------------------------------------------------------------------------------------------------- loading


def test_model_folder_goes_both_ways(tmp_path, excerpt):
    folder = make_model(tmp_path / "model", hidden_size=32)
    audio = excerpt["mixture"][None, :, :60000]
    with torch.no_grad():
        ours = load_separator(folder)(audio)
        published = openunmix.utils.load_separator(str(folder), targets=list(TARGETS), niter=1)
        published.eval()
        assert sdr(published(audio), ours) > 60
        for target in TARGETS:  # their names of files, and a record without our keys
            (folder / f"{target}.pth").rename(folder / f"{target}-0123abcd.pth")
            record = json.loads((folder / f"{target}.json").read_text())
            del record["args"]["mask"], record["args"]["unidirectional"]
            save(record, folder / f"{target}.json")
        assert torch.equal(load_separator(folder)(audio), ours)


def test_loading_names_what_is_wrong(tmp_path, model_folder):
    def refused(message, change, folder=tmp_path / "model"):
        make_model(folder, targets=("vocals",), hidden_size=16)
        change(folder)
        with pytest.raises(UserError, match=message):
            load_separator(folder)

    weights = torch.load(model_folder / "vocals.pth", weights_only=True)
    refused("vocals.pth: no such file", lambda f: (f / "vocals.pth").unlink())
    refused("vocals.pth: is damaged", lambda f: (f / "vocals.pth").write_bytes(b"not weights"))
    refused("vocals.pth: holds no weights", lambda f: save({"x": "text"}, f / "vocals.pth"))
    refused("lacks input_mean", lambda f: save({"x": torch.zeros(3)}, f / "vocals.pth"))
    refused("fc3.weight", lambda f: save({k: v for k, v in weights.items() if k != "fc3.weight"}, f / "vocals.pth"))
    refused("fc9.weight", lambda f: save({**weights, "fc9.weight": torch.zeros(1)}, f / "vocals.pth"))
    refused("size mismatch for bn3", lambda f: save({**weights, "bn3.bias": torch.zeros(7)}, f / "vocals.pth"))
    refused("with --arch nosuch, which model.py", lambda f: save({"args": {"arch": "nosuch"}}, f / "vocals.json"))
    refused("vocals.json: is damaged", lambda f: (f / "vocals.json").write_text('{"args": '))
    refused("not a model folder", lambda f: (f / "separator.json").unlink())
    with pytest.raises(UserError, match="has no target 'piano'; it has vocals, drums, bass, other"):
        load_separator(model_folder, targets=["piano"])
    with pytest.raises(UserError, match="no such model or folder"):
        load_separator("nowhere")


@pytest.fixture()
def zenodo(tmp_path, monkeypatch):
    """A server on 127.0.0.1 in Zenodo's place, with stand-in files of the right names; torch hub's folder is temporary."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(model, "ZENODO", f"http://127.0.0.1:{server.server_port}/{{record}}/{{name}}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield served
    server.shutdown()
    server.server_close()


def stand_in(name):
    """Bytes of a small network's weights, as published under `name`."""
    import io

    speech = name == "umxse"
    buffer = io.BytesIO()
    network = random_network(0, nb_bins=513 if speech else 2049, nb_channels=1 if speech else 2, hidden_size=8, max_bin=513 if speech else 1487)
    torch.save({**network.state_dict(), "stft.window": torch.zeros(4)}, buffer)  # the oldest files hold their window, too
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["umx", "umxhq", "umxl", "umxse"])
def test_published_weights(name, zenodo, monkeypatch, tmp_path, capsys):
    record, names, settings = model.PUBLISHED[name]
    content = stand_in(name)
    start = hashlib.sha256(content).hexdigest()[:8]
    stand_ins = tuple(file[:-8] + start for file in names)
    monkeypatch.setitem(model.PUBLISHED, name, (record, stand_ins, settings))
    (zenodo / str(record)).mkdir()
    for file in stand_ins:
        (zenodo / str(record) / f"{file}.pth").write_bytes(content)
    separator = load_separator(name)
    shutil.rmtree(zenodo / str(record))  # from now on the weights are at hand
    assert load_separator(name).targets == separator.targets == [file[:-9] for file in names]
    assert (separator.sample_rate, separator.n_fft, separator.n_hop) == ((16000, 1024, 512) if name == "umxse" else (44100, 4096, 1024))
    assert all(network.mask == "relu" for network in separator.target_models.values())
    assert ("CC BY-NC-SA 4.0" in capsys.readouterr().out) == (name == "umxl")
    assert sorted(p.name for p in (tmp_path / "hub" / "checkpoints").iterdir()) == sorted(f"{file}.pth" for file in stand_ins)


def test_published_weights_that_fail(zenodo, tmp_path):
    record, names, _ = model.PUBLISHED["umxse"]
    with pytest.raises(UserError, match=r"speech_f5e0d9f9.pth: File not found; fetch it by hand and put it at .*checkpoints"):
        load_separator("umxse")
    (zenodo / str(record)).mkdir()
    (zenodo / str(record) / f"{names[0]}.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="failed the check of its SHA-256 and was removed"):
        load_separator("umxse")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_settings_of_published_weights():
    """Addresses and settings as published (openunmix/__init__.py), the real hashes included."""
    assert model.ZENODO.format(record=3370489, name="vocals-b62c91ce") == "https://zenodo.org/records/3370489/files/vocals-b62c91ce.pth"
    assert [model.PUBLISHED[name][2]["hidden_size"] for name in ("umx", "umxhq", "umxl", "umxse")] == [512, 512, 1024, 256]
    import inspect

    source = inspect.getsource(openunmix)
    for record, names, _ in model.PUBLISHED.values():
        for name in names:
            assert f"records/{record}/files/{name}.pth" in source


def test_numbers_of_the_published_implementation(excerpt):
    """Figures made by openunmix 1.3.0 (tests/make_figures.py): a change of STFT, filter or loader is noticed without it."""
    from make_figures import FIGURES, summary

    figures = json.loads(FIGURES.read_text())
    networks = {target: random_network(j, hidden_size=64, mask="relu") for j, target in enumerate(TARGETS)}
    with torch.no_grad():
        found = summary(Separator(networks)(excerpt["mixture"][None, :, :176400])[0], excerpt)
    for name, values in figures.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-3, err_msg=name)
