"""Exports a checkpoint with transformers.exporters: ``python exporters.py MODEL OUT [cpu]``, in its environment, by its path."""

from __future__ import annotations

import sys


def main(model: str, out: str, fusions: str | None = None) -> None:
    """The folder holds prefill.onnx and decode.onnx; ``fusions`` is the provider for which operators are joined."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    eager = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    eager.train(False)
    # Padded as it will be: where every mask is 1, the exporter leaves the mask out of the graph.
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :4] = mask[2, :1] = 0
    sample = {"input_ids": torch.randint(3, 100, mask.shape), "attention_mask": mask}
    exported = OnnxExporter().export_for_generation(eager, sample, OnnxConfig(dynamic=True, ort_fusions=fusions))
    exported.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
