"""Random numbers that depend on what they are for and on nothing else.

No part of the engine draws from a global random state. Each draw names its purpose and its place (seed, epoch, clip,
step, ...), so a run that is resumed, or spread over other workers or ranks, draws the same numbers.
"""

import hashlib
import random

import torch


def stable_seed(*parts: str | int) -> int:
    """A 63-bit seed from the given parts; equal parts give an equal seed on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def python_random(*parts: str | int) -> random.Random:
    """A `random.Random` for the draws that `parts` name."""
    return random.Random(stable_seed(*parts))


def torch_generator(*parts: str | int) -> torch.Generator:
    """A CPU `torch.Generator` for the draws that `parts` name; CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(stable_seed(*parts))
