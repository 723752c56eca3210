"""Unpack ids into digits, several digits per table look-up."""

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sidestack.encoder.sid.packing import Ids, Packing, require_fit, split_ids
from sidestack.infra.errors import SpecError

LOOKUP_ROWS = 1 << 13
"""Maximum number of rows of a look-up table: 6,561 rows of 8 ternary digits are 210 kB in float32, which fit in a
core's L2 cache."""
_IDS_AT_A_TIME = 1 << 14
"""Ids unpacked at a time on a CPU, so that intermediate results stay in the cache too."""


def unpack_ids(
    ids_N: Tensor, radix: int, num_digits: int, packing: Packing = "mixed_radix", dtype: torch.dtype = torch.int64
) -> Tensor:
    """Undo `pack_digits`: floor division and modulo (paper section 3.3), by look-up where the radix allows it.

    Args:
        ids_N: int64, any shape [...].
        radix: values a digit can take.
        num_digits: digits an id holds.
        packing: as packed.
        dtype: of the digits; one byte per digit (torch.uint8) is the fastest to write.

    Returns:
        digits_ND: [..., num_digits], in [0, radix).

    Raises:
        SpecError: the digits do not fit int64, or an id is outside the digits' range.
    """
    require_fit(num_digits, radix, packing)
    first = 1 if packing == "paper_eq5" else 0
    if ids_N.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids_N))
        if low < 0 or high >= radix ** (num_digits + first):
            wrong = low if low < 0 else high
            raise SpecError(f"id {wrong} is no SID of {num_digits} digits with {radix} values each")
    if radix > LOOKUP_ROWS:
        numbers_ND = ids_N.new_empty((*ids_N.shape, num_digits))
        split_ids(numbers_ND, ids_N // radix**first, radix, packing)
        return numbers_ND.to(dtype)
    digits_ND: Tensor = _digit_lookup(radix, num_digits, packing, dtype, ids_N.device)(ids_N)
    return digits_ND


class DigitLookup(nn.Module):
    """A table look-up of the values of an id's digits, several digits at a time; it has no weights.

    Division splits an id into numbers of k digits each, and row r of a table holds the values of the k digits of r. k
    is a power of two, so that rows of 8 to 64 bytes are copied in one move. An id's last or first number may have
    unused digits; their columns are left out of the result, which is then a view.

    Example: 5 digits of 3 values, k = 2. Each of the 3 numbers has 9 rows of its own in the table, because the values
    of digit i may differ from those of digit j:

        id                      167 = 2*81 + 0*27 + 0*9 + 1*3 + 2*1, digits 2 0 0 1 2
        numbers, base 9         2          0          5           division by 9; `split_ids`
        their digits            (. 2)      (0 0)      (1 2)       the first number has one unused digit
        rows of the table       2          0 + 9      5 + 18      row 27, the last, is for unknown ids
        values looked up        . 2        0 0        1 2         `index_select`; the first column is left out

    Args of the constructor:
        values_DR: the value of r at digit i, any dtype, [num_digits, radix]; radix at most `LOOKUP_ROWS`.
        packing: how the digits are packed into ids; they must fit one int64.
    """

    table_Tk: Tensor

    def __init__(self, values_DR: Tensor, packing: Packing) -> None:
        super().__init__()
        self.num_digits, self.radix = values_DR.shape
        self.packing = packing
        self.width = max(k for k in (1, 2, 4, 8) if self.radix**k <= LOOKUP_ROWS)
        self.numbers = -(-self.num_digits // self.width)
        self.rows = self.radix**self.width
        self.unknown_row = self.numbers * self.rows
        # Constants, not state: they are recomputed from the spec and stay out of checkpoints.
        self.register_buffer("table_Tk", self._table(values_DR), persistent=False)

    def forward(self, ids_N: Tensor, known_N: Tensor | None = None) -> Tensor:
        """Return the values of the ids' digits.

        Args:
            ids_N: int64, any shape [...]; each known id is in the digits' range.
            known_N: bool [...]; where False the result is zeros, whatever the id. None: all are known.

        Returns:
            [..., num_digits], in the values' dtype.
        """
        shape = (*ids_N.shape, self.numbers * self.width)
        first = 0 if self.packing == "paper_eq5" else shape[-1] - self.num_digits
        look_up = self._look_up_by_blocks if ids_N.device.type == "cpu" else self._look_up
        out = look_up(ids_N.reshape(-1), None if known_N is None else known_N.reshape(-1))
        return out.view(shape)[..., first : first + self.num_digits]

    def _look_up(self, ids_N: Tensor, known_N: Tensor | None) -> Tensor:
        rows_NC = ids_N.new_empty(len(ids_N), self.numbers)
        self._write_rows(rows_NC, ids_N)
        if known_N is not None:
            rows_NC.masked_fill_(~known_N[:, None], self.unknown_row)
        return self.table_Tk.index_select(0, rows_NC.view(-1))

    def _look_up_by_blocks(self, ids_N: Tensor, known_N: Tensor | None) -> Tensor:
        """Do the same as `_look_up` with numpy, whose division and row copies are three times as fast on a CPU."""
        out_NCk = self.table_Tk.new_empty(len(ids_N), self.numbers, self.width)
        table_Tk, out, ids = self.table_Tk.numpy(), out_NCk.numpy(), ids_N.numpy()
        known = None if known_N is None else known_N.numpy()
        reused_BC = np.empty((min(len(ids), _IDS_AT_A_TIME), self.numbers), np.int64)
        for start in range(0, len(ids), _IDS_AT_A_TIME):
            block = slice(start, min(start + _IDS_AT_A_TIME, len(ids)))
            rows_BC = reused_BC[: block.stop - start]
            self._write_rows(rows_BC, ids[block])
            if known is not None:
                rows_BC[np.flatnonzero(~known[block])] = self.unknown_row
            # `clip` needs no buffer between table and result; only numbers of unknown ids can be clipped.
            np.take(table_Tk, rows_BC, axis=0, out=out[block], mode="clip")
        return out_NCk

    def _write_rows(self, rows_NC: Ids, ids_N: Ids) -> None:
        """Write the rows in which an id's numbers are looked up; for arrays and tensors."""
        whole_N = ids_N // self.radix if self.packing == "paper_eq5" else ids_N
        split_ids(rows_NC, whole_N, self.rows, self.packing, apart=True)

    def _table(self, values_DR: Tensor) -> Tensor:
        """Return a block of rows for each of an id's numbers, and a last row of zeros for unknown ids."""
        spare = self.numbers * self.width - self.num_digits
        pad = (0, 0, 0, spare) if self.packing == "paper_eq5" else (0, 0, spare, 0)
        values_CkR = functional.pad(values_DR, pad).view(self.numbers, self.width, self.radix)
        digits_Rk = values_DR.new_empty(self.rows, self.width, dtype=torch.int64)
        split_ids(digits_Rk, torch.arange(self.rows), self.radix, self.packing)
        table_CRk = torch.stack([values_CkR[:, i, digits_Rk[:, i]] for i in range(self.width)], dim=-1)
        return functional.pad(table_CRk.flatten(0, 1), (0, 0, 0, 1))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # the first caller may be in inference, the next in training
def _digit_lookup(
    radix: int, num_digits: int, packing: Packing, dtype: torch.dtype, device: torch.device
) -> DigitLookup:
    return DigitLookup(torch.arange(radix, dtype=dtype).expand(num_digits, -1), packing).to(device)
