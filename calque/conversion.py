"""What a recipe, its target and its source say together: which passes run, what is traced, what must be proved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque import converters, memory_plan, passes, preflight, sentence, targets
from calque.ceiling import tree_rss
from calque.choices import NarrowType
from calque.errors import TargetUnavailable, Unsupported, UsageError
from calque.recipe import Recipe, unbuilt_settings
from calque.source import ModelSource
from calque.stored_integers import NUMBERS, form_of
from calque.targets import Target
from calque.tasks import POOLED
from calque.texts import read_text, spread_rows
from calque.traced import TracedModel
from calque.validation import scenarios
from calque.weights import cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.nn import Module

    from calque.artifact import Artifact, Limits
    from calque.passes import Pass
    from calque.passes.quantize_weights import Storage
    from calque.session import Session
    from calque.states import StateSpec
    from calque.validation.bisect import Stage
    from calque.validation.reference import Reference
    from calque.validation.scenarios import Scenario
    from calque.weights import Weight

Rows = list[dict[str, Any]]

# The pass that stores weights as integers.
QUANTIZING = "quantize_weights"


def open_target(recipe: Recipe) -> Target:
    """Return the target with the recipe's options.

    Raises:
        UsageError: no such target, no such option, a scenario that no model has, or a text that cannot be read.
        Unsupported: settings that this version, or the target, cannot follow.
    """
    target = targets.make(recipe.target, recipe.options)
    targets.require(target, recipe.require)
    if recipe.parity.scenarios != "all" and (unknown := scenarios.unknown(recipe.parity.scenarios)):
        lines = [f"{name}{hint}" for name, hint in unknown.items()]
        raise UsageError("no model has these scenarios", lines, "parity: {scenarios: all} runs those that the model has")
    refused = unbuilt_settings(recipe)
    if recipe.precision not in target.precisions:
        refused.append(f"precision: {recipe.precision}  {recipe.target} has {', '.join(target.precisions)}")
    if recipe.layout not in (layouts := targets.layouts(target, recipe.precision)):
        refused.append(f"layout: {recipe.layout}  {recipe.target} in {recipe.precision} has {', '.join(layouts)}")
    for text in (recipe.parity.text, recipe.calibration.text if recipe.calibration else None):
        if text:
            read_text(Path(text))  # that it can be read is known before any work
    if refused:
        raise Unsupported("the recipe asks for what this version cannot do", list(dict.fromkeys(refused)), "change these settings")
    passes.check_order(plan := plan_of(recipe, target))
    if not recipe.calibration and (asking := [passes.name_of(rewrite) for rewrite in plan if passes.calibrated(rewrite)]):
        raise UsageError(f"{', '.join(asking)} measures on text, and none is given", fix="name a file of text with --calibration FILE")
    if recipe.passes is not None:
        if silent := targets.deciding_passes(recipe.target, recipe.options, recipe.precision):
            raise UsageError("options that choose passes do nothing beside a list of passes", silent, "leave one of the two out")
        passes.check_precision(recipe.precision, passes.read_plan(recipe.passes), target.passes(recipe.precision))
    return target


def use_threads(recipe: Recipe) -> None:
    """Make torch use as many threads as the recipe says, where it says so."""
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)


def resolve(recipe: Recipe, scratch: Path, values: bool = True) -> ModelSource:
    """Return the source the recipe names; its headers are read, its tensors are not, nor drawn if they are random, without ``values``."""
    source = ModelSource.resolve(
        recipe.model,
        task=recipe.task,
        random_weights=recipe.random_weights,
        trust_remote_code=recipe.trust_remote_code,
        scratch=scratch,
        values=values,
    )
    if source.task.of_images:
        _require_no_text(recipe, source)
    return source


def _require_no_text(recipe: Recipe, source: ModelSource) -> None:
    """Leave quietly if nothing that the recipe asks for needs a model that reads text.

    Raises:
        UsageError: every setting that does.
    """
    settings = {
        "calibration": recipe.calibration,
        "parity.text": recipe.parity.text,
        "dims.max_length": recipe.dims.max_length,
        "logits": recipe.logits != "all",
    }
    if asked := [name for name, setting in settings.items() if setting]:
        raise UsageError(f"{source.id} reads images, and these settings are for models that read text", asked, "leave them out")


def plan_of(recipe: Recipe, target: Target, source: ModelSource | None = None) -> tuple[Pass, ...]:
    """Return the passes: the recipe's, or else the target's; before them those that the recipe or the source ask for by themselves.

    Raises:
        RecipeError: an option of a pass that there is not, or that cannot be as it is given.
        UsageError: an option of a pass that the target does not run.
    """
    if recipe.passes is None:
        listed = passes.with_options(target.passes(recipe.precision), recipe.options)
    else:
        listed = passes.read_plan(recipe.passes)
    names = [passes.name_of(rewrite) for rewrite in listed]
    first: list[Pass] = []
    if recipe.logits != "all":
        if "keep_last_logits" in names:
            raise UsageError(f"logits: {recipe.logits} and the pass keep_last_logits both cut the logits", fix="leave one of them out")
        first.append(passes.load("keep_last_logits", {"keep": recipe.logits}))
    if source and source.task.name == POOLED and "pool_sentences" not in names:
        first.append(passes.load("pool_sentences", sentence.read_pooling(source.folder)))
    return (*first, *listed)


@dataclass
class Conversion:
    """One recipe on the way to its artifact.

    ``replaced``: parameters of the untouched model that passes gave other values, and ``rounding``, as in `TracedModel`: of the
    model that was rewritten last. ``scratch``: a folder for what is measured of the model; ``calibrations``: what was,
    for every trace of this conversion. ``promoted``: what weights are stored as, by name, that get more bits than the passes would
    give them. ``block_bytes``: of how many bytes of weights at a time the proof may run the artifact; 0: all of them.
    """

    recipe: Recipe
    target: Target
    source: ModelSource
    scratch: Path | None = None
    replaced: dict[str, Weight] = field(default_factory=dict)
    rounding: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    calibrations: dict[Any, Any] = field(default_factory=dict)
    promoted: dict[str, Storage] = field(default_factory=dict)
    block_bytes: int = 0

    @property
    def plan(self) -> tuple[Pass, ...]:
        """The passes, in order; what the recipe itself says of a weight goes before a promotion."""
        return self._plan(self.promoted)

    def _plan(self, promoted: Mapping[str, Storage]) -> tuple[Pass, ...]:
        listed = plan_of(self.recipe, self.target, self.source)
        if not promoted:
            return listed
        from calque.passes.quantize_weights import QuantizeWeights

        more = {escape(name): storage for name, storage in promoted.items()}
        # The first pattern that fits decides, and a recipe's own come first.
        return tuple(
            replace(step, overrides={**step.overrides, **more, **step.overrides}) if isinstance(step, QuantizeWeights) else step
            for step in listed
        )

    @property
    def narrow(self) -> NarrowType | None:
        """What weights are stored in that are numbers and no float32: as the passes cast them; None where they do not."""
        return next((step.dtype for step in self.plan if passes.name_of(step) == "cast_precision"), None)  # type: ignore[attr-defined]

    @property
    def quantizes(self) -> bool:
        """Whether weights become integers."""
        return any(passes.name_of(step) == QUANTIZING for step in self.plan)

    def quantized(self, model: TracedModel, promoted: Mapping[str, Storage]) -> TracedModel:
        """Return a copy of the traced model with integers for weights, ``promoted`` ones in more bits; no pass after that has run."""
        made = model.copy()
        for step in self._plan(promoted):
            passes.run_one(step, made)
            if passes.name_of(step) == QUANTIZING:
                break
        return made

    def trace(self) -> TracedModel:
        """Return the traced model, its ledger balanced, its limits those of the recipe too, with the text it is measured on."""
        model = converters.load(self.source.task)(self.source)
        model.weights.check()
        model.quantized = {name: (form, NUMBERS) for name, weight in model.weights.entries.items() if (form := form_of(weight))}
        model.limits = self.bounded(model.limits)
        model.scratch = self.scratch
        if given := self.recipe.calibration:
            longest = min(filter(None, (model.limits.max_length, model.trained_length)), default=None)
            model.samples = spread_rows(Path(given.text), self.source, given.samples, longest)
            model.calibrations = self.calibrations
        return model

    def rewrite(self, model: TracedModel) -> dict[str, passes.Rewrites]:
        """Return what each pass did to the traced model and left alone, by name."""
        done = passes.run_all(self.plan, model)
        self.replaced, self.rounding = model.replaced, model.rounding
        return done

    def bounded(self, limits: Limits) -> Limits:
        """Return the limits with the recipe's own ``max_length``, if that is the smaller."""
        lengths = [length for length in (limits.max_length, self.recipe.dims.max_length) if length]
        return replace(limits, max_length=min(lengths, default=None))

    def shortened(self, limits: Limits) -> str:
        """Return the sentence that says that the artifact takes less than the recipe asks for; nothing where it takes as much."""
        asked, got = self.recipe.dims.max_length, limits.max_length
        return f"The recipe asks for a max_length of {asked}, the model ends at {got}." if asked and got and got < asked else ""

    def eager(self) -> Module:
        """Return the untouched eager model, computing in float32, with weights of the recipe's precision."""
        from calque.validation.eager import narrowed, with_weights

        return with_weights(narrowed(self.source.load_eager(), self.narrow), self.replaced)

    @property
    def special_tokens(self) -> set[int]:
        """Tokens that mark a text, which random rows leave out."""
        config = self.source.config.get_text_config().to_dict()
        return {value for name, value in config.items() if name.endswith("token_id") and isinstance(value, int)}

    def streamed_eager(self) -> Module:
        """Return the model that `eager` returns, each of its weights read where its code uses it and dropped after."""
        from calque.converters.untouched import untouched
        from calque.validation.streamed import streamed

        model, weights = untouched(self.source)
        if narrow := self.narrow:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            weights |= {name: cast(cast(weights[name], narrow), "float32") for name in parameters}
        return streamed(model, {**weights, **self.replaced})

    def require_memory(self, model: TracedModel) -> int:
        """Return of how many bytes of weights at a time the proof may run the artifact, 0 where all of them fit.

        Raises:
            WontFit: what passes the memory that the recipe allows.
        """
        blocks = isinstance(self.target, targets.RunsBlocks)
        mapped = preflight.mapped_bytes(self.source)
        return memory_plan.require_memory(model, self.recipe.max_memory, blocks, mapped, self.writing_bytes(model))

    def writing_bytes(self, model: TracedModel) -> int:
        """Return what the target takes to write its file, where it has all weights in memory for that; 0 where it has not."""
        return self.target.emission_bytes(preflight.weights_bytes(model)) if isinstance(self.target, targets.Embeds) else 0

    def in_blocks(self, artifact: Artifact, exact: bool = False) -> Session:
        """Return a session that runs the artifact some nodes at a time, as the memory allowed asks for."""
        assert isinstance(self.target, targets.RunsBlocks)
        return self.target.blocks(artifact, self.recipe.threads, self.block_bytes, exact)

    def scenarios(self, limits: Limits, states: tuple[StateSpec, ...]) -> list[Scenario]:
        """Return the scenarios that the recipe chooses among those that fit an artifact of these limits and states.

        Raises:
            UsageError: a name that is no scenario of this artifact.
        """
        built = scenarios.of_images() if self.source.task.of_images else self._of_tokens(limits, states)
        wanted = self.recipe.parity.scenarios
        if wanted == "all":
            return built
        names = [scenario.name for scenario in built]
        if unknown := sorted(set(wanted) - set(names)):
            raise UsageError(f"no scenario is called {', '.join(unknown)}", fix=f"scenarios of this model: {', '.join(names)}")
        return [scenario for scenario in built if scenario.name in wanted]

    def _of_tokens(self, limits: Limits, states: tuple[StateSpec, ...]) -> list[Scenario]:
        """Return every scenario that fits an artifact that reads tokens."""
        config = self.source.config.get_text_config()
        windows = {state.window for state in states if state.window}
        if not states and (window := config.to_dict().get("sliding_window")):
            windows = {window}
        return scenarios.build(
            limits,
            config.vocab_size,
            excluded=self.special_tokens,
            windows=windows,
            max_positions=getattr(config, "max_position_embeddings", None),
            cached=bool(states),
            in_slots=any(state.update == "in_place" for state in states),
        )

    def open_or_stand_in(self, artifact: Artifact) -> tuple[Session, str]:
        """Return a session over the artifact; or over the graph that it was written from, and why the artifact cannot be run here."""
        from calque.runtime.limits import check_limits
        from calque.traced_session import TracedSession

        try:
            return self.target.open(artifact, self.recipe.threads), ""
        except TargetUnavailable as error:
            why = error.what
        return TracedSession(self.rewritten(), partial(check_limits, artifact.limits)), why

    def rewritten(self) -> TracedModel:
        """Return the model traced anew, after its passes: what the artifact was written from."""
        model = self.trace()
        passes.run(self.plan, model)
        return model

    def room(self) -> int | None:
        """Return how many bytes of the memory allowed nothing holds yet; None where any may be used."""
        return None if self.recipe.max_memory is None else self.recipe.max_memory - tree_rss()

    def first_divergence(
        self, artifact: Artifact, chosen: list[Scenario], expected: dict[str, dict[str, Reference]], rows: Rows
    ) -> list[str]:
        """Return a line that names the first stage and the first layer that diverge, for the first scenario that failed; why, if known."""
        from calque.validation.bisect import bisect
        from calque.validation.compare import EXACT
        from calque.validation.drive import ModelIO
        from calque.validation.eager import eager_states
        from calque.validation.prove import routed_hint

        failed = next(row["name"].removesuffix(EXACT) for row in rows if row["status"] == "failed")
        scenario = next(scenario for scenario in chosen if scenario.name == failed)
        if scenario.refuse:
            return []
        eager = self.eager()
        stages = list(self.stages(artifact))
        found = bisect(stages, scenario, expected[failed], lambda tokens: eager_states(eager, tokens))
        return [*([f"{failed} {found.text}"] if found else ()), *routed_hint(ModelIO.of(artifact))]

    def stages(self, artifact: Artifact) -> Iterator[Stage]:
        """Yield every stage of the conversion as something that runs: the trace, the graph after each pass, the artifact."""
        from calque.traced_session import TracedSession
        from calque.validation.bisect import Stage
        from calque.validation.drive import ModelIO

        io = ModelIO.of(artifact, exact=True)

        def stage(name: str, model: TracedModel) -> Stage:
            # Inputs and states are those of the layout that the cache has so far, judged as the artifact is.
            states = tuple(replace(state, dtype=io.dtype) for state in model.states)
            return Stage(name, lambda: TracedSession(model), replace(io, inputs=model.inputs, states=states))

        model = self.trace()
        if not self.replaced:
            yield stage("trace", model.copy())
        for rewrite in self.plan:
            passes.run_one(rewrite, model)
            # Before its weights are replaced the graph is that of another model.
            if bool(self.replaced) == bool(model.replaced):
                yield stage(passes.name_of(rewrite), model.copy())
        threads = self.recipe.threads
        yield Stage(self.recipe.target, lambda: targets.exact(self.target, artifact, threads) or self.target.open(artifact, threads), io)
