"""Is the model still good? The second question of the proof: asked where weights are rounded, with the limits a recipe sets.

Asked twice of the same rows: of the eager model with the weights that the artifact holds, which is a property of the model, and of
the artifact where it runs here, whose runtime may round activations as well. More bits for some layers are decided in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque import passes, preflight, texts
from calque.artifact import SHARED_WEIGHTS, Artifact, Check, Proof
from calque.choices import QUANTIZED
from calque.console import size
from calque.errors import ParityFailed, TargetUnavailable, Unsupported, WontFit
from calque.promotion import PLANNED, Found, Layers, as_planned, overrides, promote
from calque.validation import images, scenarios

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch.nn import Module

    from calque.conversion import Conversion
    from calque.stages import Stages
    from calque.traced import TracedModel
    from calque.validation.quality import Baseline, Quality, Row

# The original's logits lie on disk, each float32, until the artifact is judged too.
KEPT_BYTES = 1 << 30
# What the logits of one row may take in memory, a few times over.
ROW_BYTES = 256 << 20
# Tokens of a row: of a generator, and of an encoder, whose texts are short; and of a random one, which says less.
LONGEST, LONGEST_ENCODED, LONGEST_RANDOM = 1024, 128, 64
# Tokens that encoders are judged on: what they keep of one is small.
MOST_ENCODED = 8192
RANDOM, RANDOM_IMAGES = "random tokens", "random images"
# Images that a model is judged on.
IMAGES = 64
WEIGHTS, ARTIFACT = "weights alone", "artifact"


@dataclass
class QualityGate:
    """What is asked, and what was found so far; nothing at all unless ``asked``. ``text``: what rows are made of, None: random ones."""

    conversion: Conversion
    scratch: Path
    asked: bool
    text: str | None
    found: Found | None = None
    baseline: Baseline | None = None
    artifact_quality: Quality | None = None
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, conversion: Conversion, scratch: Path) -> QualityGate:
        """Return the gate that the recipe asks for: of integers always, of other precisions where it names a text or a limit.

        Raises:
            UsageError: the text cannot be read.
        """
        parity = conversion.recipe.parity
        limits = parity.text or parity.sensitivity or parity.max_kl is not None or parity.max_size
        asked = bool(limits) or conversion.quantizes or conversion.recipe.precision in QUANTIZED
        return cls(conversion, scratch, asked, texts.read_text(Path(parity.text)) if parity.text else None)

    @property
    def of_images(self) -> bool:
        """Whether the model is judged on images."""
        return self.conversion.source.task.of_images

    @property
    def judged_on(self) -> str:
        """What the model is judged on: the name of a text, or what is random."""
        text = self.conversion.recipe.parity.text
        return Path(text).name if text else RANDOM_IMAGES if self.of_images else RANDOM

    def judge_weights(self, model: TracedModel, stages: Stages) -> None:
        """How good the eager model is with the artifact's weights is known, and the conversion promotes what has to be.

        Raises:
            UsageError: the text is none for the model's tokenizer.
            Unsupported: a limit on the divergence of a model without logits.
        """
        if not self.asked or not self._fits(model):
            return
        from calque.validation.eager import narrowed

        parity, conversion = self.conversion.recipe.parity, self.conversion
        with stages("quality"):
            rows = self._rows(model)
            eager = conversion.source.load_eager()
            self.baseline = self._keep(model, eager, rows)
            narrowed(eager, conversion.narrow)
            layers = Layers(conversion, model, eager, self._answer(model, eager), self.baseline)
            self.found = as_planned(layers, parity.sensitivity)
            if parity.max_kl is not None and self.found.quality.kl_mean is None:
                fix = "leave max_kl out; the report has the cosine of its outputs"
                raise Unsupported("max_kl bounds the divergence of logits, and the model gives none", fix=fix)
            if good := parity.max_kl is None or self.found.quality.loss <= parity.max_kl:
                self.found = layers.continued(self.found)
        if not good:
            with stages("promote"):
                self.found = promote(layers, self.found, parity.max_kl or 0.0)
                conversion.promoted = overrides(layers, self.found.levels)
                # Judged again as the passes make it: a calibrated method rounds a layer by what those before it give.
                self.found = layers.as_written(self.found, conversion.quantized(model, conversion.promoted))

    def working_bytes(self, model: TracedModel) -> int:
        """Return what the original's answers take on disk until the artifact is judged; the model is not rewritten yet.

        Raises:
            UsageError: the text is none for the model's tokenizer.
            WontFit: the recipe sets a limit that could not be judged.
        """
        if not self.asked or not model.states or not self._fits(model):
            return 0  # what is kept of an encoder's texts is small
        vocabulary: int = self.conversion.source.config.get_text_config().vocab_size
        return 4 * vocabulary * sum(map(len, self._rows(model)))

    def _fits(self, model: TracedModel) -> bool:
        """Return whether the eager model fits into the memory allowed; if not, nothing is asked, and the report says so.

        Raises:
            WontFit: the recipe sets a limit that could not be judged.
        """
        allowed, parity = self.conversion.recipe.max_memory, self.conversion.recipe.parity
        needs = preflight.peak_memory(model, preflight.mapped_bytes(self.conversion.source))["prove"]
        if allowed is None or needs <= allowed:
            return True
        if parity.text or parity.sensitivity or parity.max_kl is not None:
            lines = [f"quality  needs {size(needs)}"]
            raise WontFit(
                f"how good the model is cannot be judged in {size(allowed)} of memory", lines, f"allow {size(needs)}, or ask nothing"
            )
        self.asked = False
        self.notes.append(
            f"How good the model still is was not measured: that takes {size(needs)} of memory, {size(allowed)} were allowed."
        )
        return False

    def _rows(self, model: TracedModel) -> list[Row]:
        """Return the rows of tokens, or numbers of images, that everything is judged on, and remember what they are."""
        if self.of_images:
            self.about["longest"] = 0
            return [(number,) for number in range(images.RANDOM[0], images.RANDOM[0] + IMAGES)]
        source, config = self.conversion.source, self.conversion.source.config.get_text_config()
        lengths = (model.limits.max_length, getattr(config, "max_position_embeddings", None))
        known = [length for length in lengths if isinstance(length, int) and length > 0]
        self.about["longest"] = min(known, default=0)
        each = 4 * config.vocab_size
        longest = max(2, min([LONGEST if model.states else LONGEST_ENCODED, ROW_BYTES // each, *known]))
        if self.text is None:
            tokens = min(longest, LONGEST_RANDOM)
            rows = scenarios.pool_rows(tokens, config.vocab_size, self.conversion.special_tokens)
        else:
            most = KEPT_BYTES // each if model.states else MOST_ENCODED
            rows = texts.token_rows(source.folder, self.text, longest, most, source.trust_remote_code)
        return rows

    def _keep(self, model: TracedModel, eager: Module, rows: Sequence[Row]) -> Baseline:
        from calque.validation.eager import eager_draft
        from calque.validation.quality import Baseline

        folder = self.scratch / "quality"
        folder.mkdir()
        return Baseline.keep(
            self._answer(model, eager),
            rows,
            folder,
            causal=bool(model.states),
            text=self.text is not None,
            layers=max(model.layers, 1),
            longest=self.about["longest"],
            draft=partial(eager_draft, eager),
        )

    def _answer(self, model: TracedModel, eager: Module) -> Any:
        from calque.validation.eager import eager_outputs

        def answer(row: Row) -> Mapping[str, NDArray[np.float32]]:
            return passes.expected(self.conversion.plan, eager_outputs(eager, row, model.inputs))

        return answer

    def judge_artifact(self, artifact: Artifact, proof: Proof, stages: Stages) -> Proof:
        """Return the proof, failed where a limit of the recipe is not met; how good the artifact is, is known where it runs."""
        if not self.asked or self.baseline is None:
            return proof
        from calque.validation.drive import ModelIO
        from calque.validation.quality import session_answer, session_continue

        self.about["size_bytes"] = model_bytes(artifact)
        if proof.numerics.status == "passed":
            with stages("quality of the artifact"):
                try:
                    session = self.conversion.target.open(artifact, self.conversion.recipe.threads)
                except TargetUnavailable:
                    self.notes.append("How good the artifact itself is was not measured: it does not run here.")
                else:
                    io, again = ModelIO.of(artifact), artifact.limits.recompute_at
                    quality = self.baseline.compare(session_answer(session, io, again))
                    matched, of = self.baseline.greedy(session_continue(session, io, again))
                    self.artifact_quality = replace(quality, greedy_matched=matched, greedy_tokens=of)
        if not (lines := self.failures()):
            return proof
        numerics = (
            proof.numerics if proof.numerics.status == "failed" else Check("failed", proof.numerics.by, lines[0], proof.numerics.worst)
        )
        return replace(proof, numerics=numerics, failures=(*proof.failures, *lines))

    def failures(self) -> list[str]:
        """Return a line for each limit of the recipe that is not met."""
        parity, lines = self.conversion.recipe.parity, []
        assert self.found is not None
        weights, artifact = self.found.quality.kl_mean, self.artifact_quality.kl_mean if self.artifact_quality else None
        if self.artifact_quality and self.artifact_quality.positions != self.found.quality.positions:
            artifact = None  # one that gives the last logits alone is judged on too few positions
        if parity.max_kl is not None and weights is not None and weights > parity.max_kl:
            lines.append(f"quality: {WEIGHTS}: mean KL {weights:.3g} nats, max_kl is {parity.max_kl:g}, and nothing is left to promote")
        elif parity.max_kl is not None and artifact is not None and artifact > parity.max_kl:
            why = f"its weights alone have {weights or 0.0:.3g}, its runtime rounds activations as well"
            room = parity.max_kl - (artifact - (weights or 0.0))
            out = f"; --max-kl {room * 0.99:.2g} promotes what makes up for that" if room > 0 and self.conversion.quantizes else ""
            lines.append(f"quality: {ARTIFACT}: mean KL {artifact:.3g} nats, max_kl is {parity.max_kl:g}; {why}{out}")
        if parity.max_size and (takes := self.about.get("size_bytes", 0)) > parity.max_size:
            lines.append(f"quality: the model's files take {size(takes)}, max_size is {size(parity.max_size)}")
            lines += [
                f"quality: {row['layer']} was promoted from {row['from']} to {row['to']} (alone it costs {row['sensitivity']:.2g} nats)"
                for row in self.found.promoted
            ]
        return lines

    def raise_if_failed(self, proof: Proof) -> None:
        """Leave quietly unless limits of the recipe are all that failed.

        Raises:
            ParityFailed: which limits, by how much, and the way out.
        """
        lines = self.failures() if self.found else []
        if lines and list(proof.failures) == lines:
            fix = "allow a larger --max-kl or --max-size, quantize better (another group, calibration), or keep activations as they are"
            kept = "; the rejected folder holds the artifact and report.json"
            raise ParityFailed("the artifact is faithful, and not as good or as small as the recipe asks", lines, fix + kept)

    def data(self) -> dict[str, Any]:
        """Return what report.json says of the quality; empty where nothing was asked."""
        if self.found is None or self.baseline is None:
            return {}
        parity = self.conversion.recipe.parity
        measured = {WEIGHTS: self.found.quality, ARTIFACT: self.artifact_quality}
        promoted = {name: level for name, level in self.found.levels.items() if level != PLANNED}
        return {
            "text": self.judged_on,
            "random": self.text is None,
            "rows": len(self.baseline.rows),
            "tokens": 0 if self.of_images else sum(map(len, self.baseline.rows)),
            "size_bytes": self.about.get("size_bytes"),
            "max_kl": parity.max_kl,
            "max_size": parity.max_size,
            "measured": [{"name": name, **quality.data()} for name, quality in measured.items() if quality],
            "sensitivity": list(self.found.sensitivity),
            "promoted": list(self.found.promoted) if promoted else [],
            "steps": list(self.found.steps),
        }

    def said(self) -> list[str]:
        """Return sentences that the user should know."""
        if not self.asked:
            return self.notes
        instead = "" if self.of_images else ": name a text with --text FILE"
        random = f"Quality was measured on {self.judged_on}, which says little of real use{instead}." if self.text is None else ""
        layers = ", ".join(f"{row['layer']} to {row['to']}" for row in self.found.promoted) if self.found else ""
        return [random, f"Promoted, so that the mean KL divergence is within max_kl: {layers}." if layers else "", *self.notes]


def model_bytes(artifact: Artifact) -> int:
    """Return the bytes of the files that hold graphs and weights: companions and the proof's references apart."""
    names = [path.relative_to(artifact.folder).as_posix() for path in artifact.folder.rglob("*") if path.is_file()]
    # What begins with a graph's name is its data, or a part of its package.
    model = (*(graph.file for graph in artifact.graphs.values()), SHARED_WEIGHTS)
    return sum((artifact.folder / name).stat().st_size for name in names if name.startswith(model))
