"""One kernel launch over a list of tensors, by a table of their addresses on the device.

A table holds one row per tensor and, per chunk of a tensor, the row it belongs to. Tensors that
need the same compiled kernel form a group, whose chunks are consecutive. Tables are cached, so that
a training loop whose tensors stay where they are copies nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import INTERPRETED

# Columns of a row; its position in the table is the tensor's position in the list.
GRAD = tl.constexpr(0)
PARAM = tl.constexpr(1)
ANCHOR = tl.constexpr(2)
NUMEL = tl.constexpr(3)
FIRST_CHUNK = tl.constexpr(4)
NOISE_OFFSET = tl.constexpr(5)
NOISE_ID = tl.constexpr(6)
_ROW_WIDTH = tl.constexpr(8)

# What 128-bit loads and stores need, in bytes.
_ALIGNMENT = tl.constexpr(16)
_CACHED_TABLES = 32
# Page-locked entries kept for tables that are made while a CUDA graph is captured: 4 MiB.
_CAPTURE_ENTRIES = 1 << 19

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Group(NamedTuple):
    """Consecutive chunks that one launch handles.

    Attributes:
        dtypes: Of the grads and, when given, of the params and the anchors.
        aligned: All addresses are multiples of 16 bytes and no chunk starts inside a noise block.
        first_chunk: Position of the first chunk among all chunks.
        n_chunks: How many chunks.
    """

    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    first_chunk: int
    n_chunks: int


class TensorTable(NamedTuple):
    """Device tables of a list of tensors.

    Attributes:
        rows: int64 [T * 8] on the device.
        chunk_rows: int32 on the device: the row of each chunk, of all groups one after another.
        groups: What to launch.
        n_chunks: Number of chunks of all groups together.
        host: The page-locked source of the copy, which must outlive it.
    """

    rows: Tensor
    chunk_rows: Tensor
    groups: tuple[Group, ...]
    n_chunks: int
    host: Tensor


@triton.jit
def row_of(rows_ptr, slot):
    """Returns a pointer to the row of the tensor at position `slot`."""
    return rows_ptr + slot * _ROW_WIDTH


@triton.jit
def find_chunk(rows_ptr, chunk_rows_ptr, first_chunk):
    """Returns this program's chunk among all chunks, its tensor's position, and its row."""
    chunk = tl.program_id(0).to(tl.int64) + first_chunk
    slot = tl.load(chunk_rows_ptr + chunk).to(tl.int64)
    return chunk, slot, row_of(rows_ptr, slot)


@triton.jit
def load_pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the address in a column of a row as a pointer to DTYPE."""
    pointer = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, _ALIGNMENT)
    return pointer


def group_constants(dtypes: list[tl.dtype], aligned: bool) -> dict[str, Any]:
    """The compile-time arguments that follow from a group's dtypes and alignment."""
    return {
        "GRAD_DTYPE": dtypes[0],
        "PARAM_DTYPE": dtypes[1] if len(dtypes) > 1 else None,
        "ANCHOR_DTYPE": dtypes[2] if len(dtypes) > 1 else None,
        "ACC": tl.float64 if dtypes[0] == tl.float64 else tl.float32,
        "ALIGNED": aligned,
    }


def launch_on(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which kernels for tensors on `device` are launched."""
    if device.type == "cpu":
        import numpy as np

        # The interpreter computes with NumPy, which warns of what IEEE arithmetic defines.
        return np.errstate(all="ignore")
    if INTERPRETED:
        raise RuntimeError("Triton's interpreter (TRITON_INTERPRET=1) takes CPU tensors only")
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TableCache:
    """Tables by what they were made of; use inside `launch_on`, whose stream the copies join."""

    def __init__(self, chunk_size: int) -> None:
        self._chunk_size = chunk_size
        self._tables: OrderedDict[Any, TensorTable] = OrderedDict()
        # A captured graph reads its tables whenever it is replayed: these are never dropped.
        self._captured: list[TensorTable] = []
        self._lock = threading.Lock()

    def get(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor] = (),
        anchors: Sequence[Tensor] = (),
        noise_ids: Sequence[int] = (),
        noise_offsets: Sequence[int] = (),
    ) -> TensorTable:
        """Returns the tables of T >= 1 tensors."""
        device = grads[0].device
        columns = (
            *(tuple(map(Tensor.data_ptr, tensors)) for tensors in (grads, params, anchors)),
            tuple(map(Tensor.numel, grads)),
            tuple(noise_offsets),
            tuple(noise_ids),
        )
        dtypes = tuple([t.dtype for tensors in (grads, params, anchors) for t in tensors])
        stream, capturing = None, False
        if device.type == "cuda":
            # Another stream would have to wait for the copy, so each has tables of its own.
            stream = torch.cuda.current_stream(device).cuda_stream
            capturing = torch.cuda.is_current_stream_capturing()
        key = (device, stream, dtypes, columns)
        with self._lock:
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
                if capturing:
                    self._captured.append(table)
                return table
            table = _make_table(columns, dtypes, device, self._chunk_size, capturing)
            # A table made during a capture belongs to the graph, which refills it at each replay.
            if not capturing:
                self._tables[key] = table
                if len(self._tables) > _CACHED_TABLES:
                    self._tables.popitem(last=False)
        return table


def _make_table(
    columns: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    chunk_size: int,
    capturing: bool,
) -> TensorTable:
    addresses = [column for column in columns[:3] if column]
    numels, offsets, ids = columns[3:]
    count = len(numels)
    members: dict[tuple[tuple[torch.dtype, ...], bool], list[int]] = {}
    for t in range(count):
        aligned = all(column[t] % _ALIGNMENT.value == 0 for column in addresses)
        aligned = aligned and (not offsets or offsets[t] % 4 == 0)
        members.setdefault((dtypes[t::count], aligned), []).append(t)

    first_chunks = [0] * count
    order: list[int] = []
    n_chunks: list[int] = []
    groups: list[Group] = []
    total = 0
    for (group_dtypes, aligned), index in members.items():
        start = total
        for t in index:
            # A tensor that starts inside a noise block is laid out from that block's beginning.
            length = numels[t] + (offsets[t] % 4 if offsets else 0)
            first_chunks[t] = total
            order.append(t)
            n_chunks.append(-(-length // chunk_size) if numels[t] else 0)
            total += n_chunks[-1]
        if total > start:
            groups.append(Group(group_dtypes, aligned, start, total - start))

    zeros = (0,) * count
    padded = [column or zeros for column in (*columns[:4], first_chunks, offsets, ids, zeros)]
    rows = torch.tensor(padded, dtype=torch.int64, device="cpu").t().reshape(-1)
    row_entries = rows.numel()
    host = _host_buffer(row_entries + -(-total // 2), device, capturing)
    host[:row_entries] = rows
    slots, repeats = torch.tensor([order, n_chunks], dtype=torch.int64, device="cpu")
    host[row_entries:].view(torch.int32)[:total] = slots.repeat_interleave(repeats)
    table = host.to(device, non_blocking=True)
    return TensorTable(
        table[:row_entries], table[row_entries:].view(torch.int32), tuple(groups), total, host
    )


_capture_buffer: Tensor | None = None


def _host_buffer(entries: int, device: torch.device, capturing: bool) -> Tensor:
    """int64 memory to copy a table from; page-locked for a GPU, so that the copy does not wait."""
    global _capture_buffer
    if device.type != "cuda":
        return torch.empty(entries, dtype=torch.int64, device="cpu")
    if not capturing:
        if _capture_buffer is None:
            _capture_buffer = _page_locked(_CAPTURE_ENTRIES)
        return _page_locked(entries)
    # A graph repeats the copy whenever it is replayed, so its source is handed out only once.
    if _capture_buffer is None or _capture_buffer.numel() < entries:
        raise RuntimeError(
            "mmfuse has no page-locked memory left for this CUDA graph, and cannot allocate any "
            "during the capture; run the step once before the first capture"
        )
    buffer, _capture_buffer = _capture_buffer[:entries], _capture_buffer[entries:]
    return buffer


def _page_locked(entries: int) -> Tensor:
    return torch.empty(entries, dtype=torch.int64, device="cpu", pin_memory=True)
