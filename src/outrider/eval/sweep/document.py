"""A YAML file as values that know the path that leads to them: a complaint says where, what came and what is allowed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from outrider.errors import OptionError, PromptError, SweepError

Made = TypeVar("Made")

_VARIABLE = re.compile(r"\$\{(\w+)\}")
QUICK = "quick"  # key of the reduced version


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One value of a document."""

    value: Any
    path: str  # such as "methods[2].keeps"; "" for the whole document
    file: Path

    def fail(self, got: str, allowed: str) -> NoReturn:
        raise SweepError(f"{self.file}: {self.path or 'the document'}: {got}; allowed: {allowed}")

    def refuse(self, allowed: str) -> NoReturn:
        self.fail(f"got {self.value!r}", allowed)

    def entries(self, allowed: Iterable[str]) -> dict[str, Node]:
        """The entries of a mapping, by key. An unknown key is refused."""
        known = list(allowed)
        if not isinstance(self.value, dict):
            self.refuse(f"a mapping of {', '.join(known)}")
        for key in self.value:
            if key not in known:
                self.fail(f"unknown key {key!r}", ", ".join(known))
        return {key: self._inside(value, f"{self.path}.{key}" if self.path else key) for key, value in self.value.items()}

    def items(self, of: str) -> list[Node]:
        """The items of a list, at least one."""
        if not isinstance(self.value, list) or not self.value:
            self.refuse(f"a list of {of}, at least one")
        return [self._inside(value, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def as_type(self, hint: Any) -> Any:
        """The value as a str, int, float, bool, Path or a tuple of these; ${NAME} in a text is taken from the environment.

        A Path is relative to the document. Raises SweepError for another type.
        """
        kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
        if self.value is None and NoneType in get_args(hint):
            return None
        [kind] = kinds
        if get_origin(kind) is tuple:
            [one] = {arg for arg in get_args(kind) if arg is not ...}
            return tuple(item.as_type(one) for item in self.items(_NAMES[one]))
        taken = {int: (int,), float: (int, float), bool: (bool,)}.get(kind, (str,))
        if type(self.value) not in taken:
            self.refuse(_NAMES[kind])
        if str not in taken:
            return kind(self.value)
        text = _VARIABLE.sub(self._variable, self.value)
        if not text:
            self.refuse(_NAMES[kind])
        return self.file.parent / text if kind is Path else text

    def fill(self, source: type[Made]) -> Made:
        """An object of a dataclass from a mapping: field `draft_tokens` is key `draft-tokens`. What it refuses is refused."""
        own = dict(zip(keys_of(source), fields(source), strict=True))  # type: ignore[arg-type]
        hints = get_type_hints(source)
        entries = self.entries(own)
        for key, f in own.items():
            if f.default is MISSING and f.default_factory is MISSING and key not in entries:
                self.fail(f"{key} is missing", _NAMES[hints[f.name]])
        values = {own[key].name: entry.as_type(hints[own[key].name]) for key, entry in entries.items()}
        return self.checked(lambda: source(**values))

    def checked(self, make: Any) -> Any:
        """What `make()` gives; its complaint about an option or a text gets the place in the document."""
        try:
            return make()
        except (OptionError, PromptError) as error:
            where = f"{self.file}: {self.path}: " if self.path else f"{self.file}: "
            raise SweepError(f"{where}{error}") from error

    def without(self, *keys: str) -> Node:
        """The same mapping, less some keys."""
        return self._inside({key: value for key, value in self.value.items() if key not in keys}, self.path)

    def _inside(self, value: Any, path: str) -> Node:
        return Node(value=value, path=path, file=self.file)

    def _variable(self, found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            self.fail(f"got {self.value!r}, but the environment has no variable {found[1]}", f"{found[1]} set to a text")
        return os.environ[found[1]]


def keys_of(source: type, *but: str) -> list[str]:
    """The keys that stand for the fields of a dataclass, less some of these."""
    return [f.name.replace("_", "-") for f in fields(source) if f.name not in but]


_NAMES: dict[Any, str] = {
    str: "a text",
    Path: "the name of a file",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def read_document(file: Path, *, quick: bool) -> Node:
    """The document of a YAML file; with `quick`, what stands under that key is put over the rest as RFC 7396 says.

    That is: mappings are merged, null takes a key away, anything else takes the place of what was there. Raises SweepError
    for a file that cannot be read or is no YAML (with the line), for a key that stands twice, and for `quick` without the key.
    """
    try:
        value = yaml.load(file.read_bytes().decode("utf-8"), Loader=_Loader)
    except OSError as error:
        raise SweepError(f"{file}: cannot be read ({error.strerror}); allowed: a YAML file") from error
    except UnicodeDecodeError as error:
        raise SweepError(f"{file}: not UTF-8 (byte {error.start}); allowed: a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise SweepError(f"{file}{where}: {getattr(error, 'problem', None) or error}; allowed: YAML") from error
    if not isinstance(value, dict):
        Node(value=value, path="", file=file).refuse("a mapping")
    patch = value.pop(QUICK, None)
    if quick:
        if not isinstance(patch, dict):
            Node(value=patch, path=QUICK, file=file).refuse("a mapping of what --quick changes")
        value = merge_patch(value, patch)
    return Node(value=value, path="", file=file)


def merge_patch(value: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7396)."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(value) if isinstance(value, Mapping) else {}
    for key, change in patch.items():
        if change is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), change)
    return merged


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that stands twice is refused, not overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
