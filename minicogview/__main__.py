"""``python -m minicogview``: the command ``minicogview``."""

import sys

from minicogview.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
