"""What a place holds that is no checkpoint in the transformers format, and what to do: one error each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from calque.errors import SourceUnreadable

ADAPTER = "adapter_config.json"
DIFFUSERS = "model_index.json"
# Formats of other tools, by the end of their files' names.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FRAMEWORKS = (".h5", ".msgpack", ".onnx", ".mlpackage", ".tflite")
# Pickles that trainers leave beside a model and that hold no weights.
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin", "rng_state.pth")

LFS_POINTER = b"version https://git-lfs"
LFS_FIX = "fetch the real file: `git lfs pull` in the checkout it came from, or download the model again"

_RESAVE = "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('FOLDER'{}).save_pretrained('NEW')\""
_MERGE = (
    "python -c \"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('FOLDER').merge_and_unload().save_pretrained('NEW')\""
)


def no_config(names: Iterable[str], where: str, config: str) -> SourceUnreadable:
    """Return the error for a place that holds the files ``names`` but no config, saying what they are."""
    names = list(names)
    if ADAPTER in names:
        return adapter(where)
    if DIFFUSERS in names:
        return SourceUnreadable(
            f"{where} is a diffusers pipeline", fix="name one of its language models, a folder with a config of its own"
        )
    if files := _ending(names, (".gguf",)):
        return _gguf(f"{where} has no {config}, only GGUF", files)
    if files := _ending(names, FRAMEWORKS):
        return SourceUnreadable(f"{where} has no {config}, only an export to another format", files, "name the model that it was made of")
    if "params.json" in names:
        fix = "name the same model in the transformers format; its publisher mostly has both"
        return SourceUnreadable(f"{where} has no {config}, only its publisher's own params.json", fix=fix)
    return SourceUnreadable(f"{where} has no {config}", fix="name a model in the transformers format, as save_pretrained writes it")


def no_weights(names: Iterable[str], where: str, wanted: Sequence[str]) -> SourceUnreadable:
    """Return the error for a place that holds the files ``names`` but none of the ``wanted`` checkpoints, saying how to make one."""
    names = list(names)
    what = f"{where} holds none of {', '.join(wanted)}"
    pickles = [name for name in _ending(names, PICKLES) if name not in NO_WEIGHTS]
    if ADAPTER in names:
        return adapter(where)
    if files := _ending(names, (".safetensors",)):
        fix = f"fetch {wanted[1]} too; a file of one's own is named {wanted[0]}"
        return SourceUnreadable(f"{what}; these safetensors files belong to no index", files, fix)
    if parts := [name for name in pickles if name.startswith("pytorch_model")]:
        return SourceUnreadable(f"{what}; these files belong to no index", parts, f"fetch {wanted[-1]} too")
    if pickles:
        fix = "name the same model in the transformers format; its publisher mostly has both"
        return SourceUnreadable(f"{what}, only pickles that transformers does not name so", pickles, fix)
    if files := _ending(names, (".gguf",)):
        return _gguf(f"{what}, only GGUF", files)
    if files := _ending(names, FRAMEWORKS):
        return SourceUnreadable(f"{what}, only weights of another framework", files, "name a model with safetensors weights")
    fix = "name a folder that holds the weights, or pass --random-weights to use random ones"
    return SourceUnreadable(f"{what}, nor any other weights", fix=fix)


def adapter(where: str, settings: bytes = b"") -> SourceUnreadable:
    """Return the error for a place that holds a PEFT adapter; ``settings``, the content of its config, may name its base model."""
    try:
        of = json.loads(settings).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        of = None
    what = f"{where} is a PEFT adapter" + (f" of {of}" if isinstance(of, str) and of.isprintable() else "") + ", not a whole model"
    return SourceUnreadable(what, fix=f"merge it into its base model once, then name NEW: {_MERGE}")


def _gguf(what: str, files: list[str]) -> SourceUnreadable:
    return SourceUnreadable(
        f"{what}, which is not read", files, "resave it once, then name NEW: " + _RESAVE.format(f", gguf_file={files[0]!r}")
    )


def _ending(names: Iterable[str], ends: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.lower().endswith(ends)]
