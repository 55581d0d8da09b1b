"""Train Open-Unmix: one network per target, from songs to a model folder.

python train.py                                  a first model in minutes, on data it finds
python train.py --root MUSDB18 --target vocals   the published recipe on all of MUSDB18
python train.py --checkpoint open-unmix          continue after an interruption
torchrun --nproc_per_node=4 train.py --root MUSDB18    the same training on four GPUs
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends at once: nothing is to be cleaned up
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from tqdm import tqdm

from data import AUGMENTATIONS, LAYOUTS, SETS, fetch_set, index_dataset, load_datasets
from data import most_common_rate
from model import ARCHITECTURES, MASKS, arguments_of, bridge, istft, load_separator, magnitude
from model import make_network, output_sample, stft
from utils import LOUDEST, Parser, UserError, atomic_write, check_name, check_output
from utils import code_fingerprint, figure, load, number, only_writer, patched, precise
from utils import process_rank, run, save, save_figure, select_device, use_amp

# ------------------------------------------------------------------------- what one changes: a loss


def mse_loss(network, x, y, args):
    """A scalar from waveforms of mixture x (B, C, N) and target y (B, K * C, N): of magnitudes.

    STFT and loss are in float32, whatever the network is in. `LOSSES` has others.
    """
    X = magnitudes(x, args)  # (B, C, F, T)
    Y = magnitudes(y.unflatten(1, (-1, x.shape[1])), args).flatten(1, 2)  # (B, K * C, F, T)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        Y_hat = network(X)
    Y_hat, Y = Y_hat.float().movedim(-1, 0), Y.movedim(-1, 0)  # (T, B, ...), as in memory: faster
    return F.mse_loss(Y_hat, Y)


# ---------------------------------------------------------------------------------------- one epoch


def train(network, state, loader, args, device, name):
    """One pass over the training examples; returns the mean loss."""
    network.train()
    losses = []
    for x, y in tqdm(loader, name, unit="batch", leave=False, disable=args.quiet):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        loss = LOSSES[args.loss](network, x, y, args)
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        losses.append(loss.detach())
        if args.dry_run:
            break
        if len(losses) % 10 == 0:  # to look at a loss is to wait for the GPU
            check_finite(losses, name, args)
    check_finite(losses, name, args)
    losses = torch.stack(losses).to(precise(device)).double()
    return average(losses.mean())


@torch.no_grad()
def validate(network, dataset, args, device):
    """The loss and METRICS, means over whole tracks, which processes share: {"valid_loss": ...}."""
    network.eval()
    metrics = {"loss": None} | METRICS | {"loss": LOSSES[args.loss]}
    rank, _, world = process_rank()
    for buffer in network.buffers() if world > 1 else ():  # batch norms' statistics
        dist.broadcast(buffer, 0)
    sums = {name: [0.0, 0] for name in metrics}  # of the values, and how many
    for index in range(rank, 1 if args.dry_run else len(dataset), world):
        x, y = (waveform[None].to(device) for waveform in dataset[index])
        shared = []
        for name, metric in metrics.items():
            once = metric in (metrics["loss"], compute_sdr)  # which run the network on the same x
            forward = computed_once(network, shared) if once else network.forward
            with patched(network, "forward", forward):
                value = float(metric(network, x, y, args))
                if name == "loss" or not math.isnan(value):  # no SDR where the target is silent
                    sums[name] = [sums[name][0] + value, sums[name][1] + 1]
    means = average(torch.tensor([*sums.values()], device=device))
    return {f"valid_{name}": s / n if n else math.nan for name, (s, n) in zip(metrics, means)}


# ------------------------------------------------------------- what one changes: optimizer, presets


def make_state(network, args):
    """All that training changes: saving and exact resuming loop over this dict.

    Its values have `state_dict` and `load_state_dict`: a second optimizer or an average of the
    weights is one more entry.
    """
    adam = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.Adam(network.parameters(), **adam)
    plateau = {"factor": args.lr_decay_gamma, "patience": args.lr_decay_patience, "cooldown": 10}
    if args.schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, T_max=args.epochs)
    else:  # no relative threshold: with a negative loss it would never be passed
        scheduler = ReduceLROnPlateau(optimizer, threshold=0, **plateau)
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    return {"network": network, **parts, "stopping": EarlyStopping(args.patience)}


def kept_network(state):
    """The network that is validated and, after the best epoch, saved for separation."""
    return state["network"]


PRESETS = {  # the flags that a preset changes; those given by hand win
    "umx": "",  # the published recipe
    "best": "loss=log_mse mask_start=0.25 schedule=cosine dropout=0.1",  # what helped, see README
    "tutorial": "loss=l1 epochs=26 batch_size=4 seq_dur=3.0 samples_per_epoch=384 hidden_size=256"
    " mask_start=0.25 lr=0.002 lr_decay_patience=3",
}

# ---------------------------------------------------------------------------------------- main


def main(arguments=None):
    """Train each target that the flags name, one after the other; returns the model folder."""
    flags, given = parse_args(arguments)
    if flags.download:
        return fetch(flags)
    trainings = choose_trainings(flags, given)
    args = trainings[0][1] if trainings else flags
    device = set_up(args)
    networks = [first_network(*training) for training in trainings]
    for target, args, checkpoint in trainings:
        args.amp = use_amp(args.amp, device)
        tracks = index_tracks(args)
        network = networks.pop(0) or new_network(args)
        sources = sources_of(target, network)
        train_set, valid_set, mixtures = make_datasets(tracks, sources, args)
        check_examples(target, train_set, valid_set, args)
        if not (checkpoint or args.model):
            network = new_network(args, **input_statistics(mixtures, args, device))
        record = checkpoint["record"] if checkpoint else new_record(target, network)
        rehearse(network, valid_set, record, args)
        if not flags.checkpoint and args is trainings[0][1]:
            for folder in (Path(flags.output), *sorted(Path(flags.output).glob("seed-*"))):
                prepare_folder(folder, sources, args)
        with only_training(target, args), tf32(device):
            state = make_state(network.to(device), args)
            if checkpoint:
                restore(state, checkpoint, args, given)
            else:
                try_nothing(network, valid_set, record, args, device)
                save_training(state, record, args)
            loader = make_loader(train_set, args, device)
            parallel = over_processes(network, device)
            while record["epochs_trained"] < args.epochs and not state["stopping"].stop:
                start, epoch = time.time(), record["epochs_trained"] + 1
                name = f"{target} epoch {epoch}"
                begin_epoch(epoch, loader, args)
                metrics = {"train_loss": train(parallel, state, loader, args, device, name)}
                metrics.update(validate(kept_network(state), valid_set, args, device))
                metrics["lr"] = state["optimizer"].param_groups[0]["lr"]
                check_finite([torch.tensor(metrics["valid_loss"])], f"{name}, validation", args)
                scheduler = state.get("scheduler")
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                if scheduler:
                    scheduler.step(*[to_minimize(metrics, args)] * plateau)
                state["stopping"].step(to_minimize(metrics, args), epoch)
                metrics["train_time"] = time.time() - start
                note_epoch(state, record, metrics, args)
                save_training(state, record, args)
                if args.dry_run:
                    break
    if flags.checkpoint or len(args.seeds) > 1:
        keep_best(Path(flags.output), args)
    finish(flags, args)
    return Path(flags.output)


def index_tracks(args):
    """The tracks of the data, {"train": [Track], "valid": [Track]}; settles args.sample_rate."""
    rank, _, world = process_rank()
    for turn in range(world):  # what the first process fetches or decodes, the next ones find
        if turn == rank:
            tracks = index_dataset(args.dataset, args.root, ("train", "valid"), **vars(args))
        if world > 1:
            dist.barrier()
    args.sample_rate = most_common_rate(tracks["train"] + tracks["valid"], args.sample_rate)
    sizes = f"{len(tracks['train'])} training tracks, {len(tracks['valid'])} validation tracks"
    say(args, f"{sizes}, {args.sample_rate} Hz")
    return tracks


def make_datasets(tracks, sources, args):
    """Any map-style datasets of (mixture (C, N), target (K * C, N)) waveforms will do.

    Returns:
        those for training and for validation, and one whose mixtures give the input statistics.
    """
    layout = LAYOUTS[args.dataset]
    mixes = [mix for name, mix in layout.mix_flags.items() if getattr(args, name)]
    names = ["sample_rate", "nb_channels", "seq_dur", "seed", "source_augmentations"]
    names += ["samples_per_track", "samples_per_epoch"]
    settings = {name: getattr(args, name) for name in names}
    return load_datasets(tracks, args.dataset, sources, mix=(*mixes, layout.mix)[0], **settings)


def new_network(args, mean=None, scale=None):
    """A network as the flags describe it, initialised from --seed."""
    torch.manual_seed(args.seed)
    frequencies = np.linspace(0, args.sample_rate / 2, args.nfft // 2 + 1)
    options = dict(args.arch_options)
    if args.dropout is not None:
        options["dropout"] = args.dropout
    return make_network(
        args.arch,
        nb_bins=args.nfft // 2 + 1,
        nb_channels=args.nb_channels,
        hidden_size=args.hidden_size,
        unidirectional=args.unidirectional,
        max_bin=int((frequencies <= args.bandwidth).sum()),
        mask=args.mask,
        mask_start=args.mask_start,
        input_mean=mean,
        input_scale=scale,
        **options,
    )


def first_network(target, args, checkpoint=None):
    """The network of a checkpoint, or of --model with the flags set to its settings, or None."""
    if checkpoint:
        return make_network(**checkpoint["record"]["network"])
    if not args.model:
        return None
    if args.model.endswith(".onnx"):
        raise UserError(f"--model {args.model}: ONNX can't be trained; name the folder it is from")
    bridged = args.arch == "xumx"  # from networks that were trained one by one
    separator = load_separator(args.model, None if bridged else [target])
    networks = separator.target_models
    if not bridged and target not in networks:
        is_one = f"{target} is one of several sources of its network {', '.join(networks)}"
        raise UserError(f"--model {args.model}: {is_one}; train it as --target all")
    network = bridge(networks) if bridged else networks[target]
    theirs = {"nfft": separator.n_fft, "nhop": separator.n_hop}
    theirs |= {"mask_start": None, **network.made_with}  # where it began is no preset's to say
    theirs |= {"sample_rate": separator.sample_rate, "nb_channels": separator.nb_channels}
    vars(args).update({name: theirs[name] for name in theirs.keys() & vars(args).keys()})
    return network


def sources_of(target, network):
    """The K sources that a network estimates: what it names in `.sources`, or its target.

    Raises UserError for a network of several sources that is not trained as "all" of them, and for
    one that has nothing to train.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"--target {target}: the network has no parameters to train")
    sources = getattr(network, "sources", None)
    if bool(sources) != (target == "all"):
        has = f"estimates {', '.join(sources)}: train it as" if sources else "names no .sources for"
        raise UserError(f"--target {target}: the network {has} --target all")
    return list(sources or [target])


# ------------------------------------------------------------- what is said before the first epoch


def compute_sdr(network, x, y, args):
    """SDR in dB of the estimates with the mixture's phase; mean over sources, NaN for a silent one.

    From: Mitsufuji et al., Music Demixing Challenge 2021, equation 1.
    """
    X = stft(x, args.nfft, args.nhop)  # (B, C, F, T)
    V = network(magnitude(X, args.nb_channels)).float()
    V = V.unflatten(1, (-1, args.nb_channels))  # (B, K, C, F, T)
    y_hat = istft(V * X.sgn()[:, None], x.shape[-1], args.nfft, args.nhop)  # (B, K, C, N)
    y = y.unflatten(1, (-1, x.shape[1]))
    energy, error = (z.square().sum((0, 2, 3)) for z in (y, y - y_hat))  # (K,)
    sdr = 10 * torch.log10(energy / error.clamp_min(1e-12))
    return sdr.where(energy > 0, torch.nan).nanmean()


METRICS = {"SDR": compute_sdr}  # numbers of each validation track: {name: function as mse_loss}


def try_nothing(network, dataset, record, args, device):
    """Put on record, and say, what validation gives for the mixture as the estimate, and silence.

    Raises UserError where the mixture is the target, or --select asks for what is not defined.
    """

    x, y = (waveform.to(device) for waveform in dataset[0])
    sources, seen = len(y) // len(x), []

    def result(factor):
        def estimate(X):
            seen.append(X)
            return factor * X.repeat(1, sources, 1, 1)

        with patched(network, "forward", estimate):
            return validate(network, dataset, args, device)

    try:
        nothing = result(1)
    except UserError:
        raise
    except Exception:  # training will show what is wrong, if anything is
        seen.clear()
    if not seen:  # the loss looks into the network: what it gives is not that of doing nothing
        return
    silence = result(0)
    target, sdr, X = record["target"], nothing.get("valid_SDR", math.nan), magnitudes(x[None], args)
    if process_rank()[0] == 0 and not (X.shape == seen[0].shape and torch.allclose(X, seen[0])):
        print(f"{target}: the loss gives the network no magnitudes of x: separation will, as ever")
    if sdr > 100:
        raise UserError(f"{target}: its input and target are identical; check the files")
    to_minimize(nothing, args)
    record["nothing"] = nothing
    mixture, silence = (f"loss {numbers['valid_loss']:.4g}" for numbers in (nothing, silence))
    sdr, zero = ("", "") if math.isnan(sdr) else (f", SDR {sdr:.2f} dB", ", SDR 0 dB")
    mixture, silence = f"{mixture}{sdr} (the mixture as estimate)", f"{silence}{zero} (silence)"
    say(args, f"{target}: to beat: {mixture} and {silence}")


def check_examples(target, train_set, valid_set, args):
    """Raises UserError where a first example is not (mixture (C, N), target (K * C, N))."""
    for what, dataset in (("training", train_set), ("validation", valid_set)):
        waveforms = dataset[0]
        wrong = [] if len(waveforms) == 2 else ["is no pair of mixture and target"]
        for name, z in zip(("mixture", "target"), waveforms):
            plain = torch.is_tensor(z) and z.dtype == torch.float32 and z.ndim == 2
            if not plain:
                found = [getattr(z, what, "") for what in ("dtype", "shape")]
                wrong.append(f"has a {name} that is no float32 tensor (C, N) but {type(z)} {found}")
            elif not z.abs().max() <= LOUDEST:
                wrong.append(f"has a {name} with samples of {z.abs().max():.4g}: 1 is full scale")
        if not wrong:
            x, y = waveforms
            if args.nb_channels not in (1, len(x)) or len(y) % len(x):
                counts = f"{len(x)} channels of mixture and {len(y)} of target"
                wrong.append(f"has {counts}; --nb-channels is {args.nb_channels}")
            if x.shape[1] != y.shape[1]:
                wrong.append(f"has {x.shape[1]} samples of mixture and {y.shape[1]} of target")
        if wrong:
            raise UserError(f"{target}: the first {what} example {wrong[0]}")


def rehearse(network, dataset, record, args):
    """Save, load and run the network on two seconds: what could not be separated with fails now.

    Raises UserError where the network's output has not the target's shape, and where the network
    that is loaded gives other numbers.
    """
    x, y = dataset[0]
    noise = torch.rand(1, 1, 2 * args.sample_rate + args.nfft)
    X = magnitudes(noise.expand(-1, len(x), -1), args)
    sources = len(y) // len(x)
    network.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_model(network, record, args, Path(folder))
        separator = load_separator(folder)
        expected, again = network(X.clone()), network(X.clone())
        loaded = separator.networks[0](X.clone())
        if expected.shape != (1, sources * X.shape[1], *X.shape[2:]):
            shapes = f"{tuple(expected.shape)} from {tuple(X.shape)} for {sources} sources"
            raise UserError(f"--arch {args.arch}: gives {shapes}, not (B, K * C, F, T)")
        if not torch.allclose(expected, again, rtol=1e-4, atol=1e-6):
            remedy = "what it keeps of one recording would get into the next"
            raise UserError(f"--arch {args.arch}: called again it gives other numbers; {remedy}")
        if not torch.allclose(expected, loaded, rtol=1e-4, atol=1e-6):
            remedy = "whatever decides its output must be a parameter, a buffer or an argument"
            raise UserError(f"--arch {args.arch}: loaded again it gives other numbers; {remedy}")
        list(separator.stream([noise[0]]))
        seen = []
        separator.networks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        separator(noise.expand(-1, len(x), -1))
        if seen[0].shape != X.shape or not torch.allclose(seen[0], X, rtol=1e-3, atol=1e-4):
            heard = "separation gives the network other magnitudes than training does"
            print(f"{record['target']}: {heard}")


# ------------------------------------------------------------------------------------------- flags


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="musdb", choices=list(LAYOUTS), help="layout of the data, see data.py")
    add("--root", help="folder of the data (default: MUSDB18's sample, or synthesized songs)")
    text = "fetch this data set to --root, or the rest of it, and end"
    add("--download", choices=list(SETS), help=text)
    add("--is-wav", action="store_true", help="--root is MUSDB18-HQ, even if it holds stems too")
    add("--cache", help="folder for WAV files decoded from stems (default: <root>-wav)")
    add("--target", nargs="+", default=["vocals"], help="sources to train, a network each")
    add("--target-file", default="vocals.wav", help="trackfolder_*: the target in each folder")
    files = ["drums.wav", "bass.wav", "other.wav"]
    add("--interferer-files", nargs="+", default=files, help="trackfolder_fix: the others")
    text = "trackfolder_fix: take each interferer from a random track"
    add("--random-track-mix", action="store_true", help=text)
    text = "trackfolder_var: take all interferers from one random track"
    add("--random-interferer-mix", action="store_true", help=text)
    text = "trackfolder_var: where the target's file lacks, it is silent"
    add("--silence-missing", action="store_true", help=text)
    add("--target-dir", default="vocals", help="sourcefolder: the target's folder")
    folders = ["drums", "bass", "other"]
    add("--interferer-dirs", nargs="+", default=folders, help="sourcefolder: the others")
    add("--ext", default=".wav", help="sourcefolder, trackfolder_var: which files to use")
    add("--input-file", default="mixture.wav", help="aligned: the network's input")
    add("--output-file", default="vocals.wav", help="aligned: what it should make of it")
    add("--seq-dur", type=number(float, 0.1), default=6.0, help="seconds of a training example")
    text = "training examples per track and epoch"
    add("--samples-per-track", type=number(int, 1), default=64, help=text)
    text = "training examples per epoch, however many tracks there are"
    add("--samples-per-epoch", type=number(int, 1), help=text)
    changes = {"nargs": "*", "default": ["gain", "channelswap"], "choices": list(AUGMENTATIONS)}
    add("--source-augmentations", **changes, help="what changes each source before mixing")
    add("--nb-workers", type=number(int, 0), help="loading processes (default: CPU 0, GPU up to 8)")

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="blstm", choices=list(ARCHITECTURES), help="the network, see model.py")
    text = "arguments of the network's own, such as nb_heads=8"
    add("--arch-options", nargs="+", type=option, default=[], metavar="NAME=VALUE", help=text)
    text = "the paper's mask, or relu, that of the published weights"
    add("--mask", default="sigmoid", choices=list(MASKS), help=text)
    text = "the masks before training (default: as published, 0.73, and with --mask relu 1)"
    add("--mask-start", type=number(float, 0.001, 0.999), help=text)
    text = "between the layers of the LSTM, in training (default: the network's own, 0.4)"
    add("--dropout", type=number(float, 0, 0.999), help=text)
    add("--hidden-size", type=number(int, 2), default=512, help="width of the network")
    add("--unidirectional", action="store_true", help="look at the past only (real time)")
    add("--nfft", type=number(int, 16), default=4096, help="STFT size in samples")
    add("--nhop", type=number(int, 1), default=1024, help="STFT hop in samples")
    add(
        "--sample-rate",
        type=number(int, 1000, 1_000_000),
        help="in Hz (default: that of most files)",
    )
    text = "the network sees frequencies up to this, in Hz"
    add("--bandwidth", type=number(int, 1), default=16000, help=text)
    text = "1: a mono model, which sees the mean of both channels' magnitudes"
    add("--nb-channels", type=number(int, 1, 2), default=2, help=text)
    text = "fine-tune umx, umxhq, umxl, umxse or a model folder; sets the flags above to its own"
    add("--model", help=text)

    add = parser.add_argument_group("training").add_argument
    text = "umx: the published recipe; best: with what helped in our experiments; "
    text += "tutorial: minutes (default without --root)"
    add("--preset", choices=list(PRESETS), help=text)
    text = "of magnitudes: mse, l1, log_mse; xumx: also of waveforms, and of all sums of sources"
    add("--loss", choices=list(LOSSES), default="mse", help=text)
    add("--epochs", type=number(int, 1), default=1000, help="passes over the tracks, in all")
    add("--batch-size", type=number(int, 1), default=16, help="examples, of all processes together")
    add("--lr", type=number(float, 1e-12), default=0.001, help="learning rate of Adam")
    add("--weight-decay", type=number(float, 0), default=1e-5, help="of Adam")
    text = "of the rate: plateau, by the next flags; cosine, to zero at --epochs"
    add("--schedule", choices=["plateau", "cosine"], default="plateau", help=text)
    text = "stop after so many epochs without a lower validation loss; 0: never"
    add("--patience", type=number(int, 0), default=140, help=text)
    text = "lower the rate after so many such epochs"
    add("--lr-decay-patience", type=number(int, 0), default=80, help=text)
    add("--lr-decay-gamma", type=number(float, 1e-6, 0.999999), default=0.3, help="by this factor")
    text = "of weights, examples and dropout; of several, each is trained and the best kept"
    add("--seed", type=number(int, 0), nargs="+", default=[42], help=text)
    text = "what makes an epoch the best one: validation loss, or SDR"
    add("--select", choices=["loss", "sdr"], default="loss", help=text)
    add("--amp", action=argparse.BooleanOptionalAction, default=False, help="network in bfloat16")
    add("--device", help="cpu, cuda, cuda:1, mps (untested); default: a GPU where there is one")

    add = parser.add_argument_group("output").add_argument
    text = "model folder to write; an earlier training there is moved to its previous/"
    add("--output", default="open-unmix", help=text)
    add("--overwrite", action="store_true", help="replace an earlier training instead")
    text = "model folder whose unfinished trainings to continue, each with its flags"
    add("--checkpoint", metavar="FOLDER", help=text)
    add("--quiet", action="store_true", help="print warnings and the last line only")
    add("--tensorboard", action="store_true", help="write <output>/<target>.tensorboard, too")
    add("--dry-run", action="store_true", help="one batch, one validation track, one save")
    return parser


NOT_SAVED = {"checkpoint", "output", "overwrite", "quiet"}  # of one run, not a training
SETTINGS = {  # flags that are arguments of the network
    "hidden_size": "hidden_size",
    "unidirectional": "unidirectional",
    "bandwidth": "max_bin",
    "mask": "mask",
    "mask_start": "mask_start",
    "dropout": "dropout",
}
# What weights are made for; the rest of a training may change while it lasts.
MODEL_FLAGS = "arch arch_options mask mask_start dropout hidden_size unidirectional"
MODEL_FLAGS = {*MODEL_FLAGS.split(), "nfft", "nhop", "bandwidth", "nb_channels", "sample_rate"}


def option(text):
    """An argparse type: NAME=VALUE, where VALUE is JSON or else a string -> (name, value)."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_args(arguments=None):
    """The flags, and the names of those given by hand: they win over a preset's or a record's."""
    arguments = sys.argv[1:] if arguments is None else list(map(str, arguments))
    parser = make_parser()
    args, given = parser.parse_args(arguments), parser.given(arguments)
    if args.checkpoint:
        fixed = {"output", "overwrite", "preset", "model", "target", "dry_run", "seed", "select"}
        fixed |= {"download", "loss", "schedule", *MODEL_FLAGS}
        refuse(given, fixed, "--checkpoint goes on as the training began")
        args.output = args.checkpoint
    else:
        tutorial = args.root is None and not LAYOUTS[args.dataset].target_flag
        preset = args.preset or ("tutorial" if tutorial else "umx")
        changed = dict(option(word) for word in PRESETS[preset].split())
        if "samples_per_track" in given:
            reason = "counts an epoch's examples, as --samples-per-track"
            refuse(given, {"samples_per_epoch"}, reason)
            changed.pop("samples_per_epoch", None)
        parser.set_defaults(preset=preset, **changed)
        args = parser.parse_args(arguments)
        check_flags(args, given)
    args.quiet |= process_rank()[0] > 0  # only the first process prints
    args.seeds = list(dict.fromkeys(args.seed))
    args.seed = args.seeds[0]
    return args, given


def check_flags(args, given):
    """Refuse flags that do not go together, and settle the targets' names."""
    layout = LAYOUTS[args.dataset]
    refuse(given, unused_flags(args.dataset), f"is not used with --dataset {args.dataset}")
    if args.download:
        refuse(given, given - {"download", "root", "quiet"}, "is not used with --download")
        if not args.root:
            raise UserError(f"--download {args.download}: needs --root, the folder to fetch it to")
    if args.model:
        bridged = {"arch"} if args.arch == "xumx" else set()
        refuse(given - bridged, MODEL_FLAGS, f"the model {args.model} has its own")
    taken = arguments_of(ARCHITECTURES[args.arch])
    given_here = {*SETTINGS.values(), "nb_bins", "nb_channels", "input_mean", "input_scale"}
    for name in given_here & dict(args.arch_options).keys():
        raise UserError(f"--arch-options {name}: follows from the other flags; leave it out")
    for name, argument in (*SETTINGS.items(), *((name, name) for name, _ in args.arch_options)):
        if argument not in taken and name in given | dict(args.arch_options).keys():
            raise UserError(f"{flag(name)}: --arch {args.arch} takes no such option; leave it out")
    if args.schedule != "plateau":
        unused = {"lr_decay_patience", "lr_decay_gamma"}
        refuse(given, unused, f"is not used with --schedule {args.schedule}")
    if args.nhop > args.nfft // 2:
        raise UserError(f"--nhop {args.nhop}: must be at most half of --nfft {args.nfft}")
    if args.hidden_size % 8:
        raise UserError(f"--hidden-size {args.hidden_size}: must be a multiple of 8")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: needs the package tensorboard (pip install tensorboard)")
    if layout.target_flag:
        args.target = [Path(getattr(args, layout.target_flag)).stem]
    args.target = [check_name(name, "--target") for name in dict.fromkeys(args.target)]


def unused_flags(dataset):
    """The flags of other layouts than this."""
    layout = LAYOUTS[dataset]
    used = {*layout.all_flags} | (set() if layout.target_flag else {"target"})
    return {"target"}.union(*(row.all_flags for row in LAYOUTS.values())) - used


def flag(name):
    return f"--{name.replace('_', '-')}"


def refuse(given, flags, reason):
    for name in sorted(given & set(flags)):
        raise UserError(f"{flag(name)}: {reason}; leave it out")


def choose_trainings(flags, given):
    """What is to be trained, in turn: (target, its flags, its checkpoint or None).

    With --checkpoint every unfinished training goes on with the flags that it began with, and those
    that the same command would have begun are begun.
    """
    folder = Path(flags.output)
    if not flags.checkpoint:
        pairs = itertools.product(flags.seeds, flags.target)
        return [(target, with_seed(flags, seed, folder), None) for seed, target in pairs]
    paths = [*folder.glob("*.chkpnt"), *folder.glob("seed-*/*.chkpnt")]
    checkpoints = {(path.parent, path.stem): load(path) for path in sorted(paths)}
    if not checkpoints:
        raise UserError(f"--checkpoint {folder}: holds no training (expected vocals.chkpnt there)")
    trainings = {}
    for (place, target), checkpoint in checkpoints.items():
        try:
            record = checkpoint["record"]
            saved, epochs, stopped = record["args"], record["epochs_trained"], record["stopped"]
            whole = epochs >= 0 and checkpoint["state"].keys()
            whole = whole and all((saved["target"], saved["dataset"], record["network"]["arch"]))
        except (AttributeError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{place / target}.chkpnt: is no checkpoint of train.py; train anew")
        changed = {name: getattr(flags, name) for name in NOT_SAVED | given}
        dataset = changed.get("dataset", saved["dataset"])
        for name, value, known in (
            ("loss", saved.get("loss", "mse"), LOSSES),
            ("dataset", dataset, LAYOUTS),
        ):
            if value not in known:
                which = f"{name} {value!r} is not known (there are {', '.join(known)}); add it"
                raise UserError(f"{place / target}.chkpnt: its {which}")
        if saved.get("dry_run"):
            raise UserError(f"{place / target}.chkpnt: is of a dry run; train anew")
        refuse(given, unused_flags(dataset), f"is not used with --dataset {dataset}")
        if "samples_per_track" in given:
            changed["samples_per_epoch"] = None
        args = argparse.Namespace(**{**vars(flags), **saved, **changed})
        args.seeds = [args.seed] if place == folder else args.seeds
        if epochs < args.epochs and not (stopped and args.patience == saved["patience"]):
            trainings[place, target] = (target, with_seed(args, args.seed, folder), checkpoint)
        for seed, other in itertools.product(args.seeds, saved["target"]):
            theirs = with_seed(args, seed, folder)
            if (Path(theirs.output), other) in checkpoints:
                continue
            if theirs.model and Path(theirs.model).resolve() == folder.resolve():
                moved = f"was to start from {folder}, and its weights there are in previous/ now"
                print(f"{other}: {moved}; train it with --model and another --output")
            else:
                trainings.setdefault((Path(theirs.output), other), (other, theirs, None))
    if not trainings:
        say(flags, f"{folder}: all its trainings are finished; --epochs or --patience extends them")
    return list(trainings.values())


def with_seed(args, seed, folder):
    """The flags of one training; one of several seeds has a folder of its own, `folder`/seed-1."""
    output = folder / f"seed-{seed}" if len(args.seeds) > 1 else folder
    return argparse.Namespace(**{**vars(args), "seed": seed, "output": str(output)})


def keep_best(folder, args):
    """Copy the best of each target's trainings, one per seed, to the model folder itself."""
    targets = {path.stem for path in folder.glob("seed-*/*.json")} - {"separator"}
    targets -= {path.stem for path in folder.glob("*.chkpnt")}  # trained there, with one seed
    for target in sorted(targets) if process_rank()[0] == 0 else ():
        scores = {path: load(path)["best_score"] for path in folder.glob(f"seed-*/{target}.json")}
        best = min(scores, key=scores.get)
        for path in (best.with_name("separator.json"), *sorted(best.parent.glob(f"{target}.*"))):
            if path.suffix in (".json", ".pth", ".png"):
                with atomic_write(folder / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        record = load(best)
        result = f"loss {record['best_loss']:.4g} in epoch {record['best_epoch']}"
        say(args, f"{target}: of {len(scores)} trainings {best.parent.name} is the best: {result}")


# ------------------------------------------------------------------------------ data to the network


def magnitudes(waveforms, args):
    """Waveforms (B, ..., C, N) -> what the network sees or is to give, (B, ..., C, F, T)."""
    if waveforms.device.type == "cpu":
        return magnitudes_by_example(waveforms, args)
    return magnitude(stft(waveforms, args.nfft, args.nhop), args.nb_channels)


def magnitudes_by_example(waveforms, args):
    """`magnitudes`, for a CPU: a tenth of a training step faster.

    The spectrum of one example stays in the cache, and in memory a frame's examples lie together,
    as the layers take them.
    """
    parts = []
    for waveform in waveforms:
        X = stft(waveform, args.nfft, args.nhop)
        parts.append(magnitude(X, args.nb_channels).movedim(-1, 0))  # (T, ..., C, F)
    return torch.stack(parts, dim=1).movedim(0, -1)  # (B, ..., C, F, T)


class EpochBatches(torch.utils.data.Sampler):
    """The batches of an epoch, lists of indices: a function of (seed, epoch), shared by processes.

    An epoch draws each example once and leaves out what does not fill a batch. A dataset that is
    `endless` has new examples in every epoch: epoch e those from e * size on.
    """

    def __init__(self, dataset, batch_size, seed):
        self.size, self.endless = len(dataset), getattr(dataset, "endless", False)
        self.batch_size, self.seed, self.epoch = min(batch_size, self.size), seed, 0
        self.rank, _, self.world = process_rank()
        if self.batch_size % self.world:
            problem = f"is no multiple of the number of processes, {self.world}"
            raise UserError(f"--batch-size {self.batch_size}: {problem}")

    def __len__(self):
        return self.size // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        order += self.epoch * self.size if self.endless else 0
        for batch in order[: len(self) * self.batch_size].reshape(len(self), -1):
            yield batch[self.rank :: self.world].tolist()


def make_loader(dataset, args, device):
    """The DataLoader of the training examples."""
    gpu, workers = device.type == "cuda", args.nb_workers
    if workers is None:
        workers = min(8, os.cpu_count() // torch.cuda.device_count()) if gpu else 0
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=EpochBatches(dataset, args.batch_size, args.seed),
        num_workers=workers,
        pin_memory=gpu,
        persistent_workers=workers > 0 and getattr(dataset, "endless", False),
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # its draws must not depend on when the workers were started
    )


def begin_epoch(epoch, loader, args):
    """Make the epoch's examples and dropout functions of the epoch alone."""
    loader.batch_sampler.epoch = epoch - 1
    rank, _, world = process_rank()
    seed = args.seed + epoch * world + rank
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    if loader.generator is not None:  # from which workers have their seeds
        loader.generator.manual_seed(seed)


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def input_statistics(dataset, args, device):
    """Mean and deviation per bin of the mixtures' magnitudes: {"mean": F numbers, "scale": ...}."""
    rank, _, world = process_rank()
    sums = torch.zeros(3, args.nfft // 2 + 1, dtype=torch.float64)  # frames, magnitudes, squares
    tracks = range(rank, 1 if args.dry_run else len(dataset), world)
    for index in tqdm(tracks, "input statistics", unit="track", leave=False, disable=args.quiet):
        x = magnitudes(dataset[index][0][None].to(device), args)[0].mean(0).cpu().double()  # (F, T)
        sums += torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    frames, total, squares = sums.cpu()
    mean = total / frames
    scale = (squares / frames - mean**2).clamp_min(0).sqrt()
    scale = scale.clamp_min(max(1e-4 * scale.max().item(), 1e-12))  # a bin that is always silent
    return {"mean": mean.tolist(), "scale": scale.tolist()}


# ------------------------------------------------------------------------------------- other losses


def by_source(network, x, y, args):
    """Magnitudes of mixture x, (B, C, F, T), the network's (B, K, C, F, T), y as (B, K, C, N)."""
    X = magnitudes(x, args)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        V = network(X)  # (B, K * C, F, T)
    return X, V.float().unflatten(1, (-1, args.nb_channels)), y.unflatten(1, (-1, x.shape[1]))


def l1_loss(network, x, y, args):
    """`mse_loss` with absolute differences: what is loud counts for less."""
    _, V, y = by_source(network, x, y, args)
    return F.l1_loss(V.movedim(-1, 0), magnitudes(y, args).movedim(-1, 0))


def log_mse_loss(network, x, y, args, floor=0.1):
    """The mean of log(MSE / the mixture's mean square + `floor`), in dB, over examples and sources.

    Each source of each excerpt counts alike, however loud; errors far below `floor` hardly count,
    so that silent targets don't prevail. After Heitkaemper et al., "Demystifying TasNet", ICASSP
    2020 (the logarithm), and Wisdom et al., "What's all the fuss about free universal sound
    separation data?", ICASSP 2021 (its floor); they have waveforms where this has magnitudes.
    """
    X, V, y = by_source(network, x, y, args)
    errors = V.movedim(-1, 0) - magnitudes(y, args).movedim(-1, 0)  # (T, B, K, C, F)
    mse, energy = errors.square().mean((0, 3, 4)), X.square().mean((1, 2, 3))  # (B, K), (B,)
    return 10 * torch.log10(mse / energy[:, None].clamp_min(1e-12) + floor).mean()


def xumx_loss(network, x, y, args):
    """X-UMX's loss of all sums of some, not all, of the K sources: of magnitudes and of waveforms.

    MSE + 10 (1 - weighted SDR), as in the authors' code: the magnitudes of a sum are the sum of its
    sources' magnitudes, its estimate has the mixture's phase.
    From: Sawata et al., "All for one and one for all", ICASSP 2021.
    """
    _, V, y = by_source(network, x, y, args)
    size = 1 if x.device.type == "cpu" else len(x)  # one example stays in a CPU's cache
    parts = zip(V.split(size), x.split(size), y.split(size))
    return torch.stack([loss_of_sums(*part, args) for part in parts]).mean()


def loss_of_sums(V, x, y, args):
    """`xumx_loss` of magnitudes V (B, K, C, F, T) for waveforms x (B, C, N) of y (B, K, C, N).

    Sums of sources are linear, so that products of pairs are enough: one inverse STFT per source
    rather than one per sum.
    """
    sums = proper_subsets(y.shape[1]).to(x.device)  # (S, K)
    errors = V - magnitude(stft(y, args.nfft, args.nhop), args.nb_channels)
    errors = errors.permute(1, 4, 0, 2, 3).flatten(1)  # (K, T * B * C * F)
    mse = pair_sums(sums, errors @ errors.mT).mean() / errors.shape[1]
    phases = stft(x, args.nfft, args.nhop).sgn()  # (B, C, F, T)
    y_hat = istft(V * phases[:, None], x.shape[-1], args.nfft, args.nhop)  # (B, K, C, N)
    return mse + 10 * (1 - weighted_sdr(y_hat, y, x, sums))


def weighted_sdr(y_hat, y, x, sums, eps=1e-10):
    """Mean over examples, channels and sums: cosines of sum and remainder, weighted by energies.

    Args:
        y_hat, y: (B, K, C, N) waveforms of sources. x: (B, C, N), their mixture.
        sums: (S, K) of ones, the sources in each sum, and zeros.
    Returns:
        -1 to 1, which is a perfect estimate. From: Choi et al., "Phase-aware speech enhancement
        with deep complex U-Net", ICLR 2019.
    """
    # the mixture less all sources stands beside them, so that sum and remainder make up the mixture
    y_hat = torch.cat([y_hat, x[:, None] - y_hat.sum(1, keepdim=True)], 1).movedim(1, 2)
    y = torch.cat([y, x[:, None] - y.sum(1, keepdim=True)], 1).movedim(1, 2)  # (B, C, K + 1, N)
    pairs = y_hat @ y.mT, y_hat @ y_hat.mT, y @ y.mT  # (B, C, K + 1, K + 1)
    sums = F.pad(sums, (0, 1))  # (S, K + 1)
    score, total = 0, eps
    for parts in (sums, 1 - sums):
        product, energy_hat, energy = (pair_sums(parts, pair) for pair in pairs)  # (B, C, S)
        norms = [(eps + value.clamp_min(0)).sqrt() for value in (energy_hat, energy)]
        score = score + energy * product / (norms[0] * norms[1] + eps)
        total = total + energy
    return (score / total).mean()


def pair_sums(sums, pairs):
    """For each sum the total of its pairs' products: (S, K), (..., K, K) -> (..., S), float64."""
    return torch.einsum("sk,...kl,sl->...s", sums, pairs.double(), sums)


def proper_subsets(size):
    """Zeros and ones (S, K) that choose 1 to K - 1 of K = `size` sources, or the only one."""
    chosen = torch.tensor([*itertools.product((0.0, 1.0), repeat=size)], dtype=torch.float64)
    return chosen[1 : max(2, 2**size - 1)]


LOSSES = {"mse": mse_loss, "l1": l1_loss, "log_mse": log_mse_loss, "xumx": xumx_loss}

# -------------------------------------------------------------------------- records and checkpoints


class EarlyStopping:
    """Counts epochs without a lower loss; `patience` 0 never stops."""

    def __init__(self, patience):
        self.patience, self.best, self.best_epoch, self.bad_epochs = patience, math.inf, 0, 0

    def step(self, loss, epoch):
        self.bad_epochs += 1
        if loss < self.best:
            self.best, self.best_epoch, self.bad_epochs = loss, epoch, 0

    @property
    def stop(self):
        return 0 < self.patience <= self.bad_epochs

    def state_dict(self):
        return {"best": self.best, "best_epoch": self.best_epoch, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state):
        vars(self).update(state)


def new_record(target, network):
    """What <target>.json holds of a training that begins; `save_training` adds the flags."""
    versions = {"torch": str(torch.__version__), "numpy": np.__version__}
    return {
        "target": target,
        "args": {},
        "network": network.made_with,
        "epochs_trained": 0,
        "stopped": False,
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit(),
        "code": code_fingerprint(),
    }


def commit():
    """The git commit of these scripts, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def note_epoch(state, record, metrics, args):
    """Put an epoch's metrics on record and print them: whatever the dict holds."""
    stopping, epoch = state["stopping"], record["epochs_trained"] + 1
    metrics = {name: float(value) for name, value in metrics.items()}  # a checkpoint holds no NumPy
    histories = {name[:-8]: record[name] for name in record if name.endswith("_history")}
    for name in histories | metrics:  # a metric may be new, or gone, since a checkpoint
        history = record.setdefault(f"{name}_history", [])
        history += [math.nan] * (epoch - 1 - len(history)) + [metrics.get(name, math.nan)]
    record.update(epochs_trained=epoch, num_bad_epochs=stopping.bad_epochs)
    best = record["valid_loss_history"][stopping.best_epoch - 1]
    record.update(best_score=stopping.best, best_loss=best, best_epoch=stopping.best_epoch)
    record["stopped"] = stopping.stop
    shown = {**metrics, "best_loss": best}
    seconds = shown.pop("train_time")
    names = [name.removesuffix("_loss").removeprefix("valid_") for name in shown]
    numbers = [f"{name} {value:.4g}" for name, value in zip(names, shown.values())]
    line = f"{'  '.join(numbers)} (epoch {stopping.best_epoch})  {seconds:.1f} s"
    say(args, f"{record['target']} epoch {epoch}/{args.epochs}  {line}")
    if stopping.stop:
        reason = f"{stopping.bad_epochs} epochs without a lower validation loss"
        say(args, f"{record['target']}: stopped early, after {reason}")
    nothing = to_minimize(record["nothing"], args) if "nothing" in record else math.inf
    late = process_rank()[0] == 0 and epoch % math.ceil(args.epochs / 10) == 0
    if late and stopping.best >= nothing:
        causes = "is the target in the mixture, in time with it, and not silent? Else lower --lr"
        result = f"no better than the mixture itself after {epoch} epochs"
        print(f"{record['target']}: {result}: {causes}")


def to_minimize(metrics, args):
    """What epochs are compared by, as --select says: the lower, the better."""
    if args.select == "loss":
        return metrics["valid_loss"]
    if math.isnan(metrics.get("valid_SDR", math.nan)):
        why = "there is no SDR: the validation targets are silent, or METRICS has none"
        raise UserError(f"--select sdr: {why}; use --select loss")
    return -metrics["valid_SDR"]


def save_model(network, record, args, folder):
    """Write what separates with a network: separator.json, <target>.json and <target>.pth."""
    settings = {"sample_rate": args.sample_rate, "nfft": args.nfft, "nhop": args.nhop}
    settings["nb_channels"] = args.nb_channels
    path = folder / "separator.json"
    with only_writer(path, "settings"):
        if not path.exists() or load(path) != settings:
            save(settings, path)
    target = folder / record["target"]
    save({name: value.cpu() for name, value in network.state_dict().items()}, f"{target}.pth")
    record["output_sample"] = output_sample(network, args.nfft // 2 + 1, args.nb_channels)
    save(record, f"{target}.json")


def save_training(state, record, args):
    """Write the best weights, the record, curves and, last, the checkpoint.

    A kill before the checkpoint is whole repeats the epoch.
    """
    if process_rank()[0] > 0:
        return
    path = Path(args.output, record["target"])
    record.setdefault("epochs", args.epochs)  # those that it began with
    record["args"] = {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    epoch = record["epochs_trained"]
    if epoch and record["best_epoch"] == epoch:
        save_model(kept_network(state), record, args, Path(args.output))
    elif epoch:
        save(record, f"{path}.json")
    if epoch:
        plot_curves(record, f"{path}.png")
    for name in record if epoch and args.tensorboard else ():
        if name.endswith("_history"):
            tensorboard(f"{path}.tensorboard").add_scalar(name[:-8], record[name][-1], epoch)
    states = {name: part.state_dict() for name, part in state.items()}
    save({"record": record, "state": states}, f"{path}.chkpnt")
    if not epoch:
        kept, own = (net.state_dict().keys() for net in (kept_network(state), state["network"]))
        if kept != own:
            has = f"has other weights than the network, {min(kept ^ own)} for one"
            raise UserError(f"kept_network: what it returns {has}; return an average's .module")
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(f"{path}.chkpnt")
        if unknown:
            kinds = "flags and state_dicts may hold numbers, text, lists, dicts and tensors"
            raise UserError(
                f"{path}.chkpnt: could not be loaded, for {', '.join(unknown)}; {kinds}"
            )


def restore(state, checkpoint, args, given):
    """Go on from a checkpoint, to the bit; of its settings only those given by hand change."""
    try:
        for name, part in state.items():
            part.load_state_dict(checkpoint["state"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()[:30])
        path = Path(args.output, checkpoint["record"]["target"])
        raise UserError(f"{path}.chkpnt: does not fit this training ({reason})") from None
    record, others = checkpoint["record"], checkpoint["state"].keys() - state.keys()
    if others:
        which = f"train.py no longer has {', '.join(sorted(others))}, which it began with"
        raise UserError(f"{args.output}: {which}; put it back, or train anew")
    if record.get("code") != code_fingerprint():
        say(args, f"{record['target']}: the scripts are other ones than in its last epoch")
        record["code"] = code_fingerprint()
    saved, scheduler = record["args"], state.get("scheduler")
    groups = state["optimizer"].param_groups
    rate = groups[0]["lr"] or saved["lr"]
    rates = {"lr", "initial_lr", "max_lr", "min_lr"} if "lr" in given else set()
    for group in groups:  # each keeps its share of the rate
        for name in group.keys() & rates:
            group[name] = args.lr * (group[name] / rate)
        if "weight_decay" in given and group["weight_decay"] == saved["weight_decay"]:
            group["weight_decay"] = args.weight_decay
    for part in (scheduler, *getattr(scheduler, "_schedulers", ())) if "lr" in given else ():
        if hasattr(part, "base_lrs"):
            part.base_lrs = [args.lr * (lr / rate) for lr in part.base_lrs]
    for name, attribute in (("lr_decay_gamma", "factor"), ("lr_decay_patience", "patience")):
        if name in given:
            if not hasattr(scheduler, attribute):
                raise UserError(f"{flag(name)}: its schedule has no such number; leave it out")
            setattr(scheduler, attribute, getattr(args, name))
    end = getattr(scheduler, "total_steps", args.epochs)
    if getattr(scheduler, "T_max", None) == record.get("epochs", saved["epochs"]):
        end = scheduler.T_max  # a cosine would rise again
    if end < args.epochs:
        raise UserError(f"--epochs {args.epochs}: the schedule ends at {end}")


def prepare_folder(folder, sources, args):
    """Make the model folder; earlier files of the same targets go to previous/<n>/, or away."""
    if process_rank()[0] > 0:
        return
    settings = folder / "separator.json"
    data = [Path(args.root, split) for split in ("train", "valid", "test")] if args.root else []
    if args.root and folder.resolve() == Path(args.root).resolve():
        raise UserError(f"--output {folder}: is the folder of the data; choose another")
    earlier = []
    for target in args.target:
        record = folder / f"{target}.json"
        ours = (folder / f"{target}.chkpnt").exists() or "args" in json_object(record)
        for suffix in (".chkpnt", ".json", ".png", ".pth", ".tensorboard"):
            path = folder / f"{target}{suffix}"
            if suffix != ".tensorboard":
                check_output(path, roots=data, ours=ours)
            earlier += [path] if path.exists() else []
    others = {path.stem for path in folder.glob("*.pth")} - set(args.target)
    for other in sorted(others):
        network = json_object(folder / f"{other}.json").get("network")
        theirs = network.get("sources") if isinstance(network, dict) else None
        theirs = [other, *theirs] if isinstance(theirs, list) else [other]
        both = [name for name in theirs if name in (*args.target, *sources)]
        if both:
            what = f"{', '.join(both)} already, in {other}.pth"
            raise UserError(f"{folder}: holds {what}; choose another --output")
    if others and settings.exists():
        theirs = json_object(settings)
        for name in ("sample_rate", "nfft", "nhop", "nb_channels"):
            if theirs.get(name) != getattr(args, name):
                what = f"{', '.join(sorted(others))} with {name} {theirs.get(name)}"
                raise UserError(f"{folder}: holds {what}; choose another --output")
    for target in args.target:
        with only_training(target, args):  # says who is there
            pass
    places = (folder / "previous" / str(n) for n in itertools.count(1))
    place = next(place for place in places if not place.exists())
    for path in earlier:
        if args.overwrite:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            place.mkdir(parents=True, exist_ok=True)
            path.rename(place / path.name)
    if place.exists():
        say(args, f"the earlier training is now in {place}; {continuing(args)} would go on with it")


def json_object(path):
    """What a JSON file holds; {} where there is none, or something else is in it."""
    found = load(path) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def continuing(args):
    start = "python" if process_rank()[2] == 1 else "torchrun ..."
    folder = Path(args.output).parent if len(args.seeds) > 1 else args.output
    return f"{start} {shlex.quote(sys.argv[0])} --checkpoint {shlex.quote(str(folder))}"


def finish(flags, args):
    """Say what to do with what was trained."""
    if process_rank()[2] > 1:
        dist.destroy_process_group()
    if process_rank()[0] > 0:
        return
    model = f"--model {shlex.quote(str(flags.output))}"
    following = f"python test.py SONG.wav {model}"
    data = "" if args.root is None else f" --root {shlex.quote(args.root)}"
    known = not flags.checkpoint or args is not flags  # else all was finished: of which data?
    if known and (args.root is None or Path(args.root, "test").is_dir()):
        dataset = "" if args.dataset == "musdb" else f" --dataset {args.dataset}"
        following += f", or python eval.py{dataset}{data} {model}"
    print(f"trained: {flags.output}/. Next: {following}")


def fetch(flags):
    """Answer --download: fetch a data set, whole or the rest of it; returns its folder."""
    root = fetch_set(flags.download, flags.root)
    wav = " --is-wav" * flags.download.endswith("hq")
    print(f"{root}: is whole. Next: python train.py --root {shlex.quote(str(root))}{wav}")
    return root


# -------------------------------------------------------------------- processes, messages, pictures


def set_up(args):
    """Choose device and precision and join the processes of torchrun; returns the device."""
    device, world = select_device(args.device), process_rank()[2]
    args.amp = use_amp(args.amp, device)
    name, precision = f"{torch.get_num_threads()} threads", "float32"
    backend, own = "gloo", "; batch norms are each process's own on CPUs"
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # a deterministic LSTM
        torch.backends.cudnn.deterministic = True  # convolutions, too
        torch.cuda.set_device(device)
        name, precision = torch.cuda.get_device_name(device), "float32 with TF32 products"
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # nccl does not let processes share a card
        backend, own = "gloo" if local > torch.cuda.device_count() else "nccl", ""
    elif device.type != "cpu" and world > 1:
        raise UserError(f"--device {device}: several processes can't share it; start train.py once")
    say(args, f"{device} ({name}), {'bfloat16' if args.amp else precision}")
    if world > 1:  # the first process may have to decode a whole dataset while the others wait
        dist.init_process_group(backend, timeout=timedelta(hours=6))
        say(args, f"{world} processes{own}")
    if not args.checkpoint:
        say(args, f"preset {args.preset}: {PRESETS[args.preset] or 'the published recipe'}")
    return device


@contextlib.contextmanager
def tf32(device):
    """Let a GPU multiply float32 matrices as TF32 while it trains, not in a later separation."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def over_processes(network, device):
    """The network as it is called in training: wrapped where several processes train it."""
    if process_rank()[2] == 1:
        return network
    gpu = device.type == "cuda"
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network) if gpu else network
    ids = [device] if gpu else None
    return torch.nn.parallel.DistributedDataParallel(network, device_ids=ids)


def average(values):
    """The mean of a tensor over the processes, as a number or lists of numbers."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values.tolist()


def computed_once(network, shared):
    """The network's forward; a first call takes the result of an earlier metric of the same track.

    shared: [x, forward(x)] of that metric, or empty. A second call is computed anew.
    """
    forward, calls = network.forward, itertools.count()

    def call(x, *others, **named):
        if next(calls) or others or named or network.training:
            return forward(x, *others, **named)
        if not (shared and x.shape == shared[0].shape and torch.equal(x, shared[0])):
            shared[:] = x.clone(), forward(x)
        return shared[1].clone()

    return call


def check_finite(losses, name, args):
    """Raise UserError if a loss is not finite: training stops, and the last checkpoint stays."""
    finite = torch.stack(losses).isfinite()
    if not finite.all():
        number = finite.int().argmin().item()
        remedy = f"lower the rate{' or add --no-amp' * args.amp}: {continuing(args)} --lr"
        value = f"step {number + 1}: the loss is {losses[number].item()}"
        raise UserError(f"{name}, {value}; the best model is kept; {remedy} {args.lr / 10:g}")


@contextlib.contextmanager
def only_training(target, args):
    """Keep a second training of the target out; answer what ends this one by how to continue it."""
    rank, _, world = process_rank()
    lock = contextlib.nullcontext()
    if rank == 0:
        lock = only_writer(Path(args.output, target), f"the training of {target}", wait=False)
    try:
        with lock:
            yield
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or being told to end
        if rank == 0:
            print(f"\ninterrupted; continue with: {continuing(args)}", file=sys.stderr)
        raise
    except RuntimeError as error:
        if world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(f"another process ended; continue with: {continuing(args)}") from None
    finally:
        while WRITERS:
            WRITERS.popitem()[1].close()


def say(args, text):
    if not args.quiet:
        print(text)


WRITERS = {}  # of a training's event files, by folder


def tensorboard(folder):
    """The writer of a training's event files, which the training's end closes."""
    from torch.utils.tensorboard import SummaryWriter

    if folder not in WRITERS:
        WRITERS[folder] = SummaryWriter(folder)
    return WRITERS[folder]


def plot_curves(record, path):
    """Draw each metric over epochs; mark the best epoch and the steps of the learning rate."""
    histories = {name[:-8]: record[name] for name in record if name.endswith("_history")}
    rates = histories.pop("lr")
    del histories["train_time"]
    kinds = list(dict.fromkeys(name.partition("_")[2] for name in histories))  # loss, ...
    picture, axes = figure(len(kinds), 1, (8, 1 + 3.5 * len(kinds)), sharex=True)
    epochs, best = range(1, len(rates) + 1), record["best_epoch"]
    for axis, kind in zip(axes[:, 0], kinds):
        for name in ("train", "valid"):
            values = histories.get(f"{name}_{kind}")
            if values:
                axis.plot(epochs, values, ".-" if len(epochs) < 30 else "-", label=f"{name} {kind}")
        if f"valid_{kind}" in histories:
            value = histories[f"valid_{kind}"][best - 1]
            axis.plot(best, value, "o", color="tab:red", label=f"best: {value:.4g} in epoch {best}")
        for epoch, (before, after) in enumerate(itertools.pairwise(rates), start=2):
            if after < before:
                axis.axvline(epoch, color="gray", linewidth=0.8, linestyle="--")
        if "nothing" in record:
            nothing = record["nothing"].get(f"valid_{kind}", math.nan)
            axis.axhline(nothing, color="gray", linestyle=":", label=f"the mixture: {nothing:.4g}")
        if kind == "loss" and min(histories["train_loss"] + histories["valid_loss"]) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.set(
            title=record["target"],
            xlabel="epoch (dashed: lower rate)",
            ylabel=kind + " in dB" * (kind == "SDR"),
        )
        axis.grid(which="both", color="0.92")
        axis.legend(frameon=False)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    save_figure(picture, path)


if __name__ == "__main__":
    run(main)
