"""Errors that are the user's to mend: each is told in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """Something in the configuration is wrong; the message is one clear line."""


class NonFiniteError(RuntimeError):
    """The loss, the gradient or the weights are no longer finite."""
