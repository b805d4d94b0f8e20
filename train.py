"""Train a flow: `python train.py [group=choice ...] [setting=value ...]`; `python train.py --help` lists them."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from divflow.errors import DivflowError
from divflow.experiment import train


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Run one experiment in the folder that Hydra made for it."""
    try:
        train(config, Path(HydraConfig.get().runtime.output_dir))
    except DivflowError as error:
        sys.exit(f"error: {error}")
    except InstantiationException as error:
        if isinstance(error.__cause__, (DivflowError, ValueError, TypeError)):
            sys.exit(f"error: {error.__cause__} (at {error.full_key or 'the config'})")
        raise


if __name__ == "__main__":
    main()
