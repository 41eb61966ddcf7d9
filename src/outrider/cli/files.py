"""Files that users name: texts come in whole and valid, results go out whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

from outrider.errors import OptionError, PromptError

ALLOWED = "a file of UTF-8 text"


def read_text(option: str, path: Path) -> str:
    """The text of a file, line ends as "\\n". `option` names the flag in errors.

    Raises PromptError for a file that is missing, unreadable, binary, not UTF-8 or empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{option} {path}: cannot be read ({error.strerror}); allowed: {ALLOWED}") from error
    nul = content.find(b"\0")
    if nul >= 0:
        raise PromptError(f"{option} {path}: binary (a NUL byte at offset {nul}); allowed: {ALLOWED}")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise PromptError(f"{option} {path}: not UTF-8 ({wrong}); allowed: {ALLOWED}") from error
    if not text:
        raise PromptError(f"{option} {path}: empty; allowed: {ALLOWED}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def writable_file(option: str, path: Path) -> Path:
    """The file `path` names, links followed, once it is certain that it can be written; leaves nothing behind.

    Raises OptionError for a folder, a device, or a file in a folder that is missing or closed to us.
    """
    allowed = "a file in a folder that can be written"
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OptionError(option, str(path), allowed)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OptionError(option, str(path), f"{allowed} ({error.strerror})") from error
    return path


def writable_folder(option: str, path: Path) -> Path:
    """The folder `path` names, links followed, once it is certain that it can be written or made; leaves nothing behind.

    Raises OptionError for a file, or a folder that is closed to us or would be made in one that is missing or closed.
    """
    allowed = "a folder that can be written, or made in one that can"
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise OptionError(option, str(path), allowed)
    try:
        with tempfile.TemporaryFile(dir=path if path.exists() else path.parent):
            pass
    except OSError as error:
        raise OptionError(option, str(path), f"{allowed} ({error.strerror})") from error
    return path


def write_json(option: str, path: Path, document: Any) -> None:
    """Write `document` as `write_file` does."""
    write_file(option, path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def write_file(option: str, path: Path, content: bytes) -> None:
    """Write a file in one step: a reader sees the old one or the new one. Raises OptionError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OptionError(option, str(path), f"a file that can be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
