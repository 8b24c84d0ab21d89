"""`python -m regions.recorder`: a recording verifier, with its settings from the environment."""

from regions.recorder.process import main

if __name__ == "__main__":
    main()
