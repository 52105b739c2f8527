"""Every name of TensorRT that Calque uses is in the releases it builds for: `pytest -m api -n0 tests/api`, from the package index."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.api.bindings import Api
from tests.api.names import Problem, build_problems, problems
from tests.api.reader import uses

pytestmark = pytest.mark.api

TARGETS = Path(__file__).parents[2] / "targets"
# Files that run where a package is taken, with any release from the oldest on; and those of Calque itself.
SCRIPTS = sorted((TARGETS / "tensorrt_package").glob("*.py"))
SOURCES = sorted(path for path in TARGETS.glob("*tensorrt*.py") if "torch_tensorrt" not in path.name)

REMOVED = """
    from importlib import import_module

    trt = import_module("tensorrt")

    def build(path):
        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        config = builder.create_builder_config()
        config.set_flag(trt.BuilderFlag.FP16)
        config.int8_calibrator = None
        set_up(config)
        if hasattr(trt.BuilderFlag, "INT8"):
            config.set_flag(getattr(trt.BuilderFlag, "INT8"))
        return trt.Runtime(logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))

    def set_up(options):
        options.set_calibration_profile(None)

    def measure(engine: "trt.ICudaEngine"):
        for tensor in [engine.get_aliased_input_tensor(name=n) for n in ()]:
            print(tensor.shape)
        return engine.device_memory_size

    class Held:
        def __init__(self, path):
            self.engine = build(path)

        def context(self):
            return self.engine.create_execution_context_without_device_memory()
"""

SOUND = """
    from importlib import import_module

    def load():
        for name in ("tensorrt", "tensorrt_rtx"):
            try:
                return import_module(name)
            except ImportError:
                continue

    trt = load()

    def parse(network, logger, path):
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(path):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            return [f"{error.node_name()}: {error.desc()}" for error in errors]
        return [tensor.name.upper() for tensor in map(network.get_input, range(network.num_inputs))]

    def build(path, names):
        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parse(network, logger, path)
        config = builder.create_builder_config()
        for name in names:
            config.set_flag(getattr(trt.BuilderFlag, name))
        profile = builder.create_optimization_profile()
        profile.set_shape("input_ids", min=(1, 1), opt=(1, 1), max=(1, 8))
        config.add_optimization_profile(profile)
        if hasattr(config, "num_compute_capabilities"):
            config.num_compute_capabilities = 1
        return builder.build_serialized_network(network, config)
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text).lstrip())
    return path


def test_package_scripts_use_only_names_of_every_release(newest: Api, rtx: Api, oldest: Api) -> None:
    assert not [str(each) for path in SCRIPTS for each in problems(path, [newest, rtx], oldest)]
    assert all(uses(path, [newest, rtx]) for path in SCRIPTS if "engine" in path.name), "a script that builds or runs uses some"


def test_sources_use_only_names_of_both_packages(newest: Api, rtx: Api) -> None:
    assert not [str(each) for path in SOURCES for each in problems(path, [newest, rtx])]


def test_a_removed_name_is_reported_with_its_line(newest: Api, rtx: Api, tmp_path: Path) -> None:
    path = written(tmp_path, REMOVED)
    lines = path.read_text().splitlines()
    found = [(lines[problem.line - 1].strip(), problem.what) for problem in problems(path, [newest, rtx])]
    everywhere = f"is not in {newest.label}, tensorrt_rtx"
    assert found == [
        (
            "network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))",
            f"NetworkDefinitionCreationFlag.EXPLICIT_BATCH {everywhere}",
        ),
        ("config.set_flag(trt.BuilderFlag.FP16)", f"BuilderFlag.FP16 {everywhere}"),
        ("config.int8_calibrator = None", f"IBuilderConfig.int8_calibrator {everywhere}"),
        ('if hasattr(trt.BuilderFlag, "INT8"):', f"BuilderFlag.INT8 {everywhere}"),
        ('config.set_flag(getattr(trt.BuilderFlag, "INT8"))', f"BuilderFlag.INT8 {everywhere}"),
        ("options.set_calibration_profile(None)", f"IBuilderConfig.set_calibration_profile {everywhere}"),
        ("return engine.device_memory_size", f"ICudaEngine.device_memory_size {everywhere}"),
        (
            "return self.engine.create_execution_context_without_device_memory()",
            f"ICudaEngine.create_execution_context_without_device_memory {everywhere}",
        ),
    ]


def test_a_sound_script_has_no_problem(newest: Api, rtx: Api, oldest: Api, tmp_path: Path) -> None:
    path = written(tmp_path, SOUND)
    assert not problems(path, [newest, rtx], oldest)
    assert {use.owner for use in uses(path, [newest, rtx])} == {
        "", "Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "Logger",
        "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError",
    }  # fmt: skip


def test_a_name_of_one_package_alone_needs_a_question(newest: Api, rtx: Api, tmp_path: Path) -> None:
    path = written(tmp_path, "def f(config: 'trt.IBuilderConfig'):\n    config.num_compute_capabilities = 1\n")
    assert problems(path, [newest, rtx]) == [
        Problem("script.py", 2, f"IBuilderConfig.num_compute_capabilities is not in {newest.label}"),
    ]


def test_a_name_of_one_package_may_follow_a_question_for_another(newest: Api, rtx: Api, oldest: Api, tmp_path: Path) -> None:
    text = """
        def f(config: 'trt.IBuilderConfig', name: str):
            if hasattr(trt, "ComputeCapability"):
                config.num_compute_capabilities = len(trt.ComputeCapability.__members__)
                config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
                config.set_calibration_profile(None)
    """
    path = written(tmp_path, text)
    assert [problem.line for problem in problems(path, [newest, rtx], oldest)] == [5]


def test_a_wrong_argument_is_reported(newest: Api, tmp_path: Path) -> None:
    path = written(tmp_path, "def f(profile: 'trt.IOptimizationProfile'):\n    profile.set_shape('x', least=(1,))\n")
    assert problems(path, [newest]) == [Problem("script.py", 2, f"IOptimizationProfile.set_shape: no argument least in {newest.label}")]


def test_a_name_that_only_a_later_release_has_is_reported(newest: Api, oldest: Api, tmp_path: Path) -> None:
    path = written(tmp_path, "kind = trt.CausalMaskKind.LOWER_RIGHT\n")
    assert [problem.what for problem in problems(path, [newest], oldest)] == [
        f"trt.CausalMaskKind is not in {oldest.label}",
    ]


def test_names_of_a_build_file_are_those_of_the_field(newest: Api, rtx: Api, tmp_path: Path) -> None:
    sound = 'build = {"builder_flags": ["STRIP_PLAN"], "memory_pool_limits": {"WORKSPACE": 1}, "onnx": "A"}\n'
    path = written(tmp_path, sound)
    assert not build_problems(path, [newest, rtx])
    wrong = """build["builder_flags"] = ["INT8"]
build.get("profiling_verbosity", "VERBOSE")
build.get("compute_capabilities", ["SM86", "SM90"])
"""
    path = written(tmp_path, sound + wrong)
    assert [(problem.line, problem.what) for problem in build_problems(path, [newest, rtx])] == [
        (2, f"BuilderFlag.INT8 is not in {newest.label}, tensorrt_rtx"),
        (3, f"ProfilingVerbosity.VERBOSE is not in {newest.label}, tensorrt_rtx"),
        (4, "ComputeCapability.SM90 is not in tensorrt_rtx"),
    ]


def test_sources_name_only_members_in_build_files(newest: Api, rtx: Api) -> None:
    assert not [str(each) for path in (*SCRIPTS, *SOURCES) for each in build_problems(path, [newest, rtx])]
