"""Faults that a conversion runs into, planted in its own process at the moment a stage begins."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calque import staging
from calque.passes import Rewrites
from calque.passes.cache_dynamic import CacheDynamic
from calque.stages import Stages
from calque.traced import TracedModel, user_nodes

STAGES = ("source", "trace", "passes", "lower", "emit", "reference", "prove", "bisect", "publishing")


@dataclass(frozen=True)
class Scene:
    """Where a planted fault does its harm: the output's name, the model's folder, and for some faults an amount."""

    out: Path
    model: Path
    amount: float = 0

    def staged(self) -> Path:
        """Return the folder that the conversion writes into."""
        return next(self.out.parent.glob(f".{self.out.name}.calque-staging-*"))


def _send(number: signal.Signals) -> Callable[[Scene], None]:
    def send(scene: Scene) -> None:
        if not scene.amount:
            os.kill(os.getpid(), number)
            return
        # Somewhere within the stage, as a person would.
        timer = threading.Timer(scene.amount, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    return send


def limit_memory(scene: Scene) -> None:
    """Leave ``amount`` bytes of address space to what follows."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # What the allocator holds free would otherwise serve a small model to the end.
    ctypes.CDLL(None).malloc_trim(0)
    limit = pages * resource.getpagesize() + int(scene.amount)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def limit_file_size(scene: Scene) -> None:
    """Let no file grow past ``amount`` bytes, as `ulimit -f` and some filesystems do; needs no rights."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(scene.amount), resource.RLIM_INFINITY))


def fill_disk(scene: Scene) -> None:
    """Leave ``amount`` bytes on the disk that the output lies on, which must be one that is there for this."""
    assert os.path.ismount(scene.out.parent)
    free = shutil.disk_usage(scene.out.parent).free - int(scene.amount)
    with (scene.out.parent / "filler").open("wb") as file:
        file.write(bytes(max(0, free)))


def make_disk_read_only(scene: Scene) -> None:
    """Make the output's disk refuse writes, as a kernel does after an error of the disk."""
    # The lock is open for writing, so the disk itself cannot be remounted: a second mount of it, read-only, goes on top.
    folder = str(scene.out.parent)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def remove_staged(scene: Scene) -> None:
    """Remove the folder that the conversion writes into."""
    shutil.rmtree(scene.staged())


def replace_staged_by_a_file(scene: Scene) -> None:
    """Put a file in the place of the folder that the conversion writes into."""
    folder = scene.staged()
    shutil.rmtree(folder)
    folder.write_text("in the way")


def remove_parent(scene: Scene) -> None:
    """Remove the folder that the output is to lie in."""
    shutil.rmtree(scene.out.parent)


def remove_older(scene: Scene) -> None:
    """Remove the older artifact."""
    shutil.rmtree(scene.out)


def put_a_file_in_the_way(scene: Scene) -> None:
    """Give the output's name to a file of someone else."""
    scene.out.write_text("precious")


def put_a_folder_in_the_way(scene: Scene) -> None:
    """Give the output's name to a folder of someone else."""
    scene.out.mkdir()
    (scene.out / "precious").write_text("precious")


def remove_model(scene: Scene) -> None:
    """Remove the model's folder."""
    shutil.rmtree(scene.model)


def truncate_weights(scene: Scene) -> None:
    """Cut the weights to half of their size."""
    path = scene.model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def pause(scene: Scene) -> None:
    """Wait until a file `go` lies beside the output."""
    (scene.out.parent / "paused").touch()
    while not (scene.out.parent / "go").exists():
        time.sleep(0.01)


FAULTS: dict[str, Callable[[Scene], None]] = {
    **{name: _send(signal.Signals[name]) for name in ("SIGKILL", "SIGTERM", "SIGINT")},
    **{
        fault.__name__: fault
        for fault in (
            limit_memory, limit_file_size, fill_disk, make_disk_read_only, remove_staged, replace_staged_by_a_file, remove_parent,
            remove_older, put_a_file_in_the_way, put_a_folder_in_the_way, remove_model, truncate_weights, pause,
        )
    },
}  # fmt: skip


def plant(fault: str, stage: str, scene: Scene) -> None:
    """From here on the fault strikes when the stage begins; one in `bisect` needs numbers that disagree, so they do."""
    strike = FAULTS[fault]
    if stage == "bisect":
        disagree()
    if stage == "publishing":
        publish = staging._publish

        def watched_publish(*arguments: Any, **keywords: Any) -> None:
            strike(scene)
            publish(*arguments, **keywords)

        staging._publish = watched_publish
        return
    enter = Stages.__call__

    def watched(self: Stages, name: str) -> Any:
        if name == stage:
            strike(scene)
        return enter(self, name)

    Stages.__call__ = watched  # type: ignore[method-assign]


def disagree() -> None:
    """Make a pass scale one attention, so that the artifact cannot agree with the eager model."""
    import torch

    apply = CacheDynamic.apply

    def broken(self: CacheDynamic, model: TracedModel) -> Rewrites:
        done = apply(self, model)
        attention = user_nodes(model.graph.nodes, torch.ops.calque.attention.default)[0]
        attention.args = (*attention.args[:4], 1.5 * float(attention.args[4]), *attention.args[5:])  # type: ignore[arg-type]
        return done

    CacheDynamic.apply = broken  # type: ignore[method-assign]
