"""What each recipe of README.md brings, in dB, on songs that no training has seen.

    python benchmarks/recipes.py                               all rows: hours on two cores
    python benchmarks/recipes.py --rows GRU L1 --epochs 5 --seeds 1 2 --targets vocals
    python benchmarks/recipes.py --folder MY_COPY --flags "--arch mine"    a change of your own

A row is a copy of the scripts with a recipe applied, trained by its own train.py and scored by its
own eval.py; the first row, "base", is the published recipe in the tutorial's size. All else is the
same: data, steps, seed by seed. Interrupted, it goes on with the next row and seed: each leaves a
JSON file in --output, which counts as long as the code and the flags are those that made it.

A row's figure is the mean over the targets of the median over songs of their SDR (medians over
frames). "difference" is to the base with the same seed: mean and deviation over the seeds. "p" is
Wilcoxon's of the songs' differences (means over seeds and targets), paired: above 0.05 it may be
the songs' chance. What the seeds' chance may be, the deviation tells.
"""

import argparse
import difflib
import hashlib
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import FOLDER, hardware_and_versions, print_rows
from scipy.stats import wilcoxon

from data import SONGS, find_synthetic

sys.path.insert(0, str(FOLDER / "tests"))
from test_readme import RECIPES, SCRIPTS, apply

COLUMNS = ("difference", "p", "seconds", "lines", "seeds")  # beside the targets' SDR
JOINT = "All targets in one pass"
# The published recipe on a laptop: a step, an epoch and a rate as in the tutorial preset.
SIZE = "--preset umx --batch-size 4 --seq-dur 3 --samples-per-epoch 384 --lr 0.002"
PLATEAU = "--lr-decay-patience 3"
SCHEDULE, AUGMENTATION = "Another optimizer and schedule", "Another augmentation"
AVERAGE, WIENER = "An average of the weights", "Another Wiener filter"
ROWS = {  # name: the recipe, which of its diffs, and flags
    "L1": ("Another loss", 0, ""),
    "log MSE": (None, 0, "--loss log_mse"),
    "masks that start at a quarter": (None, 0, "--mask-start 0.25"),
    "log MSE, masks that start at a quarter": (None, 0, "--loss log_mse --mask-start 0.25"),
    "preset best": (None, 0, "--preset best"),  # these, cosine and a dropout of 0.1
    "compressed magnitudes": ("Another loss", 1, ""),
    "time-domain loss": ("Another loss", 2, ""),
    "dropout of 0.1": (None, 0, "--dropout 0.1"),
    "cosine": (None, 0, "--schedule cosine"),
    "AdamW, cosine": (SCHEDULE, 0, "--schedule cosine"),
    "one cycle": (SCHEDULE, 1, ""),
    "average of the weights": (AVERAGE, 0, ""),
    "L1; AdamW, cosine": (SCHEDULE, 0, "--schedule cosine --loss l1"),
    "L1; average of the weights": (AVERAGE, 0, "--loss l1"),
    "ReLU mask": (None, 0, "--mask relu"),
    "half the hidden size": (None, 0, "--hidden-size {half}"),
    "twice the hidden size": (None, 0, "--hidden-size {double}"),
    "GRU": ("Another network", 0, "--arch gru"),
    "convolutions": ("Another network", 1, "--arch conv"),
    "log input": ("Another representation", 0, ""),
    "STFT of 2048": (None, 0, "--nfft 2048 --nhop 512"),
    "no augmentation": (None, 0, "--source-augmentations"),
    "polarity": (AUGMENTATION, 0, "--source-augmentations gain channelswap polarity"),
    "limiter": (AUGMENTATION, 1, "--source-augmentations gain channelswap limiter"),
    "two songs' same source": (AUGMENTATION, 2, ""),
    "share of the mixture, no Wiener filter": (WIENER, 0, ""),
    "joint": (JOINT, 0, "--arch joint --target all"),
    "joint, X-UMX's loss": (JOINT, 0, "--arch joint --target all --loss xumx"),
    "X-UMX, loss alone": (JOINT, 1, "--arch apart --target all --loss xumx"),
    "X-UMX, bridges alone": (None, 0, "--arch xumx --target all"),
    "preset best, X-UMX's bridges": (None, 0, "--preset best --arch xumx --target all"),
    "X-UMX": (None, 0, "--arch xumx --target all --loss xumx"),
    "X-UMX; cosine": (None, 0, "--arch xumx --target all --loss xumx --schedule cosine"),
    "X-UMX, through the Wiener filter": (WIENER, 1, "--arch xumx --target all"),
}


def make_copy(folder, source, recipe=None, number=0):
    """The six scripts of `source`, with the recipe's diff applied where one is named."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for script in SCRIPTS:
        shutil.copy(Path(source, script), folder)
    if recipe:
        apply(re.findall(r"```diff\n(.*?)```", dict(RECIPES)[recipe], re.S)[number], folder)


def lines_changed(folder):
    """Lines that come and go against the scripts as they are, such as "+9 -1"."""
    signs = ""
    for script in SCRIPTS:
        texts = [Path(f, script).read_text(encoding="utf-8").splitlines() for f in (FOLDER, folder)]
        signs += "".join(line[0] for line in [*difflib.unified_diff(*texts, n=0)][2:])
    return f"+{signs.count('+')} -{signs.count('-')}"


def measure(copy, name, flags, epochs, seed, args):
    """Train and score one row with one seed, unless that is done: what its JSON file holds."""
    path = args.output / "results" / f"{name}-{seed}.json"
    code = "".join(Path(copy, script).read_text(encoding="utf-8") for script in SCRIPTS)
    model, scores = copy / "model", copy / "scores"
    sizes = {"half": args.hidden_size // 2, "double": args.hidden_size * 2}
    training = [*SIZE.split(), "--hidden-size", args.hidden_size, "--epochs", epochs]
    falls = re.search(r"--(schedule[ =]cosine|preset[ =]best)(\s|$)", f"{flags} {args.training}")
    training += [] if falls else PLATEAU.split()  # a cosine has no plateau to wait for
    training += [] if "--target " in flags else ["--target", *args.targets]
    training += ["--seed", seed, *shlex.split(f"{args.data} {args.training}")]
    training += shlex.split(flags.format(**sizes))
    scoring = ["--targets", *args.targets, *shlex.split(args.data), "--method", "model"]
    made_by = [hashlib.sha256(code.encode()).hexdigest(), *map(str, training + scoring)]
    if path.exists() and json.loads(path.read_text())["made_by"] == made_by:
        return json.loads(path.read_text())
    for folder in (model, scores):
        shutil.rmtree(folder, ignore_errors=True)
    run(copy, "train.py", *training, "--output", model)
    run(copy, "eval.py", *scoring, "--model", model, "--evaldir", scores)
    records = [json.loads(path.read_text()) for path in model.glob("*.json")]
    seconds = sum(sum(record.get("train_time_history", [])) for record in records)
    sdr = {target: {} for target in args.targets}
    for track in sorted(scores.glob("test/*.json")):
        for target in json.loads(track.read_text())["targets"]:
            frames = np.array([frame["metrics"]["SDR"] for frame in target["frames"]], float)
            if target["name"] in sdr and np.isfinite(frames).any():  # None, NaN: silence
                sdr[target["name"]][track.stem] = float(np.nanmedian(frames))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"made_by": made_by, "seconds": seconds, "sdr": sdr}))
    unfinished.rename(path)
    return json.loads(path.read_text())


def run(copy, script, *arguments):
    """A script of a copy; what it says is shown where it fails."""
    command = [sys.executable, str(copy.resolve() / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def by_target(result):
    """{target: the median over songs of its SDR, in dB}."""
    return {target: statistics.median(songs.values()) for target, songs in result["sdr"].items()}


def mean_of(results, number):
    return statistics.mean(map(number, results.values()))


def seconds_of(result):
    return result["seconds"]


def table_row(name, results, base, copy):
    """A line of the table from the results {seed: ...} of a row and of the base."""
    row = {"row": name, "lines": lines_changed(copy), "seeds": len(results)}
    row["seconds"] = f"{mean_of(results, seconds_of):.0f}"
    for target in next(iter(results.values()))["sdr"]:
        row[target] = f"{mean_of(results, lambda result: by_target(result)[target]):.2f}"
    if results is not base:
        differences, songs = [], {}
        for seed, result in results.items():
            ours, theirs = (statistics.mean(by_target(r).values()) for r in (result, base[seed]))
            differences.append(ours - theirs)
            for target, scores in result["sdr"].items():
                others = base[seed]["sdr"][target]
                for song in scores.keys() & others.keys():
                    songs.setdefault(song, []).append(scores[song] - others[song])
        spread = f" ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
        row["difference"] = f"{statistics.mean(differences):+.2f}{spread}"
        p = wilcoxon([*map(np.mean, songs.values())]).pvalue
        row["p"] = "<0.001" if p < 0.001 else f"{p:.3f}"
    return row


def parse_args():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    add, names = parser.add_argument, list(ROWS)
    add("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    add("--folder", type=Path, help="a changed copy of the scripts, in place of the rows")
    add("--flags", default="", help="flags of train.py for --folder")
    add("--targets", nargs="+", default=["vocals", "drums", "bass", "other"], help="what is scored")
    add("--epochs", type=int, default=20, help="of each training, of 96 steps")
    add("--hidden-size", type=int, default=256, help="of the base")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--data", default="", help="flags of train.py and eval.py, in place of synthesized songs")
    add("--songs", type=int, default=24, help="synthesized songs to score, beside the real one")
    add("--training", default="", help='more flags of every training, such as "--device cuda"')
    equal = "rows also with as many epochs as take the base's seconds"
    add("--equal-seconds", action="store_true", help=equal)
    add("--output", type=Path, default=Path("recipes"), help="folder of copies and results")
    args = parser.parse_args()
    if args.folder and args.folder.resolve().name == "base":
        parser.error("--folder: is called base, as the scripts as they are; rename it")
    return args


def main():
    args = parse_args()
    if not args.data:
        songs = find_synthetic(args.output.resolve() / "songs", songs={**SONGS, "test": args.songs})
        args.data = f"--dataset synthetic --root {shlex.quote(str(songs))}"
    rows = {args.folder.resolve().name: (None, 0, args.flags)} if args.folder else {}
    rows = {"base": (None, 0, ""), **(rows or {name: ROWS[name] for name in args.rows})}
    table, base = [], {}
    for name, (recipe, number, flags) in rows.items():
        copy, epochs = args.output / "copies" / re.sub(r"\W+", "-", name), args.epochs
        make_copy(copy, args.folder if args.folder and name != "base" else FOLDER, recipe, number)
        twice = args.equal_seconds and name != "base"
        for what in (name, f"{name}, equal seconds")[: 1 + twice]:
            results = {}
            try:
                for seed in args.seeds:
                    results[seed] = measure(copy, what, flags, epochs, seed, args)
                    numbers = json.dumps(by_target(results[seed]))
                    print(f"{what}, seed {seed}, {epochs} epochs: {numbers}", flush=True)
            except RuntimeError as error:  # the other rows go on
                print(f"{what} failed: {error}", flush=True)
                if not base:
                    raise
                break
            base = base or results
            table.append(table_row(what, results, base, copy))
            epochs *= mean_of(base, seconds_of) / mean_of(results, seconds_of)
            epochs = max(1, round(epochs))
    print("\n" + hardware_and_versions(), end="\n\n")
    print_rows(table, ("row", *args.targets, *COLUMNS))


if __name__ == "__main__":
    main()
