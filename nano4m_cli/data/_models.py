"""Models with weights made elsewhere that look at data, for filters and pseudo-labels: found, checked, loaded once per process.

They run in fp32 on one thread of the CPU and see one picture or sound at a time: what they say depends neither on the number of
workers or cores nor on neighbours, and work is spread over processes instead.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from nano4m_cli.config import Config
from nano4m_cli.errors import WeightsError
from nano4m_cli.tokenizers import _pretrained
from nano4m_cli.tokenizers._pretrained import WeightsOptions


class Model:
    """A filter or pseudo-label that needs a model of transformers; beside its family's base class, first in the list.

    Instances are picklable and cheap: files are looked for when `hashes` or `model` is asked for. Subclasses set
    `Options` with a default of `weights`, and may replace `open`.

    Class attributes:
        model_class, model_type: as transformers calls them.
        files, optional: of a folder or a hub repository; the last of `files` holds the weights.
    """

    class Options(WeightsOptions):
        pass

    model_class: ClassVar[str]
    model_type: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ("config.json", "preprocessor_config.json", "model.safetensors")
    optional: ClassVar[tuple[str, ...]] = ()
    options: Config

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def give(self) -> str:
        """How the place of the weights is given, for hints."""
        return f"give {self.name}.weights=DIR"

    def open(self, found: dict[str, Path]) -> Any:
        """Return the model in the files, with all it needs; what cannot be used is a WeightsError."""
        return _pretrained.from_transformers(found, self.model_class, self.model_type, self.wrong)

    def wrong(self, what: str, hint: str | None = None) -> WeightsError:
        """Return the error for weights that are there and cannot be used."""
        return WeightsError(f"the weights of '{self.name}', {self.options.weights}: {what}", hint)

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of each file; files that cannot be had are a WeightsError that says where to put them."""
        return {name: _pretrained.file_hash(path) for name, path in self.found.items()}

    @property
    def found(self) -> dict[str, Path]:
        return _found(type(self), self.options)

    @property
    def model(self) -> Any:
        return _opened(type(self), self.options)

    def processor(self, cls: str, found: dict[str, Path]) -> Any:
        """Return the image processor of transformers (one that needs PIL alone) with the settings in the files."""
        import transformers

        try:
            return getattr(transformers, cls).from_pretrained(found["preprocessor_config.json"].parent, local_files_only=True)
        except Exception as err:  # types of their own again
            raise self.wrong(f"preprocessor_config.json cannot be used: {_pretrained.first_line(err)}") from err

    def vocabulary(self, found: dict[str, Path]) -> Any:
        """Return the tokenizer of tokenizer.json, which neither pads nor cuts."""
        import tokenizers

        try:
            vocabulary = tokenizers.Tokenizer.from_file(str(found["tokenizer.json"]))
        except Exception as err:  # tokenizers raises bare Exceptions
            raise self.wrong(f"tokenizer.json cannot be used: {_pretrained.first_line(err)}") from err
        vocabulary.no_padding()
        vocabulary.no_truncation()
        return vocabulary


@functools.cache
def _found(cls: type[Model], options: WeightsOptions) -> dict[str, Path]:
    one = cls(options)
    return _pretrained.find(one.name, options.weights, cls.files, cls.optional, one.give)


@functools.cache
def _opened(cls: type[Model], options: WeightsOptions) -> Any:
    return cls(options).open(_found(cls, options))


@contextlib.contextmanager
def steadily() -> Iterator[None]:
    """Run torch without gradients and on one thread: how sums are split over threads changes their last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
