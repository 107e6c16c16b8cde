"""Measurements, each a module that prints a table and the machine that it ran on."""
