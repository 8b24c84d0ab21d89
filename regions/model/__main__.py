"""`python -m regions.model` is `regions model`."""

from regions.model.cli import main

if __name__ == "__main__":
    main()
