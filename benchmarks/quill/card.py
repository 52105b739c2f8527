"""The model card, written from the record of the training."""

from __future__ import annotations

from typing import Any

_HEAD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
---

# quill

A small language model of the Llama architecture that Calque carries along as `builtin:quill`, so that exports,
quantisation and generation can be tried and measured without a download on a model that has really learnt something.
It was trained from random weights by `python -m benchmarks.quill.train`; that folder describes how to repeat it.

It is no assistant. It has read only the documentation of Python packages, continues such text readably for a
sentence or two, and answers "What does NAME do?" in the style of a docstring's first line. What it says about a name
may well be wrong. Use it to test software, not to learn anything.
"""

_PROTOCOL = """\
Perplexity is per token of this tokenizer, weights as published (bfloat16) and computed in float32. Text is cut into
runs of 1023 tokens, each predicted after a begin mark and nothing else, so early tokens of a run cost more than with
overlapping runs. The unigram model (add-one) and the bigram model (Witten-Bell) are counted on the training tokens and
judged on the same tokens; the bigram model sees the true previous token also where a run begins.

*held-out* is the held-out side of the corpus, by whole documents: a document is held out when the hash of its name
says so, after paragraphs mostly met before (runs of eight words) were removed from the whole corpus. *held-out chat*
is the questions and answers built from held-out documents. `heldout.txt` is a part of *held-out* and tokenised as one
text; quality figures elsewhere are measured on it.
"""

_TAIL = """## Licences

The weights and the files of this folder are under Apache-2.0, except `heldout.txt`, which quotes documentation of the
packages marked below under their own licences; `LICENSE` holds both. Packages read for training, all permissive:

| package | version | licence | quoted in heldout.txt |
| --- | --- | --- | --- |
"""


def card(record: dict[str, Any]) -> str:
    """Return the model card as Markdown."""
    quoted = record["corpus"]["heldout_txt_bytes_by_package"]
    rows = [
        f"| {item['name']} | {item['version']} | {item['licence']} | {_bytes(quoted.get(item['name']))} |" for item in record["packages"]
    ]
    parts = [_HEAD, _facts(record), _quality(record), _PROTOCOL, _samples(record), _TAIL + "\n".join(rows) + "\n"]
    return "\n".join(parts)


def _facts(record: dict[str, Any]) -> str:
    corpus = record["corpus"]
    phases = "; ".join(f"{one['steps']} steps of {one['batch']} x {one['length']} tokens" for one in record["phases"])
    done = "" if record["steps"] == record["steps_planned"] else f" (unfinished: {record['steps']} steps so far)"
    return f"""## Facts

| | |
| --- | --- |
| shape | 6 layers, width 256, feed-forward 512, 4 heads over 2 key/value heads of 64, tied embeddings |
| parameters | {record["parameters"]:,} ({record["weights_bytes"] / 1e6:.1f} MB in bfloat16) |
| tokenizer | byte-level BPE, 4096 entries, with `<s>`, `</s>`, `<pad>` and four chat marks |
| context | 1024 tokens |
| corpus | {corpus["train_bytes"] / 1e6:.1f} MB of text in {corpus["train_documents"]:,} documents, \
{corpus["train_tokens"] / 1e6:.1f} M tokens |
| held out | {corpus["held_out_bytes"] / 1e6:.2f} MB in {corpus["held_out_documents"]} documents |
| training | {phases}{done} |
| tokens seen | {record["tokens_seen"] / 1e6:.1f} M |
| final training loss | {record["final_loss"]:.3f} nats per token |
| wall time | {record["wall_seconds"] / 60:.0f} minutes on one thread of a processor, other work beside it |
"""


def _quality(record: dict[str, Any]) -> str:
    rows = [
        f"| {name.replace('heldout_txt', '`heldout.txt`').replace('held_out', 'held-out').replace('_', ' ')} "
        f"| {one['tokens']:,} | **{one['perplexity']:.2f}** | {one['bigram_perplexity']:.1f} "
        f"| {one['unigram_perplexity']:.1f} |"
        for name, one in record["perplexity"].items()
    ]
    head = "## Perplexity\n\n| text | tokens | quill | bigram | unigram |\n| --- | --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n"


def _samples(record: dict[str, Any]) -> str:
    blocks = []
    for item in record["samples"]:
        sign = " → " if item["kind"] == "answer" else " … "
        blocks.append("    " + (item["prompt"] + sign + item["text"].strip()).replace("\n", "\n    "))
    return "## Samples\n\nGreedy, 40 tokens at most, as they came.\n\n" + "\n\n".join(blocks) + "\n"


def _bytes(size: int | None) -> str:
    return f"{size:,} bytes" if size else ""
