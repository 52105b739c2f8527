"""Which layers get more bits, so that a quantized model is as good as asked: the fewest that suffice, most telling first.

::

    int4 -> int8 -> keep        of the weights that the plan quantizes, a layer at a time; embeddings and head count as one each

A layer tells as much as the model loses by its integers alone, per parameter, since that is what more bits for it cost. Layers go up
one step in that order; how many are needed is found by bisection, each try being the whole model on all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from calque.facts import HEAD, layers_of
from calque.weights import read_into

if TYPE_CHECKING:
    from torch.nn import Module

    from calque.conversion import Conversion
    from calque.passes.quantize_weights import Storage
    from calque.traced import TracedModel
    from calque.validation.quality import Answer, Baseline, Quality
    from calque.weights import Weight

# How far up the ladder each layer's weights stand: as planned, their int4 as int8, or none of them quantized.
PLANNED, WIDER, KEPT = 0, 1, 2
# Tokens that one layer alone is judged on, about.
FEW_TOKENS = 256

Levels = Mapping[str, int]


@dataclass(frozen=True)
class Found:
    """How the layers were promoted, and what that gave. ``sensitivity``: rows ``{layer, stored, loss}``, most telling first.

    ``steps``: rows ``{to, layers, kl_mean}``, one a try. ``promoted``: rows ``{layer, from, to, sensitivity}`` in order.
    """

    levels: Levels
    quality: Quality
    sensitivity: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()
    promoted: tuple[Mapping[str, Any], ...] = ()


@dataclass
class Layers:
    """An eager model whose layers can be set to what any level makes of them, in place; at first it holds the original's weights.

    ``answer``: runs it. ``baseline``: what it is held against.
    """

    conversion: Conversion
    traced: TracedModel
    eager: Module
    answer: Answer
    baseline: Baseline
    _levels: dict[int, tuple[dict[str, Weight], dict[str, Storage]]] = field(default_factory=dict)
    _now: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, (replaced, planned) = layers_of(self.traced), self._at(PLANNED)
        whole = {layers[name] for name in replaced if name in planned}
        self.names: dict[str, list[str]] = {}
        for name in replaced:
            # A last norm that takes the head's scales back has no weights of its own that are integers, and goes with the head.
            self.names.setdefault(layers[name] if layers[name] in whole else HEAD, []).append(name)
        self.parameters = {
            layer: sum({id(self.traced.weights[name]): math.prod(self.traced.weights[name].shape) for name in names}.values())
            for layer, names in self.names.items()
        }

    def replaced(self, level: int) -> dict[str, Weight]:
        """Return what the untouched model would hold at that level, by parameter; of others nothing changes."""
        return self._at(level)[0]

    def stored(self, layer: str, level: int) -> dict[str, Storage]:
        """Return what the layer's weights are stored as at that level, by name."""
        planned, there = self._at(PLANNED)[1], self._at(level)[1]
        return {name: there.get(name, "keep") for name in self.names[layer] if name in planned}

    def _at(self, level: int) -> tuple[dict[str, Weight], dict[str, Storage]]:
        from calque.passes.quantize_weights import stored_as

        if level not in self._levels:
            planned = self._at(PLANNED)[1] if level else {}
            to: Storage = "int8" if level == WIDER else "keep"
            model = self.conversion.quantized(
                self.traced, {name: to for name, stored in planned.items() if level == KEPT or stored == "int4"}
            )
            self._levels[level] = model.replaced, dict(stored_as(model))
        return self._levels[level]

    def hold(self, levels: Levels) -> None:
        """The eager model's layers are as ``levels`` says, those that it does not name as in the original."""
        import torch

        with torch.no_grad():
            for layer, names in self.names.items():
                level = levels.get(layer)
                if self._now.get(layer) == level:
                    continue
                found = {} if level is None else self.replaced(level)
                for name in names:
                    read_into(self.eager.get_parameter(name), found.get(name) or self.traced.weights[name])
                self._now = {**self._now, layer: level} if level is not None else {k: v for k, v in self._now.items() if k != layer}

    def quality(self, levels: Levels, rows: int | None = None) -> Quality:
        """Return how good the model is with its layers at these levels, on the first ``rows`` rows or on all."""
        self.hold(levels)
        return self.baseline.compare(self.answer, rows)

    def sensitivity(self, levels: Levels) -> dict[str, float]:
        """Return what the model loses by each layer's integers at its level, all others being the original's; most telling first."""
        reached, few = 0, 0
        while few < len(self.baseline.rows) and reached < FEW_TOKENS:
            reached, few = reached + len(self.baseline.rows[few]), few + 1
        losses = {layer: self.quality({layer: level}, few).loss for layer, level in levels.items()}
        return dict(sorted(losses.items(), key=lambda item: -item[1]))

    def continued(self, found: Found) -> Found:
        """Return what was found, with how far greedy decoding goes the original's way; the model holds the levels found."""
        self.hold(found.levels)
        return replace(found, quality=self._with_greedy(found.quality))

    def as_written(self, found: Found, model: TracedModel) -> Found:
        """Return what was found, judged anew with the weights of a model whose passes were told of the promotions."""
        from calque.validation.eager import with_weights

        self.hold({})
        with_weights(self.eager, model.replaced)
        return replace(found, quality=self._with_greedy(self.baseline.compare(self.answer)))

    def _with_greedy(self, quality: Quality) -> Quality:
        """Return the quality of the model as it is held now, with how far its greedy decoding goes the original's way."""
        from calque.validation.quality import continuing

        matched, of = self.baseline.greedy(continuing(self.answer))
        return replace(quality, greedy_matched=matched, greedy_tokens=of)

    def promotable(self, levels: Levels, to: int) -> list[str]:
        """Return the layers of which some weight has more bits at the level ``to``."""
        return [layer for layer, level in levels.items() if self.stored(layer, level) != self.stored(layer, to)]


def as_planned(layers: Layers, listed: bool) -> Found:
    """Return how good the model is as its passes make it; with the sensitivity of every layer if ``listed``."""
    levels = dict.fromkeys(layers.names, PLANNED)
    sensitivity = layers.sensitivity(levels) if listed else {}
    return Found(levels, layers.quality(levels), _listed(layers, levels, sensitivity))


def promote(layers: Layers, planned: Found, max_kl: float) -> Found:
    """Return the fewest promotions with which the mean KL divergence is at most ``max_kl``; all there are where none suffice."""
    found = planned
    for to in (WIDER, KEPT):
        movable = layers.promotable(found.levels, to)
        if found.quality.loss <= max_kl or not movable:
            continue
        measured = not any(found.levels.values()) and {row["layer"]: row["loss"] for row in found.sensitivity}
        losses = measured or layers.sensitivity(found.levels)
        found = replace(found, sensitivity=found.sensitivity or _listed(layers, found.levels, losses))
        ladder = sorted(movable, key=lambda layer: -losses[layer] / layers.parameters[layer])
        found = _climb(layers, found, ladder, to, max_kl, losses)
    return found


def _climb(layers: Layers, found: Found, ladder: list[str], to: int, max_kl: float, losses: Mapping[str, float]) -> Found:
    """Return the fewest first layers of the ladder that suffice at the level ``to``; all of them where none do."""
    tried = [*found.steps]
    name = "int8" if to == WIDER else "keep"

    def quality(count: int) -> Quality:
        met = layers.quality({**found.levels, **dict.fromkeys(ladder[:count], to)})
        tried.append({"to": name, "layers": count, "kl_mean": met.kl_mean})
        return met

    failing, enough = 0, len(ladder)
    best = quality(enough)
    while best.loss <= max_kl and enough - failing > 1:
        middle = (failing + enough) // 2
        met = quality(middle)
        if met.loss <= max_kl:
            enough, best = middle, met
        else:
            failing = middle
    chosen = ladder[:enough]
    rows = [
        {
            "layer": layer,
            "from": _words(layers.stored(layer, found.levels[layer])),
            "to": _words(layers.stored(layer, to)),
            "sensitivity": losses[layer],
        }
        for layer in chosen
    ]
    levels = {**found.levels, **dict.fromkeys(chosen, to)}
    return replace(found, levels=levels, quality=best, steps=tuple(tried), promoted=(*found.promoted, *rows))


def overrides(layers: Layers, levels: Levels) -> dict[str, Storage]:
    """Return what every weight is stored as that the levels store otherwise than planned, by name."""
    return {
        name: storage
        for layer, level in levels.items()
        for name, storage in layers.stored(layer, level).items()
        if storage != layers.stored(layer, PLANNED)[name]
    }


def _listed(layers: Layers, levels: Levels, losses: Mapping[str, float]) -> tuple[Mapping[str, Any], ...]:
    return tuple({"layer": layer, "stored": _words(layers.stored(layer, levels[layer])), "loss": loss} for layer, loss in losses.items())


def _words(stored: Mapping[str, str]) -> str:
    return ", ".join(sorted(set(stored.values())))
