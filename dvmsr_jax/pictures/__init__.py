"""Reads, upscales and writes users' pictures, of many kinds and many at once."""
