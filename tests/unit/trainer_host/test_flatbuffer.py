from __future__ import annotations

from pathlib import Path

import flatbuffers  # type: ignore[import-untyped]
import pytest
from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped]

from protocol.errors import Rejected
from protocol.release import Tensor
from trainer_host import flatbuffer

MODELS = Path(__file__).parents[2] / "models"


def altered(change: str, value: object) -> bytes:
    """The echo model with one thing changed in its tables."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel((MODELS / "echo.tflite").read_bytes(), 0))
    graph = model.subgraphs[0]
    target = {"code": model.operatorCodes[0], "tensor": graph.tensors[graph.inputs[0]], "graph": graph, "model": model}
    owner, _, name = change.partition(".")
    setattr(target[owner], name, value)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_signature_and_operators() -> None:
    contents = flatbuffer.read((MODELS / "echo.tflite").read_bytes())
    assert [(tensor.shape, tensor.dtype) for tensor in contents.inputs] == [((1, 6), "float32")]
    assert [(tensor.shape, tensor.dtype) for tensor in contents.outputs] == [((1, 4), "float32")]
    assert contents.operators == {"FULLY_CONNECTED": 1}


def test_names_are_those_the_interpreter_reports() -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    data = (MODELS / "echo.tflite").read_bytes()
    detail = interpreter.Interpreter(model_content=data).get_input_details()[0]
    assert flatbuffer.read(data).inputs == (Tensor(name=detail["name"], shape=(1, 6), dtype="float32"),)


def test_versions_are_read() -> None:
    assert flatbuffer.read(altered("code.version", 12)).operators == {"FULLY_CONNECTED": 12}


@pytest.mark.parametrize(
    ("change", "value", "named"),
    [
        ("code.customCode", "FlexErf", "FlexErf"),
        ("code.builtinCode", schema.BuiltinOperator.CUSTOM, "without a name"),
    ],
)
def test_operators_that_are_not_built_in_are_refused_by_name(change: str, value: object, named: str) -> None:
    with pytest.raises(Rejected, match=named) as refused:
        flatbuffer.read(altered(change, value))
    assert refused.value.code == "custom_operator"


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("code.builtinCode", 9999, "operator number 9999"),
        ("model.subgraphs", [], "0 subgraphs"),
        ("graph.inputs", [], "0 inputs or outputs"),
        ("graph.outputs", [0] * 101, "101 inputs or outputs"),
        ("tensor.shape", [1] * 9, "rank 9"),
        ("tensor.type", 99, "type 99"),
    ],
)
def test_what_makes_no_sense_is_refused(change: str, value: object, said: str) -> None:
    with pytest.raises(Rejected, match=said) as refused:
        flatbuffer.read(altered(change, value))
    assert refused.value.code == "bad_model"


@pytest.mark.parametrize("data", [b"", b"TFL3", b"\x00" * 64, b"\xff\xff\xff\x7fTFL3" + b"\xff" * 64])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(Rejected) as refused:
        flatbuffer.read(data)
    assert refused.value.code == "bad_model"


def test_damage_anywhere_gives_an_answer_or_a_refusal() -> None:
    data = (MODELS / "narrow.tflite").read_bytes()
    codes = set()
    for length in range(0, len(data), 7):
        for wrong in (data[:length], data[:length] + b"\xff\xff\xff\xff" + data[length + 4 :]):
            try:
                flatbuffer.read(wrong)
            except Rejected as refused:
                codes.add(refused.code)
    assert "bad_model" in codes
