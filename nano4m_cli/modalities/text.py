"""Running text (str) of any length, newlines and all white space kept."""

from __future__ import annotations

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities.caption import Caption


class Text(Caption):
    name, ext = "text", "text.txt"
    tokenizer = "chars"

    def from_text(self, text: str) -> str:
        if not text:
            raise MediaError("the text is empty", 'give some characters, e.g. --from text="ROMEO:"')
        return text


MODALITY = Text()
