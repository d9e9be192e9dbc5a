"""Tokenizers with weights made elsewhere: finding the files, their hashes, and the error when they cannot be had.

Nothing found here is run: tensors come as safetensors (or by torch.load with weights_only), vocabularies as JSON, and
code in a repository is never used. A data set keeps the place and the hashes of the files (tokenizers/<modality>/
tokenizer.json and weights.json), not the files; what lies there later must have the same hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator

from nano4m_cli.config import Config
from nano4m_cli.errors import WeightsError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.spec import TokenizerRef
from nano4m_cli.tokenizers._base import Tokenizer

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CONNECT_S = 3.0  # the hub's client retries for 23 to 46 s before it says that there is no network
PLACE = {"weights", "backend", "trust_torchscript"}  # options of where weights lie and how they are read, not what ids mean


class WeightsOptions(Config):
    """weights: a local file or folder, else an id on the Hugging Face hub."""

    weights: str

    @field_validator("weights")
    @classmethod
    def _absolute(cls, weights: str) -> str:
        path = Path(weights).expanduser()
        return str(path.resolve()) if weights and path.exists() else weights


class Pretrained(Tokenizer):
    """A tokenizer that is loaded, not fitted, from `files` (of a folder or of a hub repository; the last holds the weights).

    Nothing is looked for before it is needed: without weights one can still be made, and says so when it is used.
    """

    fitted = False
    files: ClassVar[tuple[str, ...]] = ("config.json", "model.safetensors")
    optional: ClassVar[tuple[str, ...]] = ()
    options: WeightsOptions
    kept: Path | None = None  # the tokenizer.json that this one was loaded from

    @abstractmethod
    def open(self, found: dict[str, Path]) -> Any:
        """Return the model (or vocabulary) in the files; what cannot be used is a WeightsError."""

    def find(self) -> dict[str, Path]:
        """Return the files by name; files that cannot be had are a WeightsError that names them and where to put them."""
        return find(self.name, self.options.weights, self.files, self.optional, self.give("DIR"))

    def give(self, place: str) -> str:
        """Return how the place of the weights is given, for hints."""
        return f'write {place} as "weights" into {self.kept}' if self.kept else f"give {self.modality}.weights={place}"

    @cached_property
    def found(self) -> dict[str, Path]:
        return self.find()

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each file."""
        return {name: file_hash(path) for name, path in self.found.items()}

    @cached_property
    def model(self) -> Any:
        return self.open(self.found)

    def wrong(self, what: str, hint: str | None = None) -> WeightsError:
        """Return the error for weights that are there and cannot be used."""
        return WeightsError(f"the weights of '{self.name}', {self.options.weights}: {what}", hint)

    @property
    def weights_sha256(self) -> str:
        """The hash of the file with the weights, the last found, as `sha256sum` and the hub show it."""
        return list(self.hashes.values())[-1]

    def ref(self, weights_sha256: str) -> TokenizerRef:
        """Return which tokenizer this is; not where its weights lie: the same ones in another place make the same ids."""
        config = self.options.model_dump(mode="json", exclude=PLACE)
        return TokenizerRef(name=self.name, config=config, weights_sha256=weights_sha256)

    def save(self, folder: Path) -> None:
        self.spec()  # weights that cannot be used are found now, not when something relies on them
        (folder / "weights.json").write_text(json.dumps(self.hashes, indent=1))

    def load(self, folder: Path) -> None:
        path = folder / "weights.json"
        try:
            wanted = json.loads(path.read_text())
            if not isinstance(wanted, dict):
                raise ValueError("it holds no hashes by name")
        except (OSError, ValueError) as err:
            raise WeightsError(f"{path} is damaged: {err}", "delete the folder and tokenize again") from err
        self.kept = folder / "tokenizer.json"
        for name in sorted({*wanted, *self.hashes}):
            mine, theirs = self.hashes.get(name, "none"), wanted.get(name, "none")
            if mine != theirs:
                raise WeightsError(
                    f"{self.found.get(name, name)} is not what the tokens in use were made with: its sha256 is {mine[:12]}, "
                    f"{str(theirs)[:12]} is expected", self.repair(),
                )

    def repair(self) -> str:
        """Return what to do where the weights of a saved tokenizer are others than it was saved with."""
        return f"put the right ones there, or {self.give('the folder of the right ones')}"


def file_hash(path: Path) -> str:
    """Return the sha256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise WeightsError(f"cannot read {path}: {err.strerror or err}") from err


def find(name: str, weights: str, files: Sequence[str], optional: Sequence[str], give: str) -> dict[str, Path]:
    """Return the files of a local folder, else of the hub's cache, else of the hub: `optional` (if there), then `files`.

    Args:
        name: of the tokenizer. give: how its weights are given, for the hint, e.g. "give audio.weights=DIR".

    Raises:
        WeightsError: at once, where a file cannot be had: which, and where to put it.
    """
    needed = " and ".join(files)
    folder = Path(weights).expanduser()
    give = f"put {needed} into a folder DIR and {give}"
    if weights and folder.is_dir():
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl"))
            why = f" ({', '.join(pickled)} would have to be unpickled, which may run code; it is not read)" if pickled else ""
            raise WeightsError(f"no weights of '{name}': {folder} holds no {' and no '.join(missing)}{why}", give)
        return {f: folder / f for f in [*optional, *files] if (folder / f).is_file()}
    if folder.is_file():
        raise WeightsError(f"no weights of '{name}': {folder} is a file, a folder is needed", give)
    if not HUB_ID.fullmatch(weights):
        raise WeightsError(f"no weights of '{name}': there is no '{weights}'", give)
    return _from_hub(name, weights, files, optional, give)


def _from_hub(who: str, repo: str, files: Sequence[str], optional: Sequence[str], give: str) -> dict[str, Path]:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    out: dict[str, Path] = {}
    revision, names = "main", [*files, *optional]
    for name in names:
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            out[name] = Path(path)
            revision = out[name].parent.name  # the commit: all files are of one
    if not set(files) <= set(out):
        needed = " and ".join(files)
        missing = f"no weights of '{who}': '{repo}' is no folder here and not in the hub's cache {constants.HF_HUB_CACHE}, and "
        hint = f"{give}; or, where there is a network: hf download {repo} {' '.join(files)}"
        if constants.HF_HUB_OFFLINE:
            raise WeightsError(f"{missing}HF_HUB_OFFLINE forbids to fetch {needed}", hint)
        if not _reachable(constants.ENDPOINT):
            raise WeightsError(f"{missing}{constants.ENDPOINT} cannot be reached to fetch {needed}", hint)
        out, revision = {}, None
        for name in names:
            try:
                out[name] = Path(hf_hub_download(repo, name, revision=revision))
            except Exception as err:  # the client's own types, its transport's, the storage's
                if isinstance(err, EntryNotFoundError) and name in optional:
                    continue
                raise WeightsError(f"no weights of '{who}': '{repo}' gives no {name}: {first_line(err)}", give) from err
            revision = out[name].parent.name
    return {name: out[name] for name in [*optional, *files] if name in out}


def _reachable(url: str) -> bool:
    import httpx

    try:
        httpx.head(url, timeout=CONNECT_S)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


def first_line(err: Exception) -> str:
    """Return the first line of an error's text, else its type."""
    return (str(err).strip() or type(err).__name__).splitlines()[0]


def from_transformers(
    found: dict[str, Path], model_class: str, model_type: str, wrong: Callable[[str], WeightsError], unused: Collection[str] = ()
) -> Any:
    """Return the transformers model of a folder with config.json and model.safetensors: whole, in fp32, for inference.

    Args:
        found: the files by name. model_class, model_type: as transformers calls them. wrong: makes the error.
        unused: tensors that only training needs: published weights may lack them.
    """
    path = found["config.json"]
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as err:
        raise wrong(f"{path} is damaged: {err}") from err
    if kind != model_type:
        raise wrong(f"{path} is of a model of type '{kind}', '{model_type}' is needed")
    ensure_torchaudio()
    import torch
    import transformers

    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, info = getattr(transformers, model_class).from_pretrained(
                path.parent, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as err:  # transformers, safetensors and the config's checks raise types of their own
        raise wrong(str(err).strip() or type(err).__name__) from err
    if lacking := set(info["missing_keys"]) - set(unused):
        raise wrong(f"{len(lacking)} tensors are missing, e.g. {min(lacking)}")
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing progress bars and load reports."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
