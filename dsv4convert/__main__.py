"""Entry point of ``python -m dsv4convert`` and of the console script."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
