"""What commands tell: results on stdout, progress on stderr, for people or for programs."""
