"""Filters and pseudo-labels have settings: `nano4m fetch folder filter=[panns] panns.weights=DIR panns.reject=[Speech]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nano4m_cli.config import Config, build
from nano4m_cli.registry import Registry

PLACE = "weights"  # says where weights lie, not what they say: the hashes do


class Configured:
    """A member of a family that is made with settings; its `Options` must be hashable (tuples, never lists)."""

    class Options(Config):
        pass

    def __init__(self, options: Config | None = None):
        self.options = self.Options() if options is None else options

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of each file that it needs; one that cannot be had is a WeightsError."""
        return {}


def made(family: Registry, name: str, settings: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the member of that name with its part of the settings; wrong ones are a ConfigError that names it."""
    cls = family.get(name)
    return cls(build(cls.Options, dict(settings.get(name, {})), f"{family.kind} '{name}'"))
