"""Page sharing found inside large pages (S9): scan, estimate, and apply to those large pages where it pays."""
