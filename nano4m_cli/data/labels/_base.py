"""The contract of a pseudo-label: one modality made from others of the same sample, on exactly their pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from nano4m_cli.data._settings import Configured


class Label(Configured, ABC):
    """Makes a modality. Whoever applies it says so in the data set's notes: it is no measurement. Picklable and cheap.

    Class attributes:
        makes: the modality; where it is not given, that of the label's own name.
        needs: modalities that `make` reads.
    """

    makes: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.makes = cls.__dict__.get("makes", cls.__module__.rpartition(".")[2])

    @abstractmethod
    def make(self, raw: dict[str, Any]) -> Any:
        """Return the raw value of the modality; a function of the raw values it needs alone."""

    def note(self) -> str:
        """Return what a reader of the data set must know of these values beside that they were computed ("": nothing)."""
        return ""
