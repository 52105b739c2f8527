"""Inductor and the machine's C++ compiler: a program in ATen in, a package ``.pt2`` out whose bytes depend on nothing else.

::

    NAME.pt2    NAME/data/aotinductor/model/model.wrapper.so       the code; of weights it has names, shapes and strides
                NAME/data/aotinductor/model/*_metadata.json        what it was compiled for

No place of this machine is in it: the compiler is called through a script that maps paths and leaves no build id. Weights are
stood in for by pages of zeros that are never touched, so that compiling takes no memory for them and can bake none in.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.export.graph_signature import InputKind, InputSpec

from calque.errors import TargetUnavailable, Unsupported
from calque.runtime.aotinductor_session import EXTENSIONS, MODEL, extensions

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

March = Literal["portable", "native"]

INSTALL = "install one, such as Debian's package g++, or name one in the environment variable CXX"
# The last lines of what a compiler says are where it says what is wrong.
SAID = 12
# What code takes at most: 0.4 to 0.6 MB were measured for graphs of 130 to 600 nodes, with our own kernels in it.
CODE_BYTES, NODE_BYTES = 1_000_000, 4_000
# What portable code may use, by machine, and how wide Inductor's vectors are in it.
# x86-64-v3: AVX2 and FMA, on every server and desktop since 2013 (Intel) and 2015 (AMD). Source: the x86-64 psABI.
BASELINES: dict[str, tuple[str, int]] = {"x86_64": ("x86-64-v3", 256), "AMD64": ("x86-64-v3", 256), "aarch64": ("armv8-a", 128)}

# A compiler that says no place: Inductor writes what it compiles to folders whose names are drawn.
SCRIPT = """#!/bin/sh
TMPDIR={scratch}
export TMPDIR
more=
for each in "$@"; do
  case "$each" in
    -shared) more="$more {linked}" ;;
    *.cpp) more="$more -ffile-prefix-map=$(dirname "$each")=." ;;
  esac
done
exec {real} {flags} "$@" $more
"""


@dataclass(frozen=True)
class Compiler:
    """How a package is compiled. ``shims``: C++ of our own operators, by operator, as Inductor wants it."""

    march: March = "portable"
    shims: Mapping[Any, list[str]] | None = None

    def configs(self, cxx: Path) -> dict[str, Any]:
        """Return what Inductor is told."""
        told: dict[str, Any] = {
            "aot_inductor.package": True,
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.model_name_for_generated_files": MODEL,
            "aot_inductor.precompile_headers": False,
            "aot_inductor.enable_line_tables": False,
            "aot_inductor.enable_frame_pointer": False,
            "aot_inductor.custom_ops_to_c_shims": dict(self.shims or {}),
            # A weight of a few numbers is a weight as well, and not part of the code.
            "always_keep_tensor_constants": True,
            # It computes with the values of weights of one number, which are stand-ins here.
            "joint_graph_constant_folding": False,
            "cpp.cxx": (None, str(cxx)),
            "cpp.dynamic_threads": True,  # as many as the session is told, not as this machine has
            "compile_threads": 1,
            "force_disable_caches": True,
        }
        if self.march == "portable" and platform.machine() in BASELINES:
            march, width = BASELINES[platform.machine()]
            told |= {"cpp.march": march, "cpp.simdlen": width, "cpp.vec_isa_ok": True}
        if self.march == "native":
            # Inductor keeps how wide the vectors are; the compiler uses whatever else is here.
            told["aot_inductor.metadata"] = {EXTENSIONS: " ".join(extensions())}
        return told


def find_compiler() -> list[str]:
    """Return the command of this machine's C++ compiler: a program, and what ``CXX`` gives it (``ccache g++``).

    Raises:
        TargetUnavailable: there is none.
    """
    name, *given = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    command, found = shlex.join([name, *given]), shutil.which(name)
    if found is None:
        raise TargetUnavailable(f"AOTInductor compiles C++, and there is no compiler {name!r} here", fix=INSTALL)
    told = subprocess.run([found, *given, "--version"], capture_output=True, text=True, check=False)
    if told.returncode:
        said = [line for line in told.stderr.splitlines() if line.strip()][:3]
        raise TargetUnavailable(f"{name!r} is no C++ compiler that works: `{command} --version` ends with {told.returncode}", said, INSTALL)
    return [found, *given]


def compile_package(program: ExportedProgram, package: Path, scratch: Path, compiler: Compiler) -> None:
    """``package`` holds the program's code, without its weights; nothing is left in ``scratch``.

    Raises:
        TargetUnavailable: no C++ compiler.
        Unsupported: Inductor or the compiler refuses the program, with the last lines of what it said.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    stood_in(program)
    module = program.module(check_guards=False)
    with _workshop(scratch) as cxx, _explained(package.name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about torch
        files: Any = aot_compile(module, examples(program), options=compiler.configs(cxx))
        # The sources hold the compiler's command line, and so the places of this machine.
        kept = [file for file in files if not isinstance(file, str) or not file.endswith(".cpp")]
        package_aoti(str(package), kept)


def require_bare(package: Path, program: ExportedProgram, weights: Path) -> None:
    """Leave quietly if the package is of the size of code: the weights are not in it a second time.

    Raises:
        AssertionError: it has them.
    """
    most = CODE_BYTES + NODE_BYTES * len(program.graph.nodes)
    if package.stat().st_size > most and package.stat().st_size > weights.stat().st_size:
        raise AssertionError(f"{package.name} has {package.stat().st_size} bytes, {most} at most expected: the weights are in it twice")


@contextmanager
def _workshop(scratch: Path) -> Iterator[Path]:
    """Yield the compiler to call; what Inductor keeps lies in ``scratch`` meanwhile."""
    from torch._inductor.utils import fresh_cache

    real = find_compiler()
    with TemporaryDirectory(dir=scratch, prefix="aotinductor-") as folder, fresh_cache(dir=folder, delete=False):
        flags = [f"-ffile-prefix-map={Path(torch.__file__).parent}=torch"]
        # Inductor tells gcc from clang by its name.
        script = Path(folder) / next(Path(word).name for word in reversed(real) if not word.startswith("-"))
        linked = "" if platform.system() == "Darwin" else " -Wl,--build-id=none -Wl,-s"
        script.write_text(SCRIPT.format(scratch=shlex.quote(folder), linked=linked, real=shlex.join(real), flags=shlex.join(flags)))
        script.chmod(0o755)
        yield script


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Give what Inductor or the compiler raises as Unsupported."""
    from torch._inductor.exc import CppCompileError

    try:
        yield
    except (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError, LookupError) as error:
        refused = getattr(error, "inner_exception", error)  # Inductor wraps what fails in it
        if isinstance(refused, CppCompileError):
            lines = [line for line in str(refused.output).splitlines() if line.strip()][-SAID:]
            raise Unsupported(f"the C++ compiler refuses the code of {name}", lines, "another compiler may take it: set CXX") from error
        lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()][:SAID]
        raise Unsupported(f"AOTInductor cannot compile {name}", lines, "convert to another target, such as onnxruntime") from error


def user_inputs(program: ExportedProgram) -> list[Node]:
    """Return the placeholders of what a call gives, in order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[spec.arg.name] for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]


def examples(program: ExportedProgram) -> tuple[torch.Tensor, ...]:
    """Return inputs of the sizes that the program was traced at, all zeros."""
    values = [node.meta["val"] for node in user_inputs(program)]
    return tuple(torch.zeros([_hint(size) for size in value.shape], dtype=value.dtype, device=value.device) for value in values)


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def stood_in(program: ExportedProgram) -> None:
    """Every weight is as many zeros as it has numbers, in pages that no one has written and that take no memory."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.target is None:
            continue
        fake = nodes[spec.arg.name].meta["val"]
        if fake.device.type == "cuda":
            _stand_in(program, spec, torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device))
            continue
        nbytes = fake.numel() * fake.element_size()
        pages = torch.from_numpy(np.zeros(nbytes, np.uint8))
        zeros = (pages.view(fake.dtype) if nbytes else torch.empty(0, dtype=fake.dtype)).reshape(fake.shape)
        _stand_in(program, spec, zeros)


def _stand_in(program: ExportedProgram, spec: InputSpec, zeros: torch.Tensor) -> None:
    assert spec.target is not None
    if spec.target in program.constants:
        program.constants[spec.target] = zeros
    else:
        parameter = spec.kind == InputKind.PARAMETER
        program.state_dict[spec.target] = torch.nn.Parameter(zeros, requires_grad=False) if parameter else zeros
