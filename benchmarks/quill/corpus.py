"""The training text: fetched at pinned versions, cleaned, rid of repetition, and split by whole documents."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.quill.extract import Document, Entry, archive_documents, library_documents
from benchmarks.quill.sources import QUOTABLE, SOURCES, Source

HELD_OUT_PER_MILLE = 20
SHINGLE_WORDS = 8
QUOTED_BYTES = 90_000
QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name} in one sentence.",
    "Describe {name}.",
    "Tell me what {name} is for.",
)


@dataclass(frozen=True)
class Exchange:
    """One question about a documented object and its answer, both from a docstring."""

    question: str
    answer: str


@dataclass
class Corpus:
    """Texts of both sides of the split; the two sides share no document and hardly a paragraph."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    quoted: list[str] = field(default_factory=list)
    quoted_from: dict[str, int] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    held_out_exchanges: list[Exchange] = field(default_factory=list)
    documents_seen: int = 0
    bytes_seen: int = 0

    def figures(self) -> dict[str, object]:
        """Return the sizes worth recording."""
        return {
            "documents_found": self.documents_seen,
            "bytes_found": self.bytes_seen,
            "train_documents": len(self.train),
            "train_bytes": sum(len(text.encode()) for text in self.train),
            "held_out_documents": len(self.held_out),
            "held_out_bytes": sum(len(text.encode()) for text in self.held_out),
            "train_exchanges": len(self.exchanges),
            "held_out_exchanges": len(self.held_out_exchanges),
            "heldout_txt_bytes_by_package": dict(sorted(self.quoted_from.items())),
        }


class Repetition:
    """Memory of every run of eight words met so far, by which near copies of paragraphs are told."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._seen: set[bytes] = set()

    def first_met(self, paragraph: str) -> bool:
        """Return whether less than half of the paragraph was met before, and remember it."""
        words = re.sub(r"\d", "0", paragraph.lower())
        listed = re.findall(r"[a-z0]+", words)
        if len(listed) < SHINGLE_WORDS:
            return True
        marks = {
            hashlib.blake2b(" ".join(listed[at : at + SHINGLE_WORDS]).encode(), digest_size=8).digest()
            for at in range(len(listed) - SHINGLE_WORDS + 1)
        }
        fresh = marks - self._seen
        self._seen |= fresh
        return 2 * len(fresh) > len(marks)


def fetch(folder: Path) -> list[tuple[Source, Path]]:
    """Return every pinned archive, downloaded from the package index where it is not in the folder yet."""
    found = []
    for source in SOURCES:
        for kind in ("wheel", "sdist") if source.pages else ("wheel",):
            found.append((source, _archive(source, kind, folder / kind)))
    return found


def build(folder: Path) -> Corpus:
    """Return the corpus, read from the cache in the folder when an earlier call left it there."""
    cache = folder / "corpus.json"
    if cache.exists():
        return _read(cache)
    archives = fetch(folder / "downloads")
    found: list[Document] = list(library_documents(Path(sysconfig.get_paths()["stdlib"])))
    for source, path in archives:
        found += archive_documents(path, source.name)
    corpus = assemble(found)
    temporary = cache.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(corpus)), encoding="utf-8")
    temporary.rename(cache)
    return corpus


def assemble(documents: Iterable[Document]) -> Corpus:
    """Return the corpus of these documents: cleaned, without repetition, each document wholly on one side."""
    corpus, memory, asked = Corpus(), Repetition(), set[str]()
    for document in sorted(documents, key=lambda item: digest(item.identity)):
        corpus.documents_seen += 1
        corpus.bytes_seen += len(document.text.encode())
        text = "\n\n".join(_kept_paragraphs(document.text, memory))
        aside = held_out(document.identity)
        exchanges = [item for item in _exchanges(document.entries) if item.question not in asked]
        asked.update(item.question for item in exchanges)
        (corpus.held_out_exchanges if aside else corpus.exchanges).extend(exchanges)
        if len(text) < 200:
            continue
        (corpus.held_out if aside else corpus.train).append(text)
        if aside and document.package in QUOTABLE:
            _quote(corpus, document.package, text)
    return corpus


def digest(identity: str) -> bytes:
    """Return the hash of a document's identity, which orders documents and decides their side."""
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()


def held_out(identity: str) -> bool:
    """Return whether the document with this identity is kept away from training."""
    return int.from_bytes(digest(identity), "big") % 1000 < HELD_OUT_PER_MILLE


def _quote(corpus: Corpus, package: str, text: str) -> None:
    """Add a whole document to the text that is published with the weights, while there is room for it."""
    size = len(text.encode())
    had = corpus.quoted_from.get(package, 0)
    if had + size > QUOTED_BYTES // 4 or sum(corpus.quoted_from.values()) + size > QUOTED_BYTES:
        return
    corpus.quoted.append(text)
    corpus.quoted_from[package] = had + size


def _kept_paragraphs(text: str, memory: Repetition) -> Iterator[str]:
    """Yield the paragraphs worth reading: mostly letters, not met before, no endless lines."""
    cleaned = re.sub(r"[^\n\x20-\x7e\u00a0-\u2fff]", "", text.expandtabs(4))
    for paragraph in re.split(r"\n\s*\n", cleaned):
        block = "\n".join(line.rstrip() for line in paragraph.strip("\n").splitlines())
        letters = sum(character.isalpha() or character == " " for character in block)
        if not block.strip() or letters < 0.6 * len(block) or max(map(len, block.splitlines())) > 400:
            continue
        if memory.first_met(block):
            yield block


def _exchanges(entries: Iterable[Entry]) -> Iterator[Exchange]:
    """Yield questions and answers built from the first sentences of docstrings."""
    for entry in entries:
        first = " ".join(entry.text.strip().split("\n\n", 1)[0].split())
        answer = re.split(r"(?<=[.!?])\s+(?=[A-Z])", first)[0]
        plain = re.sub(r":[a-z:]+:`~?!?\.?([^`]*)`", r"`\1`", answer)
        name = ".".join(entry.name.split(".")[-2:])
        if not re.fullmatch(r"[A-Z][ -~]{20,160}\.", plain) or "__" in name or plain.startswith("Built-in"):
            continue
        template = QUESTIONS[digest(entry.name)[0] % len(QUESTIONS)]
        yield Exchange(template.format(name=name), plain)


def _archive(source: Source, kind: str, folder: Path) -> Path:
    """Return the path of one pinned archive, fetched by pip when the folder lacks it."""
    folder.mkdir(parents=True, exist_ok=True)
    stems = {f"{source.name}-{source.version}", f"{source.name.replace('-', '_')}-{source.version}"}
    for attempt in range(2):
        for path in sorted(folder.iterdir()):
            if any(path.name.startswith((f"{stem}-", f"{stem}.tar")) for stem in stems):
                return path
        if attempt == 0:
            choice = "--only-binary" if kind == "wheel" else "--no-binary"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", choice, ":all:"]
            subprocess.run([*command, "--dest", str(folder), f"{source.name}=={source.version}"], check=True)
    raise FileNotFoundError(f"the {kind} of {source.name} {source.version} is not in {folder} after its download")


def _read(path: Path) -> Corpus:
    stored = json.loads(path.read_text(encoding="utf-8"))
    for key in ("exchanges", "held_out_exchanges"):
        stored[key] = [Exchange(**item) for item in stored[key]]
    return Corpus(**stored)
