"""Pickles of tensors, read without running code in them."""

import pickle
import re
import zipfile
from argparse import Namespace
from enum import EnumMeta
from pathlib import Path

import torch

# Python 3.11.2, Debian 12's, pickles a member of an enum as a call of getattr.
GETATTR = "builtins", "getattr"

UNSAFE_MESSAGE = (
    "it is a pickle that would run code or make objects of its own when it is read, and tensors are"
    " all that is needed; ask for the weights as safetensors, or load it once where you trust it"
    " and save its state_dict() alone"
)


def read_pickle(path: Path) -> object:
    """Return the content of a file of torch.save, memory-mapped if possible.

    ValueError if it holds anything but tensors and plain containers.
    """
    if is_torchscript(path):  # as OpenAI released its models
        command = (
            f"import torch; torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(),"
            f" '{path.stem}-weights.pt')"
        )
        raise ValueError(
            f"{path}: refused: a TorchScript archive, which can run code when it is loaded. "
            f'If you trust it, keep its weights alone, and convert those: python -c "{command}"'
        )
    try:
        # MAE and DeiT keep the trainer's arguments beside the weights.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except FileNotFoundError:
        raise
    except Exception as error:  # a file that is no pickle may raise anything
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path}: refused ({name[1]}): {UNSAFE_MESSAGE}") from None
        raise ValueError(
            f"{path}: truncated or no file of tensors ({first_line(error)}); fetch it again"
        ) from None


def enum_member(kind: object, name: str) -> object:
    """Return a member of an enum by its name: the only getattr that pickles may do."""
    if isinstance(kind, EnumMeta) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"getattr of {kind!r}")


def first_line(error: Exception) -> str:
    """Return the first sentence of an error, without what torch.load says about every file."""
    text = str(error).strip()
    if text.startswith("Weights only load failed"):
        text = text.rpartition("WeightsUnpickler error:")[2].strip()
    lines = text.splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0][:120]


def is_torchscript(path: Path) -> bool:
    """Return True for an archive of code and constants."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("constants.pkl") for name in file.namelist())
    except zipfile.BadZipFile:  # read_pickle says so
        return False
