"""What an ONNX file holds, read off its bytes before any runtime sees them.

A served file may come from a stranger, and a check that the runtime's own parser makes comes too late. So the few fields
that say what a graph can do are read here by protobuf's wire format: that takes neither onnx nor onnxruntime, runs
nothing, and allocates nothing that the file does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator

# Arithmetic on tensors that are there. What makes big tensors out of small numbers (Expand, Range, ConstantOfShape, Tile),
# loops, draws random numbers or calls out is left out.
_NAMES = """
    Abs Add And ArgMax AveragePool BatchNormalization Cast Clip Concat Constant Conv Div Equal Erf Exp Flatten Gather Gelu
    Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity If
    InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mul Neg Not
    Or PRelu Pow Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Shape Sigmoid Slice Softmax
    Split Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where
"""
OPERATORS = frozenset(_NAMES.split())
MAX_NODES = 20_000
MAX_DEPTH = 32
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5

# Field numbers of onnx.proto3.
_MODEL = {"graph": 7, "opset": 8, "training": 20, "functions": 25}
_GRAPH = {"node": 1, "initializer": 5, "sparse": 15}
_NODE = {"operator": 4, "attribute": 5, "domain": 7}
_ATTRIBUTE = {"tensor": 5, "graph": 6, "tensors": 10, "graphs": 11, "sparse": 22, "sparses": 23}
_TENSOR = {"external": 13, "location": 14}


class OnnxFileError(ValueError):
    """An ONNX file is cut, or holds something that rlexit neither writes nor runs; the message is one line."""


def operators(data: bytes) -> set[str]:
    """The operators of a model and of all graphs in it.

    Args:
        data: the whole file.
    Raises:
        OnnxFileError: the file is no ONNX model, names an operator that is not in `OPERATORS` or of another domain, keeps
            tensors in other files, has functions or training graphs of its own, or has too many nodes.
    """
    found: list[str] = []
    graphs = 0
    for number, value in _fields(memoryview(data)):
        if number == _MODEL["graph"]:
            graphs += 1
            _graph(_message(value), found, 0)
        elif number in (_MODEL["training"], _MODEL["functions"]):
            raise OnnxFileError("must hold one plain graph, got functions or a training graph of its own")
        elif number == _MODEL["opset"]:
            _domain(_message(value), 1)
    if graphs != 1:
        raise OnnxFileError(f"must hold one graph, got {graphs}")
    return set(found)


def _graph(data: memoryview, found: list[str], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise OnnxFileError(f"must nest at most {MAX_DEPTH} graphs, got more")
    for number, value in _fields(data):
        if number == _GRAPH["node"]:
            _node(_message(value), found, depth)
        elif number == _GRAPH["initializer"]:
            _tensor(_message(value))
        elif number == _GRAPH["sparse"]:
            raise OnnxFileError("must hold plain tensors, got a sparse one")


def _node(data: memoryview, found: list[str], depth: int) -> None:
    _domain(data, _NODE["domain"])
    for number, value in _fields(data):
        if number == _NODE["operator"]:
            name = bytes(_message(value)).decode("ascii", "replace")
            if name not in OPERATORS:
                shown = "".join(letter if letter.isalnum() else "?" for letter in name[:40])
                raise OnnxFileError(f"must use known operators only, got {shown!r}")
            found.append(name)
            if len(found) > MAX_NODES:
                raise OnnxFileError(f"must have at most {MAX_NODES} nodes, got more")
        elif number == _NODE["attribute"]:
            for kind, inner in _fields(_message(value)):
                if kind in (_ATTRIBUTE["graph"], _ATTRIBUTE["graphs"]):
                    _graph(_message(inner), found, depth + 1)
                elif kind in (_ATTRIBUTE["tensor"], _ATTRIBUTE["tensors"]):
                    _tensor(_message(inner))
                elif kind in (_ATTRIBUTE["sparse"], _ATTRIBUTE["sparses"]):
                    raise OnnxFileError("must hold plain tensors, got a sparse one")


def _tensor(data: memoryview) -> None:
    for number, value in _fields(data):
        if number == _TENSOR["external"] or (number == _TENSOR["location"] and value != 0):
            raise OnnxFileError("must hold its tensors itself, got external data")


def _domain(data: memoryview, field: int) -> None:
    for number, value in _fields(data):
        if number == field and bytes(_message(value)) not in (b"", b"ai.onnx"):
            raise OnnxFileError("must use ONNX's own operators only, got another domain")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise OnnxFileError("is no ONNX model: a message is a number there")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of one message, in order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: int | memoryview
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _BYTES:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            value, at = 0, at + (8 if wire == _EIGHT_BYTES else 4)
        else:
            raise OnnxFileError("is no ONNX model: a field has an unknown wire type")
        if at > len(data):
            raise OnnxFileError("is no ONNX model, or was cut")
        yield number, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise OnnxFileError("is no ONNX model, or was cut")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise OnnxFileError("is no ONNX model: a number has more than ten bytes")
