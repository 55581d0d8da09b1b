"""test.py: any input, every option, pictures and pages, and what it says and leaves behind when something is wrong."""

import base64
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
from utils import AudioStream, UserError, resample, resample_blocks

TARGETS = ("vocals", "drums", "bass", "other")
SUM = ("--niter", 0, "--softmask", "--residual")  # estimates that add up to the mixture, whatever the weights


@pytest.fixture
def separate(model_folder, tmp_path, monkeypatch, capsys):
    """Run test.py in this process and a folder of its own: arguments -> (exit code, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, model=model_folder):
        monkeypatch.setattr(sys, "argv", ["test.py", "--quiet", "--model", *map(str, (model, *arguments))])
        capsys.readouterr()
        try:
            code = utils.run(test.main) or 0
        except SystemExit as error:
            code = error.code
        printed, complaint = capsys.readouterr()
        return code, printed, complaint.splitlines()

    return call


@pytest.fixture(scope="module")
def song(excerpt):
    """Two seconds of music: (2, N) float32."""
    return excerpt["mixture"][:, 88200:176412]


def write(path, audio, rate=44100, **kwargs):
    soundfile.write(path, audio.T.numpy(), rate, **{"subtype": "FLOAT", **kwargs} if str(path).endswith(".wav") else kwargs)


def read_stems(folder):
    """{stem name: (C, N) float32 tensor}, sample rate."""
    stems = {path.stem: soundfile.read(path, dtype="float32", always_2d=True) for path in Path(folder).glob("*.*") if path.suffix != ".html"}
    assert len({rate for _, rate in stems.values()}) == 1
    return {name: torch.from_numpy(audio.T.copy()) for name, (audio, rate) in stems.items()}, next(iter(stems.values()))[1]


def files_in(folder):
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------------- any input


def test_formats(separate, song, tmp_path, monkeypatch):
    """Whatever people have, in one call: stems of the input's rate, channels and exact length that add up to it."""
    folder = tmp_path / "all sorts"
    folder.mkdir()
    write(folder / "wav.wav", song)
    for extension, kwargs in {"aiff": {}, "flac": {}, "ogg": {}, "mp3": {}, "au": {}, "caf": {}}.items():
        write(folder / f"{extension}.{extension}", song, **kwargs)
    write(folder / "opus.opus", resample(song, 44100, 48000), 48000, format="OGG", subtype="OPUS")
    film = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=2", "-i", folder / "wav.wav"]
    for extension in ("m4a", "aac", "mka"):
        ffmpeg("-i", folder / "wav.wav", folder / f"{extension}.{extension}")
    for extension in ("mp4", "mkv", "mov"):
        ffmpeg(*film, folder / f"{extension}.{extension}")
    write(folder / "24bit.wav", song, subtype="PCM_24")
    write(folder / "mono.wav", song[:1], subtype="PCM_16")
    loaded = []
    make_network = model.make_network
    monkeypatch.setattr(model, "make_network", lambda *args: loaded.append(args) or make_network(*args))
    code, printed, complaint = separate(folder, *SUM)
    assert (code, complaint) == (0, []) and len(loaded) == 4  # networks are loaded once
    for path in sorted(folder.iterdir()):
        mixture = torch.cat(list(AudioStream(path)), 1)
        stems, rate = read_stems(tmp_path / "stems" / path.stem)
        assert sorted(stems) == ["bass", "drums", "other", "residual", "vocals"]
        assert rate == (48000 if path.suffix == ".opus" else 44100)
        assert all(stem.shape == mixture.shape for stem in stems.values()) and len(mixture) == (1 if path.stem == "mono" else 2)
        assert sdr(mixture, sum(stems.values())) > (45 if path.suffix == ".opus" else 90), path
        source = resample(song, 44100, rate)[: len(mixture)]  # the file itself begins where the song does
        if path.suffix != ".aac":  # which cannot say that its first 1024 samples are the encoder's
            assert sdr(source, mixture[:, : source.shape[1]]) > 8 and abs(source.shape[1] - mixture.shape[1]) < 2048, path


@pytest.mark.parametrize("rate,channels", [(8000, 1), (22050, 2), (48000, 1), (48000, 2), (96000, 2)])
def test_sample_rates(separate, tmp_path, rate, channels):
    """Stems line up with the input: their sum is the input, to what resampling costs, and a sample's shift would not be."""
    length = rate + 123
    spectrum = torch.fft.rfft(torch.randn(channels, length, generator=torch.Generator().manual_seed(rate)))
    spectrum[:, round(0.45 * min(rate, 44100) / rate * length) :] = 0  # nothing that the model's rate or the filter would take away
    mixture = 0.3 * torch.fft.irfft(spectrum, length) * torch.hann_window(length)
    write("song.wav", mixture, rate)
    assert separate("song.wav", *SUM)[0] == 0
    stems, found = read_stems(tmp_path / "stems" / "song")
    total = sum(stems.values())
    assert found == rate and total.shape == mixture.shape
    assert sdr(mixture, total) > 60 and sdr(mixture, total.roll(1, -1)) < 30


def test_resampling_in_blocks():
    """The same samples as resampling at once, however the recording is cut up; there and back nothing is lost."""
    rng = np.random.default_rng(0)
    rates = [8000, 11025, 16000, 22050, 32000, 44100, 47952, 48000, 96000, 192000]
    for _ in range(150):
        rate, new_rate = (int(r) for r in rng.choice(rates, 2))
        x = torch.from_numpy(rng.standard_normal((2, int(rng.choice([1, 2, 100, 161, 5001, 20_003]))), dtype=np.float32))
        cuts = np.sort(rng.integers(0, x.shape[1] + 1, rng.integers(0, 9)))
        parts = list(resample_blocks(torch.tensor_split(x, torch.from_numpy(cuts), dim=1), rate, new_rate))
        whole = resample(x, rate, new_rate)
        assert torch.cat(parts, 1).shape == whole.shape and sdr(whole, torch.cat(parts, 1)) > 90
        assert resample(whole, new_rate, rate).shape[1] >= x.shape[1]


def test_resampling_nothing():
    assert list(resample_blocks([], 48000, 44100)) == list(resample_blocks([torch.zeros(2, 0)], 48000, 44100)) == []


def test_start_and_duration(separate, song, tmp_path):
    write("song.flac", song, subtype="PCM_24")
    write("part.wav", song[:, 22050 : 22050 + 33075])
    assert separate("song.flac", "part.wav", "--start", 0, "--outdir", "a")[0] == 0
    assert separate("song.flac", "--start", 0.5, "--duration", 0.75, "--outdir", "b")[0] == 0
    expected, found = read_stems(tmp_path / "a" / "part")[0], read_stems(tmp_path / "b" / "song")[0]
    for name in TARGETS:
        assert found[name].shape == (2, 33075) and sdr(expected[name], found[name]) > 60  # 24 bit against float
    code, _, complaint = separate("song.flac", "--start", 1.5, "--duration", 9, "--outdir", "c")
    assert code == 0 and read_stems(tmp_path / "c" / "song")[0]["vocals"].shape[1] == song.shape[1] - 66150


@pytest.mark.parametrize("extension", ["flac", "ogg", "opus", "mp3", "m4a", "mkv"])
def test_a_part_is_read_exactly(song, tmp_path, extension, monkeypatch):
    """Seeking or decoding, samples keep their place."""
    monkeypatch.setattr(AudioStream, "block", 10_000)  # several lie before the part
    write(tmp_path / "song.wav", resample(song, 44100, 48000), 48000)
    path = tmp_path / f"song.{extension}"
    if extension in ("m4a", "mkv"):
        ffmpeg("-i", tmp_path / "song.wav", path)
    else:
        write(path, resample(song, 44100, 48000), 48000, **({"format": "OGG", "subtype": "OPUS"} if extension == "opus" else {}))
    whole, part = torch.cat(list(AudioStream(path)), 1), torch.cat(list(AudioStream(path, 0.7301, 0.5)), 1)
    first = round(0.7301 * 48000)
    assert part.shape == (2, 24000) and torch.equal(part, whole[:, first : first + 24000])


def test_sound_that_starts_late_in_a_film(song, tmp_path):
    """Stems line up with the picture: silence until the sound begins."""
    write(tmp_path / "song.wav", song)
    film = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=2"]
    ffmpeg(*film, "-itsoffset", 0.5, "-i", tmp_path / "song.wav", "-c:a", "flac", tmp_path / "late.mkv")
    audio = torch.cat(list(AudioStream(tmp_path / "late.mkv")), 1)
    assert audio[:, :22000].abs().max() == 0 and sdr(song, audio[:, 22050 : 22050 + song.shape[1]]) > 60


@pytest.mark.parametrize("samples", [1, 100, 2048, 4095])
def test_shorter_than_one_fft(separate, song, tmp_path, samples):
    write("short.wav", song[:, :samples])
    assert separate("short.wav", *SUM)[0] == 0
    stems, _ = read_stems(tmp_path / "stems" / "short")
    assert sum(stems.values()).shape == (2, samples) and sdr(song[:, :samples], sum(stems.values())) > 80


def test_silence_stays_silent(separate, tmp_path):
    write("silence.wav", torch.zeros(2, 50_000))
    assert separate("silence.wav")[0] == 0
    stems, _ = read_stems(tmp_path / "stems" / "silence")
    assert sorted(stems) == sorted(TARGETS) and all(stem.shape == (2, 50_000) and not stem.any() for stem in stems.values())


# ---------------------------------------------------------------------------------------------------------- options


def test_sums_and_residual(separate, song, tmp_path):
    write("song.wav", song)
    assert separate("song.wav", "--residual", "rest", "--outdir", "a")[0] == 0
    sums = {"vocals": ["vocals"], "accompaniment": ["drums", "bass", "other", "rest"]}
    code, printed, _ = separate("song.wav", "--residual", "rest", "--aggregate", json.dumps(sums), "--outdir", "b")
    assert code == 0 and "b/song: vocals, accompaniment; 2.0 s of audio, " in printed
    parts, found = read_stems(tmp_path / "a" / "song")[0], read_stems(tmp_path / "b" / "song")[0]
    assert sorted(parts) == ["bass", "drums", "other", "rest", "vocals"] and sorted(found) == ["accompaniment", "vocals"]
    for name, names in sums.items():
        assert sdr(sum(parts[part] for part in names), found[name]) > 120
    assert separate("song.wav", "--targets", "vocals", "--outdir", "c")[0] == 0  # the rest is written, too
    assert sorted(read_stems(tmp_path / "c" / "song")[0]) == ["accompaniment", "vocals"]


def test_options_reach_the_separator(separate, song, tmp_path, model_folder):
    """What comes out is what the separator of these settings makes of the song, in float32."""
    write("song.wav", song)
    flags = ("--niter", 2, "--softmask", "--wiener-win-len", 17, "--targets", "bass", "vocals")
    assert separate("song.wav", *flags)[0] == 0
    with torch.no_grad():
        separator = model.load_separator(model_folder, ["bass", "vocals"], niter=2, softmask=True, wiener_win_len=17)
        expected = separator(song[None])[0]
    found, _ = read_stems(tmp_path / "stems" / "song")
    for name, stem in zip(separator.targets, expected):
        assert sdr(stem, found[name]) > 90


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_output_formats(separate, song, tmp_path, extension):
    """Float WAV clips nothing; the others are scaled down, and say so."""
    write("loud.wav", 8 * song)
    assert separate("loud.wav", *SUM, "--outdir", "float")[0] == 0
    code, printed, _ = separate("loud.wav", *SUM, "--ext", extension)
    assert code == 0 and files_in("stems") == sorted(f"loud/{name}.{extension}" for name in (*TARGETS, "residual"))
    expected, found = read_stems("float/loud")[0], read_stems("stems/loud")[0]
    for name, stem in expected.items():
        peak, note = stem.abs().max().item(), f"stems/loud/{name}.{extension}: peaks at "
        scale = peak if peak > 1 and extension != "wav" else 1
        assert (note in printed) == (scale > 1)
        assert found[name].shape == stem.shape and sdr(stem / scale, found[name]) > {"wav": 140, "flac": 100}.get(extension, 5)
    assert max(stem.abs().max() for stem in expected.values()) > 1.5


def test_mp3_has_no_96_khz(separate, song):
    write("song.wav", song[:, :1000], 96000)
    code, _, complaint = separate("song.wav", "--ext", "mp3")
    assert code == 2 and len(complaint) == 1 and "vocals.mp3: MP3 can't hold 96000 Hz" in complaint[0] and files_in("stems") == []


def test_plain_wav_below_4_gb(tmp_path):
    for seconds, head in ((3600, b"RIFF"), (4 * 3600, b"RF64")):
        stream = SimpleNamespace(rate=44100, channels=2, length=seconds * 44100)
        with test.contextlib.ExitStack() as stack:
            test.Stem(tmp_path / "a.wav", stream, stack).write(torch.ones(2, 100))
        assert (tmp_path / "a.wav").read_bytes()[:4] == head and soundfile.info(tmp_path / "a.wav").frames == 100


def test_amp(separate, song, tmp_path):
    write("song.wav", song)
    assert separate("song.wav", "--outdir", "a")[0] == separate("song.wav", "--amp", "--outdir", "b")[0] == 0
    exact, rounded = read_stems("a/song")[0], read_stems("b/song")[0]
    assert all(40 < sdr(exact[name], rounded[name]) < 90 for name in TARGETS)


def test_progress(song, model_folder, tmp_path):
    write(tmp_path / "a song.wav", song)
    printed, bar = run_script("test.py", "a song.wav", "--model", model_folder, cwd=tmp_path)
    assert "a song.wav:   0%" in bar and "2.0/2.0 s of audio [" in bar and " times as fast as it plays]" in bar
    assert "stems/a song: vocals, drums, bass, other; 2.0 s of audio, " in printed and "Next: " in printed


# ------------------------------------------------------------------------------------------------------- many files


def test_many_files_go_on_after_a_failure(separate, song, tmp_path):
    write("a.wav", song[:, :9000])
    write("c.flac", song[:, :9000])
    Path("b.wav").write_text("not audio")
    code, printed, complaint = separate("a.wav", "b.wav", "*.flac", "gone.wav")
    assert code == 1 and files_in("stems") == sorted(f"{song}/{name}.wav" for song in "ac" for name in TARGETS)
    assert complaint[0].startswith("error: b.wav: is not audio") and complaint[1].startswith("error: gone.wav: no such file")
    assert complaint[2:] == ["2 of 4 files failed: b.wav, gone.wav"]


def test_rerun_skips_what_is_done(separate, song):
    write("song.wav", song[:, :9000])
    assert separate("song.wav")[0] == 0
    os.utime("stems/song/bass.wav", (1, 1))
    os.unlink("stems/song/vocals.wav")
    drums = soundfile.read("stems/song/drums.wav")[0]
    code, printed, _ = separate("song.wav")
    assert code == 0 and "stems/song: kept drums, bass, other (--overwrite makes them anew)" in printed
    assert "stems/song: vocals; 0.2 s of audio" in printed and os.stat("stems/song/bass.wav").st_mtime == 1
    said = separate("song.wav")[1].splitlines()[:-1]
    assert said == ["stems/song: kept vocals, drums, bass, other (--overwrite makes them anew)"]
    code, printed, _ = separate("song.wav", "--overwrite")
    assert "kept" not in printed and os.stat("stems/song/bass.wav").st_mtime > 1
    assert np.array_equal(soundfile.read("stems/song/drums.wav")[0], drums)  # and the numbers are the same


def test_finding_songs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/a.wav", "x/b/a.MP3", "x/b/c.flac", "x/c.mp3", "x/notes.txt", "x/._c.mp3", "x/out/a/vocals.wav", "d.wav", "d.mp3", "[e].ogg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()

    def names(*inputs):
        return [(str(path), name) for path, name in test.find_songs(inputs, "x/out")]

    assert names("x") == [("x/a.wav", "a"), ("x/b/a.MP3", "b/a"), ("x/b/c.flac", "b/c"), ("x/c.mp3", "c")]
    assert names("d.wav", "d.mp3") == [("d.mp3", "d.mp3"), ("d.wav", "d.wav")]  # neither takes the other's place
    assert names("d.wav", "./d.wav", "d.w*") == [("d.wav", "d")]
    assert names("**/c.*") == [("x/b/c.flac", "c.flac"), ("x/c.mp3", "c.mp3")]
    assert names("x/a.wav", "x/b/a.MP3", "x/c.mp3") == [("x/a.wav", "a.wav"), ("x/b/a.MP3", "a.MP3"), ("x/c.mp3", "c")]
    Path("x/b/a.wav").touch()
    assert names("x/a.wav", "x/b/../b/a.wav") == [("x/a.wav", "x/a"), ("x/b/../b/a.wav", "b/a")]
    Path("x/b/a.wav").unlink()
    assert names("[e].ogg") == [("[e].ogg", "[e]")]  # a name before a pattern
    with pytest.raises(UserError, match="c.mp3: another input is also named x/c.mp3"):
        names("x", "x/c.mp3", "x/b/../c.mp3")
    with pytest.raises(UserError, match=r"\*.aif: no audio files there"):
        names("*.aif")
    with pytest.raises(UserError, match="x/out: no audio files there"):
        names("x/out")


def test_processes_share_the_files(song, model_folder, tmp_path):
    """torchrun without flags of ours; one process's failure does not end the other, and is known at the end."""
    for name in ("a", "b", "c", "e"):
        write(tmp_path / f"{name}.wav", song[:, :20_000])
    (tmp_path / "d.wav").write_text("not audio")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", FOLDER / "test.py", tmp_path, "--model", model_folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "1 of 5 files failed: " in done.stderr and "d.wav: is not audio" in done.stderr
    assert files_in(tmp_path / "stems") == sorted(f"{song}/{name}.wav" for song in "abce" for name in TARGETS)
    assert done.stdout.count("0.5 s of audio") == 4  # each separated once


@pytest.mark.parametrize("name", ["a 'quoted' \"name\" & $(x).wav", "Ü 音楽 🎵.flac", "two\nlines\t.wav", "-rf.mp3", "100%s {x}.wav", ".wav"])
def test_names_of_files(separate, song, tmp_path, name):
    write(tmp_path / name, song[:, :9000], **({} if name != ".wav" else {"format": "WAV"}))
    code, printed, complaint = separate("--html", "--", name)
    assert (code, complaint) == (0, []) and len(printed.splitlines()) == 3
    assert files_in("stems") == sorted(f"{Path(name).stem}/{file}" for file in ("index.html", *(f"{name}.wav" for name in TARGETS)))


def test_name_that_is_no_text(separate, song, tmp_path):
    write("song.wav", song[:, :9000])
    os.rename("song.wav", b"\xff.wav")
    code, _, complaint = separate(tmp_path)
    assert code == 2 and len(complaint) == 1 and r"\udcff.wav: its name can't be used" in complaint[0]


# -------------------------------------------------------------------------------------------------------- bad input


def bad_file(kind, path, song):
    """Write a file that cannot be separated."""
    audio = song.T.numpy().copy()
    if kind == "text.wav":
        path.write_text("this is no audio\n" * 100)
    elif kind == "empty.wav":
        path.touch()
    elif kind == "no samples.wav":
        soundfile.write(path, audio[:0], 44100)
    elif kind in ("nan.wav", "inf.flac.wav"):
        audio[50_000] = np.nan if kind == "nan.wav" else -np.inf
        soundfile.write(path, audio, 44100, subtype="FLOAT")
    elif kind == "six.wav":
        soundfile.write(path, np.zeros((100, 6)), 44100)
    elif kind == "folder.wav":
        path.mkdir()
    elif kind in ("cut.m4a", "cut.mkv", "damaged.m4a"):
        soundfile.write(path.with_name("x.flac"), audio, 44100)
        ffmpeg("-i", path.with_name("x.flac"), path)
        content = bytearray(path.read_bytes())
        if kind == "damaged.m4a":
            content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
        path.write_bytes(content if kind == "damaged.m4a" else content[: len(content) * 2 // 3])
    elif kind != "missing.wav":  # cut off
        soundfile.write(path, audio, 44100)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize(
    "kind,message",
    [
        ("missing.wav", "no such file"),
        ("text.wav", "is not audio that can be read"),
        ("empty.wav", "is not audio that can be read"),
        ("no samples.wav", "contains no samples"),
        ("nan.wav", "has NaN or infinite samples after 0 s"),
        ("inf.flac.wav", "has NaN or infinite samples after 0 s"),
        ("six.wav", "has 6 channels; mix it down"),
        ("folder.wav", "no audio files there"),
        ("cut.wav", "is truncated: "),
        ("cut.aiff", "is truncated: "),
        ("cut.flac", "breaks off or is damaged"),
        ("cut.mp3", "is truncated: 1.3 of 2.0 s of audio are there"),
        ("cut.m4a", "is not audio that can be read"),
        ("cut.mkv", "breaks off or is damaged"),
        ("damaged.m4a", "breaks off or is damaged"),
    ],
)
def test_bad_files(separate, song, tmp_path, kind, message):
    bad_file(kind, tmp_path / kind, song)
    code, _, complaint = separate(kind)
    assert code == 2 and len(complaint) == 1 and complaint[0].startswith(f"error: {kind}: ") and message in complaint[0], complaint
    assert not Path("stems").exists() or files_in("stems") == []


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--start", 2.1], "song.wav: ends at 2.00 s: --start must come before that"),
        (["--start", -1], "--start: -1 is out of range"),
        (["--duration", 0], "--duration: 0 is out of range"),
        (["--aggregate", "{vocals}"], "--aggregate: is not JSON such as"),
        (["--aggregate", '{"a": "vocals"}'], "--aggregate: is not JSON such as"),
        (["--aggregate", '{"a": ["piano"]}'], "--aggregate: unknown target 'piano'; there are vocals, drums, bass, other"),
        (["--aggregate", '{"../a": ["vocals"]}'], "--aggregate: '../a'"),
        (["--outdir", "song.wav"], "song.wav/song/vocals.wav: could not be written"),
        (["--outdir", "/proc/x"], "/proc/x/song/vocals.wav: could not be written"),
        (["--ext", "m4a"], "--ext: invalid choice: 'm4a'"),
        (["--targets", "piano"], "has no target 'piano'; it has vocals, drums, bass, other"),
    ],
)
def test_bad_flags(separate, song, tmp_path, flags, message):
    write("song.wav", song)
    code, _, complaint = separate("song.wav", *flags)
    assert code == 2 and len(complaint) == 1 and message in complaint[0], complaint
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("vocals.*"))


def test_mp3_without_a_stated_length(song, tmp_path):
    """Without a Xing header an MP3's length is a guess, and no proof that something is missing."""
    write(tmp_path / "a.mp3", torch.cat([song * 0, song, song * 0], 1), bitrate_mode="VARIABLE", compression_level=0.3)
    content = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "b.mp3").write_bytes(content[content.index(b"\xff\xfb", content.index(b"Xing")) :])
    whole, guessed = AudioStream(tmp_path / "a.mp3"), AudioStream(tmp_path / "b.mp3")
    assert sum(block.shape[1] for block in whole) == whole.length == 3 * song.shape[1]
    stated = guessed.length
    assert sum(block.shape[1] for block in guessed) == guessed.length != stated


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3"])
def test_disk_full_half_way(song, model_folder, tmp_path, extension):
    """Nothing half-written stays, and stems of an earlier run are as they were."""
    write(tmp_path / "song.wav", song)
    (tmp_path / "stems" / "song").mkdir(parents=True)
    (tmp_path / "stems" / "song" / f"vocals.{extension}").write_text("of an earlier run")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({song.numel() * 2}, -1)); import runpy, sys; sys.argv[0] = 'test.py'; "
    command = [sys.executable, "-c", code + "runpy.run_path('test.py', run_name='__main__')", tmp_path / "song.wav", "--overwrite"]
    command += ["--quiet", "--model", model_folder, "--outdir", tmp_path / "stems", "--ext", extension]
    done = subprocess.run(list(map(str, command)), cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "could not be written" in done.stderr, done.stderr
    assert files_in(tmp_path / "stems") == [f"song/vocals.{extension}"]
    assert (tmp_path / "stems" / "song" / f"vocals.{extension}").read_text() == "of an earlier run"


@pytest.mark.parametrize("extension", ["flac", "ogg"])
def test_last_bytes_lost(separate, song, extension, monkeypatch):
    """Encoders write their last bytes when they are closed, and do not say that they could not."""
    write("song.wav", song)
    close = soundfile.SoundFile.close

    def lose(file):
        was_open = not file.closed
        close(file)
        if was_open and str(file.name).endswith(".part") and file.mode == "w":
            os.truncate(file.name, os.path.getsize(file.name) * 9 // 10)

    monkeypatch.setattr(soundfile.SoundFile, "close", lose)
    code, _, complaint = separate("song.wav", "--ext", extension)
    assert code == 2 and len(complaint) == 1 and "could not be written" in complaint[0] and files_in("stems") == []


# ------------------------------------------------------------------------------------------------ pictures and pages


def page_content(path):
    line = next(line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.startswith("const SONG = "))
    return json.loads(line.removeprefix("const SONG = ").removesuffix(";"))


def test_page(separate, song):
    write("a <b> song.wav", torch.cat([4 * song, 0 * song], 1))
    code, printed, _ = separate("a <b> song.wav", "--html")
    assert code == 0 and "wrote stems/a <b> song/index.html: open it in a browser" in printed
    content = page_content("stems/a <b> song/index.html")
    assert content["title"] == "a <b> song" and [stem["name"] for stem in content["stems"]] == ["mixture", *TARGETS]
    assert all(len(stem["peaks"]) == 1000 and 0 <= min(stem["peaks"]) <= max(stem["peaks"]) <= 1 for stem in content["stems"])
    mixture = content["stems"][0]
    assert max(mixture["peaks"][:490]) > 0.3 and max(mixture["peaks"][510:]) < 0.01  # in the right place
    scale = max(max(stem["peaks"]) for stem in content["stems"])
    assert scale == pytest.approx(1)  # the loudest of them, and all others by the same factor
    for stem in content["stems"]:
        audio, rate = soundfile.read(io.BytesIO(base64.b64decode(stem["audio"].removeprefix("data:audio/mpeg;base64,"))))
        assert rate == 44100 and audio.shape == (2 * song.shape[1], 2)
        assert np.abs(audio).max() == pytest.approx(max(stem["peaks"]), abs=0.15)


def test_page_at_other_rates(separate, song):
    """Rates that MP3 does not have; mono."""
    write("song.wav", song[:1, :96000], 96000)
    assert separate("song.wav", "--html")[0] == 0
    for stem in page_content("stems/song/index.html")["stems"]:
        audio, rate = soundfile.read(io.BytesIO(base64.b64decode(stem["audio"].partition(",")[2])), always_2d=True)
        assert rate == 44100 and audio.shape[1] == 1 and abs(len(audio) - 88200 * 44100 // 96000) < 10


def test_page_of_half_an_hour(tmp_path, monkeypatch, capsys):
    """A browser decodes a whole page at once: the user is told what that takes."""
    monkeypatch.setattr(test, "mp3", lambda stream, scale: "data:audio/mpeg;base64,")  # would take minutes
    for seconds in (1800, 1801):
        soundfile.write(tmp_path / "long.flac", np.zeros(1000 * seconds), 1000)
        test.write_page("long", {"mixture": AudioStream(tmp_path / "long.flac")}, tmp_path / "index.html")
        said = "half an hour and more needs gigabytes in a browser: --start and --duration make a shorter page"
        assert (said in capsys.readouterr().out) == (seconds > 1800)


def test_spectrograms(separate, song, monkeypatch):
    drawn = {}
    real = test.plot_spectrograms
    monkeypatch.setattr(test, "plot_spectrograms", lambda levels, *args: drawn.update(levels) or real(levels, *args))
    images, imshow = [], matplotlib.axes.Axes.imshow
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda *args, **kwargs: images.append(args[1]) or imshow(*args, **kwargs))
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(88200) / 44100)
    write("tone.wav", tone.repeat(2, 1))
    code, printed, _ = separate("tone.wav", "--plot")
    assert code == 0 and "wrote stems/tone/spectrograms.png" in printed
    assert list(drawn) == ["mixture", *TARGETS] and drawn["mixture"].shape == (2049, 87)
    assert drawn["mixture"].max(1).argmax() == round(1000 / 44100 * 4096)
    mixture, first, mask = images[:3]  # then the next stem's spectrogram and mask, and so on
    assert len(images) == 1 + 2 * len(TARGETS) and max(image.max() for image in (mixture, *images[1::2])) == 0  # dB
    loudest = np.unravel_index(mixture.argmax(), mixture.shape)
    assert mask[loudest] == pytest.approx(10 ** ((first - mixture)[loudest] / 20), rel=1e-3)
    picture = matplotlib.image.imread("stems/tone/spectrograms.png")
    assert picture.shape[1] == 1540 and picture.shape[0] > 900 and picture.std() > 0.1


# ----------------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_song(tmp_path):
    """Four minutes against one: what the LSTM has to keep, 4 bytes for each frame, target and hidden unit, and little more."""
    make_model(tmp_path / "model", hidden_size=16)
    code = (
        "import sys, torch; sys.path.insert(0, '.'); from model import load_separator; torch.set_num_threads(2)\n"
        f"separator, block, n = load_separator({str(tmp_path / 'model')!r}, niter=0), torch.randn(2, 441000), 0\n"
        "class Song:\n    def __iter__(self): return iter([block] * int(sys.argv[1]))\n"
        "for part in separator.stream(Song()): n += part.shape[-1]\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(n // 44100, int(status['VmHWM'].split()[0]) * 1024)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    peaks = {}
    for tens in (6, 24):
        done = subprocess.run([sys.executable, "-c", code, str(tens)], cwd=FOLDER, capture_output=True, text=True, check=True)
        seconds, peaks[tens] = map(int, done.stdout.split())
        assert seconds == 10 * tens
    frames = 18 * 441000 // 1024
    assert peaks[24] - peaks[6] < 3 * frames * 4 * 16 * 4 + 60e6
