"""Errors that are the user's to mend: each says what was given, where, what is allowed, and what to do.

The command line prints them as one paragraph without a traceback; everything else that is raised is a bug of ours.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: a configuration, a file, a data set, an argument."""


class ConfigError(UserError):
    """A configuration that cannot be carried out; names the key, the value, what is allowed and the remedy."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, hostile or does not fit; lists every offending key or file."""


class DataError(UserError):
    """Data that is missing, empty, or lacks a column."""


class TrainingError(RuntimeError):
    """A training run that must stop, such as a non-finite loss; nothing was stepped or overwritten."""
