"""What the benchmarks share: timing, memory, a description of the machine, a table.

Each benchmark has `measure(quick=False)`, which returns rows: dicts of "name", "ours", "theirs",
"ratio", "unit", "spread" (of our timing: (longest - shortest) / median) and "target" (text); None
where a row has no such entry.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(FOLDER))  # the scripts' own folder: benchmarks import them after this module

from utils import import_torchaudio  # noqa: E402

PEERS = ("openunmix", "norbert", "museval", "musdb", "stempeg")
COLUMNS = ("name", "ours", "theirs", "ratio", "unit", "spread", "target")


def import_openunmix():
    """The published implementation, with its data, model and filtering modules."""
    import_torchaudio()
    import openunmix
    import openunmix.data
    import openunmix.filtering
    import openunmix.model

    return openunmix


def hardware_and_versions():
    """Processor, cores, memory, GPU, Python and package versions, as a few lines of text."""
    import torch

    processor, memory = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = f", {size / 2**30:.0f} GiB memory"
    system = f"{platform.system()} {platform.release()}"
    lines = [f"{processor}, {os.cpu_count()} cores{memory}, {system}"]
    if torch.cuda.is_available():
        lines.append(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    packages = [f"torch {torch.__version__} ({torch.get_num_threads()} threads)"]
    for name in ("torchaudio", "numpy", "soundfile", "av", *PEERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages.append(f"{name} {importlib.metadata.version(name)}")
    lines.append(f"Python {platform.python_version()}, " + ", ".join(packages))
    return "\n".join(lines)


def timings(*functions, repeats=5, warmup=1):
    """Time functions in turn, so that a busy moment hits them alike.

    Returns [(median in seconds, spread), ...], one pair for each function; spread is
    (longest - shortest) / median.
    """
    seconds = [[] for _ in functions]
    for repeat in range(warmup + repeats):
        for function, measured in zip(functions, seconds):
            start = time.perf_counter()
            function()
            if repeat >= warmup:
                measured.append(time.perf_counter() - start)
    return [median_and_spread(measured) for measured in seconds]


def median_and_spread(values):
    """The median, and (largest - smallest) / median."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / median


def peak_memory(code, timeout=600):
    """Run Python code in a fresh process in the scripts' folder.

    Returns its peak resident memory in MB and what it printed. Compare with
    `peak_memory("import ...")[0]`: what the imports alone take.
    """
    # VmHWM starts anew with each program; ru_maxrss, the only figure elsewhere, would also count
    # the parent's memory.
    tail = """
import pathlib, resource, sys
status = pathlib.Path("/proc/self/status")
if status.exists():
    peak = next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("\\n", peak, sep="")
"""
    settings = dict(cwd=FOLDER, capture_output=True, text=True, timeout=timeout)
    done = subprocess.run([sys.executable, "-c", code + tail], **settings)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr}")
    output, _, peak = done.stdout.rstrip().rpartition("\n")
    return int(peak) / 1e6, output.rstrip()


def print_rows(rows, columns=COLUMNS):
    """Print rows as a table of Markdown."""

    def text(value):
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return "" if value is None else str(value)

    table = [columns] + [tuple(text(row.get(column)) for column in columns) for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for number, line in enumerate(table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def main(measure, description, columns=COLUMNS, devices=()):
    """A benchmark's command line: `python benchmarks/<name>.py [--quick]`.

    `measure` is called with the one of `devices` that --device names, where it knows several.
    """
    parser = argparse.ArgumentParser(description=description)
    if devices:
        parser.add_argument("--device", choices=devices, help="(default: each that is there)")
    quick = "smaller inputs, fewer repeats: does it run?"
    parser.add_argument("--quick", action="store_true", help=quick)
    args = parser.parse_args()
    print(hardware_and_versions(), end="\n\n", flush=True)
    print_rows(measure(**vars(args)), columns)
