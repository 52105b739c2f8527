from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from calque.targets import _tensorrt_operators as operators


def test_the_table_is_what_the_installed_parser_answers() -> None:
    pytest.importorskip("tensorrt_rtx")
    kept = json.loads(operators.FILE.read_text(encoding="utf-8"))
    asked = operators.ask()
    if (asked["version"], asked["onnx"]) != (kept["version"], kept["onnx"]):
        both = set(kept["operators"]) & set(asked["operators"])
        lost = [name for name in both if kept["operators"][name] and not asked["operators"][name]]
        assert lost == [], f"{asked['parser']} {asked['version']} knows less: python -m {operators.__name__}"
    else:
        assert asked == kept


def test_the_table_knows_what_graphs_are_made_of() -> None:
    table = operators.supported()
    assert all(table[name] for name in ("Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization", "MatMul", "TRT_Attention"))
    assert not any(table[name] for name in ("MatMulInteger", "DynamicQuantizeLinear", "BitwiseAnd", "Unique", "SequenceAt"))
    assert operators.opset() == 24


def test_asking_again_writes_the_same_file(tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    if version("tensorrt_rtx") != json.loads(operators.FILE.read_text(encoding="utf-8"))["version"]:
        pytest.skip("another version of the parser")
    before = operators.FILE.read_bytes()
    monkeypatch.setattr(operators, "FILE", tmp_path / "table.json")  # type: ignore[operator]
    operators.main()
    assert operators.FILE.read_bytes() == before
