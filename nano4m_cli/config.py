"""Configs: frozen typed models read from YAML plus dotted overrides, with errors that name the place.

A YAML file gives a mapping; `key.sub=value` overrides change it; a `Config` subclass checks it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from nano4m_cli.errors import ConfigError, did_you_mean

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen typed config: unknown keys are errors, numbers written as text ("3e-4") are coerced by type."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one mapping."""


def _no_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool, type(None))):
            raise ConfigError(f"{node.start_mark.name}:{key_node.start_mark.line + 1}: a key must be a word, not {key!r}")
        line = key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(
                f"{node.start_mark.name}:{line}: key '{key}' stands twice (first on line {seen[key]})",
                "remove one of the two",
            )
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def parse_yaml(text: str, name: str = "<text>") -> Any:
    """Parse YAML; duplicate keys and syntax errors are `ConfigError`s that name file and line."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError) as err:
        raise ConfigError(f"{name} is not valid YAML: {err}") from err
    finally:
        loader.dispose()


def load_yaml(path: str | os.PathLike) -> dict:
    """Return the mapping in a YAML file; a missing file's error lists the configs beside it."""
    path = Path(path)
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"no config file '{path}'", did_you_mean(str(path), beside) if beside else None)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} is not UTF-8 text: {err}") from err
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping at its top, not {type(data).__name__}")
    return data


def apply_overrides(data: dict, overrides: Sequence[str]) -> dict:
    """Return a copy of `data` with each "key.sub=value" (value in YAML) set; sections are made where missing.

    An entry of a list is named by its number from 0: "masking.components.0.weight=0.5".
    """
    out = _copy(data)
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"override '{item}' is not of the form key.sub=value")
        *sections, last = key.split(".")
        node = out
        for depth, part in enumerate(sections):
            at = _entry(node, part, item)
            child = node[at] if isinstance(node, list) else node.get(at)
            if child is None:
                child = node[at] = {}
            elif not isinstance(child, dict | list):
                raise ConfigError(f"override '{item}': '{'.'.join(sections[: depth + 1])}' is a value, not a section")
            node = child
        node[_entry(node, last, item)] = parse_yaml(text, f"override '{item}'") if text else None
    return out


def _entry(node: dict | list, part: str, item: str) -> str | int:
    """Return what `part` of a dotted key names in a section or list."""
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"override '{item}': '{part}' is not an entry of this list", f"0 to {len(node) - 1}")
    return int(part)


def build(cls: type[C], data: Any, where: str = "config") -> C:
    """Validate a mapping as `cls`; every problem is one line of the `ConfigError`, unknown keys with the nearest name."""
    try:
        return cls.model_validate(data)
    except ValidationError as err:
        lines, hints = [], []
        for problem in err.errors(include_url=False):
            place = ".".join(str(p) for p in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"{where}: unknown key '{place}'")
                hints.append(did_you_mean(str(problem["loc"][-1]), _fields_at(cls, problem["loc"][:-1])))
            else:
                message = problem["msg"].removeprefix("Value error, ")
                shown = "" if problem["type"] == "missing" else f" (got {_short(problem['input'])})"
                lines.append(f"{where}: {place + ': ' if place else ''}{message}{shown}")
        raise ConfigError("\n".join(lines), "; ".join(dict.fromkeys(hints)) or None) from err


def load_config(cls: type[C], path: str | os.PathLike, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply overrides and validate."""
    return build(cls, apply_overrides(load_yaml(path), overrides), str(path))


def dump_yaml(config: Config | dict) -> str:
    """Return the full config (defaults included) as YAML."""
    data = config.model_dump(mode="json") if isinstance(config, Config) else config
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _copy(v) for k, v in node.items()}
    return [_copy(v) for v in node] if isinstance(node, list) else node


def _fields_at(cls: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Return the field names of the model that sits at `loc` below `cls` (empty where it is no model)."""
    node: Any = cls
    for part in loc:
        if isinstance(part, int):
            continue  # a place in a list, whose items are of the model already found
        models = _models_in(node.model_fields[part].annotation) if _is_model(node) and part in node.model_fields else []
        if not models:
            return []
        node = models[0]
    return list(node.model_fields) if _is_model(node) else []


def _is_model(node: Any) -> bool:
    return isinstance(node, type) and issubclass(node, BaseModel)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if _is_model(annotation):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]
