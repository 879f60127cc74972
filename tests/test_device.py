"""How much memory may be used."""

import os

import torch

from osp_fast.device import memory_allowance


def test_the_allowance_is_what_is_free_less_a_margin_and_what_is_held():
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = memory_allowance(torch.device("cpu"))
    assert 0.5 * free < found < free
    assert memory_allowance(torch.device("cpu"), 1 << 50) > 1 << 50
