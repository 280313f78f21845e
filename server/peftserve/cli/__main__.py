"""`python -m peftserve.cli` is `peftserve`."""

from peftserve.cli import main

if __name__ == "__main__":
    main()
