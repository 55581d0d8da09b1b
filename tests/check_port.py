"""Whether a port of Open-Unmix is right (docs/porting.md): its arrays against the reference.

python tests/check_port.py spectrum|network|wiener|stems mine.npy
"""

import sys
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).with_name("porting_reference.npz")
NEEDED = {"spectrum": 90, "network": 90, "wiener": 70, "stems": 70}  # dB


def check(stage, found):
    """(right or not, what there is to say) of an array of a stage."""
    expected = np.load(REFERENCE)[stage]
    if found.shape != expected.shape:
        return False, f"the shape is {found.shape}, not {expected.shape}"
    error, power = np.abs(found - expected) ** 2, np.sum(np.abs(expected) ** 2)
    agreement = 10 * np.log10(power / max(error.sum(), 1e-30))
    if agreement >= NEEDED[stage]:  # so that NaN is not
        return True, f"{agreement:.0f} dB: right"
    place = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    gain = np.vdot(expected, found).real / power
    said = f"{agreement:.0f} dB, less than {NEEDED[stage]}: wrong; {gain:.4g} times the reference"
    return False, f"{said}, farthest at {place}: {found[place]:.4g}, not {expected[place]:.4g}"


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in NEEDED:
        sys.exit(__doc__)
    right, said = check(sys.argv[1], np.load(sys.argv[2]))
    print(f"{sys.argv[1]}: {said}")
    sys.exit(0 if right else 1)
