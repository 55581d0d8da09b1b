"""What you hacked is what runs: each hack is trained, interrupted, resumed, loaded, separated with and scored.

A hack is a few lines run before the scripts, as a notebook would have them; `after` looks at what came of it.
"""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile
from conftest import FOLDER, write_song

SMALL = "--dataset {dataset} --root {root} --nfft 256 --nhop 64 --seq-dur 0.3 --samples-per-track 2"
SIZE = " --hidden-size 16"  # of what derives from OpenUnmix
SMALL += " --batch-size 2 --lr 0.01 --device cpu --quiet"

DRIVER = """
import sys
sys.path.insert(0, {scripts!r})
from pathlib import Path
import numpy as np, soundfile, torch
from torch import nn
import data, model, train, utils, test
import eval as evaluation
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

def sdr(reference, estimate):
    error = np.sum((reference - estimate) ** 2)
    return 10 * np.log10(np.sum(reference**2) / error) if error else np.inf

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


def run_hack(folder, root, hack, after="", flags="", dataset="musdb", scored=True):
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
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "all of it holds" in done.stdout, done.stdout + done.stderr
    return done.stdout


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
def test_hack(name, root, tmp_path):
    run_hack(tmp_path, root, **HACKS[name])


def test_long_recording_without_stages(root, tmp_path):
    """Windows only where the recording is long, and a line says so."""
    hack = UNET + "model.LONG = 10**6"
    printed = run_hack(tmp_path, root, hack, flags="--arch unet", scored=False)
    assert "windows" not in printed
    after = """
    model.LONG, separator.wiener_win_len = 20, 10
    stems = torch.cat(list(separator.stream(x[0].split(1000, -1))), dim=-1)
    assert stems.shape == expected.shape and sdr(separator(x)[0].detach().numpy(), stems.numpy()) > 30
    """
    (tmp_path / "again").mkdir()
    printed = run_hack(
        tmp_path / "again", root, UNET, after=after, flags="--arch unet", scored=False
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
