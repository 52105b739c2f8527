"""The whole toolchain: a recipe in, a proven artifact out. Read this first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calque import __version__, ceiling, facts, memory_plan, passes, plugins, preflight, targets
from calque.artifact import ENGINE, MANIFEST, REPORT, Artifact, Check, Proof, file_sha256
from calque.checkpoint import read_json
from calque.companions import CONFIG, licence_note
from calque.console import size
from calque.conversion import QUANTIZING, Conversion, open_target, resolve, use_threads
from calque.errors import TargetUnavailable, Unsupported
from calque.fastest import convert_fastest
from calque.quality_gate import QualityGate
from calque.recipe import Recipe
from calque.source import ModelSource
from calque.stages import Stages
from calque.staging import check_output, staging
from calque.tokenizer import complete_tokenizer
from calque.traced import TracedModel
from calque.validation.report import Report

TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")

# What numerics are proved by where the artifact's runtime is not here: the graph after its passes, before the target wrote it.
STAND_IN = "traced graph"
# And where it is too large for the memory allowed: the artifact, some of its nodes after the other.
BLOCKS = "blocks"


def silent(_: str) -> None:
    """Say nothing of the progress."""


def convert(recipe: Recipe, out: Path, *, force: bool = False, progress: Callable[[str], None] = silent) -> Artifact:
    """Leave a proven artifact in ``out`` and return it; or nothing there, and what failed the proof in ``out.rejected``.

    Raises:
        CalqueError: with the exit code of its kind.
    """
    out = Path(out)
    target = open_target(recipe)
    memory_plan.require_tools(recipe.max_memory)
    check_output(out, force)
    if isinstance(target, targets.Chooses):
        return convert_fastest(recipe, target, out, convert, force=force, progress=progress)
    use_threads(recipe)
    stages = Stages(progress)
    with staging(out, force) as folder, ceiling.under(recipe.max_memory, stages.doing):
        with TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            with stages("source"):
                source = resolve(recipe, Path(scratch))
                preflight.require_tensors(source)
                preflight.require_disk(source, folder, recipe.precision)
            conversion = Conversion(recipe, target, source, Path(scratch))
            gate = QualityGate.of(conversion, Path(scratch))
            with stages("trace"):
                model = conversion.trace()
            gate.judge_weights(model, stages)  # what it promotes is stored in more bits
            artifact, report = emit(conversion, model, folder, stages)
            proof, report = prove(conversion, artifact, report, Path(scratch), stages)
            artifact, proof, report = build(conversion, artifact, proof, report, stages)
            proof = gate.judge_artifact(artifact, proof, stages)
        if proof.numerics.status == "not_run":
            raise Unsupported("nothing could be proved, so nothing was written", [proof.numerics.reason or ""], "choose scenarios that run")
        report = replace(report, failures=proof.failures, quality=gate.data()).noted(*gate.said())
        report.measured(folder, stages.done).write(folder)
        replace(artifact, proof=proof, files=digests(folder)).write_manifest()
        gate.raise_if_failed(proof)
        proof.raise_if_failed()
        require(recipe, proof)
    return Artifact.read(out)


def emit(conversion: Conversion, model: TracedModel, folder: Path, stages: Stages) -> tuple[Artifact, Report]:
    """Leave the target's files and the model's companions in ``folder``; return the artifact, not yet proved, and what is known of it."""
    recipe, target, source = conversion.recipe, conversion.target, conversion.source
    parameters = facts.count_parameters(model)
    with stages("passes"):
        done = conversion.rewrite(model)
        if problems := target.problems(model):
            fixes = "; ".join(dict.fromkeys(problem.fix for problem in problems))
            raise Unsupported(f"{target.name} cannot express {source.id}", [str(problem) for problem in problems], fixes)
        preflight.require_cache(model)
        preflight.require_room(model, source, folder)
        conversion.block_bytes = conversion.require_memory(model)
        # A scenario that this model has not is said before its weights are written.
        conversion.scenarios(model.limits, model.states)
    with stages("lower"):
        lowered = target.lower(model)
    with stages("emit"):
        emitted = target.emit(lowered, model, folder)
        notes = copy_companions(source, folder)
        described = source.describe()
    limits = conversion.bounded(emitted.limits)
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
        tools={**tool_versions(), **{name: version(name) for name in targets.packages(target)}, **plugins.versions(recipe.target, done)},
        limits=limits,
    )
    artifact, more = targets.finish(target, artifact, source.config)
    left = done[QUANTIZING].skipped if QUANTIZING in done else ()
    said = (*facts.quantized_notes(model), *facts.unquantized_notes(left))
    return artifact, report.noted(*notes, *more, *said, conversion.shortened(limits))


def prove(conversion: Conversion, artifact: Artifact, report: Report, scratch: Path, stages: Stages) -> tuple[Proof, Report]:
    """Return the proof of the artifact against the untouched eager model, and the report with a row per scenario and per layer."""
    if conversion.block_bytes:
        return prove_by_blocks(conversion, artifact, report, scratch, stages)
    from calque.validation.drive import ModelIO
    from calque.validation.layers import layer_parity, states_alone, telling_scenario
    from calque.validation.prove import prove as run_scenarios
    from calque.validation.prove import prove_exactly, routed_note
    from calque.validation.reference import store_reference

    chosen = conversion.scenarios(artifact.limits, artifact.states)
    shown = telling_scenario(chosen) if artifact.states else None
    load_eager = cache(conversion.eager)
    with stages("reference"):
        becomes, io = partial(passes.expected, conversion.plan), ModelIO.of(artifact)
        rounding = conversion.rounding if io.rounded else None
        expected = store_reference(load_eager, chosen, io, artifact.folder, scratch, becomes, rounding=rounding)
        states, note = states_alone(load_eager(), shown) if shown else ({}, "")
        load_eager.cache_clear()  # what opens the artifact needs the memory
    with stages("prove"):
        session, why = conversion.open_or_stand_in(artifact)
        proof, rows = run_scenarios(artifact, session, chosen, expected)
        if why:
            left_out = Check("not_run", artifact.target, why)
            proof = replace(proof, numerics=replace(proof.numerics, by=STAND_IN), build=left_out, execution=left_out)
            report = report.noted(f"The artifact was not run here: {why}. Numerics were proved on the {STAND_IN}.")
        if exact := targets.exact(conversion.target, artifact, conversion.recipe.threads):
            session = exact
            proof, rows = prove_exactly(artifact, exact, chosen, expected, (proof, rows))
            report = report.noted(routed_note(artifact))
        layers, note = layer_parity(session, ModelIO.of(artifact, exact=True), shown, states) if shown and states else ((), note)
    if proof.numerics.status == "failed":
        with stages("bisect"):
            first = conversion.first_divergence(artifact, chosen, expected, rows)
            proof = replace(proof, failures=(*first, *proof.failures))
    return proof, replace(report, scenarios=tuple(rows), layers=layers).noted(note)


def prove_by_blocks(conversion: Conversion, artifact: Artifact, report: Report, scratch: Path, stages: Stages) -> tuple[Proof, Report]:
    """Return the proof of an artifact that does not fit into the memory allowed: as `prove`, a few weights in memory at a time.

    Eager and artifact compute what they do whole: weights are read where they are used, and the artifact's nodes run some after
    the other, each in one block. Which layer a failure comes from is not looked for.
    """
    from calque.validation.drive import ModelIO
    from calque.validation.prove import prove as run_scenarios
    from calque.validation.prove import prove_exactly, routed_note
    from calque.validation.reference import store_reference

    chosen = conversion.scenarios(artifact.limits, artifact.states)
    becomes = partial(passes.expected, conversion.plan)
    with stages("reference"):
        load, io = conversion.streamed_eager, ModelIO.of(artifact)
        rounding = conversion.rounding if io.rounded else None
        expected = store_reference(load, chosen, io, artifact.folder, scratch, becomes, rounding=rounding)
    with stages("prove"):
        proof, rows = run_scenarios(artifact, conversion.in_blocks(artifact), chosen, expected)
        if targets.exact(conversion.target, artifact, conversion.recipe.threads):
            proof, rows = prove_exactly(artifact, conversion.in_blocks(artifact, exact=True), chosen, expected, (proof, rows))
            report = report.noted(routed_note(artifact))
    why = f"the artifact was run in blocks of {size(conversion.block_bytes)} of weights, as more would pass --max-memory"
    left_out = Check("not_run", artifact.target, why)
    proof = replace(proof, numerics=replace(proof.numerics, by=BLOCKS), build=left_out, execution=left_out)
    note = f"Numerics were proved by blocks: {why}. It was not opened whole here, and layers were not compared."
    return proof, replace(report, scenarios=tuple(rows)).noted(note)


def build(conversion: Conversion, artifact: Artifact, proof: Proof, report: Report, stages: Stages) -> tuple[Artifact, Proof, Report]:
    """Return all three with what the runtime's builder, and its device where there is one, said of an artifact whose numbers are right."""
    target = conversion.target
    if not isinstance(target, targets.Builds):
        return artifact, proof, report
    if proof.numerics.status != "passed":
        left_out = Check("not_run", None, "its numbers are not right")
        return artifact, replace(proof, build=left_out, execution=left_out), report
    with stages("build"):
        built = target.build(artifact, conversion.rewritten, conversion.room())
    artifact = replace(artifact, tools={**artifact.tools, **built.tools})
    proof = replace(proof, build=built.build, execution=built.execution, failures=(*proof.failures, *built.failures))
    return artifact, proof, replace(report, build=built.measured).noted(*built.notes)


def tool_versions() -> dict[str, str]:
    """Return the version of Calque and of every package that decides what a conversion makes."""
    return {"calque": __version__, **{name: version(name) for name in TOOLS}}


def copy_companions(source: ModelSource, folder: Path) -> list[str]:
    """Leave tokenizer, chat template, configs and licences beside the model; return what the user should know of them."""
    for path in source.companion_files():
        destination = folder / path.relative_to(source.folder)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, destination)
    if source.quantization is not None:
        # The artifact's weights are no longer in that format: a loader told otherwise would look for them.
        table = {key: value for key, value in read_json(source.folder / CONFIG).items() if key != "quantization_config"}
        (folder / CONFIG).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return [complete_tokenizer(source.folder, folder, source.trust_remote_code), licence_note(source.folder)]


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of the artifact but the manifest itself, the report, which holds measurements, and an engine."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: file_sha256(path) for name, path in names.items() if name not in (MANIFEST, REPORT, ENGINE)}


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
    from calque.validation.reference import predicted_bytes, working_bytes

    target = open_target(recipe)
    stages = Stages(progress)
    with TemporaryDirectory(prefix="calque-plan-") as scratch:
        with stages("source"):
            source = resolve(recipe, Path(scratch), values=False)
            preflight.require_tensors(source)
        with stages("trace"):
            conversion = Conversion(recipe, target, source)
            gate = QualityGate.of(conversion, Path(scratch))
            model = conversion.trace()
            traced, parameters, judged = len(model.graph.nodes), facts.count_parameters(model), gate.working_bytes(model)
        with stages("passes"):
            counts = {name: done.count for name, done in conversion.rewrite(model).items()}
            problems = target.problems(model)
        block = 0 if problems else conversion.require_memory(model)
        limits = target.limits(model) if isinstance(target, targets.Bounds) else model.limits
        chosen = conversion.scenarios(limits, model.states)
        states = {state.output for state in model.states}
        outputs = [spec for spec in model.outputs if spec.name not in states]
        beside = preflight.companion_bytes(source) + predicted_bytes(chosen, outputs)
        working = judged + preflight.integers_bytes(model) + working_bytes(chosen, outputs, bool(states))
        needs = preflight.sizes(model, beside, working, preflight.mapped_bytes(source), block, conversion.writing_bytes(model))
        if isinstance(target, targets.Builds):
            needs["peak_memory_bytes"]["build"] = preflight.TOOLS_BYTES + target.builder_bytes(needs["weights_bytes"])
            needs["built_bytes"] = needs["weights_bytes"]  # about: it has them all
            needs.pop("decode_tokens_per_s_at_best", None)  # which is by this machine's memory, and not a device's
    return {
        "model": source.id,
        "target": recipe.target,
        "precision": recipe.precision,
        **needs,
        "proof_by_blocks": block > 0,
        "parameters": parameters,
        "nodes": {"traced": traced, "after passes": len(model.graph.nodes)},
        "passes": counts,
        "states": len(model.states),
        "limits": asdict(limits),
        "problems": [asdict(problem) for problem in problems],
    }
