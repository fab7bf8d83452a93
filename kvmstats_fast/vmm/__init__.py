"""Processes that have VMs, and the ways to get at their stats files."""
