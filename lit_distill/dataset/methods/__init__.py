"""A module for each method."""
