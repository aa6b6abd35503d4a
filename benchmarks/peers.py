"""Other people's kernels as contenders; `benchmarks/peers.sh` installs them under `.peers/`."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np

from contenders import Call, inputs
from figures import ROOT

PEERS = ROOT / ".peers"
LLAMA = PEERS / "llama.cpp"
BLOCK = 128

GGML_TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q6_K": 14}
REPACKED = ("Q2_K", "Q4_K")
"""Types that ggml can interleave on this kind of CPU; storing another one so is a crash."""


def installed() -> bool:
    """Tell whether the script has run."""
    return (LLAMA / ".done").exists() and (PEERS / "python" / ".done").exists()


def use_packages() -> None:
    """Let the peers' packages be imported, ours first."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = str(PEERS / "python" / "lib" / version / "site-packages")
    if path not in sys.path:
        sys.path.append(path)


def versions() -> dict[str, Any]:
    """Name what was measured."""
    use_packages()
    import onnxruntime
    import openvino

    return {
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__,
        "llama.cpp": (LLAMA / ".done").read_text().strip(),
    }


class Ggml:
    """`ggml_mul_mat` on the CPU; `repacked` in the interleaved layout, where the type has one."""

    def __init__(
        self, name: str, shape: tuple[int, int], kind: str, copies: int, *, repacked: bool
    ) -> None:
        self.name, self.shape = name, shape
        self._library = library = ggml()
        out, width = shape
        data = quantized_rows(kind, out, width)
        self.nbytes = data.nbytes
        place = repack_buffers() if repacked else library.ggml_backend_cpu_buffer_type()
        self._weights = []
        for _ in range(copies):
            context = _context()
            weight = library.ggml_new_tensor_2d(context, GGML_TYPES[kind], width, out)
            if not library.ggml_backend_alloc_ctx_tensors_from_buft(context, place):
                raise MemoryError(f"ggml could not allocate {name}.")
            library.ggml_backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
            self._weights.append(weight)

    def calls(self, batch: int, threads: int) -> list[Call]:
        """Return one call for each copy."""
        library, (_, width) = self._library, self.shape
        backend = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(backend, threads)
        x = [each.numpy() for each in inputs(batch, width)]
        made: list[Call] = []
        for i, weight in enumerate(self._weights):
            context = _context()
            given = library.ggml_new_tensor_2d(context, 0, width, batch)
            result = library.ggml_mul_mat(context, weight, given)
            graph = library.ggml_new_graph_custom(context, 8, False)
            library.ggml_build_forward_expand(graph, result)
            place = library.ggml_backend_cpu_buffer_type()
            library.ggml_backend_alloc_ctx_tensors_from_buft(context, place)
            library.ggml_backend_tensor_set(given, x[i % 2].ctypes.data, 0, x[i % 2].nbytes)
            made.append(functools.partial(library.ggml_backend_graph_compute, backend, graph))
        return made


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def _context() -> int:
    return ggml().ggml_init(_InitParams(1 << 16, None, True))


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: int) -> None:
    """Keep a line for each repacked weight off the screen."""


@functools.cache
def ggml() -> Any:
    """Load libggml and say what its functions take and return."""
    for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
        library = ctypes.CDLL(str(LLAMA / name), mode=ctypes.RTLD_GLOBAL)
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    long, flag, text = ctypes.c_int64, ctypes.c_bool, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_log_set": (None, [pointer, pointer]),
        "ggml_init": (pointer, [_InitParams]),
        "ggml_new_tensor_2d": (pointer, [pointer, integer, long, long]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_new_graph_custom": (pointer, [pointer, size, flag]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_row_size": (size, [integer, long]),
        "ggml_quantize_chunk": (size, [integer, pointer, pointer, long, long, long, pointer]),
        "ggml_backend_cpu_init": (pointer, []),
        "ggml_backend_cpu_set_n_threads": (None, [pointer, integer]),
        "ggml_backend_cpu_buffer_type": (pointer, []),
        "ggml_backend_cpu_reg": (pointer, []),
        "ggml_backend_reg_dev_get": (pointer, [pointer, size]),
        "ggml_backend_reg_get_proc_address": (pointer, [pointer, text]),
        "ggml_backend_buft_name": (text, [pointer]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer, pointer]),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
        "ggml_backend_graph_compute": (integer, [pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_log_set(ctypes.cast(_silent, pointer), None)
    return library


@functools.cache
def repack_buffers() -> int:
    """Find the buffer type that interleaves rows as weights are stored into it."""
    library = ggml()
    registry = library.ggml_backend_cpu_reg()
    device = library.ggml_backend_reg_dev_get(registry, 0)
    name = b"ggml_backend_dev_get_extra_bufts"
    address = library.ggml_backend_reg_get_proc_address(registry, name)
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    found: list[int] = []
    while listed[len(found)]:
        found.append(listed[len(found)])
    by_name = {library.ggml_backend_buft_name(each).decode(): each for each in found}
    return by_name["CPU_REPACK"]


def quantized_rows(kind: str, out: int, width: int) -> np.ndarray:
    """Quantize 64 random rows and repeat them: valid blocks, as many as asked."""
    library, few = ggml(), 64
    rows = np.random.default_rng(0).normal(0, 0.02, (few, width)).astype(np.float32)
    size = library.ggml_row_size(GGML_TYPES[kind], width)
    packed = np.empty((few, size), dtype=np.uint8)
    arguments = (rows.ctypes.data, packed.ctypes.data, 0, few, width, None)
    library.ggml_quantize_chunk(GGML_TYPES[kind], *arguments)
    return np.tile(packed, (-(-out // few), 1))[:out].copy()


class OnnxRuntime:
    """MatMulNBits of onnxruntime, int8 inside (accuracy level 4: by far its fastest)."""

    def __init__(
        self, name: str, shape: tuple[int, int], bits: int, copies: int, threads: int
    ) -> None:
        use_packages()
        import onnxruntime

        self.name, self.shape = name, shape
        weights = shape[0] * shape[1]
        self.nbytes = weights * bits // 8 + weights // BLOCK * 4 + weights // BLOCK * bits // 8
        model = _matmul_model(shape, bits)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(copies)
        ]

    def calls(self, batch: int, threads: int) -> list[Call]:
        """Return one call for each copy."""
        x = [{"x": each.numpy()} for each in inputs(batch, self.shape[1])]
        return [
            functools.partial(session.run, None, x[i % 2])
            for i, session in enumerate(self._sessions)
        ]


def _matmul_model(shape: tuple[int, int], bits: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    (out, width), source = shape, np.random.default_rng(0)
    groups = width // BLOCK
    codes = source.integers(0, 256, (out, groups, BLOCK * bits // 8), dtype=np.uint8)
    scales = np.full(out * groups, 0.01, dtype=np.float32)
    points = source.integers(0, 256, out * -(-groups * bits // 8), dtype=np.uint8)
    stored = [
        numpy_helper.from_array(codes, "codes"),
        numpy_helper.from_array(scales, "scales"),
        numpy_helper.from_array(points, "points"),
    ]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales", "points"],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=out,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", out])],
        stored,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


class OpenVino:
    """4-bit weights in OpenVINO, activations in int8 by groups of 32 (one token) or 128."""

    def __init__(
        self, name: str, shape: tuple[int, int], copies: int, threads: int, group: int
    ) -> None:
        use_packages()
        import openvino

        self.name, self.shape = name, shape
        weights = shape[0] * shape[1]
        self.nbytes = weights // 2 + weights // BLOCK * 2 + weights // BLOCK // 2
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        }
        core = openvino.Core()
        self._requests = [
            core.compile_model(_openvino_model(shape), "CPU", settings).create_infer_request()
            for _ in range(copies)
        ]

    def calls(self, batch: int, threads: int) -> list[Call]:
        """Return one call for each copy."""
        x = [[each.numpy()] for each in inputs(batch, self.shape[1])]
        return [
            functools.partial(request.infer, x[i % 2], share_inputs=True, share_outputs=True)
            for i, request in enumerate(self._requests)
        ]


def _openvino_model(shape: tuple[int, int]) -> Any:
    import openvino
    from openvino import opset13 as ops

    (out, width), source = shape, np.random.default_rng(0)
    groups = width // BLOCK
    half = openvino.Type.f16

    def four_bits(*sizes: int) -> Any:
        codes = source.integers(0, 256, int(np.prod(sizes)) // 2, dtype=np.uint8)
        stored = openvino.Tensor(codes, openvino.Shape(sizes), openvino.Type.u4)
        return ops.convert(ops.constant(stored, shared_memory=False), half)

    scales = ops.constant(np.full((out, groups, 1), 0.01, dtype=np.float16))
    centred = ops.subtract(four_bits(out, groups, BLOCK), four_bits(out, groups, 1))
    whole = ops.reshape(ops.multiply(centred, scales), np.array([out, width]), False)
    x = ops.parameter([-1, width], openvino.Type.f32)
    product = ops.matmul(x, ops.convert(whole, openvino.Type.f32), False, True)
    return openvino.Model([product], [x], "linear")
