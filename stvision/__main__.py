"""``python -m stvision``: the same as the ``stvision`` command."""

from stvision.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
