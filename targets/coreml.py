"""Core ML: one ``.mlpackage`` for iOS 18 and macOS 15, from the graph straight into MIL.

::

    model.mlpackage      a program of MIL and its weights; functions ``main``, or ``prefill`` and ``decode`` over the same weights

What Core ML would run is run here by an interpreter of MIL; on macOS by Core ML itself.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calque.artifact import DECODE, NUM_LOGITS_TO_KEEP, PREFILL, Artifact, Check, GraphSpec, Limits
from calque.choices import NARROW, QUANTIZED, Requirement
from calque.errors import TargetUnavailable, Unsupported, UsageError
from calque.passes import Pass
from calque.runtime.coreml_session import MAX_BATCH, on_mac
from calque.targets import Built, Emitted, Problem, optional_rows, package_rows, without_cache
from calque.traced import TracedModel, source_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Node

    from calque.session import Session
    from calque.targets._coreml_function import Building, Signature

# Where neither recipe nor model says how long a row may become: Core ML wants a bound.
LONGEST = 2048
# What coremltools takes to write 34M parameters, and a quarter of the weights besides: 155 MB of 134 in fp32, 102 of 67 in fp16, 64 of 36
# in int4.
TOOLS_BYTES = 20_000_000
NOT_HERE = "Core ML runs on macOS and iOS alone"


@dataclass(frozen=True)
class CoreML:
    """``cache``: ``flat`` takes past keys and values and gives the grown ones; ``stateful`` keeps them in Core ML's own states.

    ``functions``: one for all calls, or ``split``: prefill, and decode of a single token, over the same weights.
    ``weights``: integers of 4 bits as they are (``linear``), or as places in a table of all their levels (``palettized``).
    ``max_batch``: how many rows a call may have; a state holds one.
    """

    cache: Literal["flat", "stateful"] = "flat"
    functions: Literal["one", "split"] = "one"
    weights: Literal["linear", "palettized"] = "linear"
    max_batch: int = MAX_BATCH

    def __post_init__(self) -> None:
        """Refuse a batch of nothing."""
        if self.max_batch < 1:
            raise ValueError(f"max_batch: {self.max_batch} rows; 1 or more expected")

    name: ClassVar[str] = "coreml"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8", "int4")
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)

    def require(self, needed: Requirement | None) -> None:
        """Leave quietly if coremltools is here, and Core ML where a build or an execution is needed.

        Raises:
            TargetUnavailable: it is not.
        """
        from calque.targets._coreml_package import quiet

        try:
            with quiet():
                import coremltools  # noqa: F401
        except ImportError as error:
            raise TargetUnavailable(f"coremltools cannot be imported: {error}", fix="pip install 'calque[coreml]'") from error
        if needed and not on_mac():
            raise TargetUnavailable(f"--require {needed}: {NOT_HERE}", fix="convert on a Mac, or copy the artifact there and validate it")

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order.

        Raises:
            UsageError: an option that the precision does not go with.
        """
        from calque.passes.cache_dynamic import CacheDynamic
        from calque.passes.cache_static import CacheStatic
        from calque.passes.cast_precision import CastPrecision
        from calque.passes.drop_zero_bias import DropZeroBias
        from calque.passes.fuse_gelu import FuseGelu
        from calque.passes.fuse_layer_norm import FuseLayerNorm
        from calque.passes.fuse_rms_norm import FuseRmsNorm
        from calque.passes.fuse_rotary import FuseRotary
        from calque.passes.quantize_weights import QuantizeWeights
        from calque.passes.simplify_shapes import SimplifyShapes

        if self.cache == "stateful" and precision == "fp32":
            raise UsageError("Core ML's states are float16: precision: fp32 has none", fix="set cache: flat, or precision: fp16")
        if self.weights == "palettized" and precision != "int4":
            raise UsageError(f"weights: palettized belongs to precision: int4, not to {precision}", fix="leave one of the two out")
        quantized = precision in QUANTIZED
        narrow = "float16" if quantized else NARROW.get(precision)
        return (
            *((QuantizeWeights(**QUANTIZED[precision]),) if quantized else ()),  # first, while parameters have the checkpoint's names
            DropZeroBias(),  # an addition less for each
            FuseGelu(),  # MIL's own operator
            FuseRmsNorm(),  # five operators a norm become one
            FuseLayerNorm(),  # MIL's own operator
            FuseRotary(),  # no slices that are computed
            CacheStatic() if self.cache == "stateful" else CacheDynamic(),
            SimplifyShapes(),  # shapes that are read, not reckoned
            *((CastPrecision(narrow),) if narrow else ()),  # last: casts stand between what others look for
        )

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return the nodes that have no translation, and inputs that Core ML cannot take."""
        from calque.targets._coreml_rules import untranslated

        if any(spec.name == NUM_LOGITS_TO_KEEP for spec in model.inputs):
            why, way_out = "a length that a call's values decide has no bounds", "leave --logits dynamic out, or ask for --logits last"
            return [Problem(NUM_LOGITS_TO_KEEP, "", "", why, way_out)]
        asked = {"cache: stateful": self.cache == "stateful", "functions: split": self.functions == "split"}
        if useless := without_cache(model, [option for option, chosen in asked.items() if chosen]):
            return useless
        fix = "use a model without it"
        missing = {node: f"{node.target} has no translation to MIL" for node in untranslated(model)}
        refused = missing or self._refused(model)
        found = [Problem(node.name, *source_of(node), why, fix) for node, why in refused.items()]
        if model.states and self.cache == "flat" and model.limits.padding != "any":
            why = "Core ML has no empty past; the masked slot in its place is padding on the left, which this model does not take"
            found.append(Problem(model.states[0].input, "", "", why, "set cache: stateful"))
        return found

    def lower(self, model: TracedModel) -> Any:
        """Return the program of MIL, its weights in memory, and the parameter of each of its constexpr operators."""
        from calque.targets._coreml_package import fresh_names, program, quiet

        with quiet():
            fresh_names()
            growing = self._growing(model, hollow=False)
            functions = {each.signature.name: each.build() for each in growing}
            return program(functions), growing[0].shared.integers

    def _refused(self, model: TracedModel) -> dict[Node, str]:
        """Return the nodes that coremltools takes in no function, and why; weights are not read for it."""
        from calque.targets._coreml_package import quiet

        found: dict[Node, str] = {}
        with quiet():
            for each in self._growing(model, hollow=True):
                with suppress(Unsupported):  # which is what is asked for
                    each.build()
                found |= each.refused
        return found

    def _growing(self, model: TracedModel, hollow: bool) -> list[Building]:
        """Return the functions before anything is in them."""
        from calque.targets._coreml_function import Building, Shared
        from calque.targets._coreml_rules import rules, translatable

        shared, whole = Shared(palettized=self.weights == "palettized", hollow=hollow), translatable(model)
        return [Building(whole, signature, shared, rules()) for signature in self._signatures(model)]

    def _signatures(self, model: TracedModel) -> list[Signature]:
        """Return how each function is called."""
        from calque.targets._coreml_function import Signature

        longest = _longest(model)
        stateful = self.cache == "stateful" and bool(model.states)
        bounds = {
            "batch_size": (1, self.max_batch),
            "sequence_length": (1, longest),
            "past_sequence_length": (1, longest),
            "total_sequence_length": (2, 2 * longest),
        }
        fixed = {"batch_size": 1} if stateful or self.max_batch == 1 else {}
        if self.functions == "one" or not model.states:
            return [Signature("main", fixed, bounds, stateful)]
        return [Signature(PREFILL, fixed, bounds, stateful), Signature(DECODE, {**fixed, "sequence_length": 1}, bounds, stateful)]

    def emit(self, lowered: Any, model: TracedModel, folder: Path) -> Emitted:
        """Write the package.

        Raises:
            AssertionError: weights stand there more than once.
        """
        from calque.targets._coreml_package import PACKAGE, require_once, write

        made, integers = lowered
        write(made, folder / PACKAGE, integers)
        require_once(folder / PACKAGE)
        graph = GraphSpec(PACKAGE, model.inputs, model.outputs)
        names = {"main": "model"}
        return Emitted({names.get(name, name): graph for name in made.functions}, self.limits(model))

    def limits(self, model: TracedModel) -> Limits:
        """Return the model's limits, with an end to rows of tokens: Core ML wants a bound of every length."""
        return replace(model.limits, max_length=_longest(model)) if "input_ids" in model.placeholders() else model.limits

    def emission_bytes(self, weights: int) -> int:
        """Return about how much memory writing takes of so many bytes of weights."""
        return TOOLS_BYTES + weights * 5 // 4

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session of the interpreter of MIL; of Core ML on macOS.

        Raises:
            Unsupported: the interpreter has no kernel for operators of the package: what could not be proved is refused.
        """
        from calque.runtime.coreml_session import CoreMLSession

        session = CoreMLSession(artifact, threads)
        session.open_all()
        return session

    def integers(self, artifact: Artifact) -> dict[str, tuple[Any, Any]]:
        """Return q, int8 [out, in], and scale [out, groups] of every weight that is held as integers, by the parameter's name."""
        from calque.targets._coreml_package import PACKAGE, integers

        return integers(artifact.folder / PACKAGE)

    def builder_bytes(self, weights: int) -> int:
        """Return about how much memory compiling takes of so many bytes of weights."""
        return 2 * weights

    def build(self, artifact: Artifact, load: Callable[[], TracedModel], room: int | None) -> Built:
        """Return what compiling the package for Core ML came to; here it is not run but on macOS."""
        if not on_mac():
            left_out = Check("not_run", None, f"{NOT_HERE}; numbers were proved by an interpreter of MIL")
            return Built(left_out, left_out)
        from calque.targets import _coreml_build

        return _coreml_build.build(artifact)

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return the packages that emitting and proving take."""
        return [*package_rows({"torch": "to convert"}), *optional_rows({"coremltools": "writes Core ML packages"})]


def _longest(model: TracedModel) -> int:
    """Return how long a row may become."""
    return model.limits.max_length or model.trained_length or LONGEST


TARGET = CoreML
