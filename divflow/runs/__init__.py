"""A run, from its config to its results: settings, training, folder, logs and tables."""
