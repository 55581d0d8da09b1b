"""Summary figures of seeded networks on the real excerpt, as openunmix 1.3.0 gives them.

python tests/make_figures.py writes them into figures.json.
"""

import json
import tempfile
from pathlib import Path

import torch

FIGURES = Path(__file__).with_name("figures.json")
TARGETS = ("vocals", "drums", "bass", "other")


def summary(estimates, excerpt):
    """Norms, and SDRs in dB against the true sources, of estimates (J, C, N)."""
    sources = torch.stack([excerpt[name][:, : estimates.shape[-1]] for name in TARGETS])
    errors = (sources - estimates).square().sum((1, 2))
    sides = estimates[:, 0] - estimates[:, 1]
    return {
        "norm": estimates.square().sum((1, 2)).sqrt().tolist(),
        "left minus right": sides.square().sum(1).sqrt().tolist(),
        "sdr": (10 * torch.log10(sources.square().sum((1, 2)) / errors)).tolist(),
    }


def make(excerpt):
    from conftest import random_network
    from openunmix.model import OpenUnmix, Separator

    networks = {}
    for j, target in enumerate(TARGETS):
        ours = random_network(j, hidden_size=64, mask="relu")
        networks[target] = OpenUnmix(nb_bins=2049, hidden_size=64, max_bin=1487)
        networks[target].load_state_dict(ours.state_dict())
        networks[target].eval()
    with torch.no_grad():
        estimates = Separator(networks, niter=1)(excerpt["mixture"][None, :, :176400])[0]
    FIGURES.write_text(json.dumps(summary(estimates, excerpt), indent=1))


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import EXCERPT, read_tracks

    from data import decode_stem

    with tempfile.TemporaryDirectory() as folder:
        decode_stem(EXCERPT, Path(folder, "song"))
        make(read_tracks(Path(folder, "song")))
