"""Pickles of tensors, read without running what is in them."""

import pickle
import re
import zipfile
from argparse import Namespace
from enum import EnumMeta
from pathlib import Path

import torch

GETATTR = "builtins", "getattr"  # what Python 3.11.2, Debian 12's, makes of a member of an enum


UNSAFE = (
    "it is a pickle that would run code or make objects of its own when it is read, and tensors are"
    " all that is needed; ask for the weights as safetensors, or load it once where you trust it"
    " and save its state_dict() alone"
)


def read_pickle(path: Path) -> object:
    """What torch.save wrote, if it is tensors and plain containers alone; memory-mapped where the
    file permits.
    """
    if torchscript(path):  # as OpenAI released its models
        command = (
            f"import torch; torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(),"
            f" '{path.stem}-weights.pt')"
        )
        raise ValueError(
            f"{path}: refused: a TorchScript archive, which can run code when it is loaded. "
            f'If you trust it, keep its weights alone, and convert those: python -c "{command}"'
        )
    try:
        # trainers' arguments, as MAE and DeiT keep them beside the weights
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except FileNotFoundError:
        raise
    except Exception as error:  # a file that is no pickle may raise anything
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path}: refused ({wanted[1]}): {UNSAFE}") from None
        raise ValueError(
            f"{path}: truncated or no file of tensors ({first_line(error)}); fetch it again"
        ) from None


def member(kind: object, name: str) -> object:
    """Of an enum, by its name: the only getattr that pickles may do."""
    if isinstance(kind, EnumMeta) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"getattr of {kind!r}")


def first_line(error: Exception) -> str:
    """The first sentence of what an error says, after what torch.load says first of every file."""
    said = str(error).strip()
    if said.startswith("Weights only load failed"):
        said = said.rpartition("WeightsUnpickler error:")[2].strip()
    return (said.splitlines() or [type(error).__name__])[0].partition(". ")[0][:120]


def torchscript(path: Path) -> bool:
    """Is it an archive of code and constants?"""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("constants.pkl") for name in file.namelist())
    except zipfile.BadZipFile:  # read_pickle says so
        return False
