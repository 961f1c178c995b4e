"""Time for which guests that were restored from one image return equal random numbers."""
