"""Pager of microVMs of Firecracker (S10): the backend of `PUT /snapshot/load` with `mem_backend` `Uffd`."""
