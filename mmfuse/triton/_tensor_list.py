"""One kernel launch over a list of tensors, by a table of their addresses on the device.

A table holds one row per tensor and, per chunk of a tensor, the row it belongs to. Tensors that
need the same compiled kernel form a group, whose chunks are consecutive. Tables are cached, so that
a training loop whose tensors stay where they are copies nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
ROW_ORDER = tl.constexpr(7)
_ROW_WIDTH = tl.constexpr(8)

# 128-bit loads and stores need this alignment, in bytes.
_ALIGNMENT = tl.constexpr(16)
_CACHED_TABLES = 32
# Page-locked memory for the tables of a capture: this many entries (2 MiB) at least, and room for
# this many of the largest table that was made outside of one.
_CAPTURE_ENTRIES = 1 << 18
_CAPTURE_TABLES = 8

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Group(NamedTuple):
    """Consecutive chunks that one launch handles.

    Attributes:
        dtypes: Of the grads and, where given, of the params, and of the anchors.
        aligned: All addresses are multiples of 16 bytes and no chunk starts inside a noise block.
        transposed: In channels_last, with noise, which goes by the logical index.
        first_chunk: Position of the first chunk among all chunks.
        n_chunks: How many chunks.
    """

    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    transposed: bool
    first_chunk: int
    n_chunks: int


class HostTable(NamedTuple):
    """The table that is copied to the device.

    Attributes:
        entries: int64: the rows, and then the int32 of the chunks; page-locked for a GPU.
        row_entries: How many of them are rows: T * 8.
        groups: The launches.
        n_chunks: Number of chunks of all groups together.
    """

    entries: Tensor
    row_entries: int
    groups: tuple[Group, ...]
    n_chunks: int


class TensorTable(NamedTuple):
    """Device tables of a list of tensors.

    Attributes:
        rows: int64 [T * 8] on the device.
        chunk_rows: int32 on the device: the row of each chunk, of all groups one after another.
        groups: The launches.
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
        "ANCHOR_DTYPE": dtypes[2] if len(dtypes) > 2 else None,
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


# The dtypes of all tensors; addresses of the grads, params and anchors, sizes, offsets, ids, and
# the orders of their rows.
_Contents = tuple[tuple[torch.dtype, ...], tuple[tuple[int, ...], ...]]
_Key = tuple[torch.device, int | None, _Contents]


class CaptureMemory:
    """Page-locked memory for tables that are made while a CUDA graph is captured.

    None can be allocated during a capture, where cudaHostAlloc is an unsafe call: whenever a table
    is looked up outside of one, room is made for the next. A graph copies its tables from here at
    each replay and does not say when it is gone, so that nothing is taken back.
    """

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._last_size = 0
        self._needed = _CAPTURE_ENTRIES
        self._asked = 0  # since the last look-up outside of a capture
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        """How many entries can be taken."""
        return 0 if self._room is None else self._room.numel()

    def prepare(self, entries: int) -> None:
        """Makes room for a capture, outside of one; a table of this size is in use."""
        self._needed = max(self._needed, _CAPTURE_TABLES * entries, 2 * self._asked)
        self._asked = 0
        if self.left >= self._needed:
            return
        with self._lock:
            if self.left < self._needed:
                # Twice as much each time, so that few allocations serve any number of captures.
                self._last_size = 2 * max(self._last_size, self._needed)
                self._room = _page_locked(self._last_size)

    def take(self, entries: int, what: str) -> Tensor:
        """Hands out memory during a capture; the capture that takes it keeps it.

        Raises:
            RuntimeError: there is not enough; `what` says for what.
        """
        with self._lock:
            self._asked += entries
            if self._room is None or self._room.numel() < entries:
                raise RuntimeError(
                    f"capturing this CUDA graph takes {8 * entries} bytes of page-locked memory "
                    f"for {what}; mmfuse has {8 * self.left} left, and none can be allocated "
                    "during a capture: run the same step once more outside of the capture, which "
                    "makes room, and then capture again"
                )
            taken, self._room = self._room[:entries], self._room[entries:]
        return taken


_capture_memory = CaptureMemory()


class TableCache:
    """Tables by what they were made of; use inside `launch_on`, whose stream the copies join."""

    def __init__(self, chunk_size: int) -> None:
        self._chunk_size = chunk_size
        self._tables: OrderedDict[_Key, TensorTable] = OrderedDict()
        # A captured graph reads these, or copies its own from these, whenever it is replayed: they
        # are never dropped.
        self._read_by_graphs: dict[_Key, TensorTable] = {}
        self._copied_by_graphs: dict[_Contents, HostTable] = {}
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
            _row_orders(grads) if noise_ids else (),
        )
        dtypes = tuple([t.dtype for tensors in (grads, params, anchors) for t in tensors])
        # Another stream would have to wait for the copy, so each has tables of its own.
        stream, capturing = _stream(device)
        contents = (dtypes, columns)
        key = (device, stream, contents)
        with self._lock:
            if capturing:
                return self._get_for_graph(key, contents, device)
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
            else:
                table = self._read_by_graphs.get(key)
            if table is None:
                table = self._tables[key] = self._made(contents, device, stream)
                if len(self._tables) > _CACHED_TABLES:
                    self._tables.popitem(last=False)
        if stream is not None:
            _capture_memory.prepare(table.host.numel())
        return table

    def _made(self, contents: _Contents, device: torch.device, stream: int | None) -> TensorTable:
        def allocate(entries: int) -> Tensor:
            if stream is None:
                return torch.empty(entries, dtype=torch.int64, device="cpu")
            return _page_locked(entries)

        return _on_device(_host_table(contents, self._chunk_size, allocate), device)

    def _get_for_graph(self, key: _Key, contents: _Contents, device: torch.device) -> TensorTable:
        table = self._tables.pop(key, None)
        if table is not None:
            self._read_by_graphs[key] = table
        if key in self._read_by_graphs:
            return self._read_by_graphs[key]
        # Graphs with the same contents share their source. The copy on the device is in the memory
        # of each one, which may use it for something else after the kernels have read it.
        source = self._copied_by_graphs.get(contents)
        if source is None:
            what = f"the addresses of {len(contents[1][0])} tensors"
            source = _host_table(
                contents, self._chunk_size, lambda entries: _capture_memory.take(entries, what)
            )
            self._copied_by_graphs[contents] = source
        return _on_device(source, device)


def _row_orders(grads: Sequence[Tensor]) -> tuple[int, ...]:
    """Each gradient's channels · 2³² + spatial size of a row in channels_last; else 0."""
    whole = tuple(map(Tensor.is_contiguous, grads))
    if False not in whole:
        return ()
    orders = []
    for grad, in_order in zip(grads, whole, strict=True):
        if in_order or grad.dim() < 4:
            orders.append(0)
            continue
        orders.append((grad.shape[1] << 32) + grad.numel() // (grad.shape[0] * grad.shape[1]))
    return tuple(orders)


def _stream(device: torch.device) -> tuple[int | None, bool]:
    """A GPU's current stream, and whether it is captured."""
    if device.type != "cuda":
        return None, False
    stream = torch.cuda.current_stream(device).cuda_stream
    return stream, torch.cuda.is_current_stream_capturing()


def _host_table(
    contents: _Contents, chunk_size: int, allocate: Callable[[int], Tensor]
) -> HostTable:
    dtypes, columns = contents
    addresses = [column for column in columns[:3] if column]
    numels, offsets, ids, orders = columns[3:]
    count = len(numels)
    members: dict[tuple[tuple[torch.dtype, ...], bool, bool], list[int]] = {}
    for t in range(count):
        aligned = all(column[t] % _ALIGNMENT.value == 0 for column in addresses)
        aligned = aligned and (not offsets or offsets[t] % 4 == 0)
        transposed = bool(orders and orders[t])
        members.setdefault((dtypes[t::count], aligned, transposed), []).append(t)

    first_chunks = [0] * count
    order: list[int] = []
    n_chunks: list[int] = []
    groups: list[Group] = []
    total = 0
    for (group_dtypes, aligned, transposed), index in members.items():
        start = total
        for t in index:
            # A tensor that starts inside a noise block is laid out from that block's beginning.
            length = numels[t] + (offsets[t] % 4 if offsets else 0)
            first_chunks[t] = total
            order.append(t)
            n_chunks.append(-(-length // chunk_size) if numels[t] else 0)
            total += n_chunks[-1]
        if total > start:
            groups.append(Group(group_dtypes, aligned, transposed, start, total - start))

    zeros = (0,) * count
    padded = [column or zeros for column in (*columns[:4], first_chunks, offsets, ids, orders)]
    rows = torch.tensor(padded, dtype=torch.int64, device="cpu").t().reshape(-1)
    row_entries = rows.numel()
    entries = allocate(row_entries + -(-total // 2))
    entries[:row_entries] = rows
    slots, repeats = torch.tensor([order, n_chunks], dtype=torch.int64, device="cpu")
    entries[row_entries:].view(torch.int32)[:total] = slots.repeat_interleave(repeats)
    return HostTable(entries, row_entries, tuple(groups), total)


def _on_device(source: HostTable, device: torch.device) -> TensorTable:
    table = source.entries.to(device, non_blocking=True)
    rows, chunks = table[: source.row_entries], table[source.row_entries :]
    return TensorTable(
        rows, chunks.view(torch.int32), source.groups, source.n_chunks, source.entries
    )


def _page_locked(entries: int) -> Tensor:
    return torch.empty(entries, dtype=torch.int64, device="cpu", pin_memory=True)
