"""Places of the rows of a JSON file, found in one pass that parses every row, hands it on, and keeps nothing else.

    file  ──scan──▶  blocks of values  ──▶  checks         FileIndex: first byte and checksum of each row

Lines are taken a block at a time: Python's work per line would cost more than parsing it. A block with anything unusual in
it is read again line by line, so that every message names its line.

A row is read again when it is drawn. Its checksum, 4 bytes in addition to the 8 of its place, reveals a file that was
changed meanwhile; lines that are added to its end do no harm. A file that is replaced under its name stays readable,
since it is kept open. A pipe can be read once: its bytes are kept.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import stat
import weakref
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from xxhash import xxh32_intdigest

from rlhf_core.data.json_list import BATCH, BLOCK, SCAN, Elements, ListText, has_surrogates, is_text
from rlhf_core.errors import DataError

__all__ = ["FileIndex"]

BOM = codecs.BOM_UTF8
_DECODER = json.JSONDecoder()


class FileIndex:
    """Rows of a .json or .jsonl file by number.

    Args:
        path: the file: one value a line, or one list of values.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._starts, self._sums, self._numbers = array("q"), array("I"), array("q")
        self._end = 0
        self._bytes: bytes | None = None
        try:
            self._file = _open(Path(path))
            weakref.finalize(self, os.close, self._file)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                with open(self._file, "rb", closefd=False) as pipe:
                    self._bytes = pipe.read()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None

    def __len__(self) -> int:
        return len(self._starts)

    def origin(self, row: int) -> str:
        """Return `file:row`, counted from 1; of a file of lines, its line."""
        return f"{self.path}:{self._numbers[row] if self._numbers else row + 1}"

    def value(self, row: int) -> Any:
        """Return a row, parsed again.

        Raises:
            DataError: it is no longer what it was.
        """
        start = self._starts[row]
        stop = self._starts[row + 1] if row + 1 < len(self) else self._end
        content = self._bytes[start:stop] if self._bytes is not None else os.pread(self._file, stop - start, start)
        try:
            text = content.decode()
            value, end = _DECODER.raw_decode(text)
            if xxh32_intdigest(text[:end].encode()) == self._sums[row]:
                return value
        except ValueError:
            pass
        raise DataError(f"{self.origin(row)}: the row changed after the file was opened; start the run again")

    def scan(self, limit: int = 0) -> Iterator[Any]:
        """Yield the first `limit` rows, all for 0, and index them on the way; call it once.

        Raises:
            DataError: `file:row: ` what is wrong with a row.
        """
        return chain.from_iterable(self.blocks(limit))

    def blocks(self, limit: int = 0) -> Iterator[list[Any]]:
        """Yield the same rows, one or some at a time.

        Raises:
            DataError: `file:row: ` what is wrong with a row; it comes after the rows before it.
        """
        with self._reader() as file:
            begin = len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(begin)
            blocks = iter(partial(file.read, BATCH), b"")  # no line: a list may be one
            pieces = codecs.iterdecode(blocks, "utf-8", "replace")
            first = next((head for piece in pieces if (head := piece.lstrip())), "")
        if not first:
            return
        with self._reader() as file:
            file.seek(begin)
            if not first.startswith("["):
                yield from self._lines(file, begin, limit)
                return
            for found in self._elements(file, begin, limit):
                self._add_elements(found)
                yield found.values

    def _lines(self, file: BinaryIO, at: int, limit: int) -> Iterator[list[Any]]:
        """Yield the values of lines, and index them."""
        number = 0
        while block := file.read(BATCH) + file.readline():
            values = _plain_values(block)
            if values and not 0 < limit < len(self) + len(values):
                self._add_block(number + 1, at, block)
                number += len(values)
                yield values
            else:
                for line, start, text, value in self._values(io.BytesIO(block), at, number):
                    number = line
                    if text:
                        yield [self._add(line, start, text, value)]
                        if len(self) == limit:
                            return
            at += len(block)

    def _add_block(self, number: int, at: int, block: bytes) -> None:
        """Index lines that are a row each, from the line `number` and the byte `at` on."""
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at
        if self._numbers or number != len(self) + 1:  # there are blank lines
            self._numbers = self._numbers or array("q", range(1, len(self) + 1))
            self._numbers.extend(range(number, number + len(ends)))
        self._starts.append(at)
        self._starts.frombytes((ends[:-1] + 1).astype(np.int64).tobytes())
        self._sums.extend(map(xxh32_intdigest, block.split(b"\n")[:-1]))
        self._end = int(ends[-1])

    def _add(self, number: int, start: int, text: bytes, value: Any) -> Any:
        """Index a row; return its value."""
        if self._numbers or number != len(self) + 1:
            self._numbers = self._numbers or array("q", range(1, len(self) + 1))
            self._numbers.append(number)
        self._starts.append(start)
        self._sums.append(xxh32_intdigest(text))
        self._end = start + len(text)
        return value

    def _reader(self) -> BinaryIO:
        if self._bytes is not None:
            return io.BytesIO(self._bytes)
        os.lseek(self._file, 0, os.SEEK_SET)
        return open(self._file, "rb", buffering=BLOCK, closefd=False)

    def _values(self, file: BinaryIO, at: int, number: int) -> Iterator[tuple[int, int, bytes, Any]]:
        """(number, first byte, bytes, value) of each line, the first one after `number`; a blank line has no bytes."""
        decode = _DECODER.raw_decode
        for line in file:
            text = ""
            if line.startswith(b"{") and b"\r" not in line and b"\\u" not in line:  # most lines
                try:
                    text = line.decode()
                    value, end = decode(text)
                except (ValueError, RecursionError):
                    text = ""
            if text and text[end:] == "\n":
                number += 1
                yield number, at, line[:-1], value
            else:
                before = number
                for number, start, bare in _split_line(line, before, at, self.path):
                    yield number, start, bare.encode(), parse(bare, self.path, number) if bare else None
            at += len(line)

    def _elements(self, file: BinaryIO, begin: int, limit: int) -> Iterator[Elements]:
        """Yield the elements of a list.

        Raises:
            DataError: it is no list, or Python refuses an element.
        """
        text = ListText(file, begin)
        try:
            yield from text.elements(limit)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise self._refusal(begin) from None
        except (ValueError, RecursionError):
            raise self._refusal(text.byte) from None

    def _refusal(self, byte: int) -> DataError:
        """Return the error of a list in Python's words, which a second reading from `byte` on finds."""
        try:
            with self._reader() as file:
                file.seek(byte)
                parse(_decode(file.read(), byte, self.path), self.path, self._line(byte))
        except DataError as error:
            return error
        return DataError(f"{self.path}: expected a list of objects")

    def _add_elements(self, found: Elements) -> None:
        """Index elements of a list.

        Raises:
            DataError: half a character is in one of them.
        """
        rows = (
            [row for row, content in enumerate(found.contents) if has_surrogates(content)] if found.surrogates else []
        )
        if rows and not is_text([found.values[row] for row in rows]):
            for row in rows:
                parse(found.contents[row].decode(), self.path, self._line(int(found.starts_N[row])))
        self._starts.frombytes(found.starts_N.tobytes())
        self._sums.extend(map(xxh32_intdigest, found.contents))
        self._end = int(found.starts_N[-1]) + len(found.contents[-1])

    def _line(self, byte: int) -> int:
        """Return the line of a byte, from 1."""
        with self._reader() as file:
            return 1 + sum(file.read(min(BLOCK, byte - at)).count(b"\n") for at in range(0, byte, BLOCK))


def _open(path: Path) -> int:
    """A descriptor of a file or pipe.

    Raises:
        OSError: it cannot be read; or is a folder, or a device, which may have no end (`/dev/zero`); or the path is none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)  # not inherited by other programs
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode) or (stat.S_ISCHR(mode) and str(path) != os.devnull):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "is a device, not a file", str(path))
    return descriptor


def _plain_values(block: bytes) -> list[Any]:
    """Return the value of each line; nothing if a line is anything but one JSON value and a newline.

    A carriage return may end a line of its own.
    """
    if not block.endswith(b"\n") or b"\r" in block:
        return []
    values: list[Any] = []
    at = 0
    try:
        text = block.decode()
        while at < len(text):
            value, at = SCAN(text, at)
            values.append(value)
            if text[at] != "\n":
                return []
            at += 1
    except (ValueError, RecursionError, StopIteration):  # a blank line, no JSON, or no UTF-8
        return []
    if len(values) != block.count(b"\n"):  # an object may span lines
        return []
    return values if not has_surrogates(block) or is_text(values) else []


def _split_line(line: bytes, before: int, begin: int, path: str) -> Iterator[tuple[int, int, str]]:
    """(number, first byte that is not blank, text without blanks around it) of a line; lines of old Macs are several."""
    parts = [line]
    if b"\r" in line.rstrip(b"\r\n"):
        parts = re.findall(rb"[^\r]*\r\n?|[^\r]+", line)
    for number, part in enumerate(parts, start=before + 1):
        bare = _decode(part, begin, path).lstrip()
        yield number, begin + len(part) - len(bare.encode()), bare.rstrip()
        begin += len(part)


def _decode(content: bytes, begin: int, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error.reason} at byte {begin + error.start})") from None


def parse(text: str, path: str, first_line: int) -> Any:
    """Return the value of a JSON text that begins on a line of a file.

    Raises:
        DataError: `file:line: ` what is wrong.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:  # an escape may be half of a pair, which no tokenizer can read
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}: expected one JSON object per line, or a list of objects "
            f"({error.msg} at column {error.colno})"
        ) from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{path}:{first_line}: {_column(value, half)}{half!r} is half of a surrogate pair; write both halves"
        ) from None
    except RecursionError:
        raise DataError(f"{path}:{first_line}: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}:{first_line}: {error}") from None
    return value


def _column(row: Any, text: str) -> str:
    """`'key': ` of the column that `text` is in, if `row` is one row."""
    columns = row.items() if isinstance(row, dict) else ()
    found = next((key for key, value in columns if text in json.dumps(value, ensure_ascii=False)), None)
    return "" if found is None else f"{found!r}: "
