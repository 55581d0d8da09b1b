"""Layouts, mixing, splits, download, decoding, synthesis: by equality, also with openunmix, musdb."""

import contextlib
import hashlib
import http.server
import inspect
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import EXCERPT, FOLDER, write_song

import data
import train
from data import AudioFile, RandomMixes, WholeTracks, index_dataset, index_musdb, read_as
from utils import SOURCES, UserError, load, patched, report, resample, save

with patched(shutil, "which", lambda name, *args, **kwargs: name):  # stempeg asks for ffmpeg
    import musdb
    import stempeg

# ------------------------------------------------------------------------------------ reading files


def noise(length, channels=2, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (length, channels))


WINDOWS = [(0, 30_001), (0, 1), (29_990, 100), (-100, 300), (-500, 100), (30_100, 50)]
WINDOWS += [(12_345, 6_789), (-400, 30_900)]
FORMATS = [("WAV", code) for code in ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "PCM_U8")]
FORMATS += [("WAVEX", "PCM_24"), ("AIFF", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind,code", FORMATS)
def test_windows(kind, code, channels, tmp_path):
    """Any window of a file is that of soundfile's whole reading, and silent beyond its ends."""
    path = tmp_path / "a.bin"
    soundfile.write(path, noise(30_001, channels), 44100, format=kind, subtype=code)
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0].T
    audio = AudioFile.open(path)
    assert (audio.rate, audio.channels, audio.length) == (44100, channels, whole.shape[1])
    padded = np.pad(whole, [(0, 0), (500, 500)])
    for start, length in WINDOWS:
        window = audio.read(start, length)
        assert window.dtype == np.float32 and window.shape == (channels, length)
        expected = padded[:, 500 + start : 500 + start + length]
        np.testing.assert_allclose(window, expected, atol=2e-4 if kind == "OGG" else 0)


@pytest.mark.parametrize(
    "rate,new_rate",
    [(48000, 44100), (8000, 44100), (44100, 16000), (22050, 44100), (44100, 8000)],
)
def test_resampled_as_read(rate, new_rate, tmp_path):
    """Any window equals that of the whole file resampled at once."""
    soundfile.write(tmp_path / "a.wav", noise(rate // 2 + 7), rate, subtype="FLOAT")
    audio = AudioFile.open(tmp_path / "a.wav")
    whole = resample(torch.from_numpy(audio.read(0, audio.length)), rate, new_rate).numpy()
    length = whole.shape[1]
    assert data.length_at(new_rate, [audio]) == length
    padded = np.pad(whole, [(0, 0), (0, 1000)])
    windows = [(0, length), (0, 1), (1, 1000), (1234, 567), (length - 5, 5), (length - 100, 300)]
    for start, count in windows:
        window = read_as(audio, start, count, new_rate, 2)
        assert window.shape == (2, count)
        inside = min(count, length - start)  # after the last sample the filter still rings
        expected = padded[:, start : start + inside]
        np.testing.assert_allclose(window[:, :inside], expected, atol=2e-6)


def test_channels(tmp_path):
    soundfile.write(tmp_path / "mono.wav", noise(100, 1), 44100)
    soundfile.write(tmp_path / "stereo.wav", noise(100, 2), 44100)
    mono, stereo = (AudioFile.open(tmp_path / name) for name in ("mono.wav", "stereo.wav"))
    np.testing.assert_array_equal(read_as(mono, 5, 50, 44100, 2), mono.read(5, 50).repeat(2, 0))
    np.testing.assert_array_equal(read_as(mono, 5, 50, 44100, 1), mono.read(5, 50))
    mean = stereo.read(5, 50).mean(0, keepdims=True)
    np.testing.assert_allclose(read_as(stereo, 5, 50, 44100, 1), mean, atol=1e-7)


# ------------------------------------------------------------------------------------------ layouts

DEFAULTS = dict(sample_rate=None, nb_channels=2, source_augmentations=["gain", "channelswap"])


def make_datasets(layout, root, targets=None, random=False, **flags):
    """What train.py does with its flags: index, choose the rate, make the three data sets."""
    row = data.LAYOUTS[layout]
    examples = {name: flags.pop(name) for name in ("seq_dur", "samples_per_track") if name in flags}
    settings = {name: flags.pop(name, value) for name, value in DEFAULTS.items()}
    tracks = index_dataset(layout, root, ("train", "valid"), **flags)
    rate = data.most_common_rate(tracks["train"] + tracks["valid"], settings.pop("sample_rate"))
    if row.target_flag:
        default = inspect.signature(row.index).parameters[row.target_flag].default
        targets = [Path(flags.get(row.target_flag, default)).stem]
    mix = next(iter(row.mix_flags.values())) if random else row.mix
    return data.load_datasets(tracks, layout, targets, rate, mix=mix, **settings, **examples)


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    """What openunmix's create_dummy_datasets.py makes: noise of 3 s at 8 kHz, in both shapes."""
    root, rng = tmp_path_factory.mktemp("dummy"), np.random.default_rng(0)
    for split in ("train", "valid"):
        for track in "1234":
            for source in "1234":
                audio = rng.uniform(-0.2, 0.2, (24_000, 2))
                for place in (
                    f"Track/{split}/{track}/{source}",
                    f"Source/{split}/{source}/{track}",
                ):
                    path = root / f"{place}.wav"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    soundfile.write(path, audio, 8000)
    return root


LAYOUTS = {
    "trackfolder_fix": (
        "Track",
        dict(target_file="1.wav", interferer_files=["2.wav", "3.wav", "4.wav"]),
    ),
    "trackfolder_var": ("Track", dict(target_file="1.wav")),
    "aligned": ("Track", dict(input_file="1.wav", output_file="2.wav")),
    "sourcefolder": ("Source", dict(target_dir="1", interferer_dirs=["2", "3", "4"])),
}


@pytest.fixture()
def openunmix_data(monkeypatch):
    """openunmix.data, whose own reading needs a torchaudio of the past, or ffmpeg on PATH."""
    import openunmix.data

    def load_info(path):
        info = soundfile.info(str(path))
        shape = {"samples": info.frames, "channels": info.channels, "duration": info.duration}
        return {"samplerate": info.samplerate, **shape}

    def load_audio(path, start=0.0, dur=None, info=None):
        rate = soundfile.info(str(path)).samplerate
        span = -1 if dur is None else int(dur * rate), int(start * rate)
        return torch.from_numpy(
            soundfile.read(path, *span, dtype="float32", always_2d=True)[0].T
        ), rate

    monkeypatch.setattr(openunmix.data, "load_info", load_info)
    monkeypatch.setattr(openunmix.data, "load_audio", load_audio)
    read_with_soundfile(monkeypatch)
    return openunmix.data


def read_with_soundfile(monkeypatch):
    """Let musdb read WAV files without ffmpeg, with the samples that ffmpeg would give."""

    class Info:
        def __init__(self, path):
            self.info = soundfile.info(path)

        samples = lambda self, stem: self.info.frames  # noqa: E731
        rate = lambda self, stem: self.info.samplerate  # noqa: E731
        duration = lambda self, stem: self.info.duration  # noqa: E731

    def read_stems(filename, stem_id, start=0, duration=None, info=None, **_):
        rate = soundfile.info(filename).samplerate
        count = -1 if duration is None else round(duration * rate)
        return soundfile.read(filename, count, round((start or 0) * rate), always_2d=True)[0], rate

    monkeypatch.setattr(stempeg, "Info", Info)
    monkeypatch.setattr(stempeg, "read_stems", read_stems)


@pytest.mark.parametrize("layout", ["trackfolder_fix", "trackfolder_var", "aligned"])
def test_whole_tracks_are_those_of_openunmix(layout, dummy, openunmix_data):
    folder, flags = LAYOUTS[layout]
    _, valid, statistics = make_datasets(layout, dummy / folder, **flags)
    if layout == "aligned":
        theirs = openunmix_data.AlignedDataset(dummy / folder, "valid", "1.wav", "2.wav")
        names = [path.parent.name for path, _ in theirs.tuple_paths]
    else:
        kind = openunmix_data.VariableSourcesTrackFolderDataset
        extra = {}
        if layout == "trackfolder_fix":
            kind = openunmix_data.FixedSourcesTrackFolderDataset
            extra = dict(interferer_files=["2.wav", "3.wav", "4.wav"])
        theirs = kind(dummy / folder, "valid", "1.wav", **extra)
        names = [track["path"].name for track in theirs.tracks]
    assert len(valid) == len(theirs) == len(statistics) == 4
    for track, ours in zip(valid.tracks, valid):
        for a, b in zip(ours, theirs[names.index(track.name)]):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_examples_of_each_layout(layout, dummy):
    """Each loads; an example is what it was drawn from; the target is a part of the mixture."""
    folder, flags = LAYOUTS[layout]
    flags = dict(flags, seq_dur=1, samples_per_track=5)
    train, valid, _ = make_datasets(layout, dummy / folder, source_augmentations=[], **flags)
    assert (len(train), len(valid)) == (20, 100 if layout == "sourcefolder" else 4)
    assert train.sample_rate == 8000 and train.endless
    for index in range(len(train)):
        x, y = train[index]
        assert x.shape == y.shape == (2, 8000) and x.dtype == y.dtype == torch.float32
        assert x.is_contiguous() and y.is_contiguous()
        rows = train.draw(
            train.tracks[index % len(train.tracks)], np.random.default_rng((42, index))
        )
        drawn = {name: audio.read(start, 8000) for name, audio, start in rows}
        target = drawn.pop("2" if layout == "aligned" else "1")
        np.testing.assert_array_equal(y, target)
        others = sum(drawn.values()) + (0 if layout == "aligned" else target)
        np.testing.assert_allclose(x, others, atol=1e-6)


def test_mono_models_get_the_files_own_channels(dummy, tmp_path):
    """They see the mean of both channels' magnitudes; mono files stay mono; RandomMixes can mix down."""
    train, valid, statistics = make_datasets(
        "aligned", dummy / "Track", nb_channels=1, **LAYOUTS["aligned"][1]
    )
    assert {dataset.nb_channels for dataset in (train, valid, statistics)} == {2}
    for split in ("train", "valid"):
        (tmp_path / split / "t").mkdir(parents=True)
        for name in ("mixture.wav", "vocals.wav"):
            soundfile.write(tmp_path / split / "t" / name, noise(9000, 1), 8000)
    for channels in (1, 2):
        x, y = make_datasets("aligned", tmp_path, nb_channels=channels, seq_dur=1)[0][3]
        assert x.shape == y.shape == (channels, 8000)
    x, y = RandomMixes(train.tracks, ["2"], 8000, nb_channels=1, seq_dur=1)[3]
    assert x.shape == y.shape == (1, 8000)


def coded_track(folder, names, track, length=8192):
    """Files whose samples tell track, source, place: 64 * track + source + n / 8192, exactly."""
    folder.mkdir(parents=True)
    for source, name in enumerate(names):
        audio = 64 * track + source + np.arange(length) / 8192
        soundfile.write(folder / name, audio.astype(np.float32), 8000, subtype="FLOAT")


NAMES = {
    "trackfolder_fix": dict(target_file="a.wav", interferer_files=["b.wav"]),
    "trackfolder_var": dict(target_file="a.wav"),
    "aligned": dict(input_file="b.wav", output_file="a.wav"),
}


@pytest.mark.parametrize(
    "layout,random_mix",
    [
        ("trackfolder_fix", False),
        ("trackfolder_fix", True),
        ("trackfolder_var", False),
        ("trackfolder_var", True),
        ("aligned", False),
    ],
)
def test_where_sources_come_from(layout, random_mix, tmp_path):
    """Targets from every track equally often, at any place; interferers from where they should."""
    for split in ("train", "valid"):
        for track in range(4):
            coded_track(tmp_path / split / f"t{track}", ["a.wav", "b.wav"], track)
    settings = dict(seq_dur=0.5, samples_per_track=100, nb_channels=1, source_augmentations=[])
    train = make_datasets(layout, tmp_path, random=random_mix, **settings, **NAMES[layout])[0]
    firsts = [[part[0, 0].item() for part in train[index]] for index in range(400)]
    mixture, target = np.array(firsts, np.float64).T
    interferer = mixture - (target if layout != "aligned" else 0)
    assert (target // 64 == np.tile(range(4), 100)).all()
    assert (target % 64 < 1).all() and (interferer % 64 // 1 == 1).all()
    positions = target % 1 * 8192
    assert positions.min() < 100 and 4000 < positions.max() <= 8192 - 4000
    same_track = (interferer // 64 == target // 64).mean()
    assert same_track == (pytest.approx(0.25, abs=0.08) if random_mix else 1)
    assert (interferer % 1 == target % 1).all() == (not random_mix)
    assert len(set(interferer // 64)) == 4


def test_several_interferers(tmp_path):
    """random_track_mix: each from a track of its own; random_interferer_mix: all from one, in time."""
    for split in ("train", "valid"):
        for track in range(5):
            coded_track(tmp_path / split / f"t{track}", ["a.wav", "b.wav", "c.wav"], track)
    draws = {}
    for layout in ("trackfolder_fix", "trackfolder_var"):
        flags = dict(NAMES[layout])
        if layout == "trackfolder_fix":
            flags["interferer_files"] = ["b.wav", "c.wav"]
        train = make_datasets(layout, tmp_path, random=True, seq_dur=0.5, **flags)[0]
        draws[layout] = []
        for index in range(100):
            drawn = train.draw(train.tracks[0], np.random.default_rng(index))
            (b, b_start), (c, c_start) = [(a.path, start) for n, a, start in drawn if n != "a"]
            draws[layout].append((Path(b).parent == Path(c).parent, b_start == c_start))
    assert set(draws["trackfolder_var"]) == {(True, True)}
    same_track, same_time = np.mean(draws["trackfolder_fix"], axis=0)
    assert same_track == pytest.approx(0.2, abs=0.15) and same_time < 0.05


def test_variable_tracks(tmp_path):
    """Any number of sources, hidden files, brackets in names; a missing target is silent if asked."""
    for split in ("train", "valid"):
        coded_track(tmp_path / split / "one", ["vocals.wav", "bass.wav"], 0)
        files = ["vocals.wav", "guitar [DI].wav", "x.y.wav", "mixture.wav", "mixture.flac"]
        coded_track(tmp_path / split / "two", files[:4], 1)
        (tmp_path / split / "two" / "._vocals.wav").write_bytes(b"resource fork")
        (tmp_path / split / ".hidden").mkdir()
    train, valid, _ = make_datasets("trackfolder_var", tmp_path, seq_dur=0.5)
    sources = [sorted(track.sources) for track in train.tracks]
    assert sources == [["bass", "vocals"], ["guitar [DI]", "vocals", "x.y"]]
    x, _ = valid[1]  # without mixture.wav
    np.testing.assert_allclose(x[0, :3], 3 * 64 + 3 + 3 * np.arange(3) / 8192)
    coded_track(tmp_path / "train" / "three", ["drums.wav"], 2)
    (tmp_path / "train" / "four").mkdir()
    with pytest.raises(UserError, match=r"four: lacks vocals.wav; add it or remove the track"):
        make_datasets("trackfolder_var", tmp_path)
    flags = dict(silence_missing=True, seq_dur=0.5)
    train, _, statistics = make_datasets("trackfolder_var", tmp_path, **flags)
    assert [track.name for track in train.tracks] == ["one", "three", "two"]
    whole = WholeTracks(train.tracks, ["vocals"], 8000)
    x, y = whole[1]
    assert x.shape == y.shape == (2, 8192) and x[0, 5] == 128 + 5 / 8192 and not y.any()
    assert torch.equal(statistics[1][0], x) and statistics[1][1].shape == (0, 8192)
    x, y = train[64]
    assert x.all() and not y.any()


def test_more_files_than_sources(musdb_root, tmp_path, capsys):
    """A fifth source is part of mixture.wav alone: one line says so."""
    shutil.copytree(musdb_root / "train", tmp_path / "train")
    index_musdb(tmp_path, "train")
    assert not capsys.readouterr().out
    for folder in (tmp_path / "train").iterdir():
        shutil.copy(folder / "bass.wav", folder / "guitar.wav")
    index_musdb(tmp_path, "train")
    index_musdb(tmp_path, "valid")  # the same folder: said once
    [line] = capsys.readouterr().out.splitlines()
    assert "guitar.wav: not among the sources (vocals, drums, bass, other)" in line


def test_statistics_read_no_target(musdb_root, tmp_path):
    """Nor validation other files than those of its target."""
    shutil.copytree(musdb_root / "train", tmp_path / "train")
    tracks = {split: index_musdb(tmp_path, split) for split in ("train", "valid")}
    sets = data.load_datasets(tracks, "musdb", ["bass"], 44100)
    for path in tmp_path.glob("train/*/*.wav"):
        if path.name not in ("mixture.wav", "bass.wav"):
            path.unlink()
    assert len([*sets[1]]) == 2
    for path in tmp_path.glob("train/*/bass.wav"):
        path.unlink()
    assert [x.shape == (2, 88_200) and y.shape == (0, 88_200) for x, y in sets[2]] == [True] * 6


def test_lengths_and_rates(tmp_path, capsys):
    """A short track is padded; sources of other lengths and rates mix; one line says it is slow."""
    for split in ("train", "valid"):
        for track, (seconds, rate) in enumerate([(0.3, 8000), (2, 8000), (2, 16000)]):
            folder = tmp_path / split / str(track)
            folder.mkdir(parents=True)
            soundfile.write(folder / "vocals.wav", noise(round(seconds * rate), 1, track), rate)
            soundfile.write(folder / "drums.wav", noise(round(seconds * rate) // 2, 2, 9), rate)
    flags = dict(interferer_files=["drums.wav"], seq_dur=1, source_augmentations=[])
    train, valid, _ = make_datasets("trackfolder_fix", tmp_path, **flags)
    lines = capsys.readouterr().out.splitlines()
    assert train.sample_rate == 8000 and len(lines) == 1
    assert "(16000 Hz)" in lines[0] and "convert them for speed" in lines[0]
    x, y = train[0]
    first = soundfile.read(tmp_path / "train/0/vocals.wav", dtype="float32")[0]
    np.testing.assert_array_equal(y[0, :2400], first)
    assert x.shape == (2, 8000) and not x[:, 2400:].any()
    assert torch.equal(x[:, 1200:], y[:, 1200:]) and not torch.equal(x, y)
    assert [len(y[0]) for _, y in valid] == [2400, 16000, 16000]
    for index in range(len(train)):
        assert all(part.shape == (2, 8000) and part.isfinite().all() for part in train[index])
    soundfile.write(tmp_path / "train/1/drums.wav", noise(12_001), 8000)
    flags = dict(input_file="vocals.wav", output_file="dr*.wav")
    pairs = make_datasets("aligned", tmp_path, **flags)[0].tracks
    pairs = WholeTracks(pairs, ["dr*"], 8000)
    assert [part.shape[1] for part in pairs[1]] == [12_001] * 2  # where the shorter one ends
    assert [part.shape[1] for part in pairs[2]] == [8000] * 2


def test_files_that_are_slow_to_read_are_said(tmp_path, capsys):
    for split in ("train", "valid"):
        (tmp_path / split / "t").mkdir(parents=True)
        for name in ("vocals.ogg", "drums.ogg", "bass.wav"):
            soundfile.write(tmp_path / split / "t" / name, noise(20_000, 2), 8000)
    flags = dict(target_file="vocals.ogg", interferer_files=["drums.ogg", "bass.wav"])
    train = make_datasets("trackfolder_fix", tmp_path, seq_dur=1, **flags)[0]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "4 files are slow to read" in lines[0] and "drums.ogg" in lines[0]
    assert train[1][0].abs().max() > 0.1


MISTAKES = [
    ("trackfolder_fix", None, {}, "--dataset trackfolder_fix needs --root"),
    (
        "trackfolder_fix",
        "R/nowhere",
        {},
        "R/nowhere/train: no track folder with vocals.wav and drums",
    ),
    ("trackfolder_fix", ".", {}, "(expected train/<track>/...); . holds E, R, S, V"),
    ("trackfolder_fix", "R/train", {}, "R/train holds one, two"),
    ("trackfolder_fix", "R/train/one", {}, "R/train/one holds drums.wav, vocals.wav"),
    (
        "trackfolder_fix",
        "R",
        dict(interferer_files=["bass.wav"]),
        "with vocals.wav and bass.wav in it",
    ),
    (
        "trackfolder_fix",
        "R",
        dict(interferer_files=["sax.wav"]),
        "R/train/one: lacks sax.wav; add it or remove the track",
    ),
    (
        "trackfolder_fix",
        "R",
        dict(target_file="drums.wav", interferer_files=["vocals.wav", "drums.wav"]),
        "--interferer-files: two sources would be called drums",
    ),
    (
        "trackfolder_fix",
        "R",
        dict(interferer_files=["mixture.wav"]),
        "--interferer-files: the source 'mixture'",
    ),
    ("aligned", "R", {}, "R/train: no track folder with mixture.wav and vocals.wav in it"),
    ("aligned", "R", dict(input_file="drums.wav", output_file="drums.wav"), "is the input, too"),
    ("aligned", "R", dict(output_file="separator.wav"), "--output-file: the source 'separator'"),
    (
        "trackfolder_var",
        "R",
        dict(target_file="x.wav"),
        "R/train: no track folder with x.wav in it",
    ),
    (
        "trackfolder_var",
        "R",
        dict(silence_missing=True, ext=".flac", target_file="x"),
        "no track folder has a file *.flac",
    ),
    (
        "trackfolder_var",
        "S",
        dict(target_file="vocals.flac", ext=".ogg"),
        "S/train/one: no file *.ogg to mix with vocals.flac; see --ext",
    ),
    (
        "trackfolder_var",
        "S",
        dict(target_file="vocals.flac"),
        "S/train/one: no file *.wav to mix with vocals.flac; see --ext",
    ),
    ("sourcefolder", "R", {}, "R/train/vocals: no files *.wav there; R/train holds one, two"),
    ("sourcefolder", "R", dict(interferer_dirs=["vocals"]), "two sources would be called vocals"),
    ("trackfolder_fix", "E", {}, "E/train: no track folder with vocals.wav"),
    (
        "trackfolder_fix",
        "V",
        dict(interferer_files=["drums.wav"]),
        "V/valid: no track folder with vocals.wav and drums.wav",
    ),
    ("musdb", "R", {}, "R/train: no track folder with mixture.wav and vocals.wav and drums.wav"),
    ("musdb", "R/nowhere", {}, "R/nowhere: no such folder; --root names one that holds train/"),
]


@pytest.mark.parametrize("layout,root,flags,message", MISTAKES)
def test_errors_before_training(layout, root, flags, message, tmp_path, monkeypatch):
    """Wrong roots, flags, missing files and splits: what was expected, what was found."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "valid"):
        for track in ("one", "two"):
            coded_track(Path("R", split, track), ["vocals.wav", "drums.wav"], 0)
            Path("S", split, track).mkdir(parents=True)
            for name in ("vocals.flac", "drums.flac"):
                soundfile.write(Path("S", split, track, name), noise(9000), 8000)
    soundfile.write("R/train/two/sax.wav", noise(100), 8000)
    Path("E/train").mkdir(parents=True)
    shutil.copytree("R/train", "V/train")
    with pytest.raises(UserError) as caught:
        make_datasets(layout, root, ["vocals"], **flags)
    assert message in str(caught.value)


def test_two_files_of_one_name(tmp_path):
    """vocals.flac as target beside vocals.wav: neither is left out without a word."""
    for split in ("train", "valid"):
        coded_track(tmp_path / split / "t", ["vocals.wav", "drums.wav"], 0)
        soundfile.write(tmp_path / split / "t" / "vocals.flac", noise(9000), 8000)
    with pytest.raises(UserError, match="two sources would be called vocals"):
        make_datasets("trackfolder_var", tmp_path, target_file="vocals.flac")


def test_a_new_layout_is_one_row(musdb_root, monkeypatch):
    """It brings its own flags, and gets those only; nothing else needs to know it."""

    def index_pairs(root, split, loud="mixture.wav", soft="bass.wav"):
        folders = data.track_folders(root, "train", [loud, soft]).items()
        folders = list(folders)[:2] if split == "valid" else list(folders)[2:]
        return [
            data.Track(f.name, {"soft": AudioFile.open(b)}, AudioFile.open(a))
            for f, (a, b) in folders
        ]

    monkeypatch.setitem(data.LAYOUTS, "pairs", data.Layout(index_pairs, "soft", "aligned"))
    assert data.LAYOUTS["pairs"].all_flags == {"loud", "soft"}
    tracks = index_dataset(
        "pairs", musdb_root, ("train", "valid"), soft="drums.wav", ext=".x", root=7
    )
    train, valid, _ = data.load_datasets(tracks, "pairs", ["soft"], 44100, seq_dur=0.5)
    assert len(train.tracks) == 6 and len(valid) == 2
    assert train.tracks[0].sources["soft"].path.endswith("drums.wav")
    assert train[0][1].shape == (2, 22_050)


def test_flags_of_layouts():
    flags = {name: row.all_flags for name, row in data.LAYOUTS.items()}
    assert flags["musdb"] == {"is_wav", "cache", "source_augmentations"}
    assert flags["synthetic"] == {"source_augmentations"}
    assert flags["aligned"] == {"input_file", "output_file"}
    assert {"ext", "silence_missing", "random_interferer_mix"} < flags["trackfolder_var"]
    for row in data.LAYOUTS.values():
        assert row.target_flag is None or row.target_flag in row.all_flags


# ------------------------------------------------------------------------------------------ MUSDB18


def test_validation_split_is_that_of_musdb(tmp_path, monkeypatch):
    read_with_soundfile(monkeypatch)
    listed = data.musdb_settings()["validation_tracks"]
    assert len(listed) == 14
    names = [*listed[:3], "Aardvark - A", "Zebra - Z"]
    for seed, name in enumerate(names):
        write_song(tmp_path / "train" / name, seconds=0.2, seed=seed)
        write_song(tmp_path / "test" / name, seconds=0.2, seed=seed)
    for split in ("train", "valid"):
        theirs = musdb.DB(root=str(tmp_path), is_wav=True, subsets="train", split=split)
        ours = index_musdb(tmp_path, split)
        assert [track.name for track in ours] == [track.name for track in theirs]
    assert [track.name for track in index_musdb(tmp_path, "test")] == sorted(names)


def test_validation_split_of_other_songs(musdb_root, tmp_path):
    tracks = index_dataset("musdb", musdb_root, ("train", "valid"))
    parts = {split: [track.name for track in part] for split, part in tracks.items()}
    expected = [f"Song {n}" for n in (1, 2, 3, 4, 5, 6)]
    assert parts == {"train": expected, "valid": ["Song 0", "Song 7"]}
    write_song(tmp_path / "train" / "The only one", seconds=0.2)
    with pytest.raises(UserError, match="train: has 1 tracks, all for validation; add more"):
        index_musdb(tmp_path, "train")


def test_stem_of_another_length_than_its_mixture(tmp_path):
    for n in range(2):
        write_song(tmp_path / "train" / f"Song {n}", seconds=0.2, seed=n)
    soundfile.write(tmp_path / "train" / "Song 1" / "bass.wav", noise(8819), 44100)
    with pytest.raises(UserError, match=r"Song 1/bass.wav: has 8819 samples, its mixture 8820;"):
        index_musdb(tmp_path, "train")


@pytest.mark.parametrize("target", ["vocals", "other", "accompaniment"])
def test_whole_songs_are_those_of_openunmix(target, musdb_root, tmp_path, openunmix_data):
    """Validation: the track's own mixture file, which need not be the sum, and the target."""
    names = data.musdb_settings()["validation_tracks"][:2]
    for name, song in zip(names, sorted((musdb_root / "train").iterdir())):
        shutil.copytree(song, tmp_path / "train" / name)
        mixture = tmp_path / "train" / name / "mixture.wav"
        soundfile.write(mixture, noise(88_200, 2, len(name)), 44100)
    settings = dict(is_wav=True, split="valid", seq_duration=None, samples_per_track=1)
    theirs = openunmix_data.MUSDBDataset(target, str(tmp_path), **settings)
    ours = WholeTracks(index_musdb(tmp_path, "valid"), [target], 44100)
    assert len(ours) == len(theirs) == 2
    assert [track.name for track in ours.tracks] == sorted(names)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_allclose(a[1], b[1], atol=0 if target != "accompaniment" else 1e-7)


def test_random_mixes_of_songs(musdb_root, openunmix_data):
    """Every source from a track of its own, the target from all in turn; as loud as openunmix's."""
    tracks = index_musdb(musdb_root, "train")
    ours = RandomMixes(tracks, ["vocals"], 44100, seq_dur=0.5, samples_per_track=30)
    settings = dict(is_wav=True, seq_duration=0.5, samples_per_track=30, random_track_mix=True)
    theirs = openunmix_data.MUSDBDataset("vocals", str(musdb_root), **settings)
    assert len(ours) == 6 * 30 and len(theirs) == 8 * 30
    for a, b in zip(ours[0], theirs[0]):
        assert a.shape == b.shape == (2, 22_050) and a.dtype == b.dtype
    loudness = []
    for dataset, step in ((ours, 1), (theirs, 24)):
        picked = range(0, len(dataset), step)
        loudness.append(np.mean([dataset[index][0].square().mean() for index in picked]))
    assert loudness[0] == pytest.approx(loudness[1], rel=0.4)
    folders = []
    for index, track in enumerate(tracks * 30):
        rows = [*ours.draw(track, np.random.default_rng(index))]
        drawn = {name: audio for name, audio, _ in rows}
        assert len(rows) == 4 and sorted(drawn) == sorted(SOURCES)
        assert drawn.pop("vocals") == track.sources["vocals"]
        folders.append([Path(audio.path).parent.name for audio in drawn.values()])
    distinct = np.mean([len(set(three)) == 3 for three in folders])
    assert distinct == pytest.approx(5 * 4 / 36, abs=0.15)
    assert {name for three in folders for name in three} == {track.name for track in tracks}


def test_targets(musdb_root):
    """Accompaniment is all but vocals; several targets lie one below the other, in that order."""
    tracks = index_musdb(musdb_root, "train")
    mixes = RandomMixes(tracks, ["accompaniment"], 44100, seq_dur=0.5)
    x, y = mixes[7]
    rows = mixes.draw(mixes.tracks[0], np.random.default_rng((42, 7)))
    drawn = {name: audio.read(start, 22_050) for name, audio, start in rows}
    np.testing.assert_allclose(x - y, drawn["vocals"], atol=1e-6)
    has = "no such source in the data; it has bass, drums, other, vocals"
    with pytest.raises(UserError, match=f"--target piano: {has}"):
        RandomMixes(tracks, ["piano"], 44100)
    x, y = RandomMixes(tracks, SOURCES, 44100, seq_dur=0.5)[3]
    assert x.shape == (2, 22_050) and y.shape == (8, 22_050)
    np.testing.assert_allclose(y.view(4, 2, -1).sum(0), x, atol=1e-6)
    x, y = WholeTracks(tracks, ["other", "accompaniment", "bass"], 44100)[2]
    parts = {name: tracks[2].sources[name].read(0, 88_200) for name in SOURCES}
    expected = parts["other"], parts["drums"] + parts["bass"] + parts["other"], parts["bass"]
    for part, source in zip(y.view(3, 2, -1), expected, strict=True):
        np.testing.assert_allclose(part, source, atol=1e-7)


# ---------------------------------------------------------------------------- reproducible examples


@pytest.fixture(scope="module")
def mixes(musdb_root):
    tracks = index_musdb(musdb_root, "train")
    return make_mixes(tracks, augmentations=list(data.AUGMENTATIONS.values()))


def make_mixes(tracks, **settings):
    return RandomMixes(tracks, ["drums"], 44100, seq_dur=0.25, samples_per_track=4, **settings)


@pytest.mark.parametrize("workers,context", [(0, None), (1, "spawn"), (4, "fork")])
def test_examples_are_functions_of_seed_epoch_and_index(workers, context, mixes):
    """In any order and process, whatever else is drawn; two epochs and two seeds differ."""
    expected = {index: mixes[index] for index in range(2 * len(mixes))}
    order = np.random.default_rng(1).permutation(2 * len(mixes)).tolist()
    batches = [order[start : start + 6] for start in range(0, len(order), 6)]
    settings = dict(num_workers=workers, multiprocessing_context=context)
    loader = torch.utils.data.DataLoader(mixes, batch_sampler=batches, **settings)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    for batch, (x, y) in zip(batches, loader, strict=True):
        random.random()
        np.random.rand()
        torch.rand(1)
        for row, index in enumerate(batch):
            assert torch.equal(x[row], expected[index][0])
            assert torch.equal(y[row], expected[index][1])
    distinct = {x.numpy().tobytes() for x, _ in expected.values()}
    assert len(distinct) == len(expected) == 48
    other = make_mixes(mixes.tracks, seed=43, augmentations=mixes.augmentations)
    assert not any(torch.equal(other[index][0], expected[index][0]) for index in range(24))


DRAWN = {
    "tracks": "bass 2 13481, drums 2 46074, other 6 54552, vocals 1 7728",
    "track": "drums 2 20143, vocals 2 46074, bass 2 46074, other 2 46074",
    "own": "drums 2 20143, vocals 2 20143, bass 2 20143, other 2 20143",
    "aligned": "mixture 2 20143, drums 2 20143, vocals 2 20143, bass 2 20143, other 2 20143",
}


@pytest.mark.parametrize("mix", list(DRAWN))
def test_examples_are_those_of_before(mix, musdb_root):
    """This project's published figures come from these: source, song and first sample."""
    examples = make_mixes(index_musdb(musdb_root, "train"), mix=mix)
    drawn = examples.draw(examples.tracks[1], np.random.default_rng((42, 5)))
    rows = [f"{name} {Path(a.path).parent.name[-1]} {start}" for name, a, start in drawn]
    assert ", ".join(rows) == DRAWN[mix]


def test_file_that_changes_while_workers_read(tmp_path, capsys):
    """An error in a loading process ends in the same one line as anywhere."""
    for n in range(2):
        write_song(tmp_path / "train" / f"Song {n}", seconds=0.2, seed=n)
    dataset = RandomMixes(index_musdb(tmp_path, "train"), ["bass"], 44100, seq_dur=0.1)
    loader = torch.utils.data.DataLoader(dataset, num_workers=1)
    (tmp_path / "train" / "Song 1" / "bass.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError) as caught:
        list(loader)
    assert report(caught.value) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {tmp_path}/train/Song 1/bass.wav: was")


def test_nan_in_a_stem_names_the_file(tmp_path):
    for n in range(2):
        write_song(tmp_path / "train" / f"Song {n}", seconds=0.2, seed=n)
    samples = noise(8820)
    samples[4000:] = np.nan
    soundfile.write(tmp_path / "train" / "Song 1" / "bass.wav", samples, 44100, subtype="FLOAT")
    dataset = RandomMixes(index_musdb(tmp_path, "train"), ["bass"], 44100, seq_dur=0.2)
    with pytest.raises(UserError, match=r"Song 1/bass.wav: .*NaN"):
        dataset[0]


def test_drawing_leaves_global_random_state_alone(mixes):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    mixes[3]
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def test_augmentations(musdb_root):
    """Gain between 0.25 and 1.25, a swap in half of the cases, each source by itself."""
    rng = np.random.default_rng(0)
    audio = noise(10).T.astype(np.float32)
    before = audio.copy()
    gains = np.array([(data.augment_gain(audio, rng) / audio).mean() for _ in range(2000)])
    assert 0.25 <= gains.min() < 0.26 and 1.24 < gains.max() <= 1.25
    assert gains.mean() == pytest.approx(0.75, abs=0.02)
    swapped = [data.augment_channelswap(audio, rng) for _ in range(2000)]
    swaps = np.mean([np.array_equal(each, audio[::-1]) for each in swapped])
    assert swaps == pytest.approx(0.5, abs=0.04) and np.array_equal(audio, before)

    tracks = {split: index_musdb(musdb_root, split) for split in ("train", "valid")}
    plain = make_mixes(tracks["train"])
    calls = []
    flipped = make_mixes(
        tracks["train"], augmentations=[lambda audio, rng: calls.append(str(rng)) or -audio]
    )
    assert all(torch.equal(a, -b) for a, b in zip(flipped[5], plain[5]))
    assert len(calls) == 4  # once for each source
    names = ["channelswap", "gain"]
    train = data.load_datasets(tracks, "musdb", ["bass"], 44100, source_augmentations=names)[0]
    assert train.augmentations == [data.augment_channelswap, data.augment_gain]


def test_input_statistics(musdb_root):
    """Those of openunmix's script: mean and deviation of all frames, of whole mixtures."""
    from openunmix import transforms

    from train import input_statistics

    filters = transforms.make_filterbanks(n_fft=1024, n_hop=256, center=True)[0]
    encoder = torch.nn.Sequential(filters, transforms.ComplexNorm(mono=False))
    tracks = {split: index_musdb(musdb_root, split) for split in ("train", "valid")}
    paths = [track.mixture.path for track in tracks["train"]]
    mixtures = [torch.from_numpy(soundfile.read(path, dtype="float32")[0].T) for path in paths]
    frames = torch.cat([encoder(x[None]).mean(1)[0] for x in mixtures], dim=1).double()  # (F, T)
    args = SimpleNamespace(nfft=1024, nhop=256, nb_channels=2, dry_run=False, quiet=True)
    for target, extra in (("vocals", {}), ("bass", dict(seed=7, seq_dur=0.3))):
        extra["source_augmentations"] = ["gain"]
        songs = data.load_datasets(tracks, "musdb", [target], 44100, **extra)[2]
        mean, scale = input_statistics(songs, args, torch.device("cpu")).values()
        np.testing.assert_allclose(mean, frames.mean(1), rtol=1e-6)
        expected = frames.std(1, correction=0).clamp_min(1e-4 * max(scale))
        np.testing.assert_allclose(scale, expected, rtol=1e-6)


# ------------------------------------------------------------------------------------- stems to WAV

STREAMS = ("mixture", "drums", "bass", "other", "vocals")


@pytest.fixture()
def stems(tmp_path):
    """A root with three tracks, each the real excerpt."""
    for place in ("train/A - B", "train/C [D] - E", "test/F - G"):
        path = tmp_path / "stems" / f"{place}.stem.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(EXCERPT, path)
    return tmp_path / "stems"


def tree(folder):
    """Every file below a folder, but locks, and when it was written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not path.name.endswith("lock")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="musdb decodes with ffmpeg")
def test_decoded_stems_are_those_of_musdb(stems):
    """Within a unit of 16 bits, in musdb's WAV layout; musdb reads them with is_wav=True."""
    root = data.find_musdb(stems)
    theirs = musdb.DB(root=str(stems), subsets="train")
    again = musdb.DB(root=str(root), is_wav=True, subsets="train")
    assert (
        [track.name for track in theirs]
        == [track.name for track in again]
        == ["A - B", "C [D] - E"]
    )
    decoded = theirs[0].stems * 32768  # (5, N, 2)
    difference = np.abs(decoded - again[0].stems * 32768)
    assert difference.max() <= 1 and difference.mean() < 1e-4
    for stem, name in zip(decoded, STREAMS):
        path = root / "train" / "C [D] - E" / f"{name}.wav"
        assert np.abs(soundfile.read(path, dtype="int16")[0] - stem).max() <= 1


def test_decoded_once(stems, tmp_path, capsys):
    """The streams' order, place and level show in their sum; a second run does nothing."""
    root = data.find_musdb(stems)
    printed = capsys.readouterr().out
    assert root == tmp_path / "stems-wav" and f"made once, in {root}: 0.02 GB for 3 of 3" in printed
    for folder in root.glob("*/*"):
        audio = {name: soundfile.read(folder / f"{name}.wav") for name in STREAMS}
        assert {(rate, samples.shape) for samples, rate in audio.values()} == {
            (44100, (268_288, 2))
        }
        assert soundfile.info(folder / "bass.wav").subtype == "PCM_16"
        mixture, *sources = (samples for samples, _ in audio.values())
        rest = mixture - sum(sources)
        assert 10 * np.log10((mixture**2).mean() / (rest**2).mean()) > 15
    before = tree(root)
    assert len(before) == 18 and data.find_musdb(stems) == root and tree(root) == before
    assert capsys.readouterr().out == ""
    assert data.find_musdb(root) == root and data.find_musdb(stems, is_wav=True) == stems
    assert [len(part) for part in index_dataset("musdb", stems, ("train", "test")).values()] == [
        1,
        1,
    ]


def test_decoded_stems_follow_their_sources(stems, tmp_path, capsys):
    """Replaced: decoded anew. Moved or removed: gone from where it was. Not ours: left alone."""
    root = data.find_musdb(stems)
    before = tree(root)
    (stems / "train" / "A - B.stem.mp4").rename(stems / "test" / "A - B.stem.mp4")
    os.utime(stems / "train" / "C [D] - E.stem.mp4", (1, 1))
    (stems / "test" / "F - G.stem.mp4").unlink()
    capsys.readouterr()
    data.find_musdb(stems)
    after = tree(root)
    folders = {str(Path(name).parent) for name in after}
    assert folders == {"test/A - B", "train/C [D] - E"} and not set(before.values()) & set(
        after.values()
    )
    printed = capsys.readouterr().out
    assert printed.count("removed, as ") == 2 and "for 2 of 2 tracks" in printed
    stems.rename(tmp_path / "elsewhere")
    data.find_musdb(tmp_path / "elsewhere", cache=root)
    assert tree(root) == after
    other = tmp_path / "other" / "train" / "X.stem.mp4"
    other.parent.mkdir(parents=True)
    shutil.copy(EXCERPT, other)
    with pytest.raises(UserError, match=r"was not decoded from .*other; remove it, or name"):
        data.find_musdb(tmp_path / "other", cache=root)
    (root / "train" / "mine").mkdir()
    with pytest.raises(UserError, match=r"train/mine: was not decoded from .*elsewhere; remove"):
        data.find_musdb(tmp_path / "elsewhere", cache=root)
    assert (root / "train" / "mine").is_dir() and tree(root) == after


def start_python(code, **streams):
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams}
    return subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER, **streams)


def kill(process):
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_decoding_that_is_killed_goes_on(stems, tmp_path):
    for n in range(30):
        shutil.copy(EXCERPT, stems / "train" / f"{n:02d}.stem.mp4")
    process = start_python(f"import data; data.find_musdb({str(stems)!r})")
    root = tmp_path / "stems-wav"
    while process.poll() is None and len([*root.glob("*/[!.]*")]) < 3:
        time.sleep(0.01)
    kill(process)
    finished = {folder: tree(folder) for folder in root.glob("*/[!.]*")}
    assert 3 <= len(finished) < 33 and all(len(files) == 6 for files in finished.values())
    data.find_musdb(stems)
    assert all(tree(folder) == files for folder, files in finished.items())
    assert len(tree(root)) == 33 * 6 and not list(root.rglob("*.part"))
    assert len({path.stat().st_size for path in root.rglob("*.wav")}) == 1


def test_decoding_side_by_side(stems, tmp_path):
    """Two trainings that start at the same time: one decodes, the other waits."""
    code = f"import data; print(data.find_musdb({str(stems)!r}))"
    processes = [start_python(code, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate()[0].split()[-1].decode() for process in processes]
    assert printed == [str(tmp_path / "stems-wav")] * 2
    assert len(tree(tmp_path / "stems-wav")) == 18


def test_decoding_that_cannot_be(stems, tmp_path, monkeypatch):
    """Too little space, an unwritable place, damaged files: one line, nothing half done."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"file/x: cannot be written to .* another folder with --cache"
    ):
        data.find_musdb(stems, cache=tmp_path / "file" / "x")
    with monkeypatch.context() as patch:
        full = namedtuple("usage", "free")(2_000_000)
        patch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(UserError, match=r"0\.02 GB needed, 0\.00 GB free; name another folder"):
            data.find_musdb(stems)
    assert tree(tmp_path / "stems-wav") == {}
    elsewhere = tmp_path / "elsewhere"
    assert data.find_musdb(stems, cache=elsewhere) == elsewhere and len(tree(elsewhere)) == 18
    content = EXCERPT.read_bytes()
    half = len(content) // 2
    damaged = content[:300_000] + bytes(50_000) + content[350_000:]
    for broken in (content[:1000], content[:half], content[:-5000], b"", damaged):
        (stems / "train" / "A - B.stem.mp4").write_bytes(broken)
        with pytest.raises(UserError, match=r"A - B.stem.mp4: .*replace it"):
            data.find_musdb(stems)
        assert not list((tmp_path / "stems-wav").glob("train/*A - B*"))
    shutil.copy(EXCERPT, stems / "train" / "A - B.stem.mp4")
    assert len(tree(data.find_musdb(stems))) == 18


# --------------------------------------------------------------------------------------- the sample


def zipped(files):
    """The bytes of a zip archive of {name: content}."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        for name, part in files.items():
            content.writestr(name, part)
    return archive.getvalue()


@pytest.fixture(scope="module")
def sample_zip():
    """An archive in the shape of MUSDB18's sample, with the real excerpt as every track."""
    places = ("train/A - B", "train/C - D", "test/E - F")
    return zipped({f"{place}.stem.mp4": EXCERPT.read_bytes() for place in places})


@contextlib.contextmanager
def serve(body, length=None, status=200, chunked=False, pause=0):
    """A server that answers with `body`, announced as `length` bytes long; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % (len(body) + 1) + body)  # ends within the chunk
                return
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(body), 1 << 18):
                    self.wfile.write(body[start : start + (1 << 18)])
                    time.sleep(pause)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/sample.zip"
    server.shutdown()
    server.server_close()


def test_sample_whole(sample_zip, tmp_path, monkeypatch):
    """Without --root the sample is fetched into musdb's own place, decoded beside it, once."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    with serve(sample_zip, len(sample_zip)) as url:
        monkeypatch.setitem(data.musdb_settings(), "sample-url", url)
        root = data.find_musdb()
    home = tmp_path / "MUSDB18"
    assert root == home / "MUSDB18-7-wav"
    places = ["test/E - F", "train/A - B", "train/C - D"]
    assert sorted(tree(home / "MUSDB18-7")) == [f"{place}.stem.mp4" for place in places]
    parts = index_dataset("musdb", None, ("train", "valid", "test"))  # the server is gone
    assert [len(part) for part in parts.values()] == [1, 1, 1]
    monkeypatch.setenv("MUSDB_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere: no such folder; MUSDB_PATH names one"):
        data.find_musdb()


def broken_samples(whole):
    half = len(whole) // 2
    for end in (0, 1, half, len(whole) - 1):
        yield (whole[:end], len(whole)), "broke off"
        yield (whole[:end], end), "could not be unpacked"
        yield (whole[:end], None), "could not be unpacked"
    yield (whole[:half], None, 200, True), "IncompleteRead"
    yield (b"<html>hello</html>" * 100, 1800), "could not be unpacked"
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    yield (flipped, len(whole)), "could not be unpacked"
    yield (b"gone", 4, 404), "Not Found"
    yield (b"", 0, 500), "Internal Server Error"
    for name in ("../evil.txt", "/tmp/evil.txt", "data/train/A.stem.mp4"):
        content = zipped({name: b"x" * 1000})
        yield (content, len(content)), "holds no train/"


def test_sample_broken(sample_zip, tmp_path, monkeypatch):
    """Broken off, truncated, no zip, HTTP errors, hostile paths: nothing stays but a good beginning."""
    monkeypatch.setattr(data.utils.time, "sleep", lambda seconds: None)
    folder = tmp_path / "home" / "MUSDB18-7"
    part = folder.with_name("..MUSDB18-7.zip.part")
    for answer, message in broken_samples(sample_zip):
        with serve(*answer) as url, pytest.raises(UserError) as caught:
            data.fetch_archive(url, folder)
        assert message in str(caught.value) and url in str(caught.value)
        assert f"unpack it to {folder}" in str(caught.value)
        part.unlink(missing_ok=True)
        assert [path for path in tmp_path.rglob("*") if path != folder.parent] == [], message
    assert not Path("/tmp/evil.txt").exists()
    with serve(sample_zip, len(sample_zip)) as url:
        data.fetch_archive(url, folder)
    assert len(tree(tmp_path)) == 3


def test_sample_killed(sample_zip, tmp_path):
    """What is left of a download that was killed is not taken for whole."""
    folder = tmp_path / "MUSDB18-7"
    with serve(sample_zip, len(sample_zip), pause=0.2) as url:
        code = f"import data, pathlib; data.fetch_archive({url!r}, pathlib.Path({str(folder)!r}))"
        process = start_python(code)
        while process.poll() is None and not any(
            path.stat().st_size for path in tmp_path.rglob(".*.part") if path.is_file()
        ):
            time.sleep(0.01)
        kill(process)
    assert not folder.exists() and list(tmp_path.iterdir())
    with serve(sample_zip, len(sample_zip)) as url:
        data.fetch_archive(url, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["MUSDB18-7"] and len(tree(tmp_path)) == 3


def test_fetch_set(sample_zip, tmp_path, monkeypatch, capsys):
    """--download: says size and licence first, refuses what is there and full disks, resumes, ends."""
    root, archive = tmp_path / "sets" / "MUSDB18", tmp_path / "sets" / "..MUSDB18.zip.part"
    sha256 = hashlib.sha256(sample_zip).hexdigest()
    with serve(sample_zip, len(sample_zip)) as url:
        gigabytes = len(sample_zip) / 1e9
        monkeypatch.setitem(data.SETS, "musdb18hq", (url, gigabytes, gigabytes, sha256))
        root.mkdir(parents=True)
        (root / "mine.wav").touch()
        with pytest.raises(UserError, match="MUSDB18: holds something else; name an empty"):
            data.fetch_set("musdb18hq", root)
        (root / "mine.wav").unlink()
        full = shutil.disk_usage(tmp_path)._replace(free=0)
        with monkeypatch.context() as patch, pytest.raises(UserError, match="0 GB are free there"):
            patch.setattr(shutil, "disk_usage", lambda path: full)
            data.fetch_set("musdb18hq", root)
        capsys.readouterr()
        archive.write_bytes(b"the beginning of another day")  # the server can't go on from there
        assert train.main(["--download", "musdb18hq", "--root", str(root)]) == root
        printed = capsys.readouterr().out
        assert "GB to fetch" in printed and "for research and education" in printed
        assert f"Next: python train.py --root {root} --is-wav" in printed
    assert [path.name for path in root.parent.iterdir()] == ["MUSDB18"] and len(tree(root)) == 3
    assert data.fetch_set("musdb18hq", root) == root  # the server is gone: nothing is asked for
    with pytest.raises(UserError, match="--download musdb18: needs --root"):
        train.main(["--download", "musdb18"])
    with pytest.raises(UserError, match="--epochs: is not used with --download; leave it out"):
        train.main(["--download", "musdb18", "--root", str(root), "--epochs", "3"])


@pytest.mark.parametrize("problem", ["refused", "not found", "unknown host"])
def test_fallback_to_synthesized_songs(problem, tmp_path, monkeypatch, capsys):
    """No network: one line says what failed and what is used instead, at once, every time."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    monkeypatch.setattr(data, "find_synthetic", lambda: "songs")
    addresses = {"refused": "http://127.0.0.1:9/s", "unknown host": "http://no-such-host.invalid/s"}
    with serve(b"", 0, 404) as url:
        address = addresses.get(problem, url)
        monkeypatch.setitem(data.musdb_settings(), "sample-url", address)
        for _ in range(2):
            assert data.find_musdb() == "songs"
            lines = capsys.readouterr().out.splitlines()
            assert len(lines) == 1 and address in lines[0]
            assert lines[0].endswith("Synthesized songs are used instead.")
    assert tree(tmp_path) == {}


# -------------------------------------------------------------------------------- synthesized songs

WAVS = ["bass.wav", "drums.wav", "mixture.wav", "other.wav", "vocals.wav"]


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Three synthesized songs of eight seconds, and the real excerpt."""
    root = tmp_path_factory.mktemp("synthetic") / "songs"
    return data.find_synthetic(root, 8.0, {"train": 2, "test": 1})


def test_synthesized_dataset(songs, excerpt_folder, monkeypatch):
    """MUSDB18's layout, 16 bit at 44.1 kHz; the mixture is the sum; the excerpt is among the tests."""
    read_with_soundfile(monkeypatch)
    made = [
        "train/Synthesized - Song 01",
        "train/Synthesized - Song 02",
        "test/Synthesized - Song 01",
    ]
    real = f"test/{excerpt_folder.name}"
    expected = [f"{place}/{name}" for place in (*made, real) for name in WAVS]
    assert sorted(tree(songs)) == sorted([*expected, f"{real}/source.json", "songs.json"])
    for place in made:
        audio = {
            path.stem: soundfile.read(path, dtype="int16") for path in (songs / place).iterdir()
        }
        shapes = {(rate, samples.shape) for samples, rate in audio.values()}
        assert shapes == {(44100, (8 * 44100, 2))}
        total = sum(audio[name][0] for name in SOURCES)
        np.testing.assert_array_equal(audio["mixture"][0], total)
        assert 3000 < np.abs(total.astype(int)).max() < 0.9 * 32768
    tracks = musdb.DB(root=str(songs), is_wav=True)
    found = sorted(f"{track.subset}/{track.name}" for track in tracks)
    assert found == sorted([*made, real]) and tracks[0].stems.shape == (5, 8 * 44100, 2)
    for name in WAVS:
        assert (songs / real / name).read_bytes() == (excerpt_folder / name).read_bytes()


def test_synthesized_songs_are_made_once_and_the_same(songs, tmp_path, capsys):
    """Kept as they are; the same from the same seed; all different; killed half-way, it goes on."""
    before = tree(songs)
    data.find_synthetic(songs, 8.0, {"train": 2, "test": 1})
    assert tree(songs) == before and capsys.readouterr().out == ""
    again = tmp_path / "again"
    process = start_python(
        f"import data; data.find_synthetic({str(again)!r}, 8.0, dict(train=2, test=1))"
    )
    while process.poll() is None and not list(again.glob("t*/.*.part")):
        time.sleep(0.002)
    kill(process)
    assert len(list(again.glob("t*/[!.]*"))) < 4
    data.find_synthetic(again, 8.0, {"train": 2, "test": 1})
    contents = []
    for root in (songs, again):
        contents.append({place: (root / place).read_bytes() for place in tree(root)})
    assert contents[0] == contents[1] and not list(again.rglob("*.part"))
    assert len(set(contents[0].values())) == 22


def test_synthesized_songs_stay_out_of_other_folders(musdb_root, monkeypatch, tmp_path):
    before = tree(musdb_root)
    with pytest.raises(
        UserError, match="train/Song 0: is no synthesized song; name another folder"
    ):
        index_dataset("synthetic", musdb_root, ("train",))
    assert tree(musdb_root) == before
    made = []
    monkeypatch.setattr(data, "make_tracks", lambda *args: made.append(args[-2]))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = data.find_synthetic(), data.find_synthetic("~/mine")
    assert found[0].parent == tmp_path / "MUSDB18" and found[0].name.startswith("synthetic-")
    assert found[1] == tmp_path / "mine" and set(made) == set(found)


def test_songs_of_other_code(songs, tmp_path):
    """Nobody trains on songs that data.py would not make: those of another version, or length."""
    with pytest.raises(UserError, match=r"songs: its songs are by another data\.py; remove it, or"):
        data.find_synthetic(songs, 9.0, {"train": 2, "test": 1})
    shutil.copytree(songs, tmp_path / "songs")
    (tmp_path / "songs" / "songs.json").unlink()  # as before there was one
    with pytest.raises(UserError, match="name another folder with --root"):
        data.find_synthetic(tmp_path / "songs", 8.0, {"train": 2, "test": 1})
    mine = tmp_path / "mine" / "songs.json"
    save(["of somebody"], mine)  # nor is a file of this name lost, or the test songs of before kept
    with pytest.raises(UserError, match="name another folder with --root"):
        data.find_synthetic(mine.parent, 8.0, {"train": 2, "test": 1})
    assert load(mine) == ["of somebody"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_synthesized_song(seed):
    """The same for the same seed; every source sounds in at least half of the time; nothing clips."""
    song = data.synthesize_song(seed, 20.0)
    assert sorted(song) == sorted(SOURCES)
    assert {(audio.shape, str(audio.dtype)) for audio in song.values()} == {
        ((882_000, 2), "float32")
    }
    again = data.synthesize_song(seed, 20.0)
    assert all(np.array_equal(song[name], again[name]) for name in SOURCES)
    other = data.synthesize_song(seed + 10, 20.0)
    assert not np.array_equal(song["vocals"], other["vocals"])
    assert 0.1 < np.abs(sum(song.values())).max() < 0.9
    for name, audio in song.items():
        seconds = np.sqrt((audio.reshape(20, -1) ** 2).mean(1))
        assert (seconds > 0.1 * seconds.max()).mean() >= 0.5, name
        assert not np.array_equal(audio[:, 0], audio[:, 1])
    assert data.synthesize_song(seed, 1.5, 16000)["drums"].shape == (24_000, 2)


def test_synthesized_songs_of_before():
    """This project's published figures come from songs of these levels."""
    song = data.synthesize_song(3, 4.0)
    levels = {name: float(audio.std(dtype=np.float64)) for name, audio in song.items()}
    before = {"drums": 0.054187, "bass": 0.059616, "other": 0.049457, "vocals": 0.053234}
    assert levels == pytest.approx(before, abs=5e-6)  # processors round differently


def test_rates_that_tie():
    """The lower one: not the one that a hash happens to come to first."""
    files = [data.AudioFile(f"{n}", rate, 2, 100, (0, 0), "int16") for n, rate in enumerate((2, 1))]
    for order in (files, files[::-1]):
        tracks = [data.Track(audio.path, {"vocals": audio}) for audio in order]
        assert data.most_common_rate(tracks) == 1


def test_validation_mixes_are_those_of_any_seed(tmp_path):
    for part, name in itertools.product(("train", "valid"), ("a", "b")):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        for n in range(3):
            audio = np.random.default_rng(n).standard_normal((4000, 2))
            soundfile.write(folder / f"{n}.wav", 0.1 * audio, 8000)
    flags = dict(target_dir="a", interferer_dirs=["b"])
    tracks = data.index_dataset("sourcefolder", tmp_path, ("train", "valid"), **flags)
    sets = [
        data.load_datasets(tracks, "sourcefolder", ["a"], 8000, seq_dur=0.2, seed=seed)
        for seed in (1, 2)
    ]
    for one, other in zip(*sets):
        same = all(torch.equal(x, y) for x, y in zip(one[0], other[0]))
        assert same == (one is not sets[0][0])


def test_a_stem_file_replaced_while_it_is_decoded(tmp_path, monkeypatch):
    """Its track is that of the old one, and is decoded anew."""
    stem, plain = tmp_path / "song.stem.mp4", data.utils.decode
    shutil.copy(EXCERPT, stem)

    def decode(*arguments):
        os.utime(stem, ns=(1, 1))
        yield from plain(*arguments)

    monkeypatch.setattr(data.utils, "decode", decode)
    data.decode_stem(stem, tmp_path / "song")
    assert not data.is_made(tmp_path / "song", stem)
    data.decode_stem(stem, tmp_path / "song")
    assert data.is_made(tmp_path / "song", stem)
