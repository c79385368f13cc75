"""Measurements: how fast blocks, rewritten networks and rewriting itself are, and how much memory they take."""

from __future__ import annotations
