"""X-UMX and its loss: against implementations of their own, and through all scripts."""

import argparse
import importlib.util
import itertools

import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import make_model, random_network, sdr, write_song
from torch import nn

import eval as evaluation
import test as separation
import train
from model import Separator, bridge, istft, load_separator, make_network, same_as_plain, stft
from utils import UserError, load, save

SOURCES = ("vocals", "drums", "bass", "other")
SHAPE = dict(nb_bins=129, hidden_size=16, max_bin=100)
SMALL = dict(n_fft=256, n_hop=64, sample_rate=8000)


def random_xumx(sources=SOURCES, **settings):
    """An X-UMX in evaluation mode whose parameters and statistics are all random."""
    networks = {s: random_network(j, **{**SHAPE, **settings}) for j, s in enumerate(sources)}
    return bridge(networks).eval()


def reference(state, x, nb_channels, relu=False):
    """The forward of the paper's figure 1b, from the state_dict alone: (B, C, F, T), (K, B, C, F, T)."""
    B, _, nb_bins, T = x.shape
    frames = x.permute(0, 3, 1, 2)  # (B, T, C, F)
    count = 1 + max(int(name.split(".")[1]) for name in state)
    trunks = [
        {n.split(".", 2)[2]: v for n, v in state.items() if n.startswith(f"trunks.{k}.")}
        for k in range(count)
    ]

    def normalise(h, trunk, layer):
        mean, var = trunk[f"{layer}.running_mean"], trunk[f"{layer}.running_var"]
        return (h - mean) / (var + 1e-5).sqrt() * trunk[f"{layer}.weight"] + trunk[f"{layer}.bias"]

    first = []
    for trunk in trunks:
        seen = frames[..., : len(trunk["input_mean"])] + trunk["input_mean"]
        h = (seen * trunk["input_scale"]).reshape(B, T, -1) @ trunk["fc1.weight"].T
        first.append(torch.tanh(normalise(h, trunk, "bn1")))
    bridge_1 = torch.stack(first).mean(0)
    joined = []
    for trunk, own in zip(trunks, first):
        hidden = trunk["lstm.weight_hh_l0"].shape[1]
        lstm = nn.LSTM(own.shape[-1], hidden, 3, bidirectional=True, batch_first=True)
        lstm.load_state_dict({n[5:]: v for n, v in trunk.items() if n.startswith("lstm.")})
        joined.append(torch.cat([own, lstm.eval()(bridge_1)[0]], dim=-1))
    bridge_2 = torch.stack(joined).mean(0)
    estimates = []
    for trunk in trunks:
        g = F.relu(normalise(bridge_2 @ trunk["fc2.weight"].T, trunk, "bn2"))
        u = normalise(g @ trunk["fc3.weight"].T, trunk, "bn3").reshape(B, T, nb_channels, nb_bins)
        u = u * trunk["output_scale"] + trunk["output_mean"]
        mask = F.relu(u) if relu else torch.sigmoid(u)
        estimates.append(mask.permute(0, 2, 3, 1) * x)
    return torch.stack(estimates)


@pytest.mark.parametrize("nb_channels", [1, 2])
@pytest.mark.parametrize("sources", [("vocals",), ("a", "b", "c"), SOURCES])
def test_forward_is_that_of_the_paper(nb_channels, sources):
    network = random_xumx(sources, nb_channels=nb_channels)
    assert network.sources == sources and network.made_with["sources"] == [*sources]
    x = torch.rand(3, nb_channels, 129, 40)
    with torch.no_grad():
        expected = reference(network.state_dict(), x, nb_channels)
        found = network(x).unflatten(1, (len(sources), nb_channels)).movedim(1, 0)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    separator = Separator({"all": network}, n_fft=256, n_hop=64)
    assert same_as_plain(separator, True, torch.device("cpu"))


def test_forward_is_asteroids():
    """asteroid's own network (`pip install --no-deps asteroid`), with its weights' names mapped."""
    found = importlib.util.find_spec("asteroid")
    if not found:
        pytest.skip("asteroid is not installed")
    path = Path(found.origin).parent / "models" / "x_umx.py"
    text = path.read_text().replace("from .base_models import BaseModel", "")
    module = types.ModuleType("x_umx")  # alone: the package wants many others

    class BaseModel(nn.Module):
        def __init__(self, sample_rate):
            super().__init__()

    module.BaseModel = BaseModel
    exec(compile(text, path, "exec"), vars(module))
    theirs = getattr(module, "BrokenXUMX", module.XUMX)  # what is broken in it is the STFT
    theirs = theirs(SOURCES, window_length=256, in_chan=256, n_hop=64, hidden_size=16, max_bin=100)
    ours = random_xumx(mask="relu")
    layers = {"fc1": "enc.0", "bn1": "enc.1", "fc2": "dec.0", "bn2": "dec.1", "fc3": "dec.3"}
    layers["bn3"] = "dec.4"
    state = {}
    for name, value in ours.state_dict().items():
        _, k, layer, *rest = name.split(".")
        source = SOURCES[int(k)]
        if layer == "lstm":
            state[f"layer_lstm.{source}.{rest[0]}"] = value
        elif layer in layers:
            kind = layers[layer].split(".")[0]
            state[f"layer_{kind}.{source}.{layers[layer]}.{rest[0]}"] = value
        else:
            state[f"mean_scale.{layer}_{source}"] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("window" in name for name in missing)
    x = torch.rand(3, 2, 129, 40)
    with torch.no_grad():
        masks = theirs.eval().forward_masker(x.permute(3, 0, 1, 2))  # (K, T, B, C, F)
        expected = masks.permute(2, 0, 3, 4, 1) * x[:, None]  # (B, K, C, F, T)
        found = ours(x).unflatten(1, (4, 2))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_gradient_reaches_every_trunk():
    network = random_xumx().train()
    network(torch.rand(2, 2, 129, 30)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def plain_loss(network, x, y, args):
    """The loss as the authors' code has it: all sums one by one, in double precision."""
    y = y.unflatten(1, (-1, x.shape[1])).double()  # (B, K, C, N)
    X, Y = stft(x.double(), args.nfft, args.nhop), stft(y, args.nfft, args.nhop).abs()
    seen = X.abs()
    if args.nb_channels == 1:
        seen, Y = seen.mean(1, keepdim=True), Y.mean(2, keepdim=True)
    V = network(seen.float()).double().unflatten(1, (y.shape[1], -1))  # (B, K, C, F, T)
    phase = torch.exp(1j * X.angle())
    y_hat = istft(V * phase[:, None], x.shape[-1], args.nfft, args.nhop)
    x, losses, eps = x.double(), [], 1e-10

    def cosine(a, b):
        norms = (eps + (a * a).sum(-1)).sqrt() * (eps + (b * b).sum(-1)).sqrt()
        return (a * b).sum(-1) / (norms + eps)

    K = y.shape[1]
    for size in range(1, max(2, K)):
        for chosen in map(list, itertools.combinations(range(K), size)):
            mse = (V[:, chosen].sum(1) - Y[:, chosen].sum(1)).square().mean()
            true, estimate = y[:, chosen].sum(1), y_hat[:, chosen].sum(1)
            signal, rest = true.square().sum(-1), (x - true).square().sum(-1)
            alpha = signal / (signal + rest + eps)
            score = alpha * cosine(estimate, true) + (1 - alpha) * cosine(x - estimate, x - true)
            losses.append(mse + 10 * (1 - score.mean()))
    assert len(losses) == (2**K - 2 if K > 1 else 1)  # 14 for four sources
    return torch.stack(losses).mean()


def loss_args(nb_channels=2):
    return argparse.Namespace(loss="xumx", nfft=256, nhop=64, nb_channels=nb_channels, amp=False)


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("nb_channels", [1, 2])
def test_loss_is_that_of_all_sums(K, nb_channels):
    network = random_xumx(SOURCES[:K], nb_channels=nb_channels)
    y = 0.1 * torch.randn(3, K, 2, 5000, generator=torch.Generator().manual_seed(K))
    y[0, 0], y[1, -1] = 0, 1e-3 * y[1, -1]  # a silent source and a quiet one
    x = y.sum(1) + 0.01  # the mixture's file need not be the sum to the bit
    gradients = []
    for loss in (train.xumx_loss, plain_loss):
        network.zero_grad()
        value = loss(network, x, y.flatten(1, 2), loss_args(nb_channels))
        value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        gradients.append(value.detach().double())
    with torch.no_grad():  # all examples at once, as on a GPU
        V = network(train.magnitudes(x, loss_args(nb_channels))).unflatten(1, (K, -1))
        whole = train.loss_of_sums(V, x, y, loss_args(nb_channels))
    ours, value, theirs, expected = gradients
    assert abs(whole - value) < 1e-5 * (10 + value)
    tolerance = 1e-3 if K > 1 else 1e-2  # an estimate that is nearly right has hardly any gradient
    assert abs(value - expected) < 1e-5 * (10 + expected) and value > 0
    assert ours.isfinite().all() and (ours - theirs).norm() < tolerance * theirs.norm()


def test_loss_of_perfect_estimates_is_zero():
    """Two tones that share no bin: the mixture's phase is each one's own."""
    time = torch.arange(8000) / 8000
    y = torch.stack([torch.sin(2 * np.pi * 250 * time), torch.sin(2 * np.pi * 2500 * time)])
    y = y[None, :, None].expand(1, 2, 2, -1)  # (B, K, C, N)

    def perfect(X):
        assert X.shape[1] == 2
        return stft(y, 256, 64).abs().flatten(1, 2)

    x = y.sum(1)
    assert train.xumx_loss(perfect, x, y.flatten(1, 2), loss_args()) < 0.01
    silence = torch.zeros_like(x)
    nothing = train.xumx_loss(
        lambda X: 0 * X.repeat(1, 2, 1, 1), silence, 0 * y.flatten(1, 2), loss_args()
    )
    assert nothing == 10  # no direction is right: but finite


@pytest.mark.parametrize(
    "option,message",
    [
        ({"sources": []}, "--arch-options sources: '' can't be a name"),
        ({"sources": ["a/b"]}, "--arch-options sources: 'a/b' can't be a name"),
        ({"sources": 5}, None),
        ({"sources": "vocals"}, None),
    ],
)
def test_sources_of_all_kinds(option, message):
    if message:
        with pytest.raises(UserError) as error:
            make_network("xumx", **SHAPE, **option)
        assert str(error.value).startswith(message)
    else:
        assert make_network("xumx", **SHAPE, **option).sources == (str(option["sources"]),)


def test_only_like_networks_are_bridged():
    one, relu = random_network(0, **SHAPE), random_network(1, **SHAPE, mask="relu")
    large = random_network(1, **{**SHAPE, "hidden_size": 24})
    conv = random_network(1, **SHAPE, arch="conv")
    for other in (relu, large, conv):
        with pytest.raises(UserError, match="--arch xumx: starts from blstm networks of one size"):
            bridge({"vocals": one, "drums": other})
    with pytest.raises(UserError, match="--arch xumx: starts from blstm"):
        bridge({"all": random_xumx()})


# --------------------------------------------------------------------------- folders and scripts


@pytest.fixture(scope="module")
def joint_folder(tmp_path_factory):
    """A model folder with one network for four sources."""
    folder = tmp_path_factory.mktemp("joint")
    network = random_xumx()
    save(
        {"sample_rate": 8000, "nfft": 256, "nhop": 64, "nb_channels": 2}, folder / "separator.json"
    )
    save({"args": {}, "network": network.made_with}, folder / "all.json")
    save(network.state_dict(), folder / "all.pth")
    return folder


def test_targets_of_a_joint_network(joint_folder):
    """Some of its sources: the estimates are those of a Wiener filter that knows of no others."""
    whole = load_separator(joint_folder)
    assert whole.targets == [*SOURCES] and load_separator(joint_folder, "all").targets == [*SOURCES]
    audio = torch.randn(2, 2, 9000)
    some = load_separator(joint_folder, ["bass", "vocals", "bass"])
    assert some.targets == ["bass", "vocals"] and list(some.target_models) == ["all"]

    class Two(nn.Module):
        sources = ("bass", "vocals")

        def forward(self, x):
            y = whole.networks[0](x).unflatten(1, (4, 2))
            return y[:, [2, 0]].flatten(1, 2)

    expected = Separator({"two": Two()}, **SMALL)
    residual = Separator({"two": Two()}, residual="drums", **SMALL)
    with torch.no_grad():
        assert torch.equal(some(audio), expected(audio))
        streamed = torch.cat(list(some.stream(audio[0].split(1000, -1))), dim=-1)
        assert sdr(expected(audio)[0], streamed) > 100
        rest = load_separator(joint_folder, ["bass", "vocals"], residual="drums")
        assert rest.targets == ["bass", "vocals", "drums"]
        assert torch.equal(rest(audio), residual(audio))
        later = Separator({"all": whole.networks[0]}, residual="rest", **SMALL).eval()
        later.select(["bass", "vocals"])
        assert later.targets == ["bass", "vocals", "rest"]
        assert torch.equal(later(audio), residual(audio))
    digests = {whole.fingerprint(), some.fingerprint(), rest.fingerprint()}
    digests.add(load_separator(joint_folder, ["vocals", "bass"]).fingerprint())
    assert len(digests) == 4
    with pytest.raises(UserError, match="has no target 'voc'; it has all, vocals, drums, bass"):
        load_separator(joint_folder, ["vocals", "voc"])


def test_a_joint_network_beside_others(tmp_path, joint_folder):
    for path in joint_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    make_model(tmp_path, ("speech", "vocals"), nfft=256, sample_rate=8000)
    assert load_separator(tmp_path, "vocals").names == ["vocals"]
    assert load_separator(tmp_path, ["drums", "speech"]).targets == ["drums", "speech"]
    with pytest.raises(UserError, match="two stems have the same name"):
        load_separator(tmp_path, ["drums", "vocals"])


def test_scripts_pick_targets_of_a_joint_network(tmp_path, joint_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_song(tmp_path / "data" / "test" / "Song", rate=8000)
    song = "data/test/Song/mixture.wav"
    model = ["--model", str(joint_folder), "--quiet"]
    assert separation.main([song, *model, "--targets", "vocals", "drums", "--outdir", "two"]) == 0
    assert {path.stem for path in Path("two/mixture").glob("*.wav")} == {"vocals", "drums"}
    assert separation.main([song, *model, "--targets", "vocals", "--outdir", "one"]) == 0
    names = {path.stem for path in Path("one/mixture").glob("*.wav")}
    assert names == {"vocals", "accompaniment"}
    audio, _ = soundfile.read(song, dtype="float32")
    separator = load_separator(joint_folder, "vocals", residual="accompaniment")
    with torch.no_grad():
        expected = separator(torch.from_numpy(audio.T.copy())[None])[0]
    for name, stem in zip(separator.targets, expected):
        found = soundfile.read(f"one/mixture/{name}.wav", dtype="float32")[0].T
        assert sdr(stem, found) > 70
    scores = evaluation.main(
        ["--root", "data", "--model", joint_folder, "--targets", "vocals", "--method", "model"]
    )
    stems = {index[-1] for index in scores.index}
    assert stems == {"vocals", "accompaniment"} and np.isfinite(scores["SDR"]).all()


def test_fine_tuning_from_separate_networks(tmp_path, monkeypatch):
    """The trunks take the weights of four trainings; the loss may be another."""
    monkeypatch.chdir(tmp_path)
    for n in range(3):
        write_song(tmp_path / "data" / "train" / f"Song {n}", rate=8000, seed=n)
    make_model(tmp_path / "four", nfft=256, sample_rate=8000)
    flags = ["--root", "data", "--target", "all", "--arch", "xumx", "--model", "four"]
    flags += ["--seq-dur", "0.5", "--batch-size", "2", "--loss", "xumx", "--lr", "1e-9", "--quiet"]
    flags += ["--samples-per-track", "2", "--epochs", "1"]
    train.main(flags)
    record, found = load("open-unmix/all.json"), load_separator("open-unmix")
    assert record["network"]["sources"] == [*SOURCES] and record["args"]["loss"] == "xumx"
    for target, network in load_separator("four").target_models.items():
        trunk = found.networks[0].trunks[SOURCES.index(target)]
        assert trunk.mask == "relu"
        for name, value in network.named_parameters():
            torch.testing.assert_close(trunk.get_parameter(name), value, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="--loss: --checkpoint goes on as the training began"):
        train.main(["--checkpoint", "open-unmix", "--loss", "mse"])
    train.main(["--checkpoint", "open-unmix", "--epochs", "2", "--quiet"])
    assert load("open-unmix/all.json")["args"]["loss"] == "xumx"


def test_it_is_trained_as_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(2):
        write_song(tmp_path / "data" / "train" / f"Song {n}", rate=8000, seed=n)
    with pytest.raises(UserError, match=r"--target vocals: the network estimates .* --target all"):
        train.main(["--root", "data", "--arch", "xumx", "--quiet"])
    with pytest.raises(UserError, match="--target voices: no such source in the data"):
        options = ["--arch-options", 'sources=["voices","drums"]']
        train.main(["--root", "data", "--arch", "xumx", "--target", "all", *options, "--quiet"])
