"""Judging explainers: metrics, statistics, callbacks, comparison, report."""
