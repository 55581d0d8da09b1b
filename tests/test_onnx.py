"""ONNX files: what they hold, that T is free, separation with them, and what is refused."""

import builtins
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import test
import torch
from conftest import FOLDER, make_model, random_network, remembering, run_script, sdr
from torch import nn

import model
import utils
from model import OpenUnmix, Separator, export_onnx, load_onnx, load_separator
from utils import UserError, load

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL = dict(nb_bins=129, hidden_size=16)
SETTINGS = dict(n_fft=256, n_hop=64, sample_rate=8000)


class Joint(OpenUnmix):
    """README's recipe: a mask for each of several sources."""

    sources = ("drums", "lead [1]", "bass")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size = len(self.sources) * self.nb_channels * self.nb_bins
        self.fc3, self.bn3 = nn.Linear(self.hidden_size, size, bias=False), nn.BatchNorm1d(size)


class UNet(nn.Module):
    """README's recipe: nothing of ours."""

    def __init__(self, nb_channels=2, width=4):
        super().__init__()
        self.down = nn.Conv2d(nb_channels, width, 5, stride=2, padding=2)
        self.up = nn.Conv2d(width, nb_channels, 3, padding=1)

    def forward(self, x):
        h = torch.relu(self.down(x.log1p()))
        mask = nn.functional.interpolate(self.up(h), size=x.shape[-2:])
        return x * torch.sigmoid(mask)


class GRU(OpenUnmix):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lstm = nn.GRU(self.hidden_size, self.hidden_size // 2, 2, bidirectional=True)


class Attention(OpenUnmix):
    """PyTorch writes its reshapes for the T that it is traced with."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = nn.MultiheadAttention(self.hidden_size, 4)

    def recur(self, h):
        return h + self.attention(h, h, h)[0]


class Inverse(UNet):
    """An operation that ONNX has not."""

    def forward(self, x):
        return x * torch.linalg.qr(x)[0].sum()


class Counts(UNet):
    """How often it is called decides what it gives: a file can't hold that."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


@pytest.fixture
def networks(monkeypatch):
    for kind in (Joint, UNet, GRU, Attention, Inverse, Counts):
        monkeypatch.setitem(model.ARCHITECTURES, kind.__name__, kind)

    def make(arch, **settings):
        if arch in ("blstm", "Joint", "GRU"):
            return remembering(random_network(7, arch=arch, **SMALL, **settings))
        if arch in ("conv", "Attention"):
            return random_network(7, arch=arch, **SMALL, **settings)
        torch.manual_seed(7)
        return model.make_network(arch, **settings).eval()

    return make


KINDS = {
    "blstm": dict(arch="blstm"),
    "relu mask": dict(arch="blstm", mask="relu"),
    "mono": dict(arch="blstm", nb_channels=1),
    "unidirectional": dict(arch="blstm", unidirectional=True),
    "joint": dict(arch="Joint"),
    "joint in mono": dict(arch="Joint", nb_channels=1),
    "conv": dict(arch="conv"),
    "causal conv": dict(arch="conv", unidirectional=True),
    "another recurrent layer": dict(arch="GRU"),
    "a hacker's own": dict(arch="UNet"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_length(kind, networks, tmp_path):
    """onnxruntime gives the network's output to 1e-5, however many frames; nothing else is asked."""
    settings = KINDS[kind]
    network, nb_channels = networks(**settings), settings.get("nb_channels", 2)
    separator = Separator({"x": network}, **SETTINGS, nb_channels=nb_channels, residual=True)
    export_onnx(separator, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    metadata = {key: json.loads(text) for key, text in metadata.items()}
    assert metadata == {
        "targets": list(getattr(network, "sources", ["x"])),
        "sample_rate": 8000,
        "nfft": 256,
        "nhop": 64,
        "nb_channels": nb_channels,
    }
    loaded = load_separator(tmp_path / "model.onnx", residual=True)
    for frames in (1, 50, 333):
        x = torch.rand(2, nb_channels, 129, frames) * 10
        with torch.no_grad():
            expected = network(x)
        [found] = session.run(None, {"magnitudes": x[1:].numpy()})
        for y, reference in (
            (torch.from_numpy(found), expected[1:]),
            (loaded.networks[0](x), expected),
        ):
            assert y.shape == reference.shape
            assert (y - reference).abs().max() <= 1e-5 * reference.abs().max()
    audio = torch.rand(2, nb_channels, 5000) - 0.5
    with torch.no_grad():
        assert sdr(separator(audio), loaded(audio)) > 90
    assert loaded.targets == separator.targets


UNFIT = {
    "one length only": ("Attention", "can't be written as ONNX"),
    "an operation that ONNX has not": ("Inverse", "linalg_qr"),
    "a state that no file holds": ("Counts", "from the network"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_networks_that_do_not_fit(kind, networks, tmp_path):
    arch, message = UNFIT[kind]
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match=message) as error:
        export_onnx(Separator({"x": networks(arch)}, **SETTINGS), path)
    assert str(error.value).startswith(f"{path}: this network can't be written as ONNX: ")
    assert list(tmp_path.iterdir()) == []


def test_a_hackers_mistake_is_theirs(tmp_path):
    class Broken(UNet):
        def forward(self, x):
            return x + None

    with pytest.raises(TypeError):
        export_onnx(Separator({"x": Broken().eval()}, **SETTINGS), tmp_path / "model.onnx")


# --------------------------------------------------------------------------------------- the scripts


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call test.py's main where a small model and a song lie: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    make_model("model", hidden_size=8, sample_rate=8000, nfft=256)
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, (24000, 2))
    soundfile.write("song.wav", audio, 8000)

    def call(command):
        capsys.readouterr()
        try:
            code = test.main([*command.split(), "--quiet"])
        except UserError as error:
            code = utils.report(error)
        return code, *capsys.readouterr()

    return call


def stems(folder):
    return {path.stem: soundfile.read(path)[0] for path in sorted(folder.glob("*.wav"))}


def test_stems_of_an_onnx_file_are_those_of_its_model(run, tmp_path):
    code, printed, _ = run("--export model.onnx --model model")
    assert code == 0 and "vocals, drums, bass, other" in printed
    for flags in ("", " --targets bass vocals --residual rest --softmask", " --targets drums"):
        for name in ("model", "model.onnx"):
            assert run(f"song.wav --model {name} --outdir {name}-stems --overwrite{flags}")[0] == 0
        expected, found = (
            stems(tmp_path / "model-stems/song"),
            stems(tmp_path / "model.onnx-stems/song"),
        )
        assert expected.keys() == found.keys() and len(found) >= 2
        for name in expected:
            assert sdr(expected[name], found[name]) > 80, name
        for folder in ("model-stems", "model.onnx-stems"):
            shutil.rmtree(folder)


def test_stems_belong_to_the_file_that_made_them(run, tmp_path):
    run("--export model.onnx --model model")
    assert run("song.wav --model model.onnx")[0] == 0
    assert "kept vocals" in run("song.wav --model model.onnx")[1]
    make_model("model", hidden_size=8, sample_rate=8000, nfft=256, seed=9)
    assert run("--export model.onnx --model model")[0] == 0  # over an earlier one of ours
    assert (
        "made anew, because the record has another model" in run("song.wav --model model.onnx")[1]
    )
    record = load(tmp_path / "stems" / "song" / "stems.json")
    assert record["model"] == load_separator_as_test_py("model.onnx")


def load_separator_as_test_py(path):
    args = test.parse_args(["song.wav", "--model", path])
    return model.separator_from_flags(args).fingerprint()


def test_some_targets_only(run):
    assert run("--export two.onnx --model model --targets vocals drums")[0] == 0
    assert load_separator("two.onnx").targets == ["vocals", "drums"]
    assert load_separator("two.onnx", "drums").targets == ["drums"]
    code, _, complaint = run("song.wav --model two.onnx --targets bass")
    assert code == 2 and "two.onnx: has no target 'bass'; it has vocals, drums" in complaint


REFUSED = {
    "not named so": ("--export model.pth", "--export model.pth: its name must end in .onnx"),
    "somebody's file": ("--export theirs.onnx", "theirs.onnx: exists and was not written by"),
    "a folder": ("--export folder.onnx --overwrite", "folder.onnx: exists and was not written by"),
    "songs": ("song.wav --export new.onnx", "song.wav: is not used with --export"),
    "another flag": ("--export new.onnx --niter 2", "--niter: is not used with --export"),
    "neither": ("", "the following arguments are required: input"),
    "no such model": ("--export new.onnx --model nowhere", "nowhere: no such model or folder"),
    "no such file": ("song.wav --model new.onnx", "new.onnx: no such file; python test.py --export"),
    "ONNX of ONNX": ("--export new.onnx --model model.onnx", "gives no gradients or files"),
    "over itself": ("--export model.onnx --model model.onnx", "model.onnx: is an input"),
    "damaged": ("song.wav --model theirs.onnx", "theirs.onnx: is no ONNX file by test.py --export"),
    "cut short": ("song.wav --model short.onnx", "short.onnx: is no ONNX file by test.py --export"),
    "no metadata": ("song.wav --model bare.onnx", "bare.onnx: is no ONNX file by test.py --export"),
    "another STFT": ("song.wav --model stft.onnx", "stft.onnx: takes [1, 2, 129, 'T'], not [1, 2, 65, 'T']"),
    "a bad rate": ("song.wav --model rate.onnx", "rate.onnx: sample_rate is 0 and must be"),
    "a bad name": ("song.wav --model name.onnx", "name.onnx: '../x' can't be a name"),
    "bfloat16": ("song.wav --model model.onnx --amp", "--amp: model.onnx computes as it was written"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, run, tmp_path):
    command, message = REFUSED[case]
    run("--export model.onnx --model model")
    content = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "theirs.onnx").write_text("of somebody else")
    (tmp_path / "short.onnx").write_bytes(content[: len(content) // 2])
    (tmp_path / "folder.onnx").mkdir()
    for name, changes in (
        ("bare", None),
        ("stft", {"nfft": 128, "nhop": 32}),
        ("rate", {"sample_rate": 0}),
        ("name", {"targets": ["../x", "drums", "bass", "other"]}),
    ):
        graph = onnx.load_model_from_string(content)
        kept = {prop.key: prop.value for prop in graph.metadata_props}
        del graph.metadata_props[:]
        if changes is not None:
            kept |= {key: json.dumps(value) for key, value in changes.items()}
            onnx.helper.set_model_props(graph, kept)
        onnx.save(graph, tmp_path / f"{name}.onnx")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command += "" if "--model" in command or not command else " --model model"
    code, _, complaint = run(command)
    assert code == 2 and complaint.count("\n") == 1 and message in complaint, complaint
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after


def test_overwrite(run, tmp_path):
    (tmp_path / "theirs.onnx").write_text("of somebody else")
    assert run("--export theirs.onnx --model model --overwrite")[0] == 0
    assert len(load_separator(tmp_path / "theirs.onnx").targets) == 4


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(missing, run, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for command in ("--export model.onnx --model model", "song.wav --model model.onnx"):
        code, _, complaint = run(command)
        assert code == 2 and f"No module named '{missing}'" in complaint
        assert "pip install onnx onnxruntime" in complaint


def test_nobody_is_told(run, tmp_path):
    """onnxruntime would keep a database of events at home, and send it to its makers."""
    code = "import sys; sys.path.insert(0, sys.argv[1])\nimport test; sys.exit(test.main(sys.argv[2:]))"
    command = [sys.executable, "-c", code, FOLDER, "--export", "new.onnx", "--model", "model"]
    home = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    home["HOME"] = str(tmp_path / "home")
    settings = dict(cwd=tmp_path, env=home, capture_output=True, text=True)
    done = subprocess.run([str(word) for word in command], **settings)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*Microsoft*")) and not list(tmp_path.rglob("*onnxruntime*"))


def test_neither_trained_nor_differentiated(run, tmp_path):
    run("--export model.onnx --model model")
    _, complaint = run_script("train.py", "--model", "model.onnx", cwd=tmp_path, code=2)
    assert "error: --model model.onnx: ONNX can't be trained" in complaint
    separator = load_separator("model.onnx")
    with pytest.raises(UserError, match="gives no gradients"):
        separator(torch.rand(1, 2, 3000, requires_grad=True))


def test_long_recordings_go_in_windows(run, monkeypatch, capsys):
    """An ONNX file has no stages: beyond LONG frames, windows, and a line says so."""
    run("--export model.onnx --model model")
    separator = load_separator("model.onnx", niter=0, wiener_win_len=10)
    audio = torch.rand(2, 20000) - 0.5
    monkeypatch.setattr(model, "LONG", 100)
    found = torch.cat(list(separator.stream(audio.split(3000, -1))), dim=-1)
    assert "separated in windows" in "".join(capsys.readouterr())
    assert sdr(separator(audio[None])[0], found) > 20


def test_the_file_is_known_by_its_bytes(run, tmp_path):
    run("--export model.onnx --model model")
    networks, settings = load_onnx(tmp_path / "model.onnx")
    assert networks["model"].sources == ("vocals", "drums", "bass", "other")
    assert settings["nfft"] == 256
    reference = load_separator("model.onnx").fingerprint()
    assert load_separator("model.onnx").fingerprint() == reference
    assert load_separator("model.onnx", ["vocals"]).fingerprint() != reference
    content = onnx.load(tmp_path / "model.onnx")
    content.producer_name = "another"
    content.metadata_props.add(key="a tool's own", value="is no JSON")
    onnx.save(content, tmp_path / "other.onnx")
    assert load_separator("other.onnx").fingerprint() != reference
