"""Where the files of the reproduction are: a checkout of the repository around the package."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "profiles"
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
RECORDS = DATA / "records"  # committed measurements
MEASUREMENTS = DATA / "measurements"  # committed results of `urank measure`
PAPER = DATA / "paper"  # the numbers that the papers print
BENCHMARKS = DATA / "benchmarks"  # committed benchmark results
