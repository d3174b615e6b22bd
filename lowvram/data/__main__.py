"""`python -m lowvram.data source=FOLDER dest=out.zip resolution=256`: see lowvram.data.prepare."""

import sys

from lowvram.config import command
from lowvram.data.prepare import PrepareOptions, main


def _main(options: PrepareOptions) -> None:
    try:
        main(options)
    except KeyboardInterrupt:
        print("lowvram: interrupted, nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command(PrepareOptions, _main, "data")
