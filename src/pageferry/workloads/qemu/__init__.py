"""QEMU guests as workloads."""
