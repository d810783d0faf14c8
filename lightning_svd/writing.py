"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path, also: type[Exception] = OSError) -> Iterator[str]:
    """Have a file written beside its place, and moved there when it is whole.

    Whatever happens inside, an exception, a full disk or the end of the process, at ``path`` there is what was there
    before, or the new file.

    Args:
        path: Of the file. What a link points to is replaced, and not the link; what is no file, such as a pipe, is
            written in place.
        also: What else the writer raises for a disk that does not take the file.

    Yields:
        Where to write it.

    Raises:
        OSError: If it cannot be written, in one line that names it.
    """
    path = Path(path)
    try:
        target = path.resolve()
        if path.exists() and not path.is_file() and not path.is_dir():
            yield str(path)
            return
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        handle, beside = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)
        os.close(handle)
        try:
            yield beside
            _as_that_file(beside, target)
            os.replace(beside, target)  # noqa: PTH105 - of the same folder, atomic
        except BaseException:
            with contextlib.suppress(OSError):
                Path(beside).unlink()
            raise
    except (OSError, also) as error:
        kept = "; the file that was there is as it was" if path.is_file() else ""
        raise OSError(f"{path} cannot be written ({_in_a_line(error)}){kept}") from None


def write_whole(path: str | Path, text: str) -> None:
    """Write a text as :func:`whole_file` does.

    Raises:
        OSError: If it cannot be written, in one line that names it.
    """
    with whole_file(path) as beside:
        Path(beside).write_text(text, encoding="utf-8")


def _as_that_file(beside: str, target: Path) -> None:
    """Have what was written on the disk, with the permissions of the file in whose place it comes, or of a new one."""
    with open(beside, "rb") as file:  # noqa: PTH123 - for its descriptor
        os.fsync(file.fileno())
    if target.exists():
        shutil.copymode(target, beside)
        return
    mask = os.umask(0)
    os.umask(mask)
    Path(beside).chmod(0o666 & ~mask)


def _in_a_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
