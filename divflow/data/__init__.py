"""Lightning data modules: toy densities with a known log-density, handwritten digits, a table of one's own."""

from divflow.data.digits import Digits
from divflow.data.module import DataError, TensorDataModule
from divflow.data.table import Table
from divflow.data.toy import Toy
from divflow.transforms import Affine, Compose, Logit, Transform

__all__ = ["Affine", "Compose", "DataError", "Digits", "Logit", "Table", "TensorDataModule", "Toy", "Transform"]
