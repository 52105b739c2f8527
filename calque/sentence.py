"""What sentence-transformers put after an encoder: the pooling that a checkpoint's modules.json names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calque import checkpoint
from calque.errors import SourceUnreadable, Unsupported

MODULES = "modules.json"

# Keys of older files, one flag a mode; newer ones have the mode's name under "pooling_mode".
MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
KNOWN = ("Transformer", "Pooling", "Normalize")
LIST_IT = "list the pass with its options: passes: [{pool_sentences: {pooling: mean, normalize: true}}, …]"


def read_pooling(folder: Path) -> dict[str, Any]:
    """Return the options of the pass pool_sentences that do what the modules in ``folder`` do.

    Raises:
        Unsupported: there is no modules.json, or it names a module that is no part of the graph yet.
        SourceUnreadable: modules.json or the pooling's config is damaged.
    """
    path = folder / MODULES
    if not path.is_file():
        raise Unsupported(f"{folder.name} does not say how sentences are pooled: it has no {MODULES}", fix=LIST_IT)
    try:
        kinds = {str(row["type"]).rpartition(".")[2]: str(row["path"]) for row in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceUnreadable(f"{path} is no list of modules with a type and a path: {error}", fix="fetch the model again") from error
    if unknown := [kind for kind in kinds if kind not in KNOWN]:
        raise Unsupported(
            f"{path}: the graph cannot hold these modules yet", unknown, "convert with task: feature-extraction and apply them yourself"
        )
    if "Pooling" not in kinds:
        raise Unsupported(f"{path} names no pooling", fix=LIST_IT)
    return {"pooling": _mode(folder / kinds["Pooling"] / "config.json"), "normalize": "Normalize" in kinds}


def _mode(path: Path) -> str:
    if not path.is_file():
        raise SourceUnreadable(f"{path} is missing, though {MODULES} names it", fix="fetch the model again")
    config = checkpoint.read_json(path)
    modes = [mode for key, mode in MODES.items() if config.get(key) is True]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in MODES.values():
        raise Unsupported(f"{path}: one pooling mode of {', '.join(MODES.values())} can be followed; found {modes}", fix=LIST_IT)
    if config.get("include_prompt") is False:
        fix = "convert with task: feature-extraction"
        raise Unsupported(f"{path} leaves the prompt out of the pooling, which no graph can know", fix=fix)
    return modes[0]
