"""The Open-Unmix model: STFT, network, Wiener filter, and the separator that joins them.

Axis letters, everywhere in this project:

    B batch   J sources   C channels   F frequency bins   T frames   N samples   H hidden units
    waveform (B, C, N)     STFT (B, C, F, T) complex     estimates (B, J, C, N)

Stöter, Uhlich, Liutkus, Mitsufuji: Open-Unmix - A Reference Implementation for Music Source
Separation, JOSS 2019.
"""

import hashlib
import inspect
import io
import itertools
import json
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils import SOURCES, UserError, atomic_write, check_name, code_of, compiled, download
from utils import has_bfloat16, load, patched, precise, select_device, use_amp

# ------------------------------------------------------------------------------------------ STFT


def stft_window(n_fft, like):
    """The window of `stft` and of its inverse: periodic Hann; device and precision of `like`."""
    return torch.hann_window(n_fft, device=like.device, dtype=like.dtype)


def stft(waveform, n_fft=4096, n_hop=1024):
    """Short-time Fourier transform: `stft_window`, centred frames, reflected edges.

    Args:
        waveform: (..., N) real.
    Returns:
        (..., F, T) complex, not normalised, with F = n_fft // 2 + 1 and T = N // n_hop + 1. A
        waveform too short to be reflected (N <= n_fft / 2) is lengthened with zeros.
    """
    shortage = n_fft // 2 + 1 - waveform.shape[-1]
    x = F.pad(waveform, (0, max(0, shortage))).flatten(0, -2)  # (everything else, N)
    window = stft_window(n_fft, x)
    X = torch.stft(x, n_fft, n_hop, window=window, pad_mode="reflect", return_complex=True)
    return X.unflatten(0, waveform.shape[:-1])  # (..., F, T)


def istft(spectrum, length, n_fft=4096, n_hop=1024):
    """Inverse of `stft`: (..., F, T) complex -> (..., N) real with N = `length`."""
    X = spectrum.flatten(0, -3)
    window = stft_window(n_fft, X.real)
    x = torch.istft(X, n_fft, n_hop, window=window, length=max(length, n_fft // 2 + 1))
    return x[..., :length].unflatten(0, spectrum.shape[:-2])  # (..., N)


def magnitude(X, nb_channels):
    """What a network sees of a spectrum (..., C, F, T): |X|, or for one channel its mean over C."""
    return X.abs().mean(-3, keepdim=True) if nb_channels == 1 else X.abs()


# ------------------------------------------------------------------------------------- the network


class OpenUnmix(nn.Module):
    """The network for one target: from the mixture's magnitudes to the target's.

    Args:
        nb_bins: F of input and output.
        nb_channels: C of input and output.
        hidden_size: H.
        nb_layers: layers of the LSTM.
        unidirectional: LSTM that looks at the past only.
        max_bin: bins that the network sees, from 0 on; None for all. It still masks all of them.
        mask: "sigmoid", between 0 and 1 as in the paper, or "relu", as the published weights have.
        input_mean, input_scale: (F,) mean and deviation of the training mixtures' magnitudes.
        mask_start: the masks before training; None: `output_mean` is 1, as published, which makes
            sigmoid masks of 0.73.
        dropout: between the LSTM's layers, in training.

    Parameter names and shapes are those of the published state_dicts; hence the mean is stored
    negated and the scale as its reciprocal.
    """

    def __init__(
        self,
        nb_bins=2049,
        nb_channels=2,
        hidden_size=512,
        nb_layers=3,
        unidirectional=False,
        max_bin=None,
        mask="sigmoid",
        input_mean=None,
        input_scale=None,
        mask_start=None,
        dropout=0.4,
    ):
        super().__init__()
        self.nb_bins, self.nb_channels, self.hidden_size = nb_bins, nb_channels, hidden_size
        self.max_bin = min(max_bin or nb_bins, nb_bins)
        self.mask = mask
        mean = torch.zeros(nb_bins) if input_mean is None else torch.as_tensor(input_mean).float()
        scale = torch.ones(nb_bins) if input_scale is None else torch.as_tensor(input_scale).float()
        self.input_mean = nn.Parameter(-mean[: self.max_bin])
        self.input_scale = nn.Parameter(1 / scale[: self.max_bin])
        self.fc1 = nn.Linear(nb_channels * self.max_bin, hidden_size, bias=False)
        self.bn1 = nn.BatchNorm1d(hidden_size)
        self.lstm = nn.LSTM(
            hidden_size,
            hidden_size if unidirectional else hidden_size // 2,
            nb_layers,
            bidirectional=not unidirectional,
            dropout=dropout if nb_layers > 1 else 0.0,
        )
        self.fc2 = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.bn2 = nn.BatchNorm1d(hidden_size)
        self.fc3 = nn.Linear(hidden_size, nb_channels * nb_bins, bias=False)
        self.bn3 = nn.BatchNorm1d(nb_channels * nb_bins)
        self.output_scale = nn.Parameter(torch.ones(nb_bins))
        start = torch.full((nb_bins,), mask_start or 1.0)
        start = start.logit() if mask_start and mask == "sigmoid" else start
        self.output_mean = nn.Parameter(start)

    def forward(self, x):
        """(B, C, F, T) magnitudes of the mixture -> (B, C, F, T) magnitudes of the target.

        Three stages: the first and the last work on each frame by itself, so that a recording of
        any length can be separated exactly (`stream`).
        """
        h = self.encode(x)  # (T, B, H)
        h = self.recur(h)  # (T, B, H)
        return self.decode(h, x)  # (B, C, F, T)

    def encode(self, x):
        """Crop, standardise, fc1, batch norm, tanh: (B, C, F, T) -> (T, B, H)."""
        x = x[:, :, : self.max_bin].permute(3, 0, 1, 2)  # (T, B, C, max_bin)
        # fc1((x + input_mean) * input_scale)
        h = standardised_linear(self.fc1, x, self.input_mean, self.input_scale)  # (T, B, H)
        return torch.tanh(over_frames(self.bn1, h))  # (T, B, H)

    def recur(self, h):
        """BLSTM, skip connection, fc2, batch norm, ReLU: (T, B, H) -> (T, B, H)."""
        context = run_lstm(self.lstm, h)  # (T, B, H)
        return in_blocks(self.join, h, context) if not self.training else self.join(h, context)

    def join(self, h, context):
        h = self.fc2(torch.cat([h, context], dim=-1))  # (T, B, 2 H) -> (T, B, H)
        return F.relu(over_frames(self.bn2, h))

    def decode(self, h, x):
        """fc3, batch norm, output scale and mean, mask: (T, B, H), (B, C, F, T) -> (B, C, F, T).

        A network whose fc3 and bn3 are K times as wide masks K sources: (B, K * C, F, T).
        """
        y = self.fc3(h)  # (T, B, K * C * F)
        # bn3(y) * output_scale + output_mean
        y = scaled_batch_norm(self.bn3, y, self.output_scale, self.output_mean)
        mask = MASKS[self.mask](y).unflatten(2, (-1, x.shape[1], self.nb_bins))  # (T, B, K, C, F)
        x = x.permute(3, 0, 1, 2).unsqueeze(2)  # (T, B, 1, C, F)
        return (mask * x).flatten(2, 3).permute(1, 2, 3, 0)  # (B, K * C, F, T)


MASKS = {"sigmoid": torch.sigmoid, "relu": torch.relu}


def over_frames(batch_norm, h):
    """A batch norm of H features on h (T, B, H): every frame of every example counts alike."""
    return batch_norm(h.flatten(0, 1)).view_as(h)


class XUMX(OpenUnmix):
    """X-UMX (CrossNet-Open-Unmix): a network per source, which share their averaged hidden states.

    It has no more parameters or operations than separate networks. Train it with `--target all` and
    the paper's `--loss xumx`. From: Sawata, Uhlich, Takahashi, Mitsufuji, "All for one and one for
    all: improving music separation by bridging networks", ICASSP 2021.

    Args:
        sources: names of the K sources, in the order of the output.
        settings: the arguments of each of the K `OpenUnmix`, its trunks.
    """

    def __init__(self, sources=SOURCES, **settings):
        nn.Module.__init__(self)  # the layers are the trunks' own
        names = sources if isinstance(sources, list | tuple) else [sources]
        names = [check_name(str(name), "--arch-options sources:") for name in names or [""]]
        self.sources = tuple(dict.fromkeys(names))
        self.trunks = nn.ModuleList(OpenUnmix(**settings) for _ in self.sources)
        self.nb_channels, self.hidden_size = self.trunks[0].nb_channels, self.trunks[0].hidden_size

    def encode(self, x):
        """The first bridge: the mean of all trunks' (B, C, F, T) -> (T, B, H)."""
        return sum(trunk.encode(x) for trunk in self.trunks) / len(self.trunks)

    def recur(self, h):
        """The second bridge: h beside the mean of all trunks' BLSTMs, (T, B, H) -> (T, B, 2 H)."""
        context = sum(run_lstm(trunk.lstm, h) for trunk in self.trunks) / len(self.trunks)
        return torch.cat([h, context], dim=-1)

    def decode(self, h, x):
        """The trunks' fc2 to mask: (T, B, 2 H), (B, C, F, T) -> (B, K * C, F, T)."""
        V = [trunk.decode(trunk.join(*h.chunk(2, -1)), x) for trunk in self.trunks]
        V = [v.permute(3, 0, 1, 2) for v in V]  # (T, B, C, F), as in memory
        return torch.cat(V, dim=2).permute(1, 2, 3, 0)  # (B, K * C, F, T)


def bridge(networks):
    """The X-UMX whose trunks are {source: OpenUnmix}, trained one by one: where it may start from.

    Raises UserError where the networks are not all `blstm` of the same size, mask and dropout.
    """
    begin = {"input_mean", "input_scale", "mask_start"}  # only what a training begins with
    kinds = []
    for network in networks.values():
        kinds.append({k: v for k, v in network.made_with.items() if k not in begin})
    if kinds[0]["arch"] != "blstm" or any(kind != kinds[0] for kind in kinds):
        raise UserError("--arch xumx: starts from blstm networks of one size, mask and dropout")
    bridged = make_network(**{**kinds[0], "arch": "xumx", "sources": list(networks)})
    for trunk, network in zip(bridged.trunks, networks.values()):
        trunk.load_state_dict(network.state_dict())
    return bridged


ARCHITECTURES = {"blstm": OpenUnmix, "xumx": XUMX}


def make_network(arch="blstm", **settings):
    """The network for training, fine-tuning, resuming and separating alike.

    Args:
        arch: its name in ARCHITECTURES.
        settings: the class's arguments; those that its constructor does not take are left out.
    Returns:
        The network; its attribute `made_with` is what makes the same one again.
    Raises:
        UserError: no such architecture.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"--arch {arch}: model.py has no such network, only {list(ARCHITECTURES)}")
    taken = arguments_of(ARCHITECTURES[arch])
    settings = {key: value for key, value in settings.items() if key in taken}
    for argument in inspect.signature(ARCHITECTURES[arch]).parameters.values():
        if isinstance(argument.default, int | float | str | list | tuple):  # as it is today
            settings.setdefault(argument.name, argument.default)
    network = ARCHITECTURES[arch](**settings)
    network.made_with = {"arch": arch, **settings}
    return network


def arguments_of(network_class):
    """What a class's constructor takes, its parents' arguments too where it hands **kwargs on."""
    names = set()
    for parent in network_class.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(parent.__init__).parameters.values()
            names.update(parameter.name for parameter in parameters)
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                break
    return names


# ----------------------------------------------------------------------------------- Wiener filter

EPS = 1e-10  # regularisation, as in the published system (norbert takes it as an argument)


def wiener(magnitudes, mixture, niter=1):
    """Multichannel Wiener filter: from the sources' magnitudes to estimates that share the mixture.

    Each source is a Gaussian with a power per frame and bin and a spatial covariance per bin; EM
    alternates between estimating both and filtering. The algorithm is norbert's; but it always
    regularises relative to the loudest bin of each mixture, so that quiet music loses nothing, and
    covariances are in double precision, because the channels of near-mono bins cancel in single.

    Args:
        magnitudes: (B, J, C, F, T) real, in the unit of the mixture.
        mixture: (B, C, F, T) complex STFT.
        niter: iterations of EM; 0 returns the initial estimates.
    Returns:
        (B, J, C, F, T) complex. Any device; differentiable.

    From: Duong, Vincent, Gribonval, "Under-determined reverberant audio source separation using a
    full-rank spatial covariance model", IEEE TASLP 18(7), 2010; Uhlich et al., ICASSP 2017.
    """
    device = precise(mixture.device)
    if device != mixture.device:
        return wiener(magnitudes.to(device), mixture.to(device), niter).to(mixture.device)
    level = mixture.abs().amax((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    gradients = magnitudes.requires_grad or mixture.requires_grad
    alone = not (torch.is_grad_enabled() and gradients)
    if FAST and niter and mixture.device.type == "cpu" and alone:
        return wiener_on_cpu(magnitudes, mixture, niter, level)
    estimates = magnitudes * mixture.sgn()[:, None]  # sgn(X) is exp(i angle(X)), or 0 where X is 0
    return expectation_maximization(estimates, mixture, niter, level) if niter else estimates


def ratio_mask(V):
    """The share of each source in the sum of all: (B, J, C, F, T) -> (B, J, C, F, T), 0 to 1."""
    return V / V.sum(1, keepdim=True).clamp_min(torch.finfo(V.dtype).tiny)


def expectation_maximization(Y, X, niter=1, level=None):
    """Improve estimates Y (B, J, C, F, T) of the sources of X (B, C, F, T) `niter` times.

    level: (B, 1, 1, 1), the loudest magnitude of X (found where not given), which EPS is relative
    to (norbert scales X to 10 instead).
    """
    level = X.abs().amax((1, 2, 3), keepdim=True) if level is None else level
    unit = (level / 10).clamp_min(1e-15).square()  # of power
    x = X.movedim(2, 1).contiguous()  # (B, F, C, T)
    y = Y.movedim(3, 1).contiguous()  # (B, F, J, C, T)
    share = filter_stereo if FAST and x.shape[2] == 2 else filter_sources
    for _ in range(niter):
        v = (y.real.square() + y.imag.square()).mean(-2) / unit  # power of each source (B, F, J, T)
        total = EPS + v.sum(-1, dtype=torch.float64)  # over time (B, F, J)
        y = y.to(torch.complex128)
        R = y @ y.mH / (unit * total.unsqueeze(-1)).unsqueeze(-1)  # covariance (B, F, J, C, C)
        y = share(v, R, x, EPS**0.5)  # (B, F, J, C, T)
    return y.movedim(1, 3)  # (B, J, C, F, T)


def filter_sources(v, R, x, ridge):
    """Each source's share of the mixture: y_j = v_j R_j (sum over l of v_l R_l + ridge I)^-1 x.

    Args:
        v: (B, F, J, T) powers. R: (B, F, J, C, C) covariances, in double precision.
        x: (B, F, C, T) mixture. ridge: keeps the inverse finite.
    Returns:
        (B, F, J, C, T) in the mixture's dtype.
    """
    v, identity = v.double(), torch.eye(x.shape[2], dtype=R.dtype, device=R.device)
    Cxx = torch.einsum("bfjt,bfjcd->bftcd", v.to(R.dtype), R) + ridge * identity  # (B, F, T, C, C)
    z = torch.linalg.solve(Cxx, x.mT.to(R.dtype))  # (B, F, T, C)
    return (v.unsqueeze(3) * torch.einsum("bfjcd,bftd->bfjct", R, z)).to(x.dtype)


def norbert_wiener(magnitudes, mixture, niter=1):
    """`wiener` by norbert, for comparison: several times slower."""
    import norbert

    Y = []
    # its axes are (T, F, C, J); it scales its input in place
    for V, X in zip(magnitudes.cpu(), mixture.cpu()):
        v, x = V.permute(3, 2, 1, 0).double(), X.permute(2, 1, 0).to(torch.complex128, copy=True)
        y = norbert.wiener(v.numpy(), x.numpy(), niter, use_softmask=False, eps=EPS)
        Y.append(torch.from_numpy(y).permute(3, 2, 1, 0))  # (J, C, F, T)
    return torch.stack(Y).to(mixture)


# -------------------------------------------------------------------------------------- separation


class Separator(nn.Module):
    """Separates waveforms: STFT, one network per target, Wiener filter, inverse STFT.

    Args:
        target_models: {target: network}. A network for several sources names them in `.sources`.
        niter: iterations of the Wiener filter's EM; 0 keeps the mixture's phase. A single target
            without `residual` has nothing to be told apart from: it is masked only.
        softmask: initial estimates as shares of the mixture rather than the networks' magnitudes.
        residual: add a source, named "residual" or by this string: the mixture less all targets.
        wiener_win_len: frames over which sources are taken to stay where they are; None for all.
        sample_rate, n_fft, n_hop: of the waveforms and their STFT, as in training.
        nb_channels: C of the networks; None: what they say in `.nb_channels`, else 2.

    `.targets` names the J axis. Networks for one channel see the mean of both channels' magnitudes
    and mask both alike; those for two get a mono mixture on both, and one channel is returned.
    """

    def __init__(
        self,
        target_models,
        niter=1,
        softmask=False,
        residual=False,
        wiener_win_len=300,
        sample_rate=44100,
        n_fft=4096,
        n_hop=1024,
        nb_channels=None,
    ):
        super().__init__()
        self.names, self.networks = list(target_models), nn.ModuleList(target_models.values())
        self.targets = []
        for target, network in target_models.items():
            self.targets += getattr(network, "sources", None) or [target]
        self.estimated, self.rows = [*self.targets], slice(None)  # all; `select` keeps some
        self.residual = False
        if residual:
            self.add_residual(residual)
        if len(set(self.targets)) < len(self.targets):
            raise UserError(f"two stems have the same name: {', '.join(self.targets)}")
        self.niter, self.softmask, self.wiener_win_len = niter, softmask, wiener_win_len
        self.sample_rate, self.n_fft, self.n_hop = sample_rate, n_fft, n_hop
        self.nb_channels = nb_channels or getattr(self.networks[0], "nb_channels", 2)
        self.amp = False  # networks in bfloat16
        self.wiener = wiener

    @property
    def target_models(self):
        return dict(zip(self.names, self.networks))

    def select(self, targets):
        """Keep these of the targets, in this order: the Wiener filter knows of no others."""
        kept, residual = list(targets), self.targets[len(self.targets) - self.residual :]
        if kept + residual != self.targets:
            self.rows = [self.estimated.index(target) for target in kept]
            self.targets = kept + residual

    def add_residual(self, name=True):
        """Let what no network claims be one more source."""
        name = "residual" if name is True else name
        if name in self.targets:
            raise UserError(f"--residual {name}: a target has this name; choose another")
        if name == "accompaniment" and self.targets != ["vocals"]:
            raise UserError(f"--residual {name}: is all but vocals, and no other; choose another")
        self.residual = True
        self.targets.append(name)

    def forward(self, audio):
        """Waveforms (B, C, N) -> estimates (B, J, C, N); all of it in memory (see `stream`)."""
        x = audio.expand(-1, max(audio.shape[1], self.nb_channels), -1)  # (B, C, N)
        X = stft(x, self.n_fft, self.n_hop)  # (B, C, F, T)
        x = magnitude(X, self.nb_channels)
        with self.precision(audio.device):
            V = [network(x) for network in self.networks]  # (B, K * C, F, T) each
        V = self.stack(V)  # (B, J, C, F, T)
        size = self.wiener_win_len or X.shape[-1]
        windows = zip(V.split(size, -1), X.split(size, -1))
        Y = torch.cat([self.filter(v, x) for v, x in windows], dim=-1)  # (B, J, C, F, T)
        return istft(Y, audio.shape[-1], self.n_fft, self.n_hop)[:, :, : audio.shape[1]]

    def stream(self, audio):
        """Separate a recording of any length; see the function `stream`."""
        return stream(self, audio)

    def precision(self, device):
        """The context in which networks compute: with `.amp` bfloat16, where the device has it."""
        enabled = self.amp and has_bfloat16(device)
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def stack(self, estimates):
        """What each network estimates, (B, K * C, F, T) -> that of all (B, J, C, F, T)."""
        V = [v.float() if self.amp else v for v in estimates]
        V = [v.permute(3, 0, 1, 2).unflatten(2, (-1, self.nb_channels)) for v in V]  # T first, as
        V = torch.cat(V, dim=2)  # in memory: (T, B, J, C, F)
        if V.shape[2] != len(self.estimated):
            raise UserError(f"the networks estimate {V.shape[2]} sources, not {self.estimated}")
        return V[:, :, self.rows].permute(1, 2, 3, 4, 0)  # (B, J, C, F, T)

    def filter(self, V, X):
        """One window: magnitudes V (B, J, C, F, T), mixture X (B, C, F, T) -> (B, J, C, F, T)."""
        V = V.expand(-1, -1, X.shape[1], -1, -1)  # a mono network's mask is every channel's
        if self.softmask:
            V = ratio_mask(V) * X.abs()[:, None]
        if self.residual:
            V = torch.cat([V, X.abs()[:, None] - V.sum(1, keepdim=True)], dim=1)
        return self.wiener(V, X, self.niter if V.shape[1] > 1 else 0)

    def fingerprint(self):
        """A digest of all that decides the estimates: weights, settings, device and precision."""
        digest = hashlib.blake2b(code_of(self.wiener).encode(), digest_size=16)
        plain = int | float | str | tuple | list | dict
        for module in self.modules():
            known = {name: value for name, value in vars(module).items() if name[0] != "_"}
            for name, value in known.items():
                if isinstance(value, plain) or inspect.isroutine(value):
                    digest.update(repr((name, compiled(value))).encode())
        for kind in dict.fromkeys(map(type, self.modules())):
            digest.update(code_of(kind).encode())
        for name, value in self.state_dict().items():
            digest.update(f"{name} {value.device.type}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


# ----------------------------------------------------------------------------------- model folders

MUSIC = {"sample_rate": 44100, "nfft": 4096, "nhop": 1024, "nb_channels": 2}
SPEECH = {"sample_rate": 16000, "nfft": 1024, "nhop": 512, "nb_channels": 1}
# The published weights: Zenodo record, files (the hex digits start their SHA-256), settings.
PUBLISHED = {
    "umx": (3370486, "vocals-c8df74a5 drums-5a48008b bass-646024d3 other-f8e132cc", MUSIC),
    "umxhq": (3370489, "vocals-b62c91ce drums-9619578f bass-8d85a5bd other-b52fbbf7", MUSIC),
    "umxl": (5069601, "vocals-bccbd9aa drums-69e0ebd4 bass-2ca1ce51 other-c8c5b3e6", MUSIC),
    "umxse": (3786908, "speech_f5e0d9f9 noise_04a6fc2d", SPEECH),
}
ZENODO = "https://zenodo.org/records/{record}/files/{name}.pth"
LICENCES = {"umxl": "umxl: weights under CC BY-NC-SA 4.0: not for commercial use"}
# What a model folder's settings may be: whole numbers between these two.
RANGES = {
    "sample_rate": (1000, 1_000_000),
    "nfft": (16, 1 << 20),
    "nhop": (1, 1 << 19),
    "nb_channels": (1, 2),
    "nb_bins": (9, 1 << 20),
    "max_bin": (1, 1 << 20),
    "hidden_size": (2, 1 << 16),
    "nb_layers": (1, 100),
}


def load_separator(
    model="umxl",
    targets=None,
    niter=1,
    softmask=False,
    residual=False,
    wiener_win_len=300,
    device="cpu",
):
    """Load a separator, ready to use: `stems = load_separator("umxl")(audio)`.

    Args:
        model: published weights by name (umx, umxhq, umxl, umxse; fetched once), a model folder
            made by train.py or by openunmix, or an ONNX file of `export_onnx`.
        targets: which of its targets, or of the sources of a joint network; None for all.
        niter, softmask, residual, wiener_win_len: see Separator.
        device: where it computes.
    Returns:
        Separator in evaluation mode: waveforms (B, C, N) -> (B, J, C, N), `.targets` names J.
    Raises:
        UserError: no such model or target, files that are damaged or do not fit, no network.
    """
    targets = [targets] if isinstance(targets, str) else targets
    folder = Path(model)
    if str(model) in PUBLISHED and not (folder / "separator.json").is_file():
        networks, settings = load_published(str(model), targets, device)
    elif folder.suffix == ".onnx" and not folder.is_dir():
        networks, settings = load_onnx(folder, targets)
    else:
        networks, settings = load_folder(folder, targets, device)
    stft_settings = {"n_fft": settings["nfft"], "n_hop": settings["nhop"]}
    others = {key: settings[key] for key in ("sample_rate", "nb_channels")}
    separator = Separator(
        networks, niter, softmask, False, wiener_win_len, **stft_settings, **others
    )
    if targets:  # a network's name stands for all that it estimates
        parts = (getattr(networks.get(target), "sources", None) or [target] for target in targets)
        separator.select(dict.fromkeys(itertools.chain(*parts)))
    if residual:
        separator.add_residual(residual)
    return separator.to(device).eval()


def load_published(model, targets=None, device="cpu"):
    """({target: network}, settings): weights kept in torch hub's folder, checked by SHA-256."""
    record, names, settings = PUBLISHED[model]
    names = {name[:-9]: name for name in names.split()}  # without dash and eight hex digits
    networks = {}
    for target in choose_targets(model, targets, list(names)):
        path = Path(torch.hub.get_dir(), "checkpoints", f"{names[target]}.pth")
        known = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        if not (known and known.startswith(names[target][-8:])):
            url = ZENODO.format(record=record, name=names[target])
            download(url, path, sha256_start=names[target][-8:])
        networks[target] = load_network(path, None, settings, device)
    if model in LICENCES:
        print(LICENCES[model])
    return networks, settings


def load_folder(folder, targets=None, device="cpu"):
    """({target: network}, settings) of a model folder; errors as load_separator."""
    path = folder / "separator.json"
    if not path.is_file():
        what = "has no separator.json: it is not a model folder" if folder.is_dir() else "no such"
        what += "" if folder.is_dir() else " model or folder"
        hint = f"train one (python train.py) or use {', '.join(PUBLISHED)}"
        raise UserError(f"{folder}: {what}; {hint}")
    settings = check_settings(path, load(path), MUSIC)
    weights = {}  # vocals.pth, or as published vocals-<8 hex digits>.pth
    files = sorted(file for file in folder.glob("*.pth") if not file.name.startswith("."))
    for file in files:
        for target in (re.sub("[-_][0-9a-f]{8}$", "", file.stem), file.stem):
            if (folder / f"{target}.json").is_file() and (
                target == file.stem or target not in weights
            ):
                weights[target] = file
    order = [*SOURCES, *sorted(weights.keys() - set(SOURCES))]
    networks, files = {}, [name for name in order if name in weights]
    available, joint = [*files], files and not set(targets or []) <= set(files)
    # what has no file of its own may be one of a joint network's sources
    for name in files if joint else choose_targets(folder, targets, files):
        network = load_network(weights[name], folder / f"{name}.json", settings, device)
        sources = getattr(network, "sources", None) or []
        available += sources
        if not joint or {name, *sources} & set(targets):
            networks[name] = network
    if joint:
        choose_targets(folder, targets, available)
    return networks, settings


def choose_targets(model, wanted, available):
    for target in wanted or available[:1] or ["vocals"]:
        if target not in available:
            has = ", ".join(available) or "none yet; train it first: python train.py"
            raise UserError(f"{model}: has no target {target!r}; it has {has}")
    return list(dict.fromkeys(wanted or available))


def load_network(path, record_path, settings, device="cpu"):
    """A network in evaluation mode with the weights of a .pth file, which must fit exactly.

    Where its record does not say how the network was made, as in a published folder (or where
    there is none), the weights' shapes do.
    """
    state = load(path, device)
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path}: holds no weights; replace it")
    record = load(record_path) if record_path else {"args": {}}
    if not isinstance(record, dict):
        raise UserError(f"{record_path}: is no JSON object; train the model again")
    args = record.get("args")
    for key in MUSIC.keys() & (args if isinstance(args, dict) else {}):
        if args[key] is not None and args[key] != settings[key]:
            says = f"was trained with {key} {args[key]}, separator.json says {settings[key]}"
            raise UserError(f"{record_path}: {says}; keep it in a folder of its own")
    made_with = record.get("network")
    if made_with is None:
        state = {name: value for name, value in state.items() if name not in OLD_BUFFERS}
        made_with = read_shapes(path, state, record, record_path, settings)
    if isinstance(made_with, dict) and made_with.get("max_bin", 0) is None:
        made_with = {key: value for key, value in made_with.items() if key != "max_bin"}
    made_with = check_settings(record_path, made_with)
    wanted = {"nb_bins": settings["nfft"] // 2 + 1, "nb_channels": settings["nb_channels"]}
    for name, value in wanted.items():
        if made_with.get(name, value) != value:
            raise UserError(f"{path}: was made for {name} {made_with[name]}, not {value}")
    network = make_network(**made_with)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:30])
        raise UserError(f"{path}: does not fit its settings: {reason}") from None
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} has NaN or infinite values; train it again")
    network.to(device).eval()
    before = record.get("output_sample")  # published weights have none
    if before and not is_close(before, output_sample(network, **wanted)):
        print(f"{path}: model.py gives other numbers than in training: restore it, or train again")
    return network


def is_close(before, now):
    """Whether the numbers of a record are these to 1 %, which is more than processors differ by."""
    before = np.array(before, dtype=object).ravel()
    if not all(isinstance(number, int | float) for number in before) or len(before) != len(now):
        return False
    before = before.astype(float)
    return np.linalg.norm(now - before) <= 0.01 * np.linalg.norm(before)


@torch.no_grad()
def output_sample(network, nb_bins, nb_channels):
    """64 values of a network's output for noise, by which a class that was changed is noticed."""
    x = torch.rand(1, nb_channels, nb_bins, 64, generator=torch.Generator().manual_seed(0))
    device = next(itertools.chain(network.parameters(), network.buffers(), [x])).device
    y = network(100 * x.to(device) ** 4)  # (1, K * C, F, T)
    numbers = y.float().flatten()
    return numbers[:: max(1, len(numbers) // 63)].tolist()


OLD_BUFFERS = {"stft.window", "transform.0.window", "sample_rate"}  # in the oldest published files


def read_shapes(path, state, record, record_path, settings):
    """How the network of published weights is made; a record without a mask means ReLU."""
    args = record.get("args", {})
    if not isinstance(args, dict):
        raise UserError(f"{record_path}: args is no JSON object; train the model again")
    if not {"input_mean", "fc2.weight"} <= state.keys():
        raise UserError(f"{path}: lacks input_mean or fc2.weight: not an Open-Unmix network")
    return {
        "arch": args.get("arch", "blstm"),
        "nb_bins": settings["nfft"] // 2 + 1,
        "nb_channels": settings["nb_channels"],
        "hidden_size": state["fc2.weight"].shape[0],
        "nb_layers": sum(re.fullmatch(r"lstm\.weight_ih_l\d+", name) is not None for name in state),
        "unidirectional": bool(args.get("unidirectional")),
        "max_bin": state["input_mean"].shape[0],
        "mask": args.get("mask", "relu"),
    }


def check_settings(path, values, needed=()):
    """The settings of a JSON file with whole numbers within RANGES; `needed` ones must be there."""
    if not isinstance(values, dict):
        raise UserError(f"{path}: is no JSON object, or has none in it; train the model again")
    values = {**dict.fromkeys(needed), **values}
    for key in values.keys() & RANGES.keys():
        (low, high), value = RANGES[key], values[key]
        whole = isinstance(value, int | float) and not isinstance(value, bool)
        if not (whole and low <= value <= high and value == int(value)):
            must = f"must be a whole number from {low} to {high}"
            raise UserError(f"{path}: {key} is {value!r} and {must}; train the model again")
        values[key] = int(value)
    if values.get("nhop", 0) > values.get("nfft", 1 << 20) // 2:
        raise UserError(f"{path}: nhop is more than half of nfft; train the model again")
    if not isinstance(values.get("unidirectional", False), bool):
        found = repr(values["unidirectional"])
        raise UserError(f"{path}: unidirectional is {found}, not true or false")
    start, dropout = values.get("mask_start"), values.get("dropout", 0)
    if start is not None and not (isinstance(start, float) and 0 < start < 1):
        raise UserError(f"{path}: mask_start is {start!r}, not between 0 and 1")
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise UserError(f"{path}: dropout is {dropout!r}, not from 0 to below 1")
    for key, table in (("arch", ARCHITECTURES), ("mask", MASKS)):
        if key in values and values[key] not in list(table):
            raise UserError(f"{path}: {key} is {values[key]!r}; model.py has {', '.join(table)}")
    return values


def separator_from_flags(args):
    """The separator that the flags of test.py and eval.py ask for (utils.add_separation_flags)."""
    device, window = select_device(args.device), args.wiener_win_len or None
    settings = args.niter, args.softmask, args.residual, window
    separator = load_separator(args.model, args.targets, *settings, device)
    if len(separator.targets) == 1:  # one target's counterpart is all the rest
        rest = "accompaniment" if separator.targets == ["vocals"] else "residual"
        separator.add_residual(rest)
    if args.amp and any(isinstance(network, OnnxNetwork) for network in separator.networks):
        raise UserError(f"--amp: {args.model} computes as it was written; leave --amp out")
    separator.amp = use_amp(args.amp, device)
    if args.wiener == "norbert":
        separator.wiener = norbert_wiener
    return separator


def aggregation(targets, text=None):
    """--aggregate's JSON as {stem name: targets to sum}; without it each target by itself."""
    if text is None:
        return {target: [target] for target in targets}
    try:
        sums = json.loads(text)
        if not sums or not all(isinstance(parts, list) and parts for parts in sums.values()):
            raise ValueError("not an object of lists")
    except (ValueError, AttributeError, RecursionError) as error:
        example = '{"rest": ["drums", "bass"]}'
        raise UserError(f"--aggregate: is not JSON such as {example} ({error})") from None
    for stem, parts in sums.items():
        check_name(stem, "--aggregate:")
        for target in parts:
            if target not in targets:
                raise UserError(f"--aggregate: unknown target {target!r}; there are {targets}")
        if len(set(parts)) < len(parts):
            raise UserError(f"--aggregate: {stem} is to have a target twice: {', '.join(parts)}")
    return sums


def sum_targets(estimates, targets, sums):
    """Estimates (J, C, n) of `targets` -> {stem name: (C, n)}, as `aggregation` says."""
    by_name = dict(zip(targets, estimates))
    return {stem: sum(by_name[target] for target in parts) for stem, parts in sums.items()}


# ------------------------------------------------------------------------------- ONNX, elsewhere


def import_onnx():
    """The packages that only ONNX files need. Raises UserError where they are missing."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it reports to Microsoft
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        missing = f"ONNX files need packages that are not here ({error})"
        raise UserError(f"{missing}: pip install onnx onnxruntime") from None
    return onnx, onnxruntime


def export_onnx(separator, path):
    """Write all networks of a separator as one ONNX file, for other runtimes and `load_separator`.

    Its input "magnitudes" is (1, C, F, T), its output "estimates" (1, J * C, F, T), T is free; the
    metadata holds, as JSON, "targets", which names J, and "sample_rate", "nfft", "nhop" and
    "nb_channels". Before it is written, onnxruntime must give what the networks give at two T.

    Raises:
        UserError: packages are missing; a network can't be written, or for one T only.
    """
    onnx, _ = import_onnx()
    network, size = SideBySide(separator.networks).eval(), separator.n_fft // 2 + 1
    axes, buffer = {3: "T"}, io.BytesIO()
    names = {"input_names": ["magnitudes"], "output_names": ["estimates"]}
    names["dynamic_axes"] = {"magnitudes": axes, "estimates": axes}
    try:
        with warnings.catch_warnings():  # of one T for ever: that is tried below
            warnings.simplefilter("ignore")
            x = torch.rand(1, separator.nb_channels, size, 30)
            torch.onnx.export(network, (x,), buffer, dynamo=False, **names)
        graph = onnx.load_model_from_string(buffer.getvalue())
        settings = {"sample_rate": separator.sample_rate, "nhop": separator.n_hop}
        settings |= {"nfft": separator.n_fft, "nb_channels": separator.nb_channels}
        settings["targets"] = separator.targets[: len(separator.targets) - separator.residual]
        onnx.helper.set_model_props(graph, {key: json.dumps(settings[key]) for key in settings})
        content = graph.SerializeToString()
        exported = OnnxNetwork(content)
        for frames in (50, 333):
            x = torch.rand(1, separator.nb_channels, size, frames)
            with torch.no_grad():
                expected, found = network(x), exported(x)
            error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-9)
            if not error <= 1e-4:
                raise ValueError(f"for {frames} frames it is {error:.1e} from the network")
    except (RuntimeError, ValueError, *onnx_errors()) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: this network can't be written as ONNX: {reason}") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


class SideBySide(nn.Module):
    """Networks as one, (B, C, F, T) -> (B, J * C, F, T): what an ONNX file holds."""

    def __init__(self, networks):
        super().__init__()
        self.networks = networks

    def forward(self, x):
        return torch.cat([network(x) for network in self.networks], dim=1)


class OnnxNetwork(nn.Module):
    """The network of an ONNX file, by onnxruntime on the CPU; it estimates its `.sources`.

    In a separator's fingerprint the SHA-256 of the file's bytes `content` stands for its weights.
    """

    def __init__(self, content):
        super().__init__()
        options = import_onnx()[1].SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        options.enable_cpu_mem_arena = False  # which would double the memory of a long recording
        runtime = import_onnx()[1].InferenceSession
        self.session = runtime(content, options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.settings = {key: json.loads(metadata[key]) for key in (*MUSIC, "targets")}
        self.sources = self.all_sources = tuple(self.settings["targets"])
        digest = hashlib.sha256(content).digest()
        self.register_buffer("sha256", torch.tensor(list(digest), dtype=torch.uint8))

    def forward(self, x):
        """(B, C, F, T) magnitudes of the mixture -> (B, K * C, F, T) of the K sources."""
        if torch.jit.is_tracing() or (torch.is_grad_enabled() and x.requires_grad):
            raise UserError("an ONNX file gives no gradients or files; take its model folder")
        name = self.session.get_inputs()[0].name
        examples = x.detach().float().cpu().contiguous().split(1)  # it takes one at a time
        y = [self.session.run(None, {name: example.numpy()})[0] for example in examples]
        y = [torch.from_numpy(estimates).to(x.device) for estimates in y]
        y = torch.cat(y) if len(y) > 1 else y[0]  # without a copy of what may be half a gigabyte
        if self.sources != self.all_sources:
            chosen = [self.all_sources.index(source) for source in self.sources]
            y = y.unflatten(1, (len(self.all_sources), -1))[:, chosen].flatten(1, 2)
        return y


def onnx_errors():
    """What onnxruntime raises: its exceptions have no class in common."""
    kinds = vars(import_onnx()[1].capi.onnxruntime_pybind11_state).values()
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))


def load_onnx(path, targets=None):
    """({name: network}, settings) of a file that `export_onnx` wrote; errors as load_separator."""
    import_onnx()
    if not path.is_file():
        raise UserError(f"{path}: no such file; python test.py --export {path} makes one")
    try:
        network = OnnxNetwork(path.read_bytes())
        [shape] = [value.shape for value in network.session.get_inputs()]
    except (*onnx_errors(), LookupError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: is no ONNX file by test.py --export ({reason})") from error
    settings = check_settings(path, network.settings, MUSIC)
    for source in network.sources:
        check_name(source, f"{path}:")
    wanted = [1, settings["nb_channels"], settings["nfft"] // 2 + 1]
    if shape[:3] != wanted or len(shape) != 4 or isinstance(shape[3], int):
        raise UserError(f"{path}: takes {shape}, not {[*wanted, 'T']}; export the model again")
    network.sources = tuple(choose_targets(path, targets, network.sources))
    return {path.stem: network}, settings


# ------------------------------------------------------------------------ recordings of any length

LONG = 15_000  # frames that a network without stages sees at once: 6 minutes, 0.5 GB a spectrogram
WINDOWS = (8, 2)  # beyond: Wiener windows at a time, and those of context to either side


@torch.inference_mode()
def stream(separator, audio, block=300):
    """Separate a recording of any length, block by block: the same estimates as `forward`.

    Only the LSTM needs the whole song. Networks that offer `encode`, `recur` and `decode`, and
    whose forward is their composition, run in these stages: the first pass over the audio encodes
    blocks of frames; then `recur` sees the whole recording; the second pass decodes and filters one
    Wiener window at a time. Only (T, H) per target stays in memory. Any other network sees the
    recording in one piece, or, beyond LONG frames, in overlapping windows, and a line says so.

    Args:
        audio: iterable over blocks (C, n) of one waveform; it is iterated over up to twice.
        block: frames at a time in the first pass.
    Yields:
        blocks (J, C, n) that join to the estimates.
    """
    tensors = separator.parameters(), separator.buffers(), [torch.zeros(0)]
    device = next(itertools.chain(*tensors)).device
    for in_stages in (True, False):
        if same_as_plain(separator, in_stages, device):
            yield from stream_blocks(separator, audio, block, in_stages, device)
            return
    tqdm.write("forward gives other numbers than its fast forms: separated by it, in one piece")
    with patched(sys.modules[__name__], "FAST", False):
        stems = separator(torch.cat([*audio], dim=-1)[None].to(device))[0]
    yield stems


def stream_blocks(separator, audio, block, in_stages, device):
    """`stream` by the fast forms of Separator.forward and of what it calls."""
    networks, heard = separator.networks, {}
    nb_channels, n_fft, n_hop = separator.nb_channels, separator.n_fft, separator.n_hop

    def spectra(frames):
        heard["length"] = 0

        def blocks():
            for x in audio:
                heard["channels"] = x.shape[0]
                heard["length"] += x.shape[1]
                x = x.to(device, non_blocking=True)
                yield x.expand(max(x.shape[0], nb_channels), -1)[None]  # (1, C, n)

        return stft_blocks(blocks(), frames, n_fft, n_hop)

    def for_each(compute, *inputs):
        with separator.precision(device):
            return [compute(*item) for item in zip(*inputs)]

    def staged():
        hidden, length = [torch.empty(0) for _ in networks], 0  # (T, 1, H) each, with room to grow
        for X in spectra(block):
            x, start, length = magnitude(X, nb_channels), length, length + X.shape[-1]
            for j, h in enumerate(for_each(lambda net: net.encode(x), networks)):
                if len(hidden[j]) < length:
                    hidden[j] = hidden[j].to(h).resize_(2 * length, *h.shape[1:])
                hidden[j][start:length] = h
        hidden = for_each(lambda net, h: net.recur(h[:length]), networks, hidden)  # (T, 1, H)
        window, position = separator.wiener_win_len or length, 0
        for X in spectra(window):
            x, part = magnitude(X, nb_channels), slice(position, position + X.shape[-1])
            position = part.stop
            yield for_each(lambda net, h: net.decode(h[part], x), networks, hidden), X

    def whole():
        window = separator.wiener_win_len or 1 << 40
        for X, part in regroup(spectra(window), LONG):
            x = magnitude(X, nb_channels)
            V = [v[..., part] for v in for_each(lambda net: net(x), networks)]
            X = X[..., part]
            for start in range(0, X.shape[-1], window):
                now = slice(start, start + window)
                yield [v[..., now] for v in V], X[..., now]

    run = staged if in_stages else whole
    estimates = (separator.filter(separator.stack(V), X) for V, X in run())  # (1, J, C, F, T)
    for stems in istft_blocks(estimates, lambda: heard["length"], n_fft, n_hop):
        yield stems[0, :, : heard["channels"]]


def regroup(spectra, long):
    """Spectra (..., t) -> what a network without stages is to see at once, and which part is new.

    Everything, or, when there is more than `long` frames, windows with context around each.
    """
    core, context = WINDOWS
    pieces, before, is_long = [], 0, False
    for X in spectra:
        pieces.append(X)
        is_long = is_long or sum(piece.shape[-1] for piece in pieces) > long
        while is_long and len(pieces) >= before + core + context:
            if not before:
                why = "the network has no stages and the recording is long"
                tqdm.write(f"{why}: separated in windows")
            start = sum(piece.shape[-1] for piece in pieces[:before])
            stop = start + sum(piece.shape[-1] for piece in pieces[before : before + core])
            yield torch.cat(pieces[: before + core + context], dim=-1), slice(start, stop)
            del pieces[: before + core - context]
            before = context
    start = sum(piece.shape[-1] for piece in pieces[:before])
    yield torch.cat(pieces, dim=-1), slice(start, None)


def stft_blocks(audio, frames, n_fft=4096, n_hop=1024):
    """`stft` of a waveform that arrives in blocks (..., n): yields (..., F, `frames`) or less.

    Frames come as soon as all their samples are there.
    """
    context = n_fft // 2 // n_hop + 1  # frames that a frame shares samples with, on its left
    reach = n_fft - n_fft // 2 - n_hop  # samples that a block's last frame sees beyond its hop
    x, before = [], 0  # blocks from frame -before on
    for block in itertools.chain(audio, [None]):
        x = [*x, block] if block is not None else x
        if not x:
            raise UserError("the recording has no samples")
        size = max(n_fft // 2 + 1, (before + frames) * n_hop + reach)
        if block is not None and sum(part.shape[-1] for part in x) < size:
            continue
        x = torch.cat(x, dim=-1)
        while block is not None and x.shape[-1] >= size:
            yield stft(x[..., :size], n_fft, n_hop)[..., before : before + frames]
            x = x[..., max(0, before + frames - context) * n_hop :]
            before = min(before + frames, context)
            size = max(n_fft // 2 + 1, (before + frames) * n_hop + reach)
        x = [x]
    yield from stft(x[0], n_fft, n_hop)[..., before:].split(frames, -1)


def istft_blocks(spectra, length, n_fft=4096, n_hop=1024):
    """Inverse of `stft_blocks`: spectra (..., F, t) in turn -> finished samples (..., n).

    `length()` tells N when the last spectrum has come, and before that no less than is due. Three
    times as fast as torch.istft, which is a tenth of a separation.
    """
    overlap = (-(-n_fft // n_hop) - 1) * n_hop
    position, tails = -(n_fft // 2), (0, 0)
    for X in spectra:
        hops = X.shape[-1] * n_hop
        window = stft_window(n_fft, X.real)
        frames = torch.fft.irfft(X.mT, n=n_fft)  # (..., T, n_fft)
        weights = window.expand(X.shape[-1], -1)
        sums = overlap_add(frames, window, n_hop), overlap_add(weights, window, n_hop)
        for samples, tail in zip(sums, tails):  # the signal, and what to divide it by
            samples[..., :overlap] += tail
        tails = [samples[..., hops:] for samples in sums]
        done = slice(max(0, -position), min(length() - position, hops))
        yield sums[0][..., done] / sums[1][done]
        position += hops
    if position < length():
        done = slice(max(0, -position), length() - position)
        yield tails[0][..., done] / tails[1][done]


def overlap_add(frames, window, n_hop):
    """Sum of windowed frames (..., T, n_fft), each n_hop samples after the one before: (..., N)."""
    nb_frames, steps = frames.shape[-2], -(-len(window) // n_hop)
    sums = frames.new_zeros(*frames.shape[:-2], nb_frames + steps - 1, n_hop)
    for step in range(steps):  # the same part of all frames at a time: no two of them meet
        part = slice(step * n_hop, (step + 1) * n_hop)
        target = sums[..., step : step + nb_frames, : len(window[part])]
        target.addcmul_(frames[..., part], window[part])
    return sums.flatten(-2)  # (..., N)


# --------------------------------------------------- fast forms, measured by benchmarks/tricks.py

FAST = True  # False: the plain forms everywhere, which decide what is right


@torch.inference_mode()
def same_as_plain(separator, in_stages, device):
    """Whether a stream of noise, by fast forms, is what `forward` gives by the plain ones.

    It is not where a plain form, or `forward` itself, was changed; nor, in stages, where networks
    have none or their forward is not the composition of these.
    """
    if in_stages and not all(map(has_stages, separator.networks)):
        return False
    if "forward" in vars(separator) or type(separator).forward is not FORWARD:
        return False
    module, window = sys.modules[__name__], separator.wiener_win_len and 7
    shape = max(2, separator.nb_channels), 12 * separator.n_hop
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = (noise * torch.linspace(0.01, 0.1, shape[1])).to(device)  # what adapts to levels shows
    with (
        torch.random.fork_rng([]),
        patched(separator, "amp", False),
        patched(separator, "wiener_win_len", window),
    ):
        torch.manual_seed(0)
        found = torch.cat([*stream_blocks(separator, [noise], 7, in_stages, device)], dim=-1)
        with patched(module, "FAST", False):
            torch.manual_seed(0)
            expected = separator(noise[None])[0]
    return found.shape == expected.shape and (found - expected).norm() <= 1e-4 * expected.norm()


FORWARD = Separator.forward


def has_stages(network):
    """Whether a network has the stages, and no `forward` that was put over theirs alone."""

    def depth(name):  # 0: the class's own, 1: its parent's, ...
        return next((n for n, k in enumerate(type(network).__mro__) if name in vars(k)), 0)

    stages = ("encode", "recur", "decode")
    offers = all(callable(getattr(network, stage, None)) for stage in stages)
    over = "forward" in vars(network) or depth("forward") < min(map(depth, stages))
    return offers and not over


def is_plain(layer, kind):
    """Whether a fast form may replace a layer: it is no subclass, and nobody listens to it.

    An ONNX file gets the plain forms: traced, most fast ones would hold for one T only.
    """
    hooks = [layer._forward_hooks, layer._forward_pre_hooks, "forward" in vars(layer)]
    hooks += layer._backward_hooks, layer._backward_pre_hooks
    return FAST and type(layer) is kind and not (any(hooks) or torch.onnx.is_in_onnx_export())


def standardised_linear(linear, x, mean, scale):
    """linear((x + mean) * scale) of x (..., C, F), with mean and scale moved into the weights.

    An eighth of a training step: no copy of the spectrogram is made, and no gradient of one. With
    `scaled_batch_norm`, which does the same at the other end, a sixth.
    """
    if not is_plain(linear, nn.Linear) or linear.bias is not None:
        return linear(((x + mean) * scale).flatten(-2))
    weight = linear.weight.unflatten(1, x.shape[-2:]) * scale  # (H, C, F)
    rows = x.flatten(0, -3)  # (everything else, C, F)
    h = sum(F.linear(rows[:, c], weight[:, c]) for c in range(rows.shape[1]))
    return (h + (weight * mean).sum((1, 2))).unflatten(0, x.shape[:-2])  # (..., H)


def scaled_batch_norm(bn, y, scale, mean):
    """bn(y) * scale + mean of y (T, B, M * F) by F numbers each, moved into the layer's own."""
    usual = is_plain(bn, nn.BatchNorm1d) and bn.affine and bn.track_running_stats and bn.momentum
    if not usual:
        y = over_frames(bn, y).unflatten(-1, (-1, len(scale)))
        return (y * scale + mean).flatten(-2)
    bn.num_batches_tracked += bn.training
    repeats = y.shape[-1] // len(scale)
    scale, mean = scale.repeat(repeats), mean.repeat(repeats)
    numbers = bn.running_mean, bn.running_var, bn.weight * scale, bn.bias * scale + mean
    return F.batch_norm(y.flatten(0, 1), *numbers, bn.training, bn.momentum, bn.eps).view_as(y)


def in_blocks(function, *inputs, block=1024):
    """`function` of tensors (T, ...) that works frame by frame, on blocks of frames.

    What it needs in between then never exists for a whole recording: an hour takes 2 GB less.
    With gradients, which keep all of it anyway, and where frames prove to depend on others, it is
    called once.
    """
    if not FAST or torch.is_grad_enabled() or len(inputs[0]) <= block:
        return function(*inputs)
    few, more = (function(*(x[:size] for x in inputs)) for size in (block // 2, block))
    if not torch.allclose(few, more[: block // 2], rtol=1e-3, atol=1e-5):
        return function(*inputs)
    output = few.new_empty(len(inputs[0]), *few.shape[1:])
    for part, *parts in zip(*(x.split(block) for x in (output, *inputs))):
        part.copy_(function(*parts))
    return output


def run_lstm(lstm, h):
    """The output of the recurrent layer for h (T, B, H): that of `lstm(h)`.

    On a CPU and without gradients it takes a fraction of the memory: nn.LSTM makes room for the
    gates of all frames. Here each direction hands its state from block to block.
    """
    known = is_plain(lstm, nn.LSTM) and lstm.bias and not (lstm.proj_size or lstm.batch_first)
    if not known or lstm.training or torch.is_grad_enabled() or h.device.type != "cpu":
        return lstm(h)[0]
    directions = 1 + lstm.bidirectional
    for layer in range(lstm.num_layers):
        output = h.new_empty(*h.shape[:2], directions * lstm.hidden_size)
        for direction, outputs in enumerate(output.chunk(directions, -1)):
            weights = [w.to(h.dtype) for w in lstm.all_weights[layer * directions + direction]]
            state = [h.new_zeros(1, h.shape[1], lstm.hidden_size)] * 2
            blocks = list(zip(h.split(1024), outputs.split(1024)))
            for x, own in reversed(blocks) if direction else blocks:  # the second runs backwards
                x = x.flip(0) if direction else x
                y, *state = torch.lstm(x, state, weights, True, 1, 0.0, False, False, False)
                own.copy_(y.flip(0) if direction else y)
        h = output
    return h


def wiener_on_cpu(magnitudes, mixture, niter, level, bins=64):
    """`wiener` of 64 bins at a time, each block in a core's cache: several times as fast."""
    estimates = mixture.new_empty(magnitudes.mT.shape).mT  # (B, J, C, F, T)
    for b, start in itertools.product(range(len(mixture)), range(0, mixture.shape[2], bins)):
        b, f = slice(b, b + 1), slice(start, start + bins)
        # in memory (B, F, ..., T), as the filter works
        V = magnitudes[b, :, :, f].movedim(-2, 1).contiguous().movedim(1, -2)
        X = mixture[b, :, f].movedim(-2, 1).contiguous().movedim(1, -2)
        Y = V * X.sgn()[:, None]
        estimates[b, :, :, f] = expectation_maximization(Y, X, niter, level[b])
    return estimates


def filter_stereo(v, R, x, ridge):
    """`filter_sources` for two channels: several times as fast, and single precision is enough.

    A 2 x 2 inverse is adj / det. The ridge is one more source, equally loud everywhere. Then both
    are sums over pairs of sources, of R_j adj(R_l) and of half its trace. What cancels does so
    within these, once per bin and in double precision; det is a sum of positive terms.
    """
    identity = torch.eye(2, dtype=R.dtype, device=R.device)
    v = torch.cat([v, torch.full_like(v[:, :, :1], ridge)], dim=2)  # (B, F, J + 1, T)
    R = torch.cat([R, identity.expand_as(R[:, :, :1])], dim=2)  # (B, F, J + 1, C, C)
    adj = R.flip(-2, -1).mT * (2 * identity.real - 1)  # [[a, b], [c, d]] -> [[d, -b], [-c, a]]
    pairs = torch.einsum("bfjac,bflcd->bfjald", R, adj)  # (B, F, J + 1, C, J + 1, C)
    halves = pairs.diagonal(dim1=3, dim2=5).sum(-1).real.to(v.dtype) / 2  # (B, F, J + 1, J + 1)
    det = (halves @ v * v).sum(2, keepdim=True)  # (B, F, 1, T)
    parts = (v.unsqueeze(3) * x.unsqueeze(2)).flatten(2, 3)  # v_l x_d (B, F, (J + 1) * C, T)
    y = pairs[:, :, :-1].flatten(2, 3).flatten(3, 4).to(x.dtype) @ parts  # (B, F, J * C, T)
    return y.unflatten(2, (-1, 2)) * (v[:, :, :-1] / det).unsqueeze(3)  # (B, F, J, C, T)
