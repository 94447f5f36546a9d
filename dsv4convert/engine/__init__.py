"""The engine: carries out a plan, whatever its target, in bounded memory."""
