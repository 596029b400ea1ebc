"""What a TFLite file says about itself, read without TensorFlow and without running it.

A device's runtime has a table of operators up to certain versions. Comparing it with the operators a model uses
tells, before anything is sent, whether the device can run it (TFLite schema, `OperatorCode`: builtin code and
version).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped]

from protocol.errors import Rejected
from protocol.release import Tensor

MAX_OPERATORS = 1000
MAX_RANK = 8

_OPERATOR_NAMES = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
_DTYPES = {value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)}


class Contents(NamedTuple):
    """What a model needs and takes.

    Attributes:
        inputs: Tensor signature, with the names the interpreter reports.
        outputs: Likewise.
        operators: Built-in operator name to the highest version used.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: dict[str, int]


def read(model: bytes) -> Contents:
    """Read a model's signature and operators.

    Raises:
        Rejected: With code `bad_model` when the bytes are no TFLite model, `custom_operator` when it needs an
            operator that is not built in (as models with Flex operators do); the text names it.
    """
    if model[4:8] != b"TFL3":
        raise Rejected("bad_model", "not a TFLite file: the identifier TFL3 is missing")
    try:
        return _contents(schema.Model.GetRootAsModel(model, 0))
    except (struct.error, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise Rejected("bad_model", f"the TFLite file is damaged: {error}") from error


def _contents(model: Any) -> Contents:
    if model.SubgraphsLength() < 1 or model.OperatorCodesLength() > MAX_OPERATORS:
        raise Rejected("bad_model", f"{model.SubgraphsLength()} subgraphs and {model.OperatorCodesLength()} operators")
    operators: dict[str, int] = {}
    for index in range(model.OperatorCodesLength()):
        name, version = _operator(model.OperatorCodes(index))
        operators[name] = max(version, operators.get(name, 0))
    graph = model.Subgraphs(0)
    inputs = tuple(_tensor(graph, graph.Inputs(index)) for index in range(_few(graph.InputsLength())))
    outputs = tuple(_tensor(graph, graph.Outputs(index)) for index in range(_few(graph.OutputsLength())))
    return Contents(inputs, outputs, operators)


def _operator(code: Any) -> tuple[str, int]:
    # Codes above 126 do not fit the older of the two fields.
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    custom = code.CustomCode()
    if custom is not None or number == schema.BuiltinOperator.CUSTOM:
        name = (custom or b"without a name").decode("utf-8", "replace")
        raise Rejected("custom_operator", f"the model needs the operator {name}, which is not built in", "operators")
    if number not in _OPERATOR_NAMES:
        raise Rejected("bad_model", f"this host does not know the operator number {number}", "operators")
    return _OPERATOR_NAMES[number], int(code.Version())


def _tensor(graph: Any, index: int) -> Tensor:
    tensor = graph.Tensors(int(index))
    shape = tuple(int(tensor.Shape(axis)) for axis in range(min(tensor.ShapeLength(), MAX_RANK + 1)))
    if tensor.ShapeLength() > MAX_RANK or tensor.Type() not in _DTYPES:
        raise Rejected("bad_model", f"a tensor of rank {tensor.ShapeLength()} and type {tensor.Type()}")
    return Tensor(name=tensor.Name().decode("utf-8"), shape=shape, dtype=_DTYPES[tensor.Type()])


def _few(count: int) -> int:
    if not 1 <= count <= 100:
        raise Rejected("bad_model", f"the model has {count} inputs or outputs")
    return count
