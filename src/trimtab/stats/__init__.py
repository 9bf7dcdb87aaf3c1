"""Intervals, bootstrap, permutation tests and rank agreement. No torch."""
