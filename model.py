"""The Open-Unmix model: STFT, network, multichannel Wiener filter, and the separator that joins them.

Axis letters, everywhere in this project:

    B batch   J sources   C channels   F frequency bins   T frames   N samples   H hidden units
    waveform (B, C, N)     STFT (B, C, F, T) complex     estimates (B, J, C, N)

Stöter, Uhlich, Liutkus, Mitsufuji: Open-Unmix - A Reference Implementation for Music Source Separation, JOSS 2019.
"""

import argparse
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from utils import SOURCES, UserError, download, file_name, load, select_device

# ---------------------------------------------------------------------------------------------- STFT


def stft(waveform, n_fft=4096, n_hop=1024):
    """Short-time Fourier transform: periodic Hann window, centred frames, reflected edges, not normalised.

    Args:
        waveform: (..., N) real.
    Returns:
        (..., F, T) complex with F = n_fft // 2 + 1 and T = N // n_hop + 1; in memory the bins of a frame lie together.
        A waveform too short to be reflected (N <= n_fft / 2) is lengthened with zeros.
    """
    shortage = n_fft // 2 + 1 - waveform.shape[-1]
    x = F.pad(waveform, (0, max(0, shortage))).flatten(0, -2)  # (everything else, N)
    window = torch.hann_window(n_fft, device=x.device, dtype=x.dtype)
    X = torch.stft(x, n_fft, n_hop, window=window, center=True, pad_mode="reflect", return_complex=True)
    return X.unflatten(0, waveform.shape[:-1])  # (..., F, T)


def istft(spectrum, length, n_fft=4096, n_hop=1024):
    """Inverse of `stft`: (..., F, T) complex -> (..., N) real with N = `length`."""
    X = spectrum.flatten(0, -3)
    window = torch.hann_window(n_fft, device=X.device, dtype=X.real.dtype)
    x = torch.istft(X, n_fft, n_hop, window=window, center=True, length=max(length, n_fft // 2 + 1))
    return x[..., :length].unflatten(0, spectrum.shape[:-2])  # (..., N)


def stft_blocks(audio, frames, n_fft=4096, n_hop=1024):
    """`stft` of a waveform that arrives in blocks (..., n): yields spectra (..., F, `frames`), the last one shorter."""
    half, size = n_fft // 2, (frames - 1) * n_hop + n_fft
    audio = iter(audio)
    x = next(audio)
    for block in audio:  # the left edge is reflected, so it needs samples 1 to n_fft / 2
        x = torch.cat([x, block], dim=-1)
        if x.shape[-1] > half:
            break
    x = F.pad(x, (0, max(0, half + 1 - x.shape[-1])))
    x = torch.cat([x[..., 1 : half + 1].flip(-1), x], dim=-1)
    window = torch.hann_window(n_fft, device=x.device, dtype=x.dtype)

    def transform(x):
        X = torch.stft(x.flatten(0, -2), n_fft, n_hop, window=window, center=False, return_complex=True)
        return X.unflatten(0, x.shape[:-1])

    for block in itertools.chain(audio, [None]):
        if block is None:  # the end: reflect the right edge
            block = x[..., -half - 1 : -1].flip(-1)
        x = torch.cat([x, block], dim=-1)
        while x.shape[-1] >= size + half + 1:  # keep what the right edge may need
            yield transform(x[..., :size])
            x = x[..., frames * n_hop :]
    while x.shape[-1] >= n_fft:
        yield transform(x[..., :size])
        x = x[..., frames * n_hop :]


def istft_blocks(spectra, length, n_fft=4096, n_hop=1024):
    """Inverse of `stft_blocks`: spectra (..., F, t) one after the other -> the finished samples (..., n) as they come."""
    overlap, position, tails = (math.ceil(n_fft / n_hop) - 1) * n_hop, -(n_fft // 2), (0, 0)
    for X in spectra:
        window = torch.hann_window(n_fft, device=X.device, dtype=X.real.dtype)
        frames = torch.fft.irfft(X.mT, n=n_fft)  # (..., T, n_fft)
        sums = overlap_add(frames, window, n_hop), overlap_add(window.expand(X.shape[-1], -1), window, n_hop)
        for samples, tail in zip(sums, tails):  # the signal, and what to divide it by
            samples[..., :overlap] += tail
        tails = [samples[..., X.shape[-1] * n_hop :] for samples in sums]
        done = slice(max(0, -position), min(length - position, X.shape[-1] * n_hop))
        yield sums[0][..., done] / sums[1][done]
        position += X.shape[-1] * n_hop
    if position < length:
        done = slice(max(0, -position), length - position)
        yield tails[0][..., done] / tails[1][done]


def overlap_add(frames, window, n_hop):
    """Sum of windowed frames (..., T, n_fft), each n_hop samples after the one before: (..., N)."""
    nb_frames, steps = frames.shape[-2], math.ceil(len(window) / n_hop)
    sums = frames.new_zeros(*frames.shape[:-2], nb_frames + steps - 1, n_hop)
    for step in range(steps):  # the same part of all frames at a time: no two of them meet
        part = slice(step * n_hop, (step + 1) * n_hop)
        sums[..., step : step + nb_frames, : len(window[part])].addcmul_(frames[..., part], window[part])
    return sums.flatten(-2)  # (..., N)


# ---------------------------------------------------------------------------------------------- networks


def in_parallel(work, items):
    """[work(item) for item in items] without gradients, on the CPU's threads.

    Each item gets its share of the threads: one thread in each of many items wastes none on waiting for the others, as
    several threads within each small operation do.
    """
    items, threads = list(items), torch.get_num_threads()
    workers = min(threads, len(items))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            return list(pool.map(torch.inference_mode()(work), items))
    finally:
        torch.set_num_threads(threads)  # the workers' setting became that of threads to come


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes of a training; so is its gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.apply(gradient)


def batch_norm(x, bn, weight=None, bias=None):
    """Batch normalisation of x (B', H) by the layer `bn`, over the batches of all processes of a training.

    `weight` and `bias` replace those of the layer. torch.nn.SyncBatchNorm would do, but only on GPUs.
    """
    weight, bias = bn.weight if weight is None else weight, bn.bias if bias is None else bias
    if bn.training:
        bn.num_batches_tracked += 1
    if not (bn.training and dist.is_initialized() and dist.get_world_size() > 1):
        return F.batch_norm(x, bn.running_mean, bn.running_var, weight, bias, bn.training, bn.momentum, bn.eps)
    x = x.float()
    count = SumOverProcesses.apply(torch.tensor(float(len(x)), device=x.device))
    mean = SumOverProcesses.apply(x.sum(0)) / count
    variance = SumOverProcesses.apply(((x - mean) ** 2).sum(0)) / count
    with torch.no_grad():
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(variance * count / (count - 1), bn.momentum)
    return (x - mean) * (variance + bn.eps).rsqrt() * weight + bias


class OpenUnmix(nn.Module):
    """The network for one target: from the mixture's magnitudes to the target's.

    Args:
        nb_bins: F of input and output.
        nb_channels: C of input and output.
        hidden_size: H.
        nb_layers: layers of the LSTM.
        unidirectional: LSTM that looks at the past only.
        max_bin: bins that the network sees, from 0 on; None for all. It still masks all of them.
        mask: "sigmoid", between 0 and 1 as in the paper, or "relu", as the published weights were trained.
        input_mean, input_scale: (F,) mean and standard deviation of the training mixtures' magnitudes.

    Parameter names and shapes are those of the published state_dicts; hence the mean is stored negated and the scale
    as its reciprocal.
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
    ):
        super().__init__()
        max_bin = min(max_bin or nb_bins, nb_bins)
        self.nb_bins, self.nb_channels, self.max_bin, self.mask = nb_bins, nb_channels, max_bin, mask
        self.hidden_size, self.unidirectional = hidden_size, unidirectional
        mean = torch.zeros(max_bin) if input_mean is None else torch.as_tensor(input_mean)[:max_bin].float()
        scale = torch.ones(max_bin) if input_scale is None else torch.as_tensor(input_scale)[:max_bin].float()
        self.input_mean = nn.Parameter(-mean)
        self.input_scale = nn.Parameter(1 / scale)
        self.fc1 = nn.Linear(nb_channels * max_bin, hidden_size, bias=False)
        self.bn1 = nn.BatchNorm1d(hidden_size)
        self.lstm = nn.LSTM(
            hidden_size,
            hidden_size if unidirectional else hidden_size // 2,
            nb_layers,
            bidirectional=not unidirectional,
            dropout=0.4 if nb_layers > 1 else 0.0,
        )
        self.fc2 = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.bn2 = nn.BatchNorm1d(hidden_size)
        self.fc3 = nn.Linear(hidden_size, nb_channels * nb_bins, bias=False)
        self.bn3 = nn.BatchNorm1d(nb_channels * nb_bins)
        self.output_scale = nn.Parameter(torch.ones(nb_bins))
        self.output_mean = nn.Parameter(torch.ones(nb_bins))

    def forward(self, x):
        """(B, C, F, T) magnitudes of the mixture -> (B, C, F, T) magnitudes of the target.

        Only `recur` looks from one frame to another; `encode` and `decode` may run on any block of frames.
        """
        h = self.encode(x)
        return self.decode(self.join(h, self.recur(h)), x)

    def encode(self, x):
        """Crop, standardise, fc1, batch norm, tanh: (B, C, F, T) -> (T, B, H)."""
        frames = x[:, :, : self.max_bin].permute(3, 0, 1, 2).flatten(0, 1)  # (T * B, C, max_bin)
        # fc1((x + mean) * scale), with scale and mean moved into the weights: no pass over the spectrogram, no copy of it
        weight = self.fc1.weight.unflatten(1, (self.nb_channels, -1)) * self.input_scale  # (H, C, max_bin)
        bias = (weight * self.input_mean).sum((1, 2))
        h = bias + sum(F.linear(frames[:, c], weight[:, c]) for c in range(self.nb_channels))  # (T * B, H)
        return torch.tanh(batch_norm(h, self.bn1)).unflatten(0, (x.shape[3], -1))  # (T, B, H)

    def recur(self, h):
        """The layer that looks over time: (T, B, H) -> (T, B, H). Another network replaces this one."""
        if h.device.type == "cpu" and not (self.training or torch.is_grad_enabled()):
            return lstm_in_blocks(self.lstm, h)
        return self.lstm(h)[0]

    def join(self, h, context):
        """Skip connection, fc2, batch norm, ReLU: what `encode` and `recur` gave, (T, B, H) each -> (T, B, H)."""
        h = self.fc2(torch.cat([h, context], dim=-1)).flatten(0, 1)  # (T * B, H)
        return F.relu(batch_norm(h, self.bn2)).unflatten(0, context.shape[:2])

    def decode(self, h, x):
        """fc3, batch norm, output scale and mean, mask, times the mixture: (T, B, H), (B, C, F, T) -> (B, C, F, T).

        A network whose fc3 and bn3 are J times as wide masks J sources: (B, J * C, F, T).
        """
        masks = self.fc3.out_features // self.nb_bins  # J * C
        scale, mean = self.output_scale.repeat(masks), self.output_mean.repeat(masks)
        # batch_norm(y) * scale + mean, with both moved into the layer's own weight and bias
        y = batch_norm(self.fc3(h.flatten(0, 1)), self.bn3, self.bn3.weight * scale, self.bn3.bias * scale + mean)
        mask = y.sigmoid_() if self.mask == "sigmoid" else y.relu_()  # in place: spectrograms are what fills the memory
        mask = mask.view(len(h), len(x), -1, self.nb_channels, self.nb_bins).permute(1, 2, 3, 4, 0)  # (B, J, C, F, T)
        return (mask * x[:, None]).flatten(1, 2)


def lstm_in_blocks(lstm, h, block=1024):
    """The output of nn.LSTM for h (T, B, H), on a CPU and without gradients: the same numbers in much less memory.

    nn.LSTM takes room for the gates of all frames, and computes its directions one after the other. Here they run side
    by side, and each hands its state from block to block of frames.
    """
    directions = 1 + lstm.bidirectional
    for layer in range(lstm.num_layers):
        output = h.new_empty(*h.shape[:2], directions * lstm.hidden_size)

        def run(direction):
            weights = [weight.to(h.dtype) for weight in lstm.all_weights[layer * directions + direction]]
            state = [h.new_zeros(1, h.shape[1], lstm.hidden_size)] * 2
            own, starts = output.chunk(directions, -1)[direction], range(0, len(h), block)
            for start in reversed(starts) if direction else starts:  # the second direction runs backwards in time
                part = slice(start, start + block)
                x = h[part].flip(0) if direction else h[part]
                y, *state = torch.lstm(x, state, weights, True, 1, 0.0, False, False, False)
                own[part] = y.flip(0) if direction else y

        in_parallel(run, range(directions))
        h = output
    return h


class ConvUnmix(OpenUnmix):
    """Dilated convolutions over time in place of the LSTM: sees 1 s to either side, and trains several times faster.

    Here as an example of another network: the rest of the project does not know which one it works with.
    """

    def __init__(self, *args, nb_layers=4, **kwargs):
        super().__init__(*args, nb_layers=1, **kwargs)
        del self.lstm
        size = self.hidden_size
        self.layers = nn.ModuleList(nn.Conv1d(size, size, 3, dilation=3**layer, groups=4) for layer in range(nb_layers))

    def recur(self, h):
        """Residual convolutions: (T, B, H) -> (T, B, H)."""
        h = h.permute(1, 2, 0)  # (B, H, T)
        for layer in self.layers:
            reach = layer.dilation[0]
            h = h + F.relu(layer(F.pad(h, (2 * reach, 0) if self.unidirectional else (reach, reach))))
        return h.permute(2, 0, 1)  # (T, B, H)


ARCHITECTURES = {"blstm": OpenUnmix, "conv": ConvUnmix}


# ---------------------------------------------------------------------------------------------- Wiener filter

EPS = 1e-10  # regularisation, as in the published system (norbert takes it as an argument)
BLOCK = 64  # bins: few enough for a core's cache, many enough to keep Python idle


def wiener(magnitudes, mixture, niter=1, softmask=False, eps=EPS):
    """Multichannel Wiener filter: from the sources' magnitudes to complex estimates that share out the mixture.

    Each source is a Gaussian with a power per frame and bin and a spatial covariance per bin; EM alternates between
    estimating both and filtering. The algorithm is norbert's and its numbers are the same, with two differences: it
    always regularises relative to the loudest bin of each batch item, so that scaling mixture and magnitudes scales
    the estimates alike however quiet they are, and it computes covariances in double precision whatever the input,
    because the channels of near-mono bins cancel in single precision. Differentiable.

    Args:
        magnitudes: (B, J, C, F, T) real, in the unit of the mixture.
        mixture: (B, C, F, T) complex STFT.
        niter: number of EM iterations; 0 returns the initial estimates.
        softmask: start from the mixture shared in proportion to the magnitudes, not from the magnitudes with the
            mixture's phase.
        eps: regularisation, as norbert's.
    Returns:
        (B, J, C, F, T) complex, in the mixture's dtype; in memory the bins of a frame lie together, as stft's.

    From: Duong, Vincent, Gribonval, "Under-determined reverberant audio source separation using a full-rank spatial
    covariance model", IEEE TASLP 18(7), 2010; Uhlich et al., ICASSP 2017.
    """
    if niter == 0:
        return initial_estimates(magnitudes, mixture, softmask)

    def separate(magnitudes, mixture, level):
        V, X = (x.movedim(-2, 1).contiguous().movedim(1, -2) for x in (magnitudes, mixture))  # in memory (B, F, ..., T)
        return expectation_maximization(initial_estimates(V, X, softmask), X, niter, level, eps)

    level = mixture.abs().amax((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    if mixture.device.type != "cpu" or torch.is_grad_enabled() and (magnitudes.requires_grad or mixture.requires_grad):
        return separate(magnitudes, mixture, level)

    # Bins are independent: on a CPU, each thread takes a block of them at a time, small enough to stay in its cache.
    batch, bins = len(magnitudes), magnitudes.shape[3]
    estimates = mixture.new_empty(magnitudes.mT.shape).mT  # (B, J, C, F, T)

    def work(block):
        b, f = block
        estimates[b, :, :, f] = separate(magnitudes[b, :, :, f], mixture[b, :, f], level[b])

    in_parallel(work, [(slice(b, b + 1), slice(f, f + BLOCK)) for b in range(batch) for f in range(0, bins, BLOCK)])
    return estimates


def initial_estimates(V, X, softmask=False):
    """Magnitudes V (B, J, C, F, T) with the phase of the mixture X (B, C, F, T), or X shared in proportion to them."""
    if softmask:
        return ratio_mask(V) * X[:, None]
    return V * X.sgn()[:, None]  # sgn(X) is exp(i angle(X)), or 0 where X is 0


def ratio_mask(V):
    """The share of each source in the sum of all: (B, J, C, F, T) -> (B, J, C, F, T), between 0 and 1."""
    return V / V.sum(1, keepdim=True).clamp_min(torch.finfo(V.dtype).tiny)


def expectation_maximization(y, x, niter, level, eps=EPS):
    """Improve estimates y (B, J, C, F, T) of the sources of x (B, C, F, T) `niter` times.

    level: (B, 1, 1, 1), the loudest magnitude of x, which eps is relative to (norbert scales x to 10 instead).
    """
    unit = (level / 10).clamp_min(1e-15).square()  # (B, 1, 1, 1): the powers' unit
    x = x.movedim(2, 1).contiguous()  # (B, F, C, T): each step is one matrix product per bin
    y = y.movedim(3, 1).contiguous()  # (B, F, J, C, T)
    for _ in range(niter):
        v = (y.real.square() + y.imag.square()).mean(-2) / unit  # power of each source (B, F, J, T)
        weight = unit * (eps + v.sum(-1, keepdim=True, dtype=torch.float64)).unsqueeze(-1)  # (B, F, J, 1, 1)
        R = y.to(torch.complex128)
        R = R @ R.mH / weight  # spatial covariance of each source (B, F, J, C, C)
        y = filter_sources(v, R, x, eps**0.5)
    return y.movedim(1, 3)


def filter_sources(v, R, x, ridge):
    """v_j R_j (sum over l of v_l R_l + ridge I)^-1 x: each source's share of the mixture.

    Args:
        v: (B, F, J, T) powers; R: (B, F, J, C, C) covariances, in double precision; x: (B, F, C, T) mixture;
        ridge: keeps the inverse finite.
    Returns:
        (B, F, J, C, T) in the mixture's dtype.
    """
    C, T = x.shape[-2:]
    identity = torch.eye(C, dtype=R.dtype, device=R.device)
    if C != 2:
        P = torch.einsum("bfjt,bfjcd->bftcd", v.to(R.dtype), R) + ridge * identity  # (B, F, T, C, C)
        z = torch.linalg.solve(P, x.mT.unsqueeze(-1).to(R.dtype)).squeeze(-1).mT  # (B, F, C, T)
        return (v.unsqueeze(3) * torch.einsum("bfjcd,bfdt->bfjct", R, z)).to(x.dtype)
    # The ridge is one more source, equally loud everywhere. A 2 x 2 inverse is adj / det, and both are sums over pairs of
    # sources, of R_j adj(R_l) and of half its trace. What cancels does so within these, once per bin and in double
    # precision; det is a sum of positive terms, for which single precision is enough in every frame.
    v = torch.cat([v, torch.full_like(v[:, :, :1], ridge)], dim=2)  # (B, F, J + 1, T)
    R = torch.cat([R, identity.expand_as(R[:, :, :1])], dim=2)  # (B, F, J + 1, C, C)
    adj = R.flip(-2, -1).mT * (2 * identity.real - 1)  # [[a, b], [c, d]] -> [[d, -b], [-c, a]]
    pairs = torch.einsum("bfjac,bflcd->bfjald", R, adj)  # (B, F, J + 1, C, J + 1, C)
    halves = pairs.diagonal(dim1=3, dim2=5).sum(-1).real.to(v.dtype) / 2  # (B, F, J + 1, J + 1)
    det = (halves @ v * v).sum(2, keepdim=True)  # (B, F, 1, T)
    parts = (v.unsqueeze(3) * x.unsqueeze(2)).flatten(2, 3)  # v_l x_d (B, F, (J + 1) * C, T)
    y = pairs[:, :, :-1].flatten(2, 3).flatten(3, 4).to(x.dtype) @ parts  # (B, F, J * C, T)
    return y.unflatten(2, (-1, C)) * (v[:, :, :-1] / det).unsqueeze(3)


def norbert_wiener(magnitudes, mixture, niter=1):
    """`wiener` by norbert, for comparison: several times slower."""
    import norbert

    Y = []
    for V, X in zip(magnitudes, mixture):  # norbert's axes are (T, F, C, J), and it scales its input in place
        v, x = V.permute(3, 2, 1, 0).double(), X.permute(2, 1, 0).to(torch.complex128, copy=True)
        v, x = v.cpu().numpy(), x.cpu().numpy()
        Y.append(torch.from_numpy(norbert.wiener(v, x, niter, use_softmask=False, eps=EPS)).permute(3, 2, 1, 0))
    return torch.stack(Y).to(mixture)


# ---------------------------------------------------------------------------------------------- separation


class Separator(nn.Module):
    """Separates waveforms: STFT, one network per target, multichannel Wiener filter, inverse STFT.

    Args:
        target_models: {target: network}.
        niter: iterations of the Wiener filter's EM; 0 keeps the mixture's phase (and is differentiable). A single
            target without `residual` has nothing to be told apart from: it is masked only.
        softmask: initial estimates as shares of the mixture (ratio mask) rather than the networks' magnitudes.
        residual: add a source named "residual", the mixture less all targets, before the Wiener filter.
        wiener_win_len: frames over which the filter assumes that sources stay where they are; None for all.
        sample_rate, n_fft, n_hop: of the waveforms and their STFT, as in training.

    `.targets` names the J axis, `.nb_channels` is the networks' C: networks for one channel mask every channel of
    the mixture alike; those for two play a mono mixture on both and return one.
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
    ):
        super().__init__()
        self.target_models = nn.ModuleDict(target_models)
        sources = (getattr(network, "sources", [target]) for target, network in target_models.items())
        self.targets = [*itertools.chain(*sources)] + ["residual"] * residual
        self.niter, self.softmask, self.residual, self.wiener_win_len = niter, softmask, residual, wiener_win_len
        self.sample_rate, self.n_fft, self.n_hop = sample_rate, n_fft, n_hop
        self.nb_channels = next(iter(target_models.values())).nb_channels
        self.amp = False  # networks in bfloat16
        self.wiener = wiener

    def forward(self, audio):
        """Waveforms (B, C, N) -> estimates (B, J, C, N); all of it in memory at once (see `stream`)."""
        x = audio.expand(-1, max(audio.shape[1], self.nb_channels), -1)  # (B, C, N)
        X = stft(x, self.n_fft, self.n_hop)
        magnitude = self.magnitude(X)
        V = self.stack(network(magnitude) for network in self.target_models.values())
        size = self.wiener_win_len or X.shape[-1]
        Y = torch.cat([self.filter(v, x) for v, x in zip(V.split(size, -1), X.split(size, -1))], dim=-1)
        return istft(Y, audio.shape[-1], self.n_fft, self.n_hop)[:, :, : audio.shape[1]]

    def magnitude(self, X):
        """What the networks see: |X|, averaged over channels where they were trained on one."""
        return X.abs().mean(1, keepdim=True) if self.nb_channels == 1 else X.abs()

    def stack(self, magnitudes):
        """What the networks estimate, (B, C, F, T) each, or (B, K * C, F, T) of K sources: (B, J, C, F, T)."""
        V = [v.unflatten(1, (-1, self.nb_channels)).permute(4, 0, 1, 2, 3) for v in magnitudes]  # (T, B, K, C, F)
        return torch.cat(V, dim=2).permute(1, 2, 3, 4, 0)  # joined in the order of memory

    def filter(self, V, X):
        """One window: the networks' magnitudes V (B, J, C, F, T), mixture X (B, C, F, T) -> spectra (B, J, C, F, T)."""
        V = V.expand(-1, -1, X.shape[1], -1, -1)  # a mono network's mask is every channel's
        if self.softmask:
            V = ratio_mask(V) * X.abs()[:, None]
        if self.residual:
            V = torch.cat([V, X.abs()[:, None] - V.sum(1, keepdim=True)], dim=1)
        return self.wiener(V, X, self.niter if V.shape[1] > 1 else 0)

    @torch.inference_mode()
    def stream(self, audio, block=300):
        """Separate a recording of any length: the same estimates as `forward`, block by block.

        Only (T, H) per target stays in memory: the first pass over the audio runs STFT and fc1 on blocks of frames;
        then the LSTM sees the whole recording; the second pass runs everything else one Wiener window at a time.

        Args:
            audio: iterable over blocks (C, n) of one waveform; it is iterated over twice.
            block: frames at a time in the first pass.
        Yields:
            blocks (J, C, n) that join to the estimates.
        """
        device = next(self.parameters()).device
        channels, length = 0, 0

        def blocks():
            nonlocal channels, length
            length = 0
            for x in audio:
                channels, length = x.shape[0], length + x.shape[1]
                yield x.to(device, non_blocking=True).expand(max(channels, self.nb_channels), -1)[None]

        def for_each_target(work):
            def run(target):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
                    return work(target, self.target_models[target])

            return in_parallel(run, self.target_models) if device.type == "cpu" else [*map(run, self.target_models)]

        hidden, position = {}, 0  # {target: (T, B, H)}
        for X in stft_blocks(blocks(), block, self.n_fft, self.n_hop):
            magnitude, part = self.magnitude(X), slice(position, position + X.shape[-1])
            position = part.stop

            def encode(target, network):
                h = network.encode(magnitude)
                if len(hidden.setdefault(target, h.new_empty(0))) < position:
                    hidden[target].resize_(2 * position, *h.shape[1:])
                hidden[target][part] = h

            for_each_target(encode)

        def look_around(target, network):
            h = hidden[target] = hidden[target][:position]
            context = network.recur(h)
            for part, around in zip(h.split(block), context.split(block)):
                part.copy_(network.join(part, around))

        for_each_target(look_around)

        def spectra(position=0):
            window = self.wiener_win_len or math.ceil(length / self.n_hop) + 1
            for X in stft_blocks(blocks(), window, self.n_fft, self.n_hop):
                magnitude, part = self.magnitude(X), slice(position, position + X.shape[-1])
                position = part.stop
                V = for_each_target(lambda target, network: network.decode(hidden[target][part], magnitude))
                yield self.filter(self.stack(V).float(), X)  # (B, J, C, F, T)

        for estimates in istft_blocks(spectra(), length, self.n_fft, self.n_hop):
            yield estimates[0, :, :channels]


# ---------------------------------------------------------------------------------------------- loading

MUSIC = {"sample_rate": 44100, "nfft": 4096, "nhop": 1024, "nb_channels": 2, "hidden_size": 512}
LARGE = {**MUSIC, "hidden_size": 1024}
SPEECH = {"sample_rate": 16000, "nfft": 1024, "nhop": 512, "nb_channels": 1, "hidden_size": 256}
# The published weights: Zenodo record, files (the hex digits start their SHA-256), settings; see https://zenodo.org.
PUBLISHED = {
    "umx": (3370486, ("vocals-c8df74a5", "drums-5a48008b", "bass-646024d3", "other-f8e132cc"), MUSIC),
    "umxhq": (3370489, ("vocals-b62c91ce", "drums-9619578f", "bass-8d85a5bd", "other-b52fbbf7"), MUSIC),
    "umxl": (5069601, ("vocals-bccbd9aa", "drums-69e0ebd4", "bass-2ca1ce51", "other-c8c5b3e6"), LARGE),
    "umxse": (3786908, ("speech_f5e0d9f9", "noise_04a6fc2d"), SPEECH),
}
ZENODO = "https://zenodo.org/records/{record}/files/{name}.pth"
LICENCES = {"umxl": "umxl: weights under CC BY-NC-SA 4.0: not for commercial use"}


def load_separator(model="umxl", targets=None, niter=1, softmask=False, residual=False, wiener_win_len=300, device="cpu"):
    """Load a separator, ready to use: `stems = load_separator("umxl")(audio)`.

    Args:
        model: published weights by name (umx, umxhq, umxl, umxse; fetched once) or a model folder made by train.py
            or by openunmix.
        targets: which of its targets; None for all.
        niter, softmask, residual, wiener_win_len: see Separator.
        device: where it computes.
    Returns:
        Separator in evaluation mode: waveforms (B, C, N) -> (B, J, C, N), `.targets` names the J axis.
    Raises:
        UserError: no such model or target, files that are damaged or do not fit, no network.
    """
    networks, settings = load_networks(model, targets, device)
    stft_settings = {"sample_rate": int(settings["sample_rate"]), "n_fft": settings["nfft"], "n_hop": settings["nhop"]}
    return Separator(networks, niter, softmask, residual, wiener_win_len, **stft_settings).to(device).eval()


def load_networks(model, targets=None, device="cpu"):
    """({target: network}, settings) of published weights or of a model folder; errors as load_separator."""
    folder = Path(model)
    if folder.is_dir() and (folder / "separator.json").is_file():
        settings = load(folder / "separator.json")
        files = {path.stem: path for path in sorted(folder.glob("*.json")) if path.name != "separator.json"}
        available = sorted(files, key=lambda name: (SOURCES.index(name) if name in SOURCES else 9, name))
    elif str(model) in PUBLISHED:
        record, names, settings = PUBLISHED[str(model)]
        files = {name[:-9]: name for name in names}  # without the dash and eight hex digits
        available = list(files)
    else:
        what = "has no separator.json: it is not a model folder" if folder.is_dir() else "no such model or folder"
        raise UserError(f"{model}: {what}; train one (python train.py) or use {', '.join(PUBLISHED)}")
    if not isinstance(settings, dict) or not all(key in settings for key in ("sample_rate", "nfft", "nhop", "nb_channels")):
        raise UserError(f"{folder / 'separator.json'}: lacks sample_rate, nfft, nhop or nb_channels; train the model again")
    for target in targets or available[:1] or [""]:
        if target not in files:
            raise UserError(f"{model}: has no target {target!r}; it has {', '.join(available) or 'none yet'}")
    networks = {}
    for target in targets or available:
        if isinstance(files[target], Path):
            networks[target] = load_trained(folder, target, settings, device)
        else:
            networks[target] = load_published(record, files[target], settings, device)
    if str(model) in LICENCES and not folder.is_dir():
        print(LICENCES[str(model)])
    return networks, settings


def load_published(record, name, settings, device="cpu"):
    """Published weights: fetched once into torch hub's checkpoint folder, checked by their SHA-256."""
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name}.pth")
    if not path.exists():
        download(ZENODO.format(record=record, name=name), path, sha256_start=name[-8:])
    return make_network({**settings, "mask": "relu"}, path, settings, device)


def load_trained(folder, target, settings, device="cpu"):
    """One target of a model folder; a folder that records no mask is a published one: ReLU."""
    args = load(folder / f"{target}.json").get("args", {})
    paths = sorted(folder.glob(f"{target}.pth")) or sorted(folder.glob(f"{target}[-_]*.pth"))
    if not paths:
        raise UserError(f"{folder / target}.pth: no such file; train it first: python train.py --target {target}")
    return make_network({"mask": "relu", **args}, paths[0], settings, device)


def make_network(args, path, settings, device="cpu"):
    """A network in evaluation mode with the weights of a .pth file, which must fit to the last parameter."""
    state = load(path, device)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no weights; replace it")
    # the oldest published files also hold the window of their STFT layer
    extra = {"stft.window", "transform.0.window", "sample_rate"}
    state = {name: value for name, value in state.items() if name not in extra}
    if "input_mean" not in state or "fc2.weight" not in state:
        raise UserError(f"{path}: lacks input_mean or fc2.weight: not the weights of an Open-Unmix network")
    if args.get("arch", "blstm") not in ARCHITECTURES:
        raise UserError(f"{path}: was trained with --arch {args['arch']}, which model.py does not have")
    network = ARCHITECTURES[args.get("arch", "blstm")](
        nb_bins=settings["nfft"] // 2 + 1,
        nb_channels=settings["nb_channels"],
        hidden_size=state["fc2.weight"].shape[0],
        unidirectional=args.get("unidirectional", False),
        max_bin=state["input_mean"].shape[0],
        mask=args["mask"],
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: does not fit its settings: {problem}") from None
    return network.to(device).eval()


def separator_from_flags(args):
    """The separator that the flags of test.py and eval.py ask for (utils.add_separation_flags)."""
    device = select_device(args.device)
    networks, settings = load_networks(args.model, args.targets, device)
    alone = len(networks) == 1 and not hasattr(*networks.values(), "sources")
    residual = args.residual is not None or alone  # one target's counterpart is all the rest
    stft_settings = {"sample_rate": int(settings["sample_rate"]), "n_fft": settings["nfft"], "n_hop": settings["nhop"]}
    separator = Separator(networks, args.niter, args.softmask, residual, args.wiener_win_len or None, **stft_settings)
    if residual:
        separator.targets[-1] = args.residual or ("accompaniment" if separator.targets[0] == "vocals" else "residual")
    separator.amp = args.amp
    if args.wiener == "norbert":
        separator.wiener = norbert_wiener
    return separator.to(device).eval()


def aggregation(targets, args):
    """--aggregate as {stem name: targets to sum}; each target by itself without the flag."""
    if args.aggregate is None:
        return {target: [target] for target in targets}
    try:
        sums = json.loads(args.aggregate)
        if not sums or not all(isinstance(parts, list) and parts for parts in sums.values()):
            raise ValueError("not an object of lists")
    except (ValueError, AttributeError) as error:
        raise UserError(f'--aggregate: is not JSON such as {{"rest": ["drums", "bass"]}} ({error})') from None
    for name, parts in sums.items():
        unknown = [target for target in parts if target not in targets]
        if unknown:
            raise UserError(f"--aggregate: unknown target {unknown[0]!r}; there are {', '.join(targets)}")
        try:
            file_name(name)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--aggregate: {error}") from None
    return sums


def sum_targets(estimates, targets, sums):
    """Estimates (J, C, n) of `targets` -> {stem name: (C, n)}, as `aggregation` says."""
    by_name = dict(zip(targets, estimates))
    return {name: sum(by_name[target] for target in parts) for name, parts in sums.items()}
