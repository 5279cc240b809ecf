"""Reads finished or running run directories and draws them."""
