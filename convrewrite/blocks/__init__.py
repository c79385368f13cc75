"""The blocks: modules that can stand where a convolution stood. A file that registers one is found by itself."""

from __future__ import annotations

from convrewrite.blocks.base import BLOCKS, Block, BlockOptions, register_block

__all__ = ["BLOCKS", "Block", "BlockOptions", "register_block"]
