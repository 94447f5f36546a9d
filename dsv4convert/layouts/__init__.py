"""Layouts: pure functions from an inventory of source tensors to an ordered list of output tensors."""
