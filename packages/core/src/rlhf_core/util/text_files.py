"""Reading a text file that a user names."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["read_text"]


def read_text(path: Path) -> str:
    """The text of a file or pipe, without the mark (BOM) that some editors begin it with.

    Raises:
        OSError: it cannot be read; or is a device, which may have no end (`/dev/zero`); or the path is none.
        UnicodeDecodeError: it is no UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            if stat.S_ISCHR(path.stat().st_mode) and str(path) != os.devnull:
                raise OSError(errno.EINVAL, "is a device, not a file", str(path))
            return file.read()
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
