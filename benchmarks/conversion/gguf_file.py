"""Writes a GGUF file of a checkpoint with llama.cpp's own converter, and quantizes it where the type is one that only llama.cpp writes.

``python gguf_file.py CONVERTER MODEL FILE TYPE``, in the environment of llama.cpp, by its path: ``CONVERTER`` is convert_hf_to_gguf.py.
The converter refuses tokenizers that it does not know by a digest of what they give; quill's splits words as GPT-2's does, so that is
what it is told. Tensors and all else are written as the converter does it alone.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

# What the converter writes itself; everything else is quantized from f32.
WRITTEN = ("f32", "f16", "bf16", "q8_0")
PRE_TOKENIZER = "gpt-2"


def main(converter: Path, model: Path, file: Path, kind: str) -> None:
    """The file holds the checkpoint in the type: f32, f16, bf16, or a quantization by llama.cpp's name of it, such as Q4_0."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind in WRITTEN:
        return convert(converter, model, file, kind)
    whole = file.with_suffix(".f32")
    convert(converter, model, whole, "f32")
    quantize(whole, file, kind)
    whole.unlink()


def convert(converter: Path, model: Path, file: Path, kind: str) -> None:
    """The file holds the checkpoint as the converter writes it."""
    # Instead of this file's folder: the converter imports packages that lie beside it, as it does when it is run by itself.
    sys.path[0] = str(converter.parent)
    sys.path.insert(1, str(converter.parent / "gguf-py"))
    from conversion.base import TextModel  # type: ignore[import-not-found]  # the converter's own package

    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
    sys.argv = [str(converter), str(model), "--outtype", kind, "--outfile", str(file)]
    runpy.run_path(str(converter), run_name="__main__")


def quantize(whole: Path, file: Path, kind: str) -> None:
    """The file holds what is in ``whole``, quantized."""
    import llama_cpp  # type: ignore[import-not-found]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), params):
        raise SystemExit(f"llama.cpp did not quantize to {kind}; its own message is above")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
