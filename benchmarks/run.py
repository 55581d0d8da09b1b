"""Run all benchmarks against the published implementation and print one table: python benchmarks/run.py [--quick]"""

import importlib

from common import main

BENCHMARKS = ("data_loading", "training", "separation", "evaluation")


def measure(quick=False):
    rows = []
    for name in BENCHMARKS:
        print(f"{name} ...", flush=True)
        rows += importlib.import_module(name).measure(quick)
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
