"""Benchmarks: `python -m benchmarks.quantizers`, `.step`, `.growth`, `.cold_start`, and `.tables` for the documentation.

All of them race their entrants in one process in alternating turns (A B C A B C ...), and report medians and ratios that
are taken turn by turn, so that a machine that slows down slows everybody down. Each writes JSON, Markdown and plots.
"""

import os

# More networks lie in one process here than in any training run: keep oneDNN's compiled kernels of all of them (default 1024).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
