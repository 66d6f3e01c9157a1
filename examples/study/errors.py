"""What the study says to its user in one line; any other error is a bug, and keeps its trace."""

from __future__ import annotations


class StudyError(ValueError):
    """A file, a setting or another process is in the way; the message names it and what to do."""
