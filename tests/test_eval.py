"""eval.py against museval, musdb, norbert, scipy and SiSEC 2018's published scores; its folders, resuming and messages."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import scipy.signal
import soundfile
import torch
from conftest import EXCERPT, FOLDER, InThisProcess, make_model, read_tracks, run_script
from conftest import sdr as sdr_of

import data
import eval as evaluation
import utils
from data import synthesize_song
from eval import COLUMNS, METRICS, bss_eval, oracle, score, whole_name, whole_track_scores
from model import stft
from utils import SOURCES, UserError, import_museval, load, report, save

museval = import_museval()
import musdb  # noqa: E402 (without ffmpeg it can only be imported after museval, by import_museval)
import stempeg  # noqa: E402

STEMS = {**{name: [name] for name in SOURCES}, "accompaniment": ["drums", "bass", "other"]}


def by_museval(references, estimates, rate=44100):
    """museval's scores of arrays (J, C, N)."""
    values = museval.evaluate(
        references.swapaxes(1, 2), estimates.swapaxes(1, 2), win=rate, hop=rate
    )
    return dict(zip(METRICS, values))


def largest_difference(ours, theirs):
    """In dB over all metrics and frames; the same scores must be NaN or infinite."""
    for metric in METRICS:
        assert ours[metric].shape == theirs[metric].shape
        np.testing.assert_array_equal(np.isfinite(ours[metric]), np.isfinite(theirs[metric]))
        np.testing.assert_array_equal(np.isnan(ours[metric]), np.isnan(theirs[metric]))
    finite = {metric: np.isfinite(ours[metric]) for metric in METRICS}
    return max(np.abs(ours[m][finite[m]] - theirs[m][finite[m]]).max(initial=0) for m in METRICS)


def as_float(audio, names=SOURCES):
    """{name: (C, N)} -> (J, C, N) float64"""
    return np.stack([np.asarray(audio[name], dtype=float) for name in names])


def imperfect(references, seed=0):
    """Estimates as a separator makes them: leakage, filtering, noise."""
    rng, mixture = np.random.default_rng(seed), references.sum(0)
    filtered = 0.8 * references + 0.2 * np.roll(references, 3, axis=-1)
    return filtered + 0.1 * (mixture - references) + 1e-3 * rng.standard_normal(references.shape)


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """A root with two synthesized test songs of four seconds, in which sources rest, and imperfect stems of them."""
    root = tmp_path_factory.mktemp("songs")
    for number, (source, start, end) in enumerate([("vocals", 1, 2.5), ("drums", 3, 4)]):
        song = synthesize_song(number + 1, 4.0)  # the voice of number 0 rests
        stems = {name: np.round(stem.T * 32767) for name, stem in song.items()}
        stems[source][:, int(start * 44100) : int(end * 44100)] = 0
        stems["mixture"] = sum(stems.values())
        estimates = dict(zip(SOURCES, imperfect(as_float(stems) / 32768, number)))
        estimates["accompaniment"] = sum(estimates[name] for name in SOURCES[1:])
        for name, audio in stems.items():
            write(
                root / "data" / "test" / f"Some One - Song {number}" / f"{name}.wav",
                audio.astype(np.int16),
                "PCM_16",
            )
        for name, audio in estimates.items():
            write(
                root / "stems" / "test" / f"Some One - Song {number}" / f"{name}.wav",
                audio.astype(np.float32),
            )
    return root


@pytest.fixture(scope="module")
def one(songs, tmp_path_factory):
    """The second of them by itself."""
    root = tmp_path_factory.mktemp("one")
    for part in ("data", "stems"):
        shutil.copytree(songs / part / "test" / "Some One - Song 1", root / part / "test" / "Song")
    return root


@pytest.fixture()
def readable(monkeypatch):
    """Lets musdb read WAV files without ffmpeg."""

    class Info:
        def __init__(self, path):
            self.file = soundfile.info(path)

        def samples(self, _):
            return self.file.frames

        def duration(self, _):
            return self.file.duration

        def rate(self, _):
            return self.file.samplerate

    def read_stems(filename, **_):
        return soundfile.read(filename, always_2d=True)

    monkeypatch.setattr(stempeg, "Info", Info)
    monkeypatch.setattr(stempeg, "read_stems", read_stems)


def write(path, audio, subtype="FLOAT", rate=44100):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.T, rate, subtype=subtype)


@pytest.fixture()
def call(tmp_path, monkeypatch, capsys):
    """Run eval.py's main here, in tmp_path: returns (stdout, lines of complaint)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", InThisProcess)

    def call(*arguments, code=0):
        try:
            result = evaluation.main(arguments)
            ended = result if isinstance(result, int) else 0
        except UserError as error:
            ended = report(error)
        printed = capsys.readouterr()
        assert ended == code, printed.out + printed.err
        complaints = printed.err.replace("\r", "\n").splitlines()
        return printed.out, [
            line for line in complaints if line.strip() and not line.startswith("tracks:")
        ]

    return call


def scores_of(path):
    """{target: array (frames, metrics)} of museval's JSON, in its order."""
    targets = json.loads(path.read_text())["targets"]
    return {
        t["name"]: np.array([[f["metrics"][m] for m in METRICS] for f in t["frames"]])
        for t in targets
    }


# ------------------------------------------------------------------------------------------------- museval's numbers


def test_real_excerpt_equals_museval(excerpt):
    references = as_float(excerpt)
    estimates = as_float(oracle("irm", excerpt["mixture"].numpy(), excerpt, STEMS))
    ours = bss_eval(references, estimates)
    assert ours["SDR"].shape == (4, 6)
    assert largest_difference(ours, by_museval(references, estimates)) < 1e-4


def test_unrounded_excerpt_equals_museval_as_far_as_museval_equals_itself():
    """Decoded to float, not to 16 bits as musdb does, the excerpt has no energy at all above 16 kHz: its references are
    linearly dependent but for rounding, and museval's own SIR changes by 1e-2 dB with the order of sources or channels,
    or with the level."""
    stems = []
    for stream in (4, 2):  # vocals, bass
        with av.open(str(EXCERPT)) as container:
            stems.append(
                np.concatenate(
                    [frame.to_ndarray() for frame in container.decode(audio=stream)], axis=1
                )
            )
    stems = np.stack(stems).astype(float)  # (J, C, N)
    estimates = imperfect(stems)
    theirs, turned = by_museval(stems, estimates), by_museval(stems[::-1], estimates[::-1])
    spread = largest_difference(theirs, {metric: values[::-1] for metric, values in turned.items()})
    swapped = by_museval(stems[:, ::-1], estimates[:, ::-1])
    louder = by_museval(3.3 * stems, 3.3 * estimates)
    spread = max(spread, largest_difference(theirs, swapped), largest_difference(theirs, louder))
    assert largest_difference(bss_eval(stems, estimates), theirs) < max(1e-3, 3 * spread)
    rounded = np.round(stems * 32768) / 32768
    assert largest_difference(bss_eval(rounded, estimates), by_museval(rounded, estimates)) < 1e-4


@pytest.mark.parametrize(
    "shape,window",
    [
        ((2, 2, 70000), 44100),
        ((2, 1, 70000), 16000),
        ((1, 2, 50000), 44100),
        ((2, 2, 30000), 44100),
        ((2, 2, 44100), 44100),
    ],
)
def test_shapes_equal_museval(shape, window):
    rng = np.random.default_rng(0)
    references = rng.standard_normal(shape)
    references[0, :, 20000:40000] = 0
    estimates = imperfect(references)
    assert (
        largest_difference(
            bss_eval(references, estimates, window), by_museval(references, estimates, window)
        )
        < 1e-6
    )


@pytest.mark.parametrize("case", ["mono in stereo", "silent channel", "opposite channels"])
def test_degenerate_references_equal_museval(case):
    rng = np.random.default_rng(0)
    references = rng.standard_normal((2, 2, 100_000))
    if case == "mono in stereo":
        references[:, 1] = references[:, 0]
    elif case == "silent channel":
        references[0, 1] = 0
    else:  # the sum over channels is zero: museval takes such a frame for silent
        references[0, :, :44100] = [[1], [-1]] * references[0, :1, :44100]
    estimates = references + 0.1 * rng.standard_normal(references.shape)
    ours = bss_eval(references, estimates)
    assert largest_difference(ours, by_museval(references, estimates)) < 1e-4
    assert np.isnan(ours["SDR"][:, 0]).all() == (case == "opposite channels")


def test_channels_in_antiphase_but_for_rounding(monkeypatch):
    """References without high frequencies whose channels depend on each other but for rounding, and estimates that have
    them: no solution is exact. museval's own filters change with the order of the channels, and with their level."""
    rng = np.random.default_rng(0)
    left = scipy.signal.lfilter(*scipy.signal.butter(4, 0.01), rng.standard_normal(60_000))
    references = np.stack([left, -left * (1 + 1e-7 * rng.standard_normal(60_000))])[None]
    estimates = 0.1 * rng.standard_normal(references.shape)
    ours, theirs = bss_eval(references, estimates), by_museval(references, estimates)
    same = [by_museval(references[:, ::-1], estimates[:, ::-1])]
    same += [by_museval(scale * references, scale * estimates) for scale in (0.9, 1.1)]
    spread = max(largest_difference(theirs, scores) for scores in same)
    assert spread > 0.01  # how much depends on the processor: 0.05 to 20 dB were seen
    assert largest_difference(ours, theirs) < 3 * spread
    np.testing.assert_allclose(ours["SDR"], theirs["SDR"], atol=1e-6)  # needs no filters
    solve = np.linalg.solve

    def singular(matrix, right_side):
        raise np.linalg.LinAlgError("singular matrix")

    left, estimates = references[:, :1], estimates[:, :1]
    monkeypatch.setattr(
        np.linalg, "solve", singular
    )  # then museval, too, takes the smallest filters
    smallest, theirs = bss_eval(left, estimates), by_museval(left, estimates)
    monkeypatch.setattr(np.linalg, "solve", solve)
    assert largest_difference(smallest, theirs) < 0.1


def test_perfect_and_silent_estimates():
    references = np.random.default_rng(0).standard_normal((2, 2, 100_000))
    assert np.isinf(bss_eval(references, references)["SDR"]).all()
    estimates = references * [[[1]], [[0]]]
    assert all(np.isnan(values).all() for values in bss_eval(references, estimates).values())


def test_whole_track_scores():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((2, 1000)).astype(np.float32)
    estimate = 0.5 * reference + 0.1 * rng.standard_normal((2, 1000))
    ours = whole_track_scores(reference, estimate)
    s, e = (
        reference[None].astype(float),
        estimate[None],
    )  # as the Music Demixing Challenge computes it
    usdr = (
        10
        * np.log10((np.sum(s**2, axis=(1, 2)) + 1e-7) / (np.sum((s - e) ** 2, axis=(1, 2)) + 1e-7))[
            0
        ]
    )
    cosine = (
        reference.ravel() @ estimate.ravel() / np.linalg.norm(reference) / np.linalg.norm(estimate)
    )
    assert ours == pytest.approx(
        {"uSDR": usdr, "SI-SDR": 10 * np.log10(cosine**2 / (1 - cosine**2))}, abs=1e-4
    )
    assert np.isnan(whole_track_scores(reference, 2 * reference)["SI-SDR"])  # no error
    assert np.isnan(whole_track_scores(0 * reference, estimate)["SI-SDR"])


def test_files_equal_those_of_museval(one, call, tmp_path, readable):
    """Same folders, names, frames, NaN and numbers as museval.eval_mus_track's, accompaniment and all; museval reads ours."""
    call(
        "--root",
        one / "data",
        "--estimates",
        one / "stems",
        "--evaldir",
        "ours",
        "--method",
        "none",
    )
    [track] = musdb.DB(root=str(one / "data"), is_wav=True, subsets=["test"]).tracks
    estimates = {
        name: audio.T.numpy()
        for name, audio in read_tracks(one / "stems" / "test" / "Song").items()
    }
    museval.eval_mus_track(track, estimates, output_dir=str(tmp_path / "theirs"))
    [path] = (tmp_path / "theirs").rglob("*.json")
    theirs, ours = (
        scores_of(path),
        scores_of(tmp_path / "ours" / path.relative_to(tmp_path / "theirs")),
    )
    assert list(ours) == list(theirs) == ["drums", "bass", "other", "vocals", "accompaniment"]
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-5)
        assert np.isnan(theirs[name]).sum() == 4 * (
            name in SOURCES[1:]
        )  # the second in which the drums rest
    store = museval.EvalStore()
    store.add_eval_dir(tmp_path / "ours")
    assert len(store.df) == 5 * 4 * 4  # targets, metrics, frames
    assert store.agg_frames_tracks_scores()["bass", "SDR"] == pytest.approx(
        np.nanmedian(ours["bass"][:, 0])
    )


def test_engine_museval(one, call, tmp_path):
    for engine in ("own", "museval"):
        pair = ("--targets", "vocals", "accompaniment")
        call(
            "--root",
            one / "data",
            "--estimates",
            one / "stems",
            *pair,
            "--engine",
            engine,
            "--evaldir",
            engine,
        )
        written = load(tmp_path / engine / "test" / "Song.json")
        assert written["engine"] == engine
        assert written.get("museval_version") == (
            importlib.metadata.version("museval") if engine == "museval" else None
        )
    ours, theirs = (
        scores_of(tmp_path / engine / "test" / "Song.json") for engine in ("own", "museval")
    )
    assert list(ours) == list(theirs) == ["vocals", "accompaniment"]
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-5)


def test_silent_reference_is_left_out(excerpt):
    references = {name: excerpt[name].numpy() for name in ("drums", "bass")} | {
        "vocals": np.zeros((2, 268288))
    }
    estimates = {
        name: audio + 1e-3 * excerpt["other"].numpy() for name, audio in references.items()
    }
    targets = score(references, estimates, 44100)
    assert [target["name"] for target in targets] == ["drums", "bass"]
    assert all(
        np.isfinite(frame["metrics"]["SIR"]) for target in targets for frame in target["frames"]
    )


def test_samples_that_are_not_finite():
    stems = np.random.default_rng(0).standard_normal((2, 2, 4410))
    stems[1, 0, 99] = np.nan
    with pytest.raises(np.linalg.LinAlgError, match="no projection"):
        bss_eval(stems, stems)


# ------------------------------------------------------------------------------------------------- floor and ceilings


def test_oracles_equal_published_formulas(excerpt):
    """sigsep-mus-oracle's formulas, by scipy; the Wiener filter by norbert."""
    import norbert

    mixture = excerpt["mixture"].numpy()
    S = {name: scipy.signal.stft(excerpt[name].numpy(), nperseg=2048)[-1] for name in SOURCES}
    X, eps = scipy.signal.stft(mixture, nperseg=2048)[-1], np.finfo(float).eps
    masks = {"ibm": {name: np.abs(s) / (eps + np.abs(X)) >= 0.5 for name, s in S.items()}}
    for method, alpha in (("irm", 1), ("irm2", 2)):
        total = eps + sum(np.abs(s) ** alpha for s in S.values())
        masks[method] = {name: np.abs(s) ** alpha / total for name, s in S.items()}
    Y = {method: {name: mask * X for name, mask in masks[method].items()} for method in masks}
    scale = np.abs(X).max() / 10
    y, x = np.stack([*S.values()]).transpose(3, 2, 1, 0) / scale, X.transpose(2, 1, 0) / scale
    y = (
        norbert.expectation_maximization(y.astype(complex), x.astype(complex), 1, eps=1e-10)[0]
        * scale
    )
    Y["mwf"] = dict(zip(SOURCES, y.transpose(3, 2, 1, 0)))
    sources = {name: excerpt[name].numpy() for name in SOURCES}
    for method in Y:
        ours = oracle(method, mixture, sources, STEMS)
        for name in SOURCES:
            theirs = scipy.signal.istft(Y[method][name])[1][:, : mixture.shape[1]]
            inside = slice(4096, -4096)  # edges are padded with zeros there, reflected here
            error = np.linalg.norm((ours[name] - theirs)[:, inside]) / np.linalg.norm(
                theirs[:, inside]
            )
            assert error < (2e-2 if method == "ibm" else 1e-3), (
                method,
                name,
                error,
            )  # a bin at the threshold may flip
        np.testing.assert_allclose(
            ours["accompaniment"], sum(ours[name] for name in SOURCES[1:]), atol=1e-6
        )


def test_phase_oracle_is_a_perfect_network_without_wiener_filter(excerpt):
    """In the published separator: networks that know the true magnitudes, niter 0."""
    from openunmix.model import Separator

    class Perfect(torch.nn.Module):
        def __init__(self, source):
            super().__init__()
            self.source = source

        def forward(self, _):
            return stft(self.source).abs()[None]  # (B, C, F, T)

    networks = {name: Perfect(excerpt[name]) for name in SOURCES}
    with torch.no_grad():
        theirs = Separator(networks, niter=0)(excerpt["mixture"][None])[0].numpy()
    sources = {name: excerpt[name].numpy() for name in SOURCES}
    ours = oracle("phase", excerpt["mixture"].numpy(), sources, STEMS)
    for name, estimate in zip(SOURCES, theirs):
        assert sdr_of(estimate, ours[name]) > 80
    np.testing.assert_allclose(
        ours["accompaniment"], sum(ours[name] for name in SOURCES[1:]), atol=1e-6
    )


# SDR of SiSEC 2018 (sigsep/sigsep-mus-2018), The Easton Ellises - Falcon 69, seconds 140 to 144, which the excerpt holds.
PUBLISHED = {
    "share": {
        "vocals": [1.12, 0.37, -12.88, -7.26, 1.32],
        "drums": [1.63, 0.90, 1.54, 1.68, 1.38],
        "bass": [0.97, 1.65, 1.89, 1.85, 1.51],
        "other": [0.95, 1.42, 1.30, 0.99, 0.81],
    },
    "irm": {
        "vocals": [7.52, 6.03, 0.18, 3.27, 8.80],
        "drums": [7.39, 8.21, 9.10, 10.10, 9.92],
        "bass": [6.53, 7.59, 8.41, 7.57, 6.73],
        "other": [5.58, 5.38, 7.64, 5.21, 6.05],
    },
}


@pytest.mark.parametrize("method,tolerance", [("share", 0.03), ("irm", 0.4)])
def test_oracles_equal_published_scores(method, tolerance, excerpt):
    """The excerpt starts between two of the campaign's frames, so masks see other windows; and it was encoded once more.
    (The accompaniment's reference was the mixture less vocals then; museval's is the sum of the other sources.)"""
    sources = {name: excerpt[name].numpy().astype(float) for name in SOURCES}
    estimates = oracle(method, excerpt["mixture"].numpy(), sources, STEMS)
    for name, published in PUBLISHED[method].items():
        for second, sdr in enumerate(published):
            part = slice(4980 + 44100 * second, 4980 + 44100 * (second + 1))
            assert sdr_of(sources[name][:, part], estimates[name][:, part]) == pytest.approx(
                sdr, abs=tolerance
            )


def test_floor_and_ceilings_in_order(songs, call):
    methods = ("mixture", "share", "ibm", "irm", "irm2", "phase", "mwf")
    printed, _ = call(
        "--root", songs / "data", "--method", *methods, "--targets", "vocals", "accompaniment"
    )
    lines = [line.split() for line in printed.splitlines()]
    medians = {
        tuple(line[:2]): float(line[2])
        for line in lines
        if len(line) == 9 and line[0] in ("vocals", "accompaniment")
    }
    assert len(medians) == 14
    for target in ("vocals", "accompaniment"):
        by = {method: medians[target, method] for method in methods}
        assert (
            by["mixture"] < by["share"] < min(by["ibm"], by["irm"])
            and by["irm"] < by["irm2"]
            and by["irm"] < by["mwf"]
            and by["share"] + 5 < by["phase"]
        )
        assert by["mwf"] - by["mixture"] > 10
    assert any(
        line[:5] == ["Some", "One", "-", "Song", "0"] and line[5] == "mixture" for line in lines
    )


# ------------------------------------------------------------------------------------------------- a model, its stems


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("four"), hidden_size=8, nfft=1024)


@pytest.fixture()
def separated(monkeypatch):
    """The names of the tracks that eval.py separates, in order."""
    names, separate = [], evaluation.separate
    monkeypatch.setattr(
        evaluation, "separate", lambda *args: names.append(args[1].name) or separate(*args)
    )
    return names


def test_scores_belong_to_what_made_them(songs, call, separated, tmp_path, monkeypatch):
    """They are kept as long as nothing differs, and made anew when stems are missing, settings, weights, a record of the
    model, a file of the data or the code is another, or the JSON is damaged."""
    shutil.copytree(songs / "data", tmp_path / "data")
    model = make_model(tmp_path / "runs" / "four", hidden_size=8, nfft=1024)
    command = [
        "--root",
        "data",
        "--model",
        "runs/four",
        "--method",
        "model",
        "--targets",
        "vocals",
        "drums",
    ]
    names = ["Some One - Song 0", "Some One - Song 1"]
    path = tmp_path / "scores" / "runs-four" / "test" / f"{names[1]}.json"

    def scored_anew(*flags):
        separated.clear()
        _, complaints = call(*command, *flags)
        anew = list(separated)
        call(*command, *flags)
        assert separated == anew, "the second time, all are there"
        return anew, complaints

    assert scored_anew() == (names, [])
    assert scored_anew("--outdir", "stems") == (
        names,
        [],
    )  # the scores were there, the stems were not
    assert scored_anew() == ([], [])
    stem = tmp_path / "stems" / "test" / names[0] / "vocals.wav"
    stem.unlink()
    assert scored_anew("--outdir", "stems") == (names[:1], [])
    os.utime(stem, ns=(1, 1))  # touched by somebody
    assert scored_anew("--outdir", "stems") == (names[:1], [])
    command += ["--niter", 0]
    assert scored_anew() == (names, [])
    path.write_text(path.read_text()[:1000])  # as after a crash of something that does not rename
    relative = path.relative_to(tmp_path)
    assert scored_anew() == (names[1:], [f"{relative}: does not parse, the track is scored again"])
    state = load(model / "drums.pth")
    save(
        {**state, "output_scale": state["output_scale"] * 1.01}, model / "drums.pth"
    )  # as after more training
    assert scored_anew() == (names, [])
    os.utime(tmp_path / "data" / "test" / names[0] / "bass.wav", ns=(1, 1))
    assert scored_anew() == (names[:1], [])
    monkeypatch.setattr(utils, "code_fingerprint", lambda: "somebody edited a formula")
    assert scored_anew() == (names, [])


def test_models_of_one_name_have_scores_of_their_own(one, call, tmp_path, monkeypatch):
    for folder, seed in (("a", 0), ("b", 9)):
        make_model(tmp_path / "runs" / folder / "m", hidden_size=8, nfft=1024, seed=seed)
    command = ("--root", one / "data", "--method", "model", "--model")
    call(*command, "runs/a/m")
    printed, _ = call(*command, "runs/b/m", "--compare", "scores/runs-a-m")
    a, b = (
        scores_of(tmp_path / "scores" / f"runs-{name}-m" / "test" / "Song.json") for name in "ab"
    )
    assert np.nanmax(np.abs(a["vocals"] - b["vocals"])) > 0.01
    summary = printed.partition("dB: median")[2]
    assert "runs-a-m" in summary and "runs-b-m" in summary
    monkeypatch.chdir(tmp_path / "runs" / "a")
    assert [whole_name(path) for path in ("m", "./m/", "umxl", "/x/y")] == ["m", "m", "umxl", "x-y"]
    assert whole_name("../b/m").endswith("-runs-b-m") and not whole_name("../b/m").startswith(
        (".", "-")
    )


def test_notebook(one, call, tmp_path, monkeypatch):
    """main can be called with any arguments, again and again, returns numbers and changes nothing of the process."""
    monkeypatch.chdir(tmp_path)
    environment, handlers = (
        dict(os.environ),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    )
    for _ in range(2):
        medians = evaluation.main(
            ["--root", one / "data", "--method", "mixture", "share", "--targets", "vocals"]
        )
    assert list(medians.columns) == ["SDR", "ISR", "SIR", "SAR", "uSDR", "SI-SDR"]
    expected = scores_of(tmp_path / "scores" / "umxl" / "share" / "test" / "Song.json")["vocals"]
    np.testing.assert_allclose(
        medians.loc[("Song", "share", "vocals"), "SDR"], np.nanmedian(expected[:, 0])
    )
    assert dict(os.environ) == environment
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_kept_stems_of_floors_and_ceilings(one, call, tmp_path):
    """<outdir>/<method>/<subset>/<track>: what was scored, kept as long as nothing differs."""
    command = ("--root", one / "data", "--targets", "vocals", "accompaniment", "--outdir", "stems")
    call(*command, "--method", "share", "phase")
    song = read_tracks(one / "data" / "test" / "Song")
    for method in ("share", "phase"):
        folder = tmp_path / "stems" / method / "test" / "Song"
        kept = read_tracks(folder)
        assert sorted(kept) == ["accompaniment", "vocals"]
        sources = {name: song[name].numpy() for name in SOURCES}
        for name, audio in oracle(method, song["mixture"].numpy(), sources, STEMS).items():
            if name in kept:
                np.testing.assert_allclose(kept[name].numpy(), audio, atol=1e-5)
    medians = evaluation.main(  # they score what was scored as they were made
        [
            "--root",
            one / "data",
            "--estimates",
            "stems/phase",
            "--method",
            "phase",
            "--evaldir",
            "x",
        ]
    )["SDR"]
    for target in ("vocals", "accompaniment"):
        both = [medians["Song", method, target] for method in ("x", "phase")]
        assert both[0] == pytest.approx(both[1], abs=1e-3)
    before = {path: utils.stamp(path) for path in tmp_path.glob("stems/*/test/Song/*.wav")}
    call(*command, "--method", "share", "phase")
    assert before == {path: utils.stamp(path) for path in before} and len(before) == 4
    (folder / "vocals.wav").unlink()
    call(*command, "--method", "share", "phase")
    changed = [path for path in before if before[path] != utils.stamp(path)]
    assert (
        sorted(path.relative_to(tmp_path / "stems").parts[0] for path in changed) == ["phase"] * 2
    )


def test_kept_stems(songs, model, call, tmp_path, monkeypatch, readable):
    """--outdir is musdb's layout, which musdb and museval read; the stems are those that test.py makes."""
    command = (
        "--root",
        songs / "data",
        "--model",
        model,
        "--targets",
        "vocals",
        "drums",
        "--residual",
    )
    call(*command, "--method", "model", "--outdir", "stems")
    names = ["Some One - Song 0", "Some One - Song 1"]
    mine = musdb.DB(root=str(tmp_path / "stems"), is_wav=True, subsets=["test"])
    assert [track.name for track in mine] == names and set(mine[0].targets) >= {"vocals", "drums"}
    song = songs / "data" / "test" / names[0] / "mixture.wav"
    run_script("test.py", song, *command[2:], "--outdir", "again", cwd=tmp_path)
    kept, again = (
        read_tracks(tmp_path / "stems" / "test" / names[0]),
        read_tracks(tmp_path / "again" / "mixture"),
    )
    assert sorted(kept) == sorted(again) == ["drums", "residual", "vocals"]
    assert max((kept[name] - again[name]).abs().max() for name in kept) < 1e-5
    dataset = musdb.DB(root=str(songs / "data"), is_wav=True, subsets=["test"])
    calls = []
    monkeypatch.setattr(
        museval,
        "eval_mus_track",
        lambda track, stems, output_dir: calls.append((track.name, sorted(stems))),
    )
    museval.eval_mus_dir(dataset, str(tmp_path / "stems"), str(tmp_path / "theirs"))
    assert calls == [(name, sorted(kept)) for name in names]


def test_aggregate_targets_residual(one, model, call, tmp_path):
    command = ("--root", one / "data", "--model", model, "--method", "model")

    def scored(*flags):
        call(*command, *flags, "--evaldir", "scores")
        return scores_of(tmp_path / "scores" / "test" / "Song.json")

    four = scored()
    assert list(four) == list(SOURCES)
    sums = '{"vocals": ["vocals"], "accompaniment": ["drums", "bass", "other"]}'
    pair = scored("--aggregate", sums)
    assert list(pair) == ["vocals", "accompaniment"]
    heard = ~np.isnan(four["vocals"][:, 0])  # the drums rest elsewhere
    np.testing.assert_allclose(
        pair["vocals"][heard, :2], four["vocals"][heard, :2], atol=1e-4
    )  # all four were estimated
    alone = scored("--targets", "vocals")
    assert list(alone) == ["vocals", "accompaniment"]  # the rest is estimated, too
    assert (
        np.nanmax(np.abs(alone["vocals"][:, 0] - four["vocals"][:, 0])) > 0.1
    )  # the filter knew less
    sums = '{"vocals": ["vocals"], "band": ["drums", "residual"]}'
    assert list(scored("--targets", "vocals", "drums", "--residual", "--aggregate", sums)) == [
        "vocals",
        "band",
    ]
    assert list(scored("--residual")) == list(SOURCES)  # nothing to compare it with
    assert (
        np.nanmax(np.abs(scored("--targets", "vocals", "--niter", 0)["vocals"] - alone["vocals"]))
        > 0.1
    )
    assert (
        np.nanmax(
            np.abs(
                scored("--targets", "vocals", "--wiener-win-len", 50)["vocals"] - alone["vocals"]
            )
        )
        > 1e-3
    )


# ------------------------------------------------------------------------------------------------- comparing


def published_scores(folder, method, offset, tracks=8, targets=("vocals", "drums")):
    """A folder as museval writes it, with two frames for each track."""
    for n in range(tracks):
        values = [dict.fromkeys(METRICS, n + offset + t if n else np.nan) for t in (0, 1)]
        frames = [
            {"time": float(t), "duration": 1.0, "metrics": value} for t, value in enumerate(values)
        ]
        path = folder / method / "test" / f"Track {n}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"targets": [{"name": name, "frames": frames} for name in targets]})
        )


def test_long_tables_are_left_out(call, tmp_path):
    """Each track's SDR is printed for up to a hundred rows."""
    for tracks in (100, 101):
        published_scores(tmp_path, "UMX", 0.0, tracks, targets=("vocals",))
        printed, _ = call("--method", "none", "--compare", "UMX")
        assert ("Track 7" in printed) == (
            tracks == 100
        ) and f"{tracks - 1}\n" in printed  # one has no scores


def test_compare(songs, call, tmp_path):
    for method, offset in (("UMX", 1.0), ("OLD", 0.5), ("FEW", 0.0)):
        published_scores(tmp_path, method, offset, tracks=4 if method == "FEW" else 8)
    printed, _ = call(
        "--method", "none", "--compare", "UMX", "OLD", "FEW", "--csv", "all.csv", "--evaldir", "out"
    )
    lines = [line.split() for line in printed.splitlines()]
    assert [
        "vocals",
        "UMX",
        "5.50",
        "5.50",
        "5.50",
        "5.50",
        "-",
        "-",
        "7",
    ] in lines  # median of 1 + 1.5 to 7 + 1.5
    assert ["drums", "FEW", "2.50", "2.50", "2.50", "2.50", "-", "-", "3"] in lines
    expected = scipy.stats.wilcoxon(np.full(7, 0.5)).pvalue
    assert ["vocals", "OLD", "+0.50", f"{expected:.2g}", "7"] in lines
    assert ["drums", "FEW", "+1.00", "-", "3"] in lines  # too few tracks for a test
    table = pd.read_csv(tmp_path / "all.csv")
    assert len(table) == (8 + 8 + 4) * 2 * 2 * 4 and set(table["method"]) == {"UMX", "OLD", "FEW"}
    assert list(table.columns) == COLUMNS
    part = table[
        (table.method == "OLD")
        & (table.track == "Track 3")
        & (table.target == "drums")
        & (table.metric == "SAR")
    ]
    assert part["score"].tolist() == [3.5, 4.5] and part["time"].tolist() == [0, 1]
    pictures = sorted(path.name for path in (tmp_path / "out" / "compare").glob("[!.]*"))
    assert pictures == sorted(
        f"{target}-{metric}.png" for target in ("vocals", "drums") for metric in METRICS
    )
    assert all(
        (tmp_path / "out" / "compare" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures
    )

    ours = ("--root", songs / "data", "--method", "mixture", "--targets", "vocals", "bass")
    printed, _ = call(*ours, "--compare", "UMX", "--evaldir", "out")
    summary = printed.partition("dB: median")[2].splitlines()
    targets = [tuple(line.split()[:2]) for line in summary if len(line.split()) == 9]
    assert targets == [
        ("vocals", "mixture"),
        ("vocals", "UMX"),
        ("drums", "UMX"),
        ("bass", "mixture"),
    ]
    assert ["vocals", "UMX", "-", "-", "0"] in [
        line.split() for line in printed.splitlines()
    ]  # no track in common
    (tmp_path / "mixture").symlink_to("UMX")
    _, [complaint] = call(*ours, "--compare", "UMX", "--evaldir", ".", code=2)  # to ./mixture/test
    assert complaint.startswith("error: mixture/test/Some One - Song 0.json: ")


@pytest.mark.parametrize("name", ["../../../evil", "/evil", "a\\nb", "", None, "mixture", 3])
def test_names_in_the_json_of_others(name, call, tmp_path):
    published_scores(tmp_path, "UMX", 0.0, targets=("vocals", name))
    before = sorted(tmp_path.rglob("*"))
    _, [complaint] = call("--method", "none", "--compare", "UMX", "--evaldir", "a/b/c", code=2)
    assert complaint.startswith("error: UMX/test/Track 0.json: the target ")
    assert sorted(tmp_path.rglob("*")) == before


def test_numbers_in_the_json_of_others(call, tmp_path):
    """Infinite ones and nulls are as NaN; text is none."""
    for n, value in enumerate(("Infinity", "NaN", "null", "1.5")):
        metrics = ", ".join(f'"{metric}": {value}' for metric in METRICS)
        frame = f'{{"time": 0.0, "metrics": {{{metrics}}}}}'
        path = tmp_path / "UMX" / "test" / f"{n}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"targets": [{{"name": "vocals", "frames": [{frame}]}}]}}')
    (tmp_path / "UMX" / "test" / "._0.json").write_text("what macOS leaves")
    medians = evaluation.main(
        ["--method", "none", "--compare", tmp_path / "UMX", "--evaldir", tmp_path / "out"]
    )
    assert medians["SDR"].dropna().tolist() == [1.5] and len(medians) == 4
    path.write_text(path.read_text().replace("1.5", '"loud"'))
    _, [complaint] = call("--method", "none", "--compare", "UMX", code=2)
    assert complaint == "error: UMX/test/3.json: is not museval's JSON; remove it"


# ------------------------------------------------------------------------------------------------- bad input


def test_bad_estimates(songs, call, tmp_path):
    shutil.copytree(songs / "stems", tmp_path / "stems")
    folder, command = (
        tmp_path / "stems" / "test" / "Some One - Song 0",
        ("--root", songs / "data", "--estimates", "stems"),
    )
    vocals = soundfile.read(folder / "vocals.wav")[0].T
    flags = ("--targets", "vocals", "accompaniment", "--method", "none")

    def complaint(*arguments, code=1):
        return call(*command, *flags, *arguments, code=code)[1]

    write(folder / "vocals.wav", vocals[:, :-441])
    expected = "has 44100 Hz, 2 channels and -441 samples against the track's 44100 Hz and 2 channels; export it again"
    assert complaint() == [f"error: stems/test/Some One - Song 0/vocals.wav: {expected}"]
    write(folder / "vocals.wav", vocals, rate=48000)
    assert "has 48000 Hz, 2 channels and +0 samples" in complaint()[0]
    write(folder / "vocals.wav", vocals * np.nan)
    assert "vocals.wav: has NaN" in complaint()[0]
    write(folder / "vocals.wav", 0 * vocals)
    expected = "the estimate of vocals is silent throughout: BSS Eval is not defined for it"
    assert complaint() == [f"error: Some One - Song 0: {expected}"]
    (folder / "vocals.wav").unlink()
    printed, complaints = call(*command, *flags, code=1)
    assert complaints == [
        "error: stems/test/Some One - Song 0/vocals.wav: no such file; name an audio file"
    ]
    assert (
        "Some One - Song 1 " in printed and "Some One - Song 0" not in printed
    )  # the other track's scores are shown
    write(folder / "vocals.wav", vocals.mean(0, keepdims=True))  # mono in stereo is fine
    call(*command, *flags)
    shutil.rmtree(folder)
    printed, _ = call(*command, *flags)
    assert (
        "stems/test: has 1 of 2 tracks, and only these are scored; it lacks Some One - Song 0"
        in printed
    )
    shutil.rmtree(folder.parent)
    assert complaint(code=2) == [
        "error: --estimates: no stems there (expected stems/test/Some One - Song 0/vocals.wav and so on)"
    ]


def test_bad_input(songs, model, call, tmp_path):
    root = ("--root", songs / "data")
    published_scores(tmp_path, "UMX", 0.0)

    def complaint(*arguments):
        [line] = call(*arguments, code=2)[1]
        return line.removeprefix("error: ")

    for flags, message in [
        (["--method", "none"], "--method none: leaves nothing to do without --compare"),
        (
            ["--method", "irm", "--niter", 2],
            "--niter: is for --method model, which is not scored here; leave it out",
        ),
        (
            ["--method", "none", "--compare", "UMX", "--outdir", "x"],
            "--outdir: is for stems that are made here, and none are; leave it out",
        ),
        (["--dataset", "aligned", "--is-wav"], "--is-wav: is for other layouts; leave it out"),
        (["--output-file", "drums.wav"], "--output-file: is for other layouts; leave it out"),
        (["--dataset", "sourcefolder"], "--dataset: invalid choice: 'sourcefolder'"),
        (
            ["--compare", "nowhere"],
            "--compare nowhere: no museval JSON there (expected nowhere/test/<track>.json)",
        ),
        (
            ["--method", "ibm", "--targets", "piano"],
            "piano: the data has no such source to compare with; it has vocals, ",
        ),
        (["--method", "ibm", "--subset", "train"], f"{songs / 'data' / 'train'}: no track folder"),
        (["--model", model, "--aggregate", "{}"], "--aggregate: is not JSON such as"),
    ]:
        assert complaint(*root, *flags).startswith(message)
    (tmp_path / "UMX" / "test" / "Track 0.json").write_text('{"targets": [')
    assert complaint("--method", "none", "--compare", "UMX").startswith(
        "UMX/test/Track 0.json: is damaged or not a .json file"
    )
    (tmp_path / "UMX" / "test" / "Track 0.json").write_text(
        '{"targets": [{"name": "vocals", "frames": [{}]}]}'
    )
    assert (
        complaint("--method", "none", "--compare", "UMX")
        == "UMX/test/Track 0.json: is not museval's JSON; remove it"
    )
    track = (
        tmp_path / "kept" / "share" / "test" / "Some One - Song 0.json"
    )  # somebody's scores, not made here
    track.parent.mkdir(parents=True)
    track.write_text('{"targets": []}')
    assert complaint(*root, "--method", "share", "--evaldir", "kept").startswith(
        "kept/share/test/Some One - Song 0.json: "
    )
    assert track.read_text() == '{"targets": []}'


def test_nothing_that_is_read_or_of_others_is_written(songs, model, call, tmp_path):
    """Refused in one line, before any work: stems and scores in the data, stems and pictures in folders and a table in
    a file of somebody else. Our own are written again and again."""
    shutil.copytree(songs / "data", tmp_path / "data")
    (tmp_path / "linked").symlink_to("data")
    (tmp_path / "mine" / "test" / "Some One - Song 1").mkdir(parents=True)
    (tmp_path / "mine" / "test" / "Some One - Song 1" / "vocals.wav").write_bytes(b"my own")
    (tmp_path / "out" / "compare").mkdir(parents=True)
    (tmp_path / "out" / "compare" / "vocals-SDR.png").write_bytes(b"my own")
    (tmp_path / "letter.csv").write_text("Dear Sir,\n")
    published_scores(tmp_path, "UMX", 0.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = ["--root", "data", "--model", model, "--targets", "vocals", "drums"]
    for flags, path in [
        (["--outdir", "data"], "data/test/Some One - Song 0/"),
        (["--outdir", "linked"], "linked/test/Some One - Song 0/"),
        (["--outdir", "data/stems"], "data/stems/test/Some One - Song 0/"),
        (["--outdir", "mine"], "mine/test/Some One - Song 1/vocals.wav: "),
        (["--evaldir", "data/test"], "data/test/test/Some One - Song 0.json: "),
        (["--compare", "UMX", "--evaldir", "out"], "out/compare/vocals-SDR.png: "),
        (["--csv", "letter.csv"], "letter.csv: "),
        (["--csv", "/dev/full"], "/dev/full: "),
        (
            ["--csv", "data/test/Some One - Song 0/vocals.wav"],
            "data/test/Some One - Song 0/vocals.wav: ",
        ),
    ]:
        _, [complaint] = call(*command, *flags, code=2)
        assert complaint.startswith(f"error: {path}"), complaint
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for _ in range(2):
        call(
            *command,
            "--outdir",
            "stems",
            "--evaldir",
            "new",
            "--compare",
            "UMX",
            "--csv",
            "new.csv",
        )
    stems = tmp_path / "stems" / "test" / "Some One - Song 0"
    assert sorted(path.name for path in stems.glob("[!.]*")) == ["drums.wav", "vocals.wav"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_all_silent_reference(songs, call, tmp_path):
    shutil.copytree(songs / "data", tmp_path / "data")
    path = tmp_path / "data" / "test" / "Some One - Song 0" / "vocals.wav"
    write(path, np.zeros((2, 176400)), "PCM_16")
    printed, complaints = call(
        "--root", "data", "--method", "share", "irm", "--targets", "vocals", "drums"
    )
    assert not complaints
    lines = printed.splitlines()
    assert (
        lines.count(
            "Some One - Song 0: vocals is silent throughout: BSS Eval is not defined for it, it has no score"
        )
        == 1
    )
    counts = {tuple(line.split()[:2]): line.split()[-1] for line in lines if len(line.split()) == 9}
    assert counts["vocals", "irm"] == "1" and counts["drums", "irm"] == "2"


@pytest.mark.parametrize("fault", ["not finite", "truncated", "no projection", "not finite model"])
def test_track_that_fails(fault, songs, call, tmp_path, monkeypatch):
    """It is named and left out, the other is scored: exit code 1; alone, nothing is left to show: exit code 2."""
    shutil.copytree(songs / "data", tmp_path / "data")
    model = make_model(tmp_path / "model", hidden_size=8, nfft=1024)
    folder = tmp_path / "data" / "test" / "Some One - Song 0"
    method, named = "mixture", "data/test/Some One - Song 0/vocals.wav: "
    if fault == "not finite":
        audio = np.full((2, 176400), 0.1)
        audio[1, 1000] = np.nan
        write(folder / "vocals.wav", audio)
    elif fault == "truncated":
        opened = evaluation.find_tracks

        def truncate_then(args):
            tracks = opened(args)
            (folder / "vocals.wav").write_bytes((folder / "vocals.wav").read_bytes()[:100_000])
            return tracks

        monkeypatch.setattr(evaluation, "find_tracks", truncate_then)
    elif fault == "no projection":
        named = "Some One - Song 0: "
        computed = evaluation.score

        def fail_first(references, *arguments):
            if np.array_equal(references["vocals"], first):
                raise np.linalg.LinAlgError("no projection")
            return computed(references, *arguments)

        first = soundfile.read(folder / "vocals.wav", dtype="float32")[0].T
        monkeypatch.setattr(evaluation, "score", fail_first)
    else:
        method, named = "model", "Some One - Song 0: the model's estimates are not finite"
        load_separator = evaluation.separator_from_flags

        def load_broken(args):
            separator = load_separator(args)
            separator.wiener = lambda V, X, niter: V * X[:, None] * np.nan
            return separator

        monkeypatch.setattr(evaluation, "separator_from_flags", load_broken)
    flags = ["--root", "data", "--method", method, "--targets", "vocals", "drums"]
    if method == "model":
        _, complaints = call(*flags, "--model", model, "--outdir", "stems", code=2)
        assert len(complaints) == 3 and not list(tmp_path.rglob("stems/**/*.wav"))
        assert complaints[0].startswith(f"error: {named}")
        return
    printed, [complaint] = call(*flags, code=1)
    assert complaint.startswith(f"error: {named}")
    assert "Some One - Song 1" in printed and "Some One - Song 0" not in printed
    assert len(list((tmp_path / "scores").rglob("*.json"))) == 1
    if fault != "truncated":
        shutil.rmtree(tmp_path / "data" / "test" / "Some One - Song 1")
        _, complaints = call(*flags, code=2)
        assert complaints[1:] == ["error: there are no scores to show: no track could be scored"]


# ------------------------------------------------------------------------------------------------- layouts


def test_every_layout_with_songs(songs, call, tmp_path):
    """Their own flags, whatever sources the data has, the mixture summed where it has no file of its own."""
    root = tmp_path / "data"
    for folder in sorted((songs / "data" / "test").iterdir()):
        shutil.copytree(folder, root / "test" / folder.name)
    for folder in (root / "test").iterdir():
        (folder / "vocals.wav").rename(folder / "lead.wav")
        (folder / "bass.wav").unlink()

    def scored(*flags):
        return evaluation.main(["--root", root, "--evaldir", tmp_path / "scores", *flags])

    flags = (
        "--dataset",
        "trackfolder_fix",
        "--target-file",
        "lead.wav",
        "--interferer-files",
        "drums.wav",
        "other.wav",
    )
    medians = scored(*flags, "--method", "share", "irm")
    assert set(medians.index.unique("target")) == {"lead", "drums.wav", "other.wav"} or set(
        medians.index.unique("target")
    ) == {"lead", "drums", "other"}
    assert (
        medians.xs("irm", level="method")["SDR"] > medians.xs("share", level="method")["SDR"]
    ).all()
    medians = scored(
        "--dataset", "trackfolder_var", "--target-file", "lead.wav", "--method", "share"
    )
    third = medians.loc[("Some One - Song 0", "share", "lead"), "uSDR"]
    audio = {
        name: soundfile.read(root / "test" / "Some One - Song 0" / f"{name}.wav")[0]
        for name in ("lead", "drums", "other")
    }
    expected = sdr_of(audio["lead"], sum(audio.values()) / 3)
    assert third == pytest.approx(expected, abs=1e-3)
    flags = ("--dataset", "aligned", "--output-file", "lead.wav", "--method", "mixture", "irm")
    medians = scored(*flags)
    assert medians.index.unique("target").tolist() == ["lead"]
    sdr = medians["SDR"].unstack("method")
    assert (
        sdr["irm"] > sdr["mixture"] + 3
    ).all()  # the rest of the mixture is the mask's other source


def test_layout_of_ones_own(songs, model, call, monkeypatch):
    """One more row in data.LAYOUTS, with a flag of its own, is read by eval.py: a model's vocals and their rest."""

    def index_own(root, split, voice="lead"):
        [track, _] = data.index_musdb(root, split)
        return [
            data.Track(track.name, {voice: track.sources["vocals"], "band": track.sources["bass"]})
        ]

    monkeypatch.setitem(data.LAYOUTS, "own", data.Layout(index_own))
    command = ("--root", songs / "data", "--dataset", "own")
    printed, _ = call(*command, "--method", "share", "--voice", "speech")
    assert "speech" in printed and "band" in printed and "accompaniment" not in printed
    printed, _ = call(*command, "--model", model, "--targets", "vocals", "--voice", "vocals")
    summary = printed.partition("dB: median")[2]
    assert [line.split()[0] for line in summary.splitlines() if len(line.split()) == 9] == 2 * [
        "vocals"
    ] + 2 * ["accompaniment"]
    _, [complaint] = call(*command, "--method", "share", "--targets", "piano", code=2)
    assert (
        complaint == "error: piano: the data has no such source to compare with; it has band, lead"
    )


def test_residual_with_the_name_of_a_source(one, model, call, tmp_path):
    """What is left of a mixture less vocals and drums is bass and other, whatever it is called."""
    command = (
        "--root",
        one / "data",
        "--model",
        model,
        "--method",
        "model",
        "--targets",
        "vocals",
        "drums",
    )
    call(*command, "--residual", "other", "--evaldir", "other")
    call(*command, "--residual", "rest", "--evaldir", "rest")
    other, rest = (
        scores_of(tmp_path / name / "test" / "Song.json")[name] for name in ("other", "rest")
    )
    np.testing.assert_array_equal(other, rest)


# ------------------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def many(songs, tmp_path_factory):
    """Six tracks of one second."""
    root = tmp_path_factory.mktemp("many")
    for n in range(6):
        for path in (songs / "data" / "test" / "Some One - Song 0").iterdir():
            audio = soundfile.read(path, dtype="int16")[0].T
            write(
                root / "test" / f"Track {n}" / path.name,
                audio[:, n * 100 : 44100 + n * 100],
                "PCM_16",
            )
    return root


def test_results_do_not_depend_on_the_number_of_processes(many, tmp_path):
    flags = ["--root", str(many), "--method", "mwf", "--targets", "vocals", "accompaniment"]
    printed, _ = run_script("eval.py", *flags, "--evaldir", "one", cwd=tmp_path, threads=2)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        FOLDER / "eval.py",
    ]
    command = [*torchrun, *flags, "--evaldir", "four", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.replace("four/", "one/") == printed
        and printed.count("dB: median over frames") == 1
    )
    paths = sorted(
        path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.json")
    )
    assert len(paths) == 6
    for path in paths:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "four" / path).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(kind, many, tmp_path):
    """Ctrl-C, or a kill: no process is left, every file that is there is whole, and the rest is done by the next run."""
    flags = [
        "--root",
        many,
        "--method",
        "ibm",
        "--evaldir",
        "scores",
        "--targets",
        "vocals",
        "drums",
    ]
    command = [sys.executable, FOLDER / "eval.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, **pipes
    )
    folder, start = tmp_path / "scores" / "ibm" / "test", time.time()
    while not list(folder.glob("[!.]*.json")) and time.time() - start < 60:
        time.sleep(0.02)
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # a terminal sends it to all
    else:
        process.kill()
    complaints = process.stderr.read()
    assert process.wait(20) == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in complaints
    assert (
        kind == signal.SIGKILL
        or "finished tracks are kept: the same command goes on with the others" in complaints
    )
    with pytest.raises(ProcessLookupError):
        while time.time() - start < 80:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*.json")}
    assert 1 <= len(done) < 6 and all(list(scores_of(path)) == ["vocals", "drums"] for path in done)
    if kind == signal.SIGKILL:
        run_script("eval.py", *flags, cwd=tmp_path)
        assert (
            len(list(folder.glob("[!.]*.json"))) == 6
            and {path: path.stat().st_mtime_ns for path in done} == done
        )


def test_killed_worker_is_one_line(many, call, tmp_path, monkeypatch):
    class Broken(InThisProcess):
        def submit(self, *_):
            raise evaluation.BrokenProcessPool

    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", Broken)
    _, [complaint] = call("--root", many, "--method", "mixture", code=2)
    assert (
        complaint
        == "error: a scoring process was killed, perhaps for want of memory; go on with fewer --workers"
    )


# ------------------------------------------------------- references, records and processes of their own


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Two tracks of a second at 8 kHz, in folders with files as several layouts have them."""
    root = tmp_path_factory.mktemp("short")
    rng = np.random.default_rng(0)
    for n in range(2):
        folder = root / "test" / f"Song {n}"
        sources = dict(zip(SOURCES, 0.1 * rng.standard_normal((4, 2, 8000))))
        sources["mixture"] = sum(sources.values())
        for name, audio in sources.items():
            write(folder / f"{name}.wav", audio, rate=8000)
    return root


def medians(printed, target, method):
    """The row of a target and a method in the table of medians: its first number, the SDR."""
    [row] = re.findall(rf"^{target} +{method} +(\S+)", printed, re.M)
    return float(row)


def test_what_is_left_of_the_accompaniment(short, call, tmp_path):
    """What a model of the accompaniment leaves is vocals: with true stems all is right."""
    small = dict(sample_rate=8000, nfft=256)
    for targets, flags in ((["accompaniment"], []), (["vocals", "accompaniment"], ["--residual"])):
        make_model(tmp_path / "m", targets=targets, **small)
        call("--root", short, "--model", "m", "--method", "model", "irm", *flags)
        stems = json.loads(Path("scores/m/test/Song 0.json").read_text())["settings"]["stems"]
        assert stems.get("residual") == (["vocals"] if len(targets) == 1 else None)
        shutil.rmtree("m")


def test_an_accompaniment_of_its_own(short, call, tmp_path):
    """A file of that name is what it is scored against, as it is in training."""
    for n in range(2):
        folder = tmp_path / "data" / "test" / f"Song {n}"
        shutil.copytree(short / "test" / f"Song {n}", folder)
        (folder / "bass.wav").rename(folder / "accompaniment.wav")
    files = ["--target-file", "accompaniment.wav", "--interferer-files", "vocals.wav", "other.wav"]
    flags = ["--dataset", "trackfolder_fix", "--root", "data", *files, "--method", "irm"]
    call(*flags, "--targets", "accompaniment")
    [path] = Path("scores").rglob("Song 0.json")
    stems = json.loads(path.read_text())["settings"]["stems"]
    assert stems == {"accompaniment": ["accompaniment"]}


def test_scores_depend_on_which_file_is_what(short, call, monkeypatch):
    """Of a layout that names the same files otherwise, or reads a part of them."""
    import data

    flags = ["--dataset", "mine", "--root", short, "--method", "mixture", "--targets", "vocals"]
    printed = []
    for names in ({"vocals": "vocals"}, {"vocals": "drums"}):

        def index(root, split, names=names):
            found = data.index_musdb(root, split)
            swap = {name: t.sources[names.get(name, name)] for t in found for name in t.sources}
            return [data.replace(t, sources=swap) for t in found]

        monkeypatch.setitem(data.LAYOUTS, "mine", data.Layout(index))
        printed.append(medians(call(*flags)[0], "vocals", "mixture"))
    assert printed[0] != printed[1]


def test_a_layouts_defaults_are_its_own(short, call, monkeypatch):
    """Those of another one with a flag of that name are not."""
    import data

    def index(root, split, target_file="nothing.wav"):
        return data.index_musdb(root, split)

    monkeypatch.setitem(data.LAYOUTS, "mine", data.Layout(index, "target_file"))
    flags = ["--dataset", "trackfolder_fix", "--root", short, "--method", "mixture"]
    assert "vocals" in call(*flags)[0]


def test_tracks_of_one_name(short, call, tmp_path):
    for part in ("train", "valid"):
        shutil.copytree(short / "test", tmp_path / "data" / part)
    flags = ["--dataset", "trackfolder_fix", "--root", "data", "--subset", "train"]
    _, complaint = call(*flags, "--method", "mixture", code=2)
    assert "Song 0: two tracks have this name" in complaint[-1]


def test_estimates_of_tracks_with_unlike_sources(short, call, tmp_path):
    for n, name in enumerate(("drums", "bass")):
        for part in ("data", "stems"):
            folder = tmp_path / part / "test" / f"Song {n}"
            folder.mkdir(parents=True)
            for file in ("vocals", name):
                shutil.copy(short / "test" / f"Song {n}" / f"{file}.wav", folder)
    flags = ["--dataset", "trackfolder_var", "--root", "data", "--estimates", "stems"]
    printed, _ = call(*flags, "--target-file", "vocals.wav", "--method", "none")
    assert {"drums", "bass", "vocals"} <= {*printed.split()}


def test_twice_in_the_json_of_others_or_too_large(short, call, tmp_path):
    frame = {"time": 0, "duration": 1, "metrics": dict.fromkeys(METRICS, 1)}
    folder = tmp_path / "theirs" / "test"
    folder.mkdir(parents=True)
    huge = {**frame, "metrics": dict.fromkeys(METRICS, 10**400)}
    for frames, names in (([frame], ["vocals", "vocals"]), ([huge], ["vocals"])):
        targets = [{"name": name, "frames": frames} for name in names]
        (folder / "Song.json").write_text(json.dumps({"targets": targets}))
        _, complaint = call("--method", "none", "--compare", "theirs", code=2)
        assert "Song.json: is not museval's JSON" in complaint[-1]


def test_names_that_look_like_formulas(call, tmp_path):
    for name in ("a$^$b", "b"):
        published_scores(tmp_path, name, 0)
    call("--method", "none", "--compare", "a$^$b", "b")
    assert [*Path().rglob("vocals-SDR.png")]


PLAIN_SCRIPT = """
import sys
sys.path.insert(0, {scripts!r})
print("begins")
import eval as evaluation
{replaced}
evaluation.main(["--root", {root!r}, "--method", "mixture", "--targets", "vocals"])
"""


@pytest.mark.parametrize("replaced", ["", "evaluation.whole_track_scores = lambda *_: {'uSDR': 7}"])
def test_a_plain_script(replaced, short, tmp_path):
    """Without `if __name__ == "__main__"`: it runs once; what it replaces scores, or an error says."""
    script = tmp_path / "script.py"
    script.write_text(PLAIN_SCRIPT.format(scripts=str(FOLDER), replaced=replaced, root=str(short)))
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("begins") == 1
    if replaced:
        assert done.returncode and "is another one in this process than in its files" in done.stderr
        assert not [*tmp_path.rglob("Song*.json")]
    else:
        assert done.returncode == 0 and "vocals mixture" in done.stdout, done.stderr
