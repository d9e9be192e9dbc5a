"""One file per member: the modules of a package are its registry, and a file's name is its name everywhere.

Modules whose name begins with an underscore are the package's shared code and are no members.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from nano4m_cli.errors import UnknownNameError


class Registry:
    """The members of one family, e.g. `Registry("probe", "nano4m_cli.probes")`; nothing is imported until asked for.

    Args:
        kind: what a member is called in messages.
        package: dotted name of the package whose modules are the members.
        symbol: the attribute that each module must define and `get` returns.
    """

    def __init__(self, kind: str, package: str, symbol: str):
        self.kind, self.package, self.symbol = kind, package, symbol

    def _files(self) -> dict[str, Path]:
        found = importlib.util.find_spec(self.package)
        assert found is not None and found.submodule_search_locations, self.package
        folder = Path(found.submodule_search_locations[0])
        return {p.stem: p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}

    def names(self) -> list[str]:
        """Return the names of all members, sorted."""
        return list(self._files())

    def __contains__(self, name: str) -> bool:
        return name in self._files()

    def summary(self, name: str) -> str:
        """Return the first line of a member's docstring, read without importing it."""
        path = self._files().get(name)
        if path is None:
            raise UnknownNameError.of(self.kind, name, self.names())
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        return doc.split("\n")[0]

    def get(self, name: str):
        """Import a member's module and return its symbol; an unknown name is an error with the nearest one."""
        if name not in self:
            raise UnknownNameError.of(self.kind, name, self.names())
        module: ModuleType = importlib.import_module(f"{self.package}.{name}")
        return getattr(module, self.symbol)


SOURCES = Registry("source", "nano4m_cli.data.sources", "Source")
MODALITIES = Registry("modality", "nano4m_cli.modalities", "MODALITY")
TOKENIZERS = Registry("tokenizer", "nano4m_cli.tokenizers", "Tokenizer")
COMPONENTS = Registry("masking component", "nano4m_cli.masking", "Component")
LABELS = Registry("pseudo-label", "nano4m_cli.data.labels", "Label")
FILTERS = Registry("filter", "nano4m_cli.data.filters", "Filter")
PROBES = Registry("probe", "nano4m_cli.probes", "Probe")
