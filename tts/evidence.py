"""What the target said about the committed positions, bounded in size and kept on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """The target's rows for consecutive committed positions."""

    first: int  # absolute position of the token that the first row predicted
    hidden: torch.Tensor  # [R, hidden] the target's state after its final norm
    features: torch.Tensor | None = None  # [R, layers x hidden] for a draft that reads them

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.first + len(self)

    def __getitem__(self, rows: slice) -> "Rows":
        start, stop, _ = rows.indices(len(self))
        return Rows(self.first + start, *_each(lambda x: x[start:stop], self))

    def copy(self) -> "Rows":
        """With memory of its own."""
        return Rows(self.first, *_each(torch.clone, self))

    @staticmethod
    def join(parts: "list[Rows]") -> "Rows":
        """One piece out of consecutive ones."""
        if len(parts) == 1:
            return parts[0]
        whole = [
            None if part is None else torch.cat([getattr(p, name) for p in parts])
            for name, part in zip(TENSORS, _each(lambda x: x, parts[0]), strict=True)
        ]
        return Rows(parts[0].first, *whole)  # type: ignore[arg-type]


TENSORS = ("hidden", "features")


def _each(do: Callable[[torch.Tensor], torch.Tensor], rows: Rows) -> Any:
    values = (getattr(rows, name) for name in TENSORS)
    return [None if value is None else do(value) for value in values]


class Evidence:
    """The newest ``capacity`` on-path rows of one sequence, and what else their rounds brought.

    A row costs its hidden state, 576 numbers for the default model instead of 49,152 logits; the
    frozen head recomputes the teacher when it is needed. Prompts between answers leave gaps.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._parts: list[Rows] = []  # ascending, each without a gap inside
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, rows: Rows) -> None:
        """Append rows of positions after all others."""
        self._parts.append(rows.copy())
        self._size += len(rows)
        while self._size - len(self._parts[0]) >= self._capacity:
            self._size -= len(self._parts.pop(0))

    def since(self, position: int) -> int:
        """How many rows are of ``position`` or later."""
        count = 0
        for part in reversed(self._parts):
            if part.end <= position:
                break
            count += min(len(part), part.end - position)
        return count

    def window(self, count: int, end: int) -> Rows | None:
        """Up to ``count`` consecutive rows, the newest before position ``end``."""
        chosen: list[Rows] = []
        for part in reversed(self._parts):
            if part.first >= end:
                continue
            if chosen and part.end != chosen[-1].first:
                break  # a prompt lies in between
            chosen.append(part)
            if min(end, chosen[0].end) - part.first >= count:
                break
        if not chosen:
            return None
        whole = Rows.join(chosen[::-1])
        last = min(end, whole.end) - whole.first
        return whole[max(0, last - count) : last]

    def windows(self, count: int, end: int) -> list[Rows]:
        """The newest ``count`` rows before position ``end``, cut at gaps, the newest part first."""
        found: list[Rows] = []
        while count > 0 and (rows := self.window(count, end)) is not None:
            found.append(rows)
            count, end = count - len(rows), rows.first
        return found

    def draw(self, count: int, end: int, random: torch.Generator) -> Rows | None:
        """A window that ends at a random position before ``end``."""
        parts = [part for part in self._parts if part.end <= end]
        if not parts:
            return None
        picked = parts[int(torch.randint(len(parts), (), generator=random))]
        return self.window(count, picked.end)
