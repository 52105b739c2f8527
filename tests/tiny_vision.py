"""Tiny random image classifiers, one config a type, each in a folder as its checkpoint would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from calque.random_weights import write_random_weights
from calque.tasks import IMAGES, TASKS

LABELS = 5
SIDE = 28
PATCHES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "patch_size": 7, "image_size": SIDE,
}  # fmt: skip

# The class of each type, and its config besides the labels.
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", PATCHES),
    "deit": ("DeiTForImageClassification", PATCHES),
    "dinov2": ("Dinov2ForImageClassification", PATCHES | {"mlp_ratio": 2}),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "image_size": 64}),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [2, 1]}),
}


def vision_config(model_type: str, **extra: Any) -> Any:
    """The config of a type; ``extra`` fields win."""
    architecture, fields = CLASSIFIERS[model_type]
    return CONFIG_MAPPING[model_type](**{"num_labels": LABELS, "architectures": [architecture], **fields, **extra})


def save_random(folder: Path, model_type: str = "vit", preprocessor: dict[str, Any] | None = None, **extra: Any) -> Path:
    """The folder holds a classifier's config and random weights, and what its preprocessor leaves: by default, images of its size.

    A resnet's config does not say how large images are: there its ``preprocessor`` alone does.
    """
    config = vision_config(model_type, **extra)
    folder.mkdir(parents=True, exist_ok=True)
    write_random_weights(config, folder, task=TASKS[IMAGES])
    config.save_pretrained(folder)
    side = getattr(config, "image_size", SIDE)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(preprocessor or {"do_resize": True, "size": {"height": side, "width": side}})
    )
    return folder
