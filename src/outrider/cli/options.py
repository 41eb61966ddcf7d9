"""Command-line flags made from dataclass fields: a name, a type, a default and a help text stand in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from outrider.config import option

Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which models run, and how: the parameters of `Outrider.load`."""

    target: str = option("builtin", "target model: a folder, a hub id, or builtin")
    draft: str | None = option(None, "draft model: a folder or hub id; target builtin brings its own")
    alignment: Path | None = field(
        default=None, metadata={"help": "file made by outrider calibrate for this pair; the built-in pair has its own"}
    )
    map: str | None = option(None, "map of the alignment to follow in place of the method's own, such as joint+divergence")
    dtype: str = option("float32", "float32, bfloat16 or float16")
    device: str = option("cpu", "cpu, or cuda where there is a GPU")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelOptions:
    """How many GPUs run them: the other parameters of `Outrider.load`."""

    tensor_parallel: int = option(1, "GPUs of this host that share the target, by heads; with device cpu: processes")
    shard_draft: bool = option(False, "with several GPUs: they share the draft, too; default: each has all of it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The flags of one dataclass, as a command takes them."""

    source: type
    panel: str  # heading in the help
    only: tuple[str, ...] | None = None  # fields that become flags; None: all
    skip: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)  # field -> parameter
    short: dict[str, str] = field(default_factory=dict)  # field -> one-letter flag
    repeat: tuple[str, ...] = ()  # fields of one value whose flag may be given several times; tuple fields always may

    def parameters(self) -> list[inspect.Parameter]:
        """Keyword-only parameters that typer turns into flags."""
        hints = get_type_hints(self.source)
        return [self._parameter(f, hints[f.name]) for f in self._fields()]

    def pick(self, values: dict[str, Any]) -> dict[str, Any]:
        """Of what the command was given, the part that belongs to the dataclass, by field; repeated flags as tuples."""
        picked = {f.name: values[self._name(f)] for f in self._fields()}
        hints = get_type_hints(self.source)
        return {name: tuple(value or ()) if self._repeats(name, hints[name]) else value for name, value in picked.items()}

    def _fields(self) -> list[Field[Any]]:
        wanted = [f.name for f in fields(self.source)] if self.only is None else self.only
        return [f for f in fields(self.source) if f.name in wanted and f.name not in self.skip]

    def _name(self, f: Field[Any]) -> str:
        return self.rename.get(f.name, f.name)

    def _repeats(self, name: str, hint: Any) -> bool:
        return name in self.repeat or get_origin(hint) is tuple

    def _parameter(self, f: Field[Any], hint: Any) -> inspect.Parameter:
        name, text, default = self._name(f), f.metadata["help"], f.default
        if self._repeats(f.name, hint):
            text += " (repeatable)"
            if not isinstance(default, tuple) and default is not MISSING:
                default = () if default is None else (default,)
            default = default if default is MISSING else list(default) or None
            one = next(kind for kind in get_args(hint) or (hint,) if kind not in (type(None), ...))
            hint = list[one] if default is MISSING else list[one] | None  # type: ignore[valid-type]
        flags = [f"--{name.replace('_', '-')}", *filter(None, [self.short.get(f.name)])]
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=Annotated[hint, typer.Option(*flags, help=escape(text), rich_help_panel=self.panel)],
        )


def takes(*groups: Flags) -> Callable[[Command], Command]:
    """Give a command, whose last parameter is `**values`, the flags of `groups` behind its own."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        derived = [parameter for group in groups for parameter in group.parameters()]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = signature.replace(parameters=[*keyword, *derived])  # type: ignore[attr-defined]
        return command

    return decorate
