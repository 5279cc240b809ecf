"""Reads finished or running run directories and draws them; never imported by training code."""
