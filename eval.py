"""Score separation on the test tracks of MUSDB18, or of any dataset in its shape.

    python eval.py                                         open-unmix/ (or umxl) beside the mixture, on the data train.py uses
    python eval.py --root MUSDB18 --model umxhq --method model mixture irm mwf    a model between its floor and ceilings
    python eval.py --root MUSDB18 --estimates STEMS        stems that any program made: STEMS/test/<track>/<target>.wav
    python eval.py --root MUSDB18 --compare UMX UMXHQ      other methods' museval scores beside ours
    torchrun --nproc_per_node=4 eval.py --root MUSDB18     the tracks shared out over processes (or machines)

museval's numbers (BSS Eval v4): frames of one second; medians over frames, then over tracks.
"""

import math
import multiprocessing
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import irfft, next_fast_len, rfft
from tqdm import tqdm

from data import SOURCES, find_data, index_musdb, read_as
from model import aggregation, expectation_maximization, istft, separator_from_flags, stft, sum_targets
from utils import Parser, UserError, add_separation_flags, atomic_write, figure, import_musdb, load, number, process_rank
from utils import read_audio, report, resample, run, save, save_figure

METRICS = ("SDR", "ISR", "SIR", "SAR")
TARGETS = ("vocals", "drums", "bass", "other", "accompaniment")  # museval's order
METHODS = ("model", "mixture", "ibm", "irm", "irm2", "mwf")


def parse_args(arguments):
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--root", help="folder of the data (default: what train.py without --root uses)")
    add("--dataset", choices=["musdb", "synthetic"], default="musdb", help="synthetic: synthesized songs")
    add("--is-wav", action="store_true", help="--root is MUSDB18-HQ (WAV), even if it holds stem files too")
    add("--cache", help="folder for the WAV files decoded from stems (default: <root>-wav)")
    add("--subset", choices=["test", "train"], default="test", help="which tracks to score")
    add = parser.add_argument_group("what is scored").add_argument
    add(
        "--method",
        nargs="+",
        choices=METHODS,
        default=["model", "mixture"],
        help="the model; the floor: the mixture itself as every estimate; ceilings that know the true stems: ideal binary mask,"
        " ideal ratio mask of magnitudes (irm) and powers (irm2), multichannel Wiener filter",
    )
    add("--estimates", metavar="DIR", help="score these stems instead of a model's: DIR/<subset>/<track>/<target>.wav")
    add("--engine", choices=["own", "museval"], default="own", help="who computes BSS Eval: the same numbers, museval is slower")
    add("--workers", type=number(int, 1, 256), default=1, help="processes that score while the next track is separated")
    add = parser.add_argument_group("output").add_argument
    add("--evaldir", help="folder for museval's JSON of each track: <evaldir>/<subset>/<track>.json (default: scores/<model>)")
    add("--outdir", help="also keep the model's stems: <outdir>/<subset>/<track>/<target>.wav")
    add("--compare", nargs="+", metavar="DIR", help="folders of museval JSON to put beside: tables, box plots, significance")
    add("--csv", metavar="FILE", help="also write every frame's scores")
    add_separation_flags(parser)
    args = parser.parse_args(arguments)
    if args.estimates:
        args.method = ["estimates"] + [method for method in args.method if method not in ("model", "estimates")]
    name = Path(args.estimates or args.model or ("open-unmix" if Path("open-unmix").is_dir() else "umxl")).name
    args.evaldir = Path(args.evaldir or Path("scores", name))
    return args


# ---------------------------------------------------------------------------------------------- BSS Eval v4

def bss_eval(references, estimates, window=44100, hop=44100, filter_length=512):
    """Scores separated stems frame by frame with BSS Eval v4, the metrics of SiSEC 2018 and MUSDB18.

    An estimate is split into `true + spatial + interference + artifacts`. Two least-squares projections, computed once
    on the whole song, do it: on delayed copies of its own reference (`true + spatial`), and on those of all the
    references (`true + spatial + interference`). Scores are ratios of the energies of these parts in each frame.

    Args:
        references: true stems, float array (J, C, N).
        estimates: separated stems, float array (J, C, N), in the same order.
        window: length of a frame, in samples. A shorter song is one frame; a last, incomplete frame is dropped.
        hop: samples from one frame to the next.
        filter_length: number of delays, 0 to filter_length - 1 samples, that a projection may use.

    Returns:
        dict of four float64 arrays (J, frames), in dB: "SDR" distortion (all errors), "ISR" spatial distortion, "SIR"
        interference, "SAR" artifacts. +inf where there is no error; NaN for every source in frames where any reference
        or estimate is silent.

    Raises:
        ValueError: the shapes differ, or a reference or an estimate is silent throughout.

    Source: Stöter, Liutkus and Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018; Vincent, Gribonval
    and Févotte, "Performance measurement in blind audio source separation", IEEE TASLP 14(4), 2006. The numbers are
    those of `museval.metrics.bss_eval`, several times faster: one factorization serves all targets, and energies are
    summed in the frequency domain.
    """
    references, estimates = np.asarray(references), np.asarray(estimates)
    if references.ndim != 3 or references.shape != estimates.shape:
        raise ValueError(f"references {references.shape} and estimates {estimates.shape} must be of one shape (J, C, N)")
    for name, stems in [("reference", references), ("estimate", estimates)]:
        if _silent(stems).any():
            raise ValueError(f"{name} {_silent(stems).argmax()} is silent throughout: BSS Eval is undefined")

    J, C, N = references.shape
    window = min(window, N)
    nb_frames = (N - window) // hop + 1
    n_fft = 2 * next_fast_len((window + filter_length) // 2, real=True)  # holds a filtered frame with its tail
    # Parseval: rfft leaves out the mirrored half of the spectrum, so all bins but the first and the last count twice.
    # With this scale, an energy is a plain sum over bins.
    scale = np.full(n_fft // 2 + 1, np.sqrt(2 / n_fft))
    scale[[0, -1]] = np.sqrt(1 / n_fft)

    own_filters, leak_filters = _distortion_filters(references, estimates, filter_length)
    own_filters = rfft(own_filters, n_fft, workers=-1)  # (J, C, C, F)
    leak_filters = rfft(leak_filters, n_fft, workers=-1)  # (J, C, J, C, F)

    def frames(stems, first, count):  # (J, C, count, window), a view
        return sliding_window_view(stems[..., first * hop :], window, axis=-1)[..., ::hop, :][..., :count, :]

    scores = {metric: np.full((J, nb_frames), np.nan) for metric in ("SDR", "ISR", "SIR", "SAR")}
    batch = max(1, 2**19 // n_fft)  # frames at a time: 11 of a second, some 200 MB in all for four stereo stems
    for first in range(0, nb_frames, batch):
        reference_frames, estimate_frames = frames(references, first, batch), frames(estimates, first, batch)
        heard = ~(_silent(reference_frames) | _silent(estimate_frames)).any(axis=0)  # (frames,)
        if not heard.any():
            continue
        at = first + np.flatnonzero(heard)
        true, estimate = (
            rfft(stems[:, :, heard].astype(float, copy=False), n_fft, workers=-1) * scale  # (J, C, frames, F)
            for stems in (reference_frames, estimate_frames)
        )
        for j in range(J):
            own = np.einsum("dcf,ctf->dtf", own_filters[j], true[j])  # true + spatial
            interference = np.einsum("dkcf,kctf->dtf", leak_filters[j], true)
            explained = own + interference
            scores["SDR"][j, at] = _ratio_db(true[j], estimate[j] - true[j])
            scores["ISR"][j, at] = _ratio_db(true[j], own - true[j])
            scores["SIR"][j, at] = _ratio_db(own, interference)
            scores["SAR"][j, at] = _ratio_db(explained, estimate[j] - explained)
    return scores


def _silent(stems):
    # museval's definition, kept so that the same frames are NaN: zero after the channels are summed.
    return (stems.sum(axis=1) == 0).all(axis=-1)  # (J, C, ..., N) -> (J, ...)


def _ratio_db(signal, error):
    signal, error = [(x.real**2 + x.imag**2).sum(axis=(0, -1)) for x in (signal, error)]  # (C, T, F) -> (T,)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, np.inf, 10 * np.log10(signal / error))


def _distortion_filters(references, estimates, filter_length):
    """Filters (J, C, C, L) that map each reference to its projection (output channel first), and filters (J, C, J, C, L)
    that map all references to the interference: what projecting on all of them adds."""
    J, C, N = references.shape
    correlations = _correlations(references.reshape(J * C, N), estimates.reshape(J * C, N), filter_length)
    auto, cross = np.split(correlations, 2, axis=1)  # (J*C, J*C, L) each
    leak_filters = _project(auto, cross).reshape(J, C, J, C, filter_length)
    own_filters = np.empty((J, C, C, filter_length))
    for j in range(J):
        own = slice(j * C, (j + 1) * C)
        own_filters[j] = _project(auto[own, own], cross[own, own])
        leak_filters[j, :, j] -= own_filters[j]
    return own_filters, leak_filters


def _correlations(references, estimates, filter_length):
    """Correlates P reference channels with themselves and with the estimates, lags 0 to L - 1: (P, 2 * P, L)."""
    P, N = references.shape
    n_fft = next_fast_len(16 * filter_length, real=True)
    step = n_fft - filter_length + 1
    span = 16 * step  # 16 blocks of `step` samples at a time: memory does not grow with the song
    spectrum = 0
    for start in range(0, N, span):
        piece = slice(start, start + span + filter_length - 1)
        signals = np.concatenate([references[:, piece], estimates[:, piece]]).astype(float, copy=False)
        signals = np.pad(signals, [(0, 0), (0, span + filter_length - 1 - signals.shape[1])])
        blocks = sliding_window_view(signals, n_fft, axis=-1)[:, ::step].T  # (n_fft, 16, 2 * P), overlapping
        undelayed = rfft(blocks[:step, :, :P], n_fft, axis=0, workers=-1)  # (F, 16, P), without the overlap
        delayed = rfft(blocks, axis=0, workers=-1)  # (F, 16, 2 * P)
        spectrum = spectrum + undelayed.conj().swapaxes(1, 2) @ delayed  # (F, P, 2 * P)
    return irfft(spectrum, n_fft, axis=0, workers=-1)[:filter_length].transpose(1, 2, 0)


def _project(auto, cross):
    """Least-squares filters (Q, P, L) from P channels to Q, given correlations (P, P, L) and (P, Q, L)."""
    P, Q, L = cross.shape
    # Negative lags of one pair are positive lags of the swapped pair. Windows of the two-sided sequence, read
    # backwards, are the rows of a Toeplitz block.
    two_sided = np.concatenate([auto.swapaxes(0, 1)[..., :0:-1], auto], axis=-1)  # (P, P, 2 * L - 1)
    gram = sliding_window_view(two_sided, L, axis=-1)[..., ::-1].swapaxes(1, 2).reshape(P * L, P * L)
    right_side = cross.swapaxes(1, 2).reshape(P * L, Q)
    gram.flat[:: P * L + 1] += np.finfo(float).eps  # as museval: a silent channel gets filters of zero
    try:
        filters = np.linalg.solve(gram, right_side)
    except np.linalg.LinAlgError:
        # Exactly dependent references, such as a mono stem in stereo: many filters give the one projection. museval
        # calls lstsq, minutes of SVD; a diagonal at lstsq's own cut-off picks as small a solution.
        gram.flat[:: P * L + 1] += P * L * np.finfo(float).eps * gram.max()
        filters = np.linalg.solve(gram, right_side)
    return filters.T.reshape(Q, P, L)


def whole_track_scores(reference, estimate):
    """One number for all samples and channels, in dB: uSDR as in the MDX and SDX challenges, and SI-SDR; for (C, N)."""
    reference, estimate = reference.astype(np.float64).ravel(), estimate.astype(np.float64).ravel()
    energy = reference @ reference
    usdr = 10 * math.log10((energy + 1e-7) / (np.sum((reference - estimate) ** 2) + 1e-7))
    scaled = reference * (estimate @ reference / energy) if energy else reference  # Le Roux et al., SDR: half-baked or well done?
    error = np.sum((estimate - scaled) ** 2)
    si_sdr = 10 * math.log10(scaled @ scaled / error) if error and scaled.any() else math.nan
    return {"uSDR": round(usdr, 5), "SI-SDR": round(si_sdr, 5)}


# ---------------------------------------------------------------------------------------------- one track


def read_references(track, names):
    """The true stems {name: (C, N) float32} of the names to score; any other name is what no scored source holds."""
    rate, length = track.mixture.rate, track.mixture.length
    sources = {name: read_as(audio, 0, length, rate, track.mixture.channels) for name, audio in track.sources.items()}
    rest = {"accompaniment": [name for name in sources if name != "vocals"], "residual": [n for n in sources if n not in names]}
    references = {}
    for name in names:
        parts = [name] if name in sources else rest.get(name)
        if not parts:
            raise UserError(f"--targets: the data has no {name!r} to compare with; it has {', '.join(sources)}, accompaniment")
        references[name] = sum(sources[part] for part in parts)
    return references


def score_track(track, estimates, engine, settings):
    """Scores of one track's estimates {name: (C, N)}, as museval's JSON; see museval.eval_mus_track for what is grouped.

    Vocals and accompaniment are scored as a pair, all other targets against each other. Beyond museval's keys the
    result holds the settings and each target's whole-track scores.
    """
    names = sorted(estimates, key=lambda name: TARGETS.index(name) if name in TARGETS else 9)
    references = read_references(track, names)
    pair = {"vocals", "accompaniment"} <= set(names)
    groups = [[name for name in names if not (pair and name == "accompaniment")]]
    if pair:
        groups = [group for group in groups if len(group) > 1] + [["vocals", "accompaniment"]]
    scores = {}
    for group in groups:
        scores.update(bss_scores(np.stack([references[n] for n in group]), np.stack([estimates[n] for n in group]), group, track, engine))
    targets = []
    for name in sorted(scores, key=lambda name: (pair and name in groups[-1], names.index(name))):
        rows = [{metric: float(np.round(scores[name][metric][t], 5)) for metric in METRICS} for t in range(len(scores[name]["SDR"]))]
        rows = [{metric: value if math.isfinite(value) else math.nan for metric, value in row.items()} for row in rows]
        frames = [{"time": float(second), "duration": 1.0, "metrics": row} for second, row in enumerate(rows)]
        targets.append({"name": name, "frames": frames, "whole_track": whole_track_scores(references[name], estimates[name])})
    return {"targets": targets, "museval_version": "0.4.1", "settings": settings}


def bss_scores(references, estimates, group, track, engine):
    """{name: {metric: scores of each frame}} by our BSS Eval or museval's."""
    rate = track.mixture.rate
    try:
        if engine == "museval":
            import_musdb()
            import museval

            values = museval.evaluate(references.transpose(0, 2, 1), estimates.transpose(0, 2, 1), win=rate, hop=rate)
            scores = dict(zip(("SDR", "ISR", "SIR", "SAR"), values))
        else:
            scores = bss_eval(references, estimates, rate, rate)
    except ValueError:
        silent = [f"{kind} {group[j]}" for kind, x in (("reference", references), ("estimate", estimates)) for j in range(len(group)) if not x[j].any()]
        if not silent:
            raise
        raise UserError(f"{track.name}: {silent[0]} is silent throughout: BSS Eval is undefined, the track is left out") from None
    return {name: {metric: scores[metric][j] for metric in METRICS} for j, name in enumerate(group)}


# ---------------------------------------------------------------------------------------------- estimates


def separate(separator, track, args):
    """The model's estimates of a track: {stem name: (C, N)}."""
    audio = track.mixture
    x = torch.from_numpy(np.ascontiguousarray(audio.read(0, audio.length)))
    x = resample(x, audio.rate, separator.sample_rate)
    estimates = torch.cat([block.float().cpu() for block in separator.stream([x])], dim=-1)
    estimates = resample(estimates, separator.sample_rate, audio.rate)[..., : audio.length]
    return {name: stem.numpy() for name, stem in sum_targets(estimates, separator, args).items()}


def read_estimates(folder, subset, track, names):
    """Stems that another program made, in musdb's layout of estimates."""
    folder, estimates = Path(folder, subset, track.name), {}
    names = names or [path.stem for path in sorted(folder.glob("*.wav")) if path.stem in TARGETS]
    if not names:
        raise UserError(f"{folder}: no stems there (expected {folder}/vocals.wav and so on)")
    for name in names:
        path = folder / f"{name}.wav"
        audio, rate = read_audio(path)
        if (rate, audio.shape[1]) != (track.mixture.rate, track.mixture.length):
            longer = audio.shape[1] - track.mixture.length
            raise UserError(f"{path}: has {rate} Hz and {longer:+d} samples against the track's {track.mixture.rate} Hz; export it again")
        estimates[name] = audio.expand(track.mixture.channels, -1).numpy()
    return estimates


def oracle(method, track, names):
    """What the mixture and the true stems give at best: {name: (C, N)}; "mixture" is the floor.

    As in SiSEC 2018 (sigsep-mus-oracle), with an STFT of 2048 samples, hop 1024:
        ibm: mask 1 where |S| >= |X| / 2    irm: |S| / sum |S|    irm2: |S|^2 / sum |S|^2
        mwf: the model's Wiener filter (one EM iteration), started from the true spectra
    """
    audio = track.mixture
    mixture = audio.read(0, audio.length)
    if method == "mixture":
        return {name: mixture for name in names}
    x = torch.from_numpy(np.ascontiguousarray(mixture))
    true = torch.from_numpy(np.stack([*read_references(track, names).values()]))  # (J, C, N)
    X, S = stft(x, 2048, 1024), stft(true, 2048, 1024)
    if method == "ibm":
        Y = X * (S.abs() >= 0.5 * X.abs().clamp_min(1e-10))
    elif method == "mwf":
        X, S = X[None].to(torch.complex128), S[None].to(torch.complex128)
        Y = expectation_maximization(S, X, 1, X.abs().amax((1, 2, 3), keepdim=True))[0].to(torch.complex64)
    else:
        power = S.abs() ** (2 if method == "irm2" else 1)
        Y = X * power / power.sum(0).clamp_min(1e-10)
    return {name: y.numpy() for name, y in zip(names, istft(Y, audio.length, 2048, 1024))}


# ---------------------------------------------------------------------------------------------- all tracks


def score_path(args, method, track):
    """<evaldir>/<subset>/<track>.json for a model or given estimates, <evaldir>/<method>/... for floor and ceilings."""
    folder = args.evaldir if method in ("model", "estimates") else args.evaldir / method
    return folder / args.subset / f"{track.name}.json"


def load_scores(path):
    """A museval JSON, or None where there is none that can be read (it is made again then)."""
    try:
        scores = load(path)
        return scores if isinstance(scores["targets"], list) else None
    except UserError as error:
        if path.exists():
            print(f"{error} by scoring the track again")
        return None


def evaluate(tracks, args, separator):
    """Score this process's share of the tracks with every method; what is scored already is not done again."""
    names = list(aggregation(separator, args)) if separator else args.targets
    pool = None
    if args.workers > 1:  # each with one thread, whatever the libraries; spawned, so that threads are no concern
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        pool = ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))
    rank, _, world = process_rank()
    pending, failed = {}, []

    def collect(futures):
        for future in futures:
            path = pending.pop(future)
            try:
                save(future.result(), path)
            except UserError as error:
                report(error)
                failed.append(path)

    try:
        for track in tqdm(tracks[rank::world], desc="tracks", unit="track", disable=rank > 0):
            track_names = names or [*read_estimates(args.estimates, args.subset, track, None)] if args.estimates else names or SOURCES
            for method in args.method:
                path, settings = score_path(args, method, track), describe(args, method, track_names)
                known = load_scores(path)
                if known and known.get("settings") == settings:
                    continue
                if method == "model":
                    estimates = separate(separator, track, args)
                    if args.outdir:
                        keep_stems(estimates, Path(args.outdir, args.subset, track.name), track.mixture.rate)
                elif method == "estimates":
                    estimates = read_estimates(args.estimates, args.subset, track, track_names)
                else:
                    estimates = oracle(method, track, track_names)
                job = (track, estimates, args.engine, settings)
                pending[pool.submit(score_track, *job) if pool else in_process(*job)] = path
                while len(pending) > (args.workers if pool else 0):
                    collect(wait(pending, return_when=FIRST_COMPLETED).done)
        while pending:
            collect(wait(pending, return_when=FIRST_COMPLETED).done)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return failed


def in_process(*job):
    """`score_track` at once, as a finished future."""
    future = Future()
    try:
        future.set_result(score_track(*job))
    except UserError as error:
        future.set_exception(error)
    return future


def describe(args, method, names):
    """What a track's scores depend on, kept in its JSON."""
    settings = {"method": method, "names": list(names)}
    if method == "estimates":
        settings["estimates"] = str(args.estimates)
    if method == "model":
        flags = ("model", "niter", "wiener_win_len", "wiener", "softmask", "residual", "aggregate", "amp")
        settings.update({flag: getattr(args, flag) for flag in flags})
        folder = Path(args.model or "open-unmix")
        settings["weights"] = {path.name: path.stat().st_mtime for path in sorted(folder.glob("*.pth"))}
    return settings


def keep_stems(estimates, folder, rate):
    """Write estimates in musdb's layout."""
    import soundfile

    for name, stem in estimates.items():
        with atomic_write(folder / f"{name}.wav") as temporary:
            soundfile.write(temporary, stem.T, rate, subtype="FLOAT", format="WAV")


# ---------------------------------------------------------------------------------------------- tables


def score_table(paths, method):
    """Scores of JSON files as a table with columns method, track, target, metric, time, score."""
    rows = []
    for path in paths:
        for target in (load_scores(path) or {"targets": []})["targets"]:
            for metric, value in target.get("whole_track", {}).items():
                rows.append((method, path.stem, target["name"], metric, 0.0, value))
            for frame in target["frames"]:
                rows += [(method, path.stem, target["name"], metric, frame["time"], frame["metrics"][metric]) for metric in METRICS]
    return pd.DataFrame(rows, columns=["method", "track", "target", "metric", "time", "score"]).astype({"score": float})


def show(table):
    """Print each track's SDR, and for every target and method the medians and means over tracks."""
    if table.empty:
        raise UserError("no scores to show: every track failed")
    tracks = table.groupby(["method", "track", "target", "metric"], sort=False)["score"].median().reset_index()  # NaN frames left out
    targets = [name for name in (*TARGETS, "residual") if name in set(table["target"])]
    methods = list(dict.fromkeys(table["method"]))
    sdr = tracks[tracks["metric"] == "SDR"]
    if sdr["track"].nunique() <= 50:
        print("\nSDR of each track in dB, median over frames: " + " | ".join(methods))
        for track, rows in sdr.groupby("track"):
            values = [[rows[(rows.target == t) & (rows.method == m)]["score"].sum(min_count=1) for m in methods] for t in targets]
            print(f"  {track[:40]:40s}" + "   ".join(f"{t} " + " | ".join(f"{v:6.2f}" for v in row) for t, row in zip(targets, values)))
    print(f"\n{sdr['track'].nunique()} tracks, dB   {'median over frames, then over tracks':^35s}  mean over whole tracks")
    print(f"{'target':14s} {'method':12s}" + "".join(f"{metric:>8s}" for metric in METRICS) + f"{'uSDR':>10s}{'SI-SDR':>8s}")
    for target in targets:
        for method in methods:
            part = tracks[(tracks["target"] == target) & (tracks["method"] == method)].groupby("metric")["score"]
            if len(part):
                values = [part.median().get(metric, math.nan) for metric in METRICS] + [part.mean().get(m, math.nan) for m in ("uSDR", "SI-SDR")]
                print(f"{target:14s} {method[:12]:12s}" + "".join(f"{v:{8 + 2 * (i == 4)}.2f}" for i, v in enumerate(values)))


def compare(table, folder):
    """Box plots of track medians, and a paired significance test of the first method against each other one."""
    from scipy.stats import wilcoxon

    table = table[table["metric"].isin(METRICS)]
    tracks = table.groupby(["method", "track", "target", "metric"], sort=False)["score"].median().reset_index()
    methods = list(dict.fromkeys(table["method"]))
    print(f"\nWilcoxon signed-rank test on the tracks' SDR: {methods[0]} against")
    for target in [name for name in TARGETS if name in set(table["target"])]:
        sdr = tracks[(tracks["metric"] == "SDR") & (tracks["target"] == target)].pivot(index="track", columns="method", values="score")
        for other in [m for m in methods[1:] if m in sdr and methods[0] in sdr]:
            paired = sdr[[methods[0], other]].dropna()
            difference = paired[methods[0]] - paired[other]
            if len(paired) < 6:
                print(f"  {other:16s} {target:14s} {len(paired)} tracks in common: at least 6 are needed")
                continue
            p = wilcoxon(difference).pvalue if difference.any() else 1.0
            print(f"  {other:16s} {target:14s} {difference.median():+6.2f} dB (median), p = {p:.2g}, {len(paired)} tracks")
        picture, axes = figure(1, len(METRICS), (3 * len(METRICS), 1 + 0.4 * len(methods)))
        for axis, metric in zip(axes[0], METRICS):
            part = tracks[(tracks["metric"] == metric) & (tracks["target"] == target)]
            scores = {m: part[part["method"] == m]["score"].dropna() for m in methods}
            order = sorted((m for m in methods if len(scores[m])), key=lambda m: scores[m].median())
            axis.boxplot([scores[m] for m in order], orientation="horizontal", showfliers=False, tick_labels=order)
            axis.set(title=f"{target} {metric}", xlabel="dB")
            axis.grid(axis="x", alpha=0.3)
        save_figure(picture, folder / f"{target}.png")
    print(f"box plots: {folder}/<target>.png")


def main():
    args = parse_args(sys.argv[1:])
    rank, _, world = process_rank()
    root = find_data(args.root, args.dataset, args.is_wav, args.cache)
    splits = ("test",) if args.subset == "test" else ("train", "valid")
    tracks = sorted((track for split in splits for track in index_musdb(root, split)), key=lambda track: track.name)
    separator = separator_from_flags(args) if "model" in args.method else None
    if world > 1:
        torch.distributed.init_process_group("gloo")
    failed = evaluate(tracks, args, separator)
    if world > 1:
        torch.distributed.barrier()  # until every process has written its scores
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    names = {"model": args.evaldir.name, "estimates": args.evaldir.name}
    tables = [score_table([score_path(args, m, t) for t in tracks], names.get(m, m)) for m in args.method]
    for folder in args.compare or []:
        paths = sorted(Path(folder, args.subset).glob("**/*.json"))
        if not paths:
            raise UserError(f"--compare {folder}: no museval JSON there (expected {folder}/{args.subset}/<track>.json)")
        tables.append(score_table(paths, Path(folder).name))
    table = pd.concat(tables, ignore_index=True)
    show(table)
    if args.compare:
        compare(table, args.evaldir)
    if args.csv:
        with atomic_write(args.csv) as temporary:
            table.to_csv(temporary, index=False)
    print(f"\nscores of every frame: {args.evaldir}/. Next: hear it (python test.py SONG.wav), or put others beside it (--compare)")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
