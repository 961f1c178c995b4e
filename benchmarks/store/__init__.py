"""Restores from an S3 store behind a slow link."""
