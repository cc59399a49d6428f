"""`python -m lorasb` is the `lorasb` command."""

from .cli.app import main

if __name__ == "__main__":
    main()
