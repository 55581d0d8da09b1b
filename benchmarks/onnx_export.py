"""Separation by onnxruntime against PyTorch: size, time, memory and stems of one model's files.

    python benchmarks/onnx_export.py [--quick]

A 3-minute stereo song to four WAV files by test.py (hidden size 512, one Wiener iteration, two
threads), each run in a process of its own: "ours" is `--model model.onnx`, "theirs" the model
folder. Then the same with smaller weights: 16-bit floats or 8-bit integers, a scale for each row,
which onnxruntime widens once, when it loads them; and its own 8-bit arithmetic. Weights are random,
which costs as much time as trained ones; what rounding them costs in dB is a rough guide only.
"""

import logging
import tempfile
from pathlib import Path

from common import import_openunmix, main, median_and_spread

import_openunmix()

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnx.numpy_helper  # noqa: E402
import soundfile  # noqa: E402
from separation import OURS, TARGETS, excerpt, row, run, write_song  # noqa: E402
from tests.conftest import remembering, sdr  # noqa: E402
from tests.conftest import make_model as random_model  # noqa: E402

from model import export_onnx, load_separator  # noqa: E402
from utils import save  # noqa: E402


def with_small_weights(model, kind):
    """Keep an ONNX model's larger weights as float16 or int8; nodes before it make them float32."""
    make, from_array = onnx.helper.make_node, onnx.numpy_helper.from_array
    graph, nodes = model.graph, []
    for weight in list(graph.initializer):
        values, name = onnx.numpy_helper.to_array(weight), weight.name
        if values.dtype != np.float32 or values.size < 1000 or values.ndim < 2:
            continue
        graph.initializer.remove(weight)
        scale = np.ones((1,) * values.ndim, np.float32)
        if kind is np.int8:  # what meets one input vector: a row of an LSTM's, else a column
            scale = np.abs(values).max(2 if values.ndim == 3 else 0, keepdims=True) / 127 + 1e-12
            values = np.round(values / scale)
        graph.initializer.append(from_array(values.astype(kind), f"{name}.small"))
        graph.initializer.append(from_array(scale, f"{name}.scale"))
        nodes.append(make("Cast", [f"{name}.small"], [f"{name}.wide"], to=onnx.TensorProto.FLOAT))
        nodes.append(make("Mul", [f"{name}.wide", f"{name}.scale"], [name]))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def smaller_files(folder, path):
    """{name: file} of the same networks, at first as they are."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = {"float32": path}
    for name, kind in (("float16 weights", np.float16), ("int8 weights", np.int8)):
        files[name] = folder / f"{name}.onnx"
        onnx.save(with_small_weights(onnx.load(path), kind), files[name])
    files["int8 arithmetic"] = folder / "int8 arithmetic.onnx"
    logging.disable()  # it advises to prepare the graph, which would need a fixed T
    settings = dict(weight_type=QuantType.QInt8, per_channel=True)
    quantize_dynamic(path, files["int8 arithmetic"], **settings)
    logging.disable(logging.NOTSET)
    return files


def measure(quick=False):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, song = folder / "model", str(folder / "song.wav")
        random_model(model, hidden_size=64 if quick else 512)
        separator = load_separator(model)
        for target, network in separator.target_models.items():  # whose LSTMs matter
            save(remembering(network).state_dict(), model / f"{target}.pth")
        export_onnx(separator, folder / "model.onnx")
        minutes, repeats = (0.2, 1) if quick else (3, 2)
        write_song(song, excerpt(folder)[1], minutes)
        models = {"PyTorch": model, **smaller_files(folder, folder / "model.onnx")}
        measured = {name: [] for name in models}
        for _ in range(repeats):
            for name, file in models.items():
                values = dict(song=song, folder=str(file), outdir=str(folder / name), flags=[])
                measured[name].append(run(OURS, 1800, **values))
        times = {
            name: median_and_spread([run[0] for run in runs]) for name, runs in measured.items()
        }
        peaks = {name: max(run[1] for run in runs) for name, runs in measured.items()}
        weights = sum(path.stat().st_size for path in model.glob("*.pth")) / 1e6
        reference = [
            soundfile.read(folder / "PyTorch" / "song" / f"{name}.wav")[0] for name in TARGETS
        ]
        for name, file in list(models.items())[1:]:
            stems = [
                soundfile.read(folder / name / "song" / f"{target}.wav")[0] for target in TARGETS
            ]
            what = f"ONNX, {name}"
            seconds, spread = times[name]
            length = f"{minutes:g}-minute song"
            rows += [
                row(f"{what}: {length}", seconds, times["PyTorch"][0], spread=spread),
                row(f"{what}: peak memory", peaks[name], peaks["PyTorch"], "MB"),
                row(f"{what}: size", file.stat().st_size / 1e6, weights, "MB"),
                row(f"{what}: its stems", min(map(sdr, reference, stems)), unit="dB"),
            ]
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
