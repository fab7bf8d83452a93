"""Plugins of benchmark suites; each is loaded by its suite, and by nothing else."""
