"""Tests of the local-attention kernels."""
