"""States behind prefixes: what recurrent layers need besides pages to go on from a cached prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class StateIndex:
    """Which row of the arrays of states holds the state behind which prefix. Of a bounded number of rows, the
    longest unused gives way.
    """

    def __init__(self, rows: Sequence[int] = ()) -> None:
        self.rows = rows
        self._free = list(rows)[::-1]
        self._row_of: OrderedDict[bytes, int] = OrderedDict()

    def find(self, digest: bytes) -> int | None:
        """The row of the state behind a prefix, or None."""
        if digest in self._row_of:
            self._row_of.move_to_end(digest)
        return self._row_of.get(digest)

    def take(self, digest: bytes) -> int | None:
        """A row for the state behind a prefix, which `find` gives from now on: the copy that fills it must be
        dispatched before whatever is planned next. None where there is one already, or no row at all.
        """
        if not self.rows or self.find(digest) is not None:
            return None
        row = self._free.pop() if self._free else self._row_of.popitem(last=False)[1]
        self._row_of[digest] = row
        return row

    def forget(self, digests: Iterable[bytes]) -> None:
        """Let the states behind these prefixes be found no more."""
        rows = (self._row_of.pop(digest, None) for digest in digests)
        self._free += [row for row in rows if row is not None]
