"""The weights of a model in one file of safetensors, tied ones once, written some rows of one tensor at a time.

::

    model.safetensors    a header, then the bytes of each tensor: those of wider types first, so that each lies on its own size

Source: safetensors format, README@0.8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.export.graph_signature import InputKind

from calque.runtime.aotinductor_session import DTYPES, mapped
from calque.weights import pieces

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from calque.traced import TracedModel

# The header is padded so that the first tensor lies on a line of the cache.
LINE = 64
NAMES = {getattr(torch, name): stored for stored, name in DTYPES.items()}


def unite(program: ExportedProgram, model: TracedModel) -> dict[str, torch.Tensor]:
    """Return the fake of every weight that the program reads, by name; of tied ones the first is read in the place of all."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    held: dict[int, torch.fx.Node] = {}
    kept = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.target is None:
            continue
        node = nodes[spec.arg.name]
        if spec.target in model.weights:
            first = held.setdefault(id(model.weights[spec.target]), node)
            if first is not node:
                node.replace_all_uses_with(first)
        if node.users:
            kept[spec.target] = node.meta["val"]
    return kept


def write(file: Path, model: TracedModel, kept: Mapping[str, torch.Tensor]) -> int:
    """``file`` holds the weights of those names; return how many bytes it has.

    Raises:
        AssertionError: a weight gave other bytes than its shape says.
    """
    order = sorted(kept, key=lambda name: (-kept[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        size = math.prod(kept[name].shape) * kept[name].element_size()
        entries[name] = {"dtype": NAMES[kept[name].dtype], "shape": list(kept[name].shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            made = pieces(model.weights[name]) if name in model.weights else iter([model.constant(name)])
            for piece in made:
                held = piece.to(kept[name].dtype).contiguous().reshape(-1)
                if held.numel():
                    out.write(held.view(torch.uint8).numpy().data)
        if out.tell() != 8 + len(text) + at:
            raise AssertionError(f"{file.name} has {out.tell()} bytes, {8 + len(text) + at} expected")
    return 8 + len(text) + at


def integers(file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the integers that a file holds, int8 [out, in], and their scales [out, groups], by the name of the weight."""
    from calque.panel_ops import out_of_halves, out_of_panels, out_of_scales

    held, found = mapped(file), {}
    for name in held:
        weight, _, how = name.rpartition(".q.")
        if how == "panels":
            scale = out_of_scales(held[f"{weight}.scale.panels"])
            outputs = int(scale.bool().any(1).sum())  # no scale is 0 but those that fill the last panel
            found[weight] = out_of_panels(held[name])[:outputs], scale[:outputs]
        elif how == "halves":
            found[weight] = out_of_halves(held[name]), held[f"{weight}.scale"]
        elif name.endswith(".q"):
            found[name.removesuffix(".q")] = held[name], held[f"{name.removesuffix('.q')}.scale"]
    return found
