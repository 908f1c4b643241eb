"""`python -m benchmarks` is `python -m benchmarks.speed`."""

from .speed import main

main()
