"""The compiled kernels as functions of tensors. Shapes are the caller's to check, but for dtypes.

Legend: T tokens, K inputs, O outputs, H heads, D width of a key, E width of a value.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from planetserve.native import memory

logger = logging.getLogger(__name__)

PANEL = 16
"""Outputs of a weight panel, as in kernels.c."""
WIDTH_MULTIPLE = 16
"""Heads of other widths than multiples of this have no attention kernel."""

_VERSION = 3
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_LINEAR = [
    _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _LONG
]  # fmt: skip
_LINEAR_ROWS = [_INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _LONG]
_ATTEND = [_INT, *[_POINTER] * 6, _LONG, *[_POINTER] * 3]
_NORM = [_INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, ctypes.c_float, _POINTER, _LONG]
_ROTATE = [_INT, _POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _POINTER]
_GATE = [_INT, _POINTER, _POINTER, _LONG, _POINTER]
_STORE = [_POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER]
_LAYERS = [_INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER]
_QUANTIZED_LINEAR = [
    _INT, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _LONG
]  # fmt: skip
_DECODE_PANEL = [_INT, _POINTER, _LONG, _POINTER]


class _Struct(ctypes.Structure):
    # Without this a misspelt field would become an attribute, and the real one stay zero.
    __slots__ = ()


class AttentionShape(_Struct):
    """`attention_shape` of kernels.c; strides count elements, 0 is for no window, chunk or cap."""

    __slots__ = ()
    _fields_ = [
        *((name, ctypes.c_long) for name in (
            "query_token", "query_head", "output_token", "output_head", "heads", "kv_heads",
            "key_width", "value_width", "page_size", "window", "chunk",
        )),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]  # fmt: skip


class Product(_Struct):
    """`product` of kernels.c: a packed weight."""

    __slots__ = ()
    _fields_ = [("packed", _POINTER), ("bias", _POINTER), ("width", _LONG), ("outs", _LONG)]


class Norm(_Struct):
    """`norm` of kernels.c: an RMS norm, or none if it has no weight."""

    __slots__ = ()
    _fields_ = [("weight", _POINTER), ("width", _LONG), ("epsilon", ctypes.c_float)]


class Layer(_Struct):
    """`layer` of kernels.c."""

    __slots__ = ()
    _fields_ = [
        *((name, Norm) for name in ("entry", "query_norm", "key_norm", "middle")),
        *((name, Product) for name in (
            "query", "key", "value", "output", "gate", "up", "down",
        )),
        ("attention", AttentionShape),
        *((name, _POINTER) for name in ("sinks", "keys", "values")),
    ]  # fmt: skip


class Pass(_Struct):
    """`pass` of kernels.c: the tokens that go through layers."""

    __slots__ = ()
    _fields_ = [
        ("tokens", _LONG), ("num_chunks", _LONG),
        *((name, _POINTER) for name in ("cos", "sin", "slots", "chunks", "tables", "scratch")),
    ]  # fmt: skip


class Quantized(_Struct):
    """`quantized` of kernels.c: a weight of 4 or 8 bits a number."""

    __slots__ = ()
    _fields_ = [
        *((name, _POINTER) for name in ("codes", "scales", "zeros", "factors", "table")),
        *((name, _LONG) for name in ("width", "outs", "group")),
        *((name, _INT) for name in ("kind", "scale_kind")),
    ]  # fmt: skip


class Kernels:
    """The entry points of a loaded library, for CPU tensors of a dtype in `dtypes`."""

    dtypes = tuple(_SUFFIX)

    def __init__(self, library: ctypes.CDLL):
        self._best: int = library.ps_level()
        self._level = self._best
        self._linear = {}
        self._linear_rows = {}
        self._attend = {}
        self._norm = {}
        self._rotate = {}
        self._gate = {}
        self._layers = {}
        for dtype, suffix in _SUFFIX.items():
            self._linear[dtype] = _declared(library, f"ps_linear_{suffix}", _LINEAR)
            self._attend[dtype] = _declared(library, f"ps_attend_{suffix}", _ATTEND)
            self._norm[dtype] = _declared(library, f"ps_rms_norm_{suffix}", _NORM)
            self._rotate[dtype] = _declared(library, f"ps_rotate_{suffix}", _ROTATE)
            self._gate[dtype] = _declared(library, f"ps_silu_gate_{suffix}", _GATE)
            self._layers[dtype] = _declared(library, f"ps_layers_{suffix}", _LAYERS)
            # A library that was compiled before there were any is used for the rest.
            if hasattr(library, f"ps_linear_rows_{suffix}"):
                self._linear_rows[dtype] = _declared(
                    library, f"ps_linear_rows_{suffix}", _LINEAR_ROWS
                )
        self._store = _declared(library, "ps_store", _STORE)
        self._quantized: dict[str, Callable[..., None]] = {}
        if hasattr(library, "ps_quantized_linear"):  # as above
            for name, arguments in (
                ("quantized_linear", _QUANTIZED_LINEAR), ("decode_panel", _DECODE_PANEL),
            ):  # fmt: skip
                self._quantized[name] = _declared(library, f"ps_{name}", arguments)

    @property
    def level(self) -> int:
        """The best instruction set of this processor; 0 if none of those known runs on it."""
        return self._best

    def use_level(self, level: int | None) -> None:
        """Use another instruction set than the best one, which None goes back to."""
        if level is not None and not 0 < level <= self._best:
            raise ValueError(f"this processor has instruction sets 1 to {self._best}")
        self._level = self._best if level is None else level

    def linear(
        self,
        x_TK: torch.Tensor,
        packed: torch.Tensor,
        num_outputs: int,
        bias_O: torch.Tensor | None = None,
        add_TO: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x W^T + bias + add`, `[T, O]`.

        Args:
            x_TK: rows may have any stride, elements of a row must follow one another.
            packed: what `pack` made of `W`.
            num_outputs: O.
            bias_O: contiguous.
            add_TO: added last, as x is laid out.
        """
        rows, width = x_TK.shape
        y_TO = x_TK.new_empty(rows, num_outputs)
        self._linear[x_TK.dtype](
            self._level, x_TK.data_ptr(), x_TK.stride(0), rows, width,
            packed.data_ptr(), num_outputs,
            None if bias_O is None else bias_O.data_ptr(),
            None if add_TO is None else add_TO.data_ptr(),
            0 if add_TO is None else add_TO.stride(0),
            y_TO.data_ptr(), num_outputs,
        )  # fmt: skip
        return y_TO

    @property
    def reads_plain_weights(self) -> bool:
        """Whether `linear_rows` can be called."""
        return bool(self._linear_rows)

    def linear_rows(
        self, x_TK: torch.Tensor, weight_OK: torch.Tensor, bias_O: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x W^T + bias`, `[T, O]`, for few rows.

        Args:
            x_TK: rows may have any stride, elements of a row must follow one another.
            weight_OK: contiguous.
            bias_O: contiguous.
        """
        rows, width = x_TK.shape
        num_outputs = weight_OK.shape[0]
        y_TO = x_TK.new_empty(rows, num_outputs)
        self._linear_rows[x_TK.dtype](
            self._level, x_TK.data_ptr(), x_TK.stride(0), rows, width,
            weight_OK.data_ptr(), num_outputs,
            None if bias_O is None else bias_O.data_ptr(),
            y_TO.data_ptr(), num_outputs,
        )  # fmt: skip
        return y_TO

    @property
    def reads_quantized_weights(self) -> bool:
        """Whether `quantized_linear` and `decode_panel` can be called."""
        return bool(self._quantized)

    def quantized_linear(
        self,
        x_TK: torch.Tensor,
        weight: Quantized,
        group_sums_TG: torch.Tensor | None,
        bias_O: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x W^T + bias`, `[T, O]`, all of it float32.

        Args:
            x_TK: rows may have any stride, elements of a row must follow one another.
            weight: `W`.
            group_sums_TG: the inputs of each group added up, for a weight with zero points.
            bias_O: contiguous.
        """
        y_TO = x_TK.new_empty(len(x_TK), weight.outs)
        self._quantized["quantized_linear"](
            self._level, ctypes.byref(weight), x_TK.data_ptr(), x_TK.stride(0), len(x_TK),
            None if group_sums_TG is None else group_sums_TG.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            y_TO.data_ptr(), weight.outs,
        )  # fmt: skip
        return y_TO

    def decode_panel(self, weight: Quantized, panel: int) -> torch.Tensor:
        """The inputs of `PANEL` outputs, `[K, PANEL]` in float32."""
        out_KP = torch.empty(weight.width, PANEL)
        self._quantized["decode_panel"](self._level, ctypes.byref(weight), panel, out_KP.data_ptr())
        return out_KP

    def rms_norm(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, epsilon: float, out_TD: torch.Tensor
    ) -> None:
        """`weight * x / sqrt(mean(x ** 2) + epsilon)` per row; in half precision the quotient is
        rounded before it is weighted. `out_TD` may be `x_TD`."""
        rows, width = x_TD.shape
        self._norm[x_TD.dtype](
            self._level, x_TD.data_ptr(), x_TD.stride(0), rows, width, weight_D.data_ptr(),
            epsilon, out_TD.data_ptr(), out_TD.stride(0),
        )  # fmt: skip

    def rotate(self, x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> None:
        """Rotary embedding in place: `x * cos + (-second half, first half) * sin`.

        Args:
            x_THD: heads of a token must follow one another. May be the first D elements of wider
                heads, whose others stay as they are.
            cos_TD: contiguous, in the dtype of x, as wide as what is rotated.
            sin_TD: like `cos_TD`.

        Raises:
            ValueError: a table has another size or layout; the kernel would read past it.
        """
        num_tokens, num_heads, width = x_THD.shape
        dtype, size = x_THD.dtype, (num_tokens, width)
        if (
            width % 2
            or not cos_TD.shape == sin_TD.shape == size
            or not (cos_TD.dtype is sin_TD.dtype is dtype)
            or not (cos_TD.is_contiguous() and sin_TD.is_contiguous())
        ):
            raise ValueError(
                f"rotary tables {tuple(cos_TD.shape)} and {tuple(sin_TD.shape)} "
                f"for {tuple(x_THD.shape)}"
            )
        stride, head_stride, _ = x_THD.stride()
        if head_stride != width:  # parts of heads: each is a token of one head to the kernel
            cos_TD, sin_TD = (x.repeat_interleave(num_heads, 0) for x in (cos_TD, sin_TD))
            num_tokens, num_heads, stride = num_tokens * num_heads, 1, head_stride
        self._rotate[dtype](
            self._level, x_THD.data_ptr(), stride, num_tokens, num_heads, width,
            cos_TD.data_ptr(), sin_TD.data_ptr(),
        )  # fmt: skip

    def silu_gate(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """`gate = silu(gate) * up`, both contiguous."""
        self._gate[gate.dtype](
            self._level, gate.data_ptr(), up.data_ptr(), gate.numel(), gate.data_ptr()
        )

    def store(self, rows_THD: torch.Tensor, slots_T: torch.Tensor, pages: torch.Tensor) -> None:
        """Copy keys or values, contiguous in their last dimension, to int64 slots of pages."""
        num_tokens, num_heads, width = rows_THD.shape
        size = rows_THD.element_size()
        self._store(
            rows_THD.data_ptr(), rows_THD.stride(0) * size, rows_THD.stride(1) * size,
            num_heads, width * size, slots_T.data_ptr(), num_tokens, pages.data_ptr(),
        )  # fmt: skip

    def attend(
        self,
        shape: AttentionShape,
        query: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        tables: torch.Tensor,
        pieces_N4: torch.Tensor,
        sinks_H: torch.Tensor | None,
        scratch: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attention of runs of tokens over pages; see `ps_attend_f32` in kernels.c.

        Args:
            shape: strides and sizes of everything else.
            query: queries of all tokens of the batch.
            pages: contiguous pages of keys and of values.
            tables: int32 page numbers of all pieces.
            pieces_N4: int64 first token, tokens, position of the first, offset in `tables`.
            sinks_H: float32.
            scratch: float32, of `scratch_size` elements.
            output: receives the outputs of the pieces' tokens.
        """
        self._attend[query.dtype](
            self._level, ctypes.byref(shape), query.data_ptr(),
            pages[0].data_ptr(), pages[1].data_ptr(), tables.data_ptr(),
            pieces_N4.data_ptr(), len(pieces_N4),
            None if sinks_H is None else sinks_H.data_ptr(),
            scratch.data_ptr(), output.data_ptr(),
        )  # fmt: skip

    def layers(
        self,
        layers: ctypes.Array[Layer],
        span: slice,
        batch: Pass,
        hidden_TD: torch.Tensor,
        work: torch.Tensor,
    ) -> None:
        """Run tokens through `layers[span]`, in place on contiguous hidden states; see
        `ps_layers_f32` in kernels.c for how large `work` must be."""
        first = ctypes.byref(layers, span.start * ctypes.sizeof(Layer))
        self._layers[hidden_TD.dtype](
            self._level, first, span.stop - span.start, ctypes.byref(batch),
            hidden_TD.data_ptr(), work.data_ptr(),
        )  # fmt: skip


def scratch_size(num_heads: int, key_width: int, value_width: int, max_context: int) -> int:
    """Elements of the scratch buffer that `Kernels.attend` needs."""
    return num_heads * (max_context + key_width + value_width) + 64


def pack(weight_OK: torch.Tensor) -> torch.Tensor:
    """The panels that `Kernels.linear` reads: outputs in groups of `PANEL`, inputs outside."""
    num_outputs, width = weight_OK.shape
    per_step = 4 // weight_OK.element_size()
    padded = F.pad(weight_OK, (0, -width % per_step, 0, -num_outputs % PANEL))
    panels = padded.view(-1, PANEL, padded.shape[1] // per_step, per_step).transpose(1, 2)
    return memory.empty(tuple(panels.shape), panels.dtype).copy_(panels)


def unpack(packed: torch.Tensor, num_outputs: int, width: int) -> torch.Tensor:
    """The weight `[num_outputs, width]` that `packed` was made of, contiguous."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:num_outputs, :width].contiguous()


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, if they were compiled and run on this processor."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            library = ctypes.CDLL(str(path))
            if library.ps_version() != _VERSION:
                logger.warning("%s is of another version; install the package again", path.name)
                continue
            found = Kernels(library)
        except (OSError, AttributeError) as error:
            logger.warning("native kernels cannot be loaded: %s", error)
            continue
        if found.level:
            return found
    return None


def _declared(
    library: ctypes.CDLL, name: str, arguments: Sequence[type[Any]]
) -> Callable[..., None]:
    function: Any = getattr(library, name)
    function.argtypes, function.restype = arguments, None
    declared: Callable[..., None] = function
    return declared
