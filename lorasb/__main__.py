"""`python -m lorasb` is the `lorasb` command."""

from .cli import main

if __name__ == "__main__":
    main()
