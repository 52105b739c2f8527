"""The untouched model as transformers loads it, which every artifact is compared with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging

from calque.companions import CONFIG
from calque.errors import SourceUnreadable, WeightMismatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calque.source import ModelSource
    from calque.weights import Weight


def load(source: ModelSource, dtype: str) -> PreTrainedModel:
    """Return the model of the source, for inference in ``dtype`` (torch's name).

    Raises:
        WeightMismatch: parameters that the checkpoint does not hold.
        SourceUnreadable: transformers cannot load the checkpoint.
    """
    try:
        with _without_words_of_transformers():
            model_class, given = _loaded_from(source)
            loaded: Any = model_class.from_pretrained(
                **given,
                dtype=getattr(torch, dtype),
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
                **source.model_options(),
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        fix = "check that config.json and the weights belong together"
        if not (source.folder / CONFIG).is_file():
            raise SourceUnreadable(f"{source.folder} cannot be read any more", fix="leave it as it is during a conversion") from error
        raise SourceUnreadable(f"transformers cannot load {source.id}: {error}", fix=fix) from error
    model, report = loaded
    # transformers would fill these with random values and go on.
    if missing := sorted(report["missing_keys"]):
        fix = "check that config.json and the weights belong together"
        raise WeightMismatch(f"{len(missing)} parameters of {source.id} have no bytes", missing, fix)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def _loaded_from(source: ModelSource) -> tuple[Any, dict[str, Any]]:
    """Return the class that loads the model, and from what.

    That is its folder; of a quantized checkpoint, what its weights stand for, read one at a time. transformers renames and merges
    them as it does any: what the reference shares with the artifact is how bytes become numbers, which tests compare with the
    vendors' own.
    """
    auto: Any = getattr(transformers, source.auto_class)
    trust = source.trust_remote_code
    if source.quantization is None:
        return auto, {"pretrained_model_name_or_path": source.folder, "trust_remote_code": trust, "local_files_only": not trust}
    config = copy.deepcopy(source.config)
    with torch.device("meta"):
        made = auto.from_config(config, trust_remote_code=trust, **source.model_options())
    state = {name: _Unread(weight) for name, weight in source.weights.items()}
    return type(made), {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}


@dataclass(frozen=True)
class _Unread:
    """A weight as transformers takes it from a file: read when it is sliced."""

    weight: Weight

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.weight.read()


@contextlib.contextmanager
def _without_words_of_transformers() -> Iterator[None]:
    """Keep its bar, and its report of what the checkpoint lacks or has besides, which errors and the ledger say, off the terminal."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
