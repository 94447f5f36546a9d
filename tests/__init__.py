"""Tests of dsv4convert; the folders mirror the package."""
