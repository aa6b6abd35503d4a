"""`python -m bitmosaic` is the command `bitmosaic`."""

from bitmosaic.cli import main

if __name__ == "__main__":
    main()
