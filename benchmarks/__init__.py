"""Benchmarks: `inference`, `loader`, `scan` and `training` print tables and a line on the machine.

`crops` makes a picture of results with the included weights; the other modules are helpers.
"""
