"""model.py against openunmix 1.3.0 and norbert, each fast form against its formula, all it promises."""

import copy
import hashlib
import inspect
import io
import itertools
import json
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from conftest import FOLDER, ConvUnmix, make_model, random_network, sdr
from torch import nn

import model
from model import (
    OpenUnmix,
    Separator,
    expectation_maximization,
    filter_sources,
    filter_stereo,
    in_blocks,
    istft,
    istft_blocks,
    load_separator,
    magnitude,
    make_network,
    over_frames,
    ratio_mask,
    run_lstm,
    same_as_plain,
    scaled_batch_norm,
    standardised_linear,
    stft,
    stft_blocks,
    wiener,
    wiener_on_cpu,
)
from utils import UserError, has_bfloat16, load, save

norbert = pytest.importorskip("norbert")
openunmix = pytest.importorskip("openunmix")
from openunmix.model import OpenUnmix as TheirOpenUnmix  # noqa: E402
from openunmix.model import Separator as TheirSeparator  # noqa: E402

TARGETS = ("vocals", "drums", "bass", "other")
CPU = torch.device("cpu")
MACHINE_EPS = 2.0**-52


def theirs(network, **shape):
    """The published network with our weights, loaded strictly."""
    other = TheirOpenUnmix(**shape)
    other.load_state_dict(network.state_dict())
    return other.eval()


def streamed(separator, audio, size=30000, **kwargs):
    """The estimates (J, C, N) of a waveform (C, N) that arrives in blocks."""
    return torch.cat(list(model.stream(separator, audio.split(size, -1), **kwargs)), dim=-1)


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator)


def relative(found, expected):
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------------------------------ STFT


@pytest.mark.parametrize("length", [1, 100, 2048, 4096, 44100, 100000])
def test_stft_and_inverse(length):
    x = torch.randn(2, 2, length)
    X = stft(x)
    assert X.shape == (2, 2, 2049, max(length, 2049) // 1024 + 1)
    assert (istft(X, length) - x).abs().max() < 1e-5


def test_stft_is_the_published_one():
    x = torch.randn(2, 2, 50000)
    encode, decode = openunmix.transforms.make_filterbanks(n_fft=4096, n_hop=1024, center=True)
    expected = torch.view_as_complex(encode(x))
    torch.testing.assert_close(stft(x), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(istft(expected, 50000), decode(torch.view_as_real(expected), 50000))


@pytest.mark.parametrize(
    "n_fft,n_hop", [(4096, 1024), (1024, 512), (256, 64), (512, 200), (64, 31)]
)
@pytest.mark.parametrize("length", [1, 100, 2048, 2049, 5000, 44100])
def test_blocks_equal_the_whole(length, n_fft, n_hop):
    """stft_blocks and istft_blocks are stft and istft, whatever the sizes of blocks."""
    x = random(2, 3, length)
    X = stft(x, n_fft, n_hop)
    for block in (777, 1000, 50000):
        for frames in (1, 5, 64):
            if frames == 1 and length > 5000:
                continue  # takes long and shows no more
            parts = list(stft_blocks(iter(x.split(block, -1)), frames, n_fft, n_hop))
            assert all(part.shape[-1] == frames for part in parts[:-1])
            torch.testing.assert_close(torch.cat(parts, -1), X, rtol=0, atol=1e-10)
            y = torch.cat(list(istft_blocks(iter(parts), lambda: length, n_fft, n_hop)), -1)
            torch.testing.assert_close(y, istft(X, length, n_fft, n_hop), rtol=0, atol=1e-9)


def test_blocks_come_as_soon_as_they_are_whole():
    """Nothing of an endless waveform is kept but what later blocks need."""

    def endless():
        while True:
            yield torch.ones(2, 5000)

    spectra = stft_blocks(endless(), 10)
    samples = istft_blocks(spectra, lambda: 10**9)
    assert sum(next(samples).shape[-1] for _ in range(20)) > 19 * 10 * 1024 - 4096


def test_magnitude_for_one_channel_is_the_mean():
    X = stft(torch.randn(3, 2, 20000))
    torch.testing.assert_close(magnitude(X, 2), X.abs())
    mono = magnitude(X, 1)
    torch.testing.assert_close(mono, X.abs().mean(1, keepdim=True))
    published = openunmix.model.ComplexNorm(mono=True)(torch.view_as_real(X))
    torch.testing.assert_close(mono, published)


# --------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("nb_channels", [1, 2])
@pytest.mark.parametrize("hidden_size,unidirectional", [(64, False), (64, True), (512, False)])
@pytest.mark.parametrize("max_bin", [None, 1487])
def test_network_equals_the_published_one(nb_channels, hidden_size, unidirectional, max_bin):
    shape = dict(nb_bins=2049, nb_channels=nb_channels, hidden_size=hidden_size)
    shape |= dict(unidirectional=unidirectional, max_bin=max_bin)
    ours = random_network(1, mask="relu", **shape)
    x = torch.rand(2, nb_channels, 2049, 11) * 10
    with torch.no_grad():
        expected, found = theirs(ours, **shape)(x), ours(x)
    assert relative(found, expected) < 1e-5
    other_way = OpenUnmix(mask="relu", **shape)
    other_way.load_state_dict(TheirOpenUnmix(**shape).state_dict())  # strictly


def test_input_statistics_are_the_published_ones():
    """Mean and scale as arguments: arrays, lists or tensors, cropped, stored as openunmix stores them."""
    mean, scale = np.random.default_rng(0).uniform(0.5, 2, (2, 257))
    other = TheirOpenUnmix(
        nb_bins=257, max_bin=200, hidden_size=16, input_mean=mean, input_scale=scale
    )
    for form in (np.asarray, np.ndarray.tolist, torch.from_numpy):
        shape = dict(nb_bins=257, max_bin=200, hidden_size=16)
        ours = OpenUnmix(**shape, input_mean=form(mean), input_scale=form(scale))
        torch.testing.assert_close(ours.input_mean, other.input_mean)
        torch.testing.assert_close(ours.input_scale, other.input_scale)


def test_training_equals_the_published_one():
    """Without dropout: same loss and gradients (1e-4), same parameters after 20 Adam steps (1e-3).

    In double precision: in single, rounding puts some ReLUs on the other side, and two trainings
    apart, whoever runs them.
    """
    shape = dict(nb_bins=257, nb_channels=2, hidden_size=32, max_bin=200)
    ours = random_network(2, mask="relu", **shape).double()
    other = theirs(ours, **shape).double()
    ours.lstm.dropout = other.lstm.dropout = 0.0
    networks = (ours.train(), other.train())
    adam = dict(lr=1e-3, weight_decay=1e-5)
    optimizers = [torch.optim.Adam(network.parameters(), **adam) for network in networks]
    for step in range(20):
        torch.manual_seed(step)
        x, y = torch.rand(2, 4, 2, 257, 20, dtype=torch.double) * 5
        losses = []
        for network, optimizer in zip(networks, optimizers):
            loss = F.mse_loss(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            if step > 0:
                optimizer.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        if step == 0:
            for (name, our), their in zip(ours.named_parameters(), other.parameters()):
                if (
                    name == "input_mean"
                ):  # batch norm takes any constant away: zero but for rounding
                    assert our.grad.abs().max() < 1e-6 and their.grad.abs().max() < 1e-6
                else:
                    assert relative(our.grad, their.grad) < 1e-4, name
            for optimizer in optimizers:
                optimizer.step()
    for (name, our), their in zip(ours.state_dict().items(), other.state_dict().values()):
        assert (our - their).float().norm() <= 1e-3 * their.float().norm(), name


@pytest.mark.parametrize("mask", ["sigmoid", "relu"])
def test_where_masks_start(mask):
    """As published unless `mask_start` says otherwise."""
    published = make_network(mask=mask, hidden_size=8, nb_bins=33)
    assert (published.output_mean == 1).all()
    network = make_network(mask=mask, mask_start=0.25, hidden_size=8, nb_bins=33)
    assert torch.allclose(model.MASKS[mask](network.output_mean.detach()), torch.tensor(0.25))


def test_sigmoid_mask_is_between_0_and_1():
    x = torch.rand(1, 2, 2049, 9)
    networks = {mask: random_network(3, hidden_size=16, mask=mask) for mask in ("sigmoid", "relu")}
    masks = {mask: network(x * 100) / (x * 100) for mask, network in networks.items()}
    assert masks["sigmoid"].min() >= 0 and masks["sigmoid"].max() <= 1 < masks["relu"].max()
    torch.testing.assert_close(
        random_network(3, hidden_size=16)(x * 100), masks["sigmoid"] * x * 100
    )


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


def test_make_network(monkeypatch):
    class Mine(OpenUnmix):
        def __init__(self, *args, nb_heads=1, **kwargs):
            super().__init__(*args, **kwargs)
            self.nb_heads = nb_heads

    class Bare(nn.Module):
        def __init__(self, width=3):
            super().__init__()
            self.width = width

    monkeypatch.setitem(model.ARCHITECTURES, "mine", Mine)
    monkeypatch.setitem(model.ARCHITECTURES, "bare", Bare)
    mine = make_network("mine", nb_heads=8, hidden_size=16, nb_bins=65, nosuch=1)
    assert (mine.nb_heads, mine.hidden_size) == (8, 16)
    assert mine.made_with == {"arch": "mine", "nb_heads": 8, "hidden_size": 16, "nb_bins": 65}
    assert make_network(**mine.made_with).nb_heads == 8
    bare = make_network("bare", width=5, hidden_size=16)
    assert bare.width == 5 and bare.made_with == {"arch": "bare", "width": 5}
    assert isinstance(make_network(hidden_size=8, nb_bins=9), OpenUnmix)
    assert make_network("conv", hidden_size=8, nb_layers=2).made_with["nb_layers"] == 2
    with pytest.raises(UserError, match=r"--arch nosuch: .*'blstm', 'xumx'"):
        make_network("nosuch")


# ----------------------------------------------------------------------------------- Wiener filter


def by_norbert(V, X, niter, softmask=False, eps=1e-10):
    """norbert in double precision, with our axes, of one example."""
    v, x = V.permute(3, 2, 1, 0).double(), X.permute(2, 1, 0).to(torch.complex128)
    y = norbert.wiener(v.numpy(), x.numpy().copy(), niter, use_softmask=softmask, eps=eps)
    return torch.from_numpy(y).permute(3, 2, 1, 0)


def filtered(V, X, niter=1, softmask=False):
    """Our filter of a batch, from ratio masks or from magnitudes, as Separator does it."""
    return wiener(ratio_mask(V) * X.abs()[:, None] if softmask else V, X, niter)


def spectra(excerpt, frames=60):
    """Real spectra: magnitudes of the sources (4, 2, F, T) with some leakage, mixture (2, F, T)."""
    X = stft(excerpt["mixture"].double())[..., 40 : 40 + frames]
    V = torch.stack([stft(excerpt[name].double())[..., 40 : 40 + frames].abs() for name in TARGETS])
    return 0.9 * V + 0.1 * X.abs(), X


@pytest.mark.parametrize(
    "niter,softmask", [(0, False), (0, True), (1, False), (1, True), (2, False)]
)
@pytest.mark.parametrize("material", ["real", "random", "mono", "three channels"])
def test_wiener_equals_norbert(excerpt, niter, softmask, material, monkeypatch):
    if material == "real":
        V, X = spectra(excerpt)
    else:
        channels = {"random": 2, "mono": 1, "three channels": 3}[material]
        X = 20 * random(channels, 65, 40, seed=5, dtype=torch.complex128)
        V = 20 * random(4, channels, 65, 40, seed=6).abs()
    # norbert adds eps once more where there is one channel
    eps = MACHINE_EPS if material == "mono" else 1e-10
    monkeypatch.setattr(model, "EPS", eps)
    expected = by_norbert(V, X, niter, softmask, eps)
    assert relative(filtered(V[None], X[None], niter, softmask)[0], expected) < 1e-10


@pytest.mark.parametrize("width", [1, 1e-4, 0])
def test_wiener_in_single_precision(excerpt, width):
    """Real music as it is, nearly mono, and mono: where both channels are alike, much cancels."""
    V, X = spectra(excerpt)
    X = torch.stack([X[0], X[0] + width * (X[1] - X[0])])
    V, X = V[None].float(), X[None].to(torch.complex64)
    for niter in (1, 2):
        found, expected = wiener(V, X, niter), wiener(V.double(), X.to(torch.complex128), niter)
        assert found.dtype == torch.complex64
        for j in range(4):
            assert sdr(expected[:, j], found[:, j]) > 60


def test_wiener_is_gain_equivariant(excerpt):
    V, X = spectra(excerpt)
    V, X = V[None].float(), X[None].to(torch.complex64)
    for softmask in (False, True):
        reference = filtered(V, X, 1, softmask)
        for gain in (1e-2, 1e-4, 1e-6):
            scaled = filtered(V * gain, X * gain, 1, softmask) / gain
            for j in range(4):
                difference = (scaled[:, j] - reference[:, j]).norm()
                assert difference < 1e-3 * reference[:, j].norm()
    reference = wiener(V, X)
    quiet = by_norbert(V[0] * 1e-3, X[0] * 1e-3, 1) / 1e-3  # what ours must not do
    assert sdr(quiet, reference[0]) < 80


def test_wiener_properties(excerpt, monkeypatch):
    """Sums to the mixture but for what the ridge takes; silence stays silent; degenerate, no NaN."""
    V, X = spectra(excerpt)
    V, X = V[None].float(), X[None].to(torch.complex64)
    same, dead, near = X.clone(), X.clone(), X.clone()
    same[:, 1], dead[:, 1], near[:, 1] = X[:, 0], 0, X[:, 0] * (1 + 1e-5)
    V_same, V_dead, V_silent = V.clone(), V.clone(), V.clone()
    V_same[:, :, 1], V_dead[:, :, 1], V_silent[:, 2] = V[:, :, 0], 0, 0
    degenerate = ((V_same, same), (V_dead, dead), (V_same, near), (V_silent, X))
    for eps, least in ((1e-10, 40), (MACHINE_EPS, 70)):  # the published ridge, and hardly any
        monkeypatch.setattr(model, "EPS", eps)
        for niter, softmask in ((1, False), (2, False), (0, True), (1, True)):
            assert sdr(X, filtered(V, X, niter, softmask).sum(1)) > least
        for magnitudes, mixture in degenerate:
            Y = wiener(magnitudes, mixture)
            assert torch.isfinite(torch.view_as_real(Y)).all()
            assert sdr(mixture, Y.sum(1)) > least
    assert wiener(torch.zeros_like(V), torch.zeros_like(X)).abs().max() == 0
    assert wiener(V_silent, X)[:, 2].abs().max() == 0
    assert torch.isfinite(torch.view_as_real(wiener(torch.zeros_like(V), X))).all()


def test_wiener_does_not_change_its_arguments(excerpt):
    V, X = spectra(excerpt, frames=10)
    v, x = V.clone(), X.clone()
    for function in (wiener, model.norbert_wiener):
        function(V[None], X[None], 2)
        assert torch.equal(v, V) and torch.equal(x, X)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("niter", [0, 1, 2])
def test_wiener_of_a_batch_is_that_of_each(channels, niter):
    """Each with its own level, with gradients and without, and as norbert has it."""
    gain = torch.tensor([1.0, 1e-3, 0.0])[:, None, None, None]
    V = random(3, 4, channels, 70, 20).abs() * gain[:, None]
    X = random(3, channels, 70, 20, seed=1, dtype=torch.complex128) * gain
    expected = torch.cat([wiener(v[None], x[None], niter) for v, x in zip(V, X)])
    together = wiener(V, X, niter)
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-14)
    with_gradients = wiener(V.requires_grad_(), X, niter)
    torch.testing.assert_close(with_gradients.detach(), expected, rtol=1e-10, atol=1e-14)
    with_gradients.abs().square().sum().backward()
    assert V.grad.isfinite().all() and V.grad[0].abs().max() > 0
    norberts = model.norbert_wiener(V.detach(), X, niter)
    assert norberts.shape == expected.shape
    if channels == 2:  # at norbert's own level, about: the ridge is relative to it
        assert sdr(expected[0], norberts[0]) > 80


def test_wiener_has_the_gradient_of_its_formula():
    V = random(2, 3, 2, 4, 5).abs().add(0.1).requires_grad_()
    X = random(2, 2, 4, 5, seed=1, dtype=torch.complex128).requires_grad_()

    def formula(V, X):
        return torch.view_as_real(wiener(V, X, 1))

    assert torch.autograd.gradcheck(formula, (V, X), eps=1e-6, atol=1e-4)


# --------------------------------------------------------------------------- separator, forward


@pytest.fixture(scope="module")
def networks():
    return {name: random_network(j, hidden_size=64, mask="relu") for j, name in enumerate(TARGETS)}


@pytest.fixture(scope="module")
def small():
    """Four small networks for 8 kHz: STFT of 256, hop 64."""
    settings = dict(nb_bins=129, hidden_size=16)
    return {name: random_network(j, **settings) for j, name in enumerate(TARGETS)}


SMALL = dict(n_fft=256, n_hop=64, sample_rate=8000)


@pytest.mark.parametrize("niter", [0, 1, 2])
@pytest.mark.parametrize("softmask", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_separator_equals_the_published_one(excerpt, networks, niter, softmask, residual):
    """60 dB at least, on real music at its own level, where the published filter loses nothing."""
    audio = excerpt["mixture"][None, :, :176400]
    shape = dict(nb_bins=2049, hidden_size=64, max_bin=1487)
    published = {target: theirs(network, **shape) for target, network in networks.items()}
    for window in (300, None) if (softmask, residual) == (False, False) else (300,):
        settings = dict(niter=niter, softmask=softmask, residual=residual, wiener_win_len=window)
        with torch.no_grad():
            expected = TheirSeparator(published, **settings)(audio)
            ours = Separator(networks, **settings)
            found = ours(audio)
        assert ours.targets == [*TARGETS] + ["residual"] * residual
        for j, target in enumerate(ours.targets):
            assert sdr(expected[:, j], found[:, j]) > 60, target


@pytest.mark.parametrize("niter", [0, 1, 2])
def test_separator_by_norbert(excerpt, networks, niter):
    """--wiener norbert: the same estimates, whole or as a stream; the mixture stays as it was."""
    separator = Separator(networks, niter=niter, wiener_win_len=40)
    audio = excerpt["mixture"][None, :, :88200]
    with torch.no_grad():
        ours, before = separator(audio), audio.clone()
        separator.wiener = model.norbert_wiener
        norberts = separator(audio)
    assert norberts.dtype == ours.dtype and torch.equal(audio, before)
    assert sdr(ours, norberts) > 90
    assert sdr(norberts[0], streamed(separator, audio[0])) > 90


def test_separator_uses_the_wiener_filter_that_it_has(small):
    audio = torch.randn(1, 2, 8000)
    separator = Separator(small, **SMALL).eval()
    separator.wiener = lambda V, X, niter: 0.5 * wiener(V, X, 0)
    plain = Separator(small, niter=0, **SMALL).eval()
    with torch.no_grad():
        torch.testing.assert_close(separator(audio), 0.5 * plain(audio))
        torch.testing.assert_close(streamed(separator, audio[0]), 0.5 * streamed(plain, audio[0]))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("niter", [0, 1, 2])
@pytest.mark.parametrize("softmask,residual", [(False, False), (True, True)])
def test_separator_of_two_is_that_of_each(small, gradients, niter, softmask, residual):
    settings = dict(niter=niter, softmask=softmask, residual=residual, wiener_win_len=50)
    separator = Separator(small, **settings, **SMALL).double().eval()
    audio = random(2, 2, 8000) * torch.tensor([1.0, 0.01])[:, None, None]
    with torch.set_grad_enabled(gradients):
        each = torch.cat([separator(x[None]) for x in audio])
        both = separator(audio)
    assert both.requires_grad == gradients and both.shape == (2, 4 + residual, 2, 8000)
    torch.testing.assert_close(both, each, rtol=1e-8, atol=1e-12)
    for network in small.values():
        network.float()


@pytest.mark.parametrize("niter", [0, 1])
def test_separator_is_differentiable(excerpt, networks, niter):
    separator = Separator(networks, niter=niter)
    audio = excerpt["mixture"][None, :, :20000].clone().requires_grad_()
    separator(audio).square().mean().backward()
    assert audio.grad.isfinite().all() and audio.grad.abs().max() > 0
    for network in networks.values():
        for parameter in network.fc3.parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
        network.zero_grad()


def test_separator_channels(excerpt, networks):
    """Mono through a stereo model comes out mono; stereo through a mono model stays stereo."""
    audio = excerpt["mixture"][None, :, :50000]
    with torch.no_grad():
        mono = Separator(networks)(audio[:, :1])
        stereo = Separator(networks)(audio[:, :1].expand(-1, 2, -1))
    assert mono.shape == (1, 4, 1, 50000)
    assert sdr(stereo[:, :, :1], mono) > 90
    separator = Separator(networks).eval()
    assert sdr(mono[0], streamed(separator, audio[0, :1])) > 90
    narrow = {
        name: random_network(j, nb_bins=513, nb_channels=1, hidden_size=32, max_bin=513)
        for j, name in enumerate(("speech", "noise"))
    }
    separator = Separator(narrow, sample_rate=16000, n_fft=1024, n_hop=512).eval()
    assert separator.nb_channels == 1
    with torch.no_grad():
        both, one = separator(audio), separator(audio[:, :1])
    assert (both.shape, one.shape) == ((1, 2, 2, 50000), (1, 2, 1, 50000))
    assert sdr(audio, both.sum(1)) > 45
    assert sdr(both[0], streamed(separator, audio[0])) > 90
    assert sdr(one[0], streamed(separator, audio[0, :1])) > 90


@pytest.mark.parametrize("niter", [0, 1])
def test_mono_model_equals_the_published_one(excerpt, niter):
    """A mono model sees the mean of both channels' magnitudes and masks both channels alike."""
    shape = dict(nb_bins=513, nb_channels=1, hidden_size=32, max_bin=513)
    ours = {name: random_network(j, mask="relu", **shape) for j, name in enumerate(TARGETS[:2])}
    settings = dict(sample_rate=16000, n_fft=1024, n_hop=512)
    published = {name: theirs(network, **shape) for name, network in ours.items()}
    separator = Separator(ours, niter=niter, **settings)
    audio = excerpt["mixture"][None, :, :60000]
    with torch.no_grad():
        expected = TheirSeparator(published, niter=niter, nb_channels=1, **settings)(audio)
        found = separator(audio)
        separator.wiener = lambda V, X, niter: by_norbert(V[0], X[0], niter)[None].to(X)
        precise = separator(audio)
    for j in range(2):
        # both channels' phases alone tell two sources apart: openunmix's float32 loses much of it
        assert sdr(expected[:, j], found[:, j]) > (45 if niter else 100)
        assert sdr(precise[:, j], found[:, j]) > 100


def test_one_target_is_masked_only(excerpt, networks):
    """Without a residual there is nothing to be told apart from; with one it is filtered."""
    audio = excerpt["mixture"][None, :, :50000]
    one = {"vocals": networks["vocals"]}
    with torch.no_grad():
        masked = Separator(one, niter=1)(audio)
        torch.testing.assert_close(masked, Separator(one, niter=0)(audio))
        both = Separator(one, niter=1, residual="accompaniment")
        estimates = both(audio)
    assert both.targets == ["vocals", "accompaniment"]
    assert sdr(masked[0, 0], estimates[0, 0]) < 60 and sdr(audio[0], estimates[0].sum(0)) > 40


NAMES = ("keys", "train", "half", "bass.v2", "[lead] vocals", "forward", "0", "音楽")


def test_any_name_is_a_target(small, tmp_path):
    networks = dict(zip(NAMES, itertools.cycle(small.values())))
    separator = Separator(networks, **SMALL).eval()
    assert separator.targets == [*NAMES] and list(separator.target_models) == [*NAMES]
    assert separator.target_models["half"] is networks["half"]
    folder = make_model(tmp_path / "[a] model", targets=NAMES, nfft=256, sample_rate=8000)
    loaded = load_separator(folder)
    assert loaded.targets == sorted(NAMES)
    assert load_separator(folder, targets="[lead] vocals").targets == ["[lead] vocals"]
    dated = make_model(tmp_path / "dated", targets=("vocals-20240101",), nfft=256)
    assert load_separator(dated).targets == ["vocals-20240101"]


def test_names_that_repeat_are_refused(small):
    with pytest.raises(UserError, match=r"two stems have the same name: vocals, .*vocals"):
        Separator({"vocals": small["vocals"], "more": Several(["vocals", "drums"])})
    with pytest.raises(UserError, match="--residual bass: a target has this name"):
        Separator(small, residual="bass")


class Several(nn.Module):
    """One network for several sources: it gives each a part of the mixture."""

    def __init__(self, sources, parts=None):
        super().__init__()
        self.sources = sources
        parts = torch.arange(1.0, 1 + len(sources)) if parts is None else parts
        self.parts = nn.Parameter(parts / parts.sum())

    def forward(self, x):
        y = self.parts[:, None, None, None] * x.unsqueeze(1)  # (B, K, C, F, T)
        return y.flatten(1, 2)


def test_network_of_several_sources():
    audio = torch.randn(2, 2, 8000)
    separator = Separator({"all": Several(["a", "b", "c"])}, niter=0, **SMALL).eval()
    assert separator.targets == ["a", "b", "c"]
    with torch.no_grad():
        estimates = separator(audio)
        for j in range(3):  # in this order, channels side by side
            assert sdr(audio * (j + 1) / 6, estimates[:, j]) > 100
        assert sdr(estimates[0], streamed(separator, audio[0])) > 100
    mixed = Separator({"all": Several(["a", "b"]), "c": Several(["c"])}, residual=True, **SMALL)
    assert mixed.targets == ["a", "b", "c", "residual"]
    assert mixed(audio).shape == (2, 4, 2, 8000)


def test_network_of_several_sources_in_stages(excerpt):
    """An OpenUnmix whose last layers are K times as wide masks K sources, in stages too."""
    network = random_network(0, nb_bins=129, hidden_size=16)
    network.fc3, network.bn3 = nn.Linear(16, 3 * 2 * 129), nn.BatchNorm1d(3 * 2 * 129)
    network.eval().sources = ["a", "b", "c"]
    x = torch.rand(2, 2, 129, 50)
    assert network(x).shape == (2, 6, 129, 50)
    separator = Separator({"all": network}, wiener_win_len=70, **SMALL).eval()
    assert same_as_plain(separator, True, CPU)
    audio = excerpt["mixture"][:, :40000]
    with torch.no_grad():
        assert sdr(separator(audio[None])[0], streamed(separator, audio)) > 90


@pytest.mark.parametrize("sources", [["a"], ["a", "b", "c"]])
def test_wrong_number_of_sources_is_an_error(sources):
    network = Several(["a", "b"])
    network.sources = sources
    separator = Separator({"all": network}, **SMALL).eval()
    for call in (separator, lambda x: streamed(separator, x[0])):
        with pytest.raises(UserError, match=r"the networks estimate 2 sources, not \['a'"):
            call(torch.randn(1, 2, 8000))


def test_amp_has_an_effect_in_forward_and_stream(excerpt, networks):
    """bfloat16 keeps 25 dB; the estimates are in float32 all the same. A CPU without: float32."""
    separator = Separator(networks).eval()
    audio = excerpt["mixture"][None, :, :60000]
    with torch.no_grad():
        whole = separator(audio)
        separator.amp = True
        lower = separator(audio)
    parts = streamed(separator, audio[0])
    assert lower.dtype == torch.float32
    if has_bfloat16("cpu"):
        assert 25 < sdr(whole, lower) < 80 and 25 < sdr(whole[0], parts) < 80
    else:
        assert torch.equal(whole, lower) and sdr(whole[0], parts) > 90


# --------------------------------------------------------------------- recordings of any length


@pytest.mark.parametrize("length", [1000, 100000, 264600])
@pytest.mark.parametrize("block,window", [(13, 7), (64, 100), (300, 300), (1024, None)])
def test_stream_equals_the_whole(excerpt, networks, length, block, window):
    """Block by block as in one piece: at least 90 dB in float32."""
    if (block, length) == (13, 264600):
        pytest.skip("takes long and shows no more")
    separator = Separator(networks, wiener_win_len=window).eval()
    audio = excerpt["mixture"][:, :length]
    with torch.no_grad():
        whole = separator(audio[None])[0]
    parts = streamed(separator, audio, block=block)
    assert parts.shape == whole.shape == (4, 2, length)
    for j in range(4):
        assert sdr(whole[j], parts[j]) > 90


def counted(blocks):
    """An iterable over blocks that counts how often it is iterated over."""

    class Blocks:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(blocks)

    return Blocks()


class OnlyForward(OpenUnmix):
    """A subclass that changes what forward does, and nothing else."""

    def forward(self, x):
        return super().forward(x).flip(2)


class LooksOverTime(OpenUnmix):
    """Its first stage sees more than a frame: it cannot run on blocks of frames."""

    def encode(self, x):
        return super().encode(x - x.mean(-1, keepdim=True))


class LastLooksOverTime(OpenUnmix):
    def decode(self, h, x):
        return super().decode(h, x).cumsum(-1)


class Random(OpenUnmix):
    """Knows which frame it sees."""

    def encode(self, x):
        return super().encode(x * torch.linspace(0.5, 1, x.shape[-1]))


class Bare(nn.Module):
    def __init__(self, **_):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 5, padding=2)

    def forward(self, x):
        return x * torch.sigmoid(self.layer(x))


class Listens(OpenUnmix):
    """A recurrent layer of its own: still in stages."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.lstm = nn.GRU(self.hidden_size, self.hidden_size)


STAGED = [OpenUnmix, ConvUnmix, Listens]
WHOLE = [OnlyForward, LooksOverTime, LastLooksOverTime, Random, Bare]


@pytest.mark.parametrize("kind", [*STAGED, *WHOLE])
def test_stream_gives_what_forward_gives(kind, capsys):
    """Whatever a network is: in stages only where its forward is their composition."""
    torch.manual_seed(0)
    network = kind(nb_bins=129, hidden_size=16).eval()
    separator = Separator({"vocals": network}, residual=True, wiener_win_len=90, **SMALL).eval()
    assert same_as_plain(separator, True, CPU) == (kind in STAGED)
    audio = torch.randn(2, 20000)
    blocks = counted(audio.split(3000, -1))
    with torch.no_grad():
        expected = separator(audio[None])[0]
    found = torch.cat(list(separator.stream(blocks)), -1)
    assert sdr(expected, found) > 100
    assert blocks.passes == (2 if kind in STAGED else 1)
    assert capsys.readouterr().out == ""


def test_one_network_without_stages_among_others():
    torch.manual_seed(0)
    networks = {"a": OpenUnmix(nb_bins=129, hidden_size=16), "b": Bare()}
    separator = Separator(networks, **SMALL).eval()
    audio = torch.randn(2, 20000)
    with torch.no_grad():
        assert sdr(separator(audio[None])[0], streamed(separator, audio, 3000)) > 100


class Itself(nn.Module):
    """Estimates the mixture, and notes how many frames it saw at once."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape[-1])
        return x


@pytest.mark.parametrize("windows", [(8, 2), (2, 1), (1, 1), (5, 3)])
@pytest.mark.parametrize("length", [100, 6400, 6399, 20000, 64 * 90, 64 * 120, 64 * 119, 50001])
def test_windows_lose_and_repeat_nothing(monkeypatch, windows, length):
    monkeypatch.setattr(model, "LONG", 100)
    monkeypatch.setattr(model, "WINDOWS", windows)
    network = Itself()
    separator = Separator({"a": network}, niter=0, wiener_win_len=30, **SMALL).eval()
    audio = torch.randn(2, length)
    assert sdr(audio, streamed(separator, audio, 1000)[0]) > 100
    # windows, and at the end what is left of one and its context
    most = (windows[0] + 2 * windows[1]) * 30
    assert max(network.seen) <= max(100 + 30, most + 30)


def test_long_recordings_without_stages(monkeypatch, capsys):
    """Overlapping windows, exact where they hold all that the network sees; and it is said once."""
    monkeypatch.setattr(model, "LONG", 200)
    torch.manual_seed(0)
    network = Wrapped(ConvUnmix(nb_bins=129, hidden_size=16))  # sees 40 frames to either side
    separator = Separator({"a": network}, residual=True, wiener_win_len=30, **SMALL).eval()
    audio = torch.randn(2, 64 * 1000)
    with torch.no_grad():
        expected = separator(audio[None])[0]
    assert sdr(expected, streamed(separator, audio, 5000)) > 100
    out, _ = capsys.readouterr()
    assert out.splitlines() == [
        "the network has no stages and the recording is long: separated in windows"
    ]
    network = random_network(0, nb_bins=129, hidden_size=16)
    for name, bias in network.lstm.named_parameters():
        if name.startswith("bias_hh"):
            bias.data[8:16] += 8  # of the forget gates: it remembers more than a window
    separator = Separator({"a": Wrapped(network)}, residual=True, wiener_win_len=30, **SMALL).eval()
    with torch.no_grad():
        expected = separator(audio[None])[0]
    assert 20 < sdr(expected, streamed(separator, audio, 5000)) < 100
    capsys.readouterr()
    short = audio[:, : 64 * 190]
    with torch.no_grad():
        assert sdr(separator(short[None])[0], streamed(separator, short, 5000)) > 100
    assert capsys.readouterr().out == ""


class Wrapped(nn.Module):
    """Hides a network's stages."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def test_one_wiener_window_for_a_long_recording_is_not_called_windows(monkeypatch, capsys):
    """wiener_win_len None: the filter, and so the network, has all of it at once."""
    monkeypatch.setattr(model, "LONG", 200)
    network = Wrapped(random_network(0, nb_bins=129, hidden_size=16))
    separator = Separator({"a": network}, residual=True, wiener_win_len=None, **SMALL).eval()
    audio = torch.randn(2, 64 * 400)
    with torch.no_grad():
        assert sdr(separator(audio[None])[0], streamed(separator, audio, 5000)) > 100
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------- fast forms against their formulas


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("frames,sources", [(1, 1), (40, 1), (40, 4), (7, 6)])
def test_filter_stereo(dtype, frames, sources):
    """The 2 x 2 inverse by hand: that of torch.linalg, also in float32."""
    real = torch.float32 if dtype == torch.complex64 else torch.float64
    v = random(2, 9, sources, frames).square().to(real)
    y = random(2, 9, sources, 2, 50, seed=1, dtype=torch.complex128)
    R = y @ y.mH / 50
    x = random(2, 9, 2, frames, seed=2, dtype=torch.complex128).to(dtype)
    expected, found = filter_sources(v, R, x, 1e-5), filter_stereo(v, R, x, 1e-5)
    assert found.dtype == expected.dtype == dtype
    assert found.shape == expected.shape == (2, 9, sources, 2, frames)
    assert relative(found, expected) < (1e-4 if dtype == torch.complex64 else 1e-10)


def test_filter_sources_is_the_formula():
    """y_j = v_j R_j (sum of v_l R_l + ridge I)^-1 x, one bin and frame after the other."""
    v = random(1, 2, 3, 4).square()
    y = random(1, 2, 3, 3, 9, seed=1, dtype=torch.complex128)
    R, x = y @ y.mH, random(1, 2, 3, 4, seed=2, dtype=torch.complex128)
    found = filter_sources(v, R, x, 0.01)
    for f in range(2):
        for t in range(4):
            C = sum(v[0, f, j, t] * R[0, f, j] for j in range(3)) + 0.01 * torch.eye(3)
            z = torch.linalg.inv(C) @ x[0, f, :, t]
            for j in range(3):
                expected = v[0, f, j, t] * R[0, f, j] @ z
                torch.testing.assert_close(found[0, f, j, :, t], expected)


@pytest.mark.parametrize("bins", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_wiener_on_cpu(bins, channels):
    """Blocks of bins, one after the other: the same as all bins at once."""
    V = random(2, 4, channels, bins, 20).abs()
    X = random(2, channels, bins, 20, seed=1, dtype=torch.complex128)
    level = X.abs().amax((1, 2, 3), keepdim=True)
    for niter in (1, 2):
        expected = expectation_maximization(V * X.sgn()[:, None], X, niter)
        found = wiener_on_cpu(V, X, niter, level)
        assert found.shape == expected.shape == V.shape
        assert relative(found, expected) < 1e-10


def test_wiener_takes_the_fast_form_and_says_the_same(monkeypatch):
    V = random(1, 4, 2, 130, 20).abs()
    X = random(1, 2, 130, 20, seed=1, dtype=torch.complex128)
    calls = []
    monkeypatch.setattr(
        model, "wiener_on_cpu", lambda *args: calls.append(1) or wiener_on_cpu(*args)
    )
    fast = wiener(V, X, 2)
    plain = wiener(V.requires_grad_(), X, 2)
    assert calls == [1]  # with gradients it is the formula
    monkeypatch.setattr(model, "filter_stereo", filter_sources)
    plainest = wiener(V, X, 2)
    assert max(relative(fast, plain), relative(fast, plainest)) < 1e-10


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_run_lstm(layers, bidirectional):
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 6, layers, bidirectional=bidirectional, dropout=0.4 * (layers > 1)).eval()
    for frames, batch in ((1, 1), (1023, 2), (1024, 1), (1025, 1), (2500, 3)):
        h = torch.randn(frames, batch, 8)
        expected, before = lstm(h)[0], h.clone()
        with torch.no_grad():
            found = run_lstm(lstm, h)
        assert torch.equal(h, before)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    h.requires_grad_()
    assert run_lstm(lstm, h).requires_grad  # with gradients it is the layer


OTHER_LSTMS = {
    "no bias": lambda: nn.LSTM(8, 6, 2, bias=False),
    "projection": lambda: nn.LSTM(8, 6, 2, proj_size=3),
    "another layer": lambda: nn.GRU(8, 6, 2, bidirectional=True),
    "a subclass": lambda: type("Mine", (nn.LSTM,), {"forward": lambda self, x: (2 * x, None)})(
        8, 6
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("make", OTHER_LSTMS.values(), ids=OTHER_LSTMS)
def test_run_lstm_calls_other_layers(make):
    lstm, h = make().eval(), torch.randn(20, 2, 8)
    with torch.no_grad():
        torch.testing.assert_close(run_lstm(lstm, h), lstm(h)[0])


def test_run_lstm_drops_out_in_training():
    lstm, h = nn.LSTM(8, 6, 2, dropout=0.5), torch.randn(20, 2, 8)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = lstm(h)[0]
        torch.manual_seed(1)
        torch.testing.assert_close(run_lstm(lstm, h), expected)


@pytest.mark.parametrize("frames", [1, 100, 1024, 1025, 3000])
def test_in_blocks(frames):
    x, y = torch.randn(frames, 2, 3), torch.randn(frames, 2, 3)
    sizes = []

    def function(x, y):
        sizes.append(len(x))
        return x * y + 1

    with torch.no_grad():
        assert torch.equal(in_blocks(function, x, y), x * y + 1)
    tried = [512, 1024] if frames > 1024 else []  # whether frames are independent
    assert sizes[: len(tried)] == tried
    assert max(sizes) <= 1024 and sum(sizes[len(tried) :]) == frames
    sizes.clear()
    z = in_blocks(function, x.requires_grad_(), y)
    assert sizes == [frames]
    z.sum().backward()
    torch.testing.assert_close(x.grad, y)


def gradients(output, inputs):
    """Those of a sum in which each output has its own weight."""
    weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), inputs)


def same_values_and_gradients(found, expected, inputs):
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_standardised_linear(channels):
    torch.manual_seed(0)
    linear = nn.Linear(channels * 20, 7, bias=False).double()
    x, mean, scale = random(5, 3, channels, 20), random(20, seed=1), random(20, seed=2)
    inputs = [value.requires_grad_() for value in (x, mean, scale)] + [linear.weight]
    expected = linear(((x + mean) * scale).flatten(-2))
    same_values_and_gradients(standardised_linear(linear, x, mean, scale), expected, inputs)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


OTHER_LINEARS = {
    "with a bias": lambda: nn.Linear(40, 7),
    "a subclass": lambda: Doubling(40, 7, bias=False),
    "two layers": lambda: nn.Sequential(nn.Linear(40, 9), nn.Linear(9, 7)),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(40, 7, bias=False)),
    "pruned": lambda: nn.utils.prune.random_unstructured(
        nn.Linear(40, 7, bias=False), "weight", 0.5
    ),
    "with a hook": lambda: hooked(nn.Linear(40, 7, bias=False)),
}


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


@pytest.mark.parametrize("make", OTHER_LINEARS.values(), ids=OTHER_LINEARS)
def test_standardised_linear_calls_other_layers(make):
    torch.manual_seed(0)
    linear, (x, mean, scale) = make(), (torch.randn(5, 3, 2, 20), torch.randn(20), torch.randn(20))
    for parameter in linear.parameters():
        parameter.data += 0.1  # what a hook computes before each call must be computed anew
    found = standardised_linear(linear, x, mean, scale)
    torch.testing.assert_close(found, linear(((x + mean) * scale).flatten(-2)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("repeats", [1, 2, 6])
def test_scaled_batch_norm(training, repeats):
    torch.manual_seed(0)
    ours = nn.BatchNorm1d(repeats * 20).double().train(training)
    for parameter in ours.parameters():
        parameter.data.uniform_(0.5, 2)
    plain = copy.deepcopy(ours)
    scale, mean = random(20, seed=1).requires_grad_(), random(20, seed=2).requires_grad_()
    for step in range(3):
        y = random(5, 3, repeats * 20, seed=step).requires_grad_()
        normed = over_frames(plain, y).unflatten(-1, (-1, 20))
        expected = (normed * scale + mean).flatten(-2)
        found = scaled_batch_norm(ours, y, scale, mean)
        torch.testing.assert_close(found, expected)
        for a, b in zip(gradients(found, [y, scale, mean]), gradients(expected, [y, scale, mean])):
            torch.testing.assert_close(a, b)
        own = gradients(scaled_batch_norm(copy.deepcopy(ours).eval(), y, scale, mean), [scale])
        assert own[0].isfinite().all()
        for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values()):
            torch.testing.assert_close(a, b, msg=name)  # running statistics, and their number
    assert ours.num_batches_tracked == 3 * training


def test_scaled_batch_norm_has_the_layers_gradients():
    bn, plain = nn.BatchNorm1d(40).double(), nn.BatchNorm1d(40).double()
    y, scale, mean = random(5, 3, 40), random(20, seed=1), random(20, seed=2)
    found = gradients(scaled_batch_norm(bn, y, scale, mean), [bn.weight, bn.bias])
    normed = over_frames(plain, y).unflatten(-1, (-1, 20))
    expected = gradients((normed * scale + mean).flatten(-2), [plain.weight, plain.bias])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


OTHER_NORMS = {
    "no batch norm": lambda: nn.LayerNorm(40),
    "groups": lambda: nn.GroupNorm(4, 40),
    "nothing": lambda: nn.Identity(),
    "without weights": lambda: nn.BatchNorm1d(40, affine=False),
    "without statistics": lambda: nn.BatchNorm1d(40, track_running_stats=False),
    "cumulative average": lambda: nn.BatchNorm1d(40, momentum=None),
    "frozen statistics": lambda: nn.BatchNorm1d(40, momentum=0.0),
    "a subclass": lambda: type("Mine", (nn.BatchNorm1d,), {"forward": lambda self, x: 3 * x})(40),
    "with a hook": lambda: hooked(nn.BatchNorm1d(40)),
}


@pytest.mark.parametrize("make", OTHER_NORMS.values(), ids=OTHER_NORMS)
def test_scaled_batch_norm_calls_other_layers(make):
    bn = make()
    plain, (scale, mean) = copy.deepcopy(bn), torch.rand(2, 20)
    for step in range(3):
        y = torch.randn(5, 3, 40)
        expected = over_frames(plain, y).unflatten(-1, (-1, 20)) * scale + mean
        torch.testing.assert_close(scaled_batch_norm(bn, y, scale, mean), expected.flatten(-2))
        for a, b in zip(bn.state_dict().values(), plain.state_dict().values()):
            torch.testing.assert_close(a, b)


def test_a_replaced_layer_is_what_runs(monkeypatch):
    """fc1 with a bias, another norm, another recurrent layer, another mask: each by assignment."""
    torch.manual_seed(0)
    network = random_network(0, nb_bins=65, hidden_size=16, max_bin=50)
    x = torch.rand(2, 2, 65, 9)
    before = network(x)
    network.fc1 = nn.Linear(100, 16)
    network.bn3 = nn.GroupNorm(1, 130)
    monkeypatch.setitem(model.MASKS, "tanh", torch.tanh)
    network.mask = "tanh"
    h = torch.tanh(over_frames(network.bn1, network.fc1(standardised(network, x))))
    h = F.relu(over_frames(network.bn2, network.fc2(torch.cat([h, network.lstm(h)[0]], -1))))
    y = over_frames(network.bn3, network.fc3(h)).unflatten(-1, (2, 65))
    mask = torch.tanh(y * network.output_scale + network.output_mean)  # (T, B, C, F)
    expected = mask.permute(1, 2, 3, 0) * x
    assert sdr(expected.detach(), network(x).detach()) > 100
    assert sdr(expected.detach(), before.detach()) < 20


def standardised(network, x):
    x = x[:, :, : network.max_bin].permute(3, 0, 1, 2)
    return ((x + network.input_mean) * network.input_scale).flatten(-2)  # (T, B, C * max_bin)


# -------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_belongs_to_what_is_computed(small, model_folder):
    def separator(**settings):
        return Separator(small, **{**SMALL, **settings})

    reference = separator().fingerprint()
    assert separator().fingerprint() == reference
    changed = {
        "niter": separator(niter=2),
        "softmask": separator(softmask=True),
        "residual": separator(residual=True),
        "residual's name": separator(residual="rest"),
        "window": separator(wiener_win_len=100),
        "all in one window": separator(wiener_win_len=None),
        "sample rate": separator(sample_rate=16000),
        "STFT": separator(n_hop=32),
        "channels": separator(nb_channels=1),
        "order": Separator(dict(reversed(small.items())), **SMALL),
        "names": Separator(dict(zip("abcd", small.values())), **SMALL),
        "fewer": Separator({"vocals": small["vocals"]}, **SMALL),
    }
    changed["filter"] = separator()
    changed["filter"].wiener = model.norbert_wiener
    changed["amp"] = separator()
    changed["amp"].amp = True
    relu = {
        name: random_network(j, nb_bins=129, hidden_size=16, mask="relu")
        for j, name in enumerate(TARGETS)
    }
    changed["mask"] = Separator(relu, **SMALL)
    for name, _ in small["bass"].state_dict().items():
        weights = copy.deepcopy(small)
        value = weights["bass"].state_dict()[name]
        value.flatten()[-1:].add_(1)
        changed[name] = Separator(weights, **SMALL)
    found = {name: each.fingerprint() for name, each in changed.items()}
    assert reference not in found.values(), [name for name in found if found[name] == reference]
    assert len(set(found.values())) == len(found)


def test_fingerprint_of_networks_made_by_hand():
    """Without make_network: what a class was called with still counts."""
    networks = {}
    for mask in ("sigmoid", "relu"):
        networks[mask] = OpenUnmix(nb_bins=129, hidden_size=16, mask=mask)
    networks["relu"].load_state_dict(networks["sigmoid"].state_dict())
    a, b = (Separator({"vocals": network}).fingerprint() for network in networks.values())
    assert a != b


def test_fingerprint_with_any_wiener_filter(small):
    """A filter of one's own: a function, a lambda, a partial, an object."""
    from functools import partial

    separator, found = Separator(small, **SMALL), set()
    for function in (wiener, lambda *args: wiener(*args), partial(wiener, niter=3), nn.Identity()):
        separator.wiener = function
        found.add(separator.fingerprint())
    assert len(found) == 4


def test_fingerprint_is_the_same_in_every_process(model_folder):
    """Stems and scores of yesterday are known again."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import model\n"
    code += "print(model.load_separator(sys.argv[2]).fingerprint())"
    found = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(FOLDER), str(model_folder)]
        done = subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        found.add(done.stdout.strip())
    assert found == {load_separator(model_folder).fingerprint()}


# ------------------------------------------------------------------------------------ model folders


def test_our_folder_goes_to_openunmix(tmp_path, excerpt):
    folder = make_model(tmp_path / "model", hidden_size=32)
    audio = excerpt["mixture"][None, :, :60000]
    published = openunmix.utils.load_separator(str(folder), targets=list(TARGETS), niter=1).eval()
    with torch.no_grad():
        assert sdr(published(audio), load_separator(folder)(audio)) > 60


def test_published_folder_comes_to_us(tmp_path, excerpt):
    """Their names of files, and records without our keys: a mask of ReLU."""
    folder = make_model(tmp_path / "model", hidden_size=32, published=True)
    assert (folder / "vocals-00000000.pth").exists() and load(folder / "vocals.json").keys() == {
        "args"
    }
    ours = make_model(tmp_path / "ours", hidden_size=32)
    audio = excerpt["mixture"][None, :, :60000]
    published = openunmix.utils.load_separator(str(folder), targets=list(TARGETS), niter=1).eval()
    with torch.no_grad():
        found = load_separator(folder)(audio)
        assert sdr(published(audio), found) > 60
        assert torch.equal(found, load_separator(ours)(audio))
        for target in TARGETS:  # the oldest records lack even more
            record = load(folder / f"{target}.json")
            del record["args"]["unidirectional"]
            save(record, folder / f"{target}.json")
        assert torch.equal(load_separator(folder)(audio), found)


@pytest.mark.parametrize("settings", [{"mask": "sigmoid"}, {"arch": "conv"}, {"nb_channels": 1}])
def test_our_folder_comes_back(tmp_path, settings):
    folder = make_model(
        tmp_path, targets=("vocals", "bass"), nfft=256, sample_rate=8000, **settings
    )
    separator = load_separator(folder, niter=0)
    audio = torch.randn(1, 2, 8000)
    assert separator.targets == ["vocals", "bass"] and separator.sample_rate == 8000
    networks = {}
    for j, target in enumerate(("vocals", "bass")):
        made = {**dict(arch="blstm", mask="relu", nb_bins=129, hidden_size=16), **settings}
        networks[target] = random_network(j, **made)
    expected = Separator(networks, niter=0, **SMALL).eval()
    with torch.no_grad():
        assert torch.equal(separator(audio), expected(audio))
    assert not any(module.training for module in separator.modules())


def test_all_arguments_of_the_loader(model_folder):
    separator = load_separator(str(model_folder), ["bass", "vocals"], 2, True, "rest", None, "cpu")
    assert separator.targets == ["bass", "vocals", "rest"]
    assert (separator.niter, separator.softmask, separator.wiener_win_len) == (2, True, None)
    assert load_separator(model_folder, targets="vocals").targets == ["vocals"]
    assert load_separator(model_folder, targets=["vocals", "vocals"]).targets == ["vocals"]
    assert load_separator(model_folder).targets == ["vocals", "drums", "bass", "other"]


def test_other_files_do_not_disturb(tmp_path):
    folder = make_model(tmp_path, targets=("vocals", "bass"), nfft=256)
    before = load_separator(folder).fingerprint()
    (folder / "notes.json").write_text("my notes")
    (folder / "._vocals.json").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves them
    (folder / "._vocals.pth").write_bytes(b"\x00\x05\x16\x07")
    (folder / "vocals_backing.pth").write_bytes(b"somebody's weights")
    (folder / "vocals.old.pth").write_bytes(b"somebody's weights")
    (folder / "vocals-0123abcd.pth").write_bytes(b"published under this name, but ours is newer")
    (folder / "vocals.chkpnt").write_bytes(b"")
    (folder / ".vocals.123-abc.part").write_bytes(b"")
    (folder / "previous" / "1").mkdir(parents=True)
    (folder / "previous" / "1" / "drums.pth").write_bytes(b"")
    (folder / "drums.json").write_text("{}")  # a training that has not finished an epoch
    separator = load_separator(folder)
    assert separator.targets == ["vocals", "bass"] and separator.fingerprint() == before


def change(key, value, file="separator.json", under=None):
    """A function that changes one setting in one file of a model folder; `...` removes it."""

    def apply(folder):
        data = load(folder / file)
        part = data[under] if under else data
        if value is ...:
            del part[key]
        else:
            part[key] = value
        save(data, folder / file)

    return apply


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


def weights(**changes):
    """A function that changes tensors of vocals.pth; None removes one."""

    def apply(folder):
        state = load(folder / "vocals.pth")
        for name, value in changes.items():
            name = name.replace("__", ".")
            state.pop(name, None)
            if value is not None:
                state[name] = value
        save(state, folder / "vocals.pth")

    return apply


def network(key, value):
    return change(key, value, "vocals.json", "network")


def published(**changes):
    """Remove `network` from the record: it becomes a published one; change its `args`."""

    def apply(folder):
        record = load(folder / "vocals.json")
        del record["network"]
        record["args"] = {**record["args"], **changes}
        save(record, folder / "vocals.json")

    return apply


SETTINGS = "separator.json: "
RECORD = "vocals.json: "
WEIGHTS = "vocals.pth: "
BROKEN = {  # what is wrong with a folder: (how to make it, what the error says)
    "no settings": (lambda folder: (folder / "separator.json").unlink(), "not a model folder"),
    "settings cut off": (write("separator.json", '{"nfft": '), SETTINGS + "is damaged"),
    "settings are a list": (write("separator.json", "[4096]"), SETTINGS + "is no JSON object"),
    "settings are null": (write("separator.json", "null"), SETTINGS + "is no JSON object"),
    "no rate": (change("sample_rate", ...), SETTINGS + "sample_rate is None"),
    "rate is text": (change("sample_rate", "44100"), SETTINGS + "sample_rate is '44100'"),
    "rate is true": (change("sample_rate", True), SETTINGS + "sample_rate is True"),
    "rate is negative": (change("sample_rate", -1), SETTINGS + "sample_rate is -1"),
    "rate is a fraction": (change("sample_rate", 44100.5), SETTINGS + "sample_rate is 44100.5"),
    "rate is a list": (change("sample_rate", [44100]), SETTINGS + r"sample_rate is \[44100\]"),
    "rate is NaN": (change("sample_rate", float("nan")), SETTINGS + "sample_rate is nan"),
    "nfft is zero": (change("nfft", 0), SETTINGS + "nfft is 0"),
    "nfft is huge": (change("nfft", 10**12), SETTINGS + "nfft is 1000000000000"),
    "nfft is infinite": (change("nfft", float("inf")), SETTINGS + "nfft is inf"),
    "nfft of another": (change("nfft", 512), "was trained with nfft 256, separator.json says 512"),
    "hop is an object": (change("nhop", {}), SETTINGS + "nhop is {}"),
    "hop is too long": (change("nhop", 200), SETTINGS + "nhop is more than half of nfft"),
    "channels": (change("nb_channels", 3), SETTINGS + "nb_channels is 3"),
    "channels of another": (
        change("nb_channels", 1),
        "was trained with nb_channels 2, separator.json says 1",
    ),
    "record cut off": (write("vocals.json", '{"args": '), RECORD + "is damaged"),
    "record is a list": (write("vocals.json", "[]"), RECORD),
    "record is a number": (write("vocals.json", "3"), RECORD),
    "network is text": (change("network", "blstm", "vocals.json"), RECORD),
    "network is a list": (change("network", ["blstm"], "vocals.json"), RECORD),
    "unknown network": (network("arch", "nosuch"), RECORD + "arch is 'nosuch'"),
    "network's name is a list": (network("arch", ["blstm"]), RECORD + r"arch is \['blstm'\]"),
    "network's name is null": (network("arch", None), RECORD + "arch is None"),
    "unknown mask": (network("mask", "tanh"), RECORD + "mask is 'tanh'"),
    "mask is a list": (network("mask", ["relu"]), RECORD + r"mask is \['relu'\]"),
    "size is text": (network("hidden_size", "16"), RECORD + "hidden_size is '16'"),
    "size is null": (network("hidden_size", None), RECORD + "hidden_size is None"),
    "size is odd": (network("hidden_size", 17), WEIGHTS + "does not fit its settings"),
    "size of another": (network("hidden_size", 32), WEIGHTS + "does not fit .*size mismatch"),
    "no layers": (network("nb_layers", 0), RECORD + "nb_layers is 0"),
    "bins are a fraction": (network("nb_bins", 129.5), RECORD + "nb_bins is 129.5"),
    "bins of another": (network("nb_bins", 65), "nb_bins 65, not 129"),
    "direction is text": (network("unidirectional", "no"), RECORD + "unidirectional is 'no'"),
    "statistics too short": (network("input_mean", [1.0, 2.0]), WEIGHTS + "does not fit"),
    "args is a list": (change("args", [], "vocals.json"), None),  # is not looked at
    "published, args is a list": (write("vocals.json", '{"args": [1]}'), RECORD + "args"),
    "published, args is text": (write("vocals.json", '{"args": "x"}'), RECORD + "args"),
    "published, unknown network": (published(arch="nosuch"), RECORD + "arch is 'nosuch'"),
    "published, unknown mask": (published(mask="tanh"), RECORD + "mask is 'tanh'"),
    "published, mask is a number": (published(mask=3), RECORD + "mask is 3"),
    "no weights": (lambda folder: (folder / "vocals.pth").unlink(), "no target 'vocals'"),
    "weights are no file": (
        lambda f: (f / "vocals.pth").write_bytes(b"no"),
        WEIGHTS + "is damaged",
    ),
    "weights are empty": (lambda f: (f / "vocals.pth").write_bytes(b""), WEIGHTS + "is damaged"),
    "weights are text": (
        lambda f: save({"x": "text"}, f / "vocals.pth"),
        WEIGHTS + "holds no weights",
    ),
    "weights are a list": (lambda f: save([1], f / "vocals.pth"), WEIGHTS + "holds no weights"),
    "a weight is missing": (weights(fc3__weight=None), WEIGHTS + ".*fc3.weight"),
    "a weight too many": (weights(fc9__weight=torch.zeros(1)), WEIGHTS + ".*fc9.weight"),
    "a weight's size": (weights(bn3__bias=torch.zeros(7)), WEIGHTS + ".*size mismatch for bn3"),
    "a weight is NaN": (weights(bn2__bias=torch.full((16,), np.nan)), WEIGHTS + "bn2.bias has NaN"),
    "a weight is infinite": (
        weights(output_mean=torch.full((129,), np.inf)),
        "output_mean has NaN",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_loading_names_what_is_wrong(case, tmp_path):
    apply, message = BROKEN[case]
    folder = make_model(tmp_path / "model", targets=("vocals",), nfft=256, sample_rate=8000)
    apply(folder)
    if message is None:
        assert load_separator(folder).targets == ["vocals"]
        return
    with pytest.raises(UserError, match=message) as caught:
        load_separator(folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text and len(text) < 600


def test_settings_may_be_whole_floats(tmp_path):
    """JSON of other programs writes 44100.0."""
    folder = make_model(tmp_path, targets=("vocals",), nfft=256, sample_rate=8000)
    before = load_separator(folder)
    save(
        {key: float(value) for key, value in load(folder / "separator.json").items()},
        folder / "separator.json",
    )
    record = load(folder / "vocals.json")
    for key in ("hidden_size", "nb_bins", "nb_channels"):
        record["network"][key] = float(record["network"][key])
    save(record, folder / "vocals.json")
    separator = load_separator(folder)
    audio = torch.randn(1, 2, 8000)
    assert separator.sample_rate == 8000 and isinstance(separator.sample_rate, int)
    with torch.no_grad():
        assert torch.equal(separator(audio), before(audio))


def test_a_network_for_all_bins_comes_back(tmp_path):
    """max_bin None, as the class has it by default."""
    folder = make_model(tmp_path, targets=("vocals",), nfft=256)
    network = make_network(nb_bins=129, hidden_size=16, max_bin=None)
    save(network.state_dict(), folder / "vocals.pth")
    save({"network": network.made_with}, folder / "vocals.json")
    assert load_separator(folder).networks[0].max_bin == 129


def test_missing_targets_and_models(model_folder, tmp_path):
    with pytest.raises(UserError, match="has no target 'piano'; it has vocals, drums, bass, other"):
        load_separator(model_folder, targets=["vocals", "piano"])
    with pytest.raises(UserError, match="nowhere: no such model or folder; train one"):
        load_separator("nowhere")
    with pytest.raises(UserError, match="umxl: has no target 'piano'"):
        load_separator("umxl", targets="piano")
    save(
        {"sample_rate": 8000, "nfft": 256, "nhop": 64, "nb_channels": 2},
        tmp_path / "separator.json",
    )
    with pytest.raises(UserError, match="none yet; train it first"):
        load_separator(tmp_path)


# -------------------------------------------------------------------------------- published weights


@pytest.fixture
def zenodo(tmp_path, monkeypatch):
    """A server on 127.0.0.1 in Zenodo's place; torch hub's folder is temporary."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{{record}}/{{name}}.pth"
    monkeypatch.setattr(model, "ZENODO", address)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield served
    server.shutdown()
    server.server_close()


def stand_in(name):
    """Bytes of a small network's weights, as published under `name`."""
    buffer = io.BytesIO()
    shape = dict(nb_bins=2049, nb_channels=2, hidden_size=8, max_bin=1487)
    if name == "umxse":
        shape = dict(nb_bins=513, nb_channels=1, hidden_size=8, max_bin=513)
    state = random_network(0, **shape).state_dict()
    # the oldest files hold their window, too
    torch.save({**state, "stft.window": torch.zeros(4)}, buffer)
    return buffer.getvalue()


def publish(name, zenodo, monkeypatch):
    """Put stand-ins of the right names on the server; returns their names."""
    record, names, settings = model.PUBLISHED[name]
    content = stand_in(name)
    start = hashlib.sha256(content).hexdigest()[:8]
    files = [file[:-8] + start for file in names.split()]
    monkeypatch.setitem(model.PUBLISHED, name, (record, " ".join(files), settings))
    (zenodo / str(record)).mkdir()
    for file in files:
        (zenodo / str(record) / f"{file}.pth").write_bytes(content)
    return files


@pytest.mark.parametrize("name", ["umx", "umxhq", "umxl", "umxse"])
def test_published_weights(name, zenodo, monkeypatch, tmp_path, capsys):
    files = publish(name, zenodo, monkeypatch)
    monkeypatch.chdir(tmp_path)
    separator = load_separator(name)
    shutil.rmtree(zenodo)  # from now on the weights are at hand
    assert load_separator(name).targets == separator.targets == [file[:-9] for file in files]
    speech = name == "umxse"
    expected = (16000, 1024, 512, 1) if speech else (44100, 4096, 1024, 2)
    settings = (separator.sample_rate, separator.n_fft, separator.n_hop, separator.nb_channels)
    assert settings == expected
    x = torch.rand(1, separator.nb_channels, separator.n_fft // 2 + 1, 9) * 10
    for network in separator.target_models.values():
        assert network.made_with["mask"] == "relu" and (network(x) / x).max() > 1
    assert ("CC BY-NC-SA 4.0" in capsys.readouterr().out) == (name == "umxl")
    kept = sorted(path.name for path in (tmp_path / "hub" / "checkpoints").iterdir())
    assert kept == sorted(f"{file}.pth" for file in files)
    assert load_separator(name, targets=separator.targets[1]).targets == separator.targets[1:2]


@pytest.mark.parametrize("content", [b"", b"cut off", "zip"])
def test_published_weights_with_a_wrong_hash_are_fetched_again(
    zenodo, monkeypatch, tmp_path, content
):
    files = publish("umxse", zenodo, monkeypatch)
    path = tmp_path / "hub" / "checkpoints" / f"{files[0]}.pth"
    path.parent.mkdir(parents=True)
    whole = stand_in("umx")  # loads, but is another's
    path.write_bytes(whole if content == "zip" else content)
    assert load_separator("umxse").targets == ["speech", "noise"]
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(files[0][-8:])


def test_published_weights_that_fail(zenodo, tmp_path):
    record, names, _ = model.PUBLISHED["umxse"]
    where = r"speech_f5e0d9f9.pth: .*fetch it by hand and put it at .*checkpoints"
    with pytest.raises(UserError, match=where):
        load_separator("umxse")
    (zenodo / str(record)).mkdir()
    (zenodo / str(record) / f"{names.split()[0]}.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="failed the check of its SHA-256"):
        load_separator("umxse")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_a_folder_named_as_published_weights_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "umxl", targets=("vocals",), nfft=256)
    assert load_separator("umxl").n_fft == 256


def test_settings_of_published_weights():
    """Addresses, targets and rates as published (openunmix/__init__.py, utils.py), hashes included."""
    address = model.ZENODO.format(record=3370489, name="vocals-b62c91ce")
    assert address == "https://zenodo.org/records/3370489/files/vocals-b62c91ce.pth"
    source = inspect.getsource(openunmix)
    for record, names, _ in model.PUBLISHED.values():
        for name in names.split():
            assert f"records/{record}/files/{name}.pth" in source
    settings = {name: model.PUBLISHED[name][2] for name in model.PUBLISHED}
    music = {"sample_rate": 44100, "nfft": 4096, "nhop": 1024, "nb_channels": 2}
    speech = {"sample_rate": 16000, "nfft": 1024, "nhop": 512, "nb_channels": 1}
    assert settings == {"umx": music, "umxhq": music, "umxl": music, "umxse": speech}


# ------------------------------------------------------------------------------- sums of the targets


def test_aggregation():
    targets = list(TARGETS)
    estimates = torch.randn(4, 2, 50)
    assert model.aggregation(["a", "b"]) == {"a": ["a"], "b": ["b"]}
    sums = model.aggregation(targets, '{"rest": ["drums", "bass"], "vocals": ["vocals"]}')
    summed = model.sum_targets(estimates, targets, sums)
    assert list(summed) == ["rest", "vocals"]
    torch.testing.assert_close(summed["rest"], estimates[1] + estimates[2])
    torch.testing.assert_close(summed["vocals"], estimates[0])


@pytest.mark.parametrize(
    "text,message",
    [
        ("no JSON", "is not JSON such as"),
        ("5", "is not JSON such as"),
        ('["vocals"]', "is not JSON such as"),
        ("{}", "is not JSON such as"),
        ('{"a": []}', "is not JSON such as"),
        ('{"a": "vocals"}', "is not JSON such as"),
        ('{"a": ["piano"]}', "unknown target 'piano'; there are"),
        ('{"a": [1]}', "unknown target 1"),
        ('{"a/b": ["vocals"]}', "'a/b' can't be a name"),
        ('{"mixture": ["vocals"]}', "'mixture' can't be a name"),
    ],
)
def test_aggregation_that_is_wrong(text, message):
    with pytest.raises(UserError, match=f"--aggregate: .*{message}"):
        model.aggregation(list(TARGETS), text)


# --------------------------------------------------------------------------------------- the numbers


def test_numbers_of_the_published_implementation(excerpt, networks):
    """Figures made by openunmix 1.3.0 (make_figures.py): a change is noticed without it, too."""
    from make_figures import FIGURES, summary

    figures = json.loads(FIGURES.read_text())
    with torch.no_grad():
        found = summary(Separator(networks)(excerpt["mixture"][None, :, :176400])[0], excerpt)
    for name, values in figures.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-3, err_msg=name)
