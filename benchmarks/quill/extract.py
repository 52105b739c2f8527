"""Documents (plain text with a name) taken out of Python sources, archives and the running interpreter."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

SKIPPED_FOLDERS = frozenset(
    {"tests", "test", "testing", "_vendor", "vendor", "vendored", "_vendored", "externals", "extern", "ext_lib"}
    | {"idlelib", "lib2to3", "turtledemo", "site-packages", "locale", "_lib", "_distutils", "node_modules", "themes"}
)
SKIPPED_NAMES = re.compile(r"changes|changelog|release|whats_?new|whatsnew|news|history|authors|licen[cs]e|requirements")
MARKUP = re.compile(r"\s*(\.\. _|:[a-z-]+:\s|\.\. (index|image|figure|include|raw|toctree|currentmodule)::|!\[|<)")
BUILTIN_MODULES = (
    "builtins",
    "itertools",
    "math",
    "cmath",
    "time",
    "sys",
    "_collections",
    "functools",
    "operator",
    "array",
    "zlib",
    "binascii",
    "select",
    "errno",
    "_datetime",
    "_decimal",
    "_io",
    "_random",
    "_socket",
    "_sqlite3",
    "_struct",
    "_csv",
    "_json",
    "_hashlib",
    "posix",
    "signal",
    "gc",
    "marshal",
    "unicodedata",
    "_thread",
    "_asyncio",
    "_queue",
    "_bisect",
    "_heapq",
    "_pickle",
    "_elementtree",
    "pyexpat",
    "_ssl",
    "mmap",
    "resource",
    "fcntl",
    "termios",
    "faulthandler",
)


@dataclass(frozen=True)
class Entry:
    """One documented object: its dotted name, how it is called and its docstring."""

    name: str
    signature: str
    text: str


@dataclass
class Document:
    """One whole document; its ``identity`` alone decides on which side of the split it falls."""

    identity: str
    package: str
    text: str
    entries: list[Entry] = field(default_factory=list)


def module_document(source: str, module: str, package: str) -> Document | None:
    """Return the docstrings of one module as a document, or None where it has none or does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    entries = list(_docstrings(tree, module)) + list(_added_docs(tree, module))
    return _from_entries(entries, module, package)


def archive_documents(path: Path, package: str) -> Iterator[Document]:
    """Yield the documents of one wheel (docstrings) or one source archive (pages under its documentation folders)."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(".py") and not _skipped(name):
                    found = module_document(_decoded(wheel.read(name)), _module_name(name), package)
                    if found is not None:
                        yield found
        return
    with tarfile.open(path) as archive:
        members = sorted((member for member in archive.getmembers() if member.isfile()), key=lambda item: item.name)
        for member in members:
            stream = archive.extractfile(member) if _is_page(member.name) else None
            if stream is not None:
                inner = member.name.split("/", 1)[1]
                yield Document(f"{package}/{inner}", package, page_text(_decoded(stream.read())))


def library_documents(root: Path) -> Iterator[Document]:
    """Yield the documents of the standard library: its modules, its reference topics and its compiled modules."""
    package = "python"
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root).as_posix()
        if _skipped(inner) or inner.startswith("pydoc_data/"):
            continue
        found = module_document(_decoded(path.read_bytes()), _module_name(inner), package)
        if found is not None:
            yield found
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for title, text in sorted(topics.items()):
        yield Document(f"{package}/topic/{title}", package, text.strip())
    for name in BUILTIN_MODULES:
        found = _compiled_document(name, package)
        if found is not None:
            yield found


def page_text(text: str) -> str:
    """Return a documentation page without its comments, directives' options and link targets."""
    kept = []
    for line in text.splitlines():
        if MARKUP.match(line):
            continue
        line = re.sub(r":[a-z:+-]+:`~?!?\.?([^`<]*?)\s*(<[^`]*>)?`", r"`\1`", line)
        line = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", line)
        kept.append(line.rstrip())
    return "\n".join(kept).strip()


def _docstrings(node: ast.AST, prefix: str) -> Iterator[Entry]:
    """Yield the docstrings of a module or class and of everything public inside it."""
    if isinstance(node, ast.Module):
        text = ast.get_docstring(node)
        if text:
            yield Entry(prefix, "", text)
    for child in getattr(node, "body", []):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_") and not child.name.startswith("__"):
            continue
        name = f"{prefix}.{child.name}"
        text = ast.get_docstring(child)
        if text:
            yield Entry(name, _call(child), text)
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, name)


def _added_docs(tree: ast.Module, prefix: str) -> Iterator[Entry]:
    """Yield the docstrings that a module attaches to compiled objects through ``add_newdoc`` calls."""
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr) else None
        if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith("add_newdoc"):
            continue
        texts = [item.value for part in call.args for item in ast.walk(part) if isinstance(item, ast.Constant)]
        words = [text for text in texts if isinstance(text, str)]
        if len(words) >= 2:
            owner = words[0] if len(words) > 2 else prefix.rsplit(".", 1)[0]
            name = ".".join([owner, *words[1:-1]] if len(words) > 2 else [owner, words[0]])
            yield Entry(name.replace("numpy._core.multiarray", "numpy"), "", inspect.cleandoc(words[-1]))


def _compiled_document(name: str, package: str) -> Document | None:
    """Return the docstrings of a compiled module of the running interpreter, where it has that module."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    entries = []
    title = name.lstrip("_")
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or isinstance(value, int | str | float) or inspect.ismodule(value):
            continue
        owner = key if name == "builtins" else f"{title}.{key}"
        entries += _described(value, owner)
        if inspect.isclass(value):
            for inner, member in sorted(vars(value).items()):
                if not inner.startswith("_"):
                    entries += _described(member, f"{owner}.{inner}")
    return _from_entries(entries, f"compiled/{title}", package)


def _described(value: object, name: str) -> list[Entry]:
    """Return the docstring of one live object as a list of one entry, or an empty list."""
    text = getattr(value, "__doc__", None)
    return [Entry(name, "", inspect.cleandoc(text))] if isinstance(text, str) and text.strip() else []


def _call(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the argument names of a definition in parentheses, without annotations."""
    if isinstance(node, ast.ClassDef):
        return ""
    given = node.args
    names = [item.arg for item in (*given.posonlyargs, *given.args) if item.arg not in {"self", "cls"}]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [item.arg for item in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return f"({', '.join(names)})"


def _from_entries(entries: list[Entry], module: str, package: str) -> Document | None:
    """Return a document made of entries one below the other, or None of no entries."""
    if not entries:
        return None
    parts = [f"{entry.name}{entry.signature}\n\n{entry.text.strip()}" for entry in entries]
    return Document(f"{package}/{module}", package, "\n\n".join(parts), entries)


def _is_page(name: str) -> bool:
    path = PurePosixPath(name)
    documented = {"doc", "docs"} & {part.lower() for part in path.parts}
    return bool(documented) and path.suffix in {".rst", ".md", ".txt"} and not _skipped(name)


def _skipped(name: str) -> bool:
    path = PurePosixPath(name)
    folders = {part.lower() for part in path.parts[:-1]}
    if folders & SKIPPED_FOLDERS or any(SKIPPED_NAMES.search(folder) for folder in folders):
        return True
    stem = path.stem.lower()
    return stem.startswith("test_") or bool(path.suffix != ".py" and SKIPPED_NAMES.search(stem))


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")
