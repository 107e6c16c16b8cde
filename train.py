"""Trains a teacher, or distils it into a student: `dvmsr train`, for use in a clone."""

from dvmsr_jax.__main__ import run

if __name__ == "__main__":
    run("train")
