"""The whole toolchain: a recipe in, a proven artifact out. Read this first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calque import __version__, converters, facts, passes, plugins, preflight, sentence, targets
from calque.artifact import MANIFEST, REPORT, Artifact, Check, Proof, file_sha256
from calque.companions import licence_note
from calque.errors import TargetUnavailable, Unsupported, UsageError
from calque.recipe import Recipe, unbuilt_settings
from calque.source import ModelSource
from calque.stages import Stages
from calque.staging import check_output, staging
from calque.targets import Target
from calque.tasks import POOLED
from calque.tokenizer import complete_tokenizer
from calque.traced import TracedModel
from calque.validation import scenarios
from calque.validation.report import Report

if TYPE_CHECKING:
    from torch.nn import Module

    from calque.artifact import Limits
    from calque.passes import Pass
    from calque.session import Session
    from calque.states import StateSpec
    from calque.validation.bisect import Stage
    from calque.validation.reference import Reference
    from calque.validation.scenarios import Scenario

TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")

# What numerics are proved by where the artifact's runtime is not here: the graph after its passes, before the target wrote it.
STAND_IN = "traced graph"

Rows = list[dict[str, Any]]


def silent(_: str) -> None:
    """Say nothing of the progress."""


def convert(recipe: Recipe, out: Path, *, force: bool = False, progress: Callable[[str], None] = silent) -> Artifact:
    """Leave a proven artifact in ``out`` and return it; or nothing there, and what failed the proof in ``out.rejected``.

    Raises:
        CalqueError: with the exit code of its kind.
    """
    out = Path(out)
    target = open_target(recipe)
    check_output(out, force)
    use_threads(recipe)
    stages = Stages(progress)
    with staging(out, force) as folder:
        with TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            with stages("source"):
                source = resolve(recipe, Path(scratch))
                preflight.require_tensors(source)
                preflight.require_disk(source, folder, recipe.precision)
            artifact, report = emit(recipe, target, source, folder, stages)
            proof, report = prove(recipe, target, source, artifact, report, Path(scratch), stages)
        if proof.numerics.status == "not_run":
            raise Unsupported("nothing could be proved, so nothing was written", [proof.numerics.reason or ""], "choose scenarios that run")
        replace(report, failures=proof.failures).measured(folder, stages.done).write(folder)
        replace(artifact, proof=proof, files=digests(folder)).write_manifest()
        proof.raise_if_failed()
        require(recipe, proof)
    return Artifact.read(out)


def emit(recipe: Recipe, target: Target, source: ModelSource, folder: Path, stages: Stages) -> tuple[Artifact, Report]:
    """Leave the target's files and the model's companions in ``folder``; return the artifact, not yet proved, and what is known of it."""
    with stages("trace"):
        model = trace(recipe, source)
        parameters = facts.count_parameters(model)
    with stages("passes"):
        done = passes.run_all(plan_of(recipe, target, source), model)
        if problems := target.problems(model):
            fixes = "; ".join(dict.fromkeys(problem.fix for problem in problems))
            raise Unsupported(f"{target.name} cannot express {source.id}", [str(problem) for problem in problems], fixes)
        preflight.require_cache(model)
        # A scenario that this model has not is said before its weights are written.
        scenarios_of(recipe, source, model.limits, model.states)
    with stages("lower"):
        lowered = target.lower(model)
    with stages("emit"):
        emitted = target.emit(lowered, model, folder)
        notes = copy_companions(source, folder)
        described = source.describe()
    limits = bounded(recipe, emitted.limits)
    report = Report(
        source=facts.source_facts(source, described, parameters),
        target=recipe.target,
        precision=recipe.precision,
        limits=asdict(limits),
        passes=tuple({"name": name, **asdict(did)} for name, did in done.items()),
        weights=tuple(facts.weights_by_layer(model)),
    )
    artifact = Artifact(
        folder=folder,
        target=recipe.target,
        recipe=recipe.as_manifest(),
        source=described,
        precision=recipe.precision,
        files={},
        graphs=emitted.graphs,
        states=model.states,
        passes={name: did.count for name, did in done.items()},
        tools={**tool_versions(), **plugins.versions(recipe.target, done)},
        limits=limits,
    )
    artifact, more = targets.finish(target, artifact, source.config)
    return artifact, report.noted(*notes, *more, shortened(recipe, limits))


def prove(
    recipe: Recipe, target: Target, source: ModelSource, artifact: Artifact, report: Report, scratch: Path, stages: Stages
) -> tuple[Proof, Report]:
    """Return the proof of the artifact against the untouched eager model, and the report with a row per scenario and per layer."""
    from calque.validation.drive import ModelIO
    from calque.validation.layers import layer_parity, states_alone, telling_scenario
    from calque.validation.prove import prove as run_scenarios
    from calque.validation.reference import store_reference

    chosen = scenarios_of(recipe, source, artifact.limits, artifact.states)
    shown = telling_scenario(chosen) if artifact.states else None
    load_eager = cache(partial(eager_of, recipe, source))
    with stages("reference"):
        becomes = partial(passes.expected, plan_of(recipe, target, source))
        expected = store_reference(load_eager, chosen, ModelIO.of(artifact), artifact.folder, scratch, becomes)
        states, note = states_alone(load_eager(), shown) if shown else ({}, "")
        load_eager.cache_clear()  # what opens the artifact needs the memory
    with stages("prove"):
        session, why = open_or_stand_in(recipe, target, source, artifact)
        proof, rows = run_scenarios(artifact, session, chosen, expected)
        if why:
            left_out = Check("not_run", target.name, why)
            proof = replace(proof, numerics=replace(proof.numerics, by=STAND_IN), build=left_out, execution=left_out)
            report = report.noted(f"Build and execution were not run here: {why}. Numerics were proved on the {STAND_IN}.")
        layers, note = layer_parity(session, ModelIO.of(artifact), shown, states) if shown and states else ((), note)
    if proof.numerics.status == "failed":
        with stages("bisect"):
            first = first_divergence(recipe, target, source, artifact, chosen, expected, rows)
            proof = replace(proof, failures=(*first, *proof.failures))
    return proof, replace(report, scenarios=tuple(rows), layers=layers).noted(note)


def open_or_stand_in(recipe: Recipe, target: Target, source: ModelSource, artifact: Artifact) -> tuple[Session, str]:
    """Return a session over the artifact; or over the graph that it was written from, and why the artifact cannot be run here."""
    from calque.runtime.limits import check_limits
    from calque.traced_session import TracedSession

    try:
        return target.open(artifact, recipe.threads), ""
    except TargetUnavailable as error:
        why = error.what
    model = trace(recipe, source)
    passes.run(plan_of(recipe, target, source), model)
    return TracedSession(model, partial(check_limits, artifact.limits)), why


def eager_of(recipe: Recipe, source: ModelSource) -> Module:
    """Return the untouched eager model, computing in float32, with weights of the recipe's precision."""
    from calque.validation.eager import in_precision

    return in_precision(source.load_eager(), recipe.precision)


def tool_versions() -> dict[str, str]:
    """Return the version of Calque and of every package that decides what a conversion makes."""
    return {"calque": __version__, **{name: version(name) for name in TOOLS}}


def open_target(recipe: Recipe) -> Target:
    """Return the target with the recipe's options.

    Raises:
        UsageError: no such target, no such option, or a scenario that no model has.
        Unsupported: settings that this version, or the target, cannot follow.
    """
    target = targets.make(recipe.target, recipe.options)
    if recipe.parity.scenarios != "all" and (unknown := scenarios.unknown(recipe.parity.scenarios)):
        lines = [f"{name}{hint}" for name, hint in unknown.items()]
        raise UsageError("no model has these scenarios", lines, "parity: {scenarios: all} runs those that the model has")
    refused = unbuilt_settings(recipe)
    if recipe.precision not in target.precisions:
        refused.append(f"precision: {recipe.precision}  {recipe.target} has {', '.join(target.precisions)}")
    if recipe.layout not in (layouts := targets.layouts(target, recipe.precision)):
        refused.append(f"layout: {recipe.layout}  {recipe.target} in {recipe.precision} has {', '.join(layouts)}")
    if refused:
        raise Unsupported("the recipe asks for what this version cannot do", list(dict.fromkeys(refused)), "change these settings")
    passes.check_order(plan_of(recipe, target))
    if recipe.passes is not None:
        passes.check_precision(recipe.precision, passes.read_plan(recipe.passes), target.passes(recipe.precision))
        if silent := targets.deciding_passes(recipe.target, recipe.options, recipe.precision):
            raise UsageError("options that choose passes do nothing beside a list of passes", silent, "leave one of the two out")
    return target


def use_threads(recipe: Recipe) -> None:
    """Make torch use as many threads as the recipe says, where it says so."""
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)


def shortened(recipe: Recipe, limits: Limits) -> str:
    """Return the sentence that says that the artifact takes less than the recipe asks for; nothing where it takes as much."""
    asked, got = recipe.dims.max_length, limits.max_length
    return f"The recipe asks for a max_length of {asked}, the model ends at {got}." if asked and got and got < asked else ""


def bounded(recipe: Recipe, limits: Limits) -> Limits:
    """Return the limits with the recipe's own ``max_length``, if that is the smaller."""
    lengths = [length for length in (limits.max_length, recipe.dims.max_length) if length]
    return replace(limits, max_length=min(lengths, default=None))


def resolve(recipe: Recipe, scratch: Path, values: bool = True) -> ModelSource:
    """Return the source the recipe names; its headers are read, its tensors are not, nor drawn if they are random, without ``values``."""
    return ModelSource.resolve(
        recipe.model,
        task=recipe.task,
        random_weights=recipe.random_weights,
        trust_remote_code=recipe.trust_remote_code,
        scratch=scratch,
        values=values,
    )


def trace(recipe: Recipe, source: ModelSource) -> TracedModel:
    """Return the traced model, its ledger balanced, its limits those of the recipe too."""
    model = converters.load(source.task)(source)
    model.weights.check()
    model.limits = bounded(recipe, model.limits)
    return model


def plan_of(recipe: Recipe, target: Target, source: ModelSource | None = None) -> tuple[Pass, ...]:
    """Return the passes: the recipe's, or else the target's; before them those that the recipe or the source ask for by themselves."""
    listed = target.passes(recipe.precision) if recipe.passes is None else passes.read_plan(recipe.passes)
    names = [passes.name_of(rewrite) for rewrite in listed]
    first: list[Pass] = []
    if recipe.logits != "all":
        if "keep_last_logits" in names:
            raise UsageError(f"logits: {recipe.logits} and the pass keep_last_logits both cut the logits", fix="leave one of them out")
        first.append(passes.load("keep_last_logits", {"keep": recipe.logits}))
    if source and source.task.name == POOLED and "pool_sentences" not in names:
        first.append(passes.load("pool_sentences", sentence.read_pooling(source.folder)))
    return (*first, *listed)


def copy_companions(source: ModelSource, folder: Path) -> list[str]:
    """Leave tokenizer, chat template, configs and licences beside the model; return what the user should know of them."""
    for path in source.companion_files():
        destination = folder / path.relative_to(source.folder)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, destination)
    return [complete_tokenizer(source.folder, folder, source.trust_remote_code), licence_note(source.folder)]


def scenarios_of(recipe: Recipe, source: ModelSource, limits: Limits, states: tuple[StateSpec, ...]) -> list[Scenario]:
    """Return the scenarios that the recipe chooses among those that fit an artifact of these limits and states.

    Raises:
        UsageError: a name that is no scenario of this artifact.
    """
    from calque.validation.scenarios import build

    config = source.config.get_text_config()
    special = {value for name, value in config.to_dict().items() if name.endswith("token_id") and isinstance(value, int)}
    windows = {state.window for state in states if state.window}
    if not states and (window := config.to_dict().get("sliding_window")):
        windows = {window}
    built = build(
        limits,
        config.vocab_size,
        excluded=special,
        windows=windows,
        max_positions=getattr(config, "max_position_embeddings", None),
        cached=bool(states),
        in_slots=any(state.update == "in_place" for state in states),
    )
    wanted = recipe.parity.scenarios
    if wanted == "all":
        return built
    if unknown := sorted(set(wanted) - {scenario.name for scenario in built}):
        raise UsageError(
            f"no scenario is called {', '.join(unknown)}", fix=f"scenarios of this model: {', '.join(scenario.name for scenario in built)}"
        )
    return [scenario for scenario in built if scenario.name in wanted]


def first_divergence(
    recipe: Recipe,
    target: Target,
    source: ModelSource,
    artifact: Artifact,
    chosen: list[Scenario],
    expected: dict[str, dict[str, Reference]],
    rows: Rows,
) -> list[str]:
    """Return a line that names the first stage and the first layer that diverge, for the first scenario that failed."""
    from calque.validation.bisect import bisect
    from calque.validation.eager import eager_states

    failed = next(row["name"] for row in rows if row["status"] == "failed")
    scenario = next(scenario for scenario in chosen if scenario.name == failed)
    if scenario.refuse:
        return []
    eager = eager_of(recipe, source)
    stages = list(sessions(recipe, target, source, artifact))
    found = bisect(stages, scenario, expected[failed], lambda tokens: eager_states(eager, tokens))
    return [f"{failed} {found.text}"] if found else []


def sessions(recipe: Recipe, target: Target, source: ModelSource, artifact: Artifact) -> Iterator[Stage]:
    """Yield every stage of the conversion as something that runs: the trace, the graph after each pass, the artifact."""
    from calque.traced_session import TracedSession
    from calque.validation.bisect import Stage
    from calque.validation.drive import ModelIO

    io = ModelIO.of(artifact)

    def stage(name: str, model: TracedModel) -> Stage:
        # Inputs and states are those of the layout that the cache has so far, judged as the artifact is.
        states = tuple(replace(state, dtype=io.dtype) for state in model.states)
        return Stage(name, lambda: TracedSession(model), replace(io, inputs=model.inputs, states=states))

    model = trace(recipe, source)
    yield stage("trace", model.copy())
    for rewrite in plan_of(recipe, target, source):
        passes.run_one(rewrite, model)
        yield stage(passes.name_of(rewrite), model.copy())
    yield Stage(recipe.target, lambda: target.open(artifact, recipe.threads), io)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of the artifact but the manifest itself and the report, which holds measurements."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: file_sha256(path) for name, path in names.items() if name not in (MANIFEST, REPORT)}


def require(recipe: Recipe, proof: Proof) -> None:
    """Leave quietly unless the recipe requires a check that did not run.

    Raises:
        TargetUnavailable: which check, and why it did not run.
    """
    if recipe.require is None:
        return
    asked = ("build", "execution") if recipe.require == "execution" else ("build",)
    missing = [f"{name}: {getattr(proof, name).reason}" for name in asked if getattr(proof, name).status == "not_run"]
    if missing:
        raise TargetUnavailable(f"--require {recipe.require}: a check did not run", missing, "run where the runtime and its device are")


def plan(recipe: Recipe, progress: Callable[[str], None] = silent) -> dict[str, Any]:
    """Return what converting would emit, need and refuse; nothing is kept on disk."""
    from calque.validation.reference import predicted_bytes

    target = open_target(recipe)
    stages = Stages(progress)
    with TemporaryDirectory(prefix="calque-plan-") as scratch:
        with stages("source"):
            source = resolve(recipe, Path(scratch), values=False)
            preflight.require_tensors(source)
        with stages("trace"):
            model = trace(recipe, source)
            traced = len(model.graph.nodes)
        with stages("passes"):
            counts = passes.run(plan_of(recipe, target, source), model)
            problems = target.problems(model)
        chosen = scenarios_of(recipe, source, model.limits, model.states)
        states = {state.output for state in model.states}
        beside = preflight.companion_bytes(source) + predicted_bytes(chosen, [spec for spec in model.outputs if spec.name not in states])
    return {
        "model": source.id,
        "target": recipe.target,
        "precision": recipe.precision,
        **preflight.sizes(model, beside),
        "nodes": {"traced": traced, "after passes": len(model.graph.nodes)},
        "passes": counts,
        "states": len(model.states),
        "limits": asdict(model.limits),
        "problems": [asdict(problem) for problem in problems],
    }
