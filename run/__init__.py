"""The scripts, and the packages that they share.

DeepSpeed reads DS_ACCELERATOR when it is first imported, and warns where it has to guess.
"""

import os

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
