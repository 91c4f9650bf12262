"""Jagged tensors and HSTU attention: runs on a bare machine with only torch, triton and numpy."""
