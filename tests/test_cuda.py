"""GPUs, without one: the tensors of training and separation walked on devices that compute nothing.

torch's FakeTensorMode follows shapes, types and devices; there are no numbers. So an operation on
tensors of two devices raises here as it would on a GPU, and so does whatever looks at a number
(.item(), float(), `if tensor`): on a GPU that waits for all that was queued, which a training loop
can't afford. Copies to the CPU, which wait as well, are counted.

Walked as `cuda`, where the installed PyTorch was built for it (a card isn't needed: pip install
torch, as the index has it for Linux); as `other`, a device that every build of PyTorch has; and as
`mps`, the same, without double precision and products of complex matrices.
"""

import argparse
import contextlib
import importlib

import pytest
import torch
from conftest import ConvUnmix
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import model
import test
import train
import utils
from model import OpenUnmix, Separator, wiener

BINS, LENGTH = 129, 640  # of an STFT of 256; samples: an LSTM is walked frame by frame
ARCHITECTURES = {"blstm": OpenUnmix, "conv": ConvUnmix}


class Watch(TorchDispatchMode):
    """Counts tensors copied from a device to the CPU; refuses what the device can't compute."""

    def __init__(self, device, doubles=True):
        super().__init__()
        self.device, self.doubles, self.to_cpu = torch.device(device), doubles, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        where = [x.device for x in (*args, result) if torch.is_tensor(x)]
        if len(where) > 1 and self.device in where[:-1] and where[-1] == torch.device("cpu"):
            self.to_cpu += 1
        if not self.doubles and torch.is_tensor(result) and result.device == self.device:
            assert result.dtype not in (torch.float64, torch.complex128), function
            assert not (result.is_complex() and function.__name__.split(".")[0] in ("bmm", "mm"))
        return result


@pytest.fixture(params=["cuda", "other", "mps"])
def walk(request, monkeypatch):
    """What watches the tensors while they are walked; `.device` is where."""
    kind = request.param
    if kind == "cuda" and not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch was not built for CUDA")
    monkeypatch.setattr(torch, "istft", istft)
    if kind == "cuda":  # autocast asks whether there is a card
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        if not torch.cuda.is_available():
            monkeypatch.setattr(torch.Tensor, "backward", backward)
    else:  # of a name that autocast and the fused optimizer don't know
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        adam = importlib.import_module("torch.optim.adam")
        monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    if kind == "mps":
        monkeypatch.setattr(utils, "NO_DOUBLES", {"meta"})
    watch = Watch("cuda:0" if kind == "cuda" else "meta", doubles=kind != "mps")
    with (
        torch.backends.cudnn.flags(enabled=False),
        FakeTensorMode(allow_non_fake_inputs=True),
        watch,
    ):
        yield watch


def istft(X, n_fft, n_hop, window, length):
    """Stands for torch.istft, which looks at values: an error for what is on two devices."""
    return (X[:, :1, :1].real * window[0]).squeeze(-1).expand(-1, length)


def backward(loss):
    """Stands for Tensor.backward, which asks the card: all that it would reach gets a gradient."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)


def make_networks(device, arch="blstm", names=("vocals", "drums"), **settings):
    """Networks for an STFT of 256, on a device without numbers (`.to` can't bring them there)."""
    with torch.device(device):
        shape = dict(nb_bins=BINS, hidden_size=16, nb_layers=2, **settings)
        return {name: ARCHITECTURES[arch](**shape) for name in names}


def training(walk, monkeypatch, *flags, arch="blstm"):
    """args, network and state of a training; what may look at numbers is replaced, and counted."""
    looks = []
    average = lambda values: looks.append(values.device) or [[0.0, 1]] * 9  # noqa: E731
    monkeypatch.setattr(train, "average", average)
    monkeypatch.setattr(train, "computed_once", lambda network, _: network.forward)
    monkeypatch.setattr(train, "check_finite", lambda *_: looks.append("check"))
    command = f"--root x --arch {arch} --nfft 256 --nhop 64 --hidden-size 16 --quiet".split()
    args, _ = train.parse_args([*command, *flags])
    args.sample_rate = 8000
    with torch.device(walk.device):
        network = train.new_network(args)
    return args, network, train.make_state(network, args), looks


# ---------------------------------------------------------------------------------- the walk


def test_the_walk_sees_what_it_is_for(walk):
    x = torch.zeros(3, device=walk.device)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.zeros(3)
    for look in (torch.Tensor.item, float, bool):
        with pytest.raises(DataDependentOutputException):
            look(x.sum())
    assert walk.to_cpu == 0
    assert (x.cpu() + torch.zeros(3)).device.type == "cpu" and walk.to_cpu == 1


# ---------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("arch", "amp", "channels", "steps"),
    [("conv", False, 1, 11), ("conv", True, 2, 11), ("blstm", False, 2, 1), ("blstm", True, 2, 1)],
)
def test_training_loop(walk, monkeypatch, arch, amp, channels, steps):
    """No tensor on another device; nothing waits for the GPU but the check of every tenth loss."""
    flags = ["--nb-channels", channels, *["--amp"] * amp]
    args, network, state, looks = training(walk, monkeypatch, *flags, arch=arch)
    batches = [(torch.zeros(3, 2, LENGTH), torch.zeros(3, 2, LENGTH))] * steps
    train.train(network, state, batches, args, walk.device, "")
    assert looks[:-1] == ["check"] * (1 + steps // 10) and walk.to_cpu <= 1 - walk.doubles
    assert looks[-1].type == utils.precise(walk.device).type
    for parameter in network.parameters():
        assert parameter.grad.device == walk.device
        assert state["optimizer"].state[parameter]["exp_avg"].device == walk.device


def test_network_in_bfloat16(walk):
    if walk.device.type != "cuda":
        pytest.skip("autocast knows no device of this name")
    x = torch.zeros(1, 2, BINS, 9, device=walk.device)
    (network,) = make_networks(walk.device, names=["vocals"]).values()
    with torch.autocast("cuda", torch.bfloat16):
        assert network.recur(network.encode(x)).dtype == torch.bfloat16
    separator = Separator({"vocals": network.eval()}, n_fft=256, n_hop=64)
    separator.amp = True
    assert separator(torch.zeros(1, 2, LENGTH, device=walk.device)).dtype == torch.float32


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_validation(walk, monkeypatch, arch):
    """It looks at one number a metric and track, and at nothing else."""
    args, network, _, looks = training(walk, monkeypatch, arch=arch)
    numbers = []
    monkeypatch.setattr(train, "float", lambda x: numbers.append(x.device) or 0.0, raising=False)
    monkeypatch.setitem(train.METRICS, "level", lambda network, x, y, args: y.abs().mean())
    tracks = [(torch.zeros(2, length), torch.zeros(2, length)) for length in (LENGTH, 3 * LENGTH)]
    train.validate(network, tracks, args, walk.device)
    assert numbers == [walk.device] * 6 and looks == [walk.device] and walk.to_cpu == 0


def test_input_statistics(walk, monkeypatch):
    """A track's (F, T) magnitudes come to the CPU, once; the sums stay there."""
    args, *_ = training(walk, monkeypatch)
    tracks = [(torch.zeros(2, LENGTH), torch.zeros(2, LENGTH))] * 3
    with pytest.raises(DataDependentOutputException):  # where the result becomes numbers
        train.input_statistics(tracks, args, walk.device)
    assert walk.to_cpu == 3


# ---------------------------------------------------------------------------------- separation

SETTINGS = [
    dict(niter=0),
    dict(niter=1),
    dict(niter=2, residual=True),
    dict(softmask=True, wiener_win_len=None),
    dict(niter=0, softmask=True, residual=True),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("arch", "batch", "nb_channels", "channels", "gradients"),
    [
        ("blstm", 1, 2, 2, False),
        ("conv", 2, 2, 2, True),
        ("conv", 2, 1, 2, False),
        ("conv", 2, 2, 1, True),
    ],
)
def test_separator(walk, settings, arch, batch, nb_channels, channels, gradients):
    """Any batch, with gradients too; between waveforms in and out nothing waits for the GPU."""
    networks = make_networks(walk.device, arch, nb_channels=nb_channels)
    separator = Separator(networks, **{"wiener_win_len": 8, **settings}, n_fft=256, n_hop=64)
    audio = torch.zeros(batch, channels, LENGTH, device=walk.device, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        stems = separator.eval()(audio)
    assert stems.shape == (batch, len(separator.targets), channels, LENGTH)
    assert stems.device == walk.device
    assert walk.to_cpu == 0 or not walk.doubles
    if gradients:
        stems.square().sum().backward()
        assert audio.grad.device == walk.device


@pytest.mark.parametrize("in_stages", [True, False])
@pytest.mark.parametrize(("arch", "settings"), [("blstm", SETTINGS[2]), ("conv", SETTINGS[3])])
def test_stream(walk, monkeypatch, settings, arch, in_stages):
    """Blocks from the CPU in, blocks on the device out; in between, as above."""
    # it looks at numbers
    monkeypatch.setattr(model, "same_as_plain", lambda _, stages, __: stages == in_stages)
    settings = {"wiener_win_len": 8, **settings}
    separator = Separator(make_networks(walk.device, arch), **settings, n_fft=256, n_hop=64).eval()
    blocks = list(model.stream(separator, [torch.zeros(2, LENGTH)] * 2, block=5))
    assert sum(block.shape[-1] for block in blocks) == 2 * LENGTH
    assert {block.device for block in blocks} == {walk.device}
    assert walk.to_cpu == 0 or not walk.doubles


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("niter", [0, 1, 2])
def test_wiener(walk, niter, channels, gradients):
    """A batch of three. What Apple's GPU lacks is computed on the CPU, and comes back."""
    shape = dict(device=walk.device, requires_grad=gradients)
    V = torch.ones(3, 4, channels, 20, 30, **shape)
    X = torch.ones(3, channels, 20, 30, device=walk.device, dtype=torch.complex64)
    Y = wiener(V, X, niter)
    assert Y.shape == V.shape and Y.dtype == X.dtype and Y.device == walk.device
    assert walk.to_cpu == (0 if walk.doubles else 2)
    if gradients:
        Y.abs().sum().backward()
        assert V.grad.device == walk.device


def test_stems_come_to_the_cpu_before_they_are_resampled(walk, monkeypatch):
    """On a GPU, convolutions are in TF32: a resampled stem would be good for 70 dB only."""
    where = []
    monkeypatch.setattr(test, "resample_blocks", lambda blocks, *_: where.extend(blocks) or [])
    blocks = [torch.zeros(2, 2, 100, device=walk.device)] * 2
    stream = argparse.Namespace(stream=lambda _: blocks, sample_rate=44100)
    audio = argparse.Namespace(path="song.wav")
    test.separate(stream, argparse.Namespace(length=200, rate=48000, audio=audio), {}, {}, True)
    assert [block.device.type for block in where] == ["cpu"] * 2
