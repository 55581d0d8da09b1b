"""What each fast form buys end to end: the scripts as they are, and with its plain form instead.

    python benchmarks/tricks.py [--quick]

A training step: 16 mixes of six seconds already in memory, the published network for one target,
this machine's threads. A separation: a WAV file of three minutes (and one of ten, for what saves
memory) through test.py to four WAV files, hidden size 512, two threads. One trick is left out at a
time; the last rows leave out all of them. Training steps are timed in turn in one process, all else
in processes of their own. "gain" is the part of the plain form's time or memory that is saved;
"lines" counts the function and whatever else is only there for it.

What data.py's keep_freed_memory buys is measured by data_loading.py.
"""

import contextlib
import inspect
import math
import tempfile
from functools import partial
from pathlib import Path

from common import import_openunmix, main, median_and_spread, peak_memory, timings

import torch

COLUMNS = ("trick", "lines", "of", "plain", "with it", "unit", "gain", "spread")

# ------------------------------------------------------------------------------ the plain forms


def standardised_linear(linear, x, mean, scale):
    return linear(((x + mean) * scale).flatten(-2))


def scaled_batch_norm(bn, y, scale, mean):
    from model import over_frames

    return (over_frames(bn, y).unflatten(-1, (-1, len(scale))) * scale + mean).flatten(-2)


def in_blocks(function, *inputs):
    return function(*inputs)


def run_lstm(lstm, h):
    return lstm(h)[0]


def wiener_on_cpu(magnitudes, mixture, niter, level):
    from model import expectation_maximization

    Y = magnitudes * mixture.sgn()[:, None]
    return expectation_maximization(Y, mixture, niter, level)


def filter_stereo(v, R, x, ridge):
    from model import filter_sources

    return filter_sources(v, R, x, ridge)


def magnitudes_by_example(waveforms, args):
    from model import magnitude, stft

    return magnitude(stft(waveforms, args.nfft, args.nhop), args.nb_channels)


def stream(separator, audio):
    """All of the recording at once, by `forward`."""
    with torch.inference_mode():
        yield separator(torch.cat(list(audio), dim=1)[None])[0]


def same_as_plain(separator, in_stages, device):
    """No network has stages: each sees the whole recording, or windows of a long one."""
    return not in_stages


PLAIN = {  # trick: (module, plain form, what it is to make better, functions that serve it alone)
    "standardised_linear": ("model", standardised_linear, ("step", "song"), ()),
    "scaled_batch_norm": ("model", scaled_batch_norm, ("step", "song"), ()),
    "in_blocks": ("model", in_blocks, ("song", "long"), ()),
    "run_lstm": ("model", run_lstm, ("song", "long"), ()),
    "wiener_on_cpu": ("model", wiener_on_cpu, ("song",), ()),
    "filter_stereo": ("model", filter_stereo, ("song",), ()),
    "magnitudes_by_example": ("train", magnitudes_by_example, ("step",), ()),
    "same_as_plain": ("model", same_as_plain, ("song", "long"), ()),
    "stream": ("model", stream, ("song", "long"), ("stft_blocks", "istft_blocks", "regroup")),
}
FIGURES = {"step": "a training step", "song": "a separation", "long": "a long separation"}


def leave_out(*tricks):
    """Put plain forms into the modules, in this process."""
    for trick in tricks:
        module, plain, *_ = PLAIN[trick]
        setattr(__import__(module), trick, plain)


def lines(trick):
    """How many lines of code a trick takes."""
    module, _, _, others = PLAIN[trick]
    module = __import__(module)
    functions = [getattr(module, name) for name in (trick, *others)]
    return sum(len(inspect.getsource(inspect.unwrap(part)).splitlines()) for part in functions)


# ------------------------------------------------------------------------------ what is measured


def variants(figure):
    """{name: tricks to leave out}, the scripts as they are first."""
    tricks = [trick for trick, row in PLAIN.items() if figure in row[2]]
    single = {trick: (trick,) for trick in tricks}
    pair = ("standardised_linear", "scaled_batch_norm")
    pairs = {"both of these": pair} if {*pair} <= {*tricks} else {}
    return {"": (), **single, **pairs, "all of these": tuple(tricks)}


def rows_of(figure, what, measured, unit):
    """Rows of the table from {variant: (value, spread)}."""
    ours, spread = measured.pop("")
    for name, (plain, _) in measured.items():
        count = sum(map(lines, variants(figure)[name]))
        row = dict(trick=name, lines=count, of=what, plain=plain, unit=unit, spread=spread)
        yield {**row, "with it": ours, "gain": f"{100 * (1 - ours / plain):.0f} %"}


def step_rows(quick):
    """Seconds and megabytes of a training step."""
    import train
    import training

    import model
    from utils import patched

    size = 4 if quick else training.BATCH
    flags = ("--batch-size", size, "--hidden-size", 64 if quick else 512)
    batch = training.random_batch(batch_size=size)
    step = training.ours("nowhere", batch=batch, flags=flags)
    modules = {"model": model, "train": train}

    def with_plain(tricks):
        with contextlib.ExitStack() as stack:
            for trick in tricks:
                module, plain, *_ = PLAIN[trick]
                stack.enter_context(patched(modules[module], trick, plain))
            step()

    kinds = variants("step")
    functions = [partial(with_plain, tricks) for tricks in kinds.values()]
    times = dict(zip(kinds, timings(*functions, repeats=2 if quick else 9)))
    yield from rows_of("step", FIGURES["step"], times, "s")
    code = """
import sys
sys.path.insert(0, "benchmarks")
import training, tricks
tricks.leave_out(*{tricks!r})
batch = training.random_batch(batch_size={size!r})
step = training.ours("nowhere", batch=batch, flags={flags!r})
for _ in range(3):
    step()
"""
    peaks = {}
    for name, left_out in kinds.items():
        text = code.format(tricks=left_out, flags=flags, size=size)
        peaks[name] = peak_memory(text)[0], None
    yield from rows_of("step", "its memory", peaks, "MB")


def song_rows(figure, folder, mixture, model, minutes, repeats):
    """Seconds and megabytes of a separation, one run after the other, in turn."""
    import separation

    song = folder / f"{figure}.wav"
    separation.write_song(song, mixture, minutes)
    measured = {name: [] for name in variants(figure)}
    for _ in range(repeats):
        for name, left_out in variants(figure).items():
            code = 'import sys\nsys.path.insert(0, "benchmarks")\nimport tricks\n'
            code += f"tricks.leave_out(*{left_out!r})\n" + separation.OURS
            values = dict(song=str(song), folder=str(model), outdir=str(folder / "stems"), flags=[])
            try:
                measured[name].append(separation.run(code, 3600, **values))
            except RuntimeError as error:  # killed: the memory of this machine is not enough
                print(f"without {name}, {minutes:g} min: {error}")
                measured[name].append((math.nan, math.nan))
    what = f"{FIGURES[figure]} of {minutes:g} min"
    times = {name: median_and_spread([run[0] for run in runs]) for name, runs in measured.items()}
    yield from rows_of(figure, what, times, "s")
    peaks = {name: (max(run[1] for run in runs), None) for name, runs in measured.items()}
    yield from rows_of(figure, "its memory", peaks, "MB")


def measure(quick=False):
    import_openunmix()
    import separation
    from tests.conftest import make_model

    rows = list(step_rows(quick))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _, mixture = separation.excerpt(folder)
        model = make_model(folder / "model", hidden_size=64 if quick else 512)
        settings = folder, mixture, model
        rows += song_rows("song", *settings, 0.2 if quick else 3, 1 if quick else 3)
        rows += song_rows("long", *settings, 0.5 if quick else 10, 1)
    return rows


if __name__ == "__main__":
    main(measure, __doc__, COLUMNS)
