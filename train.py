"""Train a flow: `python train.py [group=choice ...] [setting=value ...]`; `python train.py --help` lists them."""

import contextlib
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import divflow.sweeps  # noqa: F401 - for the names of folders


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Run one experiment; what a user can mend ends with its message and not with a traceback."""
    config.output_dir = HydraConfig.get().runtime.output_dir  # a sweep, or hydra.run.dir=..., may have said another
    try:
        from divflow.build import check_settings  # imported here, where Ctrl-C is caught
        from divflow.errors import DivflowError
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        check_settings(config)
        from divflow.experiment import train

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
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(config.output_dir)  # where nothing was left


if __name__ == "__main__":
    main()
