"""A network, an estimator, an SDE and data of one's own, for divflow."""
