"""Run all benchmarks against the published implementation and print one table.

    python benchmarks/run.py [--quick]

It takes a quarter of an hour on two cores, twice that on slow ones, and --quick, which only shows
that everything runs, two or three minutes. What each fast form of ours buys is measured by
tricks.py.
"""

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from common import main, print_rows

BENCHMARKS = ("data_loading", "training", "separation", "evaluation", "onnx_export")
BENCHMARKS += ("live_separation",)


def measure_one(name, quick):
    return importlib.import_module(name).measure(quick)


def measure(quick=False):
    rows = []
    for name in BENCHMARKS:
        print(f"{name} ...", flush=True)
        # each in a process of its own, as if run by itself: what one leaves in memory would change
        # the next one's speed
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measure_one, name, quick).result()
        print_rows(measured)  # so that what is done is not lost with an interruption
        rows += measured
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
