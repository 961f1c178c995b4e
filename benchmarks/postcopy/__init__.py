"""Parts of the post-copy benchmark."""
