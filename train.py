"""Train Open-Unmix: one network per target, from songs to a model folder.

    python train.py                                      a first model in minutes, on whatever data can be had
    python train.py --root MUSDB18 --target vocals       the published recipe on all of MUSDB18
    python train.py --checkpoint open-unmix              continue after an interruption
    torchrun --nproc_per_node=4 train.py --root MUSDB18  the same training on four GPUs
"""

import contextlib
import itertools
import math
import os
import platform
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

from data import AUGMENTATIONS, LAYOUTS, index_dataset, load_datasets, target_sources
from model import ARCHITECTURES, load_networks, stft
from utils import EarlyStopping, Parser, UserError, figure, file_name, load, number, process_rank, run, save, save_figure, select_device

# What a preset changes; flags given by hand win. "umx" is the published recipe: every flag's default.
PRESETS = {
    "umx": {},
    "tutorial": dict(epochs=20, batch_size=8, seq_dur=3.0, samples_per_track=16, hidden_size=256, lr=0.002, lr_decay_patience=3),
}


def parse_args(arguments):
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="musdb", choices=["musdb", "synthetic", *LAYOUTS], help="layout of the data; data.py draws each")
    add("--root", help="folder of the data; without it MUSDB18's 7-second sample is fetched, or songs are synthesized")
    add("--is-wav", action="store_true", help="--root is MUSDB18-HQ (WAV), even if it holds stem files too")
    add("--cache", help="folder for the WAV files decoded from stems (default: <root>-wav)")
    add("--target", nargs="+", default=["vocals"], help="sources to train, one network each, one after the other")
    add("--target-file", type=file_name, default="vocals.wav", help="trackfolder_*: the target's file in each track folder")
    add("--interferer-files", type=file_name, nargs="+", default=["drums.wav", "bass.wav", "other.wav"], help="trackfolder_fix: the others")
    add("--random-track-mix", action="store_true", help="trackfolder_fix: take each interferer from a random track")
    add("--random-interferer-mix", action="store_true", help="trackfolder_var: take all interferers from one random track")
    add("--silence-missing", action="store_true", help="trackfolder_var: a track without the target file has a silent target")
    add("--target-dir", default="vocals", help="sourcefolder: the target's folder")
    add("--interferer-dirs", nargs="+", default=["drums", "bass", "other"], help="sourcefolder: the others")
    add("--ext", default=".wav", help="sourcefolder, trackfolder_var: which files to use")
    add("--input-file", type=file_name, default="mixture.wav", help="aligned: the network's input")
    add("--output-file", type=file_name, default="vocals.wav", help="aligned: what it should make of it")
    add("--seq-dur", type=number(float, 0.1), default=6.0, help="length of a training example in seconds")
    add("--samples-per-track", type=number(int, 1), default=64, help="training examples per track and epoch")
    add(
        "--source-augmentations",
        nargs="*",
        default=["gain", "channelswap"],
        choices=list(AUGMENTATIONS),
        help="what changes each source at random before mixing",
    )
    add("--nb-workers", type=number(int, 0), help="processes that load data (default: 0 for CPU, up to 8 for GPU)")

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="blstm", choices=list(ARCHITECTURES), help="the network, from the table in model.py")
    add("--mask", default="sigmoid", choices=["sigmoid", "relu"], help="the paper's mask, or the one of the published weights")
    add("--hidden-size", type=number(int, 2), default=512, help="width of the network")
    add("--unidirectional", action="store_true", help="look at the past only (for real-time use)")
    add("--nfft", type=number(int, 16), default=4096, help="STFT size in samples")
    add("--nhop", type=number(int, 1), default=1024, help="STFT hop in samples")
    add("--bandwidth", type=number(int, 1), default=16000, help="the network sees frequencies up to this, in Hz")
    add("--nb-channels", type=number(int, 1, 2), default=2, help="1 mixes everything down to mono")
    add("--model", help="fine-tune these weights: umx, umxhq, umxl, umxse or a model folder; sets the flags above to theirs")

    add = parser.add_argument_group("training").add_argument
    add("--preset", choices=list(PRESETS), help="umx: the published recipe; tutorial: minutes on a laptop (default without --root)")
    add("--epochs", type=number(int, 1), default=1000, help="passes over the tracks, in all")
    add("--batch-size", type=number(int, 1), default=16, help="examples per step, of all processes together")
    add("--lr", type=number(float, 1e-12), default=0.001, help="learning rate of Adam")
    add("--weight-decay", type=number(float, 0), default=1e-5, help="of Adam")
    add("--patience", type=number(int, 0), default=140, help="stop after so many epochs without a lower validation loss; 0: never")
    add("--lr-decay-patience", type=number(int, 0), default=80, help="lower the rate after so many such epochs")
    add("--lr-decay-gamma", type=number(float, 1e-6, 0.999999), default=0.3, help="by this factor")
    add("--seed", type=number(int, 0), default=42, help="of weights, examples and dropout")
    add("--amp", action="store_true", help="compute the network in bfloat16")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")

    add = parser.add_argument_group("output").add_argument
    add("--output", default="open-unmix", help="model folder to write; an earlier training in it is moved to <output>/previous")
    add("--overwrite", action="store_true", help="replace an earlier training instead")
    add("--checkpoint", help="model folder whose training to continue, with its flags, to --epochs in all")
    add("--quiet", action="store_true", help="print the last line only")
    add("--tensorboard", action="store_true", help="also write TensorBoard event files to <output>/tensorboard")
    add("--dry-run", action="store_true", help="one batch, one validation track, one save: does it all work?")
    args, given = parser.parse_args(arguments), parser.given(arguments)

    if args.checkpoint:
        if "output" in given:
            raise UserError("--output: a training goes on where it is; use --checkpoint alone")
        presets = saved_flags(Path(args.checkpoint))
        args.output = args.checkpoint
    else:
        tutorial = args.root is None and args.dataset in ("musdb", "synthetic")
        args.preset = args.preset or ("tutorial" if tutorial else "umx")
        presets = PRESETS[args.preset]
    for name, value in presets.items():
        if name not in given and name in vars(args):
            setattr(args, name, value)
    if args.nhop > args.nfft // 2:
        raise UserError(f"--nhop {args.nhop}: must be at most half of --nfft {args.nfft} for the inverse STFT")
    if args.hidden_size % 8:
        raise UserError(f"--hidden-size {args.hidden_size}: must be a multiple of 8")
    name = {"aligned": args.output_file, "sourcefolder": args.target_dir}.get(args.dataset, args.target_file)
    if args.dataset in LAYOUTS:
        args.target = [Path(name).stem]
    args.target = list(dict.fromkeys(args.target))
    return args, given


def saved_flags(folder):
    """The flags of the training in a model folder."""
    found = sorted(path for path in folder.glob("*.json") if path.name != "separator.json")
    if not found:
        raise UserError(f"--checkpoint {folder}: holds no training (expected {folder}/vocals.json, vocals.chkpnt)")
    flags = load(found[0]).get("args", {})
    places = ("output", "checkpoint", "device", "nb_workers", "quiet", "overwrite", "dry_run", "preset")
    return {**{name: value for name, value in flags.items() if name not in places}, "target": flags.get("targets", ["vocals"])}


# ---------------------------------------------------------------------------------------------- data to the network


class EpochBatches(torch.utils.data.Sampler):
    """The batches of an epoch, as lists of example indices: a pure function of (seed, epoch), shared out over processes.

    Set `.epoch` before iterating. Epoch e draws from the examples e * size to (e + 1) * size - 1, each once, and leaves
    out what does not fill a batch.
    """

    def __init__(self, size, batch_size, seed, rank=0, world=1):
        self.size, self.batch_size, self.seed, self.rank, self.world = size, min(batch_size, size), seed, rank, world
        self.epoch = 0

    def __len__(self):
        return self.size // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size) + self.epoch * self.size
        for step in range(len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield batch[self.rank :: self.world].tolist()


def input_statistics(dataset, args, quiet=False):
    """Mean and standard deviation per bin of the mixtures' magnitudes (averaged over channels): two lists of F numbers."""
    total, squares, frames = 0, 0, 0
    for index in tqdm(range(1 if args.dry_run else len(dataset)), desc="input statistics", unit="track", disable=quiet, leave=False):
        magnitude = stft(dataset[index][0], args.nfft, args.nhop).abs().mean(0).double()  # (F, T)
        total, squares, frames = total + magnitude.sum(1), squares + (magnitude**2).sum(1), frames + magnitude.shape[1]
    mean = total / frames
    scale = (squares / frames - mean**2).clamp_min(0).sqrt()
    scale = scale.clamp_min(max(1e-4 * scale.max().item(), 1e-12))  # a bin that is always silent
    return mean.tolist(), scale.tolist()


def magnitudes(x, y, args, device):
    """Waveforms (B, C, N) of mixture and target -> their magnitudes (B, C, F, T), in float32 on the device."""
    both = torch.stack([x, y]).to(device, non_blocking=True)
    return stft(both, args.nfft, args.nhop).abs().unbind()


# ---------------------------------------------------------------------------------------------- one epoch


def train(network, optimizer, loader, args, device, progress):
    """One pass over the training examples; returns the mean loss."""
    network.train()
    size, world = loader.batch_sampler.batch_size, loader.batch_sampler.world
    losses = torch.zeros(len(loader), device=device)  # read now and then only: reading waits for the GPU
    for step, (x, y) in enumerate(loader):
        X, Y = magnitudes(x, y, args, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            Y_hat = network(X)
        # the mean over the whole batch, however many of its examples are here; DDP averages over processes
        loss = F.mse_loss(Y_hat.float(), Y) * (len(x) * world / size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        last = step + 1 == len(loader) or args.dry_run
        if last or step % 10 == 9 or device.type == "cpu":
            check_finite(losses[: step + 1], optimizer)
            progress(step + 1, losses[step].item())
        if last:
            break
    return average(losses[: step + 1].double().sum() / (step + 1))


def check_finite(losses, optimizer):
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        lr = optimizer.param_groups[0]["lr"]
        raise FloatingPointError(f"the loss is {losses[bad[0]].item()} in step {bad[0].item() + 1}, learning rate {lr:g}")


@torch.no_grad()
def validate(network, dataset, args, device):
    """Mean loss over whole tracks, shared out over the processes."""
    network.eval()
    rank, _, world = process_rank()
    indices = range(rank, 1 if args.dry_run else len(dataset), world)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index in indices:
        x, y = dataset[index]
        X, Y = magnitudes(x[None], y[None], args, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            Y_hat = network(X)
        total += F.mse_loss(Y_hat.float(), Y)
    return average(total) * world / (1 if args.dry_run else len(dataset))


def average(value):
    """A tensor's mean over the processes, as a number."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()


# ---------------------------------------------------------------------------------------------- one target


class Training:
    """The training of one target: what an epoch changes, how it is saved, shown and resumed."""

    def __init__(self, args, target, tracks, device, say, statistics=None):
        self.args, self.target, self.device, self.say, self.folder = args, target, device, say, Path(args.output)
        self.rank, _, self.world = process_rank()
        self.train_set, self.valid_set, statistics_set = load_datasets(args, target, tracks)
        self.sample_rate = tracks[2]
        self.history = {"train_loss_history": [], "valid_loss_history": [], "train_time_history": [], "lr_history": []}
        self.statistics = statistics
        torch.manual_seed(args.seed)
        resumed = load(self.folder / f"{target}.chkpnt") if args.checkpoint and (self.folder / f"{target}.chkpnt").exists() else None
        if args.model and not resumed:
            self.network = load_networks(args.model, [target])[0][target]
        else:
            if self.rank == 0 and not resumed and not statistics:
                self.statistics = input_statistics(statistics_set, args, args.quiet)
            self.network = self.make_network()
        self.network.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=args.lr_decay_gamma, patience=args.lr_decay_patience, cooldown=10
        )
        self.stopping = EarlyStopping(args.patience)
        self.best_epoch = 0
        if resumed:
            self.restore(resumed)
        self.parallel = self.network
        if self.world > 1:  # starts by giving every process the weights of the first
            ids = [device] if device.type == "cuda" else None
            self.parallel = torch.nn.parallel.DistributedDataParallel(self.network, device_ids=ids, broadcast_buffers=False)
        batches = EpochBatches(len(self.train_set), args.batch_size, args.seed, self.rank, self.world)
        if batches.batch_size < self.world:
            raise UserError(f"--batch-size {batches.batch_size}: is less than the number of processes, {self.world}")
        workers = args.nb_workers
        if workers is None:
            workers = min(8, os.cpu_count() // torch.cuda.device_count()) if device.type == "cuda" else 0
        self.loader = torch.utils.data.DataLoader(
            self.train_set,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=ignore_interrupts,
        )

    def make_network(self):
        args = self.args
        frequencies = np.linspace(0, self.sample_rate / 2, args.nfft // 2 + 1)
        mean, scale = self.statistics or (None, None)
        return ARCHITECTURES[args.arch](
            nb_bins=args.nfft // 2 + 1,
            nb_channels=args.nb_channels,
            hidden_size=args.hidden_size,
            unidirectional=args.unidirectional,
            max_bin=int((frequencies <= args.bandwidth).sum()),
            mask=args.mask,
            input_mean=mean,
            input_scale=scale,
        )

    def restore(self, checkpoint):
        """Take up a checkpoint's weights, optimizer, scheduler, early stopping and histories."""
        try:
            self.network.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            self.history, self.statistics = checkpoint["history"], checkpoint["statistics"]
            self.stopping.best, self.stopping.bad_epochs = checkpoint["best_loss"], checkpoint["num_bad_epochs"]
            self.best_epoch = checkpoint["best_epoch"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{self.folder / self.target}.chkpnt: does not fit this training ({reason})") from None

    @property
    def epoch(self):
        """Epochs finished so far."""
        return len(self.history["train_loss_history"])

    @property
    def finished(self):
        return self.epoch >= self.args.epochs or self.stopping.stop

    def run(self):
        """Train to the last epoch, saving after each."""
        log = self.tensorboard() if self.args.tensorboard and self.rank == 0 else None
        while not self.finished:
            start = time.time()
            torch.manual_seed(self.args.seed + 1 + self.epoch * self.world + self.rank)  # dropout: a function of the epoch
            self.loader.batch_sampler.epoch = self.epoch
            lr = self.optimizer.param_groups[0]["lr"]
            with self.bar() as progress:
                train_loss = train(self.parallel, self.optimizer, self.loader, self.args, self.device, progress)
            valid_loss = validate(self.network, self.valid_set, self.args, self.device)
            if not math.isfinite(valid_loss):
                raise FloatingPointError(f"the validation loss is {valid_loss}, learning rate {lr:g}")
            self.scheduler.step(valid_loss)
            is_best = self.stopping.step(valid_loss)
            for values, value in zip(self.history.values(), (train_loss, valid_loss, time.time() - start, lr)):
                values.append(value)
            if is_best:
                self.best_epoch = self.epoch
            if self.rank == 0:
                self.save(is_best)
                if log:
                    for name, value in (("loss/train", train_loss), ("loss/valid", valid_loss), ("lr", lr)):
                        log.add_scalar(name, value, self.epoch)
                    log.flush()
            self.say(
                f"{self.target} epoch {self.epoch}/{self.args.epochs}  train {train_loss:.4f}  valid {valid_loss:.4f}"
                f"  best {self.stopping.best:.4f} (epoch {self.best_epoch})  lr {lr:.2g}  {time.time() - start:.1f} s"
            )
            if self.args.dry_run:
                break

    @contextlib.contextmanager
    def bar(self):
        """A progress bar over the steps of an epoch, counted in examples."""
        size = self.loader.batch_sampler.batch_size
        hidden = self.args.quiet or self.rank > 0
        total = len(self.loader) * size
        with tqdm(total=total, desc=f"epoch {self.epoch + 1}", unit=" examples", leave=False, disable=hidden) as bar:

            def progress(step, loss):
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(step * size - bar.n)

            yield progress

    def save(self, is_best):
        """Write weights (of the best epoch), checkpoint, record and curves; the checkpoint last of what a resume needs."""
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        if is_best:
            save(state, self.folder / f"{self.target}.pth")
        progress = dict(best_loss=self.stopping.best, best_epoch=self.best_epoch, num_bad_epochs=self.stopping.bad_epochs)
        optimizer, scheduler = self.optimizer.state_dict(), self.scheduler.state_dict()
        checkpoint = dict(state_dict=state, optimizer=optimizer, scheduler=scheduler, history=self.history, statistics=self.statistics)
        save({"epoch": self.epoch, **checkpoint, **progress}, self.folder / f"{self.target}.chkpnt")
        self.save_record()

    def save_record(self):
        """Write <target>.json and <target>.png, which follow from the checkpoint."""
        progress = dict(best_loss=self.stopping.best, best_epoch=self.best_epoch, num_bad_epochs=self.stopping.bad_epochs)
        record = {
            "args": {**vars(self.args), "target": self.target, "targets": self.args.target},
            "epochs_trained": self.epoch,
            **progress,
            **self.history,
            "input_statistics": self.statistics and dict(zip(("mean", "scale"), self.statistics)),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "commit": commit(),
        }
        save(record, self.folder / f"{self.target}.json")
        plot_curves(self.history, self.best_epoch, self.target, self.folder / f"{self.target}.png")

    def tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: needs the package tensorboard (pip install tensorboard)") from None
        return SummaryWriter(self.folder / "tensorboard" / self.target, purge_step=self.epoch + 1)


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer


def commit():
    """The git commit of these scripts, or None."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plot_curves(history, best_epoch, target, path):
    """Draw both losses over epochs; mark the best epoch and the steps of the learning rate."""
    picture, axes = figure(1, 1, (7, 4))
    axis = axes[0, 0]
    epochs = range(1, len(history["train_loss_history"]) + 1)
    axis.plot(epochs, history["train_loss_history"], label="training", color="tab:blue")
    axis.plot(epochs, history["valid_loss_history"], label="validation", color="tab:orange")
    axis.plot(best_epoch, history["valid_loss_history"][best_epoch - 1], "o", color="tab:orange", label=f"best: epoch {best_epoch}")
    for epoch, (before, after) in enumerate(itertools.pairwise(history["lr_history"]), start=2):
        if after < before:
            axis.axvline(epoch, color="gray", linewidth=0.8, linestyle=":")
            axis.annotate(f"lr {after:.1g}", (epoch, 0.97), xycoords=("data", "axes fraction"), fontsize=7, color="gray", va="top")
    axis.set(title=target, xlabel="epoch", ylabel="mean squared error of magnitudes", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    save_figure(picture, path)


# ---------------------------------------------------------------------------------------------- the folder, the script


def prepare_folder(args, sample_rate, say):
    """Make the model folder, put an earlier training of the same targets aside, write separator.json."""
    folder = Path(args.output)
    settings = dict(sample_rate=sample_rate, nfft=args.nfft, nhop=args.nhop, nb_channels=args.nb_channels)
    kept = [p.stem for p in folder.glob("*.json") if p.name != "separator.json" and (p.stem not in args.target or args.checkpoint)]
    if (folder / "separator.json").exists() and kept and load(folder / "separator.json") != settings:
        raise UserError(f"{folder}: holds {', '.join(kept)} with another STFT, sample rate or channel count; choose another --output")
    for target in args.target if not args.checkpoint else []:
        earlier = [path for path in sorted(folder.glob(f"{target}.*")) if path.is_file()]
        if not earlier:
            continue
        if args.overwrite:
            for path in earlier:
                path.unlink()
            continue
        place = folder / "previous"
        place.mkdir(exist_ok=True)
        number_ = next(n for n in itertools.count(1) if not any(place.glob(f"{target}-{n}.*")))
        for path in earlier:
            os.replace(path, place / f"{target}-{number_}{path.suffix}")
        say(
            f"the earlier training of {target} was moved to {place}/{target}-{number_}.*"
            f" (python train.py --checkpoint {folder} would have continued it)"
        )
    save(settings, folder / "separator.json")


def fine_tuning(args, given):
    """Take over the settings of the weights that are fine-tuned; returns their sample rate."""
    networks, settings = load_networks(args.model, args.target)
    network = networks[args.target[0]]
    theirs = dict(nfft=settings["nfft"], nhop=settings["nhop"], nb_channels=settings["nb_channels"], mask=network.mask)
    theirs.update(hidden_size=network.fc2.out_features, arch=next(n for n, c in ARCHITECTURES.items() if type(network) is c))
    theirs["unidirectional"] = network.unidirectional
    for name, value in theirs.items():
        if name in given and getattr(args, name) != value:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {args.model} has {value}; leave the flag out")
        setattr(args, name, value)
    return int(settings["sample_rate"])


def start_processes(device):
    """Join the processes that torchrun started; one process needs none of this."""
    if process_rank()[2] > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # the first process may have to decode a whole dataset while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))


def main():
    args, given = parse_args(sys.argv[1:])
    rank, _, world = process_rank()
    device = select_device(args.device)
    say = print if rank == 0 and not args.quiet else lambda *_: None
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    start_processes(device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    precision = "bfloat16" if args.amp else "TF32" if device.type == "cuda" else "float32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    say(f"{device} ({name}), {precision}" + f", {world} processes" * (world > 1))
    if args.preset:
        changed = "  ".join(f"--{n.replace('_', '-')} {getattr(args, n)}" for n in PRESETS[args.preset])
        say(f"preset {args.preset}: {changed or 'the published recipe'}")
    folder = Path(args.output)
    try:
        model_rate = fine_tuning(args, given) if args.model else None
        if rank > 0:
            dist.barrier()  # the first process fetches and decodes what is missing
        tracks = index_dataset(args)
        if rank == 0 and world > 1:
            dist.barrier()
        if model_rate:
            tracks = (*tracks[:2], model_rate, tracks[3])
        say(f"{len(tracks[0])} training tracks, {len(tracks[1])} validation tracks, {tracks[2]} Hz")
        for target in args.target:
            target_sources(target, tracks[0])  # for its check, before anything is moved
        if rank == 0:
            prepare_folder(args, tracks[2], say)
        statistics = None
        for target in args.target:
            training = Training(args, target, tracks, device, say, statistics)
            training.run()
            statistics = training.statistics  # of the mixtures: the same for every target
    except KeyboardInterrupt:
        if rank == 0:
            again = f"continue with: python train.py --checkpoint {folder}"
            saved = any((folder / f"{target}.chkpnt").exists() for target in args.target)
            print(f"\ninterrupted; {again}" if saved else "\ninterrupted before the first epoch was saved", file=sys.stderr)
        sys.exit(130)
    except FloatingPointError as error:
        kept = f"the best model so far stays in {folder}" if any(folder.glob("*.pth")) else "there is no model yet"
        raise UserError(f"{error}: {kept}; try a lower --lr" + ", or without --amp" * args.amp) from None
    if rank == 0:
        print(f"trained {', '.join(args.target)}: {folder}/. Next: python test.py SONG.wav --model {folder}, or python eval.py --model {folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
