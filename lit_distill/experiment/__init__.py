"""Runs on disk, recipes, comparison, dashboard, export. Knows no domain."""
