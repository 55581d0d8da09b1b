"""Reading, layouts, mixing, splits, download, decoding, synthesis: by equality, also with openunmix, musdb and soundfile."""

import contextlib
import http.server
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import musdb
import numpy as np
import pytest
import soundfile
import torch
from conftest import EXCERPT, FOLDER, write_song

import data
from data import Audio, RandomMixes, WholeTracks, index_dataset, index_musdb, load_datasets, read_as
from train import input_statistics, parse_args
from utils import SOURCES, UserError, report, resample

# ---------------------------------------------------------------------------------------------- reading files


def noise(length, channels=2, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (length, channels))


FORMATS = [("WAV", code) for code in ("PCM_16", "PCM_24", "PCM_32", "FLOAT")] + [("WAVEX", "PCM_16"), ("WAVEX", "PCM_24")]
OTHERS = [
    ("WAV", "DOUBLE"),
    ("WAV", "PCM_U8"),
    ("AIFF", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("MP3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind,code", FORMATS + OTHERS)
def test_read(kind, code, channels, tmp_path):
    """Any window of a file is that of soundfile's whole reading, and silent beyond its ends."""
    path = tmp_path / "a.bin"
    soundfile.write(path, noise(30_001, channels), 44100, format=kind, subtype=code)
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0].T
    audio = Audio.index(path)
    assert (audio.rate, audio.channels, audio.length) == (44100, channels, whole.shape[1])
    assert bool(audio.layout) == ((kind, code) in FORMATS)  # read from where they lie
    padded = np.pad(whole, [(0, 0), (500, 500)])
    for start, length in [
        (0, 30_001),
        (0, 1),
        (29_990, 100),
        (-100, 300),
        (-500, 100),
        (30_100, 50),
        (12_345, 6_789),
        (-400, 30_900),
    ]:
        window = audio.read(start, length)
        assert window.dtype == np.float32 and window.shape == (channels, length)
        np.testing.assert_allclose(window, padded[:, 500 + start : 500 + start + length], atol=2e-4 if kind == "MP3" else 0)


def riff(*chunks):
    body = b"WAVE" + b"".join(name + struct.pack("<I", size) + content for name, size, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_read_headers_of_other_programs(tmp_path):
    """Chunks in any order, of odd length, with an unknown length, WAVE_FORMAT_EXTENSIBLE, bytes after the end."""
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (1001, 2), np.int16)
    form = (b"fmt ", 16, struct.pack("<HHIIHH", 1, 2, 48000, 48000 * 4, 4, 16))
    guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    extensible = (b"fmt ", 40, struct.pack("<HHIIHHHHI", 0xFFFE, 2, 48000, 48000 * 4, 4, 16, 22, 16, 3) + guid)
    sound = (b"data", samples.nbytes, samples.tobytes())
    odd = (b"LIST", 5, b"INFO!\0")
    unknown = (b"data", 0xFFFFFFFF, samples.tobytes())
    for chunks in [(odd, form, sound), (sound, form), (form, odd, sound, odd), (extensible, odd, sound), (odd, form, unknown)]:
        path = tmp_path / "a.wav"
        path.write_bytes(riff(*chunks))
        audio = Audio.index(path)
        assert (audio.rate, audio.channels, audio.length) == (48000, 2, 1001)
        np.testing.assert_array_equal(audio.read(0, 1001), samples.T / np.float32(32768))


@pytest.mark.parametrize("kind,code", [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")])
def test_file_that_changes_after_indexing(kind, code, tmp_path):
    path = tmp_path / "a.bin"
    soundfile.write(path, noise(50_000), 44100, format=kind, subtype=code)
    content, audio = path.read_bytes(), Audio.index(path)
    for broken in (content[: len(content) // 2], content[:-1], content + b"x", content[:100] + b"!!!!" + content[104:], b""):
        time.sleep(0.005)  # the resolution of modification times
        path.write_bytes(broken)
        with pytest.raises(UserError, match="a.bin: was changed since it was indexed"):
            audio.read(0, 50_000)
    path.unlink()
    with pytest.raises(UserError, match="a.bin: is gone"):
        audio.read(0, 1)


@pytest.mark.parametrize("kind,code", [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_file_cut_short_before_indexing(kind, code, tmp_path):
    """Cut anywhere: refused, or whole as far as it goes (Ogg's length is that of the last whole page)."""
    path = tmp_path / "a.bin"
    soundfile.write(path, noise(50_000), 44100, format=kind, subtype=code)
    content, refused = path.read_bytes(), 0
    for end in (0, 3, 20, 44, 60, 5000, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:end])
        try:
            audio = Audio.index(path)
        except UserError as error:
            assert str(error).startswith(str(path))
            refused += 1
        else:
            assert kind == "OGG" and audio.read(0, audio.length).shape == (2, audio.length)
    assert refused >= 5


def test_unreadable_files(tmp_path):
    for name, content in [("text.wav", b"no audio " * 100), ("empty.wav", b""), ("folder.wav", None)]:
        path = tmp_path / name
        path.write_bytes(content) if content is not None else path.mkdir()
        with pytest.raises(UserError, match=f"{name}: is not audio that can be read"):
            Audio.index(path)
    for length, channels, message in [(0, 2, "has 2 channels and 0 samples"), (100, 3, "has 3 channels and 100 samples")]:
        soundfile.write(tmp_path / "a.wav", np.zeros((length, channels)), 44100)
        with pytest.raises(UserError, match=message):
            Audio.index(tmp_path / "a.wav")


@pytest.mark.parametrize("rate,new_rate", [(48000, 44100), (8000, 44100), (44100, 16000), (22050, 44100), (44100, 8000)])
def test_resampled_as_read(rate, new_rate, tmp_path):
    """Any window equals that of the whole file resampled at once."""
    soundfile.write(tmp_path / "a.wav", noise(rate // 2 + 7), rate, subtype="FLOAT")
    audio = Audio.index(tmp_path / "a.wav")
    whole = resample(torch.from_numpy(audio.read(0, audio.length)), rate, new_rate).numpy()
    length = whole.shape[1]
    assert data.length_at(new_rate, [audio]) == length
    padded = np.pad(whole, [(0, 0), (0, 1000)])
    for start, count in [(0, length), (0, 1), (1, 1000), (1234, 567), (length - 5, 5), (length - 100, 300)]:
        window = read_as(audio, start, count, new_rate, 2)
        assert window.shape == (2, count)
        inside = min(count, length - start)  # after the last sample the filter still rings
        np.testing.assert_allclose(window[:, :inside], padded[:, start : start + inside], atol=2e-6)


def test_channels(tmp_path):
    soundfile.write(tmp_path / "mono.wav", noise(100, 1), 44100)
    soundfile.write(tmp_path / "stereo.wav", noise(100, 2), 44100)
    mono, stereo = Audio.index(tmp_path / "mono.wav"), Audio.index(tmp_path / "stereo.wav")
    np.testing.assert_array_equal(read_as(mono, 5, 50, 44100, 2), np.repeat(mono.read(5, 50), 2, axis=0))
    np.testing.assert_allclose(read_as(stereo, 5, 50, 44100, 1)[0], stereo.read(5, 50).mean(0), atol=1e-7)


# ---------------------------------------------------------------------------------------------- layouts


def flags(*arguments):
    return parse_args([str(argument) for argument in arguments])[0]


def datasets(*arguments):
    args = flags(*arguments)
    return load_datasets(args, args.target[0], index_dataset(args))


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    """What openunmix's create_dummy_datasets.py makes: noise of 3 s at 8 kHz, in the folder shapes of its dataset classes."""
    root, rng = tmp_path_factory.mktemp("dummy"), np.random.default_rng(0)
    for split in ("train", "valid"):
        for track in "1234":
            for source in "1234":
                audio = rng.uniform(-0.2, 0.2, (24_000, 2))
                for place in (
                    f"TrackfolderDataset/{split}/{track}/{source}.wav",
                    f"SourceFolderDataset/{split}/{source}/{track}.wav",
                ):
                    path = root / place
                    path.parent.mkdir(parents=True, exist_ok=True)
                    soundfile.write(path, audio, 8000)
    return root


LAYOUTS = {
    "trackfolder_fix": ("TrackfolderDataset", "--target-file", "1.wav", "--interferer-files", "2.wav", "3.wav", "4.wav"),
    "trackfolder_var": ("TrackfolderDataset", "--target-file", "1.wav"),
    "aligned": ("TrackfolderDataset", "--input-file", "1.wav", "--output-file", "2.wav"),
    "sourcefolder": ("SourceFolderDataset", "--target-dir", "1", "--interferer-dirs", "2", "3", "4"),
}


@pytest.fixture()
def openunmix_data(monkeypatch):
    """openunmix.data, whose own reading needs a torchaudio of the past."""
    import openunmix.data

    def load_info(path):
        info = soundfile.info(str(path))
        return {"samplerate": info.samplerate, "samples": info.frames, "channels": info.channels, "duration": info.duration}

    def load_audio(path, start=0.0, dur=None, info=None):
        rate = soundfile.info(str(path)).samplerate
        audio = soundfile.read(
            path, -1 if dur is None else int(dur * rate), int(start * rate), dtype="float32", always_2d=True
        )[0]
        return torch.from_numpy(audio.T.copy()), rate

    monkeypatch.setattr(openunmix.data, "load_info", load_info)
    monkeypatch.setattr(openunmix.data, "load_audio", load_audio)
    return openunmix.data


@pytest.mark.parametrize("layout", ["trackfolder_fix", "trackfolder_var", "aligned"])
def test_whole_tracks_are_those_of_openunmix(layout, dummy, openunmix_data):
    folder, *rest = LAYOUTS[layout]
    _, valid, statistics = datasets("--dataset", layout, "--root", dummy / folder, *rest)
    if layout == "aligned":
        theirs = openunmix_data.AlignedDataset(dummy / folder, "valid", "1.wav", "2.wav")
        names = [path.parent.name for path, _ in theirs.tuple_paths]
    else:
        kinds = {
            "trackfolder_fix": (
                openunmix_data.FixedSourcesTrackFolderDataset,
                dict(interferer_files=["2.wav", "3.wav", "4.wav"]),
            )
        }
        kind, extra = kinds.get(layout, (openunmix_data.VariableSourcesTrackFolderDataset, {}))
        theirs = kind(dummy / folder, "valid", "1.wav", **extra)
        names = [track["path"].name for track in theirs.tracks]
    assert len(valid) == len(theirs) == len(statistics) == 4
    for track, ours in zip(valid.tracks, valid):
        for a, b in zip(ours, theirs[names.index(track.name)]):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_examples_of_each_layout(layout, dummy):
    """Each loads; an example is what it was drawn from; the target is a part of the mixture."""
    folder, *rest = LAYOUTS[layout]
    common = ("--dataset", layout, "--root", dummy / folder, *rest, "--seq-dur", 1, "--samples-per-track", 5)
    plain = [] if layout == "aligned" else ["--source-augmentations"]
    train, valid, _ = datasets(*common, *plain)
    assert (len(train), len(valid)) == (20, 100 if layout == "sourcefolder" else 4) and train.sample_rate == 8000
    for index in range(len(train)):
        x, y = train[index]
        assert (
            x.shape == y.shape == (2, 8000) and x.dtype == y.dtype == torch.float32 and x.is_contiguous() and y.is_contiguous()
        )
        rng = np.random.default_rng((42, index))
        drawn = {name: audio.read(start, 8000) for name, audio, start in train.draw(train.tracks[index // 5], rng)}
        target = drawn.pop("2" if layout == "aligned" else "1")
        np.testing.assert_array_equal(y, target)
        np.testing.assert_allclose(x, sum(drawn.values()) + (0 if layout == "aligned" else target), atol=1e-6)
    mono = datasets(*common, "--nb-channels", 1)[0][3]
    assert mono[0].shape == mono[1].shape == (1, 8000)


def coded_track(folder, names, track, length=8192):
    """Files whose samples tell track, source and position: 64 * track + source + n / 8192, exact in float32."""
    folder.mkdir(parents=True)
    for source, name in enumerate(names):
        audio = 64 * track + source + np.arange(length) / 8192
        soundfile.write(folder / name, audio.astype(np.float32), 8000, subtype="FLOAT")


@pytest.mark.parametrize(
    "layout,flag,same_track,same_time",
    [
        ("trackfolder_fix", [], True, True),
        ("trackfolder_fix", ["--random-track-mix"], False, False),
        ("trackfolder_var", [], True, True),
        ("trackfolder_var", ["--random-interferer-mix"], False, False),
        ("aligned", [], True, True),
    ],
)
def test_where_sources_come_from(layout, flag, same_track, same_time, tmp_path):
    """Each flag's way to mix: targets from every track equally often, at any position; interferers from where they should."""
    for split in ("train", "valid"):
        for track in range(4):
            coded_track(tmp_path / split / f"t{track}", ["a.wav", "b.wav"], track)
    names = {
        "trackfolder_fix": ["--target-file", "a.wav", "--interferer-files", "b.wav"],
        "trackfolder_var": ["--target-file", "a.wav"],
    }
    names = names.get(layout, ["--input-file", "b.wav", "--output-file", "a.wav"])
    train, _, _ = datasets(
        "--dataset",
        layout,
        "--root",
        tmp_path,
        "--seq-dur",
        0.5,
        "--samples-per-track",
        100,
        "--nb-channels",
        1,
        *([] if layout == "aligned" else ["--source-augmentations"]),
        *names,
        *flag,
    )
    firsts = np.array([[example[0, 0].item() for example in train[index]] for index in range(400)], np.float64)
    mixture, target = firsts.T
    interferer = mixture - (target if layout != "aligned" else 0)
    assert (target // 64 == np.repeat(range(4), 100)).all() and (target % 64 < 1).all() and (interferer % 64 // 1 == 1).all()
    positions = target % 1 * 8192
    assert positions.min() < 100 and 4000 < positions.max() <= 8192 - 4000
    assert (interferer // 64 == target // 64).mean() == (1 if same_track else pytest.approx(0.25, abs=0.08))
    assert (interferer % 1 == target % 1).all() == same_time
    assert len(set(interferer // 64)) == 4


def test_several_interferers(tmp_path):
    """--random-track-mix takes each interferer from a track of its own; --random-interferer-mix all from one, at one time."""
    for split in ("train", "valid"):
        for track in range(5):
            coded_track(tmp_path / split / f"t{track}", ["a.wav", "b.wav", "c.wav"], track)
    draws = {}
    for layout, flag in [("trackfolder_fix", "--random-track-mix"), ("trackfolder_var", "--random-interferer-mix")]:
        files = ["--target-file", "a.wav"] + ["--interferer-files", "b.wav", "c.wav"] * (layout == "trackfolder_fix")
        train, _, _ = datasets("--dataset", layout, "--root", tmp_path, "--seq-dur", 0.5, *files, flag)
        rows = [
            {n: (a.path, start) for n, a, start in train.draw(train.tracks[0], np.random.default_rng(i))} for i in range(100)
        ]
        draws[layout] = [
            (Path(r["b.wav"][0]).parent == Path(r["c.wav"][0]).parent, r["b.wav"][1] == r["c.wav"][1]) for r in rows
        ]
    assert set(draws["trackfolder_var"]) == {(True, True)}
    assert np.mean([same for same, _ in draws["trackfolder_fix"]]) == pytest.approx(0.2, abs=0.15)
    assert sum(start for _, start in draws["trackfolder_fix"]) < 5


def test_variable_tracks(tmp_path):
    """Any number of sources, hidden files and brackets in names; a missing target is silent, on request only."""
    for split in ("train", "valid"):
        coded_track(tmp_path / split / "one", ["vocals.wav"], 0)
        coded_track(tmp_path / split / "two", ["vocals.wav", "guitar [DI].wav", "x.y.wav"], 1)
        (tmp_path / split / "two" / "._vocals.wav").write_bytes(b"resource fork")
        (tmp_path / split / ".hidden").mkdir()
    train, valid, _ = datasets("--dataset", "trackfolder_var", "--root", tmp_path, "--seq-dur", 0.5)
    assert [sorted(track.sources) for track in train.tracks] == [["vocals"], ["guitar [DI].wav", "vocals", "x.y.wav"]]
    x, y = valid[1]
    np.testing.assert_allclose(x[0, :3], 3 * 64 + 3 + 3 * np.arange(3) / 8192)
    coded_track(tmp_path / "train" / "three", ["drums.wav"], 2)
    (tmp_path / "train" / "four").mkdir()
    with pytest.raises(UserError, match="four: lacks vocals.wav; add it or remove the track"):
        datasets("--dataset", "trackfolder_var", "--root", tmp_path)
    train, _, statistics = datasets("--dataset", "trackfolder_var", "--root", tmp_path, "--silence-missing", "--seq-dur", 0.5)
    assert [track.name for track in train.tracks] == ["one", "three", "two"]
    x, y = statistics[1]
    assert x.shape == y.shape == (2, 8192) and x[0, 5] == 128 + 5 / 8192 and not y.any()
    x, y = train[64]
    assert x.all() and not y.any()


def test_lengths_and_rates(tmp_path, capsys):
    """A track shorter than the sequence is padded; sources of different lengths and rates mix; one line says it is slow."""
    for split in ("train", "valid"):
        for track, (seconds, rate) in enumerate([(0.3, 8000), (2, 8000), (2, 16000)]):
            folder = tmp_path / split / str(track)
            folder.mkdir(parents=True)
            soundfile.write(folder / "vocals.wav", noise(round(seconds * rate), 1, track), rate)
            soundfile.write(folder / "drums.wav", noise(round(seconds * rate) // 2, 2, 9), rate)
    args = flags(
        "--dataset",
        "trackfolder_fix",
        "--root",
        tmp_path,
        "--interferer-files",
        "drums.wav",
        "--seq-dur",
        1,
        "--source-augmentations",
    )
    tracks = index_dataset(args)
    lines = capsys.readouterr().out.splitlines()
    assert tracks[2] == 8000 and len(lines) == 1 and "(16000 Hz)" in lines[0] and "convert them for speed" in lines[0]
    train, valid, _ = load_datasets(args, "vocals", tracks)
    x, y = train[0]
    np.testing.assert_array_equal(y[0, :2400], soundfile.read(tmp_path / "train/0/vocals.wav", dtype="float32")[0])
    assert x.shape == (2, 8000) and not x[:, 2400:].any() and torch.equal(x[:, 1200:], y[:, 1200:]) and not torch.equal(x, y)
    assert [len(y[0]) for _, y in valid] == [2400, 16000, 16000]
    for index in range(len(train)):
        assert all(part.shape == (2, 8000) and part.isfinite().all() for part in train[index])
    soundfile.write(tmp_path / "train/1/drums.wav", noise(12_001), 8000)
    pairs = datasets("--dataset", "aligned", "--root", tmp_path, "--input-file", "vocals.wav", "--output-file", "dr*.wav")[2]
    assert [part.shape[1] for part in pairs[1]] == [12_001, 12_001]  # a pair ends where the shorter one does
    assert [part.shape[1] for part in pairs[2]] == [8000, 8000]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--dataset", "trackfolder_fix"], "--dataset trackfolder_fix needs --root"),
        (
            ["--dataset", "trackfolder_fix", "--root", "R/nowhere"],
            "R/nowhere/train: no track folder with vocals.wav and drums.wav",
        ),
        (["--dataset", "trackfolder_fix", "--root", "."], "(expected train/<track>/...); . holds E, R, V"),
        (["--dataset", "trackfolder_fix", "--root", "R/train"], "R/train holds one, two"),
        (["--dataset", "trackfolder_fix", "--root", "R/train/one"], "R/train/one holds drums.wav, vocals.wav"),
        (
            ["--dataset", "trackfolder_fix", "--root", "R", "--interferer-files", "bass.wav"],
            "with vocals.wav and bass.wav in it (expected",
        ),
        (
            ["--dataset", "trackfolder_fix", "--root", "R", "--interferer-files", "sax.wav"],
            "R/train/one: lacks sax.wav; add it or remove the track",
        ),
        (["--dataset", "aligned", "--root", "R"], "R/train: no track folder with mixture.wav and vocals.wav in it"),
        (
            ["--dataset", "trackfolder_var", "--root", "R", "--target-file", "x.wav"],
            "R/train: no track folder with x.wav in it",
        ),
        (
            ["--dataset", "trackfolder_var", "--root", "R", "--silence-missing", "--ext", ".flac", "--target-file", "x"],
            "no track folder has a file *.flac",
        ),
        (["--dataset", "sourcefolder", "--root", "R"], "R/train/vocals: no files *.wav there; R/train holds one, two"),
        (["--dataset", "trackfolder_fix", "--root", "E"], "E/train: no track folder with vocals.wav"),
        (
            ["--dataset", "trackfolder_fix", "--root", "V", "--interferer-files", "drums.wav"],
            "V/valid: no track folder with vocals.wav and drums.wav",
        ),
        (["--root", "R"], "R/train: no track folder with mixture.wav and vocals.wav and drums.wav"),
        (["--root", "R/nowhere"], "R/nowhere: no such folder; --root names one that holds train/ and test/"),
    ],
)
def test_errors_before_training(arguments, message, tmp_path, monkeypatch):
    """Wrong roots (missing, one level too high or low, empty), missing files and splits: what was expected, what was found."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "valid"):
        for track in ("one", "two"):
            coded_track(Path("R", split, track), ["vocals.wav", "drums.wav"], 0)
    soundfile.write("R/train/two/sax.wav", noise(100), 8000)
    Path("E/train").mkdir(parents=True)
    shutil.copytree("R/train", "V/train")
    with pytest.raises(UserError) as caught:
        datasets(*arguments)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------- MUSDB18


def test_validation_split_is_that_of_musdb(tmp_path):
    listed = data.musdb_settings()["validation_tracks"]
    assert len(listed) == 14
    names = [*listed[:3], "Aardvark - A", "Zebra - Z"]
    for seed, name in enumerate(names):
        write_song(tmp_path / "train" / name, seconds=0.2, seed=seed)
        write_song(tmp_path / "test" / name, seconds=0.2, seed=seed)
    for split in ("train", "valid"):
        theirs = musdb.DB(root=str(tmp_path), is_wav=True, subsets="train", split=split)
        assert [track.name for track in index_musdb(tmp_path, split)] == [track.name for track in theirs]
    assert [track.name for track in index_musdb(tmp_path, "test")] == sorted(names)


def test_validation_split_of_other_songs(musdb_root, tmp_path):
    parts = [[track.name for track in index_musdb(musdb_root, split)] for split in ("train", "valid")]
    assert parts == [[f"Song {n}" for n in (1, 2, 3, 4, 5, 6)], ["Song 0", "Song 7"]]
    write_song(tmp_path / "train" / "The only one", seconds=0.2)
    with pytest.raises(UserError, match="train: has 1 tracks, all of them for validation; add more"):
        index_musdb(tmp_path, "train")


@pytest.mark.parametrize("target", ["vocals", "other", "accompaniment"])
def test_whole_songs_are_those_of_openunmix(target, musdb_root, tmp_path):
    """Validation: the track's own mixture file, which need not be the sum, and the target, to the bit."""
    import openunmix.data

    names = data.musdb_settings()["validation_tracks"][:2]
    for name, song in zip(names, sorted((musdb_root / "train").iterdir())):
        shutil.copytree(song, tmp_path / "train" / name)
        soundfile.write(tmp_path / "train" / name / "mixture.wav", noise(88_200, 2, len(name)), 44100)
    theirs = openunmix.data.MUSDBDataset(
        target, str(tmp_path), is_wav=True, split="valid", seq_duration=None, samples_per_track=1
    )
    ours = WholeTracks(index_musdb(tmp_path, "valid"), target, 44100)
    assert len(ours) == len(theirs) == 2 and [track.name for track in ours.tracks] == sorted(names)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_allclose(a[1], b[1], atol=0 if target != "accompaniment" else 1e-7)


def test_random_mixes_of_songs(musdb_root):
    """Every source from a track of its own, the target from all tracks in turn; as openunmix in shape and loudness."""
    import openunmix.data

    tracks = index_musdb(musdb_root, "train")
    ours = RandomMixes(tracks, "vocals", 44100, seq_dur=0.5, samples_per_track=30, mix="tracks")
    theirs = openunmix.data.MUSDBDataset(
        "vocals", str(musdb_root), is_wav=True, seq_duration=0.5, samples_per_track=30, random_track_mix=True
    )
    assert len(ours) == 6 * 30 and len(theirs) == 8 * 30
    for ours_part, theirs_part in zip(ours[0], theirs[0]):
        assert ours_part.shape == theirs_part.shape == (2, 22_050) and ours_part.dtype == theirs_part.dtype
    loudness = [
        np.mean([dataset[i][0].square().mean() for i in range(0, len(dataset), step)])
        for dataset, step in ((ours, 1), (theirs, 24))
    ]
    assert loudness[0] == pytest.approx(loudness[1], rel=0.4)
    drawn = [list(ours.draw(track, np.random.default_rng(i))) for i, track in enumerate(tracks * 30)]
    for rows, track in zip(drawn, tracks * 30):
        assert sorted(name for name, _, _ in rows) == sorted(SOURCES)
        assert dict((name, audio) for name, audio, _ in rows)["vocals"] == track.sources["vocals"]
    folders = [[Path(audio.path).parent.name for name, audio, _ in rows if name != "vocals"] for rows in drawn]
    assert np.mean([len(set(three)) == 3 for three in folders]) == pytest.approx(5 * 4 / 36, abs=0.15)
    assert {name for three in folders for name in three} == {track.name for track in tracks}


def test_accompaniment(musdb_root):
    mixes = RandomMixes(index_musdb(musdb_root, "train"), "accompaniment", 44100, seq_dur=0.5)
    x, y = mixes[7]
    drawn = {
        name: audio.read(start, 22_050) for name, audio, start in mixes.draw(mixes.tracks[0], np.random.default_rng((42, 7)))
    }
    np.testing.assert_allclose(x - y, drawn["vocals"], atol=1e-6)
    with pytest.raises(UserError, match="--target piano: no such source in the data; it has bass, drums, other, vocals"):
        RandomMixes(mixes.tracks, "piano", 44100)


def test_all_sources_at_once(musdb_root):
    """--target all: the sources one below the other, (J * C, N), which add up to the mixture."""
    tracks = index_musdb(musdb_root, "train")
    x, y = RandomMixes(tracks, "all", 44100, seq_dur=0.5)[3]
    assert x.shape == (2, 22_050) and y.shape == (8, 22_050)
    np.testing.assert_allclose(y.view(4, 2, -1).sum(0), x, atol=1e-6)
    x, y = WholeTracks(tracks, "all", 44100)[2]
    for source, part in zip(sorted(SOURCES), y.view(4, 2, -1), strict=True):
        np.testing.assert_array_equal(part, tracks[2].sources[source].read(0, 88_200))


# ---------------------------------------------------------------------------------------------- reproducible examples


@pytest.fixture(scope="module")
def mixes(musdb_root):
    augmentations = list(data.AUGMENTATIONS.values())
    return RandomMixes(
        index_musdb(musdb_root, "train"), "drums", 44100, seq_dur=0.25, samples_per_track=4, augmentations=augmentations
    )


@pytest.mark.parametrize("workers,context", [(0, None), (1, "spawn"), (4, "fork")])
def test_examples_are_functions_of_seed_epoch_and_index(workers, context, mixes):
    """In any order, in any number of processes, whatever else draws random numbers; two epochs and two seeds differ."""
    expected = {index: mixes[index] for index in range(2 * len(mixes))}
    order = np.random.default_rng(1).permutation(2 * len(mixes)).tolist()
    batches = [order[start : start + 6] for start in range(0, len(order), 6)]
    loader = torch.utils.data.DataLoader(mixes, batch_sampler=batches, num_workers=workers, multiprocessing_context=context)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for batch, (x, y) in zip(batches, loader, strict=True):
        random.random(), np.random.rand(), torch.rand(1)
        for row, index in enumerate(batch):
            assert torch.equal(x[row], expected[index][0]) and torch.equal(y[row], expected[index][1])
    distinct = {x.numpy().tobytes() for x, _ in expected.values()}
    assert len(distinct) == len(expected) == 48
    other = RandomMixes(
        mixes.tracks, "drums", 44100, seq_dur=0.25, samples_per_track=4, seed=43, augmentations=mixes.augmentations
    )
    assert not any(torch.equal(other[index][0], expected[index][0]) for index in range(24))


def test_file_that_changes_while_workers_read(tmp_path, capsys):
    """An error in a loading process ends in the same one line as anywhere."""
    for n in range(2):
        write_song(tmp_path / "train" / f"Song {n}", seconds=0.2, seed=n)
    loader = torch.utils.data.DataLoader(RandomMixes(index_musdb(tmp_path, "train"), "bass", 44100, seq_dur=0.1), num_workers=1)
    (tmp_path / "train" / "Song 1" / "bass.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError) as caught:
        list(loader)
    assert report(caught.value) == 2
    line = f"error: {tmp_path}/train/Song 1/bass.wav: was changed since it was indexed; start again\n"
    assert capsys.readouterr().err == line


def test_drawing_leaves_global_random_state_alone(mixes):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    mixes[3]
    assert (
        states[0] == random.getstate()
        and states[1] == np.random.get_state()[1].tolist()
        and torch.equal(states[2], torch.get_rng_state())
    )


def test_augmentations(musdb_root):
    """Gain between 0.25 and 1.25 and a swap in half of the cases, each source by itself; one more takes a function."""
    rng, audio = np.random.default_rng(0), noise(10).T.astype(np.float32)
    before = audio.copy()
    gains = np.array([(data.augment_gain(audio, rng) / audio).mean() for _ in range(2000)])
    assert 0.25 <= gains.min() < 0.26 and 1.24 < gains.max() <= 1.25 and gains.mean() == pytest.approx(0.75, abs=0.02)
    swaps = np.mean([np.array_equal(data.augment_channelswap(audio, rng), audio[::-1]) for _ in range(2000)])
    assert swaps == pytest.approx(0.5, abs=0.04) and np.array_equal(audio, before)

    tracks = index_musdb(musdb_root, "train")
    plain = RandomMixes(tracks, "vocals", 44100, seq_dur=0.1)
    flipped = RandomMixes(tracks, "vocals", 44100, seq_dur=0.1, augmentations=[lambda audio, rng: -audio])
    assert torch.equal(flipped[5][0], -plain[5][0]) and torch.equal(flipped[5][1], -plain[5][1])
    calls = []
    list(
        RandomMixes(
            tracks, "vocals", 44100, seq_dur=0.1, augmentations=[lambda audio, rng: calls.append(rng.random()) or audio]
        )[0]
    )
    assert len(set(calls)) == 4  # once for each source
    args = flags("--root", musdb_root)
    assert args.source_augmentations == ["gain", "channelswap"] and args.samples_per_track == 64
    assert load_datasets(args, "vocals", index_dataset(args))[0].augmentations == [data.augment_gain, data.augment_channelswap]


def test_input_statistics(musdb_root, openunmix_data):
    """Those of openunmix's script: mean and deviation of all frames, of whole mixtures, whatever the augmentations are."""
    from openunmix import transforms

    encoder = torch.nn.Sequential(
        transforms.make_filterbanks(n_fft=1024, n_hop=256, center=True)[0], transforms.ComplexNorm(mono=False)
    )
    tracks = index_musdb(musdb_root, "train")
    mixtures = [torch.from_numpy(soundfile.read(track.mixture.path, dtype="float32")[0].T.copy()) for track in tracks]
    frames = torch.cat([encoder(x[None]).mean(1)[0] for x in mixtures], dim=1).double()  # (F, T)
    for extra in (
        ["--source-augmentations", "gain"],
        ["--source-augmentations"],
        ["--seed", 7, "--seq-dur", 0.3, "--target", "bass"],
    ):
        args = flags("--root", musdb_root, "--nfft", 1024, "--nhop", 256, *extra)
        songs = load_datasets(args, args.target[0], index_dataset(args))[2]
        mean, scale = input_statistics(songs, args, torch.device("cpu")).values()
        np.testing.assert_allclose(mean, frames.mean(1), rtol=1e-6)
        np.testing.assert_allclose(scale, frames.std(1, correction=0).clamp_min(1e-4 * max(scale)), rtol=1e-6)


# ---------------------------------------------------------------------------------------------- stems to WAV


@pytest.fixture()
def stems(tmp_path):
    """A root with three tracks, each the real excerpt."""
    for place in ("train/A - B", "train/C [D] - E", "test/F - G"):
        path = tmp_path / "stems" / f"{place}.stem.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(EXCERPT, path)
    return tmp_path / "stems"


def tree(folder):
    """Every file below a folder, hidden ones too, and when it was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_decoded_stems_are_those_of_musdb(stems, tmp_path, capsys):
    """To the bit, in musdb's WAV layout; decoded once; musdb reads them with is_wav=True."""
    root = data.find_data(stems)
    needed = sum(path.stat().st_size for path in root.glob("*/*/*.wav")) / 1e9
    assert root == tmp_path / "stems-wav" and f"made once, in {root}: {needed:.2f} GB for 3 of 3 tracks" in capsys.readouterr().out
    theirs, again = musdb.DB(root=str(stems), subsets="train"), musdb.DB(root=str(root), is_wav=True, subsets="train")
    assert [track.name for track in theirs] == [track.name for track in again] == ["A - B", "C [D] - E"]
    decoded = theirs[0].stems  # (5, N, 2)
    np.testing.assert_array_equal(decoded, again[0].stems)
    for stem, name in zip(decoded, ("mixture", "drums", "bass", "other", "vocals")):
        audio, rate = soundfile.read(root / "train" / "C [D] - E" / f"{name}.wav", dtype="int16")
        assert rate == 44100 and soundfile.info(root / "test" / "F - G" / f"{name}.wav").subtype == "PCM_16"
        np.testing.assert_array_equal(audio, stem * 32768)
    before = tree(root)
    assert len(before) == 15 and data.find_data(stems) == root and tree(root) == before
    assert capsys.readouterr().out == ""
    assert data.find_data(root) == root and data.find_data(stems, is_wav=True) == stems


def test_decoding_that_is_killed_goes_on(stems, tmp_path):
    for n in range(12):
        shutil.copy(EXCERPT, stems / "train" / f"{n:02d}.stem.mp4")
    code = f"import data; data.find_data({str(stems)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root = tmp_path / "stems-wav"
    while process.poll() is None and len([folder for folder in root.glob("*/[!.]*")]) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {folder: tree(folder) for folder in root.glob("*/[!.]*")}
    assert 3 <= len(finished) < 15 and all(len(files) == 5 for files in finished.values())
    data.find_data(stems)
    assert all(tree(folder) == files for folder, files in finished.items())
    assert len(tree(root)) == 15 * 5 and not list(root.rglob("*.part"))
    assert {path.stat().st_size for path in root.rglob("*.wav")} == {next(root.glob("train/*/bass.wav")).stat().st_size}


def test_decoding_side_by_side(stems, tmp_path):
    """Two trainings that start at the same time: one decodes, the other waits."""
    code = f"import data; print(data.find_data({str(stems)!r}))"
    run = [
        subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.communicate()[0].split()[-1].decode() for process in run] == [str(tmp_path / "stems-wav")] * 2
    assert len(tree(tmp_path / "stems-wav")) == 15


def test_decoding_that_cannot_be(stems, tmp_path, monkeypatch):
    """Too little space, a place that can't be written, damaged stem files: one line with the remedy, nothing half done."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/x: cannot be written to .* name another folder with --cache"):
        data.find_data(stems, cache=tmp_path / "file" / "x")
    with monkeypatch.context() as patched:
        patched.setattr(
            shutil, "disk_usage", lambda path: os.terminal_size((1000, 1000)) and type("usage", (), {"free": 2_000_000})
        )
        with pytest.raises(UserError, match=r"0\.02 GB needed, 0\.00 GB free; name another folder with --cache"):
            data.find_data(stems)
    assert tree(tmp_path / "stems-wav") == {}
    assert (
        data.find_data(stems, cache=tmp_path / "elsewhere") == tmp_path / "elsewhere"
        and len(tree(tmp_path / "elsewhere")) == 15
    )
    content = EXCERPT.read_bytes()
    for broken in (
        content[:1000],
        content[: len(content) // 2],
        content[:-5000],
        b"",
        content[:300_000] + bytes(50_000) + content[350_000:],
    ):
        (stems / "train" / "A - B.stem.mp4").write_bytes(broken)
        with pytest.raises(UserError, match="A - B.stem.mp4: (is not a stem file|cannot be decoded)"):
            data.find_data(stems)
        assert not list((tmp_path / "stems-wav").glob("train/*A - B*"))
    shutil.copy(EXCERPT, stems / "train" / "A - B.stem.mp4")
    assert len(tree(data.find_data(stems))) == 15


# ---------------------------------------------------------------------------------------------- the sample


@pytest.fixture(scope="module")
def sample_zip():
    """An archive in the shape of MUSDB18's sample, with the real excerpt as every track."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        for place in ("train/A - B", "train/C - D", "test/E - F"):
            content.write(EXCERPT, f"{place}.stem.mp4")
    return archive.getvalue()


@contextlib.contextmanager
def serve(body, length=None, status=200, chunked=False, pause=0):
    """A server on 127.0.0.1 that answers with `body`, announced as `length` bytes long; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % (len(body) + 1) + body)  # breaks off before the chunk ends
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


def archive(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name in names:
            content.writestr(name, b"x" * 1000)
    return buffer.getvalue()


def test_sample_whole(sample_zip, tmp_path, monkeypatch, capsys):
    """Without --root the sample is fetched into musdb's own place, decoded beside it, and not fetched again."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    with serve(sample_zip, len(sample_zip)) as url:
        monkeypatch.setitem(data.musdb_settings(), "sample-url", url)
        root = data.find_data()
    assert root == tmp_path / "MUSDB18" / "MUSDB18-7-wav"
    assert sorted(tree(tmp_path / "MUSDB18" / "MUSDB18-7")) == [
        "test/E - F.stem.mp4",
        "train/A - B.stem.mp4",
        "train/C - D.stem.mp4",
    ]
    assert len(index_musdb(root, "train")) == len(index_musdb(root, "valid")) == len(index_musdb(root, "test")) == 1
    assert data.find_data() == root  # the server is gone
    assert len(musdb.DB(download=True)) == 3  # musdb takes it for its own download
    monkeypatch.setenv("MUSDB_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere: no such folder; MUSDB_PATH names one"):
        data.find_data()


def broken_samples(whole):
    half = len(whole) // 2
    for end in (0, 1, half, len(whole) - 1):
        yield f"breaks off after {end}", (whole[:end], len(whole)), "broke off after"
        yield f"truncated to {end}", (whole[:end], end), "could not be unpacked"
        yield f"truncated to {end}, length unknown", (whole[:end], None), "could not be unpacked"
    yield "breaks off within a chunk", (whole[:half], None, 200, True), "IncompleteRead"
    yield "not a zip", (b"<html>hello</html>" * 100, 1800), "could not be unpacked"
    yield "a flipped byte", (whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :], len(whole)), "could not be unpacked"
    yield "HTTP error", (b"gone", 4, 404), "Not Found"
    yield "server error", (b"", 0, 500), "Internal Server Error"
    for name in ("../evil.txt", "/tmp/evil.txt", "train/../../evil.txt"):
        content = archive(["train/A.stem.mp4", name])
        yield f"holds {name}", (content, len(content)), "a path that leads out of it"
    content = archive(["data/train/A.stem.mp4"])
    yield "one level too high", (content, len(content)), "holds no train/*.stem.mp4"


def test_sample_broken(sample_zip, tmp_path, monkeypatch):
    """Broken off at any byte, truncated, not a zip, HTTP errors, hostile paths: nothing stays; the next run starts again."""
    folder = tmp_path / "home" / "MUSDB18-7"
    for what, answer, message in broken_samples(sample_zip):
        with serve(*answer) as url, pytest.raises(UserError) as caught:
            data.download_sample(url, folder)
        assert message in str(caught.value) and url in str(caught.value) and f"unpack it to {folder}" in str(caught.value), what
        assert [path for path in tmp_path.rglob("*") if path != folder.parent] == [], what
    with serve(sample_zip, len(sample_zip)) as url:
        data.download_sample(url, folder)
    assert len(tree(tmp_path)) == 3


def test_sample_killed(sample_zip, tmp_path, monkeypatch):
    """Killed in the middle of the download: what is left is not taken for whole, and the next run clears it away."""
    folder = tmp_path / "MUSDB18-7"
    with serve(sample_zip, len(sample_zip), pause=0.2) as url:
        code = f"import data, pathlib; data.download_sample({url!r}, pathlib.Path({str(folder)!r}))"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER, stderr=subprocess.DEVNULL)
        while process.poll() is None and not any(path.stat().st_size for path in tmp_path.rglob(".*.zip*") if path.is_file()):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not folder.exists() and list(tmp_path.iterdir())
    with serve(sample_zip, len(sample_zip)) as url:
        data.download_sample(url, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["MUSDB18-7"] and len(tree(tmp_path)) == 3


@pytest.mark.parametrize("problem", ["refused", "not found", "unknown host"])
def test_fallback_to_synthesized_songs(problem, tmp_path, monkeypatch, capsys):
    """No network: one line that says what failed and what is used instead, at once; the same in the next run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    monkeypatch.setattr(data, "make_synthetic", lambda root: root)
    with serve(b"", 0, 404) as url:
        address = {
            "refused": "http://127.0.0.1:9/s.zip",
            "not found": url,
            "unknown host": "http://no-such-host.invalid/s.zip",
        }[problem]
        monkeypatch.setitem(data.musdb_settings(), "sample-url", address)
        for _ in range(2):
            assert data.find_data() == tmp_path / "MUSDB18" / "synthetic-30s"
            lines = capsys.readouterr().out.splitlines()
            assert len(lines) == 1 and address in lines[0] and lines[0].endswith("Synthesized songs are used instead.")
    assert tree(tmp_path) == {}


# ---------------------------------------------------------------------------------------------- synthesized songs

NAMES = ["bass.wav", "drums.wav", "mixture.wav", "other.wav", "vocals.wav"]


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Three synthesized songs of eight seconds, and the real excerpt."""
    return data.make_synthetic(tmp_path_factory.mktemp("synthetic") / "songs", 8.0, {"train": 2, "test": 1})


def test_synthesized_dataset(songs, excerpt_folder):
    """MUSDB18's layout and names, 16 bit at 44.1 kHz; the mixture is the sum to the bit; the excerpt is among the tests."""
    assert sorted(tree(songs)) == sorted(
        f"{folder}/{name}"
        for folder in (
            "train/Synthesized - Song 01",
            "train/Synthesized - Song 02",
            "test/Synthesized - Song 01",
            f"test/{excerpt_folder.name}",
        )
        for name in NAMES
    )
    for folder in songs.glob("*/Synthesized*"):
        audio = {path.stem: soundfile.read(path, dtype="int16") for path in folder.iterdir()}
        assert {(rate, samples.shape) for samples, rate in audio.values()} == {(44100, (8 * 44100, 2))}
        np.testing.assert_array_equal(audio["mixture"][0], sum(audio[name][0] for name in SOURCES))
        assert 3000 < np.abs(audio["mixture"][0].astype(int)).max() < 0.9 * 32768
    tracks = musdb.DB(root=str(songs), is_wav=True)
    assert sorted((track.subset, track.name) for track in tracks) == [
        ("test", "Synthesized - Song 01"),
        ("test", excerpt_folder.name),
        ("train", "Synthesized - Song 01"),
        ("train", "Synthesized - Song 02"),
    ]
    assert tracks[0].stems.shape == (5, 8 * 44100, 2)
    for name in NAMES:
        assert (songs / "test" / excerpt_folder.name / name).read_bytes() == (excerpt_folder / name).read_bytes()


def test_synthesized_songs_are_made_once_and_the_same(songs, tmp_path, capsys):
    """Kept as they are; the same from the same seed, whoever makes them; all different; killed half-way, a rerun goes on."""
    before = tree(songs)
    data.make_synthetic(songs, 8.0, {"train": 2, "test": 1})
    assert tree(songs) == before and capsys.readouterr().out == ""
    again = tmp_path / "again"
    code = f"import data, pathlib; data.make_synthetic(pathlib.Path({str(again)!r}), 8.0, dict(train=2, test=1))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(again.rglob("*.part")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(list(again.glob("*/[!.]*"))) < 4
    data.make_synthetic(again, 8.0, {"train": 2, "test": 1})
    contents = [{place: (root / place).read_bytes() for place in tree(root)} for root in (songs, again)]
    assert contents[0] == contents[1] and not list(again.rglob("*.part"))
    assert len(set(contents[0].values())) == 20


def test_synthesized_songs_stay_out_of_other_folders(musdb_root, monkeypatch, tmp_path):
    before = tree(musdb_root)
    with pytest.raises(UserError, match="train/Song 0: is no synthesized song; name another folder with --root"):
        data.find_data(musdb_root, "synthetic")
    assert tree(musdb_root) == before
    made = []
    monkeypatch.setattr(data, "make_synthetic", made.append)
    monkeypatch.setenv("HOME", str(tmp_path))
    data.find_data(None, "synthetic"), data.find_data("~/mine", "synthetic")
    assert made == [tmp_path / "MUSDB18" / "synthetic-30s", tmp_path / "mine"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_synthesized_song(seed):
    """The same for the same seed; every source sounds in at least half of the seconds; nothing clips."""
    song = data.synthesize_song(seed, 20.0)
    assert sorted(song) == sorted(SOURCES) and all(
        audio.shape == (882_000, 2) and audio.dtype == np.float32 for audio in song.values()
    )
    again = data.synthesize_song(seed, 20.0)
    assert all(np.array_equal(song[name], again[name]) for name in SOURCES)
    assert not np.array_equal(song["vocals"], data.synthesize_song(seed + 10, 20.0)["vocals"])
    peak = np.abs(sum(song.values())).max()
    assert 0.1 < peak < 0.9
    for name, audio in song.items():
        seconds = np.sqrt((audio.reshape(20, -1) ** 2).mean(1))
        assert (seconds > 0.1 * seconds.max()).mean() >= 0.5, name
        assert not np.array_equal(audio[:, 0], audio[:, 1])
    assert data.synthesize_song(seed, 1.5, 16000)["drums"].shape == (24_000, 2)
