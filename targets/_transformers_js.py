"""The folder as transformers.js reads it: the model in ``onnx/``, named by its precision, and a note in config.json.

Source: transformers.js 4.3, ``src/utils/dtypes.js`` and ``src/utils/model-loader.js``; version 3 reads the same names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from calque.artifact import Artifact, GraphSpec

FOLDER = "onnx"

# Calque's precision: what transformers.js calls it, and how the file's name ends.
DTYPES = {
    "fp32": ("fp32", ""),
    "fp16": ("fp16", "_fp16"),
    "int8": ("int8", "_int8"),
    "int8-static": ("int8", "_int8"),
    "int4": ("q4", "_q4"),
}


def arrange(artifact: Artifact, data: str) -> Artifact:
    """Return the artifact with its one graph in ``onnx/`` and the weights, ``data`` until now, beside it."""
    dtype, suffix = DTYPES[artifact.precision]
    [(name, graph)] = artifact.graphs.items()
    file = f"{Path(graph.file).stem}{suffix}.onnx"
    (artifact.folder / FOLDER).mkdir()
    external = (artifact.folder / data).is_file()
    if external:
        (artifact.folder / data).rename(artifact.folder / FOLDER / f"{file}_data")
    _move_graph(artifact.folder / graph.file, artifact.folder / FOLDER / file, f"{file}_data")
    _describe(artifact.folder / "config.json", dtype, {file: 1} if external else {})
    return replace(artifact, graphs={name: GraphSpec(f"{FOLDER}/{file}", graph.inputs, graph.outputs)})


def _move_graph(old: Path, new: Path, data: str) -> None:
    """The graph lies at ``new`` and reads its weights from ``data`` beside it."""
    import onnx

    model = onnx.load(old, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data
    onnx.save(model, new)
    old.unlink()


def _describe(path: Path, dtype: str, chunks: dict[str, int]) -> None:
    """config.json says which file to load, so that ``from_pretrained`` needs no options."""
    config = json.loads(path.read_text(encoding="utf-8"))
    told = {"dtype": dtype, "use_external_data_format": chunks}
    config["transformers.js_config"] = {**config.get("transformers.js_config", {}), **told}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
