"""`python -m regions` is the `regions` command."""

from regions.cli import main

if __name__ == "__main__":
    main()
