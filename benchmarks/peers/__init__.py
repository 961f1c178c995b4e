"""Peers of pageferry, driven through their own interfaces."""
