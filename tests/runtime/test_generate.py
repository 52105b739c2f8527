from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calque.artifact import Limits
from calque.errors import ArtifactUnreadable, Unsupported, UsageError
from calque.runtime.chat import chat_prompt
from calque.runtime.generate import end_tokens, generate
from tests.runtime.counting import Counting, write_counting, write_json

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{% if message.role not in ['user'] %}{{ raise_exception('no ' + message.role) }}{% endif %}
{{ message['role'] }} {{ message['content'] | tojson }}
{% endfor %}
{% if add_generation_prompt %}
assistant
{% endif %}"""


@pytest.mark.parametrize("keep_input", [False, True])
def test_the_likeliest_tokens_follow(tmp_path: Path, keep_input: bool) -> None:
    write_counting(tmp_path, Counting(keep_input=keep_input))
    found = generate(tmp_path, "one two", 4)
    assert found["text"] == "three four five six"
    assert found["tokens"] == [6, 7, 8, 9]
    assert found["prompt_tokens"] == 3
    assert found["ttft_ms"] > 0
    assert found["tokens_per_s"] > 0


def test_the_text_is_told_while_it_grows(tmp_path: Path) -> None:
    write_counting(tmp_path)
    told: list[str] = []
    found = generate(tmp_path, "one two", 3, tell=told.append)
    assert told == ["three", "three four", "three four five"]
    assert found["text"] == told[-1]


def test_one_token_has_no_rate(tmp_path: Path) -> None:
    write_counting(tmp_path)
    assert generate(tmp_path, "one", 1)["tokens_per_s"] is None


def test_generation_ends_at_an_end_token(tmp_path: Path) -> None:
    write_counting(tmp_path)
    found = generate(tmp_path, "six seven", 20)
    # After the last word comes the first, <s>, and then </s>, which ends it and is no text.
    assert found["tokens"] == [11, 0, 1]
    assert found["text"] == "eight"


def test_generation_ends_where_the_artifact_does(tmp_path: Path) -> None:
    write_counting(tmp_path, Counting(Limits(max_length=4)))
    # Two tokens fit beside the two of the prompt, and the one that comes after the last needs no room.
    assert generate(tmp_path, "one", 20)["tokens"] == [5, 6, 7]
    with pytest.raises(Unsupported, match="max_length is 4"):
        generate(tmp_path, "one two three four", 1)


def test_the_cache_is_recomputed_where_it_may_not_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calque.runtime.onnxruntime_session import OnnxRuntimeSession

    widths = []
    run = OnnxRuntimeSession.run

    def counted(session: OnnxRuntimeSession, graph: str, inputs: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return run(session, graph, inputs)

    monkeypatch.setattr(OnnxRuntimeSession, "run", counted)
    write_counting(tmp_path, Counting(Limits(recompute_at=4)))
    assert generate(tmp_path, "one", 5)["text"] == "two three four five six"
    assert widths == [1, 2, 1, 1, 5, 1]


def test_a_chat_is_asked_through_its_template(tmp_path: Path) -> None:
    write_counting(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    assert chat_prompt(tmp_path, "é <b>") == '<s>user "é <b>"\nassistant\n'
    found = generate(tmp_path, "five", 2, chat=True)
    assert found["tokens"] == [4, 5]


def test_templates_render_as_in_transformers(tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>"})
    turns = [[{"role": "user", "content": "é <b>"}]]
    rendered: Any = render_jinja_template(conversations=turns, chat_template=TEMPLATE, add_generation_prompt=True, bos_token="<s>")
    assert chat_prompt(tmp_path, "é <b>") == rendered[0][0]


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": "{{ messages[0].content }}!"},
        {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }}!"}]},
    ],
)
def test_a_template_may_lie_in_the_tokenizers_config(tmp_path: Path, config: dict[str, object]) -> None:
    write_json(tmp_path / "tokenizer_config.json", config)
    assert chat_prompt(tmp_path, "hi") == "hi!"


def test_a_chat_without_a_template_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        chat_prompt(tmp_path, "hi")


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('roles must alternate') }}", UsageError),
        ("{% if %}", ArtifactUnreadable),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ArtifactUnreadable),
        ("{{ messages.append(1) }}", ArtifactUnreadable),
    ],
)
def test_a_template_can_do_no_harm(tmp_path: Path, template: str, error: type[Exception]) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(error):
        chat_prompt(tmp_path, "hi")


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == frozenset()
    write_json(tmp_path / "config.json", {"eos_token_id": 7})
    assert end_tokens(tmp_path) == {7}
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 2]})
    assert end_tokens(tmp_path) == {1, 2}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (None, None),
        ({}, None),
        ({"max_position_embeddings": 4}, 4),
        ({"max_position_embeddings": 4, "text_config": {"max_position_embeddings": 5}}, 5),
        ({"max_position_embeddings": "4"}, None),
    ],
)
def test_the_trained_length_is_that_of_the_config_and_no_limit(
    tmp_path: Path, config: dict[str, object] | None, length: int | None
) -> None:
    write_counting(tmp_path)
    if config is not None:
        write_json(tmp_path / "config.json", config)
    found = generate(tmp_path, "one two three four", 2)
    assert found["trained_length"] == length
    assert found["text"] == "five six"


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    write_counting(tmp_path)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        generate(tmp_path, "one", 0)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactUnreadable, match=r"tokenizer\.json"):
        generate(tmp_path, "one", 1)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ArtifactUnreadable, match=r"no tokenizer\.json"):
        generate(tmp_path, "one", 1)


def test_running_needs_neither_torch_nor_onnx(tmp_path: Path) -> None:
    write_counting(tmp_path)
    code = (
        "import sys; from pathlib import Path; from calque.runtime.generate import generate; import calque.validation.validate\n"
        f"print(generate(Path({str(tmp_path)!r}), 'one', 2)['text'])\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines() == ["two three", "[]"]


def test_a_prompt_of_bytes_that_are_no_text_is_a_usage_error(tmp_path: Path) -> None:
    write_counting(tmp_path, Counting())
    with pytest.raises(UsageError, match="not UTF-8"):
        generate(tmp_path, b"\xff\xfe".decode(errors="surrogateescape"), 1)
