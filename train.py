"""Train Open-Unmix: one network per target, from songs to a model folder.

    python train.py                                      a first model in minutes, on whatever data can be had
    python train.py --root MUSDB18 --target vocals       the published recipe on all of MUSDB18
    python train.py --checkpoint open-unmix              continue after an interruption
    torchrun --nproc_per_node=4 train.py --root MUSDB18  the same training on four GPUs
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import AUGMENTATIONS, LAYOUTS, index_dataset, load_datasets
from model import ARCHITECTURES, load_networks, stft
from utils import DAMAGED, EarlyStopping, Parser, UserError, figure, load, number, process_rank, run, save
from utils import save_figure, select_device

LOSS = F.mse_loss  # of estimated and true magnitudes, (T, B, C, F) each
# What a preset changes; flags given by hand win. "umx" is the published recipe: every flag's default.
PRESETS = {
    "umx": "",
    "tutorial": "--epochs 20 --batch-size 8 --seq-dur 3 --samples-per-track 16"
    " --hidden-size 256 --lr 0.002 --lr-decay-patience 3",
}
# What weights are made for; the rest of a training may change while it lasts.
MODEL_FLAGS = "arch mask hidden_size unidirectional nfft nhop sample_rate bandwidth nb_channels".split()


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="musdb", choices=["musdb", "synthetic", *LAYOUTS], help="layout of the data, drawn in data.py")
    add("--root", help="folder of the data; without it MUSDB18's 7-second sample is fetched, or songs are synthesized")
    add("--is-wav", action="store_true", help="--root is MUSDB18-HQ (WAV), even if it holds stem files too")
    add("--cache", help="folder for the WAV files decoded from stems (default: <root>-wav)")
    add("--target", nargs="+", default=["vocals"], help="sources to train, one network each, one after the other")
    add("--target-file", default="vocals.wav", help="trackfolder_*: the target's file in each track folder")
    add("--interferer-files", nargs="+", default=["drums.wav", "bass.wav", "other.wav"], help="trackfolder_fix: the others")
    add("--random-track-mix", action="store_true", help="trackfolder_fix: take each interferer from a random track")
    add("--random-interferer-mix", action="store_true", help="trackfolder_var: take all interferers from one random track")
    add("--silence-missing", action="store_true", help="trackfolder_var: where the target file lacks, it is silent")
    add("--target-dir", default="vocals", help="sourcefolder: the target's folder")
    add("--interferer-dirs", nargs="+", default=["drums", "bass", "other"], help="sourcefolder: the others")
    add("--ext", default=".wav", help="sourcefolder, trackfolder_var: which files to use")
    add("--input-file", default="mixture.wav", help="aligned: the network's input")
    add("--output-file", default="vocals.wav", help="aligned: what it should make of it")
    add("--seq-dur", type=number(float, 0.1), default=6.0, help="length of a training example in seconds")
    add("--samples-per-track", type=number(int, 1), default=64, help="training examples per track and epoch")
    changes = dict(nargs="*", default=["gain", "channelswap"], choices=list(AUGMENTATIONS))
    add("--source-augmentations", **changes, help="what changes each source at random before mixing")
    add("--nb-workers", type=number(int, 0), help="processes that load data (default: 0 for CPU, up to 8 for GPU)")

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="blstm", choices=list(ARCHITECTURES), help="the network, from the table in model.py")
    add("--mask", default="sigmoid", choices=["sigmoid", "relu"], help="the paper's mask, or that of the published weights")
    add("--hidden-size", type=number(int, 2), default=512, help="width of the network")
    add("--unidirectional", action="store_true", help="look at the past only (for real-time use)")
    add("--nfft", type=number(int, 16), default=4096, help="STFT size in samples")
    add("--nhop", type=number(int, 1), default=1024, help="STFT hop in samples")
    add("--sample-rate", type=number(int, 1000), help="of the model, in Hz (default: that of most files)")
    add("--bandwidth", type=number(int, 1), default=16000, help="the network sees frequencies up to this, in Hz")
    add("--nb-channels", type=number(int, 1, 2), default=2, help="1 mixes everything down to mono")
    add("--model", help="fine-tune these weights: umx, umxhq, umxl, umxse or a model folder; sets the flags above to theirs")

    add = parser.add_argument_group("training").add_argument
    add("--preset", choices=list(PRESETS), help="umx: the published recipe; tutorial: minutes (default without --root)")
    add("--epochs", type=number(int, 1), default=1000, help="passes over the tracks, in all")
    add("--batch-size", type=number(int, 1), default=16, help="examples per step, of all processes together")
    add("--lr", type=number(float, 1e-12), default=0.001, help="learning rate of Adam")
    add("--weight-decay", type=number(float, 0), default=1e-5, help="of Adam")
    add("--patience", type=number(int, 0), default=140, help="stop after so many epochs without a lower loss; 0: never")
    add("--lr-decay-patience", type=number(int, 0), default=80, help="lower the rate after so many such epochs")
    add("--lr-decay-gamma", type=number(float, 1e-6, 0.999999), default=0.3, help="by this factor")
    add("--seed", type=number(int, 0), default=42, help="of weights, examples and dropout")
    add("--amp", action=argparse.BooleanOptionalAction, default=False, help="compute the network in bfloat16")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")

    add = parser.add_argument_group("output").add_argument
    add("--output", default="open-unmix", help="model folder to write; what it holds is moved to <output>/previous")
    add("--overwrite", action="store_true", help="replace an earlier training instead")
    add("--checkpoint", help="model folder whose training to continue, with its flags, to --epochs in all")
    add("--quiet", action="store_true", help="print the last line only")
    add("--tensorboard", action="store_true", help="also write TensorBoard event files to <output>/<target>.tensorboard")
    add("--dry-run", action="store_true", help="one batch, one validation track, one save: does it all work?")
    return parser


def parse_args(arguments):
    """The flags, and the names of those given by hand, which win over those of a preset or of an earlier training."""
    parser = make_parser()
    args, given = parser.parse_args(arguments), parser.given(arguments)
    if args.checkpoint:
        for name in given & {"output", "overwrite", "preset", "model", "dry_run"}:
            raise UserError(f"--{name.replace('_', '-')}: is not for --checkpoint, which goes on as the training began")
        saved = [*saved_flags(Path(args.checkpoint))]
        args, theirs = parser.parse_args([*saved, *arguments]), vars(parser.parse_args(saved))
        keep_model(args, given, {name: theirs[name] for name in MODEL_FLAGS}, args.checkpoint)
        args.output = args.checkpoint
    else:
        tutorial = args.root is None and args.dataset in ("musdb", "synthetic")
        preset = args.preset or ("tutorial" if tutorial else "umx")
        args = parser.parse_args([*PRESETS[preset].split(), *arguments])
        args.preset = preset
    check_flags(args, given)
    if args.dataset in LAYOUTS:  # these name their target by its file or folder
        file = {"aligned": args.output_file, "sourcefolder": args.target_dir}.get(args.dataset, args.target_file)
        args.target = [Path(file).stem]
    args.target = list(dict.fromkeys(args.target))
    args.quiet = args.quiet or process_rank()[0] > 0  # only the first process prints
    return args, given


def check_flags(args, given):
    """Refuse flags that do not go together."""
    uses = {name: set(flags) for name, (_, flags) in LAYOUTS.items()}
    uses.update(musdb={"target", "is_wav", "cache"}, synthetic={"target"})
    uses["trackfolder_fix"].add("random_track_mix")
    uses["trackfolder_var"].add("random_interferer_mix")
    for dataset in uses.keys() - {"aligned"}:  # whose input is a file, not a sum
        uses[dataset].add("source_augmentations")
    for name in given & set().union(*uses.values()) - uses[args.dataset]:
        raise UserError(f"--{name.replace('_', '-')}: is not used with --dataset {args.dataset}; leave it out")
    if args.nhop > args.nfft // 2:
        raise UserError(f"--nhop {args.nhop}: must be at most half of --nfft {args.nfft} for the inverse STFT")
    if args.hidden_size % 8:
        raise UserError(f"--hidden-size {args.hidden_size}: must be a multiple of 8")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: needs the package tensorboard (pip install tensorboard)")


def keep_model(args, given, theirs, model):
    """Refuse flags given by hand that differ from those, {name: value}, of the model that is to be trained further."""
    for name in theirs.keys() & given:
        if (value := getattr(args, name)) != theirs[name]:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{flag}: {model} has {theirs[name]}; leave the flag out")


def saved_flags(folder):
    """The command line of the latest training in a model folder."""
    found = sorted(folder.glob("*.chkpnt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--checkpoint {folder}: holds no training (expected {folder}/vocals.chkpnt)")
    try:
        flags = load(found[-1])["args"].items()
    except DAMAGED as error:
        raise UserError(f"{found[-1]}: is not a checkpoint of train.py ({error}); start a new training") from error
    for name, value in flags:
        flag = f"--{name.replace('_', '-')}"
        if name in ("output", "checkpoint", "overwrite", "dry_run") or value is None or value is False:
            continue
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        else:
            yield flag if value is True else f"{flag}={value}"


def command_to_continue(args):
    start = "python" if process_rank()[2] == 1 else "torchrun ..."
    return f"{start} {shlex.quote(sys.argv[0])} --checkpoint {shlex.quote(args.output)}"


# ---------------------------------------------------------------------------------------------- data to the network


class EpochBatches(torch.utils.data.Sampler):
    """The batches of an epoch, as lists of example indices: a pure function of (seed, epoch), shared out over processes.

    Set `.epoch` before iterating. Epoch e draws from the examples e * size to (e + 1) * size - 1, each once, and leaves
    out what does not fill a batch.
    """

    def __init__(self, size, batch_size, seed):
        self.size, self.batch_size, self.seed, self.epoch = size, min(batch_size, size), seed, 0
        self.rank, _, self.world = process_rank()
        if self.batch_size < self.world:
            raise UserError(f"--batch-size {self.batch_size}: is less than the number of processes, {self.world}")

    def __len__(self):
        return self.size // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size) + self.epoch * self.size
        for step in range(len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield batch[self.rank :: self.world].tolist()


def make_loader(dataset, args, device):
    """The DataLoader of the training examples."""
    gpu, workers = device.type == "cuda", args.nb_workers
    if workers is None:
        workers = min(8, os.cpu_count() // torch.cuda.device_count()) if gpu else 0
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=EpochBatches(len(dataset), args.batch_size, args.seed),
        num_workers=workers,
        pin_memory=gpu,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # its draws must not depend on when the workers were started
    )


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def magnitudes(waveforms, args, device):
    """Waveforms (B, C, N) -> magnitudes (B, C, F, T) on the device, in memory (T, B, C, F): what the layers work on."""
    waveforms = waveforms.to(device, non_blocking=True)
    size = 1 if device.type == "cpu" else len(waveforms)  # the spectrum of one example stays in a CPU's cache
    parts = []
    for part in waveforms.split(size):
        X = stft(part, args.nfft, args.nhop).permute(3, 0, 1, 2)  # (T, B, C, F)
        parts.append((X.real.square() + X.imag.square()).sqrt())  # on a CPU at least twice as fast as X.abs()
    return torch.cat(parts, dim=1).permute(1, 2, 3, 0)


def input_statistics(dataset, args, device):
    """Mean and standard deviation per bin of the mixtures' magnitudes (averaged over channels): lists of F numbers."""
    rank, _, world = process_rank()
    sums = torch.zeros(3, args.nfft // 2 + 1, dtype=torch.float64, device=device)  # frames, magnitudes, their squares
    tracks = range(rank, 1 if args.dry_run else len(dataset), world)
    for index in tqdm(tracks, desc="input statistics", unit="track", disable=args.quiet, leave=False):
        magnitude = magnitudes(dataset[index][0][None], args, device)[0].mean(0).double()  # (F, T)
        sums[0] += magnitude.shape[1]
        sums[1] += magnitude.sum(1)
        sums[2] += (magnitude**2).sum(1)
    if world > 1:
        dist.all_reduce(sums)
    frames, total, squares = sums.cpu()
    mean = total / frames
    scale = (squares / frames - mean**2).clamp_min(0).sqrt()
    scale = scale.clamp_min(max(1e-4 * scale.max().item(), 1e-12))  # a bin that is always silent
    return {"mean": mean.tolist(), "scale": scale.tolist()}


# ---------------------------------------------------------------------------------------------- one epoch


def compute_loss(network, x, y, args, device):
    """The loss of a network for waveforms (B, C, N) of mixture and target."""
    X, Y = magnitudes(x, args, device), magnitudes(y, args, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
        Y_hat = network(X)
    # axes in the order of memory, as the gradient of a loss has them: otherwise it would be copied
    return LOSS(Y_hat.float().permute(3, 0, 1, 2), Y.permute(3, 0, 1, 2))


def train(network, optimizer, loader, args, device, name):
    """One pass over the training examples; returns the mean loss. Raises UserError when it is not finite."""
    network.train()
    size, world = loader.batch_sampler.batch_size, loader.batch_sampler.world
    losses = []
    with tqdm(total=len(loader) * size, desc=name, unit=" examples", leave=False, disable=args.quiet) as bar:
        for step, (x, y) in enumerate(loader):
            # the mean over the whole batch, however many of its examples are here: DDP averages over processes
            loss = compute_loss(network, x, y, args, device) * (len(x) * world / size)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            bar.update(size)
            last = step + 1 == len(loader) or args.dry_run
            if last or device.type == "cpu" or step % 10 == 9:  # to read the losses is to wait for the GPU
                check_finite(torch.stack(losses), name, optimizer.param_groups[0]["lr"], args)
                bar.set_postfix(loss=f"{losses[-1].item():.4f}", refresh=False)
            if last:
                break
    return average(torch.stack(losses).double().mean())


def check_finite(losses, name, lr, args):
    """Raise UserError if one of the losses is not finite: training stops, and the last checkpoint stays."""
    finite = losses.isfinite()
    if not finite.all():
        step = finite.int().argmin().item()
        raise UserError(
            f"{name}, step {step + 1}: the loss is {losses[step].item()} at learning rate {lr:g}; the best model so far is "
            f"kept; lower the rate{' or add --no-amp' * args.amp}: {command_to_continue(args)} --lr {lr / 10:g}"
        )


@torch.no_grad()
def validate(network, dataset, args, device):
    """Mean loss over whole tracks, shared out over the processes."""
    network.eval()
    rank, _, world = process_rank()
    size = 1 if args.dry_run else len(dataset)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index in range(rank, size, world):
        x, y = dataset[index]
        total += compute_loss(network, x[None], y[None], args, device)
    return average(total * world / size)


def average(value):
    """A tensor's mean over the processes, as a number."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()


# ---------------------------------------------------------------------------------------------- one target


class Training:
    """The training of one target: all that an epoch changes, and how it is saved, shown and taken up again."""

    def __init__(self, args, target, network, device, statistics=None):
        self.args, self.target, self.device, self.statistics = args, target, device, statistics
        self.network = network.to(device)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
        plateau = dict(factor=args.lr_decay_gamma, patience=args.lr_decay_patience, cooldown=10)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, **plateau)
        self.stopping = EarlyStopping(args.patience)
        self.best_epoch = 0
        self.history = {"train_loss_history": [], "valid_loss_history": [], "train_time_history": [], "lr_history": []}

    @property
    def epoch(self):
        """Epochs finished so far."""
        return len(self.history["train_loss_history"])

    def path(self, suffix):
        return Path(self.args.output, self.target + suffix)

    def run(self, train_set, valid_set):
        """Train to the last epoch, saving after each."""
        args, rank, world = self.args, process_rank()[0], process_rank()[2]
        loader, network, log = make_loader(train_set, args, self.device), self.network, None
        if world > 1:  # starts by giving every process the weights of the first
            ids = [self.device] if self.device.type == "cuda" else None
            network = torch.nn.parallel.DistributedDataParallel(network, device_ids=ids, forward_sync_buffers=False)
        if args.tensorboard and rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            log = SummaryWriter(self.path(".tensorboard"), purge_step=self.epoch + 1)
        while self.epoch < args.epochs and not self.stopping.stop:
            start, lr, name = time.time(), self.optimizer.param_groups[0]["lr"], f"{self.target} epoch {self.epoch + 1}"
            torch.manual_seed(args.seed + 1 + self.epoch * world + rank)  # of dropout: a function of the epoch
            loader.batch_sampler.epoch = self.epoch
            train_loss = train(network, self.optimizer, loader, args, self.device, name)
            valid_loss = validate(self.network, valid_set, args, self.device)
            check_finite(torch.tensor([valid_loss]), f"{name}, validation", lr, args)
            for values, value in zip(self.history.values(), (train_loss, valid_loss, time.time() - start, lr)):
                values.append(value)
            self.scheduler.step(valid_loss)
            if self.stopping.step(valid_loss):
                self.best_epoch = self.epoch
            if rank == 0:
                self.save()
            if log:
                for key, value in (("loss/train", train_loss), ("loss/valid", valid_loss), ("lr", lr)):
                    log.add_scalar(key, value, self.epoch)
                log.flush()
            print(
                f"{name}/{args.epochs}  train {train_loss:.4f}  valid {valid_loss:.4f}  "
                f"best {self.stopping.best:.4f} (epoch {self.best_epoch})  lr {lr:.2g}  {time.time() - start:.1f} s"
            )
            if args.dry_run:
                return
        if self.stopping.stop:
            print(f"{self.target}: stopped early, after {self.stopping.bad_epochs} epochs without a lower validation loss")

    def save(self):
        """Write weights (of the best epoch), record, curves and, last, the checkpoint: a kill before it repeats the epoch."""
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        record = {
            "target": self.target,
            "args": vars(self.args),
            "epochs_trained": self.epoch,
            "best_loss": self.stopping.best,
            "best_epoch": self.best_epoch,
            "num_bad_epochs": self.stopping.bad_epochs,
            **self.history,
            "input_statistics": self.statistics,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            "commit": commit(),
        }
        if self.epoch:
            if self.best_epoch == self.epoch:
                save(state, self.path(".pth"))
            save(record, self.path(".json"))
            plot_curves(self.history, self.best_epoch, self.target, self.path(".png"))
        optimizer, scheduler = self.optimizer.state_dict(), self.scheduler.state_dict()
        save({**record, "state_dict": state, "optimizer": optimizer, "scheduler": scheduler}, self.path(".chkpnt"))

    def restore(self, given):
        """Take up the checkpoint; flags given by hand replace its settings."""
        checkpoint, args = load(self.path(".chkpnt")), self.args
        try:
            self.network.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            plateau = dict(factor=args.lr_decay_gamma, patience=args.lr_decay_patience)
            self.scheduler.load_state_dict({**checkpoint["scheduler"], **plateau})
            self.history = {name: list(checkpoint[name]) for name in self.history}
            self.stopping.best, self.stopping.bad_epochs = checkpoint["best_loss"], checkpoint["num_bad_epochs"]
            self.best_epoch, self.statistics = checkpoint["best_epoch"], checkpoint["input_statistics"]
        except DAMAGED as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{self.path('.chkpnt')}: does not fit this training ({reason})") from None
        for group in self.optimizer.param_groups:
            group["weight_decay"] = args.weight_decay
            group["lr"] = args.lr if "lr" in given else group["lr"]


def commit():
    """The git commit of these scripts, or None."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plot_curves(history, best_epoch, target, path):
    """Draw both losses over epochs; mark the best epoch and the steps of the learning rate."""
    picture, axes = figure(1, 1, (8, 4.5))
    axis, best = axes[0, 0], history["valid_loss_history"][best_epoch - 1]
    epochs = range(1, len(history["train_loss_history"]) + 1)
    for name, color in (("train", "tab:blue"), ("valid", "tab:orange")):
        style = ".-" if len(epochs) < 30 else "-"
        axis.plot(epochs, history[f"{name}_loss_history"], style, color=color, label=f"{name} loss")
    axis.plot(best_epoch, best, "o", markersize=8, color="tab:red", label=f"best: {best:.4g} in epoch {best_epoch}")
    for epoch, (before, after) in enumerate(itertools.pairwise(history["lr_history"]), start=2):
        if after != before:
            axis.axvline(epoch, color="gray", linewidth=0.8, linestyle="--")
            axis.annotate(f" lr {after:.2g}", (epoch, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color="gray")
    axis.set(title=target, xlabel="epoch", ylabel="loss", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axis.tick_params(which="minor", labelsize=7)
    axis.grid(which="both", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_figure(picture, path)


# ---------------------------------------------------------------------------------------------- the folder, the script


def set_up(args):
    """Choose the device and join the processes that torchrun started; returns the device."""
    device, world = select_device(args.device), process_rank()[2]
    name, precision = f"{torch.get_num_threads()} threads", "float32"
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuDNN's LSTM deterministic
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        name, precision = torch.cuda.get_device_name(device), "float32 with TF32 products"
    if world > 1:  # the first process may have to decode a whole dataset while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    print(f"{device} ({name}), {'bfloat16' if args.amp else precision}" + f", {world} processes" * (world > 1))
    if not args.checkpoint:
        print(f"preset {args.preset}: {PRESETS[args.preset] or 'the published recipe'}")
    return device


def make_network(args, statistics):
    """A new network, initialised from --seed."""
    torch.manual_seed(args.seed)
    frequencies = np.linspace(0, args.sample_rate / 2, args.nfft // 2 + 1)
    return ARCHITECTURES[args.arch](
        nb_bins=args.nfft // 2 + 1,
        nb_channels=args.nb_channels,
        hidden_size=args.hidden_size,
        unidirectional=args.unidirectional,
        max_bin=int((frequencies <= args.bandwidth).sum()),
        mask=args.mask,
        input_mean=statistics and statistics["mean"],
        input_scale=statistics and statistics["scale"],
    )


def networks_to_fine_tune(args, given):
    """{target: network} of --model; the flags take over its settings."""
    networks, settings = load_networks(args.model, args.target)
    network, rate = networks[args.target[0]], int(settings["sample_rate"])
    theirs = {name: settings[name] for name in ("nfft", "nhop", "nb_channels")}
    theirs.update({name: getattr(network, name) for name in ("mask", "hidden_size", "unidirectional")}, sample_rate=rate)
    theirs["arch"] = next(name for name, kind in ARCHITECTURES.items() if type(network) is kind)
    theirs["bandwidth"] = math.ceil((network.max_bin - 1) * rate / settings["nfft"])
    keep_model(args, given, theirs, args.model)
    vars(args).update(theirs)
    return networks


def prepare_folder(args):
    """Make the model folder, put earlier trainings of the same targets aside, write separator.json."""
    folder = Path(args.output)
    settings = dict(sample_rate=args.sample_rate, nfft=args.nfft, nhop=args.nhop, nb_channels=args.nb_channels)
    others = sorted({path.stem for path in folder.glob("*.json")} - {"separator", *args.target})
    if others and (folder / "separator.json").exists() and load(folder / "separator.json") != settings:
        raise UserError(
            f"{folder}: holds {', '.join(others)} with another STFT, sample rate or channel count; choose another --output"
        )
    try:
        for target in args.target:
            put_aside(folder, target, args)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another --output") from error
    save(settings, folder / "separator.json")


def put_aside(folder, target, args):
    """Move the files of an earlier training to previous/<target>-1.*, -2.*, ..., or remove them with --overwrite."""
    suffixes, place = (".chkpnt", ".json", ".png", ".pth", ".tensorboard"), folder / "previous"
    earlier = [path for suffix in suffixes if (path := folder / (target + suffix)).exists()]
    if args.overwrite:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif earlier:
        place.mkdir(exist_ok=True)
        taken = {path.name for path in place.iterdir()}
        free = next(n for n in itertools.count(1) if not any(f"{target}-{n}{suffix}" in taken for suffix in suffixes))
        for path in earlier:
            os.replace(path, place / f"{target}-{free}{path.suffix}")
        command = command_to_continue(args)
        print(f"the earlier training of {target} is now {place}/{target}-{free}.*; {command} would have continued it")


def train_targets(args, given):
    """Index the data, make the networks or take them up, and train one after the other."""
    device, networks, statistics = set_up(args), {}, None
    if args.model and not args.checkpoint:
        networks = networks_to_fine_tune(args, given)
    rank, _, world = process_rank()
    for turn in range(world):  # what the first process fetches or decodes, the next ones find
        if turn == rank:
            with contextlib.redirect_stderr(io.StringIO()) if args.quiet else contextlib.nullcontext():  # its bars
                train_tracks, valid_tracks, sample_rate, mix = index_dataset(args)
        if world > 1:
            dist.barrier()
    args.sample_rate = args.sample_rate or sample_rate
    print(f"{len(train_tracks)} training tracks, {len(valid_tracks)} validation tracks, {args.sample_rate} Hz")
    tracks = train_tracks, valid_tracks, args.sample_rate, mix
    datasets = {target: load_datasets(args, target, tracks) for target in args.target}
    if not (args.checkpoint or args.model):  # of the mixtures: the same for every target
        statistics = input_statistics(datasets[args.target[0]][2], args, device)
    trainings = []
    for target in args.target:
        network = networks.get(target) or make_network(args, statistics)
        trainings.append(Training(args, target, network, device, statistics))
        if args.checkpoint:
            trainings[-1].restore(given)
    if rank == 0 and not args.checkpoint:
        prepare_folder(args)
        for training in trainings:
            training.save()
    try:
        for training in trainings:
            training.run(*datasets[training.target][:2])
    except KeyboardInterrupt:
        if rank == 0:
            place, command = training.path(".chkpnt"), command_to_continue(args)
            print(f"\ninterrupted; {place} holds all but this epoch; continue with: {command}", file=sys.stderr)
        sys.exit(130)


def main():
    args, given = parse_args(sys.argv[1:])
    rank, _, world = process_rank()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to end is answered like Ctrl-C
    try:
        with contextlib.redirect_stdout(io.StringIO()) if args.quiet else contextlib.nullcontext():
            train_targets(args, given)
    except RuntimeError as error:
        if world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(f"another process of this training ended; continue with: {command_to_continue(args)}") from None
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        commands = f"python test.py SONG.wav --model {args.output}, or python eval.py --model {args.output}"
        print(f"trained {', '.join(args.target)}: {args.output}/. Next: {commands}")


if __name__ == "__main__":
    run(main)
