"""Workloads whose pages are sent again: what they write, and what of it differs from before."""
