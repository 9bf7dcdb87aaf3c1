"""Run directories, configs, provenance, atomic files and splits. No torch."""
