"""The `lorasb` command, also as `python -m lorasb`: Ctrl-C prints one line at any time, even during imports."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command."""
    try:
        from .app.cli import main as run

        run()
    except KeyboardInterrupt:
        print("lorasb: interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells report it


if __name__ == "__main__":
    main()
