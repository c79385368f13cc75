"""Tests of the rule language: text to rules to sites."""
