"""What runs the graphs of an export: onnxruntime, or openvino. Both read and write given arrays, so nothing is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlexit.exported import Port, ServeError

EXTRAS = {"onnxruntime": "export", "openvino": "openvino"}
Arrays = Mapping[str, np.ndarray]


class MissingExtra(ImportError):
    """A library of an extra is not installed; the message names the extra."""


def library(name: str) -> Any:
    """A runtime's module.

    Raises:
        ServeError: no runtime has that name.
        MissingExtra: it is not installed; says how to get it.
    """
    if name not in EXTRAS:
        raise ServeError(f"`runtime` must be one of {', '.join(EXTRAS)}, got {name!r}.")
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtra(f"`{name}` is missing. Install it: pip install 'rlexit[{EXTRAS[name]}]'.") from error


@runtime_checkable
class Runner(Protocol):
    """A graph that is ready to run."""

    def bind(self, inputs: Arrays, outputs: Arrays, fixed: bool = False) -> Callable[[], object]:
        """A call that reads and writes these arrays.

        Args:
            inputs: by name; contiguous, (B, ...).
            outputs: by name; contiguous, (B, ...).
            fixed: the call is kept and made often; otherwise it is good until the next `bind` of this thread only.
        """
        ...


def runner(name: str, data: bytes, inputs: Sequence[Port], outputs: Sequence[Port]) -> Runner:
    """Opens a graph.

    Args:
        name: of the runtime.
        data: checked bytes of an ONNX file.
        inputs: what the graph must read.
        outputs: what it must give.
    Raises:
        ServeError: the runtime refuses the graph, or the graph has other inputs or outputs.
        MissingExtra: the runtime is not installed.
    """
    module = library(name)
    kind = OnnxRuntime if name == "onnxruntime" else OpenVino
    try:
        made = kind(module, data, inputs)
    except Exception as error:
        # A dozen types of faults, some of the runtime's own; their common base is Exception.
        raise ServeError(f"`stages` must be graphs that {name} runs, got: {one_line(error)} Export again.") from error
    if made.names != ([port.name for port in inputs], [port.name for port in outputs]):
        raise ServeError("`stages` must have the inputs and outputs that the manifest says. Export again.")
    return made


def one_line(error: Exception) -> str:
    """An error of a runtime in at most 200 characters."""
    text = " ".join(str(error).split())[:200]
    return text if text.endswith(".") else f"{text}."


class OnnxRuntime:
    """A session of onnxruntime on the thread that calls.

    Args:
        module: onnxruntime.
        data: bytes of the graph.
        inputs: what the graph must read.
    """

    def __init__(self, module: Any, data: bytes, inputs: Sequence[Port]) -> None:
        options = module.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
        options.execution_mode = module.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4
        # Spinning threads make torch in the same process up to 50 times as slow (onnxruntime issue 13808).
        for pool in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
        self._session = module.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        given, told = self._session.get_inputs(), self._session.get_outputs()
        self.names = [port.name for port in given], [port.name for port in told]

    def bind(self, inputs: Arrays, outputs: Arrays, fixed: bool = False) -> Callable[[], object]:
        """See `Runner`."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return partial(self._session.run_with_iobinding, binding)


class OpenVino:
    """A graph compiled by openvino for one thread, in float32: by itself it takes bfloat16 where there is some.

    Args:
        module: openvino.
        data: bytes of the graph.
        inputs: what the graph must read.
    """

    def __init__(self, module: Any, data: bytes, inputs: Sequence[Port]) -> None:
        self._module, self._core = module, module.Core()
        self._settings = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        model = self._core.read_model(data)
        self.names = [port.any_name for port in model.inputs], [port.any_name for port in model.outputs]
        self._any = self._core.compile_model(model, "CPU", self._settings)
        self._requests = threading.local()
        model.reshape({port.name: module.PartialShape([1, *port.shape]) for port in inputs})
        self._one = self._core.compile_model(model, "CPU", self._settings)

    def bind(self, inputs: Arrays, outputs: Arrays, fixed: bool = False) -> Callable[[], object]:
        """See `Runner`; a fixed call is of one row, and faster for it."""
        if fixed:
            request = self._one.create_infer_request()
        elif (request := getattr(self._requests, "own", None)) is None:
            request = self._requests.own = self._any.create_infer_request()
        for name, array in {**inputs, **outputs}.items():
            request.set_tensor(name, self._module.Tensor(array, shared_memory=True))
        call: Callable[[], object] = request.infer
        return call
