"""Hosts on one machine: network namespaces, and the links between them."""
