"""Class labels: one line of text (str), one of a closed list."""

from __future__ import annotations

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities.caption import Caption


class Label(Caption):
    name, ext = "label", "label.txt"
    tokenizer = "classes"

    def from_text(self, text: str) -> str:
        if not text.strip():
            raise MediaError("the label is empty", "name a class, e.g. --from label=3")
        return " ".join(text.split())


MODALITY = Label()
