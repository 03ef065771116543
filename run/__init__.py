"""Command line scripts, and the packages that they share.

Importing this package sets DS_ACCELERATOR. DeepSpeed reads it when it is first imported, and prints
a warning if it has to guess the accelerator.
"""

import os

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
