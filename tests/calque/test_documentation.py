"""The documents say what is so."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import yaml

import calque
from calque.arguments import COMMANDS, EXIT_CODES, build_parser

ROOT = Path(__file__).parents[2]


def test_the_command_line_page_is_what_the_parser_accepts() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "docs" / "cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run docs/cli_reference.py"


def test_the_readme_lists_the_exit_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES


def test_the_readme_uses_flags_that_exist() -> None:
    _, commands = build_parser()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:calque )?(\w+) (.*)$", "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)), re.MULTILINE)
    used = [(command, flag) for command, rest in lines if command in COMMANDS for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)]
    assert used
    assert [(command, flag) for command, flag in used if flag not in commands[command]._option_string_actions] == []


def test_the_workflow_is_yaml_and_uses_flags_that_exist() -> None:
    _, commands = build_parser()
    text = (ROOT / "docs" / "convert-models.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["jobs"]["convert"]["steps"]
    lines = [line for step in steps for line in step.get("run", "").splitlines() if line.startswith("calque ")]
    assert [line.split()[1] for line in lines] == ["convert", "report", "report", "report"]
    used = [(line.split()[1], flag) for line in lines for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", line)]
    assert [(command, flag) for command, flag in used if flag not in commands[command]._option_string_actions] == []
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [line for line in lines if line not in page and "html" not in line] == []


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{calque.__version__}]" in changelog or "## [Unreleased]" in changelog


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
