"""Stems while the music comes: a causal model (train.py --unidirectional) on blocks of samples.

    cat song.raw | python docs/live.py --targets vocals | aplay -f FLOAT_LE -c 2 -r 44100

Float32 samples at the model's rate, channels in turn; stems (J * C channels) n_fft samples later.
"""

import sys

import torch

sys.path.append(f"{sys.path[0]}/..")
import model
from utils import Parser, UserError, patched, run


@torch.inference_mode()
def live(separator, blocks):
    """Blocks of samples (C, n) in turn -> as soon as they are done, blocks of stems (J, C, n)."""
    n_fft, n_hop, heard, states = separator.n_fft, separator.n_hop, 0, {}

    def listen():
        nonlocal heard
        for block in blocks:
            heard += block.shape[-1]
            yield block[None]

    def estimates():
        for X in model.stft_blocks(listen(), 1, n_fft, n_hop):  # (1, C, F, 1)
            x, V, none = model.magnitude(X, separator.nb_channels), [], lambda *_: None
            # what is fast for many frames takes three times as long for one
            with patched(model, "is_plain", none), patched(torch.backends.mkldnn, "enabled", False):
                for network in separator.networks:  # network(x), but its LSTM goes on
                    h = network.encode(x)
                    context, states[network] = network.lstm(h, states.get(network))
                    V.append(network.decode(network.join(h, context), x))
            yield separator.filter(separator.stack(V), X)  # (1, J, C, F, 1)

    yield from (y[0] for y in model.istft_blocks(estimates(), lambda: heard, n_fft, n_hop))


def main(arguments=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default="open-unmix", help="folder of a causal model")
    parser.add_argument("--targets", nargs="+", default=["vocals"], help="which of its targets")
    args = parser.parse_args(arguments)
    separator = model.load_separator(args.model, args.targets, niter=0)
    channels, x = separator.nb_channels, torch.randn(separator.nb_channels, 3 * separator.n_fft)
    ours = all(hasattr(network, "lstm") for network in separator.networks)
    if not ours or (torch.cat([*live(separator, [x])], -1) - separator(x[None])[0]).std() > 1e-5:
        raise UserError(f"{args.model}: not causal by its LSTM alone; train it --unidirectional")
    parts = iter(lambda: sys.stdin.buffer.read(4 * channels * separator.n_hop), b"")
    blocks = (torch.frombuffer(bytearray(part), dtype=torch.float32) for part in parts)
    for stems in live(separator, (block.view(-1, channels).T for block in blocks)):
        sys.stdout.buffer.write(stems.flatten(0, 1).T.numpy().tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    run(main)
