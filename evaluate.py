"""Scores a model on benchmarks: `dvmsr evaluate`, for use in a clone."""

from dvmsr_jax.__main__ import run

if __name__ == "__main__":
    run("evaluate")
