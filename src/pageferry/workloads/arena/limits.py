"""Limits of arenas."""

MAX_ARENA = 1 << 46
"""Maximum size of an arena, bytes: half of the user address space on x86-64."""
