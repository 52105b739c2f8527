"""What the training of ``builtin:quill`` promises, on inputs small enough for seconds."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quill import train
from benchmarks.quill.corpus import Exchange, assemble, held_out
from benchmarks.quill.dataset import windows
from benchmarks.quill.extract import Document, Entry, archive_documents, module_document, page_text
from benchmarks.quill.measure import CountModels, perplexity, pieces
from benchmarks.quill.network import Master, fresh, objective
from benchmarks.quill.sources import SOURCES
from benchmarks.quill.vocabulary import BEGIN, CONTEXT, END, VOCABULARY, chat_text, encode, learn

PROSE = "The {0} opens the stream and {0} reads every record of it until {0} finds the end of the stream. " * 3


def _documents(count: int) -> list[Document]:
    texts = (PROSE.format(f"{'abcdefghij'[number % 10]}{'klmnopqrst'[number // 10 % 10]}x") for number in range(count))
    return [Document(f"made/{number}", "made", text) for number, text in enumerate(texts)]


def test_docstrings_of_public_objects_become_one_document() -> None:
    source = '"""Module."""\ndef join(parts, *, by):\n    """Join parts."""\ndef _hidden():\n    """No."""\n'
    source += 'add_newdoc("pack", "ones", "Ones.")\n'
    found = module_document(source, "pack.mod", "pack")
    assert found is not None
    assert found.text == "pack.mod\n\nModule.\n\npack.mod.join(parts, by)\n\nJoin parts.\n\npack.ones\n\nOnes."


def test_a_source_that_does_not_parse_is_no_document() -> None:
    assert module_document("def (", "pack.mod", "pack") is None


def test_archives_give_modules_and_pages_but_no_tests_or_vendored_code(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pack-1-py3-none-any.whl", "w") as wheel:
        for name in ("pack/one.py", "pack/tests/two.py", "pack/_vendor/three.py"):
            wheel.writestr(name, f'"""Text of {name}."""')
    with tarfile.open(tmp_path / "pack-1.tar.gz", "w:gz") as archive:
        for name in ("pack-1/docs/guide.rst", "pack-1/docs/changelog.rst", "pack-1/readme.rst"):
            member = tarfile.TarInfo(name)
            member.size = 5
            archive.addfile(member, io.BytesIO(b"Pages"))
    named = {path.suffix: [one.identity for one in archive_documents(path, "pack")] for path in tmp_path.iterdir()}
    assert named == {".whl": ["pack/pack.one"], ".gz": ["pack/docs/guide.rst"]}


def test_pages_lose_their_markup_and_keep_their_words() -> None:
    page = ".. _mark:\n\nSee :func:`~os.path.join` and `here <https://x.y>`_."
    assert page_text(page) == "See `os.path.join` and here."


def test_repeated_paragraphs_are_kept_once() -> None:
    first = _documents(1)[0]
    corpus = assemble([first, Document("made/again", "made", first.text.replace("opens", "shuts"))])
    assert len(corpus.train) + len(corpus.held_out) == 1


def test_each_document_is_on_the_side_its_identity_says() -> None:
    identities = [f"made/{number}" for number in range(5000)]
    share = sum(map(held_out, identities)) / len(identities)
    assert 0.015 < share < 0.025


def test_questions_come_from_first_sentences() -> None:
    entry = Entry("pack.mod.Pile.join", "(parts)", "Join all parts with the given mark. Later text.\n\nMore.")
    corpus = assemble([Document("made/x", "made", "", [entry])])
    (exchange,) = corpus.exchanges + corpus.held_out_exchanges
    assert "Pile.join" in exchange.question
    assert exchange.answer == "Join all parts with the given mark."


def test_the_tokenizer_returns_what_it_was_given_and_keeps_chat_marks_whole() -> None:
    tokenizer = learn([PROSE.format("é") for _ in range(3)], 1)
    (ids,) = encode(tokenizer, [chat_text(Exchange("Why?", "So – é."))])
    assert (ids[0], ids[-1]) == (BEGIN, END)
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text == "<s><|user|>Why?<|end|><|assistant|>So – é.<|end|></s>"


def test_windows_cover_the_documents_once_an_epoch() -> None:
    documents = [np.arange(start, start + 40, dtype=np.uint16) for start in range(0, 400, 40)]
    batches = windows(documents, batch=1, length=7, seed=1)
    seen = torch.cat([next(batches)[:, :-1].flatten() for _ in range(399 // 7)])
    assert len(set(seen.tolist())) == len(seen) == 399
    again = windows(documents, batch=1, length=7, seed=1)
    assert torch.equal(next(again), next(windows(documents, batch=1, length=7, seed=1)))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    network = fresh(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    documents = [np.full(CONTEXT + 50, 9, dtype=np.uint16), np.array([BEGIN, 8, 9, END], dtype=np.uint16)]
    assert perplexity(network, documents) == pytest.approx(VOCABULARY, rel=1e-4)
    assert [len(one) for one in pieces(documents)] == [CONTEXT - 1, 51, 3]


def test_count_models_know_what_follows_what() -> None:
    documents = [np.array([BEGIN, *([7, 8] * 500), END], dtype=np.uint16)]
    unigram, bigram = CountModels(documents).perplexities(documents)
    assert bigram < 1.1 < unigram < 12


def test_steps_lower_the_loss_and_round_into_the_network() -> None:
    master = Master(fresh(1))
    optimiser = master.optimiser(1e-3)
    loss = objective(master.network, compiled=False)
    batch = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
    values = []
    for _ in range(6):
        value = loss(batch)
        torch.autograd.backward(value)
        master.step(optimiser)
        values.append(value.item())
    assert values[-1] < values[0] - 1
    held = dict(master.network.named_parameters())
    assert all(torch.equal(held[name], weight.bfloat16()) for name, weight in master.state().items())


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [np.random.default_rng(number).integers(3, 99, 60).astype(np.uint16) for number in range(8)]
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        (tmp_path / name).mkdir()
        for stop in stops:
            monkeypatch.setattr(train, "PHASES", (train.Phase(stop, 2, 16, "eager"),))
            train.Run(tmp_path / name, compiled=False).finish(documents)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["done"] == parts["done"] == 4
    assert all(torch.equal(value, parts["weights"][key]) for key, value in whole["weights"].items())


def test_the_rate_rises_stays_and_falls_to_almost_nothing() -> None:
    rates = [train.rate_at(step) for step in range(train.STEPS)]
    assert rates[0] < train.RATE / 100
    assert max(rates) == rates[train.STEPS // 2] == train.RATE
    assert 0 < rates[-1] < train.RATE / 10


def test_every_source_is_pinned_once() -> None:
    names = [source.name for source in SOURCES]
    assert names == sorted(set(names))
    assert all(source.version and source.licence for source in SOURCES)
