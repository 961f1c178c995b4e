"""Python objects in images and arenas: buffers on page boundaries, and a pickle of everything else (S4, S10)."""
