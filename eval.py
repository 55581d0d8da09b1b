"""Score separation on the test tracks of MUSDB18, or of any dataset in its shape.

    python eval.py                                         open-unmix/ (or umxl) beside the mixture, on train.py's data
    python eval.py --root MUSDB18 --model umxhq --method model share irm mwf      a model between its floor and ceilings
    python eval.py --root MUSDB18 --estimates STEMS        stems that any program made: STEMS/test/<track>/<target>.wav
    python eval.py --root MUSDB18 --compare UMX UMXHQ      other methods' museval scores beside ours
    torchrun --nproc_per_node=4 eval.py --root MUSDB18     the tracks shared out over processes (or machines)

museval's numbers (BSS Eval v4): frames of one second; medians over frames, then over tracks. To score vocals alone:

    python eval.py --aggregate '{"vocals": ["vocals"], "accompaniment": ["drums", "bass", "other"]}'

It still estimates all four targets, because the Wiener filter tells vocals from what it knows of the others. --targets
vocals estimates nothing else and is faster, but the published models' vocals fall from 6.3 to 5.5 dB.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import soundfile
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg import toeplitz
from tqdm import tqdm

from data import find_data, index_musdb, read_as
from model import BLOCK, aggregation, expectation_maximization, istft, separator_from_flags, stft, sum_targets
from utils import SOURCES, AudioStream, Parser, UserError, add_separation_flags, atomic_write, figure, gather, load
from utils import number, process_rank, report, resample, run, save, save_figure, use_ffmpeg

METRICS = ("SDR", "ISR", "SIR", "SAR")  # museval's, of each frame
DELAYS = 512  # samples, 0 to 511, by which BSS Eval may shift a reference: L below
WHOLE = ("uSDR", "SI-SDR")  # of the whole track
TARGETS = (*SOURCES, "accompaniment")  # museval's order
METHODS = ("model", "mixture", "share", "ibm", "irm", "irm2", "mwf")
MODEL_FLAGS = ("model", "targets", "niter", "wiener_win_len", "wiener", "softmask", "residual", "amp")


def parse_args(arguments):
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--root", help="folder of the data (default: what train.py without --root uses)")
    add("--dataset", choices=["musdb", "synthetic"], default="musdb", help="synthetic: synthesized songs")
    add("--is-wav", action="store_true", help="--root is MUSDB18-HQ (WAV), even if it holds stem files too")
    add("--cache", help="folder for the WAV files decoded from stems (default: <root>-wav)")
    add("--subset", choices=["test", "train"], default="test", help="which tracks to score")
    add = parser.add_argument_group("what is scored").add_argument
    methods = "the model; floors: the mixture as every estimate, or an equal share of it (SiSEC 2018's MIX: a quarter for"
    methods += " each source); ceilings that know the true stems: ideal binary mask, ideal ratio mask of magnitudes (irm)"
    methods += " and of powers (irm2), multichannel Wiener filter; none: only what --compare names"
    add("--method", nargs="+", choices=[*METHODS, "none"], default=["model", "mixture"], help=methods)
    add("--estimates", metavar="DIR", help="score these stems instead of a model's: DIR/<subset>/<track>/<target>.wav")
    add("--engine", choices=["own", "museval"], default="own", help="who computes BSS Eval; museval: the same, slowly")
    add("--workers", type=number(int, 1, 256), default=1, help="processes that score while the next track is separated")
    add = parser.add_argument_group("output").add_argument
    add("--evaldir", help="folder for museval's JSON: <evaldir>/<subset>/<track>.json (default: scores/<model>)")
    add("--outdir", help="also keep the model's stems: <outdir>/<subset>/<track>/<target>.wav")
    add("--compare", nargs="+", metavar="DIR", help="folders of museval JSON to put beside: tables, box plots, significance")
    add("--csv", metavar="FILE", help="also write every frame's scores")
    add_separation_flags(parser)
    args, given = parser.parse_args(arguments), parser.given(arguments)
    args.evaldir = Path(args.evaldir or Path("scores", Path(args.estimates or args.model).name))
    args.method = [method for method in dict.fromkeys(args.method) if method != "none"]
    if args.estimates:
        args.method = ["estimates"] + [method for method in args.method if method != "model"]
    if args.dataset == "synthetic" and given & {"is_wav", "cache"}:
        raise UserError("--is-wav and --cache: are not used with --dataset synthetic; leave them out")
    unused = given & {*MODEL_FLAGS, "outdir"} - {"model", "targets"}  # those two name the default folder and the stems
    if unused and "model" not in args.method:
        raise UserError(f"--{min(unused).replace('_', '-')}: is for --method model, which is not scored here; leave it out")
    if not args.method and not args.compare:
        raise UserError("--method none: leaves nothing to do without --compare")
    return args


# ---------------------------------------------------------------------------------------------- BSS Eval v4


def bss_eval(references, estimates, window=44100):
    """Scores separated stems frame by frame with BSS Eval v4, the metrics of SiSEC 2018 and MUSDB18.

    An estimate is split into `true + spatial + interference + artifacts`. Two least-squares projections, computed once
    on the whole song, do it: on delayed copies of its own reference (`true + spatial`), and on those of all the
    references (`true + spatial + interference`). Scores are ratios of the energies of these parts in each frame.

    Args:
        references, estimates: true and separated stems in the same order, float arrays (J, C, N).
        window: length of a frame, in samples. A shorter song is one frame; a last, incomplete frame is dropped.
    Returns:
        dict of four float64 arrays (J, frames), in dB: "SDR" distortion (all errors), "ISR" spatial distortion, "SIR"
        interference, "SAR" artifacts. +inf where there is no error; NaN for every source in frames where any reference
        or estimate is silent.
    Raises:
        numpy.linalg.LinAlgError: no stable projection was found, as when samples are NaN.

    Stöter, Liutkus, Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018; Vincent, Gribonval, Févotte,
    "Performance measurement in blind audio source separation", IEEE TASLP 14(4), 2006. The numbers are museval's, many
    times faster: one factorization serves all targets, and energies are summed in the frequency domain.
    """
    J, _, N = references.shape
    window = min(window, N)
    n_fft = 2 * next_fast_len((window + DELAYS) // 2, real=True)  # holds a filtered frame with its tail
    # Parseval: rfft leaves out the mirrored half of the spectrum, so all bins but the first and the last count twice.
    # With this scale, an energy is a plain sum over bins.
    scale = np.full(n_fft // 2 + 1, np.sqrt(2 / n_fft))
    scale[[0, -1]] = np.sqrt(1 / n_fft)
    own_filters, leak_filters = (rfft(filters, n_fft) for filters in distortion_filters(references, estimates))

    scores = {metric: np.full((J, N // window), np.nan) for metric in METRICS}
    for t in range(N // window):
        frames = [stems[..., t * window : (t + 1) * window] for stems in (references, estimates)]
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
    """museval's definition, kept so that the same frames are NaN: zero after the channels are summed."""
    return (stems.sum(axis=-2) == 0).all(axis=-1)  # (..., C, N) -> (...)


def ratio_db(signal, error):
    signal, error = np.vdot(signal, signal).real, np.vdot(error, error).real
    with np.errstate(divide="ignore"):
        return 10 * np.log10(signal / error) if error else np.inf


def distortion_filters(references, estimates):
    """Least-squares filters on the whole song, output channel before input channel: (J, C, C, L) that project each
    estimate on its own reference, and (J, C, J, C, L) for the interference: what projecting on all references adds."""
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
    """Correlates the P = J * C reference channels with themselves and with the estimates, at lags 0 to L - 1, the
    second signal being the later one: (P, 2 * P, L)."""
    J, C, N = references.shape
    n_fft = next_fast_len(16 * DELAYS, real=True)
    step = n_fft - DELAYS + 1
    span = 16 * step  # 16 blocks of `step` samples at a time: memory does not grow with the song
    spectrum = 0
    for start in range(0, N, span):
        piece = slice(start, start + span + DELAYS - 1)
        signals = np.concatenate([references[..., piece], estimates[..., piece]]).reshape(2 * J * C, -1).astype(float)
        signals = np.pad(signals, [(0, 0), (0, span + DELAYS - 1 - signals.shape[1])])
        blocks = sliding_window_view(signals, n_fft, axis=-1)[:, ::step].T  # (n_fft, 16, 2 * P), overlapping
        undelayed = rfft(blocks[:step, :, : J * C], n_fft, axis=0)  # (F, 16, P), without the overlap
        delayed = rfft(blocks, axis=0)  # (F, 16, 2 * P)
        spectrum = spectrum + undelayed.conj().swapaxes(1, 2) @ delayed  # (F, P, 2 * P)
    return irfft(spectrum, n_fft, axis=0)[:DELAYS].transpose(1, 2, 0)


def project(auto, cross):
    """Least-squares filters (Q, P, L) from P channels to Q, given correlations (P, P, L) and (P, Q, L)."""
    P, Q, L = cross.shape
    # sum over n of x_p[n - l] x_q[n - m] depends on l - m only; for l < m it is the correlation of the swapped pair
    gram = np.block([[toeplitz(auto[p, q], auto[q, p]) for q in range(P)] for p in range(P)])  # (P * L, P * L)
    right_side = cross.swapaxes(1, 2).reshape(P * L, Q)
    # museval loads the diagonal with eps: a silent channel gets filters of zero. Beside the energy of a song that is
    # lost, and exactly dependent references, such as a mono stem in stereo, need a few units in the last place.
    for loading in (0, 4, 64, 1024):
        gram.flat[:: P * L + 1] += np.finfo(float).eps * max(1, loading * gram.max())
        try:
            filters = np.linalg.solve(gram, right_side)
        except np.linalg.LinAlgError:
            continue
        if np.abs(gram @ filters - right_side).max() <= 1e-9 * np.abs(right_side).max():
            return filters.T.reshape(Q, P, L)
    raise np.linalg.LinAlgError("BSS Eval found no stable projection: are all samples finite?")


def whole_track_scores(reference, estimate):
    """One number for all samples and channels of (C, N), in dB.

    uSDR as in the MDX and SDX challenges (Mitsufuji et al., Music Demixing Challenge 2021), and SI-SDR (Le Roux et al.,
    SDR - half-baked or well done?, ICASSP 2019), with one scale for all channels.
    """
    reference, estimate = reference.astype(float).ravel(), estimate.astype(float).ravel()
    energy = reference @ reference
    usdr = 10 * math.log10((energy + 1e-7) / (np.sum((reference - estimate) ** 2) + 1e-7))
    scaled = reference * (estimate @ reference / max(energy, 1e-20))
    error = np.sum((estimate - scaled) ** 2)
    si_sdr = 10 * math.log10(scaled @ scaled / error) if error and scaled.any() else math.nan
    return {"uSDR": round(usdr, 5), "SI-SDR": round(si_sdr, 5)}


# ---------------------------------------------------------------------------------------------- one track


def in_order(names):
    """Targets in museval's order, then any others."""
    return sorted(names, key=lambda name: TARGETS.index(name) if name in TARGETS else len(TARGETS))


def score(references, estimates, rate, engine="own"):
    """Scores estimates {name: (C, N)} against references {name: (C, N)}: the "targets" of museval's JSON.

    As in museval.eval_mus_track, all targets but the accompaniment are scored against each other, then vocals and
    accompaniment as a pair. Beyond its keys, each target has its scores of the whole track. A reference that is silent
    throughout, which BSS Eval is not defined for, is left out.
    """
    names = [name for name in references if not silent(references[name])]
    both = {"vocals", "accompaniment"} <= references.keys()
    pair = [name for name in names if both and name in ("vocals", "accompaniment")]
    others = [name for name in names if name not in pair or name == "vocals"]
    targets = {}
    for group in [pair] if others == pair[:1] else [others, pair]:
        if not group:
            continue
        stacks = [np.stack([stems[name] for name in group]) for stems in (references, estimates)]
        scores = museval_scores(*stacks, rate) if engine == "museval" else bss_eval(*stacks, rate)
        scores = np.stack([scores[metric] for metric in METRICS], axis=-1).round(5)  # (J, frames, metrics)
        scores[~np.isfinite(scores)] = np.nan
        for name, rows in zip(group, scores.tolist()):
            frames = [{"time": float(t), "duration": 1.0, "metrics": dict(zip(METRICS, row))} for t, row in enumerate(rows)]
            whole = whole_track_scores(references[name], estimates[name])
            targets.pop(name, None)  # of the vocals' two scores the pair's counts, and comes last
            targets[name] = {"name": name, "frames": frames, "whole_track": whole}
    return list(targets.values())


def museval_scores(references, estimates, window):
    """`bss_eval` by museval itself."""
    use_ffmpeg()  # museval refuses to be imported without
    import museval

    if not hasattr(np.linalg, "linalg"):  # museval looks there for LinAlgError; numpy 2.4 has it no more
        np.linalg.linalg = np.linalg
    return dict(zip(METRICS, museval.evaluate(references.swapaxes(1, 2), estimates.swapaxes(1, 2), win=window, hop=window)))


def score_track(method, track, stems, args, settings, estimates=None):
    """Score a track and write museval's JSON; `estimates` are the model's. Runs in a process of its own.

    Returns a set of notes for the user.
    """
    shape = dict(start=0, length=track.mixture.length, rate=track.mixture.rate, channels=track.mixture.channels)
    sources = {name: read_as(audio, **shape) for name, audio in track.sources.items()}
    references = {name: sum(sources[source] for source in stems[name]) for name in stems}
    if method == "estimates":
        estimates = read_estimates(args, track)
    elif method != "model":
        estimates = oracle(method, read_as(track.mixture, **shape), sources, stems)
    left_out = [name for name in stems if silent(references[name])]
    for name in stems:
        if not np.isfinite([references[name].sum(), estimates[name].sum()]).all():
            raise UserError(f"{track.name}: {name} has NaN or infinite samples; repair or export it again")
        if silent(estimates[name]) and name not in left_out:
            raise UserError(f"{track.name}: the estimate of {name} is silent throughout: BSS Eval is not defined for it")
    for name in estimates if method == "model" and args.outdir else []:
        with atomic_write(stem_folder(args, track) / f"{name}.wav") as temporary:
            soundfile.write(temporary, estimates[name].T, track.mixture.rate, subtype="FLOAT", format="WAV")
    targets = score(references, estimates, track.mixture.rate, args.engine)
    content = {"targets": targets, "museval_version": "0.4.1", "settings": settings, "outdir": args.outdir}
    save(content, score_path(args, method, track))
    reason = "is silent throughout: BSS Eval is not defined for it, it has no score"
    return {f"{track.name}: {name} {reason}" for name in left_out}


# ---------------------------------------------------------------------------------------------- estimates


def separate(separator, track, args):
    """The model's estimates of a track: {stem: (C, N)}."""
    audio = track.mixture
    x = resample(torch.from_numpy(audio.read(0, audio.length)), audio.rate, separator.sample_rate)
    estimates = torch.cat([block.float().cpu() for block in separator.stream([x])], dim=-1)
    estimates = resample(estimates, separator.sample_rate, audio.rate)[..., : audio.length]  # (J, C, N)
    return {name: stem.numpy() for name, stem in sum_targets(estimates, separator.targets, args.sums).items()}


def given_targets(args, tracks):
    """The tracks that have a folder of given estimates, and the targets found in any of them."""
    folder = Path(args.estimates, args.subset)
    found = [track for track in tracks if (folder / track.name).is_dir()]
    targets = [name for name in TARGETS if any((folder / track.name / f"{name}.wav").exists() for track in found)]
    if not targets:
        raise UserError(f"--estimates: no stems there (expected {folder / tracks[0].name / 'vocals.wav'} and so on)")
    if len(found) < len(tracks):
        missing = next(track.name for track in tracks if track not in found)
        print(f"{folder}: has {len(found)} of {len(tracks)} tracks, and only these are scored; it lacks {missing}")
    return found, args.targets or targets


def read_estimates(args, track):
    """Stems that any program made, in musdb's layout of estimates, summed as --aggregate asks: {stem: (C, N)}."""
    rate, channels, length = track.mixture.rate, track.mixture.channels, track.mixture.length
    estimates = {}
    for name, parts in args.sums.items():
        for part in parts:
            stream = AudioStream(Path(args.estimates, args.subset, track.name, f"{part}.wav"))
            audio = torch.cat(list(stream), dim=1)  # (C, N)
            longer = audio.shape[1] - length
            if (stream.rate, longer) != (rate, 0) or len(audio) > channels:
                has = f"has {stream.rate} Hz, {len(audio)} channels and {longer:+d} samples"
                against = f"against the track's {rate} Hz and {channels} channels; export it again"
                raise UserError(f"{stream.path}: {has} {against}")
            estimates[name] = estimates.get(name, 0) + audio.expand(channels, -1).numpy()
    return estimates


def oracle(method, mixture, sources, stems):
    """What the mixture (C, N) and the true sources {name: (C, N)} give at worst and at best: {stem: (C, N)}.

    As in SiSEC 2018 (sigsep-mus-oracle), with an STFT of 2048 samples and hop 1024 for masks:
        mixture: the mixture itself             share: an equal share of it for each source ("MIX" there)
        ibm: mask 1 where |S| >= |X| / 2        irm: |S| / sum |S|        irm2: |S|^2 / sum |S|^2
        mwf: the model's Wiener filter, one EM iteration from the true sources' spectra
    """
    if method == "mixture":
        return dict.fromkeys(stems, mixture)
    if method == "share":
        return {name: mixture * np.float32(len(parts) / len(sources)) for name, parts in stems.items()}

    def spectrum(audio):
        return stft(torch.as_tensor(audio), 2048, 1024)  # (C, F, T)

    def power(source):
        return spectrum(source).abs() ** (2 if method == "irm2" else 1)

    X = spectrum(mixture)
    if method == "mwf":
        S = torch.stack([spectrum(source) for source in sources.values()])  # (J, C, F, T)
        level = X.abs().amax().view(1, 1, 1, 1)
        blocks = zip(S.split(BLOCK, dim=-2), X.split(BLOCK, dim=-2))  # bins are independent: a few at a time saves memory
        Y = torch.cat([expectation_maximization(s[None], x[None], 1, level)[0] for s, x in blocks], dim=-2)
    elif method == "ibm":
        Y = (X * (2 * spectrum(source).abs() >= X.abs()) for source in sources.values())
    else:
        total = sum(power(source) for source in sources.values()).clamp_min(1e-20)
        Y = (X * (power(source) / total) for source in sources.values())
    estimates = {name: istft(y, mixture.shape[1], 2048, 1024).numpy() for name, y in zip(sources, Y)}
    return {name: sum(estimates[source] for source in stems[name]) for name in stems}


# ---------------------------------------------------------------------------------------------- all tracks


def scored_stems(targets, args):
    """{stem: the data's sources that make up its reference} of all stems to score, in museval's order."""
    known = {args.residual or "residual": [source for source in SOURCES if source not in targets]}
    known.update({source: [source] for source in SOURCES}, accompaniment=[s for s in SOURCES if s != "vocals"])
    stems = {}
    for name, parts in args.sums.items():
        for target in parts:
            if target not in known:
                raise UserError(f"{target}: the data has no such source to compare with; it has {', '.join(TARGETS)}")
        stems[name] = [source for target in parts for source in known[target]]
    return {name: stems[name] for name in in_order(stems) if stems[name]}  # what four sources leave has no reference


def score_path(args, method, track):
    """<evaldir>/<subset>/<track>.json for a model or given estimates, <evaldir>/<method>/... for floor and ceilings."""
    folder = args.evaldir if method in ("model", "estimates") else args.evaldir / method
    return folder / args.subset / f"{track.name}.json"


def stem_folder(args, track):
    return Path(args.outdir, args.subset, track.name)


def describe(args, method, track, stems):
    """What a track's scores depend on; kept in its JSON."""
    settings = {"method": method, "stems": stems, "engine": args.engine}
    files = [audio.path for audio in (track.mixture, *track.sources.values())]
    if method == "estimates":
        settings["sums"] = args.sums
        files += sorted(Path(args.estimates, args.subset, track.name).glob("*.wav"))
    if method == "model":
        settings.update({flag: getattr(args, flag) for flag in MODEL_FLAGS})
        files += sorted(Path(args.model).glob("*.pth"))
    settings["files"] = {str(path): [os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in files}
    return settings


def is_scored(args, method, track, settings):
    """Whether a track has a JSON for the same settings, and its stems where they are to be kept."""
    path = score_path(args, method, track)
    if not path.exists():
        return False
    try:
        scores = load(path)
    except UserError:
        print(f"{path}: does not parse, the track is scored again", file=sys.stderr)
        return False
    if not isinstance(scores, dict) or "settings" not in scores:
        raise UserError(f"{path}: was not written by eval.py and would be lost; choose another --evaldir")
    kept = method != "model" or not args.outdir or scores.get("outdir") == args.outdir and stem_folder(args, track).is_dir()
    return scores["settings"] == settings and kept


def start_worker():
    """Runs first in a process that scores: it ends quietly with Ctrl-C, and when the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def evaluate(tracks, stems, args, separator):
    """Score tracks with every method in other processes, while the next one is separated here.

    Returns the (method, track name) pairs that failed.
    """
    jobs = [(method, track, describe(args, method, track, stems)) for track in tracks for method in args.method]
    jobs = [job for job in jobs if not is_scored(args, *job)]
    workers = max(1, min(args.workers, len(jobs)))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    pending, failed, notes = {}, [], set()
    bar = tqdm(total=len(jobs), desc="tracks", unit="track", disable=process_rank()[0] > 0)

    def collect(limit):
        while len(pending) > limit:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                method, track = pending.pop(future)
                try:
                    notes.update(future.result())
                except UserError as error:
                    with tqdm.external_write_mode(sys.stderr):
                        report(error)
                    failed.append((method, track.name))
                bar.update()

    try:
        # One thread each, and all scoring in such processes: rounding, and so a score, never depends on how many there are.
        with mock.patch.dict(os.environ, {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "VECLIB")}):
            for method, track, settings in jobs:
                estimates = separate(separator, track, args) if method == "model" else None
                future = pool.submit(score_track, method, track, stems, args, settings, estimates)
                pending[future] = method, track
                collect(workers)
            collect(0)
    except BrokenProcessPool:
        raise UserError("a scoring process was killed, perhaps for want of memory; go on with fewer --workers") from None
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        print("\nfinished tracks are kept: the same command goes on with the others", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    for note in sorted(notes):
        print(note)
    return failed


def score_tracks(args):
    """Score all tracks, this process its share of them; returns (tracks, the (method, track name) pairs that failed)."""
    root = find_data(args.root, args.dataset, args.is_wav, args.cache)
    splits = ("test",) if args.subset == "test" else ("train", "valid")
    tracks = sorted((track for split in splits for track in index_musdb(root, split)), key=lambda track: track.name)
    separator = separator_from_flags(args) if "model" in args.method else None
    targets = separator.targets if separator else args.targets or SOURCES
    if args.estimates:
        tracks, targets = given_targets(args, tracks)
    args.sums = aggregation(targets, args)
    rank, _, world = process_rank()
    return tracks, gather(evaluate(tracks[rank::world], scored_stems(targets, args), args, separator))


# ---------------------------------------------------------------------------------------------- tables and pictures


def score_table(paths, method):
    """Scores of museval's JSON files as a table: method, track, target, metric, time (NaN: whole track), score."""
    rows = []
    for path in paths:
        scores = load(path)
        try:
            for target in scores["targets"]:
                row = method, path.stem, target["name"]
                for frame in target["frames"]:
                    rows += [(*row, metric, frame["time"], frame["metrics"][metric]) for metric in METRICS]
                rows += [(*row, metric, math.nan, value) for metric, value in target.get("whole_track", {}).items()]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: is not museval's JSON; remove it") from None
    return pd.DataFrame(rows, columns=["method", "track", "target", "metric", "time", "score"]).astype({"score": float})


def show(medians, methods):
    """Print each track's SDR, then for every target and method the medians and means over tracks."""
    style = dict(float_format="{:.2f}".format, na_rep="-", index_names=False)
    targets = in_order(medians.index.unique("target"))
    sdr = medians["SDR"].unstack("target")[targets]
    sdr = sdr.reindex(sorted(sdr.index.unique("track")), level="track").reindex(methods, level="method")
    if len(sdr) <= 100:
        print(f"\nSDR in dB, median over frames\n{sdr.to_string(**style)}")
    grouped = medians.groupby(["target", "method"])
    summary = grouped[[*METRICS]].median().join(grouped[[*WHOLE]].mean()).assign(tracks=grouped["SDR"].count())
    summary = summary.reindex(targets, level="target").reindex(methods, level="method")
    print(f"\ndB: median over frames, then over tracks; {' and '.join(WHOLE)} of whole tracks: mean over tracks")
    print(summary.to_string(**style, sparsify=False))


def compare(medians, methods, folder):
    """Print the paired significance of the first method against each other one, and draw box plots of all."""
    from scipy.stats import wilcoxon

    first = methods[0]
    print(f"\nSDR of {first} less that of others on the same tracks: median, Wilcoxon signed-rank test")
    for target in in_order(medians.index.unique("target")):
        rows = medians.xs(target, level="target")
        sdr = rows["SDR"].unstack("method")
        for other in [method for method in methods[1:] if {first, method} <= set(sdr)]:
            difference = (sdr[first] - sdr[other]).dropna()
            result = f"{difference.median():+8.2f} dB" if len(difference) else ""
            if len(difference) < 6:  # whatever the difference of five tracks, its p is above 0.05
                result += "   too few tracks in common for a test: 6 are needed, there are"
            else:
                result += f"   p = {wilcoxon(difference).pvalue if difference.any() else 1:<8.2g} tracks:"
            print(f"{target:16}{other:16}{result} {len(difference)}")
        for metric in METRICS:
            scores = {method: values.dropna() for method, values in rows[metric].groupby("method") if values.notna().any()}
            box_plot(scores, first, f"{target}: {metric}", folder / "compare" / f"{target}-{metric}.png")
    print(f"box plots: {folder / 'compare'}/<target>-<metric>.png")


def box_plot(scores, ours, title, path):
    """Draw {method: scores of the tracks} as horizontal boxes with each track's point, the best median at the top."""
    scores = dict(sorted(scores.items(), key=lambda item: item[1].median()))
    picture, axes = figure(1, 1, (8, 1.3 + 0.42 * len(scores)))
    axis, rng = axes[0, 0], np.random.default_rng(0)
    boxes = axis.boxplot(scores.values(), orientation="horizontal", widths=0.6, showfliers=False, patch_artist=True)
    ends = np.concatenate([cap.get_xdata() for cap in boxes["caps"]])
    for row, (method, values) in enumerate(scores.items(), 1):
        colour = "tab:red" if method == ours else "tab:gray" if method in METHODS else "tab:blue"
        boxes["boxes"][row - 1].set(facecolor=colour, alpha=0.4)
        boxes["medians"][row - 1].set(color="black", linewidth=1.5)
        points = values.clip(ends.min(), ends.max())
        axis.scatter(points, row + rng.uniform(-0.2, 0.2, len(points)), s=8, color=colour, zorder=3)
        axis.annotate(f"{values.median():.2f}", (1.01, row), xycoords=("axes fraction", "data"), va="center")
    axis.set_yticks(range(1, len(scores) + 1), [f"{method} ({len(values)})" for method, values in scores.items()])
    axis.set_title(title, loc="left", weight="bold")
    axis.set_xlabel("dB; a point for each track (median over frames), outliers at the edge")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    save_figure(picture, path)


def main():
    args = parse_args(sys.argv[1:])
    others = {folder: sorted(Path(folder, args.subset).glob("**/*.json")) for folder in args.compare or []}
    for folder, paths in others.items():
        if not paths:
            raise UserError(f"--compare {folder}: no museval JSON there (expected {folder}/{args.subset}/<track>.json)")
    tracks, failed = score_tracks(args) if args.method else ([], [])
    if process_rank()[0] > 0:
        return
    tables = {}
    for method in args.method:
        name = args.evaldir.name or method if method in ("model", "estimates") else method
        tables[name] = score_table([score_path(args, method, t) for t in tracks if (method, t.name) not in failed], name)
    for folder, paths in others.items():
        name = Path(folder).name if Path(folder).name not in tables else folder
        tables[name] = score_table(paths, name)
    table = pd.concat(tables.values(), ignore_index=True)
    if table.empty:
        raise UserError("there are no scores to show: no track could be scored")
    medians = table.groupby(["track", "method", "target", "metric"], sort=False)["score"].median()  # of frames, without NaN
    medians = medians.unstack().reindex(columns=[*METRICS, *WHOLE])  # rows (track, method, target)
    show(medians, list(tables))
    if args.compare:
        compare(medians, list(tables), args.evaldir)
    if args.csv:
        with atomic_write(args.csv) as temporary:
            table.to_csv(temporary, index=False)
    if args.method:
        print(f"\nscores of every frame: {args.evaldir}/. Next: hear it (python test.py SONG.wav), or --compare others")
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    run(main)
