"""The commands by `python -m divflow`, which torchrun can start: `torchrun ... -m divflow train`."""

from divflow.cli import main

if __name__ == "__main__":
    main()
