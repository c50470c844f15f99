"""How [P, N] data, P problems with N values each, are divided among programs."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

TILE_SIZE = 2048
NUM_WARPS = 8
# A long row is split until so many programs share it; each reads at least one tile.
MAX_PROGRAMS = 2048


class ProblemSplit(NamedTuple):
    """The grid is (row_tiles, splits): each program reads a share of the columns of a few rows.

    Attributes:
        block_rows: Rows of a program.
        block_cols: Columns of a tile.
        cols_per_program: A multiple of `block_cols`.
        row_tiles: Programs along the rows.
        splits: Programs along the columns.
    """

    block_rows: int
    block_cols: int
    cols_per_program: int
    row_tiles: int
    splits: int

    @property
    def grid(self) -> tuple[int, int]:
        """The launches."""
        return self.row_tiles, self.splits

    def constants(self) -> dict[str, int]:
        """The compile-time arguments."""
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_COLS": self.block_cols}


def split_problems(n_rows: int, n_cols: int) -> ProblemSplit:
    """Divides P >= 1 rows of N >= 1 values."""
    cols = min(triton.next_power_of_2(n_cols), TILE_SIZE)
    rows = min(triton.next_power_of_2(n_rows), TILE_SIZE // cols)
    row_tiles = triton.cdiv(n_rows, rows)
    col_tiles = triton.cdiv(n_cols, cols)
    per_program = triton.cdiv(col_tiles, max(MAX_PROGRAMS // row_tiles, 1)) * cols
    return ProblemSplit(rows, cols, per_program, row_tiles, triton.cdiv(n_cols, per_program))


@triton.jit
def share_of_program(
    n_rows, n_cols, cols_per_program, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """Returns this program's rows, which of them exist, where it begins, and how many columns.

    Rows and the beginnings [BLOCK_ROWS], places in the flattened data, are int64.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_col = tl.program_id(1).to(tl.int64) * cols_per_program
    # The interpreter ignores the annotations.
    count = tl.minimum(n_cols.to(tl.int64) - first_col, cols_per_program).to(tl.int32)
    return row, row < n_rows, row * n_cols + first_col, count
