"""eval.py against museval, musdb, norbert, scipy and SiSEC 2018's published scores; its folders, resuming and messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import musdb
import numpy as np
import pandas as pd
import pytest
import scipy.signal
import soundfile
from conftest import EXCERPT, FOLDER, InThisProcess, make_model, read_tracks, run_script
from conftest import sdr as sdr_of

import eval as evaluation
from data import index_musdb, synthesize_song
from eval import METRICS, SOURCES, TARGETS, bss_eval, oracle, score, whole_track_scores
from utils import UserError, run

museval = pytest.importorskip("museval")
if not hasattr(np.linalg, "linalg"):
    np.linalg.linalg = np.linalg  # what museval 0.4.1 looks for in numpy

STEMS = {**{name: [name] for name in SOURCES}, "accompaniment": ["drums", "bass", "other"]}


def by_museval(references, estimates, rate=44100):
    """museval's scores of arrays (J, C, N)."""
    values = museval.evaluate(references.swapaxes(1, 2), estimates.swapaxes(1, 2), win=rate, hop=rate)
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
        stems = {name: np.round(stem.T * 32767) for name, stem in synthesize_song(number, 4.0).items()}
        stems[source][:, int(start * 44100) : int(end * 44100)] = 0
        stems["mixture"] = sum(stems.values())
        estimates = dict(zip(SOURCES, imperfect(as_float(stems) / 32768, number)))
        estimates["accompaniment"] = sum(estimates[name] for name in SOURCES[1:])
        for name, audio in stems.items():
            write(root / "data" / "test" / f"Some One - Song {number}" / f"{name}.wav", audio.astype(np.int16), "PCM_16")
        for name, audio in estimates.items():
            write(root / "stems" / "test" / f"Some One - Song {number}" / f"{name}.wav", audio.astype(np.float32))
    return root


@pytest.fixture(scope="module")
def one(songs, tmp_path_factory):
    """The second of them by itself."""
    root = tmp_path_factory.mktemp("one")
    for part in ("data", "stems"):
        shutil.copytree(songs / part / "test" / "Some One - Song 1", root / part / "test" / "Song")
    return root


def write(path, audio, subtype="FLOAT", rate=44100):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.T, rate, subtype=subtype)


@pytest.fixture()
def call(tmp_path, monkeypatch, capsys):
    """Run eval.py's main here, in tmp_path: returns (stdout, lines of complaint)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", InThisProcess)

    def call(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        try:
            run(evaluation.main)
            ended = 0
        except SystemExit as end:
            ended = end.code
        printed = capsys.readouterr()
        assert ended == code, printed.out + printed.err
        complaints = printed.err.replace("\r", "\n").splitlines()
        return printed.out, [line for line in complaints if line.strip() and not line.startswith("tracks:")]

    return call


def scores_of(path):
    """{target: array (frames, metrics)} of museval's JSON, in its order."""
    targets = json.loads(path.read_text())["targets"]
    return {t["name"]: np.array([[f["metrics"][m] for m in METRICS] for f in t["frames"]]) for t in targets}


# ------------------------------------------------------------------------------------------------- museval's numbers


def test_real_excerpt_equals_museval(excerpt):
    references = as_float(excerpt)
    estimates = as_float(oracle("irm", excerpt["mixture"].numpy(), excerpt, STEMS))
    ours = bss_eval(references, estimates)
    assert ours["SDR"].shape == (4, 6)
    assert largest_difference(ours, by_museval(references, estimates)) < 1e-4


def test_unrounded_excerpt_equals_museval_as_far_as_museval_equals_itself():
    """Decoded to float, not to 16 bits as musdb does, the excerpt has no energy at all above 16 kHz: its references are
    linearly dependent but for rounding, and museval's own SIR changes by 1e-2 dB with the order of sources or channels."""
    import stempeg

    stems = stempeg.read_stems(str(EXCERPT))[0].swapaxes(1, 2)[[4, 2]].astype(float)  # vocals, bass
    estimates = imperfect(stems)
    theirs, turned = by_museval(stems, estimates), by_museval(stems[::-1], estimates[::-1])
    spread = largest_difference(theirs, {metric: values[::-1] for metric, values in turned.items()})
    swapped = by_museval(stems[:, ::-1], estimates[:, ::-1])
    spread = max(spread, largest_difference(theirs, swapped))
    assert largest_difference(bss_eval(stems, estimates), theirs) < max(1e-3, 3 * spread)
    rounded = np.round(stems * 32768) / 32768
    assert largest_difference(bss_eval(rounded, estimates), by_museval(rounded, estimates)) < 1e-4


@pytest.mark.parametrize(
    "shape,window",
    [((2, 2, 70000), 44100), ((2, 1, 70000), 16000), ((1, 2, 50000), 44100), ((2, 2, 30000), 44100), ((2, 2, 44100), 44100)],
)
def test_shapes_equal_museval(shape, window):
    rng = np.random.default_rng(0)
    references = rng.standard_normal(shape)
    references[0, :, 20000:40000] = 0
    estimates = imperfect(references)
    assert largest_difference(bss_eval(references, estimates, window), by_museval(references, estimates, window)) < 1e-6


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
    s, e = reference[None].astype(float), estimate[None]  # as the Music Demixing Challenge computes it
    usdr = 10 * np.log10((np.sum(s**2, axis=(1, 2)) + 1e-7) / (np.sum((s - e) ** 2, axis=(1, 2)) + 1e-7))[0]
    cosine = reference.ravel() @ estimate.ravel() / np.linalg.norm(reference) / np.linalg.norm(estimate)
    assert ours == pytest.approx({"uSDR": usdr, "SI-SDR": 10 * np.log10(cosine**2 / (1 - cosine**2))}, abs=1e-4)
    assert np.isnan(whole_track_scores(reference, 2 * reference)["SI-SDR"])  # no error
    assert np.isnan(whole_track_scores(0 * reference, estimate)["SI-SDR"])


def test_files_equal_those_of_museval(one, call, tmp_path):
    """Same folders, names, frames, NaN and numbers as museval.eval_mus_track's, accompaniment and all; museval reads ours."""
    call("--root", one / "data", "--estimates", one / "stems", "--evaldir", "ours", "--method", "none")
    [track] = musdb.DB(root=str(one / "data"), is_wav=True, subsets=["test"]).tracks
    estimates = {name: audio.T.numpy() for name, audio in read_tracks(one / "stems" / "test" / "Song").items()}
    museval.eval_mus_track(track, estimates, output_dir=str(tmp_path / "theirs"))
    [path] = (tmp_path / "theirs").rglob("*.json")
    theirs, ours = scores_of(path), scores_of(tmp_path / "ours" / path.relative_to(tmp_path / "theirs"))
    assert list(ours) == list(theirs) == ["drums", "bass", "other", "vocals", "accompaniment"]
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-5)
        assert np.isnan(theirs[name]).sum() == 4 * (name in SOURCES[1:])  # the second in which the drums rest
    store = museval.EvalStore()
    store.add_eval_dir(tmp_path / "ours")
    assert len(store.df) == 5 * 4 * 4  # targets, metrics, frames
    assert store.agg_frames_tracks_scores()["bass", "SDR"] == pytest.approx(np.nanmedian(ours["bass"][:, 0]))


def test_engine_museval(one, call, tmp_path, monkeypatch):
    monkeypatch.delattr(np.linalg, "linalg", raising=False)  # as in numpy 2.4
    for engine in ("own", "museval"):
        pair = ("--targets", "vocals", "accompaniment")
        call("--root", one / "data", "--estimates", one / "stems", *pair, "--engine", engine, "--evaldir", engine)
    ours, theirs = (scores_of(tmp_path / engine / "test" / "Song.json") for engine in ("own", "museval"))
    assert list(ours) == list(theirs) == ["vocals", "accompaniment"]
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-5)


def test_silent_reference_is_left_out(excerpt):
    references = {name: excerpt[name].numpy() for name in ("drums", "bass")} | {"vocals": np.zeros((2, 268288))}
    estimates = {name: audio + 1e-3 * excerpt["other"].numpy() for name, audio in references.items()}
    targets = score(references, estimates, 44100)
    assert [target["name"] for target in targets] == ["drums", "bass"]
    assert all(np.isfinite(frame["metrics"]["SIR"]) for target in targets for frame in target["frames"])


def test_samples_that_are_not_finite():
    stems = np.random.default_rng(0).standard_normal((2, 2, 4410))
    stems[1, 0, 99] = np.nan
    with pytest.raises(np.linalg.LinAlgError, match="no stable projection: are all samples finite?"):
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
    y = norbert.expectation_maximization(y.astype(complex), x.astype(complex), 1, eps=1e-10)[0] * scale
    Y["mwf"] = dict(zip(SOURCES, y.transpose(3, 2, 1, 0)))
    sources = {name: excerpt[name].numpy() for name in SOURCES}
    for method in Y:
        ours = oracle(method, mixture, sources, STEMS)
        for name in SOURCES:
            theirs = scipy.signal.istft(Y[method][name])[1][:, : mixture.shape[1]]
            inside = slice(4096, -4096)  # edges are padded with zeros there, reflected here
            error = np.linalg.norm((ours[name] - theirs)[:, inside]) / np.linalg.norm(theirs[:, inside])
            assert error < (2e-2 if method == "ibm" else 1e-3), (method, name, error)  # a bin at the threshold may flip
        np.testing.assert_allclose(ours["accompaniment"], sum(ours[name] for name in SOURCES[1:]), atol=1e-6)


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
            assert sdr_of(sources[name][:, part], estimates[name][:, part]) == pytest.approx(sdr, abs=tolerance)


def test_floor_and_ceilings_in_order(songs, call):
    methods = ("mixture", "share", "ibm", "irm", "irm2", "mwf")
    printed, _ = call("--root", songs / "data", "--method", *methods, "--targets", "vocals", "accompaniment")
    lines = [line.split() for line in printed.splitlines()]
    medians = {tuple(line[:2]): float(line[2]) for line in lines if len(line) == 9 and line[0] in ("vocals", "accompaniment")}
    assert len(medians) == 12
    for target in ("vocals", "accompaniment"):
        by = {method: medians[target, method] for method in methods}
        assert by["mixture"] < by["share"] < min(by["ibm"], by["irm"]) and by["irm"] < by["irm2"] and by["irm"] < by["mwf"]
        assert by["mwf"] - by["mixture"] > 10
    assert any(line[:5] == ["Some", "One", "-", "Song", "0"] and line[5] == "mixture" for line in lines)


# ------------------------------------------------------------------------------------------------- a model, its stems


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("four"), hidden_size=8, nfft=1024)


def test_model_stems_and_resuming(songs, model, call, tmp_path, monkeypatch):
    separated, separate = [], evaluation.separate
    monkeypatch.setattr(evaluation, "separate", lambda *args: separated.append(args[1].name) or separate(*args))
    command = ("--root", songs / "data", "--model", model, "--method", "model", "--targets", "vocals", "drums")
    names = ["Some One - Song 0", "Some One - Song 1"]
    call(*command)
    call(*command)
    assert separated == names  # once
    call(*command, "--outdir", "stems")  # made now
    call(*command, "--outdir", "stems")
    assert separated == 2 * names
    call(*command, "--niter", 0)  # other settings
    path = tmp_path / "scores" / model.name / "test" / f"{names[1]}.json"
    path.write_text(path.read_text()[:1000])  # as after a crash of something that does not rename
    _, complaints = call(*command, "--niter", 0)
    assert separated == 3 * names + names[1:]
    assert complaints == [f"scores/{model.name}/test/{names[1]}.json: does not parse, the track is scored again"]
    os.utime(model / "drums.pth")  # as after more training
    call(*command, "--niter", 0)
    assert separated == 3 * names + names[1:] + names


def test_kept_stems(songs, model, call, tmp_path, monkeypatch):
    """--outdir is musdb's layout, which musdb and museval read; the stems are those that test.py makes."""
    command = ("--root", songs / "data", "--model", model, "--targets", "vocals", "drums", "--residual")
    call(*command, "--method", "model", "--outdir", "stems")
    names = ["Some One - Song 0", "Some One - Song 1"]
    mine = musdb.DB(root=str(tmp_path / "stems"), is_wav=True, subsets=["test"])
    assert [track.name for track in mine] == names and set(mine[0].targets) >= {"vocals", "drums"}
    song = songs / "data" / "test" / names[0] / "mixture.wav"
    run_script("test.py", song, *command[2:], "--outdir", "again", cwd=tmp_path)
    kept, again = read_tracks(tmp_path / "stems" / "test" / names[0]), read_tracks(tmp_path / "again" / "mixture")
    assert sorted(kept) == sorted(again) == ["drums", "residual", "vocals"]
    assert max((kept[name] - again[name]).abs().max() for name in kept) < 1e-5
    dataset = musdb.DB(root=str(songs / "data"), is_wav=True, subsets=["test"])
    calls = []
    monkeypatch.setattr(museval, "eval_mus_track", lambda track, stems, output_dir: calls.append((track.name, sorted(stems))))
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
    np.testing.assert_allclose(pair["vocals"][heard, :2], four["vocals"][heard, :2], atol=1e-4)  # all four were estimated
    alone = scored("--targets", "vocals")
    assert list(alone) == ["vocals", "accompaniment"]  # the rest is estimated, too
    assert np.nanmax(np.abs(alone["vocals"][:, 0] - four["vocals"][:, 0])) > 0.1  # the filter knew less
    sums = '{"vocals": ["vocals"], "band": ["drums", "residual"]}'
    assert list(scored("--targets", "vocals", "drums", "--residual", "--aggregate", sums)) == ["vocals", "band"]
    assert list(scored("--residual")) == list(SOURCES)  # nothing to compare it with
    assert np.nanmax(np.abs(scored("--targets", "vocals", "--niter", 0)["vocals"] - alone["vocals"])) > 0.1
    assert np.nanmax(np.abs(scored("--targets", "vocals", "--wiener-win-len", 50)["vocals"] - alone["vocals"])) > 1e-3


# ------------------------------------------------------------------------------------------------- comparing


def published_scores(folder, method, offset, tracks=8, targets=("vocals", "drums")):
    """A folder as museval writes it, with two frames for each track."""
    for n in range(tracks):
        values = [dict.fromkeys(METRICS, n + offset + t if n else np.nan) for t in (0, 1)]
        frames = [{"time": float(t), "duration": 1.0, "metrics": value} for t, value in enumerate(values)]
        path = folder / method / "test" / f"Track {n}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"targets": [{"name": name, "frames": frames} for name in targets]}))


def test_long_tables_are_left_out(call, tmp_path):
    """Each track's SDR is printed for up to a hundred rows."""
    for tracks in (100, 101):
        published_scores(tmp_path, "UMX", 0.0, tracks, targets=("vocals",))
        printed, _ = call("--method", "none", "--compare", "UMX")
        assert ("Track 7" in printed) == (tracks == 100) and f"{tracks - 1}\n" in printed  # one has no scores


def test_compare(songs, call, tmp_path):
    for method, offset in (("UMX", 1.0), ("OLD", 0.5), ("FEW", 0.0)):
        published_scores(tmp_path, method, offset, tracks=4 if method == "FEW" else 8)
    printed, _ = call("--method", "none", "--compare", "UMX", "OLD", "FEW", "--csv", "all.csv", "--evaldir", "out")
    lines = [line.split() for line in printed.splitlines()]
    assert ["vocals", "UMX", "5.50", "5.50", "5.50", "5.50", "-", "-", "7"] in lines  # median of 1 + 1.5 to 7 + 1.5
    assert ["drums", "FEW", "2.50", "2.50", "2.50", "2.50", "-", "-", "3"] in lines
    expected = scipy.stats.wilcoxon(np.full(7, 0.5)).pvalue
    assert ["vocals", "OLD", "+0.50", "dB", "p", "=", f"{expected:.2g}", "tracks:", "7"] in lines
    assert any(line[:4] == ["drums", "FEW", "+1.00", "dB"] and line[-1] == "3" and "needed," in line for line in lines)
    table = pd.read_csv(tmp_path / "all.csv")
    assert len(table) == (8 + 8 + 4) * 2 * 2 * 4 and set(table["method"]) == {"UMX", "OLD", "FEW"}
    part = table[(table.method == "OLD") & (table.track == "Track 3") & (table.target == "drums") & (table.metric == "SAR")]
    assert part["score"].tolist() == [3.5, 4.5] and part["time"].tolist() == [0, 1]
    pictures = sorted(path.name for path in (tmp_path / "out" / "compare").iterdir())
    assert pictures == sorted(f"{target}-{metric}.png" for target in ("vocals", "drums") for metric in METRICS)
    assert all((tmp_path / "out" / "compare" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)

    ours = ("--root", songs / "data", "--method", "mixture", "--targets", "vocals", "bass")
    printed, _ = call(*ours, "--compare", "UMX", "--evaldir", "out")
    summary = printed.partition("dB: median")[2].splitlines()
    targets = [tuple(line.split()[:2]) for line in summary if len(line.split()) == 9]
    assert targets == [("vocals", "mixture"), ("vocals", "UMX"), ("drums", "UMX"), ("bass", "mixture")]
    assert any(line.split()[:2] == ["vocals", "UMX"] and line.endswith("there are 0") for line in printed.splitlines())


# ------------------------------------------------------------------------------------------------- bad input


def test_bad_estimates(songs, call, tmp_path):
    shutil.copytree(songs / "stems", tmp_path / "stems")
    folder, command = tmp_path / "stems" / "test" / "Some One - Song 0", ("--root", songs / "data", "--estimates", "stems")
    vocals = soundfile.read(folder / "vocals.wav")[0].T
    flags = ("--targets", "vocals", "accompaniment", "--method", "none")

    def complaint(*arguments):
        return call(*command, *flags, *arguments, code=2)[1]

    write(folder / "vocals.wav", vocals[:, :-441])
    expected = "has 44100 Hz, 2 channels and -441 samples against the track's 44100 Hz and 2 channels; export it again"
    assert complaint() == [f"error: stems/test/Some One - Song 0/vocals.wav: {expected}"]
    write(folder / "vocals.wav", vocals, rate=48000)
    assert "has 48000 Hz, 2 channels and +0 samples" in complaint()[0]
    write(folder / "vocals.wav", vocals * np.nan)
    assert "vocals.wav: has NaN or infinite samples" in complaint()[0]
    write(folder / "vocals.wav", 0 * vocals)
    expected = "the estimate of vocals is silent throughout: BSS Eval is not defined for it"
    assert complaint() == [f"error: Some One - Song 0: {expected}"]
    (folder / "vocals.wav").unlink()
    printed, complaints = call(*command, *flags, code=2)
    assert complaints == ["error: stems/test/Some One - Song 0/vocals.wav: no such file; name an audio file"]
    assert "Some One - Song 1 " in printed and "Some One - Song 0" not in printed  # the other track's scores are shown
    write(folder / "vocals.wav", vocals.mean(0, keepdims=True))  # mono in stereo is fine
    call(*command, *flags)
    shutil.rmtree(folder)
    printed, _ = call(*command, *flags)
    assert "stems/test: has 1 of 2 tracks, and only these are scored; it lacks Some One - Song 0" in printed
    shutil.rmtree(folder.parent)
    assert complaint() == ["error: --estimates: no stems there (expected stems/test/Some One - Song 0/vocals.wav and so on)"]


def test_bad_input(songs, model, call, tmp_path):
    root = ("--root", songs / "data")
    published_scores(tmp_path, "UMX", 0.0)

    def complaint(*arguments):
        [line] = call(*arguments, code=2)[1]
        return line.removeprefix("error: ")

    for flags, message in [
        (["--method", "none"], "--method none: leaves nothing to do without --compare"),
        (["--method", "irm", "--niter", 2], "--niter: is for --method model, which is not scored here; leave it out"),
        (["--compare", "nowhere"], "--compare nowhere: no museval JSON there (expected nowhere/test/<track>.json)"),
        (["--method", "ibm", "--targets", "piano"], "piano: the data has no such source to compare with; it has vocals, "),
        (["--method", "ibm", "--subset", "train"], f"{songs / 'data' / 'train'}: no track folder"),
        (["--model", model, "--aggregate", "{}"], "--aggregate: is not JSON such as"),
    ]:
        assert complaint(*root, *flags).startswith(message)
    (tmp_path / "UMX" / "test" / "Track 0.json").write_text('{"targets": [')
    assert complaint("--method", "none", "--compare", "UMX").startswith("UMX/test/Track 0.json: is damaged or not a .json file")
    (tmp_path / "UMX" / "test" / "Track 0.json").write_text('{"targets": [{"name": "vocals", "frames": [{}]}]}')
    assert complaint("--method", "none", "--compare", "UMX") == "UMX/test/Track 0.json: is not museval's JSON; remove it"
    track = tmp_path / "kept" / "share" / "test" / "Some One - Song 0.json"  # somebody's scores, not made here
    track.parent.mkdir(parents=True)
    track.write_text('{"targets": []}')
    assert complaint(*root, "--method", "share", "--evaldir", "kept").endswith("would be lost; choose another --evaldir")
    assert track.read_text() == '{"targets": []}'


def test_all_silent_reference(songs, call, tmp_path):
    shutil.copytree(songs / "data", tmp_path / "data")
    path = tmp_path / "data" / "test" / "Some One - Song 0" / "vocals.wav"
    write(path, np.zeros((2, 176400)), "PCM_16")
    printed, complaints = call("--root", "data", "--method", "share", "irm", "--targets", "vocals", "drums")
    assert not complaints
    lines = printed.splitlines()
    assert lines.count("Some One - Song 0: vocals is silent throughout: BSS Eval is not defined for it, it has no score") == 1
    counts = {tuple(line.split()[:2]): line.split()[-1] for line in lines if len(line.split()) == 9}
    assert counts["vocals", "irm"] == "1" and counts["drums", "irm"] == "2"


def test_track_that_is_not_finite(one, call, tmp_path):
    """It is named and left out; here it is the only one, and nothing is left to show."""
    shutil.copytree(one / "data", tmp_path / "data")
    audio = np.full((2, 176400), 0.1)
    audio[1, 1000] = np.nan
    write(tmp_path / "data" / "test" / "Song" / "vocals.wav", audio)
    _, complaints = call("--root", "data", "--method", "mixture", "--targets", "vocals", code=2)
    assert complaints[0] == "error: Song: vocals has NaN or infinite samples; repair or export it again"
    assert complaints[1:] == ["error: there are no scores to show: no track could be scored"]
    assert not list((tmp_path / "scores").rglob("*.json"))


# ------------------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def many(songs, tmp_path_factory):
    """Six tracks of one second."""
    root = tmp_path_factory.mktemp("many")
    for n in range(6):
        for path in (songs / "data" / "test" / "Some One - Song 0").iterdir():
            audio = soundfile.read(path, dtype="int16")[0].T
            write(root / "test" / f"Track {n}" / path.name, audio[:, n * 100 : 44100 + n * 100], "PCM_16")
    return root


def test_results_do_not_depend_on_the_number_of_processes(many, tmp_path):
    flags = ["--root", str(many), "--method", "mwf", "--targets", "vocals", "accompaniment"]
    printed, _ = run_script("eval.py", *flags, "--evaldir", "one", cwd=tmp_path, threads=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", FOLDER / "eval.py"]
    command = [*torchrun, *flags, "--evaldir", "four", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("four/", "one/") == printed and printed.count("dB: median over frames") == 1
    paths = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.json"))
    assert len(paths) == 6
    for path in paths:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "four" / path).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(kind, many, tmp_path):
    """Ctrl-C, or a kill: no process is left, every file that is there is whole, and the rest is done by the next run."""
    flags = ["--root", many, "--method", "ibm", "--evaldir", "scores", "--targets", "vocals", "drums"]
    command = [sys.executable, FOLDER / "eval.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes)
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
    assert kind == signal.SIGKILL or "finished tracks are kept: the same command goes on with the others" in complaints
    with pytest.raises(ProcessLookupError):
        while time.time() - start < 80:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*.json")}
    assert 1 <= len(done) < 6 and all(list(scores_of(path)) == ["vocals", "drums"] for path in done)
    if kind == signal.SIGKILL:
        run_script("eval.py", *flags, cwd=tmp_path)
        assert len(list(folder.glob("[!.]*.json"))) == 6 and {path: path.stat().st_mtime_ns for path in done} == done


def test_killed_worker_is_one_line(many, call, tmp_path, monkeypatch):
    class Broken(InThisProcess):
        def submit(self, *_):
            raise evaluation.BrokenProcessPool

    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", Broken)
    _, [complaint] = call("--root", many, "--method", "mixture", code=2)
    assert complaint == "error: a scoring process was killed, perhaps for want of memory; go on with fewer --workers"
