"""Train a flow: `python train.py [group=choice ...] [setting=value ...]`; the same as `divflow train`."""

import sys

from divflow.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
