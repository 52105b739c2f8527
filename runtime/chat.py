"""A prompt as the model was taught to read it: the artifact's own chat template, run in a sandbox."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from calque.artifact import read_json
from calque.errors import ArtifactUnreadable, UsageError

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def chat_prompt(folder: Path, message: str) -> str:
    """Return the text that asks the model to answer ``message`` as its user's first turn.

    The template is ``chat_template.jinja``, else that of ``tokenizer_config.json``. It comes from a stranger, so it runs
    sandboxed: it can change nothing and reach nothing but its arguments.

    Raises:
        UsageError: the artifact has no chat template, or its template refuses the message.
        ArtifactUnreadable: the template is broken.
    """
    from jinja2 import TemplateError

    config = read_json(folder / "tokenizer_config.json")
    template = _template(folder, config)
    tokens = {name: _token(config[name]) for name in SPECIAL_TOKENS if config.get(name)}
    try:
        compiled = _environment().from_string(template)
        messages = [{"role": "user", "content": message}]
        return str(compiled.render(messages=messages, add_generation_prompt=True, **tokens))
    except _Refused as error:
        raise UsageError(f"the chat template refuses the message: {error}") from error
    except TemplateError as error:
        raise ArtifactUnreadable(f"the chat template of {folder} is broken: {error}", fix="generate without --chat") from error


class _Refused(Exception):
    """A template called raise_exception."""


def _template(folder: Path, config: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, as older tokenizers have
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default") or next(iter(named.values()), None)
    if not template:
        raise UsageError(f"{folder} has no chat template", fix="generate without --chat")
    return str(template)


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _environment() -> Any:
    """Return what transformers gives templates: its filters, functions and whitespace rules."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def raise_exception(text: str) -> NoReturn:
        raise _Refused(text)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        # jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    return environment
