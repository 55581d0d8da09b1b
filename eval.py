"""Score separation on the test tracks of MUSDB18, or of any other data with a test part.

python eval.py                                      the model beside the mixture, on train.py's data
python eval.py --root MUSDB18 --method model irm    a model and a ceiling (mixture, share: floors)
python eval.py --root MUSDB18 --estimates STEMS     STEMS/test/<track>/<target>.wav of any program
python eval.py --root MUSDB18 --compare UMX UMXHQ   other methods' museval scores beside ours
torchrun --nproc_per_node=4 eval.py --root MUSDB18  the tracks shared out over processes

museval's numbers (BSS Eval v4): frames of one second; medians over frames, then over tracks.
For vocals alone, sum the others: the Wiener filter tells vocals from what it knows of them, and
with --targets vocals it knows nothing (0.8 dB less with the published models):
--aggregate '{"vocals": ["vocals"], "accompaniment": ["drums", "bass", "other"]}'
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends at once: nothing is to be cleaned up
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import hashlib
import importlib.metadata
import inspect
import itertools
import math
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import soundfile
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg import toeplitz
from tqdm import tqdm

import utils
from data import LAYOUTS, Track, files_of, index_dataset, read_as
from model import aggregation, expectation_maximization, istft, separator_from_flags, stft
from model import sum_targets as sum_stems
from utils import SOURCES, UserError, check_output, identities, load, number, printable
from utils import process_rank

METRICS = ("SDR", "ISR", "SIR", "SAR")  # museval's, of each frame
WHOLE = ("uSDR", "SI-SDR")  # of the whole track
DELAYS = 512  # L below: samples, 0 to 511, by which BSS Eval may shift a reference
TARGETS = (*SOURCES, "accompaniment")  # museval's order
METHODS = ("model", "mixture", "share", "ibm", "irm", "irm2", "phase", "mwf")
COLUMNS = ["method", "track", "target", "metric", "time", "score"]  # time NaN: the whole track
MARK = ".eval.json"  # what says that a folder is ours

# ------------------------------------------------------------------------------------- the metrics


def bss_eval(references, estimates, window=44100):
    """Scores separated stems frame by frame with BSS Eval v4, the metrics of SiSEC 2018.

    An estimate is split into `true + spatial + interference + artifacts` by two least-squares
    projections of the whole song: on delayed copies of its own reference (`true + spatial`), and
    of all references (`true + spatial + interference`). Scores are ratios of the energies of these
    parts in a frame. (Vincent et al., IEEE TASLP 14(4), 2006; Stöter et al., LVA/ICA 2018.)

    Args:
        references, estimates: true and separated stems in the same order, arrays (J, C, N).
        window: of a frame, in samples. A shorter song is one frame; an incomplete last is dropped.
    Returns:
        dict of four float64 arrays (J, frames), in dB: "SDR" distortion (all errors), "ISR" spatial
        distortion, "SIR" interference, "SAR" artifacts. +inf where there is no error; NaN for every
        source in frames where any reference or estimate is silent. The numbers are museval's, in a
        tenth of its time: one factorization serves all targets, energies are sums over frequencies.
    Raises:
        numpy.linalg.LinAlgError: samples are NaN or infinite.
    """
    J, _, N = references.shape
    window = min(window, N)
    n_fft = 2 * next_fast_len((window + DELAYS) // 2, real=True)  # a filtered frame with its tail
    # Parseval: rfft leaves out the mirrored half of the spectrum, so all bins but the first and
    # the last count twice. With this scale, an energy is a plain sum over bins.
    scale = np.full(n_fft // 2 + 1, np.sqrt(2 / n_fft))
    scale[[0, -1]] = np.sqrt(1 / n_fft)
    own_filters, leak_filters = (rfft(f, n_fft) for f in distortion_filters(references, estimates))
    scores = {metric: np.full((J, N // window), np.nan) for metric in METRICS}
    for t in range(N // window):
        frames = [stems[..., t * window :][..., :window] for stems in (references, estimates)]
        if any(silent(stems).any() for stems in frames):
            continue
        true, estimate = (rfft(stems.astype(float), n_fft) * scale for stems in frames)  # (J, C, F)
        for j in range(J):
            own = np.einsum("dcf,cf->df", own_filters[j], true[j])  # true + spatial
            interference = np.einsum("dkcf,kcf->df", leak_filters[j], true)
            explained = own + interference
            scores["SDR"][j, t] = ratio_db(true[j], estimate[j] - true[j])
            scores["ISR"][j, t] = ratio_db(true[j], own - true[j])
            scores["SIR"][j, t] = ratio_db(own, interference)
            scores["SAR"][j, t] = ratio_db(explained, estimate[j] - explained)
    return scores


def silent(stems):
    """museval's rule, kept so that the same frames are NaN: zero when the channels are summed."""
    return (stems.sum(axis=-2) == 0).all(axis=-1)  # (..., C, N) -> (...)


def ratio_db(signal, error):
    signal, error = np.vdot(signal, signal).real, np.vdot(error, error).real
    with np.errstate(divide="ignore"):
        return 10 * np.log10(signal / error) if error else np.inf


def distortion_filters(references, estimates):
    """Least-squares filters on the whole song, output channel before input channel.

    (J, C, C, L) that project each estimate on its own reference, and (J, C, J, C, L) for the
    interference: what projecting on all references adds.
    """
    J, C, _ = references.shape
    auto, cross = np.split(correlate(references, estimates), 2, axis=1)  # (J * C, J * C, L) each
    leak_filters = project(auto, cross).reshape(J, C, J, C, DELAYS)
    own_filters = np.empty((J, C, C, DELAYS))
    for j in range(J):
        own = slice(j * C, (j + 1) * C)
        own_filters[j] = project(auto[own, own], cross[own, own])
        leak_filters[j, :, j] -= own_filters[j]
    return own_filters, leak_filters


def correlate(references, estimates):
    """Correlates the P = J * C reference channels with themselves and with the estimates.

    At lags 0 to L - 1, the second signal being the later one: (P, 2 * P, L). It takes 16 blocks of
    samples at a time, so that memory does not grow with the song.
    """
    J, C, N = references.shape
    n_fft = next_fast_len(16 * DELAYS, real=True)
    step = n_fft - DELAYS + 1
    spectrum, span = 0, 16 * step
    for start in range(0, N, span):
        piece = slice(start, start + span + DELAYS - 1)
        signals = np.concatenate([references[..., piece], estimates[..., piece]]).astype(float)
        signals = signals.reshape(2 * J * C, -1)
        signals = np.pad(signals, [(0, 0), (0, span + DELAYS - 1 - signals.shape[1])])
        blocks = sliding_window_view(signals, n_fft, axis=-1)[:, ::step].T  # (n_fft, 16, 2 * P)
        undelayed = rfft(blocks[:step, :, : J * C], n_fft, axis=0)  # (F, 16, P), not overlapping
        delayed = rfft(blocks, axis=0)  # (F, 16, 2 * P)
        spectrum = spectrum + undelayed.conj().swapaxes(1, 2) @ delayed  # (F, P, 2 * P)
    return irfft(spectrum, n_fft, axis=0)[:DELAYS].transpose(1, 2, 0)


def project(auto, cross):
    """Least-squares filters (Q, P, L) from P to Q channels: correlations (P, P, L), (P, Q, L)."""
    P, Q, L = cross.shape
    # The sum over n of x_p[n - l] x_q[n - m] depends on l - m only; for l < m it is the
    # correlation of the swapped pair.
    gram = np.block([[toeplitz(auto[p, q], auto[q, p]) for q in range(P)] for p in range(P)])
    right_side = cross.swapaxes(1, 2).reshape(P * L, Q)
    if not (np.isfinite(gram).all() and np.isfinite(right_side).all()):
        raise np.linalg.LinAlgError("BSS Eval found no projection: are all samples finite?")
    # museval loads the diagonal with eps: a silent channel gets filters of zero. Beside the energy
    # of a song that is lost, and exactly dependent references, such as a mono stem in stereo, need
    # a few units in the last place.
    solutions = []
    for loading in (0, 4, 64, 1024):
        gram.flat[:: P * L + 1] += np.finfo(float).eps * max(1, loading * gram.max())
        with contextlib.suppress(np.linalg.LinAlgError):
            filters = np.linalg.solve(gram, right_side)
            solutions += [filters] if np.isfinite(filters).all() else []
            if np.abs(gram @ filters - right_side).max() <= 1e-9 * np.abs(right_side).max():
                return filters.T.reshape(Q, P, L)
    # Dependent but for rounding, as channels in antiphase: museval takes what its solver finds, or
    # the smallest filters where it finds none.
    filters = solutions[0] if solutions else np.linalg.lstsq(gram, right_side)[0]
    return filters.T.reshape(Q, P, L)


def whole_track_scores(reference, estimate):
    """One number for all samples and channels of (C, N), in dB; NaN where it is not defined.

    uSDR as in the MDX and SDX challenges (Mitsufuji et al., Music Demixing Challenge 2021), and
    SI-SDR (Le Roux et al., SDR - half-baked or well done?, ICASSP 2019), one scale for all.
    """
    reference, estimate = reference.astype(float).ravel(), estimate.astype(float).ravel()
    energy = reference @ reference
    usdr = 10 * math.log10((energy + 1e-7) / (np.sum((reference - estimate) ** 2) + 1e-7))
    scaled = reference * (estimate @ reference / max(energy, 1e-20))
    error = np.sum((estimate - scaled) ** 2)
    si_sdr = 10 * math.log10(scaled @ scaled / error) if error and scaled.any() else math.nan
    return {"uSDR": round(usdr, 5), "SI-SDR": round(si_sdr, 5)}


# ----------------------------------------------------------------------------- floors and ceilings


def oracle(method, mixture, sources, stems):
    """What the mixture (C, N) and the true sources {name: (C, N)} give at worst and at best.

    As in SiSEC 2018 (sigsep-mus-oracle), with an STFT of 2048 samples and hop 1024 for masks:
        mixture: the mixture itself           share: an equal share of it for each source ("MIX")
        ibm: mask 1 where |S| >= |X| / 2      irm: |S| / sum |S|       irm2: |S|^2 / sum |S|^2
        phase: the true |S| with the mixture's phase, in the model's STFT (4096 samples): the
        ceiling of what a network of magnitudes learns, before any Wiener filter
        mwf: the model's Wiener filter, one EM iteration from the true sources' spectra
    Beside a single source, the rest of the mixture is the other. Returns {stem: (C, N)}, sums of
    the sources that `stems` names: {stem: [source]}.
    """

    n_fft = 4096 if method == "phase" else 2048

    def spectrum(audio):
        return stft(torch.as_tensor(audio), n_fft, 1024)  # (C, F, T)

    def power(source):
        return spectrum(source).abs() ** (2 if method == "irm2" else 1)

    if len(sources) == 1:
        sources = {**sources, "": mixture - next(iter(sources.values()))}
    if method == "mixture":
        return dict.fromkeys(stems, mixture)
    if method == "share":
        share = mixture / np.float32(len(sources))
        return {stem: share * np.float32(len(parts)) for stem, parts in stems.items()}
    X = spectrum(mixture)
    if method == "mwf":
        S = torch.stack([spectrum(source) for source in sources.values()])  # (J, C, F, T)
        level = X.abs().amax().view(1, 1, 1, 1)
        bins = zip(S.split(64, -2), X.split(64, -2))  # a few at a time save memory
        Y = [expectation_maximization(s[None], x[None], 1, level)[0] for s, x in bins]
        Y = torch.cat(Y, dim=-2)
    elif method == "ibm":
        Y = (X * (2 * spectrum(source).abs() >= X.abs()) for source in sources.values())
    elif method == "phase":
        Y = (X.sgn() * spectrum(source).abs() for source in sources.values())
    else:
        total = sum(power(source) for source in sources.values()).clamp_min(1e-20)
        Y = (X * (power(source) / total) for source in sources.values())
    length = mixture.shape[1]
    estimates = {name: istft(y, length, n_fft, 1024).numpy() for name, y in zip(sources, Y)}
    return {stem: sum(estimates[source] for source in parts) for stem, parts in stems.items()}


# --------------------------------------------------------------------------------------- one track


class Job(NamedTuple):
    """A track to score with a method."""

    method: str
    track: Track
    stems: dict  # {stem: the sources that make up its reference}
    path: Path  # of museval's JSON, where the scores go
    settings: dict  # all that they depend on
    kept: dict  # {stem: file to keep the estimate in}


def score_track(job, args, estimates=None):
    """Scores a track in another process.

    Returns museval's "targets", silent stems, which have none, and the estimates if they are kept.
    """
    if job.settings["code"] != scoring_code():
        why = "eval.py, or what it uses, is another one in this process than in its files"
        raise UserError(f"{why}, which score in other processes: edit them, and start again")
    shape = track_shape(job.track)
    sources = {name: read_as(audio, **shape) for name, audio in job.track.sources.items()}
    references = {stem: sum(sources[part] for part in parts) for stem, parts in job.stems.items()}
    if job.method == "estimates":
        estimates = read_estimates(job, args)
    elif job.method != "model":
        estimates = oracle(job.method, read_mixture(job.track), sources, job.stems)
    left_out = [stem for stem in references if silent(references[stem])]
    for stem in references:
        if silent(estimates[stem]) and stem not in left_out:
            why = "is silent throughout: BSS Eval is not defined for it"
            raise UserError(f"{job.track.name}: the estimate of {stem} {why}")
    try:
        targets = score(references, estimates, shape["rate"], args.engine)
        return targets, left_out, estimates if job.kept else None
    except np.linalg.LinAlgError as error:
        raise UserError(f"{job.track.name}: {error}") from error


def score(references, estimates, rate, engine="own"):
    """Scores estimates {name: (C, N)} against references {name: (C, N)}: museval's "targets".

    As in museval.eval_mus_track, all targets but the accompaniment are scored against each other,
    then vocals and accompaniment as a pair. Beyond its keys, each target has its scores of the
    whole track. A reference that is silent throughout, where BSS Eval is not defined, is left out.
    """
    names = [name for name in references if not silent(references[name])]
    both = {"vocals", "accompaniment"} <= references.keys()
    pair = [name for name in names if both and name in ("vocals", "accompaniment")]
    others = [name for name in names if name not in pair or name == "vocals"]
    targets = {}
    for group in filter(None, [pair] if others == pair[:1] else [others, pair]):
        stacks = [np.stack([stems[name] for name in group]) for stems in (references, estimates)]
        scores = museval_scores(*stacks, rate) if engine == "museval" else bss_eval(*stacks, rate)
        scores = np.stack([scores[metric] for metric in METRICS], axis=-1).round(5)
        scores[~np.isfinite(scores)] = np.nan  # (J, frames, metrics)
        for name, rows in zip(group, scores.tolist()):
            frames = [{"time": float(t), "duration": 1.0} for t in range(len(rows))]
            for frame, row in zip(frames, rows):
                frame["metrics"] = dict(zip(METRICS, row))
            whole = whole_track_scores(references[name], estimates[name])
            targets.pop(name, None)  # of the vocals' two scores the pair's counts, and comes last
            targets[name] = {"name": name, "frames": frames, "whole_track": whole}
    return list(targets.values())


def museval_scores(references, estimates, window):
    """`bss_eval` by museval itself."""
    references, estimates = references.swapaxes(1, 2), estimates.swapaxes(1, 2)  # (J, N, C)
    scores = utils.import_museval().evaluate(references, estimates, win=window, hop=window)
    return dict(zip(METRICS, scores))


def track_shape(track):
    """What to read all of a track's files as: its mixture's rate, length and channels."""
    rate = track.input[0].rate
    length = max(round(audio.length * rate / audio.rate) for audio in track.input)
    channels = max(audio.channels for audio in track.input)
    return {"start": 0, "length": length, "rate": rate, "channels": channels}


def read_mixture(track):
    return sum(read_as(audio, **track_shape(track)) for audio in track.input)  # (C, N)


def separate(separator, track, args):
    """The model's estimates of a track: {stem: (C, N)}."""
    x, rate = torch.as_tensor(read_mixture(track)), track.input[0].rate
    blocks = separator.stream([utils.resample(x, rate, separator.sample_rate)])
    estimates = torch.cat([block.float().cpu() for block in blocks], dim=-1)
    estimates = utils.resample(estimates, separator.sample_rate, rate)[..., : x.shape[1]]
    if not estimates.isfinite().all():
        raise UserError(f"{track.name}: the model's estimates are not finite; check its weights")
    stems = sum_stems(estimates, separator.targets, args.sums)
    return {stem: audio.numpy() for stem, audio in stems.items()}


def read_estimates(job, args):
    """Stems that any program made, summed as --aggregate asks: {stem: (C, N)}."""
    shape, parts = track_shape(job.track), {}
    sums = {stem: args.sums[stem] for stem in job.stems}
    for name in {name for names in sums.values() for name in names}:
        path = Path(args.estimates, args.subset, job.track.name, f"{name}.wav")
        audio = utils.AudioFile.open(path)
        longer = audio.length - shape["length"]
        if (audio.rate, longer) != (shape["rate"], 0) or audio.channels > shape["channels"]:
            has = f"has {audio.rate} Hz, {audio.channels} channels and {longer:+d} samples"
            against = f"against the track's {shape['rate']} Hz and {shape['channels']} channels"
            raise UserError(f"{path}: {has} {against}; export it again")
        parts[name] = read_as(audio, **shape)
    return {stem: sum(parts[name] for name in names) for stem, names in sums.items()}


# -------------------------------------------------------------------------------------- all tracks


def main(arguments=None):
    """Score, print, compare.

    Returns:
        DataFrame of medians over frames, rows (track, method, target); 1 where some tracks failed,
        2 where all did; None in torchrun's processes but the first.
    """
    args = parse_args(sys.argv[1:] if arguments is None else list(map(str, arguments)))
    others = {folder: find_scores(folder, args.subset) for folder in args.compare}
    tracks = find_tracks(args) if args.method else []
    separator = separator_from_flags(args) if "model" in args.method else None
    jobs = make_jobs(tracks, separator, args) if tracks else []
    rank, _, world = process_rank()
    share = [job for job in jobs if job.track in tracks[rank::world]]
    failed = utils.gather(evaluate(unfinished(share, others, args), separator, args))
    if rank > 0:
        return None
    files = {}  # {method: {track: museval's JSON}}
    for job in jobs:
        if (job.method, job.track.name) not in failed:
            own = job.method in ("model", "estimates") and args.evaldir.name not in ("", *METHODS)
            name = args.evaldir.name if own else job.method
            files.setdefault(name, {})[job.track.name] = job.path
    for folder, paths in others.items():
        name = Path(folder).name
        files[os.path.abspath(folder) if name in ("", *files) else name] = paths
    if not files:
        raise UserError("there are no scores to show: no track could be scored")
    medians = show(files, args)
    if jobs:
        print(f"\nscores of every frame: {printable(args.evaldir)}/. Next: hear it ", end="")
        print("(python test.py SONG.wav), or --compare others")
    return (2 if len(failed) == len(jobs) else 1) if failed else medians


def parse_args(arguments):
    parser = utils.Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    layouts = {name: layout for name, layout in LAYOUTS.items() if layout.songs}
    add("--dataset", choices=list(layouts), default="musdb", help="layout of the data, see data.py")
    add("--root", help="folder of the data (default: what train.py without --root uses)")
    add("--subset", choices=["test", "train"], default="test", help="which tracks to score")
    flags = {}  # of any layout; where one is not given, its function has a default
    for layout in layouts.values():
        for function in filter(None, (layout.index, layout.find)):
            parameters = inspect.signature(function).parameters.values()
            flags.update({p.name: p.default for p in parameters if p.name in layout.all_flags})
    for name, default in flags.items():
        kind = {"nargs": "+"} if isinstance(default, list | tuple) else {}
        kind = {"action": "store_true"} if default is False else kind
        text = "of some layouts, see data.py"
        add(f"--{name.replace('_', '-')}", **kind, default=argparse.SUPPRESS, help=text)
    add = parser.add_argument_group("what is scored").add_argument
    what = "mixture, share: floors; ibm, irm, irm2, phase, mwf: ceilings, of the true stems"
    methods = [*METHODS, "none"]
    add("--method", nargs="+", choices=methods, default=["model", "mixture"], help=what)
    add("--estimates", metavar="DIR", help="score these: DIR/<subset>/<track>/<target>.wav")
    who = "who computes BSS Eval; museval: the same, slowly"
    add("--engine", choices=["own", "museval"], default="own", help=who)
    add("--workers", type=number(int, 1, 256), default=1, help="processes that score meanwhile")
    add = parser.add_argument_group("output").add_argument
    add("--evaldir", help="<evaldir>/<subset>/<track>.json as museval (default: scores/<model>)")
    kept = "<outdir>/<subset>/<track>/<target>.wav; other methods' in <outdir>/<method>/..."
    add("--outdir", help=f"also keep the model's stems: {kept}")
    others = "folders of museval's JSON to put beside: tables, box plots, significance"
    add("--compare", nargs="+", default=[], metavar="DIR", help=others)
    add("--csv", metavar="FILE", help="also write every frame's scores")
    utils.add_separation_flags(parser)
    args, given = parser.parse_args(arguments), parser.given(arguments)
    args.evaldir = Path(args.evaldir or f"scores/{whole_name(args.estimates or args.model)}")
    args.method = [method for method in dict.fromkeys(args.method) if method != "none"]
    if args.estimates:
        args.method = ["estimates"] + [method for method in args.method if method != "model"]
    unused = dict.fromkeys(flags.keys() - layouts[args.dataset].all_flags, "other layouts")
    if "model" not in args.method:
        flags = ("niter", "wiener_win_len", "wiener", "softmask", "residual", "amp")
        unused.update(dict.fromkeys(flags, "--method model, which is not scored here"))
    if not {*METHODS}.intersection(args.method):
        unused["outdir"] = "stems that are made here, and none are"
    for name in sorted(given & unused.keys()):
        raise UserError(f"--{name.replace('_', '-')}: is for {unused[name]}; leave it out")
    if not args.method and not args.compare:
        raise UserError("--method none: leaves nothing to do without --compare")
    return args


def whole_name(path):
    """The name of a model's folder of scores: runs/a/m is runs-a-m, so that none share one."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    path = path.relative_to(here) if here in path.parents else path
    return "-".join(path.parts).removeprefix(f"{path.anchor}-")


def find_tracks(args):
    splits = ("test",) if args.subset == "test" else ("train", "valid")
    tracks = index_dataset(args.dataset, args.root, splits, **vars(args))
    tracks = sorted((track for split in splits for track in tracks[split]), key=lambda t: t.name)
    for one, other in itertools.pairwise(tracks):
        if one.name == other.name:
            raise UserError(f"{one.name}: two tracks have this name, in {splits}; rename one")
    return tracks


def in_order(names):
    """Targets in museval's order, then any others."""
    return sorted(names, key=lambda name: TARGETS.index(name) if name in TARGETS else len(TARGETS))


def make_jobs(tracks, separator, args):
    """What is to be scored; settles `args.sums`, {stem: the targets that add up to it}."""
    names = {source for track in tracks for source in track.sources}
    names = in_order(sorted(names | {"accompaniment"} if "vocals" in names else names))
    if args.estimates:
        tracks, names = given_targets(tracks, names, args)
    targets = separator.targets if separator else args.targets or names
    args.sums = aggregation(targets, args.aggregate)
    rest = targets[-1] if separator and separator.residual else None

    def sources_of(target, track):
        if target == rest:
            known = {name for other in targets[:-1] for name in sources_of(other, track)}
            return [source for source in track.sources if source not in known]
        if target == "accompaniment" and target not in track.sources and "vocals" in track.sources:
            return [source for source in track.sources if source != "vocals"]
        return [target] if target in track.sources else []

    for target in itertools.chain(*args.sums.values()):
        if target != rest and not any(sources_of(target, track) for track in tracks):
            has = f"it has {', '.join(names)}"
            raise UserError(f"{target}: the data has no such source to compare with; {has}")
    made_with = {"sums": args.sums, "engine": args.engine, "code": scoring_code()}
    made_with["model"] = separator.fingerprint() if separator else None
    jobs = []
    for track in tracks:
        stems = {}
        for stem in in_order(args.sums):
            sources = [name for part in args.sums[stem] for name in sources_of(part, track)]
            if sources:  # what four of four sources leave has no reference
                stems[stem] = sources
        for method in args.method if stems else ():
            place, kept = Path(args.subset, track.name), {}
            if method in METHODS and args.outdir:
                kept = Path(args.outdir, "" if method == "model" else method, place)
                names = args.sums if method == "model" else stems
                kept = {stem: kept / f"{stem}.wav" for stem in names}
            folder = args.evaldir / ("" if method in ("model", "estimates") else method)
            settings = {**made_with, "method": method, "stems": stems, "track": repr(track)}
            settings["model"] = made_with["model"] if method == "model" else None
            if method == "estimates":
                settings["files"] = stamps(Path(args.estimates, place).glob("*.wav"))
            jobs.append(Job(method, track, stems, folder / f"{place}.json", settings, kept))
    return jobs


def given_targets(tracks, names, args):
    """The tracks that have a folder of given estimates, and the targets found in any of them."""
    folder = Path(args.estimates, args.subset)
    found = [track for track in tracks if (folder / track.name).is_dir()]
    stems = {path.stem for track in found for path in (folder / track.name).glob("*.wav")}
    if not stems.intersection(names):
        where = folder / tracks[0].name / f"{names[0]}.wav"
        raise UserError(f"--estimates: no stems there (expected {where} and so on)")
    if len(found) < len(tracks):
        missing = next(track.name for track in tracks if track not in found)
        has = f"has {len(found)} of {len(tracks)} tracks, and only these are scored"
        print(printable(f"{folder}: {has}; it lacks {missing}"))
    return found, [name for name in names if name in stems]


def stamps(paths):
    return {str(path): utils.stamp(path) for path in sorted(paths)}


def scoring_code():
    """A digest of the code that scores, in this process: a notebook may have replaced some."""
    digest = hashlib.sha256(utils.code_of(score_track).encode()).hexdigest()[:16]
    return f"{utils.code_fingerprint()}-{digest}"


def unfinished(jobs, others, args):
    """The jobs whose scores (and stems) are not there, or were made with anything else.

    Refuses, before work starts, to write to what is read or what somebody else wrote.
    """
    read = {audio.path for audio in files_of(job.track for job in jobs)}
    roots = [Path(folder, args.subset) for folder in others]
    roots += {Path(path).parents[1] for path in read}  # the folders that hold the tracks' folders
    todo = []
    for job in jobs:
        scores = stored_scores(job.path)
        check_output(job.path, roots=roots, ours="settings" in scores)
        for path in job.kept.values():
            check_folder(path.parent, [*roots, *filter(None, [args.root])])
        is_kept = not job.kept or scores.get("kept") == stamps(job.kept.values())
        if not is_kept or scores["settings"] != job.settings:
            todo.append(job)
    if others:
        check_folder(args.evaldir / "compare", roots)
    if args.csv:
        ours = Path(args.csv).is_file()
        if ours:
            with open(args.csv, errors="replace") as file:
                ours = file.readline(100).rstrip() == ",".join(COLUMNS)
        check_output(args.csv, identities(read), roots, ours)
    return todo


def check_folder(folder, roots):
    """Refuse a folder that holds something, but not what marks it as ours."""
    mark = folder / MARK
    check_output(mark if mark.exists() else next(folder.glob("*"), mark), (), roots, mark.exists())


def stored_scores(path):
    """What a JSON of scores holds; "settings" is there unless somebody else wrote it."""
    if not path.exists():
        return {"settings": None}
    try:
        scores = load(path)
    except UserError:
        print(printable(f"{path}: does not parse, the track is scored again"), file=sys.stderr)
        return {"settings": None}
    return scores if isinstance(scores, dict) else {}


def evaluate(jobs, separator, args):
    """Score tracks in other processes, while the next one is separated here.

    Returns the (method, track name) pairs that failed.
    """
    if not jobs:
        return []
    pending, failed, left_out = [], [], set()
    bar = tqdm(total=len(jobs), desc="tracks", unit="track", disable=process_rank()[0] > 0)
    workers, top = min(args.workers, len(jobs)), sys.modules["__main__"]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    environment, processes = dict(os.environ), multiprocessing.active_children()

    def start(job):
        estimates = separate(separator, job.track, args) if job.method == "model" else None
        pending.append((job, pool.submit(score_track, job, args, estimates)))

    def finish(job, future):
        targets, silent_stems, estimates = future.result()
        for stem, path in job.kept.items():
            utils.save({"stems of": "eval.py"}, path.parent / MARK)
            with utils.atomic_write(path) as temporary:
                rate = job.track.input[0].rate
                soundfile.write(temporary, estimates[stem].T, rate, "FLOAT", format="WAV")
        left_out.update((job.track.name, stem) for stem in silent_stems)
        scores = {"targets": targets, "engine": args.engine, "settings": job.settings}
        if args.engine == "museval":
            scores["museval_version"] = importlib.metadata.version("museval")
        utils.save({**scores, "kept": stamps(job.kept.values())}, job.path)
        bar.update()

    def attempt(action, job, *arguments):
        try:
            action(job, *arguments)
        except utils.FAILURES as error:
            with tqdm.external_write_mode(sys.stderr):
                utils.report(error)
            failed.append((job.method, job.track.name))
            bar.update()

    hidden = contextlib.ExitStack()
    for name in ("__file__", "__spec__") if __name__ not in ("__main__", "__mp_main__") else ():
        if hasattr(top, name):  # a script that calls `main`, which its processes are not to run
            hidden.enter_context(utils.patched(top, name, None))
    try:
        # One thread each, and all scoring in such processes: rounding, and so a score, never
        # depends on how many there are.
        libraries = ("OMP", "OPENBLAS", "MKL", "VECLIB")
        os.environ.update({f"{library}_NUM_THREADS": "1" for library in libraries})
        for job in jobs:
            attempt(start, job)
            if len(pending) > workers:
                attempt(finish, *pending.pop(0))
        while pending:
            attempt(finish, *pending.pop(0))
    except BrokenProcessPool:
        remedy = "perhaps for want of memory; go on with fewer --workers"
        raise UserError(f"a scoring process was killed, {remedy}") from None
    except (KeyboardInterrupt, SystemExit):
        for process in set(multiprocessing.active_children()) - set(processes):
            process.terminate()
        remark = "finished tracks are kept: the same command goes on with the others"
        print(f"\n{remark}", file=sys.stderr)
        raise
    finally:
        os.environ.clear()
        os.environ.update(environment)
        hidden.close()
        pool.shutdown(cancel_futures=True)
        bar.close()
    for track, stem in sorted(left_out):
        why = "is silent throughout: BSS Eval is not defined for it, it has no score"
        print(printable(f"{track}: {stem} {why}"))
    return failed


def start_worker():
    """Runs first in a process that scores, so that it ends with Ctrl-C or with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ------------------------------------------------------------------ tables, pictures, comparison


def find_scores(folder, subset):
    """The museval JSON of a method: {track: path}."""
    root = Path(folder, subset)
    paths = [path for path in sorted(root.rglob("*.json")) if not path.name.startswith(".")]
    if not paths:
        where = f"expected {root}/<track>.json"
        raise UserError(f"--compare {folder}: no museval JSON there ({where})")
    return {str(path.relative_to(root).with_suffix("")): path for path in paths}


def read_scores(method, track, path):
    """The scores in museval's JSON as a table of COLUMNS."""
    rows = []
    try:
        targets = load(path)["targets"]
        if len({target["name"] for target in targets}) < len(targets):
            raise ValueError("two targets of one name")
        for target in targets:
            names = method, track, utils.check_name(target["name"], f"{path}: the target")
            for frame in target["frames"]:
                scores = frame["metrics"]
                rows += [(*names, metric, frame["time"], scores[metric]) for metric in METRICS]
            for metric, score in target.get("whole_track", {}).items():
                rows.append((*names, metric, math.nan, score))
        table = pd.DataFrame(rows, columns=COLUMNS).astype({"time": float, "score": float})
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
        raise UserError(f"{path}: is not museval's JSON; remove it") from None
    return table.assign(score=table["score"].where(np.isfinite(table["score"])))


def show(files, args):
    """Print each track's SDR, then for each target and method the medians over tracks."""
    tables = []
    for method, paths in files.items():
        tables += [read_scores(printable(method), printable(t), path) for t, path in paths.items()]
    table = pd.concat(tables, ignore_index=True)
    if table.empty:
        raise UserError("there are no scores to show: no track could be scored")
    names = ["track", "method", "target", "metric"]
    medians = table.groupby(names, sort=False)["score"].median()  # of frames, without NaN
    medians = medians.unstack().reindex(columns=[*METRICS, *WHOLE])
    methods, targets = list(table["method"].unique()), in_order(table["target"].unique())
    style = {"float_format": "{:.2f}".format, "na_rep": "-", "index_names": False}
    sdr = medians["SDR"].unstack("target")[targets].sort_index(level="track", sort_remaining=False)
    sdr = sdr.reindex(methods, level="method")
    if len(sdr) <= 100:
        print(f"\nSDR in dB, median over frames\n{sdr.to_string(**style)}")
    grouped = medians.groupby(["target", "method"])
    summary = grouped[[*METRICS]].median().join(grouped[[*WHOLE]].mean())
    summary = summary.assign(tracks=grouped["SDR"].count())
    summary = summary.reindex(targets, level="target").reindex(methods, level="method")
    whole = f"{' and '.join(WHOLE)} of whole tracks: mean over tracks"
    print(f"\ndB: median over frames, then over tracks; {whole}")
    print(summary.to_string(**style, sparsify=False))
    if args.csv:
        with utils.atomic_write(args.csv) as temporary:
            table.to_csv(temporary, index=False)
    if args.compare:
        compare(medians, targets, methods, args.evaldir / "compare")
    return medians


def compare(medians, targets, methods, folder):
    """Print how the first method differs from each other, and how surely; draw box plots."""
    from scipy.stats import wilcoxon

    utils.save({"pictures of": "eval.py"}, folder / MARK)
    ours, *others = methods
    lines = []
    for target in targets:
        rows = medians.xs(target, level="target")
        sdr = rows["SDR"].unstack("method").reindex(columns=methods)
        for other in others:
            difference = (sdr[ours] - sdr[other]).dropna()
            p = "-"  # with five tracks, whatever their difference, it is above 0.05
            if len(difference) >= 6:
                p = f"{wilcoxon(difference).pvalue if difference.any() else 1:.2g}"
            lines.append((target, other, difference.median(), p, len(difference)))
        for metric in METRICS:
            path = folder / f"{target}-{metric}.png"
            box_plot(rows[metric].unstack("method"), f"{target}: {metric} in dB", path)
    print(f"\nSDR of {ours} less that of others on the same tracks: median in dB; p by Wilcoxon's")
    print("signed-rank test, from 6 tracks on")
    table = pd.DataFrame(lines, columns=["", "other", "dB", "p", "tracks"])
    print(table.to_string(index=False, na_rep="-", float_format="{:+.2f}".format))
    print(f"box plots: {printable(folder)}/<target>-<metric>.png")


def box_plot(scores, title, path):
    """Draw the scores of a table (track, method) as boxes over tracks, the best at the top."""
    columns = [scores[method].dropna() for method in scores.median().sort_values().index]
    labels = [f"{s.name} ({len(s)} tracks): {s.median():.2f}" for s in columns]
    title, *labels = (text.replace("$", r"\$") for text in (title, *labels))  # not a formula
    picture, axes = utils.figure(1, 1, (8, 1.3 + 0.42 * len(columns)))
    axis = axes[0, 0]
    axis.boxplot(columns, orientation="horizontal", showfliers=False, tick_labels=labels)
    axis.set(title=title, xlabel="median over frames; a box holds half of the tracks")
    axis.grid(axis="x", alpha=0.3)
    utils.save_figure(picture, path)


if __name__ == "__main__":
    utils.run(main)
