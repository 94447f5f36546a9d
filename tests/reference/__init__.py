"""Tests of the numpy forward pass."""
