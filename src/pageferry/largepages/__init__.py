"""Large pages that are hardly used: found by sampling, and reclaimed (S3)."""
