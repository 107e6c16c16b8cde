"""Benchmarks: `inference`, `loader`, `scan` and `training` describe the machine and print tables.

`crops` makes the README's picture from the default weights; the other modules are helpers.
"""
