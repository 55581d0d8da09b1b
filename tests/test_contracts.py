"""What you hacked is what runs: each hack is trained, interrupted, resumed, loaded, separated with and scored.

A hack is a few lines run before the scripts, as a notebook would have them; `after` looks at what came of it.
"""

import functools
import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import FOLDER, random_network, remembering, sdr, write_song

import model
import train
import utils

SMALL = "--dataset {dataset} --root {root} --nfft 256 --nhop 64 --seq-dur 0.3 --samples-per-track 2"
SIZE = " --hidden-size 16"  # of what derives from OpenUnmix
SMALL += " --batch-size 2 --lr 0.01 --device cpu --quiet"

DRIVER = """
import sys
sys.path[:0] = [{scripts!r}, {scripts!r} + "/tests"]
from pathlib import Path
import numpy as np, soundfile, torch
from torch import nn
import data, model, train, utils, test
import eval as evaluation
from conftest import sdr
torch.set_num_threads(1)
flags = {flags!r}.split()

{hack}

def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

# trained in one go, and interrupted and resumed: the same to the bit
train.main([*flags, "--epochs", "3", "--output", "whole"])
train.main([*flags, "--epochs", "1", "--output", "open-unmix"])
train.main(["--checkpoint", "open-unmix", "--epochs", "3", "--quiet"])
[checkpoint] = Path("whole").glob("*.chkpnt")
target = checkpoint.stem
whole, resumed = (utils.load(Path(folder, checkpoint.name)) for folder in ("whole", "open-unmix"))
assert same(whole["state"], resumed["state"]), "the resumed training has other weights or states"
record = utils.load(f"open-unmix/{{target}}.json")
for name in record:
    if name.endswith("_history") and name != "train_time_history":
        assert record[name] == utils.load(f"whole/{{target}}.json")[name] and len(record[name]) == 3, name
assert Path(f"open-unmix/{{target}}.png").stat().st_size > 1000

# what is loaded is the module itself; the stems are its own output
separator = model.load_separator("open-unmix", residual=True)
network = separator.networks[0]
audio, rate = soundfile.read("song.wav", dtype="float32", always_2d=True)
x = torch.from_numpy(audio.T.copy())[None]
with torch.no_grad():
    X = model.stft(x.expand(-1, 2, -1), 256, 64)
    seen = X.abs().mean(1, keepdim=True) if separator.nb_channels == 1 else X.abs()
    V = network(seen).unflatten(1, (-1, seen.shape[1])).expand(-1, -1, 2, -1, -1)
    V = torch.cat([V, X.abs()[:, None] - V.sum(1, keepdim=True)], dim=1)
    windows = zip(V.split(300, -1), X.split(300, -1))
    Y = torch.cat([model.wiener(v, x, 1) for v, x in windows], dim=-1)
    expected = model.istft(Y, audio.shape[0], 256, 64)[0]

own = separator(x)[0].detach()
several = len(separator.targets) > 2
test.main(["song.wav", "--model", "open-unmix", "--quiet", "--device", "cpu", *["--residual"] * several])
names = separator.targets[:-1] + ["residual" if several or target != "vocals" else "accompaniment"]
for j, name in enumerate(names):
    stem = soundfile.read(f"stems/song/{{name}}.wav", dtype="float32")[0].T
    reference = expected[j].numpy()
    assert sdr(reference, own[j].numpy()) > 100, ("forward", name, sdr(reference, own[j].numpy()))
    assert sdr(reference, stem) > 100, ("test.py", name, sdr(reference, stem))

if {scored}:
    scores = evaluation.main(["--root", {root!r}, "--dataset", {dataset!r}, "--method", "model", "--device", "cpu",
                              "--outdir", "kept", "--model", "open-unmix"])
    assert np.isfinite(scores["SDR"]).all() and len(scores) > 1, scores

{after}
print("all of it holds")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny songs at 8 kHz in musdb's layout, also as train/ and valid/ of track folders."""
    root = tmp_path_factory.mktemp("songs")
    for n in range(4):
        write_song(root / "train" / f"Song {n}", rate=8000, seed=n)
    for n in range(2):
        write_song(root / "valid" / f"Valid {n}", rate=8000, seed=50 + n)
        write_song(root / "test" / f"Test {n}", rate=8000, seed=100 + n)
    return root


def run_hack(python, folder, root, hack, after="", flags="", dataset="musdb", scored=True):
    """Run a hack through all scripts in a process of its own."""
    rng = np.random.default_rng(0)
    soundfile.write(folder / "song.wav", rng.uniform(-0.3, 0.3, (24000, 2)), 8000)
    code = DRIVER.format(
        scripts=str(FOLDER),
        flags=f"{SMALL} {flags}".format(root=root, dataset=dataset),
        hack=textwrap.dedent(hack),
        after=textwrap.dedent(after),
        root=str(root),
        dataset=dataset,
        scored=scored,
    )
    status, printed = python(code, folder)
    assert status == 0 and printed.endswith("all of it holds\n"), printed
    return printed


UNET = """
class UNet(nn.Module):
    '''Nothing of ours: no fc1, no input_mean, a size of its own, a buffer that matters.'''

    def __init__(self, width=4, hidden_size=None):
        super().__init__()
        self.down = nn.Conv2d(2, width, 5, stride=2, padding=2)
        self.up = nn.Conv2d(width, 2, 3, padding=1)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
        h = torch.relu(self.down(x.log1p()))
        mask = nn.functional.interpolate(self.up(h), size=x.shape[-2:])
        return x * torch.sigmoid(mask + 0.01 * self.steps)

model.ARCHITECTURES["unet"] = UNet
"""

HACKS = {
    "a bare nn.Module": dict(
        hack=UNET,
        flags="--arch unet --arch-options width=6",
        after="assert type(network) is UNet and network.down.out_channels == 6 and network.steps > 0",
    ),
    "only forward is overridden": dict(
        hack="""
        class Smooth(model.OpenUnmix):
            def forward(self, x):
                y = super().forward(x)
                return (y + y.roll(1, -1) + y.roll(-1, -1)) / 3

        model.ARCHITECTURES["smooth"] = Smooth
        """,
        flags="--arch smooth" + SIZE,
    ),
    "options of its own": dict(
        hack="""
        class Attention(model.OpenUnmix):
            def __init__(self, nb_heads=1, kind="plain", **kwargs):
                super().__init__(**kwargs)
                self.kind = kind
                self.attention = nn.MultiheadAttention(self.hidden_size, nb_heads)

            def recur(self, h):
                return h + self.attention(h, h, h)[0] * (0.5 if self.kind == "half" else 1)

        model.ARCHITECTURES["attention"] = Attention
        """,
        flags="--arch attention --arch-options nb_heads=8 kind=half" + SIZE,
        after="assert network.attention.num_heads == 8 and network.kind == 'half'",
    ),
    "another recurrent layer": dict(
        hack="""
        class GRU(model.OpenUnmix):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.lstm = nn.GRU(self.hidden_size, self.hidden_size // 2, 2, bidirectional=True)

        model.ARCHITECTURES["gru"] = GRU
        """,
        flags="--arch gru" + SIZE,
        after="assert isinstance(network.lstm, nn.GRU)",
    ),
    "statistics as a plain attribute": dict(
        hack="""
        class Plain(nn.Module):
            def __init__(self, nb_bins, input_mean=None):
                super().__init__()
                self.mean = 1 + torch.as_tensor(input_mean or [0.0] * nb_bins)[:, None]
                self.layer = nn.Linear(nb_bins, nb_bins)

            def forward(self, x):
                return x * torch.sigmoid(self.layer((x / self.mean).mT).mT)

        model.ARCHITECTURES["plain"] = Plain
        """,
        flags="--arch plain",
    ),
    "several sources, in an order of their own": dict(
        hack="""
        class Joint(model.OpenUnmix):
            sources = ("other", "vocals", "bass")

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                size = len(self.sources) * self.nb_channels * self.nb_bins
                self.fc3, self.bn3 = nn.Linear(self.hidden_size, size, bias=False), nn.BatchNorm1d(size)

        model.ARCHITECTURES["joint"] = Joint
        """,
        flags="--arch joint --target all" + SIZE,
        after="assert separator.targets == ['other', 'vocals', 'bass', 'residual']",
    ),
    "X-UMX with its loss": dict(
        hack="",
        flags="--arch xumx --target all --loss xumx" + SIZE,
        after="""
        assert separator.targets == ["vocals", "drums", "bass", "other", "residual"]
        assert len(network.trunks) == 4 and record["args"]["loss"] == "xumx"
        """,
    ),
    "X-UMX of two sources, in mono": dict(
        hack="",
        flags="--arch xumx --target all --loss xumx --nb-channels 1"
        """ --arch-options sources=["bass","vocals"]""" + SIZE,
        after="assert separator.targets == ['bass', 'vocals', 'residual']",
    ),
    "several sources in mono": dict(
        hack="""
        class Joint(model.OpenUnmix):
            sources = ("vocals", "drums")

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                size = len(self.sources) * self.nb_channels * self.nb_bins
                self.fc3, self.bn3 = nn.Linear(self.hidden_size, size, bias=False), nn.BatchNorm1d(size)

        model.ARCHITECTURES["joint"] = Joint
        """,
        flags="--arch joint --target all --nb-channels 1" + SIZE,
    ),
    "a negative loss in the time domain, and a second metric": dict(
        hack="""
        def negative_sdr(network, x, y, args):
            X = model.stft(x, args.nfft, args.nhop)
            estimate = model.istft(network(X.abs()) * X.sgn(), x.shape[-1], args.nfft, args.nhop)
            return -10 * torch.log10(y.square().sum() / (y - estimate).square().sum())

        train.METRICS["mse"] = train.mse_loss
        train.LOSSES["mse"] = negative_sdr
        """,
        flags="--lr-decay-patience 0 --patience 5" + SIZE,
        after="""
        assert record["best_loss"] == min(record["valid_loss_history"])
        assert all(value > 0 for value in record["valid_mse_history"])
        """,
    ),
    "a moving average of the weights, AdamW with two groups, a cosine schedule": dict(
        hack="""
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        def make_state(network, args):
            weights = [p for p in network.parameters() if p.ndim > 1]
            others = [p for p in network.parameters() if p.ndim <= 1]
            groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.001}]
            optimizer = torch.optim.AdamW(groups, lr=args.lr)
            average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
            optimizer.register_step_post_hook(lambda *_: average.update_parameters(network))
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
            stopping = train.EarlyStopping(args.patience)
            return {"network": network, "average": average, "optimizer": optimizer,
                    "scheduler": scheduler, "stopping": stopping}

        train.make_state = make_state
        train.kept_network = lambda state: state["average"].module
        """,
        flags=SIZE,
        after="""
        assert record["lr_history"][0] > record["lr_history"][1] > record["lr_history"][2]
        groups = resumed["state"]["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        if record["best_epoch"] == 3:
            kept = {name.removeprefix("module."): value for name, value in resumed["state"]["average"].items()}
            for name, value in network.state_dict().items():
                assert torch.equal(value, kept[name]), name
        """,
    ),
    "an ordinary map-style dataset": dict(
        hack="""
        class Noise(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                if not 0 <= index < 4:
                    raise IndexError(index)
                rng = np.random.default_rng(index)
                y, z = rng.standard_normal((2, 2, 4000), np.float32)
                return torch.from_numpy(y + z), torch.from_numpy(y)

        train.make_datasets = lambda tracks, sources, args: (Noise(), Noise(), Noise())
        """,
        flags=SIZE,
    ),
    "another Wiener filter": dict(
        hack="""
        calls = []
        def mine(magnitudes, mixture, niter=1):
            calls.append(niter)
            return model.ratio_mask(magnitudes) * mixture[:, None]

        model.wiener = mine
        """,
        flags=SIZE,
        after="assert len(calls) > 10",
    ),
    "another layout": dict(
        hack="""
        def index_halves(root, split, target_file="vocals.wav"):
            tracks = data.index_trackfolder_var(root, "test" if split == "test" else "train", target_file)
            return tracks if split == "test" else [t for n, t in enumerate(tracks) if (n % 2 == 0) == (split == "valid")]

        data.LAYOUTS["halves"] = data.Layout(index_halves, "target_file", mix="own")
        """,
        dataset="halves",
        flags="--target-file other.wav" + SIZE,
        after="assert target == 'other'",
    ),
}


@pytest.mark.parametrize("name", HACKS)
def test_hack(name, python, root, tmp_path):
    run_hack(python, tmp_path, root, **HACKS[name])


def test_long_recording_without_stages(python, root, tmp_path):
    """Windows only where the recording is long, and a line says so."""
    hack = UNET + "model.LONG = 10**6"
    printed = run_hack(python, tmp_path, root, hack, flags="--arch unet", scored=False)
    assert "windows" not in printed
    after = """
    model.LONG, separator.wiener_win_len = 20, 10
    stems = torch.cat(list(separator.stream(x[0].split(1000, -1))), dim=-1)
    assert stems.shape == expected.shape and sdr(separator(x)[0].detach().numpy(), stems.numpy()) > 30
    """
    (tmp_path / "again").mkdir()
    printed = run_hack(
        python, tmp_path / "again", root, UNET, after=after, flags="--arch unet", scored=False
    )
    assert printed.count("separated in windows") == 1


REFUSED = {
    "an output of another shape": (
        """
        class Wrong(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(1, 1)
            def forward(self, x):
                return self.layer(x[:, :1, ..., None])[..., 0]
        model.ARCHITECTURES["wrong"] = Wrong
        """,
        "--arch wrong",
        "--arch wrong: gives (1, 1, 129, ",
    ),
    "state outside of parameters, buffers and arguments": (
        """
        class Secret(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.secret = nn.Linear(1, 1), torch.rand(())
            def forward(self, x):
                return x * torch.sigmoid(self.layer.weight) * self.secret
        model.ARCHITECTURES["secret"] = Secret
        """,
        "--arch secret",
        "loaded again it gives other numbers",
    ),
    "all targets of a network for one": ("", "--target all", "names no .sources for --target all"),
    "an option that nobody takes": (
        "",
        "--arch-options nb_heads=3",
        "--nb-heads: --arch blstm takes no such option",
    ),
    "a flag that the network does not take": (
        UNET,
        "--arch unet --mask relu",
        "--mask: --arch unet takes no",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(name, root, tmp_path):
    hack, flags, message = REFUSED[name]
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\nimport torch\nfrom torch import nn\nimport model, train, utils\n"
    flags = f"{SMALL} {flags}".format(root=root, dataset="musdb").split()
    code += f"{textwrap.dedent(hack)}\nutils.run(lambda: train.main({flags!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.rglob("*.pth"))


def test_a_hackers_own_error_is_shown_in_full(root, tmp_path):
    """A TypeError in somebody's network is theirs: a traceback, not one line of ours."""
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\nimport torch\nfrom torch import nn\nimport model, train, utils\n"
    code += textwrap.dedent("""
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)
        def forward(self, x):
            return x + None
    model.ARCHITECTURES["broken"] = Broken
    """)
    flags = f"{SMALL} --arch broken".format(root=root, dataset="musdb").split()
    code += f"utils.run(lambda: train.main({flags!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "Traceback" in done.stderr
        and "TypeError: unsupported" in done.stderr
    )


# ---------------------------------------------------- what is edited is what runs: no fast form hides it

PLAIN_STEREO = model.filter_sources


def no_window(n_fft, like):
    return torch.hamming_window(n_fft, device=like.device, dtype=like.dtype)


def half_of_it(v, R, x, ridge):
    return PLAIN_STEREO(v, R, x, ridge) / 2


def smooth_over_bins(Y, X, niter=1, level=None):
    return (Y + Y.roll(1, -2)) / 2


class Halved(model.Separator):
    def forward(self, audio):
        return super().forward(audio) / 2


class Centred(model.OpenUnmix):
    def join(self, h, context):
        return super().join(h - h.mean(0), context)


class Levelled(model.OpenUnmix):
    def encode(self, x):
        return super().encode(x / x.amax((1, 2, 3), keepdim=True))


EDITS = {  # (where, what, by what), and whether a line says that it is slow
    "the window": ((model, "stft_window", no_window), False),
    "the Wiener formula": ((model, "filter_sources", half_of_it), True),
    "EM over neighbouring bins": ((model, "expectation_maximization", smooth_over_bins), True),
    "Separator.forward": ((model, "Separator", Halved), True),
    "a mean over time": ((model, "OpenUnmix", Centred), False),
    "a level of the whole": ((model, "OpenUnmix", Levelled), False),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_plain_forms(name, monkeypatch, capfd):
    """A stream of 100 s of frames is `forward` by the plain forms, as they are now."""
    (owner, attribute, replacement), said = EDITS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    network = model.OpenUnmix if attribute == "OpenUnmix" else None
    torch.manual_seed(0)
    networks = {}
    for target in ("vocals", "drums"):
        weights = random_network(1, nb_bins=129, max_bin=129, hidden_size=16).state_dict()
        networks[target] = (network or model.OpenUnmix)(nb_bins=129, hidden_size=16).eval()
        networks[target].load_state_dict(weights)
    separator = model.Separator(networks, n_fft=256, n_hop=64, wiener_win_len=200).eval()
    audio = torch.randn(2, 80_000) * torch.linspace(0.01, 0.1, 80_000)
    with torch.no_grad():
        monkeypatch.setattr(model, "FAST", False)
        expected = separator(audio[None])[0]
        monkeypatch.setattr(model, "FAST", True)
        found = torch.cat([*separator.stream(audio.split(3000, -1))], dim=-1)
    assert sdr(expected, found) > 80
    assert ("in one piece" in capfd.readouterr().out) == said


def notebook(code):
    """A function or class as a cell would define it."""
    names = {"__name__": "__main__", "model": model}
    exec(textwrap.dedent(code), names)
    return names["mine"]


def test_what_a_notebook_redefines_is_noticed():
    networks = {name: random_network(1, nb_bins=129, hidden_size=16) for name in ("a", "b")}
    separator = model.Separator(networks, n_fft=256, n_hop=64)
    digests = [separator.fingerprint()]
    for factor in (1.0, 1.0, 0.5):
        separator.wiener = notebook(f"mine = lambda V, X, niter=1: {factor} * V * X[:, None]")
        digests.append(separator.fingerprint())
    assert digests[1] == digests[2] and len({*digests}) == 3
    for sign in "+-":
        kind = notebook(f"""
        class mine(model.OpenUnmix):
            def decode(self, h, x):
                return super().decode(h, x) {sign} 0.1
        """)
        network = kind(nb_bins=129, hidden_size=16)
        digests.append(model.Separator({"a": network}, n_fft=256, n_hop=64).fingerprint())
    assert len({*digests}) == 5


# -------------------------------------------------------------- a model and the code that it was made by


@pytest.fixture
def small(root, tmp_path, monkeypatch):
    """`train.main` on tiny songs, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    flags = (SMALL.replace("--quiet", "") + SIZE).format(root=root, dataset="musdb").split()
    return functools.partial(small_training, flags)


def small_training(flags, *more, sized=True):
    if not sized:  # a model has its own
        at = [flags.index(name) for name in ("--nfft", "--nhop", "--hidden-size")]
        flags = [word for n, word in enumerate(flags) if not {n, n - 1} & {*at}]
    return train.main([*flags, "--epochs", "1", *more])


def test_another_rate_in_a_folder(small, root):
    small()
    with pytest.raises(
        utils.UserError, match=r"holds vocals with sample_rate 8000; choose another"
    ):
        small("--target", "drums", "--sample-rate", "4000")
    settings = json.loads(Path("open-unmix/separator.json").read_text())
    utils.save({**settings, "sample_rate": 4000}, "open-unmix/separator.json")
    with pytest.raises(utils.UserError, match=r"was trained with sample_rate 8000, separator.json"):
        model.load_separator("open-unmix")


def test_a_target_twice_in_a_folder(small):
    small()
    with pytest.raises(
        utils.UserError, match=r"holds vocals already, in vocals.pth; choose another"
    ):
        small("--arch", "xumx", "--target", "all")
    small("--arch", "xumx", "--target", "all", "--output", "all")
    with pytest.raises(utils.UserError, match=r"holds drums already, in all.pth; choose another"):
        small("--target", "drums", "--output", "all")


@pytest.mark.parametrize("record", [[], 5, {"network": "x"}, {"network": {"sources": 5}}])
def test_a_strangers_record_in_a_folder(small, record):
    """Whatever is in it: files of one name are one target, and more cannot be known."""
    small()
    utils.save(record, "open-unmix/vocals.json")
    small("--target", "drums")
    utils.save([], "open-unmix/separator.json")
    with pytest.raises(utils.UserError, match=r"with sample_rate None; choose another"):
        small("--target", "bass")


def test_a_class_changed_since_training(small, monkeypatch, capsys):
    """A line says so; what the class had for defaults is on record."""
    small("--arch", "xumx", "--loss", "xumx", "--target", "all", "--output", "all")
    monkeypatch.setattr(
        model.XUMX.__init__, "__defaults__", (("drums", "bass", "other", "vocals"),)
    )
    assert model.load_separator("all").targets == [*utils.SOURCES]
    assert "gives other numbers" not in capsys.readouterr().out
    encode = model.OpenUnmix.encode
    monkeypatch.setattr(model.OpenUnmix, "encode", lambda self, x: encode(self, x.log1p()))
    model.load_separator("all")
    assert "all.pth: model.py gives other numbers than in training" in capsys.readouterr().out


# ------------------------------------------------------------------- what a training's parts may be


def lambda_rates(network, args):
    optimizer = torch.optim.Adam(
        [
            {"params": network.fc1.parameters(), "lr": args.lr / 100, "weight_decay": 0},
            {
                "params": network.lstm.parameters(),
                "lr": args.lr,
                "weight_decay": args.weight_decay,
            },
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (epoch + 1))
    return {"optimizer": optimizer, "scheduler": schedule}


def one_cycle(network, args):
    optimizer = torch.optim.Adam(network.parameters())
    kind = torch.optim.lr_scheduler.OneCycleLR
    return {"optimizer": optimizer, "scheduler": kind(optimizer, args.lr, total_steps=2)}


def half_a_cosine(network, args):
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    kind = torch.optim.lr_scheduler.CosineAnnealingLR
    return {"optimizer": optimizer, "scheduler": kind(optimizer, T_max=args.epochs)}


def no_schedule(network, args):
    return {"optimizer": torch.optim.Adam(network.parameters(), lr=args.lr)}


def use_parts(monkeypatch, parts):
    def make_state(network, args):
        stopping = train.EarlyStopping(args.patience)
        return {"network": network, **parts(network, args), "stopping": stopping}

    monkeypatch.setattr(train, "make_state", make_state)


def test_a_rate_by_hand_keeps_groups_and_schedule(small, monkeypatch):
    use_parts(monkeypatch, lambda_rates)
    small()
    more = ["--lr", "0.0005", "--weight-decay", "0.1"]
    train.main(["--checkpoint", "open-unmix", "--epochs", "3", *more])
    checkpoint = utils.load("open-unmix/vocals.chkpnt")
    slow, fast = checkpoint["state"]["optimizer"]["param_groups"]
    assert checkpoint["record"]["lr_history"] == pytest.approx([1e-4, 5e-4, 5e-4 * 2 / 3])
    assert slow["lr"] == pytest.approx(5e-4 / 2) and fast["lr"] == pytest.approx(5e-2 / 2)
    assert (slow["weight_decay"], fast["weight_decay"]) == (0, 0.1)


def test_a_schedule_that_ends(small, monkeypatch):
    use_parts(monkeypatch, one_cycle)
    small()
    train.main(["--checkpoint", "open-unmix", "--epochs", "2"])
    with pytest.raises(utils.UserError, match="--epochs 3: the schedule ends at 2"):
        train.main(["--checkpoint", "open-unmix", "--epochs", "3"])


def test_a_cosine_does_not_rise_again(small):
    small("--schedule", "cosine")
    with pytest.raises(utils.UserError, match="--epochs 2: the schedule ends at 1"):
        train.main(["--checkpoint", "open-unmix", "--epochs", "2"])


def test_what_a_cosine_does_not_use_is_refused(small):
    """Neither as it begins nor as it goes on."""
    small("--schedule", "cosine", "--epochs", "2", "--patience", "1")
    more = ["--lr-decay-patience", "3"]
    with pytest.raises(utils.UserError, match="--lr-decay-patience: is not used with --schedule"):
        small("--schedule", "cosine", *more)
    checkpoint = utils.load("open-unmix/vocals.chkpnt")
    checkpoint["record"]["epochs_trained"] = 1  # as if it had been interrupted
    utils.save(checkpoint, Path("open-unmix/vocals.chkpnt"))
    with pytest.raises(utils.UserError, match="--lr-decay-patience: its schedule has no such"):
        train.main(["--checkpoint", "open-unmix", *more])
    with pytest.raises(utils.UserError, match="--schedule: --checkpoint goes on as"):
        train.main(["--checkpoint", "open-unmix", "--schedule", "plateau"])


def test_a_cosine_is_as_long_as_it_began(small, monkeypatch):
    """Whatever --epochs its training was continued with in between."""
    use_parts(monkeypatch, half_a_cosine)
    small()
    checkpoint = utils.load("open-unmix/vocals.chkpnt")
    checkpoint["record"]["args"]["epochs"] = 2
    utils.save(checkpoint, Path("open-unmix/vocals.chkpnt"))
    with pytest.raises(utils.UserError, match="--epochs 3: the schedule ends at 1"):
        train.main(["--checkpoint", "open-unmix", "--epochs", "3"])


def test_a_network_keeps_its_own_dropout(small, monkeypatch):
    """An argument of that name is a class's own, too; the flag wins over its default."""

    class Mine(model.OpenUnmix):
        def __init__(self, *args, dropout=0.25, **kwargs):
            super().__init__(*args, dropout=dropout, **kwargs)

    monkeypatch.setitem(model.ARCHITECTURES, "mine", Mine)
    for flags, dropout in (([], 0.25), (["--dropout", "0"], 0)):
        small("--arch", "mine", *flags)
        record = json.loads(Path("open-unmix/vocals.json").read_text())
        assert record["network"]["dropout"] == dropout


def test_another_rate_for_schedules_in_turn(small, monkeypatch):
    """--lr is that of all parts of a schedule, those to come, too."""

    def in_turn(network, args):
        rates = torch.optim.lr_scheduler
        optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
        parts = [rates.LambdaLR(optimizer, lambda _: 1), rates.LambdaLR(optimizer, lambda _: 0.5)]
        return {"optimizer": optimizer, "scheduler": rates.SequentialLR(optimizer, parts, [2])}

    use_parts(monkeypatch, in_turn)
    small()
    train.main(["--checkpoint", "open-unmix", "--epochs", "4", "--lr", "0.001"])
    rates = utils.load("open-unmix/vocals.json")["lr_history"]
    assert rates == pytest.approx([0.01, 0.001, 0.0005, 0.0005])


def test_no_schedule(small, monkeypatch):
    use_parts(monkeypatch, no_schedule)
    small()
    train.main(["--checkpoint", "open-unmix", "--epochs", "2"])
    assert utils.load("open-unmix/vocals.json")["lr_history"] == [0.01, 0.01]


def test_metrics_that_come_and_go(small, monkeypatch):
    small()
    monkeypatch.setitem(train.METRICS, "peak", lambda network, x, y, args: x.max())
    train.main(["--checkpoint", "open-unmix", "--epochs", "2"])
    monkeypatch.delitem(train.METRICS, "peak")
    train.main(["--checkpoint", "open-unmix", "--epochs", "3"])
    peaks = utils.load("open-unmix/vocals.json")["valid_peak_history"]
    assert np.isnan([peaks[0], peaks[2]]).all() and peaks[1] > 0


def test_a_metric_that_draws_again(small, monkeypatch):
    """Metrics share a run of the network; a second call within one is a run of its own."""

    def uncertainty(network, x, y, args):
        network.train()
        runs = torch.stack([network(train.magnitudes(x, args)) for _ in range(3)])
        network.eval()
        return runs.std(0).mean()

    monkeypatch.setitem(train.METRICS, "uncertainty", uncertainty)
    monkeypatch.setitem(train.METRICS, "loss", uncertainty)  # this name is the loss's
    small()
    record = utils.load("open-unmix/vocals.json")
    assert record["valid_uncertainty_history"][0] > 0
    assert record["valid_loss_history"][0] != record["valid_uncertainty_history"][0]


@pytest.mark.parametrize("kind", ["an argument more", "what forward leaves behind"])
def test_auxiliary_losses(kind, small, monkeypatch, capsys):
    """There is nothing to beat by an estimate alone; they train."""
    forward = model.OpenUnmix.forward

    def keeping(self, x, more=False):
        y = forward(self, x)
        self.last = y.square()
        return (y, self.last) if more else y

    def loss(network, x, y, args):
        X, Y = train.magnitudes(x, args), train.magnitudes(y, args)
        if kind == "an argument more":
            V, last = network(X, more=True)
        else:
            V, last = network(X), network.last
        return (V - Y).square().mean() + (last - Y).abs().mean()

    monkeypatch.setattr(model.OpenUnmix, "forward", keeping)
    monkeypatch.setitem(train.LOSSES, "mse", loss)
    small()
    printed = capsys.readouterr().out
    assert "to beat" not in printed and "epoch 1/1" in printed


def test_a_loss_that_feeds_no_magnitudes(small, monkeypatch, capsys):
    def loss(network, x, y, args):
        X, Y = (train.magnitudes(z, args).log1p() for z in (x, y))
        return (network(X) - Y).square().mean()

    monkeypatch.setitem(train.LOSSES, "mse", loss)
    small()
    assert "the loss gives the network no magnitudes of x" in capsys.readouterr().out


class Remembering(model.OpenUnmix):
    """A state that one recording leaves to the next."""

    def forward(self, x):
        y = super().forward(x) + getattr(self, "state", 0)
        self.state = y.mean().detach()
        return y


def test_state_between_recordings_is_refused(small, monkeypatch):
    monkeypatch.setitem(model.ARCHITECTURES, "blstm", Remembering)
    with pytest.raises(utils.UserError, match="called again it gives other numbers"):
        small()
    assert not list(Path().rglob("*.pth"))


NOISE = torch.rand(2, 4000) - 0.5
EXAMPLES = {
    "double precision": ((NOISE.double(), NOISE), "a mixture that is no float32 tensor"),
    "NumPy": ((NOISE, NOISE.numpy()), "a target that is no float32 tensor"),
    "units of 16 bits": ((NOISE * 32768, NOISE), "samples of 1.6"),
    "NaN": ((NOISE * torch.nan, NOISE), "samples of nan"),
    "another length": ((NOISE, NOISE[:, :3000]), "4000 samples of mixture and 3000 of target"),
    "time first": ((NOISE.T, NOISE.T), "4000 channels of mixture and 4000 of target"),
    "mono": ((NOISE[:1], NOISE[:1]), "1 channels of mixture and 1 of target; --nb-channels is 2"),
    "mono and stereo": ((NOISE, NOISE[:1]), "2 channels of mixture and 1 of target"),
    "no pair": ((NOISE,), "is no pair"),
    "a batch": ((NOISE[None], NOISE[None]), "a mixture that is no float32 tensor"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_wrong_kind(name, small, monkeypatch):
    example, message = EXAMPLES[name]
    datasets = [[example] * 4] * 3
    monkeypatch.setattr(train, "make_datasets", lambda tracks, sources, args: datasets)
    with pytest.raises(utils.UserError, match=f"vocals: the first training example .*{message}"):
        small()


def test_what_a_checkpoint_can_not_hold(small, monkeypatch):
    """It is said before the first epoch, not when somebody wants to resume."""
    parser = train.make_parser

    def with_path():
        made = parser()
        made.add_argument("--noise", type=Path, default=Path("noise"))
        return made

    monkeypatch.setattr(train, "make_parser", with_path)
    with pytest.raises(utils.UserError, match=r"vocals.chkpnt: could not be loaded, for pathlib"):
        small()


def test_event_files_of_two_trainings(small):
    pytest.importorskip("tensorboard")
    for _ in range(2):
        small("--tensorboard")
    for folder in ("open-unmix", "open-unmix/previous/1"):
        [events] = Path(folder, "vocals.tensorboard").iterdir()
        assert events.stat().st_size > 100


# ----------------------------------------------------- what one replaces in a notebook, or in a layer


def two_targets(**settings):
    networks = {
        name: remembering(random_network(j, nb_bins=129, hidden_size=16, **settings))
        for j, name in enumerate(("a", "b"))
    }
    return model.Separator(networks, n_fft=256, n_hop=64)


@pytest.mark.parametrize(
    "replace",
    {
        "a constant": lambda patch: patch.setattr(model, "EPS", 1e3),
        "a table": lambda patch: patch.setitem(model.MASKS, "sigmoid", torch.relu),
        "a function": lambda patch: patch.setattr(model, "stft_window", torch.hamming_window),
        "a second one": lambda patch: patch.setattr(model, "magnitude", lambda X, n: X.abs() ** 2),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_replaced_in_model_is_noticed(replace, monkeypatch):
    separator = two_targets()
    monkeypatch.setattr(model, "magnitude", lambda X, nb_channels: X.abs())
    before = separator.fingerprint()
    assert separator.fingerprint() == before
    monkeypatch.setitem(model.ARCHITECTURES, "another", model.XUMX)  # of which nothing is used here
    assert separator.fingerprint() == before
    replace[1](monkeypatch)
    assert separator.fingerprint() != before


class InChunks(model.OpenUnmix):
    """What only long recordings show: forward is the stages of 100 frames at a time."""

    def forward(self, x):
        return torch.cat([super(InChunks, self).forward(part) for part in x.split(100, -1)], -1)


def test_a_forward_above_the_stages_is_what_runs(monkeypatch, capfd):
    monkeypatch.setitem(model.ARCHITECTURES, "chunks", InChunks)
    separator, audio = two_targets(arch="chunks"), 0.1 * torch.randn(2, 20000)
    with torch.no_grad():
        expected = separator(audio[None])[0]
        stages = separator.networks[0].decode(torch.zeros(3, 1, 16), torch.ones(1, 2, 129, 3))
    assert stages.shape == (1, 2, 129, 3) and not model.has_stages(separator.networks[0])
    assert model.has_stages(model.make_network(nb_bins=129, hidden_size=16))
    assert model.has_stages(model.make_network("xumx", nb_bins=129, hidden_size=16))
    found = torch.cat([*separator.stream(audio.split(3000, -1))], dim=-1)
    assert sdr(expected, found) > 100


def test_a_separators_forward_is_what_runs(monkeypatch):
    """One that works in pieces of a second, which a trial of 12 hops can't show."""

    def in_pieces(self, audio):
        return torch.cat([plain(self, part) for part in audio.split(8000, -1)], dim=-1)

    plain, audio = model.Separator.forward, 0.1 * torch.randn(2, 20000)
    monkeypatch.setattr(model.Separator, "forward", in_pieces)
    separator = two_targets()
    with torch.no_grad():
        expected = separator(audio[None])[0]
    found = torch.cat([*separator.stream([audio])], dim=-1)
    assert sdr(expected, found) > 100


@pytest.mark.parametrize("layer", ["fc1", "bn3", "lstm"])
def test_a_layers_own_forward_is_what_runs(layer):
    network = remembering(random_network(1, nb_bins=129, hidden_size=16))
    module, x = getattr(network, layer), torch.rand(1, 2, 129, 20)
    plain = module.forward
    twice = lambda h: 2 * plain(h) if layer != "lstm" else (2 * plain(h)[0], None)  # noqa: E731
    with torch.no_grad():
        before = network(x)
        module.forward = twice
        assert not torch.allclose(network(x), before)


def test_batch_norm_is_updated_once(monkeypatch):
    """Also without gradients, on a recording that is taken in blocks when one separates it."""
    network = model.make_network(nb_bins=9, hidden_size=8, nb_layers=1).train()
    network(torch.rand(1, 2, 9, 2500))
    with torch.no_grad():
        network(torch.rand(1, 2, 9, 2500))
    updates = [bn.num_batches_tracked.item() for bn in (network.bn1, network.bn2, network.bn3)]
    assert updates == [2, 2, 2]


def test_a_target_twice_or_a_name_that_is_taken():
    with pytest.raises(utils.UserError, match="inst is to have a target twice: a, a"):
        model.aggregation(["a", "b"], '{"inst": ["a", "a"]}')
    with pytest.raises(utils.UserError, match="accompaniment: is all but vocals"):
        two_targets().add_residual("accompaniment")


def test_sources_may_be_none():
    network = random_network(1, nb_bins=129, hidden_size=16)
    network.sources = None
    assert model.Separator({"vocals": network}, n_fft=256, n_hop=64).targets == ["vocals"]


# -------------------------------------------------------------- trainings that go on, or are compared


def test_several_seeds_are_those_of_one_command(small):
    """An earlier command's are neither compared nor continued; one of them goes on by itself."""
    small("--seed", "1", "2")
    small("--seed", "3", "4", "--loss", "l1")
    record = utils.load("open-unmix/vocals.json")
    assert record["args"]["loss"] == "l1" and record["args"]["seed"] in (3, 4)
    assert not [*Path("open-unmix").glob("seed-[12]/vocals.*")]
    other = Path("open-unmix/seed-4/vocals.chkpnt").read_bytes()
    train.main(["--checkpoint", "open-unmix/seed-3", "--epochs", "2"])
    assert utils.load("open-unmix/seed-3/vocals.json")["epochs_trained"] == 2
    assert not [*Path("open-unmix/seed-3").glob("seed-*")]
    assert Path("open-unmix/seed-4/vocals.chkpnt").read_bytes() == other


@pytest.mark.parametrize(
    "flags,message",
    {
        "--random-track-mix": "--random-track-mix: is not used with --dataset musdb",
        "--ext .flac": "--ext: is not used with --dataset musdb",
    }.items(),
)
def test_flags_that_would_do_nothing(flags, message, small):
    small()
    with pytest.raises(utils.UserError, match=message):
        train.main(["--checkpoint", "open-unmix", "--epochs", "2", *flags.split()])


def test_examples_of_a_training_that_goes_on(small):
    small()
    checkpoint = utils.load("open-unmix/vocals.chkpnt")  # as the preset "tutorial" leaves it
    checkpoint["record"]["args"]["samples_per_epoch"] = 4
    utils.save(checkpoint, Path("open-unmix/vocals.chkpnt"))
    args = ["--checkpoint", "open-unmix", "--epochs", "2", "--samples-per-track", "3"]
    train.main(args)
    saved = utils.load("open-unmix/vocals.json")["args"]
    assert (saved["samples_per_epoch"], saved["samples_per_track"]) == (None, 3)


def test_a_dry_run_is_no_beginning(small):
    small("--dry-run")
    with pytest.raises(utils.UserError, match="is of a dry run; train anew"):
        train.main(["--checkpoint", "open-unmix", "--epochs", "2"])


def test_what_is_no_longer_there(small, monkeypatch, capsys):
    """A training with an average of its weights does not go on without; other code is said."""
    plain = train.make_state

    def with_average(network, args):
        average = torch.optim.swa_utils.AveragedModel(network)
        return {**plain(network, args), "average": average}

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_state", with_average)
        small()
    with pytest.raises(utils.UserError, match="no longer has average, which it began with"):
        train.main(["--checkpoint", "open-unmix", "--epochs", "2"])
    monkeypatch.setattr(train, "make_state", with_average)
    monkeypatch.setattr(train, "code_fingerprint", lambda: "another")
    capsys.readouterr()
    train.main(["--checkpoint", "open-unmix", "--epochs", "2"])
    assert "vocals: the scripts are other ones than in its last epoch" in capsys.readouterr().out
    assert utils.load("open-unmix/vocals.json")["code"] == "another"


def test_kept_network_must_fit(small, monkeypatch):
    monkeypatch.setattr(
        train,
        "kept_network",
        lambda state: torch.optim.swa_utils.AveragedModel(state["network"]),
    )
    with pytest.raises(utils.UserError, match=r"kept_network: .*return an average's \.module"):
        small()


def test_metrics_of_any_kind(small, monkeypatch):
    """NumPy's numbers, those of training alone, and those that set what the network is."""
    plain, validate = train.train, train.validate

    def with_norm(*args):
        return np.float64(plain(*args))

    def with_more(*args):
        return {"gradient_norm": torch.tensor(3.0), **validate(*args)}

    class Switched(model.OpenUnmix):
        silent = False

        def forward(self, x):
            return super().forward(x) * (not self.silent)

    def of_silence(network, x, y, args):
        network.silent = True
        value = train.compute_sdr(network, x, y, args)
        network.silent = False
        return value

    monkeypatch.setitem(model.ARCHITECTURES, "switched", Switched)
    monkeypatch.setattr(train, "train", with_norm)
    monkeypatch.setattr(train, "validate", with_more)
    monkeypatch.setitem(train.METRICS, "silence", of_silence)
    small("--arch", "switched")
    train.main(["--checkpoint", "open-unmix", "--epochs", "2"])
    record = utils.load("open-unmix/vocals.json")
    assert record["gradient_norm_history"] == [3, 3]
    assert record["valid_silence_history"] == pytest.approx([0, 0], abs=1e-3)


class Draws(torch.utils.data.Dataset):
    """An ordinary dataset whose examples are drawn by whatever generator."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.rand(2, 2400) + np.random.rand() + random.random()
        return 0.1 * x, 0.05 * x


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_draws_goes_on_to_the_bit(workers, small, monkeypatch):
    fixed = torch.utils.data.TensorDataset(*0.1 * torch.rand(2, 2, 2, 2400))
    monkeypatch.setattr(train, "make_datasets", lambda *_: (Draws(), fixed, fixed))
    flags = ["--nb-workers", str(workers), "--sample-rate", "8000"]
    small(*flags, "--epochs", "3", "--output", "whole")
    small(*flags)
    train.main(["--checkpoint", "open-unmix", "--epochs", "3"])
    histories = [
        utils.load(f"{name}/vocals.json")["train_loss_history"] for name in ("whole", "open-unmix")
    ]
    assert histories[0] == histories[1] and len({*histories[0]}) == 3


def test_statistics_are_each_targets_own(small, monkeypatch):
    plain = train.make_datasets

    def louder(tracks, sources, args):
        sets = plain(tracks, sources, args)
        factor = 10 if sources == ["drums"] else 1
        return (*sets[:2], [(factor * x, y) for x, y in sets[2]])

    monkeypatch.setattr(train, "make_datasets", louder)
    small("--target", "vocals", "drums")
    means = [
        utils.load(f"open-unmix/{t}.pth")["input_mean"].mean().item() for t in ("vocals", "drums")
    ]
    assert means[1] / means[0] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    "flags,message",
    {
        "--arch-options mask=relu": "--arch-options mask: follows from the other flags",
        "--arch-options nb_bins=9": "--arch-options nb_bins: follows from the other flags",
    }.items(),
)
def test_options_that_are_flags(flags, message, small):
    with pytest.raises(utils.UserError, match=message):
        small(*flags.split())


def test_models_to_start_from(small):
    small("--arch", "xumx", "--target", "all", "--output", "joint")
    small("--model", "joint", "--target", "all", "--output", "tuned", sized=False)
    with pytest.raises(utils.UserError, match=r"vocals is one of several sources.*--target all"):
        small("--model", "joint", "--target", "vocals", sized=False)


def test_fine_tuning_in_place_that_was_cut_off(small, capsys):
    """What was begun goes on; what was not had its weights moved away, and a line says so."""
    several = ["--target", "vocals", "drums", "--output", "two"]
    small(*several)
    small("--model", "two", *several, sized=False)
    for path in Path("two").glob("drums.*"):
        path.unlink()
    capsys.readouterr()
    train.main(["--checkpoint", "two", "--epochs", "2"])
    assert "drums: was to start from two, and its weights there are in" in capsys.readouterr().out
    assert utils.load("two/vocals.json")["epochs_trained"] == 2


def test_other_magnitudes_in_separation_are_said(small, monkeypatch, capsys):
    small()
    assert "other magnitudes" not in capsys.readouterr().out
    monkeypatch.setattr(model, "magnitude", lambda X, nb_channels: X.abs() ** 2)
    small("--output", "other")
    said = "vocals: separation gives the network other magnitudes than training does"
    assert said in capsys.readouterr().out
