"""The tasks a model can be converted for: optimum's names, and the transformers class that each one loads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calque.artifact import PIXELS
from calque.errors import Unsupported, UsageError
from calque.suggest import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POOLED = "sentence-similarity"
IMAGES = "image-classification"
_ENCODERS = "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"


@dataclass(frozen=True)
class Task:
    """One task. ``mapping`` names transformers' table of the architectures it fits, in ``modeling_auto``.

    ``converter`` is the file in ``converters/`` that traces it. ``main_input``: what a model must read first, token ids or pixels.
    """

    name: str
    auto_class: str
    mapping: str
    converter: str
    main_input: str = "input_ids"

    @property
    def of_images(self) -> bool:
        """Whether the model reads images, and no tokens."""
        return self.main_input == PIXELS

    def architectures(self) -> Collection[str]:
        """Return the names of transformers' classes that do this task."""
        from transformers.models.auto import modeling_auto

        tables = [self.mapping, *([_ENCODERS] if self.auto_class == "AutoModel" else [])]
        values = [value for table in tables for value in getattr(modeling_auto, table).values()]
        return {name for value in values for name in ([value] if isinstance(value, str) else value)}

    def reads(self, architectures: Collection[str]) -> bool:
        """Return whether a checkpoint of the named architectures may hold this task's head; features need none."""
        if self.auto_class == "AutoModel" or set(architectures) & set(self.architectures()):
            return True
        # Saved with several heads, of which loading says what is missing.
        return all(name.endswith("ForPreTraining") for name in architectures)

    def class_for(self, config: PreTrainedConfig) -> str:
        """Return the name of transformers' auto class; of a model that encodes and decodes, features are the encoder's."""
        import transformers

        encoders = transformers.AutoModelForTextEncoding._model_mapping
        encoder = self.auto_class == "AutoModel" and getattr(config, "is_encoder_decoder", False) and type(config) in encoders
        return "AutoModelForTextEncoding" if encoder else self.auto_class

    def fits(self, config: PreTrainedConfig) -> bool:
        """Return whether transformers, or code that comes with the model, has a class of the task for the config's type."""
        import transformers

        if self.auto_class in (getattr(config, "auto_map", None) or {}):
            return True
        classes = getattr(transformers, self.class_for(config))._model_mapping
        if type(config) not in classes:
            return False
        found = classes[type(config)]
        made = found[0] if isinstance(found, tuple) else found
        return bool(made.main_input_name == self.main_input)


# In the order in which a config's architectures are looked up: the plain encoder comes last, as every head has one inside.
TASKS = {
    task.name: task
    for task in (
        Task("text-generation-with-past", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal_lm"),
        Task("fill-mask", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "encoder"),
        Task("text-classification", "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "encoder"),
        Task("token-classification", "AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "encoder"),
        Task("question-answering", "AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "encoder"),
        Task(IMAGES, "AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "vision", PIXELS),
        Task("feature-extraction", "AutoModel", "MODEL_MAPPING_NAMES", "encoder"),
        Task(POOLED, "AutoModel", "MODEL_MAPPING_NAMES", "encoder"),
    )
}


def find(name: str) -> Task:
    """Return the task of that name: optimum's, or one of its synonyms; ``text-generation`` always keeps its cache.

    Raises:
        UsageError: optimum knows no such task.
        Unsupported: there is no converter for the task yet.
    """
    if name in TASKS:
        return TASKS[name]
    from optimum.exporters.tasks import TasksManager

    known: list[str] = TasksManager.get_all_tasks()
    plain: str = TasksManager.map_from_synonym(name.removesuffix("-with-past"))
    if plain not in known:
        raise UsageError(f"there is no task {name!r}{nearest(name, known)}", fix=f"tasks today: {', '.join(TASKS)}")
    for candidate in (plain, f"{plain}-with-past"):
        if candidate in TASKS:
            return TASKS[candidate]
    raise Unsupported(f"there is no converter for the task {name!r} yet", fix=f"tasks today: {', '.join(TASKS)}")


def infer(config: PreTrainedConfig, pooled: bool) -> Task:
    """Return the task that a config's architectures say, or else its type; ``pooled``: it was saved as a sentence encoder.

    Raises:
        Unsupported: no converter's classes are among them.
    """
    named = set(config.architectures or ())
    for task in TASKS.values():
        if named & set(task.architectures()):
            return TASKS[POOLED] if pooled and task.auto_class == "AutoModel" else task
    if named and not getattr(config, "auto_map", None):
        raise Unsupported(
            f"there is no converter for {', '.join(sorted(named))} ({config.model_type}) yet", fix=f"tasks today: {', '.join(TASKS)}"
        )
    if pooled:
        return TASKS[POOLED]
    # A config alone: an encoder's type has a masked-LM head too, unless it says that it decodes.
    encodes = TASKS["fill-mask"].fits(config) and not getattr(config, "is_decoder", False)
    order = ("feature-extraction", "text-generation-with-past") if encodes else ("text-generation-with-past", "feature-extraction")
    return next((TASKS[name] for name in (*order, IMAGES) if TASKS[name].fits(config)), TASKS["text-generation-with-past"])
