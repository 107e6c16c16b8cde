"""People's pictures, of every kind and many at once: read, upscaled, written."""
