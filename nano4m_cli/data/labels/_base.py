"""The contract of a pseudo-label: one modality made from others of the same sample, on exactly their pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar


class Label(ABC):
    """Makes the modality of its own name. Whoever applies it says so in the data set's notes: it is no measurement.

    Class attributes:
        needs: modalities that `make` reads.
    """

    needs: ClassVar[tuple[str, ...]]

    @abstractmethod
    def make(self, raw: dict[str, Any]) -> Any:
        """Return the raw value of the modality; a function of the raw values it needs alone."""
