"""Where a model comes from: a builtin, a local folder, a config alone, or the hub; headers are read, never a tensor."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, cast

from calque import checkpoint, hub, preflight, sentence, tasks, unreadable
from calque.companions import CARD, CONFIG, companion_files
from calque.errors import SourceUnreadable, Unsupported, UsageError
from calque.tasks import Task
from calque.weights import Stored, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BUILTIN = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "models"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be read: its config and where its tensors' bytes lie.

    ``id`` is ``org/name``, ``builtin:name`` or a local folder's name, never a path, for the manifest holds it.
    ``revision`` is the resolved commit of a hub model. ``folder`` holds config.json, the tokenizer and the weights.
    ``task`` says which of the model's classes is meant. ``quantization``: what the config says of how the checkpoint was
    quantized; ``config`` no longer says it, for it is that of the model whose weights are numbers.
    """

    id: str
    revision: str | None
    folder: Path
    config: PreTrainedConfig
    task: Task
    tensors: Mapping[str, Stored]
    trust_remote_code: bool
    random_weights: bool
    quantization: Mapping[str, Any] | None = None

    @classmethod
    def resolve(
        cls,
        model: str,
        *,
        task: str | None = None,
        random_weights: bool = False,
        trust_remote_code: bool = False,
        scratch: Path,
        values: bool = True,
    ) -> ModelSource:
        """Return the source that ``model`` names; its config is valid and the headers of its weights have been read.

        Args:
            model: ``builtin:<name>``, a folder, with ``random_weights`` also a config.json, or ``org/name[@revision]``.
            task: Optimum's name of the task; None: what the config's architectures say.
            random_weights: Use seeded random weights, written to ``scratch``, whatever weights the model has.
            trust_remote_code: Run the modeling code that comes with the model, where it needs some.
            scratch: A folder that random weights, and the files that belong to them, are written to.
            values: Whether random weights are drawn; without, they have names and shapes and take no room.

        Raises:
            SourceUnreadable: what is missing or malformed, where, and what to do.
            UsageError: no such task, or random weights would overwrite the model's own.
            Unsupported: the model has no class for the task, or there is no converter for it.
        """
        with _explained(model):
            place = _locate(model, random_weights, trust_remote_code)
            config = _read_config(place.folder, trust_remote_code)
            quantization = None if random_weights else _quantization(config, place.id)
            config.__dict__.pop("quantization_config", None)
        folder = place.folder
        meant = tasks.find(task) if task else tasks.infer(config, pooled=(folder / sentence.MODULES).is_file())
        _check_task(config, meant, place.id, trust_remote_code)
        if random_weights:
            folder = _randomized(place.folder, config, meant, scratch, trust_remote_code, values)
        elif place.revision is not None:
            hub.fetch_weights(place.id, place.revision, folder)
        with _explained(model):
            tensors = checkpoint.read_headers(folder)
        return cls(place.id, place.revision, folder, config, meant, tensors, trust_remote_code, random_weights, quantization)

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """The checkpoint's weights by name: its tensors, those of a quantized layer as one weight of numbers.

        Raises:
            Unsupported: it is quantized in a way that cannot be read.
            SourceUnreadable: quantized weights lack their scales.
        """
        if self.quantization is None:
            return self.tensors
        from calque.quantized_checkpoint import joined

        return joined(self.tensors, self.quantization, self.id)

    def sha256(self) -> str:
        """Return the hex SHA-256 of config.json and all weight files; it depends on their bytes and names alone."""
        return checkpoint.sha256(self.folder)

    def describe(self) -> dict[str, str | None]:
        """Return what the manifest says of the source: id, revision, sha256."""
        return {"id": self.id, "revision": self.revision, "sha256": self.sha256()}

    def companion_files(self) -> list[Path]:
        """Return the tokenizer, chat template, config and licence files, sorted; copy each to its place in ``folder``."""
        return companion_files(self.folder)

    def model_options(self) -> dict[str, Any]:
        """Return what the model's class is told besides its config: to leave out a pooler whose weights were not saved."""
        import transformers

        table = getattr(transformers, self.auto_class)._model_mapping
        if self.task.auto_class != "AutoModel" or type(self.config) not in table or any("pooler" in name for name in self.tensors):
            return {}
        found = table[type(self.config)]
        made = found[0] if isinstance(found, tuple) else found
        return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(made).parameters else {}

    @property
    def auto_class(self) -> str:
        """The name of the class of transformers that loads the model for its task."""
        return self.task.class_for(self.config)

    def load_eager(self, dtype: str = "float32") -> PreTrainedModel:
        """Return the untouched model, all of its weights loaded, for inference in ``dtype`` (torch's name).

        Attention and experts are the plain loops: the others differ between devices, or refuse float64. A quantized checkpoint is
        loaded into the plain architecture as the numbers that it stands for: the vendors' kernels round on, and most need a GPU.

        Raises:
            WeightMismatch: parameters that the checkpoint does not hold.
            SourceUnreadable: transformers cannot load the checkpoint.
        """
        from calque.eager_loading import load

        return load(self, dtype)


def _quantization(config: PreTrainedConfig, origin: str) -> Mapping[str, Any] | None:
    """Return what the config says of the checkpoint's quantization; one that cannot be read is refused before weights are fetched."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    from calque.quantized_checkpoint import formats_of

    table: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    formats_of(table, origin)
    return table


@dataclass(frozen=True)
class _Place:
    """A folder that holds at least config.json; ``revision`` is None unless it is the hub's cache."""

    id: str
    folder: Path
    revision: str | None = None


def _locate(model: str, random_weights: bool, trust_remote_code: bool) -> _Place:
    if model.startswith(BUILTIN):
        return _builtin(model)
    path = Path(os.path.expanduser(model))
    if model and path.is_dir():
        return _Place(_folder_name(path), path)
    if model and path.is_file():
        return _config_alone(path, random_weights)
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        name, commit, folder = hub.fetch_config(model, trust_remote_code)
        return _Place(name, folder, commit)
    raise SourceUnreadable(
        f"no model {model!r}: no folder of that name exists, and it is no hub id",
        fix=f"{_hint(model)}name a folder, a hub id org/name[@revision], or one of: {_listed_builtins()}",
    )


def _hint(model: str) -> str:
    """Return what was probably meant, as a sentence that ends in a blank; nothing where that is unclear."""
    if near := difflib.get_close_matches(model, _builtins(), n=1):
        return f"did you mean {BUILTIN}{near[0]}? "
    if model.startswith(("https://", "http://")):
        return "leave out the address before org/name; "
    if "\\" in model or PureWindowsPath(model).drive:
        forward = PureWindowsPath(model).as_posix()
        return f"write a Windows path as this system sees it, with /, such as {forward}; in WSL, C:/ is /mnt/c/; "
    return ""


@contextlib.contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn the system's refusal to read the model into an error that says what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or model
        fix = "check the path, that you may read it, and that its disk is there"
        raise SourceUnreadable(f"{where} cannot be read: {error.strerror or error}", fix=fix) from error


def _builtins() -> list[str]:
    return sorted(path.parent.name for path in BUILTIN_FOLDER.glob(f"*/{CONFIG}"))


def _listed_builtins() -> str:
    return ", ".join(BUILTIN + name for name in _builtins()) or "(this installation has no builtin models)"


def _builtin(model: str) -> _Place:
    name = model.removeprefix(BUILTIN)
    if name not in _builtins():
        raise SourceUnreadable(f"no builtin model {name!r}", fix=f"builtin models are: {_listed_builtins()}")
    return _Place(model, BUILTIN_FOLDER / name)


def _config_alone(path: Path, random_weights: bool) -> _Place:
    if path.suffix != ".json":
        raise SourceUnreadable(f"{path} is a file, not a model's folder", fix=f"name the folder that holds it and {CONFIG}")
    if path.name != CONFIG:
        raise SourceUnreadable(f"{path} is not named {CONFIG}", fix=f"a config alone is a file named {CONFIG}")
    if not random_weights:
        raise SourceUnreadable(f"{path} is a config without weights", fix="name its folder, or pass --random-weights")
    return _Place(_folder_name(path.parent), path.parent)


def _folder_name(folder: Path) -> str:
    # `.` and `..` have no name of their own, and a link keeps the name that its owner gave it.
    return os.path.basename(os.path.abspath(folder))


def _read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the folder's config; modeling code that comes with it runs only when trusted."""
    path, adapter = folder / CONFIG, folder / unreadable.ADAPTER
    # With a config or without: where both are, transformers adds the adapter if peft happens to be installed.
    if adapter.is_file():
        raise unreadable.adapter(str(folder), adapter.read_bytes())
    if not path.exists() and not path.is_symlink():
        raise unreadable.no_config(sorted(file.name for file in folder.iterdir()), str(folder), CONFIG)
    table = checkpoint.read_json(path)
    _check_model_type(table, path, trust_remote_code)

    from transformers import AutoConfig

    try:
        # Trusted code may lie in another repository than the config; all else is here.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code)
    except Exception as error:  # a config class validates as it likes, and remote code may raise anything
        raise SourceUnreadable(
            f"{path} describes no usable {table.get('model_type')} model: {error}", fix=f"check {CONFIG} against the model's documentation"
        ) from error
    preflight.require_sizes(config, path)
    return cast("PreTrainedConfig", config)


def _check_model_type(table: dict[str, Any], path: Path, trust_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING, __version__

    model_type, own_code = table.get("model_type"), table.get("auto_map")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    if own_code and trust_remote_code:
        return
    if own_code:
        code = sorted(str(name) for name in own_code.values()) if isinstance(own_code, dict) else [str(own_code)]
        raise _untrusted(model_type, code)
    if not isinstance(model_type, str):
        raise SourceUnreadable(f"{path} has no model_type", fix="name a model in the transformers format")
    near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
    raise SourceUnreadable(
        f"{path}: transformers {__version__} does not know model_type {model_type!r}" + (f"; nearest: {near[0]}" if near else ""),
        fix="upgrade transformers; if the model comes with code of its own, pass --trust-remote-code",
    )


def _untrusted(model_type: object, code: Sequence[str]) -> SourceUnreadable:
    return SourceUnreadable(
        f"model_type {model_type!r} needs code that comes with the model, and that does not run unasked",
        code,
        "read that code; if you trust it, pass --trust-remote-code",
    )


def _check_task(config: PreTrainedConfig, task: Task, origin: str, trust_remote_code: bool) -> None:
    """Leave quietly if there is a class for the task, and if what was saved has its head where another would go unnoticed."""
    named = set(config.architectures or ())
    own_code = task.auto_class in (getattr(config, "auto_map", None) or {})
    if own_code and not trust_remote_code and type(config) not in _known(task):
        raise _untrusted(config.model_type, ())
    # A generator's head may be tied to its embedding, and two classifiers' heads bear one name: no parameter would be missing.
    if not task.fits(config) or (named and not own_code and not task.reads(named)):
        raise Unsupported(
            f"{origin} ({config.model_type}: {', '.join(sorted(named)) or 'no architecture'}) is no model for {task.name}",
            fix=_other_tasks(config, named),
        )


def _other_tasks(config: PreTrainedConfig, named: Sequence[str] | set[str]) -> str:
    """Return which tasks the checkpoint can be converted for instead."""
    fitting = [task.name for task in tasks.TASKS.values() if task.fits(config) and (not named or task.reads(named))]
    return f"name one that it was saved for: {', '.join(fitting)}" if fitting else f"tasks today: {', '.join(tasks.TASKS)}"


def _known(task: Task) -> Any:
    import transformers

    return getattr(transformers, task.auto_class)._model_mapping


def _randomized(folder: Path, config: PreTrainedConfig, task: Task, scratch: Path, trust_remote_code: bool, values: bool) -> Path:
    """Return ``scratch``, holding the model's files with random weights in place of its own."""
    from calque.random_weights import write_random_weights

    if scratch.resolve() == folder.resolve():
        raise UsageError(f"random weights would overwrite the model in {folder}", fix="name another scratch folder")
    code = sorted(folder.glob("*.py")) if trust_remote_code else []
    card = [folder / CARD] if (folder / CARD).is_file() else []
    for file in [*companion_files(folder), *card, *code]:
        target = scratch / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    table = checkpoint.read_json(folder / CONFIG)
    # Random weights are plain: a loader told otherwise would look for packed ones.
    table.pop("quantization_config", None)
    (scratch / CONFIG).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    write_random_weights(config, scratch, task=task, trust_remote_code=trust_remote_code, values=values)
    return scratch
