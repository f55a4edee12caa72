"""Elements of a file that is one JSON list, some at a time: their values, bytes and places, without holding the list.

Python's scanner reads an element in one call. All other work is done for a batch of elements at once: Python's work per
element would cost more than parsing it. What stands between two elements is usually the same all through a file, so it is
compared with what stood there last.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

__all__ = ["BATCH", "BLOCK", "SCAN", "Elements", "ListText", "has_surrogates", "is_text"]

BLOCK = 2**20
"""Bytes read at a time."""
BATCH = 2**16
"""Bytes or characters that are parsed at a time; their values stay in the processor's cache until they are checked."""
SCAN: Any = vars(json.JSONDecoder())["scan_once"]
"""Returns (value, end) of the text that begins at a place; unlike `raw_decode` it calls no Python per row."""
BLANKS = re.compile(r"[ \t\n\r]*")
SEPARATOR = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
NO_GAP = "\0"
"""Text that follows no element."""


class Elements(NamedTuple):
    """Some elements of a list, one after the other."""

    starts_N: np.ndarray
    """first byte of each in the file, int64"""
    contents: list[bytes]
    """bytes of each"""
    values: list[Any]
    surrogates: bool
    """true if a letter among them may be an escaped half of a pair"""


def has_surrogates(content: bytes) -> bool:
    """Return True if JSON has an escape of half a character; the other half may or may not follow."""
    return b"\\" in content and SURROGATE.search(content) is not None  # most texts have no escape at all


def is_text(value: Any) -> bool:
    """Return False if half a character is in a value of JSON, which no tokenizer can read, or if it is nested too deeply."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


class ListText:
    """The decoded text of a file that is one list; a part of it is in memory.

    Args:
        file: at the byte where the text begins.
        byte: that byte.
    """

    def __init__(self, file: BinaryIO, byte: int) -> None:
        self.byte = byte
        """place in the file of the next element, or of what should be one"""
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._closed = False

    def elements(self, limit: int = 0) -> Iterator[Elements]:
        """Yield the first `limit` elements, all for 0; call it once.

        Raises:
            json.JSONDecodeError: the text is no list.
            UnicodeDecodeError: it is no UTF-8.
            ValueError: Python refuses the element at `byte`, for example a number of thousands of digits.
            RecursionError: the element at `byte` is nested too deeply.
        """
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            self._closed = True
        count = 0
        while not self._closed:
            if len(self._text) - self._at < 2 * BATCH:  # an element that is cut costs a search for its line
                self._fill()
            self._peek()
            found = self._parse(limit - count if limit else sys.maxsize)
            if found is not None:
                count += len(found.values)
                yield found
                if count == limit:
                    return
            elif not self._fill():
                raise self._no_list()
        if self._peek():
            raise self._no_list()

    def _parse(self, most: int) -> Elements | None:
        """Return a batch of up to `most` elements; None if the next one is not in memory as a whole, or is none.

        An element counts once what follows it is in memory: a number may continue.
        """
        text, at, batch = self._text, self._at, self._at + BATCH
        values, begins, ends = list[Any](), list[int](), list[int]()
        gap, width = NO_GAP, 0
        try:
            for _ in range(most):
                value, end = SCAN(text, at)
                if text.startswith(gap, end):
                    after = end + width
                elif (found := SEPARATOR.match(text, end)) is None:
                    break
                else:
                    after, self._closed = found.end(), found[1] == "]"
                    gap, width = text[end : after + 1], after - end  # with the first letter of the next element
                values.append(value)
                begins.append(at)
                ends.append(end)
                at = after
                if at > batch or self._closed:
                    break
        except (json.JSONDecodeError, StopIteration):
            pass
        except (ValueError, RecursionError):
            if not values:
                raise
        return self._place(values, begins, ends, at) if values else None

    def _place(self, values: list[Any], begins: list[int], ends: list[int], at: int) -> Elements:
        """Return the elements between places of the text, and move to the place `at` behind them."""
        first = begins[0]
        text = self._text[first : ends[-1]]
        content = text.encode()
        starts_N = np.array(begins, np.int64) + (self.byte - first)
        self.byte += at - first
        if len(content) == len(text):
            contents = [content[begin - first : end - first] for begin, end in zip(begins, ends)]
        else:
            contents = [text[begin - first : end - first].encode() for begin, end in zip(begins, ends)]
            more_N = np.fromiter(map(len, contents), np.int64, len(contents)) - (np.array(ends) - np.array(begins))
            starts_N[1:] += np.cumsum(more_N)[:-1]  # bytes in addition to the letters
            self.byte += int(more_N.sum())
        self._at = at
        return Elements(starts_N, contents, values, has_surrogates(content))

    def _expect(self, letter: str) -> None:
        """Move behind blanks and a letter.

        Raises:
            json.JSONDecodeError: another letter is there, or none.
        """
        if self._peek() != letter:
            raise self._no_list()
        self._at += 1
        self.byte += 1

    def _peek(self) -> str:
        """Move behind blanks; return the next letter, none at the end of the file."""
        while True:
            end = BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches no blank too
            self.byte += end - self._at
            self._at = end
            if end < len(self._text) or not self._fill():
                return self._text[end : end + 1]

    def _fill(self) -> bool:
        """Read on, as much again as is there; return False at the end."""
        block = self._file.read(max(BLOCK, len(self._text) - self._at))
        self._text = self._text[self._at :] + self._decoder.decode(block, final=not block)
        self._at = 0
        return bool(block)

    def _no_list(self) -> json.JSONDecodeError:
        """An error whose place does not count: a reading of the whole text finds it."""
        return json.JSONDecodeError("expected a list", "", 0)
