"""Formatter of `--help`. It is a separate module because it imports rich, which the parser does not need otherwise."""

from __future__ import annotations

from rich_argparse import RichHelpFormatter


class HelpFormatter(RichHelpFormatter):
    """Formatter of coloured help. Rich markup is disabled, so that square brackets are printed literally."""

    help_markup = False
    text_markup = False
    group_name_formatter = str.capitalize
