"""ONNX graphs, written like array code: operators and functions of `Value`s add nodes."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# The version of the standard operators: the first with LayerNormalization. ONNX Runtime has it from
# 1.12 on.
OPSET = 17
# The version of the file format that came with it.
IR_VERSION = 8

# Sizes of an array: numbers, or the names of those that are only known when it runs.
Shape = Sequence[int | str]
# What becomes part of the file.
Constant = np.ndarray | np.generic


class Value:
    """An array in a graph under construction."""

    def __init__(self, graph: "Graph", name: str):
        self.graph, self.name = graph, name

    def op(self, operator: str, *others: "Value | Constant", **attributes: Any) -> "Value":
        """The single result of a standard operator of this array and others."""
        (result,) = self.graph.op(operator, self, *others, **attributes)
        return result

    def __add__(self, other: "Value | Constant") -> "Value":
        return self.op("Add", other)

    def __sub__(self, other: "Value | Constant") -> "Value":
        return self.op("Sub", other)

    def __mul__(self, other: "Value | Constant") -> "Value":
        return self.op("Mul", other)

    def __matmul__(self, other: "Value | Constant") -> "Value":
        return self.op("MatMul", other)

    def __getitem__(self, part: tuple[int, slice]) -> "Value":
        """A slice along one axis: `x[axis, start:end:step]`."""
        axis, along = part
        step = 1 if along.step is None else along.step
        start, end = along.start, along.stop
        if start is None:
            start = 0 if step > 0 else _END
        if end is None:
            end = _END if step > 0 else -_END
        return self.op("Slice", *(integers(x) for x in (start, end, axis, step)))

    def reshape(self, *sizes: "int | Value") -> "Value":
        """The same numbers in another shape; sizes that are arrays may be several at once."""
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) == len(sizes):
            return self.op("Reshape", integers(*numbers))
        parts = [size if isinstance(size, Value) else integers(size) for size in sizes]
        (shape,) = self.graph.op("Concat", *parts, axis=0)
        return self.op("Reshape", shape)

    def transpose(self, *axes: int) -> "Value":
        """The same numbers with the axes in another order."""
        return self.op("Transpose", perm=axes)

    def split(self, *sizes: int, axis: int) -> list["Value"]:
        """Parts of these sizes along an axis."""
        return self.graph.op("Split", self, integers(*sizes), outputs=len(sizes), axis=axis)


_END = np.iinfo(np.int64).max


def integers(*numbers: int) -> np.ndarray:
    """Whole numbers as ONNX's operators take them."""
    return np.array(numbers, np.int64)


class Graph:
    """A graph under construction."""

    def __init__(self, names: Iterator[int] | None = None):
        """`names` numbers the arrays; a graph inside another shares those of the outer one."""
        self._names = itertools.count() if names is None else names
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def inner(self) -> "Graph":
        """A new graph for use inside this one, such as the body of a Scan."""
        return Graph(self._names)

    def input(self, name: str, dtype: type, shape: Shape) -> Value:
        """Adds an input."""
        self._inputs.append(_array_info(name, dtype, shape))
        return Value(self, name)

    def output(self, name: str, value: Value, dtype: type, shape: Shape) -> None:
        """Adds an output."""
        self._nodes.append(helper.make_node("Identity", [value.name], [name]))
        self._outputs.append(_array_info(name, dtype, shape))

    def constant(self, array: Constant, name: str | None = None) -> Value:
        """An array that is stored in the file, once even if it is used several times."""
        array = np.asarray(array)
        key = (array.dtype, array.shape, array.tobytes(), name)
        if key not in self._known:
            self._known[key] = name or self._new_name()
            self._constants[self._known[key]] = array
        return Value(self, self._known[key])

    def op(
        self, operator: str, *inputs: Value | Constant, outputs: int = 1, **attributes: Any
    ) -> list[Value]:
        """The results of a standard operator."""
        values = [x if isinstance(x, Value) else self.constant(x) for x in inputs]
        names = [self._new_name() for _ in range(outputs)]
        node = helper.make_node(operator, [x.name for x in values], names, **attributes)
        self._nodes.append(node)
        return [Value(self, name) for name in names]

    def proto(self, name: str) -> onnx.GraphProto:
        """The finished graph."""
        constants = [numpy_helper.from_array(x, name) for name, x in self._constants.items()]
        return helper.make_graph(self._nodes, name, self._inputs, self._outputs, constants)

    def model(self, name: str, description: str, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished graph as the contents of a file, checked."""
        model = helper.make_model(
            self.proto(name),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="dvmsr_jax",
            doc_string=description,
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model

    def _new_name(self) -> str:
        return f"_{next(self._names)}"


def _array_info(name: str, dtype: type, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
    )
