"""Train a flow: `python train.py [group=choice ...] [setting=value ...]`; `python train.py --help` lists them."""

import sys

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Run one experiment; what a user can mend ends with its message and not with a traceback."""
    try:
        from divflow.errors import DivflowError  # imported here, where Ctrl-C is caught
        from divflow.experiment import train
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        train(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except DivflowError as error:
        sys.exit(f"error: {error}")
    except OmegaConfBaseException as error:
        sys.exit(f"error: {error}")
    except InstantiationException as error:
        if not isinstance(error.__cause__, (ValueError, TypeError)):
            raise
        sys.exit(f"error: {error.__cause__}")


if __name__ == "__main__":
    main()
