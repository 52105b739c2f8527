"""What is known of a model before it is proved, for the report: where it comes from, and what its weights weigh."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from calque.choices import AS_ASKED
from calque.weights import emitted_bytes, torch_dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from calque.source import ModelSource
    from calque.traced import TracedModel

# Of many weights alike, as many are named.
FEW = 2
EMBEDDINGS, HEAD, TIED, NORM = "embeddings", "head", "embeddings and head (tied)", "norm"


def source_facts(source: ModelSource, described: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """Return what the manifest says of the source, and its type, task, parameters and forms of weights, most bytes first."""
    from calque.stored_integers import Dequantized

    stored: Counter[str] = Counter()
    for name, weight in source.weights.items():
        tensors = weight.stored if isinstance(weight, Dequantized) else (source.tensors[name],)
        stored[weight.form if isinstance(weight, Dequantized) else torch_dtype_name(weight)] += sum(tensor.nbytes for tensor in tensors)
    facts = {"model_type": source.config.model_type, "task": source.task.name, "parameters": parameters}
    return {**described, **facts, "dtype": ", ".join(name for name, _ in stored.most_common())}


def quantized_notes(model: TracedModel) -> list[str]:
    """Return what became of the weights that a checkpoint holds in another form than numbers, one sentence a form and fate."""
    fates: dict[tuple[str, str], list[str]] = {}
    for name, (form, fate) in model.quantized.items():
        fates.setdefault((form, fate), []).append(name)
    return [f"Weights that the checkpoint holds as {form}: {_counted(names)} {fate}." for (form, fate), names in fates.items()]


def unquantized_notes(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """Return which weights quantize_weights did not treat as asked, one sentence a reason; ``skipped``: what it left, and why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        if reason != AS_ASKED:
            reasons.setdefault(reason, []).append(name)
    return [f"Not quantized as the rest: {_counted(names)}: {reason}." for reason, names in reasons.items()]


def _counted(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:FEW])}{', …' if len(names) > FEW else ''})"


def count_parameters(model: TracedModel) -> int:
    """Return the number of elements of all weights, tied ones once."""
    return sum(math.prod(weight.shape) for weight in model.weights.distinct())


def weights_by_layer(model: TracedModel) -> list[dict[str, Any]]:
    """Return ``{name, layer, bytes, parameters}`` a group of weights as they are emitted, tied ones once, in the model's order.

    A layer's group has its module path as name; what lies outside all layers is named for what it is, else by its path.
    """
    weights = {id(weight): weight for weight in model.weights.entries.values()}
    groups: dict[str, dict[str, Any]] = {}
    for key, (path, layer) in _places(model).items():
        weight = weights[key]
        group = groups.setdefault(path, {"name": path, "layer": layer, "bytes": 0, "parameters": 0})
        elements = math.prod(weight.shape)
        group["bytes"] += emitted_bytes(weight)
        group["parameters"] += elements
    return sorted(groups.values(), key=_order)


def layers_of(model: TracedModel) -> dict[str, str]:
    """Return which group of `weights_by_layer` each parameter belongs to, by name; tied ones to one."""
    places = _places(model)
    return {name: places[id(weight)][0] for name, weight in model.weights.entries.items()}


def _places(model: TracedModel) -> dict[int, tuple[str, int | None]]:
    """Return the group, and the index of the layer if it is one, of each weight by its id."""
    looked_up = _looked_up(model)
    trunk = _trunk(model.weights.entries)
    # Of tied names the one that is looked up, or else the first, says where the weight belongs.
    unique: dict[int, str] = {}
    for name, weight in model.weights.entries.items():
        if id(weight) not in unique or name in looked_up:
            unique[id(weight)] = name
    return {key: _place(name, trunk, looked_up) for key, name in unique.items()}


def _order(group: Mapping[str, Any]) -> tuple[int, str, int]:
    """Return the place of a group: embeddings, layers, the rest, norm, head."""
    if group["layer"] is not None:
        return 1, group["name"].rpartition(".")[0], group["layer"]
    return {EMBEDDINGS: 0, TIED: 0, NORM: 3, HEAD: 4}.get(group["name"], 2), group["name"], 0


def _place(name: str, trunk: str, looked_up: Mapping[str, bool]) -> tuple[str, int | None]:
    """Return the group of a parameter, and the index of its layer if it has one."""
    parts = name.split(".")
    at = _layer_index(parts)
    if at:
        return ".".join(parts[: at + 1]), int(parts[at])
    if name in looked_up:
        return TIED if looked_up[name] else EMBEDDINGS, None
    if any("emb" in part.lower() for part in parts[:-1]):
        return EMBEDDINGS, None
    if any("norm" in part.lower() or part.startswith("ln") for part in parts[:-1]):
        return NORM, None
    # Heads are what a model with a head has beside its trunk: lm_head beside model.layers.
    if trunk and parts[0] != trunk:
        return HEAD, None
    return ".".join(parts[:-1]) or name, None


def _layer_index(parts: list[str]) -> int:
    """Return the place of the first whole number in a parameter's path, 0 where there is none."""
    return next((place for place, part in enumerate(parts) if part.isdecimal()), 0)


def _trunk(names: Mapping[str, object]) -> str:
    """Return the first module on the way to the layers, nothing where the layers stand at the top."""
    paths = [name.split(".") for name in names]
    tops = Counter(parts[0] for parts in paths if _layer_index(parts) > 1)
    return tops.most_common(1)[0][0] if tops else ""


def _looked_up(model: TracedModel) -> dict[str, bool]:
    """Return the tables that tokens look up a row of, by name; True where a product reads the table as well."""
    import torch

    found = {}
    for name, node in model.parameters().items():
        users = {user.target for user in node.users}
        if torch.ops.aten.embedding.default in users:
            found[name] = len(users) > 1 or bool(model.weights.tied(name))
    return found
