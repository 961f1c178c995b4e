"""Format of `--help`, which alone needs rich."""

from __future__ import annotations

from rich_argparse import RichHelpFormatter


class HelpFormatter(RichHelpFormatter):
    """Coloured help without rich markup: square brackets are printed literally."""

    help_markup = False
    text_markup = False
    group_name_formatter = str.capitalize
