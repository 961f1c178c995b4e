"""Servers for tests of images in stores: an S3 server, and a proxy that injects faults."""
