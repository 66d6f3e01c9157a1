"""Offline-teacher distillation of language models with cached logits and an entropy-aware loss.

The sources stand in the top-level folders `pipeline`, `stages`, `storage`, `configs` and `examples`. This package links
to them, so that a checkout, a wheel and every tool that reads imports see the same names (`eopd.pipeline`, ...).
"""
