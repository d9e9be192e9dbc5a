"""Reading JSON that others wrote: exactly what is expected, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from nano4m_cli.config import Config, build
from nano4m_cli.errors import ConfigError, DataError

LARGEST = 1 << 20  # bytes
C = TypeVar("C", bound=Config)


def read_strictly(path: Path, cls: type[C]) -> C:
    """Return a JSON file as `cls`; what is not exactly that is a DataError that names the file and the place.

    Refused are: more than LARGEST bytes, keys that stand twice, NaN, numbers as text, unknown keys, nesting without end.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no number")

    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MB")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=no_number)
        return build(cls, data, str(path))
    except (OSError, ValueError, RecursionError) as err:
        raise DataError(f"{path} cannot be used: {err}", "take it out of the folder, or ask for it again") from err
    except ConfigError as err:
        raise DataError(err.message, "take it out of the folder, or ask for it again") from err
