"""The model as transformers builds it, nothing replaced, without its weights; and where the bytes of each lie."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from calque.converters.weight_names import weight_table
from calque.fake import buildable, fake_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calque.source import ModelSource
    from calque.weights import Weight


def untouched(source: ModelSource) -> tuple[PreTrainedModel, dict[str, Weight]]:
    """Return the model in float32 with fake parameters, and the weight of each parameter and saved buffer by name.

    Attention and experts are the plain loops, as where the model is loaded whole (`ModelSource.load_eager`).
    """
    config = copy.deepcopy(source.config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with buildable(config), fake_parameters(mode):
        made: Any = getattr(transformers, source.auto_class).from_config(
            config,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=source.trust_remote_code,
            **source.model_options(),
        )
    model: PreTrainedModel = made.eval().requires_grad_(False)
    if type(model)._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model, weight_table(model, source.weights, source.id).entries
