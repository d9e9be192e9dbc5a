"""Import torchaudio beside a torch without CUDA.

torchaudio's PyPI wheel is a CUDA build: next to a CPU torch, loading its compiled extension raises OSError, and most
transformers models then fail to import too. Nothing used here (resampling, mel, Griffin-Lim, encodec) needs the
extension, so a stand-in that says "no extension" takes its place, only after the real import has failed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types


def ensure_torchaudio() -> types.ModuleType:
    """Return the torchaudio module; call this before importing torchaudio, encodec or a transformers model."""
    try:
        return importlib.import_module("torchaudio")
    except (OSError, ImportError, RuntimeError) as err:
        if isinstance(err, ModuleNotFoundError) and err.name == "torchaudio":
            raise
        for name in [n for n in sys.modules if n == "torchaudio" or n.startswith("torchaudio.")]:
            del sys.modules[name]
        stub = types.ModuleType("torchaudio._extension")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio._extension", None)
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
        stub._IS_ALIGN_AVAILABLE = False
        stub._check_cuda_version = lambda: None
        stub.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = stub
        return importlib.import_module("torchaudio")
