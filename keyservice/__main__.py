"""``python -m keyservice``: the same as the command ``keyservice``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
