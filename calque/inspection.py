"""An artifact described for a person: what it is, what goes in and out, what was proved, whether its files are whole."""

from __future__ import annotations

from typing import Any

from calque.artifact import PIXELS, Artifact, GraphSpec, TensorSpec, unlisted_files
from calque.console import size, table
from calque.states import StateSpec


def artifact_facts(artifact: Artifact) -> dict[str, Any]:
    """Return the manifest, and for each file its size and whether its bytes are still those that were proved."""
    damaged = dict(line.split("  ", 1) for line in artifact.damaged_files())
    files = {name: {"bytes": _bytes(artifact, name), "status": damaged.get(name, "ok")} for name in artifact.files}
    extra = unlisted_files(artifact.folder, artifact.files)
    return {"folder": str(artifact.folder), "manifest": artifact.manifest(), "files": files, "extra": extra}


def artifact_text(artifact: Artifact, facts: dict[str, Any]) -> str:
    """Return the facts as text."""
    source = artifact.source
    lines = [
        f"{artifact.folder}: {artifact.target}, {artifact.precision}",
        f"source   {source.get('id')}" + (f" @ {source['revision']}" if source.get("revision") else ""),
        f"         sha256 {source.get('sha256')}",
        f"limits   {_limits(artifact)}",
        f"passes   {', '.join(f'{name} {count}' for name, count in artifact.passes.items()) or 'none'}",
        f"tools    {', '.join(f'{name} {version}' for name, version in artifact.tools.items())}",
        "",
        *proof_lines(artifact),
    ]
    for name, graph in artifact.graphs.items():
        lines += ["", *_graph_lines(name, graph, artifact.states)]
    rows = [(name, size(file["bytes"]), file["status"]) for name, file in facts["files"].items()]
    lines += ["", table(("file", "size", "status"), rows)]
    lines += [f"{name}  not in the manifest" for name in facts["extra"]]
    return "\n".join(lines)


def proof_lines(artifact: Artifact) -> list[str]:
    """Return one line for each question of the proof; the manifest's figure is rounded up, so a bound and not the worst itself."""
    lines = []
    for question in ("numerics", "build", "execution"):
        check = getattr(artifact.proof, question)
        worst = f", worst ≤ {check.worst:g} σ" if check.worst is not None else ""
        by = f" by {check.by}" if check.by else ""
        reason = f": {check.reason}" if check.reason else ""
        lines.append(f"{question:<10} {check.status.replace('_', ' ')}{by}{worst}{reason}")
    return lines


def _limits(artifact: Artifact) -> str:
    limits = artifact.limits
    if any(tensor.name == PIXELS for graph in artifact.graphs.values() for tensor in graph.inputs):
        return "images of one size, any number of them at once"
    parts = [
        f"padding {limits.padding}",
        f"batched chunks {'yes' if limits.batched_chunk else 'no'}",
        f"max length {limits.max_length or 'none'}",
    ]
    if limits.recompute_at:
        parts.append(f"a cache begun at or below {limits.recompute_at} tokens is recomputed once its row grows past it")
    return ", ".join(parts)


def _bytes(artifact: Artifact, name: str) -> int | None:
    path = artifact.folder / name
    return path.stat().st_size if path.is_file() else None


def _graph_lines(name: str, graph: GraphSpec, states: tuple[StateSpec, ...]) -> list[str]:
    carried = {state.input for state in states} | {state.output for state in states}
    lines = [f"graph {name} ({graph.file})"]
    for direction, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
        lines += [f"  {direction}  {_tensor(tensor)}" for tensor in tensors if tensor.name not in carried]
    groups: dict[tuple[object, ...], list[StateSpec]] = {}
    for state in states:
        groups.setdefault((state.kind, state.shape, state.dtype, state.update, state.window), []).append(state)
    for group in groups.values():
        first = group[0]
        window = f", window {first.window}" if first.window else ""
        layers = _ranges([state.layer for state in group])
        lines.append(f"  state  {first.kind} of layers {layers}  {first.dtype} {_shape(first.shape)}  {first.update}{window}")
    return lines


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name}  {tensor.dtype} {_shape(tensor.shape)}"


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(str(dimension) for dimension in shape)}]"


def _ranges(numbers: list[int]) -> str:
    """Return whole numbers as ranges: 0, 1, 2, 5 -> ``0–2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
