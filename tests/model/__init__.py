"""Tests against llama.cpp: its converter for the bytes, its runtime for what the bytes mean."""
