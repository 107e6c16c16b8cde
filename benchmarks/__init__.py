"""Measurements: inference, loader, scan and training print tables and the machine that they ran on.

`crops` makes a picture of the shipped weights' results; the other modules serve these.
"""
