"""test.py: any input, every option, pages, and what it says and leaves when something is wrong."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest
import soundfile
import test
import torch
from conftest import FOLDER, make_model, run_script, sdr

import model
import utils
from utils import AudioFile, UserError, resample

TARGETS = ("vocals", "drums", "bass", "other")
SUM = ("--niter", 0, "--softmask", "--residual")  # estimates that add up to the mixture


@pytest.fixture
def separate(model_folder, tmp_path, monkeypatch, capsys):
    """Run test.py in this process and a folder of its own: (exit code, stdout, stderr's lines)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, model=model_folder):
        capsys.readouterr()
        try:
            code = test.main(["--quiet", "--model", *map(str, (model, *arguments))])
        except UserError as error:
            code = utils.report(error)
        printed, complaint = capsys.readouterr()
        return code, printed, complaint.splitlines()

    return call


@pytest.fixture(scope="module")
def song(excerpt):
    """Two seconds of music: (2, N) float32."""
    return excerpt["mixture"][:, 88200:176412]


def write(path, audio, rate=44100, **kwargs):
    if str(path).endswith(".wav"):
        kwargs = {"subtype": "FLOAT", **kwargs}
    soundfile.write(path, audio.T.numpy(), rate, **kwargs)


def write_film(path, audio, codec, rate=44100):
    """A file by PyAV, with a picture where its format is one for films."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=rate, layout="stereo")
        if path.suffix not in (".m4a", ".aac", ".mka"):
            video = container.add_stream("mpeg4", rate=10)
            video.width = video.height = 64
            picture = np.zeros((64, 64, 3), np.uint8)
            for n in range(20):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = n
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(audio.numpy(), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def read(path):
    return torch.cat(list(AudioFile.open(path).blocks()), dim=1)


def read_stems(folder):
    """{stem name: (C, N) float32 tensor}, sample rate."""
    names = [f"*.{extension}" for extension in test.FORMATS]
    paths = [path for name in names for path in Path(folder).glob(name)]
    rates = {soundfile.info(path).samplerate for path in paths}
    assert len(rates) == 1
    return {path.stem: read(path) for path in paths}, rates.pop()


def files_in(folder):
    """Everything below a folder, hidden files too, but the records."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in files if path.name != "stems.json")


def expected_files(*songs, extension="wav", stems=TARGETS):
    return sorted(f"{song}/{stem}.{extension}" for song in songs for stem in stems)


# --------------------------------------------------------------------------------- any input


def test_formats(separate, song, tmp_path, monkeypatch):
    """Whatever people have, in one call: stems of its rate, channels and length, that add up."""
    folder = tmp_path / "all sorts"
    folder.mkdir()
    write(folder / "wav.wav", song)
    for extension in ("aiff", "flac", "ogg", "mp3", "au", "caf"):
        write(folder / f"{extension}.{extension}", song)
    opus = resample(song, 44100, 48000)
    write(folder / "opus.opus", opus, 48000, format="OGG", subtype="OPUS")
    for extension in ("m4a", "aac", "mka", "mp4", "mkv", "mov"):
        write_film(folder / f"{extension}.{extension}", song, "aac")
    write_film(folder / "avi.avi", song, "pcm_s16le")
    write(folder / "24bit.wav", song, subtype="PCM_24")
    write(folder / "mono.wav", song[:1], subtype="PCM_16")
    loaded = []
    make_network = model.make_network
    count = lambda *args, **kwargs: loaded.append(args) or make_network(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(model, "make_network", count)
    code, _, complaint = separate(folder, *SUM)
    assert (code, complaint) == (0, []) and len(loaded) == 4  # networks are loaded once
    for path in sorted(folder.iterdir()):
        mixture = read(path)
        stems, rate = read_stems(tmp_path / "stems" / path.stem)
        assert sorted(stems) == ["bass", "drums", "other", "residual", "vocals"]
        assert rate == (48000 if path.suffix == ".opus" else 44100)
        assert all(stem.shape == mixture.shape for stem in stems.values())
        assert len(mixture) == (1 if path.stem == "mono" else 2)
        assert sdr(mixture, sum(stems.values())) > (45 if path.suffix == ".opus" else 90), path
        source = resample(song, 44100, rate)[: len(mixture)]
        if path.suffix != ".aac":  # which can't say that its first 1024 samples are the encoder's
            length = min(source.shape[1], mixture.shape[1])
            assert sdr(source[:, :length], mixture[:, :length]) > 8, path
            assert abs(source.shape[1] - mixture.shape[1]) < 2048, path


@pytest.mark.parametrize("rate,channels", [(8000, 1), (22050, 2), (48000, 1), (96000, 2)])
def test_sample_rates(separate, tmp_path, rate, channels):
    """Stems line up with the input: their sum is the input, and a sample's shift would not be."""
    length = rate + 123
    generator = torch.Generator().manual_seed(rate)
    spectrum = torch.fft.rfft(torch.randn(channels, length, generator=generator))
    highest = 0.45 * min(rate, 44100) / rate  # nothing that the model's rate would take away
    spectrum[:, round(highest * length) :] = 0
    mixture = 0.3 * torch.fft.irfft(spectrum, length) * torch.hann_window(length)
    write("song.wav", mixture, rate)
    assert separate("song.wav", *SUM)[0] == 0
    stems, found = read_stems(tmp_path / "stems" / "song")
    total = sum(stems.values())
    assert found == rate and total.shape == mixture.shape
    assert sdr(mixture, total) > 60 and sdr(mixture, total.roll(1, -1)) < 30


def test_start_and_duration(separate, song, tmp_path):
    write("song.flac", song, subtype="PCM_24")
    write("part.wav", song[:, 22050 : 22050 + 33075])
    assert separate("part.wav", "--start", 0, "--outdir", "a")[0] == 0
    part = ("--start", 0.5, "--duration", 0.75, "--outdir", "b")
    assert separate("song.flac", *part)[0] == 0
    expected, found = read_stems("a/part")[0], read_stems("b/song")[0]
    for name in TARGETS:
        assert found[name].shape == (2, 33075) and sdr(expected[name], found[name]) > 60
    assert separate("song.flac", "--start", 1.5, "--duration", 9, "--outdir", "c")[0] == 0
    assert read_stems("c/song")[0]["vocals"].shape[1] == song.shape[1] - 66150


@pytest.mark.parametrize("samples", [1, 100, 2048, 4095])
def test_shorter_than_one_fft(separate, song, samples):
    write("short.wav", song[:, :samples])
    assert separate("short.wav", *SUM)[0] == 0
    total = sum(read_stems("stems/short")[0].values())
    assert total.shape == (2, samples) and sdr(song[:, :samples], total) > 80


def test_silence_stays_silent(separate):
    write("silence.wav", torch.zeros(2, 50_000))
    assert separate("silence.wav")[0] == 0
    stems = read_stems("stems/silence")[0]
    assert sorted(stems) == sorted(TARGETS)
    assert all(stem.shape == (2, 50_000) and not stem.any() for stem in stems.values())


# --------------------------------------------------------------------------------- options


def test_sums_and_residual(separate, song):
    write("song.wav", song)
    assert separate("song.wav", "--residual", "rest", "--outdir", "a")[0] == 0
    sums = {"vocals": ["vocals"], "accompaniment": ["drums", "bass", "other", "rest"]}
    flags = ("--residual", "rest", "--aggregate", json.dumps(sums), "--outdir", "b")
    code, printed, _ = separate("song.wav", *flags)
    assert code == 0 and "b/song: vocals, accompaniment; 2.0 s of audio, " in printed
    parts, found = read_stems("a/song")[0], read_stems("b/song")[0]
    assert sorted(parts) == ["bass", "drums", "other", "rest", "vocals"]
    assert sorted(found) == ["accompaniment", "vocals"]
    for name, names in sums.items():
        assert sdr(sum(parts[part] for part in names), found[name]) > 120
    assert separate("song.wav", "--targets", "vocals", "--outdir", "c")[0] == 0
    assert sorted(read_stems("c/song")[0]) == [
        "accompaniment",
        "vocals",
    ]  # the rest is written, too


def test_options_reach_the_separator(separate, song, model_folder):
    """What comes out is what the separator of these settings makes of the song, in float32."""
    write("song.wav", song)
    flags = ("--niter", 2, "--softmask", "--wiener-win-len", 17, "--targets", "bass", "vocals")
    assert separate("song.wav", *flags)[0] == 0
    settings = {"niter": 2, "softmask": True, "wiener_win_len": 17}
    separator = model.load_separator(model_folder, ["bass", "vocals"], **settings)
    with torch.no_grad():
        expected = separator(song[None])[0]
    found = read_stems("stems/song")[0]
    for name, stem in zip(separator.targets, expected, strict=True):
        assert sdr(stem, found[name]) > 90


@pytest.mark.parametrize("extension", list(test.FORMATS))
def test_output_formats(separate, song, extension):
    """Float WAV clips nothing; the others are scaled down, and say so."""
    write("loud.wav", 8 * song)
    assert separate("loud.wav", *SUM, "--outdir", "float")[0] == 0
    code, printed, _ = separate("loud.wav", *SUM, "--ext", extension)
    assert code == 0
    files = expected_files("loud", extension=extension, stems=(*TARGETS, "residual"))
    assert files_in("stems") == files
    expected, found = read_stems("float/loud")[0], read_stems("stems/loud")[0]
    for name, stem in expected.items():
        peak = stem.abs().max().item()
        scale = peak if peak > 1 and extension != "wav" else 1
        assert (f"stems/loud/{name}.{extension}: peaks at " in printed) == (scale > 1)
        close = {"wav": 140, "flac": 100}.get(extension, 5)
        assert found[name].shape == stem.shape and sdr(stem / scale, found[name]) > close
    assert max(stem.abs().max() for stem in expected.values()) > 1.5


def test_mp3_has_no_96_khz(separate, song):
    write("song.wav", song[:, :1000], 96000)
    code, _, complaint = separate("song.wav", "--ext", "mp3")
    assert code == 2 and len(complaint) == 1 and files_in("stems") == []
    assert "vocals.mp3: MP3 can't hold 96000 Hz" in complaint[0]


def test_plain_wav_below_4_gb(tmp_path):
    for seconds, head in ((3600, b"RIFF"), (4 * 3600, b"RF64")):
        recording = SimpleNamespace(rate=44100, channels=2, length=seconds * 44100)
        with contextlib.ExitStack() as stack:
            test.Stem(tmp_path / "a.wav", recording, stack).write(torch.ones(2, 100))
        assert (tmp_path / "a.wav").read_bytes()[:4] == head
        assert soundfile.info(tmp_path / "a.wav").frames == 100


def test_progress(song, model_folder, tmp_path):
    write(tmp_path / "a song.wav", song)
    command = ("test.py", "a song.wav", "--model", model_folder)
    printed, bar = run_script(*command, cwd=tmp_path)
    assert "a song.wav:   0%" in bar and " times as fast as it plays]" in bar
    assert "100%" in bar and "2.0/2.0 s of audio [" in bar
    assert "stems/a song: vocals, drums, bass, other; 2.0 s of audio, " in printed
    assert "Next: " in printed


def test_progress_of_a_rounded_length(song, model_folder, tmp_path):
    write(tmp_path / "song.wav", song[:, : round(1.94 * 44100)])
    _, bar = run_script("test.py", "song.wav", "--model", model_folder, cwd=tmp_path)
    assert "1.9/1.9 s of audio [" in bar and "Warning" not in bar


def test_progress_of_a_network_that_listens_once(song, tmp_path, capsys):
    """A network without stages may need one pass only: the bar ends at its end all the same."""
    write(tmp_path / "song.wav", song)
    whole = SimpleNamespace(targets=["vocals"], sample_rate=44100)
    whole.stream = lambda blocks: (block[None] for block in blocks)
    written = []
    stem = SimpleNamespace(write=written.append)
    test.separate(whole, test.Recording(tmp_path / "song.wav"), {"v": stem}, {"v": ["vocals"]})
    assert torch.equal(torch.cat(written, dim=1), song)
    assert "2.0/2.0 s of audio" in capsys.readouterr().err


# --------------------------------------------------------------------------------- many files


def test_many_files_go_on_after_a_failure(separate, song, monkeypatch):
    write("a.wav", song[:, :9000])
    write("c.flac", song[:, :9000])
    Path("b.wav").write_text("not audio")
    code, _, complaint = separate("a.wav", "b.wav", "*.flac", "gone.wav")
    assert code == 1 and files_in("stems") == expected_files("a", "c")
    assert complaint[0].startswith("error: b.wav: is not audio")
    assert complaint[1].startswith("error: gone.wav: no such file")
    assert complaint[2:] == ["2 of 4 files failed: b.wav, gone.wav"]
    assert separate("b.wav", "gone.wav")[0] == separate("b.wav")[0] == 2  # nothing could be done
    monkeypatch.setattr(test, "process", failing(OSError(28, "No space left on device", "stems")))
    code, _, complaint = separate("a.wav", "c.flac", "--outdir", "x")
    assert code == 2 and complaint[:2] == 2 * [
        "error: stems: No space left on device; mend that or choose another folder"
    ]
    monkeypatch.setattr(test, "process", failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not taken for a bad file
        separate("a.wav", "c.flac", "--outdir", "x")


def failing(error):
    def function(*_):
        raise error

    return function


def test_finding_songs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = "x/a.wav x/b/a.MP3 x/b/c.flac x/c.mp3 x/notes.txt x/._c.mp3 x/out/a/vocals.wav "
    files += "d.wav d.mp3 [e].ogg"
    for name in files.split(" "):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()

    def names(*inputs):
        return [(str(path), name) for path, name in test.find_songs(inputs, "x/out")]

    folder = [("x/a.wav", "a"), ("x/b/a.MP3", "b/a"), ("x/b/c.flac", "b/c"), ("x/c.mp3", "c")]
    assert names("x") == folder
    assert names("d.wav", "d.mp3") == [("d.mp3", "d.mp3"), ("d.wav", "d.wav")]
    assert names("d.wav", "./d.wav", "d.w*") == [("d.wav", "d")]
    assert names("**/c.*") == [("x/b/c.flac", "c.flac"), ("x/c.mp3", "c.mp3")]
    found = [("x/a.wav", "a.wav"), ("x/b/a.MP3", "a.MP3"), ("x/c.mp3", "c")]
    assert names("x/a.wav", "x/b/a.MP3", "x/c.mp3") == found
    Path("x/b/a.wav").touch()
    assert names("x/a.wav", "x/b/../b/a.wav") == [("x/a.wav", "x/a"), ("x/b/../b/a.wav", "b/a")]
    Path("x/b/a.wav").unlink()
    assert names("[e].ogg") == [("[e].ogg", "[e]")]  # a name before a pattern
    with pytest.raises(UserError, match=r"c\.mp3: another input is also named x/c\.mp3"):
        names("x", "x/c.mp3", "x/b/../c.mp3")
    with pytest.raises(UserError, match=r"\*\.aif: no audio files there"):
        names("*.aif")
    with pytest.raises(UserError, match="x/out: no audio files there"):
        names("x/out")


def test_processes_share_the_files(song, model_folder, tmp_path):
    """torchrun without flags of ours; one process's failure is known at the end."""
    for name in ("a", "b", "c", "e"):
        write(tmp_path / f"{name}.wav", song[:, :20_000])
    (tmp_path / "d.wav").write_text("not audio")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [FOLDER / "test.py", tmp_path, "--model", model_folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    done = subprocess.run([*map(str, command)], check=False, **pipes)
    assert done.returncode == 1 and "1 of 5 files failed: " in done.stderr, done.stderr
    assert "d.wav: is not audio" in done.stderr
    assert files_in(tmp_path / "stems") == expected_files(*"abce")
    assert done.stdout.count("0.5 s of audio") == 4  # each separated once


NAMES = ["a 'quoted' \"name\" & $(x).wav", "Ü 音楽 🎵.flac", "two\nlines\t.wav", "-rf.mp3"]
NAMES += ["100%s {x}.wav", ".wav", "x" * 251 + ".wav"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(separate, song, tmp_path, name):
    write(tmp_path / name, song[:, :9000], **({"format": "WAV"} if name == ".wav" else {}))
    code, printed, complaint = separate("--html", "--", name)
    assert (code, complaint) == (0, []) and len(printed.splitlines()) == 3
    stem = Path(name).stem
    assert files_in("stems") == sorted([f"{stem}/index.html", *expected_files(stem)])


def test_name_that_is_no_text(separate, song, tmp_path):
    write("song.wav", song[:, :9000])
    os.rename("song.wav", b"\xff.wav")
    code, printed, complaint = separate(tmp_path)
    assert (code, complaint) == (0, []) and r"stems/\udcff: vocals, drums" in printed


# ------------------------------------------------------------- stems and what they were made from


def test_stems_are_kept_exactly_when_they_are_current(separate, song, tmp_path, monkeypatch):
    """The record of a folder says what its stems were made from."""
    write("song.wav", song[:, :20_000])
    other_model = make_model(tmp_path / "other", seed=9)

    def again(*flags, **kwargs):
        code, printed, complaint = separate("song.wav", *flags, **kwargs)
        assert (code, complaint) == (0, [])
        return printed.splitlines()[:-1]

    kept = "stems/song: kept vocals, drums, bass, other (--overwrite makes them anew)"
    assert "made anew" not in again()[0]
    drums = read("stems/song/drums.wav")
    assert again() == [kept]
    record = utils.load("stems/song/stems.json")
    assert record["length"] == 20_000 and record["stems"] == list(TARGETS)
    assert record["files"]["bass.wav"] == utils.stamp("stems/song/bass.wav")
    os.unlink("stems/song/vocals.wav")
    for flags, reason in [
        ((), "of vocals.wav, missing or changed"),
        (("--niter", 0), "the record has another model"),
        (("--duration", 0.1), "the record has another model, settings"),
        (("--start", 0.1), "the record has another settings"),
        (("--overwrite",), "of --overwrite"),
        (("--targets", "vocals", "drums"), "the record has another model, settings, stems"),
        (("--ext", "flac"), "the record has another model, settings, stems"),
        ((), "the record has another settings"),
    ]:
        said = again(*flags)
        others = "stems" in reason or (not flags and "settings" in reason)  # in files of their own
        assert said[0] == f"stems/song: made anew, because {reason}" and len(said) == 2 + others
        assert "of an earlier command" in said[-1] or not others
        assert "kept" in again(*(flag for flag in flags if flag != "--overwrite"))[0]
    assert torch.equal(read("stems/song/drums.wav"), drums)  # and the numbers are the same
    assert again(model=other_model)[0].endswith("the record has another model")
    assert again(model=other_model) == [kept]
    monkeypatch.setattr(utils, "code_fingerprint", lambda: "edited")
    assert again(model=other_model)[0].endswith("the record has another code")
    write("song.wav", song[:, :30_000])
    assert again(model=other_model)[0].endswith("the record has another stamp")
    Path("x").mkdir()
    write("x/song.wav", song[:, :10_000])  # another song of the same name
    assert separate("x/song.wav", model=other_model)[0] == 0
    assert read("stems/song/drums.wav").shape == (2, 10_000)


def test_page_and_picture_use_the_stems_of_the_record(separate, song):
    write("song.wav", song[:, :30_000])
    assert separate("song.wav", "--residual")[0] == 0
    for folder in ("A", "B"):
        Path(folder).mkdir()
    write("A/01.wav", song[:, :30_000])
    write("B/01.wav", song[:, 30_000:50_000])
    assert separate("A/01.wav")[0] == 0
    assert separate("B/01.wav", "--html", "--plot", "--duration", 0.2)[0] == 0
    content = page_content("stems/01/index.html")
    assert [stem["name"] for stem in content["stems"]] == ["mixture", *TARGETS]
    for stem in content["stems"]:
        data = io.BytesIO(base64.b64decode(stem["audio"].partition(",")[2]))
        assert len(soundfile.read(data)[0]) == 8820


@pytest.mark.parametrize("flags", [(), ("--html",), ("--plot",)])
def test_what_is_not_ours_stays(separate, song, flags):
    """Not a byte is written before all files of a song may be."""
    write("song.wav", song[:, :9000])
    theirs = {(): "bass.wav", ("--html",): "index.html", ("--plot",): "spectrograms.png"}[flags]
    for name in (theirs, "stems.json"):
        shutil.rmtree("stems", ignore_errors=True)
        Path("stems/song").mkdir(parents=True)
        Path("stems/song", name).write_text("of somebody else")
        code, _, complaint = separate("song.wav", *flags)
        message = f"stems/song/{name}: exists and was not written by this script"
        assert code == 2 and len(complaint) == 1 and message in complaint[0]
        assert os.listdir("stems/song") == [name]
        assert Path("stems/song", name).read_text() == "of somebody else"
        assert separate("song.wav", *flags, "--overwrite")[0] == 0
    Path("stems/song/drums.wav").write_text("edited by hand")
    assert separate("song.wav", *flags)[0] == 2
    assert Path("stems/song/drums.wav").read_text() == "edited by hand"


def test_an_input_is_never_written(separate, song):
    for folder in ("vocals", "other"):
        Path(folder).mkdir()
    write("vocals/vocals.wav", song[:, :9000])
    write("song.wav", song[:, :9000])
    os.link("song.wav", "other/vocals.wav")
    write("other.wav", song[:, :9000])
    before = {path: path.read_bytes() for path in Path().rglob("*.wav")}
    for inputs in (["vocals/vocals.wav"], ["other.wav", "song.wav"], ["vocals.wav/../other.wav"]):
        code, _, complaint = separate(*inputs, "--outdir", ".", "--overwrite")
        if inputs[0].startswith("vocals.wav"):
            assert code == 2  # there is no such file
        else:
            assert code in (1, 2) and "is an input, which is never written to" in complaint[0]
    assert {path: path.read_bytes() for path in before} == before


BAD_NAMES = [
    (["--residual", "vocals"], "--residual vocals: a target has this name"),
    (["--residual", "Vocals"], "two stems would have one name: vocals, drums, bass, other, Vocals"),
    (["--residual", "mixture"], "--residual: 'mixture' can't be a name"),
    (["--residual", "../x"], "--residual: '../x' can't be a name"),
    (["--aggregate", '{"mixture": ["vocals"]}'], "--aggregate: 'mixture' can't be a name"),
    (["--aggregate", '{"A": ["vocals"], "a": ["bass"]}'], "two stems would have one name: A, a"),
]


@pytest.mark.parametrize("flags,message", BAD_NAMES)
def test_names_of_stems(separate, song, flags, message):
    write("song.wav", song[:, :9000])
    code, _, complaint = separate("song.wav", *flags)
    assert code == 2 and len(complaint) == 1 and message in complaint[0], complaint
    assert files_in(".") == ["song.wav"]


def start(model_folder, tmp_path, *flags):
    command = [sys.executable, FOLDER / "test.py", "song.wav", "--model", model_folder, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], cwd=tmp_path, **pipes)


def wait_for(pattern, folder):
    deadline = time.monotonic() + 60
    while not list(folder.rglob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_on_one_song(song, model_folder, tmp_path):
    """The second waits, and finds the stems current."""
    write(tmp_path / "song.wav", song.repeat(1, 10))
    processes = [start(model_folder, tmp_path, "--quiet") for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("kept vocals" in text for text in printed) == [False, True], "\n".join(printed)
    assert files_in(tmp_path / "stems") == expected_files("song")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ended_half_way(song, model_folder, tmp_path, number):
    """Nothing half-made is left by what can be caught; after a kill the next run is as good."""
    write(tmp_path / "song.wav", song.repeat(1, 30))
    process = start(model_folder, tmp_path)
    wait_for("*.part", tmp_path)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    assert "Traceback" not in said and (killed or files_in(tmp_path / "stems") == [])
    process = start(model_folder, tmp_path, "--duration", 1)
    assert "made anew" not in process.communicate(timeout=60)[0] and process.returncode == 0
    assert set(expected_files("song")) <= set(files_in(tmp_path / "stems"))


def test_killed_while_files_get_their_names(separate, song, monkeypatch):
    """They are known to be ours, and made anew."""
    write("song.wav", song[:, :9000])
    with monkeypatch.context() as patch:
        patch.setattr(test, "write_record", failing(UserError("killed")))
        assert separate("song.wav")[0] == 2 and files_in("stems") == expected_files("song")
    code, printed, _ = separate("song.wav")
    assert code == 0 and "made anew, because of vocals.wav, drums.wav" in printed
    assert "kept" in separate("song.wav")[1]


def test_input_that_changes_between_the_passes(separate, song, monkeypatch):
    write("song.wav", song)
    passes = []

    class Input(test.Input):
        def __iter__(self):
            passes.append(1)
            if len(passes) == 2:
                write("song.wav", song[:, :50_000])
            return super().__iter__()

    monkeypatch.setattr(test, "Input", Input)
    code, _, complaint = separate("song.wav")
    assert code == 2 and files_in("stems") == [] and len(passes) == 2
    assert complaint == ["error: song.wav: was changed since it was opened; start again"]


# --------------------------------------------------------------------------------- folders side by side


def side_by_side(page):
    """What a page compares: {(version, stem): peaks}, and its title."""
    content = json.loads(re.search(r"const SONG = (.*);\n", page.read_text(encoding="utf-8"))[1])
    stems = {(stem["name"], stem["group"]): stem["peaks"] for stem in content["stems"]}
    return content["title"], stems


def test_page_of_folders(separate, song, tmp_path):
    for place, names in {"irm/test/Song": "ab", "test/Song": "bc", "x": "b"}.items():
        (tmp_path / place).mkdir(parents=True)
        for name in names:
            write(tmp_path / place / f"{name}.wav", song * (0.5 if place == "x" else 1))
    shutil.copy("x/b.wav", "x/b.mp3.txt")
    page = Path("stems/index.html")
    for _ in range(2):  # our own is written again
        assert test.main(["--page", "irm/test/Song", "test/Song/"]) == 0
        title, stems = side_by_side(page)
        assert title == "Song" and sorted(stems) == [("irm/test", "b"), ("test", "b")]
    assert test.main(["--page", "x", "test/Song", "--outdir", "out"]) == 0
    title, stems = side_by_side(Path("out/index.html"))
    assert title == "Side by side" and list(stems) == [("x", "b"), ("test/Song", "b")]
    loudest = [max(stems[key]) for key in stems]
    assert loudest[0] == pytest.approx(loudest[1] / 2, abs=0.01)  # their balance is kept
    page.write_text("edited by somebody")
    with pytest.raises(UserError, match="exists and was not written by this script"):
        test.main(["--page", "irm/test/Song", "test/Song"])
    assert test.main(["--page", "irm/test/Song", "test/Song", "--overwrite"]) == 0


def test_page_of_folders_refuses(separate, song, tmp_path):
    for place, part in {"one/a": song, "two/b": song, "three/a": song[:, :44100]}.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{place}.wav", part)
    for flags, message in [
        (["one"], "--page: compares two different folders"),
        (["one", "one/"], "--page: compares two different folders"),
        (["one", "nowhere"], f"{tmp_path / 'nowhere'}: holds no stems, files such as vocals.wav"),
        (["one", "two"], f"{tmp_path / 'one'}: has no stem that is in another folder"),
        (["one", "three"], "three/a.wav: lasts 1.0 s, and "),
        (["one", "three", "--html"], "--html: is not used with --page"),
        (["one", "three", "--niter", "2"], "--niter: is not used with --page"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            test.main(["--page", *flags])
    assert not Path("stems").exists()


# --------------------------------------------------------------------------------- bad input


def bad_file(kind, path, song):
    """Write a file that cannot be separated."""
    audio = song.T.numpy().copy()
    if kind == "text.wav":
        path.write_text("this is no audio\n" * 100)
    elif kind == "empty.wav":
        path.touch()
    elif kind == "no samples.wav":
        soundfile.write(path, audio[:0], 44100)
    elif kind in ("nan.wav", "inf.wav", "loud.wav"):
        audio[50_000] = {"nan.wav": np.nan, "inf.wav": -np.inf, "loud.wav": 1e30}[kind]
        soundfile.write(path, audio, 44100, subtype="FLOAT")
    elif kind == "six.wav":
        soundfile.write(path, np.zeros((100, 6)), 44100)
    elif kind == "folder.wav":
        path.mkdir()
    elif kind == "fifo.wav":
        os.mkfifo(path)
    elif kind != "missing.wav":
        if path.suffix == ".m4a":
            write_film(path, song, "aac")
        else:
            soundfile.write(path, audio, 44100)
        content = path.read_bytes()
        middle = len(content) // 2
        if kind.startswith("damaged"):
            path.write_bytes(content[:middle] + bytes(500) + content[middle + 500 :])
        else:
            path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.parametrize(
    "kind,message",
    [
        ("missing.wav", "no such file"),
        ("text.wav", "is not audio that can be read"),
        ("empty.wav", "is not audio that can be read"),
        ("no samples.wav", "contains no samples"),
        ("nan.wav", "has NaN, infinite or absurdly loud samples (+60 dBFS) at 1.1 s"),
        ("inf.wav", "has NaN, infinite or absurdly loud samples (+60 dBFS) at 1.1 s"),
        ("loud.wav", "has NaN, infinite or absurdly loud samples (+60 dBFS) at 1.1 s"),
        ("six.wav", "has 6 channels; mix it down"),
        ("folder.wav", "no audio files there"),
        ("fifo.wav", "is not a regular file"),
        ("cut.wav", "is truncated: "),
        ("cut.flac", "breaks off or is damaged"),
        ("cut.mp3", "is truncated: 1.3"),
        ("cut.ogg", "breaks off or is damaged"),
        ("cut.m4a", "is not audio that can be read"),
        ("damaged.m4a", "breaks off or is damaged"),
    ],
)
def test_bad_files(separate, song, tmp_path, kind, message):
    bad_file(kind, tmp_path / kind, song)
    code, _, complaint = separate(kind)
    assert code == 2 and len(complaint) == 1 and message in complaint[0], complaint
    assert complaint[0].startswith(f"error: {kind}: ") and files_in("stems") == []


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--start", 2.1], "song.wav: ends at 2.00 s: --start must be before that"),
        (["--start", -1], "--start: -1 is out of range"),
        (["--start", "1e300"], "--start: 1e300 is out of range"),
        (["--duration", 0], "--duration: 0 is out of range"),
        (["--aggregate", "{vocals}"], "--aggregate: is not JSON such as"),
        (["--aggregate", '{"a": "vocals"}'], "--aggregate: is not JSON such as"),
        (["--aggregate", '{"a": ["piano"]}'], "--aggregate: unknown target 'piano'; there are"),
        (["--outdir", "song.wav"], "song.wav/song: could not be written"),
        (["--outdir", "/proc/x"], "/proc/x/song: could not be written"),
        (["--ext", "m4a"], "--ext: invalid choice: 'm4a'"),
        (["--targets", "piano"], "has no target 'piano'; it has vocals, drums, bass, other"),
    ],
)
def test_bad_flags(separate, song, tmp_path, flags, message):
    write("song.wav", song)
    code, _, complaint = separate("song.wav", *flags)
    assert code == 2 and len(complaint) == 1 and message in complaint[0], complaint
    assert files_in(tmp_path) == ["song.wav"]


def test_nothing_but_numbers_is_written(separate, song, model_folder, tmp_path):
    """A weight that is NaN, say: no stems, in formats that would hold it and those that abort."""
    shutil.copytree(model_folder, tmp_path / "broken")
    write("song.wav", song[:, :20_000])
    for extension in ("wav", "mp3"):
        state = utils.load("broken/vocals.pth")
        state["fc3.weight"][5] = np.nan
        utils.save(state, "broken/vocals.pth")
        flags = ("--outdir", "broken stems", "--ext", extension)
        code, _, complaint = separate("song.wav", *flags, model="broken")
        assert code == 2 and len(complaint) == 1 and "NaN" in complaint[0], complaint
        assert not Path("broken stems").exists() or files_in("broken stems") == []


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3"])
def test_disk_full_half_way(song, model_folder, tmp_path, extension):
    """Nothing half-written stays, and stems of an earlier run are as they were."""
    write(tmp_path / "song.wav", song)
    (tmp_path / "stems" / "song").mkdir(parents=True)
    earlier = tmp_path / "stems" / "song" / f"vocals.{extension}"
    earlier.write_text("of an earlier run")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({song.numel() * 2}, -1))\n"
    code += "import runpy, sys; sys.argv[0] = 'test.py'\n"
    code += "runpy.run_path('test.py', run_name='__main__')"
    command = [sys.executable, "-c", code, tmp_path / "song.wav", "--overwrite", "--quiet"]
    command += ["--model", model_folder, "--outdir", tmp_path / "stems", "--ext", extension]
    pipes = {"cwd": FOLDER, "capture_output": True, "text": True}
    done = subprocess.run([*map(str, command)], check=False, **pipes)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "could not be written" in done.stderr
    assert files_in(tmp_path / "stems") == [f"song/vocals.{extension}"]
    assert earlier.read_text() == "of an earlier run"


@pytest.mark.parametrize("extension", ["flac", "ogg"])
def test_last_bytes_lost(separate, song, extension, monkeypatch):
    """Encoders write their last bytes when closed, and do not say that they could not."""
    write("song.wav", song)
    close = soundfile.SoundFile.close

    def lose(file):
        was_open = not file.closed
        close(file)
        name = os.fsdecode(file.name) if isinstance(file.name, bytes) else str(file.name)
        if was_open and name.endswith(".part") and file.mode == "w":
            os.truncate(file.name, os.path.getsize(file.name) * 9 // 10)

    monkeypatch.setattr(soundfile.SoundFile, "close", lose)
    code, _, complaint = separate("song.wav", "--ext", extension)
    assert code == 2 and len(complaint) == 1 and files_in("stems") == []
    assert "could not be written" in complaint[0]


# --------------------------------------------------------------------------------- pictures, pages


def page_content(path):
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith("const SONG = "))
    return json.loads(line.removeprefix("const SONG = ").removesuffix(";"))


def mp3_of(stem):
    data = base64.b64decode(stem["audio"].removeprefix("data:audio/mpeg;base64,"))
    return soundfile.read(io.BytesIO(data), always_2d=True)


def test_page(separate, song):
    write("a <b> song.wav", torch.cat([4 * song, 0 * song], 1))
    code, printed, _ = separate("a <b> song.wav", "--html")
    assert code == 0 and "wrote stems/a <b> song/index.html: open it in a browser" in printed
    content = page_content("stems/a <b> song/index.html")
    stems = content["stems"]
    assert content["title"] == "a <b> song"
    assert [stem["name"] for stem in stems] == ["mixture", *TARGETS]
    peaks = [stem["peaks"] for stem in stems]
    assert all(len(p) == 1000 and 0 <= min(p) <= max(p) <= 1 for p in peaks)
    assert max(peaks[0][:490]) > 0.3 and max(peaks[0][510:]) < 0.01  # in the right place
    assert max(map(max, peaks)) == pytest.approx(1)  # the loudest, and all others by its factor
    for stem in stems:
        audio, rate = mp3_of(stem)
        assert rate == 44100 and audio.shape == (2 * song.shape[1], 2)
        assert np.abs(audio).max() == pytest.approx(max(stem["peaks"]), abs=0.15)


def test_page_at_other_rates(separate, song):
    """Rates that MP3 does not have; mono."""
    write("song.wav", song[:1, :96000], 96000)
    assert separate("song.wav", "--html")[0] == 0
    for stem in page_content("stems/song/index.html")["stems"]:
        audio, rate = mp3_of(stem)
        assert rate == 44100 and audio.shape[1] == 1
        assert abs(len(audio) - song.shape[1] * 44100 // 96000) < 10


def test_page_of_half_an_hour(tmp_path, monkeypatch, capsys):
    """A browser decodes a whole page at once: the user is told what that takes."""
    monkeypatch.setattr(test, "mp3", lambda recording, scale: "data:audio/mpeg;base64,")
    for seconds in (1800, 1801):
        soundfile.write(tmp_path / "long.flac", np.zeros(1000 * seconds), 1000)
        recordings = {"mixture": test.Recording(tmp_path / "long.flac")}
        test.write_page("long", recordings, tmp_path / "index.html")
        said = "half an hour and more needs gigabytes in a browser: --start and --duration make"
        assert (said in capsys.readouterr().out) == (seconds > 1800)


def test_spectrograms(separate, monkeypatch):
    drawn, images = {}, []
    real, imshow = utils.plot_spectrograms, matplotlib.axes.Axes.imshow

    def draw(levels, *arguments):
        drawn.update(levels)
        real(levels, *arguments)

    def show(axes, image, **kwargs):
        images.append(image)
        return imshow(axes, image, **kwargs)

    monkeypatch.setattr(utils, "plot_spectrograms", draw)
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", show)
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(88200) / 44100)
    write("tone.wav", tone.repeat(2, 1))
    code, printed, _ = separate("tone.wav", "--plot")
    assert code == 0 and "wrote stems/tone/spectrograms.png" in printed
    assert list(drawn) == ["mixture", *TARGETS] and drawn["mixture"].shape == (2049, 87)
    assert drawn["mixture"].max(1).argmax() == round(1000 / 44100 * 4096)
    mixture, first, mask = images[:3]  # then the next stem's spectrogram and mask, and so on
    assert len(images) == 1 + 2 * len(TARGETS)
    assert max(image.max() for image in (mixture, *images[1::2])) == 0  # dB
    loudest = np.unravel_index(mixture.argmax(), mixture.shape)
    assert mask[loudest] == pytest.approx(10 ** ((first - mixture)[loudest] / 20), rel=1e-3)
    picture = matplotlib.image.imread("stems/tone/spectrograms.png")
    assert picture.shape[1] == 1540 and picture.shape[0] > 900 and picture.std() > 0.1


# --------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_song(tmp_path):
    """Four minutes against one: what the LSTM keeps, (T, H) per target, and little more."""
    make_model(tmp_path / "model", hidden_size=16)
    code = f"""
import sys, torch
from model import load_separator
torch.set_num_threads(2)
separator = load_separator({str(tmp_path / "model")!r}, niter=0)
block, n = torch.randn(2, 441000), 0
class Song:
    def __iter__(self):
        return iter([block] * int(sys.argv[1]))
for part in separator.stream(Song()):
    n += part.shape[-1]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(n // 44100, int(status["VmHWM"].split()[0]) * 1024)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    peaks = {}
    for tens in (6, 24):
        command = [sys.executable, "-c", code, str(tens)]
        pipes = {"cwd": FOLDER, "capture_output": True, "text": True}
        done = subprocess.run(command, check=True, **pipes)
        seconds, peaks[tens] = map(int, done.stdout.split())
        assert seconds == 10 * tens
    frames = 18 * 441000 // 1024
    assert peaks[24] - peaks[6] < 3 * frames * 4 * 16 * 4 + 60e6


# ------------------------------------------------------------------- inputs, folders and what is in them


def test_any_window(separate, song):
    """One of a single frame, too, whose first block has no samples yet."""
    write("song.wav", song)
    for window in (1, 2):
        assert separate("song.wav", "--wiener-win-len", window, "--overwrite")[0] == 0


def test_paths_and_numbers_from_python(separate, song, model_folder):
    write("song.wav", song)
    assert test.main([Path("song.wav"), "--model", model_folder, "--niter", 0, "--quiet"]) == 0


def test_an_input_without_a_name(separate, song):
    write("song.wav", song)
    code, _, complaint = separate("")
    assert code == 2 and complaint == ["error: an input has no name: name a file or a folder"]


def test_stems_are_no_songs(separate, song, tmp_path):
    """Not by a pattern, nor where the songs' folder or that of the stems is reached by a link."""
    (tmp_path / "music").mkdir()
    write("music/song.wav", song)
    Path("link").symlink_to("music")
    assert separate("music", "--outdir", "music/stems")[0] == 0
    for item in ("music/**/*.wav", "link", "music"):
        for outdir in ("music/stems", "link/stems"):
            songs = test.find_songs([item], outdir)
            assert [Path(path).name for path, _ in songs] == ["song.wav"]


def test_what_is_kept_of_an_earlier_command_is_said(separate, song):
    write("song.wav", song)
    separate("song.wav", "--html")
    _, printed, _ = separate("song.wav", "--targets", "vocals", "drums")
    said = "stems/song: bass.wav, other.wav, index.html: of an earlier command, kept as they are"
    assert said in printed
    assert "earlier command" not in separate("song.wav", "--overwrite", "--html")[1]


def test_a_page_of_stems_of_two_kinds(separate, song, tmp_path, model_folder):
    """Which is meant can't be told; and somebody's stems.json beside the page stays."""
    write("song.wav", song)
    for outdir in ("one", "two"):
        separate("song.wav", "--outdir", outdir)
    Path("out").mkdir()
    Path("out/stems.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"stems.json: exists and was not written by this script"):
        test.main(["--page", "one/song", "two/song", "--outdir", "out"])
    assert Path("out/stems.json").read_text() == '{"mine": 1}'
    separate("song.wav", "--outdir", "one", "--ext", "flac")
    with pytest.raises(UserError, match=r"there is another bass; move one of them away"):
        test.main(["--page", "one/song", "two/song"])


def test_names_that_look_like_formulas(separate, song):
    write("song.wav", song)
    code, *_ = separate("song.wav", "--plot", "--aggregate", '{"a$^$b": ["vocals"]}')
    assert code == 0 and Path("stems/song/spectrograms.png").exists()
